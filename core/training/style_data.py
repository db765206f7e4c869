"""What does a style GAN learn from? Cached latents, the pooled text of their captions, and how sharp their source was.

Captions are read by the text encoder once, in the order of their lengths, and kept beside the latents. It does not know
the networks that learn, nor how VAE and text encoder are made.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.command import FolderLock
from core.nn.checkpoint import write_json
from core.nn.clip import CLIP
from core.nn.style_faces import condition_of
from core.training.caption_cache import CaptionBank
from core.training.latent_cache import LatentCache
from core.training.randomness import EpochSampler, step_generator


@torch.inference_mode()
def pooled_captions(clip: CLIP, bank: CaptionBank, batch_size: int = 512) -> Tensor:
    """The pooled text of all captions of a bank: float16 [N, K, E]. Captions of one length are read together: padding
    would cost more than they do."""
    from tqdm import tqdm

    ids, lengths = bank.ids.flatten(0, 1), bank.lengths.flatten().long()
    device = next(clip.parameters()).device
    pooled = torch.empty(len(ids), clip.config.text_width, dtype=torch.float16)
    order = lengths.argsort(stable=True)
    for rows in tqdm(order.split(batch_size), desc="captions", mininterval=2.0):
        longest = int(lengths[rows].max())
        mask = torch.arange(longest)[None] < lengths[rows][:, None]
        text = clip.encode_text(ids[rows, :longest].long().to(device), mask.to(device))
        pooled[rows] = text.pooled.half().cpu()
    return pooled.unflatten(0, bank.ids.shape[:2])


def cached_pooled(folder: Path, clip: CLIP, clip_hash: str, bank: CaptionBank, accelerator: Any) -> Tensor:
    """`pooled_captions`, from ``folder`` where a run before read the same captions with the same text encoder."""
    key = hashlib.sha256(clip_hash.encode() + bank.ids.numpy().tobytes() + bank.lengths.numpy().tobytes()).hexdigest()
    array, note = folder / "pooled.npy", folder / "pooled.json"
    with FolderLock(folder, "reading captions", wait=True) if accelerator.is_main_process else nullcontext():
        try:
            if json.loads(note.read_text())["key"] == key:
                return torch.from_numpy(np.load(array, allow_pickle=False))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, EOFError):
            print(f"{array} is damaged; its captions are read anew", flush=True)
        pooled = pooled_captions(clip, bank)
        note.unlink(missing_ok=True)
        np.save(array, pooled.numpy())
        write_json(note, {"key": key})
    return pooled


@dataclass(frozen=True)
class StyleBatches:
    """Every step's real pictures and their conditions, from the step's number and the seed alone.

    Shapes: cache of N images, pooled [N, K, E], px [N].
    """

    cache: LatentCache
    pooled: Tensor
    px: Tensor
    seed: int
    batch_size: int

    @cached_property
    def _order(self) -> EpochSampler:
        return EpochSampler(len(self.px), self.batch_size, self.seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] of images or their mirror images and conditions [B, E + 3] of step ``step`` from 0."""
        rows, source = self._order.batch(step), step_generator(self.seed, step, stream=5)
        mirrored = torch.randint(2, (len(rows),), generator=source)
        eps = torch.randn(len(rows), *self.cache.mean.shape[2:], generator=source)
        pick = torch.randint(self.pooled.shape[1], (len(rows),), generator=source)
        device = self.cache.mean.device
        real = self.cache.draw(rows.to(device), mirrored.to(device), eps.to(device))
        return real, condition_of(self.pooled[rows, pick], self.px[rows]).to(device)
