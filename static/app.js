// What happens on the page? The beginning, the two views, sending, keys, and every state that the server can be in.

import "./compare.js";
import { loadRecent, showGallery, startGallery } from "./gallery.js";
import { addCard, cardOf, jobFrom, rememberCards, rememberedJobs } from "./jobs.js";
import { picture, picturesOf, stopPicking, undoDelete } from "./pictures.js";
import { loadVocabulary, look, setPrompt } from "./prompt.js";
import { ask, jobPath, watchPulse } from "./server.js";
import { clearErrors, fillForm, isReady, readForm, restoreForm, showErrors } from "./settings.js";
import { linkedSettings, receivePictures } from "./sharing.js";
import { $, announce, bus, closable, dialogIsOpen, h, isWriting, keep, openDialog, randomHex, recall, segments, setQuery, toast } from "./ui.js";
import { openViewer, startViewer } from "./viewer.js";

const LOADING_MS = 700;
const KEPT_CARDS = 3; // finished jobs that are still on the stage after a reload; the others are in the gallery
const isMac = /Mac|iP(hone|ad)/.test(navigator.platform);
const COMMAND = isMac ? "⌘" : "Ctrl";
const KEYS = [[`${COMMAND} ↵`, "Generate"], ["Esc", "Close what is open"], ["/", "To the description, or to the search"], ["g", "Gallery and back"],
  ["?", "This sheet"], [`${COMMAND} Z`, "Undo a deletion"], ["← → ↑ ↓", "Between pictures"], ["f", "Favourite"], ["+ − 0", "Zoom"],
  ["Space", "Play the drawing"], ["d", "Download"], ["l", "Copy a link"], ["c", "Compare"], ["Del", "Delete"]];

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

const handlers = {
  open: openViewer,
  use(parameters, withSeed) {
    show("draw");
    restoreForm(parameters, withSeed);
    toast("Settings restored.");
    $("prompt").focus();
  },
  again(parameters, otherSeed) {
    show("draw");
    const { prompt, n_images, n_inf_steps, stream_freq, guidance_scale, negative_prompt, sampler, seed } = parameters;
    submit({ prompt, n_images, n_inf_steps, stream_freq, guidance_scale, negative_prompt, sampler, seed: otherSeed ? null : seed });
  },
};

/** Send a job; the key makes sure that asking twice never draws twice. */
async function submit(wanted, key = randomHex(16)) {
  if (sending || !isReady()) return;
  sending = true;
  clearErrors();
  notice(null);
  updateButton();
  try {
    const made = await ask("text_to_image", wanted, { headers: { "Idempotency-Key": key } });
    const job = { ...jobFrom(made), created_at: new Date().toISOString() };
    const card = addCard(job, handlers);
    announce("Drawing has begun.");
    if (matchMedia("(max-width: 61.99rem)").matches) card.box.scrollIntoView({ block: "start" });
    else scrollTo({ top: 0 });
  } catch (error) {
    refuse(error, wanted, key);
  } finally {
    sending = false;
    updateButton();
  }
}

function refuse(error, wanted, key) {
  const again = () => submit(wanted, key);
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
  if (linked) restoreForm(linked, true);
  const ids = [...new Set([...rememberedJobs(), wanted].filter(Boolean))];
  const found = await Promise.all(ids.map((id) => ask(`${jobPath(id)}?include=preview`).then((body) => ({ id, body }), (error) => ({ id, error }))));
  if (found.some(({ error }) => error?.status === 0)) { // the server went away: all of this again when it is back
    resumed = false;
    return;
  }
  const finished = found.filter(({ body }) => body?.status === "succeeded").slice(-KEPT_CARDS).map(({ id }) => id);
  for (const { id, body } of found) {
    if (body && (!body.finished || id === wanted || finished.includes(id))) addCard(jobFrom(body), handlers, body);
  }
  rememberCards();
  const { error, body } = found.find(({ id }) => id === wanted) ?? {};
  if (error && linked) toast("This job is no longer kept here, but its settings are restored: Generate draws it again.");
  else if (error) notice(error.status === 410 ? "This job is no longer kept" : "This job is not known", error.message);
  else if (index !== null && body?.status === "succeeded" && Number(index) < body.parameters.n_images) {
    const { job } = cardOf(wanted);
    openViewer(picture(job, Number(index)), picturesOf(job));
  }
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
    fillForm(options);
    if (!$("examples").childElementCount) drawExamples(options.examples);
    updateButton();
    if (!resumed) {
      resumed = true;
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

function toggleHelp() {
  if (!$("help").open) openDialog($("help"));
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !dialogIsOpen()) {
    event.preventDefault();
    if (!$("generate").disabled) submit(readForm());
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
  if (!$("generate").disabled) submit(readForm());
});
$("notice-close").addEventListener("click", () => notice(null));
$("help-open").addEventListener("click", toggleHelp);
closable($("help"), $("help-close"));
$("keys").replaceChildren(...KEYS.flatMap(([key, text]) => [h("dt", {}, h("kbd", { text: key })), h("dd", { text })]));
$("single-keys").checked = recall("keys", true);
$("single-keys").addEventListener("change", () => keep("keys", $("single-keys").checked));
segments($("themes"), "theme", [["System", ""], ["Light", "light"], ["Dark", "dark"]], recall("theme", "") ?? "", (value) => {
  keep("theme", value || null);
  dispatchEvent(new Event("theme"));
});
$("generate").title = `${COMMAND} ↵`;

if ("serviceWorker" in navigator) navigator.serviceWorker.register("static/sw.js", { scope: "./" }).catch(() => {}); // the page works without

startGallery({ open: openViewer, show: (job) => { show("draw"); showJob(job.id); } });
startViewer(handlers);
receivePictures((settings, message) => {
  show("draw");
  restoreForm(settings, true);
  toast(message);
});
watchPulse();
paint();
begin();

/** Bring a job of the gallery to the stage, wherever it stands. */
async function showJob(id) {
  try {
    const body = await ask(`${jobPath(id)}?include=preview`);
    addCard(jobFrom(body), handlers, body).box.scrollIntoView({ block: "nearest" });
  } catch (error) {
    toast(`It could not be shown: ${error.message}`, { trouble: true });
  }
}
