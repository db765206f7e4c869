// Which image is to be changed, how far, and where? The panel of an image to start from.

import { crop } from "./crop.js";
import { readEdits, setEdits } from "./edits.js";
import { base64Of, dataUrl } from "./images.js";
import { editMask } from "./mask.js";
import { blobOf } from "./server.js";
import { bus, h, img, on, percent, quiet, slider, softButton } from "./ui.js";

let size = 128;
let source = null; // the file that the image was cut from
let usual = { image: 0.6, mask: 1 };

const inWords = (value) => (value === 0 ? "a copy" : value < 0.35 ? "close to it" : value < 0.7 ? "freely"
  : value < 1 ? "loosely" : "all new");

/** Cut the face out of a photo, in the dialog, and start from it. */
export async function takePhoto(file) {
  const cut = await crop(file, size);
  if (!cut) return;
  source = file;
  setEdits({ init_image: cut, mask: null, strength: usual.image });
}

/** Start from an image that was generated here: the face is in place already. */
export async function startFrom(url, andPaint) {
  const init_image = await base64Of(await blobOf(url));
  source = null;
  setEdits({ init_image, mask: null, strength: usual.image });
  if (andPaint) await paint();
}

async function paint() {
  const { init_image: image, mask, strength } = readEdits();
  const made = await editMask(image, mask, size);
  if (made === undefined) return;
  const before = mask ? usual.mask : usual.image;
  setEdits({ mask: made, strength: strength === before || !strength ? (made ? usual.mask : usual.image) : strength });
}

/** A button for a file; its input stays out of sight. */
export function fileButton(name, text, take, given = {}) {
  const input = h("input", { type: "file", accept: "image/*", hidden: true, ...given, change: () => {
    const [file] = input.files;
    input.value = "";
    if (file) take(file);
  } });
  return [softButton(name, text, () => input.click()), input];
}

export function build(box, options) {
  size = options.model.image_size;
  usual.image = options.fields.strength?.default ?? usual.image;
  const touched = matchMedia("(pointer: coarse)").matches;
  const camera = touched ? fileButton("camera", "Camera", takePhoto, { capture: "user" }) : [];
  const choose = fileButton("image", "Choose an image", takePhoto);
  const zone = h("div.drop-zone", h("div.tools-row", ...choose, ...camera),
    quiet("Or drop or paste one here. It stays on this machine."));
  on(zone, "drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) takePhoto(file);
  });
  const start = img(null, "The image to start from");
  const over = img(null, "The inpainted part", { class: "over" });
  const strength = slider("How much changes", { min: 0, max: 1, step: 0.05, value: usual.image,
    words: (value) => `${percent(value)}, ${inWords(value)}` }, (value) => setEdits({ strength: value }));
  const again = softButton("settings", "Place it again", () => takePhoto(source));
  const brush = softButton("brush", h("span"), paint);
  const set = h("div.start", h("div.start-image", start, over), h("div.start-tools",
    brush, again, softButton("close", "Take it out", () => setEdits({ init_image: null }))), strength.box);
  const fork = quiet("");
  box.append(zone, fork, set);

  const show = () => {
    const { init_image: image, mask, strength: value, start_timestep: begun } = readEdits();
    zone.hidden = Boolean(image);
    set.hidden = !image;
    fork.hidden = !begun;
    fork.textContent = `Goes on from an earlier run, ${percent(begun)} of the way. Change the words or the seed.`;
    if (!image) return;
    start.src = dataUrl(image);
    over.hidden = !mask;
    if (mask) over.src = dataUrl(mask);
    brush.querySelector("span").textContent = mask ? "Paint again" : "Paint what changes";
    again.hidden = !source;
    strength.put(value ?? (mask ? usual.mask : usual.image));
  };
  bus.on("edits", show);
  show();
}
