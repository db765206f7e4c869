"""Does one command prepare, check and start, and is every failure one clear sentence?

Most tests run the real start.py in a small house: a folder with start.py, an environment of its own and a server of ten
lines, so that no test waits for torch. pip is the real pip; its packages are wheels written by the test.
"""

from __future__ import annotations

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
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import start
from core import environment, machine

ROOT = Path(__file__).resolve().parent.parent
SERVER = """
import http.server, json, os, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"words": sys.argv[1:], "key": os.environ.get("FACES_API_KEY")}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


def site_packages(root: Path) -> Path:
    """Where the environment of a house keeps its packages."""
    return next((root / ".venv").glob("[Ll]ib/**/site-packages"))


def write_stamp(root: Path) -> None:
    """Say that what the house's requirement files name now is installed."""
    files = (environment.REQUIREMENTS, environment.TEST_REQUIREMENTS)
    (root / ".venv" / environment.STAMP).write_text(json.dumps(environment.hashes(root, files)), encoding="utf-8")


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
    for name in ("start.py", "core/__init__.py", "core/environment.py", "core/machine.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "api.py").write_text(SERVER, encoding="utf-8")
    for name in (environment.REQUIREMENTS, environment.TEST_REQUIREMENTS):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("# nothing\n", encoding="utf-8")
    for part in start.COMPONENTS:
        (root / "models" / "celeba128" / part).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (root / "models" / "celeba128" / part / file).write_text("{}", encoding="utf-8")
    (root / "models" / "celeba128" / "model_index.json").write_text("{}", encoding="utf-8")
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


def begin(root: Path, *words: str, **env: str) -> tuple[subprocess.Popen[str], str]:
    """./start.py in a house until it says where it serves; returns the process and that address."""
    command = [sys.executable, str(root / "start.py"), "--no-browser", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    assert process.stdout is not None
    for line in process.stdout:
        if "http://" in line:
            return process, re.findall(r"http://\S+", line)[0]
    raise AssertionError(f"ended with {process.wait()}")


def test_start_serves_says_where_and_takes_the_server_along(house: Path, port: int) -> None:
    process, address = begin(house, "--threads", "2", "--api-key", "secret", FACES_PORT=str(port), FACES_DEVICE="cpu")
    with process:
        try:
            assert address == f"http://127.0.0.1:{port}/session?key=secret", "the browser gets its cookie there"
            with urllib.request.urlopen(address) as answer:
                told = json.load(answer)
            flags = dict(zip(told["words"][::2], told["words"][1::2], strict=True))
            assert flags == {
                "--host": "127.0.0.1",
                "--port": str(port),
                "--device": "cpu",
                "--model": str(house / "models" / "celeba128"),
                "--data-dir": str(house / "data"),
                "--threads": "2",
            }
            assert told["key"] == "secret", "the key travels in the environment: command lines are public"
            again = sentence(run(house, "--port", str(port)))
            assert f"Port {port} is already taken, and a server answers: open http://127.0.0.1:{port}/" in again
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert machine.port_problem("127.0.0.1", port) is None, "the server went on alone"


def test_a_server_that_ends_at_once_is_told(house: Path, port: int) -> None:
    (house / "api.py").write_text("raise SystemExit(3)", encoding="utf-8")
    assert "ended with status 3" in sentence(run(house, "--port", str(port)))


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
    assert start.model_problem(house, str(moved)) is None
    assert start.model_folder(house, str(moved)) == tmp_path / "mine"


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


# ---- the command line ------------------------------------------------------------------------------------------------


def test_help_needs_nothing_installed(house: Path) -> None:
    shutil.rmtree(house / ".venv")
    answer = run(house, "--help")
    assert answer.returncode == 0 and answer.stderr == ""
    flags = "--host --port --device --model --data-dir --api-key --threads --no-browser --offline".split()
    assert all(flag in answer.stdout for flag in (*flags, "./start.py test", "./start.py doctor"))


def test_every_flag_has_a_twin_and_the_flag_wins() -> None:
    values = {"HOST": "::1", "PORT": "80", "DEVICE": "cuda:1", "MODEL": "m", "DATA_DIR": "d", "API_KEY": "k"}
    values |= {"THREADS": "3", "NO_BROWSER": "1", "OFFLINE": "yes", "INSECURE": "true", "TORCH_INDEX": "https://x/cpu"}
    told = vars(start.command_line({"FACES_" + name: value for name, value in values.items()}).parse_args([]))
    assert told.pop("command") == "run"
    assert {name.upper(): str(value) for name, value in told.items()} == {
        **values, "NO_BROWSER": "True", "OFFLINE": "True", "INSECURE": "True"
    }
    assert start.command_line({"FACES_PORT": "80"}).parse_args(["--port", "81"]).port == 81
    plain = start.command_line({"FACES_OFFLINE": "0", "FACES_HOST": ""}).parse_args([])
    assert (plain.host, plain.port, plain.offline, plain.no_browser) == ("127.0.0.1", 5001, False, False)


@pytest.mark.parametrize("name, value", [("PORT", "65536"), ("PORT", "http"), ("THREADS", "-1"), ("DEVICE", "tpu")])
def test_a_bad_value_is_named(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        start.command_line({"FACES_" + name: value}).parse_args([])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert repr(value) in said and f"--{name.lower()} or FACES_{name}" in said


# ---- which Python ----------------------------------------------------------------------------------------------------


def test_python_too_old_or_too_new() -> None:
    assert [environment.python_problem((3, minor)) for minor in range(10, 14)] == [None] * 4
    old, new = environment.python_problem((3, 9)), environment.python_problem((3, 14))
    assert old and old.startswith("Python 3.9 is too old: install Python 3.10 to 3.13 from https://")
    assert new and new.startswith("Python 3.14 is newer than the pinned packages support: install Python 3.10 to 3.13")


def test_another_python_is_used_where_there_is_one(
    house: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "ROOT", house)
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    monkeypatch.setenv("PATH", "")
    assert start.main(["--help"]) == 0  # by the environment's own Python
    assert f"Using {environment.venv_python(house)}" in capfd.readouterr().out
    shutil.rmtree(house / ".venv")
    assert start.main(["doctor"]) == 1
    assert capfd.readouterr().err.startswith("start.py: Python 3.9 is too old")


def test_a_python_that_does_not_run_is_no_python(tmp_path: Path) -> None:
    assert environment.python_version(sys.executable) == sys.version_info[:2]
    assert environment.python_version(tmp_path / "python") is None
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'no such version' >&2\nexit 127\n", encoding="ascii")
    shim.chmod(0o755)
    assert environment.python_version(shim) is None


# ---- the environment -------------------------------------------------------------------------------------------------


def test_what_makes_the_environment_incomplete(house: Path) -> None:
    assert environment.incomplete(house) is None
    requirements = house / environment.REQUIREMENTS
    requirements.write_text("# why\nTorch==2.14.1  # networks\nflask-cors==6.0.2\n", encoding="utf-8")
    assert environment.pins(requirements) == {"Torch": "2.14.1", "flask-cors": "6.0.2"}
    assert environment.incomplete(house) == "Torch 2.14.1 is missing"
    for name in ("torch-2.14.1+cpu", "flask_cors-6.0.1"):
        (site_packages(house) / f"{name}.dist-info").mkdir()
        (site_packages(house) / f"{name}.dist-info" / "METADATA").touch()
    assert environment.installed(house) == {"torch": "2.14.1+cpu", "flask-cors": "6.0.1"}
    assert environment.incomplete(house) == "flask-cors 6.0.2 is wanted and 6.0.1 is there"
    requirements.write_text("torch==2.14.1\n", encoding="utf-8")
    assert environment.incomplete(house) == "requirements.txt is new or has changed"
    write_stamp(house)
    assert environment.incomplete(house) is None
    (house / environment.TEST_REQUIREMENTS).write_text("# more\n", encoding="utf-8")
    assert environment.incomplete(house) is None, "a user needs no test tools"
    both = (environment.REQUIREMENTS, environment.TEST_REQUIREMENTS)
    assert environment.incomplete(house, both) == "tests/requirements.txt is new or has changed"
    (house / ".venv" / environment.STAMP).write_text("[]", encoding="utf-8")
    assert environment.incomplete(house) == "requirements.txt is new or has changed"
    environment.venv_python(house).unlink()
    assert environment.incomplete(house) == "the environment in .venv does not run"
    shutil.rmtree(house / ".venv")
    assert environment.incomplete(house) == "there is no environment in .venv yet"


def test_offline_says_what_is_missing(house: Path) -> None:
    (house / environment.REQUIREMENTS).write_text("torch==2.14.1\n", encoding="utf-8")
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
    monkeypatch.setattr(environment, "DISK_NEEDED", {True: 0, False: 0})
    environment.venv_python(house).unlink()  # as after an upgrade of the system's Python
    requirements = house / environment.REQUIREMENTS
    requirements.write_text("torch==2.14.1\nflask==3.1.3\n", encoding="utf-8")

    environment.prepare(house, torch_index=cpu.as_uri())
    said = capfd.readouterr()
    assert environment.installed(house)["torch"] == "2.14.1+cpu", "the usual index has another build"
    assert "the environment in .venv does not run" in said.out
    assert "Successfully installed" in said.out, "pip's progress is in sight"
    assert environment.incomplete(house) is None
    environment.prepare(house, offline=True)
    assert capfd.readouterr().out == "", "the second time there is nothing to do"

    requirements.write_text("torch==2.14.1\ntorchvision==0.29.2\nflask==3.1.3\n", encoding="utf-8")
    with pytest.raises(environment.Problem) as broken:
        environment.prepare(house)
    told = str(broken.value)
    assert "torchvision 0.29.2 was built for another torch than the 2.14.1+cpu here" in told
    assert "operator torchvision::nms does not exist" in told
    assert "torch==2.14.1 torchvision==0.29.2 --index-url https://download.pytorch.org/whl/cpu'" in told
    assert environment.incomplete(house), "what cannot be imported is not complete"

    requirements.write_text("torch==2.14.1\ngrimace==9.9\n", encoding="utf-8")
    with pytest.raises(environment.Problem, match="There is no ready build of grimace==9.9 for this machine"):
        environment.prepare(house)

    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody answers
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(environment.Problem, match="no network: connect to the internet"):
        environment.prepare(house)


def test_a_full_disk_is_told_before_the_download(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DISK_NEEDED", {True: 2**60, False: 2**60})
    (house / environment.REQUIREMENTS).write_text("torch==2.14.1\n", encoding="utf-8")
    with pytest.raises(environment.Problem, match=r"Only [\d.]+ GiB are free .* the packages need 1073741824 GiB"):
        environment.prepare(house)


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
    told = environment.explain_install(said)
    assert remedy in told and "\n" not in told


def test_what_keeps_a_package_from_importing_becomes_a_sentence(house: Path) -> None:
    (house / environment.REQUIREMENTS).write_text("torch==2.14.1\ntorchvision==0.29.2\n", encoding="utf-8")

    def told(name: str, error: str) -> list[str]:
        packages = {"torch": {"version": "2.14.1", "error": None}, "torchvision": {"version": "0.29.2", "error": None}}
        return environment.import_problems(house, {"packages": {**packages, name: {"version": "1", "error": error}}})

    assert told("torch", "") == []
    assert "vc_redist.x64.exe" in told("torch", "OSError: [WinError 126] The specified module could not be found")[0]
    assert "Run ./start.py" in told("flask", "PackageNotFoundError: No package metadata was found for flask")[0]
    symbol = "ImportError: _C.so: undefined symbol: _ZN3c104cuda9SetDevice"
    assert "mend both with" in told("torchvision", symbol)[0]
    assert "--index-url" not in told("torchvision", symbol)[0], "a torch from the usual index is mended from there"
    assert "delete the folder .venv" in told("numpy", "ImportError: cannot import name 'x'")[0]


def test_an_import_that_kills_the_process_is_named(house: Path) -> None:
    (house / environment.REQUIREMENTS).write_text("calm==1\nfatal==1\nlater==1\n", encoding="utf-8")
    for name, code in (("calm", ""), ("fatal", "import os\nos.abort()\n"), ("later", "")):
        (site_packages(house) / f"{name}.py").write_text(code, encoding="utf-8")
        (site_packages(house) / f"{name}-1.dist-info").mkdir()
        (site_packages(house) / f"{name}-1.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n", encoding="utf-8")
    found = environment.probe(house)
    assert found["packages"]["calm"] == {"version": "1", "error": None}
    problems = environment.import_problems(house, found)
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


def test_doctor_tells_the_truth_about_this_machine(port: int) -> None:
    """The real environment, whatever its state: what the doctor prints is what torch says."""
    command = [sys.executable, str(ROOT / "start.py"), "doctor", "--port", str(port)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.stderr == ""
    lines = dict(re.findall(r"^([a-z]+(?: [a-z]+)?) {2,}(.+)$", answer.stdout, flags=re.MULTILINE))
    assert {"system", "memory", "disk", "environment", "packages", "device", "models"} <= set(lines)
    version = environment.python_version(environment.venv_python(ROOT))
    assert version and lines["environment"].startswith(".venv with Python {}.{}".format(*version))
    for name, got in environment.installed(ROOT).items():
        if name in environment.pins(ROOT / environment.REQUIREMENTS):
            assert f"{name} {got}" in lines["packages"]
    assert re.fullmatch(r"(cuda \(.+\)|mps|cpu), \d+ CPU threads", lines["device"])
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


def test_an_unused_or_absent_accelerator_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    none = {"cuda": [], "mps": False, "cuda_build": None}
    assert start.device_problem(none, "2.14.1+cpu", "auto") is None
    for wanted in ("cuda:1", "mps"):
        assert f"--device {wanted} was asked for" in (start.device_problem(none, "2.14.1+cpu", wanted) or "")
    assert start.device_problem({**none, "mps": True}, "2.14.1", "mps") is None
    if os.name != "nt":
        driver = tmp_path / "nvidia-smi"
        driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n", encoding="ascii")
        driver.chmod(0o755)
        assert "CPU-only build" in (start.device_problem(none, "2.14.1+cpu", "auto") or "")
        old = start.device_problem({**none, "cuda_build": "13.0"}, "2.14.1", "auto")
        assert old and "driver is older than CUDA 13.0" in old
        assert start.device_problem({**none, "cuda": ["NVIDIA H200"], "cuda_build": "13.0"}, "2.14.1", "cuda") is None
