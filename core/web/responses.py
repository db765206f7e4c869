"""What does a client get, of jobs and their images?

The answers in JSON: their types, from which the OpenAPI document is written, and by which mypy checks what
`core/web/serializers.py` and the routes build. `finished`, `response` and what is in it are a promise to existing
clients; all other members stand beside them. It does not know routes, status codes or headers; what is streamed is in
`core/web/stream_responses.py`, what the server says of itself and of prompts in `core/web/server_responses.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from core.jobs.job import State
from core.web.aliases import older_name_of
from core.web.parameters import Parameters
from core.web.values import Seed

JobId = Annotated[str, Field(pattern="^[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{32}$", max_length=73)]
Count = Annotated[int, Field(ge=0)]
EventId = Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$", description="for Last-Event-ID")]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"}, description="UTC, in milliseconds")]
Picture64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"})]
Latent64 = Annotated[
    str, Field(json_schema_extra={"contentEncoding": "base64"}, description="little-endian float32 in C order")
]
ServerState = Literal["STARTING", "READY", "FAILED", "STOPPING"]


# ---- problems --------------------------------------------------------------------------------------------------------


class FieldProblem(TypedDict):
    """What is wrong with one field."""

    pointer: Annotated[str, Field(description="`#/name` in a body, `?name` in a query")]
    message: str


class ProblemAnswer(TypedDict):
    """Every error has this shape (RFC 9457)."""

    type: Literal["about:blank"]
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    error: Annotated[str, Field(description="the same sentence as `detail`")]
    errors: NotRequired[Annotated[list[FieldProblem], Field(min_length=1)]]
    state: NotRequired[ServerState]


# ---- jobs ------------------------------------------------------------------------------------------------------------


class JobAccepted(TypedDict):
    """A job was made, or found by its idempotency key."""

    job_id: JobId
    status: State
    parameters: Parameters
    warnings: list[str]


class Failure(TypedDict):
    """Why a job failed or was cancelled: one word for programs, a sentence, and what helps."""

    code: str
    message: str
    hint: str


Share = Annotated[float, Field(ge=0, le=1)]


class Nearest(TypedDict):
    """How near an image is to the nearest training image, in coarse composition and colour."""

    percentile: Annotated[
        float, Field(ge=0, le=100, description="share of photographs of unseen people that are nearer to one")]
    too_close: bool


class Assessment(TypedDict):
    """What is known of a finished image alone. What the attribute classifier would say is null where the model has
    none."""

    attributes: NotRequired[Annotated[
        dict[str, Share] | None,
        Field(description="CelebA's name -> how probable, by the bundled attribute classifier")]]
    agreement: NotRequired[Annotated[
        dict[str, Share] | None,
        Field(description="how far the image agrees with each attribute that its prompt states, rare ones weighed as "
              "if they were as likely as not")]]
    prompt_alignment: NotRequired[Annotated[
        Share | None, Field(description="mean of `agreement`; null where the prompt states nothing")]]
    adherence: NotRequired[Annotated[Share | None, older_name_of("prompt_alignment")]]
    evaluations: NotRequired[Annotated[
        int, Field(ge=0, description="how often the network was asked: steps x passes; sliders add two passes each")]]
    nearest: NotRequired[Annotated[
        Nearest | None, Field(description="against the images that the model learned from; null without an index")]]
    prompt: NotRequired[Annotated[
        str,
        Field(description="what was generated, where `attribute_balancing` put words before the prompt of the job")]]
    before: NotRequired[Annotated[str, Field(
        json_schema_extra={"format": "uri-reference"}, description="the image as it was before it was refined")]]
    unsafe: NotRequired[Annotated[bool, Field(
        description="what the safety checker of the model's folder says; the image is not changed")]]


ASSESSMENT_FIELDS = tuple(Assessment.__annotations__)


class Update(Assessment):
    """The latest update of one image; before the last step the clean image as it is predicted now."""

    t: Annotated[int, Field(ge=0, description="steps done")]
    total_t: Annotated[int, Field(ge=1, description="steps in all")]
    img: NotRequired[Picture64]
    latent: NotRequired[Latent64]
    index: Annotated[int, Field(ge=0, le=7)]
    seed: Seed
    url: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})]
    favourite: NotRequired[Literal[True]]


class JobFacts(TypedDict):
    """What is told of every job."""

    finished: bool
    job_id: JobId
    status: State
    progress: Annotated[float, Field(ge=0, le=1)]
    queue_position: Annotated[int, Field(ge=1)] | None
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    parameters: Parameters
    warnings: list[str]
    error: Failure | None


class JobAnswer(JobFacts):
    """Everything about one job. `response` is empty before the first update."""

    response: list[Update]
    eta_s: Annotated[float, Field(ge=0)] | None
    loading: NotRequired[Annotated[str, Field(description="the model that is being loaded for it now")]]
    last_event_id: Annotated[int, Field(ge=1, description="where to go on listening")]


class JobImage(TypedDict):
    """A finished image of a job."""

    index: Annotated[int, Field(ge=0, le=7)]
    seed: Seed
    url: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})]
    thumbnail: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})]
    favourite: NotRequired[Literal[True]]


class JobSummary(JobFacts):
    """One job in a list."""

    images: Annotated[list[JobImage], Field(max_length=8)]


class JobList(TypedDict):
    """Jobs, newest first; `next` is the cursor of the following page, null on the last."""

    jobs: Annotated[list[JobSummary], Field(max_length=200)]
    next: str | None


class Cancelled(TypedDict):
    """The job after it was asked to stop; a running one stops within one step."""

    job_id: JobId
    status: State
    cancel_requested: bool


class StepImage(TypedDict):
    """An image as it was predicted at one step, or finished."""

    index: Annotated[int, Field(ge=0, le=7)]
    t: Count
    total_t: Count
    thumbnail: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})]


class StepsAnswer(TypedDict):
    """All images of a job that are kept, in the order in which they were predicted."""

    steps: list[StepImage]


# ---- latents and images --------------------------------------------------------------------------------------------


class Encoded(TypedDict):
    """An image as a latent."""

    latent: Latent64
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    warnings: NotRequired[Annotated[list[str], Field(description="what of a prompt was not read, where there is any")]]


class WatermarkFinding(TypedDict):
    """Whether the pixels carry the mark of images generated here, by this server or another."""

    found: bool
    score: Annotated[float, Field(ge=0, description="standard deviations above what images without it give")]
    p_value: Annotated[float, Field(ge=0, le=1, description="how probable the score is for an image without it")]


class StepLatent(TypedDict):
    """The latent of one image at one step: with `start_timestep` = t / total_t another request goes on from here."""

    latent: Latent64
    index: Annotated[int, Field(ge=0, le=7)]
    seed: Seed
    t: Count
    total_t: Count


class Inspection(TypedDict):
    """What an image says about how it came about: in its file, and where that is lost, in its pixels."""

    made_here: Annotated[bool, Field(description="it carries the request that this project writes into its images")]
    request: Annotated[dict[str, Any] | None, Field(description="body of POST /text_to_image that generates it again")]
    model_hash: str | None
    model_matches: Annotated[bool, Field(description="the loaded model is the one that generated it")]
    watermark: WatermarkFinding


class Verdict(TypedDict):
    """An image beside the one that its generation parameters give. Differences are in grey levels of 255."""

    job_id: JobId
    verdict: Annotated[
        Literal["exact", "visually_equal", "different"],
        Field(description="equal in every pixel, within both bounds, or neither")]
    mean_difference: Annotated[float, Field(ge=0, le=255)]
    max_difference: Annotated[int, Field(ge=0, le=255)]
    mean_bound: float
    max_bound: int
    size_changed: Annotated[bool, Field(description="the image had another size and was resized to be compared")]
