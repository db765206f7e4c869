"""Does the style GAN learn, resume exactly, and release what draws, moves and is measured?"""

from __future__ import annotations

import io
import json
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import stylegan
from core.evaluation.adversarial_report import enlarged, gigaflops, measure, milliseconds
from core.evaluation.style_sheets import fit_directions, mixing_table, sample_rows
from core.imaging.watermark import find
from core.nn.checkpoint import ModelFolderError, component_hash, save_component
from core.nn.clip import load_clip
from core.nn.style_directions import (
    StyleDirections,
    effects,
    entanglement,
    load_directions,
    orthogonalised,
    regressed,
    save_directions,
)
from core.nn.style_faces import PX_WEIGHT, StyleFaces, condition_of
from core.nn.style_networks import StyleDiscriminator, StyleGenerator, load_style_generator
from core.training.accelerator import make_accelerator
from core.training.caption_cache import build_caption_bank
from core.training.curves import read_metrics
from core.training.style_data import cached_pooled
from core.training.style_loss import StyleLoss, sample_batch, take_gradients
from dataset import FaceStore
from tests.support.tiny_model import build_attribute_classifier
from tests.support.training import Workplace, checkpoint, differences, make_workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("stylegan"), count=32)


def words(place: Workplace, run: str, model: Path, *more: object) -> list[str]:
    """Arguments of a training of the tiny preset: four pictures a step, every step logged."""
    return [str(word) for word in (
        "--train", "--preset", "tiny", "--data", place.store, "--run", place.root / run, "--model", model, "--cache",
        place.root / "latents", "--batch-size", 4, "--steps", 6, "--log-every", 1, "--image-every", 1000,
        "--captions-per-image", 2, "--device", "cpu", "--precision", "no", *more)]


@pytest.fixture(scope="module")
def model(place: Workplace) -> Path:
    """A model folder with a generator that was trained for six steps in the run ``whole``."""
    folder = place.copy_model("styled")
    assert stylegan.main(words(place, "whole", folder)) == 0
    return folder


@pytest.fixture(scope="module")
def faces(model: Path) -> StyleFaces:
    return StyleFaces.load(model)


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_run_logs_draws_and_releases(place: Workplace, model: Path) -> None:
    rows = read_metrics(place.root / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert {"generator", "discriminator", "mismatch", "r1", "r2", "path", "path_length", "diversity", "accuracy",
            "collapsed"} <= rows[-1].keys()
    with Image.open(place.root / "whole" / "pictures" / "step-0000006.png") as sheet:
        assert sheet.size == (8 * 128, 4 * 128)
    config = json.loads((model / "stylegan" / "config.json").read_text())
    assert config["network"]["output_channels"] == 4 and config["training"]["steps"] == 6
    assert config["parents"]["clip"] == component_hash(model, "clip")


@pytest.mark.parametrize("more", [[], ["--loss", "softplus", "--path-weight", "0"]])
def test_a_stopped_run_goes_on_exactly(place: Workplace, model: Path, more: list[str]) -> None:
    """Weights, averages, optimisers and the log, penalties and their running mean included."""
    name, whole = f"part{len(more)}", "whole" if not more else "whole-other"
    if more:
        assert stylegan.main(words(place, whole, model, "--replace", "--stop-at", 5, *more)) == 0
    stop = 6 if not more else 5
    for upto in (3, stop):
        assert stylegan.main(words(place, name, model, "--replace", "--stop-at", upto, *more)) == 0
    assert json.loads((place.root / name / "config.json").read_text())["circumstances"]["gamma"] == StyleLoss().gamma
    assert differences(checkpoint(place.root / name, stop), checkpoint(place.root / whole, stop)) == []
    logs: list[Any] = [[{key: value for key, value in row.items() if key != "wall_s"}
                        for row in read_metrics(place.root / run / "metrics.jsonl")] for run in (name, whole)]
    assert logs[0] == logs[1]


def test_two_networks_learn_what_a_condition_asks_for() -> None:
    """Pictures of one value, +1 or -1 as the condition says: after some steps the generator's means are on its side."""
    torch.manual_seed(0)
    config = replace(stylegan.PRESETS["tiny"], output_channels=1, condition=2, channels=(12, 8))
    generator, critic = StyleGenerator(config), StyleDiscriminator(config)
    how = StyleLoss(gamma=0.2, path_weight=0.0, mixing=0.0)
    optimizers = [torch.optim.Adam(one.parameters(), lr=5e-3, betas=(0.0, 0.99)) for one in (generator, critic)]
    average = torch.zeros(())
    for step in range(80):
        source = torch.Generator().manual_seed(step)
        side = torch.randint(2, (16,), generator=source)
        real = (2.0 * side - 1).view(-1, 1, 1, 1) + 0.1 * torch.randn(16, 1, 8, 8, generator=source)
        batch = sample_batch(generator, real, torch.eye(2)[side], how, source)
        average = take_gradients(generator, critic, batch, how, average).path_average
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.inference_mode():
        z = torch.randn(64, config.z_dim)
        means = [float(generator(z, torch.eye(2)[[side] * 64]).mean()) for side in (0, 1)]
    assert means[0] < -0.4 and means[1] > 0.4


def test_gradients_of_both_networks_are_those_of_their_own_losses() -> None:
    """One forward pass serves both, and neither gets what is the other's: as if each were differentiated alone."""
    torch.manual_seed(1)
    config = replace(stylegan.PRESETS["tiny"], condition=3, channels=(8, 6))
    generator, critic = StyleGenerator(config), StyleDiscriminator(config)
    how = StyleLoss(gamma=0.0, path_weight=0.0, mismatch=0.0, mixing=0.0)
    batch = sample_batch(generator, torch.randn(4, 4, 8, 8), torch.randn(4, 3), how, torch.Generator().manual_seed(0))
    take_gradients(generator, critic, batch, how, torch.zeros(()))
    made = generator(batch.z, batch.condition, batch.noise)
    gap = critic(made, batch.condition) - critic(batch.real, batch.condition)
    softplus = torch.nn.functional.softplus
    for network, loss in ((generator, softplus(-gap).mean()), (critic, softplus(gap).mean())):
        names, weights = zip(*network.named_parameters(), strict=True)
        expected = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        for name, weight, gradient in zip(names, weights, expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, msg=name, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("more", "said"), [
    (["--gamma", "-1"], "--gamma is -1.0; it must be a number from 0 up"),
    (["--mixing", "2"], "--mixing is 2.0; it is a share"),
    (["--batch-size", "1"], "--batch-size is 1; the measure of collapse"),
    (["--loss", "hinge"], "invalid choice: 'hinge'"),
])
def test_a_run_that_cannot_be_is_refused(place: Workplace, model: Path, more: list[str], said: str,
                                         capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        stylegan.main([*words(place, "none", model), *more])
    assert said in capsys.readouterr().err


# ---- faces -----------------------------------------------------------------------------------------------------------


def test_a_condition_is_the_pooled_text_and_the_sharpness() -> None:
    told = condition_of(torch.ones(3, 2), torch.tensor([58, 80, 128]))
    assert torch.equal(told[:, :2], torch.ones(3, 2)) and torch.equal(told[:, 2:], PX_WEIGHT * torch.eye(3))
    assert torch.equal(condition_of(torch.ones(1, 2)), told[2:])


def test_a_seed_is_the_same_face_alone_and_among_others(faces: StyleFaces) -> None:
    alone, both = (faces.generate("a smiling woman", seeds) for seeds in ([5], [4, 5]))
    assert both.shape == (2, 128, 128, 3) and np.abs(both[1].astype(int) - alone[0]).max() <= 1
    mean = faces.styles(["a man", "a man", "a woman"], [1, 2, 1], psi=0.0)
    torch.testing.assert_close(mean[0], mean[1])
    assert not torch.allclose(mean[0], mean[2])
    with pytest.raises(ValueError, match="1 prompts need as many seeds, got 2"):
        faces.styles(["a"], [1, 2])


def test_a_png_is_marked_and_says_what_made_it(faces: StyleFaces) -> None:
    data = faces.png("a man", 3)
    with Image.open(io.BytesIO(data)) as picture:
        texts, pixels = dict(picture.text), np.asarray(picture)  # type: ignore[attr-defined]
    assert "trainedAlgorithmicMedia" in texts["XML:com.adobe.xmp"] and texts["Description"] == "a man"
    plain = faces.generate("a man", [3])[0]
    assert not np.array_equal(pixels, plain) and find(pixels).score > find(plain).score


def test_a_generator_of_another_encoder_is_refused(model: Path, place: Workplace, tmp_path: Path) -> None:
    generator, config = load_style_generator(model)
    folder = place.copy_model("other")
    save_component(folder, "stylegan", generator.state_dict(), config | {"parents": config["parents"] | {"vae": "?"}})
    with pytest.raises(ModelFolderError, match="was trained with another vae; run `python stylegan.py --train` again"):
        StyleFaces.load(folder)


def test_sheets_of_rows_and_mixtures(faces: StyleFaces) -> None:
    rows = sample_rows(faces, ["a man", "a woman"], [1, 2], psi=0.8)
    assert rows.shape == (4, 128, 128, 3)
    table = mixing_table(faces, "a man", [1, 2], [7], 0, psi=0.8)
    assert np.abs(table[0].astype(int) - table[1]).max() <= 1  # from the first layer on both are the other style
    with pytest.raises(ValueError, match="must be from 0 to 6"):
        mixing_table(faces, "a man", [1], [2], 7, psi=1.0)


@pytest.mark.parametrize("more", [["--prompt", "a man", "--n-images", "2"], ["--n-images", "2", "--mix-from", "2"],
                                  ["--prompt", "a man", "--prompt", "a woman", "--interpolate", "3"]])
def test_sheets_are_written(model: Path, tmp_path: Path, more: list[str]) -> None:
    assert stylegan.main(["--sample", "--model", str(model), "--device", "cpu", "--out", str(tmp_path / "a.png"),
                          *more]) == 0
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width in (2 * 128, 3 * 128)


@pytest.mark.parametrize(("more", "said"), [
    (["--sample", "--mix-from", "1", "--direction", "Male"], "give one of them"),
    (["--sample", "--interpolate", "1"], "--interpolate is 1; a line has at least its 2 ends"),
    (["--sample", "--psi", "nan"], "--psi is nan; it must be from 0 to 2"),
    (["--eval", "--psi", "-1"], "--psi is -1.0; it must be from 0 to 2"),
    (["--directions"], "--directions changes a trained model: say which, with --model FOLDER"),
])
def test_what_makes_no_sense_is_refused(more: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        stylegan.main(more)
    assert said in capsys.readouterr().err


def test_captions_are_read_once_and_as_each_alone_would_be(place: Workplace, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture) -> None:
    clip, tokenizer = load_clip(place.model)
    store = FaceStore.open(place.store)
    rows = store.select("train")[:5]
    bank = build_caption_bank(store, rows, tokenizer, captions_per_image=2, seed=0, empty_share=0.2)
    accelerator = make_accelerator("cpu", "no")
    pooled = cached_pooled(tmp_path, clip, "hash", bank, accelerator)
    for row in range(5):
        length = int(bank.lengths[row, 1])
        with torch.inference_mode():
            alone = clip.encode_text(bank.ids[row, 1:, :length].long(), torch.ones(1, length, dtype=torch.bool)).pooled
        torch.testing.assert_close(pooled[row, 1:].float(), alone, rtol=2e-3, atol=2e-3)
    kept = (tmp_path / "pooled.npy").stat().st_mtime_ns
    assert torch.equal(cached_pooled(tmp_path, clip, "hash", bank, accelerator), pooled)
    assert (tmp_path / "pooled.npy").stat().st_mtime_ns == kept
    (tmp_path / "pooled.npy").write_bytes(b"cut")
    assert torch.equal(cached_pooled(tmp_path, clip, "hash", bank, accelerator), pooled)
    assert "its captions are read anew" in capsys.readouterr().out
    cached_pooled(tmp_path, clip, "another", bank, accelerator)
    assert json.loads((tmp_path / "pooled.json").read_text())["key"]


# ---- directions ------------------------------------------------------------------------------------------------------


def linear(matrix: Tensor) -> Any:
    return lambda w: w @ matrix.T


def test_directions_of_linear_scores_are_found_and_freed_of_each_other() -> None:
    """Scores S = M w of correlated w: regression finds the rows of M, and an orthogonalised one moves its own alone."""
    source = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 12, generator=source)
    matrix[1] += matrix[0]  # two attributes that go together
    w = torch.randn(2000, 12, generator=source) @ torch.randn(12, 12, generator=source)
    plain = regressed(w, linear(matrix)(w), ridge=1e-9)
    torch.testing.assert_close(plain, matrix / matrix.norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-3)
    free = orthogonalised(plain)
    table = effects(linear(matrix), w, free, step=2.0)
    assert float((table - table.diagonal().diag()).abs().max()) < 1e-3 and bool((table.diagonal() > 0).all())
    torch.testing.assert_close(table.diagonal(), 2 * (free * matrix).sum(1) / (w @ matrix.T).std(0))
    before, after = (entanglement(effects(linear(matrix), w, one, 2.0)) for one in (plain, free))
    assert bool((after < 0.01).all()) and float(before.max()) > 0.2


def test_directions_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="direction 0 lies within the span of the 2 others"):
        orthogonalised(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    with pytest.raises(ValueError, match="1 of 2 scores are the same for every style"):
        regressed(torch.randn(5, 3), torch.tensor([[1.0, 2.0]] * 5) + torch.tensor([0.0, 1.0]) * torch.randn(5, 1))
    with pytest.raises(ValueError, match="there is no direction 'Old'; there are Young"):
        StyleDirections(("Young",), torch.ones(1, 2), torch.ones(1, 2)).of("Old")


def test_fitted_directions_are_kept_with_their_generator(model: Path, place: Workplace, faces: StyleFaces,
                                                         tmp_path: Path) -> None:
    from core.evaluation.attribute_classifier import load_attribute_classifier

    judge = build_attribute_classifier(tmp_path / "judge")
    names = ("Male", "Smiling", "Eyeglasses")
    found = fit_directions(faces, load_attribute_classifier(judge)[0], n=24, names=names, measured=4)
    assert found.directions.orthogonal.shape == (3, 16) and set(found.facts()["entanglement"]["plain"]) == set(names)
    save_directions(found.directions, model, found.facts())
    again = load_directions(model)
    assert again.names == names and torch.equal(again.of("Male"), found.directions.orthogonal[0])
    sheet = tmp_path / "moved.png"
    assert stylegan.main(["--sample", "--model", str(model), "--direction", "Male", "--n-images", "3", "--out",
                          str(sheet), "--device", "cpu"]) == 0 and sheet.exists()
    generator, config = load_style_generator(model)
    with torch.no_grad():
        generator.mapping.w_mean.add_(1.0)
    save_component(model, "stylegan", generator.state_dict(), config)
    with pytest.raises(ModelFolderError, match="are of another style generator"):
        load_directions(model)


# ---- measures and files of others ------------------------------------------------------------------------------------


def test_real_images_are_at_the_distance_of_real_images(place: Workplace, tmp_path: Path) -> None:
    store, judge = FaceStore.open(place.store), build_attribute_classifier(tmp_path / "judge")
    test = np.random.default_rng(0)
    test.permutation(store.select("train", px=128))
    same = store.images[test.permutation(store.select("test", px=128))]
    found = measure(same, store, judge, tmp_path / "cache")
    assert found["frechet_over_floor"] == pytest.approx(1.0, rel=1e-3) and found["diversity"] == pytest.approx(1.0)
    flat = measure(np.full_like(same, 128), store, judge, tmp_path / "cache")
    assert flat["diversity"] < 0.01 and flat["frechet_over_floor"] > 1.0 and flat["n"] == len(same)
    assert enlarged(same[:, ::2, ::2], 128).shape == same.shape


def test_a_released_generator_is_measured(model: Path, place: Workplace, tmp_path: Path) -> None:
    judge = build_attribute_classifier(tmp_path / "judge")
    assert stylegan.main([str(word) for word in ("--eval", "--model", model, "--data", place.store, "--run",
                                                 tmp_path / "run", "--judge", judge, "--judge-cache",
                                                 tmp_path / "cache", "--samples", 12, "--device", "cpu")]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["n"] == 4 and found["psi"] == 0.7 and found["milliseconds"] > 0 and found["frechet"] > 0
    assert "alignment" in found and found["decoder"] in ("OpenVINO", "torch") and (tmp_path / "run" / "samples.png"
                                                                                   ).exists()


def test_a_call_is_measured_by_its_median_and_its_products() -> None:
    assert 5.0 <= milliseconds(lambda: time.sleep(0.005), times=3) < 1000
    assert gigaflops(lambda: torch.ones(10, 20) @ torch.ones(20, 30)) == pytest.approx(2 * 10 * 20 * 30 / 1e9)


def test_what_is_no_network_of_nvidias_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"G_ema": 3}))
    with pytest.raises(ValueError, match="has no 'G_ema'"):
        stylegan.main(["--convert", str(tmp_path / "file.pkl"), "--model", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()
