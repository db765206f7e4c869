"""How was an image generated, and what is known of it besides?

`generation_parameters` are the requests that PNGs carry, each of which generates its image again, alone; `assessment`
is what the answers tell of a finished image. This file does not know how either travels.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import numpy as np

from core.engine import NUM_SEEDS, OF_NO_IMAGE, GenerationRequest, body_name
from core.imaging.image_io import as_text, mask_picture

ALWAYS = ("num_inference_steps", "sampler", "guidance_scale", "negative_prompt", "start")
OWN_FORM = ("prompt", "num_images", "seed", "latents", "init_image", "strength", "mask", "variation_strength",
            "variation_seed", "interpolate_to")  # other than in the request: of this image alone, or as text


class AttributePrediction(Protocol):
    """What an attribute classifier predicts for an image."""

    @property
    def attributes(self) -> Mapping[str, float]: ...
    @property
    def agreement(self) -> Mapping[str, float]: ...
    @property
    def prompt_alignment(self) -> float | None: ...


def generation_parameters(
    request: GenerationRequest, prompts: Sequence[str], seeds: Sequence[int], weights: Sequence[float]
) -> list[dict[str, Any]]:
    """For every image the request that generates it alone: the body of POST /text_to_image with every default filled
    in, as it is in `request`.

    Image i shows `prompts[i]`, has the seed `seeds[i]`, and stands at the share `weights[i]` of the way to
    `interpolate_to`. What chose it among others, such as `candidates`, is not in it.
    """
    common: dict[str, Any] = {"n_images": 1, **{body_name(name): getattr(request, name) for name in ALWAYS}}
    if request.init_image is not None:
        common |= {"init_image": as_text(request.init_image), "strength": request.strength}
        common |= {} if request.mask is None else {"mask": as_text(mask_picture(request.mask))}
    for field in fields(GenerationRequest):
        value = getattr(request, field.name)
        if field.name not in (*ALWAYS, *OWN_FORM, *OF_NO_IMAGE) and value not in (field.default, {}):
            common[body_name(field.name)] = dict(value) if isinstance(value, Mapping) else value
    found = [{"prompt": prompt, **common, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    for i, row in enumerate(found):
        if request.latents is not None:
            row["latent"] = _text(request.latents[i])
        if request.variation_strength > 0:
            row["variation_strength"] = request.variation_strength
            row["variation_seed"] = (request.variation_seed + i) % NUM_SEEDS
        if (target := request.interpolate_to) is not None:
            goal = {"prompt": target.prompt, "seed": target.seed,
                    "latent": None if target.latent is None else _text(target.latent), "weight": weights[i]}
            row["interpolate_to"] = {name: value for name, value in goal.items() if value is not None}
    return found


def target_prompt(parameters: Mapping[str, Any]) -> str:
    """The prompt that an image is assessed by: between two prompts, the nearer one."""
    target = parameters.get("interpolate_to", {})
    return str(target["prompt"] if "prompt" in target and target["weight"] > 0.5 else parameters["prompt"])


class NearestTrainingImage(Protocol):
    """How an image stands to the nearest training image."""

    @property
    def percentile(self) -> float: ...
    @property
    def too_close(self) -> bool: ...


def assessment(prediction: AttributePrediction | None, near: NearestTrainingImage | None, evaluations: int,
               prompt: str | None) -> dict[str, Any]:
    """`core.web.responses.Assessment` of one image; `prompt` is its own where that of the request is another."""
    found: dict[str, Any] = {"attributes": None, "agreement": None, "adherence": None, "evaluations": evaluations,
                             "nearest": near and {"percentile": near.percentile, "too_close": near.too_close}}
    if prediction is not None:
        found |= {"attributes": dict(prediction.attributes), "agreement": dict(prediction.agreement),
                  "adherence": prediction.prompt_alignment}
    return found if prompt is None else found | {"prompt": prompt}


def _text(latent: Any) -> str:
    """A latent as a request carries it: base64 of little-endian float32."""
    return base64.b64encode(np.asarray(latent, "<f4").tobytes()).decode()
