// What happens on the page? One form, one job on the stage, and every state that it can be in.

import { watchPrompt } from "./prompt.js";
import { ask, follow, jobPath } from "./server.js";

const $ = (id) => document.getElementById(id);
const form = $("composer");
const REMEMBERED = "faces.job";
const PREVIEWS = 10; // how many updates a job should show, whatever its length: each costs a decoding
const COUNTS = [1, 2, 4, 8];
const START_QUALITY = 1;
const TITLE = document.title;

let fields = null; // limits and defaults, as /options tells them
let job = null; // the one on the stage: { id, parameters, stop, tiles, began }
const lookAtPrompt = watchPrompt($("prompt"), $("marks"), $("notes"));

// ---- small things

const show = (id, visible) => { $(id).hidden = !visible; };
const say = (text) => { $("live").textContent = text; };
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const isBusy = () => job !== null && job.stop !== null;

function remember(id) {
  try {
    if (id) localStorage.setItem(REMEMBERED, id);
    else localStorage.removeItem(REMEMBERED);
  } catch { /* storage may be forbidden; the address still holds the id */ }
  history.replaceState(null, "", id ? `?job=${encodeURIComponent(id)}` : location.pathname);
}

function remembered() {
  try {
    return new URLSearchParams(location.search).get("job") || localStorage.getItem(REMEMBERED);
  } catch {
    return new URLSearchParams(location.search).get("job");
  }
}

function notice(title, text, retry, calm) {
  $("notice").dataset.kind = calm ? "calm" : "trouble";
  $("notice-title").textContent = title;
  $("notice-text").textContent = text || "";
  show("notice", true);
  show("retry", Boolean(retry));
  $("retry").onclick = retry || null;
}

function model(state, text) {
  $("model").dataset.state = state;
  $("model-text").textContent = text;
}

function updateButton() {
  $("generate").disabled = fields === null || isBusy();
  $("generate-text").textContent = isBusy() ? "Drawing …" : "Generate";
}

// ---- the form

/** A row of radio buttons that looks like one switch. */
function segments(box, name, entries, chosen) {
  box.replaceChildren(...entries.map(([text, value]) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value });
    input.checked = value === chosen;
    label.append(input, Object.assign(document.createElement("span"), { textContent: text }));
    return label;
  }));
}

function choose(name, value) {
  for (const input of form.querySelectorAll(`input[name="${name}"]`)) input.checked = Number(input.value) === value;
}

function fillForm(found) {
  fields = found.fields;
  const counts = COUNTS.filter((count) => count >= fields.n_images.minimum && count <= fields.n_images.maximum);
  segments($("counts"), "n_images", counts.map((count) => [String(count), count]), fields.n_images.default);
  const steps = found.quality[START_QUALITY].steps;
  segments($("qualities"), "quality", found.quality.map((entry) => [entry.name, entry.steps]), steps);
  for (const name of ["n_inf_steps", "seed", "guidance_scale"]) {
    $(name).min = fields[name].minimum;
    $(name).max = fields[name].maximum;
  }
  $("n_inf_steps").value = steps;
  $("guidance_scale").value = fields.guidance_scale.default;
  $("prompt").maxLength = fields.prompt.max_length;
  $("negative_prompt").maxLength = fields.negative_prompt.max_length;
  $("sampler").replaceChildren(...found.samplers.map((name) => new Option(name, name)));
  $("sampler").value = fields.sampler.default;
  $("examples").replaceChildren(...found.examples.map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "chip", textContent: text });
    button.addEventListener("click", () => {
      $("prompt").value = text;
      $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
      $("prompt").focus();
    });
    return button;
  }));
  refreshForm();
}

/** What follows from other fields: the counter, the guidance number, which quality the steps are. */
function refreshForm() {
  if (!fields) return;
  $("counter").textContent = `${$("prompt").value.length} / ${fields.prompt.max_length}`;
  $("guidance-value").textContent = Number($("guidance_scale").value).toFixed(1);
  choose("quality", Number($("n_inf_steps").value));
}

function readForm() {
  const number = (id) => ($(id).value.trim() === "" ? null : Number($(id).value));
  const steps = number("n_inf_steps");
  return {
    prompt: $("prompt").value.trim(),
    n_images: Number(form.elements.n_images.value) || fields.n_images.default,
    n_inf_steps: steps,
    stream_freq: Math.max(1, Math.round(steps / PREVIEWS)),
    seed: number("seed"),
    guidance_scale: number("guidance_scale"),
    sampler: $("sampler").value,
    negative_prompt: $("negative_prompt").value.trim(),
  };
}

/** Put a job's parameters back into the form; the seed only when `withSeed`, or the next job would repeat it unasked. */
function restoreForm(parameters, withSeed) {
  $("prompt").value = parameters.prompt;
  $("negative_prompt").value = parameters.negative_prompt;
  $("n_inf_steps").value = parameters.n_inf_steps;
  $("guidance_scale").value = parameters.guidance_scale;
  $("sampler").value = parameters.sampler;
  if (withSeed) $("seed").value = parameters.seed;
  choose("n_images", COUNTS.filter((count) => count <= parameters.n_images).pop());
  refreshForm();
  lookAtPrompt();
}

function clearFieldErrors() {
  for (const box of form.querySelectorAll(".field-error")) box.hidden = true;
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

/** Show what the server said about single fields beside them. False when some of it has no place in the form. */
function showFieldErrors(errors) {
  let placed = 0;
  for (const { pointer, message } of errors) {
    const name = pointer.replace("#/", "");
    const box = $(`${name}-error`);
    if (!box) continue;
    placed += 1;
    box.textContent = `${message[0].toUpperCase()}${message.slice(1)}.`;
    box.hidden = false;
    const input = $(name);
    if (input) {
      input.setAttribute("aria-invalid", "true");
      if (input.closest("details")) $("more").open = true;
      if (placed === 1) input.focus();
    }
  }
  return placed === errors.length;
}

// ---- the stage

function showTiles(parameters) {
  const template = $("tile").content;
  const tiles = Array.from({ length: parameters.n_images }, () => template.cloneNode(true).firstElementChild);
  $("tiles").replaceChildren(...tiles);
  $("tiles").dataset.count = tiles.length;
  show("tiles", true);
  show("empty", false);
  const asked = document.createElement("b");
  asked.textContent = parameters.prompt || "No words: any face";
  const details = [plural(parameters.n_inf_steps, "step"), parameters.sampler, `guidance ${parameters.guidance_scale}`];
  if (parameters.negative_prompt) details.push(`without ${parameters.negative_prompt}`);
  $("asked").replaceChildren(asked, ` · ${details.join(" · ")}`);
  show("asked", true);
  return tiles;
}

function showPicture({ index, seed, t, total_t: total, img, url }, final) {
  const tile = job.tiles[index];
  if (!tile) return;
  const picture = tile.querySelector("img");
  picture.src = final ? url.replace(/^\//, "") : `data:image/png;base64,${img}`;
  picture.alt = `Face ${index + 1} of ${job.tiles.length}: ${job.parameters.prompt || "any"}${final ? "" : ", still being drawn"}`;
  picture.hidden = false;
  tile.querySelector(".step").textContent = final ? "" : `${t}/${total}`;
  if (!final) return;
  const link = tile.querySelector("a");
  link.href = picture.src;
  link.download = `face-${seed}.png`;
  link.setAttribute("aria-label", `Download face ${index + 1}`);
  const reuse = tile.querySelector("button");
  reuse.textContent = `Seed ${seed}`;
  reuse.title = "Use this seed again";
  reuse.setAttribute("aria-label", `Use seed ${seed} again`);
  reuse.onclick = () => {
    $("seed").value = seed;
    $("more").open = true;
    say(`Seed ${seed} will be used.`);
  };
  tile.querySelector(".tools").hidden = false;
}

function timeLeft(t, total) {
  const now = performance.now();
  if (!job.began) {
    job.began = { t, now };
    return "";
  }
  if (t - job.began.t < 2) return "";
  const seconds = ((now - job.began.now) / (t - job.began.t) / 1000) * (total - t);
  if (seconds < 1) return "";
  return seconds < 90 ? ` · about ${Math.ceil(seconds)} s left` : ` · about ${Math.ceil(seconds / 60)} min left`;
}

function showStatus({ status, queue_position: position }) {
  $("tiles").dataset.state = status;
  if (status === "queued") $("status").textContent = position > 1 ? `Waiting: number ${position} in the queue` : "Next in the queue";
  if (status === "running" && !job.began) $("status").textContent = "Starting …";
}

function showProgress({ t, total_t: total }) {
  $("progress").value = total ? t / total : 0;
  $("status").textContent = `Step ${t} of ${total}${timeLeft(t, total)}`;
  document.title = `${Math.round((100 * t) / total)} % · ${TITLE}`;
}

function finish(status, error) {
  job.stop = null;
  $("tiles").dataset.state = status;
  document.title = TITLE;
  show("running", false);
  if (status === "succeeded") {
    say(`${plural(job.tiles.length, "face")} finished.`);
  } else {
    for (const tile of job.tiles) tile.querySelector(".step").textContent = "";
    if (!$("tiles").querySelector("img:not([hidden])")) show("tiles", false);
    if (status === "cancelled") {
      const some = $("tiles").hidden ? "Nothing had appeared yet." : "What had appeared by then stays here.";
      notice("Cancelled", some, generate, true);
    } else notice("This job failed", `${error.message} ${error.hint}`, generate);
  }
  updateButton();
}

/** Put a job on the stage and keep up with it. */
function watch(id, parameters, after) {
  job = { id, parameters, stop: null, tiles: showTiles(parameters), began: null };
  $("tiles").dataset.state = "queued";
  $("progress").value = 0;
  $("cancel").disabled = false;
  show("running", true);
  job.stop = follow(id, after, {
    status: (data) => { show("notice", false); showStatus(data); },
    progress: showProgress,
    preview: (data) => showPicture(data, false),
    image: (data) => showPicture(data, true),
    done: ({ status, error }) => finish(status, error),
    lost: () => notice("The server does not answer", "This page goes on by itself as soon as it is back."),
    failed: (error) => { job.stop = null; show("running", false); forget(error); },
  });
  updateButton();
}

function forget(error) {
  remember(null);
  document.title = TITLE;
  $("tiles").dataset.state = "gone";
  notice(error.status === 410 ? "This job is no longer kept" : "This job is not known", error.message);
  if (!$("tiles").querySelector("img:not([hidden])")) {
    show("tiles", false);
    show("asked", false);
    show("empty", true);
  }
  updateButton();
}

async function generate() {
  if (!fields || isBusy()) return;
  clearFieldErrors();
  show("notice", false);
  $("generate").disabled = true;
  try {
    const made = await ask("text_to_image", readForm());
    remember(made.job_id);
    watch(made.job_id, made.parameters, 0);
    say("Drawing has begun.");
    if (matchMedia("(max-width: 59.99rem)").matches) $("stage").scrollIntoView({ block: "start" });
  } catch (error) {
    if (error.status !== 422 || !showFieldErrors(error.body.errors || [])) {
      const titles = { 0: "The server does not answer", 401: "A key is needed", 429: "The queue is full", 503: "Not ready yet" };
      const wait = error.retryAfter ? ` Try again in about ${plural(error.retryAfter, "second")}.` : "";
      notice(titles[error.status] || "This was not accepted", error.message + wait, generate);
    }
    updateButton();
  }
}

async function cancel() {
  $("cancel").disabled = true;
  try {
    await ask(`${jobPath(job.id)}cancel`, {});
  } catch (error) {
    $("cancel").disabled = false;
    notice("Could not cancel", error.message);
  }
}

// ---- the beginning

/** Show the job of the address, or the last one of this browser, wherever it stands. */
async function resume() {
  const id = remembered();
  if (!id) return;
  try {
    const found = await ask(`${jobPath(id)}?include=preview`);
    remember(id);
    restoreForm(found.parameters, false);
    if (!found.finished) {
      watch(id, found.parameters, found.last_event_id);
      showStatus(found);
      for (const entry of found.response) showPicture(entry, false);
      return;
    }
    job = { id, parameters: found.parameters, stop: null, tiles: showTiles(found.parameters), began: null };
    for (const entry of found.response) showPicture(entry, found.status === "succeeded");
    finish(found.status, found.error);
  } catch (error) {
    if (error.status === 404 || error.status === 410) {
      if (new URLSearchParams(location.search).has("job")) forget(error);
      else remember(null); // nobody asked for it: no reason to complain
    }
  }
}

/** Wait until the model is there, then open the form. */
async function begin() {
  try {
    const found = await ask("options");
    if (found.state === "READY") {
      const [first] = found.models;
      model("READY", `${first.name} · ${first.device}`);
      show("notice", false);
      fillForm(found);
      updateButton();
      await resume();
      if (!job) lookAtPrompt();
      return;
    }
    if (found.state === "FAILED") {
      model("FAILED", "No model");
      notice("The model could not be loaded", found.failure, begin);
      return;
    }
    model("STARTING", "Loading the model …");
    setTimeout(begin, 700);
  } catch (error) {
    model("GONE", "No server");
    if (error.status === 401) {
      notice("A key is needed", "Open the address that the server printed when it started: it holds the key.", begin);
    } else {
      notice("The server does not answer", "This page goes on by itself as soon as it is back.", begin);
      setTimeout(begin, 3000);
    }
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
form.addEventListener("input", (event) => {
  if (event.target.name === "quality") $("n_inf_steps").value = event.target.value;
  refreshForm();
});
$("dice").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
$("cancel").addEventListener("click", cancel);
$("shortcut").textContent = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
begin();
