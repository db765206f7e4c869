"""How does a server have its jobs done elsewhere, each exactly once?

`RemoteBatch` is what the queue drives (`core.jobs.worker.Batch`), as `EngineBatch` is where the engine is in the same
process: queue, fairness, durability and HTTP see no difference. A job that is let in is sent as an attempt; what its
worker says is told to the job. When the worker is gone, the attempt is void and the job waits again, in its old place,
as after a restart of the server. Only the newest attempt at a job is listened to, and the job ends with its first end.

Little more is sent than the workers have room for, so that the order of the waiting jobs is decided here, almost at
the last moment. It does not know Redis (`core/workers/link.py`).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.engine import EngineInfo, JobError
from core.jobs.batching import Watcher, num_generated, rows_of, steps_of
from core.jobs.job import Job, explained
from core.jobs.models import Models
from core.jobs.worker import BeginAgain
from core.workers import messages
from core.workers.link import Link
from core.workers.messages import News

log = logging.getLogger(__name__)
AHEAD = 4  # images a worker that wait in Celery's queue: who ends a job need not wait for the way there and back
MOST_LOSSES = 5  # workers that may be lost with one job; it may be the job that ends them
WAIT_S = 0.02  # for news, before the queue looks for new and cancelled jobs again


@dataclass(frozen=True)
class RemoteCosts:
    """What a step costs the workers (as `core.jobs.batching.StepCosts`)."""

    steps: list[tuple[int, float]]
    seconds_per_picture: float


@dataclass(eq=False)
class Attempt:
    """A job that was sent. `order` rises with every attempt of this server; `seen_at` is when its worker last said, or
    could have said to us, that it has it."""

    job: Job
    order: int
    seen_at: float
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    worker: str | None = None
    number: int = 0  # of its last news


class RemoteBatch:
    """The jobs of a server that its workers do."""

    def __init__(self, link: Link, models: Models, watcher: Watcher) -> None:
        self._link, self._models, self._watcher = link, models, watcher
        self._attempts: dict[str, Attempt] = {}
        self._lost: list[Attempt] = []  # could not be sent
        self._losses = Counter[str]()  # of workers, by job
        self._order = self._last_taken = self._pulses = 0

    # ---- what any thread may ask

    @property
    def models_in_use(self) -> frozenset[str]:
        """None: nothing is loaded here."""
        return frozenset()

    @property
    def num_images(self) -> int:
        """Images of all jobs that were sent."""
        return sum(num_generated(one.job.request) for one in tuple(self._attempts.values()))

    @property
    def seconds_per_image_step(self) -> float | None:
        """As the first worker measures it."""
        return next((one.seconds_per_image_step for one in self._link.workers), None)

    @property
    def costs(self) -> RemoteCosts:
        """As the first worker measures them: jobs that are alone on it take so long."""
        for one in self._link.workers:
            return RemoteCosts([(int(rows), seconds) for rows, seconds in one.step_costs], one.seconds_per_picture)
        return RemoteCosts([], 0.0)

    @property
    def ahead(self) -> list[tuple[int, int]]:
        """Rows a step and the steps that are left of each job that was sent."""
        found = []
        for one in tuple(self._attempts.values()):
            info, request = self._info_of(one.job), one.job.request
            if info is not None:
                found.append((rows_of(request, info), max(0, (one.job.total or steps_of(request)) - one.job.done)))
        return found

    @property
    def is_away(self) -> bool:
        """Redis does not answer, or no worker is there."""
        return not (self._link.connected and self._link.workers)

    # ---- the queue's thread

    def has_room(self, job: Job) -> bool:
        room = sum(one.max_batch + AHEAD for one in self._link.workers)
        return not self._attempts or self.num_images + num_generated(job.request) <= room

    def admit(self, job: Job) -> None:
        """Send the job to whoever has room."""
        self._order += 1
        attempt = Attempt(job, self._order, time.monotonic())
        self._attempts[attempt.name] = attempt
        if not self._link.send(attempt.name, job.id, job.request):
            self._lost.append(attempt)

    def drop(self, job: Job) -> None:
        """The job was cancelled: its worker hears it before its next step."""
        self._losses.pop(job.id, None)
        for attempt in [one for one in self._attempts.values() if one.job is job]:
            del self._attempts[attempt.name]
            self._link.void(attempt.name)

    def on_idle(self) -> bool:
        return False

    def step(self) -> Iterator[tuple[Job, JobError | None]]:
        """Tell the jobs what happened to them; yield those that ended, or have to begin again."""
        for news in self._link.news(WAIT_S):
            attempt = self._attempts.get(news.attempt)
            if attempt is not None and news.number > attempt.number:
                attempt.number = news.number
                yield from self._hear(attempt, news)
        for attempt in self._lost:
            if attempt.name in self._attempts:
                yield self._begin_again(attempt, "it could not be sent")
        self._lost.clear()
        if self._link.pulses != self._pulses:
            self._pulses = self._link.pulses
            for attempt, why in self._find_lost():
                yield self._lose(attempt, why)

    def _hear(self, attempt: Attempt, news: News) -> Iterator[tuple[Job, JobError | None]]:
        job, attempt.seen_at = attempt.job, time.monotonic()
        try:
            if news.kind == messages.TAKEN:
                attempt.worker, self._last_taken = news.data, max(self._last_taken, attempt.order)
            elif news.kind == messages.RETURNED:
                yield self._begin_again(attempt, "its worker stops")
            elif news.kind == messages.END:
                self._end(attempt)
                error = None if news.data is None else JobError(**news.data)
                self._watcher.ended(error is None)
                if error is None:
                    self._watcher.generated(job.request["n_images"])
                yield job, error
            elif not job.cancel_requested:
                if news.kind == messages.PROGRESS:
                    job.progress(*news.data)
                elif news.kind == messages.KEEP:
                    job.keep(news.files, [(kind, data) for kind, data in news.data])
                elif news.kind == messages.EMIT:
                    kind, data = news.data
                    job.emit(kind, data, news.files)
        except Exception as raised:  # the disk refuses: this job ends, and no other
            self.drop(job)
            self._watcher.ended(False)
            yield job, explained(raised, "news of a worker could not be kept", job)

    def _find_lost(self) -> list[tuple[Attempt, str]]:
        """Attempts that no worker has any more, judged by what was seen since Redis answers."""
        since, pace, now, found = self._link.connected_since, self._link.pace, time.monotonic(), []
        if since is None:
            return []
        under_way = {name for worker in self._link.workers for name in worker.attempts}
        alive = {worker.name for worker in self._link.workers}
        for attempt in tuple(self._attempts.values()):
            if attempt.name in under_way:
                attempt.seen_at = now
            unseen_s = now - max(attempt.seen_at, since)
            if attempt.worker is not None:
                if unseen_s > (pace.lease_s if attempt.worker in alive else pace.new_worker_s):
                    found.append((attempt, f"worker {attempt.worker} is gone"))
            elif unseen_s > (pace.untaken_s if alive else pace.lease_s) and (
                    not alive or self._link.queue_length == 0 or self._last_taken > attempt.order):
                found.append((attempt, "no worker took it"))
        return found

    def _lose(self, attempt: Attempt, why: str) -> tuple[Job, JobError]:
        """The job waits again, unless too many workers were lost with it."""
        self._losses[attempt.job.id] += attempt.worker is not None
        if self._losses[attempt.job.id] < MOST_LOSSES:
            return self._begin_again(attempt, why)
        job, _ = self._begin_again(attempt, why)
        del self._losses[job.id]
        self._watcher.ended(False)
        return job, JobError("worker_lost", f"{MOST_LOSSES} workers were lost while they generated this job.",
                             "See the logs of the workers; with fewer images or steps it may succeed.")

    def _begin_again(self, attempt: Attempt, why: str) -> tuple[Job, JobError]:
        log.warning("job %s waits again: %s", attempt.job.id, why, extra={"job_id": attempt.job.id})
        self._attempts.pop(attempt.name, None)
        self._link.void(attempt.name)
        return attempt.job, BeginAgain(f"The job begins again: {why}.")

    def _end(self, attempt: Attempt) -> None:
        self._attempts.pop(attempt.name, None)
        self._losses.pop(attempt.job.id, None)
        self._link.forget(attempt.name)

    def _info_of(self, job: Job) -> EngineInfo | None:
        name = self._models.find(job.request.get("model"))
        return self._models.info(name or self._models.first)


