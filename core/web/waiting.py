"""How does a request wait until its jobs are drawn?

Clients of other servers' APIs, and `POST /text_to_image?wait=30`, want pictures in the answer. A request that waits
holds one thread of the web server, so their number is bounded, as that of event streams is (`core/web/sse.py`). The
jobs are jobs like all others: they go on when the client goes away, and after a restart.

It does not know what is answered then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flask import request

from core.jobs.job import Job
from core.jobs.queue import JobQueue
from core.web.errors import Problem

MAX_WAITING_REQUESTS = 12
LOOK_EVERY_S = 0.5  # how soon it is noticed that a client has gone or the server stops


class WaitingRequests:
    """The requests that wait for jobs: at most `limit` at once."""

    def __init__(self, queue: JobQueue, limit: int = MAX_WAITING_REQUESTS) -> None:
        self._queue, self._limit = queue, limit
        self._free = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()
        self._by_client: dict[str, list[Sequence[Job]]] = {}

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places. Raises a 429 problem when all are taken."""
        if not self._free.acquire(blocking=False):
            raise Problem(429, f"{self._limit} requests wait for their pictures already; ask POST /text_to_image "
                               "for a job instead, and watch it.", {"Retry-After": "5"})
        try:
            yield
        finally:
            self._free.release()

    def wait(self, jobs: Sequence[Job], timeout_s: float = float("inf")) -> bool:
        """Wait until all of these jobs have ended; False after `timeout_s`, when the client is gone, or at the end of
        the server."""
        gone = request.environ.get("waitress.client_disconnected", lambda: False)
        deadline = time.monotonic() + timeout_s
        for job in jobs:
            last = 0
            while not job.finished:
                left = deadline - time.monotonic()
                if left <= 0 or self._queue.closed or gone():
                    return False
                for event in self._queue.wait_events(job, last, min(left, LOOK_EVERY_S)):
                    last = event.id
        return True

    def wait_if_possible(self, job: Job, timeout_s: float) -> bool:
        """As `wait`; without a free place it is False at once."""
        if not self._free.acquire(blocking=False):
            return False
        try:
            return self.wait([job], timeout_s)
        finally:
            self._free.release()

    @contextmanager
    def of_client(self, client: str, jobs: Sequence[Job]) -> Iterator[None]:
        """While the block runs, `jobs` are those for which this client waits."""
        with self._lock:
            self._by_client.setdefault(client, []).append(jobs)
        try:
            yield
        finally:
            with self._lock:
                entries = self._by_client[client]
                entries.remove(jobs)
                if not entries:
                    del self._by_client[client]

    def jobs_of(self, client: str) -> list[Sequence[Job]]:
        """The jobs of each request in which this client waits now, the oldest request first."""
        with self._lock:
            return list(self._by_client.get(client, ()))
