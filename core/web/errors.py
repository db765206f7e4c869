"""How does an answer look when something was wrong, and when it was right?

Errors are problem details (RFC 9457, https://www.rfc-editor.org/rfc/rfc9457) with the value given and the remedy;
other answers are JSON with an ETag where they may be cached. Routes that clients of another server use answer with that
server's errors (`ErrorShape`). It does not know routes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, request

PROBLEM_TYPE = "application/problem+json"


# ---- answers ---------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """An error on its way to the client. Extra members (`errors`, `state`) go into the document as they are."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.members = status, detail, dict(headers or {}), members


def stopping(**members: Any) -> Problem:
    """What is told when the server takes no more work: somebody may start it again in a moment."""
    return Problem(503, "The server is stopping.", {"Retry-After": "10"}, **members)


def problem_text(problem: Problem) -> str:
    """The one producer of errors: the document that a client reads."""
    return json.dumps({
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "error": problem.detail,
        **problem.members,
    })


def problem_response(problem: Problem) -> Response:
    headers = {"Cache-Control": "no-store", **problem.headers}
    return Response(problem_text(problem), problem.status, headers, mimetype=PROBLEM_TYPE)


@dataclass(frozen=True)
class ErrorShape:
    """How the errors of another server look, for the clients of that server.

    `answer` is the type that pydantic describes; `render` makes it from a problem document; `invalid` is the status of
    a request with wrong fields, which is 422 here.
    """

    answer: Any
    render: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    invalid: int = 422


def translate_errors(app: Flask, prefix: str, shape: ErrorShape) -> None:
    """Give every error under this path, whoever raised it, the shape that the clients there can read."""

    @app.after_request
    def translate(response: Response) -> Response:
        if request.path.startswith(prefix) and response.mimetype == PROBLEM_TYPE:
            problem = json.loads(response.get_data())
            if problem["status"] == 422:
                response.status_code = problem["status"] = shape.invalid
            response.set_data(json.dumps(shape.render(problem)))
            response.mimetype = "application/json"
        return response


def json_response(
    body: Mapping[str, Any] | Sequence[Any] | None, headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    return Response(
        json.dumps(body), status, {"Cache-Control": "no-store", **(headers or {})}, mimetype="application/json"
    )


def tagged(response: Response, tag: str | None = None) -> Response:
    """The response with an ETag (of its content, unless `tag` says what it depends on), or 304 for who has it."""
    response.set_etag(hashlib.sha256(response.get_data()).hexdigest()[:32] if tag is None else tag)
    if response.headers.get("Cache-Control") == "no-store":
        response.headers["Cache-Control"] = "no-cache"  # keep it, but ask every time
    response.make_conditional(request)
    return response


# ---- bodies, queries, headers ----------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as JSON, short enough for a message."""
    text = json.dumps(value[:60] if isinstance(value, str) else value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
