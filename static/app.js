// What happens on the page? The beginning, the two views, sending, keys, and every state that the server can be in.

import { loadRecent, showGallery, startGallery } from "./gallery.js";
import { openedPanel, openPanel, readEdits, replaceEdits, startEdits } from "./edits.js";
import { addCard, cardOf, gridOf, jobFrom, joinGrid, rememberCards, rememberedJobs } from "./jobs.js";
import { moveFavourites, picture, picturesOf, requestOf, sent, stopPicking, undoDelete } from "./pictures.js";
import { loadVocabulary, look, setPrompt } from "./prompt.js";
import { ask, jobPath, send, watchPulse } from "./server.js";
import { clearErrors, fillForm, isReady, readForm, restoreForm, showErrors } from "./settings.js";
import { linkedSettings, receivePictures } from "./sharing.js";
import { $, COMMAND, announce, bus, dialogIsOpen, h, isWriting, loadStyle, randomHex, recall, setQuery, toast } from "./ui.js";

const LOADING_MS = 700;
const KEPT_CARDS = 3; // finished jobs that are still on the stage after a reload; the others are in the gallery
let sending = false;
let resumed = false;

// ---- what the server's state looks like

function model(state, text) {
  $("model").dataset.state = state;
  $("model-text").textContent = text;
}

function banner(title, text, { calm, action, act, key } = {}) {
  $("banner").hidden = title === null;
  $("banner").dataset.kind = calm ? "calm" : "trouble";
  $("banner-title").textContent = title ?? "";
  $("banner-text").textContent = text ?? "";
  $("banner-action").hidden = !action;
  $("banner-action").textContent = action ?? "";
  $("banner-action").onclick = act ?? null;
  $("key-form").hidden = !key;
}

let retryTimer = 0;

/** Something that was refused; `again` sends it once more, by itself after `wait` seconds when that is given. */
function notice(title, text, again, wait = 0) {
  clearInterval(retryTimer);
  $("notice").hidden = title === null;
  if (title === null) return;
  $("notice-title").textContent = title;
  $("notice-text").textContent = text;
  $("notice").scrollIntoView({ block: "center" });
  const button = $("notice-action");
  button.hidden = !again;
  button.onclick = () => { notice(null); again(); };
  button.textContent = "Try again";
  if (!again || !wait) return;
  let left = wait;
  const tick = () => {
    button.textContent = `Send now (by itself in ${left} s)`;
    if (left-- > 0) return;
    notice(null);
    again();
  };
  tick();
  retryTimer = setInterval(tick, 1000);
}

function updateButton() {
  $("generate").disabled = !isReady() || sending || $("model").dataset.state !== "READY";
  $("generate-text").textContent = sending ? "Sending …" : $("model").dataset.state === "STARTING" ? "Waiting for the model …" : "Generate";
}

// ---- sending

function restore(request, withSeed = true) {
  show("draw");
  restoreForm(request, withSeed);
  replaceEdits(request);
}

/** Something that needs an answer first; what goes wrong is said. */
async function attempt(act) {
  try {
    await act();
  } catch (error) {
    if (error.status !== 0) toast(error.message, { trouble: true });
  }
}

/** What looks at pictures comes when the first is opened. */
const lookCloser = async (name) => (await Promise.all([import(`./${name}.js`), loadStyle("viewer.css")]))[0];

const handlers = {
  open: (...given) => attempt(async () => (await lookCloser("viewer")).openViewer(handlers, ...given)),
  /** The settings of a job, or of one of its pictures, with more changes. */
  use: (job, index = null, changes = {}, panel = null) => attempt(async () => {
    restore({ ...await requestOf(job, index), ...changes });
    toast("Settings restored.");
    if (panel) await openPanel(panel, true);
    else $("prompt").focus();
  }),
  again: (job, otherSeed) => attempt(async () => {
    const request = await requestOf(job);
    show("draw");
    const { variation_seed, ...others } = { ...request, seed: otherSeed ? null : request.seed };
    await submit(otherSeed ? others : request);
  }),
  /** Lead from one picture to another. */
  blend: (one, other) => attempt(async () => {
    const changes = await (await import("./blend.js")).between(one, other);
    await handlers.use(one.job, one.index, changes, "blend");
  }),
  /** Go on from a step of a picture's drawing, with other words or another seed. */
  fork: (one, t, total) => attempt(async () => {
    const { latent } = await ask(`${jobPath(one.job.id)}latents/${one.index}?t=${t}`);
    await handlers.use(one.job, one.index, { latent, start_timestep: t / total, init_image: null, interpolate_to: null }, "photo");
    $("prompt").focus();
  }),
  trust: (one) => attempt(async () => about(await (await send(one.url)).blob())),
  who: (job) => attempt(async () => (await import("./population.js")).showPopulation([job].flat(), Array.isArray(job))),
  /** Start from one picture: change it, or only a part of it. */
  edit: (one, andPaint) => attempt(async () => {
    show("draw");
    await openPanel("photo");
    await (await import("./photo.js")).startFrom(one.url, andPaint);
    $("prompt").focus();
  }),
};

/** The same seeds for several descriptions, one job each, in one frame. */
async function drawGrid({ prompts, count }) {
  const { candidates, variation_strength, variation_seed, interpolate_to, ...asked } = whole(); // a column is a seed
  const rows = [asked.prompt, ...prompts];
  const seed = asked.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const name = randomHex(6);
  for (const prompt of rows) {
    const made = await submit({ ...asked, prompt, seed, n_images: count }, randomHex(16), name);
    if (!made) return;
  }
}

const whole = () => ({ ...readForm(), ...readEdits() });

/** Send a job; the key makes sure that asking twice never draws twice. */
async function submit(wanted, key = randomHex(16), grid = null) {
  if (sending || !isReady()) return null;
  sending = true;
  clearErrors();
  notice(null);
  updateButton();
  try {
    const made = await ask("text_to_image", wanted, { headers: { "Idempotency-Key": key } });
    const job = { ...jobFrom(made), created_at: new Date().toISOString() };
    sent.set(job.id, wanted);
    if (grid) joinGrid(job.id, grid);
    const card = addCard(job, handlers);
    announce("Drawing has begun.");
    lookCloser("viewer").catch(() => {}); // there when the first picture is
    if (matchMedia("(max-width: 61.99rem)").matches) card.box.scrollIntoView({ block: "start" });
    else scrollTo({ top: 0 });
    return job;
  } catch (error) {
    refuse(error, wanted, key, grid);
    return null;
  } finally {
    sending = false;
    updateButton();
  }
}

function refuse(error, wanted, key, grid) {
  const again = () => submit(wanted, key, grid);
  if (error.status === 422 && showErrors(error.body.errors ?? [])) return;
  if (error.status === 429) notice("The queue is full", error.message, again, error.retryAfter || 5);
  else if (error.status === 503) notice("Not ready yet", error.message, again, error.retryAfter || 3);
  else if (error.status === 0) notice("This could not be sent", "The server does not answer. Nothing is lost: it can be sent again.", again);
  else if (error.status === 401) begin();
  else notice("This was not accepted", error.message, again);
}

// ---- the two views

const viewOf = () => (new URLSearchParams(location.search).get("view") === "gallery" ? "gallery" : "draw");

function paint() {
  const view = viewOf();
  $("view-draw").hidden = view !== "draw";
  $("view-gallery").hidden = view !== "gallery";
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = view;
  showGallery(view === "gallery");
}

function show(view) {
  if (viewOf() === view) return;
  const query = new URLSearchParams(location.search);
  if (view === "gallery") query.set("view", "gallery");
  else query.delete("view");
  setQuery(query, "pushState");
  paint();
  scrollTo({ top: 0 });
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-view]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(link.dataset.view);
  if (link.dataset.view === "gallery" && !link.closest("nav")) $("gallery-title").focus();
});
addEventListener("popstate", paint);

// ---- the beginning

/** What the address and this browser remember: jobs that still run, what was looked at last, the settings of a link. */
async function resume() {
  const linked = linkedSettings();
  const query = new URLSearchParams(location.search);
  const wanted = query.get("job");
  const index = query.get("image");
  if (linked) restore(linked);
  const ids = [...new Set([...rememberedJobs(), wanted].filter(Boolean))];
  const found = await Promise.all(ids.map((id) => ask(`${jobPath(id)}?include=none`).then((body) => ({ id, body }), (error) => ({ id, error }))));
  if (found.some(({ error }) => error?.status === 0)) { // the server went away: all of this again when it is back
    resumed = false;
    return;
  }
  const finished = found.filter(({ body }) => body?.status === "succeeded").slice(-KEPT_CARDS).map(({ id }) => id);
  for (const { id, body } of found) {
    if (body && (!body.finished || id === wanted || finished.includes(id) || gridOf(id))) addCard(jobFrom(body), handlers, body);
  }
  rememberCards();
  const { error, body } = found.find(({ id }) => id === wanted) ?? {};
  if (error && linked) toast("This job is no longer kept here, but its settings are restored: Generate draws it again.");
  else if (error) notice(error.status === 410 ? "This job is no longer kept" : "This job is not known", error.message);
  else if (index !== null && body?.status === "succeeded" && Number(index) < body.parameters.n_images) {
    const { job } = cardOf(wanted);
    handlers.open(picture(job, Number(index)), picturesOf(job));
  }
  if (linked && body?.status === "succeeded") requestOf(jobFrom(body), index && Number(index)).then(replaceEdits, () => {}); // pictures too
  if (linked) history.replaceState(null, "", location.pathname + location.search);
  else look();
}

/** Wait until the model is there, then open the form. It runs again whenever the server comes back. */
async function begin() {
  let options;
  try {
    options = await ask("options");
  } catch (error) {
    if (error.status === 401) {
      model("GONE", "Locked");
      banner("A key is needed", "Open the address that the server printed when it started, or type its key.", { key: true });
    } else if (error.status) {
      model("GONE", "Trouble");
      banner("The server is in trouble", error.message, { action: "Try again", act: begin });
    }
    updateButton();
    return;
  }
  if (options.state === "READY") {
    const [first] = options.models;
    model("READY", `${first.name} · ${first.device}`);
    banner(null);
    startEdits(options);
    fillForm(options);
    if (!$("examples").childElementCount) drawExamples(options.examples);
    updateButton();
    if (!resumed) {
      resumed = true;
      moveFavourites().catch(() => {});
      await loadVocabulary();
      await resume();
    }
    await loadRecent();
    document.body.dataset.resumed = "";
  } else if (options.state === "FAILED") {
    model("FAILED", "No model");
    banner("The model could not be loaded", options.failure, { action: "Look again", act: begin });
    updateButton();
  } else if (options.state === "STOPPING") {
    model("GONE", "Stopping");
    banner("The server is being stopped", "What it accepted goes on after its next start.", { calm: true });
    updateButton();
    setTimeout(begin, 2 * LOADING_MS);
  } else {
    model("STARTING", "Loading the model …");
    banner("The model is being loaded", "This takes a few seconds. You can describe a face meanwhile.", { calm: true });
    updateButton();
    setTimeout(begin, LOADING_MS);
  }
}

function drawExamples(examples) {
  $("examples").replaceChildren(...examples.map((text) => h("button", {
    class: "example", text, click: () => { setPrompt(text); $("prompt").focus(); },
  })));
}

bus.on("lost", () => {
  model("GONE", "No server");
  banner("The server does not answer", "This page goes on by itself as soon as it is back. Nothing that was accepted is lost.");
  updateButton();
});
bus.on("back", () => {
  banner(null);
  toast("The server is back.");
  begin();
  if (viewOf() === "gallery") paint();
});

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await fetch(`session?${new URLSearchParams({ key: $("key").value })}`, { redirect: "manual", cache: "no-store" });
  } catch { /* what matters is whether the door is open now */ }
  $("key").value = "";
  begin();
});

// ---- keys and dialogs

const toggleHelp = () => attempt(async () => (await import("./help.js")).openHelp());

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !dialogIsOpen()) {
    event.preventDefault();
    if (!$("generate").disabled) submit(whole());
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !isWriting(event.target)) {
    if (undoDelete()) event.preventDefault();
  } else if (event.key === "Escape" && !dialogIsOpen()) {
    if (stopPicking()) event.preventDefault();
  } else if (!event.ctrlKey && !event.metaKey && !event.altKey && !isWriting(event.target) && !dialogIsOpen() && recall("keys", true)) {
    const gallery = viewOf() === "gallery";
    const keys = {
      "?": toggleHelp, g: () => show(gallery ? "draw" : "gallery"), "/": () => (gallery ? $("search") : $("prompt")).focus(),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("generate").disabled) submit(whole());
});
$("notice-close").addEventListener("click", () => notice(null));
$("help-open").addEventListener("click", toggleHelp);
$("generate").title = `${COMMAND} ↵`;

if ("serviceWorker" in navigator) navigator.serviceWorker.register("static/sw.js", { scope: "./" }).catch(() => {}); // the page works without

startGallery({ open: handlers.open, show: (job) => { show("draw"); showJob(job.id); }, who: handlers.who });
bus.on("compare", (pair) => attempt(async () => (await lookCloser("compare")).compare(pair, handlers)));
/** What is known of a picture that was brought here. */
async function about(file, found = null) {
  const known = found ?? await ask("inspect", file);
  const { showTrust } = await import("./trust.js");
  await showTrust(file, known, { restore: (request) => { restore(request); toast("Settings restored."); },
    start: async (given) => { show("draw"); await openPanel("photo"); (await import("./photo.js")).takePhoto(given); } });
}

receivePictures(async (file, found) => {
  if (openedPanel() === "photo" && viewOf() === "draw" && !found?.request) {
    (await import("./photo.js")).takePhoto(file);
  } else if (!found.request) {
    await about(file, found);
  } else {
    restore(found.request);
    toast(found.model_matches === false ? "Settings restored. Another model drew it, so the face will differ." : "Settings restored.", { action: "About it", act: () => about(file, found) });
  }
});
bus.on("grid", drawGrid);
watchPulse();
paint();
begin();

/** Bring a job of the gallery to the stage, wherever it stands. */
async function showJob(id) {
  try {
    const body = await ask(`${jobPath(id)}?include=none`);
    addCard(jobFrom(body), handlers, body).box.scrollIntoView({ block: "nearest" });
  } catch (error) {
    toast(`It could not be shown: ${error.message}`, { trouble: true });
  }
}
