"""How does noise become a face that fits a sentence? The conditional latent-diffusion UNet and how it is trained.

Presets, training loop, release, command line. The network is in core/diffusion/unet.py, its loss in
core/diffusion/training_loss.py, what is learned from a trained UNet in distill.py. It does not know how images are
encoded (vae.py) or sentences are (train_clip.py).

    python conditional_ldm.py --train                              train on cached latents, release to the model folder
    python conditional_ldm.py --fit-soft-from                      from which noise level on soft pictures teach no blur
    python conditional_ldm.py --distill guidance                   see distill.py
    python conditional_ldm.py --eval --prompt "a smiling woman"    write a grid of pictures
    python conditional_ldm.py --eval --gallery runs/gallery        write sheets of twenty prompts, nothing picked out

Source: latent diffusion https://arxiv.org/abs/2112.10752.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.command import Command, SettingError, alone, run_command, run_one
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.schedulers import TURBO, scheduler_config
from core.diffusion.training_loss import TrainingLoss, denoising_loss, loss_by_level, mean_loss
from core.diffusion.unet import ConditionalUNet, UNetConfig, check_widths, frozen, write_config
from core.nn.autoencoder import encoder_hash, load_vae
from core.nn.checkpoint import (
    component_hash,
    drop_component,
    git_commit,
    load_component,
    load_strictly,
    read_index,
    save_component,
    update_index,
    write_json,
)
from core.quiet import keep_quiet
from core.text.prompt_rewriting import unread_from, unread_warning

if TYPE_CHECKING:
    from core.evaluation.prompt_sheets import GridOptions
    from core.training.ema import PowerEMA
    from core.training.run_folder import RunFolder
    from core.training.unet_data import DataOptions, TrainingData

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


# ------------------------------------------------------------------------------------------------------------ training

# not for Muon
EDGES = ("conv_in", "conv_out", "null_pooled", "time_embed", "px_embed", "guidance_embed", "position_maps")
BUCKETS = 5  # the loss is logged for this many equal slices of the noise levels


@dataclass(frozen=True)
class Training:
    """One run: what learns, by which loss, from what, and where it is recorded.

    ``validate`` gives the loss by which checkpoints are compared, of a network with averaged weights, over ``held_out``
    images. ``grid`` is how the images of the run are generated, where not as those of others.
    """

    model: ConditionalUNet
    loss: TrainingLoss
    validate: Callable[[ConditionalUNet], TrainingLoss]
    data: TrainingData
    optimizers: Mapping[str, torch.optim.Optimizer]
    emas: Mapping[str, PowerEMA]
    run: RunFolder
    held_out: int = 1024
    grid: GridOptions | None = None


def train(args: argparse.Namespace) -> None:
    """Train a UNet on cached latents; the same command resumes. Ends by releasing the better of both EMA lengths."""
    from core.training.accelerator import make_accelerator
    from core.training.ema import PowerEMA
    from core.training.release import check_release, releasing
    from core.training.run_folder import RunFolder, circumstances
    from core.training.unet_data import DataOptions
    from dataset import FaceStore

    FaceStore.open(args.data)  # where there is none, that is what is said first
    check_widths(PRESETS[args.preset], args.preset, args.model, args.init)
    check_release(args.model, "unet", replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    schedule = NoiseSchedule(args.schedule, weighting=args.loss_weight, initial_timestep=tuple(args.begin))
    data = open_data(DataOptions.of(args), args.model, schedule, accelerator)
    torch.manual_seed(args.seed)
    channels = data.encoders.vae.config.latent_channels  # checked, or left open by the preset
    model = ConditionalUNet(replace(PRESETS[args.preset], latent_channels=channels))
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    if args.init:  # of a distilled one the network alone, not what beside it knows the scale
        start = load_component(args.init, "unet")[1]
        load_strictly(model, {name: value for name, value in start.items() if "guidance" not in name},
                      "the UNet to start from")
    optimizers = make_optimizers(model, args)
    emas = {"ema_long": PowerEMA(model, relative_std=0.10), "ema_short": PowerEMA(model, relative_std=0.05)}
    settings = run_settings(args, data, model) | {"preset": args.preset}
    run = RunFolder(Path(args.run), settings, total_steps=args.steps, decay_share=args.decay_share,
                    report_to=args.report_to, main=accelerator.is_main_process,
                    parts={"model": model, **optimizers, **emas},
                    how=circumstances(args, accelerator, loss_weight=args.loss_weight, begin=list(args.begin),
                                      accumulate=args.accumulate, compile=args.compile))
    loss = denoising_loss(compiled(model, args.compile, accelerator), schedule)
    best = fit(Training(model=model, loss=loss, validate=lambda network: denoising_loss(network, schedule), data=data,
                        optimizers=optimizers, emas=emas, run=run), args, accelerator)
    if best is not None:
        network, found = best
        facts = settings | found | {"loss_weight": args.loss_weight}
        with releasing(args.model, "unet", replace=args.replace, run=args.run):
            release(network, Path(args.model), schedule, {"vae": settings["encoder"], "clip": settings["clip"]}, facts,
                    2.0 if args.guidance_scale is None else args.guidance_scale)
        print(f"released to {args.model}/unet")


def fit(training: Training, args: argparse.Namespace, accelerator: Any
        ) -> tuple[ConditionalUNet, dict[str, Any]] | None:
    """The training loop: every step of a run that is left. Once all are done, the main process gets the better of the
    averaged networks, and what is to be recorded of it; None before that, and in other processes."""
    from core.training.accelerator import attention_kernel, average_gradients, mean_over_processes, process_slice
    from core.training.optim import StepGuard, learning_rate
    from core.training.randomness import mix_seed

    device, data, run, model = accelerator.device, training.data, training.run, training.model
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    first, mine = run.resume(), process_slice(accelerator, args.batch_size)
    guard = StepGuard(skipped=run.extra.get("skipped", 0))
    sums, counts = torch.zeros(BUCKETS, device=device), torch.zeros(BUCKETS, device=device)
    checked: list[Any] | None = None  # held-out faces, read when they are first asked for

    for step, show in run.steps(first, args, accelerator, "UNet"):
        rate = learning_rate(step, peak=args.learning_rate, total_steps=args.steps, warmup_steps=args.warmup_steps,
                             decay_share=args.decay_share)
        for group in [group for optimizer in training.optimizers.values() for group in optimizer.param_groups]:
            group["lr"] = rate
        torch.manual_seed(mix_seed(args.seed, step, 2 + accelerator.process_index))  # dropout takes no generator
        total = torch.zeros((), device=device)
        for batch in data.batches.batch(step, mine, accelerator):
            with accelerator.autocast(), attention_kernel(device):
                error, weight = training.loss(batch)
            loss = (error * weight).sum() / (mine.stop - mine.start)
            loss.backward()
            total += loss.detach()
            bucket = (batch.timestep * (BUCKETS / 1000)).long()
            sums.index_add_(0, bucket, error.detach())
            counts.index_add_(0, bucket, torch.ones_like(error))
        average_gradients(accelerator, parameters)
        norm = guard.step(list(training.optimizers.values()), parameters)
        for ema in training.emas.values():
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
            network = averaged(model, training.emas["ema_long"], device)
            draw_picture(run, f"step-{step + 1:07d}", network, data, accelerator, training.grid)
            if checked is None:
                checked = data.held_out(accelerator, limit=256) if "val" in data.store.split else []
            if checked:
                found, levels = loss_by_level(training.validate(network), checked, accelerator, BUCKETS)
                run.log(step + 1, {"val_loss": found, **{f"val_mse_noise_{i}": one for i, one in levels.items()}})
    run.finish()
    if not (run.main and run.finished):
        return None
    finished = {name: averaged(model, ema, device) for name, ema in training.emas.items()}
    held_out = data.held_out(accelerator, limit=training.held_out) if "val" in data.store.split else []
    losses = {name: mean_loss(training.validate(network), held_out, accelerator)
              for name, network in finished.items() if held_out}
    best = min(losses, key=losses.__getitem__) if losses else "ema_long"
    print("validation loss: " + (", ".join(f"{name} {value:.4f}" for name, value in losses.items())
                                 or "unknown, no image is held out for validation; the longer average is released"))
    return finished[best], {"steps": args.steps, "images_seen": args.steps * args.batch_size, "ema": best,
                            "validation_loss": losses}


def open_data(options: DataOptions, folder: str | Path, schedule: NoiseSchedule, accelerator: Any,
              share_off: float | None = None) -> TrainingData:
    """The images and captions of a run, read by the VAE and the text encoder of a model folder."""
    from core.training.unet_data import Encoders, TrainingData
    from dataset import FaceStore
    from train_clip import load_clip

    store, vae = FaceStore.open(options.data), load_vae(folder, accelerator.device)
    encoders = Encoders(vae, encoder_hash(vae), *load_clip(folder, accelerator.device))
    return TrainingData(options, store, encoders, schedule, accelerator, share_off)


def run_settings(args: argparse.Namespace, data: TrainingData, model: ConditionalUNet) -> dict[str, Any]:
    """What makes a run the run it is: it is resumed with the same alone."""
    return {"component": "unet", "seed": args.seed, "batch_size": args.batch_size, "learning_rate": args.learning_rate,
            "schedule": data.schedule.kind, "caption_dropout": args.caption_dropout,
            "captions_per_image": args.captions_per_image, "init": args.init, "favour": args.favour,
            "favour_times": args.favour_times, "sharp_times": args.sharp_times, "px": args.px,
            "optimizer": args.optimizer, **({"soft_from": args.soft_from} if args.soft_from else {}),
            "data": data.store.fingerprint, "encoder": data.encoders.encoder,
            "clip": component_hash(args.model, "clip"), "network": write_config(model.config)}


def compiled(network: Any, wanted: bool, accelerator: Any) -> Any:
    """The network, compiled by torch where that is wanted; on a GPU all captions are as long as the longest."""
    return torch.compile(network, dynamic=False if accelerator.device.type == "cuda" else None) if wanted else network


def make_optimizers(model: ConditionalUNet, args: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    """What changes the weights that are trained, by the names that a checkpoint has them under."""
    from core.training.optim import Muon, matrices

    inner = matrices(model, edges=EDGES) if args.optimizer == "muon" else []
    known = {id(weight) for weight in inner}
    rest = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in known]
    adamw = torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return {"optimizer": adamw, **({"muon": Muon(inner, lr=args.learning_rate)} if inner else {})}


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


def draw_picture(run: RunFolder, name: str, network: ConditionalUNet, data: TrainingData, accelerator: Any,
                 how: GridOptions | None = None) -> None:
    """Write what a network generates now into the folder of its run, by the code that users run, without what a
    released folder has beside its networks. Without diffusers a flow has no sampler: then there is no image."""
    from core.evaluation import prompt_sheets
    from generator import FaceGenerator, ModelInfo

    config, encoders = scheduler_config(data.schedule), data.encoders
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    info = ModelInfo(name=run.folder.name, model_hash="", device=str(accelerator.device), image_size=128,
                     latent_shape=(encoders.vae.config.latent_channels, 16, 16),
                     samplers=(*config["samplers"], *([] if how is None else [TURBO])),
                     default_sampler=config["default_sampler"], long_sampler=config["long_sampler"],
                     default_guidance_scale=2.0)
    faces = FaceGenerator(encoders.clip, encoders.tokenizer, encoders.vae, network, config, info, dtype,
                          few_step=None if how is None else network)
    try:
        prompts = prompt_sheets.grid_prompts(data.store)
        run.picture(name, prompt_sheets.draw_grid(faces, prompts, how or prompt_sheets.OF_A_RUN), 8)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        print(f"{name} has no image: diffusers is not installed, and the sampler of this schedule is of it")


def fit_soft_from(args: argparse.Namespace) -> tuple[int, int]:
    """The two timesteps for --soft-from, of images of 58 and of 80 px, by a classifier on noised latents; printed.

    A model folder needs nothing but its VAE for that. Writes the areas under the curve into the run folder.
    """
    from core.training.accelerator import make_accelerator
    from core.training.resolution import ResolutionFit, fit_thresholds
    from core.training.unet_data import encoded
    from dataset import FaceStore

    accelerator = make_accelerator(args.device, "no")
    store = FaceStore.open(args.data)
    rows, vae = store.select(split="train"), load_vae(args.model, accelerator.device)
    cache = encoded(vae, encoder_hash(vae), store, rows, Path(args.cache), accelerator)
    how = replace(ResolutionFit(), steps=min(args.steps, ResolutionFit.steps))
    found = fit_thresholds(cache.mean[0], store.px[rows], NoiseSchedule(args.schedule), how, args.seed)
    for soft, (_, areas) in found.items():
        print(f"{soft} px: " + " ".join(f"{low}:{area:.2f}" for low, area in areas.items()))
    for_58, for_80 = found[58][0], found[80][0]
    write_json(Path(args.run) / "soft_from.json", {"soft_from": [for_58, for_80],
                                                   "areas": {soft: areas for soft, (_, areas) in found.items()}})
    print(f"--soft-from {for_58} {for_80}")
    return for_58, for_80


def write_sheets(args: argparse.Namespace) -> Path:
    """Generate a grid for one or several prompts with a model folder; returns its path (--gallery: the folder's)."""
    from core.evaluation.prompt_sheets import GridOptions, write_gallery, write_grid
    from core.training.accelerator import make_accelerator
    from generator import FaceGenerator

    half = make_accelerator(args.device, args.precision).mixed_precision == "bf16"
    faces = FaceGenerator.load(args.model, args.device, precision="bf16" if half else "fp32")
    if args.sampler is not None and args.sampler not in faces.info.samplers:
        raise SettingError(f"--sampler {args.sampler!r} is not one of {', '.join(faces.info.samplers)}, which "
                           f"{args.model} has")
    for prompt in args.prompt or ():
        lost = unread_from(prompt, faces.info.prompt_rewriting(prompt), faces.info.encoded_length)
        for warning in unread_warning("--prompt", prompt, lost):
            print(warning, file=sys.stderr)
    how = GridOptions(args.n_images, args.n_inf_steps, args.guidance_scale, args.seed, args.sampler)
    target = Path(args.gallery or args.out)
    if args.gallery:
        write_gallery(faces, target, how)
    else:
        write_grid(faces, args.prompt, target, how)
    print(f"wrote {target}")
    return target


# ------------------------------------------------------------------------------------------------------------ commands


def train_options(parser: argparse.ArgumentParser) -> None:
    """Those of --train."""
    from core.training.options import RunDefaults, add_run, add_unet_data
    from core.training.release import add_release_options

    add_run(parser, RUNS, RunDefaults("runs/unet", learning_rate=1e-3, log_every=50, picture_every=1000))
    add_release_options(parser, ", which has vae/ and clip/")
    add_unet_data(parser, RUNS)
    parser.add_argument("--init", metavar="FOLDER", help="model folder whose UNet to start from")
    parser.add_argument("--schedule", choices=("cosine", "flow"), default="cosine")
    parser.add_argument("--begin", type=float, nargs=2, default=NoiseSchedule().initial_timestep, metavar=("A", "B"),
                        help="the model's own: n steps begin at timestep A - B / (n + 2) (1000 0: at pure noise)")
    parser.add_argument("--loss-weight", choices=("min-snr", "clamped-v"), default="min-snr",
                        help="of the noise levels; may change when a run is resumed")
    parser.add_argument("--guidance-scale", type=float, help="what the model will suggest (2)")


def check_train(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what --train and --fit-soft-from leave open."""
    from core.training.options import fill_from_preset
    from core.training.release import fill_model

    fill_from_preset(parser, args, RUNS)
    fill_model(args)


def fit_soft_from_options(parser: argparse.ArgumentParser) -> None:
    """Those of --fit-soft-from."""
    from core.training.options import add_data, add_device, add_run_folder, of_preset

    add_data(parser)
    parser.add_argument("--model", help="model folder with the VAE (default: models/<name of the run>)")
    add_run_folder(parser, "runs/unet")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="celeba128")
    parser.add_argument("--cache", help="where encoded images are kept; " + of_preset(RUNS, "cache"))
    parser.add_argument("--schedule", choices=("cosine", "flow"), default="cosine")
    parser.add_argument("--steps", type=int, help="of the classifier, at most 1500; " + of_preset(RUNS, "steps"))
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)


def sheet_options(parser: argparse.ArgumentParser) -> None:
    """Those of --eval."""
    from core.training.options import add_device, add_measured_model

    parser.add_argument("--prompt", action="append", help="what to generate; may be given several times")
    parser.add_argument("--gallery", metavar="FOLDER", help="a sheet for each of twenty prompts and one of the first "
                        "five images of all of them, as WebP; nothing is picked out")
    parser.add_argument("--out", default="runs/grid.png", help="where the grid of the prompts is written")
    parser.add_argument("--n-images", type=int, default=8, help="images for each prompt")
    parser.add_argument("--n-inf-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, help="1 is off (default: the model's own)")
    parser.add_argument("--sampler")
    parser.add_argument("--seed", type=int, default=0)
    add_measured_model(parser)
    add_device(parser, precision=True)


def check_sheets(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Something is to be generated."""
    if not (args.prompt or args.gallery):
        parser.error("--eval needs at least one --prompt, or --gallery")


COMMANDS = (
    Command("--train", "train the UNet and release it", train_options, alone(train), check_train),
    Command("--fit-soft-from", "find the two timesteps for --soft-from", fit_soft_from_options, fit_soft_from,
            check_train),
    Command("--eval", "draw a grid or a gallery with a model folder", sheet_options, write_sheets, check_sheets),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    keep_quiet()
    return run_one("Train the text-conditional latent-diffusion UNet, or draw with it.", COMMANDS, argv,
                   elsewhere={"--distill": "distill", "--export-diffusers": "export_diffusers"})


if __name__ == "__main__":
    raise SystemExit(run_command(main))
