// Was a picture made here, and is its receipt true? What its file says, what its pixels say, and what drawing it again says.

import { canDo } from "./edits.js";
import { addressOf } from "./pictures.js";
import { ask, jobPath } from "./server.js";
import { h, icon, img, loadStyle, openSheet, percent, quiet, softButton } from "./ui.js";

const VERDICTS = { exact: ["Exact", "Drawn again, it is the same in every pixel."], visually_equal: ["Visually equal", "Drawn again, it differs by less than an eye can see."],
  different: ["Different", "What its receipt draws is another picture: one of the two was changed."] };
const PAUSE_MS = 700;

/** Draw a PNG again from its receipt; resolves to the verdict, tells how far it is. */
async function verify(file, tell) {
  const { job_id: id } = await ask("verify", file);
  for (;;) {
    const job = await ask(`${jobPath(id)}?include=none`);
    if (job.finished) return ask(`${jobPath(id)}verdict`);
    tell(job.status === "running" ? `Drawing it again: ${percent(job.progress)}` : "Waiting for its turn …");
    await new Promise((done) => setTimeout(done, PAUSE_MS));
  }
}

function finding(good, title, text) {
  return h("li", { class: "finding", data: { good: good ? "yes" : "" } },
    icon(good ? "check" : "minus"), h("div", {}, h("b", { text: title }), quiet(text)));
}

/** Show what is known of a picture. `actions` = {restore(request), start(file)}. */
export async function showTrust(file, found, actions) {
  await loadStyle("editing.css");
  const { request, watermark, model_matches: matches } = found;
  const list = h("ul", { class: "findings" },
    request ? finding(true, "It has a receipt", `“${request.prompt || "any face"}”, seed ${request.seed}${matches ? "" : ", by another model than the one that is loaded"}`)
      : finding(false, "No receipt", "The file does not say how it was drawn: it comes from elsewhere, or a program took that out."));
  if (watermark) {
    list.append(watermark.found ? finding(true, "The watermark is in its pixels", `Drawn by this project: by chance this happens less than once in ${Math.max(1, Math.floor(1 / Math.max(watermark.p_value, 1e-6))).toLocaleString()} pictures.`)
      : finding(false, "No watermark", "Nothing in the pixels says that it was drawn here. Strong changes can remove it, so this proves nothing."));
  }
  const said = quiet("", { role: "status" });
  const check = softButton("shield", "Draw it again to check", async () => {
    check.disabled = true;
    try {
      const { verdict, max_difference: most } = await verify(file, (text) => { said.textContent = text; });
      const [title, text] = VERDICTS[verdict];
      list.append(finding(verdict !== "different", title, `${text} The largest difference is ${most} of 255.`));
      said.textContent = title;
      check.remove();
    } catch (error) {
      said.textContent = error.message;
      check.disabled = false;
    }
  });
  const then = (act) => () => { dialog.close(); act(); };
  const dialog = openSheet("trust", "About this picture", "", [
    h("div", { class: "trust" }, img(await addressOf(file), "The picture"), list), said,
    h("div", { class: "sheet-foot" },
      request && file.type === "image/png" && check,
      request && softButton("settings", "Use its settings", then(() => actions.restore(request))),
      canDo("init_image") && softButton("image", "Start from it", then(() => actions.start(file)), { class: "soft strong" }))]);
}
