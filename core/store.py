"""Where do jobs live when the process does not?

In one folder. `jobs.sqlite3` holds every job, its events and the list of its files; `jobs/<32 hex digits>/` holds the
files themselves, named after the random part of the job's id, so that no prompt ever reaches a file name. The database
is the truth: a file counts from the moment a committed row names it, and whatever no row names is swept at the next
start.

What holds after `kill -9` at any moment: everything that was committed, which is everything that anybody has seen.
What holds after a power cut too: everything saved as `durable` (accepted jobs, clients' decisions, ends) with the files
written as `durable`; the last few progress events may be missing. SQLite does this with a write-ahead log: a commit is
one write, and one `fsync` more when it is durable (https://sqlite.org/wal.html, https://sqlite.org/pragma.html).

What holds on a full disk: jobs can be removed and cancelled and their ends are written down, because `reserve` gives
its room back for that. Nothing is ordered by the clock, which may jump: the number of a job is its place.

One process owns a folder: the database stays locked while it is open. All threads share one connection behind one
lock, which is held for single statements and short transactions, never while a file is read or written.

Long because every statement of SQL stands here. This file does not know what a state or an event means, when a job may
be removed, or who waits for what: that is `core/jobs.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from core.disk import DAMAGED, FULL, LOCKED, OTHER, UNREACHABLE, Reserve, cause_of, probe, reason_of, sentence

DATABASE = "jobs.sqlite3"
FILES = "jobs"
RESERVE = "reserve"
APPLICATION_ID = 0x66616365  # "face", in the file's header: tells our database from anybody else's
SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY,  -- in the order of submission
    id TEXT NOT NULL UNIQUE,
    client TEXT NOT NULL,
    name TEXT NOT NULL,
    folded TEXT NOT NULL,  -- the name with case folded away, to search in
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    done INTEGER NOT NULL,
    total INTEGER NOT NULL,
    error TEXT NOT NULL,
    cancel_requested INTEGER NOT NULL,
    delete_requested INTEGER NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,  -- bytes that removing the job sets free, counted when it ends
    idempotency_key TEXT,
    fingerprint TEXT,
    warnings TEXT NOT NULL,
    parameters TEXT NOT NULL,
    request TEXT NOT NULL  -- the largest comes last: a list of jobs need not read past it
);
CREATE UNIQUE INDEX job_keys ON jobs (client, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX unfinished_jobs ON jobs (number) WHERE finished_at IS NULL;
CREATE INDEX job_states ON jobs (state, number);
CREATE INDEX finished_jobs ON jobs (finished_at, number, size) WHERE finished_at IS NOT NULL;
CREATE TABLE events (
    job INTEGER NOT NULL, id INTEGER NOT NULL, kind TEXT NOT NULL, at REAL NOT NULL, data TEXT NOT NULL,
    PRIMARY KEY (job, id)
) WITHOUT ROWID;
CREATE TABLE files (
    job INTEGER NOT NULL, name TEXT NOT NULL, size INTEGER NOT NULL, moment INTEGER,
    PRIMARY KEY (job, name)
) WITHOUT ROWID;
CREATE TABLE deleted (number INTEGER PRIMARY KEY AUTOINCREMENT, digits TEXT NOT NULL UNIQUE);
"""
MARKS = """
CREATE TABLE marks (  -- what people decided about single pictures
    job INTEGER NOT NULL, picture INTEGER NOT NULL,
    favourite INTEGER,  -- rises with every one that is made a favourite; NULL: it is none
    deleted_at REAL,  -- NULL: it is not
    PRIMARY KEY (job, picture)
) WITHOUT ROWID;
"""
MIGRATIONS = {1: MARKS}  # what leads from the schema of this version to the next
NO_FAVOURITE = "number NOT IN (SELECT job FROM marks WHERE favourite IS NOT NULL AND deleted_at IS NULL)"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PICTURE_NAME = re.compile(r"\d+\.png")  # of a finished one
FOLDER_NAME = re.compile(r"[0-9a-f]{32}")
EVENTS_AT_ONCE = 500  # so that a reader of a long history lets the engine's commits through in between


T = TypeVar("T")


class StoreError(Exception):
    """The store cannot be opened, read or written; the message says why and what helps, `cause` is one of core.disk."""

    def __init__(self, message: str, cause: str = OTHER) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Retention:
    """What finished jobs may occupy before the oldest are removed: their number, their bytes, their age in seconds.

    Jobs with a favourite are neither counted nor removed.
    """

    max_jobs: int = 1000
    max_bytes: int = 2 * 2**30
    max_age_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_jobs < 1:
            raise ValueError(f"max_jobs must be at least 1, got {self.max_jobs}")
        if self.max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {self.max_bytes}")
        if self.max_age_s is not None and not self.max_age_s > 0:
            raise ValueError(f"max_age_s must be above 0 or None, got {self.max_age_s}")


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
    """Which pictures of a job, by index, are favourites and which are deleted."""

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


COLUMNS = tuple(field.name for field in fields(Record))
# A number that was searched for is a seed too: image i of a job was drawn from `seed` + i.
SEED_AMONG = """? - json_extract(parameters, '$.seed') BETWEEN 0
    AND coalesce(json_extract(parameters, '$.candidates'), json_extract(parameters, '$.n_images'), 1) - 1"""
AS_JSON = frozenset(("parameters", "warnings", "error"))


def digits_of(job_id: str) -> str:
    """The random part of an id, which names its folder and is all that is remembered of a removed job."""
    return job_id[-32:]


class Store:
    """Jobs, events and files in `folder`, which is made when it is missing. Every method may be called by any thread.

    Raises: StoreError from every method that touches the disk.
    """

    MAX_REMEMBERED_IDS = 100_000  # removed ids that are still told from ids that never were

    def __init__(self, folder: Path, *, patience_s: float = 1.0) -> None:
        """Open or make the store, waiting up to `patience_s` for another process to let go of it."""
        self.folder, self._lock = folder, threading.RLock()
        self._path = folder / DATABASE
        try:
            (folder / FILES).mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self._path, timeout=patience_s, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            cause, reason = self._why(error)
            told = f"The folder {folder} cannot be used for jobs: {error}."
            raise StoreError(told if cause == OTHER else self._sentence(cause, reason), cause) from error
        try:
            if not self._open():  # beside a new database, whatever is there is not ours to remove
                self._sweep()
            self._reserve = Reserve(folder / RESERVE)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Let go of the folder. Anything asked afterwards raises StoreError. Idempotent."""
        with self._lock:
            self._db.close()

    # ---- writing

    def next_number(self) -> int:
        """A number for a new job, above all before it."""
        with self._lock:
            self._last_number += 1
            return self._last_number

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
        with self._transaction(durable=True) as db:
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
            self._remove_folder(record.id)  # no reserve is left: the files, which are what takes the room, go first
            self._commit(forget, durable=True)
        self._remove_folder(record.id)
        self._reserve.refill()

    def prune(
        self, keep: Retention, now: float, *, order: Sequence[int] = (), young: Collection[int] = ()
    ) -> list[str]:
        """Remove finished jobs, oldest first, until `keep` holds; returns their ids.

        Oldest are those with the lowest numbers; the jobs in `order`, which gives the numbers of those that are known
        to have ended one after the other, are the newest. The newest finished job is removed for its age alone,
        however large it is: somebody is about to look at it. Only ages are told by the clock, and where it contradicts
        the order a job stays: one that comes after a younger one is no older than that. `young` are the numbers of
        jobs that are known not to be too old, whatever the clock says.
        """
        place = {number: i for i, number in enumerate(order)}

        def remove(db: sqlite3.Connection) -> list[tuple[int, str]]:
            count, size, oldest = db.execute(
                "SELECT count(*), total(size), min(finished_at) FROM jobs "
                f"WHERE finished_at IS NOT NULL AND {NO_FAVOURITE}"
            ).fetchone()
            expired = -1.0 if keep.max_age_s is None else now - keep.max_age_s
            if count <= keep.max_jobs and size <= keep.max_bytes and (oldest is None or oldest >= expired):
                return []
            rows = sorted(
                db.execute("SELECT number, id, size, finished_at FROM jobs WHERE finished_at IS NOT NULL "
                           f"AND {NO_FAVOURITE}"),
                key=lambda row: (place.get(row[0], -1), row[0]),
            )
            ends = [now if number in young else end for number, _, _, end in rows]
            first_young = next((i for i, end in enumerate(ends) if expired <= end <= now), len(rows))
            too_old = max((i + 1 for i, end in enumerate(ends[:first_young]) if end < expired), default=0)
            gone = []
            for i, (number, job_id, bytes_, _) in enumerate(rows):
                if i >= too_old and not (count > 1 and (count > keep.max_jobs or size > keep.max_bytes)):
                    break
                gone.append((number, job_id))
                count, size = count - 1, size - bytes_
            self._forget(db, gone)
            return gone

        gone = self._commit(remove, reserved=True)
        for _, job_id in gone:
            self._remove_folder(job_id)
        if gone:
            self._reserve.refill()
        return [job_id for _, job_id in gone]

    # ---- single pictures

    def mark_favourite(self, number: int, picture: int, is_favourite: bool) -> None:
        """Make a picture of job `number` a favourite or none, durably. A second time changes nothing."""
        place = "(SELECT coalesce(max(favourite), 0) + 1 FROM marks)" if is_favourite else "NULL"
        update = f"coalesce(favourite, {place})" if is_favourite else "NULL"
        with self._transaction(durable=True) as db:
            db.execute(f"INSERT INTO marks (job, picture, favourite) VALUES (?, ?, {place}) "
                       f"ON CONFLICT DO UPDATE SET favourite = {update}", (number, picture))

    def mark_deleted(self, number: int, picture: int, at: float | None) -> None:
        """Delete a picture of job `number`, durably, or bring it back (None): its files stay until `purge`."""
        with self._transaction(durable=True) as db:
            db.execute("INSERT INTO marks (job, picture, deleted_at) VALUES (?, ?, ?) "
                       "ON CONFLICT DO UPDATE SET deleted_at = coalesce(deleted_at, excluded.deleted_at)"
                       if at is not None else
                       "INSERT INTO marks (job, picture, deleted_at) VALUES (?, ?, ?) "
                       "ON CONFLICT DO UPDATE SET deleted_at = NULL", (number, picture, at))

    def marks(self, numbers: Sequence[int]) -> dict[int, Marks]:
        """What was decided about the pictures of each of these jobs."""
        found = {}
        for number in numbers:
            rows = self._read("SELECT picture, favourite, deleted_at FROM marks WHERE job = ?", (number,))
            found[number] = Marks(frozenset(row[0] for row in rows if row[1] is not None),
                                  frozenset(row[0] for row in rows if row[2] is not None))
        return found

    def purge(self, before: float) -> None:
        """Remove the files of pictures that were deleted before this time; a job that has no other goes with them."""
        rows = self._read("SELECT number, id, picture FROM marks JOIN jobs ON number = job WHERE deleted_at < ?",
                          (before,))
        for number, job_id, picture in rows:
            files = [name for (name,) in self._read("SELECT name FROM files WHERE job = ?", (number,))]
            gone = [name for name in files if re.match(rf"{picture}[-.]", name)]
            if not gone:
                continue
            if not {name for name in files if PICTURE_NAME.fullmatch(name)} - set(gone):
                with self._transaction(durable=True) as db:
                    self._forget(db, [(number, job_id)])
                self._remove_folder(job_id)
                continue
            with self._transaction(durable=True) as db:
                for name in gone:
                    db.execute("DELETE FROM files WHERE job = ? AND name = ?", (number, name))
                _measure(db, number)
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
        where it is a number, among their seeds, with a favourite picture.
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
        """Put files into the job's folder: aside first, then renamed, so that nobody reads half of one.

        They belong to the job only when a committed `Change` names them.
        """
        folder = self._folder(job_id)
        try:
            if not folder.exists():
                folder.mkdir()
                _sync_folder(folder.parent)
            for name, content in files.items():
                if not FILE_NAME.fullmatch(name):
                    raise ValueError(f"not a name for a job's file: {name!r}")
                path = f"{folder}/{name}"  # eight a step: objects for paths would take as long as writing
                with open(f"{path}.tmp", "wb") as file:
                    file.write(content)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
                os.replace(f"{path}.tmp", path)
            if durable:
                _sync_folder(folder)
        except OSError as error:
            told = f"A file of job {job_id} cannot be written in {folder}: {error.strerror}."
            raise self._error(told, error) from error

    def read_file(self, job_id: str, name: str) -> bytes | None:
        """The content of a file that a row named; None when it is gone."""
        try:
            return (self._folder(job_id) / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(f"The file {name} of job {job_id} cannot be read: {error.strerror}.", error) from error

    def remove_files(self, job_id: str, names: Iterable[str]) -> None:
        """Remove files that no row names any more. What cannot be removed now goes at the next start."""
        for name in names:
            try:
                (self._folder(job_id) / name).unlink(missing_ok=True)
            except OSError:
                return

    # ---- within

    def _open(self) -> bool:
        """Lock the database, check that it is ours and whole, and make its tables where it is new: then True."""
        try:
            # before the first access: then no other process may even read, and the log needs no shared memory
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (owner,) = self._db.execute("PRAGMA application_id").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and owner != APPLICATION_ID:
                raise StoreError(
                    f"{self._path} is a database of another program: choose another folder with --data-dir."
                )
            if version > SCHEMA_VERSION:
                raise StoreError(
                    f"{self._path} was written by a newer version of this program (schema {version}, this one knows "
                    f"{SCHEMA_VERSION}): update the program, or choose another folder with --data-dir."
                )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA journal_size_limit = 16777216")
            self._db.execute("BEGIN EXCLUSIVE")
            if not tables:
                for statement in (SCHEMA + MARKS).split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._db.execute("COMMIT")
            (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict.replace("\n", " "))
            if tables and version < SCHEMA_VERSION:  # after the check: a damaged one stays as it was
                self._migrate(version)
            (self._last_number,) = self._db.execute("SELECT coalesce(max(number), 0) FROM jobs").fetchone()
            return not tables
        except sqlite3.Error as error:
            cause, reason = self._why(error)
            if cause not in (OTHER, DAMAGED):
                raise StoreError(self._sentence(cause, reason), cause) from error
            raise StoreError(
                f"The job database {self._path} is damaged ({error}): move the folder away to start with an empty "
                "one, or restore it from a copy.", DAMAGED
            ) from error

    def _migrate(self, version: int) -> None:
        """Bring a database of an older version to this one, in one transaction; all of its jobs stay."""
        self._db.execute("BEGIN EXCLUSIVE")
        for older in range(version, SCHEMA_VERSION):
            for statement in MIGRATIONS[older].split(";\n"):
                self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._db.execute("COMMIT")

    def _sweep(self) -> None:
        """Remove what a crash left behind: folders and files that no row names, or of another size than it says."""
        known: dict[str, dict[str, int]] = {digits_of(job_id): {} for (job_id,) in self._read("SELECT id FROM jobs")}
        for job_id, name, size in self._read("SELECT id, files.name, files.size FROM files JOIN jobs ON number = job"):
            known[digits_of(job_id)][name] = size
        try:
            for folder in (self.folder / FILES).iterdir():
                if not FOLDER_NAME.fullmatch(folder.name):
                    continue
                for file in folder.iterdir():
                    if known.get(folder.name, {}).get(file.name) != file.stat().st_size:
                        file.unlink()
                if folder.name not in known:
                    folder.rmdir()
        except OSError as error:
            raise self._error(f"The folder {self.folder / FILES} cannot be used: {error}.", error) from error

    def _commit(
        self, work: Callable[[sqlite3.Connection], T], *, durable: bool = False, reserved: bool = False
    ) -> T:
        """Do `work` in one transaction; on a full disk again, when it is `reserved`, with room from the reserve."""
        while True:
            try:
                with self._transaction(durable=durable) as db:
                    return work(db)
            except StoreError as error:
                if not reserved or error.cause != FULL or not self._reserve.release():
                    raise

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing; with `durable`, the disk has it when the block is left."""
        with self._lock:
            try:
                if durable:
                    self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._error(f"The job database {self._path} cannot be written: {error}.", error) from error
            finally:
                try:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    if durable:
                        self._db.execute("PRAGMA synchronous = NORMAL")
                except sqlite3.ProgrammingError:  # it was closed
                    pass

    def _read(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._error(f"The job database {self._path} cannot be read: {error}.", error) from error

    def _why(self, error: Exception) -> tuple[str, str]:
        """The cause and the reason of an error of the system or of SQLite, which does not tell everything apart."""
        text = str(error)
        if isinstance(error, FileExistsError) and self.folder.is_symlink():
            return UNREACHABLE, f"it is a link to {os.readlink(self.folder)}, which is not there"
        if isinstance(error, OSError):
            return cause_of(error), reason_of(error)
        if "locked" in text:
            return LOCKED, text
        if "disk is full" in text:
            return FULL, text
        if "malformed" in text or "not a database" in text:
            return DAMAGED, text
        if re.search("I/O error|readonly|unable to open|locking protocol", text):
            return probe(self.folder, [self._path, Path(f"{self._path}-wal")]) or (OTHER, text)
        return OTHER, text

    def _sentence(self, cause: str, reason: str) -> str:
        if cause == LOCKED:
            return f"Another server is using {self.folder}: stop it, or choose another folder with --data-dir."
        return sentence(cause, reason, self.folder, "--data-dir")

    def _error(self, told: str, error: Exception) -> StoreError:
        """What was refused, and where that is known, why and what helps."""
        cause, reason = self._why(error)
        return StoreError(told if cause in (OTHER, DAMAGED) else f"{told} {self._sentence(cause, reason)}", cause)

    def _forget(self, db: sqlite3.Connection, jobs: Iterable[tuple[int, str]]) -> None:
        for number, job_id in jobs:
            db.execute("DELETE FROM events WHERE job = ?", (number,))
            db.execute("DELETE FROM files WHERE job = ?", (number,))
            db.execute("DELETE FROM marks WHERE job = ?", (number,))
            db.execute("DELETE FROM jobs WHERE number = ?", (number,))
            db.execute("INSERT OR IGNORE INTO deleted (digits) VALUES (?)", (digits_of(job_id),))
        oldest = "(SELECT max(number) FROM deleted) - ?"
        db.execute(f"DELETE FROM deleted WHERE number <= {oldest}", (self.MAX_REMEMBERED_IDS,))

    def _folder(self, job_id: str) -> Path:
        return self.folder / FILES / digits_of(job_id)

    def _remove_folder(self, job_id: str) -> None:
        shutil.rmtree(self._folder(job_id), ignore_errors=True)  # what is left goes at the next start


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


def _sync_folder(folder: Path) -> None:
    """Have the disk know the names in `folder`."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
