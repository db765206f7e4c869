"""What can be asked for here: which limits, defaults and choices, and what do steps buy?

`GET /options`, and what in the JSON Schemas depends on the loaded model. All of it is read from the schemas of
`core/web/requests.py` and from what the model says of itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from core.engine import MANY_STEPS, EngineInfo
from core.imaging.file_sanitizer import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS
from core.text.attribute_sliders import sliders
from core.text.word_status import spoken_attributes
from core.web.requests import (
    ALIASES,
    EXAMPLES,
    MAX_BODY_BYTES,
    MAX_DRAW_BODY_BYTES,
    PROMISED_STEPS,
    TextToImage,
)
from core.web.validation import bounds
from core.web.values import MAX_MASK_BYTES

QUALITY = (("Draft", 0.20), ("Fast", 0.05), ("Fine", 0.02))  # a name, and how far from the best of the measured curve
START_QUALITY = "Fast"  # what the page begins with
UNMEASURED_QUALITY = {"Draft": 25, "Fast": 50, "Fine": 150}  # where the model brings no curve


def text_length(latent_shape: Sequence[int]) -> int:
    """Characters of a latent as base64 of float32."""
    return 4 * -(-4 * int(np.prod(latent_shape)) // 3)


def name_choices(schemas: dict[str, Any], info: EngineInfo, others: Sequence[EngineInfo] = ()) -> None:
    """Write into the JSON Schemas what depends on the models: their samplers, their names, the sizes of latents. `info`
    is the first one's, whose latents the routes without a job take."""
    infos = [info, *(other for other in others if other.name != info.name)]
    length, lengths = text_length(info.latent_shape), [text_length(one.latent_shape) for one in infos]
    fields = schemas["TextToImage"]["properties"]
    samplers = dict.fromkeys(name for one in infos for name in one.samplers)
    names = [one.name for one in infos]
    for members, name, choices in ((fields, "sampler", list(samplers)), (fields, "model", names),
                                   (schemas["Refine"]["properties"], "model", names)):
        members[name]["anyOf"] = [{"type": "string", "enum": choices}, {"type": "null"}]
    one, many, _ = fields["latent"]["anyOf"]
    target = schemas["InterpolateTo"]["properties"]["latent"]["anyOf"][0]
    for latent in (one, many["items"], target):
        latent |= {"minLength": min(lengths), "maxLength": max(lengths)}
    schemas["GiveLatent"]["properties"]["latent"] |= {"minLength": length, "maxLength": length}


def fewest_steps(curve: Sequence[Mapping[str, Any]], share: float) -> int | None:
    """The fewest measured steps whose distance to real faces is within `share` of the best; None without a curve."""
    if not curve:
        return None
    best = min(point["frechet_over_floor"] for point in curve)
    return min(point["steps"] for point in curve if point["frechet_over_floor"] <= best * (1 + share))


def quality(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Names for numbers of steps, fewest first: from the measured curve, and the steps that the interface promises.

    Two names with the same number become one, which keeps the name that the page begins with.
    """
    found: dict[int, dict[str, Any]] = {}
    for name, share in QUALITY:
        steps = fewest_steps(curve, share) or UNMEASURED_QUALITY[name]
        kept = found.get(steps)
        name = START_QUALITY if kept and START_QUALITY in (kept["name"], name) else name
        found[steps] = {"name": name, "steps": steps, "within": share if curve else None,
                        "default": name == START_QUALITY}
    found.setdefault(PROMISED_STEPS, {"name": "Full", "steps": PROMISED_STEPS, "within": None, "default": False})
    return [found[steps] for steps in sorted(found)]


def options(info: EngineInfo | None, words: Collection[str] = (), examples: Sequence[str] = (),
            models: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Limits, defaults, samplers, models, examples: everything the page would otherwise repeat.

    `info` is of the model that is asked about, `models` tells of all. What that model lacks is not there. Sliders are
    those that a model can follow which read captions of these `words` (none: all). `examples` are captions that a
    person wrote, where the model learned from those.
    """
    lacks = info.lacks if info is not None else frozenset()
    fields = {
        name: {**bounds(TextToImage, name), "default": None if field.is_required() else field.default,
               "description": field.description}
        for name, field in TextToImage.model_fields.items() if name not in lacks
    }
    if info is not None:
        fields["guidance_scale"] |= {"default": info.default_guidance_scale,
                                     "one_pass": list(info.guidance_range) if info.guidance_range else None}
        fields["sampler"] |= {"default": info.default_sampler, "choices": list(info.samplers),
                              "long_default": info.long_sampler, "long_above": MANY_STEPS}
        names = [str(model["name"]) for model in models] or [info.name]
        fields["model"] |= {"default": names[0], "choices": names}
    return {
        "fields": fields,
        "aliases": ALIASES,
        "samplers": list(info.samplers) if info else [],
        "few_steps": dict(info.few_steps) if info else {},
        "models": list(models),
        "quality": quality(info.step_curve if info else ()),
        "step_curve": [dict(point) for point in info.step_curve] if info else [],
        "examples": list(examples[: len(EXAMPLES)] or EXAMPLES),
        "attributes": [
            {**asdict(slider), "response": info.sliders.get(name) if info else None}
            for name, slider in sliders().items() if name in spoken_attributes(words) and "attributes" not in lacks
        ],
        "limits": {
            "body_bytes": MAX_BODY_BYTES,
            "draw_body_bytes": MAX_DRAW_BODY_BYTES,
            "mask_bytes": MAX_MASK_BYTES,
            "image_bytes": MAX_PICTURE_BYTES,
            "image_pixels": MAX_PICTURE_PIXELS,
        },
    }
