"""How does noise become a face in one pass of five transposed convolutions? The DCGAN, and how it is trained.

Networks, training loop, release, measurement, command line. Losses and what counts as collapse are in
core/training/adversarial.py. It knows neither text nor latents: 100 random numbers in, 64 x 64 pixels out.

    python dcgan.py --train     train on images shrunk to 64 x 64, release to models/<name of the run>
    python dcgan.py --eval      Frechet distance to real images of unseen people, diversity, milliseconds, a grid

Source: DCGAN https://arxiv.org/abs/1511.06434 (figure 1 and section 4).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.command import Command, SettingError, alone, run_command, run_one
from core.nn.checkpoint import build, git_commit, load_component, save_component, update_index
from core.nn.layers import to_images, to_pixels
from core.quiet import keep_quiet

if TYPE_CHECKING:
    from core.training.run_folder import RunFolder
    from dataset import FaceStore


@dataclass(frozen=True)
class DCGANConfig:
    """Sizes of both networks: numbers of noise, widths from 4 x 4 to 32 x 32 (generator), the same mirrored for the
    discriminator. The image is 2^(stages + 2) pixels wide."""

    noise: int = 100
    channels: tuple[int, ...] = (512, 256, 128, 64)

    @property
    def image_size(self) -> int:
        """Pixels along a side."""
        return 4 << len(self.channels)


PRESETS = {"celeba64": DCGANConfig(), "tiny": DCGANConfig(8, (16, 12, 8, 8))}
RUNS: dict[str, dict[str, Any]] = {  # how long a run of each preset is; --steps takes the place of --epochs
    "celeba64": {"steps": "of --epochs", "epochs": 15.0, "batch_size": 128, "warmup_steps": 0},
    "tiny": {"steps": "of --epochs", "epochs": 4.0, "batch_size": 8, "warmup_steps": 0},
}
PROGRESS_EPOCHS = (1, 3, 5, 10, 15)  # after which a grid of the same noise is drawn
GRACE_STEPS = 300  # before which faces that are all alike are no collapse, but the beginning
COMPONENT, BUNDLED = "dcgan", "models/dcgan"

# ------------------------------------------------------------------------------------------------------------ networks


class Generator(nn.Module):
    """Noise [B, noise] ~ N(0, I) -> images [B, 3, S, S] in [-1, 1]: 4x4, then twice the side a stage, batch norm and
    ReLU after all but the last, which ends in tanh (section 3 of the paper). 3.6 million weights at 64 px."""

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_in = nn.ConvTranspose2d(config.noise, config.channels[0], 4, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in config.channels)
        self.stages = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False)
                                    for a, b in zip(config.channels, config.channels[1:], strict=False))
        self.conv_out = nn.ConvTranspose2d(config.channels[-1], 3, 4, stride=2, padding=1)
        self.apply(_normal_weights)

    def forward(self, noise: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.conv_in(noise[:, :, None, None])))  # [B, c0, 4, 4]
        for stage, norm in zip(self.stages, list(self.norms)[1:], strict=True):
            x = F.relu(norm(stage(x)))  # [B, c, 8, 8], [B, c, 16, 16], ...
        return torch.tanh(self.conv_out(x))


class Discriminator(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> logits [B]: strided convolutions, leaky ReLU of slope 0.2, batch norm in all
    but the first and the last layer (section 3 of the paper)."""

    def __init__(self, config: DCGANConfig) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1, bias=False)
                                    for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4)
        self.apply(_normal_weights)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(images), 0.2)  # [B, c, S/2, S/2]
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = F.leaky_relu(norm(stage(x)), 0.2)
        return self.conv_out(x).flatten()


def _normal_weights(module: nn.Module) -> None:
    """Weights ~ N(0, 0.02^2) (section 4 of the paper), gains of batch norm ~ N(1, 0.02^2)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)


@torch.no_grad()
def snapshot(generator: Generator, seed: int, batches: int = 16, batch_size: int = 128) -> Generator:
    """A frozen copy whose batch norms have the statistics of this very network, over ``batches`` of noise: the running
    ones are of the networks that it was in the steps before, and one image alone has none."""
    copy = deepcopy(generator).train().requires_grad_(False)
    for norm in copy.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        norm.reset_running_stats()
        norm.momentum = None  # cumulative: the plain mean over all batches
    source = torch.Generator().manual_seed(seed)
    device = copy.conv_in.weight.device
    for _ in range(batches):
        copy(torch.randn(batch_size, copy.config.noise, generator=source).to(device))
    return copy.eval()


@torch.inference_mode()
def generate(generator: Generator, seeds: Sequence[int], batch_size: int = 128) -> np.ndarray:
    """One face for each seed. Shapes: uint8 [N, S, S, 3]."""
    device, faces = generator.conv_in.weight.device, []
    noise = torch.stack([torch.randn(generator.config.noise, generator=torch.Generator().manual_seed(seed))
                         for seed in seeds])
    for part in noise.split(batch_size):
        faces.append(to_pixels(generator(part.to(device))))
    return np.concatenate(faces)


# ------------------------------------------------------------------------------------------------------------ training


def load_small(store: FaceStore, rows: np.ndarray, size: int, chunk: int = 512) -> Tensor:
    """Rows of the store shrunk by the mean of each square of pixels, rounded: uint8 [N, size, size, 3] in memory.
    Raises SettingError where the store's side is no multiple of ``size``."""
    side = store.images.shape[1]
    if side % size or not len(rows):
        raise SettingError(f"{store.folder} has {len(rows)} images of {side} px to learn from; at least one is needed, "
                           f"and its side must be a multiple of {size}")
    small = torch.empty(len(rows), size, size, 3, dtype=torch.uint8)
    for start in range(0, len(rows), chunk):
        part = torch.from_numpy(store.images[rows[start : start + chunk]]).permute(0, 3, 1, 2).float()
        small[start : start + chunk] = F.avg_pool2d(part, side // size).round().permute(0, 2, 3, 1)
    return small


def sharp_rows(store: FaceStore, split: str, size: int) -> np.ndarray:
    """Rows of a split whose source had at least ``size`` pixels a side: smaller ones would teach blur."""
    rows = store.select(split)
    return rows[store.px[rows] >= size]


def train(args: argparse.Namespace) -> None:
    """The training loop of the DCGAN; the same command resumes. Ends by releasing the generator."""
    from core.training.accelerator import make_accelerator
    from core.training.adversarial import collapse_sentence, discriminator_loss, diversity, generator_loss
    from core.training.optim import StepGuard
    from core.training.randomness import EpochSampler, step_generator
    from core.training.release import check_release, releasing
    from core.training.run_folder import RunFolder, circumstances
    from dataset import FaceStore

    config, store = PRESETS[args.preset], FaceStore.open(args.data)
    check_release(args.model, COMPONENT, replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    if accelerator.num_processes > 1:
        raise SettingError(f"{accelerator.num_processes} processes were started; batch norm wants the whole batch: "
                           "train the DCGAN in one")
    device = accelerator.device
    pixels = load_small(store, sharp_rows(store, "train", config.image_size), config.image_size).to(device)
    epoch_steps = len(pixels) / args.batch_size
    args.steps = args.steps or max(1, round(args.epochs * epoch_steps))
    drawn = {min(args.steps, max(1, round(epoch * epoch_steps))): epoch for epoch in PROGRESS_EPOCHS
             if round(epoch * epoch_steps) <= args.steps}

    torch.manual_seed(args.seed)  # initial weights
    generator, critic = Generator(config), Discriminator(config)
    generator, critic = (one.to(device, memory_format=torch.channels_last).train() for one in (generator, critic))
    optimizers = [torch.optim.Adam(one.parameters(), lr=args.learning_rate, betas=(0.5, 0.999), fused=True)
                  for one in (generator, critic)]
    settings = {"component": COMPONENT, "preset": args.preset, "seed": args.seed, "batch_size": args.batch_size,
                "learning_rate": args.learning_rate, "data": store.fingerprint, "images": len(pixels),
                "network": json.loads(json.dumps(asdict(config)))}
    run = RunFolder(Path(args.run), settings, total_steps=args.steps, decay_share=args.decay_share,
                    how=circumstances(args, accelerator),
                    parts={"generator": generator, "critic": critic, "optimizer": optimizers[0],
                           "critic_optimizer": optimizers[1]})
    first = run.resume()
    accuracies = [float(one) for one in run.extra.get("accuracies", [])]
    collapse = str(run.extra.get("collapse", ""))
    guards = [StepGuard(skipped=int(run.extra.get("skipped", 0))), StepGuard()]
    sampler = EpochSampler(len(pixels), args.batch_size, args.seed)
    # shares of each batch that the discriminator was right about, since the last log line
    window = [float(one) for one in run.extra.get("window", [])]

    for step, show in run.steps(first, args, accelerator, "DCGAN"):
        images = to_images(pixels[sampler.batch(step).to(device)]).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(args.batch_size, config.noise, generator=step_generator(args.seed, step)).to(device)
        with accelerator.autocast():
            fakes = generator(noise).float()
            critic.requires_grad_(True)
            real, fake = critic(images), critic(fakes.detach())
            loss_d = discriminator_loss(real, fake)
        loss_d.backward()
        guards[1].step(optimizers[1], list(critic.parameters()), max_norm=float("inf"))
        critic.requires_grad_(False)
        with accelerator.autocast():
            loss_g = generator_loss(None, critic(fakes))
        loss_g.backward()
        norm = guards[0].step(optimizers[0], list(generator.parameters()), max_norm=float("inf"))
        window.append(float(torch.cat([real > 0, fake < 0]).float().mean()))

        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            accuracies = [*accuracies, sum(window) / len(window)][-64:]
            window.clear()
            values = {"discriminator": float(loss_d.detach()), "generator": float(loss_g.detach()),
                      "accuracy": accuracies[-1], "diversity": diversity(fakes[:64], images[:64]),
                      "grad_norm": float(norm), "images_seen": (step + 1) * args.batch_size,
                      "skipped": sum(guard.skipped for guard in guards)}
            said = collapse_sentence(values["diversity"], accuracies) if step >= GRACE_STEPS else ""
            if said and not collapse:
                print(f"\nstep {step + 1}: {said}", flush=True)
            collapse = said
            run.log(step + 1, values | {"collapsed": float(bool(said))})
            show(f"D {values['discriminator']:.3f} G {values['generator']:.3f} diversity {values['diversity']:.2f}")
        if (step + 1) % args.save_every == 0 or show.last:
            run.save(step + 1, {"accuracies": accuracies, "window": window, "collapse": collapse,
                                "skipped": sum(guard.skipped for guard in guards)})
        if step + 1 in drawn or step + 1 == args.steps:
            draw_epoch(run, generator, drawn.get(step + 1), step + 1, args.seed)
    run.finish()
    if run.finished:
        facts = settings | {"steps": args.steps, "epochs": round(args.steps / epoch_steps, 2),
                            "images_seen": args.steps * args.batch_size, "collapse": collapse}
        with releasing(args.model, COMPONENT, replace=args.replace, run=args.run):
            release(snapshot(generator, args.seed), Path(args.model), facts)
        print(f"released to {args.model}/{COMPONENT}")
        if collapse:
            print(f"but {collapse}")


def draw_epoch(run: RunFolder, generator: Generator, epoch: int | None, step: int, seed: int) -> None:
    """Draw 40 faces of always the same noise, and below each other the first row of every epoch's."""
    from PIL import Image

    faces = generate(snapshot(generator, seed, batches=4), range(seed, seed + 40))
    name = f"step-{step:07d}" if epoch is None else f"epoch-{epoch:02d}"
    run.picture(name, to_images(faces), columns=10)
    size = faces.shape[1]
    rows = []
    for path in sorted((run.folder / "pictures").glob("epoch-*.png")):
        with Image.open(path) as sheet:
            rows.append(np.asarray(sheet.convert("RGB"))[:size])
    if rows:
        Image.fromarray(np.concatenate(rows)).save(run.folder / "progress.png")


# ------------------------------------------------------------------------------------------------------------- release


def release(generator: Generator, folder: Path, training: dict[str, Any]) -> None:
    """Write the generator, in fp16, into a model folder of its own."""
    config = {"network": asdict(generator.config), "training": training}
    save_component(folder, COMPONENT, generator.state_dict(), config,
                   extra={"commit": git_commit(Path(__file__).parent)})
    update_index(folder, name=folder.name, image_size=generator.config.image_size)


def load_dcgan(folder: str | Path, device: torch.device | str = "cpu") -> Generator:
    """The trained generator of a model folder, frozen. Raises ModelFolderError where there is none or it is damaged."""
    config, state = load_component(folder, COMPONENT)
    network = config["network"]
    found = build(lambda: Generator(DCGANConfig(int(network["noise"]), tuple(network["channels"]))), state, "the DCGAN")
    found = found.eval().requires_grad_(False)
    return found.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the released generator; writes ``metrics.json`` and a grid into the run folder.

    ``shrunk_real`` has the same figures of real test images of the generator's size: what the size alone costs.
    """
    from core.evaluation.adversarial_report import gigaflops, measure, milliseconds
    from core.nn.device import pick_device
    from core.training.run_folder import save_grid
    from dataset import FaceStore

    generator, store = load_dcgan(args.model, pick_device(args.device)), FaceStore.open(args.data)
    faces = generate(generator, range(args.seed, args.seed + args.samples))
    result = measure(faces, store, args.judge, args.judge_cache, seed=args.seed)
    small = load_small(store, store.select("test", px=128)[: args.samples], generator.config.image_size).numpy()
    shrunk = measure(small, store, args.judge, args.judge_cache, seed=args.seed)
    result["shrunk_real"] = {name: shrunk[name] for name in ("n", "frechet", "frechet_over_floor", "diversity")}
    result |= {"milliseconds": milliseconds(lambda: generate(generator, [args.seed])),
               "gflop": gigaflops(lambda: generate(generator, [args.seed])), "threads": torch.get_num_threads()}
    save_grid(to_images(faces[:100]), Path(args.run) / "samples.png", 10)
    (Path(args.run) / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


# ------------------------------------------------------------------------------------------------------------ commands


def train_options(parser: argparse.ArgumentParser) -> None:
    """Those of --train."""
    from core.training.options import RunDefaults, add_run, of_preset
    from core.training.release import add_release_options

    add_run(parser, RUNS, RunDefaults("runs/dcgan", learning_rate=2e-4, decay_share=0.0, picture_every=None))
    parser.set_defaults(preset="celeba64")
    add_release_options(parser)
    parser.add_argument("--epochs", type=float, help="; ".join((of_preset(RUNS, "epochs"), "--steps takes its place")))


def check_train(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what --train leaves open, but for the steps, which depend on the number of images."""
    from core.training.release import fill_model

    for name, value in RUNS[args.preset].items():
        if name != "steps" and getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps == 0 or (args.steps is None and args.epochs <= 0):
        parser.error("--steps and --epochs must be more than 0")
    if args.batch_size < 2:
        parser.error(f"--batch-size is {args.batch_size}; batch norm and the measure of collapse need at least 2")
    fill_model(args)


def eval_options(parser: argparse.ArgumentParser) -> None:
    """Those of --eval."""
    from core.training.options import add_adversarial_evaluation

    add_adversarial_evaluation(parser, "runs/dcgan", BUNDLED)


COMMANDS = (
    Command("--train", "train generator and discriminator and release the generator", train_options, alone(train),
            check_train),
    Command("--eval", "measure a released generator against real images", eval_options, evaluate),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    keep_quiet()
    return run_one("Train or measure the DCGAN.", COMMANDS, argv)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
