"""Does everything hold together? One walk over the page, the real server process and the real bundled model.

A person describes a face, watches it appear, cancels, reloads in mid-job, comes back by link and by dropped PNG,
downloads, looks through the gallery, keeps, deletes and takes back, and goes on when the server was killed and started
again under the open page; then changes a picture, a part of it, its features, blends it, and asks where it comes from.
Screenshots of the states go to FACES_SCREENSHOTS where that names a folder.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Page, expect

from core.imaging.png_metadata import read_request
from launcher.host import free_port
from tests.support.browsing import generate, keep_part, violations, visit, watched_page, write_prompt
from tests.support.server import Server
from tests.support.tiny_model import build_tiny_model, bundled_model

LONG_MS = 300_000  # for what the model does, on a slow machine beside other tests
STEPS = 40 if os.environ.get("FACES_SCREENSHOTS") else 6  # what must hold of an edit does not depend on beauty
PROMPT = "a smiling young woman with wavy blond hair"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The command that users run, with the model that they get, on one port over all its lives."""
    folder = tmp_path_factory.mktemp("page")
    model = bundled_model() or build_tiny_model(folder / "tiny")
    port = free_port("127.0.0.1", 5301)
    flags = ("--port", str(port), "--model", str(model), "--device", "cpu")
    with Server(folder / "data", *flags, patience_s=LONG_MS / 1000) as server:
        yield server


@pytest.fixture(scope="module")
def page_options() -> dict[str, Any]:
    desktop = {"viewport": {"width": 1440, "height": 900}, "permissions": ["clipboard-read", "clipboard-write"]}
    return {"wait_ms": LONG_MS, **desktop}


def keep_screenshot(page: Page, name: str) -> None:
    """Where somebody wants them: docs/screenshots is made this way."""
    if folder := os.environ.get("FACES_SCREENSHOTS"):
        page.wait_for_timeout(500)  # fades have ended
        page.screenshot(path=Path(folder) / f"{name}.png")


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/"


def ask_for(page: Page, prompt: str, *, steps: int, images: int = 4, seed: int = 11) -> None:
    write_prompt(page, prompt)
    page.locator("#counts").get_by_text(str(images), exact=True).click()
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Seed", exact=True).fill(str(seed))
    generate(page)


def ended(page: Page, state: str = "succeeded") -> None:
    expect(page.locator(".job").first).to_have_attribute("data-state", state, timeout=LONG_MS)


def sizes(page: Page) -> list[list[object]]:
    return page.eval_on_selector_all(".job:first-child .tile img", "all => all.map(i => [i.complete, i.naturalWidth])")


def test_from_words_to_a_picture_that_remembers_them(page: Page, server: Server, browser: Browser) -> None:
    visit(page, address(server))
    expect(page.locator("#model")).to_have_text(re.compile(r" · cpu$"))
    keep_screenshot(page, "empty")
    page.evaluate("""() => {
        window.seen = new Set();
        new MutationObserver(() => {
            const [step, image] = [document.querySelector(".step"), document.querySelector(".tile img")];
            if (step?.textContent && image.src.includes(".webp?t=")) window.seen.add(step.textContent);
        }).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
    }""")
    ask_for(page, PROMPT, steps=12)
    expect(page.locator(".step").first).to_have_text(re.compile("/12"), timeout=LONG_MS)
    keep_screenshot(page, "running")
    ended(page)
    expect(page.get_by_role("link", name="Download face 4")).to_be_attached()
    assert len(page.evaluate("[...window.seen]")) >= 3  # the tiles were filled by previews on the way
    expect(page.locator(".job .tile img").nth(3)).to_have_attribute("src", re.compile(r"images/3\.png$"))
    assert sizes(page) == [[True, 128]] * 4
    keep_screenshot(page, "finished")
    assert violations(page) == []

    with page.expect_download() as started:
        page.get_by_role("link", name="Download face 2").click()
    assert started.value.suggested_filename == "face-12.png"
    content = Path(started.value.path()).read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (128, 128)
    asked = read_request(content)["request"]
    assert (asked["prompt"], asked["seed"], asked["n_inf_steps"]) == (PROMPT, 12, 12)

    page.get_by_role("button", name=re.compile("^Face 3 of 4")).click()  # the film, the neighbours, a link
    expect(page.get_by_label("Denoising step")).to_be_enabled()
    keep_screenshot(page, "viewer")
    page.get_by_label("Denoising step").fill("2")
    expect(page.locator("#steps-text")).to_have_text("Step 3")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Copy a link").click()
    expect(page.get_by_role("status").filter(has_text="Link copied.")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")

    page.get_by_role("button", name="Details").click()
    page.get_by_label("Describe a face").fill("a smilling old man and woman with sunglasses")
    expect(page.locator(".contradiction")).to_be_visible()
    keep_screenshot(page, "words")

    with watched_page(browser, wait_ms=LONG_MS) as other:  # somebody else, by link and then by the PNG
        visit(other, link)
        expect(other.locator(".job .tile img").nth(3)).to_be_visible()
        expect(other.get_by_label("Describe a face")).to_have_value(PROMPT)
        expect(other.get_by_label("Seed", exact=True)).to_have_value("11")
        write_prompt(other, "somebody else")
        other.set_input_files("#restore-file", {"name": "a.png", "mimeType": "image/png", "buffer": content})
        expect(other.get_by_label("Describe a face")).to_have_value(PROMPT)
        expect(other.get_by_label("Seed", exact=True)).to_have_value("12")
        generate(other)
        drawn(other, 2)  # the job of the link is the other one
        with other.expect_download() as again:
            other.get_by_role("link", name="Download face 1").first.click()
        with Image.open(again.value.path()) as one, Image.open(io.BytesIO(content)) as two:
            apart = ImageChops.difference(one.convert("RGB"), two.convert("RGB"))
        assert max(high for _, high in apart.getextrema()) <= 1  # the same face


def test_cancel_reload_and_a_server_killed_under_the_page(page: Page, server: Server) -> None:
    visit(page, address(server))
    ask_for(page, "an old man with glasses", steps=1000, images=1)  # nobody's machine is done before it is cancelled
    expect(page.locator(".step").first).to_have_text(re.compile(r"/1000$"), timeout=LONG_MS)
    page.get_by_role("button", name=re.compile("^Cancel: ")).click()
    ended(page, "cancelled")
    expect(page.locator(".job").first.locator(".tile img")).to_be_visible()
    keep_screenshot(page, "cancelled")

    ask_for(page, "a man with a goatee", steps=500, images=1, seed=3)
    expect(page.locator(".step").first).to_have_text(re.compile(r"/500$"), timeout=LONG_MS)
    page.reload()
    expect(page.locator(".job")).to_have_attribute("data-state", "running")
    expect(page.locator(".job .tile img").first).to_be_visible()
    server.kill()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    keep_screenshot(page, "server-gone")
    server.start()
    expect(page.get_by_role("alert")).to_have_count(0)
    ended(page)
    expect(page.locator(".job .tile img").first).to_have_attribute("src", re.compile(r"images/0\.png$"))
    page.get_by_role("link", name="Gallery").click()
    expect(page.locator("#days .tile").first).to_be_visible()
    keep_screenshot(page, "gallery")


def test_a_face_is_refined_by_the_model_that_generated_it(page: Page, server: Server) -> None:
    visit(page, address(server))
    ask_for(page, PROMPT, steps=STEPS, images=1, seed=11)
    drawn(page, 1)
    page.locator(".job").get_by_role("button", name="Refine").click()
    sheet = page.get_by_role("dialog", name="Refine")
    sheet.get_by_label("How much changes").fill("0.6")
    sheet.get_by_role("button", name="Refine").click()
    drawn(page, 2)
    card = page.locator(".job").first
    expect(card.locator(".wipe-stack")).to_be_visible()
    keep_part(page, "refined", ".wipe-stack", ".wipe-names")
    source = card.locator(".wipe-over").get_attribute("src") or ""
    before, after = picture_at(page, server, source), pixels_of(page, server, 0)
    first = pixels_of(page, server, 1)
    assert before.shape == after.shape == first.shape == (128, 128, 3)
    assert np.abs(before.astype(int) - first).max() <= 1  # what was refined is the face that was there
    assert np.abs(after.astype(int) - first).mean() > 1


def test_gallery_favourites_and_undo_by_keyboard_on_a_dark_phone(browser: Browser, server: Server) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "device_scale_factor": 2}
    with watched_page(browser, wait_ms=LONG_MS, **phone) as page:
        visit(page, address(server))
        write_prompt(page, "a smiling old woman with gray hair")
        page.get_by_label("Steps", exact=True).fill("6")
        page.keyboard.press("Control+Enter")
        ended(page)
        page.get_by_role("navigation").get_by_role("link", name="Gallery").press("Enter")
        tiles = page.locator("#days .tile-open")
        expect(tiles.first).to_be_visible()
        keep_screenshot(page, "phone-gallery")
        before = tiles.count()
        assert before >= 4
        tiles.first.focus()
        page.keyboard.press("f")
        page.keyboard.press("Enter")
        heart = page.get_by_role("dialog").get_by_role("button", name="Favourite")
        expect(heart).to_have_attribute("aria-pressed", "true")
        keep_screenshot(page, "phone-viewer")
        page.keyboard.press("Delete")
        page.keyboard.press("Escape")
        expect(page.locator("#days .tile-open:visible")).to_have_count(before - 1)
        with page.expect_response(lambda answer: answer.url.endswith("/restore")):
            page.keyboard.press("Control+z")
        expect(page.locator("#days .tile-open:visible")).to_have_count(before)
        page.get_by_role("radio", name="Favourites").check(force=True)
        expect(page.locator("#days .tile")).to_have_count(1)
        assert violations(page) == []


def pixels_of(page: Page, server: Server, card: int) -> np.ndarray:
    """The first image of a card as the server keeps it, uint8 [H, W, 3]."""
    image = page.locator(".job").nth(card).locator(".tile img").first
    return picture_at(page, server, image.get_attribute("src") or "")


def picture_at(page: Page, server: Server, source: str) -> np.ndarray:
    """An image as the server keeps it, uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(page.request.get(address(server) + source).body())).convert("RGB"))


def drawn(page: Page, number: int) -> None:
    """Wait until so many cards are there and the newest is finished."""
    expect(page.locator(".job")).to_have_count(number)
    ended(page)


def test_a_picture_is_changed_varied_blended_and_checked(page: Page, server: Server) -> None:
    """Every panel of editing on the real model."""
    page.set_viewport_size({"width": 1440, "height": 1100})
    visit(page, address(server))
    ask_for(page, PROMPT, steps=STEPS, images=1, seed=11)
    drawn(page, 1)
    page.get_by_role("button", name=re.compile("^Face 1 of 1")).click()  # only its hair is drawn anew
    page.get_by_role("button", name="Inpaint a part of it").click()
    dialog = page.get_by_role("dialog", name="Paint what is inpainted")
    dialog.get_by_role("button", name="Hair").click()
    keep_screenshot(page, "painting")
    dialog.get_by_role("button", name="Use this part").click()
    ask_for(page, "a smiling young woman with black hair", steps=STEPS, images=2, seed=5)
    drawn(page, 2)
    keep_screenshot(page, "inpainted")
    assert violations(page) == []
    same = (pixels_of(page, server, 0) == pixels_of(page, server, 1)).all(-1)
    assert same[60:70, 58:70].all() and 0.2 < same.mean() < 0.95  # the nose is as it was, byte for byte

    page.reload()  # the picture and the mask come back with it, from what the drawn one carries
    page.wait_for_selector("body[data-resumed]")
    page.get_by_role("button", name="Image, 100 % changed: take out").click()
    page.locator(".job").first.get_by_role("button", name="Use these settings").click()
    expect(page.locator("#edits")).to_contain_text("Painted part alone", timeout=LONG_MS)
    page.get_by_role("button", name="Image, 100 % changed: take out").click()

    page.locator("#tools").get_by_role("button", name="Features").click()
    panel = page.get_by_role("group", name="Features", exact=True)
    panel.get_by_label("Smiling", exact=True).fill("-1.5")
    ask_for(page, PROMPT, steps=STEPS, images=1, seed=11)
    drawn(page, 3)
    keep_screenshot(page, "features")
    page.get_by_role("button", name="Smiling −1.5: take out").click()

    page.locator("#tools").get_by_role("button", name="Vary").click()
    page.get_by_role("group", name="Vary", exact=True).get_by_text("of 8", exact=True).click()
    ask_for(page, "an old man with glasses", steps=STEPS, images=2, seed=3)
    drawn(page, 4)
    badges = page.locator(".job").first.locator("button.badge")
    expect(badges).to_have_count(2)
    shares = [int(text.rstrip(" %")) for text in badges.all_text_contents()]
    assert shares == sorted(shares, reverse=True)
    badges.nth(1).focus()
    keep_screenshot(page, "best-of-many")
    page.locator(".job").first.get_by_role("button", name="Who came out").click()
    expect(page.get_by_role("dialog", name="Who came out")).to_contain_text("2 images")
    keep_screenshot(page, "population")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Best of 8: take out").click()

    page.locator("#tools").get_by_role("button", name="Blend").click()
    panel = page.get_by_role("group", name="Blend", exact=True)
    panel.get_by_label("To the description").fill("an old man with gray hair")
    panel.get_by_label("To the description").press("Tab")
    ask_for(page, PROMPT, steps=STEPS, images=5, seed=11)
    drawn(page, 5)
    expect(page.locator(".player")).to_be_visible()
    keep_screenshot(page, "blend")
    assert violations(page) == []
    page.get_by_role("button", name="Blend to “an old man with gray hair”: take out").click()

    page.get_by_role("button", name=re.compile("^Face 3 of 5")).click()
    page.get_by_role("dialog").get_by_role("button", name="About this image").click()
    about = page.get_by_role("dialog", name="About this image")
    expect(about).to_contain_text("It has generation parameters")
    about.get_by_role("button", name="Generate it again to check").click()
    expect(about.locator("p.quiet[role=status]")).to_have_text(re.compile("^(Exact|Visually equal)$"), timeout=LONG_MS)
    keep_screenshot(page, "about")
