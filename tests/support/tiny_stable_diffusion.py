"""A random Stable Diffusion 1.x of the true architecture, some megabytes large, in its three formats.

UNet2DConditionModel, AutoencoderKL and CLIPTextModel with the family's blocks and few channels, and a byte-pair
tokenizer that is trained on the spot. What it generates is noise; formats, shapes, schedulers and words are real.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core.pretrained.single_file import SCHEDULER
from core.text.captions import draw_caption
from core.text.lexicon import ATTRIBUTES

START, END = "<|startoftext|>", "<|endoftext|>"
SIZE = 64  # pixels a side
BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP_BLOCKS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


class TinyStableDiffusion(NamedTuple):
    """The same weights three times, and diffusers' own pipeline with the folder's scheduler configuration."""

    folder: Path
    safetensors: Path
    ckpt: Path
    pipeline: StableDiffusionPipeline
    scheduler_config: Mapping[str, Any]


def train_bpe(folder: Path, size: int = 1200) -> CLIPTokenizer:
    """CLIP's kind of tokenizer, trained on captions; writes vocab.json and merges.txt into `folder`."""
    rng = random.Random(0)
    captions = [draw_caption([rng.random() < 0.3 for _ in ATTRIBUTES], rng).text for _ in range(300)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>",
                                  show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for letter in alphabet:  # each letter also ends words
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    for token in (START, END):
        vocabulary[token] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair.split()) for pair in pairs], model_max_length=77)


def build(folder: Path, seed: int = 0) -> TinyStableDiffusion:
    """Make it, and write it as `folder`/tiny, `folder`/single/tiny.safetensors and `folder`/single/tiny.ckpt."""
    single = folder / "single"
    tokenizer = train_bpe(single)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=1, max_position_embeddings=77, hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id))
        unet = UNet2DConditionModel(
            sample_size=SIZE // 8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32,
            block_out_channels=(32, 64, 64, 64), down_block_types=BLOCKS, up_block_types=UP_BLOCKS,
            cross_attention_dim=64, attention_head_dim=8)
        with torch.no_grad():
            unet.conv_out.weight *= 0.05  # untrained, it finds no noise to remove: rounding must not grow at each step
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, sample_size=SIZE, norm_num_groups=32,
            block_out_channels=(32, 32, 32, 32), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4)
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=PNDMScheduler.from_config(SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "tiny")
    published = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SCHEDULER}  # knows no spacing yet
    (folder / "tiny" / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
    for name in ("vocab.json", "merges.txt"):  # as folders of the family have them
        shutil.copy(single / name, folder / "tiny" / "tokenizer" / name)
    tensors = original_layout(pipeline)
    save_file(tensors, single / "tiny.safetensors")
    torch.save({"state_dict": tensors, "global_step": 470000}, single / "tiny.ckpt")
    config = PNDMScheduler.from_pretrained(folder / "tiny" / "scheduler").config
    return TinyStableDiffusion(folder / "tiny", single / "tiny.safetensors", single / "tiny.ckpt", pipeline, config)


def original_layout(pipeline: Any) -> dict[str, Tensor]:
    """All weights under the names of the original code, as the published single files have them."""
    found = {f"model.diffusion_model.{unet_name(name)}": value for name, value in pipeline.unet.state_dict().items()}
    for name, value in pipeline.vae.state_dict().items():
        new = vae_name(name)
        is_projection = ".attn_1." in new and new.endswith("weight") and not new.endswith("norm.weight")
        found[f"first_stage_model.{new}"] = value[:, :, None, None] if is_projection else value
    for name, value in pipeline.text_encoder.state_dict().items():
        plain = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{plain}"] = value
    return {name: value.contiguous().clone() for name, value in found.items()}


RESNET = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
          ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"))


def unet_name(name: str) -> str:
    """diffusers' name of a tensor of the UNet -> the original one."""
    for new, old in (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
                     ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2")):
        if name.startswith(new + "."):
            return name.replace(new, old, 1)
    words = name.split(".")
    if words[0] == "mid_block":
        place = 1 if words[1] == "attentions" else 2 * int(words[2])
        block, rest = f"middle_block.{place}", words[3:]
        kind = words[1]
    else:
        level, kind, number, rest = int(words[1]), words[2], int(words[3]), words[4:]
        if words[0] == "down_blocks":
            place = 3 * level + number + 1
            block = f"input_blocks.{place}.{int(kind == 'attentions')}"
            if kind == "downsamplers":
                return f"input_blocks.{3 * (level + 1)}.0.op.{rest[-1]}"
        else:
            block = f"output_blocks.{3 * level + number}.{int(kind == 'attentions')}"
            if kind == "upsamplers":
                return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.conv.{rest[-1]}"
    tail = ".".join(rest)
    if kind == "resnets":
        for new, old in RESNET:
            if tail.startswith(new + "."):
                tail = tail.replace(new, old, 1)
                break
    return f"{block}.{tail}"


def vae_name(name: str) -> str:
    """diffusers' name of a tensor of the VAE -> the original one."""
    for new, old in (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
                     ("mid_block.attentions.0", "mid.attn_1"), ("conv_norm_out", "norm_out"),
                     ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"),
                     ("to_v", "v"), ("to_out.0", "proj_out"), ("downsamplers.0", "downsample"),
                     ("upsamplers.0", "upsample"), (".resnets.", ".block.")):
        name = name.replace(new, old)
    words = name.split(".")
    if "down_blocks" in words:
        words[words.index("down_blocks")] = "down"
    if "up_blocks" in words:
        place = words.index("up_blocks")
        words[place : place + 2] = ["up", str(3 - int(words[place + 1]))]
    return ".".join(words)
