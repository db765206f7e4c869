// What do the icons look like? Each is one path on a field of 24 by 24; style.css gives its width and colour.

const SVG = "http://www.w3.org/2000/svg";
const PATHS = {
  again: "M20 11a8 8 0 1 0-2.3 6.2M20 5v6h-6",
  alert: "M12 8v5m0 3.5v.01"
    + "M10.5 4.3 2.9 17.6A1.7 1.7 0 0 0 4.4 20h15.2a1.7 1.7 0 0 0 1.5-2.4L13.5 4.3a1.7 1.7 0 0 0-3 0z",
  blend: "M9 4.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 1 0 0-13zM15 6.5a6.5 6.5 0 1 1-3 12.2",
  brush: "M20 4 10.5 13.5M9 14.5c-2.5 0-2 4-5 4.5 2 2 7 1.5 7-2.5z",
  camera: "M4 8h3.5l1.5-2.5h6L16.5 8H20v11H4zM12 10.5a3 3 0 1 0 0 6 3 3 0 1 0 0-6z",
  check: "m5 12.5 4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6 6 18",
  compare: "M12 3v18M4 6h5v12H4zM15 6h5v12h-5z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  dice: "M7 4h10a3 3 0 0 1 3 3v10a3 3 0 0 1-3 3H7a3 3 0 0 1-3-3V7a3 3 0 0 1 3-3zM8.5 8.5v.01M15.5 8.5v.01"
    + "M12 12v.01M8.5 15.5v.01M15.5 15.5v.01",
  download: "M12 4v11m-5-4.5 5 5 5-5M5 20h14",
  film: "M4 5h16v14H4zM8 5v14M16 5v14M4 9.7h4M4 14.3h4M16 9.7h4M16 14.3h4",
  grid: "M4.5 4.5h6v6h-6zM13.5 4.5h6v6h-6zM4.5 13.5h6v6h-6zM13.5 13.5h6v6h-6z",
  heart: "M12 20s-7.5-4.7-7.5-10.3A4.2 4.2 0 0 1 12 7.2a4.2 4.2 0 0 1 7.5 2.5C19.5 15.3 12 20 12 20z",
  image: "M4 5h16v14H4zM4 16l4.5-4.5 4 4 2.5-2.5 5 4M15.5 9v.01",
  invert: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  left: "m14.5 5.5-6.5 6.5 6.5 6.5",
  link: "M10 14a4 4 0 0 0 5.7 0l3-3A4 4 0 0 0 13 5.3l-1 1M14 10a4 4 0 0 0-5.7 0l-3 3a4 4 0 0 0 5.7 5.7l1-1",
  minus: "M5 12h14",
  open: "M4 16v4h16v-4M12 15V4m-5 4.5 5-5 5 5",
  pause: "M8 5v14M16 5v14",
  people: "M9 5a3.2 3.2 0 1 0 0 6.4A3.2 3.2 0 1 0 9 5zM3 19c.4-7 11.6-7 12 0M16 5.5a3 3 0 0 1 0 5.5"
    + "M18 13.5c2 .8 3 2.5 3 5.5",
  play: "M7 4.5v15l12-7.5z",
  plus: "M5 12h14M12 5v14",
  redo: "M20 9H9a5 5 0 0 0 0 10h5M20 9l-4-4M20 9l-4 4",
  right: "m9.5 5.5 6.5 6.5-6.5 6.5",
  search: "M10.5 4a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13zM15.5 15.5 20.5 20.5",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  share: "M12 14V3.5m-4 3.5 4-4 4 4M7 11H5v9.5h14V11h-2",
  shield: "M12 3.5 19 6v5.5c0 4-3 7-7 9-4-2-7-5-7-9V6zM9 12l2.2 2.2L15.2 10",
  spark: "M11 4.5 12.8 10l5.7 2-5.7 2L11 19.5 9.2 14l-5.7-2 5.7-2zM18.5 3v4M16.5 5h4",
  trash: "M4.5 7h15M9.5 7V4.5h5V7M6.5 7l1 13h9l1-13M10.5 11v5.5M13.5 11v5.5",
  undo: "M4 9h11a5 5 0 0 1 0 10h-5M4 9l4-4M4 9l4 4",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(SVG, "path"));
  svg.firstChild.setAttribute("d", PATHS[name]);
  return svg;
}

export function setIcon(button, name, label) {
  button.ariaLabel = label;
  button.querySelector(".icon path").setAttribute("d", PATHS[name]);
}

for (const bare of document.querySelectorAll("[data-icon]")) bare.prepend(icon(bare.dataset.icon));
