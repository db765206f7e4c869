"""How are many images shown in one?

Sheets of uint8 images for a report. It does not know what the images show.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.imaging.spectrum import Pictures


def image_grid(pictures: Pictures, columns: int) -> Image.Image:
    """Images in rows of ``columns``, without gaps, white where the last row is short. Shapes: uint8 [N, H, W, 3]."""
    from torchvision.utils import make_grid  # here: it takes longer to import than the networks to load

    tiles = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    sheet = make_grid(tiles, nrow=columns, padding=0, pad_value=255)
    return Image.fromarray(np.ascontiguousarray(sheet.permute(1, 2, 0).numpy()))


def save_pairs(left: Pictures, right: Pictures, path: Path, columns: int = 4) -> None:
    """Pairs side by side, ``columns`` pairs a row; for example a generated image and its nearest training image."""
    pairs = np.stack([left, right], axis=1).reshape(-1, *left.shape[1:])
    image_grid(pairs, 2 * columns).save(path)
