"""Does a run survive what happens to it: signals, other data, a second process, damaged files, a full disk?"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import conditional_ldm
import dataset
import evaluate
import train_clip
import vae
from core import command
from core.command import FolderInUse, FolderLock, Interrupted, UserError, defer_signals, run_command
from core.evaluation.attribute_classifier import train_attribute_classifier
from core.training import data_preparation
from core.training.accelerator import make_accelerator
from core.training.arrays import amount, new_array
from core.training.curves import charts, plot_metrics, read_metrics
from core.training.run_folder import CheckpointMismatch, RunFolder, run_steps
from core.training.teacher import keep_teacher
from dataset import FaceStore, synthetic_store
from tests.support.training import Workplace, checkpoint, differences, make_workplace

pytestmark = pytest.mark.usefixtures("quick_grids")
ROOT = Path(conditional_ldm.__file__).parent
MAIN: dict[str, Callable[[list[str]], int]] = {"clip": train_clip.main, "vae": vae.main, "unet": conditional_ldm.main}
SCRIPT = {"clip": "train_clip.py", "vae": "vae.py", "unet": "conditional_ldm.py"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("work"))


def commands(place: Workplace, kind: str, name: str, *more: object) -> list[str]:
    """The words of every kind of training: `clip`, `vae`, `unet`, and what is trained on from them."""
    if kind == "decoder":
        return place.train("vae", name, "--decoder-only", "--perceptual-weight", 0, "--gan-start", 1, *more)
    words = place.train("unet" if kind == "distill" else kind, name, *more)
    return ["--distill", "guidance", *words[1:]] if kind == "distill" else words


def main_of(kind: str) -> Callable[[list[str]], int]:
    return MAIN[{"decoder": "vae", "distill": "unet"}.get(kind, kind)]


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("kind", ["clip", "vae", "decoder", "unet", "distill"])
def test_a_signal_saves_and_the_same_command_continues(
    place: Workplace, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of a step: that step is saved, though it is not a multiple of --save-every."""
    words = commands(place, kind, f"signal-{kind}", "--steps", 4)
    signum = signal.SIGTERM if kind == "vae" else signal.SIGINT
    log, sent = RunFolder.log, []

    def hit(self: RunFolder, step: int, values: Any) -> None:
        log(self, step, values)
        if step == 2 and not sent:
            sent.append(os.kill(os.getpid(), signum))

    monkeypatch.setattr(RunFolder, "log", hit)
    assert run_command(lambda: main_of(kind)(words)) == 128 + signum
    run = place.root / f"signal-{kind}"
    said = capfd.readouterr()
    step = RunFolder(run, {}, {}, 1, 0.5, main=False).checkpoints()[-1][0]
    assert step in (2, 3) and f"step {step} of 4 is saved in {run}; the same command continues" in said.err
    assert "Traceback" not in said.err and "released" not in said.out
    assert (run / "curves.png").exists()
    assert run_command(lambda: main_of(kind)(words)) == 0
    assert "released" in capfd.readouterr().out
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_of_a_process_says_which_signal(place: Workplace, signum: int, status: int) -> None:
    words = place.train("clip", f"process-{status}", "--steps", 100000)
    child = subprocess.Popen([sys.executable, str(ROOT / "train_clip.py"), *words], stderr=subprocess.PIPE, text=True,
                             stdout=subprocess.DEVNULL)
    try:
        metrics, end = place.root / f"process-{status}" / "metrics.jsonl", time.monotonic() + 200
        while not metrics.exists() and time.monotonic() < end:
            time.sleep(0.1)
        child.send_signal(signum)
        _, said = child.communicate(timeout=100)
    finally:
        child.kill()
    assert child.returncode == status and "the same command continues" in said and "Traceback" not in said


def test_a_signal_before_the_loop_ends_at_once_and_a_second_one_inside_it(capfd: pytest.CaptureFixture[str]) -> None:
    def loading() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    def impatient() -> int:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the same wish, passed on by a launcher
            command._signals.asked_at -= 2
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return 0

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_command(loading) == 143 and "the same command begins again" in capfd.readouterr().err
    assert run_command(impatient) == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_releasing_is_not_cut_in_two(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the weights and the index would leave a model folder that calls itself damaged."""
    from core.nn import checkpoint as module

    folder, write = place.copy_model("uncut"), module.write_json

    def interrupted(path: Path, value: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(path, value)

    monkeypatch.setattr(module, "write_json", interrupted)
    state = vae.load_vae(folder).state_dict()
    assert run_command(lambda: bool(vae.save_component(folder, "vae", {k: v * 2 for k, v in state.items()},
                                                       module.load_component(folder, "vae")[0]))) == 130
    assert torch.allclose(vae.load_vae(folder).latent_std, state["latent_std"] * 2)


def test_the_training_of_the_judge_is_saved_and_continued(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--train-judge", "--data", str(place.store), "--epochs", "1.6", "--batch-size", "4", "--device", "cpu"]
    paths = {name: ["--judge", str(tmp_path / name), "--run", str(tmp_path / f"run-{name}")] for name in ("a", "b")}
    assert evaluate.main([*words, *paths["a"]]) == 0
    real, seen = RunFolder.save, []
    from core.evaluation import attribute_classifier as module

    augment = module.augment

    def hit(*given: Any) -> Any:
        seen.append(len(seen))
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return augment(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module, "augment", hit)
        assert run_command(lambda: evaluate.main([*words, *paths["b"]])) == 143
    assert not (tmp_path / "b" / "judge").exists() and real is RunFolder.save
    assert evaluate.main([*words, *paths["b"]]) == 0
    a, b = ((tmp_path / name / "judge" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    assert callable(train_attribute_classifier)


# ------------------------------------------------------------------------------ other settings, data, a second process


def test_other_data_is_refused_and_other_circumstances_are_named(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = place.train("clip", "same-data", "--steps", 6, "--decay-share", 0.3, "--save-every", 1)
    assert train_clip.main([*words, "--stop-at", "2"]) == 0
    settings = json.loads((place.root / "same-data" / "config.json").read_text())
    assert settings["data"] == FaceStore.open(place.store).fingerprint == "24 pictures, synthetic 24 0"
    assert {"steps", "warmup_steps", "decay_share", "commit", "device", "precision", "processes"} <= set(
        settings["circumstances"])
    synthetic_store(tmp_path / "other", count=24, seed=5)
    other = [*words]
    other[other.index("--data") + 1] = str(tmp_path / "other")
    capsys.readouterr()
    assert run_command(lambda: train_clip.main(other)) == 1
    said = capsys.readouterr().err
    assert "24 pictures, synthetic 24 0' there, '24 pictures, synthetic 24 5' asked" in said and said.count("\n") == 1
    capsys.readouterr()
    assert train_clip.main([*words, "--warmup-steps", "2", "--steps", "7"]) == 0
    assert "goes on with other circumstances (steps: 6, now 7, warmup_steps: 1, now 2)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_every_component_says_what_it_learned_from(place: Workplace, kind: str) -> None:
    assert main_of(kind)(commands(place, kind, f"says-{kind}", "--steps", 9, "--stop-at", 1)) == 0
    settings = json.loads((place.root / f"says-{kind}" / "config.json").read_text())
    assert settings["data"].startswith("24 pictures")
    if kind == "unet":
        assert settings["circumstances"]["loss_weight"] == "min-snr"
    else:
        assert len(settings["clip"]) == 64  # what it was taught by


def test_an_option_of_the_network_that_is_off_may_come_and_go(tmp_path: Path) -> None:
    """A run that another version began goes on, as long as what only that one knows is off."""
    network = {"channels": [8, 16], "finish_channels": 0}
    RunFolder(tmp_path, {"network": network}, {}, 4, 0.5).save(1)
    assert RunFolder(tmp_path, {"network": {"channels": [8, 16], "deterministic": False}}, {}, 4, 0.5).resume() == 1
    with pytest.raises(CheckpointMismatch, match="other settings"):
        RunFolder(tmp_path, {"network": {"channels": [8, 16], "deterministic": True}}, {}, 4, 0.5)


def test_a_setting_that_is_gone_is_another_run(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"a": 1, "self_guidance": 0.6}, {}, 4, 0.5).save(1)
    with pytest.raises(CheckpointMismatch, match="self_guidance: 0.6 there, None asked"):
        RunFolder(tmp_path, {"a": 1}, {}, 4, 0.5)


HOLD = """
import sys, time
from core.command import FolderLock
FolderLock(sys.argv[1], "x").__enter__()
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_in_one_folder_are_refused(
    place: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = place.train("clip", "locked", "--steps", 2)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(place.root / "locked")], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert run_command(lambda: train_clip.main(words)) == 1
        said = capsys.readouterr().err
        assert f"another process is training in {place.root / 'locked'}" in said and said.count("\n") == 1
        with pytest.raises(FolderInUse, match="preparing pictures"), FolderLock(place.root / "locked",
                                                                                 "preparing pictures"):
            pass
        assert dataset.main(["--synthetic", "8", "--out", str(place.root / "locked")]) == 1  # nor two preparations
    finally:
        holder.kill()  # however it ends, the system lets go
        holder.wait()
        holder.stdout.close()
    assert train_clip.main(words) == 0
    with FolderLock(tmp_path, "a"), FolderLock(tmp_path, "a"):
        pass
    assert not FolderLock._held


# ---------------------------------------------------------------------------------------------------- one sentence each


@pytest.mark.parametrize("script", ["train_clip.py", "vae.py", "conditional_ldm.py", "evaluate.py"])
def test_without_data_one_sentence_says_where_it_comes_from(script: str, tmp_path: Path) -> None:
    words = [] if script == "evaluate.py" else ["--train", "--preset", "tiny", "--run", str(tmp_path / "run")]
    answer = subprocess.run([sys.executable, str(ROOT / script), *words, "--data", str(tmp_path / "none")], text=True,
                            capture_output=True, timeout=200, cwd=tmp_path)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    for word in ("mmlab.ie.cuhk.edu.hk", "python dataset.py --prepare", "--synthetic 64"):
        assert word in answer.stderr


def test_preparing_nothing_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert dataset.main(["--prepare", "--source", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
    assert "mmlab.ie.cuhk.edu.hk" in (said := capsys.readouterr().err) and "--synthetic 64" in said


@pytest.mark.parametrize("flag", ["--batch-size", "--log-every", "--save-every", "--captions-per-image",
                                  "--decay-share", "--learning-rate"])
@pytest.mark.parametrize("kind", ["clip", "vae", "unet"])
def test_numbers_that_mean_nothing_are_refused(kind: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "vae" and flag == "--captions-per-image":
        pytest.skip("a VAE reads no captions")
    for value in ("-1", "1.5" if flag == "--decay-share" else "nan" if flag == "--learning-rate" else "0"):
        with pytest.raises(SystemExit) as leaving:
            MAIN[kind](["--train", flag, value])
        assert leaving.value.code == 2 and f"error: {flag} is " in capsys.readouterr().err


@pytest.mark.parametrize("main", [train_clip.main, vae.main, conditional_ldm.main, evaluate.main, dataset.main])
def test_a_flag_is_not_guessed_from_its_beginning(main: Callable[[list[str]], int]) -> None:
    mode = {evaluate.main: "--quick", dataset.main: "--prepare"}.get(main, "--train")
    for word in ("--see", "--dat"):
        with pytest.raises(SystemExit) as leaving:
            main([mode, word, "1"])
        assert leaving.value.code == 2


def test_errors_of_ours_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Callable[[], int]:
        def run() -> int:
            raise error

        return run

    for error in (UserError("this"), OSError(errno.ENOSPC, "this"), FloatingPointError("this")):
        assert run_command(fail(error)) == 1
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(ValueError, match="ours"):
        run_command(fail(ValueError("ours")))
    assert run_command(fail(Interrupted(signal.SIGTERM, "that"))) == 143
    assert run_command(fail(torch.OutOfMemoryError("CUDA out of memory."))) == 1
    assert "lower --batch-size" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- several processes


def test_a_launcher_that_starts_one_process_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="has started one process.*`torchrun --nproc_per_node N` .* --run-folder"):
        make_accelerator("cpu", "no")


def test_accelerate_launch_on_a_cpu_says_that_it_runs_one(place: Workplace) -> None:
    words = place.train("clip", "accelerate", "--steps", 2)
    answer = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu",
                             str(ROOT / "train_clip.py"), *words], capture_output=True, text=True, timeout=250)
    assert answer.returncode != 0 and "error: `accelerate launch --cpu` has started one process" in answer.stderr
    assert not list((place.root / "accelerate").glob("checkpoints/*"))


def test_torchrun_runs_two_and_logs_the_loss_of_both(place: Workplace) -> None:
    """The command of the README, without --device: two processes, one run, the loss that one process has."""
    alone, pair = ([word.replace("--run", "--run-folder") if word == "--run" else word for word in
                    place.train("unet", f"torchrun-{name}", "--steps", 20, "--stop-at", 2)] for name in ("one", "two"))
    at = pair.index("--device")
    del pair[at : at + 2]
    assert conditional_ldm.main(alone) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answer = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                             str(port), str(ROOT / "conditional_ldm.py"), *pair], text=True, capture_output=True,
                            timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("UNet: 20 of 20 steps, 2 processes on cpu, fp32") == 1
    one, two = (read_metrics(place.root / f"torchrun-{name}" / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2]
    assert two[0].keys() == one[0].keys() and set(two[0]) > {"loss"}
    for name in one[0].keys() - {"wall_s"}:
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3), name


def test_every_process_stops_when_one_is_asked_to() -> None:
    said = iter([0, 0, signal.SIGTERM])
    steps = run_steps(0, 10, enabled=False, agree=lambda mine: next(said))
    assert [(step, progress.last) for step, progress in steps] == [(0, False), (1, False), (2, True)]
    asked = []
    list(run_steps(0, 10, enabled=False, agree=lambda mine: asked.append(mine) or 0, agree_every=4))
    assert len(asked) == 3


# -------------------------------------------------------------------------------------------------------- damaged files


def state(value: float) -> torch.nn.Module:
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def a_run(folder: Path) -> Path:
    """Two checkpoints of a layer whose weights are the number of the step, and a log."""
    run = RunFolder(folder, {"width": 2}, {"model": state(0), "other": state(0)}, 9, 0.2)
    for step in (1, 2):
        run.parts = {"model": state(step), "other": state(step)}
        run.log(step, {"loss": 1.0})
        run.save(step)
    return folder


def reopened(folder: Path) -> tuple[int, float]:
    run = RunFolder(folder, {"width": 2}, {"model": state(0), "other": state(0)}, 9, 0.2)
    return run.resume(), float(run.parts["model"].weight.detach().mean())


@pytest.mark.parametrize("how", ["empty", "cut", "missing", "flipped"])
def test_any_damaged_file_of_a_run_leads_to_the_newest_whole_state(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = a_run(tmp_path / "whole")
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()
             and "tensorboard" not in path.parts]
    assert len(names) == 8
    for name in names:
        folder = Path(shutil.copytree(whole, tmp_path / f"{how}-{name.parent.name}-{name.name}"))
        path, data = folder / name, (folder / name).read_bytes()
        if how == "missing":
            path.unlink()
        else:
            flipped = data[:-3] + bytes([data[-3] ^ 64]) + data[-2:]
            path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "flipped": flipped}[how])
        capsys.readouterr()
        newest = 1 if "step-00000002" in name.parts else 2
        assert reopened(folder) == (newest, newest), name
        said = capsys.readouterr().out
        if newest == 1:
            assert f"step-00000002: {name.name} is" in said and "training goes on from step 1" in said
            assert said.count("\n") == 1
        run = RunFolder(folder, {"width": 2}, {"model": state(7), "other": state(7)}, 9, 0.2)
        run.resume()
        run.save(3)
        run.log(3, {"loss": 1.0})
        run.finish()
        assert reopened(folder) == (3, newest)
        assert (newest == 1) == (not (folder / "checkpoints" / "step-00000002").exists())  # the damaged one is gone


def test_a_run_whose_settings_are_damaged_still_refuses_others(tmp_path: Path) -> None:
    (a_run(tmp_path) / "config.json").write_text("")
    with pytest.raises(CheckpointMismatch, match="width: 2 there, 3 asked"):
        RunFolder(tmp_path, {"width": 3}, {}, 9, 0.2)


def test_where_no_checkpoint_is_whole_the_run_begins_again_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in a_run(tmp_path).glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    (tmp_path / "checkpoints" / "writing-00000007").mkdir()
    assert reopened(tmp_path) == (0, 0)
    assert "goes on from the first step: no checkpoint is whole" in capsys.readouterr().out
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert not (tmp_path / "checkpoints" / "writing-00000007").exists()


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda handle: (events.append(("sync", os.readlink(f"/proc/self/fd/{handle}"))),
                                                    fsync(handle)))
    monkeypatch.setattr("os.replace", lambda a, b: (events.append(("rename", str(a))), replace(a, b)))
    RunFolder(tmp_path, {}, {"model": state(1)}, 9, 0.2).save(1)
    aside = str(tmp_path / "checkpoints" / "writing-00000001")
    at = events.index(("rename", aside))
    synced = {Path(path).name for what, path in events[:at] if what == "sync" and path.startswith(aside)}
    assert synced == {"model.safetensors", "state.json", "writing-00000001"}
    assert ("sync", str(tmp_path / "checkpoints")) in events[at:]


@pytest.mark.parametrize("kind", ["clip", "vae", "unet", "distill"])
def test_every_component_goes_on_after_any_one_file_is_emptied(
    place: Workplace, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, captions, latents, tokenizer, the teacher's copy: the run ends as the undisturbed one."""
    words = commands(place, kind, f"damaged-{kind}", "--steps", 3, "--save-every", 1)
    cache = place.root / f"cache-{kind}"
    if "--cache" in words:
        words[words.index("--cache") + 1] = str(cache)
    run, model = place.root / f"damaged-{kind}", Path(words[words.index("--model") + 1])
    shutil.copytree(model, place.root / f"before-{kind}")
    assert main_of(kind)([*words, "--stop-at", "2"]) == 0
    kept = place.root / f"kept-{kind}"
    kept.mkdir()
    for folder in (run, cache):
        if folder.exists():
            shutil.copytree(folder, kept / folder.name)
    assert main_of(kind)(words) == 0
    wanted = checkpoint(run, 3)
    files = [path.relative_to(kept) for path in sorted(kept.rglob("*")) if path.is_file() and path.name != ".lock"
             and not {"tensorboard", "pictures"} & set(path.parts) and path.suffix != ".png"]
    newest = [path for path in files if "step-00000001" not in path.parts]
    for name in newest:
        if "checkpoints" in name.parts and name.stem not in ("model", "state") and kind != "clip":
            continue  # like the other parts of a checkpoint; each takes a run
        for folder in (run, cache, model):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in kept.iterdir():
            shutil.copytree(folder, place.root / folder.name)
        shutil.copytree(place.root / f"before-{kind}", model)
        (place.root / name).write_bytes(b"")
        assert main_of(kind)(words) == 0, name
        assert differences(checkpoint(run, 3), wanted) == [], name
    assert len(newest) > 3


def test_a_damaged_copy_of_the_teacher_is_made_again_or_named(tmp_path: Path, place: Workplace) -> None:
    folder, run = place.copy_model("teaching"), tmp_path / "run"
    first = keep_teacher(run, folder, "unet", True)
    (run / "config.json").write_text(json.dumps({"teacher": first[2]}))
    (run / "teacher" / "unet" / "model.safetensors").write_bytes(b"")
    assert keep_teacher(run, folder, "unet", True)[2] == first[2]
    assert (run / "teacher" / "unet" / "model.safetensors").stat().st_size > 1000
    (run / "teacher" / "model_index.json").write_text("")
    (run / "config.json").write_text(json.dumps({"teacher": "another"}))
    with pytest.raises(CheckpointMismatch, match="put that one back into the model folder"):
        keep_teacher(run, folder, "unet", True)


# ----------------------------------------------------------------------------------------------------- disks and curves


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    array = new_array(tmp_path / "a.npy", np.float16, (2, 3))
    array[:] = 5
    array.flush()
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.full((2, 3), 5, np.float16))
    if sys.platform == "linux":
        assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 12
    monkeypatch.setattr("core.training.arrays._reserve", full)
    assert dataset.main(["--synthetic", "64", "--out", str(tmp_path / "out")]) == 1
    assert "disk is full: 3.1 MB are needed for" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.npy"))


def test_the_message_of_a_small_disk_has_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    plan = SimpleNamespace(entries=range(64), fingerprint="x")
    with pytest.raises(data_preparation.DataError, match=r"needs 3.2 MB, its disk has 1.0 MB free"):
        data_preparation.Progress(tmp_path, plan)  # type: ignore[arg-type]
    assert [amount(n) for n in (0, 12, 49152, 3e6, 9.96e9)] == ["0 bytes", "12 bytes", "49.2 kB", "3.0 MB", "10.0 GB"]


def test_wall_time_goes_on_when_a_run_is_resumed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, {}, {"model": state(1)}, 9, 0.2)
    run.started -= 1000
    run.log(1, {"loss": 1.0})
    run.save(1)
    again = RunFolder(tmp_path, {}, {"model": state(1)}, 9, 0.2)
    again.resume()
    again.log(2, {"loss": 1.0})
    assert [row["wall_s"] >= 1000 for row in read_metrics(tmp_path / "metrics.jsonl")] == [True, True]
    facts = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    said = json.loads(facts.read_text())
    del said["wall_s"]
    facts.write_text(json.dumps(said))
    old = RunFolder(tmp_path, {}, {"model": state(1)}, 9, 0.2)  # an earlier version wrote it
    old.resume()
    assert old.wall_s >= 1000


def test_curves_have_dots_labels_and_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[Any, ...]] = []
    for name in ("plot", "set_xlabel", "set_ylabel"):
        real = getattr(Axes, name)
        monkeypatch.setattr(Axes, name, lambda self, *given, _real=real, _name=name, **named: (
            drawn.append((_name, given, named)), _real(self, *given, **named))[1])
    rows = [{"step": 5, "loss": 2.0, "val_loss": 3.0, "lr": 0.1}, {"step": 6, "loss": float("nan")}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 7, "lo')
    plot_metrics(tmp_path / "m.jsonl", tmp_path / "m.png")
    assert charts(rows) == {"loss": ["loss", "val_loss"], "lr": ["lr"]}
    plots = [entry for entry in drawn if entry[0] == "plot"]
    assert len(plots) == 3 and all(named["marker"] == "o" for _, _, named in plots)
    assert [named["label"] for _, _, named in plots[:2]] == ["training", "validation"]
    assert [given[0] for name, given, _ in drawn if name == "set_xlabel"] == ["step", "step"]
    assert all(given[0] for name, given, _ in drawn if name == "set_ylabel")


@pytest.mark.parametrize(("kind", "key"), [("clip", "val_excess"), ("vae", "val_psnr_16"),
                                           ("unet", "val_loss"), ("distill", "val_loss")])
def test_every_component_has_a_validation_curve(place: Workplace, kind: str, key: str) -> None:
    words = commands(place, kind, f"curve-{kind}", "--steps", 4,
                     *(["--validate-every", 2] if kind == "clip" else []))
    if "--image-every" in words:
        words[words.index("--image-every") + 1] = "2"
    assert main_of(kind)([*words, "--stop-at", "2"]) == 0
    found = [row for row in read_metrics(place.root / f"curve-{kind}" / "metrics.jsonl") if key in row]
    assert [row["step"] for row in found] == [2] and np.isfinite(found[0][key])


def test_the_report_ends_with_its_table(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = {"judge": {"hash": "abc"}, "checks": {"rises": True, "falls": False}, "seconds": {"ladder": 2.4},
              "targets": [{"figure": "vae.psnr_db", "value": 20.0, "min": 26, "met": False},
                          {"figure": "vae.ssim", "value": 0.9, "min": 0.8, "met": True}],
              "vae": {"psnr_db": 20.0}, "settings": {"guidance": 2}}
    monkeypatch.setattr(evaluate, "measure", lambda settings: report)
    assert evaluate.main(["--data", str(place.store), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| VAE PSNR (dB) | 20 |" in lines and not any(line.startswith(("{", "}")) for line in lines)
    assert lines[-4:] == ["checks: 1 of 2 met; not met: falls",
                          "targets: 1 of 2 met; not met: vae.psnr_db is 20, min 26", "measured in 2 s",
                          f"everything: {tmp_path / 'report.json'}"]
