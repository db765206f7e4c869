"""How many answers a second does the server give while it generates nothing, and how late is the slowest in a hundred?

    python benchmarks/benchmark_http.py                  about two minutes on two idle cores
    python benchmarks/benchmark_http.py --record         also writes the table into docs/benchmarks.md

The real server with the bundled model, 64 keep-alive connections of `wrk` (https://github.com/wg/wrk, Debian's package
of that name) with one thread on the same cores. The exit status is 1 when a promise is broken. It is a command, not a
test: timings want an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the modules of the root

from core.evaluation.benchmark_tables import Row, Section, machine, record
from tests.support.server import ROOT, Server

DOCUMENT = ROOT / "docs" / "benchmarks.md"
CONNECTIONS, SECONDS = 64, 10
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
PROMISED_RATE, PROMISED_P99_S, PROMISED_GROWTH_MIB = 1500, 0.1, 64
MIB = 1 << 20


@dataclass(frozen=True)
class Load:
    """What wrk saw: answers a second, the latency that 99 % kept to, answers that never came or were none."""

    rate: float
    p99_s: float
    failures: int


def read_wrk(text: str) -> Load:
    """From what `wrk --latency` prints. Raises ValueError when that is something else."""
    rate, p99 = re.search(r"Requests/sec:\s*([\d.]+)", text), re.search(r"99%\s+([\d.]+)(us|ms|s|m)\b", text)
    if rate is None or p99 is None:
        raise ValueError(f"this is not what wrk --latency prints: {text[:200]!r}")
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    others = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    failures = sum(map(int, errors.groups())) if errors else 0
    return Load(float(rate[1]), float(p99[1]) * UNITS[p99[2]], failures + (int(others[1]) if others else 0))


def load(address: str, seconds: int, headers: Sequence[str] = ()) -> Load:
    """64 connections that ask one address again and again."""
    words = [part for header in headers for part in ("-H", header)]
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", *words, address]
    return read_wrk(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(folder: Path, seconds: int) -> Section:
    """Every kind of answer in turn, on one server with one finished job of four images."""
    rows, process = [], None
    with Server(folder / "data", "--device", "cpu") as server:
        job = server.submit({"prompt": "a smiling woman", "n_images": 4, "n_inf_steps": 4})
        server.wait(job)
        process = psutil.Process(server.pid)
        while process.cpu_percent(2.0) > 5:  # a server that rests compiles what larger jobs will need
            pass
        before = process.memory_info().rss
        root = f"http://127.0.0.1:{server.port}"
        tag = server.request("GET", f"/jobs/{job}/").headers["ETag"]
        for name, path, headers, promised in (
            ("/health", "/health", (), None),
            ("a finished job", f"/jobs/{job}/", (), PROMISED_RATE),
            ("a finished job, `?include=none`", f"/jobs/{job}/?include=none", (), PROMISED_RATE),
            ("a finished job, not changed (304)", f"/jobs/{job}/", (f"If-None-Match: {tag}",), PROMISED_RATE),
            ("an image", f"/jobs/{job}/images/0.png", (), PROMISED_RATE),
            ("its thumbnail", f"/jobs/{job}/images/0.webp", (), PROMISED_RATE),
            ("/options", "/options", (), PROMISED_RATE),
            ("the page", "/", (), PROMISED_RATE),
            ("a module of the page", "/static/app.js", (), PROMISED_RATE),
        ):
            found = load(root + path, seconds, headers)
            print(f"{name}: {found.rate:,.0f} a second, 99 % within {found.p99_s * 1000:.0f} ms, "
                  f"{found.failures} failed", flush=True)
            rows.append(Row(f"{name}: answers a second", [found.rate], at_least=promised))
            rows.append(Row(f"{name}: 99 % come within", [found.p99_s], "s",
                            at_most=None if promised is None else PROMISED_P99_S))
            rows.append(Row(f"{name}: answers that failed or timed out", [found.failures], at_most=0))
        grown = (process.memory_info().rss - before) / MIB
    rows.append(Row("memory of the server, more than before", [grown], "MiB", at_most=PROMISED_GROWTH_MIB))
    return Section("http", rows, [f"{CONNECTIONS} keep-alive connections for {seconds} s each, wrk on the same cores."])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and with --record write down; 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write the table into {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each kind of answer (%(default)s)")
    arguments = parser.parse_args(argv)
    if shutil.which("wrk") is None:
        print("wrk is needed: apt-get install wrk, or https://github.com/wg/wrk", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the server would be left behind
    circumstances = machine("torch")
    print(circumstances, flush=True)
    with tempfile.TemporaryDirectory(prefix="faces-benchmark-") as folder:
        section = measure(Path(folder), arguments.seconds)
    print(f"\n## http\n\n{section.text()}", flush=True)
    if arguments.record:
        record(DOCUMENT, section, circumstances, "python benchmarks/benchmark_http.py --record")
    return 0 if section.kept else 1


if __name__ == "__main__":
    sys.exit(main())
