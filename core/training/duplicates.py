"""Which prepared images are the same picture twice?

Two rows are the same where all their pixels are, whatever their files are called and however they were compressed
without loss. It does not know what happens to them then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def first_of_same(images: np.ndarray, rows: Sequence[int] | np.ndarray) -> dict[int, int]:
    """For each of ``rows`` that shows what an earlier one shows: which one.

    Shapes: images uint8 [N, H, W, 3], which may be mapped from a file; one row is read at a time.
    """
    first: dict[bytes, int] = {}
    same: dict[int, int] = {}
    for row in rows:
        digest = hashlib.blake2b(np.ascontiguousarray(images[row]).data, digest_size=16).digest()
        if (earlier := first.setdefault(digest, int(row))) != row:
            same[int(row)] = earlier
    return same
