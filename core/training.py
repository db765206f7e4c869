"""How does a long training run stay exact, resumable and visible?

Holds what every component's training loop shares: power-function EMA, the warm-up / stable / decay learning-rate curve,
randomness derived from (seed, step), one guarded optimiser step, and the run folder (checkpoints, ``metrics.jsonl``,
TensorBoard, plots). It does not know which network is trained or on what data.

Sources: EMA profile: Karras et al. 2024, https://arxiv.org/abs/2312.02696 (eq. 1 and 124);
warm-up / stable / decay: Hu et al. 2024, https://arxiv.org/abs/2404.06395.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.checkpoint import INDEX, component_hash, load_component, read_index, save_component, write_json
from core.devices import has_bf16

MASK_63 = (1 << 63) - 1


class CheckpointMismatch(ValueError):
    """A run folder belongs to another configuration than the one asked for."""


# ---------------------------------------------------------------------------------------------------------- randomness


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers (SplitMix64 finaliser over each part in turn)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & ((1 << 64) - 1))) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
        state ^= state >> 31
    return state & MASK_63


def step_generator(seed: int, step: int, stream: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one training step; the same (seed, step, stream) always gives the same numbers."""
    return torch.Generator(device=device).manual_seed(mix_seed(seed, step, stream))


class EpochSampler:
    """Indices of the images of each step: every epoch is one seeded permutation, and nothing else is remembered.

    ``batch(step)`` is a pure function of (seed, step), so a resumed run sees what an undisturbed one would have seen.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if count < 1:
            raise ValueError("the selection of training images is empty; check the prepared store and the px filter")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._order = torch.randperm(self.count, generator=step_generator(self.seed, epoch, stream=7))
            self._epoch = epoch
        return self._order

    def batch(self, step: int) -> Tensor:
        """Positions [batch_size] in [0, count) for this step, counted from 0."""
        first, parts, missing = step * self.batch_size, [], self.batch_size
        while missing:
            epoch, offset = divmod(first, self.count)
            part = self._permutation(epoch)[offset : offset + missing]
            parts.append(part)
            first, missing = first + len(part), missing - len(part)
        return torch.cat(parts)


# ------------------------------------------------------------------------------------------------- curves and averages


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, decay_share: float = 0.25) -> float:
    """Warm-up / stable / decay: linear rise, flat, then ``1 - sqrt`` fall to zero over the last ``decay_share``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start = decay_start(total_steps, decay_share)
    if step < start:
        return peak
    progress = (step - start) / max(1, total_steps - start)
    return peak * max(0.0, 1.0 - math.sqrt(progress))


def decay_start(total_steps: int, decay_share: float) -> int:
    """First step of the falling part of the curve."""
    return total_steps - int(round(total_steps * decay_share))


def power_exponent(relative_std: float) -> float:
    """Exponent gamma of the power-function EMA whose profile has this standard deviation relative to its length.

    Solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) for gamma by bisection (the left side falls
    monotonically for gamma >= 0). ``relative_std`` must lie in (0, 0.28].
    """
    if not 0.0 < relative_std <= 0.28:
        raise ValueError(f"relative_std must be in (0, 0.28], got {relative_std}")
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = 0.5 * (low + high)
        value = math.sqrt((middle + 1) / ((middle + 2) ** 2 * (middle + 3)))
        low, high = (middle, high) if value > relative_std else (low, middle)
    return 0.5 * (low + high)


class PowerEMA:
    """Exponential moving average of every parameter and buffer with a decay that follows the run's own length.

    beta_t = (1 - 1/t)^(gamma + 1): the average always covers the same *share* of the run, so one setting serves a
    ten-minute run and a week. Floating-point buffers are averaged too; integer buffers are copied.
    """

    def __init__(self, model: nn.Module, relative_std: float) -> None:
        self.relative_std = relative_std
        self.gamma = power_exponent(relative_std)
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._source: tuple[nn.Module, dict[str, Tensor]] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Fold in the weights after optimiser step number ``step`` (first step = 1)."""
        beta = (1.0 - 1.0 / step) ** (self.gamma + 1.0)
        if self._source is None or self._source[0] is not model:  # to list what a model has takes longer than to add it
            self._source = model, model.state_dict(keep_vars=True)
        floats, sources = [], []
        for name, value in self._source[1].items():
            if value.is_floating_point():
                floats.append(self.state[name])
                sources.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(floats, sources, 1.0 - beta)


# ------------------------------------------------------------------------------------------------------------ stepping


class StepGuard:
    """Counts the optimiser steps that were refused because the loss or the gradient was not finite.

    Nothing here waits for an accelerator: the verdict stays on the device, fused optimisers refuse the step there, and
    the counts are read once in ``limit`` steps (on a CPU, where reading is free, at once).
    """

    def __init__(self, skipped: int = 0, limit: int = 25) -> None:
        self.limit, self._calls, self._before = limit, 0, skipped
        self._skipped, self._in_a_row = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    @property
    def skipped(self) -> int:
        """All steps refused, with those before a resumed run was stopped."""
        return self._before + int(self._skipped)

    @property
    def in_a_row(self) -> int:
        return int(self._in_a_row)

    def step(
        self, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter],
        max_norm: float = 1.0,
    ) -> Tensor:
        """Clip to ``max_norm`` (L2, over all parameters), step unless NaN/inf, clear gradients; returns the norm [].

        Raises FloatingPointError when more than ``limit`` steps running were refused.
        """
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        bad = ~torch.isfinite(norm)
        for optimizer in [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):  # how torch marks a fused optimiser
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
                optimizer.step()
            elif not bool(bad):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._skipped = self._skipped.to(bad.device) + bad
        self._in_a_row = (self._in_a_row.to(bad.device) + 1) * bad
        self._calls += 1
        if (bad.device.type == "cpu" or self._calls % self.limit == 0) and self.in_a_row > self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps running had no finite gradient; lower --learning-rate or try --precision no"
            )
        return norm


def send(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device. To a GPU it goes from pinned memory and nobody waits: an ordinary copy lets
    everything end first that the GPU has been told, which then idles while the host prepares the next step."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def average_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one flat message; nothing happens with a single process."""
    if accelerator.num_processes == 1:
        return
    with_grad = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.reshape(-1) for p in with_grad])  # type: ignore[union-attr]
    flat = accelerator.reduce(flat, reduction="mean")
    offset = 0
    for p in with_grad:
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))  # type: ignore[union-attr]
        offset += p.numel()


def make_accelerator(device: str = "auto", precision: str = "auto") -> Any:
    """The accelerate object that chooses device, precision and process group.

    ``precision`` is "no", "bf16" or "auto" (bf16 where the CPU or GPU computes it natively, else fp32).
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # torch reads this at its first large allocation: huge pages for activations made a CPU step 1.3 times faster
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if precision == "auto":
        chosen = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
        precision = "bf16" if has_bf16(chosen) else "no"
    # accelerate keeps its first answer for the life of the process, but training may be followed by measuring in fp32
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not in_group)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes: the fastest kernels are worth looking for
    return Accelerator(cpu=device == "cpu", mixed_precision=precision)


def attention_kernel(device: torch.device) -> Any:
    """Context that picks the fastest attention for short sequences: plain matrix products on a CPU (the fused kernel's
    backward pass is about 1.3 times slower there at under 100 tokens), torch's own choice elsewhere."""
    from contextlib import nullcontext

    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.MATH]) if device.type == "cpu" else nullcontext()


def process_slice(accelerator: Any, count: int) -> slice:
    """The part of a global batch of ``count`` that this process works on; ``count`` must divide evenly."""
    if count % accelerator.num_processes:
        raise ValueError(f"--batch-size {count} must be a multiple of the {accelerator.num_processes} processes")
    share = count // accelerator.num_processes
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


# ---------------------------------------------------------------------------------------------------------- run folder


def keep_teacher(run: Path, model: Path, component: str, main: bool) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Configuration and weights of the component that a run learns from, and the hash they had in the model folder.

    The run keeps a copy, so that it still learns from the same when what it made has been released in the same place
    (which then says so: ``distilled``). Where another has come there, its hash is another setting of the run.
    """
    config, state = load_component(model, component)
    source, kept = component_hash(model, component), run / "teacher"
    if (kept / INDEX).exists():
        first = str(read_index(kept)["components"][component]["source"])
        if config.get("distilled", {}).get("teacher") == first:
            return *load_component(kept, component), first
    elif main:
        save_component(kept, component, state, config, extra={"source": source})
    return config, state, source


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
    """One training run on disk: ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``, pictures.

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
    started: float = field(default_factory=time.monotonic)
    left_behind: list[Path] = field(default_factory=list, init=False)
    extra: dict[str, Any] = field(default_factory=dict, init=False)  # what the resumed checkpoint was saved with
    reached: int = field(default=0, init=False)  # the step of the last checkpoint

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._writer: Any = None
        path = self.folder / "config.json"
        if path.exists():
            before = json.loads(path.read_text())
            wrong = [key for key in self.config if before.get(key) != self.config[key]]
            if wrong and any((self.folder / "checkpoints").glob("step-*")):
                detail = ", ".join(f"{key}: {before.get(key)!r} there, {self.config[key]!r} asked" for key in wrong)
                raise CheckpointMismatch(
                    f"{self.folder} holds a run with other settings ({detail}); choose another --run or delete it"
                )
        if self.main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_json(path, self.config)  # atomic: other processes read it at this moment

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
        target = self.folder / "checkpoints" / f"step-{step:08d}"
        aside = target.with_name(f"writing-{step:08d}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, part in self.parts.items():
            if isinstance(part, torch.optim.Optimizer):
                tensors = _flatten_optimizer(part)
            elif isinstance(part, PowerEMA):
                tensors = part.state
            else:
                tensors = part.state_dict()
            save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
                      aside / f"{name}.safetensors")
        facts = {"step": step, "total_steps": self.total_steps, "extra": dict(extra or {})}
        (aside / "state.json").write_text(json.dumps(facts))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
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
        """Load the newest fitting checkpoint; returns the number of finished steps (0 for a fresh run).

        A run that was decaying towards another length continues from its last stable checkpoint. Raises
        CheckpointMismatch when there are checkpoints and all of them are too far down another curve.
        """
        start = decay_start(self.total_steps, self.decay_share)
        for step, path in reversed(self.checkpoints()):
            facts = json.loads((path / "state.json").read_text())
            same_curve = facts["total_steps"] == self.total_steps
            old_start = decay_start(facts["total_steps"], self.decay_share)
            if not same_curve and (step > start or step > old_start):
                self.left_behind.append(path)
                continue
            for name, part in self.parts.items():
                tensors = load_file(path / f"{name}.safetensors")
                if isinstance(part, torch.optim.Optimizer):
                    _restore_optimizer(part, tensors)
                elif isinstance(part, PowerEMA):
                    for key, value in tensors.items():
                        part.state[key].copy_(value)
                else:
                    part.load_state_dict(tensors, strict=True)
            self.extra, self.reached = facts["extra"], step
            self._drop_metrics_after(step)
            return step
        if self.left_behind:
            raise CheckpointMismatch(
                f"{self.folder} holds a run of {facts['total_steps']} steps without a checkpoint that one of "
                f"{self.total_steps} could continue (the learning rate falls before it); ask for more --steps or name "
                "another --run"
            )
        return 0

    # -- metrics

    def _drop_metrics_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if self.main and path.exists():
            rows = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
            path.write_text("".join(row + "\n" for row in rows))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl`` and to TensorBoard."""
        if not self.main:
            return
        row = {"step": step, "wall_s": round(time.monotonic() - self.started, 2)}
        row.update({key: float(f"{value:.6g}") for key, value in values.items()})
        with open(self.folder / "metrics.jsonl", "a") as out:
            out.write(json.dumps(row) + "\n")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def picture(self, name: str, images: Tensor, columns: int) -> Path:
        """Write images [B, 3, H, W] in [-1, 1] as one PNG grid; returns its path."""
        path = self.folder / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(images, path, columns)
        return path

    def finish(self) -> None:
        """Close the logs and draw every logged curve into ``curves.png``."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.main and (self.folder / "metrics.jsonl").exists():
            plot_metrics(self.folder / "metrics.jsonl", self.folder / "curves.png")


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Images [B, 3, H, W] in [-1, 1] -> one PNG with ``columns`` pictures a row (clamped, then cast)."""
    from PIL import Image

    count, _, height, width = images.shape
    rows = math.ceil(count / columns)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    sheet = torch.full((rows * height, columns * width, 3), 255, dtype=torch.uint8)
    for i, tile in enumerate(pixels):
        y, x = divmod(i, columns)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = tile
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.numpy()).save(path)


def plot_metrics(metrics: Path, target: Path) -> None:
    """One small line chart for every value in a ``metrics.jsonl`` file.

    The margins are given and the sheet is drawn once: for short runs, laying out and drawing twice is the longer part.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rows = [json.loads(line) for line in metrics.read_text().splitlines() if line]
    keys = sorted({key for row in rows for key in row} - {"step", "wall_s"})
    if not keys:
        return
    columns = min(4, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = Figure((4 * columns, 2.6 * lines), dpi=90)
    for i, key in enumerate(keys):
        y, x = divmod(i, columns)
        axis = figure.add_axes(((x + 0.16) / columns, 1 - (y + 0.85) / lines, 0.8 / columns, 0.71 / lines))
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot([p[0] for p in points], [p[1] for p in points], linewidth=1)
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
        axis.locator_params(nbins=6)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(target)


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
    label: str = "", agree: Callable[[bool], bool] = bool
) -> Iterator[tuple[int, Progress]]:
    """Yield (step, progress) from ``first`` up to ``total`` behind a progress bar; calling ``progress`` labels it.

    It ends early at ``stop_at``, or ``stop_after`` seconds after the first step began; several processes ``agree``
    whether that time has come.
    """
    from tqdm import tqdm

    last = total if stop_at is None else min(total, stop_at)
    with tqdm(total=total, initial=first, desc=label, disable=not enabled, mininterval=2.0) as bar:
        progress, began = Progress(bar), time.monotonic()
        for step in range(first, last):
            late = stop_after is not None and agree(time.monotonic() - began > stop_after)
            progress.last = late or step + 1 == last
            yield step, progress
            bar.update(1)
            if late:
                return


def agreed(accelerator: Any) -> Callable[[bool], bool]:
    """Whether the main process says so, for every process."""
    if accelerator.num_processes == 1:
        return bool
    return lambda mine: bool(accelerator.reduce(
        torch.tensor(float(mine and accelerator.is_main_process), device=accelerator.device), reduction="sum") > 0)
