"""Are many faces generated for a measurement the ones that a user gets, whatever they share their steps with?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from core.engine import GenerationRequest, JobError
from core.evaluation.generation import Sampling, finished_runs, generate_images, generate_latents, reconstruct
from core.evaluation.sample_grids import image_grid, save_pairs
from generator import FaceGenerator

PROMPTS = ("a smiling woman", "", "a bald man with glasses", "a smiling woman", "an old man")


def test_requests_differ_in_prompt_and_seed_alone() -> None:
    found = Sampling(7, 2.5, "DDIM", seed=3).requests(PROMPTS)
    assert [(one.prompt, one.seed) for one in found] == list(zip(PROMPTS, range(3, 8), strict=True))
    assert {(one.num_images, one.num_inference_steps, one.guidance_scale, one.sampler, one.watermark)
            for one in found} == {(1, 7, 2.5, "DDIM", False)}  # fmt: skip
    marked = Sampling(7).requests(PROMPTS[:2], [9, 9], watermark=True)
    assert [(one.seed, one.guidance_scale, one.watermark) for one in marked] == [(9, None, True)] * 2
    with pytest.raises(ValueError, match="zip"):
        Sampling(7).requests(PROMPTS, [1])


@pytest.mark.parametrize("at_once", [1, 2, 32])
def test_measured_faces_are_those_that_users_get(faces: FaceGenerator, at_once: int) -> None:
    sampling = Sampling(3, seed=5)
    images = generate_images(faces, sampling.requests(PROMPTS, watermark=True), at_once)
    latents = generate_latents(faces, sampling.requests(PROMPTS), at_once)
    assert latents.dtype == np.float16 and latents.shape == (len(PROMPTS), *faces.info.latent_shape)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = faces.generate(prompt, num_inference_steps=3, seed=5 + i)
        assert np.abs(images[i].astype(int) - alone.pixels).max() <= 1
        latent = np.frombuffer(alone.latent, "<f4").reshape(latents[i].shape)
        assert np.abs(latents[i] - latent).max() < 0.01


def test_requests_of_several_images_and_lengths_keep_their_order(faces: FaceGenerator) -> None:
    asked = [GenerationRequest("a man", 2, 4, seed=1), GenerationRequest("a woman", 1, 2, seed=8,
                                                                         attributes={"Smiling": 1.0})]
    images = generate_images(faces, asked)
    apart = [faces.generate("a man", num_images=2, num_inference_steps=4, seed=1),
             faces.generate("a woman", num_inference_steps=2, seed=8, attributes={"Smiling": 1.0})]
    expected = np.stack([one.pixels for pictures in apart for one in pictures])
    assert images.shape == expected.shape and np.abs(images.astype(int) - expected).max() <= 1


def test_a_run_that_fails_ends_the_measurement(faces: FaceGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "denoise", lambda x, timestep, condition: torch.full_like(x, float("nan")))
    with pytest.raises(JobError, match="No image came out"):
        list(finished_runs(faces, Sampling(2).requests(PROMPTS)))


def test_reconstructions_are_those_of_the_vae(faces: FaceGenerator) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    copies = reconstruct(faces.vae, pixels, batch=2)
    expected = np.stack([faces.decode(faces.encode(one)) for one in pixels])
    assert copies.shape == pixels.shape and np.abs(copies.astype(int) - expected).max() <= 1


def test_grids_have_rows_of_so_many_pictures(tmp_path) -> None:
    pictures = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
    sheet = np.asarray(image_grid(pictures, 3))
    assert sheet.shape == (8, 18, 3)
    assert sheet[0, ::6, 0].tolist() == [0, 10, 20] and sheet[4, ::6, 0].tolist() == [30, 40, 255]
    assert np.asarray(image_grid(pictures[:1], 3)).tolist() == pictures[0].tolist()
    save_pairs(pictures[:2], pictures[2:4], tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as pairs:
        assert np.asarray(pairs)[0, ::6, 0].tolist() == [0, 20, 10, 30]
