"""How are an autoencoder's latents spread, and how are they made to have mean 0 and deviation 1?

Measured on images, per channel or per channel and place (faces are aligned, so that the mean latent of a place is
known before anything is generated), and with the figures by which latents are accepted. It does
not know how the autoencoder is trained.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from core.nn.autoencoder import VAE
from core.nn.equivariance import measure_equivariance
from core.nn.layers import to_images


@torch.inference_mode()
def measure_latents(model: VAE, pixels: Tensor, seed: int = 0, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation, each [C], of posterior samples over uint8 images [N, H, W, 3]."""
    total = square = torch.zeros(model.config.latent_channels, dtype=torch.float64)
    count = 0
    for start in range(0, len(pixels), batch_size):
        generator = torch.Generator().manual_seed(seed + start)
        posterior = model.encode(to_images(pixels[start : start + batch_size]))
        on_cpu = replace(posterior, mean=posterior.mean.cpu(), logvar=posterior.logvar.cpu())
        z = on_cpu.sample(generator).double()
        total = total + z.sum((0, 2, 3))
        square = square + z.square().sum((0, 2, 3))
        count += z.numel() // z.shape[1]
    mean = total / count
    return mean.float(), (square / count - mean.square()).clamp_min(1e-8).sqrt().float()


@torch.inference_mode()
def latent_moments(model: VAE, pixels: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and deviation [C, h, w] of the encoder's means over uint8 images [N, H, W, 3] and their mirror images."""
    total: Tensor = torch.zeros(1)
    square: Tensor = torch.zeros(1)
    for part in pixels.split(batch_size):
        images = to_images(part)
        for view in (images, images.flip(-1)):
            z = model.encode(view.contiguous(memory_format=torch.channels_last)).mean.cpu().double()
            total, square = total + z.sum(0), square + z.square().sum(0)
    mean = total / (2 * len(pixels))
    return mean.float(), (square / (2 * len(pixels)) - mean.square()).clamp_min(1e-8).sqrt().float()


@torch.inference_mode()
def normalized(model: VAE, pixels: Tensor) -> VAE:
    """The same deterministic VAE with mean 0 and deviation 1 per channel over these uint8 images [N, H, W, 3]: measured
    and folded into the encoder's last layer, since the decoder was trained on normalised latents. What then is left of
    mean and deviation in each place, mirrored images counted too, becomes ``statistics``."""
    mean, std = latent_moments(model, pixels)
    centre = mean.mean((1, 2))
    spread = (std.square() + mean.square()).mean((1, 2)).sub(centre.square()).sqrt()
    head = model.encoder.conv_out
    assert head.bias is not None
    head.weight.copy_(head.weight / spread.to(head.weight.device)[:, None, None, None])
    head.bias.copy_((head.bias - centre.to(head.bias.device)) / spread.to(head.bias.device))
    if model.config.statistics_size:
        model.latent_mean.copy_((mean - centre[:, None, None]) / spread[:, None, None])
        model.latent_std.copy_(std / spread[:, None, None])
    return model


@torch.inference_mode()
def latent_quality(model: VAE, pixels: Tensor, seed: int = 0) -> dict[str, float]:
    """The figures by which latents are accepted: `measure_equivariance`, and PSNR (dB) of copies with noise on their
    latents, 0.125 and U(0, 0.25) of their deviation, before the last filter. pixels: uint8 [N, H, W, 3]."""
    images = to_images(pixels).contiguous(memory_format=torch.channels_last)
    mean, std = (one.mean((1, 2), keepdim=True) for one in model.statistics)  # of no place: images of other sizes too

    def encode(part: Tensor) -> Tensor:
        return (model.encode(part).mean - mean) / std

    result = measure_equivariance(encode, images)
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([encode(part) for part in images.split(32)])
    eps = torch.randn(z.shape, generator=generator).to(z.device)
    uniform = (0.25 * torch.rand(len(z), 1, 1, 1, generator=generator)).to(z.device)
    for name, sigma in (("psnr_clean", 0.0), ("psnr_noise_0.125", 0.125), ("psnr_noise_uniform", uniform)):
        noised = (z + sigma * eps) * std + mean
        copies = torch.cat([model.decoder.soft(part).float() for part in noised.split(32)]).clamp(-1, 1)
        result[name] = float(-10 * torch.log10(((copies - images) / 2).square().mean()))
    return result
