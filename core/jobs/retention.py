"""Which finished jobs are removed to make room?

`Retention` says what may be kept, `jobs_to_remove` which jobs are too many. It knows neither SQL nor files
(`core/jobs/store.py`), and trusts the clock for ages alone: the number of a job is its place, because clocks jump.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


class Finished(NamedTuple):
    """A finished job without a favourite: what it occupies in bytes, and when it ended in seconds since 1970."""

    number: int
    id: str
    size: int
    finished_at: float


def jobs_to_remove(
    jobs: Iterable[Finished], keep: Retention, now: float, *, order: Sequence[int] = (), young: Collection[int] = ()
) -> list[Finished]:
    """The jobs to remove, oldest first, until `keep` holds.

    Oldest are those with the lowest numbers; the jobs in `order`, which gives the numbers of those that are known
    to have ended one after the other, are the newest. The newest finished job is removed for its age alone,
    however large it is: somebody is about to look at it. Only ages are told by the clock, and where it contradicts
    the order a job stays: one that comes after a younger one is no older than that. `young` are the numbers of
    jobs that are known not to be too old, whatever the clock says.
    """
    place = {number: i for i, number in enumerate(order)}
    jobs = sorted(jobs, key=lambda job: (place.get(job.number, -1), job.number))
    count, size = len(jobs), sum(job.size for job in jobs)
    expired = -1.0 if keep.max_age_s is None else now - keep.max_age_s
    ends = [now if job.number in young else job.finished_at for job in jobs]
    first_young = next((i for i, end in enumerate(ends) if expired <= end <= now), len(jobs))
    too_old = max((i + 1 for i, end in enumerate(ends[:first_young]) if end < expired), default=0)
    gone: list[Finished] = []
    for i, job in enumerate(jobs):
        if i >= too_old and not (count > 1 and (count > keep.max_jobs or size > keep.max_bytes)):
            break
        gone.append(job)
        count, size = count - 1, size - job.size
    return gone
