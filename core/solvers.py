"""How do DPM-Solver++ and UniPC step from noise to a clean latent?

The multistep solver of https://arxiv.org/abs/2211.01095 (algorithm 2, "2M") for networks that predict v, its first
order, which is DDIM (https://arxiv.org/abs/2010.02502), and its stochastic form (appendix A of the same paper). UniPC
(https://arxiv.org/abs/2302.04867, order 2, B2) predicts just as 2M does, and at every step first corrects the one
before with what the network says now, which costs no evaluation. All compute, number for number, what diffusers'
`DPMSolverMultistepScheduler` and `UniPCMultistepScheduler` do, and can stand in their place; those drive all other
samplers. They are here because importing diffusers takes longer than drawing a face: a server that has just been
started, and every default picture, does without.

Notation: x = alpha z + sigma eps, lambda = log(alpha / sigma), v = alpha eps - sigma z; ``sigmas`` has sigma / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LAMBDA_MIN = -5.1  # the cosine schedule ends at almost no signal: its far end is clipped, as diffusers advises


class DPMSolver:
    """One job's solver, with the interface of a diffusers scheduler; it keeps state, so it is never shared.

    ``alphas_cumprod`` is alpha^2 at each of the N training timesteps, float64. ``order`` 1 is DDIM, 2 also looks at the
    step before. ``stochastic`` adds fresh noise at every step; then ``step`` needs one generator a picture.
    ``corrected`` is UniPC, which begins at the far end itself, unclipped.
    """

    init_noise_sigma = 1.0

    def __init__(self, alphas_cumprod: Tensor, order: int = 2, stochastic: bool = False,
                 corrected: bool = False) -> None:
        betas = 1.0 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        # from here on in float32, as diffusers has it: a seed's picture is the same to the bit
        self.alphas_cumprod = torch.cumprod(1.0 - betas.float(), dim=0)
        log_snr = self.alphas_cumprod.sqrt().log() - (1.0 - self.alphas_cumprod).sqrt().log()
        self._last = len(log_snr) - (int(torch.searchsorted(log_snr.flip(0), LAMBDA_MIN)) if not corrected else 0)
        self._order, self._stochastic, self._corrected = order, stochastic, corrected
        self.timesteps, self.sigmas = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._index = 0
        self._before: tuple[float, Tensor] | None = None  # lambda and z of the step before
        self._taken: tuple[float, Tensor, tuple[float, Tensor] | None] | None = None  # what it stepped from, and how

    def set_timesteps(self, num_inference_steps: int) -> None:
        """About so many levels, from the clipped far end down; ``core.diffusion.set_timesteps`` has exactly so many."""
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
                raise ValueError("the stochastic solver needs generators, one a picture")
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
    """Each picture's noise from its own generator, so that none depends on its neighbours."""
    own = [torch.randn((1, *like.shape[1:]), generator=one, device=one.device, dtype=like.dtype) for one in generators]
    return torch.cat(own).to(like.device)
