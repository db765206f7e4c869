"""What may a client ask for?

The bodies and queries of the requests as pydantic schemas: names, types, defaults and ranges stand here and nowhere
else. The messages of a refused request, `GET /options` and through it the web page, and the OpenAPI document are read
from them. This file does not know what happens to a valid request, and never imports torch.

Schemas: https://docs.pydantic.dev/latest/concepts/models/. Latents as files: https://numpy.org/neps/nep-0001-npy-format.html
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from core.engine import EngineInfo
from core.ledger import TRANSITIONS
from core.pictures import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS
from core.web import bad_field, bounds, shown

MAX_BODY_BYTES = 2**20  # eight latents are 175 kB as base64
MAX_IMAGE_TEXT = 4 * -(-MAX_PICTURE_BYTES // 3)  # characters of the largest picture in base64
MAX_IMAGE_BODY_BYTES = MAX_IMAGE_TEXT + 1024  # with the JSON around it
MAX_SEED = 2**53 - 1  # the largest integer that JavaScript holds exactly
MAX_LATENT_VALUE = 1e3
PRINTABLE = r"^[^\x00-\x08\x0B\x0C\x0E-\x1F\x7F]*$"

ALIASES = {
    "num_images": "n_images",
    "steps": "n_inf_steps",
    "num_inference_steps": "n_inf_steps",
    "cfg_scale": "guidance_scale",
    "sampler_name": "sampler",
    "denoising_strength": "strength",
}
UNAVAILABLE = ("init_image", "strength", "mask", "attributes")  # promised fields that no present model can serve
QUALITY = (("Draft", 25), ("Fast", 50), ("Balanced", 150), ("Best", 500))
EXAMPLES = (  # only words that the captions use, so that a first try shows what the model can do
    "a smiling young woman with wavy blond hair",
    "old bald man with a beard and glasses, no smile",
    "portrait of a young man with black hair and a goatee",
    "a woman with brown hair, bangs and heavy makeup",
    "a serious woman with black hair, not smiling",
    "a smiling middle-aged man wearing a necktie",
)
STATE_NAMES = "|".join(TRANSITIONS)


# ---- values ----------------------------------------------------------------------------------------------------------


def no_control_characters(value: str | None, info: ValidationInfo) -> str | None:
    if value is not None and not re.fullmatch(PRINTABLE, value):
        raise bad_field(info.field_name, "must not contain control characters")
    return value


def decode_base64(text: str, field: str, wanted: str = "must be base64") -> bytes:
    """Strict base64, without line breaks. Raises a validation error that begins with `wanted`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_field(field, f"{wanted}; got {shown(text)}") from error


def check_latent(latent: np.ndarray, field: str) -> np.ndarray:
    if not np.isfinite(latent).all() or float(np.abs(latent).max()) > MAX_LATENT_VALUE:
        raise bad_field(field, "must hold finite numbers between -1000 and 1000")
    return latent


def decode_latent(text: str, shape: tuple[int, ...], field: str) -> np.ndarray:
    """Base64 of little-endian float32 -> array of `shape`."""
    num_bytes = 4 * int(np.prod(shape))
    wanted = f"must be base64 of {num_bytes} bytes: float32 of shape {list(shape)}"
    raw = decode_base64(text, field, wanted)
    if len(raw) != num_bytes:
        raise bad_field(field, f"{wanted}; got {len(raw)} bytes")
    return check_latent(np.frombuffer(raw, "<f4").reshape(shape), field)


def read_npy(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a .npy file that must hold float32 of exactly `shape`.

    The header is read first and alone: `np.load` would make room for whatever size it claims.
    Raises ValueError with a sentence for anything else, pickled objects included.
    """
    file = io.BytesIO(content)
    wanted = f"must be a .npy file with float32 of shape {list(shape)}"
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        read_header = readers[np.lib.format.read_magic(file)]
        found, fortran, kind = read_header(file, max_header_size=1024)  # type: ignore[call-arg]
    except Exception as error:  # numpy's parser of headers was not made for strangers: it raises whatever comes up
        raise ValueError(f"{wanted}; got {len(content)} bytes that are none") from error
    if found != shape or fortran or kind != np.dtype("<f4"):
        raise ValueError(f"{wanted}, C order; got {kind} of shape {list(found)}{', Fortran order' * fortran}")
    data = file.read()
    if len(data) != 4 * int(np.prod(shape)):
        raise ValueError(f"{wanted}; its header is followed by {len(data)} bytes")
    latent = np.frombuffer(data, "<f4").reshape(shape)
    if not np.isfinite(latent).all() or float(np.abs(latent).max()) > MAX_LATENT_VALUE:
        raise ValueError("must hold finite numbers between -1000 and 1000")
    return latent


Base64Latent = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64", "format": "latent"})]
Latents = Annotated[list[Base64Latent], Field(json_schema_extra={"minItems": 1, "maxItems": 8})]
Base64Image = Annotated[
    str, Field(max_length=MAX_IMAGE_TEXT, json_schema_extra={"contentEncoding": "base64", "format": "image"})
]
Prompt = Annotated[str, Field(max_length=500, json_schema_extra={"pattern": PRINTABLE})]


# ---- bodies ----------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """What all bodies share: nothing is converted, nothing unknown is accepted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def describe_text_to_image(schema: dict[str, Any]) -> None:
    """What a JSON Schema says beside the fields: the other names, and the fields that only null may have."""
    schema["properties"] |= {
        name: {"type": "null", "description": "Not available with this model: leave it out or send null."}
        for name in UNAVAILABLE
    }
    schema["if"] = {"required": ["start_timestep"], "properties": {"start_timestep": {"exclusiveMinimum": 0}}}
    schema["then"] = {"required": ["latent"], "properties": {"latent": {"type": ["string", "array"]}}}
    schema["examples"] = [
        {"prompt": EXAMPLES[0], "n_images": 2, "n_inf_steps": 50, "seed": 7},
        {"prompt": EXAMPLES[1], "guidance_scale": 3.5, "negative_prompt": "blurry", "stream_freq": 10},
    ]
    schema["description"] = "\n\n".join((
        "What to draw.",
        "Other names: " + ", ".join(f"`{alias}` for `{name}`" for alias, name in ALIASES.items()) + ".",
    ))


class TextToImage(Body):
    """Body of POST /text_to_image."""

    model_config = ConfigDict(json_schema_extra=describe_text_to_image)
    prompt: Prompt = Field(description="what to draw; empty draws without a condition")
    n_images: int = Field(4, ge=1, le=8, description="images in this job")
    n_inf_steps: int = Field(500, ge=1, le=1000, description="denoising steps")
    stream_freq: int = Field(50, ge=1, le=1000, description="an update every this many steps")
    latent: Base64Latent | Latents | None = Field(
        None, description="start from these latents instead of noise: one, or a list of n_images")
    start_timestep: float = Field(0.0, ge=0, le=1, description="share of the schedule to skip; above 0 needs a latent")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="image i uses seed + i; drawn when left out")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="1 = off, 0 = unconditional")
    negative_prompt: Prompt = Field("", description="steer away from this")
    sampler: str | None = Field(None, description="how the noise is removed")
    model: str | None = Field(None, description="which model draws")

    _printable = field_validator("prompt", "negative_prompt")(no_control_characters)

    @field_validator("sampler", "model")
    @classmethod
    def _listed(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Names come from a list and are never looked up anywhere else; case does not matter."""
        engine = cast(EngineInfo, info.context)
        names = engine.samplers if info.field_name == "sampler" else (engine.name,)
        known = {name.lower(): name for name in names}
        if value is None or value.lower() in known:
            return value and known[value.lower()]
        raise bad_field(info.field_name, f"must be one of {', '.join(names)}; got {shown(value)}")

    @field_validator("latent", mode="before")
    @classmethod
    def _decodes(cls, value: Any, info: ValidationInfo) -> Any:
        shape = cast(EngineInfo, info.context).latent_shape
        for position, text in enumerate(value[:8] if isinstance(value, list) else [value]):
            if isinstance(text, str):
                decode_latent(text, shape, f"latent/{position}" if isinstance(value, list) else "latent")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TextToImage:
        if isinstance(self.latent, list) and len(self.latent) != self.n_images:
            wanted = f"must be one latent or a list of n_images = {self.n_images}"
            raise bad_field("latent", f"{wanted}; got {len(self.latent)}")
        if self.start_timestep > 0 and self.latent is None:
            raise bad_field("start_timestep", "needs a latent to start from: send one, or leave start_timestep at 0")
        return self


class AnalyzePrompt(Body):
    """Body of POST /prompt/analyze."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": EXAMPLES[0]}]})
    prompt: Prompt = Field(description="what to draw")

    _printable = field_validator("prompt")(no_control_characters)


class GiveImage(Body):
    """A picture inside JSON: body of POST /encode and POST /inspect."""

    image: Base64Image = Field(description="a PNG, JPEG or WebP file of at most "
                               f"{MAX_PICTURE_BYTES} bytes and {MAX_PICTURE_PIXELS} pixels, as base64")

    @field_validator("image")
    @classmethod
    def _decodes(cls, value: str) -> str:
        decode_base64(value, "image")
        return value

    @property
    def content(self) -> bytes:
        return base64.b64decode(self.image)


class GiveLatent(Body):
    """A latent inside JSON: body of POST /decode."""

    latent: Base64Latent = Field(description="little-endian float32 in C order, as base64")

    @field_validator("latent")
    @classmethod
    def _decodes(cls, value: str, info: ValidationInfo) -> str:
        decode_latent(value, cast(EngineInfo, info.context).latent_shape, "latent")
        return value


# ---- queries ---------------------------------------------------------------------------------------------------------


class Query(BaseModel):
    """What all queries share."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class JobQuery(Query):
    """Query of GET /jobs/{job_id}/."""

    include: Literal["none", "preview", "full"] = Field(
        "full", description="heavy fields of `response`: none, `img` alone, or `img` and `latent`")


class EventsQuery(Query):
    """Query of GET /jobs/{job_id}/events."""

    after: int = Field(0, ge=0, le=999_999_999, description="as the header Last-Event-ID, which counts more")


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
    q: str | None = Field(None, min_length=1, max_length=200, description="only jobs whose prompt contains this",
                          json_schema_extra={"pattern": PRINTABLE})

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


# ---- what the schemas say to others ----------------------------------------------------------------------------------


def name_choices(schemas: dict[str, Any], info: EngineInfo) -> None:
    """Write into the JSON Schemas what depends on the loaded model: its samplers, its name, the size of a latent."""
    length = 4 * -(-4 * int(np.prod(info.latent_shape)) // 3)
    fields = schemas["TextToImage"]["properties"]
    for name, choices in (("sampler", info.samplers), ("model", (info.name,))):
        fields[name]["anyOf"] = [{"type": "string", "enum": list(choices)}, {"type": "null"}]
    one, many, _ = fields["latent"]["anyOf"]
    for latent in (one, many["items"], schemas["GiveLatent"]["properties"]["latent"]):
        latent |= {"minLength": length, "maxLength": length}


def options(info: EngineInfo | None) -> dict[str, Any]:
    """Limits, defaults, samplers, models, examples: everything the page would otherwise repeat."""
    fields = {
        name: {**bounds(TextToImage, name), "default": None if field.is_required() else field.default,
               "description": field.description}
        for name, field in TextToImage.model_fields.items()
    }
    models = []
    if info is not None:
        fields["guidance_scale"]["default"] = info.default_guidance_scale
        fields["sampler"] |= {"default": info.default_sampler, "choices": list(info.samplers)}
        fields["model"] |= {"default": info.name, "choices": [info.name]}
        models = [{"name": info.name, "hash": info.model_hash, "device": info.device, "image_size": info.image_size,
                   "latent_shape": list(info.latent_shape)}]
    return {
        "fields": fields,
        "aliases": ALIASES,
        "samplers": list(info.samplers) if info else [],
        "models": models,
        "quality": [{"name": name, "steps": steps} for name, steps in QUALITY],
        "examples": list(EXAMPLES),
        "unavailable": {name: "not available with this model" for name in UNAVAILABLE},
        "limits": {
            "body_bytes": MAX_BODY_BYTES,
            "image_bytes": MAX_PICTURE_BYTES,
            "image_pixels": MAX_PICTURE_PIXELS,
        },
    }
