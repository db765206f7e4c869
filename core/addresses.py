"""Under which addresses is a server reached, and by whom?

Standard library only and no syntax newer than Python 3.7: `start.py` asks before anything is installed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket

ANYWHERE = ("0.0.0.0", "::")  # hosts that mean: listen on every address of this machine


def host_of(text: str) -> str:
    """A host as a person writes it, in the one spelling that the rest compares: [::1] and 0:0:0:0:0:0:0:1 are ::1."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        return bare


def address_of(host: str, port: int) -> str:
    """The URL that reaches, from this machine, a server bound to `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"


def lan_address(family: int = socket.AF_INET) -> str | None:
    """This machine's own address as its network sees it, for a phone; no packet is sent."""
    # addresses of no machine (RFC 5737, RFC 3849): only the route is looked up
    nobody = "192.0.2.1" if family == socket.AF_INET else "2001:db8::1"
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as route:
        route.connect((nobody, 9))
        found = str(route.getsockname()[0])
        return None if found.startswith("fe80:") else found  # that one means something on its own link alone
    return None


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens there; one for `::` takes IPv4 too, where the system can do that. Raises OSError."""
    if host == "::":
        both = socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=both)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family = min(found, key=lambda one: one[0] != socket.AF_INET)[0]  # a name of both: IPv4, which all clients try
    return socket.create_server((host, port), family=family)
