// Which of the two views is shown? The address says so; links and the browser's history change it.

import { showGallery } from "./gallery.js";
import { $, on, setQuery } from "./ui.js";

const query = () => new URLSearchParams(location.search);

export const currentView = () => (query().get("view") === "gallery" ? "gallery" : "generate");

/** Show what the address says. */
export function updateView() {
  const view = currentView();
  for (const name of ["generate", "gallery"]) $(`view-${name}`).hidden = view !== name;
  for (const link of document.querySelectorAll("nav [data-view]")) {
    link.ariaCurrent = link.dataset.view === view ? "page" : null;
  }
  document.body.dataset.view = view;
  showGallery(view === "gallery");
}

export function goTo(view) {
  if (currentView() === view) return;
  const next = query();
  if (view === "gallery") next.set("view", "gallery");
  else next.delete("view");
  setQuery(next, "pushState");
  updateView();
  scrollTo({ top: 0 });
}

on(document, "click", (event) => {
  const link = event.target.closest("a[data-view]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  goTo(link.dataset.view);
  if (link.dataset.view === "gallery" && !link.closest("nav")) $("gallery-title").focus();
});
on(window, "popstate", updateView);
