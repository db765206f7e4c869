"""For which descriptions are faces generated, and what do these assert?

Captions of real pictures, drawn by the grammar that training uses: of held-out people where prompt alignment is
measured, of training pictures where a correction is fitted. It does not know how faces are generated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from core.text.captions import draw_caption
from core.text.lexicon import ATTRIBUTES
from core.training.caption_cache import draw_texts

if TYPE_CHECKING:
    from dataset import FaceStore

HEADLINE = ("Smiling", "Male", "Blond_Hair", "Black_Hair", "Eyeglasses")
# What anybody can see in a 128 px face, two thirds of it rare enough to be ignored by a lazy model.
VISIBLE = (
    *HEADLINE, "Brown_Hair", "Gray_Hair", "Bald", "Bangs", "Wavy_Hair", "Receding_Hairline", "Young", "Wearing_Hat",
    "Mouth_Slightly_Open", "No_Beard", "Goatee", "Mustache", "5_o_Clock_Shadow", "Heavy_Makeup", "Wearing_Lipstick",
)  # fmt: skip
# Facts that people ask for with "no ..." or "without ...": (words, attribute, the value they ask for).
NEGATIONS = (
    ("without glasses", "Eyeglasses", False),
    ("no beard", "No_Beard", True),
    ("not smiling", "Smiling", False),
)
NEGATIONS_AIM = 0.9  # how often they should be obeyed, whatever the judge says of real pictures


@dataclass(frozen=True)
class Prompts:
    """Prompts drawn for held-out pictures: what each asserts (1 yes, 0 no, -1 silent) and which picture it is of."""

    texts: list[str]
    asserted: np.ndarray  # [N, 40] int8
    source: np.ndarray  # [N] positions in the held-out rows

    def stated(self) -> list[dict[str, bool]]:
        """The facts of each prompt by name."""
        return [{name: bool(says) for name, says in zip(ATTRIBUTES, row, strict=True) if says >= 0}
                for row in self.asserted]


def draw_prompts(attributes: np.ndarray, count: int, seed: int) -> Prompts:
    """One caption a picture, in order and round again. Shapes: attributes [M, 40] bool."""
    rng = random.Random(seed)
    source = np.arange(count) % len(attributes)
    captions = [draw_caption(attributes[row].tolist(), rng) for row in source]
    asserted = np.full((count, len(ATTRIBUTES)), -1, np.int8)
    for place, caption in enumerate(captions):
        for name, value in caption.facts.items():
            asserted[place, ATTRIBUTES.index(name)] = int(value)
    return Prompts([caption.text for caption in captions], asserted, source)


def training_captions(store: FaceStore, samples: int, seed: int) -> tuple[np.ndarray, Sequence[str]]:
    """What a correction is fitted to: all sharp training rows in random order, and a caption of each of the first
    ``samples`` of them, a person's own where the store has those."""
    rows = np.random.default_rng(seed).permutation(store.select("train", px=128))
    count = min(samples, len(rows))
    if store.text_labels is None:
        return rows, draw_prompts(store.attributes[rows[:count]], count, seed).texts
    return rows, draw_texts(store, rows[:count], 1, seed, 0.0)[0]
