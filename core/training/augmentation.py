"""How do training images get onto the device, and how does the network see each of them in two ways?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dataset import FaceStore


def load_pixels(store: FaceStore, indices: Any, device: torch.device) -> Tensor:
    """The chosen images as one uint8 tensor [N, 128, 128, 3] on the training device, so that no step reads the disk."""
    return torch.from_numpy(store.images[indices]).to(device)


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip about half of the images [B, 3, H, W] left to right, as ``generator`` (on the CPU) decides."""
    from core.training.accelerator import send

    flip = send(torch.rand(len(images), generator=generator) < 0.5, images.device)
    return torch.where(flip[:, None, None, None], images.flip(-1), images)
