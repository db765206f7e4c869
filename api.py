"""What does HTTP say?

`create_app(engine_factory)` builds the application: routes, Server-Sent Events, and the service that turns requests
into jobs. `main` serves it with waitress: `python api.py --model models/celeba128`.

It does not know what draws: an engine is anything with `info` and `generate` (see `Engine`), made by a factory that
runs in the one background thread where all model work happens. This file never imports torch, so its tests run in
seconds. What may be asked stands in `core/schemas.py`, how jobs run in `core/jobs.py`, errors and the door
in `core/web.py`.

The stream: https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from flask import Flask, Response, request, send_from_directory
from flask_cors import CORS

from core import captions
from core.jobs import DeletedJob, Event, Job, JobQueue, QueueClosed, QueueFull, Snapshot, UnknownJob
from core.machine import address_of, is_local
from core.schemas import ALIASES, MAX_BODY_BYTES, UNAVAILABLE, AnalyzePrompt, EngineInfo, TextToImage, options
from core.web import KEY_COOKIE, Problem, add_door, json_response, read_json, shown, validate

ROOT = Path(__file__).resolve().parent
DEFAULT_MODEL = ROOT / "models" / "celeba128"
DEFAULT_PORT = 5001
HEARTBEAT_S = 15.0
PUBLIC_ENDPOINTS = frozenset(("page", "static_file", "session", "health"))  # all that needs no key
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}  # static/ serves nothing else

log = logging.getLogger(__name__)


# ---- what draws ------------------------------------------------------------------------------------------------------


class Picture(Protocol):
    """One image: a preview or the result. `latent` holds little-endian float32 in C order."""

    @property
    def index(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def png(self) -> bytes: ...
    @property
    def latent(self) -> bytes: ...


class Step(Protocol):
    """One step done. `previews()` costs a decoding, so it is only called when somebody is to see them."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...

    def previews(self) -> Sequence[Picture]: ...


class Engine(Protocol):
    """What draws: facts about itself, and pictures for one request. Lives in the engine's thread alone."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(
        self,
        prompt: str,
        *,
        num_images: int,
        num_inference_steps: int,
        seed: int,
        guidance_scale: float,
        negative_prompt: str,
        sampler: str,
        latents: np.ndarray | None,
        start: float,
        on_step: Callable[[Any], None],
        should_stop: Callable[[], bool],
    ) -> Sequence[Picture]: ...


# ---- answers ---------------------------------------------------------------------------------------------------------


def isoformat(timestamp: float | None) -> str | None:
    if timestamp is None:
        return None
    return datetime.fromtimestamp(timestamp, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def image_url(job_id: str, index: int) -> str:
    return f"/jobs/{job_id}/images/{index}.png"


def job_body(job: Snapshot, include: str) -> dict[str, Any]:
    """The answer of GET /jobs/{id}/: its first two members are a promise, the rest stands beside them."""
    latest = {event.data["index"]: event.data for event in job.events if event.kind in ("preview", "image")}
    response = []
    for index, update in sorted(latest.items()):
        entry = {"t": update["t"], "total_t": update["total_t"]}
        if include != "none":
            entry["img"] = base64.b64encode(job.files[f"{index}.png"]).decode()
        if include == "full":
            entry["latent"] = base64.b64encode(job.files[f"{index}.f32"]).decode()
        response.append({**entry, "index": index, "seed": update["seed"], "url": image_url(job.id, index)})
    eta_s = 0.0 if job.finished else None
    steps = [event for event in job.events if event.kind == "progress"]
    if not job.finished and len(steps) > 1:  # from step to step: neither the wait nor skipped steps count
        seconds_per_step = (steps[-1].at - steps[0].at) / (steps[-1].data["t"] - steps[0].data["t"])
        eta_s = round(seconds_per_step * (job.total - job.done), 1)
    return {
        "finished": job.finished,
        "response": response,
        "job_id": job.id,
        "status": job.state,
        "progress": 1.0 if job.state == "succeeded" else round(job.done / job.total, 4) if job.total else 0.0,
        "queue_position": job.queue_position,
        "eta_s": eta_s,
        "created_at": isoformat(job.created_at),
        "started_at": isoformat(job.started_at),
        "finished_at": isoformat(job.finished_at),
        "parameters": dict(job.parameters),
        "warnings": list(job.warnings),
        "error": job.error,
        "last_event_id": job.events[-1].id,  # where to go on listening
    }


def event_text(job: Job, event: Event) -> str:
    """One event in the stream's format; empty when its picture has been dropped since (a newer one follows)."""
    data = dict(event.data)
    if event.kind == "preview":
        picture = job.files.get(data.pop("file"))
        if picture is None:
            return ""
        data["img"] = base64.b64encode(picture).decode()
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(data)}\n\n"


# ---- the service behind the routes -----------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Written aside, synced, renamed: nobody ever reads half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Service:
    """The engine, its state (STARTING, READY, FAILED) and its queue. The engine is touched by one thread alone."""

    def __init__(
        self, engine_factory: Callable[[], Engine], data_dir: Path | None, max_waiting: int, keep_finished: int
    ) -> None:
        self._engine_factory, self._data_dir = engine_factory, data_dir
        self._engine: Engine | None = None
        self.state, self.failure = "STARTING", ""
        self.queue = JobQueue(self._run, max_waiting=max_waiting, keep_finished=keep_finished)

    def start(self) -> None:
        """Load and work in the engine's thread."""
        self.queue.start(self.load)

    def load(self) -> bool:
        """Make the engine; True when it is ready. Runs in the engine's thread."""
        try:
            self._engine = self._engine_factory()
        except Exception as error:  # the server stays up to say what is wrong
            log.exception("the model could not be loaded")
            self.failure = f"The model could not be loaded: {error}"
            self.state = "FAILED"
            return False
        self.state = "READY"
        log.info("ready: %s on %s", self._engine.info.name, self._engine.info.device)
        return True

    def info(self) -> EngineInfo:
        """What the model says of itself. Raises a 503 problem until it is loaded."""
        if self._engine is not None:
            return self._engine.info
        if self.state == "FAILED":
            raise Problem(503, self.failure, state=self.state)
        raise Problem(503, "The model is still loading; try again in a moment.", {"Retry-After": "2"}, state=self.state)

    def close(self) -> None:
        """Stop accepting, cancel, and let the running step end."""
        self.queue.close()
        if not self.queue.join(timeout_s=10.0):
            log.warning("the engine is still busy with a step; it ends with the process")

    def _run(self, job: Job) -> None:
        assert self._engine is not None, "jobs are accepted only when the engine is ready"
        wanted: TextToImage = job.payload
        parameters = job.parameters

        def publish(kind: str, picture: Picture, done: int, total: int) -> None:
            index = picture.index
            data: dict[str, Any] = {"index": index, "seed": picture.seed, "t": done, "total_t": total}
            if kind == "preview":
                data["file"] = f"{index}-{done}.png"
                job.keep(data["file"], picture.png)
            else:
                data["url"] = image_url(job.id, index)
            job.emit(kind, data, {f"{index}.png": picture.png, f"{index}.f32": picture.latent})

        def on_step(step: Step) -> None:
            job.progress(step.done, step.total)
            if step.done % wanted.stream_freq == 0 and step.done < step.total and not job.cancel_requested:
                for picture in step.previews():
                    publish("preview", picture, step.done, step.total)

        pictures = self._engine.generate(
            wanted.prompt,
            num_images=wanted.n_images,
            num_inference_steps=wanted.n_inf_steps,
            seed=parameters["seed"],
            guidance_scale=parameters["guidance_scale"],
            negative_prompt=wanted.negative_prompt,
            sampler=parameters["sampler"],
            latents=wanted.latents(self._engine.info.latent_shape),
            start=wanted.start_timestep,
            on_step=on_step,
            should_stop=lambda: job.cancel_requested,
        )
        total = job.total or wanted.n_inf_steps
        if job.done < total:  # start_timestep = 1 leaves no step to do
            job.progress(total, total)
        for picture in pictures:
            publish("image", picture, total, total)
            if self._data_dir is not None:  # named by the id's random part: the prompt reaches no file name
                write_file(self._data_dir / "images" / job.id[-32:] / f"{picture.index}.png", picture.png)


def create_app(
    engine_factory: Callable[[], Engine],
    *,
    start: bool = True,
    api_key: str | None = None,
    hosts: Sequence[str] | None = None,
    cors_origins: Sequence[str] = (),
    data_dir: Path | None = None,
    max_waiting: int = 32,
    keep_finished: int = 100,
    max_streams: int = 12,
    heartbeat_s: float = HEARTBEAT_S,
) -> Flask:
    """Build the application.

    `start` begins the engine's thread, which calls `engine_factory` once; without it somebody has to call
    `app.extensions["service"].start()` later, or `.load()` and `.queue.run_next()` in a thread of their own. `hosts`
    are names under which the server may be addressed beside numeric addresses; None allows the loopback names alone.
    `cors_origins` are other web pages that may use it. `max_streams` bounds the event streams, each of which holds one
    thread of the web server.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.url_map.strict_slashes = False  # no redirect, so no HTML, for a forgotten slash
    app.url_map.merge_slashes = False
    service = Service(engine_factory, data_dir, max_waiting, keep_finished)
    app.extensions["service"] = service
    if cors_origins:
        CORS(app, origins=list(cors_origins), methods=["GET", "POST"],
             allow_headers=["Content-Type", "Authorization", "X-API-Key", "Last-Event-ID"],
             expose_headers=["Location", "Retry-After"])
    add_door(app, api_key=api_key, public=PUBLIC_ENDPOINTS, hosts=hosts, origins=cors_origins)
    add_job_routes(app, service, max_streams, heartbeat_s)
    add_model_routes(app, service)
    add_page(app, api_key)
    if start:
        service.start()
    return app


def add_job_routes(app: Flask, service: Service, max_streams: int, heartbeat_s: float) -> None:
    """Everything under /text_to_image and /jobs/: ask, watch, cancel, fetch."""

    queue = service.queue
    streams = threading.BoundedSemaphore(max_streams)

    def find(job_id: str, look: Callable[[str], Job] = queue.get) -> Job:
        try:
            return look(job_id)
        except DeletedJob as error:
            raise Problem(410, "This job was deleted to make room for newer ones; its seed draws it again.") from error
        except UnknownJob as error:
            raise Problem(404, f"There is no job {shown(job_id)}.") from error

    @app.post("/text_to_image")
    def text_to_image() -> Response:
        info = service.info()
        wanted = validate(TextToImage, read_json(), context=info, aliases=ALIASES, unavailable=UNAVAILABLE)
        parameters = wanted.model_dump(exclude={"latent"}) | {
            "seed": secrets.randbelow(2**32) if wanted.seed is None else wanted.seed,  # drawn here and reported
            "guidance_scale": info.default_guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale,
            "sampler": wanted.sampler or info.default_sampler,
            "model": info.name,
            "num_latents": 0 if wanted.latent is None else 1 if isinstance(wanted.latent, str) else wanted.n_images,
        }
        warnings = tuple(captions.analyze(wanted.prompt).warnings)
        try:
            job = queue.submit(wanted.prompt, parameters, wanted, warnings=warnings)
        except QueueClosed as error:
            raise Problem(503, "The server is stopping.", {"Retry-After": "10"}) from error
        except QueueFull as error:
            raise Problem(429, f"The queue is full: {error}.", {"Retry-After": str(error.retry_after_s)}) from error
        body = {"job_id": job.id, "status": "queued", "parameters": parameters, "warnings": list(warnings)}
        return json_response(body, {"Location": f"/jobs/{job.id}/"})

    @app.get("/jobs/<job_id>/")
    def job_status(job_id: str) -> Response:
        include = request.args.get("include", "full")
        if include not in ("none", "preview", "full"):
            message = f"must be none, preview or full; got {shown(include)}"
            raise Problem(422, f"include: {message}", errors=[{"pointer": "?include", "message": message}])
        job = find(job_id).snapshot()
        response = json_response(job_body(job, include), {"Cache-Control": "no-cache"})
        response.set_etag(f"{job.id}-{len(job.events)}-{include}")
        response.make_conditional(request)
        return response

    @app.post("/jobs/<job_id>/cancel")
    def cancel(job_id: str) -> Response:
        job = find(job_id, queue.cancel).snapshot()
        return json_response({"job_id": job.id, "status": job.state, "cancel_requested": job.cancel_requested})

    @app.get("/jobs/<job_id>/events")
    def events(job_id: str) -> Response:
        job = find(job_id)
        text = request.headers.get("Last-Event-ID") or request.args.get("after", "0")
        if not text.isdecimal() or len(text) > 9:
            raise Problem(400, f"Last-Event-ID must be the number of an event; got {shown(text)}")
        last = int(text)
        if job.finished and not job.events_after(last):
            return Response(status=204)  # tells an EventSource that it need not come back
        if not streams.acquire(blocking=False):
            raise Problem(429, "Too many event streams are open; poll the job instead.", {"Retry-After": "5"})

        def stream(last: int) -> Iterator[str]:
            yield "retry: 2000\n\n"
            while not queue.closed:
                batch = queue.wait_events(job, last, heartbeat_s)
                for event in batch:
                    yield event_text(job, event)
                    last = event.id
                    if event.kind == "done":
                        return
                if not batch:
                    yield ": still here\n\n"

        response = Response(stream(last), mimetype="text/event-stream")
        response.headers.update({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        response.call_on_close(streams.release)
        return response

    @app.get("/jobs/<job_id>/images/<int:index>.png")
    def image(job_id: str, index: int) -> Response:
        job = find(job_id).snapshot()
        content = job.files.get(f"{index}.png")
        if content is None:
            raise Problem(404, f"Job {shown(job_id)} has no image {index} (yet).")
        final = any(event.kind == "image" and event.data["index"] == index for event in job.events)
        cache = "private, max-age=31536000, immutable" if final else "no-store"  # not final: the newest preview
        return Response(content, mimetype="image/png", headers={"Cache-Control": cache})


def add_model_routes(app: Flask, service: Service) -> None:
    """What the model understands and allows, and whether it is loaded."""

    @app.post("/prompt/analyze")
    def analyze() -> Response:
        wanted = validate(AnalyzePrompt, read_json())
        found = captions.analyze(wanted.prompt)
        return json_response({
            "attributes": dict(found.attributes),
            "words": [asdict(word) for word in found.words],
            "contradictions": list(found.contradictions),
            "warnings": list(found.warnings),
        })

    @app.get("/options")
    def show_options() -> Response:
        info = service.info() if service.state == "READY" else None
        return json_response({"state": service.state, "failure": service.failure or None, **options(info)})

    @app.get("/health")
    def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/ready")
    def ready() -> Response:
        info, jobs = service.info(), service.queue.counts()
        return json_response({"state": service.state, "model": info.name, "device": info.device, "jobs": jobs})


def add_page(app: Flask, api_key: str | None) -> None:
    """The page, its static files, and the address that turns an API key into a cookie."""

    @app.get("/")
    def page() -> Response:
        return send_from_directory(ROOT, "frontend.html", mimetype="text/html")

    @app.get("/static/<name>")
    def static_file(name: str) -> Response:
        kind = MEDIA_TYPES.get(Path(name).suffix)  # not guessed: some systems call a module text/plain
        if kind is None:
            raise Problem(404, f"There is no file {shown(name)}.")
        return send_from_directory(ROOT / "static", name, mimetype=kind)

    @app.get("/session")
    def session() -> Response:
        """The address printed at the start carries the key. It becomes a cookie: EventSource can send no header."""
        response = Response(status=303, headers={"Location": "./", "Cache-Control": "no-store"})
        if api_key is not None and hmac.compare_digest(request.args.get("key", "").encode(), api_key.encode()):
            response.set_cookie(KEY_COOKIE, api_key, httponly=True, samesite="Strict", max_age=30 * 86400)
        return response


# ---- the command -----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; ends the process with a sentence when it cannot be served."""

    parser = argparse.ArgumentParser(prog="api.py", description="Serve a model: HTTP, live previews and a web page.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes any free port")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a model folder")
    parser.add_argument("--data-dir", type=Path, help="also keep finished pictures as files here (default: no)")
    parser.add_argument("--threads", type=int, help="CPU threads for the model (default: all cores)")
    parser.add_argument("--api-key", default=os.environ.get("FACES_API_KEY"),
                        help="clients must send it (or set FACES_API_KEY)")
    parser.add_argument("--insecure", action="store_true", help="allow any --host without a key")
    parser.add_argument("--allow-host", action="append", default=[], help="another name this server answers to")
    parser.add_argument("--cors-origin", action="append", default=[], help="another web page that may use this server")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {arguments.port}")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if not is_local(arguments.host) and not arguments.api_key and not arguments.insecure:
        parser.error(f"--host {arguments.host} opens the server to the network: give --api-key KEY, or say --insecure")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the process's exit status."""
    import waitress

    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def load_engine() -> Engine:
        from generator import FaceGenerator  # imports torch, in the engine's thread, while the page is already there

        return FaceGenerator.load(arguments.model, device=arguments.device, threads=arguments.threads)

    own_names = (socket.gethostname().lower(), f"{socket.gethostname().lower()}.local")
    hosts = None if is_local(arguments.host) and not arguments.allow_host else (*own_names, *arguments.allow_host)
    app = create_app(load_engine, api_key=arguments.api_key or None, hosts=hosts, cors_origins=arguments.cors_origin,
                     data_dir=arguments.data_dir, start=False)
    service: Service = app.extensions["service"]
    try:  # our own socket: waitress leaves its own open when the port is taken
        family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        listener = socket.create_server((arguments.host, arguments.port), family=family)
    except OSError as error:
        print(f"Cannot listen on {arguments.host}:{arguments.port}: {error.strerror}. Try --port 0.", file=sys.stderr)
        return 1
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=20,  # 12 streams may each hold one for minutes; the rest answer everybody else
        ident=None,
        max_request_body_size=16 * MAX_BODY_BYTES,  # so far our own limit answers, with a problem document
        clear_untrusted_proxy_headers=True,
    )

    def stop(signum: int, frame: object) -> None:
        service.queue.close()  # ends the event streams, so that the server's threads end too
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    service.start()
    page = f"session?key={quote(arguments.api_key, safe='')}" if arguments.api_key else ""
    print(f"Open {address_of(arguments.host, listener.getsockname()[1])}{page}", flush=True)
    server.run()
    service.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
