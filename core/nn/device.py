"""What does this machine compute on: which device, in which type, and has it run out of memory?"""

from __future__ import annotations

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
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "can't allocate memory" in told
