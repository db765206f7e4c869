// How is an attribute switched in a description? By the smallest edit, checked by the server's own reading of it.

import { analyze, labelOf, unitAt, withoutArticle, wordsFor } from "./prompt.js";

const ONE_OF = [ // attributes that cannot be true together
  ["Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "Bald"], ["Straight_Hair", "Wavy_Hair", "Bald"],
  ["Bald", "Bangs"]];
const PARTS = "hair|locks|nose|eyebrows|brows|eyes|lips|cheeks|cheekbones|face|skin|complexion|expression|look|mouth"
  + "|eyed|haired|faced";
const NEUTRAL = { he: "they", she: "they", him: "them", her: "their", his: "their", himself: "themselves",
  herself: "themselves" };
const NEGATION = "not|no|without|never|isn't|lacking";

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
    const opened = /(?:^|\b(?:with|without|wearing|in|has|having|is|not|no))\s*$/i;
    if (denied.test(left) && !/^\s*or\b/i.test(right)) left = left.replace(denied, "");
    if (opened.test(left) && goesOn.test(right) && !/^\s*,/.test(right)) {
      right = right.replace(goesOn, " ");
    } else {
      const ends = !right.trim() || /^\s*[,.;]/.test(right);
      const serving = /(?:[,\s]+|\b(?:and|or|with|without|wearing|in|has|having|is|who)\s+)+$/i;
      left = left.replace(serving, ends ? "" : " ");
    }
  }
  return tidy(left + right);
}

/** One space between words, no word twice, no comma alone, "a" and "an" as the next letter wants them. */
const tidy = (text) => text.replace(/[^\S\n]+/g, " ").replace(/\b(\w+)( \1\b)+/gi, "$1").replace(/ ([,.;])/g, "$1")
  .replace(/,(\s*,)+/g, ",").replace(/^[\s,;]+|[\s,;]+$/g, "")
  .replace(/\b([Aa])n(?= [^aeiou\s])/g, "$1").replace(/\b([Aa])(?= [aeio])/g, "$1n");

/** The text without everything that claims one of these attributes. */
function without(text, claims, attributes) {
  const places = new Map();
  const also = []; // what words that go have said besides
  for (const claim of claims) {
    const place = `${claim.start} ${claim.end}`;
    places.set(place, [...(places.get(place) ?? []), claim]);
  }
  for (const here of [...places.values()].sort((a, b) => b[0].start - a[0].start)) {
    if (!here.some((claim) => attributes.includes(claim.attribute))) continue;
    const [start, end] = [unitAt(text, here[0].start), unitAt(text, here[0].end)];
    const rest = here.filter((claim) => !attributes.includes(claim.attribute));
    const said = text.slice(start, end);
    const sex = (claim) => claim.attribute === "Male";
    let instead = "";
    if (attributes.includes("Male") && here.some(sex)) { // a noun or a pronoun
      const others = rest.map((claim) => wordsFor(claim.attribute, claim.value));
      instead = [...others, NEUTRAL[said.toLowerCase()] ?? "person"].join(" ");
    } else if (rest.some(sex)) {
      instead = wordsFor("Male", rest.find(sex).value); // "girl" without young
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

/** The text with a fact switched; `switchedOff` remembers what was there, so that the next switch gives it back. */
export async function switched(text, attribute, value, switchedOff) {
  const now = await analyze(text);
  if (now.attributes[attribute] === value) {
    const after = await takeOut(text, now, [attribute]);
    switchedOff.set(attribute, { value, before: text, after });
    return after;
  }
  const was = switchedOff.get(attribute);
  switchedOff.delete(attribute);
  if (was?.value === value && was.after === text) return was.before;
  const rivals = value ? ONE_OF.filter((group) => group.includes(attribute)).flat() : [];
  const gone = [attribute, ...rivals].filter((name) => name in now.attributes);
  if (attribute === "Goatee" || attribute === "Mustache") gone.push("No_Beard");
  return plus(await takeOut(text, now, gone), attribute, value);
}
