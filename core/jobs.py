"""What happens to a request between the door and the result?

A job is `queued -> running -> succeeded | failed | cancelled` and nothing else; only a stop of the server puts a
running one back into the queue. The store has everything before anybody sees it (`core/ledger.py`), so `kill -9` takes
nothing back: the next `JobQueue` on the same store runs every unfinished job again. Finished jobs leave the memory and
are read back when asked for.

Waiting jobs take turns by client, first in first out within one, so that a client with fifty jobs does not starve the
next; the queue is bounded, so that a flood is refused at the door. Many jobs run at once: `JobQueue.run_next` is one
tick in the caller's thread, in which cancelled jobs leave, waiting ones join while there is room, and all advance by
one step. The background worker is a loop around it, and a test needs neither a thread nor a sleep.

Long because its two sides, the client's and the worker's, share one lock. It does not know what a job computes: a
`Batch` does. It knows nothing of HTTP, and nothing of SQL (`core/store.py`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import secrets
import threading
import time
import unicodedata
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

from core.clock import Ended, seconds
from core.ledger import TRANSITIONS, Job, JobError, Ledger, News, Snapshot, State, Summary, disk_refused, facts
from core.store import Change, Event, Record, Retention, Store, StoreError

__all__ = [
    "TRANSITIONS", "Batch", "DeletedJob", "Event", "IdempotencyConflict", "Job", "JobError",
    "JobQueue", "NotFinished", "PictureDeleted", "QueueClosed", "QueueFull", "Retention", "Snapshot", "State", "Store",
    "StoreError", "Summary", "UnknownJob", "UnknownPicture", "make_id",
]

MAX_CALLS = 16  # waiting functions; each holds one thread of the web server
REMEMBERED_TURNS = 4096  # clients whose last turn is remembered
PRUNE_EVERY_S = 60.0  # jobs also expire while nothing else happens
REST_AFTER_S = 1.0  # without work; before, whoever waited for the server to start may be about to ask
WAIT_AFTER_FAULT_S = 1.0
RESTORABLE_S = 3600.0  # after that the files of a deleted picture are removed
MAX_PICTURES = 64  # of one job, more than any may have
LAST_EVENTS = 16  # of a job, those of its results among them: they come last
DEFAULT_RETENTION = Retention()
T = TypeVar("T")

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As much is waiting as may; `retry_after_s` estimates when one place will be free."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueClosed(Exception):
    """The server is stopping and takes no more work."""


class IdempotencyConflict(Exception):
    """The client used this idempotency key before, for another request."""


class UnknownJob(LookupError):
    """No job has ever had this id."""


class DeletedJob(LookupError):
    """A job had this id, but it was deleted, by its client or to make room."""


class UnknownPicture(LookupError):
    """The job has no such picture (any more)."""


class PictureDeleted(LookupError):
    """The picture was deleted."""


class NotFinished(Exception):
    """It can be decided about pictures when the job is finished."""


class Batch(Protocol):
    """What computes: a set of jobs that advance together. Every method is called in the worker's thread.

    The batch looks at nothing but the jobs it was given, and tells what they achieve through their `progress`, `keep`
    and `emit`.
    """

    def has_room(self, job: Job) -> bool:
        """Whether this waiting job may join now. Asked only while others run: an empty batch takes any job."""

    def admit(self, job: Job) -> None:
        """Let the job join. Raises JobError to fail this job alone."""

    def drop(self, job: Job) -> None:
        """Let go of a job that was admitted and has not ended: it was cancelled, or the server stops. Never raises."""

    def step(self) -> Iterable[tuple[Job, JobError | None]]:
        """Advance every job by one step; yield those that ended here, each with None for success or its error.

        What a job that succeeded made was emitted before it is yielded; one that is yielded has left the batch. An
        exception fails every job that is still in the batch.
        """

    def rest(self) -> bool:
        """Nothing has been asked for a while: do a bit (under a second) of what later jobs profit from. False: nothing
        is left to do."""


class JobQueue:
    """The waiting jobs, the running ones, the finished ones in the store, and the one thread that works on them.

    `max_waiting` bounds the queue and `max_waiting_per_client` (half of it unless told) the part of one client; `keep`
    bounds what finished jobs occupy. `clock` gives the times that people see, `elapsed`, which never jumps, measures.
    Unfinished jobs of `store` are put back into the queue at once, beyond any bound. The store stays its maker's to
    close, after `close` and `join`. Any method may raise StoreError when the disk fails.
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
        self._max_waiting = max_waiting
        self._max_per_client = max_waiting_per_client or max(1, max_waiting // 2)
        self._ledger = Ledger(store, clock)
        self._changed = self._ledger.changed
        self._live: dict[str, Job] = {}  # waiting and running; the others are in the store alone
        self._waiting: Sequence[Job] = ()  # in the order of submission
        self._running: dict[str, Job] = {}
        self._turns: OrderedDict[str, int] = OrderedDict()  # client -> when it had its last turn
        self._turn = 0
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._last_duration_s = 10.0
        self._began: dict[str, float] = {}  # when the running ones did, by `elapsed`
        self._ended = Ended(elapsed)
        self._prune_at: float | None = None  # at once
        self._closed = False
        self._drain_until = 0.0
        self._thread: threading.Thread | None = None
        self._restore()

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
        for the same (unless given, the request must be equal; a request in which a seed was drawn never is).

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
            self._assert_room(client)
            job = Job(
                number=self._store.next_number(), id=make_id(name), client=client, name=name,
                parameters=dict(parameters), request=dict(request), warnings=tuple(warnings),
                created_at=self._clock(), ledger=self._ledger,
            )
            waiting = [*self._waiting, job]

            def save(changes: Sequence[Change]) -> None:
                self._store.add(job, job.request, changes, idempotency_key=idempotency_key, fingerprint=fingerprint)

            self._ledger.write(self._moved(waiting), save=save)
            self._waiting, self._live[job.id] = waiting, job
            return job

    def get(self, job_id: str) -> Job:
        """The job with this id. Raises UnknownJob or DeletedJob."""
        while True:
            with self._changed:
                if job_id in self._live:
                    return self._live[job_id]
            record = self._store.find(job_id)  # not under the lock: the engine need not wait for readers
            if record is None:
                raise DeletedJob(job_id) if self._store.was_deleted(job_id) else UnknownJob(job_id)
            job = None if record.finished_at is None else self._read_back(record)
            if job is not None:
                return job  # else it was submitted or deleted this very moment: look again

    def cancel(self, job_id: str) -> Job:
        """Ask one job to stop: at once when it waits, at its next step when it runs. Finished jobs stay as they are.

        Raises UnknownJob or DeletedJob. A restart does not forget what was asked.
        """
        with self._changed:
            job = self.get(job_id)
            if job.state == "queued":
                rest = [other for other in self._waiting if other is not job]
                ending = self._ending(job, JobError("cancelled", "The job was cancelled before it started."))
                self._ledger.write([ending, *self._moved(rest)], durable=True)
                self._waiting = rest
                del self._live[job.id]
            elif job.state == "running" and not job.cancel_requested:
                self._ledger.write([News(job, {"cancel_requested": True})], durable=True)
            return job

    def delete(self, job_id: str) -> None:
        """Cancel the job if need be and remove it for good; a running one disappears when its step ends.

        Raises UnknownJob, and DeletedJob once it is gone.
        """
        with self._changed:
            job = self.cancel(job_id)
            if not job.finished:
                self._ledger.write([News(job, {"delete_requested": True})], durable=True)
                return
        self._store.delete(job)
        with self._changed:
            self._live.pop(job.id, None)

    def delete_but_favourites(self, job_id: str) -> None:
        """Delete the pictures of a job that are no favourites, or all of it where none is. Raises: as `delete`."""
        job = self.get(job_id)
        kept = job.marks.favourites - job.marks.deleted
        if not kept:
            self.delete(job_id)
            return
        for index in self._pictures(job) - kept - job.marks.deleted:
            self._store.mark_deleted(job.number, index, self._clock())

    def mark_favourite(self, job_id: str, index: int, is_favourite: bool) -> None:
        """Make a picture a favourite or none; idempotent. Raises UnknownJob, DeletedJob, NotFinished, UnknownPicture,
        PictureDeleted."""
        job = self._with_picture(job_id, index)
        if index in job.marks.deleted:
            raise PictureDeleted(index)
        self._store.mark_favourite(job.number, index, is_favourite)

    def delete_picture(self, job_id: str, index: int) -> None:
        """Delete one picture, which can be restored for `RESTORABLE_S` seconds. Raises: as `mark_favourite`."""
        job = self._with_picture(job_id, index)
        if index in job.marks.deleted:
            raise PictureDeleted(index)
        self._store.mark_deleted(job.number, index, self._clock())

    def restore_picture(self, job_id: str, index: int) -> None:
        """Bring a deleted picture back; one that is there stays. Raises as `mark_favourite`; PictureDeleted when it is
        too late."""
        job = self._with_picture(job_id, index)
        self._store.mark_deleted(job.number, index, None)

    def _with_picture(self, job_id: str, index: int) -> Job:
        job = self.get(job_id)
        if not job.finished:
            raise NotFinished(job.state)
        if index not in self._pictures(job):
            raise PictureDeleted(index) if index in job.marks.deleted else UnknownPicture(index)
        return job

    def _pictures(self, job: Job) -> frozenset[int]:
        """The finished pictures whose files are there."""
        names = {f"{index}.png": index for index in range(MAX_PICTURES)}
        return frozenset(names[name] for name in job.file_names() if name in names)

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
        below = None if cursor is None else _from_cursor(cursor)
        states = (status,) if isinstance(status, str) else status
        records = self._store.page(limit + 1, below=below, states=states, text=query or "",
                                   favourites=favourites)
        marks = self._store.marks([record.number for record in records[:limit]])
        names = self._store.lasting_names([record.number for record in records[:limit]])
        finals = {
            number: tuple(self._store.last_data(number, "image", LAST_EVENTS)) if kept else ()
            for number, kept in names.items()
        }
        page = []
        with self._changed:
            for record in records[:limit]:
                now = self._live.get(record.id, record)  # the store does not follow every step
                position = now.queue_position if isinstance(now, Job) else None
                page.append(Summary(**facts(now), queue_position=position, files=names[record.number],
                                    finals=finals[record.number], marks=marks[record.number]))
        return page, _to_cursor(records[limit - 1].number) if len(records) > limit else None

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
            waiting, running = len(self._waiting), len(self._running)
        return {"waiting": waiting, "running": running, **ends, "finished": sum(ends.values())}

    def waiting_requests(self) -> Sequence[Mapping[str, Any]]:
        """What the waiting jobs were asked to do."""
        return [job.request for job in self._waiting]  # the list is replaced as a whole, never changed

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have `function` run in the worker's thread between two steps. Raises QueueFull, QueueClosed."""
        with self._changed:
            if self._closed or self._thread is not None and not self._thread.is_alive():
                raise QueueClosed("nobody works on the queue (any more)")
            if len(self._calls) >= MAX_CALLS:
                raise QueueFull(f"{MAX_CALLS} other requests are waiting for the model", 1)
            future: Future[T] = Future()
            self._calls.append((function, future))
            self._changed.notify_all()
            return future

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
            worked = self._answer_calls()
            if self._stopped():
                self._stop(batch)
                return worked
            worked |= self._drop_cancelled(batch)
            worked |= self._admit(batch)
            if self._running:
                worked = True
                self._step(batch)
                self._drop_cancelled(batch)
        except BaseException as raised:
            if not isinstance(raised, Exception):
                self._put_back(batch)
            raise
        self._prune_sometimes()
        return worked

    def start(self, setup: Callable[[], Batch | None]) -> None:
        """Work in one background thread: `setup()` first (None ends it), then tick after tick until `close`."""
        if self._thread is not None:
            raise RuntimeError("the worker was started already")

        def loop() -> None:
            batch, resting, told = None, True, ""
            try:
                batch = setup()
                while batch is not None and not self._stopped():
                    try:
                        if not self.run_next(batch, timeout_s=REST_AFTER_S if resting else PRUNE_EVERY_S):
                            resting = resting and batch.rest()
                        told = ""
                    except Exception as error:  # the disk is full, say: jobs wait until it is not
                        if not isinstance(error, StoreError):
                            log.exception("the worker goes on in %.1f s", WAIT_AFTER_FAULT_S)
                        elif str(error) != told:  # once, or the log would fill what is left of the disk
                            log.error("%s (the worker goes on as soon as it can)", error)
                        told = str(error)
                        with self._changed:
                            self._changed.wait_for(self._stopped, WAIT_AFTER_FAULT_S)
            finally:
                self._stop(batch)

        self._thread = threading.Thread(target=loop, name="engine", daemon=True)
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
        return bool(self._closed or self._calls or self._running or self._waiting)

    def _stopped(self) -> bool:
        return self._closed and (not self._running or time.monotonic() >= self._drain_until)

    def _answer_calls(self) -> bool:
        answered = False
        for _ in range(MAX_CALLS):  # those that come meanwhile wait for the next tick, or no step would be done
            with self._changed:
                if not self._calls:
                    break
                function, future = self._calls.popleft()
            answered = True
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as raised:
                    future.set_exception(raised)
                    if not isinstance(raised, Exception):
                        raise
        return answered

    def _drop_cancelled(self, batch: Batch) -> bool:
        cancelled = [job for job in self._running.values() if job.cancel_requested]
        for job in cancelled:
            batch.drop(job)
            self._end(job, None)
        return bool(cancelled)

    def _admit(self, batch: Batch) -> bool:
        """Let waiting jobs in, in their order: one that must wait for room is not overtaken by a smaller one."""
        admitted = False
        while True:
            with self._changed:
                order = () if self._closed else self._order(self._waiting)
                if not order or self._running and not batch.has_room(order[0]):
                    break
                job = order[0]
                columns = {"state": "running", "started_at": self._clock()}
                status = ("status", {"status": "running", "error": None})
                self._ledger.write([News(job, columns, {"queue_position": None}, [status])])
                self._waiting = [other for other in self._waiting if other is not job]
                self._running[job.id], self._began[job.id] = job, self._elapsed()
                self._take_turn(job.client)
                admitted = True
            try:
                batch.admit(job)
            except Exception as raised:
                self._end(job, _as_error(raised, f"job {job.id} could not start"))
        if admitted:
            with self._changed:
                self._ledger.write(self._moved(self._waiting))
        return admitted

    def _step(self, batch: Batch) -> None:
        try:
            for job, error in batch.step():
                self._end(job, error)
        except Exception as raised:  # whatever it was, these jobs failed and say why; the next ones get their turn
            error = _as_error(raised, "a step failed")
            for job in tuple(self._running.values()):
                batch.drop(job)
                self._end(job, error)

    def _end(self, job: Job, error: JobError | None) -> None:
        """Finish a job that is no longer in the batch; an accepted cancel is kept, even at the last step."""
        if job.cancel_requested:
            error = JobError("cancelled", "The job was cancelled while it ran.")
        with self._changed:
            try:
                if job.delete_requested:  # gone from the store; those who hold the job still see its end
                    self._ledger.write([self._ending(job, error)], save=lambda _: self._store.delete(job))
                else:
                    self._ledger.write([self._ending(job, error)], durable=True)
                del self._live[job.id]
            except StoreError as refused:  # stays in the memory: in the store it is unfinished and will run again
                log.error("job %s ended, which cannot be written down: %s", job.id, refused)
                lost = disk_refused(refused)
                self._ledger.show([self._ending(job, error or lost)])
            del self._running[job.id]
            self._last_duration_s = self._elapsed() - self._began.pop(job.id)
            self._ended.add(job.number)
        self._prune_at = None

    def _ending(self, job: Job, error: JobError | None) -> News:
        state: State = "succeeded" if error is None else "cancelled" if error.code == "cancelled" else "failed"
        told = None if error is None else error.to_dict()
        status = {"status": state, "error": told}
        done = {**status, "t": job.done, "total_t": job.total}
        columns = {"state": state, "finished_at": self._clock(), "error": told, "done": job.done, "total": job.total}
        if state == "cancelled":
            columns["cancel_requested"] = True
        return News(job, columns, {"queue_position": None}, [("status", status), ("done", done)])

    def _put_back(self, batch: Batch | None) -> None:
        """What runs waits again, from its beginning; what its client gave up is over."""
        if batch is not None and self._running:
            self._drop_cancelled(batch)
            for job in self._running.values():
                batch.drop(job)
            with self._changed:
                try:
                    self._queue_again(tuple(self._running.values()))
                except StoreError as refused:
                    log.error("running jobs cannot be put back (the next start will do it): %s", refused)
                self._running.clear()
                self._began.clear()

    def _stop(self, batch: Batch | None) -> None:
        self._put_back(batch)
        with self._changed:
            calls, self._calls = self._calls, deque()
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(QueueClosed("the server stopped"))

    def _prune_sometimes(self) -> None:
        if self._prune_at is None or self._elapsed() >= self._prune_at:
            self._prune_at = self._elapsed() + PRUNE_EVERY_S
            self._store.purge(self._clock() - RESTORABLE_S)
            young = self._ended.within(self._keep.max_age_s)
            self._store.prune(self._keep, self._clock(), order=self._ended.order, young=young)

    # ---- order

    def _order(self, waiting: Sequence[Job]) -> Sequence[Job]:
        """Who comes when: one job of each client in turn, beginning with the client whose last turn is longest ago."""
        queues: dict[str, deque[Job]] = {}
        for job in waiting:
            queues.setdefault(job.client, deque()).append(job)
        turns = sorted(queues.values(), key=lambda queue: (self._turns.get(queue[0].client, 0), queue[0].number))
        return [job for turn in zip_longest(*turns) for job in turn if job is not None]

    def _take_turn(self, client: str) -> None:
        self._turn += 1
        self._turns[client] = self._turn
        self._turns.move_to_end(client)
        if len(self._turns) > REMEMBERED_TURNS:
            self._turns.popitem(last=False)

    def _moved(self, waiting: Sequence[Job]) -> Sequence[News]:
        """What to tell every waiting job whose place is another now."""
        order = enumerate(self._order(waiting), start=1)
        return [_placed(job, position) for position, job in order if job.queue_position != position]

    def _assert_room(self, client: str) -> None:
        retry_after_s = max(1, round(self._last_duration_s / max(1, len(self._running))))
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} jobs are waiting already, which is the most there may", retry_after_s)
        if sum(job.client == client for job in self._waiting) >= self._max_per_client:
            message = f"{self._max_per_client} jobs of yours are waiting already, which is the most one client may have"
            raise QueueFull(message, retry_after_s)

    # ---- from one process to the next

    def _restore(self) -> None:
        again = []
        for record in self._store.unfinished():
            job = self._read_back(record)
            assert job is not None, "nobody else uses the store yet"
            if job.delete_requested:
                self._store.delete(job)
            elif job.cancel_requested:
                error = JobError("cancelled", "The job was cancelled while it ran.")
                self._ledger.write([self._ending(job, error)], durable=True)
            else:
                again.append(job)
                self._live[job.id] = job
        if again:
            self._queue_again(again)
        self._prune_sometimes()

    def _queue_again(self, jobs: Sequence[Job]) -> None:
        """Put jobs back in their old places, without the previews of what will be done again."""
        waiting = sorted((*self._waiting, *jobs), key=lambda job: job.number)
        news = []
        for position, job in enumerate(self._order(waiting), start=1):
            if job in jobs:
                status = {"status": "queued", "queue_position": position, "error": None, "restarted": True}
                columns = {"state": "queued", "started_at": None}
                shown = {"done": 0, "total": 0, "queue_position": position}
                previews = [file.name for file in job.stored.values() if file.moment is not None]
                news.append(News(job, columns, shown, [("status", status)], dropped=previews))
            elif job.queue_position != position:
                news.append(_placed(job, position))
        self._ledger.write(news, durable=True)
        self._waiting = waiting
        for item in news:
            self._store.remove_files(item.job.id, item.dropped)

    def _read_back(self, record: Record) -> Job | None:
        """The job as it was; None when it has been deleted."""
        events, files = self._store.events(record.number), self._store.files(record.number)
        request = self._store.request(record.number)
        if request is None:  # read last: what a deleted job had may be half gone
            return None
        return Job(**facts(record), request=request, ledger=self._ledger, events=events,
                   stored={file.name: file for file in files}, marks=self._store.marks([record.number])[record.number])


def make_id(text: str) -> str:
    """An id that a person recognises and nobody can guess: a slug of `text` and 128 random bits."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text)[:40].strip("-") or "job"
    return f"{slug}-{secrets.token_hex(16)}"


def _placed(job: Job, position: int) -> News:
    status = {"status": "queued", "queue_position": position, "error": None}
    return News(job, shown={"queue_position": position}, events=[("status", status)])


def _as_error(raised: Exception, what: str) -> JobError:
    """The error that a client is told; what was not foreseen is written to the log in full."""
    if isinstance(raised, JobError):
        return raised
    log.error("%s", what, exc_info=raised)
    message = f"{type(raised).__name__}: {raised}"[:300]
    return JobError("internal", message, "This is a fault of the server: see its log.")


def _to_cursor(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes(9, "big")).decode()


def _from_cursor(cursor: str) -> int:
    known = re.fullmatch(r"[A-Za-z0-9_-]{12}", cursor)
    number = int.from_bytes(base64.urlsafe_b64decode(cursor), "big") if known else 2**63
    if number >= 2**63:  # more than the store can count
        raise ValueError("the cursor must be one that the page before gave")
    return number
