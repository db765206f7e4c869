"""Which packages would report to somebody, or leave files in a person's home? None of them, after `keep_quiet`.

OpenVINO's usage reports look up an analytics host and write an identity into the home folder as soon as its converter
is imported; matplotlib and torch keep caches there and in the system's temporary folder. Every program calls this
before it imports them; an import alone changes nothing. `tests/test_readme.py` watches what processes really ask for.
Standard library only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"  # may be deleted at any time
CACHES = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "inductor"}  # variable: folder in it
REFUSALS = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def no_reports() -> None:
    """Call this before OpenVINO is imported."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # to import it raises ImportError
    for name in REFUSALS:
        os.environ.setdefault(name, "1")


def keep_quiet() -> None:
    """The same for a whole program, before matplotlib or torch is imported; folders that a person chose stay."""
    no_reports()
    for name, folder in CACHES.items():
        os.environ.setdefault(name, str(CACHE / folder))
