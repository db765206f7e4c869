// How do two pictures differ? Side by side, or one wiped over the other; and what was asked for differently.

import { canDo } from "./edits.js";
import { altOf, wordsOf } from "./pictures.js";
import { $, closable, h, img, openDialog, segments, softButton } from "./ui.js";

const ROWS = [["Description", (one) => wordsOf(one.job)], ["Seed", (one) => one.seed], ["Steps", (one) => one.job.parameters.n_inf_steps],
  ["Guidance", (one) => one.job.parameters.guidance_scale], ["Sampler", (one) => one.job.parameters.sampler],
  ["Steered away from", (one) => one.job.parameters.negative_prompt || "–"]];

function mode(name) {
  $("compare-pair").hidden = name !== "beside";
  $("compare-wipe").hidden = name !== "wipe";
}

function wipe() {
  $("wipe-over").style.clipPath = `inset(0 ${100 - $("wipe-at").value}% 0 0)`;
}

export function compare([one, other], actions) {
  segments($("compare-modes"), "compare-mode", [["Side by side", "beside"], ["Wipe", "wipe"]], "beside", mode);
  mode("beside");
  $("compare-pair").replaceChildren(...[one, other].map((picture) => h("figure", {},
    img(picture.url, altOf(picture)),
    h("figcaption", { text: `Seed ${picture.seed}` }))));
  for (const [id, picture] of [["wipe-over", one], ["wipe-under", other]]) {
    $(id).src = picture.url;
    $(id).alt = altOf(picture);
  }
  $("wipe-at").value = 50;
  wipe();
  const head = h("tr", {}, h("td"), h("th", { scope: "col", text: "First" }), h("th", { scope: "col", text: "Second" }));
  $("differences").replaceChildren(h("thead", {}, head), h("tbody", {}, ...ROWS.map(([name, read]) => {
    const [first, second] = [String(read(one)), String(read(other))];
    return h("tr", { class: first === second ? "" : "differs" }, h("th", { scope: "row", text: name }), h("td", { text: first }), h("td", { text: second }));
  })));
  const blend = softButton("blend", "Blend these two", () => { $("compare").close(); actions.blend(one, other); });
  $("compare-foot").replaceChildren(canDo("interpolate_to") ? blend : "");
  openDialog($("compare"));
}

$("wipe-at").addEventListener("input", wipe);
closable($("compare"), $("compare-close"));
