"""How do tests speak to the application over a real socket? `serving` puts it behind the web server of `api.main`.

Model and disk are left out: the engine is a generated image stand-in that takes two strides to the end of every job,
the data folder lies in memory where there is one. The server runs in threads of the test's own process; `server.py`
starts the real process.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flask import Flask

from api import THREADS, create_app
from core.web.requests import MAX_ANY_BODY_BYTES
from core.web.wsgi import Server
from tests.support.counting import quick_folder
from tests.support.drawing import DrawingEngine, DrawingRun

PATIENCE_S = 60.0  # far beyond what anything takes, also on a busy machine


class HurriedEngine(DrawingEngine):
    """Ends every run after two strides, however many steps were asked for: no test waits for a thousand."""

    def step(self, runs: Sequence[DrawingRun]) -> None:
        for run in runs:
            run.done = min(run.total, run.done + (run.total + 1) // 2)


@dataclass(frozen=True)
class Answer:
    """What came back for one request. `status` 0: the connection was closed without a word."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Live:
    """A server on loopback."""

    app: Flask
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(self, request: bytes, *, hang_up: bool = False) -> Answer:
        """The answer to these very bytes on a connection of their own; `hang_up` says that no more will come."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            try:
                connection.sendall(request)
                if hang_up:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:  # refused before all of it was sent; the answer may be there already
                pass
            return read_answer(connection, head=request.startswith(b"HEAD "))

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request; `body` is sent as it is when it is bytes, else as JSON. A header that is "" is left out."""
        wanted = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"}
        if body is not None and not isinstance(body, bytes):
            body, wanted["Content-Type"] = json.dumps(body).encode(), "application/json"
        if body is not None:
            wanted["Content-Length"] = str(len(body))
        wanted |= headers or {}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {text}" for name, text in wanted.items() if text)]
        return self.send("\r\n".join((*lines, "", "")).encode() + (body or b""))

    def draw(self, headers: Mapping[str, str] | None = None, **body: Any) -> dict[str, Any]:
        """A job from POST to its end; its state then."""
        accepted = self.ask("POST", "/text_to_image", {"prompt": "a face", "n_images": 1, **body}, headers)
        assert accepted.status == 200, accepted
        job_id = accepted.json()["job_id"]
        self.ask("GET", f"/jobs/{job_id}/events", None, headers)  # which ends when the job does
        state: dict[str, Any] = self.ask("GET", f"/jobs/{job_id}/", None, headers).json()
        assert state["finished"], state
        return state


def read_answer(connection: socket.socket, *, head: bool = False) -> Answer:
    """The next answer on a connection."""
    answer = http.client.HTTPResponse(connection, method="HEAD" if head else "GET")
    try:
        answer.begin()
        return Answer(answer.status, dict(answer.headers), answer.read())
    except (http.client.BadStatusLine, http.client.IncompleteRead, ConnectionError):  # reset: we were not done talking
        return Answer(0, {}, b"")
    finally:
        answer.close()


@contextmanager
def serving(engine: DrawingEngine | None = None, **options: Any) -> Iterator[Live]:
    """The application with this engine (else a hurried one), its model loaded; `options` are those of `create_app`."""
    with quick_folder() as folder:
        app = create_app(lambda: engine or HurriedEngine(), start=False, data_dir=folder, **options)
        service, loaded = app.extensions["service"], threading.Event()

        def load() -> Any:
            try:
                return service.load()
            finally:
                loaded.set()

        listener = socket.create_server(("127.0.0.1", 0))
        server = Server(app, listener, threads=THREADS, max_body_bytes=MAX_ANY_BODY_BYTES)
        running = threading.Thread(target=server.run, name="web server")
        running.start()
        service.queue.start(load)
        try:
            assert loaded.wait(PATIENCE_S) and service.state == "READY"
            yield Live(app, server.port)
        finally:
            service.close()
            server.stop()
            running.join(PATIENCE_S)
