"""Does a model folder hold what was saved, and is everything else refused with a sentence that helps?"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import core.nn.checkpoint
from core.diffusion.unet import load_unet
from core.nn.checkpoint import (
    ModelFolderError,
    build,
    component_hash,
    file_hash,
    git_commit,
    load_component,
    load_strictly,
    read_index,
    save_component,
    update_index,
    write_atomically,
    write_json,
)
from tests.support.tiny_model import build_tiny_model
from train_clip import load_clip
from vae import VAE, encoder_hash, load_vae
from vae import release as release_vae


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(3, 4, generator=generator), "count": torch.tensor([7, 8]),
            "image": torch.randn(1, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_component(tmp_path / "model", "net", weights(), {"network": {"width": 3}}, extra={"commit": "abc"})
    return tmp_path / "model"


@pytest.mark.parametrize("half", [True, False])
def test_round_trip(tmp_path: Path, half: bool) -> None:
    saved = weights()
    digest = save_component(tmp_path, "net", saved, {"network": {"widths": (1, 2)}}, half=half, extra={"psnr": 30.5})
    config, state = load_component(tmp_path, "net")
    assert config == {"network": {"widths": [1, 2]}}
    assert state.keys() == saved.keys() and state["count"].dtype == torch.int64
    assert torch.equal(state["count"], saved["count"])
    for name in ("a.weight", "image"):
        expected = saved[name].half().float() if half else saved[name]
        assert state[name].dtype == torch.float32 and torch.equal(state[name], expected)
    entry = read_index(tmp_path)["components"]["net"]
    file = tmp_path / "net" / "model.safetensors"
    assert entry == {"sha256": digest, "bytes": file.stat().st_size, "psnr": 30.5}
    assert digest == file_hash(file) == component_hash(tmp_path, "net")


def test_components_are_added_and_replaced_without_touching_others(folder: Path) -> None:
    first = component_hash(folder, "net")
    save_component(folder, "other", weights(1), {})
    update_index(folder, name="faces", image_size=128)
    assert component_hash(folder, "net") == first
    save_component(folder, "net", weights(2), {"new": True})
    index = read_index(folder)
    assert index["name"] == "faces" and index["format"] == 1 and set(index["components"]) == {"net", "other"}
    assert index["components"]["net"]["sha256"] != first and load_component(folder, "net")[0] == {"new": True}
    assert not list(folder.rglob("*.writing"))


@pytest.mark.parametrize("damage", ["flip", "shorten", "empty", "replace"])
def test_damaged_weights_are_refused(folder: Path, damage: str) -> None:
    path = folder / "net" / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    elif damage == "shorten":
        data = data[:-10]
    elif damage == "empty":
        data.clear()
    else:
        save_file({"a.weight": torch.zeros(3, 4)}, path)  # well-formed, but not what was released
        data = bytearray(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(ModelFolderError, match="does not match model_index.json.*restore the folder"):
        load_component(folder, "net")


def test_a_pickle_is_never_opened(folder: Path) -> None:
    """Even one that the index vouches for: it is not safetensors, so it is refused before anything in it runs."""

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(folder / "trapped"),)

    path = folder / "net" / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    entry = {**read_index(folder)["components"]["net"], "sha256": file_hash(path)}
    update_index(folder, components={"net": entry})
    with pytest.raises(ModelFolderError, match="cannot be read.*restore the folder"):
        load_component(folder, "net")
    assert not (folder / "trapped").exists()


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="nowhere is not a model folder.*train one or name another"):
        read_index(folder / "nowhere")
    for read in (load_component, component_hash):
        with pytest.raises(ModelFolderError, match="no component 'vae'"):
            read(folder, "vae")
    config = folder / "net" / "config.json"
    config.write_text("{")
    with pytest.raises(ModelFolderError, match="net cannot be read"):
        load_component(folder, "net")
    config.unlink()
    with pytest.raises(ModelFolderError, match="no component 'net'; train it or restore"):
        load_component(folder, "net")


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ('{"format": 99}', "has format 99"),
                                               ("[]", "has format None"), ("{}", "reads format 1")])
def test_a_wrong_index_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ModelFolderError, match=message):
        load_component(folder, "net")


@pytest.mark.parametrize(("value", "half"), [(float("nan"), True), (float("inf"), False), (1e6, True)])
def test_weights_that_are_not_finite_are_not_released(folder: Path, value: float, half: bool) -> None:
    """1e6 is fine in fp32 but infinite in fp16. What was there before stays."""
    before = component_hash(folder, "net")
    bad = {"good": torch.ones(2), "a.weight": torch.tensor([1.0, value])}
    with pytest.raises(ValueError, match="net: weight a.weight is not finite; it is not released"):
        save_component(folder, "net", bad, {}, half=half)
    assert component_hash(folder, "net") == before and load_component(folder, "net")[0] == {"network": {"width": 3}}
    if value == 1e6:
        save_component(folder, "net", bad, {}, half=False)
        assert float(load_component(folder, "net")[1]["a.weight"][1]) == 1e6


def test_writing_is_all_or_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder / "facts.json"
    write_json(target, {"größe": 1})
    assert target.read_text(encoding="utf-8") == '{\n  "größe": 1\n}\n'
    synced: list[int] = []
    real = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(core.nn.checkpoint.os, "fsync", lambda number: (synced.append(number), real(number))[1])
        write_atomically(folder / "new" / "data.bin", b"12")
        assert len(synced) == 1 and (folder / "new" / "data.bin").read_bytes() == b"12"

        def full(*_: object) -> None:
            raise OSError("No space left on device")

        patch.setattr(core.nn.checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(target, b"half a fi")
        before = component_hash(folder, "net")
        with pytest.raises(OSError, match="No space left"):
            save_component(folder, "net", weights(5), {})
    assert json.loads(target.read_text(encoding="utf-8")) == {"größe": 1}
    assert component_hash(folder, "net") == before and torch.equal(load_component(folder, "net")[1]["count"],
                                                                   weights()["count"])


def test_weights_of_another_shape_are_one_sentence() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ModelFolderError, match="the weights of the VAE do not fit.*size mismatch for weight"):
        load_strictly(layer, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "the VAE")
    with pytest.raises(ModelFolderError, match=re.escape('Missing key(s) in state_dict: "bias"')):
        load_strictly(layer, {"weight": torch.zeros(2, 3)}, "the VAE")
    load_strictly(layer, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "the VAE")
    assert torch.equal(layer.weight, torch.ones(2, 3))


def test_a_network_is_built_of_the_very_weights_without_random_ones() -> None:
    state = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    layer = build(lambda: torch.nn.Linear(3, 2), state, "the layer")
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.weight.data_ptr() == state["weight"].data_ptr() and layer.weight.requires_grad
    assert torch.equal(layer(torch.ones(1, 3)), torch.tensor([[4.0, 13.0]]))
    with pytest.raises(ModelFolderError, match="the weights of the layer do not fit"):
        build(lambda: torch.nn.Linear(3, 4), state, "the layer")


def test_the_commit_is_recorded_where_there_is_one(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    here = git_commit(Path(__file__).parent)
    assert here is None or re.fullmatch("[0-9a-f]{40}", here)  # a downloaded archive has none


# --------------------------------------------------------------------------------------------------- parts that belong


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_a_unet_refuses_other_parents(tiny_folder: Path, tmp_path: Path) -> None:
    load_unet(tiny_folder)
    other = build_tiny_model(tmp_path / "other", seed=1)
    for component in ("vae", "clip"):
        mixed = copy_of(tiny_folder, tmp_path / f"mixed-{component}")
        shutil.rmtree(mixed / component)
        shutil.copytree(other / component, mixed / component)
        entries = {**read_index(mixed)["components"], component: read_index(other)["components"][component]}
        update_index(mixed, components=entries)
        with pytest.raises(ModelFolderError, match=f"trained with another {component}; run .*--train"):
            load_unet(mixed)


def test_a_better_decoder_is_no_other_parent_but_other_whitening_is(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    vae = load_vae(folder)
    before = encoder_hash(vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.1)
    release_vae(vae, folder, {})
    assert encoder_hash(load_vae(folder)) == before == load_component(folder, "vae")[0]["encoder_sha256"]
    load_unet(folder)
    vae.latent_std[0] *= 1.5
    release_vae(vae, folder, {})
    with pytest.raises(ModelFolderError, match="another vae"):
        load_unet(folder)


def test_loaded_networks_are_ready_for_inference(tiny_folder: Path) -> None:
    clip, tokenizer = load_clip(tiny_folder)
    for network in (clip, load_vae(tiny_folder), load_unet(tiny_folder)):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert all(p.dtype == torch.float32 for p in network.parameters())
    assert tokenizer.size == clip.config.pieces
    assert isinstance(load_vae(tiny_folder), VAE)


def test_a_decoder_with_a_stage_of_earlier_versions_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    """And one that says it has none is loaded."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    for channels in (0, 32):
        config["network"]["finish_channels"] = channels
        path.write_text(json.dumps(config))
        if channels:
            with pytest.raises(ModelFolderError, match="a refinement stage, .*`python vae.py --train --decoder-only`"):
                load_vae(folder)
        else:
            assert encoder_hash(load_vae(folder)) == encoder_hash(load_vae(tiny_folder))
