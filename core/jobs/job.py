"""What is a job, and how does anything become known about it?

A job is a record of facts, one append-only list of events, and named files for what is too big for an event (images,
latents). Polling, Server-Sent Events and tests all read these. Whatever happens is committed to the store first and
shown second, under the one lock that all jobs share; so a reader sees nothing that a crash could take back, and never
the half of an update. Files are written before that, outside the lock.

It knows neither the queue and its order (`core/jobs/queue.py`) nor SQL (`core/jobs/store.py`).
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, Literal

from core.disk import FULL, PERMISSION, READ_ONLY, UNREACHABLE
from core.engine import JobError
from core.jobs.records import Change, Event, Marks, Record, StoredFile
from core.jobs.storage_errors import StoreError
from core.jobs.store import Store

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
TRANSITIONS: dict[str, frozenset[str]] = {
    "queued": frozenset(("running", "cancelled")),
    "running": frozenset(("succeeded", "failed", "cancelled", "queued")),  # queued again when the server stops
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
HINTS = {  # what helps against a disk that refuses, by its cause
    FULL: "Free some space on the server's disk.",
    READ_ONLY: "Make the server's disk writable again, then send the request again.",
    PERMISSION: "Give the server its data folder back, then send the request again.",
    UNREACHABLE: "Connect the server's disk again, then send the request again.",
}
log = logging.getLogger(__name__)
PREVIEW_BUDGET = 8 * 2**20  # bytes of files that may be dropped, a job


@dataclass(kw_only=True, eq=False)
class Summary(Record):
    """A job as a list shows it. `files` names its lasting files; `finals` is what the events of the last ones say;
    `marks` is what was decided about its images."""

    queue_position: int | None = None
    files: tuple[str, ...] = ()
    finals: tuple[Mapping[str, Any], ...] = ()
    marks: Marks = Marks()

    @property
    def finished(self) -> bool:
        return not TRANSITIONS[self.state]


@dataclass(kw_only=True, eq=False)
class Snapshot(Summary):
    """All of a job at one moment, so that a reader never sees the step of one update with the state of the next."""

    events: tuple[Event, ...] = ()

    @property
    def events_of_this_run(self) -> tuple[Event, ...]:
        """The events since the server last started, but those of deleted images: earlier ones tell of work that was
        lost and is done again."""
        starts = [i for i, event in enumerate(self.events) if event.data.get("restarted")]
        events = self.events[starts[-1] :] if starts else self.events
        if not self.marks.deleted:
            return events
        return tuple(event for event in events if event.data.get("index") not in self.marks.deleted)


@dataclass(kw_only=True, eq=False)
class Job(Record):
    """One piece of work. Clients are told its `parameters`; its `request` is all that is needed to do it (again)."""

    request: Mapping[str, Any]
    event_log: EventLog = field(repr=False)
    queue_position: int | None = None
    events: list[Event] = field(default_factory=list, repr=False)
    stored: dict[str, StoredFile] = field(default_factory=dict, repr=False)  # by name
    marks: Marks = Marks()  # of a finished job, when it was read

    @property
    def finished(self) -> bool:
        return not TRANSITIONS[self.state]

    def emit(self, kind: str, data: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
        """Append one event. Its `files` last as long as the job, and are on the disk before the event can be seen.

        Raises RuntimeError on a finished job, whose history is closed; JobError when the disk refuses.
        """
        self._assert_open()
        with _disk_troubles():
            if files:
                self.event_log.store.write_files(self.id, files, durable=True)
            lasting = [StoredFile(name, len(content)) for name, content in (files or {}).items()]
            self.event_log.write([JobUpdate(self, events=[(kind, data)], files=lasting)])

    def keep(self, files: Mapping[str, bytes], events: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> None:
        """Keep files that may be dropped, such as the previews of one step, and append events that tell of them.

        Above `PREVIEW_BUDGET` bytes some are dropped, so that those which remain are spread over the whole job, with
        its first and its newest step among them. Raises: as `emit`.
        """
        self._assert_open()
        with _disk_troubles():
            self.event_log.store.write_files(self.id, files, durable=False)
            made = [StoredFile(name, len(content), self.done) for name, content in files.items()]
            others = [other for other in self.stored.values() if other.name not in files]
            dropped = superfluous([*others, *made], PREVIEW_BUDGET)
            # one commit for all of it
            self.event_log.write([JobUpdate(self, events=events, files=made, dropped=dropped)])
            self.event_log.store.remove_files(self.id, dropped)

    def progress(self, done: int, total: int) -> None:
        """Say that `done` of `total` steps are behind us. Raises: as `emit`."""
        self._assert_open()
        with _disk_troubles():
            shown = {"done": done, "total": total}
            self.event_log.write([JobUpdate(self, shown=shown, events=[("progress", {"t": done, "total_t": total})])])

    def snapshot(self) -> Snapshot:
        """Everything about the job but the contents of its files."""
        with self.event_log.changed:
            lasting = tuple(file.name for file in self.stored.values() if file.moment is None)
            return Snapshot(**facts(self), queue_position=self.queue_position, files=lasting, events=tuple(self.events),
                            marks=self.marks)

    def events_after(self, last: int) -> Sequence[Event]:
        """The events whose id is above `last`."""
        with self.event_log.changed:
            return self.events[bisect_right(self.events, last, key=lambda event: event.id) :]

    def file_names(self) -> tuple[str, ...]:
        """The names of all files there are now."""
        with self.event_log.changed:
            return tuple(self.stored)

    def file(self, name: str) -> bytes | None:
        """The content of a file, read from the disk; None when there is none of this name, or it was dropped."""
        with self.event_log.changed:
            known = name in self.stored
        return self.event_log.store.read_file(self.id, name) if known else None

    def _assert_open(self) -> None:
        if self.finished:
            raise RuntimeError(f"job {self.id} is {self.state}; nothing can happen to it any more")


@dataclass
class JobUpdate:
    """A change of one job: `columns` are stored and shown, `shown` lives in the memory alone."""

    job: Job
    columns: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)
    events: Sequence[tuple[str, Mapping[str, Any]]] = ()
    files: Sequence[StoredFile] = ()
    dropped: Sequence[str] = ()


class EventLog:
    """The event log of all jobs: everything is committed first and shown second, under one lock."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self.store, self.clock = store, clock
        self.changed = threading.Condition(threading.RLock())

    def write(
        self,
        updates: Sequence[JobUpdate],
        *,
        durable: bool = False,
        save: Callable[[Sequence[Change]], None] | None = None,
    ) -> None:
        """Commit all of it, then show it. When the store refuses (StoreError), nothing has changed."""
        with self.changed:
            changes = [self._change(item) for item in updates]
            if save is not None:
                save(changes)
            else:
                self.store.save(changes, durable=durable)
            self._show(updates, changes)

    def show(self, updates: Sequence[JobUpdate]) -> None:
        """Show what could not be committed."""
        with self.changed:
            self._show(updates, [self._change(item) for item in updates])

    def _change(self, updates: JobUpdate) -> Change:
        job, state = updates.job, updates.columns.get("state", updates.job.state)
        if job.finished:
            raise RuntimeError(f"job {job.id} is {job.state}; nothing can happen to it any more")
        if state != job.state and state not in TRANSITIONS[job.state]:
            raise RuntimeError(f"job {job.id} cannot go from {job.state} to {state}")
        first, now = (job.events[-1].id if job.events else 0) + 1, self.clock()
        events = [Event(i, kind, now, dict(data)) for i, (kind, data) in enumerate(updates.events, first)]
        return Change(job.number, updates.columns, events, updates.files, updates.dropped)

    def _show(self, updates: Sequence[JobUpdate], changes: Sequence[Change]) -> None:
        for item, change in zip(updates, changes, strict=True):
            job = item.job
            for name, value in chain(item.columns.items(), item.shown.items()):
                setattr(job, name, value)
            for name in item.dropped:
                job.stored.pop(name, None)
            job.stored.update((file.name, file) for file in item.files)
            job.events.extend(change.events)
        self.changed.notify_all()


def facts(record: Record) -> dict[str, Any]:
    """The fields of `record` by name, whatever else it has become."""
    return {one.name: getattr(record, one.name) for one in fields(Record)}


def superfluous(files: Iterable[StoredFile], budget: int) -> list[str]:
    """Which droppable files to drop so that the rest fits into `budget` bytes, spread evenly over the moments.

    Whole moments go, each time the one whose neighbours are closest together; the first and the newest stay. When two
    are left and too large, the older goes, and then the older files of the newest; the newest file always stays.
    """
    moments: dict[int, list[StoredFile]] = {}
    size = 0
    for file in files:
        if file.moment is not None:
            moments.setdefault(file.moment, []).append(file)
            size += file.size
    times, dropped = sorted(moments), []
    while size > budget and len(times) > 1:
        middle = range(1, len(times) - 1)
        group = moments[times.pop(min(middle, key=lambda i: times[i + 1] - times[i - 1], default=0))]
        dropped += group
        size -= sum(file.size for file in group)
    for file in moments[times[0]][:-1] if len(times) == 1 else ():
        if size > budget:
            dropped.append(file)
            size -= file.size
    return [file.name for file in dropped]


@contextmanager
def _disk_troubles() -> Iterator[None]:
    """What the store refuses fails the job that asked, and no other."""
    try:
        yield
    except StoreError as error:
        raise disk_refused(error) from error


def disk_refused(error: StoreError) -> JobError:
    """What a client is told of a job that the disk ended."""
    return JobError("storage", str(error), HINTS.get(error.cause, HINTS[FULL]))


def explained(raised: Exception, what: str, job: Job | None = None) -> JobError:
    """The error that a client is told; one that does not explain itself is written to the log in full, after `what`."""
    if not isinstance(raised, JobError):
        log.error("%s", what, exc_info=raised, extra={} if job is None else {"job_id": job.id})
    return JobError.of(raised)
