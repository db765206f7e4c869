// How is a finished image refined? What is asked for, and the image before beside the one after.

import { attempt } from "./actions.js";
import { modelNames } from "./edits.js";
import { altOf, beforeOf, parametersOf, requestOf, wordsOf } from "./images.js";
import { ask, jobPath } from "./server.js";
import { submit } from "./submission.js";
import { h, img, loadStyle, openSheet, percent, quiet, slider, softButton } from "./ui.js";
import { goTo } from "./views.js";
import { wipe } from "./wipe.js";

const inWords = (value) => `${percent(value)}, ${
  value < 0.25 ? "details" : value < 0.5 ? "the same face" : value < 0.75 ? "a similar face" : "another face"}`;

/** The request that refines one image: from its latent, so that nothing is generated twice. */
async function requestFor(one, refine) {
  const { job, index } = one;
  const { has_init_image: image, has_mask: mask, num_latents: latents, strength, interpolate_to: to, ...asked } = (
    parametersOf(one));
  const { prompt, negative_prompt, n_images, n_inf_steps, stream_freq, seed, refine: before } = asked;
  if (mask && !before) return { ...await requestOf(job, index), refine }; // what was not painted is in no latent
  const { latent } = await ask(`${jobPath(job.id)}latents/${index}`);
  const begun = before ? { prompt: before.prompt ?? prompt, negative_prompt, n_images, n_inf_steps, stream_freq, seed,
    model: before.model } : asked; // the latent of a refined image is of the model that refined it
  return { ...begun, latent, start_timestep: 1, refine };
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
    attempt(async () => {
      const request = await requestFor(one, wanted);
      goTo("generate");
      await submit(request);
    });
  }, { class: "soft strong" });
  const dialog = openSheet("refine", "Refine", "refine", [h("div.trust",
    img(one.url, altOf(one)), h("div.refine-fields",
      names.length > 1 && h("div.field", h("label", { for: model.id, text: "Model" }), model),
      strength.box, h("div.field", h("label", { for: prompt.id, text: "Description" }), prompt),
      quiet("The image is enlarged to what the model generates, and changed by it. Both are kept."))),
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
  openSheet("before", "Before and after", "before", [beforeAndAfter(one)]);
}
