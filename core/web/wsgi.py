"""How does the application meet the network, and how does it stop?

waitress serves it: one process, a bounded number of threads, the same on Linux, macOS and Windows. Its own refusals
(a body or a header beyond bounds, broken HTTP) are given the one shape of all errors: plain text would be the only
answer of this server that a strict client cannot read.

`serve` ends in two ways. The first SIGTERM or Ctrl-C drains: everything is still answered until `drain` returns. The
second one ends the process at once; nothing that was accepted is lost by that, because jobs are on the disk. Sizes and
numbers among a server's flags are read here too.

It does not know what it serves. https://docs.pylonsproject.org/projects/waitress/
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import waitress
from flask import Flask
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

from core.web.errors import PROBLEM_TYPE, Problem, problem_text
from core.web.security import SECURITY_HEADERS

LINGER_S = 10.0  # for the rest of a body that was refused
FLUSH_S = 5.0  # for answers that are on their way when the server stops

log = logging.getLogger(__name__)


class ProblemTask(ErrorTask):
    """waitress's own refusal of a request, as a problem document."""

    def execute(self) -> None:
        error = self.request.error
        detail = f"{error.reason}: {error.body}"
        if error.code == 413:
            most = self.channel.adj.max_request_body_size - 1
            detail = f"The body is too large: this server accepts at most {most} bytes."
        body = problem_text(Problem(error.code, detail)).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", PROBLEM_TYPE), ("Cache-Control", "no-store")]
        self.response_headers += SECURITY_HEADERS.items()
        self.set_close_on_finish()
        self.content_length = len(body)
        self.channel.linger_until = time.monotonic() + LINGER_S
        self.write(body)


class ProblemChannel(HTTPChannel):
    """A connection whose refusals are problem documents.

    Most clients send a whole body before they read an answer, and a connection that is closed while data arrive takes
    the answer with it. So after a refusal the rest of the body is read and thrown away for a while.
    """

    error_task_class = ProblemTask
    linger_until: float | None = None
    lingering = False

    def handle_close(self) -> None:
        if self.linger_until is None or self.lingering or not self.connected:
            super().handle_close()
            return
        self.lingering, self.will_close = True, False
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def readable(self) -> bool:
        return self.lingering or super().readable()

    def handle_read(self) -> None:
        if not self.lingering:
            super().handle_read()
        elif self.recv(self.adj.recv_bytes) and time.monotonic() > (self.linger_until or 0.0):
            self.handle_close()


class Server:
    """The application on a socket. `run` serves in the caller's thread until `stop` is called from another one."""

    def __init__(self, app: Flask, listener: socket.socket, *, threads: int, max_body_bytes: int) -> None:
        self._server = waitress.create_server(
            app,
            sockets=[listener],
            threads=threads,
            ident=None,
            max_request_body_size=max_body_bytes + 1,
            channel_request_lookahead=1,  # or it would not notice that the reader of a quiet stream is gone
            clear_untrusted_proxy_headers=False,  # core.web.proxies does, which knows whom to trust
        )
        self._server.channel_class = ProblemChannel

    @property
    def port(self) -> int:
        return self._server.effective_port

    def run(self) -> None:
        self._server.run()

    def stop(self) -> None:
        """Let the answers that are on their way reach their readers, then close everything."""
        self._server.task_dispatcher.shutdown(cancel_pending=True, timeout=FLUSH_S)
        # closed by the loop's own thread; then it has nothing left to watch, and ends
        self._server.trigger.pull_trigger(lambda: wasyncore.close_all(self._server._map))


def serve(server: Server, drain: Callable[[], Any]) -> None:
    """Run until SIGTERM or Ctrl-C, then `drain()` while still answering. Only for the main thread."""
    stopping = threading.Event()

    def wind_down() -> None:
        try:
            drain()
        finally:
            server.stop()

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + signum)
        stopping.set()
        threading.Thread(target=wind_down, name="wind down").start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run()


# ---- flags ----------------------------------------------------------------------------------------------------------


def size(text: str) -> int:
    """Bytes, also as 500M or 2G."""
    found = re.fullmatch(r"(\d{1,15})([KMGT]?)", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, give bytes, or a number with K, M, G or T")
    return int(found[1]) * 1024 ** " KMGT".index(found[2] or " ")


def at_least(least: float, kind: type) -> Callable[[str], Any]:
    """A number from a flag, no smaller than `least`."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return number


def allowed_host(text: str) -> str:
    """A name that a Host header may say, in small letters; an address or a port around it is taken off."""
    found = re.fullmatch(r"(?:https?://)?([\w.-]+)(?::\d+)?/?", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no host, give a name such as faces.example")
    return found[1]


def allowed_origin(text: str) -> str:
    """The origin of a web page, as browsers send it. https://www.rfc-editor.org/rfc/rfc6454#section-6.2"""
    found = re.fullmatch(r"(https?)://(\[[0-9a-f:.]+\]|[\w.-]+)(:\d+)?/?", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no origin, give one such as https://faces.example")
    usual = {"http": ":80", "https": ":443"}[found[1]]
    port = found[3] or ""
    return f"{found[1]}://{found[2]}{'' if port == usual else port}"
