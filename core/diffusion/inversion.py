"""From which noise would a sampler have made this latent?

A sampler run backwards, with a few fixed-point rounds a step (https://arxiv.org/abs/2309.04907 shows why one is not
enough), so that generating on from the noise gives the image back. It does not know pixels or texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.diffusion.conditioning import Condition, Model
from core.diffusion.guidance import Guidance
from core.diffusion.run import not_finite
from core.diffusion.run_batch import RunBatch
from core.diffusion.sampling import NotFiniteError
from core.diffusion.schedule import NoiseSchedule
from core.nn.memory import out_of_memory


class Inversion:
    """The way back from a clean latent to the noise that DDIM turns into it (https://arxiv.org/abs/2105.05233, app. F).

    Turned inside out as `Denoising` is:

        while not inversion.finished:
            x, level = inversion.model_input()
            inversion.advance(prediction of the network for x at level)

    A step of DDIM from x to x', (alpha, sigma) to (alpha', sigma'), under v-prediction is x' = c x + d v(x) with
    c = alpha alpha' + sigma sigma' and d = alpha sigma' - sigma alpha'. Back, x = (x' - d v(x)) / c wants v where it is
    not known yet. Taking v(x') for it is plain inversion; asking again at the x so found, `rounds` times in all, is its
    fixed point (https://arxiv.org/abs/2309.04907), which DDIM at the same steps takes back to the image.

    Shapes: z and x [B, C, h, w], normalized.
    """

    def __init__(self, z: Tensor, schedule: NoiseSchedule, timesteps: Tensor, rounds: int) -> None:
        flow = schedule.kind == "flow"
        self._levels = (timesteps - int(flow)).float().flip(0)  # from the data up to the noise
        alpha, sigma = schedule.coefficients(self._levels)
        before = torch.cat([alpha.new_ones(1), alpha[:-1]]), torch.cat([sigma.new_zeros(1), sigma[:-1]])
        self._c = torch.ones_like(alpha) if flow else alpha * before[0] + sigma * before[1]
        self._d = before[1] - sigma if flow else alpha * before[1] - sigma * before[0]
        self._rounds, self._round, self.done = rounds, 0, 0
        self._reached, self.x = z, z

    @property
    def total(self) -> int:
        return len(self._levels)

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def model_input(self) -> tuple[Tensor, float]:
        """What the network is to look at next, and its timestep in [0, 1000)."""
        return self.x, float(self._levels[self.done])

    def advance(self, prediction: Tensor) -> None:
        """One evaluation further. Raises NotFiniteError on NaN or infinity."""
        if not bool(torch.isfinite(prediction).all()):
            raise NotFiniteError(f"the network gave NaN or infinity at step {self.done + 1} of {self.total}")
        self.x = (self._reached - self._d[self.done] * prediction) / self._c[self.done]
        self._round += 1
        if self._round == self._rounds:
            self._reached, self._round, self.done = self.x, 0, self.done + 1


@dataclass
class RunningInversion:
    """An `Inversion` of one image with the network that it asks: on its way, or `finished`."""

    inversion: Inversion
    predict: Callable[[Tensor, float], Tensor]

    @property
    def finished(self) -> bool:
        return self.inversion.finished

    @torch.inference_mode()
    def advance(self, evaluations: int = 1) -> None:
        """So many more calls of the network, fewer at the end. Raises what `predict` raises."""
        for _ in range(evaluations):
            if not self.finished:
                self.inversion.advance(self.predict(*self.inversion.model_input()))

    @property
    def latent(self) -> np.ndarray:
        """The noise as far as it is known, float32 [C, h, w]."""
        return self.inversion.x[0].float().numpy()


def inverting(inversion: Inversion, condition: Condition, denoise: Model, device: torch.device) -> RunningInversion:
    """An inversion of one image by this network at guidance scale 1. Its `advance` raises JobError (`not_finite`,
    `out_of_memory`)."""
    batch = RunBatch([Guidance(condition)])

    def predict(x: Tensor, timestep: float) -> Tensor:
        prediction, lost = batch.predict(denoise, x.to(device), torch.tensor([timestep], device=device))
        if lost:
            raise out_of_memory()
        if not bool(torch.isfinite(prediction).all()):
            raise not_finite(NotFiniteError(f"NaN or infinity on the way back, at step {inversion.done + 1}"))
        return prediction

    return RunningInversion(inversion, predict)
