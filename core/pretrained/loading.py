"""How does a recognised model of other people become networks, and what can be said of it before?

`describe` reads configurations and headers alone, so that a server can list a model of four gigabytes that it has not
loaded. `load` makes the networks from files of this machine and never asks a hub. It does not know how they generate.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from core.pretrained.recognition import ModelFiles, PretrainedError, read_json, shapes_of, weights_hash
from core.pretrained.single_file import load_single_file, vae_config
from core.text.prompt_rewriting import PromptRewriting

log = logging.getLogger(__name__)
SAMPLERS = ("UniPC", "DPM++ 2M", "DPM++ 2M SDE", "DDIM", "DDPM", "Euler", "Euler a")
USUAL_SIZE = 512  # pixels a side that the 1.x family was trained at
SMALLEST, LARGEST, MULTIPLE = 64, 1024, 64  # pixels a side: the UNet halves its latents three times
GUIDANCE_SCALE = 7.5
# what needs our own words and classifier, or guidance that changes between steps
LACKS = frozenset(("attributes", "balance", "candidates", "vocabulary"))


@dataclass(frozen=True)
class PretrainedInfo:
    """What a model of other people says about itself (`core.engine.EngineInfo`), loaded or not."""

    name: str
    model_hash: str
    device: str
    image_size: int
    latent_shape: tuple[int, int, int]
    engine: str
    samplers: tuple[str, ...] = SAMPLERS
    default_sampler: str = "DPM++ 2M"
    long_sampler: str = "DPM++ 2M"
    default_guidance_scale: float = GUIDANCE_SCALE
    guidance_range: tuple[float, float] | None = None
    sliders: Mapping[str, Any] = field(default_factory=dict)
    few_steps: Mapping[str, int] = field(default_factory=dict)
    step_curve: tuple[Mapping[str, Any], ...] = ()
    prompt_rewriting: PromptRewriting = field(default_factory=PromptRewriting)
    encoded_length: Callable[[str], int] = field(default=len, compare=False, repr=False)
    kind: str = "stable-diffusion"
    lacks: frozenset[str] = LACKS


@dataclass
class Parts:
    """The networks of a model in fp32 on the CPU, of types that only their libraries know: CLIPTextModel,
    AutoencoderKL, UNet2DConditionModel, StableDiffusionSafetyChecker. `scheduler_config` is diffusers' configuration.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler_config: Mapping[str, Any]
    safety_checker: Any = None
    feature_extractor: Any = None


def check_size(image_size: int) -> int:
    """The size, if images of it can be generated. Raises PretrainedError."""
    if not SMALLEST <= image_size <= LARGEST or image_size % MULTIPLE:
        raise PretrainedError(f"image size must be a multiple of {MULTIPLE} from {SMALLEST} to {LARGEST}, "
                              f"got {image_size}")
    return image_size


def describe(files: ModelFiles, device: str, engine: str, image_size: int | None = None,
             name: str | None = None) -> PretrainedInfo:
    """What can be said of a model without loading it. `image_size` None is what the model was trained at, `name` None
    that of its file or folder.

    Raises PretrainedError.
    """
    if files.kind == "diffusers":
        unet, vae = (read_json(files.path / part / "config.json") for part in ("unet", "vae"))
        factor, channels = 2 ** (len(vae["block_out_channels"]) - 1), int(unet["in_channels"])
        size = image_size or int(unet.get("sample_size") or USUAL_SIZE // factor) * factor
    else:
        vae = vae_config(shapes_of(files.path), USUAL_SIZE)
        factor, channels = 2 ** (len(vae["block_out_channels"]) - 1), int(vae["latent_channels"])
        size = image_size or USUAL_SIZE
    side = check_size(size) // factor
    return PretrainedInfo(name or files.name, weights_hash(files), device, size, (channels, side, side), engine)


def load(files: ModelFiles, info: PretrainedInfo) -> Parts:
    """The networks of a model. Raises PretrainedError when the files do not fit each other."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file is an error at once, never a download
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTokenizer
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()  # warns of precisions that are not lost here
    transformers_logging.disable_progress_bar()  # the log of a server is no terminal
    if files.tokenizer is None:
        raise PretrainedError(f"{files.path} is not a model of other people")
    vocabulary, merges = (files.tokenizer / name for name in ("vocab.json", "merges.txt"))
    pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()
             if line.strip() and not line.startswith("#version")]
    try:
        tokenizer = CLIPTokenizer(vocab=read_json(vocabulary), merges=pairs, model_max_length=77)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise PretrainedError(f"{vocabulary} and {merges} do not fit each other: {error}") from error
    if files.kind == "single_file":
        parts = Parts(tokenizer, *load_single_file(files.path, info.latent_shape[-1]))
    else:
        parts = _load_folder(files, tokenizer)
    known = parts.text_encoder.config.vocab_size
    if len(tokenizer) > known:
        raise PretrainedError(f"{vocabulary} has {len(tokenizer)} tokens and the text encoder {known}: it belongs to "
                              "another model")
    if parts.scheduler_config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise PretrainedError(f"{files.path} predicts {parts.scheduler_config['prediction_type']!r}: only epsilon and "
                              "v_prediction are known here")
    for network in (parts.text_encoder, parts.vae, parts.unet, parts.safety_checker):
        if network is not None:
            network.eval().requires_grad_(False)
            for weight in network.parameters():  # out of the file, whose places would decide how sums are rounded
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return parts


def _load_folder(files: ModelFiles, tokenizer: Any) -> Parts:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    def made(network: Any, part: str, weights: str) -> Any:
        variant = "fp16" if ".fp16." in weights else None
        return network.from_pretrained(files.path / part, local_files_only=True, variant=variant,
                                       use_safetensors=weights.endswith(".safetensors")).float()

    unet_file, vae_file, text_file = (file.name for file in files.weights)
    try:
        text_encoder = made(CLIPTextModel, "text_encoder", text_file)
        vae, unet = made(AutoencoderKL, "vae", vae_file), made(UNet2DConditionModel, "unet", unet_file)
        checker, extractor = _load_checker(files)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise PretrainedError(f"{files.path} cannot be loaded: {detail}") from error
    config = read_json(files.path / "scheduler" / "scheduler_config.json")
    return Parts(tokenizer, text_encoder, vae, unet, config, checker, extractor)


def _load_checker(files: ModelFiles) -> tuple[nn.Module | None, Any]:
    """The folder's own safety checker with what prepares images for it; None twice where it has none."""
    folders = files.path / "safety_checker", files.path / "feature_extractor"
    if not (folders[0] / "config.json").is_file() or not (folders[1] / "preprocessor_config.json").is_file():
        return None, None
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    checker = StableDiffusionSafetyChecker.from_pretrained(folders[0], local_files_only=True)
    return checker, CLIPImageProcessor.from_pretrained(folders[1], local_files_only=True)
