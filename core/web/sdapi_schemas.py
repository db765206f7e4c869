"""What do clients of A1111's web UI ask for, and what do they expect to get?

The bodies and answers of the routes under `/sdapi/v1`, named as that API names them, with the ranges of this server.
Fields that it has and we have nothing for are accepted; `ignored_fields` says which of them asked for something. This
file does not know routes or jobs. The API: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from typing_extensions import TypedDict

from core.web.errors import ErrorShape, shown
from core.web.requests import MAX_SEED, Base64Image, Base64Mask, Body, Prompt, no_control_characters
from core.web.responses import Picture64
from core.web.validation import bad_field

ALIASES = {  # the names under which k-diffusion's samplers are known to such clients
    "Euler a": ("k_euler_a", "k_euler_ancestral"),
    "Euler": ("k_euler",),
    "DPM++ 2M": ("k_dpmpp_2m",),
    "DPM++ 2M SDE": ("k_dpmpp_2m_sde",),
    "DDIM": ("ddim",),
    "UniPC": ("unipc",),
}
SCHEDULES = re.compile(r" (karras|exponential|polyexponential|sgm uniform|kl optimal|simple|normal|beta)$")


# ---- bodies ----------------------------------------------------------------------------------------------------------


class SdRequest(Body):
    """What both kinds of drawing share. Other fields are accepted, and named in `info` where they are ignored."""

    model_config = ConfigDict(extra="allow")

    prompt: Prompt | None = Field("", description="what to draw")
    negative_prompt: Prompt | None = Field("", description="steer away from this")
    seed: int | None = Field(-1, ge=-1, le=MAX_SEED, description="picture i uses seed + i; -1 draws one")
    subseed: int | None = Field(-1, ge=-1, le=MAX_SEED, description="which other noise is mixed in; -1 draws one")
    subseed_strength: float | None = Field(0.0, ge=0, le=1, description="share of the other noise")
    sampler_name: str | None = Field(None, max_length=100, description="one of /sdapi/v1/samplers, or an alias")
    sampler_index: str | None = Field(None, max_length=100, description="the older name of sampler_name")
    batch_size: int | None = Field(1, ge=1, le=8, description="pictures in one job")
    n_iter: int | None = Field(1, ge=1, le=8, description="jobs")
    steps: int | None = Field(None, ge=1, le=1000, description="denoising steps; 50 when left out")
    cfg_scale: float | None = Field(None, ge=0, le=20, description="guidance; the model's own when left out")
    width: int | None = Field(None, ge=8, le=2048, description="the model draws its own size, which `info` tells")
    height: int | None = Field(None, ge=8, le=2048, description="as width")
    denoising_strength: float | None = Field(None, ge=0, le=1, description="how much of a picture changes")
    override_settings: dict[str, Any] | None = Field(None, description="settings for this request alone")
    send_images: bool | None = Field(True, description="false: the answer has no pictures, the gallery has")
    script_name: Annotated[str, Field(json_schema_extra={"maxLength": 0})] | None = Field(
        None, description="there are no scripts here")

    @field_validator("script_name")
    @classmethod
    def _no_script(cls, value: str | None) -> str | None:
        if value:
            raise bad_field("script_name", f"Script {shown(value)} not found: there are none")
        return value

    _printable = field_validator("prompt", "negative_prompt")(no_control_characters)


class SdTextToImage(SdRequest):
    """Body of POST /sdapi/v1/txt2img."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [
        {"prompt": "a smiling young woman with wavy blond hair", "steps": 20, "seed": 7, "batch_size": 2}]})


class SdImageToImage(SdRequest):
    """Body of POST /sdapi/v1/img2img."""

    init_images: list[Base64Image] | None = Field(
        None, max_length=1, description="one picture to change, as base64 or a data: address")
    mask: Base64Mask | None = Field(None, description="white is drawn anew, black stays")
    inpainting_mask_invert: int | None = Field(0, ge=0, le=1, description="1: black is drawn anew, white stays")

    @field_validator("init_images", "mask", mode="before")
    @classmethod
    def _without_address(cls, value: Any) -> Any:
        """Clients send `data:image/png;base64,...`, which is that base64."""
        if isinstance(value, list):
            return [without_address(one) for one in value]
        return without_address(value)


def without_address(value: Any) -> Any:
    """The base64 of a data: address; anything else as it is."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\Adata:image/[a-z0-9.+-]{1,40};base64,", "", value)


class SdImage(Body):
    """Body of POST /sdapi/v1/png-info."""

    image: Base64Image = Field(description="a PNG as base64 or a data: address")

    @field_validator("image", mode="before")
    @classmethod
    def _without_address(cls, value: Any) -> Any:
        return without_address(value)


class SdOptions(Body):
    """Body of POST /sdapi/v1/options: settings that can be given, all to what they are."""

    sd_model_checkpoint: str | None = Field(None, max_length=200, description="a title of /sdapi/v1/sd-models")
    sd_vae: Literal["Automatic", "None"] | None = Field(None, description="the model brings its own")
    samples_format: Literal["png", "PNG"] | None = Field(None, description="pictures are PNG files")


class SdProgressQuery(Body):
    """Query of GET /sdapi/v1/progress."""

    skip_current_image: Literal["true", "false", "True", "False", "1", "0"] = Field(
        "false", description="leave the preview out")


# ---- what is ignored -------------------------------------------------------------------------------------------------

NOTHING: tuple[Any, ...] = (None, "", False, 0, -1, [], {})
HARMLESS: dict[str, tuple[Any, ...]] = {  # values that ask for what is done anyway
    "scheduler": ("automatic", "Automatic"),
    "eta": (1.0,),
    "s_noise": (1.0,),
    "s_tmax": (float("inf"),),
    "resize_mode": (1,),
    "inpainting_fill": (1,),
    "initial_noise_multiplier": (1.0,),
    "image_cfg_scale": (1.5,),
    "override_settings_restore_afterwards": (True,),
    "send_images": (True,),
}
ONLY_WITH = {"hr_": "enable_hr", "firstphase_": "enable_hr", "refiner_": "refiner_checkpoint",
             "inpaint": "mask", "mask_": "mask"}  # fields that mean nothing unless another one is given
USED = frozenset(SdImageToImage.model_fields) - {"width", "height", "override_settings", "denoising_strength"}


def ignored_fields(body: Mapping[str, Any], *, size: int, model: Sequence[str]) -> list[str]:
    """The fields of a body that ask for something which is not done, by name.

    `size` is that of the pictures; `model` are the names of the one there is.
    """
    found = []
    for name, value in body.items():
        needed = next((other for start, other in ONLY_WITH.items() if name.startswith(start) and name != other), None)
        if name in USED or value in NOTHING or value in HARMLESS.get(name, ()):
            continue
        if needed is not None and body.get(needed) in NOTHING:
            continue
        if name in ("width", "height") and value == size:
            continue
        if name == "denoising_strength" and ("init_images" in body or body.get("enable_hr") in NOTHING):
            continue
        if name == "override_settings" and isinstance(value, Mapping):
            found += [f"override_settings.{key}" for key, one in value.items()
                      if one not in NOTHING and not (key == "sd_model_checkpoint" and one in model)]
            continue
        found.append(name)
    return found


def sampler_named(name: str, samplers: Sequence[str]) -> tuple[str | None, bool]:
    """The sampler that a client means, None when there is none; and whether it named a noise schedule as well."""
    plain = SCHEDULES.sub("", name.strip().lower())
    for sampler in samplers:
        if plain in (sampler.lower(), *ALIASES.get(sampler, ())):
            return sampler, plain != name.strip().lower()
    return None, False


# ---- answers ---------------------------------------------------------------------------------------------------------


class SdFieldProblem(TypedDict):
    """What is wrong with one field."""

    loc: list[str]
    msg: str
    type: str


class SdError(TypedDict):
    """Every error under /sdapi has this shape; `detail` is a list where fields are wrong."""

    error: str
    detail: str | list[SdFieldProblem]
    body: str
    errors: str


class SdPictures(TypedDict):
    """Pictures as base64, and what was asked; `info` is JSON in a text, with `ignored` and `warnings` among it."""

    images: list[Picture64]
    parameters: dict[str, Any]
    info: str


class SdSampler(TypedDict):
    """How noise is removed."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class SdScheduler(TypedDict):
    """How the noise levels are spread; there is one way."""

    name: str
    label: str
    aliases: list[str] | None
    default_rho: float
    need_inner_model: bool


class SdModel(TypedDict):
    """A model."""

    title: str
    model_name: str
    hash: str
    sha256: str
    filename: str
    config: str | None


class SdState(TypedDict):
    """What the request of this client is doing."""

    skipped: bool
    interrupted: bool
    stopping_generation: bool
    job: str
    job_count: int
    job_timestamp: str
    job_no: int
    sampling_step: int
    sampling_steps: int


class SdProgress(TypedDict):
    """How far the oldest request is in which this client waits; all zero when there is none."""

    progress: Annotated[float, Field(ge=0, le=1)]
    eta_relative: float
    state: SdState
    current_image: Picture64 | None
    textinfo: str | None


class SdPngInfo(TypedDict):
    """What a PNG says about how it was drawn; empty when it says nothing."""

    info: str
    items: dict[str, str]
    parameters: dict[str, Any]


class SdSettings(TypedDict):
    """The settings that have a counterpart here."""

    sd_model_checkpoint: str
    sd_checkpoint_hash: str
    sd_vae: str
    samples_format: str
    show_progress_every_n_steps: int
    CLIP_stop_at_last_layers: int


class SdMemory(TypedDict):
    """Bytes of memory; `cuda` says that its numbers are elsewhere."""

    ram: dict[str, float]
    cuda: dict[str, str]


class SdEmbeddings(TypedDict):
    """There are none."""

    loaded: dict[str, Any]
    skipped: dict[str, Any]


class SdNothing(TypedDict):
    """It is done."""


FIELDS = {"n_images": "batch_size", "n_inf_steps": "steps", "guidance_scale": "cfg_scale", "sampler": "sampler_name",
          "init_image": "init_images", "strength": "denoising_strength", "variation_seed": "subseed",
          "variation_strength": "subseed_strength"}  # ours -> theirs


def sd_error(problem: Mapping[str, Any]) -> SdError:
    """A problem document as FastAPI, on which that API stands, writes it."""
    wrong = [SdFieldProblem(loc=loc_of(one["pointer"]), msg=one["message"], type="value_error")
             for one in problem.get("errors", ())]
    name = "RequestValidationError" if wrong else "HTTPException"
    text = "; ".join(f"{'/'.join(one['loc'][1:]) or 'body'}: {one['msg']}" for one in wrong) or problem["detail"]
    return SdError(error=name, detail=wrong or problem["detail"], body="", errors=text)


def loc_of(pointer: str) -> list[str]:
    """`#/steps` -> ["body", "steps"], under the name that such a client uses."""
    where, _, path = pointer.partition("/") if pointer.startswith("#") else ("query", "", pointer.lstrip("?"))
    names = [FIELDS.get(name, name) for name in path.split("/") if name]
    return ["body" if where == "#" else "query", *names]


SD_ERRORS = ErrorShape(SdError, sd_error)
