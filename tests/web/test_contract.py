"""Does the server do what its OpenAPI document says, and does the document say all that the server does?

Schemathesis reads the document from the live server (the real web server on loopback, a generated image stand-in behind
it) and attacks every operation: boundary values, random valid and invalid requests, undeclared methods, missing keys,
and chains such as generate, list, fetch, delete, fetch again. All of its checks are on. The promises that must never
change are written out here as literals, because a document that is made from the code would change with it.

https://schemathesis.readthedocs.io. The stand-in does not generate well; what images must be is asked elsewhere.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import strategies as st
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from PIL import Image
from schemathesis import engine as attacker
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig

from api import create_app
from core.imaging.png_metadata import encode_png
from core.imaging.watermark import VERSION
from core.text.lexicon import ATTRIBUTES
from core.web.requests import ALIASES
from tests.support.counting import quick_folder
from tests.support.drawing import LATENT_SHAPE, DrawingEngine, DrawingInfo, draw
from tests.support.loopback import PATIENCE_S, Answer, Live, serving

KEY = {"Authorization": "Bearer open sesame"}
NUM_EXAMPLES = 15  # random requests for each operation, valid and invalid; boundary values come on top
PROBLEM = {"$ref": "#/components/schemas/ProblemAnswer"}

ROUTES = {  # all that is promised, as OpenAPI writes paths
    ("POST", "/text_to_image"), ("GET", "/jobs/"), ("GET", "/jobs/{job_id}/"), ("DELETE", "/jobs/{job_id}/"),
    ("POST", "/jobs/{job_id}/cancel"), ("GET", "/jobs/{job_id}/events"), ("GET", "/jobs/{job_id}/images/{index}.png"),
    ("GET", "/jobs/{job_id}/images/{index}.webp"), ("GET", "/jobs/{job_id}/collage.png"),
    ("GET", "/jobs/{job_id}/archive.zip"), ("GET", "/jobs/{job_id}/animation.webp"),
    ("GET", "/jobs/{job_id}/animation.gif"), ("GET", "/jobs/{job_id}/latents/{index}"),
    ("GET", "/jobs/{job_id}/steps"), ("DELETE", "/jobs/{job_id}/images/{index}"),
    ("POST", "/jobs/{job_id}/images/{index}/restore"),
    ("PUT", "/images/{job_id}/{index}/favourite"), ("DELETE", "/images/{job_id}/{index}/favourite"),
    ("POST", "/encode"), ("POST", "/decode"), ("POST", "/inspect"), ("POST", "/verify"),
    ("GET", "/jobs/{job_id}/verdict"),
    ("POST", "/prompt/analyze"), ("GET", "/prompt/surprise"), ("GET", "/vocabulary"), ("GET", "/options"),
    ("GET", "/speed"), ("GET", "/health"), ("GET", "/ready"),
    ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/docs"),
    ("GET", "/"), ("GET", "/static/{name}"), ("GET", "/session"),
    ("POST", "/v1/images/generations"), ("POST", "/v1/images/edits"), ("GET", "/v1/models"),
    *(("POST", f"/sdapi/v1/{name}") for name in ("txt2img", "img2img", "interrupt", "png-info", "options")),
    *(("GET", f"/sdapi/v1/{name}") for name in (
        "options", "samplers", "schedulers", "sd-models", "progress", "memory", "embeddings", "loras")),
}
FOREIGN = ("/sdapi/", "/v1/")  # errors there are those of another server, see test_sdapi.py and test_openai_images.py


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """Locked, so that the checks of the key have something to check."""
    with serving(api_key="open sesame") as found:
        yield found


def ask(live: Live, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    return live.ask(method, path, body, KEY | headers)


@pytest.fixture(scope="module")
def document(live: Live) -> dict[str, Any]:
    """What the live server hands out."""
    found: dict[str, Any] = ask(live, "GET", "/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, entry in methods.items():
            yield method.upper(), path, entry


# ---- all of Schemathesis ---------------------------------------------------------------------------------------------


@dataclass(repr=False)
class Attack:
    """What one run of Schemathesis found."""

    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    phases: dict[str, str] = field(default_factory=dict)
    checks: set[str] = field(default_factory=set)
    statuses: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    refusals: list[tuple[str, Any]] = field(default_factory=list)

    def listen(self, event: attacker.events.EngineEvent) -> None:
        if isinstance(event, attacker.events.ScenarioFinished):
            self._read(event.recorder)
        elif isinstance(event, attacker.events.PhaseFinished):
            self.phases[event.phase.name.value] = event.status.value
        elif isinstance(event, attacker.events.NonFatalError):
            self.trouble.append(f"{event.label}: {event.value!r}")
        elif isinstance(event, (attacker.events.FatalError, attacker.events.SchemaAnalysisWarnings)):
            self.trouble.append(repr(event))

    def _read(self, recorder: attacker.events.ScenarioRecorder) -> None:
        for case_id, exchange in recorder.interactions.items():
            label, answer = recorder.cases[case_id].value.operation.label, exchange.response
            if answer is None:
                self.trouble.append(f"{label}: no answer")
                continue
            self.statuses[label][answer.status_code] += 1
            if answer.status_code >= 400:
                self.refusals.append((label, answer))
        for case_id, nodes in recorder.checks.items():
            label = recorder.cases[case_id].value.operation.label
            for node in nodes:
                self.checks.add(node.name)
                if node.failure_info is not None:
                    failure = node.failure_info.failure
                    text = f"{failure.title}\n{failure.message}\n{node.failure_info.code_sample}"
                    answer = recorder.interactions[case_id].response
                    if answer is not None:
                        text += f"\n{answer.status_code} {answer.content[:300]!r}"
                    self.failures.setdefault((label, node.name, failure.title), text[:3000])


def samples(make: Callable[[int], bytes]) -> st.SearchStrategy[bytes]:
    return st.integers(0, 2**32 - 1).map(make)


def some_latent(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(LATENT_SHAPE).astype("<f4")


def some_npy(seed: int) -> bytes:
    file = io.BytesIO()
    np.save(file, some_latent(seed))
    return file.getvalue()


PARAMETERS = {"prompt": "a face", "negative_prompt": "", "n_images": 1, "n_inf_steps": 2, "sampler": "Pencil",
           "guidance_scale": 3.0}


def some_picture(kind: str) -> Callable[[int], bytes]:
    """PNGs carry generation parameters, or none of them could be verified."""

    def make(seed: int) -> bytes:
        pixels = draw("a face", seed, 32 + seed % 9, 1.0)
        if kind == "PNG":
            return encode_png(pixels, {**PARAMETERS, "seed": seed}, DrawingInfo(), VERSION)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()

    return make


def teach_formats() -> None:
    """What a JSON Schema cannot say: how to make bytes that are an image, and a latent whose numbers are finite."""
    schemathesis.openapi.format("latent", samples(lambda n: some_latent(n).tobytes()).map(as_text))
    for name in ("image", "mask"):
        schemathesis.openapi.format(name, samples(some_picture("PNG")).map(as_text))
    schemathesis.openapi.format("binary", samples(some_picture("PNG")))  # in forms
    for kind in ("PNG", "JPEG", "WEBP"):
        schemathesis.openapi.media_type(f"image/{kind.lower()}", samples(some_picture(kind)))
    schemathesis.openapi.media_type("application/x-npy", samples(some_npy))


def as_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def configuration() -> SchemathesisConfig:
    """Every phase and every check; the same requests each time, but for the ids that the server itself generates."""
    return SchemathesisConfig.from_dict({
        "seed": 3,
        "headers": KEY,
        "request-timeout": PATIENCE_S,
        "max-redirects": 0,  # the 303 of /session is the answer, not the page behind it
        "continue-on-failure": True,
        "generation": {"max-examples": NUM_EXAMPLES, "deterministic": True, "database": "none"},
        "phases": {"coverage": {"generate-duplicate-query-parameters": True}, "examples": {"fill-missing": True}},
        "operations": [
            {"include-path-regex": "^/(sdapi|v1)/", "generation": {"max-examples": 5}},
            # in a form a number is a text like any other; what a form may not hold is in test_openai_images.py
            {"include-path": "/v1/images/edits", "checks": {"negative_data_rejection": {"enabled": False}}},
        ],
        "dictionaries": {"files": {"values": ["app.js", "style.css", "icon.svg"]}, "keys": {"values": ["open sesame"]}},
        "parameters": {
            "path.name": {"dictionary": "files", "probability": 0.5},
            "query.key": {"dictionary": "keys", "probability": 0.5},
        },
        "checks": {
            "max_response_time": PATIENCE_S / 2,
            # a deleted job is 410 for ever, not 404; and a body can be too large before anything else is wrong with it
            "positive_data_acceptance": {"expected-statuses": ["2xx", "3xx", "401", "404", "409", "410", "429"]},
            "negative_data_rejection": {"expected-statuses": [
                "400", "401", "404", "405", "409", "410", "413", "415", "422", "429"]},
        },
    })


@pytest.fixture(scope="module")
def attack(live: Live) -> Attack:
    teach_formats()
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json", config=configuration(), headers=KEY)
    sent: set[str] = set()
    png = {"image": as_text(some_picture("PNG")(1))}
    verified = ask(live, "POST", "/verify", png).json()["job_id"]
    kept = ask(live, "POST", "/text_to_image", {"prompt": "a face", "n_images": 1, "n_inf_steps": 2}).json()["job_id"]

    @schemathesis.hook
    def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
        """Mend what no JSON Schema can say: a key is used once, numbers of images, latents and candidates fit, an
        interval is in order, only a verification has a verdict, and only an image that is there can be a favourite."""
        if case.operation.path.endswith("/favourite") and len(sent) % 2:
            case.path_parameters |= {"job_id": kept, "index": 0}
        if case.operation.path.endswith("/verdict") and len(sent) % 2:
            case.path_parameters["job_id"] = verified
        wanted = case.meta is None or case.meta.generation.mode.is_positive
        if wanted and case.operation.path == "/v1/images/edits" and isinstance(case.body, dict):
            case.body.pop("mask", None)  # it has to be as large as the image, and transparent somewhere
        key, body = case.headers.get("Idempotency-Key", ""), case.body
        if key in sent and re.fullmatch("[!-~]{1,200}", key):
            case.headers["Idempotency-Key"] = f"fresh-{len(sent)}"
        sent.add(case.headers.get("Idempotency-Key", ""))
        if isinstance(body, dict) and isinstance(body.get("guidance_interval"), list):
            interval = body["guidance_interval"]
            if len(interval) == 2 and all(type(end) in (int, float) for end in interval):
                body["guidance_interval"] = sorted(interval)
        if isinstance(body, dict) and isinstance(body.get("latent"), list):
            for name in [name for name in ("n_images", "num_images") if name in body] or ["n_images"]:
                if type(body.get(name, 4)) is int:
                    body[name] = min(8, max(1, len(body["latent"])))
                    body.pop("candidates", None)
        if isinstance(body, dict) and type(body.get("candidates")) is int and 0 < body["candidates"] <= 32:
            many = next((name for name in ("n_images", "num_images", "keep") if name in body), "n_images")
            if type(body.get(many, 4)) is int and 0 < body.get(many, 4) <= 8:
                body["candidates"] = max(body["candidates"], body.get(many, 4))

    found = Attack()
    for event in attacker.from_schema(schema).execute():
        found.listen(event)
    return found


def test_no_check_of_schemathesis_fails(attack: Attack) -> None:
    assert attack.trouble == []
    assert not attack.failures, "\n\n".join(
        f"{label} [{check}]: {text}" for (label, check, _), text in attack.failures.items()
    )


def test_every_phase_and_every_check_did_run(attack: Attack) -> None:
    asked = {"examples", "coverage", "fuzzing", "stateful"}
    assert asked == {name for name, status in attack.phases.items() if name in asked and status == "success"}
    assert set(CHECKS.get_all_names()) | {"max_response_time"} == attack.checks


def test_every_operation_was_reached(attack: Attack, document: dict[str, Any]) -> None:
    """An attack that is turned away by the request checks proves nothing."""
    labels = {f"{method} {path}" for method, path, _ in operations(document)}
    labels.remove("GET /openapi.json")  # read, but left out of the attack: where the document comes from
    assert set(attack.statuses) == labels
    unheard = {label for label in labels if not any(status < 400 for status in attack.statuses[label])}
    assert not unheard, {label: dict(attack.statuses[label]) for label in unheard}
    for status in (200, 204, 303, 304, 400, 401, 404, 405, 410, 415, 422):
        assert any(status in counts for counts in attack.statuses.values()), status


def test_every_refusal_under_attack_is_a_problem(attack: Attack) -> None:
    assert len(attack.refusals) > 300
    for label, answer in attack.refusals:
        if label.split()[1].startswith(FOREIGN):
            assert answer.headers["content-type"] == ["application/json"], (label, answer.headers)
            assert "Traceback" not in answer.content.decode() and json.loads(answer.content)["error"], label
            continue
        assert answer.headers["content-type"] == ["application/problem+json"], (label, answer.headers)
        body = json.loads(answer.content)
        assert (body["type"], body["status"]) == ("about:blank", answer.status_code), (label, body)
        assert body["title"] == HTTPStatus(answer.status_code).phrase, (label, body)
        assert body["detail"] and body["detail"] == body["error"], (label, body)
        assert "Traceback" not in body["detail"] and "<" not in body["title"], (label, body)


def test_the_server_serves_after_the_attack(attack: Attack, live: Live) -> None:
    assert live.ask("GET", "/health").json() == {"status": "ok"}
    assert live.draw(KEY)["status"] == "succeeded"
    assert ask(live, "GET", "/jobs/?status=failed").json()["jobs"] == [], "what was accepted was drawn"


# ---- the document ----------------------------------------------------------------------------------------------------


def test_every_route_is_in_the_document_and_nothing_else(live: Live, document: dict[str, Any]) -> None:
    served = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in live.app.url_map.iter_rules()
        for method in rule.methods or set()
    }
    documented = {(method, path) for method, path, _ in operations(document)}
    assert {entry for entry in served if entry[0] not in ("HEAD", "OPTIONS")} == documented == ROUTES
    assert all(("HEAD", path) in served for method, path in documented if method == "GET")


@pytest.mark.parametrize("kind", ["loading", "ready", "locked"])
def test_the_document_is_openapi_3_1(kind: str) -> None:
    """At every stage of the server's life, with and without a key."""
    with quick_folder() as folder:
        app = create_app(DrawingEngine, start=False, api_key="x" if kind == "locked" else None, data_dir=folder)
        service = app.extensions["service"]
        try:
            if kind != "loading":
                assert service.load()
            answer = app.test_client().get("/openapi.json", headers={"X-API-Key": "x"})
            assert answer.status_code == 200 and answer.content_type == "application/json"
            document = answer.get_json()
        finally:
            service.close()
    assert document["openapi"].startswith("3.1.")
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []
    names = [entry["operationId"] for _, _, entry in operations(document)]
    assert len(set(names)) == len(names)
    model = document["components"]["schemas"]["TextToImage"]["properties"]["model"]
    assert ("enum" in json.dumps(model)) == (kind != "loading"), "a loaded model says what it is called"
    assert bool(document["security"]) == (kind == "locked")


def test_every_documented_error_is_a_problem(document: dict[str, Any]) -> None:
    problem = document["components"]["schemas"]["ProblemAnswer"]
    assert {"type", "title", "status", "detail", "error"} <= set(problem["required"])
    assert set(problem["properties"]["errors"]["items"]) and "errors" not in problem["required"]
    for method, path, entry in operations(document):
        refused = {status: answer for status, answer in entry["responses"].items() if int(status) >= 400}
        assert {"401", "403", "500"} <= set(refused), (method, path)
        if "requestBody" in entry:
            invalid = "400" if path.startswith("/v1/") else "422"
            assert {"400", "413", "415", invalid} <= set(refused), (method, path)
        if "{job_id}" in path:
            assert {"404", "410"} <= set(refused), (method, path)
        for status, answer in refused.items():
            if not path.startswith(FOREIGN):
                assert answer["content"] == {"application/problem+json": {"schema": PROBLEM}}, (method, path, status)
            assert answer["description"], (method, path, status)


def test_everything_is_described(document: dict[str, Any]) -> None:
    for method, path, entry in operations(document):
        assert entry["summary"] and entry["description"] and entry["tags"], (method, path)
        assert all(one["description"] for one in entry.get("parameters", ()) if one["in"] != "path"), (method, path)
    schemas = document["components"]["schemas"]
    assert all(schema["description"] for schema in schemas.values())
    fields = schemas["TextToImage"]["properties"]
    assert all(one["description"] for one in fields.values())
    for alias, name in ALIASES.items():
        assert f"`{alias}` for `{name}`" in schemas["TextToImage"]["description"]


def test_the_key_is_asked_for_where_the_document_says_so(live: Live, document: dict[str, Any]) -> None:
    public = {(method, path) for method, path, entry in operations(document) if entry.get("security") == []}
    assert public == {("GET", "/"), ("GET", "/static/{name}"), ("GET", "/session"), ("GET", "/health")}
    for method, path, _ in operations(document):
        answer = live.ask(method, path.format(job_id="a-" + "0" * 32, index=0, name="app.js"))
        assert (answer.status == 401) == ((method, path) not in public or path == "/session"), (method, path)


def examples_in(part: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every example anywhere in a document, with the schema that it is an example of."""
    if isinstance(part, dict):
        if isinstance(part.get("examples"), list):
            yield from ((part, example) for example in part["examples"])
        if "schema" in part:
            found = part.get("examples", {}).values() if isinstance(part.get("examples"), dict) else ()
            yield from ((part["schema"], one["value"]) for one in found)
        if "example" in part:
            yield part.get("schema", part), part["example"]
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from examples_in(inner)


def test_examples_are_valid_and_work(live: Live, document: dict[str, Any]) -> None:
    found = list(examples_in(document))
    assert len(found) >= 3
    for schema, example in found:
        OAS31Validator({**schema, "components": document["components"]}).validate(example)
    sent = 0
    for method, path, entry in operations(document):
        for media, content in entry.get("requestBody", {}).get("content", {}).items():
            name = content["schema"].get("$ref", "").rsplit("/", 1)[-1]
            for _, example in examples_in([content, document["components"]["schemas"].get(name)]):
                assert media == "application/json"
                answer = ask(live, method, path, example)
                assert answer.status == 200, (path, example, answer.body)
                sent += 1
    assert sent >= 3


# ---- what must never change ------------------------------------------------------------------------------------------

PROMISED_FIELDS: dict[str, tuple[str, Any, Any, Any]] = {  # type, default, and from where to where
    "prompt": ("string", "required", 0, 500),
    "n_images": ("integer", 4, 1, 8),
    "n_inf_steps": ("integer", 500, 1, 1000),
    "stream_freq": ("integer", 50, 1, 1000),
    "start_timestep": ("number", 0, 0, 1),
    "seed": ("integer", None, 0, 2**53 - 1),
    "guidance_scale": ("number", None, 0, 20),
    "negative_prompt": ("string", "", 0, 500),
    "sampler": ("string", None, None, None),
    "strength": ("number", None, 0, 1),
    "variation_strength": ("number", 0, 0, 1),
    "variation_seed": ("integer", None, 0, 2**53 - 1),
    "model": ("string", None, None, None),
}


def test_the_promised_request_in_the_document(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["TextToImage"]
    found = {}
    for name in PROMISED_FIELDS:
        entry = schema["properties"][name]
        kind = entry if "type" in entry else next(one for one in entry["anyOf"] if one["type"] != "null")
        default = "required" if name in schema["required"] else entry["default"]
        low = kind.get("minimum", 0 if "maxLength" in kind else None)
        found[name] = (kind["type"], default, low, kind.get("maximum", kind.get("maxLength")))
    assert found == PROMISED_FIELDS
    others = {"latent", "init_image", "mask", "interpolate_to", "attributes", "candidates", "balance",
              "attribute_balancing", "preview_every_s", "guidance_interval", "refine"}
    assert set(schema["properties"]) == {*PROMISED_FIELDS, *others}
    assert schema["required"] == ["prompt"] and schema["additionalProperties"] is False


def test_post_text_to_image_literally(live: Live) -> None:
    """The bytes that an existing client sends, and what it reads from the answer."""
    request = (
        b'{"prompt": "a smiling woman", "n_images": 2, "n_inf_steps": 50, "stream_freq": 10, "latent": null, '
        b'"start_timestep": 0, "seed": 1234, "guidance_scale": 2.5, "negative_prompt": "beard", "sampler": "Pencil", '
        b'"model": "drawing"}'
    )
    answer = live.ask("POST", "/text_to_image", request, KEY | {"Content-Type": "application/json"})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert set(body) == {"job_id", "status", "parameters", "warnings"}
    assert re.fullmatch("a-smiling-woman-[0-9a-f]{32}", body["job_id"])
    assert answer.headers["Location"] == f"/jobs/{body['job_id']}/"
    assert body["status"] in ("queued", "running", "succeeded") and body["warnings"] == []
    assert body["parameters"] == {
        "prompt": "a smiling woman", "n_images": 2, "n_inf_steps": 50, "stream_freq": 10, "start_timestep": 0,
        "seed": 1234, "guidance_scale": 2.5, "negative_prompt": "beard", "sampler": "Pencil", "model": "drawing",
        "num_latents": 0,
    }


def test_get_job_literally(live: Live) -> None:
    """Field names and types as a client that decodes strictly expects them, `true` being no integer for it."""
    job_id = live.draw(KEY, prompt="a smiling woman", n_images=2, seed=7)["job_id"]
    answer = ask(live, "GET", f"/jobs/{job_id}/")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert {name: type(value) for name, value in body.items()} == {
        "finished": bool, "response": list, "job_id": str, "status": str, "progress": float,
        "queue_position": type(None), "eta_s": float, "created_at": str, "started_at": str, "finished_at": str,
        "parameters": dict, "warnings": list, "error": type(None), "last_event_id": int,
    }
    assert body["finished"] is True and body["status"] == "succeeded" and body["progress"] == 1.0
    for index, entry in enumerate(body["response"]):
        picture, latent = (base64.b64decode(entry.pop(name), validate=True) for name in ("img", "latent"))
        judged = {name: entry.pop(name) for name in (
            "attributes", "agreement", "adherence", "prompt_alignment", "evaluations", "nearest")}
        assert list(judged["attributes"]) == list(ATTRIBUTES)
        assert all(0 <= share <= 1 for share in judged["attributes"].values())
        assert judged["adherence"] == pytest.approx(np.mean(list(judged["agreement"].values())))
        assert type(judged["evaluations"]) is int and judged["evaluations"] > 0
        assert entry == {
            "t": 500, "total_t": 500, "index": index, "seed": 7 + index,
            "url": f"/jobs/{job_id}/images/{index}.png",
        }
        assert type(entry["t"]) is int and type(entry["total_t"]) is int
        assert Image.open(io.BytesIO(picture)).format == "PNG"
        assert len(latent) == 4 * np.prod(LATENT_SHAPE)
        assert ask(live, "GET", entry["url"]).body == picture
    assert len(body["response"]) == 2


def test_a_job_without_an_update_is_not_finished_and_empty() -> None:
    """Also pinned: `response` is `[]`, not null, before the first update."""
    with quick_folder() as folder:
        app = create_app(DrawingEngine, start=False, data_dir=folder)
        service = app.extensions["service"]
        try:
            assert service.load()
            client = app.test_client()
            job_id = client.post("/text_to_image", json={"prompt": ""}).get_json()["job_id"]
            body = client.get(f"/jobs/{job_id}/").get_json()
        finally:
            service.close()
    assert (body["finished"], body["response"], body["status"]) == (False, [], "queued")
