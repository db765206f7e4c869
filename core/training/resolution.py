"""From which noise level on can an enlarged, soft image not be told from a sharp one?

There a soft image teaches a denoiser nothing wrong, and below it nothing else than blur. A small classifier learns to
tell noised latents of the two apart; the timestep from which on it fails on images that it never saw is the first at
which soft images are learned from. It does not know what is trained with the answer.

Source: ambient diffusion with low-quality data at high noise, https://arxiv.org/abs/2506.10038 (section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule

SHARP = 128  # px of the source


@dataclass(frozen=True)
class ResolutionFit:
    """How the classifier is trained and read: steps, images a step, width, learning rate; the area under the curve
    below which soft and sharp count as alike; timesteps a bin; share of images that are kept out of training."""

    steps: int = 1500
    batch_size: int = 256
    width: int = 64
    learning_rate: float = 2e-3
    alike: float = 0.55
    bin_width: int = 50
    held_out: float = 0.15


class ResolutionClassifier(nn.Module):
    """Logit that a noised latent is of a sharp image. x [B, C, h, w], timestep [B] -> [B]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.out = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angle = timestep[:, None] / NUM_TRAIN_TIMESTEPS * torch.pi * 2.0 ** torch.arange(4, device=x.device)
        scale, shift = self.time(torch.cat([angle.sin(), angle.cos()], dim=1)).chunk(2, dim=1)
        h = F.silu(self.conv1(x) * (1 + scale[..., None, None]) + shift[..., None, None])
        h = F.silu(self.conv3(F.silu(self.conv2(h))))
        return self.out(torch.cat([h.mean((2, 3)), h.square().mean((2, 3))], dim=1))[:, 0]


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half: 0.5 is chance."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def fit_threshold(z: Tensor, sharp: Tensor, schedule: NoiseSchedule, how: ResolutionFit = ResolutionFit(),
                  seed: int = 0) -> tuple[int, dict[int, float]]:
    """(first timestep from which on soft and sharp are alike, area under the curve for each bin of timesteps).

    z: latents [N, C, h, w], sharp: bool [N]. Both kinds are shown equally often. Raises ValueError when one is absent.
    """
    if not (bool(sharp.any()) and bool((~sharp).any())):
        raise ValueError("a threshold needs sharp and soft images; the chosen ones are all of one kind")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResolutionClassifier(z.shape[1], how.width)
    order = torch.randperm(len(z), generator=generator)
    kept = int(len(z) * how.held_out)
    held, rest = order[:kept], order[kept:]
    kinds = [rest[sharp[rest]], rest[~sharp[rest]]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=1e-3)
    half = how.batch_size // 2
    wanted = torch.cat([torch.ones(half), torch.zeros(half)])
    for step in range(how.steps):
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * (1 - step / how.steps)
        rows = torch.cat([kind[torch.randint(len(kind), (half,), generator=generator)] for kind in kinds])
        x, t = _noised(z[rows], schedule, schedule.sample_timesteps(len(rows), generator), generator)
        loss = F.binary_cross_entropy_with_logits(model(x, t), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    areas = {}
    with torch.inference_mode():
        for low in range(0, NUM_TRAIN_TIMESTEPS, how.bin_width):
            t = low + torch.rand(len(held), generator=generator) * how.bin_width
            scores = [model(*_noised(z[rows], schedule, times, generator)).numpy()
                      for rows, times in zip(held.split(1024), t.floor().split(1024), strict=True)]
            kind, score = sharp[held].numpy(), np.concatenate(scores)
            areas[low] = area_under_curve(score[kind], score[~kind])
    return first_alike(areas, how.alike), areas


def fit_thresholds(z: Tensor, px: np.ndarray, schedule: NoiseSchedule, how: ResolutionFit = ResolutionFit(),
                   seed: int = 0) -> dict[int, tuple[int, dict[int, float]]]:
    """What `fit_threshold` finds for images of 58 and of 80 px, each against the sharp ones. Shapes: z [N, C, h, w],
    px [N]."""
    found = {}
    for soft in (58, 80):
        chosen = torch.from_numpy(np.flatnonzero((px == soft) | (px == SHARP)))
        found[soft] = fit_threshold(z[chosen].cpu(), torch.from_numpy(px == SHARP)[chosen], schedule, how, seed)
    return found


def first_alike(areas: Mapping[int, float], alike: float) -> int:
    """The lowest timestep from which on every bin's area is at most ``alike``; 1000 when not even the last one is."""
    threshold = NUM_TRAIN_TIMESTEPS
    for low in sorted(areas, reverse=True):
        if areas[low] > alike:
            break
        threshold = low
    return threshold


def _noised(z: Tensor, schedule: NoiseSchedule, timestep: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    z = z.float()
    return schedule.add_noise(z, torch.randn(z.shape, generator=generator), timestep), timestep
