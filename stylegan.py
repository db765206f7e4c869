"""How does a sentence become a face in one pass? A style-based GAN in the latents of the VAE, and how it is trained.

Presets, training loop, release, command line. The networks are in core/nn/style_networks.py, what a step learns in
core/training/style_loss.py, from what in core/training/style_data.py, how faces are made of prompts in
core/nn/style_faces.py. It does not know how images are encoded (vae.py) or sentences are (train_clip.py).

    python stylegan.py --train                       train on cached latents and captions, release to the model folder
    python stylegan.py --eval                        distances, prompt alignment, milliseconds from prompt to PNG
    python stylegan.py --sample --prompt "a man"     a sheet of faces; also lines, mixtures and directions
    python stylegan.py --directions                  where in w a face grows older
    python stylegan.py --convert file.pkl            NVIDIA's generator as safetensors

Sources: StyleGAN2 https://arxiv.org/abs/1912.04958, the loss https://arxiv.org/abs/2501.05441.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.command import Command, SettingError, alone, run_command, run_one
from core.nn.autoencoder import encoder_hash, load_vae
from core.nn.checkpoint import component_hash, git_commit, save_component, update_index, write_json
from core.nn.clip import load_clip
from core.nn.device import pick_device
from core.nn.layers import to_images
from core.nn.openvino_backend import installed_version
from core.nn.style_faces import PSI, StyleFaces
from core.nn.style_networks import (
    StyleConfig,
    StyleDiscriminator,
    StyleGenerator,
    load_style_generator,
    truncated,
    write_config,
)
from core.quiet import keep_quiet

if TYPE_CHECKING:
    from core.training.ema import PowerEMA
    from core.training.run_folder import RunFolder
    from core.training.style_data import StyleBatches

PRESETS = {
    "latent": StyleConfig(16, (256, 160, 96)),  # channels and condition are those of the model folder's VAE and CLIP
    "tiny": StyleConfig(4, (16, 12, 8), z_dim=8, w_dim=16, mapping_layers=2),
    # the official architecture for faces of 256 px, for --convert (config "paper256" of stylegan2-ada-pytorch)
    "ffhq256": StyleConfig(3, (512, 512, 512, 512, 256, 128, 64), z_dim=512, w_dim=512, mapping_layers=8, clamp=256.0),
}
RUNS = {  # how long a run of each preset that is trained here is
    "latent": {"steps": 25000, "batch_size": 64, "warmup_steps": 100, "cache": "runs/latents"},
    "tiny": {"steps": 10, "batch_size": 8, "warmup_steps": 1, "cache": "runs/tiny-latents"},
}
COMPONENT = "stylegan"
GRACE_STEPS = 1000  # before which faces that are all alike are no collapse, but the beginning

# ------------------------------------------------------------------------------------------------------------ training


def train(args: argparse.Namespace) -> None:
    """The training loop of the style GAN; the same command resumes. Ends by releasing the averaged generator."""
    from core.training.accelerator import make_accelerator
    from core.training.adversarial import collapse_sentence, diversity
    from core.training.ema import PowerEMA
    from core.training.optim import StepGuard, learning_rate
    from core.training.randomness import step_generator
    from core.training.release import check_release, releasing
    from core.training.run_folder import RunFolder, circumstances
    from core.training.style_loss import StyleLoss, sample_batch, take_gradients
    from dataset import FaceStore

    store = FaceStore.open(args.data)
    check_release(args.model, COMPONENT, replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    if accelerator.num_processes > 1:
        raise SettingError(f"{accelerator.num_processes} processes were started; the style GAN is trained in one")
    device = accelerator.device
    how = StyleLoss(args.loss, args.gamma, path_weight=args.path_weight, mismatch=args.mismatch, mixing=args.mixing)
    batches = open_data(args, store, accelerator)
    channels, condition = batches.cache.mean.shape[2], batches.batch(0)[1].shape[1]
    config = replace(PRESETS[args.preset], output_channels=channels, condition=condition)

    torch.manual_seed(args.seed)  # initial weights
    generator, critic = StyleGenerator(config), StyleDiscriminator(config)
    generator, critic = (one.to(device, memory_format=torch.channels_last) for one in (generator, critic))
    optimizers = [torch.optim.Adam(one.parameters(), lr=args.learning_rate, betas=(0.0, 0.99), fused=True)
                  for one in (generator, critic)]
    ema = PowerEMA(generator, relative_std=0.05)
    settings = {"component": COMPONENT, "preset": args.preset, "seed": args.seed, "batch_size": args.batch_size,
                "learning_rate": args.learning_rate, "loss": asdict(how) | {"gamma": None}, "px": args.px,
                "data": store.fingerprint, "captions_per_image": args.captions_per_image,
                "caption_dropout": args.caption_dropout,
                "vae": component_hash(args.model, "vae"), "clip": component_hash(args.model, "clip"),
                "network": write_config(config)}
    run = RunFolder(Path(args.run), settings, total_steps=args.steps, decay_share=args.decay_share,
                    how=circumstances(args, accelerator, gamma=args.gamma),
                    parts={"generator": generator, "critic": critic, "optimizer": optimizers[0],
                           "critic_optimizer": optimizers[1], "ema": ema})
    first = run.resume()
    path_average = torch.tensor(float(run.extra.get("path_average", 0.0)), device=device)
    accuracies, window = ([float(one) for one in run.extra.get(name, [])] for name in ("accuracies", "window"))
    collapse = str(run.extra.get("collapse", ""))
    guards = [StepGuard(skipped=int(run.extra.get("skipped", 0))), StepGuard()]

    for step, show in run.steps(first, args, accelerator, "style GAN"):
        rate = learning_rate(step, peak=args.learning_rate, total_steps=args.steps, warmup_steps=args.warmup_steps,
                             decay_share=args.decay_share)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        real, told = batches.batch(step)
        batch = sample_batch(generator, real.contiguous(memory_format=torch.channels_last), told, how,
                             step_generator(args.seed, step))
        found = take_gradients(generator, critic, batch, how, path_average)
        path_average = found.path_average
        norms = [guard.step(optimizer, list(network.parameters()), max_norm=float("inf"))
                 for guard, optimizer, network in zip(guards, optimizers, (generator, critic), strict=True)]
        ema.update(generator, step + 1)
        window.append(float(found.terms["accuracy"]))

        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            accuracies = [*accuracies, sum(window) / len(window)][-64:]
            window.clear()
            values = {name: float(value) for name, value in found.terms.items()}
            values |= {"accuracy": accuracies[-1], "diversity": diversity(found.made[:64], real[:64]),
                       "path_length": float(path_average), "grad_norm": float(norms[0]), "lr": rate,
                       "critic_grad_norm": float(norms[1]), "images_seen": (step + 1) * args.batch_size,
                       "skipped": sum(guard.skipped for guard in guards)}
            said = collapse_sentence(values["diversity"], accuracies) if step >= GRACE_STEPS else ""
            if said and not collapse:
                print(f"\nstep {step + 1}: {said}", flush=True)
            collapse = said
            run.log(step + 1, values | {"collapsed": float(bool(said))})
            show(f"D {values['discriminator']:.3f} G {values['generator']:.3f} diversity {values['diversity']:.2f}")
        if (step + 1) % args.save_every == 0 or show.last:
            run.save(step + 1, {"path_average": float(path_average), "accuracies": accuracies, "window": window,
                                "collapse": collapse, "skipped": sum(guard.skipped for guard in guards)})
        if (step + 1) % args.picture_every == 0 or step + 1 == args.steps:
            draw_picture(run, f"step-{step + 1:07d}", averaged(generator, ema), args.model)
    run.finish()
    if run.finished:
        facts = settings | {"gamma": args.gamma, "steps": args.steps, "images_seen": args.steps * args.batch_size,
                            "collapse": collapse}
        with releasing(args.model, COMPONENT, replace=args.replace, run=args.run):
            release(averaged(generator, ema), Path(args.model), facts)
        print(f"released to {args.model}/{COMPONENT}")
        if collapse:
            print(f"but {collapse}")


def open_data(args: argparse.Namespace, store: Any, accelerator: Any) -> StyleBatches:
    """Latents and pooled captions of the training images, read by the VAE and the text encoder of ``args.model``."""
    from core.training.caption_cache import build_caption_bank
    from core.training.style_data import StyleBatches, cached_pooled
    from core.training.unet_data import encoded

    rows, vae = store.select("train", px=args.px), load_vae(args.model, accelerator.device)
    if not len(rows):
        raise SettingError(f"{args.data} has no training images of --px {args.px}")
    folder = Path(args.cache)
    cache = encoded(vae, encoder_hash(vae), store, rows, folder, accelerator)
    clip, tokenizer = load_clip(args.model, accelerator.device)
    bank = build_caption_bank(store, rows, tokenizer, captions_per_image=args.captions_per_image, seed=args.seed,
                              empty_share=args.caption_dropout)
    pooled = cached_pooled(folder / "style", clip, component_hash(args.model, "clip"), bank, accelerator)
    return StyleBatches(cache, pooled, torch.from_numpy(store.px[rows].astype("int64")), args.seed, args.batch_size)


def averaged(generator: StyleGenerator, ema: PowerEMA) -> StyleGenerator:
    """A frozen copy of the generator with averaged weights."""
    copy = StyleGenerator(generator.config)
    copy.load_state_dict(ema.state, strict=True)
    return copy.eval().requires_grad_(False).to(generator.mapping.w_mean.device, memory_format=torch.channels_last)


def draw_picture(run: RunFolder, name: str, generator: StyleGenerator, folder: str) -> None:
    """Write four faces for each of eight prompts into the folder of the run."""
    from core.evaluation.prompt_sheets import GRID_PROMPTS

    faces = StyleFaces(*load_clip(folder), load_vae(folder), generator, {})
    prompts = [prompt for prompt in GRID_PROMPTS for _ in range(4)]
    styles = faces.styles(prompts, list(range(4)) * len(GRID_PROMPTS))
    run.picture(name, to_images(faces.pixels(faces.latents(styles))), columns=8)


# ------------------------------------------------------------------------------------------------------------- release


def release(generator: StyleGenerator, folder: Path, training: dict[str, Any]) -> None:
    """Write the generator, in fp16, into the model folder with the hashes of the VAE encoder and CLIP it belongs to."""
    parents = {"vae": encoder_hash(load_vae(folder)), "clip": component_hash(folder, "clip")}
    save_component(folder, COMPONENT, generator.state_dict(),
                   {"network": write_config(generator.config), "parents": parents, "training": training},
                   extra={"commit": git_commit(Path(__file__).parent)})


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the released generator with captions of unseen people; writes ``metrics.json`` and a grid into the run
    folder. ``milliseconds`` is the median from a prompt to the bytes of its PNG."""
    from core.evaluation.adversarial_report import gigaflops, measure, milliseconds
    from core.evaluation.prompts import draw_prompts
    from core.training.run_folder import save_grid
    from dataset import FaceStore

    faces, store = StyleFaces.load(args.model, pick_device(args.device)), FaceStore.open(args.data)
    unseen = store.select("test", px=128)
    if not len(unseen) or store.text_labels is not None:
        raise SettingError(f"{args.data} has {len(unseen)} sharp test images"
                           f"{' with own captions' if store.text_labels else ''}; images with attributes are needed")
    prompts = draw_prompts(store.attributes[unseen], args.samples, args.seed)
    styles = faces.styles(prompts.texts, range(args.seed, args.seed + args.samples), args.psi)
    pixels = np.concatenate([faces.pixels(faces.latents(part)) for part in styles.split(128)])
    result = measure(pixels, store, args.judge, args.judge_cache, seed=args.seed, prompts=prompts, unseen=unseen)
    quick = faces.compiled(None) if installed_version() and pick_device(args.device).type == "cpu" else faces
    result |= {"psi": args.psi, "milliseconds": milliseconds(lambda: quick.png(prompts.texts[0], args.seed, args.psi)),
               "gflop": gigaflops(lambda: faces.png(prompts.texts[0], args.seed, args.psi)),
               "threads": torch.get_num_threads(), "decoder": "torch" if quick is faces else "OpenVINO"}
    save_grid(to_images(pixels[:64]), Path(args.run) / "samples.png", 8)
    write_json(Path(args.run) / "metrics.json", result)
    print(json.dumps(result, indent=2))
    return result


def sample(args: argparse.Namespace) -> Path:
    """Write a sheet of faces: of prompts, between the first two of them, mixed, or moved along a direction."""
    from core.evaluation.style_sheets import direction_row, interpolation_row, mixing_table, sample_rows
    from core.nn.style_directions import load_directions
    from core.training.run_folder import save_grid

    seeds, target = range(args.seed, args.seed + args.n_images), Path(args.out)
    generator, config = load_style_generator(args.model, device=pick_device(args.device))
    if "vae" not in config["parents"]:  # of pixels, and of no text
        with torch.inference_mode():
            z = torch.stack([torch.randn(generator.config.z_dim, generator=torch.Generator().manual_seed(seed))
                             for seed in seeds])
            w = truncated(generator.mapping(z), generator.centre(None), args.psi)
            images = generator.synthesis(generator.broadcast(w))
        save_grid(images, target, min(8, args.n_images))
        print(f"wrote {target}")
        return target
    faces = StyleFaces.load(args.model, pick_device(args.device))
    prompts = args.prompt or [""]
    columns = args.n_images
    if args.interpolate:
        if len(prompts) != 2:
            raise SettingError(f"--interpolate goes from one --prompt to another; {len(prompts)} were given, not 2")
        columns = args.interpolate
        pixels = interpolation_row(faces, (prompts[0], prompts[1]), (args.seed, args.seed + 1), columns, args.psi)
    elif args.mix_from is not None:
        fine = [seed + args.n_images for seed in seeds]
        pixels = mixing_table(faces, prompts[0], seeds, fine, args.mix_from, args.psi)
    elif args.direction:
        direction = load_directions(args.model).of(args.direction, orthogonal=not args.plain)
        strengths = np.linspace(-args.strength, args.strength, columns).tolist()
        pixels = np.concatenate([direction_row(faces, prompt, args.seed, direction, strengths, args.psi)
                                 for prompt in prompts])
    else:
        pixels = sample_rows(faces, prompts, seeds, args.psi)
    save_grid(to_images(pixels), target, columns)
    print(f"wrote {target}")
    return target


def fit(args: argparse.Namespace) -> None:
    """Fit the directions of attributes in w, and say how much else each of them moves."""
    from core.evaluation.attribute_classifier import load_attribute_classifier
    from core.evaluation.style_sheets import fit_directions
    from core.nn.style_directions import save_directions

    device = pick_device(args.device)
    faces, (classifier, digest) = StyleFaces.load(args.model, device), load_attribute_classifier(args.judge, device)
    found = fit_directions(faces, classifier, args.samples, args.seed)
    facts = found.facts()
    for name in found.directions.names:
        plain, orthogonal = (facts["entanglement"][kind][name] for kind in ("plain", "orthogonal"))
        print(f"{name:22} moves the others by {plain:.2f} of its own change, orthogonalised by {orthogonal:.2f}")
    save_directions(found.directions, args.model, facts | {"judge": digest})
    print(f"wrote {args.model}/style_directions")


def convert(args: argparse.Namespace) -> None:
    """Write the generator of NVIDIA's pickle as a model folder of safetensors; nothing in the pickle is run."""
    from core.nn.official_weights import read_official
    from core.training.release import check_release

    check_release(args.model, COMPONENT, replace=args.replace)
    generator = read_official(args.convert)
    save_component(args.model, COMPONENT, generator.state_dict(),
                   {"network": write_config(generator.config), "parents": {}, "training": {"from": args.convert.name}},
                   half=False)
    update_index(args.model, name=Path(args.model).name, image_size=generator.config.size)
    print(f"wrote {args.model}/{COMPONENT}: {generator.config.size} px, its licence is that of {args.convert.name}")


# ------------------------------------------------------------------------------------------------------------ commands


def train_options(parser: argparse.ArgumentParser) -> None:
    """Those of --train."""
    from core.training.adversarial import LOSSES
    from core.training.options import RunDefaults, add_run, of_preset
    from core.training.release import add_release_options
    from core.training.style_loss import StyleLoss

    usual = StyleLoss()
    add_run(parser, RUNS, RunDefaults("runs/stylegan", learning_rate=2e-3, decay_share=0.2, log_every=50,
                                      picture_every=2000))
    parser.set_defaults(preset="latent")
    add_release_options(parser, ", which has vae/ and clip/")
    parser.add_argument("--cache", help="where encoded images are kept; " + of_preset(RUNS, "cache"))
    parser.add_argument("--px", type=int, choices=(58, 80, 128), help="see only images of this source resolution")
    parser.add_argument("--captions-per-image", type=int, default=4)
    parser.add_argument("--caption-dropout", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--loss", choices=LOSSES, default=usual.kind, help="relativistic: real against generated "
                        "pictures, pair by pair; softplus: each alone")
    parser.add_argument("--gamma", type=float, default=usual.gamma, help="weight of R1 and R2; may change when a run "
                        "is resumed")
    parser.add_argument("--path-weight", type=float, default=usual.path_weight, help="of the path length penalty")
    parser.add_argument("--mismatch", type=float, default=usual.mismatch, help="weight of real pictures with the "
                        "caption of another as fakes")
    parser.add_argument("--mixing", type=float, default=usual.mixing, help="share of pictures with two styles")


def check_train(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what --train leaves open."""
    from core.training.options import fill_from_preset
    from core.training.release import fill_model

    fill_from_preset(parser, args, RUNS)
    for name in ("gamma", "path_weight", "mismatch"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be a number from 0 up")
    if not 0 <= args.mixing <= 1:
        parser.error(f"--mixing is {args.mixing}; it is a share, from 0 to 1")
    if args.batch_size < 2:
        parser.error(f"--batch-size is {args.batch_size}; the measure of collapse needs at least 2 pictures")
    fill_model(args)


def eval_options(parser: argparse.ArgumentParser) -> None:
    """Those of --eval."""
    from core.training.options import add_adversarial_evaluation
    from core.training.release import BUNDLED

    add_adversarial_evaluation(parser, "runs/stylegan", BUNDLED)
    add_psi(parser)


def add_psi(parser: argparse.ArgumentParser) -> None:
    """``--psi``."""
    parser.add_argument("--psi", type=float, default=PSI, help="truncation: 0 the mean face of a prompt, 1 as trained")


def sample_options(parser: argparse.ArgumentParser) -> None:
    """Those of --sample."""
    from core.training.options import add_device, add_measured_model

    parser.add_argument("--prompt", action="append", help="what to generate; may be given several times")
    parser.add_argument("--n-images", type=int, default=8, help="faces for each prompt")
    parser.add_argument("--seed", type=int, default=0)
    add_psi(parser)
    parser.add_argument("--interpolate", type=int, metavar="N", help="N faces from the first prompt to the second")
    parser.add_argument("--mix-from", type=int, metavar="LAYER", help="a table: a row's seed below this layer, a "
                        "column's from there on")
    parser.add_argument("--direction", metavar="ATTRIBUTE", help="move along the direction that --directions fitted")
    parser.add_argument("--strength", type=float, default=3.0, help="how far along it, to both sides")
    parser.add_argument("--plain", action="store_true", help="along the direction that is not orthogonalised")
    parser.add_argument("--out", default="runs/styles.png", help="where the sheet is written")
    add_measured_model(parser)
    add_device(parser)


def check_psi(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """It is a number that means something."""
    if not 0 <= args.psi <= 2:
        parser.error(f"--psi is {args.psi}; it must be from 0 to 2")


def check_sample(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """One kind of sheet at a time."""
    check_psi(parser, args)
    if sum(one is not None for one in (args.interpolate, args.mix_from, args.direction)) > 1:
        parser.error("--interpolate, --mix-from and --direction are different sheets; give one of them")
    if args.interpolate is not None and args.interpolate < 2:
        parser.error(f"--interpolate is {args.interpolate}; a line has at least its 2 ends")


def direction_options(parser: argparse.ArgumentParser) -> None:
    """Those of --directions."""
    from core.training.options import add_device

    parser.add_argument("--model", help="model folder with the style generator")
    parser.add_argument("--judge", default="models/judge", help="folder of the frozen attribute classifier")
    parser.add_argument("--samples", type=int, default=2000, help="faces that they are fitted to")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)


def check_directions(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A trained model is changed only where it is named."""
    from core.training.options import need_model

    need_model(parser, args)


def convert_options(parser: argparse.ArgumentParser) -> None:
    """Those of --convert."""
    parser.add_argument("convert", type=Path, metavar="FILE.pkl", help="released network of stylegan2-ada-pytorch")
    parser.add_argument("--model", default="models/ffhq256", help="model folder to write (default: models/ffhq256)")
    parser.add_argument("--replace", action="store_true", help="replace the generator in the model folder")


COMMANDS = (
    Command("--train", "train the style GAN and release its generator", train_options, alone(train), check_train),
    Command("--eval", "measure a released generator against real images", eval_options, evaluate, check_psi),
    Command("--sample", "draw faces, mixtures, lines and directions", sample_options, sample, check_sample),
    Command("--directions", "fit directions of attributes in w", direction_options, fit, check_directions),
    Command("--convert", "read a released pickle without running it", convert_options, convert),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    keep_quiet()
    return run_one("Train or measure the style-based GAN in latents.", COMMANDS, argv)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
