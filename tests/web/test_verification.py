"""Does an image's generation parameters stand up: generated again, is it exact, visually equal or different, and is a
wrong one refused?

In front of the generated image stand-in; with the real model in `test_the_bundled_model_verifies_its_own_picture`.
"""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image

from api import create_app
from core.engine import JobError
from core.imaging.image_io import read_image
from core.imaging.png_metadata import encode_png, read_request
from core.imaging.watermark import VERSION
from core.web.routes.verification import MAX_BOUND, MEAN_BOUND, compare
from tests.support.asking import NO_JOB, make_app, post, problem, run, service_of, tick, work
from tests.support.drawing import DrawingEngine, DrawingInfo

if TYPE_CHECKING:
    from generator import FaceGenerator

PNG = "image/png"
REQUEST = {"prompt": "a smiling woman", "negative_prompt": "", "n_images": 1, "n_inf_steps": 4, "seed": 7,
           "sampler": "Pencil", "guidance_scale": 3.0}


def drawn(app: Flask, index: int = 0, **body: Any) -> bytes:
    return app.test_client().get(f"/jobs/{run(app, **body)}/images/{index}.png").data


def forged(png: bytes, pixels: np.ndarray | None = None, info: Any = None, watermark: int | None = VERSION,
           **changes: Any) -> bytes:
    """A PNG with another image, another request or another model in it."""
    found = read_request(png)
    pixels = read_image(png) if pixels is None else pixels
    return encode_png(pixels, {**found["request"], **changes}, info or DrawingInfo(), watermark)


def verify(client: FlaskClient, png: bytes) -> dict[str, Any]:
    answer = client.post("/verify", data=png, content_type=PNG)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.get_json()
    assert answer.headers["Location"] == f"/jobs/{body['job_id']}/verdict"
    return body


def verdict(app: Flask, png: bytes) -> dict[str, Any]:
    client = app.test_client()
    job = verify(client, png)
    work(app)
    found: dict[str, Any] = client.get(f"/jobs/{job['job_id']}/verdict").get_json()
    assert found["job_id"] == job["job_id"]
    return found


def test_a_picture_of_a_job_is_exact(app: Flask, client: FlaskClient) -> None:
    """Any image of any job, as a file and inside JSON: it is generated alone, from its own seed."""
    png = drawn(app, 1, n_images=3, seed=7, prompt="an old man", guidance_scale=2.5)
    found = verdict(app, png)
    assert found == {"job_id": found["job_id"], "verdict": "exact", "mean_difference": 0, "max_difference": 0,
                     "size_changed": False, "mean_bound": MEAN_BOUND, "max_bound": MAX_BOUND}
    job = client.get(f"/jobs/{found['job_id']}/").get_json()
    assert (job["parameters"]["n_images"], job["parameters"]["seed"], job["parameters"]["verification"]) == (1, 8, True)
    again = client.post("/verify", json={"image": base64.b64encode(png).decode()}).get_json()
    assert again["job_id"] == found["job_id"]  # the same question has its answer already


def test_the_server_that_drew_it_may_have_marked_it_or_not(engine: DrawingEngine) -> None:
    for drew in (True, False):
        png = drawn(make_app(engine, watermark=drew), seed=3)
        assert read_request(png)["watermark"] == (VERSION if drew else None)
        assert verdict(make_app(engine, watermark=not drew), png)["verdict"] == "exact"


def test_a_little_noise_is_visually_equal_and_an_edit_is_not(app: Flask) -> None:
    png = drawn(app, seed=9)
    pixels = read_image(png)
    near = pixels.copy()
    near[::3, ::2] ^= 1
    found = verdict(app, forged(png, near))
    assert found["verdict"] == "visually_equal" and found["max_difference"] == 1 and 0 < found["mean_difference"] < 0.5
    edited = pixels.copy()
    edited[10:13, 10:13] = 255 - edited[10:13, 10:13]  # nine pixels hardly move the mean
    found = verdict(app, forged(png, edited))
    assert found["verdict"] == "different" and found["mean_difference"] < MEAN_BOUND
    assert verdict(app, forged(png, seed=10))["verdict"] == "different"  # the generation parameters of another image


def test_another_size_is_said_and_never_exact(app: Flask) -> None:
    png = drawn(app, seed=9)
    twice = np.kron(read_image(png), np.ones((2, 2, 1), np.uint8))
    found = verdict(app, forged(png, twice))
    assert found["size_changed"] and found["verdict"] in ("visually_equal", "different")
    even = verdict(app, forged(png, np.full((64, 64, 3), 128, np.uint8)))
    assert even["size_changed"] and even["verdict"] == "different"


@pytest.mark.parametrize(
    ("apart", "word"), [(0, "exact"), (1, "visually_equal"), (2, "different"), (30, "different")]
)
def test_the_bounds(apart: int, word: str) -> None:
    one = np.full((8, 8, 3), 100, np.uint8)
    assert compare(one, one + np.uint8(apart)) == (word, float(apart), apart)
    assert compare(one + np.uint8(apart), one) == (word, float(apart), apart)


def test_it_waits_its_turn_and_says_so(app: Flask, client: FlaskClient) -> None:
    png = drawn(app, seed=5)
    job = verify(client, png)
    where = f"/jobs/{job['job_id']}/verdict"
    answer = client.get(where)
    assert "is queued; wait" in problem(answer, 409)["detail"]
    tick(app)
    assert "is running; wait" in problem(client.get(where), 409)["detail"]
    assert verify(client, png)["job_id"] == job["job_id"]  # still the same
    work(app)
    assert client.get(where).get_json()["verdict"] == "exact"
    assert client.delete(f"/jobs/{job['job_id']}/").status_code == 204
    problem(client.get(where), 410)
    assert verify(client, png)["job_id"] != job["job_id"]


def test_one_that_failed_or_was_cancelled_is_asked_again(
    engine: DrawingEngine, app: Flask, client: FlaskClient
) -> None:
    def fail(step: int) -> None:
        raise JobError("out_of_memory", "Too little memory.")

    png = drawn(app, seed=5)
    engine.before_step = fail
    failed = verify(client, png)["job_id"]
    work(app)
    assert "Too little memory." in problem(client.get(f"/jobs/{failed}/verdict"), 409)["detail"]
    engine.before_step = None
    cancelled = verify(client, png)["job_id"]
    client.post(f"/jobs/{cancelled}/cancel")
    assert "cancelled" in problem(client.get(f"/jobs/{cancelled}/verdict"), 409)["detail"]
    third = verify(client, png)["job_id"]
    assert len({failed, cancelled, third}) == 3
    work(app)
    assert client.get(f"/jobs/{third}/verdict").get_json()["verdict"] == "exact"


def test_a_restart_forgets_no_verification(engine: DrawingEngine, tmp_path: Path) -> None:
    first = make_app(engine, data_dir=tmp_path)
    png = drawn(first, seed=5)
    job = verify(first.test_client(), png)["job_id"]
    service_of(first).close()
    second = make_app(engine, data_dir=tmp_path)
    work(second)
    assert second.test_client().get(f"/jobs/{job}/verdict").get_json()["verdict"] == "exact"


def test_another_model_or_another_mark_cannot_verify(app: Flask, client: FlaskClient) -> None:
    png = drawn(app, seed=5)
    other = forged(png, info=replace(DrawingInfo(), model_hash="e" * 64))
    told = problem(client.post("/verify", data=other, content_type=PNG), 409)["detail"]
    assert "another model" in told and "eeeeeeee" in told and "drawing (dddddddd" in told
    told = problem(client.post("/verify", data=forged(png, watermark=VERSION + 1), content_type=PNG), 409)["detail"]
    assert f"version {VERSION + 1} of the watermark" in told


def a1111(png: bytes) -> bytes:
    """Only the text that other programs keep."""
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        from PIL import PngImagePlugin

        chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
        chunks.add_text("parameters", image.text["parameters"])  # type: ignore[attr-defined]
        image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def test_pictures_without_a_sound_receipt_are_refused(app: Flask, client: FlaskClient) -> None:
    png = drawn(app, seed=5)
    bare = encode_png(read_image(png))
    crash = png[: len(png) // 2]
    for wrong, words in (
        (bare, "nothing says how it was generated"), (a1111(png), "no generation parameters"), (crash, "cut off"),
        (b"", "bytes"),
        (b"GIF89a" + bytes(30), "GIF"), (forged(png, sampler="Brush"), "sampler"),
        (forged(png, n_images=2), "n_images = 2"), (forged(png, n_inf_steps=5000), "n_inf_steps"),
        (forged(png, start_timestep=0.5), "start_timestep"), (forged(png, model="another"), "model"),
        (forged(png, latent="AAAA"), "latent"),
    ):
        for asked in ({"data": wrong, "content_type": PNG}, {"json": {"image": base64.b64encode(wrong).decode()}}):
            found = problem(client.post("/verify", **asked), 422)
            assert words in found["errors"][0]["message"], (words, found)
            assert found["errors"][0]["pointer"] in ("#", "#/image")
    assert service_of(app).queue.counts()["waiting"] == 0


def test_other_bodies_are_refused(client: FlaskClient) -> None:
    problem(client.post("/verify", data=b"\xff\xd8\xff", content_type="image/jpeg"), 415)
    problem(client.post("/verify", data=b"{", content_type="application/json"), 400)
    problem(client.post("/verify", json={"image": 5}), 422)
    problem(client.post("/verify", json={}), 422)
    problem(client.post("/verify", json={"image": "A" * 12 * 2**20}), 413)
    assert client.get("/verify").status_code == 405


def test_verdicts_are_of_verifications_alone(app: Flask, client: FlaskClient) -> None:
    problem(client.get(f"/jobs/{NO_JOB}/verdict"), 404)
    told = problem(client.get(f"/jobs/{run(app)}/verdict"), 404)["detail"]
    assert "not made by POST /verify" in told


def test_a_full_queue_says_when_to_come_back(engine: DrawingEngine) -> None:
    app = make_app(engine, max_waiting=2)
    client = app.test_client()
    png = drawn(app, seed=5)
    post(client)
    answer = client.post("/verify", data=png, content_type=PNG)  # one client has half of the places
    assert problem(answer, 429) and int(answer.headers["Retry-After"]) >= 1


def test_what_a_client_sends_cannot_be_the_key_of_a_verification(app: Flask, client: FlaskClient) -> None:
    problem(client.post("/text_to_image", json=REQUEST, headers={"Idempotency-Key": "verify a 0"}), 400)


def test_the_bundled_model_verifies_its_own_picture(bundled: FaceGenerator, tmp_path: Path) -> None:
    png = bundled.generate("a smiling woman", num_inference_steps=3, seed=4, num_images=2)[1].png
    app = create_app(lambda: bundled, start=False, data_dir=tmp_path)
    service = app.extensions["service"]
    batch = service.load()
    job = verify(app.test_client(), png)["job_id"]
    while service.queue.run_next(batch):
        pass
    found = app.test_client().get(f"/jobs/{job}/verdict").get_json()
    assert found["verdict"] in ("exact", "visually_equal") and found["max_difference"] <= 2, found
    service.close()
