"""What does HTTP say?

`create_app(engines)` builds the application: the routes, what each takes and what it answers. `main` serves it:
`python api.py --model models/celeba128`.

It does not know what generates: an engine is anything like `core.engine.Engine`, made by a factory that runs in the one
background thread where all model work happens. This file never imports torch, so its tests run in seconds. What may be
asked stands in `core/web/requests.py`, what is answered in `core/web/responses.py`, errors in
`core/web/errors.py`, event streams in `core/web/sse.py`, latents in `core/web/routes/latents.py`, how jobs run in
`core/engine.py` and `core/jobs/queue.py`, the process in `core/web/wsgi.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Flask, Response
from flask_cors import CORS

from core import disk
from core.addresses import address_of, host_of, is_local
from core.addresses import listener as listen
from core.command import UserError
from core.engine import Engine, EngineInfo
from core.jobs.model_files import is_ours
from core.jobs.models import Models
from core.jobs.queue import JobQueue
from core.jobs.retention import Retention
from core.jobs.service import Elsewhere, EngineService
from core.jobs.storage_errors import StoreError
from core.jobs.store import Store
from core.process import end_with_parent, tied
from core.quiet import keep_quiet
from core.text import captions
from core.text.model_captions import examples_of, vocabulary_of
from core.web import options, requests
from core.web.api_description import PUBLIC_ENDPOINTS, describe
from core.web.api_docs import add_reference
from core.web.errors import Problem, problem_response
from core.web.monitoring import Telemetry, configure_logging
from core.web.proxies import Network, TrustedProxies, network, server_url
from core.web.rendered import RenderedAnswers
from core.web.routes.images import add_results
from core.web.routes.jobs import add_jobs, client_name
from core.web.routes.latents import ImageReader, add_exchange
from core.web.routes.openai_images import add_openai_images
from core.web.routes.page import add_page
from core.web.routes.prompts import add_prompts
from core.web.routes.sdapi import add_sdapi
from core.web.routes.server import add_state, info_of, present
from core.web.routes.verification import add_verification
from core.web.security import add_request_checks
from core.web.sse import EventStreams
from core.web.waiting import MAX_WAITING_REQUESTS, WaitingRequests
from core.web.wsgi import Server, allowed_host, allowed_origin, at_least, serve, size
from model_loading import add_model_flags, descriptions_of, models_of, paths_of, words_of

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent
DEFAULT_PORT = 5001
HEARTBEAT_S = 15.0
MAX_STREAMS = 12
THREADS = MAX_STREAMS + MAX_WAITING_REQUESTS + 8  # those may hold one for minutes; the rest answer everybody else
PUBLIC_FILES = frozenset(("page", "static_file"))  # the same for everybody, whatever a proxy made of Host and Origin


# ---- the application -------------------------------------------------------------------------------------------------


def create_app(
    engines: Callable[[], Engine] | Models,
    *,
    start: bool = True,
    api_key: str | None = None,
    hosts: Sequence[str] | None = None,
    cors_origins: Sequence[str] = (),
    data_dir: Path | None = None,
    vocabulary: Callable[[], Mapping[str, str]] = captions.vocabulary,
    examples: Callable[[], Sequence[str]] = tuple,
    max_waiting: int = 64,
    keep: Retention | None = None,
    max_batch: int | None = None,
    max_streams: int = MAX_STREAMS,
    heartbeat_s: float = HEARTBEAT_S,
    watermark: bool = True,
    trusted_proxies: Sequence[Network] = (),
    workers: Elsewhere | None = None,
) -> Flask:
    """Build the application.

    `engines` makes the engine, or loads one of several. `start` begins the engine's thread, where that happens; without
    it somebody has to call
    `app.extensions["service"].start()` later, or `.load()` and `.queue.run_next(batch)` in a thread of their own.
    `hosts` are names under which the server may be addressed beside numeric addresses; None allows the loopback names
    alone. `cors_origins` are other web pages that may use it. `data_dir` keeps jobs and images; None takes a folder
    that is removed with the application. `vocabulary` gives the words of the model's captions, "known" or "rare",
    and `examples` some of these captions where a person wrote them.
    `max_batch` images at most share one step (None: by device). `max_streams` bounds the event streams, each of which
    holds one thread of the web server. `watermark` puts the invisible mark into the images of new jobs.
    `trusted_proxies` are those whose X-Forwarded headers count. `workers` generate in place of the engines.

    Raises StoreError when `data_dir` cannot be used.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = requests.MAX_BODY_BYTES
    app.url_map.strict_slashes = False  # no redirect, so no HTML, for a forgotten slash
    app.url_map.merge_slashes = False
    app.wsgi_app = TrustedProxies(app.wsgi_app, trusted_proxies)  # type: ignore[method-assign]
    folder = Path(tempfile.mkdtemp(prefix="faces-")) if data_dir is None else data_dir
    store = Store(folder)
    queue = JobQueue(store, max_waiting=max_waiting, keep=keep or Retention())
    telemetry = Telemetry()
    service = EngineService(engines, store, queue, telemetry, max_batch, watermark, workers)
    if data_dir is None:
        weakref.finalize(service, discard, store, folder)
    app.extensions |= {"service": service, "telemetry": telemetry}
    telemetry.watch_requests(app)
    telemetry.watch(lambda: present(service))
    if cors_origins:
        CORS(app, origins=list(cors_origins), methods=["GET", "POST", "PUT", "DELETE"],
             allow_headers=["Content-Type", "Authorization", "X-API-Key", "Last-Event-ID", "If-None-Match",
                            "Idempotency-Key", "X-Client-Id"],
             expose_headers=["Location", "Retry-After", "ETag"])
    add_request_checks(app, api_key=api_key, public=PUBLIC_ENDPOINTS, hosts=hosts, origins=cors_origins,
                       files=PUBLIC_FILES)
    app.register_error_handler(StoreError, disk_fails)

    def loaded() -> EngineInfo:
        return info_of(service)

    @cache
    def document(ready: bool) -> dict[str, Any]:
        others = service.models.infos if ready else ()
        return describe(app, service.info if ready else None, locked=api_key is not None, others=others)

    words, own = vocabulary(), examples()
    reader, waiting, answers = ImageReader(), WaitingRequests(queue), RenderedAnswers()
    add_jobs(app, service, words, EventStreams(queue, telemetry, limit=max_streams, heartbeat_s=heartbeat_s), reader,
             waiting, answers)
    add_results(app, queue, answers)
    add_exchange(app, service, loaded, reader)
    add_verification(app, service, loaded, words, reader, client_name)
    add_sdapi(app, service, loaded, words, reader, waiting, client_name)
    add_openai_images(app, service, loaded, words, reader, waiting, client_name)
    add_prompts(app, service, words, own)
    add_state(app, service, telemetry, lambda info, models: options.options(info, words, own, models), answers)
    add_reference(app, lambda: {**document(service.info is not None), "servers": [{"url": server_url()}]})
    add_page(app, ROOT, api_key, answers)
    if start:
        service.start()
    return app


def discard(store: Store, folder: Path) -> None:
    """What a temporary store leaves behind."""
    store.close()
    shutil.rmtree(folder, ignore_errors=True)


def disk_fails(error: StoreError) -> Response:
    log.error("%s", error)
    return problem_response(Problem(503, disk.ANSWERS[error.cause], {"Retry-After": "30"}))


# ---- the command -----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; ends the process with a sentence when it cannot be served."""
    parser = argparse.ArgumentParser(prog="api.py", description="Serve a model: HTTP, live previews and a web page.")
    add, count, number = parser.add_argument, at_least(1, int), at_least(0, float)
    add("--host", type=host_of, default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=DEFAULT_PORT, help="0 takes any free port")
    add_model_flags(parser)
    add("--data-dir", type=Path, default=ROOT / "data", help="keeps jobs and pictures (default: data/)")
    add("--keep-jobs", type=count, default=1000, help="finished jobs that are kept (%(default)s)")
    add("--keep-bytes", type=size, default="2G", help="disk for finished jobs, such as 500M or 2G (%(default)s)")
    add("--keep-days", type=number, help="age at which finished jobs are removed (default: never)")
    add("--max-waiting", type=count, default=64, help="jobs that may wait (%(default)s)")
    add("--api-key", default=os.environ.get("FACES_API_KEY"), help="clients must send it (or set FACES_API_KEY)")
    add("--insecure", action="store_true", help="allow any --host without a key")
    trust = "a proxy, by its address or network, whose X-Forwarded-Proto, -Host, -Prefix and -For count"
    add("--trusted-proxy", type=network, action="append", default=[], help=trust)
    name, origin = "another name this server answers to, behind a proxy", "another web page that may use this server"
    add("--allow-host", type=allowed_host, action="append", default=[], help=name)
    add("--cors-origin", type=allowed_origin, action="append", default=[], help=origin)
    add("--no-watermark", action="store_true", help="put no invisible mark into the pictures")
    add("--log-format", choices=("text", "json"), default="text", help="how the log is written (%(default)s)")
    add("--broker", default=os.environ.get("FACES_BROKER"), metavar="URL",
        help="workers generate, which find their jobs there: redis://, rediss:// or sentinel:// (or set FACES_BROKER)")
    add("--sentinel-master", default="mymaster", help="what Sentinel calls the Redis (%(default)s)")
    add("--engine-here", action="store_true", help="with --broker: start a worker on this machine, too")
    add("--drain-seconds", type=number, default=10.0, help="time for running jobs after SIGTERM (%(default)s)")
    arguments = parser.parse_args(argv)
    arguments.models = paths_of(arguments)
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {arguments.port}")
    if not is_local(arguments.host) and not arguments.api_key and not arguments.insecure:
        parser.error(f"--host {arguments.host} opens the server to the network: give --api-key KEY, or say --insecure")
    if arguments.engine_here and not arguments.broker:
        parser.error("--engine-here goes with --broker URL: without it the engine is here anyway")
    return arguments


def generators_of(arguments: argparse.Namespace) -> tuple[Models, Elsewhere | None]:
    """The models of the command line, and the workers that have them, if it names a broker. Raises UserError."""
    if not arguments.broker:
        return models_of(arguments), None
    try:
        from core.workers.broker import Broker
        from core.workers.remote import Workers
        from core.workers.remote_engine import remote_models

        workers = Workers(Broker.parse(arguments.broker, arguments.sentinel_master))
    except ImportError as error:
        raise UserError(f"--broker needs packages that are not installed ({error}): "
                        "python -m pip install -r requirements-workers.txt") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    return remote_models(workers.link, descriptions_of(arguments)), workers


def worker_here(arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A worker on this machine, which ends with this process."""
    command = [sys.executable, str(ROOT / "worker.py"), *words_of(arguments), "--log-format", arguments.log_format,
               "--sentinel-master", arguments.sentinel_master]
    return subprocess.Popen(command, cwd=ROOT, **tied({**os.environ, "FACES_BROKER": arguments.broker}))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the process's exit status."""
    keep_quiet()
    end_with_parent()
    arguments = parse_arguments(argv)
    configure_logging(arguments.log_format)

    captioned = next((path for path in arguments.models if is_ours(path)), arguments.models[0])
    own_names = (socket.gethostname().lower(), f"{socket.gethostname().lower()}.local")
    hosts = None if is_local(arguments.host) and not arguments.allow_host else (*own_names, *arguments.allow_host)
    days = arguments.keep_days
    try:  # our own socket: waitress leaves its own open when the port is taken
        listener = listen(arguments.host, arguments.port)
    except OSError as error:
        print(f"Cannot listen on {arguments.host}:{arguments.port}: {error.strerror}. Try --port 0.", file=sys.stderr)
        return 1
    try:
        models, workers = generators_of(arguments)
        app = create_app(
            models, workers=workers, start=False, api_key=arguments.api_key or None, hosts=hosts,
            cors_origins=arguments.cors_origin, data_dir=arguments.data_dir, max_batch=arguments.max_batch,
            vocabulary=lambda: vocabulary_of(captioned), examples=lambda: examples_of(captioned),
            max_waiting=arguments.max_waiting,
            keep=Retention(arguments.keep_jobs, arguments.keep_bytes, days * 86400 if days else None),
            watermark=not arguments.no_watermark, trusted_proxies=arguments.trusted_proxy,
        )
    except (StoreError, UserError) as error:
        listener.close()
        print(error, file=sys.stderr)
        return 1
    server = Server(app, listener, threads=THREADS, max_body_bytes=requests.MAX_ANY_BODY_BYTES)
    service: EngineService = app.extensions["service"]
    service.start()
    page = f"session?key={quote(arguments.api_key, safe='')}" if arguments.api_key else ""
    print(f"Open {address_of(arguments.host, server.port)}{page}", flush=True)
    here = worker_here(arguments) if arguments.engine_here else None
    serve(server, lambda: service.close(arguments.drain_seconds))
    if here is not None:
        here.terminate()
        here.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
