"""On which device, in which type and in how many processes does a run compute?

One accelerator object for a CPU, one GPU or several; gradients are averaged and stop signals agreed between processes.
It does not know what is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.command import SettingError
from core.nn.device import has_bf16


def send(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device. To a GPU it goes from pinned memory and nobody waits: an ordinary copy lets
    everything end first that the GPU has been told, which then idles while the host prepares the next step."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def average_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one flat message; nothing happens with a single process."""
    if accelerator.num_processes == 1:
        return
    with_grad = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.reshape(-1) for p in with_grad])  # type: ignore[union-attr]
    flat = accelerator.reduce(flat, reduction="mean")
    offset = 0
    for p in with_grad:
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))  # type: ignore[union-attr]
        offset += p.numel()


def make_accelerator(device: str = "auto", precision: str = "auto") -> Any:
    """The accelerate object that chooses device, precision and process group.

    ``precision`` is "no", "bf16" or "auto" (bf16 where the CPU or GPU computes it natively, else fp32). Raises
    SettingError where fewer processes work together than were asked for.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # torch reads this at its first large allocation: huge pages for activations made a CPU step 1.3 times faster
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if precision == "auto":
        chosen = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
        precision = "bf16" if has_bf16(chosen) else "no"
    # accelerate keeps its first answer for the life of the process, but training may be followed by measuring in fp32
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not in_group)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes: the fastest kernels are worth looking for
    asked = asked_processes()
    # without a GPU accelerate gives every process of a launcher a training of its own, unless it is told "cpu"
    accelerator = Accelerator(cpu=device == "cpu" or (asked > 1 and not torch.cuda.is_available()),
                              mixed_precision=precision)
    if accelerator.num_processes < asked:
        raise SettingError(f"{asked} processes were started and only {accelerator.num_processes} works with this one; "
                           "start them with `torchrun --nproc_per_node N`, or one without a launcher")
    return accelerator


def asked_processes() -> int:
    """How many processes a launcher says it has started. Raises SettingError for `accelerate launch --cpu`, which
    starts a single one on one machine whatever --num_processes says."""
    said = [int(os.environ[name]) for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
            if os.environ.get(name, "").isdigit()]
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not said and on_cpu and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        raise SettingError("`accelerate launch --cpu` has started one process, not the several it was asked for; use "
                           "`torchrun --nproc_per_node N` before the same command, with --run-folder in place of --run")
    return max(said, default=1)


def mean_over_processes(accelerator: Any, values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each value over all processes, which must all ask for the same names at the same step."""
    if accelerator.num_processes == 1:
        return dict(values)
    flat = torch.tensor(list(values.values()), dtype=torch.float32, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(flat, reduction="mean").tolist(), strict=True))


def attention_kernel(device: torch.device) -> Any:
    """Context that picks the fastest attention for short sequences: plain matrix products on a CPU (the fused kernel's
    backward pass is about 1.3 times slower there at under 100 tokens), torch's own choice elsewhere."""
    from contextlib import nullcontext

    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.MATH]) if device.type == "cpu" else nullcontext()


def process_slice(accelerator: Any, count: int) -> slice:
    """The part of a global batch of ``count`` that this process works on; ``count`` must divide evenly."""
    if count % accelerator.num_processes:
        raise SettingError(f"--batch-size {count} must be a multiple of the {accelerator.num_processes} processes")
    share = count // accelerator.num_processes
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def agreed(accelerator: Any) -> Callable[[int], int]:
    """The largest number that any process says, for every process."""
    if accelerator.num_processes == 1:
        return int
    return lambda mine: int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).max())


def gather_with_gradient(accelerator: Any, values: Tensor) -> Tensor:
    """Rows of all processes in order; the gradient flows into this process's own rows."""
    if accelerator.num_processes == 1:
        return values
    whole: Tensor = accelerator.gather(values.detach()).clone()
    whole[accelerator.process_index * len(values) : (accelerator.process_index + 1) * len(values)] = values
    return whole
