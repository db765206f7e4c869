"""Does ./start.py know models of other people, several at once, before anything is installed?"""

from __future__ import annotations

import json
from pathlib import Path

import start
from launcher.pretrained_check import any_model_problem, is_pretrained, pretrained_problem

ROOT = Path(start.__file__).resolve().parent


def test_files_need_their_tokenizer(tmp_path: Path) -> None:
    model = tmp_path / "v1-5.safetensors"
    model.write_bytes(b"")
    assert is_pretrained(model)
    assert pretrained_problem(model) == (
        f"{model} has no tokenizer: put vocab.json and merges.txt into {tmp_path}.")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).touch()
    assert pretrained_problem(model) is None
    (tmp_path / "notes.txt").touch()
    assert "is no model: name a folder" in (pretrained_problem(tmp_path / "notes.txt") or "")


def test_folders_of_diffusers_are_told_from_ours(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert is_pretrained(tmp_path) and not is_pretrained(ROOT / "models" / "celeba128")
    assert not is_pretrained(tmp_path / "nowhere")
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
    assert "not complete (missing: scheduler)" in (pretrained_problem(tmp_path) or "")
    (tmp_path / "scheduler").mkdir()
    assert pretrained_problem(tmp_path) is None and any_model_problem(ROOT, str(tmp_path)) is None


def test_several_models_reach_the_server(tmp_path: Path) -> None:
    parse = start.command_line({}).parse_args
    assert parse([]).model == [start.DEFAULT_MODEL]
    options = parse(["--model", "celeba128", "--model", str(tmp_path), "--image-size", "512"])
    words = start.server_command(ROOT, options)
    models = [words[i + 1] for i, word in enumerate(words) if word == "--model"]
    assert models == [str(ROOT / "models" / "celeba128"), str(tmp_path)]
    assert words[words.index("--image-size") + 1] == "512"
    assert start.command_line({"FACES_MODEL": "a, b"}).parse_args([]).model == ["a", "b"]
    assert "There is no model 'ffhq'" in (any_model_problem(ROOT, "ffhq") or "")
