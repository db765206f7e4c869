// One picture, large: its neighbours, zoom, how it was drawn (the film), and everything that can be done with it.

import { deleteJob, deletePictures } from "./deleting.js";
import { canDo, editsInWords } from "./edits.js";
import { fileName, heart, isLeaving, startPicking, toggleFavourite, wordsOf } from "./pictures.js";
import { ask, jobPath } from "./server.js";
import { canShare, collageOf, copy, download, linkTo, share } from "./sharing.js";
import { $, announce, bus, closable, h, icon, iconButton, openDialog, recall, setIcon, wantsStillness } from "./ui.js";

const MAX_ZOOM = 8;
const FRAME_MS = 160;

const dialog = $("viewer");
const frame = $("viewer-frame");
const image = $("viewer-image");
let list = () => []; // what the arrows walk through; it may grow
let loadMore = null;
let here = null; // the picture shown
let actions = null; // what the page does with a picture: use, again, edit

// ---- zoom

const view = { zoom: 1, x: 0, y: 0 };

function place() {
  const room = frame.getBoundingClientRect();
  const limit = { x: (room.width * (view.zoom - 1)) / 2, y: (room.height * (view.zoom - 1)) / 2 };
  view.x = Math.max(-limit.x, Math.min(limit.x, view.x));
  view.y = Math.max(-limit.y, Math.min(limit.y, view.y));
  image.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.zoom})`;
  frame.classList.toggle("zoomed", view.zoom > 1);
  $("zoom-reset").textContent = `${Math.round((100 * view.zoom * room.width) / (image.naturalWidth || room.width))} %`;
  $("zoom-out").disabled = view.zoom <= 1;
  $("zoom-in").disabled = view.zoom >= MAX_ZOOM;
}

/** Zoom by a factor, keeping the point (from the middle) under the pointer where it is. */
function zoomBy(factor, x = 0, y = 0) {
  const zoom = Math.max(1, Math.min(MAX_ZOOM, view.zoom * factor));
  const real = zoom / view.zoom;
  view.x = x - (x - view.x) * real;
  view.y = y - (y - view.y) * real;
  view.zoom = zoom;
  place();
}

function resetZoom() {
  Object.assign(view, { zoom: 1, x: 0, y: 0 });
  place();
}

const fromMiddle = (event) => {
  const room = frame.getBoundingClientRect();
  return [event.clientX - room.left - room.width / 2, event.clientY - room.top - room.height / 2];
};
const pointers = new Map();
let swipe = null;

frame.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomBy(Math.exp(-event.deltaY / 300), ...fromMiddle(event));
}, { passive: false });
frame.addEventListener("dblclick", (event) => (view.zoom > 1 ? resetZoom() : zoomBy(3, ...fromMiddle(event))));
frame.addEventListener("pointerdown", (event) => {
  pointers.set(event.pointerId, fromMiddle(event));
  swipe = pointers.size === 1 && view.zoom === 1 && event.pointerType !== "mouse" ? event.clientX : null;
  frame.setPointerCapture(event.pointerId);
});
frame.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const now = fromMiddle(event);
  if (pointers.size === 2) { // a pinch
    const [, other] = [...pointers].find(([id]) => id !== event.pointerId);
    const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
    zoomBy(distance(now) / distance(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  } else if (view.zoom > 1) {
    view.x += now[0] - before[0];
    view.y += now[1] - before[1];
    place();
  }
  pointers.set(event.pointerId, now);
});
for (const end of ["pointerup", "pointercancel"]) {
  frame.addEventListener(end, (event) => {
    pointers.delete(event.pointerId);
    const moved = swipe === null ? 0 : event.clientX - swipe;
    if (end === "pointerup" && Math.abs(moved) > 48 && view.zoom === 1) walk(moved < 0 ? 1 : -1);
    swipe = null;
  });
}

// ---- the film

let frames = [];
let playing = 0;

async function loadFilm(one) {
  stop();
  frames = [];
  showFilm();
  const { steps } = await ask(`${jobPath(one.job.id)}steps`).catch(() => ({ steps: [] })); // their pictures come when shown
  if (here?.key !== one.key) return;
  const total = one.job.parameters.n_inf_steps;
  const kept = steps.filter(({ index, t }) => index === one.index && t < total);
  frames = [...kept.map(({ t }) => ({ t, total, src: `${one.thumbnail}?t=${t}` })), { t: total, total, src: one.url }];
  showFilm();
}

function showFilm() {
  const any = frames.length > 1;
  $("film").classList.toggle("none", !any);
  $("film-play").disabled = $("film-at").disabled = !any;
  $("film-fork").hidden = true;
  $("film-at").max = Math.max(0, frames.length - 1);
  $("film-at").value = frames.length - 1;
  $("film-strip").replaceChildren(...frames.map(({ src }) => h("img", { src, alt: "", width: 40, height: 40, loading: "lazy", draggable: "false" })));
  $("film-text").textContent = any ? `Step ${frames.at(-1).t}` : frames.length ? "No steps were kept" : "";
  $("film-at").setAttribute("aria-valuetext", any ? `Step ${frames.at(-1).t} of ${frames.at(-1).total}` : "none");
}

function showFrame(number) {
  const shown = frames[number];
  if (!shown) return;
  image.src = shown.src;
  $("film-at").value = number;
  $("film-text").textContent = `Step ${shown.t}`;
  $("film-fork").hidden = number >= frames.length - 1 || !canDo("start_timestep");
  $("film-at").setAttribute("aria-valuetext", `Step ${shown.t} of ${shown.total}`);
  for (const [at, still] of [...$("film-strip").children].entries()) still.classList.toggle("now", at === number && number < frames.length - 1);
}

function stop() {
  clearInterval(playing);
  playing = 0;
  setIcon($("film-play"), "play");
  $("film-play").setAttribute("aria-label", "Play the drawing");
}

function play() {
  if (playing) {
    stop();
    return;
  }
  if (frames.length < 2) return;
  let number = Number($("film-at").value) === frames.length - 1 ? 0 : Number($("film-at").value);
  setIcon($("film-play"), "pause");
  $("film-play").setAttribute("aria-label", "Pause");
  showFrame(number);
  playing = setInterval(() => {
    number += 1;
    showFrame(number);
    if (number >= frames.length - 1) stop();
  }, wantsStillness() ? 3 * FRAME_MS : FRAME_MS);
}

$("film-play").addEventListener("click", play);
$("film-fork").addEventListener("click", () => {
  const [one, { t, total }] = [here, frames[$("film-at").value]];
  dialog.close();
  actions.fork(one, t, total);
});
$("film-at").addEventListener("input", () => { stop(); showFrame(Number($("film-at").value)); });

// ---- the picture and its neighbours

function fact(name, value, ...more) {
  return [h("dt", { text: name }), h("dd", {}, String(value), ...more)];
}

function actionButton(name, text, click, given = {}) {
  return h("button", { class: "soft", click, ...given }, icon(name), text);
}

function show(one) {
  here = one;
  const { job } = one;
  const { parameters: asked } = job;
  const all = list();
  const at = all.findIndex((other) => other.key === one.key);
  resetZoom();
  image.src = one.url;
  image.alt = `${wordsOf(job)}, seed ${one.seed}`;
  $("viewer-title").textContent = wordsOf(job);
  $("viewer-count").textContent = all.length > 1 && at >= 0 ? `${at + 1} of ${all.length}` : "";
  showNeighbours();
  if (loadMore && at > all.length - 8) loadMore().then(showNeighbours);
  $("viewer-actions").replaceChildren(
    heart(one), h("a", { class: "soft strong", href: one.url, download: fileName(one) }, icon("download"), "Download"),
    ...(canShare() ? [actionButton("share", "Share", () => share([one]), { "aria-label": "Share or save to photos" })] : []));
  const edits = editsInWords(asked).map(([text]) => text).join(", ");
  $("viewer-facts").replaceChildren(
    ...fact("Seed", one.seed, iconButton("copy", "Copy the seed", () => copy(String(one.seed), "Seed"))),
    ...fact("Steps", asked.n_inf_steps), ...fact("Guidance", asked.guidance_scale), ...fact("Sampler", asked.sampler),
    ...(asked.negative_prompt ? fact("Steered from", asked.negative_prompt) : []),
    ...(edits ? fact("Edits", edits) : []),
    ...(one.told?.adherence != null ? fact("Fits", `${Math.round(100 * one.told.adherence)} %`) : []),
    ...(one.told?.nearest?.too_close ? fact("Warning", "very near a training picture") : []),
    ...(asked.model ? fact("Model", asked.model) : []),
    ...(job.created_at ? fact("Drawn", new Date(job.created_at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })) : []));
  $("viewer-more").replaceChildren(
    ...(canDo("init_image") ? [actionButton("image", "Start from this picture", () => { dialog.close(); actions.edit(one); }),
      actionButton("brush", "Redraw a part of it", () => { dialog.close(); actions.edit(one, true); })] : []),
    ...(canDo("variation_strength") ? [actionButton("grid", "Vary this face", () => {
      dialog.close();
      actions.use(job, one.index, { n_images: 4, interpolate_to: null, ...(asked.variation_strength ? {} : { variation_strength: 0.3 }) }, "vary");
    })] : []),
    actionButton("settings", "Use these settings", () => { dialog.close(); actions.use(job, one.index); }),
    actionButton("again", "Draw others like this", () => { dialog.close(); actions.again(job, true); }),
    actionButton("shield", "About this picture", () => { dialog.close(); actions.trust(one); }),
    actionButton("compare", "Compare", () => { dialog.close(); startPicking(one); }),
    actionButton("link", "Copy a link", () => copy(linkTo(job, one), "Link")),
    h("a", { class: "soft", href: collageOf(job), download: `steps-${asked.seed}.png` }, icon("film"), "Steps as one picture"),
    actionButton("trash", "Delete", () => remove()),
    ...(asked.n_images > 1 ? [actionButton("trash", `Delete all ${asked.n_images}`, () => remove(true))] : []));
  loadFilm(one);
}

function neighbour(by) {
  const all = list();
  const at = all.findIndex((other) => other.key === here?.key);
  return at < 0 ? undefined : all[at + by];
}

function showNeighbours() {
  for (const [button, by] of [[$("viewer-prev"), -1], [$("viewer-next"), 1]]) {
    const other = neighbour(by);
    if (!other && button === document.activeElement) $("viewer-title").focus();
    button.disabled = !other;
    if (other) button.querySelector("img").src = other.url;
  }
}

function walk(by) {
  const next = neighbour(by);
  if (!next) return;
  show(next);
  announce(`${wordsOf(next.job)}, seed ${next.seed}`);
}

/** Delete the picture shown, or its whole job. */
function remove(whole) {
  const one = here;
  const { job, key } = one;
  const all = list();
  const at = all.findIndex((other) => other.key === key);
  const stays = (other) => (whole ? other.job.id !== job.id : other.key !== key);
  const next = all.slice(at).find(stays) ?? all.slice(0, at).findLast(stays);
  if (whole) deleteJob(job);
  else deletePictures([one]);
  if (next) show(next);
  else dialog.close();
}

/** Open the viewer on a picture; `pictures` is a list or a function that gives the list as it is then. */
export function openViewer(handlers, one, pictures, more = null) {
  actions = handlers;
  const given = typeof pictures === "function" ? pictures : () => pictures;
  list = () => given().filter((other) => !isLeaving(other.job.id) && !isLeaving(other.key));
  loadMore = more;
  openDialog(dialog, () => { stop(); here = null; bus.emit("viewed"); });
  show(one);
}

// ---- wiring

closable(dialog, $("viewer-close"));
$("viewer-prev").addEventListener("click", () => walk(-1));
$("viewer-next").addEventListener("click", () => walk(1));
image.addEventListener("load", place); // what the size of the picture is compared with
addEventListener("resize", () => { if (here) place(); });
$("zoom-in").addEventListener("click", () => zoomBy(1.5));
$("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
$("zoom-reset").addEventListener("click", resetZoom);
$("pixels").addEventListener("change", () => frame.classList.toggle("pixels", $("pixels").checked));
bus.on("undeleted", () => { if (here) show(here); });
dialog.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || (/^[a-z]$/.test(event.key) && !recall("keys", true))) return;
  const slider = event.target.matches("input[type=range]");
  const pressed = event.target.matches("button, a, input");
  const keys = {
    ArrowLeft: () => walk(-1), ArrowRight: () => walk(1), "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5),
    0: resetZoom, " ": play, Delete: () => remove(), f: () => toggleFavourite(here), d: () => download(here.url, fileName(here)),
    l: () => copy(linkTo(here.job, here), "Link"), c: () => { const one = here; dialog.close(); startPicking(one); },
  };
  if ((slider && event.key.startsWith("Arrow")) || (pressed && event.key === " ")) return; // they have their own meaning there
  const act = keys[event.key] ?? keys[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});
