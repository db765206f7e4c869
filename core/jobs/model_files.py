"""What kind of model is a path, and how large is it on disk, before anything is loaded?"""

from __future__ import annotations

import json
from pathlib import Path


def is_ours(model: Path) -> bool:
    """Whether this is, or ought to be, a folder that this repository trained; diffusers' folders name a class."""
    try:
        return "_class_name" not in json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not model.is_file()


def size_of(model: Path) -> int:
    """Bytes of a model's weights on disk."""
    files = [model] if model.is_file() else model.glob("*/*")
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin", ".ckpt"))
