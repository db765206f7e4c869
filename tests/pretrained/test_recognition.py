"""What does a file or folder hold, and what is said of those that cannot generate?"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.pretrained.loading import describe, load
from core.pretrained.recognition import PretrainedError, recognise, weights_hash
from tests.support.tiny_model import bundled_model
from tests.support.tiny_stable_diffusion import TinyStableDiffusion

UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
CROSS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def single(tiny: TinyStableDiffusion, tmp_path: Path) -> Path:
    """A folder with the tokenizer, into which a test writes its file."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny.safetensors.parent / name, tmp_path / name)
    return tmp_path


def test_three_formats_hold_the_same_weights(tiny: TinyStableDiffusion) -> None:
    networks = {"unet": tiny.pipeline.unet, "vae": tiny.pipeline.vae, "text_encoder": tiny.pipeline.text_encoder}
    for path, kind in ((tiny.folder, "diffusers"), (tiny.safetensors, "single_file"), (tiny.ckpt, "single_file")):
        files = recognise(path)
        assert (files.kind, files.name) == (kind, "tiny")
        info = describe(files, "cpu", "torch", 64)
        assert (info.image_size, info.latent_shape) == (64, (4, 8, 8))
        parts = load(files, info)
        for name, network in networks.items():
            expected, found = network.state_dict(), getattr(parts, name).state_dict()
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_our_own_folder_is_recognised() -> None:
    folder = bundled_model()
    assert folder is not None and recognise(folder).kind == "own"


def test_hash_tells_weights_apart(tiny: TinyStableDiffusion, single: Path) -> None:
    tensors = load_file(tiny.safetensors)
    save_file({name: value + 0.001 for name, value in tensors.items()}, single / "other.safetensors")
    save_file(tensors, single / "again.safetensors")
    hashes = [weights_hash(recognise(path)) for path in (tiny.safetensors, *sorted(single.glob("*.safetensors")))]
    assert hashes[0] == hashes[1] != hashes[2]


def refusal(path: Path) -> str:
    with pytest.raises(PretrainedError) as caught:
        recognise(path)
    told = str(caught.value)
    assert str(path.name) in told and "\n" not in told and len(told) < 400
    return told


def test_other_files_are_refused_in_one_sentence(single: Path) -> None:
    assert "does not exist" in refusal(single / "nowhere.safetensors")
    (single / "notes.txt").write_text("hello")
    assert "name a folder, a .safetensors or a .ckpt" in refusal(single / "notes.txt")
    (single / "a.safetensors").write_bytes(b"")
    assert "no safetensors file" in refusal(single / "a.safetensors")
    (single / "b.safetensors").write_bytes((12).to_bytes(8, "little") + b"[1, 2, 3]   ")
    assert "no safetensors file" in refusal(single / "b.safetensors")
    (single / "c.ckpt").write_bytes(b"<html>not found</html>")
    assert "no checkpoint that torch can read" in refusal(single / "c.ckpt")
    save_file({"weight": torch.zeros(2)}, single / "d.safetensors")
    assert "is not a Stable Diffusion 1.x checkpoint" in refusal(single / "d.safetensors")
    torch.save([1, 2], single / "e.ckpt")
    assert "is not a Stable Diffusion 1.x checkpoint" in refusal(single / "e.ckpt")
    assert "model_index.json is missing" in refusal(single)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_files_are_refused(tiny: TinyStableDiffusion, single: Path, share: float) -> None:
    for path in (tiny.safetensors, tiny.ckpt):
        content = path.read_bytes()
        cut = single / path.name
        cut.write_bytes(content[: int(len(content) * share)])
        assert "cut off" in refusal(cut)


def test_other_families_are_refused_by_name(tiny: TinyStableDiffusion, single: Path) -> None:
    tensors = load_file(tiny.safetensors)

    def written(name: str, **changes: torch.Tensor) -> Path:
        save_file({**tensors, **changes}, single / name)
        return single / name

    xl = written("xl.safetensors", **{"conditioner.embedders.0.transformer.text_model.x": torch.zeros(1)})
    assert "Stable Diffusion XL" in refusal(xl)
    two = written("two.safetensors", **{"cond_stage_model.model.positional_embedding": torch.zeros(1)})
    assert "Stable Diffusion 2" in refusal(two)
    assert "Stable Diffusion 2" in refusal(written("wide.safetensors", **{CROSS: torch.zeros(32, 1024)}))
    assert "an inpainting model" in refusal(written("fill.safetensors", **{UNET_IN: torch.zeros(32, 9, 3, 3)}))
    for prefix, what in (("first_stage_model.", "no VAE"), ("cond_stage_model.", "no text encoder")):
        rest = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
        save_file(rest, single / "part.safetensors")
        assert what in refusal(single / "part.safetensors")


def test_missing_tokenizer_is_named(tiny: TinyStableDiffusion, tmp_path: Path) -> None:
    shutil.copy(tiny.safetensors, tmp_path / "tiny.safetensors")
    assert "put vocab.json and merges.txt into" in refusal(tmp_path / "tiny.safetensors")
    shutil.copy(tiny.safetensors.parent / "vocab.json", tmp_path)
    assert "put merges.txt into" in refusal(tmp_path / "tiny.safetensors")


def test_tokenizer_of_another_model_is_refused(tiny: TinyStableDiffusion, single: Path) -> None:
    shutil.copy(tiny.safetensors, single / "tiny.safetensors")
    vocabulary = json.loads((single / "vocab.json").read_text())
    (single / "vocab.json").write_text(json.dumps({**vocabulary, **{f"x{i}": 5000 + i for i in range(900)}}))
    files = recognise(single / "tiny.safetensors")
    with pytest.raises(PretrainedError, match="belongs to another model"):
        load(files, describe(files, "cpu", "torch", 64))


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("hostile-was-here"),)


def test_pickle_that_wants_code_is_not_run(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single)
    torch.save({"state_dict": {"x": Hostile()}}, single / "hostile.ckpt")
    with (single / "plain.ckpt").open("wb") as file:
        pickle.dump({"state_dict": Hostile()}, file)
    assert "could run code" in refusal(single / "hostile.ckpt")
    told = refusal(single / "plain.ckpt")
    assert "could run code" in told or "no checkpoint" in told
    assert not (single / "hostile-was-here").exists()


def test_other_folders_are_refused(tiny: TinyStableDiffusion, tmp_path: Path) -> None:
    def folder(name: str, **index: object) -> Path:
        copied = tmp_path / name
        shutil.copytree(tiny.folder, copied)
        whole = {**json.loads((copied / "model_index.json").read_text()), **index}
        (copied / "model_index.json").write_text(json.dumps(whole))
        return copied

    assert "Stable Diffusion XL" in refusal(folder("xl", _class_name="StableDiffusionXLPipeline"))
    assert "is a FluxPipeline" in refusal(folder("flux", _class_name="FluxPipeline"))
    without = folder("without")
    (without / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "vae/config.json or vae/diffusion_pytorch_model.safetensors is missing" in refusal(without)
    bare = folder("bare")
    shutil.rmtree(bare / "tokenizer")
    assert "has no tokenizer" in refusal(bare)
    wide = folder("wide")
    config = json.loads((wide / "unet" / "config.json").read_text())
    (wide / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 1024}))
    assert "Stable Diffusion 2" in refusal(wide)
    broken = folder("broken")
    (broken / "model_index.json").write_text("{")
    with pytest.raises(PretrainedError, match="is damaged"):
        recognise(broken)
    cut = folder("cut")
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000000])
    with pytest.raises(PretrainedError, match="is cut off"):
        recognise(cut)


@pytest.mark.parametrize("size", [0, 63, 100, 1088, -64])
def test_sizes_that_cannot_be_drawn(tiny: TinyStableDiffusion, size: int) -> None:
    with pytest.raises(PretrainedError, match="multiple of 64 from 64 to 1024"):
        describe(recognise(tiny.folder), "cpu", "torch", size or 32)


def test_usual_size_of_a_single_file(tiny: TinyStableDiffusion) -> None:
    assert describe(recognise(tiny.safetensors), "cpu", "torch").latent_shape == (4, 64, 64)
    assert describe(recognise(tiny.folder), "cpu", "torch").latent_shape == (4, 8, 8)
