"""Does the page do what a person expects? Headless Chromium drives it from the first word to the finished picture.

Here the drawing engine (`drawing.py`) stands in for the model and is held at any step. What happens to finished
pictures is in `test_images.py`, sizes, schemes, screen readers and budgets in `test_quality.py`, and the
walk over the real server with the real model in `test_walk.py`.
"""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest
from playwright.sync_api import Page, Request, Route, expect

from core.engine import JobError
from tests.support.browsing import WAIT_MS, Gate, Line, Site, generate, visit, write_prompt
from tests.support.drawing import DrawingEngine

pytestmark = pytest.mark.usefixtures("gate")


@pytest.fixture
def site_options() -> dict[str, int]:
    return {"max_waiting": 4}


def step_of(page: Page, text: str, card: int = 0) -> None:
    """Wait until the first tile of a card shows the preview of a step, such as 20/50."""
    expect(page.locator(".job").nth(card).locator(".step").first).to_have_text(text)


def finished(page: Page, card: int = 0) -> None:
    expect(page.locator(".job").nth(card)).to_have_attribute("data-state", "succeeded")


# ---- jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_fills_its_tiles_step_by_step(page: Page, site: Site, gate: Gate) -> None:
    visit(page, site.address)
    expect(page.get_by_text("Say who you would like to see.")).to_be_visible()
    page.get_by_role("button", name="a smiling young woman with wavy blond hair").click()
    page.get_by_label("Describe a face").press("Control+Enter")
    expect(page.locator(".tile")).to_have_count(4)
    expect(page.get_by_text("Say who you would like to see.")).to_be_hidden()
    gate.open_until(10)
    expect(page.locator(".job-status")).to_contain_text("Step 10 of 50")
    step_of(page, "10/50")
    expect(page.locator(".tile img").first).to_have_attribute("src", re.compile(r"/images/0\.webp\?t=10$"))
    assert 0.15 < page.locator("progress").evaluate("bar => bar.value") < 0.25
    expect(page).to_have_title("20 % · Faces from words")
    expect(page.get_by_role("progressbar", name="Progress: a smiling young woman")).to_be_visible()
    gate.open()
    finished(page)
    expect(page.get_by_role("link", name="Download face 4")).to_be_attached()
    expect(page.locator(".job-live")).to_be_hidden()
    expect(page.locator("#live")).to_have_text("4 faces finished: a smiling young woman with wavy blond hair")
    expect(page).to_have_title("Faces from words")
    expect(page.locator(".tile-open").nth(2)).to_have_accessible_name(
        re.compile(r"^Face 3 of 4: a smiling young woman with wavy blond hair, seed \d+$"))
    page.get_by_role("button", name="Use the last seed again").click()
    seed = page.get_by_label("Seed", exact=True).input_value()
    expect(page.locator(".tile-tools a").first).to_have_attribute("download", f"face-{seed}.png")


def test_several_jobs_at_once_share_one_stream_and_survive_a_reload(page: Page, site: Site, gate: Gate) -> None:
    open_streams: set[Request] = set()
    most = 0

    def began(request: Request) -> None:
        nonlocal most
        if "/events" in request.url:
            open_streams.add(request)
            most = max(most, len(open_streams))

    page.on("request", began)
    page.on("requestfinished", lambda request: open_streams.discard(request))
    page.on("requestfailed", lambda request: open_streams.discard(request))
    visit(page, site.address)
    for text in ("a serious man", "a smiling woman"):
        write_prompt(page, text)
        generate(page)
        expect(page.locator(".job").first).to_contain_text(text, ignore_case=True)
    gate.open_until(31)  # the second one joined a step later
    step_of(page, "30/50", 0)
    step_of(page, "30/50", 1)
    page.reload()
    expect(page.locator(".job")).to_have_count(2)
    step_of(page, "30/50", 0)
    step_of(page, "30/50", 1)
    expect(page.get_by_label("Describe a face")).to_have_value("a smiling woman")
    gate.open_until(41)
    expect(page.locator(".job-status").nth(1)).to_contain_text("Step 41 of 50")
    other = page.context.new_page()  # a second reader, by the address alone
    other.goto(page.url)
    step_of(other, "40/50")
    gate.open()
    for reader in (page, other):
        finished(reader, 0)
        finished(reader, 1)
    assert most == 1


def test_a_seventh_window_polls_and_stalls_nobody(page: Page, site: Site, gate: Gate) -> None:
    """All windows of a browser share six connections to a host: with a stream each, the seventh would not even open."""
    streams: set[Request] = set()
    page.context.on("request", lambda request: "/events" in request.url and streams.add(request))
    page.context.on("requestfailed", lambda request: streams.discard(request))
    page.context.on("requestfinished", lambda request: streams.discard(request))
    address = f"{site.address}?job={site.submit('a serious man', n_inf_steps=50)}"
    windows = [page, *(page.context.new_page() for _ in range(6))]
    for number, window in enumerate(windows, start=1):
        visit(window, address)
        gate.open_until(number)
        expect(window.locator(".job-status")).to_contain_text(f"Step {number} of 50")
    assert 1 <= len(streams) <= 4
    gate.open_until(20)
    for window in windows:
        expect(window.locator(".job-status")).to_contain_text("Step 20 of 50")
    gate.open()
    for window in windows:
        finished(window)


def test_cancel_keeps_what_was_seen_and_leaves_the_neighbour_alone(page: Page, site: Site, gate: Gate) -> None:
    visit(page, site.address)
    for text in ("a man", "a woman"):
        write_prompt(page, text)
        generate(page)
        expect(page.locator(".job").first).to_contain_text(text, ignore_case=True)
    gate.open_until(21)
    step_of(page, "20/50", 0)
    step_of(page, "20/50", 1)
    page.get_by_role("button", name="Cancel: a man").click()
    expect(page.locator(".job").nth(1)).to_contain_text("Cancelling")
    gate.open()
    expect(page.locator(".job").nth(1)).to_contain_text("Cancelled")
    expect(page.locator(".job").nth(1).locator(".tile img").first).to_be_visible()
    finished(page, 0)
    page.locator(".job").nth(1).get_by_role("button", name="Try again").click()
    expect(page.locator(".job")).to_have_count(3)
    finished(page, 0)


def test_when_events_fail_polling_takes_over(page: Page, site: Site, gate: Gate) -> None:
    page.route("**/events**", lambda route: route.fulfill(status=429, content_type="application/json", body="{}"))
    visit(page, site.address)
    write_prompt(page, "a man")
    generate(page)
    gate.open_until(20)
    step_of(page, "20/50")
    expect(page.locator(".job-status")).to_contain_text("Step 20 of 50")
    gate.open()
    finished(page)


def test_a_hidden_page_holds_no_stream_and_catches_up_when_it_is_seen_again(
    page: Page, site: Site, gate: Gate
) -> None:
    """A slept phone, a tab in the background."""
    hide = """hidden => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    visit(page, site.address)
    generate(page)
    gate.open_until(10)
    step_of(page, "10/50")
    with page.expect_event("requestfailed", lambda request: "/events" in request.url):
        page.evaluate(hide, True)
    gate.open_until(40)
    with page.expect_request("**/events?after=*"):
        page.evaluate(hide, False)
    step_of(page, "40/50")
    gate.open()
    finished(page)


def test_the_queue_is_shown_and_a_full_one_said(page: Page, site: Site, gate: Gate) -> None:
    visit(page, site.address)
    running = site.submit("a man", n_images=8)
    while site.state(running)["status"] == "queued":
        pass
    for text in ("Next in the queue", "Waiting, number 2 in the queue"):
        generate(page)
        expect(page.locator(".job-status").first).to_have_text(text)
    generate(page)  # one more than this client may have waiting
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The queue is full")
    gate.open()
    finished(page, 0)
    finished(page, 1)
    alert.get_by_role("button", name=re.compile(r"Send now \(by itself in \d+ s\)")).click()
    expect(page.locator(".job")).to_have_count(3)
    expect(alert).to_have_count(0)
    finished(page, 0)


def test_what_a_full_queue_refused_is_sent_again_by_itself(page: Page, site: Site, gate: Gate) -> None:
    gate.open()
    full = {"status": 429, "headers": {"Retry-After": "1"}, "json": {"error": "The queue is full."}}
    page.route("**/text_to_image", lambda route: route.fulfill(**full), times=1)  # type: ignore[arg-type]
    visit(page, site.address)
    generate(page)
    expect(page.get_by_role("alert")).to_contain_text("The queue is full")
    finished(page)  # nobody pressed anything
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_failed_job_shows_cause_and_remedy(page: Page, site: Site, engine: DrawingEngine) -> None:
    def fail(step: int) -> None:
        raise JobError("not_finite", "No picture came out.", "Try another sampler.")

    engine.before_step = fail
    visit(page, site.address)
    generate(page)
    alert = page.locator(".job").get_by_role("alert")
    expect(alert).to_contain_text("This job failed")
    expect(alert).to_contain_text("No picture came out. Try another sampler.")
    engine.before_step = None
    alert.get_by_role("button", name="Try again").click()
    finished(page, 0)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_are_marked_and_the_nearest_known_one_is_one_click_away(page: Page, site: Site) -> None:
    visit(page, site.address)
    write_prompt(page, "😀 a smilling wombat, man and woman with sunglasses")
    expect(page.locator("#marks mark.unknown")).to_have_text(["smilling", "wombat"])
    expect(page.locator("#marks mark.rare")).to_have_text(["sunglasses"])
    expect(page.locator("#marks mark.known").first).to_have_text("a")
    assert page.locator("#marks").text_content() == f"{page.get_by_label('Describe a face').input_value()}\n"
    expect(page.locator("#notes")).to_contain_text('"man" contradicts "woman"')
    expect(page.locator("#understood")).to_contain_text("Unknown: smilling, nearest known smiling; wombat.")
    page.get_by_role("button", name="smilling → smiling").click()
    expect(page.get_by_label("Describe a face")).to_have_value(re.compile("^😀 a smiling wombat"))
    expect(page.locator("#marks mark.unknown")).to_have_text(["wombat"])
    write_prompt(page, "<img src=x onerror=alert(1)> a man")
    expect(page.locator(".fact")).to_have_text(["man"])
    expect(page.locator("#marks img, #notes img")).to_have_count(0)


def test_words_that_are_not_read_are_marked_and_told(page: Page, site: Site, engine: DrawingEngine) -> None:
    engine.info = replace(engine.info, encoded_length=lambda text: min(len(text), 17))
    visit(page, site.address)
    write_prompt(page, "😀 a man with a beard wearing a hat")
    expect(page.locator("#marks mark.unread")).to_have_text(["beard", "wearing", "a", "hat"])
    assert page.locator("#marks").text_content() == "😀 a man with a beard wearing a hat\n"
    expect(page.locator("#notes")).to_contain_text('"beard wearing a hat" is not read')
    expect(page.locator(".fact")).to_have_text(["man"])


def test_suggestions_come_from_the_vocabulary_and_obey_the_keyboard(page: Page, site: Site) -> None:
    visit(page, site.address)
    area = page.get_by_label("Describe a face")
    area.press_sequentially("a woman with wa")
    options = page.get_by_role("option")
    expect(options.first).to_have_text("wavy hair")
    area.press("ArrowDown")
    expect(options.first).to_have_attribute("aria-selected", "true")
    expect(area).to_have_attribute("aria-activedescendant", "suggestion-0")
    area.press("Enter")
    expect(area).to_have_value("a woman with wavy hair ")
    expect(page.get_by_role("listbox")).to_be_hidden()
    area.press_sequentially("and a rec")
    options.filter(has_text="receding hairline").first.click()
    expect(area).to_have_value(re.compile("receding hairline"))
    area.press_sequentially(", gl")
    expect(page.get_by_role("listbox")).to_be_visible()
    area.press("Escape")
    expect(page.get_by_role("listbox")).to_be_hidden()
    area.press("Control+z")  # accepted words are typed words: the browser's own undo takes them back
    expect(area).not_to_have_value(re.compile("gl$"))


@pytest.mark.parametrize(("text", "chip", "left"), [
    ("a smiling young woman with wavy blond hair", "smiling", "a young woman with wavy blond hair"),
    ("a smiling young woman with wavy blond hair", "blond hair", "a smiling young woman with wavy hair"),
    ("portrait of a young man with black hair and a goatee", "goatee", "portrait of a young man with black hair"),
    ("an old woman, with painted lips", "woman", "an old person, with painted lips"),
    ("a man without glasses or a hat", "no glasses", "a man without a hat"),
    ("girl with big nose", "young", "woman with big nose"),
])
def test_a_chip_takes_its_words_out_and_puts_them_back(page: Page, site: Site, text: str, chip: str, left: str) -> None:
    visit(page, site.address)
    write_prompt(page, text)
    button = page.locator("#notes").get_by_role("button", name=chip, exact=True)
    expect(button).to_have_attribute("aria-pressed", "true")
    button.click()
    expect(page.get_by_label("Describe a face")).to_have_value(left)
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(button).to_be_focused()
    button.click()
    expect(page.get_by_label("Describe a face")).to_have_value(text)


def test_details_are_added_and_rivals_give_way(page: Page, site: Site) -> None:
    visit(page, site.address)
    area = page.get_by_label("Describe a face")
    page.get_by_role("button", name="Details").click()
    palette = page.get_by_role("group", name="Details to add or take away")

    def press(name: str) -> None:
        palette.get_by_role("button", name=name, exact=True).click()
        expect(palette.get_by_role("button", name=name, exact=True)).to_have_attribute("aria-pressed", "true")

    press("woman")
    press("blond hair")
    press("glasses")
    expect(area).to_have_value("a woman, blond hair, glasses")
    press("black hair")
    expect(area).to_have_value("a woman, glasses, black hair")
    press("man")
    expect(area).to_have_value("a man, glasses, black hair")
    expect(page.locator(".contradiction")).to_have_count(0)


def test_surprise_me_writes_a_caption(page: Page, site: Site) -> None:
    visit(page, site.address)
    page.get_by_role("button", name="Surprise me").click()
    expect(page.get_by_label("Describe a face")).not_to_have_value("")
    expect(page.locator("#marks mark.unknown")).to_have_count(0)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_what_the_server_refuses_is_said_beside_its_field(page: Page, site: Site) -> None:
    visit(page, site.address)
    page.get_by_text("More settings").click()
    page.get_by_label("Steps", exact=True).fill("1001")
    page.get_by_label("Seed", exact=True).fill("-5")
    page.get_by_label("Preview every").fill("0")
    page.get_by_text("More settings").click()
    generate(page)
    expect(page.locator("#n_inf_steps-error")).to_have_text("Must be an integer from 1 to 1000; got 1001.")
    expect(page.locator("#seed-error")).to_contain_text("Must be an integer from 0 to")
    expect(page.get_by_label("Preview every")).to_be_visible()
    steps = page.get_by_label("Steps", exact=True)
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_have_accessible_description(re.compile("Must be an integer"))
    expect(steps).to_be_focused()
    steps.fill("20")
    expect(page.locator(".field-error")).to_have_count(0)
    expect(page.locator(".job")).to_have_count(0)


def test_limits_and_defaults_come_from_the_server(page: Page, site: Site, engine: DrawingEngine, gate: Gate) -> None:
    visit(page, site.address)
    page.get_by_text("More settings").click()
    expect(page.locator("#sampler option")).to_have_text(["Automatic", "Pencil", "DPM++ 2M", "Sketch"])
    assert page.locator("#counts input").evaluate_all("all => all.map(one => one.value)") == list("12345678")
    for name, (low, high) in {"n_inf_steps": ("1", "1000"), "guidance_scale": ("0", "20")}.items():
        expect(page.locator(f"#{name}")).to_have_attribute("min", low)
        expect(page.locator(f"#{name}")).to_have_attribute("max", high)
    expect(page.locator("#guidance-value")).to_have_text("3.0")
    page.get_by_role("radio", name="Full").check(force=True)
    expect(page.get_by_label("Steps", exact=True)).to_have_value("500")
    page.get_by_label("Steps", exact=True).fill("50")
    expect(page.get_by_role("radio", name="Fast")).to_be_checked()
    page.get_by_label("Steps", exact=True).fill("7")
    untimed = "Its time is measured with the first images."
    further = "Images 100 % further from real faces than with 100 steps."  # as measured with 4
    expect(page.locator("#expected")).to_have_text(f"{untimed} {further}")
    page.get_by_label("Sampler").select_option("Sketch")  # made for few steps
    expect(page.get_by_label("Steps", exact=True)).to_have_value("4")
    page.get_by_label("Steps", exact=True).fill("7")
    expect(page.get_by_role("radio", name="Fast")).not_to_be_checked()
    page.locator("#counts").get_by_text("3", exact=True).click()
    page.get_by_label("Guidance").fill("1")
    page.get_by_label("Negative prompt").fill("glasses")
    page.get_by_label("Sampler").select_option("DPM++ 2M")
    page.get_by_label("Preview every").fill("2")
    page.get_by_role("button", name="Random seed").click()
    seed = int(page.get_by_label("Seed", exact=True).input_value())
    expect(page.locator("#more-note")).to_have_text("guidance 1.0, negative prompt, DPM++ 2M, previews")
    expect(page.locator("#expected")).to_have_text(untimed)  # what steps are worth was measured of no other sampler
    gate.open()
    generate(page)
    finished(page)
    asked = engine.begun[0]
    assert (asked.num_images, asked.num_inference_steps, asked.seed, asked.guidance_scale) == (3, 7, seed, 1.0)
    assert (asked.negative_prompt, asked.sampler) == ("glasses", "DPM++ 2M")
    expect(page.locator("#expected")).to_have_text(re.compile(r"^About [\d.]+ m?s on this machine\.$"))
    expect(page.locator("#qualities small").last).to_have_text(re.compile(r"^500 · ≈ "))
    page.reload()  # the draft survives, seed and all, and the time is known from earlier jobs
    page.wait_for_selector("body[data-resumed]")
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(seed))
    expect(page.get_by_label("Steps", exact=True)).to_have_value("7")
    expect(page.locator("#expected")).to_have_text(re.compile("^About "))
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.get_by_label("Steps", exact=True)).to_have_value("50")
    expect(page.locator("#expected")).to_have_text(re.compile(r"More steps come no nearer to real faces\.$"))
    expect(page.get_by_label("Seed", exact=True)).to_have_value("")


# ---- the server's states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["?job=never-existed", "?job=..%2F..%2Foptions"])
def test_a_link_to_no_job_says_so(page: Page, site: Site, link: str) -> None:
    visit(page, site.address + link)
    expect(page.get_by_role("alert")).to_contain_text("This job is not known")
    page.get_by_role("button", name="Dismiss").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    assert "job=" not in page.url


def test_a_server_that_goes_away_and_comes_back(page: Page, site: Site, gate: Gate) -> None:
    line = Line(page)
    visit(page, site.address)
    write_prompt(page, "a man")
    generate(page)
    gate.open_until(10)
    step_of(page, "10/50")
    line.cut = True
    page.get_by_role("button", name="Surprise me").click()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    expect(page.locator("#model")).to_have_text("No server")
    expect(page.locator("#generate")).to_be_disabled()
    gate.open_until(30)
    line.cut = False
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("#model")).to_have_text("drawing · paper")
    step_of(page, "30/50")
    gate.open()
    finished(page)


def test_asking_again_after_a_lost_answer_draws_once(page: Page, site: Site, engine: DrawingEngine, gate: Gate) -> None:
    lost = 0

    def lose(route: Route) -> None:
        nonlocal lost
        if lost:
            route.fallback()
            return
        lost += 1
        route.fetch()  # it reaches the server, but its answer never comes back
        route.abort("connectionreset")

    page.route("**/text_to_image", lose)
    visit(page, site.address)
    generate(page)
    alert = page.locator("#notice")
    expect(alert).to_contain_text("This could not be sent")
    page.wait_for_selector("#generate:not([disabled])")
    alert.get_by_role("button", name="Try again").click()
    gate.open()
    finished(page)
    assert len(engine.begun) == 1


def test_while_the_model_loads_and_when_it_fails(page: Page) -> None:
    ready = threading.Event()

    def slow() -> DrawingEngine:
        assert ready.wait(WAIT_MS / 1000)
        raise FileNotFoundError("models/x is not a model folder; train one")

    site = Site(slow)
    try:
        page.goto(site.address)
        expect(page.locator("#model")).to_contain_text("Loading the model")
        expect(page.get_by_role("alert")).to_contain_text("The model is being loaded")
        expect(page.get_by_role("button", name="Waiting for the model")).to_be_disabled()
        write_prompt(page, "a smilling man")  # what does not need the model works already
        expect(page.locator("#marks mark.unknown")).to_have_text(["smilling"])
        ready.set()
        expect(page.get_by_role("alert")).to_contain_text("models/x is not a model folder; train one")
        expect(page.locator("#model")).to_have_text("No model")
    finally:
        ready.set()
        site.close()


def test_a_locked_server_asks_for_its_key(page: Page, engine: DrawingEngine, gate: Gate) -> None:
    gate.open()
    site = Site(lambda: engine, api_key="open sesame")
    try:
        page.goto(site.address)
        expect(page.get_by_role("alert")).to_contain_text("A key is needed")
        key = page.get_by_label("Key of the server")
        key.fill("wrong")
        key.press("Enter")
        expect(key).to_have_value("")
        expect(page.locator("#model")).to_have_text("Locked")
        key.fill("open sesame")
        key.press("Enter")
        page.wait_for_selector("#generate:not([disabled])")
        generate(page)
        finished(page)
        assert "sesame" not in page.url
    finally:
        site.close()
