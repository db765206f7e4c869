"""What does this machine compute on: which device, in which type, and has it run out of memory?"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch


def pick_device(wanted: str = "auto") -> torch.device:
    """The device to compute on: CUDA, else MPS, else the CPU; or exactly the one that was named.

    Raises ValueError for a device that this machine or this build of torch does not have.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:N; got {wanted!r}") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {wanted!r} is not available here (torch {torch.__version__}); use auto")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 natively. Elsewhere it can be asked to, and is several times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in: fp32, or bf16 where the device has it.

    Raises ValueError for another word, or for bf16 where it is emulated.
    """
    if precision == "fp32":
        return torch.float32
    if precision != "bf16" or not has_bf16(device):
        raise ValueError(f"precision must be fp32, or bf16 on a device that has it; got {precision!r} on {device}")
    return torch.bfloat16


def is_out_of_memory(error: RuntimeError) -> bool:
    """Only CUDA has an exception of its own for it; MPS and the CPU say it in words."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in message or "can't allocate memory" in message


def free_memory(device: torch.device) -> int | None:
    """Bytes that networks may still take there; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), flags=re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def release_memory() -> None:
    """Return what unloaded networks had to the system: allocators keep it for the next ones otherwise."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)
