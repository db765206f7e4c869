"""Which layers do several networks share, and how do pixels become their numbers and back?

Blocks that start as the identity, a normalisation over channels, an upsampling; images are float [B, 3, H, W] in
[-1, 1], pixels uint8 [B, H, W, 3]. It does not know which network is built of them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, with a learned scale and shift. [B, C, H, W] -> same.

    A trace, which is what compilers read, has it as sums over the channels where they stand: the two permutations, free
    in torch, cost compiled networks an eighth of their time.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            x = x - x.mean(1, keepdim=True)
            x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
            return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])
        x = x.permute(0, 2, 3, 1)  # free for channels-last tensors
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))); the second convolution starts at zero, so a new block is the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class Up(nn.Module):
    """1x1 convolution and pixel shuffle: [B, a, H, W] -> [B, b, 2H, 2W]."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(a, 4 * b, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2).contiguous(memory_format=torch.channels_last)


def to_images(pixels: Tensor | np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], channels-last."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pixels(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] around [-1, 1] -> uint8 [B, H, W, 3]. Clamped before the cast: a cast alone wraps around."""
    levels = (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
