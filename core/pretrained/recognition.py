"""What is in this file or folder, and can it generate here?

`recognise(path)` looks at names, headers and shapes and loads nothing: our own model folder, a folder that diffusers
wrote, or a single file in the key layout of the original Stable Diffusion 1.x code. Everything else is refused with
one sentence that says what it is instead. A pickle is read by torch's restricted unpickler or not at all.

It does not know networks. Formats: https://huggingface.co/docs/safetensors, https://docs.pytorch.org/docs/stable/
generated/torch.load.html (`weights_only`), https://github.com/CompVis/stable-diffusion (the key layout).
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from core.command import UserError

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # of diffusers, of one architecture
COMPONENTS = {  # of a diffusers folder: the files of which one must be there, the preferred one first
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
             "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"),
}
TOKENIZER_FILES = ("vocab.json", "merges.txt")
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
CONV_IN, CROSS = UNET + "input_blocks.0.0.weight", UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
WIDTH_OF_2 = 1024  # of the text encoder of Stable Diffusion 2; that of 1.x has 768
MAX_HEADER = 64 * 2**20  # bytes of a safetensors header; that of Stable Diffusion 1.5 has 130 kB
WANTS_CODE = ("unsupported global", "unsupported class", "unrecognized function", "allowlisted", "is blocked")  # torch
SAMPLE, SAMPLES = 65536, 32  # bytes of one look into a file for its hash, and how many looks

Shapes = Mapping[str, tuple[int, ...]]


class PretrainedError(UserError, RuntimeError):
    """A model cannot be used; the message is one sentence that says why and what helps."""


@dataclass(frozen=True)
class ModelFiles:
    """A recognised model. `kind`: our own folder, a diffusers folder, or a single file.

    `weights` are the files that hold its tensors, `tokenizer` the folder with vocab.json and merges.txt (None for our
    own), `config` what describes the whole: the parsed model_index.json of a folder.
    """

    path: Path
    kind: Literal["own", "diffusers", "single_file"]
    weights: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    config: Mapping[str, Any] = ()  # type: ignore[assignment]

    @property
    def name(self) -> str:
        """What people call it: the folder's or the file's name."""
        return self.path.stem if self.kind == "single_file" else self.path.name

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in self.weights)


def recognise(path: str | Path) -> ModelFiles:
    """What `path` holds. Raises PretrainedError when it is nothing that can generate here."""
    path = Path(path)
    if not path.exists():
        raise PretrainedError(f"{path} does not exist: name a model folder, a .safetensors or a .ckpt file")
    return _recognise_folder(path) if path.is_dir() else _recognise_file(path)


# ---- folders ---------------------------------------------------------------------------------------------------------


def _recognise_folder(folder: Path) -> ModelFiles:
    index = folder / "model_index.json"
    if not index.is_file():
        raise PretrainedError(f"{folder} is not a model folder (model_index.json is missing): name one, or the "
                              ".safetensors file in it")
    config = read_json(index)
    if "_class_name" not in config:
        return ModelFiles(folder, "own", tuple(sorted(folder.glob("*/model.safetensors"))), None, config)
    pipeline = config["_class_name"]
    if "XL" in pipeline:
        raise PretrainedError(f"{folder} is a Stable Diffusion XL model ({pipeline}), which has another architecture: "
                              "only the 1.x family generates here")
    if pipeline not in PIPELINES:
        raise PretrainedError(
            f"{folder} is a {pipeline}: only a StableDiffusionPipeline of the 1.x family generates here"
        )
    weights = []
    for part, names in COMPONENTS.items():
        found = next((folder / part / name for name in names if (folder / part / name).is_file()), None)
        if found is None or not (folder / part / "config.json").is_file():
            raise PretrainedError(f"{folder} is not complete: {part}/config.json or {part}/{names[0]} is missing")
        weights.append(found)
    check_family(folder, *_unet_shape(read_json(folder / "unet" / "config.json")))
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise PretrainedError(f"{folder} is not complete: scheduler/scheduler_config.json is missing")
    for file in weights:
        shapes_of(file)
    return ModelFiles(folder, "diffusers", tuple(weights), find_tokenizer(folder / "tokenizer", folder), config)


def _unet_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Channels in and the width of the text that a UNet's config.json says."""
    width = config.get("cross_attention_dim", 0)
    return int(config.get("in_channels", 4)), int(width if isinstance(width, int) else 0)


def check_family(path: Path, channels: int, width: int) -> None:
    """Raises PretrainedError for a UNet that reads something else than latents and the text of the 1.x family."""
    if width >= WIDTH_OF_2:
        raise PretrainedError(f"{path} is a Stable Diffusion 2 or XL model (its text is {width} wide): only the 1.x "
                              "family generates here")
    if channels != 4:
        what = {9: "an inpainting model", 8: "a model that follows instructions"}.get(channels, "another kind of model")
        raise PretrainedError(f"{path} is {what} (its UNet reads {channels} channels): name one for text to image; it "
                              "can inpaint here too")


def find_tokenizer(folder: Path, model: Path) -> Path:
    """The folder if both files of a CLIP tokenizer are in it. Raises PretrainedError."""
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise PretrainedError(f"{model} has no tokenizer: put {' and '.join(missing)} into {folder}")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises PretrainedError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} is damaged ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise PretrainedError(f"{path} is damaged (no JSON object): copy it again")
    return found


# ---- single files ----------------------------------------------------------------------------------------------------


def _recognise_file(path: Path) -> ModelFiles:
    if path.suffix not in (".safetensors", ".ckpt"):
        raise PretrainedError(f"{path} is no model: name a folder, a .safetensors or a .ckpt file")
    shapes = shapes_of(path)
    if any(name.startswith("conditioner.embedders.") for name in shapes):
        raise PretrainedError(f"{path} is a Stable Diffusion XL model, which has another architecture: only the 1.x "
                              "family generates here")
    if any(name.startswith("cond_stage_model.model.") for name in shapes):
        raise PretrainedError(f"{path} is a Stable Diffusion 2 model (it reads text by OpenCLIP): only the 1.x family "
                              "generates here")
    if CONV_IN not in shapes or CROSS not in shapes:
        raise PretrainedError(f"{path} is not a Stable Diffusion 1.x checkpoint: it has no {CONV_IN}")
    check_family(path, shapes[CONV_IN][1], shapes[CROSS][1])
    for prefix, what in ((VAE, "VAE"), (TEXT, "text encoder")):
        if not any(name.startswith(prefix) for name in shapes):
            raise PretrainedError(f"{path} has no {what} in it (no {prefix}*): name the full checkpoint")
    return ModelFiles(path, "single_file", (path,), find_tokenizer(path.parent, path))


def shapes_of(path: Path) -> Shapes:
    """The tensors of a weights file by name, without reading them. Raises PretrainedError."""
    if path.suffix == ".safetensors":
        return _safetensors_shapes(path)
    return {name: tuple(value.shape) for name, value in open_pickle(path).items()}


def _safetensors_shapes(path: Path) -> Shapes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, max(size - 8, 0)):
            raise PretrainedError(f"{path} is no safetensors file, or cut off at its beginning: copy it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise PretrainedError(f"{path} is no safetensors file (its header cannot be read)") from error
    if 8 + length + end > size:
        raise PretrainedError(f"{path} is cut off: {size:,} of {8 + length + end:,} bytes are there; copy it again")
    return shapes


def open_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .ckpt or .bin file, mapped into memory where that goes. Nothing in it is run.

    Raises PretrainedError for a file that is cut off, or asks for more than tensors and plain containers.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip and not zipfile.is_zipfile(path):
        raise PretrainedError(f"{path} is cut off (its end is missing): copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the protocols of old files
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever a damaged file makes of its reader
        if any(words in str(error).lower() for words in WANTS_CODE):
            raise PretrainedError(f"{path} is a pickle that asks for more than tensors, so it could run code: it is "
                                  "not opened; use the same model as .safetensors") from error
        raise PretrainedError(f"{path} is no checkpoint that torch can read: copy it again") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


# ---- which weights are they? -----------------------------------------------------------------------------------------


def weights_hash(files: ModelFiles) -> str:
    """SHA-256 over the sizes of the weights and looks into them at even distances, hexadecimal.

    Two megabytes a file instead of four gigabytes, so that a server can name a model that it has not loaded. Another
    training changes every tensor, and so every look; a file changed in between two looks by hand is not noticed.
    """
    digest = hashlib.sha256()
    for file in files.weights:
        for piece in _looks(file):
            digest.update(piece)
    return digest.hexdigest()


def _looks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield str(size).encode()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
            yield file.read(SAMPLE)
