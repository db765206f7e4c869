"""Is this a model of other people, and are its files there?

A diffusers folder names a class in its model_index.json; a single file is a .safetensors or a .ckpt with CLIP's
vocabulary beside it. Nothing is opened but that index: what is in the weights is for the server to say
(core/pretrained/recognition.py), because this has to run before anything is installed.
"""

from __future__ import annotations

import json
from pathlib import Path

from launcher.model_check import model_folder, model_problem

SUFFIXES = (".safetensors", ".ckpt")
TOKENIZER_FILES = ("vocab.json", "merges.txt")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def is_pretrained(path: Path) -> bool:
    """Whether this claims to be a model of other people."""
    if path.is_file():
        return True
    try:
        return "_class_name" in json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def pretrained_problem(path: Path) -> str | None:
    """The sentence for a model of other people whose files are not all there; None where they are."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            return f"{path} is no model: name a folder, a .safetensors or a .ckpt file."
        missing = [name for name in TOKENIZER_FILES if not (path.parent / name).is_file()]
        if missing:
            return f"{path} has no tokenizer: put {' and '.join(missing)} into {path.parent}."
        return None
    missing = [part for part in PARTS if not (path / part).is_dir()]
    return f"The model in {path} is not complete (missing: {', '.join(missing)}): copy it again." if missing else None


def any_model_problem(root: Path, name: str) -> str | None:
    """The sentence for a model, ours or other people's, that is absent or incomplete; None for one to be loaded."""
    path = model_folder(root, name)
    return pretrained_problem(path) if is_pretrained(path) else model_problem(root, name)
