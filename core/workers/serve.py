"""What does a worker do from its start to its end?

It loads its models, says once a second that it lives, and takes jobs from Celery's queue of its models while the
images that it has taken do not fill a step. Its queue is named after the weights, so a worker with other ones takes
nothing; it is told which ones are wanted. A signal makes it hand back what is not finished.

It does not know which models those are nor how they are loaded: `worker.py` brings them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis
from celery import Celery, bootsteps, signals

from core.engine import JobError
from core.jobs.models import Models
from core.jobs.service import ACCELERATOR_BATCH, CPU_BATCH
from core.workers import messages
from core.workers.arrays import from_json, to_json
from core.workers.broker import BLOCK_S, TASK, Broker
from core.workers.messages import USUAL_PACE, Pace, WorkerState, named
from core.workers.publisher import Publisher
from core.workers.runner import RemoteJob, Runner

log = logging.getLogger(__name__)
RETRY_S = 0.3
CALL_S = 60.0  # longest answer to a call
ACKNOWLEDGED_S = (0.01, 0.05)  # a task has told Celery's queue that it is over


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker works: `max_batch` images share one step (None: by device), a job may take `job_s` seconds, and
    jobs that run get `drain_s` seconds when the worker is asked to stop."""

    max_batch: int | None = None
    job_s: float = 3600.0
    drain_s: float = 10.0
    pace: Pace = USUAL_PACE


class Worker:
    """A process that generates for servers elsewhere."""

    def __init__(self, broker: Broker, models: Models, options: WorkerOptions) -> None:
        info = models.engine(models.first).info
        models.describe()
        self.broker, self.options, self.info = broker, options, info
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.model_hashes = {one.name: one.model_hash for one in models.infos}
        self.catalogue = messages.catalogue_of(list(self.model_hashes.values()))
        max_batch = options.max_batch or (CPU_BATCH if info.device == "cpu" else ACCELERATOR_BATCH)
        self.runner, self.publisher = Runner(models, max_batch), Publisher(broker)
        self._stopping = threading.Event()
        self._told = ""

    def run(self) -> None:
        """Work until SIGTERM or Ctrl-C; for the main thread alone."""
        self.runner.start()
        for name, target in (("pulse", self._pulse), ("cancels", self._hear_cancels), ("calls", self._answer_calls)):
            threading.Thread(target=target, name=name, daemon=True).start()
        app = self.broker.celery()
        self._add_task(app)  # a worker looks for its steps when it is made
        worker = app.Worker(
            pool="threads", concurrency=self.runner.max_batch + 1, queues=[messages.queue_name(self.catalogue)],
            hostname=self.name, without_mingle=True, without_gossip=True, without_heartbeat=True, quiet=True,
            task_events=False,
        )
        log.info("ready: %s on %s by %s, up to %d images a step, jobs from %s", self.info.name, self.info.device,
                 self.info.engine, self.runner.max_batch, self.broker.shown)

        def stop(**_: Any) -> None:
            threading.Thread(target=self.stop, name="stop", daemon=True).start()

        signals.worker_shutting_down.connect(stop)
        try:
            worker.start()
        finally:
            signals.worker_shutting_down.disconnect(stop)
            self.stop()

    def stop(self) -> None:
        """Hand back what is not finished in time, and say the rest."""
        if not self._stopping.is_set():
            self._stopping.set()
            self.runner.close(self.options.drain_s)
            self.publisher.close(5.0)

    # ---- jobs

    def _add_task(self, app: Celery) -> None:
        client = self.broker.connect()

        def generate(attempt: str) -> None:
            self.take(client, attempt)

        app.task(name=TASK, acks_late=True, ignore_result=True)(generate)
        app.steps["consumer"].add(room_step(self.runner))

    def take(self, client: redis.Redis, attempt: str) -> None:
        """Do an attempt, unless its server took its ticket back, or another worker has it. Raises RedisError."""
        text = client.get(messages.ticket_key(attempt))
        if text is None:
            return
        ticket = json.loads(text)  # type: ignore[arg-type]
        session = str(ticket["session"])
        if not client.exists(messages.server_key(session)):  # it was killed; started again, it is another
            return
        if not client.set(messages.claim_key(attempt), self.name, nx=True, ex=messages.TICKET_S):
            return
        job = RemoteJob(attempt, session, ticket["job"], ticket["request"],
                        lambda news: self.publisher.put(session, news))
        job.tell(messages.TAKEN, self.name)
        self.runner.do(job, self.options.job_s)

    # ---- what goes on beside

    def state(self) -> WorkerState:
        """What the servers are told."""
        runner, costs = self.runner, self.runner.batch.costs
        return WorkerState(
            self.name, self.catalogue, self.info.device, self.info.engine, runner.max_batch, self.model_hashes,
            sorted({*runner.attempts, *self.publisher.unsent_ends}), runner.batch.num_images,
            runner.counts.steps_per_second, runner.counts.num_ended, costs.steps, costs.seconds_per_picture,
            runner.batch.seconds_per_image_step,
        )

    def _pulse(self) -> None:
        """Say that this worker lives, and look whether anybody wants what it has."""
        client, pace = self.broker.connect(), self.options.pace
        while not self._stopping.is_set():
            try:
                pipe = client.pipeline(transaction=False)
                pipe.set(messages.worker_key(self.name), self.state().to_json(), px=round(1000 * pace.worker_s))
                pipe.sadd(messages.WORKERS, self.name)
                pipe.smembers(messages.SERVERS)
                sessions = [one.decode() for one in pipe.execute()[-1]]
                servers: Any = client.mget([messages.server_key(one) for one in sessions]) if sessions else []
            except redis.RedisError as error:
                self._say(f"Redis does not answer at {self.broker.shown}: {error}")
            else:
                found = {session: json.loads(text) for session, text in zip(sessions, servers, strict=True) if text}
                self.runner.cancel_all_but(found)
                self._look(list(found.values()))
            self._stopping.wait(pace.pulse_s)
        client.srem(messages.WORKERS, self.name)
        client.delete(messages.worker_key(self.name))

    def _look(self, servers: list[Mapping[str, Any]]) -> None:
        wanted = [server["models"] for server in servers]
        if not wanted or any(server["catalogue"] == self.catalogue for server in servers):
            self._told = ""
            return
        self._say(f"This worker takes nothing: it has {named(self.model_hashes)}, and the server wants "
                  f"{' or '.join(named(models) for models in wanted)}; start it with the server's --model.")

    def _say(self, message: str) -> None:
        if message != self._told:  # once
            log.error("%s", message)
        self._told = message

    def _hear_cancels(self) -> None:
        client, last = self.broker.connect(), ""
        while not self._stopping.is_set():
            try:
                if not last:  # from here on; nothing has been taken yet
                    newest: Any = client.xrevrange(messages.CANCELS, count=1)
                    last = newest[0][0].decode() if newest else "0-0"
                found: Any = client.xread({messages.CANCELS: last}, count=100, block=int(BLOCK_S * 1000))
                for _, entries in found or ():
                    for entry, fields in entries:
                        last = entry.decode()
                        self.runner.cancel(fields[b"a"].decode())
            except redis.RedisError:
                time.sleep(RETRY_S)

    # ---- calls

    def _answer_calls(self) -> None:
        client, key = self.broker.connect(), messages.calls_key(self.catalogue)
        while not self._stopping.is_set():
            try:
                found: Any = client.blpop([key], timeout=BLOCK_S)
                if found is not None:
                    call = json.loads(found[1])
                    pipe = client.pipeline()
                    pipe.rpush(messages.answer_key(call["id"]), json.dumps(self._answer(call)))
                    pipe.expire(messages.answer_key(call["id"]), messages.ANSWER_S)
                    pipe.execute()
            except redis.RedisError:
                time.sleep(RETRY_S)

    def _answer(self, call: Mapping[str, Any]) -> dict[str, Any]:
        try:
            name = self.runner.models.find(call["model"])
            if name is None:
                raise JobError("unknown_model", f"This worker has no model {call['model']!r}.")
            given = from_json(call["array"])
            if call["what"] != "inversion":
                encodes = call["what"] == "encode"
                made = self.runner.call(lambda engine: (engine.encode if encodes else engine.decode)(given), name)
                return {"array": to_json(made.result(CALL_S))}
            search = self.runner.call(lambda engine: engine.inversion(given, call["prompt"]), name).result(CALL_S)
            while not search.finished:
                self.runner.call(lambda _: search.advance(10), name).result(CALL_S)
            return {"array": to_json(search.latent)}
        except Exception as raised:
            if not isinstance(raised, (JobError, ValueError)):
                log.exception("a call failed")
            return {"error": JobError.of(raised).to_dict()}


def room_step(runner: Runner) -> type[bootsteps.StartStopStep]:
    """A step of Celery's consumer: as many tasks are fetched as there is room for, one after another.

    Celery looks at its prefetch count when its loop turns, and the loop sleeps until something comes from Redis; so a
    pipe wakes it. https://docs.celeryq.dev/en/stable/userguide/extending.html#consumer
    """

    class Room(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def __init__(self, parent: Any, **options: Any) -> None:
            self.pipe: tuple[int, int] | None = None

        def start(self, parent: Any) -> None:
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            os.set_blocking(writing, False)
            self.pipe = reading, writing

            def look(*_: Any) -> None:
                try:
                    os.read(reading, 4096)
                except BlockingIOError:
                    pass
                parent.qos.value = max(1, len(runner.attempts) + runner.has_room)
                for later_s in ACKNOWLEDGED_S:  # a task that is over counts until then
                    parent.hub.call_later(later_s, turn)

            def turn() -> None:
                return

            def wake() -> None:
                try:
                    os.write(writing, b".")
                except OSError:  # full: it is awake; closed: another one was started
                    pass

            parent.hub.add_reader(reading, look)
            runner.changed = wake
            wake()

        def stop(self, parent: Any) -> None:
            runner.changed = lambda: None
            if self.pipe is not None:
                parent.hub.remove_reader(self.pipe[0])
                for end in self.pipe:
                    os.close(end)
                self.pipe = None

    return Room


def is_at_work(broker: Broker) -> bool:
    """Whether a worker of this machine has told within seconds that it lives. Raises RedisError."""
    client = broker.connect()
    names: Any = client.smembers(messages.WORKERS)
    mine = [name.decode() for name in names if name.decode().rsplit("-", 2)[0] == socket.gethostname()]
    return any(client.exists(messages.worker_key(name)) for name in mine)
