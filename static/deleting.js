// How does a picture or a job go, with time to think again? Loaded when the first is deleted.

import { isFavourite, leaving, picturesOf } from "./pictures.js";
import { ask, jobPath, send } from "./server.js";
import { announce, bus, plural, toast } from "./ui.js";

function hide(key, job, hidden) {
  leaving[hidden ? "add" : "delete"](key);
  bus.emit(hidden ? "deleted" : "undeleted", job);
}

/** Say what went, and offer to bring it back. */
function tell(what, undo, gone) {
  toast(`${what}.`, { action: "Undo", act: async () => { if (await undo() !== false) announce("Brought back."); }, gone, wait: 8000 });
}

const fail = (error) => toast(`That could not be done: ${error.message}`, { trouble: true });

/** Delete pictures at once; the server brings them back when that is taken back. */
export async function deletePictures(list, what = "Picture deleted") {
  const veil = (hidden) => list.forEach(({ key, job }) => hide(key, { ...job, key }, hidden));
  const each = async (hidden, method, more = "") => {
    try {
      await Promise.all(list.map(({ job, index }) => ask(`${jobPath(job.id)}images/${index}${more}`, undefined, { method })));
      veil(hidden);
    } catch (error) {
      veil(!hidden);
      fail(error);
      return false;
    }
  };
  veil(true);
  if (await each(true, "DELETE") !== false) tell(what, () => each(false, "POST", "/restore"));
}

/** Hide a job at once and delete it when nobody has taken that back in time; its favourites stay. */
export function deleteJob(job) {
  if (leaving.has(job.id)) return;
  const all = picturesOf(job);
  const others = all.filter((one) => !isFavourite(one));
  const kept = all.length - others.length;
  if (kept && !others.length) toast("Favourites stay; each can be deleted where it is opened.");
  else if (kept) deletePictures(others, `${plural(others.length, "picture")} deleted, ${plural(kept, "favourite")} kept`);
  else {
    hide(job.id, job, true);
    tell(`${job.status === "succeeded" ? plural(all.length, "picture") : "Job"} deleted`, () => hide(job.id, job, false), () => finish(job));
  }
}

async function finish(job) {
  if (!leaving.delete(job.id)) return;
  try {
    await ask(jobPath(job.id), undefined, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404 && error.status !== 410) {
      bus.emit("undeleted", job);
      fail(error);
      return;
    }
  }
  bus.emit("removed", job);
}

addEventListener("pagehide", () => { // a closed page means what was pressed
  for (const id of leaving) if (!id.includes("/")) send(jobPath(id), undefined, { method: "DELETE", keepalive: true }).catch(() => {});
  leaving.clear();
});
