// Who comes out when nobody says who? What the judge sees in many pictures, in bars, beside what the words left open.

import { bars } from "./badges.js";
import { openPanel, readEdits, setEdits, canDo } from "./edits.js";
import { ask, jobPath } from "./server.js";
import { h, loadStyle, openSheet, plural, quiet } from "./ui.js";

const HAIR = ["Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "Bald"];
const MOST_JOBS = 24;
/** What is counted: a title, the attributes that decide it, and the choices, each a question to one picture's probabilities. */
const FACETS = [["Sex", ["Male"], [["women", (seen) => seen.Male < 0.5], ["men", (seen) => seen.Male >= 0.5]]],
  ["Age", ["Young"], [["young", (seen) => seen.Young >= 0.5], ["old", (seen) => seen.Young < 0.5]]],
  ["Hair", HAIR, HAIR.map((name) => [name.replace("_Hair", "").toLowerCase(), (seen) => HAIR.every((other) => seen[name] >= seen[other])])],
  ["Expression", ["Smiling"], [["smiling", (seen) => seen.Smiling >= 0.5], ["serious", (seen) => seen.Smiling < 0.5]]],
  ["Worn", ["Eyeglasses", "Wearing_Hat"], [["glasses", (seen) => seen.Eyeglasses >= 0.5], ["a hat", (seen) => seen.Wearing_Hat >= 0.5]]],
  ["Skin", ["Pale_Skin"], [["called pale", (seen) => seen.Pale_Skin >= 0.5]]]];

/** The judged pictures of jobs; those of a list are asked for, for a list does not tell. */
async function judged(jobs) {
  const found = await Promise.all(jobs.slice(0, MOST_JOBS).map(async (job) => {
    if (job.images?.some((one) => one.attributes)) return job.images;
    return (await ask(`${jobPath(job.id)}?include=none`).catch(() => ({}))).response ?? [];
  }));
  return found.flat().map((one) => one.attributes).filter(Boolean);
}

/** Show who was drawn by these jobs; `all` says that they are many, whose words differ. */
export async function showPopulation(jobs, all) {
  const [people, said] = await Promise.all([judged(jobs), all ? {} : ask("prompt/analyze", { prompt: jobs[0].parameters.prompt }),
    loadStyle("editing.css")]);
  const claimed = said.attributes ?? {};
  const parts = FACETS.map(([title, names, choices]) => {
    const told = names.some((name) => name in claimed);
    const rows = choices.map(([name, is]) => [name, people.filter(is).length / people.length]);
    return h("section", {}, h("h3", {}, title, " ", h("span", { class: "quiet", text: all ? "" : told ? "as the words say" : "left open by the words" })), bars(rows));
  });
  const dialog = openSheet("population", "Who came out", "population", [
    quiet(people.length ? `${plural(people.length, "picture")}, as the judge sees them.` : "The judge has seen none of these pictures."),
    people.length ? h("div", { class: "facets" }, ...parts) : "",
    quiet("The training pictures are skewed: celebrities, mostly young, more women than men, mostly light-skinned, and so is what nobody decides. Labels such as “pale” are theirs.")]);
  if (canDo("balance")) {
    const input = h("input", { type: "checkbox", change: () => { setEdits({ balance: input.checked }); openPanel("vary"); } });
    input.checked = Boolean(readEdits().balance);
    dialog.append(h("label", { class: "check" }, input, h("span", { text: "Balance the next pictures" })));
  }
}
