"""What is one image that came out: its pixels, its file, its latent and what is known of it?

It keeps the contract `core.engine.GeneratedImage`. It does not know what generated it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class GeneratedImage:
    """One image, preview or result: uint8 pixels [H, W, 3], the same as PNG, its normalized latent as float32 bytes.

    The pixels of a result carry the invisible watermark unless the request says no; the latent is that of the image
    before it was marked. `assessment` is what else is known of a result: what the attribute classifier predicts for it,
    how often the network was asked for it.
    """

    index: int
    seed: int
    pixels: np.ndarray
    png: bytes
    latent: bytes
    assessment: Mapping[str, Any] = field(default_factory=dict)


def latent_bytes(z: Tensor) -> bytes:
    """A latent [C, h, w] as little-endian float32 in C order."""
    return z.detach().cpu().contiguous().numpy().astype("<f4").tobytes()
