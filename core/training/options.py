"""Which options do all training commands share, and what do they leave to the preset?

It does not know what is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.training.release import BUNDLED
from core.training.trackers import add_report_to

Presets = Mapping[str, Mapping[str, Any]]  # name of a preset -> what a run of it is, where nothing else is asked for


@dataclass(frozen=True)
class RunDefaults:
    """How a component is trained unless it is told otherwise: the folder of the run, the learning rate, the share of
    the steps in which that falls, and the steps between log lines, checkpoints and images (None: takes none)."""

    folder: str
    learning_rate: float
    decay_share: float = 0.3
    log_every: int = 25
    save_every: int = 500
    picture_every: int | None = 500


def add_data(parser: argparse.ArgumentParser) -> None:
    """``--data``."""
    parser.add_argument("--data", default="archive/prepared", help="prepared store (python dataset.py --prepare)")


def add_device(parser: argparse.ArgumentParser, *, precision: bool = False) -> None:
    """``--device``, and with ``precision`` ``--precision``."""
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    if precision:
        parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto")


def add_run_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """``--run``, which is ``--run-folder`` too."""
    parser.add_argument("--run", "--run-folder", default=default, help="folder of this run; the same command resumes "
                        f"from it ({default}; torchrun has a --run of its own)")


def add_evaluation(parser: argparse.ArgumentParser, run: str) -> None:
    """What a component's --eval takes; its figures go into the folder ``run``."""
    add_data(parser)
    add_measured_model(parser)
    add_run_folder(parser, run)
    parser.add_argument("--samples", type=int, default=100000, help="at most this many test images")
    add_device(parser)


def add_adversarial_evaluation(parser: argparse.ArgumentParser, run: str, model: str) -> None:
    """What --eval of a network that draws in one pass takes beside `add_evaluation`; ``model`` is read unless told."""
    add_evaluation(parser, run)
    parser.set_defaults(samples=2500, model=model)
    parser.add_argument("--judge", default="models/judge", help="folder of the frozen attribute classifier")
    parser.add_argument("--judge-cache", dest="judge_cache", default="runs/judge-cache",
                        help="where features of real images are kept")
    parser.add_argument("--seed", type=int, default=0)


def add_run(parser: argparse.ArgumentParser, presets: Presets, defaults: RunDefaults) -> None:
    """What every run of training takes: folder, preset, length, learning rate, seed, machine, and what it records."""
    add_data(parser)
    add_run_folder(parser, defaults.folder)
    parser.add_argument("--preset", choices=sorted(presets), default="celeba128")
    parser.add_argument("--steps", type=int, help=of_preset(presets, "steps"))
    parser.add_argument("--stop-at", type=int, help="stop early after this many steps, resumable")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="the same by the clock")
    parser.add_argument("--batch-size", type=int, help=of_preset(presets, "batch_size"))
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--warmup-steps", type=int, help=of_preset(presets, "warmup_steps"))
    parser.add_argument("--decay-share", type=float, default=defaults.decay_share,
                        help="share of the steps in which the learning rate falls, at the end")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser, precision=True)
    add_report_to(parser)
    parser.add_argument("--log-every", type=int, default=defaults.log_every)
    parser.add_argument("--save-every", type=int, default=defaults.save_every)
    if defaults.picture_every is not None:
        parser.add_argument("--image-every", "--picture-every", type=int, dest="picture_every",
                            default=defaults.picture_every, help="steps between grids of images")


def add_unet_data(parser: argparse.ArgumentParser, presets: Presets) -> None:
    """What every run that trains a UNet, or distils one, takes: which images and captions, and how it learns."""
    parser.add_argument("--cache", help="where encoded images are kept; " + of_preset(presets, "cache"))
    parser.add_argument("--px", type=int, choices=(58, 80, 128), help="see only images of this source resolution")
    parser.add_argument("--soft-from", type=float, nargs=2, metavar=("T58", "T80"), help="learn from images of 58 "
                        "and 80 px only at these timesteps and above, where they cannot be told from sharp ones")
    parser.add_argument("--sharp-times", type=int, default=1, help="how often an epoch shows images of 128 px")
    parser.add_argument("--favour", nargs="*", default=[], metavar="ATTRIBUTE", help="attributes to be seen more often")
    parser.add_argument("--favour-times", type=int, default=3, help="how often an epoch shows the favoured images")
    parser.add_argument("--caption-dropout", type=float, default=0.12, help="share trained without its caption")
    parser.add_argument("--captions-per-image", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1, help="pieces a batch is cut into, where memory is short")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for all that is a "
                        "matrix or a kernel inside the network; the rest stays with AdamW")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network (pays on CUDA)")


def of_preset(presets: Presets, name: str) -> str:
    """The help of an option whose default is the preset's."""
    return "default: " + ", ".join(f"{values[name]} ({preset})" for preset, values in presets.items())


def fill_from_preset(parser: argparse.ArgumentParser, args: argparse.Namespace, presets: Presets) -> None:
    """Fill in what the command line left open. Ends as argparse does where a length makes no sense."""
    for name, value in presets[args.preset].items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    for name in ("steps", "batch_size"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")


def need_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends as argparse does where a command that changes a trained model is not told which."""
    if args.model is None:
        flag = (parser.prog or "").partition(" ")[2]
        parser.error(f"{flag} changes a trained model: say which, with --model FOLDER")


def add_measured_model(parser: argparse.ArgumentParser) -> None:
    """``--model`` of commands that change nothing."""
    parser.add_argument("--model", default=BUNDLED, help=f"model folder to read (default: {BUNDLED})")
