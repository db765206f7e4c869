"""What does a network generate for prompts that stay the same, so that people can compare sheets of images?

Grids of a training run, grids of any prompts, and a gallery of twenty prompts of which nothing is picked out. Whatever
keeps the contract of `core.engine` can generate them, and generates them by the code that users run. It does not know
networks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.engine import GenerationRequest
from core.nn.layers import to_images
from core.training.run_folder import save_grid

if TYPE_CHECKING:
    from dataset import FaceStore

GRID_PROMPTS = (
    "", "a smiling woman with blonde hair", "a young man with black hair and glasses",
    "an old bald man with a grey beard",
    "a young woman with brown wavy hair wearing lipstick", "a man with a goatee wearing a hat",
    "a woman with black hair and bangs, not smiling", "a man with a big nose and a necktie",
)


GALLERY_PROMPTS = (  # everything that anybody can see in a 128 px face, rare things too, asserted and denied
    "a smiling young woman with wavy blond hair", "a serious woman with black hair, not smiling",
    "a woman with brown hair, bangs and heavy makeup", "a young woman with straight brown hair wearing lipstick",
    "a smiling old woman with gray hair", "a woman with glasses and black hair", "a young woman wearing a hat",
    "a woman with blond hair and earrings", "an old woman with glasses", "a pale young woman with her mouth open",
    "a young man with black hair and a goatee", "an old man with gray hair and glasses", "a bald man with a beard",
    "a smiling middle-aged man wearing a necktie", "a young man with blond hair, without a beard",
    "a man with a mustache wearing a hat", "a young man with brown hair and glasses", "a man with a receding hairline",
    "a man with bushy eyebrows and a five o'clock shadow", "a chubby smiling man without glasses",
)


@dataclass(frozen=True)
class GridOptions:
    """How sheets are generated: images a prompt, the first of them from ``seed``; None is the model's own."""

    per_prompt: int = 4
    steps: int = 20
    guidance_scale: float | None = 2.0
    seed: int = 0
    sampler: str | None = None


OF_A_RUN = GridOptions()  # the images of training runs


def grid_prompts(store: FaceStore) -> Sequence[str]:
    """As many prompts as `GRID_PROMPTS` has for the grids of a run: a person's own captions where the store has those,
    the same ones every time, round again where they are few; the first is empty."""
    if store.text_labels is None:
        return GRID_PROMPTS
    texts = sorted({" ".join(text.split()) for captions in store.text_labels.values() for text in captions})
    chosen = random.Random(0).sample(texts, min(len(texts), len(GRID_PROMPTS) - 1))
    return ("", *(chosen[i % len(chosen)] for i in range(len(GRID_PROMPTS) - 1)))


def draw_grid(faces: Any, prompts: Sequence[str], how: GridOptions) -> Tensor:
    """Images [len(prompts) * per_prompt, 3, H, W] in [-1, 1], prompt by prompt; seeds are fixed, so sheets compare.

    ``faces`` is a `FaceGenerator`. Without the invisible mark: what a network generates is looked at here.
    """
    runs = [faces.start(GenerationRequest(prompt, how.per_prompt, how.steps, how.seed, how.guidance_scale,
                                          sampler=how.sampler, watermark=False)) for prompt in prompts]
    while any(not run.finished for run in runs):
        faces.step(runs)
    return to_images(np.stack([picture.pixels for run in runs for picture in faces.pictures(run)]))


def write_grid(faces: Any, prompts: Sequence[str], path: Path, how: GridOptions) -> None:
    """One image file with a row for each prompt."""
    save_grid(draw_grid(faces, prompts, how), path, columns=how.per_prompt)


def write_gallery(faces: Any, folder: Path, how: GridOptions) -> None:
    """A WebP sheet for each of `GALLERY_PROMPTS`, and one of the first five images of each."""
    firsts = []
    for number, prompt in enumerate(GALLERY_PROMPTS, start=1):
        images = draw_grid(faces, [prompt], how)
        name = "-".join(re.findall("[a-z]+", prompt.lower()))
        save_grid(images, folder / f"{number:02}-{name}.webp", columns=4)
        firsts.append(images[:5])
    save_grid(torch.cat(firsts), folder / "uncurated.webp", columns=10)  # two prompts a row, seeds in order
