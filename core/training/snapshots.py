"""How is the state of a run kept so that no single damaged file loses it?

A checkpoint is a folder: one safetensors file a part, and ``state.json`` with the hash of each. It is written aside,
synced and renamed; reading checks every file before anything is used. It does not know what the parts are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.nn.checkpoint import file_hash
from core.nn.weight_keys import upgrade_keys


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be used: a file is missing, cut, empty or has other bytes than were written."""


def sync(path: Path) -> None:
    """Wait until the disk has a file or, where the system can say so, the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_snapshot(target: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write the parts and facts as the folder ``target``, which never holds a part of them."""
    aside = target.with_name(target.name.replace("step-", "writing-"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, tensors in parts.items():
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
                  aside / f"{name}.safetensors")
    hashes = {path.name: file_hash(path) for path in sorted(aside.iterdir())}
    (aside / "state.json").write_text(json.dumps({**facts, "files": hashes}), encoding="utf-8")
    for path in [*aside.iterdir(), aside]:
        sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    sync(target.parent)


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``state.json`` says. Raises DamagedCheckpoint where that cannot be read."""
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        int(facts["step"]), int(facts["total_steps"]), dict(facts["extra"])
    except FileNotFoundError as error:
        raise DamagedCheckpoint("state.json is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint("state.json is damaged") from error
    return dict(facts)


def read_snapshot(folder: Path, parts: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part. Raises DamagedCheckpoint where one is not what was written."""
    hashes, found = read_facts(folder).get("files", {}), {}  # older checkpoints have no hashes
    for part in parts:
        path = folder / f"{part}.safetensors"
        if not path.is_file():
            raise DamagedCheckpoint(f"{path.name} is missing")
        try:
            if path.name in hashes and file_hash(path) != hashes[path.name]:
                raise DamagedCheckpoint(f"{path.name} is damaged")
            found[part] = upgrade_keys(load_file(path))
        except (SafetensorError, ValueError) as error:
            raise DamagedCheckpoint(f"{path.name} is damaged") from error
    return found
