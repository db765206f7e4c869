"""What is said of finished pictures by those who did not draw them?

The judge's opinion of each (`core/evaluation/attribute_classifier.py`), and how near each is to a training picture
(`core/evaluation/memorization_index.py`). Pictures come first: where the judge or the index is missing or fails, they
go out without.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.evaluation.attribute_classifier import Judge, Opinion, look, opinions
from core.evaluation.memorization_index import Index, Nearness, load
from core.nn.checkpoint import ModelFolderError
from core.text.prompt_parser import read

log = logging.getLogger(__name__)


def find_index(folder: str | Path) -> Index | None:
    """The index of a model folder's training pictures, or None where there is none that can be used."""
    try:
        return load(folder)
    except (ModelFolderError, OSError, ValueError) as error:
        log.warning("the index of training pictures in %s cannot be used, so nothing is compared: %s", folder, error)
        return None


def hear(judge: Judge | None, pixels: np.ndarray, prompts: Sequence[str]) -> Sequence[Opinion | None]:
    """What the judge thinks of each picture for its prompt. Shapes: uint8 [N, H, W, 3]."""
    if judge is not None:
        try:
            stated = [dict(read(prompt, {}).attributes) for prompt in prompts]
            return opinions(judge, look(judge, pixels), stated)
        except Exception:
            log.exception("the judge failed; the pictures go out without its opinion")
    return [None] * len(prompts)


def compare(index: Index | None, pixels: np.ndarray) -> Sequence[Nearness | None]:
    """How near each picture is to a training picture. Shapes: uint8 [N, H, W, 3]."""
    if index is not None:
        try:
            return index.nearest(pixels)
        except Exception:
            log.exception("the comparison with the training pictures failed; the pictures go out without it")
    return [None] * len(pixels)
