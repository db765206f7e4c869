"""How is a large array file made so that a full disk is an error, and not the end of the process?

A file that is only as long as the array has no blocks yet; writing to its memory map on a full disk kills the process
(SIGBUS). Here the blocks are reserved first. It does not know what the arrays hold.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 20


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new ``.npy`` file of zeros, mapped into memory, whose room on the disk is reserved.

    Raises OSError that says how much was needed where there is no room; then no file is left.
    """
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_2_0(
                file, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape})
            _reserve(file, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(error.errno, f"the disk is full: {amount(size)} are needed for", str(path)) from error
    return np.load(path, mmap_mode="r+", allow_pickle=False)


def _reserve(file: Any, size: int) -> None:
    file.flush()
    start = file.tell()
    if hasattr(os, "posix_fallocate"):
        if size:
            os.posix_fallocate(file.fileno(), start, size)
        return
    for done in range(0, size, BLOCK):  # what is written has its room
        file.write(bytes(min(BLOCK, size - done)))


def amount(size: float) -> str:
    """Bytes for people: 3.1 MB, 9.9 GB; never "0.0 GB" for something."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
