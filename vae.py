"""How does a face become a 16x16x16 latent, and a latent a face again?

The whole autoencoder: network, losses, training loop, measurements, command line. Space-to-depth at the door means that
nothing runs at full resolution with many channels, so the decoder costs under 4 GFLOP and draws four faces in a blink
on a laptop CPU. Normalisation is per pixel over channels, so no statistic leaks across places or depends on the size of
the picture. Then comes a linear filter, fitted and not trained, that makes pictures as sharp as photographs
(`core.nn.sharpening`), and a last small stage at full resolution that an adversary teaches (`core.nn.refinement`). It
does not know about text or diffusion.

Long because the autoencoder is trained in two ways, as a whole and at its end, by the same losses and measurements.

    python vae.py --train                    train, measure the latent statistics, release to the model folder
    python vae.py --train --decoder-only     continue the decoder alone; encoder and cached latents stay valid
    python vae.py --finish --drawn FILE...   teach the decoder's end by an adversary, for copies and for drawn latents
    python vae.py --fit-preview              only fit the preview decoder again (also done by --train)
    python vae.py --eval                     PSNR, SSIM, MS-SSIM on the test split and a grid of reconstructions

Sources: VAE https://arxiv.org/abs/1312.6114, latent diffusion https://arxiv.org/abs/2112.10752, scale-equivariant
latents (EQ-VAE) https://arxiv.org/abs/2502.09509, sub-pixel convolution https://arxiv.org/abs/1609.05158.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.command import check_numbers, run_command, run_lock
from core.nn.checkpoint import (
    ModelFolderError,
    build,
    component_hash,
    file_hash,
    git_commit,
    load_component,
    load_strictly,
    read_component_config,
    save_component,
)
from core.nn.equivariance import (
    LatentRegularization,
    add_noise,
    drift_penalty,
    equivariance_error,
    measure_equivariance,
    move_both,
    normalize_batch,
    principal_components,
    random_crops,
)
from core.nn.layers import PixelNorm, ResBlock, Up, to_images
from core.nn.preview_decoder import fit_preview, load_preview, save_preview
from core.nn.refinement import Finish
from core.nn.sharpening import Sharpen, fit_kernel
from core.quiet import keep_quiet
from core.training.augmentation import load_pixels, mirror

# ------------------------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class VAEConfig:
    """Widths and depths; the spatial factor is 4 (door) x 2 = 8."""

    latent_channels: int = 16
    encoder_channels: tuple[int, int] = (64, 160)  # at H/4 and H/8
    encoder_blocks: tuple[int, int] = (1, 2)
    decoder_channels: tuple[int, int, int] = (256, 128, 64)  # at H/8, H/4, H/2
    decoder_blocks: tuple[int, int, int] = (3, 2, 1)
    sharpen_size: int = 0  # of the filter after the decoder; 0: none, as while training
    finish_channels: int = 0  # at full resolution, after the filter; 0: not finished
    deterministic: bool = False  # no posterior variance: normalised means, regularised as core.nn.equivariance says
    statistics_size: int = 0  # mean and deviation per channel and place of a grid of this side; 0: per channel


PRESETS = {
    "celeba128": VAEConfig(),
    "smooth8": VAEConfig(8, deterministic=True, statistics_size=16),
    "smooth16": VAEConfig(16, deterministic=True, statistics_size=16),
    "smooth8-fast": VAEConfig(8, decoder_blocks=(2, 1, 1), deterministic=True, statistics_size=16),
    "tiny": VAEConfig(4, (16, 24), (1, 1), (24, 16, 12), (1, 1, 1)),
    "tiny-smooth": VAEConfig(4, (16, 24), (1, 1), (24, 16, 12), (1, 1, 1), deterministic=True,
                             statistics_size=16),
}
RUNS = {  # how long a run of each preset is
    "celeba128": {"steps": 20000, "batch_size": 16, "warmup_steps": 100},
    **{name: {"steps": 2000, "batch_size": 8, "warmup_steps": 40} for name in ("smooth8", "smooth16", "smooth8-fast")},
    **{name: {"steps": 10, "batch_size": 8, "warmup_steps": 1} for name in ("tiny", "tiny-smooth")},
}
FACTOR = 8


def scale_of(preset: str) -> str:
    """Which of the adversary's presets belongs to one of ours."""
    return "tiny" if preset.startswith("tiny") else "celeba128"


@dataclass
class Posterior:
    """Diagonal Gaussian over latents: mean and log-variance, each [B, C, H/8, W/8], before whitening."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation [B, C, h, w]."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * eps, with eps from ``generator``."""
        eps = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, mean over every latent number (Kingma & Welling, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).mean()


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> posterior parameters [B, 2C, H/8, W/8] ([B, C, ...] without variances)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        first, second = config.encoder_channels
        self.door = nn.Conv2d(3 * 16, first, 3, padding=1)
        self.blocks1 = nn.Sequential(*(ResBlock(first) for _ in range(config.encoder_blocks[0])))
        self.down = nn.Conv2d(first * 4, second, 1)
        self.blocks2 = nn.Sequential(*(ResBlock(second) for _ in range(config.encoder_blocks[1])))
        self.norm = PixelNorm(second)
        outputs = config.latent_channels * (1 if config.deterministic else 2)
        self.head = nn.Conv2d(second, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.door(F.pixel_unshuffle(images, 4))  # [B, c1, H/4, W/4]
        x = self.down(F.pixel_unshuffle(self.blocks1(x), 2))  # [B, c2, H/8, W/8]
        return self.head(F.silu(self.norm(self.blocks2(x))))


class Decoder(nn.Module):
    """Latents [B, C, h, w] (not whitened) -> images [B, 3, 8h, 8w], unclamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        a, b, c = config.decoder_channels
        stages: list[nn.Module] = [nn.Conv2d(config.latent_channels, a, 3, padding=1)]
        stages += [ResBlock(a) for _ in range(config.decoder_blocks[0])] + [Up(a, b)]
        stages += [ResBlock(b) for _ in range(config.decoder_blocks[1])] + [Up(b, c)]
        stages += [ResBlock(c) for _ in range(config.decoder_blocks[2])] + [PixelNorm(c), nn.SiLU()]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Conv2d(c, 12, 3, padding=1)
        self.sharpen = Sharpen(config.sharpen_size) if config.sharpen_size else nn.Identity()
        self.finish = Finish(c, config.finish_channels) if config.finish_channels else None

    def forward(self, z: Tensor) -> Tensor:
        return self.end(self.stages(z))

    def end(self, features: Tensor) -> Tensor:
        """Features of the last stage [B, c, H/2, W/2] -> images [B, 3, H, W]."""
        images: Tensor = self.sharpen(F.pixel_shuffle(self.head(features), 2))
        return images if self.finish is None else self.finish(features, images)

    def soft(self, z: Tensor) -> Tensor:
        """Before the filter: what the losses look at, which would otherwise teach the layers to undo it."""
        return F.pixel_shuffle(self.head(self.stages(z)), 2)


class VAE(nn.Module):
    """Encoder, decoder and the measured latent statistics that turn raw latents z into whitened ones x and back."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        shape = [config.latent_channels] + [config.statistics_size] * 2 * bool(config.statistics_size)
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_std", torch.ones(shape))

    def encode(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1], H and W multiples of 8 -> posterior [B, C, H/8, W/8]."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % FACTOR or images.shape[3] % FACTOR:
            raise ValueError(f"images must be [B, 3, H, W], sides a multiple of {FACTOR}, got {tuple(images.shape)}")
        encoded = self.encoder(images).float()
        if self.config.deterministic:
            return Posterior(encoded, torch.full_like(encoded, -20.0))
        mean, logvar = encoded.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-20.0, 5.0))

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents [B, C, h, w] -> images [B, 3, 8h, 8w], nominally in [-1, 1], not clamped."""
        return self.decoder(z).float()

    def whiten(self, z: Tensor) -> Tensor:
        """Raw latents -> zero mean and unit variance (as measured on the training images) per channel, or per channel
        and place: faces are aligned, so that the mean latent of a place is known before anything is drawn."""
        mean, std = self.statistics
        return (z - mean) / std

    def unwhiten(self, x: Tensor) -> Tensor:
        """Inverse of ``whiten``."""
        mean, std = self.statistics
        return x * std + mean

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of raw latents, as they broadcast: [C, 1, 1], or [C, h, w] per place."""
        mean, std = self.latent_mean, self.latent_std
        return (mean, std) if mean.ndim == 3 else (mean[:, None, None], std[:, None, None])


def load_vae(folder: str | Path, device: torch.device | str = "cpu") -> VAE:
    """The trained VAE of a model folder, ready for inference (no gradients, channels-last)."""
    config, state = load_component(folder, "vae")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in config["network"].items()}
    model = build(lambda: VAE(VAEConfig(**fields)), state, "the VAE")
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------------------------- losses


def charbonnier(prediction: Tensor, target: Tensor, epsilon: float = 1e-2) -> Tensor:
    """Mean sqrt((a - b)^2 + epsilon^2) - epsilon: L1 that is smooth at zero."""
    return ((prediction - target).square() + epsilon * epsilon).sqrt().mean() - epsilon


def gradient_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean L1 distance of horizontal and vertical pixel differences: punishes blur where L1 alone does not."""
    error = prediction - target
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) * 0.5


@dataclass(frozen=True)
class LossWeights:
    """Weights of the VAE's loss terms relative to Charbonnier = 1."""

    gradient: float = 1.0
    perceptual: float = 0.1
    kl: float = 5e-4
    downscale: float = 0.25
    adversarial: float = 0.05
    feature_matching: float = 0.1


def perceptual_loss(features: Any, prediction: Tensor, target: Tensor) -> Tensor:
    """Mean L1 distance of channel-normalised feature maps of the CLIP image tower (frozen, gradients to prediction).

    The tower wants sides that are multiples of 16; what is over, at the right and at the bottom, is not compared.
    """
    height, width = (side // 16 * 16 for side in target.shape[2:])
    prediction, target = prediction[..., :height, :width], target[..., :height, :width]
    with torch.no_grad():
        wanted = features(target)
    got = features(prediction)
    terms = [(F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).abs().sum(1).mean() / b.shape[1] ** 0.5
             for a, b in zip(got, wanted, strict=True)]
    return torch.stack(terms).mean()


@torch.inference_mode()
def measure_latents(model: VAE, pixels: Tensor, seed: int = 0, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation, each [C], of posterior samples over uint8 images [N, H, W, 3]."""
    total = square = torch.zeros(model.config.latent_channels, dtype=torch.float64)
    count = 0
    for start in range(0, len(pixels), batch_size):
        generator = torch.Generator().manual_seed(seed + start)
        posterior = model.encode(to_images(pixels[start : start + batch_size]))
        z = Posterior(posterior.mean.cpu(), posterior.logvar.cpu()).sample(generator).double()
        total = total + z.sum((0, 2, 3))
        square = square + z.square().sum((0, 2, 3))
        count += z.numel() // z.shape[1]
    mean = total / count
    return mean.float(), (square / count - mean.square()).clamp_min(1e-8).sqrt().float()


def check_parents(args: argparse.Namespace) -> None:
    """Are the parts that a VAE is trained with there, and as wide as it is? Before anything is loaded.

    Raises ModelFolderError naming what is missing or has another width.
    """
    if args.perceptual_weight > 0:
        read_component_config(args.model, "clip")
    if args.init or args.decoder_only:
        found, wanted = read_component_config(args.init or args.model, "vae")["network"], asdict(PRESETS[args.preset])
        components = wanted["deterministic"] and not found.get("deterministic", False)  # starts from some of them
        for name in ("latent_channels", "encoder_channels", "encoder_blocks", "decoder_channels", "decoder_blocks"):
            asked = wanted[name] if isinstance(wanted[name], int) else list(wanted[name])
            fewer = name == "latent_channels" and components and asked <= found[name]
            fewer |= name == "decoder_blocks" and all(a <= b for a, b in zip(asked, found[name], strict=True))
            if found[name] != asked and not fewer:
                raise ModelFolderError(f"the VAE in {args.init or args.model} has {name} {found[name]}, and --preset "
                                       f"{args.preset} {asked}: name the --preset that it was trained with")


def train(args: argparse.Namespace) -> None:
    """The training loop of the VAE; the same command resumes. Ends by measuring latents and releasing the weights."""
    from core.training.accelerator import average_gradients, make_accelerator, mean_over_processes, process_slice, send
    from core.training.ema import PowerEMA
    from core.training.optim import StepGuard, learning_rate
    from core.training.randomness import EpochSampler, step_generator
    from core.training.release import check_release, releasing
    from core.training.run_folder import RunFolder, circumstances
    from dataset import FaceStore
    from discriminator import (
        PRESETS as ADVERSARIES,
    )
    from discriminator import (
        PatchDiscriminator,
        adaptive_weight,
        discriminator_loss,
        feature_matching_loss,
        generator_loss,
    )

    store = FaceStore.open(args.data)
    check_parents(args)
    check_release(args.model, "vae", replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    weights = LossWeights(perceptual=args.perceptual_weight, adversarial=args.adversarial_weight,
                          feature_matching=args.matching_weight)
    pixels = load_pixels(store, store.select(split="train", px=128), device)
    held_out = load_pixels(store, store.select(split="val", px=128)[:16], device)

    torch.manual_seed(args.seed)  # initial weights
    model = initial_model(args, pixels)
    smooth = LatentRegularization(args.latent_noise, args.equivariance) if model.config.deterministic else None
    model = model.to(device, memory_format=torch.channels_last)
    critic = PatchDiscriminator(ADVERSARIES[scale_of(args.preset)]).to(device, memory_format=torch.channels_last)
    perceptual = None
    if weights.perceptual > 0:
        from train_clip import load_clip

        clip, _ = load_clip(args.model, device)
        perceptual = clip.image.features
    trained = list((model.decoder if args.decoder_only else model).parameters())
    model.encoder.requires_grad_(not args.decoder_only)
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.learning_rate, betas=(0.0, 0.99), fused=True)
    ema = PowerEMA(model, relative_std=0.05)
    sampler = EpochSampler(len(pixels), args.batch_size, args.seed)
    settings = {"component": "vae", "preset": args.preset, "seed": args.seed, "batch_size": args.batch_size,
                "learning_rate": args.learning_rate, "decoder_only": args.decoder_only, "gan_start": args.gan_start,
                "balance": args.balance, "weights": asdict(weights), "data": store.fingerprint,
                "clip": None if perceptual is None else component_hash(args.model, "clip"),
                "network": json.loads(json.dumps(asdict(model.config)))}
    if smooth is not None:
        settings["latent_noise"] = smooth.noise  # the weight of the explicit term may change when a run is resumed
    run = RunFolder(Path(args.run), settings, total_steps=args.steps, decay_share=args.decay_share,
                    main=accelerator.is_main_process,
                    how=circumstances(args, accelerator),
                    parts={"model": model, "critic": critic, "optimizer": optimizer,
                           "critic_optimizer": critic_optimizer, "ema": ema})
    critic_guard = StepGuard()
    gan_start = int(args.gan_start * args.steps)
    first = run.resume()
    guard = StepGuard(skipped=run.extra.get("skipped", 0))
    mine = process_slice(accelerator, args.batch_size)

    for step, show in run.steps(first, args, accelerator, "VAE"):
        rate = learning_rate(step, peak=args.learning_rate, total_steps=args.steps, warmup_steps=args.warmup_steps,
                             decay_share=args.decay_share)
        for group in (optimizer, critic_optimizer):
            for parameters in group.param_groups:
                parameters["lr"] = rate
        generator = step_generator(args.seed, step)
        images = mirror(to_images(pixels[send(sampler.batch(step), device)]), generator)
        noise = send(torch.randn(args.batch_size, model.config.latent_channels, images.shape[2] // FACTOR,
                                 images.shape[3] // FACTOR, generator=generator), device)
        images, noise = images[mine].contiguous(memory_format=torch.channels_last), noise[mine]
        adversarial_on = gan_start <= step and args.gan_start < 1

        with accelerator.autocast():
            terms = {}
            if smooth is None:
                posterior = model.encode(images)
                z = posterior.mean + posterior.std * noise
            else:
                images, z, terms = smooth_latents(model, images, smooth, generator, args.decoder_only)
            recon = model.decoder.soft(z).float()
            loss = sum(((smooth.equivariance if smooth and name == "equivariance" else 1e-3) * value
                        for name, value in terms.items()), torch.zeros((), device=device))
            terms |= {"charbonnier": charbonnier(recon, images), "gradient": gradient_loss(recon, images)}
            loss = loss + terms["charbonnier"] + weights.gradient * terms["gradient"]
            if smooth is None and not args.decoder_only:  # both terms shape latents; a frozen encoder does not change
                terms["kl"] = posterior.kl()
                # equivariance: the latent scaled is the picture scaled
                small = model.decoder.soft(F.avg_pool2d(z, 2)).float()
                terms["downscale"] = charbonnier(small, F.avg_pool2d(images, 2))
                loss = loss + weights.kl * terms["kl"] + weights.downscale * terms["downscale"]
            if perceptual is not None:
                terms["perceptual"] = perceptual_loss(perceptual, recon, images)
                loss = loss + weights.perceptual * terms["perceptual"]
            if adversarial_on:
                critic.requires_grad_(False)
                logits_fake, features_fake = critic(recon)
                with torch.no_grad():
                    _, features_real = critic(images)
                terms["adversarial"] = generator_loss(logits_fake)
                terms["matching"] = feature_matching_loss(features_real, features_fake)
                if args.balance == "adaptive":
                    terms["adaptive_weight"] = adaptive_weight(loss, terms["adversarial"], model.decoder.head.weight)
                balance = terms.get("adaptive_weight", 1.0)
                loss = (loss + weights.adversarial * balance * terms["adversarial"]
                        + weights.feature_matching * terms["matching"])
                critic.requires_grad_(True)
        loss.backward()
        average_gradients(accelerator, trained)
        norm = guard.step(optimizer, trained)

        if adversarial_on:
            with accelerator.autocast():
                logits_real, _ = critic(images)
                logits_fake, _ = critic(recon.detach())
                terms["critic"] = discriminator_loss(logits_real, logits_fake)
            terms["critic"].backward()
            average_gradients(accelerator, critic.parameters())
            critic_guard.step(critic_optimizer, list(critic.parameters()))
        ema.update(model, step + 1)

        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            values = {name: float(value.detach()) for name, value in terms.items()}
            values = mean_over_processes(accelerator, values | {"loss": float(loss.detach())})
            values |= {"grad_norm": float(norm), "lr": rate, "skipped": guard.skipped}
            run.log(step + 1, values)
            show(f"loss {values['loss']:.4f} charb {values['charbonnier']:.4f}")
        if (step + 1) % args.save_every == 0 or show.last:
            run.save(step + 1, {"skipped": guard.skipped})
        if run.main and len(held_out) and ((step + 1) % args.picture_every == 0 or step + 1 == args.steps):
            snapshot = averaged(model, ema, device)
            if smooth is not None and not args.decoder_only:
                snapshot = normalized(snapshot, pixels[:256])
            with torch.inference_mode(), accelerator.autocast():
                pairs = torch.cat([to_images(held_out), snapshot.decode(snapshot.encode(to_images(held_out)).mean)])
            run.picture(f"step-{step + 1:07d}", pairs, columns=8)
            real, copies = pairs.clamp(-1, 1).chunk(2)
            psnr = -10 * torch.log10(((real - copies) / 2).square().mean())
            quality = {"val_psnr_16": float(psnr)}
            if smooth is not None:
                quality |= {f"val_{name}": value for name, value in latent_quality(snapshot, held_out).items()}
            run.log(step + 1, quality)
    run.finish()
    if run.main and run.finished:
        final = averaged(model, ema, device)
        if args.decoder_only:  # bit for bit: averaging turned -0 into 0, and cached latents go by the weights' hash
            final.load_state_dict({name: value for name, value in model.state_dict().items()
                                   if not name.startswith("decoder.")}, strict=False)
        elif smooth is not None:
            final = normalized(final, pixels[: args.measure])
        else:
            mean, std = measure_latents(final, pixels[: args.measure])
            final.latent_mean.copy_(mean)
            final.latent_std.copy_(std)
        final = sharpened(final, pixels[: min(args.measure, 512)])
        with releasing(args.model, "vae", replace=args.replace, run=args.run):
            release(final, Path(args.model), settings | {"steps": args.steps})
        release_preview(final, pixels[: min(args.measure, 2048)], Path(args.model))
        print(f"released to {args.model}/vae")


def initial_model(args: argparse.Namespace, pixels: Tensor) -> VAE:
    """The VAE before the first step: new, that of a model folder, or one of fewer channels made of its components."""
    model = VAE(PRESETS[args.preset])
    if not (args.init or args.decoder_only):
        return model
    folder = args.init or args.model  # a decoder learns what an encoder already says
    config, state = load_component(folder, "vae")
    if model.config.deterministic and not config["network"].get("deterministic", False):
        return from_components(model, load_vae(folder, pixels.device), pixels[:512]).cpu()
    start = fewer_blocks(without_filter(state), config["network"], model.config)
    if not args.decoder_only:  # the encoder learns, so its statistics are measured again at the end
        start |= {name: value for name, value in model.state_dict().items()
                  if name.startswith("latent_") and start[name].shape != value.shape}
    load_strictly(model, start, "the VAE to start from")
    return model


def fewer_blocks(state: Mapping[str, Tensor], network: Mapping[str, Any], config: VAEConfig) -> dict[str, Tensor]:
    """Weights for a decoder with fewer residual blocks: the first ones of each level stay."""
    places, own, found = 1, 1, {0: 0}  # of a stage there -> here
    for had, has in zip(network["decoder_blocks"], config.decoder_blocks, strict=True):
        found |= {places + i: own + i for i in range(min(had, has))}
        places, own = places + had, own + has
        found[places] = own  # the step up, or the last normalisation
        places, own = places + 1, own + 1
    result = {}
    for name, value in state.items():
        if name.startswith("decoder.stages."):
            place, rest = name.removeprefix("decoder.stages.").split(".", 1)
            if int(place) not in found:
                continue
            name = f"decoder.stages.{found[int(place)]}.{rest}"
        result[name] = value
    return result


@torch.inference_mode()
def from_components(model: VAE, other: VAE, pixels: Tensor) -> VAE:
    """``model`` with the weights of ``other`` whose latents are its first principal components, normalised.

    The projection is folded into the encoder's last and the decoder's first layer, so that nothing is lost but the
    components left out. Other layers must have the same shapes. pixels: uint8 [N, H, W, 3] to measure them on.
    """
    z = torch.cat([other.encode(to_images(part)).mean.cpu() for part in pixels.split(64)])
    projection, inverse, mean = principal_components(z, model.config.latent_channels)
    source, own = other.cpu().state_dict(), model.state_dict()
    for name, value in without_filter(source).items():
        if name in own and own[name].shape == value.shape and not name.startswith("latent_"):
            own[name].copy_(value)
    channels = len(mean)
    weight, bias = source["encoder.head.weight"][:channels], source["encoder.head.bias"][:channels]
    own["encoder.head.weight"].copy_(torch.einsum("ck,kihw->cihw", projection, weight))
    own["encoder.head.bias"].copy_(projection @ (bias - mean))
    weight, bias = source["decoder.stages.0.weight"], source["decoder.stages.0.bias"]
    own["decoder.stages.0.weight"].copy_(torch.einsum("okhw,kc->ochw", weight, inverse))
    own["decoder.stages.0.bias"].copy_(bias + torch.einsum("okhw,k->o", weight, mean))
    return model


def smooth_latents(model: VAE, images: Tensor, how: LatentRegularization, generator: torch.Generator,
                   frozen: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What one step of a deterministic VAE decodes: target images, noised latents, and terms that shape the latents.

    Half of the steps decode latents that were moved (shifted by less than a cell, scaled) and want the moved images
    (https://arxiv.org/abs/2502.09509), with |E(moved image) - moved E(image)|^2 as the term "equivariance". ``frozen``:
    the encoder does not learn, so its latents are taken as they are and have no terms.
    Shapes: images [B, 3, H, W] -> [B, 3, h, w] with h, w <= H, W.
    """
    terms: dict[str, Tensor] = {}
    moved = float(torch.rand(1, generator=generator)) < how.moved_share
    crop = float(torch.rand(1, generator=generator)) < how.crop_share and how.crop < images.shape[2]
    if not moved and crop:
        images = random_crops(images, how.crop, generator).contiguous(memory_format=torch.channels_last)
    raw = model.encode(images).mean
    z = raw if frozen else normalize_batch(raw)
    if not frozen:
        terms["drift"] = drift_penalty(raw)
    if moved:
        images, z = move_both(images, z, generator)
        if not frozen and how.equivariance > 0:
            again = model.encode(images).mean
            mean, std = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
            terms["equivariance"] = equivariance_error((again - mean) / std.clamp_min(1e-4), z)
    return images, add_noise(z, how.noise, generator).contiguous(memory_format=torch.channels_last), terms


@torch.inference_mode()
def normalized(model: VAE, pixels: Tensor) -> VAE:
    """The same deterministic VAE with mean 0 and deviation 1 per channel over these uint8 images [N, H, W, 3]: measured
    and folded into the encoder's last layer, since the decoder was trained on normalised latents. What then is left of
    mean and deviation in each place, mirrored images counted too, becomes ``statistics``."""
    mean, std = latent_moments(model, pixels)
    centre = mean.mean((1, 2))
    spread = (std.square() + mean.square()).mean((1, 2)).sub(centre.square()).sqrt()
    head = model.encoder.head
    head.weight.copy_(head.weight / spread.to(head.weight.device)[:, None, None, None])
    head.bias.copy_((head.bias - centre.to(head.bias.device)) / spread.to(head.bias.device))
    if model.config.statistics_size:
        model.latent_mean.copy_((mean - centre[:, None, None]) / spread[:, None, None])
        model.latent_std.copy_(std / spread[:, None, None])
    return model


@torch.inference_mode()
def latent_moments(model: VAE, pixels: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and deviation [C, h, w] of the encoder's means over uint8 images [N, H, W, 3] and their mirror images."""
    total: Tensor = torch.zeros(1)
    square: Tensor = torch.zeros(1)
    for part in pixels.split(batch_size):
        images = to_images(part)
        for view in (images, images.flip(-1)):
            z = model.encode(view.contiguous(memory_format=torch.channels_last)).mean.cpu().double()
            total, square = total + z.sum(0), square + z.square().sum(0)
    mean = total / (2 * len(pixels))
    return mean.float(), (square / (2 * len(pixels)) - mean.square()).clamp_min(1e-8).sqrt().float()


@torch.inference_mode()
def latent_quality(model: VAE, pixels: Tensor, seed: int = 0) -> dict[str, float]:
    """The figures by which latents are accepted: `measure_equivariance`, and PSNR (dB) of copies with noise on their
    latents, 0.125 and U(0, 0.25) of their deviation, before the last filter. pixels: uint8 [N, H, W, 3]."""
    images = to_images(pixels).contiguous(memory_format=torch.channels_last)
    mean, std = (one.mean((1, 2), keepdim=True) for one in model.statistics)  # of no place: pictures of other sizes too

    def encode(part: Tensor) -> Tensor:
        return (model.encode(part).mean - mean) / std

    result = measure_equivariance(encode, images)
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([encode(part) for part in images.split(32)])
    eps = torch.randn(z.shape, generator=generator).to(z.device)
    uniform = (0.25 * torch.rand(len(z), 1, 1, 1, generator=generator)).to(z.device)
    for name, sigma in (("psnr_clean", 0.0), ("psnr_noise_0.125", 0.125), ("psnr_noise_uniform", uniform)):
        noised = (z + sigma * eps) * std + mean
        copies = torch.cat([model.decoder.soft(part).float() for part in noised.split(32)]).clamp(-1, 1)
        result[name] = float(-10 * torch.log10(((copies - images) / 2).square().mean()))
    return result


@dataclass(frozen=True)
class FinishWeights:
    """Weights of the terms that teach the decoder's end. Fine: every pixel of a copy; coarse: means of 2x2 pixels;
    anchor: means of 4x4 pixels of drawn latents, which have no original, and stay where the decoder had put them."""

    fine: float = 0.1
    coarse: float = 1.0
    anchor: float = 1.0
    adversarial: float = 0.2
    penalty: float = 0.05  # of the critic's squared gradient, half of it each for real and generated pictures
    penalty_every: int = 4  # steps, at so many times the weight


def finish(args: argparse.Namespace) -> None:
    """Teach the end of a trained decoder by an adversary and release it; the same command resumes.

    Encoder, latents and the decoder's first stages stay; what is behind the last upsampling learns, with a new stage at
    full resolution. Half of a batch are photographs: their copies stand against them, patch by patch. The other half
    are latents that the UNet drew (``--drawn``), against photographs: pictures that are drawn have no original.
    """
    from core.training.accelerator import average_gradients, make_accelerator, mean_over_processes, process_slice, send
    from core.training.ema import PowerEMA
    from core.training.optim import StepGuard, learning_rate
    from core.training.randomness import EpochSampler, step_generator
    from core.training.release import check_release, releasing
    from core.training.run_folder import RunFolder, circumstances
    from dataset import FaceStore
    from discriminator import TEXTURE_CHANNELS, TextureCritic, gradient_penalty, relativistic_loss

    check_release(args.model, "vae", replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    weights = FinishWeights()
    store = FaceStore.open(args.data)
    pixels = load_pixels(store, store.select(split="train", px=128), device)
    held_out = load_pixels(store, store.select(split="val", px=128)[:16], device)
    before = load_vae(args.init or args.model, device)
    if before.config.finish_channels:
        raise SystemExit(f"{args.init or args.model} is finished already: --init a folder as it was before")
    torch.manual_seed(args.seed)  # initial weights
    model = VAE(replace(before.config, finish_channels=args.finish_channels))
    load_strictly(model, model.state_dict() | before.state_dict(), "the VAE to finish")
    model = model.to(device, memory_format=torch.channels_last)
    critic = TextureCritic(TEXTURE_CHANNELS[scale_of(args.preset)]).to(device, memory_format=torch.channels_last)
    drawn = torch.from_numpy(np.concatenate([np.load(path) for path in args.drawn])).to(device) if args.drawn else None
    if drawn is not None and drawn.shape[1] != model.config.latent_channels:
        raise SystemExit(f"--drawn holds latents of {drawn.shape[1]} channels, this VAE's have "
                         f"{model.config.latent_channels}")

    decoder = model.decoder
    last = max(place for place, stage in enumerate(decoder.stages) if isinstance(stage, Up))
    front, back = decoder.stages[:last], decoder.stages[last:]
    new = list(decoder.finish.parameters()) if decoder.finish is not None else []
    trained = [*new, *back.parameters(), *decoder.head.parameters()]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    groups = [{"params": new}, {"params": trained[len(new):]}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.learning_rate, betas=(0.0, 0.99),
                                         weight_decay=0.0, fused=True)
    ema = PowerEMA(model, relative_std=0.05)
    halves = args.batch_size if drawn is None else args.batch_size // 2
    sampler = EpochSampler(len(pixels), halves, args.seed)
    settings = {"component": "vae-finish", "preset": args.preset, "seed": args.seed, "batch_size": args.batch_size,
                "learning_rate": args.learning_rate, "drawn": 0 if drawn is None else len(drawn),
                "drawn_sha256": [file_hash(Path(path)) for path in args.drawn or ()],
                "data": store.fingerprint, "vae": component_hash(args.init or args.model, "vae"),
                "weights": asdict(weights), "network": json.loads(json.dumps(asdict(model.config)))}
    run = RunFolder(Path(args.run), settings, total_steps=args.steps, decay_share=args.decay_share,
                    main=accelerator.is_main_process, how=circumstances(args, accelerator),
                    parts={"model": model, "critic": critic, "optimizer": optimizer,
                           "critic_optimizer": critic_optimizer, "ema": ema})
    first = run.resume()
    guard, critic_guard = StepGuard(skipped=run.extra.get("skipped", 0)), StepGuard()
    mine = process_slice(accelerator, halves)

    for step, show in run.steps(first, args, accelerator, "finish"):
        rate = learning_rate(step, peak=args.learning_rate, total_steps=args.steps,
                                      warmup_steps=args.warmup_steps, decay_share=args.decay_share)
        for parameters, share in zip((*optimizer.param_groups, *critic_optimizer.param_groups), (1, 0.25, 1),
                                     strict=True):  # what has learned already takes smaller steps
            parameters["lr"] = rate * share
        generator = step_generator(args.seed, step)
        images = mirror(to_images(pixels[send(sampler.batch(step), device)]), generator)[mine]
        shape = (halves, model.config.latent_channels, images.shape[2] // FACTOR, images.shape[3] // FACTOR)
        noise = send(torch.randn(shape, generator=generator), device)[mine]
        real = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            with torch.no_grad():
                posterior = model.encode(real)
                z = posterior.mean + posterior.std * noise
                if drawn is not None:
                    rows = torch.randint(len(drawn), (halves,), generator=generator)[mine]
                    others = torch.randint(len(pixels), (halves,), generator=generator)[mine]
                    z = torch.cat([z, model.unwhiten(drawn[send(rows, device)].float())])
                    real = torch.cat([real, to_images(pixels[send(others, device)])])
                z, real = (one.contiguous(memory_format=torch.channels_last) for one in (z, real))
                features = front(z)
                wanted = critic(real)
                soft = before.decoder.end(before.decoder.stages[last:](features[len(images):])).float()
            pictures = decoder.end(back(features)).float()
            copies, rest = pictures[: len(images)], pictures[len(images) :]
            terms = {"fine": charbonnier(copies, images), "coarse": charbonnier(halved(copies), halved(images))}
            if len(rest):
                terms["anchor"] = charbonnier(halved(halved(rest)), halved(halved(soft)))
            critic.requires_grad_(False)
            terms["adversarial"] = relativistic_loss(critic(pictures), wanted)
            critic.requires_grad_(True)
            loss = torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()
        loss.backward()
        average_gradients(accelerator, trained)
        norm = guard.step(optimizer, trained)

        penalised = step % weights.penalty_every == 0
        real, fake = real.requires_grad_(penalised), pictures.detach().requires_grad_(penalised)
        with accelerator.autocast():
            logits_real, logits_fake = critic(real), critic(fake)
            terms["critic"] = critic_loss = relativistic_loss(logits_real, logits_fake)
        if penalised:
            terms["penalty"] = gradient_penalty(logits_real, real) + gradient_penalty(logits_fake, fake)
            critic_loss = critic_loss + weights.penalty_every * weights.penalty / 2 * terms["penalty"]
        critic_loss.backward()
        average_gradients(accelerator, critic.parameters())
        critic_guard.step(critic_optimizer, list(critic.parameters()), max_norm=10.0)
        ema.update(model, step + 1)

        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            values = {name: float(value.detach()) for name, value in terms.items()}
            values |= {"loss": float(loss.detach()),
                       "psnr": float(-10 * torch.log10(((copies - images).detach() / 2).square().mean()))}
            values = mean_over_processes(accelerator, values)
            values |= {"grad_norm": float(norm), "lr": rate, "skipped": guard.skipped}
            run.log(step + 1, values)
            show(f"critic {values['critic']:.3f} psnr {values['psnr']:.2f}")
        if (step + 1) % args.save_every == 0 or show.last:
            run.save(step + 1, {"skipped": guard.skipped})
        if run.main and len(held_out) and ((step + 1) % args.picture_every == 0 or step + 1 == args.steps):
            snapshot = averaged(model, ema, device)
            with torch.inference_mode(), accelerator.autocast():
                copies = snapshot.decode(snapshot.encode(to_images(held_out)).mean)
            run.picture(f"step-{step + 1:07d}", torch.cat([to_images(held_out), copies]), columns=8)
            error = ((to_images(held_out) - copies.clamp(-1, 1)) / 2).square().mean()
            run.log(step + 1, {"val_psnr": float(-10 * torch.log10(error))})
    run.finish()
    if run.main and run.finished:
        final = averaged(model, ema, device)
        kept = {name: value for name, value in before.state_dict().items() if not name.startswith("decoder.")}
        final.load_state_dict(kept, strict=False)  # bit for bit, as in `train`
        config, _ = load_component(args.init or args.model, "vae")
        with releasing(args.model, "vae", replace=args.replace, run=args.run):
            release(final, Path(args.model), config.get("training", {}) | {"finish": settings | {"steps": args.steps}})
        print(f"released to {args.model}/vae")


def halved(images: Tensor) -> Tensor:
    """Means of 2x2 pixels: [B, 3, H, W] -> [B, 3, H/2, W/2]."""
    return F.avg_pool2d(images, 2)


def averaged(model: VAE, ema: Any, device: torch.device) -> VAE:
    """A copy of the model that carries the averaged weights."""
    copy = VAE(model.config)
    copy.load_state_dict(ema.state, strict=True)
    return copy.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def sharpened(model: VAE, pixels: Tensor) -> VAE:
    """The same VAE with a filter after it that gives its copies of these uint8 images [N, H, W, 3] their spectrum."""
    from core.nn.layers import to_pixels

    with torch.inference_mode():
        copies = [to_pixels(model.decoder.soft(model.encode(to_images(part)).mean)) for part in pixels.split(64)]
    return with_kernel(model, fit_kernel(np.concatenate(copies), pixels.cpu().numpy()))


def without_filter(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `train` learns: without the filter and what was finished behind it."""
    return {name: value for name, value in state.items()
            if not name.startswith(("decoder.sharpen.", "decoder.finish."))}


def with_kernel(model: VAE, kernel: Tensor | None) -> VAE:
    """The same VAE with this filter [k, k] after its decoder, or with none. Raises ValueError for a finished one."""
    if model.config.finish_channels:
        raise ValueError("this decoder was finished behind the filter that it has: fit another before vae.py --finish")
    copy = VAE(replace(model.config, sharpen_size=0 if kernel is None else len(kernel)))
    state = without_filter(model.state_dict())
    copy.load_state_dict(state if kernel is None else state | {"decoder.sharpen.kernel": kernel})
    return copy.eval().requires_grad_(False).to(model.latent_mean.device, memory_format=torch.channels_last)


def release(model: VAE, folder: Path, training: dict[str, Any]) -> None:
    """Write the VAE into a model folder with its measured latent statistics and provenance."""
    encoder = encoder_hash(model)
    config = {"network": asdict(model.config), "factor": FACTOR, "encoder_sha256": encoder,
              "latent_mean": model.latent_mean.tolist(), "latent_std": model.latent_std.tolist(), "training": training}
    save_component(folder, "vae", model.state_dict(), config, extra={"commit": git_commit(Path(__file__).parent)})


def release_preview(model: VAE, pixels: Tensor, folder: Path) -> None:
    """Fit the preview decoder on uint8 images [N, H, W, 3] and write it into a model folder that holds this VAE."""
    batches = (to_images(batch) for batch in pixels.split(64))
    with torch.inference_mode():
        preview = fit_preview((model.whiten(model.encode(images).mean), images) for images in batches)
    save_preview(preview, folder, encoder_hash(model))


def refit(args: argparse.Namespace) -> None:
    """Give a model folder a preview decoder without touching its VAE."""
    from core.training.accelerator import make_accelerator
    from core.training.release import check_release
    from dataset import FaceStore

    check_release(args.model, "preview", replace=args.replace)
    device = make_accelerator(args.device, "no").device
    store = FaceStore.open(args.data)
    chosen = store.select(split="train", px=128)[: min(args.measure, 2048)]
    release_preview(load_vae(args.model, device), load_pixels(store, chosen, device), Path(args.model))
    print(f"released to {args.model}/preview")


def encoder_hash(model: VAE) -> str:
    """SHA-256 over the fp16 encoder weights and the whitening: what cached latents depend on, and nothing else."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(name.encode())
            digest.update(value.detach().cpu().to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def reconstruction_metrics(
    model: VAE, pixels: Tensor, batch_size: int = 32, decode: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """PSNR (dB), SSIM and MS-SSIM of reconstructions of uint8 images [N, 128, 128, 3]; data range 1 for [0, 1].

    ``decode`` takes the place of the model's own decoder: raw latents -> images.
    """
    from torchmetrics.image import (
        MultiScaleStructuralSimilarityIndexMeasure,
        PeakSignalNoiseRatio,
        StructuralSimilarityIndexMeasure,
    )

    # kernel 7 and four scales: the default 11 and five scales need sides above 160 pixels
    ms_ssim = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0, kernel_size=7,
                                                         betas=(0.0517, 0.3295, 0.3462, 0.2726))
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
    metrics = {"psnr_db": PeakSignalNoiseRatio(data_range=1.0), "ssim": ssim, "ms_ssim": ms_ssim}
    for start in range(0, len(pixels), batch_size):
        images = to_images(pixels[start : start + batch_size])
        recon = (decode or model.decode)(model.encode(images).mean).clamp(-1, 1)
        for metric in metrics.values():
            metric.update((recon.cpu() + 1) / 2, (images.cpu() + 1) / 2)
    return {name: float(metric.compute()) for name, metric in metrics.items()} | {"n": len(pixels)}


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Measure the released VAE on the sharp test images; writes ``metrics.json`` and a grid into the run folder."""
    from core.training.accelerator import make_accelerator
    from core.training.run_folder import save_grid
    from dataset import FaceStore

    device = make_accelerator(args.device, "no").device
    model = load_vae(args.model, device)
    store = FaceStore.open(args.data)
    pixels = load_pixels(store, store.select(split="test", px=128)[: args.samples], device)
    result = reconstruction_metrics(model, pixels)
    preview = load_preview(args.model, encoder_hash(model), device)
    if preview is not None:
        copies = reconstruction_metrics(model, pixels, decode=lambda z: preview(model.whiten(z)))
        result["preview_psnr_db"] = copies["psnr_db"]
    result |= latent_quality(model, pixels[:256])
    with torch.inference_mode():
        images = to_images(pixels[:16])
        pairs = torch.cat([images, model.decode(model.encode(images).mean)])
        save_grid(pairs, Path(args.run) / "reconstructions.png", 8)
    (Path(args.run) / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    from core.training.release import add_release_options, of_preset, settle

    keep_quiet()
    parser = argparse.ArgumentParser(description="Train or measure the image autoencoder.", allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true")
    mode.add_argument("--finish", action="store_true", help="teach the end of a trained decoder by an adversary")
    mode.add_argument("--fit-preview", action="store_true", help="fit the preview decoder of --model again")
    mode.add_argument("--eval", action="store_true")
    parser.add_argument("--data", default="archive/prepared", help="prepared store (python dataset.py --prepare)")
    add_release_options(parser, " and to read CLIP from")
    parser.add_argument("--run", "--run-folder", help="folder of this run; the same command resumes from it (runs/vae, "
                        "runs/finish; torchrun has a --run of its own)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="celeba128")
    parser.add_argument("--init", help="model folder whose VAE to start from (--decoder-only: --model)")
    parser.add_argument("--decoder-only", action="store_true", help="freeze the encoder and its latents")
    parser.add_argument("--steps", type=int, help=of_preset(RUNS, "steps"))
    parser.add_argument("--stop-at", type=int, help="stop early after this many steps, resumable")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="the same by the clock")
    parser.add_argument("--batch-size", type=int, help=of_preset(RUNS, "batch_size"))
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--warmup-steps", type=int, help=of_preset(RUNS, "warmup_steps"))
    parser.add_argument("--decay-share", type=float, default=0.3)
    parser.add_argument("--gan-start", type=float, default=0.35, help="share without the adversary; 1: never")
    parser.add_argument("--perceptual-weight", type=float, default=LossWeights().perceptual, help="0 needs no CLIP")
    parser.add_argument("--adversarial-weight", type=float, default=LossWeights().adversarial,
                        help="strength of the adversary relative to all other terms")
    parser.add_argument("--balance", choices=("adaptive", "fixed"), default="adaptive",
                        help="adaptive: as loud as the other terms' gradient, which is next to nothing once they have "
                        "converged; fixed: the weight itself")
    parser.add_argument("--matching-weight", type=float, default=LossWeights().feature_matching,
                        help="strength of the distance between the discriminator's features")
    parser.add_argument("--latent-noise", type=float, default=LatentRegularization().noise,
                        help="deterministic presets: the decoder learns to bear noise of up to this deviation")
    parser.add_argument("--equivariance", type=float, default=LatentRegularization().equivariance,
                        help="deterministic presets: weight of |E(moved image) - moved E(image)|^2")
    parser.add_argument("--drawn", nargs="+", metavar="FILE", help="--finish: latents that the UNet drew "
                        "(evaluate.py draw-latents FILE), half of every batch")
    parser.add_argument("--finish-channels", type=int, default=32, help="--finish: width of the new stage")
    parser.add_argument("--measure", type=int, default=8192,
                        help="images that the latent statistics (and, at most 2048, the preview decoder) come from")
    parser.add_argument("--samples", type=int, default=100000, help="--eval: at most this many test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto")
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--picture-every", type=int, default=500)
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    args.run = args.run or ("runs/finish" if args.finish else "runs/vae")
    settle(parser, args, RUNS, "--finish" if args.finish else "--fit-preview" if args.fit_preview else "")
    if args.train or args.finish:
        with run_lock(args.run):
            (train if args.train else finish)(args)
    else:
        (refit if args.fit_preview else evaluate)(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
