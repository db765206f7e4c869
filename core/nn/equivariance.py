"""Do latents move when the image moves, and how is an autoencoder taught that they do?

A small denoiser has to learn what an eye looks like once for every place inside a latent cell, unless the latent of a
shifted image is the shifted latent. Here are the two moves that images and latents make together (shifts of less
than a cell, scales from a half to one), the penalty on the difference, the noise that a decoder learns to bear, a start
from the principal components of another encoder, and the measurements by which latents are accepted. It does not know
the networks.

Sources: EQ-VAE https://arxiv.org/abs/2502.09509 (equivariance as a regulariser), scale equivariance and the spectrum of
latents https://arxiv.org/abs/2502.14831, a decoder that bears noise on its latents https://arxiv.org/abs/2507.15856.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 8  # pixels along a side of what one latent place stands for


@dataclass(frozen=True)
class LatentRegularization:
    """How strongly latents are regularised.

    noise: each image's latents get Gaussian noise of a standard deviation drawn from U(0, noise), in units of the
    latents' own. equivariance: weight of the explicit term. moved_share: of the steps in which the decoder is given
    shifted and scaled latents. crop: side of the random crops in most other steps, in pixels (cheaper, and every phase
    of the grid of cells occurs).
    """

    noise: float = 0.25
    equivariance: float = 0.25
    moved_share: float = 0.5
    crop: int = 104
    crop_share: float = 0.7


def normalize_batch(z: Tensor) -> Tensor:
    """Zero mean and unit variance per channel over the batch, so that no latent escapes the noise by growing.

    Shapes: [B, C, h, w] -> the same.
    """
    return (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True).clamp_min(1e-4)


def drift_penalty(z: Tensor) -> Tensor:
    """Squared mean plus squared logarithm of the standard deviation, mean over channels: 0 for normalised latents."""
    return (z.mean((0, 2, 3)).square() + z.std((0, 2, 3)).clamp_min(1e-4).log().square()).mean()


def add_noise(z: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Latents [B, C, h, w] plus Gaussian noise, its standard deviation U(0, noise) for each image."""
    sigma = torch.rand(len(z), 1, 1, 1, generator=generator) * noise
    return z + (sigma * torch.randn(z.shape, generator=generator)).to(z.device, z.dtype)


def random_crops(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A crop of each image at a place of its own: [B, 3, H, W] -> [B, 3, side, side]. ``side`` at most H and W."""
    tops = torch.randint(images.shape[2] - side + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(images.shape[3] - side + 1, (len(images),), generator=generator).tolist()
    return torch.stack([one[:, y : y + side, x : x + side] for one, y, x in zip(images, tops, lefts, strict=True)])


def shift_images(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """What stands ``down`` and ``right`` pixels (integers [B] in [0, 8)) further in, one cell smaller along each side.

    Shapes: [B, 3, H, W] -> [B, 3, H - 8, W - 8].
    """
    height, width = images.shape[2] - CELL, images.shape[3] - CELL
    return torch.stack([one[:, y : y + height, x : x + width]
                        for one, y, x in zip(images, down.tolist(), right.tolist(), strict=True)])


def shift_latents(z: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The same move of latents, by linear interpolation between places: [B, C, h, w] -> [B, C, h - 1, w - 1]."""
    y, x = (one.to(z.device, z.dtype).view(-1, 1, 1, 1) / CELL for one in (down, right))
    z = (1 - y) * z[:, :, :-1] + y * z[:, :, 1:]
    return (1 - x) * z[..., :-1] + x * z[..., 1:]


def scale_images(images: Tensor, places: int) -> Tensor:
    """Images [B, 3, H, H] -> [B, 3, 8 places, 8 places], without aliasing."""
    return F.interpolate(images, size=(CELL * places, CELL * places), mode="bilinear", antialias=True,
                         align_corners=False)


def scale_latents(z: Tensor, places: int) -> Tensor:
    """Latents [B, C, h, h] -> [B, C, places, places], without aliasing."""
    return F.interpolate(z, size=(places, places), mode="bilinear", antialias=True, align_corners=False)


def move_both(images: Tensor, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and their latents after the same random move: a shift of 0-7 pixels each way, then a scale of 1/2 to 1.

    Shapes: [B, 3, 8 h, 8 h] and [B, C, h, h] -> [B, 3, 8 k, 8 k] and [B, C, k, k] with h / 2 <= k <= h - 1; k is the
    same for all, h - 1 (no scaling) in a quarter of the calls and more.
    """
    down, right = torch.randint(CELL, (2, len(images)), generator=generator)
    images, z = shift_images(images, down, right), shift_latents(z, down, right)
    largest = z.shape[-1]
    places = int(torch.randint((largest + 1) // 2, largest + 1, (1,), generator=generator))
    if float(torch.rand(1, generator=generator)) >= 0.25 and places < largest:
        images, z = scale_images(images, places), scale_latents(z, places)
    return (images.contiguous(memory_format=torch.channels_last), z.contiguous(memory_format=torch.channels_last))


def equivariance_error(encoded: Tensor, moved: Tensor) -> Tensor:
    """Mean |E(tau x) - tau E(x)|^2 without the outermost places, whose surroundings differ. Shapes: [B, C, h, w]."""
    return (encoded - moved)[..., 1:-1, 1:-1].square().mean()


def regularized_step(encode: Callable[[Tensor], Tensor], images: Tensor, how: LatentRegularization,
                     generator: torch.Generator, frozen: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What one step of a deterministic VAE decodes: target images, noised latents, and terms that shape the latents.

    Half of the steps decode latents that were moved (shifted by less than a cell, scaled) and want the moved images
    (https://arxiv.org/abs/2502.09509), with |E(moved image) - moved E(image)|^2 as the term "equivariance". ``frozen``:
    the encoder does not learn, so its latents are taken as they are and have no terms. ``encode`` gives the raw means.
    Shapes: images [B, 3, H, W] -> [B, 3, h, w] with h, w <= H, W.
    """
    terms: dict[str, Tensor] = {}
    moved = float(torch.rand(1, generator=generator)) < how.moved_share
    crop = float(torch.rand(1, generator=generator)) < how.crop_share and how.crop < images.shape[2]
    if not moved and crop:
        images = random_crops(images, how.crop, generator).contiguous(memory_format=torch.channels_last)
    raw = encode(images)
    z = raw if frozen else normalize_batch(raw)
    if not frozen:
        terms["drift"] = drift_penalty(raw)
    if moved:
        images, z = move_both(images, z, generator)
        if not frozen and how.equivariance > 0:
            again = encode(images)
            mean, std = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
            terms["equivariance"] = equivariance_error((again - mean) / std.clamp_min(1e-4), z)
    return images, add_noise(z, how.noise, generator).contiguous(memory_format=torch.channels_last), terms


# --------------------------------------------------------------------------------------------------------- PCA start


def principal_components(z: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(projection [count, C], its inverse [C, count], mean [C]) of latents [N, C, h, w]: normalised first components.

    ``projection @ (z - mean)`` has zero mean and unit covariance per place; ``inverse`` is the best linear way back.
    Raises ValueError when there are fewer channels than ``count``.
    """
    if not 1 <= count <= z.shape[1]:
        raise ValueError(f"the latents have {z.shape[1]} channels, so 1 to {z.shape[1]} components, got {count}")
    values = z.permute(1, 0, 2, 3).flatten(1).double()
    mean = values.mean(1)
    variances, axes = torch.linalg.eigh(torch.cov(values))
    deviation, axes = variances.flip(0)[:count].clamp_min(1e-12).sqrt(), axes.flip(1)[:, :count]
    return (axes / deviation).T.float(), (axes * deviation).float(), mean.float()


# ------------------------------------------------------------------------------------------------------ measurements


@torch.inference_mode()
def measure_equivariance(encode: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 32) -> dict[str, float]:
    """How far latents are from moving with their images; relative errors, 0 is best.

    ``encode`` maps images [B, 3, H, W] to normalised latents [B, C, H/8, W/8]. shift_2px: a shift by two pixels against
    linear interpolation of the latents, in units of their norm; half_scale: the latents of the half image against the
    mean of 2x2 latents; above_half_nyquist: share of the latents' energy (of their deviation from the mean latent) at
    spatial frequencies above half of the highest.
    """
    def all_of(pictures: Tensor) -> Tensor:
        return torch.cat([encode(part) for part in pictures.split(batch_size)])

    z = all_of(images)
    inner = z[..., 2:-2].norm()
    shifted, interpolated = all_of(torch.roll(images, 2, -1)), 0.75 * z + 0.25 * torch.roll(z, 1, -1)
    half = all_of(scale_images(images, z.shape[-1] // 2))
    spectrum = torch.fft.rfft2(z - z.mean(0), norm="ortho").abs().square().mean((0, 1))
    rows = torch.fft.fftfreq(z.shape[2]).abs()[:, None] * 2
    columns = torch.fft.rfftfreq(z.shape[3]).abs()[None] * 2
    weight = torch.full_like(spectrum, 2.0)  # a real transform stores one of each mirrored pair of columns
    weight[:, [0, -1]] = 1.0
    energy = spectrum * weight
    return {
        "shift_2px": float((shifted - interpolated)[..., 2:-2].norm() / inner),
        "half_scale": float((half - F.avg_pool2d(z, 2)).norm() / half.norm()),
        "above_half_nyquist": float(energy[torch.maximum(rows, columns).expand_as(energy) > 0.51].sum() / energy.sum()),
    }
