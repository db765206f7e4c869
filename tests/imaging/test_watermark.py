"""Does the invisible mark survive what happens to images, is it invisible, and is it never seen where it is not?

On cartoon faces with the grain of a camera. The same on real photographs, with rates: `evaluate.py watermark`.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from core.evaluation.watermark_robustness import (
    ATTACKS,
    cropped,
    measure_false_positives,
    measure_robustness,
    psnr,
    resized,
    saved,
    table,
)
from core.imaging import watermark
from core.imaging.watermark import FOUND_BELOW, SIDE, find, mark, p_value, pattern
from core.training.synthetic_faces import draw_face, random_attributes


def photograph(seed: int) -> np.ndarray:
    """A face with grain, uint8 [128, 128, 3]."""
    rng = random.Random(seed)
    grain = np.random.default_rng(seed).normal(0, 3, (SIDE, SIDE, 1))
    return np.clip(draw_face(random_attributes(rng), rng) + grain, 0, 255).astype(np.uint8)


PINNED = [-0.006649, -0.267611, -0.680475]  # of version 1
PHOTOGRAPHS = [photograph(seed) for seed in range(6)]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_mark_survives(name: str) -> None:
    rng = np.random.default_rng(1)
    for one in PHOTOGRAPHS:
        seen = find(ATTACKS[name](mark(one), rng))
        assert seen.found and seen.p_value < FOUND_BELOW, (name, seen)
        assert seen.mirrored is (name == "mirrored")
        assert abs(seen.width - (115 if "10 %" in name else 122 if "5 %" in name else 128)) <= 2


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_found_where_nothing_is(name: str) -> None:
    rng = np.random.default_rng(1)
    for one in PHOTOGRAPHS:
        seen = find(ATTACKS[name](one, rng))
        assert not seen.found and seen.p_value > 1e-4, (name, seen)


def test_it_cannot_be_seen() -> None:
    for one in PHOTOGRAPHS:
        marked = mark(one)
        assert 43 < psnr(one, marked) < 50
        change = marked.astype(int) - one
        assert np.abs(change).max() <= 8 and abs(change.mean()) < 0.05  # the image is as bright as before
        grey = change[(one > 8).all(2) & (one < 247).all(2)]
        assert (grey.max(1) == grey.min(1)).all()  # and has the colours it had


def test_its_filter_is_the_cosine_transforms() -> None:
    from scipy import fft

    rng = np.random.default_rng(0)
    sizes = (128, 128, np.float64, 1e-12), (128, 96, np.float32, 1e-5), (37, 5, np.float64, 1e-12)
    for height, width, kind, exact in sizes:
        grey, gain = (rng.normal(size=(height, width)).astype(kind) for _ in range(2))
        found = watermark._filtered(grey, gain)
        expected = fft.idctn(fft.dctn(grey, norm="ortho") * gain, norm="ortho")
        assert found.dtype == kind and np.abs(found - expected).max() < exact * np.abs(expected).max()


def test_even_skin_is_marked_less_than_hair() -> None:
    even, rough = np.full((SIDE, SIDE, 3), 128, np.uint8), np.full((SIDE, SIDE, 3), 128, np.uint8)
    rough += np.random.default_rng(0).integers(0, 60, (SIDE, SIDE, 1)).astype(np.uint8)
    assert psnr(even, mark(even)) > psnr(rough, mark(rough)) + 6


def test_only_the_region_is_touched_and_it_is_enough() -> None:
    """A part that is inpainted into a photograph carries the mark, the rest stays byte for byte."""
    region = np.zeros((SIDE, SIDE), bool)
    region[:, SIDE // 3 :] = True
    for one in PHOTOGRAPHS:
        marked = mark(one, region)
        assert np.array_equal(marked[~region], one[~region])
        assert np.array_equal(marked[region], mark(one)[region])
        assert find(marked).found and find(saved(marked, "JPEG", 95)).found
        assert np.array_equal(mark(one, np.zeros_like(region)), one)


def test_the_same_picture_is_marked_the_same_and_a_similar_one_similarly() -> None:
    one = PHOTOGRAPHS[0]
    assert np.array_equal(mark(one), mark(one.copy()))
    near = one.copy()
    near[::7, ::5] ^= 1  # what another machine's arithmetic changes
    change = np.abs(mark(near).astype(int) - mark(one))
    assert change.max() <= 2 and (change > 1).mean() < 1e-3


def test_marking_twice_does_no_harm() -> None:
    once = mark(PHOTOGRAPHS[1])
    assert find(mark(once)).found and psnr(once, mark(once)) > 40


def test_the_pattern_is_pinned() -> None:
    """Images that were marked before must be found for ever: another pattern needs another VERSION."""
    assert watermark.VERSION == 1
    found = pattern()
    assert found.shape == (SIDE, SIDE) and abs(found.mean()) < 1e-3 and abs(found.std() - 1) < 1e-9
    assert [round(float(found[place]), 6) for place in ((0, 0), (5, 90), (127, 64))] == PINNED


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((128, 128, 3), np.uint8), np.full((1, 1, 3), 7, np.uint8), np.zeros((1, 900, 3), np.uint8),
     np.full((40, 30, 3), 255, np.uint8), np.zeros((300, 128, 3), np.uint8)],
    ids=["black", "one pixel", "a line", "white", "upright"],
)
def test_pictures_without_anything_in_them(pixels: np.ndarray) -> None:
    seen = find(pixels)
    assert not seen.found and seen.p_value > 0.01


def test_regular_pictures_are_not_taken_for_marked() -> None:
    y, x = np.mgrid[:SIDE, :SIDE]
    rng = np.random.default_rng(0)
    dot = np.zeros((SIDE, SIDE))
    dot[60:64, 70:74] = 255
    for grey in (x * 2, (x // 8 + y // 8) % 2 * 255, 127 + 127 * np.sin(x / 2.3), 127 + 120 * np.sin(np.hypot(x, y)),
                 rng.integers(0, 256, (SIDE, SIDE)), dot):
        picture = np.repeat(np.asarray(grey, np.uint8)[..., None], 3, 2)
        assert not find(picture).found


def test_a_large_marked_picture_is_found() -> None:
    marked = mark(PHOTOGRAPHS[2])
    assert find(resized(marked, 1000)).found
    wide = np.asarray(Image.fromarray(cropped(marked, 0.9, np.random.default_rng(0))).resize((500, 500)))
    assert find(wide).found
    assert find(marked[:, 10:]).found  # cut on one side only: no longer a square


def test_other_sizes_are_marked_too() -> None:
    large = resized(PHOTOGRAPHS[3], 256)
    assert find(mark(large)).found and mark(large).shape == large.shape


@pytest.mark.parametrize(
    ("pixels", "region", "message"),
    [(np.zeros((8, 8), np.uint8), None, r"must be uint8 \[H, W, 3\]"),
     (np.zeros((8, 8, 3)), None, "got float64"), (np.zeros((8, 8, 4), np.uint8), None, r"\[8, 8, 4\]"),
     (np.zeros((8, 8, 3), np.uint8), np.ones((8, 9), bool), r"region must be \[8, 8\]")],
)
def test_wrong_arrays_are_refused(pixels: np.ndarray, region: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mark(pixels, region)


def test_p_values_fall_with_the_score() -> None:
    scores = np.linspace(-3, 45, 200)
    values = [p_value(score) for score in scores]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1.0 and 0 <= values[-1] < 1e-300 and p_value(0.0) == 1.0


def test_the_measurement_counts_right() -> None:
    measured = measure_robustness(PHOTOGRAPHS[:2])
    assert measured["n"] == 2 and set(measured["ordeals"]) == set(ATTACKS)
    assert all(row["found"] == 1.0 for row in measured["ordeals"].values())
    stranger = measure_false_positives([PHOTOGRAPHS[0], mark(PHOTOGRAPHS[1]), PHOTOGRAPHS[2]])
    assert (stranger["n"], stranger["found"]) == (3, 1) and stranger["calibration"]["0.0001"] == pytest.approx(1 / 3)
    text = table({"cartoons": measured})
    assert "| JPEG 80 | 100.0 % (score " in text and text.count("\n") == len(ATTACKS) + 2
