"""Do edits pass through HTTP unharmed: images, masks, latents of any step, animations, and every wrong combination?

In front of the generated image stand-in; the last test takes a tiny model of real networks all the way.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image

from api import create_app
from core.imaging.animation import MAX_FRAMES, animation, frames
from core.imaging.file_sanitizer import PictureError
from core.imaging.image_io import as_text, read_image
from core.imaging.png_metadata import encode_png, read_request
from core.web.requests import MAX_DRAW_BODY_BYTES
from core.web.values import MAX_MASK_BYTES
from generator import FaceGenerator
from tests.support.asking import LATENT, CheckedClient, post, problem, run, service_of, stream_of, tick, work
from tests.support.drawing import LATENT_SHAPE, DrawingEngine

SIDE = 32  # of what the stand-in generates


def picture(size: tuple[int, int] = (SIDE, SIDE), kind: str = "PNG", mode: str = "RGB", **options: Any) -> str:
    """A gradient as base64."""
    shades = np.linspace(0, 255, size[0] * size[1]).reshape(size[::-1]).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shades).convert(mode).save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def halves(size: tuple[int, int] = (SIDE, SIDE), mode: str = "L") -> str:
    """A mask: black above, white below."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[size[1] // 2 :] = 255
    file = io.BytesIO()
    Image.fromarray(mask).convert(mode).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def cut_out(size: tuple[int, int] = (SIDE, SIDE)) -> str:
    """A mask as image editors make it: black, and transparent in its lower half."""
    mask = np.zeros((*size[::-1], 4), np.uint8)
    mask[: size[1] // 2, :, 3] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def plain(value: int, size: tuple[int, int] = (SIDE, SIDE)) -> str:
    return as_text(np.full((size[1], size[0], 3), value, np.uint8))


def turned() -> tuple[str, np.ndarray]:
    """A phone's photograph, stored on its side, and how it looks upright."""
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=95, exif=exif)
    return base64.b64encode(file.getvalue()).decode(), upright[8:40]


# ---- images come in ------------------------------------------------------------------------------------------------


def test_a_picture_reaches_the_engine_as_it_is_kept(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    accepted = post(client, init_image=picture(), mask=halves(), n_images=1)
    assert {name: accepted["parameters"][name] for name in ("has_init_image", "has_mask", "strength")} == {
        "has_init_image": True, "has_mask": True, "strength": 1.0}
    assert not {"init_image", "mask"} & set(accepted["parameters"])
    work(app)
    (asked,) = engine.begun
    assert np.array_equal(asked.init_image, read_image(base64.b64decode(picture())))
    assert not asked.mask[: SIDE // 2].any() and asked.mask[SIDE // 2 :].all() and asked.strength == 1.0


@pytest.mark.parametrize(("body", "strength"), [({}, 0.6), ({"strength": 0.25}, 0.25), ({"denoising_strength": 1}, 1.0),
                                                ({"strength": None}, 0.6), ({"strength": 0}, 0.0)])
def test_the_strength_of_a_picture(client: FlaskClient, body: dict[str, Any], strength: float) -> None:
    assert post(client, init_image=picture(), **body)["parameters"]["strength"] == strength


GOOD = {
    "one pixel": picture((1, 1)),
    "a thread": picture((1, 3000)),
    "ten thousand pixels wide": picture((10_000, 40)),
    "transparent": picture(mode="RGBA"),
    "grey and transparent": picture(mode="LA"),
    "CMYK": picture((64, 48), "JPEG", "CMYK"),
    "sixteen bits": picture(mode="I;16"),
    "one bit": picture(mode="1"),
    "WebP": picture((90, 60), "WEBP"),
}


@pytest.mark.parametrize("name", GOOD)
def test_any_photograph_will_do(app: Flask, engine: DrawingEngine, client: FlaskClient, name: str) -> None:
    post(client, init_image=GOOD[name], n_images=1)
    work(app)
    (asked,) = engine.begun
    assert asked.init_image.shape == (SIDE, SIDE, 3) and asked.init_image.dtype == np.uint8


def test_a_rotated_photograph_comes_in_upright(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    text, upright = turned()
    post(client, init_image=text, n_images=1)
    work(app)
    (asked,) = engine.begun
    assert np.abs(asked.init_image.astype(int) - upright).mean() < 5


@pytest.mark.parametrize(
    ("mask", "share"),
    [(halves(), 0.5), (halves((64, 64)), 0.5), (halves((90, 64)), 0.5), (halves(mode="RGB"), 0.5),
     (halves(mode="1"), 0.5), (plain(255), 1.0), (plain(128), 1.0), (plain(255, (1, 1)), 1.0),
     (halves((40, 400)), 0.5), (cut_out(), 0.5)],
)
def test_masks_of_any_size_are_black_and_white(
    app: Flask, engine: DrawingEngine, client: FlaskClient, mask: str, share: float
) -> None:
    post(client, init_image=picture(), mask=mask, n_images=1)
    work(app)
    (asked,) = engine.begun
    assert asked.mask.dtype == np.bool_ and asked.mask.mean() == share


def test_protected_pixels_come_back_over_http(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, init_image=picture(), mask=halves(), n_images=1)
    drawn = read_image(client.get(f"/jobs/{job_id}/images/0.png").data)
    assert np.array_equal(drawn[: SIDE // 2], read_image(base64.b64decode(picture()))[: SIDE // 2])


HUGE = picture((8000, 6300), mode="1")  # 50.4 million pixels in a few kilobytes
BAD = [  # body, the fields that are named, words
    ({"init_image": HUGE}, ("init_image",), "50,000,000"),
    ({"init_image": picture((40, 40), "GIF", "P")}, ("init_image",), "GIF"),
    ({"init_image": picture()[:120]}, ("init_image",), "cut off"),
    ({"init_image": picture(), "mask": plain(0)}, ("mask",), "nothing white at 32 x 32 pixels"),
    ({"init_image": picture(), "mask": plain(127)}, ("mask",), "nothing white"),
    ({"init_image": picture(), "mask": plain(0, (1, 1))}, ("mask",), "nothing white"),
    ({"init_image": picture(), "mask": "AAAA"}, ("mask",), "PNG, JPEG or WebP"),
    ({"init_image": "AAAA", "mask": "AAAA"}, ("init_image", "mask"), "PNG, JPEG or WebP"),
    ({"init_image": picture(), "mask": "A" * (2 * MAX_MASK_BYTES)}, ("mask",), "characters"),
    ({"init_image": picture(), "mask": [halves()]}, ("mask",), "must be a string"),
    ({"init_image": picture(), "strength": 1.01}, ("strength",), "from 0 to 1; got 1.01"),
    ({"init_image": picture(), "latent": LATENT}, ("init_image",), "together with latent"),
    ({"init_image": picture(), "start_timestep": 0.5}, ("start_timestep",), "needs a latent"),
    ({"init_image": picture(), "interpolate_to": {"seed": 1}}, ("init_image",), "together with interpolate_to"),
    ({"mask": halves()}, ("mask",), "needs an init_image"),
    ({"interpolate_to": {"latent": base64.b64encode(np.full(LATENT_SHAPE, np.nan, "<f4")).decode()}},
     ("interpolate_to/latent",), "finite"),
    ({"interpolate_to": {"prompt": "a\0b"}}, ("interpolate_to/prompt",), "control characters"),
    ({"interpolate_to": {"prompt": "x" * 501, "seed": -1}}, ("interpolate_to/prompt", "interpolate_to/seed"), "500"),
    ({"interpolate_to": {"weight": 0.5}, "n_images": 1}, ("interpolate_to",), "needs a prompt, a seed or a latent"),
    ({"interpolate_to": {"seed": 1, "weight": 2}, "n_images": 1}, ("interpolate_to/weight",), "from 0 to 1; got 2"),
    ({"interpolate_to": [1]}, ("interpolate_to",), "must be a JSON object"),
]


@pytest.mark.parametrize(("body", "fields", "words"), BAD, ids=[f"{number}" for number in range(len(BAD))])
def test_what_cannot_be_drawn_is_refused_by_name(
    app: Flask, client: FlaskClient, body: dict[str, Any], fields: tuple[str, ...], words: str
) -> None:
    found = problem(client.post("/text_to_image", json={"prompt": "a face", **body}), 422)
    assert {error["pointer"] for error in found["errors"]} == {f"#/{field}" for field in fields}
    assert words in found["detail"], found["detail"]
    assert service_of(app).queue.counts()["waiting"] == 0
    assert client.post("/text_to_image", json={"prompt": "a face"}).status_code == 200


def test_a_body_too_large_for_pictures_is_413(client: FlaskClient) -> None:
    problem(client.post("/text_to_image", data=b" " * (MAX_DRAW_BODY_BYTES + 1), content_type="application/json"), 413)
    large = {"prompt": "a", "init_image": "A" * (10 * 2**20), "mask": "A" * 2**20}
    found = problem(client.post("/text_to_image", json=large), 422)  # as many bytes as may come: looked at
    assert {error["pointer"] for error in found["errors"]} == {"#/init_image", "#/mask"}


def test_a_picture_counts_for_the_idempotency_key(client: FlaskClient) -> None:
    def ask(**body: Any) -> Any:
        return client.post("/text_to_image", json={"prompt": "a", **body}, headers={"Idempotency-Key": "once"})

    first = ask(init_image=picture()).get_json()
    assert ask(init_image=picture()).get_json()["job_id"] == first["job_id"]
    problem(ask(init_image=picture((40, 40))), 422)


# ---- variations and interpolation ------------------------------------------------------------------------------------


def test_a_variation_seed_is_drawn_and_told(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    accepted = post(client, seed=5, n_images=2, variation_strength=0.3)["parameters"]
    assert accepted["variation_strength"] == 0.3 and 0 <= accepted["variation_seed"] < 2**53
    assert "variation_seed" not in post(client, variation_seed=4)["parameters"]  # it has no effect
    work(app)
    assert (engine.begun[0].variation_strength, engine.begun[0].variation_seed) == (0.3, accepted["variation_seed"])
    job = client.get("/jobs/?limit=2").get_json()["jobs"][1]
    assert [image["seed"] for image in job["images"]] == [5, 5]  # what tells them apart is the variation


def test_a_guidance_interval_is_told_kept_and_reaches_the_engine(
    app: Flask, engine: DrawingEngine, client: FlaskClient
) -> None:
    job_id = run(app, n_images=1, seed=5, guidance_interval=[0, 0.6])
    assert engine.begun[0].guidance_interval == [0, 0.6]
    assert client.get(f"/jobs/{job_id}/").get_json()["parameters"]["guidance_interval"] == [0, 0.6]
    assert "guidance_interval" not in post(client, seed=5)["parameters"]
    work(app)
    assert engine.begun[1].guidance_interval is None


def test_an_interpolation_reaches_the_engine(app: Flask, engine: DrawingEngine, client: FlaskClient) -> None:
    target = {"prompt": "an old man", "latent": LATENT}
    job_id = run(app, n_images=3, seed=5, latent=LATENT, interpolate_to=target)
    (asked,) = engine.begun
    assert asked.interpolate_to.prompt == "an old man" and asked.interpolate_to.seed is None
    assert asked.interpolate_to.latent.shape == LATENT_SHAPE and asked.latents.shape == (3, *LATENT_SHAPE)
    body = client.get(f"/jobs/{job_id}/").get_json()
    assert body["parameters"]["interpolate_to"] == {
        "prompt": "an old man", "seed": None, "weight": None, "has_latent": True}
    assert [entry["seed"] for entry in body["response"]] == [5, 5, 5]
    zipped = client.get(f"/jobs/{job_id}/archive.zip")
    assert zipped.status_code == 200 and all(b"face-5-%d.png" % i in zipped.data for i in (1, 2, 3))


def test_words_of_both_prompts_are_checked(client: FlaskClient) -> None:
    warnings = post(client, interpolate_to={"prompt": "a wombatt"})["warnings"]
    assert any("wombatt" in warning for warning in warnings)


# ---- animations
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_a_job_becomes_a_film(app: Flask, client: FlaskClient, kind: str) -> None:
    job_id = run(app, n_images=4, seed=5)
    answer = client.get(f"/jobs/{job_id}/animation.{kind}?ms=100&between=1")
    assert answer.content_type == f"image/{kind}" and "immutable" in answer.headers["Cache-Control"]
    with Image.open(io.BytesIO(answer.data)) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (12, (SIDE, SIDE), 0)  # 4 + 3 faded, 5 of them back
        shown = []
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            assert film.info["duration"] == 100
            shown.append(np.asarray(film.convert("RGB")).astype(int))
    for i in range(4):
        drawn = read_image(client.get(f"/jobs/{job_id}/images/{i}.png").data)
        assert np.abs(shown[2 * i] - drawn).mean() < 12, i
    assert all(np.abs(shown[i] - shown[-i]).mean() < 6 for i in range(1, 6))  # and back
    tag = answer.headers["ETag"]
    assert client.get(f"/jobs/{job_id}/animation.{kind}?ms=100&between=1", headers={"If-None-Match": tag}
                      ).status_code == 304
    assert client.get(f"/jobs/{job_id}/animation.{kind}").headers["ETag"] != tag


def test_a_film_needs_a_finished_job_and_sound_numbers(app: Flask, client: FlaskClient) -> None:
    job_id = post(client, n_images=1)["job_id"]
    tick(app)
    problem(client.get(f"/jobs/{job_id}/animation.webp"), 409)
    work(app)
    assert client.get(f"/jobs/{job_id}/animation.webp").status_code == 200  # of one image
    for query in ("ms=0", "ms=x", "between=9", "between=-1", "fps=3"):
        problem(client.get(f"/jobs/{job_id}/animation.gif?{query}"), 422)


def test_frames_fade_there_and_back() -> None:
    one, other = (np.full((2, 2, 3), value, np.uint8) for value in (0, 30))
    assert [int(frame[0, 0, 0]) for frame in frames([one, other], 2)] == [0, 10, 20, 30, 20, 10]
    assert [int(frame[0, 0, 0]) for frame in frames([one], 2)] == [0]
    small, large = encode_png(one), encode_png(np.zeros((3, 3, 3), np.uint8))
    for pictures, words in (([], "of one size; got 0"), ([small, large], "2 sizes"), ([small] * MAX_FRAMES, "at most")):
        with pytest.raises(PictureError, match=words):
            animation(pictures, "WEBP", frame_ms=50, between=3)


# ---- latents of any step ---------------------------------------------------------------------------------------------


def test_the_latent_of_every_step_can_be_fetched(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, n_inf_steps=6, stream_freq=2, seed=3)
    for step in (2, 4, 6):
        found = client.get(f"/jobs/{job_id}/latents/1?t={step}").get_json()
        assert (found["index"], found["seed"], found["t"], found["total_t"]) == (1, 4, step, 6)
        assert len(base64.b64decode(found["latent"])) == 4 * np.prod(LATENT_SHAPE)
    newest = client.get(f"/jobs/{job_id}/latents/1")
    assert newest.get_json() == client.get(f"/jobs/{job_id}/latents/1?t=6").get_json()
    assert newest.get_json()["latent"] == client.get(f"/jobs/{job_id}/").get_json()["response"][1]["latent"]
    assert client.get(f"/jobs/{job_id}/latents/1", headers={"If-None-Match": newest.headers["ETag"]}).status_code == 304
    assert "2, 4, 6" in problem(client.get(f"/jobs/{job_id}/latents/1?t=3"), 404)["detail"]
    problem(client.get(f"/jobs/{job_id}/latents/2"), 404)
    problem(client.get(f"/jobs/{job_id}/latents/1?t=-1"), 422)


# ---- noise of an image ----------------------------------------------------------------------------------------------


@pytest.fixture
def busy(app: Flask) -> Iterator[FlaskClient]:
    """A client while the engine's thread works."""
    service = service_of(app)
    service.queue.start(lambda: service.batch)
    yield app.test_client()
    service.close()


def test_encode_can_answer_the_noise(busy: FlaskClient) -> None:
    def ask(**body: Any) -> Any:
        return busy.post("/encode", json={"image": picture((90, 60)), **body})

    latent, noise = (np.frombuffer(base64.b64decode(ask(invert=invert).get_json()["latent"]), "<f4")
                     for invert in (False, True))
    assert np.array_equal(noise, -latent)  # which is what the stand-in calls noise
    assert ask(invert=True, prompt="a woman").status_code == 200
    for body, field in (({"prompt": "a woman"}, "prompt"), ({"invert": 1}, "invert"), ({"invert": "yes"}, "invert"),
                        ({"invert": True, "prompt": "\0"}, "prompt"), ({"invert": True, "seed": 1}, "seed")):
        (error,) = problem(ask(**body), 422)["errors"]
        assert error["pointer"] == f"#/{field}"


# ---- all the way -----------------------------------------------------------------------------------------------------


def test_a_fork_from_a_preview_goes_another_way(faces: FaceGenerator) -> None:
    """With real networks: from step t of an animation, with another prompt and another seed, over HTTP alone."""
    app = create_app(lambda: faces, start=False)
    app.test_client_class = CheckedClient
    assert service_of(app).load()
    client = app.test_client()
    job_id = run(app, n_images=1, n_inf_steps=8, stream_freq=2, seed=3)
    shown = [data for _, kind, data in stream_of(client.get(f"/jobs/{job_id}/events")) if kind == "preview"]
    assert [data["t"] for data in shown] == [2, 4, 6]
    fork = client.get(f"/jobs/{job_id}/latents/0?t=4").get_json()
    asked = {"n_images": 2, "n_inf_steps": 8, "latent": fork["latent"], "start_timestep": fork["t"] / fork["total_t"]}
    other = run(app, prompt="an old man", seed=50, **asked)
    body = client.get(f"/jobs/{other}/").get_json()
    assert [(one["t"], one["total_t"], one["seed"]) for one in body["response"]] == [(8, 8, 50), (8, 8, 51)]
    steps = [data["t"] for _, kind, data in stream_of(client.get(f"/jobs/{other}/events")) if kind == "progress"]
    assert steps == [5, 6, 7, 8]  # only what is left is done

    def latent(entry: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(base64.b64decode(entry["latent"]), "<f4")

    first, second = map(latent, body["response"])
    stays = run(app, prompt="an old man", seed=50, **{**asked, "start_timestep": 1})
    assert np.array_equal(latent(client.get(f"/jobs/{stays}/").get_json()["response"][0]), latent(fork))
    assert np.abs(first - second).max() > 0.1 and np.abs(first - latent(fork)).max() > 0.1
    (alone,) = faces.generate("an old man", num_inference_steps=8, seed=50, start=0.5,
                              latents=latent(fork).reshape(1, *faces.info.latent_shape))
    assert np.abs(latent({"latent": base64.b64encode(alone.latent).decode()}) - first).max() < 1e-4


def test_a_masked_picture_goes_all_the_way(faces: FaceGenerator) -> None:
    """With real networks, and the generation parameters generates the image again."""
    app = create_app(lambda: faces, start=False)
    assert service_of(app).load()
    client = app.test_client()
    job_id = run(app, prompt="", n_images=2, init_image=picture((200, 150)), mask=halves((50, 50)), seed=3)
    png = client.get(f"/jobs/{job_id}/images/1.png").data
    told = client.post("/inspect", data=png, content_type="image/png").get_json()
    assert told["made_here"] and told["request"] == read_request(png)["request"]
    kept = read_image(base64.b64decode(told["request"]["init_image"]))
    drawn = read_image(png)
    assert np.array_equal(drawn[:64], kept[:64]) and np.abs(drawn[64:].astype(int) - kept[64:]).mean() > 3
    again = client.post("/text_to_image", json=told["request"]).get_json()["job_id"]
    work(app)
    assert np.abs(read_image(client.get(f"/jobs/{again}/images/0.png").data).astype(int) - drawn).max() <= 1
