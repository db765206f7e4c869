"""How do programs written for OpenAI's images API draw here?

`/v1/images/generations`, `/v1/images/edits` and `/v1/models`, always on. That API answers when the images are there, or
with events while they are drawn; here each of its requests makes a job like all others (`core/web/submission.py`), so
it is durable, takes its turn, can be cancelled and stands in the gallery. Images have the model's size, which the
answer tells.

It does not know what the fields are (`core/web/openai_schemas.py`).
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal, TypeVar, cast

import numpy as np
from flask import Flask, Response, request

from core.engine import EngineInfo
from core.imaging.file_sanitizer import PictureError
from core.imaging.image_io import as_text, crop_square, is_white, mask_picture
from core.jobs.job import Job
from core.jobs.records import Event
from core.jobs.result_files import image_url
from core.jobs.service import EngineService
from core.web import openai_schemas
from core.web.errors import Problem, json_response, problem_text, shown, translate_errors
from core.web.openai_schemas import (
    MODEL_NOT_FOUND,
    OPENAI_ERRORS,
    QUALITIES,
    SAME_QUALITY,
    ImageBody,
    ImageEdit,
    ImageGeneration,
    ignored_warnings,
    openai_error,
)
from core.web.openapi import JSON, Answer, Header, operation
from core.web.options import quality
from core.web.requests import MAX_DRAW_BODY_BYTES, TextToImage
from core.web.routes.latents import BUSY, PictureReader
from core.web.serializers import files_of, told
from core.web.sse import STREAM_HEADERS
from core.web.submission import submit
from core.web.validation import bounds, invalid, read_header, read_json, validate
from core.web.waiting import LOOK_EVERY_S, WaitingRequests

FORM = "multipart/form-data"
Kind = Literal["image_generation", "image_edit"]
Asked = TypeVar("Asked", bound=ImageBody)
NO_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
             "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}


def read_form(schema: type[Asked]) -> Asked:
    """A form with files as a request: texts become numbers where the schema wants some. Raises problems."""
    request.max_content_length = MAX_DRAW_BODY_BYTES
    if request.mimetype != FORM:
        raise Problem(415, f"Send the header Content-Type: {FORM}; got {shown(request.mimetype or 'none')}")
    found: dict[str, Any] = {}
    for name, texts in request.form.lists():
        values = [_value(schema, name, text) for text in texts]
        found[name] = values[0] if len(values) == 1 else values
    for name, files in request.files.lists():
        plain = name.removesuffix("[]")
        if len(files) > 1 or plain in found:
            raise invalid([((plain,), f"must be one file; got {len(files) + (plain in found)}")])
        found[plain] = files[0].read()
    return validate(schema, found)


def _value(schema: type[ImageBody], name: str, text: str) -> Any:
    """What a text in a form means to a field."""
    kind = bounds(schema, name)["type"] if name in schema.model_fields else "string"
    if kind == "integer" and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if kind == "number" and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,40})?(e-?[0-9]{1,3})?", text):
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text) if kind == "boolean" else text


def steps_of(asked: ImageBody, info: EngineInfo) -> tuple[int, Literal["low", "medium", "high"]]:
    """How many steps to take, and the name of that quality."""
    named = asked.quality if asked.quality in QUALITIES else SAME_QUALITY[asked.quality]
    if asked.num_inference_steps is not None:
        return asked.num_inference_steps, cast(Literal["low", "medium", "high"], named)
    there = {one["name"]: one["steps"] for one in quality(info.step_curve)}
    steps = there.get(QUALITIES[named], there.get("Fast", 50))
    return steps, cast(Literal["low", "medium", "high"], named)


def mask_of(asked: ImageEdit, reader: PictureReader, size: int) -> str | None:
    """The mask as this server wants it, white where it was transparent, as base64. Raises a 422 problem."""
    if asked.mask is None:
        return None
    try:
        with reader.place():
            shape = reader.look(asked.image, lambda pixels: pixels.shape[:2])
            alpha = reader.alpha(asked.mask)
    except PictureError as error:
        raise invalid([(("mask",), str(error))]) from error
    if alpha is None or alpha.min() > 0:
        raise invalid([(("mask",), "has no transparent pixels, and those say where to draw anew")])
    if alpha.shape != shape:
        wanted = "x".join(map(str, reversed(shape)))
        raise invalid([(("mask",), f"must be as large as the image, {wanted}; got {alpha.shape[1]}x{alpha.shape[0]}")])
    clear = np.repeat(mask_picture(alpha == 0)[..., None], 3, axis=-1)
    return as_text(mask_picture(is_white(crop_square(clear, size))))


def add_openai_images(
    app: Flask,
    service: EngineService,
    loaded: Callable[[], EngineInfo],
    words: Mapping[str, str],
    reader: PictureReader,
    waiting: WaitingRequests,
    client_name: Callable[[], str],
) -> None:
    """Add the routes. `loaded` returns what the model says of itself, or raises a problem."""
    translate_errors(app, "/v1/", OPENAI_ERRORS)
    queue, started = service.queue, int(time.time())

    def job_of(asked: ImageBody, info: EngineInfo) -> tuple[Job, str]:
        """The job that a request asks for, and the name of its quality. Raises problems."""
        if asked.model not in (None, info.name):
            detail = f"The model {shown(asked.model)} does not exist; there is {info.name}."
            raise Problem(404, detail, param="model", code=MODEL_NOT_FOUND)
        steps, named = steps_of(asked, info)
        previews = (asked.partial_images or 0) if asked.stream else 0
        fields: dict[str, Any] = {
            "prompt": asked.prompt, "n_images": asked.n or openai_schemas.USUAL_COUNT, "n_inf_steps": steps,
            "seed": asked.seed, "negative_prompt": asked.negative_prompt, "guidance_scale": asked.guidance_scale,
            "stream_freq": max(1, steps // (previews + 1)) if previews else 1000,
        }
        if isinstance(asked, ImageEdit):
            fields |= {"init_image": base64.b64encode(asked.image).decode(), "strength": asked.strength,
                       "mask": mask_of(asked, reader, info.image_size)}
        wanted = validate(TextToImage, fields, context=info)
        pictures = {} if wanted.init_image is None else reader.normalised(wanted, info.image_size)
        key = read_header("Idempotency-Key", 200)
        return submit(service, info, words, wanted, pictures, client=client_name(), key=key), named

    def draw(kind: Kind, read: Callable[[], ImageBody]) -> Response:
        info, asked = loaded(), read()
        with ExitStack() as holding:
            holding.enter_context(waiting.place())
            job, named = job_of(asked, info)
            holding.enter_context(waiting.of_client(client_name(), [job]))
            common = {"size": f"{info.image_size}x{info.image_size}", "quality": named, "background": "opaque",
                      "output_format": "png", "job_id": job.id}
            if asked.stream:
                gone = request.environ.get("waitress.client_disconnected", lambda: False)
                events = follow(job, kind, common, asked.partial_images or 0, gone)
                response = Response(events, mimetype="text/event-stream", headers=STREAM_HEADERS)
                response.call_on_close(holding.pop_all().close)
                return response
            if not waiting.wait([job]):
                raise stopping(job)
            ended_well(job)
            images = [event for event in job.snapshot().events_of_this_run if event.kind == "image"]
            warnings = [*ignored_warnings(asked, info.image_size), *told(job.warnings, [one.data for one in images])]
            return json_response({"created": int(job.created_at), **common, "warnings": warnings,
                                  "data": [image_of(job, one, asked.response_format == "url") for one in images]})

    def follow(
        job: Job, kind: Kind, common: Mapping[str, Any], previews: int, gone: Callable[[], bool]
    ) -> Iterator[str]:
        """The events of a job in that API's words, until its end."""
        last, seen = 0, dict[int, int]()
        while not gone():
            events = queue.wait_events(job, last, LOOK_EVERY_S)
            for event in events:
                last = event.id
                index = event.data.get("index", -1)
                final = event.kind == "image"
                nth = seen.get(index, 0)
                if not final and (event.kind != "preview" or nth >= previews):
                    continue
                content = job.file(files_of(event)[0])
                if content is None:  # dropped or deleted since
                    continue
                seen[index] = nth + 1
                what = {"usage": NO_TOKENS} if final else {"partial_image_index": nth}
                name = f"{kind}.{'completed' if final else 'partial_image'}"
                yield event_text(name, {
                    "type": name, "b64_json": base64.b64encode(content).decode(), "created_at": int(event.at),
                    **common, **what, "seed": event.data["seed"]})
            if events:
                continue
            if not job.finished and not queue.closed:
                yield ": still here\n\n"
                continue
            try:
                if not job.finished:
                    raise stopping(job)
                ended_well(job)
            except Problem as problem:
                yield event_text("error", openai_error(json.loads(problem_text(problem))))
            return

    def declare(summary: str, answers: Any, **more: Any) -> Any:
        return operation(summary, "other clients", {200: answers}, errors=OPENAI_ERRORS, **more)

    drawing: dict[str, Any] = {
        "headers": (Header("Idempotency-Key", "repeating the request with the same key returns the first images",
                           {"type": "string", "pattern": "^[!-~]{1,200}$"}),),
        "problems": {404: "There is no such model.", 409: "The job was cancelled.",
                     429: "The queue is full, or too many requests wait.", 503: BUSY},
    }
    images = Answer("The images; with `stream` as events.", {
        JSON: openai_schemas.OpenAiImages, "text/event-stream": openai_schemas.OpenAiStreamEvent})

    @app.post("/v1/images/generations")
    @declare("Draw, as OpenAI's API does", images, bodies={JSON: ImageGeneration}, **drawing)
    def openai_generations() -> Response:
        """Answers when the images are there."""
        return draw("image_generation", lambda: validate(ImageGeneration, read_json()))

    @app.post("/v1/images/edits")
    @declare("Change an image, as OpenAI's API does", images, bodies={FORM: ImageEdit}, **drawing)
    def openai_edits() -> Response:
        """The square in the middle of the image; with a mask only where that is transparent."""
        return draw("image_edit", lambda: read_form(ImageEdit))

    @app.get("/v1/models")
    @declare("The models", Answer("The one that is loaded.", {JSON: openai_schemas.OpenAiModels}),
             problems={503: BUSY})
    def openai_models() -> Response:
        """Its id is what requests may name as `model`."""
        return json_response({"object": "list", "data": [
            {"id": loaded().name, "object": "model", "created": started, "owned_by": "text-to-face"}]})


def event_text(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def image_of(job: Job, event: Event, as_url: bool) -> dict[str, Any]:
    """A finished image as an answer holds it. Raises a 409 problem when it was deleted meanwhile."""
    index, seed = event.data["index"], event.data["seed"]
    if as_url:
        return {"url": f"{request.url_root.rstrip('/')}{image_url(job.id, index)}", "seed": seed}
    content = job.file(files_of(event)[0])
    if content is None:
        raise Problem(409, "The image was deleted before it could be sent.")
    return {"b64_json": base64.b64encode(content).decode(), "seed": seed}


def ended_well(job: Job) -> None:
    """Raises a problem when the job failed or was cancelled."""
    if job.state == "succeeded":
        return
    error = job.error or {"message": "The job ended.", "hint": ""}
    status = 409 if job.state == "cancelled" else 500
    raise Problem(status, f"{error['message']} {error['hint']}".strip(), code=error.get("code"))


def stopping(job: Job) -> Problem:
    return Problem(503, f"The server is stopping; the job goes on when it starts again: {job.id}.",
                   {"Retry-After": "10"})
