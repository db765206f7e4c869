// How do two images differ? Side by side, or one wiped over the other; and what was asked for differently.

import { canDo } from "./edits.js";
import { altOf, wordsOf } from "./images.js";
import { h, img, openSheet, segments, softButton } from "./ui.js";

const factsOf = ({ job, seed, job: { parameters: asked } }) => ({
  Description: wordsOf(job), Seed: seed, Steps: asked.n_inf_steps,
  Guidance: asked.guidance_scale, Sampler: asked.sampler, "Negative prompt": asked.negative_prompt || "–",
});

export function compare([one, other], actions) {
  const over = img(one.url, altOf(one), { id: "wipe-over" });
  const at = h("input", {
    type: "range", id: "wipe-at", value: 50, "aria-label": "How much of the first image is seen", input: wipe,
  });
  function wipe() {
    over.style.clipPath = `inset(0 ${100 - at.value}% 0 0)`;
  }
  wipe();
  const ways = { beside: h("div.pair", ...[one, other].map((image) => h("figure",
    img(image.url, altOf(image)), h("figcaption", { text: `Seed ${image.seed}` })))),
  wipe: h("div.wipe", { hidden: true }, h("div.wipe-stack", img(other.url, altOf(other)), over), at) };
  const choices = [["Side by side", "beside"], ["Wipe", "wipe"]];
  const modes = segments(h("div.segments"), "compare-mode", choices, "beside", (chosen) => {
    for (const [name, box] of Object.entries(ways)) box.hidden = name !== chosen;
  });
  const head = h("tr", h("td"), h("th", { scope: "col", text: "First" }), h("th", { scope: "col", text: "Second" }));
  const rows = Object.entries(factsOf(one)).map(([name, first]) => {
    const second = factsOf(other)[name];
    return h("tr", { class: first === second ? "" : "differs" },
      h("th", { scope: "row", text: name }), h("td", first), h("td", second));
  });
  const dialog = openSheet("compare", "Compare", "compare", [ways.beside, ways.wipe,
    h("div.table-box", h("table.differences", h("thead", head), h("tbody", ...rows))),
    h("div.sheet-foot", canDo("interpolate_to")
      && softButton("blend", "Blend these two", () => { dialog.close(); actions.blend(one, other); }))]);
  dialog.querySelector("h2").after(modes);
}
