"""What can a trained UNet teach another network? To guide itself in one pass, and to generate in two to four steps.

Command line and what is made ready for it; the losses are in core/diffusion/distillation.py, the training loop is that
of conditional_ldm.py, which answers these flags too.

    python distill.py --distill guidance       teach the released UNet to answer at a guidance scale in one pass
    python distill.py --distill consistency    teach another network, `turbo`, to draw in two to four steps

Sources: guidance distillation https://arxiv.org/abs/2210.03142, consistency models https://arxiv.org/abs/2303.01469.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conditional_ldm import RUNS, Training
from core.command import Command, run_command, run_lock, run_one
from core.diffusion.distillation import (
    GUIDANCE_RANGE,
    SHARE_OFF,
    Teacher,
    WeakModelGuidance,
    consistency_loss,
    guidance_loss,
    relative_errors,
)
from core.diffusion.schedulers import TURBO, TURBO_STEPS
from core.diffusion.unet import ConditionalUNet, frozen, load_unet, perturbed, read_config, read_schedule, write_config
from core.nn.checkpoint import (
    ModelFolderError,
    component_hash,
    git_commit,
    load_component,
    load_strictly,
    read_index,
    save_delta,
)
from core.quiet import keep_quiet

if TYPE_CHECKING:
    from core.training.ema import PowerEMA
    from core.training.run_folder import RunFolder
    from core.training.unet_data import TrainingData

# ------------------------------------------------------------------------------------------------------------ guidance


def train_guidance(args: argparse.Namespace) -> None:
    """Teach layers beside the released UNet to say at a guidance scale what two or three passes say, and release it.

    The UNet's own weights stay what they are, and with them all that is said without guidance.
    """
    from conditional_ldm import compiled, fit, make_optimizers, release
    from core.training.accelerator import make_accelerator
    from core.training.ema import PowerEMA
    from core.training.release import check_release, releasing

    check_release(args.model, "unet", replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    teacher, data = find_teacher(args, accelerator), teaching_data(args, accelerator, share_off=0.0)
    if args.self_guidance:
        teacher = replace(teacher, weak_model=WeakModelGuidance(perturbed(teacher.network), args.self_guidance))
    schedule, student = data.schedule, new_student(teacher, args.seed, accelerator)
    if args.init:
        load_strictly(student, {**student.state_dict(), **learned_guidance(args.init)}, "the UNet to start from")
    for name, weight in student.named_parameters():
        weight.requires_grad_("guidance" in name)
    optimizers = make_optimizers(student, args)
    emas = {"ema_long": PowerEMA(student, relative_std=0.10), "ema_short": PowerEMA(student, relative_std=0.05)}
    settings = settings_of(args, data, student, teacher)
    settings |= {"self_guidance": args.self_guidance} if args.self_guidance else {}
    run = open_run(args, settings, {"model": student, **optimizers, **emas}, accelerator)
    network = compiled(student, args.compile, accelerator)
    loss = guidance_loss(network, schedule, compiled_teacher(teacher, args.compile, accelerator))
    best = fit(Training(model=student, loss=loss, validate=lambda one: guidance_loss(one, schedule, teacher), data=data,
                        optimizers=optimizers, emas=emas, run=run, held_out=256), args, accelerator)
    if best is None:
        return
    network, found = best
    errors = relative_errors(network, teacher.network, schedule, data.held_out(accelerator, limit=256), accelerator,
                             teacher.weak_model)
    for scale, (one, plain) in errors.items():
        print(f"scale {scale}: one pass is {one:.3f} off what it is to say; if it knew no scale, {plain:.3f}")
    suggested = args.guidance_scale
    if suggested is None:
        suggested = read_index(args.model)["defaults"]["guidance_scale"]
    with releasing(args.model, "unet", replace=args.replace, run=args.run):
        release(network, Path(args.model), schedule, {"vae": settings["encoder"], "clip": settings["clip"]},
                teacher.config["training"], suggested, settings | found | {"errors": errors})
    print(f"released to {args.model}/unet")


def learned_guidance(folder: str) -> dict[str, Tensor]:
    """The layers of a distilled UNet that know the guidance scale. Raises ModelFolderError where it has none."""
    found = {name: value for name, value in load_component(folder, "unet")[1].items() if "guidance" in name}
    if not found:
        raise ModelFolderError(f"the UNet in {folder} knows no guidance to start from; leave --init out")
    return found


# --------------------------------------------------------------------------------------------------------- consistency


def train_consistency(args: argparse.Namespace) -> None:
    """Teach a copy of the released UNet where the paths of its steps end, and release it beside that as
    ``few_step``."""
    from conditional_ldm import compiled, fit, make_optimizers
    from core.evaluation.prompt_sheets import GridOptions
    from core.training.accelerator import make_accelerator
    from core.training.ema import PowerEMA
    from core.training.release import check_release, releasing

    check_release(args.model, "turbo", replace=args.replace, run=args.run)
    accelerator = make_accelerator(args.device, args.precision)
    teacher, data = find_teacher(args, accelerator), teaching_data(args, accelerator, share_off=SHARE_OFF)
    schedule, student = data.schedule, new_student(teacher, args.seed, accelerator)
    optimizers = make_optimizers(student, args)
    emas = {"ema_long": PowerEMA(student, relative_std=0.10), "ema_short": PowerEMA(student, relative_std=0.05),
            # what neighbouring points are compared with: an average that follows closely, used where it stands
            "target": PowerEMA(student, relative_std=0.005)}
    target = ConditionalUNet(student.config)
    target.load_state_dict(emas["target"].state, assign=True)
    target.eval().requires_grad_(False)
    settings = settings_of(args, data, student, teacher)
    run = open_run(args, settings, {"model": student, **optimizers, **emas}, accelerator)
    loss = consistency_loss(compiled(student, args.compile, accelerator), schedule,
                            compiled_teacher(teacher, args.compile, accelerator),
                            compiled(target, args.compile, accelerator))
    best = fit(Training(model=student, loss=loss, validate=lambda one: consistency_loss(one, schedule, teacher),
                        data=data, optimizers=optimizers, emas=emas, run=run, held_out=256,
                        grid=GridOptions(steps=TURBO_STEPS, sampler=TURBO)), args, accelerator)
    if best is not None:
        network, found = best
        with releasing(args.model, "turbo", replace=args.replace, run=args.run):
            release_few_step_unet(network, teacher, Path(args.model), settings | found)
        print(f"released to {args.model}/turbo")


def release_few_step_unet(model: ConditionalUNet, teacher: Teacher, folder: Path, facts: dict[str, Any]) -> None:
    """Write a network that generates in a few steps beside the UNet that taught it, as what it adds to that."""
    if component_hash(folder, "unet") != teacher.source:
        raise ModelFolderError(f"the UNet in {folder} is not the one that taught this run; restore the folder")
    save_delta(folder, "turbo", model.state_dict(), teacher.network.state_dict(),
               {"network": write_config(model.config), "parents": {"unet": teacher.source}, "distilled": facts},
               extra={"commit": git_commit(Path(__file__).parent)})


# --------------------------------------------------------------------------------------------------------------- shared


def find_teacher(args: argparse.Namespace, accelerator: Any) -> Teacher:
    """The UNet of ``args.model``, or what it was when this run began."""
    from core.training.teacher import keep_teacher

    load_unet(args.model)  # refuses one whose VAE or CLIP is another
    config, state, source = keep_teacher(Path(args.run), Path(args.model), "unet", accelerator.is_main_process)
    network = ConditionalUNet(read_config(config))
    load_strictly(network, state, "the teacher")
    network = frozen(network, accelerator.device)
    return Teacher(network, config, source, network.guidance_range)


def new_student(teacher: Teacher, seed: int, accelerator: Any) -> ConditionalUNet:
    """The same network, which is to know the scale too: until it has learned, it answers as if there were none. No
    dropout. New layers begin from ``seed``."""
    config = replace(read_config(teacher.config), guidance_range=teacher.guidance_range or GUIDANCE_RANGE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = ConditionalUNet(config if teacher.weak_model is None else replace(config, guided_attention=True))
    missing, unexpected = student.load_state_dict(teacher.network.state_dict(), strict=False)
    assert all("guidance" in name for name in missing) and not unexpected
    return student.eval().to(accelerator.device, memory_format=torch.channels_last)


def compiled_teacher(teacher: Teacher, wanted: bool, accelerator: Any) -> Teacher:
    """The teacher, its networks compiled by torch where that is wanted."""
    from conditional_ldm import compiled

    weak_model = teacher.weak_model and replace(teacher.weak_model,
                                                network=compiled(teacher.weak_model.network, wanted, accelerator))
    return replace(teacher, network=compiled(teacher.network, wanted, accelerator), weak_model=weak_model)


def teaching_data(args: argparse.Namespace, accelerator: Any, share_off: float) -> TrainingData:
    """Images, captions, and guidance scales of which ``share_off`` are 1."""
    from conditional_ldm import open_data
    from core.training.unet_data import DataOptions

    return open_data(DataOptions.of(args), args.model, read_schedule(args.model), accelerator, share_off)


def settings_of(args: argparse.Namespace, data: TrainingData, student: ConditionalUNet, teacher: Teacher
                ) -> dict[str, Any]:
    """What makes a run the run it is: it is resumed with the same alone."""
    from conditional_ldm import run_settings

    return run_settings(args, data, student) | {"preset": None, "distill": args.distill, "teacher": teacher.source}


def open_run(args: argparse.Namespace, settings: Mapping[str, Any], parts: dict[str, Any | PowerEMA], accelerator: Any
             ) -> RunFolder:
    """The folder of the run."""
    from core.training.run_folder import RunFolder, circumstances

    return RunFolder(Path(args.run), dict(settings), total_steps=args.steps, decay_share=args.decay_share,
                     report_to=args.report_to, main=accelerator.is_main_process, parts=parts,
                     how=circumstances(args, accelerator, accumulate=args.accumulate, compile=args.compile))


# ------------------------------------------------------------------------------------------------------------ commands


def guidance_options(parser: argparse.ArgumentParser) -> None:
    """Those of --distill guidance."""
    shared_options(parser, "guidance")
    parser.add_argument("--init", metavar="FOLDER", help="model folder whose guidance to start from, such as what the "
                        "UNet had before it was trained further")
    parser.add_argument("--self-guidance", type=float, default=0.0, metavar="S", help="also lead away, by S at scale "
                        "2.5 and more, from what is generated without self-attention (0: not)")
    parser.add_argument("--guidance-scale", type=float, help="what the model will suggest (default: what it does)")


def consistency_options(parser: argparse.ArgumentParser) -> None:
    """Those of --distill consistency."""
    shared_options(parser, "consistency")
    parser.set_defaults(init=None)  # it starts from the UNet in --model


def shared_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """Those that both take."""
    from core.training.options import RunDefaults, add_run, add_unet_data
    from core.training.release import add_release_options

    defaults = RunDefaults(f"runs/{kind}", learning_rate=1e-3, log_every=50, picture_every=1000)
    add_run(parser, RUNS, defaults)
    add_release_options(parser, ", whose UNet teaches")
    add_unet_data(parser, RUNS)
    parser.set_defaults(distill=kind)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what a command leaves open."""
    from core.training.options import fill_from_preset, need_model

    fill_from_preset(parser, args, RUNS)
    need_model(parser, args)


def alone(args: argparse.Namespace) -> None:
    """Train in a folder that no other process trains in."""
    from dataset import FaceStore

    with run_lock(args.run):
        FaceStore.open(args.data)  # where there is none, that is what is said first
        (train_guidance if args.distill == "guidance" else train_consistency)(args)


COMMANDS = (
    Command("--distill guidance", "the UNet answers at a guidance scale in one pass", guidance_options, alone, check),
    Command("--distill consistency", "turbo/ beside the UNet draws in two to four steps", consistency_options, alone,
            check),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    keep_quiet()
    return run_one("Let a network learn from the trained UNet.", COMMANDS, argv)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
