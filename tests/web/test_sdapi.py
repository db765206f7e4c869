"""Do programs written for A1111's web UI draw here: its Python client, and requests as that API's tutorials write them?

The real `webuiapi` speaks over a real socket to the real web server, behind it the drawing stand-in. What is in the
OpenAPI document is checked in front of it, answer by answer.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
import webuiapi
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image

from core.imaging.image_io import as_text
from core.web.waiting import MAX_WAITING_REQUESTS
from tests.support.asking import document, make_app, service_of, work
from tests.support.browsing import Gate
from tests.support.drawing import TROUBLE, DrawingEngine
from tests.support.loopback import PATIENCE_S, Live, serving

GREY = Image.new("RGB", (64, 48), (120, 130, 140))
API = "/sdapi/v1"


@pytest.fixture
def live(engine: DrawingEngine) -> Iterator[Live]:
    with serving(engine) as found:
        yield found


@pytest.fixture
def webui(live: Live) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(host="127.0.0.1", port=live.port, sampler="Pencil", steps=4)


def until(look: Any) -> Any:
    """The first true answer of `look`: another thread can only be asked again and again."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


# ---- the Python client -----------------------------------------------------------------------------------------------


def test_webuiapi_draws(webui: webuiapi.WebUIApi, live: Live, engine: DrawingEngine) -> None:
    drawn = webui.txt2img(prompt="a smiling woman", negative_prompt="beard", seed=7, batch_size=2, n_iter=2,
                          cfg_scale=5.0)
    assert [image.size for image in drawn.images] == [(32, 32)] * 4
    assert drawn.info["all_seeds"] == [7, 8, 9, 10] and drawn.info["seed"] == 7
    assert (drawn.info["width"], drawn.info["height"]) == (32, 32)
    assert {"width", "height"} <= set(drawn.info["ignored"]), "512 x 512 is told as what it was not"
    assert drawn.info["infotexts"][0] == drawn.images[0].info["parameters"]
    assert "Seed: 7" in drawn.info["infotexts"][0] and "Negative prompt: beard" in drawn.info["infotexts"][0]
    assert drawn.parameters["prompt"] == "a smiling woman"
    assert [(one.num_images, one.seed, one.guidance_scale, one.sampler) for one in engine.begun] == [
        (2, 7, 5.0, "Pencil"), (2, 9, 5.0, "Pencil")]
    jobs = live.ask("GET", "/jobs/").json()["jobs"]
    assert {job["job_id"] for job in jobs} == set(drawn.info["job_ids"]), "they are jobs like all others"
    picture = live.ask("GET", f"/jobs/{drawn.info['job_ids'][0]}/images/0.png").body
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), np.asarray(drawn.images[0]))
    assert drawn.info["job_ids"][0].startswith("a-smiling-woman-")


def test_webuiapi_changes_a_picture(webui: webuiapi.WebUIApi, engine: DrawingEngine) -> None:
    changed = webui.img2img(images=[GREY], prompt="a smiling woman", denoising_strength=0.4, seed=3)
    asked = engine.begun[-1]
    assert asked.strength == 0.4 and asked.mask is None and asked.init_image.shape == (32, 32, 3)
    assert changed.image.size == (32, 32) and changed.info["denoising_strength"] == 0.4
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (0, 0, 32, 48))
    for invert, left in ((0, True), (1, False)):
        done = webui.img2img(images=[GREY], mask_image=mask, prompt="a woman", denoising_strength=1.0,
                             inpainting_mask_invert=invert, mask_blur=4)
        marked = engine.begun[-1].mask
        assert marked[:, :14].all() == left and marked[:, 18:].any() != left
        assert "mask_blur" in done.info["ignored"]
        kept = np.asarray(done.image)[:, 18:] if left else np.asarray(done.image)[:, :14]
        assert np.abs(kept.astype(int) - GREY.getpixel((0, 0))).max() <= 12, "the rest stays, but for the mark"


def test_webuiapi_reads_what_there_is(webui: webuiapi.WebUIApi) -> None:
    assert webui.util_get_sampler_names() == ["DPM++ 2M", "Pencil", "Sketch"]
    assert webui.util_get_model_names() == ["drawing [dddddddddd]"] == [webui.util_get_current_model()]
    assert webui.util_get_scheduler_names() == ["automatic"]
    webui.util_set_model("drawing")
    assert webui.get_memory()["ram"]["total"] > 0
    assert webui.get_embeddings() == {"loaded": {}, "skipped": {}} and webui.get_loras() == []
    webui.util_wait_for_ready()


def test_webuiapi_is_told_errors_in_its_way(webui: webuiapi.WebUIApi) -> None:
    with pytest.raises(RuntimeError) as unknown:
        webui.txt2img(prompt="a woman", sampler_name="Heun")
    status, text = unknown.value.args
    assert status == 404 and "Sampler not found" in json.loads(text)["detail"]
    with pytest.raises(RuntimeError) as wrong:
        webui.txt2img(prompt="a woman", steps=0, width=7)
    status, text = wrong.value.args
    assert status == 422
    assert sorted((one["loc"], one["msg"]) for one in json.loads(text)["detail"]) == [
        (["body", "steps"], "must be an integer from 1 to 1000; got 0"),
        (["body", "width"], "must be an integer from 8 to 2048; got 7")]
    with pytest.raises(RuntimeError) as broken:
        webui.txt2img(prompt=TROUBLE)
    assert broken.value.args[0] == 500 and "No picture came out." in json.loads(broken.value.args[1])["detail"]


def test_webuiapi_watches_and_interrupts(webui: webuiapi.WebUIApi, engine: DrawingEngine, live: Live) -> None:
    engine.before_step = gate = Gate()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(webui.txt2img(prompt="a woman", steps=40, n_iter=2)))
    asking.start()
    other = webuiapi.WebUIApi(host="127.0.0.1", port=live.port)
    try:
        gate.open_until(20)
        far = until(lambda: (now := other.get_progress())["state"]["sampling_step"] == 20 and now)
        assert far["progress"] == 0.25 and far["state"]["sampling_steps"] == 40 and far["state"]["job_count"] == 2
        assert Image.open(io.BytesIO(base64.b64decode(far["current_image"]))).size == (32, 32)
        plain = requests.get(f"{live.url}{API}/progress?skip_current_image=true", timeout=PATIENCE_S).json()
        assert plain["current_image"] is None and plain["progress"] == 0.25
        stranger = requests.post(f"{live.url}{API}/interrupt", headers={"X-Client-Id": "else"}, timeout=PATIENCE_S)
        assert stranger.json() == {} and not other.get_progress()["state"]["interrupted"], "not somebody else's"
        assert other.interrupt() in ({}, None)
        assert other.get_progress()["state"]["interrupted"]
    finally:
        gate.open()
        asking.join(PATIENCE_S)
    (drawn,) = answers
    assert drawn.info["interrupted"] and 1 <= len(drawn.images) <= 2, "the pictures as they were"
    assert {job["status"] for job in live.ask("GET", "/jobs/").json()["jobs"]} == {"cancelled"}
    assert other.get_progress()["state"]["job_count"] == 0


def test_webuiapi_logs_in_with_the_key_as_password() -> None:
    with serving(api_key="open sesame") as locked:
        with pytest.raises(RuntimeError) as refused:
            webuiapi.WebUIApi(host="127.0.0.1", port=locked.port, sampler="Pencil").txt2img(prompt="a woman")
        assert refused.value.args[0] == 401 and "key" in json.loads(refused.value.args[1])["detail"]
        known = webuiapi.WebUIApi(host="127.0.0.1", port=locked.port, sampler="Pencil", username="me",
                                  password="open sesame")
        assert known.txt2img(prompt="a woman").image.size == (32, 32)


# ---- as tutorials write it -------------------------------------------------------------------------------------------


def test_a_tutorial_works(live: Live) -> None:
    payload = {"prompt": "a smiling woman", "steps": 5}
    answer = requests.post(url=f"{live.url}{API}/txt2img", json=payload, timeout=PATIENCE_S)
    found = answer.json()
    image = Image.open(io.BytesIO(base64.b64decode(found["images"][0])))
    assert image.size == (32, 32) and json.loads(found["info"])["ignored"] == []
    text = requests.post(f"{live.url}{API}/png-info", timeout=PATIENCE_S,
                         json={"image": "data:image/png;base64," + found["images"][0]}).json()
    assert text["info"].startswith("a smiling woman\nSteps: 5, Sampler: Pencil")
    assert text["parameters"]["n_inf_steps"] == 5
    assert text["items"] == {"parameters": text["info"]} and text["info"] == image.info["parameters"]
    options = requests.get(f"{live.url}{API}/options", timeout=PATIENCE_S).json()
    options["sd_model_checkpoint"] = "drawing"
    chosen = requests.post(f"{live.url}{API}/options", json={"sd_model_checkpoint": "drawing"}, timeout=PATIENCE_S)
    assert chosen.status_code == 200 and chosen.json() is None
    encoded = base64.b64encode(as_bytes(GREY)).decode()
    changed = requests.post(f"{live.url}{API}/img2img", timeout=PATIENCE_S, json={
        "init_images": [encoded], "prompt": "a woman", "denoising_strength": 0.5, "mask": encoded}).json()
    assert len(changed["images"]) == 1 and changed["parameters"] == {"prompt": "a woman", "denoising_strength": 0.5}


def as_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def ask(app: Flask, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """One request in a thread of its own, while the jobs that it makes are done here."""
    found: list[Any] = []
    client = app.test_client()
    asking = threading.Thread(target=lambda: found.append(client.post(f"{API}/{path}", json=body, headers=headers)))
    asking.start()
    while asking.is_alive():
        work(app)
        asking.join(0.01)
    return found[0].status_code, found[0].get_json()


def test_the_same_seed_gives_the_picture_of_the_own_api(app: Flask, client: FlaskClient) -> None:
    job_id = client.post("/text_to_image", json={"prompt": "a woman", "n_images": 1, "n_inf_steps": 4, "seed": 5,
                                                 "guidance_scale": 7.0}).get_json()["job_id"]
    work(app)
    status, found = ask(app, "txt2img", {"prompt": "a woman", "steps": 4, "seed": 5, "cfg_scale": 7})
    assert status == 200
    ours, theirs = (Image.open(io.BytesIO(png)) for png in (
        client.get(f"/jobs/{job_id}/images/0.png").data, base64.b64decode(found["images"][0])))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_what_is_ignored_is_named(app: Flask) -> None:
    body = {
        "prompt": "a woman", "steps": 2, "width": 32, "height": 512, "restore_faces": True, "tiling": False,
        "styles": ["film"], "enable_hr": True, "hr_scale": 2, "refiner_switch_at": 0.8, "eta": 1.0, "s_churn": 0,
        "sampler_name": "DPM++ 2M Karras", "alwayson_scripts": {"ADetailer": {"args": [True]}}, "no_such_thing": 3,
        "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": "drawing"},
        "override_settings_restore_afterwards": True, "save_images": False, "subseed": 9, "denoising_strength": 0.7,
    }
    status, found = ask(app, "txt2img", body)
    assert status == 200
    info = json.loads(found["info"])
    assert sorted(info["ignored"]) == sorted([
        "height", "restore_faces", "styles", "enable_hr", "hr_scale", "alwayson_scripts", "no_such_thing",
        "override_settings.CLIP_stop_at_last_layers", "scheduler", "denoising_strength"])
    assert info["sampler_name"] == "DPM++ 2M"
    status, found = ask(app, "txt2img", {"prompt": "a smilling wombat", "steps": 2, "send_images": False})
    assert found["images"] == [] and any("wombat" in one for one in json.loads(found["info"])["warnings"])


def test_variations_are_those_of_that_api(app: Flask, engine: DrawingEngine) -> None:
    _, found = ask(app, "txt2img", {"prompt": "a woman", "steps": 2, "seed": 4, "subseed": 10, "subseed_strength": 0.3,
                                    "batch_size": 2, "n_iter": 2})
    assert [(one.seed, one.variation_seed, one.variation_strength) for one in engine.begun] == [
        (4, 10, 0.3), (4, 12, 0.3)]
    info = json.loads(found["info"])
    assert info["all_seeds"] == [4] * 4 and info["all_subseeds"] == [10, 11, 12, 13]


@pytest.mark.parametrize(("path", "body", "status", "word"), [
    ("img2img", {"prompt": "a woman"}, 404, "Init image not found"),
    ("img2img", {"init_images": ["bm8gcGljdHVyZQ=="]}, 422, "init_images"),
    ("img2img", {"init_images": ["http://127.0.0.1/a.png"]}, 422, "addresses are not followed"),
    ("img2img", {"init_images": [as_text(np.zeros((8, 8, 3), np.uint8))],
                 "mask": as_text(np.zeros((8, 8, 3), np.uint8))}, 422, "mask"),
    ("txt2img", {"prompt": "a woman", "batch_size": 9}, 422, "batch_size"),
    ("txt2img", {"prompt": "x" * 501}, 422, "prompt"),
    ("txt2img", {"prompt": "a woman", "script_name": "x/y/z plot"}, 422, "not found"),
    ("txt2img", [], 422, "must be a JSON object"),
    ("png-info", {"image": "bm8gcGljdHVyZQ=="}, 422, "image"),
    ("options", {"sd_model_checkpoint": "dreamlike"}, 404, "dreamlike"),
    ("options", {"CLIP_skip": 2}, 422, "CLIP_skip"),
    ("no-such-route", {}, 404, "nothing at"),
])
def test_errors_have_the_shape_of_that_api(client: FlaskClient, path: str, body: Any, status: int, word: str) -> None:
    answer = client.post(f"{API}/{path}", json=body)
    found = answer.get_json()
    assert (answer.status_code, answer.content_type) == (status, "application/json"), found
    assert set(found) == {"error", "detail", "body", "errors"} and word in found["errors"]
    if status == 422:
        assert all(set(one) == {"loc", "msg", "type"} and one["loc"][0] == "body" for one in found["detail"])
    assert client.get("/jobs/").get_json()["jobs"] == []


def test_a_picture_without_a_request_says_nothing(client: FlaskClient) -> None:
    picture = base64.b64encode(as_bytes(GREY)).decode()
    assert client.post(f"{API}/png-info", json={"image": picture}).get_json() == {
        "info": "", "items": {}, "parameters": {}}


def test_a_foreign_page_is_turned_away(client: FlaskClient) -> None:
    answer = client.post(f"{API}/interrupt", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403 and "evil.example" in answer.get_json()["detail"]


def test_a_full_queue_takes_none_of_a_request(engine: DrawingEngine) -> None:
    app = make_app(engine, max_waiting=4)
    answer = app.test_client().post(f"{API}/txt2img", json={"prompt": "a woman", "n_iter": 3})
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
    assert [job["status"] for job in app.test_client().get("/jobs/").get_json()["jobs"]] == ["cancelled"] * 2


def test_few_requests_may_wait_and_a_stop_lets_them_go(engine: DrawingEngine) -> None:
    app = make_app(engine)
    found: list[Any] = []
    body = {"prompt": "a woman", "steps": 2}
    asking = [threading.Thread(target=lambda: found.append(app.test_client().post(f"{API}/txt2img", json=body)))
              for _ in range(MAX_WAITING_REQUESTS)]
    for one in asking:
        one.start()
    until(lambda: service_of(app).queue.counts()["waiting"] == MAX_WAITING_REQUESTS)
    refused = app.test_client().post(f"{API}/txt2img", json=body)
    assert refused.status_code == 429 and "requests wait" in refused.get_json()["detail"]
    service_of(app).queue.close()
    for one in asking:
        one.join(PATIENCE_S)
    assert {answer.status_code for answer in found} == {503}
    assert all("go on when it starts again" in answer.get_json()["detail"] for answer in found)
    assert service_of(app).queue.counts()["waiting"] == MAX_WAITING_REQUESTS, "what was accepted is not lost"


def test_a_failure_is_told(app: Flask) -> None:
    status, found = ask(app, "txt2img", {"prompt": TROUBLE, "steps": 2})
    assert status == 500 and found["detail"] == "No picture came out. Try another sampler."


def test_its_routes_are_in_the_document() -> None:
    entries = {path: methods for path, methods in document(True)["paths"].items() if path.startswith(API)}
    assert {f"{API}/{name}" for name in ("txt2img", "img2img", "options", "samplers", "schedulers", "sd-models",
            "progress", "interrupt", "png-info", "embeddings", "loras", "memory")} <= set(entries)
    for methods in entries.values():
        for entry in methods.values():
            refused = {status: one["content"] for status, one in entry["responses"].items() if status >= "400"}
            assert all(one == {"application/json": {"schema": {"$ref": "#/components/schemas/SdError"}}}
                       for one in refused.values())
