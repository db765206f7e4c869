"""How does another thread have something done between two steps?

The engine is used by one thread alone, so whoever else wants something of it (an image encoded, say) leaves a function
here and waits for its result. It does not know what the functions do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from core.jobs.admission import QueueClosed, QueueFull

MAX_CALLS = 16  # waiting functions; each holds one thread of the web server
T = TypeVar("T")


class Calls:
    """Functions that wait for the worker's thread. `changed` is notified of each."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, function: Callable[[], T]) -> Future[T]:
        """Leave a function. Raises QueueFull."""
        with self._changed:
            if len(self._waiting) >= MAX_CALLS:
                raise QueueFull(f"{MAX_CALLS} other requests are waiting for the model", 1)
            future: Future[T] = Future()
            self._waiting.append((function, future))
            self._changed.notify_all()
            return future

    def answer(self) -> bool:
        """Run what waits, here and now; False when there was nothing. What stops a process passes through."""
        answered = False
        for _ in range(MAX_CALLS):  # those that come meanwhile wait for the next tick, or no step would be done
            with self._changed:
                if not self._waiting:
                    break
                function, future = self._waiting.popleft()
            answered = True
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as raised:
                    future.set_exception(raised)
                    if not isinstance(raised, Exception):
                        raise
        return answered

    def refuse(self) -> None:
        """Tell all that wait that the server stopped."""
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(QueueClosed("the server stopped"))
