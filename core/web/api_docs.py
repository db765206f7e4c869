"""How does a client read the OpenAPI document? A program as JSON, a person as one HTML page made here.

The page has no script and no style of its own, so it needs no internet and passes the strictest
Content-Security-Policy. This file knows OpenAPI 3.1 as `core/web/openapi.py` writes it, and nothing about the routes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from flask import Flask, Response

from core.web.errors import json_response, tagged
from core.web.openapi import ETAG, IF_NONE_MATCH, JSON, UNCHANGED, Answer, operation

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="static/icon.svg">
<link rel="stylesheet" href="static/docs.css">
</head>
<body>
<header><h1>{title} <small>{version}</small></h1><p>{description}</p>
<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p></header>
<nav aria-label="Routes">{contents}</nav>
<main>{routes}<section id="schemas"><h2>Schemas</h2>{schemas}</section></main>
</body>
</html>
"""


def add_reference(app: Flask, describe: Callable[[], Mapping[str, Any]]) -> None:
    """Add the routes of the document that `describe` writes."""

    @app.get("/openapi.json")
    @operation("This document", "server",
               {200: Answer("OpenAPI 3.1.", {JSON: {"type": "object"}}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,))
    def openapi_json() -> Response:
        """Once the model is loaded it also names the samplers and the size of a latent."""
        return tagged(json_response(describe()))

    @app.get("/docs")
    @operation("This document, to read", "server", {200: Answer("A page.", {"text/html": {"type": "string"}})})
    def docs() -> Response:
        """Works without internet and without scripts."""
        return Response(reference_page(describe()), mimetype="text/html", headers={"Cache-Control": "no-cache"})


def reference_page(document: Mapping[str, Any]) -> str:
    """The document as a page. Everything that comes from it is escaped."""
    by_tag: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, entry in methods.items():
            by_tag[entry["tags"][0]].append((method, path, entry))
    contents = "".join(
        f"<h2>{escape(tag)}</h2><ul>"
        + "".join(f'<li><a href="#{entry["operationId"]}"><b>{method.upper()}</b> {escape(path)}</a></li>'
                  for method, path, entry in entries)
        + "</ul>"
        for tag, entries in by_tag.items()
    )
    routes = "".join(route(*one) for entries in by_tag.values() for one in entries)
    schemas = "".join(
        f'<h3 id="schema-{escape(name)}">{escape(name)}</h3>{"".join(schema_table(schema))}'
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    info = {name: escape(text) for name, text in document["info"].items() if isinstance(text, str)}
    return PAGE.format(**info, contents=contents, routes=routes, schemas=schemas)


def route(method: str, path: str, entry: Mapping[str, Any]) -> str:
    """One operation: what it is for, what it takes, what it answers."""
    parts = [
        f'<section id="{entry["operationId"]}"><h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2>',
        f"<p><strong>{escape(entry['summary'])}</strong> {escape(entry.get('description', ''))}</p>",
    ]
    if "parameters" in entry:
        rows = [
            (one["name"], one["in"], in_words(one["schema"]), one.get("description", "")) for one in entry["parameters"]
        ]
        parts.append(table(("parameter", "in", "value", ""), rows))
    for media, content in entry.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body <code>{escape(media)}</code>: {in_words(content['schema'])}</p>")
    rows = []
    for status, answer in entry["responses"].items():
        content = "<br>".join(
            f"<code>{escape(media)}</code> {in_words(one['schema'])}"
            for media, one in answer.get("content", {}).items()
        )
        rows.append((status, answer["description"], content, ", ".join(answer.get("headers", ()))))
    parts.append(table(("status", "", "content", "headers"), rows, raw=2))
    return "".join(parts) + "</section>"


def schema_table(schema: Mapping[str, Any]) -> Iterator[str]:
    """A schema's description, members and examples."""
    if "description" in schema:
        yield f"<p>{escape(schema['description'])}</p>"
    required = schema.get("required", ())
    rows = [
        (name, in_words(one), "required" if name in required else f"default {json.dumps(one.get('default'))}",
         "deprecated, " * one.get("deprecated", False) + one.get("description", ""))
        for name, one in schema.get("properties", {}).items()
    ]
    if rows:
        yield table(("member", "value", "", ""), rows, raw=1)
    for example in schema.get("examples", ()):
        yield f"<pre>{escape(json.dumps(example, indent=2))}</pre>"


def in_words(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[1])
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(in_words(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(escape(json.dumps(one)) for one in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "anything")
    words = escape(kind if isinstance(kind, str) else " or ".join(kind))
    if kind == "array":
        words += f" of {in_words(schema.get('items', {}))}"
    if "format" in schema or "contentEncoding" in schema:
        words += f" ({escape(', '.join(filter(None, (schema.get('format'), schema.get('contentEncoding')))))})"
    limits = [
        f"{word} {schema[name]}"
        for name, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"),
                           ("exclusiveMaximum", "below"), ("minLength", "at least"), ("maxLength", "at most"),
                           ("minItems", "at least"), ("maxItems", "at most"))
        if name in schema
    ]
    unit = " characters" if kind == "string" and limits else ""
    return f"{words} {escape(' '.join(limits))}{unit}".strip()


def table(head: tuple[str, ...], rows: Sequence[Sequence[str]], raw: int | None = None) -> str:
    """Rows of cells; the column `raw`, and any named `value`, hold HTML already."""
    made = {index for index, name in enumerate(head) if name == "value" or index == raw}
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = (
        "".join(f"<td>{cell if index in made else escape(cell)}</td>" for index, cell in enumerate(row)) for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
