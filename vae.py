"""How does an autoencoder learn to make a latent image of a face, and a face of a latent?

Presets, losses, training loop, release, command line. The network is in core/nn/autoencoder.py; how latents are made to
move with their images in core/nn/equivariance.py, how they are measured in core/nn/latent_statistics.py, what the
adversary is in discriminator.py. It does not know about text or diffusion.

    python vae.py --train                    train, measure the latent statistics, release to the model folder
    python vae.py --train --decoder-only     continue the decoder alone; encoder and cached latents stay valid
    python vae.py --fit-preview              only fit the preview decoder again (also done by --train)
    python vae.py --eval                     PSNR, SSIM, MS-SSIM on the test split and a grid of reconstructions

Sources: VAE https://arxiv.org/abs/1312.6114, latent diffusion https://arxiv.org/abs/2112.10752, scale-equivariant
latents (EQ-VAE) https://arxiv.org/abs/2502.09509.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.command import Command, alone, run_command, run_one
from core.nn.autoencoder import FACTOR, VAE, VAEConfig, encoder_hash, load_vae
from core.nn.checkpoint import component_hash, git_commit, read_component_config, save_component
from core.nn.equivariance import LatentRegularization, regularized_step
from core.nn.latent_statistics import latent_quality, measure_latents, normalized
from core.nn.layers import to_images, to_pixels
from core.nn.preview_decoder import fit_preview, load_preview, save_preview
from core.nn.sharpening import fit_kernel
from core.nn.warm_start import check_shapes, started_from, without_filter
from core.quiet import keep_quiet
from core.training.augmentation import load_pixels, mirror

PRESETS = {
    "celeba128": VAEConfig(),
    "smooth8": VAEConfig(8, deterministic=True, statistics_size=16),
    "smooth8-fast": VAEConfig(8, decoder_blocks=(2, 1, 1), deterministic=True, statistics_size=16),
    "tiny": VAEConfig(4, (16, 24), (1, 1), (24, 16, 12), (1, 1, 1)),
    "tiny-smooth": VAEConfig(4, (16, 24), (1, 1), (24, 16, 12), (1, 1, 1), deterministic=True,
                             statistics_size=16),
}
RUNS = {  # how long a run of each preset is
    "celeba128": {"steps": 20000, "batch_size": 16, "warmup_steps": 100},
    **{name: {"steps": 2000, "batch_size": 8, "warmup_steps": 40} for name in ("smooth8", "smooth8-fast")},
    **{name: {"steps": 10, "batch_size": 8, "warmup_steps": 1} for name in ("tiny", "tiny-smooth")},
}

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
    squared: float = 0.0


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


# ------------------------------------------------------------------------------------------------------------ training


def train(args: argparse.Namespace) -> None:
    """The training loop of the VAE; the same command resumes. Ends by measuring latents and releasing the weights."""
    from core.training.accelerator import average_gradients, make_accelerator, mean_over_processes, process_slice, send
    from core.training.ema import PowerEMA
    from core.training.optim import StepGuard, learning_rate
    from core.training.randomness import EpochSampler, step_generator
    from core.training.release import check_release, releasing
    from core.training.run_folder import RunFolder, circumstances
    from dataset import FaceStore
    from discriminator import PRESETS as ADVERSARIES
    from discriminator import (
        PatchDiscriminator,
        adaptive_weight,
        discriminator_loss,
        feature_matching_loss,
        generator_loss,
    )

    store = FaceStore.open(args.data)
    if args.perceptual_weight > 0 and read_component_config(args.model, "clip").get("training", {}).get("steps") == 0:
        print(f"the image encoder of {args.model} learned nothing (pictures without captions): it is not asked")
        args.perceptual_weight = 0.0
    start = args.init or (args.model if args.decoder_only else None)  # a decoder learns what an encoder already says
    if start is not None:
        check_shapes(PRESETS[args.preset], args.preset, start)
    check_release(args.model, "vae", replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    weights = LossWeights(perceptual=args.perceptual_weight, adversarial=args.adversarial_weight,
                          feature_matching=args.matching_weight, squared=args.squared_weight)
    pixels = load_pixels(store, store.sharp("train"), device)
    held_out = load_pixels(store, store.sharp("val")[:16], device)

    torch.manual_seed(args.seed)  # initial weights
    model = VAE(PRESETS[args.preset])
    if start is not None:
        model = started_from(model, start, pixels[:512], keep_statistics=args.decoder_only)
    smooth = LatentRegularization(args.latent_noise, args.equivariance) if model.config.deterministic else None
    model = model.to(device, memory_format=torch.channels_last)
    adversary = ADVERSARIES["tiny" if args.preset.startswith("tiny") else "celeba128"]
    critic = PatchDiscriminator(adversary).to(device, memory_format=torch.channels_last)
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
                    report_to=args.report_to, main=accelerator.is_main_process,
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
                images, z, terms = regularized_step(lambda one: model.encode(one).mean, images, smooth, generator,
                                                    args.decoder_only)
            recon = model.decoder.soft(z).float()
            loss = sum(((smooth.equivariance if smooth and name == "equivariance" else 1e-3) * value
                        for name, value in terms.items()), torch.zeros((), device=device))
            terms |= {"charbonnier": charbonnier(recon, images), "gradient": gradient_loss(recon, images)}
            loss = loss + terms["charbonnier"] + weights.gradient * terms["gradient"]
            if weights.squared > 0:
                terms["squared"] = F.mse_loss(recon, images)
                loss = loss + weights.squared * terms["squared"]
            if smooth is None and not args.decoder_only:  # both terms shape latents; a frozen encoder does not change
                terms["kl"] = posterior.kl()
                # equivariance: the latent scaled is the image scaled
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
                    terms["adaptive_weight"] = adaptive_weight(loss, terms["adversarial"],
                                                               model.decoder.conv_out.weight)
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


def averaged(model: VAE, ema: Any, device: torch.device) -> VAE:
    """A copy of the model that carries the averaged weights."""
    copy = VAE(model.config)
    copy.load_state_dict(ema.state, strict=True)
    return copy.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------- release


def sharpened(model: VAE, pixels: Tensor) -> VAE:
    """The same VAE with a filter after it that gives its copies of these uint8 images [N, H, W, 3] their spectrum."""
    with torch.inference_mode():
        copies = [to_pixels(model.decoder.soft(model.encode(to_images(part)).mean)) for part in pixels.split(64)]
    return with_kernel(model, fit_kernel(np.concatenate(copies), pixels.cpu().numpy()))


def with_kernel(model: VAE, kernel: Tensor | None) -> VAE:
    """The same VAE with this filter [k, k] after its decoder, or with none."""
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
        preview = fit_preview((model.normalize(model.encode(images).mean), images) for images in batches)
    save_preview(preview, folder, encoder_hash(model))


def refit(args: argparse.Namespace) -> None:
    """Give a model folder a preview decoder without touching its VAE."""
    from core.training.accelerator import make_accelerator
    from core.training.release import check_release
    from dataset import FaceStore

    check_release(args.model, "preview", replace=args.replace)
    device = make_accelerator(args.device, "no").device
    store = FaceStore.open(args.data)
    chosen = store.sharp("train")[: min(args.measure, 2048)]
    release_preview(load_vae(args.model, device), load_pixels(store, chosen, device), Path(args.model))
    print(f"released to {args.model}/preview")


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Measure the released VAE on the sharp test images; writes ``metrics.json`` and a grid into the run folder."""
    from core.evaluation.reconstruction import reconstruction_metrics
    from core.training.accelerator import make_accelerator
    from core.training.run_folder import save_grid
    from dataset import DataError, FaceStore

    device = make_accelerator(args.device, "no").device
    model = load_vae(args.model, device)
    store = FaceStore.open(args.data)
    if not len(rows := store.sharp("test")[: args.samples]):
        raise DataError(f"{args.data} has no test images; prepare ten or more, or say which are for the test")
    pixels = load_pixels(store, rows, device)
    result = reconstruction_metrics(model, pixels)
    preview = load_preview(args.model, encoder_hash(model), device)
    if preview is not None:
        copies = reconstruction_metrics(model, pixels, decode=lambda z: preview(model.normalize(z)))
        result["preview_psnr_db"] = copies["psnr_db"]
    result |= latent_quality(model, pixels[:256])
    with torch.inference_mode():
        images = to_images(pixels[:16])
        pairs = torch.cat([images, model.decode(model.encode(images).mean)])
        save_grid(pairs, Path(args.run) / "reconstructions.png", 8)
    (Path(args.run) / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


# ------------------------------------------------------------------------------------------------------------ commands


def train_options(parser: argparse.ArgumentParser) -> None:
    """Those of --train."""
    from core.training.options import RunDefaults, add_run
    from core.training.release import add_release_options

    add_run(parser, RUNS, RunDefaults("runs/vae", learning_rate=6e-4))
    add_release_options(parser, " and to read CLIP from")
    parser.add_argument("--init", help="model folder whose VAE to start from (--decoder-only: --model)")
    parser.add_argument("--decoder-only", action="store_true", help="freeze the encoder and its latents")
    parser.add_argument("--gan-start", type=float, default=0.35, help="share without the adversary; 1: never")
    parser.add_argument("--perceptual-weight", type=float, default=LossWeights().perceptual, help="0 needs no CLIP")
    parser.add_argument("--adversarial-weight", type=float, default=LossWeights().adversarial,
                        help="strength of the adversary relative to all other terms")
    parser.add_argument("--balance", choices=("adaptive", "fixed"), default="adaptive",
                        help="adaptive: as loud as the other terms' gradient, which is next to nothing once they have "
                        "converged; fixed: the weight itself")
    parser.add_argument("--matching-weight", type=float, default=LossWeights().feature_matching,
                        help="strength of the distance between the discriminator's features")
    parser.add_argument("--squared-weight", type=float, default=LossWeights().squared, help="of the squared error: "
                        "short runs on images of few colours need it, where an absolute error forgets the rare ones")
    parser.add_argument("--latent-noise", type=float, default=LatentRegularization().noise,
                        help="deterministic presets: the decoder learns to bear noise of up to this deviation")
    parser.add_argument("--equivariance", type=float, default=LatentRegularization().equivariance,
                        help="deterministic presets: weight of |E(moved image) - moved E(image)|^2")
    measure_option(parser)


def measure_option(parser: argparse.ArgumentParser) -> None:
    """``--measure``."""
    parser.add_argument("--measure", type=int, default=8192,
                        help="images that the latent statistics (and, at most 2048, the preview decoder) come from")


def check_train(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what --train leaves open."""
    from core.training.options import fill_from_preset
    from core.training.release import fill_model

    fill_from_preset(parser, args, RUNS)
    fill_model(args)


def preview_options(parser: argparse.ArgumentParser) -> None:
    """Those of --fit-preview."""
    from core.training.options import add_data, add_device
    from core.training.release import add_release_options

    add_data(parser)
    add_release_options(parser)
    measure_option(parser)
    add_device(parser)


def check_preview(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A trained model is changed only where it is named."""
    from core.training.options import need_model

    need_model(parser, args)


def eval_options(parser: argparse.ArgumentParser) -> None:
    """Those of --eval."""
    from core.training.options import add_evaluation

    add_evaluation(parser, "runs/vae")


COMMANDS = (
    Command("--train", "train the autoencoder and release it", train_options, alone(train), check_train),
    Command("--fit-preview", "fit the preview decoder of a model folder again", preview_options, refit, check_preview),
    Command("--eval", "measure reconstructions of the test pictures", eval_options, evaluate),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    keep_quiet()
    return run_one("Train or measure the image autoencoder.", COMMANDS, argv)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
