"""How good is a model that learned from a person's own captions, where no attribute classifier can say?

Its own CLIP looks: does an image that was generated for a caption fit this caption better than every other, as often
as the real images of the captions do? That is what the model itself learned to see, so it finds words that are ignored
and images that are mixed up, and not what CLIP confuses. Beside it stand a Fréchet distance in the features of the same
image encoder and the figures of the VAE. It does not know how anything is trained or loaded.

Sources: CLIP score https://arxiv.org/abs/2104.08718, R-precision https://arxiv.org/abs/1711.10485 (section 4.1).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.evaluation.generation import Generator, Sampling, generate_images, image_features, reconstruct
from core.evaluation.metrics import frechet_distance, reconstruction_figures
from core.evaluation.report import save_figures
from core.evaluation.sample_grids import image_grid
from core.evaluation.suite import Settings
from core.training.data_sources import DataError

if TYPE_CHECKING:
    from dataset import FaceStore

MOST_CAPTIONS = 1000  # of the store, that one image is compared with
IN_GRID = 64


@dataclass(frozen=True)
class Alignment:
    """How often an image fits its own caption best, of how many captions, and the mean cosine between both."""

    own_caption_first: float
    cosine: float


def report(store: FaceStore, faces: Generator, sampling: Sampling, settings: Settings) -> dict[str, Any]:
    """`measure_own` by the settings of a report, written and printed as other reports are; returns the figures."""
    found = measure_own(store, faces, sampling, settings.samples, Path(settings.out), settings.split)
    save_figures(settings.out, "report", found, page(found))
    return found


def measure_own(store: FaceStore, faces: Generator, sampling: Sampling, samples: int, out: Path, split: str = "test"
                ) -> dict[str, Any]:
    """The report about one model and the captions of a store; writes ``samples.png`` into ``out``.

    One image is generated for a caption of each of up to ``samples`` held-out images, round again where there are
    fewer. Raises DataError where fewer than two images are held out.
    """
    began = time.monotonic()
    rows = np.random.default_rng(sampling.seed).permutation(store.sharp(split))
    if len(rows) < 2:
        raise DataError(f"{store.folder} has {len(rows)} images in its split {split!r}, and at least 2 are needed to "
                        "measure a model; prepare more images, or name another --split")
    rows, rng = rows[:samples], random.Random(sampling.seed)
    real = np.asarray(store.images[np.sort(rows)])
    own = [store.caption(int(row), rng) for row in np.sort(rows)]
    texts = [own[i % len(own)] for i in range(samples)]
    made = generate_images(faces, sampling.requests(texts))
    out.mkdir(parents=True, exist_ok=True)
    order = sorted(range(min(len(made), IN_GRID)), key=lambda i: texts[i])
    image_grid(made[order], 8).save(out / "samples.png")
    others = sorted({text for all_ in (store.text_labels or {}).values() for text in all_})
    captions = list(dict.fromkeys([*own, *others]))[: max(MOST_CAPTIONS, len(set(own)))]
    features, found = text_features(faces, captions), {}
    for name, images, said in (("generated", made, texts), ("real", real, own)):
        figures = alignment(image_features(faces.clip, images), features, [captions.index(text) for text in said])
        first = figures.own_caption_first if len(captions) > 1 else None  # of one, chance would do the same
        found[name] = {"own_caption_first": first, "cosine": figures.cosine}
    n = min(len(made), len(real))
    train = np.random.default_rng(sampling.seed).permutation(store.sharp("train"))[:n]
    looked = {name: image_features(faces.clip, images[:n]) for name, images in
              (("generated", made), ("held out", real), ("training", np.asarray(store.images[np.sort(train)])))}
    distance = None
    if n == len(train):
        distance = {"generated": frechet_distance(looked["generated"], looked["training"]),
                    "held_out": frechet_distance(looked["held out"], looked["training"]), "n": n}
    return {
        "kind": "own captions", "samples": len(made), "captions": len(captions), "chance": 1 / len(captions),
        "alignment": found, "frechet_in_own_features": distance,
        "vae": reconstruction_figures(real, reconstruct(faces.vae, real)) | {"n": len(real)},
        "steps": sampling.num_inference_steps, "guidance": sampling.guidance_scale,
        "model_hash": faces.info.model_hash, "data": store.fingerprint, "seconds": round(time.monotonic() - began, 1),
    }


@torch.inference_mode()
def text_features(faces: Any, texts: Sequence[str], batch: int = 256) -> np.ndarray:
    """What the model's own text encoder makes of texts, in the space of its image encoder: unit vectors [N, D]."""
    found = [faces.clip.embed_text(*(one.to(faces.device) for one in faces.tokenizer(list(texts[i : i + batch]))))
             for i in range(0, len(texts), batch)]
    return torch.cat(found).float().cpu().numpy()


def alignment(images: np.ndarray, captions: np.ndarray, own: Sequence[int]) -> Alignment:
    """How images fit captions, ``own`` [N] says which of them each image was generated for, or has.

    Shapes: images [N, D], captions [K, D], all unit vectors.
    """
    similarity = images @ captions.T
    mine = similarity[np.arange(len(images)), list(own)]
    return Alignment(float((mine >= similarity.max(1)).mean()), float(mine.mean()))


def page(found: dict[str, Any]) -> str:
    """The report as a table for people."""
    made, real, vae = found["alignment"]["generated"], found["alignment"]["real"], found["vae"]
    lines = [
        "| measured by the model's own CLIP | generated | real |", "| --- | --- | --- |",
        *([f"| own caption first of {found['captions']} (chance {found['chance']:.3f}) "
           f"| {made['own_caption_first']:.3f} | {real['own_caption_first']:.3f} |"] if found["captions"] > 1 else []),
        f"| mean cosine with the caption | {made['cosine']:.3f} | {real['cosine']:.3f} |",
    ]
    if (distance := found["frechet_in_own_features"]) is not None:
        lines.append(f"| Fréchet distance to training images, n = {distance['n']} | {distance['generated']:.4f} | "
                     f"{distance['held_out']:.4f} |")
    lines.append(f"| VAE: PSNR, SSIM, MS-SSIM of {vae['n']} copies | {vae['psnr_db']:.1f} dB, {vae['ssim']:.3f}, "
                 f"{vae['ms_ssim']:.3f} | |")
    return "\n".join(lines) + "\n"
