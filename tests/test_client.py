"""Does `client.py` draw, watch, edit, cancel and repeat what was lost, from Python, from coroutines and in a shell?

It speaks over real sockets to the real web server with the drawing stand-in behind it; `Unreliable` stands between them
where a line has to break.
"""

from __future__ import annotations

import asyncio
import http.client
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image

import client as faces_client
from client import AsyncFaces, Faces, FacesError, JobFailed
from core.process import tied
from tests.support.asking import problem, service_of, work
from tests.support.browsing import Gate
from tests.support.drawing import TROUBLE, DrawingEngine
from tests.support.loopback import PATIENCE_S, Live, serving

ROOT = Path(__file__).resolve().parents[1]
KEY = "open sesame"


@pytest.fixture
def live(engine: DrawingEngine) -> Iterator[Live]:
    with serving(engine, api_key=KEY) as found:
        yield found


@pytest.fixture
def faces(live: Live) -> Faces:
    return Faces(live.url, key=KEY, timeout_s=PATIENCE_S)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two attempts."""
    monkeypatch.setattr(faces_client, "pause_s", lambda tried, asked: 0.01)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ---- POST /text_to_image?wait= ---------------------------------------------------------------------------------------


def test_a_request_that_waits_gets_its_pictures(live: Live) -> None:
    body, key = {"prompt": "a smiling woman", "n_images": 2, "n_inf_steps": 4}, {"X-API-Key": KEY}
    answer = live.ask("POST", "/text_to_image?wait=30", body, key)
    assert answer.status == 200 and answer.json()["finished"] and len(answer.json()["response"]) == 2
    assert answer.headers["Location"] == f"/jobs/{answer.json()['job_id']}/"
    told = live.ask("GET", answer.headers["Location"], None, key).json()
    assert told == answer.json()
    failed = live.ask("POST", "/text_to_image?wait=30", {**body, "prompt": TROUBLE}, key).json()
    assert failed["status"] == "failed" and failed["error"]["code"] == "not_finite"


def test_a_request_that_waits_too_long_gets_its_job(client: FlaskClient, app: Flask) -> None:
    answer = client.post("/text_to_image?wait=1", json={"prompt": "a woman", "n_inf_steps": 4})
    assert answer.status_code == 202 and answer.get_json()["status"] == "queued"
    work(app)
    assert client.get(answer.headers["Location"]).get_json()["status"] == "succeeded"
    for bad in ("-1", "601", "soon"):
        problem(client.post(f"/text_to_image?wait={bad}", json={"prompt": "a woman"}), 422)
    assert service_of(app).queue.counts()["succeeded"] == 1


# ---- Python ----------------------------------------------------------------------------------------------------------


def test_generate(faces: Faces, tmp_path: Path) -> None:
    drawn = faces.generate("a smiling woman", n_images=2, n_inf_steps=4, seed=7)
    assert [(one.index, one.seed, one.t, one.total_t) for one in drawn] == [(0, 7, 4, 4), (1, 8, 4, 4)]
    again = faces.generate("a smiling woman", n_images=1, n_inf_steps=4, seed=8)
    assert np.array_equal(pixels(drawn[1].png), pixels(again[0].png))
    assert drawn[0].save(tmp_path).name == "face-7.png" and drawn[1].save(tmp_path / "b.png").stat().st_size > 0


def test_a_long_job_is_waited_for(faces: Faces, engine: DrawingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces_client, "WAIT_S", 1)
    engine.before_step = gate = Gate()
    opening = threading.Timer(1.5, gate.open)
    opening.start()
    assert len(faces.generate("a woman", n_images=1, n_inf_steps=4)) == 1
    opening.join()


def test_stream(faces: Faces) -> None:
    job_id = faces.start("a smiling woman", n_images=1, n_inf_steps=4, stream_freq=2, seed=7)
    events = list(faces.stream(job_id))
    assert [(event.kind, event.t) for event in events if event.kind in ("preview", "image", "done")] == [
        ("preview", 2), ("image", 4), ("done", 4)]
    preview, result = (event.picture for event in events if event.picture)
    assert preview is not None and result is not None and not np.array_equal(pixels(preview.png), pixels(result.png))
    assert result.png == faces.wait(job_id)[0].png
    assert all(event.picture is None for event in faces.stream(job_id, previews=False) if event.kind == "preview")


def test_edit(faces: Faces, engine: DrawingEngine, tmp_path: Path) -> None:
    grey = Image.new("RGB", (40, 40), (90, 100, 110))
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (0, 0, 20, 40))
    (tmp_path / "grey.png").write_bytes(png_of(grey))
    (done,) = faces.edit(tmp_path / "grey.png", "a smiling woman", mask=png_of(mask), n_images=1, n_inf_steps=4)
    assert engine.begun[-1].mask[:, :15].all() and not engine.begun[-1].mask[:, 17:].any()
    assert np.abs(pixels(done.png)[:, 17:].astype(int) - (90, 100, 110)).max() <= 12


def test_cancel(faces: Faces, engine: DrawingEngine) -> None:
    engine.before_step = gate = Gate()
    job_id = faces.start("a woman", n_images=1, n_inf_steps=4)
    faces.cancel(job_id)
    gate.open()
    with pytest.raises(JobFailed) as ended:
        faces.wait(job_id)
    assert ended.value.code == "cancelled"


def test_errors_say_what_is_wrong(faces: Faces, live: Live) -> None:
    with pytest.raises(FacesError) as wrong:
        faces.generate("a woman", n_images=9, seed=-1)
    assert wrong.value.status == 422 and set(wrong.value.fields) == {"n_images", "seed"}
    assert wrong.value.fields["n_images"] == "must be an integer from 1 to 8; got 9"
    with pytest.raises(JobFailed, match="No image came out. Try another sampler."):
        faces.generate(TROUBLE)
    with pytest.raises(FacesError, match="API key"):
        Faces(live.url, key="").generate("a woman")
    with pytest.raises(FacesError, match="no job"):
        list(faces.stream("never-existed-" + 32 * "0"))
    with pytest.raises(ValueError, match="address"):
        Faces("localhost:5001").generate("a woman")


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Passes requests on to `target`; of `losses` it loses the answers, and cuts streams after `cut` bytes."""

    target = ""
    losses: list[int] = []  # statuses to answer instead, 0 for none at all; used up from the front
    cuts: list[int] = []

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(self.target, timeout=PATIENCE_S)
        connection.request(self.command, self.path, body or None, dict(self.headers) | {"Host": self.target})
        answer = connection.getresponse()
        if self.losses:
            answer.read()
            connection.close()
            status = self.losses.pop(0)
            if status:
                self.send_response(status)
                self.send_header("Retry-After", "1")
                self.end_headers()
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name not in ("Connection", "Transfer-Encoding", "Server", "Date"):
                self.send_header(name, value)
        self.end_headers()
        is_stream = "text/event-stream" in answer.headers["Content-Type"]
        left = self.cuts.pop(0) if is_stream and self.cuts else 10**9
        while left > 0 and (piece := answer.read1(min(left, 200))):
            self.wfile.write(piece)
            left -= len(piece)
        connection.close()

    do_GET = do_POST = pass_on

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def line(live: Live) -> Iterator[tuple[type[Unreliable], str]]:
    handler = type("Line", (Unreliable,), {"target": f"127.0.0.1:{live.port}", "losses": [], "cuts": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_lost_answer_draws_once(line: tuple[type[Unreliable], str], engine: DrawingEngine, quick: None) -> None:
    handler, address = line
    handler.losses[:] = [0, 502, 503]
    assert len(Faces(address, key=KEY).generate("a woman", n_images=1, n_inf_steps=2)) == 1
    assert len(engine.begun) == 1 and not handler.losses
    handler.losses[:] = [0] * 9
    with pytest.raises((OSError, http.client.HTTPException)):
        Faces(address, key=KEY, retries=2).generate("a woman")
    assert len(handler.losses) == 6


def test_a_broken_stream_is_taken_up_again(line: tuple[type[Unreliable], str], quick: None) -> None:
    handler, address = line
    handler.cuts[:] = [150, 400, 900, 3000]
    faces = Faces(address, key=KEY)
    job_id = faces.start("a woman", n_images=2, n_inf_steps=6, stream_freq=2)
    kinds = [event.kind for event in faces.stream(job_id)]
    assert not handler.cuts
    assert kinds.count("image") == 2 and kinds.count("preview") == 4 and kinds.count("progress") == 6
    assert kinds[-1] == "done" and kinds.count("done") == 1


def test_the_pauses_are_as_the_server_asks() -> None:
    assert faces_client.pause_s(1, "7") == 7 and faces_client.pause_s(1, "3600") == faces_client.LONGEST_PAUSE_S
    assert [faces_client.pause_s(tried, None) for tried in (1, 2, 3)] == [0.25, 0.5, 1.0]


def test_coroutines(live: Live) -> None:
    async def ask() -> tuple[list[Any], list[str], list[Any]]:
        faces = AsyncFaces(live.url, key=KEY)
        both = await asyncio.gather(*(faces.generate("a woman", n_images=1, n_inf_steps=4, seed=s) for s in (1, 2)))
        job_id = await faces.start("a woman", n_images=1, n_inf_steps=4)
        kinds = [event.kind async for event in faces.stream(job_id)]
        edited = await faces.edit(png_of(Image.new("RGB", (8, 8))), "a woman", n_images=1, n_inf_steps=2)
        await faces.cancel(job_id)
        return [one.seed for (one,) in both], kinds, [*edited, *(await faces.wait(job_id))]

    seeds, kinds, pictures = asyncio.run(ask())
    assert seeds == [1, 2] and kinds[-1] == "done" and len(pictures) == 2


# ---- a shell ---------------------------------------------------------------------------------------------------------


def command(live: Live, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "client.py"), *words, "--server", live.url]


def test_the_command_saves_pictures(live: Live, tmp_path: Path) -> None:
    words = command(live, "a smiling woman", "-n", "2", "--seed", "7", "--steps", "4", "-o", "out")
    environment = {**os.environ, "FACES_API_KEY": KEY}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(Path("out") / "face-7.png"), str(Path("out") / "face-8.png")]
    assert pixels((tmp_path / "out" / "face-7.png").read_bytes()).shape == (32, 32, 3)
    bad = subprocess.run(command(live, "a", "-n", "99"), cwd=tmp_path, env=environment, capture_output=True, text=True,
                         timeout=PATIENCE_S)
    assert bad.returncode == 1 and bad.stderr == "n_images: must be an integer from 1 to 8; got 99\n"


def test_the_command_shows_how_far_it_is(faces: Faces, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                         live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = ["a woman", "--steps", "4", "-o", str(tmp_path), "--server", live.url, "--key", KEY]
    assert faces_client.main(arguments) == 0
    shown = capsys.readouterr()
    assert "[###############...............] 2/4 steps" in shown.err and "4/4 steps" in shown.err
    assert len(shown.out.split()) == 1


def test_no_server_is_said_in_a_sentence(capsys: pytest.CaptureFixture[str], quick: None) -> None:
    assert faces_client.main(["a woman", "--server", "http://127.0.0.1:9"]) == 1
    assert "No server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_ctrl_c_cancels_the_job(live: Live, engine: DrawingEngine, tmp_path: Path) -> None:
    engine.before_step = gate = Gate()
    environment = {**os.environ, "FACES_API_KEY": KEY}
    begun = "import signal, sys, client; signal.signal(signal.SIGINT, signal.default_int_handler); "
    words = [sys.executable, "-c", f"{begun}sys.exit(client.main(sys.argv[1:]))", "a woman", "--server", live.url]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, **tied(environment)) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not engine.begun and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
    gate.open()
    assert process.returncode == 130 and said == "cancelled\n"
    job = live.ask("GET", "/jobs/", None, {"X-API-Key": KEY}).json()["jobs"][0]
    assert live.ask("GET", f"/jobs/{job['job_id']}/events", None, {"X-API-Key": KEY}).body.count(b"cancelled") >= 1


@pytest.mark.parametrize("ask", ["start", "generate"])
def test_ctrl_c_before_the_answer_has_come_cancels_too(
    faces: Faces, engine: DrawingEngine, live: Live, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job runs already, and nobody has told its id."""
    engine.before_step = gate = Gate()
    request, asked = faces._request, []

    def interrupted(method: str, path: str, *rest: Any) -> bytes:
        if not asked:  # the wait for the answer is what a person ends
            asked.append(path)
            request(method, "text_to_image", *rest)
            raise KeyboardInterrupt
        return request(method, path, *rest)

    monkeypatch.setattr(faces, "_request", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(faces, ask)("a woman")
    gate.open()
    jobs = live.ask("GET", "/jobs/", None, {"X-API-Key": KEY}).json()["jobs"]
    assert len(jobs) == 1
    with pytest.raises(JobFailed) as failed:
        faces.wait(jobs[0]["job_id"])
    assert failed.value.code == "cancelled"
