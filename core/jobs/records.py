"""What is written down about a job?

The facts of a job (`Record`), what happened to it (`Event`), its files, what people decided about its images (`Marks`),
and a `Change` of all that, which is committed as a whole. Only types: the SQL is in `core/jobs/store.py`, and what a
state or an event means is said in `core/jobs/job.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One thing that happened. `id` rises from 1 within its job; `data` holds only what JSON can."""

    id: int
    kind: str
    at: float
    data: Mapping[str, Any]


@dataclass(frozen=True)
class StoredFile:
    """A file of a job. A lasting one has no `moment`; others may be dropped, and `moment` is the step they show."""

    name: str
    size: int
    moment: int | None = None


class Marks(NamedTuple):
    """Which images of a job, by index, are favourites and which are deleted."""

    favourites: frozenset[int] = frozenset()
    deleted: frozenset[int] = frozenset()


@dataclass(kw_only=True, eq=False)
class Record:
    """What a store knows of a job beside its request, its events and its files. Times are seconds since 1970."""

    number: int
    id: str
    client: str
    name: str
    parameters: Mapping[str, Any]
    warnings: tuple[str, ...]
    created_at: float
    state: str = "queued"
    started_at: float | None = None
    finished_at: float | None = None
    done: int = 0
    total: int = 0
    error: Mapping[str, str] | None = None
    cancel_requested: bool = False
    delete_requested: bool = False


@dataclass(frozen=True)
class Change:
    """What is to be written about job `number` in one go: columns of `Record`, new events, new and dropped files."""

    number: int
    columns: Mapping[str, Any]
    events: Sequence[Event] = ()
    files: Sequence[StoredFile] = ()
    dropped: Sequence[str] = ()


def digits_of(job_id: str) -> str:
    """The random part of an id, which names its folder and is all that is remembered of a removed job."""
    return job_id[-32:]
