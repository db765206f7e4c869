// Which of the server's models generates? Its menu, what state it is in, and that the controls follow it.

import { ask } from "./server.js";
import { fillForm } from "./settings.js";
import { $, announce, bus, complain, h, on, quiet, setText } from "./ui.js";

const foot = document.querySelector(".foot p");
const ours = foot.textContent;
const note = quiet("", { id: "model-note" });
const select = h("select", {
  id: "model-choice", name: "model", "aria-describedby": "model-note", change: () => chooseModel(select.value) });
const broken = h("div");
const label = h("label", { for: select.id, text: "Model" });
const field = h("div.field", { id: "model-field" }, label, select, note, broken);

let options = null; // of the chosen model
let loading = null; // the model that is being loaded for a job of this page
let turn = 0; // answers to older choices are dropped

/** What the server says of a model now. */
async function optionsOf(name) {
  const found = await ask(`options?${new URLSearchParams({ model: name })}`);
  return { ...found, model: found.models.find((one) => one.name === name) };
}

function stateOf({ name, failure, loaded, image_size: size }) {
  if ((loading ?? options.loading) === name) return `Loading ${name} …`;
  if (failure) return `${name} failed: ${failure}`;
  return `${size} × ${size} pixels.${loaded ? "" : " It is loaded when its first image is generated."}`;
}

function show() {
  const { model } = options;
  note.textContent = stateOf(model);
  select.value = model.name;
  setText("model-text", `${model.name} · ${model.device}`);
  foot.textContent = model.kind === "faces" ? ours
    : `Nobody shown here exists. ${model.name}, a model of other people, generates these images on this machine: its `
      + "licence says what they may be used for. Not for passing off as real people.";
}

/** Ask again what state the chosen model is in. */
async function refresh() {
  const [{ name }, mine] = [options.model, turn];
  const found = await optionsOf(name).catch(() => null); // the banner says why
  if (!found?.model || mine !== turn) return;
  options = found;
  show();
}

/** Generate with a model from now on, where there is one of this name. */
export async function chooseModel(name) {
  if (name === options.model.name || !options.models.some((one) => one.name === name)) return;
  const mine = ++turn;
  try {
    const found = await optionsOf(name);
    if (mine !== turn) return;
    options = found;
    show();
    announce(note.textContent); // that it is loaded, or failed, the card of its job says
    fillForm(options);
  } catch (error) {
    select.value = options.model.name;
    if (error.status) complain(`${name} could not be chosen`, error);
  }
}

/** Put the menu into the form; gives what is so of the model that is chosen in it. */
export async function startModels(given, wanted) {
  turn += 1;
  options = given;
  const { models, failed_models: failed } = given;
  select.replaceChildren(...models.map(({ name }) => new Option(name, name)),
    ...failed.map(({ name }) => h("option", { value: name, disabled: true, text: `${name} (failed)` })));
  broken.replaceChildren(...failed.map(({ name, failure }) => quiet(`${name} failed: ${failure}`)));
  $("counts").closest(".field").before(field);
  if (wanted !== given.model.name && models.some((one) => one.name === wanted)) options = await optionsOf(wanted);
  show();
  return options;
}

bus.on("loading", (name) => { loading = name; show(); });
bus.on("progress", () => { if (loading) { loading = null; refresh(); } });
bus.on("finished", refresh);
on(select, "focus", refresh);
