"""Is the server found under a sub-path, behind a real nginx with the lines that docs/server.md prints, and are the same
headers worth nothing from anybody else?
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest
import requests
from playwright.sync_api import Page, expect

from client import Faces
from core.web.proxies import network
from tests.support.browsing import generate, visit, write_prompt
from tests.support.drawing import DrawingEngine
from tests.support.loopback import PATIENCE_S, Live, serving

ROOT = Path(__file__).resolve().parents[2]
LOCAL = [network("127.0.0.0/8")]
TOLD = {"X-Forwarded-Prefix": "/faces", "X-Forwarded-Host": "faces.example", "X-Forwarded-Proto": "https",
        "X-Forwarded-For": "192.0.2.7"}
BODY = {"prompt": "a smiling woman", "n_images": 1, "n_inf_steps": 4, "seed": 7}


@pytest.fixture
def behind(engine: DrawingEngine) -> Iterator[Live]:
    with serving(engine, trusted_proxies=LOCAL, hosts=["faces.example"]) as found:
        yield found


def test_everything_is_below_the_sub_path(behind: Live) -> None:
    answer = behind.ask("POST", "/text_to_image?wait=30", BODY, TOLD)
    place = f"/faces/jobs/{answer.json()['job_id']}/"
    assert answer.headers["Location"] == place
    assert answer.json()["response"][0]["url"] == f"{place}images/0.png"
    inside = place.removeprefix("/faces")
    events = behind.ask("GET", f"{inside}events", None, TOLD).body.decode()
    assert json.loads(re.findall("event: image\ndata: (.*)", events)[0])["url"] == f"{place}images/0.png"
    (job,) = behind.ask("GET", "/jobs/", None, TOLD).json()["jobs"]
    assert (job["images"][0]["url"], job["images"][0]["thumbnail"]) == (f"{place}images/0.png", f"{place}images/0.webp")
    steps = behind.ask("GET", f"{inside}steps", None, TOLD).json()["steps"]
    assert all(one["thumbnail"].startswith(place) for one in steps) and steps
    assert behind.ask("GET", "/openapi.json", None, TOLD).json()["servers"] == [{"url": "https://faces.example/faces"}]
    assert behind.ask("GET", "/openapi.json").json()["servers"] == [{"url": "/"}]
    address = behind.ask("POST", "/v1/images/generations", {**{"prompt": "a"}, "response_format": "url"}, TOLD).json()
    assert address["data"][0]["url"].startswith("https://faces.example/faces/jobs/")
    assert behind.ask("GET", "/static/sw.js", None, TOLD).headers["Service-Worker-Allowed"] == "/faces/"
    origin = {"Origin": "https://faces.example"}
    assert behind.ask("POST", "/text_to_image", BODY, TOLD | origin).status == 200, "the page's own, without a flag"
    assert behind.ask("POST", "/text_to_image", BODY, TOLD | {"Origin": "https://evil.example"}).status == 403
    assert behind.ask("GET", "/jobs/", None, TOLD | {"X-Forwarded-Host": "evil.example"}).status == 403


def test_the_key_stays_below_the_sub_path(engine: DrawingEngine) -> None:
    with serving(engine, trusted_proxies=LOCAL, hosts=["faces.example"], api_key="x") as live:
        cookie = live.ask("GET", "/session?key=x", None, TOLD).headers["Set-Cookie"]
        assert "Path=/faces/" in cookie and "Secure" in cookie
        plain = live.ask("GET", "/session?key=x").headers["Set-Cookie"]
        assert "Path=/;" in plain and "Secure" not in plain


@pytest.mark.parametrize("prefix", ["https://evil.example", "//evil.example", "/a b", "/<script>", "faces", "/a/../b?"])
def test_a_strange_prefix_is_none(behind: Live, prefix: str) -> None:
    answer = behind.ask("POST", "/text_to_image", BODY, {"X-Forwarded-Prefix": prefix})
    assert answer.headers["Location"] == f"/jobs/{answer.json()['job_id']}/"


@pytest.mark.parametrize("trusted", [[], ["192.0.2.0/24"]])
def test_strangers_are_not_believed(engine: DrawingEngine, trusted: list[str]) -> None:
    with serving(engine, trusted_proxies=[network(one) for one in trusted]) as live:
        answer = live.ask("POST", "/text_to_image", BODY, TOLD)
        assert answer.headers["Location"].startswith("/jobs/")
        assert live.ask("GET", "/openapi.json", None, TOLD).json()["servers"] == [{"url": "/"}]
        job = live.app.extensions["service"].queue.get(answer.json()["job_id"])
        assert job.client and "192.0.2.7" not in job.client


# ---- nginx -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nginx(engine: DrawingEngine, tmp_path: Path) -> Iterator[str]:
    """A real nginx with the block from the documentation; the address of the page behind it."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if program is None:
        pytest.skip("nginx is not installed")
    (block,) = re.findall("^```nginx\n(.*?)^```$", (ROOT / "docs/server.md").read_text(encoding="utf-8"), re.M | re.S)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(engine, trusted_proxies=LOCAL) as live:
        assert "http://127.0.0.1:5001/" in block
        folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in
                          ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;"
            f"events {{}} http {{ access_log off; {folders} server {{ listen 127.0.0.1:{port};"
            f"{block.replace('127.0.0.1:5001', f'127.0.0.1:{live.port}')} }} }}", encoding="utf-8")
        words = [program, "-p", str(tmp_path), "-e", str(tmp_path / "error.log"), "-c", str(tmp_path / "nginx.conf")]
        with subprocess.Popen(words) as process:
            try:
                wait_for(process, port, tmp_path / "error.log")
                yield f"http://127.0.0.1:{port}/faces/"
            finally:
                process.terminate()


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until a process listens on this port."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_clients_work_behind_nginx(nginx: str) -> None:
    faces = Faces(nginx)
    job_id = faces.start("a smiling woman", n_images=1, n_inf_steps=4, stream_freq=2)
    kinds = [event.kind for event in faces.stream(job_id)]
    assert kinds.count("preview") == 1 and kinds[-1] == "done" and len(faces.wait(job_id)) == 1
    made = requests.post(f"{nginx}text_to_image", json=BODY, timeout=PATIENCE_S)
    watched = requests.get(urljoin(nginx, made.headers["Location"]), timeout=PATIENCE_S)
    assert watched.status_code == 200 and watched.json()["job_id"] == made.json()["job_id"]
    (server,) = requests.get(f"{nginx}openapi.json", timeout=PATIENCE_S).json()["servers"]
    assert requests.get(f"{server['url']}/health", timeout=PATIENCE_S).json() == {"status": "ok"}
    assert server["url"] == nginx.rstrip("/")


def test_the_page_works_behind_nginx(nginx: str, page: Page) -> None:
    visit(page, nginx)
    write_prompt(page, "a smiling woman")
    generate(page)
    expect(page.locator(".job[data-state=succeeded]")).to_be_visible()
