"""What can be done with finished pictures on the page? Headless Chromium tries all of it.

Gallery, favourites, deleting with undo, the viewer with zoom and film, comparing, links, dropped and pasted PNGs,
downloads and the share sheet. One site with a handful of finished jobs serves the whole file; a test that deletes
draws its own first.
"""

from __future__ import annotations

import base64
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import APIResponse, Browser, Download, Page, Route, expect

from core.imaging.png_metadata import read_request
from tests.support.browsing import Site, generate, visit, watched_page, write_prompt
from tests.support.drawing import TROUBLE, DrawingEngine
from tests.support.loopback import PATIENCE_S

PROMPTS = ("a smiling woman", "an old man with glasses", "a young man")


@pytest.fixture(scope="module")
def page_options() -> dict[str, list[str]]:
    return {"permissions": ["clipboard-read", "clipboard-write"]}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site(DrawingEngine) as site:
        site.wait_until_ready()
        for number, prompt in enumerate(PROMPTS):
            site.wait(site.submit(prompt, n_images=3, n_inf_steps=20, stream_freq=5, seed=100 * number))
        site.wait(site.submit(TROUBLE))
        yield site


def drawn(page: Page, site: Site, prompt: str, *, images: int = 2, seed: int = 7) -> str:
    """Draw something of one's own on the page; the job's id."""
    visit(page, site.address)
    write_prompt(page, prompt)
    page.locator("#counts").get_by_text(str(images), exact=True).click()
    page.get_by_label("Seed", exact=True).fill(str(seed))
    generate(page)
    expect(page.locator(".job").first).to_have_attribute("data-state", "succeeded")
    return page.locator(".job").first.get_attribute("data-job") or ""


def gallery(page: Page, site: Site) -> None:
    page.goto(f"{site.address}?view=gallery")
    page.wait_for_selector("body[data-resumed]")


def downloaded(page: Page, press: str) -> Download:
    with page.expect_download() as started:
        page.get_by_role("link", name=re.compile(press)).first.click()
    return started.value


# ---- gallery ---------------------------------------------------------------------------------------------------------


def test_the_gallery_shows_searches_and_filters(page: Page, site: Site) -> None:
    visit(page, site.address)
    expect(page.locator("#recent .tile").first).to_be_visible()
    page.get_by_role("navigation").get_by_role("link", name="Gallery").click()
    expect(page.get_by_role("heading", name="Today")).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("^an old man with glasses, seed"))).to_have_count(3)
    expect(page.locator(".tile.unfinished")).to_contain_text("Failed")
    page.get_by_label("Search the prompts").fill("OLD MAN")
    expect(page.locator("#days .tile")).to_have_count(3)
    expect(page.locator("#gallery-status")).to_have_text("3 images for “OLD MAN”")
    page.get_by_label("Search the prompts").fill("nobody like this")
    expect(page.locator("#gallery-empty")).to_contain_text("Nothing found")
    page.get_by_role("button", name="Show all images").click()
    page.get_by_text("Unfinished", exact=True).click()
    expect(page.locator("#days .tile")).to_have_count(1)
    page.get_by_role("button", name=re.compile("Failed")).click()  # to the stage, with cause and remedy
    expect(page.locator(".job").get_by_role("alert")).to_contain_text("No image came out. Try another sampler.")
    page.go_back()
    expect(page.get_by_role("heading", name="Gallery")).to_be_visible()


def test_the_gallery_scrolls_on_without_end(page: Page) -> None:
    site = Site(DrawingEngine)
    try:
        site.wait_until_ready()
        site.wait(*(site.submit(f"a man number {number}") for number in range(30)))
        page.set_viewport_size({"width": 390, "height": 500})
        gallery(page, site)
        tiles = page.locator("#days .tile")
        expect(tiles.first).to_be_visible()
        for _ in range(20):
            page.mouse.wheel(0, 3000)
            if tiles.count() == 30:
                break
            page.wait_for_timeout(50)
        expect(tiles).to_have_count(30)
        names = tiles.locator(".tile-open").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
        assert [re.findall(r"number (\d+)", name)[0] for name in names] == [str(29 - n) for n in range(30)]
        expect(page.locator("#gallery-status")).to_have_text("30 images")
    finally:
        site.close()


def test_favourites_are_kept_in_this_browser(page: Page, site: Site) -> None:
    gallery(page, site)
    page.get_by_text("Favourites", exact=True).click()
    expect(page.locator("#gallery-empty")).to_contain_text("No favourites yet")
    page.get_by_text("All", exact=True).click()
    tile = page.locator("#days .tile").filter(has_text="a young man").nth(1)
    tile.hover()
    tile.get_by_role("button", name=re.compile("^Favourite")).click()
    expect(tile.locator(".heart")).to_have_attribute("aria-pressed", "true")
    page.locator("#days .tile").filter(has_text="a smiling woman").first.locator(".tile-open").press("f")
    page.reload()
    page.wait_for_selector("body[data-resumed]")
    page.get_by_text("Favourites", exact=True).click()
    expect(page.locator("#days .tile")).to_have_count(2)
    page.get_by_label("Search the prompts").fill("young")
    expect(page.locator("#days .tile")).to_have_count(1)
    page.locator("#days .tile .heart").click(force=True)
    expect(page.locator("#days .tile")).to_have_count(0)


def test_delete_can_be_undone_until_it_is_done(page: Page, site: Site) -> None:
    job_id = drawn(page, site, "somebody to delete")
    client = site.app.test_client()
    page.locator(".job").first.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator(f'.job[data-job="{job_id}"]')).to_be_hidden()
    expect(page.get_by_role("status").filter(has_text="2 images deleted.")).to_be_visible()
    assert client.get(f"/jobs/{job_id}/").status_code == 200  # not yet
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(f'.job[data-job="{job_id}"]')).to_be_visible()
    page.locator(".job").first.get_by_role("button", name="Delete", exact=True).click()
    page.keyboard.press("Control+z")
    expect(page.locator(f'.job[data-job="{job_id}"]')).to_be_visible()
    page.locator(".job").first.get_by_role("button", name="Delete", exact=True).click()
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as gone:
        page.get_by_role("button", name="Dismiss").click()
    assert gone.value.status == 204
    assert client.get(f"/jobs/{job_id}/").status_code == 410
    expect(page.locator(f'.job[data-job="{job_id}"]')).to_have_count(0)


def test_who_takes_a_deletion_back_before_the_server_answered_is_heard(
    page: Page, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl+Z while the server has not answered the DELETE of an image: restored as soon as it was deleted."""
    job_id = drawn(page, site, "somebody to bring back at once")
    page.get_by_role("button", name=re.compile("^Face 1 of 2: somebody to bring back")).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    came, may_go, answer = threading.Event(), threading.Event(), site.app.wsgi_app

    def slow(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "DELETE":
            came.set()
            may_go.wait(PATIENCE_S)
        return answer(environ, start_response)

    monkeypatch.setattr(site.app, "wsgi_app", slow)
    page.keyboard.press("Delete")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    page.keyboard.press("Escape")
    assert came.wait(PATIENCE_S)
    with page.expect_response(lambda answer: answer.url.endswith("/restore")) as brought_back:
        page.keyboard.press("Control+z")
        page.wait_for_timeout(50)
        may_go.set()
    assert brought_back.value.status < 300
    told = site.app.test_client().get(f"/jobs/{job_id}/?include=none").get_json()["response"]
    assert [one["index"] for one in told] == [0, 1]


def test_a_closed_page_deletes_what_was_deleted(page: Page, site: Site) -> None:
    job_id = drawn(page, site, "somebody else to delete")
    page.locator(".job").first.get_by_role("button", name="Delete", exact=True).click()
    page.goto("about:blank")
    client = site.app.test_client()
    for _ in range(200):
        if client.get(f"/jobs/{job_id}/").status_code == 410:
            break
        page.wait_for_timeout(20)
    assert client.get(f"/jobs/{job_id}/").status_code == 410


def test_what_is_deleted_elsewhere_leaves_an_open_gallery(page: Page) -> None:
    """A whole job, one image of another, and a job that comes meanwhile: each in its place without a reload."""
    with Site(DrawingEngine) as site:
        site.wait_until_ready()
        jobs = [site.submit(prompt, n_images=2) for prompt in PROMPTS]
        site.wait(*jobs)
        gallery(page, site)
        tiles = page.locator("#days .tile:not([hidden])")
        expect(tiles).to_have_count(6)
        client = site.app.test_client()
        assert client.delete(f"/jobs/{jobs[1]}/").status_code == 204
        assert client.delete(f"/jobs/{jobs[0]}/images/1").status_code == 204
        expect(tiles).to_have_count(3)
        expect(page.locator("#gallery-status")).to_have_text("3 images")
        assert client.post(f"/jobs/{jobs[0]}/images/1/restore").status_code < 300
        site.wait(site.submit("somebody new"))
        expect(tiles).to_have_count(5)
        keys = tiles.evaluate_all("all => all.map(one => one.dataset.key)")
        assert keys[1:] == [f"{jobs[2]}/0", f"{jobs[2]}/1", f"{jobs[0]}/0", f"{jobs[0]}/1"]


def test_an_older_answer_does_not_undo_a_favourite_that_was_just_pressed(page: Page) -> None:
    """The gallery asks, the server answers, a heart is pressed, and only then does the answer arrive."""
    with Site(DrawingEngine) as site:
        site.wait_until_ready()
        site.wait(site.submit("a smiling woman"))
        gallery(page, site)
        expect(page.locator("#days .tile")).to_have_count(1)
        held: list[tuple[Route, APIResponse]] = []

        def hold(route: Route) -> None:
            site.wait(site.submit("somebody new"))  # will show that this answer has arrived
            held.append((route, route.fetch()))

        with page.expect_request(re.compile(r"/jobs/\?limit=24")):
            page.route(re.compile(r"/jobs/\?limit=24"), hold, times=1)
        for _ in range(1500):  # half a minute
            if held:
                break
            page.wait_for_timeout(20)
        with page.expect_response(lambda answer: answer.request.method == "PUT"):
            page.locator("#days .tile-open").press("f")
        route, answer = held[0]
        assert not any(image.get("favourite") for job in answer.json()["jobs"] for image in job["images"])
        route.fulfill(response=answer)
        expect(page.locator("#days .tile")).to_have_count(2)
        page.get_by_role("button", name=re.compile("^a smiling woman, seed")).click()
        heart = page.get_by_role("dialog").get_by_role("button", name="Favourite")
        expect(heart).to_have_attribute("aria-pressed", "true")


# ---- the viewer ------------------------------------------------------------------------------------------------------


def test_the_viewer_walks_zooms_and_plays_the_film(page: Page, site: Site) -> None:
    drawn(page, site, "a smiling man", images=3, seed=40)
    opener = page.get_by_role("button", name=re.compile("^Face 1 of 3"))
    opener.click()
    dialog = page.get_by_role("dialog", name="a smiling man")
    expect(dialog.get_by_text("1 of 3")).to_be_visible()
    expect(dialog.get_by_text("40", exact=True)).to_be_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(dialog.get_by_text("3 of 3")).to_be_visible()
    expect(dialog.get_by_role("button", name="Next image")).to_be_hidden()
    page.keyboard.press("ArrowLeft")
    expect(dialog.get_by_text("41", exact=True)).to_be_visible()

    percent = dialog.locator("#zoom-reset")  # of the picture's own size, which is 32 pixels
    expect(percent).to_have_text(re.compile(r"^\d{4,} %$"))  # once the picture is there
    fits = int((percent.text_content() or "").rstrip(" %"))
    assert fits > 1000
    page.keyboard.press("+")
    expect(percent).to_have_text(re.compile(rf"^({'|'.join(str(int(1.5 * fits) + more) for more in (-1, 0, 1))}) %$"))
    page.locator("#viewer-frame").hover()
    page.mouse.wheel(0, -300)
    expect(page.locator("#viewer-image")).to_have_attribute("style", re.compile(r"scale\(4\.07742\);?$"))
    page.locator("#viewer-frame").dblclick()
    expect(percent).to_have_text(f"{fits} %")
    page.get_by_label("Pixels").check()
    expect(page.locator("#viewer-image")).to_have_css("image-rendering", "pixelated")

    film = dialog.get_by_label("Denoising step")
    expect(film).to_be_enabled()
    assert page.locator("#steps-strip img").count() >= 11  # the first step, one every five, the end, and by time more
    final = page.locator("#viewer-image").get_attribute("src")
    film.focus()
    page.keyboard.press("Home")
    expect(dialog.locator("#steps-text")).to_have_text("Step 1")
    expect(film).to_have_attribute("aria-valuetext", "Step 1 of 50")
    expect(page.locator("#viewer-image")).to_have_attribute("src", re.compile(r"/images/1\.webp\?t=1$"))
    page.keyboard.press("ArrowRight")  # moves the film, not to the next picture
    expect(dialog.locator("#steps-text")).to_have_text(re.compile("^Step [2-5]$"))
    dialog.get_by_role("button", name="Play the steps").click()
    expect(dialog.locator("#steps-text")).to_have_text("Step 50")
    expect(page.locator("#viewer-image")).to_have_attribute("src", final or "")

    page.keyboard.press("f")
    expect(dialog.get_by_role("button", name="Favourite")).to_have_attribute("aria-pressed", "true")
    dialog.get_by_role("button", name="Copy the seed").click()
    expect(dialog.get_by_role("status").filter(has_text="Seed copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "41"
    for _ in range(40):  # the focus never leaves the dialog for the page behind it
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(opener).to_be_focused()


def test_settings_and_relatives_of_a_picture(page: Page, site: Site) -> None:
    drawn(page, site, "a bald man", images=2, seed=60)
    write_prompt(page, "something else")
    page.get_by_role("button", name=re.compile("^Face 2 of 2")).click()
    page.get_by_role("dialog").get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Describe a face")).to_have_value("a bald man")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("61")
    expect(page.get_by_role("radio", name="1", exact=True)).to_be_checked()
    page.get_by_role("button", name="Generate others like these").first.click()
    expect(page.locator(".job")).to_have_count(2)
    expect(page.locator(".job").first).to_have_attribute("data-state", "succeeded")
    names = page.locator(".job").first.locator("a[download^=face-]").evaluate_all("all => all.map(a => a.download)")
    assert len(names) == 2 and "face-60.png" not in names


def test_two_pictures_are_compared(page: Page, site: Site) -> None:
    gallery(page, site)
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("Choose two images to compare.").last).to_be_visible()
    page.locator("#days .tile").filter(has_text="a young man").first.click()
    expect(page.locator("#days .picked")).to_have_count(1)
    page.locator("#days .tile").filter(has_text="a smiling woman").first.click()
    dialog = page.get_by_role("dialog", name="Compare")
    expect(dialog.get_by_role("img")).to_have_count(2)
    expect(dialog.locator("tr.differs th")).to_have_text(["Description", "Seed"])
    dialog.get_by_text("Wipe").click()
    slider = dialog.get_by_role("slider", name="How much of the first image is seen")
    slider.fill("25")
    expect(page.locator("#compare .wipe-over")).to_have_css("clip-path", "inset(0px 75% 0px 0px)")
    page.keyboard.press("Escape")
    page.locator("#days .tile").first.locator(".tile-open").click()  # from the viewer: this one and another
    page.keyboard.press("c")
    expect(page.get_by_text("Now choose the second one.").last).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#picking")).to_be_hidden()


# ---- in and out ------------------------------------------------------------------------------------------------------


def test_downloads_are_what_they_say(page: Page, site: Site) -> None:
    drawn(page, site, "a woman with bangs", images=2, seed=11)
    picture = downloaded(page, "Download face 2")
    assert picture.suggested_filename == "face-12.png"
    content = Path(picture.path()).read_bytes()
    assert read_request(content)["request"]["seed"] == 12 and Image.open(io.BytesIO(content)).size == (32, 32)
    archive = downloaded(page, "Download all as zip")
    assert archive.suggested_filename.endswith(".zip")
    with zipfile.ZipFile(archive.path()) as files:
        assert sum(name.endswith(".png") for name in files.namelist()) >= 2
    steps = downloaded(page, "Download the steps as one image")
    assert Image.open(io.BytesIO(Path(steps.path()).read_bytes())).format == "PNG"


def test_a_link_restores_everything_even_when_the_job_is_gone(page: Page, site: Site, browser: Browser) -> None:
    job_id = drawn(page, site, "a woman with a hat & 20 % more", images=3, seed=31)
    page.get_by_role("button", name=re.compile("^Face 2 of 3")).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("l")
    expect(page.get_by_role("status").filter(has_text="Link copied.")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    page.keyboard.press("Escape")
    with watched_page(browser) as other:
        visit(other, link)
        dialog = other.get_by_role("dialog", name="a woman with a hat & 20 % more")
        expect(dialog.get_by_text("32", exact=True)).to_be_visible()
        other.keyboard.press("Escape")
        expect(other.get_by_label("Describe a face")).to_have_value("a woman with a hat & 20 % more")
        expect(other.get_by_label("Seed", exact=True)).to_have_value("32")
    assert site.app.test_client().delete(f"/jobs/{job_id}/").status_code == 204
    with watched_page(browser) as other:
        visit(other, link)
        expect(other.get_by_text("its settings are restored")).to_be_visible()
        other.locator("#generate").click()
        expect(other.locator(".job")).to_have_attribute("data-state", "succeeded")
        assert downloaded(other, "Download face 1").suggested_filename == "face-32.png"


def test_a_dropped_or_pasted_png_restores_its_settings(page: Page, site: Site) -> None:
    job_id = drawn(page, site, "a man with a goatee", images=1, seed=5)
    png = base64.b64encode(site.app.test_client().get(f"/jobs/{job_id}/images/0.png").data).decode()

    def bring(how: str, content: str, kind: str = "image/png") -> None:
        page.evaluate("""([how, content, kind]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "face.png", {type: kind}));
            const made = {bubbles: true, cancelable: true};
            if (how === "drop") for (const name of ["dragenter", "dragover"]) {
                document.body.dispatchEvent(new DragEvent(name, {...made, dataTransfer: transfer}));
            }
            const field = how === "drop" ? {dataTransfer: transfer} : {clipboardData: transfer};
            window.sawOverlay = !document.getElementById("drop").hidden;
            document.body.dispatchEvent(new (how === "drop" ? DragEvent : ClipboardEvent)(how, {...made, ...field}));
        }""", [how, content, kind])

    def restored() -> None:
        expect(page.get_by_label("Describe a face")).to_have_value("a man with a goatee")
        expect(page.get_by_label("Seed", exact=True)).to_have_value("5")

    for how in ("drop", "paste"):
        write_prompt(page, "something else")
        page.get_by_label("Seed", exact=True).fill("1")
        bring(how, png)
        restored()
        assert page.evaluate("window.sawOverlay") is (how == "drop")
    write_prompt(page, "something else")
    page.set_input_files("#restore-file", {"name": "a.png", "mimeType": "image/png", "buffer": base64.b64decode(png)})
    restored()

    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    bring("drop", base64.b64encode(plain.getvalue()).decode())
    expect(page.get_by_role("dialog", name="About this image")).to_contain_text("No generation parameters")
    page.keyboard.press("Escape")
    bring("drop", base64.b64encode(b"no image").decode())
    expect(page.get_by_role("alert").last).to_contain_text("It could not be read")
    bring("paste", base64.b64encode(b"text").decode(), "image/jpeg")
    expect(page.get_by_role("alert").last).to_contain_text("It could not be read")
    expect(page.locator("#drop")).to_be_hidden()


def test_the_share_sheet_gets_the_pictures(page: Page, site: Site) -> None:
    page.add_init_script("""
        window.shared = [];
        navigator.canShare = ({files}) => files.every((file) => file.type === "image/png");
        navigator.share = async ({files, title}) => { window.shared.push([title, ...files.map((file) => file.name)]); };
    """)
    drawn(page, site, "a man to share", images=2, seed=70)
    page.get_by_role("button", name="Share or save to photos").click()
    page.get_by_role("button", name=re.compile("^Face 2 of 2")).click()
    page.get_by_role("dialog").get_by_role("button", name="Share or save to photos").click()
    for _ in range(200):
        if len(page.evaluate("window.shared")) == 2:
            break
        page.wait_for_timeout(20)
    assert page.evaluate("window.shared") == [["a man to share", "face-70.png", "face-71.png"],
                                              ["a man to share", "face-71.png"]]
