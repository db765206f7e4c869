"""What does the OpenAPI document say of the whole API?

Title, tags, the problems that every route may answer with, the ways to send the key, the shapes of path parameters.
What each route says of itself stands beside its view; `core/web/openapi.py` puts both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Flask

from core.engine import EngineInfo
from core.web import openapi, options, responses
from core.web.security import KEY_COOKIE

PUBLIC_ENDPOINTS = frozenset(("page", "static_file", "session", "health"))  # all that needs no key
INFO = {
    "title": "Text to face",
    "version": "1.0.0",
    "description": "Draws faces from English. Ask with POST /text_to_image, watch with GET /jobs/{job_id}/.",
}
TAGS = {
    "jobs": "Ask, watch, list, cancel, delete.",
    "results": "What was drawn, as files.",
    "latents": "Pictures to latents and back, without a job.",
    "prompts": "What the model understands.",
    "other clients": "Routes of other servers, for programs that speak to those.",
    "server": "Limits, state, numbers, this document.",
    "page": "The web page.",
}
COMMON_PROBLEMS = {
    401: "The key is missing or wrong; only where the server was started with one.",
    403: "The Host or the Origin is not allowed.",
    500: "A fault of the server.",
}
KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": KEY_COOKIE},
}
PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "job_id": {"schema": {"type": "string", "pattern": "^[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{32}$"}},
    "index": {"schema": {"type": "integer", "minimum": 0, "maximum": 7}},
    "name": {"schema": {"type": "string", "pattern": r"^[A-Za-z0-9_.-]+\.(js|css|svg|png|webmanifest)$"}},
}


def describe(
    app: Flask, info: EngineInfo | None, *, locked: bool, others: Sequence[EngineInfo] = ()
) -> dict[str, Any]:
    """The OpenAPI document; once the model is loaded it also names the samplers and the size of a latent."""
    document = openapi.document(
        app, info=INFO, tags=TAGS, problem=responses.ProblemAnswer, common=COMMON_PROBLEMS,
        path_parameters=PATH_PARAMETERS, public=PUBLIC_ENDPOINTS, security=KEY_SCHEMES if locked else {},
    )
    if info is not None:
        options.name_choices(document["components"]["schemas"], info, others)
    return document
