// What can be done with a job or an image from anywhere on the page? Open it, use its settings, go on from it.

import { openPanel, replaceEdits } from "./edits.js";
import { jobFrom, requestOf } from "./images.js";
import { addCard } from "./jobs.js";
import { ask, askJob, blobOf, jobPath } from "./server.js";
import { restoreForm } from "./settings.js";
import { submit } from "./submission.js";
import { $, complain, loadModule, toast } from "./ui.js";
import { goTo } from "./views.js";

/** Fill the form and the panels with a request; its model is chosen where it is here. */
export async function restore(request) {
  goTo("generate");
  if (request.model && $("model-choice")) await (await loadModule("models")).chooseModel(request.model);
  restoreForm(request, true);
  replaceEdits(request);
}

async function restoreAndSay(request) {
  await restore(request);
  toast("Settings restored.");
}

/** Something that needs an answer first; what goes wrong is said. */
export async function attempt(act) {
  try {
    await act();
  } catch (error) {
    if (error.status !== 0) toast(error.message, { trouble: true });
  }
}

/** The panel of an image to start from. */
export async function photoPanel() {
  goTo("generate");
  await openPanel("photo");
  return loadModule("photo");
}

/** What is known of an image that was brought here. */
export async function about(file, found = null) {
  const known = found ?? await ask("inspect", file);
  const { showTrust } = await loadModule("trust");
  await showTrust(file, known, {
    restore: restoreAndSay, start: async (given) => (await photoPanel()).takePhoto(given),
  });
}

export const actions = {
  open: (...given) => attempt(async () => (await loadModule("viewer", "viewer.css")).openViewer(actions, ...given)),
  /** Bring a job of the gallery to the stage, wherever it stands. */
  async show({ id }) {
    goTo("generate");
    try {
      const body = await askJob(id);
      addCard(jobFrom(body), body).box.scrollIntoView({ block: "nearest" });
    } catch (error) {
      complain("It could not be shown", error);
    }
  },
  /** The settings of a job, or of one of its images, with more changes. */
  use: (job, index = null, changes = {}, panel = null) => attempt(async () => {
    await restoreAndSay({ ...await requestOf(job, index), ...changes });
    if (panel) await openPanel(panel, true);
    else $("prompt").focus();
  }),
  again: (job, otherSeed) => attempt(async () => {
    const request = await requestOf(job);
    goTo("generate");
    const { variation_seed, ...others } = { ...request, seed: otherSeed ? null : request.seed };
    await submit(otherSeed ? others : request);
  }),
  /** Lead from one image to another. */
  blend: (one, other) => attempt(async () => {
    const changes = await (await loadModule("blend")).between(one, other);
    await actions.use(one.job, one.index, changes, "blend");
  }),
  /** Go on from a denoising step of an image, with other words or another seed. */
  fork: (one, t, total) => attempt(async () => {
    const { latent } = await ask(`${jobPath(one.job.id)}latents/${one.index}?t=${t}`);
    const changes = { latent, start_timestep: t / total, init_image: null, interpolate_to: null };
    await actions.use(one.job, one.index, changes, "photo");
    $("prompt").focus();
  }),
  refine: (one) => attempt(async () => (await loadModule("refine", "viewer.css")).openRefine(one)),
  before: (one) => attempt(async () => (await loadModule("refine", "viewer.css")).openBefore(one)),
  trust: (one) => attempt(async () => about(await blobOf(one.url))),
  who: (job) => attempt(async () => {
    (await loadModule("population")).showPopulation([job].flat(), Array.isArray(job));
  }),
  /** Start from one image: change it, or only a part of it. */
  edit: (one, andPaint) => attempt(async () => {
    await (await photoPanel()).startFrom(one.url, andPaint);
    $("prompt").focus();
  }),
  compare: (pair) => attempt(async () => (await loadModule("compare", "viewer.css")).compare(pair, actions)),
};
