"""How does a person train a model of their own pictures with one command?

    python train.py --preset tiny --data ~/pictures --name mine      prepare, CLIP, VAE, UNet, guidance, fits, report
    python train.py --preset small --data ~/pictures --name mine --dry-run    only say what that would cost

Every stage is a command of this repository in a process of its own, so that its memory is free when it ends and a
signal saves it. What is finished is not done again, what was interrupted continues, and a stage whose settings changed
is asked again with all that follow it; its run says where it cannot continue so. It does not know how anything is
trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.command import FolderLock, Interrupted, SettingError, UserError, run_command
from core.quiet import keep_quiet
from core.training.recipes import RECIPES, Length
from core.training.trackers import add_report_to

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """A command of this repository, and the component of the model folder that it leaves there ("" for none)."""

    name: str
    words: list[str]
    makes: str = ""


def stages(args: argparse.Namespace, store: Path, has_attributes: bool) -> list[Stage]:
    """All that follows preparation, in order."""
    recipe, run, model, times = RECIPES[args.preset], run_folder(args), str(model_folder(args)), args.length
    machine = ["--device", args.device]
    shared = ["--data", str(store), "--model", model, "--seed", str(args.seed), "--replace", *machine]
    precise = [*shared, "--precision", args.precision, "--report-to", ",".join(args.report_to) or "none"]
    cache = ["--cache", str(run / "latents")]
    unet = recipe.unet.words(times)
    found = [
        Stage("clip", ["train_clip.py", "--train", *recipe.clip.words(times), *precise, "--run", str(run / "clip")],
              "clip"),
        Stage("vae", ["vae.py", "--train", *recipe.vae.words(times), *precise, "--run", str(run / "vae")], "vae"),
        Stage("unet", ["conditional_ldm.py", "--train", *unet, *precise, *cache, "--run", str(run / "unet")], "unet"),
        Stage("guidance", ["distill.py", "--distill", "guidance", *recipe.guidance.words(times), *precise, *cache,
                           "--run", str(run / "guidance")], "unet"),
        Stage("correction", ["evaluate.py", "fit-correction", *recipe.correction, *shared], "correction"),
    ]
    measured = ["--model", model, "--data", str(store), "--out", str(run / "report"), *machine]
    if has_attributes:
        measured += ["--cache", str(run / "judge-cache")]
    return [*found, Stage("report", ["evaluate.py", "report", *recipe.report, *measured, "--record"])]


def run_folder(args: argparse.Namespace) -> Path:
    return Path(args.runs) / args.name


def model_folder(args: argparse.Namespace) -> Path:
    return Path(args.models) / args.name


# ---- data ------------------------------------------------------------------------------------------------------------


def store_of(args: argparse.Namespace) -> Path:
    """Where the prepared store is: --data itself, where that is one, or what it is prepared into."""
    from core.training.data_preparation import read_manifest

    data = Path(args.data)
    return data if read_manifest(data) is not None else Path(args.archive) / args.name


def described(args: argparse.Namespace, prepared: bool) -> dict[str, Any]:
    """What is to be learned from: counted in the store, or, before that is made, in the source. Raises DataError."""
    from core.training.data_preparation import read_manifest
    from core.training.data_sources import HOW_TO_GET_DATA, DataError, How, make_plan

    store = store_of(args)
    manifest = read_manifest(store) if prepared or store == Path(args.data) else None
    if manifest is not None:
        form = str(manifest.get("form", manifest["sources"]["kind"]))
        return {"count": manifest["count"], "train": manifest["splits"]["train"], "form": form,
                "fingerprint": str(manifest["fingerprint"])[:12], "attributes": manifest["attributes"]}
    plan = make_plan([Path(args.data)], store, how=How(args.crop, tuple(args.caption_columns)))
    if plan is None or not plan.entries:
        raise DataError(f"--data {args.data} holds no prepared store and no images with labels; {HOW_TO_GET_DATA}")
    return {"count": len(plan.entries), "train": int((plan.table["split"] == "train").sum()),
            "form": plan.form or plan.kind, "fingerprint": plan.fingerprint[:12], "attributes": plan.labels is None}


# ---- what it will cost -----------------------------------------------------------------------------------------------


def summarize(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Print what the run will cost, and, unless --dry-run, write it into the run's folder; steps that were timed for
    the same command, data and commit are not timed again."""
    from core.nn.checkpoint import git_commit, write_json
    from core.training import run_summary

    path = run_folder(args) / "summary.json"
    asked = {"data": data, "command": json.loads(json.dumps(vars(args))), "commit": git_commit(ROOT)}
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if args.dry_run or any(found.get(name) != value for name, value in asked.items()):
        found = measured(args, data) | asked
        if not args.dry_run:
            write_json(path, found)
    print(run_summary.text(found), flush=True)


def measured(args: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run, its steps timed on this machine."""
    import torch

    from conditional_ldm import PRESETS as UNETS
    from core.training import run_summary
    from core.training.accelerator import make_accelerator
    from core.training.timed_steps import clip_step, unet_step, vae_step
    from discriminator import PRESETS as ADVERSARIES
    from discriminator import PatchDiscriminator
    from train_clip import PRESETS as CLIPS
    from vae import PRESETS as VAES

    accelerator, recipe = make_accelerator(args.device, args.precision), RECIPES[args.preset]
    vae = VAES[recipe.vae.preset]
    adversary = None if recipe.vae.is_without_adversary else ADVERSARIES["celeba128"]
    built = {
        "clip": lambda size: clip_step(CLIPS[recipe.clip.preset], size, accelerator),
        "vae": lambda size: vae_step(vae, adversary and PatchDiscriminator(adversary), size, accelerator),
        "unet": lambda size: unet_step(replace(UNETS[recipe.unet.preset], latent_channels=vae.latent_channels), size,
                                       accelerator),
    }
    parts = {}
    for name, build in built.items():  # one after the other, so that the memory of one is free for the next
        length: Length = getattr(recipe, name)
        cost = run_summary.measure_step(build(length.batch_size), length.batch_size, args.measure_seconds)
        parts[name] = run_summary.Part(length.preset, length.times(args.length), length.batch_size, cost)
    unet = parts["unet"].cost  # two more passes of the teacher, each a third of a step
    share = recipe.guidance.batch_size / recipe.unet.batch_size
    parts["guidance"] = run_summary.Part(
        recipe.guidance.preset, recipe.guidance.times(args.length), recipe.guidance.batch_size,
        replace(unet, gflop_per_image=round(unet.gflop_per_image * 5 / 3, 4), seconds=unet.seconds * 5 / 3 * share))
    machine = {"processes": accelerator.num_processes, "device": accelerator.device.type,
               "precision": accelerator.mixed_precision.replace("no", "fp32"), "threads": torch.get_num_threads(),
               "torch": torch.__version__}
    return run_summary.summary(data, parts, machine, vae.latent_channels, run_folder(args))


# ---- running ---------------------------------------------------------------------------------------------------------


def run_stage(stage: Stage) -> None:
    """Run one command to its end; a signal is passed on to it. Raises Interrupted, or UserError where it failed."""
    print(f"\n== {stage.name}: python {' '.join(stage.words)}", flush=True)
    child = subprocess.Popen([sys.executable, str(ROOT / stage.words[0]), *stage.words[1:]])
    try:
        code = child.wait()
    except Interrupted as stopped:
        child.send_signal(stopped.signum)
        child.wait()
        raise Interrupted(stopped.signum, f"stopped in {stage.name}; the same command continues") from None
    if code in (130, 143):
        raise Interrupted(code - 128, f"stopped in {stage.name}; the same command continues")
    if code:
        raise UserError(f"{stage.name} ended with status {code}; its last lines say why; the same command goes on")


def run_all(args: argparse.Namespace, data: dict[str, Any], store: Path) -> None:
    """Every stage that is not done yet, in order; what is done is noted in the run's folder."""
    from core.nn.checkpoint import write_json

    path, before = run_folder(args) / "done.json", data["fingerprint"]
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for stage in stages(args, store, data["attributes"]):
        before = hashlib.sha256(f"{before} {stage.words}".encode()).hexdigest()
        whole = not stage.makes or (model_folder(args) / stage.makes).is_dir()
        if done.get(stage.name) == before and whole:
            print(f"== {stage.name}: done already")
            continue
        run_stage(stage)
        done[stage.name] = before
        write_json(path, done)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a model of your own pictures, from data to "
                                     "report. The same command continues.", allow_abbrev=False)
    parser.add_argument("--preset", choices=tuple(RECIPES), required=True, help="tiny: minutes on a CPU, for a first "
                        "look; small: an evening on a GPU; celeba128: the size of the bundled model")
    parser.add_argument("--data", required=True, metavar="PATH", help="a folder, zip or tar of pictures, or a "
                        "store that dataset.py prepared")
    parser.add_argument("--name", required=True, help="of the model: models/NAME, its runs in runs/NAME")
    parser.add_argument("--dry-run", action="store_true", help="only say what it would cost; writes nothing")
    parser.add_argument("--length", type=float, default=1.0, metavar="FACTOR", help="train this many times as long")
    parser.add_argument("--replace", action="store_true", help="replace a model of this name that another run made")
    parser.add_argument("--caption-columns", nargs="+", default=[], metavar="NAME", help="as of dataset.py")
    parser.add_argument("--crop", default="center", help="as of dataset.py")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    add_report_to(parser)
    parser.add_argument("--measure-seconds", type=float, default=20.0, help="at most, for the timed steps of a part")
    for name, what in (("models", "the model"), ("runs", "the runs"), ("archive", "the prepared store")):
        parser.add_argument(f"--{name}", default=name, metavar="FOLDER", help=f"where {what} is put ({name})")
    args = parser.parse_args(argv)
    if Path(args.name).name != args.name or args.name in ("", ".", ".."):
        parser.error(f"--name is {args.name!r}; it must be the name of a folder, without a path")
    if not 0 < args.length <= 1000:
        parser.error(f"--length is {args.length}; it must be above 0 and at most 1000")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    keep_quiet()
    args = parse(argv)
    if model_folder(args).exists() and not (run_folder(args) / "done.json").exists() and not args.replace:
        raise SettingError(f"{model_folder(args)} is there and no run of train.py made it; choose another --name, or "
                           "give --replace")
    if args.dry_run:
        summarize(args, described(args, prepared=False))
        return 0
    store = store_of(args)
    with FolderLock(run_folder(args), "training"):
        if store != Path(args.data):
            columns = ["--caption-columns", *args.caption_columns] if args.caption_columns else []
            run_stage(Stage("prepare", ["dataset.py", "--prepare", "--source", str(args.data), "--out", str(store),
                                        "--crop", args.crop, *columns]))
        data = described(args, prepared=True)
        summarize(args, data)
        run_all(args, data, store)
    print(f"\n{model_folder(args)} is trained; python start.py --model {args.name} shows it")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
