"""What does a UNet learn from? Cached latents, captions, and the resolution of each image's source.

`TrainingData` brings the prepared store, the VAE and the text encoder together and says what every step learns from. It
does not know the UNet, nor how VAE and text encoder are made: they are passed in.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.command import SettingError
from core.diffusion.schedule import NoiseSchedule
from core.nn.autoencoder import VAE
from core.nn.clip import CLIP
from core.nn.layers import to_images
from core.nn.tokenizer import Tokenizer
from core.training.caption_cache import build_caption_bank, cached_bank, encode_captions, fits_encoded
from core.training.data_sources import DataError
from core.training.latent_cache import LatentCache, TrainingBatches, cached_latents, held_out

if TYPE_CHECKING:
    from dataset import FaceStore


@dataclass(frozen=True)
class DataOptions:
    """Which images and captions a run learns from, and how; the help of the options of the same names says more."""

    data: str
    cache: str
    seed: int
    batch_size: int
    accumulate: int
    caption_dropout: float
    captions_per_image: int
    px: int | None
    soft_from: Sequence[float] | None
    sharp_times: int
    favour: Sequence[str]
    favour_times: int

    @classmethod
    def of(cls, args: Namespace) -> DataOptions:
        """Those of a command line."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Encoders:
    """What turns images and captions into what a UNet learns from. ``encoder`` is `encoder_hash` of the VAE."""

    vae: VAE
    encoder: str
    clip: CLIP
    tokenizer: Tokenizer


class TrainingData:
    """Everything around the UNet that a training run needs. ``batches`` has the batch of every step; with
    ``share_off`` its guidance scales are generated too, that share of them 1, as distillation wants them."""

    def __init__(self, options: DataOptions, store: FaceStore, encoders: Encoders, schedule: NoiseSchedule,
                 accelerator: Any, share_off: float | None = None) -> None:
        if options.favour and store.text_labels is not None:
            raise DataError(f"--favour {' '.join(options.favour)}: {options.data} has its user's own captions, no "
                            "attributes")
        self.store, self.encoders, self.schedule = store, encoders, schedule
        indices = store.select(split="train", px=options.px)
        cache = encoded(encoders.vae, encoders.encoder, store, indices, Path(options.cache), accelerator)
        bank = cached_bank(Path(options.cache) / "captions.npz", store, indices, encoders.tokenizer, accelerator,
                           captions_per_image=options.captions_per_image, seed=options.seed,
                           empty_share=0.0).to(accelerator.device)
        clip = encoders.clip
        read = encode_captions(clip, bank, accelerator) if fits_encoded(clip, bank) else None
        px = store.px[indices]
        seen = favoured_rows(store.attributes[indices], options.favour, options.favour_times,
                             np.where(px == 128, options.sharp_times, 1))
        lowest = lowest_timesteps(px, options.soft_from).to(accelerator.device) if options.soft_from else None
        self.batches = TrainingBatches(
            cache=cache, captions=read or bank, encode_text=(read or clip).encode_text,
            px=torch.from_numpy(px.astype(np.float32)).to(accelerator.device), seen=seen, schedule=schedule,
            seed=options.seed, batch_size=options.batch_size, caption_dropout=options.caption_dropout,
            pieces=options.accumulate, lowest=lowest, share_off=share_off)

    def held_out(self, accelerator: Any, limit: int = 1024) -> list[Any]:
        """Batches of held-out sharp faces, the same for every checkpoint."""
        rows = self.store.sharp("val")[:limit]
        vae, clip = self.encoders.vae, self.encoders.clip
        bank = build_caption_bank(self.store, rows, self.encoders.tokenizer, captions_per_image=1, seed=99,
                                  empty_share=0.0)

        def encode(some: slice) -> Tensor:
            images = to_images(torch.from_numpy(self.store.images[rows[some]]).to(accelerator.device))
            return vae.normalize(vae.encode(images).mean)

        return list(held_out(encode, bank, clip.encode_text, self.schedule, accelerator))


def encoded(vae: VAE, encoder: str, store: FaceStore, indices: np.ndarray, folder: Path, accelerator: Any
            ) -> LatentCache:
    """The latents of the chosen images, made anew where ``folder`` has those of another ``encoder`` or other images."""
    _, scale = vae.statistics

    @torch.inference_mode()
    def encode(rows: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        images = to_images(torch.from_numpy(store.images[indices[rows]]).to(accelerator.device))
        found = []
        for view in (images, images.flip(-1)):
            with accelerator.autocast():
                posterior = vae.encode(view.contiguous(memory_format=torch.channels_last))
            found.append((vae.normalize(posterior.mean), posterior.std / scale))
        return found[0], found[1]

    names = "\n".join(store.image_id[indices]).encode()
    key = {"encoder": encoder, "images": hashlib.sha256(names).hexdigest()}
    return cached_latents(folder, key, (len(indices), vae.config.latent_channels, 16, 16), encode, accelerator)


def favoured_rows(attributes: np.ndarray, names: Sequence[str], times: int, each: np.ndarray | int = 1) -> Tensor:
    """Rows of one epoch: every row ``each`` times, and ``times`` as often where it has one of the attributes ``names``.

    Rare attributes (glasses: 6 % of CelebA) are learned late otherwise. Shapes: attributes [N, 40] bool, each [N] ->
    [M] int64.
    Raises SettingError for a name that CelebA does not have.
    """
    from core.text.lexicon import ATTRIBUTES

    if unknown := set(names) - set(ATTRIBUTES):
        raise SettingError(f"--favour {', '.join(sorted(unknown))}: CelebA has {', '.join(ATTRIBUTES)}")
    chosen = attributes[:, [ATTRIBUTES.index(name) for name in names]].any(axis=1)
    return torch.from_numpy(np.repeat(np.arange(len(attributes)), np.where(chosen, times, 1) * each))


def lowest_timesteps(px: np.ndarray, soft_from: Sequence[float]) -> Tensor:
    """From which timestep on each image is learned from: sharp ones everywhere, enlarged ones only where noise hides
    that they are soft (https://arxiv.org/abs/2506.10038). Shapes: px [N] in {58, 80, 128} -> [N] float32."""
    for_58, for_80 = soft_from
    return torch.from_numpy(np.select([px == 58, px == 80], [for_58, for_80], 0.0).astype(np.float32))
