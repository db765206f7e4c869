"""What do a server and a model owe each other?

The contract: what an engine says of itself (`EngineInfo`), what it is asked (`GenerationRequest`), the run that it
makes of it, and the images that come out. Anything that keeps it can be served; the tests generate with a stand-in.
It knows neither jobs nor HTTP, and never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args, get_type_hints

import numpy as np

NUM_SEEDS = 2**53  # seeds stay exact in JavaScript; the one after the last is 0
MAX_IMAGES = 64  # of all running jobs: what a step keeps in memory
MANY_STEPS = 50  # from here on noise that is added again pays, so that more steps are never worse


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
    def long_sampler(self) -> str: ...  # the default of more than `MANY_STEPS` steps
    @property
    def default_guidance_scale(self) -> float: ...
    @property
    # guidance scales that cost no second pass of the network
    def guidance_range(self) -> tuple[float, float] | None: ...
    @property
    def engine(self) -> str: ...  # what computes, for people: "OpenVINO 2026.4.1 f32"
    @property
    # name -> what it was measured to do (core.web.responses.SliderResponse)
    def sliders(self) -> Mapping[str, Any]: ...
    @property
    def few_steps(self) -> Mapping[str, int]: ...  # samplers made for few steps -> how many
    @property
    # what steps buy (core.web.responses.StepQuality), by steps
    def step_curve(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def prompt_rewriting(self) -> Callable[[str], str]: ...  # a description -> the text that is encoded for it
    @property
    def encoded_length(self) -> Callable[[str], int]: ...  # a text -> how many of its characters are encoded
    @property
    def kind(self) -> str: ...  # "faces": one of ours; "stable-diffusion": other people's weights
    @property
    def lacks(self) -> frozenset[str]: ...  # fields of a request that it cannot follow, and "vocabulary"


@dataclass(frozen=True, eq=False)
class Interpolation:
    """Where a row of images leads: another prompt, another seed, or noise `latent` [C, h, w] in place of a seed's.

    What is None stays as it is. Image i of n stands at the share i / (n - 1) of the way; with `weight` there is one
    image, which stands there.
    """

    prompt: str | None = None
    seed: int | None = None
    latent: Any = None
    weight: float | None = None


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """What to generate: `num_images` images of `prompt`, the i-th from `seed + i`.

    A field that is added here and, under the same name, to `core.web.requests.TextToImage` is stored with jobs, told to
    clients and written into PNGs; what becomes of it begins in `core/diffusion/run.py`.

    An empty prompt generates without a condition. `guidance_scale` 1 is off, 0 ignores the prompt, None is the model's
    own, as is `sampler` None. `latents` [num_images, C, h, w], normalized as in `GeneratedImage.latent`, replace the
    starting noise or, when `start` > 0, are the images to start from: that share of the steps is skipped and noise of
    the level reached there is added.

    `init_image` [H, W, 3] uint8 is an image to change: the share 1 - `strength` of the steps is skipped, so 0 gives
    what the VAE makes of it and 1 ignores it; None is `usual_strength`. With a `mask` [H, W] (True: inpaint this) the
    rest stays as it is.

    `variation_strength` mixes another noise into that of `seed`: for image i that of `variation_seed + i`.
    `interpolate_to` leads from the noise and the prompt of this request to others. In both cases all images have the
    one `seed`.

    `watermark`: the images carry the mark of `core.imaging.watermark`, where they were generated; previews never do.

    `attributes` are sliders: CelebA's names of attributes -> -2 (away from it) to 2 (towards it). `candidates`
    generates so many images, and the `num_images` that fit the prompt best are the result, the best first. `balance`
    goes round what the prompt leaves open (`core/text/prompt_balancing.py`): image i is combination `seed + i`.

    `guidance_interval` [low, high] are shares of the steps between which there is guidance (of the scale, a negative
    prompt and sliders); before and after, the scale is 1, which is one pass of the network
    (https://arxiv.org/abs/2404.07724). None is all of them.
    """

    prompt: str
    num_images: int = 1
    num_inference_steps: int = 50
    seed: int = 0
    guidance_scale: float | None = None
    negative_prompt: str = ""
    sampler: str | None = None
    latents: Any = None
    start: float = 0.0
    init_image: Any = None
    strength: float | None = None
    mask: Any = None
    variation_strength: float = 0.0
    variation_seed: int = 0
    interpolate_to: Interpolation | None = None
    watermark: bool = True
    attributes: Mapping[str, float] | None = None
    candidates: int | None = None
    balance: bool = False
    guidance_interval: tuple[float, float] | None = None

    @property
    def num_candidates(self) -> int:
        """Images that are computed, of which `num_images` are the result."""
        return self.num_images if self.candidates is None else self.candidates


# how requests name a field of GenerationRequest in HTTP, in stored jobs and in PNGs, where that is another name
BODY_NAMES = {"num_images": "n_images", "num_inference_steps": "n_inf_steps", "latents": "latent",
              "start": "start_timestep"}
OF_NO_IMAGE = frozenset({"candidates", "balance", "watermark"})  # they do not decide what a single image shows


def body_name(field: str) -> str:
    """How requests name a field of `GenerationRequest`."""
    return BODY_NAMES.get(field, field)


def field_types(of: type) -> dict[str, Any]:
    """The fields of `GenerationRequest` or `Interpolation`, as requests name them, with their types other than None."""
    found = {}
    for name, hint in get_type_hints(of).items():
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        found[body_name(name)] = kinds[0] if type(None) in get_args(hint) else hint
    return found


def usual_strength(masked: bool) -> float:
    """How much of an image changes when nothing is said: much of a whole one, all of what a mask shows."""
    return 1.0 if masked else 0.6


def usual_sampler(info: EngineInfo, steps: int) -> str:
    """The sampler of requests that name none."""
    return info.long_sampler if steps > MANY_STEPS else info.default_sampler


class GeneratedImage(Protocol):
    """One image: a preview or the result. `latent` holds little-endian float32 in C order.

    `about` is what a result says beside that (`core.web.responses.Assessment`), as JSON can hold it; of a preview
    nothing.
    """

    @property
    def index(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def png(self) -> bytes: ...
    @property
    def latent(self) -> bytes: ...
    @property
    def assessment(self) -> Mapping[str, Any]: ...


class Run(Protocol):
    """A request under way; with an `error` it is finished too. `num_images` counts all candidates."""

    @property
    def num_images(self) -> int: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    @property
    def error(self) -> JobError | None: ...


class RunningInversion(Protocol):
    """The search for the noise that generates an image; when it is finished, `latent` [C, h, w] is that."""

    @property
    def finished(self) -> bool: ...
    @property
    def latent(self) -> np.ndarray: ...
    def advance(self, evaluations: int) -> None: ...


class Engine(Protocol):
    """What generates. Everything but `info` is called by one thread alone."""

    @property
    def info(self) -> EngineInfo: ...
    def start(self, request: Any) -> Any: ...  # a GenerationRequest -> a Run
    def step(self, runs: Sequence[Any]) -> None: ...
    def previews(self, run: Any) -> Sequence[GeneratedImage]: ...
    def pictures(self, run: Any) -> Sequence[GeneratedImage]: ...
    def encode(self, pixels: np.ndarray) -> np.ndarray: ...
    def inversion(self, pixels: np.ndarray, prompt: str) -> Any: ...  # an Inverting
    def decode(self, latent: np.ndarray) -> np.ndarray: ...
    def on_idle(self) -> bool: ...  # nobody waits: get a bit readier for what may come; False: nothing is left to do


class JobError(Exception):
    """A failure that says what went wrong (`message`), in one word for programs (`code`), and what to do (`hint`)."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint

    @classmethod
    def of(cls, raised: Exception) -> JobError:
        """What a client is told about any exception; one that does not explain itself is a fault of the server."""
        if isinstance(raised, JobError):
            return raised
        message = f"{type(raised).__name__}: {raised}"[:300]
        return cls("internal", message, "This is a fault of the server: see its log.")

    def to_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "hint": self.hint}
