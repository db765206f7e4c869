"""Does a Stable Diffusion of other people generate what its own pipeline generates, and keep the engine's promises?"""

from __future__ import annotations

import io
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from core.engine import Engine, GenerationRequest, Interpolation, JobError
from core.imaging.png_metadata import read_request
from core.imaging.watermark import mark
from core.pretrained.batch import text_weights
from core.pretrained.engine import PretrainedEngine, smooth_fields
from tests.support.tiny_stable_diffusion import SIZE, TinyStableDiffusion

SCHEDULERS = {"DDIM": "DDIMScheduler", "UniPC": "UniPCMultistepScheduler", "Euler": "EulerDiscreteScheduler",
              "DPM++ 2M": "DPMSolverMultistepScheduler", "DDPM": "DDPMScheduler",
              "Euler a": "EulerAncestralDiscreteScheduler"}
EXACT = 1e-4
PROMPT, NEGATIVE = "a smiling woman with blond hair", "a man with a beard"


def finish(engine: PretrainedEngine, *requests: GenerationRequest) -> list[np.ndarray]:
    """The latents of requests that step together, [B, C, h, w] each."""
    runs = [engine.start(request) for request in requests]
    while any(not run.finished for run in runs):
        engine.step(runs)
    assert [run.error for run in runs] == [None] * len(runs)
    return [run.trajectory.x.numpy() for run in runs]


def generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def portrait(seed: int = 0) -> np.ndarray:
    """A smooth random image, uint8 [64, 64, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def test_it_is_an_engine(drawer: PretrainedEngine) -> None:
    engine: Engine = drawer
    assert engine.info.kind == "stable-diffusion" and not engine.on_idle()


def test_three_formats_draw_the_same_pictures(tiny: TinyStableDiffusion) -> None:
    request = GenerationRequest(PROMPT, 2, 4, seed=7)
    drawn = [[picture.pixels for picture in PretrainedEngine.load(path, "cpu", image_size=SIZE).generate(request)]
             for path in (tiny.folder, tiny.safetensors, tiny.ckpt)]
    assert np.ptp(drawn[0][0]) > 50 and not np.array_equal(*drawn[0])
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
def test_latents_are_those_of_the_pipeline(tiny: TinyStableDiffusion, drawer: PretrainedEngine, sampler: str) -> None:
    pipeline = tiny.pipeline
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(tiny.scheduler_config)
    expected = pipeline([PROMPT] * 2, num_inference_steps=7, guidance_scale=6.0, negative_prompt=[NEGATIVE] * 2,
                             generator=generators(3, 2), height=SIZE, width=SIZE, output_type="latent").images
    (found,) = finish(drawer, GenerationRequest(PROMPT, 2, 7, 3, 6.0, NEGATIVE, sampler))
    assert np.abs(found - expected.numpy()).max() <= EXACT
    (other,) = finish(drawer, GenerationRequest("an old man", 2, 7, 3, 6.0, NEGATIVE, sampler))
    assert np.abs(found - other).max() > 100 * EXACT


@pytest.mark.parametrize("sampler", list(SCHEDULERS)[:4])
def test_image_to_image_is_that_of_the_pipeline(
    tiny: TinyStableDiffusion, drawer: PretrainedEngine, sampler: str
) -> None:
    parts = tiny.pipeline.components
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(tiny.scheduler_config)
    picture = portrait()
    z = torch.from_numpy(drawer.encode(picture))[None].expand(2, -1, -1, -1)  # the pipeline would sample the posterior
    expected = pipeline([PROMPT] * 2, image=z, strength=0.6, num_inference_steps=10, guidance_scale=6.0,
                             negative_prompt=[NEGATIVE] * 2, generator=generators(3, 2), output_type="latent").images
    (found,) = finish(drawer,
                      GenerationRequest(PROMPT, 2, 10, 3, 6.0, NEGATIVE, sampler, init_image=picture, strength=0.6))
    assert np.abs(found - expected.numpy()).max() <= EXACT


def test_encode_is_the_mean_of_the_pipelines_posterior(tiny: TinyStableDiffusion, drawer: PretrainedEngine) -> None:
    picture = portrait(1)
    images = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = tiny.pipeline.vae.encode(images).latent_dist.mean * tiny.pipeline.vae.config.scaling_factor
    assert np.abs(drawer.encode(picture) - expected[0].numpy()).max() < 1e-5
    assert drawer.decode(drawer.encode(picture)).shape == (SIZE, SIZE, 3)


def test_requests_of_every_kind_together_draw_what_each_draws_alone(drawer: PretrainedEngine) -> None:
    requests = [
        GenerationRequest(PROMPT, 2, 6, 1, sampler="DDIM"),
        GenerationRequest("an old man", 1, 3, 2, 1.0, sampler="Euler a"),
        GenerationRequest("", 1, 5, 3, 4.0, sampler="UniPC"),
        GenerationRequest(PROMPT, 1, 9, 4, 0.0, NEGATIVE, "DPM++ 2M SDE"),
        GenerationRequest("a girl", 1, 4, 5, init_image=portrait(), strength=0.5),
        GenerationRequest("a girl", 3, 4, 5, interpolate_to=Interpolation("a boy", seed=9), sampler="DPM++ 2M"),
    ]
    together = finish(drawer, *requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = finish(drawer, request)
        assert np.abs(found - alone).max() < EXACT * max(1, np.abs(alone).max() / 4)  # 4: as far as real latents go


def test_one_call_of_the_network_serves_all_runs(drawer: PretrainedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, unet = [], drawer._parts.unet
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda x, *rest, **named: rows.append(len(x)) or forward(x, *rest, **named))
    finish(drawer, GenerationRequest(PROMPT, 1, 2), GenerationRequest("a man", 2, 4, guidance_scale=1.0))
    assert rows == [4, 4, 2, 2]  # two for guidance and two without; then the shorter one is finished


def test_guidance_holds_in_its_interval_alone(drawer: PretrainedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, unet = [], drawer._parts.unet
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda x, *rest, **named: rows.append(len(x)) or forward(x, *rest, **named))

    def latents(scale: float, interval: tuple[float, float] | None) -> np.ndarray:
        rows.clear()
        (found,) = finish(drawer, GenerationRequest(PROMPT, 1, 10, 3, scale, NEGATIVE, guidance_interval=interval))
        return found

    part = latents(6.0, (0.3, 0.6))
    assert rows == [1, 1, 1, 2, 2, 2, 1, 1, 1, 1]
    whole, never = latents(6.0, (0.0, 1.0)), latents(6.0, (0.5, 0.5))
    assert np.array_equal(whole, latents(6.0, None)) and np.array_equal(never, latents(1.0, None))
    assert not np.allclose(part, whole, atol=100 * EXACT) and not np.allclose(part, never, atol=100 * EXACT)
    request = GenerationRequest(PROMPT, 1, 5, 3, 6.0, NEGATIVE, guidance_interval=(0.2, 0.7))
    (picture,) = drawer.generate(request)
    assert picture.assessment["evaluations"] == 5 + 3
    assert read_request(picture.png)["request"]["guidance_interval"] == [0.2, 0.7]


def test_image_i_depends_on_seed_plus_i_alone(drawer: PretrainedEngine) -> None:
    for sampler in ("DDIM", "Euler a", "DPM++ 2M SDE"):
        (several,) = finish(drawer, GenerationRequest(PROMPT, 3, 4, seed=10, sampler=sampler))
        (one,) = finish(drawer, GenerationRequest(PROMPT, 1, 4, seed=12, sampler=sampler))
        assert np.abs(several[2] - one[0]).max() < EXACT


def test_rows_of_equal_texts_are_one() -> None:
    assert text_weights("a", "b", 7.5) == {"a": 7.5, "b": -6.5}
    assert text_weights("a", "b", 1.0) == {"a": 1.0}
    assert text_weights("a", "b", 0.0) == {"b": 1.0}
    assert text_weights("", "", 7.5) == {"": 1.0}
    assert text_weights("a", "", 2.0, "b", 0.25) == {"a": 1.5, "": -1.0, "b": 0.5}
    assert text_weights("a", "", 2.0, "b", 1.0) == {"": -1.0, "b": 2.0}


def test_interpolation_and_variation_meet_their_ends(drawer: PretrainedEngine) -> None:
    to = Interpolation("an old man", seed=8)
    (trajectory,) = finish(drawer, GenerationRequest(PROMPT, 3, 3, seed=7, interpolate_to=to))
    (first,), (last,) = finish(drawer, GenerationRequest(PROMPT, 1, 3,
                                                         7)), finish(drawer, GenerationRequest("an old man", 1, 3, 8))
    assert np.abs(trajectory[0] - first[0]).max() < EXACT and np.abs(trajectory[2] - last[0]).max() < EXACT
    assert np.abs(trajectory[1] - first[0]).max() > 0.1 and np.abs(trajectory[1] - last[0]).max() > 0.1
    (varied,) = finish(drawer, GenerationRequest(PROMPT, 2, 3, 7, variation_strength=1.0, variation_seed=20))
    (others,) = finish(drawer, GenerationRequest(PROMPT, 2, 3, 20))
    assert np.abs(varied - others).max() < EXACT


def test_latents_go_in_and_come_out(drawer: PretrainedEngine) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    request = GenerationRequest(PROMPT, 2, 3, 1, sampler="DDIM", latents=noise)
    (one,), (again,) = finish(drawer, request), finish(drawer, replace(request, seed=2))
    assert np.array_equal(one, again)
    pictures = drawer.generate(request)
    assert np.array_equal(np.frombuffer(pictures[1].latent, "<f4").reshape(4, 8, 8), one[1])
    (kept,) = finish(drawer, GenerationRequest(PROMPT, 2, 5, latents=noise, start=1.0))
    assert np.array_equal(kept, noise)


@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "DPM++ 2M"])
def test_protected_pixels_stay_byte_for_byte(drawer: PretrainedEngine, sampler: str) -> None:
    picture, mask = portrait(2), np.zeros((SIZE, SIZE), bool)
    mask[:, 40:] = True
    request = GenerationRequest(PROMPT, 1, 6, 5, sampler=sampler, init_image=picture, mask=mask, strength=1.0)
    (drawn,) = drawer.generate(request)
    assert np.array_equal(drawn.pixels[~mask], picture[~mask])
    assert not np.array_equal(drawn.pixels[mask], picture[mask])
    (z,) = finish(drawer, request)
    kept = drawer.encode(picture)
    assert np.abs(z[0] - kept)[:, :, :3].max() < 0.15 < np.abs(z[0] - kept)[:, :, 6:].max()  # DDIM ends with some noise


def test_inversion_finds_noise_that_draws_the_picture(drawer: PretrainedEngine) -> None:
    picture = portrait(3)
    search = drawer.inversion(picture, PROMPT)
    while not search.finished:
        search.advance(10)
    (z,) = finish(drawer,
                  GenerationRequest(PROMPT, 1, 50, guidance_scale=1.0, sampler="DDIM", latents=search.latent[None]))
    (other,) = finish(drawer, GenerationRequest(PROMPT, 1, 50, seed=1, guidance_scale=1.0, sampler="DDIM"))
    expected = drawer.encode(picture)
    # a random network is rough, so the way back is not exact; from any other noise the error is 400 times as large
    assert np.abs(z[0] - expected).mean() < 0.01 * np.abs(other[0] - expected).mean()


def test_pictures_say_how_they_came_about_and_carry_the_mark(drawer: PretrainedEngine) -> None:
    request = GenerationRequest(PROMPT, 2, 3, seed=40, negative_prompt=NEGATIVE)
    marked = drawer.generate(request)
    plain = drawer.generate(replace(request, watermark=False))
    for one, other in zip(marked, plain, strict=True):
        assert np.array_equal(one.pixels, mark(other.pixels)) and not np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(one.png))), one.pixels)
    found = read_request(marked[1].png)
    assert found["exact"] and found["model_hash"] == drawer.info.model_hash and found["watermark"] == 1
    parameters = found["request"]
    again = drawer.generate(GenerationRequest(parameters["prompt"], 1, parameters["n_inf_steps"], parameters["seed"],
                                              parameters["guidance_scale"], parameters["negative_prompt"],
                                              parameters["sampler"]))
    assert np.abs(again[0].pixels.astype(int) - marked[1].pixels).max() <= 1  # other batches round otherwise
    assert marked[0].assessment["evaluations"] == 6


def test_previews_are_the_nearest_linear_map(drawer: PretrainedEngine) -> None:
    """Nearer to the fields that it was fitted to than one colour is, as far as an untrained VAE lets colours pass."""
    fields = list(smooth_fields())
    with torch.inference_mode():
        shown = torch.cat([drawer._preview.levels(drawer._encode(images)) for images in fields]).numpy()
    expected = (torch.cat(fields).permute(0, 2, 3, 1).numpy() + 1) * 127.5
    alone = np.square(expected - expected.mean((0, 1, 2))).mean()
    assert np.square(shown - expected).mean() < 0.98 * alone
    running = drawer.start(GenerationRequest(PROMPT, 2, 4, 6))
    drawer.step([running])
    assert [one.seed for one in drawer.previews(running)] == [6, 7]
    with pytest.raises(ValueError, match="no images yet"):
        drawer.pictures(running)


def test_out_of_memory_halves_the_batch(tiny: TinyStableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PretrainedEngine.load(tiny.folder, "cpu")
    (expected,) = finish(engine, GenerationRequest(PROMPT, 3, 2, 5))
    rows, unet = [], engine._parts.unet
    forward = unet.forward

    def small(x: torch.Tensor, *rest: object, **named: object) -> object:
        rows.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(x, *rest, **named)

    monkeypatch.setattr(unet, "forward", small)
    (found,) = finish(engine, GenerationRequest(PROMPT, 3, 2, 5))
    # of latents up to 30: the noise of few steps is all still there
    assert np.abs(found - expected).max() < 10 * EXACT
    assert rows == [6, 3, 1, 2, 3, 1, 2, 2, 2, 2]  # the second step begins with what fitted


def test_what_does_not_fit_even_alone_fails_its_run_only(tiny: TinyStableDiffusion, monkeypatch: pytest.MonkeyPatch,
                                                        ) -> None:
    engine = PretrainedEngine.load(tiny.folder, "cpu")
    fine, doomed = engine.start(GenerationRequest(PROMPT, 1, 2, 5, 1.0)), engine.start(GenerationRequest("b", 1, 3, 6,
                                                                                                         1.0))
    forward = engine._parts.unet.forward
    big = engine._encoded_prompts["b"]

    def small(x: torch.Tensor, t: torch.Tensor, texts: torch.Tensor, **named: object) -> object:
        if any(torch.equal(one, big) for one in texts):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(x, t, texts, **named)

    monkeypatch.setattr(engine._parts.unet, "forward", small)
    while not (fine.finished and doomed.finished):
        engine.step([fine, doomed])
    assert fine.error is None and len(engine.pictures(fine)) == 1
    assert isinstance(doomed.error, JobError) and doomed.error.code == "out_of_memory"


def test_nan_fails_its_run_only(drawer: PretrainedEngine) -> None:
    bad = np.full((1, 4, 8, 8), 1e30, np.float32)
    broken, fine = drawer.start(GenerationRequest(PROMPT, 1, 2, latents=bad)), drawer.start(GenerationRequest(PROMPT, 1,
                                                                                                              3))
    while not (fine.finished and broken.finished):
        drawer.step([broken, fine])
    assert broken.error is not None and broken.error.code == "not_finite"
    with pytest.raises(JobError, match="No image came out"):
        drawer.pictures(broken)
    assert len(drawer.pictures(fine)) == 1


@pytest.mark.parametrize("wrong, told", [
    ({"attributes": {"Smiling": 1.0}}, "cannot follow attributes"),
    ({"candidates": 4}, "cannot follow candidates"),
    ({"balance": True, "candidates": 4}, "cannot follow balance and candidates"),
    ({"guidance_interval": (0.8, 0.2)}, "guidance_interval must be two shares"),
    ({"sampler": "Turbo"}, "sampler 'Turbo' is not"),
    ({"num_inference_steps": 0}, "must be at least 1"),
    ({"mask": np.ones((64, 64), bool)}, "needs an init_image"),
    ({"init_image": np.zeros((32, 32, 3), np.uint8)}, "pixels must be uint8"),
    ({"latents": np.zeros((1, 4, 9, 8))}, "latents must have shape"),
])
def test_what_cannot_be_drawn_is_said(drawer: PretrainedEngine, wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        drawer.start(GenerationRequest(**{"prompt": PROMPT, **wrong}))


def test_how_far_a_long_prompt_is_read(drawer: PretrainedEngine) -> None:
    short = "a smiling woman"
    assert drawer.info.encoded_length(short) == len(short)
    long = "smiling " * 100
    cut = drawer.info.encoded_length(long)
    assert 0 < cut < len(long)
    with torch.inference_mode():
        assert torch.equal(drawer._encode_prompt(long[:cut]), drawer._encode_prompt(long[:cut] + " beard and glasses"))
        assert not torch.equal(drawer._encode_prompt(long[: cut - 8]), drawer._encode_prompt(long[:cut]))


def test_other_sizes_are_drawn(tiny: TinyStableDiffusion) -> None:
    engine = PretrainedEngine.load(tiny.safetensors, "cpu", image_size=128)
    assert engine.info.latent_shape == (4, 16, 16)
    (picture,) = engine.generate(GenerationRequest(PROMPT, 1, 2))
    assert picture.pixels.shape == (128, 128, 3)
