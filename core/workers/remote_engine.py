"""Which engine does a server have that generates nothing itself?

One that knows what its model says of itself, and asks a worker for what is not a job: an image encoded, a latent
decoded, the noise that generates an image. Jobs never come here (`core/workers/remote_batch.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from core.engine import EngineInfo, GeneratedImage, JobError
from core.jobs.models import Models
from core.workers.arrays import from_json, to_json
from core.workers.link import Link

T = TypeVar("T")
log = logging.getLogger(__name__)
PATIENCE_S = 50.0  # of a request that waits for a worker: less than HTTP has


@dataclass(frozen=True)
class FoundNoise:
    """An inversion that a worker did to its end."""

    latent: np.ndarray
    finished: bool = True

    def advance(self, evaluations: int) -> None:
        return


class RemoteEngine:
    """The model that the workers have (`core.engine.Engine`)."""

    def __init__(self, info: EngineInfo, link: Link) -> None:
        self.info, self._link = info, link

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return self._ask("encode", pixels)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        return self._ask("decode", latent)

    def inversion(self, pixels: np.ndarray, prompt: str) -> FoundNoise:
        return FoundNoise(self._ask("inversion", pixels, prompt))

    def _ask(self, what: str, array: np.ndarray, prompt: str = "") -> np.ndarray:
        """Raises JobError."""
        answer = None
        if self._link.connected and self._link.workers:
            question = {"what": what, "model": self.info.name, "array": to_json(array), "prompt": prompt}
            answer = self._link.call(question, PATIENCE_S)
        if answer is None:
            raise JobError("no_worker", "No worker answers.", "Try again when one is there: see /ready.")
        if "error" in answer:
            raise JobError(**answer["error"])
        return from_json(answer["array"])

    def on_idle(self) -> bool:
        return False

    # ---- what only workers do

    def start(self, request: Any) -> Any:
        raise NotImplementedError("jobs are sent to workers")

    def step(self, runs: Sequence[Any]) -> None:
        raise NotImplementedError("jobs are sent to workers")

    def previews(self, run: Any) -> Sequence[GeneratedImage]:
        raise NotImplementedError("jobs are sent to workers")

    def pictures(self, run: Any) -> Sequence[GeneratedImage]:
        raise NotImplementedError("jobs are sent to workers")


def remote_models(link: Link, described: Sequence[tuple[str, Callable[[], EngineInfo]]]) -> Models:
    """The models of a server whose workers have them, each by what describes it."""
    from core.jobs.models import ModelSource

    def load(describe: Callable[[], EngineInfo]) -> Callable[[], RemoteEngine]:
        return lambda: RemoteEngine(describe(), link)

    return Models([ModelSource(name, load(describe)) for name, describe in described], lambda: 2**60)
