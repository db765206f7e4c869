"""Where do the curves of a run go, besides `metrics.jsonl`?

To TensorBoard, to Weights & Biases through the tracker of accelerate, to both or nowhere. Nothing leaves the machine
unless a person says so: W&B writes offline runs into the run's folder until WANDB_MODE says otherwise, and `wandb sync`
sends them. It does not know what is trained.

Trackers: https://huggingface.co/docs/accelerate/usage_guides/tracking.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.command import SettingError

TENSORBOARD, WANDB, NONE = "tensorboard", "wandb", "none"


def tracker_names(text: str) -> tuple[str, ...]:
    """A type of options: "tensorboard", "wandb", both with a comma between them, or "none" -> the names, none for none.

    Raises argparse.ArgumentTypeError for another word, or where the package wandb is asked for and not installed.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if wrong := [name for name in names if name not in (TENSORBOARD, WANDB, NONE)] or (NONE in names and names[1:]):
        raise argparse.ArgumentTypeError(f"{text!r} names {wrong}; give {TENSORBOARD}, {WANDB}, both with a comma "
                                         f"between them, or {NONE}")
    if WANDB in names and importlib.util.find_spec("wandb") is None:
        raise argparse.ArgumentTypeError("wandb needs the package wandb (pip install wandb), which is not installed")
    return tuple(name for name in names if name != NONE)


def add_report_to(parser: argparse.ArgumentParser) -> None:
    """``--report-to``."""
    parser.add_argument("--report-to", type=tracker_names, default=(TENSORBOARD,), metavar="NAMES",
                        help="where curves go besides metrics.jsonl: tensorboard (the default), wandb (offline, into "
                        "the run's folder, unless WANDB_MODE says otherwise), tensorboard,wandb or none")


class Trackers:
    """The open trackers of one run. Nothing is opened before the first value."""

    def __init__(self, folder: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.folder, self.names, self.settings = folder, tuple(names), settings
        self._tensorboard: Any = None
        self._wandb: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values at a step. TensorBoard forgets what an earlier, longer run had logged after the first of them."""
        if TENSORBOARD in self.names:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        if WANDB in self.names:
            if self._wandb is None:
                self._wandb = self._open_wandb()
            self._wandb.log(dict(values), step=step)

    def _open_wandb(self) -> Any:
        if importlib.util.find_spec("wandb") is None:
            raise SettingError("--report-to wandb needs the package wandb (pip install wandb), which is not installed")
        from accelerate.tracking import WandBTracker

        tracker = WandBTracker("text-to-face", dir=str(self.folder), name=self.folder.name,
                               mode=os.environ.get("WANDB_MODE", "offline"))
        tracker.start()
        tracker.store_init_configuration(dict(self.settings))
        return tracker

    def close(self) -> None:
        """Write what is waiting; a later value opens them again."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
