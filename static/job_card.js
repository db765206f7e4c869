// What happens to one job? Its card on the stage, from waiting to its end.

import { canDo, editsInWords, modelNames } from "./edits.js";
import { icon } from "./icons.js";
import { deleteJob, fileName, heart, imageOf, imagesOf, jobFrom, stepsOf, tile, wordsOf } from "./images.js";
import { ask, askJob, follow, jobPath } from "./server.js";
import { archiveOf, canShare, collageOf, copy, linkTo, share } from "./sharing.js";
import { announce, bus, complain, h, iconButton, loadModule, plural, seconds, softButton } from "./ui.js";

const iconLink = (name, title, href, download) => (
  h("a.round.plain", { href, download, "aria-label": title, title }, icon(name)));

export class JobCard {
  /** `actions`: see actions.js; and `remove`, which takes the card away. */
  constructor(job, actions) {
    Object.assign(this, { job, actions, finished: false, share: 0, began: null, announced: 0 });
    const { parameters: asked } = job;
    const words = wordsOf(job);
    this.status = h("p.job-status");
    this.bar = h("progress", { max: 1, value: 0, "aria-label": `Progress: ${words}` });
    this.cancel = h("button.soft", {
      text: "Cancel", "aria-label": `Cancel: ${words}`, click: () => this.askToCancel(),
    });
    this.live = h("div.job-live", this.status, this.cancel, this.bar);
    this.trouble = h("div.job-trouble", { hidden: true });
    this.buttons = h("div.job-actions");
    const details = [plural(asked.n_inf_steps, "step"), asked.sampler, `guidance ${asked.guidance_scale}`];
    if (modelNames().length > 1) details.unshift(asked.model);
    if (asked.negative_prompt) details.push(`without ${asked.negative_prompt}`);
    details.push(...editsInWords(asked).map(([text]) => text));
    this.tiles = Array.from({ length: asked.n_images }, (_, index) => this.tileFor(imageOf(job, index)));
    const title = h("h3.words", { text: words, id: `job-${job.id}` });
    this.box = h("article.job", { "aria-labelledby": title.id, data: { job: job.id, state: job.status } },
      h("header.job-head", h("div", title, h("p.quiet", details.join(" · "))), this.buttons),
      this.live, this.trouble,
      h("ol", { class: `tiles ${asked.interpolate_to ? "strip" : ""}`, data: { count: asked.n_images } },
        ...this.tiles.map((one) => one.made)));
    this.setButtons();
  }

  /** The tile of an image that is not there yet. */
  tileFor(one) {
    const { job, actions } = this;
    const made = tile(one, {
      open: ({ index }) => actions.open(imageOf(job, index), imagesOf(job)),
      src: null, name: `Face ${one.index + 1} of ${job.parameters.n_images}`, tools: false,
    });
    const [button, image] = [made.querySelector("button"), made.querySelector("img")];
    button.disabled = true;
    image.hidden = true;
    image.loading = "eager";
    const step = h("span.step", { "aria-hidden": "true" });
    made.append(step);
    return { made, button, image, step, one };
  }

  // ---- what is told about it

  /** From the event stream. */
  event(kind, data) {
    if (kind === "status") this.setStatus(data.status, data);
    if (kind === "progress") this.setProgress(data.t, data.total_t);
    if (kind === "preview") this.setPreview(data);
    if (kind === "image") this.setImage(data);
    if (kind === "done") this.conclude();
  }

  /** From the answer to a question. */
  state(body) {
    Object.assign(this.job, jobFrom(body));
    this.setStatus(body.status, body);
    const total = stepsOf(body.parameters);
    if (body.status === "running" && !body.loading) this.setProgress(Math.round(body.progress * total), total);
    for (const entry of body.response ?? []) {
      if (body.status === "succeeded") this.setImage(entry);
      else this.setPreview(entry);
    }
    if (body.finished) this.finish();
  }

  setStatus(status, { queue_position: position, restarted, loading }) {
    if (this.finished || !["queued", "running"].includes(status)) return; // an end is shown with all that belongs to it
    this.job.status = this.box.dataset.state = status;
    if (status === "queued") {
      const place = position > 1 ? `Waiting, number ${position} in the queue` : "Next in the queue";
      this.status.textContent = restarted ? "The server was restarted: generated again from the same seed" : place;
      this.bar.removeAttribute("value");
      this.began = null;
      this.share = 0;
    } else if (loading || !this.began) {
      this.status.textContent = loading ? `Loading ${loading} …` : "Starting …";
      if (loading) announce(this.status.textContent);
      if (!this.began) this.bar.value = 0;
      bus.emit("loading", loading);
    }
  }

  setProgress(done, total) {
    if (this.finished) return;
    const now = performance.now();
    if (!this.began || done < this.began.done) this.began = { done, now };
    this.share = total ? done / total : 0;
    const steps = done - this.began.done;
    const left = steps < 2 ? 0 : ((now - this.began.now) / steps / 1000) * (total - done);
    this.bar.value = this.share;
    this.status.textContent = `Step ${done} of ${total}${left < 0.5 ? "" : ` · about ${seconds(left)} left`}`;
    const quarter = Math.floor(this.share * 4);
    if (quarter > this.announced && quarter < 4) announce(`${quarter * 25} percent: ${wordsOf(this.job)}`);
    this.announced = quarter;
    bus.emit("progress");
  }

  /** Show the newest preview; one at a time is fetched, so that no line carries more than it can. */
  async setPreview(about) {
    const target = this.tiles[about.index];
    if (!target || target.final) return;
    const idle = !target.next;
    target.next = about;
    target.seen = true;
    for (let shown = null; idle && !target.final && shown !== target.next && !document.hidden;) {
      shown = target.next;
      await this.show(target, `${target.one.thumbnail}?t=${shown.t}`, () => !target.final);
      if (!target.final && !this.finished) target.step.textContent = `${shown.t}/${shown.total_t}`;
    }
    if (idle) target.next = null;
  }

  /** Show a finished image: small first, which is there at once on any line. */
  async setImage(about) {
    const target = this.tiles[about.index];
    if (!target || target.final) return;
    target.seen = true;
    target.step.textContent = "";
    this.complete(target, about);
    await this.show(target, target.one.thumbnail);
    await this.show(target, target.one.url);
  }

  /** Decoded first, so that nothing flickers. */
  async show(target, address, wanted = () => true) {
    const ready = new Image();
    ready.src = address;
    await ready.decode().catch(() => {});
    if (!ready.naturalWidth || !wanted()) return;
    target.image.src = address;
    target.image.hidden = false;
  }

  complete(target, about) {
    const { job } = this;
    const { index } = about;
    target.final = true;
    target.button.disabled = false;
    job.images = [...(job.images ?? []).filter((one) => one.index !== index), about];
    target.one = imageOf(job, index); // its own seed, which the best of many do not count up to
    const { seed, url } = target.one;
    target.button.ariaLabel = `Face ${index + 1} of ${this.tiles.length}: ${wordsOf(job)}, seed ${seed}`;
    if (about.adherence != null || about.nearest?.too_close) {
      loadModule("badges").then(async ({ badges }) => {
        target.made.append(...await badges(about, job.parameters.prompt));
      }).catch(() => {});
    }
    target.made.append(h("div.tile-tools", heart(target.one, `Favourite: face ${index + 1}`),
      iconLink("download", `Download face ${index + 1}, seed ${seed}`, url, fileName(target.one))));
  }

  // ---- the end

  async conclude() {
    try {
      this.state(await askJob(this.job.id));
    } catch (error) {
      if (error.status) this.missing(error);
      else follow(this.job.id, 0, this); // the server went away just now: ask again when it is back
    }
  }

  /** Nothing more will be told; `state` is how it ended. */
  end(state) {
    this.finished = true;
    this.share = 0;
    this.live.hidden = true;
    this.box.dataset.state = state;
    bus.emit("progress");
  }

  finish() {
    if (this.finished) return;
    const { job } = this;
    this.end(job.status);
    const anything = this.tiles.some((one) => one.seen);
    for (const one of this.tiles) {
      one.step.textContent = "";
      one.made.hidden = job.status === "succeeded" && !one.final; // it was deleted
    }
    this.box.classList.toggle("bare", !anything);
    if (job.status === "succeeded") {
      const [only, other] = imagesOf(job);
      announce(`${plural(job.parameters.n_images, "face")} finished: ${wordsOf(job)}`);
      if (job.parameters.interpolate_to && job.parameters.n_images > 1) this.showPlayer();
      if (job.parameters.refine && only && !other) this.showBefore(only);
    } else if (job.status === "cancelled") {
      this.explain("Cancelled", anything ? "What had appeared by then stays here." : "Nothing had appeared yet.", true);
    } else {
      const { message = "The server did not say why.", hint } = job.error ?? {};
      this.explain("This job failed", `${message} ${hint ?? ""}`);
    }
    this.setButtons();
    bus.emit("finished", job);
  }

  /** A blend can be played. */
  async showPlayer() {
    const { player } = await loadModule("player", "editing.css");
    this.box.append(player(this.job));
  }

  /** A refined image is compared with what it was. */
  async showBefore(one) {
    const { beforeAndAfter } = await loadModule("refine", "viewer.css");
    this.box.append(beforeAndAfter(one));
  }

  missing({ status, message }) {
    this.end("missing");
    this.box.classList.add("bare");
    this.explain(status === 410 ? "This job is no longer kept" : "This job is not known to the server", message);
    this.setButtons();
    bus.emit("missing", this.job.id);
  }

  explain(title, text, calm = false) {
    const retry = softButton("again", "Try again", () => this.actions.again(this.job, false));
    this.trouble.replaceChildren(h("div", h("p.notice-title", title), h("p", text)), retry);
    this.trouble.classList.toggle("calm", calm);
    this.trouble.role = calm ? "status" : "alert";
    this.trouble.hidden = false;
  }

  async askToCancel() {
    this.cancel.disabled = true;
    this.status.textContent = "Cancelling …";
    try {
      await ask(`${jobPath(this.job.id)}cancel`, {});
    } catch (error) {
      this.cancel.disabled = false;
      if (error.status) complain("It could not be cancelled", error);
    }
  }

  setButtons() {
    const { job, actions, finished } = this;
    const [only, several] = imagesOf(job);
    const done = finished && job.status === "succeeded" && only;
    this.buttons.replaceChildren(...[
      finished && iconButton("again", "Generate others like these", () => actions.again(job, true)),
      iconButton("settings", "Use these settings", () => actions.use(job)),
      done && (several ? iconLink("download", "Download all as zip", archiveOf(job), `faces-${only.seed}.zip`)
        : iconLink("download", "Download PNG", only.url, fileName(only))),
      done && iconLink("film", "Download the steps as one image", collageOf(job), `steps-${only.seed}.png`),
      done && !several && canDo("refine") && iconButton("spark", "Refine", () => actions.refine(only)),
      done && job.images?.some((one) => one.attributes)
        && iconButton("people", "Who came out", () => actions.who(job)),
      done && canShare() && iconButton("share", "Share or save to photos", () => share(imagesOf(job))),
      done && iconButton("link", "Copy a link", () => copy(linkTo(job), "Link")),
      finished && this.box.dataset.state !== "missing" && iconButton("trash", "Delete", () => deleteJob(job)),
      finished && iconButton("close", "Put away", actions.remove),
    ].filter(Boolean));
  }
}
