"""How is a batch computed when memory is short?

Rows are computed in as few pieces as fit: a piece that does not is halved, down to single rows. It does not know what
is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from core.engine import JobError
from core.nn.device import is_out_of_memory

T = TypeVar("T")


def in_pieces(
    compute: Callable[[slice], T], count: int, at_once: int, device: torch.device
) -> Iterator[tuple[slice, T | None]]:
    """The results of `compute` over `count` rows, in order, with the rows of each: `at_once` of them or, where the
    memory of `device` is short, fewer. None: there is not enough for that row alone."""
    waiting = [slice(first, min(first + at_once, count)) for first in range(0, count, at_once)][::-1]
    while waiting:
        rows, result = waiting.pop(), None
        try:
            result = compute(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if result is None:  # past the except clause: the error would keep the failed call's memory alive
            if device.type != "cpu":
                torch.get_device_module(device).empty_cache()
            if rows.stop - rows.start > 1:
                middle = (rows.start + rows.stop) // 2
                waiting += [slice(middle, rows.stop), slice(rows.start, middle)]
                continue
        yield rows, result


def all_pieces(
    compute: Callable[[slice], T], count: int, device: torch.device, at_once: int | None = None
) -> list[T]:
    """The results of `compute` over `count` rows, `at_once` of them (None: all), or in as many pieces as memory asks
    for. Raises JobError (`out_of_memory`)."""
    found = []
    for _, result in in_pieces(compute, count, count if at_once is None else at_once, device):
        if result is None:
            raise out_of_memory()
        found.append(result)
    return found


def out_of_memory() -> JobError:
    """What is said when a single row does not fit."""
    return JobError("out_of_memory", "The device has too little memory for even one image.",
                    "Close other programs that use it, or start with --device cpu.")
