"""What does a training run look like? Every logged value of a ``metrics.jsonl`` as a curve over the steps.

Values measured on held-out images (``val_...``) stand in the chart of what they are to be compared with. It does not
know what the values mean, nor who writes them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

POINTS_SHOWN = 40  # up to so many points a curve has a dot at each: a line needs two
UNITS = {"lr": "learning rate", "psnr": "PSNR, dB", "grad_norm": "L2 norm", "skipped": "steps", "images_seen": "images"}
HELD_OUT = "val_"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` in order; lines that are cut or damaged are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def charts(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Which values share a chart, by its title: each with its twin on held-out images."""
    keys = sorted({key for row in rows for key in row} - {"step", "wall_s"})
    found: dict[str, list[str]] = {}
    for key in sorted(keys, key=lambda key: (key.startswith(HELD_OUT), key)):
        plain = key.removeprefix(HELD_OUT)
        found.setdefault(plain if plain in found else key, []).append(key)
    return dict(sorted(found.items()))


def plot_metrics(metrics: Path, target: Path) -> None:
    """One small chart for every value in a ``metrics.jsonl`` file.

    The margins are given and the sheet is drawn once: for short runs, laying out and drawing twice is the longer part.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rows = read_metrics(metrics)
    sheets = charts(rows)
    if not sheets:
        return
    columns = min(4, len(sheets))
    lines = math.ceil(len(sheets) / columns)
    figure = Figure((4 * columns, 2.8 * lines), dpi=90)
    for i, (title, keys) in enumerate(sheets.items()):
        y, x = divmod(i, columns)
        axis = figure.add_axes(((x + 0.2) / columns, 1 - (y + 0.81) / lines, 0.76 / columns, 0.69 / lines))
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot([p[0] for p in points], [p[1] for p in points], linewidth=1, markersize=3,
                      marker="o" if len(points) <= POINTS_SHOWN else "",
                      label="validation" if key.startswith(HELD_OUT) else "training")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel(UNITS.get(title.removeprefix(HELD_OUT).split("_16")[0], "value"), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.locator_params(nbins=6)
        if any(key.startswith(HELD_OUT) for key in keys):
            axis.legend(fontsize=7)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(target)
