"""Does one command prepare, check and start, and is every failure one clear sentence?

Most tests run the real start.py in a small house: a folder with start.py, an environment of its own and a server of ten
lines, so that no test waits for torch. pip is the real pip; its packages are wheels written by the test.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import segno

import api
import start
from benchmarks import benchmark_start
from core.jobs.queue import JobQueue
from core.jobs.store import Store
from core.process import Problem, venv_python
from launcher import host as machine
from launcher import model_check
from launcher.device_check import device_problem, quick_device_problem
from launcher.environment import (
    REQUIREMENTS,
    STAMP,
    TEST_REQUIREMENTS,
    WORKER_REQUIREMENTS,
    explain_install,
    hashes,
    import_problems,
    incomplete,
    installed,
    nvidia_gpus,
    pins,
    prepare,
    probe,
    python_problem,
    python_version,
    torch_cuda_build,
)

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals; its console tells both processes")
NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file of no tensors
SERVER = """
import http.server, json, os, signal, sys, threading
state, stops = os.environ.get("TEST_STATE", "READY"), []
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        told = {"state": state, "failure": "The model could not be loaded: it is green.", "device": "cpu",
                "finished": True, "status": "succeeded",
                "words": sys.argv[1:], "key": os.environ.get("FACES_API_KEY"), "pid": os.getpid()}
        body = json.dumps(told).encode() if not self.path.endswith(".png") else b"\\x89PNG"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"job_id": "a-face"}')
    def log_message(self, *words):
        pass
def stop(number, frame):
    stops.append(number)
    print("told to stop", flush=True, file=sys.stderr)
    if os.environ.get("TEST_STUBBORN", "0") == "0" or len(stops) == 2 and os.environ["TEST_STUBBORN"] == "1":
        os._exit(0)
signal.signal(signal.SIGTERM, stop)
print("a line of the log", flush=True, file=sys.stderr)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


def site_packages(root: Path) -> Path:
    """Where the environment of a house keeps its packages."""
    return next((root / ".venv").glob("[Ll]ib/**/site-packages"))


def write_stamp(root: Path) -> None:
    """Say that what the house's requirement files name now is installed."""
    files = (REQUIREMENTS, WORKER_REQUIREMENTS, TEST_REQUIREMENTS)
    (root / ".venv" / STAMP).write_text(json.dumps(hashes(root, files)), encoding="utf-8")


def write_wheel(index: Path, name: str, version: str, code: str = "") -> None:
    """Put a package of one module into a package index, from which pip installs it like any other."""
    (index / name).mkdir(parents=True, exist_ok=True)
    file, info = f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    (index / name / "index.html").write_text(f"<a href='{file.replace('+', '%2B')}'>{file}</a>", encoding="utf-8")
    with zipfile.ZipFile(index / name / file, "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder that ./start.py can run in: an empty environment, a complete model, a server of ten lines."""
    root = tmp_path / "house"
    for package in ("core", "launcher"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "start.py", root)
    (root / "api.py").write_text(SERVER, encoding="utf-8")
    for name in (REQUIREMENTS, WORKER_REQUIREMENTS, TEST_REQUIREMENTS):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("# nothing\n", encoding="utf-8")
    for part in model_check.COMPONENTS:
        (root / "models" / "celeba128" / part).mkdir(parents=True)
        (root / "models" / "celeba128" / part / "config.json").write_text("{}", encoding="utf-8")
        (root / "models" / "celeba128" / part / "model.safetensors").write_bytes(NO_WEIGHTS)
    known = {part: {"sha256": hashlib.sha256(NO_WEIGHTS).hexdigest()} for part in model_check.COMPONENTS}
    (root / "models" / "celeba128" / "model_index.json").write_text(json.dumps({"components": known}), encoding="utf-8")
    venv.create(root / ".venv", with_pip=False, symlinks=os.name != "nt")
    write_stamp(root)
    return root


def run(root: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """./start.py in a house, to its end."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FACES_")}
    command = [sys.executable, str(root / "start.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**kept, **env}, cwd=root.parent)


def sentence(answer: subprocess.CompletedProcess[str]) -> str:
    """The one line a failed start says on stderr."""
    assert answer.returncode == 1
    lines = answer.stderr.splitlines()
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith("start.py: ")
    return lines[0]


@pytest.fixture
def port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def taken() -> Iterator[int]:
    """A port where something listens that is no web server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


# ---- run -------------------------------------------------------------------------------------------------------------


def begin(root: Path, *words: str, until: str = "The model is ready", **env: str) -> tuple[subprocess.Popen[str], str]:
    """./start.py in a house until it says something; returns the process and what it said."""
    command = [sys.executable, str(root / "start.py"), "--no-browser", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}, cwd=root.parent,
        start_new_session=True,  # what a terminal would tell this group, the tests can tell it
    )
    assert process.stdout is not None and process.stderr is not None
    said = ""
    for line in process.stdout:
        said += line
        if until in line:
            return process, said
    raise AssertionError(f"ended with {process.wait()}: {said}{process.stderr.read()}")


def address_in(said: str) -> str:
    return re.findall(r"Faces are drawn at {2}(http://\S+)", said)[0]


def test_start_serves_says_where_and_takes_the_server_along(house: Path, port: int) -> None:
    words = ("--threads", "2", "--api-key", "secret", "--data-dir", "pictures")
    process, said = begin(house, *words, FACES_PORT=str(port), FACES_DEVICE="cpu")
    with process:
        try:
            address = address_in(said)
            assert address == f"http://127.0.0.1:{port}/session?key=secret", "the browser gets its cookie there"
            with urllib.request.urlopen(address) as answer:
                told = json.load(answer)
            flags = dict(zip(told["words"][::2], told["words"][1::2], strict=True))
            assert flags == {
                "--host": "127.0.0.1",
                "--port": str(port),
                "--device": "cpu",
                "--model": str(house / "models" / "celeba128"),
                "--data-dir": str(house.parent / "pictures"),
                "--threads": "2",
            }
            assert told["key"] == "secret", "the key travels in the environment: command lines are public"
            again = sentence(run(house, "--port", str(port)))
            assert f"Port {port} is already taken, and a server answers: open http://127.0.0.1:{port}/" in again
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert machine.port_problem("127.0.0.1", port) is None, "the server went on alone"


@posix
@pytest.mark.parametrize("stubborn, requests", [("0", 1), ("1", 2), ("2", 3)])
def test_each_ctrl_c_reaches_the_server_once(house: Path, port: int, stubborn: str, requests: int) -> None:
    """One stops it, the second stops it at once, the third needs no consent: the server here waits for so many."""
    process, _ = begin(house, "--port", str(port), TEST_STUBBORN=stubborn)
    with process:
        assert process.stderr is not None
        for number in range(requests):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody in its group
            while number < 2 and "told to stop" not in process.stderr.readline():
                pass
        said = process.stderr.read()
        assert process.wait(timeout=30) == (0 if requests == 1 else 130)
    assert "Traceback" not in said and "told to stop" not in said, "told more often than asked"
    assert machine.port_problem("127.0.0.1", port) is None


@posix
@pytest.mark.parametrize("kernel", [True, False], ids=["by the kernel", "by the pipe alone"])
def test_a_server_does_not_outlive_a_start_that_is_killed(house: Path, port: int, kernel: bool) -> None:
    """Whoever kills start.py with signal 9 can start again at once: the port and the data folder are free."""
    server = "from core import process as child\n" + ("" if kernel else "child._ask_kernel = lambda number: None\n")
    (house / "api.py").write_text(f"{server}child.end_with_parent()\n{SERVER}", encoding="utf-8")
    process, _ = begin(house, "--port", str(port))
    with process:
        answer = machine.ask("127.0.0.1", port, "")
        assert answer is not None
        process.kill()
        assert ends(json.loads(answer[1])["pid"])
    assert machine.port_problem("127.0.0.1", port) is None


@posix
def test_the_real_server_ends_with_its_parent(tmp_path: Path) -> None:
    """`python api.py` as start.py runs it; on its own, nobody's end means anything to it."""
    code = (
        "import sys, os; from pathlib import Path; from launcher.process import Child\n"
        "child = Child([sys.executable, 'api.py', '--port', '0', *sys.argv[1:]], cwd=Path('.'), env=dict(os.environ),"
        " closing_message='')\nprint(child._process.pid, flush=True); child.release(); child.wait()"
    )
    words = ["--model", str(tmp_path / "none"), "--data-dir", str(tmp_path / "data")]
    with subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        server = int(parent.stdout.readline())
        assert "could not be loaded" in parent.stderr.readline(), "it serves: its model is not there, its page is"
        parent.kill()
        assert ends(server)


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tell a program that does not ask")
def test_what_start_runs_ends_with_it_too(house: Path) -> None:
    """pip and pytest know nothing of this: the kernel ends them."""
    site = site_packages(house)
    for name, code in (("ruff", ""), ("mypy", ""), ("pytest", "import os, time; print(os.getpid()); time.sleep(60)")):
        (site / f"{name}.py").write_text(code, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(house / "start.py"), "test"], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "FACES_OFFLINE": "1"}) as process:
        assert process.stdout is not None
        pid = next(line for line in process.stdout if line.strip().isdecimal())
        process.kill()
        assert ends(int(pid))


def ends(pid: int) -> bool:
    """Whether a process that is not our child ends within some seconds."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        with contextlib.suppress(OSError):
            state = stat.read_text().rpartition(")")[2].split()[0] if stat.is_file() else ""
            if state == "Z" and len(list(stat.with_name("task").iterdir())) == 1:  # its other threads hold its sockets
                return True  # nobody has buried it yet: in a container the first process may not
        time.sleep(0.05)
    return False


@posix
def test_ctrl_c_before_the_server_answers(house: Path, port: int) -> None:
    (house / "api.py").write_text("import time\ntime.sleep(60)\n", encoding="utf-8")
    process, _ = begin(house, "--port", str(port), until="Starting the server")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, 130) and "Traceback" not in errors


def test_a_server_that_ends_at_once_is_told(house: Path, port: int) -> None:
    (house / "api.py").write_text("raise SystemExit(3)", encoding="utf-8")
    assert "ended with status 3" in sentence(run(house, "--port", str(port)))
    (house / "api.py").write_text("raise SystemExit('Another server is using it: stop that one.')", encoding="utf-8")
    assert sentence(run(house, "--port", str(port))) == "start.py: Another server is using it: stop that one."


@posix
def test_a_server_that_ends_later_is_told(house: Path, port: int) -> None:
    process, _ = begin(house, "--port", str(port))
    with process:
        assert process.stderr is not None
        shown = process.stderr.readline()
        assert shown == "a line of the log\n", "what was held back while it loaded"
        answer = machine.ask("127.0.0.1", port, "")
        assert answer is not None
        os.kill(json.loads(answer[1])["pid"], signal.SIGKILL)
        assert "was ended by signal 9" in process.stderr.read()
        assert process.wait(timeout=30) == 1


def test_no_start_ends_in_a_traceback(house: Path, port: int) -> None:
    """A package that cannot be imported is named with its remedy; what nobody foresaw is kept in a file."""
    (house / "api.py").write_text("import flask\n1 / 0\n", encoding="utf-8")
    (house / REQUIREMENTS).write_text("flask==3.1.3\n", encoding="utf-8")
    info = site_packages(house) / "flask-3.1.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flask\nVersion: 3.1.3\n", encoding="utf-8")
    (site_packages(house) / "flask.py").write_text("raise ImportError('half of it is missing')", encoding="utf-8")
    write_stamp(house)
    broken = sentence(run(house, "--port", str(port)))
    assert broken == (
        "start.py: flask is broken (ImportError: half of it is missing): delete the folder .venv and run ./start.py."
    )
    (site_packages(house) / "flask.py").write_text("", encoding="utf-8")
    said = sentence(run(house, "--port", str(port)))
    assert "The server ended with status 1: ZeroDivisionError: division by zero" in said
    log = house / "data" / "failure.log"
    assert str(log) in said and "Traceback" in log.read_text(encoding="utf-8")


def test_a_model_that_cannot_be_loaded_is_told_while_the_page_stays(house: Path, port: int) -> None:
    process, said = begin(house, "--port", str(port), until="Faces are drawn at", TEST_STATE="FAILED")
    with process:
        assert process.stderr is not None
        told = process.stderr.readline()
        assert told.startswith("start.py: The model could not be loaded: it is green (all of it is in ")
        assert machine.answers("127.0.0.1", port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_taken_port(house: Path, taken: int) -> None:
    said = sentence(run(house, "--port", str(taken)))
    assert f"Port {taken} is already taken by another program" in said
    other = int(re.findall(r"--port (\d+)", said)[0])
    assert machine.port_problem("127.0.0.1", other) is None


def test_foreign_address(house: Path) -> None:
    said = sentence(run(house, "--host", "192.0.2.1", "--insecure"))
    assert "--host 192.0.2.1 is no address of this machine" in said
    assert "--host 127.0.0.1" in said


def test_missing_model(house: Path) -> None:
    said = sentence(run(house, "--model", "ffhq"))
    assert "There is no model 'ffhq'" in said
    assert "found: celeba128" in said
    assert "--model celeba128" in said
    (house / "models" / "celeba128" / "unet" / "model.safetensors").unlink()
    assert "not complete (missing: unet/model.safetensors)" in sentence(run(house))
    shutil.rmtree(house / "models")
    assert "found: none" in sentence(run(house))


def test_a_model_may_be_a_path(house: Path, tmp_path: Path) -> None:
    moved = shutil.move(house / "models" / "celeba128", tmp_path / "mine")
    assert model_check.model_problem(house, str(moved)) is None
    assert model_check.model_folder(house, str(moved)) == tmp_path / "mine"


def test_an_open_network_needs_a_key(house: Path) -> None:
    said = sentence(run(house, "--host", "0.0.0.0"))
    assert "--api-key" in said and "--insecure" in said
    parse = start.command_line({}).parse_args
    for words in (["--api-key", "x"], ["--insecure"]):
        assert start.exposure_problem(parse(["--host", "0.0.0.0", *words])) is None
    assert start.exposure_problem(start.command_line({"FACES_API_KEY": "x"}).parse_args(["--host", "::"])) is None
    for host in ("127.0.0.1", "::1", "localhost"):
        assert start.exposure_problem(parse(["--host", host])) is None


def test_too_little_memory() -> None:
    said = machine.memory_problem(machine.GIB // 2)
    assert said and "Only 0.5 GiB of memory are free and 1.5 GiB are needed" in said
    assert machine.memory_problem(16 * machine.GIB) is None
    assert machine.memory_problem(None) is None
    free = machine.free_memory()
    assert free is not None and 2**24 < free < 2**50


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert machine.container_memory(tmp_path) is None
    texts = {"memory.max": "1000000", "memory.current": "700000", "memory.stat": "anon 5\ninactive_file 200000\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "\n", encoding="ascii")
    assert machine.container_memory(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert machine.container_memory(tmp_path) is None


def test_health_is_asked_past_any_proxy(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            return

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{taken}")
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert machine.answers("127.0.0.1", server.server_port)
        assert machine.answers("0.0.0.0", server.server_port)
        server.shutdown()
        thread.join()
    assert not machine.answers("127.0.0.1", server.server_port)


def test_the_data_folder_is_checked(house: Path, tmp_path: Path, port: int) -> None:
    (tmp_path / "diary").write_text("mine", encoding="utf-8")
    said = sentence(run(house, "--port", str(port), "--data-dir", "diary/pictures"))
    assert f"{tmp_path / 'diary'} is no folder" in said and "--data-dir" in said
    full = machine.folder_problem(tmp_path / "not" / "yet", 2**70, "--data-dir")
    assert full and re.search(r"Only \d+ MB are free on the disk of .* and \d+ MB are needed", full)
    assert machine.folder_problem(tmp_path / "not" / "yet", 1, "--data-dir") is None
    assert not (tmp_path / "not").exists(), "a check makes nothing"
    if Path("/proc/self").is_dir():  # nobody may write there, not even root
        denied = machine.folder_problem(Path("/proc/pictures"), 1, "--data-dir")
        assert denied and "/proc/pictures cannot be written to (" in denied


@posix
def test_little_room_keeps_nobody_from_a_gallery_where_some_can_be_made(house: Path, tmp_path: Path, port: int) -> None:
    text = (house / "start.py").read_text(encoding="utf-8")
    (house / "start.py").write_text(text.replace("DATA_NEEDED = 256 * 10**6", "DATA_NEEDED = 2**60"), encoding="utf-8")
    words = ("--port", str(port), "--data-dir", "kept")
    assert "MB are free on the disk of" in sentence(run(house, *words))
    Store(tmp_path / "kept").close()
    process, said = begin(house, *words)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    process.communicate()
    assert "Little room for new images, old ones can be deleted. Only " in said


# ---- a phone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host, tty", [("0.0.0.0", True), ("0.0.0.0", False), ("192.168.1.7", True), ("::1", True)])
def test_a_phone_gets_the_address_and_its_code(
    host: str, tty: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "lan_address", lambda: "192.168.1.7")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    options = start.command_line({}).parse_args(["--host", host, "--api-key", "a/b", "--no-browser"])
    start.show_addresses(ROOT, options)
    said = capfd.readouterr().out
    outside = "http://192.168.1.7:5001/session?key=a%2Fb"
    assert (outside in said) == (host != "::1")
    shown = said[said.index("\033") :].splitlines() if "\033" in said else []
    assert bool(shown) == (tty and host != "::1")
    if shown:
        assert read_code(shown) == [list(row) for row in segno.make(outside, error="l", micro=False).matrix]


@pytest.mark.parametrize(
    ("answering", "printed"),
    [(["192.168.1.7", "2001:db8::7"], "http://192.168.1.7:5001/"), (["2001:db8::7"], "http://[2001:db8::7]:5001/")],
)
def test_a_phone_gets_an_address_that_answers(
    answering: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server on `::` takes IPv4 only where the system lets it."""
    own = {socket.AF_INET: "192.168.1.7", socket.AF_INET6: "2001:db8::7"}
    monkeypatch.setattr(machine, "lan_address", lambda family=socket.AF_INET: own[family])
    monkeypatch.setattr(machine, "answers", lambda host, port: host in answering)
    start.show_addresses(ROOT, start.command_line({}).parse_args(["--host", "::", "--insecure", "--no-browser"]))
    assert f"another computer:  {printed}\n" in capfd.readouterr().out


def test_a_host_has_one_spelling() -> None:
    for text in ("::", "[::]", "0:0:0:0:0:0:0:0"):
        assert start.command_line({}).parse_args(["--host", text]).host == "::"
        assert start.command_line({"FACES_HOST": text}).parse_args([]).host == "::"
        assert api.parse_arguments(["--host", text, "--insecure"]).host == "::"
    assert start.command_line({}).parse_args(["--host", "localhost"]).host == "localhost"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no socket for both")
def test_a_port_that_is_taken_in_ipv4_is_taken_for_both(taken: int) -> None:
    assert f"Port {taken} is already taken" in (machine.port_problem("::", taken) or "")


def read_code(lines: list[str]) -> list[list[int]]:
    """The modules of a code as a camera sees them, without the margin of four."""
    assert lines[0].startswith("\033[38;5;231;48;5;16m") and lines[-1].endswith("\033[0m"), "white on black, stated"
    plain = [line for coded in lines if (line := re.sub(r"\033\[[0-9;]*m", "", coded))]
    dark = [[int(glyph not in half) for glyph in line] for line in plain for half in ("▀█", "▄█")]
    size = len(dark[0]) - 8
    assert not any(map(any, dark[:4] + dark[4 + size : 8 + size])), "the margin is not white"
    return [row[4:-4] for row in dark[4 : 4 + size]]


def test_a_machine_without_network_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "lan_address", lambda *family: None)
    start.show_addresses(ROOT, start.command_line({}).parse_args(["--host", "::", "--insecure", "--no-browser"]))
    said = capfd.readouterr().out
    assert "http://[::1]:5001/" in said and "this machine is in no network" in said


# ---- the command line ------------------------------------------------------------------------------------------------


def test_help_needs_nothing_installed(house: Path) -> None:
    shutil.rmtree(house / ".venv")
    answer = run(house, "--help")
    assert answer.returncode == 0 and answer.stderr == ""
    flags = "--host --port --device --model --data-dir --api-key --threads --no-browser --offline".split()
    assert all(flag in answer.stdout for flag in (*flags, "./start.py test", "./start.py doctor"))


def test_every_flag_has_a_twin_and_the_flag_wins() -> None:
    values = {"HOST": "::1", "PORT": "80", "DEVICE": "cuda:1", "MODEL": "m", "DATA_DIR": "d", "API_KEY": "k"}
    values |= {"THREADS": "3", "NO_BROWSER": "1", "OFFLINE": "yes", "INSECURE": "true", "TORCH_INDEX": "https://x/cpu",
               "NO_WATERMARK": "1", "ALLOW_HOST": "a.example", "CORS_ORIGIN": "https://a.example, https://b.example",
               "TRUSTED_PROXY": "127.0.0.1", "IMAGE_SIZE": "256", "BROKER": "redis://r", "SENTINEL_MASTER": "m",
               "ENGINE_HERE": "1"}
    told = vars(start.command_line({"FACES_" + name: value for name, value in values.items()}).parse_args([]))
    assert told.pop("command") == "run"
    assert {name.upper(): str(value) for name, value in told.items()} == {
        **values, "NO_BROWSER": "True", "OFFLINE": "True", "INSECURE": "True", "NO_WATERMARK": "True",
        "ENGINE_HERE": "True", "ALLOW_HOST": "['a.example']", "CORS_ORIGIN": "['https://a.example', 'https://b.example']",
        "TRUSTED_PROXY": "['127.0.0.1']", "MODEL": "['m']",
    }
    assert start.command_line({"FACES_PORT": "80"}).parse_args(["--port", "81"]).port == 81
    plain = start.command_line({"FACES_OFFLINE": "0", "FACES_HOST": ""}).parse_args([])
    assert (plain.host, plain.port, plain.offline, plain.no_browser) == ("127.0.0.1", 5001, False, False)


def test_names_may_come_several_times_and_reach_the_server(tmp_path: Path) -> None:
    words = ["--allow-host", "a", "--allow-host", "b,c", "--cors-origin", "https://d", "--trusted-proxy", "::1"]
    options = start.command_line({"FACES_ALLOW_HOST": "z", "FACES_CORS_ORIGIN": "https://z"}).parse_args(words)
    assert (options.allow_host, options.cors_origin) == (["a", "b", "c"], ["https://d"]), "the flag wins"
    command = start.server_command(tmp_path, options)
    told = api.parse_arguments(command[2:])
    assert (told.allow_host, told.cors_origin) == (["a", "b", "c"], ["https://d"])
    assert [str(one) for one in told.trusted_proxy] == ["::1/128"]


def test_the_brokers_address_is_in_no_list_of_processes(tmp_path: Path) -> None:
    """It may hold a password: the server reads it from its environment."""
    words = ["--broker", "redis://:secret@r:6379", "--engine-here", "--sentinel-master", "m"]
    command = start.server_command(tmp_path, start.command_line({}).parse_args(words))
    assert "secret" not in " ".join(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACES_BROKER", words[1])
        told = api.parse_arguments(command[2:])
    assert (told.broker, told.engine_here, told.sentinel_master) == (words[1], True, "m")


def test_a_worker_is_run_with_the_models_and_the_broker(house: Path) -> None:
    code = "import os, sys\nprint(sys.argv[1:], os.environ['FACES_BROKER'], file=sys.stderr)\n"
    (house / "worker.py").write_text(code, encoding="utf-8")
    answer = run(house, "worker", "--broker", "redis://:secret@r:6379", "--device", "cpu", FACES_OFFLINE="1")
    assert answer.returncode == 0, answer.stderr
    model = str(house / "models" / "celeba128")
    words = ["--device", "cpu", "--model", model, "--sentinel-master", "mymaster"]
    assert answer.stderr == f"{words} redis://:secret@r:6379\n"
    assert "secret" not in answer.stdout


def test_what_keeps_a_worker_from_working_is_a_sentence(house: Path) -> None:
    assert "./start.py worker --broker redis://host:6379" in sentence(run(house, "worker", FACES_OFFLINE="1"))
    (house / "worker.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    ended = sentence(run(house, "worker", FACES_OFFLINE="1", FACES_BROKER="redis://r"))
    assert "The worker ended by itself with status 3" in ended
    (house / WORKER_REQUIREMENTS).write_text("celery==5.6.3\n", encoding="utf-8")
    refused = sentence(run(house, "worker", FACES_OFFLINE="1", FACES_BROKER="redis://r"))
    assert "celery 5.6.3 is missing" in refused


@pytest.mark.parametrize("name, value", [("PORT", "65536"), ("PORT", "http"), ("THREADS", "-1"), ("DEVICE", "tpu")])
def test_a_bad_value_is_named(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        start.command_line({"FACES_" + name: value}).parse_args([])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert repr(value) in said and f"--{name.lower()} or FACES_{name}" in said


# ---- which Python ----------------------------------------------------------------------------------------------------


def test_python_too_old_or_too_new() -> None:
    assert [python_problem((3, minor)) for minor in range(10, 14)] == [None] * 4
    old, new = python_problem((3, 9)), python_problem((3, 14))
    assert old and old.startswith("Python 3.9 is too old: install Python 3.10 to 3.13 from https://")
    assert new and new.startswith("Python 3.14 is newer than the pinned packages support: install Python 3.10 to 3.13")


def test_another_python_is_used_where_there_is_one(house: Path) -> None:
    code = "import sys; sys.version_info = (3, 9, 1, 'final', 0); import start; sys.exit(start.main(sys.argv[1:]))"

    def old(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PATH": ""}
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=house, env=env)

    answer = old("--help")  # by the environment's own Python
    assert answer.returncode == 0 and "./start.py doctor" in answer.stdout
    assert f"Using {venv_python(house)}" in answer.stdout
    shutil.rmtree(house / ".venv")
    answer = old("doctor")
    assert answer.returncode == 1 and answer.stderr.startswith("start.py: Python 3.9 is too old")


def test_a_python_that_does_not_run_is_no_python(tmp_path: Path) -> None:
    assert python_version(sys.executable) == sys.version_info[:2]
    assert python_version(tmp_path / "python") is None
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'no such version' >&2\nexit 127\n", encoding="ascii")
    shim.chmod(0o755)
    assert python_version(shim) is None


# ---- the environment -------------------------------------------------------------------------------------------------


def test_what_makes_the_environment_incomplete(house: Path) -> None:
    assert incomplete(house) is None
    requirements = house / REQUIREMENTS
    text = "# why\nTorch==2.14.1  # networks\nflask-cors==6.0.2\ntyping_extensions==4.16.0\n"
    text += 'openvino==2026.4.1; platform_machine == "abacus"  # pip decides, not we\n'
    requirements.write_text(text, encoding="utf-8")
    assert pins(requirements) == {"Torch": "2.14.1", "flask-cors": "6.0.2", "typing_extensions": "4.16.0"}
    assert incomplete(house) == "Torch 2.14.1 is missing"
    for name in ("torch-2.14.1+cpu", "flask_cors-6.0.1", "typing_extensions-4.16.0"):
        (site_packages(house) / f"{name}.dist-info").mkdir()
        (site_packages(house) / f"{name}.dist-info" / "METADATA").touch()
    have = {"torch": "2.14.1+cpu", "flask-cors": "6.0.1", "typing-extensions": "4.16.0"}
    assert installed(house) == have
    assert incomplete(house) == "flask-cors 6.0.2 is wanted and 6.0.1 is there"
    requirements.write_text("torch==2.14.1\ntyping_extensions==4.16.0\n", encoding="utf-8")
    assert incomplete(house) == "requirements.txt is new or has changed"
    write_stamp(house)
    assert incomplete(house) is None
    (house / TEST_REQUIREMENTS).write_text("# more\n", encoding="utf-8")
    assert incomplete(house) is None, "a user needs no test tools"
    both = (REQUIREMENTS, TEST_REQUIREMENTS)
    assert incomplete(house, both) == "tests/requirements.txt is new or has changed"
    (house / ".venv" / STAMP).write_text("[]", encoding="utf-8")
    assert incomplete(house) == "requirements.txt is new or has changed"
    venv_python(house).unlink()
    assert incomplete(house) == "the environment in .venv does not run"
    shutil.rmtree(house / ".venv")
    assert incomplete(house) == "there is no environment in .venv yet"


def test_offline_says_what_is_missing(house: Path) -> None:
    (house / REQUIREMENTS).write_text("torch==2.14.1\n", encoding="utf-8")
    said = sentence(run(house, FACES_OFFLINE="1"))
    assert "torch 2.14.1 is missing" in said and "--offline" in said


def test_prepare_installs_proves_and_remembers(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole life of an environment with the real pip: made anew, installed, remembered, broken, refused."""
    usual, cpu = tmp_path / "usual", tmp_path / "cpu"
    write_wheel(usual, "torch", "2.14.1")
    write_wheel(usual, "torchvision", "0.29.2", "raise RuntimeError('operator torchvision::nms does not exist')\n")
    write_wheel(usual, "flask", "3.1.3")
    write_wheel(cpu, "torch", "2.14.1+cpu")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", usual.as_uri())
    monkeypatch.setattr("launcher.environment.DISK_NEEDED", {True: 0, False: 0})
    venv_python(house).unlink()  # as after an upgrade of the system's Python
    requirements = house / REQUIREMENTS
    requirements.write_text("torch==2.14.1\nflask==3.1.3\n", encoding="utf-8")

    prepare(house, torch_index=cpu.as_uri())
    said = capfd.readouterr()
    assert installed(house)["torch"] == "2.14.1+cpu", "the usual index has another build"
    assert "the environment in .venv does not run" in said.out
    assert "Successfully installed" in said.out, "pip's progress is in sight"
    assert incomplete(house) is None
    prepare(house, offline=True)
    assert capfd.readouterr().out == "", "the second time there is nothing to do"

    requirements.write_text("torch==2.14.1\ntorchvision==0.29.2\nflask==3.1.3\n", encoding="utf-8")
    with pytest.raises(Problem) as broken:
        prepare(house)
    told = str(broken.value)
    assert "torchvision 0.29.2 was built for another torch than the 2.14.1+cpu here" in told
    assert "operator torchvision::nms does not exist" in told
    assert "torch==2.14.1 torchvision==0.29.2 --index-url https://download.pytorch.org/whl/cpu'" in told
    assert incomplete(house), "what cannot be imported is not complete"

    requirements.write_text("torch==2.14.1\ngrimace==9.9\n", encoding="utf-8")
    with pytest.raises(Problem, match="There is no ready build of grimace==9.9 for this machine"):
        prepare(house)

    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody answers
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(Problem, match="no network: connect to the internet"):
        prepare(house)


def test_a_full_disk_is_told_before_the_download(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.environment.DISK_NEEDED", {True: 2**60, False: 2**60})
    (house / REQUIREMENTS).write_text("torch==2.14.1\n", encoding="utf-8")
    with pytest.raises(Problem, match=r"Only [\d.]+ GiB are free .* the packages need 1073741824 GiB"):
        prepare(house)


def test_a_folder_that_is_no_environment_is_left_alone(house: Path) -> None:
    shutil.rmtree(house / ".venv")
    (house / ".venv").mkdir()
    (house / ".venv" / "diary.txt").write_text("mine", encoding="utf-8")
    assert "is no virtual environment: move it away" in sentence(run(house))
    assert (house / ".venv" / "diary.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("said, remedy", [
    ("OSError: [Errno 28] No space left on device", "free some gigabytes"),
    ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "PIP_CERT"),
    ("NameResolutionError(...): Failed to resolve 'pypi.org'\nERROR: No matching distribution found for x", "internet"),
    ("ReadTimeoutError: HTTPSConnectionPool(host='files.pythonhosted.org', port=443): Read timed out.", "internet"),
    ("ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied", "end programs"),
    ("ERROR: No matching distribution found for torch==2.14.1 (from versions: none)", "64-bit Python 3.10 to 3.13"),
    ("ERROR: something else", "delete the folder .venv"),
])
def test_what_pip_said_becomes_a_sentence(said: str, remedy: str) -> None:
    told = explain_install(said)
    assert remedy in told and "\n" not in told


def test_what_keeps_a_package_from_importing_becomes_a_sentence(house: Path) -> None:
    (house / REQUIREMENTS).write_text("torch==2.14.1\ntorchvision==0.29.2\n", encoding="utf-8")

    def told(name: str, error: str) -> list[str]:
        packages = {"torch": {"version": "2.14.1", "error": None}, "torchvision": {"version": "0.29.2", "error": None}}
        return import_problems(house, {"packages": {**packages, name: {"version": "1", "error": error}}})

    assert told("torch", "") == []
    assert "vc_redist.x64.exe" in told("torch", "OSError: [WinError 126] The specified module could not be found")[0]
    assert "Run ./start.py" in told("flask", "PackageNotFoundError: No package metadata was found for flask")[0]
    symbol = "ImportError: _C.so: undefined symbol: _ZN3c104cuda9SetDevice"
    assert "mend both with" in told("torchvision", symbol)[0]
    assert "--index-url" not in told("torchvision", symbol)[0], "a torch from the usual index is mended from there"
    assert "delete the folder .venv" in told("numpy", "ImportError: cannot import name 'x'")[0]


def test_an_import_that_kills_the_process_is_named(house: Path) -> None:
    (house / REQUIREMENTS).write_text("calm==1\nfatal==1\nlater==1\n", encoding="utf-8")
    for name, code in (("calm", ""), ("fatal", "import os\nos.abort()\n"), ("later", "")):
        (site_packages(house) / f"{name}.py").write_text(code, encoding="utf-8")
        (site_packages(house) / f"{name}-1.dist-info").mkdir()
        (site_packages(house) / f"{name}-1.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n", encoding="utf-8")
    found = probe(house)
    assert found["packages"]["calm"] == {"version": "1", "error": None}
    problems = import_problems(house, found)
    assert len(problems) == 1 and problems[0].startswith("fatal is broken (the interpreter died while importing it")


# ---- test and doctor -------------------------------------------------------------------------------------------------


def test_test_runs_all_three_tools_and_returns_the_worst(house: Path) -> None:
    for tool, status in (("ruff", 0), ("mypy", 2), ("pytest", 1)):
        code = f"import sys\nprint('{tool}', sys.argv[1:])\nsys.exit({status})\n"
        (site_packages(house) / f"{tool}.py").write_text(code, encoding="utf-8")
    answer = run(house, "test", "tests/test_x.py", "-k", "one or two", FACES_OFFLINE="1")
    assert answer.returncode == 2, answer.stderr
    assert "pytest ['tests/test_x.py', '-k', 'one or two']" in answer.stdout
    last = answer.stdout.splitlines()[-1]
    assert re.sub(r" in \d+ s", "", last) == "ruff passed, mypy failed with status 2, pytest failed with status 1"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_a_tool_that_crashes_says_where(house: Path) -> None:
    """In the stream of the tests, so that the line of the crash follows the name of the test."""
    crash = "import faulthandler, os, sys\nfaulthandler.enable()\nprint('tests/test_x.py', flush=True)\nos.abort()\n"
    for tool, code in (("ruff", ""), ("mypy", ""), ("pytest", crash)):
        (site_packages(house) / f"{tool}.py").write_text(code, encoding="utf-8")
    answer = run(house, "test", FACES_OFFLINE="1")
    assert answer.returncode == 128 + signal.SIGABRT
    where = answer.stdout.partition("tests/test_x.py\n")[2]
    assert "Fatal Python error: Aborted" in where and "line 4 in <module>" in where
    assert where.splitlines()[-1].startswith("ruff passed in ") and " pytest was ended by signal 6 in " in where


def test_doctor_tells_the_truth_about_this_machine(port: int) -> None:
    """The real environment, whatever its state: what the doctor prints is what torch says."""
    command = [sys.executable, str(ROOT / "start.py"), "doctor", "--port", str(port)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.stderr == ""
    lines = dict(re.findall(r"^([a-z]+(?: [a-z]+)?) {2,}(.+)$", answer.stdout, flags=re.MULTILINE))
    assert {"system", "memory", "disk", "environment", "packages", "device", "models", "data"} <= set(lines)
    version = python_version(venv_python(ROOT))
    assert version and lines["environment"].startswith(".venv with Python {}.{}".format(*version))
    for name, got in installed(ROOT).items():
        if name in pins(ROOT / REQUIREMENTS):
            assert f"{name} {got}" in lines["packages"]
    assert re.fullmatch(r"(cuda \(.+\)|mps|cpu), \d+ CPU threads", lines["device"])
    openvino = installed(ROOT).get("openvino")
    drawn = f"OpenVINO {openvino}" if openvino and lines["device"].startswith("cpu") else "torch"
    assert lines["engine"].split(";")[0] == drawn
    healthy = "Nothing is wrong." in answer.stdout
    assert answer.returncode == (0 if healthy else 1)
    assert healthy == ("\n1. " not in answer.stdout)


def test_doctor_names_each_trouble_and_its_remedy(house: Path, taken: int) -> None:
    shutil.rmtree(house / ".venv")
    shutil.rmtree(house / "models")
    answer = run(house, "doctor", "--port", str(taken))
    assert answer.returncode == 1 and answer.stderr == ""
    problems = re.findall(r"^\d\. (.*)$", answer.stdout, flags=re.MULTILINE)
    assert len(problems) == 3
    assert "there is no environment in .venv yet): run ./start.py" in problems[0]
    assert "There is no model 'celeba128'" in problems[1]
    assert f"Port {taken} is already taken" in problems[2]


def test_doctor_finds_a_healthy_house_healthy(house: Path, port: int) -> None:
    answer = run(house, "doctor", "--port", str(port))
    assert "Nothing is wrong." in answer.stdout
    assert answer.returncode == 0


def test_doctor_says_which_parts_of_a_model_do_not_belong_together(house: Path, port: int) -> None:
    """After a component was replaced: nothing would be drawn, and the doctor must not call that healthy."""
    model = house / "models" / "celeba128"
    (model / "clip" / "model.safetensors").write_bytes(NO_WEIGHTS[:-1] + b" ")
    answer = run(house, "doctor", "--port", str(port))
    assert answer.returncode == 1 and answer.stderr == ""
    assert "model.safetensors is damaged or was exchanged" in answer.stdout
    (model / "clip" / "model.safetensors").write_bytes(NO_WEIGHTS)
    parents = {"parents": {"clip": "another", "vae": None}}
    (model / "unet" / "config.json").write_text(json.dumps(parents), encoding="utf-8")
    answer = run(house, "doctor", "--port", str(port))
    assert re.search(r"^1\. The unet in .* was made for another clip than the one there: train it", answer.stdout, re.M)
    assert answer.returncode == 1


def test_doctor_counts_the_jobs_and_says_what_is_wrong_with_them(house: Path, tmp_path: Path, port: int) -> None:
    store = Store(tmp_path / "kept")
    JobQueue(store).submit("a face", {}, {})

    def ask() -> subprocess.CompletedProcess[str]:
        return run(house, "doctor", "--port", str(port), "--data-dir", "kept")

    answer = ask()
    assert "1. Another server is using" in answer.stdout and answer.returncode == 1
    store.close()
    answer = ask()
    assert re.search(rf"^data +{tmp_path / 'kept'}, 2 MB, jobs: 1 unfinished; [\d.]+ GiB free$", answer.stdout, re.M)
    assert "Nothing is wrong." in answer.stdout
    (tmp_path / "kept" / "jobs.sqlite3").write_bytes(b"not a database" * 1000)
    answer = ask()
    assert re.search(r"^1\. The job database .* is damaged", answer.stdout, re.M) and answer.stderr == ""


def test_the_benchmark_walks_and_writes_its_section(house: Path, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-C", str(house)]
    (house / ".gitignore").write_text(".venv\n", encoding="utf-8")
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    folder = benchmark_start.clone(house, tmp_path / "clone")
    assert not (folder / ".venv").exists()
    (folder / ".venv").symlink_to(house / ".venv", target_is_directory=True)
    walked = benchmark_start.walk(folder, "--offline")
    assert walked.device == "cpu" and all(0 < leg < 60 for leg in (walked.environment, walked.page, walked.stop))
    document = tmp_path / "docs" / "benchmarks.md"
    for text in ("first", benchmark_start.table(walked, walked, benchmark_start.circumstances(folder, "cpu"))):
        benchmark_start.record(text, document)
    written = document.read_text(encoding="utf-8")
    assert written.count("## From nothing to a face") == 1 and "first\n" not in written
    assert len(re.findall(r"^\| .* \| [\d.]+ \| [\d.]+ \|$", written, re.M)) == 8


def test_the_device_is_checked_without_importing_torch(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site_packages(house) / "torch").mkdir()
    build = site_packages(house) / "torch" / "version.py"
    (site_packages(house) / "torch-2.14.1.dist-info").mkdir()
    (site_packages(house) / "torch-2.14.1.dist-info" / "METADATA").touch()
    gpus: list[str] = []
    monkeypatch.setattr("launcher.environment.nvidia_gpus", lambda: gpus)
    build.write_text("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", encoding="utf-8")
    assert torch_cuda_build(house) == "13.0"
    assert quick_device_problem(house, "auto") is None
    assert "finds no such device" in (quick_device_problem(house, "cuda") or "")
    gpus += ["NVIDIA H200", "NVIDIA H200"]
    assert quick_device_problem(house, "cuda:1") is None
    assert "the last GPU is cuda:1" in (quick_device_problem(house, "cuda:2") or "")
    build.write_text("cuda: Optional[str] = None\n", encoding="utf-8")
    assert "CPU-only build" in (quick_device_problem(house, "auto") or "")
    assert quick_device_problem(house, "cpu") is None


def test_an_unused_or_absent_accelerator_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    none = {"cuda": [], "mps": False, "cuda_build": None}
    assert device_problem(none, "2.14.1+cpu", "auto") is None
    for wanted in ("cuda:1", "mps"):
        assert f"--device {wanted} was asked for" in (device_problem(none, "2.14.1+cpu", wanted) or "")
    assert device_problem({**none, "mps": True}, "2.14.1", "mps") is None
    if os.name != "nt":
        driver = tmp_path / "nvidia-smi"
        driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n", encoding="ascii")
        driver.chmod(0o755)
        assert "CPU-only build" in (device_problem(none, "2.14.1+cpu", "auto") or "")
        old = device_problem({**none, "cuda_build": "13.0"}, "2.14.1", "auto")
        assert old and "driver is older than CUDA 13.0" in old
        assert device_problem({**none, "cuda": ["NVIDIA H200"], "cuda_build": "13.0"}, "2.14.1", "cuda") is None
        assert nvidia_gpus() == ["NVIDIA H200"]
