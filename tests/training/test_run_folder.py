"""Is a long run exact, resumable and honest? Averages, curves, orders, checkpoints, real commands stopped midway."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import conditional_ldm
import train_clip
import vae
from core.training.accelerator import make_accelerator, process_slice
from core.training.curves import plot_metrics
from core.training.ema import PowerEMA, power_exponent
from core.training.optim import StepGuard, decay_start, learning_rate
from core.training.randomness import EpochSampler, mix_seed, step_generator
from core.training.run_folder import CheckpointMismatch, RunFolder, run_steps, save_grid
from dataset import FaceStore
from tests.support.training import Workplace, checkpoint, differences, make_workplace

pytestmark = pytest.mark.usefixtures("quick_grids")
MAIN: dict[str, Callable[[list[str]], int]] = {"clip": train_clip.main, "vae": vae.main, "unet": conditional_ldm.main}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("work"))


def rows(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall_s"} for line in lines]


def test_bf16_is_chosen_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, chosen in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr("core.training.accelerator.has_bf16", lambda device, native=native: native)
        assert make_accelerator("cpu", "auto").mixed_precision == chosen
    assert make_accelerator("cpu", "no").mixed_precision == "no"


# ------------------------------------------------------------------------------------------------- 2N = N + resume + N


@pytest.mark.parametrize("component", ["clip", "vae", "unet"])
def test_a_stopped_and_resumed_run_is_the_undisturbed_run(
    place: Workplace, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, averages and the discriminator, bit for bit; with dropout, which the tiny preset has not."""
    with_dropout = dataclasses.replace(conditional_ldm.PRESETS["tiny"], dropout=0.2)
    monkeypatch.setitem(conditional_ldm.PRESETS, "tiny", with_dropout)
    main, more = MAIN[component], ["--steps", 6, *(["--optimizer", "muon"] if component == "unet" else [])]
    assert main(place.train(component, f"{component}-whole", *more)) == 0
    torch.randn(100)  # whatever else drew random numbers in between
    stopped = place.train(component, f"{component}-parts", *more)
    assert main([*stopped, "--stop-at", "3"]) == 0
    whole, parts = place.root / f"{component}-whole", place.root / f"{component}-parts"
    torch.randn(7)
    assert main(stopped) == 0
    a, b = checkpoint(whole, 6), checkpoint(parts, 6)
    assert differences(a, b) == []
    assert differences(checkpoint(parts, 3), {name: b[name] for name in checkpoint(parts, 3)}) != []  # it did train
    assert [row for row in rows(parts) if "loss" in row] == [row for row in rows(whole) if "loss" in row]
    released = [(place.root / f"{component}-{name}-model" / component / "model.safetensors").read_bytes()
                for name in ("whole", "parts")]
    assert released[0] == released[1]
    kinds = {name.split("/")[0] for name in a}
    assert {"model", "optimizer"} < kinds and kinds & {"ema", "ema_long"}
    if component == "unet":
        assert "muon" in kinds
    if component == "vae":  # the adversary was at work on both sides of the stop, and remembers
        assert {"critic", "critic_optimizer"} < kinds
        assert {2, 3, 4, 5, 6} >= {int(row["step"]) for row in rows(parts) if "adversarial" in row} > {3, 4}


def test_only_pictures_of_one_resolution_are_learned_from(place: Workplace) -> None:
    cache, command = place.root / "of-80", place.train("unet", "of-80-run", "--steps", 1, "--px", 80)
    command[command.index("--cache") + 1] = str(cache)
    assert conditional_ldm.main(command) == 0
    store = FaceStore.open(place.store)
    wanted = store.select("train", px=80)
    assert 0 < len(wanted) < len(store.select("train"))
    assert np.load(cache / "mean.npy").shape[:2] == (2, len(wanted))
    settings = json.loads((place.root / "of-80-run" / "config.json").read_text())
    assert (settings["px"], settings["optimizer"]) == (80, "adamw")


def test_another_seed_is_another_run(place: Workplace) -> None:
    for seed in (0, 1):
        train_clip.main(place.train("clip", f"seed-{seed}", "--steps", 4, "--stop-at", 1, "--seed", seed))
    assert "model/text.positions" in differences(*(checkpoint(place.root / f"seed-{seed}", 1) for seed in (0, 1)))


def test_a_longer_run_continues_where_the_rate_was_still_flat(place: Workplace) -> None:
    """6 steps, then 12 asked: from step 3, as the first run decayed from there; equal to 12 undisturbed ones."""
    more = ["--decay-share", 0.5, "--save-every", 1]
    train_clip.main([*place.train("clip", "grown", *more), "--steps", "6"])
    train_clip.main([*place.train("clip", "grown", *more), "--steps", "12"])
    train_clip.main([*place.train("clip", "straight", *more), "--steps", "12"])
    grown, straight = place.root / "grown", place.root / "straight"
    assert differences(checkpoint(grown, 12), checkpoint(straight, 12)) == []
    assert rows(grown) == rows(straight)  # the lines of the abandoned tail are gone
    assert [step for step, _ in runs_checkpoints(grown)] == [6, 11, 12]  # two newest and the last flat one
    with pytest.raises(CheckpointMismatch, match="12 steps without a checkpoint that one of 4 could continue"):
        train_clip.main([*place.train("clip", "grown", *more), "--steps", "4"])
    with pytest.raises(CheckpointMismatch, match=r"learning_rate: 0.001 there, 0.5 asked.* another --run"):
        train_clip.main([*place.train("clip", "grown", *more), "--steps", "12", "--learning-rate", "0.5"])
    assert [step for step, _ in runs_checkpoints(grown)] == [6, 11, 12]


def runs_checkpoints(run: Path) -> list[tuple[int, Path]]:
    return RunFolder(run, {}, {}, total_steps=1, decay_share=0.5, main=False).checkpoints()


def test_a_run_that_explodes_says_what_to_do(place: Workplace) -> None:
    with pytest.raises(FloatingPointError, match="26 steps .* no finite gradient; lower --learning-rate"):
        train_clip.main(place.train("clip", "exploding", "--steps", 60, "--learning-rate", 1e38))
    found = rows(place.root / "exploding")
    assert found[-1]["skipped"] >= 24 and math.isnan(found[-1]["loss"])


CHILD = """
import conditional_ldm, json, sys, train_clip, vae
clip, unet, autoencoder = json.loads(sys.argv[1])
train_clip.main(clip)
conditional_ldm.main(unet)
vae.main(autoencoder)
"""


def test_two_processes_learn_what_one_learns(place: Workplace) -> None:
    """The same command under any launcher that sets torch's variables; both halves of the batch, one result."""
    more = ["--steps", 20, "--stop-at", 3, "--stop-after", 1000, "--learning-rate", 1e-3]
    muon = {"clip": [], "unet": ["--optimizer", "muon"]}
    commands = {name: [*(place.train(kind, f"{kind}-{name}", *more, *muon[kind]) for kind in ("clip", "unet")),
                       place.train("vae", f"vae-{name}", *more, "--gan-start", 1, "--perceptual-weight", 0)]
                for name in ("alone", "pair")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    root = Path(conditional_ldm.__file__).parent
    train_clip.main(commands["alone"][0])  # first: it also caches the latents that both runs read
    conditional_ldm.main(commands["alone"][1])
    vae.main(commands["alone"][2])
    children = [subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(commands["pair"])], cwd=root, text=True,
                                 env={**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]
    try:
        for child in children:
            said, _ = child.communicate(timeout=240)
            assert child.returncode == 0, said
    finally:
        for child in children:
            child.kill()
            child.wait()
    for kind, part, scale in (("unet", "model/", 1e-5), ("clip", "exp_avg", 1e-6), ("vae", "exp_avg", 1e-5)):
        # CLIP by its gradients: where they are nothing but rounding, Adam turns their sign into whole steps
        alone, pair = checkpoint(place.root / f"{kind}-alone", 3), checkpoint(place.root / f"{kind}-pair", 3)
        worst = {name: float((alone[name] - pair[name]).abs().max()) for name in alone if part in name}
        assert max(worst.values()) < scale, sorted(worst.items(), key=lambda item: -item[1])[:5]
        assert max(float(alone[name].abs().max()) for name in worst if "exp_avg" in name or "model" in name) > 1e-3
        assert len(rows(place.root / f"{kind}-pair")) == 3  # one process writes
    names = [name for name, _ in train_clip.CLIP(train_clip.PRESETS["tiny"]).named_parameters()]
    temperature = f"optimizer/{names.index('log_temperature')}/exp_avg"
    assert float(checkpoint(place.root / "clip-pair", 3)[temperature].abs()) > 1e-5  # was compared above


def test_the_pieces_of_a_batch_add_up(place: Workplace) -> None:
    for pieces in (1, 4):
        conditional_ldm.main(place.train("unet", f"pieces-{pieces}", "--steps", 20, "--stop-at", 3,
                                         "--learning-rate", 1e-3, "--accumulate", pieces))
    one, four = (checkpoint(place.root / f"pieces-{pieces}", 3) for pieces in (1, 4))
    assert max(float((one[name] - four[name]).abs().max()) for name in one) < 1e-5
    losses = [[row["loss"] for row in rows(place.root / f"pieces-{pieces}")] for pieces in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -------------------------------------------------------------------------------------------------------------- curves


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate(step, peak=2.0, total_steps=1000, warmup_steps=10, decay_share=0.2) for step in range(1000)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10:801] == [2.0] * 791 and decay_start(1000, 0.2) == 800
    assert rates[850] == pytest.approx(2 * (1 - 0.5)) and 0 < rates[999] < 0.01  # 1 - sqrt(1/4); no step at rate 0
    falling = rates[800:]
    assert falling == sorted(falling, reverse=True)
    longer = [learning_rate(step, peak=2.0, total_steps=5000, warmup_steps=10, decay_share=0.2) for step in range(800)]
    assert longer == rates[:800]  # the flat part does not know the end
    assert learning_rate(99, peak=1.0, total_steps=100, warmup_steps=0, decay_share=0.0) == 1.0


def test_power_ema_is_its_formula() -> None:
    """The recursion equals the explicit weighted sum, whose spread over the run is the one that was asked for."""
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.01)  # the pairs printed in the paper
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.01)
    for wrong in (0.0, 0.3):
        with pytest.raises(ValueError, match="relative_std must be in"):
            power_exponent(wrong)
    for relative_std in (0.05, 0.10):
        gamma, total = power_exponent(relative_std), 2000
        weight, weights = 1.0, [0.0] * total
        for t in range(total, 0, -1):
            beta = (1 - 1 / t) ** (gamma + 1)
            weights[t - 1], weight = weight * (1 - beta), weight * beta
        assert sum(weights) == pytest.approx(1)
        places = torch.arange(1, total + 1, dtype=torch.float64) / total
        profile = torch.tensor(weights, dtype=torch.float64)
        mean = (profile * places).sum()
        assert float((profile * (places - mean).square()).sum().sqrt()) == pytest.approx(relative_std, rel=0.01)
    layer = nn.BatchNorm1d(2)
    ema, history = PowerEMA(layer, 0.10), []
    for step in range(1, 31):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([math.sin(step), step]))
            layer.running_mean.fill_(step)  # type: ignore[union-attr]
            layer.num_batches_tracked.fill_(step)  # type: ignore[union-attr]
        history.append(layer.weight.detach().clone())
        ema.update(layer, step)
    weight, expected = 1.0, torch.zeros(2)
    for t in range(30, 0, -1):
        beta = (1 - 1 / t) ** (ema.gamma + 1)
        expected, weight = expected + weight * (1 - beta) * history[t - 1], weight * beta
    assert torch.allclose(ema.state["weight"], expected, atol=1e-5)
    assert torch.allclose(ema.state["running_mean"], ema.state["weight"][1].expand(2))  # buffers are averaged too
    assert int(ema.state["num_batches_tracked"]) == 30  # counters are copied


# ---------------------------------------------------------------------------------------------------------- randomness


def test_seeds_do_not_collide() -> None:
    seeds = {mix_seed(*parts) for parts in [(a, b) for a in range(60) for b in range(60)] + [(a,) for a in range(60)]
             + [(a, b, c) for a in range(9) for b in range(9) for c in range(9)]}
    assert len(seeds) == 3600 + 60 + 729 and all(0 <= seed < 2**63 for seed in seeds)
    a, b = (torch.randn(4, generator=step_generator(3, 17, stream)) for stream in (0, 1))
    assert not torch.equal(a, b) and torch.equal(a, torch.randn(4, generator=step_generator(3, 17)))


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (3, 8), (12, 4)])
def test_every_epoch_shows_every_image_once(count: int, batch: int) -> None:
    sampler = EpochSampler(count, batch, seed=1)
    order = torch.cat([sampler.batch(step) for step in range(6 * count)])
    epochs = order[: len(order) // count * count].view(-1, count)
    assert torch.equal(epochs.sort(1).values, torch.arange(count).expand(len(epochs), count))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1  # and in another order
    again = EpochSampler(count, batch, seed=1)
    assert torch.equal(again.batch(5), order[5 * batch : 6 * batch])  # without having seen the steps before
    assert torch.equal(again.batch(1), order[batch : 2 * batch])
    assert not torch.equal(torch.cat([EpochSampler(count, batch, 2).batch(i) for i in range(9)]), order[: 9 * batch])


def test_an_empty_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="selection of training images is empty"):
        EpochSampler(0, 4, 0)


# ------------------------------------------------------------------------------------------------------------ stepping


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_are_not_finite_are_skipped_and_counted(fused: bool) -> None:
    """Fused optimisers refuse by themselves, without a look by the host; others are not called."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, guard = torch.optim.SGD([weight], lr=1.0, fused=fused), StepGuard(limit=2)
    for bad in (math.nan, math.inf):
        (weight * bad).sum().backward()
        assert not math.isfinite(guard.step(optimizer, [weight]))
        assert weight.tolist() == [1.0, 2.0] and weight.grad is None
    assert guard.skipped == guard.in_a_row == 2
    (weight * torch.tensor([3.0, 4.0])).sum().backward()
    assert float(guard.step(optimizer, [weight], max_norm=0.5)) == pytest.approx(5)  # the norm before clipping
    assert weight.tolist() == pytest.approx([1 - 0.3, 2 - 0.4]) and guard.in_a_row == 0
    with pytest.raises(FloatingPointError, match="3 steps .* no finite gradient"):
        for _ in range(3):
            (weight * math.nan).sum().backward()
            guard.step(optimizer, [weight])
    assert guard.skipped == 5


def test_a_refused_step_leaves_no_trace_in_adam() -> None:
    """Moments, step count and weight decay too are as if the step had never been asked for."""
    def learn(gradients: list[float]) -> tuple[list[float], dict[str, list[float]]]:
        weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer, guard = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5, fused=True), StepGuard()
        for gradient in gradients:
            (weight * gradient).sum().backward()
            guard.step(optimizer, [weight])
        return weight.tolist(), {key: value.tolist() for key, value in optimizer.state[weight].items()}

    assert learn([math.nan, 0.3, math.inf, -0.2, math.nan]) == learn([0.3, -0.2])


def test_a_resumed_run_remembers_its_skipped_steps(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of four are refused before the stop and one after it; the logs count on."""
    clip, calls = nn.utils.clip_grad_norm_, iter([math.nan, 1.0, math.inf, 1.0, math.nan, 1.0])
    monkeypatch.setattr("core.training.optim.nn.utils.clip_grad_norm_", lambda *given: clip(*given) * next(calls))
    stopped = place.train("unet", "skipping", "--steps", 6)
    assert conditional_ldm.main([*stopped, "--stop-at", "4"]) == 0
    assert conditional_ldm.main(stopped) == 0
    counts = [row["skipped"] for row in rows(place.root / "skipping") if "skipped" in row]  # others: of validation
    assert counts == [1, 1, 2, 2, 3, 3]


def test_a_batch_is_shared_evenly_or_refused() -> None:
    workers = [SimpleNamespace(num_processes=3, process_index=i) for i in range(3)]
    assert [process_slice(worker, 12) for worker in workers] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match="--batch-size 10 must be a multiple of the 3 processes"):
        process_slice(workers[0], 10)


# ---------------------------------------------------------------------------------------------------------- run folder


def toy(folder: Path, total: int, *, width: int = 3) -> tuple[RunFolder, nn.Module, torch.optim.Optimizer, PowerEMA]:
    torch.manual_seed(0)
    model = nn.Conv2d(width, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), PowerEMA(model, 0.1)
    run = RunFolder(folder, {"width": width}, {"model": model, "optimizer": optimizer, "ema": ema}, total_steps=total,
                    decay_share=0.5)
    return run, model, optimizer, ema


def advance(folder: Path, total: int, stop: int | None = None, save_every: int = 1) -> dict[str, torch.Tensor]:
    """A visible loop like those of the components, on a network of one layer; what it had learned at the end."""
    run, model, optimizer, ema = toy(folder, total)
    for step, _ in run_steps(run.resume(), total, stop_at=stop, enabled=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, peak=0.1, total_steps=total, warmup_steps=0,
                                                        decay_share=0.5)
        model(torch.randn(1, 3, 5, 5, generator=step_generator(0, step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step + 1)
        run.log(step + 1, {"loss": float(step)})
        if (step + 1) % save_every == 0 or step + 1 in (total, stop):
            run.save(step + 1)
    return {**{f"model/{k}": v.clone() for k, v in model.state_dict().items()},
            **{f"ema/{k}": v.clone() for k, v in ema.state.items()}}


def kept(folder: Path) -> list[int]:
    return [step for step, _ in runs_checkpoints(folder)]


def test_moments_survive_in_the_layout_of_their_weights(tmp_path: Path) -> None:
    """Channels-last weights with moments restored row by row would be stepped by their neighbours' moments."""
    whole = advance(tmp_path / "whole", 8)
    advance(tmp_path / "parts", 8, stop=3)
    assert differences(whole, advance(tmp_path / "parts", 8)) == []


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    advance(tmp_path / "run", 20, save_every=3)
    assert kept(tmp_path / "run") == [9, 18, 20]  # the last flat one (decay starts at 10) and the two newest
    assert not list((tmp_path / "run" / "checkpoints").glob("writing-*"))


def test_the_abandoned_tail_does_not_push_out_the_new_run(tmp_path: Path) -> None:
    """A longer run goes back before the newest checkpoints; its own, though lower in number, are the ones to keep."""
    folder = tmp_path / "run"
    advance(folder, 20, save_every=5)
    assert kept(folder) == [10, 15, 20]
    advance(folder, 60, stop=12, save_every=5)
    assert kept(folder) == [10, 12]
    whole = advance(tmp_path / "whole", 60)
    assert differences(advance(folder, 60), whole) == []
    with pytest.raises(CheckpointMismatch, match="ask for more --steps or .* another --run"):
        advance(folder, 30)
    assert kept(folder)[-1] == 60  # refused, and nothing was lost


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    advance(folder, 8, stop=3, save_every=3)
    with monkeypatch.context() as patch:
        def full(*_: object) -> None:
            raise OSError("No space left on device")

        patch.setattr("core.training.accelerator.os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            advance(folder, 8)
    assert kept(folder) == [3]
    assert differences(advance(folder, 8), advance(tmp_path / "whole", 8)) == []
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))  # the line of the lost step was dropped and written anew


def test_other_settings_are_refused_only_where_something_would_be_lost(tmp_path: Path) -> None:
    toy(tmp_path / "run", 4, width=3)
    toy(tmp_path / "run", 4, width=2)  # nothing was trained yet
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"width": 2}
    toy(tmp_path / "run", 4, width=2)[0].save(1)
    with pytest.raises(CheckpointMismatch, match="width: 2 there, 3 asked"):
        toy(tmp_path / "run", 4, width=3)


def test_logs_become_curves(tmp_path: Path) -> None:
    run = toy(tmp_path / "run", 4)[0]
    for step in range(1, 4):
        run.log(step, {"loss": 1 / step, "rare": 1.0} if step == 2 else {"loss": 1 / step})
    run.finish()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[2]["loss"] == pytest.approx(1 / 3, rel=1e-5)
    assert lines[1].keys() - lines[0].keys() == {"rare"} and all(line["wall_s"] >= 0 for line in lines)
    with Image.open(tmp_path / "run" / "curves.png") as curves:
        assert curves.size[0] > 300
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    (tmp_path / "empty.jsonl").write_text("")
    plot_metrics(tmp_path / "empty.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    other = RunFolder(tmp_path / "run", {"width": 3}, {}, 4, 0.5, main=False)  # a second process: reads, never writes
    other.log(9, {"loss": 1.0})
    other.save(9)
    other.finish()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3 and kept(tmp_path / "run") == []


def test_grids_clamp_and_fill_with_white(tmp_path: Path) -> None:
    images = torch.full((3, 3, 2, 4), -1.0)
    images[1], images[2] = 9.0, 0.0
    save_grid(images, tmp_path / "new" / "grid.png", columns=2)
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.size == (8, 4) and grid.mode == "RGB"
        grid.load()
    corners = [grid.getpixel(at) for at in ((0, 0), (4, 0), (0, 2), (4, 2))]
    assert corners == [(0,) * 3, (255,) * 3, (128,) * 3, (255,) * 3]


def test_the_progress_bar_starts_and_stops_where_told() -> None:
    assert [step for step, _ in run_steps(3, 10, stop_at=6, enabled=False)] == [3, 4, 5]
    assert [step for step, _ in run_steps(8, 10, stop_at=99, enabled=False)] == [8, 9]
    assert list(run_steps(10, 10, enabled=False)) == []
    assert [progress.last for _, progress in run_steps(3, 10, stop_at=6, enabled=False)] == [False, False, True]
    said = iter([False, False, True, True])  # of a clock that another process looks at
    steps = run_steps(0, 10, stop_after=1e9, enabled=False, agree=lambda mine: next(said))
    assert [(step, progress.last) for step, progress in steps] == [(0, False), (1, False), (2, True)]


def stops(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("component", ["vae", "clip", "unet"])
def test_a_run_that_the_clock_stopped_is_resumed(
    place: Workplace, component: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = place.train(component, f"{component}-clock", "--steps", 3)
    assert MAIN[component]([*command, "--stop-after", "0"]) == 0
    assert stops(place.root / f"{component}-clock") == ["step-00000001"]
    assert "released" not in capsys.readouterr().out
    assert MAIN[component]([*command, "--stop-after", "1000"]) == 0
    assert stops(place.root / f"{component}-clock")[-1] == "step-00000003"
    assert "released" in capsys.readouterr().out
