"""What does a denoiser learn from an image and noise?

The mean squared error of its prediction of v (or of the straight flow), weighted by noise level, as
`core.diffusion.schedule` defines targets and weights. The network is a function (x, timestep, condition) -> prediction
and nothing else is known of it; what is learned from another network is in `core.diffusion.distillation`.

Source: v-prediction https://arxiv.org/abs/2202.00512 (section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from core.diffusion.conditioning import Condition, Model
from core.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule


class TrainingBatch(Protocol):
    """Clean latents z and noise [B, C, h, w], their timestep and the guidance scale [B], and what is asked."""

    @property
    def z(self) -> Tensor: ...
    @property
    def noise(self) -> Tensor: ...
    @property
    def timestep(self) -> Tensor: ...
    @property
    def condition(self) -> Condition: ...
    @property
    def scale(self) -> Tensor: ...


# a batch -> the error [B] of the network for each image, and the weight [B] that it counts with
TrainingLoss = Callable[[Any], tuple[Tensor, Tensor]]


def denoising_loss(network: Model, schedule: NoiseSchedule) -> TrainingLoss:
    """Mean squared error [B] of the prediction at x = alpha z + sigma eps, and the schedule's weight of its level."""

    def loss(batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        x = schedule.add_noise(batch.z, batch.noise, batch.timestep)
        target = schedule.target(batch.z, batch.noise, batch.timestep)
        prediction = network(x, batch.timestep, batch.condition)
        return (prediction - target).square().mean((1, 2, 3)), schedule.loss_weight(batch.timestep)

    return loss


@torch.inference_mode()
def loss_by_level(loss: TrainingLoss, batches: Sequence[TrainingBatch], accelerator: Any, levels: int
                  ) -> tuple[float, dict[int, float]]:
    """Of held-out images: the weighted mean over all, and for each of ``levels`` equal slices of the noise levels that
    has some the mean without weights, so that a curve shows where a network gets worse while it learns elsewhere."""
    total, count = 0.0, 0
    sums, counts = torch.zeros(levels, dtype=torch.float64), torch.zeros(levels, dtype=torch.float64)
    for batch in batches:
        with accelerator.autocast():
            error, weight = loss(batch)
        total, count = total + float((error * weight).sum()), count + len(error)
        level = (batch.timestep * (levels / NUM_TRAIN_TIMESTEPS)).long().clamp(max=levels - 1).cpu()
        sums.index_add_(0, level, error.double().cpu())
        counts.index_add_(0, level, torch.ones(len(error), dtype=torch.float64))
    found = {i: float(sums[i] / counts[i]) for i in range(levels) if counts[i]}
    return total / count, found


def mean_loss(loss: TrainingLoss, batches: Sequence[TrainingBatch], accelerator: Any) -> float:
    """The weighted mean over batches of held-out images: comparable between checkpoints."""
    return loss_by_level(loss, batches, accelerator, levels=1)[0]
