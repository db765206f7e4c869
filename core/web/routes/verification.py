"""Is this image really what its generation parameters say?

POST /verify reads the request out of a PNG and generates it again as a job of one image; GET /jobs/{id}/verdict
compares the two images. So a check waits its turn like any generating, survives a restart, and holds nobody up. Whoever
asks for the same check again gets the same job.

It does not know how images are generated, nor what generation parameters looks like: `core/imaging/png_metadata.py`
does.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from flask import Flask, Response

from core.engine import EngineInfo
from core.imaging.file_sanitizer import PictureError
from core.imaging.image_io import as_text, crop_square, read_image
from core.imaging.png_metadata import Restored, read_request
from core.imaging.watermark import VERSION
from core.jobs.result_files import image_name
from core.jobs.service import EngineService
from core.web import requests
from core.web.errors import Problem, json_response, shown
from core.web.model_choice import drawn_by
from core.web.openapi import BINARY, JSON, Answer, Header, operation
from core.web.proxies import outside
from core.web.requests import GiveImage, TextToImage
from core.web.responses import JobAccepted, Verdict
from core.web.routes.images import NO_JOB, find
from core.web.routes.latents import BUSY, PNG, ImageReader, given_picture, refused
from core.web.serializers import job_accepted
from core.web.submission import submit
from core.web.validation import validate

MEAN_BOUND, MAX_BOUND = 1.5, 24  # grey levels of 255 up to which two images are visually equal
MAX_TRIES = 20  # checks of one image that failed or were cancelled, and are made again


def compare(one: np.ndarray, other: np.ndarray) -> tuple[Literal["exact", "visually_equal", "different"], float, int]:
    """The verdict on two images of one size, their mean and their largest difference. Shapes: uint8 [H, W, 3]."""
    apart = np.abs(one.astype(np.int16) - other)
    mean, largest = float(apart.mean()), int(apart.max())
    if largest == 0:
        return "exact", mean, largest
    return ("visually_equal" if mean <= MEAN_BOUND and largest <= MAX_BOUND else "different"), mean, largest


def can_be_drawn_here(found: Restored, info: EngineInfo) -> None:
    """Raises a 409 problem when only another model, or another version of the mark, gives the same image."""
    hash_ = str(found["model_hash"])
    if hash_ != info.model_hash:
        text = (f"This picture was drawn by another model ({shown(hash_[:16])}) than the one that is loaded: "
                f"{info.name} ({info.model_hash[:16]}). Only the same weights draw the same picture.")
        raise Problem(409, text)
    if found["watermark"] not in (None, VERSION):
        raise Problem(409, f"This image carries version {found['watermark']} of the watermark; this server puts in "
                           f"version {VERSION}.")


def add_verification(
    app: Flask,
    service: EngineService,
    loaded: Callable[[], EngineInfo],
    words: Mapping[str, str],
    reader: ImageReader,
    client_name: Callable[[], str],
) -> None:
    """Add the two routes. `loaded` returns what the model says of itself, or raises a problem."""

    @app.post("/verify")
    @operation(
        "Is this image what its generation parameters say?", "results",
        {200: Answer("It will be generated again.", {JSON: JobAccepted},
                     (Header("Location", "where the verdict will be"),))},
        bodies={JSON: GiveImage, PNG: BINARY},
        problems={409: "Another model generated it.", 429: "The queue is full, or too many images wait.", 503: BUSY},
    )
    def verify() -> Response:
        """Takes a PNG with the text that the server writes into its images. The same image gives the same job; the
        verdict stands at /jobs/{job_id}/verdict once it is finished."""
        info, (picture, _) = loaded(), given_picture((PNG,), GiveImage)
        try:
            found = read_request(picture)
            if not found["exact"]:
                raise PictureError(
                    "the PNG has only the text `parameters`, which does not say everything: no generation parameters"
                )
            info = drawn_by(service, info, str(found["model_hash"]))
            can_be_drawn_here(found, info)
            with reader.place():
                pixels, size_changed = reader.look(picture, lambda seen: at_size(seen, info.image_size))
        except PictureError as error:
            raise refused(error) from error
        wanted = restored_request(found, info)
        pictures = {} if wanted.init_image is None else reader.normalised(wanted, info.image_size)
        kept = {"verify": {"picture": as_text(pixels), "size_changed": size_changed}}
        digest = hashlib.sha256(json.dumps([found, kept], sort_keys=True).encode()).hexdigest()
        for attempt in range(MAX_TRIES):
            job = submit(
                service, info, words, wanted, pictures, client=client_name(), key=f"verify {digest} {attempt}",
                watermark=found["watermark"] is not None, shown={"verification": True}, kept=kept,
            )
            if job.state not in ("failed", "cancelled") and not job.cancel_requested:
                break
        return json_response(job_accepted(job), {"Location": outside(f"/jobs/{job.id}/verdict")})

    @app.get("/jobs/<job_id>/verdict")
    @operation(
        "What came out of a verification?", "results",
        {200: Answer("The image that was sent, beside the one that was generated.", {JSON: Verdict})},
        problems={**NO_JOB, 404: "No job ever had this id, or it verifies nothing.",
                  409: "It is not finished, or it failed."},
    )
    def verdict(job_id: str) -> Response:
        """`visually_equal` is what another device or another build of the libraries makes of the same request."""
        job = find(service.queue.get, job_id)
        if "verify" not in job.request:
            raise Problem(404, f"Job {shown(job_id)} verifies nothing: it was not made by POST /verify.")
        now = job.snapshot()
        if not now.finished:
            raise Problem(409, f"The job is {now.state}; wait until it is finished.", {"Retry-After": "2"})
        drawn = job.file(image_name(0))
        if now.state != "succeeded" or drawn is None:
            why = now.error["message"] if now.error else "Its picture is gone."
            raise Problem(409, f"The job {now.state}, so there is no verdict. {why} Ask POST /verify again.")
        sent = job.request["verify"]
        word, mean, largest = compare(read_image(base64.b64decode(sent["picture"])), read_image(drawn))
        if word == "exact" and sent["size_changed"]:
            word = "visually_equal"
        return json_response(Verdict(
            job_id=job.id, verdict=word, mean_difference=round(mean, 4), max_difference=largest,
            size_changed=sent["size_changed"], mean_bound=MEAN_BOUND, max_bound=MAX_BOUND,
        ))


def at_size(pixels: np.ndarray, size: int) -> tuple[np.ndarray, bool]:
    """The image as large as the model generates it, and whether it was not."""
    return (pixels, False) if pixels.shape[:2] == (size, size) else (crop_square(pixels, size), True)


def restored_request(found: Restored, info: EngineInfo) -> TextToImage:
    """The request in a PNG, checked like any other. Raises a 422 problem that says what in it cannot be generated
    here."""
    try:
        wanted = validate(TextToImage, found["request"], context=info, aliases=requests.ALIASES)
    except Problem as problem:
        raise refused(PictureError(f"its request cannot be generated: {problem.detail}")) from problem
    if wanted.n_images != 1:
        raise refused(PictureError(f"its request must be for 1 image; got n_images = {wanted.n_images}"))
    return wanted
