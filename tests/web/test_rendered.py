"""Is an answer that is kept always the one that would be made now, and is memory bounded?"""

from __future__ import annotations

import ipaddress
import threading
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from core.jobs.retention import Retention
from core.web import rendered
from core.web.rendered import OVERHEAD_BYTES, Rendered, RenderedAnswers
from tests.support.asking import make_app, run, service_of, work
from tests.support.drawing import DrawingEngine


@pytest.fixture
def job(app: Flask, client: FlaskClient) -> str:
    """A finished one of two images."""
    return run(app, n_images=2, n_inf_steps=3, stream_freq=1)


def answer(body: bytes) -> Rendered:
    return Rendered(body, "text/plain", rendered.digest(body))


def test_the_least_recently_asked_for_make_room() -> None:
    answers = RenderedAnswers(max_bytes=16 * (OVERHEAD_BYTES + 100))
    for number in range(16):
        answers.keep(number, answer(b"x" * 100))
    assert answers.find(0) is not None  # asked for again: 1 is the oldest now
    answers.keep(16, answer(b"y" * 100))
    assert answers.find(1) is None and answers.find(0) is not None and answers.find(16) is not None
    assert answers.num_bytes == 16 * (OVERHEAD_BYTES + 100)


def test_one_answer_cannot_push_out_all_others() -> None:
    answers = RenderedAnswers(max_bytes=80_000)
    answers.keep("small", answer(b"x"))
    large = answers.get("large", lambda: answer(b"x" * 10_000))
    assert large.body == b"x" * 10_000 and answers.find("large") is None and answers.find("small") is not None


def test_the_same_key_is_counted_once() -> None:
    answers = RenderedAnswers()
    for size in (10, 500, 20):
        answers.keep("key", answer(b"x" * size))
    assert answers.num_bytes == OVERHEAD_BYTES + 20


def test_many_threads_keep_the_sum() -> None:
    answers = RenderedAnswers(max_bytes=40 * OVERHEAD_BYTES)

    def ask(start: int) -> None:
        for number in range(start, start + 400):
            assert answers.get(number % 97, lambda: answer(b"z" * 7)).body == b"z" * 7

    threads = [threading.Thread(target=ask, args=(37 * one,)) for one in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = sum(answers.find(number) is not None for number in range(97))
    assert 0 < kept <= 40 and answers.num_bytes == kept * (OVERHEAD_BYTES + 7)


@pytest.mark.parametrize("path", ["", "?include=none", "images/0.png", "images/1.webp", "images/0.png?t=1",
                                  "collage.png", "animation.webp", "archive.zip"])
def test_the_second_answer_is_the_first(client: FlaskClient, job: str, path: str) -> None:
    first, second = (client.get(f"/jobs/{job}/{path}") for _ in range(2))
    assert first.status_code == second.status_code == 200
    assert first.data == second.data and len(first.data) > 0
    same = {"ETag", "Cache-Control", "Content-Type", "Content-Length", "Content-Disposition"}
    assert [(name, first.headers.get(name)) for name in sorted(same)] == [
        (name, second.headers.get(name)) for name in sorted(same)]
    known = client.get(f"/jobs/{job}/{path}", headers={"If-None-Match": second.headers["ETag"]})
    assert (known.status_code, known.data) == (304, b"") and known.headers["ETag"] == second.headers["ETag"]


def test_every_decision_is_seen_at_once(client: FlaskClient, job: str) -> None:
    def favourites() -> list[bool]:
        return [update.get("favourite", False) for update in client.get(f"/jobs/{job}/").get_json()["response"]]

    assert favourites() == [False, False]
    client.put(f"/images/{job}/1/favourite")
    assert favourites() == [False, True]
    client.delete(f"/images/{job}/1/favourite")
    assert favourites() == [False, False]
    assert client.get(f"/jobs/{job}/images/0.png").status_code == 200
    client.delete(f"/jobs/{job}/images/0")
    assert client.get(f"/jobs/{job}/images/0.png").status_code == 410 and favourites() == [False]
    client.post(f"/jobs/{job}/images/0/restore")
    assert client.get(f"/jobs/{job}/images/0.png").status_code == 200 and favourites() == [False, False]
    client.delete(f"/jobs/{job}/")
    for path in ("", "images/0.png", "collage.png"):
        assert client.get(f"/jobs/{job}/{path}").status_code == 410


def test_a_job_that_made_room_for_a_newer_one_is_gone(engine: DrawingEngine) -> None:
    app = make_app(engine, keep=Retention(max_jobs=1))
    client, first = app.test_client(), run(app)
    assert [client.get(f"/jobs/{first}/").status_code for _ in range(2)] == [200, 200]
    second = run(app)
    assert [client.get(f"/jobs/{job}/").status_code for job in (first, second)] == [410, 200]


def test_a_running_job_is_not_kept(app: Flask, client: FlaskClient) -> None:
    job = client.post("/text_to_image", json={"prompt": "a man", "num_inference_steps": 3}).get_json()["job_id"]
    assert client.get(f"/jobs/{job}/").get_json()["status"] == "queued"
    work(app)
    assert client.get(f"/jobs/{job}/").get_json()["status"] == "succeeded"


def test_addresses_are_those_of_each_asker(engine: DrawingEngine) -> None:
    app = make_app(engine, trusted_proxies=[ipaddress.ip_network("127.0.0.1")])
    client = app.test_client()
    job = client.post("/text_to_image", json={"prompt": "a man", "num_inference_steps": 3}).get_json()["job_id"]
    work(app)
    direct, below = (client.get(f"/jobs/{job}/", headers=headers).get_json()["response"][0]["url"]
                     for headers in ({}, {"X-Forwarded-Prefix": "/faces"}))
    assert direct == f"/jobs/{job}/images/0.png" and below == f"/faces{direct}"
    assert client.get(f"/jobs/{job}/").get_json()["response"][0]["url"] == direct


def test_the_options_follow_the_server(app: Flask, client: FlaskClient) -> None:
    first, second = client.get("/options"), client.get("/options")
    assert first.data == second.data and first.headers["ETag"] == second.headers["ETag"]
    work(app)
    client.post("/text_to_image", json={"prompt": "a man", "num_inference_steps": 3})
    work(app)  # now a step has been measured
    batch = service_of(app).batch
    assert batch is not None
    assert client.get("/options").get_json()["seconds_per_image_step"] == batch.seconds_per_image_step


def test_a_file_of_the_page_that_changes_is_read_again(
    engine: DrawingEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import api

    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "a.js").write_text("1")
    (tmp_path / "frontend.html").write_text("one")
    monkeypatch.setattr(api, "ROOT", tmp_path)
    client = make_app(engine).test_client()
    assert client.get("/").data == b"one" and client.get("/static/a.js").data == b"1"
    (tmp_path / "frontend.html").write_text("three")
    assert client.get("/").data == b"three"
    for name in ("b.js", "..%2ffrontend.html", "..%5cx.js", ".js"):
        assert client.get(f"/static/{name}").status_code == 404


def test_what_wrk_prints_is_read() -> None:
    from benchmarks.benchmark_http import Load, read_wrk

    text = "  Latency Distribution\n     50%   33.01ms\n     99%   1.34s \n  20012 requests in 10.01s, 5.00MB read\n"
    assert read_wrk(text + "Requests/sec:   1999.55\n") == Load(1999.55, 1.34, 0)
    bad = "  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 5\n"
    assert read_wrk(text.replace("1.34s", "900.00us") + bad + "Requests/sec: 7.5\n") == Load(7.5, 9e-4, 15)
    with pytest.raises(ValueError, match="not what wrk"):
        read_wrk("unable to connect to 127.0.0.1:1 Connection refused")
