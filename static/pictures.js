// What can be done with a picture wherever it is shown? Tiles, favourites, choosing two, deleting with undo.

import { ask, jobPath, send } from "./server.js";
import { $, announce, bus, h, icon, keep, plural, recall, toast } from "./ui.js";

const UNDO_MS = 8000;

/** A picture of a job, by its place in it; `told` is what the server said of it when it was finished. */
export function picture(job, index) {
  const path = `${jobPath(job.id)}images/${index}`;
  const { seed } = job.parameters;
  const told = job.images?.find((one) => one.index === index) ?? null;
  return { key: `${job.id}/${index}`, job, index, told, seed: told?.seed ?? (oneSeed(job.parameters) ? seed : seed + index), url: `${path}.png`, thumbnail: `${path}.webp` };
}

/** What a request would be that draws one picture again, without the pictures that it may have begun with. */
export function parametersOf({ job, index, seed, told }) {
  const { variation_seed: other, interpolate_to: to, n_images: count, candidates, balance, ...asked } = job.parameters;
  const made = { ...asked, seed, n_images: 1 };
  if (other != null) made.variation_seed = other + index;
  if (to) made.interpolate_to = { ...to, weight: to.weight ?? index / (count - 1) };
  if (balance) Object.assign(made, told?.prompt ? { prompt: told.prompt } : { balance });
  return made;
}

export const sent = new Map(); // job id -> what this page asked for, pictures included

/** The request of a job, or of one of its pictures: a picture remembers what the job's parameters only mention. */
export async function requestOf(job, index = null) {
  const { has_init_image: image, has_mask: mask, num_latents: latents, model, ...asked } = index === null ? job.parameters : parametersOf(picture(job, index));
  const to = asked.interpolate_to;
  if (to) asked.interpolate_to = Object.fromEntries(Object.entries(to).filter(([name, value]) => value != null && name !== "has_latent"));
  if (!image && !mask && !latents && !to?.has_latent) return asked;
  const kept = sent.get(job.id) ?? (await ask("inspect", await (await send(picture(job, index ?? 0).url)).blob())).request;
  if (!kept || (image && !kept.init_image)) throw new Error("The picture no longer says what it began with.");
  for (const name of ["init_image", "mask", "latent"]) if (kept[name]) asked[name] = kept[name];
  if (Array.isArray(asked.latent) && index !== null) asked.latent = asked.latent[index];
  if (to?.has_latent) asked.interpolate_to.latent = kept.interpolate_to.latent;
  return asked;
}

export const picturesOf = (job) => Array.from({ length: job.parameters.n_images }, (_, index) => picture(job, index));
export const wordsOf = (job) => job.parameters.prompt || "Any face";
const oneSeed = ({ variation_strength: varied, interpolate_to: to }) => Boolean(varied || to); // its pictures differ by other noise
export const fileName = ({ job, seed, index }) => `face-${seed}${oneSeed(job.parameters) ? `-${index + 1}` : ""}.png`;

/** Base64 of a picture as an address; the first letters tell its format. */
export function dataUrl(base64) {
  const kind = base64.startsWith("UklG") ? "webp" : base64.startsWith("/9j") ? "jpeg" : "png";
  return `data:image/${kind};base64,${base64}`;
}

export const base64Of = (blob) => new Promise((done, fail) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(",")[1]);
  reader.onerror = () => fail(reader.error);
  reader.readAsDataURL(blob);
});

// ---- favourites: kept in this browser

const favourites = new Map(recall("favourites", []).map((one) => [one.key, one]));

export const allFavourites = () => [...favourites.values()].reverse().map(({ job, index }) => picture(job, index));

export function toggleFavourite({ key, job, index, seed }) {
  if (!favourites.delete(key)) {
    const { id, parameters, created_at, status } = job;
    favourites.set(key, { key, index, job: { id, parameters, created_at, status, images: [{ index, seed }] } });
  }
  keep("favourites", [...favourites.values()]);
  const on = favourites.has(key);
  for (const heart of document.querySelectorAll(".heart")) if (heart.dataset.key === key) heart.setAttribute("aria-pressed", String(on));
  announce(on ? "Kept as a favourite." : "No longer a favourite.");
  bus.emit("favourites", key);
}

export function forgetFavourites(id) {
  let changed = false;
  for (const key of favourites.keys()) if (key.startsWith(`${id}/`)) changed = favourites.delete(key) || changed;
  if (!changed) return;
  keep("favourites", [...favourites.values()]);
  bus.emit("favourites", null);
}

export function heart(one, label = "Favourite") {
  return h("button", {
    class: "round plain heart", "aria-label": label, title: "Favourite", "aria-pressed": String(favourites.has(one.key)),
    data: { key: one.key }, click: () => toggleFavourite(one),
  }, icon("heart"));
}

// ---- tiles

/** A picture in a grid: pressing it opens it (`open(picture)`), or chooses it while two are being chosen. */
export function tile(one, { open, src = one.thumbnail, name, tools = true }) {
  const label = `${name ? `${name}: ` : ""}${wordsOf(one.job)}, seed ${one.seed}`;
  const image = h("img", { src, alt: "", width: 128, height: 128, loading: "lazy", decoding: "async", draggable: "false" });
  const button = h("button", { class: "tile-open", "aria-label": label, click: () => (picking ? pick(one) : open(one)) }, image);
  button.addEventListener("keydown", (event) => {
    if (event.key === "f" && !event.ctrlKey && !event.metaKey && !event.altKey && recall("keys", true)) toggleFavourite(one);
  });
  image.addEventListener("error", () => item.classList.add("lost"));
  image.addEventListener("load", () => item.classList.remove("lost"));
  const item = h("li", { class: "tile", data: { key: one.key, job: one.job.id } }, button, tools && heart(one, `Favourite: seed ${one.seed}`));
  return item;
}

// ---- choosing two

let picking = false;
let first = null;

export function startPicking(one = null) {
  picking = true;
  first = null;
  document.body.classList.add("is-picking");
  $("pick").setAttribute("aria-pressed", "true");
  $("picking").hidden = false;
  tellPicking();
  if (one) pick(one);
}

export function stopPicking() {
  if (!picking) return false;
  picking = false;
  document.body.classList.remove("is-picking");
  $("pick").setAttribute("aria-pressed", "false");
  $("picking").hidden = true;
  markPicked();
  return true;
}

export const isPicking = () => picking;

function tellPicking() {
  $("picking-text").textContent = first ? "Now choose the second one." : "Choose two pictures to compare.";
  announce($("picking-text").textContent);
  markPicked();
}

function markPicked() {
  for (const item of document.querySelectorAll(".tile")) item.classList.toggle("picked", picking && item.dataset.key === first?.key);
}

function pick(one) {
  if (!first || first.key === one.key) {
    first = first ? null : one;
    tellPicking();
    return;
  }
  const pair = [first, one];
  stopPicking();
  bus.emit("compare", pair);
}

// ---- deleting, with time to think again

const leaving = new Set(); // ids: hidden already, deleted when the undo time is over

export const isLeaving = (id) => leaving.has(id);

/** Hide a job at once and delete it when nobody has taken that back in time. */
export function deleteJob(job) {
  if (leaving.has(job.id)) return;
  const undo = () => {
    leaving.delete(job.id);
    bus.emit("undeleted", job);
    announce("Brought back.");
  };
  leaving.add(job.id);
  bus.emit("deleted", job);
  const count = job.status === "succeeded" ? plural(job.parameters.n_images, "picture") : "Job";
  toast(`${count} deleted.`, { action: "Undo", act: undo, gone: () => finishDelete(job), wait: UNDO_MS });
}

async function finishDelete(job) {
  if (!leaving.delete(job.id)) return;
  try {
    await ask(jobPath(job.id), undefined, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404 && error.status !== 410) {
      bus.emit("undeleted", job);
      toast(`It could not be deleted: ${error.message}`, { trouble: true });
      return;
    }
  }
  forgetFavourites(job.id);
  bus.emit("removed", job);
}

/** Ctrl+Z outside of text: the last one comes back. */
export function undoDelete() {
  const buttons = [...$("toasts").querySelectorAll("button:not([aria-label])")];
  buttons.at(-1)?.click();
  return buttons.length > 0;
}

addEventListener("pagehide", () => { // a closed page means what was pressed
  for (const id of leaving) send(jobPath(id), undefined, { method: "DELETE", keepalive: true }).catch(() => {});
  leaving.clear();
});
