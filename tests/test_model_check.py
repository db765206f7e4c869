"""Is every way noticed in which the parts of a model folder may not belong together?"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import build_tiny_model

import train_clip
from core.checkpoint import load_component, save_component
from core.model_check import model_faults, read_shapes
from dataset import synthetic_store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    how(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("name", sorted(path.parent.parent.name for path in ROOT.glob("models/*/vae/config.json")))
def test_the_models_of_the_repository_are_whole(name: str) -> None:
    assert model_faults(ROOT / "models" / name) == []


def test_an_untouched_folder_has_no_fault(folder: Path) -> None:
    assert model_faults(folder) == []
    _, state = load_component(folder, "unet")
    assert read_shapes(folder / "unet" / "model.safetensors") == {name: list(one.shape) for name, one in state.items()}


def test_a_component_of_another_run_is_found_by_its_children(folder: Path, tmp_path: Path) -> None:
    """What a smoke test did to the bundled model before: CLIP is replaced, and the UNet no longer fits."""
    store = synthetic_store(tmp_path / "store", count=24)
    assert train_clip.main(["--train", "--preset", "tiny", "--data", str(store.folder), "--model", str(folder), "--run",
                            str(tmp_path / "run"), "--steps", "1", "--device", "cpu", "--precision", "no",
                            "--replace"]) == 0
    faults = model_faults(folder)
    assert len(faults) == 1 and "unet" in faults[0] and "made for another clip" in faults[0]


def test_every_parent_is_checked(folder: Path) -> None:
    save_component(folder, "turbo", {}, {"parents": {"unet": "?"}})
    save_component(folder, "correction", {}, {"unet": "?"})
    save_component(folder, "preview", {}, {"encoder_sha256": "?", "latent_channels": 7})
    (folder / "emphasis").mkdir(exist_ok=True)
    (folder / "emphasis" / "config.json").write_text(json.dumps({"clip": "?", "unet": "?"}))
    change(folder / "unet" / "config.json", lambda config: config["parents"].update(vae="?", clip="?"))
    change(folder / "vae" / "config.json", lambda config: config.setdefault("encoder_sha256", "!"))
    found = " ".join(model_faults(folder))
    for text in ("The unet in .* another vae and another clip", "The turbo in .* another unet",
                 "The correction in .* another unet", "The preview in .* another vae",
                 "The emphasis in .* another clip and another unet", "The preview in .* has latent_channels 7"):
        name, _, rest = text.partition(" in .* ")
        assert f"{name} in {folder}" in found and rest in found, text


@pytest.mark.parametrize(("part", "field"), [("vae", "latent_channels"), ("clip", "text_width"), ("clip", "pieces"),
                                             ("unet", "latent_channels")])
def test_widths_are_compared_with_the_weights_and_the_neighbours(folder: Path, part: str, field: str) -> None:
    change(folder / part / "config.json", lambda config: config["network"].update({field: 99}))
    assert any(f"{field} 99" in fault or "pieces" in fault for fault in model_faults(folder))


def test_damaged_files_are_named(folder: Path) -> None:
    weights = folder / "vae" / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:100], struct.pack("<Q", 1 << 60) + whole[8:], whole[:-1] + b"x"):
        weights.write_bytes(damaged)
        assert model_faults(folder) and all(str(folder / "vae") in fault for fault in model_faults(folder))
    weights.write_bytes(whole)
    for text in ("{", "[]", "{}", '{"components": 1}'):
        (folder / "model_index.json").write_text(text)
        assert len(model_faults(folder)) == 1 and "model_index.json cannot be read" in model_faults(folder)[0]
    (folder / "model_index.json").unlink()
    build_tiny_model(folder)
    change(folder / "model_index.json", lambda index: index["components"].pop("clip"))
    assert any("has no clip" in fault for fault in model_faults(folder))
    shutil.rmtree(folder / "vae")
    assert any(f"{folder / 'vae'} cannot be read" in fault for fault in model_faults(folder))
