"""Do the better names stand beside the older ones, in requests, answers and the document?"""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from core.web.aliases import BETTER_NAMES, both_names
from tests.support.asking import post, problem, run

ROOT = Path(__file__).resolve().parents[2]


def test_a_request_may_use_either_name(client: FlaskClient) -> None:
    for name in ("balance", "attribute_balancing"):
        parameters = post(client, prompt="a person", n_images=2, **{name: True})["parameters"]
        assert parameters["balance"] is parameters["attribute_balancing"] is True
    both = post(client, prompt="a person", n_images=2, attribute_balancing=True, balance=True)["parameters"]
    assert both["balance"] is True
    assert "attribute_balancing" not in post(client, prompt="a person", attribute_balancing=False)["parameters"]


@pytest.mark.parametrize("first", ["balance", "attribute_balancing"])
@pytest.mark.parametrize(("one", "other"), [(True, False), (False, True), (True, 1)])
def test_two_names_that_differ_are_refused(client: FlaskClient, first: str, one: Any, other: Any) -> None:
    """Whatever their order; true is not 1, as anywhere in JSON."""
    second = next(name for name in ("balance", "attribute_balancing") if name != first)
    answer = client.post("/text_to_image", json={"prompt": "a person", first: one, second: other})
    detail = problem(answer, 400)["detail"]
    assert "balance" in detail.replace("attribute_balancing", "") and "attribute_balancing" in detail
    assert "Send only attribute_balancing." in detail


def test_what_is_wrong_is_named_as_it_was_sent(client: FlaskClient) -> None:
    answer = client.post("/text_to_image", json={"prompt": "a person", "attribute_balancing": "yes"})
    assert problem(answer, 422)["errors"] == [
        {"pointer": "#/attribute_balancing", "message": 'must be a boolean; got "yes"'}]


def test_either_name_is_the_same_request(client: FlaskClient) -> None:
    """A client that learns the better name may repeat its request under the same key."""
    key = {"Idempotency-Key": "once"}
    older, better = (
        client.post("/text_to_image", json={"prompt": "a person", "seed": 1, name: True}, headers=key).get_json()
        for name in ("balance", "attribute_balancing")
    )
    assert older["job_id"] == better["job_id"]


def objects(part: Any) -> list[dict[str, Any]]:
    """Every object in a JSON value."""
    inner = part if isinstance(part, list) else part.values() if isinstance(part, dict) else ()
    return [part] * isinstance(part, dict) + [found for one in inner for found in objects(one)]


def test_every_answer_carries_both_names(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=2, n_inf_steps=4, seed=3, balance=True)
    stream = client.get(f"/jobs/{job_id}/events?previews=none").get_data(as_text=True)
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    with zipfile.ZipFile(BytesIO(client.get(f"/jobs/{job_id}/archive.zip").data)) as archive:
        about = json.loads(archive.read("job.json"))
    answers = [client.get(f"/jobs/{job_id}/").get_json(), client.get("/jobs/").get_json(), events, about,
               client.get("/options").get_json(), client.get("/speed").get_json(),
               client.post("/prompt/analyze", json={"prompt": "a man, no hat"}).get_json()]
    found = objects(answers)
    for older, better in BETTER_NAMES.items():
        with_older = [one for one in found if older in one]
        assert with_older, f"no answer has {older}"
        assert all(better in one and one[older] == one[better] for one in with_older), older
        alone = [one for one in found if better in one and older not in one]
        assert all(one[better] == older for one in alone), better  # `aliases` of /options says so


def test_the_document_calls_the_older_names_deprecated(client: FlaskClient) -> None:
    schemas = client.get("/openapi.json").get_json()["components"]["schemas"]
    seen = set()
    for name, schema in schemas.items():
        properties = schema.get("properties", {})
        for older in set(properties) & set(BETTER_NAMES):
            better = BETTER_NAMES[older]
            seen.add(older)
            assert properties[older]["deprecated"] is True and f"`{better}`" in properties[older]["description"], name
            assert not properties[better].get("deprecated") and "older name" not in properties[better]["description"]
            assert (older in schema.get("required", ())) == (better in schema.get("required", ())), name
            bare = [{key: value for key, value in properties[one].items() if key not in ("title", "description",
                                                                                           "deprecated")}
                    for one in (older, better)]
            assert bare[0] == bare[1], (name, older)
    assert seen == set(BETTER_NAMES)
    page = client.get("/docs").get_data(as_text=True)
    assert "deprecated, older name of `prompt_alignment`" in page


def test_no_older_name_is_changed() -> None:
    assert both_names({"heard": "a", "words": []}) == {"heard": "a", "encoded_prompt": "a", "words": []}
    assert both_names({"index": 0}) == {"index": 0}


def test_the_documentation_has_them_all() -> None:
    rows = [line for line in (ROOT / "docs" / "server.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    for older, better in BETTER_NAMES.items():
        assert any(f"`{older}`" in row.split("|")[1] and f"`{better}`" in row.split("|")[2] for row in rows), older
