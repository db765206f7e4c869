// More or less of what? A slider for each attribute, in groups; beside it what else moves when it is moved.

import { readEdits, setEdits, signed } from "./edits.js";
import { passesOf } from "./settings.js";
import { $, bus, h, icon, slider } from "./ui.js";

const FURTHEST = 2;

/** What else moves with a slider from end to end, and how far the person does, as it was measured on these weights. */
function readout({ response }, labels) {
  if (!response) return null;
  const { moved, identity, monotone } = response;
  const others = Object.entries(moved).sort((one, other) => Math.abs(other[1]) - Math.abs(one[1])).slice(0, 3);
  const said = others.map(([name, change]) => `${labels.get(name) ?? name} ${signed(Math.round(100 * change))} %`);
  const far = Math.round(100 * Math.max(...identity));
  return h("p", { class: "quiet", text: `${said.length ? `Also moves ${said.join(", ")}` : "Moves nothing else"}. Person changes by ${far} %.${monotone ? "" : " Not reliable."}` });
}

export function build(box, { attributes }) {
  const labels = new Map(attributes.map((one) => [one.name, one.label]));
  const made = new Map();
  const groups = new Map();
  for (const one of attributes) {
    const words = (value) => (value ? `${signed(value)}, ${value > 0 ? one.more : one.less}` : "");
    const it = slider(one.label, { min: -FURTHEST, max: FURTHEST, step: 0.25, value: 0, words }, (value) => {
      setEdits({ attributes: { ...readEdits().attributes, [one.name]: value || undefined } });
    }, readout(one, labels));
    it.input.addEventListener("dblclick", () => { it.put(0); it.input.dispatchEvent(new Event("input")); });
    made.set(one.name, it);
    groups.set(one.group, [...(groups.get(one.group) ?? []), it.box]);
  }
  const counts = new Map();
  const panes = [...groups].map(([name, boxes]) => {
    const count = h("span", { class: "quiet" });
    counts.set(name, count);
    return h("details", { name: "features" }, h("summary", {}, `${name} `, count), ...boxes);
  });
  panes[1 % panes.length].open = true;
  const reset = h("button", { class: "soft", click: () => setEdits({ attributes: null }) }, icon("again"), "Back to none");
  const cost = h("p", { class: "quiet" });
  box.append(h("p", { class: "quiet", text: "Keep a seed, then move: the person stays and one thing changes." }), ...panes, cost, reset);

  const show = () => {
    const set = readEdits().attributes ?? {};
    for (const [name, { put, input }] of made) if (Number(input.value) !== (set[name] ?? 0)) put(set[name] ?? 0);
    for (const [name, count] of counts) count.textContent = attributes.filter((one) => one.group === name && set[one.name]).map((one) => one.label).join(", ");
    const moved = Object.keys(set).length;
    reset.hidden = !moved;
    const passes = passesOf();
    cost.textContent = moved ? `Each slider costs two more passes a step: now ${passes + 2 * moved} instead of ${passes}.` : "";
  };
  bus.on("edits", show);
  $("composer").addEventListener("input", show); // guidance has its own cost
  show();
}
