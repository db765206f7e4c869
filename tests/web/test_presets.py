"""Which numbers of steps are offered? The fewest that were measured to be near the best, and the promised 500."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from core.web.options import fewest_steps, quality
from tests.support.asking import make_app, post
from tests.support.drawing import DrawingEngine, DrawingInfo

ROOT = Path(__file__).resolve().parents[2]


def curve(*points: tuple[int, float]) -> list[dict[str, float]]:
    return [{"steps": steps, "frechet_over_floor": distance} for steps, distance in points]


@pytest.mark.parametrize(("points", "wanted"), [
    (((2, 1.18), (4, 1.057), (8, 1.015), (50, 1.008), (500, 1.02)), {"Draft": 2, "Fast": 4, "Fine": 8, "Full": 500}),
    (((8, 1.0), (500, 1.0)), {"Fast": 8, "Full": 500}),  # one number for three names
    (((4, 1.15), (8, 1.0)), {"Draft": 4, "Fast": 8, "Full": 500}),
    (((4, 1.04), (8, 1.0)), {"Fast": 4, "Fine": 8, "Full": 500}),
    (((250, 2.0), (500, 1.0)), {"Fast": 500}),
    ((), {"Draft": 25, "Fast": 50, "Fine": 150, "Full": 500}),  # nothing was measured
])
def test_presets_are_the_fewest_steps_within_a_share_of_the_best(
    points: Sequence[tuple[int, float]], wanted: dict[str, int]
) -> None:
    found = quality(curve(*points))
    assert {one["name"]: one["steps"] for one in found} == wanted
    assert [one["name"] for one in found if one["default"]] == ["Fast"]


def test_the_bundled_curve_offers_few_steps() -> None:
    index = json.loads((ROOT / "models" / "celeba128" / "model_index.json").read_text(encoding="utf-8"))
    points = index["metrics"]["curve"]["points"]
    best = min(point["frechet_over_floor"] for point in points)
    by_steps = {point["steps"]: point["frechet_over_floor"] for point in points}
    for one in quality(points):
        if one["within"] is not None:
            assert by_steps[one["steps"]] <= best * (1 + one["within"])
            assert all(by_steps[steps] > best * (1 + one["within"]) for steps in by_steps if steps < one["steps"])


@pytest.mark.parametrize(("asked", "told"), [
    ({}, True),  # the default, which stays the promised 500
    ({"n_inf_steps": 200}, True),
    ({"n_inf_steps": 500, "sampler": "pencil"}, True),
    ({"n_inf_steps": 199}, False),
    ({"n_inf_steps": 500, "sampler": "DPM++ 2M"}, False),  # of which nothing was measured
    ({"sampler": "Sketch"}, False),  # takes 4 steps
])
def test_the_answer_says_when_fewer_steps_would_do(asked: dict[str, object], told: bool) -> None:
    client = make_app(DrawingEngine()).test_client()
    answer = client.post("/text_to_image", json={"prompt": "a smiling woman", **asked}).get_json()
    assert [warning for warning in answer["warnings"] if "100 steps would do" in warning] == answer["warnings"]
    assert bool(answer["warnings"]) is told
    if not asked:
        assert answer["parameters"]["n_inf_steps"] == 500 and "5 times as long" in answer["warnings"][0]


def test_nothing_is_said_of_a_model_without_a_curve() -> None:
    app = make_app(DrawingEngine(info=replace(DrawingInfo(), step_curve=())))
    assert post(app.test_client(), n_inf_steps=500)["warnings"] == []
    assert fewest_steps((), 0.02) is None
