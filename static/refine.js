// How is a finished image refined? What is asked for, and the image before beside the one after.

import { attempt } from "./actions.js";
import { modelNames } from "./edits.js";
import { altOf, beforeOf, parametersOf, requestOf, wordsOf } from "./images.js";
import { ask, jobPath } from "./server.js";
import { submit } from "./submission.js";
import { h, img, loadStyle, openSheet, percent, quiet, slider, softButton } from "./ui.js";
import { goTo } from "./views.js";
import { wipe } from "./wipe.js";

const inWords = (value) => `${percent(value)}, ${value < 0.5 ? "the same face" : "another face"}`;

/** The request that refines one image: from its latent, so that nothing is generated twice. */
async function requestFor(one, refine) {
  const { job, index } = one;
  const { has_init_image: image, has_mask: mask, num_latents: latents, strength, interpolate_to: to, ...asked } = (
    parametersOf(one));
  const { refine: before } = asked;
  const { quality } = await ask(`options?${new URLSearchParams({ model: refine.model })}`);
  const { steps } = quality.find((entry) => entry.default);
  const n_inf_steps = Math.max(steps, asked.n_inf_steps); // a face of four steps is not refined in four
  if (mask && !before) return { ...await requestOf(job, index), refine }; // what was not painted is in no latent
  const { latent } = await ask(`${jobPath(job.id)}latents/${index}`);
  if (before) { // the latent is of the model that refined
    Object.assign(asked, { prompt: before.prompt ?? asked.prompt, model: before.model, sampler: null,
      guidance_scale: null, attributes: null });
  }
  return { ...asked, n_inf_steps, latent, start_timestep: 1, refine };
}

/** Ask how an image is to be refined, and by which model. */
export async function openRefine(one) {
  await loadStyle("editing.css");
  const names = modelNames();
  const { model: made, refine: before } = one.job.parameters;
  const model = h("select", { id: "refine-model" }, ...names.map((name) => new Option(name, name)));
  model.value = names.find((name) => name !== (before?.model ?? made)) ?? names[0];
  const prompt = h("input", { id: "refine-prompt", type: "text", placeholder: wordsOf(one.job) });
  const strength = slider("How much changes", { min: 0.05, max: 1, step: 0.05, value: 0.35, words: inWords }, () => {});
  const go = softButton("spark", "Refine", () => {
    const wanted = { model: model.value, strength: Number(strength.input.value), prompt: prompt.value.trim() || null };
    dialog.close();
    goTo("generate");
    attempt(async () => submit(await requestFor(one, wanted)));
  }, { class: "soft strong" });
  const dialog = openSheet("refine", "Refine", "", [h("div.trust",
    img(one.url, altOf(one)), h("div.grid-form",
      names.length > 1 && h("div.field", h("label", { for: model.id, text: "Model" }), model),
      strength.box, h("div.field", h("label", { for: prompt.id, text: "Description" }), prompt),
      quiet("It is enlarged to what the model generates, and changed. Both are kept."))),
  h("div.sheet-foot", go)]);
}

/** A refined image and what it was, divided by a slider. */
export function beforeAndAfter(one) {
  const [before, after] = [[beforeOf(one), "Before"], [one.url, "After"]].map(([address, when]) => (
    img(address, `${when}: ${altOf(one)}`)));
  return h("figure.wipe", wipe(before, after, "How much of the image before is seen"),
    h("figcaption.wipe-names.quiet", h("span", "Before"), h("span", `Refined by ${one.job.parameters.refine.model}`)));
}

export function openBefore(one) {
  openSheet("before", "Before and after", "", [beforeAndAfter(one)]);
}
