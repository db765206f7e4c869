"""What may a client ask for?

The bodies and queries of the requests as pydantic schemas: names, types, defaults and ranges stand here and nowhere
else. The messages of a refused request, `GET /options` and through it the web page, and the OpenAPI document are read
from them. This file does not know what happens to a valid request, and never imports torch. Long because each field
stands here once, with all that is said of it.

Schemas: https://docs.pydantic.dev/latest/concepts/models/. Latents as files:
https://numpy.org/neps/nep-0001-npy-format.html
"""

from __future__ import annotations

import base64
import binascii
import difflib
import io
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from core.engine import MANY_STEPS, EngineInfo, usual_sampler, usual_strength
from core.imaging.file_sanitizer import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS
from core.jobs.job import TRANSITIONS
from core.text.attribute_sliders import BY_ANY_CASE, FURTHEST, MOST, sliders
from core.text.prompt_parser import spoken_attributes
from core.web.errors import shown
from core.web.validation import bad_field, bounds

MAX_BODY_BYTES = 2**20  # eight latents are 175 kB as base64
MAX_IMAGE_TEXT = 4 * -(-MAX_PICTURE_BYTES // 3)  # characters of the largest picture in base64
MAX_IMAGE_BODY_BYTES = MAX_IMAGE_TEXT * 17 // 16 + 1024  # lines of 64 end in \r\n, as JSON writes it; and the rest
MAX_MASK_BYTES = 2**20  # two colours need little
MAX_MASK_TEXT = 4 * -(-MAX_MASK_BYTES // 3)
MAX_DRAW_BODY_BYTES = MAX_BODY_BYTES + (MAX_IMAGE_TEXT + MAX_MASK_TEXT) * 17 // 16  # the usual bound for the rest
MAX_ANY_BODY_BYTES = max(MAX_DRAW_BODY_BYTES, MAX_IMAGE_BODY_BYTES)
MAX_SEED = 2**53 - 1  # the largest integer that JavaScript holds exactly
MAX_LATENT_VALUE = 1e3
MAX_CANDIDATES = 32
PRINTABLE = r"^[^\x00-\x08\x0B\x0C\x0E-\x1F\x7F]*$"

ALIASES = {
    "num_images": "n_images",
    "steps": "n_inf_steps",
    "num_inference_steps": "n_inf_steps",
    "cfg_scale": "guidance_scale",
    "sampler_name": "sampler",
    "denoising_strength": "strength",
    "keep": "n_images",
}
QUALITY = (("Draft", 0.20), ("Fast", 0.05), ("Fine", 0.02))  # a name, and how far from the best of the measured curve
START_QUALITY = "Fast"  # what the page begins with
UNMEASURED_QUALITY = {"Draft": 25, "Fast": 50, "Fine": 150}  # where the model brings no curve
PROMISED_STEPS = 500  # the default of n_inf_steps, whatever was measured
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


def unwrapped(value: Any) -> Any:
    """Base64 in one piece: what `base64` prints has lines of 76 characters and ends with one (RFC 2045)."""
    return re.sub(r"[ \t\r\n]+", "", value) if isinstance(value, str) else value


def decode_base64(text: str, field: str, wanted: str = "must be base64") -> bytes:
    """Strict base64, in lines or not. Raises a validation error that begins with `wanted` and ends with the cause."""
    text = unwrapped(text)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_field(field, f"{wanted}; got {shown(text)}: {why_no_base64(text)}") from error


def why_no_base64(text: str) -> str:
    """What is wrong with text that cannot be decoded."""
    if re.match("data:[^,]{0,100},", text):
        return "leave out everything up to the comma"
    if re.match("[a-z]{2,10}:", text):
        return "addresses are not followed"
    strange = re.search("[^A-Za-z0-9+/=]", text)
    if strange is None:
        inner = "=" in text.rstrip("=")
        return "something follows its end" if inner else f"its end is missing, or one character of its {len(text)}"
    if strange[0] in "-_":
        plain = "+" if strange[0] == "-" else "/"
        return f"that is the URL-safe alphabet, write {plain} for {strange[0]}"
    return f"character {strange.start() + 1} is {shown(strange[0])}"


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


Unwrapped = BeforeValidator(unwrapped)  # outermost: lengths count without line breaks
Base64Latent = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64", "format": "latent"}), Unwrapped]
Latents = Annotated[list[Base64Latent], Field(json_schema_extra={"minItems": 1, "maxItems": 8})]
Base64Image = Annotated[
    str, Field(max_length=MAX_IMAGE_TEXT, json_schema_extra={"contentEncoding": "base64", "format": "image"}), Unwrapped
]
Base64Mask = Annotated[
    str, Field(max_length=MAX_MASK_TEXT, json_schema_extra={"contentEncoding": "base64", "format": "mask"}), Unwrapped
]
Prompt = Annotated[str, Field(max_length=500, json_schema_extra={"pattern": PRINTABLE})]
Sliders = Annotated[dict[str, float], Field(json_schema_extra={
    "properties": {name: {"type": "number", "minimum": -FURTHEST, "maximum": FURTHEST}
                   for name in BY_ANY_CASE.values()},
    "additionalProperties": False, "maxProperties": MOST})]


# ---- bodies ----------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """What all bodies share: nothing is converted, nothing unknown is accepted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def given(name: str) -> dict[str, Any]:
    """JSON Schema of an object that has this member, and not as null."""
    return {"type": "object", "required": [name], "properties": {name: {"not": {"type": "null"}}}}


def describe_text_to_image(schema: dict[str, Any]) -> None:
    """What a JSON Schema says beside the fields: the other names, and what goes together."""
    schema["if"] = {"required": ["start_timestep"], "properties": {"start_timestep": {"exclusiveMinimum": 0}}}
    schema["then"] = {"required": ["latent"], "properties": {"latent": {"type": ["string", "array"]}}}
    schema["allOf"] = [
        *({"if": given(name), "then": given("init_image")} for name in ("strength", "mask")),
        {"if": given("init_image"), "then": {"not": {"anyOf": [given("latent"), given("interpolate_to")]}}},
        {"if": given("interpolate_to"), "then": {"properties": {
            "latent": {"not": {"type": "array"}}, "start_timestep": {"const": 0}, "variation_strength": {"const": 0}}}},
        {"if": given("interpolate_to"), "then": {"properties": {"balance": {"const": False}}}},
        {"if": given("candidates"), "then": {"properties": {
            "latent": {"not": {"type": "array"}}, "interpolate_to": {"type": "null"}}}},
        {"if": {**given("interpolate_to"), "properties": {"interpolate_to": given("weight")}},
         "then": {"required": ["n_images"], "properties": {"n_images": {"const": 1}}},
         "else": {"if": given("interpolate_to"), "then": {"properties": {"n_images": {"minimum": 2}}}}},
    ]
    schema["examples"] = [
        {"prompt": EXAMPLES[0], "n_images": 2, "n_inf_steps": 50, "seed": 7},
        {"prompt": EXAMPLES[1], "guidance_scale": 3.5, "negative_prompt": "blurry", "stream_freq": 10},
        {"prompt": EXAMPLES[0], "n_images": 4, "n_inf_steps": 50, "seed": 7, "variation_strength": 0.3},
        {"prompt": EXAMPLES[0], "n_images": 8, "n_inf_steps": 50, "seed": 7, "interpolate_to": {"seed": 8}},
        {"prompt": "a person", "n_inf_steps": 50, "seed": 7, "attributes": {"Smiling": 1.5, "Young": -1}},
        {"prompt": EXAMPLES[1], "n_images": 2, "n_inf_steps": 50, "seed": 7, "candidates": 8},
        {"prompt": "a smiling person", "n_images": 8, "n_inf_steps": 50, "seed": 7, "balance": True},
    ]
    schema["description"] = "\n\n".join((
        "What to draw.",
        "`init_image` is a picture to change, with a `mask` only where that is white. It goes neither with `latent` "
        "nor with `interpolate_to`; that wants one `latent` at most, `start_timestep` 0, `variation_strength` 0, and "
        "at least 2 images or a `weight` and 1 image.",
        "Other names: " + ", ".join(f"`{alias}` for `{name}`" for alias, name in ALIASES.items()) + ".",
    ))


def describe_target(schema: dict[str, Any]) -> None:
    """Something must be given to lead to, and one noise at most."""
    schema["anyOf"] = [given(name) for name in ("prompt", "seed", "latent")]
    schema["not"] = {"allOf": [given("seed"), given("latent")]}


class InterpolateTo(Body):
    """Where a row of pictures leads: from the noise and the prompt of the request to these."""

    model_config = ConfigDict(json_schema_extra=describe_target)

    prompt: Prompt | None = Field(None, description="the prompt at the end; the same when left out")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="the seed of the noise at the end")
    latent: Base64Latent | None = Field(None, description="the noise at the end")
    weight: float | None = Field(
        None, ge=0, le=1, description="draw one image only, at this share of the way; else image i of n is at i/(n-1)")

    _printable = field_validator("prompt")(no_control_characters)

    @field_validator("latent")
    @classmethod
    def _decodes(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            decode_latent(value, cast(EngineInfo, info.context).latent_shape, "latent")
        return value

    @model_validator(mode="after")
    def _leads_somewhere(self) -> InterpolateTo:
        if self.prompt is None and self.seed is None and self.latent is None:
            raise bad_field("", "needs a prompt, a seed or a latent to lead to")
        if self.seed is not None and self.latent is not None:
            raise bad_field("latent", "cannot be given together with a seed: both say which noise is at the end")
        return self


class TextToImage(Body):
    """Body of POST /text_to_image."""

    model_config = ConfigDict(json_schema_extra=describe_text_to_image)
    prompt: Prompt = Field(description="what to draw; empty draws without a condition")
    n_images: int = Field(4, ge=1, le=8, description="images in this job")
    n_inf_steps: int = Field(PROMISED_STEPS, ge=1, le=1000, description="denoising steps")
    stream_freq: int = Field(50, ge=1, le=1000, description="an update every this many steps")
    preview_every_s: float | None = Field(
        None, ge=0.1, le=60, description="beside stream_freq: an update after the first step, and then whenever "
        "so many seconds have passed without one")
    latent: Base64Latent | Latents | None = Field(
        None, description="start from these latents instead of noise: one, or a list of n_images")
    start_timestep: float = Field(0.0, ge=0, le=1, description="share of the schedule to skip; above 0 needs a latent")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="image i uses seed + i; drawn when left out")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="1 = off, 0 = unconditional")
    negative_prompt: Prompt = Field("", description="steer away from this")
    sampler: str | None = Field(None, description="how the noise is removed")
    init_image: Base64Image | None = Field(
        None, description="a picture to change: PNG, JPEG or WebP as base64; its middle square, at the model's size")
    strength: float | None = Field(
        None, ge=0, le=1, description="how much of init_image changes: 0 nothing, 1 all; "
        f"{usual_strength(False):g} when left out, {usual_strength(True):g} with a mask")
    mask: Base64Mask | None = Field(
        None, description="a picture over init_image, as base64: white is drawn anew, black stays as it is")
    variation_strength: float = Field(
        0.0, ge=0, le=1, description="share of other noise, of variation_seed + i, mixed into that of seed")
    variation_seed: int | None = Field(None, ge=0, le=MAX_SEED, description="which other noise; drawn when left out")
    interpolate_to: InterpolateTo | None = Field(
        None, description="lead over the images to another prompt, seed or latent")
    attributes: Sliders | None = Field(
        None, description=f"sliders: CelebA's name of an attribute, in any case, -> -{FURTHEST:g} (away from it) to "
        f"{FURTHEST:g} (towards it); at most {MOST}")
    candidates: int | None = Field(
        None, ge=1, le=MAX_CANDIDATES, description="draw so many, from seed on, and keep the n_images that fit the "
        "prompt best, best first")
    balance: bool = Field(
        False, description="go round what the prompt leaves open (sex, age, hair colour), another combination each"
        " image")
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

    @field_validator("init_image", "mask")
    @classmethod
    def _is_base64(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            decode_base64(value, info.field_name or "")
        return value

    @field_validator("attributes", mode="before")
    @classmethod
    def _known_sliders(cls, value: Any) -> Any:
        """Names in CelebA's own writing. Which member is wrong is said here: pydantic would blame the whole field."""
        if not isinstance(value, dict):
            return value
        if len(value) > MOST:
            raise bad_field("attributes", f"must name at most {MOST} attributes; got {len(value)}")
        found: dict[str, float] = {}
        for name, number in value.items():
            known = BY_ANY_CASE.get(name.lower())
            if known is None:
                close = difflib.get_close_matches(name[:60].lower(), BY_ANY_CASE, n=1)
                hint = f"; did you mean {BY_ANY_CASE[close[0]]}?" if close else "; see attributes at /options"
                raise bad_field("attributes", f"has no attribute {shown(name)}{hint}")
            if known in found:
                raise bad_field("attributes", f"names {known} twice")
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not is_number or not -FURTHEST <= number <= FURTHEST:
                wanted = f"must be a number from -{FURTHEST:g} to {FURTHEST:g}"
                raise bad_field(f"attributes/{name}", f"{wanted}; got {shown(number)}")
            found[known] = float(number)
        return found

    @model_validator(mode="after")
    def _fits_together(self) -> TextToImage:
        if self.candidates is not None:
            if self.candidates < self.n_images:
                wanted = f"must be at least n_images = {self.n_images}"
                raise bad_field("candidates", f"{wanted}; got {self.candidates}")
            if isinstance(self.latent, list) or self.interpolate_to is not None:
                raise bad_field("candidates", "cannot be given together with a list of latents or interpolate_to")
        if self.balance and self.interpolate_to is not None:
            raise bad_field("balance", "must be false together with interpolate_to")
        if isinstance(self.latent, list) and len(self.latent) != self.n_images:
            wanted = f"must be one latent or a list of n_images = {self.n_images}"
            raise bad_field("latent", f"{wanted}; got {len(self.latent)}")
        if self.start_timestep > 0 and self.latent is None:
            raise bad_field("start_timestep", "needs a latent to start from: send one, or leave start_timestep at 0")
        for name, value in (("strength", self.strength), ("mask", self.mask)):
            if value is not None and self.init_image is None:
                raise bad_field(name, "needs an init_image to change")
        if self.init_image is not None and self.latent is not None:
            raise bad_field("init_image", "cannot be given together with latent: both say what to start from")
        if self.interpolate_to is not None:
            self._leads_on(self.interpolate_to)
        return self

    def parameters(self, info: EngineInfo) -> dict[str, Any]:
        """What clients are told: every default filled in, what is random drawn; edits only where there are some."""
        edits = {"latent", "init_image", "strength", "mask", "variation_strength", "variation_seed", "interpolate_to",
                 "attributes", "candidates", "balance", "preview_every_s"}
        usual_steps = {} if "n_inf_steps" in self.model_fields_set else info.few_steps
        found = self.model_dump(exclude=edits) | {
            "n_inf_steps": usual_steps.get(self.sampler or "", self.n_inf_steps),
            "seed": secrets.randbelow(2**32) if self.seed is None else self.seed,  # drawn here and reported
            "guidance_scale": info.default_guidance_scale if self.guidance_scale is None else self.guidance_scale,
            "sampler": self.sampler or usual_sampler(info, self.n_inf_steps),
            "model": info.name,
            "num_latents": 0 if self.latent is None else 1 if isinstance(self.latent, str) else self.n_images,
        }
        if self.init_image is not None:
            usual = usual_strength(self.mask is not None)
            found |= {"has_init_image": True, "strength": usual if self.strength is None else self.strength}
            found |= {} if self.mask is None else {"has_mask": True}
        if self.variation_strength > 0:
            other = secrets.randbelow(2**32) if self.variation_seed is None else self.variation_seed
            found |= {"variation_strength": self.variation_strength, "variation_seed": other}
        if (target := self.interpolate_to) is not None:
            found["interpolate_to"] = {"prompt": target.prompt, "seed": target.seed, "weight": target.weight,
                                       "has_latent": target.latent is not None}
        others = {"attributes": self.attributes, "candidates": self.candidates, "balance": self.balance,
                  "preview_every_s": self.preview_every_s}
        return found | {name: value for name, value in others.items() if value}

    def _leads_on(self, target: InterpolateTo) -> None:
        """What goes together with `interpolate_to`. Raises a validation error."""
        others = {"init_image": self.init_image is not None, "latent": isinstance(self.latent, list),
                  "start_timestep": self.start_timestep > 0, "variation_strength": self.variation_strength > 0}
        for name, is_given in others.items():
            if is_given:
                wanted = {"latent": "must be one latent, not a list,", "init_image": "cannot be given"}
                raise bad_field(name, f"{wanted.get(name, 'must be 0')} together with interpolate_to")
        if target.weight is None and self.n_images < 2:
            raise bad_field("interpolate_to", "needs n_images of at least 2, or a weight; got n_images = 1")
        if target.weight is not None and self.n_images > 1:
            raise bad_field("interpolate_to/weight", f"is for one image: n_images must be 1; got {self.n_images}")


class AnalyzePrompt(Body):
    """Body of POST /prompt/analyze."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": EXAMPLES[0]}]})
    prompt: Prompt = Field(description="what to draw")

    _printable = field_validator("prompt")(no_control_characters)


class GiveImage(Body):
    """A picture inside JSON: body of POST /inspect."""

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


class EncodeImage(GiveImage):
    """A picture inside JSON: body of POST /encode."""

    model_config = ConfigDict(json_schema_extra={
        "if": {"required": ["prompt"], "properties": {"prompt": {"minLength": 1}}},
        "then": {"required": ["invert"], "properties": {"invert": {"const": True}}},
    })
    invert: bool = Field(False, description="answer the starting noise that draws the picture, instead of its latent")
    prompt: Prompt = Field("", description="with invert: the prompt that is to draw it, at guidance_scale 1")

    _printable = field_validator("prompt")(no_control_characters)

    @model_validator(mode="after")
    def _fits_together(self) -> EncodeImage:
        if self.prompt and not self.invert:
            raise bad_field("prompt", "is for invert: a latent does not depend on it")
        return self


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


class DrawQuery(Query):
    """Query of POST /text_to_image."""

    wait: int = Field(0, ge=0, le=600, description="seconds to wait for the pictures: 200 if they are there, or 202")


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


# ---- what the schemas say to others ----------------------------------------------------------------------------------


def name_choices(schemas: dict[str, Any], info: EngineInfo) -> None:
    """Write into the JSON Schemas what depends on the loaded model: its samplers, its name, the size of a latent."""
    length = 4 * -(-4 * int(np.prod(info.latent_shape)) // 3)
    fields = schemas["TextToImage"]["properties"]
    for name, choices in (("sampler", info.samplers), ("model", (info.name,))):
        fields[name]["anyOf"] = [{"type": "string", "enum": list(choices)}, {"type": "null"}]
    one, many, _ = fields["latent"]["anyOf"]
    target = schemas["InterpolateTo"]["properties"]["latent"]["anyOf"][0]
    for latent in (one, many["items"], target, schemas["GiveLatent"]["properties"]["latent"]):
        latent |= {"minLength": length, "maxLength": length}


def fewest_steps(curve: Sequence[Mapping[str, Any]], share: float) -> int | None:
    """The fewest measured steps whose distance to real faces is within `share` of the best; None without a curve."""
    if not curve:
        return None
    best = min(point["frechet_over_floor"] for point in curve)
    return min(point["steps"] for point in curve if point["frechet_over_floor"] <= best * (1 + share))


def quality(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Names for numbers of steps, fewest first: from the measured curve, and the steps that the interface promises.

    Two names with the same number become one, which keeps the name that the page begins with.
    """
    found: dict[int, dict[str, Any]] = {}
    for name, share in QUALITY:
        steps = fewest_steps(curve, share) or UNMEASURED_QUALITY[name]
        kept = found.get(steps)
        name = START_QUALITY if kept and START_QUALITY in (kept["name"], name) else name
        found[steps] = {"name": name, "steps": steps, "within": share if curve else None,
                        "default": name == START_QUALITY}
    found.setdefault(PROMISED_STEPS, {"name": "Full", "steps": PROMISED_STEPS, "within": None, "default": False})
    return [found[steps] for steps in sorted(found)]


def options(info: EngineInfo | None, words: Collection[str] = (), examples: Sequence[str] = ()) -> dict[str, Any]:
    """Limits, defaults, samplers, models, examples: everything the page would otherwise repeat.

    Sliders are those that a model can follow which read captions of these `words` (none: all). `examples` are captions
    that a person wrote, where the model learned from those.
    """
    fields = {
        name: {**bounds(TextToImage, name), "default": None if field.is_required() else field.default,
               "description": field.description}
        for name, field in TextToImage.model_fields.items()
    }
    models = []
    if info is not None:
        fields["guidance_scale"] |= {"default": info.default_guidance_scale,
                                     "one_pass": list(info.one_pass) if info.one_pass else None}
        fields["sampler"] |= {"default": info.default_sampler, "choices": list(info.samplers),
                              "long_default": info.long_sampler, "long_above": MANY_STEPS}
        fields["model"] |= {"default": info.name, "choices": [info.name]}
        models = [{"name": info.name, "hash": info.model_hash, "device": info.device, "engine": info.engine,
                   "image_size": info.image_size, "latent_shape": list(info.latent_shape)}]
    return {
        "fields": fields,
        "aliases": ALIASES,
        "samplers": list(info.samplers) if info else [],
        "few_steps": dict(info.few_steps) if info else {},
        "models": models,
        "quality": quality(info.step_curve if info else ()),
        "step_curve": [dict(point) for point in info.step_curve] if info else [],
        "examples": list(examples[: len(EXAMPLES)] or EXAMPLES),
        "attributes": [
            {**asdict(slider), "response": info.sliders.get(name) if info else None}
            for name, slider in sliders().items() if name in spoken_attributes(words)
        ],
        "limits": {
            "body_bytes": MAX_BODY_BYTES,
            "draw_body_bytes": MAX_DRAW_BODY_BYTES,
            "mask_bytes": MAX_MASK_BYTES,
            "image_bytes": MAX_PICTURE_BYTES,
            "image_pixels": MAX_PICTURE_PIXELS,
        },
    }
