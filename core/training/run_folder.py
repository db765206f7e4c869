"""How does a long training run stay exact, resumable and visible?

Holds what every component's training loop shares: power-function EMA, the warm-up / stable / decay learning-rate curve,
randomness derived from (seed, step), one guarded optimiser step, and the run folder (checkpoints, ``metrics.jsonl``,
TensorBoard, plots). It does not know which network is trained or on what data.

Long because a run folder and the loop that writes it have to agree about every step.

Sources: EMA profile: Karras et al. 2024, https://arxiv.org/abs/2312.02696 (eq. 1 and 124);
warm-up / stable / decay: Hu et al. 2024, https://arxiv.org/abs/2404.06395.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.command import Interrupted, UserError, defer_signals, stop_signal
from core.nn.checkpoint import (
    git_commit,
    write_atomically,
    write_json,
)
from core.nn.layers import to_pixels
from core.training.accelerator import agreed
from core.training.curves import plot_metrics, read_metrics
from core.training.ema import PowerEMA
from core.training.optim import decay_start
from core.training.snapshots import DamagedCheckpoint, read_facts, read_snapshot, write_snapshot
from core.training.trackers import TENSORBOARD, Trackers


class CheckpointMismatch(UserError, ValueError):
    """A run folder belongs to another configuration than the one asked for."""


def circumstances(args: Any, accelerator: Any, **more: Any) -> dict[str, Any]:
    """What a run was made with that may change when it is resumed; a change is said, not refused."""
    return {"steps": args.steps, "warmup_steps": args.warmup_steps, "decay_share": args.decay_share,
            "commit": git_commit(Path(__file__).parent), "device": accelerator.device.type,
            "precision": accelerator.mixed_precision, "processes": accelerator.num_processes, **more}


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{key}": torch.as_tensor(value).contiguous()
        for index, values in state.items()
        for key, value in values.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split("/", 1)
        if value.shape == parameters[int(index)].shape:  # fused kernels walk memory: layouts must match
            value = torch.empty_like(parameters[int(index)]).copy_(value)
        state.setdefault(int(index), {})[key] = value
    whole["state"] = state
    optimizer.load_state_dict(whole)


@dataclass
class RunFolder:
    """One training run on disk: ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``, images.

    ``parts`` names what a checkpoint holds: modules, optimisers and EMAs. Checkpoints are safetensors and JSON, written
    to a temporary name and renamed, the newest ``keep`` stay, and the last one before the learning rate fell stays too,
    because a longer run must continue from there.
    """

    folder: Path
    config: dict[str, Any]
    parts: dict[str, Any]
    total_steps: int
    decay_share: float
    main: bool = True
    keep: int = 2
    how: dict[str, Any] = field(default_factory=dict)  # circumstances: a change is said, not refused
    report_to: Sequence[str] = (TENSORBOARD,)  # see `core.training.trackers`
    started: float = field(default_factory=time.monotonic)
    left_behind: list[Path] = field(default_factory=list, init=False)
    extra: dict[str, Any] = field(default_factory=dict, init=False)  # what the resumed checkpoint was saved with
    reached: int = field(default=0, init=False)  # the step of the last checkpoint

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._trackers = Trackers(self.folder, self.report_to, self.settings)
        self._compare_with(self._earlier_settings())
        if self.main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", self.settings)  # atomic: other processes read it now

    @property
    def settings(self) -> dict[str, Any]:
        """All that is recorded of how this run is made."""
        return self.config | ({"circumstances": self.how} if self.how else {})

    def _earlier_settings(self) -> dict[str, Any]:
        """What the checkpoints here were made with, from ``config.json`` or the newest of them that says it."""
        if not self.checkpoints():
            return {}
        try:
            before = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            if isinstance(before, dict):
                return before
        except (FileNotFoundError, ValueError):
            pass
        for _, path in reversed(self.checkpoints()):
            try:
                before = read_facts(path).get("settings")
            except DamagedCheckpoint:
                continue
            if before:
                self._say(f"{self.folder / 'config.json'} is missing or damaged; its settings are those of {path.name}")
                return dict(before)
        return {}

    def _compare_with(self, before: Mapping[str, Any]) -> None:
        """Refuse another run's folder, and name what else is not as it was."""
        if not before:
            return
        gone = [key for key, value in before.items()
                if self.config and value is not None and key not in {*self.config, "circumstances"}]
        wrong = [key for key in self.config if key in before and _told(before[key]) != _told(self.config[key])]
        if wrong or gone:
            asked = {**dict.fromkeys(gone), **self.config}
            detail = ", ".join(f"{key}: {before[key]!r} there, {asked[key]!r} asked" for key in [*wrong, *gone])
            raise CheckpointMismatch(
                f"{self.folder} holds a run with other settings ({detail}); choose another --run or delete it"
            )
        then = before.get("circumstances", {})
        now = {key: value for key, value in self.how.items() if key in then and then[key] != value}
        if now:
            changes = ", ".join(f"{key}: {_short(then[key])}, now {_short(value)}" for key, value in now.items())
            self._say(f"{self.folder} goes on with other circumstances ({changes})")
        if unknown := [key for key in self.config if key not in before]:
            self._say(f"{self.folder} does not say its {', '.join(unknown)}: an earlier version wrote it")

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    @property
    def finished(self) -> bool:
        """Whether the last step of all is in a checkpoint."""
        return self.reached >= self.total_steps

    # -- checkpoints

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, oldest first."""
        found = [(int(p.name[5:]), p) for p in (self.folder / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
        return sorted(found)

    def save(self, step: int, extra: Mapping[str, Any] | None = None) -> None:
        """Write the state *after* ``step`` finished steps."""
        self.reached = step
        if not self.main:
            return
        target, parts = self.folder / "checkpoints" / f"step-{step:08d}", {}
        for name, part in self.parts.items():
            if isinstance(part, torch.optim.Optimizer):
                parts[name] = _flatten_optimizer(part)
            else:
                parts[name] = part.state if isinstance(part, PowerEMA) else part.state_dict()
        write_snapshot(target, parts, {
            "step": step, "total_steps": self.total_steps, "decay_share": self.decay_share, "wall_s": self.wall_s,
            "extra": dict(extra or {}), "settings": self.settings})
        for path in self.left_behind:  # later ones of a curve that this run left: they must not push out its own
            if path != target:
                shutil.rmtree(path, ignore_errors=True)
        self.left_behind = []
        self._prune()

    def _prune(self) -> None:
        start = decay_start(self.total_steps, self.decay_share)
        all_of_them = self.checkpoints()
        stable = [step for step, _ in all_of_them if step <= start]
        wanted = {step for step, _ in all_of_them[-self.keep :]} | ({stable[-1]} if stable else set())
        for step, path in all_of_them:
            if step not in wanted:
                shutil.rmtree(path)

    def resume(self) -> int:
        """Load the newest fitting checkpoint that is whole; returns the number of finished steps (0 for a fresh run).

        A run that was decaying towards another length continues from its last stable checkpoint. Checkpoints with a
        damaged or missing file are named and passed over. Raises CheckpointMismatch when there are whole checkpoints
        and all of them are too far down another curve.
        """
        if self.main:  # what a killed process had not written to its end
            for path in (self.folder / "checkpoints").glob("writing-*"):
                shutil.rmtree(path, ignore_errors=True)
        start = decay_start(self.total_steps, self.decay_share)
        damaged: list[str] = []
        curve = 0  # length of another run whose checkpoints are of no use here
        for step, path in reversed(self.checkpoints()):
            try:
                facts = read_facts(path)
                share = facts.get("decay_share", self.decay_share)
                same_curve = facts["total_steps"] == self.total_steps and share == self.decay_share
                if not same_curve and (step > start or step > decay_start(facts["total_steps"], share)):
                    self.left_behind.append(path)
                    curve = facts["total_steps"]
                    continue
                found = read_snapshot(path, self.parts)
            except DamagedCheckpoint as error:
                self.left_behind.append(path)
                damaged.append(f"{path.name}: {error}")
                continue
            self._restore(found)
            self.extra, self.reached = facts["extra"], step
            self.started = time.monotonic() - self._wall_before(facts, step)
            self._tell_damaged(damaged, f"step {step}")
            self._drop_metrics_after(step)
            return step
        if curve:
            raise CheckpointMismatch(
                f"{self.folder} holds a run of {curve} steps without a checkpoint that one of "
                f"{self.total_steps} could continue (the learning rate falls before it); ask for more --steps or name "
                "another --run"
            )
        self._tell_damaged(damaged, "the first step: no checkpoint is whole")
        self._drop_metrics_after(0)
        return 0

    def _restore(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, part in self.parts.items():
            if isinstance(part, torch.optim.Optimizer):
                _restore_optimizer(part, found[name])
            elif isinstance(part, PowerEMA):
                for key, value in found[name].items():
                    part.state[key].copy_(value)
            else:
                part.load_state_dict(dict(found[name]), strict=True)

    def _tell_damaged(self, damaged: Sequence[str], place: str) -> None:
        if damaged:
            self._say(f"{self.folder / 'checkpoints'}: {'; '.join(damaged)}; training goes on from {place}")

    def _wall_before(self, facts: Mapping[str, Any], step: int) -> float:
        """Seconds of training before a checkpoint; older ones do not say it, but the log of the steps does."""
        if "wall_s" in facts or not (self.folder / "metrics.jsonl").exists():
            return float(facts.get("wall_s", 0.0))
        rows = [row for row in read_metrics(self.folder / "metrics.jsonl") if row["step"] <= step]
        return float(rows[-1].get("wall_s", 0.0)) if rows else 0.0

    @property
    def wall_s(self) -> float:
        """Seconds of training so far, with those before it was resumed."""
        return round(time.monotonic() - self.started, 2)

    # -- the loop

    def steps(self, first: int, args: Any, accelerator: Any, label: str) -> Iterator[tuple[int, Progress]]:
        """`run_steps` of a command's settings. Ctrl-C and SIGTERM end it after a step that is saved (``last``); then it
        draws the curves and raises Interrupted, whose message says how to go on."""
        count, heard = accelerator.num_processes, [0]

        def agree(mine: int) -> int:
            heard[0] = said(mine)
            return heard[0]

        said = agreed(accelerator)
        self._say(f"{label}: {self.total_steps - first} of {self.total_steps} steps, "
                  f"{count} process{'es' if count > 1 else ''} on {accelerator.device.type}, "
                  f"{accelerator.mixed_precision.replace('no', 'fp32')}")
        yield from run_steps(first, self.total_steps, stop_at=args.stop_at, stop_after=args.stop_after,
                             enabled=self.main, label=label, agree=agree,
                             agree_every=1 if accelerator.device.type == "cpu" or count == 1 else 10)
        signum = max(stop_signal(), heard[0])  # 1: no signal, but the time is up
        if signum > 1:
            self.finish()
            kept = f"step {self.reached} of {self.total_steps} is saved in {self.folder}"
            raise Interrupted(signum, f"{kept}; the same command continues" if self.main else "")

    # -- metrics

    def _drop_metrics_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if self.main and path.exists():
            rows = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step]
            write_atomically(path, "".join(rows).encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``, and tell the trackers."""
        if not self.main or not values:
            return
        row = {"step": step, "wall_s": self.wall_s}
        row.update({key: float(f"{value:.6g}") for key, value in values.items()})
        with open(self.folder / "metrics.jsonl", "a") as out:
            out.write(json.dumps(row) + "\n")
        self._trackers.log(step, values)

    def picture(self, name: str, images: Tensor, columns: int) -> Path:
        """Write images [B, 3, H, W] in [-1, 1] as one PNG grid; returns its path."""
        path = self.folder / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(images, path, columns)
        return path

    def finish(self) -> None:
        """Close the logs and draw every logged curve into ``curves.png``."""
        self._trackers.close()
        if self.main and (self.folder / "metrics.jsonl").exists():
            plot_metrics(self.folder / "metrics.jsonl", self.folder / "curves.png")


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Images [B, 3, H, W] in [-1, 1] -> one PNG with ``columns`` images a row (clamped, then cast)."""
    from PIL import Image

    count, _, height, width = images.shape
    rows = math.ceil(count / columns)
    pixels = to_pixels(images.detach())
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, tile in enumerate(pixels):
        y, x = divmod(i, columns)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = tile
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


@dataclass
class Progress:
    """What a loop learns of where it stands: ``last`` says that it ends after this step, finished or not."""

    bar: Any
    last: bool = False

    def __call__(self, text: str) -> None:
        """Label the bar."""
        self.bar.set_postfix_str(text, refresh=False)


def run_steps(
    first: int, total: int, *, stop_at: int | None = None, stop_after: float | None = None, enabled: bool = True,
    label: str = "", agree: Callable[[int], int] = int, agree_every: int = 1
) -> Iterator[tuple[int, Progress]]:
    """Yield (step, progress) from ``first`` up to ``total`` behind a progress bar; calling ``progress`` labels it.

    It ends early at ``stop_at``, ``stop_after`` seconds after the first step began, or once a signal asks for it;
    several processes ``agree`` every ``agree_every`` steps whether that time has come for one of them.
    """
    from tqdm import tqdm

    last = total if stop_at is None else min(total, stop_at)
    with tqdm(total=total, initial=first, desc=label, disable=not enabled, mininterval=2.0) as bar, defer_signals():
        progress, began = Progress(bar), time.monotonic()
        for step in range(first, last):
            late = stop_after is not None and time.monotonic() - began > stop_after
            stopped = bool(agree(stop_signal() or int(late))) if (step - first) % agree_every == 0 else False
            progress.last = stopped or step + 1 == last
            yield step, progress
            bar.update(1)
            if stopped:
                return


def _told(value: Any) -> Any:
    """A setting without what is off in it: a version that has an option and one that has not agree where it is off."""
    return {key: one for key, one in value.items() if one} if isinstance(value, dict) else value


def _short(value: Any) -> Any:
    """A setting for people: a commit by its first digits."""
    return value[:9] if isinstance(value, str) and len(value) == 40 else value
