"""How do requests of different prompts, lengths and guidance share one call of the network?

The guided prediction of an image is a weighted sum of what the network says under several texts: guidance at scale s
is s times the prompt's and 1 - s times the negative's (https://arxiv.org/abs/2207.12598), and on the way from one
prompt to another each has its share. So a step is a list of rows, each an image, a text and a weight. Equal texts of a
image are one row: a scale of 1 costs no second one. It knows neither schedulers nor how a row is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.diffusion.inpainting import Inpainting
from core.engine import JobError
from core.pretrained.denoising import SchedulerRun


@dataclass(eq=False)
class PretrainedRun:
    """A request being generated (`core.engine.Run`). `guided` has, for each image, the weight of every text that it is
    predicted under in the steps from `interval[0]` to before `interval[1]`, `unguided` the same of the others.
    `parameters` is what each image says about how it came about. With an `error` it is finished too."""

    seeds: list[int]
    guided: list[dict[str, float]]
    unguided: list[dict[str, float]]
    interval: tuple[int, int]
    parameters: list[dict[str, Any]]
    trajectory: SchedulerRun
    inpainting: Inpainting | None
    watermark: bool
    num_evaluations: list[int] = field(default_factory=list)
    error: JobError | None = None

    @property
    def texts(self) -> list[dict[str, float]]:
        """The weight of every text in the next step, for each image."""
        first, last = self.interval
        return self.guided if first <= self.done < last else self.unguided

    @property
    def num_images(self) -> int:
        return len(self.seeds)

    @property
    def done(self) -> int:
        return self.trajectory.done

    @property
    def total(self) -> int:
        return self.trajectory.total

    @property
    def finished(self) -> bool:
        return self.error is not None or self.trajectory.finished


def text_weights(prompt: str, negative: str, scale: float, target: str | None = None, share: float = 0.0,
                 ) -> dict[str, float]:
    """Text -> weight of one image's prediction; the weights sum to 1. `share` is how far it is on the way to the
    `target`."""
    found: dict[str, float] = {}
    parts = [(prompt, scale * (1.0 - share)), (negative, 1.0 - scale)]
    for text, weight in [*parts, *([] if target is None else [(target, scale * share)])]:
        found[text] = found.get(text, 0.0) + weight
    return {text: weight for text, weight in found.items() if weight != 0.0} or {prompt: 1.0}


class RowBatch:
    """The rows of several runs, in the order of their images. It holds while the runs and their texts stay the same.

    `encoded` has what the text encoder says of every text, [length, width].
    """

    def __init__(self, runs: Sequence[PretrainedRun], encoded: Mapping[str, Tensor]) -> None:
        self.runs, self._texts = tuple(runs), [run.texts for run in runs]
        rows = [(image, text, weight) for image, texts in enumerate(one for texts in self._texts for one in texts)
                for text, weight in texts.items()]
        self.num_images = sum(run.num_images for run in runs)
        self.images = [image for image, _, _ in rows]
        self._index = torch.tensor(self.images)
        self._weights = torch.tensor([weight for _, _, weight in rows]).view(-1, 1, 1, 1)
        self._encoded_prompts = torch.stack([encoded[text] for _, text, _ in rows])  # [R, length, width]

    def is_of(self, runs: Sequence[PretrainedRun]) -> bool:
        """Whether these are its runs, in this order and under these texts."""
        return len(runs) == len(self.runs) and all(
            one is other and one.texts is texts
            for one, other, texts in zip(runs, self.runs, self._texts, strict=True))

    def inputs(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, C, h, w] and timesteps [B] of the images -> those of the rows, and the rows' texts."""
        return x[self._index], timesteps[self._index], self._encoded_prompts

    def combine(self, prediction: Tensor) -> Tensor:
        """The rows' predictions [R, C, h, w] -> the guided ones of the images [B, C, h, w]."""
        guided = prediction.new_zeros((self.num_images, *prediction.shape[1:]))
        return guided.index_add_(0, self._index, prediction * self._weights)
