"""Do clients find what was generated, and can they exchange images and latents with the model?

The gallery, images as files, collage, archive, /encode, /decode and /inspect, in front of the generated image stand-in.
What comes in as an image is tested in `tests/imaging/test_image_io.py`; here, that it passes this one path.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse

from api import create_app
from core.engine import JobError
from core.imaging.watermark import find, mark
from core.jobs.retention import Retention
from tests.support.asking import (
    LATENT,
    NO_JOB,
    CheckedClient,
    latent_of,
    make_app,
    post,
    problem,
    run,
    service_of,
    tick,
    work,
)
from tests.support.drawing import LATENT_SHAPE, DrawingEngine, as_png, draw


@pytest.fixture
def app(engine: DrawingEngine) -> Flask:
    return make_app(engine, keep=Retention(max_jobs=3))


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


# ---- the gallery -----------------------------------------------------------------------------------------------------


def test_the_list_is_newest_first_in_stable_pages(engine: DrawingEngine) -> None:
    app = make_app(engine)
    client = app.test_client()
    jobs = [run(app, n_images=1) for _ in range(5)][::-1]
    assert [job["job_id"] for job in client.get("/jobs/").get_json()["jobs"]] == jobs
    first = client.get("/jobs/?limit=2").get_json()
    run(app)  # comes in between and shifts nothing
    second = client.get(f"/jobs/?limit=2&cursor={first['next']}").get_json()
    third = client.get(f"/jobs/?limit=2&cursor={second['next']}").get_json()
    assert [job["job_id"] for page in (first, second, third) for job in page["jobs"]] == jobs
    assert third["next"] is None


def test_a_job_in_the_list_reads_exactly_like_this(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, seed=7)
    (job,) = client.get("/jobs/").get_json()["jobs"]
    full = client.get(f"/jobs/{job_id}/").get_json()
    same = ("finished", "job_id", "status", "progress", "queue_position", "created_at", "started_at", "finished_at",
            "parameters", "warnings", "error")
    assert job == {name: full[name] for name in same} | {"images": [
        {"index": i, "seed": 7 + i, "url": f"/jobs/{job_id}/images/{i}.png",
         "thumbnail": f"/jobs/{job_id}/images/{i}.webp"} for i in (0, 1)]}
    assert client.get(job["images"][1]["thumbnail"]).content_type == "image/webp"


def test_of_candidates_the_kept_ones_are_listed_with_their_own_seeds(app: Flask, client: FlaskClient) -> None:
    everybody = client.get(f"/jobs/{run(app, prompt='smiling', n_images=8, seed=7)}/").get_json()["response"]
    job_id = run(app, prompt="smiling", n_images=2, candidates=8, seed=7, stream_freq=2)
    full = client.get(f"/jobs/{job_id}/").get_json()
    best = sorted(everybody, key=lambda entry: -entry["adherence"])[:2]
    assert [entry["seed"] for entry in full["response"]] == [entry["seed"] for entry in best]
    assert [entry["index"] for entry in full["response"]] == [0, 1]
    listed = client.get("/jobs/").get_json()["jobs"][0]
    assert listed["job_id"] == job_id and [one["seed"] for one in listed["images"]] == [one["seed"] for one in best]
    finals = {name for name in app.extensions["service"].queue.get(job_id).file_names() if "-" not in name}
    assert finals == {"0.png", "1.png", "0.f32", "1.f32"}, "what was not kept takes no room"
    collage = Image.open(io.BytesIO(client.get(f"/jobs/{job_id}/collage.png").data))
    assert collage.width == 32, "the previews are of the first candidates, not of those that were kept"
    assert client.get(f"/jobs/{job_id}/latents/0?t=2").status_code == 404
    archive = zipfile.ZipFile(io.BytesIO(client.get(f"/jobs/{job_id}/archive.zip").data))
    assert set(archive.namelist()) == {"job.json", *(f"face-{one['seed']}.png" for one in best)}


def test_the_list_can_be_filtered(engine: DrawingEngine) -> None:
    app = make_app(engine)
    client = app.test_client()
    done, other = run(app, prompt="A Smiling Woman"), run(app, prompt="a man")
    running = post(client, prompt="a woman")["job_id"]
    tick(app)
    waiting = post(client, prompt="100% _odd_")["job_id"]

    def found(query: str) -> list[str]:
        return [job["job_id"] for job in client.get(f"/jobs/?{query}").get_json()["jobs"]]

    assert found("status=succeeded") == [other, done] and found("status=queued") == [waiting]
    assert found("status=running,queued") == [waiting, running] and found("status=failed") == []
    assert found("q=WOMAN") == [running, done] and found("q=woman&status=succeeded") == [done]
    assert found("q=%25") == found("q=_odd_") == [waiting] and found("q=*") == []
    assert client.get("/jobs/?status=running").get_json()["jobs"][0]["images"] == []


def test_an_unchanged_list_is_304(app: Flask, client: FlaskClient) -> None:
    run(app)
    tag = client.get("/jobs/").headers["ETag"]
    assert client.get("/jobs/", headers={"If-None-Match": tag}).status_code == 304
    run(app)
    assert client.get("/jobs/", headers={"If-None-Match": tag}).status_code == 200


@pytest.mark.parametrize(
    ("query", "pointer", "message"),
    [("limit=0", "?limit", "must be an integer from 1 to 200; got 0"),
     ("limit=201", "?limit", "must be an integer from 1 to 200; got 201"),
     ("limit=ten", "?limit", 'must be an integer from 1 to 200; got "ten"'),
     ("limit=1.5", "?limit", "must be an integer"), ("limit=", "?limit", "must be an integer"),
     ("limit=%EF%BC%91", "?limit", "must be an integer"), ("limit=" + "9" * 99, "?limit", "must be an integer"),
     ("limit=1&limit=2", "?limit", "must be an integer from 1 to 200; got [1, 2]"),
     ("cursor=nonsense", "?cursor", "must be the next of an earlier answer"),
     ("cursor=", "?cursor", "must be the next of an earlier answer"),
     ("cursor=../../etc", "?cursor", "must be the next"), ("status=done", "?status", "must be queued, running,"),
     ("status=", "?status", "must be queued, running,"), ("status=failed,", "?status", "must be queued, running,"),
     ("q=", "?q", "must be a string of 1 to 200 characters"), ("q=" + "x" * 201, "?q", "must be a string of 1 to 200"),
     ("q=%00", "?q", "must not contain control characters"),
     ("state=failed", "?state", "unknown field; did you mean status?")],
)
def test_bad_queries_of_the_list(client: FlaskClient, query: str, pointer: str, message: str) -> None:
    (error,) = problem(client.get(f"/jobs/?{query}"), 422)["errors"]
    assert error["pointer"] == pointer and error["message"].startswith(message), error


# ---- images as files -----------------------------------------------------------------------------------------------


def test_images_are_files_with_the_right_headers(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    early: list[TestResponse] = []
    engine.before_step = lambda step: early.append(client.get(f"/jobs/{job_id}/images/0.png"))
    job_id = post(client, n_images=2, seed=7)["job_id"]
    work(app)
    problem(early[0], 404)
    assert (early[2].status_code, early[2].headers["Cache-Control"]) == (200, "no-cache")  # a preview
    assert early[2].headers["ETag"] != early[3].headers["ETag"] or early[2].data == early[3].data
    answer = client.get(f"/jobs/{job_id}/images/1.png")
    assert answer.content_type == "image/png" and "immutable" in answer.headers["Cache-Control"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Disposition"] == 'inline; filename="face-8.png"'
    assert base64.b64encode(answer.data).decode() == client.get(f"/jobs/{job_id}/").get_json()["response"][1]["img"]
    tag = {"If-None-Match": answer.headers["ETag"]}
    assert client.get(f"/jobs/{job_id}/images/1.png", headers=tag).status_code == 304
    assert client.get(f"/jobs/{job_id}/images/0.png", headers=tag).status_code == 200
    for path in ("2.png", "-1.png", "x.png", "0.jpg", "0.f32", "0-2.png", "..%2f..%2fapi.py"):
        problem(client.get(f"/jobs/{job_id}/images/{path}"), 404)


def test_thumbnails_are_webp(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=1)
    answer = client.get(f"/jobs/{job_id}/images/0.webp")
    assert (answer.content_type, opened(answer.data).format) == ("image/webp", "WEBP")
    assert max(opened(answer.data).size) == 32 and "immutable" in answer.headers["Cache-Control"]
    problem(client.get(f"/jobs/{job_id}/images/1.webp"), 404)


def test_the_collage_shows_the_steps_of_each_image_side_by_side(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, n_inf_steps=6, stream_freq=2)
    answer = client.get(f"/jobs/{job_id}/collage.png")
    collage = opened(answer.data)
    assert collage.size == (3 * 32 + 2 * 2, 2 * 32 + 2)  # steps 2, 4 and the image; gutters of 2 pixels
    final = opened(client.get(f"/jobs/{job_id}/images/1.png").data)
    assert np.array_equal(np.asarray(collage)[34:, 68:], np.asarray(final))
    assert "immutable" in answer.headers["Cache-Control"]


def test_the_archive_holds_the_pictures_and_the_request(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, seed=7, prompt="../../etc/passwd")
    answer = client.get(f"/jobs/{job_id}/archive.zip")
    assert answer.content_type == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(answer.data))
    assert archive.namelist() == ["face-7.png", "face-8.png", "job.json"]
    assert archive.read("face-8.png") == client.get(f"/jobs/{job_id}/images/1.png").data
    assert json.loads(archive.read("job.json"))["prompt"] == "../../etc/passwd"


def test_what_is_not_finished_is_409(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    job_id = post(client, n_inf_steps=4, stream_freq=2)["job_id"]
    for done in (0, 3):
        for _ in range(done):
            tick(app)
        for name in ("collage.png", "archive.zip"):
            assert "wait" in problem(client.get(f"/jobs/{job_id}/{name}"), 409)["error"]
    client.post(f"/jobs/{job_id}/cancel")
    work(app)
    assert client.get(f"/jobs/{job_id}/collage.png").status_code == 200  # of what was seen
    assert "cancelled before" in problem(client.get(f"/jobs/{job_id}/archive.zip"), 409)["error"]

    def fail(step: int) -> None:
        raise JobError("not_finite", "No image came out.")

    engine.before_step = fail
    failed = run(app)
    for name in ("collage.png", "archive.zip"):
        assert "failed before" in problem(client.get(f"/jobs/{failed}/{name}"), 409)["error"]


# ---- latents ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(engine: DrawingEngine) -> Iterator[FlaskClient]:
    """An application whose engine has its own thread: who asks the model waits for it."""
    app = create_app(lambda: engine)
    app.test_client_class = CheckedClient
    with app.test_client() as client:
        while client.get("/ready").status_code == 503:
            pass
        yield client
    service_of(app).close()


def picture(size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, size[0] // 2 :] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def as_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def npy(latent: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, latent, allow_pickle=True)
    return buffer.getvalue()


def test_a_picture_becomes_a_latent(busy: FlaskClient) -> None:
    body = busy.post("/encode", json={"image": as_text(picture())}).get_json()
    assert body["shape"] == list(LATENT_SHAPE)
    latent = np.frombuffer(base64.b64decode(body["latent"]), "<f4").reshape(LATENT_SHAPE)
    assert latent[0].tolist() == [[-1, 1], [-1, 1]]
    for kind in ("PNG", "JPEG", "WEBP"):  # any size: the square in the middle
        content = {"data": picture((90, 60), kind), "content_type": f"image/{kind.lower()}"}
        other = busy.post("/encode", **content).get_json()
        numbers = np.frombuffer(base64.b64decode(other["latent"]), "<f4")
        assert np.allclose(numbers.reshape(LATENT_SHAPE), latent, atol=0.1)
        answer = busy.post("/encode", **content, headers={"Accept": "application/x-npy"})
        assert answer.content_type == "application/x-npy"
        assert np.load(io.BytesIO(answer.data), allow_pickle=False).tobytes() == base64.b64decode(other["latent"])
    job = post(busy, n_images=1, latent=body["latent"], start_timestep=0.5)  # what comes out can go in again
    assert job["parameters"]["num_latents"] == 1


def test_a_latent_becomes_a_picture(busy: FlaskClient) -> None:
    latent = np.zeros(LATENT_SHAPE, "<f4")
    latent[:, :, 1] = 1
    answers = [
        busy.post("/decode", json={"latent": as_text(latent.tobytes())}),
        busy.post("/decode", data=npy(latent), content_type="application/x-npy"),
    ]
    for answer in answers:
        image = opened(answer.data)
        assert answer.content_type == "image/png" and image.size == (32, 32)
        assert image.getpixel((0, 0)) == (128, 128, 128) and image.getpixel((31, 0)) == (255, 255, 255)


BAD_PICTURES: list[tuple[str, bytes, str, int]] = [
    ("nothing", b"", "image/png", 422), ("text", b"not a picture", "image/png", 422),
    ("cut short", picture()[:-20], "image/png", 422), ("a GIF", b"GIF89a" + bytes(50), "image/png", 422),
    ("an SVG", b"<svg/>", "image/png", 422), ("too large", bytes(8 * 2**20 + 1), "image/png", 413),
    ("wrong type", picture(), "image/gif", 415), ("a form", picture(), "multipart/form-data; boundary=x", 415),
    ("no type", picture(), "", 415), ("pickle", b"\x80\x04.", "application/octet-stream", 415),
    ("no JSON", b"{", "application/json", 400), ("no image", b"{}", "application/json", 422),
    ("null", b'{"image": null}', "application/json", 422), ("a number", b'{"image": 1}', "application/json", 422),
    ("no base64", b'{"image": "?"}', "application/json", 422), ("empty", b'{"image": ""}', "application/json", 422),
    ("no image", b'{"image": "aGVsbG8="}', "application/json", 422),
    ("a URL", b'{"image": "http://localhost/x.png"}', "application/json", 422),
    ("a path", b'{"image": "/etc/passwd"}', "application/json", 422),
    ("another field", b'{"image": "aGk=", "url": "x"}', "application/json", 422),
    ("too large as text", b'{"image": "' + b"A" * (12 * 2**20) + b'"}', "application/json", 413),
]


@pytest.mark.parametrize("route", ["/encode", "/inspect"])
@pytest.mark.parametrize(("body", "kind", "status"), [row[1:] for row in BAD_PICTURES],
                         ids=[row[0] for row in BAD_PICTURES])
def test_bad_pictures(client: FlaskClient, route: str, body: bytes, kind: str, status: int) -> None:
    found = problem(client.post(route, data=body, content_type=kind), status)
    if status == 422:
        assert {error["pointer"] for error in found["errors"]} <= {"#", "#/image", "#/url"}


BAD_LATENTS: list[tuple[str, Any, str, int]] = [
    ("nothing", b"", "application/x-npy", 422),
    ("no file", b"not npy", "application/x-npy", 422),
    ("another shape", npy(np.zeros((4, 2, 3), "<f4")), "application/x-npy", 422),
    ("one more axis", npy(np.zeros((1, 4, 2, 2), "<f4")), "application/x-npy", 422),
    ("doubles", npy(np.zeros(LATENT_SHAPE)), "application/x-npy", 422),
    ("big-endian", npy(np.zeros(LATENT_SHAPE, ">f4")), "application/x-npy", 422),
    ("Fortran order", npy(np.asfortranarray(np.zeros(LATENT_SHAPE, "<f4"))), "application/x-npy", 422),
    ("a pickle inside", npy(np.array([{"a": 1}], dtype=object)), "application/x-npy", 422),
    ("a claim of terabytes", npy(np.zeros(LATENT_SHAPE, "<f4")).replace(b"(4, 2, 2), }", b"(9**9, 99), }"),
     "application/x-npy", 422),
    ("terabytes", npy(np.zeros(LATENT_SHAPE, "<f4")).replace(b"(4, 2, 2), }        ", b"(999999999999, 9), }"),
     "application/x-npy", 422),
    ("cut short", npy(np.zeros(LATENT_SHAPE, "<f4"))[:-1], "application/x-npy", 422),
    ("too long", npy(np.zeros(LATENT_SHAPE, "<f4")) + b"x", "application/x-npy", 422),
    ("NaN", npy(np.full(LATENT_SHAPE, np.nan, "<f4")), "application/x-npy", 422),
    ("a zip", b"PK\x03\x04" + bytes(60), "application/x-npy", 422),
    ("a bare pickle", b"\x80\x04.", "application/x-npy", 422),
    ("too large", bytes(2**20 + 1), "application/x-npy", 413),
    ("wrong type", npy(np.zeros(LATENT_SHAPE, "<f4")), "application/octet-stream", 415),
    ("NaN in JSON", json.dumps({"latent": latent_of(float("nan"))}), "application/json", 422),
    ("huge in JSON", json.dumps({"latent": latent_of(1e9)}), "application/json", 422),
    ("short in JSON", json.dumps({"latent": "AAAA"}), "application/json", 422),
    ("no base64", json.dumps({"latent": "?"}), "application/json", 422),
    ("a list", json.dumps({"latent": [LATENT]}), "application/json", 422),
    ("a pickle in JSON", json.dumps({"latent": as_text(b"\x80\x04.")}), "application/json", 422),
]


@pytest.mark.parametrize(("body", "kind", "status"), [row[1:] for row in BAD_LATENTS],
                         ids=[row[0] for row in BAD_LATENTS])
def test_bad_latents(client: FlaskClient, body: Any, kind: str, status: int) -> None:
    problem(client.post("/decode", data=body, content_type=kind), status)


def test_the_model_can_refuse_or_be_too_busy(
    app: Flask, client: FlaskClient, engine: DrawingEngine, busy: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(latent: np.ndarray) -> np.ndarray:
        raise JobError("out_of_memory", "Too little memory.", "Try later.")

    monkeypatch.setattr(engine, "decode", fail)
    answer = busy.post("/decode", json={"latent": LATENT})
    assert problem(answer, 503)["error"] == "Too little memory. Try later." and answer.headers["Retry-After"]
    monkeypatch.setattr("core.web.routes.latents.PATIENCE_S", 0.01)
    problem(client.post("/decode", json={"latent": LATENT}), 503)  # nobody works on this queue
    for _ in range(15):
        service_of(app).queue.call(dict)
    problem(client.post("/decode", json={"latent": LATENT}), 429)
    service_of(app).close()
    problem(client.post("/decode", json={"latent": LATENT}), 503)


def test_latents_need_the_model_and_reading_a_picture_does_not(engine: DrawingEngine) -> None:
    app = create_app(lambda: engine, start=False)
    app.test_client_class = CheckedClient
    client = app.test_client()
    assert problem(client.post("/encode", json={"image": as_text(picture())}), 503)["state"] == "STARTING"
    assert problem(client.post("/decode", json={"latent": LATENT}), 503)["state"] == "STARTING"
    assert client.post("/inspect", json={"image": as_text(picture())}).get_json()["made_here"] is False


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_a_picture_says_how_it_was_drawn(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, seed=7, prompt="a smiling woman", guidance_scale=2.5)
    png = client.get(f"/jobs/{job_id}/images/1.png").data
    request = {"prompt": "a smiling woman", "negative_prompt": "", "n_images": 1, "n_inf_steps": 4, "seed": 8,
               "sampler": "Pencil", "guidance_scale": 2.5}
    expected = {"made_here": True, "request": request, "model_hash": "d" * 64, "model_matches": True}
    for asked in ({"data": png, "content_type": "image/png"}, {"json": {"image": as_text(png)}}):
        found = client.post("/inspect", **asked).get_json()
        del found["watermark"]  # an image of 32 pixels has no room for it
        assert found == expected
    again = client.get(f"/jobs/{run(app, **request)}/images/0.png").data
    assert np.array_equal(np.asarray(opened(again)), np.asarray(opened(png)))


def test_a_picture_from_elsewhere_says_nothing(client: FlaskClient) -> None:
    answer = client.post("/inspect", data=as_png(np.zeros((4, 4, 3), np.uint8)), content_type="image/png")
    nothing = {"made_here": False, "request": None, "model_hash": None, "model_matches": False,
               "watermark": {"found": False, "score": 0.0, "p_value": 1.0}}
    assert answer.get_json() == nothing


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
def test_where_the_text_is_lost_the_pixels_still_tell(client: FlaskClient, kind: str) -> None:
    """As a file and as text, with the right media type or another: only the content counts."""
    grain = np.random.default_rng(0).normal(0, 3, (128, 128, 1))  # an even cartoon is not what WebP is made for
    plain = np.clip(draw("a smiling woman", 3, 128, 0.5) + grain, 0, 255).astype(np.uint8)
    for pixels, wanted in ((plain, False), (mark(plain), True)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, quality=80)
        for asked in ({"data": buffer.getvalue(), "content_type": f"image/{kind.lower()}"},
                      {"data": buffer.getvalue(), "content_type": "image/png"},
                      {"json": {"image": as_text(buffer.getvalue())}}):
            found = client.post("/inspect", **asked).get_json()
            assert (found["made_here"], found["request"]) == (False, None)
            assert found["watermark"]["found"] is wanted, (kind, found)
            assert (found["watermark"]["p_value"] < 1e-5) is wanted


def test_only_one_picture_is_read_at_a_time_and_few_wait(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photograph may need hundreds of megabytes while it is looked at."""
    asked = threading.Barrier(5)
    held, answers = threading.Event(), []
    monkeypatch.setattr("core.web.routes.latents.find", lambda pixels: held.wait(20) and None or find(pixels))

    def ask() -> None:
        asked.wait()
        answers.append(client.application.test_client().post("/inspect", data=as_png(np.zeros((4, 4, 3), np.uint8)),
                                                             content_type="image/png").status_code)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    while len(answers) < 1:  # the fifth finds no place
        time.sleep(0.01)
    held.set()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] * 4 + [429]


def test_a_picture_of_another_model_is_told_apart(engine: DrawingEngine, app: Flask, client: FlaskClient) -> None:
    png = client.get(f"/jobs/{run(app)}/images/0.png").data
    engine.info = replace(engine.info, model_hash="e" * 64)
    found = client.post("/inspect", data=png, content_type="image/png").get_json()
    assert (found["made_here"], found["model_matches"]) == (True, False)


def test_no_such_job(client: FlaskClient) -> None:
    for name in ("images/0.png", "images/0.webp", "collage.png", "archive.zip"):
        problem(client.get(f"/jobs/{NO_JOB}/{name}"), 404)
