"""How does one answer of a network come to stand for two, and a few steps for fifty?

Guidance distillation: the student is given the guidance scale and predicts in one pass what the frozen teacher predicts
in two, or in three: away from its prediction without text, and away from its prediction without self-attention.
Consistency distillation: from any point of a path the student says where the path ends, because at neighbouring points
of it, one step of the teacher apart, it has to say the same. Here are the losses and the steps of generating; the
networks are functions (x, timestep, condition) -> prediction and nothing else is known of them.

Sources: guidance distillation https://arxiv.org/abs/2210.03142 (stage 1), leading away from perturbed self-attention
https://arxiv.org/abs/2403.17377 (section 4), from a worse version of the network in general
https://arxiv.org/abs/2406.02507, at some levels alone https://arxiv.org/abs/2404.07724, consistency models
https://arxiv.org/abs/2303.01469 (algorithms 1 and 2), latent consistency with guidance and skipped steps
https://arxiv.org/abs/2310.04378, the loss and its constant https://arxiv.org/abs/2310.14189 (section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.diffusion.conditioning import Condition, Model, join_conditions
from core.diffusion.schedule import NoiseSchedule, per_image
from core.diffusion.training_loss import TrainingBatch, TrainingLoss

GUIDANCE_RANGE = (1.0, 6.0)  # the scales that are learned
SHARE_OFF = 0.1  # of turbo's images, which are learned without guidance
GAP = 25.0  # timesteps between neighbouring points of a path: 40 steps of the teacher from noise to data
HUBER = 0.00054  # times the root of the number of values: where the loss turns from squares to distances


def sample_guidance_scales(count: int, generator: torch.Generator, share_off: float) -> Tensor:
    """Guidance scales [count]: one from each equal slice of the range, shuffled; ``share_off`` of them are 1."""
    low, high = GUIDANCE_RANGE
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return torch.where(u < share_off, 1.0, low + (high - low) * (u - share_off) / (1.0 - share_off))


@dataclass(frozen=True)
class WeakModelGuidance:
    """A network that generates worse than the teacher, to be led away from: by ``strength`` times the difference.

    All of that from guidance scale 2.5 on, in proportion below, nothing at 1; and where there is much noise, which is
    where a face is composed: all of it at timesteps from 600 on, nothing up to 400.
    """

    network: Model
    strength: float

    def shares(self, timestep: Tensor, scale: Tensor) -> Tensor:
        """How much of the difference is added to each row's prediction [B]."""
        return self.strength * ((scale - 1.0) / 1.5).clamp(0.0, 1.0) * ((timestep - 400.0) / 200.0).clamp(0.0, 1.0)


def cfg_prediction(teacher: Model, x: Tensor, timestep: Tensor, condition: Condition, scale: Tensor,
                   weak_model: WeakModelGuidance | None = None) -> Tensor:
    """u + w (c - u) with a scale [B] for each row, in one call of twice as many; with ``weak_model`` + s (c - weak), by
    a call of the worse network. Shapes: x, result [B, C, h, w]."""
    both = join_conditions([condition, condition.nulled()])
    wanted, unwanted = teacher(torch.cat([x, x]), torch.cat([timestep, timestep]), both).chunk(2)
    guided = unwanted + per_image(scale) * (wanted - unwanted)
    if weak_model is None:
        return guided
    weak = weak_model.network(x, timestep, condition)  # of all rows: compiled networks want one shape
    return guided + per_image(weak_model.shares(timestep, scale)) * (wanted - weak)


@torch.inference_mode()
def relative_errors(student: Model, teacher: Model, schedule: NoiseSchedule, batches: Iterable[Any], accelerator: Any,
                    weak_model: WeakModelGuidance | None = None, scales: Iterable[float] = (1.0, 1.5, 2.5, 4.5),
                    ) -> dict[str, tuple[float, float]]:
    """For each scale how far one pass of the student is from the teacher's two or three, over the length of those, and
    how far one pass of the teacher is, which knows no scale."""
    found = {}
    for scale in scales:
        total: Tensor = torch.zeros(3, device=accelerator.device)
        for batch in batches:
            x, t = schedule.add_noise(batch.z, batch.noise, batch.timestep), batch.timestep
            with accelerator.autocast():
                goal = cfg_prediction(teacher, x, t, batch.condition, torch.full_like(t, scale), weak_model)
                guesses = student(x, t, batch.condition.at_scale(scale)), teacher(x, t, batch.condition), 0.0 * goal
            total += torch.stack([(guess - goal).square().sum() for guess in guesses])
        one, plain, length = total.sqrt().tolist()
        found[str(scale)] = (one / length, plain / length)
    return found


def guidance_error(student: Model, teacher: Model, x: Tensor, timestep: Tensor, condition: Condition,
                   scale: Tensor, weak_model: WeakModelGuidance | None = None) -> Tensor:
    """Mean squared distance [B] of the student's one pass from the teacher's two, or three."""
    with torch.no_grad():
        goal = cfg_prediction(teacher, x, timestep, condition, scale, weak_model)
    return (student(x, timestep, condition.at_scale(scale)) - goal).square().mean((1, 2, 3))


def step_down(schedule: NoiseSchedule, x: Tensor, prediction: Tensor, timestep: Tensor, lower: Tensor) -> Tensor:
    """One step of DDIM (https://arxiv.org/abs/2010.02502, eq. 12, eta = 0); where ``lower`` is negative, to the data.

    Shapes: x, prediction, result [B, C, h, w], timestep, lower [B].
    """
    z = schedule.denoised(x, prediction, timestep)
    alpha, sigma = (per_image(c) for c in schedule.coefficients(timestep))
    return torch.where(per_image(lower < 0), z, schedule.add_noise(z, (x - alpha * z) / sigma, lower.clamp_min(0.0)))


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c [B] with c = ``HUBER`` times the root of the number of values in a row."""
    size = a[0].numel()
    c = HUBER * size**0.5
    return (((a - b).square().sum((1, 2, 3)) + c * c).sqrt() - c) / size**0.5


def consistency_goal(target: Model, teach: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, x: Tensor,
                     timestep: Tensor, condition: Condition, gap: float = GAP) -> Tensor:
    """Where the path through ``x`` ends, as ``target`` says one teacher's step further down; no gradient.

    ``teach`` gives the teacher's guided prediction for (x, timestep). A path that the step takes down to the data ends
    there. Shapes: x, result [B, C, h, w], timestep [B].
    """
    with torch.no_grad():
        lower = timestep - gap
        below = step_down(schedule, x, teach(x, timestep), timestep, lower)
        level = lower.clamp_min(0.0)
        end = schedule.denoised(below, target(below, level, condition), level)
        return torch.where(per_image(lower < 0), below, end)


def consistency_error(student: Model, goal: Tensor, schedule: NoiseSchedule, x: Tensor, timestep: Tensor,
                      condition: Condition) -> Tensor:
    """Distance [B] of the end that the student sees from ``goal``. Predicting v needs no skip: at no noise it is x."""
    return pseudo_huber(schedule.denoised(x, student(x, timestep, condition), timestep), goal)


def end_of_path(teach: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, x: Tensor, timestep: Tensor,
                steps: int = 16) -> Tensor:
    """Where the path through ``x`` ends by ``steps`` even steps of the teacher. Shapes: as `consistency_goal`."""
    levels = [timestep * (1.0 - i / steps) for i in range(steps)] + [torch.full_like(timestep, -1.0)]
    for level, lower in zip(levels[:-1], levels[1:], strict=True):
        x = step_down(schedule, x, teach(x, level), level, lower)
    return x


@dataclass(frozen=True)
class Teacher:
    """A released network that another learns from: with its configuration, the hash of its weights, the guidance
    scales that it knows, and what guidance leads away from beside the absence of text."""

    network: nn.Module
    config: dict[str, Any]
    source: str
    guidance_range: tuple[float, float] | None
    weak_model: WeakModelGuidance | None = None

    def guided(self, condition: Condition, scale: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Its guided prediction for (x, timestep): in one pass if it knows scales."""
        if self.guidance_range is not None:
            return lambda x, t: self.network(x, t, condition.at_scale(scale))
        return lambda x, t: cfg_prediction(self.network, x, t, condition, scale)


def guidance_loss(student: Model, schedule: NoiseSchedule, teacher: Teacher) -> TrainingLoss:
    """How far one pass of the student is from the teacher's guided prediction, at the batch's guidance scales."""

    def loss(batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        t, x = batch.timestep, schedule.add_noise(batch.z, batch.noise, batch.timestep)
        error = guidance_error(student, teacher.network, x, t, batch.condition, batch.scale, teacher.weak_model)
        return error, torch.ones_like(error)

    return loss


def consistency_loss(student: Model, schedule: NoiseSchedule, teacher: Teacher,
                     target: Model | None = None) -> TrainingLoss:
    """How far the end of the path that the student sees is from what ``target`` sees a step of the teacher further
    down; without a ``target``, as validation wants it, from where the teacher's own steps end."""

    def loss(batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        t, x = batch.timestep, schedule.add_noise(batch.z, batch.noise, batch.timestep)
        asked, teach = batch.condition.at_scale(batch.scale), teacher.guided(batch.condition, batch.scale)
        if target is None:
            goal = end_of_path(teach, schedule, x, t)
        else:
            goal = consistency_goal(target, teach, schedule, x, t, asked)
        error = consistency_error(student, goal, schedule, x, t, asked)
        return error, torch.ones_like(error)

    return loss
