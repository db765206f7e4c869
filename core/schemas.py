"""What may a client ask for?

The bodies of the requests as pydantic schemas: names, types, defaults and ranges stand here and nowhere else. The
messages of a refused request, `GET /options` and through it the web page are read from them. This file does not know
what happens to a valid request, and never imports torch.

Schemas: https://docs.pydantic.dev/latest/concepts/models/
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Protocol, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from core.web import bad_field, bounds, shown

MAX_BODY_BYTES = 2**20  # eight latents are 175 kB as base64; nothing larger is accepted yet
MAX_SEED = 2**53 - 1  # the largest integer that JavaScript holds exactly

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


class EngineInfo(Protocol):
    """What a loaded model says about itself."""

    @property
    def name(self) -> str: ...
    @property
    def model_hash(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def samplers(self) -> tuple[str, ...]: ...
    @property
    def default_sampler(self) -> str: ...
    @property
    def default_guidance_scale(self) -> float: ...


def no_control_characters(value: str, info: ValidationInfo) -> str:
    if any(ord(c) < 32 and c not in "\n\r\t" or ord(c) == 127 for c in value):
        raise bad_field(info.field_name, "must not contain control characters")
    return value


def decode_latent(text: str, shape: tuple[int, ...], field: str) -> np.ndarray:
    """Base64 of little-endian float32 -> array of `shape`."""
    num_bytes = 4 * int(np.prod(shape))
    wanted = f"must be base64 of {num_bytes} bytes: float32 of shape {list(shape)}"
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_field(field, f"{wanted}; got {shown(text)}") from error
    if len(raw) != num_bytes:
        raise bad_field(field, f"{wanted}; got {len(raw)} bytes")
    latent = np.frombuffer(raw, "<f4").reshape(shape)
    if not np.isfinite(latent).all() or float(np.abs(latent).max()) > 1e3:
        raise bad_field(field, "must hold finite numbers between -1000 and 1000")
    return latent


class AnalyzePrompt(BaseModel):
    """Body of POST /prompt/analyze."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    prompt: str = Field(max_length=500, description="what to draw")

    _printable = field_validator("prompt")(no_control_characters)


class TextToImage(BaseModel):
    """Body of POST /text_to_image."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    prompt: str = Field(max_length=500, description="what to draw; empty draws without a condition")
    n_images: int = Field(4, ge=1, le=8, description="images in this job")
    n_inf_steps: int = Field(500, ge=1, le=1000, description="denoising steps")
    stream_freq: int = Field(50, ge=1, le=1000, description="an update every this many steps")
    latent: str | list[str] | None = Field(None, description="start from these latents instead of noise")
    start_timestep: float = Field(0.0, ge=0, le=1, description="share of the schedule to skip")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="image i uses seed + i")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="1 = off, 0 = unconditional")
    negative_prompt: str = Field("", max_length=500, description="steer away from this")
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

    @field_validator("latent")
    @classmethod
    def _decodes(cls, value: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        shape = cast(EngineInfo, info.context).latent_shape
        for position, text in enumerate([value] if isinstance(value, str) else value or []):
            decode_latent(text, shape, "latent" if isinstance(value, str) else f"latent/{position}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TextToImage:
        if isinstance(self.latent, list) and len(self.latent) != self.n_images:
            wanted = f"must be one latent or a list of n_images = {self.n_images}"
            raise bad_field("latent", f"{wanted}; got {len(self.latent)}")
        if self.start_timestep > 0 and self.latent is None:
            raise bad_field("start_timestep", "needs a latent to start from: send one, or leave start_timestep at 0")
        return self

    def latents(self, shape: tuple[int, int, int]) -> np.ndarray | None:
        """The starting latents, one an image. Shapes: [n_images, *shape]."""
        if self.latent is None:
            return None
        texts = [self.latent] * self.n_images if isinstance(self.latent, str) else self.latent
        return np.stack([decode_latent(text, shape, "latent") for text in texts])


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
        "limits": {"body_bytes": MAX_BODY_BYTES},
    }
