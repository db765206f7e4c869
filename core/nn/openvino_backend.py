"""How does a network run fast on a CPU? Compiled by OpenVINO, where that is installed.

A torch network is traced once and compiled for this CPU with its number of rows fixed, which makes it a fifth faster
than one that takes any: for one row, on all threads together, and, where asked for, for pairs, on two streams of half
the threads each, which is faster still where there are many rows and costs the memory of a second network. What is
compiled is compared with torch and kept in a folder: the next start reads it back in a second instead of tracing and
compiling again. It is found by a key over everything that decides it (weights, source, versions, CPU, settings), holds
a checksum, is written aside and renamed, and is made anew when anything is wrong with it; a folder that cannot be
written costs time, nothing else. Nothing is downloaded, and the converter that reports its use to the vendor is not
used: the frontend below it is.

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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.quiet import no_reports

log = logging.getLogger(__name__)
MAGIC = b"faces-compiled-1"
KEPT = 16  # files in the folder: a few models, precisions and thread counts
ROWS = 2  # that one stream of several computes at once
STREAMS = 2  # where there are threads enough
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # largest difference from torch, over the largest number


class CompileError(RuntimeError):
    """A network could not be compiled here, or did not give what torch gives; torch itself still works."""


def installed_version() -> str | None:
    """The version of OpenVINO; None where it is not installed or does not load. Costs an import."""
    if importlib.util.find_spec("openvino") is None:
        return None
    no_reports()
    try:
        import openvino
    except (ImportError, OSError) as error:  # a wheel for another machine
        log.warning("OpenVINO is installed and does not load: %s", error)
        return None
    return str(openvino.__version__).split("-")[0]


class Composed(nn.Module):
    """Functions of one tensor, one after the other; `owner` is the module whose weights they use."""

    def __init__(self, owner: nn.Module, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.owner, self.functions = owner, functions

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x


class Fixed:
    """A network compiled for a fixed number of `rows`, with a request for each of its streams.

    Arrays in, one float32 array out: torch would cut and join the larger ones with threads of its own, one of which
    then waits at full speed where a stream is to compute.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.rows = int(model.input(0).partial_shape[0].get_length())
        self._requests = self._make()

    def _make(self) -> list[Any]:
        return [self._model.create_infer_request() for _ in range(int(self._model.get_property("NUM_STREAMS")))]

    @property
    def at_once(self) -> int:
        """Rows that are computed side by side."""
        return self.rows * len(self._requests)

    def __call__(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Any number of rows up to `at_once`; a request that is not full computes its last row again.

        Raises torch.OutOfMemoryError when memory is short.
        """
        count, answers = len(inputs[0]), []
        arrays = [[x[first : first + self.rows] for x in inputs] for first in range(0, count, self.rows)]
        if missing := -count % self.rows:
            arrays[-1] = [np.concatenate([x, *[x[-1:]] * missing]) for x in arrays[-1]]
        busy = self._requests[: len(arrays)]
        try:
            for request, mine in zip(busy[1:], arrays[1:], strict=True):
                request.start_async(mine, share_inputs=True)  # they are read where they are
            answers.append(busy[0].infer(arrays[0], share_inputs=True)[0])  # the output is copied out
            for request in busy[1:]:
                request.wait()
                answers.append(request.get_output_tensor(0).data.copy())
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or "bad_alloc" in str(error) or "allocate" in str(error)):
                raise
            for request in busy[1:]:  # they read arrays that are about to go
                with suppress(MemoryError, RuntimeError):
                    request.wait()
            self._requests = self._make()
            raise torch.OutOfMemoryError(f"out of memory: {error}"[:300]) from error
        return joined(answers)[:count]


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows one after the other; one part alone is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Compiled:
    """A compiled network: tensors in, one float32 tensor out, all on the CPU. One thread at a time.

    What computes pairs is made (`make_pairs`) when first there is more than one row; without it, or where that gives
    None, rows are computed one after the other. Raises torch.OutOfMemoryError when memory is short.
    """

    def __init__(self, alone: Fixed, make_pairs: Callable[[], Fixed | None] | None = None) -> None:
        self._alone, self._make_pairs = alone, make_pairs
        self._pairs: Fixed | None = None

    def prepare(self) -> bool:
        """Make what computes pairs now, not in somebody's job; False: that was done before, or is not wanted."""
        make, self._make_pairs = self._make_pairs, None  # whatever comes of it: once
        if make is None:
            return False
        self._pairs = make()
        return True

    def __call__(self, *inputs: Tensor) -> Tensor:
        given = [x.detach().contiguous().numpy() for x in inputs]
        count, found, first = len(given[0]), [], 0
        if count > 1:
            self.prepare()
        while first < count:
            left = count - first
            # a lone pair would leave a stream idle: one after the other, on all threads, is faster
            one = self._alone if self._pairs is None or left <= self._pairs.at_once // 2 else self._pairs
            rows = slice(first, first + min(left, one.at_once))
            found.append(one([x[rows] for x in given]))
            first = rows.stop
        return torch.from_numpy(joined(found))

    def denoise(self, x: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        """A flattened denoiser as what it was made of; `condition` is a dataclass of tensors."""
        return self(x, timestep.float(), *(getattr(condition, field.name) for field in fields(condition)))


@cache
def process_core() -> Any:
    """The one `openvino.Core` of this process, which stays until it ends.

    Each Core's CPU plugin gives the thread that makes it a stack for signal handlers (sigaltstack), and puts back the
    one it found when it goes. Two that go in the order in which they came leave a stack that is unmapped, and the next
    signal, such as Ctrl-C, ends the process with SIGSEGV (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


class Compiler:
    """Compiles networks for the CPU of this machine. Raises CompileError where OpenVINO is not installed."""

    def __init__(self, folder: Path | None, threads: int, dtype: torch.dtype = torch.float32) -> None:
        version = installed_version()
        if version is None:
            raise CompileError("OpenVINO is not installed")
        self._core = process_core()
        self.version, self.dtype, self._folder = version, dtype, folder
        self._hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self._hint,  # stated: left alone, some CPUs would compute in 16 bits
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # two programs that pin their threads share the same cores
        }
        self._streams = min(STREAMS, threads)
        facts = [self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        self._circumstances = [MAGIC, version, torch.__version__, sys.version, *facts]

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"OpenVINO {self.version} {self._hint}"

    def compile(
        self, name: str, module: nn.Module, example: Sequence[Tensor], weights: str, pairs: bool = False
    ) -> Compiled:
        """`module`, which takes tensors like `example` and gives one, for any number of rows, of which `example` has
        two. Every other axis is as long as in `example`, but for the `open_axes` (input, axis) of the module, if any.

        `weights` is a hash of the weights. `pairs`: more than one row at a time is worth memory. Raises CompileError
        when it cannot be compiled or disagrees with torch.
        """

        def make_pairs() -> Fixed | None:
            try:
                return self._fixed(name, module, example, weights, ROWS, self._streams)
            except CompileError as error:
                log.warning("rows are computed one by one: %s", error)
                return None

        return Compiled(self._fixed(name, module, example, weights, 1, 1), make_pairs if pairs else None)

    def _fixed(
        self, name: str, module: nn.Module, example: Sequence[Tensor], weights: str, rows: int, streams: int
    ) -> Fixed:
        settings, path = {**self._settings, "NUM_STREAMS": streams}, None
        if self._folder is not None:
            shapes = list(zip(fixed_shapes(module, example, rows), (str(one.dtype) for one in example), strict=True))
            key = repr([*self._circumstances, settings, weights, shapes, *sources(module)]).encode()
            path = self._folder / f"{name}-{hashlib.sha256(key).hexdigest()[:32]}.compiled"
            blob = read_checked(path)
            if blob is not None:
                try:
                    return Fixed(self._core.import_model(io.BytesIO(blob), "CPU", settings))
                except RuntimeError as error:
                    log.warning("%s cannot be used (%s): it is made anew", path, first_line(error))
        began = time.perf_counter()
        try:
            decoder = trace(module, example)  # the model may read weights from it: it stays until all is compiled
            network = convert(decoder)
            network.reshape(dict(enumerate(fixed_shapes(module, example, rows))))
            model = self._core.compile_model(network, "CPU", settings)
            compiled = Fixed(model)
            check(compiled, module, example, TOLERANCE[self.dtype])
        except (RuntimeError, TypeError, ValueError) as error:
            raise CompileError(f"{name}: {first_line(error)}") from error
        seconds = time.perf_counter() - began
        log.info("compiled the %s for this CPU (rows at once: %d) in %.1f s", name, compiled.at_once, seconds)
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


def fixed_shapes(module: nn.Module, example: Sequence[Tensor], rows: int) -> list[list[int]]:
    """The shapes of a network's inputs once its rows are fixed; -1 is any length."""
    free = getattr(module, "open_axes", ())
    return [[rows, *(-1 if (i, axis) in free else length for axis, length in enumerate(one.shape[1:], start=1))]
            for i, one in enumerate(example)]


def check(compiled: Fixed, module: nn.Module, example: Sequence[Tensor], tolerance: float) -> None:
    """Raises ValueError unless the compiled network gives what the module does, with as many rows as it takes and with
    one, which shows whether the trace took its number of rows for a constant."""
    for count in {1, compiled.at_once}:
        rows = [one[torch.arange(count) % len(one)] for one in example]
        with torch.no_grad():
            wanted = module(*rows)
        found = torch.from_numpy(compiled([one.contiguous().numpy() for one in rows]))
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
        move_to_front(path)
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
        move_to_front(path)
        for old in by_use(path.parent)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the compiled network cannot be kept in %s (%s): the next start compiles again", path.parent, error)


def by_use(folder: Path) -> list[Path]:
    """The compiled networks in a folder, the longest unused first."""
    return sorted(folder.glob("*.compiled"), key=lambda one: one.stat().st_mtime_ns)


def move_to_front(path: Path) -> None:
    """Give a file that was just used a later time than all others have: theirs may be of a clock that was ahead."""
    newest = max((one.stat().st_mtime_ns for one in by_use(path.parent) if one != path), default=0)
    now = max(time.time_ns(), newest + 10**9)  # some disks know whole seconds alone
    os.utime(path, ns=(now, now))


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]
