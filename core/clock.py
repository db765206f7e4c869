"""How long ago was something, whatever the clock on the wall says?

That clock jumps: a machine without a battery begins in 1970, a wrong one is set right, a person turns it. So nothing is
ordered by it. `seconds` counts on through all of that, within one start of the machine; `Ended` remembers by it when
jobs ended in this process. The times that people are shown are those of `time.time`.

It does not know what a job is. https://man7.org/linux/man-pages/man2/clock_gettime.2.html
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median


def seconds() -> float:
    """Seconds since some moment, those in which the machine slept included where the system counts them (Linux)."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class Ended:
    """When, and in which order, the jobs of this process ended, by their numbers: the latest `REMEMBERED`."""

    REMEMBERED = 10_000

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at: dict[int, float] = {}  # the first that ended comes first

    def add(self, number: int) -> None:
        """A job has just ended."""
        self._at[number] = self._clock()
        if len(self._at) > self.REMEMBERED:
            del self._at[next(iter(self._at))]

    @property
    def order(self) -> list[int]:
        """Their numbers, the first that ended first."""
        return list(self._at)

    def within(self, age_s: float | None) -> set[int]:
        """Those that ended at most so many seconds ago; None: all."""
        now = self._clock()
        return {number for number, at in self._at.items() if age_s is None or now - at <= age_s}


def seconds_each(times: list[float], counts: list[int]) -> float:
    """Seconds from one count to the next: the median over the intervals, so that one jump of the clock is no matter."""
    pairs = zip(zip(times, counts, strict=True), zip(times[1:], counts[1:], strict=True), strict=False)
    return median((later - earlier) / (more - fewer) for (earlier, fewer), (later, more) in pairs)
