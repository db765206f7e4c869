"""What may a flag of `./start.py` say?

Each function reads one kind of value, from the command line or from its FACES_ twin in the environment, and refuses
others with a sentence that names both. It does not know which flags there are (`start.py`).
"""

from __future__ import annotations

import argparse
import re
from typing import Any


def port_number(text: str) -> int:
    """A TCP port from a flag or its environment twin."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, give 1 to 65535 (--port or FACES_PORT)")
    return int(text)


def thread_count(text: str) -> int:
    """A number of CPU threads; 0 leaves the choice to torch."""
    if not text.isdecimal() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no thread count, give 0 to 1024 (--threads or FACES_THREADS)")
    return int(text)


def device_name(text: str) -> str:
    """auto, cpu, mps, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device, give auto, cpu, mps, cuda or cuda:N (--device or FACES_DEVICE)"
        )
    return text


class Several(argparse.Action):
    """A flag that may come more than once, or with commas; the first one takes the place of what its twin said."""

    def __call__(
        self, parser: argparse.ArgumentParser, space: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        before = getattr(space, self.dest)
        setattr(space, self.dest, ([] if before is self.default else before) + several(values))


def several(text: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
