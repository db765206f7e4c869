"""Who may wait, and whose turn is next?

Waiting jobs take turns by client, first in first out within one, so that a client with fifty jobs does not starve the
next. How many may wait is bounded, so that a flood is refused before it costs anything. It does not know how jobs run
or end (`core/jobs/life_cycle.py`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import zip_longest

from core.jobs.job import Job

REMEMBERED_TURNS = 4096  # clients whose last turn is remembered


class QueueFull(Exception):
    """As much is waiting as may; `retry_after_s` estimates when one place will be free."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueClosed(Exception):
    """The server is stopping and takes no more work."""


class Admission:
    """The order of the waiting jobs and their bounds: `max_waiting` for all, `max_per_client` for one client."""

    def __init__(self, max_waiting: int, max_per_client: int) -> None:
        self._max_waiting, self._max_per_client = max_waiting, max_per_client
        self._turns: OrderedDict[str, int] = OrderedDict()  # client -> when it had its last turn
        self._turn = 0

    @property
    def num_clients(self) -> int:
        """Clients whose last turn is remembered."""
        return len(self._turns)

    def order(self, waiting: Sequence[Job]) -> Sequence[Job]:
        """Who comes when: one job of each client in turn, beginning with the client whose last turn is longest ago."""
        queues: dict[str, deque[Job]] = {}
        for job in waiting:
            queues.setdefault(job.client, deque()).append(job)
        turns = sorted(queues.values(), key=lambda queue: (self._turns.get(queue[0].client, 0), queue[0].number))
        return [job for turn in zip_longest(*turns) for job in turn if job is not None]

    def take_turn(self, client: str) -> None:
        """A job of this client has begun to run."""
        self._turn += 1
        self._turns[client] = self._turn
        self._turns.move_to_end(client)
        if len(self._turns) > REMEMBERED_TURNS:
            self._turns.popitem(last=False)

    def assert_room(self, waiting: Sequence[Job], client: str, retry_after_s: int) -> None:
        """Raises QueueFull when no further job of this client may wait."""
        if len(waiting) >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} jobs are waiting already, which is the most there may", retry_after_s)
        if sum(job.client == client for job in waiting) >= self._max_per_client:
            message = f"{self._max_per_client} jobs of yours are waiting already, which is the most one client may have"
            raise QueueFull(message, retry_after_s)
