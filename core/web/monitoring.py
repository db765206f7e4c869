"""What is the server doing, for programs that watch it?

`Telemetry` counts and times for Prometheus, in a registry of its own, so that two applications in one process do not
share numbers; `JsonFormatter` writes each log record as one line of JSON, with the id of the job it is about. Nobody
is told anything that a prompt says.

It does not know what a job or a step is: `api.py` brings what is to be counted.
https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.web.openapi import template

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
WORKER_GAUGES = (  # name, field of a worker's state, what it is
    ("faces_worker_jobs", "jobs", "Jobs under way on a worker"),
    ("faces_worker_images", "images", "Images under way on a worker"),
    ("faces_worker_steps_per_second", "steps_per_second", "Denoising steps a second, over the last ten seconds"),
)
STEP_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
USUAL = frozenset((*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"))  # of every log record

log = logging.getLogger("access")


@dataclass(frozen=True)
class Present:
    """What is so at one moment."""

    jobs: Mapping[str, int]
    waiting: int
    running_images: int
    ready: bool
    workers: Sequence[Mapping[str, Any]] | None = None  # None: the engine is in this process


class Telemetry:
    """The numbers of one application. Memory and CPU of the process are told on Linux alone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._step_seconds = Histogram(
            "faces_step_seconds", "Time of one denoising step of all jobs that took part", registry=self.registry,
            buckets=STEP_SECONDS)
        self._images = Counter("faces_images_drawn", "Finished pictures", registry=self.registry)
        self._ended = Counter(
            "faces_jobs_drawn", "Jobs that the engine brought to an end", ["status"], registry=self.registry)
        for status in ("succeeded", "failed"):
            self._ended.labels(status)  # a series that is not there cannot be watched
        self._streams = Gauge("faces_streams_open", "Open event streams", registry=self.registry)
        labels = ["method", "route", "status"]
        self._requests = Counter("faces_http_requests", "Requests answered", labels, registry=self.registry)
        self._request_seconds = Histogram(
            "faces_http_request_seconds", "Time until an answer began", labels[:2], registry=self.registry)
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    # ---- what happens

    def stepped(self, seconds: float) -> None:
        """One denoising step is done."""
        self._step_seconds.observe(seconds)

    def generated(self, num_images: int) -> None:
        """So many images are finished."""
        self._images.inc(num_images)

    def ended(self, succeeded: bool) -> None:
        """The engine brought a job to an end."""
        self._ended.labels("succeeded" if succeeded else "failed").inc()

    def stream_opened(self) -> None:
        self._streams.inc()

    def stream_closed(self) -> None:
        self._streams.dec()

    # ---- what is so now

    def watch(self, read: Callable[[], Present]) -> None:
        """Ask `read` whenever the metrics are fetched."""
        self.registry.register(_Present(read))

    def text(self) -> tuple[bytes, str]:
        """The metrics and their content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    # ---- every request

    def _series_of(self, method: str, route: str, status: int) -> tuple[Counter, Histogram]:
        """The series of an answer; looked up once, since `labels` costs more than counting."""
        key = (method, route, status)
        if key not in self._series:
            count = self._requests.labels(method, route, str(status))
            self._series[key] = count, self._request_seconds.labels(method, route)
        return self._series[key]

    def watch_requests(self, app: Flask) -> None:
        """Count and time every answer by its route, never by its path: ids would make a series each."""

        @app.before_request
        def begin() -> None:
            g.began = time.perf_counter()

        @app.after_request
        def end(response: Response) -> Response:
            seconds = time.perf_counter() - g.get("began", time.perf_counter())
            method = request.method if request.method in METHODS else "OTHER"
            route = template(request.url_rule) if request.url_rule else "none"
            count, timing = self._series_of(method, route, response.status_code)
            count.inc()
            timing.observe(seconds)
            fault = response.status_code >= 500 and response.status_code != 503  # 503 is an answer: not yet
            about = {"method": method, "route": route, "status": response.status_code, "ms": round(seconds * 1000, 1)}
            if "job_id" in (request.view_args or {}):
                about["job_id"] = (request.view_args or {})["job_id"]
            level = logging.ERROR if fault else logging.INFO
            log.log(level, "%s %s %d", method, route, response.status_code, extra=about)
            return response


class _Present(Collector):
    """Numbers that are read when they are asked for."""

    def __init__(self, read: Callable[[], Present]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        jobs = GaugeMetricFamily("faces_jobs", "Jobs that are kept, by state", labels=["state"])
        for state, count in now.jobs.items():
            jobs.add_metric([state], count)
        yield jobs
        yield GaugeMetricFamily("faces_queue_length", "Jobs that wait", value=now.waiting)
        yield GaugeMetricFamily("faces_running_images", "Images of all running jobs", value=now.running_images)
        yield GaugeMetricFamily("faces_ready", "1 when the model is loaded", value=float(now.ready))
        if now.workers is not None:
            taking = [worker for worker in now.workers if worker["takes_jobs"]]
            yield GaugeMetricFamily("faces_workers", "Workers that take jobs", value=len(taking))
            for name, field, what in WORKER_GAUGES:
                gauge = GaugeMetricFamily(name, what, labels=["worker", "device"])
                for worker in taking:
                    gauge.add_metric([worker["name"], worker["device"]], worker[field])
                yield gauge


class JsonFormatter(logging.Formatter):
    """One line of JSON a record: when, how bad, who, what, and whatever was given as `extra`, such as `job_id`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in record.__dict__.items() if name not in USUAL},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(kind: str) -> None:
    """Log to stderr as `text`, for a person at a terminal, or as `json`, then with a line for every request.

    For the command alone: it changes the process.
    """
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if kind == "json" else text)
    if kind == "text":
        handler.addFilter(lambda record: record.name != log.name or record.levelno >= logging.ERROR)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
