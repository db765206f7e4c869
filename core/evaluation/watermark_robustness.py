"""What does the invisible mark survive, what does it cost, and how often is it seen where it is not?

`ATTACKS` are the transformations that images go through; `measure_robustness` marks images, sends them through each and
looks for the mark, `measure_false_positives` looks for it in images that never had it, and `measure` does both to a
store. It does not know how images are generated.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from core.imaging.watermark import FOUND_BELOW, find, mark

if TYPE_CHECKING:
    from dataset import FaceStore

Attack = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def saved(pixels: np.ndarray, kind: str, quality: int) -> np.ndarray:
    """Through a file and back."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=quality)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))


def cropped(pixels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A window of `share` of the side, anywhere."""
    height, width = (round(side * share) for side in pixels.shape[:2])
    top, left = rng.integers(0, (pixels.shape[0] - height + 1, pixels.shape[1] - width + 1))
    return pixels[top : top + height, left : left + width]


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


def toned(pixels: np.ndarray, contrast: float, shift: float) -> np.ndarray:
    return np.clip((pixels - 128.0) * contrast + 128.0 + shift, 0, 255).round().astype(np.uint8)


ATTACKS: dict[str, Attack] = {
    "PNG, as drawn": lambda pixels, rng: pixels,
    "JPEG 95": lambda pixels, rng: saved(pixels, "JPEG", 95),
    "JPEG 80": lambda pixels, rng: saved(pixels, "JPEG", 80),
    "JPEG 60": lambda pixels, rng: saved(pixels, "JPEG", 60),
    "WebP 80": lambda pixels, rng: saved(pixels, "WebP", 80),
    "crop by 5 %": lambda pixels, rng: cropped(pixels, 0.95, rng),
    "crop by 10 %": lambda pixels, rng: cropped(pixels, 0.9, rng),
    "crop by 10 %, resized back": lambda pixels, rng: resized(cropped(pixels, 0.9, rng), len(pixels)),
    "crop by 10 %, resized back, JPEG 80": lambda pixels, rng: saved(
        resized(cropped(pixels, 0.9, rng), len(pixels)), "JPEG", 80),
    "twice the size": lambda pixels, rng: resized(pixels, 2 * len(pixels)),
    "twice the size, JPEG 80": lambda pixels, rng: saved(resized(pixels, 2 * len(pixels)), "JPEG", 80),
    "half the size": lambda pixels, rng: resized(pixels, len(pixels) // 2),
    "mirrored": lambda pixels, rng: np.ascontiguousarray(pixels[:, ::-1]),
    "brighter, more contrast": lambda pixels, rng: toned(pixels, 1.3, 25.0),
    "darker, less contrast": lambda pixels, rng: toned(pixels, 0.6, -25.0),
}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise ratio in dB; infinite for equal images. Shapes: two uint8 of one shape."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return math.inf if error == 0 else 10.0 * math.log10(255.0**2 / error)


def measure_robustness(pictures: Sequence[np.ndarray], *, seed: int = 0) -> dict[str, Any]:
    """Marks images and sends them through every attack. Shapes: N x uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    marked = [mark(one) for one in pictures]
    quality = [psnr(one, other) for one, other in zip(pictures, marked, strict=True)]
    found: dict[str, Any] = {"n": len(pictures), "psnr_mean": float(np.mean(quality)), "psnr_least": min(quality)}
    found["ordeals"] = {}
    for name, attack in ATTACKS.items():
        seen = [find(attack(one, rng)) for one in marked]
        scores = [one.score for one in seen]
        found["ordeals"][name] = {
            "found": float(np.mean([one.found for one in seen])), "score_mean": float(np.mean(scores)),
            "score_least": min(scores),
        }
    return found


def measure_false_positives(unmarked: Iterable[np.ndarray]) -> dict[str, Any]:
    """How often is the mark seen in images without it, and is the p-value what it says?

    `calibration` is the share of images with a p-value below each bound; it should not be above the bound.
    """
    seen = [find(one) for one in unmarked]
    values = np.array([one.p_value for one in seen])
    return {
        "n": len(seen),
        "found": int((values < FOUND_BELOW).sum()),
        "score_highest": max(one.score for one in seen),
        "p_value_least": float(values.min()),
        "calibration": {f"{bound:g}": float((values < bound).mean()) for bound in (0.1, 0.01, 0.001, 1e-4)},
    }


def measure(
    store: FaceStore, reconstruct: Callable[[np.ndarray], np.ndarray], *, samples: int, pool: int | None, seed: int
) -> dict[str, Any]:
    """What the mark survives on ``samples`` sharp test images and on their copies by the VAE, which are as smooth as
    generated ones; and how often it is seen in real images without it.

    Those are the sharp ones of the held-out people and of ``pool`` training images (None: all of them), and a quarter
    as many soft ones.
    """
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    train = rng.permutation(store.sharp("train"))
    soft = rng.permutation(np.setdiff1d(store.select("train"), train))
    sharp = np.concatenate([store.sharp("test"), store.sharp("val"), train[:pool]])
    pictures = store.images[rng.permutation(store.sharp("test"))[:samples]]
    copies = reconstruct(pictures)
    unmarked = {"sharp photographs": sharp, "soft photographs": soft[: len(sharp) // 4]}
    return {
        "marked": {"photographs": measure_robustness([*pictures], seed=seed),
                   "decoded": measure_robustness([*copies], seed=seed)},
        "unmarked": {
            **{name: measure_false_positives(store.images[row] for row in tqdm(rows, desc=name)) for name,
               rows in unmarked.items()},
            "decoded": measure_false_positives(copies),
        },
    }


def page(report: Mapping[str, Any]) -> str:
    """All of it in Markdown."""
    return f"{table(report['marked'])}\n\n{unmarked_table(report['unmarked'])}\n"


def table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """What `measure_robustness` found of several sets of images, as Markdown: found, and the lowest score."""
    lines = ["| | " + " | ".join(f"{name} (n = {one['n']})" for name, one in measured.items()) + " |"]
    lines += ["| --- |" + " --- |" * len(measured)]
    quality = (f"{one['psnr_mean']:.1f} dB, at least {one['psnr_least']:.1f}" for one in measured.values())
    lines += ["| PSNR, marked against unmarked | " + " | ".join(quality) + " |"]
    for name in ATTACKS:
        rows = [one["ordeals"][name] for one in measured.values()]
        cells = (f"{100 * row['found']:.1f} % (score {row['score_mean']:.1f}, lowest {row['score_least']:.1f})"
                 for row in rows)
        lines += [f"| {name} | " + " | ".join(cells) + " |"]
    return "\n".join(lines)


def unmarked_table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """What `measure_false_positives` found of several sets of images, as Markdown."""
    bounds = list(next(iter(measured.values()))["calibration"])
    lines = ["| without the mark | n | found | highest score | " + " | ".join(f"p < {b}" for b in bounds) + " |"]
    lines += ["| --- |" + " --- |" * (3 + len(bounds))]
    for name, one in measured.items():
        shares = " | ".join(f"{one['calibration'][bound]:.5f}" for bound in bounds)
        lines += [f"| {name} | {one['n']:,} | {one['found']} | {one['score_highest']:.2f} | {shares} |"]
    return "\n".join(lines)
