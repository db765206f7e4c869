"""Does the DCGAN train, resume exactly, notice that it failed, and release what another process can generate with?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dcgan
from core.command import SettingError
from core.nn.checkpoint import ModelFolderError, read_index
from core.training.curves import read_metrics
from dataset import FaceStore, synthetic_store
from tests.support.tiny_model import build_attribute_classifier
from tests.support.training import checkpoint, differences


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FaceStore:
    return synthetic_store(tmp_path_factory.mktemp("data") / "store", count=24)


def words(store: FaceStore, root: Path, run: str, *more: object) -> list[str]:
    """Arguments of a training of the tiny preset, every step logged."""
    return [str(word) for word in ("--train", "--preset", "tiny", "--data", store.folder, "--run", root / run,
                                   "--model", root / f"{run}-model", "--batch-size", 4, "--log-every", 1, "--device",
                                   "cpu", "--precision", "no", *more)]


@pytest.fixture(scope="module")
def trained(store: FaceStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three epochs and what it released."""
    root = tmp_path_factory.mktemp("runs")
    assert dcgan.main(words(store, root, "whole", "--epochs", 3)) == 0
    return root


def test_the_networks_have_the_sizes_of_the_paper() -> None:
    config = dcgan.PRESETS["celeba64"]
    generator, critic = dcgan.Generator(config), dcgan.Discriminator(config)
    assert sum(weight.numel() for weight in generator.parameters()) == 3_576_707  # 100-512-256-128-64-3, 4x4 kernels
    images = generator(torch.randn(2, config.noise))
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1 and config.image_size == 64
    assert critic(images).shape == (2,)
    assert float(generator.conv_in.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_images_shrink_by_the_mean_of_their_squares(store: FaceStore) -> None:
    rows = dcgan.sharp_rows(store, "train", 64)
    assert set(store.px[rows].tolist()) == {80, 128}
    small = dcgan.load_small(store, rows[:5], 64, chunk=2).numpy()
    means = store.images[rows[:5]].reshape(5, 64, 2, 64, 2, 3).astype(float).mean((2, 4))
    assert small.shape == (5, 64, 64, 3) and np.abs(small - means).max() <= 0.5
    with pytest.raises(SettingError, match="has 0 images of 128 px to learn from"):
        dcgan.load_small(store, rows[:0], 64)


def test_a_run_logs_draws_and_releases(trained: Path, store: FaceStore) -> None:
    rows = read_metrics(trained / "whole" / "metrics.jsonl")
    steps = round(3 * len(dcgan.sharp_rows(store, "train", 64)) / 4)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert {"discriminator", "generator", "accuracy", "diversity", "collapsed"} <= rows[-1].keys()
    pictures = {path.name for path in (trained / "whole" / "pictures").iterdir()}
    assert pictures == {"epoch-01.png", "epoch-03.png"}
    with Image.open(trained / "whole" / "progress.png") as progress:
        assert progress.size == (640, 128)
    assert (trained / "whole" / "curves.png").exists()
    config = json.loads((trained / "whole-model" / "dcgan" / "config.json").read_text())
    assert config["training"]["steps"] == steps and config["training"]["epochs"] == pytest.approx(3, abs=0.1)
    assert read_index(trained / "whole-model")["image_size"] == 64


def test_a_stopped_run_goes_on_exactly(trained: Path, store: FaceStore, tmp_path: Path) -> None:
    """Weights, statistics of batch norm, optimisers and the log are those of the run that nobody stopped."""
    assert dcgan.main(words(store, tmp_path, "part", "--epochs", 3, "--stop-at", 5)) == 0
    assert not (tmp_path / "part-model").exists()
    assert dcgan.main(words(store, tmp_path, "part", "--epochs", 3)) == 0
    steps = read_metrics(trained / "whole" / "metrics.jsonl")[-1]["step"]
    assert differences(checkpoint(tmp_path / "part", steps), checkpoint(trained / "whole", steps)) == []
    logs: list[Any] = [[{key: value for key, value in row.items() if key != "wall_s"} for row in read_metrics(path)]
                       for path in (tmp_path / "part" / "metrics.jsonl", trained / "whole" / "metrics.jsonl")]
    assert logs[0] == logs[1]


def test_what_is_released_generates_the_same_for_the_same_seed(trained: Path) -> None:
    model = dcgan.load_dcgan(trained / "whole-model")
    faces = dcgan.generate(model, [3, 4, 5])
    assert faces.shape == (3, 64, 64, 3) and faces.dtype == np.uint8
    assert not np.array_equal(faces[0], faces[1])
    assert np.abs(dcgan.generate(model, [4]).astype(int) - faces[1]).max() <= 1


def test_a_snapshot_has_the_statistics_of_the_noise_it_is_given() -> None:
    torch.manual_seed(0)
    generator = dcgan.Generator(dcgan.PRESETS["tiny"]).train()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    frozen = dcgan.snapshot(generator, 0, batches=8, batch_size=256)
    first = frozen.norms[0]
    expected = generator.conv_in.weight.square().sum(0).mean((1, 2))  # the variance of a sum of unit normal numbers
    torch.testing.assert_close(first.running_var, expected, rtol=0.1, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_collapse_is_said_in_the_log_and_the_release(store: FaceStore, tmp_path: Path, capsys: pytest.CaptureFixture,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator of six steps makes faces that are all alike: past the first steps that counts as collapse."""
    monkeypatch.setattr(dcgan, "GRACE_STEPS", 3)
    assert dcgan.main(words(store, tmp_path, "alike", "--steps", 6)) == 0
    out = capsys.readouterr().out
    assert out.count("the generator has collapsed") == 2  # when it is seen, and at the end
    config = json.loads((tmp_path / "alike-model" / "dcgan" / "config.json").read_text())
    assert "its faces differ" in config["training"]["collapse"]
    assert [row["collapsed"] for row in read_metrics(tmp_path / "alike" / "metrics.jsonl")] == [0, 0, 0, 1, 1, 1]


def test_a_released_generator_is_measured(trained: Path, tmp_path: Path) -> None:
    """Against real images, beside what 64 pixels alone cost; figures and a grid are kept."""
    store = synthetic_store(tmp_path / "store", count=32)
    judge = build_attribute_classifier(tmp_path / "judge")
    assert dcgan.main([str(word) for word in ("--eval", "--model", trained / "whole-model", "--data", store.folder,
                                              "--run", tmp_path / "run", "--judge", judge, "--judge-cache",
                                              tmp_path / "cache", "--samples", 12, "--device", "cpu")]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["n"] == 4 and found["frechet"] > 0 < found["milliseconds"] and found["gflop"] > 0
    assert found["shrunk_real"]["n"] == 4 and found["shrunk_real"]["diversity"] == pytest.approx(1, abs=0.2)
    with Image.open(tmp_path / "run" / "samples.png") as grid:
        assert grid.size == (640, 128)


def test_a_damaged_or_missing_generator_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained / "whole-model", tmp_path / "model"))
    weights = folder / "dcgan" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ModelFolderError, match="does not match model_index.json"):
        dcgan.load_dcgan(folder)
    with pytest.raises(ModelFolderError, match="is not a model folder"):
        dcgan.load_dcgan(tmp_path)


@pytest.mark.parametrize(("more", "said"), [
    (["--epochs", "0"], "--steps and --epochs must be more than 0"),
    (["--batch-size", "1"], "--batch-size is 1; batch norm"),
])
def test_a_run_that_cannot_be_is_refused(more: list[str], said: str, store: FaceStore, tmp_path: Path,
                                         capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        dcgan.main(words(store, tmp_path, "none", *more))
    assert said in capsys.readouterr().err
