"""Which models does a command line name, and how do they become engines?

`api.py` and `worker.py` take the same flags. What loads a model imports torch, in the engine's thread, while the page
is there already; a server whose workers generate only reads what its models say of themselves. This file knows neither
HTTP nor how jobs are done.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from core.engine import Engine, EngineInfo
from core.jobs.model_files import is_ours, size_of
from core.jobs.models import Models, ModelSource

ROOT = Path(__file__).resolve().parent
DEFAULT_MODEL = ROOT / "models" / "celeba128"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which models there are and what computes them."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--engine", choices=("auto", "openvino", "torch"), default="auto", help="what computes on a CPU (%(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: faster, seeds less exact (%(default)s)")
    add("--model", type=Path, action="append", default=[], dest="models",
        help="a model folder, or a Stable Diffusion 1.x of other people: a diffusers folder, a .safetensors or a .ckpt "
        "file; may be given again, the first is meant where a request names none")
    add("--image-size", type=at_least_one, help="pixels a side of other people's models (default: as trained)")
    add("--threads", type=at_least_one, help="CPU threads for the model (default: all cores)")
    add("--max-batch", type=at_least_one, help="images of one step (default: 16 on a CPU, 64 on an accelerator)")


def at_least_one(text: str) -> int:
    """A whole number of a flag. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def paths_of(arguments: argparse.Namespace) -> list[Path]:
    """The models of a command line, each once; the bundled one where none is named."""
    return list(dict.fromkeys(arguments.models)) or [DEFAULT_MODEL]


def words_of(arguments: argparse.Namespace) -> list[str]:
    """The flags of `add_model_flags` again, for another process with the same models."""
    words = ["--device", arguments.device, "--engine", arguments.engine, "--precision", arguments.precision]
    words += [word for path in paths_of(arguments) for word in ("--model", str(path))]
    for flag, value in (("--image-size", arguments.image_size), ("--threads", arguments.threads),
                        ("--max-batch", arguments.max_batch)):
        words += [] if value is None else [flag, str(value)]
    return words


def named_models(paths: list[Path]) -> list[tuple[str, Path]]:
    """Each path with a name of its own."""
    found: dict[str, Path] = {}
    for path in paths:
        stem = path.stem if path.is_file() else path.resolve().name
        found[next(name for name in (stem, *(f"{stem}-{n}" for n in range(2, 99))) if name not in found)] = path
    return list(found.items())


def models_of(arguments: argparse.Namespace) -> Models:
    """The models of a command line, to be loaded in this process."""
    device, threads, precision = arguments.device, arguments.threads, arguments.precision

    def load_ours(path: Path) -> Engine:
        from generator import FaceGenerator

        faces = FaceGenerator.load(path, device, threads, precision, arguments.engine)
        faces.warm_up()
        return faces

    def load_others(path: Path, name: str) -> Engine:
        import torch

        from core.pretrained.engine import PretrainedEngine

        if threads is not None:
            torch.set_num_threads(threads)
        engine = PretrainedEngine.load(path, device, precision, arguments.image_size, name)
        engine.warm_up()
        return engine

    def describe(path: Path, name: str) -> EngineInfo:
        from core.pretrained.engine import PretrainedEngine

        return PretrainedEngine.describe(path, device, precision, arguments.image_size, name)

    def free_memory() -> int | None:
        from core.nn import device as devices

        return devices.free_memory(devices.pick_device(device))

    def release() -> None:
        from core.nn.device import release_memory

        release_memory()

    sources = []
    for name, path in named_models(paths_of(arguments)):
        load = partial(load_ours, path) if is_ours(path) else partial(load_others, path, name)
        described = (lambda: None) if is_ours(path) else partial(describe, path, name)
        sources.append(ModelSource(name, load, described, partial(size_of, path)))
    return Models(sources, free_memory, release)


def descriptions_of(arguments: argparse.Namespace) -> list[tuple[str, Callable[[], EngineInfo]]]:
    """The models of a command line by name, each with what reads its description and loads none of its weights."""
    from dataclasses import replace
    from typing import Any

    def describe(path: Path, name: str) -> EngineInfo:
        found: Any
        if is_ours(path):
            from generator import FaceGenerator

            found = FaceGenerator.describe(path)
        else:
            from core.pretrained.engine import PretrainedEngine

            found = PretrainedEngine.describe(path, "cpu", arguments.precision, arguments.image_size, name)
        return replace(found, device="workers", engine="Celery workers")

    return [(name, partial(describe, path, name)) for name, path in named_models(paths_of(arguments))]
