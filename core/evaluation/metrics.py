"""How far are two sets of images apart, and what is an image short of?

Pure functions of arrays: distances between feature sets (Frechet, polynomial MMD), precision and recall, the share of
fine detail, the degradations that a distance must notice, agreement with asserted facts, closeness to training
images, reconstruction figures. It knows neither the attribute classifier whose features it compares nor where images
come from.

Frechet distance: https://arxiv.org/abs/1706.08500. Unbiased polynomial MMD: https://arxiv.org/abs/1801.01401.
Bias of the Frechet distance in n (why every floor here has the same n): https://arxiv.org/abs/1911.07023.
Precision and recall of a generative model: https://arxiv.org/abs/1904.06991.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from core.imaging.spectrum import Array, Pictures
from core.nn.layers import to_images, to_pixels

if TYPE_CHECKING:
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

LADDER = ("blur_96", "blur_64", "blur_32", "jpeg_20", "noise", "half_mean_face", "warp_3", "warp_5")
NEIGHBOURS = 3  # for precision and recall, as in the paper
BLURS = ("blur_96", "blur_64", "blur_32")
MS_SSIM_WEIGHTS = (0.0517, 0.3295, 0.3462, 0.2726)  # (0.0448, 0.2856, 0.3001, 0.2363) over their sum


# ------------------------------------------------------------------------------------------- distances between two sets


def _covariance_factor(x: Array) -> Array:
    """A factor S of the covariance, S^T S, with as few rows as that takes. Shapes: [N, D] -> [min(N, D), D]."""
    centred: Array = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return centred if len(x) <= x.shape[1] else np.asarray(np.linalg.qr(centred, mode="r"))


def frechet_distance(a: Array, b: Array) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets. Shapes: a [N, D], b [M, D], N and M >= 2.

    |ma - mb|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)). With Ca = A^T A and Cb = B^T B, the trace of the root is the sum of
    the singular values of A B^T, which has a row an image (https://arxiv.org/abs/2009.14075): no matrix root, no
    added epsilon for fewer images than features, and 8 images of 2048 features take no longer than an 8 x 8 matrix.

    Biased upwards by about 1/N + 1/M: compare only numbers with the same N and M.
    """
    _check_sets(a, b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    gap, factor_a, factor_b = a.mean(0) - b.mean(0), _covariance_factor(a), _covariance_factor(b)
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    return float(max(gap @ gap + np.square(factor_a).sum() + np.square(factor_b).sum() - 2.0 * cross, 0.0))


def euclidean_distances(a: Array, b: Array) -> Array:
    """Between all rows of two sets. Shapes: [N, D], [M, D] -> [N, M]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(squared.clip(0))


def mean_pairwise_distance(features: Array) -> float:
    """How much the members of a set differ: the mean over all pairs. Shapes: [N, D], N >= 2."""
    return float(euclidean_distances(features, features)[np.triu_indices(len(features), 1)].mean())


def largest_difference(one: Pictures, other: Pictures) -> int:
    """Of two sets of images, in grey levels. Shapes: uint8, both the same."""
    return int(np.abs(one.astype(int) - other).max())


def polynomial_mmd(a: Array, b: Array) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3; zero in the mean for equal distributions, so it may be < 0.

    Shapes: a [N, D], b [M, D], N and M >= 2.
    """
    _check_sets(a, b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def kernel(x: Array, y: Array) -> Array:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def within(x: Array) -> float:
        gram = kernel(x, x)
        return float((gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2.0 * float(kernel(a, b).mean())


def precision_and_recall(made: Array, real: Array, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall): the share of what was made that lies among real images, and of real images that lie
    among what was made (https://arxiv.org/abs/1904.06991, eq. 1 and 2).

    A point lies among others when it is no further from one of them than that one's k-th nearest neighbour among them.
    Shapes: made [N, D], real [M, D], N and M > k. Depends on N and M: compare only numbers with the same.
    """
    _check_sets(made, real)
    if min(len(made), len(real)) <= k:
        raise ValueError(f"more than {k} points of each set are needed, got {len(made)} and {len(real)}")
    ours, theirs = (torch.from_numpy(np.asarray(points, np.float64)) for points in (made, real))

    def share_among(points: Tensor, others: Tensor) -> float:
        radii = torch.cdist(others, others).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
        return float((torch.cdist(points, others) <= radii).any(dim=1).double().mean())

    return share_among(ours, theirs), share_among(theirs, ours)


def _check_sets(a: Array, b: Array) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"two feature sets [N >= 2, D] with one D are needed, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features are not finite; the network or the images behind them are broken")


# ------------------------------------------------------------------------------------------------------- degradations


def resample(pictures: Pictures, size: int, batch: int = 256) -> Pictures:
    """Shrink to ``size`` and enlarge again, as a source of that resolution looks. Shapes: [N, S, S, 3] -> the same."""
    out = np.empty_like(pictures)
    for start in range(0, len(pictures), batch):
        x = to_images(pictures[start : start + batch])
        small = functional.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        back = functional.interpolate(small, x.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
        out[start : start + batch] = to_pixels(back)
    return out


def warp(pictures: Pictures, pixels: float, seed: int = 0, batch: int = 256) -> Pictures:
    """Faces out of shape, as sharp as before: every point moved by about ``pixels`` along each axis, smoothly (bicubic
    between 7 x 7 normal numbers). Shapes: [N, S, S, 3] -> the same."""
    generator, out = torch.Generator().manual_seed(seed), np.empty_like(pictures)
    for start in range(0, len(pictures), batch):
        x = to_images(pictures[start : start + batch])
        knots = torch.randn(len(x), 2, 7, 7, generator=generator) * (2.0 * pixels / x.shape[-1])
        shifts = functional.interpolate(knots, x.shape[-2:], mode="bicubic", align_corners=True)
        here = functional.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
        moved = functional.grid_sample(x, here + shifts.permute(0, 2, 3, 1), mode="bicubic", padding_mode="reflection",
                                       align_corners=False)
        out[start : start + batch] = to_pixels(moved)
    return out


def _jpeg(picture: Pictures, quality: int) -> Pictures:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as decoded:
        return np.asarray(decoded.convert("RGB"))


def degrade(pictures: Pictures, kind: str, *, mean_face: Array | None = None, seed: int = 0) -> Pictures:
    """One rung of the ladder. ``kind`` is one of LADDER; ``mean_face`` [S, S, 3] in 0..255 defaults to theirs."""
    if kind.startswith("blur_"):
        return resample(pictures, int(kind.removeprefix("blur_")) * pictures.shape[1] // 128)
    if kind.startswith("warp_"):
        return warp(pictures, int(kind.removeprefix("warp_")) * pictures.shape[1] / 128, seed)
    if kind == "jpeg_20":
        return np.stack([_jpeg(picture, 20) for picture in pictures])
    if kind == "noise":
        noise = np.random.default_rng(seed).standard_normal(pictures.shape, np.float32) * 20.0
        return np.clip(np.rint(pictures + noise), 0, 255).astype(np.uint8)
    if kind == "half_mean_face":
        mean = pictures.mean(0) if mean_face is None else mean_face
        return np.clip(np.rint(0.5 * pictures + 0.5 * mean.astype(np.float32)), 0, 255).astype(np.uint8)
    raise ValueError(f"unknown degradation {kind!r}; choose from {', '.join(LADDER)}")


# ------------------------------------------------------------------------------------------------ agreement with facts


def balanced_accuracy(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Mean of the recalls of the classes present in ``truth``; NaN when it is empty. Shapes: both [N]."""
    recalls = [float((predicted[truth == side] == side).mean()) for side in (True, False) if (truth == side).any()]
    return float(np.mean(recalls)) if recalls else float("nan")


@dataclass(frozen=True)
class Agreement:
    """How one attribute came out: balanced accuracies on generated and real images of the same rows."""

    generated: float
    real: float
    ratio: float
    num_true: int
    num_false: int
    negatives: str  # "asserted": the prompts said no; "unmentioned": too few did, the source's silent no stands in


def prompt_fidelity(
    asserted: NDArray[np.int8],
    attributes: NDArray[np.bool_],
    generated: NDArray[np.bool_],
    real: NDArray[np.bool_],
    minimum: int = 5,
) -> list[Agreement | None]:
    """Balanced accuracy of the attribute classifier on generated images over that on the real images the prompts
    describe.

    Shapes: all [N, A]. ``asserted`` is 1 / 0 where the prompt says yes / no and -1 where it is silent; ``attributes``
    are those of the real images; ``generated`` and ``real`` are the attribute classifier's verdicts. Attributes that
    have fewer than ``minimum`` rows on either side are None: a ratio from four images is noise.
    """
    table: list[Agreement | None] = []
    for column in range(asserted.shape[1]):
        says, holds = asserted[:, column], attributes[:, column]
        negative, source = says == 0, "asserted"
        if negative.sum() < minimum:
            negative, source = negative | ((says == -1) & ~holds), "unmentioned"
        rows = (says == 1) | negative
        truth = says[rows] == 1
        num_true, num_false = int(truth.sum()), int((~truth).sum())
        if min(num_true, num_false) < minimum:
            table.append(None)
            continue
        ours = balanced_accuracy(generated[rows, column], truth)
        theirs = balanced_accuracy(real[rows, column], truth)
        table.append(Agreement(ours, theirs, ours / max(theirs, 1e-9), num_true, num_false, source))
    return table


# ------------------------------------------------------------------------------------------------------- memorisation


def nearest(queries: Array, pool: Array, batch: int = 512) -> tuple[Array, NDArray[np.int64]]:
    """(distance [N], index [N]) of each query's nearest neighbour. Shapes: queries [N, D], pool [M, D].

    The search uses the matrix form of the distance, which is off by rounding near zero; the winner's is exact.
    """
    points, squares = torch.from_numpy(np.asarray(pool, np.float32)), None
    squares = points.square().sum(1)
    found = []
    for start in range(0, len(queries), batch):
        chunk = torch.from_numpy(np.asarray(queries[start : start + batch], np.float32))
        found.append((squares[None] - 2.0 * chunk @ points.T).argmin(1))
    index = torch.cat(found).numpy()
    return np.linalg.norm(queries.astype(np.float64) - pool[index].astype(np.float64), axis=1), index


def nearest_of_views(views: Sequence[Array], pool: Array) -> tuple[Array, NDArray[np.int64]]:
    """Nearest neighbour over several views of each query (an image and its mirror image)."""
    results = [nearest(view, pool) for view in views]
    distance = np.stack([result[0] for result in results])
    best, rows = distance.argmin(0), np.arange(distance.shape[1])
    return distance[best, rows], np.stack([result[1] for result in results])[best, rows]


@dataclass(frozen=True)
class Closeness:
    """Ratios [P, N] of N images against P training pools; the nearest training image of each; the chance ratios."""

    ratios: Array
    distance: Array
    index: NDArray[np.int64]
    chance: Array


def memorisation(views: Sequence[Array], train: Array, held_out: Array) -> Closeness:
    """Distance to the nearest training image over distance to the nearest held-out one: near 1 unless copied.

    A larger pool holds a nearer neighbour by chance alone, so the training set is cut into pools of the held-out set's
    size and each gives one ratio an image. ``chance`` is the same ratio between two halves of the held-out set, which
    nobody can have memorised: what the spread is when nothing is copied.
    Shapes: views of [N, D], train [M, D] with M >= K, held_out [K, D] with K >= 2.
    """
    size = len(held_out)
    if size < 2 or len(train) < size:
        raise ValueError(f"held-out pool of {size} and training pool of {len(train)}: need 2 <= held-out <= training")
    to_held_out, _ = nearest_of_views(views, held_out)
    starts = [min(start, len(train) - size) for start in range(0, len(train), size)]
    pools = [nearest_of_views(views, train[start : start + size]) for start in starts]
    distances = np.stack([pool[0] for pool in pools])
    indices = np.stack([pool[1] + start for pool, start in zip(pools, starts, strict=True)])
    best, rows = distances.argmin(0), np.arange(distances.shape[1])
    half = size // 2
    one, _ = nearest_of_views(views, held_out[:half])
    two, _ = nearest_of_views(views, held_out[half : 2 * half])
    floor = 1e-9  # a copy of a held-out image has distance 0
    return Closeness(
        distances / np.maximum(to_held_out, floor)[None],
        distances[best, rows],
        indices[best, rows],
        one / np.maximum(two, floor),
    )


def thumbnails(pictures: Pictures, size: int = 32, batch: int = 1024) -> Array:
    """Area-averaged pixels in 0..1 as rows, for distances that ignore fine texture. Shapes: [N, S, S, 3] -> [N, D]."""
    step = max(pictures.shape[1] // size, 1)
    out = np.empty((len(pictures), (pictures.shape[1] // step) ** 2 * 3), np.float32)
    for start in range(0, len(pictures), batch):
        x = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch])).permute(0, 3, 1, 2).float()
        out[start : start + batch] = functional.avg_pool2d(x / 255.0, step).flatten(1).numpy()
    return out


def inception_features(path: str, device: str) -> Callable[[Pictures], Array]:
    """The features of true FID, by a network that the user brings: uint8 [N, H, W, 3] -> [N, 2048].

    ``path`` is TorchScript that takes uint8 [B, 3, H, W] and gives the 2048 pooled features. Raises ValueError where it
    gives something else.
    """
    with warnings.catch_warnings():
        # torch would rather have torch.export, but the Inception files that people have are TorchScript
        warnings.simplefilter("ignore", FutureWarning)
        network = torch.jit.load(path, map_location=device).eval()

    @torch.inference_mode()
    def features(pictures: Pictures) -> Array:
        batches = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).split(64)
        found = torch.cat([network(batch.to(device)).float().cpu() for batch in batches])
        if found.ndim != 2 or found.shape[1] != 2048:
            raise ValueError(f"--inception gave {tuple(found.shape)}; FID needs its 2048 pooled features an image")
        return np.asarray(found.numpy())

    return features


# ----------------------------------------------------------------------------------------------------- reconstructions


def multiscale_ssim(reduction: str = "elementwise_mean") -> MultiScaleStructuralSimilarityIndexMeasure:
    """MS-SSIM as this project measures it everywhere: images [B, 3, H, W] in [0, 1] against others, 1 for equal ones.

    Four scales, so sides of 63 pixels or more (torchmetrics raises ValueError otherwise): at the fifth scale of the
    paper a 128 px face is 8 pixels wide, narrower than the Gaussian window of 11. The weights are the paper's first
    four over their sum. torchmetrics takes the window from its sigma of 1.5; `kernel_size` only feeds a check.
    ``reduction`` "none" gives one number an image, otherwise their mean. https://ieeexplore.ieee.org/document/1292216
    """
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

    return MultiScaleStructuralSimilarityIndexMeasure(
        data_range=1.0, kernel_size=7, betas=MS_SSIM_WEIGHTS, reduction=reduction
    )


def reconstruction_figures(originals: Pictures, copies: Pictures, batch: int = 64) -> dict[str, float]:
    """PSNR in dB, SSIM, MS-SSIM (mean over images) and the mean squared error on the [-1, 1] scale.

    uint8 images are compared on 0..1 with data_range 1.0. Shapes: both [N, S, S, 3].
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    multiscale = multiscale_ssim(reduction="none")
    found: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": [], "ms_ssim": [], "mse": []}
    for start in range(0, len(originals), batch):
        target = to_images(originals[start : start + batch]) / 2.0 + 0.5
        copy = to_images(copies[start : start + batch]) / 2.0 + 0.5
        psnr = peak_signal_noise_ratio(copy, target, 1.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(copy, target, data_range=1.0, reduction="none")
        ms_ssim = multiscale(copy, target)
        mse = (2.0 * (copy - target)).square().mean((1, 2, 3))
        for name, value in zip(found, (psnr, ssim, ms_ssim, mse), strict=True):
            found[name].append(torch.as_tensor(value))
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def retrieval(name: str, similarity: Tensor, fits: Tensor) -> dict[str, float | None]:
    """Which share of the first k answers fits, and which share of all answers does; similarity and fits [Q, A].

    None where the first k are all answers or all answers fit, so that any ranking would score the same.
    """
    ranked = similarity.argsort(1, descending=True)
    chance = round(float(fits.float().mean()), 4)
    found: dict[str, float | None] = {}
    for k in (1, 10):
        told = k < fits.shape[1] and bool((fits.any(1) & ~fits.all(1)).any())
        value = round(float(fits.gather(1, ranked[:, :k]).float().mean()), 4) if told else None
        prefix = "" if name == "text_to_image" else f"{name}_"
        found |= {f"{name}_precision_at_{k}": value, f"{prefix}chance_at_{k}": chance}
    return found
