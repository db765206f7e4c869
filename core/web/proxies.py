"""Where do clients find this server when a proxy stands before it?

A proxy that is trusted says by which scheme, host and sub-path it was asked, and by whom: `X-Forwarded-Proto`, `-Host`,
`-Prefix` and `-For`. From anybody else these headers are dropped, or a stranger could choose an address, which decides
whose turn it is. The proxy takes the sub-path off before it passes a request on.

It does not know routes. https://werkzeug.palletsprojects.com/middleware/proxy_fix/
"""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flask import has_request_context, request
from werkzeug.middleware.proxy_fix import ProxyFix

WSGI = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
TOLD = ("FOR", "PROTO", "HOST", "PREFIX", "PORT", "BY")
PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]{1,100}){0,10}")  # it comes back in addresses: nothing that means more there


def network(text: str) -> Network:
    """An address or a network from a flag."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        example = "give one such as 127.0.0.1 or 172.16.0.0/12"
        raise argparse.ArgumentTypeError(f"{text!r} is no address or network, {example}") from error


class TrustedProxies:
    """The application `app`, to which only proxies in these networks can say where it is."""

    def __init__(self, app: WSGI, trusted: Sequence[Network]) -> None:
        self._app, self._trusted = app, tuple(trusted)
        self._told = ProxyFix(app, x_for=1, x_proto=1, x_host=1, x_prefix=1)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not self._trusts(environ.get("REMOTE_ADDR", "")):
            for name in TOLD:
                environ.pop(f"HTTP_X_FORWARDED_{name}", None)
            return self._app(environ, start_response)
        prefix = environ.get("HTTP_X_FORWARDED_PREFIX", "").rpartition(",")[2].strip().rstrip("/")
        environ["HTTP_X_FORWARDED_PREFIX"] = prefix if PREFIX.fullmatch(prefix) else ""
        if environ.get("HTTP_X_FORWARDED_PROTO", "").rpartition(",")[2].strip() not in ("http", "https"):
            environ.pop("HTTP_X_FORWARDED_PROTO", None)
        return self._told(environ, start_response)

    def _trusts(self, address: str) -> bool:
        if not self._trusted:
            return False
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped  # of a socket that takes both
        return any(found in one for one in self._trusted)


def outside(path: str) -> str:
    """A path of this server as its clients see it: below the proxy's sub-path."""
    return f"{prefix()}{path}"


def prefix() -> str:
    """The sub-path under which the request at hand reached a trusted proxy; "" where there is none."""
    return request.script_root if has_request_context() else ""


def server_url() -> str:
    """Where the routes of this server are, for the OpenAPI document: "/" unless a proxy says otherwise."""
    return request.url_root.rstrip("/") if prefix() else "/"
