// How well does an image fit its words, and is it too close to a training image? Badges on its tile, and the detail.

import { icon } from "./icons.js";
import { labelOf } from "./prompt.js";
import { ask } from "./server.js";
import { h, loadStyle, percent } from "./ui.js";

let number = 0;

/** A row of bars: [name, share, marked]. */
export function bars(rows) {
  return h("ul.bars", ...rows.map(([name, share, mark]) => {
    const fill = h("i");
    fill.style.width = `${100 * share}%`;
    return h("li", { class: mark ? "marked" : "" }, h("span", name), h("span.bar", fill),
      h("span.share", percent(share)));
  }));
}

const stated = new Map(); // prompt -> promise of what it states: {attribute: whether it is there}
function statedBy(prompt) {
  if (!stated.has(prompt)) {
    stated.set(prompt, ask("prompt/analyze", { prompt }).then(({ attributes }) => attributes, () => ({})));
  }
  return stated.get(prompt);
}

/** The badges of a finished image that was generated from a prompt. */
export async function badges({ adherence, agreement, nearest, prompt }, asked) {
  const [said] = await Promise.all([adherence == null ? {} : statedBy(prompt ?? asked), loadStyle("editing.css")]);
  const made = [];
  if (adherence != null) {
    number += 1;
    const id = `fit-${number}`;
    const rows = Object.entries(agreement ?? {}).sort((one, other) => one[1] - other[1]);
    made.push(h("button.badge", { "data-level": adherence > 0.7 ? "good" : adherence > 0.45 ? "fair" : "poor",
      "aria-label": `Fits the words to ${percent(adherence)}`, "aria-describedby": id, text: percent(adherence) }),
    h("div.detail", { id }, h("b", "How it fits the words"),
      bars(rows.map(([name, share]) => [labelOf(name, said[name] ?? true), share, share < 0.45])),
      h("p", "As a small classifier sees it, which never helped to generate.")));
  }
  if (nearest?.too_close) {
    made.push(h("p.badge.near", { title: "Closer to a training image than nearly all images of other people are" },
      icon("alert"), "Near a training face"));
  }
  return made;
}
