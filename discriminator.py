"""Which image is real? The adversary of the VAE's decoder, its losses, and the weight that balances it.

A spectrally normalised PatchGAN: it judges overlapping patches, never the whole face, so that it teaches texture and
leaves identity to the reconstruction loss. It sees images as Haar bands: what a decoder leaves out is fine detail, a
few per cent of the pixel values, which a network of this size hardly finds in raw pixels. It does not know how the VAE
works or where images come from.

Sources: PatchGAN https://arxiv.org/abs/1611.07004, wavelet bands https://arxiv.org/abs/2102.06108, spectral
normalisation https://arxiv.org/abs/1802.05957, hinge loss https://arxiv.org/abs/1705.02894, feature matching
https://arxiv.org/abs/1711.11585 (eq. 4), adaptive weight https://arxiv.org/abs/2012.09841 (eq. 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Widths of the strided stages after the Haar bands."""

    channels: tuple[int, ...] = (48, 96, 160)


PRESETS = {
    "celeba128": DiscriminatorConfig(),
    "tiny": DiscriminatorConfig(channels=(8, 16)),
}


def haar_bands(images: Tensor, detail_gain: float = 2.0) -> Tensor:
    """Mean and horizontal, vertical, diagonal difference of every 2x2 block; differences times ``detail_gain``.

    Shapes: images [B, 3, H, W] -> [B, 12, H/2, W/2]; the means come first.
    """
    a, b, c, d = F.pixel_unshuffle(images, 2).unflatten(1, (-1, 4)).unbind(2)  # the block's corners, row by row
    details = (a - b + c - d, a + b - c - d, a - b - c + d)
    return torch.cat([(a + b + c + d) / 4, *(band * detail_gain for band in details)], dim=1)


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> (patch logits [B, 1, h, w], features of every stage)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = (12, *config.channels)
        self.stages = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.conv_out = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Shapes: logits [B, 1, H/2^(n+1), W/2^(n+1)] for n stages."""
        x = haar_bands(images)  # [B, 12, H/2, W/2]
        features = []
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2)
            features.append(x)
        return self.conv_out(x), features


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)), halved."""
    return 0.5 * (F.relu(1.0 - logits_real.float()).mean() + F.relu(1.0 + logits_fake.float()).mean())


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Hinge loss of the generator: -mean D(fake)."""
    return -logits_fake.float().mean()


def feature_matching_loss(features_real: Sequence[Tensor], features_fake: Sequence[Tensor]) -> Tensor:
    """Mean L1 distance between the discriminator's features of real and reconstructed images, mean over stages."""
    terms = [F.l1_loss(fake.float(), real.detach().float())
             for real, fake in zip(features_real, features_fake, strict=True)]
    return torch.stack(terms).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 10.0) -> Tensor:
    """|grad reconstruction| / |grad adversarial| at the decoder's last layer, in [0, limit], without gradient.

    Keeps the adversary as loud as the reconstruction whatever their raw scales are.
    """
    (grad_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (grad_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (grad_rec.norm() / (grad_adv.norm() + 1e-6)).clamp(0.0, limit).detach()
