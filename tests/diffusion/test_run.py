"""Does a request begin as it says: with defaults filled in, and guided during the steps that it names?

On a tiny model of real networks with untrained weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from core.diffusion.run import Phase, Run, check, mean_scales
from core.engine import GenerationRequest
from core.imaging.png_metadata import read_request
from generator import FaceGenerator

PROMPT = "a smiling woman with blond hair"
GUIDED = {"guidance_scale": 4.0, "negative_prompt": "a man", "attributes": {"Young": 1.5}}


def trajectory(faces: FaceGenerator, **options: Any) -> tuple[Run, list[np.ndarray]]:
    """A finished run of ten steps, and its latents before the first and after every step."""
    run = faces.start(GenerationRequest(**{"prompt": PROMPT, "num_inference_steps": 10, "seed": 3, **options}))
    found = [run.denoising.x.numpy().copy()]
    while not run.finished:
        faces.step([run])
        found.append(run.denoising.x.numpy().copy())
    return run, found


def test_defaults_are_filled_in(faces: FaceGenerator) -> None:
    found = check(GenerationRequest(PROMPT, attributes={"Young": 0.0, "Smiling": 1}), faces.info)
    info = faces.info
    assert (found.sampler, found.guidance_scale) == (info.default_sampler, info.default_guidance_scale)
    assert found.attributes == {"Smiling": 1} and found.guidance_interval is None
    picture, mask = np.zeros((128, 128, 3), np.uint8), np.ones((128, 128), bool)
    assert check(GenerationRequest(PROMPT, init_image=picture), info).strength == 0.6
    assert check(GenerationRequest(PROMPT, init_image=picture, mask=mask), info).strength == 1.0


def test_outside_of_its_interval_nothing_is_guided(faces: FaceGenerator) -> None:
    """Measured at the network: rows of each step, and latents that are those of the unguided run until it begins."""
    rows: list[int] = []
    with faces.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]))):
        run, found = trajectory(faces, **GUIDED, guidance_interval=(0.3, 0.6))
    assert rows == [1, 1, 1, 4, 4, 4, 1, 1, 1, 1]  # wanted, negative, and two of the slider
    assert run.evaluations == [sum(rows)]
    _, unguided = trajectory(faces, guidance_scale=1.0)
    assert [np.array_equal(one, other) for one, other in zip(found, unguided, strict=True)] == [True] * 4 + [False] * 7
    never, nowhere = trajectory(faces, **GUIDED, guidance_interval=(0.5, 0.5))
    assert all(np.array_equal(one, other) for one, other in zip(nowhere, unguided, strict=True))
    assert never.evaluations == [10]


def test_an_interval_of_all_steps_is_none(faces: FaceGenerator) -> None:
    usual, found = trajectory(faces, **GUIDED)
    whole, same = trajectory(faces, **GUIDED, guidance_interval=[0, 1])
    assert all(np.array_equal(one, other) for one, other in zip(found, same, strict=True))
    assert whole.parameters == usual.parameters and "guidance_interval" not in whole.parameters[0]


@pytest.mark.parametrize(("interval", "rows"), [
    ((0.0, 0.3), [2] * 3 + [1] * 7), ((0.7, 1.0), [1] * 7 + [2] * 3), ((0.35, 0.45), [1] * 4 + [2] + [1] * 5),
    ((1.0, 1.0), [1] * 10), ((0.0, 0.0), [1] * 10),
])
def test_steps_are_in_it_when_they_begin_in_it(
    faces: FaceGenerator, interval: tuple[float, float], rows: list[int]
) -> None:
    run = faces.start(GenerationRequest(PROMPT, num_inference_steps=10, guidance_scale=4.0, guidance_interval=interval))
    found = []
    while not run.finished:
        found.append(run.guidance.num_passes[0])
        faces.step([run])
    assert found == rows


def test_beside_others_and_from_its_png_it_is_the_same_picture(faces: FaceGenerator) -> None:
    request = GenerationRequest(PROMPT, 2, 6, seed=4, guidance_scale=5.0, guidance_interval=(0.2, 0.7))
    runs = [faces.start(one) for one in (GenerationRequest("an old man", 1, 9, seed=2), request)]
    while not all(run.finished for run in runs):
        faces.step(runs)
    together = faces.pictures(runs[1])
    told = read_request(together[1].png)["request"]
    assert told["guidance_interval"] == [0.2, 0.7]
    (again,) = faces.generate(told["prompt"], num_inference_steps=told["n_inf_steps"], seed=told["seed"],
                              guidance_scale=told["guidance_scale"], guidance_interval=told["guidance_interval"])
    assert np.abs(again.pixels.astype(int) - together[1].pixels).max() <= 1
    (whole,) = faces.generate(PROMPT, num_inference_steps=6, seed=5, guidance_scale=5.0)
    assert np.abs(whole.pixels.astype(int) - together[1].pixels).max() > 1


@pytest.mark.parametrize("interval", [(0.6, 0.3), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_what_is_no_interval_is_refused(faces: FaceGenerator, interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="guidance_interval must be two shares of the steps from 0 to 1, in order"):
        faces.start(GenerationRequest(PROMPT, guidance_interval=interval))


def test_latents_are_corrected_for_the_mean_scale(faces: FaceGenerator) -> None:
    run = faces.start(GenerationRequest(PROMPT, 2, 10, guidance_scale=5.0, guidance_interval=(0.2, 0.5), balance=False))
    assert [phase.first for phase in run.phases] == [0, 2, 5]
    assert mean_scales(run.phases, 10) == pytest.approx([1 + 4 * 0.3] * 2)
    (steady,) = faces.start(GenerationRequest(PROMPT, 1, 7, guidance_scale=0.1 + 0.2)).phases
    assert mean_scales([steady, Phase(3, steady.guidance)], 7) == steady.guidance.scales  # to the last digit
    assert steady.guidance.scales == torch.tensor([0.1 + 0.2]).tolist()
