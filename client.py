"""How do other programs, and the shell, ask a running server for faces?

`from client import Faces` in Python, `AsyncFaces` beside other coroutines, `python client.py "a smiling woman"` in a
shell. Requests carry an Idempotency-Key, so that one whose answer is lost is repeated without generating twice.

Standard library only, and this file stands alone: it can be copied into another project. It does not know what a valid
request is; the server says what is wrong (docs/clients.md).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar
from urllib.parse import urljoin, urlsplit

if TYPE_CHECKING:
    from typing_extensions import Unpack

SERVER = "http://127.0.0.1:5001"
WAIT_S = 30  # that the server holds a request, until it answers that the job goes on
RETRY_STATUSES = frozenset((429, 502, 503, 504))
LONGEST_PAUSE_S = 30.0
LOST = (OSError, http.client.HTTPException)
T = TypeVar("T")


class Options(TypedDict, total=False):
    """Fields of POST /text_to_image beside the prompt; the server has defaults for all of them."""

    n_images: int
    n_inf_steps: int
    seed: int
    guidance_scale: float
    negative_prompt: str
    sampler: str
    stream_freq: int
    preview_every_s: float
    strength: float
    variation_strength: float
    variation_seed: int
    interpolate_to: Mapping[str, Any]
    attributes: Mapping[str, float]
    candidates: int
    balance: bool
    latent: str | Sequence[str]
    start_timestep: float


@dataclass(frozen=True)
class GeneratedImage:
    """One image, as a PNG file: a result, or a preview at step `t` of `total_t`."""

    job_id: str
    index: int
    seed: int
    t: int
    total_t: int
    png: bytes = field(repr=False)

    def save(self, path: Path | str) -> Path:
        """Write the PNG; a folder gets a file named after the seed. Returns where it is."""
        path = Path(path)
        if path.is_dir():
            path = path / f"face-{self.seed}.png"
        path.write_bytes(self.png)
        return path


@dataclass(frozen=True)
class Event:
    """What happened to a job: a state, steps that are done, or an image."""

    kind: Literal["status", "progress", "preview", "image", "done"]
    job_id: str
    status: str | None = None
    t: int = 0
    total_t: int = 0
    picture: GeneratedImage | None = None


class FacesError(Exception):
    """The server refused. `status` is that of HTTP, `fields` says what is wrong with each field."""

    def __init__(self, status: int, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.fields = status, dict(fields or {})


class JobFailed(Exception):
    """The job ended without success; `code` is one word, such as `cancelled`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Faces:
    """A server, asked by one thread or several.

    `key` is its API key (else FACES_API_KEY). `client_id` tells apart those who share an address. A request whose
    answer is lost, or that comes when the server is full or starting, is repeated `retries` times.
    """

    def __init__(
        self, server: str = SERVER, *, key: str | None = None, client_id: str = "", timeout_s: float = 60.0,
        retries: int = 5,
    ) -> None:
        self.server = server if server.endswith("/") else f"{server}/"
        self.timeout_s, self.retries = timeout_s, retries
        key = key if key is not None else os.environ.get("FACES_API_KEY")
        named = {"Authorization": f"Bearer {key}" if key else "", "X-Client-Id": client_id}
        self._headers = {name: value for name, value in named.items() if value}

    # ---- what one may want

    def generate(self, prompt: str, **options: Unpack[Options]) -> list[GeneratedImage]:
        """Generate and wait. Raises FacesError when the request is refused, JobFailed, OSError without a server."""
        return self._draw({"prompt": prompt, **options})

    def edit(
        self, image: bytes | Path | str, prompt: str, *, mask: bytes | Path | str | None = None,
        **options: Unpack[Options],
    ) -> list[GeneratedImage]:
        """Change an image (a PNG, JPEG or WebP file, or its path); with a mask only where that is white."""
        return self._draw({"prompt": prompt, **pictures_in(image, mask), **options})

    def start(
        self, prompt: str, *, image: bytes | Path | str | None = None, mask: bytes | Path | str | None = None,
        **options: Unpack[Options],
    ) -> str:
        """Ask, and do not wait; the job's id, for `stream`, `wait` and `cancel`."""
        answer = self._post("text_to_image", {"prompt": prompt, **pictures_in(image, mask), **options})
        return str(answer["job_id"])

    def wait(self, job_id: str) -> list[GeneratedImage]:
        """The images of a job once it has ended. Raises JobFailed."""
        for _ in self.stream(job_id, previews=False):
            pass
        return self._result(self._get(f"jobs/{job_id}/?include=preview"))

    def stream(self, job_id: str, *, previews: bool = True) -> Iterator[Event]:
        """What happens to a job, from its beginning to its end; a connection that breaks is made again.

        Results are read by `wait`, or are there as `image` events, whose images are fetched when they come.
        """
        last, tries = 0, 0
        while True:
            try:
                for number, kind, data in self._events(job_id, last, previews):
                    last, tries = number, 0
                    yield self._event(job_id, kind, data)
                    if kind == "done":
                        return
                if self._get(f"jobs/{job_id}/?include=none")["finished"] and not last:
                    return
            except (*LOST, FacesError) as error:
                if isinstance(error, FacesError) and error.status not in RETRY_STATUSES:
                    raise
                if tries == self.retries:
                    raise
            tries += 1
            time.sleep(pause_s(tries, None))

    def cancel(self, job_id: str) -> None:
        """Ask a job to stop: at once when it waits, within a step when it runs."""
        self._request("POST", f"jobs/{job_id}/cancel")

    # ---- how it is asked

    def _draw(self, body: Mapping[str, Any]) -> list[GeneratedImage]:
        answer = self._post(f"text_to_image?wait={WAIT_S}", body)
        if "response" in answer:
            return self._result(answer)
        return self.wait(str(answer["job_id"]))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        content = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        try:
            found: dict[str, Any] = json.loads(self._request("POST", path, content, headers))
        except KeyboardInterrupt:  # the job may be there though its answer is not: the same key finds it
            with contextlib.suppress(*LOST, FacesError):
                self.cancel(json.loads(self._request("POST", "text_to_image", content, headers))["job_id"])
            raise
        return found

    def _get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._request("GET", path))
        return found

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """The body of the answer. Everything that is asked here can be asked twice without being done twice."""
        for tried in range(1, self.retries + 2):
            try:
                with self._asked(method, path, body, headers) as answer:
                    content = answer.read()
                if answer.status < 400:
                    return content
                error: Exception = error_of(answer.status, content)
                if tried > self.retries or answer.status not in RETRY_STATUSES:
                    raise error
                time.sleep(pause_s(tried, answer.headers.get("Retry-After")))
            except LOST:
                if tried > self.retries:
                    raise
                time.sleep(pause_s(tried, None))
        raise AssertionError("every round returns, raises or goes on")

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer whose body can be read as it comes; the connection is closed with the block."""
        parts = urlsplit(urljoin(self.server, path))
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}.get(parts.scheme)
        if kind is None or not parts.hostname:
            raise ValueError(f"the server must be an address such as {SERVER}; got {self.server!r}")
        connection = kind(parts.hostname, parts.port, timeout=self.timeout_s + WAIT_S)
        try:
            target = parts.path + (f"?{parts.query}" if parts.query else "")
            connection.request(method, target, body, {**self._headers, **(headers or {})})
            yield connection.getresponse()
        finally:
            connection.close()

    def _events(self, job_id: str, after: int, previews: bool) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Server-Sent Events: number, kind, data. https://html.spec.whatwg.org/multipage/server-sent-events.html"""
        path = f"jobs/{job_id}/events?after={after}&previews={'png' if previews else 'none'}"
        with self._asked("GET", path) as answer:
            if answer.status >= 400:
                raise error_of(answer.status, answer.read())
            fields: dict[str, str] = {}
            while line := answer.readline():
                name, _, value = line.decode().rstrip("\r\n").partition(": ")
                if name:
                    fields[name] = value
                    continue
                if "id" in fields:
                    yield int(fields["id"]), fields["event"], json.loads(fields["data"])
                fields = {}

    def _event(self, job_id: str, kind: Any, data: Mapping[str, Any]) -> Event:
        steps = {"t": data.get("t", 0), "total_t": data.get("total_t", 0)}
        png = base64.b64decode(data["img"]) if "img" in data else None
        if kind == "image":
            png = self._request("GET", f"jobs/{job_id}/images/{data['index']}.png")
        picture = None if png is None else GeneratedImage(job_id, data["index"], data["seed"], **steps, png=png)
        return Event(kind, job_id, data.get("status"), **steps, picture=picture)

    def _result(self, job: Mapping[str, Any]) -> list[GeneratedImage]:
        if job["status"] != "succeeded":
            error = job["error"] or {"code": "unknown", "message": f"The job is {job['status']}.", "hint": ""}
            raise JobFailed(error["code"], f"{error['message']} {error['hint']}".strip())
        return [GeneratedImage(job["job_id"], one["index"], one["seed"], one["t"], one["total_t"],
                               base64.b64decode(one["img"])) for one in job["response"]]


class AsyncFaces:
    """`Faces` for coroutines: the same methods, each in a thread of its own. Raises the same."""

    def __init__(self, server: str = SERVER, *, key: str | None = None, client_id: str = "") -> None:
        self._faces = Faces(server, key=key, client_id=client_id)

    async def generate(self, prompt: str, **options: Unpack[Options]) -> list[GeneratedImage]:
        return await asyncio.to_thread(lambda: self._faces.generate(prompt, **options))

    async def edit(
        self, image: bytes | Path | str, prompt: str, *, mask: bytes | Path | str | None = None,
        **options: Unpack[Options],
    ) -> list[GeneratedImage]:
        return await asyncio.to_thread(lambda: self._faces.edit(image, prompt, mask=mask, **options))

    async def start(self, prompt: str, **options: Unpack[Options]) -> str:
        return await asyncio.to_thread(lambda: self._faces.start(prompt, **options))

    async def wait(self, job_id: str) -> list[GeneratedImage]:
        return await asyncio.to_thread(self._faces.wait, job_id)

    async def cancel(self, job_id: str) -> None:
        await asyncio.to_thread(self._faces.cancel, job_id)

    async def stream(self, job_id: str, *, previews: bool = True) -> AsyncIterator[Event]:
        """As `Faces.stream`, for `async for`."""
        events = self._faces.stream(job_id, previews=previews)
        while (event := await asyncio.to_thread(next, events, None)) is not None:
            yield event


def pictures_in(image: bytes | Path | str | None, mask: bytes | Path | str | None) -> dict[str, str]:
    """The fields of a request that carry images, given as bytes or by their paths."""
    return {name: base64.b64encode(one if isinstance(one, bytes) else Path(one).read_bytes()).decode()
            for name, one in (("init_image", image), ("mask", mask)) if one is not None}


def error_of(status: int, content: bytes) -> FacesError:
    """What the server says in a problem document (RFC 9457), or what stands between it and us says in another way."""
    try:
        problem = json.loads(content)
        fields = {one["pointer"].lstrip("#/?"): one["message"] for one in problem.get("errors", ())}
        return FacesError(status, problem["detail"], fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return FacesError(status, f"{status} {http.client.responses.get(status, '')}: {content[:200]!r}")


def pause_s(tried: int, asked: str | None) -> float:
    """How long to wait before the next attempt: as the server asks, else twice as long each time."""
    if asked is not None and asked.isdigit():
        return min(float(asked), LONGEST_PAUSE_S)
    return float(min(0.25 * 2 ** (tried - 1), LONGEST_PAUSE_S))


# ---- the command -----------------------------------------------------------------------------------------------------


def bar(done: int, total: int, width: int = 30) -> str:
    """How far a job is, in one line."""
    filled = width * done // total if total else 0
    return f"[{'#' * filled}{'.' * (width - filled)}] {done}/{total or '?'} steps"


def draw(faces: Faces, arguments: argparse.Namespace, say: Callable[[str], object]) -> list[GeneratedImage]:
    """What the command does: ask, show how far it is, give the images back. Ctrl-C cancels the job, even one whose
    answer has not come yet."""
    given = {"n_images": arguments.n, "n_inf_steps": arguments.steps, "seed": arguments.seed,
             "negative_prompt": arguments.negative, "sampler": arguments.sampler, "strength": arguments.strength}
    options: Any = {name: value for name, value in given.items() if value is not None}
    job_id = faces.start(arguments.prompt, image=arguments.image, mask=arguments.mask, **options)
    try:
        for event in faces.stream(job_id, previews=False):
            if event.kind == "progress":
                say(bar(event.t, event.total_t))
            elif event.kind == "status":
                say(f"{event.status} ...")
        return faces.wait(job_id)
    except KeyboardInterrupt:
        faces.cancel(job_id)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Generate, and save the images; their paths go to stdout, everything else to stderr."""
    parser = argparse.ArgumentParser(prog="client.py", description="Ask a running server for faces.")
    add = parser.add_argument
    add("prompt", help="what to draw")
    add("-n", type=int, default=1, help="how many images (%(default)s)")
    add("-o", "--out", type=Path, default=Path("."), help="folder for the PNG files (the current one)")
    add("--steps", type=int, default=50, help="denoising steps (%(default)s)")
    add("--seed", type=int, help="image i uses seed + i")
    add("--negative", help="steer away from this")
    add("--sampler", help="see /options")
    add("--image", type=Path, help="a picture to change")
    add("--mask", type=Path, help="change it only where this picture is white")
    add("--strength", type=float, help="how much of it changes, 0 to 1")
    add("--server", default=os.environ.get("FACES_SERVER", SERVER), help="(%(default)s, or FACES_SERVER)")
    add("--key", help="the server's API key (or set FACES_API_KEY)")
    arguments = parser.parse_args(argv)
    is_shown = sys.stderr.isatty()

    def say(text: str) -> None:
        if is_shown:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        pictures = draw(Faces(arguments.server, key=arguments.key), arguments, say)
        say("")
        arguments.out.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            print(picture.save(arguments.out))
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    except (FacesError, JobFailed, ValueError) as error:
        print(f"{error}", file=sys.stderr)
        return 1
    except LOST as error:
        print(f"No server answers at {arguments.server}, or a file cannot be used: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
