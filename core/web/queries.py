"""What may stand behind the question mark of an address?

The queries of the requests as pydantic schemas, as `core/web/requests.py` has the bodies. This file does not know what
happens to a valid query.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from core.jobs.job import TRANSITIONS
from core.web.errors import shown
from core.web.validation import bad_field
from core.web.values import MAX_SEED, PRINTABLE, no_control_characters

STATE_NAMES = "|".join(TRANSITIONS)


class Query(BaseModel):
    """What all queries share."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DrawQuery(Query):
    """Query of POST /text_to_image."""

    wait: int = Field(0, ge=0, le=600, description="seconds to wait for the pictures: 200 if they are there, or 202")


class OptionsQuery(Query):
    """Query of GET /options."""

    model: str | None = Field(None, max_length=200, description="whose options; those of the first when left out")


class JobQuery(Query):
    """Query of GET /jobs/{job_id}/."""

    include: Literal["none", "preview", "full"] = Field(
        "full", description="heavy fields of `response`: none, `img` alone, or `img` and `latent`")


class ImageQuery(Query):
    """Query of GET /jobs/{job_id}/images/{index}.png and .webp."""

    t: int | None = Field(None, ge=0, le=1000, description="as it was predicted at this step; the newest when left out")


class LatentQuery(Query):
    """Query of GET /jobs/{job_id}/latents/{index}."""

    t: int | None = Field(None, ge=0, le=1000, description="of this step; the newest when left out")


class AnimationQuery(Query):
    """Query of GET /jobs/{job_id}/animation.webp and .gif."""

    ms: int = Field(60, ge=20, le=2000, description="milliseconds that a frame stays")
    between: int = Field(3, ge=0, le=8, description="frames faded between two pictures")


class EventsQuery(Query):
    """Query of GET /jobs/{job_id}/events."""

    after: int = Field(0, ge=0, le=999_999_999, description="as the header Last-Event-ID, which counts more")
    previews: Literal["png", "none"] = Field(
        "png", description="`img` of preview events: none leaves it out, for slow lines; /jobs/{job_id}/images/"
        "{index}.webp has the newest, small")


class DeleteQuery(Query):
    """Query of DELETE /jobs/{job_id}/."""

    favourites: Literal["refuse", "keep", "delete"] = Field(
        "refuse", description="what becomes of a job with favourites: the request is refused, the other pictures are "
        "deleted, or all of it is")


class SurpriseQuery(Query):
    """Query of GET /prompt/surprise."""

    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="the same seed gives the same prompt")


class SessionQuery(Query):
    """Query of GET /session."""

    key: str = Field("", max_length=500, description="the API key")


class JobsQuery(Query):
    """Query of GET /jobs/."""

    limit: int = Field(50, ge=1, le=200, description="jobs in one answer")
    cursor: str | None = Field(None, description="`next` of the answer before",
                               json_schema_extra={"pattern": "^A[A-H][A-Za-z0-9_-]{10}$"})
    status: str | None = Field(None, description="only jobs in this state, or in one of several, with commas between",
                               json_schema_extra={"pattern": f"^({STATE_NAMES})(,({STATE_NAMES}))*$"})
    q: str | None = Field(None, min_length=1, max_length=200, json_schema_extra={"pattern": PRINTABLE},
                          description="only jobs whose prompt contains this, or that drew from this seed")

    favourites: Literal["any", "only"] = Field("any", description="only: jobs with a favourite picture")

    _printable = field_validator("q")(no_control_characters)

    @field_validator("status")
    @classmethod
    def _states(cls, value: str | None) -> str | None:
        if value is None or set(value.split(",")) <= set(TRANSITIONS):
            return value
        wanted = f"must be {', '.join(TRANSITIONS)}, or several with commas between"
        raise bad_field("status", f"{wanted}; got {shown(value)}")

    @property
    def states(self) -> list[str] | None:
        return None if self.status is None else self.status.split(",")
