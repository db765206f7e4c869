"""Do event streams tell everything once, to every reader, and again to who comes back?

In front of the generated image stand-in; one test speaks through a real socket and the real web server.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from api import create_app
from core.web.wsgi import Server
from tests.support.asking import NO_JOB, make_app, post, problem, run, service_of, stream_of, tick, work
from tests.support.drawing import DrawingEngine


def test_the_stream_tells_everything_once_and_replays(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, n_inf_steps=4, stream_freq=2)
    answer = client.get(f"/jobs/{job_id}/events")
    assert answer.content_type.startswith("text/event-stream")
    assert answer.headers["X-Accel-Buffering"] == "no" and answer.headers["Cache-Control"] == "no-store"
    events = stream_of(answer)
    assert [kind for _, kind, _ in events] == [
        "status", "status", "progress", "progress", "preview", "preview", "progress", "progress", "image", "image",
        "status", "done",
    ]
    assert [number for number, _, _ in events] == list(range(1, 13))
    assert events[0][2] == {"status": "queued", "queue_position": 1, "error": None}
    assert events[3][2] == {"t": 2, "total_t": 4}
    preview = dict(events[4][2])
    assert base64.b64decode(preview.pop("img")).startswith(b"\x89PNG")
    assert preview == {"index": 0, "seed": preview["seed"], "t": 2, "total_t": 4}
    final = dict(events[9][2])
    judged = {name: final.pop(name) for name in (
        "attributes", "agreement", "adherence", "prompt_alignment", "evaluations", "nearest")}
    assert len(judged["attributes"]) == 40 and set(judged["agreement"]) == {"Smiling", "Male"}
    assert final == {"index": 1, "seed": preview["seed"] + 1, "t": 4, "total_t": 4,
                     "url": f"/jobs/{job_id}/images/1.png"}
    assert events[11][2] == {"status": "succeeded", "error": None, "t": 4, "total_t": 4}
    assert stream_of(client.get(f"/jobs/{job_id}/events")) == events  # any number of readers see the same
    for ask in ({"headers": {"Last-Event-ID": "9"}}, {"query_string": {"after": "9"}},
                {"headers": {"Last-Event-ID": "9"}, "query_string": {"after": "2"}}):
        assert stream_of(client.get(f"/jobs/{job_id}/events", **ask)) == events[9:]
    assert client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "12"}).status_code == 204


@pytest.mark.parametrize("bad", ["", "-1", "one", "9" * 30, "1.5", "1 ", "١"])
def test_what_is_no_event_number(app: Flask, client: FlaskClient, bad: str) -> None:
    job_id = run(app)
    problem(client.get(f"/jobs/{job_id}/events", query_string={"after": bad}), 422)
    if bad.isascii():
        problem(client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": bad}), 400)


def test_no_such_job(client: FlaskClient) -> None:
    problem(client.get(f"/jobs/{NO_JOB}/events"), 404)


def test_a_stream_ends_with_its_job(app: Flask, client: FlaskClient) -> None:
    job_id = post(client)["job_id"]
    answer = client.get(f"/jobs/{job_id}/events")
    chunks = answer.iter_encoded()
    assert b"".join(next(chunks) for _ in range(2)).endswith(b'"queue_position": 1, "error": null}\n\n')
    work(app)
    assert b"event: done" in b"".join(chunks)


def test_the_stream_of_a_cancelled_job_says_so(app: Flask, client: FlaskClient) -> None:
    job_id = post(client)["job_id"]
    tick(app)
    client.delete(f"/jobs/{job_id}/")
    answer = service_of(app).queue.get(job_id)
    work(app)
    assert [event.data["status"] for event in answer.events if event.kind == "done"] == ["cancelled"]


def test_the_number_of_streams_is_bounded_and_given_back(engine: DrawingEngine) -> None:
    app = make_app(engine, max_streams=1)
    client = app.test_client()
    job_id, finished = post(client)["job_id"], None
    held = client.get(f"/jobs/{job_id}/events")
    next(held.iter_encoded())
    assert "poll" in problem(client.get(f"/jobs/{job_id}/events"), 429)["error"]
    assert client.head(f"/jobs/{job_id}/events").status_code == 200  # holds nothing
    work(app)
    finished = stream_of(client.get(f"/jobs/{job_id}/events"))  # a replay waits for nobody
    assert finished[-1][1] == "done"
    held.close()
    other = post(client)["job_id"]
    for _ in range(3):
        again = client.get(f"/jobs/{other}/events")
        assert again.status_code == 200
        again.close()


def test_a_quiet_stream_has_a_heartbeat(engine: DrawingEngine) -> None:
    app = make_app(engine, heartbeat_s=0.01)
    client = app.test_client()
    answer = client.get(f"/jobs/{post(client)['job_id']}/events")
    chunks = answer.iter_encoded()
    told = b""
    while b": still here\n\n" not in told:
        told += next(chunks)
    answer.close()


def test_a_stream_ends_when_its_reader_is_gone_or_the_server_stops(app: Flask, client: FlaskClient) -> None:
    job_id = post(client)["job_id"]
    gone = {"waitress.client_disconnected": lambda: True}
    assert client.get(f"/jobs/{job_id}/events", environ_overrides=gone).data == b"retry: 2000\n\n"
    service_of(app).queue.close()
    assert client.get(f"/jobs/{job_id}/events").data == b"retry: 2000\n\n"


def test_a_preview_that_was_dropped_is_passed_over(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=1, n_inf_steps=4, stream_freq=2)
    job = service_of(app).queue.get(job_id)
    job.event_log.store.remove_files(job.id, ["0-2.png"])
    kinds = [kind for _, kind, _ in stream_of(client.get(f"/jobs/{job_id}/events"))]
    assert "preview" not in kinds and kinds[-1] == "done"


# ---- through the real web server -------------------------------------------------------------------------------------


@pytest.fixture
def site(engine: DrawingEngine) -> Iterator[tuple[Flask, Server]]:
    """The application behind waitress, in threads of this process."""
    app = create_app(lambda: engine)
    server = Server(app, socket.create_server(("127.0.0.1", 0)), threads=4, max_body_bytes=3 * 2**20)
    serving = threading.Thread(target=server.run)
    serving.start()
    yield app, server
    service_of(app).close()
    server.stop()
    serving.join(10)
    assert not serving.is_alive()


def ask(server: Server, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
    """One request through the socket -> (status, content type, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path, body, {"Content-Type": kind} if body else {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers["Content-Type"], content


def wait_until_ready(server: Server) -> None:
    while ask(server, "GET", "/ready")[0] != 200:
        pass


def test_streaming_does_not_wait_for_the_end(site: tuple[Flask, Server], engine: DrawingEngine) -> None:
    """The first step arrives while the second is held back."""
    _, server = site
    gate = threading.Event()
    engine.before_step = lambda step: step > 1 and gate.wait(10)
    wait_until_ready(server)
    body = json.dumps({"prompt": "a face", "n_inf_steps": 2, "stream_freq": 1})
    job_id = json.loads(ask(server, "POST", "/text_to_image", body)[2])["job_id"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", f"/jobs/{job_id}/events")
    stream = connection.getresponse()
    lines: list[bytes] = []
    while not any(line.startswith(b"event: preview") for line in lines):
        lines.append(stream.readline())
    assert not gate.is_set()
    gate.set()
    assert b"event: done" in stream.read()
    connection.close()


def test_refusals_of_the_web_server_are_problems_too(site: tuple[Flask, Server]) -> None:
    """Above its own limit, too: the client can send all of a body that is refused, and then read why."""
    _, server = site
    wait_until_ready(server)
    for size in (2 * 2**20, 32 * 2**20):
        status, kind, content = ask(server, "POST", "/text_to_image", b" " * size)
        assert (status, kind) == (413, "application/problem+json")
        found = json.loads(content)
        assert found["status"] == 413 and found["error"].startswith("The body is too large: this ")
    for request, status in ((b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
                            (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 300_000 + b"\r\n\r\n", 431),
                            (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: odd\r\n\r\n", 501)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
            wire.sendall(request)
            answer = http.client.HTTPResponse(wire)
            answer.begin()
            assert answer.status == status and answer.headers["Content-Type"] == "application/problem+json"
            found = json.loads(answer.read())
            assert found["status"] == status and found["error"] == found["detail"]
            assert "Server" not in answer.headers and answer.headers["X-Content-Type-Options"] == "nosniff"
