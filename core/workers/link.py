"""What does a server know of its workers, and how does it hear from them?

Two threads: one reads the news, one says once a second that the server lives and looks which workers do. What is asked
of a `Link` in between never waits longer than Redis takes to answer; while Redis is away it says so at once. It does
not know jobs (`core/workers/remote_batch.py`).
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import redis
from kombu.exceptions import OperationalError

from core.workers import messages
from core.workers.broker import BLOCK_S, TASK, Broker
from core.workers.messages import USUAL_PACE, News, Pace, WorkerState

log = logging.getLogger(__name__)
RETRY_S = 0.2
AWAY = (redis.RedisError, OperationalError, OSError)  # what a client raises while Redis does not answer
READ_AT_ONCE = 200


class Link:
    """A server's connection with Redis. It begins when the models are known (`open`)."""

    def __init__(self, broker: Broker, pace: Pace = USUAL_PACE) -> None:
        self.broker, self.pace, self.session = broker, pace, secrets.token_hex(8)
        self.catalogue, self.workers = "", tuple[WorkerState, ...]()
        self.other_workers: tuple[WorkerState, ...] = ()  # workers with other models
        self.connected_since: float | None = None  # by time.monotonic; None while Redis is away
        self.pulses = 0  # times that the workers were looked at
        self.queue_length = 0  # of the tasks that no worker has taken
        self._models: dict[str, str] = {}
        self._app = broker.celery()
        self._redis = broker.connect()
        self._news: deque[News] = deque()
        self._changed = threading.Condition()
        self._void: deque[str] = deque()  # attempts whose end could not be said
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    # ---- its life

    def open(self, model_hashes: Mapping[str, str]) -> None:
        """Begin, as a server with these models."""
        self._models = dict(model_hashes)
        self.catalogue = messages.catalogue_of(list(model_hashes.values()))
        for name, target in (("broker pulse", self._pulse), ("broker news", self._read)):
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Say that this server is gone."""
        if self._closed.is_set():
            return
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * BLOCK_S)
        try:
            self._flush()
            self._redis.delete(messages.server_key(self.session), messages.events_key(self.session))
            self._redis.srem(messages.SERVERS, self.session)
        except AWAY as error:
            log.info("Redis was not told that the server stops: %s", error)
        self._app.close()

    @property
    def connected(self) -> bool:
        return self.connected_since is not None

    # ---- what is asked of it

    def send(self, attempt: str, job_id: str, request: Mapping[str, Any]) -> bool:
        """Leave a job for the next worker that has room; False while Redis is away."""
        if not self.connected:
            return False
        ticket = json.dumps({"session": self.session, "job": job_id, "request": request})
        try:
            self._redis.set(messages.ticket_key(attempt), ticket, ex=messages.TICKET_S)
            self._app.send_task(TASK, args=[attempt], queue=messages.queue_name(self.catalogue), retry=False)
        except AWAY as error:
            self._away(error)
            return False
        return True

    def void(self, attempt: str) -> None:
        """Take an attempt's ticket back, and tell the worker that has it."""
        self._void.append(attempt)
        if self.connected:
            try:
                self._flush()
            except AWAY as error:
                self._away(error)  # it is said with the next pulse that succeeds

    def forget(self, attempt: str) -> None:
        """An attempt is over: remove what Redis keeps of it."""
        try:
            self._redis.delete(messages.ticket_key(attempt), messages.claim_key(attempt))
        except AWAY as error:
            self._away(error)  # and expires

    def news(self, timeout_s: float) -> list[News]:
        """What happened since it was last asked, waiting for the first of it up to `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout_s)
            found = list(self._news)
            self._news.clear()
            return found

    def call(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """Ask any worker; None when none answered in time, or Redis is away."""
        call = secrets.token_hex(8)
        try:
            self._redis.rpush(messages.calls_key(self.catalogue), json.dumps({"id": call, **question}))
            self._redis.expire(messages.calls_key(self.catalogue), messages.ANSWER_S)
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                found: Any = self._redis.blpop([messages.answer_key(call)], timeout=BLOCK_S)
                if found is not None:
                    return json.loads(found[1])
        except AWAY as error:
            self._away(error)
        return None

    # ---- its threads

    def _pulse(self) -> None:
        client = self.broker.connect()
        while not self._closed.is_set():
            try:
                self._look(client)
            except AWAY as error:
                self._away(error)
            self._closed.wait(self.pace.pulse_s if self.connected else RETRY_S)

    def _look(self, client: redis.Redis) -> None:
        about = json.dumps({"models": self._models, "catalogue": self.catalogue})
        pipe = client.pipeline(transaction=False)
        pipe.set(messages.server_key(self.session), about, ex=messages.SERVER_S)
        pipe.sadd(messages.SERVERS, self.session)
        pipe.expire(messages.events_key(self.session), messages.NEWS_S)
        pipe.llen("faces:celery:" + messages.queue_name(self.catalogue))
        pipe.smembers(messages.WORKERS)
        *_, queue_length, names = pipe.execute()
        found = []
        for name in sorted(names):
            text: Any = client.get(messages.worker_key(name.decode()))
            if text is None:
                client.srem(messages.WORKERS, name)
                continue
            try:
                found.append(WorkerState.read(text))
            except (TypeError, ValueError):
                log.debug("worker %s is of another version", name)
        self.workers = tuple(one for one in found if one.catalogue == self.catalogue)
        self.other_workers = tuple(one for one in found if one.catalogue != self.catalogue)
        self.queue_length = queue_length
        self._flush()
        if self.connected_since is None:
            log.info("Redis answers at %s; workers: %d", self.broker.shown, len(self.workers))
            self.connected_since = time.monotonic()
        self.pulses += 1
        with self._changed:
            self._changed.notify_all()

    def _flush(self) -> None:
        while self._void:
            attempt = self._void[0]
            pipe = self._redis.pipeline()
            pipe.delete(messages.ticket_key(attempt))
            entry: Any = {b"a": attempt.encode()}
            pipe.xadd(messages.CANCELS, entry, maxlen=messages.MOST_CANCELS, approximate=True)
            pipe.expire(messages.CANCELS, messages.TICKET_S)
            pipe.execute()
            if self._void and self._void[0] == attempt:
                self._void.popleft()

    def _read(self) -> None:
        """Read the stream of this server, and shorten it by what was read: what matters is kept with the jobs."""
        client, key, last = self.broker.connect(), messages.events_key(self.session), b"0-0"
        while not self._closed.is_set():
            try:
                found: Any = client.xread({key: last}, count=READ_AT_ONCE, block=int(BLOCK_S * 1000))
                if not found:
                    continue
                entries: Sequence[tuple[bytes, Mapping[bytes, bytes]]] = found[0][1]
                last = entries[-1][0]
                with self._changed:
                    self._news.extend(News.read(fields) for _, fields in entries)
                    self._changed.notify_all()
                client.xdel(key, *(entry for entry, _ in entries))
            except AWAY:
                self._closed.wait(RETRY_S)

    def _away(self, error: BaseException) -> None:
        if self.connected_since is not None:
            log.error("Redis does not answer at %s, jobs wait until it does: %s", self.broker.shown, error)
        self.connected_since = None
