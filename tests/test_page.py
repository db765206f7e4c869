"""Does the page do what a person expects? Headless Chromium drives it.

One test drives the real command with a real model from prompt to downloaded PNG. The others put the same application in
front of a drawing engine (`drawing.py`), which can be held at any step, so that every state can be looked at.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drawing import DrawingEngine
from flask import Flask
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from tiny_model import build_tiny_model, bundled_model
from werkzeug.serving import make_server

from api import create_app
from core.jobs import JobError
from core.machine import find_browser

ROOT = Path(__file__).resolve().parent.parent
WAIT_MS = 20_000
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    assert path, "these tests need Chromium or Chrome; ./start.py test installs it or says how"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page that complains at the end about script errors and about requests to other hosts."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("console", lambda said: said.type == "error" and "Failed to load resource" not in said.text
            and faults.append(f"console: {said.text}"))
    page.on("request", lambda asked: re.match(r"(http://127\.0\.0\.1:|data:)", asked.url)
            or faults.append(f"foreign request: {asked.url}"))
    yield page
    context.close()
    assert faults == []


class Site:
    """The application in a thread of this process, behind a server that ends when it is told to."""

    def __init__(self, engine_factory: Callable[[], DrawingEngine], **options: int) -> None:
        self.app: Flask = create_app(engine_factory, **options)
        self.server = make_server("127.0.0.1", 0, self.app, threaded=True)
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.app.extensions["service"].close()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


class Gate:
    """Lets an engine through step by step: `open_until(n)` allows the steps up to n."""

    def __init__(self) -> None:
        self._changed, self._allowed = threading.Condition(), 0

    def open_until(self, step: int) -> None:
        with self._changed:
            self._allowed = step
            self._changed.notify_all()

    def __call__(self, step: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: step <= self._allowed, WAIT_MS / 1000)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(gate: Gate) -> DrawingEngine:
    return DrawingEngine(before_step=gate)


@pytest.fixture
def site(engine: DrawingEngine, gate: Gate) -> Iterator[Site]:
    made = Site(lambda: engine, max_waiting=1)
    yield made
    gate.open_until(10**9)
    made.close()


def write_prompt(page: Page, text: str) -> None:
    page.get_by_label("Describe a face").fill(text)


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()


# ---- the real thing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled_model() or build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def real_server(model_folder: Path) -> Iterator[str]:
    """The command that users run, with the model that they get."""
    command = [sys.executable, str(ROOT / "api.py"), "--port", "0", "--model", str(model_folder), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().removeprefix("Open ").strip()
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stdout.close()


def test_from_a_prompt_to_a_downloaded_picture(page: Page, real_server: str, tmp_path: Path) -> None:
    page.goto(real_server)
    expect(page.locator("#model")).to_have_attribute("data-state", "READY", timeout=120_000)
    write_prompt(page, "a smiling woman with blond hair")
    page.get_by_text("2", exact=True).click()
    page.get_by_text("More settings").click()
    page.get_by_label("Steps").fill("20")
    page.get_by_label("Seed", exact=True).fill("41")
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const step = document.querySelector(".step");
            const image = document.querySelector(".tile img");
            if (step?.textContent && image.src.startsWith("data:image/png")) window.seen.push(step.textContent);
        }).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
    }""")
    generate(page)
    downloads = page.get_by_role("link", name=re.compile("Download face"))
    expect(downloads).to_have_count(2, timeout=120_000)
    assert {"2/20", "18/20"} <= set(page.evaluate("window.seen"))  # the tiles were filled by previews on the way
    sizes = page.eval_on_selector_all(".tile img", "images => images.map(i => [i.complete, i.naturalWidth])")
    assert sizes == [[True, 128], [True, 128]]
    page.screenshot(path=tmp_path / "finished.png", full_page=True)

    with page.expect_download() as started:
        downloads.nth(1).click()
    assert started.value.suggested_filename == "face-42.png"
    picture = Image.open(io.BytesIO(Path(started.value.path()).read_bytes()))
    assert picture.size == (128, 128)
    asked = json.loads(picture.text["text_to_image"])["request"]  # type: ignore[attr-defined]
    assert (asked["prompt"], asked["seed"], asked["n_inf_steps"]) == ("a smiling woman with blond hair", 42, 20)

    page.reload()  # the address and the browser remember the job
    expect(page.get_by_role("link", name=re.compile("Download face"))).to_have_count(2)
    assert page.get_by_label("Describe a face").input_value() == "a smiling woman with blond hair"


# ---- every state, held still -----------------------------------------------------------------------------------------


def test_a_job_fills_its_tiles_step_by_step(page: Page, site: Site, gate: Gate, tmp_path: Path) -> None:
    page.goto(site.address)
    expect(page.get_by_text("Your faces will appear here")).to_be_visible()
    page.get_by_role("button", name="a smiling young woman with wavy blond hair").click()
    page.get_by_label("Describe a face").press("Control+Enter")
    expect(page.locator(".tile")).to_have_count(4)
    expect(page.get_by_role("button", name="Drawing …")).to_be_disabled()
    gate.open_until(10)
    expect(page.locator("#status")).to_contain_text("Step 10 of 50")
    expect(page.locator(".step").first).to_have_text("10/50")
    expect(page.locator(".tile img").first).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    expect(page.locator(".tile img").nth(2)).to_have_attribute("alt", re.compile("^Face 3 of 4: a smil.* still being"))
    assert 0.15 < page.locator("#progress").evaluate("bar => bar.value") < 0.25
    assert page.title().startswith("20 %")
    page.screenshot(path=tmp_path / "running.png")
    gate.open_until(50)
    expect(page.get_by_role("link", name="Download face 4")).to_be_visible()
    expect(page.locator("#running")).to_be_hidden()
    expect(page.locator("#live")).to_have_text("4 faces finished.")
    assert page.title() == "Faces from words"
    page.get_by_role("button", name=re.compile("Use seed")).nth(1).click()
    seed = page.get_by_label("Seed", exact=True).input_value()
    assert page.locator(".tile a").nth(1).get_attribute("download") == f"face-{seed}.png"


def test_a_reload_in_mid_job_loses_nothing(page: Page, site: Site, gate: Gate) -> None:
    page.goto(site.address)
    write_prompt(page, "a serious man")
    generate(page)
    gate.open_until(30)
    expect(page.locator(".step").first).to_have_text("30/50")
    page.reload()
    expect(page.locator(".step").first).to_have_text("30/50")
    expect(page.locator("#asked")).to_contain_text("a serious man")
    gate.open_until(40)
    expect(page.locator("#status")).to_contain_text("Step 40 of 50")
    other = page.context.new_page()  # a second reader, by link alone
    other.goto(page.url)
    expect(other.locator(".step").first).to_have_text("40/50")
    gate.open_until(50)
    for reader in (page, other):
        expect(reader.get_by_role("link", name="Download face 1")).to_be_visible()


def test_cancel_keeps_what_was_seen(page: Page, site: Site, gate: Gate) -> None:
    page.goto(site.address)
    write_prompt(page, "a man")
    generate(page)
    gate.open_until(20)
    expect(page.locator(".step").first).to_have_text("20/50")
    page.get_by_role("button", name="Cancel").click()
    gate.open_until(10**9)
    expect(page.get_by_role("alert")).to_contain_text("Cancelled")
    expect(page.locator(".tile img").first).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("link", name="Download face 1")).to_be_visible()


def test_when_events_fail_polling_takes_over(page: Page, site: Site, gate: Gate) -> None:
    def refuse(route: Route) -> None:
        route.fulfill(status=429, content_type="application/problem+json", body="{}")

    page.route("**/events**", refuse)
    page.goto(site.address)
    write_prompt(page, "a man")
    generate(page)
    gate.open_until(20)
    expect(page.locator(".step").first).to_have_text("20/50")
    expect(page.locator("#status")).to_contain_text("Step 20 of 50")
    gate.open_until(50)
    expect(page.get_by_role("link", name="Download face 1")).to_be_visible()


def test_the_queue_is_shown_and_a_full_one_is_said(browser: Browser, page: Page, site: Site, gate: Gate) -> None:
    client = site.app.test_client()
    page.goto(site.address)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    running = client.post("/text_to_image", json={"prompt": "a man", "n_inf_steps": 2}).get_json()["job_id"]
    while client.get(f"/jobs/{running}/").get_json()["status"] == "queued":
        pass
    generate(page)
    expect(page.locator("#status")).to_have_text("Next in the queue")
    second = browser.new_context().new_page()  # somebody else, who knows nothing of the first one's job
    second.goto(site.address)
    second.get_by_role("button", name="Generate").click()
    expect(second.get_by_role("alert")).to_contain_text("The queue is full")
    second.context.close()
    gate.open_until(50)
    expect(page.get_by_role("link", name="Download face 4")).to_be_visible()


def test_a_failed_job_shows_cause_and_remedy(page: Page, site: Site, engine: DrawingEngine) -> None:
    def fail(step: int) -> None:
        raise JobError("not_finite", "No picture came out.", "Try another sampler.")

    engine.before_step = fail
    page.goto(site.address)
    generate(page)
    expect(page.get_by_role("alert")).to_contain_text("This job failed")
    expect(page.get_by_role("alert")).to_contain_text("No picture came out. Try another sampler.")
    engine.before_step = None
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("link", name="Download face 1")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_unknown_words_are_marked_and_the_nearest_is_one_click_away(page: Page, site: Site) -> None:
    page.goto(site.address)
    write_prompt(page, "😀 a smilling wombat, man and woman")
    expect(page.locator("#marks mark.unknown")).to_have_text(["smilling", "wombat"])
    assert page.locator("#marks").text_content() == "😀 a smilling wombat, man and woman\n"
    expect(page.locator("#notes")).to_contain_text('"man" contradicts "woman"')
    page.get_by_role("button", name="smilling → smiling").click()
    assert page.get_by_label("Describe a face").input_value() == "😀 a smiling wombat, man and woman"
    expect(page.locator("#marks mark.unknown")).to_have_text(["wombat"])
    expect(page.locator(".fact").first).to_be_visible()
    page.get_by_label("Describe a face").fill("<img src=x onerror=alert(1)> a man")
    expect(page.locator(".fact")).to_have_text(["man"])
    assert page.locator("#marks img").count() == 0


def test_what_the_server_refuses_is_said_beside_its_field(page: Page, site: Site) -> None:
    page.goto(site.address)
    page.get_by_text("More settings").click()
    page.get_by_label("Steps").fill("1001")
    page.get_by_label("Seed", exact=True).fill("-5")
    page.get_by_text("More settings").click()
    generate(page)
    expect(page.locator("#n_inf_steps-error")).to_have_text("Must be an integer from 1 to 1000; got 1001.")
    expect(page.locator("#seed-error")).to_contain_text("Must be an integer from 0 to")
    expect(page.get_by_label("Steps")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Steps")).to_be_focused()


def test_limits_and_defaults_come_from_the_server(page: Page, site: Site) -> None:
    page.goto(site.address)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    page.get_by_text("More settings").click()
    assert page.locator("#sampler option").all_text_contents() == ["Pencil", "DPM++ 2M"]
    limits = {"n_inf_steps": ("1", "1000"), "guidance_scale": ("0", "20"), "seed": ("0", str(2**53 - 1))}
    for name, (low, high) in limits.items():
        expect(page.locator(f"#{name}")).to_have_attribute("min", low)
        expect(page.locator(f"#{name}")).to_have_attribute("max", high)
    assert page.locator("#guidance-value").text_content() == "3.0"
    page.get_by_text("Best", exact=True).click()
    assert page.get_by_label("Steps").input_value() == "500"
    page.get_by_label("Steps").fill("25")
    expect(page.get_by_role("radio", name="Draft")).to_be_checked()


@pytest.mark.parametrize("link", ["?job=never-existed", "?job=..%2F..%2Foptions"])
def test_a_link_to_no_job_says_so(page: Page, site: Site, link: str) -> None:
    page.goto(site.address + link)
    expect(page.get_by_role("alert")).to_contain_text("This job is not known")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_a_server_that_goes_away_and_comes_back(page: Page, site: Site, gate: Gate) -> None:
    down = False

    def cut(route: Route) -> None:
        if down:
            route.abort("connectionrefused")
        else:
            route.continue_()

    page.route("**/jobs/**", cut)
    page.route("**/events**", lambda route: route.fulfill(status=503, body=""))
    page.goto(site.address)
    write_prompt(page, "a man")
    generate(page)
    gate.open_until(10)
    expect(page.locator(".step").first).to_have_text("10/50")
    down = True
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    down = False
    gate.open_until(50)
    expect(page.get_by_role("link", name="Download face 1")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_while_the_model_loads_and_when_it_fails(page: Page) -> None:
    ready = threading.Event()

    def slow() -> DrawingEngine:
        assert ready.wait(WAIT_MS / 1000)
        raise FileNotFoundError("models/x is not a model folder; train one")

    site = Site(slow)
    try:
        page.goto(site.address)
        expect(page.locator("#model")).to_contain_text("Loading the model")
        expect(page.get_by_role("button", name="Generate")).to_be_disabled()
        ready.set()
        expect(page.get_by_role("alert")).to_contain_text("models/x is not a model folder; train one")
    finally:
        ready.set()
        site.close()


def test_every_size_and_scheme_is_usable(page: Page, site: Site, gate: Gate, tmp_path: Path) -> None:
    gate.open_until(10**9)
    page.goto(site.address)
    write_prompt(page, "a smilling woman with wavy blond hair and" + " very" * 10 + f" l{'o' * 40}ng words")
    page.get_by_text("More settings").click()
    generate(page)
    expect(page.get_by_role("link", name="Download face 4")).to_be_visible()
    too_small = """[...document.querySelectorAll("button, a.download, select, input:not([type=radio])")]
        .filter(e => e.offsetParent && e.getBoundingClientRect().height < 24).map(e => e.id || e.className)"""
    for width, height in ((320, 640), (768, 1024), (1280, 900), (3840, 2160)):
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert (overflow, page.evaluate(too_small)) == (0, []), f"{width} {scheme}"
            assert contrast(page) >= 4.5, f"{width} {scheme}"
            page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=width < 3000)


def contrast(page: Page) -> float:
    """The lowest contrast (WCAG 2) of text against the nearest plain ground behind it."""
    return page.evaluate("""() => {
        const parse = (color) => color.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = (element) => {
            for (let at = element; at; at = at.parentElement) {
                const color = parse(getComputedStyle(at).backgroundColor);
                if (color.length === 3 || color[3] === 1) return color;
            }
            return parse(getComputedStyle(document.body).backgroundColor);
        };
        const plain = "label, legend, p, h2, summary, .segments span, .chip, .tools button, .tools a, output, .quiet";
        return Math.min(...[...document.querySelectorAll(plain)]
            .filter(e => e.offsetParent && e.textContent.trim())
            .map(e => [light(parse(getComputedStyle(e).color)), light(ground(e))])
            .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)));
    }""")


def test_reduced_motion_stops_the_shimmer(browser: Browser, site: Site) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(site.address)
    generate(page)
    assert page.locator(".picture").first.evaluate("box => getComputedStyle(box).animationName") == "none"
    context.close()


def test_every_control_has_a_name(page: Page, site: Site) -> None:
    page.goto(site.address)
    page.get_by_text("More settings").click()
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, a")]
        .filter(e => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
        .map(e => e.outerHTML)""")
    assert unnamed == []
