"""Does what a sampler gets wrong in all images alike get measured, corrected, and left alone where it is not known?"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import conditional_ldm
import evaluate
from core.diffusion.conditioning import Condition
from core.diffusion.guidance import Guidance
from core.diffusion.latent_correction import (
    LatentCorrection,
    cross_spectrum,
    fit_correction,
    load_correction,
    save_correction,
)
from core.diffusion.sampling import Denoising
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.schedulers import SAMPLERS, make_scheduler, scheduler_config
from core.engine import GenerationRequest
from core.evaluation.generation import Sampling, generate_latents
from core.nn.checkpoint import load_component, read_index, save_component
from generator import FaceGenerator
from tests.support.training import Workplace, make_workplace


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gains(*values: float, channels: int = 4) -> Tensor:
    """Transports that only stretch: [1, k, 16, 9, C, C]."""
    still = torch.eye(channels, dtype=torch.complex64).expand(16, 9, -1, -1)
    return torch.stack([value * still for value in values])[None]


@pytest.fixture(scope="module")
def correction() -> LatentCorrection:
    """Of 2 and 8 steps, the same at every scale."""
    shift = torch.stack([seeded(4, 16, 16, seed=1), seeded(4, 16, 16, seed=2)])
    return LatentCorrection((1.0,), (2, 8), gains(1.5, 1.25), shift[None])


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, correction: LatentCorrection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a correction."""
    copy = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("corrected") / "tiny"))
    save_correction(correction, copy)
    return copy


@pytest.fixture(scope="module")
def corrected(folder: Path) -> FaceGenerator:
    return FaceGenerator.load(folder, device="cpu", engine="torch")


def test_what_was_taken_away_comes_back() -> None:
    """Latents shrunk, moved, blurred and mixed: their mean and their cross-spectrum become those of real images."""
    mixing = torch.eye(3) + 0.3 * seeded(3, 3, seed=5)
    photographs = torch.einsum("cd,nduv->ncuv", mixing, seeded(4000, 3, 8, 8)) + seeded(3, 8, 8, seed=1)
    other = torch.einsum("cd,nduv->ncuv", mixing, seeded(4000, 3, 8, 8, seed=2)) + seeded(3, 8, 8, seed=1)
    blurred = 0.5 * (other + 0.4 * other.roll(1, 2) + 0.2 * other.roll(1, 3)) + 0.2
    mixed = torch.einsum("cd,nduv->ncuv", torch.tensor([[0.7, 0.2, 0.0], [0.1, 0.8, 0.0], [0.0, 0.0, 0.5]]), blurred)
    found = fit_correction({2.0: {4: blurred, 2: mixed}, 1.0: {4: mixed, 2: blurred}}, photographs)
    assert found.scales == (1.0, 2.0) and found.steps == (2, 4) and found.transport.shape == (2, 2, 8, 5, 3, 3)
    wanted = cross_spectrum(photographs)
    for scale, count, latents in ((2.0, 4, blurred), (2.0, 2, mixed), (1.0, 4, mixed), (1.0, 2, blurred)):
        corrected = found(latents, count, [scale] * len(latents))
        assert float((cross_spectrum(latents) - wanted).abs().max()) > 0.3
        assert torch.allclose(corrected.mean(0), photographs.mean(0), atol=1e-4)
        assert float((cross_spectrum(corrected) - wanted).abs().max()) < 0.1  # faint power is not told from none
    for wrong in ({}, {1.0: {}}, {1.0: {0: blurred}}, {1.0: {4: blurred}, 2.0: {4: blurred[:1]}}):
        with pytest.raises(ValueError, match="at least two latents"):
            fit_correction(wrong, photographs)
    with pytest.raises(ValueError, match="the same numbers of steps"):
        fit_correction({1.0: {4: blurred, 2: mixed}, 2.0: {4: blurred}}, photographs)


def test_what_needs_no_mending_stays_as_it_is() -> None:
    """Of all ways to the right statistics the least change: none, and one number where one number is what is wrong."""
    photographs = seeded(500, 2, 4, 4)
    same = fit_correction({1.0: {4: photographs, 2: 0.5 * photographs}}, photographs)
    x = seeded(3, 2, 4, 4, seed=1)
    assert torch.allclose(same(x, 4, [1.0] * 3), x, atol=1e-4)
    assert torch.allclose(same(x, 2, [1.0] * 3), 2 * x, rtol=0.01, atol=0.01)


def test_between_the_measured_numbers_it_is_in_between_and_beyond_them_it_stays(correction: LatentCorrection) -> None:
    x, scales = seeded(2, 4, 16, 16), [1.0, 7.0]

    def corrected(gain: float, shift: Tensor) -> Tensor:
        return gain * x + shift

    shift = correction.shift[0]
    assert torch.allclose(correction(x, 2, scales), corrected(1.5, shift[0]), atol=1e-5)
    assert torch.allclose(correction(x, 4, scales), corrected(1.375, shift.mean(0)), atol=1e-5)  # by logarithms
    for count in (8, 9, 50, 1000):
        assert torch.allclose(correction(x, count, scales), corrected(1.25, shift[1]), atol=1e-5)
    assert torch.equal(correction(x, 1, scales), correction(x, 2, scales))
    gains = [float(correction.at(count, 2.0)[0].diagonal(dim1=-2, dim2=-1).real.mean()) for count in range(1, 20)]
    assert all(a >= b for a, b in zip(gains, gains[1:], strict=False))
    assert correction(x.half(), 4, scales).dtype == torch.float16


def test_each_picture_is_mended_by_its_own_guidance() -> None:
    shift = seeded(2, 2, 4, 16, 16, seed=1)
    both = LatentCorrection((1.0, 3.0), (2, 8), torch.cat([gains(1.5, 1.25), gains(1.1, 0.9)]), shift)
    x, scales = seeded(5, 4, 16, 16), [0.0, 1.0, 2.0, 3.0, 7.0]
    corrected = both(x, 2, scales)
    for row, (gain, own) in enumerate([(1.5, shift[0, 0]), (1.5, shift[0, 0]), (1.3, shift[:, 0].mean(0)),
                                       (1.1, shift[1, 0]), (1.1, shift[1, 0])]):
        assert torch.allclose(corrected[row], gain * x[row] + own, atol=1e-5)
    middle = both(x[:1], 4, [2.0])  # half the way along both
    assert torch.allclose(middle, 1.1875 * x[:1] + shift.mean((0, 1)), atol=1e-5)
    condition = Condition(torch.zeros(2, 1, 4), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 4),
                          torch.full((2,), 128.0), torch.tensor([False, True]))
    assert Guidance(condition, 2.0).scales == [2.0, 1.0]  # nothing to be guided towards
    assert Guidance(condition, 2.0, negative=condition).scales == [2.0, 2.0]
    text = replace(condition, null=torch.tensor([False, False]))
    assert Guidance(condition, 2.0, target=text, weights=(0.5, 0.5)).scales == [2.0, 1.5]  # half the way to a text
    assert Guidance(condition, 2.0, target=text, weights=(1.0, 1.0)).scales == Guidance(text, 2.0).scales == [2.0, 2.0]


def test_it_survives_being_written(folder: Path, tiny_folder: Path, correction: LatentCorrection) -> None:
    found = load_correction(folder)
    assert found is not None and found.scales == (1.0,) and found.steps == (2, 8) and found.shift.dtype == torch.float32
    assert torch.allclose(found.shift, correction.shift, atol=2e-3)  # kept in half precision
    assert torch.allclose(found.transport, correction.transport, atol=2e-3)
    assert load_correction(tiny_folder) is None


def test_it_belongs_to_one_unet(folder: Path, tmp_path: Path) -> None:
    """Another UNet makes other mistakes: what was measured of the old one is not used."""
    copy = Path(shutil.copytree(folder, tmp_path / "other"))
    config, state = load_component(copy, "unet")
    name = next(iter(state))
    save_component(copy, "unet", state | {name: state[name] * 1.5}, config)
    assert load_correction(copy) is None


def test_one_of_an_earlier_version_is_not_used(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "older"))
    config, state = load_component(copy, "correction")
    older = {name: value for name, value in config.items() if name != "guidance_scales"}
    save_component(copy, "correction", {name: value[0] for name, value in state.items()}, older)
    assert load_correction(copy) is None


@pytest.mark.parametrize("name", SAMPLERS)
def test_whole_ways_of_the_default_sampler_are_mended_and_no_others(name: str, correction: LatentCorrection) -> None:
    schedule = NoiseSchedule()

    def end(start: float, mend: LatentCorrection | None) -> tuple[Tensor, Tensor]:
        generators = [torch.Generator().manual_seed(3)]
        job = Denoising(make_scheduler(name, scheduler_config(schedule)), seeded(1, 4, 16, 16), 4, schedule=schedule,
                        generators=generators, start=start, z=seeded(1, 4, 16, 16, seed=9),
                        correction=mend and partial(mend, scales=[2.0]))
        while not job.finished:
            x, _ = job.model_input()
            job.advance(0.1 * x)
        return job.x, job.denoised()

    for start in (0.0, 0.5):
        plain, (x, shown) = end(start, None)[0], end(start, correction)
        if name == SAMPLERS[0] and start == 0:
            assert torch.allclose(x, correction(plain, 4, [2.0])) and not torch.allclose(x, plain)
            assert torch.equal(shown, x)  # what is shown at last is the image
        else:
            assert torch.equal(x, plain)


def test_pictures_change_and_what_stays_of_photographs_does_not(corrected: FaceGenerator, faces: FaceGenerator) -> None:
    assert corrected.info.model_hash != faces.info.model_hash

    def alike(**request: Any) -> bool:
        return np.array_equal(*(drawer.generate("a smiling woman", seed=3, **request)[0].pixels
                                for drawer in (corrected, faces)))

    assert not alike(num_inference_steps=3) and not alike(num_inference_steps=20)
    assert alike(num_inference_steps=3, sampler="DDIM")  # as inversions are generated
    photograph = {"init_image": np.full((128, 128, 3), 90, np.uint8), "num_inference_steps": 4}
    assert alike(**photograph, strength=0.5)
    assert alike(**photograph, strength=1.0, mask=np.tri(128, dtype=bool))


def test_a_grid_is_drawn_as_the_server_draws(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def grid(model: Path, steps: str) -> bytes:
        out = tmp_path / "grid.png"
        assert conditional_ldm.main(["--eval", "--prompt", "a smiling woman", "--model", str(model), "--n-images", "2",
                                     "--n-inf-steps", steps, "--device", "cpu", "--out", str(out)]) == 0
        return out.read_bytes()

    assert grid(folder, "3") != grid(tiny_folder, "3")


def test_a_seed_is_its_picture_in_any_company(corrected: FaceGenerator) -> None:
    alone = corrected.generate("a smiling woman", num_inference_steps=4, seed=5)[0]
    runs = [corrected.start(GenerationRequest("a smiling woman", 1, 4, seed=5)),
            corrected.start(GenerationRequest("", 2, 7)),
            corrected.start(GenerationRequest("", 1, 4, sampler="DDIM"))]
    while any(not run.finished for run in runs):
        corrected.step(runs)
    assert np.abs(corrected.pictures(runs[0])[0].pixels.astype(int) - alone.pixels).max() <= 1


def test_the_command_measures_and_releases_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place: Workplace = make_workplace(tmp_path / "work", count=40)
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    words = ["--fit-correction", "3,2", "--data", str(place.store), "--model", str(folder), "--samples", "6",
             "--device", "cpu", "--replace"]
    assert evaluate.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    ways = report["guidance_scales"]
    own = read_index(folder)["defaults"]["guidance_scale"]
    assert list(ways) == ["1", f"{own:g}", f"{2 * own:g}"] and report["n"] == 6
    assert all(set(way) == {"2", "3"} and way["2"]["strongest"] > 0 for way in ways.values())
    first = load_correction(folder)
    assert first is not None and first.scales == (1.0, own, 2 * own) and first.steps == (2, 3)
    assert bool(torch.isfinite(first.shift).all())
    assert evaluate.main(words) == 0  # measured without what it corrects, so the same again
    again = load_correction(folder)
    assert again is not None and torch.equal(first.shift, again.shift) and torch.equal(first.transport, again.transport)
    faces = FaceGenerator.load(folder, device="cpu", engine="torch")
    assert faces.correction is not None
    requests = Sampling(2, 2.0, seed=1).requests(["a face"])
    latents, faces.correction = generate_latents(faces, requests), None
    assert not np.array_equal(latents, generate_latents(faces, requests))
    with pytest.raises(SystemExit):
        evaluate.main([*words[:1], "two", *words[2:]])
