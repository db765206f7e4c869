"""Is the response of a slider read rightly, and does one command measure all of them?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from core.evaluation import slider_response
from core.evaluation.attribute_classifier import Features
from core.evaluation.slider_response import (
    POSITIONS,
    PROMPTS,
    Response,
    distance_between_people,
    measure,
    measure_response,
    table,
)
from core.nn.checkpoint import read_index
from core.text.lexicon import ATTRIBUTES
from generator import FaceGenerator
from tests.support.tiny_model import build_attribute_classifier

SMILE, YOUNG, MALE = (ATTRIBUTES.index(name) for name in ("Smiling", "Young", "Male"))


def seen_at(position: float, people: int = 4) -> Features:
    """People of whom a slider for smiles makes smilers, a little younger, and moves by the position in one feature."""
    logits = np.zeros((people, 40), np.float32)
    logits[:, SMILE], logits[:, YOUNG], logits[:, MALE] = position, 0.4 * position, 0.1 * position
    features = np.zeros((people, 3), np.float32)
    features[:, 0] = np.arange(people) * 10  # people stand in a row, 10 apart
    features[:, 1] = position
    return Features(features, logits, logits > 0, np.zeros(people, int))


def test_the_response_of_one_slider() -> None:
    log_odds = np.full(40, -1.0)
    found = measure_response("Smiling", [seen_at(x) for x in POSITIONS], log_odds, far=5.0)
    assert found.curve == pytest.approx([1 / (1 + np.exp(-x)) for x in POSITIONS])
    assert found.evidence == pytest.approx([x + 1 for x in POSITIONS]) and found.is_monotone
    assert found.identity == pytest.approx([0.4, 0.2, 0.0, 0.2, 0.4])
    assert list(found.moved) == ["Young"], "the change of Male is too small for a word, its own is no side effect"
    assert found.moved["Young"] == pytest.approx(2 / (1 + np.exp(-0.8)) - 1)
    assert not measure_response("Bald", [seen_at(x) for x in POSITIONS], log_odds, far=5.0).is_monotone
    json.dumps(found.to_dict(), allow_nan=False)


def test_strangers_are_compared_within_a_prompt() -> None:
    assert distance_between_people(np.array([[0.0], [2.0], [100.0], [106.0]]), 2) == 4.0
    with pytest.raises(ValueError, match="at least 2 people of each prompt"):
        distance_between_people(np.zeros((3, 1)), 1)


def test_every_slider_is_measured_at_every_position_once() -> None:
    asked: list[Mapping[str, float]] = []

    def features_at(attributes: Mapping[str, float]) -> Features:
        asked.append(attributes)
        return seen_at(attributes.get("Smiling", 0.0), 6)

    found = measure(features_at, list(slider_response.sliders()), 2, np.zeros(40))
    assert sorted(found) == sorted(ATTRIBUTES) and len(asked) == 1 + 4 * 40 and {} in asked
    assert found["Smiling"].is_monotone and slider_response.summary(found)["monotone"] == 1
    text = table(found)
    assert text.count("\n") == 41 and "| Smiling | 0.12, 0.27, 0.50, 0.73, 0.88 | yes |" in text


def test_one_command_measures_them_all(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that it writes; the model then says what it knows of them, unless its weights were replaced."""
    models = tmp_path / "models"
    build_attribute_classifier(models / "judge")
    folder = Path(shutil.copytree(tiny_folder, models / "tiny"))
    monkeypatch.setattr(slider_response, "STRIP", {"Smiling": "a woman"})
    assert evaluate.main(["sliders", "Smiling,Bald", "--model", str(folder), "--judge", str(models / "judge"),
                          "--samples", "6", "--steps", "3", "--out", str(tmp_path / "out"), "--record",
                          "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "out" / "sliders.json").read_text())
    assert (report["people"], report["steps"], set(report["sliders"])) == (6, 3, {"Smiling", "Bald"})
    assert len(report["sliders"]["Bald"]["curve"]) == len(POSITIONS) and report["sliders"]["Bald"]["identity"][2] == 0
    assert "Monotone:" in (tmp_path / "out" / "sliders.md").read_text()
    with Image.open(tmp_path / "out" / "sliders.png") as strip:
        assert strip.size[0] == len(POSITIONS) * strip.size[1]
    faces = FaceGenerator.load(folder, "cpu")
    assert faces.info.sliders == report["sliders"]
    index = read_index(folder)
    index["sliders"]["model_hash"] = "0" * 64
    (folder / "model_index.json").write_text(json.dumps(index))
    assert FaceGenerator.load(folder, "cpu").info.sliders == {}, "figures of other weights are not shown"
    assert report["summary"]["monotone"] == sum(
        Response(*(tuple(one[key]) for key in ("curve", "evidence", "identity")), {}).is_monotone
        for one in report["sliders"].values())
    assert len(PROMPTS) == 3
    with pytest.raises(SystemExit):
        evaluate.main(["sliders", "Smiling,Grinning"])
