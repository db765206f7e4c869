"""Why does the disk or the database refuse, and what helps?

SQLite does not tell every cause apart, so where it is vague the folder itself is tried (`core/disk.py`). It does not
know what was being written.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from core.disk import DAMAGED, FULL, LOCKED, OTHER, UNREACHABLE, cause_of, probe, reason_of, sentence

DATABASE = "jobs.sqlite3"


class StoreError(Exception):
    """The store cannot be opened, read or written; the message says why and what helps, `cause` is one of core.disk."""

    def __init__(self, message: str, cause: str = OTHER) -> None:
        super().__init__(message)
        self.cause = cause


def why(error: Exception, folder: Path) -> tuple[str, str]:
    """The cause and the reason of an error of the system or of SQLite, which does not tell everything apart."""
    text, path = str(error), folder / DATABASE
    if isinstance(error, FileExistsError) and folder.is_symlink():
        return UNREACHABLE, f"it is a link to {os.readlink(folder)}, which is not there"
    if isinstance(error, OSError):
        return cause_of(error), reason_of(error)
    if "locked" in text:
        return LOCKED, text
    if "disk is full" in text:
        return FULL, text
    if "malformed" in text or "not a database" in text:
        return DAMAGED, text
    if re.search("I/O error|readonly|unable to open|locking protocol", text):
        return probe(folder, [path, Path(f"{path}-wal")]) or (OTHER, text)
    return OTHER, text


def remedy(cause: str, reason: str, folder: Path) -> str:
    """What is wrong with the folder, and what helps."""
    if cause == LOCKED:
        return f"Another server is using {folder}: stop it, or choose another folder with --data-dir."
    return sentence(cause, reason, folder, "--data-dir")


def store_error(refused: str, error: Exception, folder: Path) -> StoreError:
    """The error that says what was `refused`, and where that is known, why and what helps."""
    cause, reason = why(error, folder)
    return StoreError(refused if cause in (OTHER, DAMAGED) else f"{refused} {remedy(cause, reason, folder)}", cause)


def unusable(folder: Path, error: Exception) -> StoreError:
    """The error for a folder in which no database can be opened."""
    cause, reason = why(error, folder)
    refused = f"The folder {folder} cannot be used for jobs: {error}."
    return StoreError(refused if cause == OTHER else remedy(cause, reason, folder), cause)
