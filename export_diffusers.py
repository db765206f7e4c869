"""How does a model draw where this repository is not, as a pipeline of diffusers?

    python conditional_ldm.py --export-diffusers exported --model models/celeba128

writes a folder that `DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)` draws with: the weights in
`networks/`, the code that they need beside them (`core/nn/source_bundle.py`), the tokenizer as transformers reads it,
and a model card. The two classes below are what is exported; they draw as `FaceGenerator` does.

https://huggingface.co/docs/diffusers/using-diffusers/custom_pipeline_overview
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers import __version__ as diffusers_version
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from core.command import UserError, run_command
from core.diffusion.conditioning import Condition
from core.diffusion.initial_noise import starting_noise
from core.diffusion.latent_correction import LatentCorrection, load_correction
from core.diffusion.sampling import sample
from core.diffusion.schedule import schedule_from_config
from core.diffusion.schedulers import make_scheduler
from core.diffusion.unet import ConditionalUNet, UNetConfig, encode_prompts, load_unet
from core.engine import GenerationRequest
from core.imaging.watermark import mark
from core.nn.autoencoder import VAE, VAEConfig, load_vae
from core.nn.checkpoint import read_index
from core.nn.clip import CLIP, CLIPConfig, load_clip
from core.nn.layers import to_pixels
from core.nn.rewriting_rules import load_prompt_rewriting
from core.nn.source_bundle import bundle
from core.nn.tokenizer import Tokenizer
from core.text.prompt_rewriting import PromptRewriting

ROOT = Path(__file__).resolve().parent
DEFAULT_MODEL = ROOT / "models" / "celeba128"


# ---- what is exported ------------------------------------------------------------------------------------------------


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A dataclass's fields as JSON keeps them, with its tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


class FacesModel(ModelMixin, ConfigMixin):
    """All networks of a model and what belongs to them: text encoder, UNet, VAE, correction, rewriting of prompts."""

    @register_to_config
    def __init__(
        self, clip_config: dict[str, Any], vae_config: dict[str, Any], unet_config: dict[str, Any],
        scheduler: dict[str, Any],
        prompt_rewriting: dict[str, Any], correction: dict[str, Any] | None, image_size: int, latent_shape: list[int],
        guidance_scale: float, sampler: str,
    ) -> None:
        super().__init__()
        self.clip = CLIP(CLIPConfig(**with_tuples(clip_config)))
        self.vae = VAE(VAEConfig(**with_tuples(vae_config)))
        self.unet = ConditionalUNet(UNetConfig(**with_tuples(unet_config)))
        if correction is not None:
            counts = len(correction["scales"]), len(correction["steps"])
            channels, height, width = latent_shape
            shape = (*counts, height, width // 2 + 1, channels, channels, 2)
            self.register_buffer("transport", torch.zeros(shape))
            self.register_buffer("shift", torch.zeros(*counts, *latent_shape))

    @torch.no_grad()
    def generate(
        self, tokenizer: Any, prompt: str, *, count: int, seed: int, steps: int, guidance_scale: float | None,
        negative_prompt: str, sampler: str | None, watermark: bool,
    ) -> np.ndarray:
        """The images of one prompt, the i-th from `seed + i`. Shapes: -> uint8 [count, H, W, 3]."""
        config, device = self.config, self.clip.log_temperature.device
        reader = Tokenizer(tokenizer.backend_tokenizer, self.clip.config.max_length)
        table = PromptRewriting(tuple(config.prompt_rewriting["left_out"]),
                                config.prompt_rewriting["said_again"]).within(reader.encoded_length)
        start = starting_noise(GenerationRequest(prompt, num_images=count, seed=seed), config.latent_shape)

        def encode(text: str) -> Condition:
            return encode_prompts(self.clip, reader, [text], px=config.image_size).to("cpu").repeat(count)

        def network(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            return self.unet(x.to(device), timestep.to(device), condition.to(device)).cpu()

        correction = None
        if config.correction is not None:
            transport = torch.view_as_complex(self.transport.cpu().contiguous())
            correction = LatentCorrection(tuple(config.correction["scales"]), tuple(config.correction["steps"]),
                                          transport,
                                          self.shift.cpu())
        scale = config.guidance_scale if guidance_scale is None else float(guidance_scale)
        x = sample(network, encode(table(prompt)), make_scheduler(sampler or config.sampler, config.scheduler),
                   start.noise, steps, scale, schedule=schedule_from_config(config.scheduler),
                   negative=encode(negative_prompt) if negative_prompt.strip() else None,
                   guidance_range=self.unet.guidance_range, generators=start.generators, correction=correction)
        pixels = to_pixels(self.vae.decode(self.vae.denormalize(x.to(device))))
        return np.stack([mark(one, None) if watermark else one for one in pixels])


class FacesPipeline(DiffusionPipeline):
    """Faces from English; image i of a prompt is that of the generator's seed + i."""

    def __init__(self, networks, tokenizer) -> None:  # type: ignore[no-untyped-def]  # diffusers reads annotations
        super().__init__()
        self.register_modules(networks=networks, tokenizer=tokenizer)

    def __call__(
        self, prompt: str | list[str], negative_prompt: str = "", num_inference_steps: int = 50,
        guidance_scale: float | None = None, num_images_per_prompt: int = 1, generator: torch.Generator | None = None,
        sampler: str | None = None, watermark: bool = True, output_type: str = "pil", return_dict: bool = True,
    ) -> Any:
        """`guidance_scale` and `sampler` None are the model's own; `watermark` puts the invisible mark into the images.
        """
        seed = secrets.randbelow(2**32) if generator is None else generator.initial_seed()
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        drawn = np.concatenate([
            self.networks.generate(
                self.tokenizer, text, count=num_images_per_prompt, seed=seed, steps=num_inference_steps,
                guidance_scale=guidance_scale, negative_prompt=negative_prompt, sampler=sampler, watermark=watermark)
            for text in texts])
        images = [Image.fromarray(one) for one in drawn] if output_type == "pil" else drawn / np.float32(255)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


# ---- and how ---------------------------------------------------------------------------------------------------------

CARD = """---
license: other
license_name: non-commercial-research
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusers
- faces
- celeba
datasets:
- CelebA
language:
- en
inference: false
---

# {name}

One {size} x {size} face from an English sentence. Networks of their own, trained from scratch on CelebA; their code
lies beside the weights, so loading needs `trust_remote_code=True`.

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
image = pipeline("a smiling woman", num_inference_steps=50, generator=torch.Generator().manual_seed(7)).images[0]
```

Image i of a prompt is that of the generator's seed + i. `guidance_scale` is {scale:g} and the sampler {sampler} when
left out. Images carry an invisible mark unless `watermark=False`.

{card}
"""


def export(model: Path, folder: Path) -> Path:
    """Write the pipeline of a model folder; returns where it is. Written aside and renamed.

    Raises UserError when the folder is there and no earlier export, ModelFolderError for a damaged model.
    """
    index_file = folder / "model_index.json"
    if folder.exists() and (not index_file.is_file() or "FacesPipeline" not in index_file.read_text(encoding="utf-8")):
        raise UserError(f"{folder} is there and holds something else: give a folder that is not there yet")
    index, (clip, tokenizer), vae = read_index(model), load_clip(model), load_vae(model)
    unet, correction, prompt_rewriting = load_unet(model, vae=vae), load_correction(model), load_prompt_rewriting(model)
    scheduler = json.loads((model / "scheduler" / "config.json").read_text(encoding="utf-8"))
    configs: list[dict[str, Any]] = [json.loads(json.dumps(asdict(one.config))) for one in (clip, vae, unet)]
    faces = FacesModel(
        *configs, scheduler=scheduler,
        prompt_rewriting={"left_out": list(prompt_rewriting.dropped_negations),
                          "said_again": dict(prompt_rewriting.appended_phrases)},
        correction=correction and {"scales": list(correction.scales), "steps": list(correction.steps)},
        image_size=index["image_size"], latent_shape=list(index["latent_shape"]),
        guidance_scale=float(index["defaults"]["guidance_scale"]), sampler=index["defaults"]["sampler"],
    )
    for mine, theirs in ((faces.clip, clip), (faces.vae, vae), (faces.unet, unet)):
        mine.load_state_dict({name: value.contiguous() for name, value in theirs.state_dict().items()})
    if correction is not None:
        faces.transport.copy_(torch.view_as_real(correction.transport))
        faces.shift.copy_(correction.shift)
    aside = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    faces.eval().save_pretrained(aside / "networks")
    why = "The networks of this pipeline and how they draw. Collected from a larger project; see README.md."
    (aside / "networks" / "networks.py").write_text(bundle([FacesModel], ROOT, why), encoding="utf-8")
    why = "The pipeline: prompts in, images out."
    (aside / "pipeline.py").write_text(bundle([FacesPipeline], ROOT, why), encoding="utf-8")
    save_tokenizer(model, tokenizer, aside / "tokenizer")
    (aside / "model_index.json").write_text(json.dumps({
        "_class_name": ["pipeline", "FacesPipeline"], "_diffusers_version": diffusers_version,
        "networks": ["networks", "FacesModel"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    }, indent=2), encoding="utf-8")
    (aside / "README.md").write_text(card_of(model, index), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder


def save_tokenizer(model: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """The tokenizer as `PreTrainedTokenizerFast.from_pretrained` reads it."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(model / "clip" / "tokenizer.json"),
                                   model_max_length=tokenizer.max_length)
    fast.save_pretrained(folder)


def card_of(model: Path, index: Mapping[str, Any]) -> str:
    """README.md with the metadata that the Hub wants; https://huggingface.co/docs/hub/model-cards"""
    path = model / "MODEL_CARD.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    text = re.sub(r"!?\[([^\]]*)\]\((?![a-z]+:)[^)]*\)", r"\1", text)  # what it points to is not beside it
    text = re.sub(r"^# .*\n", "", text, count=1)
    return CARD.format(name=index["name"], size=index["image_size"], scale=float(index["defaults"]["guidance_scale"]),
                       sampler=index["defaults"]["sampler"], card=text.strip())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="export_diffusers.py", description="Write a model for diffusers.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("folder", type=Path, nargs="?", help="where to write it")
    target.add_argument("--export-diffusers", type=Path, dest="target", metavar="FOLDER", help="the same")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a model folder (%(default)s)")
    arguments = parser.parse_args(argv)
    print(export(arguments.model, arguments.folder or arguments.target))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
