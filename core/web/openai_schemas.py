"""What do clients of OpenAI's images API ask for, and what do they expect to get?

The bodies and answers of the routes under `/v1`, named as that API names them, with the ranges of this server; and
fields of this server that such clients can send beside them. This file does not know routes or jobs.
The API: https://platform.openai.com/docs/api-reference/images
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Json, ValidationInfo, field_validator
from typing_extensions import NotRequired, TypedDict

from core.engine import usual_strength
from core.imaging.file_sanitizer import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS
from core.web.errors import ErrorShape
from core.web.requests import MAX_SEED, Body, Prompt, no_control_characters
from core.web.responses import JobId, Picture64, Seed
from core.web.validation import bad_field

QUALITIES = {"low": "Draft", "medium": "Fast", "high": "Fine"}  # their names -> those of core.web.requests.QUALITY
SAME_QUALITY = {None: "medium", "auto": "medium", "standard": "medium", "hd": "high", "xhigh": "high", "max": "high"}
USUAL_COUNT = 1


# ---- bodies ----------------------------------------------------------------------------------------------------------


class ImageBody(Body):
    """What both kinds of drawing share."""

    prompt: Prompt = Field(description="what to draw")
    model: str | None = Field(None, max_length=100, description="the id in /v1/models; the loaded one when left out")
    n: int | None = Field(USUAL_COUNT, ge=1, le=8, description="images")
    size: str | None = Field(
        None, max_length=11, json_schema_extra={"pattern": "^(auto|[0-9]{1,5}x[0-9]{1,5})$"},
        description="the model draws its own size, which the answer tells")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="steps: low the fewest, medium when left out, high and above the most")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json when left out; a url needs the key too, where there is one")
    output_format: Literal["png"] | None = Field(None, description="PNG, which says in its text what it is")
    background: Literal["auto", "opaque"] | None = Field(None, description="never transparent")
    stream: bool | None = Field(False, description="answer with events, the images as they are drawn first")
    partial_images: int | None = Field(0, ge=0, le=3, description="with stream: how many times before the end")
    output_compression: int | None = Field(None, ge=0, le=100, description="changes nothing: PNG loses nothing")
    moderation: Literal["auto", "low"] | None = Field(None, description="changes nothing")
    user: str | None = Field(None, max_length=500, description="changes nothing")
    safety_identifier: str | None = Field(None, max_length=500, description="changes nothing")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="of this server: image i uses seed + i")
    negative_prompt: Prompt = Field("", description="of this server: steer away from this")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="of this server: 1 = off, 0 = unconditional")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="of this server: instead of quality")

    _printable = field_validator("prompt", "negative_prompt")(no_control_characters)

    @field_validator("size")
    @classmethod
    def _is_size(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not re.fullmatch("auto|[0-9]{1,5}x[0-9]{1,5}", value):
            raise bad_field(info.field_name, "must be auto or WIDTHxHEIGHT, such as 1024x1024")
        return value


class ImageGeneration(ImageBody):
    """Body of POST /v1/images/generations."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"prompt": "a smiling young woman with wavy blond hair", "n": 2, "size": "1024x1024"}]})

    style: Literal["vivid", "natural"] | None = Field(None, description="changes nothing: they are photographs")


def describe_form(schema: dict[str, Any]) -> None:
    """A form has no null: what is not wanted is left out."""
    for field in schema["properties"].values():
        for one in field.pop("anyOf", ()):
            field |= one if one["type"] != "null" else {}
        if field.get("default", "") is None:
            del field["default"]


class ImageEdit(ImageBody):
    """Form of POST /v1/images/edits."""

    model_config = ConfigDict(json_schema_extra=describe_form)

    image: bytes = Field(
        description=f"a PNG, JPEG or WebP file of at most {MAX_PICTURE_BYTES} bytes and "
        f"{MAX_PICTURE_PIXELS} pixels, the middle square of which is changed; also as image[]")
    mask: bytes | None = Field(
        None, description="a PNG as large as the image: where it is transparent, the "
        "image is drawn anew")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="changes nothing: see strength")
    strength: float | None = Field(
        None, ge=0, le=1, description="of this server: how much of the image changes; "
        f"{usual_strength(False):g} when left out, {usual_strength(True):g} with a mask")


IGNORED = ("style", "output_compression", "moderation", "input_fidelity")  # what such a client may expect an effect of


# ---- answers ---------------------------------------------------------------------------------------------------------


class OpenAiErrorDetail(TypedDict):
    """What went wrong: a sentence, its kind, the field, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiError(TypedDict):
    """Every error under /v1 has this shape."""

    error: OpenAiErrorDetail


class OpenAiImage(TypedDict):
    """One image, as base64 or as an address."""

    b64_json: NotRequired[Picture64]
    url: NotRequired[Annotated[str, Field(json_schema_extra={"format": "uri"})]]
    seed: Annotated[Seed, Field(description="of this server: draws the image again")]


class OpenAiTokens(TypedDict):
    """Nothing is counted here."""

    input_tokens: Literal[0]
    output_tokens: Literal[0]
    total_tokens: Literal[0]
    input_tokens_details: dict[str, int]


class OpenAiImages(TypedDict):
    """The images. `size` and `quality` are those that there are; `warnings` say what was not done as asked."""

    created: int
    data: list[OpenAiImage]
    size: str
    quality: Literal["low", "medium", "high"]
    background: Literal["opaque"]
    output_format: Literal["png"]
    job_id: Annotated[JobId, Field(description="of this server: the job is at /jobs/{job_id}/")]
    warnings: list[str]


class OpenAiStreamData(TypedDict):
    """One image as it is at this moment, or at last."""

    type: Literal["image_generation.partial_image", "image_generation.completed", "image_edit.partial_image",
                  "image_edit.completed"]
    b64_json: Picture64
    created_at: int
    size: str
    quality: Literal["low", "medium", "high"]
    background: Literal["opaque"]
    output_format: Literal["png"]
    partial_image_index: NotRequired[Annotated[int, Field(ge=0, le=2)]]
    usage: NotRequired[OpenAiTokens]
    seed: Seed
    job_id: JobId


class OpenAiImageEvent(TypedDict):
    """Server-Sent Event with an image."""

    event: Literal["image_generation.partial_image", "image_generation.completed", "image_edit.partial_image",
                   "image_edit.completed"]
    data: Json[OpenAiStreamData]


class OpenAiErrorEvent(TypedDict):
    """Server-Sent Event `error`: there will be no more images."""

    event: Literal["error"]
    data: Json[OpenAiError]


OpenAiStreamEvent = OpenAiImageEvent | OpenAiErrorEvent


class OpenAiModel(TypedDict):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAiModels(TypedDict):
    """The models: the one that is loaded."""

    object: Literal["list"]
    data: list[OpenAiModel]


KINDS = {401: ("invalid_request_error", "invalid_api_key"), 429: ("rate_limit_error", "rate_limit_exceeded")}
FIELDS = {"n_images": "n", "n_inf_steps": "num_inference_steps", "init_image": "image"}  # ours -> theirs
MODEL_NOT_FOUND = "model_not_found"


def openai_error(problem: Mapping[str, Any]) -> OpenAiError:
    """A problem document as that API writes it."""
    status, wrong = problem["status"], problem.get("errors", ())
    usual = ("server_error", None) if status >= 500 else ("invalid_request_error", None)
    kind, code = KINDS.get(status, usual)
    message, param = problem["detail"], None
    if wrong:
        named = [(field_of(one["pointer"]), one["message"]) for one in wrong]
        param = named[0][0] or None
        message = "; ".join(f"{name or 'body'}: {text}" for name, text in named)
    return OpenAiError(error=OpenAiErrorDetail(message=message, type=kind, param=param or problem.get("param"),
                                               code=problem.get("code", code)))


def field_of(pointer: str) -> str:
    """`#/n_images` -> "n", the name that such a client uses."""
    name = pointer.lstrip("#?/").partition("/")[0]
    return FIELDS.get(name, name)


def ignored_warnings(asked: ImageBody, size: int) -> Sequence[str]:
    """What of a request is not done as it was asked for."""
    found = [f"{name} changes nothing here." for name in IGNORED if getattr(asked, name, None) is not None]
    if asked.size not in (None, "auto", f"{size}x{size}"):
        found.insert(0, f"The size is {size}x{size}, the nearest to {asked.size} that the model draws.")
    return found


OPENAI_ERRORS = ErrorShape(OpenAiError, openai_error, invalid=400)
