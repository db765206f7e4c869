"""Is the OpenAPI document true and complete, and do the routes that explain the server tell the truth?

Every answer of the HTTP tests is held against the document (`asking.py`); here the document itself is tested, and
/docs, /options, the routes about prompts, /metrics and the log.
"""

from __future__ import annotations

import json
import logging
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client.parser import text_string_to_metric_families

from api import create_app, describe
from core.imaging.image_io import as_text
from core.text.captions import analyze
from core.text.lexicon import ATTRIBUTES
from core.web.monitoring import JsonFormatter
from core.web.requests import ALIASES
from tests.support.asking import LATENT, document, make_app, operations, post, run, service_of, tick, validator
from tests.support.drawing import HAT, LATENT_SHAPE, STEP_CURVE, DrawingEngine

PICTURE = as_text(np.full((9, 12, 3), 200, np.uint8))
PROMISED = {"prompt", "n_images", "n_inf_steps", "stream_freq", "latent", "start_timestep", "seed", "guidance_scale",
            "negative_prompt", "sampler", "model", "init_image", "strength", "mask", "variation_strength",
            "variation_seed", "interpolate_to", "attributes", "candidates", "balance",
            "attribute_balancing", "guidance_interval", "preview_every_s", "refine"}


# ---- the document ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True])
def test_the_document_is_valid_openapi(loaded: bool) -> None:
    assert list(OpenAPIV31SpecValidator(document(loaded)).iter_errors()) == []
    assert document(loaded)["openapi"].startswith("3.1")


def test_it_is_served_with_an_etag(client: FlaskClient) -> None:
    answer = client.get("/openapi.json")
    assert answer.get_json() == document(True)
    assert client.get("/openapi.json", headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304


def test_every_route_is_in_it(app: Flask) -> None:
    served = {(rule.endpoint, method) for rule in app.url_map.iter_rules()
              for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    told = {(entry["operationId"], method.upper()) for methods in document(True)["paths"].values()
            for method, entry in methods.items()}
    assert served == told and len(served) >= 24


def test_a_route_that_says_nothing_of_itself_is_an_error(app: Flask) -> None:
    app.add_url_rule("/secret", "secret", lambda: "")
    with pytest.raises(LookupError, match="/secret has no @operation"):
        describe(app, None, locked=False)


def test_every_error_has_the_one_shape() -> None:
    """But where clients of another server ask, which read the errors of that one."""
    shapes = {"sd_": ("application/json", "SdError"), "openai_": ("application/json", "OpenAiError"),
              "": ("application/problem+json", "ProblemAnswer")}
    for name, entry in operations(True).items():
        assert {"403", "500"} <= set(entry["responses"]), name
        media, schema = next(shape for start, shape in shapes.items()
                             if name.startswith(start) and name != "openapi_json" or not start)
        for status, answer in entry["responses"].items():
            if status >= "400":
                assert answer["content"] == {media: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}, name


def test_a_key_is_told_where_one_is_needed(engine: DrawingEngine) -> None:
    app = create_app(lambda: engine, start=False, api_key="open sesame")
    locked = app.test_client().get("/openapi.json", headers={"X-API-Key": "open sesame"}).get_json()
    assert {"bearer", "header", "cookie"} == {name for one in locked["security"] for name in one}
    public = [path for path, methods in locked["paths"].items() if all("security" in one for one in methods.values())]
    assert sorted(public) == ["/", "/health", "/session", "/static/{name}"]
    assert document(True)["security"] == []


def schema(name: str, loaded: bool = True) -> dict[str, Any]:
    return document(loaded)["components"]["schemas"][name]


def test_it_says_the_ranges_that_are_checked() -> None:
    asked = schema("TextToImage")
    assert asked["additionalProperties"] is False and asked["required"] == ["prompt"]
    fields = asked["properties"]
    assert set(fields) == PROMISED
    assert (fields["n_images"]["minimum"], fields["n_images"]["maximum"], fields["n_images"]["default"]) == (1, 8, 4)
    assert fields["prompt"]["maxLength"] == fields["negative_prompt"]["maxLength"] == 500
    assert fields["seed"]["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": 2**53 - 1}
    assert fields["sampler"]["anyOf"][0]["enum"] == ["Pencil", "DPM++ 2M", "Sketch"]
    assert fields["latent"]["anyOf"][0]["minLength"] == fields["latent"]["anyOf"][0]["maxLength"] == len(LATENT)
    assert "enum" not in schema("TextToImage", loaded=False)["properties"]["sampler"]["anyOf"][0]
    assert all(f"`{alias}`" in asked["description"] for alias in ALIASES)


@pytest.mark.parametrize(
    ("body", "valid"),
    [({"prompt": ""}, True), ({}, False), ({"prompt": "a\x00"}, False), ({"prompt": "a\nb"}, True),
     ({"prompt": "x" * 501}, False), ({"prompt": "a", "n_images": 9}, False), ({"prompt": "a", "odd": 1}, False),
     ({"prompt": "a", "start_timestep": 0.5}, False), ({"prompt": "a", "start_timestep": 0}, True),
     ({"prompt": "a", "start_timestep": 0.5, "latent": None}, False), ({"prompt": "a", "latent": LATENT}, True),
     ({"prompt": "a", "start_timestep": 0.5, "latent": LATENT}, True), ({"prompt": "a", "latent": "AAAA"}, False),
     ({"prompt": "a", "latent": [LATENT], "n_images": 1}, True), ({"prompt": "a", "latent": []}, False),
     ({"prompt": "a", "mask": None}, True), ({"prompt": "a", "mask": "AAAA"}, False),
     ({"prompt": "a", "strength": 0.5}, False), ({"prompt": "a", "strength": None}, True),
     ({"prompt": "a", "attributes": {}}, True), ({"prompt": "a", "attributes": {"Smiling": -2}}, True),
     ({"prompt": "a", "attributes": {"Smiling": 2.1}}, False), ({"prompt": "a", "attributes": {"Smile": 1}}, False),
     ({"prompt": "a", "attributes": {name: 1 for name in ATTRIBUTES[:9]}}, False),
     ({"prompt": "a", "candidates": 32}, True), ({"prompt": "a", "candidates": 33}, False),
     ({"prompt": "a", "guidance_interval": [0.2, 0.8]}, True), ({"prompt": "a", "guidance_interval": [0.2]}, False),
     ({"prompt": "a", "guidance_interval": [0, 1.1]}, False), ({"prompt": "a", "guidance_interval": 0.5}, False),
     ({"prompt": "a", "candidates": 9, "interpolate_to": {"seed": 1}}, False), ({"prompt": "a", "balance": True}, True),
     ({"prompt": "a", "balance": True, "interpolate_to": {"seed": 1}}, False), ({"prompt": "a", "balance": 1}, False),
     ({"prompt": "a", "attribute_balancing": True, "balance": True}, True),
     ({"prompt": "a", "attribute_balancing": True, "balance": False}, False),
     ({"prompt": "a", "attribute_balancing": True}, True), ({"prompt": "a", "attribute_balancing": 1}, False),
     ({"prompt": "a", "attribute_balancing": True, "interpolate_to": {"seed": 1}}, False),
     ({"prompt": "a", "variation_strength": 0.5}, True),
     ({"prompt": "a", "interpolate_to": {"seed": 1}}, True), ({"prompt": "a", "interpolate_to": {"to": 1}}, False),
     ({"prompt": "a", "interpolate_to": {"seed": 1, "weight": 0.5}}, False),
     ({"prompt": "a", "interpolate_to": {"seed": 1, "weight": 0.5}, "n_images": 1}, True),
     ({"prompt": "a", "interpolate_to": {"seed": 1}, "n_images": 1}, False),
     ({"prompt": "a", "interpolate_to": {"seed": 1}, "n_images": 2, "latent": LATENT}, True),
     ({"prompt": "a", "interpolate_to": {"seed": 1}, "n_images": 2, "latent": [LATENT] * 2}, False),
     ({"prompt": "a", "interpolate_to": {"seed": 1, "latent": LATENT}}, False),
     ({"prompt": "a", "interpolate_to": {"seed": 1}, "variation_strength": 0.5}, False),
     ({"prompt": "a", "init_image": PICTURE}, True), ({"prompt": "a", "init_image": PICTURE, "latent": LATENT}, False),
     ({"prompt": "a", "init_image": PICTURE, "mask": PICTURE, "strength": 1}, True),
     ({"prompt": "a", "init_image": PICTURE, "interpolate_to": {"seed": 1}}, False),
     ({"prompt": "a", "interpolate_to": {}}, False), ({"prompt": "a", "interpolate_to": {"seed": None}}, False),
     ({"prompt": "a", "sampler": "Brush"}, False), ({"prompt": "a", "seed": 2**53}, False)],
)
def test_document_and_server_agree_on_what_is_valid(client: FlaskClient, body: dict[str, Any], valid: bool) -> None:
    assert validator(True, '{"$ref": "#/components/schemas/TextToImage"}').is_valid(body) is valid
    assert (client.post("/text_to_image", json=body).status_code == 200) is valid


def test_its_examples_work(client: FlaskClient) -> None:
    routes = (("/text_to_image", "TextToImage"), ("/prompt/analyze", "AnalyzePrompt"))
    examples = [(path, example) for path, name in routes for example in schema(name)["examples"]]
    assert len(examples) >= 3
    for path, example in examples:
        assert client.post(path, json=example).status_code == 200


class Page(HTMLParser):
    """What a page refers to, and whether it brings anything that the policy forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.forbidden: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open += [tag] if tag not in ("meta", "link", "br") else []
        for name, value in attributes:
            if name in ("href", "src"):
                self.links.add(value or "")
            if name == "id":
                self.ids.add(value or "")
            if name == "style" or name.startswith("on"):
                self.forbidden.append(f"{tag} {name}")
        if tag in ("script", "style"):
            self.forbidden.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_of_the_document_needs_nobody_else(client: FlaskClient) -> None:
    answer = client.get("/docs")
    page = Page()
    page.feed(answer.text)
    assert page.open == [] and page.forbidden == []
    assert {link for link in page.links if not link.startswith("#")} == {
        "static/docs.css", "static/icon.svg", "openapi.json"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert set(operations(True)) <= page.ids
    assert "/jobs/{job_id}/images/{index}.png" in answer.text and "guidance_scale" in answer.text
    assert client.get("/static/docs.css", buffered=True).status_code == 200


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_hold_every_limit_and_default(client: FlaskClient) -> None:
    found = client.get("/options").get_json()
    assert found["fields"]["n_images"] == {
        "type": "integer", "minimum": 1, "maximum": 8, "default": 4, "description": "images in this job"}
    ranges = {name: (field.get("minimum"), field.get("maximum")) for name, field in found["fields"].items()}
    assert ranges == {
        "prompt": (None, None), "n_images": (1, 8), "n_inf_steps": (1, 1000), "stream_freq": (1, 1000),
        "latent": (None, None), "start_timestep": (0, 1), "seed": (0, 2**53 - 1), "guidance_scale": (0, 20),
        "negative_prompt": (None, None), "sampler": (None, None), "model": (None, None), "init_image": (None, None),
        "strength": (0, 1), "mask": (None, None), "variation_strength": (0, 1), "variation_seed": (0, 2**53 - 1),
        "interpolate_to": (None, None), "attributes": (None, None), "candidates": (1, 32), "balance": (None, None),
        "attribute_balancing": (None, None), "guidance_interval": (None, None),
        "preview_every_s": (0.1, 60), "refine": (None, None),
    }
    assert [found["fields"][name]["type"] for name in ("attributes", "balance")] == ["object", "boolean"]
    names = [one["name"] for one in found["attributes"]]
    assert sorted(names) == sorted(ATTRIBUTES) and all(one["label"] and one["group"] for one in found["attributes"])
    slider = next(one for one in found["attributes"] if one["name"] == "Wearing_Hat")
    assert slider == {"name": "Wearing_Hat", "label": "Hat", "group": "Worn", "less": "no hat", "more": "a hat",
                      "response": HAT}
    assert all(one["response"] is None for one in found["attributes"] if one is not slider)
    assert found["fields"]["prompt"]["max_length"] == found["fields"]["negative_prompt"]["max_length"] == 500
    assert found["fields"]["sampler"]["choices"] == found["samplers"] == ["Pencil", "DPM++ 2M", "Sketch"]
    assert found["fields"]["guidance_scale"]["default"] == 3.0
    assert found["fields"]["guidance_scale"]["one_pass"] == [1.0, 6.0]
    assert found["models"][0]["latent_shape"] == list(LATENT_SHAPE)
    assert [tuple(one.values()) for one in found["quality"]] == [
        ("Draft", 16, 0.2, False), ("Fast", 50, 0.05, True), ("Fine", 100, 0.02, False), ("Full", 500, None, False)]
    assert found["few_steps"] == {"Sketch": 4}
    assert found["step_curve"] == list(STEP_CURVE)
    for example in found["examples"]:
        words = client.post("/prompt/analyze", json={"prompt": example}).get_json()
        assert words["attributes"] and words["contradictions"] == words["warnings"] == [], example
        assert {word["status"] for word in words["words"]} <= {"known", "rare"}, example


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_analyze_reads_a_prompt(client: FlaskClient) -> None:
    found = client.post("/prompt/analyze", json={"prompt": "a smiling woman with blond hair"}).get_json()
    assert found["attributes"]["Smiling"] is True and found["attributes"]["Male"] is False
    assert set(found["attributes"]) <= set(ATTRIBUTES)
    assert found["words"][1] == {"text": "smiling", "start": 2, "end": 9, "status": "known", "suggestion": None}
    assert {"attribute": "Smiling", "value": True, "start": 2, "end": 9} in found["claims"]
    assert found["contradictions"] == []
    assert found["heard"] == "a smiling woman with blond hair"
    other = client.post("/prompt/analyze", json={"prompt": "a woman with glasses and no hat"}).get_json()
    assert other["heard"] == "a woman with glasses, glasses" and other["attributes"]["Wearing_Hat"] is False
    strange = client.post("/prompt/analyze", json={"prompt": "a smilling wombat"}).get_json()
    assert {word["text"]: word["status"] for word in strange["words"]}["wombat"] == "unknown"
    assert strange["warnings"] and post(client, prompt="a smilling wombat")["warnings"] == strange["warnings"]
    for body in ({}, {"prompt": "x" * 501}, {"prompt": "\x00"}, {"prompt": 1}, {"prompt": "a", "seed": 1}):
        assert client.post("/prompt/analyze", json=body).status_code == 422


def test_a_model_of_own_captions_is_asked_in_its_own_words(engine: DrawingEngine) -> None:
    """Claims, sliders, what is left open, examples and surprises follow the captions that it was trained on."""
    words = dict.fromkeys(("a", "red", "blue", "big", "circle", "square"), "known")
    own = ["a red circle", "a big blue square"]
    client = make_app(engine, vocabulary=lambda: words, examples=lambda: own).test_client()
    found = client.post("/prompt/analyze", json={"prompt": "a red smiling circle"}).get_json()
    assert not found["attributes"] and not found["claims"] and not found["open"]
    assert [word["status"] for word in found["words"]] == ["known", "known", "unknown", "known"]
    assert len(found["warnings"]) == 1 and '"smiling" will be ignored: the model never read' in found["warnings"][0]
    assert not client.post("/prompt/analyze", json={"prompt": own[1]}).get_json()["warnings"]
    strange = client.post("/prompt/analyze", json={"prompt": "an old man"}).get_json()
    assert "read none of these words" in strange["warnings"][-1]
    options = client.get("/options").get_json()
    assert options["attributes"] == [] and options["examples"] == own
    assert client.get("/vocabulary").get_json()["phrases"] == []
    assert {client.get(f"/prompt/surprise?seed={seed}").get_json()["prompt"] for seed in range(20)} == set(own)
    wishes = post(client, prompt="a red circle", attributes={"Smiling": 1})["warnings"]
    assert any("no words for the slider Smiling" in wish for wish in wishes)
    plain = make_app(engine).test_client()
    assert len(plain.get("/options").get_json()["attributes"]) == len(ATTRIBUTES)


def test_the_vocabulary_is_that_of_the_model(engine: DrawingEngine) -> None:
    app = make_app(engine, vocabulary=lambda: {"a": "known", "wombat": "known", "smiling": "rare"})
    client = app.test_client()
    answer = client.get("/vocabulary")
    found = answer.get_json()
    assert found["words"] == {"a": "known", "wombat": "known", "smiling": "rare"}
    assert found["attributes"] == ["Smiling"]  # of the others nothing can be said in these words
    phrase = found["phrases"][0]
    assert phrase["text"] == "smiling"
    everything = make_app(engine).test_client().get("/vocabulary").get_json()
    assert everything["attributes"] == list(ATTRIBUTES) and len(everything["phrases"]) > 100
    assert analyze(phrase["text"]).attributes[phrase["attribute"]] is phrase["value"]
    assert client.get("/vocabulary", headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    words = client.post("/prompt/analyze", json={"prompt": "a smiling wombat"}).get_json()["words"]
    assert [word["status"] for word in words] == ["known", "rare", "known"]


def test_a_surprise_is_another_one_each_time_unless_seeded(client: FlaskClient) -> None:
    def ask(query: str = "") -> str:
        return client.get(f"/prompt/surprise{query}").get_json()["prompt"]

    assert len({ask() for _ in range(20)}) > 10
    assert ask("?seed=7") == ask("?seed=7") != ask("?seed=8")
    assert analyze(ask("?seed=7")).attributes
    assert client.get("/prompt/surprise").headers["Cache-Control"] == "no-store"
    assert client.get("/prompt/surprise?seed=-1").status_code == 422


# ---- numbers and logs ------------------------------------------------------------------------------------------------


def numbers(client: FlaskClient) -> dict[tuple[str, ...], float]:
    """The metrics -> {(name, label values ...): value}."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_the_metrics_tell_what_happens(app: Flask, client: FlaskClient) -> None:
    run(app, n_images=2, n_inf_steps=3)
    running = post(client, n_images=3)["job_id"]
    tick(app)
    post(client)
    held = client.get(f"/jobs/{running}/events")
    next(held.iter_encoded())
    found = numbers(client)
    assert found["faces_images_drawn_total",] == 2 and found["faces_step_seconds_count",] == 4
    states = {state: found["faces_jobs", state] for state in ("queued", "running", "succeeded", "failed", "cancelled")}
    assert states == {"queued": 1, "running": 1, "succeeded": 1, "failed": 0, "cancelled": 0}
    assert (found["faces_queue_length",], found["faces_running_images",], found["faces_ready",]) == (1, 3, 1)
    assert found["faces_streams_open",] == 1
    assert found["faces_jobs_drawn_total", "succeeded"] == 1 and found["faces_jobs_drawn_total", "failed"] == 0
    assert found["faces_http_requests_total", "POST", "/text_to_image", "200"] == 3
    assert found["faces_http_request_seconds_count", "POST", "/text_to_image"] == 3
    held.close()
    client.get("/no/such/path")
    client.open("/options", method="BREW")
    found = numbers(client)
    assert found["faces_streams_open",] == 0 and found["faces_http_requests_total", "GET", "none", "404"] == 1
    assert found["faces_http_requests_total", "OTHER", "none", "405"] == 1
    assert not any("smiling" in word for key in found for word in key)


def test_each_application_counts_for_itself(app: Flask, client: FlaskClient) -> None:
    run(app)
    assert numbers(make_app(DrawingEngine()).test_client())["faces_images_drawn_total",] == 0
    assert numbers(client)["faces_images_drawn_total",] == 4


def test_the_log_tells_which_job(app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        job_id = run(app)
        client.delete(f"/jobs/{job_id}/")
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    about = [line["message"] for line in lines if line.get("job_id") == job_id]
    assert about == [f"job {job_id} accepted", f"job {job_id} generated", "DELETE /jobs/{job_id}/ 204"]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert service_of(app).state == "READY"


def test_a_log_line_holds_its_exception_on_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.makeLogRecord({"name": "x", "msg": "it %s", "args": ("broke",), "levelname": "ERROR",
                                        "exc_info": (type(error), error, error.__traceback__), "odd": {1}})
    text = JsonFormatter().format(record)
    line = json.loads(text)
    assert "\n" not in text and line["message"] == "it broke" and "ValueError: two\nlines" in line["exception"]
    assert line["odd"] == "{1}"
