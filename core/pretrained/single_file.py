"""How does a single file of the original Stable Diffusion 1.x code become networks?

The file has no configuration. All sizes are in the shapes of its tensors; what is not (32 groups of channels, 8 heads
in the UNet, 64 channels a head in the text encoder, the noise schedule) is the same in the whole family and stands
here. So nothing is looked up elsewhere. diffusers renames the keys.

Numbers of the family: https://github.com/CompVis/stable-diffusion (configs/stable-diffusion/v1-inference.yaml).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.pretrained.recognition import CONV_IN, CROSS, TEXT, UNET, VAE, PretrainedError, Shapes, open_pickle

SCHEDULER: dict[str, Any] = {  # of the whole 1.x family
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
    "prediction_type": "epsilon",
}
NUM_HEADS, HEAD_WIDTH, NUM_GROUPS, SCALE = 8, 64, 32, 0.18215  # SCALE makes the VAE's latents of deviation 1


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .ckpt or .bin file, on the CPU. Raises PretrainedError."""
    if path.suffix != ".safetensors":
        return open_pickle(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PretrainedError(f"{path} cannot be read ({error}): copy it again") from error


def count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers stand in the group of `pattern` among the names."""
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})


def unet_config(shapes: Shapes, sample_size: int) -> dict[str, Any]:
    """`UNet2DConditionModel`'s configuration. An input block is a convolution, `layers` blocks a level, a reduction."""
    reductions = count(shapes, re.escape(UNET) + r"input_blocks\.(\d+)\.0\.op\.weight")
    levels = reductions + 1
    layers = (count(shapes, re.escape(UNET) + r"input_blocks\.(\d+)\.") - 1 - reductions) // levels
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    channels = [shapes[f"{UNET}input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts]
    attends = [f"{UNET}input_blocks.{first}.1.norm.weight" in shapes for first in firsts]
    return {
        "sample_size": sample_size, "in_channels": shapes[CONV_IN][1],
        "out_channels": shapes[UNET + "out.2.weight"][0], "layers_per_block": layers, "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": shapes[CROSS][1], "attention_head_dim": NUM_HEADS, "norm_num_groups": NUM_GROUPS,
    }


def vae_config(shapes: Shapes, image_size: int) -> dict[str, Any]:
    """`AutoencoderKL`'s configuration."""
    levels = count(shapes, re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    down = f"{VAE}encoder.down"
    return {
        "sample_size": image_size, "in_channels": 3, "out_channels": 3, "norm_num_groups": NUM_GROUPS,
        "latent_channels": shapes[VAE + "post_quant_conv.weight"][0], "scaling_factor": SCALE,
        "block_out_channels": [shapes[f"{down}.{level}.block.0.conv2.weight"][0] for level in range(levels)],
        "layers_per_block": count(shapes, re.escape(down) + r"\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(shapes: Shapes) -> dict[str, Any]:
    """`CLIPTextModel`'s configuration, from tensors named without a prefix."""
    tokens, width = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": tokens, "hidden_size": width, "num_attention_heads": max(1, width // HEAD_WIDTH),
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, r"encoder\.layers\.(\d+)\."), "hidden_act": "quick_gelu",
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokens - 1,
    }


def load_single_file(path: Path, sample_size: int) -> tuple[nn.Module, nn.Module, nn.Module, dict[str, Any]]:
    """(text encoder, VAE, UNet, scheduler configuration) in fp32 on the CPU. Raises PretrainedError."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tensors = read_tensors(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    texts = {name.removeprefix(TEXT).removeprefix("text_model."): value for name, value in tensors.items()
             if name.startswith(TEXT) and not name.endswith("position_ids")}
    try:
        config = text_config({name: tuple(value.shape) for name, value in texts.items()})
        text_encoder = CLIPTextModel(CLIPTextConfig(**config))
        text_encoder.load_state_dict(texts, strict=True)
        unet = _converted(UNet2DConditionModel, tensors, UNET, unet_config(shapes, sample_size))
        vae = _converted(AutoencoderKL, tensors, VAE, vae_config(shapes, sample_size * 8))
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        detail = " ".join(str(error).split())[:300]
        raise PretrainedError(f"{path} does not fit Stable Diffusion 1.x: {detail}") from error
    return text_encoder, vae, unet, dict(SCHEDULER)


def _converted(network: Any, tensors: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any]) -> nn.Module:
    """The network with the tensors under this prefix; diffusers wants its configuration in a folder."""
    own = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"_class_name": network.__name__, **config}))
        return network.from_single_file(own, config=folder, local_files_only=True).float()
