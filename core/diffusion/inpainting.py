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

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from core.diffusion.sampling import Denoising

FEATHER = 4  # pixels inside the drawn part over which it takes over from the picture


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
