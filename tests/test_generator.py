"""Does the generator keep its promises: same seed same image, honest steps, clean stops, PNGs that say what they are?

Everything runs on a tiny model of real networks with untrained weights; the bundled model must generate too when
present.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from api import create_app
from core.diffusion.conditioning import Condition
from core.diffusion.schedulers import SAMPLERS
from core.engine import GenerationRequest, JobError
from core.evaluation.attribute_classifier import AttributeClassifier, AttributeClassifierConfig
from core.imaging.png_metadata import encode_png, read_request
from core.imaging.watermark import VERSION, find, mark
from core.nn.checkpoint import ModelFolderError, load_component, save_component
from core.nn.device import has_bf16, is_out_of_memory, pick_device, pick_dtype
from core.nn.layers import to_pixels
from generator import MAX_ENCODED_PROMPTS, FaceGenerator, GeneratedImage, JobCancelled, Run, Step
from model_loading import DEFAULT_MODEL

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a smiling woman with blond hair"


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference in grey levels."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_info_comes_from_the_folder(faces: FaceGenerator) -> None:
    info = faces.info
    assert (info.name, info.device, info.image_size, info.latent_shape) == ("tiny", "cpu", 128, (4, 16, 16))
    assert info.samplers == SAMPLERS and info.default_sampler in SAMPLERS and info.default_guidance_scale > 1
    assert re.fullmatch("[0-9a-f]{64}", info.model_hash)
    used = [faces.start(GenerationRequest("a face", 1, steps)).parameters[0]["sampler"] for steps in (50, 51)]
    assert used == [info.default_sampler, info.long_sampler] == ["UniPC", "UniPC"]


def test_pictures_are_what_they_say(faces: FaceGenerator) -> None:
    pictures = faces.generate(PROMPT, num_images=2, num_inference_steps=3, seed=7)
    assert [(picture.index, picture.seed) for picture in pictures] == [(0, 7), (1, 8)]
    for picture in pictures:
        assert picture.pixels.shape == (128, 128, 3) and picture.pixels.dtype == np.uint8
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.png))), picture.pixels)
        assert len(picture.latent) == 4 * 16 * 16 * 4
    assert difference(pictures[0].pixels, pictures[1].pixels) > 10


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_is_the_same_picture_alone_and_in_a_batch(faces: FaceGenerator, sampler: str) -> None:
    """For every sampler, those that generate noise at every step included."""
    together = faces.generate(PROMPT, num_images=3, num_inference_steps=4, seed=10, sampler=sampler)
    alone = faces.generate(PROMPT, num_images=1, num_inference_steps=4, seed=12, sampler=sampler)
    again = faces.generate(PROMPT, num_images=3, num_inference_steps=4, seed=10, sampler=sampler)
    assert difference(together[2].pixels, alone[0].pixels) <= 1
    assert all(one.png == other.png for one, other in zip(together, again, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_few_steps_are_enough_for_a_picture(faces: FaceGenerator, sampler: str) -> None:
    """The far end of the schedule is nearly pure noise, where solvers lose digits: few steps make long leaps."""
    steps: list[Step] = []
    for count in range(1, 6):
        faces.generate(PROMPT, num_inference_steps=count, sampler=sampler, on_step=steps.append)
    assert [step.total for step in steps] == [1, *[2] * 2, *[3] * 3, *[4] * 4, *[5] * 5]


def test_prompt_negative_prompt_sampler_and_guidance_all_matter(faces: FaceGenerator) -> None:
    def latent(**options: object) -> np.ndarray:
        given = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 1, "guidance_scale": 4.0, **options}
        (picture,) = faces.generate(**given)  # type: ignore[arg-type]
        return np.frombuffer(picture.latent, "<f4")

    base = latent()
    for other in ({"prompt": "an old man"}, {"negative_prompt": "an old man"}, {"guidance_scale": 7.0}, {"seed": 2},
                  {"sampler": "Euler"}, {"prompt": ""}):
        assert np.abs(latent(**other) - base).max() > 1e-4, other
    assert np.array_equal(latent(prompt="  "), latent(prompt=""))  # blank is the learned null, not two tokens
    assert np.array_equal(latent(negative_prompt=" "), base)
    off = latent(guidance_scale=1.0)
    assert np.array_equal(latent(guidance_scale=1.0, negative_prompt="an old man"), off)
    assert np.abs(latent(guidance_scale=1.0 + 1e-6) - off).max() < 1e-3
    assert np.abs(latent(guidance_scale=0.0) - latent(prompt="", guidance_scale=1.0)).max() < 1e-5


def test_guidance_off_runs_one_pass_of_b_rows(faces: FaceGenerator) -> None:
    rows, handle = counted(faces)
    with handle:
        for scale in (1.0, 0.0, 3.0):
            faces.generate(PROMPT, num_images=2, num_inference_steps=2, guidance_scale=scale)
    assert rows == [2, 2, 2, 2, 4, 4]


# ----------------------------------------------------------------------------------------- many requests, step by step


@pytest.fixture(scope="module")
def asked(faces: FaceGenerator) -> list[GenerationRequest]:
    """One of every sampler, and of everything else that may differ."""
    z = np.random.default_rng(0).standard_normal((2, *faces.info.latent_shape)).astype(np.float32)
    prompts = (PROMPT, "an old man with glasses and a big nose, wearing a hat", "", "a young man")
    plain = [
        GenerationRequest(prompts[i % 4], 1 + i % 3, 3 + i, seed=100 * i, guidance_scale=(None, 1.0, 0.0, 6.5)[i % 4],
                          negative_prompt=("", "a man")[i % 2], sampler=sampler)
        for i, sampler in enumerate(SAMPLERS)
    ]
    return [*plain, GenerationRequest(PROMPT, 2, 8, seed=7, latents=z, start=0.5), GenerationRequest(PROMPT, 2, 4,
                                                                                                     latents=z),
            GenerationRequest(PROMPT, 2, 4, latents=z, start=1.0)]


@pytest.fixture(scope="module")
def alone(faces: FaceGenerator, asked: list[GenerationRequest]) -> list[list[GeneratedImage]]:
    """What each of them generates when nobody else is there."""
    return [finish(faces, [faces.start(request)])[0] for request in asked]


def finish(faces: FaceGenerator, runs: list[Run]) -> list[list[GeneratedImage]]:
    while any(not run.finished for run in runs):
        faces.step(runs)
    return [faces.pictures(run) for run in runs]


def assert_same(pictures: list[GeneratedImage], others: list[GeneratedImage]) -> None:
    assert [(one.index, one.seed) for one in pictures] == [(other.index, other.seed) for other in others]
    assert max(difference(one.pixels, other.pixels) for one, other in zip(pictures, others, strict=True)) <= 1


def counted(faces: FaceGenerator) -> tuple[list[int], torch.utils.hooks.RemovableHandle]:
    """How many rows each call of the network has from now on."""
    rows: list[int] = []
    return rows, faces.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))


def test_whatever_is_drawn_together_is_what_it_is_alone(
    faces: FaceGenerator, asked: list[GenerationRequest], alone: list[list[GeneratedImage]]
) -> None:
    together = finish(faces, [faces.start(request) for request in asked])
    for pictures, others in zip(together, alone, strict=True):
        assert_same(pictures, others)
    whole = vars(asked[3])
    assert_same(faces.generate(whole["prompt"], **{k: v for k, v in whole.items() if k != "prompt"}), alone[3])


def test_runs_join_and_leave_at_any_step(
    faces: FaceGenerator, asked: list[GenerationRequest], alone: list[list[GeneratedImage]]
) -> None:
    passing = faces.start(GenerationRequest("somebody else", 2, 50, seed=5))
    runs: list[Run] = []
    while not all(run.finished for run in runs) or len(runs) < len(asked):
        if len(runs) < len(asked):
            runs.append(faces.start(asked[len(runs)]))
        others = [passing] if len(runs) % 3 else []  # comes and goes, and is never finished
        faces.step([*others, *(run for run in runs if not run.finished)])
    assert 0 < passing.done < passing.total and passing.error is None
    for run, pictures in zip(runs, alone, strict=True):
        assert_same(faces.pictures(run), pictures)


def test_a_step_is_one_call_of_as_few_rows_as_guidance_allows(faces: FaceGenerator) -> None:
    scales = (1.0, 0.0, 3.0, 4.0)
    runs = [faces.start(GenerationRequest(PROMPT, 1 + i, 1 + i, guidance_scale=w)) for i, w in enumerate(scales)]
    rows, handle = counted(faces)
    with handle:
        for _ in range(5):
            faces.step(runs)
    assert rows == [1 + 2 + 2 * 3 + 2 * 4, 2 + 2 * 3 + 2 * 4, 2 * 3 + 2 * 4, 2 * 4]
    assert [(run.done, run.total) for run in runs] == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_prompts_are_read_once_and_joined_once(faces: FaceGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps, images and requests there are."""
    monkeypatch.setattr(faces, "_encoded_prompts", {})
    read: list[int] = []
    joined = []
    with (faces.clip.text.register_forward_pre_hook(lambda module, inputs: read.append(len(inputs[0]))),
          faces.unet.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[2].tokens))):
        asked = GenerationRequest(PROMPT, 4, 6), GenerationRequest(PROMPT, 1, 8, negative_prompt="an old man")
        finish(faces, [faces.start(request) for request in asked])
    assert read == [1, 1]
    assert [len({tokens.data_ptr() for tokens in part}) for part in (joined[:6], joined[6:])] == [1, 1]


def test_a_run_tells_where_it_is(faces: FaceGenerator) -> None:
    z = np.zeros((2, *faces.info.latent_shape), np.float32)
    run = faces.start(GenerationRequest(PROMPT, 2, 4, seed=9, latents=z, start=0.5))
    assert (run.num_images, run.done, run.total, run.finished, run.error, run.seeds) == (2, 2, 4, False, None, [9, 10])
    assert len(faces.previews(run)) == 2  # the starting point
    with pytest.raises(ValueError, match="at step 2 of 4"):
        faces.pictures(run)
    faces.step([])
    for _ in range(4):
        faces.step([run])
    assert run.finished and run.done == 4
    skipped = faces.start(GenerationRequest(PROMPT, 2, 4, latents=z, start=1.0))
    assert skipped.finished and skipped.done == skipped.total == 4 and len(faces.pictures(skipped)) == 2


def test_one_broken_run_fails_alone(faces: FaceGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite numbers that overflow in the network, and a fault of the code, each beside a healthy run."""
    healthy = GenerationRequest(PROMPT, 2, 4, seed=3)
    latents = np.full((1, *faces.info.latent_shape), 1e30, np.float32)
    runs = [faces.start(GenerationRequest(PROMPT, num_inference_steps=6, latents=latents)), faces.start(healthy),
            faces.start(GenerationRequest(PROMPT, num_inference_steps=6))]

    def fault(prediction: torch.Tensor) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(runs[2].denoising, "advance", fault)
    rows, handle = counted(faces)
    with handle:
        pictures = []
        while not runs[1].finished:
            faces.step(runs)
        pictures = faces.pictures(runs[1])
    assert rows == [8, 4, 4, 4]
    assert_same(pictures, finish(faces, [faces.start(healthy)])[0])
    assert runs[0].finished and runs[0].done == 0
    for run, code in ((runs[0], "not_finite"), (runs[2], "internal")):
        assert run.error is not None and run.error.code == code and run.error.hint
        with pytest.raises(JobError) as failed:
            faces.pictures(run)
        assert failed.value is run.error


class Cramped:
    """A network's work on a device that has memory for `most` rows."""

    def __init__(self, network: torch.nn.Module, most: int) -> None:
        self.forward, self.most = network.forward, most
        self.rows: list[int] = []

    def __call__(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        self.rows.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return self.forward(x, *more)


def test_short_memory_halves_the_call_and_remembers(
    faces: FaceGenerator, asked: list[GenerationRequest], alone: list[list[GeneratedImage]],
    monkeypatch: pytest.MonkeyPatch
) -> None:
    cramped = Cramped(faces.unet, most=2)
    with monkeypatch.context() as patch:
        patch.setattr(faces.unet, "forward", cramped)
        patch.setattr(faces.vae.decoder, "forward", Cramped(faces.vae.decoder, most=1))
        together = finish(faces, [faces.start(request) for request in asked[:3]])
    for pictures, others in zip(together, alone, strict=False):
        assert_same(pictures, others)
    first = [7, 3, 1, 2, 4, 2, 2]  # 2 + 2 + 3 rows are halved until they fit ...
    assert cramped.rows[: len(first)] == first and cramped.rows[len(first) : len(first) + 4] == [2, 2, 2, 1]  # ... once


def test_an_image_that_does_not_fit_fails_its_run_alone(
    faces: FaceGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network has no memory for long prompts; their rows are found by halving."""
    fits = GenerationRequest("a man", 3, 4, seed=3)
    alone = finish(faces, [faces.start(fits)])[0]
    forward = faces.unet.forward

    def no_long_prompts(x: torch.Tensor, level: torch.Tensor, condition: Condition) -> torch.Tensor:
        if int(condition.mask.sum(1).max()) > 12:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return forward(x, level, condition)

    with monkeypatch.context() as patch:
        patch.setattr(faces.unet, "forward", no_long_prompts)
        runs = [faces.start(fits), faces.start(GenerationRequest("a man with black hair and glasses " * 2, 2, 4)),
                faces.start(GenerationRequest("", 1, 9))]
        while not all(run.finished for run in runs):
            faces.step(runs)
    assert [run.error and run.error.code for run in runs] == [None, "out_of_memory", None]
    assert [run.done for run in runs] == [4, 0, 9]
    assert_same(faces.pictures(runs[0]), alone)


@pytest.mark.parametrize("words", ["MPS backend out of memory (MPS allocated: 5.50 GB)", None])
def test_every_device_says_out_of_memory_in_its_own_way(words: str | None) -> None:
    if words is not None:
        assert is_out_of_memory(RuntimeError(words))
    else:
        with pytest.raises(RuntimeError) as failed:
            torch.empty(2**60)
        assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_encode_and_decode(faces: FaceGenerator) -> None:
    picture = faces.generate(PROMPT, num_inference_steps=2)[0]
    z = np.frombuffer(picture.latent, "<f4").reshape(faces.info.latent_shape)
    assert np.array_equal(mark(faces.decode(z)), picture.pixels)
    latent = faces.encode(picture.pixels)
    assert latent.shape == faces.info.latent_shape and latent.dtype == np.float32 and np.isfinite(latent).all()
    assert np.array_equal(faces.encode(picture.pixels), latent)
    for wrong in (picture.pixels[:64], picture.pixels.astype(np.float32), picture.pixels[..., :1]):
        with pytest.raises(ValueError, match=re.escape("pixels must be uint8 [128, 128, 3], got")):
            faces.encode(wrong)
    for bad in (z[:, :8], np.full_like(z, np.nan)):
        with pytest.raises(ValueError, match="latent must be finite numbers"):
            faces.decode(bad)


def test_every_step_is_told_once_and_previews_are_pictures(faces: FaceGenerator) -> None:
    steps: list[tuple[int, int]] = []
    previews = []

    def look(step: Step) -> None:
        steps.append((step.done, step.total))
        previews.append(step.previews())

    pictures = faces.generate(PROMPT, num_images=2, num_inference_steps=5, seed=3, on_step=look, sampler="DDIM")
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert [(preview.index, preview.seed) for preview in previews[0]] == [(0, 3), (1, 4)]
    assert Image.open(io.BytesIO(previews[0][1].png)).size == (128, 128)
    closeness = [np.abs(shown[0].pixels.astype(int) - pictures[0].pixels).mean() for shown in previews]
    assert closeness[-1] < closeness[0] and closeness[-1] < 3  # what is shown is the predicted end, not the noise


def test_previews_do_not_change_the_picture_and_cost_nothing_unasked(faces: FaceGenerator) -> None:
    decoded: list[int] = []
    handle = faces.vae.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(len(inputs[0])))
    try:
        watched = faces.generate(PROMPT, num_images=3, num_inference_steps=3,
                                 on_step=lambda step: step.previews() and None)
        unwatched = faces.generate(PROMPT, num_images=3, num_inference_steps=3, on_step=lambda step: None)
    finally:
        handle.remove()
    assert [one.png for one in watched] == [one.png for one in unwatched]
    assert decoded == [3] * 4 + [3]  # all images of a run in one call


def test_previews_of_the_bundled_model_are_near_its_pictures_and_need_no_decoder() -> None:
    """The linear preview decoder is fitted to this VAE: it shows the same face, for one convolution.

    Sixteen steps, which no correction makes richer in contrast than a linear decoder shows.
    """
    faces = FaceGenerator.load(DEFAULT_MODEL, device="cpu", engine="torch")
    assert faces.preview is not None
    decoded: list[int] = []
    handle = faces.vae.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(len(inputs[0])))
    try:
        run = faces.start(GenerationRequest("a smiling woman", num_images=2, num_inference_steps=16, seed=3))
        while not run.finished:
            faces.step([run])
        shown = faces.previews(run)
        assert not decoded
    finally:
        handle.remove()
    for preview, picture in zip(shown, faces.pictures(run), strict=True):
        assert preview.pixels.shape == picture.pixels.shape and preview.seed == picture.seed
        assert np.abs(preview.pixels.astype(int) - picture.pixels).mean() < 8  # grey levels, of 255


def test_the_hash_of_a_model_is_that_of_all_its_weights(
    tiny_folder: Path, faces: FaceGenerator, tmp_path: Path
) -> None:
    """A decoder trained further generates other images from the same seed, so it must not pass for the same model."""
    other = shutil.copytree(tiny_folder, tmp_path / "tiny")
    assert FaceGenerator.load(other, device="cpu", engine="torch").info.model_hash == faces.info.model_hash
    config, state = load_component(other, "vae")
    state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"] + 0.5
    save_component(other, "vae", state, config)
    changed = FaceGenerator.load(other, device="cpu", engine="torch").info.model_hash
    assert changed != faces.info.model_hash
    path = other / "scheduler" / "config.json"  # and so does one that begins elsewhere on the way from noise
    path.write_text(json.dumps(json.loads(path.read_text()) | {"begin": [990.0, 300.0]}))
    later = FaceGenerator.load(other, device="cpu", engine="torch")
    assert later.info.model_hash not in (changed, faces.info.model_hash)
    drawn = [one.generate("a face", num_inference_steps=4, seed=3)[0].pixels for one in (later, faces)]
    assert not np.array_equal(*drawn)


def test_stopping_before_and_between_steps(faces: FaceGenerator) -> None:
    steps: list[int] = []
    with pytest.raises(JobCancelled):
        faces.generate(PROMPT, num_inference_steps=9, on_step=lambda step: steps.append(step.done),
                       should_stop=lambda: len(steps) == 2)
    assert steps == [1, 2]
    with pytest.raises(JobCancelled):
        faces.generate(PROMPT, on_step=lambda step: steps.append(step.done), should_stop=lambda: True)
    assert steps == [1, 2]


def test_latents_replace_the_noise_or_are_the_start(faces: FaceGenerator) -> None:
    first = faces.generate(PROMPT, num_inference_steps=8, seed=5)[0]
    z = np.frombuffer(first.latent, "<f4").reshape(1, *faces.info.latent_shape)
    unchanged = faces.generate(PROMPT, num_inference_steps=8, latents=z, start=1.0)[0]
    assert difference(unchanged.pixels, first.pixels) == 0 and unchanged.latent == first.latent
    steps: list[tuple[int, int]] = []
    near = faces.generate(PROMPT, num_inference_steps=8, latents=z, start=0.9, seed=6,
                          on_step=lambda step: steps.append((step.done, step.total)))[0]
    assert steps == [(8, 8)]
    far = faces.generate(PROMPT, num_inference_steps=8, latents=z, start=0.25, seed=6)[0]

    def distance(picture_latent: bytes) -> float:
        return float(np.abs(np.frombuffer(picture_latent, "<f4") - z.ravel()).mean())

    assert 0 < distance(near.latent) < distance(far.latent)
    noise = torch.randn((1, *faces.info.latent_shape), generator=torch.Generator().manual_seed(5))
    assert faces.generate(PROMPT, num_inference_steps=8, seed=99, latents=noise)[0].latent == first.latent


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_images": 0}, "at least 1"), ({"num_inference_steps": 0}, "at least 1"), ({"start": 1.5}, "from 0 to 1"),
     ({"start": 0.5}, "needs latents"), ({"sampler": "Brush"}, "'Brush' is not one of"),
     ({"latents": np.zeros((1, 4, 8, 8))}, re.escape("must have shape [1, 4, 16, 16], got [1, 4, 8, 8]"))],
)
def test_wrong_arguments_are_refused(faces: FaceGenerator, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        faces.generate(PROMPT, **options)


def test_nan_is_an_error_never_a_black_picture(tiny_folder: Path) -> None:
    broken = FaceGenerator.load(tiny_folder, device="cpu", engine="torch")
    with torch.no_grad():
        broken.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(JobError, match="NaN or infinity") as failed:
        broken.generate(PROMPT, num_inference_steps=2)
    assert failed.value.code == "not_finite" and failed.value.hint


def test_out_of_memory_is_a_failure_with_a_remedy(faces: FaceGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception is the one that torch raises; a machine that is really full cannot be had in a test."""

    def exhausted(*args: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    with monkeypatch.context() as patch:
        patch.setattr(faces.unet, "forward", exhausted)
        with pytest.raises(JobError, match="too little memory") as failed:
            faces.generate(PROMPT, num_inference_steps=2)
    assert failed.value.code == "out_of_memory"
    assert faces.generate(PROMPT, num_inference_steps=2)  # and the next one works


def test_seeds_wrap_where_javascript_ends(faces: FaceGenerator) -> None:
    pictures = faces.generate(PROMPT, num_images=2, num_inference_steps=1, seed=2**53 - 1)
    assert [picture.seed for picture in pictures] == [2**53 - 1, 0]


def test_pixels_are_clamped_before_the_cast() -> None:
    images = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5, 300.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_pixels(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_png_text_names_everything_and_restores_the_request(faces: FaceGenerator) -> None:
    asked = {"num_images": 2, "num_inference_steps": 4, "seed": 41, "guidance_scale": 2.5, "sampler": "Euler a",
             "negative_prompt": "béard"}
    picture = faces.generate("a wömän\nsmiling", **asked)[1]  # type: ignore[arg-type]
    text = Image.open(io.BytesIO(picture.png)).text  # type: ignore[attr-defined]
    assert text["parameters"] == (
        "a wömän\nsmiling\nNegative prompt: béard\nSteps: 4, Sampler: Euler a, CFG scale: 2.5, Seed: 42, "
        f"Size: 128x128, Model hash: {faces.info.model_hash[:10]}, Model: tiny"
    )
    chunk = json.loads(text["text_to_image"])
    assert chunk["model_hash"] == faces.info.model_hash
    assert chunk["request"] == {"prompt": "a wömän\nsmiling", "n_images": 1, "n_inf_steps": 4, "sampler": "Euler a",
                                "guidance_scale": 2.5, "negative_prompt": "béard", "start_timestep": 0.0, "seed": 42}
    assert "trainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]


def test_the_request_in_a_png_draws_the_same_picture_through_http(faces: FaceGenerator, tmp_path: Path) -> None:
    """Round trip with the latents included: image -> its chunk -> POST /text_to_image -> the same image."""
    z = np.random.default_rng(0).standard_normal((2, *faces.info.latent_shape)).astype(np.float32)
    picture = faces.generate(PROMPT, num_images=2, num_inference_steps=4, seed=41, latents=z, start=0.5)[1]
    # type: ignore[attr-defined]
    body = json.loads(Image.open(io.BytesIO(picture.png)).text["text_to_image"])["request"]
    app = create_app(lambda: faces, start=False, data_dir=tmp_path)
    service = app.extensions["service"]
    batch = service.load()
    client = app.test_client()
    answer = client.post("/text_to_image", json=body)
    assert answer.status_code == 200, answer.text
    while service.queue.run_next(batch):
        pass
    (entry,) = client.get(answer.headers["Location"]).get_json()["response"]
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["img"]))))
    assert difference(again, picture.pixels) <= 1
    service.close()


def test_results_carry_the_watermark_and_previews_do_not(faces: FaceGenerator) -> None:
    """On by default, and said in the parameters; without it pixels are as decoded. The latent is the same."""
    previews: list[GeneratedImage] = []
    asked: dict[str, Any] = {"num_inference_steps": 2, "seed": 5, "num_images": 2}
    marked = faces.generate(PROMPT, on_step=lambda step: previews.extend(step.previews()), **asked)
    plain = faces.generate(PROMPT, watermark=False, **asked)
    for one, other in zip(marked, plain, strict=True):
        assert np.array_equal(one.pixels, mark(other.pixels)) and one.latent == other.latent
        assert 0 < difference(one.pixels, other.pixels) < 10
        assert (read_request(one.png)["watermark"], read_request(other.png)["watermark"]) == (VERSION, None)
    assert previews and not any(find(picture.pixels).found for picture in [*previews, *plain])


def test_a_preview_carries_no_text() -> None:
    assert Image.open(io.BytesIO(encode_png(np.zeros((8, 8, 3), np.uint8)))).text == {}  # type: ignore[attr-defined]


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else
                                  "mps" if torch.backends.mps.is_available() else "cpu")
    for wrong in ("gpu", "cuda:99", "meta", "tpu"):
        with pytest.raises(ValueError, match=wrong):
            pick_device(wrong)


def test_a_start_imports_nothing_slow_that_the_first_face_does_not_need(tiny_folder: Path, tmp_path: Path) -> None:
    """Each of these takes from half a second to several; together longer than all else until the first face."""
    models = tmp_path / "models"
    shutil.copytree(tiny_folder, models / "tiny")
    save_component(models / "judge", "judge", AttributeClassifier(AttributeClassifierConfig()).state_dict(),
                   asdict(AttributeClassifierConfig()))
    program = """
import sys
import api
from generator import FaceGenerator
faces = FaceGenerator.load(sys.argv[1], device="cpu", engine="torch")
(face,) = faces.generate("a smiling woman", num_inference_steps=2)
assert faces.classifier is not None and face.assessment["attributes"]
slow = {"diffusers", "transformers", "torchvision", "torchmetrics", "accelerate", "scipy", "pandas", "matplotlib",
        "torch._dynamo", "torch._inductor", "sympy"}
print(sorted(slow & set(sys.modules)))
"""
    command = [sys.executable, "-c", program, str(models / "tiny")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert answer.stdout == "[]\n", answer.stderr


def test_warming_up_changes_no_picture_and_may_fail(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold, warm = (FaceGenerator.load(tiny_folder, device="cpu", engine="torch") for _ in range(2))
    warm.warm_up()
    one, other = (some.generate(PROMPT, num_inference_steps=3, seed=5)[0] for some in (cold, warm))
    assert one.png == other.png and caplog.text == ""
    monkeypatch.setattr(warm, "denoise", lambda x, timestep, condition: torch.full_like(x, float("nan")))
    warm.warm_up()
    assert "generated for nobody, failed" in caplog.text


def test_precision(tiny_folder: Path, faces: FaceGenerator) -> None:
    """bf16 generates nearly the same image, and the same one alone or in a batch; where it is emulated it is
    refused."""
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="got 'fp8' on cpu"):
        pick_dtype("fp8", cpu)
    if not has_bf16(cpu):
        with pytest.raises(ValueError, match="bf16 on a device that has it"):
            FaceGenerator.load(tiny_folder, device="cpu", engine="torch", precision="bf16")
        return
    fast = FaceGenerator.load(tiny_folder, device="cpu", engine="torch", precision="bf16")
    together = fast.generate(PROMPT, num_images=2, num_inference_steps=4, seed=3)
    alone = fast.generate(PROMPT, num_images=1, num_inference_steps=4, seed=4)
    exact = faces.generate(PROMPT, num_images=2, num_inference_steps=4, seed=3)
    assert difference(together[1].pixels, alone[0].pixels) <= 1
    assert 0 < np.abs(together[0].pixels.astype(float) - exact[0].pixels).mean() < 3


def test_a_missing_or_damaged_folder_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="not a model folder"):
        FaceGenerator.load(tmp_path / "nowhere", device="cpu", engine="torch")
    damaged = tmp_path / "damaged"
    for path in tiny_folder.rglob("*"):
        if path.is_file():
            copy = damaged / path.relative_to(tiny_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    weights = damaged / "unet" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelFolderError, match="does not match"):
        FaceGenerator.load(damaged, device="cpu", engine="torch")


def test_the_bundled_model_draws_faces_not_noise(bundled: FaceGenerator) -> None:
    pictures = bundled.generate(PROMPT, num_images=2, num_inference_steps=8, seed=10)
    alone = bundled.generate(PROMPT, num_images=1, num_inference_steps=8, seed=11)
    assert difference(pictures[1].pixels, alone[0].pixels) <= 1
    for picture in pictures:
        pixels = picture.pixels.astype(float)
        neighbours = np.corrcoef(pixels[:, 1:].ravel(), pixels[:, :-1].ravel())[0, 1]
        assert find(picture.pixels).found
        middle = pixels[48:96, 44:84].mean((0, 1))
        assert neighbours > 0.9 and middle[0] > middle[2]  # smooth, with skin in the middle

    z = np.frombuffer(alone[0].latent, "<f4").reshape(1, *bundled.info.latent_shape)
    asked = [GenerationRequest(PROMPT, 1, 8, seed=11), GenerationRequest("an old man with a hat", 2, 6,
                                                                         sampler="Euler a"),
             GenerationRequest("a young woman with bangs", 1, 10, seed=5, guidance_scale=1.0, sampler="UniPC"),
             GenerationRequest("a man", 1, 7, seed=8, negative_prompt="glasses", sampler="DDPM", latents=z, start=0.3)]
    together = finish(bundled, [bundled.start(request) for request in asked])
    assert_same(together[0], [replace(alone[0], index=0)])
    for request, pictures in zip(asked[1:], together[1:], strict=True):
        assert_same(pictures, finish(bundled, [bundled.start(request)])[0])
    copy = bundled.decode(bundled.encode(alone[0].pixels))  # there and back: nearly the same face
    assert np.abs(copy.astype(float) - alone[0].pixels).mean() < 4


def test_words_are_read_once(faces: FaceGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    encode = faces.clip.encode_text

    def counting(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        read.append("once more")
        return encode(ids, mask)

    monkeypatch.setattr(faces.clip, "encode_text", counting)
    monkeypatch.setattr(faces, "_encoded_prompts", {})
    first = faces.generate("an old man with a hat", num_inference_steps=1, seed=4)[0]
    again = faces.generate("an old man with a hat", num_inference_steps=1, seed=4)[0]
    assert len(read) == 1 and np.array_equal(first.pixels, again.pixels)
    for number in range(MAX_ENCODED_PROMPTS):
        faces.generate(f"a man {number}", num_inference_steps=1)
    assert len(read) == 1 + MAX_ENCODED_PROMPTS
    faces.generate("an old man with a hat", num_inference_steps=1)
    assert len(read) == 2 + MAX_ENCODED_PROMPTS  # forgotten by now
