"""How are several predictions of a network combined, so that images follow their prompts more closely?

Classifier-free guidance (https://arxiv.org/abs/2207.12598), a negative prompt in place of the null condition, and
semantic guidance: an attribute slider adds the difference between two phrases' predictions, not during the first steps,
which decide pose and place (https://arxiv.org/abs/2301.12247). A scale of 1 is off and costs no second pass.
It knows neither samplers nor the text encoder; `core/text/attribute_sliders.py` has the words of the sliders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor

from core.diffusion.conditioning import Condition, Model, join_conditions
from core.text.attribute_sliders import moved, sliders


@dataclass(frozen=True)
class Guidance:
    """What one job's images should be, how strongly (w = ``scale``) and away from what.

    ``negative`` None is the learned null. ``target`` is a condition to lead to: image i stands at the share
    ``weights[i]`` of the way, and is predicted by so much of both. Mixing what the network says, not what it is told,
    is smooth and exact at both ends, whatever the lengths of the texts (the score of a product of experts,
    https://arxiv.org/abs/2206.01714, eq. 11).

    an edit direction is a weight and a condition whose answer, so weighed, is added to the guided prediction. The
    weights of all edit directions sum to 0, or the level of noise would drift; pairs of +s and -s lead from one text
    towards another (semantic guidance, https://arxiv.org/abs/2301.12247). All conditions have one row an image.

    ``guidance_range`` are the scales that the network answers in one pass, from the first to the last, where it was
    distilled (core/diffusion/distillation.py): nothing but a negative needs a second one then.
    """

    condition: Condition
    scale: float = 1.0
    negative: Condition | None = None
    target: Condition | None = None
    weights: Sequence[float] = ()
    edit_directions: tuple[tuple[float, Condition], ...] = ()
    guidance_range: tuple[float, float] | None = None

    @property
    def is_guidance_distilled(self) -> bool:
        """Does one pass of the network give the guided prediction?"""
        inside = self.guidance_range is not None and self.guidance_range[0] <= self.scale <= self.guidance_range[1]
        return inside and self.scale != 1.0 and self.negative is None

    @property
    def scales(self) -> list[float]:
        """How strongly each image is guided: away from a negative always, else where there is text, on a way from one
        text to another in proportion."""
        if self.negative is not None:
            return [self.scale] * len(self.condition)
        found = self.condition.at_scale(self.scale).guidance
        if self.target is not None:
            found = found.lerp(self.target.at_scale(self.scale).guidance, torch.tensor(list(self.weights)).to(found))
        return found.tolist()

    def passes(self) -> list[Condition]:
        """The conditions to run: the wanted alone (w = 1: off, or w known), the unwanted alone (w = 0), else both."""
        wanted = self.condition
        if self.target is not None:
            ends = [(wanted, self.target)[weight == 1.0][i : i + 1] for i, weight in enumerate(self.weights)]
            wanted = join_conditions(ends)
        if self.is_guidance_distilled:
            return [wanted.at_scale(self.scale)]
        if self.scale == 1.0:
            return [wanted]
        unwanted = self.condition.nulled() if self.negative is None else self.negative
        return [unwanted] if self.scale == 0.0 else [wanted, unwanted]

    def between(self) -> list[int]:
        """The images that need the target's prediction beside that of the condition."""
        leads = self.target is not None and self.scale != 0.0
        return [i for i, weight in enumerate(self.weights) if leads and 0.0 < weight < 1.0]

    @cached_property
    def num_passes(self) -> list[int]:
        """How often the network is asked about each image, at each step."""
        passes, between = len(self.passes()) + len(self.edit_directions), self.between()
        return [passes + (i in between) for i in range(len(self.condition))]


class Role(IntEnum):
    """What a further answer is to the guided prediction, in the order in which they enter it."""

    TARGET = 0  # what is wanted lies so far on the way there
    UNWANTED = 1  # compared with it
    PUSH = 2  # added, so weighed


@dataclass(frozen=True)
class Term:
    """Rows of the network's call beside the first one of every image: whose they are, and how much they count.

    An image has a `role` once, but for edit directions, which are numbered.
    Shapes: images int64 [n], weights [n, 1, 1, 1], condition of n rows.
    """

    role: Role
    number: int
    pictures: Tensor
    weights: Tensor
    condition: Condition

    @classmethod
    def of(cls, role: Role, pictures: Sequence[int], weights: Sequence[float], condition: Condition, number: int = 0
           ) -> Term:
        """From one number an image, on the device of the condition."""
        device = condition.px.device
        return cls(role, number, torch.tensor(pictures, device=device),
                   torch.tensor(weights, device=device).view(-1, 1, 1, 1), condition)

    @property
    def place(self) -> tuple[Role, int]:
        """Terms of the same place are computed as one."""
        return self.role, self.number

    def __len__(self) -> int:
        return len(self.pictures)

    def enter(self, prediction: Tensor, answer: Tensor) -> Tensor:
        """The prediction of all images [N, C, h, w] with the network's answer to these rows [n, C, h, w] in it."""
        if self.role == Role.PUSH:  # no image twice: the sum has one order on any device
            return prediction.index_add(0, self.pictures, self.weights * answer)
        everybody = len(self) == len(prediction)
        mine = prediction if everybody else prediction[self.pictures]
        one, other = (mine, answer) if self.role == Role.TARGET else (answer, mine)
        found = one + self.weights * (other - one)
        return found if everybody else prediction.index_copy(0, self.pictures, found)


def terms_of(job: Guidance, first: int) -> list[Term]:
    """What a job asks beside the wanted, for its images, which are numbered from `first` on."""
    pictures = range(first, first + len(job.condition))
    found = [Term.of(Role.UNWANTED, pictures, [job.scale] * len(pictures), one) for one in job.passes()[1:]]
    if (between := job.between()) and job.target is not None:
        target = job.target[torch.tensor(between, device=job.target.px.device)]
        target = target.at_scale(job.scale) if job.is_guidance_distilled else target
        weights = [job.weights[i] for i in between]
        found.append(Term.of(Role.TARGET, [pictures[i] for i in between], weights, target))
    return found + [Term.of(Role.PUSH, pictures, [weight] * len(pictures), one, number)
                    for number, (weight, one) in enumerate(job.edit_directions)]


def join_terms(parts: Sequence[Term]) -> Term:
    """The terms of several jobs, all of one place, as one."""
    return Term(*parts[0].place, torch.cat([part.pictures for part in parts]),
                torch.cat([part.weights for part in parts]), join_conditions([part.condition for part in parts]))


class GuidedBatch:
    """Classifier-free guidance and edit directions, u + w (c - u) + sum s_k p_k, for several jobs in one call of the
    network.

    Its rows are one for every image, in the order of the jobs, after them one for each image between two
    conditions, a second one for each image whose job compares (two passes), and then, edit direction by edit direction,
    one for each image whose job has so many. A job without edit directions gets exactly what it gets without its
    neighbours'. It holds while the jobs stay the same: build it once, not once a step.
    """

    def __init__(self, jobs: Sequence[Guidance]) -> None:
        firsts = list(accumulate((len(job.condition) for job in jobs), initial=0))
        self.num_pictures = firsts.pop()
        terms = [term for job, first in zip(jobs, firsts, strict=True) for term in terms_of(job, first)]
        groups = groupby(sorted(terms, key=lambda term: term.place), key=lambda term: term.place)
        self._terms = [join_terms(list(group)) for _, group in groups]
        wanted = [job.passes()[0] for job in jobs]
        self.condition = join_conditions([*wanted, *(term.condition for term in self._terms)])
        again = [term.pictures for term in self._terms]
        self._again = torch.cat(again) if again else None
        # which image each row belongs to
        self.pictures = [*range(self.num_pictures), *(i for pictures in again for i in pictures.tolist())]

    def inputs(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """What to ask the network: x [N, C, h, w] and timestep [N] of N images, spread over the rows."""
        if self._again is None:
            return x, timestep, self.condition
        return torch.cat([x, x[self._again]]), torch.cat([timestep, timestep[self._again]]), self.condition

    def combine(self, prediction: Tensor) -> Tensor:
        """The network's answer, one row a row of ``inputs``, as one guided prediction an image [N, C, h, w]."""
        result, *answers = prediction.split([self.num_pictures, *map(len, self._terms)])
        for term, answer in zip(self._terms, answers, strict=True):
            result = term.enter(result, answer)
        return result


def guided(
    model: Model,
    x: Tensor,
    timestep: Tensor,
    condition: Condition,
    guidance_scale: float,
    negative: Condition | None = None,
    guidance_range: tuple[float, float] | None = None,
) -> Tensor:
    """The guided prediction of one job at one noise level: ``GuidedBatch`` of this job alone.

    Shapes: x [B, C, h, w], timestep [B], result [B, C, h, w].
    """
    batch = GuidedBatch([Guidance(condition, guidance_scale, negative, guidance_range=guidance_range)])
    return batch.combine(model(*batch.inputs(x, timestep)))


EDIT_STRENGTH = 3.0  # of an edit direction at slider 1, as guidance scales count
EDIT_START = 0.2  # share of the steps before the first edit direction


def edit_prompts(prompt: str, attribute: str, encoded_length: Callable[[str], int] = len) -> tuple[str, str]:
    """The texts to lead away from and to lead to, when the slider is moved to the right.

    Words at the end of a long prompt go where the text encoder, which reads ``encoded_length`` characters of a text,
    would not read the slider's: both captions would be the same, and the slider would do nothing.
    """
    slider = sliders()[attribute]
    while True:
        start = f"{prompt.rstrip(' .,;')}, " if prompt.strip() else ""
        found = start + slider.less, start + slider.more
        if not start or all(encoded_length(text) >= len(text) for text in found):
            return found
        prompt = prompt.rstrip()
        prompt = prompt[: max(prompt.rfind(" "), 0)]


def edit_directions(
    prompts: Sequence[str], attributes: Mapping[str, float], encode: Callable[[Sequence[str]], Condition],
    encoded_length: Callable[[str], int] = len,
) -> tuple[tuple[float, Condition], ...]:
    """The edit directions of `core.diffusion.guidance.Guidance` for images of these prompts; none for sliders at 0.

    `encode` turns one text an image into conditions. Raises ValueError for unknown attributes and values out of range.
    """
    found: list[tuple[float, Condition]] = []
    for name, value in moved(attributes).items():
        less, more = zip(*(edit_prompts(prompt, name, encoded_length) for prompt in prompts), strict=True)
        found += [(EDIT_STRENGTH * value, encode(more)), (-EDIT_STRENGTH * value, encode(less))]
    return tuple(found)
