"""How large is a step, in which direction does it go, and when is it not taken at all?

The learning rate's curve, the guard that skips steps whose gradients are not finite or far too large, and Muon
(https://kellerjordan.github.io/posts/muon/): the update of a weight matrix is its orthogonalised momentum, by a few
Newton-Schulz iterations; everything that is no matrix is left to AdamW. It does not know networks or run folders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------- curves and averages


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, decay_share: float = 0.25) -> float:
    """Warm-up / stable / decay: linear rise, flat, then ``1 - sqrt`` fall to zero over the last ``decay_share``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start = decay_start(total_steps, decay_share)
    if step < start:
        return peak
    progress = (step - start) / max(1, total_steps - start)
    return peak * max(0.0, 1.0 - math.sqrt(progress))


def decay_start(total_steps: int, decay_share: float) -> int:
    """First step of the falling part of the curve."""
    return total_steps - int(round(total_steps * decay_share))


# ------------------------------------------------------------------------------------------------------------ stepping


class StepGuard:
    """Counts the optimiser steps that were refused because the loss or the gradient was not finite.

    Nothing here waits for an accelerator: the verdict stays on the device, fused optimisers refuse the step there, and
    the counts are read once in ``limit`` steps (on a CPU, where reading is free, at once).
    """

    def __init__(self, skipped: int = 0, limit: int = 25) -> None:
        self.limit, self._calls, self._before = limit, 0, skipped
        self._skipped, self._in_a_row = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    @property
    def skipped(self) -> int:
        """All steps refused, with those before a resumed run was stopped."""
        return self._before + int(self._skipped)

    @property
    def in_a_row(self) -> int:
        return int(self._in_a_row)

    def step(
        self, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter],
        max_norm: float = 1.0,
    ) -> Tensor:
        """Clip to ``max_norm`` (L2, over all parameters), step unless NaN/inf, clear gradients; returns the norm [].

        Raises FloatingPointError when more than ``limit`` steps running were refused.
        """
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        bad = ~torch.isfinite(norm)
        for optimizer in [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):  # how torch marks a fused optimiser
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
                optimizer.step()
            elif not bool(bad):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._skipped = self._skipped.to(bad.device) + bad
        self._in_a_row = (self._in_a_row.to(bad.device) + 1) * bad
        self._calls += 1
        if (bad.device.type == "cpu" or self._calls % self.limit == 0) and self.in_a_row > self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps running had no finite gradient; lower --learning-rate or try --precision no"
            )
        return norm


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration: they lift small singular values fastest
ITERATIONS = 5


def orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices [a, b] -> the same: the same singular vectors, all singular values between about 0.7 and 1.2. 0 stays 0.

    Each iteration is X <- (p1 + p2 X X^T + p3 (X X^T)^2) X. All these factors are polynomials of the first X X^T, so
    they are multiplied with each other, as the smaller matrices that they are, and with X once, at the end: for a 3x3
    convolution, nine times as wide as high, a fraction of the work. And whatever has equally large X X^T, long or
    short, iterates together: a GPU is told a seventh of what it would be otherwise.
    """
    found: list[Tensor] = [torch.empty(0)] * len(matrices)
    by_height: dict[int, dict[tuple[torch.Size, bool], list[int]]] = {}
    for place, one in enumerate(matrices):
        key = (one.shape, one.shape[0] > one.shape[1])
        by_height.setdefault(min(one.shape), {}).setdefault(key, []).append(place)
    for alike in by_height.values():
        wide = [torch.stack([matrices[place] for place in places]).float() for places in alike.values()]
        wide = [x.mT if upright else x for x, (_, upright) in zip(wide, alike, strict=True)]
        wide = [x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-12) for x in wide]
        factors = _factor(torch.cat([torch.bmm(x, x.mT) for x in wide])).split([len(x) for x in wide])
        for x, factor, ((_, upright), places) in zip(wide, factors, alike.items(), strict=True):
            done = torch.bmm(factor, x)
            for place, one in zip(places, (done.mT if upright else done).unbind(), strict=True):
                found[place] = one.to(matrices[place].dtype)
    return found


def _factor(gram: Tensor) -> Tensor:
    """What all iterations together multiply matrices with, from their X X^T. Shapes: [n, s, s] -> [n, s, s]."""
    product, (p1, p2, p3) = None, COEFFICIENTS
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=p2, alpha=p3)
        factor.diagonal(dim1=1, dim2=2).add_(p1)
        product = factor if product is None else torch.bmm(factor, product)
        if iteration + 1 < ITERATIONS:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert product is not None
    return product


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` for kernels of convolutions too ([out, in, h, w] is read as [out, in h w]).

    ``lr`` and ``weight_decay`` mean what they mean to AdamW. Like a fused optimiser of torch it leaves everything as it
    was in a step whose ``found_inf`` [] is not 0, without asking the device.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95,
                 weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if wrong := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim < 2]:
            raise ValueError(f"Muon takes matrices and kernels, got parameters of shape {wrong}; give them to AdamW")
        self._step_supports_amp_scaling = True
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients; what has none stays."""
        if closure is not None:
            raise ValueError("Muon evaluates no closure; call backward() before step()")
        for group in self.param_groups:
            if weights := [weight for weight in group["params"] if weight.grad is not None]:
                self._step(weights, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, weights: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        """All weights of a group, many at once: on a GPU hundreds of small kernels would cost more than their work."""
        device = weights[0].device
        goes = torch.ones((), device=device) if self.found_inf is None else (self.found_inf == 0).float()
        well, nothing = goes > 0, torch.zeros((), device=device)
        grads = [torch.where(well, weight.grad, nothing) for weight in weights]  # type: ignore[arg-type]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_mul_(momenta, torch.where(well, momentum, 1.0))
        torch._foreach_add_(momenta, grads)
        ahead = torch._foreach_add(grads, momenta, alpha=momentum)  # Nesterov
        updates = _all_orthogonalised([one.flatten(1) for one in ahead])
        torch._foreach_mul_(updates, [0.2 * max(one.shape) ** 0.5 for one in updates])
        torch._foreach_mul_(updates, lr * goes)
        torch._foreach_mul_(weights, 1 - lr * goes * weight_decay)
        torch._foreach_sub_(weights, [one.view_as(weight) for one, weight in zip(updates, weights, strict=True)])


def _all_orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Where several processes train together each does its share, and all get all."""
    several = dist.is_available() and dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    found = [torch.zeros_like(one) if several else one for one in matrices]
    mine = range(rank, len(matrices), count)
    for place, one in zip(mine, orthogonalised([matrices[place] for place in mine]), strict=True):
        found[place] = one
    if not several:
        return found
    flat = torch.cat([one.flatten() for one in found])
    dist.all_reduce(flat)  # exact: to every number one process alone adds something
    return [piece.view(one.shape) for piece, one in zip(flat.split([one.numel() for one in found]), found, strict=True)]


def matrices(model: nn.Module, edges: Iterable[str]) -> list[nn.Parameter]:
    """The weights for Muon: trainable matrices and kernels, without those of the modules named in ``edges``, through
    which data enters or leaves."""
    return [weight for name, weight in model.named_parameters()
            if weight.requires_grad and weight.ndim in (2, 4) and name.split(".")[0] not in set(edges)]
