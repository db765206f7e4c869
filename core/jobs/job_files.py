"""Where are the files of a job, and when are they safe?

In `jobs/<32 hex digits>/`, named after the random part of the job's id, so that no prompt ever reaches a file name. A
file is written aside and renamed, so nobody reads half of one; one that is `durable` survives a power cut. It does not
know which files belong to a job: the database says so (`core/jobs/store.py`), and what it does not name is swept.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from core.jobs.records import digits_of
from core.jobs.storage_errors import store_error

FILES = "jobs"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FOLDER_NAME = re.compile(r"[0-9a-f]{32}")


class JobFiles:
    """The files of all jobs below the data folder `data_dir`. Raises: StoreError where the disk refuses."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir, self._folder = data_dir, data_dir / FILES

    def write(self, job_id: str, files: Mapping[str, bytes], *, durable: bool) -> None:
        """Put files into the job's folder: aside first, then renamed, so that nobody reads half of one."""
        folder = self.folder(job_id)
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
            refused = f"A file of job {job_id} cannot be written in {folder}: {error.strerror}."
            raise store_error(refused, error, self._data_dir) from error

    def read(self, job_id: str, name: str) -> bytes | None:
        """The content of a file; None when it is gone."""
        try:
            return (self.folder(job_id) / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            refused = f"The file {name} of job {job_id} cannot be read: {error.strerror}."
            raise store_error(refused, error, self._data_dir) from error

    def remove(self, job_id: str, names: Iterable[str]) -> None:
        """Remove files that no row names any more. What cannot be removed now goes at the next start."""
        for name in names:
            try:
                (self.folder(job_id) / name).unlink(missing_ok=True)
            except OSError:
                return

    def remove_all(self, job_id: str) -> None:
        """Remove the job's folder. What is left goes at the next start."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def sweep(self, known: Mapping[str, Mapping[str, int]]) -> None:
        """Remove folders and files that are not `known` (digits -> name -> size), or of another size than that."""
        try:
            for folder in self._folder.iterdir():
                if not FOLDER_NAME.fullmatch(folder.name):
                    continue
                for file in folder.iterdir():
                    if known.get(folder.name, {}).get(file.name) != file.stat().st_size:
                        file.unlink()
                if folder.name not in known:
                    folder.rmdir()
        except OSError as error:
            refused = f"The folder {self._folder} cannot be used: {error}."
            raise store_error(refused, error, self._data_dir) from error

    def folder(self, job_id: str) -> Path:
        """The folder of one job."""
        return self._folder / digits_of(job_id)


def _sync_folder(folder: Path) -> None:
    """Have the disk know the names in `folder`."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
