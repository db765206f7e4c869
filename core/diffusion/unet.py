"""How does a network predict, from a noisy latent, what is noise in it? The conditional UNet.

It predicts v at one noise level from the noisy normalized latent, the text (cross-attention to its tokens, its pooled
embedding) and ``px``, the real resolution of the source image: soft enlargements teach shapes and people, and asking
for 128 px keeps their blur out of what is generated. Here are the network and how it is read from a model folder. It
does not know how it is trained (conditional_ldm.py, distill.py), nor how images and sentences are encoded.

Sources: latent diffusion https://arxiv.org/abs/2112.10752, adaptive norm https://arxiv.org/abs/2105.05233 (ADM) and
https://arxiv.org/abs/2212.09748 (zero-initialised branches), query-key normalisation https://arxiv.org/abs/2302.05442,
micro-conditioning on resolution https://arxiv.org/abs/2307.01952.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.diffusion.conditioning import Condition
from core.diffusion.schedule import NoiseSchedule, schedule_from_config
from core.nn.autoencoder import VAE, encoder_hash, load_vae
from core.nn.checkpoint import (
    ModelFolderError,
    build,
    component_hash,
    load_component,
    load_delta,
    read_component_config,
    read_index,
)
from core.nn.layers import PixelNorm


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

    ``perturbed``: every position attends to itself alone (the identity as attention map,
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


def gated_residual(before: Tensor, after: Tensor, embedding: Tensor, layer: nn.Linear | None) -> Tensor:
    """The output of attention [B, N, C], what it added to its input scaled by 1 + a linear function of guidance."""
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
        self.ff = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        nn.init.zeros_(self.ff[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.ff[2].bias)  # type: ignore[arg-type]
        self.guidance = guidance_layer(width, config)
        self.self_guidance = guidance_layer(width, config) if config.guided_attention else None

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        h = x.permute(0, 2, 3, 1).reshape(batch, height * columns, width)  # free for channels-last tensors
        h = gated_residual(h, self.self_attention(h), embedding, self.self_guidance)
        h = gated_residual(h, self.cross_attention(h, tokens, mask), embedding, self.guidance)
        h = h + self.ff(self.norm(h))
        return h.view(batch, height, columns, width).permute(0, 3, 1, 2)


class Level(nn.Module):
    """The blocks of one resolution on one side of the U."""

    def __init__(self, inputs: Sequence[int], width: int, attention: bool, config: UNetConfig) -> None:
        super().__init__()
        self.res = nn.ModuleList(AdaptiveResBlock(a, width, config) for a in inputs)
        self.attention = nn.ModuleList(TransformerBlock(width, config) for _ in inputs) if attention else None

    def __len__(self) -> int:
        return len(self.res)

    def step(self, index: int, x: Tensor, embedding: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Run block ``index``: [B, a, H, W] -> [B, width, H, W]."""
        x = self.res[index](x, embedding)
        return x if self.attention is None else self.attention[index](x, embedding, tokens, mask)


class ConditionalUNet(nn.Module):
    """v prediction of a noisy normalized latent. x [B, C, 16, 16], timestep [B] in [0, 1000) -> [B, C, 16, 16]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if config.latent_channels is None:
            raise ValueError("a preset leaves the latent's channels to the VAE: say how many it has")
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

        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.down_blocks, self.downsample = nn.ModuleList(), nn.ModuleList()
        for i, (wide, count) in enumerate(zip(widths, config.blocks, strict=True)):
            self.down_blocks.append(Level([wide] * count, wide, config.attention[i], config))
            if i + 1 < len(widths):
                self.downsample.append(nn.Conv2d(4 * wide, widths[i + 1], 1))
        if config.position_maps:  # start at zero, so that they change nothing until something is learned
            self.position_maps = nn.ParameterList(nn.Parameter(torch.zeros(wide, 16 >> i, 16 >> i))
                                                  for i, wide in enumerate(widths[:2]))
        self.mid_block = Level([widths[-1]], widths[-1], config.attention[-1], config)
        self.up_blocks, self.upsample = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(widths))):
            self.up_blocks.append(Level([2 * widths[i]] * config.blocks[i], widths[i], config.attention[i], config))
            if i > 0:
                self.upsample.append(nn.Conv2d(widths[i], 4 * widths[i - 1], 1))
        self.norm = PixelNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.latent_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        tokens, mask, pooled = self.text(condition)
        px = sinusoid(torch.log2(condition.px.float() / 128.0) * 100.0, 32, longest=100.0)
        conditioning = self.time_embed(sinusoid(timestep, 128)) + self.px_embed(px) + self.pooled_embed(pooled)
        embedding = self.embed(conditioning)
        if self.guidance_range is not None:
            w = condition.guidance - 1.0  # guidance is linear in this, and so is the start: at scale 1 exactly nothing
            codes = [sinusoid(timestep, 128), sinusoid(w, 32, longest=100.0), self.pooled_embed[0](pooled)]
            embedding = torch.cat([embedding, 0.2 * w[:, None] * self.guidance_embed(torch.cat(codes, dim=1))], dim=1)

        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # [B, c0, 16, 16]
        skips = []
        for i, level in enumerate(cast("Iterable[Level]", self.down_blocks)):
            if self.config.position_maps and i < len(self.position_maps):
                h = h + self.position_maps[i]
            for block in range(len(level)):
                h = level.step(block, h, embedding, tokens, mask)
                skips.append(h)
            if i < len(self.downsample):
                h = self.downsample[i](F.pixel_unshuffle(h, 2).contiguous(memory_format=torch.channels_last))
        h = self.mid_block.step(0, h, embedding, tokens, mask)  # [B, c2, 4, 4]
        for i, level in enumerate(cast("Iterable[Level]", self.up_blocks)):
            for block in range(len(level)):
                h = level.step(block, torch.cat([h, skips.pop()], dim=1), embedding, tokens, mask)
            if i < len(self.upsample):
                h = F.pixel_shuffle(self.upsample[i](h), 2).contiguous(memory_format=torch.channels_last)
        return self.conv_out(F.silu(self.norm(h))).float()

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


def perturbed(model: ConditionalUNet) -> ConditionalUNet:
    """The same weights with perturbed self-attention: no position attends to any other. What this
    network generates worse is what attention was for: to lead away from it is to lead to faces that hold together."""
    other = copy.deepcopy(model)
    for block in other.modules():
        if isinstance(block, TransformerBlock):
            block.self_attention.perturbed = True
    return other


def frozen(model: ConditionalUNet, device: torch.device | str) -> ConditionalUNet:
    """For use: no dropout, no gradients, the layout that is fast."""
    model = model.eval().requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def encode_prompts(clip: Any, tokenizer: Any, prompts: Sequence[str], px: float = 128.0) -> Condition:
    """Prompts -> Condition on the text encoder's device; an empty prompt becomes the learned null."""
    device = clip.log_temperature.device
    ids, mask = (t.to(device) for t in tokenizer(list(prompts)))
    embedding = clip.encode_text(ids, mask)
    null = torch.tensor([not prompt.strip() for prompt in prompts], device=device)
    return Condition(embedding.tokens, embedding.mask, embedding.pooled,
                     torch.full((len(ids),), float(px), device=device), null)


# --------------------------------------------------------------------------------------------------------- model folder


def load_unet(folder: str | Path, device: torch.device | str = "cpu", vae: VAE | None = None) -> ConditionalUNet:
    """The trained UNet of a model folder, refused when its VAE or CLIP was replaced after training.

    ``vae`` is that of the folder, for whoever has loaded it already. Raises ModelFolderError.
    """
    config, state = load_component(folder, "unet")
    encoder = encoder_hash(load_vae(folder) if vae is None else vae)
    parents, found = config["parents"], {"vae": encoder, "clip": component_hash(folder, "clip")}
    wrong = [name for name, value in found.items() if parents[name] != value]
    if wrong:
        raise ModelFolderError(f"the UNet in {folder} was trained with another {' and '.join(wrong)}; run "
                               "`python conditional_ldm.py --train` again or restore the folder")
    return frozen(build(lambda: ConditionalUNet(read_config(config)), state, "the UNet"), device)


def load_few_step_unet(folder: str | Path, device: torch.device | str = "cpu") -> ConditionalUNet | None:
    """The network of a model folder that generates in two to four steps; None where it has none. Refused beside another
    UNet than the one that taught it."""
    if "turbo" not in read_index(folder)["components"]:
        return None
    config, added = load_component(folder, "turbo")
    if config["parents"]["unet"] != component_hash(folder, "unet"):
        raise ModelFolderError(f"turbo/ in {folder} was trained from another UNet; run `python conditional_ldm.py "
                               "--distill consistency` again or restore the folder")
    state = load_delta(added, load_component(folder, "unet")[1])
    return frozen(build(lambda: ConditionalUNet(read_config(config)), state, "turbo"), device)


def read_config(config: Mapping[str, Any]) -> UNetConfig:
    """The network of a component's ``config.json``."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                              for key, value in config["network"].items()}
    return UNetConfig(**fields)


def write_config(config: UNetConfig) -> dict[str, Any]:
    """The same as JSON has it; what a network does not have is not mentioned."""
    return {key: value for key, value in json.loads(json.dumps(asdict(config))).items() if value is not None}


def read_schedule(folder: str | Path) -> NoiseSchedule:
    """The noise schedule of a model folder."""
    return schedule_from_config(json.loads((Path(folder) / "scheduler" / "config.json").read_text()))


def check_widths(wanted: UNetConfig, preset: str, model: str | Path, init: str | Path | None = None) -> None:
    """Do the parts that a UNet is trained with have the widths that it is made for? Before anything is loaded.

    ``wanted`` is that of ``preset``, ``model`` the folder with VAE and text encoder, ``init`` that of the UNet to start
    from. Raises ModelFolderError naming the first that has another width.
    """
    if wanted.latent_channels is None:
        wanted = replace(wanted, latent_channels=read_component_config(model, "vae")["network"]["latent_channels"])
    for component, name, width in (("vae", "latent_channels", wanted.latent_channels),
                                   ("clip", "text_width", wanted.text_width)):
        found = read_component_config(model, component)["network"][name]
        if found != width:
            raise ModelFolderError(f"--preset {preset} makes a UNet for {name} {width}, and the {component} in "
                                   f"{model} has {found}: name another --preset, or another folder with --model")
    start = read_config(read_component_config(init, "unet")) if init else wanted
    wrong = [name for name in ("latent_channels", "channels", "blocks", "attention", "head_width", "text_width",
                               "embed_width") if getattr(start, name) != getattr(wanted, name)]
    if wrong:
        there, asked = getattr(start, wrong[0]), getattr(wanted, wrong[0])
        raise ModelFolderError(f"the UNet in {init} has {wrong[0]} {there}, and --preset {preset} {asked}: name the "
                               "--preset that it was trained with")
