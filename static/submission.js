// How does a request become a job, and what is said when the server refuses it?

import { readEdits } from "./edits.js";
import { jobFrom, sent } from "./images.js";
import { addCard, joinGrid } from "./jobs.js";
import { ask } from "./server.js";
import { clearErrors, hasModel, isReady, readForm, showErrors } from "./settings.js";
import { $, announce, bus, loadModule, on, randomHex, setText } from "./ui.js";

let sending = false;
let retryTimer = 0;

/** Something that was refused; `again` sends it once more, by itself after `wait` seconds when that is given. */
export function showNotice(title, text, again, wait = 0) {
  clearInterval(retryTimer);
  $("notice").hidden = title === null;
  if (title === null) return;
  setText("notice-title", title);
  setText("notice-text", text);
  $("notice").scrollIntoView({ block: "center" });
  const button = $("notice-action");
  button.hidden = !again;
  const retry = () => { showNotice(null); again(); };
  button.onclick = retry;
  button.textContent = "Try again";
  if (!again || !wait) return;
  let left = wait;
  const tick = () => {
    button.textContent = `Send now (by itself in ${left} s)`;
    if (left-- <= 0) retry();
  };
  tick();
  retryTimer = setInterval(tick, 1000);
}

export function updateButton() {
  const { state } = $("model").dataset;
  $("generate").disabled = !isReady() || sending || state !== "READY";
  setText("generate-text", sending ? "Sending …"
    : state === "STARTING" ? "Waiting for the model …" : "Generate");
}

/** What the form and the panels ask for. */
export const currentRequest = () => ({ ...readForm(), ...readEdits() });

/** Send a job; the idempotency key makes sure that asking twice never generates twice. */
export async function submit({ model, ...given }, key = randomHex(16), grid = null) {
  const request = hasModel(model) ? { ...given, model } : given;
  if (sending || !isReady()) return null;
  sending = true;
  clearErrors();
  showNotice(null);
  updateButton();
  try {
    const made = await ask("text_to_image", request, { headers: { "Idempotency-Key": key } });
    const job = { ...jobFrom(made), created_at: new Date().toISOString() };
    sent.set(job.id, request);
    if (grid) joinGrid(job.id, grid);
    const card = addCard(job);
    announce("Generation has started.");
    loadModule("viewer", "viewer.css").catch(() => {}); // there when the first image is
    if (matchMedia("(max-width: 61.99rem)").matches) card.box.scrollIntoView({ block: "start" });
    else scrollTo({ top: 0 });
    return job;
  } catch (error) {
    refuse(error, () => submit(request, key, grid));
    return null;
  } finally {
    sending = false;
    updateButton();
  }
}

function refuse({ status, body, message, retryAfter }, again) {
  if (status === 422 && showErrors(body.errors ?? [])) return;
  if (status === 429) showNotice("The queue is full", message, again, retryAfter || 5);
  else if (status === 503) showNotice("Not ready yet", message, again, retryAfter || 3);
  else if (status === 0) {
    showNotice("This could not be sent", "The server does not answer. Nothing is lost: it can be sent again.", again);
  } else if (status === 401) bus.emit("locked");
  else showNotice("This was not accepted", message, again);
}

on($("composer"), "submit", (event) => {
  event.preventDefault();
  if (!$("generate").disabled) submit(currentRequest());
});
on($("notice-close"), "click", () => showNotice(null));
