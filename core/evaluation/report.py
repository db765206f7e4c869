"""What does an evaluation look like to a person? JSON, plots, a table for the model card, a comparison.

Everything here is drawn from the finished report (a plain dict) and a few arrays; it measures nothing and does not know
how the numbers came about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.imaging.spectrum import Array
from core.nn.checkpoint import write_atomically

# the columns of their table
DISTANCES = ("n", "frechet", "frechet_over_floor", "shape_over_floor", "precision", "recall", "mmd")
# What a model worth shipping reaches: (path in the report, "min" or "max", bound).
TARGETS: tuple[tuple[str, str, float], ...] = (
    ("distances.generated.frechet_over_floor", "max", 4.0),
    ("distances.vae.frechet_over_floor", "max", 3.0),
    ("vae.psnr_db", "min", 28.0),
    ("vae.ms_ssim", "min", 0.97),
    ("fidelity.mean_visible", "min", 0.95),
    ("fidelity.worst_visible", "min", 0.85),
    ("negations.mean", "min", 0.90),
    ("spectrum.generated_over_real", "min", 0.8),
    ("spectrum.generated_over_real", "max", 1.25),
    ("memorisation.features.ratio_percentiles.1", "min", 0.9),
    ("crowd.largest_rate_difference", "max", 0.10),
)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: six significant digits, and null where a number is not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.6g}") if math.isfinite(value) else None
    if value is None or isinstance(value, str):
        return value
    return str(value)


def lookup(report: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None where that part of the report was not made."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def judged_targets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target with the value measured and whether it is met; targets of parts not run are left out."""
    found = []
    for path, side, bound in TARGETS:
        value = lookup(report, path)
        if value is not None:
            met = value >= bound if side == "min" else value <= bound
            found.append({"figure": path, "value": value, side: bound, "met": bool(met)})
    return found


def numbers(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a report with their dotted paths."""
    for key, value in report.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each number that both reports hold and that differs; refuses reports of different attribute
    classifiers."""
    hashes = lookup(before, "judge.hash"), lookup(after, "judge.hash")
    if hashes[0] != hashes[1]:
        raise ValueError(
            f"the reports were made by different attribute classifiers ({hashes[0]} and {hashes[1]}): not comparable"
        )
    old = dict(numbers(before))
    return [
        f"{path}: {old[path]:.5g} -> {value:.5g} ({value - old[path]:+.3g})"
        for path, value in numbers(after)
        if path in old and value != old[path] and not path.startswith("seconds")
    ]


# ---------------------------------------------------------------------------------------------------------------- plots


def plot_all(report: Mapping[str, Any], curves: Mapping[str, tuple[Array, Array]], folder: Path) -> None:
    """Every plot the report has numbers for. ``curves``: radial spectra, name -> (frequency, power)."""
    from matplotlib.figure import Figure  # the class, not pyplot: no window system and no global state

    def new(title: str) -> tuple[Figure, Any]:
        figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=10)
        return figure, axes

    if ladder := report.get("ladder"):
        figure, axes = new(f"Frechet distance to real pictures in the judge's features (n = {ladder['n']})")
        bars = {"real": ladder["floor"], **{name: rung["frechet"] for name, rung in ladder["rungs"].items()}}
        for name in ("vae", "generated"):
            if entry := lookup(report, f"distances.{name}"):
                bars[name] = entry["frechet"]
        axes.bar(list(bars), list(bars.values()), color=["#888"] + ["#48a"] * (len(bars) - 1))
        axes.tick_params(axis="x", rotation=30)
        axes.set_yscale("symlog", linthresh=max(ladder["floor"], 1e-3))
        figure.savefig(folder / "ladder.png")
    if curve := report.get("curve"):
        figure, axes = new(f"Quality over the number of steps (n = {curve['n']})")
        points = curve["points"]
        axes.plot([p["steps"] for p in points], [p["frechet"] for p in points], "o-", label="generated")
        axes.axhline(curve["floor"]["frechet"], color="#888", label="real pictures, same n")
        axes.set(xscale="log", xlabel="steps", ylabel="Frechet distance")
        axes.legend()
        figure.savefig(folder / "curve.png")
    if fidelity := report.get("fidelity"):
        scored = {name: entry for name, entry in fidelity["attributes"].items() if entry}
        ordered = sorted(scored, key=lambda name: scored[name]["ratio"])
        figure, axes = new(f"Prompt fidelity: balanced accuracy over that on real pictures (n = {fidelity['n']})")
        figure.set_size_inches(7, 1.5 + 0.18 * len(ordered))
        axes.barh(ordered, [scored[name]["ratio"] for name in ordered], color="#48a")
        axes.axvline(1.0, color="#888")
        axes.tick_params(axis="y", labelsize=7)
        figure.savefig(folder / "fidelity.png")
    if curves:
        figure, axes = new("Spectral power of the luminance by frequency")
        for name, (frequency, power) in curves.items():
            axes.plot(frequency, power, label=name)
        axes.set(yscale="log", xlabel="frequency / Nyquist", ylabel="share of power")
        axes.axvline(0.5, color="#ccc")
        axes.legend()
        figure.savefig(folder / "spectrum.png")


# ---------------------------------------------------------------------------------------------------------------- table


def _row(name: str, *cells: Any) -> str:
    shown = [f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in cells]
    return "| " + " | ".join([name, *shown]) + " |"


def table(report: Mapping[str, Any]) -> str:
    """The numbers of a model card in Markdown."""
    lines = [f"Measured by `python evaluate.py`, judge `{str(lookup(report, 'judge.hash'))[:12]}`; "
             "distances are in the judge's features and are not FID.", ""]  # fmt: skip
    if distances := report.get("distances"):
        lines += ["| pictures against sharp training pictures | n | Frechet | over floor | shape over floor "
                  "| precision | recall | MMD |", "| --- " * (len(DISTANCES) + 1) + "|"]  # fmt: skip
        for name in ("floor", "vae", "generated"):
            if entry := distances.get(name):
                cells = tuple(entry.get(key) for key in DISTANCES)
                lines.append(_row({"floor": "held-out real", "vae": "VAE copies of held-out"}.get(name, name), *cells))
        for name, rung in (lookup(report, "ladder.rungs") or {}).items():
            lines.append(_row(name, *(rung.get(key) for key in DISTANCES)))
        lines.append("")
    if fidelity := report.get("fidelity"):
        lines += [f"Prompt fidelity (n = {fidelity['n']}, guidance {lookup(report, 'settings.guidance')}):", "",
                  "| attribute | generated | real | ratio |", "| --- " * 4 + "|"]  # fmt: skip
        for name in fidelity["headline"]:
            if entry := fidelity["attributes"][name]:
                lines.append(_row(name, entry["generated"], entry["real"], entry["ratio"]))
        lines += [_row(f"mean of {fidelity['num_visible']} visible", None, None, fidelity["mean_visible"]), ""]
    if curve := report.get("curve"):
        shown: Sequence[Any] = curve["points"]
        lines += [f"Steps (n = {curve['n']}, floor {curve['floor']['frechet']:.4g}):", "",
                  "| steps | " + " | ".join(str(p["steps"]) for p in shown) + " |", "| --- " * (len(shown) + 1) + "|",
                  _row("Frechet", *(p["frechet"] for p in shown)), ""]  # fmt: skip
    figures = {
        "VAE PSNR (dB)": "vae.psnr_db", "VAE SSIM": "vae.ssim", "VAE MS-SSIM": "vae.ms_ssim",
        "fine detail over real": "spectrum.generated_over_real", "negations obeyed": "negations.mean",
        "memorisation ratio, 1st percentile (features)": "memorisation.features.ratio_percentiles.1",
        "memorisation ratio, 1st percentile (pixels)": "memorisation.pixels.ratio_percentiles.1",
        "largest attribute rate difference, empty prompt": "crowd.largest_rate_difference",
        "FID (n as above)": "fid.generated",
    }  # fmt: skip
    present = {name: lookup(report, path) for name, path in figures.items()}
    if any(value is not None for value in present.values()):
        lines += ["| figure | value |", "| --- | --- |"]
        lines += [_row(name, float(value)) for name, value in present.items() if value is not None] + [""]
    return "\n".join(lines)


def verdict(report: Mapping[str, Any]) -> str:
    """Which checks and targets of a report are met, and how long it took, in a line each."""
    checks, targets = report.get("checks", {}), report.get("targets", [])
    lines = []
    for what, all_, missed in (
        ("checks", checks, [name for name, held in checks.items() if not held]),
        ("targets", targets, [f"{one['figure']} is {one['value']:.4g}, "
                              + " and ".join(f"{side} {one[side]:g}" for side in ("min", "max") if side in one)
                              for one in targets if not one["met"]]),
    ):
        if all_:
            lines.append(f"{what}: {len(all_) - len(missed)} of {len(all_)} met"
                         + (f"; not met: {'; '.join(missed)}" if missed else ""))
    lines.append(f"measured in {sum(report.get('seconds', {}).values()):.0f} s")
    return "\n".join(lines)


def save_figures(folder: str | Path, name: str, figures: Mapping[str, Any], page: str = "") -> None:
    """Write figures as NAME.json, and as NAME.md what a person reads; print the latter, where there is one, else them.
    """
    text, folder = json.dumps(figures, indent=1) + "\n", Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if page:
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
    print(page or text)


def write(report: dict[str, Any], curves: Mapping[str, tuple[Array, Array]], folder: Path) -> dict[str, Any]:
    """Write report.json, table.md and the plots; returns the report as the JSON holds it, targets added."""
    folder.mkdir(parents=True, exist_ok=True)
    final = plain(report)
    final["targets"] = judged_targets(final)
    write_atomically(folder / "report.json", (json.dumps(final, indent=2, allow_nan=False) + "\n").encode())
    write_atomically(folder / "table.md", table(final).encode())
    plot_all(final, curves, folder)
    return dict(final)
