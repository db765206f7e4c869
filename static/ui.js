// What does every part of the page need? Elements, icons, memory, messages, dialogs. It knows neither jobs nor server.

export const $ = (id) => document.getElementById(id);
export const COMMAND = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘" : "Ctrl";
export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Everything that parts of the page tell each other: `bus.emit("favourites")`, `bus.on("favourites", f)`. */
export const bus = {
  target: new EventTarget(),
  emit(name, detail) { this.target.dispatchEvent(new CustomEvent(name, { detail })); },
  on(name, listen) { this.target.addEventListener(name, (event) => listen(event.detail)); },
};

/** An element. Functions listen, `class`, `text` and `data` are what they say, null and false are left out, the rest are attributes. */
export function h(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  if (tag === "button") made.type = "button";
  for (const [name, value] of Object.entries(given)) {
    if (value == null || value === false) continue;
    if (typeof value === "function") made.addEventListener(name, value);
    else if (name === "class") made.className = value;
    else if (name === "text") made.textContent = value;
    else if (name === "data") Object.assign(made.dataset, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter(Boolean));
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

for (const bare of document.querySelectorAll("[data-icon]")) bare.prepend(icon(bare.dataset.icon));

export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

/** A round button that shows only an icon; `label` is what it is called, and its tooltip. */
export function iconButton(name, label, click, given = {}) {
  return h("button", { class: "round plain", "aria-label": label, title: label, click, ...given }, icon(name));
}

/** A row of radio buttons that looks like one switch. Entries are [text, value] or [text, value, second line]. */
export function segments(box, name, entries, chosen, change) {
  box.replaceChildren(...entries.map(([text, value, note]) => {
    const input = h("input", { type: "radio", name, value, change: change ? () => change(value) : null });
    input.checked = value === chosen;
    return h("label", {}, input, h("span", {}, h("span", { text }), note && h("small", { text: note })));
  }));
}

/** A slider under its name; `words(value)` is what is said of its place, `change(value)` hears where it was put. */
export function slider(name, { min, max, step, value, words }, change, ...more) {
  const output = h("output", { "aria-hidden": "true" });
  const input = h("input", { type: "range", min, max, step, "aria-label": name });
  const show = () => { output.textContent = words(Number(input.value)); input.setAttribute("aria-valuetext", output.textContent); };
  const put = (at) => { input.value = at; show(); };
  input.addEventListener("input", () => { show(); change(Number(input.value)); });
  put(value);
  return { box: h("div", { class: "slider" }, h("div", { class: "label-row" }, h("span", { text: name, "aria-hidden": "true" }), output), input, ...more), put, input };
}

/** A style sheet of parts that most visits never need. */
export function loadStyle(name) {
  if (document.querySelector(`link[href="static/${name}"]`)) return null;
  return new Promise((done) => document.head.append(h("link", { rel: "stylesheet", href: `static/${name}`, load: done, error: done })));
}

export function choose(box, value) {
  for (const input of box.querySelectorAll("input")) input.checked = input.value === String(value);
}

/** Change the address without loading anything; `how` is pushState or replaceState. */
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

export function randomHex(bytes) {
  return Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, "0")).join("");
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
  $("live").textContent = text;
}

/** A short message at the edge; with an action it stays longer, and while it is pointed at or focused. */
export function toast(text, { action, act, gone, trouble, wait = action ? 8000 : 4000 } = {}) {
  let timer = 0;
  const box = h("div", { class: `toast ${trouble ? "trouble" : ""}`, role: trouble ? "alert" : "status" }, h("p", { text }));
  const close = (acted) => {
    if (!box.isConnected) return;
    clearTimeout(timer);
    const held = box.contains(document.activeElement);
    box.remove();
    if (held) ($("toasts").querySelector("button") ?? document.querySelector("dialog[open] h2[tabindex]") ?? $("stage")).focus();
    if (!acted) gone?.();
  };
  const start = () => { clearTimeout(timer); timer = setTimeout(close, wait); };
  if (action) box.append(h("button", { text: action, click: () => { close(true); act(); } }));
  box.append(iconButton("close", "Dismiss", () => close(false)));
  for (const [name, what] of [["pointerenter", () => clearTimeout(timer)], ["focusin", () => clearTimeout(timer)],
    ["pointerleave", start], ["focusout", start]]) box.addEventListener(name, what);
  $("toasts").append(box);
  while ($("toasts").childElementCount > 3) $("toasts").firstElementChild.querySelector("[aria-label=Dismiss]").click();
  start();
  return () => close(false);
}

// ---- dialogs

/** Open a modal dialog; it gives the focus back to where it was, and messages stay reachable above it. */
export function openDialog(dialog, closed) {
  if (dialog.open) return;
  const before = document.activeElement;
  dialog.showModal();
  dialog.querySelector("h2[tabindex]")?.focus({ preventScroll: true });
  dialog.scrollTop = 0; // a dialog opens at its beginning
  dialog.append($("toasts"), $("live"));
  dialog.addEventListener("close", () => {
    const host = document.querySelector("dialog[open]") ?? document.body;
    host.append($("live"), $("toasts"));
    closed?.();
    if (before?.isConnected && !before.closest("[hidden]")) before.focus();
  }, { once: true });
}

/** A press on the backdrop closes, as does the button. Esc does so by itself. */
export function closable(dialog, button) {
  button.addEventListener("click", () => dialog.close());
  dialog.addEventListener("pointerdown", (event) => {
    if (event.target !== dialog) return;
    const { left, right, top, bottom } = dialog.getBoundingClientRect();
    if (event.clientX < left || event.clientX > right || event.clientY < top || event.clientY > bottom) dialog.close();
  });
}

export const dialogIsOpen = () => document.querySelector("dialog[open]") !== null;

export const wantsStillness = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Is somebody writing here, so that single keys are letters? */
export function isWriting(target) {
  return target.closest?.("textarea, select, input:not([type=radio], [type=checkbox], [type=range])") != null;
}

/** Arrow keys move the focus between the pictures of a grid, by what lies there on the screen. */
export function arrowKeys(box, selector) {
  box.addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow") || event.altKey || event.ctrlKey || event.metaKey) return;
    const here = event.target.closest(selector);
    if (!here) return;
    const from = here.getBoundingClientRect();
    const across = event.key === "ArrowLeft" || event.key === "ArrowRight";
    const forward = event.key === "ArrowRight" || event.key === "ArrowDown";
    const all = [...box.querySelectorAll(selector)];
    let next = null;
    if (across) {
      next = all[all.indexOf(here) + (forward ? 1 : -1)];
    } else {
      let best = Infinity;
      for (const other of all) {
        const at = other.getBoundingClientRect();
        const down = (at.top - from.top) * (forward ? 1 : -1);
        if (down < 8) continue;
        const distance = down * 4 + Math.abs(at.left - from.left);
        if (distance < best) [best, next] = [distance, other];
      }
    }
    event.preventDefault();
    next?.focus();
  });
}
