"""How does a face become a latent image of 16x16 places, and a latent a face again? The autoencoder.

Space-to-depth at the input means that nothing runs at full resolution with many channels, so the decoder costs under 4
GFLOP and generates four faces in a blink on a laptop CPU. Normalisation is per pixel over channels, so no statistic
leaks across places or depends on the size of the image. Then comes a linear filter, fitted and not trained, that makes
images as sharp as real images (`core.nn.sharpening`). Here are the network and how it is read from a model folder;
it does not know how it is trained (vae.py).

Sources: VAE https://arxiv.org/abs/1312.6114, sub-pixel convolution https://arxiv.org/abs/1609.05158.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.nn.checkpoint import ModelFolderError, build, load_component
from core.nn.layers import PixelNorm, ResBlock, Up
from core.nn.sharpening import Sharpen
from core.nn.weight_keys import first_key

FACTOR = 8  # pixels along a side of what one latent place stands for


@dataclass(frozen=True)
class VAEConfig:
    """Widths and depths; the spatial factor is 4 (space to depth) x 2 = 8."""

    latent_channels: int = 16
    encoder_channels: tuple[int, int] = (64, 160)  # at H/4 and H/8
    encoder_blocks: tuple[int, int] = (1, 2)
    decoder_channels: tuple[int, int, int] = (256, 128, 64)  # at H/8, H/4, H/2
    decoder_blocks: tuple[int, int, int] = (3, 2, 1)
    sharpen_size: int = 0  # of the filter after the decoder; 0: none, as while training
    deterministic: bool = False  # no posterior variance: normalised means, regularised as core.nn.equivariance says
    statistics_size: int = 0  # mean and deviation per channel and place of a grid of this side; 0: per channel


@dataclass
class Posterior:
    """Diagonal Gaussian over latents: mean and log-variance, each [B, C, H/8, W/8], before normalization."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation [B, C, h, w]."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * eps, with eps from ``generator``."""
        eps = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, mean over every latent number (Kingma & Welling, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).mean()


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> posterior parameters [B, 2C, H/8, W/8] ([B, C, ...] without variances)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        first, second = config.encoder_channels
        self.conv_in = nn.Conv2d(3 * 16, first, 3, padding=1)
        self.blocks1 = nn.Sequential(*(ResBlock(first) for _ in range(config.encoder_blocks[0])))
        self.downsample = nn.Conv2d(first * 4, second, 1)
        self.blocks2 = nn.Sequential(*(ResBlock(second) for _ in range(config.encoder_blocks[1])))
        self.norm = PixelNorm(second)
        outputs = config.latent_channels * (1 if config.deterministic else 2)
        self.conv_out = nn.Conv2d(second, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(images, 4))  # [B, c1, H/4, W/4]
        x = self.downsample(F.pixel_unshuffle(self.blocks1(x), 2))  # [B, c2, H/8, W/8]
        return self.conv_out(F.silu(self.norm(self.blocks2(x))))


class Decoder(nn.Module):
    """Latents [B, C, h, w] (not normalized) -> images [B, 3, 8h, 8w], unclamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        a, b, c = config.decoder_channels
        stages: list[nn.Module] = [nn.Conv2d(config.latent_channels, a, 3, padding=1)]
        stages += [ResBlock(a) for _ in range(config.decoder_blocks[0])] + [Up(a, b)]
        stages += [ResBlock(b) for _ in range(config.decoder_blocks[1])] + [Up(b, c)]
        stages += [ResBlock(c) for _ in range(config.decoder_blocks[2])] + [PixelNorm(c), nn.SiLU()]
        self.stages = nn.Sequential(*stages)
        self.conv_out = nn.Conv2d(c, 12, 3, padding=1)
        self.sharpen = Sharpen(config.sharpen_size) if config.sharpen_size else nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        return self.sharpen(self.soft(z))

    def soft(self, z: Tensor) -> Tensor:
        """Before the filter: what the losses look at, which would otherwise teach the layers to undo it."""
        return F.pixel_shuffle(self.conv_out(self.stages(z)), 2)


class VAE(nn.Module):
    """Encoder, decoder and the measured latent statistics that turn raw latents z into normalized ones x and back."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        shape = [config.latent_channels] + [config.statistics_size] * 2 * bool(config.statistics_size)
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_std", torch.ones(shape))

    def encode(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1], H and W multiples of 8 -> posterior [B, C, H/8, W/8]."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % FACTOR or images.shape[3] % FACTOR:
            raise ValueError(f"images must be [B, 3, H, W], sides a multiple of {FACTOR}, got {tuple(images.shape)}")
        encoded = self.encoder(images).float()
        if self.config.deterministic:
            return Posterior(encoded, torch.full_like(encoded, -20.0))
        mean, logvar = encoded.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-20.0, 5.0))

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents [B, C, h, w] -> images [B, 3, 8h, 8w], nominally in [-1, 1], not clamped."""
        return self.decoder(z).float()

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents -> zero mean and unit variance (as measured on the training images) per channel, or per channel
        and place: faces are aligned, so that the mean latent of a place is known before anything is generated."""
        mean, std = self.statistics
        return (z - mean) / std

    def denormalize(self, x: Tensor) -> Tensor:
        """Inverse of ``normalize``."""
        mean, std = self.statistics
        return x * std + mean

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of raw latents, as they broadcast: [C, 1, 1], or [C, h, w] per place."""
        mean, std = self.latent_mean, self.latent_std
        return (mean, std) if mean.ndim == 3 else (mean[:, None, None], std[:, None, None])


def load_vae(folder: str | Path, device: torch.device | str = "cpu") -> VAE:
    """The trained VAE of a model folder, ready for inference (no gradients, channels-last)."""
    config, state = load_component(folder, "vae")
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                              for key, value in config["network"].items()}
    if fields.pop("finish_channels", 0):  # of folders that an earlier version released
        raise ModelFolderError(f"the VAE in {folder} ends in a refinement stage, which this version does not have; "
                               "train its decoder again with `python vae.py --train --decoder-only`")
    model = build(lambda: VAE(VAEConfig(**fields)), state, "the VAE")
    model = model.eval().requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def encoder_hash(model: VAE) -> str:
    """SHA-256 over the fp16 encoder weights and the normalization: what cached latents depend on, and nothing else."""
    digest = hashlib.sha256()
    for name, value in sorted((first_key(key), value) for key, value in model.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(name.encode())
            digest.update(value.detach().cpu().to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
