// Which part of an image is inpainted? Painted with a brush, or chosen from shapes that lie where faces lie.

import { icon } from "./icons.js";
import { dataUrl } from "./images.js";
import { announce, h, iconButton, img, on, openSheet, percent, quiet, segments, slider, softButton } from "./ui.js";

const COLOUR = "#12b5a5";
const MAX_UNDO = 60;
const TURN = 2 * Math.PI;

/** Shapes in shares of the image: the training images are aligned, so eyes and mouths are always at the same place. */
const oval = (x, y, rx, ry, to = new Path2D()) => {
  to.moveTo(x + rx, y);
  to.ellipse(x, y, rx, ry, 0, 0, TURN);
  return to;
};
const HEAD = "M.08 1C.02.4.16 0 .5 0S.98.4.92 1Z"; // with hair down to the shoulders
// face and neck
const SKIN = "M.245 .54C.245 .3.34 .17.5 .17S.755 .3.755 .54"
  + "C.755 .72.7 .84.66 .9L.69 1H.31L.34 .9C.3 .84.245 .72.245 .54Z";
const PRESETS = [["Eyes", () => oval(0.365, 0.415, 0.125, 0.085, oval(0.635, 0.415, 0.125, 0.085))],
  ["Mouth", () => oval(0.5, 0.695, 0.18, 0.1)],
  ["Nose", () => oval(0.5, 0.54, 0.1, 0.13)], ["Face", () => oval(0.5, 0.53, 0.28, 0.37)],
  ["Hair", () => new Path2D(HEAD + SKIN)], ["Background", () => new Path2D(`${HEAD}M0 0H1V1H0Z`)]];

/** Let somebody paint; resolves to a base64 PNG (white is inpainted), null for none, undefined to change nothing. */
export async function editMask(image, mask, size) {
  const canvas = h("canvas", { width: size, height: size, tabindex: "0", role: "application",
    "aria-label": "The image: arrow keys move the brush, space paints. The shapes below work without painting." });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const ring = h("i.ring", { hidden: true });
  let erasing = false;
  let brush = Math.round(size / 8);
  let last = null;
  let spot = { x: size / 2, y: size / 2 }; // of the keyboard's brush
  const undone = [];
  const done = [];

  const whole = () => pen.getImageData(0, 0, size, size);
  const keepState = () => { done.push(whole()); if (done.length > MAX_UNDO) done.shift(); undone.length = 0; };
  const back = (from, to, said) => {
    if (!from.length) return;
    to.push(whole());
    pen.putImageData(from.pop(), 0, 0);
    update(said);
  };
  const covered = () => whole().data.reduce((sum, value, at) => sum + (at % 4 === 3 && value >= 128), 0) / size ** 2;
  const update = (said) => {
    const share = covered();
    status.textContent = share ? `${percent(Math.max(0.01, share))} of the image is inpainted.`
      : "Nothing is painted yet.";
    const held = document.activeElement;
    undo.disabled = !done.length;
    redo.disabled = !undone.length;
    use.disabled = !share;
    if (held?.disabled) canvas.focus(); // or keys would do nothing
    if (said) announce(`${said}. ${status.textContent}`);
  };
  const dab = (to, from = to) => {
    pen.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    Object.assign(pen, { strokeStyle: COLOUR, lineWidth: brush, lineCap: "round", lineJoin: "round" });
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x + 0.01, to.y);
    pen.stroke();
    pen.globalCompositeOperation = "source-over";
  };
  const fill = (path) => {
    pen.save();
    pen.scale(size, size);
    pen.fillStyle = COLOUR;
    pen.fill(path, "evenodd");
    pen.restore();
  };
  const cover = (opacity) => { // as a function of what grey and opacity were
    const now = whole();
    for (let at = 0; at < now.data.length; at += 4) now.data[at + 3] = opacity(now.data[at], now.data[at + 3]);
    pen.putImageData(now, 0, 0);
    pen.globalCompositeOperation = "source-atop"; // what was empty had no colour
    pen.fillStyle = COLOUR;
    pen.fillRect(0, 0, size, size);
    pen.globalCompositeOperation = "source-over";
  };
  const act = (name, change) => () => { keepState(); change(); update(name); };

  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * size, y: ((event.clientY - box.top) / box.height) * size };
  };
  const showRing = ({ x, y }) => {
    ring.hidden = false;
    for (const [name, value] of [["left", x], ["top", y], ["width", brush], ["height", brush]]) {
      ring.style[name] = `${(100 * value) / size}%`;
    }
  };
  on(canvas, "pointerdown", (event) => {
    if (event.button) return;
    keepState();
    last = point(event);
    canvas.setPointerCapture(event.pointerId);
    dab(last);
  });
  const dragTo = (next) => { dab(next, last); last = next; };
  on(canvas, "pointermove", (event) => {
    if (last) for (const one of event.getCoalescedEvents?.() ?? []) dragTo(point(one));
    showRing(point(event));
    if (last) dragTo(point(event));
  });
  for (const end of ["pointerup", "pointercancel"]) on(canvas, end, () => { if (last) update(); last = null; });
  on(canvas, "pointerleave", () => { ring.hidden = true; });
  on(canvas, "focus", () => { if (canvas.matches(":focus-visible")) showRing(spot); });
  on(canvas, "keydown", (event) => {
    const by = size / (event.shiftKey ? 8 : 32);
    const go = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] }[event.key];
    if (go) spot = { x: Math.max(0, Math.min(size, spot.x + go[0])), y: Math.max(0, Math.min(size, spot.y + go[1])) };
    else if (event.key === " " || event.key === "Enter") act("Painted", () => dab(spot))();
    else return;
    event.preventDefault();
    showRing(spot);
  });

  const kinds = segments(h("div.segments"), "mask-tool", [["Brush", "brush"], ["Eraser", "eraser"]], "brush",
    (value) => { erasing = value === "eraser"; });
  const width = slider("Size", {
    min: 2, max: size / 2, step: 1, value: brush, words: (value) => percent(value / size) },
    (value) => { brush = value; });
  const undo = iconButton("undo", "Undo", () => back(done, undone, "Undone"));
  const redo = iconButton("redo", "Redo", () => back(undone, done, "Done again"));
  const status = quiet("", { role: "status" });
  const use = softButton("check", "Use this part", null, { class: "soft strong" });
  const none = h("button.soft", "Change the whole image");
  const parts = [h("div.painting", img(dataUrl(image), "", { draggable: "false" }), canvas, ring),
    h("div.painting-tools", kinds, undo, redo,
      softButton("invert", "Invert", act("Inverted", () => cover((grey, before) => 255 - before))),
      h("button.soft", { click: act("Cleared", () => pen.clearRect(0, 0, size, size)), text: "Clear" })),
    width.box,
    h("div.chips", { role: "group", "aria-label": "Shapes" }, ...PRESETS.map(([name, path]) => (
      h("button.chip", { click: act(name, () => fill(path())) }, icon("plus"), name)))),
    h("div.sheet-foot", status, mask && none, use)];
  if (mask) {
    const before = new Image();
    before.src = dataUrl(mask);
    await before.decode().catch(() => {});
    pen.drawImage(before, 0, 0, size, size);
    cover((grey) => (grey >= 128 ? 255 : 0));
  }
  update();
  return new Promise((resolve) => {
    let made;
    const dialog = openSheet("mask", "Paint what is inpainted", "cutter", parts, () => resolve(made));
    on(dialog, "keydown", (event) => {
      if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z") return;
      event.preventDefault();
      event.stopPropagation();
      (event.shiftKey ? redo : undo).click();
    });
    on(none, "click", () => { made = null; dialog.close(); });
    on(use, "click", () => {
      const now = whole();
      for (let at = 0; at < now.data.length; at += 4) {
        now.data.fill(now.data[at + 3] >= 128 ? 255 : 0, at, at + 3);
        now.data[at + 3] = 255;
      }
      const page = h("canvas", { width: size, height: size });
      page.getContext("2d").putImageData(now, 0, 0);
      made = page.toDataURL("image/png").split(",")[1];
      dialog.close();
    });
  });
}
