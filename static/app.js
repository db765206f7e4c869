// What happens when the page opens, in every state of the server? And the page's keys. docs/page.md maps all modules.

import { about, actions, attempt, photoPanel, restore } from "./actions.js";
import { modelOf, openedPanel, replaceEdits } from "./edits.js";
import { loadRecent, startGallery } from "./gallery.js";
import { imageOf, imagesOf, jobFrom, moveFavourites, requestOf, stopPicking, undoDelete } from "./images.js";
import { addCard, cardOf, gridOf, rememberCards, rememberedJobs, startCards } from "./jobs.js";
import { loadVocabulary, setPrompt, updateAnalysis } from "./prompt.js";
import { ask, askJob, watchPulse } from "./server.js";
import { fillForm } from "./settings.js";
import { linkedSettings, receiveImages } from "./sharing.js";
import { showNotice, updateButton } from "./submission.js";
import {
  $, COMMAND, bus, dialogIsOpen, h, isCommand, isWriting, loadModule, on, recall, setText, toast,
} from "./ui.js";
import { currentView, goTo, updateView } from "./views.js";

const LOADING_MS = 700;
const KEPT_CARDS = 3; // finished jobs that are still on the stage after a reload; the others are in the gallery
let resumed = false;

// ---- what the server's state looks like

function showModel(state, text) {
  $("model").dataset.state = state;
  setText("model-text", text);
}

function banner(title, text, { calm, action, act, key } = {}) {
  $("banner").hidden = title === null;
  $("banner").dataset.kind = calm ? "calm" : "trouble";
  setText("banner-title", title ?? "");
  setText("banner-text", text ?? "");
  $("banner-action").hidden = !action;
  setText("banner-action", action ?? "");
  $("banner-action").onclick = act ?? null;
  $("key-form").hidden = !key;
}

let waits = ""; // why jobs wait

function tellWait(text = "") {
  if (text) banner("Jobs wait", text, { calm: true });
  else if (waits) banner(null);
  waits = text;
}

bus.on("pulse", (told) => tellWait(told.notice));

// ---- the beginning

/** What the address and this browser remember: jobs that still run, what was opened last, the settings of a link. */
async function resume() {
  const linked = linkedSettings();
  const query = new URLSearchParams(location.search);
  const wanted = query.get("job");
  const index = query.get("image");
  if (linked) await restore(linked);
  const ids = [...new Set([...rememberedJobs(), wanted].filter(Boolean))];
  const found = await Promise.all(ids.map((id) => (
    askJob(id).then((body) => ({ id, body }), (error) => ({ id, error })))));
  if (found.some(({ error }) => error?.status === 0)) { // the server went away: all of this again when it is back
    resumed = false;
    return;
  }
  const finished = found.filter(({ body }) => body?.status === "succeeded").slice(-KEPT_CARDS).map(({ id }) => id);
  for (const { id, body } of found) {
    if (body && (!body.finished || id === wanted || finished.includes(id) || gridOf(id))) addCard(jobFrom(body), body);
  }
  rememberCards();
  const { error, body } = found.find(({ id }) => id === wanted) ?? {};
  if (error && linked) {
    toast("This job is no longer kept here, but its settings are restored: Generate makes it again.");
  } else if (error) {
    showNotice(error.status === 410 ? "This job is no longer kept" : "This job is not known", error.message);
  } else if (index !== null && body?.status === "succeeded" && Number(index) < body.parameters.n_images) {
    const { job } = cardOf(wanted);
    actions.open(imageOf(job, Number(index)), imagesOf(job));
  }
  if (linked && body?.status === "succeeded") { // with the images that it began with
    requestOf(jobFrom(body), index && Number(index)).then(replaceEdits, () => {});
  }
  if (linked) history.replaceState(null, "", location.pathname + location.search);
  else updateAnalysis();
}

/** Where there are several models, what is so of the one that was chosen: the others need no menu. */
async function ofChosenModel(options) {
  [options.model] = options.models;
  if (options.models.length + options.failed_models.length < 2) return options;
  try {
    const { startModels } = await loadModule("models");
    return await startModels(options, linkedSettings()?.model ?? recall("form")?.model);
  } catch {
    return options; // the first one generates
  }
}

/** Wait until the model is there, then open the form. It runs again whenever the server comes back. */
async function begin() {
  let options;
  try {
    options = await ask("options");
  } catch (error) {
    if (error.status === 401) {
      showModel("GONE", "Locked");
      banner("A key is needed", "Open the address that the server printed when it started, or type its key.",
        { key: true });
    } else if (error.status) {
      showModel("GONE", "Trouble");
      banner("The server is in trouble", error.message, { action: "Try again", act: begin });
    }
    updateButton();
    return;
  }
  const { state } = options;
  if (state === "READY") {
    options = await ofChosenModel(options);
    showModel("READY", `${options.model.name} · ${options.model.device}`);
    banner(null);
    tellWait(options.notice);
    fillForm(options);
    if (!$("examples").childElementCount) showExamples(options.examples);
    updateButton();
    if (!resumed) {
      resumed = true;
      moveFavourites().catch(() => {});
      await loadVocabulary();
      await resume();
    }
    await loadRecent();
    document.body.dataset.resumed = "";
    return;
  }
  if (state === "FAILED") {
    showModel("FAILED", "No model");
    banner("The model could not be loaded", options.failure, { action: "Look again", act: begin });
  } else if (state === "STOPPING") {
    showModel("GONE", "Stopping");
    banner("The server is being stopped", "What it accepted goes on after its next start.", { calm: true });
  } else {
    showModel("STARTING", "Loading the model …");
    banner("The model is being loaded", "This takes a few seconds. You can describe a face meanwhile.", { calm: true });
  }
  updateButton();
  if (state !== "FAILED") setTimeout(begin, LOADING_MS);
}

function showExamples(examples) {
  $("examples").replaceChildren(...examples.map((text) => (
    h("button.example", { text, click: () => { setPrompt(text); $("prompt").focus(); } }))));
}

bus.on("locked", begin);
bus.on("lost", () => {
  showModel("GONE", "No server");
  banner("The server does not answer",
    "This page goes on by itself as soon as it is back. Nothing that was accepted is lost.");
  updateButton();
});
bus.on("back", () => {
  banner(null);
  toast("The server is back.");
  begin();
  if (currentView() === "gallery") updateView();
});

on($("key-form"), "submit", async (event) => {
  event.preventDefault();
  try {
    await fetch(`session?${new URLSearchParams({ key: $("key").value })}`, { redirect: "manual", cache: "no-store" });
  } catch { /* what matters is whether the server answers now */ }
  $("key").value = "";
  begin();
});

// ---- keys

const toggleHelp = () => attempt(async () => (await loadModule("help", "editing.css")).openHelp());

on(document, "keydown", (event) => {
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && command && !dialogIsOpen()) {
    event.preventDefault();
    $("composer").requestSubmit();
  } else if (event.key === "z" && command && !event.shiftKey && !isWriting(event.target)) {
    if (undoDelete()) event.preventDefault();
  } else if (event.key === "Escape" && !dialogIsOpen()) {
    if (stopPicking()) event.preventDefault();
  } else if (!isCommand(event) && !isWriting(event.target) && !dialogIsOpen() && recall("keys", true)) {
    const gallery = currentView() === "gallery";
    const act = {
      "?": toggleHelp,
      "/": () => (gallery ? $("search") : $("prompt")).focus(),
      g: () => goTo(gallery ? "generate" : "gallery"),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }
});
on($("help-open"), "click", toggleHelp);
$("generate").title = `${COMMAND} ↵`;

// ---- wiring

if ("serviceWorker" in navigator) { // the page works without
  navigator.serviceWorker.register("static/sw.js", { scope: "./" }).catch(() => {});
}
startCards(actions);
startGallery(actions);
bus.on("compare", actions.compare);

receiveImages(async (file, found) => {
  if (openedPanel() === "photo" && currentView() === "generate" && !found?.request) {
    (await photoPanel()).takePhoto(file);
  } else if (!found.request) {
    await about(file, found);
  } else {
    await restore({ model: modelOf(found.model_hash), ...found.request });
    const other = found.model_matches === false ? " Another model generated it, so the face will differ." : "";
    toast(`Settings restored.${other}`, { action: "About it", act: () => about(file, found) });
  }
});
watchPulse();
updateView();
begin();
