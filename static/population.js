// Who comes out when nobody says who? What the judge sees in many pictures, in bars, beside what the words left open.

import { bars } from "./badges.js";
import { openPanel, readEdits, setEdits, canDo } from "./edits.js";
import { ask, jobPath } from "./server.js";
import { h, loadStyle, openSheet, plural, quiet } from "./ui.js";

const MOST_JOBS = 24;
const HAIR = { black: "Black_Hair", brown: "Brown_Hair", blond: "Blond_Hair", gray: "Gray_Hair", bald: "Bald" }; // the likeliest counts
/** What is counted: titles, and of each the choices with what the judge sees there, or with a "-" does not. */
const FACETS = { Sex: { women: "-Male", men: "Male" }, Age: { young: "Young", old: "-Young" }, Hair: HAIR,
  Expression: { smiling: "Smiling", serious: "-Smiling" }, Worn: { glasses: "Eyeglasses", "a hat": "Wearing_Hat" }, Skin: { "called pale": "Pale_Skin" } };

function fits(seen, choices, name) {
  if (choices === HAIR) return Object.values(HAIR).every((other) => seen[name] >= seen[other]);
  return name[0] === "-" ? seen[name.slice(1)] < 0.5 : seen[name] >= 0.5;
}

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
  const parts = Object.entries(FACETS).map(([title, choices]) => {
    const told = Object.values(choices).some((name) => name.replace("-", "") in claimed);
    const rows = Object.entries(choices).map(([text, name]) => [text, people.filter((seen) => fits(seen, choices, name)).length / people.length]);
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
