"""A worker whose engine is the drawing stand-in, as a process: what `worker.py` is, around another engine.

    python -m tests.support.worker_process redis://127.0.0.1:6379/0 --ms-per-image 2

A step takes `--ms-per-image` for each image of it, asleep: as on an accelerator of the worker's own, so that several
workers on one machine do not share what computes. `WorkerProcess` starts one and can kill it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from core.process import end_with_parent, tied
from tests.support.drawing import DrawingEngine, DrawingInfo, DrawingRun

ROOT = Path(__file__).resolve().parents[2]


class SleepingEngine(DrawingEngine):
    """Takes its time for every image of a step."""

    def __init__(self, info: DrawingInfo, ms_per_image: float) -> None:
        super().__init__(info)
        self._ms_per_image = ms_per_image

    def step(self, runs: Sequence[DrawingRun]) -> None:
        time.sleep(self._ms_per_image * sum(run.num_images for run in runs) / 1000)
        super().step(runs)
        self.steps.clear()
        self.begun.clear()


class WorkerProcess:
    """A worker in a process of its own, its output in `log`; as a context manager it is stopped at the end."""

    def __init__(self, log: Path, command: Sequence[str]) -> None:
        self.log, self.command = log, command
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def drawing(cls, log: Path, url: str, *flags: str) -> WorkerProcess:
        """With the stand-in."""
        return cls(log, [sys.executable, "-m", "tests.support.worker_process", url, *flags])

    @classmethod
    def real(cls, log: Path, url: str, *flags: str) -> WorkerProcess:
        """With a model."""
        return cls(log, [sys.executable, "worker.py", "--broker", url, *flags])

    def __enter__(self) -> WorkerProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> WorkerProcess:
        env = {name: value for name, value in os.environ.items() if not name.startswith("FACES_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                             **tied(env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}))
        return self

    def kill(self) -> None:
        """End it at once (SIGKILL): it can hand nothing back."""
        process, self._process = self._process, None
        if process is not None:
            with process:
                process.kill()

    def stop(self) -> int | None:
        """Ask it to stop; its exit status, None when it did not run."""
        process, self._process = self._process, None
        if process is None:
            return None
        with process:
            process.terminate()
            try:
                return process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def until(look: Callable[[], object], timeout_s: float = 30.0, every_s: float = 0.02) -> None:
    """Wait until `look` says yes: other processes can only be asked again and again."""
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline, f"still not after {timeout_s} s"
        time.sleep(every_s)


def main() -> None:
    """The process."""
    end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--ms-per-image", type=float, default=1.0)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--model-hash", default=DrawingInfo().model_hash)
    parser.add_argument("--drain-seconds", type=float, default=2.0)
    parser.add_argument("--job-seconds", type=float, default=600.0)
    parser.add_argument("--pulse-seconds", type=float, default=1.0)
    asked = parser.parse_args()

    from core.jobs.models import Models, ModelSource
    from core.web.monitoring import configure_logging
    from core.workers.broker import Broker
    from core.workers.messages import Pace
    from core.workers.serve import Worker, WorkerOptions

    configure_logging("text")
    engine = SleepingEngine(replace(DrawingInfo(), model_hash=asked.model_hash), asked.ms_per_image)
    options = WorkerOptions(asked.max_batch, asked.job_seconds, asked.drain_seconds, Pace(asked.pulse_seconds))
    Worker(Broker.parse(asked.url), Models([ModelSource("", lambda: engine)]), options).run()


if __name__ == "__main__":
    main()
