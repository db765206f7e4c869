"""How is a measurement written down: figures with their spread and their promise, in a table of a document?

What was measured, and how, is not known here: benchmarks/benchmark_server.py and core/evaluation/benchmark.py know.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, each time it was, and the bound that the median must keep."""

    what: str
    values: Sequence[float]
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def kept(self) -> bool:
        return (self.at_most is None or self.median <= self.at_most) and (
            self.at_least is None or self.median >= self.at_least
        )

    def cells(self) -> list[str]:
        spread = f"{number(min(self.values))} to {number(max(self.values))}" if len(self.values) > 1 else ""
        bounds = ((self.at_most, "at most"), (self.at_least, "at least"))
        promised = " and ".join(f"{words} {number(bound)}" for bound, words in bounds if bound is not None)
        verdict = ("kept" if self.kept else "**BROKEN**") if promised else ""
        median = f"{number(self.median)} {self.unit}".strip()
        return [self.what, str(len(self.values)) if spread else "", median, spread, promised, verdict]


@dataclass(frozen=True)
class Section:
    """One table, and the sentences under it."""

    name: str
    rows: Sequence[Row]
    notes: Sequence[str]

    @property
    def kept(self) -> bool:
        return all(row.kept for row in self.rows)

    def text(self) -> str:
        header = ["what", "n", "figure (median of n)", "from, to", "promised", ""]
        table = [header, ["---"] * len(header), *(row.cells() for row in self.rows)]
        lines = ["| " + " | ".join(cells) + " |" for cells in table]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])


def number(value: float) -> str:
    return f"{value:.4g}"


def told(text: str) -> None:
    """Progress, for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def timed(do: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """How many seconds it took, and what came of it."""
    began = time.perf_counter()
    result = do(*arguments)
    return time.perf_counter() - began, result


def machine(computes: str) -> str:
    """The circumstances, in one sentence; `computes` says with what, beside what the environment says of threads."""
    if "OMP_WAIT_POLICY" in os.environ:
        computes += f", OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}"
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    cpu = named.group(1) if named else platform.processor() or platform.machine()
    load = f", load before the start {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{date.today().isoformat()}, {cpu}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, {computes}{load}"
    )


def record(document: Path, section: Section, circumstances: str, command: str) -> None:
    """Put the section between its two marks in the document."""
    text = document.read_text(encoding="utf-8")
    name, end = re.escape(section.name), f"<!-- /{section.name} -->"
    found = re.search(rf"(<!-- {name}: written by [^>]*-->).*?{re.escape(end)}", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"{document} lacks the marks <!-- {section.name}: written by ... --> and {end}")
    body = f"{found[1]}\n\n{circumstances}. `{command}`\n\n{section.text()}\n\n{end}"
    document.write_text(text[: found.start()] + body + text[found.end() :], encoding="utf-8")
