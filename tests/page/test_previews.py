"""Is something seen at once, whatever the number of steps, and never more than the line takes?"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser

from core.jobs import batching
from tests.support.asking import make_app, post, run, stream_of, tick, work
from tests.support.browsing import Site, chromium, generate, visit, watched_page, write_prompt
from tests.support.drawing import DrawingEngine, DrawingInfo, DrawingRun

LINE = {"offline": False, "latency": 400, "downloadThroughput": 50_000, "uploadThroughput": 50_000}


class SlowEngine(DrawingEngine):
    """A step takes 0.1 s on a clock of its own."""

    now = 0.0

    def step(self, runs: Sequence[DrawingRun]) -> None:
        super().step(runs)
        SlowEngine.now += 0.1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SlowEngine:
    monkeypatch.setattr(batching.time, "perf_counter", lambda: SlowEngine.now)
    return SlowEngine()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


def seen(app: Any, job_id: str) -> list[int]:
    """The steps with a preview."""
    events = stream_of(app.test_client().get(f"/jobs/{job_id}/events"))
    return [data["t"] for _, kind, data in events if kind == "preview"]


@pytest.mark.parametrize("steps", [3, 30, 500])
def test_the_first_preview_comes_after_one_step_and_more_as_time_goes_by(engine: SlowEngine, steps: int) -> None:
    """It came after a tenth of the steps: after seconds in a long job."""
    app = make_app(engine)
    job_id = run(app, n_images=1, n_inf_steps=steps, stream_freq=1000, preview_every_s=0.45)
    assert seen(app, job_id) == list(range(1, steps, 5))


def test_previews_by_time_come_beside_those_by_steps(engine: SlowEngine) -> None:
    app = make_app(engine)
    both = run(app, n_images=1, n_inf_steps=20, stream_freq=7, preview_every_s=0.45)
    assert seen(app, both) == [1, 6, 7, 12, 14, 19]
    only = run(app, n_images=1, n_inf_steps=20, stream_freq=7)  # what stream_freq means stays
    assert seen(app, only) == [7, 14]


def test_one_job_alone_has_previews_by_time(engine: SlowEngine) -> None:
    app = make_app(engine)
    client = app.test_client()
    timed, plain = (post(client, n_images=1, n_inf_steps=9, stream_freq=1000, **more)["job_id"]
                    for more in ({"preview_every_s": 0.35}, {}))
    work(app)
    assert (seen(app, timed), seen(app, plain)) == ([1, 5], [])


def test_a_stream_without_pictures_says_where_they_are() -> None:
    app = make_app(DrawingEngine())
    job_id = run(app, n_images=2, n_inf_steps=6, stream_freq=2)
    client = app.test_client()
    full = stream_of(client.get(f"/jobs/{job_id}/events"))
    light = stream_of(client.get(f"/jobs/{job_id}/events?previews=none"))
    assert [one[:2] for one in light] == [one[:2] for one in full]
    assert not any("img" in data for _, _, data in light)
    assert all("img" in data for _, kind, data in full if kind == "preview")
    steps = client.get(f"/jobs/{job_id}/steps").get_json()["steps"]
    assert [(one["index"], one["t"]) for one in steps] == [(0, 2), (1, 2), (0, 4), (1, 4), (0, 6), (1, 6)]
    for one in steps:
        answer = client.get(one["thumbnail"])
        assert answer.mimetype == "image/webp" and "immutable" in answer.headers["Cache-Control"]
        with Image.open(io.BytesIO(answer.data)) as image:
            assert image.size == (32, 32)
    assert client.get(f"/jobs/{job_id}/images/0.png?t=2").data != client.get(f"/jobs/{job_id}/images/0.png").data
    assert client.get(f"/jobs/{job_id}/images/0.webp?t=3").status_code == 404
    assert client.get("/jobs/x/steps").status_code == 404


def test_the_newest_preview_is_a_small_file_while_the_job_runs() -> None:
    app = make_app(DrawingEngine(info=DrawingInfo(image_size=128)))
    client = app.test_client()
    job_id = post(client, n_images=1, n_inf_steps=40, stream_freq=1)["job_id"]
    for _ in range(20):
        tick(app)
    answer = client.get(f"/jobs/{job_id}/images/0.webp")
    assert "no-cache" in answer.headers["Cache-Control"] and len(answer.data) < 3000
    assert 'img' in client.get(f"/jobs/{job_id}/").get_json()["response"][0]  # the promise to older clients


# ---- on the page -----------------------------------------------------------------------------------------------------


class PacedEngine(DrawingEngine):
    """Fifty steps take two seconds."""

    def step(self, runs: Sequence[DrawingRun]) -> None:
        super().step(runs)
        time.sleep(0.04)


def finals() -> str:
    return "() => [...document.querySelectorAll('.job .tile img')].filter(i => !i.hidden && i.naturalWidth " \
           "&& /images.\\d+\\.(webp|png)$/.test(i.currentSrc)).length === 4"


def test_four_pictures_reach_a_slow_page_soon(browser: Browser) -> None:
    """At 50 kB/s and 400 ms, the uncompressed previews of four images took 56 s for a job of 2 s."""
    with Site(lambda: PacedEngine(info=DrawingInfo(image_size=128))) as site, watched_page(browser) as page:
        asked: list[str] = []
        visit(page, site.address)
        line = page.context.new_cdp_session(page)
        line.send("Network.enable")
        line.send("Network.emulateNetworkConditions", LINE)
        page.on("request", lambda one: asked.append(one.url))
        write_prompt(page, "a smiling woman")
        page.locator("#counts").get_by_text("4", exact=True).click()
        began = time.monotonic()
        generate(page)
        page.wait_for_selector(".job .tile img:not([hidden])")
        first = time.monotonic() - began
        page.wait_for_function(finals())
        took = time.monotonic() - began
        paths = [url for url in asked if "/images/" in url and "?t=" in url]
        assert took <= 6, (took, first)
        assert first <= 3.0, first  # three trips there and back: the job, its events, the picture
        assert paths and len(paths) == len(set(paths)), "a preview is fetched once"


def test_a_page_fetches_one_preview_at_a_time_and_then_the_newest(browser: Browser) -> None:
    with Site(lambda: PacedEngine()) as site, watched_page(browser) as page:
        fetched: list[str] = []

        def slowly(route: Any) -> None:
            fetched.append(route.request.url)
            time.sleep(0.6)
            route.continue_()

        page.route("**/images/*.webp?t=*", slowly)
        visit(page, site.address)
        write_prompt(page, "a smiling woman")
        page.locator("#counts").get_by_text("1", exact=True).click()
        generate(page)
        page.wait_for_selector(".job[data-state=succeeded]")
        steps = [int(url.rpartition("=")[2]) for url in fetched]
        assert steps[0] == 1 and steps == sorted(steps) and 2 <= len(steps) <= 6, steps  # ten and more were made
        said = json.loads(page.evaluate(
            "async () => JSON.stringify((await (await fetch(document.querySelector('.job .tile img').src"
            ".replace(/images.*/, 'steps'))).json()).steps.length)"))
        assert said > len(steps)
