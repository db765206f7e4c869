"""Do jobs keep their promises: states, order, one event list, cancelling, bounds? No thread unless it is the point."""

from __future__ import annotations

import itertools
import re
import threading

import pytest

from core.jobs import (
    TRANSITIONS,
    DeletedJob,
    Job,
    JobCancelled,
    JobError,
    JobQueue,
    QueueClosed,
    QueueFull,
    UnknownJob,
    make_id,
)


def work(job: Job) -> None:
    """Three steps; each looks at the cancel flag, as real work does. The payload may interfere at any step."""
    for step in range(1, 4):
        if job.payload is not None:
            job.payload(step)
        job.progress(step, 3)
        if job.cancel_requested:
            raise JobCancelled
    job.emit("image", {"index": 0}, {"0.png": b"picture"})


@pytest.fixture
def queue() -> JobQueue:
    ticks = itertools.count(1000)
    return JobQueue(work, max_waiting=3, keep_finished=2, clock=lambda: float(next(ticks)))


def kinds(job: Job) -> list[str]:
    return [event.kind for event in job.events]


def statuses(job: Job) -> list[str]:
    return [event.data["status"] for event in job.events if event.kind == "status"]


def test_a_job_runs_in_the_callers_thread_and_leaves_one_event_list(queue: JobQueue) -> None:
    threads = []
    job = queue.submit("a smiling woman", {"n": 1}, lambda step: threads.append(threading.current_thread()))
    assert (job.state, job.queue_position, kinds(job)) == ("queued", 1, ["status"])
    assert queue.run_next() is job
    assert set(threads) == {threading.current_thread()}
    assert job.state == "succeeded" and job.finished and job.error is None and job.payload is None
    assert kinds(job) == ["status", "status", "progress", "progress", "progress", "image", "status", "done"]
    assert statuses(job) == ["queued", "running", "succeeded"]
    assert [event.id for event in job.events] == list(range(1, 9))
    assert [event.at for event in job.events] == sorted(event.at for event in job.events)
    assert job.files == {"0.png": b"picture"}
    assert job.created_at < (job.started_at or 0) < (job.finished_at or 0)
    assert queue.run_next() is None


def test_first_in_first_out_and_positions_follow(queue: JobQueue) -> None:
    jobs = [queue.submit(name, {}) for name in "abc"]
    assert [job.queue_position for job in jobs] == [1, 2, 3]
    assert queue.counts() == {"waiting": 3, "running": 0, "finished": 0}
    queue.cancel(jobs[0].id)
    assert [job.queue_position for job in jobs] == [None, 1, 2]
    assert [event.data["queue_position"] for event in jobs[2].events] == [3, 2]
    assert queue.run_next() is jobs[1]
    assert queue.run_next() is jobs[2]


def test_the_queue_is_bounded_and_says_when_to_come_back(queue: JobQueue) -> None:
    for name in "abc":
        queue.submit(name, {})
    with pytest.raises(QueueFull, match="3 jobs are waiting") as refused:
        queue.submit("d", {})
    assert refused.value.retry_after_s >= 1
    queue.run_next()
    assert queue.submit("d", {}).queue_position == 3


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(queue: JobQueue) -> None:
    steps: list[int] = []
    job = queue.submit("a", {}, steps.append)
    other = queue.submit("b", {})
    assert queue.cancel(job.id).state == "cancelled"
    assert job.error is not None and job.error.code == "cancelled"
    assert queue.run_next() is other and other.state == "succeeded"
    assert steps == []


def test_a_running_job_stops_within_one_step_and_its_neighbour_is_untouched(queue: JobQueue) -> None:
    job = queue.submit("a", {}, lambda step: queue.cancel(job.id) if step == 2 else None)
    other = queue.submit("b", {})
    queue.run_next()
    assert (job.state, job.done) == ("cancelled", 2)
    assert queue.run_next() is other and other.state == "succeeded"


def test_a_cancel_at_the_last_moment_is_kept() -> None:
    """The work returned normally, but a client had been told that its cancel was accepted."""
    queue = JobQueue(lambda job: queue.cancel(job.id) and None)
    job = queue.submit("a", {})
    queue.run_next()
    assert job.state == "cancelled"


@pytest.mark.parametrize("times", [1, 2])
def test_cancelling_a_finished_job_changes_nothing(queue: JobQueue, times: int) -> None:
    job = queue.submit("a", {})
    queue.run_next()
    before = list(job.events)
    for _ in range(times):
        assert queue.cancel(job.id).state == "succeeded"
    assert job.events == before


def test_a_failure_is_recorded_with_code_message_and_hint(queue: JobQueue, caplog: pytest.LogCaptureFixture) -> None:
    def explain(step: int) -> None:
        raise JobError("out_of_memory", "No room.", "Ask for less.")

    def crash(step: int) -> None:
        raise ZeroDivisionError("by zero")

    known, unknown, fine = queue.submit("a", {}, explain), queue.submit("b", {}, crash), queue.submit("c", {})
    for _ in range(3):
        queue.run_next()
    assert known.snapshot().error == {"code": "out_of_memory", "message": "No room.", "hint": "Ask for less."}
    assert unknown.state == "failed" and unknown.error is not None
    assert (unknown.error.code, unknown.error.message) == ("internal", "ZeroDivisionError: by zero")
    assert unknown.events[-1].data["error"]["code"] == "internal"
    assert "Traceback" in caplog.text and "Traceback" not in unknown.error.message
    assert fine.state == "succeeded"


def test_an_interrupt_leaves_no_job_that_says_running(queue: JobQueue) -> None:
    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    job = queue.submit("a", {}, interrupt)
    with pytest.raises(KeyboardInterrupt):
        queue.run_next()
    assert job.state == "failed" and job.error is not None and job.error.code == "interrupted"
    assert queue.counts()["running"] == 0


def test_old_jobs_are_deleted_not_unknown(queue: JobQueue) -> None:
    jobs = []
    for name in "abcd":
        jobs.append(queue.submit(name, {}))
        queue.run_next()
    for gone in jobs[:2]:
        with pytest.raises(DeletedJob):
            queue.get(gone.id)
    assert [queue.get(job.id) for job in jobs[2:]] == jobs[2:]
    with pytest.raises(UnknownJob):
        queue.get("never-existed")
    with pytest.raises(DeletedJob):
        queue.cancel(jobs[0].id)


def test_finished_jobs_are_bounded_by_bytes_too() -> None:
    def draw(job: Job) -> None:
        job.emit("image", {}, {"0.png": bytes(400)})

    queue = JobQueue(draw, keep_finished=100, keep_bytes=1000)
    jobs = [queue.submit("a", {}) for _ in range(4)]
    while queue.run_next():
        pass
    assert queue.counts()["finished"] == 2
    with pytest.raises(DeletedJob):
        queue.get(jobs[1].id)
    assert queue.get(jobs[3].id).state == "succeeded"


def test_transient_files_are_dropped_oldest_first_and_lasting_ones_stay() -> None:
    def draw(job: Job) -> None:
        for t in range(10):
            job.keep(f"{t}.png", bytes(300))
            job.emit("preview", {"file": f"{t}.png"}, {"latest.png": bytes(300)})

    queue = JobQueue(draw, transient_budget=1000)
    job = queue.submit("a", {})
    queue.run_next()
    assert sorted(job.files) == ["7.png", "8.png", "9.png", "latest.png"]
    assert kinds(job).count("preview") == 10


def test_the_deleted_ids_are_bounded(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JobQueue, "MAX_REMEMBERED_IDS", 1)
    jobs = []
    for name in "abcd":
        jobs.append(queue.submit(name, {}))
        queue.run_next()
    with pytest.raises(UnknownJob):
        queue.get(jobs[0].id)
    with pytest.raises(DeletedJob):
        queue.get(jobs[1].id)


def test_only_legal_transitions(queue: JobQueue) -> None:
    assert {state for state, following in TRANSITIONS.items() if not following} == {"succeeded", "failed", "cancelled"}
    job = queue.submit("a", {})
    queue.run_next()
    for state in TRANSITIONS:
        with pytest.raises(RuntimeError, match="cannot go from succeeded"):
            job._move(state)
    with pytest.raises(RuntimeError, match="nothing can happen"):
        job.progress(4, 4)


def test_ids_are_readable_and_random() -> None:
    ids = {make_id("A smiling, Wömän!") for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"a-smiling-woman-[0-9a-f]{32}", one) for one in ids)
    assert re.fullmatch(r"job-[0-9a-f]{32}", make_id("../\x00 日本"))
    assert re.fullmatch(r"etc-passwd-[0-9a-f]{32}", make_id("../../etc/passwd"))
    assert len(make_id("x" * 500)) == 40 + 1 + 32


def test_a_snapshot_does_not_change_afterwards(queue: JobQueue) -> None:
    job = queue.submit("a", {})
    before = job.snapshot()
    queue.run_next()
    assert (before.state, len(before.events), before.files, before.finished) == ("queued", 1, {}, False)
    assert job.snapshot().finished


def test_waiting_for_events_returns_what_is_there_and_times_out(queue: JobQueue) -> None:
    job = queue.submit("a", {})
    assert [event.id for event in queue.wait_events(job, 0, timeout_s=0)] == [1]
    assert queue.wait_events(job, 1, timeout_s=0.01) == []
    queue.run_next()
    assert [event.id for event in queue.wait_events(job, 5, timeout_s=0)] == [6, 7, 8]


def test_the_background_worker_serves_many_readers_the_same_events() -> None:
    """Readers start before the job exists for the worker; every one of them sees every event once and in order."""
    gate = threading.Event()

    def gated(job: Job) -> None:
        assert gate.wait(10)
        work(job)

    queue = JobQueue(gated)
    job = queue.submit("a", {})
    seen: dict[int, list[int]] = {}

    def read(reader: int) -> None:
        got: list[int] = []
        while not got or job.events[got[-1] - 1].kind != "done":
            got += [event.id for event in queue.wait_events(job, got[-1] if got else 0, timeout_s=10)]
        seen[reader] = got

    readers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for reader in readers:
        reader.start()
    queue.start(lambda: True)
    gate.set()
    for reader in readers:
        reader.join(10)
    assert seen == {i: list(range(1, 9)) for i in range(4)}
    queue.close()
    assert queue.join(10)


def test_a_failing_setup_ends_the_worker() -> None:
    queue = JobQueue(work)
    queue.start(lambda: False)
    assert queue.join(10)
    with pytest.raises(RuntimeError, match="started already"):
        queue.start(lambda: True)


def test_closing_cancels_waiting_and_running_jobs_and_wakes_readers() -> None:
    running = threading.Event()

    def until_cancelled(job: Job) -> None:
        running.set()
        while not job.cancel_requested:
            queue.wait_events(job, len(job.events), timeout_s=10)
        raise JobCancelled

    queue = JobQueue(until_cancelled)
    first, second = queue.submit("a", {}), queue.submit("b", {})
    queue.start(lambda: True)
    assert running.wait(10)
    queue.close()
    queue.close()
    assert queue.join(10) and queue.closed
    assert (first.state, second.state) == ("cancelled", "cancelled")
    assert second.error is not None and second.error.code == "server_stopped"
    with pytest.raises(QueueClosed):
        queue.submit("c", {})
