"""What do a few steps get wrong in every picture alike, and what mends it?

A solver of few steps ends too near to the mean of what the network could have said: latents that spread too little
around a mean that is not that of photographs. Both errors are the same for all pictures of one number of steps, so they
are measured once and taken back: x' = mean of photographs + gain (x - mean of drawn), with the gain that gives the
deviations their spread. Between two measured numbers of steps the correction is interpolated, and it is gone at twice
the last one. It knows neither networks nor solvers.

Exposure bias, which makes samplers drift, and scaling against it: https://arxiv.org/abs/2308.15321. Here it is taken
back once, at the end, where what it should have been is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoint import component_hash, git_commit, load_component, read_index, save_component

COMPONENT = "correction"


@dataclass(frozen=True)
class Correction:
    """For each of k measured numbers of steps, ascending: gain [k] and shift [k, C, h, w] of whitened latents."""

    steps: tuple[int, ...]
    gain: Tensor
    shift: Tensor

    def __call__(self, x: Tensor, num_inference_steps: int) -> Tensor:
        """gain x + shift for clean latents [B, C, h, w] that so many steps ended with; the same beyond the last."""
        gain, shift = self.at(num_inference_steps)
        return x if shift is None else x * gain + shift.to(x)

    def at(self, num_inference_steps: int) -> tuple[float, Tensor | None]:
        """(gain, shift [C, h, w]) for a number of steps, linear in its logarithm; (1, None) where there is none."""
        knots = [*self.steps, 2 * self.steps[-1]]
        count = max(num_inference_steps, knots[0])
        if count >= knots[-1]:
            return 1.0, None
        i = max(i for i, knot in enumerate(knots) if knot <= count)
        share = math.log(count / knots[i]) / math.log(knots[i + 1] / knots[i])
        gains = torch.cat([self.gain, torch.ones(1)])  # at the last knot there is nothing to mend
        shifts = torch.cat([self.shift, torch.zeros_like(self.shift[:1])])
        return float(torch.lerp(gains[i], gains[i + 1], share)), torch.lerp(shifts[i], shifts[i + 1], share)


def fit_correction(drawn: Mapping[int, Tensor], photographs: Tensor) -> Correction:
    """From whitened latents that each number of steps drew, and those of photographs, each [N, C, h, w].

    The captions of the drawn ones have to be those of photographs, or it would mend what was asked for.
    """
    if not drawn or min(drawn) < 1 or min(len(photographs), *map(len, drawn.values())) < 2:
        raise ValueError("at least two latents of photographs and of one number of steps are needed")
    wanted, spread = photographs.float().mean(0), _spread(photographs)
    gains, shifts = [], []
    for _, latents in sorted(drawn.items()):
        gains.append(spread / _spread(latents).clamp_min(1e-6))
        shifts.append(wanted - gains[-1] * latents.float().mean(0))
    return Correction(tuple(sorted(drawn)), torch.stack(gains), torch.stack(shifts))


def _spread(latents: Tensor) -> Tensor:
    """Root mean square of the deviations from the mean of each place and channel, unbiased: [N, C, h, w] -> []."""
    return latents.float().var(0).mean().sqrt()


def save_correction(correction: Correction, folder: str | Path) -> None:
    """Write it into a model folder as the component ``correction`` of the UNet there."""
    save_component(folder, COMPONENT, {"gain": correction.gain, "shift": correction.shift},
                   {"steps": list(correction.steps), "unet": component_hash(folder, "unet")},
                   extra={"commit": git_commit(Path(__file__).parent)})


def load_correction(folder: str | Path) -> Correction | None:
    """The correction of a model folder; None when it has none, or one that was measured on another UNet."""
    if COMPONENT not in read_index(folder)["components"]:
        return None
    config, state = load_component(folder, COMPONENT)
    if config["unet"] != component_hash(folder, "unet"):
        return None
    return Correction(tuple(config["steps"]), state["gain"].float(), state["shift"].float())
