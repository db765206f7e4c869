"""How does noise become a latent? Noise schedules, prediction targets, loss weights, guidance, sampling.

Everything between a trained network and a clean latent is here, once. The network is a pure function
``model(x, timestep, condition) -> prediction``; it does not know the architecture, the text encoder or the VAE.
The samplers are diffusers' schedulers, but for DPM-Solver++, the default (`core/diffusion/schedulers.py`): importing
diffusers takes seconds, so that happens when one of its samplers is first asked for.

Notation: z clean latent, eps noise, x = alpha z + sigma eps noisy latent, t timestep in [0, 1000).
Sources: DDPM https://arxiv.org/abs/2006.11239, cosine schedule https://arxiv.org/abs/2102.09672, v-prediction
https://arxiv.org/abs/2202.00512 (appendix D), min-SNR weights https://arxiv.org/abs/2303.09556 (eq. 8), classifier-free
guidance https://arxiv.org/abs/2207.12598, rectified flow https://arxiv.org/abs/2209.03003 with logit-normal times
https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.diffusion.conditioning import Condition, Model
from core.diffusion.guidance import Guidance, GuidedBatch
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.schedulers import set_timesteps


class NotFiniteError(FloatingPointError):
    """The network produced NaN or infinity; an error, never a black image."""


class Denoising:
    """One job's way from noise to clean latents: its scheduler, latents, random numbers and place on the way.

    The loop turned inside out, so that jobs of any sampler and length can share one call of the network:

        while not job.finished:
            x, level = job.model_input()
            job.advance(prediction of the network for x at level)

    ``noise`` [B, C, h, w] is the starting noise and ``generators`` (one an image, on the CPU) feed stochastic
    samplers, so an image does not depend on its neighbours. ``start`` in [0, 1] skips that share of the steps and
    begins from ``z`` with noise added to the level of the first remaining step. ``correction`` takes the clean latents
    and the number of steps at the end of a whole way by the schedule's default sampler, whose errors it knows
    (`core.diffusion.latent_correction`). ``x`` is the noisy latent as the scheduler keeps it; ``done`` of ``total``
    steps are behind it. Raises ValueError for a number of steps outside 1 ... 1000 and for a start without latents.
    """

    def __init__(
        self,
        scheduler: Any,
        noise: Tensor,
        num_inference_steps: int,
        *,
        schedule: NoiseSchedule | None = None,
        generators: Sequence[torch.Generator] | None = None,
        start: float = 0.0,
        z: Tensor | None = None,
        correction: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        self.schedule = schedule or NoiseSchedule()
        timesteps, flow = set_timesteps(scheduler, num_inference_steps), self.schedule.kind == "flow"
        self._timesteps, self._levels = list(timesteps), (timesteps - int(flow)).float().tolist()
        self.total, self.done = len(timesteps), int(start * len(timesteps) + 1e-6)  # 1 - 0.9 is less than a tenth
        if hasattr(scheduler, "set_begin_index"):  # told once, so that no step searches for its own place
            scheduler.set_begin_index(self.done)
        if self.done == 0:
            self.x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
        elif z is None:
            raise ValueError("start > 0 needs the latents z to start from")
        elif self.finished:
            self.x = z
        else:
            t = timesteps[self.done].expand(len(z)).to(z.device)
            self.x = self.schedule.add_noise(z, noise, t - 1) if flow else scheduler.add_noise(z, noise, t)
        self._correction = correction if self.done == 0 and getattr(scheduler, "is_default", False) else None
        takes_noise = generators is not None and "generator" in inspect.signature(scheduler.step).parameters
        self._extra = {"generator": list(generators or ())} if takes_noise else {}
        self._scheduler, self._seen = scheduler, (self.x, 0.0)
        self._prediction: Tensor | None = None

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def model_input(self) -> tuple[Tensor, float]:
        """What the network is to look at next: latents [B, C, h, w] and their timestep in [0, 1000)."""
        t = self._timesteps[self.done]
        scaled = hasattr(self._scheduler, "scale_model_input")
        self._seen = self._scheduler.scale_model_input(self.x, t) if scaled else self.x, self._levels[self.done]
        return self._seen

    @property
    def seen(self) -> tuple[Tensor, float]:
        """The last ``model_input``."""
        return self._seen

    def advance(self, prediction: Tensor) -> None:
        """One step down by the network's (guided) answer to ``model_input``. Raises NotFiniteError on NaN/inf."""
        if not bool(torch.isfinite(prediction).all()):
            raise NotFiniteError(f"the network gave NaN or infinity at step {self.done + 1} of {self.total}")
        t, self._prediction = self._timesteps[self.done], prediction
        self.x = self._scheduler.step(prediction, t, self.x, **self._extra, return_dict=False)[0]
        self.done += 1
        if self.finished and self._correction is not None:
            self.x = self._correction(self.x, self.total)

    def denoised(self) -> Tensor:
        """The clean latents [B, C, h, w] as the last prediction has them; the starting point before the first."""
        if self._prediction is None or (self.finished and self._correction is not None):
            return self.x
        x, level = self._seen
        return self.schedule.denoised(x, self._prediction, torch.full((len(x),), level, device=x.device))


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
    guidance_range: tuple[float, float] | None = None,
    generators: Sequence[torch.Generator] | None = None,
    start: float = 0.0,
    z: Tensor | None = None,
    correction: Callable[..., Tensor] | None = None,
    on_step: Callable[[int, int, Tensor], bool | None] | None = None,
) -> Tensor:
    """Run the whole of one job; returns normalized clean latents [B, C, h, w]. The arguments are those of ``Denoising``
    and of ``Guidance``, but that ``correction`` is told the guidance scale of each image, too.

    ``on_step(done, total, denoised)`` sees the predicted clean latent after every step and stops the loop by returning
    True. Raises NotFiniteError on NaN/inf.
    """
    guidance = Guidance(condition, guidance_scale, negative, guidance_range=guidance_range)
    job = Denoising(scheduler, noise, num_inference_steps, schedule=schedule, generators=generators, start=start, z=z,
                    correction=correction and partial(correction, scales=guidance.scales))
    batch = GuidedBatch([guidance])
    while not job.finished:
        x, level = job.model_input()
        job.advance(batch.combine(model(*batch.inputs(x, torch.full((len(x),), level, device=x.device)))))
        if on_step is not None and on_step(job.done, job.total, job.denoised()):
            break
    return job.x
