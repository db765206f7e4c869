"""How does a worker do the jobs that it took?

One thread has the engines, as on a server that generates by itself: it answers calls, drops what was cancelled, lets
in what there is room for, and takes all of it one step further (`core/jobs/batching.py`). The threads of Celery wait
here, one for each job. It does not know Celery, nor how news travels (`core/workers/publisher.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from core.engine import Engine, JobError
from core.jobs.batching import EngineBatch
from core.jobs.calls import Calls
from core.jobs.job import Job, explained
from core.jobs.models import Models
from core.workers import messages
from core.workers.messages import News

T = TypeVar("T")
log = logging.getLogger(__name__)
IDLE_AFTER_S = 1.0
SPEED_OVER_S = 10.0  # seconds over which steps are counted


class RemoteJob:
    """An attempt at a job, as the batch sees a job: what it achieves is told to `tell`."""

    def __init__(
        self, attempt: str, session: str, job_id: str, request: Mapping[str, Any], tell: Callable[[News], None]
    ) -> None:
        self.attempt, self.session, self.id, self.request = attempt, session, job_id, request
        self.cancel_requested = False
        self.ended = threading.Event()
        self.deadline = float("inf")
        self._tell, self._number = tell, 0

    def progress(self, done: int, total: int) -> None:
        self.tell(messages.PROGRESS, [done, total])

    def keep(self, files: Mapping[str, bytes], events: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> None:
        self.tell(messages.KEEP, list(events), files)

    def emit(self, kind: str, data: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
        self.tell(messages.EMIT, [kind, dict(data)], files or {})

    def tell(self, kind: str, data: Any = None, files: Mapping[str, bytes] | None = None) -> None:
        """Say what happened; after the end nothing more is said."""
        if self.ended.is_set():
            return
        self._number += 1
        self._tell(News(self.attempt, self._number, kind, data, files or {}))
        if kind in (messages.END, messages.RETURNED):
            self.ended.set()


class Counts:
    """What a worker has done (`core.jobs.batching.Watcher`)."""

    def __init__(self) -> None:
        self.num_ended = 0
        self._steps: deque[float] = deque(maxlen=4096)  # when they were done

    def stepped(self, seconds: float) -> None:
        self._steps.append(time.monotonic())

    def generated(self, num_images: int) -> None:
        return

    def ended(self, succeeded: bool) -> None:
        self.num_ended += 1

    @property
    def steps_per_second(self) -> float:
        """Of the last seconds."""
        since = time.monotonic() - SPEED_OVER_S
        return round(sum(moment > since for moment in tuple(self._steps)) / SPEED_OVER_S, 2)


class Runner:
    """The jobs that this worker took. `changed` is called whenever one came or went, in any thread."""

    def __init__(self, models: Models, max_batch: int) -> None:
        self.models, self.max_batch, self.counts = models, max_batch, Counts()
        self.batch = EngineBatch(models, self.counts, max_batch=max_batch)
        self.changed: Callable[[], None] = lambda: None
        self._wake = threading.Condition()
        self._calls = Calls(self._wake)
        self._jobs: dict[str, RemoteJob] = {}  # taken and not ended, in their order
        self._waiting: deque[RemoteJob] = deque()  # those of them that are not in the batch yet
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def attempts(self) -> list[str]:
        """What was taken and is not over."""
        with self._wake:
            return list(self._jobs)

    @property
    def has_room(self) -> bool:
        """Whether another job may be taken: the images that were taken do not fill a step yet."""
        with self._wake:
            taken = sum(job.request.get("candidates") or job.request["n_images"] for job in self._jobs.values())
            return not self._closed and taken < self.max_batch

    def start(self) -> None:
        """Work from now on; the models are loaded."""
        self._thread.start()

    def do(self, job: RemoteJob, limit_s: float) -> None:
        """Have a job done; returns when it is over, cancelled or handed back."""
        with self._wake:
            if self._closed:
                job.tell(messages.RETURNED)
                return
            job.deadline = time.monotonic() + limit_s
            self._jobs[job.attempt] = job
            self._waiting.append(job)
            self._wake.notify_all()
        self.changed()
        job.ended.wait()

    def cancel(self, attempt: str) -> None:
        """Nobody wants this any more, if it is done here."""
        with self._wake:
            if attempt in self._jobs:
                self._jobs[attempt].cancel_requested = True
                self._wake.notify_all()

    def cancel_all_but(self, sessions: Collection[str]) -> None:
        """The other servers are gone: nobody waits for what they sent."""
        with self._wake:
            gone = [job.attempt for job in self._jobs.values() if job.session not in sessions]
        for attempt in gone:
            self.cancel(attempt)

    def call(self, function: Callable[[Engine], T], model: str) -> Future[T]:
        """Have something done by the engine of a model between two steps. Raises QueueFull."""
        return self._calls.add(lambda: function(self.models.engine(model, self.batch.models_in_use)))

    def close(self, drain_s: float) -> None:
        """Take nothing more, and hand back what is not over after `drain_s` seconds."""
        with self._wake:
            self._closed = True
            for job in self._waiting:
                self._end(job, messages.RETURNED)
            self._waiting.clear()
            self._wake.wait_for(lambda: not self._jobs, drain_s)
            for job in tuple(self._jobs.values()):
                self._end(job, messages.RETURNED)
            self._wake.notify_all()

    # ---- the engine's thread

    def _run(self) -> None:
        idling = True
        while True:
            with self._wake:
                busy = self._wake.wait_for(lambda: self._jobs or self._calls or self._closed,
                                           IDLE_AFTER_S if idling else None)
                if self._closed and not self._jobs:
                    break
            if not busy:
                idling = self.batch.on_idle()
                continue
            self._calls.answer()
            self._drop()
            self._admit()
            if any(job not in self._waiting for job in tuple(self._jobs.values())):
                self._step()
        self._calls.refuse()

    def _drop(self) -> None:
        now = time.monotonic()
        for job in tuple(self._jobs.values()):
            late = now > job.deadline
            if not (job.cancel_requested or late):
                continue
            self.batch.drop(cast(Job, job))
            error = JobError("time_limit", "The job took longer than a worker may take for one.",
                             "Ask for fewer steps or images, or start workers with a longer --job-seconds.")
            if job.cancel_requested:  # no success: should anybody listen after all, the job begins again
                self._end(job, messages.RETURNED)
            else:
                self._end(job, messages.END, error.to_dict())

    def _admit(self) -> None:
        while self._waiting:
            with self._wake:
                job = self._waiting[0] if self._waiting else None
            # a RemoteJob is all that a batch uses of a Job
            if job is None or not self.batch.has_room(cast(Job, job)):
                return
            with self._wake:
                self._waiting.remove(job)
            try:
                self.batch.admit(cast(Job, job))
            except Exception as raised:
                self._end(job, messages.END, explained(raised, f"job {job.id} could not start").to_dict())

    def _step(self) -> None:
        try:
            for job, error in self.batch.step():
                self._end(cast(RemoteJob, job), messages.END, None if error is None else error.to_dict())
        except Exception as raised:  # whatever it was, these jobs failed and say why; the next ones get their turn
            error = explained(raised, "a step failed")
            for one in tuple(self._jobs.values()):
                if one not in self._waiting:
                    self.batch.drop(cast(Job, one))
                    self._end(one, messages.END, error.to_dict())

    def _end(self, job: RemoteJob, kind: str, error: Mapping[str, str] | None = None) -> None:
        with self._wake:
            job.tell(kind, error)
            self._jobs.pop(job.attempt, None)
            if job in self._waiting:
                self._waiting.remove(job)
            self._wake.notify_all()
        self.changed()
