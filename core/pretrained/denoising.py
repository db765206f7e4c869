"""How does one image's noise become a latent under one of diffusers' schedulers?

The loop of `StableDiffusionPipeline` turned inside out, so that requests of any sampler, length and prompt can share
one call of the network:

    while not trajectory.finished:
        x, timestep = trajectory.model_input()
        trajectory.advance(guided prediction of the network for x at timestep)

Each request has a scheduler of its own, made from the model's configuration, with diffusers' own timesteps: the latents
are those of the pipeline. It does not know networks, prompts or images.

Notation: z clean latent, eps noise, x = alpha z + sigma eps noisy latent, v = alpha eps - sigma z.
Schedulers: https://huggingface.co/docs/diffusers/api/schedulers/overview
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from core.diffusion.sampling import NotFiniteError
from core.pretrained.loading import SAMPLERS


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh scheduler for one request; schedulers keep state. Raises ValueError for a name that is none."""
    import diffusers

    classes: dict[str, tuple[str, dict[str, Any]]] = {
        "UniPC": ("UniPCMultistepScheduler", {}),
        "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
        "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "DDIM": ("DDIMScheduler", {}),
        "DDPM": ("DDPMScheduler", {}),
        "Euler": ("EulerDiscreteScheduler", {}),
        "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    }
    if name not in classes:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    kind, more = classes[name]
    return getattr(diffusers, kind).from_config(dict(config), **more)


class SchedulerRun:
    """The way of one request's latents [B, C, h, w], on the CPU in fp32.

    `noise` is the starting noise, `generators` (one an image) feed stochastic schedulers. `start` in [0, 1] skips that
    share of the steps and begins from `z` with noise added to the level of the first one that remains.
    Raises ValueError for a number of steps that the scheduler does not take.
    """

    kind: Literal["cosine"] = "cosine"  # variance preserving, in the words of core.diffusion.schedule

    def __init__(self, scheduler: Any, noise: Tensor, num_inference_steps: int, generators: Sequence[torch.Generator],
                 start: float = 0.0, z: Tensor | None = None) -> None:
        scheduler.set_timesteps(num_inference_steps)
        self._scheduler, self._timesteps = scheduler, list(scheduler.timesteps)
        self._is_v = scheduler.config.prediction_type == "v_prediction"
        self.total, self.done = len(self._timesteps), int(start * len(self._timesteps) + 1e-6)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.done)
        if self.done == 0:
            self.x = noise * scheduler.init_noise_sigma
        elif z is None:
            raise ValueError("start > 0 needs the latents z to start from")
        else:
            at = self._timesteps[min(self.done, self.total - 1)].expand(len(z))
            self.x = z if self.finished else scheduler.add_noise(z, noise, at)
        takes_noise = "generator" in inspect.signature(scheduler.step).parameters
        self._extra = {"generator": list(generators)} if takes_noise else {}
        self._seen, self._alpha, self._sigma = self.x, 1.0, 0.0
        self._prediction: Tensor | None = None

    @property
    def finished(self) -> bool:
        return self.done == self.total

    @property
    def schedule(self) -> SchedulerRun:
        """What says alpha, sigma and the clean latent at the level that was last seen: this itself."""
        return self

    @property
    def seen(self) -> tuple[Tensor, float]:
        """The last `model_input`."""
        return self._seen, float(self._timesteps[min(self.done, self.total - 1)])

    def model_input(self) -> tuple[Tensor, float]:
        """What the network is to look at next, and its timestep in [0, 1000), whole or not."""
        t = self._timesteps[self.done]
        self._seen = self._scheduler.scale_model_input(self.x, t)
        if hasattr(self._scheduler, "sigmas"):  # sigma / alpha
            ratio = float(self._scheduler.sigmas[self.done])
            self._alpha = (ratio * ratio + 1.0) ** -0.5
        else:
            self._alpha = float(self._scheduler.alphas_cumprod[int(t)]) ** 0.5
        self._sigma = (1.0 - self._alpha * self._alpha) ** 0.5
        return self._seen, float(t)

    def advance(self, prediction: Tensor) -> None:
        """One step down by the guided answer to `model_input`. Raises NotFiniteError on NaN or infinity."""
        if not bool(torch.isfinite(prediction).all()):
            raise NotFiniteError(f"the network gave NaN or infinity at step {self.done + 1} of {self.total}")
        t, self._prediction = self._timesteps[self.done], prediction
        self.x = self._scheduler.step(prediction, t, self.x, **self._extra, return_dict=False)[0]
        self.done += 1

    # ---- what a prediction says

    def clean(self, prediction: Tensor) -> Tensor:
        """The clean latent that a prediction for the last input stands for."""
        if self._is_v:
            return self._alpha * self._seen - self._sigma * prediction
        return (self._seen - self._sigma * prediction) / self._alpha

    def denoised(self, x: Tensor | None = None, v: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """The clean latents as the last prediction has them, the starting point before the first; or, with arguments,
        what a v predicted for `x` at the last level stands for."""
        if x is not None and v is not None:
            return self._alpha * x - self._sigma * v
        return self.x if self._prediction is None else self.clean(self._prediction)

    def coefficients(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the last input, each as long as `at`."""
        return torch.full((len(at),), self._alpha), torch.full((len(at),), self._sigma)

    def to_v(self, prediction: Tensor) -> Tensor:
        """A prediction as v, which inpainting and inversion are written for."""
        if self._is_v:
            return prediction
        return (prediction - self._sigma * self._seen) / self._alpha

    def from_v(self, v: Tensor) -> Tensor:
        """v as this model predicts."""
        return v if self._is_v else self._alpha * v + self._sigma * self._seen
