"""Can a person edit, vary and check faces on the page? Headless Chromium tries every panel; the drawing engine draws.

What is asked for is read from what reached the engine, so nothing here depends on a model. The walk over the bundled
model is in `test_walk.py`.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, Route, expect

from tests.support.browsing import Site, generate, violations, visit, write_prompt
from tests.support.drawing import Drawing, DrawingEngine, DrawingRun


def photo(orientation: int = 1) -> FilePayload:
    """A JPEG of 600 x 900 pixels: red above, blue below; `orientation` is what EXIF says of how it was held."""
    image = Image.new("RGB", (600, 900), "blue")
    image.paste((255, 0, 0), (0, 0, 600, 450))
    if orientation == 6:  # held upright, stored lying: to be turned by 90 degrees to the right
        image = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": buffer.getvalue()}


def tool(page: Page, name: str) -> Locator:
    """Open a panel; it."""
    page.locator("#tools").get_by_role("button", name=name).click()
    panel = page.get_by_role("group", name=name, exact=True)
    expect(panel).to_be_visible()
    return panel


def draw(page: Page, number: int = 1) -> None:
    """Press Generate, and wait until so many jobs are drawn."""
    generate(page)
    expect(page.locator(".job")).to_have_count(number)
    expect(page.locator(".job").first).to_have_attribute("data-state", "succeeded")


def choose_photo(page: Page, given: FilePayload) -> Locator:
    """Bring a photo into the panel; the dialog that places the face."""
    panel = tool(page, "Image")
    panel.locator("input[type=file]").first.set_input_files(given)
    dialog = page.get_by_role("dialog", name="Place the face")
    expect(dialog).to_be_visible()
    return dialog


# ---- a picture to start from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photo_is_placed_and_changed(page: Page, site: Site, engine: DrawingEngine, orientation: int) -> None:
    visit(page, site.address)
    dialog = choose_photo(page, photo(orientation))
    window = dialog.get_by_role("application")
    for _ in range(40):  # to the upper end: all red, whichever way the camera was held
        window.press("Shift+ArrowDown")
    for _ in range(8):
        window.press("+")
    expect(dialog.get_by_label("Zoom", exact=True)).to_have_attribute("aria-valuetext", re.compile(r"^2\.1 ×"))
    for _ in range(40):
        window.press("Shift+ArrowDown")
    assert violations(page) == []
    dialog.get_by_role("button", name="Use this part").click()
    expect(dialog).to_be_hidden()
    strength = page.get_by_label("How much changes")
    expect(strength).to_have_value("0.6")
    strength.fill("0.25")
    expect(page.locator("#edits")).to_contain_text("Image, 25 % changed")
    draw(page)
    asked = engine.begun[-1]
    assert asked.init_image.shape == (32, 32, 3) and asked.strength == 0.25 and asked.mask is None
    assert asked.init_image[..., 0].min() > 200 and asked.init_image[..., 2].max() < 60
    expect(page.locator(".job")).to_contain_text("Image, 25 % changed")

    page.get_by_role("button", name="Image, 25 % changed: take out").click()
    expect(page.locator("#edits button")).to_have_count(0)
    draw(page, 2)
    assert engine.begun[-1].init_image is None
    page.locator(".job").nth(1).get_by_role("button", name="Use these settings").click()
    expect(page.locator("#edits")).to_contain_text("Image, 25 % changed")
    page.reload()  # what was chosen is still there
    page.wait_for_selector("body[data-resumed]")
    draw(page, 3)
    assert np.array_equal(engine.begun[-1].init_image, asked.init_image) and engine.begun[-1].strength == 0.25


def test_the_window_is_dragged_and_pinched(page: Page, site: Site, engine: DrawingEngine) -> None:
    visit(page, site.address)
    dialog = choose_photo(page, photo())
    box = dialog.get_by_role("application").bounding_box()
    assert box
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -400)
    expect(dialog.get_by_label("Zoom", exact=True)).to_have_attribute("aria-valuetext", "2.7 ×")
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] - 3000, steps=8)  # the lower end, which is blue
    page.mouse.up()
    dialog.get_by_role("button", name="Use this part").click()
    draw(page)
    assert engine.begun[-1].init_image[..., 2].min() > 200
    page.get_by_role("button", name="Place it again").click()
    expect(dialog).to_be_visible()
    page.evaluate("""() => {
        const canvas = document.querySelector("dialog canvas");
        canvas.setPointerCapture = () => {};
        const {left, top} = canvas.getBoundingClientRect();
        const touch = (name, id, x) => canvas.dispatchEvent(new PointerEvent(name, {
            pointerId: id, pointerType: "touch", clientX: left + x, clientY: top + 150, bubbles: true}));
        touch("pointerdown", 1, 140); touch("pointerdown", 2, 160);
        touch("pointermove", 1, 120); touch("pointermove", 2, 180);
        touch("pointerup", 1, 120); touch("pointerup", 2, 180);
    }""")
    expect(dialog.get_by_label("Zoom", exact=True)).to_have_attribute("aria-valuetext", re.compile(r"^[23]\.\d ×"))
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Image, 60 % changed: take out")).to_be_visible()


def test_only_what_is_painted_is_drawn_anew(page: Page, site: Site, engine: DrawingEngine) -> None:
    visit(page, site.address)
    choose_photo(page, photo()).get_by_role("button", name="Use this part").click()
    page.get_by_role("button", name="Paint what changes").click()
    dialog = page.get_by_role("dialog", name="Paint what is inpainted")
    use = dialog.get_by_role("button", name="Use this part")
    expect(use).to_be_disabled()
    covered = dialog.locator(".sheet-foot [role=status]")
    dialog.get_by_role("button", name="Mouth").click()
    expect(covered).to_have_text("6 % of the image is inpainted.")
    dialog.get_by_role("button", name="Invert").click()
    expect(covered).to_have_text("94 % of the image is inpainted.")
    dialog.get_by_role("button", name="Undo").click()
    dialog.get_by_role("button", name="Undo").click()
    expect(use).to_be_disabled()
    page.keyboard.press("Control+Shift+z")
    expect(covered).to_have_text("6 % of the image is inpainted.")
    dialog.get_by_role("button", name="Clear").click()
    canvas = dialog.get_by_role("application")
    box = canvas.bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 5, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, middle, steps=6)
    page.mouse.up()
    dialog.get_by_text("Eraser").click()
    canvas.press("Space")  # the keyboard's brush stands in the middle
    assert violations(page) == []
    use.click()
    expect(page.get_by_label("How much changes")).to_have_value("1")
    draw(page)
    mask = engine.begun[-1].mask
    assert mask.shape == (32, 32) and engine.begun[-1].strength == 1.0
    assert mask[16, 3] and mask[16, 28] and not mask[16, 16] and not mask[4].any() and not mask[28].any()
    page.get_by_role("button", name="Painted part alone: take out").click()
    expect(page.get_by_label("How much changes")).to_have_value("0.6")


def test_a_result_is_edited_and_a_dropped_photo_is_a_start(page: Page, site: Site, engine: DrawingEngine) -> None:
    visit(page, site.address)
    write_prompt(page, "a smiling woman")
    draw(page)
    page.get_by_role("button", name=re.compile("^Face 2 of 4")).click()
    page.get_by_role("button", name="Inpaint a part of it").click()
    dialog = page.get_by_role("dialog", name="Paint what is inpainted")
    dialog.get_by_role("button", name="Hair").click()
    dialog.get_by_role("button", name="Use this part").click()
    draw(page, 2)
    job = page.locator(".job").nth(1).get_attribute("data-job")
    drawn = np.asarray(Image.open(io.BytesIO(site.app.test_client().get(f"/jobs/{job}/images/1.png").data)))
    assert np.array_equal(engine.begun[-1].init_image, drawn) and engine.begun[-1].mask.any()
    page.set_input_files("#restore-file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no image"})
    expect(page.get_by_role("alert").last).to_contain_text("It could not be read")
    page.get_by_role("button", name="Take it out").click()
    page.set_input_files("#restore-file", photo())  # the panel is open: a photo is what it waits for
    expect(page.get_by_role("dialog", name="Place the face")).to_be_visible()


def test_the_film_is_forked_at_a_step(page: Page, site: Site, engine: DrawingEngine) -> None:
    visit(page, site.address)
    write_prompt(page, "a man")
    draw(page)
    page.get_by_role("button", name=re.compile("^Face 3 of 4")).click()
    film = page.get_by_label("Denoising step")
    expect(film).to_be_enabled()
    expect(page.get_by_role("button", name="Fork from here")).to_be_hidden()  # the end is no place to go on from
    film.fill("3")  # one of the first, which come by steps and by time
    done, total = re.findall(r"\d+", film.get_attribute("aria-valuetext") or "")
    share = int(done) / int(total)
    page.get_by_role("button", name="Fork from here").click()
    expect(page.locator("#edits")).to_contain_text(f"From {share:.0%} of the way".replace("%", " %"))
    expect(page.get_by_label("Describe a face")).to_be_focused()
    write_prompt(page, "a woman")
    draw(page, 2)
    asked = engine.begun[-1]
    assert (asked.prompt, asked.start) == ("a woman", share) and asked.latents is not None


# ---- features, variations, blends ------------------------------------------------------------------------------------


def test_features_are_moved_and_taken_back(page: Page, site: Site, engine: DrawingEngine) -> None:
    visit(page, site.address)
    panel = tool(page, "Features")
    panel.get_by_label("Smiling", exact=True).fill("1.5")
    panel.get_by_text("Worn", exact=True).click()
    panel.get_by_label("Glasses", exact=True).fill("-0.5")
    expect(panel).to_contain_text("now 5 instead of 1")
    expect(page.locator("#edits button")).to_have_text(["Smiling +1.5", "Glasses −0.5"])
    assert violations(page) == []
    draw(page)
    assert engine.begun[-1].attributes == {"Smiling": 1.5, "Eyeglasses": -0.5}
    page.get_by_role("button", name="Smiling +1.5: take out").click()
    expect(panel.get_by_label("Smiling", exact=True)).to_have_value("0")
    panel.get_by_role("button", name="Back to none").click()
    expect(page.locator("#edits button")).to_have_count(0)


def test_the_best_of_many_say_how_well_they_fit(page: Page, site: Site, engine: DrawingEngine) -> None:
    visit(page, site.address)
    write_prompt(page, "a smiling woman with glasses")
    page.get_by_label("Seed", exact=True).fill("7")
    panel = tool(page, "Vary")
    panel.get_by_text("of 16", exact=True).click()
    panel.get_by_label("Balance who appears").check()
    draw(page)
    assert engine.begun[-1].candidates == 16 and engine.begun[-1].balance is True
    badges = page.locator(".badge")
    expect(badges).to_have_count(4)
    shares = [int(text.rstrip(" %")) for text in badges.all_text_contents()]
    assert shares == sorted(shares, reverse=True)
    badges.first.focus()
    detail = page.locator(".detail").first
    expect(detail).to_be_visible()
    assert sorted(detail.locator("li span:first-child").all_text_contents()) == ["glasses", "smiling", "woman"]
    seeds = page.locator(".job a[download^=face-]").evaluate_all("all => all.map(a => a.download)")
    assert seeds != [f"face-{seed}.png" for seed in range(7, 11)]  # each has its own
    assert violations(page) == []

    page.get_by_role("button", name="Who came out").click()
    dialog = page.get_by_role("dialog", name="Who came out")
    expect(dialog).to_contain_text("4 images, as the attribute classifier sees them.")
    expect(dialog.get_by_role("heading", name=re.compile("^Sex"))).to_have_text("Sex as the words say")
    expect(dialog.get_by_role("heading", name=re.compile("^Age"))).to_have_text("Age left open by the words")
    shares = [int(text.rstrip(" %")) for text in dialog.locator("section").first.locator(".share").all_text_contents()]
    assert sum(shares) == 100
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("navigation").get_by_role("link", name="Gallery").click()
    page.get_by_role("button", name="Who is here").click()
    expect(dialog).to_contain_text("4 images, as the attribute classifier sees them.")


def test_variations_of_a_picture_and_a_grid(page: Page, site: Site, engine: DrawingEngine) -> None:
    visit(page, site.address)
    write_prompt(page, "a man")
    page.get_by_label("Seed", exact=True).fill("20")
    draw(page)
    page.get_by_role("button", name=re.compile("^Face 3 of 4")).click()
    page.get_by_role("button", name="Vary this face").click()
    expect(page.locator("#edits")).to_contain_text("Varied by 30 %")
    page.get_by_label("Around one face").fill("0.15")
    draw(page, 2)
    asked = engine.begun[-1]
    assert (asked.seed, asked.num_images, asked.variation_strength) == (22, 4, 0.15)
    page.get_by_role("button", name=re.compile("^Face 2 of 4")).first.click()
    page.get_by_role("dialog").get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("22")

    panel = page.get_by_role("group", name="Vary", exact=True)
    panel.get_by_text("A grid of seeds and descriptions").click()
    panel.get_by_label("More descriptions, one a line").fill("a woman\n\n an old man ")
    panel.get_by_label("Seeds").select_option("3")
    panel.get_by_role("button", name="Generate the grid").click()
    grid = page.get_by_role("region", name="Grid of seeds and descriptions")
    expect(grid.locator(".job[data-state=succeeded]")).to_have_count(3)
    expect(grid.locator("h3")).to_have_text(["a man", "a woman", "an old man"])
    expect(grid.locator(".matrix-seeds span")).to_have_text(["22", "23", "24"])
    assert [(one.prompt, one.seed, one.num_images) for one in engine.begun[-3:]] == [
        ("a man", 22, 3), ("a woman", 22, 3), ("an old man", 22, 3)]
    assert violations(page) == []
    page.reload()
    expect(grid.locator(".job")).to_have_count(3)


def test_two_ends_are_blended_and_played(page: Page, site: Site, engine: DrawingEngine) -> None:
    visit(page, site.address)
    write_prompt(page, "a young man")
    page.get_by_label("Seed", exact=True).fill("5")
    panel = tool(page, "Blend")
    panel.get_by_label("To the description").fill("an old man")
    panel.get_by_label("To the seed").fill("99")
    panel.get_by_label("To the seed").press("Tab")
    expect(page.get_by_role("radio", name="8", exact=True)).to_be_checked()
    draw(page)
    asked = engine.begun[-1]
    assert (asked.num_images, asked.interpolate_to.prompt, asked.interpolate_to.seed) == (8, "an old man", 99)
    player = page.locator(".player")
    place = player.get_by_label("Place between the two")
    place.evaluate("input => { input.value = 3.25; input.dispatchEvent(new Event('input')); }")
    shown = player.locator("img").evaluate_all("all => all.map(one => Number(one.style.opacity))")
    assert shown == [1, 1, 1, 1, 0.25, 0, 0, 0]
    player.get_by_role("button", name="Play the blend").click()
    expect(place).to_have_attribute("aria-valuetext", re.compile(r"^[6-9]\d % of the way"))
    player.get_by_role("button", name="Pause").click()
    assert violations(page) == []
    for kind in ("WebP", "GIF"):
        with page.expect_download() as started:
            player.get_by_role("link", name=f"Download as animated {kind.upper()}").click()
        with Image.open(Path(started.value.path())) as film:
            assert film.format == kind.upper()

    page.get_by_role("button", name="Blend to “an old man”: take out").click()
    page.get_by_label("Seed", exact=True).fill("40")
    draw(page, 2)
    page.get_by_role("navigation").get_by_role("link", name="Gallery").click()
    page.get_by_role("button", name="Compare").click()
    for n in (0, 2):
        page.locator("#days .tile-open").nth(n).click()
    page.get_by_role("dialog", name="Compare").get_by_role("button", name="Blend these two").click()
    expect(page.locator("#edits")).to_contain_text("Blend to seed 42")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("40")


def test_a_blend_leads_from_one_photo_to_another(page: Page, site: Site, engine: DrawingEngine) -> None:
    """Each through the noise that draws it again, which the server looks for, with the settings that make it exact."""
    visit(page, site.address)
    panel = tool(page, "Blend")
    dialog = page.get_by_role("dialog", name="Place the face")
    for button, key in (("From an image", "Shift+ArrowDown"), ("To an image", "Shift+ArrowUp")):  # from red to blue
        with page.expect_file_chooser() as opened:
            panel.get_by_role("button", name=button).click()
        opened.value.set_files(photo())
        expect(dialog).to_be_visible()
        for press in [*["+"] * 8, *[key] * 40]:
            dialog.get_by_role("application").press(press)
        with page.expect_response(re.compile("/encode$")) as answered:
            dialog.get_by_role("button", name="Use this part").click()
        assert answered.value.ok and answered.value.request.post_data_json["invert"] is True
    expect(page.locator("#edits")).to_contain_text("Blend to an image")
    expect(panel).to_contain_text("From the description above and an image")
    expect(panel.get_by_label("To the seed")).to_have_attribute("placeholder", "an image")
    draw(page)
    asked = engine.begun[-1]
    assert (asked.num_images, asked.num_inference_steps, asked.guidance_scale, asked.start) == (8, 50, 1.0, 0.0)
    red, blue = asked.latents[0], asked.interpolate_to.latent  # the drawing engine's noise of a picture is its negative
    assert red[0].mean() < -0.5 < 0.5 < red[2].mean() and blue[2].mean() < -0.5 < 0.5 < blue[0].mean()
    expect(page.locator(".player")).to_be_visible()


def test_what_the_server_refuses_of_an_edit_is_said_in_its_panel(page: Page, site: Site) -> None:
    visit(page, site.address)
    panel = tool(page, "Blend")
    panel.get_by_label("To the seed").fill("minus one")
    panel.get_by_label("To the seed").press("Tab")
    generate(page)
    expect(page.get_by_role("alert")).to_contain_text("Blend: ")
    expect(panel).to_be_visible()
    expect(page.locator(".job")).to_have_count(0)


def test_beside_a_slider_stands_what_else_it_moves(page: Page, site: Site) -> None:
    """As the server measured it, where it did."""
    measured = {"curve": [0.1, 0.2, 0.5, 0.8, 0.9], "evidence": [-2, -1, 0, 1, 2], "identity": [0.3, 0.1, 0, 0.1, 0.42],
                "monotone": True, "moved": {"High_Cheekbones": 0.31, "Male": -0.12}}

    def add(route: Route) -> None:
        body = route.fetch().json()
        for entry in body["attributes"]:
            entry["response"] = measured if entry["name"] == "Smiling" else None
        route.fulfill(json=body)

    page.route("**/options", add)
    visit(page, site.address)
    panel = tool(page, "Features")
    expect(panel).to_contain_text("Also moves High cheekbones +31 %, Masculine −12 %. Person changes by 42 %.")
    expect(panel.get_by_text("Also moves")).to_have_count(1)


# ---- trust -----------------------------------------------------------------------------------------------------------


def test_a_picture_tells_where_it_comes_from(page: Page, site: Site) -> None:
    visit(page, site.address)
    page.set_input_files("#restore-file", photo())
    dialog = page.get_by_role("dialog", name="About this image")
    expect(dialog).to_contain_text("No generation parameters")
    expect(dialog).to_contain_text("No watermark")
    assert violations(page) == []
    dialog.get_by_role("button", name="Start from it").click()
    expect(page.get_by_role("dialog", name="Place the face")).to_be_visible()
    page.keyboard.press("Escape")
    write_prompt(page, "a bald man")
    draw(page)
    page.get_by_role("button", name=re.compile("^Face 1 of 4")).click()
    page.get_by_role("button", name="About this image").click()
    expect(dialog).to_contain_text("“a bald man”")
    dialog.get_by_role("button", name="Use its settings").click()
    expect(page.get_by_role("radio", name="1", exact=True)).to_be_checked()


class Remembering(DrawingEngine):
    """Its first image is too much like one that it learned from."""

    def pictures(self, run: DrawingRun) -> list[Drawing]:
        found = super().pictures(run)
        told = {"nearest": {"percentile": 0.2, "too_close": True}}
        return [replace(found[0], assessment={**found[0].assessment, **told}), *found[1:]]


def test_a_picture_near_a_training_face_is_marked(page: Page) -> None:
    site = Site(Remembering)
    try:
        visit(page, site.address)
        draw(page)
        expect(page.get_by_text("Near a training face")).to_have_count(1)
        assert violations(page) == []
        page.get_by_role("button", name=re.compile("^Face 1 of 4")).click()
        viewer = page.get_by_role("dialog")
        expect(viewer).to_contain_text("very near a training image")
        viewer.get_by_role("button", name=re.compile("^Next")).click()
        expect(viewer).not_to_contain_text("very near a training image")
    finally:
        site.close()
