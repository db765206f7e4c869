"""How does an array travel as JSON?"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_json(array: np.ndarray) -> dict[str, Any]:
    """An array for JSON."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"shape": list(array.shape), "type": array.dtype.str, "data": data}


def from_json(found: Mapping[str, Any]) -> np.ndarray:
    """The array that `to_json` wrote."""
    return np.frombuffer(base64.b64decode(found["data"]), np.dtype(found["type"])).reshape(found["shape"]).copy()
