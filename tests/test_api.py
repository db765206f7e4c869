"""Does HTTP keep the contract of jobs? The promises by literal examples, the rest by behaviour, bad input by tables.

The engine is a generated image stand-in (`drawing.py`); jobs run in the test's own thread, so nothing here sleeps.
Every answer is held against the OpenAPI document as well (`asking.py`).
"""

from __future__ import annotations

import base64
import gc
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image

from core.engine import JobError
from core.jobs.clock import seconds_each
from core.jobs.retention import Retention
from core.jobs.storage_errors import StoreError
from core.text.lexicon import ATTRIBUTES
from tests.support.asking import LATENT, NO_JOB, latent_of, make_app, post, problem, run, service_of, tick, work
from tests.support.drawing import LATENT_SHAPE, DrawingEngine


@pytest.fixture
def app(engine: DrawingEngine) -> Flask:
    return make_app(engine, max_waiting=6, keep=Retention(max_jobs=2))


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


@pytest.mark.parametrize(("wish", "warning"), [
    ({"prompt": "smiling", "candidates": 8}, ""),
    ({"prompt": "", "candidates": 8}, "The prompt states nothing that can be judged"),
    ({"prompt": "", "candidates": 4}, ""),
    ({"prompt": "", "candidates": 8, "balance": True}, ""),
    ({"prompt": "smiling", "balance": True}, ""),
    ({"prompt": "an old man with black hair", "balance": True}, "The prompt leaves nothing open"),
])
def test_wishes_that_change_nothing_are_told(client: FlaskClient, wish: dict[str, Any], warning: str) -> None:
    answer = client.post("/text_to_image", json={"n_inf_steps": 50, **wish}).get_json()
    assert [text.split(":")[0] for text in answer["warnings"]] == ([warning] if warning else [])
    assert {name: answer["parameters"][name] for name in wish} == wish


def test_sliders_have_celebas_names_and_are_kept_as_they_were_asked_for(
    app: Flask, engine: DrawingEngine, client: FlaskClient
) -> None:
    asked = {"prompt": "a face", "attributes": {"young": -1.5, "EYEGLASSES": 2, "Bald": 0}, "keep": 2}
    answer = client.post("/text_to_image", json=asked).get_json()
    assert answer["parameters"]["attributes"] == {"Young": -1.5, "Eyeglasses": 2.0, "Bald": 0.0}
    assert answer["parameters"]["n_images"] == 2
    work(app)
    assert engine.begun[0].attributes == {"Young": -1.5, "Eyeglasses": 2.0, "Bald": 0.0}
    assert (engine.begun[0].candidates, engine.begun[0].balance) == (None, False)
    plain = client.post("/text_to_image", json={"prompt": "a face"}).get_json()["parameters"]
    assert not {"attributes", "candidates", "balance"} & set(plain)


def test_the_defaults_are_the_promised_ones(client: FlaskClient) -> None:
    parameters = client.post("/text_to_image", json={"prompt": ""}).get_json()["parameters"]
    assert (parameters["n_images"], parameters["n_inf_steps"], parameters["stream_freq"]) == (4, 500, 50)
    assert 0 <= parameters["seed"] < 2**53


def test_samplers_of_few_steps_take_few_unless_told(client: FlaskClient) -> None:
    few, told, usual = {"sampler": "Sketch"}, {"sampler": "Sketch", "steps": 9}, {"sampler": "Pencil"}
    for asked, steps in ((few, 4), (told, 9), (usual, 500)):
        parameters = client.post("/text_to_image", json={"prompt": "", **asked}).get_json()["parameters"]
        assert parameters["n_inf_steps"] == steps


def test_a_finished_job_reads_exactly_like_this(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, seed=7, n_inf_steps=4)
    answer = client.get(f"/jobs/{job_id}/")
    assert answer.status_code == 200 and answer.content_type == "application/json"
    body = answer.get_json()
    images = [(entry.pop("img"), entry.pop("latent")) for entry in body["response"]]
    for entry in body["response"]:
        assert list(entry.pop("attributes")) == list(ATTRIBUTES)
        assert set(entry.pop("agreement")) == {"Smiling", "Male"} and 0 <= entry.pop("adherence") <= 1
        assert 0 <= entry.pop("prompt_alignment") <= 1
        assert entry.pop("evaluations") == 8 and entry.pop("nearest")["too_close"] is False
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
    work(app)
    assert seen == [
        (1, None, "running", 0.0, False), (2, None, "running", 0.2, False), (3, 2, "running", 0.4, False),
        (4, 2, "running", 0.6, False), (5, 4, "running", 0.8, False),
    ]
    assert client.get(f"/jobs/{job_id}/").get_json()["response"][0]["t"] == 5


def test_the_time_left_is_told_while_it_runs(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    found: list[float | None] = []
    engine.before_step = lambda step: found.append(client.get(f"/jobs/{job_id}/").get_json()["eta_s"])
    job_id = post(client, n_inf_steps=4)["job_id"]
    work(app)
    assert found[:2] == [None, None] and all(eta is not None and eta >= 0 for eta in found[2:])


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps_does_not_change_the_time_left(jump: float) -> None:
    times, counts = [10.0, 11.0, 12.0, 13.0 + jump, 14.0 + jump, 15.0 + jump], [1, 3, 5, 7, 9, 11]
    assert seconds_each(times, counts) == 0.5


@pytest.mark.parametrize(
    ("include", "heavy"), [("none", set()), ("preview", {"img"}), ("full", {"img", "latent"})]
)
def test_include_leaves_out_heavy_fields(app: Flask, client: FlaskClient, include: str, heavy: set[str]) -> None:
    job_id = run(app, n_images=1)
    (entry,) = client.get(f"/jobs/{job_id}/?include={include}").get_json()["response"]
    judged = {"attributes", "agreement", "adherence", "prompt_alignment", "evaluations", "nearest"}
    assert set(entry) == {"t", "total_t", "index", "seed", "url"} | judged | heavy


def test_polling_an_unchanged_job_is_answered_304(app: Flask, client: FlaskClient) -> None:
    job_id = post(client)["job_id"]
    tag = client.get(f"/jobs/{job_id}/").headers["ETag"]
    assert client.get(f"/jobs/{job_id}/", headers={"If-None-Match": tag}).status_code == 304
    work(app)
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
    (asked,) = engine.begun
    assert (asked.prompt, asked.num_images, asked.seed, asked.sampler, asked.guidance_scale, asked.start) == (
        "a smiling woman", 2, 5, "DPM++ 2M", 0.0, 0.5)
    assert asked.negative_prompt == "beard" and asked.num_inference_steps == 4
    assert asked.latents.shape == (2, *LATENT_SHAPE) and asked.latents[0].ravel()[[0, -1]].tolist() == [-1, 1]
    body = client.get(f"/jobs/{job_id}/").get_json()
    assert body["parameters"]["num_latents"] == 1 and "latent" not in body["parameters"]
    assert body["response"][0]["latent"] == LATENT  # what comes out can go in again


def test_many_steps_have_a_sampler_of_their_own_unless_one_is_named(engine: DrawingEngine) -> None:
    engine.info = replace(engine.info, long_sampler="DPM++ 2M")
    app = make_app(engine)
    run(app, n_inf_steps=50)
    run(app, n_inf_steps=51)
    run(app, n_inf_steps=51, sampler="Pencil")
    assert [asked.sampler for asked in engine.begun] == ["Pencil", "DPM++ 2M", "Pencil"]
    told = app.test_client().get("/options").get_json()["fields"]["sampler"]
    assert (told["default"], told["long_default"], told["long_above"]) == ("Pencil", "DPM++ 2M", 50)


def test_skipping_every_step_still_ends_at_the_total(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=1, latent=[LATENT], start_timestep=1)
    body = client.get(f"/jobs/{job_id}/").get_json()
    assert (body["status"], body["response"][0]["t"], body["response"][0]["total_t"]) == ("succeeded", 4, 4)


def test_the_same_seed_is_the_same_picture_alone_or_among_others(app: Flask, client: FlaskClient) -> None:
    together = client.get(f"/jobs/{run(app, n_images=4, seed=10)}/").get_json()["response"]
    alone = client.get(f"/jobs/{run(app, n_images=1, seed=12)}/").get_json()["response"]
    assert together[2]["img"] == alone[0]["img"] and together[2]["seed"] == alone[0]["seed"] == 12


# ---- cancel and delete -----------------------------------------------------------------------------------------------


def test_cancel_waiting_running_finished_and_twice(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    running, neighbour = (post(client)["job_id"] for _ in range(2))
    for _ in range(2):
        tick(app)
    waiting = post(client)["job_id"]
    assert client.post(f"/jobs/{waiting}/cancel").get_json() == {
        "job_id": waiting, "status": "cancelled", "cancel_requested": True}
    engine.before_step = lambda step: step == 3 and client.post(f"/jobs/{running}/cancel")
    tick(app)
    engine.before_step = None
    work(app)
    body = client.get(f"/jobs/{running}/").get_json()
    assert (body["status"], body["finished"], body["error"]["code"], body["progress"]) == (
        "cancelled", True, "cancelled", 0.75)
    assert body["response"][0]["t"] == 2  # what was seen stays to be seen
    for job_id, state in ((running, "cancelled"), (neighbour, "succeeded")):
        for _ in range(2):
            assert client.post(f"/jobs/{job_id}/cancel").get_json()["status"] == state


def test_a_running_job_says_that_it_was_asked_to_stop(app: Flask, client: FlaskClient) -> None:
    job_id = post(client)["job_id"]
    tick(app)
    answer = client.post(f"/jobs/{job_id}/cancel").get_json()
    assert answer == {"job_id": job_id, "status": "running", "cancel_requested": True}


def test_delete_waiting_running_finished_and_twice(app: Flask, client: FlaskClient) -> None:
    finished = run(app)
    running = post(client)["job_id"]
    tick(app)
    waiting = post(client)["job_id"]
    for job_id in (finished, running, waiting):
        assert client.delete(f"/jobs/{job_id}/").status_code == 204
        problem(client.delete(f"/jobs/{job_id}/"), 410)
        for path in ("", "events", "images/0.png", "images/0.webp", "collage.png", "archive.zip", "verdict"):
            problem(client.get(f"/jobs/{job_id}/{path}"), 410)
        problem(client.post(f"/jobs/{job_id}/cancel"), 410)
    assert client.get("/jobs/").get_json() == {"jobs": [], "next": None}
    work(app)
    problem(client.delete(f"/jobs/{running}/"), 410)
    assert service_of(app).queue.counts()["running"] == 0


def test_unknown_is_404_and_expired_is_410(app: Flask, client: FlaskClient) -> None:
    jobs = [run(app) for _ in range(3)]  # two are kept
    for path in ("", "events", "images/0.png", "images/0.webp", "collage.png", "archive.zip", "verdict"):
        problem(client.get(f"/jobs/{jobs[0]}/{path}"), 410)
        problem(client.get(f"/jobs/{NO_JOB}/{path}"), 404)
    for job_id, status in ((jobs[0], 410), (NO_JOB, 404)):
        problem(client.post(f"/jobs/{job_id}/cancel"), status)
        problem(client.delete(f"/jobs/{job_id}/"), status)


# ---- repeated and refused requests -----------------------------------------------------------------------------------


def test_an_idempotency_key_returns_the_first_job(app: Flask, client: FlaskClient) -> None:
    body, key = {"prompt": "a face", "n_inf_steps": 2}, {"Idempotency-Key": "k-1"}
    first = client.post("/text_to_image", json=body, headers=key)
    again = client.post("/text_to_image", json={"steps": 2, "prompt": "a face"}, headers=key)  # the same in other words
    assert again.get_json() == first.get_json() and again.headers["Location"] == first.headers["Location"]
    work(app)
    late = client.post("/text_to_image", json=body, headers=key).get_json()
    assert late == {**first.get_json(), "status": "succeeded"}
    assert "another request" in problem(client.post("/text_to_image", json={"prompt": "b"}, headers=key), 422)["error"]
    for other in ({"Idempotency-Key": "k-2"}, {}, {**key, "X-Client-Id": "somebody else"[:8]}):
        answer = client.post("/text_to_image", json=body, headers=other).get_json()
        assert answer["job_id"] != first.get_json()["job_id"]
    client.delete(f"/jobs/{first.get_json()['job_id']}/")
    assert client.post("/text_to_image", json=body, headers=key).get_json()["job_id"] != first.get_json()["job_id"]


@pytest.mark.parametrize("header", ["Idempotency-Key", "X-Client-Id"])
@pytest.mark.parametrize("value", ["", " ", "two words", "x" * 201, "gr\xfc\xdfe", "tab\t"])
def test_keys_and_client_ids_are_short_and_visible(client: FlaskClient, header: str, value: str) -> None:
    problem(client.post("/text_to_image", json={"prompt": "a face"}, headers={header: value}), 400)


def test_a_full_queue_is_429_with_retry_after(client: FlaskClient) -> None:
    for name in ("a", "a", "a", "b", "b", "b"):
        assert client.post("/text_to_image", json={"prompt": "x"}, headers={"X-Client-Id": name}).status_code == 200
    answer = client.post("/text_to_image", json={"prompt": "a face"}, headers={"X-Client-Id": "c"})
    assert "6 jobs are waiting" in problem(answer, 429)["error"]
    assert int(answer.headers["Retry-After"]) >= 1


def test_one_client_cannot_fill_the_queue(client: FlaskClient) -> None:
    for _ in range(3):
        post(client)
    problem(client.post("/text_to_image", json={"prompt": "a face"}), 429)
    assert client.post("/text_to_image", json={"prompt": "x"}, headers={"X-Client-Id": "b"}).status_code == 200


def test_clients_take_turns(app: Flask, client: FlaskClient) -> None:
    tell = {"prompt": "x"}
    first, second = (client.post("/text_to_image", json=tell).get_json()["job_id"] for _ in range(2))
    other = client.post("/text_to_image", json=tell, headers={"X-Client-Id": "other"}).get_json()["job_id"]
    positions = [client.get(f"/jobs/{job_id}/").get_json()["queue_position"] for job_id in (first, other, second)]
    assert positions == [1, 2, 3]


def test_after_closing_no_job_is_accepted_and_nothing_is_ready(app: Flask, client: FlaskClient) -> None:
    service_of(app).queue.close()
    assert problem(client.post("/text_to_image", json={"prompt": "a face"}), 503)["error"] == "The server is stopping."
    service_of(app).close()
    assert problem(client.get("/ready"), 503)["state"] == "STOPPING"


# ---- what happened to jobs -------------------------------------------------------------------------------------------


def test_a_failed_job_says_why(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    def fail(step: int) -> None:
        raise JobError("not_finite", "No image came out.", "Try another sampler.")

    engine.before_step = fail
    body = client.get(f"/jobs/{run(app)}/").get_json()
    assert (body["finished"], body["status"], body["response"]) == (True, "failed", [])
    assert body["error"] == {"code": "not_finite", "message": "No image came out.", "hint": "Try another sampler."}


def test_jobs_and_pictures_survive_a_restart(engine: DrawingEngine, tmp_path: Path) -> None:
    before = make_app(engine, data_dir=tmp_path)
    finished = run(before, seed=1, prompt="../../etc/passwd")
    half = post(before.test_client(), seed=2, n_inf_steps=4, stream_freq=1)["job_id"]
    for _ in range(2):
        tick(before)
    told = before.test_client().get(f"/jobs/{finished}/").get_json()
    last_event_id = before.test_client().get(f"/jobs/{half}/").get_json()["last_event_id"]
    service_of(before).close()

    after = make_app(DrawingEngine(), data_dir=tmp_path)
    client = after.test_client()
    assert client.get(f"/jobs/{finished}/").get_json() == told
    body = client.get(f"/jobs/{half}/").get_json()
    assert (body["status"], body["response"], body["progress"]) == ("queued", [], 0.0)
    assert body["last_event_id"] > last_event_id
    work(after)
    body = client.get(f"/jobs/{half}/").get_json()
    assert (body["status"], body["eta_s"], len(body["response"])) == ("succeeded", 0.0, 4)
    alone = run(after, seed=2, n_inf_steps=4)
    images = [entry["img"] for entry in client.get(f"/jobs/{alone}/").get_json()["response"]]
    assert [entry["img"] for entry in body["response"]] == images
    assert not [path for path in tmp_path.rglob("*") if "passwd" in path.name]  # a prompt reaches no file name
    service_of(after).close()


def test_a_temporary_folder_goes_with_its_application(engine: DrawingEngine) -> None:
    app = make_app(engine)
    run(app)
    folder = service_of(app).queue._store.folder
    assert folder.is_dir()
    service_of(app).close()
    del app
    gc.collect()
    assert not folder.exists()


def test_a_failing_disk_is_503(app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise StoreError("the disk is full: /secret/folder")

    monkeypatch.setattr(service_of(app).queue, "submit", refuse)
    answer = client.post("/text_to_image", json={"prompt": "a face"})
    assert "secret" not in json.dumps(problem(answer, 503)) and answer.headers["Retry-After"]


@pytest.mark.parametrize("query", ["include=all", "include=", "include=none&include=full", "Include=none", "x=1"])
def test_bad_queries_of_a_job(app: Flask, client: FlaskClient, query: str) -> None:
    (error,) = problem(client.get(f"/jobs/{run(app)}/?{query}"), 422)["errors"]
    assert error["pointer"] == f"?{query.split('=')[0]}"


# ---- bad input -------------------------------------------------------------------------------------------------------


def short_latent() -> str:
    return base64.b64encode(bytes(60)).decode()


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
    ({"sampler": "Brush"}, "sampler", 'must be one of Pencil, DPM++ 2M, Sketch; got "Brush"'),
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
    ({"init_image": "?"}, "init_image", "must be base64"),
    ({"init_image": 7}, "init_image", "must be a string"),
    ({"mask": "aGk="}, "mask", "needs an init_image to change"),
    ({"strength": 0.5}, "strength", "needs an init_image to change"),
    ({"denoising_strength": 0.5}, "denoising_strength", "needs an init_image to change"),
    ({"strength": 1.5}, "strength", "must be a number from 0 to 1; got 1.5"),
    ({"init_image": "aGk=", "latent": LATENT}, "init_image", "cannot be given together with latent"),
    ({"variation_strength": 2}, "variation_strength", "must be a number from 0 to 1; got 2"),
    ({"interpolate_to": 5}, "interpolate_to", "must be a JSON object; got 5"),
    ({"interpolate_to": {}}, "interpolate_to", "needs a prompt, a seed or a latent"),
    ({"interpolate_to": {"seed": -1}}, "interpolate_to/seed", "must be an integer from 0 to 9007199254740991; got -1"),
    ({"interpolate_to": {"sed": 1}}, "interpolate_to/sed", "unknown field; did you mean seed?"),
    ({"interpolate_to": {"latent": "?"}}, "interpolate_to/latent", "must be base64 of 64 bytes"),
    ({"interpolate_to": {"latent": LATENT, "seed": 1}}, "interpolate_to/latent", "cannot be given together"),
    ({"interpolate_to": {"seed": 1}, "n_images": 1}, "interpolate_to", "needs n_images of at least 2, or a weight"),
    ({"interpolate_to": {"seed": 1, "weight": 0.5}}, "interpolate_to/weight", "is for one image: n_images must be 1"),
    ({"interpolate_to": {"seed": 1}, "variation_strength": 0.1}, "variation_strength", "must be 0 together with"),
    ({"interpolate_to": {"seed": 1}, "latent": [LATENT] * 4}, "latent", "must be one latent, not a list"),
    ({"interpolate_to": {"seed": 1}, "latent": LATENT, "start_timestep": 0.5}, "start_timestep", "must be 0"),
    ({"interpolate_to": {"seed": 1}, "init_image": "aGk="}, "init_image", "cannot be given together with interpolate"),
    ({"attributes": {"Smiling": 3}}, "attributes/Smiling", "must be a number from -2 to 2; got 3"),
    ({"attributes": {"Smilling": 1}}, "attributes", 'has no attribute "Smilling"; did you mean Smiling?'),
    ({"candidates": 3}, "candidates", "must be at least n_images = 4; got 3"),
    ({"balance": 1}, "balance", "must be a boolean; got 1"),
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


def test_a_flood_of_wrong_fields_is_cut_short(client: FlaskClient) -> None:
    many = {f"n_image{i}": 1 for i in range(50_000)}
    found = problem(client.post("/text_to_image", json={"prompt": "a", **many}), 422)
    assert len(found["errors"]) == 20
    (error,) = problem(client.post("/text_to_image", json={"prompt": "a", "n" * 500_000: 1}), 422)["errors"]
    assert len(error["pointer"]) < 80


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
    ("compressed", b'{"prompt": "a"}', {**JSON_TYPE, "Content-Encoding": "gzip"}, 415),
    ("no type", b'{"prompt": "a"}', {}, 415),
    ("a pickle", b"\x80\x04.", {"Content-Type": "application/octet-stream"}, 415),
    ("foreign page", b'{"prompt": "a"}', {**JSON_TYPE, "Origin": "https://evil.example"}, 403),
    ("page with a broken address", b'{"prompt": "a"}', {**JSON_TYPE, "Origin": "http://["}, 403),
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
     ("GET", "/static/none.js", 404), ("GET", "/.git/config", 404), ("GET", "/encode", 405), ("PUT", "/jobs/", 405),
     ("POST", f"/jobs/{NO_JOB}/", 405), ("GET", f"/jobs/{NO_JOB}/cancel", 405), ("TRACE", "/options", 405),
     ("GET", f"/jobs/{NO_JOB}/images/0.png/", 404), ("GET", f"/jobs/{NO_JOB}/images/99999999999999999999.png", 404),
     ("GET", "/jobs/%00/", 404), ("GET", "/jobs/%F0%9F%98%80/", 404), ("GET", "/jobs/" + "a" * 5000 + "/", 404),
     ("GET", "/jobs/%27%20OR%201=1--/", 404)],
)
def test_wrong_paths_and_methods(client: FlaskClient, method: str, path: str, status: int) -> None:
    answer = client.open(path, method=method)
    problem(answer, status)
    assert ("Allow" in answer.headers) is (status == 405)


def test_a_fault_of_ours_is_a_500_without_details(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service_of(app).queue, "submit", explode)
    assert "secret" not in json.dumps(problem(client.post("/text_to_image", json={"prompt": "a"}), 500))
    assert "secret detail" in caplog.text
