"""An engine without a model: generates a face-like cartoon from the seed, sharper with every step. No torch.

It keeps the engine's promises (image i depends on seed + i alone, a failing run does not disturb the others, skipped
steps count as done), so everything in front of the model can be tested in milliseconds.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from core.engine import GenerationRequest, JobError
from core.imaging.png_metadata import encode_png
from core.imaging.watermark import VERSION, mark
from core.text.lexicon import ATTRIBUTES
from core.text.prompt_parser import read
from core.text.prompt_rewriting import PromptRewriting

LATENT_SHAPE = (4, 2, 2)
TROUBLE = "trouble"  # a prompt that no image comes of
HAT = {"curve": [0.1, 0.2, 0.3, 0.5, 0.8], "evidence": [-1.0, -0.5, 0.0, 1.0, 3.0], "monotone": True,
       "identity": [0.4, 0.2, 0.0, 0.3, 0.5], "moved": {"Bangs": -0.2}}  # what the slider for hats was measured to do

STEP_CURVE = tuple({"steps": steps, "frechet_over_floor": distance}  # pencils are at their best with 100 steps
                   for steps, distance in ((2, 8.0), (4, 4.0), (16, 2.4), (50, 2.045), (100, 2.0), (500, 2.01)))


@dataclass(frozen=True)
class DrawingInfo:
    name: str = "drawing"
    model_hash: str = "d" * 64
    device: str = "paper"
    image_size: int = 32
    latent_shape: tuple[int, int, int] = LATENT_SHAPE
    samplers: tuple[str, ...] = ("Pencil", "DPM++ 2M", "Sketch")
    default_sampler: str = "Pencil"
    long_sampler: str = "Pencil"
    default_guidance_scale: float = 3.0
    guidance_range: tuple[float, float] | None = (1.0, 6.0)
    engine: str = "pencil"
    sliders: Mapping[str, Any] = field(default_factory=lambda: {"Wearing_Hat": HAT})
    few_steps: Mapping[str, int] = field(default_factory=lambda: {"Sketch": 4})
    step_curve: tuple[Mapping[str, Any], ...] = STEP_CURVE
    prompt_rewriting: PromptRewriting = field(default_factory=lambda: PromptRewriting(("Wearing_Hat",),
                                                                                      {"Eyeglasses": "glasses"}))
    encoded_length: Callable[[str], int] = len
    kind: str = "faces"
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Drawing:
    index: int
    seed: int
    png: bytes
    latent: bytes
    assessment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class DrawingRun:
    """A request being generated, `done` steps of `total` on its way."""

    asked: GenerationRequest
    done: int
    error: JobError | None = None

    @property
    def num_images(self) -> int:
        return self.asked.candidates or self.asked.num_images

    @property
    def total(self) -> int:
        return self.asked.num_inference_steps

    @property
    def finished(self) -> bool:
        return self.error is not None or self.done >= self.total


@dataclass
class DrawingInverting:
    """An inversion with nothing to compute; `left` calls are to come."""

    latent: np.ndarray
    left: int = 25

    @property
    def finished(self) -> bool:
        return self.left <= 0

    def advance(self, evaluations: int) -> None:
        self.left -= evaluations


def draw(prompt: str, seed: int, size: int, blur: float) -> np.ndarray:
    """A cartoon face, uint8 [size, size, 3]; hair and skin come from the seed, the mouth from the prompt."""
    rng = np.random.default_rng(seed)
    hair, skin = (tuple(int(c) for c in rng.integers(low, 256, 3)) for low in (0, 150))
    image = Image.new("RGB", (size, size), "steelblue")
    pen = ImageDraw.Draw(image)
    pen.ellipse((size * 0.15, size * 0.05, size * 0.85, size * 0.9), fill=hair)
    pen.ellipse((size * 0.25, size * 0.25, size * 0.75, size * 0.95), fill=skin)
    pen.ellipse((size * 0.36, size * 0.45, size * 0.42, size * 0.51), fill="black")
    pen.ellipse((size * 0.58, size * 0.45, size * 0.64, size * 0.51), fill="black")
    smile = (20, 160) if "smil" in prompt else (200, 340)
    pen.arc((size * 0.38, size * 0.6, size * 0.62, size * 0.8), *smile, fill="darkred")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(blur)))


def as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class DrawingEngine:
    """Generates every prompt but `TROUBLE`.

    `before_step(step)` lets a test do something before a run takes its step number `step`; an exception that it raises
    ends that run alone. `begun` records what was asked for, `steps` which prompts stepped together.
    """

    info: DrawingInfo = DrawingInfo()
    before_step: Callable[[int], object] | None = None
    begun: list[GenerationRequest] = field(default_factory=list)
    steps: list[list[str]] = field(default_factory=list)
    num_previews: int = 0
    copied: frozenset[int] = frozenset()  # seeds whose images are too close to a training image

    def start(self, request: GenerationRequest) -> DrawingRun:
        self.begun.append(request)
        return DrawingRun(request, int(request.start * request.num_inference_steps))

    def step(self, runs: Sequence[DrawingRun]) -> None:
        self.steps.append([run.asked.prompt for run in runs])
        for run in runs:
            try:
                if run.asked.prompt == TROUBLE:
                    raise JobError("not_finite", "No image came out.", "Try another sampler.")
                if self.before_step is not None:
                    self.before_step(run.done + 1)
                run.done += 1
            except JobError as error:
                run.error = error

    def previews(self, run: DrawingRun) -> list[Drawing]:
        found = self._drawings(run)[: run.asked.num_images]
        self.num_previews += len(found)
        return found

    def pictures(self, run: DrawingRun) -> list[Drawing]:
        """Of candidates the best: what the stand-in sees in an image depends on the seed alone."""
        found = self._drawings(run)
        if run.asked.candidates:
            found.sort(key=lambda drawing: -(drawing.assessment["adherence"] or 0))
        return [replace(drawing, index=i) for i, drawing in enumerate(found[: run.asked.num_images])]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """The mean colours of the four quarters, and their brightness. Shapes: [32, 32, 3] -> [4, 2, 2]."""
        quarters = pixels.reshape(2, 16, 2, 16, 3).mean((1, 3)).transpose(2, 0, 1) / 127.5 - 1
        return np.concatenate((quarters, quarters.mean(0, keepdims=True))).astype(np.float32)

    def inversion(self, pixels: np.ndarray, prompt: str) -> DrawingInverting:
        return DrawingInverting(-self.encode(pixels))

    def decode(self, latent: np.ndarray) -> np.ndarray:
        colours = (latent[:3].transpose(1, 2, 0).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)
        return colours.repeat(16, 0).repeat(16, 1)

    def on_idle(self) -> bool:
        return False

    def _drawings(self, run: DrawingRun) -> list[Drawing]:
        asked, found = run.asked, []
        request = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt, "n_images": 1,
                   "n_inf_steps": run.total, "sampler": asked.sampler, "guidance_scale": asked.guidance_scale}
        for i in range(run.num_images):
            seed = asked.seed if asked.variation_strength or asked.interpolate_to else (asked.seed + i) % 2**53
            z = np.random.default_rng(seed).standard_normal(LATENT_SHAPE) if asked.latents is None else asked.latents[i]
            pixels = draw(asked.prompt, seed, self.info.image_size, 6 * (1 - run.done / run.total))
            if asked.init_image is not None:  # it has no way to change an image but to generate over it
                free = np.full(pixels.shape[:2], asked.strength > 0.5) if asked.mask is None else asked.mask
                pixels = np.where(free[..., None], pixels, asked.init_image)
            png = as_png(pixels)
            if run.finished:
                pixels, version = (mark(pixels, asked.mask), VERSION) if asked.watermark else (pixels, None)
                png = encode_png(pixels, {**request, "seed": seed}, self.info, version)
            about = self._about(run, seed) if run.finished else {}
            found.append(Drawing(i, seed, png, z.astype("<f4").tobytes(), about))
        return found

    def _about(self, run: DrawingRun, seed: int) -> dict[str, Any]:
        seen = np.random.default_rng(seed).random(len(ATTRIBUTES)).round(4)
        attributes = dict(zip(ATTRIBUTES, seen.tolist(), strict=True))
        stated = read(run.asked.prompt, {}).attributes
        agreement = {name: attributes[name] if value else 1 - attributes[name] for name, value in stated.items()}
        prompt_alignment = float(np.mean(list(agreement.values()))) if agreement else None
        evaluations = run.total * (2 + 2 * len(run.asked.attributes or {}))
        balanced = {"prompt": run.asked.prompt} if run.asked.balance else {}
        nearest = {"percentile": 100.0 * attributes["Young"], "too_close": seed in self.copied}
        return {"attributes": attributes, "agreement": agreement, "adherence": prompt_alignment,
                "evaluations": evaluations,
                "nearest": nearest, **balanced}
