"""The training commands of the `tiny` presets on generated faces, as a person would type them, a few steps long."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dataset import synthetic_store
from tests.support.tiny_model import build_tiny_model


@dataclass(frozen=True)
class Workplace:
    """A folder with a prepared store of generated faces and a model folder of untrained networks to build upon."""

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "prepared"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def copy_model(self, name: str) -> Path:
        """The model folder once more, for a command that will change it."""
        return Path(shutil.copytree(self.model, self.root / name, dirs_exist_ok=True))

    def train(self, component: str, run: str, *more: object, model: Path | None = None) -> list[str]:
        """Arguments of a training command: four images a step, every step logged, one folder for each run's name."""
        words: list[object] = ["--train", "--preset", "tiny", "--data", self.store, "--run", self.root / run,
                               "--model", model or self.copy_model(f"{run}-model"), "--batch-size", 4,
                               "--warmup-steps", 1, "--log-every", 1, "--save-every", 1000, "--device", "cpu",
                               "--precision", "no", "--replace"]  # the untrained networks that are there
        if component != "clip":
            words += ["--image-every", 1000]
        if component != "vae":
            words += ["--captions-per-image", 2]
        if component == "unet":
            words += ["--cache", self.root / "latents"]
        return [str(word) for word in [*words, *more]]


def make_workplace(root: Path, count: int = 24) -> Workplace:
    """Generate the faces and build the untrained model; takes about a second."""
    place = Workplace(root)
    synthetic_store(place.store, count=count)
    build_tiny_model(place.model)
    return place


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    """Everything that a run's checkpoint holds, by "part/name"."""
    files = sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    assert files, f"{run} has no checkpoint {step}"
    return {f"{path.stem}/{name}": value for path in files for name, value in load_file(path).items()}


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
