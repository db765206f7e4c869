// What does the model understand of the description? Marks words, offers known ones, and lets attributes be switched as chips.
// The text is the one truth: every switch edits it and looks again.

import { ask } from "./server.js";
import { $, h, icon } from "./ui.js";

const WAIT_MS = 220;
const REST_MS = 1200; // a word at the caret is judged when nothing was typed for so long
const GROUPS = [ // what the palette offers: +Name is the attribute, -Name its opposite; the words are the server's
  ["Person", "-Male +Male +Young -Young +Attractive +Chubby"],
  ["Expression", "+Smiling -Smiling +Mouth_Slightly_Open -Mouth_Slightly_Open"],
  ["Hair", "+Black_Hair +Brown_Hair +Blond_Hair +Gray_Hair +Wavy_Hair +Straight_Hair +Bangs +Receding_Hairline +Bald"],
  ["Beard", "-No_Beard +Goatee +Mustache +Sideburns +5_o_Clock_Shadow +No_Beard"],
  ["Worn", "+Eyeglasses -Eyeglasses +Wearing_Hat +Wearing_Earrings +Wearing_Necklace +Wearing_Necktie +Wearing_Lipstick "
    + "+Heavy_Makeup -Heavy_Makeup"],
  ["Face", "+Oval_Face +High_Cheekbones +Rosy_Cheeks +Pale_Skin +Double_Chin +Arched_Eyebrows +Bushy_Eyebrows +Narrow_Eyes "
    + "+Bags_Under_Eyes +Big_Nose +Pointy_Nose +Big_Lips"],
];
const ONE_OF = [["Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "Bald"], ["Straight_Hair", "Wavy_Hair", "Bald"], ["Bald", "Bangs"]];
const PARTS = "hair|locks|nose|eyebrows|brows|eyes|lips|cheeks|cheekbones|face|skin|complexion|expression|look|mouth|eyed|haired|faced";
const NEUTRAL = { he: "they", she: "they", him: "them", her: "their", his: "their", himself: "themselves", herself: "themselves" };
const NEGATION = "not|no|without|never|isn't|lacking";

const area = $("prompt");
const marks = $("marks");
const notes = $("notes");
let words = {}; // the vocabulary: word -> known or rare
let phrases = []; // {text, attribute, value}, the commonest first
let found = null; // what the last look told
let timer = 0;
let asked = 0;
let off = new Map(); // chips that were switched off: attribute -> {value, before, after}

const key = (attribute, value) => `${value ? "+" : "-"}${attribute}`;
const withoutArticle = (text) => text.replace(/^(an?|the) /, "");

/** The words for a fact, as they go into a prompt: the commonest of the vocabulary, or its name. */
function wordsFor(attribute, value) {
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
  drawPalette();
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

function setText(text) {
  area.value = text;
  area.dispatchEvent(new Event("input", { bubbles: true }));
  return look();
}

export function setPrompt(text) {
  off = new Map();
  setText(text);
}

/** The text with the letters from `start` to `end` taken out, and with them the small words that only served them. */
function cut(text, start, end) {
  let left = text.slice(0, start);
  let right = text.slice(end);
  const described = /^\s+(?!and\b|or\b|with\b|who\b|but\b|in\b|wearing\b|without\b|not\b)[\p{L}]/u.test(right);
  const part = new RegExp(`^\\s+(?:${PARTS})\\b`, "i");
  const alone = /(?:^|[,;.&]|\b(?:and|or|with|without|has|having|no|an?|the|his|her|their))\s*$/i;
  if (described && !(part.test(right) && alone.test(left))) { // an adjective among others: only it goes
    left = left.replace(new RegExp(`(?:\\b(?:${NEGATION}|very|slightly|quite)\\s+)+$`, "i"), "");
  } else {
    right = right.replace(part, "");
    left = left.replace(/(?:\b(?:an?|the|his|her|their)\s+)+$/i, "");
    const goesOn = /^\s*(?:,\s*|(?:and|or)\s+)/i;
    const denied = new RegExp(`(?:\\b(?:${NEGATION})\\s+)+(?:(?:wearing|an?)\\s+)*$`, "i");
    if (denied.test(left) && !/^\s*or\b/i.test(right)) left = left.replace(denied, "");
    if (/(?:^|\b(?:with|without|wearing|in|has|having|is|not|no))\s*$/i.test(left) && goesOn.test(right) && !/^\s*,/.test(right)) {
      right = right.replace(goesOn, " ");
    } else {
      const ends = !right.trim() || /^\s*[,.;]/.test(right);
      left = left.replace(/(?:[,\s]+|\b(?:and|or|with|without|wearing|in|has|having|is|who)\s+)+$/i, ends ? "" : " ");
    }
  }
  return tidy(left + right);
}

const tidy = (text) => text.replace(/[^\S\n]+/g, " ").replace(/\b(\w+)( \1\b)+/gi, "$1").replace(/ ([,.;])/g, "$1").replace(/,(\s*,)+/g, ",").replace(/^[\s,;]+|[\s,;]+$/g, "")
  .replace(/\b([Aa])n(?= [^aeiou\s])/g, "$1").replace(/\b([Aa])(?= [aeio])/g, "$1n");

/** The text without everything that claims one of these attributes. */
function without(text, claims, attributes) {
  const letters = Array.from(text); // the server counts code points, JavaScript UTF-16 units
  const at = (position) => letters.slice(0, position).join("").length;
  const places = new Map();
  const also = []; // what words that go have said besides
  for (const claim of claims) {
    const place = `${claim.start} ${claim.end}`;
    places.set(place, [...(places.get(place) ?? []), claim]);
  }
  for (const here of [...places.values()].sort((a, b) => b[0].start - a[0].start)) {
    if (!here.some((claim) => attributes.includes(claim.attribute))) continue;
    const [start, end] = [at(here[0].start), at(here[0].end)];
    const rest = here.filter((claim) => !attributes.includes(claim.attribute));
    const said = text.slice(start, end);
    let instead = "";
    if (attributes.includes("Male") && here.some((claim) => claim.attribute === "Male")) { // a noun or a pronoun
      instead = [...rest.map((claim) => wordsFor(claim.attribute, claim.value)), NEUTRAL[said.toLowerCase()] ?? "person"].join(" ");
    } else if (rest.some((claim) => claim.attribute === "Male")) {
      instead = wordsFor("Male", rest.find((claim) => claim.attribute === "Male").value); // "girl" without young
    } else {
      also.push(...rest);
    }
    if (/^\p{Lu}/u.test(said) && instead) instead = instead[0].toUpperCase() + instead.slice(1);
    text = instead ? tidy(text.slice(0, start) + instead + text.slice(end)) : cut(text, start, end);
  }
  return also.reduce((so, claim) => plus(so, claim.attribute, claim.value), text);
}

function plus(text, attribute, value) {
  const said = wordsFor(attribute, value);
  if (attribute === "Male") {
    if (/\bperson\b/i.test(text)) return tidy(text.replace(/\bperson\b/i, said));
    return text ? `${said}, ${text}` : `a ${said}`;
  }
  return text ? `${text.replace(/[\s,.;]+$/, "")}, ${withoutArticle(said)}` : withoutArticle(said);
}

/** Switch one fact of the description on or off, by the smallest edit that does it. */
async function toggle(attribute, value) {
  clearTimeout(timer);
  const before = area.value;
  const now = await analyze(before);
  let text;
  if (now.attributes[attribute] === value) {
    text = await takeOut(before, now, [attribute]);
    off.set(attribute, { value, before, after: text });
  } else {
    const was = off.get(attribute);
    if (was?.value === value && was.after === before) {
      text = was.before;
    } else {
      const rivals = value ? ONE_OF.filter((group) => group.includes(attribute)).flat() : [];
      const gone = [attribute, ...rivals].filter((name) => name in now.attributes);
      if (attribute === "Goatee" || attribute === "Mustache") gone.push("No_Beard");
      text = plus(await takeOut(before, now, gone), attribute, value);
    }
    off.delete(attribute);
  }
  if (area.value === before) await setText(text);
}

/** The edit is checked: where it takes too little or too much, the facts that stay are written anew. */
async function takeOut(text, now, attributes) {
  if (!attributes.some((name) => name in now.attributes)) return text;
  const shorter = now.claims ? without(text, now.claims, attributes) : text;
  const then = await analyze(shorter);
  const stay = Object.entries(now.attributes).filter(([name]) => !attributes.includes(name));
  const kept = stay.every(([name, value]) => then.attributes[name] === value);
  if (kept && !attributes.some((name) => name in then.attributes)) return shorter;
  stay.sort(([one], [other]) => (other === "Male") - (one === "Male"));
  return stay.map(([name, value]) => labelOf(name, value)).join(", ");
}

async function analyze(text) {
  if (!text.trim()) return { attributes: {}, words: [], claims: [], contradictions: [], warnings: [] };
  return ask("prompt/analyze", { prompt: text });
}

// ---- what is shown of it

function drawMarks(judged) {
  const letters = Array.from(area.value);
  const parts = [];
  let at = 0;
  for (const word of judged) {
    parts.push(letters.slice(at, word.start).join(""));
    parts.push(h("mark", { class: word.status, text: letters.slice(word.start, word.end).join("") }));
    at = word.end;
  }
  parts.push(`${letters.slice(at).join("")}\n`); // a last empty line has height only with something after it
  marks.replaceChildren(...parts);
  marks.scrollTop = area.scrollTop;
}

function drawChips() {
  const facts = Object.entries(found.attributes);
  for (const [name, { value }] of off) if (!(name in found.attributes)) facts.push([name, value]);
  if (!facts.length) return null;
  return h("div", { class: "chips", role: "group", "aria-label": "Understood" }, ...facts.map(([name, value]) => {
    const on = found.attributes[name] === value;
    return h("button", {
      class: "chip fact", "aria-pressed": String(on), data: { fact: key(name, value) },
      title: on ? "Take this out of the description" : "Put this back", click: () => switchChip(name, value),
    }, icon(on ? "check" : "plus"), labelOf(name, value));
  }));
}

async function switchChip(name, value) {
  const focused = document.activeElement?.dataset.fact;
  const palette = $("palette").contains(document.activeElement);
  try {
    await toggle(name, value);
  } catch { /* the server is gone; the banner says so */ }
  const box = palette ? $("palette") : notes;
  if (focused) [...box.querySelectorAll("[data-fact]")].find((chip) => chip.dataset.fact === focused)?.focus();
}

function drawNotes() {
  const rows = [drawChips()];
  for (const text of found.contradictions) rows.push(h("p", { class: "contradiction" }, icon("alert"), `${text}.`));
  const strange = found.words.filter((word) => word.status === "unknown" && word.suggestion);
  const seen = new Set();
  for (const word of strange) {
    if (seen.has(word.text)) continue;
    seen.add(word.text);
    rows.push(h("p", { class: "strange" }, h("b", { text: word.text }), " is not a word it knows ",
      h("button", { class: "chip", click: () => replaceWord(word) }, `${word.text} → ${word.suggestion}`)));
  }
  const said = [...seen].map((text) => `"${text}" `);
  for (const text of found.warnings) if (!said.some((start) => text.startsWith(start))) rows.push(h("p", { text }));
  const rare = [...new Set(found.words.filter((word) => word.status === "rare").map((word) => word.text))];
  if (rare.length) rows.push(h("p", {}, "Seldom read in training: ", h("span", { class: "legend-rare", text: rare.join(", ") })));
  notes.replaceChildren(...rows.filter(Boolean));
  for (const chip of $("palette").querySelectorAll("[data-fact]")) {
    const [value, name] = [chip.dataset.fact[0] === "+", chip.dataset.fact.slice(1)];
    chip.setAttribute("aria-pressed", String(found.attributes[name] === value));
  }
  const unknown = found.words.filter((word) => word.status === "unknown").map((word) => (
    word.suggestion ? `${word.text}, nearest known ${word.suggestion}` : word.text));
  const facts = Object.entries(found.attributes).map(([name, value]) => labelOf(name, value));
  $("understood").textContent = [facts.length ? `Understood: ${facts.join(", ")}.` : "", ...found.contradictions,
    unknown.length ? `Unknown: ${unknown.join("; ")}.` : ""].filter(Boolean).join(" ");
}

function replaceWord(word) {
  const letters = Array.from(area.value);
  const start = letters.slice(0, word.start).join("").length;
  type(word.suggestion, start, start + letters.slice(word.start, word.end).join("").length);
  look();
}

function drawPalette() {
  $("palette").replaceChildren(...GROUPS.map(([title, facts]) => h("div", { class: "palette-row", role: "group", "aria-label": title },
    h("span", { class: "quiet", text: title, "aria-hidden": "true" }),
    h("div", { class: "chips" }, ...facts.split(" ").map((fact) => {
      const [value, name] = [fact[0] === "+", fact.slice(1)];
      return h("button", {
        class: "chip", "aria-pressed": String(found?.attributes[name] === value), data: { fact },
        text: labelOf(name, value), click: () => switchChip(name, value),
      });
    })))));
}

/** What was understood, without the word that is still being written. */
function soFar(answer) {
  const at = Array.from(area.value.slice(0, area.selectionEnd)).length;
  const word = document.activeElement === area && answer.words.find(({ end, status }) => end === at && status !== "known");
  if (!word) return answer;
  timer = setTimeout(look, REST_MS, true);
  return { ...answer, words: answer.words.filter((one) => one !== word), warnings: answer.warnings.filter((text) => !text.startsWith(`"${word.text}" `)) };
}

/** Ask what is understood of the text as it stands now, and show it. */
export async function look(rested = false) {
  clearTimeout(timer);
  const text = area.value;
  const number = ++asked;
  if (!text.trim()) off = new Map();
  try {
    const answer = await analyze(text);
    if (number !== asked || text !== area.value) return; // somebody went on typing
    found = rested === true ? answer : soFar(answer);
    drawMarks(found.words);
    drawNotes();
  } catch {
    drawMarks([]); // marks are a service, not a condition: the request itself will say what is wrong
    notes.replaceChildren();
  }
}

let suggest = null; // loaded with the first letter

area.addEventListener("input", (event) => {
  const judged = found?.words ?? []; // words that still stand where they stood keep their marks while somebody types
  const letters = Array.from(area.value);
  const changed = judged.findIndex((word) => letters.slice(word.start, word.end).join("") !== word.text || word.end >= letters.length);
  drawMarks(changed < 0 ? judged : judged.slice(0, changed));
  if (suggest) suggest(event, { words, phrases, type });
  else import("./suggestions.js").then((made) => { ({ suggest } = made); suggest(event, { words, phrases, type }); }, () => {});
  clearTimeout(timer);
  timer = setTimeout(look, WAIT_MS);
});
area.addEventListener("scroll", () => { marks.scrollTop = area.scrollTop; });

$("palette-open").addEventListener("click", () => {
  const open = $("palette").hidden;
  $("palette").hidden = !open;
  $("palette-open").setAttribute("aria-expanded", String(open));
});
$("surprise").addEventListener("click", async () => {
  try {
    setPrompt((await ask("prompt/surprise")).prompt);
  } catch { /* the banner says what is wrong */ }
});
