"""How does a client fetch what a job has drawn?

As files: each picture, its thumbnail, a collage of all its steps, everything in one archive. A finished picture never
changes, so whoever has it need not ask again; before that, the newest preview stands at the same address.

It does not know how jobs are made or watched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flask import Flask, Response

from core.answers import files_of, latest_updates
from core.engine import picture_name
from core.jobs import DeletedJob, JobQueue, UnknownJob
from core.ledger import Job, Snapshot
from core.openapi import BINARY, ETAG, IF_NONE_MATCH, UNCHANGED, Answer, operation
from core.pictures import archive, collage, thumbnail_webp
from core.web import Problem, shown, tagged

PNG, WEBP, ZIP = "image/png", "image/webp", "application/zip"
THUMBNAIL_SIZE = 256  # pixels; a smaller picture keeps its size
FOREVER = "private, max-age=31536000, immutable"
NO_JOB = {404: "No job ever had this id.", 410: "The job was deleted, or expired.", 503: "The disk fails."}


def find(look: Callable[[str], Job], job_id: str) -> Job:
    """The job that `look` finds. Raises a 404 or a 410 problem."""
    try:
        job = look(job_id)
    except UnknownJob as error:
        raise Problem(404, f"There is no job {shown(job_id)}.") from error
    except DeletedJob as error:
        raise Problem(410, "This job was deleted, or made room for newer ones; its seed draws it again.") from error
    if job.delete_requested:
        raise Problem(410, "This job was deleted.")
    return job


def file_response(content: bytes, kind: str, name: str, tag: str, *, final: bool = True) -> Response:
    """A file to look at or to keep; one that is not final is the newest of several."""
    cache = FOREVER if final else "no-cache"
    headers = {"Content-Disposition": f'inline; filename="{name}"', "Cache-Control": cache}
    return tagged(Response(content, mimetype=kind, headers=headers), tag)


def add_results(app: Flask, queue: JobQueue) -> None:
    """Pictures, thumbnails, the collage of all steps, everything in one archive."""

    def updates_of(job_id: str) -> tuple[Job, Snapshot]:
        job = find(queue.get, job_id)
        return job, job.snapshot()

    def picture(job_id: str, index: int) -> tuple[bytes, dict[str, Any]]:
        job, now = updates_of(job_id)
        event = latest_updates(now).get(index)
        content = job.file(files_of(event)[0]) if event else None
        if event is None or content is None:
            raise Problem(404, f"Job {shown(job_id)} has no image {index} (yet).")
        seed, step = event.data["seed"], event.data["t"]
        return content, {"name": f"face-{seed}", "tag": f"{job.id}-{index}-{step}", "final": event.kind == "image"}

    def finished(job_id: str) -> tuple[Job, Snapshot]:
        job, now = updates_of(job_id)
        if not now.finished:
            raise Problem(409, f"The job is {now.state}; wait until it is finished.")
        return job, now

    no_image = {**NO_JOB, 404: "No job ever had this id, or it has no such image (yet)."}
    too_early = {**NO_JOB, 409: "The job is not finished, or ended before there was a picture."}

    @app.get("/jobs/<job_id>/images/<int:index>.png")
    @operation("One picture", "results", {200: Answer("The picture.", {PNG: BINARY}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems=no_image)
    def image(job_id: str, index: int) -> Response:
        """The final picture with everything that is needed to draw it again; before that, the newest preview."""
        content, about = picture(job_id, index)
        return file_response(content, PNG, f"{about['name']}.png", about["tag"], final=about["final"])

    @app.get("/jobs/<job_id>/images/<int:index>.webp")
    @operation("One picture, small", "results",
               {200: Answer("The thumbnail.", {WEBP: BINARY}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems=no_image)
    def thumbnail(job_id: str, index: int) -> Response:
        """For lists; without the text that the PNG carries."""
        content, about = picture(job_id, index)
        small = thumbnail_webp(content, THUMBNAIL_SIZE)
        return file_response(small, WEBP, f"{about['name']}.webp", f"{about['tag']}-small", final=about["final"])

    @app.get("/jobs/<job_id>/collage.png")
    @operation("How the pictures came about", "results",
               {200: Answer("One row an image, one column a step.", {PNG: BINARY}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems=too_early)
    def collage_of(job_id: str) -> Response:
        """Every preview that is kept, and the picture at the end."""
        job, now = finished(job_id)
        rows: dict[int, list[bytes]] = {}
        for event in now.events_of_this_run:
            if event.kind in ("preview", "image"):
                content = job.file(files_of(event)[0])
                rows.setdefault(event.data["index"], []).extend([] if content is None else [content])
        if not any(rows.values()):
            raise Problem(409, f"The job {now.state} before there was a picture.")
        content = collage([rows[index] for index in sorted(rows)])
        return file_response(content, PNG, "collage.png", f"{job.id}-collage")

    @app.get("/jobs/<job_id>/archive.zip")
    @operation("All pictures of a job", "results",
               {200: Answer("The pictures, and the request as job.json.", {"application/zip": BINARY}, (ETAG,)),
                304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems=too_early)
    def archive_of(job_id: str) -> Response:
        """Equal jobs give equal bytes."""
        job, now = finished(job_id)
        finals = [event for event in now.events_of_this_run if event.kind == "image"]
        files = {f"face-{event.data['seed']}.png": job.file(picture_name(event.data["index"])) for event in finals}
        if not files or None in files.values():
            raise Problem(409, f"The job {now.state} before there was a picture.")
        about = json.dumps(dict(job.parameters), indent=2).encode()
        content = archive({name: data for name, data in files.items() if data is not None} | {"job.json": about})
        return file_response(content, "application/zip", "faces.zip", f"{job.id}-archive")
