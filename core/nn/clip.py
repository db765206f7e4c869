"""What does a sentence mean in images? The text encoder, and the image tower that it learns with.

A small CLIP: a transformer over sub-words and a convolutional tower over pixels, whose outputs are compared. The text
side conditions the UNet; the feature maps of the image side serve the VAE as a perceptual loss. Here are the networks
and how they are read from a model folder; it does not know how they are trained (train_clip.py).

Source: CLIP https://arxiv.org/abs/2103.00020.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.nn.checkpoint import build, load_component
from core.nn.layers import PixelNorm, ResBlock
from core.nn.tokenizer import Tokenizer


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; ``pieces`` is set from the trained tokenizer."""

    pieces: int = 4096
    max_length: int = 80
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 4
    image_channels: tuple[int, int, int] = (64, 128, 256)  # at H/4, H/8, H/16
    image_blocks: tuple[int, int, int] = (1, 1, 2)
    embed_dim: int = 192


@dataclass
class TextEmbedding:
    """tokens [B, L, E], mask [B, L] (True = real token), pooled [B, E]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class TextBlock(nn.Module):
    """Pre-norm self-attention over real tokens, then a feed-forward of four times the width. [B, L, E] -> same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, L, D]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.ff(self.norm2(x))


class TextEncoder(nn.Module):
    """Token ids [B, L] and mask [B, L] -> TextEmbedding; the start token's output is the pooled embedding."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.pieces, config.text_width)
        self.positions = nn.Parameter(torch.randn(config.max_length, config.text_width) * 0.02)
        self.blocks = nn.ModuleList(TextBlock(config.text_width, config.text_heads) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(config.text_width)
        nn.init.normal_(self.tokens.weight, std=0.05)

    def forward(self, ids: Tensor, mask: Tensor) -> TextEmbedding:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x).float()
        return TextEmbedding(x, mask, x[:, 0])


class ImageTower(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> embedding [B, embed_dim] (not normalised)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        widths = config.image_channels
        self.conv_in = nn.Conv2d(48, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
            for width, blocks in zip(widths, config.image_blocks, strict=True)
        )
        self.downsample = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.norm = PixelNorm(widths[-1])
        self.projection = nn.Linear(widths[-1], config.embed_dim)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps at H/4, H/8 and H/16, each [B, C, h, w]; the VAE's perceptual loss compares these."""
        x = self.conv_in(F.pixel_unshuffle(images, 4))
        maps = [self.stages[0](x)]
        for down, stage in zip(self.downsample, list(self.stages)[1:], strict=True):
            maps.append(stage(down(F.pixel_unshuffle(maps[-1], 2))))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(F.silu(self.norm(self.features(images)[-1])).mean((2, 3)))


class CLIP(nn.Module):
    """Both towers and the learned temperature."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextEncoder(config)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.image = ImageTower(config)
        self.log_temperature = nn.Parameter(torch.tensor(2.3))  # similarity is multiplied by exp of this

    def encode_text(self, ids: Tensor, mask: Tensor) -> TextEmbedding:
        """Ids and mask [B, L] -> token and pooled embeddings for conditioning."""
        return self.text(ids, mask)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask [B, L] -> unit vectors [B, embed_dim] in the space shared with images."""
        return F.normalize(self.text_projection(self.text(ids, mask).pooled).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> unit vectors [B, embed_dim]."""
        return F.normalize(self.image(images).float(), dim=-1)


def load_clip(folder: str | Path, device: torch.device | str = "cpu") -> tuple[CLIP, Tokenizer]:
    """The trained CLIP and its tokenizer of a model folder, ready for inference (no gradients)."""
    config, state = load_component(folder, "clip")
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                              for key, value in config["network"].items()}
    model = build(lambda: CLIP(CLIPConfig(**fields)), state, "CLIP")
    tokenizer = Tokenizer.load(Path(folder) / "clip" / "tokenizer.json", model.config.max_length)
    model = model.eval().requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last), tokenizer  # type: ignore[call-overload]
