"""A batch that counts instead of generating, for the tests of the queue and of the store.

A job's request holds `steps`, a `seed`, and `fails_at` where it is to fail. Its image depends on the seed and on
every step in order, so that a job that went on in the middle after a crash would give another one.
`python tests/support/counting.py FOLDER` is a server to be killed: it accepts jobs and works on them until then.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.engine import JobError
from core.jobs.admission import QueueFull
from core.jobs.job import Job
from core.jobs.queue import JobQueue
from core.jobs.store import Store


class Counting:
    """A `core.jobs.worker.Batch` for `room` jobs. `before_step(job)` may interfere with every step of every job."""

    def __init__(self, room: int = 3) -> None:
        self.room = room
        self.states: dict[Job, bytes] = {}
        self.before_step: Callable[[Job], None] = lambda job: None
        self.idle_calls = 2  # left to take

    is_away = False

    def has_room(self, job: Job) -> bool:
        return len(self.states) < self.room

    def admit(self, job: Job) -> None:
        if job.request["steps"] > 1000:
            raise JobError("too_long", "More than 1000 steps.", "Ask for fewer.")
        self.states[job] = str(job.request["seed"]).encode()

    def drop(self, job: Job) -> None:
        self.states.pop(job, None)

    def on_idle(self) -> bool:
        self.idle_calls -= 1
        return self.idle_calls > 0

    def step(self) -> Iterator[tuple[Job, JobError | None]]:
        for job in tuple(self.states):
            self.before_step(job)
            done, total = job.done + 1, job.request["steps"]
            self.states[job] = hashlib.sha256(self.states[job]).digest()
            job.progress(done, total)
            if job.request.get("fails_at") == done:
                del self.states[job]
                yield job, JobError("out_of_memory", "No room.", "Ask for less.")
            elif done < total:
                job.keep({f"0-{done}.png": self.states[job] * 10})
                job.emit("preview", {"index": 0, "t": done, "file": f"0-{done}.png"})
            else:
                job.emit("image", {"index": 0, "t": done, "file": "0.png"}, {"0.png": self.states.pop(job) * 100})
                yield job, None


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a thousand `fsync` of a busy disk are not what is tested."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def picture(seed: int, steps: int) -> bytes:
    """The image of a job that was never disturbed."""
    state = str(seed).encode()
    for _ in range(steps):
        state = hashlib.sha256(state).digest()
    return state * 100


def serve(folder: Path) -> None:
    """Accept and work until killed; a line says each job only after it was accepted, each event after it was seen."""
    queue, batch = JobQueue(Store(folder), max_waiting=12), Counting(room=4)
    print("open", flush=True)
    number = queue.counts()["finished"]
    while True:
        number += 1
        steps = 3 + number * 7 % 23
        try:
            job = queue.submit(f"job {number}", {"n": number}, {"seed": number, "steps": steps}, client=f"{number % 3}")
            print("accepted", job.id, number, steps, flush=True)
        except QueueFull:
            pass
        for _ in range(4):
            queue.run_next(batch)
            for job in queue.list(status="running")[0]:
                last = queue.get(job.id).events_after(0)[-1]
                print("seen", job.id, last.id, last.kind, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
