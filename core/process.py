"""How does a program run another, with a Python of its own, so that neither outlives or disturbs the other?

A parent that is killed can ask for nothing. So the child's standard input is a pipe whose other end the parent holds,
and which every system closes with it; a child that calls `end_with_parent` notices, and ends. On Linux the kernel also
kills it by itself. `die_with_parent` is for programs that do not know of this, such as pip.

Standard library only and no syntax newer than Python 3.7: `start.py` needs it before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Problem(Exception):
    """What went wrong and what to do about it: one sentence for a person, never a traceback."""


def venv_python(root: Path) -> Path:
    """The interpreter of the project's own environment, whether it exists or not."""
    return root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def clean_env(**extra: str) -> dict[str, str]:
    """This process's variables without the two that make an environment import somebody else's packages."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


ENDS_WITH_STDIN = "ENDS_WITH_STDIN"  # environment of a child whose standard input ends with its parent
PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html


def tied(env: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of Popen for a child that calls `end_with_parent`. The process object must be kept: it has the pipe."""
    return {"stdin": subprocess.PIPE, "env": {**env, ENDS_WITH_STDIN: "1"}}


def end_with_parent() -> None:
    """In the child: from now on end at once when the parent has ended, in whatever way. Nothing, unless `tied`."""
    if os.environ.pop(ENDS_WITH_STDIN, None) is None:  # popped: a child of this one has another parent
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os._exit(1)

    _ask_kernel(getattr(signal, "SIGKILL", signal.SIGTERM))
    threading.Thread(target=watch, name="parent", daemon=True).start()


def die_with_parent() -> None:
    """The `preexec_fn` of a program that does not know of its parent: on Linux it is asked to end with it."""
    _ask_kernel(signal.SIGTERM)


# arguments of Popen for such a program; elsewhere than on Linux it goes on
TOGETHER: dict[str, Any] = {
    "stdin": subprocess.DEVNULL, "preexec_fn": die_with_parent if sys.platform == "linux" else None
}


def _ask_kernel(number: int) -> None:
    """A signal to this process when the thread that started it ends: in a `Child`, its parent's main thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError, ImportError):
            import ctypes  # which a Python built from source may lack

            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
