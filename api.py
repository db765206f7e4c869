"""What does HTTP say?

`create_app(engine_factory)` builds the application: the routes, what each takes and what it answers. `main` serves it:
`python api.py --model models/celeba128`.

It does not know what draws: an engine is anything like `core.engine.Engine`, made by a factory that runs in the one
background thread where all model work happens. This file never imports torch, so its tests run in seconds. What may be
asked stands in `core/schemas.py`, what is answered in `core/answers.py`, errors and the door in `core/web.py`, event
streams in `core/streams.py`, latents in `core/exchange.py`, how jobs run in `core/engine.py` and `core/jobs.py`, the
process in `core/serving.py`.
"""

from __future__ import annotations

import argparse
import hmac
import json
import logging
import os
import random
import re
import secrets
import shutil
import socket
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, request, send_from_directory
from flask_cors import CORS

from core import answers, captions, disk, openapi, schemas, serializers
from core.child import end_with_parent
from core.emphasis import unread_from, unread_in, unread_warning
from core.engine import Engine, EngineInfo, EngineService
from core.exchange import BUSY, PictureReader, add_exchange, read_drawing
from core.jobs import DeletedJob, JobQueue
from core.machine import address_of, host_of, is_local
from core.machine import listener as listen
from core.openapi import BINARY, ETAG, IF_NONE_MATCH, JSON, UNCHANGED, Answer, Header, operation
from core.population import open_facets
from core.prompts import can_say, spoken_attributes
from core.prompts import read as read_prompt
from core.quiet import keep_quiet
from core.reference import add_reference
from core.results import NO_JOB, add_results, find
from core.serving import Server, allowed_host, allowed_origin, at_least, serve, size
from core.store import Retention, Store, StoreError
from core.streams import EventStreams
from core.submission import submit
from core.telemetry import Present, Telemetry, configure_logging
from core.verification import add_verification
from core.web import (
    KEY_COOKIE,
    Problem,
    add_door,
    invalid,
    json_response,
    problem_response,
    read_header,
    read_json,
    read_query,
    shown,
    tagged,
    validate,
)

ROOT = Path(__file__).resolve().parent
DEFAULT_MODEL = ROOT / "models" / "celeba128"
DEFAULT_PORT = 5001
HEARTBEAT_S = 15.0
MAX_STREAMS = 12
THREADS = MAX_STREAMS + 8  # each stream may hold one for minutes; the rest answer everybody else
PUBLIC_ENDPOINTS = frozenset(("page", "static_file", "session", "health"))  # all that needs no key
PUBLIC_FILES = frozenset(("page", "static_file"))  # the same for everybody, whatever a proxy made of Host and Origin
MEDIA_TYPES = {  # static/ serves nothing else
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}
FILE_TYPES = {kind: {"type": "object"} if kind.endswith("json") else BINARY for kind in MEDIA_TYPES.values()}
INFO = {
    "title": "Text to face",
    "version": "1.0.0",
    "description": "Draws faces from English. Ask with POST /text_to_image, watch with GET /jobs/{job_id}/.",
}
TAGS = {
    "jobs": "Ask, watch, list, cancel, delete.",
    "results": "What was drawn, as files.",
    "latents": "Pictures to latents and back, without a job.",
    "prompts": "What the model understands.",
    "server": "Limits, state, numbers, this document.",
    "page": "The web page.",
}
COMMON_PROBLEMS = {
    401: "The key is missing or wrong; only where the server was started with one.",
    403: "The Host or the Origin is not allowed.",
    500: "A fault of the server.",
}
KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": KEY_COOKIE},
}
PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "job_id": {"schema": {"type": "string", "pattern": "^[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{32}$"}},
    "index": {"schema": {"type": "integer", "minimum": 0, "maximum": 7}},
    "name": {"schema": {"type": "string", "pattern": r"^[A-Za-z0-9_.-]+\.(js|css|svg|png|webmanifest)$"}},
}
log = logging.getLogger(__name__)


# ---- the application -------------------------------------------------------------------------------------------------


def create_app(
    engine_factory: Callable[[], Engine],
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
) -> Flask:
    """Build the application.

    `start` begins the engine's thread, which calls `engine_factory` once; without it somebody has to call
    `app.extensions["service"].start()` later, or `.load()` and `.queue.run_next(batch)` in a thread of their own.
    `hosts` are names under which the server may be addressed beside numeric addresses; None allows the loopback names
    alone. `cors_origins` are other web pages that may use it. `data_dir` keeps jobs and pictures; None takes a folder
    that is removed with the application. `vocabulary` gives the words of the model's captions, "known" or "rare",
    and `examples` some of these captions where a person wrote them.
    `max_batch` images at most share one step (None: by device). `max_streams` bounds the event streams, each of which
    holds one thread of the web server. `watermark` puts the invisible mark into the pictures of new jobs.

    Raises StoreError when `data_dir` cannot be used.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = schemas.MAX_BODY_BYTES
    app.url_map.strict_slashes = False  # no redirect, so no HTML, for a forgotten slash
    app.url_map.merge_slashes = False
    folder = Path(tempfile.mkdtemp(prefix="faces-")) if data_dir is None else data_dir
    store = Store(folder)
    queue = JobQueue(store, max_waiting=max_waiting, keep=keep or Retention())
    telemetry = Telemetry()
    service = EngineService(engine_factory, store, queue, telemetry, max_batch, watermark)
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
    add_door(app, api_key=api_key, public=PUBLIC_ENDPOINTS, hosts=hosts, origins=cors_origins, files=PUBLIC_FILES)
    app.register_error_handler(StoreError, disk_fails)

    def loaded() -> EngineInfo:
        return info_of(service)

    @cache
    def document(ready: bool) -> dict[str, Any]:
        return describe(app, service.info if ready else None, locked=api_key is not None)

    words, own = vocabulary(), examples()
    reader = PictureReader()
    add_jobs(app, service, words, EventStreams(queue, telemetry, limit=max_streams, heartbeat_s=heartbeat_s), reader)
    add_results(app, queue)
    add_exchange(app, service, loaded, reader)
    add_verification(app, service, loaded, words, reader, client_name)
    add_prompts(app, service, words, own)
    add_state(app, service, telemetry, lambda: schemas.options(service.info, words, own))
    add_reference(app, lambda: document(service.info is not None))
    add_page(app, api_key)
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


def describe(app: Flask, info: EngineInfo | None, *, locked: bool) -> dict[str, Any]:
    """The OpenAPI document; once the model is loaded it also names the samplers and the size of a latent."""
    document = openapi.document(
        app, info=INFO, tags=TAGS, problem=answers.ProblemAnswer, common=COMMON_PROBLEMS,
        path_parameters=PATH_PARAMETERS, public=PUBLIC_ENDPOINTS, security=KEY_SCHEMES if locked else {},
    )
    if info is not None:
        schemas.name_choices(document["components"]["schemas"], info)
    return document


def info_of(service: EngineService) -> EngineInfo:
    """What the model says of itself. Raises a 503 problem until it is loaded."""
    if service.info is not None:
        return service.info
    if service.state == "FAILED":
        raise Problem(503, service.failure, state=service.state)
    detail = "The model is still loading; try again in a moment."
    raise Problem(503, detail, {"Retry-After": "2"}, state=service.state)


def present(service: EngineService) -> Present:
    """What is so now, for the metrics."""
    jobs = service.queue.counts()
    states = ("running", "succeeded", "failed", "cancelled")
    return Present(
        jobs={"queued": jobs["waiting"], **{state: jobs[state] for state in states}},
        waiting=jobs["waiting"],
        running_images=service.batch.num_images if service.batch else 0,
        ready=service.state == "READY",
    )


# ---- jobs ------------------------------------------------------------------------------------------------------------


def client_name() -> str:
    """Whose turn it is: the address, and where several people share one, what the client calls itself."""
    return f"{request.remote_addr} {read_header('X-Client-Id', 64) or ''}"


def add_jobs(
    app: Flask, service: EngineService, words: Mapping[str, str], streams: EventStreams, reader: PictureReader
) -> None:
    """Ask, watch, list, cancel, delete."""
    queue = service.queue

    @app.post("/text_to_image")
    @operation(
        "Draw faces", "jobs",
        {200: Answer("The job waits.", {JSON: answers.JobAccepted}, (Header("Location", "where to watch it"),))},
        bodies={JSON: schemas.TextToImage},
        headers=(Header("Idempotency-Key", "repeating the request with the same key returns the first job",
                        {"type": "string", "pattern": "^[!-~]{1,200}$"}),
                 Header("X-Client-Id", "tells apart clients that share an address, so that each gets its turn",
                        {"type": "string", "pattern": "^[!-~]{1,64}$"})),
        problems={429: "The queue is full.", 503: BUSY},
    )
    def text_to_image() -> Response:
        """Answers at once; the job is drawn in its turn, and survives a restart of the server."""
        info = info_of(service)
        client, key = client_name(), read_header("Idempotency-Key", 200)
        wanted = validate(schemas.TextToImage, read_drawing(), context=info, aliases=schemas.ALIASES)
        pictures = {} if wanted.init_image is None else reader.normalised(wanted, info.image_size)
        job = submit(service, info, words, wanted, pictures, client=client, key=key)
        body = {"job_id": job.id, "status": job.state, "parameters": job.parameters, "warnings": list(job.warnings)}
        return json_response(body, {"Location": f"/jobs/{job.id}/"})

    @app.get("/jobs/")
    @operation(
        "The jobs that are kept, newest first", "jobs",
        {200: Answer("One page of them.", {JSON: answers.JobList}, (ETAG,)), 304: UNCHANGED},
        query=schemas.JobsQuery, headers=(IF_NONE_MATCH,), problems={503: "The disk fails."},
    )
    def job_list() -> Response:
        """Jobs that come or go in the meantime do not shift the pages."""
        wanted = read_query(schemas.JobsQuery)
        try:
            jobs, following = queue.list(
                limit=wanted.limit, cursor=wanted.cursor, status=wanted.states, query=wanted.q,
                favourites=wanted.favourites == "only",
            )
        except ValueError as error:
            raise invalid([(("cursor",), "must be the next of an earlier answer")], pointer="?") from error
        return tagged(json_response({
            "jobs": [serializers.job_summary(job) for job in jobs if not job.delete_requested],
            "next": following,
        }))

    @app.get("/jobs/<job_id>/")
    @operation(
        "How far is a job?", "jobs",
        {200: Answer("The job with the latest update of each image.", {JSON: answers.JobAnswer}, (ETAG,)),
         304: UNCHANGED},
        query=schemas.JobQuery, headers=(IF_NONE_MATCH,), problems=NO_JOB,
    )
    def job_status(job_id: str) -> Response:
        """Polling is cheap with If-None-Match and `include=none`."""
        include = read_query(schemas.JobQuery).include
        job = find(queue.get, job_id)
        now = job.snapshot()
        decided = "".join(f"-{'.'.join(map(str, sorted(some)))}" for some in now.marks if some)
        tag = f"{job.id}-{now.events[-1].id}-{include}{decided and f'-{len(now.marks.favourites)}{decided}'}"
        if request.if_none_match.contains_weak(tag):
            return tagged(Response(status=304), tag)
        return tagged(json_response(serializers.job_answer(job, now, include)), tag)

    @app.post("/jobs/<job_id>/cancel")
    @operation(
        "Stop a job", "jobs", {200: Answer("The job, asked to stop.", {JSON: answers.Cancelled})}, problems=NO_JOB
    )
    def cancel(job_id: str) -> Response:
        """A waiting job stops at once, a running one within one step, and a finished one stays as it is."""
        job = find(queue.cancel, job_id)
        return json_response({"job_id": job.id, "status": job.state, "cancel_requested": job.cancel_requested})

    @app.delete("/jobs/<job_id>/")
    @operation("Stop a job and delete it with its pictures", "jobs", {204: Answer("It is gone.")},
               query=schemas.DeleteQuery, problems={**NO_JOB, 409: "It has favourites; say what becomes of them."})
    def delete(job_id: str) -> Response:
        """A second time answers 410."""
        favourites = read_query(schemas.DeleteQuery).favourites
        marks = find(queue.get, job_id).marks
        if favourites == "refuse" and (kept := len(marks.favourites - marks.deleted)):
            raise Problem(409, f"The job holds {kept} favourite{'s' * (kept > 1)}: ?favourites=keep deletes the other "
                               "pictures, ?favourites=delete all of it.")
        try:
            (queue.delete_but_favourites if favourites == "keep" else queue.delete)(job_id)
        except DeletedJob:  # by somebody else, a moment ago
            pass
        return Response(status=204)

    @app.get("/jobs/<job_id>/events")
    @operation(
        "Watch a job", "jobs",
        {200: Answer("`status`, `progress`, `preview`, `image` and `done`, each with a number and JSON.",
                     {"text/event-stream": answers.StreamEvent}),
         204: Answer("There is nothing after that number, and never will be.")},
        query=schemas.EventsQuery,
        headers=(Header("Last-Event-ID", "only events after this one",
                        {"type": "string", "pattern": "^[0-9]{1,9}$"}),),
        problems={**NO_JOB, 400: "Last-Event-ID is no number.", 429: "Too many streams are open."},
    )
    def events(job_id: str) -> Response:
        """Everything that has happened, then what happens, until the job ends; a comment at least every 15 seconds."""
        wanted = read_query(schemas.EventsQuery)
        job = find(queue.get, job_id)
        text = request.headers.get("Last-Event-ID", str(wanted.after))
        if not re.fullmatch("[0-9]{1,9}", text):
            raise Problem(400, f"Last-Event-ID must be the number of an event; got {shown(text)}")
        return streams.answer(job, int(text), with_previews=wanted.previews != "none")


# ---- what the model understands --------------------------------------------------------------------------------------


def add_prompts(app: Flask, service: EngineService, words: Mapping[str, str], own: Sequence[str]) -> None:
    """What the model was trained to understand. Only in which words it hears a prompt is known when it is loaded.

    `own` are captions that a person wrote, where the model learned from those.
    """
    spoken = spoken_attributes(words)

    @app.post("/prompt/analyze")
    @operation("What does the model understand of a prompt?", "prompts",
               {200: Answer("The analysis.", {JSON: answers.AnalysisAnswer})}, bodies={JSON: schemas.AnalyzePrompt})
    def analyze() -> Response:
        """Positions count code points."""
        prompt = validate(schemas.AnalyzePrompt, read_json()).prompt
        heard, cut = prompt, len(prompt)
        if (info := service.info) is not None:
            heard, cut = info.emphasis(prompt), unread_in(prompt, info)
            heard = heard[:unread_from(heard, heard, info.read_to)]
        found = read_prompt(prompt[:cut], words)
        unread = [replace(word, start=cut + word.start, end=cut + word.end, status="unread", suggestion=None)
                  for word in read_prompt(prompt[cut:], words).words]
        return json_response({
            "attributes": dict(found.attributes),
            "heard": heard,
            "open": [facet.to_dict() for facet in open_facets(found.attributes, spoken)],
            "words": [asdict(word) for word in (*found.words, *unread)],
            "claims": [asdict(claim) for claim in found.claims],
            "contradictions": list(found.contradictions),
            "warnings": [*unread_warning("The prompt", prompt, cut), *found.warnings],
        })

    @app.get("/vocabulary")
    @operation("The words that the model was trained on", "prompts",
               {200: Answer("Words, phrases and attributes.", {JSON: answers.VocabularyAnswer}, (ETAG,)),
                304: UNCHANGED},
               headers=(IF_NONE_MATCH,))
    def vocabulary() -> Response:
        """It changes only with the model."""
        return tagged(json_response({
            "words": dict(words),
            "phrases": [asdict(phrase) for phrase in captions.phrases() if can_say(phrase.text, words)],
            "attributes": [name for name in captions.ATTRIBUTES if name in spoken],
        }))

    @app.get("/prompt/surprise")
    @operation("A prompt like those of the training", "prompts",
               {200: Answer("The prompt.", {JSON: answers.SurpriseAnswer})}, query=schemas.SurpriseQuery)
    def surprise() -> Response:
        """Drawn from how frequent each attribute is among the training pictures; or a caption that a person wrote."""
        seed = read_query(schemas.SurpriseQuery).seed
        rng = random.Random(secrets.randbits(64) if seed is None else seed)
        return json_response({"prompt": rng.choice(own) if own else captions.surprise(rng)})


# ---- the state of the server -----------------------------------------------------------------------------------------


def add_state(
    app: Flask, service: EngineService, telemetry: Telemetry, options: Callable[[], dict[str, Any]]
) -> None:
    """What may be asked, whether the server lives and is ready, and its numbers."""

    @app.get("/options")
    @operation("Limits, defaults and choices", "server",
               {200: Answer("Everything that a form needs.", {JSON: answers.OptionsAnswer}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,))
    def show_options() -> Response:
        """Answers while the model loads too: then without what only the model knows."""
        return tagged(json_response({
            "state": service.state, "failure": service.failure or None, "watermark": service.watermark,
            **options(),
            "seconds_per_image_step": service.batch and service.batch.seconds_per_image_step,
        }))

    @app.get("/speed")
    @operation("What does a step cost here, and what is to be done first?", "server",
               {200: Answer("It was measured on this machine.", {JSON: answers.SpeedAnswer})})
    def speed() -> Response:
        """Steps of other jobs do not count as slow ones: their cost is told by the rows that they computed."""
        costs = service.batch and service.batch.costs
        return json_response({
            "step_costs": [{"rows": rows, "seconds": seconds} for rows, seconds in (costs.steps if costs else ())],
            "seconds_per_picture": costs.seconds_per_picture if costs else 0.0,
            "ahead": [{"rows": rows, "steps": steps} for rows, steps in service.ahead()],
        }, {"Cache-Control": "no-store"})

    @app.get("/health")
    @operation("Does the process answer?", "server", {200: Answer("It does.", {JSON: answers.Health})})
    def health() -> Response:
        """Says nothing about the model: see /ready."""
        return json_response({"status": "ok"})

    @app.get("/ready")
    @operation("Is the model loaded?", "server", {200: Answer("It is.", {JSON: answers.Ready})},
               problems={503: "It is loading or could not be loaded, or the server is stopping: see `state`."})
    def ready() -> Response:
        """`state` is STARTING, READY, FAILED or STOPPING."""
        info = info_of(service)
        if service.state != "READY":
            raise Problem(503, "The server is stopping.", {"Retry-After": "10"}, state=service.state)
        counts = service.queue.counts()
        jobs = {name: counts[name] for name in ("waiting", "running", "finished")}
        model = {"model": info.name, "device": info.device, "engine": info.engine}
        return json_response({"state": service.state, **model, "jobs": jobs})

    @app.get("/metrics")
    @operation("Numbers for Prometheus", "server", {200: Answer("Metrics.", {"text/plain": {"type": "string"}})})
    def metrics() -> Response:
        """In the text format of Prometheus."""
        text, kind = telemetry.text()
        return Response(text, content_type=kind, headers={"Cache-Control": "no-store"})


# ---- the page --------------------------------------------------------------------------------------------------------


def add_page(app: Flask, api_key: str | None) -> None:
    """The page, its static files, and the address that turns an API key into a cookie."""

    @app.get("/")
    @operation("The page", "page", {200: Answer("HTML.", {"text/html": {"type": "string"}}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,))
    def page() -> Response:
        """For people."""
        return send_from_directory(ROOT, "frontend.html", mimetype="text/html")

    @app.get("/static/<name>")
    @operation("A file of the page", "page",
               {200: Answer("The file.", FILE_TYPES, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems={404: "There is no such file."})
    def static_file(name: str) -> Response:
        """Modules, styles, icons, the manifest."""
        kind = MEDIA_TYPES.get(Path(name).suffix)  # not guessed: some systems call a module text/plain
        if kind is None:
            raise Problem(404, f"There is no file {shown(name)}.")
        response = send_from_directory(ROOT / "static", name, mimetype=kind)
        if name == "sw.js":
            response.headers["Service-Worker-Allowed"] = "/"
        return response

    @app.get("/session")
    @operation("Turn the key into a cookie", "page",
               {303: Answer("To the page.", headers=(Header("Location", "the page"),))}, query=schemas.SessionQuery)
    def session() -> Response:
        """The address printed at the start carries the key: EventSource can send no header, so it becomes a cookie."""
        key = read_query(schemas.SessionQuery).key
        response = Response(status=303, headers={"Location": "./", "Cache-Control": "no-store"})
        if api_key is not None:
            if not hmac.compare_digest(key.encode(), api_key.encode()):
                raise Problem(401, "This is not the key of this server.")
            response.set_cookie(KEY_COOKIE, api_key, httponly=True, samesite="Strict", max_age=30 * 86400)
        return response


# ---- the command -----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; ends the process with a sentence when it cannot be served."""
    parser = argparse.ArgumentParser(prog="api.py", description="Serve a model: HTTP, live previews and a web page.")
    add, count, number = parser.add_argument, at_least(1, int), at_least(0, float)
    add("--host", type=host_of, default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=DEFAULT_PORT, help="0 takes any free port")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--engine", choices=("auto", "openvino", "torch"), default="auto", help="what computes on a CPU (%(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: faster, seeds less exact (%(default)s)")
    add("--model", type=Path, default=DEFAULT_MODEL, help="a model folder")
    add("--threads", type=count, help="CPU threads for the model (default: all cores)")
    add("--max-batch", type=count, help="images that share one step (default: 16 on a CPU, 64 on an accelerator)")
    add("--data-dir", type=Path, default=ROOT / "data", help="keeps jobs and pictures (default: data/)")
    add("--keep-jobs", type=count, default=1000, help="finished jobs that are kept (%(default)s)")
    add("--keep-bytes", type=size, default="2G", help="disk for finished jobs, such as 500M or 2G (%(default)s)")
    add("--keep-days", type=number, help="age at which finished jobs are removed (default: never)")
    add("--max-waiting", type=count, default=64, help="jobs that may wait (%(default)s)")
    add("--api-key", default=os.environ.get("FACES_API_KEY"), help="clients must send it (or set FACES_API_KEY)")
    add("--insecure", action="store_true", help="allow any --host without a key")
    name, origin = "another name this server answers to, behind a proxy", "another web page that may use this server"
    add("--allow-host", type=allowed_host, action="append", default=[], help=name)
    add("--cors-origin", type=allowed_origin, action="append", default=[], help=origin)
    add("--no-watermark", action="store_true", help="put no invisible mark into the pictures")
    add("--log-format", choices=("text", "json"), default="text", help="how the log is written (%(default)s)")
    add("--drain-seconds", type=number, default=10.0, help="time for running jobs after SIGTERM (%(default)s)")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {arguments.port}")
    if not is_local(arguments.host) and not arguments.api_key and not arguments.insecure:
        parser.error(f"--host {arguments.host} opens the server to the network: give --api-key KEY, or say --insecure")
    return arguments


def vocabulary_of(model: Path) -> Mapping[str, str]:
    """The words of the captions that this model was trained on; today's captions where it does not say."""
    try:
        words = json.loads((model / "vocabulary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return captions.vocabulary()
    sound = isinstance(words, dict) and set(words.values()) <= {"known", "rare"}
    return words if sound else captions.vocabulary()


def examples_of(model: Path) -> Sequence[str]:
    """Some captions that a person wrote and this model was trained on; none where captions were drawn."""
    try:
        texts = json.loads((model / "examples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return [text for text in texts if isinstance(text, str)] if isinstance(texts, list) else ()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the process's exit status."""
    keep_quiet()
    end_with_parent()
    arguments = parse_arguments(argv)
    configure_logging(arguments.log_format)

    def load_engine() -> Engine:
        from generator import FaceGenerator  # imports torch, in the engine's thread, while the page is already there

        chosen = arguments.device, arguments.threads, arguments.precision, arguments.engine
        faces = FaceGenerator.load(arguments.model, *chosen)
        faces.warm_up()
        return faces

    own_names = (socket.gethostname().lower(), f"{socket.gethostname().lower()}.local")
    hosts = None if is_local(arguments.host) and not arguments.allow_host else (*own_names, *arguments.allow_host)
    days = arguments.keep_days
    try:  # our own socket: waitress leaves its own open when the port is taken
        listener = listen(arguments.host, arguments.port)
    except OSError as error:
        print(f"Cannot listen on {arguments.host}:{arguments.port}: {error.strerror}. Try --port 0.", file=sys.stderr)
        return 1
    try:
        app = create_app(
            load_engine, start=False, api_key=arguments.api_key or None, hosts=hosts,
            cors_origins=arguments.cors_origin, data_dir=arguments.data_dir, max_batch=arguments.max_batch,
            vocabulary=lambda: vocabulary_of(arguments.model), examples=lambda: examples_of(arguments.model),
            max_waiting=arguments.max_waiting,
            keep=Retention(arguments.keep_jobs, arguments.keep_bytes, days * 86400 if days else None),
            watermark=not arguments.no_watermark,
        )
    except StoreError as error:
        listener.close()
        print(error, file=sys.stderr)
        return 1
    server = Server(app, listener, threads=THREADS, max_body_bytes=schemas.MAX_ANY_BODY_BYTES)
    service: EngineService = app.extensions["service"]
    service.start()
    page = f"session?key={quote(arguments.api_key, safe='')}" if arguments.api_key else ""
    print(f"Open {address_of(arguments.host, server.port)}{page}", flush=True)
    serve(server, lambda: service.close(arguments.drain_seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
