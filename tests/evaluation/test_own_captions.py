"""Does the report by a model's own CLIP count what it says it counts?"""

from __future__ import annotations

import numpy as np
import pytest

from core.evaluation.own_captions import alignment, page


def test_alignment_by_known_answer() -> None:
    """Three captions at right angles; the third image leans to another caption than its own, the fourth is a tie."""
    captions = np.eye(3)
    images = np.array([[1, 0, 0], [0, 1, 0], [0.8, 0, 0.6], [np.sqrt(0.5), np.sqrt(0.5), 0]])
    found = alignment(images, captions, [0, 1, 2, 1])
    assert found.own_caption_first == 0.75 and found.cosine == pytest.approx((1 + 1 + 0.6 + np.sqrt(0.5)) / 4)


def test_a_page_leaves_out_what_tells_nothing() -> None:
    """With one caption any image fits it best, and without enough images there is no distance."""
    figures = {"own_caption_first": 0.5, "cosine": 0.7}
    found = {"captions": 4, "chance": 0.25, "alignment": {"generated": figures, "real": figures},
             "frechet_in_own_features": {"generated": 1.0, "held_out": 0.5, "n": 8},
             "vae": {"psnr_db": 20.0, "ssim": 0.9, "ms_ssim": 0.95, "n": 8}}
    assert "own caption first of 4 (chance 0.250) | 0.500" in page(found) and "n = 8" in page(found)
    shorter = page(found | {"captions": 1, "frechet_in_own_features": None})
    assert "own caption first" not in shorter and "Fréchet" not in shorter and "20.0 dB" in shorter
