// How do two images differ? Side by side, or one wiped over the other; and what was asked for differently.

import { canDo } from "./edits.js";
import { altOf, wordsOf } from "./images.js";
import { h, img, openSheet, segments, softButton } from "./ui.js";
import { wipe } from "./wipe.js";

const factsOf = ({ job, seed, job: { parameters: asked } }) => ({
  Description: wordsOf(job), Seed: seed, Steps: asked.n_inf_steps,
  Guidance: asked.guidance_scale, Sampler: asked.sampler, "Negative prompt": asked.negative_prompt || "–",
});

export function compare([one, other], actions) {
  const pair = () => [one, other].map((image) => img(image.url, altOf(image)));
  const ways = { beside: h("div.pair", ...pair().map((image, number) => h("figure",
    image, h("figcaption", { text: `Seed ${[one, other][number].seed}` })))),
  wipe: h("div.wipe", { hidden: true }, wipe(...pair(), "How much of the first image is seen")) };
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
