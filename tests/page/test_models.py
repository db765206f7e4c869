"""Does the page serve several models? Our real one and a tiny Stable Diffusion behind one server, used in Chromium.

A model is chosen, loaded, generates, is cancelled, changes an image and refines a face of the other; one whose weights
are cut off, and one that breaks later, leave the rest as it is. Every new state is looked at by axe and for covered
controls at two sizes.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Page, expect

from tests.page.test_layout import COVERED
from tests.support.browsing import Site, generate, keep_part, violations, visit, write_prompt

if TYPE_CHECKING:
    from tests.support.tiny_stable_diffusion import TinyStableDiffusion

SIZES = ((1366, 768), (390, 844))
LONG_S = 300  # while a state is looked at, on a slow machine
PROMPT = "a smiling young woman with wavy blond hair"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyStableDiffusion:
    from tests.support.tiny_stable_diffusion import build

    return build(tmp_path_factory.mktemp("stable-diffusion"))


@pytest.fixture(scope="module")
def page_options() -> dict[str, Any]:
    return {"permissions": ["clipboard-read", "clipboard-write"]}


@pytest.fixture
def loads() -> threading.Event:
    """The model `tiny` is loaded while it is set."""
    loads = threading.Event()
    loads.set()
    return loads


@pytest.fixture
def broken(tiny: TinyStableDiffusion, tmp_path: Path) -> Path:
    """A folder that a test may break after the server has started."""
    return shutil.copytree(tiny.folder, tmp_path / "broken")


@pytest.fixture
def site(tiny: TinyStableDiffusion, broken: Path, loads: threading.Event, tmp_path: Path) -> Iterator[Site]:
    """Our model, the tiny one, one that can be broken, and one that is cut off, as the command line opens them."""
    from api import models_of
    from tests.support.tiny_model import build_tiny_model, bundled_model
    from tests.support.tiny_stable_diffusion import SIZE

    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny.safetensors.parent / name, tmp_path / name)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny.safetensors.read_bytes()[:5_000_000])
    ours = bundled_model() or build_tiny_model(tmp_path / "ours")
    models = models_of(Namespace(models=[ours, tiny.folder, broken, cut], device="cpu", threads=1, precision="fp32",
                                 engine="torch", image_size=SIZE))
    source = models._sources["tiny"]

    def load() -> Any:
        assert loads.wait(LONG_S)
        return source.load()

    models._sources["tiny"] = dataclasses.replace(source, load=load)
    with Site(models) as site:
        site.wait_until_ready()
        yield site
        loads.set()


@pytest.fixture
def look(page: Page) -> Iterator[Callable[[str, str], None]]:
    """Look at a state at both sizes: what axe finds and what is covered in a part of the page fails the test."""
    found: dict[str, list[str]] = {}

    def look(state: str, where: str) -> None:
        for width, height in SIZES:
            page.emulate_media(color_scheme="dark" if width < 500 else "light")
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(60)
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            faults = [*page.evaluate(COVERED, where), *violations(page), *([f"{wide} px too wide"] if wide > 0 else [])]
            if faults:
                found[f"{state} at {width}"] = faults
        page.set_viewport_size({"width": SIZES[0][0], "height": SIZES[0][1]})

    yield look
    assert found == {}, found


def choose(page: Page, name: str) -> None:
    page.get_by_label("Model", exact=True).select_option(name)
    expect(page.locator("#model-text")).to_have_text(f"{name} · cpu")


def ask_for(page: Page, prompt: str, *, steps: int = 3) -> None:
    write_prompt(page, prompt)
    page.locator("#counts").get_by_text("1", exact=True).click()
    page.get_by_label("Steps", exact=True).fill(str(steps))
    generate(page)


def ended(page: Page, state: str = "succeeded", jobs: int = 1) -> None:
    expect(page.locator(".job")).to_have_count(jobs)
    expect(page.locator(".job").first).to_have_attribute("data-state", state)


def note(page: Page) -> Any:
    return page.locator("#model-note")


def test_one_model_needs_no_menu(page: Page, tmp_path: Path) -> None:
    from tests.support.drawing import DrawingEngine

    with Site(DrawingEngine) as site:
        site.wait_until_ready()
        visit(page, site.address)
        expect(page.get_by_label("Model", exact=True)).to_have_count(0)
        write_prompt(page, "a man")
        generate(page)
        ended(page)
        page.locator(".job").get_by_role("button", name=re.compile("^Face 1 of 4")).click()
        page.get_by_role("dialog").get_by_role("button", name="Refine").click()
        sheet = page.get_by_role("dialog", name="Refine")
        expect(sheet.get_by_label("How much changes")).to_have_value("0.35")
        expect(sheet.get_by_label("Model")).to_have_count(0)  # its own


def test_a_model_is_chosen_loaded_cancelled_and_remembered(
    page: Page, site: Site, loads: threading.Event, look: Callable[[str, str], None]
) -> None:
    visit(page, site.address)
    expect(page.locator("#model-field")).to_contain_text("cut failed:")
    write_prompt(page, "a smiling woman")
    expect(page.locator("#notes .chip")).to_have_count(2)
    page.locator("#tools").get_by_role("button", name="Vary").click()
    expect(page.get_by_text("Balance who appears")).to_be_visible()
    page.get_by_role("button", name="Details").click()

    loads.clear()
    choose(page, "tiny")
    expect(note(page)).to_have_text("64 × 64 pixels. It is loaded when its first image is generated.")
    expect(page.locator("#live")).to_have_text("64 × 64 pixels. It is loaded when its first image is generated.")
    expect(page.locator("#notes .chip")).to_have_count(0)
    expect(page.get_by_role("button", name="Details")).to_be_hidden()
    expect(page.locator("#palette")).to_be_hidden()
    tools = page.locator("#tools button")
    expect(tools).to_have_text(["Image", "Vary", "Blend"])
    tools.nth(1).click()
    expect(page.get_by_text("Around one face")).to_be_visible()
    expect(page.get_by_text("Balance who appears")).to_have_count(0)
    tools.nth(2).click()
    expect(page.get_by_label("To the description")).to_be_visible()
    expect(page.get_by_role("button", name="From an image")).to_have_count(0)  # noise is found by the first model alone
    tools.nth(2).click()
    page.get_by_text("More settings").click()
    expect(page.locator("#guidance-value")).to_have_text("7.5")
    assert "Euler" in page.get_by_label("Sampler").locator("option").all_text_contents()
    expect(page.locator("footer")).to_contain_text("tiny, a model of other people")
    page.get_by_text("More settings").click()
    keep_part(page, "models", "#composer .field", "#model-note")
    look("another model", "#composer")

    ask_for(page, "an old man", steps=900)
    expect(note(page)).to_have_text("Loading tiny …")
    expect(page.locator(".job-status")).to_have_text("Loading tiny …")
    expect(page.locator("#live")).to_have_text("Loading tiny …")
    look("loading", ".job")
    loads.set()
    expect(page.locator(".job-status")).to_have_text(re.compile("^Step [1-9][0-9]* of 900"))
    expect(note(page)).to_have_text("64 × 64 pixels.")
    page.get_by_role("button", name=re.compile("^Cancel: ")).click()
    ended(page, "cancelled")
    look("cancelled", ".job")

    ask_for(page, "an old man")
    ended(page, jobs=2)
    expect(page.locator(".job").first).to_contain_text("tiny · 3 steps")
    page.get_by_role("button", name="Copy a link").first.click()
    expect(page.get_by_role("status").filter(has_text="Link copied.")).to_be_visible()
    assert "&model=tiny" in page.evaluate("navigator.clipboard.readText()")
    page.reload()
    page.wait_for_selector("body[data-resumed]")
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny")
    expect(page.locator("#guidance-value")).to_have_text("7.5")
    choose(page, "celeba128")
    page.get_by_role("button", name="Use these settings").first.click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny")


def test_links_and_images_bring_their_model_back(page: Page, site: Site) -> None:
    site.wait(job := site.submit("an old man", model="tiny", seed=5))
    visit(page, f"{site.address}#prompt=an+old+man&n_images=1&seed=5&model=tiny")
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
    choose(page, "celeba128")
    content = site.app.test_client().get(f"/jobs/{job}/images/0.png").data
    page.set_input_files("#restore-file", {"name": "a.png", "mimeType": "image/png", "buffer": content})
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny")


def test_a_face_is_refined_and_an_image_changed(page: Page, site: Site, look: Callable[[str, str], None]) -> None:
    visit(page, site.address)
    ask_for(page, PROMPT, steps=6)
    ended(page)
    page.locator(".job").get_by_role("button", name="Refine").press("Enter")
    sheet = page.get_by_role("dialog", name="Refine")
    expect(sheet.get_by_label("Model")).to_have_value("tiny")
    look("asking to refine", "#refine")
    sheet.get_by_label("How much changes").focus()
    page.keyboard.press("ArrowRight")
    expect(sheet.get_by_label("How much changes")).to_have_value("0.4")
    sheet.get_by_role("button", name="Refine").press("Enter")
    ended(page, jobs=2)
    card = page.locator(".job").first
    expect(card).to_contain_text("50 steps")  # the usual ones of that model, of which 40 % are done
    expect(card).to_contain_text("Refined by tiny, 40 %")
    sizes = card.locator(".wipe-stack img")
    expect(sizes).to_have_count(2)
    for image, size in ((sizes.nth(1), 128), (sizes.nth(0), 64)):  # the one before lies above
        expect(image).to_have_js_property("naturalWidth", size)
    slider = card.get_by_label("How much of the image before is seen")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(card.locator(".wipe-over")).to_have_css("clip-path", "inset(0px 49% 0px 0px)")
    look("before and after", ".job")
    box = slider.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    expect(slider).to_have_value(re.compile("^2[3-7]$"))

    card.get_by_role("button", name=re.compile("^Face 1 of 1")).click()
    page.get_by_role("dialog").get_by_role("button", name="Before and after").click()
    expect(page.get_by_role("dialog", name="Before and after").locator("img")).to_have_count(2)
    look("before and after, large", "#before")
    page.keyboard.press("Escape")
    expect(page.locator("dialog[open]")).to_have_count(0)

    card.get_by_role("button", name=re.compile("^Face 1 of 1")).click()  # refined once more, by our own
    page.get_by_role("dialog").get_by_role("button", name="Refine").click()
    expect(sheet.get_by_label("Model")).to_have_value("celeba128")
    sheet.get_by_role("button", name="Refine").click()
    ended(page, jobs=3)
    expect(page.locator(".job").first.locator(".wipe-over")).to_have_js_property("naturalWidth", 64)
    expect(page.locator(".job").first.locator(".wipe-stack img").first).to_have_js_property("naturalWidth", 128)

    choose(page, "tiny")
    page.locator(".job").last.get_by_role("button", name=re.compile("^Face 1 of 1")).click()
    page.get_by_role("dialog").get_by_role("button", name="Start from this image").click()
    expect(page.locator("#edits")).to_contain_text("Image, 60 % changed")
    generate(page)
    ended(page, jobs=4)
    expect(page.locator(".job").first.locator(".tile img")).to_have_js_property("naturalWidth", 64)


def test_a_model_that_cannot_be_loaded_leaves_the_others(
    page: Page, site: Site, broken: Path, look: Callable[[str, str], None]
) -> None:
    visit(page, site.address)
    choose(page, "broken")
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    ask_for(page, "an old man")
    ended(page, "failed")
    expect(page.locator(".job").get_by_role("alert")).to_contain_text("The model broken could not be loaded")
    expect(note(page)).to_have_text(re.compile("^broken failed: "))
    look("failed", "#composer")
    choose(page, "celeba128")
    ask_for(page, "an old man")
    ended(page, jobs=2)


def test_the_keyboard_alone_chooses_a_model(page: Page, site: Site) -> None:
    visit(page, site.address)
    page.get_by_label("Describe a face").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "model-choice":
            break
    expect(page.get_by_label("Model", exact=True)).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#model-text")).to_have_text("tiny · cpu")
    expect(page.get_by_label("Model", exact=True)).to_be_focused()
