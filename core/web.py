"""What does every route owe its clients, whatever it does?

One shape for every error (RFC 9457 plus a plain `error` sentence), strict JSON bodies and queries, validation whose
messages say what is accepted and what came, entity tags, and the checks at the door: Host, Origin, key. Any web page in
the user's browser can reach localhost, so a server that listens only there still has to ask who is speaking.

It does not know which routes or fields exist: `api.py` brings the pydantic schemas and the application.

Errors: https://www.rfc-editor.org/rfc/rfc9457. Pointers: https://www.rfc-editor.org/rfc/rfc6901.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, TypeVar, get_args
from urllib.parse import quote, urlsplit

from flask import Flask, Response, request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from werkzeug.exceptions import HTTPException

LOOPBACK_HOSTS = frozenset(("localhost", "127.0.0.1", "::1"))
KEY_COOKIE = "faces_key"
PROBLEM_TYPE = "application/problem+json"
MAX_ERRORS = 20  # named in one answer: a body can hold a hundred thousand wrong fields
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

log = logging.getLogger(__name__)
Schema = TypeVar("Schema", bound=BaseModel)
Path = tuple[str, ...]  # of a field: its name, or the name of a list and a position in it


# ---- answers ---------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """An error on its way to the client. Extra members (`errors`, `state`) go into the document as they are."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.members = status, detail, dict(headers or {}), members


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


def json_response(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        json.dumps(body), 200, {"Cache-Control": "no-store", **(headers or {})}, mimetype="application/json"
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


def read_body(kinds: Collection[str]) -> tuple[str, bytes]:
    """The body and which of the accepted media types it says to be. Raises a 415 problem for another one."""
    kind = request.mimetype
    if kind not in kinds:
        raise Problem(415, f"Send the header Content-Type: {' or '.join(kinds)}; got {shown(kind or 'none')}")
    coding = request.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise Problem(415, f"Send the body as it is, without Content-Encoding; got {shown(coding)}")
    return kind, request.get_data(cache=False)


def read_json() -> Any:
    """The request's body, strictly parsed: the content type must say JSON; NaN and Infinity are not JSON."""
    _, body = read_body(("application/json",))
    return parse_json(body)


def parse_json(body: bytes) -> Any:
    """JSON in UTF-8. Raises a 400 problem that says where it is none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def once(members: list[tuple[str, Any]]) -> dict[str, Any]:
        """Of a name that comes twice some readers take the first value, some the last; here it is an error."""
        found = dict(members)
        if len(found) < len(members):
            (repeated, _), *_ = Counter(name for name, _ in members).most_common(1)
            raise ValueError(f"the name {shown(repeated)} comes twice")
        return found

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        why = "; in JSON a line break inside a text is written \\n (of base64 it can be left out: tr -d '\\n')"
        broken = why if "Invalid control character" in str(error) else ""
        raise Problem(400, f"The body is not JSON: {str(error)[:200]}{broken}") from error


def read_query(schema: type[Schema]) -> Schema:
    """The query string as a request: unknown names are refused, whole numbers are numbers. Raises a 422 problem."""
    found: dict[str, Any] = {}
    for name, texts in request.args.lists():
        whole = name in schema.model_fields and bounds(schema, name)["type"] == "integer"
        values = [int(text) if whole and re.fullmatch(r"-?[0-9]{1,18}", text) else text for text in texts]
        found[name] = values[0] if len(values) == 1 else values
    return validate(schema, found, pointer="?")


def read_header(name: str, max_length: int) -> str | None:
    """A header of 1 to `max_length` visible ASCII characters, None without it. Raises a 400 problem for another."""
    value = request.headers.get(name)
    if value is not None and not (len(value) <= max_length and re.fullmatch(r"[\x21-\x7e]+", value)):
        raise Problem(400, f"{name} must be 1 to {max_length} visible ASCII characters; got {shown(value)}")
    return value


def bad_field(field: str | None, text: str) -> PydanticCustomError:
    """A validation error in our own words. They travel as context, because the template would interpret braces."""
    return PydanticCustomError("field", "{text}", {"text": text, "field": field or ""})


@cache
def bounds(schema: type[BaseModel], name: str) -> dict[str, Any]:
    """What a field accepts, read from its JSON Schema: type, and where they apply choices, minimum, maximum, length."""
    field = schema.model_json_schema()["properties"][name]
    first = next(one for one in field.get("anyOf", [field]) if one.get("type") != "null")
    first = {"type": "object"} if "$ref" in first else first
    names = {"minimum": "minimum", "maximum": "maximum", "min_length": "minLength", "max_length": "maxLength"}
    found = {"type": first["type"], **{ours: first[theirs] for ours, theirs in names.items() if theirs in first}}
    return found | ({"choices": first["enum"]} if "enum" in first else {})


def expectation(schema: type[BaseModel], name: str) -> str:
    """For example `an integer from 1 to 8`."""
    limits = bounds(schema, name)
    if "choices" in limits:
        return f"one of {', '.join(limits['choices'])}"
    words = ("an " if limits["type"][0] in "aeiou" else "a ") + limits["type"]
    if "max_length" in limits:
        return f"{words} of {limits.get('min_length', 0)} to {limits['max_length']} characters"
    return f"{words} from {limits['minimum']} to {limits['maximum']}" if "maximum" in limits else words


def nested(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The schema of the object that a field holds, if it holds one."""
    field = schema.model_fields.get(name)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def field_error(schema: type[BaseModel], aliases: Collection[str], error: ErrorDetails) -> tuple[Path, str]:
    """One pydantic error -> (path to the field, message): what is accepted, then what came."""
    inner = nested(schema, str(error["loc"][0])) if error["loc"] else None
    if inner is not None:
        path, message = field_error(inner, (), {**error, "loc": error["loc"][1:]})
        return (str(error["loc"][0]), *path), message
    context = error.get("ctx", {})
    if "field" in context:
        return tuple(context["field"].split("/")) if context["field"] else (), context["text"]
    if not error["loc"]:
        return (), f"must be a JSON object; got {shown(error['input'])}"
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name[:60], [*schema.model_fields, *aliases], n=1)
        return (name,), "unknown field" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] == "missing":
        return (name,), f"is required: {expectation(schema, name)}"
    return (name,), f"must be {expectation(schema, name)}; got {shown(error['input'])}"


def validate(
    schema: type[Schema],
    body: Any,
    *,
    context: Any = None,
    aliases: Mapping[str, str] | None = None,
    pointer: str = "#/",
) -> Schema:
    """Body -> request, or a 422 that lists every bad field under the name that the client used.

    `aliases` are other names of fields. `pointer` stands before the names: `#/` for members of a body, `?` for
    parameters of a query.
    """
    aliases = aliases or {}
    errors: dict[Path, str] = {}
    sent_as: dict[str, str] = {}
    fields = body
    if isinstance(body, dict):
        fields = {}
        for name, value in body.items():
            target = aliases.get(name, name)
            if not is_text(name):  # pydantic would call the whole body wrong
                errors[ascii(name)[1:-1],] = "unknown field"
            elif target in sent_as:
                errors[name,] = f"is another name of {sent_as[target]}; send only one of them"
            else:
                fields[target] = whole(schema, target, value)
            sent_as.setdefault(target, name)
    try:
        checked = schema.model_validate(fields, context=context)
    except ValidationError as error:
        for detail in error.errors(include_url=False)[:MAX_ERRORS]:
            path, message = field_error(schema, aliases, detail)
            errors.setdefault((sent_as.get(path[0], path[0]), *path[1:]) if path else (), message)  # a union: once
    if errors:
        raise invalid(errors.items(), pointer)
    return checked


def is_text(value: str) -> bool:
    """JSON can escape half a surrogate pair, which no encoding has."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def whole(schema: type[BaseModel], name: str, value: Any) -> Any:
    """2.0 is a whole number: JSON knows one kind of number, and some languages write all of theirs with a point."""
    if isinstance(value, float) and value.is_integer() and name in schema.model_fields:
        return int(value) if bounds(schema, name)["type"] == "integer" else value
    if isinstance(value, dict) and (inner := nested(schema, name)) is not None:
        return {key: whole(inner, key, part) for key, part in value.items()}
    return value


def invalid(errors: Iterable[tuple[Path, str]], pointer: str = "#/") -> Problem:
    """The 422 problem that names fields by their paths, () being the whole body, and says what is wrong with each."""

    def pointed(path: Path) -> str:
        return pointer + "/".join(quote(name.replace("~", "~0").replace("/", "~1"), safe="~") for name in path)

    cut = [(tuple(name if len(name) <= 60 else name[:57] + "..." for name in path), text) for path, text in errors]
    return Problem(
        422,
        "; ".join(f"{'/'.join(path) if path else 'body'}: {text}" for path, text in cut),
        errors=[{"pointer": pointed(path) if path else "#", "message": text} for path, text in cut],
    )


# ---- the door --------------------------------------------------------------------------------------------------------


def host_name(host: str) -> str:
    """The name in a Host header, in small letters and without its port; "" where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def host_allowed(host: str, hosts: Collection[str] | None) -> bool:
    """May a request name this Host? `hosts` None: loopback names only; else these too, and every numeric address.

    DNS rebinding works by pointing a name at us; a numeric address cannot be pointed anywhere else.
    """
    name = host_name(host)
    if name in LOOPBACK_HOSTS or hosts is None:
        return name in LOOPBACK_HOSTS
    try:
        return name in hosts or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def origin_allowed(origin: str | None, host: str, origins: Collection[str]) -> bool:
    """May this web page use the server? Those of the server itself may, and those that are listed."""
    try:
        return origin is None or origin in origins or urlsplit(origin).netloc == host
    except ValueError:
        return False


class Refusals:
    """Tells the log who was refused: each kind at most once in `every_s` seconds, or a stranger could fill the disk."""

    def __init__(self, every_s: float = 60.0) -> None:
        self._every_s = every_s
        self._told: dict[str, tuple[float, int]] = {}  # kind: when it was told, and how many came since

    def tell(self, kind: str, detail: str) -> None:
        now = time.monotonic()
        last, silent = self._told.get(kind, (now - self._every_s, 0))
        if now - last < self._every_s:
            self._told[kind] = last, silent + 1
            return
        self._told[kind] = now, 0
        log.warning("refused (and %d like it since the last line): %s", silent, detail)


def key_given(api_key: str) -> bool:
    """Did this request bring the key: as bearer token, as X-API-Key, or in the cookie that a browser got from us?"""
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
    given = (bearer, request.headers.get("X-API-Key", ""), request.cookies.get(KEY_COOKIE, ""))
    return any(hmac.compare_digest(one.encode(), api_key.encode()) for one in given)


def add_door(
    app: Flask, *, api_key: str | None, public: Collection[str], hosts: Collection[str] | None, origins: Sequence[str],
    files: Collection[str] = (),
) -> None:
    """Check Host, Origin and key before every request; give answers their security headers and errors their one shape.

    `public` are the endpoints that need no key; `origins` are other web pages that may use this server. The endpoints
    of `files` hold nothing that is anybody's: they are served whatever Host and Origin say, so that a page behind a
    proxy that rewrites them can tell what is wrong.
    """
    refusals = Refusals()

    def refuse(kind: str, detail: str) -> Problem:
        refusals.tell(kind, detail)
        return Problem(403, detail)

    @app.before_request
    def check() -> None:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if request.endpoint not in files and not host_allowed(host, hosts):
            name = host_name(host) or "NAME"
            raise refuse("host", f"This server does not answer to the host {shown(host)}: behind a proxy, start it "
                                 f"with --allow-host {shown(name)[1:-1]}.")
        if request.endpoint not in files and not origin_allowed(origin, host, origins):
            raise refuse("origin", f"Requests from the web page {shown(origin)} are not allowed: if it is yours, or "
                                   "this server's own behind a proxy, start the server with --cors-origin and its "
                                   "address.")
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
        if response.status_code in (204, 303, 304) or request.method == "OPTIONS" and response.status_code == 200:
            response.headers.pop("Content-Type", None)  # an empty answer is no HTML page
        return response

    @app.errorhandler(Problem)
    def known(problem: Problem) -> Response:
        return problem_response(problem)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
        detail = error.description or ""
        if error.code == 404:
            detail = f"There is nothing at {shown(request.path)}; see /docs."
        elif error.code == 413:
            detail = f"The body is too large: this route accepts at most {request.max_content_length} bytes."
        return problem_response(Problem(error.code or 500, detail, headers))

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.path, exc_info=error)
        return problem_response(Problem(500, "A fault of the server: see its log."))
