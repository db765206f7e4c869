"""How does noise become a face that fits a sentence? The conditional latent-diffusion UNet.

Network, cached latents, training loop, command line. The UNet predicts v at one noise level from the noisy whitened
latent, the text (cross-attention to its tokens, its pooled embedding) and ``px``, the real resolution of the source
picture: soft enlargements teach shapes and people, and asking for 128 px keeps their blur out of what is drawn. It does
not know how pictures are encoded (vae.py) or sentences are (train_clip.py). Long because a reader should find all of
the UNet here: network, cached latents, training loop and drawing.

    python conditional_ldm.py --train                              train on cached latents, release to the model folder
    python conditional_ldm.py --eval --prompt "a smiling woman"    write a grid of pictures
    python conditional_ldm.py --eval --gallery runs/gallery        write sheets of twenty prompts, nothing picked out

Sources: latent diffusion https://arxiv.org/abs/2112.10752, adaptive norm https://arxiv.org/abs/2105.05233 (ADM) and
https://arxiv.org/abs/2212.09748 (zero-initialised branches), query-key normalisation https://arxiv.org/abs/2302.05442,
micro-conditioning on resolution https://arxiv.org/abs/2307.01952.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.checkpoint import (
    ModelFolderError,
    build,
    component_hash,
    git_commit,
    load_component,
    load_strictly,
    read_index,
    save_component,
    update_index,
    write_json,
)
from core.diffusion import Condition, NoiseSchedule, sample, schedule_from_config, scheduler_config
from vae import VAE, PixelNorm

if TYPE_CHECKING:
    from dataset import FaceStore

# ------------------------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class UNetConfig:
    """Widths per level (16x16, 8x8, 4x4), blocks per level, and which levels attend."""

    latent_channels: int = 16
    channels: tuple[int, ...] = (96, 192, 192)
    blocks: tuple[int, ...] = (2, 2, 2)
    attention: tuple[bool, ...] = (False, True, True)
    head_width: int = 32
    text_width: int = 192
    embed_width: int = 384
    dropout: float = 0.1


PRESETS = {
    "celeba128": UNetConfig(channels=(112, 224, 224)),
    "small": UNetConfig(channels=(80, 160, 192), blocks=(1, 2, 1), embed_width=256, dropout=0.0),
    "tiny": UNetConfig(4, (16, 24), (1, 1), (False, True), 8, 32, 32, 0.0),
}


def sinusoid(values: Tensor, width: int, longest: float = 10000.0) -> Tensor:
    """[B] -> [B, width]: cosines and sines at geometrically spaced frequencies (https://arxiv.org/abs/1706.03762)."""
    frequencies = torch.exp(torch.arange(width // 2, device=values.device) * (-math.log(longest) / (width // 2)))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), scale + 1)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys; ``context`` None attends to x itself.

    Shapes: x [B, N, C], context [B, L, T], mask [B, L] bool, result [B, N, C].
    """

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
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        return x + self.out(h.transpose(1, 2).reshape(batch, count, width))


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

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        h = x.permute(0, 2, 3, 1).reshape(batch, height * columns, width)  # free for channels-last tensors
        h = self.self_attention(h)
        h = self.cross_attention(h, tokens, mask)
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
        return x if self.attention is None else self.attention[index](x, tokens, mask)


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

        self.door = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for i, (wide, count) in enumerate(zip(widths, config.blocks, strict=True)):
            self.down.append(Level([wide] * count, wide, config.attention[i], config))
            if i + 1 < len(widths):
                self.shrink.append(nn.Conv2d(4 * wide, widths[i + 1], 1))
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
        embedding = self.embed(self.time_embed(sinusoid(timestep, 128)) + self.px_embed(px) + self.pooled_embed(pooled))

        h = self.door(x.contiguous(memory_format=torch.channels_last))  # [B, c0, 16, 16]
        skips = []
        for i, level in enumerate(self.down):
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
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in config["network"].items()}
    model = build(lambda: ConditionalUNet(UNetConfig(**fields)), state, "the UNet")
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def encode_prompts(clip: Any, tokenizer: Any, prompts: Sequence[str], px: float = 128.0) -> Condition:
    """Prompts -> Condition on the text encoder's device; an empty prompt becomes the learned null."""
    device = clip.log_temperature.device
    ids, mask = (t.to(device) for t in tokenizer(list(prompts)))
    embedding = clip.encode_text(ids, mask)
    null = torch.tensor([not prompt.strip() for prompt in prompts], device=device)
    return Condition(embedding.tokens, embedding.mask, embedding.pooled,
                     torch.full((len(ids),), float(px), device=device), null)


# ------------------------------------------------------------------------------------------------------ cached latents


@dataclass
class LatentCache:
    """Posterior mean and standard deviation of every training image and of its mirror image, whitened, fp16.

    Shapes: mean, std [2, N, C, h, w]; index 0 = as it is, 1 = mirrored.
    """

    mean: Tensor
    std: Tensor

    def draw(self, rows: Tensor, mirrored: Tensor, eps: Tensor) -> Tensor:
        """Whitened posterior samples [B, C, h, w] for image rows [B], mirror choices [B] in {0, 1} and eps."""
        return self.mean[mirrored, rows].float() + self.std[mirrored, rows].float() * eps


@torch.inference_mode()
def build_latent_cache(vae: Any, store: FaceStore, indices: np.ndarray, folder: Path, accelerator: Any,
                       batch_size: int = 64) -> LatentCache:
    """Encode the chosen images once; a cache of another encoder or another selection is rebuilt."""
    import hashlib

    from tqdm import tqdm

    from vae import encoder_hash, to_images

    names = "\n".join(store.image_id[indices]).encode()
    key = {"encoder": encoder_hash(vae), "images": hashlib.sha256(names).hexdigest()}
    side = 128 // 8
    shape = (2, len(indices), vae.config.latent_channels, side, side)
    facts = folder / "cache.json"
    if not (facts.exists() and json.loads(facts.read_text()) == key) and accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        facts.unlink(missing_ok=True)
        arrays = [np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)
                  for name in ("mean", "std")]
        scale = vae.latent_std[:, None, None]
        for start in tqdm(range(0, len(indices), batch_size), desc="latents", mininterval=2.0):
            rows = slice(start, min(start + batch_size, len(indices)))
            images = to_images(torch.from_numpy(store.images[indices[rows]]).to(accelerator.device))
            for mirrored, view in enumerate((images, images.flip(-1))):
                with accelerator.autocast():
                    posterior = vae.encode(view.contiguous(memory_format=torch.channels_last))
                arrays[0][mirrored, rows] = vae.whiten(posterior.mean).half().cpu().numpy()
                arrays[1][mirrored, rows] = (posterior.std / scale).half().cpu().numpy()
        for array in arrays:
            array.flush()
        facts.write_text(json.dumps(key))
    accelerator.wait_for_everyone()
    mean, std = (torch.from_numpy(np.load(folder / f"{name}.npy")).to(accelerator.device) for name in ("mean", "std"))
    return LatentCache(mean, std)


# ------------------------------------------------------------------------------------------------------------ training

BUCKETS = 5  # the loss is logged for this many equal slices of the noise levels


def train(args: argparse.Namespace) -> None:
    """The training loop of the UNet; the same command resumes. Ends by releasing both EMA lengths' better one."""
    from core.training import (
        EpochSampler,
        PowerEMA,
        RunFolder,
        StepGuard,
        attention_kernel,
        average_gradients,
        learning_rate,
        make_accelerator,
        mix_seed,
        process_slice,
        run_steps,
        step_generator,
    )
    from dataset import FaceStore
    from train_clip import CaptionBank, build_caption_bank, load_clip
    from vae import encoder_hash, load_vae

    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    store = FaceStore.open(args.data)
    indices = store.select(split="train", px=None)
    vae = load_vae(args.model, device)
    clip, tokenizer = load_clip(args.model, device)
    cache = build_latent_cache(vae, store, indices, Path(args.cache), accelerator)
    bank = build_caption_bank(store, indices, tokenizer, captions_per_image=args.captions_per_image, seed=args.seed,
                              empty_share=0.0)
    bank = CaptionBank(bank.ids.to(device), bank.lengths.to(device), bank.facts.to(device))
    px = torch.from_numpy(store.px[indices].astype(np.float32)).to(device)

    schedule = NoiseSchedule(args.schedule, weighting=args.loss_weight)
    torch.manual_seed(args.seed)
    model = ConditionalUNet(PRESETS[args.preset]).to(device, memory_format=torch.channels_last)
    if args.init:
        load_strictly(model, load_component(args.init, "unet")[1], "the UNet to start from")
    compiled = torch.compile(model) if args.compile else model
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    emas = {"ema_long": PowerEMA(model, relative_std=0.10), "ema_short": PowerEMA(model, relative_std=0.05)}
    seen = favoured_rows(store.attributes[indices], args.favour, args.favour_times)
    sampler = EpochSampler(len(seen), args.batch_size, args.seed)
    settings = {"component": "unet", "preset": args.preset, "seed": args.seed, "batch_size": args.batch_size,
                "learning_rate": args.learning_rate, "schedule": args.schedule, "caption_dropout": args.caption_dropout,
                "captions_per_image": args.captions_per_image, "init": args.init, "favour": args.favour,
                "favour_times": args.favour_times, "encoder": encoder_hash(vae),
                "clip": component_hash(args.model, "clip"), "network": json.loads(json.dumps(asdict(model.config)))}
    run = RunFolder(Path(args.run), settings, total_steps=args.steps, decay_share=args.decay_share,
                    main=accelerator.is_main_process, parts={"model": model, "optimizer": optimizer, **emas})
    first, mine = run.resume(), process_slice(accelerator, args.batch_size)
    guard = StepGuard(skipped=run.extra.get("skipped", 0))
    sums, counts = torch.zeros(BUCKETS, device=device), torch.zeros(BUCKETS, device=device)

    for step, show in run_steps(first, args.steps, stop_at=args.stop_at, enabled=run.main, label="UNet"):
        rate = learning_rate(step, peak=args.learning_rate, total_steps=args.steps, warmup_steps=args.warmup_steps,
                             decay_share=args.decay_share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = step_generator(args.seed, step)
        noise_generator = step_generator(args.seed, step, stream=1, device=device)
        torch.manual_seed(mix_seed(args.seed, step, 2 + accelerator.process_index))  # dropout takes no generator
        rows = seen[sampler.batch(step)].to(device)
        mirrored = torch.randint(2, (args.batch_size,), generator=generator).to(device)
        timestep = schedule.sample_timesteps(args.batch_size, generator).to(device)
        null = (torch.rand(args.batch_size, generator=generator) < args.caption_dropout).to(device)
        ids, mask, _, empty = bank.draw(rows, generator)
        eps = torch.randn(2, args.batch_size, *cache.mean.shape[2:], generator=noise_generator, device=device)
        total = torch.zeros((), device=device)
        for part in torch.arange(args.batch_size, device=device)[mine].chunk(args.accumulate):
            z, t, noise = cache.draw(rows[part], mirrored[part], eps[0, part]), timestep[part], eps[1, part]
            with torch.no_grad(), accelerator.autocast(), attention_kernel(device):
                text = clip.encode_text(ids[part], mask[part])
            condition = Condition(text.tokens, text.mask, text.pooled, px[rows[part]], (null | empty)[part])
            with accelerator.autocast(), attention_kernel(device):
                prediction = compiled(schedule.add_noise(z, noise, t), t, condition)
            error = (prediction - schedule.target(z, noise, t)).square().mean((1, 2, 3))
            loss = (error * schedule.loss_weight(t)).sum() / (mine.stop - mine.start)
            loss.backward()
            total += loss.detach()
            bucket = (t * (BUCKETS / 1000)).long()
            sums.index_add_(0, bucket, error.detach())
            counts.index_add_(0, bucket, torch.ones_like(error))
        average_gradients(accelerator, parameters)
        norm = guard.step(optimizer, parameters)
        for ema in emas.values():
            ema.update(model, step + 1)

        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            by_level = (sums / counts.clamp_min(1)).tolist()
            values = {f"mse_noise_{i}": value for i, value in enumerate(by_level) if float(counts[i])}
            values |= {"loss": float(total), "grad_norm": float(norm), "lr": rate, "skipped": guard.skipped,
                       "images_seen": (step + 1) * args.batch_size}
            run.log(step + 1, values)
            show(" ".join(f"{value:.3f}" for value in by_level))
            sums.zero_()
            counts.zero_()
        if (step + 1) % args.save_every == 0 or step + 1 in (args.steps, args.stop_at):
            run.save(step + 1, {"skipped": guard.skipped})
        if run.main and ((step + 1) % args.picture_every == 0 or step + 1 == args.steps):
            picture = averaged(model, emas["ema_long"], device)
            grid = draw_grid(picture, vae, clip, tokenizer, schedule, accelerator)
            run.picture(f"step-{step + 1:07d}", grid, columns=8)
    run.finish()
    if run.main and (args.stop_at is None or args.stop_at >= args.steps):
        finished = {name: averaged(model, ema, device) for name, ema in emas.items()}
        losses = {name: validation_loss(network, vae, clip, tokenizer, store, schedule, accelerator)
                  for name, network in finished.items()}
        best = min(losses, key=losses.__getitem__)
        print("validation loss: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
        release(finished[best], Path(args.model), schedule, {"vae": settings["encoder"], "clip": settings["clip"]},
                settings | {"steps": args.steps, "images_seen": args.steps * args.batch_size, "ema": best,
                            "loss_weight": args.loss_weight, "validation_loss": losses},
                2.0 if args.guidance_scale is None else args.guidance_scale)
        print(f"released to {args.model}/unet")


def favoured_rows(attributes: np.ndarray, names: Sequence[str], times: int) -> Tensor:
    """Rows of one epoch: every row once, and ``times`` times where it has one of the attributes ``names``.

    Rare attributes (glasses: 6 % of CelebA) are learned late otherwise. Shapes: attributes [N, 40] bool -> [M] int64.
    Raises ValueError for a name that CelebA does not have.
    """
    from core.captions import ATTRIBUTES

    if unknown := set(names) - set(ATTRIBUTES):
        raise ValueError(f"--favour {', '.join(sorted(unknown))}: CelebA has {', '.join(ATTRIBUTES)}")
    chosen = attributes[:, [ATTRIBUTES.index(name) for name in names]].any(axis=1)
    return torch.from_numpy(np.repeat(np.arange(len(attributes)), np.where(chosen, times, 1)))


def averaged(model: ConditionalUNet, ema: Any, device: torch.device) -> ConditionalUNet:
    """A copy of the network that carries averaged weights."""
    copy = ConditionalUNet(model.config)
    copy.load_state_dict(ema.state, strict=True)
    return copy.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def release(model: ConditionalUNet, folder: Path, schedule: NoiseSchedule, parents: dict[str, str],
            training: dict[str, Any], guidance_scale: float) -> None:
    """Write UNet and schedule into a model folder with the hashes of the VAE encoder and CLIP they belong to."""
    save_component(folder, "unet", model.state_dict(),
                   {"network": asdict(model.config), "parents": parents, "training": training},
                   extra={"commit": git_commit(Path(__file__).parent)})
    write_json(folder / "scheduler" / "config.json", scheduler_config(schedule))
    config = scheduler_config(schedule)
    update_index(folder, name=folder.name, image_size=128, latent_shape=[model.config.latent_channels, 16, 16],
                 defaults={"guidance_scale": guidance_scale, "sampler": config["default_sampler"],
                           "long_sampler": config["long_sampler"]})


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
              guidance_scale: float = 2.0, seed: int = 0, sampler: str | None = None) -> Tensor:
    """Pictures [len(prompts) * per_prompt, 3, 128, 128] in [-1, 1]; fixed seeds, so grids of a run compare."""
    device = next(model.parameters()).device
    condition = encode_prompts(clip, tokenizer, prompts).repeat(per_prompt)
    generators = [torch.Generator().manual_seed(seed + i % per_prompt) for i in range(len(condition))]
    shape = (model.config.latent_channels, 16, 16)
    noise = torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)
    config = scheduler_config(schedule)
    with accelerator.autocast():
        try:
            from core.diffusion import make_scheduler

            z = sample(model, condition, make_scheduler(sampler or config["default_sampler"], config), noise, steps,
                       guidance_scale, schedule=schedule, generators=generators)
        except ModuleNotFoundError as error:  # a training machine without diffusers still shows its progress
            if error.name != "diffusers":
                raise
            z = plain_ddim(model, condition, noise, steps, guidance_scale, schedule)
        return vae.decode(vae.unwhiten(z))


def plain_ddim(model: ConditionalUNet, condition: Condition, noise: Tensor, steps: int, guidance_scale: float,
               schedule: NoiseSchedule) -> Tensor:
    """DDIM (https://arxiv.org/abs/2010.02502, eq. 12, eta = 0) in a few lines, for progress pictures only."""
    from core.diffusion import guided

    x = noise
    times = torch.linspace(999, 0, steps + 1)
    for now, after in zip(times[:-1], times[1:], strict=True):
        t, following = now.expand(len(x)).to(x.device), after.expand(len(x)).to(x.device)
        z = schedule.denoised(x, guided(model, x, t, condition, guidance_scale), t)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(t))
        x = schedule.add_noise(z, (x - alpha * z) / sigma, following)
    return z


@torch.inference_mode()
def validation_loss(model: ConditionalUNet, vae: Any, clip: Any, tokenizer: Any, store: FaceStore,
                    schedule: NoiseSchedule, accelerator: Any, limit: int = 1024, seed: int = 99) -> float:
    """Weighted loss on held-out sharp faces with fixed noise, levels and captions: comparable between checkpoints."""
    from train_clip import build_caption_bank
    from vae import to_images

    device = next(model.parameters()).device
    indices = store.select(split="val", px=128)[:limit]
    bank = build_caption_bank(store, indices, tokenizer, captions_per_image=1, seed=seed, empty_share=0.0)
    total = 0.0
    for start in range(0, len(indices), 64):
        rows = torch.arange(start, min(start + 64, len(indices)))
        generator = torch.Generator().manual_seed(seed + start)
        images = to_images(torch.from_numpy(store.images[indices[rows.numpy()]]).to(device))
        ids, mask, _, empty = (t.to(device) for t in bank.draw(rows, generator))
        t = schedule.sample_timesteps(len(rows), generator).to(device)
        with accelerator.autocast():
            z = vae.whiten(vae.encode(images).mean)
            eps = torch.randn(z.shape, generator=generator).to(device)
            text = clip.encode_text(ids, mask)
            px = torch.full((len(rows),), 128.0, device=device)
            condition = Condition(text.tokens, text.mask, text.pooled, px, empty)
            prediction = model(schedule.add_noise(z, eps, t), t, condition)
        error = (prediction - schedule.target(z, eps, t)).square().mean((1, 2, 3))
        total += float((error * schedule.loss_weight(t)).sum())
    return total / len(indices)


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
    from core.training import make_accelerator, save_grid
    from train_clip import load_clip
    from vae import load_vae

    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    clip, tokenizer = load_clip(args.model, device)
    schedule = schedule_from_config(json.loads((Path(args.model) / "scheduler" / "config.json").read_text()))
    unet, vae = load_unet(args.model, device), load_vae(args.model, device)
    own = read_index(args.model)["defaults"]["guidance_scale"]

    def draw(prompts: Sequence[str]) -> Tensor:
        return draw_grid(unet, vae, clip, tokenizer, schedule, accelerator, prompts, per_prompt=args.n_images,
                         steps=args.n_inf_steps, guidance_scale=own if args.guidance_scale is None
                         else args.guidance_scale, seed=args.seed, sampler=args.sampler)

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
    parser = argparse.ArgumentParser(description="Train the text-conditional latent-diffusion UNet, or draw with it.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true")
    mode.add_argument("--eval", action="store_true")
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
    parser.add_argument("--model", default="models/celeba128", help="model folder with vae/ and clip/")
    parser.add_argument("--run", default="runs/unet", help="folder of this run; the same command resumes from it")
    parser.add_argument("--cache", default="runs/latents", help="where encoded images are kept")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="celeba128")
    parser.add_argument("--init", help="model folder whose UNet to start from")
    parser.add_argument("--favour", nargs="*", default=[], metavar="ATTRIBUTE", help="attributes to be seen more often")
    parser.add_argument("--favour-times", type=int, default=3, help="how often an epoch shows the favoured pictures")
    parser.add_argument("--schedule", choices=("cosine", "flow"), default="cosine")
    parser.add_argument("--loss-weight", choices=("min-snr", "clamped-v"), default="min-snr",
                        help="of the noise levels; may change when a run is resumed")
    parser.add_argument("--steps", type=int, default=50000)
    parser.add_argument("--stop-at", type=int, help="stop early after this many steps, resumable")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1, help="pieces a batch is cut into, where memory is short")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=200)
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
    if args.eval and not (args.prompt or args.gallery):
        parser.error("--eval needs at least one --prompt, or --gallery")
    if args.train:
        train(args)
    else:
        evaluate(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
