"""How near are the faces of a network that draws in one pass to real ones, how different from each other, how fast?

The Frechet distance is that of every other report here: features of the attribute classifier, the same n of generated
and of sharp training images, and held-out people at that n as the floor. Smaller faces are enlarged before. It does not
know which network made them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn import functional

from core.command import SettingError
from core.evaluation.attribute_classifier import (
    extract_features,
    extract_store_features,
    load_attribute_classifier,
)
from core.evaluation.metrics import frechet_distance, mean_pairwise_distance, polynomial_mmd, prompt_fidelity
from core.evaluation.prompts import VISIBLE, Prompts
from core.imaging.spectrum import Pictures
from core.nn.layers import to_images, to_pixels
from core.text.lexicon import ATTRIBUTES

if TYPE_CHECKING:
    from dataset import FaceStore

DIVERSE = 1000  # faces whose distances from each other are compared


def enlarged(pictures: Pictures, size: int, batch: int = 256) -> Pictures:
    """Bicubic, to ``size`` pixels a side: uint8 [N, S, S, 3] -> [N, size, size, 3]; the same where they have them."""
    if pictures.shape[1] == size:
        return pictures
    return np.concatenate([
        to_pixels(functional.interpolate(to_images(pictures[start : start + batch]), (size, size), mode="bicubic",
                                         align_corners=False))
        for start in range(0, len(pictures), batch)])


def measure(pictures: Pictures, store: FaceStore, judge: str | Path, cache: str | Path, *, seed: int = 0,
            prompts: Prompts | None = None, unseen: np.ndarray | None = None) -> dict[str, Any]:
    """Distances of uint8 images [N, S, S, 3] to real ones, and with ``prompts``, which were drawn for the rows
    ``unseen`` of the store, how well they are met.

    frechet, mmd: to n sharp training images; floor: of n sharp test images; diversity: mean distance of pairs over that
    of real images. Raises SettingError for a store with fewer than 4 sharp images of both.
    """
    classifier, digest = load_attribute_classifier(judge)
    rng = np.random.default_rng(seed)
    train, test = (rng.permutation(store.select(split, px=128)) for split in ("train", "test"))
    n = min(len(pictures), len(train), len(test))
    if n < 4:
        raise SettingError(f"{len(pictures)} generated, {len(train)} sharp training and {len(test)} sharp test images "
                           "are there; at least 4 of each are needed")
    seen = extract_features(classifier, enlarged(pictures, store.images.shape[1]))
    reference, held = (extract_store_features(classifier, digest, store, rows[:n], Path(cache))
                       for rows in (train, test))
    value, floor = (frechet_distance(one.features[:n], reference.features) for one in (seen, held))
    few = min(n, DIVERSE)
    apart = [mean_pairwise_distance(one.features[:few]) for one in (seen, held)]
    found: dict[str, Any] = {
        "n": n, "frechet": value, "frechet_floor": floor, "frechet_over_floor": value / max(floor, 1e-9),
        "mmd": polynomial_mmd(seen.features[:n], reference.features), "diversity": apart[0] / max(apart[1], 1e-9),
        "judge": digest}
    if prompts is not None and unseen is not None:
        real = extract_store_features(classifier, digest, store, unseen, Path(cache))
        agreements = prompt_fidelity(prompts.asserted, store.attributes[unseen][prompts.source], seen.verdicts,
                                     real.verdicts[prompts.source])
        ratios = {name: agreements[ATTRIBUTES.index(name)] for name in VISIBLE}
        known = {name: one.ratio for name, one in ratios.items() if one is not None}
        found |= {"alignment": float(np.mean(list(known.values()))) if known else None, "attributes": known}
    return found


def milliseconds(once: Callable[[], object], times: int = 21) -> float:
    """The median time of a call, after one that nobody counts."""
    once()
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        once()
        taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken)


def gigaflops(once: Callable[[], object]) -> float:
    """Floating-point operations of all networks in a call, in 10^9; a multiplication and an addition are two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        once()
    return counter.get_total_flops() / 1e9
