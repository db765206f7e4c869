"""What does a client get, of prompts and of the server itself?

What was understood of a prompt, which words there are, what may be asked, how fast it goes, whether the model is
loaded. It does not know routes, status codes or headers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from core.web.aliases import older_name_of
from core.web.responses import Count, ServerState, Share

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
    encoded_prompt: Annotated[str, Field(description="the words that are encoded: denials that the model does not "
                                                     "follow are dropped, facts that it overlooks are appended")]
    heard: Annotated[str, older_name_of("encoded_prompt")]
    open: Annotated[
        list[OpenFacet], Field(description="what the prompt leaves open and `attribute_balancing` would vary")]
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


Notice = Annotated[str, Field(description="why jobs wait: the broker does not answer, or no worker is there")]


class FieldOptions(TypedDict):
    """What one field of a request accepts."""

    type: Literal["string", "integer", "number", "object", "array", "boolean"]
    default: str | float | bool | None
    description: str
    minimum: NotRequired[float]
    maximum: NotRequired[float]
    max_length: NotRequired[int]
    choices: NotRequired[list[str]]
    long_default: NotRequired[Annotated[str, Field(description="the default with more than `long_above` steps")]]
    long_above: NotRequired[int]
    guidance_range: NotRequired[Annotated[list[float] | None, Field(
        description="guidance scales, from and to, of one pass a step where no negative_prompt is given")]]
    one_pass: NotRequired[Annotated[list[float] | None, older_name_of("guidance_range")]]


class ModelOptions(TypedDict):
    """A model that can be asked for."""

    name: str
    hash: str
    device: str
    engine: Annotated[str, Field(description="what computes the networks, and how precisely")]
    image_size: Annotated[int, Field(ge=1)]
    latent_shape: Annotated[list[int], Field(min_length=3, max_length=3)]
    kind: Annotated[str, Field(description="faces: one of ours; stable-diffusion: other people's weights")]
    lacks: Annotated[list[str], Field(description="fields of a request that it cannot follow; vocabulary: it was "
                                                  "not trained on our captions")]
    loaded: Annotated[bool, Field(description="it generates at once; others are loaded when a job names them")]
    failure: Annotated[str | None, Field(description="why it could not be loaded when that was last tried")]


class FailedModel(TypedDict):
    """A model that was given to the server and cannot be used."""

    name: str
    failure: str


class QualityOptions(TypedDict):
    """A name for a number of steps."""

    name: str
    steps: Annotated[int, Field(ge=1, le=1000)]
    within: Annotated[float | None, Field(
        description="the fewest steps whose measured distance to real faces is within this share of the best; null "
                    "where that was not measured")]
    default: Annotated[bool, Field(description="what the page begins with")]


class StepQuality(TypedDict):
    """How near to real faces the images generated with a number of steps were measured to be."""

    steps: Annotated[int, Field(ge=1, le=1000)]
    frechet_over_floor: Annotated[
        float, Field(description="by the attribute classifier; 1 is as near as other real faces are")
    ]


class SliderResponse(TypedDict):
    """What a slider was measured to do at -2, -1, 0, 1 and 2, on the mean over several people."""

    curve: Annotated[list[Share], Field(description="how probable its attribute is, by the attribute classifier")]
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
    generation_body_bytes: Annotated[int, Field(description="of POST /text_to_image, with images")]
    draw_body_bytes: Annotated[int, older_name_of("generation_body_bytes")]
    mask_bytes: int
    image_bytes: int
    image_pixels: int


class OptionsAnswer(TypedDict):
    """Limits, defaults, samplers, models, examples. Models and samplers are empty until the model is loaded."""

    state: ServerState
    failure: Annotated[str | None, Field(description="why the model could not be loaded")]
    watermark: Annotated[bool, Field(description="finished images carry an invisible mark, see /inspect")]
    fields: dict[str, FieldOptions]
    aliases: Annotated[dict[str, str], Field(description="other name -> field")]
    samplers: list[str]
    few_steps: Annotated[dict[str, int], Field(description="samplers made for few steps -> how many, if not asked for")]
    models: list[ModelOptions]
    failed_models: Annotated[list[FailedModel], Field(description="given to the server, but nothing that generates")]
    loading: NotRequired[Annotated[str, Field(description="a model that is being loaded now")]]
    notice: NotRequired[Notice]
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
    seconds_per_image: Annotated[float, Field(ge=0, description="to finish an image after its last step")]
    seconds_per_picture: Annotated[float, older_name_of("seconds_per_image"), Field(ge=0)]
    ahead: list[WorkAhead]


class Health(TypedDict):
    """The process answers."""

    status: Literal["ok"]
    notice: NotRequired[Notice]


class JobCounts(TypedDict):
    """How many jobs wait, run, and are finished but still kept."""

    waiting: Count
    running: Count
    finished: Count


class WorkerAnswer(TypedDict):
    """A worker on another machine."""

    name: str
    device: str
    engine: str
    takes_jobs: Annotated[bool, Field(description="false: it has other models than this server")]
    jobs: Annotated[int, Field(ge=0, description="under way there")]
    images: Count
    max_batch: Annotated[int, Field(ge=1, description="images of one step")]
    steps_per_second: Annotated[float, Field(ge=0, description="over the last ten seconds")]
    ended: Annotated[int, Field(ge=0, description="jobs since it started")]
    models: Annotated[dict[str, str], Field(description="name -> the beginning of its hash")]


class Ready(TypedDict):
    """The model is loaded."""

    state: Literal["READY"]
    loading: NotRequired[Annotated[str, Field(description="a model that is being loaded now")]]
    model: str
    device: str
    engine: Annotated[str, Field(description="what computes the networks, and how precisely")]
    jobs: JobCounts
    workers: NotRequired[Annotated[list[WorkerAnswer], Field(description="of a server with --broker")]]
    notice: NotRequired[Notice]
