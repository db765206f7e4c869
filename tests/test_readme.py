"""Does every command that README and docs print work as it is printed, and does no process speak to anybody else?

One real server, with the bundled model and a home folder that is empty, is asked all that README asks of it, by bash
and curl; at the end its audit log must name no other host and no file outside the project and its data. The same log is
kept of `doctor`, of both engines and of a training. Commands that take hours are read by the parser they are for.

`docs/training/LOG.md` is left out: it tells what was typed on its days, with the flags of those days.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

import start
from core.nn.openvino_backend import installed_version
from tests.support.server import Server

ROOT = Path(__file__).resolve().parent.parent
ASKING = ("README.md", "docs/server.md", "docs/editing.md")  # documents that ask a running server, in this order
DOCUMENTS = (*ASKING, "archive/README.md", "docs/benchmarks.md", "docs/clients.md", "docs/evaluation.md",
             "docs/model.md", "docs/models.md", "docs/other_generators.md", "docs/outside.md", "docs/page.md",
             "docs/scaling.md", "docs/sliders.md", "docs/training.md", "docs/training/PLAN.md",
             "models/celeba128/MODEL_CARD.md")
README_BYTES = 10_000  # a newcomer reads no more; the rest is in docs/
PORT = "127.0.0.1:5001"
JOB = "<job_id>"
STAND_FOR = {"S": "10", "P": "tiny", "W": "2", "N": "4", "$n": "4", "$w": "2", "runs/drawn-$n.npy": "runs/drawn-4.npy"}
PROGRAM = re.compile(r"(python|torchrun|accelerate|\./start\.py|curl)\b")


# ---- what is printed -------------------------------------------------------------------------------------------------


def fences(text: str, language: str) -> list[str]:
    """The blocks of code in a document that say to be in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The commands of a block of shell, each with all its lines: a line that opens something goes on in the next."""
    found, waiting = [], ""
    for line in block.splitlines():
        waiting += line + "\n"
        checked = subprocess.run(["bash", "-n"], input=waiting, capture_output=True, text=True)
        if checked.returncode == 0 and not checked.stderr and not line.endswith("\\"):
            found.append(waiting.strip())
            waiting = ""
    assert not waiting.strip(), f"this does not end: {waiting}"
    return [command for command in found if command and not command.startswith("#")]


def programs(command: str) -> list[list[str]]:
    """The words of each call of a program of this project within a shell command, as the program gets them."""
    lexer = shlex.shlex(command.replace("\\\n", " ").replace("\n", " ; "), posix=True, punctuation_chars=";|&(){}<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    calls: list[list[str]] = [[]]
    for word in lexer:
        if re.fullmatch("[;|&(){}<>]+", word):
            calls.append([])
        elif not (calls[-1] == [] and (word in ("do", "done") or re.fullmatch(r"[A-Z_]+=\S*", word))):
            calls[-1].append(STAND_FOR.get(word, word.replace("$n", "4").replace("$w", "2")))
    return [words for words in calls if words and PROGRAM.match(words[0])]


def printed() -> list[tuple[str, list[str]]]:
    """Every call of a program of this project, in blocks and within lines: document, words."""
    found: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        whole = [command for block in fences(text, "sh") for command in commands(block)]
        inline = re.findall(r"`((?:python|\./start\.py|torchrun|accelerate) [^`\n]+)`", text)
        for command in (*whole, *inline):
            for words in programs(command):
                found.setdefault(tuple(words), (document, words))
    return [one for one in found.values() if one[1][0] != "curl"]


def test_readme_is_short_enough_to_be_read() -> None:
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_image_is_there(document: str) -> None:
    """Files that documents point to exist, and headings that they point into."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), f"{document} points to {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{document} points to {target}; there are {', '.join(sorted(anchors))}"


class Read(Exception):
    """A command line was understood."""


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program ends when it has read its command line."""
    parse = argparse.ArgumentParser.parse_args

    def read(self: argparse.ArgumentParser, *words: Any, **more: Any) -> NoReturn:
        parse(self, *words, **more)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # a program may set something for itself


@pytest.mark.parametrize(("document", "words"), printed(), ids=[" ".join(words) for _, words in printed()])
def test_a_printed_command_line_is_one(document: str, words: list[str], parsers: None) -> None:
    """The program is there and knows each of the flags with these values."""
    if words[0] == "accelerate" and words[1:] == ["launch"]:
        return
    if words[0] == "./start.py":
        if words[1:2] != ["test"]:
            with pytest.raises((Read, SystemExit)) as ended:
                start.command_line({}).parse_args(words[1:])
            assert not isinstance(ended.value, SystemExit) or ended.value.code == 0, f"{document}: {words}"
        else:
            assert all((ROOT / path).exists() for path in words[2:]), f"{document}: {words}"
        return
    file = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[file]).is_file(), f"{document} names {words[file]}, which is not there"
    if words[file + 1 :]:
        with pytest.raises(Read):
            importlib.import_module(words[file].removesuffix(".py").replace("/", ".")).main(words[file + 1 :])


def test_every_command_of_a_block_is_known() -> None:
    """A new kind of command needs a way to be tried here."""
    for document in DOCUMENTS:
        for block in fences((ROOT / document).read_text(encoding="utf-8"), "sh"):
            for command in commands(block):
                copies = re.fullmatch(r"cp -r (\S+) \S+.*", command)
                assert programs(command) or copies and (ROOT / copies[1]).exists(), f"{document}: {command}"


# ---- what processes ask of the network and of the disk ---------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A home folder and a folder for temporary files, both empty, and what processes that live there ask for."""

    root: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process that is watched."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("XDG_", "FACES_")) and name not in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")}
        for name in ("home", "temporary", "data"):
            (self.root / name).mkdir(exist_ok=True)
        home, temporary = str(self.root / "home"), str(self.root / "temporary")
        return {**kept, "HOME": home, "USERPROFILE": home, "TMPDIR": temporary,
                "AUDIT_REPORT": str(self.root / "report"), "PYTHONPATH": str(ROOT / "tests" / "audit")}

    def complaints(self) -> list[str]:
        """Every look-up or connection but to this machine itself, every change of a file that is not ours."""
        ours = [ROOT, Path(sys.prefix).resolve(), self.root.resolve() / "data", self.root.resolve() / "temporary"]
        found = []
        for line in (self.root / "report").read_text(encoding="utf-8").splitlines():
            event, _, what = line.partition("\t")
            if event.startswith("socket."):
                numbers = r"'(127\.0\.0\.1|::1)'" if event == "socket.connect" else r"('[0-9.:]+'|None$)"
                found += [] if re.match(r"\(?" + numbers, what) else [line]
            elif what.strip("'") not in (os.devnull, ":memory:"):
                path = Path(os.path.realpath(what.strip("'")))
                found += [] if any(path.is_relative_to(folder) for folder in ours) else [line]
        left = [str(path) for name in ("home", "temporary") for path in (self.root / name).rglob("*")]
        return found + left


def test_the_watch_can_tell(tmp_path: Path) -> None:
    """A process that looks a host up, connects, and writes into its home, beside the project, and into /tmp."""
    watched = Watched(tmp_path)
    code = (
        "import contextlib, pathlib, sqlite3, tempfile\n"
        "from socket import AF_INET, SOCK_DGRAM, create_server, getaddrinfo, socket\n"
        "with contextlib.suppress(OSError): getaddrinfo('analytics.invalid', 443)\n"
        "with contextlib.suppress(OSError): socket(AF_INET, SOCK_DGRAM).connect(('192.0.2.1', 9))\n"
        "(pathlib.Path.home() / 'id').write_text('x'); sqlite3.connect(pathlib.Path.home() / 'base').close()\n"
        "pathlib.Path('..', 'beside').mkdir(); tempfile.mkdtemp(); tempfile.TemporaryFile().close()\n"
        "create_server(('127.0.0.1', 0)).close()\n"
    )
    env = watched.env
    subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path / "data", check=True, timeout=60)
    told = watched.complaints()
    for part in ("getaddrinfo\t'analytics.invalid'", "connect\t('192.0.2.1', 9)", "home/id", "home/base", "beside"):
        assert any(part in line for line in told), part
    assert any(line.startswith(str(tmp_path / "temporary")) for line in told), "what is left there"
    assert len(told) == 8, told  # the three files that stay are told twice


ENGINES_AND_TRAINING = """
import sys
from pathlib import Path
from core.quiet import keep_quiet
from generator import FaceGenerator
from tests.support.training import make_workplace
import train_clip
place = make_workplace(Path("data"))
for engine in sys.argv[1:]:
    if engine == "torch":
        keep_quiet()  # as every program does at its start; the other engine has to do without
    faces = FaceGenerator.load(place.model, device="cpu", threads=1, engine=engine, cache="data/cache")
    faces.generate("a man", num_inference_steps=2, sampler="Euler" if engine == "torch" else None)
assert train_clip.main(place.train("clip", "run", "--steps", 2)) == 0
"""


def run_watched(watched: Watched, code: str, *words: str) -> str:
    """Run Python code in a process that is watched, in its own folder; what it prints."""
    code = f"import sys; sys.path[:0] = {[str(ROOT)]!r}\n" + code
    answer = subprocess.run([sys.executable, "-c", code, *words], env=watched.env, cwd=watched.root, timeout=280,
                            capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_engines_and_training_speak_to_nobody_and_write_where_they_are_told(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    run_watched(watched, ENGINES_AND_TRAINING, *(["openvino"] if installed_version() else []), "torch")
    assert watched.complaints() == []


@pytest.mark.skipif(os.name == "nt", reason="the watched interpreter is a shell script")
def test_doctor_speaks_to_nobody_and_writes_nothing(tmp_path: Path) -> None:
    """Its probe imports every package in another process, which start.py frees of what is in PYTHONPATH."""
    watched, python = Watched(tmp_path), tmp_path / "python"
    path = watched.env["PYTHONPATH"]
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{path}' exec '{sys.executable}' \"$@\"\n", encoding="utf-8")
    python.chmod(0o755)
    code = (
        "import start; from pathlib import Path; from launcher import environment\n"
        "start.venv_python = environment.venv_python = lambda root: Path(sys.argv[1])\n"
        "start.main(['doctor', '--data-dir', 'data'])"
    )
    said = run_watched(watched, code, str(python))
    assert "torch" in said and ("OpenVINO" in said), said
    assert watched.complaints() == []


# ---- what the server is asked ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp("watched"))


@pytest.fixture(scope="module")
def server(watched: Watched) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in watched.env.items():
            patch.setenv(name, value)
        for name in {*os.environ} - {*watched.env}:
            patch.delenv(name)
        server = Server(watched.root / "data" / "jobs").start()
    with contextlib.closing(contextlib.ExitStack()) as ends:
        ends.push(server)
        yield server


def shell(server: Server, folder: Path, command: str) -> str:
    """What a command prints, typed in `folder`; the server's address is the only thing that is changed in it."""
    asked = command.replace(PORT, f"127.0.0.1:{server.port}")
    script = 'curl() { command curl --fail-with-body "$@"; }\n' + asked
    answer = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, f"{command}\n{answer.stdout[:500]}{answer.stderr[-500:]}"
    return answer.stdout


def photograph(path: Path) -> None:
    """A JPEG of more than the 98 kB of text that a command line may carry in one word."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    assert path.stat().st_size > 128 * 1024


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl")
def test_what_readme_asks_of_the_server(server: Server, tmp_path: Path) -> None:
    """Block by block, in order; `<job_id>` is the job of the request before."""
    photograph(tmp_path / "photo.jpg")
    asked = [command for document in ASKING for block in fences((ROOT / document).read_text(encoding="utf-8"), "sh")
             for command in commands(block) if "curl" in command]
    assert len(asked) >= 8
    job = ""
    for command in asked:
        assert JOB not in command or job, command
        said = shell(server, tmp_path, command.replace(JOB, job))
        if said:
            told = json.loads(said)
            assert "error" not in told or told["error"] is None, told
            if "job_id" in told and "/text_to_image" in command:
                job = told["job_id"]
                assert server.wait(job)["status"] == "succeeded"
    for name in ("face.png", "faces.webp"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width >= 128


def test_the_python_of_readme_draws(server: Server, tmp_path: Path) -> None:
    (block,) = fences((ROOT / "docs" / "server.md").read_text(encoding="utf-8"), "python")
    code = block.replace(PORT, f"127.0.0.1:{server.port}")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    files = sorted(tmp_path.glob("face-*.png"))
    assert len(files) == 4
    for path in files:
        with Image.open(path) as picture:
            assert picture.size == (128, 128)


def test_the_server_spoke_to_nobody_and_wrote_only_its_data(server: Server, watched: Watched) -> None:
    """After all of the above; the last of this file."""
    server.wait(server.submit({"prompt": "a man", "n_inf_steps": 2, "n_images": 1}))
    server.stop()
    assert watched.complaints() == []
