"""Where do jobs live when the process does not?

In one folder. `jobs.sqlite3` holds every job, its events and the list of its files (`core/jobs/database.py`);
`jobs/<32 hex digits>/` holds the files themselves (`core/jobs/job_files.py`). The database is the truth: a file counts
from the moment a committed row names it, and whatever no row names is swept at the next start.

What holds after `kill -9` at any moment: everything that was committed, which is everything that anybody has seen.
What holds after a power cut too: everything saved as `durable` (accepted jobs, clients' decisions, ends) with the files
written as `durable`; the last few progress events may be missing.

What holds on a full disk: jobs can be removed and cancelled and their ends are written down, because `reserve` gives
its room back for that. Nothing is ordered by the clock, which may jump: the number of a job is its place.

This file does not know what a state or an event means, when a job may be removed, or who waits for what: that is
`core/jobs/queue.py`.
"""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from core.disk import FULL, Reserve
from core.jobs.database import Database
from core.jobs.job_files import FILES, JobFiles
from core.jobs.records import Change, Event, Marks, Record, StoredFile, digits_of
from core.jobs.retention import Finished, Retention, jobs_to_remove
from core.jobs.storage_errors import StoreError, unusable

RESERVE = "reserve"
NO_FAVOURITE = "number NOT IN (SELECT job FROM marks WHERE favourite IS NOT NULL AND deleted_at IS NULL)"
MAY_GO = f"finished_at IS NOT NULL AND {NO_FAVOURITE}"
PICTURE_NAME = re.compile(r"\d+\.png")  # of a finished one
EVENTS_AT_ONCE = 500  # so that a reader of a long history lets the engine's commits through in between
COLUMNS = tuple(field.name for field in fields(Record))
# A number that was searched for is a seed too: image i of a job was drawn from `seed` + i.
SEED_AMONG = """? - json_extract(parameters, '$.seed') BETWEEN 0
    AND coalesce(json_extract(parameters, '$.candidates'), json_extract(parameters, '$.n_images'), 1) - 1"""
AS_JSON = frozenset(("parameters", "warnings", "error"))
T = TypeVar("T")


class Store:
    """Jobs, events and files in `folder`, which is made when it is missing. Every method may be called by any thread.

    `revision` is another number whenever a finished job has changed or gone: what was made from one stays true as long
    as it is the same.

    Raises: StoreError from every method that touches the disk.
    """

    MAX_REMEMBERED_IDS = 100_000  # removed ids that are still told from ids that never were

    def __init__(self, folder: Path, *, patience_s: float = 1.0) -> None:
        """Open or make the store, waiting up to `patience_s` for another process to let go of it."""
        self.folder, self._files = folder, JobFiles(folder)
        self._revisions = itertools.count(1)
        self.revision = 0
        try:
            (folder / FILES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(folder, error) from error
        self._database = Database(folder, patience_s=patience_s)
        self._read = self._database.read
        try:
            if not self._database.is_new:  # beside a new database, whatever is there is not ours to remove
                self._sweep()
            self._reserve = Reserve(folder / RESERVE)
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Let go of the folder. Anything asked afterwards raises StoreError. Idempotent."""
        self._database.close()

    # ---- writing

    def _changed(self) -> None:
        """A finished job is another one than before, or gone. Comes after the commit: who has read `revision` before it
        may have read the job as it was."""
        self.revision = next(self._revisions)

    def next_number(self) -> int:
        """A number for a new job, above all before it."""
        return self._database.next_number()

    def add(
        self,
        record: Record,
        request: Mapping[str, Any],
        changes: Iterable[Change],
        *,
        idempotency_key: str | None = None,
        fingerprint: str = "",
    ) -> None:
        """Write a new job and what comes with it, durably."""
        row = {name: _to_column(name, getattr(record, name)) for name in COLUMNS}
        row |= {"folded": _text(record.name.casefold()), "request": _json(request)}
        row |= {"idempotency_key": idempotency_key and _text(idempotency_key), "fingerprint": fingerprint}
        with self._database.transaction(durable=True) as db:
            db.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))
            for change in changes:
                _write(db, change)

    def save(self, changes: Iterable[Change], *, durable: bool = False) -> None:
        """Write all of `changes` or nothing. What is durable, such as a client's decision, may use up the reserve."""
        changes = list(changes)

        def write(db: sqlite3.Connection) -> None:
            for change in changes:
                _write(db, change)

        self._commit(write, durable=durable, reserved=durable)

    def delete(self, record: Record) -> None:
        """Remove a job for good, durably; its id is remembered."""
        def forget(db: sqlite3.Connection) -> None:
            self._forget(db, [(record.number, record.id)])

        try:
            self._commit(forget, durable=True, reserved=True)
        except StoreError as error:
            if error.cause != FULL:
                raise
            self._files.remove_all(record.id)  # no reserve is left: the files, which are what takes the room, go first
            self._commit(forget, durable=True)
        self._changed()
        self._files.remove_all(record.id)
        self._reserve.refill()

    def prune(
        self, keep: Retention, now: float, *, order: Sequence[int] = (), young: Collection[int] = ()
    ) -> list[str]:
        """Remove the finished jobs that `jobs_to_remove` names, which says what is what; returns their ids."""

        def remove(db: sqlite3.Connection) -> list[Finished]:
            count, size, oldest = db.execute(
                f"SELECT count(*), total(size), min(finished_at) FROM jobs WHERE {MAY_GO}").fetchone()
            expired = -1.0 if keep.max_age_s is None else now - keep.max_age_s
            if count <= keep.max_jobs and size <= keep.max_bytes and (oldest is None or oldest >= expired):
                return []
            rows = db.execute(f"SELECT number, id, size, finished_at FROM jobs WHERE {MAY_GO}")
            gone = jobs_to_remove(map(Finished._make, rows), keep, now, order=order, young=young)
            self._forget(db, [(job.number, job.id) for job in gone])
            return gone

        gone = self._commit(remove, reserved=True)
        if gone:
            self._changed()
        for job in gone:
            self._files.remove_all(job.id)
        if gone:
            self._reserve.refill()
        return [job.id for job in gone]

    # ---- single images

    def mark_favourite(self, number: int, picture: int, is_favourite: bool) -> None:
        """Make an image of job `number` a favourite or none, durably. A second time changes nothing."""
        place = "(SELECT coalesce(max(favourite), 0) + 1 FROM marks)" if is_favourite else "NULL"
        update = f"coalesce(favourite, {place})" if is_favourite else "NULL"
        with self._database.transaction(durable=True) as db:
            db.execute(f"INSERT INTO marks (job, picture, favourite) VALUES (?, ?, {place}) "
                       f"ON CONFLICT DO UPDATE SET favourite = {update}", (number, picture))
        self._changed()

    def mark_deleted(self, number: int, picture: int, at: float | None) -> None:
        """Delete an image of job `number`, durably, or bring it back (None): its files stay until `purge`."""
        with self._database.transaction(durable=True) as db:
            db.execute("INSERT INTO marks (job, picture, deleted_at) VALUES (?, ?, ?) "
                       "ON CONFLICT DO UPDATE SET deleted_at = coalesce(deleted_at, excluded.deleted_at)"
                       if at is not None else
                       "INSERT INTO marks (job, picture, deleted_at) VALUES (?, ?, ?) "
                       "ON CONFLICT DO UPDATE SET deleted_at = NULL", (number, picture, at))
        self._changed()

    def marks(self, numbers: Sequence[int]) -> dict[int, Marks]:
        """What was decided about the images of each of these jobs."""
        found = {}
        for number in numbers:
            rows = self._read("SELECT picture, favourite, deleted_at FROM marks WHERE job = ?", (number,))
            found[number] = Marks(frozenset(row[0] for row in rows if row[1] is not None),
                                  frozenset(row[0] for row in rows if row[2] is not None))
        return found

    def purge(self, before: float) -> None:
        """Remove the files of images that were deleted before this time; a job that has no other goes with them."""
        rows = self._read("SELECT number, id, picture FROM marks JOIN jobs ON number = job WHERE deleted_at < ?",
                          (before,))
        for number, job_id, picture in rows:
            files = [name for (name,) in self._read("SELECT name FROM files WHERE job = ?", (number,))]
            gone = [name for name in files if re.match(rf"{picture}[-.]", name)]
            if not gone:
                continue
            if not {name for name in files if PICTURE_NAME.fullmatch(name)} - set(gone):
                with self._database.transaction(durable=True) as db:
                    self._forget(db, [(number, job_id)])
                self._changed()
                self._files.remove_all(job_id)
                continue
            with self._database.transaction(durable=True) as db:
                for name in gone:
                    db.execute("DELETE FROM files WHERE job = ? AND name = ?", (number, name))
                _measure(db, number)
            self._changed()
            self.remove_files(job_id, gone)

    # ---- reading

    def find(self, job_id: str) -> Record | None:
        """The job with this id, None where there is none (any more)."""
        found = self._read(f"SELECT {', '.join(COLUMNS)} FROM jobs WHERE id = ?", (_text(job_id),))
        return _to_record(found[0]) if found else None

    def find_key(self, client: str, idempotency_key: str) -> tuple[str, str] | None:
        """The id and the fingerprint of the job that this client submitted with this key."""
        query = "SELECT id, fingerprint FROM jobs WHERE client = ? AND idempotency_key = ?"
        found = self._read(query, (_text(client), _text(idempotency_key)))
        return (found[0][0], found[0][1]) if found else None

    def was_deleted(self, job_id: str) -> bool:
        """Whether a job with this id was removed, as far as can be remembered."""
        return bool(self._read("SELECT 1 FROM deleted WHERE digits = ?", (_text(digits_of(job_id)),)))

    def unfinished(self) -> list[Record]:
        """Every job without an end, in the order of submission."""
        query = f"SELECT {', '.join(COLUMNS)} FROM jobs WHERE finished_at IS NULL ORDER BY number"
        return [_to_record(row) for row in self._read(query)]

    def page(
        self, limit: int, *, below: int | None = None, states: Sequence[str] | None = None, text: str = "",
        favourites: bool = False,
    ) -> list[Record]:
        """Up to `limit` jobs, newest first: those numbered `below`, in one of `states`, with `text` in their names or,
        where it is a number, among their seeds, with a favourite image.
        """
        wanted: list[tuple[str, Sequence[Any]]] = []
        if below is not None:
            wanted.append(("number < ?", (below,)))
        if states is not None:
            wanted.append((f"state IN ({', '.join('?' * len(states))})", states))
        if text:
            sought: list[Any] = [_text(text.casefold())]
            seed = int(text) if text.isascii() and text.isdecimal() and len(text) < 17 else None
            wanted.append((f"(instr(folded, ?){'' if seed is None else f' OR {SEED_AMONG}'})",
                           sought + [seed] * (seed is not None)))
        if favourites:
            wanted.append((f"NOT ({NO_FAVOURITE})", ()))
        where = f"WHERE {' AND '.join(condition for condition, _ in wanted)} " if wanted else ""
        query = f"SELECT {', '.join(COLUMNS)} FROM jobs {where}ORDER BY number DESC LIMIT ?"
        values = [value for _, some in wanted for value in some]
        return [_to_record(row) for row in self._read(query, (*values, limit))]

    def request(self, number: int) -> Mapping[str, Any] | None:
        """What job `number` was asked to do; None when there is no such job (any more)."""
        found = self._read("SELECT request FROM jobs WHERE number = ?", (number,))
        return json.loads(found[0][0]) if found else None

    def events(self, number: int) -> list[Event]:
        """Everything that happened to job `number`, in order."""
        found: list[Event] = []
        while True:
            last = found[-1].id if found else 0
            rows = self._read(
                "SELECT id, kind, at, data FROM events WHERE job = ? AND id > ? ORDER BY id LIMIT ?",
                (number, last, EVENTS_AT_ONCE),
            )
            every_data = json.loads(f"[{','.join(row[3] for row in rows)}]")  # at once: five times as fast
            found += [Event(row[0], row[1], row[2], data) for row, data in zip(rows, every_data, strict=True)]
            if len(rows) < EVENTS_AT_ONCE:
                return found

    def files(self, number: int) -> list[StoredFile]:
        """The files of job `number`, by name."""
        return [StoredFile(*row) for row in self._read("SELECT name, size, moment FROM files WHERE job = ?", (number,))]

    def lasting_names(self, numbers: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """The names of the lasting files of each of these jobs."""
        query = "SELECT name FROM files WHERE job = ? AND moment IS NULL"
        return {number: tuple(name for (name,) in self._read(query, (number,))) for number in numbers}

    def last_data(self, number: int, kind: str, among: int) -> list[dict[str, Any]]:
        """What those of a job's last `among` events say that are of this kind, oldest first."""
        query = """SELECT data FROM events WHERE job = :job AND kind = :kind
                   AND id > (SELECT max(id) FROM events WHERE job = :job) - :among ORDER BY id"""
        found = self._read(query, {"job": number, "kind": kind, "among": among})
        return [json.loads(data) for (data,) in found]

    def count(self) -> dict[str, int]:
        """How many jobs are in each state (those that there are)."""
        return dict(self._read("SELECT state, count(*) FROM jobs GROUP BY state"))

    # ---- files

    def write_files(self, job_id: str, files: Mapping[str, bytes], *, durable: bool) -> None:
        """Put files into the job's folder. They belong to the job only when a committed `Change` names them."""
        self._files.write(job_id, files, durable=durable)

    def read_file(self, job_id: str, name: str) -> bytes | None:
        """The content of a file that a row named; None when it is gone."""
        return self._files.read(job_id, name)

    def remove_files(self, job_id: str, names: Iterable[str]) -> None:
        """Remove files that no row names any more. What cannot be removed now goes at the next start."""
        self._files.remove(job_id, names)

    # ---- within

    def _sweep(self) -> None:
        """Remove what a crash left behind: folders and files that no row names, or of another size than it says."""
        known: dict[str, dict[str, int]] = {digits_of(job_id): {} for (job_id,) in self._read("SELECT id FROM jobs")}
        for job_id, name, size in self._read("SELECT id, files.name, files.size FROM files JOIN jobs ON number = job"):
            known[digits_of(job_id)][name] = size
        self._files.sweep(known)

    def _commit(
        self, work: Callable[[sqlite3.Connection], T], *, durable: bool = False, reserved: bool = False
    ) -> T:
        """Do `work` in one transaction; on a full disk again, when it is `reserved`, with room from the reserve."""
        while True:
            try:
                with self._database.transaction(durable=durable) as db:
                    return work(db)
            except StoreError as error:
                if not reserved or error.cause != FULL or not self._reserve.release():
                    raise

    def _forget(self, db: sqlite3.Connection, jobs: Iterable[tuple[int, str]]) -> None:
        for number, job_id in jobs:
            db.execute("DELETE FROM events WHERE job = ?", (number,))
            db.execute("DELETE FROM files WHERE job = ?", (number,))
            db.execute("DELETE FROM marks WHERE job = ?", (number,))
            db.execute("DELETE FROM jobs WHERE number = ?", (number,))
            db.execute("INSERT OR IGNORE INTO deleted (digits) VALUES (?)", (digits_of(job_id),))
        oldest = "(SELECT max(number) FROM deleted) - ?"
        db.execute(f"DELETE FROM deleted WHERE number <= {oldest}", (self.MAX_REMEMBERED_IDS,))


def _write(db: sqlite3.Connection, change: Change) -> None:
    number = change.number
    if change.columns:
        assignments = ", ".join(f"{name} = ?" for name in change.columns)
        values = [_to_column(name, value) for name, value in change.columns.items()]
        db.execute(f"UPDATE jobs SET {assignments} WHERE number = ?", (*values, number))
    for event in change.events:
        db.execute("INSERT INTO events (job, id, kind, at, data) VALUES (?, ?, ?, ?, ?)",
                   (number, event.id, event.kind, event.at, _json(event.data)))
    for file in change.files:
        db.execute("INSERT OR REPLACE INTO files (job, name, size, moment) VALUES (?, ?, ?, ?)",
                   (number, file.name, file.size, file.moment))
    for name in change.dropped:
        db.execute("DELETE FROM files WHERE job = ? AND name = ?", (number, name))
    if change.columns.get("finished_at") is not None:
        _measure(db, number)


def _measure(db: sqlite3.Connection, number: int) -> None:
    """Write down how many bytes removing the job would set free."""
    db.execute(
        "UPDATE jobs SET size = length(request) + length(parameters)"
        " + (SELECT total(size) FROM files WHERE job = number)"
        " + (SELECT total(length(data) + 40) FROM events WHERE job = number)"
        " WHERE number = ?",
        (number,),
    )


def _to_record(row: Sequence[Any]) -> Record:
    values = {name: json.loads(value) if name in AS_JSON else value for name, value in zip(COLUMNS, row, strict=True)}
    values["warnings"] = tuple(values["warnings"])
    for name in ("cancel_requested", "delete_requested"):
        values[name] = bool(values[name])
    return Record(**values)


def _to_column(name: str, value: Any) -> Any:
    return _json(value) if name in AS_JSON else _text(value) if isinstance(value, str) else value


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _text(value: str) -> str:
    """The string as UTF-8 can hold it: SQLite refuses half of a surrogate pair."""
    return value.encode("utf-8", "replace").decode()
