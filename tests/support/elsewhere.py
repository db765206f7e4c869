"""A server in the test's own process whose jobs are done by workers in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask import Flask
from flask.testing import FlaskClient

from api import create_app
from core.jobs.job import Job
from core.jobs.service import EngineService
from core.workers.broker import Broker
from core.workers.messages import Pace
from core.workers.remote import Workers
from core.workers.remote_engine import remote_models
from tests.support.asking import CheckedClient
from tests.support.drawing import DrawingInfo
from tests.support.worker_process import until


@dataclass(frozen=True)
class Served:
    """The application, its workers, and a client that holds every answer against the OpenAPI document."""

    app: Flask
    workers: Workers
    client: FlaskClient

    @property
    def service(self) -> EngineService:
        return self.app.extensions["service"]

    def submit(self, **body: Any) -> str:
        asked = {"prompt": "a smiling woman", "n_images": 1, "n_inf_steps": 8, "stream_freq": 4, **body}
        answer = self.client.post("/text_to_image", json=asked)
        assert answer.status_code == 200, answer.text
        job_id: str = answer.get_json()["job_id"]
        return job_id

    def job(self, job_id: str) -> Job:
        return self.service.queue.get(job_id)

    def wait(self, *job_ids: str, timeout_s: float = 60.0) -> list[Job]:
        """The jobs when they are finished."""
        until(lambda: all(self.job(one).finished for one in job_ids), timeout_s)
        return [self.job(one) for one in job_ids]

    def pngs(self, job_id: str) -> list[bytes]:
        job = self.job(job_id)
        return [job.file(f"{i}.png") or b"" for i in range(job.request["n_images"])]

    def notice(self) -> str:
        return self.client.get("/health").get_json().get("notice", "")

    def wait_for_workers(self, count: int) -> None:
        until(lambda: len(self.workers.link.workers) == count and not self.notice(), 120)


@contextmanager
def served(url: str, data_dir: Path, pulse_s: float = 1.0, **options: Any) -> Iterator[Served]:
    """A server with the stand-in's description and the broker at `url`."""
    workers = Workers(Broker.parse(url), Pace(pulse_s))
    models = remote_models(workers.link, [("", DrawingInfo)])
    app = create_app(models, workers=workers, start=False, data_dir=data_dir, **options)
    app.test_client_class = CheckedClient
    service = app.extensions["service"]
    service.start()
    try:
        until(lambda: service.state == "READY")
        yield Served(app, workers, app.test_client())
    finally:
        service.close()
