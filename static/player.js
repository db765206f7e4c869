// How does one image become the other? The images of a blend, forward and back, with fading between them.

import { setIcon } from "./icons.js";
import { imagesOf } from "./images.js";
import { jobPath } from "./server.js";
import { h, iconButton, img, on, percent, wantsStillness } from "./ui.js";

const FRAME_MS = 220;

export function player(job) {
  const images = imagesOf(job).map((one) => img(one.url));
  let timer = 0;
  let step = 1;
  const at = h("input", {
    type: "range", min: 0, max: images.length - 1, value: 0, step: "any", "aria-label": "Place between the two",
  });
  const show = () => { // the nearest two, one over the other
    const value = Number(at.value);
    for (const [number, image] of images.entries()) image.style.opacity = Math.max(0, Math.min(1, 1 - number + value));
    at.ariaValueText = `${percent(value / (images.length - 1))} of the way`;
  };
  const stop = () => { clearInterval(timer); timer = 0; setIcon(play, "play", "Play the blend"); };
  const start = () => {
    setIcon(play, "pause", "Pause");
    const by = wantsStillness() ? 1 : 0.25;
    timer = setInterval(() => {
      if (!play.isConnected) stop();
      let next = Number(at.value) + step * by;
      if (next > images.length - 1 || next < 0) { step = -step; next = Number(at.value) + step * by; }
      at.value = next;
      show();
    }, wantsStillness() ? 4 * FRAME_MS : FRAME_MS / 4);
  };
  const play = iconButton("play", "Play the blend", () => (timer ? stop() : start()));
  on(at, "input", () => { if (timer) stop(); show(); });
  show();
  const link = (kind) => h("a.soft", {
    href: `${jobPath(job.id)}animation.${kind}`, download: `blend-${job.parameters.seed}.${kind}`,
    text: kind.toUpperCase(), "aria-label": `Download as animated ${kind.toUpperCase()}`,
  });
  return h("div.player", h("div.player-screen", ...images), h("div.player-tools", play, at, link("webp"), link("gif")));
}
