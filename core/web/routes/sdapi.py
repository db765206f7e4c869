"""How do programs written for A1111's web UI draw here?

A subset of `/sdapi/v1`, always on. That API answers when the pictures are there; here each of its requests makes jobs
like all others (`core/web/submission.py`), so they are durable, take their turn, can be cancelled and stand in the
gallery. `interrupt` and `progress` speak of the requests in which the same client waits now. What is asked for and not
done is named in `info`, as `ignored`; pictures have the model's size, whatever size was asked for.

It does not know what the fields are (`core/web/sdapi_schemas.py`).
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from flask import Flask, Response, request
from pydantic_core import PydanticCustomError

from core.engine import NUM_SEEDS, EngineInfo
from core.imaging.file_sanitizer import PictureError
from core.imaging.image_io import as_text, is_white, mask_picture
from core.imaging.png_metadata import NoRequestError, read_parameters, read_request
from core.jobs.job import Job
from core.jobs.service import EngineService
from core.web import sdapi_schemas
from core.web.errors import Problem, json_response, shown, translate_errors
from core.web.openapi import JSON, Answer, operation
from core.web.requests import MAX_IMAGE_BODY_BYTES, TextToImage
from core.web.routes.latents import BUSY, PictureReader, read_drawing
from core.web.sdapi_schemas import SD_ERRORS, SdImageToImage, SdRequest, SdTextToImage, ignored_fields, sampler_named
from core.web.serializers import files_of, latest_updates, seconds_left, told
from core.web.submission import submit
from core.web.validation import invalid, parse_json, read_body, read_json, read_query, validate
from core.web.values import decode_base64
from core.web.waiting import WaitingRequests

PREFIX = "/sdapi/v1"
USUAL_STEPS, USUAL_STRENGTH = 50, 0.75  # of that API, where a request says nothing
PROGRESS_EVERY = 10  # steps from one preview to the next


def title_of(info: EngineInfo) -> str:
    return f"{info.name} [{info.model_hash[:10]}]"


def names_of(info: EngineInfo) -> list[str]:
    """All by which a client may mean the model."""
    return [title_of(info), info.name, info.model_hash, info.model_hash[:10]]


def wanted_of(asked: SdRequest, info: EngineInfo, seed: int, reader: PictureReader) -> TextToImage:
    """One job of a request in this server's own words. Raises problems: 404 without such a sampler or a picture."""
    fields: dict[str, Any] = {
        "prompt": asked.prompt or "", "negative_prompt": asked.negative_prompt or "", "seed": seed,
        "n_images": asked.batch_size or 1, "n_inf_steps": asked.steps or USUAL_STEPS, "stream_freq": PROGRESS_EVERY,
        "guidance_scale": asked.cfg_scale,
    }
    if name := asked.sampler_name or asked.sampler_index:
        fields["sampler"], _ = sampler_named(name, info.samplers)
        if fields["sampler"] is None:
            raise Problem(404, f"Sampler not found: {shown(name)}; there are {', '.join(info.samplers)}.")
    if asked.subseed_strength:
        fields["variation_strength"] = asked.subseed_strength
    if isinstance(asked, SdImageToImage):
        if not asked.init_images:
            raise Problem(404, "Init image not found")
        strength = USUAL_STRENGTH if asked.denoising_strength is None else asked.denoising_strength
        mask = asked.mask
        if mask is not None and asked.inpainting_mask_invert:
            mask = inverted_mask(mask, reader, info.image_size)
        fields |= {"init_image": asked.init_images[0], "strength": strength, "mask": mask}
    return validate(TextToImage, fields, context=info)


def inverted_mask(picture: str, reader: PictureReader, size: int) -> str:
    """A mask with black and white exchanged, as base64, at the model's size. Raises a 422 problem for no picture."""
    try:
        with reader.place():
            return as_text(mask_picture(~is_white(reader.square(decode_base64(picture, "mask"), size))))
    except (PictureError, PydanticCustomError) as error:
        raise invalid([(("mask",), str(error))]) from error


def pictures_now(job: Job) -> list[tuple[int, int, bytes]]:
    """Index, seed and PNG of each picture as it is now: the final one, or the newest preview."""
    found = []
    for index, event in sorted(latest_updates(job.snapshot()).items()):
        content = job.file(files_of(event)[0])
        if content is not None:
            found.append((index, event.data["seed"], content))
    return found


def info_text(asked: SdRequest, jobs: Sequence[Job], info: EngineInfo, ignored: Sequence[str]) -> str:
    """The member `info` of an answer: JSON in a text, with that API's members and what it has no place for."""
    shots = [(job, seed, png) for job in jobs for _, seed, png in pictures_now(job)]
    first = jobs[0].parameters
    size = info.image_size
    subseed = first.get("variation_seed", -1)
    return json.dumps({
        "prompt": first["prompt"], "all_prompts": [first["prompt"] for _ in shots],
        "negative_prompt": first["negative_prompt"], "all_negative_prompts": [first["negative_prompt"] for _ in shots],
        "seed": first["seed"], "all_seeds": [seed for _, seed, _ in shots],
        "subseed": subseed, "all_subseeds": [subseed + i if subseed >= 0 else -1 for i, _ in enumerate(shots)],
        "subseed_strength": first.get("variation_strength", 0), "width": size, "height": size,
        "sampler_name": first["sampler"], "cfg_scale": first["guidance_scale"], "steps": first["n_inf_steps"],
        "batch_size": first["n_images"], "restore_faces": False, "face_restoration_model": None,
        "sd_model_name": info.name, "sd_model_hash": info.model_hash[:10], "sd_vae_name": None, "sd_vae_hash": None,
        "seed_resize_from_w": -1, "seed_resize_from_h": -1, "denoising_strength": first.get("strength"),
        "extra_generation_params": {}, "index_of_first_image": 0, "styles": [],
        "infotexts": [read_parameters(png) for _, _, png in shots],
        "job_timestamp": datetime.now().strftime("%Y%m%d%H%M%S"), "clip_skip": 1,
        "is_using_inpainting_conditioning": False, "ignored": list(ignored),
        "warnings": list(dict.fromkeys(warning for job in jobs for warning in warnings_of(job))),
        "job_ids": [job.id for job in jobs], "interrupted": any(job.state == "cancelled" for job in jobs),
    })


def warnings_of(job: Job) -> list[str]:
    return told(job.warnings, [event.data for event in job.snapshot().events if event.kind == "image"])


def add_sdapi(
    app: Flask,
    service: EngineService,
    loaded: Callable[[], EngineInfo],
    words: Mapping[str, str],
    reader: PictureReader,
    waiting: WaitingRequests,
    client_name: Callable[[], str],
) -> None:
    """Add the routes. `loaded` returns what the model says of itself, or raises a problem."""
    translate_errors(app, "/sdapi/", SD_ERRORS)
    queue = service.queue

    def declare(summary: str, kind: Any, *, bodies: Any = None, query: Any = None, problems: Any = None) -> Any:
        return operation(summary, "other clients", {200: Answer("As A1111's API answers.", {JSON: kind})},
                         bodies=bodies, query=query, problems=problems, errors=SD_ERRORS)

    @contextmanager
    def submitted(asked: SdRequest, info: EngineInfo) -> Iterator[list[Job]]:
        """The jobs of a request, one for each of its `n_iter`; all of them or none. Raises problems."""
        seed = asked.seed if asked.seed is not None and asked.seed >= 0 else secrets.randbelow(2**32)
        subseed = asked.subseed if asked.subseed is not None and asked.subseed >= 0 else secrets.randbelow(2**32)
        count, client = asked.batch_size or 1, client_name()
        jobs: list[Job] = []
        varied = bool(asked.subseed_strength)
        wanted = wanted_of(asked, info, seed, reader)
        pictures = {} if wanted.init_image is None else reader.normalised(wanted, info.image_size)
        try:
            for i in range(asked.n_iter or 1):
                moved = {"variation_seed": (subseed + i * count) % NUM_SEEDS} if varied else {
                    "seed": (seed + i * count) % NUM_SEEDS}
                part = wanted.model_copy(update=moved)
                jobs.append(submit(service, info, words, part, pictures, client=client, key=None))
        except Problem:
            for job in jobs:
                queue.cancel(job.id)
            raise
        with waiting.of_client(client, jobs):
            yield jobs

    def draw(schema: type[SdRequest]) -> Response:
        info, body = loaded(), read_drawing()
        asked = validate(schema, body)
        ignored = ignored_fields(body, size=info.image_size, model=names_of(info))
        name = asked.sampler_name or asked.sampler_index
        if name and sampler_named(name, info.samplers)[1]:
            ignored.append("scheduler")
        with waiting.place(), submitted(asked, info) as jobs:
            if not waiting.wait(jobs):
                there = ", ".join(job.id for job in jobs)
                raise Problem(503, f"The server is stopping; these jobs go on when it starts again: {there}.",
                              {"Retry-After": "10"})
            failed = next((job.error for job in jobs if job.state == "failed" and job.error), None)
            if failed is not None:
                raise Problem(500, f"{failed['message']} {failed['hint']}".strip())
            shots = () if asked.send_images is False else [png for job in jobs for _, _, png in pictures_now(job)]
            return json_response({
                "images": [base64.b64encode(png).decode() for png in shots],
                "parameters": {key: value for key, value in body.items() if key not in ("init_images", "mask")},
                "info": info_text(asked, jobs, info, list(dict.fromkeys(ignored))),
            })

    drawing = {404: "There is no such sampler.", 429: "The queue is full, or too many requests wait.", 503: BUSY}

    @app.post(f"{PREFIX}/txt2img")
    @declare("Draw, as A1111's web UI does", sdapi_schemas.SdPictures, bodies={JSON: SdTextToImage}, problems=drawing)
    def sd_txt2img() -> Response:
        """Answers when the pictures are there, or as they are when the request was interrupted."""
        return draw(SdTextToImage)

    @app.post(f"{PREFIX}/img2img")
    @declare("Change a picture, as A1111's web UI does", sdapi_schemas.SdPictures, bodies={JSON: SdImageToImage},
             problems={**drawing, 404: "There is no such sampler, or no picture came."})
    def sd_img2img() -> Response:
        """The square in the middle of the picture; with a mask only where that is white."""
        return draw(SdImageToImage)

    @app.get(f"{PREFIX}/progress")
    @declare("How far is my request?", sdapi_schemas.SdProgress, query=sdapi_schemas.SdProgressQuery)
    def sd_progress() -> Response:
        """Of the requests in which this client waits, the oldest."""
        skip = read_query(sdapi_schemas.SdProgressQuery).skip_current_image.lower() in ("true", "1")
        jobs = next(iter(waiting.jobs_of(client_name())), ())
        ended = sum(job.finished for job in jobs)
        job = next((job for job in jobs if not job.finished), None)
        share = job.done / job.total if job and job.total else 0.0
        shots = pictures_now(job) if job and not skip else []
        return json_response({
            "progress": round((ended + share) / len(jobs), 4) if jobs else 0.0,
            "eta_relative": (seconds_left(job.snapshot()) or 0.0) if job else 0.0,
            "state": {
                "skipped": False, "interrupted": bool(job and job.cancel_requested), "stopping_generation": False,
                "job": job.id if job else "", "job_count": len(jobs), "job_no": ended,
                "job_timestamp": datetime.fromtimestamp(job.created_at if job else 0).strftime("%Y%m%d%H%M%S"),
                "sampling_step": job.done if job else 0, "sampling_steps": job.total if job else 0,
            },
            "current_image": base64.b64encode(shots[0][2]).decode() if shots else None,
            "textinfo": None if job is None or job.state == "running" else "Waiting ...",
        })

    @app.post(f"{PREFIX}/interrupt")
    @declare("Stop my requests", sdapi_schemas.SdNothing)
    def sd_interrupt() -> Response:
        """Cancels the jobs for which this client waits; the requests answer with what is there."""
        for jobs in waiting.jobs_of(client_name()):
            for job in jobs:
                if not job.finished:
                    queue.cancel(job.id)
        return json_response({})

    @app.post(f"{PREFIX}/png-info")
    @declare("What does this PNG say?", sdapi_schemas.SdPngInfo, bodies={JSON: sdapi_schemas.SdImage})
    def sd_png_info() -> Response:
        """The text `parameters`, and what can be read out of it."""
        picture = base64.b64decode(validate(sdapi_schemas.SdImage, picture_body()).image)
        try:
            text = read_parameters(picture)
            found = read_request(picture)["request"] if text else {}
        except NoRequestError:
            found = {}
        except PictureError as error:
            raise invalid([(("image",), str(error))]) from error
        plain = {name: value for name, value in found.items() if name not in ("init_image", "mask", "latent")}
        return json_response({"info": text, "items": {"parameters": text} if text else {}, "parameters": plain})

    @app.get(f"{PREFIX}/options")
    @declare("Settings", sdapi_schemas.SdSettings, problems={503: BUSY})
    def sd_options() -> Response:
        """Those that have a counterpart here."""
        info = loaded()
        return json_response({
            "sd_model_checkpoint": title_of(info), "sd_checkpoint_hash": info.model_hash, "sd_vae": "Automatic",
            "samples_format": "png", "show_progress_every_n_steps": PROGRESS_EVERY, "CLIP_stop_at_last_layers": 1,
        })

    @app.post(f"{PREFIX}/options")
    @declare("Change settings", {"type": "null"}, bodies={JSON: sdapi_schemas.SdOptions},
             problems={404: "There is no such model.", 503: BUSY})
    def sd_set_options() -> Response:
        """One model is loaded, so it is the one that can be chosen."""
        info = loaded()
        name = validate(sdapi_schemas.SdOptions, read_json()).sd_model_checkpoint
        if name is not None and name not in names_of(info):
            raise Problem(404, f"There is no model {shown(name)}; there is {title_of(info)}.")
        return json_response(None)

    @app.get(f"{PREFIX}/samplers")
    @declare("Samplers", list[sdapi_schemas.SdSampler], problems={503: BUSY})
    def sd_samplers() -> Response:
        """Each with the names by which k-diffusion knows it."""
        return json_response([{"name": name, "aliases": list(sdapi_schemas.ALIASES.get(name, ())), "options": {}}
                              for name in loaded().samplers])

    @app.get(f"{PREFIX}/schedulers")
    @declare("Schedules of noise levels", list[sdapi_schemas.SdScheduler])
    def sd_schedulers() -> Response:
        """There is one, which the model was trained with."""
        return json_response([{"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1.0,
                               "need_inner_model": False}])

    @app.get(f"{PREFIX}/sd-models")
    @declare("Models", list[sdapi_schemas.SdModel], problems={503: BUSY})
    def sd_models() -> Response:
        """The one that is loaded."""
        info = loaded()
        return json_response([{"title": title_of(info), "model_name": info.name, "hash": info.model_hash[:10],
                               "sha256": info.model_hash, "filename": info.name, "config": None}])

    @app.get(f"{PREFIX}/memory")
    @declare("Memory", sdapi_schemas.SdMemory)
    def sd_memory() -> Response:
        """Of the machine and of this process; what an accelerator has is at /metrics of its own tools."""
        return json_response({"ram": memory(), "cuda": {"error": "unavailable"}})

    @app.get(f"{PREFIX}/embeddings")
    @declare("Embeddings", sdapi_schemas.SdEmbeddings)
    def sd_embeddings() -> Response:
        """None."""
        return json_response({"loaded": {}, "skipped": {}})

    @app.get(f"{PREFIX}/loras")
    @declare("LoRAs", {"type": "array", "maxItems": 0})
    def sd_loras() -> Response:
        """None."""
        return json_response([])


def picture_body() -> Any:
    """The JSON body of a request with one picture."""
    request.max_content_length = MAX_IMAGE_BODY_BYTES
    return parse_json(read_body((JSON,))[1])


def memory() -> dict[str, float]:
    """Bytes: what this process holds, what is free, and what the machine has; 0 where the system does not say."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (float(page * os.sysconf(name)) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        used = float(page * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]))
    except (AttributeError, OSError, ValueError):
        return {"free": 0.0, "used": 0.0, "total": 0.0}
    return {"free": free, "used": used, "total": total}
