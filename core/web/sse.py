"""How does a client watch a job without asking again and again?

By Server-Sent Events: every event of the job from a given one on, then the new ones as they happen, until the job ends.
Any number of readers see the same, and a reader who comes back with `Last-Event-ID` misses nothing. A stream that waits
holds one thread of the web server, so their number is bounded; one that only replays a finished job does not count.

It does not know what the events say. https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from flask import Response, request

from core.jobs.job import Job
from core.jobs.queue import JobQueue
from core.jobs.records import Event
from core.web.errors import Problem
from core.web.monitoring import Telemetry
from core.web.proxies import prefix
from core.web.serializers import event_text

RETRY = "retry: 2000\n\n"  # milliseconds until a browser comes back
HEARTBEAT = ": still here\n\n"
LOOK_EVERY_S = 1.0  # how soon it is noticed that a quiet stream has no reader any more
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter: nginx, do not collect it


class EventStreams:
    """The event streams of one application: at most `limit` at once, each with a sign of life every `heartbeat_s`."""

    def __init__(self, queue: JobQueue, telemetry: Telemetry, *, limit: int, heartbeat_s: float) -> None:
        self._queue, self._telemetry, self._heartbeat_s = queue, telemetry, heartbeat_s
        self._free = threading.BoundedSemaphore(limit)

    def answer(self, job: Job, last: int, *, with_previews: bool = True) -> Response:
        """The events of `job` after number `last`, and those to come. Raises a 429 problem when too many listen."""
        text = partial(event_text, job, with_previews=with_previews, prefix=prefix())
        if job.finished:
            if not job.events_after(last):
                return Response(status=204)  # tells an EventSource that it need not come back
            return self._response(self._replay(job, last, text))
        if request.method == "HEAD":  # the server would never close a body that it does not send
            return self._response(iter(()))
        if not self._free.acquire(blocking=False):
            raise Problem(429, "Too many event streams are open; poll the job instead.", {"Retry-After": "5"})
        self._telemetry.stream_opened()
        gone = request.environ.get("waitress.client_disconnected", lambda: False)
        response = self._response(self._follow(job, last, gone, text))
        response.call_on_close(self._release)
        return response

    def _response(self, content: Iterator[str]) -> Response:
        return Response(content, mimetype="text/event-stream", headers=STREAM_HEADERS)

    def _release(self) -> None:
        self._telemetry.stream_closed()
        self._free.release()

    def _replay(self, job: Job, last: int, text: Callable[[Event], str]) -> Iterator[str]:
        yield RETRY
        for event in job.events_after(last):
            yield text(event)

    def _follow(
        self, job: Job, last: int, gone: Callable[[], bool], text: Callable[[Event], str]
    ) -> Iterator[str]:
        yield RETRY
        told = time.monotonic()
        while not (self._queue.closed or gone()):
            events = self._queue.wait_events(job, last, min(self._heartbeat_s, LOOK_EVERY_S))
            for event in events:
                yield text(event)
                last = event.id
            if job.finished and not events:
                return
            if events or time.monotonic() - told >= self._heartbeat_s:
                told = time.monotonic()
                yield "" if events else HEARTBEAT
