// What was drawn before? All jobs of the server, the newest first, page by page; search, favourites, what did not succeed.

import { isFavourite, isLeaving, isPicking, learn, picturesOf, startPicking, stopPicking, tile, wordsOf } from "./pictures.js";
import { shownJobs } from "./jobs.js";
import { ask } from "./server.js";
import { $, arrowKeys, bus, dayOf, dialogIsOpen, h, icon, plural, segments } from "./ui.js";

const PAGE = 24;
const RECENT_ROWS = 3;
const WAIT_MS = 250;
const FILTERS = [["All", "all"], ["Favourites", "favourites"], ["Unfinished", "unfinished"]];
const LOOK_MS = 4000; // what others draw appears in an open gallery after so long
const UNFINISHED = ["queued", "running", "failed", "cancelled"];
const SAID = { queued: "Waiting", running: "Being drawn", failed: "Failed", cancelled: "Cancelled" };

let filter = "all";
let query = "";
let cursor = null;
let ended = false;
let loading = null; // the request under way
let round = 0; // answers to older questions are dropped
let jobs = []; // in the order shown
let dirty = true; // something was drawn or deleted since this was loaded
let shown = false;
let actions = null; // {open(picture, list), show(job)}

/** A job of the list, as the page knows jobs. */
const listed = (body) => learn({ ...body, id: body.job_id });

/** All pictures now in the gallery, in their order. */
const galleryPictures = () => jobs.filter((job) => job.status === "succeeded" && !isLeaving(job.id)).flatMap(picturesOf).filter(fits);

const fits = (one) => filter !== "favourites" || isFavourite(one);

// ---- loading

async function fetchPage(number) {
  const asked = new URLSearchParams({ limit: PAGE });
  if (cursor) asked.set("cursor", cursor);
  if (query) asked.set("q", query);
  if (filter === "favourites") asked.set("favourites", "only");
  if (filter === "unfinished") asked.set("status", UNFINISHED.join(","));
  const answer = await ask(`jobs/?${asked}`);
  if (number !== round) return;
  cursor = answer.next ?? null;
  ended = !cursor;
  for (const job of answer.jobs.map(listed)) {
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
    $("gallery-end").replaceChildren(h("p", { text: `Older pictures could not be loaded: ${error.message}` }),
      h("button", { class: "soft", text: "Try again", click: () => { ended = false; $("gallery-end").replaceChildren(); more(); } }));
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
  const said = filter === "favourites" ? 0 : jobs.filter((job) => job.status !== "succeeded" && !isLeaving(job.id)).length;
  const seen = galleryPictures().length;
  const count = filter === "unfinished" ? plural(said, "job")
    : [(seen || !said) && plural(seen, "picture"), said && `${said} unfinished`].filter(Boolean).join(", ");
  $("gallery-status").textContent = `${count}${ended ? "" : " so far"}${query ? ` for “${query}”` : ""}`;
  showEmpty(!$("days").querySelector(".tile:not([hidden])") && ended);
  if (!ended && shown && $("gallery-end").getBoundingClientRect().top < innerHeight + 600) more();
}

/** What came or ended since, here or in another browser: the newest jobs are looked at again while somebody looks on. */
async function freshen() {
  if (!shown || document.hidden || loading || filter === "favourites" || dialogIsOpen()) return;
  const number = round;
  const asked = new URLSearchParams({ limit: PAGE, ...(query && { q: query }), ...(filter === "unfinished" && { status: UNFINISHED.join(",") }) });
  const answer = await ask(`jobs/?${asked}`).catch(() => null); // the banner says why
  if (!answer || number !== round || loading) return;
  const newest = answer.jobs.map(listed);
  const before = new Map(jobs.map((job) => [job.id, job]));
  const changed = newest.filter((job) => before.get(job.id)?.status !== job.status);
  if (!changed.length) return;
  if (answer.next && !newest.some((job) => before.has(job.id))) { // more came than one page holds
    reload();
    return;
  }
  jobs = [...newest, ...jobs.filter((job) => !newest.some((other) => other.id === job.id))];
  for (const job of changed.reverse()) {
    const told = [...$("days").querySelectorAll(".told")].find((item) => item.dataset.job === job.id);
    if (told) told.replaceWith(...tilesOf(job));
    else place(job, tilesOf(job), true);
  }
  settle();
}

function showEmpty(visible) {
  const box = $("gallery-empty");
  box.hidden = !visible;
  if (!visible) return;
  const [title, text, button] = box.children;
  const [said, help] = query ? ["Nothing found", `No description holds “${query}”.`]
    : filter === "favourites" ? ["No favourites yet", "Press the heart on a picture to find it here again."]
      : filter === "unfinished" ? ["Nothing unfinished", "Every job here came to a good end."]
        : ["Nothing here yet", "Pictures appear here as soon as they are drawn."];
  title.textContent = said;
  text.textContent = help;
  button.hidden = !query && filter === "all";
  button.textContent = "Show all pictures";
}

function reload() {
  round += 1;
  [cursor, ended, loading, jobs, dirty] = [null, false, null, [], false];
  $("days").replaceChildren();
  $("gallery-end").replaceChildren();
  $("gallery-empty").hidden = true;
  return more();
}

// ---- what is shown

function pictureTile(one) {
  const made = tile(one, { open: (chosen) => actions.open(chosen, galleryPictures, more) });
  made.append(h("span", { class: "caption", "aria-hidden": "true", text: wordsOf(one.job) }));
  return made;
}

function stateTile(job) {
  return h("li", { class: "tile told", data: { job: job.id, state: job.status } },
    h("button", { class: "tile-open", click: () => actions.show(job) },
      h("b", {}, icon(job.status === "failed" ? "alert" : job.status === "cancelled" ? "close" : "again"), SAID[job.status] ?? job.status),
      h("span", { text: wordsOf(job) })));
}

function place(job, tiles, first = false) {
  const name = dayOf(job.created_at ?? Date.now());
  let day = first ? $("days").firstElementChild : $("days").lastElementChild;
  if (day?.dataset.day !== name) {
    day = h("section", { class: "day", data: { day: name } }, h("h3", { text: name }), h("ol", { class: "grid" }));
    $("days")[first ? "prepend" : "append"](day);
  }
  day.lastElementChild[first ? "prepend" : "append"](...tiles);
  for (const made of tiles) made.hidden = isLeaving(job.id);
}

const tilesOf = (job) => (job.status === "succeeded" ? picturesOf(job).filter(fits).map(pictureTile) : [stateTile(job)]);

/** A job of this page has ended: its pictures take the place of what was said about it. */
function arrive(job) {
  const told = [...$("days").querySelectorAll(".told")].find((item) => item.dataset.job === job.id);
  if (told && filter === "all") {
    jobs = jobs.map((other) => (other.id === job.id ? job : other));
    told.replaceWith(...tilesOf(job));
    settle();
  } else dirty = true;
  if (job.status === "succeeded") recent.unshift(job);
  drawRecent();
}

/** The newest pictures under the cards of the stage, without those that have a card. */
let recent = [];
let resizing = 0;

export async function loadRecent() {
  try {
    const answer = await ask(`jobs/?${new URLSearchParams({ limit: 40, status: "succeeded" })}`);
    recent = answer.jobs.map(listed);
  } catch { /* the banner says why */ }
  drawRecent();
}

function drawRecent() {
  const cards = new Set(shownJobs());
  const list = () => recent.filter((job) => !cards.has(job.id) && !isLeaving(job.id)).flatMap(picturesOf);
  $("recent").hidden = !list().length;
  const columns = getComputedStyle($("recent-grid")).gridTemplateColumns.split(" ").length;
  const full = Math.max(1, Math.min(RECENT_ROWS, Math.floor(list().length / columns))) * columns; // only whole rows
  $("recent-grid").replaceChildren(...list().slice(0, full).map((one) => tile(one, { open: (chosen) => actions.open(chosen, list) })));
}

// ---- wiring

export function startGallery(given) {
  actions = given;
  segments($("filters"), "filter", FILTERS, filter, (value) => { filter = value; reload(); });
  let timer = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (query === $("search").value.trim()) return;
      query = $("search").value.trim();
      reload();
    }, WAIT_MS);
  });
  $("gallery-empty").querySelector("button").addEventListener("click", () => {
    [query, filter] = ["", "all"];
    $("search").value = "";
    $("filters").querySelector("input").checked = true;
    reload();
    $("search").focus();
  });
  $("pick").addEventListener("click", () => (isPicking() ? stopPicking() : startPicking()));
  $("who").addEventListener("click", () => actions.who([...new Set(galleryPictures().map((one) => one.job))]));
  $("picking-cancel").addEventListener("click", stopPicking);
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && shown && more(), { rootMargin: "600px" })
    .observe($("gallery-end"));
  arrowKeys($("days"), ".tile-open");
  arrowKeys($("cards"), ".tile-open:not(:disabled)");
  arrowKeys($("recent-grid"), ".tile-open");
  setInterval(freshen, LOOK_MS);
  bus.on("finished", arrive);
  bus.on("cards", drawRecent);
  addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(drawRecent, WAIT_MS); });
  const refresh = () => { if (filter === "favourites" && shown && !dialogIsOpen()) reload(); }; // not under an open viewer
  bus.on("favourites", refresh);
  bus.on("viewed", refresh);
  const veil = (job, hidden) => {
    for (const item of document.querySelectorAll("#days .tile")) if (job.key ? item.dataset.key === job.key : item.dataset.job === job.id) item.hidden = hidden;
    for (const day of $("days").children) day.hidden = !day.querySelector(".tile:not([hidden])");
    drawRecent();
    settle();
  };
  bus.on("deleted", (job) => veil(job, true));
  bus.on("undeleted", (job) => veil(job, false));
  bus.on("removed", (job) => {
    recent = recent.filter((other) => other.id !== job.id);
    jobs = jobs.filter((other) => other.id !== job.id);
  });
}

export function showGallery(visible) {
  shown = visible;
  if (visible && (dirty || !jobs.length || filter === "favourites")) reload();
  if (visible) return;
  stopPicking();
  drawRecent();
}
