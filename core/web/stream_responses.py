"""What does a client get that watches a job?

The events of the stream and what each says. It does not know how they are sent (`core/web/sse.py`).
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Json
from typing_extensions import NotRequired, TypedDict

from core.jobs.job import State
from core.web.responses import Count, EventId, Failure, Findings, Picture64, Seed


class StatusNews(TypedDict):
    """The job is in this state now."""

    status: State
    error: Failure | None
    queue_position: NotRequired[Annotated[int, Field(ge=1)]]
    restarted: NotRequired[Annotated[bool, Field(description="the server was started again, and the job begins anew")]]
    loading: NotRequired[Annotated[str, Field(description="a model is being loaded for it first")]]


class ProgressNews(TypedDict):
    """So many steps are done."""

    t: Count
    total_t: Count


class PreviewNews(TypedDict):
    """One image as it is predicted now."""

    index: Annotated[int, Field(ge=0, le=7)]
    seed: Seed
    t: Count
    total_t: Count
    img: NotRequired[Annotated[Picture64, Field(description="missing with `previews=none`")]]


class ImageNews(Findings):
    """One image is finished."""

    index: Annotated[int, Field(ge=0, le=7)]
    seed: Seed
    t: Count
    total_t: Count
    url: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})]


class DoneNews(TypedDict):
    """The job has ended; nothing comes after this."""

    status: State
    error: Failure | None
    t: Count
    total_t: Count


class StatusEvent(TypedDict):
    """Server-Sent Event `status`."""

    event: Literal["status"]
    id: EventId
    data: Json[StatusNews]
    retry: NotRequired[int]


class ProgressEvent(TypedDict):
    """Server-Sent Event `progress`."""

    event: Literal["progress"]
    id: EventId
    data: Json[ProgressNews]


class PreviewEvent(TypedDict):
    """Server-Sent Event `preview`."""

    event: Literal["preview"]
    id: EventId
    data: Json[PreviewNews]


class ImageEvent(TypedDict):
    """Server-Sent Event `image`."""

    event: Literal["image"]
    id: EventId
    data: Json[ImageNews]


class DoneEvent(TypedDict):
    """Server-Sent Event `done`."""

    event: Literal["done"]
    id: EventId
    data: Json[DoneNews]


StreamEvent = StatusEvent | ProgressEvent | PreviewEvent | ImageEvent | DoneEvent
