"""What do a server and its workers say to each other, and where in Redis does it lie?

A job that is sent is an `attempt`: a ticket, which is what has to be done, and a task in Celery's queue, which names
it. Its server takes a ticket back (the job was cancelled, or is sent anew), and then the task is worth nothing: so no
job is done twice, however often the queue delivers it. What happens to an attempt comes back as `News` in a stream of
its server. A server lives as long as its process; everything in Redis expires.

It does not know how Redis is reached (`core/workers/broker.py`), nor what a job computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# seconds that a key lives without being touched
# a stream goes with its server, after a while
TICKET_S, NEWS_S, SERVER_S, ANSWER_S = 86_400, 600, 60, 60
MOST_NEWS, MOST_CANCELS = 2_000, 2_000  # of a stream; more are the oldest ones' end
WORKERS, SERVERS, CANCELS = "faces:workers", "faces:servers", "faces:cancels"
TAKEN, PROGRESS, KEEP, EMIT, END, RETURNED = "taken", "progress", "keep", "emit", "end", "returned"
FILE = b"f:"  # before the name of a file among the fields of an entry


def server_key(session: str) -> str:
    """What a server says of itself."""
    return f"faces:server:{session}"


def worker_key(name: str) -> str:
    """What a worker says of itself."""
    return f"faces:worker:{name}"


def events_key(session: str) -> str:
    """The stream of a server's news."""
    return f"faces:events:{session}"


def ticket_key(attempt: str) -> str:
    """What an attempt has to do."""
    return f"faces:ticket:{attempt}"


def claim_key(attempt: str) -> str:
    """Which worker took an attempt."""
    return f"faces:claim:{attempt}"


def calls_key(catalogue: str) -> str:
    """What workers are asked beside jobs: images to be encoded, latents to be decoded."""
    return f"faces:calls:{catalogue}"


def answer_key(call: str) -> str:
    """The answer to such a call."""
    return f"faces:answer:{call}"


def queue_name(catalogue: str) -> str:
    """Celery's queue of the jobs that workers with these models may take."""
    return f"faces.{catalogue}"


def catalogue_of(model_hashes: Sequence[str]) -> str:
    """Sixteen digits for these weights in this order: a worker takes jobs of servers with the same ones."""
    return hashlib.sha256(" ".join(model_hashes).encode()).hexdigest()[:16]


def named(models: Mapping[str, str]) -> str:
    """Models with the beginning of their hashes."""
    return ", ".join(f"{name} ({digest[:12]})" for name, digest in models.items()) or "no model"


@dataclass(frozen=True)
class Pace:
    """How soon a silence means something, in seconds. Servers and workers say every `pulse_s` that they live."""

    pulse_s: float = 1.0

    @property
    def worker_s(self) -> float:
        """A worker that has not said so for this long is gone."""
        return 4 * self.pulse_s

    @property
    def lease_s(self) -> float:
        """An attempt of which no worker says for this long that it is under way is lost."""
        return 5 * self.pulse_s

    @property
    def untaken_s(self) -> float:
        """The same before anybody said that it took the attempt: a worker may be too busy to say so at once."""
        return 10 * self.pulse_s

    @property
    def new_worker_s(self) -> float:
        """Until then every server knows of a worker that has just begun."""
        return 2.5 * self.pulse_s


USUAL_PACE = Pace()


@dataclass(frozen=True)
class News:
    """One thing that happened to an attempt; `number` rises from 1 within it."""

    attempt: str
    number: int
    kind: str
    data: Any = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    def fields(self) -> dict[bytes, bytes]:
        """The same as an entry of a stream."""
        head = {b"a": self.attempt.encode(), b"n": b"%d" % self.number, b"k": self.kind.encode(),
                b"d": json.dumps(self.data, separators=(",", ":"), allow_nan=False).encode()}
        return head | {FILE + name.encode(): content for name, content in self.files.items()}

    @classmethod
    def read(cls, fields: Mapping[bytes, bytes]) -> News:
        """An entry of a stream. Raises KeyError or ValueError for what is none."""
        files = {name[len(FILE):].decode(): content for name, content in fields.items() if name.startswith(FILE)}
        return cls(fields[b"a"].decode(), int(fields[b"n"]), fields[b"k"].decode(), json.loads(fields[b"d"]), files)


@dataclass(frozen=True)
class WorkerState:
    """What a worker says of itself, once a second."""

    name: str
    catalogue: str
    device: str
    engine: str
    max_batch: int
    model_hashes: Mapping[str, str] = field(default_factory=dict)  # by the models' names
    attempts: Sequence[str] = ()  # those that it has taken and whose end is not sent yet
    images: int = 0
    steps_per_second: float = 0.0
    ended: int = 0
    step_costs: Sequence[Sequence[float]] = ()  # rows, seconds
    seconds_per_picture: float = 0.0
    seconds_per_image_step: float | None = None

    def to_json(self) -> bytes:
        """As `read` understands it."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def read(cls, text: bytes) -> WorkerState:
        """Raises TypeError or ValueError for the state of another version."""
        return cls(**json.loads(text))
