"""Can every control of every panel be pressed, and is what is said true? Chromium walks the panels at six sizes.

A control that lies under something else looks right in the markup and passes every test that clicks with force. So each
one is brought into view as a person would, by scrolling, and the page is asked what lies at its centre.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import FilePayload, Page, Route, expect

from tests.support.browsing import Gate, Site, box_of, boxes, generate, visit, write_prompt
from tests.support.drawing import DrawingEngine

SIZES = ((320, 568), (360, 740), (390, 844), (740, 360), (1366, 768), (2560, 1440))
COVERED = """where => {
    const kinds = "button, a[href], input, select, textarea, summary, canvas";
    const named = (one) => one.getAttribute("aria-label") || one.textContent.trim() || one.id || one.className;
    const faults = [];
    for (const one of document.querySelector(where).querySelectorAll(kinds)) {
        const aim = one.matches("[type=radio], [type=checkbox]") ? one.closest("label") ?? one : one;
        const seen = aim.checkVisibility({ opacityProperty: true, visibilityProperty: true });
        if (!seen || one.type === "file" || one.closest(".visually-hidden")) continue;
        aim.scrollIntoView({ block: "center", inline: "center", behavior: "instant" });
        const box = aim.getBoundingClientRect();
        const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
        const hit = document.elementFromPoint(x, y);
        if (!hit || !(aim.contains(hit) || hit.contains(aim) && hit.matches("label")))
            faults.push(`${named(aim)} at ${Math.round(x)}, ${Math.round(y)} is under ${hit?.id || hit?.tagName}`);
        if (box.width < 8 || box.height < 8) faults.push(`${named(aim)} is ${box.width} x ${box.height}`);
    }
    return faults;
}"""


def aligned_photo(scale: int = 1) -> FilePayload:
    """A drawing in the layout of CelebA's aligned photographs, 178 x 218: red eyes, a green mouth, on grey."""
    image = Image.new("RGB", (178 * scale, 218 * scale), "grey")
    draw = ImageDraw.Draw(image)
    eyes_and_mouth = ((69, 111, 9, 4, "red"), (109, 111, 9, 4, "red"), (89, 152, 17, 6, "lime"))
    for x, y, wide, high, colour in eyes_and_mouth:
        draw.ellipse([scale * (x - wide), scale * (y - high), scale * (x + wide), scale * (y + high)], fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": "photo.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def check_sizes(page: Page, where: str, faults: list[str], what: str = "") -> None:
    """Walk one panel at all sizes; what is wrong is added to `faults`."""
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(60)
        faults += [f"{width} x {height}, {what or where}: {fault}" for fault in page.evaluate(COVERED, where)]
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            faults.append(f"{width} x {height}, {what or where}: the page is {wide} px too wide")
    page.set_viewport_size({"width": 1366, "height": 768})


def test_no_control_of_any_panel_is_covered(page: Page, site: Site) -> None:
    faults: list[str] = []
    visit(page, site.address)
    write_prompt(page, "a smilling woman")
    expect(page.locator("#notes .strange")).to_be_visible()
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Details").click()
    check_sizes(page, "#composer", faults)
    check_sizes(page, "header.top", faults)
    page.get_by_role("button", name="Details").click()
    page.get_by_text("More settings").click()

    for name in ("Features", "Vary", "Blend", "Image"):
        page.locator("#tools").get_by_role("button", name=name).click()
        panel = page.get_by_role("group", name=name, exact=True)
        expect(panel).to_be_visible()
        for summary in panel.locator("summary").all():
            summary.click()
        check_sizes(page, "#tools-field", faults, name)
    panel.locator("input[type=file]").first.set_input_files(aligned_photo(3))
    expect(page.get_by_role("dialog", name="Place the face")).to_be_visible()
    check_sizes(page, "dialog[open]", faults, "Place the face")
    page.get_by_role("dialog").get_by_role("button", name="Use this part").click()
    page.get_by_role("button", name="Paint what changes").click()
    page.get_by_role("dialog").get_by_role("button", name="Eyes").click()
    check_sizes(page, "dialog[open]", faults, "Paint what is inpainted")
    page.get_by_role("dialog").get_by_role("button", name="Use this part").click()
    check_sizes(page, "#tools-field", faults, "Image with a photo")
    page.get_by_role("button", name=re.compile("^Image, 100 % changed")).click()

    generate(page)
    expect(page.locator(".job")).to_have_attribute("data-state", "succeeded")
    check_sizes(page, ".job", faults)
    page.get_by_role("button", name=re.compile("^Face 1 of 4")).click()
    expect(page.get_by_label("Denoising step")).to_be_enabled()
    check_sizes(page, "#viewer", faults)
    page.get_by_role("dialog").get_by_role("button", name="About this image").click()
    expect(page.get_by_role("dialog", name="About this image")).to_be_visible()
    check_sizes(page, "dialog[open]", faults, "About this image")
    page.keyboard.press("Escape")
    page.locator("#help-open").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    check_sizes(page, "dialog[open]", faults, "Help")
    page.keyboard.press("Escape")
    page.get_by_role("navigation").get_by_role("link", name="Gallery").click()
    expect(page.locator("#days .tile").first).to_be_visible()
    check_sizes(page, "#view-gallery", faults)
    page.locator("#who").click()
    expect(page.get_by_role("dialog", name="Who")).to_be_visible()
    check_sizes(page, "dialog[open]", faults, "Who is here")
    page.keyboard.press("Escape")
    page.locator("#pick").click()
    page.locator("#days .tile-open").nth(0).click()
    page.locator("#days .tile-open").nth(1).click()
    expect(page.get_by_role("dialog", name="Compare")).to_be_visible()
    check_sizes(page, "#compare", faults)
    assert faults == [], "\n".join(faults)


@pytest.mark.parametrize(("size", "least"), [
    ((320, 568), 200), ((360, 740), 300), ((740, 360), 200), ((683, 384), 200),  # the last is a laptop at 200 %
    ((1366, 768), 440), ((2560, 1440), 850)])
def test_the_viewer_opens_on_its_picture_and_says_its_size(
    page: Page, site: Site, size: tuple[int, int], least: int
) -> None:
    visit(page, site.address)
    write_prompt(page, "a man")
    generate(page)
    expect(page.locator(".job")).to_have_attribute("data-state", "succeeded")
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.get_by_role("button", name=re.compile("^Face 1 of 4")).click()
    expect(page.get_by_label("Denoising step")).to_be_enabled()
    box = box_of(page, "#viewer-frame")
    assert box["width"] >= least and abs(box["width"] - box["height"]) < 1, box
    assert box["y"] >= 0 and box["y"] + box["height"] <= size[1] and box["x"] + box["width"] <= size[0], box
    image = page.locator("#viewer-image")
    expect(image).not_to_have_js_property("naturalWidth", 0)  # it may come after the dialog
    natural = image.evaluate("image => image.naturalWidth")
    for key, zoom in ((None, 1), ("+", 1.5)):
        if key:
            page.keyboard.press(key)
        wanted = 100 * zoom * box["width"] / natural
        near = [str(said) for said in range(int(wanted) - 1, int(wanted) + 3) if abs(said - wanted) <= 1]
        expect(page.locator("#zoom-reset")).to_have_text(re.compile(f"^({'|'.join(near)}) %$"))


def test_the_viewer_waits_for_its_style_sheet(page: Page, site: Site) -> None:
    """It is asked for when a job begins, and again if it did not come: who opens an image before it is there must not
    see the dialog without it."""
    held: list[Route] = []
    page.route("**/viewer.css", lambda route: held.append(route))
    visit(page, site.address)
    generate(page)
    expect(page.locator(".job")).to_have_attribute("data-state", "succeeded")
    held[0].abort("connectionreset")
    expect(page.locator("link[href$='viewer.css']")).to_have_count(0)
    page.get_by_role("button", name=re.compile("^Face 1 of 4")).click()
    page.wait_for_timeout(300)
    expect(page.locator("dialog[open]")).to_have_count(0)
    _, again = held
    again.continue_()
    expect(page.locator("dialog[open]")).to_be_visible()
    assert box_of(page, "#viewer-frame")["width"] >= 440


def test_a_large_screen_shows_larger_images(page: Page, site: Site) -> None:
    """The four images of a job fill the stage of a 2560 pixels wide screen; two jobs stand side by side."""
    page.set_viewport_size({"width": 2560, "height": 1440})
    visit(page, site.address)
    generate(page)
    expect(page.locator(".job")).to_have_attribute("data-state", "succeeded")
    (tiles,), (stage,), (*_, last) = boxes(page, ".tiles", "#stage", ".tiles .tile")
    assert last["width"] >= 300 and last["x"] + last["width"] - tiles["x"] >= 0.75 * stage["width"], (last, stage)
    generate(page)
    expect(page.locator(".job[data-state=succeeded]")).to_have_count(2)
    ((one, other),) = boxes(page, ".job")
    assert one["y"] == other["y"] and other["x"] > one["x"]


@pytest.mark.parametrize("height", [600, 720, 768, 820])
def test_generate_is_seen_whole_on_a_laptop(page: Page, site: Site, height: int) -> None:
    page.set_viewport_size({"width": 1366, "height": height})
    visit(page, site.address)
    page.get_by_role("button", name="Details").click()  # the form is longer than the window
    for top in (0, 300):
        page.evaluate("top => scrollTo(0, top)", top)
        box = box_of(page, "#generate")
        assert 0 <= box["y"] and box["y"] + box["height"] <= height, (top, box)


@pytest.mark.parametrize("width", [320, 360, 390])
def test_the_state_of_the_model_keeps_its_dot_on_a_phone(page: Page, site: Site, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    visit(page, site.address)
    page.locator("#model-text").evaluate("text => { text.textContent = 'celeba128-distilled · openvino cpu' }")
    (dot,), (pill,), (button,) = boxes(page, ".dot", "#model", "#help-open")
    assert dot["width"] == dot["height"] == 8
    assert pill["x"] + pill["width"] + 4 <= button["x"] and button["x"] + button["width"] <= width


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(("zone", "colour"), [("Eyes", (255, 0, 0)), ("Mouth", (0, 255, 0))])
def test_shapes_cover_what_they_are_named_after(
    page: Page, site: Site, engine: DrawingEngine, zone: str, colour: tuple[int, int, int], scale: int
) -> None:
    """The photo is placed by default, by nobody."""
    visit(page, site.address)
    page.locator("#tools").get_by_role("button", name="Image").click()
    panel = page.get_by_role("group", name="Image", exact=True)
    panel.locator("input[type=file]").first.set_input_files(aligned_photo(scale))
    page.get_by_role("dialog").get_by_role("button", name="Use this part").click()
    page.get_by_role("button", name="Paint what changes").click()
    page.get_by_role("dialog").get_by_role("button", name=zone).click()
    page.get_by_role("dialog").get_by_role("button", name="Use this part").click()
    generate(page)
    expect(page.locator(".job")).to_have_attribute("data-state", "succeeded")
    asked: Any = engine.begun[-1]
    meant = np.abs(np.asarray(asked.init_image).astype(int) - colour).sum(-1) < 120
    assert meant.any() and asked.mask[meant].all()


def test_a_grid_uses_its_room_and_keeps_seeds_whole(page: Page, site: Site) -> None:
    page.set_viewport_size({"width": 1366, "height": 768})
    visit(page, site.address)
    write_prompt(page, "a man")
    page.get_by_label("Seed", exact=True).fill("4294967290")
    page.locator("#tools").get_by_role("button", name="Vary").click()
    panel = page.get_by_role("group", name="Vary", exact=True)
    panel.get_by_text("A grid of seeds and descriptions").click()
    panel.get_by_label("More descriptions, one a line").fill("a woman")
    panel.get_by_role("button", name="Generate the grid").click()
    grid = page.get_by_role("region", name="Grid of seeds and descriptions")
    expect(grid.locator(".job[data-state=succeeded]")).to_have_count(2)
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        (frame,), seeds, tiles = boxes(page, ".matrix", ".matrix-seeds span", ".matrix-seeds + .job .tile")
        assert max(one["height"] for one in seeds) < 30, f"a seed is broken over lines at {width}"
        for seed, tile in zip(seeds, tiles, strict=True):
            assert abs(seed["x"] - tile["x"]) < 2, f"a seed is not above its face at {width}"
            assert tile["width"] >= 84
        last = tiles[-1]
        if width == 1366:
            assert frame["x"] + frame["width"] - last["x"] - last["width"] < 40


def test_badges_of_a_blend_lie_beside_the_faces(page: Page, site: Site, gate: Gate) -> None:
    gate.open()
    visit(page, site.address)
    write_prompt(page, "a man")
    page.locator("#tools").get_by_role("button", name="Blend").click()
    panel = page.get_by_role("group", name="Blend", exact=True)
    panel.get_by_label("To the description").fill("an old woman")
    panel.get_by_label("To the description").press("Tab")
    generate(page)
    expect(page.locator(".job")).to_have_attribute("data-state", "succeeded")
    page.evaluate("""async () => {
        const { badges } = await import("./static/badges.js");
        const made = await badges({ adherence: 0.5, agreement: { Male: 0.5 }, nearest: { too_close: true } }, "a man");
        document.querySelector(".strip .tile").append(...made);
    }""")
    (face, *_), badges = boxes(page, ".strip .tile-open", ".strip .tile:first-child .badge")
    assert len(badges) >= 2
    for box in badges:
        assert box["y"] >= face["y"] + face["height"] - 1, (face, box)


# ---- what is said while somebody works -------------------------------------------------------------------------------


def test_the_word_being_written_is_not_judged(page: Page, site: Site) -> None:
    visit(page, site.address)
    area = page.get_by_label("Describe a face")
    with page.expect_response("**/prompt/analyze"):
        area.press_sequentially("a xyzzy man with a beardd")
    expect(page.locator("#notes")).to_contain_text("xyzzy")  # what was written before it is judged at once
    expect(page.locator("#marks mark.unknown")).to_have_text(["xyzzy"])
    expect(page.locator("#notes")).not_to_contain_text("beardd", timeout=1)
    expect(page.locator("#marks mark.unknown")).to_have_text(["xyzzy", "beardd"])  # who rests has written it


def test_one_letter_brings_suggestions_and_an_article_none(page: Page, site: Site) -> None:
    visit(page, site.address)
    area = page.get_by_label("Describe a face")
    area.press_sequentially("a")
    expect(page.get_by_role("listbox")).to_be_hidden()
    area.press_sequentially(" m")
    expect(page.get_by_role("option").first).to_have_text(re.compile("^(a )?m"))


@pytest.mark.parametrize(("field", "value", "said"), [
    ("Steps", "99999", "Must be an integer from 1 to 1000; got 99999."),
    ("Steps", "", "Must be an integer from 1 to 1000."),
    ("Seed", "1e999", 'got "1e999"'), ("Seed", "abc", 'got "abc"')])
def test_one_wrong_number_is_one_error(page: Page, site: Site, field: str, value: str, said: str) -> None:
    visit(page, site.address)
    page.get_by_label(field, exact=True).fill(value)
    generate(page)
    expect(page.locator(".field-error")).to_have_count(1)
    expect(page.locator(".field-error")).to_contain_text(said)
    expect(page.locator("body")).not_to_contain_text("got null")


def test_the_gallery_counts_what_it_shows_and_finds_seeds(
    page: Page, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.drawing.TROUBLE", "an old man with a grey beard")
    site.wait(site.submit("an old man with a grey beard", seed=7), site.submit("an old man", seed=4000, n_images=3))
    visit(page, site.address)
    page.get_by_role("navigation").get_by_role("link", name="Gallery").click()
    said = page.locator("#gallery-status")
    expect(said).to_have_text("3 images, 1 unfinished")
    page.get_by_label("Search the prompts").fill("grey beard")
    expect(said).to_have_text("1 unfinished for “grey beard”")
    expect(page.locator("#days .tile")).to_have_count(1)
    for seed, found in (("4002", "3 images"), ("4003", "0 images"), ("7", "1 unfinished")):
        page.get_by_label("Search the prompts").fill(seed)
        expect(said).to_have_text(f"{found} for “{seed}”")


def test_an_open_gallery_shows_what_others_draw(page: Page, site: Site) -> None:
    site.wait(site.submit("an old man"))
    visit(page, site.address)
    page.get_by_role("navigation").get_by_role("link", name="Gallery").click()
    tiles = page.locator("#days .tile")
    expect(tiles).to_have_count(1)
    site.wait(site.submit("a woman", n_images=2))
    expect(tiles).to_have_count(3)
    expect(tiles.first).to_contain_text("a woman")
    expect(page.locator("#gallery-status")).to_have_text("3 images")
