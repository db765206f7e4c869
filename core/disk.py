"""Why does a disk refuse, and what helps?

A full disk, a read-only one, one that does not answer and a folder of somebody else all look alike from far away: an
`OSError`, or SQLite's "disk I/O error". `cause_of` and `probe` tell them apart, `sentence` says what helps to whoever
runs the server, `ANSWERS` what its clients are told. A `Reserve` keeps a little room, so that what frees space can be
written down on a full disk.

It does not know what is kept there. Standard library only and no syntax newer than Python 3.7, as in `core/machine.py`.
SQLite's errors: https://sqlite.org/rescode.html
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

FULL, READ_ONLY, PERMISSION, UNREACHABLE = "full", "read-only", "permission", "unreachable"
LOCKED, DAMAGED, OTHER = "locked", "damaged", ""  # these two are said by a database, never by `cause_of`
ERRORS = {
    FULL: ("ENOSPC", "EDQUOT"),
    READ_ONLY: ("EROFS",),
    PERMISSION: ("EACCES", "EPERM"),
    UNREACHABLE: ("EIO", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH",
                  "ETIMEDOUT", "ENOLINK", "EREMOTEIO", "ENOMEDIUM"),
}
CAUSES = {getattr(errno, name): cause for cause, names in ERRORS.items() for name in names if hasattr(errno, name)}
WINDOWS = {112: FULL, 39: FULL, 1295: FULL, 19: READ_ONLY, 5: PERMISSION, 21: UNREACHABLE, 53: UNREACHABLE,
           64: UNREACHABLE, 67: UNREACHABLE, 1117: UNREACHABLE}
ANSWERS = {  # without the path, which is no business of a client
    FULL: "The server's disk is full: delete some jobs, or free space on it.",
    READ_ONLY: "The server's disk is read-only: nothing can be kept or deleted until it can be written to again.",
    PERMISSION: "The server may not write to its data folder any more; see its log.",
    UNREACHABLE: "The server's disk does not answer; see its log.",
    LOCKED: "Another program uses the server's job database; see its log.",
    DAMAGED: "The server's job database is damaged; see its log.",
    OTHER: "The server's disk fails; see its log.",
}
RESERVE_BYTES = 2 * 2**20  # removing a job takes about 100 kB of SQLite's log
PIECE = 2**18
PROBE_BYTES = 2**16


def cause_of(error: OSError) -> str:
    """FULL, READ_ONLY, PERMISSION or UNREACHABLE; OTHER for what is none of them."""
    return WINDOWS.get(getattr(error, "winerror", None) or 0) or CAUSES.get(error.errno or 0, OTHER)


def reason_of(error: Exception) -> str:
    """The system's own words for an error, without number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def probe(folder: Path, files: Iterable[Path] = ()) -> tuple[str, str] | None:
    """Write a little into `folder` and open those of `files` that exist: the cause and the reason of the first refusal.

    Permissions alone do not tell: there are read-only disks, quotas, and disks that are gone.
    """
    try:
        os.stat(str(folder))
    except FileNotFoundError as error:
        return UNREACHABLE, reason_of(error)
    except OSError as error:
        return cause_of(error), reason_of(error)
    try:
        with tempfile.TemporaryFile(dir=str(folder)) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
        for path in files:
            with contextlib.suppress(FileNotFoundError), open(str(path), "r+b"):
                pass
    except OSError as error:
        return cause_of(error), reason_of(error)
    return None


def sentence(cause: str, reason: str, path: Path, flag: str) -> str:
    """What is wrong with the disk of `path` and what helps; `flag` chooses another folder."""
    if cause == FULL:
        return f"The disk of {path} is full: free some space on it, or choose a folder on another disk with {flag}."
    if cause == READ_ONLY:
        return (f"The disk of {path} is read-only, as a system makes it by itself after an error: mount it so that it "
                f"can be written to, or choose a folder on another disk with {flag}.")
    if cause == PERMISSION:
        return (f"This user may not write to {path} ({reason}): make the folder and what is in it yours, or choose "
                f"another one with {flag}.")
    if cause == UNREACHABLE:
        return (f"The disk of {path} does not answer ({reason}): see that it is connected and mounted, or choose "
                f"another folder with {flag}.")
    return f"{path} cannot be written to ({reason}): choose another folder with {flag}."


class Reserve:
    """A file of `size` bytes that is given back piece by piece, so that freeing space needs none.

    Its content says nothing, and is random because some disks store zeros in no space at all. No method raises.
    """

    def __init__(self, path: Path, size: int = RESERVE_BYTES) -> None:
        self.path, self.size = path, size
        self.refill()

    @property
    def held(self) -> int:
        """Bytes that can be given back."""
        try:
            return os.stat(str(self.path)).st_size
        except OSError:
            return 0

    def release(self) -> bool:
        """Give one piece back to the disk; False when nothing is left."""
        held = self.held
        try:
            if held:
                os.truncate(str(self.path), max(0, held - PIECE))
        except OSError:
            return False
        return held > 0

    def refill(self) -> None:
        """Take as many pieces as there is room for, and leave as much for everybody else."""
        held = self.held
        if held >= self.size:
            return
        with contextlib.suppress(OSError), open(str(self.path), "ab", buffering=0) as file:
            while held < self.size and shutil.disk_usage(str(self.path.parent)).free >= 2 * PIECE:
                held += file.write(os.urandom(min(PIECE, self.size - held)))
