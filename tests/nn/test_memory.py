"""Are rows computed in as few pieces as memory allows, in order, and are other faults left alone?"""

from __future__ import annotations

import pytest
import torch

from core.engine import JobError
from core.nn.memory import all_pieces, in_pieces

CPU = torch.device("cpu")


def room_for(most: int, asked: list[int], never: int | None = None) -> object:
    """A computation that has memory for `most` rows at a time, and for row `never` not even alone."""

    def compute(rows: slice) -> list[int]:
        asked.append(rows.stop - rows.start)
        if rows.stop - rows.start > most or rows == slice(never, (never or 0) + 1):
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return list(range(rows.start, rows.stop))

    return compute


def test_pieces_are_halved_until_they_fit_and_stay_in_order() -> None:
    asked: list[int] = []
    found = all_pieces(room_for(2, asked), 7, CPU)  # type: ignore[arg-type]
    assert sum(found, []) == list(range(7)) and asked == [7, 3, 1, 2, 4, 2, 2]
    asked.clear()
    assert [rows for rows, _ in in_pieces(room_for(2, asked), 5, 2, CPU)] == [  # type: ignore[arg-type]
        slice(0, 2), slice(2, 4), slice(4, 5)]
    assert asked == [2, 2, 1]


def test_a_row_that_never_fits_is_named_and_the_others_are_computed() -> None:
    found = list(in_pieces(room_for(4, [], never=2), 4, 4, CPU))  # type: ignore[arg-type]
    assert found == [(slice(0, 4), [0, 1, 2, 3])]  # beside others it fits
    found = list(in_pieces(room_for(1, [], never=2), 4, 4, CPU))  # type: ignore[arg-type]
    assert [(rows.start, result) for rows, result in found] == [(0, [0]), (1, [1]), (2, None), (3, [3])]
    with pytest.raises(JobError) as failed:
        all_pieces(room_for(1, [], never=2), 4, CPU)  # type: ignore[arg-type]
    assert failed.value.code == "out_of_memory" and failed.value.hint


def test_other_faults_are_not_taken_for_a_shortage() -> None:
    def broken(rows: slice) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        all_pieces(broken, 3, CPU)
