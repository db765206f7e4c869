"""What does a client get that watches a job?

The events of the stream and what each says. It does not know how they are sent (`core/web/sse.py`).
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Json
from typing_extensions import NotRequired, TypedDict

from core.jobs.job import State
from core.web.responses import Assessment, Count, EventId, Failure, Picture64, Seed


class StatusUpdate(TypedDict):
    """The job is in this state now."""

    status: State
    error: Failure | None
    queue_position: NotRequired[Annotated[int, Field(ge=1)]]
    restarted: NotRequired[Annotated[bool, Field(description="the server was started again, and the job begins anew")]]
    loading: NotRequired[Annotated[str, Field(description="a model is being loaded for it first")]]


class ProgressUpdate(TypedDict):
    """So many steps are done."""

    t: Count
    total_t: Count


class PreviewUpdate(TypedDict):
    """One image as it is predicted now."""

    index: Annotated[int, Field(ge=0, le=7)]
    seed: Seed
    t: Count
    total_t: Count
    img: NotRequired[Annotated[Picture64, Field(description="missing with `previews=none`")]]


class ImageUpdate(Assessment):
    """One image is finished."""

    index: Annotated[int, Field(ge=0, le=7)]
    seed: Seed
    t: Count
    total_t: Count
    url: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})]


class DoneUpdate(TypedDict):
    """The job has ended; nothing comes after this."""

    status: State
    error: Failure | None
    t: Count
    total_t: Count


class StatusEvent(TypedDict):
    """Server-Sent Event `status`."""

    event: Literal["status"]
    id: EventId
    data: Json[StatusUpdate]
    retry: NotRequired[int]


class ProgressEvent(TypedDict):
    """Server-Sent Event `progress`."""

    event: Literal["progress"]
    id: EventId
    data: Json[ProgressUpdate]


class PreviewEvent(TypedDict):
    """Server-Sent Event `preview`."""

    event: Literal["preview"]
    id: EventId
    data: Json[PreviewUpdate]


class ImageEvent(TypedDict):
    """Server-Sent Event `image`."""

    event: Literal["image"]
    id: EventId
    data: Json[ImageUpdate]


class DoneEvent(TypedDict):
    """Server-Sent Event `done`."""

    event: Literal["done"]
    id: EventId
    data: Json[DoneUpdate]


StreamEvent = StatusEvent | ProgressEvent | PreviewEvent | ImageEvent | DoneEvent
