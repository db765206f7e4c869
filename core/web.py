"""What does every route owe its clients, whatever it does?

One shape for every error (RFC 9457 plus a plain `error` sentence), strict JSON bodies, validation whose messages say
what is accepted and what came, and the checks at the door: Host, Origin, key. Any web page in the user's browser can
reach localhost, so a server that listens only there still has to ask who is speaking.

It does not know which routes or fields exist: `api.py` brings the pydantic schemas and the application.

Errors: https://www.rfc-editor.org/rfc/rfc9457. Pointers: https://www.rfc-editor.org/rfc/rfc6901.
"""

from __future__ import annotations

import difflib
import hmac
import ipaddress
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flask import Flask, Response, request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from werkzeug.exceptions import HTTPException

LOOPBACK_HOSTS = frozenset(("localhost", "127.0.0.1", "::1"))
KEY_COOKIE = "faces_key"
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
JSON_TYPES = {str: "string", int: "integer", float: "number"}

log = logging.getLogger(__name__)
Schema = TypeVar("Schema", bound=BaseModel)


# ---- answers ---------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """An error on its way to the client. Extra members (`errors`, `state`) go into the document as they are."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.members = status, detail, dict(headers or {}), members


def problem_response(problem: Problem) -> Response:
    """The one producer of errors."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "error": problem.detail,
        **problem.members,
    }
    return Response(json.dumps(body), problem.status, problem.headers, mimetype="application/problem+json")


def json_response(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        json.dumps(body), 200, {"Cache-Control": "no-store", **(headers or {})}, mimetype="application/json"
    )


# ---- bodies ----------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as JSON, short enough for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json() -> Any:
    """The request's body, strictly parsed: the content type must say JSON; NaN and Infinity are not JSON."""
    if request.mimetype != "application/json":
        raise Problem(415, f"Send the header Content-Type: application/json; got {shown(request.mimetype or 'none')}")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(request.get_data(cache=False).decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"The body is not JSON: {str(error)[:200]}") from error


def bad_field(field: str | None, text: str) -> PydanticCustomError:
    """A validation error in our own words. They travel as context, because the template would interpret braces."""
    return PydanticCustomError("field", "{text}", {"text": text, "field": field or ""})


def bounds(schema: type[BaseModel], name: str) -> dict[str, Any]:
    """What a field accepts, read from its schema: type, and where they apply minimum, maximum, max_length."""
    field = schema.model_fields[name]
    found: dict[str, Any] = {
        "type": next(word for kind, word in JSON_TYPES.items() if kind.__name__ in str(field.annotation))
    }
    for limit in field.metadata:
        for ours, theirs in (("minimum", "ge"), ("maximum", "le"), ("max_length", "max_length")):
            if hasattr(limit, theirs):
                found[ours] = getattr(limit, theirs)
    return found


def expectation(schema: type[BaseModel], name: str) -> str:
    """For example `an integer from 1 to 8`."""
    limits = bounds(schema, name)
    words = ("an " if limits["type"] == "integer" else "a ") + limits["type"]
    if "max_length" in limits:
        return f"{words} of 0 to {limits['max_length']} characters"
    return f"{words} from {limits['minimum']} to {limits['maximum']}" if "maximum" in limits else words


def field_error(schema: type[BaseModel], aliases: Collection[str], error: ErrorDetails) -> tuple[str, str]:
    """One pydantic error -> (field, message): what is accepted, then what came."""
    context = error.get("ctx", {})
    name = str(error["loc"][0]) if error["loc"] else ""
    if "field" in context:
        return context["field"], context["text"]
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, [*schema.model_fields, *aliases], n=1)
        return name, "unknown field" + (f"; did you mean {close[0]}?" if close else "")
    if not name:
        return "", f"must be a JSON object; got {shown(error['input'])}"
    if error["type"] == "missing":
        return name, f"is required: {expectation(schema, name)}"
    return name, f"must be {expectation(schema, name)}; got {shown(error['input'])}"


def validate(
    schema: type[Schema],
    body: Any,
    *,
    context: Any = None,
    aliases: Mapping[str, str] | None = None,
    unavailable: Collection[str] = (),
) -> Schema:
    """Body -> request, or a 422 that lists every bad field under the name that the client used.

    `aliases` are other names of fields; `unavailable` fields are known but refused, unless they say null.
    """
    aliases = aliases or {}
    errors: dict[str, str] = {}
    sent_as: dict[str, str] = {}
    fields = body
    if isinstance(body, dict):
        fields = {}
        for name, value in body.items():
            target = aliases.get(name, name)
            if target in sent_as:
                errors[name] = f"is another name of {sent_as[target]}; send only one of them"
            elif target not in unavailable:
                fields[target] = value
            elif value is not None:
                errors[name] = "not available with this model"
            sent_as.setdefault(target, name)
    try:
        checked = schema.model_validate(fields, context=context)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name, message = field_error(schema, aliases, detail)
            errors.setdefault(sent_as.get(name, name), message)  # a union reports each of its members
    if errors:
        raise Problem(
            422,
            "; ".join(f"{name or 'body'}: {message}" for name, message in errors.items()),
            errors=[{"pointer": f"#/{name}" if name else "#", "message": text} for name, text in errors.items()],
        )
    return checked


# ---- the door --------------------------------------------------------------------------------------------------------


def host_allowed(host: str, hosts: Collection[str] | None) -> bool:
    """May a request name this Host? `hosts` None: loopback names only; else these too, and every numeric address.

    DNS rebinding works by pointing a name at us; a numeric address cannot be pointed anywhere else.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in LOOPBACK_HOSTS or hosts is None:
        return name in LOOPBACK_HOSTS
    try:
        return name in hosts or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def key_given(api_key: str) -> bool:
    """Did this request bring the key: as bearer token, as X-API-Key, or in the cookie that a browser got from us?"""
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
    given = (bearer, request.headers.get("X-API-Key", ""), request.cookies.get(KEY_COOKIE, ""))
    return any(hmac.compare_digest(one.encode(), api_key.encode()) for one in given)


def add_door(
    app: Flask, *, api_key: str | None, public: Collection[str], hosts: Collection[str] | None, origins: Sequence[str]
) -> None:
    """Check Host, Origin and key before every request; give answers their security headers and errors their one shape.

    `public` are the endpoints that need no key; `origins` are other web pages that may use this server.
    """

    @app.before_request
    def check() -> None:
        host = request.headers.get("Host", "")
        if not host_allowed(host, hosts):
            raise Problem(403, f"This server does not answer to the host {shown(host)}; see --allow-host.")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in origins and urlsplit(origin).netloc != host:
            raise Problem(403, f"Requests from the web page {shown(origin)} are not allowed; see --cors-origin.")
        needs_key = api_key is not None and request.endpoint not in public and request.method != "OPTIONS"
        if api_key is not None and needs_key and not key_given(api_key):
            detail = "This server needs its API key: send the header Authorization: Bearer <key>."
            raise Problem(401, detail, {"WWW-Authenticate": "Bearer"})

    @app.after_request
    def secure(response: Response) -> Response:
        for name, value in SECURITY_HEADERS.items():
            response.headers[name] = value
        if request.headers.get("Origin") in origins:
            response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        return response

    @app.errorhandler(Problem)
    def known(problem: Problem) -> Response:
        return problem_response(problem)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
        return problem_response(Problem(error.code or 500, error.description or "", headers))

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.path, exc_info=error)
        return problem_response(Problem(500, "A fault of the server: see its log."))
