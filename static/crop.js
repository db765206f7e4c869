// Where in a photo is the face? A window is dragged and zoomed until the face fills the oval; no detector is needed.

import { gestures } from "./gestures.js";
import { h, on, openSheet, quiet, slider, softButton, toast } from "./ui.js";

const VIEW = 512; // pixels of the canvas in the dialog
const MAX_ZOOM = 12;
const STEP = 0.02; // of the window, for an arrow key
const ALIGNED = { width: 178, height: 218, side: 160, x: 89, y: 124 }; // CelebA's layout and its window
const OVAL = { x: 0.5, y: 0.52, rx: 0.27, ry: 0.37 }; // where faces lie in the training images

/** A square part of an image at `size` pixels, halved step by step so that fine detail is averaged and not skipped. */
function reduce(image, { x, y, side }, size) {
  const now = Math.max(size, Math.min(2048, Math.ceil(side / 2)));
  const canvas = h("canvas", { width: now, height: now });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "#fff"; // under what is transparent
  pen.fillRect(0, 0, now, now);
  pen.drawImage(image, x, y, side, side, 0, 0, now, now);
  return now > size ? reduce(canvas, { x: 0, y: 0, side: now }, size) : canvas.toDataURL("image/png").split(",")[1];
}

/** Let somebody place the face; resolves to a PNG of `size` x `size` as base64, or null. The browser obeys EXIF. */
export async function crop(file, size) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    toast("This is no image that the browser can read.", { trouble: true });
    return null;
  }
  const { width, height } = bitmap;
  const whole = Math.min(width, height);
  const at = { x: width / 2, y: height > width ? Math.max(whole / 2, height * 0.42) : height / 2, zoom: 1 };
  if (Math.abs((width * ALIGNED.height) / (height * ALIGNED.width) - 1) < 0.005) { // the face is where it always is
    const scale = width / ALIGNED.width;
    Object.assign(at, { x: ALIGNED.x * scale, y: ALIGNED.y * scale, zoom: ALIGNED.width / ALIGNED.side });
  }
  const canvas = h("canvas", { width: VIEW, height: VIEW, tabindex: "0", role: "application",
    "aria-label": "The photo: arrow keys move it, plus and minus zoom" });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  const part = () => {
    const side = whole / at.zoom;
    return { x: at.x - side / 2, y: at.y - side / 2, side };
  };
  const place = () => {
    const half = whole / at.zoom / 2;
    at.x = Math.max(half, Math.min(width - half, at.x));
    at.y = Math.max(half, Math.min(height - half, at.y));
    const { x, y, side } = part();
    pen.clearRect(0, 0, VIEW, VIEW);
    pen.drawImage(bitmap, x, y, side, side, 0, 0, VIEW, VIEW);
    pen.beginPath(); // dark outside of the oval, which is stroked twice to be seen on any ground
    pen.rect(0, 0, VIEW, VIEW);
    pen.ellipse(OVAL.x * VIEW, OVAL.y * VIEW, OVAL.rx * VIEW, OVAL.ry * VIEW, 0, 0, 2 * Math.PI, true);
    pen.fillStyle = "#0006";
    pen.fill("evenodd");
    for (const [colour, line] of [["#000a", 4], ["#fff", 2]]) {
      pen.beginPath();
      pen.ellipse(OVAL.x * VIEW, OVAL.y * VIEW, OVAL.rx * VIEW, OVAL.ry * VIEW, 0, 0, 2 * Math.PI);
      Object.assign(pen, { strokeStyle: colour, lineWidth: line });
      pen.stroke();
    }
  };
  const zoomTo = (zoom, [x, y] = [0.5, 0.5]) => { // what lies at the point stays there
    const before = whole / at.zoom;
    at.zoom = Math.max(1, Math.min(MAX_ZOOM, zoom));
    const change = before - whole / at.zoom;
    at.x += (x - 0.5) * change;
    at.y += (y - 0.5) * change;
    zoom_.put(Math.log2(at.zoom));
    place();
  };
  const move = (x, y) => { // in shares of the window
    at.x -= (x * whole) / at.zoom;
    at.y -= (y * whole) / at.zoom;
    place();
  };
  const zoom_ = slider("Zoom", { min: 0, max: Math.log2(MAX_ZOOM), step: 0.05, value: Math.log2(at.zoom),
    words: (value) => `${(2 ** value).toFixed(1)} ×` },
    (value) => zoomTo(2 ** value));

  const share = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  gestures(canvas, share, move, (factor, middle) => zoomTo(at.zoom * factor, middle), 400);
  on(canvas, "keydown", (event) => {
    const by = event.shiftKey ? 5 * STEP : STEP;
    const keys = {
      ArrowLeft: () => move(-by, 0), ArrowRight: () => move(by, 0),
      ArrowUp: () => move(0, -by), ArrowDown: () => move(0, by),
      "+": () => zoomTo(at.zoom * 1.1), "=": () => zoomTo(at.zoom * 1.1), "-": () => zoomTo(at.zoom / 1.1),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });

  place();
  return new Promise((done) => {
    let made = null;
    const use = () => { made = reduce(bitmap, part(), size); dialog.close(); };
    const dialog = openSheet("crop", "Place the face", "cutter", [
      quiet("Drag and zoom until the face fills the oval: eyes a little above its middle, chin at its end."),
      canvas, zoom_.box,
      h("div.sheet-foot", softButton("check", "Use this part", use, { class: "soft strong" })),
    ], () => { bitmap.close(); done(made); });
  });
}
