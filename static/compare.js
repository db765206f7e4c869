// How do two pictures differ? Side by side, or one wiped over the other; and what was asked for differently.

import { canDo } from "./edits.js";
import { altOf, wordsOf } from "./pictures.js";
import { h, img, openSheet, segments, softButton } from "./ui.js";

const factsOf = ({ job, seed, job: { parameters: asked } }) => ({ Description: wordsOf(job), Seed: seed, Steps: asked.n_inf_steps,
  Guidance: asked.guidance_scale, Sampler: asked.sampler, "Steered away from": asked.negative_prompt || "–" });

export function compare([one, other], actions) {
  const over = img(one.url, altOf(one), { id: "wipe-over" });
  const at = h("input", { type: "range", id: "wipe-at", value: 50, "aria-label": "How much of the first picture is seen", input: wipe });
  function wipe() {
    over.style.clipPath = `inset(0 ${100 - at.value}% 0 0)`;
  }
  wipe();
  const ways = { beside: h("div", { class: "pair" }, ...[one, other].map((picture) => h("figure", {},
    img(picture.url, altOf(picture)), h("figcaption", { text: `Seed ${picture.seed}` })))),
  wipe: h("div", { class: "wipe", hidden: true }, h("div", { class: "wipe-stack" }, img(other.url, altOf(other)), over), at) };
  const modes = segments(h("div", { class: "segments" }), "compare-mode", [["Side by side", "beside"], ["Wipe", "wipe"]], "beside", (chosen) => {
    for (const [name, box] of Object.entries(ways)) box.hidden = name !== chosen;
  });
  const head = h("tr", {}, h("td"), h("th", { scope: "col", text: "First" }), h("th", { scope: "col", text: "Second" }));
  const rows = Object.entries(factsOf(one)).map(([name, first]) => {
    const second = factsOf(other)[name];
    return h("tr", { class: first === second ? "" : "differs" }, h("th", { scope: "row", text: name }), h("td", { text: first }), h("td", { text: second }));
  });
  const dialog = openSheet("compare", "Compare", "compare", [ways.beside, ways.wipe,
    h("div", { class: "table-box" }, h("table", { class: "differences" }, h("thead", {}, head), h("tbody", {}, ...rows))),
    h("div", { class: "sheet-foot" }, canDo("interpolate_to")
      && softButton("blend", "Blend these two", () => { dialog.close(); actions.blend(one, other); }))]);
  dialog.querySelector("h2").after(modes);
}
