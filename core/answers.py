"""What does a client get?

The answers in JSON: their types, from which the OpenAPI document is written, and by which mypy checks what
`core/serializers.py` and the routes build. `finished`, `response` and what is in it are a promise to existing clients;
all other members stand beside them. It does not know routes, status codes or headers. The stream:
https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Json
from typing_extensions import NotRequired, TypedDict

from core.ledger import State

JobId = Annotated[str, Field(pattern="^[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{32}$", max_length=73)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]
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


class Target(TypedDict):
    """Where a row of images leads."""

    prompt: str | None
    seed: Seed | None
    weight: Annotated[float, Field(ge=0, le=1)] | None
    has_latent: bool


class Parameters(TypedDict):
    """What is drawn: the request with every default filled in; of a picture to change only that there is one."""

    prompt: str
    n_images: Annotated[int, Field(ge=1, le=8)]
    n_inf_steps: Annotated[int, Field(ge=1, le=1000)]
    stream_freq: Annotated[int, Field(ge=1, le=1000)]
    start_timestep: Annotated[float, Field(ge=0, le=1)]
    seed: Seed
    guidance_scale: Annotated[float, Field(ge=0, le=20)]
    negative_prompt: str
    sampler: str
    model: str
    num_latents: Annotated[int, Field(ge=0, le=8, description="latents that came with the request")]
    verification: NotRequired[Annotated[Literal[True], Field(description="made by /verify")]]
    has_init_image: NotRequired[Literal[True]]
    strength: NotRequired[Annotated[float, Field(ge=0, le=1)]]
    has_mask: NotRequired[Literal[True]]
    variation_strength: NotRequired[Annotated[float, Field(gt=0, le=1)]]
    variation_seed: NotRequired[Seed]
    interpolate_to: NotRequired[Target]
    attributes: NotRequired[Annotated[dict[str, Slid], Field(description="sliders")]]
    candidates: NotRequired[Annotated[int, Field(ge=1, le=32)]]
    balance: NotRequired[Literal[True]]
    preview_every_s: NotRequired[Annotated[float, Field(ge=0.1, le=60)]]


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
Slid = Annotated[float, Field(ge=-2, le=2)]


class Nearest(TypedDict):
    """How near an image is to the nearest training picture, in coarse composition and colour."""

    percentile: Annotated[
        float, Field(ge=0, le=100, description="share of photographs of unseen people that are nearer to one")]
    too_close: bool


class Findings(TypedDict):
    """What is known of a finished image alone. What the judge would say is null where the model has none."""

    attributes: NotRequired[Annotated[
        dict[str, Share] | None, Field(description="CelebA's name -> how probable, by the bundled judge")]]
    agreement: NotRequired[Annotated[
        dict[str, Share] | None,
        Field(description="how far the image agrees with each attribute that its prompt states, rare ones weighed as "
              "if they were as likely as not")]]
    adherence: NotRequired[Annotated[
        Share | None, Field(description="mean of `agreement`; null where the prompt states nothing")]]
    evaluations: NotRequired[Annotated[
        int, Field(ge=0, description="how often the network was asked: steps x passes; sliders add two passes each")]]
    nearest: NotRequired[Annotated[
        Nearest | None, Field(description="against the pictures that the model learned from; null without an index")]]
    prompt: NotRequired[Annotated[
        str, Field(description="what was drawn, where `balance` put words before the prompt of the job")]]


FINDINGS = tuple(Findings.__annotations__)


class Update(Findings):
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
    last_event_id: Annotated[int, Field(ge=1, description="where to go on listening")]


class JobImage(TypedDict):
    """A finished picture of a job."""

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


class StatusNews(TypedDict):
    """The job is in this state now."""

    status: State
    error: Failure | None
    queue_position: NotRequired[Annotated[int, Field(ge=1)]]
    restarted: NotRequired[Annotated[bool, Field(description="the server was started again, and the job begins anew")]]


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


class StepImage(TypedDict):
    """An image as it was predicted at one step, or finished."""

    index: Annotated[int, Field(ge=0, le=7)]
    t: Count
    total_t: Count
    thumbnail: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})]


class StepsAnswer(TypedDict):
    """All images of a job that are kept, in the order in which they were predicted."""

    steps: list[StepImage]


# ---- latents and pictures --------------------------------------------------------------------------------------------


class Encoded(TypedDict):
    """A picture as a latent."""

    latent: Latent64
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    warnings: NotRequired[Annotated[list[str], Field(description="what of a prompt was not read, where there is any")]]


class WatermarkFinding(TypedDict):
    """Whether the pixels carry the mark of pictures drawn here, by this server or another."""

    found: bool
    score: Annotated[float, Field(ge=0, description="standard deviations above what pictures without it give")]
    p_value: Annotated[float, Field(ge=0, le=1, description="how probable the score is for a picture without it")]


class StepLatent(TypedDict):
    """The latent of one image at one step: with `start_timestep` = t / total_t another request goes on from here."""

    latent: Latent64
    index: Annotated[int, Field(ge=0, le=7)]
    seed: Seed
    t: Count
    total_t: Count


class Inspection(TypedDict):
    """What a picture says about how it came about: in its file, and where that is lost, in its pixels."""

    made_here: Annotated[bool, Field(description="it carries the request that this project writes into its pictures")]
    request: Annotated[dict[str, Any] | None, Field(description="body of POST /text_to_image that draws it again")]
    model_hash: str | None
    model_matches: Annotated[bool, Field(description="the loaded model is the one that drew it")]
    watermark: WatermarkFinding


class Verdict(TypedDict):
    """A picture beside what its receipt draws. Differences are in grey levels of 255."""

    job_id: JobId
    verdict: Annotated[
        Literal["exact", "visually_equal", "different"],
        Field(description="equal in every pixel, within both bounds, or neither")]
    mean_difference: Annotated[float, Field(ge=0, le=255)]
    max_difference: Annotated[int, Field(ge=0, le=255)]
    mean_bound: float
    max_bound: int
    size_changed: Annotated[bool, Field(description="the picture had another size and was resized to be compared")]


# ---- prompts ---------------------------------------------------------------------------------------------------------


class PromptWord(TypedDict):
    """A word of the prompt, where it stands (in code points), and whether the model was trained on it; `unread` is one
    behind the end of what the text encoder reads."""

    text: str
    start: Count
    end: Count
    status: Literal["known", "rare", "unknown", "unread"]
    suggestion: Annotated[str | None, Field(description="the nearest word that the model knows")]


class PromptClaim(TypedDict):
    """Which part of the prompt (in code points) says that an attribute is there or is not."""

    attribute: str
    value: bool
    start: Count
    end: Count


class OpenFacet(TypedDict):
    """Something that the prompt does not decide: the attributes that would, and what it can be."""

    name: Literal["sex", "age", "hair_colour"]
    attributes: list[str]
    choices: list[str]


class AnalysisAnswer(TypedDict):
    """What was understood of a prompt, as far as the text encoder reads it."""

    attributes: dict[str, bool]
    heard: Annotated[str, Field(description="the words that are encoded: denials that the model does not follow are "
                                            "left out, facts that it overlooks are said again")]
    open: Annotated[list[OpenFacet], Field(description="what the prompt leaves open and `balance` would go round")]
    words: list[PromptWord]
    claims: list[PromptClaim]
    contradictions: list[str]
    warnings: list[str]


class PromptPhrase(TypedDict):
    """A phrase that says that an attribute is there or is not."""

    text: str
    attribute: str
    value: bool


class VocabularyAnswer(TypedDict):
    """The words of the captions that the model was trained on, and what can be said with them, the commonest first."""

    words: dict[str, Literal["known", "rare"]]
    phrases: list[PromptPhrase]
    attributes: list[str]


class SurpriseAnswer(TypedDict):
    """A prompt like the captions that the model was trained on."""

    prompt: Annotated[str, Field(max_length=500)]


# ---- the server ------------------------------------------------------------------------------------------------------


class FieldOptions(TypedDict):
    """What one field of a request accepts."""

    type: Literal["string", "integer", "number", "object", "boolean"]
    default: str | float | bool | None
    description: str
    minimum: NotRequired[float]
    maximum: NotRequired[float]
    max_length: NotRequired[int]
    choices: NotRequired[list[str]]
    long_default: NotRequired[Annotated[str, Field(description="the default with more than `long_above` steps")]]
    long_above: NotRequired[int]
    one_pass: NotRequired[Annotated[list[float] | None, Field(
        description="guidance scales, from and to, of one pass a step where no negative_prompt is given")]]


class ModelOptions(TypedDict):
    """A model that can be asked for."""

    name: str
    hash: str
    device: str
    engine: Annotated[str, Field(description="what computes the networks, and how precisely")]
    image_size: Annotated[int, Field(ge=1)]
    latent_shape: Annotated[list[int], Field(min_length=3, max_length=3)]


class QualityOptions(TypedDict):
    """A name for a number of steps."""

    name: str
    steps: Annotated[int, Field(ge=1, le=1000)]
    within: Annotated[float | None, Field(
        description="the fewest steps whose measured distance to real faces is within this share of the best; null "
                    "where that was not measured")]
    default: Annotated[bool, Field(description="what the page begins with")]


class StepQuality(TypedDict):
    """How near to real faces the pictures drawn with a number of steps were measured to be."""

    steps: Annotated[int, Field(ge=1, le=1000)]
    frechet_over_floor: Annotated[float, Field(description="by the judge; 1 is as near as other real faces are")]


class SliderResponse(TypedDict):
    """What a slider was measured to do at -2, -1, 0, 1 and 2, on the mean over several people."""

    curve: Annotated[list[Share], Field(description="how probable its attribute is, by the judge")]
    evidence: Annotated[list[float], Field(description="the same as log-odds above those of the training set")]
    identity: Annotated[list[float], Field(description="distance from the person at 0; 1 is somebody else")]
    monotone: bool
    moved: Annotated[dict[str, float], Field(description="attributes that move too, by so much from end to end")]


class SliderOptions(TypedDict):
    """A slider of `attributes`: what stands beside it, its neighbours, what is said at its ends, what it does."""

    name: str
    label: str
    group: str
    less: str
    more: str
    response: Annotated[SliderResponse | None, Field(description="null where these weights were not measured")]


class LimitOptions(TypedDict):
    """What the server accepts at most."""

    body_bytes: int
    draw_body_bytes: Annotated[int, Field(description="of POST /text_to_image, with pictures")]
    mask_bytes: int
    image_bytes: int
    image_pixels: int


class OptionsAnswer(TypedDict):
    """Limits, defaults, samplers, models, examples. Models and samplers are empty until the model is loaded."""

    state: ServerState
    failure: Annotated[str | None, Field(description="why the model could not be loaded")]
    watermark: Annotated[bool, Field(description="finished pictures carry an invisible mark, see /inspect")]
    fields: dict[str, FieldOptions]
    aliases: Annotated[dict[str, str], Field(description="other name -> field")]
    samplers: list[str]
    few_steps: Annotated[dict[str, int], Field(description="samplers made for few steps -> how many, if not asked for")]
    models: list[ModelOptions]
    quality: list[QualityOptions]
    step_curve: Annotated[list[StepQuality], Field(description="what more steps buy; empty where it was not measured")]
    examples: list[str]
    attributes: Annotated[list[SliderOptions], Field(description="all sliders, neighbours together")]
    limits: LimitOptions
    seconds_per_image_step: Annotated[float | None, Field(description="measured here: median of the latest steps")]


class StepCost(TypedDict):
    """What one step of the network was measured to take here."""

    rows: Annotated[int, Field(ge=1, description="that the step computed, for all jobs together: an image has one, two "
                                                 "where guidance takes two passes, and two more a slider")]
    seconds: Annotated[float, Field(ge=0)]


class WorkAhead(TypedDict):
    """A job that runs or waits."""

    rows: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=0, description="that are left to do")]


class SpeedAnswer(TypedDict):
    """From this a client estimates how long a job will take: jobs step together, so their rows add up."""

    step_costs: Annotated[list[StepCost], Field(description="medians, fewest rows first; empty before the first step")]
    seconds_per_picture: Annotated[float, Field(ge=0, description="to finish an image after its last step")]
    ahead: list[WorkAhead]


class Health(TypedDict):
    """The process answers."""

    status: Literal["ok"]


class JobCounts(TypedDict):
    """How many jobs wait, run, and are finished but still kept."""

    waiting: Count
    running: Count
    finished: Count


class Ready(TypedDict):
    """The model is loaded."""

    state: Literal["READY"]
    model: str
    device: str
    engine: Annotated[str, Field(description="what computes the networks, and how precisely")]
    jobs: JobCounts
