// How is one image laid over another, so that both are seen side by side? A divided image, and the slider that divides.

import { h, on } from "./ui.js";

/** Two images in one place: `first` to the left of the slider, `second` to its right. It is drawn over both. */
export function wipe(first, second, label) {
  first.className = "wipe-over";
  const at = h("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": label });
  const show = () => {
    first.style.clipPath = `inset(0 ${100 - at.value}% 0 0)`;
    at.ariaValueText = `${at.value} %`;
  };
  on(at, "input", show);
  show();
  return h("div.wipe-stack", second, first, at);
}
