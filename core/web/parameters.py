"""What are clients told of the request that a job was made of?

Its fields with every default filled in and what is random drawn. Their types are those of the schema
(`core/web/requests.py`), so that a field is told because it is there: only what is told in another form than it was
asked (images, latents, where an interpolation leads) is named here. It does not know jobs or routes.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from core.engine import EngineInfo, usual_sampler, usual_strength
from core.web.aliases import BETTER_NAMES, older_name_of
from core.web.requests import TextToImage
from core.web.values import Seed

ALWAYS = ("prompt", "n_images", "n_inf_steps", "stream_freq", "start_timestep", "seed", "guidance_scale",
          "negative_prompt", "sampler", "model")  # the others are told where they say something
BULKY = ("latent", "init_image", "mask")  # told is only that they are there
DEPENDENT = ("strength", "variation_strength", "variation_seed", "interpolate_to")  # told with another field
RESOLVED = ("refine",)  # told by who knows the models (`core/web/model_choice.py`)


class Target(TypedDict):
    """Where a row of images leads."""

    prompt: str | None
    seed: Seed | None
    weight: Annotated[float, Field(ge=0, le=1)] | None
    has_latent: bool


class Refinement(TypedDict):
    """How the images are refined."""

    model: str
    strength: Annotated[float, Field(ge=0.05, le=1)]
    prompt: Annotated[str | None, Field(description="null: that of the request")]


def told_type(name: str) -> Any:
    """The type of a field as it is told: never null, and of a switch that is off when left out, only that it is on."""
    field = TextToImage.model_fields[name]
    given = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = Union[tuple(given)] if type(None) in get_args(field.annotation) else field.annotation  # noqa: UP007
    kind = Literal[True] if kind is bool and field.default is False else kind
    for constraint in (*field.metadata, Field(description=field.description)):
        kind = Annotated[kind, constraint]
    return kind


def told_types() -> dict[str, Any]:
    """The members of `Parameters`, with the better names beside the older ones."""
    found: dict[str, Any] = {name: told_type(name) for name in ALWAYS}
    found["num_latents"] = Annotated[int, Field(ge=0, le=8, description="latents that came with the request")]
    more = {name: told_type(name) for name in TextToImage.model_fields if name not in (*ALWAYS, *BULKY)}
    more |= {
        "verification": Annotated[Literal[True], Field(description="made by /verify")],
        "has_init_image": Literal[True],
        "has_mask": Literal[True],
        "interpolate_to": Target,
        "refine": Refinement,
    }
    for older in more.keys() & BETTER_NAMES.keys():
        better = BETTER_NAMES[older]
        more |= {better: more[older], older: Annotated[more[older], older_name_of(better)]}
    return found | {name: NotRequired[kind] for name, kind in more.items()}


if TYPE_CHECKING:
    Parameters = dict[str, Any]
else:
    Parameters = TypedDict("Parameters", told_types())
    Parameters.__doc__ = (
        "What is drawn: the request with every default filled in; of a picture to change only that there is one.")


def filled_in(wanted: TextToImage, info: EngineInfo) -> dict[str, Any]:
    """What clients are told of a request, under the names that it may be asked by."""
    usual_steps = {} if "n_inf_steps" in wanted.model_fields_set else info.few_steps
    found = wanted.model_dump(include=set(ALWAYS)) | {
        "n_inf_steps": usual_steps.get(wanted.sampler or "", wanted.n_inf_steps),
        "seed": secrets.randbelow(2**32) if wanted.seed is None else wanted.seed,  # generated here and reported
        "guidance_scale": info.default_guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale,
        "sampler": wanted.sampler or usual_sampler(info, wanted.n_inf_steps),
        "model": info.name,
        "num_latents": 0 if wanted.latent is None else 1 if isinstance(wanted.latent, str) else wanted.n_images,
    }
    if wanted.init_image is not None:
        usual = usual_strength(wanted.mask is not None)
        found |= {"has_init_image": True, "strength": usual if wanted.strength is None else wanted.strength}
        found |= {} if wanted.mask is None else {"has_mask": True}
    if wanted.variation_strength > 0:
        other = secrets.randbelow(2**32) if wanted.variation_seed is None else wanted.variation_seed
        found |= {"variation_strength": wanted.variation_strength, "variation_seed": other}
    if (target := wanted.interpolate_to) is not None:
        found["interpolate_to"] = {"prompt": target.prompt, "seed": target.seed, "weight": target.weight,
                                   "has_latent": target.latent is not None}
    chosen = wanted.model_dump(exclude={*ALWAYS, *BULKY, *DEPENDENT, *RESOLVED}, exclude_defaults=True)
    return found | {name: value for name, value in chosen.items() if value != {}}
