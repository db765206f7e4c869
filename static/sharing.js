// How do images and their settings leave this page and come back? Links, the clipboard, the share sheet, dropped PNGs.

import { fileName, goalOf, parametersOf, wordsOf } from "./images.js";
import { ask, blobOf, jobPath } from "./server.js";
import { $, complain, dialogIsOpen, h, on, toast } from "./ui.js";

const TEXTS = ["prompt", "sampler", "negative_prompt", "model"];
const LINKED = [...TEXTS, "n_images", "n_inf_steps", "seed", "guidance_scale", "stream_freq"];
// images are too long for an address
const EDITS = ["attributes", "variation_strength", "variation_seed", "candidates", "balance", "interpolate_to",
  "refine"];

// ---- links: the fragment holds all settings, so a link makes the image again even where the job is long gone

/** The address that restores a job, or one image of it. */
export function linkTo(job, one = null) {
  const parameters = one ? parametersOf(one) : job.parameters;
  const settings = new URLSearchParams();
  for (const name of LINKED) {
    const value = parameters[name];
    if (value != null && (value !== "" || name === "prompt")) settings.set(name, value);
  }
  const edits = {};
  for (const name of EDITS) {
    const value = parameters[name];
    if (value && !value.has_latent) edits[name] = name === "interpolate_to" ? goalOf(value) : value;
  }
  if (Object.keys(edits).length) settings.set("edits", JSON.stringify(edits));
  const at = new URLSearchParams({ job: job.id, ...(one ? { image: one.index } : {}) });
  return `${location.origin}${location.pathname}?${at}#${settings}`;
}

/** The settings in this page's address, or null. */
export function linkedSettings() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (!given.has("prompt")) return null;
  const settings = {};
  for (const name of LINKED) {
    if (!given.has(name)) continue;
    const value = TEXTS.includes(name) ? given.get(name) : Number(given.get(name));
    if (!Number.isNaN(value)) settings[name] = value;
  }
  try {
    const edits = JSON.parse(given.get("edits") ?? "{}");
    for (const name of EDITS) if (name in edits) settings[name] = edits[name];
  } catch { /* a broken link keeps what can be read */ }
  return settings;
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without https on another machine: the old way
    const box = h("textarea.visually-hidden", { "aria-hidden": "true" });
    box.value = text;
    const host = document.querySelector("dialog[open]") ?? document.body;
    const before = document.activeElement;
    host.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    before?.focus();
  }
  toast(`${what} copied.`);
}

// ---- files

export const archiveOf = (job) => `${jobPath(job.id)}archive.zip`;
export const collageOf = (job) => `${jobPath(job.id)}collage.png`;

const pngFile = (content, name) => new File([content], name, { type: "image/png" });

/** Has this device a share sheet that takes images? On a phone it also saves to the photos. */
export const canShare = () => Boolean(navigator.canShare?.({ files: [pngFile("", "face.png")] }));

export async function share(images) {
  try {
    const files = await Promise.all(images.map(async (one) => pngFile(await blobOf(one.url), fileName(one))));
    await navigator.share({ files, title: wordsOf(images[0].job) });
  } catch (error) {
    if (error.name !== "AbortError") complain("It could not be shared", error);
  }
}

// ---- a PNG comes back

/** Ask the server what an image says of itself and hand that to `receive(file, found)`. */
async function inspect(file, receive) {
  if (!file) return;
  try {
    if (!/^image\//.test(file.type)) throw new Error("this is no image.");
    const taken = ["image/png", "image/jpeg", "image/webp"].includes(file.type);
    await receive(file, taken ? await ask("inspect", file) : {});
  } catch (error) {
    complain("It could not be read", error);
  }
}

export function receiveImages(receive) {
  const take = (list) => inspect([...list].find((file) => file.type === "image/png") ?? list[0], receive);
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  const overlay = (on) => { depth = on ? depth : 0; $("drop").hidden = !on; };
  on(window, "dragenter", (event) => { if (hasFiles(event) && !dialogIsOpen()) { depth += 1; overlay(true); } });
  on(window, "dragleave", (event) => { if (hasFiles(event) && --depth <= 0) overlay(false); });
  on(window, "dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
  on(window, "drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    overlay(false);
    if (!event.target.closest?.(".drop-zone")) take(event.dataTransfer.files); // that one takes it as a start
  });
  on(window, "paste", (event) => {
    const files = event.clipboardData?.files;
    if (!files?.length) return;
    event.preventDefault();
    take(files);
  });
  on($("restore"), "click", () => $("restore-file").click());
  on($("restore-file"), "change", () => { take($("restore-file").files); $("restore-file").value = ""; });
}
