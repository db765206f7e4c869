"""How are many faces generated and decoded for a measurement, exactly as users get them?

Every image that this package measures comes from the engine that serves (`core.engine.Engine`): requests are begun
and stepped together, one call of the network for all of them, so what is measured is what users run. What a measurement
wants otherwise is said in the request, or the engine was loaded with that part off. This module does not know what is
measured, nor how a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from core.engine import Engine, GeneratedImage, GenerationRequest
from core.imaging.spectrum import Pictures
from core.nn.layers import to_images, to_pixels

AT_ONCE = 32  # images that share a denoising step


class PixelPicture(GeneratedImage, Protocol):
    """An image whose pixels are at hand: uint8 [H, W, 3], those of its PNG."""

    @property
    def pixels(self) -> np.ndarray: ...


class Generator(Engine, Protocol):
    """An engine whose pixels and networks are at hand, too; `generator.FaceGenerator` is one."""

    def pictures(self, run: Any) -> Sequence[PixelPicture]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def vae(self) -> Any: ...  # encode(images).mean and .sample(generator), normalize, decode
    @property
    def clip(self) -> Any: ...  # encode_image(images) -> unit vectors


@dataclass(frozen=True)
class Sampling:
    """How faces are generated: the i-th from `seed + i`; what is None is the model's own."""

    num_inference_steps: int
    guidance_scale: float | None = None
    sampler: str | None = None
    seed: int = 0

    def requests(self, prompts: Sequence[str], seeds: Sequence[int] | None = None, *, watermark: bool = False
                 ) -> list[GenerationRequest]:
        """One image a prompt. ``seeds`` replace `seed + i`; distances are measured without the invisible mark."""
        chosen = range(self.seed, self.seed + len(prompts)) if seeds is None else seeds
        return [
            GenerationRequest(prompt, 1, self.num_inference_steps, seed, self.guidance_scale, sampler=self.sampler,
                              watermark=watermark)
            for prompt, seed in zip(prompts, chosen, strict=True)
        ]


def finished_runs(engine: Engine, requests: Sequence[GenerationRequest], at_once: int = AT_ONCE) -> Iterator[Any]:
    """The finished run of each request, in order; up to ``at_once`` requests share every denoising step.

    Raises what `begin` raises, and the JobError of a run that failed.
    """
    for first in range(0, len(requests), at_once):
        runs = [engine.start(request) for request in requests[first : first + at_once]]
        while active := [run for run in runs if not run.finished]:
            engine.step(active)
        for run in runs:
            if run.error is not None:
                raise run.error
            yield run


def generate_images(engine: Generator, requests: Sequence[GenerationRequest], at_once: int = AT_ONCE) -> Pictures:
    """The images of all requests, one after the other: uint8 [N, H, W, 3]. Raises as `finished_runs`."""
    return np.stack(_collected(engine, requests, lambda run: [one.pixels for one in engine.pictures(run)], at_once))


def generate_latents(engine: Engine, requests: Sequence[GenerationRequest], at_once: int = AT_ONCE) -> np.ndarray:
    """The normalized latents that the solver ends with, not decoded: float16 [N, C, h, w]. Raises as
    `finished_runs`."""
    return np.stack(_collected(engine, requests, lambda run: [*run.denoising.x.half().cpu().numpy()], at_once))


def _collected(
    engine: Engine, requests: Sequence[GenerationRequest], images: Callable[[Any], list[np.ndarray]], at_once: int
) -> list[np.ndarray]:
    from tqdm import tqdm

    steps = sorted({request.num_inference_steps for request in requests})
    runs = finished_runs(engine, requests, at_once)
    bar = tqdm(runs, total=len(requests), desc=f"{', '.join(map(str, steps))} steps", unit="face")
    return [image for run in bar for image in images(run)]


@torch.inference_mode()
def reconstruct(vae: Any, pictures: Pictures, batch: int = 32) -> Pictures:
    """Images through the VAE and back, by the mean of the posterior. Shapes: uint8 [N, H, W, 3] -> the same."""
    device = next(vae.parameters()).device
    copies = []
    for start in range(0, len(pictures), batch):
        images = to_images(pictures[start : start + batch]).to(device, memory_format=torch.channels_last)
        copies.append(to_pixels(vae.decode(vae.encode(images).mean)))
    return np.concatenate(copies)


@torch.inference_mode()
def image_features(clip: Any, pictures: Pictures, batch: int = 64) -> np.ndarray:
    """What the model's own image encoder makes of images: uint8 [N, H, W, 3] -> unit vectors [N, D]."""
    device = next(clip.parameters()).device
    return np.concatenate([
        clip.encode_image(to_images(pictures[start : start + batch]).to(device)).float().cpu().numpy()
        for start in range(0, len(pictures), batch)
    ])
