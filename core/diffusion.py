"""How does noise become a latent? Noise schedules, prediction targets, loss weights, guidance, sampling.

Everything between a trained network and a clean latent is here, once. The network is a pure function
``model(x, timestep, condition) -> prediction``; it does not know the architecture, the text encoder or the VAE.
diffusers is imported only when a scheduler is built, because training does not need one.

Notation: z clean latent, eps noise, x = alpha z + sigma eps noisy latent, t timestep in [0, 1000).
Sources: DDPM https://arxiv.org/abs/2006.11239, cosine schedule https://arxiv.org/abs/2102.09672, v-prediction
https://arxiv.org/abs/2202.00512 (appendix D), min-SNR weights https://arxiv.org/abs/2303.09556 (eq. 8), classifier-free
guidance https://arxiv.org/abs/2207.12598, rectified flow https://arxiv.org/abs/2209.03003 with logit-normal times
https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
Model = Callable[[Tensor, Tensor, "Condition"], Tensor]


class NotFiniteError(FloatingPointError):
    """The network produced NaN or infinity; an error, never a black picture."""


# ----------------------------------------------------------------------------------------------------------- condition


@dataclass(frozen=True)
class Condition:
    """What a batch of pictures is asked to be. ``null`` marks rows that use the learned null instead of their text.

    Shapes: tokens [B, L, E], mask [B, L] bool (True = a real token), pooled [B, E], px [B] source resolution in pixels,
    null [B] bool.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    px: Tensor
    null: Tensor

    def __len__(self) -> int:
        return len(self.px)

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return Condition(*(getattr(self, f.name)[rows] for f in fields(self)))

    def nulled(self) -> Condition:
        """The same batch without its text (unconditional; px stays)."""
        return Condition(self.tokens, self.mask, self.pooled, self.px, torch.ones_like(self.null))

    def to(self, device: torch.device | str) -> Condition:
        """Every tensor on ``device``."""
        return Condition(*(getattr(self, f.name).to(device) for f in fields(self)))

    def repeat(self, count: int) -> Condition:
        """Every row ``count`` times, in order: a, a, b, b, ..."""
        return Condition(*(getattr(self, f.name).repeat_interleave(count, dim=0) for f in fields(self)))


def join_conditions(parts: Sequence[Condition]) -> Condition:
    """Concatenate batches; token axes are padded to the longest (padding is masked, so it changes nothing)."""
    longest = max(part.tokens.shape[1] for part in parts)

    def padded(part: Condition) -> Condition:
        missing = longest - part.tokens.shape[1]
        tokens = torch.nn.functional.pad(part.tokens, (0, 0, 0, missing))
        return Condition(tokens, torch.nn.functional.pad(part.mask, (0, missing)), part.pooled, part.px, part.null)

    whole = [padded(part) for part in parts]
    return Condition(*(torch.cat([getattr(part, f.name) for part in whole]) for f in fields(Condition)))


# ------------------------------------------------------------------------------------------------------------ schedule


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
        alpha, sigma = (_spread(c, z) for c in self.coefficients(timestep))
        return alpha * z + sigma * eps

    def target(self, z: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        """v = alpha eps - sigma z (cosine) or eps - z (flow)."""
        if self.kind == "flow":
            return eps - z
        alpha, sigma = (_spread(c, z) for c in self.coefficients(timestep))
        return alpha * eps - sigma * z

    def denoised(self, x: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The clean latent that a prediction stands for: alpha x - sigma v (cosine) or x - s v (flow)."""
        alpha, sigma = (_spread(c, x) for c in self.coefficients(timestep))
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


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] in the dtype of ``like``."""
    return values.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


# ------------------------------------------------------------------------------------------------------------ sampling

SAMPLERS: tuple[str, ...] = ("DPM++ 2M", "DPM++ 2M SDE", "UniPC", "DDIM", "DDPM", "Euler", "Euler a")


def scheduler_config(schedule: NoiseSchedule) -> dict[str, Any]:
    """What a model folder stores about its noise schedule."""
    return {"schedule": schedule.kind, "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
            "prediction_type": "flow" if schedule.kind == "flow" else "v_prediction",
            "samplers": list(samplers_for(schedule)), "default_sampler": samplers_for(schedule)[0]}


def samplers_for(schedule: NoiseSchedule) -> tuple[str, ...]:
    """Names of the samplers that can follow this schedule, the default first."""
    return ("Flow Euler",) if schedule.kind == "flow" else SAMPLERS


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a model folder's ``scheduler/config.json``."""
    if config.get("schedule") not in ("cosine", "flow") or config.get("num_train_timesteps") != NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"unknown noise schedule {dict(config)!r}")
    return NoiseSchedule(config["schedule"])


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler for one job; schedulers keep state, so they are never shared.

    Raises ValueError for a name that does not fit the schedule in ``config``.
    """
    import diffusers

    schedule = schedule_from_config(config)
    if name not in samplers_for(schedule):
        raise ValueError(f"sampler {name!r} is not one of {', '.join(samplers_for(schedule))}")
    if schedule.kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
    common: dict[str, Any] = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS, "beta_schedule": "squaredcos_cap_v2",
                              "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    # the cosine schedule ends at almost no signal: solvers in log-SNR need its far end clipped (diffusers' advice)
    solver = {"lambda_min_clipped": -5.1, "solver_order": 2}
    if name == "DDPM":
        return diffusers.DDPMScheduler(**common, clip_sample=False)
    if name == "DDIM":  # first-order DPM-Solver++ is DDIM; DDIMScheduler steps wrongly where n does not divide 1000
        return diffusers.DPMSolverMultistepScheduler(**common, solver_order=1, lambda_min_clipped=-5.1,
                                                     algorithm_type="dpmsolver++")
    if name == "DPM++ 2M":
        return diffusers.DPMSolverMultistepScheduler(**common, **solver, algorithm_type="dpmsolver++")
    if name == "DPM++ 2M SDE":
        return diffusers.DPMSolverMultistepScheduler(**common, **solver, algorithm_type="sde-dpmsolver++")
    if name == "UniPC":
        return diffusers.UniPCMultistepScheduler(**common, solver_order=2)
    if name == "Euler":
        return diffusers.EulerDiscreteScheduler(**common)
    return diffusers.EulerAncestralDiscreteScheduler(**common)


def set_timesteps(scheduler: Any, num_inference_steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Give ``scheduler`` exactly ``num_inference_steps`` distinct levels, evenly spaced from noise down to the data.

    diffusers' own "trailing" spacing gives one level too many or too few for most numbers (with a clipped far end) and
    for some of them visits t = -1; on straight lines its last step goes nowhere. Returns the timesteps [n].
    Raises ValueError outside 1 ... 1000.
    """
    count = num_inference_steps
    if not 1 <= count <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"num_inference_steps must be 1 ... {NUM_TRAIN_TIMESTEPS}, got {count}")
    if not hasattr(scheduler, "alphas_cumprod"):  # flow: s = 1, ..., 1/n, then 0
        scheduler.set_timesteps(sigmas=[1.0 - i / count for i in range(count)], device=device)
        return scheduler.timesteps
    scheduler.set_timesteps(count, device=device)
    end = max(int(scheduler.timesteps[0]) + 1, count)  # the clipped far end, unless all levels are needed
    levels = [round(end - i * end / count) - 1 for i in range(count)]
    scheduler.timesteps = torch.tensor(levels, dtype=scheduler.timesteps.dtype, device=device)
    if hasattr(scheduler, "sigmas"):
        bar = scheduler.alphas_cumprod[levels].double()
        # float64: in float32 the ancestral step takes the root of a small negative number after two huge levels
        scheduler.sigmas = torch.cat([((1.0 - bar) / bar).sqrt(), bar.new_zeros(1)])
    return scheduler.timesteps


def guided(
    model: Model,
    x: Tensor,
    timestep: Tensor,
    condition: Condition,
    guidance_scale: float,
    negative: Condition | None = None,
) -> Tensor:
    """Classifier-free guidance: u + w (c - u), where u is the negative condition or the learned null.

    w = 1 is off and costs one pass; w = 0 is u alone and costs one pass; anything else is one pass over 2B rows.
    Shapes: x [B, C, h, w], timestep [B], result [B, C, h, w].
    """
    if guidance_scale == 1.0:
        return model(x, timestep, condition)
    away = condition.nulled() if negative is None else negative
    if guidance_scale == 0.0:
        return model(x, timestep, away)
    both = model(torch.cat([x, x]), torch.cat([timestep, timestep]), join_conditions([condition, away]))
    wanted, unwanted = both.chunk(2)
    return unwanted + guidance_scale * (wanted - unwanted)


def sample(
    model: Model,
    condition: Condition,
    scheduler: Any,
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    *,
    schedule: NoiseSchedule | None = None,
    negative: Condition | None = None,
    generators: Sequence[torch.Generator] | None = None,
    start: float = 0.0,
    z: Tensor | None = None,
    on_step: Callable[[int, int, Tensor], bool | None] | None = None,
) -> Tensor:
    """Run the denoising loop; returns whitened clean latents [B, C, h, w].

    ``noise`` [B, C, h, w] is the starting noise and ``generators`` (one an image, on the CPU) feed stochastic samplers,
    so a picture does not depend on its neighbours. ``start`` in [0, 1) skips that share of the steps and begins from
    ``z`` with noise added to the level of the first remaining step. ``on_step(done, total, denoised)`` sees the
    predicted clean latent after every step and stops the loop by returning True. Raises NotFiniteError on NaN/inf.
    """
    schedule = schedule or NoiseSchedule()
    timesteps = set_timesteps(scheduler, num_inference_steps, noise.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    total, first = len(timesteps), int(start * len(timesteps))
    if first == 0:
        x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    else:
        if z is None:
            raise ValueError("start > 0 needs the latents z to start from")
        if first >= total:
            return z
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        t = timesteps[first : first + 1].expand(len(z))
        x = schedule.add_noise(z, noise, t - 1) if schedule.kind == "flow" else scheduler.add_noise(z, noise, t)
    takes_noise = generators is not None and "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators or ())} if takes_noise else {}
    for done, t in enumerate(timesteps[first:], start=first + 1):
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        level = (t - 1 if schedule.kind == "flow" else t).expand(len(x)).float()
        prediction = guided(model, model_input, level, condition, guidance_scale, negative)
        if not bool(torch.isfinite(prediction).all()):
            raise NotFiniteError(f"the network gave NaN or infinity at step {done} of {total}")
        x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
        if on_step is not None and on_step(done, total, schedule.denoised(model_input, prediction, level)):
            break
    return x
