"""How does a client see several models: what is listed, what each can do, what is said while one is loaded?"""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flask import Flask
from PIL import Image

from core.engine import Engine, EngineInfo
from core.jobs.models import Models, ModelSource
from tests.support.asking import CheckedClient, make_app, post, problem, run, service_of, tick, work
from tests.support.drawing import DrawingEngine, DrawingInfo

LACKS = frozenset(("attributes", "balance", "candidates", "vocabulary"))
OTHER = replace(DrawingInfo(), name="Other", model_hash="e" * 64, kind="stable-diffusion", lacks=LACKS,
                samplers=("Brush",), default_sampler="Brush", long_sampler="Brush", default_guidance_scale=7.5,
                few_steps={}, step_curve=(), sliders={}, guidance_range=None)


def broken() -> Engine:
    raise ValueError("x.ckpt is cut off: copy it again")


def refused() -> EngineInfo:
    raise ValueError("y.safetensors is a Stable Diffusion XL model")


@pytest.fixture
def drawn() -> dict[str, DrawingEngine]:
    return {"drawing": DrawingEngine(), "Other": DrawingEngine(OTHER)}


@pytest.fixture
def app(drawn: dict[str, DrawingEngine]) -> Flask:
    """Four models: two that generate, one whose file breaks when it is loaded, one that is nothing that generates."""
    from api import create_app

    models = Models([
        ModelSource("drawing", lambda: drawn["drawing"]),
        ModelSource("Other", lambda: drawn["Other"], lambda: OTHER),
        ModelSource("cut", broken, lambda: replace(OTHER, name="cut", model_hash="c" * 64)),
        ModelSource("xl", broken, refused),
    ])
    app = create_app(models, start=False)
    app.test_client_class = CheckedClient
    assert service_of(app).load()
    return app


@pytest.fixture
def client(app: Flask) -> Any:
    return app.test_client()


def test_every_model_is_listed_with_what_it_can(client: Any) -> None:
    found = client.get("/options").get_json()
    assert [(one["name"], one["kind"], one["loaded"]) for one in found["models"]] == [
        ("drawing", "faces", True), ("Other", "stable-diffusion", False), ("cut", "stable-diffusion", False)]
    assert found["models"][1]["lacks"] == sorted(LACKS) and found["models"][0]["lacks"] == []
    assert found["failed_models"] == [{"name": "xl", "failure": "y.safetensors is a Stable Diffusion XL model"}]
    assert found["fields"]["model"] == {**found["fields"]["model"], "default": "drawing",
                                        "choices": ["drawing", "Other", "cut"]}
    assert "attributes" in found["fields"] and found["attributes"]


def test_what_a_model_lacks_is_absent_from_its_options(client: Any) -> None:
    found = client.get("/options?model=other").get_json()
    assert not {"attributes", "balance", "candidates"} & set(found["fields"])
    assert found["attributes"] == [] and found["few_steps"] == {} and found["step_curve"] == []
    assert found["samplers"] == ["Brush"] and found["fields"]["guidance_scale"]["default"] == 7.5
    told = problem(client.get("/options?model=third"), 404)
    assert "there are drawing, Other, cut, xl" in told["detail"]


def test_a_request_names_its_model(app: Flask, client: Any, drawn: dict[str, DrawingEngine]) -> None:
    first, other = post(client, prompt="a"), post(client, prompt="b", model="OTHER")
    work(app)
    assert first["parameters"]["model"] == "drawing" and other["parameters"]["model"] == "Other"
    assert other["parameters"]["sampler"] == "Brush" and other["parameters"]["guidance_scale"] == 7.5
    assert [request.prompt for request in drawn["Other"].begun] == ["b"]
    assert client.get(f"/jobs/{other['job_id']}/").get_json()["status"] == "succeeded"
    told = problem(client.post("/text_to_image", json={"prompt": "a", "model": "third"}), 422)
    assert told["errors"] == [{"pointer": "#/model", "message": 'must be one of drawing, Other, cut, xl; got "third"'}]


@pytest.mark.parametrize("field, value", [("attributes", {"Smiling": 1}), ("candidates", 8), ("balance", True)])
def test_what_a_model_lacks_is_refused(client: Any, field: str, value: Any) -> None:
    asked = {"prompt": "a", "n_images": 1, "model": "Other", field: value}
    told = problem(client.post("/text_to_image", json=asked), 422)
    assert told["errors"][0]["pointer"] == f"#/{field}" and "the model Other can follow" in told["detail"]
    assert client.post("/text_to_image", json={**asked, "model": "drawing"}).status_code == 200


def test_words_are_judged_only_by_the_model_that_learned_them(client: Any) -> None:
    assert post(client, prompt="a zebra")["warnings"]
    assert post(client, prompt="a zebra", model="Other")["warnings"] == []


def test_loading_is_a_visible_state(app: Flask, client: Any, drawn: dict[str, DrawingEngine]) -> None:
    seen: dict[str, Any] = {}
    models = service_of(app).models

    def load() -> Engine:
        seen["ready"] = client.get("/ready").get_json()["loading"]
        seen["options"] = client.get("/options").get_json()["loading"]
        seen["job"] = client.get(f"/jobs/{job_id}/").get_json()
        return drawn["Other"]

    models._sources["Other"] = ModelSource("Other", load, lambda: OTHER)
    job_id = post(client, model="Other", n_inf_steps=3)["job_id"]
    tick(app)
    assert (seen["ready"], seen["options"], seen["job"]["loading"], seen["job"]["status"]) == (
        "Other", "Other", "Other", "running")
    assert "loading" not in client.get(f"/jobs/{job_id}/").get_json()
    assert "loading" not in client.get("/ready").get_json()
    work(app)


def test_a_broken_file_leaves_the_server_serving(app: Flask, client: Any) -> None:
    doomed = post(client, model="cut")["job_id"]
    fine = post(client)["job_id"]
    work(app)
    answer = client.get(f"/jobs/{doomed}/").get_json()
    assert answer["status"] == "failed"
    assert answer["error"]["message"] == "The model cut could not be loaded: x.ckpt is cut off: copy it again"
    assert client.get(f"/jobs/{fine}/").get_json()["status"] == "succeeded"
    assert client.get("/ready").get_json()["state"] == "READY"
    assert client.get("/options").get_json()["models"][2]["failure"] == "x.ckpt is cut off: copy it again"


def test_refinement_keeps_the_picture_before(app: Flask, client: Any, drawn: dict[str, DrawingEngine]) -> None:
    asked = post(client, prompt="a smiling woman", n_images=2,
                 refine={"model": "other", "strength": 0.5, "prompt": "sharp"})
    assert asked["parameters"]["refine"] == {"model": "Other", "strength": 0.5, "prompt": "sharp"}
    work(app)
    answer = client.get(f"/jobs/{asked['job_id']}/").get_json()
    assert answer["status"] == "succeeded" and answer["progress"] == 1.0
    for picture in answer["response"]:
        before, after = client.get(picture["before"]), client.get(picture["url"])
        assert before.status_code == after.status_code == 200 and before.data != after.data
        assert Image.open(io.BytesIO(before.data)).text["parameters"]
    assert drawn["Other"].begun[0].prompt == "sharp"
    events = client.get(f"/jobs/{asked['job_id']}/events")
    assert events.status_code == 200 and '"before"' in events.text


def test_the_only_model_refines_what_it_generated() -> None:
    app = make_app(DrawingEngine())
    job_id = run(app, prompt="a smiling woman", refine={})
    assert app.test_client().get(f"/jobs/{job_id}/").get_json()["response"][0]["before"]


@pytest.mark.parametrize("refine, pointer", [
    ({"model": "third"}, "#/refine/model"), ({"strength": 0}, "#/refine/strength"),
    ({"strength": 2}, "#/refine/strength"),
    ({"what": 1}, "#/refine/what"), ("Other", "#/refine"),
])
def test_a_wrong_refinement_is_refused(client: Any, refine: Any, pointer: str) -> None:
    told = problem(client.post("/text_to_image", json={"prompt": "a", "refine": refine}), 422)
    assert told["errors"][0]["pointer"] == pointer


def test_the_safety_checkers_verdict_is_a_warning(app: Flask, client: Any, drawn: dict[str, DrawingEngine]) -> None:
    about = drawn["Other"]._about
    drawn["Other"]._about = lambda run, seed: {**about(run, seed), "unsafe": seed == 8}  # type: ignore[method-assign]
    job_id = post(client, model="Other", seed=7, n_images=2)["job_id"]
    work(app)
    answer = client.get(f"/jobs/{job_id}/").get_json()
    assert [one["unsafe"] for one in answer["response"]] == [False, True]
    assert answer["warnings"] == ["Image 1 may not be safe to show, says the safety checker of the model."]


def test_a_picture_is_verified_by_the_model_that_drew_it(app: Flask, client: Any) -> None:
    job_id = post(client, model="Other", seed=7, n_images=1)["job_id"]
    work(app)
    png = client.get(f"/jobs/{job_id}/images/0.png").data
    assert client.post("/inspect", data=png, content_type="image/png").get_json()["model_matches"]
    answer = client.post("/verify", data=png, content_type="image/png")
    assert answer.status_code == 200 and answer.get_json()["parameters"]["model"] == "Other"
    work(app)
    verdict = client.get(f"/jobs/{answer.get_json()['job_id']}/verdict").get_json()
    assert verdict["verdict"] == "exact"


def test_encode_uses_the_first_model(app: Flask) -> None:
    service = service_of(app)
    future = service.call(lambda engine: engine.encode(np.zeros((32, 32, 3), np.uint8)))
    tick(app)
    assert base64.b64encode(future.result(0).tobytes())
