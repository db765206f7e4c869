"""Is a generated face too near to an image that the model learned from?

An index of the training images, small enough to be shipped: thumbnails of 16 x 16 without their brightness and
contrast, reduced to their normalized principal components and kept in eight bits. `Index.nearest` compares an image and
its mirror image (training saw both) with all of them. How near is too near says the distance of real images of people
who were in no training image: `percentile` is the share of those that are nearer to their nearest training image
than this one, and `too_close` is what happens to a share of `TOO_CLOSE` of them.

It finds an image that was learned by heart, composition and all, not somebody who looks alike in another pose. No
network takes part, so no retraining makes an index wrong; it belongs to the data that a model was trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.nn.checkpoint import ModelFolderError, load_component, read_index, save_component

if TYPE_CHECKING:
    from dataset import FaceStore

COMPONENT = "nearest"
SIDE = 16  # pixels of a thumbnail
SPACE = f"thumbnails {SIDE}, standardised"  # an index of any other space is not used
COMPONENTS = 64  # principal ones of the thumbnail's 768 numbers
LEVELS = 127 / 4  # eight bits reach to 4 deviations
TOO_CLOSE = 0.01  # share of unseen people who would be called too close
QUANTILES = np.linspace(0, 1, 501)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nearness:
    """How an image stands to its nearest training image.

    `percentile` of 100: the share of unseen real faces that are nearer to one of theirs.
    """

    percentile: float
    too_close: bool


@dataclass(frozen=True, eq=False)
class Index:
    """The thumbnails of the training images, reduced.

    Shapes: mean float32 [F], projection float32 [F, D] (principal components over their deviations), codes int8 [N, D],
    held float32 [Q]: quantiles of the nearest distances of real faces that were in no training image.
    """

    mean: np.ndarray
    projection: np.ndarray
    codes: np.ndarray
    held: np.ndarray

    @property
    def threshold(self) -> float:
        """The distance below which an image is too close."""
        return float(np.interp(TOO_CLOSE, QUANTILES, self.held))

    def reduce(self, features: np.ndarray) -> np.ndarray:
        """Shapes: float32 [B, F] -> int8 [B, D]. Images and index are rounded alike: a copy has distance 0."""
        found = (features - self.mean) @ self.projection * LEVELS
        return np.clip(np.round(found), -127, 127).astype(np.int8)

    def search(self, views: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Distance to the nearest training image and which it is, the nearest of several views of each image.

        Shapes: views of [B, F] -> float [B], int [B].
        """
        ours, length = self._expanded
        count = len(views[0])
        theirs = self.reduce(np.concatenate(views)).astype(np.float32)  # [V * B, D]
        apart = length - 2.0 * theirs @ ours.T + np.square(theirs).sum(1)[:, None]  # [V * B, N]
        index = apart.argmin(1)
        found = np.sqrt(np.maximum(apart[np.arange(len(theirs)), index], 0.0)).reshape(-1, count) / LEVELS
        view = found.argmin(0)
        return found.min(0), index.reshape(-1, count)[view, np.arange(count)]

    @cached_property
    def _expanded(self) -> tuple[np.ndarray, np.ndarray]:
        """The codes as numbers that can be multiplied, and their squared lengths: 13 MB, and half of the search's time.

        Exact: sums of squares of small whole numbers.
        """
        ours = self.codes.astype(np.float32)
        return ours, np.square(ours).sum(1)

    def nearest(self, pixels: np.ndarray) -> list[Nearness]:
        """How each image stands. Shapes: uint8 [B, S, S, 3]."""
        shares = np.interp(self.search(views(pixels))[0], self.held, QUANTILES)
        return [Nearness(round(100.0 * float(share), 2), bool(share < TOO_CLOSE)) for share in shares]


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """Means of blocks, each image's brightness and contrast taken out. Shapes: uint8 [B, S, S, 3] -> float32 [B, F].

    Raises ValueError when S is no multiple of SIDE.
    """
    count, height, width, _ = pixels.shape
    if height % SIDE or width % SIDE:
        raise ValueError(f"images must have sides of a multiple of {SIDE}; got {height} x {width}")
    blocks = pixels.reshape(count, SIDE, height // SIDE, SIDE, width // SIDE, 3).mean((2, 4), dtype=np.float32)
    flat = blocks.reshape(count, -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / (flat.std(1, keepdims=True) + 1.0)


def views(pixels: np.ndarray) -> list[np.ndarray]:
    """The thumbnails of images and of their mirror images."""
    return [thumbnails(pixels), thumbnails(pixels[:, :, ::-1])]


def build(train: np.ndarray, held: Sequence[np.ndarray], components: int = COMPONENTS) -> Index:
    """An index of training images, calibrated on views of unseen ones.

    Shapes: train [N, F], held views of [M, F]. Raises ValueError for fewer than 2 of either.
    """
    if len(train) < 2 or len(held[0]) < 2:
        raise ValueError(f"{len(train)} training and {len(held[0])} unseen images: at least 2 of each are needed")
    mean = train.mean(0)
    values, vectors = np.linalg.eigh(np.cov(train - mean, rowvar=False).astype(np.float64))
    order = values.argsort()[::-1][:components]
    deviations = np.sqrt(np.maximum(values[order], 1e-6 * values.max()))
    projection = (vectors[:, order] / deviations).astype(np.float32)
    empty = Index(mean.astype(np.float32), projection, np.zeros((1, len(order)), np.int8), QUANTILES)
    raw = Index(empty.mean, projection, empty.reduce(train), QUANTILES)
    return Index(raw.mean, projection, raw.codes, np.quantile(raw.search(held)[0], QUANTILES).astype(np.float32))


def build_of_store(
    store: FaceStore, reconstruct: Callable[[np.ndarray], np.ndarray], samples: int, seed: int
) -> tuple[Index, dict[str, Any]]:
    """An index of all training images of a store, and how well it tells copies from unseen people.

    Calibrated on the val images and checked on the test images, whose people it has not seen, and on ``samples``
    reconstructions of training images, as they are and mirrored, which it must find.
    """
    rng, train = np.random.default_rng(seed), store.select("train")
    # every whole image at once would not fit in memory; their thumbnails do
    parts = [thumbnails(store.images[chunk]) for chunk in np.array_split(train, -(-len(train) // 1024))]
    held = {split: store.images[store.sharp(split)] for split in ("val", "test")}
    index = build(np.concatenate(parts), views(held["val"]))
    chosen = np.sort(rng.permutation(len(train))[:samples])
    copies = reconstruct(store.images[train[chosen]])
    distance, which = index.search(views(np.ascontiguousarray(copies[:, :, ::-1])))

    def share_too_close(pixels: np.ndarray) -> float:
        return float(np.mean([one.too_close for one in index.nearest(pixels)]))

    return index, {
        "n": len(train), "bytes": index.codes.nbytes, "too_close_below": index.threshold,
        "copies": {"n": len(chosen), "called_too_close": share_too_close(copies),
                   "mirrored_called_too_close": float((distance < index.threshold).mean()),
                   "mirrored_and_the_right_one": float((which == chosen).mean())},
        "unseen": {"n": len(held["test"]), "called_too_close": share_too_close(held["test"])},
    }  # fmt: skip


def save(index: Index, folder: str | Path, **extra: Any) -> None:
    """Into a model folder, whole or not at all."""
    tensors = {"mean": index.mean, "projection": index.projection, "codes": index.codes, "held": index.held}
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    config = {"space": SPACE, "too_close_below": index.threshold, "share": TOO_CLOSE}
    save_component(folder, COMPONENT, state, config, half=False, extra=extra)


def load(folder: str | Path) -> Index | None:
    """The index of a model folder; None where there is none, or it is of another kind: then nothing is compared.

    Raises ModelFolderError when it is damaged.
    """
    if COMPONENT not in read_index(folder)["components"]:
        return None
    config, state = load_component(folder, COMPONENT)
    if config.get("space") != SPACE:
        log.warning("the index of training images in %s is of another kind than %r and is not used", folder, SPACE)
        return None
    found = {name: value.numpy() for name, value in state.items()}
    try:
        codes = found["codes"].astype(np.int8)
        index = Index(found["mean"], found["projection"], codes, found["held"])
    except KeyError as error:
        raise ModelFolderError(f"{Path(folder) / COMPONENT} lacks {error}; restore the folder") from error
    if index.projection.shape != (len(index.mean), codes.shape[1]) or index.held.shape != QUANTILES.shape:
        raise ModelFolderError(f"the parts of {Path(folder) / COMPONENT} do not fit together; restore the folder")
    return index
