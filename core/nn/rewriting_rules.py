"""Which rewriting of prompts belongs to the networks of a model folder?

It is kept beside the hashes of the networks that it was measured with, and not used with any others. It does not know
how a prompt is rewritten (`core/text/prompt_rewriting.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.text.prompt_rewriting import PromptRewriting

FOLDER = "emphasis"


def save_prompt_rewriting(prompt_rewriting: PromptRewriting, folder: str | Path) -> None:
    """Write it into a model folder, as that of the UNet and the text encoder there."""
    from core.nn.checkpoint import write_json

    table = {"left_out": list(prompt_rewriting.dropped_negations),
             "said_again": dict(prompt_rewriting.appended_phrases), **_parents(folder)}
    write_json(Path(folder) / FOLDER / "config.json", table)


def load_prompt_rewriting(folder: str | Path) -> PromptRewriting:
    """That of a model folder; one that changes nothing where there is none, or where other networks were measured."""
    path = Path(folder) / FOLDER / "config.json"
    if not path.is_file():
        return PromptRewriting()
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if any(table[name] != digest for name, digest in _parents(folder).items()):
        return PromptRewriting()
    return PromptRewriting(tuple(table["left_out"]), table["said_again"])


def _parents(folder: str | Path) -> dict[str, str]:
    from core.nn.checkpoint import component_hash  # it brings torch, which a server that only speaks of a model lacks

    return {name: component_hash(folder, name) for name in ("clip", "unet")}
