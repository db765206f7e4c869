// What can be done with an image wherever it is shown? Tiles, favourites, choosing two, deleting with undo.

import { icon } from "./icons.js";
import { ask, blobOf, jobPath, send } from "./server.js";
import { $, announce, bus, complain, h, img, isCommand, keep, on, plural, recall, setText, toast } from "./ui.js";

/** An image of a job, by its place in it; `result` is what the server said of it when it was finished. */
export function imageOf(job, index) {
  const path = `${jobPath(job.id)}images/${index}`;
  const { seed } = job.parameters;
  const result = job.images?.find((one) => one.index === index) ?? null;
  return { key: `${job.id}/${index}`, job, index, result, url: `${path}.png`, thumbnail: `${path}.webp`,
    seed: result?.seed ?? (oneSeed(job.parameters) ? seed : seed + index) };
}

/** What a request would be that makes one image again, without the images that it may have begun with. */
export function parametersOf({ job, index, seed, result }) {
  const { variation_seed: other, interpolate_to: to, n_images: count, candidates, balance,
    attribute_balancing: same, ...asked } = job.parameters;
  const made = { ...asked, seed, n_images: 1 };
  if (other != null) made.variation_seed = other + index;
  if (to) made.interpolate_to = { ...to, weight: to.weight ?? index / (count - 1) };
  if (balance) Object.assign(made, result?.prompt ? { prompt: result.prompt } : { balance });
  return made;
}

/** Where a blend leads, as it was asked for. */
export const goalOf = ({ has_latent: known, ...to }) => (
  Object.fromEntries(Object.entries(to).filter(([, value]) => value != null)));

/** Where the image is that was refined to this one: the last of the first steps. */
export const beforeOf = ({ url, job: { parameters } }) => `${url}?t=${parameters.n_inf_steps}`;

/** Steps of a job in all; who refines takes as many again. */
export const stepsOf = ({ n_inf_steps: steps, refine }) => (refine ? 2 * steps : steps);

export const sent = new Map(); // job id -> what this page asked for, images included

/** The request of a job, or of one of its images: an image remembers what the job's parameters only mention. */
export async function requestOf(job, index = null) {
  const parameters = index === null ? job.parameters : parametersOf(imageOf(job, index));
  const { has_init_image: image, has_mask: mask, num_latents: latents, ...asked } = parameters;
  const to = asked.interpolate_to;
  if (to) asked.interpolate_to = goalOf(to);
  if (!image && !mask && !latents && !to?.has_latent) return asked;
  const one = imageOf(job, index ?? 0);
  const address = asked.refine ? beforeOf(one) : one.url;
  const kept = sent.get(job.id) ?? (await ask("inspect", await blobOf(address))).request;
  if (!kept || (image && !kept.init_image)) throw new Error("The image no longer says what it began with.");
  for (const name of ["init_image", "mask", "latent"]) if (kept[name]) asked[name] = kept[name];
  if (Array.isArray(asked.latent) && index !== null) asked.latent = asked.latent[index];
  if (to?.has_latent) asked.interpolate_to.latent = kept.interpolate_to.latent;
  return asked;
}

/** The images of a job: those that there will be, and when it is finished those that were not deleted. */
export function imagesOf(job) {
  const known = job.status === "succeeded" && job.images;
  const indices = known ? known.map(({ index }) => index) : [...Array(job.parameters.n_images).keys()];
  return indices.map((index) => imageOf(job, index)).filter(({ key }) => !leaving.has(key));
}

export const wordsOf = (job) => job.parameters.prompt || "Any face";
export const altOf = ({ job, seed }) => `${wordsOf(job)}, seed ${seed}`;
/** Do the images of a job share a seed, and differ by other noise? */
const oneSeed = ({ variation_strength: varied, interpolate_to: to }) => Boolean(varied || to);
export const fileName = ({ job: { parameters }, seed, index }) => (
  `face-${seed}${oneSeed(parameters) ? `-${index + 1}` : ""}.png`);

/** Base64 of an image as an address; the first letters tell its format. */
export function dataUrl(base64) {
  const kind = base64.startsWith("UklG") ? "webp" : base64.startsWith("/9j") ? "jpeg" : "png";
  return `data:image/${kind};base64,${base64}`;
}

/** A file as an address. */
export const addressOf = (blob) => new Promise((done, fail) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => fail(reader.error);
  reader.readAsDataURL(blob);
});
export const base64Of = async (blob) => (await addressOf(blob)).split(",")[1];

// ---- favourites: kept by the server, for every browser

const favourites = new Set(); // their keys, as far as they are known here
const changedAt = new Map(); // key -> when the server had taken what was pressed here

export const isFavourite = ({ key }) => favourites.has(key);
const setFavourite = (key, value) => favourites[value ? "add" : "delete"](key);

/** Take from a job which of its images are favourites, but for those that were pressed after it was `asked` for. */
export function learn(job, asked) {
  for (const { index, favourite } of job.images ?? []) {
    const key = `${job.id}/${index}`;
    if (!(changedAt.get(key) > asked)) setFavourite(key, favourite);
  }
  return job;
}

/** A job as the page knows jobs, from an answer about it alone. */
export function jobFrom(body) {
  return learn({
    id: body.job_id, status: body.status, parameters: body.parameters, error: body.error ?? null,
    created_at: body.created_at, started_at: body.started_at, finished_at: body.finished_at,
    images: body.status === "succeeded" ? body.response?.map(({ img: base64, latent, ...result }) => result) : [],
  }, body.asked);
}

const sendFavourite = (id, index, value) => (
  ask(`images/${encodeURIComponent(id)}/${index}/favourite`, undefined, { method: value ? "PUT" : "DELETE" }));

export async function toggleFavourite({ key, job, index }) {
  const wanted = !favourites.has(key);
  const put = (value) => {
    setFavourite(key, value);
    for (const button of document.querySelectorAll(".heart")) {
      if (button.dataset.key === key) button.ariaPressed = value;
    }
  };
  put(wanted);
  changedAt.set(key, Infinity);
  try {
    await sendFavourite(job.id, index, wanted);
    changedAt.set(key, performance.now());
    announce(wanted ? "Kept as a favourite." : "No longer a favourite.");
    bus.emit("favourites", key);
  } catch (error) {
    put(!wanted);
    changedAt.delete(key);
    if (error.status) toast(error.message, { trouble: true });
  }
}

/** What an older page kept in this browser becomes everybody's. */
export async function moveFavourites() {
  for (const { job, index } of recall("favourites", [])) {
    await sendFavourite(job.id, index, true).catch((error) => { if (!error.status) throw error; });
  }
  keep("favourites", []);
}

export function heart(one, label = "Favourite") {
  return h("button.round.plain.heart", {
    "aria-label": label, title: "Favourite", "aria-pressed": String(isFavourite(one)),
    data: { key: one.key }, click: () => toggleFavourite(one),
  }, icon("heart"));
}

// ---- tiles

/** An image in a grid: pressing it opens it (`open(image)`), or chooses it while two are being chosen. */
export function tile(one, { open, src = one.thumbnail, name, tools = true }) {
  const label = `${name ? `${name}: ` : ""}${altOf(one)}`;
  const image = img(src, "", { loading: "lazy", decoding: "async", draggable: "false" });
  const button = h("button.tile-open", { "aria-label": label, click: () => (picking ? pick(one) : open(one)) }, image);
  on(button, "keydown", (event) => {
    if (event.key === "f" && !isCommand(event) && recall("keys", true)) toggleFavourite(one);
  });
  on(image, "error", () => item.classList.add("lost"));
  on(image, "load", () => item.classList.remove("lost"));
  const item = h("li.tile", { data: { key: one.key, job: one.job.id } }, button,
    tools && heart(one, `Favourite: seed ${one.seed}`));
  return item;
}

// ---- choosing two

let picking = false;
let first = null;

export function startPicking(one = null) {
  setPicking(true);
  first = one;
  tellPicking();
}

function setPicking(on) {
  picking = on;
  document.body.classList.toggle("is-picking", on);
  $("pick").ariaPressed = on;
  $("picking").hidden = !on;
}

export function stopPicking() {
  if (!picking) return false;
  setPicking(false);
  markPicked();
  return true;
}

export const isPicking = () => picking;

function tellPicking() {
  setText("picking-text", first ? "Now choose the second one." : "Choose two images to compare.");
  announce($("picking-text").textContent);
  markPicked();
}

function markPicked() {
  for (const item of document.querySelectorAll(".tile")) {
    item.classList.toggle("picked", picking && item.dataset.key === first?.key);
  }
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

const leaving = new Set(); // ids of jobs that are hidden and will be deleted; keys of deleted images

export const isLeaving = (id) => leaving.has(id);

function hide(key, job, hidden) {
  leaving[hidden ? "add" : "delete"](key);
  bus.emit("hidden", { job, hidden });
  return true;
}

const offerUndo = (what, undo, gone) => toast(`${what}.`, {
  action: "Undo", act: async () => { if (await undo()) announce("Brought back."); }, gone });

/** Delete images at once; the server brings them back when that is taken back. */
export function deleteImages(list, what = "Image deleted") {
  const each = async (hidden, method, more = "") => {
    const veil = (on) => list.forEach(({ key, job }) => hide(key, { ...job, key }, on));
    veil(true); // until the server has brought them back, or could not take them
    try {
      await Promise.all(list.map(({ job, index }) => (
        ask(`${jobPath(job.id)}images/${index}${more}`, undefined, { method }))));
      veil(hidden);
      return true;
    } catch (error) {
      veil(!hidden);
      complain("That could not be done", error);
      return false;
    }
  };
  const done = each(true, "DELETE"); // offered before the server has answered: who is quick is not ignored
  offerUndo(what, async () => await done && each(false, "POST", "/restore"));
}

/** Hide a job and delete it when nobody has taken that back in time; its favourites stay. */
export function deleteJob(job) {
  if (leaving.has(job.id)) return;
  const all = imagesOf(job);
  const others = all.filter((one) => !isFavourite(one));
  const kept = all.length - others.length;
  if (kept && !others.length) toast("Favourites stay; each can be deleted where it is opened.");
  else if (kept) deleteImages(others, `${plural(others.length, "image")} deleted, ${plural(kept, "favourite")} kept`);
  else {
    hide(job.id, job, true);
    offerUndo(`${job.status === "succeeded" ? plural(all.length, "image") : "Job"} deleted`,
      () => hide(job.id, job, false), () => finishDelete(job));
  }
}

const remove = (id, more) => send(jobPath(id), undefined, { method: "DELETE", ...more });

async function finishDelete(job) {
  if (!leaving.has(job.id)) return;
  try {
    await remove(job.id);
  } catch (error) {
    if (error.status !== 404 && error.status !== 410) {
      hide(job.id, job, false);
      complain("It could not be deleted", error);
      return;
    }
  }
  leaving.delete(job.id);
  bus.emit("removed", job);
}

on(window, "pagehide", () => { // a closed page means what was pressed
  for (const id of leaving) if (!id.includes("/")) remove(id, { keepalive: true }).catch(() => {});
  leaving.clear();
});

/** Ctrl+Z outside of text: the last one comes back. */
export function undoDelete() {
  const buttons = [...$("toasts").querySelectorAll("button:not([aria-label])")];
  buttons.at(-1)?.click();
  return buttons.length > 0;
}
