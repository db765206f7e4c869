"""What does a server need in place of an engine of its own?

The batch that sends its jobs to workers, threads that wait for answers to calls, and what `/ready`, `/health` and
`/metrics` tell of the workers (`core.jobs.service.Elsewhere`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from core.jobs.admission import QueueFull
from core.jobs.batching import Watcher
from core.jobs.models import Models
from core.workers.broker import Broker
from core.workers.link import Link
from core.workers.messages import USUAL_PACE, Pace, WorkerState, named
from core.workers.remote_batch import RemoteBatch

T = TypeVar("T")
MAX_CALLS = 8  # that wait for workers at once


class Workers:
    """The workers of a server. `link` is its connection with them."""

    def __init__(self, broker: Broker, pace: Pace = USUAL_PACE) -> None:
        self.link = Link(broker, pace)
        self._pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="call")
        self._calls: set[Future[Any]] = set()
        self._is_open = False

    def batch(self, models: Models, watcher: Watcher) -> RemoteBatch:
        """Begin to work with those that have these models, once they are described."""
        self.link.open({info.name: info.model_hash for info in models.infos})
        self._is_open = True
        return RemoteBatch(self.link, models, watcher)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Wait for a worker's answer in a thread of its own. Raises QueueFull."""
        self._calls = {call for call in self._calls if not call.done()}
        if len(self._calls) >= MAX_CALLS:
            raise QueueFull(f"{MAX_CALLS} other requests are waiting for workers", 1)
        future = self._pool.submit(function)
        self._calls.add(future)
        return future

    @property
    def notice(self) -> str:
        """What keeps jobs waiting; "" when nothing does."""
        link = self.link
        if not self._is_open or link.connected and link.workers:
            return ""
        if not link.connected:
            return "The job broker (Redis) does not answer. Jobs wait, and go on when it does."
        if link.other_workers:
            return (f"No worker has this server's model: {link.other_workers[0].name} has "
                    f"{named(link.other_workers[0].model_hashes)}. Jobs wait.")
        return "No worker is there. Jobs wait, and go on when one is."

    @property
    def states(self) -> Sequence[dict[str, Any]]:
        """What each worker says of itself; one with other models takes no jobs."""
        return [told(one, True) for one in self.link.workers] + [told(one, False) for one in self.link.other_workers]

    def close(self) -> None:
        """Take nothing more; running jobs begin again with the next server on the same data."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.link.close()


def told(worker: WorkerState, takes_jobs: bool) -> dict[str, Any]:
    """A worker as `/ready` shows it."""
    return {"name": worker.name, "device": worker.device, "engine": worker.engine, "takes_jobs": takes_jobs,
            "jobs": len(worker.attempts), "images": worker.images, "max_batch": worker.max_batch,
            "steps_per_second": worker.steps_per_second, "ended": worker.ended,
            "models": {name: digest[:12] for name, digest in worker.model_hashes.items()}}
