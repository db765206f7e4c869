"""Is a copied training image found, an unseen face left alone, and is the index small and sound?

The arithmetic on invented numbers; the whole way, from a store to a warning in a job, on generated faces.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from core.evaluation import image_assessment, memorization_index
from core.evaluation.memorization_index import LEVELS, QUANTILES, TOO_CLOSE, Index, build
from core.evaluation.watermark_robustness import saved
from core.imaging.watermark import mark
from core.nn.checkpoint import ModelFolderError, read_index, save_component, update_index
from core.web.serializers import told
from dataset import synthetic_store
from model_loading import DEFAULT_MODEL
from tests.support.asking import make_app, run
from tests.support.drawing import DrawingEngine


def crowd(count: int, seed: int, width: int = 24) -> np.ndarray:
    """Features with a few strong directions and many weak ones, float32 [count, width]."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, width)) * np.geomspace(8, 0.5, width) + 3).astype(np.float32)


@pytest.fixture(scope="module")
def index() -> Index:
    return build(crowd(600, 0), [crowd(500, 1), crowd(500, 2)], components=12)


def test_a_copy_is_found(index: Index) -> None:
    train = crowd(600, 0)
    distance, which = index.search([crowd(600, 9), train])  # the mirror image of each is in the index
    assert not distance.any() and np.array_equal(which, np.arange(600))
    near = train + 0.02 * crowd(600, 3)
    assert (index.search([near])[0] < index.threshold).mean() > 0.9


def test_unseen_people_are_called_too_close_as_seldom_as_was_said(index: Index) -> None:
    distances = index.search([crowd(3000, 11), crowd(3000, 12)])[0]
    assert (distances < index.threshold).mean() < 3 * TOO_CLOSE
    assert 0.35 < (distances < np.median(index.held)).mean() < 0.65


def test_search_agrees_with_the_plain_definition(index: Index) -> None:
    views = [crowd(7, 20), crowd(7, 21)]
    wanted = [
        min(float(np.linalg.norm(index.reduce(view[i : i + 1]).astype(float) - index.codes, axis=1).min()) / LEVELS
            for view in views)
        for i in range(7)
    ]
    assert np.allclose(index.search(views)[0], wanted)


def test_it_is_small() -> None:
    assert 50_903 * memorization_index.COMPONENTS < 4 * 2**20


@pytest.mark.parametrize(("train", "held"), [(1, 5), (5, 1), (0, 5)])
def test_too_few_pictures_are_refused(train: int, held: int) -> None:
    with pytest.raises(ValueError, match="at least 2 of each"):
        build(crowd(train, 0), [crowd(held, 1)])


# ---- on the disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, index: Index) -> Path:
    memorization_index.save(index, tmp_path, measured={"n": 600})
    return tmp_path


def test_it_comes_back_as_it_was(folder: Path, index: Index) -> None:
    again = memorization_index.load(folder)
    assert again is not None and again.codes.dtype == np.int8
    for name in ("mean", "projection", "codes", "held"):
        assert np.array_equal(getattr(again, name), getattr(index, name)), name
    config = json.loads((folder / "nearest" / "config.json").read_text())
    assert config == {"space": memorization_index.SPACE, "too_close_below": index.threshold, "share": TOO_CLOSE}
    assert read_index(folder)["components"]["nearest"]["measured"] == {"n": 600}


def test_one_of_another_kind_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = folder / "nearest" / "config.json"
    config.write_text(config.read_text().replace(memorization_index.SPACE, "something else"))
    with caplog.at_level(logging.WARNING):
        assert memorization_index.load(folder) is None
    assert "is of another kind" in caplog.text


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    update_index(tmp_path, name="x")
    assert memorization_index.load(tmp_path) is None


@pytest.mark.parametrize("damage", ["weights", "part", "shape"])
def test_a_damaged_one_is_refused(folder: Path, index: Index, damage: str) -> None:
    if damage == "weights":
        path = folder / "nearest" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    else:
        kept = {"mean": torch.from_numpy(index.mean), "codes": torch.from_numpy(index.codes),
                "held": torch.from_numpy(index.held)}
        kept |= {} if damage == "part" else {"projection": torch.zeros(3, 3)}
        save_component(folder, "nearest", kept, {"space": memorization_index.SPACE}, half=False)
    with pytest.raises(ModelFolderError, match="does not match|lacks 'projection'|do not fit together"):
        memorization_index.load(folder)


# ---- with images ---------------------------------------------------------------------------------------------------


def faces_of(store: Any, split: str) -> np.ndarray:
    return np.asarray(store.images[store.select(split)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_store(tmp_path_factory.mktemp("store"), 96)


@pytest.fixture(scope="module")
def small(store: Any) -> Index:
    return build(
        memorization_index.thumbnails(faces_of(store, "train")),
        memorization_index.views(faces_of(store, "val")),
        components=16,
    )


def test_a_training_picture_is_too_close_whichever_way_it_looks(store: Any, small: Index) -> None:
    """And brighter, with less contrast, marked, or compressed: the model generates no copy to the last digit."""
    train = faces_of(store, "train")[:12]
    toned = np.clip(train * 0.8 + 30, 0, 255).astype(np.uint8)
    marked = np.stack([saved(mark(one), "JPEG", 80) for one in train])
    for pictures in (train, np.ascontiguousarray(train[:, :, ::-1]), toned, marked):
        found = image_assessment.nearest_training_images(small, pictures)
        assert len(found) == 12 and all(one.too_close and one.percentile < 1 for one in found if one)


def test_thumbnails_know_neither_brightness_nor_contrast() -> None:
    pixels = np.random.default_rng(0).integers(60, 160, (3, 64, 64, 3), dtype=np.uint8)
    one, other = memorization_index.thumbnails(pixels), memorization_index.thumbnails(pixels + np.uint8(40))
    assert one.shape == (3, 768) and np.allclose(one, other, atol=1e-4) and np.allclose(one.mean(1), 0, atol=1e-5)
    assert np.isfinite(memorization_index.thumbnails(np.zeros((1, 16, 16, 3), np.uint8))).all()
    with pytest.raises(ValueError, match="a multiple of 16; got 20 x 20"):
        memorization_index.thumbnails(np.zeros((1, 20, 20, 3), np.uint8))


def test_no_index_and_a_failing_one_stop_no_picture(
    index: Index, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.zeros((2, 128, 128, 3), np.uint8)
    assert image_assessment.nearest_training_images(None, pixels) == [None, None]
    with caplog.at_level(logging.ERROR):
        assert image_assessment.nearest_training_images(index, pixels) == [None, None]  # 24 features instead of 768
    assert "the images go out without it" in caplog.text
    weights = folder / "nearest" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert image_assessment.find_index(folder) is None
    assert "nothing is compared" in caplog.text


def test_an_index_of_a_store_finds_copies(store: Any) -> None:
    """Copies by a VAE are what a model could reproduce at best; here the copies are the images themselves."""
    built, report = memorization_index.build_of_store(store, np.asarray, samples=20, seed=0)
    assert report["copies"]["called_too_close"] == report["copies"]["mirrored_called_too_close"] == 1.0
    assert report["copies"]["mirrored_and_the_right_one"] == 1.0
    assert report["n"] == len(store.select("train")) == len(built.codes)


def test_the_command_builds_one_into_the_model_folder(store: Any, tiny_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    assert evaluate.main(["index-training-images", "--data", str(store.folder), "--model", str(model),
                          "--out", str(tmp_path / "out"), "--samples", "20", "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "out" / "nearest.json").read_text())
    assert report["n"] == len(store.select("train")) and report["copies"]["n"] == 20
    assert image_assessment.find_index(model) is not None
    assert read_index(model)["components"]["nearest"]["measured"] == report


def test_the_bundled_index_is_sound() -> None:
    found = memorization_index.load(DEFAULT_MODEL)
    assert found is not None, "build it with: python evaluate.py index-training-images"
    assert len(found.codes) > 50_000 and found.codes.nbytes <= 4 * 2**20
    assert (np.diff(found.held) >= 0).all() and 0 < found.threshold < found.held[-1]
    measured = read_index(DEFAULT_MODEL)["components"]["nearest"]["measured"]
    assert measured["copies"]["called_too_close"] > 0.95 and measured["unseen"]["called_too_close"] < 0.03


# ---- what clients are told -------------------------------------------------------------------------------------------


def test_a_job_warns_of_images_that_are_too_close() -> None:
    app = make_app(DrawingEngine(copied=frozenset((8, 9, 41))))
    client = app.test_client()
    two, one, none = (client.get(f"/jobs/{run(app, n_images=n, seed=seed)}/").get_json()
                      for n, seed in ((4, 7), (1, 41), (2, 50)))
    assert [entry["nearest"]["too_close"] for entry in two["response"]] == [False, True, True, False]
    assert two["warnings"][-1].startswith("Images 1, 2 are unusually close to a training image")
    assert one["warnings"][-1].startswith("Image 0 is unusually close to a training image")
    assert not any("training image" in warning for warning in none["warnings"])
    listed = {job["job_id"]: job["warnings"] for job in client.get("/jobs/").get_json()["jobs"]}
    assert listed == {job["job_id"]: job["warnings"] for job in (two, one, none)}


def test_what_is_said_of_older_jobs() -> None:
    assert told(["a"], [{"index": 0}, {"index": 1, "nearest": None}]) == ["a"]
    assert told([], [{"index": 3, "nearest": {"percentile": 0.2, "too_close": True}}])[0].startswith("Image 3 is")
    assert len(QUANTILES) == 501
