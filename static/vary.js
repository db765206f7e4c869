// What else could this be? Around one image, the best of many, all kinds of people, a grid of seeds and descriptions.

import { canDo, readEdits, setEdits } from "./edits.js";
import { currentRequest, submit } from "./submission.js";
import {
  $, bus, choose, h, on, percent, quiet, randomHex, randomSeed, segments, slider, softButton,
} from "./ui.js";

const BEST_OF = [8, 16, 24, 32];
const inWords = (value) => (value < 0.25 ? "subtle" : value < 0.5 ? "related" : value < 0.8 ? "loose" : "strong");

function around() {
  const { box, put } = slider("Around one face", { min: 0, max: 1, step: 0.05, value: 0, 
    words: (value) => (value ? `${percent(value)}, ${inWords(value)}` : "off"),
  }, (value) => setEdits({ variation_strength: value }));
  const hint = quiet("");
  box.append(hint);
  return [box, ({ variation_strength: value }) => {
    put(value ?? 0);
    hint.textContent = value && !$("seed").value
      ? "Set the seed of the face to stay near, or open an image and press “Vary this face”."
      : "Other noise is mixed into that of the seed.";
  }];
}

function bestOf({ maximum }) {
  const counts = BEST_OF.filter((count) => count <= maximum).map((count) => [`of ${count}`, count]);
  const box = segments(h("div.segments"), "best-of", [["Off", 0], ...counts], 0,
    (value) => setEdits({ candidates: value || null }));
  return [h("fieldset.field", h("legend", "Keep the best"), box,
    quiet("Generates so many and keeps those that fit the words best. Each shows how well it fits.")),
  ({ candidates }) => choose(box, candidates ?? 0)];
}

function balance() {
  const input = h("input", { type: "checkbox", change: () => setEdits({ balance: input.checked }) });
  return [h("div", h("label.check", input, h("span", "Balance who appears")),
    quiet("What the words leave open (sex, age, hair) goes round the images, or most would look alike.")),
  ({ balance: on }) => { input.checked = Boolean(on); }];
}

/** The same seeds for several descriptions, one job each, in one frame; a column is a seed. */
async function generateGrid(prompts, count) {
  const { candidates, variation_strength, variation_seed, interpolate_to, ...shared } = currentRequest();
  const seed = shared.seed ?? randomSeed();
  const name = randomHex(6);
  for (const prompt of [shared.prompt, ...prompts]) {
    if (!await submit({ ...shared, prompt, seed, n_images: count }, randomHex(16), name)) return;
  }
}

function grid(most) {
  const others = h("textarea", {
    rows: 3, id: "grid-prompts", placeholder: "an old man with glasses\na woman with a hat" });
  const counts = h("select", { id: "grid-seeds" });
  for (let count = 2; count <= most; count += 1) counts.append(h("option", { value: count, text: `${count} seeds` }));
  counts.value = Math.min(4, most);
  const go = () => generateGrid(
    others.value.split("\n").map((text) => text.trim()).filter(Boolean), Number(counts.value));
  return h("details", h("summary", "A grid of seeds and descriptions"), h("div.grid-form",
    h("label", { for: "grid-prompts", text: "More descriptions, one a line" }), others,
    h("label.visually-hidden", { for: "grid-seeds", text: "Seeds" }), counts,
    softButton("grid", "Generate the grid", go)));
}

export function build(box, options) {
  const parts = [canDo("variation_strength") && around(),
    canDo("candidates") && bestOf(options.fields.candidates), canDo("balance") && balance()].filter(Boolean);
  box.append(...parts.map(([part]) => part), grid(options.fields.n_images.maximum));
  const show = () => { for (const [, update] of parts) update(readEdits()); };
  bus.on("edits", show);
  on($("seed"), "input", show);
  show();
}
