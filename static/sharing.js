// How do pictures and their settings leave this page and come back? Links, the clipboard, the system's share sheet, dropped PNGs.

import { fileName, goalOf, parametersOf, wordsOf } from "./pictures.js";
import { ask, jobPath, send } from "./server.js";
import { $, complain, dialogIsOpen, h, toast } from "./ui.js";

const LINKED = ["prompt", "n_images", "n_inf_steps", "seed", "guidance_scale", "sampler", "negative_prompt", "stream_freq"];
const TEXTS = ["prompt", "sampler", "negative_prompt"];
const EDITS = ["attributes", "variation_strength", "variation_seed", "candidates", "balance", "interpolate_to"]; // pictures are too long for an address

// ---- links: the fragment holds all settings, so a link draws the picture again even where the job is long gone

/** The address that restores a job, or one picture of it. */
export function linkTo(job, one = null) {
  const parameters = one ? parametersOf(one) : job.parameters;
  const settings = new URLSearchParams();
  for (const name of LINKED) {
    const value = parameters[name];
    if (value != null && (value !== "" || name === "prompt")) settings.set(name, value);
  }
  const edits = Object.fromEntries(EDITS.filter((name) => parameters[name] && !parameters[name].has_latent).map((name) => [name, parameters[name]]));
  if (edits.interpolate_to) edits.interpolate_to = goalOf(edits.interpolate_to);
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
    const box = h("textarea", { class: "visually-hidden", "aria-hidden": "true" });
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

export function download(url, name) {
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

export const archiveOf = (job) => `${jobPath(job.id)}archive.zip`;
export const collageOf = (job) => `${jobPath(job.id)}collage.png`;

/** Has this device a share sheet that takes pictures? On a phone it also saves to the photos. */
export const canShare = () => Boolean(navigator.canShare?.({ files: [new File([""], "face.png", { type: "image/png" })] }));

export async function share(pictures) {
  try {
    const files = await Promise.all(pictures.map(async (one) => {
      const content = await (await send(one.url)).blob();
      return new File([content], fileName(one), { type: "image/png" });
    }));
    await navigator.share({ files, title: wordsOf(pictures[0].job) });
  } catch (error) {
    if (error.name !== "AbortError") complain("It could not be shared", error);
  }
}

// ---- a PNG comes back

/** Ask the server what a picture says of itself and hand that to `receive(file, found)`. */
async function inspect(file, receive) {
  if (!file) return;
  try {
    if (!/^image\//.test(file.type)) throw new Error("this is no picture.");
    const taken = ["image/png", "image/jpeg", "image/webp"].includes(file.type);
    await receive(file, taken ? await ask("inspect", file) : {});
  } catch (error) {
    complain("It could not be read", error);
  }
}

export function receivePictures(receive) {
  const take = (list) => inspect([...list].find((file) => file.type === "image/png") ?? list[0], receive);
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  let depth = 0;
  const overlay = (on) => { depth = on ? depth : 0; $("drop").hidden = !on; };
  addEventListener("dragenter", (event) => { if (hasFiles(event) && !dialogIsOpen()) { depth += 1; overlay(true); } });
  addEventListener("dragleave", (event) => { if (hasFiles(event) && --depth <= 0) overlay(false); });
  addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    overlay(false);
    if (!event.target.closest?.(".drop-zone")) take(event.dataTransfer.files); // that one takes it as a start
  });
  addEventListener("paste", (event) => { if (event.clipboardData?.files.length) { event.preventDefault(); take(event.clipboardData.files); } });
  $("restore").addEventListener("click", () => $("restore-file").click());
  $("restore-file").addEventListener("change", () => { take($("restore-file").files); $("restore-file").value = ""; });
}
