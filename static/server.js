// How does the page talk to the server? Requests, whether it is there, following jobs.

import { bus, keep, on, randomHex, recall } from "./ui.js";

const KINDS = ["status", "progress", "preview", "image", "done"];
const POLL_MS = 900;
const HIDDEN_POLL_MS = 4000; // nobody looks
const RETRY_STREAM_MS = 10_000; // a job is polled after its stream failed
const LEASE_MS = 3000;
const PULSE_MS = 15_000;
const PROBE_MS = 1200;

/** An answer that is not a success; `status` 0: there was none. */
class ServerError extends Error {
  constructor(status, body, retryAfter) {
    super(body.error || `The server answered ${status}.`);
    this.status = status;
    this.body = body;
    this.retryAfter = retryAfter;
  }
}

const client = recall("client") ?? randomHex(12); // for fairness between people behind one address
keep("client", client);

// ---- is it there?

let gone = false;

function lost() {
  if (gone) return;
  gone = true;
  bus.emit("lost");
  probe();
}

async function probe() {
  try {
    const answer = await fetch("health", { cache: "no-store" });
    if (answer.status < 500) {
      gone = false;
      bus.emit("back");
      pump();
      return;
    }
  } catch { /* still gone */ }
  setTimeout(probe, document.hidden ? 4 * PROBE_MS : PROBE_MS);
}

export function watchPulse() {
  setInterval(() => {
    if (gone || document.hidden) return;
    fetch("health", { cache: "no-store" }).then((answer) => answer.json())
      .then((told) => bus.emit("pulse", told), lost);
  }, PULSE_MS);
}

// ---- requests

/** One request; `body` makes it a POST. Rejects with a ServerError. */
export async function send(path, body, { headers = {}, ...more } = {}) {
  const options = { ...more, headers: { "X-Client-Id": client, ...headers } };
  if (body !== undefined) {
    const raw = body instanceof Blob;
    Object.assign(options, { method: "POST", body: raw ? body : JSON.stringify(body) });
    options.headers["Content-Type"] = raw ? body.type : "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    lost();
    throw new ServerError(0, { error: "The server does not answer." });
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new ServerError(answer.status, said, Number(answer.headers.get("Retry-After")) || 0);
  }
  return answer;
}

export const blobOf = async (path) => (await send(path)).blob();

/** The same as `send`, for an answer in JSON, which then says when it was asked for. */
export async function ask(path, body, more) {
  const asked = performance.now();
  const answer = await send(path, body, more);
  return answer.status === 204 ? {} : Object.assign(await answer.json(), { asked });
}

export const jobPath = (id) => `jobs/${encodeURIComponent(id)}/`;
export const askJob = (id) => ask(`${jobPath(id)}?include=none`);

// ---- following jobs: one by its event stream, others are polled

const followed = new Map(); // id -> {listener, after, status, pollUntil, asking}
let source = null;
let streamed = null;
let timer = 0;

/**
 * Report what happens to a job, until it ends: `listener.event(kind, data)` from its stream after event number `after`,
 * `state(job)` when it was asked for, `missing(error)` when the server knows no such job.
 */
export function follow(id, after, listener) {
  followed.set(id, { listener, after, status: "queued", pollUntil: 0, asking: false });
  pump();
}

export function unfollow(id) {
  followed.delete(id);
  if (streamed === id) closeStream();
  pump();
}

function closeStream() {
  source?.close();
  source = streamed = null;
}

function pump() {
  clearTimeout(timer);
  if (gone || !followed.size) {
    closeStream();
    return;
  }
  tune();
  for (const [id, job] of followed) if (id !== streamed) poll(id, job);
  timer = setTimeout(pump, document.hidden ? HIDDEN_POLL_MS : POLL_MS);
}

const me = randomHex(4);

/** A place for a stream, kept or new: the windows of a browser have six connections together. */
function place() {
  const now = Date.now();
  const free = [1, 2, 3, 4].find((n) => {
    const [who, until] = recall(`place${n}`, []);
    return who === me || !(until > now && until <= now + LEASE_MS);
  });
  if (free) keep(`place${free}`, [me, now + LEASE_MS]);
  return free;
}

/** Listen to the job that runs. */
function tune() {
  if (document.hidden || !place()) {
    closeStream();
    return;
  }
  if (streamed && followed.get(streamed)?.status === "running") return;
  const open = [...followed].filter(([, job]) => job.pollUntil < performance.now());
  const [id] = open.find(([, job]) => job.status === "running") ?? open[0] ?? [null];
  if (id === streamed) return;
  closeStream();
  if (id) listen(id, followed.get(id));
}

function listen(id, job) {
  const stream = new EventSource(`${jobPath(id)}events?after=${job.after}&previews=none`);
  [source, streamed] = [stream, id];
  for (const kind of KINDS) {
    on(stream, kind, (event) => {
      if (source !== stream) return;
      const data = JSON.parse(event.data);
      job.after = Number(event.lastEventId) || job.after;
      if (kind === "status") job.status = data.status;
      if (kind === "done") unfollow(id); // or the browser would ask for more
      job.listener.event(kind, data);
      if (kind === "status") pump();
    });
  }
  stream.onerror = () => {
    if (source !== stream) return;
    closeStream(); // the browser would hide that the server is gone
    job.pollUntil = performance.now() + RETRY_STREAM_MS;
    pump();
  };
}

async function poll(id, job) {
  if (job.asking) return;
  job.asking = true;
  try {
    const found = await askJob(id);
    if (followed.get(id) !== job) return;
    job.status = found.status;
    if (streamed !== id) {
      job.after = found.last_event_id ?? job.after;
      if (found.finished) unfollow(id);
      job.listener.state(found);
    }
  } catch (error) {
    if (followed.get(id) !== job) return;
    if (error.status === 404 || error.status === 410) {
      unfollow(id);
      job.listener.missing(error);
    }
  } finally {
    job.asking = false;
  }
}

on(document, "visibilitychange", () => {
  for (const job of followed.values()) if (!document.hidden) job.pollUntil = 0;
  pump();
});
on(window, "pagehide", closeStream);
on(window, "pageshow", (event) => event.persisted && pump());
