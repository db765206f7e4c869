"""An engine without a model: draws a face-like cartoon from the seed, sharper with every step. No torch.

It keeps the engine's promises (image i depends on seed + i alone, `should_stop` is looked at every step, previews are
drawn only when asked for), so everything in front of the model can be tested in milliseconds.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from core.jobs import JobCancelled

LATENT_SHAPE = (4, 2, 2)


@dataclass(frozen=True)
class DrawingInfo:
    name: str = "drawing"
    model_hash: str = "d" * 64
    device: str = "paper"
    image_size: int = 32
    latent_shape: tuple[int, int, int] = LATENT_SHAPE
    samplers: tuple[str, ...] = ("Pencil", "DPM++ 2M")
    default_sampler: str = "Pencil"
    default_guidance_scale: float = 3.0


@dataclass(frozen=True)
class Drawing:
    index: int
    seed: int
    png: bytes
    latent: bytes


@dataclass(frozen=True)
class DrawingStep:
    done: int
    total: int
    previews: Callable[[], list[Drawing]]


def draw(prompt: str, seed: int, size: int, blur: float) -> bytes:
    """A cartoon face as PNG bytes; hair and skin come from the seed, the mouth from the prompt."""
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
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(blur)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class DrawingEngine:
    """`before_step(step)` lets a test do something at an exact moment; `calls` records what was asked for."""

    info: DrawingInfo = DrawingInfo()
    before_step: Callable[[int], None] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def generate(
        self,
        prompt: str,
        *,
        num_images: int,
        num_inference_steps: int,
        seed: int,
        guidance_scale: float,
        negative_prompt: str,
        sampler: str,
        latents: np.ndarray | None,
        start: float,
        on_step: Callable[[Any], None],
        should_stop: Callable[[], bool],
    ) -> Sequence[Drawing]:
        self.calls.append({"prompt": prompt, "seed": seed, "sampler": sampler, "guidance_scale": guidance_scale,
                           "negative_prompt": negative_prompt, "latents": latents, "start": start})
        total = num_inference_steps

        def pictures(done: int) -> list[Drawing]:
            found = []
            for i in range(num_images):
                z = np.random.default_rng(seed + i).standard_normal(LATENT_SHAPE) if latents is None else latents[i]
                png = draw(prompt, seed + i, self.info.image_size, 6 * (1 - done / total))
                found.append(Drawing(i, seed + i, png, z.astype("<f4").tobytes()))
            return found

        for done in range(int(start * total) + 1, total + 1):
            if self.before_step is not None:
                self.before_step(done)
            on_step(DrawingStep(done, total, lambda at=done: pictures(at)))
            if should_stop():
                raise JobCancelled
        return pictures(total)
