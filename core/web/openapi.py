"""What does the server promise, in a form that programs can read?

A decorator, `operation`, says beside each route what it takes and what it answers; `document` walks the application's
own routes and writes OpenAPI 3.1 from that and from the pydantic types that validate the requests and describe the
answers. A route without a declaration is an error, so nothing can be served that is not in the document.

Not a library: flask-openapi3 and spectree read bodies themselves, leniently (a wrong content type, NaN and broken JSON
all become "null"), know no validation context, and bring their own error shape; apispec would leave all of this to us.
It does not know any route or schema. https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, TypeVar

from flask import Flask
from pydantic import BaseModel, TypeAdapter
from werkzeug.routing import Rule

from core.web.errors import PROBLEM_TYPE, ErrorShape

JSON = "application/json"
BINARY = {"type": "string", "format": "binary"}
REFERENCE = "#/components/schemas/{model}"
View = TypeVar("View", bound=Callable[..., Any])


@dataclass(frozen=True)
class Header:
    """A header, of a request or of an answer. `always`: an answer never lacks it."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    always: bool = True


@dataclass(frozen=True)
class Answer:
    """One way in which a route answers. `content`: media type -> a type that pydantic describes, or a JSON Schema."""

    description: str
    content: Mapping[str, Any] = field(default_factory=dict)
    headers: tuple[Header, ...] = ()


@dataclass(frozen=True)
class Operation:
    """What a route takes and answers; `problems` are statuses and when they come. Common ones need not be said."""

    summary: str
    tag: str
    answers: Mapping[int, Answer]
    problems: Mapping[int, str]
    bodies: Mapping[str, Any]
    query: type[BaseModel] | None
    headers: tuple[Header, ...]
    errors: ErrorShape | None


ETAG = Header("ETag", "for If-None-Match")
IF_NONE_MATCH = Header("If-None-Match", "the ETag of an earlier answer")
UNCHANGED = Answer("It is what If-None-Match names.", headers=(ETAG,))


def operation(
    summary: str,
    tag: str,
    answers: Mapping[int, Answer],
    *,
    problems: Mapping[int, str] | None = None,
    bodies: Mapping[str, Any] | None = None,
    query: type[BaseModel] | None = None,
    headers: tuple[Header, ...] = (),
    errors: ErrorShape | None = None,
) -> Callable[[View], View]:
    """Declare the view below it; its docstring becomes the description. `errors`: of another server's shape."""
    declared = Operation(summary, tag, answers, problems or {}, bodies or {}, query, headers, errors)

    def declare(view: View) -> View:
        view.operation = declared  # type: ignore[attr-defined]
        return view

    return declare


# ---- schemas ---------------------------------------------------------------------------------------------------------


def types_in(operations: Iterable[Operation]) -> list[Any]:
    """Every type that the operations speak of, each once."""
    contents = [content for one in operations for content in (one.bodies, *(a.content for a in one.answers.values()))]
    errors = [one.errors.answer for one in operations if one.errors is not None]
    kinds = [kind for content in contents for kind in content.values() if not isinstance(kind, dict)]
    return list(dict.fromkeys((*kinds, *errors)))


def schemas_of(types: Iterable[Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """How to refer to each of these types, and the JSON Schemas of them and all that they refer to, by name.

    No object admits members that it does not name.
    """
    inputs: list[tuple[Any, Literal["validation"], TypeAdapter[Any]]]
    inputs = [(kind, "validation", TypeAdapter(kind)) for kind in types]
    references, found = TypeAdapter.json_schemas(inputs, ref_template=REFERENCE)
    schemas: dict[str, Any] = found["$defs"]
    for schema in schemas.values():
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return {kind: schema for (kind, _), schema in references.items()}, schemas


# ---- the document ----------------------------------------------------------------------------------------------------


def document(
    app: Flask,
    *,
    info: Mapping[str, Any],
    tags: Mapping[str, str],
    problem: Any,
    common: Mapping[int, str],
    path_parameters: Mapping[str, Mapping[str, Any]],
    public: Iterable[str],
    security: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The OpenAPI document of everything that `app` serves.

    `tags` says what each group of routes is about, `problem` is the type of every error, `common` are the statuses of
    errors that every route can answer with; `path_parameters` says what the variable parts of paths accept. `security`
    are the ways to show the key (none: no key is needed), `public` the endpoints that need none.

    Raises LookupError for a route without `operation`.
    """
    rules = sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule)
    operations = [operation_of(app, rule) for rule in rules]
    references, schemas = schemas_of([problem, *types_in(operations)])
    paths: dict[str, dict[str, Any]] = {}
    for rule, declared in zip(rules, operations, strict=True):
        entry = describe(rule, declared, common, path_parameters, references)
        description = app.view_functions[rule.endpoint].__doc__
        if description:
            entry["description"] = " ".join(description.split())
        if security and rule.endpoint in public:
            entry["security"] = []
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            paths.setdefault(template(rule), {})[method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": dict(info),
        "tags": [{"name": name, "description": text} for name, text in tags.items()],
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": dict(security)},
        "security": [{name: []} for name in security],
    }


def operation_of(app: Flask, rule: Rule) -> Operation:
    """What was declared beside the route. Raises LookupError when nothing was."""
    declared: Operation | None = getattr(app.view_functions[rule.endpoint], "operation", None)
    if declared is None:
        raise LookupError(f"{rule.rule} has no @operation, so it cannot be in the document")
    return declared


def template(rule: Rule) -> str:
    """Flask's `/jobs/<job_id>/images/<int:index>.png` -> `/jobs/{job_id}/images/{index}.png`."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)


def describe(
    rule: Rule,
    declared: Operation,
    common: Mapping[int, str],
    path_parameters: Mapping[str, Mapping[str, Any]],
    references: Mapping[Any, Any],
) -> dict[str, Any]:
    """One operation object."""
    parameters = [
        {"name": name, "in": "path", "required": True, **path_parameters[name]} for name in sorted(rule.arguments)
    ]
    if declared.query is not None:
        parameters += query_parameters(declared.query)
    parameters += [
        {"name": header.name, "in": "header", "required": False, "description": header.description,
         "schema": dict(header.schema)}
        for header in declared.headers
    ]
    problems = dict(common)
    if declared.query is not None or declared.bodies:
        invalid = 422 if declared.errors is None else declared.errors.invalid
        problems[invalid] = "A value is out of range, of the wrong type or unknown; every bad field is named."
    if declared.bodies:
        if 400 not in problems:
            problems[400] = "The body cannot be read, or says two things under two names of one field."
        problems |= {413: "The body is too large.", 415: "The content type is none of those accepted."}
    problems |= declared.problems
    answers = {str(status): describe_answer(answer, references) for status, answer in declared.answers.items()}
    content = {PROBLEM_TYPE: {"schema": {"$ref": REFERENCE.format(model="ProblemAnswer")}}}
    if declared.errors is not None:
        content = {JSON: {"schema": references[declared.errors.answer]}}
    answers |= {str(status): describe_problem(status, text, content) for status, text in problems.items()}
    entry: dict[str, Any] = {
        "operationId": rule.endpoint,
        "summary": declared.summary,
        "tags": [declared.tag],
        "responses": dict(sorted(answers.items())),
    }
    if parameters:
        entry["parameters"] = parameters
    if declared.bodies:
        entry["requestBody"] = {"required": True, "content": describe_content(declared.bodies, references)}
    return entry


def query_parameters(query: type[BaseModel]) -> list[dict[str, Any]]:
    """A parameter for each field; what may be null in the schema is left out of a query."""
    found = []
    for name, schema in query.model_json_schema()["properties"].items():
        kept = {key: value for key, value in schema.items() if key not in ("title", "description", "anyOf", "default")}
        if schema.get("default") is not None:
            kept["default"] = schema["default"]
        for one in schema.get("anyOf", ()):
            kept |= one if one["type"] != "null" else {}
        found.append({"name": name, "in": "query", "required": False, "description": schema["description"],
                      "schema": kept})
    return found


def describe_content(content: Mapping[str, Any], references: Mapping[Any, Any]) -> dict[str, Any]:
    """Media type -> the schema of what travels in it."""
    return {
        media: {"schema": kind if isinstance(kind, dict) else references[kind]} for media, kind in content.items()
    }


def describe_answer(answer: Answer, references: Mapping[Any, Any]) -> dict[str, Any]:
    """One response object."""
    entry: dict[str, Any] = {"description": answer.description}
    if answer.content:
        entry["content"] = describe_content(answer.content, references)
    if answer.headers:
        entry["headers"] = describe_headers(answer.headers)
    return entry


def describe_problem(status: int, text: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The response object of an error; where waiting helps, it may say how long."""
    headers = (Header("Retry-After", "seconds to wait", {"type": "string", "pattern": "^[0-9]+$"}, always=False),)
    return {
        "description": f"{HTTPStatus(status).phrase}: {text}",
        "content": dict(content),
        **({"headers": describe_headers(headers)} if status in (429, 503) else {}),
    }


def describe_headers(headers: Iterable[Header]) -> dict[str, Any]:
    return {
        header.name: {"description": header.description, "required": header.always, "schema": dict(header.schema)}
        for header in headers
    }
