"""In which thread is a queue worked on, and what is worked on in it?

`Batch` is what computes, `work` the loop of the background thread. A disk that refuses stops nothing: the jobs wait
until it does not. It does not know what a tick does (`core/jobs/queue.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from core.engine import JobError
from core.jobs.job import Job
from core.jobs.storage_errors import StoreError

PRUNE_EVERY_S = 60.0  # jobs also expire while nothing else happens
IDLE_AFTER_S = 1.0  # without work; before, whoever waited for the server to start may be about to ask
WAIT_AFTER_FAULT_S = 1.0

log = logging.getLogger(__name__)


class BeginAgain(JobError):
    """No end of a job: what generated it is gone, and it has to be generated anew, from its beginning."""

    def __init__(self, message: str) -> None:
        super().__init__("begin_again", message)


class Batch(Protocol):
    """What computes: a set of jobs that advance together. Every method is called in the worker's thread.

    The batch looks at nothing but the jobs it was given, and tells what they achieve through their `progress`, `keep`
    and `emit`.
    """

    @property
    def is_away(self) -> bool:
        """Whether nothing that computes can be reached: then jobs wait, and none is asked to join."""

    def has_room(self, job: Job) -> bool:
        """Whether this waiting job may join now. Asked only while others run: an empty batch takes any job."""

    def admit(self, job: Job) -> None:
        """Let the job join. Raises JobError to fail this job alone."""

    def drop(self, job: Job) -> None:
        """Let go of a job that was admitted and has not ended: it was cancelled, or the server stops. Never raises."""

    def step(self) -> Iterable[tuple[Job, JobError | None]]:
        """Advance every job by one step; yield those that ended here, each with None for success or its error, and
        those that have to wait again, each with `BeginAgain`.

        What a job that succeeded made was emitted before it is yielded; one that is yielded has left the batch. An
        exception fails every job that is still in the batch.
        """

    def on_idle(self) -> bool:
        """Nothing has been asked for a while: do a bit (under a second) of what later jobs profit from. False: nothing
        is left to do."""


class Queue(Protocol):
    """What `work` drives: `core.jobs.queue.JobQueue`."""

    def run_next(self, batch: Batch, timeout_s: float) -> bool: ...
    def stopped(self) -> bool: ...
    def wait_stopped(self, timeout_s: float) -> None: ...
    def stop(self, batch: Batch | None) -> None: ...


def work(queue: Queue, setup: Callable[[], Batch | None]) -> None:
    """Work in this thread: `setup()` first (None ends it), then tick after tick until the queue is stopped."""
    batch, idling, told = None, True, ""
    try:
        batch = setup()
        while batch is not None and not queue.stopped():
            try:
                if not queue.run_next(batch, timeout_s=IDLE_AFTER_S if idling else PRUNE_EVERY_S):
                    idling = idling and batch.on_idle()
                told = ""
            except Exception as error:  # the disk is full, say: jobs wait until it is not
                if not isinstance(error, StoreError):
                    log.exception("the worker goes on in %.1f s", WAIT_AFTER_FAULT_S)
                elif str(error) != told:  # once, or the log would fill what is left of the disk
                    log.error("%s (the worker goes on as soon as it can)", error)
                told = str(error)
                queue.wait_stopped(WAIT_AFTER_FAULT_S)
    finally:
        queue.stop(batch)
