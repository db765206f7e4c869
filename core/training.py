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
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint import (
    ModelFolderError,
    component_hash,
    git_commit,
    load_component,
    read_index,
    save_component,
    write_atomically,
    write_json,
)
from core.command import Interrupted, SettingError, UserError, patience, stop_signal
from core.curves import plot_metrics, read_metrics
from core.devices import has_bf16
from core.snapshots import DamagedCheckpoint, read_facts, read_snapshot, write_snapshot

MASK_63 = (1 << 63) - 1


class CheckpointMismatch(UserError, ValueError):
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
            raise SettingError("the selection of training images is empty; check the prepared store and the px filter")
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

    ``precision`` is "no", "bf16" or "auto" (bf16 where the CPU or GPU computes it natively, else fp32). Raises
    SettingError where fewer processes work together than were asked for.
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
    asked = asked_processes()
    # without a GPU accelerate gives every process of a launcher a training of its own, unless it is told "cpu"
    accelerator = Accelerator(cpu=device == "cpu" or (asked > 1 and not torch.cuda.is_available()),
                              mixed_precision=precision)
    if accelerator.num_processes < asked:
        raise SettingError(f"{asked} processes were started and only {accelerator.num_processes} works with this one; "
                           "start them with `torchrun --nproc_per_node N`, or one without a launcher")
    return accelerator


def asked_processes() -> int:
    """How many processes a launcher says it has started. Raises SettingError for `accelerate launch --cpu`, which
    starts a single one on one machine whatever --num_processes says."""
    said = [int(os.environ[name]) for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
            if os.environ.get(name, "").isdigit()]
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not said and on_cpu and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        raise SettingError("`accelerate launch --cpu` has started one process, not the several it was asked for; use "
                           "`torchrun --nproc_per_node N` before the same command, with --run-folder in place of --run")
    return max(said, default=1)


def mean_over_processes(accelerator: Any, values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each value over all processes, which must all ask for the same names at the same step."""
    if accelerator.num_processes == 1:
        return dict(values)
    flat = torch.tensor(list(values.values()), dtype=torch.float32, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(flat, reduction="mean").tolist(), strict=True))


def circumstances(args: Any, accelerator: Any, **more: Any) -> dict[str, Any]:
    """What a run was made with that may change when it is resumed; a change is said, not refused."""
    return {"steps": args.steps, "warmup_steps": args.warmup_steps, "decay_share": args.decay_share,
            "commit": git_commit(Path(__file__).parent), "device": accelerator.device.type,
            "precision": accelerator.mixed_precision, "processes": accelerator.num_processes, **more}


def attention_kernel(device: torch.device) -> Any:
    """Context that picks the fastest attention for short sequences: plain matrix products on a CPU (the fused kernel's
    backward pass is about 1.3 times slower there at under 100 tokens), torch's own choice elsewhere."""
    from contextlib import nullcontext

    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.MATH]) if device.type == "cpu" else nullcontext()


def process_slice(accelerator: Any, count: int) -> slice:
    """The part of a global batch of ``count`` that this process works on; ``count`` must divide evenly."""
    if count % accelerator.num_processes:
        raise SettingError(f"--batch-size {count} must be a multiple of the {accelerator.num_processes} processes")
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
    try:
        first = str(read_index(kept)["components"][component]["source"])
        copy = load_component(kept, component)
    except (ModelFolderError, KeyError, ValueError) as error:  # there is none yet, or it is damaged
        first, copy = "", None
        recorded = _recorded_teacher(run)
        if kept.exists() and recorded not in (None, source):
            raise CheckpointMismatch(
                f"{kept} is damaged ({error}), and {model} holds another {component} than the one that taught this "
                "run; put that one back into the model folder, or name another --run") from error
    if copy is not None and config.get("distilled", {}).get("teacher") == first:
        return *copy, first
    if main and (copy is None or (first != source and not any((run / "checkpoints").glob("step-*")))):
        save_component(kept, component, state, config, extra={"source": source})
    return config, state, source


def _recorded_teacher(run: Path) -> Any:
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8")).get("teacher")
    except (OSError, ValueError, AttributeError):
        return None


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
    how: dict[str, Any] = field(default_factory=dict)  # circumstances: a change is said, not refused
    started: float = field(default_factory=time.monotonic)
    left_behind: list[Path] = field(default_factory=list, init=False)
    extra: dict[str, Any] = field(default_factory=dict, init=False)  # what the resumed checkpoint was saved with
    reached: int = field(default=0, init=False)  # the step of the last checkpoint

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._writer: Any = None
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
        wrong = [key for key in self.config if key in before and before[key] != self.config[key]]
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
        """Append one line to ``metrics.jsonl`` and to TensorBoard."""
        if not self.main or not values:
            return
        row = {"step": step, "wall_s": self.wall_s}
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
    with tqdm(total=total, initial=first, desc=label, disable=not enabled, mininterval=2.0) as bar, patience():
        progress, began = Progress(bar), time.monotonic()
        for step in range(first, last):
            late = stop_after is not None and time.monotonic() - began > stop_after
            stopped = bool(agree(stop_signal() or int(late))) if (step - first) % agree_every == 0 else False
            progress.last = stopped or step + 1 == last
            yield step, progress
            bar.update(1)
            if stopped:
                return


def agreed(accelerator: Any) -> Callable[[int], int]:
    """The largest number that any process says, for every process."""
    if accelerator.num_processes == 1:
        return int
    return lambda mine: int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).max())


def _short(value: Any) -> Any:
    """A setting for people: a commit by its first digits."""
    return value[:9] if isinstance(value, str) and len(value) == 40 else value
