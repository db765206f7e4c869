"""Does a job that is done elsewhere end exactly once, whatever becomes of workers and Redis meanwhile?

Redis is Debian's, on a free port; workers are processes. What they generate is the drawing stand-in's, which costs
nothing, except in the last test, whose images are the bundled model's. `benchmarks/benchmark_workers.py` is the same
with hundreds of jobs.
"""

from __future__ import annotations

import base64
import io
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.jobs.job import Job
from tests.support.drawing import TROUBLE, DrawingEngine, DrawingInfo
from tests.support.elsewhere import Served, served
from tests.support.redis_server import RedisServer, needs_redis
from tests.support.worker_process import WorkerProcess, until

pytestmark = needs_redis
HASH = DrawingInfo().model_hash
PULSE_S = 0.4  # a silence means something sooner, so that tests need not wait for it
HURRY = ("--pulse-seconds", str(PULSE_S))


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def pair(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerProcess]]:
    """Two workers that tests may kill, if they start them again."""
    logs = tmp_path_factory.mktemp("workers")
    workers = [WorkerProcess.drawing(logs / f"{i}.log", redis.url, "--ms-per-image", "2", *HURRY) for i in range(2)]
    try:
        yield [worker.start() for worker in workers]
    finally:
        for worker in workers:
            worker.stop()


@pytest.fixture(scope="module")
def site(redis: RedisServer, pair: list[WorkerProcess], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(redis.url, tmp_path_factory.mktemp("server"), PULSE_S, max_waiting=500) as site:
        site.wait_for_workers(2)
        yield site


def array_of(latent: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(latent), "<f4")


def ends(job: Job) -> int:
    return sum(event.kind == "done" for event in job.events)


def images_since_start(job: Job) -> list[int]:
    """The images of the run that counts, by index, as clients are told of them."""
    return [event.data["index"] for event in job.snapshot().events_of_this_run if event.kind == "image"]


def assert_once(site: Served, job_ids: list[str]) -> None:
    """Each of these jobs has one end, a success, with each of its images once, and they are the right ones."""
    for job in (site.job(one) for one in job_ids):
        assert job.state == "succeeded" and ends(job) == 1, (job.id, job.state, job.error)
        assert images_since_start(job) == list(range(job.request["n_images"])), job.id
        assert site.pngs(job.id) == expected(job), job.id


def expected(job: Job) -> list[bytes]:
    """The files that the stand-in makes of a job in this process."""
    from core.jobs.batching import to_generation_request

    engine = DrawingEngine()
    run = engine.start(to_generation_request(job.request, engine.info))
    while not run.finished:
        engine.step([run])
    return [drawing.png for drawing in engine.pictures(run)]


# ---- what works as without workers -----------------------------------------------------------------------------------


def test_a_job_is_done_elsewhere_and_told_as_if_here(site: Served) -> None:
    (job,) = site.wait(site.submit(n_images=2, seed=5))
    assert_once(site, [job.id])
    kinds = [event.kind for event in job.events]
    assert kinds.count("progress") == 8 and kinds.count("preview") == 2, kinds  # of two images
    assert (job.done, job.total) == (8, 8)
    assert site.job(job.id).file("0-4.png"), "the previews are files of the server"


def test_an_error_of_the_engine_is_the_jobs(site: Served) -> None:
    (job,) = site.wait(site.submit(prompt=TROUBLE))
    assert job.state == "failed" and job.error == {
        "code": "not_finite", "message": "No image came out.", "hint": "Try another sampler."}


def test_one_job_takes_little_longer_than_on_the_spot(site: Served) -> None:
    """Four steps of 2 ms, and the way there and back: nobody on it waits for a loop that turns once a second. How long
    it takes on an idle machine, `benchmarks/benchmark_workers.py overhead` measures."""
    took = []
    for seed in range(5):
        began = time.perf_counter()
        job_id = site.submit(n_inf_steps=4, seed=seed)
        until(lambda job_id=job_id: site.job(job_id).finished, every_s=0.001)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.5, took


def test_workers_are_shown(site: Served) -> None:
    site.wait(*[site.submit() for _ in range(4)])
    ready = site.client.get("/ready").get_json()
    assert [worker["takes_jobs"] for worker in ready["workers"]] == [True, True] and "notice" not in ready
    assert {worker["device"] for worker in ready["workers"]} == {"paper"}
    name = ready["workers"][0]["name"]
    numbers = site.client.get("/metrics").text
    assert "faces_workers 2.0" in numbers
    assert f'faces_worker_jobs{{device="paper",worker="{name}"}}' in numbers
    until(lambda: sum(one["ended"] for one in site.client.get("/ready").get_json()["workers"]) >= 4)
    assert site.client.get("/speed").get_json()["step_costs"]


def test_images_are_read_and_made_by_a_worker(site: Served) -> None:
    """What is no job: an image to a latent and back."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(buffer, "PNG")
    encoded = site.client.post("/encode", data=buffer.getvalue(), content_type="image/png")
    assert encoded.status_code == 200, encoded.text
    latent = encoded.get_json()["latent"]
    decoded = site.client.post("/decode", json={"latent": latent})
    assert decoded.status_code == 200
    with Image.open(io.BytesIO(decoded.data)) as picture:
        assert abs(int(np.asarray(picture).mean()) - 200) <= 1
    body = {"image": base64.b64encode(buffer.getvalue()).decode(), "invert": True, "prompt": "a woman"}
    noise = site.client.post("/encode", json=body).get_json()["latent"]
    assert np.array_equal(array_of(noise), -array_of(latent)), "which is what the stand-in calls noise"


def test_nothing_stays_in_redis(site: Served, redis: RedisServer) -> None:
    """Tickets, claims and news of jobs that are over are gone; what is left expires."""
    site.wait(*[site.submit(seed=i) for i in range(6)])
    until(lambda: not redis.client().keys("faces:ticket:*") and not redis.client().keys("faces:claim:*"))
    assert redis.client().xlen(f"faces:events:{site.workers.link.session}") == 0
    lasting = [key for key in redis.client().keys("faces:*") if redis.client().ttl(key) == -1]
    names = {key.decode() for key in lasting}
    assert {name for name in names if not name.startswith("faces:celery:")} <= {"faces:workers", "faces:servers"}


# ---- cancel ----------------------------------------------------------------------------------------------------------


def test_cancel_reaches_a_worker_within_a_step(site: Served) -> None:
    """Of running jobs, of one in Celery's queue, and of one that waits with the server."""
    long = [site.submit(n_images=8, n_inf_steps=1000) for _ in range(6)]
    until(lambda: all(site.job(one).done > 2 for one in long[:4]))  # all that two workers take
    assert [site.job(one).state for one in long[4:]] == ["running", "queued"] and site.job(long[4]).done == 0
    for one in reversed(long):
        site.client.post(f"/jobs/{one}/cancel")
    jobs = site.wait(*long, timeout_s=5)
    assert {job.state for job in jobs} == {"cancelled"} and {ends(job) for job in jobs} == {1}
    until(lambda: all(worker["jobs"] == 0 for worker in site.client.get("/ready").get_json()["workers"]), 5)
    (after,) = site.wait(site.submit(), timeout_s=5)
    assert after.state == "succeeded", "there is room again"


# ---- what may go wrong -----------------------------------------------------------------------------------------------


def test_killed_workers_lose_nothing(site: Served, pair: list[WorkerProcess]) -> None:
    """`kill -9` of each worker while it draws; what it had waits again and is done by the other."""
    rng = random.Random(0)
    jobs = [site.submit(seed=i, n_images=2, n_inf_steps=80) for i in range(16)]
    for worker in pair:
        time.sleep(rng.uniform(0.2, 0.5))
        worker.kill()
        worker.start()
    site.wait(*jobs)
    assert_once(site, jobs)
    again = [job for job in map(site.job, jobs) if any(event.data.get("restarted") for event in job.events)]
    assert again, "a worker was killed while it drew"
    site.wait_for_workers(2)


def test_a_job_that_ends_its_workers_is_given_up(
    site: Served, pair: list[WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.workers.remote_batch.MOST_LOSSES", 2)
    job = site.submit(n_images=8, n_inf_steps=1000)
    for _ in range(2):
        until(lambda: site.job(job).done > 2)
        for worker in pair:  # one of them has it
            worker.kill()
            worker.start()
        until(lambda: site.job(job).finished or site.job(job).done == 0)
    (found,) = site.wait(job)
    assert found.state == "failed" and (found.error or {})["code"] == "worker_lost" and ends(found) == 1
    site.wait_for_workers(2)


def test_a_worker_that_is_asked_to_stop_hands_back(site: Served, pair: list[WorkerProcess]) -> None:
    """Two seconds for what it draws; the rest is done elsewhere, at once."""
    jobs = [site.submit(seed=i, n_images=4, n_inf_steps=100) for i in range(6)]
    until(lambda: all(worker["jobs"] for worker in site.client.get("/ready").get_json()["workers"]))
    pair[0].stop()
    site.wait(*jobs)
    assert_once(site, jobs)
    pair[0].start()
    site.wait_for_workers(2)


def test_a_worker_that_sleeps_is_overtaken_and_says_nothing_twice(site: Served, pair: list[WorkerProcess]) -> None:
    """A machine that stands still for longer than its lease: its jobs are done by the other one, and when it goes on
    with what it had, nobody listens."""
    jobs = [site.submit(seed=i, n_images=4, n_inf_steps=120) for i in range(6)]
    until(lambda: all(worker["jobs"] for worker in site.client.get("/ready").get_json()["workers"]))
    os.kill(pair[0].pid, signal.SIGSTOP)
    try:
        site.wait(*jobs)
    finally:
        os.kill(pair[0].pid, signal.SIGCONT)
    site.wait_for_workers(2)
    time.sleep(0.5)  # what it still says is on its way
    assert_once(site, jobs)


def test_redis_goes_away_and_returns(site: Served, redis: RedisServer) -> None:
    """Killed and started again on its data: jobs that run and jobs that wait are done, and the page is told why."""
    jobs = [site.submit(seed=i, n_images=4, n_inf_steps=60) for i in range(8)]
    until(lambda: any(site.job(one).done > 5 for one in jobs))
    redis.stop(kill=True)
    until(lambda: "Redis" in site.notice())
    late = site.submit(seed=99)
    assert "Redis" in site.client.get("/ready").get_json()["notice"]
    time.sleep(0.5)
    assert site.job(late).state == "queued"
    redis.start()
    site.wait(*jobs, late)
    assert_once(site, [*jobs, late])
    assert site.notice() == ""


def test_a_redis_that_forgot_everything_loses_nothing(site: Served, redis: RedisServer) -> None:
    """Without its data: the server knows what it sent, and sends it again."""
    jobs = [site.submit(seed=i, n_images=4, n_inf_steps=60) for i in range(8)]
    until(lambda: any(site.job(one).done > 5 for one in jobs))
    redis.client().flushall()
    site.wait(*jobs)
    assert_once(site, jobs)
    site.wait_for_workers(2)


# ---- at the door -----------------------------------------------------------------------------------------------------


def test_without_workers_jobs_wait_and_one_with_another_model_is_told(tmp_path: Path) -> None:
    """It takes nothing; one with the right model does."""
    with RedisServer(tmp_path / "redis") as redis, served(redis.url, tmp_path / "data", PULSE_S) as site:
        until(lambda: "No worker is there" in site.notice())
        job_id = site.submit()
        other = WorkerProcess.drawing(tmp_path / "other.log", redis.url, "--model-hash", "e" * 64, *HURRY)
        with other:
            until(lambda: "takes nothing" in other.output())
            assert f"drawing ({'e' * 12})" in other.output() and f"drawing ({HASH[:12]})" in other.output()
            until(lambda: "No worker has this server's model" in site.notice())
            (shown,) = site.client.get("/ready").get_json()["workers"]
            assert not shown["takes_jobs"] and site.job(job_id).state == "queued"
            with WorkerProcess.drawing(tmp_path / "right.log", redis.url, *HURRY):
                site.wait(job_id)
                assert_once(site, [job_id])


def test_a_job_may_not_take_for_ever(tmp_path: Path) -> None:
    with (RedisServer(tmp_path / "redis") as redis, served(redis.url, tmp_path / "data", PULSE_S) as site,
          WorkerProcess.drawing(tmp_path / "w.log", redis.url, "--ms-per-image", "20", "--job-seconds", "0.5", *HURRY)):
        (job,) = site.wait(site.submit(n_inf_steps=1000))
        assert job.state == "failed" and (job.error or {})["code"] == "time_limit"


def test_a_server_that_starts_again_does_what_it_had_sent(redis: RedisServer, pair: list[WorkerProcess],
                                                          tmp_path: Path) -> None:
    """Another server process on the same data: running jobs begin again, the old attempts are not listened to."""
    with served(redis.url, tmp_path / "data", PULSE_S) as site:
        site.wait_for_workers(2)
        jobs = [site.submit(seed=i, n_images=2, n_inf_steps=60) for i in range(4)]
        until(lambda: any(site.job(one).done > 3 for one in jobs))
    assert site.service.queue.join(10)
    with served(redis.url, tmp_path / "data", PULSE_S) as site:
        site.wait(*jobs)
        assert_once(site, jobs)


def test_nothing_is_generated_for_a_server_that_was_killed(redis: RedisServer, pair: list[WorkerProcess],
                                                           site: Served, tmp_path: Path) -> None:
    """What it says of itself is gone: workers let go of what it sent, and take nothing more of it."""
    def busy() -> int:
        return sum(worker["jobs"] for worker in site.client.get("/ready").get_json()["workers"])

    until(lambda: busy() == 0)
    with served(redis.url, tmp_path / "data", PULSE_S) as gone:
        gone.wait_for_workers(2)
        for seed in range(7):
            gone.submit(seed=seed, n_images=8, n_inf_steps=1000)
        until(lambda: busy() >= 4)
        gone.workers.link._closed.set()  # as when it is killed, it says nothing more
        until(lambda: not any(thread.is_alive() for thread in gone.workers.link._threads))
        redis.client().delete(f"faces:server:{gone.workers.link.session}")  # which expires after a minute
        until(lambda: busy() == 0, 20)
