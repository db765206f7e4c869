"""How well does a text encoder tell images apart that it was never taught to tell apart?

Zero-shot classification: an image has an attribute where it is nearer to captions with it than to the same captions
without. Any two encoders of one space can be measured; how they came about is not known here.

Source: https://arxiv.org/abs/2103.00020 (section 3.1).
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from core.nn.clip import CLIP
from core.nn.tokenizer import Tokenizer
from core.text.captions import draw_caption
from core.text.lexicon import ATTRIBUTES


def zero_shot(model: CLIP, tokenizer: Tokenizer, image: Tensor, attributes: Tensor) -> dict[str, float]:
    """How well the difference between two kinds of captions tells the images [I, E] that have an attribute from those
    that lack it (area under the ROC curve), for each attribute [I, 40] in {-1, 1} of which both are there."""
    scores = {}
    for column, name in enumerate(ATTRIBUTES):
        sides = []
        for prompts in attribute_prompts(name):
            embedded = model.embed_text(*(t.to(image.device) for t in tokenizer(prompts)))
            sides.append(F.normalize(embedded.mean(0), dim=0))
        truth = attributes[:, column] > 0
        if bool(truth.any()) and not bool(truth.all()):
            scores[name] = round(rank_auc(image @ (sides[0] - sides[1]), truth), 4)
    return scores


def rank_auc(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of scores [N] for booleans [N] (Mann-Whitney; 0.5 = chance)."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.cpu().argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    positives = truth.cpu()
    count, others = int(positives.sum()), int((~positives).sum())
    return float((ranks[positives].sum() - count * (count + 1) / 2) / (count * others))


def attribute_prompts(name: str, count: int = 16, seed: int = 0) -> tuple[list[str], list[str]]:
    """Pairs of captions that differ in this one fact and agree in every other: those with it, and those without."""
    rng = random.Random(seed)
    sides: tuple[list[str], list[str]] = ([], [])
    for _ in range(2000):
        attributes = {"Male": rng.random() < 0.5}  # what a caption is not told, it does not mention
        pair = [draw_caption(attributes | {name: wanted}, rng, length="short") for wanted in (True, False)]
        others = [{key: value for key, value in caption.facts.items() if key != name} for caption in pair]
        if others[0] == others[1] and all(name in caption.facts for caption in pair):
            for side, caption in zip(sides, pair, strict=True):
                side.append(caption.text)
            if len(sides[0]) == count:
                break
    if not sides[0]:  # the grammar never says this fact alone: contrast its plain name with silence
        sides[0].append(f"a person, {name.replace('_', ' ').lower()}")
        sides[1].append("a person")
    return sides
