"""How does a training run see every image thousands of times and encode it only twice?

The posteriors of all training images and of their mirror images are computed once, kept in two files with a key that
says of which encoder and which images they are, and then live on the device, where `TrainingBatches` makes of them, of
the captions and of seeded noise what one step learns from. It does not know what encodes images or texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.command import FolderLock
from core.diffusion.conditioning import Condition
from core.diffusion.distillation import sample_guidance_scales
from core.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule
from core.nn.checkpoint import write_json
from core.training.accelerator import attention_kernel, send
from core.training.arrays import new_array
from core.training.randomness import EpochSampler, step_generator


@dataclass
class LatentCache:
    """Posterior mean and standard deviation of every training image and of its mirror image, normalized, fp16.

    Shapes: mean, std [2, N, C, h, w]; index 0 = as it is, 1 = mirrored.
    """

    mean: Tensor
    std: Tensor

    def draw(self, rows: Tensor, mirrored: Tensor, eps: Tensor) -> Tensor:
        """Normalized posterior samples [B, C, h, w] for image rows [B], mirror choices [B] in {0, 1} and eps."""
        return self.mean[mirrored, rows].float() + self.std[mirrored, rows].float() * eps


def cached_latents(
    folder: Path,
    key: Mapping[str, str],
    shape: tuple[int, int, int, int],
    encode: Callable[[slice], tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    accelerator: Any,
    batch_size: int = 64,
) -> LatentCache:
    """The cache in ``folder``, made by the main process when it is not there or has another ``key``.

    ``encode`` gives mean and standard deviation of some of the N images, as they are and mirrored. ``shape`` is
    (N, C, h, w).
    """
    from tqdm import tqdm

    with FolderLock(folder, "writing latents", wait=True) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process and not _is_whole(folder, key, shape):
            (folder / "cache.json").unlink(missing_ok=True)
            arrays = [new_array(folder / f"{name}.npy", np.float16, (2, *shape)) for name in ("mean", "std")]
            for start in tqdm(range(0, shape[0], batch_size), desc="latents", mininterval=2.0):
                rows = slice(start, min(start + batch_size, shape[0]))
                for mirrored, view in enumerate(encode(rows)):
                    for array, value in zip(arrays, view, strict=True):
                        array[mirrored, rows] = value.half().cpu().numpy()
            for array in arrays:
                array.flush()
            write_json(folder / "cache.json", dict(key))
        accelerator.wait_for_everyone()
        mean, std = (torch.from_numpy(np.load(folder / f"{name}.npy")).to(accelerator.device)
                     for name in ("mean", "std"))
        accelerator.wait_for_everyone()  # another run may write its own latents only when all have read these
    return LatentCache(mean, std)


def _is_whole(folder: Path, key: Mapping[str, str], shape: tuple[int, ...]) -> bool:
    """Whether the cache in ``folder`` has this key and files of the length they should have."""
    try:
        if json.loads((folder / "cache.json").read_text()) != dict(key):
            return False
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("mean", "std")]
        if all(array.shape == (2, *shape) and array.dtype == np.float16 for array in arrays):
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError, EOFError):
        pass
    print(f"the latents in {folder} are damaged; they are made anew", flush=True)
    return False


@dataclass(frozen=True)
class Batch:
    """What a step learns from: clean latents, noise, its level, what is asked, and for distillation at which guidance.

    Shapes: z, noise [B, C, h, w], timestep, scale [B].
    """

    z: Tensor
    noise: Tensor
    timestep: Tensor
    condition: Condition
    scale: Tensor


@dataclass(frozen=True)
class TrainingBatches:
    """Every step's batch, from the step's number and the seed alone.

    ``captions`` draws (ids, mask, facts, empty) for rows of images, ``encode_text`` reads them, ``px`` [N] are the
    resolutions of the sources and ``seen`` the rows of one epoch. Where ``share_off`` is a number, guidance scales are
    drawn too, by random numbers of their own, and that share of them is 1.
    """

    cache: LatentCache
    captions: Any
    encode_text: Callable[[Tensor, Tensor], Any]
    px: Tensor
    seen: Tensor
    schedule: NoiseSchedule
    seed: int
    batch_size: int
    caption_dropout: float
    pieces: int
    lowest: Tensor | None = None  # timestep [N] from which on each image is learned from; None: from 0
    share_off: float | None = None

    @cached_property
    def _order(self) -> EpochSampler:
        return EpochSampler(len(self.seen), self.batch_size, self.seed)

    def batch(self, step: int, mine: slice, accelerator: Any) -> Iterator[Batch]:
        """The ``pieces`` of this process's share of the batch of ``step``, counted from 0."""
        device, size = self.px.device, self.batch_size
        generator = step_generator(self.seed, step)
        noise_generator = step_generator(self.seed, step, stream=1, device=device)
        rows = send(self.seen[self._order.batch(step)], device)
        mirrored = send(torch.randint(2, (size,), generator=generator), device)
        timestep = send(self.schedule.sample_timesteps(size, generator), device)
        if self.lowest is not None:  # the same share of the levels that are left to an image
            lowest = self.lowest[rows]
            timestep = (lowest + timestep * (1.0 - lowest / NUM_TRAIN_TIMESTEPS)).floor()
            timestep = timestep.clamp(max=NUM_TRAIN_TIMESTEPS - 1)
        null = send(torch.rand(size, generator=generator) < self.caption_dropout, device)
        ids, mask, _, empty = self.captions.draw(rows, generator)
        eps = torch.randn(2, size, *self.cache.mean.shape[2:], generator=noise_generator, device=device)
        scale = torch.ones(size, device=device)
        if self.share_off is not None:
            scale = send(sample_guidance_scales(size, step_generator(self.seed, step, stream=3), self.share_off),
                         device)
        for part in torch.arange(size, device=device)[mine].chunk(self.pieces):
            with torch.no_grad(), accelerator.autocast(), attention_kernel(device):
                text = self.encode_text(ids[part], mask[part])
            condition = Condition(text.tokens, text.mask, text.pooled, self.px[rows[part]], (null | empty)[part])
            yield Batch(self.cache.draw(rows[part], mirrored[part], eps[0, part]), eps[1, part], timestep[part],
                        condition, scale[part])


@torch.inference_mode()
def held_out(encode: Callable[[slice], Tensor], captions: Any, encode_text: Callable[[Tensor, Tensor], Any],
             schedule: NoiseSchedule, accelerator: Any, seed: int = 99) -> Iterator[Batch]:
    """Images kept out of training, with fixed noise, levels and captions, at guidance 1.5, 2.5, 4.5, 1.5, ...

    ``encode`` gives the normalized latents [B, C, h, w] of some of them, ``captions`` has a row for each; all are asked
    for at 128 px.
    """
    device, count = accelerator.device, len(captions.ids)
    for start in range(0, count, 64):
        rows = torch.arange(start, min(start + 64, count))
        generator = torch.Generator().manual_seed(seed + start)
        ids, mask, _, empty = (one.to(device) for one in captions.draw(rows, generator))
        timestep = schedule.sample_timesteps(len(rows), generator).to(device)
        with accelerator.autocast():
            z, text = encode(slice(start, start + len(rows))), encode_text(ids, mask)
        noise = torch.randn(z.shape, generator=generator).to(device)
        px, scales = torch.full((len(rows),), 128.0, device=device), torch.tensor([1.5, 2.5, 4.5], device=device)
        yield Batch(z, noise, timestep, Condition(text.tokens, text.mask, text.pooled, px, empty),
                    scales[rows.to(device) % 3])
