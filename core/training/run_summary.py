"""What will a run cost, before hours are spent on it?

Steps of the very networks are timed on this machine, their arithmetic and memory are counted, and disk and hours follow
from the numbers of images and steps. It does not know which networks there are: it is given a step to take.

Counting: torch.utils.flop_counter, https://docs.pytorch.org/docs/stable/generated/torch.utils.flop_counter.html
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from core.training.arrays import amount
from core.training.cropping import SIZE
from core.training.timed_steps import TimedStep

FEWEST, MOST = 2, 20  # steps that are timed
FLOAT = 4  # bytes
CHECKPOINTS, COPIES = 3, 4  # kept by a run; of the weights in one: weights, two moments of AdamW, one average


@dataclass(frozen=True)
class StepCost:
    """What one step of training costs here: parameters, 1e9 operations an image (forward and backward), seconds a step
    and how many steps were timed for that."""

    parameters: int
    gflop_per_image: float
    seconds: float
    timed_steps: int


@dataclass(frozen=True)
class Part:
    """One component of a run: its preset, how long it is trained, and what a step costs."""

    preset: str
    steps: int
    batch_size: int
    cost: StepCost

    @property
    def hours(self) -> float:
        """Expected, by the timed steps."""
        return self.steps * self.cost.seconds / 3600


def measure_step(step: TimedStep, batch_size: int, budget_s: float = 20.0) -> StepCost:
    """Time a step of training: one to warm up, whose operations are counted, and then at least two, at most twenty, as
    many as begin within ``budget_s`` seconds."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step.take()
    _finish()
    began, done = time.monotonic(), 0
    while done < FEWEST or (done < MOST and time.monotonic() - began < budget_s):
        step.take()
        done += 1
    _finish()
    return StepCost(step.parameters, float(f"{counter.get_total_flops() / batch_size / 1e9:.4g}"),
                    round((time.monotonic() - began) / done, 4), done)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes that this process has held at most: on the GPU where there is one, else in the main memory (0 on Windows,
    which does not say)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def disk_bytes(images: int, parameters: int, latent_channels: int) -> int:
    """What store, cached latents (mean and deviation of each image and its mirror image, fp16) and checkpoints take."""
    store = images * SIZE * SIZE * 3
    latents = images * 2 * 2 * 2 * latent_channels * (SIZE // 8) ** 2
    return store + latents + parameters * FLOAT * COPIES * CHECKPOINTS


def summary(data: Mapping[str, Any], parts: Mapping[str, Part], machine: Mapping[str, Any], latent_channels: int,
            folder: Path) -> dict[str, Any]:
    """All of it, as JSON can hold it. ``data`` has count, train (images to learn from) and fingerprint; ``folder`` is
    on the disk that will hold the run."""
    train = max(1, int(data["train"]))
    place = next(one for one in (folder, *folder.resolve().parents) if one.exists())
    pixels = train * SIZE * SIZE * 3  # held in memory while VAE and CLIP are trained
    return {
        "data": dict(data),
        "machine": dict(machine),
        "parts": {name: {"preset": part.preset, **asdict(part.cost), "steps": part.steps, "batch_size": part.batch_size,
                         "epochs": round(part.steps * part.batch_size / train, 1), "hours": round(part.hours, 4)}
                  for name, part in parts.items()},
        "hours": round(sum(part.hours for part in parts.values()), 4),
        "memory_bytes": peak_memory() + pixels,
        "disk_bytes": disk_bytes(int(data["count"]), sum(part.cost.parameters for part in parts.values()),
                                 latent_channels),
        "disk_free_bytes": shutil.disk_usage(place).free,
    }


def text(found: Mapping[str, Any]) -> str:
    """A summary for people."""
    data, machine = found["data"], found["machine"]
    lines = [
        f"data      {data['count']:,} images, {data['train']:,} of them to learn from; {data['form']}; "
        f"fingerprint {data['fingerprint']}",
        f"machine   {machine['processes']} process on {machine['device']}, {machine['precision']}, "
        f"{machine['threads']} threads, torch {machine['torch']}",
        f"{'part':9} {'preset':12} {'parameters':>11} {'GFLOP/image':>12} {'batch':>6} {'steps':>8} {'epochs':>8} "
        f"{'s/step':>8} {'expected':>9}",
    ]
    for name, part in found["parts"].items():
        lines.append(
            f"{name:9} {part['preset']:12} {part['parameters']:>11,} {part['gflop_per_image']:>12.3g} "
            f"{part['batch_size']:>6} {part['steps']:>8,} {part['epochs']:>8,.1f} {part['seconds']:>8.3g} "
            f"{duration(part['hours']):>9}")
    lines.append(f"expected  {duration(found['hours'])} of training by the timed steps, and evaluation and fits on top")
    lines.append(f"memory    about {amount(found['memory_bytes'])}; disk about {amount(found['disk_bytes'])}, "
                 f"{amount(found['disk_free_bytes'])} are free")
    return "\n".join(lines)


def duration(hours: float) -> str:
    """Hours for people: 40 s, 12 min, 3.5 h, 4.2 days."""
    for unit, size, most in (("s", 1 / 3600, 1 / 30), ("min", 1 / 60, 2.0), ("h", 1.0, 72.0)):
        if hours < most:
            return f"{hours / size:.0f} {unit}" if unit != "h" else f"{hours:.1f} h"
    return f"{hours / 24:.1f} days"
