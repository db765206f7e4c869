"""How long is it from nothing to a face?

    python benchmarks/benchmark_start.py               the whole walk: clone, install, serve, draw; stop; the same once
    more python benchmarks/benchmark_start.py --record      also writes the table into docs/benchmarks.md
    python benchmarks/benchmark_start.py --environment .venv    without the installation, to try this command itself

It does what a person does who has never seen this project: clones the repository (its last commit) into an empty
folder and types `./start.py`, and then it asks for one image over HTTP. pip's cache is not used, so the installation
depends on the line; it wants about 7 GB of disk on Linux. It is a command, not a test: timings want an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the modules of the root

from launcher import environment, host

ROOT = Path(__file__).resolve().parent.parent

DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- start: written by benchmark_start.py -->", "<!-- /start -->"
SECTION = f"""
## From nothing to a face

`python benchmarks/benchmark_start.py --record` clones the repository into an empty folder, runs `./start.py`, and draws
one picture over HTTP; then it stops the server with Ctrl+C and does the same again.

{BEGIN}
{END}
"""
JOB = {"prompt": "a smiling young woman with wavy blond hair", "n_images": 1, "n_inf_steps": 50, "seed": 7}
INSTALL_S, PATIENCE_S = 7200.0, 600.0  # patience with an installation, and with anything else
PAGE_LOOK_S, LOOK_S = 0.01, 0.1  # how often to look for the page, and for the rest, which costs the server something
T = TypeVar("T")


@dataclass(frozen=True)
class Walk:
    """What generated, and the seconds of each leg of one start, one after another."""

    device: str
    environment: float
    page: float
    ready: float
    picture: float
    stop: float

    @property
    def to_picture(self) -> float:
        return self.environment + self.page + self.ready + self.picture


def told(text: str) -> None:
    """Progress, for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def clone(repository: Path, folder: Path) -> Path:
    """The repository's last commit in a new folder, as anybody gets it."""
    subprocess.run(["git", "clone", "--quiet", str(repository), str(folder)], check=True)
    return folder


def walk(folder: Path, *flags: str) -> Walk:
    """Run ./start.py there until it has generated one image, then end it as Ctrl+C does. Raises: SystemExit."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    unwanted = ("FACES_", "PYTHONDONTWRITEBYTECODE")  # a person's Python keeps its bytecode
    env = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    base = getattr(sys, "_base_executable", None) or sys.executable  # not the environment that runs this file
    command = [base, "start.py", "--no-browser", "--port", str(port), *flags]
    moments = [time.monotonic()]
    process = subprocess.Popen(
        command, cwd=folder, env={**env, "PIP_NO_CACHE_DIR": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, text=True, start_new_session=os.name == "posix",
    )
    prepared = threading.Event()
    reader = threading.Thread(target=pass_on, args=(process, prepared), daemon=True)
    reader.start()

    def until(look: Callable[[], T | None], patience_s: float = PATIENCE_S, pause_s: float = LOOK_S) -> T:
        """The first answer of `look` that is one; the moment is kept."""
        deadline = time.monotonic() + patience_s
        while True:
            found = look()
            if found is not None:
                moments.append(time.monotonic())
                return found
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"start.py did not get there (status {process.poll()}); what it said is above")
            time.sleep(pause_s)

    try:
        until(lambda: prepared.is_set() or None, INSTALL_S, PAGE_LOOK_S)
        until(lambda: get(port, "") or None, PATIENCE_S, PAGE_LOOK_S)
        device = until(lambda: ready_device(port))
        job = post(port, "text_to_image", JOB)["job_id"]
        until(lambda: finished_picture(port, job))
        process.send_signal(signal.SIGINT)
        process.wait(timeout=PATIENCE_S)
        moments.append(time.monotonic())
    finally:
        if process.poll() is None:
            process.terminate()  # it takes its server along
            process.wait(timeout=60)
        reader.join()
    return Walk(device, *(after - before for before, after in zip(moments, moments[1:], strict=False)))


def pass_on(process: subprocess.Popen[str], prepared: threading.Event) -> None:
    """Show what start.py says; it says when the environment is there and the server begins."""
    assert process.stdout is not None
    with process.stdout as pipe:
        for line in pipe:
            told("    " + line.rstrip())
            if line.startswith("Starting the server"):
                prepared.set()


def get(port: int, path: str) -> bytes | None:
    """The body of a 200, None for anything else."""
    answer = host.ask("127.0.0.1", port, path)
    return answer[1] if answer and answer[0] == 200 else None


def post(port: int, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST JSON, get JSON."""
    address, headers = f"http://127.0.0.1:{port}/{path}", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


def ready_device(port: int) -> str | None:
    """Where the model is, once it is loaded. Raises: SystemExit when it cannot be."""
    state = json.loads(get(port, "options") or b"{}")  # not /ready, whose refusals fill the log
    if state.get("state") == "FAILED":
        raise SystemExit(state["failure"])
    ready = get(port, "ready") if state.get("state") == "READY" else None
    return json.loads(ready)["device"] if ready else None


def finished_picture(port: int, job_id: str) -> bytes | None:
    """The PNG of a job of one image, once it is there. Raises: SystemExit when the job did not succeed."""
    job = json.loads(get(port, f"jobs/{job_id}/?include=none") or b"{}")
    if not job.get("finished"):
        return None
    picture = get(port, f"jobs/{job_id}/images/0.png") or b""
    if job["status"] != "succeeded" or not picture.startswith(b"\x89PNG"):
        raise SystemExit(f"the job ended as {job['status']}: {job.get('error')}")
    return picture


# ---- the command -----------------------------------------------------------------------------------------------------


def table(first: Walk, second: Walk, notes: Sequence[str]) -> str:
    """The two starts side by side, as Markdown."""
    rows = (
        ("environment made, packages installed and proved", lambda one: one.environment),
        ("then until the first byte of the page", lambda one: one.page),
        ("then until the model is loaded", lambda one: one.ready),
        (f"then until the first picture ({JOB['n_inf_steps']} steps)", lambda one: one.picture),
        ("**from the command to the page**", lambda one: one.environment + one.page),
        ("**from the command to the first picture**", lambda one: one.to_picture),
        ("the same without the installation", lambda one: one.to_picture - one.environment),
        ("from Ctrl+C to the end", lambda one: one.stop),
    )
    lines = ["| seconds | from nothing | second start |", "| --- | --- | --- |"]
    lines += [f"| {what} | {of(first):.1f} | {of(second):.1f} |" for what, of in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def circumstances(folder: Path, device: str) -> list[str]:
    """What the timings depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    cpu = named.group(1) if named else platform.processor() or platform.machine()
    load = f", load {os.getloadavg()[0]:.2f} at the end" if hasattr(os, "getloadavg") else ""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    packages = environment.installed(folder)
    return [
        f"{date.today().isoformat()}, {cpu}, {os.cpu_count()} cores{load}, {platform.system()}, "
        f"Python {platform.python_version()}, drawn on {device}, commit {commit.stdout.strip()}.",
        f"{len(packages)} packages, {host.folder_size(folder / '.venv') / 1e9:.1f} GB in .venv; no pip cache. The "
        "second start finds its files in the memory of the system.",
    ]


def record(text: str, document: Path = DOCUMENT) -> None:
    """Put the table between its marks, in a section of its own where there is none yet."""
    whole = document.read_text(encoding="utf-8") if document.is_file() else "# Benchmarks\n"
    if BEGIN not in whole or END not in whole:
        whole = whole.rstrip("\n") + "\n" + SECTION
    before, _, rest = whole.partition(BEGIN)
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Walk twice, print, and with --record write down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--record", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--environment", type=Path, help="an environment that is complete: nothing is installed")
    arguments = parser.parse_args(argv)
    if arguments.record and arguments.environment:
        parser.error("--record is for the whole walk: leave --environment out")
    with tempfile.TemporaryDirectory(prefix="faces-from-nothing-") as temporary:
        folder = clone(ROOT, Path(temporary) / "faces")
        flags = []
        if arguments.environment:
            (folder / ".venv").symlink_to(arguments.environment.resolve(), target_is_directory=True)
            flags = ["--offline"]
        told("From nothing:")
        first = walk(folder, *flags)
        told("Second start:")
        second = walk(folder, *flags)
        text = table(first, second, circumstances(folder, second.device))
    print(text, flush=True)
    if arguments.record:
        record(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
