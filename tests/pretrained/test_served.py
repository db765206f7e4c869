"""Does a real Stable Diffusion, tiny as it is, serve behind the same queue, API and metadata as our own model?"""

from __future__ import annotations

import base64
import gc
import io
import json
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from PIL import Image

from api import create_app, models_of
from core.engine import GenerationRequest
from core.imaging.png_metadata import read_request
from core.imaging.watermark import find
from core.jobs.model_files import is_ours
from core.jobs.models import Models
from core.nn.device import free_memory, pick_device, release_memory
from core.pretrained.engine import PretrainedEngine
from tests.support.asking import CheckedClient, post, service_of, tick, work
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_stable_diffusion import SIZE, TinyStableDiffusion


def opened(*paths: Path, image_size: int | None = SIZE) -> Models:
    """The models of these paths, as the command line opens them."""
    return models_of(Namespace(models=list(paths), device="cpu", threads=1, precision="fp32", engine="torch",
                               image_size=image_size))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("ours") / "faces")


@pytest.fixture(scope="module")
def app(tiny: TinyStableDiffusion, ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flask]:
    """Our tiny model first, then the folder, then the single file, then one that is cut off."""
    folder = tmp_path_factory.mktemp("cut")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny.safetensors.parent / name, folder / name)
    cut = folder / "cut.safetensors"
    cut.write_bytes(tiny.safetensors.read_bytes()[:5_000_000])
    app = create_app(opened(ours, tiny.folder, tiny.safetensors, cut), start=False)
    app.test_client_class = CheckedClient
    assert service_of(app).load()
    yield app


def drawn(app: Flask, **body: Any) -> tuple[dict[str, Any], list[bytes]]:
    """A job from beginning to end: its answer, its PNGs."""
    client = app.test_client()
    job_id = post(client, **body)["job_id"]
    work(app)
    answer = client.get(f"/jobs/{job_id}/").get_json()
    assert answer["status"] == "succeeded", answer["error"]
    return answer, [client.get(entry["url"]).data for entry in answer["response"]]


def test_models_are_listed_by_name_and_kind(app: Flask, tiny: TinyStableDiffusion) -> None:
    found = app.test_client().get("/options").get_json()
    assert [(one["kind"], one["image_size"]) for one in found["models"]] == [
        ("faces", 128), ("stable-diffusion", SIZE), ("stable-diffusion", SIZE)]
    assert [one["name"] for one in found["models"]][1:] == ["tiny", "tiny-2"]
    ((name, why),) = [(one["name"], one["failure"]) for one in found["failed_models"]]
    assert name == "cut" and "is cut off: 5,000,000 of" in why
    assert is_ours(Path("models/celeba128")) and not is_ours(tiny.folder) and not is_ours(tiny.ckpt)


def test_text_to_image_with_metadata_and_watermark(app: Flask) -> None:
    answer, pngs = drawn(app, prompt="a smiling woman", model="tiny", n_images=2, n_inf_steps=4, seed=7, stream_freq=2)
    assert answer["parameters"]["guidance_scale"] == 7.5 and answer["warnings"] == []
    for seed, png in enumerate(pngs, start=7):
        assert Image.open(io.BytesIO(png)).size == (SIZE, SIZE)
        found = read_request(png)
        assert found["exact"] and found["watermark"] == 1 and found["request"]["seed"] == seed
    steps = app.test_client().get(f"/jobs/{answer['job_id']}/steps").get_json()["steps"]
    assert {one["t"] for one in steps} == {2, 4}


def test_a_picture_is_inspected_and_verified(app: Flask) -> None:
    _, (png,) = drawn(app, prompt="an old man", model="tiny", n_images=1, n_inf_steps=3, seed=3)
    client = app.test_client()
    told = client.post("/inspect", data=png, content_type="image/png").get_json()
    assert told["made_here"] and told["model_matches"]
    answer = client.post("/verify", data=png, content_type="image/png")
    assert answer.status_code == 200, answer.text
    work(app)
    verdict = client.get(f"/jobs/{answer.get_json()['job_id']}/verdict").get_json()
    assert verdict["verdict"] == "exact", verdict


def test_the_mark_is_found_in_a_picture_of_another_size(tiny: TinyStableDiffusion) -> None:
    engine = PretrainedEngine.load(tiny.folder, "cpu", image_size=256)
    gradient = np.linspace(60, 200, 256, dtype=np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2)
    latent = engine.encode(np.ascontiguousarray(gradient))
    (marked,) = engine.generate(GenerationRequest("", 1, 2, latents=latent[None], start=1.0))
    (plain,) = engine.generate(GenerationRequest("", 1, 2, latents=latent[None], start=1.0, watermark=False))
    assert find(marked.pixels).found and not find(plain.pixels).found


def test_image_to_image_and_a_mask(app: Flask) -> None:
    _, (before,) = drawn(app, prompt="a woman", model="tiny", n_images=1, n_inf_steps=3, seed=5)
    picture = base64.b64encode(before).decode()
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (32, 0, SIZE, SIZE))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    _, (changed,) = drawn(app, prompt="a man", model="tiny", n_images=1, n_inf_steps=4, init_image=picture,
                          mask=base64.b64encode(buffer.getvalue()).decode())
    old, new = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in (before, changed))
    assert np.array_equal(old[:, :32], new[:, :32]) and not np.array_equal(old[:, 40:], new[:, 40:])


def test_our_face_is_refined_by_the_other_model(app: Flask) -> None:
    refine = {"model": "tiny", "strength": 0.5}
    answer, (after,) = drawn(app, prompt="a smiling woman", n_images=1, n_inf_steps=4, refine=refine)
    client = app.test_client()
    before = client.get(answer["response"][0]["before"]).data
    assert Image.open(io.BytesIO(before)).size == (128, 128) and Image.open(io.BytesIO(after)).size == (SIZE, SIZE)
    told = read_request(after)
    assert told["exact"] and told["request"]["start_timestep"] == 0.5
    assert client.post("/inspect", data=before, content_type="image/png").get_json()["model_matches"]
    again = client.post("/verify", data=after, content_type="image/png").get_json()
    work(app)
    assert client.get(f"/jobs/{again['job_id']}/verdict").get_json()["verdict"] == "exact"


def test_our_own_network_refines_where_there_is_no_other(app: Flask) -> None:
    answer, (after,) = drawn(app, prompt="a smiling woman", n_images=1, n_inf_steps=4, refine={"strength": 0.5})
    before = app.test_client().get(answer["response"][0]["before"]).data
    assert Image.open(io.BytesIO(after)).size == (128, 128) and before != after


def test_cancelling_takes_one_step(app: Flask) -> None:
    client = app.test_client()
    job_id = post(client, model="tiny", n_images=1, n_inf_steps=500)["job_id"]
    for _ in range(3):
        tick(app)
    client.post(f"/jobs/{job_id}/cancel")
    tick(app)
    assert client.get(f"/jobs/{job_id}/").get_json()["status"] == "cancelled"
    assert not tick(app)


def test_what_it_cannot_do_is_refused(app: Flask) -> None:
    client = app.test_client()
    for body in ({"attributes": {"Smiling": 1}}, {"candidates": 8}, {"balance": True}, {"sampler": "Turbo"}):
        answer = client.post("/text_to_image", json={"prompt": "a", "n_images": 1, "model": "tiny", **body})
        assert answer.status_code == 422, answer.text


def test_two_jobs_of_different_length_share_steps(drawer: PretrainedEngine) -> None:
    """In processor time, which neighbours on the machine hardly change: at most 1.05 times that of one after another.
    """
    requests = [GenerationRequest("a woman", 1, 12, seed=1), GenerationRequest("an old man", 1, 20, seed=2,
                                                                               sampler="DDIM")]

    def seconds(*groups: list[GenerationRequest]) -> float:
        began = time.process_time()
        for group in groups:
            runs = [drawer.start(request) for request in group]
            while any(not run.finished for run in runs):
                drawer.step(runs)
        return time.process_time() - began

    seconds(requests)
    in_turn = min(seconds([requests[0]], [requests[1]]) for _ in range(3))
    together = min(seconds(requests) for _ in range(3))
    print(f"together {together:.2f} s, in turn {in_turn:.2f} s: {together / in_turn:.2f}")
    assert together <= 1.05 * in_turn


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_returns_after_ten_switches(tiny: TinyStableDiffusion, ours: Path) -> None:
    """One model at a time; the first switches fill caches of the libraries."""
    models = opened(ours, tiny.folder)
    models._free_bytes = lambda: None  # as where nobody says how much there is
    sizes = []
    for _ in range(6):  # two switches each
        for name in models._sources:
            engine = models.engine(name)
            assert sum(models.is_loaded(other) for other in models._sources) == 1
            del engine
        gc.collect()
        release_memory()
        sizes.append(resident_bytes())
    print([size // 2**20 for size in sizes])
    weights = sum(file.stat().st_size for file in tiny.folder.rglob("*.safetensors"))
    assert max(sizes[2:]) - sizes[1] < weights  # one that stayed would show ten times


def test_free_memory_is_told() -> None:
    free = free_memory(pick_device("cpu"))
    assert free is None or 2**24 < free < 2**50


def test_safety_checkers_verdict_leaves_the_picture(tiny: TinyStableDiffusion, tmp_path: Path) -> None:
    """A checker of random weights whose thresholds say that everything is unsafe, and then that nothing is."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    folder = tmp_path / "checked"
    shutil.copytree(tiny.folder, folder)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    crop = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder / "feature_extractor")
    request = GenerationRequest("a face", 2, 2, seed=4)
    expected = [picture.pixels for picture in PretrainedEngine.load(tiny.folder, "cpu").generate(request)]
    for threshold, verdict in ((-2.0, True), (2.0, False)):
        with torch.no_grad():
            checker.concept_embeds_weights.fill_(threshold)
            checker.special_care_embeds_weights.fill_(2.0)
        checker.save_pretrained(folder / "safety_checker")
        pictures = PretrainedEngine.load(folder, "cpu").generate(request)
        assert [picture.assessment["unsafe"] for picture in pictures] == [verdict] * 2
        assert np.array_equal([picture.pixels for picture in pictures], expected)
    assert "unsafe" not in json.dumps(sorted(PretrainedEngine.load(tiny.folder, "cpu").generate(request)[0].assessment))
