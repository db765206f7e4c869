"""How do the HTTP tests ask? An application around the drawing stand-in, and a client that holds every answer against
the OpenAPI document: its status, headers, content type and schema must be among those declared for the route.

Jobs run in the test's own thread (`work`), so nothing sleeps.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from typing import Any

import numpy as np
from flask import Flask
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator
from werkzeug.exceptions import HTTPException
from werkzeug.test import TestResponse

from api import create_app, describe
from core.jobs.service import EngineService
from tests.support.drawing import LATENT_SHAPE, DrawingEngine

LATENT = base64.b64encode(np.linspace(-1, 1, 16, dtype="<f4").tobytes()).decode()
# where errors have another shape, and an operation that has it
FOREIGN = {"/sdapi/": "sd_memory", "/v1/": "openai_models"}
NO_JOB = "never-existed-" + 32 * "0"


class CheckedClient(FlaskClient):
    """A client that fails when an answer is not in the document."""

    def open(self, *args: Any, **options: Any) -> TestResponse:
        answer = super().open(*args, **options)
        complaint = undocumented(self.application, answer)
        assert complaint is None, f"{answer.request.method} {answer.request.path}: {complaint}"
        return answer


def make_app(engine: DrawingEngine, **options: Any) -> Flask:
    """An application whose engine is loaded here and whose jobs wait for `work`."""
    app = create_app(lambda: engine, start=False, **options)
    app.test_client_class = CheckedClient
    assert service_of(app).load()
    return app


def service_of(app: Flask) -> EngineService:
    return app.extensions["service"]


def tick(app: Flask) -> bool:
    """One step of all jobs; False when there is nothing to do."""
    service = service_of(app)
    assert service.batch is not None
    return service.queue.run_next(service.batch)


def work(app: Flask) -> None:
    """Do everything that waits."""
    while tick(app):
        pass


def post(client: FlaskClient, **body: Any) -> dict[str, Any]:
    asked = {"prompt": "a smiling woman", "n_inf_steps": 4, "stream_freq": 2, **body}
    answer = client.post("/text_to_image", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.get_json()


def run(app: Flask, **body: Any) -> str:
    """Post a job, do it, return its id."""
    job_id: str = post(app.test_client(), **body)["job_id"]
    work(app)
    return job_id


def problem(answer: TestResponse, status: int) -> dict[str, Any]:
    """The answer is this problem, in the one shape that all problems have."""
    assert answer.status_code == status, answer.text
    assert answer.content_type == "application/problem+json"
    body = answer.get_json()
    assert body["type"] == "about:blank" and body["status"] == status and body["title"]
    assert isinstance(body["error"], str) and body["error"] == body["detail"] != ""
    assert "Traceback" not in answer.text and "<html" not in answer.text.lower()
    return body


def stream_of(answer: TestResponse) -> list[tuple[int, str, dict[str, Any]]]:
    """Server-Sent Events -> (id, event, data)."""
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith((":", "retry")))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def latent_of(value: float) -> str:
    return base64.b64encode(np.full(LATENT_SHAPE, value, "<f4").tobytes()).decode()


# ---- the document as a judge -----------------------------------------------------------------------------------------


@cache
def document(loaded: bool) -> dict[str, Any]:
    """What the application promises, before and after its engine is loaded."""
    app = create_app(DrawingEngine, start=False)
    if loaded:
        assert service_of(app).load()
    return describe(app, service_of(app).info, locked=False)


@cache
def operations(loaded: bool) -> dict[str, dict[str, Any]]:
    """The operations of the document by their ids."""
    found = document(loaded)["paths"].values()
    return {entry["operationId"]: entry for methods in found for entry in methods.values()}


@cache
def validator(loaded: bool, schema: str) -> Draft202012Validator:
    """A judge of one schema of the document, written as JSON."""
    return Draft202012Validator({**json.loads(schema), "components": document(loaded)["components"]})


def undocumented(app: Flask, answer: TestResponse) -> str | None:
    """What about this answer is not in the document; None when all is."""
    loaded = service_of(app).info is not None
    try:
        endpoint, _ = app.url_map.bind("localhost").match(answer.request.path, answer.request.method)
    except HTTPException as error:
        known = {error.code, 400, 401, 403, 413}  # the door comes first
        known_by = next((name for prefix, name in FOREIGN.items() if answer.request.path.startswith(prefix)), "health")
        responses = {str(status): operations(loaded)[known_by]["responses"]["500"] for status in known}
    else:
        if answer.request.method == "OPTIONS":
            return None
        responses = operations(loaded)[endpoint]["responses"]
    declared = responses.get(str(answer.status_code))
    if declared is None:
        return f"status {answer.status_code} is not declared"
    missing = [name for name, header in declared.get("headers", {}).items()
               if header["required"] and name not in answer.headers]
    if missing:
        return f"{answer.status_code} lacks {missing}"
    content = declared.get("content", {})
    if not content:
        return None if "Content-Type" not in answer.headers else f"{answer.status_code} should have no content"
    if answer.mimetype not in content:
        return f"{answer.content_type} is not declared"
    if answer.is_json:
        judge = validator(loaded, json.dumps(content[answer.mimetype]["schema"]))
        worst = next(iter(judge.iter_errors(answer.get_json())), None)
        return worst and f"{worst.json_path}: {worst.message}"
    return None
