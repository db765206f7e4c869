"""How much noise is in a latent at each timestep, and what does the network predict there?

A cosine-like or shifted schedule in the variance-preserving form x = alpha z + sigma eps, the v-prediction of
"Progressive Distillation" (https://arxiv.org/abs/2202.00512) and the weights of its loss. It does not know samplers,
text or networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha and sigma at each timestep, and the prediction target that belongs to them.

    ``cosine``: variance preserving, v-prediction, min-SNR weights. ``flow``: straight lines alpha = 1 - s, sigma = s
    with s = (t + 1) / 1000, velocity target, logit-normal times. In both, target = d x / d(angle or s), so the
    network's task and the sampler's use of it have one form.
    """

    kind: Literal["cosine", "flow"] = "cosine"
    min_snr_gamma: float = 5.0
    weighting: Literal["min-snr", "clamped-v"] = "min-snr"
    initial_timestep: tuple[float, float] = (float(NUM_TRAIN_TIMESTEPS), 0.0)  # of generating; ``flow`` begins at noise

    def __post_init__(self) -> None:
        most, less = self.initial_timestep
        if not (1 <= most <= NUM_TRAIN_TIMESTEPS and 0 <= less < most):
            raise ValueError(f"initial_timestep must be a, b with 1 <= a <= 1000 and 0 <= b < a, got {most}, {less}")

    def first_timestep(self, num_inference_steps: int) -> int:
        """Where n steps from noise begin: with ``begin`` (a, b) at a - b / (n + 2), held within the timesteps.

        Above it is next to no image (alpha < 0.02 at 990), the first guess there is the mean of all faces, and a step
        across it costs as much as any other: with few steps much is won by beginning where there is something to say.
        """
        most, less = self.initial_timestep
        return int(min(max(round(most - less / (num_inference_steps + 2)), 1), NUM_TRAIN_TIMESTEPS)) - 1

    def alphas_cumprod(self, device: torch.device | str = "cpu") -> Tensor:
        """alpha^2 at every timestep [1000] (float64); for ``cosine`` exactly diffusers' "squaredcos_cap_v2"."""
        steps = torch.arange(NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64, device=device) / NUM_TRAIN_TIMESTEPS
        if self.kind == "flow":
            return (1.0 - steps[1:]).square()
        bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2).square()
        return torch.cumprod(1.0 - (1.0 - bar[1:] / bar[:-1]).clamp(max=0.999), dim=0)

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B] float32, at integer or fractional timesteps [B] (linear in between)."""
        exact = torch.float32 if timestep.device.type == "mps" else torch.float64  # MPS has no float64
        t = timestep.to(exact).clamp(0, NUM_TRAIN_TIMESTEPS - 1)
        if self.kind == "flow":
            sigma = (t + 1) / NUM_TRAIN_TIMESTEPS
            return (1.0 - sigma).float(), sigma.float()
        table = self.alphas_cumprod("cpu" if exact == torch.float32 else timestep.device).to(t)
        low = t.floor().long()
        high = (low + 1).clamp(max=NUM_TRAIN_TIMESTEPS - 1)
        bar = torch.lerp(table[low], table[high], t - low)
        return bar.sqrt().float(), (1.0 - bar).sqrt().float()

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Training timesteps [count]: one from each equal slice of the distribution, shuffled (less noise)."""
        u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        if self.kind == "flow":  # logit-normal(0, 1): most weight in the middle of the line
            u = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        return (u * NUM_TRAIN_TIMESTEPS).floor().clamp(max=NUM_TRAIN_TIMESTEPS - 1)

    def add_noise(self, z: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        """x = alpha z + sigma eps, shapes [B, C, h, w]."""
        alpha, sigma = (per_image(c, z) for c in self.coefficients(timestep))
        return alpha * z + sigma * eps

    def target(self, z: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        """v = alpha eps - sigma z (cosine) or eps - z (flow)."""
        if self.kind == "flow":
            return eps - z
        alpha, sigma = (per_image(c, z) for c in self.coefficients(timestep))
        return alpha * eps - sigma * z

    def denoised(self, x: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The clean latent that a prediction stands for: alpha x - sigma v (cosine) or x - s v (flow)."""
        alpha, sigma = (per_image(c, x) for c in self.coefficients(timestep))
        return x - sigma * prediction if self.kind == "flow" else alpha * x - sigma * prediction

    def loss_weight(self, timestep: Tensor) -> Tensor:
        """Weight [B] of the squared error of the prediction; 1 for flow.

        For v: ``min-snr`` is min(SNR, gamma) / (SNR + 1), which all but ignores the noisiest levels, where the text
        decides sex, hair and pose; ``clamped-v`` is min(SNR + 1, gamma) / (SNR + 1), the same at low noise and 1 there.
        """
        if self.kind == "flow":
            return torch.ones_like(timestep, dtype=torch.float32)
        alpha, sigma = self.coefficients(timestep)
        snr = alpha.square() / sigma.square().clamp_min(1e-12)
        known = snr + 1.0 if self.weighting == "clamped-v" else snr
        return known.clamp(max=self.min_snr_gamma) / (snr + 1.0)


def per_image(values: Tensor, like: Tensor | None = None) -> Tensor:
    """[B] -> [B, 1, 1, 1], to be multiplied with images or latents; in the dtype and for the axes of ``like``."""
    return values.view(-1, 1, 1, 1) if like is None else values.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a model folder's ``scheduler/config.json``."""
    if config.get("schedule") not in ("cosine", "flow") or config.get("num_train_timesteps") != NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"unknown noise schedule {dict(config)!r}")
    initial_timestep = config.get("begin", NoiseSchedule.initial_timestep)  # older folders do not say it
    return NoiseSchedule(config["schedule"],
                         initial_timestep=tuple(float(one) for one in initial_timestep))  # type: ignore[arg-type]
