// What is in the dialog that shows one image, large? Its markup, which viewer.js fills.

import { h, iconButton, img } from "./ui.js";
import { icon } from "./icons.js";

const step = (name, label, image) => h("button.viewer-step", { class: `viewer-step ${name}`, id: `viewer-${name}`,
  "aria-label": label }, icon(image), img(null));
const control = (name, label, id) => iconButton(name, label, null, { id });

export const dialog = h("dialog.viewer", { id: "viewer", "aria-labelledby": "viewer-title" },
  h("div.viewer-main",
    h("div.viewer-row", step("prev", "Previous image", "left"),
      h("div.viewer-frame", { id: "viewer-frame" }, img(null, "", { id: "viewer-image", draggable: "false" })),
      step("next", "Next image", "right")),
    h("div.zoom", { role: "group", "aria-label": "Zoom" }, control("minus", "Zoom out", "zoom-out"),
      h("button.plain", { id: "zoom-reset", title: "The size of the image; press to see all of it", text: "100 %" }),
      control("plus", "Zoom in", "zoom-in"),
      h("label.check", h("input", { type: "checkbox", id: "pixels" }), h("span", "Pixels"))),
    h("div.steps", { id: "steps" },
      h("button.round", { id: "steps-play", "aria-label": "Play the steps" }, icon("play")),
      h("div.steps-track", h("div.steps-strip", { id: "steps-strip", "aria-hidden": "true" }),
        h("input", { type: "range", id: "steps-at", min: 0, max: 0, value: 0, "aria-label": "Denoising step" })),
      h("output", { id: "steps-text", for: "steps-at" }),
      h("button.soft", { id: "steps-fork", hidden: true, text: "Fork from here" }))),
  h("div.viewer-side",
    h("div.viewer-head", h("p.quiet", { id: "viewer-count" }), control("close", "Close", "viewer-close")),
    h("h2.words", { id: "viewer-title", tabindex: "-1" }),
    h("div.viewer-actions", { id: "viewer-actions" }),
    h("dl.facts", { id: "viewer-facts" }),
    h("div.viewer-more", { id: "viewer-more" })));

document.body.append(dialog);
