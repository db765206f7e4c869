"""How is a job asked for, watched, listed, cancelled and deleted?

It does not know what a valid request is (`core/web/requests.py`), nor how jobs run (`core/jobs/queue.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from flask import Flask, Response, request

from core.jobs.queue import DeletedJob
from core.jobs.service import EngineService
from core.web import queries, requests, responses, serializers
from core.web.errors import Problem, json_response, shown, tagged
from core.web.model_choice import chosen, refinement
from core.web.openapi import ETAG, IF_NONE_MATCH, JSON, UNCHANGED, Answer, Header, operation
from core.web.proxies import outside, prefix
from core.web.rendered import Rendered, RenderedAnswers
from core.web.routes.images import NO_JOB, find
from core.web.routes.latents import BUSY, ImageReader, read_drawing
from core.web.routes.server import info_of
from core.web.sse import EventStreams
from core.web.stream_responses import StreamEvent
from core.web.submission import submit
from core.web.validation import invalid, read_header, read_query, validate
from core.web.waiting import WaitingRequests

PLACE = Header("Location", "where to watch it")


def client_name() -> str:
    """Whose turn it is: the address, and where several people share one, what the client calls itself."""
    return f"{request.remote_addr} {read_header('X-Client-Id', 64) or ''}"


def add_jobs(
    app: Flask, service: EngineService, words: Mapping[str, str], streams: EventStreams, reader: ImageReader,
    waiting: WaitingRequests, answers: RenderedAnswers,
) -> None:
    """Ask, watch, list, cancel, delete."""
    queue = service.queue

    @app.post("/text_to_image")
    @operation(
        "Generate faces", "jobs",
        {200: Answer("The job waits; after `?wait` it has ended.", {JSON: responses.JobAccepted | responses.JobAnswer},
                     (PLACE,)),
         202: Answer("With `?wait`: the job has not ended yet.", {JSON: responses.JobAccepted}, (PLACE,))},
        bodies={JSON: requests.TextToImage},
        query=queries.DrawQuery,
        headers=(Header("Idempotency-Key", "repeating the request with the same key returns the first job",
                        {"type": "string", "pattern": "^[!-~]{1,200}$"}),
                 Header("X-Client-Id", "tells apart clients that share an address, so that each gets its turn",
                        {"type": "string", "pattern": "^[!-~]{1,64}$"})),
        problems={429: "The queue is full.", 503: BUSY},
    )
    def text_to_image() -> Response:
        """Answers at once, or with `?wait=30` when the images are there, as GET /jobs/{job_id}/ does, at the latest
        after so many seconds; the job is generated in its turn, and survives a restart of the server."""
        patience_s = read_query(queries.DrawQuery).wait
        info = info_of(service)
        client, key = client_name(), read_header("Idempotency-Key", 200)
        body = read_drawing()
        info = chosen(service, info, body)
        wanted = validate(requests.TextToImage, body, context=info, aliases=requests.ALIASES)
        refine = refinement(service, info, wanted)
        pictures = {} if wanted.init_image is None else reader.normalised(wanted, info.image_size)
        told = refine and {"refine": {name: refine[name] for name in ("model", "strength", "prompt")}}
        job = submit(service, info, words, wanted, pictures, client=client, key=key, shown=told,
                     kept=refine and {"refine": refine})
        place = {"Location": outside(f"/jobs/{job.id}/")}
        if patience_s and waiting.wait_if_possible(job, patience_s):
            return json_response(serializers.job_answer(job, job.snapshot(), "full"), place)
        return json_response(serializers.job_accepted(job), place, 202 if patience_s else 200)

    @app.get("/jobs/")
    @operation(
        "The jobs that are kept, newest first", "jobs",
        {200: Answer("One page of them.", {JSON: responses.JobList}, (ETAG,)), 304: UNCHANGED},
        query=queries.JobsQuery, headers=(IF_NONE_MATCH,), problems={503: "The disk fails."},
    )
    def job_list() -> Response:
        """Jobs that come or go in the meantime do not shift the pages."""
        wanted = read_query(queries.JobsQuery)
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
        {200: Answer("The job with the latest update of each image.", {JSON: responses.JobAnswer}, (ETAG,)),
         304: UNCHANGED},
        query=queries.JobQuery, headers=(IF_NONE_MATCH,), problems=NO_JOB,
    )
    def job_status(job_id: str) -> Response:
        """Polling is cheap with If-None-Match and `include=none`."""
        include = read_query(queries.JobQuery).include
        key = ("job", job_id, include, prefix(), queue.revision)  # read before the job is
        if (kept := answers.find(key)) is not None:
            return kept.response()
        job = find(queue.get, job_id)
        now = job.snapshot()
        decided = "".join(f"-{'.'.join(map(str, sorted(some)))}" for some in now.marks if some)
        tag = f"{job.id}-{now.events[-1].id}-{include}{decided and f'-{len(now.marks.favourites)}{decided}'}"
        if request.if_none_match.contains_weak(tag):
            return tagged(Response(status=304), tag)
        answer = json_response(serializers.job_answer(job, now, include))
        if now.finished:
            answers.keep(key, Rendered(answer.get_data(), JSON, tag))
        return tagged(answer, tag)

    @app.post("/jobs/<job_id>/cancel")
    @operation(
        "Stop a job", "jobs", {200: Answer("The job, asked to stop.", {JSON: responses.Cancelled})}, problems=NO_JOB
    )
    def cancel(job_id: str) -> Response:
        """A waiting job stops at once, a running one within one step, and a finished one stays as it is."""
        job = find(queue.cancel, job_id)
        return json_response({"job_id": job.id, "status": job.state, "cancel_requested": job.cancel_requested})

    @app.delete("/jobs/<job_id>/")
    @operation("Stop a job and delete it with its images", "jobs", {204: Answer("It is gone.")},
               query=queries.DeleteQuery, problems={**NO_JOB, 409: "It has favourites; say what becomes of them."})
    def delete(job_id: str) -> Response:
        """A second time answers 410."""
        favourites = read_query(queries.DeleteQuery).favourites
        marks = find(queue.get, job_id).marks
        if favourites == "refuse" and (kept := len(marks.favourites - marks.deleted)):
            raise Problem(409, f"The job holds {kept} favourite{'s' * (kept > 1)}: ?favourites=keep deletes the other "
                               "images, ?favourites=delete all of it.")
        try:
            (queue.delete_but_favourites if favourites == "keep" else queue.delete)(job_id)
        except DeletedJob:  # by somebody else, a moment ago
            pass
        return Response(status=204)

    @app.get("/jobs/<job_id>/events")
    @operation(
        "Watch a job", "jobs",
        {200: Answer("`status`, `progress`, `preview`, `image` and `done`, each with a number and JSON.",
                     {"text/event-stream": StreamEvent}),
         204: Answer("There is nothing after that number, and never will be.")},
        query=queries.EventsQuery,
        headers=(Header("Last-Event-ID", "only events after this one",
                        {"type": "string", "pattern": "^[0-9]{1,9}$"}),),
        problems={**NO_JOB, 400: "Last-Event-ID is no number.", 429: "Too many streams are open."},
    )
    def events(job_id: str) -> Response:
        """Everything that has happened, then what happens, until the job ends; a comment at least every 15 seconds."""
        wanted = read_query(queries.EventsQuery)
        job = find(queue.get, job_id)
        text = request.headers.get("Last-Event-ID", str(wanted.after))
        if not re.fullmatch("[0-9]{1,9}", text):
            raise Problem(400, f"Last-Event-ID must be the number of an event; got {shown(text)}")
        return streams.answer(job, int(text), with_previews=wanted.previews != "none")
