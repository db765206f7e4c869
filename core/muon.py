"""How does a step use that a weight is a matrix?

Muon: the momentum of every matrix is replaced by the nearest matrix with all singular values equal (roughly), so that
rare directions of the gradient count as much as frequent ones. Vectors, and layers at the edge of the network, are no
business of it. It does not know which network it trains.

Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (momentum, quintic Newton-Schulz iteration);
Liu et al. 2025, https://arxiv.org/abs/2502.16982, eq. 4 (the factor that gives an update the size of AdamW's, so that
learning rates of AdamW hold).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration: they lift small singular values fastest
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """[..., a, b] -> the same: the same singular vectors, all singular values between about 0.7 and 1.2. 0 stays 0.

    Each iteration is X <- (p1 + p2 X X^T + p3 (X X^T)^2) X. All these factors are polynomials of the first X X^T, so
    they are multiplied with each other, as the smaller matrices that they are, and with X once, at the end: for a 3x3
    convolution, nine times as wide as high, a fraction of the work.
    """
    upright = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if upright else matrices).float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    gram = x @ x.mT
    one = torch.eye(gram.shape[-1], device=gram.device)
    product, (p1, p2, p3) = one, COEFFICIENTS
    for _ in range(ITERATIONS):
        factor = p1 * one + p2 * gram + p3 * (gram @ gram)
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return (x.mT if upright else x).to(matrices.dtype)


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
        chosen = [(weight, group) for group in self.param_groups for weight in group["params"]
                  if weight.grad is not None]
        updates = _all_orthogonalised([self._ahead(weight, group["momentum"]) for weight, group in chosen])
        for (weight, group), update in zip(chosen, updates, strict=True):
            rate = group["lr"] * self._goes(weight.device)
            weight.mul_(1 - rate * group["weight_decay"])
            weight.sub_(rate * 0.2 * max(update.shape) ** 0.5 * update.view_as(weight))

    def _goes(self, device: torch.device) -> Tensor:
        """1 for a step that is done, 0 for one that is refused."""
        return torch.ones((), device=device) if self.found_inf is None else (self.found_inf == 0).float()

    def _ahead(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """The weight's momentum, brought up to date and looked at one step ahead (Nesterov), as a matrix."""
        assert weight.grad is not None
        state, goes = self.state[weight], self._goes(weight.device) > 0
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        grad = torch.where(goes, weight.grad, 0.0)
        state["momentum"].mul_(torch.where(goes, momentum, 1.0)).add_(grad)
        return (grad + momentum * state["momentum"]).flatten(1)


def _all_orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Those of one shape in one go; where several processes train together each does its share, and all get all."""
    several = dist.is_available() and dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    found = [torch.zeros_like(one) if several else one for one in matrices]
    alike: dict[torch.Size, list[int]] = {}
    for place in range(rank, len(matrices), count):
        alike.setdefault(matrices[place].shape, []).append(place)
    for places in alike.values():
        for place, one in zip(places, orthogonalised(torch.stack([matrices[place] for place in places])), strict=True):
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
