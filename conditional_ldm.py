"""How does noise become a face that fits a sentence? The conditional latent-diffusion UNet.

Network, training loop, command line. The UNet predicts v at one noise level from the noisy whitened latent, the text
(cross-attention to its tokens, its pooled embedding) and ``px``, the real resolution of the source picture: soft
enlargements teach shapes and people, and asking for 128 px keeps their blur out of what is drawn. It does not know how
pictures are encoded (vae.py) or sentences are (train_clip.py). Long because a reader should find all of the UNet here:
network, training loop, what is distilled from it, drawing; the mathematics is in core/.

    python conditional_ldm.py --train                              train on cached latents, release to the model folder
    python conditional_ldm.py --fit-soft-from                      from which noise level on soft pictures teach no blur
    python conditional_ldm.py --distill guidance                   teach the released UNet to guide itself in one pass
    python conditional_ldm.py --distill consistency                and another, `turbo`, to draw in two to four
    python conditional_ldm.py --eval --prompt "a smiling woman"    write a grid of pictures
    python conditional_ldm.py --eval --gallery runs/gallery        write sheets of twenty prompts, nothing picked out

Sources: latent diffusion https://arxiv.org/abs/2112.10752, adaptive norm https://arxiv.org/abs/2105.05233 (ADM) and
https://arxiv.org/abs/2212.09748 (zero-initialised branches), query-key normalisation https://arxiv.org/abs/2302.05442,
micro-conditioning on resolution https://arxiv.org/abs/2307.01952.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.command import SettingError, check_numbers, run_command, run_lock
from core.diffusion.conditioning import Condition
from core.diffusion.distillation import GUIDANCE_RANGE, SHARE_OFF, Away, Lesson, Teacher, make_lesson
from core.diffusion.latent_correction import Correction, load_correction
from core.diffusion.sampling import sample
from core.diffusion.schedule import NoiseSchedule, schedule_from_config
from core.diffusion.schedulers import TURBO, TURBO_STEPS, scheduler_config
from core.nn.checkpoint import (
    ModelFolderError,
    build,
    component_hash,
    drop_component,
    git_commit,
    load_component,
    load_difference,
    load_strictly,
    read_component_config,
    read_index,
    save_component,
    save_difference,
    update_index,
    write_json,
)
from core.nn.layers import PixelNorm
from core.nn.rewriting_rules import load_emphasis
from core.quiet import keep_quiet
from core.text.prompt_rewriting import Emphasis, unread_from, unread_warning
from vae import VAE

if TYPE_CHECKING:
    from core.training.latent_cache import LatentCache
    from dataset import FaceStore

# ------------------------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class UNetConfig:
    """Widths per level (16x16, 8x8, 4x4), blocks per level, which levels attend, which guidance scales one pass answers
    (none before `--distill guidance`), and by which layers."""

    latent_channels: int | None = 16  # None in a preset: those of the VAE
    channels: tuple[int, ...] = (96, 192, 192)
    blocks: tuple[int, ...] = (2, 2, 2)
    attention: tuple[bool, ...] = (False, True, True)
    head_width: int = 32
    text_width: int = 192
    embed_width: int = 384
    dropout: float = 0.1
    guidance_range: tuple[float, float] | None = None
    guided_attention: bool | None = None  # does guidance change what self-attention adds, too
    position_maps: bool | None = None  # learned maps are added at 16x16 and 8x8: aligned faces have places


PRESETS = {
    "celeba128": UNetConfig(channels=(112, 224, 224)),
    "small": UNetConfig(channels=(80, 160, 192), blocks=(1, 2, 1), embed_width=256, dropout=0.0),
    "small-positions": UNetConfig(None, channels=(80, 160, 192), blocks=(1, 2, 1), embed_width=256, dropout=0.0,
                                  position_maps=True),
    "tiny": UNetConfig(4, (16, 24), (1, 1), (False, True), 8, 32, 32, 0.0),
}
RUNS = {  # how long a run of each preset is
    "celeba128": {"steps": 50000, "batch_size": 64, "warmup_steps": 200, "cache": "runs/latents"},
    "small": {"steps": 50000, "batch_size": 64, "warmup_steps": 200, "cache": "runs/latents"},
    "small-positions": {"steps": 50000, "batch_size": 64, "warmup_steps": 200, "cache": "runs/latents"},
    "tiny": {"steps": 10, "batch_size": 8, "warmup_steps": 1, "cache": "runs/tiny-latents"},  # not for a real cache
}


def sinusoid(values: Tensor, width: int, longest: float = 10000.0) -> Tensor:
    """[B] -> [B, width]: cosines and sines at geometrically spaced frequencies (https://arxiv.org/abs/1706.03762)."""
    frequencies = torch.exp(torch.arange(width // 2, device=values.device) * (-math.log(longest) / (width // 2)))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_layer(width: int, config: UNetConfig) -> nn.Linear | None:
    """What the second half of the embedding, which is 0 at guidance scale 1, changes in a block; at first nothing.

    Small layers beside frozen blocks are enough to learn guidance: https://arxiv.org/abs/2503.07274.
    """
    if config.guidance_range is None:
        return None
    layer = nn.Linear(config.embed_width, width, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


class AdaptiveResBlock(nn.Module):
    """Residual block whose second norm is scaled and shifted by the embedding. x [B, a, H, W], embedding [B, E]."""

    def __init__(self, a: int, b: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = PixelNorm(a)
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.norm2 = PixelNorm(b)
        self.modulation = nn.Linear(config.embed_width, 2 * b)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Identity() if a == b else nn.Conv2d(a, b, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.guidance = guidance_layer(2 * b, config)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        modulation = self.modulation(embedding[:, : self.modulation.in_features])
        if self.guidance is not None:
            modulation = modulation + self.guidance(embedding[:, -self.guidance.in_features :])
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), scale + 1)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys; ``context`` None attends to x itself.

    ``perturbed``: every position hears itself alone, whatever it would attend to (the identity as attention map,
    https://arxiv.org/abs/2403.17377). Shapes: x [B, N, C], context [B, L, T], mask [B, L] bool, result [B, N, C].
    """

    perturbed = False

    def __init__(self, width: int, context_width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.norm_q, self.norm_k = nn.LayerNorm(head_width, bias=False), nn.LayerNorm(head_width, bias=False)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch, count, width = x.shape
        h = self.norm(x)
        source = h if context is None else context
        q = self.q(h).view(batch, count, self.heads, -1).transpose(1, 2)  # [B, H, N, D]
        k, v = self.kv(source).view(batch, source.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        attend = None if mask is None else mask[:, None, None, :]
        h = v if self.perturbed else F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        return x + self.out(h.transpose(1, 2).reshape(batch, count, width))


def louder(before: Tensor, after: Tensor, embedding: Tensor, layer: nn.Linear | None) -> Tensor:
    """What attention made of a sequence [B, N, C], with what it added times 1 + what the layer says to guidance."""
    if layer is None:
        return after
    return after + layer(embedding[:, -layer.in_features :])[:, None] * (after - before)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, over the positions of a feature map [B, C, H, W]."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.self_attention = Attention(width, width, config.head_width)
        self.cross_attention = Attention(width, config.text_width, config.head_width)
        self.norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        nn.init.zeros_(self.feed[2].weight)
        nn.init.zeros_(self.feed[2].bias)
        self.guidance = guidance_layer(width, config)
        self.self_guidance = guidance_layer(width, config) if config.guided_attention else None

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        h = x.permute(0, 2, 3, 1).reshape(batch, height * columns, width)  # free for channels-last tensors
        h = louder(h, self.self_attention(h), embedding, self.self_guidance)
        h = louder(h, self.cross_attention(h, tokens, mask), embedding, self.guidance)
        h = h + self.feed(self.norm(h))
        return h.view(batch, height, columns, width).permute(0, 3, 1, 2)


class Level(nn.Module):
    """The blocks of one resolution on one side of the U."""

    def __init__(self, inputs: Sequence[int], width: int, attention: bool, config: UNetConfig) -> None:
        super().__init__()
        self.res = nn.ModuleList(AdaptiveResBlock(a, width, config) for a in inputs)
        self.attention = nn.ModuleList(TransformerBlock(width, config) for _ in inputs) if attention else None

    def step(self, index: int, x: Tensor, embedding: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Run block ``index``: [B, a, H, W] -> [B, width, H, W]."""
        x = self.res[index](x, embedding)
        return x if self.attention is None else self.attention[index](x, embedding, tokens, mask)


class ConditionalUNet(nn.Module):
    """v prediction of a noisy whitened latent. x [B, C, 16, 16], timestep [B] in [0, 1000) -> [B, C, 16, 16]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, width = config.channels, config.embed_width
        self.null_tokens = nn.Parameter(torch.randn(1, 1, config.text_width) * 0.5)
        self.null_pooled = nn.Parameter(torch.randn(1, config.text_width) * 0.5)
        self.time_embed = nn.Linear(128, width)
        self.px_embed = nn.Linear(32, width)
        self.pooled_embed = nn.Sequential(nn.LayerNorm(config.text_width), nn.Linear(config.text_width, width))
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        if config.guidance_range is not None:
            self.guidance_embed = nn.Sequential(nn.Linear(128 + 32 + config.text_width, width), nn.SiLU())

        self.door = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for i, (wide, count) in enumerate(zip(widths, config.blocks, strict=True)):
            self.down.append(Level([wide] * count, wide, config.attention[i], config))
            if i + 1 < len(widths):
                self.shrink.append(nn.Conv2d(4 * wide, widths[i + 1], 1))
        if config.position_maps:  # start at zero, so that they change nothing until something is learned
            self.position_maps = nn.ParameterList(nn.Parameter(torch.zeros(wide, 16 >> i, 16 >> i))
                                                  for i, wide in enumerate(widths[:2]))
        self.middle = Level([widths[-1]], widths[-1], config.attention[-1], config)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(widths))):
            self.up.append(Level([2 * widths[i]] * config.blocks[i], widths[i], config.attention[i], config))
            if i > 0:
                self.grow.append(nn.Conv2d(widths[i], 4 * widths[i - 1], 1))
        self.norm = PixelNorm(widths[0])
        self.head = nn.Conv2d(widths[0], config.latent_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        tokens, mask, pooled = self.text(condition)
        px = sinusoid(torch.log2(condition.px.float() / 128.0) * 100.0, 32, longest=100.0)
        told = self.time_embed(sinusoid(timestep, 128)) + self.px_embed(px) + self.pooled_embed(pooled)
        embedding = self.embed(told)
        if self.guidance_range is not None:
            w = condition.guidance - 1.0  # guidance is linear in this, and so is the start: at scale 1 exactly nothing
            codes = [sinusoid(timestep, 128), sinusoid(w, 32, longest=100.0), self.pooled_embed[0](pooled)]
            embedding = torch.cat([embedding, 0.2 * w[:, None] * self.guidance_embed(torch.cat(codes, dim=1))], dim=1)

        h = self.door(x.contiguous(memory_format=torch.channels_last))  # [B, c0, 16, 16]
        skips = []
        for i, level in enumerate(self.down):
            if self.config.position_maps and i < len(self.position_maps):
                h = h + self.position_maps[i]
            for block in range(len(level.res)):
                h = level.step(block, h, embedding, tokens, mask)
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](F.pixel_unshuffle(h, 2).contiguous(memory_format=torch.channels_last))
        h = self.middle.step(0, h, embedding, tokens, mask)  # [B, c2, 4, 4]
        for i, level in enumerate(self.up):
            for block in range(len(level.res)):
                h = level.step(block, torch.cat([h, skips.pop()], dim=1), embedding, tokens, mask)
            if i < len(self.grow):
                h = F.pixel_shuffle(self.grow[i](h), 2).contiguous(memory_format=torch.channels_last)
        return self.head(F.silu(self.norm(h))).float()

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The guidance scales that one pass answers; None before distillation."""
        return self.config.guidance_range

    def text(self, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and pooled embedding with the learned null where ``condition.null`` says so."""
        null = condition.null
        tokens = torch.where(null[:, None, None], self.null_tokens.to(condition.tokens.dtype), condition.tokens)
        first = torch.arange(condition.mask.shape[1], device=null.device) == 0
        mask = torch.where(null[:, None], first[None], condition.mask)
        return tokens, mask, torch.where(null[:, None], self.null_pooled.to(condition.pooled.dtype), condition.pooled)


def load_unet(folder: str | Path, device: torch.device | str = "cpu", vae: VAE | None = None) -> ConditionalUNet:
    """The trained UNet of a model folder, refused when its VAE or CLIP was replaced after training.

    ``vae`` is that of the folder, for whoever has loaded it already.
    """
    config, state = load_component(folder, "unet")
    from vae import encoder_hash, load_vae

    parents = config["parents"]
    found = {"vae": encoder_hash(load_vae(folder) if vae is None else vae), "clip": component_hash(folder, "clip")}
    wrong = [name for name, value in found.items() if parents[name] != value]
    if wrong:
        raise ModelFolderError(f"the UNet in {folder} was trained with another {' and '.join(wrong)}; run "
                         "`python conditional_ldm.py --train` again or restore the folder")
    return frozen(build(lambda: ConditionalUNet(read_config(config)), state, "the UNet"), device)


def read_config(config: Mapping[str, Any]) -> UNetConfig:
    """The network of a component's ``config.json``."""
    return UNetConfig(**{key: tuple(value) if isinstance(value, list) else value
                         for key, value in config["network"].items()})


def write_config(config: UNetConfig) -> dict[str, Any]:
    """The same as JSON has it; what a network does not have is not mentioned."""
    return {key: value for key, value in json.loads(json.dumps(asdict(config))).items() if value is not None}


def perturbed(model: ConditionalUNet) -> ConditionalUNet:
    """The same weights, deaf to what stands elsewhere in the picture: all self-attention is perturbed. What this
    network draws worse is what attention was for: to lead away from it is to lead to faces that hold together."""
    other = copy.deepcopy(model)
    for block in other.modules():
        if isinstance(block, TransformerBlock):
            block.self_attention.perturbed = True
    return other


def frozen(model: ConditionalUNet, device: torch.device | str) -> ConditionalUNet:
    """For use: no dropout, no gradients, the layout that is fast."""
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def encode_prompts(clip: Any, tokenizer: Any, prompts: Sequence[str], px: float = 128.0) -> Condition:
    """Prompts -> Condition on the text encoder's device; an empty prompt becomes the learned null."""
    device = clip.log_temperature.device
    ids, mask = (t.to(device) for t in tokenizer(list(prompts)))
    embedding = clip.encode_text(ids, mask)
    null = torch.tensor([not prompt.strip() for prompt in prompts], device=device)
    return Condition(embedding.tokens, embedding.mask, embedding.pooled,
                     torch.full((len(ids),), float(px), device=device), null)


# ------------------------------------------------------------------------------------------------------------ training

EDGES = ("door", "head", "null_pooled", "time_embed", "px_embed", "guidance_embed", "position_maps")  # not for Muon
BUCKETS = 5  # the loss is logged for this many equal slices of the noise levels


class Faces:
    """Everything around the UNet that a training run needs, from one place: data, VAE and text encoder."""

    def __init__(self, args: argparse.Namespace, accelerator: Any, schedule: NoiseSchedule) -> None:
        from core.training.caption_cache import cached_bank, encode_captions, fits_encoded
        from core.training.latent_cache import Lessons
        from dataset import DataError, FaceStore
        from train_clip import load_clip
        from vae import load_vae

        device = accelerator.device
        self.store = FaceStore.open(args.data)
        if args.favour and self.store.text_labels is not None:
            raise DataError(f"--favour {' '.join(args.favour)}: {args.data} has its user's own captions, no attributes")
        indices = self.store.select(split="train", px=args.px)
        self.vae = load_vae(args.model, device)
        self.clip, self.tokenizer = load_clip(args.model, device)
        cache = encoded(self.vae, self.store, indices, Path(args.cache), accelerator)
        bank = cached_bank(Path(args.cache) / "captions.npz", self.store, indices, self.tokenizer, accelerator,
                           captions_per_image=args.captions_per_image, seed=args.seed, empty_share=0.0).to(device)
        read = encode_captions(self.clip, bank, accelerator) if fits_encoded(self.clip, bank) else None
        px = self.store.px[indices]
        self.lessons = Lessons(
            cache, read or bank, (read or self.clip).encode_text, torch.from_numpy(px.astype(np.float32)).to(device),
            favoured_rows(self.store.attributes[indices], args.favour, args.favour_times,
                          np.where(px == 128, args.sharp_times, 1)), schedule, args.seed,
            args.batch_size, args.caption_dropout, args.accumulate,
            lowest_timesteps(px, args.soft_from).to(device) if args.soft_from else None,
            share_off={None: None, "guidance": 0.0, "consistency": SHARE_OFF}[args.distill])

    def held_out(self, schedule: NoiseSchedule, accelerator: Any, limit: int = 1024) -> list[Any]:
        """Batches of held-out sharp faces, the same for every checkpoint."""
        from core.nn.layers import to_images
        from core.training.caption_cache import build_caption_bank
        from core.training.latent_cache import held_out

        rows = self.store.select(split="val", px=128)[:limit]
        bank = build_caption_bank(self.store, rows, self.tokenizer, captions_per_image=1, seed=99, empty_share=0.0)

        def encode(some: slice) -> Tensor:
            images = to_images(torch.from_numpy(self.store.images[rows[some]]).to(accelerator.device))
            return self.vae.whiten(self.vae.encode(images).mean)

        return list(held_out(encode, bank, self.clip.encode_text, schedule, accelerator))


def encoded(vae: Any, store: FaceStore, indices: np.ndarray, folder: Path, accelerator: Any) -> LatentCache:
    """The latents of the chosen images, made anew where ``folder`` has those of another encoder or of other images."""
    import hashlib

    from core.nn.layers import to_images
    from core.training.latent_cache import cached_latents
    from vae import encoder_hash

    _, scale = vae.statistics

    @torch.inference_mode()
    def encode(rows: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        images = to_images(torch.from_numpy(store.images[indices[rows]]).to(accelerator.device))
        found = []
        for view in (images, images.flip(-1)):
            with accelerator.autocast():
                posterior = vae.encode(view.contiguous(memory_format=torch.channels_last))
            found.append((vae.whiten(posterior.mean), posterior.std / scale))
        return found[0], found[1]

    names = "\n".join(store.image_id[indices]).encode()
    key = {"encoder": encoder_hash(vae), "images": hashlib.sha256(names).hexdigest()}
    return cached_latents(folder, key, (len(indices), vae.config.latent_channels, 16, 16), encode, accelerator)


def check_parents(args: argparse.Namespace) -> None:
    """Do the parts that a UNet is trained with have the widths that it is made for? Before anything is loaded.

    Raises ModelFolderError naming the first that has another.
    """
    if args.distill:  # a copy of the UNet that is there
        return
    wanted = PRESETS[args.preset]
    if wanted.latent_channels is None:
        wanted = replace(wanted, latent_channels=read_component_config(args.model, "vae")["network"]["latent_channels"])
    for component, field, width in (("vae", "latent_channels", wanted.latent_channels),
                                    ("clip", "text_width", wanted.text_width)):
        found = read_component_config(args.model, component)["network"][field]
        if found != width:
            raise ModelFolderError(f"--preset {args.preset} makes a UNet for {field} {width}, and the {component} in "
                                   f"{args.model} has {found}: name another --preset, or another folder with --model")
    if args.init:
        start = read_config(read_component_config(args.init, "unet"))
        wrong = [name for name in ("latent_channels", "channels", "blocks", "attention", "head_width", "text_width",
                                   "embed_width") if getattr(start, name) != getattr(wanted, name)]
        if wrong:
            there, asked = getattr(start, wrong[0]), getattr(wanted, wrong[0])
            raise ModelFolderError(f"the UNet in {args.init} has {wrong[0]} {there}, and --preset {args.preset} "
                                   f"{asked}: name the --preset that it was trained with")


def train(args: argparse.Namespace) -> None:
    """The training loop of the UNet, and of what is distilled from it; the same command resumes. Ends by releasing the
    better of both EMA lengths."""
    from core.training.accelerator import (
        attention_kernel,
        average_gradients,
        make_accelerator,
        mean_over_processes,
        process_slice,
    )
    from core.training.ema import PowerEMA
    from core.training.optim import StepGuard, learning_rate
    from core.training.randomness import mix_seed
    from core.training.release import check_release, releasing
    from core.training.run_folder import RunFolder, circumstances
    from dataset import FaceStore
    from vae import encoder_hash

    FaceStore.open(args.data)  # where there is none, that is what is said first
    check_parents(args)
    made = "turbo" if args.distill == "consistency" else "unet"
    check_release(args.model, made, replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    schedule = NoiseSchedule(args.schedule, weighting=args.loss_weight, begin=tuple(args.begin))
    teacher, turbo = find_teacher(args, accelerator) if args.distill else None, args.distill == "consistency"
    if teacher is not None:
        schedule = read_schedule(args.model)
    faces = Faces(args, accelerator, schedule)
    torch.manual_seed(args.seed)
    network = replace(PRESETS[args.preset], latent_channels=faces.vae.config.latent_channels)  # checked, or left open
    model = ConditionalUNet(network) if teacher is None else student_of(teacher)
    model = model.to(device, memory_format=torch.channels_last)
    if args.init:  # of a distilled one only what this run trains: the network, or what beside it knows the scale
        start = {name: value for name, value in load_component(args.init, "unet")[1].items()
                 if ("guidance" in name) == bool(args.distill)}
        if not start:
            raise ModelFolderError(f"the UNet in {args.init} knows no guidance to start from; leave --init out")
        load_strictly(model, start if teacher is None else {**model.state_dict(), **start}, "the UNet to start from")
    if args.distill == "guidance":  # the rest stays what it is, and with it all that is said without guidance
        for name, weight in model.named_parameters():
            weight.requires_grad_("guidance" in name)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizers = make_optimizers(model, args)
    emas = {"ema_long": PowerEMA(model, relative_std=0.10), "ema_short": PowerEMA(model, relative_std=0.05)}
    target = None
    if turbo:  # what neighbouring points are compared with: an average that follows closely, used where it stands
        emas["target"] = PowerEMA(model, relative_std=0.005)
        target = ConditionalUNet(model.config)
        target.load_state_dict(emas["target"].state, assign=True)
        target.eval().requires_grad_(False)
    shapes = False if device.type == "cuda" else None  # there all captions are as long as the longest
    quick = partial(torch.compile, dynamic=shapes) if args.compile else (lambda network: network)
    taught = teacher and replace(teacher, network=quick(teacher.network), away=teacher.away and replace(
        teacher.away, network=quick(teacher.away.network)))
    lesson = make_lesson(quick(model), schedule, taught, target and quick(target))
    settings = {"component": "unet", "preset": args.preset, "seed": args.seed, "batch_size": args.batch_size,
                "learning_rate": args.learning_rate, "schedule": args.schedule, "caption_dropout": args.caption_dropout,
                "captions_per_image": args.captions_per_image, "init": args.init, "favour": args.favour,
                "favour_times": args.favour_times, "sharp_times": args.sharp_times, "px": args.px,
                "optimizer": args.optimizer, **({"soft_from": args.soft_from} if args.soft_from else {}),
                "data": faces.store.fingerprint,
                "encoder": encoder_hash(faces.vae), "clip": component_hash(args.model, "clip"),
                "network": write_config(model.config)}
    if teacher is not None:
        settings |= {"preset": None, "distill": args.distill, "teacher": teacher.source, "schedule": schedule.kind}
        settings |= {"self_guidance": args.self_guidance} if args.self_guidance else {}
    run = RunFolder(Path(args.run), settings, total_steps=args.steps, decay_share=args.decay_share,
                    main=accelerator.is_main_process, parts={"model": model, **optimizers, **emas},
                    how=circumstances(args, accelerator, loss_weight=args.loss_weight, begin=list(args.begin),
                                      accumulate=args.accumulate, compile=args.compile))
    first, mine = run.resume(), process_slice(accelerator, args.batch_size)
    guard = StepGuard(skipped=run.extra.get("skipped", 0))
    sums, counts = torch.zeros(BUCKETS, device=device), torch.zeros(BUCKETS, device=device)
    checked: list[Any] | None = None  # held-out faces, read when they are first asked for

    for step, show in run.steps(first, args, accelerator, "UNet"):
        rate = learning_rate(step, peak=args.learning_rate, total_steps=args.steps, warmup_steps=args.warmup_steps,
                             decay_share=args.decay_share)
        for group in [group for optimizer in optimizers.values() for group in optimizer.param_groups]:
            group["lr"] = rate
        torch.manual_seed(mix_seed(args.seed, step, 2 + accelerator.process_index))  # dropout takes no generator
        total = torch.zeros((), device=device)
        for batch in faces.lessons.batch(step, mine, accelerator):
            with accelerator.autocast(), attention_kernel(device):
                error, weight = lesson(batch)
            loss = (error * weight).sum() / (mine.stop - mine.start)
            loss.backward()
            total += loss.detach()
            bucket = (batch.timestep * (BUCKETS / 1000)).long()
            sums.index_add_(0, bucket, error.detach())
            counts.index_add_(0, bucket, torch.ones_like(error))
        average_gradients(accelerator, parameters)
        norm = guard.step(list(optimizers.values()), parameters)
        for ema in emas.values():
            ema.update(model, step + 1)

        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            seen = mean_over_processes(accelerator, {"loss": float(total)} | {
                f"{kind}{i}": float(one) for kind, all_ in (("sum", sums), ("count", counts))
                for i, one in enumerate(all_)})
            by_level = [seen[f"sum{i}"] / (seen[f"count{i}"] or 1.0) for i in range(BUCKETS)]
            values = {f"mse_noise_{i}": value for i, value in enumerate(by_level) if seen[f"count{i}"]}
            values |= {"loss": seen["loss"], "grad_norm": float(norm), "lr": rate, "skipped": guard.skipped,
                       "images_seen": (step + 1) * args.batch_size}
            run.log(step + 1, values)
            show(" ".join(f"{value:.3f}" for value in by_level))
            sums.zero_()
            counts.zero_()
        if (step + 1) % args.save_every == 0 or show.last:
            run.save(step + 1, {"skipped": guard.skipped})
        if run.main and ((step + 1) % args.picture_every == 0 or step + 1 == args.steps):
            picture = averaged(model, emas["ema_long"], device)
            few: dict[str, Any] = {"sampler": TURBO, "steps": TURBO_STEPS} if turbo else {}
            grid = draw_grid(picture, faces.vae, faces.clip, faces.tokenizer, schedule, accelerator, **few)
            run.picture(f"step-{step + 1:07d}", grid, columns=8)
            if checked is None:
                checked = faces.held_out(schedule, accelerator, limit=256) if "val" in faces.store.split else []
            if checked:
                told = make_lesson(picture, schedule, teacher, None, turbo)
                run.log(step + 1, {"val_loss": validation_loss(told, checked, accelerator)})
    run.finish()
    if run.main and run.finished:
        finished = {name: averaged(model, ema, device) for name, ema in emas.items()}
        held_out = faces.held_out(schedule, accelerator, limit=1024 if teacher is None else 256)
        losses = {name: validation_loss(make_lesson(network, schedule, teacher, None, turbo), held_out, accelerator)
                  for name, network in finished.items()}
        best = min(losses, key=losses.__getitem__)
        print("validation loss: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
        facts = settings | {"steps": args.steps, "images_seen": args.steps * args.batch_size, "ema": best,
                            "validation_loss": losses}
        parents = {"vae": settings["encoder"], "clip": settings["clip"]}
        suggested = 2.0 if args.guidance_scale is None else args.guidance_scale
        if teacher is None:
            facts |= {"loss_weight": args.loss_weight}
            with releasing(args.model, made, replace=args.replace, run=args.run):
                release(finished[best], Path(args.model), schedule, parents, facts, suggested)
        elif turbo:
            with releasing(args.model, made, replace=args.replace, run=args.run):
                release_turbo(finished[best], teacher, Path(args.model), facts)
        else:
            from core.diffusion.distillation import relative_errors

            errors = relative_errors(finished[best], teacher.network, schedule, held_out, accelerator, teacher.away)
            for scale, (one, plain) in errors.items():
                print(f"scale {scale}: one pass is {one:.3f} off what it is to say; if it knew no scale, {plain:.3f}")
            if args.guidance_scale is None:
                suggested = read_index(args.model)["defaults"]["guidance_scale"]
            with releasing(args.model, made, replace=args.replace, run=args.run):
                release(finished[best], Path(args.model), schedule, parents, teacher.config["training"], suggested,
                        facts | {"errors": errors})
        print(f"released to {args.model}/{made}")


def make_optimizers(model: ConditionalUNet, args: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    """What changes the weights that are trained, by the names that a checkpoint has them under."""
    from core.training.optim import Muon, matrices

    inner = matrices(model, edges=EDGES) if args.optimizer == "muon" else []
    known = {id(weight) for weight in inner}
    rest = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in known]
    adamw = torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return {"optimizer": adamw, **({"muon": Muon(inner, lr=args.learning_rate)} if inner else {})}


def find_teacher(args: argparse.Namespace, accelerator: Any) -> Teacher:
    """The UNet of ``args.model``, or what it was when this run began."""
    from core.training.run_folder import keep_teacher

    load_unet(args.model)  # refuses one whose VAE or CLIP is another
    config, state, source = keep_teacher(Path(args.run), Path(args.model), "unet", accelerator.is_main_process)
    network = ConditionalUNet(read_config(config))
    load_strictly(network, state, "the teacher")
    network = frozen(network, accelerator.device)
    away = Away(perturbed(network), args.self_guidance) if args.self_guidance else None
    return Teacher(network, config, source, network.guidance_range, away)


def student_of(teacher: Teacher) -> ConditionalUNet:
    """The same network, which is to know the scale too: until it has learned, it is deaf to it. No dropout."""
    config = replace(read_config(teacher.config), guidance_range=teacher.known or GUIDANCE_RANGE)
    student = ConditionalUNet(config if teacher.away is None else replace(config, guided_attention=True))
    missing, unexpected = student.load_state_dict(teacher.network.state_dict(), strict=False)
    assert all("guidance" in name for name in missing) and not unexpected
    return student.eval()


def favoured_rows(attributes: np.ndarray, names: Sequence[str], times: int, each: np.ndarray | int = 1) -> Tensor:
    """Rows of one epoch: every row ``each`` times, and ``times`` as often where it has one of the attributes ``names``.

    Rare attributes (glasses: 6 % of CelebA) are learned late otherwise. Shapes: attributes [N, 40] bool, each [N] ->
    [M] int64.
    Raises ValueError for a name that CelebA does not have.
    """
    from core.text.lexicon import ATTRIBUTES

    if unknown := set(names) - set(ATTRIBUTES):
        raise SettingError(f"--favour {', '.join(sorted(unknown))}: CelebA has {', '.join(ATTRIBUTES)}")
    chosen = attributes[:, [ATTRIBUTES.index(name) for name in names]].any(axis=1)
    return torch.from_numpy(np.repeat(np.arange(len(attributes)), np.where(chosen, times, 1) * each))


def lowest_timesteps(px: np.ndarray, soft_from: Sequence[float]) -> Tensor:
    """From which timestep on each picture is learned from: sharp ones everywhere, enlarged ones only where noise hides
    that they are soft (https://arxiv.org/abs/2506.10038). Shapes: px [N] in {58, 80, 128} -> [N] float32."""
    for_58, for_80 = soft_from
    return torch.from_numpy(np.select([px == 58, px == 80], [for_58, for_80], 0.0).astype(np.float32))


def fit_soft_from(args: argparse.Namespace) -> tuple[int, int]:
    """The two timesteps for --soft-from, of pictures of 58 and of 80 px, by a classifier on noised latents; printed.

    A model folder needs nothing but its VAE for that. Writes the areas under the curve into the run folder.
    """
    from core.training.accelerator import make_accelerator
    from core.training.resolution import SHARP, ResolutionFit, fit_threshold
    from dataset import FaceStore
    from vae import load_vae

    accelerator = make_accelerator(args.device, "no")
    store = FaceStore.open(args.data)
    rows = store.select(split="train")
    vae = load_vae(args.model, accelerator.device)
    cache, px = encoded(vae, store, rows, Path(args.cache), accelerator), store.px[rows]
    how = replace(ResolutionFit(), steps=min(args.steps, ResolutionFit.steps))
    found: dict[int, int] = {}
    areas = {}
    for soft in (58, 80):
        chosen = torch.from_numpy(np.flatnonzero((px == soft) | (px == SHARP)))
        sharp = torch.from_numpy(px == SHARP)[chosen]
        found[soft], areas[soft] = fit_threshold(cache.mean[0, chosen].cpu(), sharp, NoiseSchedule(args.schedule), how,
                                                 seed=args.seed)
        print(f"{soft} px: " + " ".join(f"{low}:{area:.2f}" for low, area in areas[soft].items()))
    write_json(Path(args.run) / "soft_from.json", {"soft_from": [found[58], found[80]], "areas": areas})
    print(f"--soft-from {found[58]} {found[80]}")
    return found[58], found[80]


def averaged(model: ConditionalUNet, ema: Any, device: torch.device) -> ConditionalUNet:
    """A copy of the network that carries averaged weights."""
    copy = ConditionalUNet(model.config)
    copy.load_state_dict(ema.state, strict=True)
    return frozen(copy, device)


def release(model: ConditionalUNet, folder: Path, schedule: NoiseSchedule, parents: dict[str, str],
            training: dict[str, Any], guidance_scale: float, distilled: dict[str, Any] | None = None) -> None:
    """Write UNet and schedule into a model folder with the hashes of the VAE encoder and CLIP they belong to."""
    config = {"network": write_config(model.config), "parents": parents, "training": training}
    config |= {} if distilled is None else {"distilled": distilled}
    digest = save_component(folder, "unet", model.state_dict(), config,
                            extra={"commit": git_commit(Path(__file__).parent)})
    write_json(folder / "scheduler" / "config.json", scheduler_config(schedule))
    if "turbo" in read_index(folder)["components"] and load_component(folder, "turbo")[0]["parents"]["unet"] != digest:
        drop_component(folder, "turbo")
    defaults = scheduler_config(schedule)
    update_index(folder, name=folder.name, image_size=128, latent_shape=[model.config.latent_channels, 16, 16],
                 defaults={"guidance_scale": guidance_scale, "sampler": defaults["default_sampler"],
                           "long_sampler": defaults["long_sampler"]})


def release_turbo(model: ConditionalUNet, teacher: Teacher, folder: Path, facts: dict[str, Any]) -> None:
    """Write a network that draws in a few steps beside the UNet that taught it, as what it adds to that."""
    if component_hash(folder, "unet") != teacher.source:
        raise ModelFolderError(f"the UNet in {folder} is not the one that taught this run; restore the folder")
    save_difference(folder, "turbo", model.state_dict(), teacher.network.state_dict(),
                    {"network": write_config(model.config), "parents": {"unet": teacher.source}, "distilled": facts},
                    extra={"commit": git_commit(Path(__file__).parent)})


def load_turbo(folder: str | Path, device: torch.device | str = "cpu") -> ConditionalUNet | None:
    """The network of a model folder that draws in two to four steps; None where it has none. Refused beside another
    UNet than the one that taught it."""
    if "turbo" not in read_index(folder)["components"]:
        return None
    config, added = load_component(folder, "turbo")
    if config["parents"]["unet"] != component_hash(folder, "unet"):
        raise ModelFolderError(f"turbo/ in {folder} was trained from another UNet; run `python conditional_ldm.py "
                               "--distill consistency` again or restore the folder")
    state = load_difference(added, load_component(folder, "unet")[1])
    return frozen(build(lambda: ConditionalUNet(read_config(config)), state, "turbo"), device)


# ---------------------------------------------------------------------------------------------------------- evaluation

GRID_PROMPTS = (
    "", "a smiling woman with blonde hair", "a young man with black hair and glasses",
    "an old bald man with a grey beard",
    "a young woman with brown wavy hair wearing lipstick", "a man with a goatee wearing a hat",
    "a woman with black hair and bangs, not smiling", "a man with a big nose and a necktie",
)


@torch.inference_mode()
def draw_grid(model: ConditionalUNet, vae: Any, clip: Any, tokenizer: Any, schedule: NoiseSchedule, accelerator: Any,
              prompts: Sequence[str] = GRID_PROMPTS, *, per_prompt: int = 4, steps: int = 20,
              guidance_scale: float = 2.0, seed: int = 0, sampler: str | None = None,
              correction: Correction | None = None, emphasis: Emphasis | None = None) -> Tensor:
    """Pictures [len(prompts) * per_prompt, 3, 128, 128] in [-1, 1]; fixed seeds, so grids of a run compare."""
    device = next(model.parameters()).device
    heard = prompts if emphasis is None else [emphasis(prompt) for prompt in prompts]
    condition = encode_prompts(clip, tokenizer, heard).repeat(per_prompt)
    generators = [torch.Generator().manual_seed(seed + i % per_prompt) for i in range(len(condition))]
    shape = (model.config.latent_channels, 16, 16)
    noise = torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)
    config = scheduler_config(schedule)
    with accelerator.autocast():
        try:
            from core.diffusion.schedulers import make_scheduler

            z = sample(model, condition, make_scheduler(sampler or config["default_sampler"], config), noise, steps,
                       guidance_scale, schedule=schedule, generators=generators, known=model.guidance_range,
                       correction=correction)
        except ModuleNotFoundError as error:  # a training machine without diffusers still shows its progress
            if error.name != "diffusers":
                raise
            z = plain_ddim(model, condition, noise, steps, guidance_scale, schedule)
        return vae.decode(vae.unwhiten(z))


def plain_ddim(model: ConditionalUNet, condition: Condition, noise: Tensor, steps: int, guidance_scale: float,
               schedule: NoiseSchedule) -> Tensor:
    """DDIM (https://arxiv.org/abs/2010.02502, eq. 12, eta = 0) in a few lines, for progress pictures only."""
    from core.diffusion.distillation import step_down
    from core.diffusion.guidance import guided

    x, levels = noise, [float(t) for t in torch.linspace(999, 0, steps + 1)]
    for now, after in zip(levels[:-1], [*levels[1:-1], -1.0], strict=True):  # the last step goes to the data
        t = torch.full((len(x),), now, device=x.device)
        prediction = guided(model, x, t, condition, guidance_scale, known=model.guidance_range)
        x = step_down(schedule, x, prediction, t, torch.full_like(t, after))
    return x


@torch.inference_mode()
def validation_loss(lesson: Lesson, batches: Sequence[Any], accelerator: Any) -> float:
    """The mean of what is learned from, on held-out faces: comparable between checkpoints."""
    total, count = 0.0, 0
    for batch in batches:
        with accelerator.autocast():
            error, weight = lesson(batch)
        total, count = total + float((error * weight).sum()), count + len(error)
    return total / count


def read_schedule(folder: str | Path) -> NoiseSchedule:
    """The noise schedule of a model folder."""
    return schedule_from_config(json.loads((Path(folder) / "scheduler" / "config.json").read_text()))


GALLERY_PROMPTS = (  # everything that anybody can see in a 128 px face, rare things too, asserted and denied
    "a smiling young woman with wavy blond hair", "a serious woman with black hair, not smiling",
    "a woman with brown hair, bangs and heavy makeup", "a young woman with straight brown hair wearing lipstick",
    "a smiling old woman with gray hair", "a woman with glasses and black hair", "a young woman wearing a hat",
    "a woman with blond hair and earrings", "an old woman with glasses", "a pale young woman with her mouth open",
    "a young man with black hair and a goatee", "an old man with gray hair and glasses", "a bald man with a beard",
    "a smiling middle-aged man wearing a necktie", "a young man with blond hair, without a beard",
    "a man with a mustache wearing a hat", "a young man with brown hair and glasses", "a man with a receding hairline",
    "a man with bushy eyebrows and a five o'clock shadow", "a chubby smiling man without glasses",
)


def evaluate(args: argparse.Namespace) -> Path:
    """Draw a grid for one or several prompts from the released model; returns its path (--gallery: the folder's)."""
    from core.training.accelerator import make_accelerator
    from core.training.run_folder import save_grid
    from train_clip import load_clip
    from vae import load_vae

    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    clip, tokenizer = load_clip(args.model, device)
    schedule = read_schedule(args.model)
    unet = load_turbo(args.model, device) if args.sampler == TURBO else load_unet(args.model, device)
    if unet is None:
        raise ModelFolderError(f"{args.model} has no turbo/; train it with `--distill consistency` or draw otherwise")
    vae = load_vae(args.model, device)
    own, correction = read_index(args.model)["defaults"]["guidance_scale"], load_correction(args.model)
    emphasis = load_emphasis(args.model).within(tokenizer.read_to)
    for prompt in args.prompt or ():
        for warning in unread_warning("--prompt", prompt, unread_from(prompt, emphasis(prompt), tokenizer.read_to)):
            print(warning, file=sys.stderr)

    def draw(prompts: Sequence[str]) -> Tensor:
        return draw_grid(unet, vae, clip, tokenizer, schedule, accelerator, prompts, per_prompt=args.n_images,
                         steps=args.n_inf_steps, guidance_scale=own if args.guidance_scale is None
                         else args.guidance_scale, seed=args.seed, sampler=args.sampler, correction=correction,
                         emphasis=emphasis)

    if args.gallery:
        target, firsts = Path(args.gallery), []
        for number, prompt in enumerate(GALLERY_PROMPTS, start=1):
            images = draw([prompt])
            name = "-".join(re.findall("[a-z]+", prompt.lower()))
            save_grid(images, target / f"{number:02}-{name}.webp", columns=4)
            firsts.append(images[:5])
        save_grid(torch.cat(firsts), target / "uncurated.webp", columns=10)  # two prompts a row, seeds in order
    else:
        target = Path(args.out)
        save_grid(draw(args.prompt), target, columns=args.n_images)
    print(f"wrote {target}")
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    from core.training.release import add_release_options, of_preset, settle

    keep_quiet()
    parser = argparse.ArgumentParser(description="Train the text-conditional latent-diffusion UNet, or draw with it.",
                                     allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true")
    mode.add_argument("--fit-soft-from", action="store_true", help="find the two timesteps for --soft-from")
    mode.add_argument("--distill", choices=("guidance", "consistency"), help="train the released UNet further: "
                      "'guidance' answers at a guidance scale in one pass, 'consistency' makes turbo/ of it, which "
                      "draws in two to four")
    mode.add_argument("--eval", action="store_true")
    mode.add_argument("--export-diffusers", metavar="FOLDER", help="write --model as a pipeline of diffusers")
    parser.add_argument("--prompt", action="append", help="--eval: what to draw; may be given several times")
    parser.add_argument("--gallery", metavar="FOLDER", help="--eval: a sheet for each of twenty prompts and one of "
                        "the first five pictures of all of them, as WebP; nothing is picked out")
    parser.add_argument("--n-images", type=int, default=8, help="--eval: pictures for each prompt")
    parser.add_argument("--n-inf-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float,
                        help="--eval: 1 is off (default: the model's own); --train: what the model will suggest (2)")
    parser.add_argument("--sampler")
    parser.add_argument("--out", default="runs/grid.png")
    parser.add_argument("--data", default="archive/prepared", help="prepared store (python dataset.py --prepare)")
    add_release_options(parser, ", which has vae/ and clip/")
    parser.add_argument("--run", "--run-folder", help="folder of this run; the same command resumes from it "
                        "(runs/unet, runs/guidance, runs/consistency; torchrun has a --run of its own)")
    parser.add_argument("--cache", help="where encoded images are kept; " + of_preset(RUNS, "cache"))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="celeba128")
    parser.add_argument("--init", metavar="FOLDER", help="model folder whose UNet to start from; --distill guidance: "
                        "whose guidance to start from, such as what the UNet had before it was trained further")
    parser.add_argument("--self-guidance", type=float, default=0.0, metavar="S", help="--distill guidance: also lead "
                        "away, by S at scale 2.5 and more, from what is drawn without self-attention (0: not)")
    parser.add_argument("--px", type=int, choices=(58, 80, 128), help="see only pictures of this source resolution")
    parser.add_argument("--soft-from", type=float, nargs=2, metavar=("T58", "T80"), help="learn from pictures of 58 "
                        "and 80 px only at these timesteps and above, where they cannot be told from sharp ones")
    parser.add_argument("--sharp-times", type=int, default=1, help="how often an epoch shows pictures of 128 px")
    parser.add_argument("--favour", nargs="*", default=[], metavar="ATTRIBUTE", help="attributes to be seen more often")
    parser.add_argument("--favour-times", type=int, default=3, help="how often an epoch shows the favoured pictures")
    parser.add_argument("--schedule", choices=("cosine", "flow"), default="cosine")
    parser.add_argument("--begin", type=float, nargs=2, default=NoiseSchedule().begin, metavar=("A", "B"),
                        help="the model's own: n steps begin at timestep A - B / (n + 2) (1000 0: at pure noise)")
    parser.add_argument("--loss-weight", choices=("min-snr", "clamped-v"), default="min-snr",
                        help="of the noise levels; may change when a run is resumed")
    parser.add_argument("--steps", type=int, help=of_preset(RUNS, "steps"))
    parser.add_argument("--stop-at", type=int, help="stop early after this many steps, resumable")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="the same by the clock")
    parser.add_argument("--batch-size", type=int, help=of_preset(RUNS, "batch_size"))
    parser.add_argument("--accumulate", type=int, default=1, help="pieces a batch is cut into, where memory is short")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for all that is a "
                        "matrix or a kernel inside the network; the rest stays with AdamW")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, help=of_preset(RUNS, "warmup_steps"))
    parser.add_argument("--decay-share", type=float, default=0.3)
    parser.add_argument("--caption-dropout", type=float, default=0.12, help="share trained without its caption")
    parser.add_argument("--captions-per-image", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network (pays on CUDA)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--picture-every", type=int, default=1000)
    args = parser.parse_args(argv)
    args.run = args.run or f"runs/{args.distill or 'unet'}"
    check_numbers(parser, args)
    if args.eval and not (args.prompt or args.gallery):
        parser.error("--eval needs at least one --prompt, or --gallery")
    if args.self_guidance and args.distill != "guidance":
        parser.error("--self-guidance belongs to --distill guidance")
    if args.distill == "consistency" and args.init:
        parser.error("--distill consistency starts from the UNet in --model; it takes no --init")
    settle(parser, args, RUNS, args.distill and f"--distill {args.distill}" or "")
    if args.export_diffusers:  # a program of its own, which stands on this file
        command = [sys.executable, Path(__file__).with_name("export_diffusers.py"), args.export_diffusers]
        return subprocess.run([*command, "--model", args.model]).returncode
    if args.train or args.distill:
        with run_lock(args.run):
            train(args)
    elif args.fit_soft_from:
        fit_soft_from(args)
    else:
        evaluate(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
