"""Are weights that were stored under older names of the layers read as the same networks?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conditional_ldm import PRESETS
from core.diffusion.unet import ConditionalUNet
from core.nn.autoencoder import encoder_hash, load_vae
from core.nn.checkpoint import ModelFolderError, component_hash, file_hash, load_component
from core.nn.clip import load_clip
from core.nn.weight_keys import PARTS, PREFIXES, current_key, first_key, upgrade_keys
from core.training.snapshots import read_snapshot, write_snapshot
from generator import FaceGenerator

MODEL = Path(__file__).resolve().parent.parent.parent / "models" / "celeba128"


def as_first_written(source: Path, target: Path) -> Path:
    """A copy of a model folder with the first names of all weights, and the hashes of the files that this makes."""
    shutil.copytree(source, target)
    index = json.loads((target / "model_index.json").read_text())
    old_hash = {name: entry["sha256"] for name, entry in index["components"].items()}
    for name, entry in index["components"].items():
        weights = target / name / "model.safetensors"
        save_file({first_key(key): value for key, value in load_file(weights).items()}, weights)
        entry["sha256"] = file_hash(weights)
    (target / "model_index.json").write_text(json.dumps(index))
    for config in target.glob("*/config.json"):  # components name their parents by the hashes of their files
        text = config.read_text()
        for name, digest in old_hash.items():
            text = text.replace(digest, index["components"][name]["sha256"])
        config.write_text(text)
    return target


def test_every_key_has_one_current_and_one_first_name() -> None:
    for old, new in PREFIXES.items():
        assert current_key(f"{old}0.weight") == f"{new}0.weight" and first_key(f"{new}0.weight") == f"{old}0.weight"
        assert current_key(f"{new}0.weight") == f"{new}0.weight", "what is current stays"
    assert current_key("down.1.attention.0.feed.2.bias") == "down_blocks.1.attention.0.ff.2.bias"
    assert current_key("text.blocks.0.feed.0.weight") == "text.blocks.0.ff.0.weight"
    assert current_key("door.weight.scale") == "conv_in.weight.scale", "of a component that is kept as a difference"
    assert current_key("decoder.finish.up.weight") == "decoder.refinement.up.weight", "only at the beginning"
    assert set(PARTS) == {".feed."}


def test_two_names_of_one_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="old and a new name"):
        upgrade_keys({"door.weight": 1, "conv_in.weight": 2})


def test_the_bundled_model_is_read_by_its_first_names() -> None:
    """The files are as they were written, and their hashes are; what is read of them has the names of today."""
    for component in ("unet", "vae", "clip"):
        stored = load_file(MODEL / component / "model.safetensors")
        assert any(key.startswith(("door.", "encoder.door.", "image.door.")) for key in stored), component
        _, state = load_component(MODEL, component)
        assert list(state) == [current_key(key) for key in stored]
        assert {first_key(key) for key in state} == set(stored)
    parents = json.loads((MODEL / "unet" / "config.json").read_text())["parents"]
    assert encoder_hash(load_vae(MODEL)) == parents["vae"] and component_hash(MODEL, "clip") == parents["clip"]


def test_a_folder_that_a_user_trained_before_gives_the_same_faces(tiny_folder: Path, tmp_path: Path) -> None:
    older = as_first_written(tiny_folder, tmp_path / "older")
    names = {key for component in ("unet", "vae", "clip") for key in load_file(older / component / "model.safetensors")}
    assert {"door.weight", "encoder.door.weight", "image.door.weight", "text_head.weight"} <= names
    assert "conv_in.weight" not in names
    assert encoder_hash(load_vae(older)) == encoder_hash(load_vae(tiny_folder))
    wanted = FaceGenerator.load(tiny_folder, "cpu", engine="torch").generate("a smiling woman", num_images=2, seed=3)
    found = FaceGenerator.load(older, "cpu", engine="torch").generate("a smiling woman", num_images=2, seed=3)
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in zip(wanted, found, strict=True))
    load_clip(older)


def test_a_file_with_both_names_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = as_first_written(tiny_folder, tmp_path / "both")
    weights = folder / "unet" / "model.safetensors"
    state = load_file(weights)
    save_file(state | {"conv_in.weight": state["door.weight"].clone()}, weights)
    index = json.loads((folder / "model_index.json").read_text())
    index["components"]["unet"]["sha256"] = file_hash(weights)
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match="old and a new name"):
        load_component(folder, "unet")


def test_a_run_that_was_begun_before_goes_on(tmp_path: Path) -> None:
    """Checkpoints of runs are read by the same names: network, averages and critic."""
    network = ConditionalUNet(PRESETS["tiny"])
    first = {first_key(key): value for key, value in network.state_dict().items()}
    assert "door.weight" in first
    write_snapshot(tmp_path / "step-1", {"model": first, "critic": {"head.bias": torch.zeros(1)}},
                   {"step": 1, "total_steps": 2, "extra": {}})
    found = read_snapshot(tmp_path / "step-1", ["model", "critic"])
    network.load_state_dict(found["model"], strict=True)
    assert list(found["critic"]) == ["conv_out.bias"]
