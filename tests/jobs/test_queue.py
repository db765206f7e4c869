"""Do jobs keep their promises: states, turns, one event list, cancelling, bounds, and all of it through a crash?

The batch is a stand-in that counts (`counting.py`); the store and its files are real. `run_next` is called here, in the
test's own thread, unless threads are the point.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.engine import JobError
from core.jobs import admission, calls, worker
from core.jobs import job as job_module
from core.jobs.admission import QueueClosed, QueueFull
from core.jobs.job import TRANSITIONS, Job, superfluous
from core.jobs.queue import DeletedJob, IdempotencyConflict, JobQueue, UnknownJob, make_id
from core.jobs.records import Event, StoredFile
from core.jobs.retention import Retention
from core.jobs.storage_errors import StoreError
from core.jobs.store import Store
from tests.support.counting import Counting, picture, quick_folder

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    store = Store(folder)
    yield store
    store.close()


@pytest.fixture
def queue(store: Store) -> JobQueue:
    return make_queue(store)


@pytest.fixture
def batch() -> Counting:
    return Counting()


def make_queue(store: Store, **settings: Any) -> JobQueue:
    """A queue whose seconds are counted, not measured."""
    ticks = itertools.count(1000)
    clock = settings.get("clock", lambda: float(next(ticks)))
    return JobQueue(store, **{"clock": clock, "elapsed": clock, **settings})


def submit(queue: JobQueue, name: str = "a", steps: int = 3, client: str = "", **request: Any) -> Job:
    return queue.submit(name, {"n": 1}, {"steps": steps, "seed": 7, **request}, client=client)


def finish_all(queue: JobQueue, batch: Counting) -> None:
    while queue.run_next(batch):
        pass


@contextlib.contextmanager
def restarted(queue: JobQueue, **settings: Any) -> Iterator[JobQueue]:
    """The next process's queue, when this one ends here and now without another word."""
    queue._store.close()
    store = Store(queue._store.folder)
    yield make_queue(store, **settings)
    store.close()


def kinds(job: Job) -> list[str]:
    return [event.kind for event in job.events]


def statuses(job: Job) -> list[str]:
    return [event.data["status"] for event in job.events if event.kind == "status"]


# ---- one job ---------------------------------------------------------------------------------------------------------


def test_a_job_runs_in_the_callers_thread_and_leaves_one_event_list(queue: JobQueue, batch: Counting) -> None:
    threads = []
    batch.before_step = lambda job: threads.append(threading.current_thread())
    job = queue.submit("a smiling woman", {"n": 1}, {"steps": 3, "seed": 7}, client="me", warnings=["no such word"])
    assert (job.state, job.queue_position, kinds(job)) == ("queued", 1, ["status"])
    assert [queue.run_next(batch) for _ in range(4)] == [True, True, True, False]
    assert set(threads) == {threading.current_thread()}
    assert job.state == "succeeded" and job.finished and job.error is None
    assert kinds(job) == ["status", "status", *["progress", "preview"] * 2, "progress", "image", "status", "done"]
    assert statuses(job) == ["queued", "running", "succeeded"]
    assert [event.id for event in job.events] == list(range(1, 11))
    assert [event.at for event in job.events] == sorted(event.at for event in job.events)
    assert job.events[-1].data == {"status": "succeeded", "error": None, "t": 3, "total_t": 3}
    assert job.file_names() == ("0-1.png", "0-2.png", "0.png") and job.snapshot().files == ("0.png",)
    assert job.file("0.png") == picture(7, 3) and job.file("0-3.png") is None
    assert job.created_at < (job.started_at or 0) < (job.finished_at or 0)


def test_a_finished_job_is_read_back_as_it_was_and_leaves_the_memory(queue: JobQueue, batch: Counting) -> None:
    job = submit(queue, "a", client="me", latents="AAAA")
    finish_all(queue, batch)
    again = queue.get(job.id)
    assert again is not job and vars(again.snapshot()) == vars(job.snapshot())
    assert (again.request, again.client) == (job.request, "me")
    assert again.file("0.png") == picture(7, 3)
    with pytest.raises(RuntimeError, match="is succeeded; nothing can happen"):
        again.progress(4, 4)
    gone = weakref.ref(job)
    del job
    gc.collect()
    assert gone() is None and not batch.states
    assert not queue._jobs.live and not queue._jobs.running and not queue._jobs.waiting


def test_three_hundred_jobs_leave_nothing_in_the_memory(
    queue: JobQueue, batch: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alive() -> list[object]:
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), (Job, Event))]

    monkeypatch.setattr(admission, "REMEMBERED_TURNS", 50)
    others = alive()  # what other tests hold; held here too, so that no new one gets the place of an old one
    before = {id(thing) for thing in others}
    for number in range(300):
        submit(queue, steps=2, client=str(number))
        finish_all(queue, batch)
    assert queue.counts() == {
        "waiting": 0, "running": 0, "succeeded": 300, "failed": 0, "cancelled": 0, "finished": 300}
    assert not [thing for thing in alive() if id(thing) not in before]
    assert not queue._jobs.live and queue._admission.num_clients == 50


def test_a_snapshot_does_not_change_afterwards(queue: JobQueue, batch: Counting) -> None:
    job = submit(queue)
    before = job.snapshot()
    finish_all(queue, batch)
    assert (before.state, len(before.events), before.files, before.finished) == ("queued", 1, (), False)
    assert job.snapshot().finished


def test_only_legal_transitions(queue: JobQueue, batch: Counting) -> None:
    assert {state for state, following in TRANSITIONS.items() if not following} == {"succeeded", "failed", "cancelled"}
    job = submit(queue)
    with pytest.raises(RuntimeError, match="cannot go from queued to succeeded"):
        queue._jobs._event_log.write([queue._jobs._ending(job, None)])
    finish_all(queue, batch)
    for error in (None, JobError("x", "y"), JobError("cancelled", "z")):
        with pytest.raises(RuntimeError, match="is succeeded; nothing can happen"):
            queue._jobs._event_log.write([queue._jobs._ending(job, error)])


def test_ids_are_readable_and_random() -> None:
    ids = {make_id("A smiling, Wömän!") for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"a-smiling-woman-[0-9a-f]{32}", one) for one in ids)
    assert re.fullmatch(r"job-[0-9a-f]{32}", make_id("../\x00 日本"))
    assert re.fullmatch(r"etc-passwd-[0-9a-f]{32}", make_id("../../etc/passwd"))
    assert len(make_id("x" * 500)) == 40 + 1 + 32


def test_a_request_that_json_cannot_hold_is_refused(queue: JobQueue) -> None:
    for wrong in ({"x": float("nan")}, {"x": b"bytes"}):
        with pytest.raises((TypeError, ValueError)):
            queue.submit("a", {}, wrong)
    assert queue.counts()["waiting"] == 0


# ---- turns and bounds ------------------------------------------------------------------------------------------------


def test_first_in_first_out_and_positions_follow(queue: JobQueue) -> None:
    batch = Counting(room=1)
    jobs = [submit(queue, name, steps=1) for name in "abc"]
    assert [job.queue_position for job in jobs] == [1, 2, 3]
    queue.cancel(jobs[0].id)
    assert [job.queue_position for job in jobs] == [None, 1, 2]
    assert [event.data["queue_position"] for event in jobs[2].events] == [3, 2]
    queue.run_next(batch)
    assert [job.state for job in jobs] == ["cancelled", "succeeded", "queued"]
    queue.run_next(batch)
    assert jobs[2].state == "succeeded" and queue.run_next(batch) is False


def test_clients_take_turns(queue: JobQueue) -> None:
    batch, started = Counting(room=1), []
    batch.before_step = lambda job: started.append(job.name)
    for number in range(1, 6):
        submit(queue, f"a{number}", 1, "a")
    queue.run_next(batch)
    for number in (1, 2):
        submit(queue, f"b{number}", 1, "b")
    submit(queue, "c1", 1, "c")
    promised = sorted((job.queue_position or 0, job.name) for job in map(queue.get, queue._jobs.live))
    finish_all(queue, batch)
    assert started == ["a1", "b1", "c1", "a2", "b2", "a3", "a4", "a5"]
    assert [name for _, name in promised] == started[1:]


def test_a_client_that_comes_back_at_once_waits_for_its_turn(queue: JobQueue) -> None:
    batch, started = Counting(room=1), []
    batch.before_step = lambda job: (started.append(job.name), job.name == "b" and submit(queue, "b", 1, "b"))
    for client in "aabaa":
        submit(queue, client, 1, client)
    for _ in range(8):
        queue.run_next(batch)
    assert "".join(started) == "ababababa"[: len(started)]


def test_a_place_is_found_for_a_small_job_only_in_its_turn(queue: JobQueue) -> None:
    batch = Counting(room=2)
    batch.has_room = lambda job: len(batch.states) < (1 if job.request.get("large") else 2)
    running, large = submit(queue, "running", 3), submit(queue, "large", 2, large=True)
    small = submit(queue, "small", 1)
    queue.run_next(batch)
    assert [running.state, large.state, small.state] == ["running", "queued", "queued"]
    finish_all(queue, batch)
    assert (running.finished_at or 0) < (large.started_at or 0) < (small.started_at or 0)


def test_an_empty_batch_takes_any_job(queue: JobQueue) -> None:
    batch = Counting(room=0)
    jobs = [submit(queue), submit(queue)]
    finish_all(queue, batch)
    assert {job.state for job in jobs} == {"succeeded"}


def test_jobs_of_any_length_advance_together_and_join_at_the_next_step(queue: JobQueue, batch: Counting) -> None:
    long = submit(queue, "long", steps=20)
    queue.run_next(batch)
    short = submit(queue, "short", steps=2)
    queue.run_next(batch)
    assert (long.done, short.done) == (2, 1)
    queue.run_next(batch)
    assert (short.state, long.state, long.done) == ("succeeded", "running", 3)
    finish_all(queue, batch)
    assert (long.file("0.png"), short.file("0.png")) == (picture(7, 20), picture(7, 2))


def test_the_queue_is_bounded_and_says_when_to_come_back(store: Store) -> None:
    queue, batch = make_queue(store, max_waiting=3, max_waiting_per_client=3), Counting(room=1)
    for name in "abc":
        submit(queue, name)
    with pytest.raises(QueueFull, match="3 jobs are waiting already") as refused:
        submit(queue, "d")
    assert refused.value.retry_after_s >= 1
    queue.run_next(batch)
    assert submit(queue, "d").queue_position == 3


def test_one_client_may_not_fill_the_queue(store: Store) -> None:
    queue = make_queue(store, max_waiting=5)
    submit(queue, client="a")
    submit(queue, client="a")
    with pytest.raises(QueueFull, match="2 jobs of yours are waiting already"):
        submit(queue, client="a")
    assert submit(queue, client="b").queue_position == 2


def test_the_same_idempotency_key_gives_the_first_job(store: Store, batch: Counting) -> None:
    queue = make_queue(store, max_waiting=1)
    ask = {"name": "a", "parameters": {}, "request": {"steps": 1, "seed": 1}, "client": "me", "idempotency_key": "k"}
    job = queue.submit(**ask)
    assert queue.submit(**ask) is job  # though the queue is full
    for other in ({"request": {"steps": 1, "seed": 2}}, {"fingerprint": "another"}):
        with pytest.raises(IdempotencyConflict):
            queue.submit(**{**ask, **other})
    finish_all(queue, batch)
    assert queue.submit(**ask).id == job.id
    with restarted(queue) as queue:
        assert queue.submit(**ask).id == job.id and queue.counts()["finished"] == 1
        stranger = queue.submit(**{**ask, "client": "you"})
        assert stranger.id != job.id
        queue.delete(job.id)
        assert queue.submit(**ask).id not in (job.id, stranger.id)


def test_a_fingerprint_stands_for_a_request_in_which_a_seed_was_drawn(queue: JobQueue) -> None:
    jobs = [queue.submit("a", {}, {"steps": 1, "seed": seed}, idempotency_key="k", fingerprint="no seed")
            for seed in (1, 2)]
    assert jobs[0] is jobs[1] and jobs[0].request["seed"] == 1


# ---- cancel, delete, fail --------------------------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(queue: JobQueue) -> None:
    batch, stepped = Counting(), []
    batch.before_step = stepped.append
    job, other = submit(queue), submit(queue)
    for _ in range(2):
        assert queue.cancel(job.id).state == "cancelled"
    finish_all(queue, batch)
    assert kinds(job) == ["status", "status", "done"] and job.error is not None and job.error["code"] == "cancelled"
    assert stepped == [other] * 3 and other.state == "succeeded" and other.file("0.png") == picture(7, 3)


def test_a_running_job_stops_within_one_step_and_its_neighbours_are_untouched(queue: JobQueue) -> None:
    batch = Counting(room=2)
    job, neighbour, waiting = submit(queue, steps=9), submit(queue, steps=5), submit(queue, steps=4)
    queue.run_next(batch)
    for _ in range(2):
        assert (queue.cancel(job.id).state, job.cancel_requested) == ("running", True)
    queue.run_next(batch)
    assert (job.state, job.done) == ("cancelled", 1) and job not in batch.states
    assert waiting.state == "running"  # its place was free at once
    finish_all(queue, batch)
    assert statuses(job) == ["queued", "running", "cancelled"]
    assert [neighbour.file("0.png"), waiting.file("0.png")] == [picture(7, 5), picture(7, 4)]
    assert job.file("0.png") is None


def test_a_job_cancelled_during_its_step_is_gone_when_the_step_ends(queue: JobQueue, batch: Counting) -> None:
    job, other = submit(queue, "stop", 9), submit(queue, "go", 9)
    batch.before_step = lambda running: running.name == "stop" and queue.cancel(running.id) and None
    queue.run_next(batch)
    assert (job.state, job.done, other.state) == ("cancelled", 1, "running")


def test_a_cancel_at_the_last_moment_is_kept(queue: JobQueue, batch: Counting) -> None:
    """The work was done, but a client had been told that its cancel was accepted."""
    batch.before_step = lambda job: queue.cancel(job.id) and None
    job = submit(queue, steps=1)
    queue.run_next(batch)
    assert job.state == "cancelled" and queue.get(job.id).state == "cancelled"


@pytest.mark.parametrize("times", [1, 2])
def test_cancelling_a_finished_job_changes_nothing(queue: JobQueue, batch: Counting, times: int) -> None:
    job = submit(queue)
    finish_all(queue, batch)
    for _ in range(times):
        assert queue.cancel(job.id).state == "succeeded"
    assert vars(queue.get(job.id).snapshot()) == vars(job.snapshot())


def test_a_deleted_job_is_gone_from_every_state(queue: JobQueue) -> None:
    batch, files = Counting(room=2), queue._store.folder / "jobs"
    finished = submit(queue, "finished", 1)
    finish_all(queue, batch)
    running, neighbour, waiting, behind = (submit(queue, name, 5) for name in ("running", "beside", "waiting", "last"))
    queue.run_next(batch)
    queue.delete(finished.id)
    queue.delete(waiting.id)
    queue.delete(running.id)
    queue.delete(running.id)
    assert (behind.queue_position, queue.get(running.id).cancel_requested) == (1, True)
    assert waiting.state == "cancelled" and kinds(waiting)[-1] == "done"  # those who watch it see its end
    queue.run_next(batch)
    assert running.state == "cancelled" and kinds(running)[-1] == "done"
    for job in (finished, waiting, running):
        for ask in (queue.get, queue.cancel, queue.delete):
            with pytest.raises(DeletedJob):
                ask(job.id)
        assert job.file("0.png") is None and not (files / job.id[-32:]).exists()
    with pytest.raises(UnknownJob):
        queue.delete("never-existed")
    finish_all(queue, batch)
    assert [job.file("0.png") for job in (neighbour, behind)] == [picture(7, 5)] * 2
    assert [summary.id for summary in queue.list()[0]] == [behind.id, neighbour.id]


def test_a_failure_is_recorded_with_code_message_and_hint(queue: JobQueue, batch: Counting) -> None:
    failing, fine, refused = submit(queue, fails_at=2), submit(queue), submit(queue, steps=1001)
    finish_all(queue, batch)
    assert queue.get(failing.id).error == {"code": "out_of_memory", "message": "No room.", "hint": "Ask for less."}
    assert (failing.state, failing.done, failing.events[-1].data["error"]["code"]) == ("failed", 2, "out_of_memory")
    assert refused.state == "failed" and refused.error is not None and refused.error["code"] == "too_long"
    assert fine.state == "succeeded" and fine.file("0.png") == picture(7, 3)


def test_a_step_that_raises_fails_its_jobs_and_the_next_ones_run(
    queue: JobQueue, batch: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(job: Job) -> None:
        if job.name == "bad":
            raise ZeroDivisionError("by zero")

    batch.before_step = crash
    early, bad, beside = submit(queue, "early", 1), submit(queue, "bad"), submit(queue, "beside")
    later = submit(queue, "later")
    finish_all(queue, batch)
    assert [job.state for job in (early, bad, beside, later)] == ["succeeded", "failed", "failed", "succeeded"]
    assert bad.error is not None and bad.error["code"] == "internal"
    assert bad.error["message"] == "ZeroDivisionError: by zero"
    assert "Traceback" in caplog.text and "Traceback" not in bad.error["message"]
    assert not batch.states


def test_what_cannot_join_fails_alone(queue: JobQueue, batch: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    admit = batch.admit
    monkeypatch.setattr(batch, "admit", lambda job: admit(job) if job.name == "good" else 1 / 0)
    good, bad = submit(queue, "good"), submit(queue, "bad")
    finish_all(queue, batch)
    assert (good.state, bad.state, bad.error and bad.error["code"]) == ("succeeded", "failed", "internal")


def test_an_interrupt_leaves_no_job_that_says_running(queue: JobQueue, batch: Counting) -> None:
    def interrupt(job: Job) -> None:
        if job.done == 1 and statuses(job) == ["queued", "running"]:
            queue.cancel(given_up.id)
            raise KeyboardInterrupt

    batch.before_step = interrupt
    job, given_up, waiting = submit(queue), submit(queue), submit(queue)
    queue.run_next(batch)
    with pytest.raises(KeyboardInterrupt):
        queue.run_next(batch)
    assert (job.state, job.queue_position, job.done, job.started_at) == ("queued", 1, 0, None)
    assert (given_up.state, waiting.state, waiting.queue_position) == ("cancelled", "queued", 2)
    assert queue.counts()["running"] == 0 and not batch.states
    assert {record.state for record in queue._store.unfinished()} == {"queued"}
    finish_all(queue, Counting())
    assert [one.file("0.png") for one in (job, waiting)] == [picture(7, 3)] * 2


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_previews_that_stay_are_a_film_of_the_whole_job(
    queue: JobQueue, batch: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "PREVIEW_BUDGET", 320 * 10)  # ten previews
    job = submit(queue, steps=101)
    finish_all(queue, batch)
    shown = [int(name[2:-4]) for name in job.file_names() if name != "0.png"]
    assert len(shown) == 10 and shown == sorted(shown) and (shown[0], shown[-1]) == (1, 100)
    gaps = [after - before for before, after in itertools.pairwise(shown)]
    assert max(gaps) <= 2 * sorted(gaps)[len(gaps) // 2]
    assert kinds(job).count("preview") == 100 and job.file("0.png") == picture(7, 101)
    assert len(list((queue._store.folder / "jobs" / job.id[-32:]).iterdir())) == 11
    assert queue.get(job.id).file_names() == tuple(sorted(job.file_names()))


def test_previews_of_one_moment_go_together_and_the_newest_file_stays() -> None:
    def files(*moments: int | None) -> list[StoredFile]:
        return [StoredFile(f"{image}-{moment}", 10, moment) for moment in moments for image in range(2)]

    assert superfluous(files(1, 2, 3, 4), 80) == []
    assert superfluous(files(1, 2, 3, 4), 79) == ["0-2", "1-2"]
    assert superfluous(files(1, 5, 6, 20), 60) == ["0-5", "1-5"]
    assert superfluous(files(1, 5, 9), 30) == ["0-5", "1-5", "0-1", "1-1"]
    assert superfluous(files(0, 0, 0), 30) == ["0-0", "1-0", "0-0"]
    assert superfluous(files(1), 0) == ["0-1"]
    assert superfluous(files(None, None), 0) == [] == superfluous([], 0)


def test_a_file_that_is_written_again_counts_once(
    queue: JobQueue, batch: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "PREVIEW_BUDGET", 1000)
    batch.before_step = lambda job: [job.keep({"latest.png": bytes(400)}) for _ in range(5)] and None
    job = submit(queue, steps=1)
    queue.run_next(batch)
    assert job.file_names() == ("latest.png", "0.png")


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_waiting_for_events_returns_what_is_there_and_times_out(queue: JobQueue, batch: Counting) -> None:
    job = submit(queue)
    assert [event.id for event in queue.wait_events(job, 0, timeout_s=0)] == [1]
    assert queue.wait_events(job, 1, timeout_s=0.01) == []
    finish_all(queue, batch)
    for reader in (job, queue.get(job.id)):
        assert [event.id for event in queue.wait_events(reader, 7, timeout_s=0)] == [8, 9, 10]
        assert queue.wait_events(reader, 10, timeout_s=60) == []  # at once: nothing more will come


def test_the_background_worker_serves_many_readers_the_same_events(queue: JobQueue, batch: Counting) -> None:
    """Readers start before the job runs; every one of them sees every event once and in order."""
    job = submit(queue, steps=9)
    seen: dict[int, list[int]] = {}

    def read(reader: int) -> None:
        got: list[Any] = []
        while not got or got[-1].kind != "done":
            got += queue.wait_events(job, got[-1].id if got else 0, timeout_s=10)
        seen[reader] = [event.id for event in got]

    readers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for reader in readers:
        reader.start()
    queue.start(lambda: batch)
    for reader in readers:
        reader.join(10)
    assert seen == {i: list(range(1, 23)) for i in range(4)}
    queue.close()
    assert queue.join(10)


def test_lists_are_newest_first_and_pages_do_not_shift(queue: JobQueue) -> None:
    batch = Counting(room=1)
    names = ["A smiling WOMAN", "a man", "Ärger", "woman with hat", "a man", "last"]
    jobs = [submit(queue, name, steps=2 if name == "last" else 1) for name in names]
    for _ in range(6):
        queue.run_next(batch)
    first, cursor = queue.list(limit=2)
    assert [(one.name, one.state, one.done, one.files) for one in first] == [
        ("last", "running", 1, ()), ("a man", "succeeded", 1, ("0.png",))]
    new = submit(queue, "new")
    queue.delete(jobs[2].id)
    second, cursor = queue.list(limit=2, cursor=cursor)
    assert [one.id for one in second] == [jobs[3].id, jobs[1].id]
    third, cursor = queue.list(limit=2, cursor=cursor)
    assert [one.id for one in third] == [jobs[0].id] and cursor is None
    assert [(one.id, one.queue_position) for one in queue.list(status="queued")[0]] == [(new.id, 1)]
    assert len(queue.list(status=["queued", "running"])[0]) == 2
    assert [one.name for one in queue.list(query="woman")[0]] == ["woman with hat", "A smiling WOMAN"]
    exact, cursor = queue.list(limit=6)
    assert len(exact) == 6 and cursor is None and queue.list(limit=5)[1] is not None


@pytest.mark.parametrize("cursor", [
    "", "0", "x" * 11, "x" * 13, "_" * 12, "=" * 12, "../../etc/pa", "AAAAAAAAAAA\n", "AAAAAAAAAAAA\n", "é" * 12,
])
def test_a_cursor_that_was_not_given_is_refused(queue: JobQueue, cursor: str) -> None:
    with pytest.raises(ValueError, match="the page before"):
        queue.list(cursor=cursor)


# ---- calls, the background thread, the end ---------------------------------------------------------------------------


def test_calls_run_in_the_workers_thread_between_two_steps(queue: JobQueue, batch: Counting) -> None:
    did: list[str] = []
    batch.before_step = lambda job: did.append("step")
    submit(queue, steps=2)
    queue.run_next(batch)
    answer, failure = queue.call(lambda: did.append("call") or len(did)), queue.call(lambda: 1 / 0)
    assert queue.call(lambda: did.append("nobody wants it any more")).cancel()
    assert queue.run_next(batch)
    assert did == ["step", "call", "step"] and answer.result(0) == 2
    assert isinstance(failure.exception(0), ZeroDivisionError)


def test_calls_are_bounded_and_let_steps_through(queue: JobQueue, batch: Counting) -> None:
    job = submit(queue, steps=2)

    def come_again() -> None:
        queue.call(come_again)

    for _ in range(calls.MAX_CALLS):
        queue.call(come_again)
    with pytest.raises(QueueFull, match="16 other requests"):
        queue.call(come_again)
    queue.run_next(batch)
    assert job.done == 1


def test_calls_of_a_queue_that_nobody_works_on_end(queue: JobQueue, batch: Counting) -> None:
    waiting = queue.call(lambda: 1)
    queue.start(lambda: None)
    assert queue.join(10)
    assert isinstance(waiting.exception(10), QueueClosed)
    with pytest.raises(QueueClosed):
        queue.call(lambda: 1)
    with pytest.raises(RuntimeError, match="started already"):
        queue.start(lambda: batch)
    assert submit(queue).state == "queued"  # it is safe, and runs when a server can


def test_closing_leaves_unfinished_jobs_in_the_queue_of_the_next_process(queue: JobQueue, batch: Counting) -> None:
    stepping, go_on = threading.Event(), threading.Event()

    def pause(job: Job) -> None:
        if job.done == 2:
            stepping.set()
            assert go_on.wait(10)

    batch.before_step = pause
    jobs = [submit(queue, name, 5) for name in "abcd"]  # the fourth has no room
    queue.start(lambda: batch)
    assert stepping.wait(10)
    queue.close()
    queue.close()
    assert queue.wait_events(jobs[3], 99, timeout_s=60) == []  # streams end
    assert queue.closed
    for refuse in (lambda: submit(queue), lambda: queue.call(lambda: 1)):
        with pytest.raises(QueueClosed):
            refuse()
    go_on.set()
    assert queue.join(10)
    assert [job.state for job in jobs] == ["queued"] * 4 and not batch.states
    assert statuses(jobs[0]) == ["queued", "running", "queued"]
    with restarted(queue) as queue:
        again = [queue.get(job.id) for job in jobs]
        finish_all(queue, Counting())
        assert [job.file("0.png") for job in again] == [picture(7, 5)] * 4


def test_closing_can_wait_for_what_runs_but_starts_nothing(queue: JobQueue) -> None:
    batch = Counting(room=1)
    running, waiting = submit(queue, steps=5), submit(queue)
    queue.run_next(batch)
    queue.close(drain_s=3600.0)
    finish_all(queue, batch)
    assert (running.state, waiting.state) == ("succeeded", "queued")
    assert running.file("0.png") == picture(7, 5)


# ---- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [
    (Retention(max_jobs=2), 2), (Retention(max_bytes=18_000), 3), (Retention(max_age_s=1.0), 0),
])
def test_finished_jobs_make_room_oldest_first(store: Store, keep: Retention, left: int) -> None:
    now = [1000.0]
    queue, batch = make_queue(store, keep=keep, clock=lambda: now[0]), Counting(room=1)
    jobs = [submit(queue, name) for name in "abcde"]
    waiting = submit(queue, "waiting", steps=500)
    for _ in range(16):
        queue.run_next(batch)
        now[0] += 0.1
    assert waiting.state == "running"
    now[0] += 60.0
    queue.run_next(batch)  # an old job expires though nothing ends
    for gone in jobs[: len(jobs) - left]:
        with pytest.raises(DeletedJob):
            queue.get(gone.id)
    assert [queue.get(job.id).file("0.png") for job in jobs[len(jobs) - left :]] == [picture(7, 3)] * left
    assert queue.counts()["finished"] == left and queue.get(waiting.id) is waiting


@pytest.mark.parametrize("jump", [-40 * 365 * 86400.0, 40 * 365 * 86400.0])
@pytest.mark.parametrize("keep", [Retention(max_jobs=2), Retention(max_bytes=12_000), Retention(max_age_s=3600.0)])
def test_a_clock_that_jumps_removes_no_new_picture_and_no_wait_grows(
    store: Store, keep: Retention, jump: float
) -> None:
    wall, elapsed = [1.8e9], [500.0]
    queue = make_queue(store, keep=keep, clock=lambda: wall[0], elapsed=lambda: elapsed[0], max_waiting=1)
    old = submit(queue, "old", 1)
    finish_all(queue, Counting())
    elapsed[0] += 10.0
    for now in (wall[0] + jump, wall[0], wall[0] + 1.0):  # and it is set right again
        job, batch = submit(queue, "new", 2), Counting()
        queue.run_next(batch)
        wall[0], elapsed[0] = now, elapsed[0] + 2.0
        finish_all(queue, batch)
        assert queue.get(job.id).file("0.png") == picture(7, 2)
        submit(queue, "waiting", 1)
        with pytest.raises(QueueFull) as full:
            submit(queue, "one too many")
        assert full.value.retry_after_s <= 2
        finish_all(queue, Counting())
        assert queue.get(job.id).file("0.png") == picture(7, 2)
    if keep.max_age_s is None:
        with pytest.raises(DeletedJob):
            queue.get(old.id)
    else:  # it is measured how old it is
        assert queue.get(old.id).state == "succeeded"
        elapsed[0] += 3601.0
        wall[0] += 3601.0
        queue.run_next(Counting())
        assert queue.counts()["finished"] == 0


def test_old_jobs_expire_though_the_clock_went_back(store: Store) -> None:
    """The next look is due by what has passed, or it would come in forty years."""
    wall, elapsed = [1.8e9], [0.0]
    queue = make_queue(store, keep=Retention(max_age_s=100.0), clock=lambda: wall[0], elapsed=lambda: elapsed[0])
    submit(queue, "a", 1)
    finish_all(queue, Counting())
    wall[0] -= 1e9
    queue.run_next(Counting())
    assert queue.counts()["finished"] == 1
    wall[0], elapsed[0] = 1.8e9 + 200.0, 200.0
    queue.run_next(Counting())
    assert queue.counts()["finished"] == 0


def test_a_smaller_retention_takes_hold_at_the_next_start(queue: JobQueue, batch: Counting) -> None:
    for _ in range(5):
        submit(queue)
    finish_all(queue, batch)
    with restarted(queue, keep=Retention(max_jobs=2)) as queue:
        assert queue.counts()["finished"] == 2


# ---- from one process to the next ------------------------------------------------------------------------------------


def test_unfinished_jobs_run_again_and_finished_ones_are_there(queue: JobQueue) -> None:
    finished = submit(queue, "finished", 1)
    finish_all(queue, Counting())
    running, waiting = submit(queue, "running", 5, "new"), submit(queue, "waiting", 2, "other")
    batch = Counting(room=1)
    for _ in range(3):
        queue.run_next(batch)
    seen = {job.id: list(job.events) for job in (finished, running, waiting)}
    assert running.done == 3 and len(running.file_names()) == 3
    with restarted(queue) as queue:
        again, second = queue.get(running.id), queue.get(waiting.id)
        assert queue.get(finished.id).file("0.png") == picture(7, 1)
        for job_id, events in seen.items():
            assert list(queue.get(job_id).events)[: len(events)] == events
        for position, job in enumerate((again, second), start=1):
            assert (job.state, job.queue_position, job.done, job.started_at) == ("queued", position, 0, None)
            assert job.events[-1].id == len(seen[job.id]) + 1
            assert job.events[-1].data == {
                "status": "queued", "queue_position": position, "error": None, "restarted": True}
        assert again.file_names() == ()  # previews of what will be done again
        assert [event.id for event in queue.wait_events(again, len(seen[again.id]), 0)] == [len(seen[again.id]) + 1]
        finish_all(queue, Counting())
        assert (again.file("0.png"), second.file("0.png")) == (picture(7, 5), picture(7, 2))
        ids = [event.id for event in again.events]
        assert ids == sorted(set(ids)) and again.events[-1].kind == "done"
        this_run = again.snapshot().events_of_this_run
        assert this_run == tuple(again.events[len(seen[again.id]) :])
        assert [event.data["t"] for event in this_run if event.kind == "progress"] == [1, 2, 3, 4, 5]
        last = seen[again.id][-1].id - 1  # a reader that had seen all but one event, of the process that is gone
        assert [event.id for event in queue.get(again.id).events_after(last)] == ids[last:]


def test_what_a_client_asked_of_a_running_job_survives(queue: JobQueue, batch: Counting) -> None:
    given_up, unwanted, other = (submit(queue, name, 5) for name in ("given up", "unwanted", "other"))
    queue.run_next(batch)
    queue.cancel(given_up.id)
    queue.delete(unwanted.id)
    with restarted(queue) as queue:
        found = queue.get(given_up.id)
        assert (found.state, kinds(found)[-1], found.done) == ("cancelled", "done", 0)
        with pytest.raises(DeletedJob):
            queue.get(unwanted.id)
        assert queue.counts()["waiting"] == 1 and queue.get(other.id).state == "queued"


def test_the_old_places_are_kept_beyond_any_bound(queue: JobQueue) -> None:
    jobs = [submit(queue, str(n), client="me") for n in range(6)]
    with restarted(queue, max_waiting=2) as queue:
        assert [queue.get(job.id).queue_position for job in jobs] == [1, 2, 3, 4, 5, 6]
        with pytest.raises(QueueFull):
            submit(queue)


def test_a_disk_that_refuses_fails_the_job_and_not_the_worker(
    queue: JobQueue, batch: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Store.write_files

    def refuse(store: Store, job_id: str, files: dict[str, bytes], *, durable: bool) -> None:
        if job_id.startswith("unlucky"):
            raise StoreError("There is no space left on the disk.")
        write(store, job_id, files, durable=durable)

    monkeypatch.setattr(Store, "write_files", refuse)
    unlucky = submit(queue, "unlucky")
    queue.run_next(batch)
    lucky = submit(queue, "lucky")
    finish_all(queue, batch)
    assert unlucky.error is not None and (unlucky.state, unlucky.error["code"]) == ("failed", "storage")
    assert "no space" in unlucky.error["message"] and lucky.file("0.png") == picture(7, 3)


def test_a_job_whose_end_cannot_be_written_ends_all_the_same_and_runs_again_later(
    queue: JobQueue, batch: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Store.save

    def refuse(store: Store, changes: Any, *, durable: bool = False) -> None:
        if any("finished_at" in change.columns for change in changes):
            raise StoreError("There is no space left on the disk.")
        save(store, changes, durable=durable)

    monkeypatch.setattr(Store, "save", refuse)
    job = submit(queue, steps=1)
    finish_all(queue, batch)
    assert queue.get(job.id) is job and (job.state, job.error and job.error["code"]) == ("failed", "storage")
    assert queue.counts()["running"] == 0
    monkeypatch.undo()
    with restarted(queue) as queue:
        finish_all(queue, Counting())
        assert queue.get(job.id).state == "succeeded"


def test_nothing_is_shown_that_was_not_committed(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(queue)

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreError("no")

    monkeypatch.setattr(Store, "save", refuse)
    monkeypatch.setattr(Store, "add", refuse)
    before = vars(job.snapshot())
    for ask in (lambda: submit(queue), lambda: queue.cancel(job.id), lambda: queue.run_next(Counting())):
        with pytest.raises(StoreError):
            ask()
    with pytest.raises(JobError, match="no"):
        job.progress(1, 3)
    assert vars(job.snapshot()) == before and queue.counts()["waiting"] == 1


def test_the_worker_outlives_a_disk_that_refuses(
    queue: JobQueue, batch: Counting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save, refused = Store.save, threading.Event()

    def refuse_once(*arguments: Any, **words: Any) -> None:
        if not refused.is_set():
            refused.set()
            raise StoreError("no")
        save(*arguments, **words)

    job = submit(queue)
    monkeypatch.setattr(Store, "save", refuse_once)
    monkeypatch.setattr(worker, "WAIT_AFTER_FAULT_S", 0.01)
    queue.start(lambda: batch)
    events = queue.wait_events(job, 8, timeout_s=10)
    assert refused.is_set() and events and "the worker goes on" in caplog.text
    queue.close()
    assert queue.join(10)


def test_who_waits_long_rests_until_nothing_is_left(
    queue: JobQueue, batch: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only while nobody asks: jobs come first, and after the last bit the worker waits as it always did."""
    monkeypatch.setattr(worker, "IDLE_AFTER_S", 0.05)
    left: list[int] = []
    batch.before_step = lambda job: left.append(batch.idle_calls)
    rested, real = threading.Event(), batch.on_idle

    def rest() -> bool:
        more = real()
        if not more:
            rested.set()
        return more

    monkeypatch.setattr(batch, "on_idle", rest)
    jobs = [submit(queue, name, 5) for name in "ab"]
    queue.start(lambda: batch)
    assert rested.wait(10) and batch.idle_calls == 0
    assert [job.state for job in jobs] == ["succeeded"] * 2 and left == [2] * 10
    time.sleep(0.3)  # six times as long as it took to rest before
    assert batch.idle_calls == 0
    queue.close()
    assert queue.join(10)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def test_no_accepted_job_is_lost_however_often_the_server_is_killed(folder: Path) -> None:
    """A real process works on the folder until SIGKILL, again and again; then all it promised must be true."""
    rng, accepted, seen = random.Random(20240607), {}, []
    for _ in range(8):
        command = [sys.executable, str(TESTS / "support" / "counting.py"), str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None and server.stderr is not None
            lines = list(itertools.islice(server.stdout, rng.randrange(2, 120)))
            server.kill()
            lines += server.stdout.read().splitlines()  # it did not stop to wait for us
            assert server.stderr.read() == ""
        assert lines and lines[0].strip() == "open"
        for line in lines:
            match line.split():
                case ["accepted", job_id, seed, steps]:
                    accepted[job_id] = int(seed), int(steps)
                case ["seen", job_id, event_id, kind]:
                    seen.append((job_id, int(event_id), kind))
    store = Store(folder)
    queue = JobQueue(store)
    waiting = queue.counts()["waiting"]
    finish_all(queue, Counting())
    jobs = {job_id: queue.get(job_id) for job_id in accepted}
    restarts = sum("restarted" in event.data for job in jobs.values() for event in job.events)
    assert len(accepted) > 20 and waiting > 0 and restarts > 8 and len(seen) > 100, "this must have tested something"
    for job_id, (seed, steps) in accepted.items():
        job = jobs[job_id]
        assert (job.state, job.done, job.total) == ("succeeded", steps, steps)
        assert job.file("0.png") == picture(seed, steps)
        ids = [event.id for event in job.events]
        assert ids == list(range(1, len(ids) + 1)) and kinds(job).count("done") == 1
        on_disk = {path.name for path in (folder / "jobs" / job_id[-32:]).iterdir()}
        assert on_disk == set(job.file_names()) == {"0.png", *(f"0-{t}.png" for t in range(1, steps))}
    for job_id, event_id, kind in seen:
        assert jobs[job_id].events[event_id - 1].kind == kind
    assert len(list((folder / "jobs").iterdir())) == queue.counts()["finished"]
    store.close()


# ---- many threads ----------------------------------------------------------------------------------------------------


def test_sixteen_threads_ask_for_everything_while_the_worker_ticks(store: Store) -> None:
    queue, batch = JobQueue(store, max_waiting=40, max_waiting_per_client=4, keep=Retention(max_jobs=60)), Counting(4)
    troubles: list[BaseException] = []
    fates: dict[str, tuple[str, int, int]] = {}  # what was asked of each job, its seed and its steps

    def client(number: int) -> None:
        rng = random.Random(number)
        mine: list[str] = []
        try:
            for turn in range(12):
                seed, steps = 100 * number + turn, rng.randrange(1, 12)
                with contextlib.suppress(QueueFull):
                    ask = (str(number), {}, {"seed": seed, "steps": steps})
                    key = {"client": str(number), "idempotency_key": str(turn)}
                    job_id = queue.submit(*ask, **key).id
                    mine.append(job_id)
                    fates[job_id] = ("leave", seed, steps)
                    assert queue.submit(*ask, **key).id == job_id
                target = rng.choice(mine) if mine else None
                if target is not None and fates[target][0] == "leave":
                    what = rng.choice(("leave", "leave", "cancel", "delete", "read", "watch"))
                    with contextlib.suppress(DeletedJob):
                        if what in ("cancel", "delete"):
                            fates[target] = (what, *fates[target][1:])
                            (queue.cancel if what == "cancel" else queue.delete)(target)
                        elif what == "read":
                            snapshot = queue.get(target).snapshot()
                            ids = [event.id for event in snapshot.events]
                            assert ids == sorted(set(ids))
                            assert snapshot.finished == (snapshot.events[-1].kind == "done")
                            queue.get(target).file("0.png")
                        elif what == "watch":
                            job, last = queue.get(target), 0
                            while events := queue.wait_events(job, last, timeout_s=10):
                                last = events[-1].id
                            assert job.finished
                page, cursor = queue.list(limit=7, query=str(number))
                assert [one.number for one in page] == sorted((one.number for one in page), reverse=True)
                assert queue.call(lambda: threading.current_thread().name).result(10) == "engine"
                queue.counts()
        except BaseException as trouble:
            troubles.append(trouble)

    queue.start(lambda: batch)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    queue.close(drain_s=60.0)
    assert queue.join(60) and not troubles, troubles
    queue = JobQueue(store, keep=Retention(max_jobs=60))
    finish_all(queue, Counting())
    kept = 0
    for job_id, (fate, seed, steps) in fates.items():
        try:
            job = queue.get(job_id)
        except DeletedJob:
            continue
        kept += 1
        assert fate != "delete"
        assert job.state in (("succeeded", "cancelled") if fate == "cancel" else ("succeeded",))
        if job.state == "succeeded":
            assert job.file("0.png") == picture(seed, steps)
    assert kept == 60 == queue.counts()["finished"]

