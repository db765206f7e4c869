"""How does a client ask for work, and a worker do it?

The waiting jobs, the running ones, and the finished ones in the store. Which states a job goes through is said in
`core/jobs/life_cycle.py`, who may wait and whose turn it is in `core/jobs/admission.py`. Finished jobs leave the memory
and are read back when asked for.

Many jobs run at once: `JobQueue.run_next` is one tick in the caller's thread, in which cancelled jobs leave, waiting
ones join while there is room, and all advance by one step. The background worker is a loop around it, and a test needs
neither a thread nor a sleep.

It does not know what a job computes: a `Batch` does. It knows nothing of HTTP, and nothing of SQL
(`core/jobs/store.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from core.engine import JobError
from core.jobs.admission import Admission, QueueClosed
from core.jobs.calls import Calls
from core.jobs.clock import seconds
from core.jobs.image_decisions import ImageDecisions
from core.jobs.job import Job, Summary, explained
from core.jobs.life_cycle import LifeCycle
from core.jobs.listing import page_of
from core.jobs.records import Change, Event, Record
from core.jobs.retention import Retention
from core.jobs.store import Store
from core.jobs.worker import PRUNE_EVERY_S, Batch, BeginAgain, work

DEFAULT_RETENTION = Retention()
ROOM_EVERY_S = 0.05  # while jobs wait, nothing runs and the batch has no room: its machines may come back
T = TypeVar("T")


class IdempotencyConflict(Exception):
    """The client used this idempotency key before, for another request."""


class UnknownJob(LookupError):
    """No job has ever had this id."""


class DeletedJob(LookupError):
    """A job had this id, but it was deleted, by its client or to make room."""


class JobQueue:
    """The waiting jobs, the running ones, the finished ones in the store, and the one thread that works on them.

    `max_waiting` bounds the queue and `max_waiting_per_client` (half of it unless told) the part of one client; `keep`
    bounds what finished jobs occupy. `clock` gives the times that people see, `elapsed`, which never jumps, measures.
    Unfinished jobs of `store` are put back into the queue at once, beyond any bound. The store stays its maker's to
    close, after `close` and `join`. Any method may raise StoreError when the disk fails.

    `images` takes what people decide about single images.
    """

    def __init__(
        self,
        store: Store,
        *,
        max_waiting: int = 64,
        max_waiting_per_client: int | None = None,
        keep: Retention = DEFAULT_RETENTION,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = seconds,
    ) -> None:
        self._store, self._keep, self._clock, self._elapsed = store, keep, clock, elapsed
        self._admission = Admission(max_waiting, max_waiting_per_client or max(1, max_waiting // 2))
        self._jobs = LifeCycle(store, self._admission, clock, elapsed)
        self._changed = self._jobs.changed
        self._calls = Calls(self._changed)
        self.images = ImageDecisions(store, self.get, clock)
        self._prune_at: float | None = None  # at once
        self._closed = False
        self._drain_until = 0.0
        self._thread: threading.Thread | None = None
        self._jobs.restore()
        self._prune_sometimes()

    # ---- the client's side

    def submit(
        self,
        name: str,
        parameters: Mapping[str, Any],
        request: Mapping[str, Any],
        *,
        client: str = "",
        warnings: Sequence[str] = (),
        idempotency_key: str | None = None,
        fingerprint: str | None = None,
    ) -> Job:
        """Accept a job: when this returns, the job survives a power cut.

        `name` is what lists search in and makes the id readable; `parameters` are shown to clients; `request` is
        whatever JSON the batch needs to do the work, now or after a restart. When the `client` has used this
        `idempotency_key` before, its first job is returned and nothing is added; `fingerprint` says whether it asks
        for the same (unless given, the request must be equal; a request in which a seed was generated never is).

        Raises: IdempotencyConflict for another fingerprint, QueueFull, QueueClosed, StoreError; TypeError or
        ValueError for a request that JSON cannot hold.
        """
        if fingerprint is None:
            fingerprint = json.dumps(request, sort_keys=True, allow_nan=False)
        fingerprint = hashlib.sha256(fingerprint.encode("utf-8", "replace")).hexdigest()
        with self._changed:
            if self._closed:
                raise QueueClosed("the queue is closed: the server is stopping")
            if idempotency_key is not None:
                first = self._store.find_key(client, idempotency_key)
                if first is not None:
                    job_id, its_fingerprint = first
                    if its_fingerprint != fingerprint:
                        raise IdempotencyConflict("this idempotency key was used for another request")
                    return self.get(job_id)
            self._admission.assert_room(self._jobs.waiting, client, self._jobs.retry_after_s)
            record = Record(
                number=self._store.next_number(), id=make_id(name), client=client, name=name,
                parameters=dict(parameters), warnings=tuple(warnings), created_at=self._clock(),
            )

            def save(changes: Sequence[Change]) -> None:
                self._store.add(record, request, changes, idempotency_key=idempotency_key, fingerprint=fingerprint)

            return self._jobs.enter(record, request, save)

    @property
    def revision(self) -> int:
        """Another number whenever a finished job has changed or gone (`Store.revision`)."""
        return self._store.revision

    def get(self, job_id: str) -> Job:
        """The job with this id. Raises UnknownJob or DeletedJob."""
        while True:
            with self._changed:
                if job_id in self._jobs.live:
                    return self._jobs.live[job_id]
            record = self._store.find(job_id)  # not under the lock: the engine need not wait for readers
            if record is None:
                raise DeletedJob(job_id) if self._store.was_deleted(job_id) else UnknownJob(job_id)
            job = None if record.finished_at is None else self._jobs.read_back(record)
            if job is not None:
                return job  # else it was submitted or deleted this very moment: look again

    def cancel(self, job_id: str) -> Job:
        """Ask one job to stop: at once when it waits, at its next step when it runs. Finished jobs stay as they are.

        Raises UnknownJob or DeletedJob. A restart does not forget what was asked.
        """
        with self._changed:
            job = self.get(job_id)
            self._jobs.cancel(job)
            return job

    def delete(self, job_id: str) -> None:
        """Cancel the job if need be and remove it for good; a running one disappears when its step ends.

        Raises UnknownJob, and DeletedJob once it is gone.
        """
        with self._changed:
            job = self.cancel(job_id)
            if not job.finished:
                self._jobs.request_deletion(job)
                return
        self._store.delete(job)
        with self._changed:
            self._jobs.live.pop(job.id, None)

    def delete_but_favourites(self, job_id: str) -> None:
        """Delete the images of a job that are no favourites, or all of it where none is. Raises: as `delete`."""
        if not self.images.delete_all_but_favourites(job_id):
            self.delete(job_id)

    def list(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        status: str | Sequence[str] | None = None,
        query: str | None = None,
        favourites: bool = False,
    ) -> tuple[Sequence[Summary], str | None]:
        """Up to `limit` jobs, newest first, and the cursor of the next page (None on the last).

        `status` is one state or several; `query` is looked for in the names, whatever their case, and among the seeds;
        `favourites` leaves only jobs that have some. Jobs that come or go do not shift the pages. Raises ValueError for
        a cursor that this method did not give.
        """
        states = (status,) if isinstance(status, str) else status
        return page_of(self._store, self._jobs, limit=limit, cursor=cursor, states=states, text=query or "",
                       favourites=favourites)

    def wait_events(self, job: Job, last: int, timeout_s: float) -> Sequence[Event]:
        """The events after id `last`, waiting up to `timeout_s` for the first one.

        Empty on time-out, after `close`, and at once when `last` is the last one of a finished job.
        """
        def is_over() -> bool:
            return self._closed or job.finished or bool(job.events) and job.events[-1].id > last

        with self._changed:
            self._changed.wait_for(is_over, timeout_s)
            return job.events_after(last)

    def counts(self) -> dict[str, int]:
        """How many jobs are waiting, running, succeeded, failed, cancelled, and finished in any way and still kept."""
        states = self._store.count()
        ends = {state: states.get(state, 0) for state in ("succeeded", "failed", "cancelled")}
        with self._changed:
            waiting, running = len(self._jobs.waiting), len(self._jobs.running)
        return {"waiting": waiting, "running": running, **ends, "finished": sum(ends.values())}

    def waiting_requests(self) -> Sequence[Mapping[str, Any]]:
        """What the waiting jobs were asked to do."""
        return [job.request for job in self._jobs.waiting]

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have `function` run in the worker's thread between two steps. Raises QueueFull, QueueClosed."""
        with self._changed:
            if self._closed or self._thread is not None and not self._thread.is_alive():
                raise QueueClosed("nobody works on the queue (any more)")
            return self._calls.add(function)

    @property
    def closed(self) -> bool:
        return self._closed

    # ---- the worker's side

    def run_next(self, batch: Batch, timeout_s: float = 0.0) -> bool:
        """One tick, here and now: answer calls, drop cancelled jobs, admit waiting ones, advance all by one step.

        Waits up to `timeout_s` for something to do; False when there was nothing. An exception of the batch fails the
        jobs concerned; KeyboardInterrupt and its like put the running jobs back into the queue and pass through.
        """
        with self._changed:
            self._changed.wait_for(self._has_work, timeout_s)
        try:
            worked = self._calls.answer()
            if self.stopped():
                self.stop(batch)
                return worked
            worked |= self._drop_cancelled(batch)
            worked |= self._admit(batch)
            if self._jobs.running:
                worked = True
                self._step(batch)
                self._drop_cancelled(batch)
        except BaseException as raised:
            if not isinstance(raised, Exception):
                self._put_back(batch)
            raise
        self._prune_sometimes()
        if not worked and self._jobs.waiting:
            self.wait_stopped(min(timeout_s, ROOM_EVERY_S))
        return worked

    def start(self, setup: Callable[[], Batch | None]) -> None:
        """Work in one background thread: `setup()` first (None ends it), then tick after tick until `close`."""
        if self._thread is not None:
            raise RuntimeError("the worker was started already")
        self._thread = threading.Thread(target=work, args=(self, setup), name="engine", daemon=True)
        self._thread.start()

    def close(self, drain_s: float = 0.0) -> None:
        """Accept nothing more, wake every reader, and let running jobs go on for up to `drain_s` seconds. Idempotent.

        Returns at once; `join` waits. What is unfinished then stays in the store and runs after the next start.
        """
        with self._changed:
            if not self._closed:
                self._closed, self._drain_until = True, time.monotonic() + drain_s
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait for the background thread to end; True when it has."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    # ---- one tick

    def _has_work(self) -> bool:
        return bool(self._closed or self._calls or self._jobs.running or self._jobs.waiting)

    def stopped(self) -> bool:
        """Whether nothing more is to be done: it was closed, and nothing runs that may still end."""
        return self._closed and (not self._jobs.running or time.monotonic() >= self._drain_until)

    def _drop_cancelled(self, batch: Batch) -> bool:
        cancelled = [job for job in self._jobs.running.values() if job.cancel_requested]
        for job in cancelled:
            batch.drop(job)
            self._end(job, None)
        return bool(cancelled)

    def _admit(self, batch: Batch) -> bool:
        """Let waiting jobs in, in their order: one that must wait for room is not overtaken by a smaller one."""
        admitted = False
        while True:
            with self._changed:
                order = () if self._closed else self._admission.order(self._jobs.waiting)
                if not order or batch.is_away or self._jobs.running and not batch.has_room(order[0]):
                    break
                job = order[0]
                self._jobs.begin(job)
                admitted = True
            try:
                batch.admit(job)
            except Exception as raised:
                self._end(job, explained(raised, f"job {job.id} could not start"))
        if admitted:
            self._jobs.move_up()
        return admitted

    def _step(self, batch: Batch) -> None:
        try:
            for job, error in batch.step():
                if isinstance(error, BeginAgain) and not job.cancel_requested:
                    self._jobs.begin_again(job)
                else:
                    self._end(job, error)
        except Exception as raised:  # whatever it was, these jobs failed and say why; the next ones get their turn
            error = explained(raised, "a step failed")
            for job in tuple(self._jobs.running.values()):
                batch.drop(job)
                self._end(job, error)

    def _end(self, job: Job, error: JobError | None) -> None:
        """Finish a job that is no longer in the batch."""
        self._jobs.end(job, error)
        self._prune_at = None

    def _put_back(self, batch: Batch | None) -> None:
        """What runs waits again, from its beginning; what its client gave up is over."""
        if batch is not None and self._jobs.running:
            self._drop_cancelled(batch)
            for job in self._jobs.running.values():
                batch.drop(job)
            self._jobs.put_back()

    def wait_stopped(self, timeout_s: float) -> None:
        """Wait until it is stopped, up to `timeout_s`."""
        with self._changed:
            self._changed.wait_for(self.stopped, timeout_s)

    def stop(self, batch: Batch | None) -> None:
        """Put what runs back into the queue, and refuse what others wait for: the worker ends."""
        self._put_back(batch)
        self._calls.refuse()

    def _prune_sometimes(self) -> None:
        if self._prune_at is None or self._elapsed() >= self._prune_at:
            self._prune_at = self._elapsed() + PRUNE_EVERY_S
            self.images.purge()
            ended = self._jobs.ended
            young = ended.within(self._keep.max_age_s)
            self._store.prune(self._keep, self._clock(), order=ended.order, young=young)


def make_id(text: str) -> str:
    """An id that a person recognises and nobody can guess: a slug of `text` and 128 random bits."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text)[:40].strip("-") or "job"
    return f"{slug}-{secrets.token_hex(16)}"
