"""How do tests use the page? A real headless Chromium, the application with a generated image engine behind a server,
and axe.

`watched_page` is a page that complains at its end about script errors, refused content and requests to other hosts, so
no test has to ask for that. `Gate` holds the generated image engine at any step, so that every state can be looked at
in peace.
"""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import axe_playwright_python
from flask import Flask
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright
from werkzeug.serving import make_server

from api import create_app
from launcher.host import find_browser
from tests.support.drawing import DrawingEngine

WAIT_MS = 20_000
HELD_S = 300  # an engine that gives up while its state is looked at, on a slow machine, would fail the job
MARGIN = 4  # pixels around what a picture of a part of the page shows
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
expect.set_options(timeout=WAIT_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for a whole file of tests."""
    path = find_browser()
    assert path, "these tests need Chromium or Chrome; ./start.py test installs it or says how"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def watch(context: BrowserContext) -> list[str]:
    """The faults of all pages of a context, which grow while it is used. An answer that is an error is none."""
    faults: list[str] = []
    context.on("weberror", lambda error: faults.append(f"error: {error.error.stack}"))
    context.on("console", lambda said: said.type == "error" and "Failed to load resource" not in said.text
               and faults.append(f"console: {said.text}"))
    context.on("request", lambda asked: re.match(r"(http://127\.0\.0\.1:|data:)", asked.url)
               or faults.append(f"foreign request: {asked.url}"))
    return faults


@contextmanager
def watched_page(browser: Browser, *, wait_ms: int = WAIT_MS, **options: Any) -> Iterator[Page]:
    """A fresh page. `options` are those of a browser context; service workers are blocked unless they say otherwise."""
    settings = {"viewport": {"width": 1280, "height": 900}, "service_workers": "block", "locale": "en-GB"} | options
    context = browser.new_context(**settings)
    context.set_default_timeout(wait_ms)
    faults = watch(context)
    yield context.new_page()
    context.close()
    assert faults == [], faults


def visit(page: Page, address: str) -> None:
    """Open the page and wait until the model is there and what was remembered is shown."""
    page.goto(address)
    page.wait_for_selector("#generate:not([disabled])")
    page.wait_for_selector("body[data-resumed]")


def write_prompt(page: Page, text: str) -> None:
    page.get_by_label("Describe a face").fill(text)


def generate(page: Page) -> None:
    page.locator("#generate").click()


def violations(page: Page, *rules: str) -> list[str]:
    """What axe-core finds wrong with the page as it is now; by these rules alone where some are named."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE)
    options: dict[str, Any] = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
    found = page.evaluate("options => axe.run(options)", options)["violations"]
    nodes = [(one["id"], node) for one in found for node in one["nodes"]]
    return [f"{rule}: {node['html'][:160]} {node['failureSummary'][:300]}" for rule, node in nodes]


def boxes(page: Page, *selectors: str) -> list[list[dict[str, float]]]:
    """Where the elements of each selector are, all of the same moment, once no image is under way and nothing moves.

    One after the other would mix what was before with what is after something came, or after the page scrolled.
    """
    look = """async ([selectors, patience]) => {
        const until = performance.now() + patience;
        const all = () => selectors.map(one => [...document.querySelectorAll(one)].map(
            found => { const {x, y, width, height} = found.getBoundingClientRect(); return {x, y, width, height}; }));
        const frame = () => new Promise(requestAnimationFrame);
        const here = image => !image.checkVisibility() || image.loading === "lazy" || image.complete;
        for (let before = null, now = null; ; before = now) {
            await frame();
            now = JSON.stringify(all());
            const still = now === before && [...document.images].every(here);
            if (still || performance.now() > until) return JSON.parse(now);
        }
    }"""
    found: list[list[dict[str, float]]] = page.evaluate(look, [list(selectors), WAIT_MS])
    return found


def box_of(page: Page, selector: str) -> dict[str, float]:
    """The same of one element."""
    ((box,),) = boxes(page, selector)
    return box


def keep_part(page: Page, name: str, first: str, last: str | None = None) -> None:
    """A small picture of the page from the element `first` to the end of `last`, where FACES_SCREENSHOTS names a folder
    for it: docs/screenshots is made this way."""
    folder = os.environ.get("FACES_SCREENSHOTS")
    if not folder:
        return
    page.locator(first).first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # fades have ended
    (start, *_), (end, *_) = boxes(page, first, last or first)
    x, y = start["x"] - MARGIN, start["y"] - MARGIN
    content = page.screenshot(clip={"x": x, "y": y, "width": start["width"] + 2 * MARGIN,
                                    "height": end["y"] + end["height"] + MARGIN - y})
    Image.open(io.BytesIO(content)).save(Path(folder) / f"{name}.webp", quality=82)


class Site:
    """The application in a thread of this process, behind a server that ends when it is told to, or with its block."""

    def __init__(self, engine_factory: Callable[[], DrawingEngine], **options: Any) -> None:
        self.app: Flask = create_app(engine_factory, **options)
        self.server = make_server("127.0.0.1", 0, self.app, threaded=True)
        self.server.daemon_threads = True  # a stream whose page is gone is noticed only at its next heartbeat
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        """Until the engine is made."""
        client = self.app.test_client()
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)

    def submit(self, prompt: str, **wanted: Any) -> str:
        """A job from somebody else; its id."""
        body = {"prompt": prompt, "n_images": 1, "n_inf_steps": 2, **wanted}
        answer = self.app.test_client().post("/text_to_image", json=body)
        assert answer.status_code == 200, answer.text
        return answer.get_json()["job_id"]

    def state(self, job_id: str) -> dict[str, Any]:
        return self.app.test_client().get(f"/jobs/{job_id}/?include=none").get_json()

    def wait(self, *job_ids: str) -> None:
        """Until these jobs have ended."""
        queue = self.app.extensions["service"].queue
        for job_id in job_ids:
            job, last = queue.get(job_id), 0
            while not job.finished:
                last = max((event.id for event in queue.wait_events(job, last, WAIT_MS / 1000)), default=last)

    def close(self) -> None:
        self.app.extensions["service"].close()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


class Line:
    """The line between a page and its server: nothing passes while it is `cut`."""

    def __init__(self, page: Page) -> None:
        self.cut = False
        page.route("**/*", self._pass)

    def _pass(self, route: Route) -> None:
        if self.cut:
            route.abort("connectionrefused")
        else:
            route.fallback()


class Gate:
    """Lets an engine through step by step: `open_until(n)` allows the steps up to n."""

    def __init__(self) -> None:
        self._changed, self._allowed = threading.Condition(), 0

    def open_until(self, step: int) -> None:
        with self._changed:
            self._allowed = step
            self._changed.notify_all()

    def open(self) -> None:
        self.open_until(10**9)

    def __call__(self, step: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: step <= self._allowed, HELD_S)
