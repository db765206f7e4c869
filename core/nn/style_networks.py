"""How does a style, one vector for all of a picture, make a picture in one pass? Generator and discriminator.

A mapping network turns noise and a condition into w; every convolution is modulated by a style that w gives it. What is
generated are latents of 16 x 16 places or pixels, grown from 4 x 4: each size adds its part to what the smaller ones
say (skip outputs). The generator computes what that of https://github.com/NVlabs/stylegan2-ada-pytorch computes, with
its weights under names of ours (`core.nn.official_weights`). It does not know texts, losses or files.

Sources: StyleGAN2 https://arxiv.org/abs/1912.04958, truncation and mixing https://arxiv.org/abs/1812.04948, projection
https://arxiv.org/abs/1802.05637, equalized learning rate https://arxiv.org/abs/1710.10196.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.nn.checkpoint import build, load_component

SLOPE, GAIN = 0.2, math.sqrt(2.0)  # of leaky ReLU, and what keeps the variance after it


@dataclass(frozen=True)
class StyleConfig:
    """Sizes: ``channels`` are the widths at 4x4, 8x8, ...; ``condition`` counts the numbers of a condition (0: none);
    ``clamp`` bounds activations of networks that were trained in fp16; ``w_decay`` is how slowly the mean w follows."""

    output_channels: int
    channels: tuple[int, ...]
    z_dim: int = 128
    w_dim: int = 256
    condition: int = 0
    mapping_layers: int = 4
    clamp: float | None = None
    w_decay: float = 0.998

    @property
    def size(self) -> int:
        """Places along a side of what is generated."""
        return 4 << (len(self.channels) - 1)

    @property
    def num_layers(self) -> int:
        """How many vectors w a picture has: one a convolution, and one for the last output."""
        return 2 * len(self.channels)

    def noise_sizes(self) -> list[int]:
        """The side of the noise of each convolution: 4, 8, 8, 16, 16, ..."""
        return [4, *(4 << level for level in range(1, len(self.channels)) for _ in range(2))]


# -------------------------------------------------------------------------------------------------------------- layers


def second_moment_normalized(x: Tensor) -> Tensor:
    """x / sqrt(mean x^2): [B, D] -> rows whose squares have mean 1 (https://arxiv.org/abs/1710.10196, section 4.2)."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def activated(x: Tensor, clamp: float | None = None) -> Tensor:
    """Leaky ReLU times sqrt(2), within +-``clamp``."""
    x = F.leaky_relu(x, SLOPE) * GAIN
    return x if clamp is None else x.clamp(-clamp, clamp)


def blur(x: Tensor, padding: Sequence[int], gain: float = 1.0) -> Tensor:
    """The binomial filter [1, 3, 3, 1] / 8 along both axes, times ``gain``: [B, C, H, W] -> [B, C, H + p - 3, ...],
    with p = the padding (left, right, top, bottom) of an axis."""
    row = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
    kernel = (gain * row[:, None] * row).expand(x.shape[1], 1, 4, 4).contiguous()
    return F.conv2d(F.pad(x, list(padding)), kernel, groups=x.shape[1])


def upsampled(x: Tensor) -> Tensor:
    """Twice the size: zeros between the places, then the binomial filter. [B, C, H, W] -> [B, C, 2H, 2W]."""
    batch, channels, height, width = x.shape
    spread = F.pad(x.reshape(batch, channels, height, 1, width, 1), (0, 1, 0, 0, 0, 1))
    return blur(spread.reshape(batch, channels, 2 * height, 2 * width), (2, 1, 2, 1), gain=4.0)


def demodulated(weight: Tensor, style: Tensor) -> Tensor:
    """What each output channel is divided by, inverted: 1 / sqrt(sum (s_i w_oi)^2 + 1e-8)
    (https://arxiv.org/abs/1912.04958, eq. 3). Shapes: weight [o, i, k, k], style [B, i] -> [B, o]."""
    return (style.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()


def modulated_conv(x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, up: bool = False) -> Tensor:
    """Convolution whose weights are scaled by s_i for each input channel and divided by their length for each output
    channel (https://arxiv.org/abs/1912.04958, eq. 1 to 3).

    Scaling input and output instead of the weights is the same, and lets a batch share one convolution. ``up`` doubles
    the size. Shapes: x [B, i, H, W], weight [o, i, k, k], style [B, i] -> [B, o, H, W] or [B, o, 2H, 2W].
    """
    x = x * style[:, :, None, None]
    if up:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [B, o, 2H + 1, 2W + 1]
        x = blur(x, (1, 1, 1, 1), gain=4.0)
    else:
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    return x * demodulated(weight, style)[:, :, None, None] if demodulate else x


class EqualLinear(nn.Module):
    """A linear layer whose stored weights are ~ N(0, 1) and scaled when used, so that all layers learn equally fast
    (https://arxiv.org/abs/1710.10196, section 4.1); ``rate`` slows one down. [B, a] -> [B, b]."""

    def __init__(self, a: int, b: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a) / rate)
        self.bias = nn.Parameter(torch.full((b,), bias))
        self.gain, self.rate = rate / math.sqrt(a), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias * self.rate)


class EqualConv(nn.Module):
    """The same for a convolution; ``down`` filters and takes every second place. [B, a, H, W] -> [B, b, H, W]."""

    def __init__(self, a: int, b: int, kernel: int, *, bias: bool = True, down: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(b)) if bias else None
        self.gain, self.down = 1.0 / math.sqrt(a * kernel * kernel), down

    def forward(self, x: Tensor) -> Tensor:
        kernel, weight = self.weight.shape[2], self.weight * self.gain
        if not self.down:
            return F.conv2d(x, weight, self.bias, padding=kernel // 2)
        low = (3 + kernel - 1) // 2  # of 2 + kernel - 1 places that filter and kernel take away beside the halving
        x = blur(x, (low, 1 + kernel - low, low, 1 + kernel - low))
        return F.conv2d(x, weight, self.bias, stride=2)


# ----------------------------------------------------------------------------------------------------------- generator


class Mapping(nn.Module):
    """z [B, z_dim] and a condition [B, condition] -> w [B, w_dim]; both are normalised first, the layers learn at a
    hundredth of the rate (https://arxiv.org/abs/1812.04948, section 2 and appendix C)."""

    w_mean: Tensor

    def __init__(self, config: StyleConfig) -> None:
        super().__init__()
        self.embed = EqualLinear(config.condition, config.w_dim) if config.condition else None
        widths = [config.z_dim + (config.w_dim if config.condition else 0)] + [config.w_dim] * config.mapping_layers
        self.layers = nn.ModuleList(EqualLinear(a, b, rate=0.01) for a, b in zip(widths, widths[1:], strict=False))
        self.register_buffer("w_mean", torch.zeros(config.w_dim))

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        x = second_moment_normalized(z)
        if self.embed is not None:
            if condition is None:
                raise ValueError("this generator is conditional; pass a condition [B, n]")
            x = torch.cat([x, second_moment_normalized(self.embed(condition))], 1)
        for layer in self.layers:
            x = activated(layer(x))
        return x


class StyledConv(nn.Module):
    """Modulated convolution, noise with a learned strength, bias, leaky ReLU (https://arxiv.org/abs/1912.04958,
    figure 2 (c)). [B, a, H, W], w [B, w_dim], noise [B or 1, 1, S, S] -> [B, b, S, S]."""

    noise: Tensor

    def __init__(self, a: int, b: int, size: int, config: StyleConfig, *, up: bool = False) -> None:
        super().__init__()
        self.affine = EqualLinear(config.w_dim, a, bias=1.0)
        self.weight = nn.Parameter(torch.randn(b, a, 3, 3))
        self.bias, self.noise_strength = nn.Parameter(torch.zeros(b)), nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(size, size))
        self.up, self.clamp = up, config.clamp

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        x = modulated_conv(x, self.weight, self.affine(w), up=self.up)
        x = x + (self.noise if noise is None else noise) * self.noise_strength
        return activated(x + self.bias[:, None, None], self.clamp)


class Output(nn.Module):
    """A modulated 1x1 convolution, not demodulated: what one size says of the picture. [B, a, ...] -> [B, o, ...]"""

    def __init__(self, a: int, config: StyleConfig) -> None:
        super().__init__()
        self.affine = EqualLinear(config.w_dim, a, bias=1.0)
        self.weight = nn.Parameter(torch.randn(config.output_channels, a, 1, 1))
        self.bias = nn.Parameter(torch.zeros(config.output_channels))
        self.gain, self.clamp = 1.0 / math.sqrt(a), config.clamp

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) * self.gain
        x = modulated_conv(x, self.weight, style, demodulate=False) + self.bias[:, None, None]
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class Synthesis(nn.Module):
    """ws [B, layers, w_dim] -> picture [B, output_channels, S, S]. ``noise`` has one tensor a convolution; None takes
    the constant noise that belongs to the network, so that equal ws give equal pictures."""

    def __init__(self, config: StyleConfig) -> None:
        super().__init__()
        widths = config.channels
        self.const = nn.Parameter(torch.randn(widths[0], 4, 4))
        self.convs = nn.ModuleList([StyledConv(widths[0], widths[0], 4, config)])
        for level, (a, b) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            self.convs += [StyledConv(a, b, 4 << level, config, up=True), StyledConv(b, b, 4 << level, config)]
        self.outputs = nn.ModuleList(Output(width, config) for width in widths)

    def forward(self, ws: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        given = [None] * len(self.convs) if noise is None else noise
        x = self.const.expand(len(ws), -1, -1, -1)  # [B, c0, 4, 4]
        x = self.convs[0](x, ws[:, 0], given[0])
        picture = self.outputs[0](x, ws[:, 1])
        for level in range(1, len(self.outputs)):
            first = 2 * level - 1
            for layer in (first, first + 1):
                x = self.convs[layer](x, ws[:, layer], given[layer])  # [B, c, 4 << level, ...]
            picture = upsampled(picture) + self.outputs[level](x, ws[:, first + 2])
        return picture


class StyleGenerator(nn.Module):
    """Mapping and synthesis."""

    def __init__(self, config: StyleConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping, self.synthesis = Mapping(config), Synthesis(config)

    def forward(self, z: Tensor, condition: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return self.synthesis(self.broadcast(self.mapping(z, condition)), noise)

    def broadcast(self, w: Tensor) -> Tensor:
        """The same w for every layer: [B, w_dim] -> [B, layers, w_dim]."""
        return w[:, None].expand(-1, self.config.num_layers, -1)

    def centre(self, condition: Tensor | None, num: int = 64) -> Tensor:
        """The mean w: of the run, or, of a conditional generator, of ``num`` fixed z with each condition [B, n], since
        the mean of all has no prompt left. Returns [B or 1, w_dim]."""
        if condition is None:
            return self.mapping.w_mean[None]
        z = torch.randn(num, self.config.z_dim, generator=torch.Generator().manual_seed(0)).to(condition.device)
        rows = condition.repeat_interleave(num, 0)
        return self.mapping(z.repeat(len(condition), 1), rows).unflatten(0, (-1, num)).mean(1)

    def noise(self, seeds: Sequence[int]) -> list[Tensor]:
        """Noise for every convolution, a row a seed: each [B, 1, S, S], on the CPU."""
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [torch.stack([torch.randn(1, size, size, generator=source) for source in sources])
                for size in self.config.noise_sizes()]


def truncated(w: Tensor, centre: Tensor, psi: float) -> Tensor:
    """centre + psi (w - centre): closer to the mean, better and more alike (https://arxiv.org/abs/1812.04948,
    appendix B). Shapes: w, centre [..., w_dim]."""
    return centre + psi * (w - centre)


def mixed(ws: Tensor, others: Tensor, first: int | Tensor) -> Tensor:
    """Styles of ``ws`` in the layers below ``first`` and of ``others`` from there on: coarse traits of one face, fine
    ones of another (https://arxiv.org/abs/1812.04948, section 3.1). Shapes: [B, layers, w_dim], first [] or [B]."""
    layers = torch.arange(ws.shape[1], device=ws.device)
    after = layers >= (first[:, None] if isinstance(first, Tensor) else first)
    return torch.where(after[..., None], others, ws)


def interpolated(w: Tensor, other: Tensor, num: int) -> Tensor:
    """``num`` >= 2 points on the straight line from one w to another, ends included: [...] -> [num, ...]."""
    if num < 2:
        raise ValueError(f"num is {num}; an interpolation has at least its 2 ends")
    return torch.stack([torch.lerp(w, other, i / (num - 1)) for i in range(num)])


# ------------------------------------------------------------------------------------------------------- discriminator


class ResidualDown(nn.Module):
    """(filtered 1x1 + two 3x3 convolutions) / sqrt(2), at half the size (https://arxiv.org/abs/1912.04958, figure 7).
    [B, a, H, W] -> [B, b, H/2, W/2]."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = EqualConv(a, a, 3), EqualConv(a, b, 3, down=True)
        self.skip = EqualConv(a, b, 1, bias=False, down=True)

    def forward(self, x: Tensor) -> Tensor:
        return (activated(self.conv2(activated(self.conv1(x)))) + self.skip(x)) / GAIN


class StyleDiscriminator(nn.Module):
    """Pictures -> features [B, F]; features and conditions -> logits [B]: how real, plus how well the condition fits,
    <features, V c> (https://arxiv.org/abs/1802.05637, eq. 4). No statistic of a batch: R2 keeps modes apart."""

    def __init__(self, config: StyleConfig) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.conv_in = EqualConv(config.output_channels, widths[0], 1)
        self.blocks = nn.ModuleList(ResidualDown(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.conv_out = EqualConv(widths[-1], widths[-1], 3)
        self.fc = EqualLinear(widths[-1] * 16, widths[-1])
        self.real = EqualLinear(widths[-1], 1)
        self.embed = EqualLinear(config.condition, widths[-1]) if config.condition else None

    def features(self, x: Tensor) -> Tensor:
        """Pictures [B, output_channels, S, S] -> [B, F]."""
        x = activated(self.conv_in(x))
        for block in self.blocks:
            x = block(x)
        return activated(self.fc(activated(self.conv_out(x)).flatten(1)))

    def logits(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        """Features [B, F] and conditions [B, n] -> [B]."""
        found = self.real(features).flatten()
        if self.embed is None or condition is None:
            return found
        return found + (features * second_moment_normalized(self.embed(condition))).mean(1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.logits(self.features(x), condition)


# --------------------------------------------------------------------------------------------------------------- files


def write_config(config: StyleConfig) -> dict[str, Any]:
    """As it stands in a ``config.json``."""
    return {**asdict(config), "channels": list(config.channels)}


def read_config(found: dict[str, Any]) -> StyleConfig:
    """From a ``config.json``."""
    return StyleConfig(**{**found, "channels": tuple(found["channels"])})


def load_style_generator(folder: str | Path, component: str = "stylegan", device: torch.device | str = "cpu"
                         ) -> tuple[StyleGenerator, dict[str, Any]]:
    """The trained generator of a model folder, frozen, and its config.json."""
    config, state = load_component(folder, component)
    found = build(lambda: StyleGenerator(read_config(config["network"])), state, "the style generator")
    found = found.eval().requires_grad_(False)
    return found.to(device), config
