"""Who may come in, what is told while the model is not there, and does the command serve and stop?

Hosts, origins, keys, the policy of every answer, the page's files, the states of the server, `python api.py`.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient

import api
from api import create_app
from core.jobs.store import Store
from core.text import captions
from core.text.model_captions import vocabulary_of
from core.web.routes import page
from core.web.security import host_allowed, origin_allowed
from launcher import host as machine
from tests.support.asking import NO_JOB, CheckedClient, make_app, post, problem, service_of
from tests.support.drawing import DrawingEngine

ROOT = Path(api.__file__).parent


# ---- request checks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "hosts", "allowed"),
    [("localhost", None, True), ("localhost:5001", None, True), ("127.0.0.1:5001", None, True), ("[::1]:1", None, True),
     ("192.168.1.5:5001", None, False), ("evil.example", None, False), ("", None, False), ("a:b:c", None, False),
     ("192.168.1.5:5001", (), True), ("[fe80::1]:80", (), True), ("mybox:5001", ("mybox",), True),
     ("MyBox:5001", ("mybox",), True), ("evil.example", ("mybox",), False), ("localhost", (), True)],
)
def test_hosts(host: str, hosts: tuple[str, ...] | None, allowed: bool) -> None:
    assert host_allowed(host, hosts) is allowed


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [(None, True), ("http://localhost:5001", True), ("https://friend.example", True), ("null", False), ("", False),
     ("http://localhost", False), ("http://localhost:5001.evil.example", False), ("https://evil.example", False),
     ("http://[", False), ("http://[::1", False)],
)
def test_origins(origin: str | None, allowed: bool) -> None:
    assert origin_allowed(origin, "localhost:5001", ["https://friend.example"]) is allowed


def test_the_same_origin_may_speak(client: FlaskClient) -> None:
    assert client.get("/health", headers={"Origin": "http://localhost"}).status_code == 200


def test_other_origins_only_by_allow_list(engine: DrawingEngine, client: FlaskClient) -> None:
    friend = {"Origin": "https://friend.example"}
    ask = {**friend, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    refused = client.options("/text_to_image", headers=ask)
    problem(refused, 403)
    assert "Access-Control-Allow-Origin" not in refused.headers
    assert "Access-Control-Allow-Origin" not in client.get("/health").headers
    open_app = make_app(engine, cors_origins=["https://friend.example"]).test_client()
    for method, path, header in (
        ("POST", "/text_to_image", "content-type"), ("DELETE", f"/jobs/{NO_JOB}/", "x-api-key"),
        ("POST", "/encode", "idempotency-key"), ("GET", "/jobs/", "if-none-match"),
    ):
        ask |= {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": header}
        preflight = open_app.options(path, headers=ask)
        assert preflight.status_code == 200 and "Content-Type" not in preflight.headers
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://friend.example"
        assert method in preflight.headers["Access-Control-Allow-Methods"].split(", ")
        assert preflight.headers["Access-Control-Allow-Headers"].lower() == header
    problem(open_app.delete(f"/jobs/{NO_JOB}/", headers={"Origin": "https://evil.example"}), 403)
    problem(open_app.delete(f"/jobs/{NO_JOB}/", headers=friend), 404)
    answer = open_app.post("/text_to_image", json={"prompt": "a face"}, headers=friend)
    assert answer.status_code == 200 and answer.headers["Access-Control-Allow-Origin"] == "https://friend.example"
    problem(open_app.get("/health", headers={"Origin": "https://evil.example"}), 403)


def test_public_files_come_whatever_host_and_origin_say(client: FlaskClient) -> None:
    """They are everybody's; behind a proxy that rewrites Host, the page is the one that can tell what is wrong."""
    for path in ("/", "/static/app.js", "/static/style.css"):
        assert client.get(path, headers={"Host": "backend:80"}, buffered=True).status_code == 200
        assert client.get(path, headers={"Origin": "https://faces.example"}, buffered=True).status_code == 200
    for path in ("/options", "/health", "/session?key=", "/docs", "/jobs/", "/nothing", "/static/"):
        refused = problem(client.get(path, headers={"Host": "backend:80"}), 403)
        assert "--allow-host backend." in refused["error"]
        assert "--cors-origin" in problem(client.get(path, headers={"Origin": "https://faces.example"}), 403)["error"]
    assert "--allow-host NAME." in problem(client.get("/options", headers={"Host": "["}), 403)["error"]


def test_refusals_are_logged_once_a_minute(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("core.web.security.time.monotonic", lambda: now)
    for moment in (0.0, 1.0, 59.0, 60.0):
        now = 1000.0 + moment
        for number in range(3):
            problem(client.get("/options", headers={"Host": f"backend{number}"}), 403)
        if moment:
            problem(client.get("/options", headers={"Origin": "https://evil.example\u2028"}), 403)
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert [re.sub(r"[:] .*", "", line) for line in told] == [
        "refused (and 0 like it since the last line)", "refused (and 0 like it since the last line)",
        "refused (and 8 like it since the last line)"]
    assert "--allow-host backend0." in told[0] and "evil.example" in told[1] and told[1].isascii()


def test_the_key_opens_what_needs_it(engine: DrawingEngine) -> None:
    client = make_app(engine, api_key="open sesame").test_client()
    for path in ("/", "/health", "/static/app.js"):
        assert client.get(path, buffered=True).status_code == 200
    for path in ("/options", "/ready", "/jobs/", "/jobs/x/", "/jobs/x/events", "/jobs/x/images/0.png", "/nothing",
                 "/vocabulary", "/prompt/surprise", "/metrics", "/openapi.json", "/docs"):
        problem(client.get(path), 401)
    for path in ("/encode", "/decode", "/inspect", "/verify", "/prompt/analyze", "/jobs/x/cancel"):
        problem(client.post(path), 401)
    problem(client.delete("/jobs/x/"), 401)
    problem(client.post("/text_to_image", json={"prompt": "a face"}), 401)
    for headers in ({"Authorization": "Bearer no"}, {"X-API-Key": ""}, {"Cookie": "faces_key=x"}, {"X-API-Key": "ö"}):
        problem(client.get("/options", headers=headers), 401)
    for headers in ({"Authorization": "Bearer open sesame"}, {"X-API-Key": "open sesame"}):
        assert client.get("/options", headers=headers).status_code == 200
    for wrong in ("?key=wrong", "", "?key="):
        answer = client.get(f"/session{wrong}")
        problem(answer, 401)
        assert "Set-Cookie" not in answer.headers
    problem(client.get("/options"), 401)
    session = client.get("/session?key=open%20sesame")
    assert (session.status_code, session.headers["Location"]) == (303, "./")
    assert "HttpOnly" in session.headers["Set-Cookie"] and "SameSite=Strict" in session.headers["Set-Cookie"]
    assert client.get("/options").status_code == 200  # the test client keeps cookies, as a browser does


def test_the_page_and_every_answer_have_a_strict_policy(client: FlaskClient) -> None:
    for path in ("/", "/static/app.js", "/options", "/docs", "/nothing"):
        headers = client.get(path, buffered=True).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" == policy["style-src"]
        assert policy["manifest-src"] == policy["worker-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    page = client.get("/", buffered=True)
    assert page.content_type == "text/html; charset=utf-8"
    assert "onclick" not in page.text and "<script>" not in page.text and "style=" not in page.text
    assert client.get("/static/app.js", buffered=True).content_type.startswith("text/javascript")


def test_static_files_are_asked_for_again_and_cheap(client: FlaskClient) -> None:
    for path in ("/", "/static/style.css", "/static/app.js"):
        answer = client.get(path, buffered=True)
        assert answer.headers["Cache-Control"] == "no-cache"
        tag = {"If-None-Match": answer.headers["ETag"]}
        unchanged = client.get(path, headers=tag, buffered=True)
        assert unchanged.status_code == 304 and "Content-Type" not in unchanged.headers


def test_each_static_file_has_its_type(client: FlaskClient) -> None:
    for path in sorted((ROOT / "static").iterdir()):
        answer = client.get(f"/static/{path.name}", buffered=True)
        assert answer.status_code == 200 and answer.mimetype == page.MEDIA_TYPES[path.suffix]
        assert ("Service-Worker-Allowed" in answer.headers) is (path.name == "sw.js")


def first_visit() -> set[Path]:
    """The page, the scripts and styles it names, what those import in their first lines, and the service worker."""
    page, static = ROOT / "frontend.html", ROOT / "static"
    found, waiting = {page, static / "sw.js"}, [page]
    while waiting:
        text = waiting.pop().read_text(encoding="utf-8")
        for _, name in re.findall(r'((?<==")static/|^import [^;]*? from "\./)([\w-]+\.(?:js|css))"', text, re.M):
            if static / name not in found:
                found.add(static / name)
                waiting.append(static / name)
    return found


def test_page_scripts_and_styles_stay_within_their_budget() -> None:
    """What a visit loads; what a first look at an image or at a panel of editing brings has a ceiling of its own."""
    visit, static = first_visit(), ROOT / "static"
    assert {static / "app.js", static / "ui.js", static / "style.css"} <= visit and static / "photo.js" not in visit
    assert sum(path.stat().st_size for path in visit) <= 150_000
    later = {*static.glob("*.js"), *static.glob("*.css")} - visit - {static / "docs.css"}  # which only /docs asks for
    assert sum(path.stat().st_size for path in later) <= 92_000


# ---- before the model is there ---------------------------------------------------------------------------------------


def test_while_the_model_loads_and_when_it_cannot(engine: DrawingEngine, caplog: pytest.LogCaptureFixture) -> None:
    def of(factory: Callable[[], DrawingEngine]) -> FlaskClient:
        app = create_app(factory, start=False)
        app.test_client_class = CheckedClient
        return app.test_client()

    client = of(lambda: engine)
    answer = client.post("/text_to_image", json={"prompt": "a face"})
    assert problem(answer, 503)["state"] == "STARTING" and answer.headers["Retry-After"]
    assert problem(client.get("/ready"), 503)["state"] == "STARTING"
    assert client.get("/health").get_json() == {"status": "ok"}
    assert client.get("/options").get_json()["state"] == "STARTING"
    assert client.get("/jobs/").get_json() == {"jobs": [], "next": None}  # what was generated before is there at once

    def broken() -> DrawingEngine:
        raise FileNotFoundError("models/x is not a model folder; train one")

    client = of(broken)
    assert not service_of(client.application).load()
    assert "models/x is not a model folder" in problem(client.get("/ready"), 503)["error"]
    assert problem(client.post("/text_to_image", json={"prompt": "a face"}), 503)["state"] == "FAILED"
    assert "models/x" in client.get("/options").get_json()["failure"]


def test_ready(client: FlaskClient) -> None:
    post(client)
    assert client.get("/ready").get_json() == {
        "state": "READY", "model": "drawing", "device": "paper", "engine": "pencil",
        "jobs": {"waiting": 1, "running": 0, "finished": 0}}


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--host", "0.0.0.0"], "give --api-key KEY, or say --insecure"), (["--port", "70000"], "must be 0 to 65535"),
     (["--threads", "0"], "argument --threads: must be at least 1, got 0"), (["--unknown"], "unrecognized arguments"),
     (["--max-batch", "0"], "--max-batch: must be at least 1"), (["--max-waiting", "many"], "must be at least 1"),
     (["--keep-jobs", "-1"], "--keep-jobs: must be at least 1, got -1"), (["--keep-bytes", "2X"], "'2X' is no size"),
     (["--keep-days", "nan"], "--keep-days: must be at least 0"), (["--drain-seconds", "inf"], "must be at least 0"),
     (["--cors-origin", "*"], "--cors-origin: '*' is no origin, give one such as https://faces.example"),
     (["--cors-origin", "faces.example"], "is no origin"), (["--allow-host", "a b"], "'a b' is no host"),
     (["--log-format", "xml"], "invalid choice")],
)
def test_arguments_are_checked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FACES_API_KEY", raising=False)
    with pytest.raises(SystemExit) as stopped:
        api.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACES_API_KEY", "open sesame")
    assert api.parse_arguments(["--host", "0.0.0.0"]).api_key == "open sesame"
    monkeypatch.delenv("FACES_API_KEY")
    assert api.parse_arguments(["--host", "0.0.0.0", "--insecure"]).insecure


def test_sizes_have_units() -> None:
    assert [api.size(text) for text in ("5", "2k", "500M", "2G")] == [5, 2048, 500 * 2**20, 2**31]
    assert api.parse_arguments([]).keep_bytes == 2**31 and api.parse_arguments([]).data_dir == ROOT / "data"


def test_names_and_origins_are_read_as_browsers_send_them() -> None:
    words = ["--allow-host", "MyBox", "--allow-host", "https://Faces.example:8443/", "--cors-origin",
             "https://Faces.example:443/", "--cors-origin", "http://127.0.0.1:8080"]
    told = api.parse_arguments(words)
    assert told.allow_host == ["mybox", "faces.example"]
    assert told.cors_origin == ["https://faces.example", "http://127.0.0.1:8080"]


def test_the_words_come_with_the_model(tmp_path: Path) -> None:
    assert vocabulary_of(tmp_path) == captions.vocabulary()
    for text, words in (('{"face": "known"}', {"face": "known"}), ('{"face": 1}', captions.vocabulary()),
                        ("[]", captions.vocabulary()), ("{", captions.vocabulary())):
        (tmp_path / "vocabulary.json").write_text(text, encoding="utf-8")
        assert vocabulary_of(tmp_path) == words


def test_a_folder_in_use_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Store(tmp_path)
    assert api.main(["--port", "0", "--data-dir", str(tmp_path)]) == 1
    assert f"Another server is using {tmp_path}" in capsys.readouterr().err
    held.close()


def test_a_taken_port_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert api.main(["--port", str(port), "--data-dir", str(tmp_path)]) == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """The real command, serving a folder that holds no model -> its process and port."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, str(ROOT / "api.py"), "--port", "0", "--model", str(tmp_path), "--threads", "1",
                   "--data-dir", str(tmp_path / "data"), *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline().rsplit(":", 1)[1].strip("/\n"))

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_command_serves_the_page_logs_and_stops_when_told(
    serving: Callable[..., tuple[subprocess.Popen[str], int]]
) -> None:
    process, port = serving("--log-format", "json")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200 and b"<!doctype html>" in answer.read()[:20].lower()
    assert answer.headers["Server"] is None
    connection.request("POST", f"/jobs/{NO_JOB}/cancel")
    assert connection.getresponse().status == 404
    connection.close()
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in told.splitlines()]
    page, line = (line for line in lines if line["logger"] == "access")
    assert (page["route"], page["status"]) == ("/", 200) and page["ms"] >= 0
    assert line["job_id"] == NO_JOB and line["status"] == 404 and line["route"] == "/jobs/{job_id}/cancel"
    assert any("could not be loaded" in line["message"] and line["level"] == "ERROR" for line in lines)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no socket for both")
@pytest.mark.parametrize("host", ["::", "0.0.0.0"])
def test_an_open_server_answers_at_every_address(
    host: str, serving: Callable[..., tuple[subprocess.Popen[str], int]]
) -> None:
    """`::` once took IPv6 alone, while the start printed an IPv4 address and its code."""
    _, port = serving("--host", host, "--insecure")
    assert machine.answers("127.0.0.1", port)
    assert machine.answers("::1", port) is (host != "0.0.0.0")


def test_importing_the_api_does_not_import_torch() -> None:
    script = "import sys, api; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
