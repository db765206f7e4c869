// Which known words begin like the one that is being written? A list under it, loaded with the first letter.

import { $, h, isCommand, on } from "./ui.js";

const MAX_SUGGESTIONS = 6;
const area = $("prompt");
const marks = $("marks");
const list = $("suggestions");
let [words, phrases, type] = [{}, [], null]; // the vocabulary, and how the description is written in

let active = -1;

function offers() {
  const at = area.selectionStart;
  if (at !== area.selectionEnd || /[\p{L}'-]/u.test(area.value[at] ?? "")) return [];
  const typed = area.value.slice(0, at).match(/(?:[\p{L}'-]+ ){0,2}[\p{L}'-]+$/u)?.[0].toLowerCase();
  if (!typed || /(^| )a$/.test(typed)) return []; // "a" is a word of its own
  const made = new Map();
  const all = area.value.toLowerCase();
  for (let start = 0; start !== -1 && start < typed.length; start = typed.indexOf(" ", start) + 1 || -1) {
    const begun = typed.slice(start);
    for (const { text } of phrases) {
      if (text.length > begun.length && text.startsWith(begun) && !all.includes(text)) made.set(text, begun.length);
    }
  }
  const begun = typed.slice(typed.lastIndexOf(" ") + 1);
  const known = Object.keys(words)
    .filter((word) => word.length > begun.length && word.startsWith(begun) && !made.has(word));
  known.sort((a, b) => (words[a] === "rare") - (words[b] === "rare") || a.length - b.length);
  for (const word of known) made.set(word, begun.length);
  return [...made].slice(0, MAX_SUGGESTIONS).map(([text, length]) => ({ text, start: at - length, end: at }));
}

function offer() {
  const offered = offers();
  hideList();
  if (!offered.length) return;
  list.hidden = false;
  list.replaceChildren(...offered.map((offer, number) => {
    const typed = offer.end - offer.start;
    const entry = h("li", {
      role: "option", id: `suggestion-${number}`, "aria-selected": "false", class: words[offer.text] ?? "known" },
      h("b", offer.text.slice(0, typed)), offer.text.slice(typed));
    on(entry, "pointerdown", (event) => { event.preventDefault(); accept(offer); });
    entry.offer = offer;
    return entry;
  }));
  placeList(offered[0].start);
}

/** Under the word that is being written, found through the letters that lie under the text area. */
function placeList(start) {
  const walker = document.createTreeWalker(marks, NodeFilter.SHOW_TEXT);
  let left = start;
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (left < node.length || (left === node.length && node.nextSibling === null)) {
      const range = document.createRange();
      range.setStart(node, left);
      range.setEnd(node, Math.min(left + 1, node.length));
      const word = range.getBoundingClientRect();
      const box = area.getBoundingClientRect();
      const room = box.width - list.offsetWidth - 2;
      list.style.left = `${Math.max(0, Math.min(word.left - box.left - 10, room))}px`;
      list.style.top = `${Math.min(word.bottom - box.top + 4, box.height + 4)}px`;
      return;
    }
    left -= node.length;
  }
}

function accept(offer) {
  const space = /^\s|^[,.;]/.test(area.value.slice(offer.end)) ? "" : " ";
  type(offer.text + space, offer.start, offer.end);
  hideList();
}

function hideList() {
  list.hidden = true;
  active = -1;
  area.removeAttribute("aria-activedescendant");
}

function move(by) {
  const entries = [...list.children];
  if (entries[active]) entries[active].ariaSelected = false;
  active = (active + by + entries.length + (active < 0 && by < 0 ? 1 : 0)) % entries.length;
  entries[active].ariaSelected = true;
  area.setAttribute("aria-activedescendant", entries[active].id);
}

on(area, "keydown", (event) => {
  if (list.hidden || event.isComposing) return;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    move(event.key === "ArrowDown" ? 1 : -1);
  } else if (/^(Enter|Tab)$/.test(event.key) && active >= 0 && !event.shiftKey && !isCommand(event)) {
    event.preventDefault();
    accept(list.children[active].offer);
  } else if (event.key === "Escape") {
    event.preventDefault();
    event.stopPropagation();
    hideList();
  }
});
on(area, "blur", hideList);
on(area, "click", hideList);

/** To be called after each change of the description, with the vocabulary as it is then. */
export function suggest(event, given) {
  ({ words, phrases, type } = given);
  if (event.isTrusted || event.inputType) offer();
}
