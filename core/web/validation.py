"""How are untrusted bodies, queries and headers read, and how is every fault of them told at once?

Sizes are checked before reading, JSON before its schema; pydantic's errors become sentences that name the field, the
value given and the range. It does not know which fields there are (`core/web/requests.py`).
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, get_args
from urllib.parse import quote

from flask import request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from core.web.aliases import BETTER_NAMES, assert_same
from core.web.errors import Problem, shown

MAX_ERRORS = 20  # named in one answer: a body can hold a hundred thousand wrong fields
Schema = TypeVar("Schema", bound=BaseModel)
Path = tuple[str, ...]  # of a field: its name, or the name of a list and a position in it


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

    `aliases` are other names of fields; of these the better names of `core.web.aliases` may come beside the field that
    they name, when both say the same: else a 400. `pointer` stands before the names: `#/` for members of a body, `?`
    for parameters of a query.
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
            elif target in sent_as and target in BETTER_NAMES:
                assert_same(name, value, sent_as[target], body[sent_as[target]])
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
