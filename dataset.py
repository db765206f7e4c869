"""Which images do we learn from, and what is known about each of them?

`--prepare` turns what a person has (the Kaggle archive or the official CelebA files, as folders or zips; tar shards
with a `metadata.csv`; or any images with their own `text_labels.json`) into one store that training maps into memory:
`images.npy` (uint8 [N, 128, 128, 3], RGB, rows sorted by image id), `index.csv` (image_id, split, identity, px, then
the 40 attributes as 0/1) and `manifest.json`, written last. `--describe` says and plots what is in a store;
`--write-text-labels` writes captions for it; `--synthetic` draws a small stand-in.

It does not know the grammar of captions (`core/text/captions.py`), file formats of sources
(`core/training/data_sources.py`), how work is shared and resumed (`core/training/data_preparation.py`), networks or
batches; no torch here.

Data: Liu, Luo, Wang, Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015, https://arxiv.org/abs/1411.7766
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from core.command import FolderLock, Interrupted, UserError, run_command
from core.quiet import keep_quiet
from core.text.lexicon import ATTRIBUTES
from core.training.arrays import new_array
from core.training.cropping import CROPS, SIZE
from core.training.data_preparation import Report, prepare, read_manifest, write_store, write_text
from core.training.data_sources import COLUMNS, HOW_TO_GET_DATA, SPLITS, DataError, How, load_text_labels
from core.training.own_pictures import PICTURES_ALONE

__all__ = [
    "SPLITS",
    "DataError",
    "FaceStore",
    "Report",
    "describe",
    "load_text_labels",
    "main",
    "plot",
    "prepare",
    "report",
    "synthetic_store",
    "write_text_labels",
]

MAX_MEASURED = 4096  # images that --describe reads for the pixel moments


@dataclass(frozen=True)
class FaceStore:
    """A prepared store, opened. `images` is memory-mapped: index it with small batches, never as a whole.

    Shapes: images uint8 [N, 128, 128, 3]; image_id, split str [N]; identity int64 [N], -1 where unknown; px int16 [N],
    the real resolution of the source; attributes bool [N, 40] in the order of `core.text.captions.ATTRIBUTES`.
    """

    folder: Path
    images: np.ndarray
    image_id: np.ndarray
    split: np.ndarray
    identity: np.ndarray
    px: np.ndarray
    attributes: np.ndarray

    @classmethod
    def open(cls, folder: str | Path) -> FaceStore:
        """Open a complete store; raises DataError with the remedy where it is absent, unfinished or damaged."""
        folder = Path(folder)
        again = f"run `python dataset.py --prepare --out {folder}` (it continues unfinished work)"
        manifest = read_manifest(folder)
        if manifest is None and (folder / "progress.npz").exists():
            raise DataError(f"{folder} holds no complete prepared store, but the beginning of one; {again}")
        if manifest is None:
            raise DataError(f"{folder} holds no complete prepared store; {HOW_TO_GET_DATA}")
        try:
            images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
            table = pd.read_csv(folder / "index.csv", dtype={"image_id": str, "split": str}, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} is damaged ({error}); delete it and {again}") from error
        expected = (manifest["count"], SIZE, SIZE, 3)
        if images.shape != expected or images.dtype != np.uint8 or len(table) != len(images) or tuple(table) != COLUMNS:
            found = f"images.npy holds {images.dtype} {images.shape}, index.csv {len(table)} rows x {table.shape[1]}"
            raise DataError(f"{folder} is damaged: its manifest says {expected}, {found}; delete it and {again}")
        return cls(
            folder=folder,
            images=images,
            image_id=table["image_id"].to_numpy().astype(str),
            split=table["split"].to_numpy().astype(str),
            identity=table["identity"].to_numpy(np.int64),
            px=table["px"].to_numpy(np.int16),
            attributes=table[list(ATTRIBUTES)].to_numpy().astype(bool),
        )

    def __len__(self) -> int:
        return len(self.image_id)

    def select(self, split: str | None = "train", px: int | None = None) -> np.ndarray:
        """Rows of one split (None: all) whose source had this resolution (None: any), ascending.

        Shapes: int64 [n].
        """
        if split is not None and split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be {', '.join(SPLITS)} or None")
        chosen = np.ones(len(self), bool) if split is None else self.split == split
        if px is not None:
            chosen = chosen & (self.px == px)
        return np.flatnonzero(chosen).astype(np.int64)

    def sharp(self, split: str) -> np.ndarray:
        """Rows of one split whose source had every pixel; all of the split where none had.

        Shapes: int64 [n].
        """
        found = self.select(split, SIZE)
        return found if len(found) else self.select(split)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this store from every other, and stays when it is moved: the number of images and a hash."""
        said = str((read_manifest(self.folder) or {}).get("fingerprint", ""))
        return f"{len(self)} pictures, {said if len(said) < 40 else said[:12]}"

    @functools.cached_property
    def text_labels(self) -> dict[str, list[str]] | None:
        """A person's own captions by image id, where the store was prepared from those instead of attributes."""
        path = self.folder / "text_labels.json"
        return load_text_labels(path) if path.is_file() else None

    @functools.cached_property
    def says_nothing(self) -> bool:
        """Whether a person gave pictures alone: then all have one caption, from which nothing is to be learned."""
        return (read_manifest(self.folder) or {}).get("form") == PICTURES_ALONE

    def caption(self, row: int, rng: random.Random, *, empty_share: float = 0.0) -> str:
        """Draw one caption for a row: from its own text labels if the store has them, else from its attributes."""
        from core.text.captions import draw_caption

        if self.text_labels is None:
            return draw_caption(self.attributes[row].tolist(), rng, empty_share=empty_share).text
        return "" if rng.random() < empty_share else rng.choice(self.text_labels[str(self.image_id[row])])


# A drawn stand-in


def synthetic_store(folder: str | Path, count: int = 64, seed: int = 0) -> FaceStore:
    """Draw a small complete store of cartoon faces: two a person, every split and px, faces that show their attributes.

    It serves tests and a first try of every command; nothing about real faces is to be learned from it. `count` >= 8.
    """
    from core.training.synthetic_faces import draw_face, random_attributes

    if count < 8:
        raise ValueError(f"count is {count}; at least 8 are needed to have every split and px")
    folder = Path(folder)
    present = read_manifest(folder)
    if present is not None and present["sources"]["kind"] != "synthetic":
        raise DataError(f"{folder} holds a store of {present['count']} real images; give drawn faces another --out")
    folder.mkdir(parents=True, exist_ok=True)
    people = (count + 1) // 2
    held_out = max(1, people // 8)
    pixels = folder / "images.partial.npy"
    images = new_array(pixels, np.uint8, (count, SIZE, SIZE, 3))
    rows: list[dict[str, Any]] = []
    for row in range(count):
        person = row // 2
        split = "test" if person >= people - held_out else "val" if person >= people - 2 * held_out else "train"
        px = (128, 80, 128, 58)[row % 4] if split == "train" else 128  # only training has soft ones, as in the shards
        rng = random.Random(f"{seed}:{row}")
        attributes = random_attributes(rng)
        images[row] = draw_face(attributes, rng, px)
        rows.append({"image_id": f"{row + 1:06d}.jpg", "split": split, "identity": person, "px": px, **attributes})
    images.flush()
    del images
    details = {
        "attributes": True,
        "sources": {"kind": "synthetic", "containers": [f"{count} drawn faces, seed {seed}"]},
        "fingerprint": f"synthetic {count} {seed}",
        "problems": {},
        "notes": ["drawn faces, for tests only"],
    }
    write_store(folder, pixels, pd.DataFrame(rows), details)
    return FaceStore.open(folder)


# Text labels


def write_text_labels(store: FaceStore, path: str | Path, captions_per_image: int = 4, seed: int = 0) -> int:
    """Write image id -> captions for a whole store; the same seed gives an image the same captions in any store."""
    if captions_per_image < 1:
        raise DataError(f"--captions-per-image is {captions_per_image}; it must be at least 1")
    path = Path(path)
    if path.exists():  # it may be a person's own work
        raise DataError(f"{path} exists and is not overwritten; delete it or name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    labels: dict[str, list[str]] = {}
    ids = store.image_id.tolist()
    for row, image_id in enumerate(tqdm(ids, desc="captions", unit="image", mininterval=0.5, disable=None)):
        rng = random.Random(f"{seed}:{image_id}")
        labels[image_id] = [store.caption(row, rng) for _ in range(captions_per_image)]
    write_text(path, json.dumps(labels, ensure_ascii=False, indent=0) + "\n")
    return len(labels)


# Description


def correlations(attributes: np.ndarray) -> np.ndarray:
    """Pearson (for binary values: phi) correlation; an attribute that never varies correlates with nothing.

    Shapes: bool [N, A] -> float64 [A, A].
    """
    centred = attributes - attributes.mean(axis=0)
    spread = centred.std(axis=0)
    unit = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    return unit.T @ unit / len(attributes)


def pixel_histogram(store: FaceStore, rows: np.ndarray) -> np.ndarray:
    """How often each channel has each value. Shapes: int64 [3, 256]."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(rows), 64):
        pixels = store.images[rows[start : start + 64]]
        for channel in range(3):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    return counts


def describe(store: FaceStore) -> dict[str, Any]:
    """Measure a store: sizes, splits, px, people, attribute rates and correlations, pixel moments in [-1, 1].

    Pixel moments come from up to 4,096 of the sharpest training images, spread evenly over the store.
    """
    manifest = read_manifest(store.folder) or {}
    table = pd.DataFrame({"split": store.split, "px": store.px, "identity": store.identity})
    known = table[table["identity"] >= 0]
    sharp = store.sharp("train")
    sharp = sharp if len(sharp) else store.select(None)
    sample = np.unique(np.linspace(0, len(sharp) - 1, min(len(sharp), MAX_MEASURED)).astype(np.int64))
    counts = pixel_histogram(store, sharp[sample])
    values = np.arange(256) / 127.5 - 1
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    summary: dict[str, Any] = {
        "folder": str(store.folder),
        "count": len(store),
        "splits": {split: int((store.split == split).sum()) for split in SPLITS},
        "px": {
            split: {str(px): int(n) for px, n in group["px"].value_counts().sort_index().items()}
            for split, group in table.groupby("split")
        },
        "identities": int(known["identity"].nunique()),
        "images_per_identity": round(len(known) / max(1, known["identity"].nunique()), 2),
        "people_in_two_splits": int((known.groupby("identity")["split"].nunique() > 1).sum()),
        "pixels": {
            "images": len(sample),
            "mean": [round(float(one), 4) for one in mean],
            "std": [round(float(one), 4) for one in np.sqrt(share @ values**2 - mean**2)],
            "histogram": counts.tolist(),
        },
        "attributes_known": bool(manifest.get("attributes", True)),
    }
    if summary["attributes_known"]:
        present = [split for split in SPLITS if summary["splits"][split]]
        rates = {split: store.attributes[store.split == split].mean(axis=0) for split in present}
        summary["rates"] = {
            name: {split: round(float(rates[split][column]), 4) for split in present}
            for column, name in enumerate(ATTRIBUTES)
        }
        matrix = correlations(store.attributes)
        pairs = [(float(matrix[a, b]), ATTRIBUTES[a], ATTRIBUTES[b]) for a in range(40) for b in range(a)]
        pairs.sort(key=lambda pair: -abs(pair[0]))
        summary["correlations"] = [[round(value, 3), first, second] for value, first, second in pairs[:16]]
    return summary


def report(summary: dict[str, Any]) -> str:
    """A description as text for people."""
    pixels = summary["pixels"]
    lines = [
        f"{summary['folder']}: {summary['count']:,} images of {SIZE}x{SIZE}",
        "splits: " + ", ".join(f"{split} {count:,}" for split, count in summary["splits"].items()),
        *(
            f"  px in {split}: " + ", ".join(f"{px}: {count:,}" for px, count in summary["px"][split].items())
            for split in SPLITS
            if split in summary["px"]
        ),
        f"people: {summary['identities']:,}, {summary['images_per_identity']} images each, "
        f"{summary['people_in_two_splits']} in more than one split"
        if summary["identities"]
        else "people: unknown",
        f"pixels in [-1, 1] of {pixels['images']:,} sharp training images: mean {pixels['mean']}, std {pixels['std']}",
    ]
    if not summary["attributes_known"]:
        return "\n".join([*lines, "attributes: unknown, the store has its user's own captions"])
    splits = list(next(iter(summary["rates"].values())))
    lines.append(f"{'share with attribute':24}" + "".join(f"{split:>9}" for split in splits))
    for name, rates in sorted(summary["rates"].items(), key=lambda item: -item[1][splits[0]]):
        lines.append(f"  {name:22}" + "".join(f"{100 * rates[split]:8.1f}%" for split in splits))
    lines.append("strongest correlations:")
    lines += [f"  {value:+.2f}  {first} / {second}" for value, first, second in summary["correlations"]]
    return "\n".join(lines)


def plot(store: FaceStore, summary: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draw what `describe` measured, with examples and their captions; returns the files written."""
    from matplotlib.figure import Figure  # its own canvas: no window, no global state

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    if summary["attributes_known"]:
        splits = list(next(iter(summary["rates"].values())))
        order = sorted(ATTRIBUTES, key=lambda name: summary["rates"][name][splits[0]])
        figure = figures["attribute_rates"] = Figure(figsize=(8, 10), layout="constrained")
        axes = figure.subplots()
        for number, split in enumerate(splits):
            places = np.arange(len(order)) + 0.27 * (1 - number)
            axes.barh(places, [summary["rates"][name][split] for name in order], height=0.27, label=split)
        axes.set_yticks(np.arange(len(order)), [name.replace("_", " ") for name in order], fontsize=8)
        axes.set(title="Share of images with each attribute", xlim=(0, 1), ylim=(-0.6, len(order) - 0.4))
        axes.legend()
        figure = figures["correlations"] = Figure(figsize=(10, 9), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(correlations(store.attributes), cmap="RdBu_r", vmin=-1, vmax=1)
        names = [name.replace("_", " ") for name in ATTRIBUTES]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title("Correlation of attributes")
        figure.colorbar(shown)
    figure = figures["examples"] = Figure(figsize=(12, 10), layout="constrained")
    rng = random.Random(0)
    rows = sorted(rng.sample(range(len(store)), min(15, len(store))))
    for axes in figure.subplots(3, 5).flat:
        axes.axis("off")
        if rows:
            row = rows.pop(0)
            axes.imshow(store.images[row])
            title = textwrap.shorten(store.caption(row, rng), 150, placeholder=" ...")
            title = f"{store.image_id[row]}, {store.split[row]}, {store.px[row]} px\n" + textwrap.fill(title, 36)
            axes.set_title(title, fontsize=7, parse_math=False)
    figure = figures["pixel_histogram"] = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for counts, colour in zip(summary["pixels"]["histogram"], ("tab:red", "tab:green", "tab:blue"), strict=True):
        axes.plot(np.asarray(counts) / max(1, sum(counts)), color=colour, linewidth=1)
    axes.set(title=f"Pixel values of {summary['pixels']['images']:,} images", xlabel="value", ylabel="share")
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    write_text(folder / "describe.json", json.dumps(summary, indent=1) + "\n")
    return [folder / f"{name}.png" for name in figures] + [folder / "describe.json"]


# Command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse ends the process with 2 where it makes no sense."""
    parser = argparse.ArgumentParser(prog="dataset.py", description="Prepare and describe the images to learn from.",
                                     allow_abbrev=False)
    parser.add_argument("--prepare", action="store_true", help="build the store; the same command continues it")
    parser.add_argument(
        "--source", nargs="+", type=Path, default=[], metavar="PATH",
        help="folders, zips or tars with the images and their lists (default: the first usable one in archive/)",
    )  # fmt: skip
    parser.add_argument("--text-labels", type=Path, metavar="PATH", help="your own captions, instead of attributes")
    parser.add_argument("--caption-columns", nargs="+", default=[], metavar="NAME",
                        help="columns of captions in your tables (default: text, caption, caption_2, prompt, ...)")
    parser.add_argument("--crop", choices=tuple(CROPS), default="center", help="what is kept of your own pictures: "
                        + "; ".join(f"{name}, {what}" for name, what in CROPS.items()))
    parser.add_argument("--workers", type=int, help="processes that decode (default: by the number of cores)")
    parser.add_argument("--synthetic", type=int, metavar="COUNT", help="draw a store of cartoon faces into --out")
    parser.add_argument("--describe", action="store_true", help="print and plot what is in the store")
    parser.add_argument("--plots", type=Path, default=Path("runs/describe"), help="where --describe puts its plots")
    parser.add_argument(
        "--write-text-labels", nargs="?", type=Path, const=Path("archive/text_labels.json"), metavar="PATH",
        help="write image id -> captions (default: archive/text_labels.json)",
    )  # fmt: skip
    parser.add_argument("--captions-per-image", type=int, default=4, metavar="K")
    parser.add_argument("--seed", type=int, default=0, help="for drawn captions and drawn faces")
    parser.add_argument("--out", type=Path, default=Path("archive/prepared"), help="the store's folder")
    options = parser.parse_args(argv)
    if not (options.prepare or options.describe or options.write_text_labels or options.synthetic is not None):
        parser.error("nothing to do: give --prepare, --describe, --write-text-labels or --synthetic")
    if options.synthetic is not None and options.synthetic < 8:
        parser.error(f"--synthetic is {options.synthetic}; at least 8 are needed to have every split and px")
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers is {options.workers}; it must be at least 1")
    return options


def run_prepare(options: argparse.Namespace) -> Report:
    """Prepare with a progress bar, which appears once the number of images is known."""
    with tqdm(total=0, desc="prepare", unit="image", mininterval=0.5, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return prepare(
            options.source, options.out, text_labels=options.text_labels, workers=options.workers, on_progress=show,
            how=How(options.crop, tuple(options.caption_columns)),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when the data is not usable (the reason goes to stderr), or 130 when interrupted."""
    keep_quiet()
    options = parse(argv)
    try:
        if options.synthetic is not None:
            with FolderLock(options.out, "preparing pictures"):
                store = synthetic_store(options.out, options.synthetic, options.seed)
            print(f"{options.out}: {len(store)} drawn faces")
        if options.prepare:
            print(run_prepare(options).text())
        if options.describe:
            store = FaceStore.open(options.out)
            summary = describe(store)
            print(report(summary))
            print("plots: " + ", ".join(str(path) for path in plot(store, summary, options.plots)))
        if options.write_text_labels:
            store = FaceStore.open(options.out)
            count = write_text_labels(store, options.write_text_labels, options.captions_per_image, options.seed)
            print(f"{options.write_text_labels}: captions of {count:,} images")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:  # by run_command, which knows the signal
        raise Interrupted(error.signum, "interrupted; the same command continues") from None
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
