"""How do images and latents travel between a client and the model?

`ImageReader` is the one place where the server turns untrusted images into pixels. Three routes make no job:
POST /encode turns any photograph into a latent, POST /decode turns a latent into an image, POST /inspect says whether
an image was generated here, and how. Images come as files or inside JSON, latents as `.npy` files or inside JSON, and
never as a pickle. The model works in its own thread, between two steps of the jobs.

It does not know jobs. https://numpy.org/neps/nep-0001-npy-format.html
"""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as Unanswered
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from flask import Flask, Response, request

from core.engine import Engine, EngineInfo, JobError
from core.imaging.file_sanitizer import MAX_PICTURE_BYTES, PictureError, is_png
from core.imaging.image_io import as_text, base64_text, crop_square, is_white, mask_picture, read_alpha, read_image
from core.imaging.png_metadata import NoRequestError, Restored, encode_png, read_request
from core.imaging.watermark import find
from core.jobs.admission import QueueClosed, QueueFull
from core.jobs.service import EngineService
from core.text.prompt_rewriting import unread_in, unread_warning
from core.web.errors import Problem, json_response, stopping
from core.web.openapi import BINARY, JSON, Answer, operation
from core.web.requests import (
    MAX_BODY_BYTES,
    MAX_DRAW_BODY_BYTES,
    MAX_IMAGE_BODY_BYTES,
    EncodeImage,
    GiveImage,
    GiveLatent,
    TextToImage,
)
from core.web.responses import Encoded, Inspection
from core.web.validation import invalid, parse_json, read_body, validate
from core.web.values import decode_latent, read_npy

PNG, JPEG, WEBP, NPY = "image/png", "image/jpeg", "image/webp", "application/x-npy"
PATIENCE_S = 60.0  # of a request that waits for the model; a step of a large batch may take seconds
MAX_AT_ONCE = 4  # requests that wait for the decoder or the model; each holds one thread of the web server
INVERSION_SLICE = 10  # calls of the network between two steps of the jobs
BUSY = "The model is still loading or too busy, or the server is stopping."

T = TypeVar("T")


def ask_engine(service: EngineService, work: Callable[[Engine], T]) -> T:
    """The result of something that only the engine can do. Raises a problem when it cannot, or not now."""
    try:
        future = service.call(work)
    except QueueFull as error:
        raise Problem(429, f"{error}.", {"Retry-After": str(error.retry_after_s)}) from error
    except QueueClosed as error:
        raise stopping() from error
    try:
        return future.result(PATIENCE_S)
    except Unanswered as error:
        future.cancel()
        raise Problem(503, "The model is too busy.", {"Retry-After": "10"}) from error
    except QueueClosed as error:
        raise stopping() from error
    except JobError as error:
        raise Problem(503, f"{error.message} {error.hint}".strip(), {"Retry-After": "10"}) from error


Given = TypeVar("Given", bound=GiveImage)


def given_picture(kinds: Sequence[str], schema: type[Given]) -> tuple[bytes, Given | None]:
    """The image in the body: a file of one of these media types, or base64 in JSON, which may say more."""
    as_json = request.mimetype == JSON
    request.max_content_length = MAX_IMAGE_BODY_BYTES if as_json else MAX_PICTURE_BYTES
    _, body = read_body((JSON, *kinds))
    if not as_json:
        return body, None
    found = validate(schema, parse_json(body))
    return found.content, found


def inverted(service: EngineService, pixels: np.ndarray, prompt: str) -> np.ndarray:
    """The noise that generates an image, [C, h, w]. Running jobs take steps in between: it is a hundred calls and
    more."""
    search = ask_engine(service, lambda engine: engine.inversion(pixels, prompt))
    while not search.finished:
        ask_engine(service, lambda _: search.advance(INVERSION_SLICE))
    latent: np.ndarray = search.latent
    return latent


_PICTURE = re.compile(rb'"(?:init_images?|mask)"\s*:\s*\[?\s*"(?:data:image/[a-z.+-]+;base64,)?([A-Za-z0-9+/=\\ ]*)"')


def read_drawing() -> Any:
    """The JSON body of POST /text_to_image. Only its images may be large: other JSON costs more than its bytes.

    Raises a 413 problem.
    """
    request.max_content_length = MAX_DRAW_BODY_BYTES
    _, body = read_body((JSON,))
    rest = len(body) - sum(len(found[1]) for found in _PICTURE.finditer(body))
    if rest > MAX_BODY_BYTES:
        raise Problem(413, f"The body is too large: this route accepts at most {MAX_BODY_BYTES} bytes beside images.")
    return parse_json(body)


class ImageReader:
    """Untrusted images, one at a time: a photograph of 48 kB may need 320 MB of pixels, so the largest take turns.

    Few may wait for that, or for the model: each holds one thread of the web server.
    """

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_AT_ONCE)

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the few places for requests that have to wait. Raises a 429 problem when all are taken."""
        if not self._places.acquire(blocking=False):
            raise Problem(429, f"{MAX_AT_ONCE} other images or latents are waiting.", {"Retry-After": "2"})
        try:
            yield
        finally:
            self._places.release()

    def square(self, picture: bytes, size: int) -> np.ndarray:
        """The square in the middle of any image, uint8 [size, size, 3]. Raises PictureError."""
        with self._one_at_a_time:
            return crop_square(read_image(picture), size)

    def look(self, picture: bytes, at: Callable[[np.ndarray], T]) -> T:
        """What `at` says to all the pixels of any image, uint8 [H, W, 3]. Raises PictureError."""
        with self._one_at_a_time:
            return at(read_image(picture))

    def alpha(self, picture: bytes) -> np.ndarray | None:
        """How opaque the pixels of any image are, uint8 [H, W]; None where all are. Raises PictureError."""
        with self._one_at_a_time:
            return read_alpha(picture)

    def normalised(self, wanted: TextToImage, size: int) -> dict[str, str]:
        """The images of a request as they are kept: PNGs in base64, at the model's size; the mask black and white.

        Raises a problem that names the fields which hold none.
        """
        found: dict[str, str] = {}
        errors: list[tuple[tuple[str, ...], str]] = []
        given = {"init_image": wanted.init_image, "mask": wanted.mask}
        with self.place():
            for name, text in given.items():
                if text is None:
                    continue
                try:
                    pixels = self.square(base64.b64decode(text), size)
                except PictureError as error:
                    errors.append(((name,), str(error)))
                    continue
                if name == "mask":
                    mask = is_white(pixels)
                    if not mask.any():
                        told = f"has nothing white at {size} x {size} pixels, so nothing would be drawn"
                        errors.append(((name,), told))
                    pixels = mask_picture(mask)
                found[name] = as_text(pixels)
        if errors:
            raise invalid(errors)
        return found


def refused(error: Exception) -> Problem:
    """An image or latent that cannot be used, under the name that the client gave it."""
    return invalid([(("image",) if request.mimetype == JSON else (), str(error))])


def add_exchange(
    app: Flask, service: EngineService, loaded: Callable[[], EngineInfo], reader: ImageReader
) -> None:
    """Add the three routes. `loaded` returns what the model says of itself, or raises a problem."""
    @app.post("/encode")
    @operation(
        "An image as a latent", "latents",
        {200: Answer("The latent; as a .npy file for who accepts only that.", {JSON: Encoded, NPY: BINARY})},
        bodies={JSON: EncodeImage, PNG: BINARY, JPEG: BINARY, WEBP: BINARY},
        problems={429: "Too many images or latents wait for the model.", 503: BUSY},
    )
    def encode() -> Response:
        """Any image: the largest square in its middle is resized to what the model generates. With `invert` the answer
        is the noise that generates it with 50 steps of DDIM at guidance_scale 1, or at any with an empty prompt."""
        info = loaded()
        picture, asked = given_picture((PNG, JPEG, WEBP), EncodeImage)
        with reader.place():
            try:
                pixels = reader.square(picture, info.image_size)
            except PictureError as error:
                raise refused(error) from error
            if asked is not None and asked.invert:
                latent = inverted(service, pixels, asked.prompt)
            else:
                latent = ask_engine(service, lambda engine: engine.encode(pixels))
            latent = np.ascontiguousarray(latent, "<f4")
        if request.accept_mimetypes.best_match((JSON, NPY), JSON) == NPY:
            file = io.BytesIO()
            np.save(file, latent, allow_pickle=False)
            return Response(file.getvalue(), mimetype=NPY, headers={"Cache-Control": "no-store"})
        body = Encoded(latent=base64_text(latent.tobytes()), shape=list(latent.shape))
        prompt = "" if asked is None else asked.prompt
        if warnings := unread_warning("The prompt", prompt, unread_in(prompt, info)):
            body["warnings"] = warnings
        return json_response(body)

    @app.post("/decode")
    @operation(
        "A latent as an image", "latents",
        {200: Answer("The image.", {PNG: BINARY})},
        bodies={JSON: GiveLatent, NPY: BINARY},
        problems={429: "Too many images or latents wait for the model.", 503: BUSY},
    )
    def decode() -> Response:
        """A .npy file must hold little-endian float32 of exactly the model's latent shape, in C order."""
        info = loaded()
        kind, body = read_body((JSON, NPY))
        if kind == JSON:
            given = validate(GiveLatent, parse_json(body), context=info)
            latent = decode_latent(given.latent, info.latent_shape, "latent")
        else:
            try:
                latent = read_npy(body, info.latent_shape)
            except ValueError as error:
                raise refused(error) from error
        with reader.place():
            pixels = ask_engine(service, lambda engine: engine.decode(latent))
        return Response(encode_png(pixels), mimetype=PNG, headers={"Cache-Control": "no-store"})

    @app.post("/inspect")
    @operation(
        "How was this image generated?", "latents",
        {200: Answer("What the image says about itself.", {JSON: Inspection})},
        bodies={JSON: GiveImage, PNG: BINARY, JPEG: BINARY, WEBP: BINARY},
        problems={429: "Too many images or latents are being read."},
    )
    def inspect() -> Response:
        """Reads the text that the server writes into its PNG files, which many tools drop, and looks for the invisible
        mark in the pixels of PNG, JPEG and WebP files, which survives most of what happens to images."""
        info, (picture, _) = service.info, given_picture((PNG, JPEG, WEBP), GiveImage)
        try:
            found: Restored | None = read_request(picture) if is_png(picture) else None
        except NoRequestError:
            found = None
        except PictureError as error:
            raise refused(error) from error
        with reader.place():
            try:
                seen = reader.look(picture, find)
            except PictureError as error:
                raise refused(error) from error
        hash_ = found["model_hash"] if found else None
        return json_response(Inspection(
            made_here=bool(found and found["exact"]),
            request=found["request"] if found else None,
            model_hash=hash_,
            model_matches=info is not None and hash_ is not None and any(
                one.model_hash.startswith(hash_) for one in service.models.infos),
            watermark={"found": seen.found, "score": round(seen.score, 3), "p_value": seen.p_value},
        ))
