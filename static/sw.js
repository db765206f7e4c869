// What is there when the server is gone? The shell opens, so that the page can say so. The network comes first:
// no old version hides a new one. Answers of the API are never touched.

const CACHE = "shell";
const ROOT = new URL("../", location.href);
const FILES = ("actions app badges blend compare crop edits gallery gestures help icons images job_card jobs mask "
  + "models photo player population prompt prompt_editing prompt_palette refine server settings sharing sliders "
  + "submission suggestions theme trust ui vary viewer viewer_dialog views wipe").split(" ")
  .map((name) => `${name}.js`);
const SHELL = ["../", "style.css", "editing.css", "viewer.css", "icon.svg", ...FILES]
  .map((path) => new URL(path, location.href).href);

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(SHELL)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(self.clients.claim());
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const address = new URL(request.url);
  const path = address.origin + address.pathname;
  if (request.method !== "GET" || !SHELL.includes(path) || (path === ROOT.href && request.mode !== "navigate")) return;
  event.respondWith((async () => {
    const cache = await caches.open(CACHE);
    try {
      const answer = await fetch(request);
      if (answer.ok) event.waitUntil(cache.put(path, answer.clone()));
      return answer;
    } catch {
      return (await cache.match(path)) ?? Response.error();
    }
  })());
});
