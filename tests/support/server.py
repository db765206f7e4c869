"""How do tests speak to the real server? `Server` is `python api.py` in a process of its own, asked over real HTTP.

It takes a free port, keeps its jobs in a folder, and can be asked to stop or be killed at any moment and be started
again on the same folder. The second half says what its images must be: those that `FaceGenerator.generate` generates
alone. This file never imports torch; whoever compares brings a loaded `FaceGenerator`.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from core.process import tied

if TYPE_CHECKING:
    from generator import FaceGenerator

ROOT = Path(__file__).resolve().parents[2]
LOST = (OSError, http.client.HTTPException)  # what a client sees when the server dies under its request
PROMPTS = (
    "a smiling young woman with wavy blond hair",
    "an old man with a grey beard and glasses",
    "a serious woman with black hair",
    "",
)
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class ServerEvent(NamedTuple):
    """One Server-Sent Event."""

    id: int
    kind: str
    data: dict[str, Any]


class Refused(Exception):
    """The server answered, but took no job."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status}: {answer.body[:500]!r}")
        self.answer = answer


class Server:
    """The real server with the bundled model, its jobs in `data_dir`, its output in a file beside that.

    As a context manager it is started, and stopped at the end whatever happened.
    """

    def __init__(self, data_dir: Path, *flags: str, patience_s: float = 120.0) -> None:
        self.data_dir, self.flags, self.patience_s = data_dir, flags, patience_s
        self.log = data_dir.with_name(f"{data_dir.name}.log")
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- the process

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def start(self) -> Server:
        """Start it and wait until the model is loaded. Raises AssertionError, with the log, when it ends before."""
        first = self.spawn()

        def address() -> int:
            found = re.search(rb"http://127\.0\.0\.1:(\d+)/", self.log.read_bytes()[first:])
            return int(found.group(1)) if found else 0

        self.port = self._until(address)
        self._until(lambda: self.request("GET", "/ready").status == 200)
        return self

    def spawn(self) -> int:
        """Start it and do not wait for anything; where its output begins in the log."""
        assert self._process is None, "the server is already running"
        env = {name: value for name, value in os.environ.items() if not name.startswith("FACES_")}
        command = [sys.executable, "api.py", "--port", "0", "--data-dir", str(self.data_dir), *self.flags]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            first = log.tell()
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                             **tied(env | {"HF_HUB_OFFLINE": "1"}))
        return first

    def stop(self) -> int | None:
        """Ask it to stop (SIGTERM); its exit status, None when it was not running. Killed when it does not obey."""
        process, self._process = self._process, None
        if process is None:
            return None
        with process:  # closes its pipe
            process.terminate()
            try:
                return process.wait(self.patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise

    def kill(self) -> None:
        """End it at once (SIGKILL): it learns nothing of it and can write nothing down."""
        process, self._process = self._process, None
        if process is not None:
            with process:
                process.kill()

    def output(self) -> str:
        """Everything it has printed and logged so far, over all its lives."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _until(self, look: Callable[[], T]) -> T:
        """The first true answer of `look`. Another process can only be asked again and again."""
        assert self._process is not None
        deadline = time.monotonic() + self.patience_s
        while not (found := look()):
            ended = self._process.poll()
            if ended is not None or time.monotonic() > deadline:
                self.kill()
                why = f"ended with status {ended}" if ended is not None else f"is not ready after {self.patience_s} s"
                raise AssertionError(f"the server {why}:\n{self.output()[-3000:]}")
            time.sleep(0.05)
        return found

    # ---- what a client does

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own; `body` travels as JSON. Raises one of LOST when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience_s)
        try:
            content = {} if body is None else {"Content-Type": "application/json"}
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {**content, **(headers or {})})
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def submit(self, body: Mapping[str, Any], *, client: str = "", key: str = "") -> str:
        """POST a job as `client`, with the idempotency key `key`; its id. Raises Refused for any answer but 200."""
        named = {"X-Client-Id": client, "Idempotency-Key": key}
        headers = {name: value for name, value in named.items() if value}
        answer = self.request("POST", "/text_to_image", body, headers)
        if answer.status != 200:
            raise Refused(answer)
        return answer.json()["job_id"]

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask a job to stop; what the server says to that."""
        answer = self.request("POST", f"/jobs/{job_id}/cancel")
        assert answer.status == 200, answer
        return answer.json()

    def state(self, job_id: str) -> dict[str, Any]:
        """How a job is, without its images."""
        answer = self.request("GET", f"/jobs/{job_id}/?include=none")
        assert answer.status == 200, answer
        return answer.json()

    def events(self, job_id: str, after: int = 0) -> Iterator[ServerEvent]:
        """A job's events as they happen, until its end or the server's."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience_s)
        try:
            connection.request("GET", f"/jobs/{job_id}/events?after={after}")
            answer = connection.getresponse()
            if answer.status == 204:  # finished, and all of it was heard
                return
            assert answer.status == 200, answer.read()
            fields: dict[str, str] = {}
            while line := answer.readline().decode():
                name, _, value = line.rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                elif "id" in fields:
                    yield ServerEvent(int(fields["id"]), fields["event"], json.loads(fields["data"]))
                    fields = {}
        finally:
            connection.close()

    def wait(self, job_id: str) -> dict[str, Any]:
        """Listen to a job until it ends; its state then."""
        for _ in self.events(job_id):
            pass
        state = self.state(job_id)
        assert state["finished"], f"the stream of {job_id} ended while it is {state['status']}"
        return state

    def pictures(self, job_id: str) -> list[bytes]:
        """The PNGs of a succeeded job, as files."""
        state = self.state(job_id)
        assert state["status"] == "succeeded", state
        found = [self.request("GET", entry["url"]) for entry in state["response"]]
        assert [answer.status for answer in found] == [200] * state["parameters"]["n_images"], found
        return [answer.body for answer in found]


# ---- what its images must be ---------------------------------------------------------------------------------------


def mixed_jobs(
    count: int, samplers: Sequence[str], *, seed: int = 0, steps: tuple[int, int] = (4, 20), most_images: int = 2
) -> list[dict[str, Any]]:
    """Bodies of POST /text_to_image that differ in all that could be mixed up; every sampler appears in turn."""
    rng = random.Random(seed)
    return [
        {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "negative_prompt": rng.choice(("", "a man with a beard")),
            "n_images": rng.randint(1, most_images),
            "n_inf_steps": rng.randint(*steps),
            "stream_freq": rng.choice((3, 50)),
            "seed": rng.randrange(2**40),
            "guidance_scale": rng.choice((0.0, 1.0, 2.5, 4.5, 7.0)),
            "sampler": samplers[i % len(samplers)],
        }
        for i in range(count)
    ]


def draw_alone(faces: FaceGenerator, body: Mapping[str, Any]) -> list[np.ndarray]:
    """What a job must generate: the images of one request with no server and no neighbours, uint8 [H, W, 3] each."""
    drawn = faces.generate(
        body["prompt"],
        num_images=body["n_images"],
        num_inference_steps=body["n_inf_steps"],
        seed=body["seed"],
        guidance_scale=body.get("guidance_scale"),
        negative_prompt=body.get("negative_prompt", ""),
        sampler=body.get("sampler"),
    )
    return [picture.pixels for picture in drawn]


def pixels_of(png: bytes) -> np.ndarray:
    """PNG -> uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def differences(pngs: Sequence[bytes], wanted: Sequence[np.ndarray]) -> list[int]:
    """How far each image is from what it must be, in grey levels of its most different pixel."""
    return [int(np.abs(pixels_of(png).astype(int) - one).max()) for png, one in zip(pngs, wanted, strict=True)]


@dataclass
class Comparison:
    """The `differences` of many jobs."""

    apart: dict[str, list[int]] = field(default_factory=dict)  # by a label, such as the sampler

    def add(self, label: str, pngs: Sequence[bytes], wanted: Sequence[np.ndarray]) -> int:
        """Compare the images of one job; its largest difference."""
        found = differences(pngs, wanted)
        self.apart.setdefault(label, []).extend(found)
        return max(found)

    @property
    def all(self) -> list[int]:
        return [one for found in self.apart.values() for one in found]

    @property
    def exact(self) -> str:
        """How many are equal in every pixel, by label."""
        return ", ".join(f"{label} {found.count(0)}/{len(found)}" for label, found in sorted(self.apart.items()))
