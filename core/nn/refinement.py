"""What is missing in a decoder's pictures that no filter can give them?

A decoder that ends in sub-pixel convolutions paints the finest detail with one linear layer, and a filter can only make
louder what that layer said: brightness too little, colour too much. `Finish` looks at the picture at full resolution,
where nothing else of the decoder works, and corrects it; new, it changes nothing. It does not know what teaches it.

Residual refinement of a base picture: https://arxiv.org/abs/1609.04802 (SRGAN: detail from an adversary, content from
the pixels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Finish(nn.Module):
    """A picture and the features it was made of -> the picture with finer detail.

    Shapes: features [B, C, H/2, W/2], images [B, 3, H, W] -> [B, 3, H, W]; `width` channels at full resolution.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(channels, 4 * width, 1)
        self.conv1 = nn.Conv2d(width + 3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        x = torch.cat([F.pixel_shuffle(self.up(features), 2), images], dim=1)
        return images + self.head(F.silu(self.conv2(F.silu(self.conv1(x)))))
