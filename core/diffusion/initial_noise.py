"""From which noise does an image start?

Image i depends on seed + i alone. A variation lies between two seeds' noises, an interpolation likewise, on the great
circle, because a straight line would leave the shell that Gaussian noise lives on. It does not know what happens after
the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.engine import NUM_SEEDS, GenerationRequest


def slerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """From one noise to another along the great circle: in between, too, the length is that of Gaussian noise.

    sin((1 - w) a) / sin(a) start + sin(w a) / sin(a) end, a the angle between them (Shoemake, SIGGRAPH 1985). Exactly
    the ends at 0 and 1; a straight line where the angle is next to nothing. Shapes: both [C, h, w].
    """
    if weight in (0.0, 1.0):
        return end if weight else start
    cosine = torch.nn.functional.cosine_similarity(start.double().flatten(), end.double().flatten(), dim=0)
    angle = math.acos(max(-1.0, min(1.0, float(cosine))))
    if math.sin(angle) < 1e-4:
        return torch.lerp(start, end, weight)
    return (start * math.sin((1 - weight) * angle) + end * math.sin(weight * angle)) / math.sin(angle)


@dataclass(frozen=True)
class InitialNoise:
    """What tells the images of one request apart: seed, generator (at its place after the noise), noise, and `weights`,
    the share of the way to the target of an interpolation (else all 0).

    Shapes: noise [B, C, h, w].
    """

    seeds: list[int]
    generators: list[torch.Generator]
    noise: Tensor
    weights: list[float]


def starting_noise(request: GenerationRequest, shape: Sequence[int]) -> InitialNoise:
    """The noise of every image of a request; `latents` replace that of the seeds where they are to be noise.

    Variations take all further random numbers from the generator of their variation seed, so that a strength of 1 is
    that seed's image. An interpolation takes them from the one seed: they are the same in every image.

    Raises ValueError for an interpolation over one image without a weight, or over more with one.
    """
    count, target = request.num_candidates, request.interpolate_to
    share = request.variation_strength
    apart = 0 if share > 0 or target is not None else 1
    seeds = [(request.seed + i * apart) % NUM_SEEDS for i in range(count)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(tuple(shape), generator=one) for one in generators]
    if request.latents is not None and request.start == 0:
        noise = [torch.as_tensor(np.array(one), dtype=torch.float32) for one in request.latents]
    weights = [0.0] * count
    if share > 0:
        generators = [torch.Generator().manual_seed((request.variation_seed + i) % NUM_SEEDS) for i in range(count)]
        noise = [slerp(one, torch.randn(tuple(shape), generator=other), share)
                 for one, other in zip(noise, generators, strict=True)]
    if target is not None:
        if (count > 1) == (target.weight is not None):
            raise ValueError(f"interpolate_to is for several images, or for one at a weight; got {count} images")
        weights = [i / (count - 1) for i in range(count)] if target.weight is None else [target.weight]
        end = None
        if target.latent is not None:
            end = torch.as_tensor(np.array(target.latent), dtype=torch.float32)
        elif target.seed is not None:
            end = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(target.seed))
        if end is not None:
            noise = [slerp(one, end, weight) for one, weight in zip(noise, weights, strict=True)]
    return InitialNoise(seeds, generators, torch.stack(noise), weights)
