// Where does a row of pictures lead? To another description, another seed, another picture.

import { RIVALS, readEdits, setEdits } from "./edits.js";
import { crop } from "./crop.js";
import { fileButton } from "./photo.js";
import { base64Of } from "./pictures.js";
import { ask, send } from "./server.js";
import { readForm, restoreForm, setCount } from "./settings.js";
import { $, bus, h, iconButton, quiet, randomSeed, toast } from "./ui.js";

/** The noise from which the model draws a picture again, found by running the drawing backwards. */
async function noiseOf(image, prompt) {
  const said = toast("Looking for the noise of this picture …", { wait: 60_000 });
  try {
    return (await ask("encode", { image, invert: true, ...(prompt ? { prompt } : {}) })).latent;
  } finally {
    said();
  }
}

const EXACT = { sampler: "DDIM", guidance_scale: 1, n_inf_steps: 50 }; // so drawn, that noise gives the picture back

/** What stands for a picture in a blend: its seed, or where that alone does not draw it, its noise. */
async function endOf({ job: { parameters }, url, seed }) {
  const { has_init_image: photo, num_latents: latents, variation_strength: varied, interpolate_to: to, prompt } = parameters;
  if (!photo && !latents && !varied && !to) return { seed };
  return { latent: await noiseOf(await base64Of(await (await send(url)).blob()), prompt) };
}

/** The changes to the settings of one picture that lead from it to another. */
export async function between(one, other) {
  const [from, to] = [await endOf(one), await endOf(other)];
  const { prompt } = other.job.parameters;
  const changes = { n_images: 8, interpolate_to: { ...to, ...(prompt !== one.job.parameters.prompt ? { prompt } : {}) } };
  for (const name of RIVALS.interpolate_to) changes[name] = null;
  if (from.latent || to.latent) Object.assign(changes, EXACT);
  return from.latent ? { ...changes, latent: from.latent } : { ...changes, seed: from.seed, latent: null };
}

export function build(box, options) {
  const prompt = h("input", { id: "blend-prompt", type: "text", maxlength: options.fields.prompt.max_length, placeholder: "the same description" });
  const seed = h("input", { id: "blend-seed", type: "text", inputmode: "numeric", placeholder: "the same seed" });
  const size = options.models[0].image_size;
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
  const fromPicture = (take) => async (file) => {
    const cut = await crop(file, size);
    if (!cut) return;
    try {
      take(await noiseOf(cut, $("prompt").value.trim()));
      restoreForm({ ...readForm(), ...EXACT }, true);
    } catch (error) {
      toast(error.message, { trouble: true });
    }
  };
  for (const input of [prompt, seed]) input.addEventListener("change", () => set());
  const dice = iconButton("dice", "Draw a seed to blend to", () => { seed.value = randomSeed(); set(); });
  box.append(from, h("div", { class: "field" }, h("label", { for: "blend-prompt", text: "To the description" }), prompt),
    h("div", { class: "field" }, h("label", { for: "blend-seed", text: "To the seed" }), h("div", { class: "with-buttons" }, seed, dice)));
  box.append(h("div", { class: "tools-row" },
    ...fileButton("image", "From a picture", fromPicture((latent) => { setEdits({ latent, start_timestep: null }); set(); })),
    ...fileButton("image", "To a picture", fromPicture((latent) => { seed.value = ""; set(latent); }))));
  box.append(quiet("Or choose two pictures with Compare and press “Blend these two”."));

  const show = () => {
    const { interpolate_to: to, latent } = readEdits();
    if (document.activeElement !== prompt) prompt.value = to?.prompt ?? "";
    if (document.activeElement !== seed) seed.value = to?.seed ?? "";
    seed.placeholder = to?.latent ? "a picture" : "the same seed";
    from.textContent = `From the description above and ${latent ? "a picture" : $("seed").value ? `seed ${$("seed").value}` : "a new seed"}, in as many steps as pictures.`;
  };
  bus.on("edits", show);
  $("seed").addEventListener("input", show);
  show();
}
