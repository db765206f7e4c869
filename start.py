#!/usr/bin/env python3
"""How do I run it? One command, from a fresh clone to the page in the browser.

    ./start.py            prepares what is missing, checks, starts the server, opens the page
    ./start.py test       prepares the test tools too, then runs ruff, mypy and pytest (arguments go to pytest)
    ./start.py worker     generates for a server elsewhere: --broker redis://host:6379 (docs/scaling.md)
    ./start.py doctor     says what this machine has, what is wrong and how to mend it

On Windows: `py start.py`. It needs Python 3.10 to 3.13 and nothing else: the standard library does all of this, and no
syntax newer than Python 3.7 is used, so that an old Python gets a sentence instead of a SyntaxError. This file does not
know how the environment is made (launcher/environment.py), what HTTP says (api.py) or how faces are drawn
(generator.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import webbrowser
from pathlib import Path
from urllib.parse import quote

from core import addresses
from core.process import TOGETHER, Problem, clean_env, venv_python
from launcher import environment, host
from launcher.device_check import device_problem, engine_text, quick_device_problem
from launcher.flags import Several, device_name, port_number, several, thread_count
from launcher.model_check import model_faults, model_folder
from launcher.pretrained_check import any_model_problem, is_pretrained
from launcher.process import Child
from launcher.worker import broker_env, model_words, run_worker

# segno's compact code has the terminal's own colours, a negative on most light ones; here they are stated, from the
# 256 colours, because themes change the first sixteen
SHOW_CODE = """
import segno, sys
print("\\033[38;5;231;48;5;16m", end="")
segno.make(sys.stdin.read(), error="l", micro=False).terminal(compact=True, border=4)
print("\\033[0m", end="")
"""
ROOT = Path(__file__).resolve().parent
DEFAULT_PORT = 5001
DEFAULT_MODEL = "celeba128"
DATA_NEEDED = 256 * 10**6  # bytes: some hundred jobs; the server removes old ones by itself, above 2 GB by default
CLOSING_MESSAGE = "Stopping: what is being drawn gets a few seconds, the rest goes on next time. Ctrl+C again: at once."


# ---- run -------------------------------------------------------------------------------------------------------------


def exposure_problem(options: argparse.Namespace) -> str | None:
    """The sentence for a server that strangers could use; the page and the API have no other lock than the key."""
    if addresses.is_local(options.host) or options.api_key or options.insecure:
        return None
    return (
        f"--host {options.host} lets everyone on the network in: choose a key with --api-key (or FACES_API_KEY), "
        "or say --insecure."
    )


def data_folder(options: argparse.Namespace) -> Path:
    """`--data-dir` as seen from where the person stands: the server runs in another folder."""
    return Path(options.data_dir).expanduser().resolve()


def has_jobs(options: argparse.Namespace) -> bool:
    """Whether a server has kept jobs there before."""
    return os.path.isfile(str(data_folder(options) / "jobs.sqlite3"))


def server_command(root: Path, options: argparse.Namespace) -> list[str]:
    """The command line of api.py. The key is not in it: every user of a machine can read command lines."""
    command = [str(venv_python(root)), str(root / "api.py"), "--host", options.host, "--port", str(options.port)]
    command += [*model_words(root, options), "--data-dir", str(data_folder(options))]
    if options.broker:
        command += ["--sentinel-master", options.sentinel_master, *(["--engine-here"] if options.engine_here else [])]
    for flag, values in (("--allow-host", options.allow_host), ("--cors-origin", options.cors_origin),
                         ("--trusted-proxy", options.trusted_proxy)):
        command += [word for value in values for word in (flag, value)]
    command += ["--no-watermark"] if options.no_watermark else []
    return command + (["--insecure"] if options.insecure else [])


def serve(root: Path, options: argparse.Namespace) -> int:
    """Check, prepare, start api.py in the environment, open the page when it answers; returns the exit status."""
    for problem in (
        *(any_model_problem(root, name) for name in options.model),
        exposure_problem(options),
        host.port_problem(options.host, options.port),
        host.memory_problem(host.free_memory()),
        host.folder_problem(data_folder(options), 0 if has_jobs(options) else DATA_NEEDED, "--data-dir"),
    ):
        if problem:
            raise Problem(problem)
    little = has_jobs(options) and host.folder_problem(data_folder(options), DATA_NEEDED, "--data-dir")
    if little:  # no reason to stay away: the gallery is where room is made
        print(f"Little room for new images, old ones can be deleted. {little}", flush=True)
    workers = bool(options.broker)
    environment.prepare(root, workers=workers, offline=options.offline, torch_index=options.torch_index)
    device = quick_device_problem(root, options.device)
    if device and options.device != "auto":
        raise Problem(device)
    if device:
        print(f"Drawing on the CPU. {device}", flush=True)
    # all it needs is in the model folder: HF_HUB_OFFLINE turns an attempt to download into an error at once
    key = {"FACES_API_KEY": options.api_key} if options.api_key else {}
    env = clean_env(HF_HUB_OFFLINE="1", **key, **broker_env(options))
    began = time.monotonic()
    print("Starting the server ...", flush=True)
    with Child(server_command(root, options), cwd=root, env=env, closing_message=CLOSING_MESSAGE) as server:
        if page_answers(options, server):
            show_addresses(root, options)
            watch_loading(root, options, server, began)
        elif not server.asked:
            raise Problem(why_it_ended(root, options, server))
        status = server.wait()
    if server.asked:
        return 0 if server.asked == 1 else 130
    if status:
        end = f"was ended by signal {-status}" if status < 0 else f"ended by itself with status {status}"
        raise Problem(f"The server {end} (see above): start it again, or ask ./start.py doctor.")
    return 0


def page_answers(options: argparse.Namespace, server: Child) -> bool:
    """Wait for GET /health; False when the server ends before, or is asked to."""
    began, told = time.monotonic(), False
    while server.status is None and not server.asked:
        if host.answers(options.host, options.port):
            return True
        if not told and time.monotonic() - began > 30:
            told = True
            print("Still starting: the first start reads many files from the disk.", flush=True)
        time.sleep(0.03)
    return False


def show_addresses(root: Path, options: argparse.Namespace) -> None:
    """Say where the page is, on this machine and on the network, and open it."""
    # with a key, the address carries it once and turns it into a cookie
    session = f"session?key={quote(options.api_key, safe='')}" if options.api_key else ""
    address = addresses.address_of(options.host, options.port) + session
    print(f"\n    Faces are drawn at  {address}   (Ctrl+C stops)", flush=True)
    outside = host.outside_address(options.host, options.port)
    outside = outside and outside + session
    if options.host in addresses.ANYWHERE:
        print(f"    On a phone or another computer:  {outside or 'this machine is in no network'}", flush=True)
    if outside and sys.stdout.isatty():
        # drawn by the environment's Python, which has the library; not an argument, because it may hold the key
        command = [str(venv_python(root)), "-c", SHOW_CODE]
        subprocess.run(command, input=outside.encode(), cwd=str(root), env=clean_env(), stderr=subprocess.DEVNULL)
    if not options.no_browser and host.can_show_pages():
        webbrowser.open(address)


def watch_loading(root: Path, options: argparse.Namespace, server: Child, began: float) -> None:
    """Say when the model is there, or in one sentence why not. The page is open all the while, and says the same."""
    while server.status is None and not server.asked:
        answer = host.ask(options.host, options.port, "options", options.api_key)
        told = read_object(answer[1]) if answer else {"state": "STARTING"}  # too busy to answer
        if told.get("state") == "STARTING":
            time.sleep(0.2)
            continue
        if told.get("state") == "READY":
            print(f"    The model is ready, after {time.monotonic() - began:.0f} s.\n", flush=True)
        if told.get("state") == "FAILED":
            reason = diagnose(root, options, server, str(told.get("failure")))
            server.forget()
            print(f"start.py: {reason}", file=sys.stderr, flush=True)
        break
    server.release()


def read_object(text: bytes) -> dict:
    """A JSON object, {} for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def why_it_ended(root: Path, options: argparse.Namespace, server: Child) -> str:
    """One sentence for a server that ended before it answered, from what it said."""
    lines = server.said.strip().splitlines()
    if "Traceback (most recent call last):" in lines:
        return diagnose(root, options, server, f"The server ended with status {server.status}: {lines[-1]}")
    if lines:  # a server that knows what is wrong says it in a sentence of its own
        return lines[-1]
    if server.status == -9:
        return "The server was killed while it started, probably for its memory: close other programs and start again."
    return f"The server ended with status {server.status} and said nothing: see ./start.py doctor."


def diagnose(root: Path, options: argparse.Namespace, server: Child, reason: str) -> str:
    """One sentence for what came with a traceback: a broken package where there is one, else `reason` and a file."""
    broken = environment.import_problems(root, environment.probe(root))
    if broken:
        return broken[0]
    for folder in (data_folder(options), Path(tempfile.gettempdir())):  # the disk may be the very thing that fails
        file = folder / "failure.log"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(server.said, encoding="utf-8")
        except OSError:
            continue
        return f"{reason.rstrip('.')} (all of it is in {file}): see ./start.py doctor."
    return f"{reason.rstrip('.')}: see ./start.py doctor."


# ---- test ------------------------------------------------------------------------------------------------------------


def run_tests(root: Path, words: list[str], options: argparse.Namespace) -> int:
    """ruff, mypy and pytest, all of them whatever the others say; returns the worst exit status."""
    environment.prepare(root, tests=True, offline=options.offline, torch_index=options.torch_index)
    ensure_programs(options.offline)
    told, worst = [], 0
    for tool, arguments in (("ruff", ["check", "."]), ("mypy", []), ("pytest", words)):
        print("\n$ " + " ".join(shlex.quote(word) for word in (tool, *arguments)), flush=True)
        command, began = [str(venv_python(root)), "-m", tool, *arguments], time.monotonic()
        # in one stream: where a crash happened stands beside the test that it ended
        status = subprocess.call(command, cwd=str(root), env=clean_env(), stderr=subprocess.STDOUT, **TOGETHER)
        verdict = f"failed with status {status}" if status > 0 else f"was ended by signal {-status}"
        told.append(f"{tool} {verdict if status else 'passed'} in {time.monotonic() - began:.0f} s")
        worst = max(worst, status if status >= 0 else 128 - status)
    print("\n" + ", ".join(told), flush=True)
    return worst


def ensure_programs(offline: bool) -> None:
    """The tests drive a real Chromium and start a real Redis: install them where that needs no question, else say how.
    """
    apt = shutil.which("apt-get")
    if apt and not offline and missing_programs() and os.geteuid() == 0:
        env = clean_env(DEBIAN_FRONTEND="noninteractive")
        for _ in range(2):  # mirrors fail now and then
            subprocess.call([apt, "update"], stdin=subprocess.DEVNULL, env=env)
            subprocess.call([apt, "install", "-y", *missing_programs()], stdin=subprocess.DEVNULL, env=env)
            if not missing_programs():
                break
    if "chromium" in missing_programs():
        remedy = f"{venv_python(Path('.'))} -m playwright install --with-deps chromium"
        print("The tests of the page will fail, they need Chromium or Chrome: install it, or run", flush=True)
        print("    " + remedy, flush=True)
    if "redis-server" in missing_programs():
        print("The tests of workers will be skipped, they need redis-server: install it.", flush=True)


def missing_programs() -> list[str]:
    """Debian's packages of the programs that tests need and this machine lacks."""
    needed = {"chromium": host.find_browser(), "redis-server": shutil.which("redis-server")}
    return [package for package, found in needed.items() if not found]


# ---- doctor ----------------------------------------------------------------------------------------------------------


def doctor(root: Path, options: argparse.Namespace) -> int:
    """Print what this machine has and what is wrong with it; exit status 1 when something is."""
    free = host.free_memory()
    show("system", f"{platform.system()} {platform.release()} on {platform.machine()}, {os.cpu_count()} cores")
    show("memory", "unknown" if free is None else f"{free / environment.GIB:.1f} GiB free")
    show("disk", f"{shutil.disk_usage(str(root)).free / environment.GIB:.1f} GiB free")
    problems = [
        *doctor_environment(root, options),
        doctor_data(data_folder(options)),
        *(problem for name in options.model for problem in doctor_model(root, name)),
        exposure_problem(options),
        host.port_problem(options.host, options.port),
        host.memory_problem(free),
    ]
    sizes = {
        index.parent.name: sum(file.stat().st_size for file in index.parent.rglob("*") if file.is_file()) / 1e6
        for index in sorted((root / "models").glob("*/model_index.json"))
    }
    show("models", ", ".join(f"{name} ({size:.0f} MB)" for name, size in sizes.items()) or "none")
    show("address", addresses.address_of(options.host, options.port))
    show("page tests", host.find_browser() or "no Chromium (only ./start.py test needs it)")
    told = [problem for problem in problems if problem]
    print()
    for number, problem in enumerate(told, start=1):
        print(f"{number}. {problem}")
    print("Mend these from the first on, then look again." if told else "Nothing is wrong.")
    return 1 if told else 0


def doctor_environment(root: Path, options: argparse.Namespace) -> list[str | None]:
    """The doctor's lines on .venv: Python, packages, device; returns what is wrong with them."""
    why = environment.incomplete(root)
    version = environment.python_version(venv_python(root))
    if version is None:
        show("environment", "none")
        return [f"The environment is not ready ({why}): run ./start.py, it makes it."]
    show("environment", ".venv with Python {}.{}".format(*version) + ("" if why else ", as pinned"))
    found = environment.probe(root)
    packages = found["packages"]
    states = {name: "broken" if entry["error"] else "" for name, entry in packages.items()}
    texts = (f"{name} {packages[name]['version'] or '-'} {state}".strip() for name, state in states.items())
    show("packages", ", ".join(texts))
    problems: list[str | None] = list(environment.import_problems(root, found))
    if why and not problems:
        problems.append(f"The environment is not as pinned ({why}): run ./start.py, it mends that.")
    torch = found["torch"]
    if torch:
        gpus = ", ".join(f"cuda ({name})" for name in torch["cuda"])
        show("device", (gpus or ("mps" if torch["mps"] else "cpu")) + f", {torch['threads']} CPU threads")
        show("engine", engine_text(torch, options.device))
        problems.append(device_problem(torch, packages["torch"]["version"], options.device))
    return problems


def doctor_model(root: Path, name: str) -> list[str]:
    """What keeps the model from drawing: an incomplete folder, or parts that do not belong together."""
    problem = any_model_problem(root, name)
    if problem is None:
        return [] if is_pretrained(model_folder(root, name)) else model_faults(model_folder(root, name))
    return [problem]


def doctor_data(folder: Path) -> str | None:
    """The doctor's line on the data folder: jobs, size, free disk; returns what is wrong with it."""
    problem, jobs = host.folder_problem(folder, DATA_NEEDED, "--data-dir"), "no jobs yet"
    try:
        from core.jobs.storage_errors import DATABASE, StoreError
        from core.jobs.store import Store  # newer syntax, and sqlite3, which not every Python has
    except ImportError as error:
        return f"This Python cannot read the jobs ({error}): install Python {environment.RANGE} from python.org."
    if (folder / DATABASE).is_file():
        try:
            store = Store(folder)  # as the server would: checks that the database is whole
            counts = store.count()
            store.close()
            unfinished = counts.pop("queued", 0) + counts.pop("running", 0)
            states = [*sorted(counts.items()), *([("unfinished", unfinished)] if unfinished else [])]
            jobs = "jobs: " + ", ".join(f"{count} {state}" for state, count in states) if states else jobs
        except StoreError as error:
            problem, jobs = problem or str(error), "jobs cannot be counted"
    free = shutil.disk_usage(str(host.nearest_folder(folder))).free
    size = host.folder_size(folder)
    show("data", f"{folder}, {size / 1e6:.0f} MB, {jobs}; {free / environment.GIB:.1f} GiB free")
    return problem


def show(title: str, text: str) -> None:
    """One line of the doctor's table."""
    print(f"{title:<13}{text}", flush=True)


# ---- the command line ------------------------------------------------------------------------------------------------


def command_line(env: dict[str, str]) -> argparse.ArgumentParser:
    """The flags; the default of each comes from its FACES_ twin in `env`."""

    def twin(name: str, default: str = "") -> str:
        return env.get("FACES_" + name) or default

    def switch(name: str) -> bool:
        return twin(name).lower() not in ("", "0", "no", "false")

    parser = argparse.ArgumentParser(
        prog="start.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(__doc__ or "").split("\n\nOn Windows")[0],
        epilog="Every flag has a twin in the environment: --data-dir is FACES_DATA_DIR, --offline is FACES_OFFLINE=1.",
    )
    add = parser.add_argument
    add("command", nargs="?", choices=("run", "test", "doctor", "worker"), default="run", help="run when left out")
    where = "address to listen on (%(default)s; 0.0.0.0: the network, [::]: with IPv6)"
    add("--host", type=addresses.host_of, default=twin("HOST", "127.0.0.1"), help=where)
    add("--port", type=port_number, default=twin("PORT", str(DEFAULT_PORT)), help="port to listen on (%(default)s)")
    add("--device", type=device_name, default=twin("DEVICE", "auto"), help="auto, cpu, mps, cuda, cuda:N (%(default)s)")
    models = f"name in models/, a folder, or other people's file; may be given again ({DEFAULT_MODEL})"
    add("--model", action=Several, metavar="MODEL", default=several(twin("MODEL", DEFAULT_MODEL)), help=models)
    sides = "pixels a side of other people's models, 0 = as they were trained (%(default)s)"
    add("--image-size", type=int, default=twin("IMAGE_SIZE", "0"), help=sides)
    add("--data-dir", default=twin("DATA_DIR", str(ROOT / "data")), help="keeps jobs and pictures (data/)")
    add("--api-key", default=twin("API_KEY"), help="what clients must show when --host opens the network")
    add("--insecure", action="store_true", default=switch("INSECURE"), help="open the network without a key")
    names, origins = "other names the server answers to, behind a proxy", "other web pages that may use the server"
    add("--allow-host", action=Several, metavar="NAME", default=several(twin("ALLOW_HOST")), help=names)
    add("--cors-origin", action=Several, metavar="ORIGIN", default=several(twin("CORS_ORIGIN")), help=origins)
    proxies = "a proxy, by its address or network, whose X-Forwarded headers count"
    add("--trusted-proxy", action=Several, metavar="ADDRESS", default=several(twin("TRUSTED_PROXY")), help=proxies)
    add("--threads", type=thread_count, default=twin("THREADS", "0"), help="CPU threads, 0 = automatic (%(default)s)")
    marks = "put no invisible mark into the pictures"
    add("--no-watermark", action="store_true", default=switch("NO_WATERMARK"), help=marks)
    broker = "where workers find jobs: redis://, rediss://, sentinel://; then this server generates nothing itself"
    add("--broker", metavar="URL", default=twin("BROKER"), help=broker)
    master = "what Sentinel calls the Redis (%(default)s)"
    add("--sentinel-master", default=twin("SENTINEL_MASTER", "mymaster"), help=master)
    add("--engine-here", action="store_true", default=switch("ENGINE_HERE"), help="with --broker: a worker here, too")
    add("--no-browser", action="store_true", default=switch("NO_BROWSER"), help="do not open the page")
    add("--offline", action="store_true", default=switch("OFFLINE"), help="download nothing, ever")
    index_help = f"package index for torch and torchvision: {environment.TORCH_INDEX}cpu is small, and without GPU"
    add("--torch-index", metavar="URL", default=twin("TORCH_INDEX") or None, help=index_help)
    return parser


def go_on_with(python: str, words: list[str]) -> int:
    """Run another Python in the place of this one, so that whoever stops this process stops that one."""
    if os.name == "nt":  # there it would be another process, which the console does not wait for
        signal.signal(signal.SIGINT, lambda number, frame: None)  # that one hears it too, and decides
        return subprocess.call([python, *words])
    os.execv(python, [python, *words])


def main(argv: list[str] | None = None) -> int:
    """Run one command; a Problem becomes one sentence on stderr and exit status 1."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        problem = environment.python_problem(sys.version_info[:2])
        if problem:
            other = environment.other_python(ROOT)
            if other is None:
                raise Problem(problem)
            print(f"Using {other}, because this Python is {platform.python_version()}.", flush=True)
            return go_on_with(other, [str(Path(__file__).resolve()), *words])
        parser = command_line(dict(os.environ))
        if words[:1] == ["test"]:  # the rest belongs to pytest
            return run_tests(ROOT, words[1:], parser.parse_args(["test"]))
        options = parser.parse_args(words)
        return {"doctor": doctor, "worker": run_worker}.get(options.command, serve)(ROOT, options)
    except Problem as error:
        print(f"start.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on where it was.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
