"""Which losses pit a generator against a discriminator, which penalties keep them near each other, and has it failed?

Losses and penalties are functions of logits, of batches or of a network; each has the equation that it is. Collapse is
measured: how much faces of a batch differ, against real ones, and whether the discriminator is right about everything.
It does not know which networks are trained.

Sources: the saturating and non-saturating loss https://arxiv.org/abs/1406.2661, the relativistic pairing loss with R1
and R2 https://arxiv.org/abs/2501.05441, R1 https://arxiv.org/abs/1801.04406, path length and lazy regularisation
https://arxiv.org/abs/1912.04958.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("relativistic", "softplus")

# -------------------------------------------------------------------------------------------------------------- losses


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "softplus") -> Tensor:
    """What the discriminator minimises, of its logits.

    softplus: mean softplus(-D(x)) + mean softplus(D(G(z))), the cross-entropy of https://arxiv.org/abs/1406.2661
    (eq. 1). relativistic: mean softplus(-(D(x) - D(G(z)))), a real image against a generated one
    (https://arxiv.org/abs/2501.05441, section 2).
    Shapes: real, fake [B]. Raises ValueError for another ``kind``.
    """
    if kind == "softplus":
        return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()
    return _paired(real, fake, kind)


def generator_loss(real: Tensor | None, fake: Tensor, kind: str = "softplus") -> Tensor:
    """What the generator minimises: softplus: mean softplus(-D(G(z))), which does not saturate
    (https://arxiv.org/abs/1406.2661, section 3); relativistic: mean softplus(-(D(G(z)) - D(x))). Shapes: as above."""
    if kind == "softplus":
        return F.softplus(-fake.float()).mean()
    if real is None:
        raise ValueError("the relativistic loss compares with logits of real images; got none")
    return _paired(fake, real, kind)


def _paired(better: Tensor, worse: Tensor, kind: str) -> Tensor:
    if kind != "relativistic":
        raise ValueError(f"the loss is {kind!r}; it must be one of {', '.join(LOSSES)}")
    return F.softplus(worse.float() - better.float()).mean()


# ----------------------------------------------------------------------------------------------------------- penalties


def gradient_penalty(critic: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """E |grad_x D(x)|^2 over a batch: R1 at real images, R2 at generated ones (https://arxiv.org/abs/1801.04406,
    eq. 9 and 10, without gamma / 2). Differentiable with respect to the critic's weights.

    Shapes: inputs [B, ...], critic -> [B]; returns [].
    """
    inputs = inputs.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(inputs).sum(), inputs, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


def path_lengths(images: Tensor, w: Tensor, noise: Tensor) -> Tensor:
    """|J_w^T y| of each image with y ~ N(0, I) (https://arxiv.org/abs/1912.04958, eq. 4), y divided by the root of
    the number of places, so that the length does not grow with the size of the image; the mean over the layers where
    w has one vector for each.

    Shapes: images, noise [B, C, h, w]; w [B, D] or [B, layers, D], which ``images`` were made of; returns [B].
    """
    scaled = noise / (images.shape[2] * images.shape[3]) ** 0.5
    (gradient,) = torch.autograd.grad((images * scaled).sum(), w, create_graph=True)
    squares = gradient.float().square().sum(-1)
    return (squares if squares.ndim == 1 else squares.mean(1)).sqrt()


def path_length_penalty(lengths: Tensor, average: Tensor, decay: float = 0.99) -> tuple[Tensor, Tensor]:
    """(E (|J_w^T y| - a)^2, the new a): a is the running mean of the lengths (https://arxiv.org/abs/1912.04958, eq. 4
    and section 3.2). An ``average`` of 0 is none yet and becomes that of this batch: risen to slowly from 0, it would
    pull all lengths to 0 first, and with them the differences between pictures. Shapes: lengths [B], average [];
    returns [], []."""
    mean = lengths.detach().mean()
    average = torch.where(average > 0, average.lerp(mean, 1.0 - decay), mean)
    return (lengths - average).square().mean(), average


# ------------------------------------------------------------------------------------------------------------ collapse


def diversity(fake: Tensor, real: Tensor) -> float:
    """How much generated images differ from each other, relative to real ones: mean distance over all pairs of each
    batch, in pixels. 1: as much; 0: all are one image. Shapes: both [B >= 2, C, H, W]."""
    mean_fake, mean_real = (torch.pdist(one.detach().float().flatten(1)).mean() for one in (fake, real))
    return float(mean_fake / mean_real.clamp_min(1e-12))


@dataclass(frozen=True)
class CollapseBounds:
    """When a run counts as collapsed: less ``diversity`` than this, or a discriminator that was right about more than
    ``accuracy`` of its images in each of the last ``patience`` windows, so that the generator learns nothing."""

    diversity: float = 0.5
    accuracy: float = 0.99
    patience: int = 8


def collapse_sentence(found: float, accuracies: list[float], bounds: CollapseBounds | None = None) -> str:
    """What has failed, as one sentence; "" where nothing has. ``accuracies``: of the windows so far, in order."""
    bounds = bounds or CollapseBounds()
    if not found >= bounds.diversity:  # NaN is not
        return (f"the generator has collapsed: its faces differ {found:.2f} times as much as real ones (bound "
                f"{bounds.diversity}); go back to an earlier checkpoint or lower --learning-rate")
    last = accuracies[-bounds.patience:]
    if len(last) == bounds.patience and min(last) > bounds.accuracy:
        return (f"the discriminator is right about {100 * min(last):.1f} % of all images or more for {len(last)} "
                "windows: the generator learns nothing from it; lower --learning-rate")
    return ""
