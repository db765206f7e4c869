// Which picture is to be changed, how far, and where? The panel of a picture to start from.

import { crop } from "./crop.js";
import { readEdits, setEdits } from "./edits.js";
import { base64Of, dataUrl } from "./pictures.js";
import { editMask } from "./mask.js";
import { send } from "./server.js";
import { bus, h, img, percent, quiet, slider, softButton } from "./ui.js";

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

/** Start from a picture that was drawn here: the face is in place already. */
export async function startFrom(url, andPaint) {
  const init_image = await base64Of(await (await send(url)).blob());
  source = null;
  setEdits({ init_image, mask: null, strength: usual.picture });
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
  return [softButton(name, text, () => input.click()), input];
}

export function build(box, options) {
  size = options.models[0].image_size;
  usual.picture = options.fields.strength?.default ?? usual.picture;
  const camera = matchMedia("(pointer: coarse)").matches ? fileButton("camera", "Camera", takePhoto, { capture: "user" }) : [];
  const zone = h("div", { class: "drop-zone" }, h("div", { class: "tools-row" }, ...fileButton("image", "Choose a picture", takePhoto), ...camera),
    quiet("Or drop or paste one here. It stays on this machine."));
  zone.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) takePhoto(file);
  });
  const image = img(null, "The picture to start from");
  const over = img(null, "The painted part is drawn anew", { class: "over" });
  const strength = slider("How much changes", { min: 0, max: 1, step: 0.05, value: usual.picture,
    words: (value) => `${percent(value)}, ${inWords(value)}` }, (value) => setEdits({ strength: value }));
  const again = softButton("settings", "Place it again", () => takePhoto(source));
  const brush = softButton("brush", h("span"), paint);
  const set = h("div", { class: "start" }, h("div", { class: "start-picture" }, image, over), h("div", { class: "start-tools" },
    brush, again, softButton("close", "Take it out", () => setEdits({ init_image: null }))), strength.box);
  const fork = quiet("");
  box.append(zone, fork, set);

  const show = () => {
    const { init_image: picture, mask, strength: value, start_timestep: start } = readEdits();
    zone.hidden = Boolean(picture);
    set.hidden = !picture;
    fork.hidden = !start;
    fork.textContent = `Goes on from an earlier drawing, ${percent(start)} of the way. Change the words or the seed.`;
    if (!picture) return;
    image.src = dataUrl(picture);
    over.hidden = !mask;
    if (mask) over.src = dataUrl(mask);
    brush.querySelector("span").textContent = mask ? "Paint again" : "Paint what changes";
    again.hidden = !source;
    strength.put(value ?? (mask ? usual.mask : usual.picture));
  };
  bus.on("edits", show);
  show();
}
