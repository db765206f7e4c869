"""Is Redis reached by every kind of address that Celery takes: with a password, by TLS, by Sentinel?"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from types import ModuleType

import pytest
import redis as redis_py

import api
import worker
from core.web import monitoring
from core.workers.broker import Broker
from tests.support.elsewhere import served
from tests.support.redis_server import PROGRAM, RedisServer, free_port, needs_redis
from tests.support.worker_process import WorkerProcess, until

pytestmark = needs_redis


def answers(url: str) -> bool:
    try:
        return bool(Broker.parse(url).connect().ping())
    except redis_py.RedisError:
        return False


def one_job(url: str, folder: Path) -> None:
    """A server and a worker that meet at this address do a job."""
    with served(url, folder / "data") as site, WorkerProcess.drawing(folder / "worker.log", url):
        (job,) = site.wait(site.submit())
        assert job.state == "succeeded"


@pytest.mark.parametrize(("text", "why"), [
    ("", "must be redis://HOST:PORT"),
    ("http://host", "got http://host"),
    ("redis://", "must be redis://HOST:PORT"),
    ("redis://:secret@one;redis://two", "of Sentinel only, got redis://:***@one;redis://two"),
    ("redis://one;sentinel://two", "must be redis://HOST:PORT"),
])
def test_what_is_no_address_is_refused_in_a_sentence(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="--broker") as refused:
        Broker.parse(text)
    assert why in str(refused.value) and "secret" not in str(refused.value)


def test_an_unknown_word_about_certificates_is_refused() -> None:
    with pytest.raises(ValueError, match="ssl_cert_reqs of --broker must be one of none, optional, required, got some"):
        Broker.parse("rediss://host?ssl_cert_reqs=some").celery()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_by_tls_with_a_password(tmp_path: Path) -> None:
    """The server's certificate is checked against the authority that the address names."""
    certificate, key = tmp_path / "redis.pem", tmp_path / "redis.key"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out",
                    str(certificate)], check=True, capture_output=True)
    port = free_port()
    flags = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
             "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no", "--requirepass", "tell-nobody")
    with RedisServer(tmp_path / "redis", *flags):
        url = f"rediss://:tell-nobody@localhost:{port}/0"
        one_job(f"{url}?ssl_ca_certs={certificate}", tmp_path)
        assert "tell-nobody" not in (tmp_path / "worker.log").read_text()
        with served(url, tmp_path / "other") as site:  # which authority? the certificate signed itself
            time.sleep(1)
            assert "does not answer" in site.notice()


def test_by_sentinel(tmp_path: Path) -> None:
    """Two of them, of which one is not there, know where the Redis is."""
    with RedisServer(tmp_path / "redis") as redis:
        ports, config = (free_port(), free_port()), tmp_path / "sentinel.conf"
        config.write_text(f"port {ports[1]}\nbind 127.0.0.1\ndir {tmp_path}\n"
                          f"sentinel monitor mymaster 127.0.0.1 {redis.port} 1\n")
        assert PROGRAM is not None
        with subprocess.Popen([PROGRAM, str(config), "--sentinel"], stdout=subprocess.DEVNULL) as sentinel:
            try:
                url = ";".join(f"sentinel://127.0.0.1:{port}" for port in ports)
                until(lambda: answers(url))
                one_job(url, tmp_path)
            finally:
                sentinel.terminate()


@pytest.mark.parametrize(("program", "words", "status", "why"), [
    (api, ["--port", "0", "--broker", "http://r"], 1, "--broker must be redis://HOST:PORT"),
    (api, ["--engine-here"], 2, "--engine-here goes with --broker URL"),
    (worker, [], 2, "--broker URL is needed"),
    (worker, ["--broker", "amqp://r"], 1, "worker.py: --broker must be redis://HOST:PORT"),
    (worker, ["--broker", "redis://r", "--model", "nowhere"], 1, "worker.py: "),
])
def test_a_command_line_that_does_not_fit_is_a_sentence(
    program: ModuleType, words: list[str], status: int, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FACES_BROKER", raising=False)
    monkeypatch.setattr(monitoring, "configure_logging", lambda kind: None)  # it changes the process
    monkeypatch.setattr(api, "configure_logging", lambda kind: None)
    try:
        ended = program.main([*words, *(["--data-dir", str(tmp_path)] if program is api else [])])
    except SystemExit as exited:
        ended = exited.code
    said = capsys.readouterr().err
    assert ended == status and why in said and "Traceback" not in said, said
