"""What does a model folder say about itself?

Its name, sizes, samplers and defaults, what was measured of it, and a hash of all that decides what a seed looks like.
It does not know the networks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.diffusion.latent_correction import COMPONENT as CORRECTION
from core.diffusion.schedule import NoiseSchedule, schedule_from_config
from core.diffusion.schedulers import TURBO, TURBO_STEPS
from core.nn.checkpoint import folder_hash, read_index
from core.nn.rewriting_rules import load_prompt_rewriting
from core.text.model_captions import vocabulary_of
from core.text.prompt_rewriting import PromptRewriting
from core.text.word_status import spoken_attributes

OF_ATTRIBUTES = frozenset(("attributes", "balance", "candidates"))  # what needs words for CelebA's attributes

@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model says about itself (`core.engine.EngineInfo`)."""

    name: str
    model_hash: str
    device: str
    image_size: int
    latent_shape: tuple[int, int, int]
    samplers: tuple[str, ...]
    default_sampler: str
    long_sampler: str  # of more than `core.engine.MANY_STEPS` steps
    default_guidance_scale: float
    guidance_range: tuple[float, float] | None = None  # guidance scales that cost no second pass, if it learned any
    engine: str = f"torch {torch.__version__} f32"  # what computes the networks, and how precisely
    sliders: Mapping[str, Any] = field(default_factory=dict)  # what each was measured to do, if it was
    few_steps: Mapping[str, int] = field(default_factory=dict)  # samplers made for few steps -> how many
    step_curve: tuple[Mapping[str, Any], ...] = ()  # what more steps buy, if that was measured
    # how a description is rewritten before it is encoded
    prompt_rewriting: PromptRewriting = field(default_factory=PromptRewriting)
    encoded_length: Callable[[str], int] = field(default=len, compare=False, repr=False)  # so many characters of it
    kind: str = "faces"
    lacks: frozenset[str] = frozenset()


def read_scheduler_config(folder: str | Path) -> dict[str, Any]:
    """What a model folder stores about its noise schedule."""
    return json.loads((Path(folder) / "scheduler" / "config.json").read_text(encoding="utf-8"))


def read_info(
    folder: str | Path,
    device: torch.device,
    precision: str,
    *,
    encoded_length: Callable[[str], int],
    guidance_range: tuple[float, float] | None,
    has_turbo: bool,
) -> ModelInfo:
    """What a model folder says, for its networks on `device` computed in `precision` by torch.

    What was measured on other weights than those in the folder is left out. Raises ModelFolderError for a damaged one.
    """
    index, digest, scheduler_config = read_index(folder), model_hash(folder), read_scheduler_config(folder)
    measured, quality = index.get("sliders", {}), index.get("metrics", {})
    points = (quality.get("curve") or {}).get("points", ()) if quality.get("model_hash") == digest else ()
    return ModelInfo(
        name=index["name"],
        model_hash=digest,
        device=str(device),
        image_size=index["image_size"],
        latent_shape=tuple(index["latent_shape"]),
        samplers=(*scheduler_config["samplers"], *([TURBO] if has_turbo else [])),
        default_sampler=index["defaults"]["sampler"],
        long_sampler=index["defaults"].get("long_sampler", index["defaults"]["sampler"]),
        default_guidance_scale=float(index["defaults"]["guidance_scale"]),
        guidance_range=guidance_range,
        engine=f"torch {torch.__version__} {precision.replace('fp', 'f')}",
        sliders=measured["sliders"] if measured.get("model_hash") == digest else {},
        few_steps={TURBO: TURBO_STEPS} if has_turbo else {},
        step_curve=tuple({name: point[name] for name in ("steps", "frechet_over_floor")} for point in points),
        prompt_rewriting=load_prompt_rewriting(folder).within(encoded_length),
        encoded_length=encoded_length,
        lacks=frozenset() if spoken_attributes(vocabulary_of(Path(folder))) else OF_ATTRIBUTES,
    )


def model_hash(folder: str | Path) -> str:
    """The hash of all that decides what a seed looks like: the weights, where the way from noise begins, what corrects
    its end, and how a description is rewritten."""
    more = [name for name in ("turbo", CORRECTION) if name in read_index(folder)["components"]]
    weights = folder_hash(folder, ["clip", "vae", "unet", *more])
    initial_timestep, prompt_rewriting = (
        schedule_from_config(read_scheduler_config(folder)).initial_timestep,
        load_prompt_rewriting(folder),
    )
    rest = [str(list(initial_timestep))] if initial_timestep != NoiseSchedule.initial_timestep else []
    rest += [prompt_rewriting.to_json()] if prompt_rewriting != PromptRewriting() else []
    return hashlib.sha256(" ".join([weights, *rest]).encode()).hexdigest() if rest else weights
