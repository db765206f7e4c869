"""What happens to a request between the door and the result?

A job is `queued -> running -> succeeded | failed | cancelled` and nothing else. Everything that happens to it is one
entry of one append-only event list, which polling, Server-Sent Events and tests all read; what is too big for an
event (pictures, latents) is a named file beside it. The queue is first in, first out and bounded, so a flood is
refused at the door instead of filling the memory, and finished jobs are forgotten oldest first. `JobQueue.run_next`
does one job in the caller's thread: the background worker is a loop around it, and a test needs neither a thread nor
a sleep.

It does not know what a job computes: it is given a `run(job)` function, which reports through `Job.progress`,
`Job.emit` and `Job.keep`, looks at `Job.cancel_requested` at every step, and may raise `JobCancelled` or a `JobError`
that explains itself. It knows nothing of HTTP, and nothing survives the process.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
import unicodedata
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
TRANSITIONS: dict[State, frozenset[State]] = {
    "queued": frozenset(("running", "cancelled")),
    "running": frozenset(("succeeded", "failed", "cancelled")),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
MEBIBYTE = 2**20

log = logging.getLogger(__name__)


class JobError(Exception):
    """A failure that says what went wrong (`message`), in one word for programs (`code`), and what to do (`hint`)."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint

    def to_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


class JobCancelled(Exception):
    """Raised by the work itself when it sees that it was asked to stop."""


class QueueFull(Exception):
    """The queue holds as many waiting jobs as it may; `retry_after_s` estimates when one place will be free."""

    def __init__(self, max_waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{max_waiting} jobs are waiting already, which is the most this server keeps")
        self.retry_after_s = retry_after_s


class QueueClosed(Exception):
    """The server is stopping and takes no more work."""


class UnknownJob(LookupError):
    """No job has ever had this id."""


class DeletedJob(LookupError):
    """A job had this id, but it was deleted to make room."""


def make_id(text: str) -> str:
    """An id that a person recognises and nobody can guess: a slug of `text` and 128 random bits."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text)[:40].strip("-") or "job"
    return f"{slug}-{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `id` counts from 1 within its job; `data` holds only what JSON can."""

    id: int
    kind: str
    at: float
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """All of a job at one moment, so that a reader never sees the step of one update with the picture of the next."""

    id: str
    state: State
    parameters: Mapping[str, Any]
    warnings: tuple[str, ...]
    created_at: float
    started_at: float | None
    finished_at: float | None
    done: int
    total: int
    error: Mapping[str, str] | None
    queue_position: int | None
    cancel_requested: bool
    events: tuple[Event, ...]
    files: Mapping[str, bytes]

    @property
    def finished(self) -> bool:
        return not TRANSITIONS[self.state]


@dataclass
class Job:
    """One piece of work. Clients are told its `parameters`; its `payload` is for the work alone."""

    id: str
    parameters: Mapping[str, Any]
    payload: Any
    warnings: tuple[str, ...]
    created_at: float
    changed: threading.Condition
    clock: Callable[[], float]
    transient_budget: int
    state: State = "queued"
    started_at: float | None = None
    finished_at: float | None = None
    done: int = 0
    total: int = 0
    error: JobError | None = None
    queue_position: int | None = None
    cancel_requested: bool = False
    events: list[Event] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    transient: deque[str] = field(default_factory=deque)

    @property
    def finished(self) -> bool:
        return not TRANSITIONS[self.state]

    def emit(self, kind: str, data: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> Event:
        """Append one event; its `files` appear at the same moment as the event that speaks of them.

        Raises RuntimeError on a finished job: its history is closed.
        """
        with self.changed:
            if self.finished:
                raise RuntimeError(f"job {self.id} is {self.state}; nothing can happen to it any more")
            return self._append(kind, data, files)

    def keep(self, name: str, content: bytes) -> None:
        """Keep a file that may be dropped, oldest first, when such files exceed `transient_budget` bytes."""
        with self.changed:
            self.files[name] = content
            self.transient.append(name)
            while sum(len(self.files[kept]) for kept in self.transient) > self.transient_budget:
                del self.files[self.transient.popleft()]

    def progress(self, done: int, total: int) -> None:
        """Say that `done` of `total` steps are behind us."""
        with self.changed:
            self.done, self.total = done, total
            self.emit("progress", {"t": done, "total_t": total})

    def snapshot(self) -> Snapshot:
        with self.changed:
            return Snapshot(
                id=self.id, state=self.state, parameters=self.parameters, warnings=self.warnings,
                created_at=self.created_at, started_at=self.started_at, finished_at=self.finished_at,
                done=self.done, total=self.total, error=self.error.to_dict() if self.error else None,
                queue_position=self.queue_position, cancel_requested=self.cancel_requested,
                events=tuple(self.events), files=dict(self.files),
            )

    def events_after(self, last: int) -> list[Event]:
        """The events whose id is above `last`."""
        with self.changed:
            return self.events[max(last, 0) :]

    def _append(self, kind: str, data: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> Event:
        self.files.update(files or {})
        event = Event(len(self.events) + 1, kind, self.clock(), dict(data))
        self.events.append(event)
        self.changed.notify_all()
        return event

    def _move(self, state: State, error: JobError | None = None) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"job {self.id} cannot go from {self.state} to {state}")
        self.state, self.error, self.queue_position = state, error, None
        if state == "running":
            self.started_at = self.clock()
        finished = not TRANSITIONS[state]
        if finished:
            self.finished_at = self.clock()
        data: dict[str, Any] = {"status": state, "error": error.to_dict() if error else None}
        self._append("status", data)
        if finished:
            self._append("done", {**data, "t": self.done, "total_t": self.total})


class JobQueue:
    """A bounded first-in-first-out queue, the jobs that left it, and the one thread that works on it.

    `keep_finished` and `keep_bytes` bound what finished jobs may occupy; `max_waiting` bounds the queue itself.
    """

    MAX_REMEMBERED_IDS = 100_000  # deleted ids that are still answered with "deleted" instead of "never existed"

    def __init__(
        self,
        run: Callable[[Job], None],
        *,
        max_waiting: int = 32,
        keep_finished: int = 100,
        keep_bytes: int = 256 * MEBIBYTE,
        transient_budget: int = 8 * MEBIBYTE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._run = run
        self._max_waiting, self._keep_finished, self._keep_bytes = max_waiting, keep_finished, keep_bytes
        self._transient_budget, self._clock = transient_budget, clock
        self._changed = threading.Condition(threading.RLock())
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._finished: OrderedDict[str, int] = OrderedDict()  # id -> bytes held, oldest first
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self._last_duration_s = 10.0
        self._closed = False
        self._thread: threading.Thread | None = None

    # ---- the client's side

    def submit(
        self, name: str, parameters: Mapping[str, Any], payload: Any = None, *, warnings: tuple[str, ...] = ()
    ) -> Job:
        """Put a new job at the end of the queue. `name` only makes the id readable.

        Raises QueueFull when `max_waiting` jobs wait already, QueueClosed after `close`.
        """
        with self._changed:
            if self._closed:
                raise QueueClosed("the queue is closed: the server is stopping")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(self._max_waiting, max(1, round(self._last_duration_s)))
            job = Job(
                make_id(name), dict(parameters), payload, warnings, self._clock(), self._changed, self._clock,
                self._transient_budget,
            )
            self._jobs[job.id] = job
            self._waiting.append(job)
            job.queue_position = len(self._waiting)
            job._append("status", {"status": "queued", "queue_position": job.queue_position, "error": None})
            return job

    def get(self, job_id: str) -> Job:
        """The job with this id. Raises UnknownJob or DeletedJob."""
        with self._changed:
            if job_id in self._jobs:
                return self._jobs[job_id]
            if job_id in self._deleted:
                raise DeletedJob(job_id)
            raise UnknownJob(job_id)

    def cancel(self, job_id: str) -> Job:
        """Ask one job to stop: at once when it waits, at its next step when it runs. Finished jobs stay as they are."""
        with self._changed:
            job = self.get(job_id)
            if job.state == "queued":
                self._waiting.remove(job)
                job.cancel_requested = True
                job._move("cancelled", JobError("cancelled", "The job was cancelled before it started."))
                self._retire(job)
                self._renumber()
            elif job.state == "running":
                job.cancel_requested = True
            return job

    def wait_events(self, job: Job, last: int, timeout_s: float) -> list[Event]:
        """The events after id `last`, waiting up to `timeout_s` for the first one; empty on time-out or `close`."""
        with self._changed:
            self._changed.wait_for(lambda: len(job.events) > last or self._closed, timeout_s)
            return job.events_after(last)

    def counts(self) -> dict[str, int]:
        """How many jobs wait, run and are finished but still kept."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": int(self._running is not None),
                    "finished": len(self._finished)}

    @property
    def closed(self) -> bool:
        return self._closed

    # ---- the worker's side

    def run_next(self, timeout_s: float = 0.0) -> Job | None:
        """Do the oldest waiting job, here and now; wait up to `timeout_s` for one. Returns it finished, or None."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed, timeout_s) or not self._waiting:
                return None
            job = self._running = self._waiting.popleft()
            job._move("running")
            self._renumber()
        state: State = "succeeded"
        error: JobError | None = None
        try:
            self._run(job)
        except JobCancelled:
            state, error = "cancelled", JobError("cancelled", "The job was cancelled while it ran.")
        except JobError as raised:
            state, error = "failed", raised
        except Exception as raised:  # whatever it was, this job failed and says why; the next one gets its turn
            log.exception("job %s failed", job.id)
            message = f"{type(raised).__name__}: {raised}"[:300]
            state, error = "failed", JobError("internal", message, "This is a fault of the server: see its log.")
        except BaseException:  # Ctrl-C, exit: leave no job that says "running" for ever
            self._finish(job, "failed", JobError("interrupted", "The server was stopped while the job ran."))
            raise
        self._finish(job, state, error)
        return job

    def start(self, setup: Callable[[], bool]) -> None:
        """Work in one background thread: `setup()` first (False ends it), then job after job until `close`."""
        if self._thread is not None:
            raise RuntimeError("the worker was started already")

        def loop() -> None:
            if setup():
                while not self._closed:
                    self.run_next(timeout_s=60.0)

        self._thread = threading.Thread(target=loop, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept nothing more, cancel what waits, ask what runs to stop, and wake every reader. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for job in self._waiting:
                job.cancel_requested = True
                job._move("cancelled", JobError("server_stopped", "The server stopped.", "Send the request again."))
                self._retire(job)
            self._waiting.clear()
            if self._running is not None:
                self._running.cancel_requested = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait for the background thread to end; True when it has."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _finish(self, job: Job, state: State, error: JobError | None) -> None:
        with self._changed:
            if job.cancel_requested and state == "succeeded":  # an accepted cancel is kept, even at the last step
                state, error = "cancelled", JobError("cancelled", "The job was cancelled while it ran.")
            job._move(state, error)
            self._running = None
            if job.started_at is not None and job.finished_at is not None:
                self._last_duration_s = job.finished_at - job.started_at
            self._retire(job)

    def _retire(self, job: Job) -> None:
        """Count a finished job's memory, and forget the oldest finished ones above the caps (never this one)."""
        job.payload = None
        self._finished[job.id] = sum(map(len, job.files.values()))
        while len(self._finished) > 1 and (
            len(self._finished) > self._keep_finished or sum(self._finished.values()) > self._keep_bytes
        ):
            oldest, _ = self._finished.popitem(last=False)
            del self._jobs[oldest]
            self._deleted[oldest] = None
            if len(self._deleted) > self.MAX_REMEMBERED_IDS:
                self._deleted.popitem(last=False)

    def _renumber(self) -> None:
        """Tell every waiting job whose place changed."""
        for position, job in enumerate(self._waiting, start=1):
            if job.queue_position != position:
                job.queue_position = position
                job._append("status", {"status": "queued", "queue_position": position, "error": None})
