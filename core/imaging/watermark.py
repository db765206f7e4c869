"""Was this image generated here, even where nothing in the file says so any more?

`mark` adds a faint pattern to the brightness of an image; `find` looks for it. The pattern is band-limited noise
that a published key determines: no network, no training, nothing to load. Its band lies between what JPEG throws away
and what faces are full of, its strength follows the image's own texture, and it carries one bit: that it is there.

`find` whitens the image, so that hair and skin count alike, and correlates it with the pattern at every place and
mirror image that cutting up to a fifth off an image and resizing the rest can lead to. Spread spectrum:
https://doi.org/10.1109/83.650120. Search by correlation after a crop: https://doi.org/10.1109/83.918570

It tells honest people what an image is; it does not stop dishonest ones: who knows the key can put the pattern into a
photograph, or take it out. A rotation by more than about a degree, or a crop of more than a fifth, hides it. What it
withstands is measured by `python evaluate.py watermark`. It knows neither files nor models.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy import fft
from PIL import Image

VERSION = 1  # of the pattern and its strength; generation parameters carry it
KEY = b"text-to-face watermark 1"
SIDE = 128  # the pattern's own size; images of other sizes get it resized, and are resized to be looked at
LOW, HIGH = 0.07, 0.31  # cycles a pixel: below are the faces, above is what JPEG and resizing remove
STRENGTH = 0.85  # grey levels, before the image's texture is looked at
FLAT, TEXTURED, PER_LEVEL = 0.6, 2.0, 0.12  # factor on even skin, at most, and its rise a grey level of texture
WIDTHS = tuple(range(SIDE, 98, -2))  # how many of the original's pixels the longer side may still show
GRID = 168  # of the Fourier transforms: room for the pattern at its largest, and of small factors
LEAST_SIDE = 32  # of an image, its longer side at 128: below, there is too little to look at
CUT = 2.0  # whitened values beyond this many local deviations are edges: they count no more than that
SLACK = 2  # pixels that resizing may shift by
NUM_TRIALS = 30_000  # fitted to 5,000 training photographs, see `p_value`
FOUND_BELOW = 1e-5  # p-value; measured on tens of thousands of photographs by `evaluate.py watermark`


@dataclass(frozen=True)
class Finding:
    """What was found: `score` in deviations from what an unmarked image gives, and how probable that is by chance.

    `width` is how many of the original's 128 pixels the longer side still shows, `mirrored` whether it was flipped;
    both mean something only where the mark was `found`.
    """

    score: float
    p_value: float
    width: int
    mirrored: bool

    @property
    def found(self) -> bool:
        return self.p_value < FOUND_BELOW


def mark(pixels: np.ndarray, region: np.ndarray | None = None) -> np.ndarray:
    """The image with the pattern in it; only where `region` is true, all else stays byte for byte.

    Images that differ a little are marked nearly alike. Shapes: uint8 [H, W, 3], bool [H, W] -> uint8 [H, W, 3].
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    if region is not None and region.shape != pixels.shape[:2]:
        raise ValueError(f"region must be {list(pixels.shape[:2])} like the image, got {list(region.shape)}")
    grey = brightness(pixels)
    texture = np.sqrt(np.maximum(_blurred((grey - _blurred(grey, 3.0)) ** 2, 3.0), 0.0))
    added = STRENGTH * np.clip(FLAT + PER_LEVEL * texture, FLAT, TEXTURED) * _fitted(*grey.shape)
    marked = np.clip(np.round(pixels + added[..., None]), 0, 255).astype(np.uint8)
    return marked if region is None else np.where(region[..., None], marked, pixels)


def find(pixels: np.ndarray) -> Finding:
    """Look for the pattern in an image of any size. Shapes: uint8 [H, W, 3]."""
    height, width = pixels.shape[:2]
    if (height, width) != (SIDE, SIDE):
        scale = SIDE / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    nothing = Finding(0.0, 1.0, SIDE, False)
    if min(height, width) < LEAST_SIDE:
        return nothing
    seen = fft.rfft2(_whitened(brightness(pixels).astype(np.float32)), s=(GRID, GRID))
    best = nothing
    for view in _views():
        matches = fft.irfft2(seen * view.spectrum, s=(GRID, GRID))
        # Deviation where nothing is to be found: that of all places, among which most see a part of the pattern only
        spread = math.sqrt(float(np.square(matches).mean())) * GRID / view.side
        if spread < 1e-9:
            return nothing  # an image without any texture
        down, across = (-np.arange(-SLACK, max(view.side - n, 0) + SLACK + 1) % GRID for n in (height, width))
        score = float(matches[np.ix_(down, across)].max()) / spread
        if score > best.score:
            best = Finding(score, p_value(score), view.width, view.mirrored)
    return best


def p_value(score: float) -> float:
    """How probable such a score is for an image without the mark.

    The best of many correlated Gaussian trials: 1 - (1 - Q(score))^n, with n fitted to real photographs.
    """
    tail = 0.5 * math.erfc(score / math.sqrt(2.0))
    return -math.expm1(NUM_TRIALS * math.log1p(-tail)) if tail < 1 else 1.0


# ---- the pattern -----------------------------------------------------------------------------------------------------


@cache
def pattern() -> np.ndarray:
    """Band-limited noise of mean 0 and deviation 1, the same on every machine. Shapes: float64 [SIDE, SIDE]."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(KEY).digest(SIDE * SIDE // 8), np.uint8))
    noise = fft.rfft2(bits.reshape(SIDE, SIDE) * 2.0 - 1.0)
    radius = np.hypot(fft.fftfreq(SIDE)[:, None], fft.rfftfreq(SIDE)[None])
    found = fft.irfft2(noise * _band(radius), s=(SIDE, SIDE))
    return found / found.std()


def _band(radius: np.ndarray) -> np.ndarray:
    """1 within the band, 0 outside, soft at both ends. `radius` in cycles a pixel."""
    return 1.0 / (1.0 + np.exp((LOW - radius) / 0.006)) / (1.0 + np.exp((radius - HIGH) / 0.01))


@cache
def _fitted(height: int, width: int) -> np.ndarray:
    """The pattern at another size."""
    if (height, width) == (SIDE, SIDE):
        return pattern()
    resized = Image.fromarray(pattern().astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float64)


@dataclass(frozen=True)
class _View:
    """The pattern as an image would show it that was cut to `width` pixels, resized to SIDE and perhaps flipped."""

    width: int
    mirrored: bool
    side: int
    spectrum: np.ndarray  # complex conjugate, [GRID, GRID // 2 + 1]


@cache
def _views() -> tuple[_View, ...]:
    found = []
    for width in WIDTHS:
        side = round(SIDE * SIDE / width)
        grown = np.asarray(_fitted(side, side), np.float32)
        for mirrored in (False, True):
            shown = grown[:, ::-1] if mirrored else grown
            found.append(_View(width, mirrored, side, np.conj(fft.rfft2(shown, s=(GRID, GRID)))))
    return tuple(found)


# ---- images --------------------------------------------------------------------------------------------------------


def brightness(pixels: np.ndarray) -> np.ndarray:
    """Luma as JPEG has it. Shapes: uint8 [H, W, 3] -> float64 [H, W]."""
    return pixels @ np.array([0.299, 0.587, 0.114])


@cache
def _radius(height: int, width: int) -> np.ndarray:
    """Cycles a pixel of each cosine."""
    return np.hypot(np.arange(height)[:, None] / (2 * height), np.arange(width)[None] / (2 * width)).astype(np.float32)


def _filtered(grey: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """By cosines, which see the image mirrored at its edges: no false lines there."""
    down, across = (_cosines(length).astype(grey.dtype, copy=False) for length in grey.shape)
    return down.T @ (down @ grey @ across.T * gain) @ across


@cache
def _cosines(length: int) -> np.ndarray:
    """The cosine transform (DCT-II, orthonormal) as a matrix; for so few pixels as fast as scipy's, and no import."""
    angles = np.pi / length * np.arange(length)[:, None] * (np.arange(length)[None] + 0.5)
    return np.cos(angles) * np.where(np.arange(length) == 0, 1.0, math.sqrt(2.0))[:, None] / math.sqrt(length)


def _blurred(grey: np.ndarray, deviation: float) -> np.ndarray:
    return _filtered(grey, np.exp(-2.0 * (math.pi * deviation * _radius(*grey.shape)) ** 2))


def _whitened(grey: np.ndarray) -> np.ndarray:
    """The band alone, its high frequencies as strong as its low ones, hair as strong as skin. Shapes: [H, W]."""
    radius = _radius(*grey.shape)
    detail = _filtered(grey, _band(radius) * (10.0 * radius) ** 2.2)  # photographs fall about so steeply
    local = np.sqrt(np.maximum(_blurred(detail**2, 2.5), 0.0)) + 0.5
    return np.clip(detail / local, -CUT, CUT)
