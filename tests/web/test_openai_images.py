"""Do programs written for OpenAI's images API draw here? The real `openai` package over a real socket, behind it the
drawing stand-in; and every answer held against the OpenAPI document in front of it.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from flask.testing import FlaskClient
from PIL import Image

from tests.support.asking import document, make_app, service_of, work
from tests.support.browsing import Gate
from tests.support.drawing import TROUBLE, DrawingEngine
from tests.support.loopback import PATIENCE_S, Live, serving

KEY = "open sesame"


@pytest.fixture
def live(engine: DrawingEngine) -> Iterator[Live]:
    with serving(engine, api_key=KEY) as found:
        yield found


@pytest.fixture
def ours(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as found:
        yield found


def picture_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def as_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_it_draws(ours: openai.OpenAI, live: Live, engine: DrawingEngine) -> None:
    drawn = ours.images.generate(model="drawing", prompt="a smiling woman", n=2, size="1024x1024", quality="low",
                                 style="vivid", extra_body={"seed": 7, "negative_prompt": "beard"})
    assert [picture_of(one.b64_json or "").size for one in drawn.data or ()] == [(32, 32)] * 2
    assert drawn.size == "32x32" and drawn.quality == "low" and drawn.output_format == "png"
    told = drawn.model_extra or {}
    assert told["warnings"] == ["The size is 32x32, the nearest to 1024x1024 that the model draws.",
                                "style changes nothing here."]
    assert [(one.model_extra or {})["seed"] for one in drawn.data or ()] == [7, 8]
    (asked,) = engine.begun
    assert (asked.num_images, asked.num_inference_steps, asked.negative_prompt) == (2, 16, "beard")
    job = live.ask("GET", f"/jobs/{told['job_id']}/", None, {"X-API-Key": KEY}).json()
    assert [one["img"] for one in job["response"]] == [one.b64_json for one in drawn.data or ()], "a job like all"
    for quality, steps in (("auto", 50), ("medium", 50), ("hd", 100)):
        ours.images.generate(prompt="a woman", quality=quality)  # type: ignore[arg-type]
        assert engine.begun[-1].num_inference_steps == steps


def test_it_gives_addresses(ours: openai.OpenAI, live: Live) -> None:
    drawn = ours.images.generate(prompt="a smiling woman", response_format="url", extra_body={"seed": 7})
    (one,) = drawn.data or ()
    assert one.url and one.url.startswith(f"{live.url}/jobs/a-smiling-woman-") and one.b64_json is None
    asked = urllib.request.Request(one.url, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
        assert Image.open(io.BytesIO(answer.read())).size == (32, 32)


def test_it_streams_partial_images(ours: openai.OpenAI) -> None:
    with ours.images.generate(prompt="a smiling woman", stream=True, partial_images=2, n=1,
                              extra_body={"num_inference_steps": 9}) as stream:
        events = list(stream)
    assert [(event.type, getattr(event, "partial_image_index", None)) for event in events] == [
        ("image_generation.partial_image", 0), ("image_generation.partial_image", 1),
        ("image_generation.completed", None)]
    assert all(picture_of(event.b64_json).size == (32, 32) for event in events)
    assert events[0].b64_json != events[1].b64_json != events[2].b64_json and events[2].size == "32x32"
    with ours.images.generate(prompt="a woman", stream=True, n=2, extra_body={"num_inference_steps": 4}) as stream:
        assert [event.type for event in stream] == ["image_generation.completed"] * 2
    with ours.images.generate(prompt=TROUBLE, stream=True) as stream, pytest.raises(openai.APIError) as failed:
        list(stream)
    assert "No picture came out." in failed.value.message


def test_it_edits(ours: openai.OpenAI, engine: DrawingEngine) -> None:
    grey = Image.new("RGB", (64, 64), (120, 130, 140))
    clear_left = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    clear_left.paste((0, 0, 0, 0), (0, 0, 32, 64))
    done = ours.images.edit(image=("face.png", as_bytes(grey)), mask=("mask.png", as_bytes(clear_left)),
                            prompt="a smiling woman", n=2, size="512x512", extra_body={"seed": 3})
    asked = engine.begun[-1]
    assert asked.num_images == 2 and asked.seed == 3 and asked.strength == 1.0
    assert asked.mask[:, :15].all() and not asked.mask[:, 17:].any()
    kept = np.asarray(picture_of((done.data or ())[0].b64_json or ""))[:, 17:]
    assert np.abs(kept.astype(int) - (120, 130, 140)).max() <= 12
    ours.images.edit(image=[as_bytes(grey)], prompt="a woman", extra_body={"strength": 0.25})
    assert engine.begun[-1].strength == 0.25 and engine.begun[-1].mask is None
    with ours.images.edit(image=as_bytes(grey), prompt="a woman", stream=True, partial_images=1,
                          extra_body={"num_inference_steps": 4}) as stream:
        assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
    with pytest.raises(openai.BadRequestError, match="mask: has no transparent pixels"):
        ours.images.edit(image=as_bytes(grey), mask=as_bytes(grey), prompt="a woman")
    with pytest.raises(openai.BadRequestError, match="must be as large as the image, 64x64; got 64x32"):
        ours.images.edit(image=as_bytes(grey), mask=as_bytes(clear_left.crop((0, 0, 64, 32))), prompt="a woman")
    with pytest.raises(openai.BadRequestError, match="image: must be one file; got 2"):
        ours.images.edit(image=[as_bytes(grey)] * 2, prompt="a woman")
    with pytest.raises(openai.BadRequestError, match="must be PNG, JPEG or WebP"):
        ours.images.edit(image=b"no picture", prompt="a woman")


def test_it_lists_the_model(ours: openai.OpenAI) -> None:
    (model,) = ours.models.list().data
    assert (model.id, model.object) == ("drawing", "model")


def test_errors_are_those_of_that_api(ours: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as many:
        ours.images.generate(prompt="a woman", n=9)
    body = many.value.body
    assert isinstance(body, dict) and body == {
        "message": "n: must be an integer from 1 to 8; got 9", "type": "invalid_request_error", "param": "n",
        "code": None}
    with pytest.raises(openai.NotFoundError) as unknown:
        ours.images.generate(prompt="a woman", model="dall-e-3")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.InternalServerError, match="No picture came out"):
        ours.images.generate(prompt=TROUBLE)
    with pytest.raises(openai.BadRequestError, match="unknown field"):
        ours.images.generate(prompt="a woman", extra_body={"frames": 3})
    with pytest.raises(openai.AuthenticationError) as locked:
        ours.with_options(api_key="wrong").models.list()
    assert locked.value.code == "invalid_api_key"
    answer = live.ask("POST", "/v1/images/generations", {"prompt": "a"},
                      {"Authorization": f"Bearer {KEY}", "Origin": "https://evil.example"})
    assert answer.status == 403 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_cancelled_job_is_a_conflict(ours: openai.OpenAI, live: Live, engine: DrawingEngine) -> None:
    engine.before_step = gate = Gate()
    raised: list[Exception] = []

    def draw() -> None:
        try:
            ours.images.generate(prompt="a woman")
        except openai.APIError as error:
            raised.append(error)

    asking = threading.Thread(target=draw)
    asking.start()
    try:
        key = {"X-API-Key": KEY}
        while not (jobs := live.ask("GET", "/jobs/?status=running", None, key).json()["jobs"]):
            pass
        live.ask("POST", f"/jobs/{jobs[0]['job_id']}/cancel", None, key)
    finally:
        gate.open()
        asking.join(PATIENCE_S)
    assert isinstance(raised[0], openai.ConflictError) and raised[0].code == "cancelled"


# ---- in front of the document ----------------------------------------------------------------------------------------


def ask(client: FlaskClient, path: str, **request: Any) -> Any:
    """One request in a thread of its own, while the jobs that it makes are done here."""
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(client.post(path, **request)))
    asking.start()
    while asking.is_alive():
        work(client.application)
        asking.join(0.01)
    return found[0]


def test_answers_are_as_documented(engine: DrawingEngine) -> None:
    client = make_app(engine).test_client()
    body = {"prompt": "a woman", "num_inference_steps": 2}
    first = ask(client, "/v1/images/generations", json=body, headers={"Idempotency-Key": "one"})
    again = ask(client, "/v1/images/generations", json=body, headers={"Idempotency-Key": "one"})
    assert first.get_json() == again.get_json() and len(engine.begun) == 1, "a repeated request draws once"
    form = {"prompt": "a woman", "image": (io.BytesIO(as_bytes(Image.new("RGB", (8, 8)))), "a.png"), "n": "2"}
    edited = ask(client, "/v1/images/edits", data=form, content_type="multipart/form-data")
    assert len(edited.get_json()["data"]) == 2
    for path, request in (
        ("generations", {"json": {}}), ("generations", {"json": {"prompt": "a", "size": "big"}}),
        ("generations", {"data": "{", "content_type": "application/json"}),
        ("edits", {"json": {"prompt": "a"}}),
        ("edits", {"data": {"prompt": "a"}, "content_type": "multipart/form-data"}),
    ):
        refused = client.post(f"/v1/images/{path}", **request)
        assert refused.status_code in (400, 415) and set(refused.get_json()) == {"error"}
    assert client.get("/v1/nothing").get_json()["error"]["type"] == "invalid_request_error"


def test_a_stop_lets_a_stream_go(engine: DrawingEngine) -> None:
    app = make_app(engine)
    answer = app.test_client().post("/v1/images/generations", json={"prompt": "a woman", "stream": True})
    service_of(app).queue.close()
    event, data = answer.text.strip().split("\n")[-2:]
    assert event == "event: error" and "goes on when it starts again" in json.loads(data[6:])["error"]["message"]


def test_its_routes_are_in_the_document() -> None:
    found = document(True)["paths"]
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models"} <= set(found)
    refused = found["/v1/images/edits"]["post"]["responses"]
    assert "422" not in refused and refused["400"]["content"] == {
        "application/json": {"schema": {"$ref": "#/components/schemas/OpenAiError"}}}
