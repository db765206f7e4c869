"""How is a job told to a client?

Makes the answers of `core/web/responses.py` from jobs and their events. It does not know routes, status codes or
headers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, cast

from core.imaging.image_io import base64_text
from core.jobs.clock import seconds_each
from core.jobs.job import Job, Snapshot, State, Summary
from core.jobs.records import Event, Record
from core.jobs.result_files import image_url, latent_name, picture_name
from core.web.aliases import both_names
from core.web.proxies import outside
from core.web.responses import (
    FINDINGS,
    Failure,
    Findings,
    JobAccepted,
    JobAnswer,
    JobFacts,
    JobImage,
    JobSummary,
    Parameters,
    Update,
)


def isoformat(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def maybe_isoformat(timestamp: float | None) -> str | None:
    return None if timestamp is None else isoformat(timestamp)


def progress_of(job: Summary) -> float:
    return 1.0 if job.state == "succeeded" else round(job.done / job.total, 4) if job.total else 0.0


def latest_updates(job: Snapshot) -> dict[int, Event]:
    """The newest event with a picture of each image, by index."""
    events = job.events_of_this_run
    return {event.data["index"]: event for event in events if event.kind in ("preview", "image")}


def files_of(update: Event) -> tuple[str, str]:
    """The names of the picture and of the latent that an event tells of."""
    step = update.data["t"] if update.kind == "preview" else None
    return picture_name(update.data["index"], step), latent_name(update.data["index"], step)


def seconds_left(job: Snapshot) -> float | None:
    """What the rest will take, measured from step to step: neither the wait nor skipped steps count."""
    if job.finished:
        return 0.0
    steps = [event for event in job.events_of_this_run if event.kind == "progress"]
    if len(steps) < 2:
        return None
    seconds_per_step = seconds_each([event.at for event in steps], [event.data["t"] for event in steps])
    return max(0.0, round(seconds_per_step * (job.total - job.done), 1))


def parameters_of(job: Record) -> Parameters:
    """What is generated, for clients."""
    return both_names(job.parameters)


def job_accepted(job: Job) -> JobAccepted:
    """The answer about a job that was just made, or found by its idempotency key."""
    return {"job_id": job.id, "status": cast(State, job.state), "parameters": parameters_of(job),
            "warnings": list(job.warnings)}


def job_facts(job: Summary, updates: Iterable[Mapping[str, Any]]) -> JobFacts:
    """What the answer about a job and its line in a list have in common; `updates` tell of its pictures."""
    return {
        "finished": job.finished,
        "job_id": job.id,
        "status": cast(State, job.state),
        "progress": progress_of(job),
        "queue_position": job.queue_position,
        "created_at": isoformat(job.created_at),
        "started_at": maybe_isoformat(job.started_at),
        "finished_at": maybe_isoformat(job.finished_at),
        "parameters": parameters_of(job),
        "warnings": told(job.warnings, updates),
        "error": cast("Failure | None", job.error),
    }


def job_answer(job: Job, snapshot: Snapshot, include: str) -> JobAnswer:
    """The answer of GET /jobs/{id}/. `include` none, preview or full says which heavy fields are in it."""
    response: list[Update] = []
    for index, event in sorted(latest_updates(snapshot).items()):  # those of deleted pictures are none
        update: Update = {
            "t": event.data["t"], "total_t": event.data["total_t"], "index": index, "seed": event.data["seed"],
            "url": outside(image_url(job.id, index)),
        }
        if index in snapshot.marks.favourites:
            update["favourite"] = True
        update |= cast(Findings, both_names({name: event.data[name] for name in FINDINGS if name in event.data}))
        if "before" in update:
            update["before"] = outside(update["before"])
        wanted = {"none": 0, "preview": 1, "full": 2}[include]
        contents = [job.file(name) for name in files_of(event)[:wanted]]
        if None in contents:  # the job is being deleted at this moment
            continue
        texts = [base64_text(content) for content in contents if content is not None]
        if wanted >= 1:
            update["img"] = texts[0]
        if wanted == 2:
            update["latent"] = texts[1]
        response.append(update)
    answer: JobAnswer = {**job_facts(snapshot, response), "response": response, "eta_s": seconds_left(snapshot),
                         "last_event_id": snapshot.events[-1].id}
    if "loading" in snapshot.events[-1].data:  # until the next event, which tells of the first step
        answer["loading"] = snapshot.events[-1].data["loading"]
    return answer


def job_summary(job: Summary) -> JobSummary:
    """One job of GET /jobs/, with the addresses of its final pictures."""
    finals = {event["index"]: event for event in job.finals
              if picture_name(event["index"]) in job.files and event["index"] not in job.marks.deleted}
    images: list[JobImage] = [
        {"index": index, "seed": event["seed"], "url": outside(image_url(job.id, index)),
         "thumbnail": outside(image_url(job.id, index, "webp"))}
        for index, event in sorted(finals.items())
    ]
    for image in images:
        if image["index"] in job.marks.favourites:
            image["favourite"] = True
    return {**job_facts(job, job.finals), "images": images}


def told(warnings: Sequence[str], finals: Iterable[Mapping[str, Any]]) -> list[str]:
    """A job's warnings with those that its finished images give."""
    found, finals = list(warnings), list(finals)
    if close := [str(event["index"]) for event in finals if (event.get("nearest") or {}).get("too_close")]:
        which = f"Image {close[0]} is" if len(close) == 1 else f"Images {', '.join(close)} are"
        found.append(f"{which} unusually close to a training picture: do not pass it off as a new face.")
    if unsafe := [str(event["index"]) for event in finals if event.get("unsafe")]:
        which = f"Image {unsafe[0]}" if len(unsafe) == 1 else f"Images {', '.join(unsafe)}"
        found.append(f"{which} may not be safe to show, says the safety checker of the model.")
    return found


def event_text(job: Job, event: Event, *, with_previews: bool = True, prefix: str = "") -> str:
    """One event in the stream's format, addresses below `prefix`; empty when its picture was dropped or deleted."""
    data = both_names(event.data)
    for name in ("url", "before"):
        if data.get(name):
            data[name] = prefix + data[name]
    if data.get("index") in job.marks.deleted:
        return ""
    if event.kind == "preview" and with_previews:
        picture = job.file(files_of(event)[0])
        if picture is None:
            return ""
        data["img"] = base64_text(picture)
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(data)}\n\n"
