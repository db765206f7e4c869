"""How are finished images assessed by networks that did not generate them?

What the attribute classifier predicts for each (`core/evaluation/attribute_classifier.py`), and how near each is to a
training image (`core/evaluation/memorization_index.py`). Images come first: where the attribute classifier or the index
is missing or fails, they go out without.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.evaluation.attribute_classifier import AttributeClassifier, Prediction, extract_features, predict
from core.evaluation.memorization_index import Index, Nearness, load
from core.nn.checkpoint import ModelFolderError
from core.text.prompt_parser import read

log = logging.getLogger(__name__)


def find_index(folder: str | Path) -> Index | None:
    """The index of a model folder's training images, or None where there is none that can be used."""
    try:
        return load(folder)
    except (ModelFolderError, OSError, ValueError) as error:
        log.warning("the index of training images in %s cannot be used, so nothing is compared: %s", folder, error)
        return None


def assess(classifier: AttributeClassifier | None, pixels: np.ndarray,
           prompts: Sequence[str]) -> Sequence[Prediction | None]:
    """What the attribute classifier predicts for each image for its prompt. Shapes: uint8 [N, H, W, 3]."""
    if classifier is not None:
        try:
            stated = [dict(read(prompt, {}).attributes) for prompt in prompts]
            return predict(classifier, extract_features(classifier, pixels), stated)
        except Exception:
            log.exception("the attribute classifier failed; the images go out without its prediction")
    return [None] * len(prompts)


def nearest_training_images(index: Index | None, pixels: np.ndarray) -> Sequence[Nearness | None]:
    """How near each image is to a training image. Shapes: uint8 [N, H, W, 3]."""
    if index is not None:
        try:
            return index.nearest(pixels)
        except Exception:
            log.exception("the comparison with the training images failed; the images go out without it")
    return [None] * len(pixels)
