"""Is a job's time estimated from what a step costs here, and not from how long others' jobs took beside each other?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from core.jobs import batching
from core.jobs.batching import StepCosts, rows_of, steps_of
from tests.support.asking import make_app, post, service_of, tick, work
from tests.support.browsing import Site, chromium, visit, watched_page
from tests.support.drawing import DrawingEngine, DrawingInfo, DrawingRun


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


class SlowEngine(DrawingEngine):
    """A step takes 10 ms and 5 ms more an image, on a clock of its own."""

    now = 0.0

    def step(self, runs: Sequence[DrawingRun]) -> None:
        super().step(runs)
        SlowEngine.now += 0.010 + 0.005 * sum(run.num_images for run in runs)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SlowEngine:
    monkeypatch.setattr(batching.time, "perf_counter", lambda: SlowEngine.now)
    return SlowEngine()


def costs(app: Any) -> dict[int, float]:
    found = app.test_client().get("/speed").get_json()["step_costs"]
    return {one["rows"]: round(one["seconds"], 6) for one in found}


def test_neighbours_do_not_make_a_step_dearer(engine: SlowEngine) -> None:
    """One image was said to take as long as it had taken beside twelve others."""
    app = make_app(engine)
    client = app.test_client()
    assert costs(app) == {}
    post(client, n_images=1, n_inf_steps=4)
    work(app)
    assert costs(app) == {1: 0.015}
    for steps in (40, 12, 4):
        post(client, n_images=4, n_inf_steps=steps)
    post(client, n_images=1, n_inf_steps=4)
    work(app)
    assert costs(app) == {1: 0.015, 4: 0.03, 8: 0.05, 13: 0.075}


def test_what_is_to_be_done_first_is_told(engine: SlowEngine) -> None:
    app = make_app(engine, max_batch=1)
    client = app.test_client()
    post(client, n_images=4, n_inf_steps=10)
    for _ in range(3):
        tick(app)
    post(client, n_images=2, n_inf_steps=6, guidance_scale=9)
    assert client.get("/speed").get_json()["ahead"] == [{"rows": 4, "steps": 7}, {"rows": 4, "steps": 6}]
    work(app)
    assert client.get("/speed").get_json()["ahead"] == []


def test_before_the_model_is_loaded_nothing_is_known() -> None:
    app = make_app(DrawingEngine())
    service_of(app).batch = None
    assert app.test_client().get("/speed").get_json() == {
        "step_costs": [], "seconds_per_picture": 0.0, "seconds_per_image": 0.0, "ahead": []}


@pytest.mark.parametrize(("request_", "rows"), [
    ({}, 2), ({"guidance_scale": 0.0}, 2), ({"guidance_scale": 6.5}, 4), ({"negative_prompt": "a beard"}, 4),
    ({"guidance_scale": 1.0, "negative_prompt": "a beard"}, 2), ({"attributes": {"Young": 1.0}}, 6),
    ({"candidates": 8}, 8),
])
def test_rows_of_a_request(request_: dict[str, Any], rows: int) -> None:
    usual = {"n_images": 2, "guidance_scale": 3.0, "negative_prompt": ""}
    assert rows_of({**usual, **request_}, DrawingInfo()) == rows


def test_skipped_steps_cost_nothing() -> None:
    assert steps_of({"n_inf_steps": 50, "start_timestep": 0.6}) == 20
    assert steps_of({"n_inf_steps": 50, "start_timestep": 0.0, "init_image": "...", "strength": 0.4}) == 20


def test_one_slow_step_is_forgotten_soon() -> None:
    """The first one prepares kernels and tables."""
    found = StepCosts()
    found.stepped(1, 9.0)
    assert found.steps == [(1, 9.0)]
    found.stepped(1, 0.1)
    assert found.steps == [(1, 0.1)]


def test_the_page_estimates_from_the_cost_of_a_step_and_the_work_ahead(browser: Browser) -> None:
    known = {"step_costs": [{"rows": 1, "seconds": 0.05}, {"rows": 4, "seconds": 0.11}, {"rows": 8, "seconds": 0.19}],
             "seconds_per_picture": 0.25, "ahead": []}
    with Site(DrawingEngine) as site, watched_page(browser) as page:
        page.route("**/speed", lambda route: route.fulfill(json=known))
        visit(page, site.address)
        note = page.locator("#generate-note")

        def estimate(count: int) -> float:
            page.locator("#counts").get_by_text(str(count), exact=True).click()
            expect(note).to_have_text(re.compile("≈ "))
            text = note.inner_text()
            return float(re.findall(r"[\d.]+", text)[0]) * (0.001 if "ms" in text else 1)

        assert estimate(1) == pytest.approx(50 * 0.05 + 0.25, abs=0.5)
        assert estimate(4) == pytest.approx(50 * 0.11 + 1.0, abs=0.6)
        known["ahead"] = [{"rows": 4, "steps": 20}, {"rows": 4, "steps": 10}]  # which this one shares its steps with
        page.reload()
        page.wait_for_selector("body[data-resumed]")
        assert estimate(4) == pytest.approx(10 * 0.27 + 10 * 0.19 + 30 * 0.11 + 1.0, abs=0.6)


@pytest.mark.parametrize(("guidance_range", "now"), [((1.0, 6.0), "now 3 instead of 1"), (None, "now 4 instead of 2")])
def test_costs_that_are_said_are_those_of_the_model(
    browser: Browser, guidance_range: tuple[float, float] | None, now: str
) -> None:
    """Guidance that was distilled costs no second pass: "1 is off and twice as fast" and "instead of 2" were false."""
    with (
        Site(lambda: DrawingEngine(info=DrawingInfo(guidance_range=guidance_range))) as site,
        watched_page(browser) as page,
    ):
        visit(page, site.address)
        assert "fast" not in page.locator("#guidance-help").inner_text()
        page.get_by_role("button", name="Features").click()
        panel = page.locator("#tool-box")
        panel.get_by_label("Smiling", exact=True).fill("1.5")
        expect(panel).to_contain_text(now)
        page.get_by_text("More settings").click()
        page.get_by_label("Guidance").fill("1")  # off: one pass for every model
        expect(panel).to_contain_text("now 3 instead of 1")
