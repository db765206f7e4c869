// Where does a row of images lead? To another description, another seed, another image.

import { RIVALS, modelNames, readEdits, setEdits } from "./edits.js";
import { crop } from "./crop.js";
import { fileButton } from "./photo.js";
import { base64Of } from "./images.js";
import { ask, blobOf } from "./server.js";
import { readForm, restoreForm, setCount } from "./settings.js";
import { $, bus, h, iconButton, on, quiet, randomSeed, toast } from "./ui.js";

const findsNoise = (model) => modelNames()[0] === model || modelNames().length === 1;

/** The noise from which the model generates an image again, found by running the steps backwards. */
async function noiseOf(image, prompt) {
  const said = toast("Looking for the noise of this image …", { wait: 60_000 });
  try {
    return (await ask("encode", { image, invert: true, ...(prompt ? { prompt } : {}) })).latent;
  } finally {
    said();
  }
}

const EXACT = { sampler: "DDIM", guidance_scale: 1, n_inf_steps: 50 }; // with these, that noise gives the image back

/** What stands for an image in a blend: its seed, or where that alone does not make it, its noise. */
async function endOf({ job: { parameters: asked }, url, seed }) {
  const { has_init_image: image, num_latents: latents, variation_strength: varied, interpolate_to: to } = asked;
  if (!image && !latents && !varied && !to) return { seed };
  if (!findsNoise(asked.model)) throw new Error(`Only ${modelNames()[0]} finds the noise of an image.`);
  return { latent: await noiseOf(await base64Of(await blobOf(url)), asked.prompt) };
}

/** The changes to the settings of one image that lead from it to another. */
export async function between(one, other) {
  const [from, to] = [await endOf(one), await endOf(other)];
  const { prompt } = other.job.parameters;
  const goal = prompt === one.job.parameters.prompt ? to : { ...to, prompt };
  const changes = { n_images: 8, interpolate_to: goal };
  for (const name of RIVALS.interpolate_to) changes[name] = null;
  if (from.latent || to.latent) Object.assign(changes, EXACT);
  return from.latent ? { ...changes, latent: from.latent } : { ...changes, seed: from.seed, latent: null };
}

export function build(box, options) {
  const prompt = h("input", {
    id: "blend-prompt", type: "text", maxlength: options.fields.prompt.max_length, placeholder: "the same description",
  });
  const seed = h("input", { id: "blend-seed", type: "text", inputmode: "numeric", placeholder: "the same seed" });
  const size = options.model.image_size;
  const from = quiet("");
  const set = (latent = readEdits().interpolate_to?.latent) => {
    const to = {};
    if (prompt.value.trim()) to.prompt = prompt.value.trim();
    if (seed.value.trim()) to.seed = /^\d+$/.test(seed.value.trim()) ? Number(seed.value) : seed.value.trim();
    else if (latent) to.latent = latent;
    const fresh = !readEdits().interpolate_to;
    setEdits({ interpolate_to: to });
    if (fresh && Object.keys(to).length) setCount(options.fields.n_images.maximum);
  };
  const fromImage = (take) => async (file) => {
    const cut = await crop(file, size);
    if (!cut) return;
    try {
      take(await noiseOf(cut, $("prompt").value.trim()));
      restoreForm({ ...readForm(), ...EXACT }, true);
    } catch (error) {
      toast(error.message, { trouble: true });
    }
  };
  for (const input of [prompt, seed]) on(input, "change", () => set());
  const dice = iconButton("dice", "Random seed to blend to", () => { seed.value = randomSeed(); set(); });
  box.append(from, h("div.field", h("label", { for: "blend-prompt", text: "To the description" }), prompt),
    h("div.field", h("label", { for: "blend-seed", text: "To the seed" }), h("div.with-buttons", seed, dice)));
  if (findsNoise(options.model.name)) box.append(h("div.tools-row",
    ...fileButton("image", "From an image",
      fromImage((latent) => { setEdits({ latent, start_timestep: null }); set(); })),
    ...fileButton("image", "To an image", fromImage((latent) => { seed.value = ""; set(latent); }))));
  box.append(quiet("Or choose two images with Compare and press “Blend these two”."));

  const show = () => {
    const { interpolate_to: to, latent } = readEdits();
    if (document.activeElement !== prompt) prompt.value = to?.prompt ?? "";
    if (document.activeElement !== seed) seed.value = to?.seed ?? "";
    seed.placeholder = to?.latent ? "an image" : "the same seed";
    const start = latent ? "an image" : $("seed").value ? `seed ${$("seed").value}` : "a new seed";
    from.textContent = `From the description above and ${start}, in as many steps as images.`;
  };
  bus.on("edits", show);
  on($("seed"), "input", show);
  show();
}
