"""Which of the server's models does a request mean, and what is told of them?

A request that names none means the first. It is checked against what its model says of itself: its samplers, the size
of its latents, what it lacks. This file does not know what is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.engine import EngineInfo
from core.jobs.service import EngineService
from core.web.errors import Problem, shown
from core.web.requests import TextToImage
from core.web.validation import invalid


def unknown(service: EngineService, pointer: tuple[str, ...], name: str) -> Problem:
    """The problem of a name that is no model's."""
    return invalid([(pointer, f"must be one of {', '.join(service.models.names)}; got {shown(name)}")])


def chosen(service: EngineService, first: EngineInfo, body: Any) -> EngineInfo:
    """What the model says of itself that a body of POST /text_to_image names, `first` where it names none.

    Raises a 422 problem for an unknown name.
    """
    name = body.get("model") if isinstance(body, Mapping) else None
    if not isinstance(name, str):  # the schema says what is wrong with other values
        return first
    info = service.info_of(name)
    if info is None:
        raise unknown(service, ("model",), name)
    return info


def refinement(service: EngineService, info: EngineInfo, wanted: TextToImage) -> dict[str, Any] | None:
    """What is kept of `refine`: the model's name and hash, the strength, the prompt (None: that of the request).

    Raises a 422 problem for an unknown model.
    """
    if wanted.refine is None:
        return None
    refiner = info if wanted.refine.model is None else service.info_of(wanted.refine.model)
    if refiner is None:
        raise unknown(service, ("refine", "model"), wanted.refine.model or "")
    return {"model": refiner.name, "model_hash": refiner.model_hash, "strength": wanted.refine.strength,
            "prompt": wanted.refine.prompt}


def drawn_by(service: EngineService, first: EngineInfo, model_hash: str) -> EngineInfo:
    """What the model says of itself that has these weights; `first` where none has."""
    return next((info for info in service.models.infos if info.model_hash == model_hash), first)


def failed_models_of(service: EngineService) -> list[dict[str, str]]:
    """The models that cannot be used, and why."""
    return [{"name": name, "failure": why} for name, why in service.models.failed.items() if service.info is not None]


def all_models(service: EngineService) -> list[dict[str, Any]]:
    """Every model for GET /options, as far as it is known, the first one first."""
    found = []
    for info in service.models.infos if service.info is not None else ():
        name = service.models.find(info.name) or ""
        found.append({
            "name": info.name, "kind": info.kind, "hash": info.model_hash, "device": info.device,
            "engine": info.engine, "image_size": info.image_size, "latent_shape": list(info.latent_shape),
            "lacks": sorted(info.lacks), "loaded": service.models.is_loaded(name),
            "failure": service.models.failure(name),
        })
    return found
