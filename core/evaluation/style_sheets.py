"""What do styles look like when they are drawn side by side, mixed, interpolated and moved, and what moves with what?

Sheets of faces of a `StyleFaces`, and its directions in w: fitted to an attribute classifier's scores of faces that it
generates itself, with the table of how much each moves all attributes. It does not know how the networks were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.command import SettingError
from core.evaluation.attribute_classifier import AttributeClassifier, extract_features
from core.evaluation.prompt_sheets import GALLERY_PROMPTS
from core.evaluation.prompts import VISIBLE
from core.imaging.spectrum import Pictures
from core.nn.style_directions import StyleDirections, chosen, effects, entanglement, orthogonalised, regressed
from core.nn.style_faces import StyleFaces
from core.nn.style_networks import interpolated, mixed
from core.text.lexicon import ATTRIBUTES


def sample_rows(faces: StyleFaces, prompts: Sequence[str], seeds: Sequence[int], psi: float) -> Pictures:
    """The same seeds for each prompt, prompt by prompt: uint8 [len(prompts) * len(seeds), H, W, 3]."""
    every = [prompt for prompt in prompts for _ in seeds]
    return faces.pixels(faces.latents(faces.styles(every, list(seeds) * len(prompts), psi)))


def interpolation_row(faces: StyleFaces, prompts: tuple[str, str], seeds: tuple[int, int], num: int, psi: float
                      ) -> Pictures:
    """``num`` faces on the straight line in w from one prompt and seed to another. uint8 [num, H, W, 3]."""
    ends = faces.styles(prompts, seeds, psi)
    return faces.pixels(faces.latents(interpolated(ends[0], ends[1], num)))


def mixing_table(faces: StyleFaces, prompt: str, coarse: Sequence[int], fine: Sequence[int], first: int, psi: float
                 ) -> Pictures:
    """A row for each seed in ``coarse``: its face, whose layers from ``first`` on are those of each seed in ``fine``.
    Shapes: uint8 [len(coarse) * len(fine), H, W, 3]. Raises SettingError for a layer that the network does not have."""
    layers = faces.generator.config.num_layers
    if not 0 <= first <= layers:
        raise SettingError(f"the first layer of the other style is {first}; it must be from 0 to {layers}")
    rows, columns = (faces.generator.broadcast(faces.styles([prompt] * len(seeds), seeds, psi))
                     for seeds in (coarse, fine))
    pairs = mixed(rows.repeat_interleave(len(fine), 0), columns.repeat(len(coarse), 1, 1), first)
    return faces.pixels(faces.latents(pairs))


def direction_row(faces: StyleFaces, prompt: str, seed: int, direction: Tensor, strengths: Sequence[float], psi: float
                  ) -> Pictures:
    """One face moved along a direction [D] by each strength. uint8 [len(strengths), H, W, 3]."""
    w = faces.styles([prompt], [seed], psi)
    return faces.pixels(faces.latents(w + torch.tensor(strengths)[:, None].to(w) * direction.to(w)))


@dataclass(frozen=True)
class FittedDirections:
    """Directions, and by how much each of their rows moves every attribute: tables [A, A] of `effects`."""

    directions: StyleDirections
    plain: Tensor
    orthogonal: Tensor
    step: float
    n: int

    def facts(self) -> dict[str, Any]:
        """What is kept beside them: how entangled each is (what the others move for each unit of its own)."""
        found = {}
        for kind, table in (("plain", self.plain), ("orthogonal", self.orthogonal)):
            found[kind] = {name: round(float(value), 4)
                           for name, value in zip(self.directions.names, entanglement(table), strict=True)}
        return {"entanglement": found, "step": self.step, "n": self.n}


def fit_directions(faces: StyleFaces, classifier: AttributeClassifier, n: int, seed: int = 0,
                   names: Sequence[str] = VISIBLE, measured: int = 64) -> FittedDirections:
    """Directions of ``names`` from ``n`` faces of the empty prompt and of the twenty of the gallery, not truncated; the
    tables are of ``measured`` others, moved by twice the deviation of w along a random direction."""
    prompts = ["", *GALLERY_PROMPTS]
    w = faces.styles([prompts[i % len(prompts)] for i in range(n)], range(seed, seed + n), psi=1.0)

    def score(styles: Tensor) -> Tensor:
        parts = [extract_features(classifier, faces.pixels(faces.latents(part))).logits for part in styles.split(128)]
        return chosen(ATTRIBUTES, torch.from_numpy(np.concatenate(parts)), names)

    plain = regressed(w.cpu(), score(w))
    found = StyleDirections(tuple(names), plain, orthogonalised(plain))
    step = 2.0 * float((w - w.mean(0)).square().mean().sqrt()) * w.shape[1] ** 0.5
    others = faces.styles([prompts[i % len(prompts)] for i in range(measured)],
                          range(seed + n, seed + n + measured), psi=0.7)
    tables = [effects(score, others, rows.to(others), step) for rows in (found.plain, found.orthogonal)]
    return FittedDirections(found, tables[0], tables[1], step, n)
