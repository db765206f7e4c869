"""In which thread does the engine live, and how does everybody else ask it?

`EngineService` makes the engine in the worker's thread, drives the queue there and answers calls from other threads.
It knows neither HTTP nor what generates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from core.engine import Engine, EngineInfo
from core.jobs.batching import EngineBatch, Watcher, rows_of, steps_of
from core.jobs.models import Models, ModelSource
from core.jobs.queue import JobQueue
from core.jobs.store import Store

T = TypeVar("T")
log = logging.getLogger(__name__)
CPU_BATCH, ACCELERATOR_BATCH = 16, 64  # images in one call of the network, unless somebody says otherwise


class EngineService:
    """The engine, its state, its queue and its store: all that outlives a request."""

    def __init__(
        self,
        engines: Callable[[], Engine] | Models,
        store: Store,
        queue: JobQueue,
        watcher: Watcher,
        max_batch: int | None,
        watermark: bool = True,
    ) -> None:
        self.watermark = watermark  # of the images of jobs that are accepted from now on
        self.models = engines if isinstance(engines, Models) else Models([ModelSource("", engines)])
        self._store, self._watcher, self._max_batch = store, watcher, max_batch
        self.queue = queue
        self.batch: EngineBatch | None = None
        self.state, self.failure = "STARTING", ""

    @property
    def info(self) -> EngineInfo | None:
        """What the first model says of itself, once it was loaded."""
        return None if self.batch is None else self.models.info(self.models.first)

    def info_of(self, shown: str | None) -> EngineInfo | None:
        """The same of the model of this name, whatever the case; of the first for None."""
        name = self.models.find(shown)
        return None if self.batch is None or name is None else self.models.info(name)

    def ahead(self) -> list[tuple[int, int]]:
        """Rows a step and steps to do of all jobs that run or wait; none before the model is loaded."""
        if self.batch is None or self.info is None:
            return []
        waiting = [(rows_of(request, self.info_of(request.get("model")) or self.info), steps_of(request))
                   for request in self.queue.waiting_requests()]
        return self.batch.ahead + waiting

    def start(self) -> None:
        """Load and work in the engine's thread."""
        self.queue.start(self.load)

    def load(self) -> EngineBatch | None:
        """Make the engine; None, with the reason in `failure`, when that fails. Runs in the engine's thread."""
        try:
            info = self.models.engine(self.models.first).info
        except Exception as error:  # the server stays up to say what is wrong
            log.exception("the model could not be loaded")
            self.failure = f"The model could not be loaded: {error.__cause__ or error}"
            self.state = "FAILED"
            return None
        max_batch = self._max_batch or (CPU_BATCH if info.device == "cpu" else ACCELERATOR_BATCH)
        self.models.describe()
        self.batch = EngineBatch(self.models, self._watcher, max_batch=max_batch)
        self.state = "READY"
        log.info("ready: %s on %s by %s, up to %d images a step", info.name, info.device, info.engine, max_batch)
        return self.batch

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Have something done by the first model's engine, in its own thread, between two steps. Raises QueueFull."""
        batch = self.batch
        assert batch is not None, "asked only when the engine is ready"
        return self.queue.call(lambda: function(self.models.engine(self.models.first, batch.models_in_use)))

    def close(self, drain_s: float = 0.0) -> None:
        """Accept nothing more, let running jobs end for up to `drain_s` seconds; the rest waits for the next start."""
        if self.state != "FAILED":
            self.state = "STOPPING"
        self.queue.close(drain_s)
        if self.queue.join(timeout_s=drain_s + 10.0):
            self._store.close()
        else:
            log.warning("the engine is still busy with a step; it ends with the process")
