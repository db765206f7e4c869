"""Who may ask at all?

The checks before every route: the Host header (DNS rebinding), the Origin of what changes anything (cross-site
requests), the key where one is set, and the security headers of every answer. It does not know what the routes do.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from core.web.errors import Problem, problem_response, shown

log = logging.getLogger(__name__)
LOOPBACK_HOSTS = frozenset(("localhost", "127.0.0.1", "::1"))
KEY_COOKIE = "faces_key"
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


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
    """Did this request bring the key: as bearer token, as the password of a Basic login (all that some clients can
    send), as X-API-Key, or in the cookie that a browser got from us?"""
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
    login = request.authorization
    password = login.password or "" if login is not None and login.type == "basic" else ""
    given = (bearer, password, request.headers.get("X-API-Key", ""), request.cookies.get(KEY_COOKIE, ""))
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
