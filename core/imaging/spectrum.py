"""How is the energy of images spread over spatial frequencies?

The radially averaged power spectrum, and the share of it in fine detail. Pixels are uint8 [N, H, W, 3]. It does not
know which images are compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Pictures = NDArray[np.uint8]


def radial_power(pictures: Pictures, bins: int = 64, batch: int = 256) -> tuple[Array, Array]:
    """Mean spectral power of the luminance by spatial frequency.

    A Hann window keeps the borders of the image from looking like fine detail.
    Shapes: images [N, S, S, 3] -> (frequency as a share of Nyquist [bins], power [bins], sums to 1).
    """
    size = pictures.shape[1]
    window = np.outer(np.hanning(size), np.hanning(size))
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]) / 0.5
    # rfft holds one of each conjugate pair: all columns but the first and the Nyquist one count twice.
    weight = np.full(radius.shape, 2.0)
    weight[:, 0] = weight[:, -1] = 1.0
    band = np.minimum((radius * bins).astype(int), bins - 1)
    total = np.zeros(bins)
    for start in range(0, len(pictures), batch):
        grey = pictures[start : start + batch].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        grey = (grey - grey.mean((1, 2), keepdims=True)) * window
        power = (np.abs(np.fft.rfft2(grey)) ** 2).sum(0) * weight
        total += np.bincount(band.ravel(), power.ravel(), minlength=bins)
    return (np.arange(bins) + 0.5) / bins, total / max(total.sum(), 1e-12)


def fine_detail_share(pictures: Pictures) -> float:
    """Share of the spectral power above half Nyquist (period under 4 pixels), pooled over the images."""
    frequency, power = radial_power(pictures)
    return float(power[frequency > 0.5].sum())
