"""Does the server answer, is its model loaded, what can it do, and how busy is it?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from flask import Flask, Response

from core.engine import EngineInfo
from core.jobs.service import EngineService
from core.web import server_responses as responses
from core.web.aliases import both_names
from core.web.errors import Problem, json_response, shown, stopping
from core.web.model_choice import all_models, failed_models_of
from core.web.monitoring import Present, Telemetry
from core.web.openapi import ETAG, IF_NONE_MATCH, JSON, UNCHANGED, Answer, operation
from core.web.queries import OptionsQuery
from core.web.rendered import Rendered, RenderedAnswers, digest
from core.web.validation import read_query


def info_of(service: EngineService) -> EngineInfo:
    """What the model says of itself. Raises a 503 problem until it is loaded."""
    if service.info is not None:
        return service.info
    if service.state == "FAILED":
        raise Problem(503, service.failure, state=service.state)
    detail = "The model is still loading; try again in a moment."
    raise Problem(503, detail, {"Retry-After": "2"}, state=service.state)


def loading(service: EngineService) -> dict[str, str]:
    """The model that is being loaded after the first one, while that is so."""
    name = service.models.loading if service.info is not None else None
    return {} if name is None else {"loading": name}


def notice(service: EngineService) -> dict[str, str]:
    """What keeps jobs waiting though the server is ready, while that is so."""
    text = "" if service.workers is None else service.workers.notice
    return {"notice": text} if text else {}


def present(service: EngineService) -> Present:
    """What is so now, for the metrics."""
    jobs = service.queue.counts()
    states = ("running", "succeeded", "failed", "cancelled")
    return Present(
        jobs={"queued": jobs["waiting"], **{state: jobs[state] for state in states}},
        waiting=jobs["waiting"],
        running_images=service.batch.num_images if service.batch else 0,
        ready=service.state == "READY",
        workers=None if service.workers is None else service.workers.states,
    )


def add_state(
    app: Flask, service: EngineService, telemetry: Telemetry,
    options: Callable[[EngineInfo | None, Sequence[dict[str, Any]]], dict[str, Any]], answers: RenderedAnswers,
) -> None:
    """What may be asked, whether the server lives and is ready, and its numbers. `options` tells of one model among
    all."""

    @app.get("/options")
    @operation("Limits, defaults and choices", "server",
               {200: Answer("Everything that a form needs.", {JSON: responses.OptionsAnswer}, (ETAG,)), 304: UNCHANGED},
               query=OptionsQuery, headers=(IF_NONE_MATCH,), problems={404: "No model has this name."})
    def show_options() -> Response:
        """Answers while the model loads too: then without what only it knows. What a model lacks is not there."""
        name = read_query(OptionsQuery).model
        info = service.info_of(name)
        if info is None and name is not None and service.info is not None:
            raise Problem(404, f"no model is called {shown(name)}: there are {', '.join(service.models.names)}")
        models = all_models(service)
        now = {
            "state": service.state, "failure": service.failure or None, "watermark": service.watermark,
            "seconds_per_image_step": service.batch and service.batch.seconds_per_image_step,
            "failed_models": failed_models_of(service),
            **loading(service), **notice(service),
        }

        def render() -> Rendered:
            found = options(info, models)
            found["fields"] = both_names({name: both_names(field) for name, field in found["fields"].items()})
            found["limits"] = both_names(found["limits"])
            body = json.dumps({**found, **now}).encode()
            return Rendered(body, JSON, digest(body))

        return answers.get(("options", info and info.model_hash, repr(now), repr(models)), render).response()

    @app.get("/speed")
    @operation("What does a step cost here, and what is to be done first?", "server",
               {200: Answer("It was measured on this machine.", {JSON: responses.SpeedAnswer})})
    def speed() -> Response:
        """Steps of other jobs do not count as slow ones: their cost is told by the rows that they computed."""
        costs = service.batch and service.batch.costs
        return json_response(both_names({
            "step_costs": [{"rows": rows, "seconds": seconds} for rows, seconds in (costs.steps if costs else ())],
            "seconds_per_picture": costs.seconds_per_picture if costs else 0.0,
            "ahead": [{"rows": rows, "steps": steps} for rows, steps in service.ahead()],
        }), {"Cache-Control": "no-store"})

    @app.get("/health")
    @operation("Does the process answer?", "server", {200: Answer("It does.", {JSON: responses.Health})})
    def health() -> Response:
        """Says nothing about the model: see /ready. `notice` is there while jobs wait for workers or their broker."""
        return json_response({"status": "ok", **notice(service)})

    @app.get("/ready")
    @operation("Is the model loaded?", "server", {200: Answer("It is.", {JSON: responses.Ready})},
               problems={503: "It is loading or could not be loaded, or the server is stopping: see `state`."})
    def ready() -> Response:
        """`state` is STARTING, READY, FAILED or STOPPING. A server whose workers generate names them; it takes jobs
        without any, too, and then `notice` says what they wait for."""
        info = info_of(service)
        if service.state != "READY":
            raise stopping(state=service.state)
        counts = service.queue.counts()
        jobs = {name: counts[name] for name in ("waiting", "running", "finished")}
        model = {"model": info.name, "device": info.device, "engine": info.engine}
        workers = {} if service.workers is None else {"workers": list(service.workers.states)}
        return json_response({"state": service.state, **model, "jobs": jobs, **workers, **notice(service),
                              **loading(service)})

    @app.get("/metrics")
    @operation("Numbers for Prometheus", "server", {200: Answer("Metrics.", {"text/plain": {"type": "string"}})})
    def metrics() -> Response:
        """In the text format of Prometheus."""
        text, kind = telemetry.text()
        return Response(text, content_type=kind, headers={"Cache-Control": "no-store"})
