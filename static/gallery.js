// What was generated before? All jobs of the server, the newest first, page by page; searched, filtered.

import { icon } from "./icons.js";
import {
  imagesOf, isFavourite, isLeaving, isPicking, learn, startPicking, stopPicking, tile, wordsOf,
} from "./images.js";
import { shownJobs } from "./jobs.js";
import { ask } from "./server.js";
import { $, arrowKeys, bus, dayOf, dialogIsOpen, h, on, plural, segments, setText } from "./ui.js";

const PAGE = 24;
const RECENT_ROWS = 3;
const WAIT_MS = 250;
const FILTERS = [["All", "all"], ["Favourites", "favourites"], ["Unfinished", "unfinished"]];
const REFRESH_MS = 4000; // what others generate or delete is seen in an open gallery after so long
const UNFINISHED = "queued,running,failed,cancelled";
const STATES = { queued: "Waiting", running: "Running", failed: "Failed", cancelled: "Cancelled" };

let filter = "all";
let query = "";
let cursor = null;
let ended = false;
let loading = null; // the request under way
let round = 0; // answers to older questions are dropped
let jobs = []; // in the order shown
let shown = false;
let refreshes = 0; // only the newest is heeded
let actions = null; // see actions.js

/** The jobs of an answer, as the page knows jobs. */
const listed = ({ jobs: found, asked }) => found.map((body) => learn({ ...body, id: body.job_id }, asked));

/** All images now in the gallery, in their order. */
const galleryImages = () => succeeded(jobs).flatMap(imagesOf).filter(fits);

const succeeded = (list) => list.filter((job) => job.status === "succeeded" && !isLeaving(job.id));

const fits = (one) => filter !== "favourites" || isFavourite(one);

// ---- loading

/** The jobs that are searched for: the newest, or those after a cursor. */
const find = (more) => ask(`jobs/?${new URLSearchParams({ limit: PAGE, ...(query && { q: query }), ...more,
  ...(filter === "favourites" && { favourites: "only" }), ...(filter === "unfinished" && { status: UNFINISHED }) })}`);

async function fetchPage(number) {
  const answer = await find(cursor && { cursor });
  if (number !== round) return;
  cursor = answer.next ?? null;
  ended = !cursor;
  for (const job of listed(answer)) {
    if (jobs.some((other) => other.id === job.id)) continue;
    jobs.push(job);
    place(job, tilesOf(job));
  }
}

/** Load the next page; resolves when it is there. */
function more() {
  if (loading || ended) return loading ?? Promise.resolve();
  const number = round;
  $("gallery-end").dataset.state = "loading";
  loading = fetchPage(number).catch((error) => {
    if (number !== round) return;
    ended = true;
    $("gallery-end").replaceChildren(h("p", { text: `Older images could not be loaded: ${error.message}` }),
      h("button.soft", {
        text: "Try again", click: () => { ended = false; $("gallery-end").replaceChildren(); more(); } }));
  }).finally(() => {
    if (number !== round) return;
    loading = null;
    $("gallery-end").dataset.state = "";
    settle();
  });
  return loading;
}

/** After a page: say what is there, and go on while its end is still in sight. */
function settle() {
  const others = filter === "favourites" ? 0 : jobs.filter((job) => !isLeaving(job.id)).length - succeeded(jobs).length;
  const images = galleryImages().length;
  const count = filter === "unfinished" ? plural(others, "job")
    : [(images || !others) && plural(images, "image"), others && `${others} unfinished`].filter(Boolean).join(", ");
  setText("gallery-status", `${count}${ended ? "" : " so far"}${query ? ` for “${query}”` : ""}`);
  showEmpty(!$("days").querySelector(".tile:not([hidden])") && ended);
  if (!ended && shown && $("gallery-end").getBoundingClientRect().top < innerHeight + 600) more();
}

/** What came, ended or went since, here or in another browser: the newest jobs are asked for again while it is open. */
async function refresh() {
  if (!shown || document.hidden || loading || filter === "favourites" || dialogIsOpen()) return;
  const [number, turn] = [round, ++refreshes];
  const answer = await find().catch(() => null); // the banner says why
  if (!answer || number !== round || turn !== refreshes || loading) return;
  const known = new Map(jobs.map((job) => [job.id, job]));
  const newest = listed(answer);
  if (answer.next && !newest.some((job) => known.has(job.id))) { // more came than one page holds
    reload();
    return;
  }
  const since = answer.next ? newest.at(-1).created_at : "";
  forget(jobs.filter((job) => job.created_at > since && !newest.some((other) => other.id === job.id)));
  const latest = jobs[0]?.created_at ?? "";
  const changed = newest.filter((job) => (
    known.has(job.id) ? summary(job) !== summary(known.get(job.id)) : job.created_at >= latest));
  const came = changed.filter((job) => !known.has(job.id));
  jobs = [...came, ...jobs.map((job) => changed.find((other) => other.id === job.id) ?? job)];
  for (const job of changed.reverse()) {
    const [first, ...others] = tilesFor(job.id);
    for (const item of others) item.remove();
    if (first) first.replaceWith(...tilesOf(job));
    else place(job, tilesOf(job), true);
  }
  hideEmptyDays();
  settle();
}

const summary = (job) => [job.status, ...imagesOf(job).map((one) => one.index)].join();

const tilesFor = (id) => [...$("days").querySelectorAll(".tile")].filter((item) => item.dataset.job === id);

/** Take jobs that were deleted out of what is shown. */
function forget(gone) {
  const stays = (job) => !gone.some((other) => other.id === job.id);
  [jobs, recent] = [jobs.filter(stays), recent.filter(stays)];
  for (const { id } of gone) for (const item of tilesFor(id)) item.remove();
}

function hideEmptyDays() {
  for (const day of $("days").children) day.hidden = !day.querySelector(".tile:not([hidden])");
}

function showEmpty(visible) {
  const box = $("gallery-empty");
  box.hidden = !visible;
  if (!visible) return;
  const [title, text, button] = box.children;
  const [said, help] = query ? ["Nothing found", `No description holds “${query}”.`]
    : filter === "favourites" ? ["No favourites yet", "Press the heart on an image to find it here again."]
      : filter === "unfinished" ? ["Nothing unfinished", "Every job here came to a good end."]
        : ["Nothing here yet", "Images appear here as soon as they are generated."];
  title.textContent = said;
  text.textContent = help;
  button.hidden = !query && filter === "all";
  button.textContent = "Show all images";
}

function reload() {
  round += 1;
  [cursor, ended, loading, jobs] = [null, false, null, []];
  $("days").replaceChildren();
  $("gallery-end").replaceChildren();
  $("gallery-empty").hidden = true;
  return more();
}

// ---- what is shown

function imageTile(one) {
  const made = tile(one, { open: (chosen) => actions.open(chosen, galleryImages, more) });
  made.append(h("span.caption", { "aria-hidden": "true", text: wordsOf(one.job) }));
  return made;
}

function stateTile(job) {
  return h("li.tile.unfinished", { data: { job: job.id, state: job.status } },
    h("button.tile-open", { click: () => actions.show(job) },
      h("b", icon({ failed: "alert", cancelled: "close" }[job.status] ?? "again"), STATES[job.status] ?? job.status),
      h("span", wordsOf(job))));
}

function place(job, tiles, first = false) {
  const name = dayOf(job.created_at ?? Date.now());
  let day = first ? $("days").firstElementChild : $("days").lastElementChild;
  if (day?.dataset.day !== name) {
    day = h("section.day", { data: { day: name } }, h("h3", name), h("ol.grid"));
    $("days")[first ? "prepend" : "append"](day);
  }
  day.lastElementChild[first ? "prepend" : "append"](...tiles);
  for (const made of tiles) made.hidden = isLeaving(job.id);
}

const tilesOf = (job) => (job.status === "succeeded" ? imagesOf(job).filter(fits).map(imageTile) : [stateTile(job)]);

/** A job of this page has ended. */
function arrive(job) {
  refresh();
  if (job.status === "succeeded") recent.unshift(job);
  showRecent();
}

/** The newest images under the cards of the stage, without those that have a card. */
let recent = [];
let resizing = 0;

export async function loadRecent() {
  try {
    recent = listed(await ask("jobs/?limit=40&status=succeeded"));
  } catch { /* the banner says why */ }
  showRecent();
}

function showRecent() {
  const cards = new Set(shownJobs());
  const list = () => succeeded(recent).filter((job) => !cards.has(job.id)).flatMap(imagesOf);
  $("recent").hidden = !list().length;
  const columns = getComputedStyle($("recent-grid")).gridTemplateColumns.split(" ").length;
  const full = Math.max(1, Math.min(RECENT_ROWS, Math.floor(list().length / columns))) * columns; // only whole rows
  const open = (chosen) => actions.open(chosen, list);
  $("recent-grid").replaceChildren(...list().slice(0, full).map((one) => tile(one, { open })));
}

// ---- wiring

export function startGallery(given) {
  actions = given;
  segments($("filters"), "filter", FILTERS, filter, (value) => { filter = value; reload(); });
  let timer = 0;
  on($("search"), "input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (query === $("search").value.trim()) return;
      query = $("search").value.trim();
      reload();
    }, WAIT_MS);
  });
  on($("gallery-empty").querySelector("button"), "click", () => {
    [query, filter] = ["", "all"];
    $("search").value = "";
    $("filters").querySelector("input").checked = true;
    reload();
    $("search").focus();
  });
  on($("pick"), "click", () => (isPicking() ? stopPicking() : startPicking()));
  on($("who"), "click", () => actions.who([...new Set(galleryImages().map((one) => one.job))]));
  on($("picking-cancel"), "click", stopPicking);
  const nearEnd = (entries) => { if (shown && entries.some((entry) => entry.isIntersecting)) more(); };
  new IntersectionObserver(nearEnd, { rootMargin: "600px" }).observe($("gallery-end"));
  for (const id of ["days", "cards", "recent-grid"]) arrowKeys($(id), ".tile-open:not(:disabled)");
  setInterval(refresh, REFRESH_MS);
  bus.on("finished", arrive);
  bus.on("cards", showRecent);
  on(window, "resize", () => { clearTimeout(resizing); resizing = setTimeout(showRecent, WAIT_MS); });
  const update = () => { // not under an open viewer
    if (filter === "favourites" && shown && !dialogIsOpen()) reload();
  };
  bus.on("favourites", update);
  bus.on("viewed", update);
  bus.on("hidden", ({ job, hidden }) => {
    refreshes += 1; // an answer under way does not know of it
    for (const item of tilesFor(job.id)) if (!job.key || item.dataset.key === job.key) item.hidden = hidden;
    hideEmptyDays();
    showRecent();
    settle();
  });
  bus.on("removed", (job) => forget([job]));
}

export function showGallery(visible) {
  shown = visible;
  if (visible) {
    if (jobs.length && filter !== "favourites") refresh();
    else reload();
    return;
  }
  stopPicking();
  showRecent();
}
