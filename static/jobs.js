// What happens to the jobs that are asked for here? One card each: waiting, drawing, finished, failed, cancelled.

import { editsInWords } from "./edits.js";
import { fileName, heart, learn, picture, picturesOf, tile, wordsOf } from "./pictures.js";
import { ask, follow, jobPath, unfollow } from "./server.js";
import { rememberSeed } from "./settings.js";
import { archiveOf, canShare, collageOf, copy, linkTo, shareJob } from "./sharing.js";
import { $, announce, bus, h, icon, iconButton, keep, loadStyle, plural, recall, seconds, setQuery, toast } from "./ui.js";

const MAX_CARDS = 10;
const TITLE = document.title;
const cards = new Map(); // id -> Card, the newest last

export const shownJobs = () => [...cards.keys()];

/** What a job looks like to the page, from whichever answer it came. */
export function jobFrom(body) {
  return learn({
    id: body.job_id, status: body.status, parameters: body.parameters, error: body.error ?? null,
    created_at: body.created_at, started_at: body.started_at, finished_at: body.finished_at,
    images: body.status === "succeeded" ? body.response?.map(({ img, latent, ...told }) => told) : [],
  });
}

/** The address names the newest job, this browser all that are on the stage. */
export function rememberCards() {
  keep("jobs", [...cards.keys()].slice(-MAX_CARDS));
  const newest = [...cards.keys()].at(-1);
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
  document.title = busy.length ? `${Math.round(100 * share)} % · ${TITLE}` : TITLE;
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
function settle({ box, job: { id, parameters: { seed, n_images: count } } }) {
  if (!grids[id]) {
    $("cards").prepend(box);
    return;
  }
  let frame = $(`grid-${grids[id]}`);
  if (!frame) {
    const seeds = Array.from({ length: count }, (_, number) => h("span", { text: seed + number }));
    frame = h("section", { class: "matrix", id: `grid-${grids[id]}`, "aria-label": "Grid of seeds and descriptions" },
      h("p", { class: "matrix-seeds quiet" }, h("b", { text: "Seed" }), ...seeds));
    frame.style.setProperty("--seeds", count);
    $("cards").prepend(frame);
    loadStyle("editing.css");
  }
  frame.append(box);
}

function arrange() {
  $("empty").hidden = cards.size > 0;
  bus.emit("cards");
  showTitle();
}

const iconLink = (name, label, href, file) => h("a", { class: "round plain", href, download: file, "aria-label": label, title: label }, icon(name));

class Card {
  constructor(job, { open, use, again, who }) {
    Object.assign(this, { job, open, use, again, who, finished: false, share: 0, began: null, told: 0 });
    const { parameters: asked } = job;
    this.status = h("p", { class: "job-status" });
    this.bar = h("progress", { max: 1, value: 0, "aria-label": `Progress: ${wordsOf(job)}` });
    this.cancel = h("button", { class: "soft", text: "Cancel", "aria-label": `Cancel: ${wordsOf(job)}`, click: () => this.askToCancel() });
    this.live = h("div", { class: "job-live" }, this.status, this.cancel, this.bar);
    this.trouble = h("div", { class: "job-trouble", hidden: true });
    this.actions = h("div", { class: "job-actions" });
    const details = [plural(asked.n_inf_steps, "step"), asked.sampler, `guidance ${asked.guidance_scale}`];
    if (asked.negative_prompt) details.push(`without ${asked.negative_prompt}`);
    details.push(...editsInWords(asked).map(([text]) => text));
    this.tiles = Array.from({ length: asked.n_images }, (_, index) => picture(job, index)).map((one) => {
      const made = tile(one, { open: ({ index }) => open(picture(job, index), picturesOf(job)), src: null, name: `Face ${one.index + 1} of ${asked.n_images}`, tools: false });
      const button = made.querySelector("button");
      button.disabled = true;
      const image = made.querySelector("img");
      image.hidden = true;
      image.loading = "eager";
      const step = h("span", { class: "step", "aria-hidden": "true" });
      made.append(step);
      return { made, button, image, step, one };
    });
    const title = h("h3", { class: "words", text: wordsOf(job), id: `job-${job.id}` });
    this.box = h("article", { class: "job", "aria-labelledby": title.id, data: { job: job.id, state: job.status } },
      h("header", { class: "job-head" }, h("div", {}, title, h("p", { class: "quiet", text: details.join(" · ") })), this.actions),
      this.live, this.trouble,
      h("ol", { class: `tiles ${asked.interpolate_to ? "strip" : ""}`, data: { count: asked.n_images } }, ...this.tiles.map((one) => one.made)));
    this.setActions();
  }

  // ---- what is told about it

  /** From the stream. */
  event(kind, data) {
    if (kind === "status") this.setStatus(data.status, data);
    if (kind === "progress") this.setProgress(data.t, data.total_t);
    if (kind === "preview") this.sketch(data);
    if (kind === "image") this.setPicture(data);
    if (kind === "done") this.conclude();
  }

  /** From the answer to a question. */
  state(body) {
    Object.assign(this.job, jobFrom(body));
    this.setStatus(body.status, body);
    const total = body.parameters.n_inf_steps;
    if (body.status === "running") this.setProgress(Math.round(body.progress * total), total);
    for (const entry of body.response ?? []) {
      if (body.status === "succeeded") this.setPicture(entry);
      else this.sketch(entry);
    }
    if (body.finished) this.finish();
  }

  setStatus(status, { queue_position: position, restarted }) {
    if (this.finished || !["queued", "running"].includes(status)) return; // an end is shown with all that belongs to it
    this.job.status = this.box.dataset.state = status;
    if (status === "queued") {
      const place = position > 1 ? `Waiting, number ${position} in the queue` : "Next in the queue";
      this.status.textContent = restarted ? "The server was restarted: drawn again from the same seed" : place;
      this.bar.removeAttribute("value");
      this.began = null;
      this.share = 0;
    } else if (!this.began) {
      this.status.textContent = "Starting …";
      this.bar.value = 0;
    }
  }

  setProgress(done, total) {
    if (this.finished) return;
    const now = performance.now();
    if (!this.began || done < this.began.done) this.began = { done, now };
    this.share = total ? done / total : 0;
    const steps = done - this.began.done;
    const left = steps < 2 ? null : ((now - this.began.now) / steps / 1000) * (total - done);
    this.bar.value = this.share;
    this.status.textContent = `Step ${done} of ${total}${left === null || left < 0.5 ? "" : ` · about ${seconds(left)} left`}`;
    const quarter = Math.floor(this.share * 4);
    if (quarter > this.told && quarter < 4) announce(`${quarter * 25} percent: ${wordsOf(this.job)}`);
    this.told = quarter;
    showTitle();
  }

  /** Show the newest preview; one at a time is fetched, so that no line carries more than it can. */
  async sketch(about) {
    const target = this.tiles[about.index];
    if (!target || target.final) return;
    const idle = !target.next;
    target.next = about;
    target.seen = true;
    for (let shown = null; idle && !target.final && shown !== target.next && !document.hidden;) {
      shown = target.next;
      await this.put(target, `${target.one.thumbnail}?t=${shown.t}`, () => !target.final);
      if (!target.final && !this.finished) target.step.textContent = `${shown.t}/${shown.total_t}`;
    }
    if (idle) target.next = null;
  }

  /** Show a finished picture: small first, which is there at once on any line. */
  async setPicture(about) {
    const target = this.tiles[about.index];
    if (!target || target.final) return;
    target.seen = true;
    target.step.textContent = "";
    this.complete(target, about);
    await this.put(target, target.one.thumbnail);
    await this.put(target, target.one.url);
  }

  /** Decoded first, so that nothing flickers. */
  async put(target, address, wanted = () => true) {
    const ready = new Image();
    ready.src = address;
    await ready.decode().catch(() => {});
    if (!ready.naturalWidth || !wanted()) return;
    target.image.src = address;
    target.image.hidden = false;
  }

  complete(target, about) {
    const { job } = this;
    target.final = true;
    target.button.disabled = false;
    job.images = [...(job.images ?? []).filter((one) => one.index !== about.index), about];
    target.one = picture(job, about.index); // its own seed, which the best of many do not count up to
    target.button.setAttribute("aria-label", `Face ${about.index + 1} of ${this.tiles.length}: ${wordsOf(job)}, seed ${target.one.seed}`);
    if (about.adherence != null || about.nearest?.too_close) {
      import("./badges.js").then(async ({ badges }) => target.made.append(...await badges(about, job.parameters.prompt))).catch(() => {});
    }
    target.made.append(h("div", { class: "tile-tools" },
      heart(target.one, `Favourite: face ${target.one.index + 1}`),
      iconLink("download", `Download face ${target.one.index + 1}, seed ${target.one.seed}`, target.one.url, fileName(target.one))));
  }

  // ---- the end

  async conclude() {
    try {
      this.state(await ask(`${jobPath(this.job.id)}?include=none`));
    } catch (error) {
      if (error.status) this.missing(error);
      else follow(this.job.id, 0, this); // the server went away just now: ask again when it is back
    }
  }

  finish() {
    if (this.finished) return;
    this.finished = true;
    const { job } = this;
    this.box.dataset.state = job.status;
    this.live.hidden = true;
    this.share = 0;
    const anything = this.tiles.some((one) => one.seen);
    for (const one of this.tiles) {
      one.step.textContent = "";
      one.made.hidden = job.status === "succeeded" && !one.final; // it was deleted
    }
    this.box.classList.toggle("bare", !anything);
    if (job.status === "succeeded") {
      announce(`${plural(job.parameters.n_images, "face")} finished: ${wordsOf(job)}`);
      if (job.parameters.interpolate_to && job.parameters.n_images > 1) this.play();
    } else if (job.status === "cancelled") {
      this.explain("Cancelled", anything ? "What had appeared by then stays here." : "Nothing had appeared yet.", true);
    } else {
      this.explain("This job failed", `${job.error?.message ?? "The server did not say why."} ${job.error?.hint ?? ""}`);
    }
    this.setActions();
    showTitle();
    bus.emit("finished", job);
  }

  /** A blend can be played. */
  async play() {
    const [{ player }] = await Promise.all([import("./player.js"), loadStyle("editing.css")]);
    this.box.append(player(this.job));
  }

  missing(error) {
    this.finished = true;
    this.live.hidden = true;
    this.box.dataset.state = "missing";
    this.box.classList.add("bare");
    const title = error.status === 410 ? "This job is no longer kept" : "This job is not known to the server";
    this.explain(title, error.message);
    this.setActions();
    showTitle();
    keep("jobs", rememberedJobs().filter((id) => id !== this.job.id));
  }

  explain(title, text, calm) {
    const retry = h("button", { class: "soft", click: () => this.again(this.job, false) }, icon("again"), "Try again");
    this.trouble.replaceChildren(h("div", {}, h("p", { class: "notice-title", text: title }), h("p", { text })), retry);
    this.trouble.classList.toggle("calm", Boolean(calm));
    this.trouble.setAttribute("role", calm ? "status" : "alert");
    this.trouble.hidden = false;
  }

  async askToCancel() {
    this.cancel.disabled = true;
    this.status.textContent = "Cancelling …";
    try {
      await ask(`${jobPath(this.job.id)}cancel`, {});
    } catch (error) {
      this.cancel.disabled = false;
      if (error.status) toast(`It could not be cancelled: ${error.message}`, { trouble: true });
    }
  }

  setActions() {
    const { job } = this;
    const [only, several] = picturesOf(job);
    const done = this.finished && job.status === "succeeded" && only;
    this.actions.replaceChildren(...[
      this.finished && iconButton("again", "Draw others like these", () => this.again(job, true)),
      iconButton("settings", "Use these settings", () => this.use(job)),
      done && (several ? iconLink("download", "Download all as zip", archiveOf(job), `faces-${only.seed}.zip`)
        : iconLink("download", "Download PNG", only.url, fileName(only))),
      done && iconLink("film", "Download the steps as one picture", collageOf(job), `steps-${only.seed}.png`),
      done && job.images?.some((one) => one.attributes) && iconButton("people", "Who came out", () => this.who(job)),
      done && canShare() && iconButton("share", "Share or save to photos", () => shareJob(job)),
      done && iconButton("link", "Copy a link", () => copy(linkTo(job), "Link")),
      this.finished && this.box.dataset.state !== "missing" && iconButton("trash", "Delete", async () => (await import("./deleting.js")).deleteJob(job)),
      this.finished && iconButton("close", "Put away", () => removeCard(job.id)),
    ].filter(Boolean));
  }
}

// ---- all cards

/** Put a job on the stage, on top, and keep up with it while it is not finished. */
export function addCard(job, handlers, body = null) {
  if (cards.has(job.id)) return cards.get(job.id);
  const card = new Card(job, handlers);
  cards.set(job.id, card);
  settle(card);
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
  arrange();
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
  const next = (card.box.nextElementSibling ?? card.box.previousElementSibling)?.querySelector("button:not(:disabled), a");
  takeAway(card.box);
  cards.delete(id);
  rememberCards();
  arrange();
  if (focus) (next ?? $("prompt")).focus();
}

export const cardOf = (id) => cards.get(id);

const veil = ({ id, key }, hidden) => {
  const card = cards.get(id);
  if (!card) return;
  for (const { made } of card.tiles) if (made.dataset.key === key) made.hidden = hidden;
  card.box.hidden = key ? card.tiles.every(({ made }) => made.hidden) : hidden;
};
bus.on("deleted", (job) => veil(job, true));
bus.on("undeleted", (job) => veil(job, false));
bus.on("removed", (job) => removeCard(job.id));
