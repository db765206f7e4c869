"""Does what few steps get wrong in all pictures alike get measured, mended, and left alone where it is not known?"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training import Workplace, make_workplace

import conditional_ldm
import evaluate
from core.checkpoint import load_component, save_component
from core.correction import Correction, fit_correction, load_correction, save_correction
from core.diffusion import SAMPLERS, Denoising, NoiseSchedule, make_scheduler, scheduler_config
from generator import DrawRequest, FaceGenerator


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def correction() -> Correction:
    return Correction((2, 8), torch.tensor([1.5, 1.25]), torch.stack([seeded(4, 16, 16, seed=1),
                                                                      seeded(4, 16, 16, seed=2)]))


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, correction: Correction, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a correction."""
    copy = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("corrected") / "tiny"))
    save_correction(correction, copy)
    return copy


@pytest.fixture(scope="module")
def mended(folder: Path) -> FaceGenerator:
    return FaceGenerator.load(folder, device="cpu", engine="torch")


def test_what_was_taken_away_comes_back() -> None:
    """Latents shrunk and moved, as few steps do it: their mean and spread become those of photographs."""
    photographs = seeded(400, 3, 4, 4) * 0.9 + seeded(3, 4, 4, seed=1)
    drawn = (seeded(300, 3, 4, 4, seed=2) * 0.9 + seeded(3, 4, 4, seed=1)) * 0.7 + 0.2
    found = fit_correction({4: drawn, 2: drawn * 0.5}, photographs)
    assert found.steps == (2, 4)
    assert torch.allclose(found.gain, torch.tensor([2 / 0.7, 1 / 0.7]), rtol=0.02)
    for count, latents in ((4, drawn), (2, drawn * 0.5)):
        corrected = found(latents, count)
        assert torch.allclose(corrected.mean(0), photographs.mean(0), atol=1e-5)
        assert float(corrected.var(0).mean()) == pytest.approx(float(photographs.var(0).mean()), rel=1e-5)
    same = fit_correction({4: photographs}, photographs)
    assert float(same.gain[0]) == pytest.approx(1) and float(same.shift.abs().max()) < 1e-5
    for wrong in ({}, {0: drawn}, {4: drawn[:1]}):
        with pytest.raises(ValueError, match="at least two latents"):
            fit_correction(wrong, photographs)


def test_between_the_measured_numbers_it_is_in_between_and_beyond_them_it_ends(correction: Correction) -> None:
    def gain(count: int) -> float:
        return correction.at(count)[0]

    assert gain(1) == gain(2) == 1.5 and gain(8) == 1.25
    assert gain(4) == pytest.approx(1.375)  # half way in the logarithm
    gains = [gain(count) for count in range(1, 20)]
    assert all(a >= b for a, b in zip(gains, gains[1:], strict=False)) and gain(15) > 1
    x = seeded(2, 4, 16, 16)
    for count in (16, 17, 50, 1000):
        assert correction.at(count) == (1.0, None) and correction(x, count) is x
    assert torch.allclose(correction(x, 2), 1.5 * x + correction.shift[0])
    assert torch.allclose(correction(x, 4), 1.375 * x + correction.shift.mean(0), atol=1e-6)


def test_it_survives_being_written(folder: Path, tiny_folder: Path, correction: Correction) -> None:
    found = load_correction(folder)
    assert found is not None and found.steps == (2, 8) and found.gain.dtype == torch.float32
    assert torch.allclose(found.shift, correction.shift, atol=2e-3)  # kept in half precision
    assert load_correction(tiny_folder) is None


def test_it_belongs_to_one_unet(folder: Path, tmp_path: Path) -> None:
    """Another UNet makes other mistakes: what was measured of the old one is not used."""
    copy = Path(shutil.copytree(folder, tmp_path / "other"))
    config, state = load_component(copy, "unet")
    name = next(iter(state))
    save_component(copy, "unet", state | {name: state[name] * 1.5}, config)
    assert load_correction(copy) is None


@pytest.mark.parametrize("name", SAMPLERS)
def test_whole_ways_of_the_default_sampler_are_mended_and_no_others(name: str, correction: Correction) -> None:
    schedule = NoiseSchedule()

    def end(start: float, mend: Correction | None) -> tuple[Tensor, Tensor]:
        generators = [torch.Generator().manual_seed(3)]
        job = Denoising(make_scheduler(name, scheduler_config(schedule)), seeded(1, 4, 16, 16), 4, schedule=schedule,
                        generators=generators, start=start, z=seeded(1, 4, 16, 16, seed=9), correction=mend)
        while not job.finished:
            x, _ = job.model_input()
            job.advance(0.1 * x)
        return job.x, job.denoised()

    for start in (0.0, 0.5):
        plain, (x, shown) = end(start, None)[0], end(start, correction)
        if name == SAMPLERS[0] and start == 0:
            assert torch.allclose(x, correction(plain, 4)) and not torch.allclose(x, plain)
            assert torch.equal(shown, x)  # what is shown at last is the picture
        else:
            assert torch.equal(x, plain)


def test_pictures_of_few_steps_change_and_of_many_do_not(mended: FaceGenerator, faces: FaceGenerator) -> None:
    assert mended.info.model_hash != faces.info.model_hash
    for count, alike in ((3, False), (16, True), (20, True)):
        one, other = (drawer.generate("a smiling woman", num_inference_steps=count, seed=3)[0]
                      for drawer in (mended, faces))
        assert np.array_equal(one.pixels, other.pixels) == alike
    edited = {"init_image": np.full((128, 128, 3), 90, np.uint8), "strength": 0.5, "num_inference_steps": 4}
    pixels = [drawer.generate("a smiling woman", **edited)[0].pixels for drawer in (mended, faces)]  # type: ignore[arg-type]
    assert np.array_equal(*pixels)  # a photograph needs no mending


def test_a_grid_is_drawn_as_the_server_draws(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def grid(model: Path, steps: str) -> bytes:
        out = tmp_path / "grid.png"
        assert conditional_ldm.main(["--eval", "--prompt", "a smiling woman", "--model", str(model), "--n-images", "2",
                                     "--n-inf-steps", steps, "--device", "cpu", "--out", str(out)]) == 0
        return out.read_bytes()

    assert grid(folder, "3") != grid(tiny_folder, "3") and grid(folder, "16") == grid(tiny_folder, "16")


def test_a_seed_is_its_picture_in_any_company(mended: FaceGenerator) -> None:
    alone = mended.generate("a smiling woman", num_inference_steps=4, seed=5)[0]
    runs = [mended.begin(DrawRequest("a smiling woman", 1, 4, seed=5)), mended.begin(DrawRequest("", 2, 7)),
            mended.begin(DrawRequest("", 1, 4, sampler="DDIM"))]
    while any(not run.finished for run in runs):
        mended.step(runs)
    assert np.abs(mended.pictures(runs[0])[0].pixels.astype(int) - alone.pixels).max() <= 1


def test_the_command_measures_and_releases_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place: Workplace = make_workplace(tmp_path / "work", count=40)
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    words = ["--fit-few-steps", "3,2", "--data", str(place.store), "--model", str(folder), "--samples", "6",
             "--device", "cpu"]
    assert evaluate.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["gain"]) == {"2", "3"} and report["n"] == 6
    first = load_correction(folder)
    assert first is not None and first.steps == (2, 3) and bool(torch.isfinite(first.shift).all())
    assert evaluate.main(words) == 0  # measured without what it mends, so the same again
    again = load_correction(folder)
    assert again is not None and torch.equal(first.shift, again.shift) and torch.equal(first.gain, again.gain)
    faces = FaceGenerator.load(folder, device="cpu", engine="torch")
    assert faces.correction is not None
    mild = replace(faces.correction, gain=torch.ones(2), shift=torch.zeros_like(first.shift))
    latents = evaluate.draw_latents(folder, ["a face"], [1], 2, 2.0)
    assert not np.array_equal(latents, evaluate.draw_latents(folder, ["a face"], [1], 2, 2.0, corrected=False))
    assert torch.equal(mild(torch.from_numpy(latents).float(), 2), torch.from_numpy(latents).float())
    with pytest.raises(SystemExit):
        evaluate.main([*words[:1], "two", *words[2:]])
