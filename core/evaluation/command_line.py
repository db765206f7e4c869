"""Which commands does evaluate.py have, with which options, and what did command lines look like before?

Every command has only the options that it reads. Once a flag such as ``--fit-sharpness`` stopped everything else; now
it is the word ``fit-sharpness``, and the old flag still works. Words and numbers alone: this module does not know what
the commands do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from core.command import check_numbers
from core.evaluation.benchmark import SECTIONS
from core.evaluation.suite import HELD_OUT, PARTS, Settings
from core.nn.device import pick_device, pick_dtype
from core.text.attribute_sliders import sliders

REPORT = "report"  # what a command line without a command asks for
# flag: (command, whether a value may follow), in the order in which they took precedence
COMMAND_OF = {
    "--bench": ("benchmark", True),
    "--sliders": ("sliders", True),
    "--watermark": ("watermark", False),
    "--fit-emphasis": ("fit-prompt-rewriting", False),
    "--fit-sharpness": ("fit-sharpness", False),
    "--fit-correction": ("fit-correction", True),
    "--build-nearest": ("index-training-images", False),
    "--train-judge": ("train-classifier", False),
}


class Misuse(ValueError):
    """Options that do not fit each other, the machine or the model: ends with the usage, as argparse's own errors."""


def with_command(words: Sequence[str]) -> list[str]:
    """A command line that begins with its command, from one that may name it by an old flag, or not at all.

    ``["--model", "m", "--bench", "speed"]`` becomes ``["benchmark", "speed", "--model", "m"]``, ``["--quick"]`` becomes
    ``["report", "--quick"]``; what begins with a word, or asks for help alone, stays.
    """
    rest = list(words)
    if rest[:1] in (["-h"], ["--help"]) or (rest and not rest[0].startswith("-")):
        return rest
    for flag, (command, takes_value) in COMMAND_OF.items():
        for place, word in enumerate(rest):
            name, equals, value = word.partition("=")
            if name != flag:
                continue
            following = rest[place + 1 : place + 2]
            if equals:
                return [command, value, *rest[:place], *rest[place + 1 :]]
            if takes_value and following and not following[0].startswith("-"):
                return [command, *following, *rest[:place], *rest[place + 2 :]]
            return [command, *rest[:place], *rest[place + 1 :]]
    return [REPORT, *rest]


# ------------------------------------------------------------------------------------------------------------- options


def at_least(least: int) -> Callable[[str], int]:
    """A type of options: a whole number, not below this."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {least}")
        return value

    return number


def numbers(text: str) -> tuple[int, ...]:
    """Counts with commas between them: "2,4,8"."""
    return tuple(at_least(1)(part) for part in text.split(","))


def chosen_from(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A type of options: some of these names, with commas between them."""

    def choice(text: str) -> tuple[str, ...]:
        found = tuple(part for part in text.split(",") if part)
        if unknown := sorted(set(found) - set(names)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(names)}")
        return found

    return choice


# What an option means; its default is the command's. A name without dashes is a value that follows the command.
OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"help": "model folder"},
    "--data": {"help": "prepared store, see dataset.py --prepare"},
    "--judge": {"help": "folder of the frozen attribute classifier"},
    "--out": {"help": "folder that what was found is written to"},
    "--cache": {"help": "folder of what networks saw in real pictures, kept"},
    "--parts": {"type": chosen_from(PARTS), "help": f"comma-separated choice of {','.join(PARTS)}"},
    "--split": {"choices": HELD_OUT, "help": "held-out people; val for choices"},
    "--samples": {"type": at_least(2), "help": "how many pictures, people or descriptions"},
    "--steps": {"type": at_least(1), "help": "denoising steps"},
    "--guidance": {"type": float, "help": "guidance scale, 1 = off"},
    "--sampler": {"help": "as at /options"},
    "--begin": {"type": float, "nargs": 2, "metavar": ("A", "B"), "help": "n steps begin at timestep A - B / (n + 2) "
                "of 1000"},
    "--seed": {"type": at_least(0), "help": "of prompts, noise and choices"},
    "--pool": {"type": at_least(0), "help": "training pictures looked at"},
    "--crowd-n": {"type": at_least(2), "help": "pictures for the empty prompt"},
    "--curve-n": {"type": at_least(2), "help": "pictures a point of the step curve"},
    "--curve-steps": {"type": numbers, "help": "comma-separated step counts of the curve"},
    "--inception": {"metavar": "FILE", "help": "TorchScript file of the Inception features, for true FID"},
    "--device": {"choices": ("auto", "cpu", "cuda", "mps"), "help": "what computes"},
    "--precision": {"choices": ("fp32", "bf16"), "help": "of the networks that generate"},
    "--replace": {"action": "store_true", "help": "replace what the model folder has of this"},
    "--record": {"action": "store_true", "help": "keep the figures where users see them: in the model folder, or "
                 "docs/benchmarks.md"},
    "--quick": {"action": "store_true", "help": "fewer pictures and steps: minutes on two cores"},
    "--compare": {"metavar": "FILE", "help": "an earlier report.json: print what changed"},
    "--setup": {"action": "store_true", "help": "install the networks (350 MB), then stop"},
    "--n": {"type": at_least(2), "help": "pictures of each kind"},
    "--pictures": {"type": Path, "nargs": "+", "metavar": "PATH", "help": "judge these in place of the model: .npy "
                   "files (uint8 [n, 128, 128, 3]) or folders of pictures"},
    "--repeats": {"type": at_least(1), "help": "of each comparison"},
    "--epochs": {"type": float, "help": "passes over the training pictures"},
    "--batch-size": {"type": at_least(1), "help": "pictures a step"},
    "--run": {"help": "folder of the training; the same command resumes from it"},
    "counts": {"type": numbers, "nargs": "?", "metavar": "STEPS", "help": "numbers of steps"},
    "names": {"type": chosen_from([*sliders()]), "nargs": "?", "metavar": "NAMES", "help": "sliders: Smiling,Young"},
    "section": {"choices": ("all", *SECTIONS), "nargs": "?", "help": "what is compared"},
}  # fmt: skip
NEEDED = "needed"  # the default of --model where a command changes a trained model

USUAL = Settings()
_PLACES = {"--model": USUAL.model, "--data": USUAL.data}
_TRAINED = {"--model": NEEDED, "--data": USUAL.data, "--replace": False}
_HOW = {"--guidance": None, "--seed": 0, "--device": "auto", "--precision": "fp32"}  # faces are generated
_REPORT = {f"--{item.name.replace('_', '-')}": argparse.SUPPRESS for item in fields(Settings)}  # --quick has others
COMMANDS: dict[str, tuple[str, Mapping[str, Any]]] = {
    REPORT: ("every metric of a trained model (the default)",
             {**_REPORT, "--quick": False, "--compare": None, "--record": False}),
    "outside": ("the same faces judged by networks of others",
                {**_PLACES, "--setup": False, "--split": "test", "--n": 240, "--steps": [50, 4], "--seed": 0,
                 "--pool": 2000, "--pictures": None, "--out": "runs/outside", "--cache": "runs/outside-cache"}),
    "sliders": ("the response of attribute sliders",
                {"names": tuple(sliders()), "--model": USUAL.model, "--judge": USUAL.judge, "--out": "docs",
                 "--samples": 12, "--steps": 10, **_HOW, "--record": False}),
    "watermark": ("what the invisible watermark survives",
                  {**_PLACES, "--out": USUAL.out, "--samples": 1000, "--pool": None, "--seed": 0, "--device": "auto"}),
    "benchmark": ("speed, beside diffusers' own parts and as a server",
                  {"section": "all", "--model": USUAL.model, "--steps": 500, "--repeats": 3, "--record": False}),
    "fit-sharpness": ("the decoder's last filter, for what this model generates",
                      {**_TRAINED, "--samples": 256, "--steps": 20, "--sampler": None, "--begin": None, **_HOW}),
    "fit-prompt-rewriting": ("in which words this model follows descriptions better",
                             {**_TRAINED, "--judge": USUAL.judge, "--out": "runs/emphasis", "--split": "val",
                              "--samples": 64, "--steps": 8, "--begin": None, **_HOW}),
    "fit-correction": ("what so many steps get wrong in all pictures alike, and what corrects it",
                       {"counts": (2, 4, 8, 16, 50), **_TRAINED, "--samples": 1024, "--begin": None, **_HOW}),
    "index-training-images": ("the index that warns of copied training images",
                              {**_TRAINED, "--out": USUAL.out, "--samples": 1000, "--seed": 0, "--device": "auto"}),
    "train-classifier": ("the attribute classifier that every report is measured by",
                         {"--data": USUAL.data, "--judge": USUAL.judge, "--run": "runs/judge", "--epochs": 2.5,
                          "--batch-size": 128, "--seed": 0, "--device": "auto"}),
}  # fmt: skip


def parse(description: str, words: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options of a command line, under their names with ``_``; `command` is the command. Ends as argparse does."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (what, options) in COMMANDS.items():
        own = commands.add_parser(command, help=what, description=what, allow_abbrev=False)
        for name, default in options.items():
            names, how = [name], dict(OPTIONS[name])
            if command == "outside" and name == "--steps":
                how["nargs"] = "+"
            elif command == "benchmark" and name == "--steps":
                names, how["help"] = [name, "--bench-steps"], "of the long comparison"
            elif name == "--run":
                names = [name, "--run-folder"]  # torchrun has a --run of its own
            if default is NEEDED:
                default = None
            elif "action" not in how:
                usual = getattr(USUAL, name[2:].replace("-", "_")) if default is argparse.SUPPRESS else default
                how["help"] += f" (default: {_told(usual)})"
            own.add_argument(*names, default=default, **how)
    args = parser.parse_args(with_command(words))
    check_numbers(parser, args)
    try:
        _check(args)
    except ValueError as error:
        parser.error(str(error))
    return parser, args


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit the command, each other or the machine."""
    split = getattr(args, "split", USUAL.split)
    if COMMANDS[args.command][1].get("--model") is NEEDED and args.model is None:
        raise ValueError(f"{args.command} changes a trained model: say which, with --model FOLDER")
    if args.command == REPORT and args.record and split != USUAL.split:
        raise ValueError(f"--record keeps figures of {USUAL.split}; --split {split} is for choices")
    if args.command == "fit-prompt-rewriting" and split == USUAL.split:
        raise ValueError(f"{args.command} is a choice: --split {split} would spoil the report")
    if args.command == REPORT and "parts" in args and "samples" not in args.parts:
        for wanted in {"memorisation"}.intersection(args.parts):
            raise ValueError(f"--parts {wanted} needs the part samples in the same run")
        if getattr(args, "inception", None):
            raise ValueError("--inception needs the part samples in the same run")
    if "precision" in args:
        pick_dtype(args.precision, pick_device(args.device))


def _told(default: Any) -> str:
    """A default for people."""
    if isinstance(default, (tuple, list)):
        return ",".join(map(str, default)) if len(default) < 10 else "all"
    return "the model's own, or all" if default is None else str(default)
