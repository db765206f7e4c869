// What does the model understand of the prompt? Marks unknown words while somebody types, and offers the nearest known ones.

import { ask } from "./server.js";

const WAIT_MS = 250;

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** An attribute's name in the words of people: ("Wavy_Hair", false) -> "not wavy hair". */
function factText(name, value) {
  if (name === "Male") return value ? "man" : "woman";
  if (name === "Young") return value ? "young" : "not young";
  if (name === "No_Beard") return value ? "no beard" : "beard";
  const words = name === "5_o_Clock_Shadow" ? "stubble" : name.replaceAll("_", " ").toLowerCase();
  return value ? words : `not ${words}`;
}

/** Watch a text area; `marks` lies under it letter for letter, `notes` says what was found. Returns a function to look now. */
export function watchPrompt(area, marks, notes) {
  let timer = 0;
  let asked = 0;

  function replaceWord(word) {
    const letters = Array.from(area.value); // the server counts code points, JavaScript counts UTF-16 units
    area.value = [...letters.slice(0, word.start), word.suggestion, ...letters.slice(word.end)].join("");
    area.focus();
    area.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function showMarks(words) {
    const letters = Array.from(area.value);
    const parts = [];
    let at = 0;
    for (const word of words.filter((one) => one.status !== "known")) {
      parts.push(letters.slice(at, word.start).join(""));
      parts.push(element("mark", word.status, letters.slice(word.start, word.end).join("")));
      at = word.end;
    }
    parts.push(`${letters.slice(at).join("")}\n`); // a last empty line has height only with something after it
    marks.replaceChildren(...parts);
    marks.scrollTop = area.scrollTop;
  }

  function showNotes(found) {
    const rows = [];
    const facts = Object.entries(found.attributes);
    if (facts.length) {
      const row = element("div", "chips facts", "");
      row.append(element("span", "visually-hidden", "Understood: "));
      for (const [name, value] of facts) row.append(element("span", "fact", factText(name, value)), " ");
      rows.push(row);
    }
    const fixable = found.words.filter((word) => word.status === "unknown" && word.suggestion);
    if (fixable.length) {
      const row = element("div", "chips", "");
      row.append(element("span", "", "Not a word it knows. Use instead:"));
      for (const word of fixable) {
        const button = element("button", "chip", `${word.text} → ${word.suggestion}`);
        button.type = "button";
        button.addEventListener("click", () => replaceWord(word));
        row.append(button);
      }
      rows.push(row);
    }
    for (const text of found.contradictions) rows.push(element("p", "contradiction", `${text}.`));
    const said = fixable.map((word) => `"${word.text}" `);
    for (const text of found.warnings.filter((one) => !said.some((start) => one.startsWith(start)))) {
      rows.push(element("p", "", text));
    }
    notes.replaceChildren(...rows);
  }

  async function look() {
    clearTimeout(timer);
    const text = area.value;
    const number = ++asked;
    if (!text.trim()) {
      showMarks([]);
      notes.replaceChildren();
      return;
    }
    try {
      const found = await ask("prompt/analyze", { prompt: text });
      if (number !== asked || text !== area.value) return; // somebody went on typing
      showMarks(found.words);
      showNotes(found);
    } catch {
      showMarks([]); // marks are a service, not a condition: the request itself will say what is wrong
      notes.replaceChildren();
    }
  }

  area.addEventListener("input", () => {
    showMarks([]);
    clearTimeout(timer);
    timer = setTimeout(look, WAIT_MS);
  });
  area.addEventListener("scroll", () => {
    marks.scrollTop = area.scrollTop;
  });
  return look;
}
