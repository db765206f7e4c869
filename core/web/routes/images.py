"""How does a client fetch what a job has generated?

As files: each image, its thumbnail, a collage of all its steps, an animation, everything in one archive; and the latent
of any step, to go on from there. A finished image never
changes, so whoever has it need not ask again; before that, the newest preview stands at the same address.

It does not know how jobs are made or watched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask, Response

from core.imaging.animation import animation
from core.imaging.image_io import archive, base64_text, collage, thumbnail_webp
from core.jobs.image_decisions import NotFinished, PictureDeleted, UnknownPicture
from core.jobs.job import Job, Snapshot
from core.jobs.queue import DeletedJob, JobQueue, UnknownJob
from core.jobs.records import Event
from core.jobs.result_files import image_name, image_url
from core.web.aliases import both_names
from core.web.errors import Problem, json_response, shown, tagged
from core.web.openapi import BINARY, ETAG, IF_NONE_MATCH, JSON, UNCHANGED, Answer, operation
from core.web.proxies import outside
from core.web.queries import AnimationQuery, ImageQuery, LatentQuery
from core.web.rendered import Rendered, RenderedAnswers
from core.web.responses import StepLatent, StepsAnswer
from core.web.serializers import files_of, latest_updates
from core.web.validation import read_query

PNG, WEBP, GIF, ZIP = "image/png", "image/webp", "image/gif", "application/zip"
THUMBNAIL_SIZE = 256  # pixels; a smaller image keeps its size
FOREVER = "private, max-age=31536000, immutable"
Found = TypeVar("Found")
NO_JOB = {404: "No job ever had this id.", 410: "The job was deleted, or expired.", 503: "The disk fails."}


def of_job(act: Callable[[str], Found], job_id: str) -> Found:
    """What `act` makes of the job. Raises a 404 or a 410 problem where there is none (any more)."""
    try:
        return act(job_id)
    except UnknownJob as error:
        raise Problem(404, f"There is no job {shown(job_id)}.") from error
    except DeletedJob as error:
        raise Problem(410, "This job was deleted, or made room for newer ones; its seed generates it again.") from error


def find(look: Callable[[str], Job], job_id: str) -> Job:
    """The job that `look` finds. Raises a 404 or a 410 problem."""
    job = of_job(look, job_id)
    if job.delete_requested:
        raise Problem(410, "This job was deleted.")
    return job


def pictures_of(now: Snapshot) -> list[Event]:
    """The events with an image, oldest first. Previews of candidates show others than those that were kept at last."""
    events = [event for event in now.events_of_this_run if event.kind in ("preview", "image")]
    finals = [event for event in events if event.kind == "image"]
    chosen = now.parameters.get("candidates", 0) > now.parameters["n_images"]
    return finals if finals and chosen else events


def without(job: Job) -> str:
    """What the tag of something made of all images says of those that were deleted."""
    return "".join(f"-no{index}" for index in sorted(job.marks.deleted))


def file_of(content: bytes, kind: str, name: str, tag: str, *, final: bool = True) -> Rendered:
    """A file to look at or to keep; one that is not final is the newest of several."""
    cache = FOREVER if final else "no-cache"
    return Rendered(content, kind, tag, {"Content-Disposition": f'inline; filename="{name}"', "Cache-Control": cache})


def add_results(app: Flask, queue: JobQueue, answers: RenderedAnswers) -> None:
    """Images, thumbnails, the collage of all steps, everything in one archive."""

    def answer(job_id: str, what: tuple[Any, ...], make: Callable[[Job, Snapshot], Rendered]) -> Response:
        """`what` of a job; kept when the job has ended, after which only a decision about it makes another of it."""
        key = (job_id, what, queue.revision)  # read before the job is
        if (kept := answers.find(key)) is not None:
            return kept.response()
        job, now = updates_of(job_id)
        made = make(job, now)
        return (answers.keep(key, made) if now.finished else made).response()

    def updates_of(job_id: str) -> tuple[Job, Snapshot]:
        job = find(queue.get, job_id)
        return job, job.snapshot()

    def picture(job: Job, now: Snapshot, index: int, wanted: int | None) -> tuple[bytes, dict[str, Any]]:
        """The image at one step, or the newest; what is of one step, or finished, never changes."""
        if index in now.marks.deleted:
            raise Problem(410, f"Image {index} of this job was deleted.")
        event = latest_updates(now).get(index) if wanted is None else next(
            (event for event in reversed(pictures_of(now)) if event.data["index"] == index
             and event.data["t"] == wanted), None)
        content = job.file(files_of(event)[0]) if event else None
        if event is None or content is None:
            at = "" if wanted is None else f" at step {wanted}"
            raise Problem(404, f"Job {shown(job.id)} has no image {index}{at} (yet).")
        seed, step = event.data["seed"], event.data["t"]
        return content, {"name": f"face-{seed}", "tag": f"{job.id}-{index}-{step}",
                         "final": event.kind == "image" or wanted is not None}

    def assert_finished(now: Snapshot) -> None:
        if not now.finished:
            raise Problem(409, f"The job is {now.state}; wait until it is finished.")

    def decide(job_id: str, act: Callable[[str], None]) -> Response:
        """Do what was decided about one image. Raises a 404, 409 or 410 problem."""
        try:
            of_job(act, job_id)
        except NotFinished as error:
            raise Problem(409, f"The job is {error}; wait until it is finished.") from error
        except UnknownPicture as error:
            raise Problem(404, f"This job has no image {error}.") from error
        except PictureDeleted as error:
            raise Problem(410, f"Image {error} of this job was deleted.") from error
        return Response(status=204)

    no_image = {**NO_JOB, 404: "No job ever had this id, or it has no such image (yet)."}
    too_early = {**NO_JOB, 409: "The job is not finished, or ended before there was a picture."}

    @app.get("/jobs/<job_id>/images/<int:index>.png")
    @operation("One image", "results", {200: Answer("The image.", {PNG: BINARY}, (ETAG,)), 304: UNCHANGED},
               query=ImageQuery, headers=(IF_NONE_MATCH,), problems=no_image)
    def image(job_id: str, index: int) -> Response:
        """The final image with everything that is needed to generate it again; before that, the newest preview."""
        wanted = read_query(ImageQuery).t

        def render(job: Job, now: Snapshot) -> Rendered:
            content, about = picture(job, now, index, wanted)
            return file_of(content, PNG, f"{about['name']}.png", about["tag"], final=about["final"])

        return answer(job_id, ("image", index, wanted), render)

    @app.get("/jobs/<job_id>/images/<int:index>.webp")
    @operation("One image, small", "results",
               {200: Answer("The thumbnail.", {WEBP: BINARY}, (ETAG,)), 304: UNCHANGED},
               query=ImageQuery, headers=(IF_NONE_MATCH,), problems=no_image)
    def thumbnail(job_id: str, index: int) -> Response:
        """For lists; without the text that the PNG carries."""
        wanted = read_query(ImageQuery).t

        def render(job: Job, now: Snapshot) -> Rendered:
            content, about = picture(job, now, index, wanted)
            small = thumbnail_webp(content, THUMBNAIL_SIZE)
            return file_of(small, WEBP, f"{about['name']}.webp", f"{about['tag']}-small", final=about["final"])

        return answer(job_id, ("thumbnail", index, wanted), render)

    undecided = {**no_image, 409: "The job is not finished."}

    @app.put("/images/<job_id>/<int:index>/favourite")
    @operation("Make an image a favourite", "results", {204: Answer("It is one.")}, problems=undecided)
    def make_favourite(job_id: str, index: int) -> Response:
        """For all who use this server. Jobs with a favourite are not removed to make room."""
        return decide(job_id, lambda id_: queue.images.mark_favourite(id_, index, True))

    @app.delete("/images/<job_id>/<int:index>/favourite")
    @operation("Make an image no favourite any more", "results", {204: Answer("It is none.")}, problems=undecided)
    def make_no_favourite(job_id: str, index: int) -> Response:
        """The image stays."""
        return decide(job_id, lambda id_: queue.images.mark_favourite(id_, index, False))

    @app.delete("/jobs/<job_id>/images/<int:index>")
    @operation("Delete one image", "results", {204: Answer("It is gone.")}, problems=undecided)
    def delete_picture(job_id: str, index: int) -> Response:
        """The other images of the job stay. For an hour it can be restored."""
        return decide(job_id, lambda id_: queue.images.delete(id_, index))

    @app.post("/jobs/<job_id>/images/<int:index>/restore")
    @operation("Bring a deleted image back", "results", {204: Answer("It is there.")}, problems=undecided)
    def restore_picture(job_id: str, index: int) -> Response:
        """Later than an hour after it was deleted answers 410."""
        return decide(job_id, lambda id_: queue.images.restore(id_, index))

    @app.get("/jobs/<job_id>/steps")
    @operation("Which steps of the images are kept", "results",
               {200: Answer("Their steps and where they are.", {JSON: StepsAnswer}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems=NO_JOB)
    def steps_of(job_id: str) -> Response:
        """For an animation: each is fetched when it is shown."""
        job, now = updates_of(job_id)
        kept = set(job.file_names())
        return tagged(json_response({"steps": [
            {"index": event.data["index"], "t": event.data["t"], "total_t": event.data["total_t"],
             "thumbnail": f"{outside(image_url(job.id, event.data['index'], 'webp'))}?t={event.data['t']}"}
            for event in pictures_of(now) if files_of(event)[0] in kept
        ]}))

    @app.get("/jobs/<job_id>/collage.png")
    @operation("How the images came about", "results",
               {200: Answer("One row an image, one column a step.", {PNG: BINARY}, (ETAG,)), 304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems=too_early)
    def collage_of(job_id: str) -> Response:
        """Every preview that is kept, and the image at the end."""

        def render(job: Job, now: Snapshot) -> Rendered:
            assert_finished(now)
            rows: dict[int, list[bytes]] = {}
            for event in pictures_of(now):
                content = job.file(files_of(event)[0])
                rows.setdefault(event.data["index"], []).extend([] if content is None else [content])
            if not any(rows.values()):
                raise Problem(409, f"The job {now.state} before there was an image.")
            content = collage([rows[index] for index in sorted(rows)])
            tag = f"{job.id}-collage{without(job)}"
            return file_of(content, PNG, "collage.png", tag, final=not job.marks.deleted)

        return answer(job_id, ("collage",), render)

    def animation_of(job_id: str, kind: str) -> Response:
        wanted = read_query(AnimationQuery)

        def render(job: Job, now: Snapshot) -> Rendered:
            assert_finished(now)
            names = [image_name(event.data["index"]) for event in now.events_of_this_run if event.kind == "image"]
            pictures = [content for name in names if (content := job.file(name)) is not None]
            if not pictures:
                raise Problem(409, f"The job {now.state} before there was an image.")
            content = animation(pictures, kind, frame_ms=wanted.ms, between=wanted.between)
            tag = f"{job.id}-animation-{kind}-{wanted.ms}-{wanted.between}{without(job)}"
            return file_of(content, f"image/{kind.lower()}", f"faces.{kind.lower()}", tag, final=not job.marks.deleted)

        return answer(job_id, ("animation", kind, wanted.ms, wanted.between), render)

    @app.get("/jobs/<job_id>/animation.webp")
    @operation("The images as an animation", "results",
               {200: Answer("An animated WebP.", {WEBP: BINARY}, (ETAG,)), 304: UNCHANGED},
               query=AnimationQuery, headers=(IF_NONE_MATCH,), problems=too_early)
    def animation_webp(job_id: str) -> Response:
        """Forward and back, without end; made for interpolations."""
        return animation_of(job_id, "WEBP")

    @app.get("/jobs/<job_id>/animation.gif")
    @operation("The images as an animation, as a GIF", "results",
               {200: Answer("An animated GIF.", {GIF: BINARY}, (ETAG,)), 304: UNCHANGED},
               query=AnimationQuery, headers=(IF_NONE_MATCH,), problems=too_early)
    def animation_gif(job_id: str) -> Response:
        """As the WebP, with 256 colours, for programs that show no WebP."""
        return animation_of(job_id, "GIF")

    @app.get("/jobs/<job_id>/latents/<int:index>")
    @operation("The latent of one image at one step", "results",
               {200: Answer("The latent.", {JSON: StepLatent}, (ETAG,)), 304: UNCHANGED},
               query=LatentQuery, headers=(IF_NONE_MATCH,), problems=no_image)
    def latent_of(job_id: str, index: int) -> Response:
        """Of a step that has a preview, the clean latent as it was predicted there."""
        step = read_query(LatentQuery).t
        job, now = updates_of(job_id)
        events = [event for event in pictures_of(now) if event.data["index"] == index]
        for event in reversed(events):
            data = event.data
            if step in (None, data["t"]) and (content := job.file(files_of(event)[1])) is not None:
                found = {"latent": base64_text(content), "index": index, "seed": data["seed"],
                         "t": data["t"], "total_t": data["total_t"]}
                return tagged(json_response(found), f"{job.id}-latent-{index}-{data['t']}-{event.kind}")
        there = ", ".join(str(event.data["t"]) for event in events if job.file(files_of(event)[1]) is not None)
        raise Problem(404, f"Job {shown(job_id)} has no latent of image {index} at step {shown(step)} (yet); "
                      f"there are those of: {there or 'none'}.")

    @app.get("/jobs/<job_id>/archive.zip")
    @operation("All images of a job", "results",
               {200: Answer("The images, and the request as job.json.", {ZIP: BINARY}, (ETAG,)),
                304: UNCHANGED},
               headers=(IF_NONE_MATCH,), problems=too_early)
    def archive_of(job_id: str) -> Response:
        """Equal jobs give equal bytes."""

        def render(job: Job, now: Snapshot) -> Rendered:
            assert_finished(now)
            finals = [event for event in now.events_of_this_run if event.kind == "image"]
            seeds = [event.data["seed"] for event in finals]
            names = [f"face-{seed}.png" if seeds.count(seed) == 1 else f"face-{seed}-{i + 1}.png"
                     for i, seed in enumerate(seeds)]
            files = {name: job.file(image_name(event.data["index"]))
                     for name, event in zip(names, finals, strict=True)}
            if not files or None in files.values():
                raise Problem(409, f"The job {now.state} before there was an image.")
            about = json.dumps(both_names(job.parameters), indent=2).encode()
            content = archive({name: data for name, data in files.items() if data is not None} | {"job.json": about})
            return file_of(content, ZIP, "faces.zip", f"{job.id}-archive{without(job)}", final=not job.marks.deleted)

        return answer(job_id, ("archive",), render)
