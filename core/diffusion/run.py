"""What is one request while it is under way, and how does it begin?

`check` fills in what a request leaves open and refuses what cannot be, `find_start` gives the noise or the latents that
it starts from, `encode_texts` its conditions, `plan_guidance` how strongly each step follows them, and `new_run` puts
these together. It does not know networks: what encodes texts and pictures is passed in. How runs share the calls of a
network is in `core/diffusion/run_batch.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.diffusion.conditioning import Condition, join_conditions
from core.diffusion.guidance import START, Guidance, pushes
from core.diffusion.initial_noise import Start, starting_noise
from core.diffusion.inpainting import Redraw
from core.diffusion.latent_correction import Correction
from core.diffusion.sampling import Denoising, NotFiniteError
from core.diffusion.schedule import schedule_from_config
from core.diffusion.schedulers import TURBO, make_scheduler
from core.engine import DrawRequest, EngineInfo, JobError, usual_sampler, usual_strength
from core.imaging.generation_parameters import receipts
from core.text.attribute_sliders import moved
from core.text.prompt_balancing import balanced


@dataclass(frozen=True)
class Phase:
    """From step `first` on, `guidance` holds."""

    first: int
    guidance: Guidance


@dataclass(eq=False)
class Run:
    """A request under way: how far it is, and what is its own alone, from the scheduler to the random numbers.

    `request` has every default filled in. `asked` is what each of its images says about how it came about, with prompts
    of their own where they are balanced. `phases` are the guidances of its steps, in order. `redraw` is there when only
    part of a picture is drawn. `evaluations` counts how often the network was asked for each image. `error` says why
    the run failed; then it is finished too.
    """

    request: DrawRequest
    seeds: list[int]
    asked: list[dict[str, Any]]
    phases: Sequence[Phase]
    denoising: Denoising
    redraw: Redraw | None
    evaluations: list[int]
    error: JobError | None = None

    @property
    def guidance(self) -> Guidance:
        """That of the next step."""
        return next(phase.guidance for phase in reversed(self.phases) if phase.first <= self.done)

    @property
    def turbo(self) -> bool:
        """Whether it is drawn by the network of few steps."""
        return self.request.sampler == TURBO

    @property
    def num_images(self) -> int:
        return len(self.seeds)

    @property
    def done(self) -> int:
        """Steps behind it; those that a later start skipped count as done."""
        return self.denoising.done

    @property
    def total(self) -> int:
        return self.denoising.total

    @property
    def finished(self) -> bool:
        return self.error is not None or self.denoising.finished

    def advance(self, prediction: Tensor) -> None:
        """One step by the guided prediction of its images [B, C, h, w]. Raises NotFiniteError on NaN or infinity."""
        passes = self.guidance.num_passes
        self.evaluations = [before + more for before, more in zip(self.evaluations, passes, strict=True)]
        if self.redraw is not None:
            prediction = self.redraw.constrain(self.denoising, prediction)
        self.denoising.advance(prediction)

    def composite(self, pixels: np.ndarray) -> np.ndarray:
        """Decoded images as they are shown: with the protected part of the picture, if only part of it is drawn.

        Shapes: uint8 [B, H, W, 3] -> the same.
        """
        return pixels if self.redraw is None else self.redraw.composite(pixels)


def check(request: DrawRequest, info: EngineInfo) -> DrawRequest:
    """The request with every default filled in and sliders at 0 left out. Raises ValueError for a value out of range or
    what does not go together."""
    count, steps = request.num_images, request.num_inference_steps
    if count < 1 or steps < 1 or not 0 <= request.start <= 1:
        raise ValueError("num_images and num_inference_steps must be at least 1 and start from 0 to 1; "
                         f"got {count}, {steps}, {request.start}")
    if request.num_candidates < count:
        raise ValueError(f"candidates must be at least num_images = {count}, got {request.candidates}")
    if request.start > 0 and request.latents is None:
        raise ValueError(f"start = {request.start} needs latents to start from")
    sampler = usual_sampler(info, steps) if request.sampler is None else request.sampler
    if sampler == TURBO and TURBO not in info.samplers:
        raise ValueError(f"sampler {TURBO!r} is not there: the model has no turbo/")
    shape = [request.num_candidates, *info.latent_shape]
    if request.latents is not None and list(np.shape(request.latents)) != shape:
        raise ValueError(f"latents must have shape {shape}, got {list(np.shape(request.latents))}")
    strength = usual_strength(request.mask is not None) if request.strength is None else request.strength
    unsound = request.latents is not None or not 0 <= strength <= 1
    if request.mask is not None if request.init_image is None else unsound:
        raise ValueError("a mask needs an init_image, and that a strength from 0 to 1, and cannot have latents; "
                         f"got strength {strength}")
    scale = info.default_guidance_scale if request.guidance_scale is None else float(request.guidance_scale)
    low, high = request.guidance_interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval must be two shares of the steps from 0 to 1, in order; got {low}, {high}")
    return replace(request, guidance_scale=scale, sampler=sampler, strength=strength,
                   attributes=moved(request.attributes or {}),
                   guidance_interval=None if (low, high) == (0, 1) else (low, high))


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from: its noise, and where it does not start from noise alone, the latents `z` [B, C, h, w],
    the share of the steps that is skipped, and what is kept of a picture."""

    noise: Start
    skipped: float = 0.0
    z: Tensor | None = None
    redraw: Redraw | None = None


def find_start(
    request: DrawRequest, latent_shape: Sequence[int], encode_image: Callable[[np.ndarray], np.ndarray]
) -> StartingPoint:
    """What a checked request starts from. `encode_image` gives a picture's whitened latent.

    Shapes: uint8 [H, W, 3] -> float32 [C, h, w]. Raises ValueError for a picture or a mask of another shape or type,
    JobError (`out_of_memory`).
    """
    noise = starting_noise(request, latent_shape)
    if request.init_image is not None:
        z = torch.from_numpy(encode_image(request.init_image)).expand(len(noise.seeds), *latent_shape)
        redraw = None if request.mask is None else Redraw(request.init_image, request.mask, z[0])
        return StartingPoint(noise, 1 - (request.strength or 0.0), z, redraw)
    if request.latents is None:
        return StartingPoint(noise)
    return StartingPoint(noise, request.start, torch.as_tensor(np.array(request.latents), dtype=torch.float32))


@dataclass(frozen=True)
class EncodedTexts:
    """The texts of a request, one row an image: the prompts as they are told, and the conditions of these, of what to
    avoid, of where an interpolation leads, and of the sliders."""

    prompts: Sequence[str]
    condition: Condition
    negative: Condition | None
    target: Condition | None
    directions: tuple[tuple[float, Condition], ...]


def encode_texts(request: DrawRequest, info: EngineInfo, encode_prompt: Callable[[str], Condition]) -> EncodedTexts:
    """The conditions of a checked request. `encode_prompt` gives one text's, of one row; it may raise JobError
    (`out_of_memory`)."""
    known: dict[str, Condition] = {}

    def encode(texts: Sequence[str]) -> Condition:
        """Each text is read alone, so that no row depends on the others."""
        for text in dict.fromkeys(texts):
            if text not in known:
                known[text] = encode_prompt(text)
        if len(set(texts)) == 1:
            return known[texts[0]].repeat(len(texts))
        return join_conditions([known[text] for text in texts])

    count, in_words, goal = request.num_candidates, info.emphasis, request.interpolate_to
    prompts = [request.prompt] * count
    if request.balance:  # candidate j is another try at image j modulo num_images
        prompts = [balanced(request.prompt, request.seed + j % request.num_images) for j in range(count)]
    return EncodedTexts(
        prompts,
        condition=encode([in_words(prompt) for prompt in prompts]),
        negative=encode([request.negative_prompt] * count) if request.negative_prompt.strip() else None,
        target=None if goal is None or goal.prompt is None else encode([in_words(goal.prompt)] * count),
        directions=pushes(prompts, request.attributes or {}, encode, info.read_to),
    )


def plan_guidance(
    request: DrawRequest, texts: EncodedTexts, weights: Sequence[float], known: tuple[float, float] | None
) -> list[Phase]:
    """Which guidance holds from which step of a checked request on; image i stands at the share `weights[i]` of the way
    to `interpolate_to`. `known` are the guidance scales that one pass of the network answers, if any."""
    plain = Guidance(
        texts.condition,
        float(request.guidance_scale or 0.0),
        negative=texts.negative,
        target=texts.target,
        weights=weights if texts.target is not None else (),
        known=known,
    )
    steps, (low, high) = request.num_inference_steps, request.guidance_interval or (0.0, 1.0)
    first, last = (math.ceil(share * steps - 1e-6) for share in (low, high))  # 0.3 * 10 is more than 3
    phases = [Phase(first, plain)]
    if texts.directions:
        phases.append(Phase(max(first, int(START * steps)), replace(plain, pushes=texts.directions)))
    unguided = replace(plain, scale=1.0, negative=None)
    before, after = [Phase(0, unguided)] * (first > 0), [Phase(last, unguided)] * (last < steps)
    return [*before, *(phase for phase in phases if phase.first < last), *after]


def mean_scales(phases: Sequence[Phase], steps: int) -> list[float]:
    """The guidance scale of each image, in the mean over the steps: what their latents are to be corrected for."""
    scales, ends = [phase.guidance.scales for phase in phases], [*(phase.first for phase in phases[1:]), steps]
    if all(one == scales[0] for one in scales):
        return scales[0]  # to the last digit, which a mean is not
    spans = [end - phase.first for phase, end in zip(phases, ends, strict=True)]
    return [sum(map(operator.mul, own, spans)) / steps for own in zip(*scales, strict=True)]


def new_run(
    request: DrawRequest,
    start: StartingPoint,
    texts: EncodedTexts,
    phases: Sequence[Phase],
    scheduler_config: Mapping[str, Any],
    correction: Correction | None,
) -> Run:
    """A checked request before its first step, with a scheduler of its own. Raises ValueError for a sampler that does
    not fit the schedule and for more than 1000 steps."""
    correct = None
    if correction is not None and start.redraw is None:  # what stays of a photograph needs no mending
        correct = partial(correction, scales=mean_scales(phases, request.num_inference_steps))
    # The sampler's arithmetic stays on the CPU: dozens of operations on a few kilobytes, the same on every device
    denoising = Denoising(
        make_scheduler(str(request.sampler), scheduler_config),
        start.noise.noise,
        request.num_inference_steps,
        schedule=schedule_from_config(scheduler_config),
        generators=start.noise.generators,
        start=start.skipped,
        z=start.z,
        correction=correct,
    )
    asked = receipts(request, texts.prompts, start.noise.seeds, start.noise.weights)
    return Run(request, start.noise.seeds, asked, phases, denoising, start.redraw, [0] * len(texts.prompts))


def not_finite(error: NotFiniteError) -> JobError:
    """What is said when the network gave NaN or infinity."""
    return JobError("not_finite", f"No picture came out: {error}.",
                    "Try a lower guidance scale, another sampler or --device cpu.")
