"""A complete model folder of the `tiny` presets, made in a second: real networks and tokenizer, untrained weights.

For tests of everything around the trained weights. What it generates is noise, but seeds, steps, shapes and files are
real.
"""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path

import torch

from conditional_ldm import PRESETS as UNETS
from conditional_ldm import release
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.unet import ConditionalUNet
from core.evaluation.attribute_classifier import AttributeClassifier, AttributeClassifierConfig
from core.nn.checkpoint import component_hash, save_component
from core.text.captions import draw_caption
from core.text.lexicon import ATTRIBUTES
from train_clip import CLIP, train_tokenizer
from train_clip import PRESETS as CLIPS
from vae import PRESETS as VAES
from vae import VAE, encoder_hash, load_vae, with_kernel

SHARPENING = torch.tensor([[0.0, -0.25, 0.0], [-0.25, 2.0, -0.25], [0.0, -0.25, 0.0]])


def bundled_model() -> Path | None:
    """The model folder that users get, when it is here and whole."""
    folder = Path(__file__).resolve().parents[2] / "models" / "celeba128"
    whole = all((folder / part / "model.safetensors").is_file() for part in ("vae", "clip", "unet"))
    return folder if whole else None


def build_attribute_classifier(folder: Path, seed: int = 1) -> Path:
    """An attribute classifier that has learned nothing but has an prediction; returns its folder, such as
    `models/judge`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = AttributeClassifier(AttributeClassifierConfig())
    config = {"blocks": [1, 1, 1, 1], "num_attributes": 40, "px_classes": [58, 80, 128]}
    save_component(folder, "judge", classifier.state_dict(), config)
    return folder


def build_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write the folder as training would, component after component; returns it."""
    rng = random.Random(seed)
    captions = [draw_caption([rng.random() < 0.3 for _ in ATTRIBUTES], rng).text for _ in range(300)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_config = CLIPS["tiny"]
        tokenizer = train_tokenizer(captions, clip_config.pieces, clip_config.max_length)
        clip_config = replace(clip_config, pieces=tokenizer.size)
        clip, vae, unet = CLIP(clip_config), VAE(VAES["tiny"]), ConditionalUNet(UNETS["tiny"])
        with torch.no_grad():
            for network in (vae, unet):  # new blocks are the identity and the head is silent: let them say something
                for name, weight in network.named_parameters():
                    if not bool(weight.any()) and name.endswith("weight"):
                        weight.normal_(std=0.05)
        vae.latent_std.fill_(0.5)
        vae = with_kernel(vae, SHARPENING)
    save_component(folder, "clip", clip.state_dict(), {"network": asdict(clip_config)})
    tokenizer.save(folder / "clip" / "tokenizer.json")
    save_component(folder, "vae", vae.state_dict(), {"network": asdict(vae.config)})
    parents = {"vae": encoder_hash(load_vae(folder)), "clip": component_hash(folder, "clip")}
    release(unet, folder, NoiseSchedule(), parents, training={}, guidance_scale=2.0)
    return folder
