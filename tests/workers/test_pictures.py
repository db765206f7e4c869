"""Are the images of a worker those of the model alone, also when the worker is killed? With the bundled model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from model_loading import DEFAULT_MODEL, descriptions_of
from tests.support.redis_server import RedisServer, needs_redis
from tests.support.server import Server, differences, draw_alone, mixed_jobs
from tests.support.worker_process import WorkerProcess, until

if TYPE_CHECKING:
    from generator import FaceGenerator

FLAGS = ("--device", "cpu", "--threads", "1")


def test_a_description_says_what_the_loaded_model_says(bundled: FaceGenerator) -> None:
    """A server whose workers generate never loads the networks."""
    import argparse

    ((name, describe),) = descriptions_of(argparse.Namespace(models=[DEFAULT_MODEL]))
    described, loaded = vars(describe()), vars(bundled.info)
    assert name == "celeba128" and described.pop("device") == "workers" and described.pop("engine") == "Celery workers"
    text = "a smiling woman with glasses, " * 40
    for reads in ("encoded_length", "prompt_rewriting"):
        assert described.pop(reads)(text) == loaded[reads](text)
    assert described == {field: loaded[field] for field in described}


@needs_redis
def test_the_images_are_the_models_whoever_generates(bundled: FaceGenerator, tmp_path: Path) -> None:
    """`--engine-here` starts a worker, which is killed with its jobs; another one does them."""
    bodies = mixed_jobs(3, bundled.info.samplers, steps=(8, 12))
    with (RedisServer(tmp_path / "redis") as redis,
          Server(tmp_path / "data", *FLAGS, "--broker", redis.url, "--engine-here") as server):
        def workers() -> list[dict]:
            return server.request("GET", "/ready").json()["workers"]

        until(workers, 60)
        assert server.request("GET", "/options").json()["models"][0]["device"] == "workers"
        ids = [server.submit(body) for body in bodies]
        until(lambda: any(worker["jobs"] for worker in workers()))
        os.kill(int(workers()[0]["name"].split("-")[-2]), signal.SIGKILL)
        with WorkerProcess.real(tmp_path / "worker.log", redis.url, *FLAGS):
            for job_id, body in zip(ids, bodies, strict=True):
                server.wait(job_id)
                apart = differences(server.pictures(job_id), draw_alone(bundled, body))
                assert max(apart) <= 1, (body["sampler"], apart)
