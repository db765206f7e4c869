// What does the model understand of the description? Words are marked, attributes become chips that can be switched.
// The text is the one truth: every switch edits it and asks again.

import { icon } from "./icons.js";
import { ask } from "./server.js";
import { $, h, loadModule, on, setText } from "./ui.js";

const WAIT_MS = 220;
const REST_MS = 1200; // a word at the caret is marked when nothing was typed for so long

const area = $("prompt");
const marks = $("marks");
const notes = $("notes");
let words = {}; // the vocabulary: word -> known or rare
let phrases = []; // {text, attribute, value}, the commonest first
let analysis = null; // the server's newest answer about the text
let timer = 0;
let asked = 0;
let palette = null; // loaded when it is first opened
let understands = true; // whether the model was taught the vocabulary
const switchedOff = new Map(); // chips that were switched off: attribute -> {value, before, after}

/** An attribute and whether it is there, as one word: +Smiling, -Male. */
const factOf = (attribute, value) => `${value ? "+" : "-"}${attribute}`;
export const withoutArticle = (text) => text.replace(/^(an?|the) /, "");

/** The words for a fact, as they go into a prompt: the commonest of the vocabulary, or its name. */
export function wordsFor(attribute, value) {
  const phrase = phrases.find((one) => one.attribute === attribute && one.value === value);
  if (phrase) return phrase.text;
  if (attribute === "Male") return value ? "man" : "woman";
  if (attribute === "No_Beard") return value ? "no beard" : "a beard";
  const name = attribute.replace("Wearing_", "").replaceAll("_", " ").toLowerCase();
  return value ? name : `no ${name}`;
}

export const labelOf = (attribute, value) => withoutArticle(wordsFor(attribute, value));

export async function loadVocabulary() {
  try {
    const answer = await ask("vocabulary");
    words = answer.words ?? {};
    phrases = answer.phrases ?? [];
  } catch { /* the page works without suggestions */ }
}

export async function analyze(text) {
  if (!text.trim()) return { attributes: {}, words: [], claims: [], contradictions: [], warnings: [] };
  return ask("prompt/analyze", { prompt: text });
}

// ---- editing the text

/** Replace letters as if typed, so that the browser's own undo takes it back. */
function type(text, start, end) {
  area.focus({ preventScroll: true });
  area.setSelectionRange(start, end);
  if (document.execCommand("insertText", false, text)) return;
  area.setRangeText(text, start, end, "end");
  area.dispatchEvent(new Event("input", { bubbles: true }));
}

function replaceText(text) {
  area.value = text;
  area.dispatchEvent(new Event("input", { bubbles: true }));
  return updateAnalysis();
}

export function setPrompt(text) {
  switchedOff.clear();
  replaceText(text);
}

/** A place in a text: the server counts code points, JavaScript UTF-16 units. */
export const unitAt = (text, position) => Array.from(text).slice(0, position).join("").length;

/** A chip that is pointed at or focused may be pressed next: what a press needs comes now. */
const expectPress = () => loadModule("prompt_editing").catch(() => { /* the press tries again */ });

/** Switch one fact of the description on or off; the focus stays on its chip, which is made anew. */
async function switchFact(attribute, value) {
  const focused = document.activeElement?.dataset.fact;
  const box = $("palette").contains(document.activeElement) ? $("palette") : notes;
  clearTimeout(timer);
  const before = area.value;
  try {
    const { switched } = await loadModule("prompt_editing");
    const text = await switched(before, attribute, value, switchedOff);
    if (area.value === before) await replaceText(text);
  } catch { /* the server is gone; the banner says so */ }
  if (focused) [...box.querySelectorAll("[data-fact]")].find((chip) => chip.dataset.fact === focused)?.focus();
}

// ---- what is shown of it

function showMarks(analyzed) {
  const letters = Array.from(area.value);
  const parts = [];
  let at = 0;
  for (const word of analyzed) {
    parts.push(letters.slice(at, word.start).join(""));
    parts.push(h("mark", { class: word.status, text: letters.slice(word.start, word.end).join("") }));
    at = word.end;
  }
  parts.push(`${letters.slice(at).join("")}\n`); // a last empty line has height only with something after it
  marks.replaceChildren(...parts);
  marks.scrollTop = area.scrollTop;
}

/** The button that switches a fact; `bare` is without an icon. */
export function chipFor(attribute, value, bare = false) {
  const pressed = analysis?.attributes[attribute] === value;
  return h("button.chip", {
    "aria-pressed": String(pressed), data: { fact: factOf(attribute, value) },
    click: () => switchFact(attribute, value), pointerenter: expectPress, focus: expectPress,
    ...(bare ? {} : { class: "chip fact", title: pressed ? "Take this out of the description" : "Put this back" }),
  }, !bare && icon(pressed ? "check" : "plus"), labelOf(attribute, value));
}

function chips() {
  const { attributes } = analysis;
  const facts = Object.entries(attributes);
  for (const [name, { value }] of switchedOff) if (!(name in attributes)) facts.push([name, value]);
  return facts.length && h("div.chips", { role: "group", "aria-label": "Understood" },
    ...facts.map((fact) => chipFor(...fact)));
}

function showNotes() {
  const { attributes, contradictions, warnings } = analysis;
  const rows = [chips()];
  for (const text of contradictions) rows.push(h("p.contradiction", icon("alert"), `${text}.`));
  const unknown = analysis.words.filter((word) => word.status === "unknown");
  const named = new Set();
  for (const word of unknown) {
    if (!word.suggestion || named.has(word.text)) continue;
    named.add(word.text);
    rows.push(h("p.strange", h("b", word.text), " is not a word it knows ",
      h("button.chip", { click: () => replaceWord(word) }, `${word.text} → ${word.suggestion}`)));
  }
  const said = [...named].map((text) => `"${text}" `);
  for (const text of warnings) if (!said.some((start) => text.startsWith(start))) rows.push(h("p", text));
  const rare = [...new Set(analysis.words.filter((word) => word.status === "rare").map((word) => word.text))];
  if (rare.length) rows.push(h("p", "Seldom read in training: ", h("span.legend-rare", rare.join(", "))));
  notes.replaceChildren(...rows.filter(Boolean));
  for (const chip of $("palette").querySelectorAll("[data-fact]")) {
    const [sign, ...name] = chip.dataset.fact;
    chip.ariaPressed = attributes[name.join("")] === (sign === "+");
  }
  const facts = Object.entries(attributes).map(([name, value]) => labelOf(name, value));
  const strange = unknown.map(({ text, suggestion }) => (suggestion ? `${text}, nearest known ${suggestion}` : text));
  setText("understood", [facts.length && `Understood: ${facts.join(", ")}.`, ...contradictions,
    strange.length && `Unknown: ${strange.join("; ")}.`].filter(Boolean).join(" "));
}

function replaceWord(word) {
  type(word.suggestion, unitAt(area.value, word.start), unitAt(area.value, word.end));
  updateAnalysis();
}

/** An answer without the word that is still being written. */
function withoutUnfinished(answer) {
  const at = Array.from(area.value.slice(0, area.selectionEnd)).length;
  const word = document.activeElement === area
    && answer.words.find(({ end, status }) => end === at && status !== "known");
  if (!word) return answer;
  timer = setTimeout(updateAnalysis, REST_MS, true);
  return { ...answer, words: answer.words.filter((one) => one !== word),
    warnings: answer.warnings.filter((text) => !text.startsWith(`"${word.text}" `)) };
}

/** Ask what is understood of the text as it stands now, and show it. */
export async function updateAnalysis(rested = false) {
  clearTimeout(timer);
  const text = area.value;
  const number = ++asked;
  if (!text.trim()) switchedOff.clear();
  try {
    if (!understands) throw null; // nothing is known of it
    const answer = await analyze(text);
    if (number !== asked || text !== area.value) return; // somebody went on typing
    analysis = rested === true ? answer : withoutUnfinished(answer);
    showMarks(analysis.words);
    showNotes();
  } catch {
    analysis = null;
    showMarks([]); // marks are a service, not a condition: the request itself will say what is wrong
    notes.replaceChildren();
    setText("understood", "");
  }
}

/** Is what is written held against the vocabulary? Models of other people were not taught it. */
export function useVocabulary(known) {
  if (understands === known) return;
  understands = known;
  if (!known && !$("palette").hidden) $("palette-open").click();
  $("palette-open").hidden = !known;
  updateAnalysis();
}

on(area, "input", async (event) => {
  const analyzed = analysis?.words ?? []; // words that still stand where they stood keep their marks meanwhile
  const letters = Array.from(area.value);
  const changed = analyzed.findIndex(({ start, end, text }) => (
    letters.slice(start, end).join("") !== text || end >= letters.length));
  showMarks(changed < 0 ? analyzed : analyzed.slice(0, changed));
  clearTimeout(timer);
  timer = setTimeout(updateAnalysis, WAIT_MS);
  if (!understands) return;
  try {
    (await loadModule("suggestions")).suggest(event, { words, phrases, type });
  } catch { /* the next letter tries again */ }
});
on(area, "scroll", () => { marks.scrollTop = area.scrollTop; });

on($("palette-open"), "click", async () => {
  const open = $("palette").hidden;
  $("palette").hidden = !open;
  $("palette-open").ariaExpanded = open;
  palette ??= loadModule("prompt_palette")
    .then(({ fillPalette }) => fillPalette($("palette")), () => { palette = null; });
});
on($("surprise"), "click", async () => {
  try {
    setPrompt((await ask("prompt/surprise")).prompt);
  } catch { /* the banner says what is wrong */ }
});
