// Which jobs are on the stage? Their cards, the grids that some share, and what is remembered of them.

import { JobCard } from "./job_card.js";
import { follow, unfollow } from "./server.js";
import { rememberSeed } from "./settings.js";
import { $, bus, h, keep, loadStyle, percent, recall, setQuery } from "./ui.js";

const MAX_CARDS = 10;
const TITLE = document.title;
const cards = new Map(); // id -> JobCard, the newest last
let actions = null; // what can be done with a job

export const shownJobs = () => [...cards.keys()];
export const cardOf = (id) => cards.get(id);

// ---- memory

/** The address names the newest job, this browser all that are on the stage. */
export function rememberCards() {
  keep("jobs", shownJobs().slice(-MAX_CARDS));
  const newest = shownJobs().at(-1);
  const query = new URLSearchParams(location.search);
  query.delete("image");
  if (newest) query.set("job", newest);
  else query.delete("job");
  setQuery(query, "replaceState");
}

export const rememberedJobs = () => recall("jobs", []);

/** How far the jobs of this page are, in the title of its tab. */
function showTitle() {
  const busy = [...cards.values()].filter((card) => !card.finished);
  const share = busy.reduce((sum, card) => sum + card.share, 0) / (busy.length || 1);
  document.title = busy.length ? `${percent(share)} · ${TITLE}` : TITLE;
}

// ---- grids: several jobs with the same seeds in one frame

let grids = recall("grids", {}); // job id -> name of its grid

export const gridOf = (id) => grids[id];

export function joinGrid(id, name) {
  const kept = new Set([...cards.keys(), id]);
  grids = Object.fromEntries(Object.entries({ ...grids, [id]: name }).filter(([one]) => kept.has(one)));
  keep("grids", grids);
}

/** Where a card belongs: on top of the stage, or below the others of its grid. */
function place({ box, job: { id, parameters: { seed, n_images: count } } }) {
  if (!grids[id]) {
    $("cards").prepend(box);
    return;
  }
  let frame = $(`grid-${grids[id]}`);
  if (!frame) {
    const seeds = Array.from({ length: count }, (_, number) => h("span", seed + number));
    frame = h("section.matrix", { id: `grid-${grids[id]}`, "aria-label": "Grid of seeds and descriptions" },
      h("p.matrix-seeds.quiet", h("b", "Seed"), ...seeds));
    frame.style.setProperty("--seeds", count);
    $("cards").prepend(frame);
    loadStyle("editing.css");
  }
  frame.append(box);
}

// ---- all cards

function changed() {
  $("empty").hidden = cards.size > 0;
  bus.emit("cards");
  showTitle();
}

/** Put a job on the stage, on top, and keep up with it while it is not finished. */
export function addCard(job, body = null) {
  if (cards.has(job.id)) return cards.get(job.id);
  const card = new JobCard(job, { ...actions, remove: () => removeCard(job.id) });
  cards.set(job.id, card);
  place(card);
  rememberSeed(job.parameters.seed);
  if (body) card.state(body);
  else card.setStatus(job.status, {});
  if (!card.finished) follow(job.id, body?.last_event_id ?? 0, card);
  while (cards.size > MAX_CARDS) {
    const oldest = [...cards.values()].find((one) => one.finished);
    if (!oldest) break;
    cards.delete(oldest.job.id);
    takeAway(oldest.box);
  }
  rememberCards();
  changed();
  return card;
}

function takeAway(box) {
  const frame = box.closest(".matrix");
  box.remove();
  if (frame && !frame.querySelector(".job")) frame.remove();
}

function removeCard(id) {
  const card = cards.get(id);
  if (!card) return;
  unfollow(id);
  const focus = card.box.contains(document.activeElement);
  const neighbour = card.box.nextElementSibling ?? card.box.previousElementSibling;
  const next = neighbour?.querySelector("button:not(:disabled), a");
  takeAway(card.box);
  cards.delete(id);
  rememberCards();
  changed();
  if (focus) (next ?? $("prompt")).focus();
}

export function startCards(given) {
  actions = given;
  bus.on("progress", showTitle);
  bus.on("missing", (id) => keep("jobs", rememberedJobs().filter((other) => other !== id)));
  bus.on("hidden", ({ job: { id, key }, hidden }) => {
    const card = cards.get(id);
    if (!card) return;
    for (const { made } of card.tiles) if (made.dataset.key === key) made.hidden = hidden;
    card.box.hidden = key ? card.tiles.every(({ made }) => made.hidden) : hidden;
  });
  bus.on("removed", (job) => removeCard(job.id));
}
