"""What may a client ask for?

The bodies of the requests as pydantic schemas: names, types, defaults and ranges stand here and nowhere else. The
messages of a refused request, `GET /options` and through it the web page, what clients are told of a job
(`core/web/parameters.py`), and the OpenAPI document are read from them. A field of `TextToImage` reaches the model
under the same name in `core.engine.GenerationRequest`. This file does not know what happens to a valid request, and
never imports torch.

Schemas: https://docs.pydantic.dev/latest/concepts/models/
"""

from __future__ import annotations

import base64
import difflib
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from core.engine import EngineInfo, usual_strength
from core.imaging.file_sanitizer import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS
from core.text.attribute_sliders import BY_ANY_CASE, FURTHEST, MOST
from core.web.aliases import REQUEST_ALIASES, add_better_names
from core.web.errors import shown
from core.web.validation import bad_field
from core.web.values import (
    MAX_IMAGE_TEXT,
    MAX_MASK_TEXT,
    MAX_SEED,
    Base64Image,
    Base64Latent,
    Base64Mask,
    Latents,
    Prompt,
    Sliders,
    decode_base64,
    decode_latent,
    no_control_characters,
)

MAX_BODY_BYTES = 2**20  # eight latents are 175 kB as base64
MAX_IMAGE_BODY_BYTES = MAX_IMAGE_TEXT * 17 // 16 + 1024  # lines of 64 end in \r\n, as JSON writes it; and the rest
MAX_DRAW_BODY_BYTES = MAX_BODY_BYTES + (MAX_IMAGE_TEXT + MAX_MASK_TEXT) * 17 // 16  # the usual bound for the rest
MAX_ANY_BODY_BYTES = max(MAX_DRAW_BODY_BYTES, MAX_IMAGE_BODY_BYTES)
MAX_CANDIDATES = 32
Share = Annotated[float, Field(ge=0, le=1)]
ALIASES = {
    "num_images": "n_images",
    "steps": "n_inf_steps",
    "num_inference_steps": "n_inf_steps",
    "cfg_scale": "guidance_scale",
    "sampler_name": "sampler",
    "denoising_strength": "strength",
    "keep": "n_images",
    **REQUEST_ALIASES,
}
PROMISED_STEPS = 500  # the default of n_inf_steps, whatever was measured
EXAMPLES = (  # only words that the captions use, so that a first try shows what the model can do
    "a smiling young woman with wavy blond hair",
    "old bald man with a beard and glasses, no smile",
    "portrait of a young man with black hair and a goatee",
    "a woman with brown hair, bangs and heavy makeup",
    "a serious woman with black hair, not smiling",
    "a smiling middle-aged man wearing a necktie",
)


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
    add_better_names(schema)


def describe_target(schema: dict[str, Any]) -> None:
    """Something must be given to lead to, and one noise at most."""
    schema["anyOf"] = [given(name) for name in ("prompt", "seed", "latent")]
    schema["not"] = {"allOf": [given("seed"), given("latent")]}


class InterpolateTo(Body):
    """Where a row of images leads: from the noise and the prompt of the request to these."""

    model_config = ConfigDict(json_schema_extra=describe_target)

    prompt: Prompt | None = Field(None, description="the prompt at the end; the same when left out")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="the seed of the noise at the end")
    latent: Base64Latent | None = Field(None, description="the noise at the end")
    weight: float | None = Field(
        None, ge=0, le=1,
        description="generate one image only, at this share of the way; else image i of n is at i/(n-1)")

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


class Refine(Body):
    """How finished images are refined: enlarged to what another model generates, and changed a little by it."""

    model: str | None = Field(None, description="which model refines; the one that generates when left out")
    strength: float = Field(0.35, ge=0.05, le=1, description="how much it changes")
    prompt: Prompt | None = Field(None, description="what it is told; the prompt of the request when left out")

    _printable = field_validator("prompt")(no_control_characters)


class TextToImage(Body):
    """Body of POST /text_to_image."""

    model_config = ConfigDict(json_schema_extra=describe_text_to_image)
    prompt: Prompt = Field(description="what to generate; empty generates without a condition")
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
        None, description="an image to change: PNG, JPEG or WebP as base64; its middle square, at the model's size")
    strength: float | None = Field(
        None, ge=0, le=1, description="how much of init_image changes: 0 nothing, 1 all; "
        f"{usual_strength(False):g} when left out, {usual_strength(True):g} with a mask")
    mask: Base64Mask | None = Field(
        None, description="an image over init_image, as base64: white is inpainted, black stays as it is")
    variation_strength: float = Field(
        0.0, ge=0, le=1, description="share of other noise, of variation_seed + i, mixed into that of seed")
    variation_seed: int | None = Field(None, ge=0, le=MAX_SEED, description="which other noise; drawn when left out")
    interpolate_to: InterpolateTo | None = Field(
        None, description="lead over the images to another prompt, seed or latent")
    attributes: Sliders | None = Field(
        None, description=f"sliders: CelebA's name of an attribute, in any case, -> -{FURTHEST:g} (away from it) to "
        f"{FURTHEST:g} (towards it); at most {MOST}")
    candidates: int | None = Field(
        None, ge=1, le=MAX_CANDIDATES, description="generate so many, from seed on, and keep the n_images that fit the "
        "prompt best, best first")
    balance: bool = Field(
        False, description="go round what the prompt leaves open (sex, age, hair colour), another combination each"
        " image")
    refine: Refine | None = Field(
        None, description="finish the images by image to image of a model; those before are kept, too")
    guidance_interval: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = Field(
        None, description="from and to which share of the steps there is guidance, of the scale, a negative prompt and "
        "sliders; before and after, guidance_scale is 1. All steps when left out")
    model: str | None = Field(None, description="which model generates")

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

    @field_validator("guidance_interval", mode="before")
    @classmethod
    def _in_order(cls, value: Any) -> Any:
        """As a whole: pydantic would name the one or the other end."""
        sound = isinstance(value, list) and len(value) == 2 and all(type(end) in (int, float) for end in value)
        if value is not None and not (sound and 0 <= value[0] <= value[1] <= 1):
            raise bad_field("guidance_interval", f"must be two numbers from 0 to 1, in order; got {shown(value)}")
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
    def _can_be_followed(self, info: ValidationInfo) -> TextToImage:
        engine = cast(EngineInfo, info.context)
        for name in sorted(engine.lacks & set(TextToImage.model_fields)):
            if getattr(self, name):
                raise bad_field(name, f"is nothing that the model {engine.name} can follow")
        return self

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
    prompt: Prompt = Field(description="what to generate")

    _printable = field_validator("prompt")(no_control_characters)


class GiveImage(Body):
    """An image inside JSON: body of POST /inspect."""

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
    """An image inside JSON: body of POST /encode."""

    model_config = ConfigDict(json_schema_extra={
        "if": {"required": ["prompt"], "properties": {"prompt": {"minLength": 1}}},
        "then": {"required": ["invert"], "properties": {"invert": {"const": True}}},
    })
    invert: bool = Field(False, description="answer the starting noise that generates the image, instead of its latent")
    prompt: Prompt = Field("", description="with invert: the prompt that is to generate it, at guidance_scale 1")

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
