// How does a picture or a job go, with time to think again?

import { finishDelete, isFavourite, leaving, picturesOf } from "./pictures.js";
import { ask, jobPath } from "./server.js";
import { announce, bus, plural, toast } from "./ui.js";

function hide(key, job, hidden) {
  leaving[hidden ? "add" : "delete"](key);
  bus.emit(hidden ? "deleted" : "undeleted", job);
  return true;
}

const tell = (what, undo, gone) => toast(`${what}.`, {
  action: "Undo", act: async () => { if (await undo()) announce("Brought back."); }, gone, wait: 8000 });

/** Delete pictures at once; the server brings them back when that is taken back. */
export async function deletePictures(list, what = "Picture deleted") {
  const each = async (hidden, method, more = "") => {
    const veil = (on) => list.forEach(({ key, job }) => hide(key, { ...job, key }, on));
    veil(hidden);
    try {
      await Promise.all(list.map(({ job, index }) => ask(`${jobPath(job.id)}images/${index}${more}`, undefined, { method })));
      return true;
    } catch (error) {
      veil(!hidden);
      toast(`That could not be done: ${error.message}`, { trouble: true });
      return false;
    }
  };
  if (await each(true, "DELETE")) tell(what, () => each(false, "POST", "/restore"));
}

/** Hide a job and delete it when nobody has taken that back in time; its favourites stay. */
export function deleteJob(job) {
  if (leaving.has(job.id)) return;
  const all = picturesOf(job);
  const others = all.filter((one) => !isFavourite(one));
  const kept = all.length - others.length;
  if (kept && !others.length) toast("Favourites stay; each can be deleted where it is opened.");
  else if (kept) deletePictures(others, `${plural(others.length, "picture")} deleted, ${plural(kept, "favourite")} kept`);
  else {
    hide(job.id, job, true);
    tell(`${job.status === "succeeded" ? plural(all.length, "picture") : "Job"} deleted`, () => hide(job.id, job, false), () => finishDelete(job));
  }
}
