// One image, large: its neighbours, zoom, how it was generated step by step, and everything that can be done with it.

import { canDo, editsInWords } from "./edits.js";
import { icon, setIcon } from "./icons.js";
import {
  altOf, deleteImages, deleteJob, fileName, heart, isLeaving, startPicking, stepsOf, toggleFavourite, wordsOf,
} from "./images.js";
import { gestures } from "./gestures.js";
import { ask, jobPath } from "./server.js";
import { canShare, collageOf, copy, linkTo, share } from "./sharing.js";
import {
  $, announce, bus, closable, h, iconButton, img, isCommand, on, openDialog, percent, recall, setText, softButton,
  wantsStillness,
} from "./ui.js";
import { dialog } from "./viewer_dialog.js";

const MAX_ZOOM = 8;
const FRAME_MS = 160;

const frame = $("viewer-frame");
const image = $("viewer-image");
let list = () => []; // what the arrows walk through; it may grow
let loadMore = null;
let here = null; // the image shown
let actions = null; // what the page does with an image: use, again, edit

// ---- zoom

const view = { zoom: 1, x: 0, y: 0 };

function place() {
  const room = frame.getBoundingClientRect();
  const limit = { x: (room.width * (view.zoom - 1)) / 2, y: (room.height * (view.zoom - 1)) / 2 };
  view.x = Math.max(-limit.x, Math.min(limit.x, view.x));
  view.y = Math.max(-limit.y, Math.min(limit.y, view.y));
  image.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.zoom})`;
  frame.classList.toggle("zoomed", view.zoom > 1);
  setText("zoom-reset", percent((view.zoom * room.width) / (image.naturalWidth || room.width)));
  $("zoom-out").disabled = view.zoom <= 1;
  $("zoom-in").disabled = view.zoom >= MAX_ZOOM;
}

/** Zoom by a factor, keeping the point (from the middle) under the pointer where it is. */
function zoomBy(factor, [x, y] = [0, 0]) {
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
const move = (x, y) => {
  if (view.zoom === 1) return; // all of it is in sight
  view.x += x;
  view.y += y;
  place();
};
const fingers = gestures(frame, fromMiddle, move, zoomBy);
let swipe = null;

on(frame, "dblclick", (event) => (view.zoom > 1 ? resetZoom() : zoomBy(3, fromMiddle(event))));
on(frame, "pointerdown", (event) => {
  swipe = fingers.size === 1 && view.zoom === 1 && event.pointerType !== "mouse" ? event.clientX : null;
});
for (const end of ["pointerup", "pointercancel"]) {
  on(frame, end, (event) => {
    const moved = swipe === null ? 0 : event.clientX - swipe;
    if (end === "pointerup" && Math.abs(moved) > 48 && view.zoom === 1) walk(moved < 0 ? 1 : -1);
    swipe = null;
  });
}

// ---- the steps

let frames = [];
let playing = 0;

async function loadSteps(one) {
  stop();
  frames = [];
  showSteps();
  const { steps } = await ask(`${jobPath(one.job.id)}steps`).catch(() => ({ steps: [] })); // images come when shown
  if (here?.key !== one.key) return;
  const total = stepsOf(one.job.parameters);
  const kept = steps.filter(({ index, t }) => index === one.index && t < total);
  frames = [...kept.map(({ t }) => ({ t, total, src: `${one.thumbnail}?t=${t}` })), { t: total, total, src: one.url }];
  showSteps();
}

function showSteps() {
  const any = frames.length > 1;
  $("steps").classList.toggle("none", !any);
  $("steps-play").disabled = $("steps-at").disabled = !any;
  $("steps-fork").hidden = true;
  $("steps-at").max = Math.max(0, frames.length - 1);
  $("steps-strip").replaceChildren(...frames.map(({ src }) => img(src, "", { loading: "lazy", draggable: "false" })));
  setText("steps-text", frames.length ? "No steps were kept" : "");
  $("steps-at").ariaValueText = "none";
  if (any) tellFrame(frames.length - 1);
}

function tellFrame(number) {
  const { t, total } = frames[number];
  $("steps-at").value = number;
  setText("steps-text", `Step ${t}`);
  $("steps-at").ariaValueText = `Step ${t} of ${total}`;
}

function showFrame(number) {
  if (!frames[number]) return;
  image.src = frames[number].src;
  tellFrame(number);
  const last = number === frames.length - 1;
  $("steps-fork").hidden = last || !canDo("start_timestep") || Boolean(here.job.parameters.refine);
  for (const [at, still] of [...$("steps-strip").children].entries()) {
    still.classList.toggle("now", at === number && !last);
  }
}

function stop() {
  clearInterval(playing);
  playing = 0;
  setIcon($("steps-play"), "play", "Play the steps");
}

function play() {
  if (playing) {
    stop();
    return;
  }
  if (frames.length < 2) return;
  let number = Number($("steps-at").value) === frames.length - 1 ? 0 : Number($("steps-at").value);
  setIcon($("steps-play"), "pause", "Pause");
  showFrame(number);
  playing = setInterval(() => {
    number += 1;
    showFrame(number);
    if (number >= frames.length - 1) stop();
  }, wantsStillness() ? 3 * FRAME_MS : FRAME_MS);
}

on($("steps-play"), "click", play);
on($("steps-fork"), "click", () => {
  const [one, { t, total }] = [here, frames[$("steps-at").value]];
  dialog.close();
  actions.fork(one, t, total);
});
on($("steps-at"), "input", () => { stop(); showFrame(Number($("steps-at").value)); });

// ---- the image and its neighbours

/** What can be done with an image elsewhere on the page: the viewer closes for it. */
const elsewhere = (name, text, act) => softButton(name, text, () => { dialog.close(); act(); });

function show(one) {
  here = one;
  const { job } = one;
  const { parameters: asked } = job;
  const all = list();
  const at = placeIn(all);
  resetZoom();
  image.src = one.url;
  image.alt = altOf(one);
  setText("viewer-title", wordsOf(job));
  setText("viewer-count", all.length > 1 && at >= 0 ? `${at + 1} of ${all.length}` : "");
  showNeighbours();
  if (loadMore && at > all.length - 8) loadMore().then(showNeighbours);
  $("viewer-actions").replaceChildren(
    heart(one), h("a.soft.strong", { href: one.url, download: fileName(one) }, icon("download"), "Download"),
    canShare() ? softButton("share", "Share", () => share([one]), { "aria-label": "Share or save to photos" }) : "");
  const { adherence, nearest } = one.result ?? {};
  const facts = [["Seed", one.seed, iconButton("copy", "Copy the seed", () => copy(String(one.seed), "Seed"))],
    ["Steps", asked.n_inf_steps], ["Guidance", asked.guidance_scale], ["Sampler", asked.sampler],
    ["Negative prompt", asked.negative_prompt || null],
    ["Edits", editsInWords(asked).map(([text]) => text).join(", ") || null],
    ["Fits", adherence == null ? null : percent(adherence)],
    ["Warning", nearest?.too_close ? "very near a training image" : null],
    ["Model", asked.model],
    ["Generated", job.created_at
      && new Date(job.created_at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })]];
  $("viewer-facts").replaceChildren(...facts.filter(([, value]) => value != null)
    .flatMap(([name, value, more]) => [h("dt", name), h("dd", String(value), more)]));
  const varied = { n_images: 4, interpolate_to: null };
  if (!asked.variation_strength) varied.variation_strength = 0.3;
  $("viewer-more").replaceChildren(...[
    canDo("init_image") && elsewhere("image", "Start from this image", () => actions.edit(one)),
    canDo("init_image") && elsewhere("brush", "Inpaint a part of it", () => actions.edit(one, true)),
    canDo("variation_strength") && !asked.refine
      && elsewhere("grid", "Vary this face", () => actions.use(job, one.index, varied, "vary")),
    canDo("refine") && elsewhere("spark", "Refine", () => actions.refine(one)),
    asked.refine && elsewhere("compare", "Before and after", () => actions.before(one)),
    elsewhere("settings", "Use these settings", () => actions.use(job, one.index)),
    elsewhere("again", "Generate others like this", () => actions.again(job, true)),
    elsewhere("shield", "About this image", () => actions.trust(one)),
    elsewhere("compare", "Compare", () => startPicking(one)),
    softButton("link", "Copy a link", () => copy(linkTo(job, one), "Link")),
    h("a.soft", { href: collageOf(job), download: `steps-${asked.seed}.png` }, icon("film"), "Steps as one image"),
    softButton("trash", "Delete", () => remove()),
    asked.n_images > 1 && softButton("trash", `Delete all ${asked.n_images}`, () => remove(true))].filter(Boolean));
  loadSteps(one);
}

const placeIn = (all) => all.findIndex(({ key }) => key === here?.key);

function neighbour(by) {
  const all = list();
  const at = placeIn(all);
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
  announce(altOf(next));
}

/** Delete the image shown, or its whole job. */
function remove(whole) {
  const one = here;
  const { job, key } = one;
  const all = list();
  const at = placeIn(all);
  const stays = (other) => (whole ? other.job.id !== job.id : other.key !== key);
  const next = all.slice(at).find(stays) ?? all.slice(0, at).findLast(stays);
  if (whole) deleteJob(job);
  else deleteImages([one]);
  if (next) show(next);
  else dialog.close();
}

/** Open the viewer on an image; `images` is a list or a function that gives the list as it is then. */
export function openViewer(handlers, one, images, more = null) {
  actions = handlers;
  const given = typeof images === "function" ? images : () => images;
  list = () => given().filter((other) => !isLeaving(other.job.id) && !isLeaving(other.key));
  loadMore = more;
  openDialog(dialog, () => { stop(); here = null; bus.emit("viewed"); });
  show(one);
}

// ---- wiring

closable(dialog, $("viewer-close"));
on($("viewer-prev"), "click", () => walk(-1));
on($("viewer-next"), "click", () => walk(1));
on(image, "load", place); // what the size of the image is compared with
on(window, "resize", () => { if (here) place(); });
on($("zoom-in"), "click", () => zoomBy(1.5));
on($("zoom-out"), "click", () => zoomBy(1 / 1.5));
on($("zoom-reset"), "click", resetZoom);
on($("pixels"), "change", () => frame.classList.toggle("pixels", $("pixels").checked));
bus.on("hidden", ({ hidden }) => { if (here && !hidden) show(here); });
on(dialog, "keydown", (event) => {
  if (isCommand(event) || (/^[a-z]$/.test(event.key) && !recall("keys", true))) return;
  const slider = event.target.matches("input[type=range]");
  const pressed = event.target.matches("button, a, input");
  const keys = {
    ArrowLeft: () => walk(-1), ArrowRight: () => walk(1),
    "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: resetZoom,
    " ": play, Delete: () => remove(), f: () => toggleFavourite(here),
    d: () => $("viewer-actions").querySelector("a").click(),
    l: () => copy(linkTo(here.job, here), "Link"), c: () => { const one = here; dialog.close(); startPicking(one); },
  };
  if ((slider && event.key.startsWith("Arrow")) || (pressed && event.key === " ")) return; // their own meaning there
  const act = keys[event.key] ?? keys[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});
