"""Is a model folder complete, and do its parts belong together?

Reads the index, the configurations and the headers of the weight files, and hashes the weights; it needs neither torch
nor any other package, so that `./start.py doctor` can ask where nothing is installed. It does not know how a network is
built.

Format of the weights: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

COMPONENTS = ("vae", "clip", "unet")  # what a model folder must hold, each with its config.json and model.safetensors
# What a component says it was made for: its name, where its config says so, whose hash that is, and what mends it.
PARENTS = (
    ("unet", ("parents", "vae"), "vae", "train it again with `python conditional_ldm.py --train`"),
    ("unet", ("parents", "clip"), "clip", "train it again with `python conditional_ldm.py --train`"),
    ("turbo", ("parents", "unet"), "unet", "train it again with `python conditional_ldm.py --distill consistency`"),
    ("preview", ("encoder_sha256",), "vae", "fit it again with `python vae.py --fit-preview`"),
    ("correction", ("unet",), "unet", "measure it again with `python evaluate.py fit-correction`"),
    ("emphasis", ("clip",), "clip", "measure it again with `python evaluate.py fit-prompt-rewriting`"),
    ("emphasis", ("unet",), "unet", "measure it again with `python evaluate.py fit-prompt-rewriting`"),
)
# Widths that must agree: of a component, by which path in its config, and of which other.
WIDTHS = (
    ("unet", ("network", "latent_channels"), "vae", ("network", "latent_channels")),
    ("unet", ("network", "text_width"), "clip", ("network", "text_width")),
    ("preview", ("latent_channels",), "vae", ("network", "latent_channels")),
)
# Axes of weights that must be as long as the config says.
AXES = (
    ("clip", "text.tokens.weight", 0, ("network", "pieces")),
    ("clip", "text.tokens.weight", 1, ("network", "text_width")),
    ("vae", "latent_mean", 0, ("network", "latent_channels")),
    ("unet", "conv_in.weight", 1, ("network", "latent_channels")),
    ("unet", "door.weight", 1, ("network", "latent_channels")),  # as older folders have it
)


def model_folder(root: Path, name: str) -> Path:
    """`--model` is a name in models/ or the path of a folder."""
    return root / "models" / name if (root / "models" / name).is_dir() else Path(name).expanduser().resolve()


def model_problem(root: Path, name: str) -> str | None:
    """The sentence for a model folder that is absent or incomplete; None for one that can be loaded."""
    folder = model_folder(root, name)
    if not folder.is_dir():
        there = sorted(path.parent.name for path in (root / "models").glob("*/model_index.json"))
        remedy = f"start with --model {there[0]}" if there else "clone the repository again, or train one (README)"
        found = ", ".join(there) or "none"
        return f"There is no model {name!r}, neither in models/ (found: {found}) nor as a path: {remedy}."
    needed = [f"{part}/{file}" for part in COMPONENTS for file in ("config.json", "model.safetensors")]
    missing = [file for file in ("model_index.json", *needed) if not (folder / file).is_file()]
    if missing:
        return (
            f"The model in {folder} is not complete (missing: {', '.join(missing)}): restore it, for the bundled one "
            f"with 'git checkout models/{name}', or train it again (README)."
        )
    return None


def model_faults(folder: Path) -> list[str]:
    """One sentence for each thing in a model folder that does not fit the rest, with its remedy; none where all fits.

    Checks that every component is whole (its hash), was made for those beside it (the hashes of its parents), and has
    the shapes that its configuration says.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        known = {name: str(entry["sha256"]) for name, entry in index["components"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / 'model_index.json'} cannot be read ({_reason(error)}): restore the model folder."]
    faults, configs, shapes = [], {}, {}
    for name, digest in known.items():
        try:
            if _hash(folder / name / "model.safetensors") != digest:
                faults.append(f"{folder / name / 'model.safetensors'} is damaged or was exchanged (its hash is not "
                              "that of model_index.json): restore it or train it again.")
            shapes[name] = read_shapes(folder / name / "model.safetensors")
            configs[name] = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, struct.error) as error:
            faults.append(f"{folder / name} cannot be read ({_reason(error)}): restore it or train it again.")
    for name in ("vae", "clip", "unet"):
        if name not in known:
            faults.append(f"{folder} has no {name} in its model_index.json: train it or restore the folder.")
    emphasis = folder / "emphasis" / "config.json"  # a table without weights, which the index does not list
    if emphasis.is_file():
        try:
            configs["emphasis"] = json.loads(emphasis.read_text(encoding="utf-8"))
        except ValueError as error:
            faults.append(f"{emphasis} cannot be read ({_reason(error)}): restore it or delete it.")
    return faults + _strange_parents(folder, known, configs) + _wrong_widths(folder, configs, shapes)


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a safetensors file. Raises OSError, ValueError or struct.error for a damaged one."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("it is cut short")
        header = json.loads(file.read(length))
    return {name: value["shape"] for name, value in header.items() if name != "__metadata__"}


def _strange_parents(folder: Path, known: dict[str, str], configs: dict[str, Any]) -> list[str]:
    """Components that were made for another parent than the one that lies beside them, one sentence each."""
    own = {**known, "vae": _at(configs.get("vae"), ("encoder_sha256",))}  # latents depend on the encoder alone
    strange: dict[tuple[str, str], list[str]] = {}
    for name, path, parent, remedy in PARENTS:
        made_for = _at(configs.get(name), path)
        if made_for is not None and own.get(parent) is not None and made_for != own[parent]:
            strange.setdefault((name, remedy), []).append(parent)
    return [f"The {name} in {folder} was made for another {' and another '.join(parents)} than the one there: "
            f"{remedy}, or restore the folder." for (name, remedy), parents in strange.items()]


def _wrong_widths(folder: Path, configs: dict[str, Any], shapes: dict[str, dict[str, list[int]]]) -> list[str]:
    """Widths that differ between two components, or between weights and their configuration, one sentence each."""
    faults = []
    for name, path, other, place in WIDTHS:
        one, two = _at(configs.get(name), path), _at(configs.get(other), place)
        if one is not None and two is not None and one != two:
            faults.append(f"The {name} in {folder} has {path[-1]} {one} and the {other} {two}: train the {name} again, "
                          "or restore the folder.")
    for name, tensor, axis, path in AXES:
        width, shape = _at(configs.get(name), path), shapes.get(name, {}).get(tensor)
        if width is not None and shape is not None and (len(shape) <= axis or shape[axis] != width):
            faults.append(f"The weights of the {name} in {folder} have the shape {shape} at {tensor}, and its "
                          f"config.json says {path[-1]} {width}: restore the folder.")
    pieces, tokenizer = _at(configs.get("clip"), ("network", "pieces")), folder / "clip" / "tokenizer.json"
    if pieces is not None:
        try:
            count = len(json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [*faults, f"{tokenizer} cannot be read ({_reason(error)}): restore the folder."]
        if count != pieces:
            faults.append(f"{tokenizer} has {count} pieces and the clip beside it {pieces}: restore the folder.")
    return faults


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError)) else str(error)
