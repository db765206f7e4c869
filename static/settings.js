// What is to be generated, and how? The form, with the server's limits and defaults, and how long it will take.

import { readEdits, showEditError, startEdits } from "./edits.js";
import { updateAnalysis, setPrompt, useVocabulary } from "./prompt.js";
import { ask } from "./server.js";
import { $, bus, choose, h, keep, on, randomSeed, recall, seconds, segments, setText } from "./ui.js";

const PREVIEWS = 10; // updates that a job keeps when nobody says otherwise, whatever its length
const PREVIEW_S = 0.3; // and how long nothing new is shown
const SPEED_MS = 5000; // how old that may be while somebody writes
const NUMBERS = ["n_inf_steps", "guidance_scale", "stream_freq"];

const form = $("composer");
let fields = null; // as /options tells them
let model = null; // the chosen one
let quality = [];
let curve = []; // what steps buy, where it was measured
let lastSeed = null;

export const isReady = () => fields !== null;
export const hasModel = (name) => Boolean(fields?.model.choices.includes(name));

// ---- how long does it take here?

let speed = { step_costs: [], ahead: [] }; // as /speed tells
let asked = 0;

/** Passes of the network a step and image: two where guidance was not taught to one; each slider takes two more. */
export function passesOf({ guidance_scale: scale, negative_prompt: away, attributes } = readForm()) {
  const [low, high] = (!away && fields?.guidance_scale.one_pass) || [1, 1];
  return ((low <= scale && scale <= high) || scale === 0 ? 1 : 2) + 2 * Object.keys(attributes ?? {}).length;
}

const rowsOf = (parameters) => (parameters.candidates ?? parameters.n_images) * passesOf(parameters);

/** The share of the steps that is done: the rest is skipped where something is there to begin with. */
const doneShare = ({ start_timestep: start, init_image: image, strength, mask }) => (
  image ? strength ?? (mask ? 1 : 0.6) : 1 - (start ?? 0));

/** Ask what a step costs here, and what is to be done first. */
async function measure() {
  asked = Date.now();
  try {
    speed = await ask("speed");
  } catch { /* the banner says why */ }
  showExpected();
}
bus.on("finished", measure);
bus.on("cards", () => fields && measure());

/** Seconds of a step with so many rows, by the nearest that were measured. */
function cost(rows) {
  const points = [...speed.step_costs].sort((a, b) => Math.abs(a.rows - rows) - Math.abs(b.rows - rows));
  const [near, other] = points;
  if (near.rows === rows) return near.seconds;
  const slope = other ? Math.max(0, (other.seconds - near.seconds) / (other.rows - near.rows))
    : (0.85 * near.seconds) / near.rows;
  return Math.max(near.seconds + slope * (rows - near.rows), near.seconds * Math.min(1, rows / near.rows));
}

/** What steps cost is measured of the first model alone. */
const isTimed = () => model.name === fields.model.default && !readEdits().refine;

/** Seconds of a job like this, or null before the first; others make the steps that both do dearer. */
function expectedSeconds(parameters) {
  if (!speed.step_costs.length || !isTimed()) return null;
  const { n_inf_steps: steps, candidates, n_images: count } = parameters;
  const rows = rowsOf(parameters);
  return speed.ahead.reduce((sum, one) => sum + Math.min(one.steps, steps) * (cost(rows + one.rows) - cost(rows)),
    steps * cost(rows) + speed.seconds_per_picture * (candidates ?? count));
}

function showExpected() {
  if (!fields) return;
  const wanted = readForm();
  const edits = readEdits();
  const here = { ...edits, ...wanted, guidance_scale: wanted.guidance_scale ?? fields.guidance_scale.default };
  const expectedFor = (steps) => expectedSeconds({ ...here, n_inf_steps: doneShare(edits) * steps });
  for (const { value, parentElement } of $("qualities").querySelectorAll("input")) {
    const expected = expectedFor(value);
    const note = expected === null ? `${value} steps` : `${value} · ≈ ${seconds(expected)}`;
    parentElement.querySelector("small").textContent = note;
  }
  const expected = wanted.n_inf_steps > 0 ? expectedFor(wanted.n_inf_steps) : null;
  setText("generate-note", expected === null ? "" : `≈ ${seconds(expected)}`);
  setText("expected", (!isTimed() ? "" : expected === null ? "Its time is measured with the first images."
    : `About ${seconds(expected)} on this machine.`) + (wanted.sampler ? "" : worth(wanted.n_inf_steps)));
}

/** What more steps would buy, by those that were measured. */
function worth(steps) {
  if (!curve.length || !(steps > 0)) return "";
  const here = curve.findLast((point) => point.steps <= steps) ?? curve[0];
  const [best] = curve.filter((point) => point.steps >= here.steps)
    .sort((p, q) => p.frechet_over_floor - q.frechet_over_floor);
  const worse = Math.round(100 * (here.frechet_over_floor / best.frechet_over_floor - 1));
  return worse < 3 ? " More steps come no nearer to real faces."
    : ` Images ${worse} % further from real faces than with ${best.steps} steps.`;
}

// ---- the form

const usualSteps = () => (quality.find((entry) => entry.default) ?? quality[0]).steps;

/** Fill in what the chosen model can do and allows; what was typed here before comes back, or stays. */
export function fillForm(options) {
  const before = model?.name;
  const typed = before && readForm();
  if (before) for (const [name, usual] of [["guidance_scale", fields.guidance_scale.default],
    ["n_inf_steps", usualSteps()]]) if (typed[name] === usual) delete typed[name]; // the other model's
  startEdits(options);
  ({ fields, quality, model, step_curve: curve } = options);
  fields.few = options.few_steps;
  useVocabulary(!model.lacks.includes("vocabulary"));
  measure();
  if (before === model.name) return;
  const { minimum, maximum } = fields.n_images;
  const counts = Array.from({ length: maximum - minimum + 1 }, (_, number) => minimum + number);
  segments($("counts"), "n_images", counts.map((count) => [String(count), count]), fields.n_images.default);
  segments($("qualities"), "quality", quality.map((entry) => [entry.name, entry.steps, `${entry.steps} steps`]));
  for (const name of NUMBERS) {
    $(name).min = fields[name].minimum;
    $(name).max = fields[name].maximum;
  }
  $("prompt").maxLength = fields.prompt.max_length;
  $("negative_prompt").maxLength = fields.negative_prompt.max_length;
  $("sampler").replaceChildren(new Option("Automatic", ""), ...options.samplers.map((name) => new Option(name, name)));
  const drafted = typed || recall("form");
  setDefaults();
  if (drafted) restoreForm({ ...drafted, prompt: $("prompt").value || drafted.prompt }, drafted.seed !== null);
  refresh();
}

function setDefaults() {
  choose($("counts"), fields.n_images.default);
  $("n_inf_steps").value = usualSteps();
  $("guidance_scale").value = fields.guidance_scale.default;
  $("sampler").value = "";
  $("negative_prompt").value = $("stream_freq").value = $("seed").value = "";
}

/** Steps from preview to preview; always one that the server takes, so that wrong steps are one fault and not two. */
const previewEvery = (steps) => Math.min(fields.stream_freq.maximum, Math.max(1, Math.round(steps / PREVIEWS) || 1));

export function readForm() {
  const number = (id) => {
    const text = $(id).value.trim();
    return text === "" ? null : Number.isFinite(Number(text)) ? Number(text) : text; // JSON has no infinity
  };
  const steps = number("n_inf_steps");
  return {
    prompt: $("prompt").value.trim(),
    ...(form.elements.model ? { model: form.elements.model.value } : {}), // models.js adds it
    n_images: Number(form.elements.n_images.value) || fields.n_images.default,
    n_inf_steps: steps,
    stream_freq: number("stream_freq") ?? previewEvery(steps),
    ...($("stream_freq").value.trim() ? {} : { preview_every_s: PREVIEW_S }),
    seed: number("seed"),
    guidance_scale: number("guidance_scale"),
    sampler: $("sampler").value || null,
    negative_prompt: $("negative_prompt").value.trim(),
  };
}

/** Put parameters back; the seed only when `withSeed`, or the next job would repeat it unasked. */
export function restoreForm(parameters, withSeed) {
  const given = { ...readForm(), ...parameters };
  $("negative_prompt").value = given.negative_prompt ?? "";
  $("n_inf_steps").value = given.n_inf_steps;
  $("guidance_scale").value = given.guidance_scale ?? fields.guidance_scale.default;
  const { default: usual, long_default: long, long_above: many } = fields.sampler;
  const sampler = given.sampler === (given.n_inf_steps > many ? long : usual) ? "" : given.sampler ?? "";
  if ([...$("sampler").options].some((option) => option.value === sampler)) $("sampler").value = sampler;
  const { stream_freq: every = "" } = parameters;
  $("stream_freq").value = every === previewEvery(given.n_inf_steps) ? "" : every;
  $("seed").value = withSeed ? given.seed ?? "" : "";
  choose($("counts"), given.n_images);
  if ($("prompt").value !== given.prompt) setPrompt(given.prompt);
  else updateAnalysis();
  clearErrors();
  refresh();
}

bus.on("edits", () => { clearErrors(); showExpected(); });

function useSeed(seed) {
  $("seed").value = seed;
  refresh();
}

/** Choose how many images. */
export function setCount(count) {
  choose($("counts"), count);
  refresh();
}

export function rememberSeed(seed) {
  lastSeed = seed;
  $("last-seed").disabled = false;
  $("last-seed").title = `Use the last seed again (${seed})`;
}

/** What follows from other fields: counter, guidance number, quality's name, time. */
function refresh() {
  if (!fields) return;
  const wanted = readForm();
  const most = fields.prompt.max_length;
  setText("counter", wanted.prompt.length > most * 0.7 ? `${$("prompt").value.length} / ${most}` : "");
  setText("guidance-value", Number($("guidance_scale").value).toFixed(1));
  choose($("qualities"), wanted.n_inf_steps);
  $("no-seed").disabled = $("seed").value === "";
  $("stream_freq").placeholder = `auto: ${previewEvery(wanted.n_inf_steps)}`;
  const guidance = $("guidance-value").textContent;
  const changed = [
    Number($("guidance_scale").value) !== fields.guidance_scale.default && `guidance ${guidance}`,
    wanted.negative_prompt && "negative prompt", wanted.sampler,
    $("stream_freq").value !== "" && "previews",
  ].filter(Boolean);
  setText("more-note", changed.join(", "));
  showExpected();
  keep("form", { ...wanted, stream_freq: $("stream_freq").value === "" ? undefined : wanted.stream_freq });
}

// ---- what the server refuses

export function clearErrors() {
  for (const box of form.querySelectorAll(".field-error")) box.remove();
  for (const input of form.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.setAttribute("aria-describedby", (input.getAttribute("aria-describedby") ?? "").replace(/\S+-error ?/, ""));
  }
}

/** Show what the server said about single fields beside them. False when some of it has no place in the form. */
export function showErrors(errors) {
  let placed = 0;
  for (const { pointer, message } of errors) {
    const [, name] = pointer.split("/");
    const sentence = `${message[0].toUpperCase()}${message.slice(1)}.`
      .replace("; got null.", "."); // the field is empty
    if (showEditError(name, sentence)) { placed += 1; continue; }
    const field = form.elements[name];
    const input = field instanceof RadioNodeList ? field[0] : field;
    if (!input) continue;
    placed += 1;
    const box = h("p.field-error", { id: `${name}-error`, text: sentence });
    input.closest(".field").append(box);
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", `${box.id} ${input.getAttribute("aria-describedby") ?? ""}`);
    if (input.closest("details")) $("more").open = true;
    if (placed === 1) input.focus();
  }
  return placed > 0 && placed === errors.length;
}

on(form, "input", (event) => {
  const { name, value } = event.target;
  const steps = name === "quality" ? value : name === "sampler" && fields.few[value];
  if (steps) $("n_inf_steps").value = steps;
  if (event.target.matches("[aria-invalid]")) clearErrors();
  if (fields && Date.now() - asked > SPEED_MS) measure();
  refresh();
});
on($("dice"), "click", () => useSeed(randomSeed()));
on($("last-seed"), "click", () => useSeed(lastSeed));
on($("no-seed"), "click", () => { useSeed(""); $("seed").focus(); });
on($("defaults"), "click", () => {
  setDefaults();
  clearErrors();
  refresh();
});
