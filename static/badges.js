// How well does a picture fit its words, and is it too close to a training picture? Badges on its tile, with the detail behind.

import { labelOf } from "./prompt.js";
import { ask } from "./server.js";
import { h, icon, loadStyle, percent } from "./ui.js";

let number = 0;

/** A row of bars: [name, share, marked]. */
export function bars(rows) {
  return h("ul", { class: "bars" }, ...rows.map(([name, share, mark]) => {
    const fill = h("i");
    fill.style.width = `${100 * share}%`;
    return h("li", { class: mark ? "marked" : "" }, h("span", { text: name }), h("span", { class: "bar" }, fill), h("span", { class: "share", text: percent(share) }));
  }));
}

const stated = new Map(); // prompt -> promise of what it states: {attribute: whether it is there}
function statedBy(prompt) {
  if (!stated.has(prompt)) stated.set(prompt, ask("prompt/analyze", { prompt }).then(({ attributes }) => attributes, () => ({})));
  return stated.get(prompt);
}

/** The badges of a finished picture that was drawn from a prompt. */
export async function badges({ adherence, agreement, nearest, prompt }, asked) {
  const [said] = await Promise.all([adherence == null ? {} : statedBy(prompt ?? asked), loadStyle("editing.css")]);
  const made = [];
  if (adherence != null) {
    number += 1;
    const id = `fit-${number}`;
    const rows = Object.entries(agreement ?? {}).sort((one, other) => one[1] - other[1]);
    made.push(h("button", { class: "badge", "data-level": adherence > 0.7 ? "good" : adherence > 0.45 ? "fair" : "poor",
      "aria-label": `Fits the words to ${percent(adherence)}`, "aria-describedby": id, text: percent(adherence) }),
    h("div", { class: "detail", id }, h("b", { text: "How it fits the words" }), bars(rows.map(([name, share]) => [labelOf(name, said[name] ?? true), share, share < 0.45])),
      h("p", { text: "As the judge sees it, a small network that never helped to draw." })));
  }
  if (nearest?.too_close) {
    made.push(h("p", { class: "badge near", title: "Closer to a training picture than nearly all pictures of other people are" }, icon("alert"), "Near a training face"));
  }
  return made;
}
