"""Which samplers are there, and how does one step from noise to a clean latent?

DPM-Solver++ (https://arxiv.org/abs/2211.01095) and UniPC (https://arxiv.org/abs/2302.04867) as multistep solvers of
their own: importing diffusers takes longer than an image. Every other sampler is diffusers' scheduler, made from the
model's configuration. The steps of a consistency model (https://arxiv.org/abs/2303.01469) are the third kind. It does
not know networks, guidance or text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule, schedule_from_config

TURBO, TURBO_STEPS = "Turbo", 4  # needs the consistency network of a model folder (`turbo/`), which the others do not
SAMPLERS: tuple[str, ...] = ("UniPC", "DPM++ 2M", "DPM++ 2M SDE", "DDIM", "DDPM", "Euler", "Euler a")


def scheduler_config(schedule: NoiseSchedule) -> dict[str, Any]:
    """What a model folder stores about its noise schedule."""
    return {"schedule": schedule.kind, "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
            "begin": list(schedule.initial_timestep),
            "prediction_type": "flow" if schedule.kind == "flow" else "v_prediction",
            "samplers": list(samplers_for(schedule)), "default_sampler": samplers_for(schedule)[0],
            "long_sampler": samplers_for(schedule)[0]}


def samplers_for(schedule: NoiseSchedule) -> tuple[str, ...]:
    """Names of the samplers that can follow this schedule, the default first."""
    return ("Flow Euler",) if schedule.kind == "flow" else SAMPLERS


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh scheduler for one job; schedulers keep state, so they are never shared.

    ``first_timestep`` of it says where this model begins (`NoiseSchedule`), for ``set_timesteps``; ``is_default``,
    whether it is the schedule's default. Raises ValueError for a name that does not fit the schedule in ``config``.
    """
    schedule = schedule_from_config(config)
    scheduler = _bare_scheduler(name, schedule)
    scheduler.first_timestep, scheduler.is_default = schedule.first_timestep, name == samplers_for(schedule)[0]
    return scheduler


def _bare_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    if name == TURBO:
        return ConsistencySteps(schedule)
    if name not in samplers_for(schedule):
        raise ValueError(f"sampler {name!r} is not one of {', '.join(samplers_for(schedule))}")
    if name in ("DPM++ 2M", "DPM++ 2M SDE"):
        return DPMSolver(schedule.alphas_cumprod(), stochastic=name.endswith("SDE"))
    if name == "UniPC":
        return DPMSolver(schedule.alphas_cumprod(), corrected=True)
    if name == "DDIM":  # first-order DPM-Solver++ is DDIM; DDIMScheduler steps wrongly where n does not divide 1000
        return DPMSolver(schedule.alphas_cumprod(), order=1)
    import diffusers

    if schedule.kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
    common: dict[str, Any] = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS, "beta_schedule": "squaredcos_cap_v2",
                              "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    if name == "DDPM":
        return diffusers.DDPMScheduler(**common, clip_sample=False)
    if name == "Euler":
        return diffusers.EulerDiscreteScheduler(**common)
    return diffusers.EulerAncestralDiscreteScheduler(**common)


def set_timesteps(scheduler: Any, num_inference_steps: int) -> Tensor:
    """Give ``scheduler`` exactly ``num_inference_steps`` distinct levels, evenly spaced from where this model begins
    (``NoiseSchedule.initial_timestep``) down to the data.

    diffusers' own "trailing" spacing gives one level too many or too few for most numbers (with a clipped far end) and
    for some of them visits t = -1; on straight lines its last step goes nowhere. Returns the timesteps [n], on the CPU:
    reading one from an accelerator would make every step wait for it. Raises ValueError outside 1 ... 1000.
    """
    count = num_inference_steps
    if not 1 <= count <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"num_inference_steps must be 1 ... {NUM_TRAIN_TIMESTEPS}, got {count}")
    if not hasattr(scheduler, "alphas_cumprod"):  # flow: s = 1, ..., 1/n, then 0
        scheduler.set_timesteps(sigmas=[1.0 - i / count for i in range(count)])
        return scheduler.timesteps
    scheduler.set_timesteps(count)
    end = int(scheduler.timesteps[0])  # the far end, clipped where the solver needs it
    if hasattr(scheduler, "first_timestep"):
        end = min(end, scheduler.first_timestep(count))
    end = max(end + 1, count)  # unless all levels are needed
    levels = [round(end - i * end / count) - 1 for i in range(count)]
    scheduler.timesteps = torch.tensor(levels, dtype=scheduler.timesteps.dtype)
    if hasattr(scheduler, "sigmas"):
        bar = scheduler.alphas_cumprod[levels].double()
        # float64: in float32 the ancestral step takes the root of a small negative number after two huge levels
        scheduler.sigmas = torch.cat([((1.0 - bar) / bar).sqrt(), bar.new_zeros(1)])
    return scheduler.timesteps


LAMBDA_MIN = -5.1  # the cosine schedule ends at almost no signal: its far end is clipped, as diffusers advises


class DPMSolver:
    """One job's solver, with the interface of a diffusers scheduler; it keeps state, so it is never shared.

    ``alphas_cumprod`` is alpha^2 at each of the N training timesteps, float64. ``order`` 1 is DDIM, 2 also looks at the
    step before. ``stochastic`` adds fresh noise at every step; then ``step`` needs one generator an image.
    ``corrected`` is UniPC, which begins at the far end itself, unclipped.
    """

    init_noise_sigma = 1.0

    def __init__(self, alphas_cumprod: Tensor, order: int = 2, stochastic: bool = False,
                 corrected: bool = False) -> None:
        betas = 1.0 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        # from here on in float32, as diffusers has it: a seed's image is the same to the bit
        self.alphas_cumprod = torch.cumprod(1.0 - betas.float(), dim=0)
        log_snr = self.alphas_cumprod.sqrt().log() - (1.0 - self.alphas_cumprod).sqrt().log()
        self._last = len(log_snr) - (int(torch.searchsorted(log_snr.flip(0), LAMBDA_MIN)) if not corrected else 0)
        self._order, self._stochastic, self._corrected = order, stochastic, corrected
        self.timesteps, self.sigmas = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._index = 0
        self._before: tuple[float, Tensor] | None = None  # lambda and z of the step before
        self._taken: tuple[float, Tensor, tuple[float, Tensor] | None] | None = None  # what it stepped from, and how

    def set_timesteps(self, num_inference_steps: int) -> None:
        """About so many levels, from the clipped far end down; ``core.diffusion.schedulers.set_timesteps`` has exactly
        so many."""
        gap = len(self.alphas_cumprod) / num_inference_steps
        self.timesteps = torch.arange(self._last, 0, -gap, dtype=torch.float64).round().long() - 1
        bar = self.alphas_cumprod[self.timesteps].double()
        self.sigmas = torch.cat([((1.0 - bar) / bar).sqrt(), bar.new_zeros(1)])
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step, without a past."""
        self._index, self._before, self._taken = begin_index, None, None

    def add_noise(self, z: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z at the level of the step to begin with, which is that of ``timesteps``. Shapes: [B, C, h, w]."""
        sigma = self.sigmas[self._index].to(z)
        alpha = 1.0 / (sigma.square() + 1.0).sqrt()
        return alpha * z + sigma * alpha * noise

    def step(
        self,
        prediction: Tensor,
        timestep: Any,
        x: Tensor,
        generator: Sequence[torch.Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """One step down: x at this level and the v that was predicted of it -> x at the next level, [B, C, h, w].

        The steps come in order, whatever ``timestep`` says. Raises ValueError when there is none left, or when the
        stochastic form has no generators.
        """
        if self._index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are taken: begin again with set_timesteps")
        (alpha, sigma, log_snr), (next_alpha, next_sigma, next_log_snr) = (
            _level(ratio) for ratio in self.sigmas[self._index : self._index + 2].tolist()
        )
        z = alpha * x - sigma * prediction  # what the prediction says is there
        if self._taken is not None:
            x = self._correct(z, alpha, sigma, log_snr)
        h = next_log_snr - log_snr  # infinite at the last step, which goes to z itself
        shrunk = math.exp(-2.0 * h if self._stochastic else -h)
        weight = next_alpha * (1.0 - shrunk)
        keep = next_sigma / sigma * (math.exp(-h) if self._stochastic else 1.0)
        result = keep * x + weight * z
        earlier = self._before if self._order == 2 and next_sigma > 0.0 else None
        if earlier is not None:
            log_snr_before, z_before = earlier
            result = result + 0.5 * weight * (h / (log_snr - log_snr_before) * (z - z_before))
        if self._stochastic and next_sigma > 0.0:
            if generator is None:
                raise ValueError("the stochastic solver needs generators, one an image")
            result = result + next_sigma * math.sqrt(1.0 - shrunk) * _noise(x, generator)
        self._taken = (sigma, x, earlier) if self._corrected else None
        self._index, self._before = self._index + 1, (log_snr, z)
        return (result,)

    def _correct(self, z: Tensor, alpha: float, sigma: float, log_snr: float) -> Tensor:
        """The step before taken once more (UniC), now that the network has said what is there at its end.

        That, z, and the prediction before enter with the shares that make the step exact to third order (theorem 3.1).
        """
        if self._taken is None or self._before is None:
            raise ValueError("there is no step to correct")
        (sigma_from, x, earlier), (log_snr_from, z_from) = self._taken, self._before
        h = log_snr - log_snr_from
        shrunk = math.expm1(-h)  # "B2"
        if earlier is None:
            change = 0.5 * (z - z_from)
        else:
            log_snr_earlier, z_earlier = earlier
            ratio = (log_snr_earlier - log_snr_from) / h
            both = (-shrunk / h - 1.0) / shrunk  # the shares have to sum to this
            old = (both + 2.0 * both / h + 1.0 / shrunk) / (1.0 - ratio)
            change = old / ratio * (z_earlier - z_from) + (both - old) * (z - z_from)
        return sigma / sigma_from * x - alpha * shrunk * (z_from + change)


def _level(ratio: float) -> tuple[float, float, float]:
    """sigma / alpha -> alpha, sigma, lambda."""
    alpha = 1.0 / math.sqrt(ratio * ratio + 1.0)
    return alpha, ratio * alpha, -math.log(ratio) if ratio > 0.0 else math.inf


def _noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Each image's noise from its own generator, so that none depends on its neighbours."""
    own = [torch.randn((1, *like.shape[1:]), generator=one, device=one.device, dtype=like.dtype) for one in generators]
    return torch.cat(own).to(like.device)


class ConsistencySteps:
    """Generating with a consistency network, as a scheduler: see the end of the path, add fresh noise of the next
    level.

    n evaluations stand at t = 999 and at n - 1 more levels evenly below it. It has what
    `core.diffusion.sampling.Denoising` asks of diffusers' schedulers.
    """

    init_noise_sigma = 1.0

    def __init__(self, schedule: NoiseSchedule) -> None:
        self._schedule, self._place = schedule, 0
        self.timesteps = torch.empty(0, dtype=torch.int64)

    def set_timesteps(self, *, sigmas: Sequence[float]) -> None:
        """Levels as shares of the schedule, from 1 down to above 0."""
        self.timesteps = torch.tensor([max(round(share * NUM_TRAIN_TIMESTEPS) - 1, 0) for share in sigmas])

    def set_begin_index(self, index: int) -> None:
        """Begin at this level."""
        self._place = index

    def add_noise(self, z: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The noisy latents of these timesteps. Shapes: z, noise, result [B, C, h, w], timestep [B]."""
        return self._schedule.add_noise(z, noise, timestep)

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor, generator: Sequence[torch.Generator] = (),
             return_dict: bool = False) -> tuple[Tensor]:
        """From one level to the next, with one generator an image, or none: then torch's own."""
        z = self._schedule.denoised(x, prediction, timestep.expand(len(x)).to(x.device))
        self._place += 1
        if self._place == len(self.timesteps):
            return (z,)
        noise = torch.stack([torch.randn(z.shape[1:], generator=generator[i] if generator else None)
                             for i in range(len(z))]).to(z)
        return (self.add_noise(z, noise, self.timesteps[self._place].expand(len(z)).to(z.device)),)
