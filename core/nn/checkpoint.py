"""How is a trained model kept on disk, and how is a wrong one refused?

A model folder holds one sub-folder a component (``config.json`` + ``model.safetensors``) and ``model_index.json`` with
a hash of every weight file. Files are written under a temporary name, synced and renamed; loading is strict and never
unpickles anything. This module does not know what the components are.

Format of the weights: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from core.command import UserError, defer_signals
from core.nn.weight_keys import upgrade_keys

INDEX = "model_index.json"
FORMAT = 1
Network = TypeVar("Network", bound=torch.nn.Module)


class ModelFolderError(UserError, RuntimeError):
    """A model folder is missing, damaged or does not fit; the message says what to do."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` never holds a part of it: temporary name, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".writing")
    with open(aside, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, path)


def git_commit(folder: Path) -> str | None:
    """The commit that the code in ``folder`` stands at, or None outside a checkout."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def read_index(folder: str | Path) -> dict[str, Any]:
    """The parsed ``model_index.json``; raises ModelFolderError when it is not there or not readable."""
    path = Path(folder) / INDEX
    if not path.exists():
        raise ModelFolderError(f"{folder} is not a model folder ({INDEX} is missing); train one or name another")
    try:
        index = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ModelFolderError(f"{path} is damaged ({error}); restore it from the repository") from error
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise ModelFolderError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    return index


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def update_index(folder: str | Path, **values: Any) -> None:
    """Merge top-level ``values`` into ``model_index.json`` (made when absent)."""
    folder = Path(folder)
    index = read_index(folder) if (folder / INDEX).exists() else {"format": FORMAT, "components": {}}
    index.update(values)
    write_json(folder / INDEX, index)


def save_component(
    folder: str | Path,
    component: str,
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    half: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write one component and its entry in the index; returns the hash of its weights.

    ``half`` stores floating-point tensors as fp16. ``extra`` (parent hashes, metrics, ...) goes into the index entry.
    Raises ValueError when a weight is not finite or overflows fp16.
    """
    target = Path(folder) / component
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in state_dict.items():
        value = value.detach().cpu()
        if half and value.is_floating_point():
            value = value.to(torch.float16)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{component}: weight {name} is not finite; it is not released")
        tensors[name] = value.contiguous().clone()
    weights = target / "model.safetensors"
    aside = weights.with_name(weights.name + ".writing")
    save_file(tensors, aside, metadata={"component": component})
    with open(aside, "rb+") as handle:
        os.fsync(handle.fileno())
    digest = file_hash(aside)
    with defer_signals(then_stop=True):  # weights and index belong together: Ctrl-C waits for both
        os.replace(aside, weights)
        write_json(target / "config.json", dict(config))
        components = _components(folder)
        components[component] = {"sha256": digest, "bytes": weights.stat().st_size, **dict(extra or {})}
        update_index(folder, components=components)
    return digest


def _components(folder: str | Path) -> dict[str, Any]:
    return dict(read_index(folder)["components"]) if (Path(folder) / INDEX).exists() else {}


def load_component(folder: str | Path, component: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state_dict in fp32) of one component, checked against the hash in the index.

    Raises ModelFolderError when the folder or the component is missing, damaged or half-copied.
    """
    folder = Path(folder)
    entry = read_index(folder)["components"].get(component)
    weights, config = folder / component / "model.safetensors", folder / component / "config.json"
    if entry is None or not weights.exists() or not config.exists():
        raise ModelFolderError(f"{folder} has no component {component!r}; train it or restore the folder")
    if file_hash(weights) != entry["sha256"]:
        raise ModelFolderError(f"{weights} does not match {INDEX}: damaged or half-copied; restore the folder")
    try:
        settings, tensors = json.loads(config.read_text()), upgrade_keys(load_file(weights))
    except (SafetensorError, ValueError) as error:
        raise ModelFolderError(f"{folder / component} cannot be read ({error}); restore the folder") from error
    return settings, {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def read_component_config(folder: str | Path, component: str) -> dict[str, Any]:
    """Only the ``config.json`` of one component. Raises ModelFolderError when it is not there or not readable."""
    path = Path(folder) / component / "config.json"
    if component not in read_index(folder)["components"] or not path.exists():
        raise ModelFolderError(f"{folder} has no component {component!r}; train it or restore the folder")
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ModelFolderError(f"{path} is damaged ({error}); restore the folder") from error


def save_delta(folder: str | Path, component: str, state: Mapping[str, Tensor], base: Mapping[str, Tensor],
               config: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> str:
    """Write a component that was trained on from another as what it adds to the weights of that, in 8 bits a weight.

    A tensor's first axis has a scale for each of its rows; what ``base`` lacks counts as 0. Half the size of fp16, and
    more exact where little has changed. Returns the hash of what is written.
    """
    tensors = {}
    for name, value in state.items():
        added = value.detach().cpu().float() - base.get(name, torch.zeros(())).cpu().float()
        rows = added.reshape(len(added), -1) if added.ndim else added.reshape(1, 1)
        scale = rows.abs().amax(1).clamp_min(1e-30) / 127.0
        tensors[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(added.shape)
        tensors[f"{name}.scale"] = scale
    return save_component(folder, component, tensors, config, half=False, extra=extra)


def load_delta(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `save_delta` was given, from the tensors of the component and those it was trained from."""
    state = {}
    for name, value in tensors.items():
        if not name.endswith(".scale"):
            scale = tensors[f"{name}.scale"].view(value.shape[:1] + (1,) * (value.ndim - 1))
            state[name] = base.get(name, torch.zeros(())).float() + value.float() * scale
    return state


def drop_component(folder: str | Path, component: str) -> None:
    """Remove a component that does not fit the others any more, if it is there; first from the index."""
    components = dict(read_index(folder)["components"])
    if components.pop(component, None) is not None:
        update_index(folder, components=components)
        shutil.rmtree(Path(folder) / component, ignore_errors=True)


def component_hash(folder: str | Path, component: str) -> str:
    """The recorded hash of one component's weights."""
    entry = read_index(folder)["components"].get(component)
    if entry is None:
        raise ModelFolderError(f"{folder} has no component {component!r}")
    return str(entry["sha256"])


def folder_hash(folder: str | Path, components: Sequence[str]) -> str:
    """One hash over the recorded hashes of several components: equal hashes, equal weights."""
    joined = "".join(component_hash(folder, component) for component in components)
    return hashlib.sha256(joined.encode()).hexdigest()


def load_strictly(module: torch.nn.Module, state: Mapping[str, Tensor], what: str, *, assign: bool = False) -> None:
    """``load_state_dict(strict=True)`` whose failure is one readable sentence."""
    try:
        module.load_state_dict(dict(state), strict=True, assign=assign)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:400]
        raise ModelFolderError(f"the weights of {what} do not fit its configuration: {detail}") from error


class _Unfilled(TorchFunctionMode):
    """New weights stay as the memory was. (On the device "meta" torch would import its compiler: that takes longer.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


def build(make: Callable[[], Network], state: Mapping[str, Tensor], what: str) -> Network:
    """The module that ``make`` makes, with these very tensors as its weights.

    It is made without filling its own: random weights that are replaced at once cost most of the time of loading.
    Raises ModelFolderError when the weights do not fit.
    """
    with _Unfilled():
        module = make()
    load_strictly(module, state, what, assign=True)
    return module
