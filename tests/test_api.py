"""Does HTTP keep the contract? The promised routes by literal examples, the rest by behaviour, bad input by a table.

The engine is a drawing stand-in (`drawing.py`); jobs run in the test's own thread, so nothing here sleeps.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import waitress
from drawing import LATENT_SHAPE, DrawingEngine
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image
from waitress import wasyncore
from werkzeug.test import TestResponse

import api
from api import Service, create_app
from core.captions import ATTRIBUTES
from core.jobs import JobError
from core.web import host_allowed

ROOT = Path(api.__file__).parent
LATENT = base64.b64encode(np.linspace(-1, 1, 16, dtype="<f4").tobytes()).decode()


def make_app(engine: DrawingEngine, **options: Any) -> Flask:
    """An application whose engine is loaded here and whose jobs wait for `run_next`."""
    app = create_app(lambda: engine, start=False, **options)
    assert app.extensions["service"].load()
    return app


@pytest.fixture
def engine() -> DrawingEngine:
    return DrawingEngine()


@pytest.fixture
def app(engine: DrawingEngine) -> Flask:
    return make_app(engine, max_waiting=3, keep_finished=2)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def service_of(app: Flask) -> Service:
    return app.extensions["service"]


def post(client: FlaskClient, **body: Any) -> dict[str, Any]:
    body = {"prompt": "a smiling woman", "n_inf_steps": 4, "stream_freq": 2, **body}
    answer = client.post("/text_to_image", json=body)
    assert answer.status_code == 200, answer.text
    return answer.get_json()


def run(app: Flask, **body: Any) -> str:
    """Post a job, do it, return its id."""
    job_id = post(app.test_client(), **body)["job_id"]
    assert service_of(app).queue.run_next() is not None
    return job_id


def problem(answer: TestResponse, status: int) -> dict[str, Any]:
    """The answer is this problem, in the one shape that all problems have."""
    assert answer.status_code == status, answer.text
    assert answer.content_type == "application/problem+json"
    body = answer.get_json()
    assert body["type"] == "about:blank" and body["status"] == status and body["title"]
    assert isinstance(body["error"], str) and body["error"] == body["detail"] != ""
    assert "Traceback" not in answer.text and "<html" not in answer.text.lower()
    return body


def stream_of(answer: TestResponse) -> list[tuple[int, str, dict[str, Any]]]:
    """Server-Sent Events -> (id, event, data)."""
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith((":", "retry")))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


# ---- the two promises ------------------------------------------------------------------------------------------------


def test_post_answers_200_with_the_id_its_location_and_what_will_be_done(client: FlaskClient) -> None:
    answer = client.post("/text_to_image", json={"prompt": "A smiling woman", "seed": 1234, "n_inf_steps": 50})
    assert answer.status_code == 200
    body = answer.get_json()
    job_id = body.pop("job_id")
    assert job_id.startswith("a-smiling-woman-") and len(job_id) == len("a-smiling-woman-") + 32
    assert answer.headers["Location"] == f"/jobs/{job_id}/"
    assert body == {
        "status": "queued",
        "parameters": {
            "prompt": "A smiling woman", "n_images": 4, "n_inf_steps": 50, "stream_freq": 50, "start_timestep": 0.0,
            "seed": 1234, "guidance_scale": 3.0, "negative_prompt": "", "sampler": "Pencil", "model": "drawing",
            "num_latents": 0,
        },
        "warnings": [],
    }


def test_the_defaults_are_the_promised_ones(client: FlaskClient) -> None:
    parameters = client.post("/text_to_image", json={"prompt": ""}).get_json()["parameters"]
    assert (parameters["n_images"], parameters["n_inf_steps"], parameters["stream_freq"]) == (4, 500, 50)
    assert 0 <= parameters["seed"] < 2**53


def test_a_finished_job_reads_exactly_like_this(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, seed=7, n_inf_steps=4)
    answer = client.get(f"/jobs/{job_id}/")
    assert answer.status_code == 200 and answer.content_type == "application/json"
    body = answer.get_json()
    images = [(entry.pop("img"), entry.pop("latent")) for entry in body["response"]]
    for img, latent in images:
        picture = Image.open(io.BytesIO(base64.b64decode(img, validate=True)))
        assert (picture.format, picture.size, picture.mode) == ("PNG", (32, 32), "RGB")
        assert np.frombuffer(base64.b64decode(latent, validate=True), "<f4").size == np.prod(LATENT_SHAPE)
    times = [body.pop(name) for name in ("created_at", "started_at", "finished_at")]
    assert times == sorted(times) and all(time.endswith("Z") for time in times)
    assert body == {
        "finished": True,
        "response": [
            {"t": 4, "total_t": 4, "index": 0, "seed": 7, "url": f"/jobs/{job_id}/images/0.png"},
            {"t": 4, "total_t": 4, "index": 1, "seed": 8, "url": f"/jobs/{job_id}/images/1.png"},
        ],
        "job_id": job_id,
        "status": "succeeded",
        "progress": 1.0,
        "queue_position": None,
        "eta_s": 0.0,
        "parameters": {
            "prompt": "a smiling woman", "n_images": 2, "n_inf_steps": 4, "stream_freq": 2, "start_timestep": 0.0,
            "seed": 7, "guidance_scale": 3.0, "negative_prompt": "", "sampler": "Pencil", "model": "drawing",
            "num_latents": 0,
        },
        "warnings": [],
        "error": None,
        "last_event_id": 12,
    }


def test_a_job_before_its_first_update(client: FlaskClient) -> None:
    first, second = post(client), post(client)
    body = client.get(f"/jobs/{second['job_id']}/").get_json()
    assert (body["finished"], body["response"], body["status"], body["progress"]) == (False, [], "queued", 0.0)
    assert (body["queue_position"], body["eta_s"], body["started_at"], body["finished_at"]) == (2, None, None, None)
    assert first["job_id"] != second["job_id"]


def test_updates_come_every_stream_freq_steps(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    seen: list[tuple[Any, ...]] = []

    def look(step: int) -> None:
        body = client.get(f"/jobs/{job_id}/").get_json()
        update = body["response"][0]["t"] if body["response"] else None
        seen.append((step, update, body["status"], body["progress"], body["finished"]))

    engine.before_step = look
    job_id = post(client, n_inf_steps=5, stream_freq=2)["job_id"]
    service_of(app).queue.run_next()
    assert seen == [
        (1, None, "running", 0.0, False), (2, None, "running", 0.2, False), (3, 2, "running", 0.4, False),
        (4, 2, "running", 0.6, False), (5, 4, "running", 0.8, False),
    ]
    assert client.get(f"/jobs/{job_id}/").get_json()["response"][0]["t"] == 5


def test_the_time_left_is_told_while_it_runs(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    found: list[float | None] = []
    engine.before_step = lambda step: found.append(client.get(f"/jobs/{job_id}/").get_json()["eta_s"])
    job_id = post(client, n_inf_steps=4)["job_id"]
    service_of(app).queue.run_next()
    assert found[:2] == [None, None] and all(eta is not None and eta >= 0 for eta in found[2:])


@pytest.mark.parametrize(
    ("include", "heavy"), [("none", set()), ("preview", {"img"}), ("full", {"img", "latent"})]
)
def test_include_leaves_out_heavy_fields(app: Flask, client: FlaskClient, include: str, heavy: set[str]) -> None:
    job_id = run(app, n_images=1)
    (entry,) = client.get(f"/jobs/{job_id}/?include={include}").get_json()["response"]
    assert set(entry) == {"t", "total_t", "index", "seed", "url"} | heavy


def test_polling_an_unchanged_job_is_answered_304(app: Flask, client: FlaskClient) -> None:
    job_id = post(client)["job_id"]
    tag = client.get(f"/jobs/{job_id}/").headers["ETag"]
    assert client.get(f"/jobs/{job_id}/", headers={"If-None-Match": tag}).status_code == 304
    service_of(app).queue.run_next()
    assert client.get(f"/jobs/{job_id}/", headers={"If-None-Match": tag}).status_code == 200


@pytest.mark.parametrize(
    ("alias", "field", "value"),
    [("num_images", "n_images", 2), ("steps", "n_inf_steps", 9), ("num_inference_steps", "n_inf_steps", 9),
     ("cfg_scale", "guidance_scale", 1.5), ("sampler_name", "sampler", "DPM++ 2M")],
)
def test_aliases(client: FlaskClient, alias: str, field: str, value: Any) -> None:
    answer = client.post("/text_to_image", json={"prompt": "a face", alias: value})
    assert answer.get_json()["parameters"][field] == value


def test_everything_asked_for_reaches_the_engine(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, seed=5, guidance_scale=0, negative_prompt="beard", sampler="dpm++ 2m", latent=LATENT,
                 start_timestep=0.5, init_image=None, model="drawing")
    (call,) = engine.calls
    latents = call.pop("latents")
    assert call == {"prompt": "a smiling woman", "seed": 5, "sampler": "DPM++ 2M", "guidance_scale": 0.0, "start": 0.5,
                    "negative_prompt": "beard"}
    assert latents.shape == (2, *LATENT_SHAPE) and latents[0].ravel()[[0, -1]].tolist() == [-1, 1]
    body = client.get(f"/jobs/{job_id}/").get_json()
    assert body["parameters"]["num_latents"] == 1 and "latent" not in body["parameters"]
    assert body["response"][0]["latent"] == LATENT  # what comes out can go in again


def test_skipping_every_step_still_ends_at_the_total(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=1, latent=[LATENT], start_timestep=1)
    body = client.get(f"/jobs/{job_id}/").get_json()
    assert (body["status"], body["response"][0]["t"], body["response"][0]["total_t"]) == ("succeeded", 4, 4)


def test_the_same_seed_is_the_same_picture_alone_or_among_others(app: Flask, client: FlaskClient) -> None:
    together = client.get(f"/jobs/{run(app, n_images=4, seed=10)}/").get_json()["response"]
    alone = client.get(f"/jobs/{run(app, n_images=1, seed=12)}/").get_json()["response"]
    assert together[2]["img"] == alone[0]["img"] and together[2]["seed"] == alone[0]["seed"] == 12


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_cancel_waiting_running_finished_and_twice(engine: DrawingEngine) -> None:
    app = make_app(engine)
    client = app.test_client()
    waiting, running, neighbour = (post(client)["job_id"] for _ in range(3))
    assert client.post(f"/jobs/{waiting}/cancel").get_json()["status"] == "cancelled"
    engine.before_step = lambda step: step == 3 and client.post(f"/jobs/{running}/cancel") and None
    service_of(app).queue.run_next()
    engine.before_step = None
    service_of(app).queue.run_next()
    body = client.get(f"/jobs/{running}/").get_json()
    assert (body["status"], body["finished"], body["error"]["code"], body["progress"]) == (
        "cancelled", True, "cancelled", 0.75)
    assert body["response"][0]["t"] == 2  # what was seen stays to be seen
    for job_id, state in ((waiting, "cancelled"), (running, "cancelled"), (neighbour, "succeeded")):
        for _ in range(2):
            assert client.post(f"/jobs/{job_id}/cancel").get_json()["status"] == state


def test_a_failed_job_says_why(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    def fail(step: int) -> None:
        raise JobError("not_finite", "No picture came out.", "Try another sampler.")

    engine.before_step = fail
    body = client.get(f"/jobs/{run(app)}/").get_json()
    assert (body["finished"], body["status"], body["response"]) == (True, "failed", [])
    assert body["error"] == {"code": "not_finite", "message": "No picture came out.", "hint": "Try another sampler."}


def test_unknown_is_404_and_deleted_is_410(app: Flask, client: FlaskClient) -> None:
    jobs = [run(app) for _ in range(3)]
    for path in ("", "events", "images/0.png"):
        problem(client.get(f"/jobs/{jobs[0]}/{path}"), 410)
        problem(client.get(f"/jobs/never-existed/{path}"), 404)
    problem(client.post(f"/jobs/{jobs[0]}/cancel"), 410)
    problem(client.post("/jobs/never-existed/cancel"), 404)


def test_a_full_queue_is_429_with_retry_after(client: FlaskClient) -> None:
    for _ in range(3):
        post(client)
    answer = client.post("/text_to_image", json={"prompt": "a face"})
    assert "3 jobs are waiting" in problem(answer, 429)["error"]
    assert int(answer.headers["Retry-After"]) >= 1


def test_images_are_files_with_the_right_headers(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    early: list[TestResponse] = []
    engine.before_step = lambda step: early.append(client.get(f"/jobs/{job_id}/images/0.png"))
    job_id = post(client, n_images=2)["job_id"]
    service_of(app).queue.run_next()
    problem(early[0], 404)
    assert (early[2].status_code, early[2].headers["Cache-Control"]) == (200, "no-store")  # a preview
    answer = client.get(f"/jobs/{job_id}/images/1.png")
    assert answer.content_type == "image/png" and "immutable" in answer.headers["Cache-Control"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert base64.b64encode(answer.data).decode() == client.get(f"/jobs/{job_id}/").get_json()["response"][1]["img"]
    for path in ("2.png", "-1.png", "x.png", "0.jpg", "0.f32", "..%2f..%2fapi.py"):
        problem(client.get(f"/jobs/{job_id}/images/{path}"), 404)


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
    assert events[9][2] == {"index": 1, "seed": preview["seed"] + 1, "t": 4, "total_t": 4,
                            "url": f"/jobs/{job_id}/images/1.png"}
    assert events[11][2] == {"status": "succeeded", "error": None, "t": 4, "total_t": 4}
    assert stream_of(client.get(f"/jobs/{job_id}/events")) == events  # any number of readers see the same
    for ask in ({"headers": {"Last-Event-ID": "9"}}, {"query_string": {"after": "9"}}):
        assert stream_of(client.get(f"/jobs/{job_id}/events", **ask)) == events[9:]
    assert client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "12"}).status_code == 204
    for bad in ("-1", "one", "9" * 30, "1.5"):
        problem(client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": bad}), 400)


def test_the_number_of_streams_is_bounded_and_given_back(engine: DrawingEngine) -> None:
    app = make_app(engine, max_streams=1)
    client = app.test_client()
    job_id = post(client)["job_id"]
    held = client.get(f"/jobs/{job_id}/events")
    next(held.iter_encoded())
    answer = client.get(f"/jobs/{job_id}/events")
    problem(answer, 429)
    held.close()
    service_of(app).queue.run_next()
    assert stream_of(client.get(f"/jobs/{job_id}/events"))[-1][1] == "done"


def test_a_quiet_stream_has_a_heartbeat(engine: DrawingEngine) -> None:
    app = make_app(engine, heartbeat_s=0.01)
    client = app.test_client()
    answer = client.get(f"/jobs/{post(client)['job_id']}/events")
    chunks = answer.iter_encoded()
    assert b"".join(next(chunks) for _ in range(3)).endswith(b": still here\n\n")
    answer.close()


def test_streaming_over_a_real_socket_does_not_wait_for_the_end(engine: DrawingEngine) -> None:
    """waitress, the engine's thread and a plain client: the first step arrives while the second is held back."""
    gate = threading.Event()
    engine.before_step = lambda step: step > 1 and gate.wait(10) and None
    app = create_app(lambda: engine)
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=4)
    serving = threading.Thread(target=server.run)
    serving.start()
    try:
        wait_until_ready(app)
        connection = http.client.HTTPConnection("127.0.0.1", server.effective_port, timeout=10)
        body = json.dumps({"prompt": "a face", "n_inf_steps": 2, "stream_freq": 1})
        connection.request("POST", "/text_to_image", body, {"Content-Type": "application/json"})
        job_id = json.load(connection.getresponse())["job_id"]
        connection.request("GET", f"/jobs/{job_id}/events")
        stream = connection.getresponse()
        lines = []
        while not any(line.startswith(b"event: preview") for line in lines):
            lines.append(stream.readline())
        assert not gate.is_set()
        gate.set()
        assert b"event: done" in stream.read()
        connection.close()
    finally:
        gate.set()
        service_of(app).close()
        server.task_dispatcher.shutdown()
        server.trigger.pull_trigger(lambda: wasyncore.close_all(server._map))  # in the server's own thread
        serving.join(10)


def wait_until_ready(app: Flask) -> None:
    loaded = threading.Event()

    def watch() -> None:
        while service_of(app).state == "STARTING":
            loaded.wait(0.01)
        loaded.set()

    threading.Thread(target=watch).start()
    assert loaded.wait(10)


def test_while_the_model_loads_and_when_it_cannot(engine: DrawingEngine, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(lambda: engine, start=False)
    client = app.test_client()
    answer = client.post("/text_to_image", json={"prompt": "a face"})
    assert problem(answer, 503)["state"] == "STARTING" and answer.headers["Retry-After"]
    assert problem(client.get("/ready"), 503)["state"] == "STARTING"
    assert client.get("/health").get_json() == {"status": "ok"}
    assert client.get("/options").get_json()["state"] == "STARTING"

    def broken() -> DrawingEngine:
        raise FileNotFoundError("models/x is not a model folder; train one")

    app = create_app(broken, start=False)
    assert not service_of(app).load()
    assert "models/x is not a model folder" in problem(app.test_client().get("/ready"), 503)["error"]
    problem(app.test_client().post("/text_to_image", json={"prompt": "a face"}), 503)
    assert "models/x" in app.test_client().get("/options").get_json()["failure"]


def test_ready(client: FlaskClient) -> None:
    post(client)
    assert client.get("/ready").get_json() == {
        "state": "READY", "model": "drawing", "device": "paper", "jobs": {"waiting": 1, "running": 0, "finished": 0}}


def test_after_closing_no_job_is_accepted(app: Flask, client: FlaskClient) -> None:
    service_of(app).close()
    problem(client.post("/text_to_image", json={"prompt": "a face"}), 503)


def test_options_hold_every_limit_and_default(client: FlaskClient) -> None:
    found = client.get("/options").get_json()
    assert found["fields"]["n_images"] == {
        "type": "integer", "minimum": 1, "maximum": 8, "default": 4, "description": "images in this job"}
    ranges = {name: (field.get("minimum"), field.get("maximum")) for name, field in found["fields"].items()}
    assert ranges == {
        "prompt": (None, None), "n_images": (1, 8), "n_inf_steps": (1, 1000), "stream_freq": (1, 1000),
        "latent": (None, None), "start_timestep": (0, 1), "seed": (0, 2**53 - 1), "guidance_scale": (0, 20),
        "negative_prompt": (None, None), "sampler": (None, None), "model": (None, None),
    }
    assert found["fields"]["prompt"]["max_length"] == found["fields"]["negative_prompt"]["max_length"] == 500
    assert found["fields"]["sampler"]["choices"] == found["samplers"] == ["Pencil", "DPM++ 2M"]
    assert found["fields"]["guidance_scale"]["default"] == 3.0
    assert found["models"][0]["latent_shape"] == list(LATENT_SHAPE)
    assert set(found["unavailable"]) == {"init_image", "strength", "mask", "attributes"}
    for example in found["examples"]:
        words = client.post("/prompt/analyze", json={"prompt": example}).get_json()
        assert words["attributes"] and words["contradictions"] == words["warnings"] == [], example
        assert {word["status"] for word in words["words"]} <= {"known", "rare"}, example


def test_analyze_reads_a_prompt(client: FlaskClient) -> None:
    found = client.post("/prompt/analyze", json={"prompt": "a smiling woman with blond hair"}).get_json()
    assert found["attributes"]["Smiling"] is True and found["attributes"]["Male"] is False
    assert set(found["attributes"]) <= set(ATTRIBUTES)
    assert found["words"][1] == {"text": "smiling", "start": 2, "end": 9, "status": "known", "suggestion": None}
    assert found["contradictions"] == []
    strange = client.post("/prompt/analyze", json={"prompt": "a smilling wombat"}).get_json()
    assert {word["text"]: word["status"] for word in strange["words"]}["wombat"] == "unknown"
    assert strange["warnings"] and post(client, prompt="a smilling wombat")["warnings"] == strange["warnings"]
    problem(client.post("/prompt/analyze", json={}), 422)
    problem(client.post("/prompt/analyze", json={"prompt": "x" * 501}), 422)


def test_finished_pictures_are_kept_as_files_when_asked(engine: DrawingEngine, tmp_path: Path) -> None:
    app = make_app(engine, data_dir=tmp_path)
    job_id = run(app, prompt="../../etc/passwd", n_images=2)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [f"images/{job_id[-32:]}/0.png", f"images/{job_id[-32:]}/1.png"]
    served = app.test_client().get(f"/jobs/{job_id}/images/1.png").data
    assert (tmp_path / files[1]).read_bytes() == served


# ---- bad input -------------------------------------------------------------------------------------------------------


def short_latent() -> str:
    return base64.b64encode(bytes(60)).decode()


def latent_of(value: float) -> str:
    return base64.b64encode(np.full(LATENT_SHAPE, value, "<f4").tobytes()).decode()


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "is required: a string of 0 to 500 characters"),
    ({"prompt": None}, "prompt", "must be a string of 0 to 500 characters; got null"),
    ({"prompt": 5}, "prompt", "must be a string of 0 to 500 characters; got 5"),
    ({"prompt": ["a"]}, "prompt", "must be a string"),
    ({"prompt": "x" * 501}, "prompt", "must be a string of 0 to 500 characters"),
    ({"prompt": "a\x00b"}, "prompt", "must not contain control characters"),
    ({"prompt": "\x1b[31m"}, "prompt", "must not contain control characters"),
    ({"prompt": "\ud800"}, "prompt", "must be a string"),
    ({"n_images": 0}, "n_images", "must be an integer from 1 to 8; got 0"),
    ({"n_images": 9}, "n_images", "must be an integer from 1 to 8; got 9"),
    ({"n_images": -1}, "n_images", "must be an integer from 1 to 8; got -1"),
    ({"n_images": 10**30}, "n_images", "must be an integer from 1 to 8"),
    ({"n_images": "4"}, "n_images", 'must be an integer from 1 to 8; got "4"'),
    ({"n_images": 2.5}, "n_images", "must be an integer from 1 to 8; got 2.5"),
    ({"n_images": True}, "n_images", "must be an integer from 1 to 8; got true"),
    ({"n_images": None}, "n_images", "must be an integer from 1 to 8; got null"),
    ({"num_images": 99}, "num_images", "must be an integer from 1 to 8; got 99"),
    ({"n_inf_steps": 0}, "n_inf_steps", "must be an integer from 1 to 1000; got 0"),
    ({"n_inf_steps": 1001}, "n_inf_steps", "must be an integer from 1 to 1000; got 1001"),
    ({"steps": {"a": 1}}, "steps", "must be an integer from 1 to 1000"),
    ({"stream_freq": 0}, "stream_freq", "must be an integer from 1 to 1000; got 0"),
    ({"stream_freq": 1001}, "stream_freq", "must be an integer from 1 to 1000"),
    ({"seed": -1}, "seed", f"must be an integer from 0 to {2**53 - 1}; got -1"),
    ({"seed": 2**53}, "seed", f"must be an integer from 0 to {2**53 - 1}; got {2**53}"),
    ({"seed": 1.5}, "seed", "must be an integer"),
    ({"seed": "random"}, "seed", "must be an integer"),
    ({"guidance_scale": -0.1}, "guidance_scale", "must be a number from 0 to 20; got -0.1"),
    ({"guidance_scale": 20.1}, "guidance_scale", "must be a number from 0 to 20; got 20.1"),
    ({"guidance_scale": "3"}, "guidance_scale", "must be a number from 0 to 20"),
    ({"guidance_scale": False}, "guidance_scale", "must be a number from 0 to 20"),
    ({"cfg_scale": 1e308}, "cfg_scale", "must be a number from 0 to 20"),
    ({"negative_prompt": "x" * 501}, "negative_prompt", "must be a string of 0 to 500 characters"),
    ({"negative_prompt": None}, "negative_prompt", "must be a string of 0 to 500 characters; got null"),
    ({"sampler": "Brush"}, "sampler", 'must be one of Pencil, DPM++ 2M; got "Brush"'),
    ({"sampler": ""}, "sampler", "must be one of"),
    ({"sampler": "__import__('os')"}, "sampler", "must be one of"),
    ({"sampler": 1}, "sampler", "must be a string; got 1"),
    ({"model": "../../secrets"}, "model", "must be one of drawing"),
    ({"model": "/etc/passwd"}, "model", "must be one of drawing"),
    ({"latent": "not base64!"}, "latent", "must be base64 of 64 bytes: float32 of shape [4, 2, 2]"),
    ({"latent": short_latent()}, "latent", "must be base64 of 64 bytes: float32 of shape [4, 2, 2]; got 60 bytes"),
    ({"latent": latent_of(float("nan"))}, "latent", "must hold finite numbers"),
    ({"latent": latent_of(float("inf"))}, "latent", "must hold finite numbers"),
    ({"latent": latent_of(1e9)}, "latent", "must hold finite numbers between -1000 and 1000"),
    ({"latent": [LATENT]}, "latent", "must be one latent or a list of n_images = 4; got 1"),
    ({"latent": []}, "latent", "must be one latent or a list of n_images = 4; got 0"),
    ({"latent": [LATENT, "?", LATENT, LATENT]}, "latent/1", "must be base64 of 64 bytes"),
    ({"latent": 7}, "latent", "must be a string"),
    ({"start_timestep": 1.5, "latent": LATENT}, "start_timestep", "must be a number from 0 to 1; got 1.5"),
    ({"start_timestep": -0.5}, "start_timestep", "must be a number from 0 to 1; got -0.5"),
    ({"start_timestep": 0.5}, "start_timestep", "needs a latent to start from"),
    ({"init_image": "aGk="}, "init_image", "not available with this model"),
    ({"mask": "aGk="}, "mask", "not available with this model"),
    ({"strength": 0.5}, "strength", "not available with this model"),
    ({"denoising_strength": 0.5}, "denoising_strength", "not available with this model"),
    ({"attributes": {"Smiling": 1}}, "attributes", "not available with this model"),
    ({"n_image": 2}, "n_image", "unknown field; did you mean n_images?"),
    ({"__class__": "x"}, "__class__", "unknown field"),
    ({"n_images": 2, "num_images": 3}, "num_images", "is another name of n_images; send only one of them"),
]


@pytest.mark.parametrize(("body", "field", "message"), BAD_FIELDS, ids=[f"{b}"[:60] for b, _, _ in BAD_FIELDS])
def test_bad_fields_are_named_with_what_is_accepted(
    app: Flask, client: FlaskClient, body: dict[str, Any], field: str, message: str
) -> None:
    body = body if "prompt" in body or field == "prompt" else {"prompt": "a face", **body}
    found = problem(client.post("/text_to_image", json=body), 422)
    (error,) = found["errors"]
    assert error["pointer"] == f"#/{field}"
    assert error["message"].startswith(message), error["message"]
    assert found["error"] == f"{field}: {error['message']}"
    assert service_of(app).queue.counts()["waiting"] == 0
    assert client.post("/text_to_image", json={"prompt": "a face"}).status_code == 200  # the server goes on


def test_all_bad_fields_are_listed_at_once(client: FlaskClient) -> None:
    body = {"steps": 0, "n_images": 9, "sampler": "x", "mask": "y", "z": 1}
    found = problem(client.post("/text_to_image", json=body), 422)
    assert {error["pointer"] for error in found["errors"]} == {
        "#/prompt", "#/steps", "#/n_images", "#/sampler", "#/mask", "#/z"}


JSON_TYPE = {"Content-Type": "application/json"}
BAD_BODIES: list[tuple[str, bytes, dict[str, str], int]] = [
    ("nothing", b"", JSON_TYPE, 400),
    ("not json", b"prompt=a", JSON_TYPE, 400),
    ("cut short", b'{"prompt": "a', JSON_TYPE, 400),
    ("NaN", b'{"prompt": "a", "guidance_scale": NaN}', JSON_TYPE, 400),
    ("Infinity", b'{"prompt": "a", "guidance_scale": -Infinity}', JSON_TYPE, 400),
    ("overflowing number", b'{"prompt": "a", "guidance_scale": 1e999}', JSON_TYPE, 422),
    ("endless digits", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", JSON_TYPE, 400),
    ("deep nesting", b"[" * 100_000, JSON_TYPE, 400),
    ("not utf-8", b'{"prompt": "\xff"}', JSON_TYPE, 400),
    ("a list", b"[]", JSON_TYPE, 422),
    ("a string", b'"prompt"', JSON_TYPE, 422),
    ("null", b"null", JSON_TYPE, 422),
    ("too large", b'{"prompt": "' + b"a" * 2**20 + b'"}', JSON_TYPE, 413),
    ("a form", b"prompt=a", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ("plain text, which needs no preflight", b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415),
    ("no type", b'{"prompt": "a"}', {}, 415),
    ("a pickle", b"\x80\x04.", {"Content-Type": "application/octet-stream"}, 415),
    ("foreign page", b'{"prompt": "a"}', {**JSON_TYPE, "Origin": "https://evil.example"}, 403),
    ("sandboxed page", b'{"prompt": "a"}', {**JSON_TYPE, "Origin": "null"}, 403),
    ("other port", b'{"prompt": "a"}', {**JSON_TYPE, "Origin": "http://localhost:8000"}, 403),
    ("rebound name", b'{"prompt": "a"}', {**JSON_TYPE, "Host": "evil.example"}, 403),
    ("lookalike", b'{"prompt": "a"}', {**JSON_TYPE, "Host": "localhost.evil.example"}, 403),
    ("broken host", b'{"prompt": "a"}', {**JSON_TYPE, "Host": "[::1"}, 403),
]


@pytest.mark.parametrize(
    ("body", "headers", "status"), [row[1:] for row in BAD_BODIES], ids=[row[0] for row in BAD_BODIES]
)
def test_bad_bodies_and_headers(
    app: Flask, client: FlaskClient, body: bytes, headers: dict[str, str], status: int
) -> None:
    problem(client.post("/text_to_image", data=body, headers=headers), status)
    assert service_of(app).queue.counts()["waiting"] == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/text_to_image", 405), ("PUT", "/text_to_image", 405), ("DELETE", "/", 405), ("GET", "/nothing", 404),
     ("GET", "/jobs/..%2f..%2fetc%2fpasswd/", 404), ("GET", "/static/../api.py", 404),
     ("GET", "/static/%2e%2e%2fapi.py", 404), ("GET", "/static/", 404), ("GET", "/static/app.py", 404),
     ("GET", "/static/none.js", 404), ("GET", "/.git/config", 404)],
)
def test_wrong_paths_and_methods(client: FlaskClient, method: str, path: str, status: int) -> None:
    problem(client.open(path, method=method), status)


def test_include_is_checked(app: Flask, client: FlaskClient) -> None:
    assert problem(client.get(f"/jobs/{run(app)}/?include=all"), 422)["errors"][0]["pointer"] == "?include"


def test_a_fault_of_ours_is_a_500_without_details(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service_of(app).queue, "submit", explode)
    assert "secret" not in json.dumps(problem(client.post("/text_to_image", json={"prompt": "a"}), 500))
    assert "secret detail" in caplog.text


# ---- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "hosts", "allowed"),
    [("localhost", None, True), ("localhost:5001", None, True), ("127.0.0.1:5001", None, True), ("[::1]:1", None, True),
     ("192.168.1.5:5001", None, False), ("evil.example", None, False), ("", None, False), ("a:b:c", None, False),
     ("192.168.1.5:5001", (), True), ("[fe80::1]:80", (), True), ("mybox:5001", ("mybox",), True),
     ("MyBox:5001", ("mybox",), True), ("evil.example", ("mybox",), False), ("localhost", (), True)],
)
def test_hosts(host: str, hosts: tuple[str, ...] | None, allowed: bool) -> None:
    assert host_allowed(host, hosts) is allowed


def test_the_same_origin_may_speak(client: FlaskClient) -> None:
    assert client.get("/health", headers={"Origin": "http://localhost"}).status_code == 200


def test_other_origins_only_by_allow_list(engine: DrawingEngine, client: FlaskClient) -> None:
    friend = {"Origin": "https://friend.example"}
    ask = {**friend, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    refused = client.options("/text_to_image", headers=ask)
    problem(refused, 403)
    assert "Access-Control-Allow-Origin" not in refused.headers
    assert "Access-Control-Allow-Origin" not in client.get("/health").headers
    open_app = make_app(engine, cors_origins=["https://friend.example"]).test_client()
    preflight = open_app.options("/text_to_image", headers=ask)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://friend.example"
    assert preflight.headers["Access-Control-Allow-Headers"].lower() == "content-type"
    answer = open_app.post("/text_to_image", json={"prompt": "a face"}, headers=friend)
    assert answer.status_code == 200 and answer.headers["Access-Control-Allow-Origin"] == "https://friend.example"
    problem(open_app.get("/health", headers={"Origin": "https://evil.example"}), 403)


def test_the_key_opens_what_needs_it(engine: DrawingEngine) -> None:
    client = make_app(engine, api_key="open sesame").test_client()
    for path in ("/", "/health", "/static/app.js"):
        assert client.get(path, buffered=True).status_code == 200
    for path in ("/options", "/ready", "/jobs/x/", "/nothing"):
        problem(client.get(path), 401)
    problem(client.post("/text_to_image", json={"prompt": "a face"}), 401)
    for headers in ({"Authorization": "Bearer no"}, {"X-API-Key": ""}, {"Cookie": "faces_key=x"}, {"X-API-Key": "ö"}):
        problem(client.get("/options", headers=headers), 401)
    for headers in ({"Authorization": "Bearer open sesame"}, {"X-API-Key": "open sesame"}):
        assert client.get("/options", headers=headers).status_code == 200
    assert "Set-Cookie" not in client.get("/session?key=wrong").headers
    problem(client.get("/options"), 401)
    session = client.get("/session?key=open%20sesame")
    assert (session.status_code, session.headers["Location"]) == (303, "./")
    assert "HttpOnly" in session.headers["Set-Cookie"] and "SameSite=Strict" in session.headers["Set-Cookie"]
    assert client.get("/options").status_code == 200  # the test client keeps cookies, as a browser does


def test_the_page_and_every_answer_have_a_strict_policy(client: FlaskClient) -> None:
    for path in ("/", "/static/app.js", "/options", "/nothing"):
        headers = client.get(path, buffered=True).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" == policy["style-src"]
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    page = client.get("/", buffered=True)
    assert page.content_type == "text/html; charset=utf-8"
    assert "onclick" not in page.text and "<script>" not in page.text and "style=" not in page.text
    assert client.get("/static/app.js", buffered=True).content_type.startswith("text/javascript")


def test_static_files_stay_within_their_budget() -> None:
    files = [ROOT / "frontend.html", *(ROOT / "static").iterdir()]
    assert sum(path.stat().st_size for path in files) <= 150_000


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--host", "0.0.0.0"], "give --api-key KEY, or say --insecure"), (["--port", "70000"], "must be 0 to 65535"),
     (["--threads", "0"], "--threads must be at least 1"), (["--unknown"], "unrecognized arguments")],
)
def test_arguments_are_checked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FACES_API_KEY", raising=False)
    with pytest.raises(SystemExit) as stopped:
        api.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACES_API_KEY", "open sesame")
    assert api.parse_arguments(["--host", "0.0.0.0"]).api_key == "open sesame"
    monkeypatch.delenv("FACES_API_KEY")
    assert api.parse_arguments(["--host", "0.0.0.0", "--insecure"]).insecure


def test_a_taken_port_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert api.main(["--port", str(port)]) == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.fixture
def unloadable(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """The real command, serving a folder that holds no model."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "api.py"), "--port", "0", "--model", str(tmp_path), "--threads", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_command_serves_the_page_and_stops_when_told(unloadable: Callable[[], subprocess.Popen[str]]) -> None:
    process = unloadable()
    assert process.stdout is not None
    port = int(process.stdout.readline().rsplit(":", 1)[1].strip("/\n"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200 and b"<!doctype html>" in answer.read()[:20].lower()
    assert answer.headers["Server"] is None
    connection.close()
    process.terminate()
    assert process.wait(30) == 0


def test_importing_the_api_does_not_import_torch() -> None:
    script = "import sys, api; assert 'torch' not in sys.modules, 'torch'; assert 'PIL' not in sys.modules, 'PIL'"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
