// More or less of what? A slider for each attribute, in groups; beside it what else moves when it is moved.

import { readEdits, setEdits, signed } from "./edits.js";
import { passesOf } from "./settings.js";
import { $, bus, h, on, percent, quiet, slider, softButton } from "./ui.js";

const FURTHEST = 2;

/** What else moves with a slider from end to end, and how far the person does, as it was measured on these weights. */
function readout({ response }, labels) {
  if (!response) return null;
  const { moved, identity, monotone } = response;
  const others = Object.entries(moved).sort((one, other) => Math.abs(other[1]) - Math.abs(one[1])).slice(0, 3);
  const said = others.map(([name, change]) => `${labels.get(name) ?? name} ${signed(Math.round(100 * change))} %`);
  const also = said.length ? `Also moves ${said.join(", ")}` : "Moves nothing else";
  return quiet(`${also}. Person changes by ${percent(Math.max(...identity))}.${
    monotone ? "" : " Not reliable."}`);
}

export function build(box, { attributes }) {
  const labels = new Map(attributes.map((one) => [one.name, one.label]));
  const made = new Map(attributes.map((one) => {
    const words = (value) => (value ? `${signed(value)}, ${value > 0 ? one.more : one.less}` : "");
    const it = slider(one.label, { min: -FURTHEST, max: FURTHEST, step: 0.25, value: 0, words }, (value) => {
      setEdits({ attributes: { ...readEdits().attributes, [one.name]: value || undefined } });
    }, readout(one, labels));
    on(it.input, "dblclick", () => { it.put(0); it.input.dispatchEvent(new Event("input")); });
    return [one.name, it];
  }));
  const counts = new Map([...new Set(attributes.map((one) => one.group))].map((name) => [name, h("span.quiet")]));
  const panes = [...counts].map(([name, count]) => h("details", { name: "features" }, h("summary", `${name} `, count),
    ...attributes.filter((one) => one.group === name).map((one) => made.get(one.name).box)));
  panes[1 % panes.length].open = true;
  const reset = softButton("again", "Back to none", () => setEdits({ attributes: null }));
  const cost = quiet("");
  box.append(quiet("Keep a seed, then move: the person stays and one thing changes."), ...panes, cost, reset);

  const show = () => {
    const set = readEdits().attributes ?? {};
    for (const [name, { put, input }] of made) if (Number(input.value) !== (set[name] ?? 0)) put(set[name] ?? 0);
    for (const [name, count] of counts) {
      const here = attributes.filter((one) => one.group === name && set[one.name]);
      count.textContent = here.map((one) => one.label).join(", ");
    }
    const moved = Object.keys(set).length;
    reset.hidden = !moved;
    const passes = passesOf();
    const now = `now ${passes + 2 * moved} instead of ${passes}`;
    cost.textContent = moved ? `Each slider costs two more passes a step: ${now}.` : "";
  };
  bus.on("edits", show);
  on($("composer"), "input", show); // guidance has its own cost
  show();
}
