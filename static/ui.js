// What does every part of the page need? Elements, memory, messages, dialogs. It knows neither jobs nor server.

import { icon } from "./icons.js";

export const $ = (id) => document.getElementById(id);
export const setText = (id, text) => { $(id).textContent = text; };
export const COMMAND = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘" : "Ctrl";
export const percent = (share) => `${Math.round(100 * share)} %`;
export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** What parts of the page tell each other. */
export const bus = {
  target: new EventTarget(),
  emit(name, detail) { this.target.dispatchEvent(new CustomEvent(name, { detail })); },
  on(name, listen) { on(this.target, name, (event) => listen(event.detail)); },
};

/** Listen to events, given as "pointerup pointercancel". */
export function on(target, names, listen, options) {
  for (const name of names.split(" ")) target.addEventListener(name, listen, options);
}

/**
 * An element, such as `h("button.soft", { click }, "Go")`; what is given may be left out. Functions listen, `class`,
 * `text` and `data` are what they say, null and false are left out, the rest are attributes.
 */
export function h(name, given, ...children) {
  if (given?.constructor !== Object) return h(name, {}, given, ...children);
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  if (tag === "button") made.type = "button";
  for (const [name, value] of Object.entries(given)) {
    if (value == null || value === false) continue;
    if (typeof value === "function") on(made, name, value);
    else if (name === "class") made.className = value;
    else if (name === "text") made.textContent = value;
    else if (name === "data") Object.assign(made.dataset, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child || child === 0));
  return made;
}

export const quiet = (text, given) => h("p.quiet", { text, ...given });
export const img = (src, alt = "", given = {}) => h("img", { src, alt, width: 128, height: 128, ...given });

/** A round button that shows only an icon. */
export function iconButton(name, label, click, given = {}) {
  return h("button.round.plain", { "aria-label": label, title: label, click, ...given }, icon(name));
}

export function softButton(name, text, click, given = {}) {
  return h("button.soft", { click, ...given }, icon(name), text);
}

/** A row of radio buttons that looks like one switch. Entries are [text, value] or [text, value, second line]. */
export function segments(box, name, entries, chosen, change) {
  box.replaceChildren(...entries.map(([text, value, note]) => {
    const input = h("input", { type: "radio", name, value, change: change ? () => change(value) : null });
    input.checked = value === chosen;
    return h("label", input, h("span", h("span", text), note && h("small", note)));
  }));
  return box;
}

/** A slider under its name; `words(value)` is what is said of a value, `change(value)` is told of each. */
export function slider(name, { min, max, step, value, words }, change, ...more) {
  const output = h("output", { "aria-hidden": "true" });
  const input = h("input", { type: "range", min, max, step, "aria-label": name });
  const show = () => { input.ariaValueText = output.textContent = words(Number(input.value)); };
  const put = (at) => { input.value = at; show(); };
  on(input, "input", () => { show(); change(Number(input.value)); });
  put(value);
  const title = h("div.label-row", h("span", { text: name, "aria-hidden": "true" }), output);
  return { box: h("div.slider", title, input, ...more), put, input };
}

const styles = {}; // name -> promise of a style sheet

/** A style sheet of parts that most visits never need; resolves when it is there, or did not come. */
export function loadStyle(name) {
  styles[name] ??= new Promise((done) => {
    const error = () => { link.remove(); delete styles[name]; done(); }; // the next who needs it tries again
    const link = h("link", { rel: "stylesheet", href: `static/${name}`, load: done, error });
    document.head.append(link);
  });
  return styles[name];
}

const retries = {}; // module -> how often it did not come

/**
 * A module that most visits never need, and its style sheet. A browser may remember, for as long as the page is open,
 * that a module did not come: the next try asks for it under another address.
 */
export async function loadModule(name, style) {
  const tried = retries[name] ?? 0;
  const coming = import(`./${name}.js${tried ? `?retry=${tried}` : ""}`);
  coming.catch(() => { retries[name] = tried + 1; });
  return (await Promise.all([coming, style && loadStyle(style)]))[0];
}

export function choose(box, value) {
  for (const input of box.querySelectorAll("input")) input.checked = input.value === String(value);
}

/** Change the address; `how` is pushState or replaceState. */
export function setQuery(query, how) {
  history[how](null, "", `${location.pathname}?${query}`.replace(/\?$/, ""));
}

// ---- memory of this browser

const fallback = new Map(); // where storage is forbidden, the page remembers until it is closed

export function recall(name, otherwise) {
  try {
    const text = localStorage.getItem(`faces.${name}`);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return fallback.get(name) ?? otherwise;
  }
}

export function keep(name, value) {
  fallback.set(name, value);
  try {
    if (value === null) localStorage.removeItem(`faces.${name}`);
    else localStorage.setItem(`faces.${name}`, JSON.stringify(value));
  } catch { /* full or forbidden */ }
}

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

export function randomHex(bytes) {
  const all = crypto.getRandomValues(new Uint8Array(bytes));
  return Array.from(all, (byte) => (byte + 256).toString(16).slice(1)).join("");
}

// ---- words about time

export function seconds(value) {
  if (value < 9.5) return `${value < 1 ? Math.max(0.1, value).toFixed(1) : Math.round(value)} s`;
  if (value < 90) return `${Math.round(value / 5) * 5} s`;
  return `${Math.round(value / 60)} min`;
}

export function dayOf(timestamp) {
  const day = new Date(timestamp);
  const is = (days) => new Date(Date.now() - days * 864e5).toDateString() === day.toDateString();
  return is(0) ? "Today" : is(1) ? "Yesterday" : day.toLocaleDateString(undefined, { dateStyle: "full" });
}

// ---- messages

/** Say something to screen readers alone. */
export function announce(text) {
  setText("live", text);
}

/** A short message at the edge; it stays while it is pointed at or focused. */
export function toast(text, { action, act, gone, trouble, wait = action ? 8000 : 4000 } = {}) {
  let timer = 0;
  const [kind, role] = trouble ? ["div.toast.trouble", "alert"] : ["div.toast", "status"];
  const box = h(kind, { role }, h("p", text));
  const close = (acted) => {
    if (!box.isConnected) return;
    stay();
    const held = box.contains(document.activeElement);
    box.remove();
    if (held) {
      const title = document.querySelector("dialog[open] h2[tabindex]");
      ($("toasts").querySelector("button") ?? title ?? $("stage")).focus();
    }
    if (!acted) gone?.();
  };
  const stay = () => clearTimeout(timer);
  const start = () => { stay(); timer = setTimeout(close, wait); };
  if (action) box.append(h("button", { text: action, click: () => { close(true); act(); } }));
  box.append(iconButton("close", "Dismiss", () => close(false)));
  on(box, "pointerenter focusin", stay);
  on(box, "pointerleave focusout", start);
  $("toasts").append(box);
  while ($("toasts").childElementCount > 3) $("toasts").firstElementChild.querySelector("[aria-label=Dismiss]").click();
  start();
  return () => close(false);
}

export const complain = (what, error) => toast(`${what}: ${error.message}`, { trouble: true });

// ---- dialogs

/** Open a modal dialog; it gives the focus back, and messages stay reachable above it. */
export function openDialog(dialog, closed) {
  if (dialog.open) return;
  const before = document.activeElement;
  dialog.showModal();
  dialog.querySelector("h2[tabindex]")?.focus({ preventScroll: true });
  dialog.scrollTop = 0;
  dialog.append($("toasts"), $("live"));
  on(dialog, "close", () => {
    const host = document.querySelector("dialog[open]") ?? document.body;
    host.append($("live"), $("toasts"));
    closed?.();
    if (before?.isConnected && !before.closest("[hidden]")) before.focus();
  }, { once: true });
}

/** A press on the backdrop closes, as does the button; Esc does so by itself. */
export function closable(dialog, button) {
  on(button, "click", () => dialog.close());
  on(dialog, "pointerdown", (event) => {
    if (event.target !== dialog) return;
    const { left, right, top, bottom } = dialog.getBoundingClientRect();
    if (event.clientX < left || event.clientX > right || event.clientY < top || event.clientY > bottom) dialog.close();
  });
}

/** Open a dialog that is made for the moment; `closed` is called when it has gone. */
export function openSheet(name, title, kind, children, closed) {
  const close = iconButton("close", "Close", null);
  const dialog = h("dialog", { class: `sheet ${kind}`, id: name, "aria-labelledby": `${name}-title` },
    h("div.sheet-head", h("h2", { id: `${name}-title`, text: title, tabindex: "-1" }), close), ...children);
  document.body.append(dialog);
  closable(dialog, close);
  openDialog(dialog, () => { dialog.remove(); closed?.(); });
  return dialog;
}

export const isCommand = (event) => event.ctrlKey || event.metaKey || event.altKey;
export const dialogIsOpen = () => document.querySelector("dialog[open]") !== null;

export const wantsStillness = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Is somebody writing here, so that single keys are letters? */
export function isWriting(target) {
  return target.closest?.("textarea, select, input:not([type=radio], [type=checkbox], [type=range])") != null;
}

/** Arrow keys move the focus between the images of a grid. */
export function arrowKeys(box, selector) {
  on(box, "keydown", (event) => {
    if (!event.key.startsWith("Arrow") || isCommand(event)) return;
    const here = event.target.closest(selector);
    if (!here) return;
    const way = /Right|Down/.test(event.key) ? 1 : -1;
    const all = [...box.querySelectorAll(selector)];
    let next = all[all.indexOf(here) + way];
    if (/Up|Down/.test(event.key)) {
      const from = here.getBoundingClientRect();
      const far = (other) => {
        const { top, left } = other.getBoundingClientRect();
        const down = (top - from.top) * way;
        return down < 8 ? Infinity : down * 4 + Math.abs(left - from.left);
      };
      next = all.reduce((best, other) => (far(other) < far(best) ? other : best), here);
    }
    event.preventDefault();
    next?.focus();
  });
}
