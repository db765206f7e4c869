"""Do the right jobs make room, whatever the clock says? In a real store."""

from __future__ import annotations

from typing import Any

import pytest

from core.jobs.retention import Finished, Retention, jobs_to_remove
from core.jobs.store import Store
from tests.support.storing import add, finish

KIB = bytes(1024)


@pytest.mark.parametrize(("keep", "left"), [
    (Retention(max_jobs=2), [3, 4, 5]),
    (Retention(max_jobs=1), [3, 5]),
    (Retention(max_bytes=3 * 1024), [3, 4, 5]),  # each is a kilobyte and a little
    (Retention(max_bytes=0), [3, 5]),  # the newest stays
    (Retention(max_age_s=6.0), [2, 3, 4, 5]),
    (Retention(max_age_s=0.5), [3]),  # too old is too old
    (Retention(max_age_s=6.0, max_jobs=1), [3, 5]),
    (Retention(), [0, 1, 2, 3, 4, 5]),
])
def test_the_oldest_finished_go_first_and_waiting_ones_never(store: Store, keep: Retention, left: list[int]) -> None:
    records = [add(store) for _ in range(6)]
    for number, at in ((1, 1.0), (0, 2.0), (2, 5.0), (4, 6.0), (5, 9.0)):  # not in their order; 3 waits
        finish(store, records[number], at, KIB)
    gone = store.prune(keep, now=10.0)
    assert gone == [records[i].id for i in (0, 1, 2, 4, 5) if i not in left]
    assert [store.find(record.id) is not None for record in records] == [i in left for i in range(6)]
    assert all(store.was_deleted(job_id) for job_id in gone)
    assert len(list((store.folder / "jobs").iterdir())) == len([i for i in left if i != 3])
    assert store.prune(keep, now=10.0) == []


DAY = 86400.0
AHEAD, UNSET = 2**32.0, 0.0  # a clock in 2106, and one of a machine without a battery


@pytest.mark.parametrize(("keep", "ends", "left"), [
    # the clock was ahead when 0 and 1 ended, and is right again: new images stay, old ones go
    (Retention(max_jobs=2), [AHEAD, AHEAD + 1, 100.0, 101.0, 102.0], [3, 4]),
    (Retention(max_bytes=2500), [AHEAD, AHEAD + 1, 100.0, 101.0, 102.0], [3, 4]),
    # it was unset when the newest ended
    (Retention(max_jobs=2), [100.0, 101.0, 102.0, UNSET, UNSET + 1], [3, 4]),
    (Retention(max_age_s=10.0), [100.0, 101.0, 102.0, UNSET, UNSET + 1], [0, 1, 2, 3, 4]),
    # what ended in the future is as old as what came after it
    (Retention(max_age_s=10.0), [AHEAD, 50.0, 60.0, 101.0, 102.0], [3, 4]),
    (Retention(max_age_s=10.0), [50.0, AHEAD, 100.0, 101.0, 102.0], [1, 2, 3, 4]),
])
def test_a_clock_that_was_wrong_removes_no_newer_job(store: Store, keep: Retention, ends: list[float], left: list[int]
                                                     ) -> None:
    records = [add(store) for _ in ends]
    for record, at in zip(records, ends, strict=True):
        finish(store, record, at, KIB)
    store.prune(keep, now=103.0)
    assert [i for i, record in enumerate(records) if store.find(record.id)] == left


def test_jobs_that_are_known_to_have_ended_last_are_the_newest_whatever_their_numbers(store: Store) -> None:
    records = [add(store) for _ in range(3)]
    for record in records:
        finish(store, record, content=KIB)
    assert store.prune(Retention(max_jobs=1), 9.0, order=[records[0].number]) == [record.id for record in records[1:]]
    assert store.find(records[0].id) is not None


def test_a_job_known_to_be_young_stays_whatever_the_clock_says(store: Store) -> None:
    records = [add(store) for _ in range(3)]
    for record in records:
        finish(store, record, UNSET)
    gone = store.prune(Retention(max_age_s=DAY), 400 * DAY, young={records[1].number})
    assert gone == [records[0].id]  # the last one ended after it, so it is no older


@pytest.mark.parametrize("wrong", [{"max_jobs": 0}, {"max_bytes": -1}, {"max_age_s": 0.0}, {"max_age_s": float("nan")}])
def test_a_retention_that_cannot_be_kept_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Retention(**wrong)


def test_which_go_is_decided_without_a_store() -> None:
    jobs = [Finished(number, f"a-{number}", 10, float(number)) for number in (3, 1, 2)]
    assert [job.number for job in jobs_to_remove(jobs, Retention(max_jobs=2), 4.0)] == [1]
    assert [job.number for job in jobs_to_remove(jobs, Retention(max_bytes=10), 4.0)] == [1, 2]
    assert [job.number for job in jobs_to_remove(jobs, Retention(max_jobs=1), 4.0, order=[3, 1])] == [2, 3]
    assert jobs_to_remove([], Retention(), 4.0) == []
