"""How is a server run as a child: watched while it starts, stopped once and cleanly, never left behind?

Ctrl+C in a terminal goes to every process of the group, and a server may take the second one for "at once". So on Linux
and macOS the child has a session of its own, and each request to stop reaches it exactly once, by this process: the
first two as SIGTERM, the third as SIGKILL. On Windows the console tells the child by itself; only the third is ours.

How it ends when its parent is killed, which can ask for nothing: `core/process.py`.

What the child says on stderr is held back until `release`, because what went wrong in a start is better told in one
sentence than in a traceback. It does not know what the child serves.

Standard library only and no syntax newer than Python 3.7, as in `launcher/environment.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from core.process import tied

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK")  # each system knows some of them
PATIENCE_S = 10  # for a child that is ended because its parent fails
# Without end a wait would not notice Ctrl+C on Windows, and elsewhere could miss one that comes just before it begins:
# the interpreter looks for signals before it blocks, not while
WAKE_S = 0.5


class Child:
    """A running process that ends when this one is asked to end; a context manager, for the main thread alone."""

    def __init__(self, command: list[str], *, cwd: Path, env: dict[str, str], closing_message: str) -> None:
        """Start `command`. `closing_message` is printed at the first request to stop, once the child was released."""
        self.asked = 0  # how often a person or a service manager asked for the end
        self._closing_message = closing_message
        self._held: bytearray | None = bytearray()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}
        for number in (getattr(signal, name) for name in STOPPING if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` and `&` mean it
                self._before[number] = signal.signal(number, self._ask)
        self._process = subprocess.Popen(
            command, cwd=str(cwd), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True, **tied(env),  # the session is ignored on Windows
        )
        self._reader = threading.Thread(target=self._read, name="stderr of the child", daemon=True)
        self._reader.start()
        if self.asked:
            self._process.terminate()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        for act in (process.terminate, process.kill):
            if process.poll() is None:
                act()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=PATIENCE_S)
        self._reader.join(timeout=1)
        if process.stdin is not None:
            process.stdin.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def status(self) -> int | None:
        """The exit status, negative for the number of a signal; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self) -> int:
        """The exit status, when there is one."""
        assert self._process is not None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(timeout=WAKE_S)
                self._reader.join(timeout=1)  # a grandchild may hold the pipe open
                return status

    @property
    def said(self) -> str:
        """What the child has said and nobody has seen."""
        if self.status is not None:
            self._reader.join(timeout=1)
        with self._lock:
            return bytes(self._held or b"").decode("utf-8", "replace")

    def forget(self) -> None:
        """Never show what the child has said so far."""
        with self._lock:
            if self._held is not None:
                self._held.clear()

    def release(self) -> None:
        """From now on what the child says is shown, and what it has said too."""
        with self._lock:
            held, self._held = self._held, None
            _show(bytes(held or b""))

    def _read(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        with self._process.stderr as pipe:
            while True:
                said = os.read(pipe.fileno(), 65536)
                if not said:
                    return
                with self._lock:
                    if self._held is None:
                        _show(said)
                    else:
                        self._held += said

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """A signal to this process: hand it on."""
        self.asked += 1
        if self._process is None:
            return
        if self.asked == 1:
            ready = self._held is None
            with contextlib.suppress(OSError):  # not print: a signal may come in the middle of another print
                os.write(2, f"\n{self._closing_message if ready else 'Stopping ...'}\n".encode())
        if self.asked > 2:
            self._process.kill()
        elif os.name != "nt":
            self._process.terminate()


def _show(said: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed terminal is no reason to end
        sys.stderr.buffer.write(said)
        sys.stderr.buffer.flush()
