"""How does a network run fast on a CPU? Compiled by OpenVINO, where that is installed.

A torch network is traced once, with every axis of its inputs that may vary left open, compiled for this CPU, compared
with torch, and kept in a folder: the next start reads it back in a second instead of tracing and compiling again. What
is kept is found by a key over everything that decides it (weights, source, versions, CPU, settings), holds a checksum,
is written aside and renamed, and is made anew when anything is wrong with it; a folder that cannot be written costs
time, nothing else. Nothing is downloaded, and the converter that reports its use to the vendor is not used: the
frontend below it is.

It does not know what the network computes. OpenVINO: https://docs.openvino.ai; the frontend's Python side is
openvino/frontend/pytorch/ts_decoder.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import io
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.diffusion import Condition

MAGIC = b"faces-compiled-1"
KEPT = 16  # files in the folder: a few models, precisions and thread counts
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # largest difference from torch, over the largest number

log = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """A network could not be compiled here, or did not give what torch gives; torch itself still works."""


def installed_version() -> str | None:
    """The version of OpenVINO; None where it is not installed or does not load. Costs an import."""
    if importlib.util.find_spec("openvino") is None:
        return None
    try:
        import openvino
    except (ImportError, OSError) as error:  # a wheel for another machine
        log.warning("OpenVINO is installed and does not load: %s", error)
        return None
    return str(openvino.__version__).split("-")[0]


class Flat(nn.Module):
    """A denoiser of (x, timestep, condition) that takes the fields of the condition one after the other."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, timestep: Tensor, *parts: Tensor) -> Tensor:
        return self.denoiser(x, timestep, Condition(*parts))


class Composed(nn.Module):
    """Functions of one tensor, one after the other; `owner` is the module whose weights they use."""

    def __init__(self, owner: nn.Module, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.owner, self.functions = owner, functions

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x


class Compiled:
    """A compiled network: tensors in, one float32 tensor out, all on the CPU. One thread at a time.

    Raises torch.OutOfMemoryError when memory is short.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._request = model.create_infer_request()

    def __call__(self, *inputs: Tensor) -> Tensor:
        arrays = [tensor.detach().contiguous().numpy() for tensor in inputs]
        try:  # the inputs are read where they are, the output is copied out
            answer = self._request.infer(arrays, share_inputs=True)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or "bad_alloc" in str(error) or "allocate" in str(error)):
                raise
            self._request = self._model.create_infer_request()
            raise torch.OutOfMemoryError(f"out of memory: {error}"[:300]) from error
        return torch.from_numpy(answer[0])

    def denoise(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """A `Flat` network as the denoiser that it was made of."""
        parts = [getattr(condition, field.name) for field in fields(condition)]
        return self(x, timestep.float(), *parts)


class Compiler:
    """Compiles networks for the CPU of this machine. Raises CompileError where OpenVINO is not installed."""

    def __init__(self, folder: Path | None, threads: int, dtype: torch.dtype = torch.float32) -> None:
        version = installed_version()
        if version is None:
            raise CompileError("OpenVINO is not installed")
        import openvino

        self._core = openvino.Core()
        self.version, self.dtype, self._folder = version, dtype, folder
        hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,  # stated: left alone, some CPUs would compute in 16 bits
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # two programs that pin their threads share the same cores
        }
        facts = [self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        self._circumstances = [MAGIC, version, torch.__version__, sys.version, *facts, self._settings]

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"OpenVINO {self.version} {self._settings['INFERENCE_PRECISION_HINT']}"

    def compile(self, name: str, module: nn.Module, example: Sequence[Tensor], weights: str) -> Compiled:
        """`module`, which takes tensors like `example` and gives one, with any length of the axes that `example` does
        not say otherwise (every size the network itself does not fix).

        `weights` is a hash of the weights. Raises CompileError when it cannot be compiled or disagrees with torch.
        """
        path = None
        if self._folder is not None:
            shapes = [(tuple(one.shape[1:]), str(one.dtype)) for one in example]
            key = repr([*self._circumstances, weights, shapes, *sources(module)]).encode()
            path = self._folder / f"{name}-{hashlib.sha256(key).hexdigest()[:32]}.compiled"
            blob = read_checked(path)
            if blob is not None:
                try:
                    return Compiled(self._core.import_model(io.BytesIO(blob), "CPU", self._settings))
                except RuntimeError as error:
                    log.warning("%s cannot be used (%s): it is made anew", path, first_line(error))
        began = time.perf_counter()
        try:
            decoder = trace(module, example)  # the model may read weights from it: it stays until all is compiled
            model = self._core.compile_model(convert(decoder), "CPU", self._settings)
            compiled = Compiled(model)
            check(compiled, module, example, TOLERANCE[self.dtype])
        except (RuntimeError, TypeError, ValueError) as error:
            raise CompileError(f"{name}: {first_line(error)}") from error
        log.info("compiled the %s for this CPU in %.1f s", name, time.perf_counter() - began)
        if path is not None:
            keep(path, model)
        return compiled


def trace(module: nn.Module, example: Sequence[Tensor]) -> Any:
    """A torch module as OpenVINO's frontend reads it; sizes that the trace does not fix stay open."""
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the result is compared with the network afterwards: that is what it warns of
        traced = torch.jit.trace(module.eval(), tuple(example), check_trace=False)
        return TorchScriptPythonDecoder(traced)


def convert(decoder: Any) -> Any:
    """An OpenVINO model of a traced module."""
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def check(compiled: Compiled, module: nn.Module, example: Sequence[Tensor], tolerance: float) -> None:
    """Raises ValueError unless the compiled network gives what the module does, with one row and with three.

    Another number of rows than the trace had shows whether it took that number for a constant.
    """
    for count in (1, 3):
        rows = [one[torch.arange(count) % len(one)] for one in example]
        with torch.no_grad():
            wanted = module(*rows)
        found = compiled(*rows)
        if found.shape != wanted.shape:
            raise ValueError(f"compiled it gives {list(found.shape)} instead of {list(wanted.shape)}")
        error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
        if not error <= tolerance:
            raise ValueError(f"compiled it differs from torch by {error:.2g} of the largest number")


def sources(module: nn.Module) -> list[str]:
    """Hashes of the files that say what the module computes, beside torch's own."""
    files = {inspect.getfile(type(part)) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(files)]


def read_checked(path: Path) -> bytes | None:
    """What `keep` wrote; None when it is not there or not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head, blob = data[: len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    if head != MAGIC + hashlib.sha256(blob).digest():
        log.warning("%s is damaged: it is made anew", path)
        return None
    with suppress(OSError):
        os.utime(path)  # the longest unused goes first
    return blob


def keep(path: Path, model: Any) -> None:
    """Write a compiled model so that no reader ever sees a part of it, whoever else writes the same; old ones go."""
    exported = model.export_model()
    blob = exported if isinstance(exported, bytes) else exported.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".writing", delete=False) as out:
            out.write(MAGIC + hashlib.sha256(blob).digest())
            out.write(blob)
        os.replace(out.name, path)
        found = sorted(path.parent.glob("*.compiled"), key=lambda one: one.stat().st_mtime)
        for old in found[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the compiled network cannot be kept in %s (%s): the next start compiles again", path.parent, error)


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]
