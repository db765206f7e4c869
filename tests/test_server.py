"""Does the whole keep its promises: the real server process, the bundled model, HTTP, and no mercy?

Every image is held against the one that `FaceGenerator.generate` generates alone: many clients at once, kill -9, a
polite stop and cancelled neighbours must not change it by more than one grey level. The same promises at full size,
with timings, are measured by `benchmark_server.py`.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from core.diffusion.schedulers import SAMPLERS
from core.engine import MAX_IMAGES
from core.imaging.png_metadata import read_request
from generator import FaceGenerator
from tests.support.server import Comparison, Server, ServerEvent, differences, draw_alone, mixed_jobs, pixels_of

FLAGS = ("--device", "cpu")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it running."""
    with Server(tmp_path_factory.mktemp("server") / "data", *FLAGS) as running:
        yield running
        assert "Traceback" not in running.output()


def first_step(server: Server, job_id: str) -> ServerEvent:
    """Wait until the job is being generated."""
    return next(event for event in server.events(job_id) if event.kind == "progress")


def steps_done(state: dict[str, Any]) -> int:
    return round(state["progress"] * state["parameters"]["n_inf_steps"])


def test_eight_clients_at_once_get_the_pictures_of_their_solo_runs(server: Server, bundled: FaceGenerator) -> None:
    """Different steps, samplers, seeds, guidance, prompts; and they do run together."""
    bodies = mixed_jobs(8, SAMPLERS, seed=8)
    ready = threading.Barrier(len(bodies))

    def client(number: int) -> tuple[dict[str, Any], list[bytes]]:
        ready.wait()
        job_id = server.submit(bodies[number], client=f"client-{number}")
        return server.wait(job_id), server.pictures(job_id)

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(client, range(len(bodies))))
    comparison = Comparison()
    for body, (state, pngs) in zip(bodies, answers, strict=True):
        assert {name: state["parameters"][name] for name in body} == body
        assert [entry["seed"] for entry in state["response"]] == [body["seed"] + i for i in range(body["n_images"])]
        assert comparison.add(body["sampler"], pngs, draw_alone(bundled, body)) <= 1, body
    print(f"equal in every pixel: {comparison.exact}")
    started = sorted(state["started_at"] for state, _ in answers)
    assert started[1] < min(state["finished_at"] for state, _ in answers), "they were drawn one after another"


def test_kill_minus_nine_loses_no_accepted_job(tmp_path: Path, bundled: FaceGenerator) -> None:
    """Three times, each in the middle of a step; whatever anybody has seen by then is still true afterwards."""
    rng = random.Random(9)
    bodies = mixed_jobs(6, SAMPLERS, seed=9, steps=(8, 20))
    heard: dict[str, list[ServerEvent]] = {}
    server = Server(tmp_path / "data", *FLAGS)
    try:
        ids: list[str] = []
        for life in range(3):
            server.start()
            for number in range(2 * life, 2 * life + 2):
                ids.append(server.submit(bodies[number], key=f"job-{number}"))
            watched = next(job_id for job_id in ids if not server.state(job_id)["finished"])
            seen = heard.setdefault(watched, [])
            seen += islice(server.events(watched, after=seen[-1].id if seen else 0), rng.randint(3, 9))
            server.kill()
        server.start()
        assert [server.submit(body, key=f"job-{number}") for number, body in enumerate(bodies)] == ids
        comparison = Comparison()
        for job_id, body in zip(ids, bodies, strict=True):
            server.wait(job_id)
            assert comparison.add(body["sampler"], server.pictures(job_id), draw_alone(bundled, body)) <= 1, body
        print(f"equal in every pixel: {comparison.exact}")
        for job_id, events in heard.items():
            replayed = list(server.events(job_id))
            assert [event for event in events if event not in replayed and event.kind != "preview"] == []
            numbers = [event.id for event in replayed]
            assert numbers == sorted(set(numbers))
        restarts = [sum("restarted" in event.data for event in server.events(job_id)) for job_id in ids]
        assert sum(restarts) >= 3, "a kill found nothing to do"
        assert server.request("GET", "/ready").json()["jobs"] == {"waiting": 0, "running": 0, "finished": len(bodies)}
    finally:
        server.stop()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM: a process can only be killed there")
def test_a_polite_stop_keeps_the_queue_and_a_restart_keeps_what_is_finished(
    tmp_path: Path, bundled: FaceGenerator
) -> None:
    first, *rest = mixed_jobs(4, SAMPLERS, seed=10, steps=(5, 8))
    rest[0]["n_inf_steps"] = 60  # so that it is still running when the stop comes
    with Server(tmp_path / "data", *FLAGS, "--drain-seconds", "0") as server:
        done = server.submit(first)
        state = server.wait(done)
        pngs, events = server.pictures(done), list(server.events(done))
        ids = [server.submit(body) for body in rest]
        first_step(server, ids[0])
        with ThreadPoolExecutor(1) as pool:
            listener = pool.submit(lambda: list(server.events(ids[0])))
            assert server.stop() == 0
            assert not any(event.kind == "done" for event in listener.result()), "the stream ends, the job does not"
        server.start()
        assert server.state(done) == state
        assert server.pictures(done) == pngs and list(server.events(done)) == events
        for job_id, body in zip(ids, rest, strict=True):
            server.wait(job_id)
            assert max(differences(server.pictures(job_id), draw_alone(bundled, body))) <= 1, body
        assert any("restarted" in event.data for event in server.events(ids[0]))
    assert "Traceback" not in server.output()


def test_cancel_stops_within_one_step_and_touches_nobody_else(server: Server, bundled: FaceGenerator) -> None:
    """Waiting, running, finished, each of them twice."""
    large = {"prompt": "a woman", "n_images": 8, "n_inf_steps": 1000, "guidance_scale": 1.0, "stream_freq": 1000}
    crowd = [server.submit({**large, "seed": i}) for i in range(MAX_IMAGES // 8)]  # leaves no room for anybody
    for job_id in crowd:
        first_step(server, job_id)
    body = mixed_jobs(1, SAMPLERS, seed=11, steps=(5, 5), most_images=1)[0]
    neighbour, waiting = server.submit(body), server.submit({**large, "seed": 99})
    assert server.state(waiting)["status"] == "queued" and server.state(waiting)["queue_position"] == 2
    for _ in range(2):
        assert server.cancel(waiting)["status"] == "cancelled"
    assert {event.kind for event in server.events(waiting)} == {"status", "done"}  # not one step
    assert server.state(neighbour)["queue_position"] == 1

    for job_id in crowd[:2]:
        asked = server.cancel(job_id)
        assert asked["cancel_requested"] and asked["status"] in ("running", "cancelled")
        at_most = steps_done(server.state(job_id)) + 1  # the step that was being made when the cancel came
        server.cancel(job_id)
        ended = server.wait(job_id)
        assert ended["status"] == "cancelled" and ended["error"]["code"] == "cancelled"
        assert ended["response"] == [] and steps_done(ended) <= at_most
        first_step(server, neighbour)  # it got the place, and is beside the next one that is cancelled

    assert server.wait(neighbour)["status"] == "succeeded"
    pngs = server.pictures(neighbour)
    assert max(differences(pngs, draw_alone(bundled, body))) <= 1
    for _ in range(2):
        assert server.cancel(neighbour)["status"] == "succeeded"
    assert server.pictures(neighbour) == pngs

    for job_id in crowd[2:]:  # untouched: they still advance
        last = server.state(job_id)["last_event_id"]
        assert next(server.events(job_id, after=last)).kind == "progress"
    for job_id in crowd[2:]:
        server.cancel(job_id)
    assert {server.wait(job_id)["status"] for job_id in crowd[2:]} == {"cancelled"}


def test_the_request_in_a_picture_draws_it_again(server: Server) -> None:
    """From the file that a user downloads; the second time it began from latents, which travel in the file too."""
    body = mixed_jobs(1, SAMPLERS, seed=12, steps=(8, 8))[0] | {"n_images": 2, "prompt": "ein Wörtchen,\nsmiling"}
    for _ in range(2):
        job_id = server.submit(body)
        server.wait(job_id)
        png = server.pictures(job_id)[1]
        restored = read_request(png)
        (model,) = server.request("GET", "/options").json()["models"]
        assert restored["exact"] and restored["model_hash"] == model["hash"]
        again = server.submit(restored["request"])
        server.wait(again)
        assert max(differences(server.pictures(again), [pixels_of(png)])) <= 1
        full = server.request("GET", f"/jobs/{job_id}/").json()["response"]
        body |= {"latent": [entry["latent"] for entry in full], "start_timestep": 0.5, "seed": 5}


def test_a_folder_in_use_is_refused_with_a_sentence(server: Server) -> None:
    second = Server(server.data_dir, *FLAGS)
    second.log = server.log.with_name("second.log")
    with pytest.raises(AssertionError, match="ended with status 1"):
        second.start()
    assert "Another server is using" in second.output() and "Traceback" not in second.output()
    assert server.request("GET", "/ready").status == 200
