"""When is a database ours, whole and up to date, and what does a transaction promise?

`jobs.sqlite3` holds every job, its events and the list of its files; its tables are below. A commit is one write, and
one `fsync` more when it is durable: SQLite does this with a write-ahead log (https://sqlite.org/wal.html,
https://sqlite.org/pragma.html). A folder of an older version is brought to this one in one transaction.

One process owns a folder: the database stays locked while it is open. All threads share one connection behind one
lock, which is held for single statements and short transactions. It does not know what is asked of the tables: that is
`core/jobs/store.py`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.disk import DAMAGED, OTHER
from core.jobs.storage_errors import DATABASE, StoreError, remedy, store_error, unusable, why

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


class Database:
    """The open database of `folder`, which is there. Every method may be called by any thread.

    `is_new`: it was made just now. Raises: StoreError where the database cannot be opened, read or written.
    """

    def __init__(self, folder: Path, *, patience_s: float) -> None:
        """Open or make it, waiting up to `patience_s` for another process to let go of it."""
        self.folder, self.path, self._lock = folder, folder / DATABASE, threading.RLock()
        try:
            self.connection = sqlite3.connect(
                self.path, timeout=patience_s, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise unusable(folder, error) from error
        try:
            self.is_new = self._open()
        except BaseException:
            self.connection.close()
            raise

    def close(self) -> None:
        """Let go of the folder. Idempotent."""
        with self._lock:
            self.connection.close()

    def next_number(self) -> int:
        """A number for a new job, above all before it."""
        with self._lock:
            self._last_number += 1
            return self._last_number

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing; with `durable`, the disk has it when the block is left."""
        with self._lock:
            try:
                if durable:
                    self.connection.execute("PRAGMA synchronous = FULL")
                self.connection.execute("BEGIN IMMEDIATE")
                yield self.connection
                self.connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._error(f"The job database {self.path} cannot be written: {error}.", error) from error
            finally:
                try:
                    if self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
                    if durable:
                        self.connection.execute("PRAGMA synchronous = NORMAL")
                except sqlite3.ProgrammingError:  # it was closed
                    pass

    def read(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """All rows of a query."""
        with self._lock:
            try:
                return self.connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._error(f"The job database {self.path} cannot be read: {error}.", error) from error

    def _open(self) -> bool:
        """Lock the database, check that it is ours and whole, and make its tables where it is new: then True."""
        try:
            # before the first access: then no other process may even read, and the log needs no shared memory
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            (version,) = self.connection.execute("PRAGMA user_version").fetchone()
            (owner,) = self.connection.execute("PRAGMA application_id").fetchone()
            (tables,) = self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and owner != APPLICATION_ID:
                raise StoreError(
                    f"{self.path} is a database of another program: choose another folder with --data-dir."
                )
            if version > SCHEMA_VERSION:
                raise StoreError(
                    f"{self.path} was written by a newer version of this program (schema {version}, this one knows "
                    f"{SCHEMA_VERSION}): update the program, or choose another folder with --data-dir."
                )
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")
            self.connection.execute("PRAGMA journal_size_limit = 16777216")
            self.connection.execute("BEGIN EXCLUSIVE")
            if not tables:
                for statement in (SCHEMA + MARKS).split(";\n"):
                    self.connection.execute(statement)
                self.connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self.connection.execute("COMMIT")
            (verdict,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict.replace("\n", " "))
            if tables and version < SCHEMA_VERSION:  # after the check: a damaged one stays as it was
                self._migrate(version)
            (self._last_number,) = self.connection.execute("SELECT coalesce(max(number), 0) FROM jobs").fetchone()
            return not tables
        except sqlite3.Error as error:
            cause, reason = why(error, self.folder)
            if cause not in (OTHER, DAMAGED):
                raise StoreError(remedy(cause, reason, self.folder), cause) from error
            raise StoreError(
                f"The job database {self.path} is damaged ({error}): move the folder away to start with an empty "
                "one, or restore it from a copy.", DAMAGED
            ) from error

    def _migrate(self, version: int) -> None:
        """Bring a database of an older version to this one, in one transaction; all of its jobs stay."""
        self.connection.execute("BEGIN EXCLUSIVE")
        for older in range(version, SCHEMA_VERSION):
            for statement in MIGRATIONS[older].split(";\n"):
                self.connection.execute(statement)
        self.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self.connection.execute("COMMIT")

    def _error(self, refused: str, error: sqlite3.Error) -> StoreError:
        return store_error(refused, error, self.folder)
