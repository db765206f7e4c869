// Which picture is to be changed, how far, and where? The panel of a picture to start from.

import { crop } from "./crop.js";
import { readEdits, setEdits } from "./edits.js";
import { base64Of, dataUrl } from "./pictures.js";
import { editMask } from "./mask.js";
import { bus, h, icon, slider, toast } from "./ui.js";

let size = 128;
let source = null; // the file that the picture was cut from
let usual = { picture: 0.6, mask: 1 };

const inWords = (value) => (value === 0 ? "a copy" : value < 0.35 ? "close to it" : value < 0.7 ? "freely" : value < 1 ? "loosely" : "all new");

/** Cut the face out of a photo, in the dialog, and start from it. */
export async function takePhoto(file) {
  const cut = await crop(file, size);
  if (!cut) return;
  source = file;
  setEdits({ init_image: cut, mask: null, strength: usual.picture });
}

/** Start from a picture that is in place already, such as one drawn here. */
export async function takePicture(blob, andPaint) {
  source = null;
  setEdits({ init_image: await base64Of(blob), mask: null, strength: usual.picture });
  if (andPaint) await paint();
}

async function paint() {
  const { init_image: picture, mask, strength } = readEdits();
  const made = await editMask(picture, mask, size);
  if (made === undefined) return;
  const before = mask ? usual.mask : usual.picture;
  setEdits({ mask: made, strength: strength === before || !strength ? (made ? usual.mask : usual.picture) : strength });
}

/** A button for a file; its input stays out of sight. */
export function fileButton(name, text, take, given = {}) {
  const input = h("input", { type: "file", accept: "image/*", hidden: true, ...given, change: () => {
    const [file] = input.files;
    input.value = "";
    if (file) take(file);
  } });
  return [h("button", { class: "soft", click: () => input.click() }, icon(name), text), input];
}

export function build(box, options) {
  size = options.models[0].image_size;
  usual.picture = options.fields.strength?.default ?? usual.picture;
  const camera = matchMedia("(pointer: coarse)").matches ? fileButton("camera", "Camera", takePhoto, { capture: "user" }) : [];
  const zone = h("div", { class: "drop-zone" }, h("div", { class: "tools-row" }, ...fileButton("image", "Choose a picture", takePhoto), ...camera),
    h("p", { class: "quiet", text: "Or drop or paste one here. It stays on this machine." }));
  zone.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) takePhoto(file);
  });
  const image = h("img", { alt: "The picture to start from", width: 128, height: 128 });
  const over = h("img", { class: "over", alt: "", width: 128, height: 128 });
  const strength = slider("How much changes", { min: 0, max: 1, step: 0.05, value: usual.picture, words: (value) => `${Math.round(100 * value)} %, ${inWords(value)}` },
    (value) => setEdits({ strength: value }));
  const again = h("button", { class: "soft", click: () => takePhoto(source) }, icon("settings"), "Place it again");
  const brush = h("button", { class: "soft", click: paint }, icon("brush"), h("span"));
  const set = h("div", { class: "start" }, h("div", { class: "start-picture" }, image, over), h("div", { class: "start-tools" },
    brush, again, h("button", { class: "soft", click: () => setEdits({ init_image: null }) }, icon("close"), "Take it out")), strength.box);
  const fork = h("p", { class: "quiet" });
  box.append(zone, fork, set);

  const show = () => {
    const { init_image: picture, mask, strength: value, start_timestep: start } = readEdits();
    zone.hidden = Boolean(picture);
    set.hidden = !picture;
    fork.hidden = !start;
    fork.textContent = start ? `Goes on from an earlier drawing, ${Math.round(100 * start)} % of the way. Change the words or the seed.` : "";
    if (!picture) return;
    image.src = dataUrl(picture);
    over.hidden = !mask;
    if (mask) over.src = dataUrl(mask);
    over.alt = mask ? "The painted part is drawn anew" : "";
    brush.querySelector("span").textContent = mask ? "Paint again" : "Paint what changes";
    again.hidden = !source;
    strength.put(value ?? (mask ? usual.mask : usual.picture));
  };
  bus.on("edits", show);
  show();
}

/** What the server says a picture is: fetched, and started from. */
export async function startFrom(url, andPaint) {
  try {
    await takePicture(await (await fetch(url)).blob(), andPaint);
  } catch (error) {
    toast(`The picture could not be loaded: ${error.message}`, { trouble: true });
  }
}
