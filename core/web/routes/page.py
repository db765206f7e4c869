"""Which files make the page, and how does its address hand over a key?"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from flask import Flask, Response, request
from werkzeug.http import http_date
from werkzeug.security import safe_join

from core.web import queries
from core.web.errors import Problem, shown
from core.web.openapi import BINARY, ETAG, IF_NONE_MATCH, UNCHANGED, Answer, Header, operation
from core.web.proxies import outside, prefix
from core.web.rendered import Rendered, RenderedAnswers, digest
from core.web.security import KEY_COOKIE
from core.web.validation import read_query

MEDIA_TYPES = {  # static/ serves nothing else
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}
FILE_TYPES = {kind: {"type": "object"} if kind.endswith("json") else BINARY for kind in MEDIA_TYPES.values()}


def add_page(app: Flask, root: Path, api_key: str | None, answers: RenderedAnswers) -> None:
    """The page, its static files, and the address that turns an API key into a cookie."""

    def file(path: Path, kind: str, headers: Mapping[str, str] | None = None) -> Response:
        """A file as it is now; it is read again when it has changed. Raises FileNotFoundError."""
        about = path.stat()

        def render() -> Rendered:
            body = path.read_bytes()
            caching = {"Cache-Control": "no-cache", "Last-Modified": http_date(about.st_mtime)}
            return Rendered(body, kind, digest(body), {**caching, **(headers or {})})

        return answers.get((str(path), about.st_mtime_ns, about.st_size, prefix()), render).response()

    @app.get("/")
    @operation("The page", "page", {200: Answer("HTML.", {"text/html": {"type": "string"}}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,))
    def page() -> Response:
        """For people."""
        return file(root / "frontend.html", "text/html; charset=utf-8")

    @app.get("/static/<name>")
    @operation("A file of the page", "page",
               {200: Answer("The file.", FILE_TYPES, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems={404: "There is no such file."})
    def static_file(name: str) -> Response:
        """Modules, styles, icons, the manifest."""
        kind = MEDIA_TYPES.get(Path(name).suffix)  # not guessed: some systems call a module text/plain
        path = safe_join(str(root / "static"), name)
        if kind is None or path is None or not Path(path).is_file():
            raise Problem(404, f"There is no file {shown(name)}.")
        text = "; charset=utf-8" * kind.startswith("text/")
        headers = {"Service-Worker-Allowed": outside("/")} if name == "sw.js" else {}
        return file(Path(path), f"{kind}{text}", headers)

    @app.get("/session")
    @operation("Turn the key into a cookie", "page",
               {303: Answer("To the page.", headers=(Header("Location", "the page"),))}, query=queries.SessionQuery)
    def session() -> Response:
        """The address printed at the start carries the key: EventSource can send no header, so it becomes a cookie."""
        key = read_query(queries.SessionQuery).key
        response = Response(status=303, headers={"Location": "./", "Cache-Control": "no-store"})
        if api_key is not None:
            if not hmac.compare_digest(key.encode(), api_key.encode()):
                raise Problem(401, "This is not the key of this server.")
            response.set_cookie(KEY_COOKIE, api_key, httponly=True, samesite="Strict", max_age=30 * 86400,
                                path=outside("/"), secure=request.is_secure)
        return response
