// What is to happen beside the words? An image to start from, features, variations, a blend; and their panels.

import { icon } from "./icons.js";
import { dataUrl } from "./images.js";
import { $, bus, h, keep, loadModule, percent, recall } from "./ui.js";

/** Panels: name, label, icon, the fields that it sets. */
const PANELS = [["photo", "Image", "image", ["init_image", "mask", "strength", "latent", "start_timestep"]],
  ["sliders", "Features", "settings", ["attributes"]],
  ["vary", "Vary", "grid", ["variation_strength", "variation_seed", "candidates", "balance"]],
  ["blend", "Blend", "blend", ["interpolate_to"]]];
const FIELDS = [...PANELS.flatMap(([, , , fields]) => fields), "refine"];
const FROM_IMAGE = ["init_image", "mask", "strength"];
/** What the server refuses beside a field. */
export const RIVALS = {
  init_image: ["latent", "start_timestep", "interpolate_to"], start_timestep: [...FROM_IMAGE, "interpolate_to"],
  latent: FROM_IMAGE,
  interpolate_to: [...FROM_IMAGE, "start_timestep", "variation_strength", "variation_seed", "candidates"],
  variation_strength: ["interpolate_to"], candidates: ["interpolate_to"],
};

let edits = {}; // fields of the request, only those that are set
let options = { models: [] };
let open = null;

export const readEdits = () => ({ ...edits });
export const modelNames = () => options.models.map(({ name }) => name);
/** The model of the weights with this hash, or with one that begins so. */
export const modelOf = (hash) => hash && options.models.find((one) => one.hash.startsWith(hash))?.name;
/** Does the chosen model take a field? */
export const canDo = (field) => field in (options.fields ?? {}) && !(field in (options.unavailable ?? {}));
const isSet = (value) => Boolean(value) && (typeof value !== "object" || Object.keys(value).length > 0);

function changed() {
  keep("edits", edits);
  showEdits();
  bus.emit("edits", edits);
}

/** Set fields of the request, null takes one out; what cannot go together with them goes. */
export function setEdits(changes) {
  if (isSet(changes.interpolate_to) && edits.start_timestep) delete edits.latent; // an image, and no noise
  for (const [name, value] of Object.entries(changes)) {
    if (isSet(value)) for (const rival of RIVALS[name] ?? []) delete edits[rival];
    if (isSet(value) || (name === "strength" && value === 0)) edits[name] = value;
    else delete edits[name];
  }
  if (!edits.init_image) for (const name of ["mask", "strength"]) delete edits[name];
  if (!edits.variation_strength) delete edits.variation_seed;
  if (!edits.latent) delete edits.start_timestep;
  changed();
}

/** Exactly the edits of a request. */
export function replaceEdits(request) {
  edits = {};
  setEdits(Object.fromEntries(FIELDS.filter((name) => name in request).map((name) => [name, request[name]])));
}

export const signed = (value) => `${value > 0 ? "+" : "−"}${Math.abs(value)}`;

/** What is set in a request or in a job's parameters, in words: [text, fields to take out, image]. */
export function editsInWords(edits) {
  const { init_image: image, attributes, interpolate_to: to } = edits;
  const said = [];
  if (image || edits.has_init_image) {
    const share = percent(edits.strength ?? (edits.mask ? 1 : 0.6));
    said.push([`Image, ${share} changed`, { init_image: null }, image]);
  }
  if (edits.mask || edits.has_mask) said.push(["Painted part alone", { mask: null, strength: null }]);
  const { start_timestep: begun } = edits;
  if (begun) said.push([begun === 1 ? "From a finished image" : `From ${percent(begun)} of the way`, { latent: null }]);
  else if (edits.latent || edits.num_latents) said.push(["From the noise of an image", { latent: null }]);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    const { [name]: gone, ...others } = attributes;
    const label = options.attributes?.find((one) => one.name === name)?.label ?? name;
    said.push([`${label} ${signed(value)}`, { attributes: others }]);
  }
  const { variation_strength: varied } = edits;
  if (varied) said.push([`Varied by ${percent(varied)}`, { variation_strength: null }]);
  if (edits.candidates) said.push([`Best of ${edits.candidates}`, { candidates: null }]);
  if (edits.balance) said.push(["Balanced", { balance: null }]);
  const { refine } = edits;
  if (refine) said.push([`Refined by ${refine.model}, ${percent(refine.strength)}`, { refine: null }]);
  if (to) {
    const goal = to.prompt ? `“${to.prompt}”` : to.latent || to.has_latent ? "an image" : `seed ${to.seed}`;
    said.push([`Blend to ${goal}`, { interpolate_to: null }]);
  }
  return said;
}

function showEdits() {
  $("edits").replaceChildren(...editsInWords(edits).map(([text, without, image]) => h("button.chip", {
    "aria-label": `${text}: take out`, title: "Take out", click: () => {
      setEdits(without);
      ($("edits").querySelector("button") ?? $("tools").querySelector("button")).focus();
    },
  }, image && h("img", { src: dataUrl(image), alt: "", width: 20, height: 20 }), text, icon("close"))));
  for (const [name, , , fields] of PANELS) {
    const button = $(`tool-${name}`);
    if (button) button.dataset.set = fields.some((field) => field in edits) ? "yes" : "";
  }
}

/** Open one panel, or close the one that is open. */
export async function openPanel(name, focus = false) {
  open = name;
  for (const [other] of PANELS) if ($(`tool-${other}`)) $(`tool-${other}`).ariaExpanded = other === name;
  for (const box of $("tool-box").children) box.hidden = box.id !== `panel-${name}`;
  if (!name) return;
  let box = $(`panel-${name}`);
  if (!box) {
    const [, label] = PANELS.find(([one]) => one === name);
    box = h("div.tool-panel", { id: `panel-${name}`, role: "group", "aria-label": label });
    $("tool-box").append(box);
    const { build } = await loadModule(name, "editing.css");
    build(box, options);
  }
  if (focus || box.getBoundingClientRect().bottom > innerHeight - 100) box.scrollIntoView({ block: "nearest" });
  if (focus) box.querySelector("button, input, textarea")?.focus();
}

export const openedPanel = () => open;

/** The panel that sets a field, with what the server said about it beside it. False for other fields. */
export function showEditError(field, message) {
  const panel = PANELS.find(([, , , fields]) => fields.includes(field));
  if (!panel) return false;
  $("edits").append(h("p.field-error", { role: "alert", text: `${panel[1]}: ${message}` }));
  openPanel(panel[0]);
  return true;
}

/** Fill in what the chosen model can do; what another one was to do stays, where this one can. */
export function startEdits(given) {
  const before = options.model?.name;
  options = given;
  const known = PANELS.filter(([, , , fields]) => fields.some(canDo));
  $("tools-field").hidden = !known.length;
  if (before === given.model.name) return;
  open = null;
  $("tool-box").replaceChildren();
  $("tools").replaceChildren(...known.map(([name, label, image]) => h("button.tool", {
    id: `tool-${name}`, "aria-expanded": "false", "aria-controls": "tool-box",
    click: () => openPanel(open === name ? null : name),
  }, icon(image), label)));
  if (!before) return replaceEdits(recall("edits", {}));
  const { latent, start_timestep, interpolate_to: to, ...others } = edits; // latents are of one model
  if (to && !to.latent) others.interpolate_to = to;
  replaceEdits(Object.fromEntries(Object.entries(others).filter(([name]) => canDo(name))));
}
