"""How does drawing begin from something that is already there: another noise, a picture, part of a picture?

`starting_noise` gives every image its noise, mixed for variations and interpolations by slerp. `Redraw` keeps what a
mask protects: at every step the network's prediction of the clean latent is replaced there by the latent of the
picture, which is the projection of DDNM (https://arxiv.org/abs/2212.00490, eq. 13) onto a mask. Under the solver that
leaves, at every level, the noised latent of the picture in the protected part, as RePaint
(https://arxiv.org/abs/2201.09865) and blended latent diffusion (https://arxiv.org/abs/2206.02779) put it there by hand;
but its noise is the image's own from beginning to end, so this works with every sampler, those that remember earlier
predictions included, and mixing at a soft edge loses no variance. At the end the protected pixels themselves are put
back, and the drawn part is fitted to them.

It does not know networks, prompts, files or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.diffusion import Denoising, NoiseSchedule, NotFiniteError
from core.engine import NUM_SEEDS, DrawRequest

FEATHER = 4  # pixels inside the drawn part over which it takes over from the picture


# ---- noise -----------------------------------------------------------------------------------------------------------


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
class Start:
    """What tells the images of one request apart: seed, generator (at its place after the noise), noise, and `weights`,
    the share of the way to the target of an interpolation (else all 0).

    Shapes: noise [B, C, h, w].
    """

    seeds: list[int]
    generators: list[torch.Generator]
    noise: Tensor
    weights: list[float]


def starting_noise(request: DrawRequest, shape: Sequence[int]) -> Start:
    """The noise of every image of a request; `latents` replace that of the seeds where they are to be noise.

    Variations take all further random numbers from the generator of their variation seed, so that a strength of 1 is
    that seed's picture. An interpolation takes them from the one seed: they are the same in every image.

    Raises ValueError for an interpolation over one image without a weight, or over more with one.
    """
    count, target = request.num_images, request.interpolate_to
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
    return Start(seeds, generators, torch.stack(noise), weights)


# ---- a picture's noise ----------------------------------------------------------------------------------------------


class Inversion:
    """The way back from a clean latent to the noise that DDIM turns into it (https://arxiv.org/abs/2105.05233, app. F).

    Turned inside out as `Denoising` is:

        while not inversion.finished:
            x, level = inversion.model_input()
            inversion.advance(prediction of the network for x at level)

    A step of DDIM from x to x', (alpha, sigma) to (alpha', sigma'), under v-prediction is x' = c x + d v(x) with
    c = alpha alpha' + sigma sigma' and d = alpha sigma' - sigma alpha'. Back, x = (x' - d v(x)) / c wants v where it is
    not known yet. Taking v(x') for it is plain inversion; asking again at the x so found, `rounds` times in all, is its
    fixed point (https://arxiv.org/abs/2309.04907), which DDIM at the same steps takes back to the picture.

    Shapes: z and x [B, C, h, w], whitened.
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
class Inverting:
    """An `Inversion` of one picture with the network that it asks: on its way, or `finished`."""

    way: Inversion
    predict: Callable[[Tensor, float], Tensor]

    @property
    def finished(self) -> bool:
        return self.way.finished

    @torch.inference_mode()
    def advance(self, evaluations: int = 1) -> None:
        """So many more calls of the network, fewer at the end. Raises what `predict` raises."""
        for _ in range(evaluations):
            if not self.finished:
                self.way.advance(self.predict(*self.way.model_input()))

    @property
    def latent(self) -> np.ndarray:
        """The noise as far as it is known, float32 [C, h, w]."""
        return self.way.x[0].float().numpy()


# ---- part of a picture -----------------------------------------------------------------------------------------------


class Redraw:
    """A picture of which only what a mask shows is drawn anew.

    `pixels` uint8 [H, W, 3] is the picture, `mask` bool [H, W] is True where it is drawn anew, `z` [C, h, w] is the
    picture's whitened latent.
    """

    def __init__(self, pixels: np.ndarray, mask: np.ndarray, z: Tensor) -> None:
        if mask.shape != pixels.shape[:2] or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(f"mask must be bool {list(pixels.shape[:2])} with something True, got {mask.dtype} "
                             f"{list(mask.shape)} with {int(np.count_nonzero(mask))}")
        self.mask = mask
        self._pixels, self._z = pixels, z
        self._kept = 1.0 - latent_mask(mask, z.shape[-1])
        self._blend = feather(mask, FEATHER)[..., None]
        self._membrane = membrane(mask)

    def constrain(self, denoising: Denoising, prediction: Tensor) -> Tensor:
        """The prediction for `denoising`'s last input with the picture's latent where the mask protects it.

        Both kinds of prediction are x = ... - sigma * prediction in the clean latent, so a change of the latent by d is
        a change of the prediction by -d / sigma. Shapes: [B, C, h, w].
        """
        x, level = denoising.seen
        at = torch.full((len(x),), level)
        z = denoising.schedule.denoised(x, prediction, at)
        sigma = denoising.schedule.coefficients(at)[1].view(-1, 1, 1, 1)
        return prediction + self._kept * (z - self._z) / sigma

    def composite(self, drawn: np.ndarray) -> np.ndarray:
        """The picture with the drawn part in it. Protected pixels are those of the picture, byte for byte.

        The drawn part is shifted by a membrane (the solution of Laplace's equation) that meets the picture at the seam,
        which is Poisson image editing with the drawing as its guide (Perez, Gangnet, Blake, SIGGRAPH 2003), and faded
        in over FEATHER pixels. Shapes: uint8 [B, H, W, 3] -> the same.
        """
        return np.stack([self._composite(one) for one in drawn])

    def _composite(self, drawn: np.ndarray) -> np.ndarray:
        shift = self._membrane(self._pixels.astype(np.float32) - drawn)
        mixed = self._pixels + self._blend * (drawn + shift - self._pixels)
        result = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
        result[~self.mask] = self._pixels[~self.mask]
        return result


def latent_mask(mask: np.ndarray, size: int) -> Tensor:
    """How far each latent cell is free, 1 for all that touch a masked pixel, one half around them.

    A decoder draws every pixel from several cells: a stroke confined to its own cells would be drawn by half.
    Shapes: bool [H, W] -> float32 [size, size].
    """
    factor = mask.shape[0] // size
    cells = torch.from_numpy(mask.reshape(size, factor, size, factor).any((1, 3)))[None, None].float()
    around = torch.nn.functional.max_pool2d(cells, 3, 1, 1)
    return torch.maximum(cells, 0.5 * around)[0, 0]


def feather(mask: np.ndarray, width: int) -> np.ndarray:
    """Weight of the drawn part: 0 outside the mask, rising smoothly to 1 at `width` pixels inside, or at half the depth
    of masks too thin for that. Shapes: bool [H, W] -> float32 [H, W]."""
    if mask.all():
        return np.ones(mask.shape, np.float32)
    from scipy import ndimage  # here, because a server starts sooner without

    depth = ndimage.distance_transform_edt(mask)
    rise = np.clip(depth / max(1.0, min(width, depth.max() / 2)), 0, 1)
    return (rise * rise * (3 - 2 * rise)).astype(np.float32)


def membrane(mask: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that continues values outside the mask smoothly into it: 0 outside, and inside where each pixel is the
    mean of its neighbours. Zero where there is no outside. Shapes: float32 [H, W, 3] -> the same.
    """
    if mask.all():
        return np.zeros_like
    from scipy import sparse
    from scipy.sparse.linalg import splu

    height, width = mask.shape
    number = np.full(mask.shape, -1)
    number[mask] = np.arange(np.count_nonzero(mask))
    ys, xs = np.nonzero(mask)
    rows, columns, degree = [], [], np.zeros(len(ys))
    edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # unknowns beside the outside, and where that is
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        y, x = ys + dy, xs + dx
        there = (0 <= y) & (y < height) & (0 <= x) & (x < width)
        degree += there
        inside = there.copy()
        inside[there] = mask[y[there], x[there]]
        rows.append(np.flatnonzero(inside))
        columns.append(number[y[inside], x[inside]])
        beside = there & ~inside
        edges.append((np.flatnonzero(beside), y[beside], x[beside]))
    links = np.concatenate(rows), np.concatenate(columns)
    matrix = sparse.csc_matrix((-np.ones(len(links[0])), links), (len(ys), len(ys))) + sparse.diags(degree)
    solver = splu(matrix.tocsc())

    def solve(outside: np.ndarray) -> np.ndarray:
        known = np.zeros((len(ys), outside.shape[-1]))
        for unknown, y, x in edges:
            known[unknown] += outside[y, x]
        found = np.zeros(outside.shape, np.float32)
        found[mask] = solver.solve(known)
        return found

    return solve
