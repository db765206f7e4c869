"""What may people decide about single images of a finished job?

That one is a favourite, or deleted; for an hour it can be brought back. It does not know how an image is made, nor
when a whole job is removed (`core/jobs/retention.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from core.jobs.job import Job
from core.jobs.store import Store

RESTORABLE_S = 3600.0  # after that the files of a deleted image are removed
MAX_PICTURES = 64  # of one job, more than any may have


class UnknownPicture(LookupError):
    """The job has no such image (any more)."""


class PictureDeleted(LookupError):
    """The image was deleted."""


class NotFinished(Exception):
    """It can be decided about images when the job is finished."""


class ImageDecisions:
    """What was decided, written into `store` at once. `find` is `JobQueue.get` and raises as it does; `clock` gives
    seconds since 1970."""

    def __init__(self, store: Store, find: Callable[[str], Job], clock: Callable[[], float]) -> None:
        self._store, self._find, self._clock = store, find, clock

    def mark_favourite(self, job_id: str, index: int, is_favourite: bool) -> None:
        """Make an image a favourite or none; idempotent. Raises UnknownJob, DeletedJob, NotFinished, UnknownPicture,
        PictureDeleted."""
        job = self._with_picture(job_id, index)
        if index in job.marks.deleted:
            raise PictureDeleted(index)
        self._store.mark_favourite(job.number, index, is_favourite)

    def delete(self, job_id: str, index: int) -> None:
        """Delete one image, which can be restored for `RESTORABLE_S` seconds. Raises: as `mark_favourite`."""
        job = self._with_picture(job_id, index)
        if index in job.marks.deleted:
            raise PictureDeleted(index)
        self._store.mark_deleted(job.number, index, self._clock())

    def restore(self, job_id: str, index: int) -> None:
        """Bring a deleted image back; one that is there stays. Raises as `mark_favourite`; PictureDeleted when it is
        too late."""
        job = self._with_picture(job_id, index)
        self._store.mark_deleted(job.number, index, None)

    def delete_all_but_favourites(self, job_id: str) -> bool:
        """Delete the images that are no favourites; False, and nothing is deleted, where none is a favourite."""
        job = self._find(job_id)
        kept = job.marks.favourites - job.marks.deleted
        if kept:
            for index in _pictures(job) - kept - job.marks.deleted:
                self._store.mark_deleted(job.number, index, self._clock())
        return bool(kept)

    def purge(self) -> None:
        """Remove the files of images that can be restored no longer."""
        self._store.purge(self._clock() - RESTORABLE_S)

    def _with_picture(self, job_id: str, index: int) -> Job:
        job = self._find(job_id)
        if not job.finished:
            raise NotFinished(job.state)
        if index not in _pictures(job):
            raise PictureDeleted(index) if index in job.marks.deleted else UnknownPicture(index)
        return job


def _pictures(job: Job) -> frozenset[int]:
    """The finished images whose files are there."""
    names = {f"{index}.png": index for index in range(MAX_PICTURES)}
    return frozenset(names[name] for name in job.file_names() if name in names)
