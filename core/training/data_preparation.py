"""How does a source become a prepared store, in several processes, without losing work when it is killed?

Workers decode the images of a plan and write them as rows of one array file; a progress file says which rows are on
disk; only a finished and counted store gets its `manifest.json`, the very last file. Who finds no manifest finds no
store. This file does not know what a store is used for, nor how training opens it.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import struct
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from core.command import FolderLock
from core.text.lexicon import ATTRIBUTES
from core.training.arrays import amount, new_array
from core.training.cropping import ALIGNED, SIZE, WINDOW, Box, cut, to_rgb
from core.training.data_sources import (
    COLUMNS,
    HOW_TO_GET_DATA,
    SPLITS,
    DataError,
    How,
    Plan,
    default_plan,
    make_plan,
)
from core.training.duplicates import first_of_same
from core.training.source_files import Entry, close_zips

ROW_BYTES = SIZE * SIZE * 3
CHUNK = 64  # images a worker takes at a time
SAVE_EVERY_S = 5.0
BROKEN = -1  # in the progress file's px; 0 is "not yet decoded"
UNREADABLE = (  # all that Pillow and zipfile are known to raise for bytes they cannot make sense of
    OSError, ValueError, SyntaxError, RuntimeError, MemoryError, zlib.error, zipfile.BadZipFile, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip

Result = tuple[int, int, str]  # row, px of the source or BROKEN, why it is broken


# The store's files


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete store, or None; one that is not JSON counts as absent, so the store is rebuilt."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("complete") is True else None


def write_text(path: Path, text: str) -> None:
    """Write aside, sync, rename: a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_store(
    folder: Path,
    pixels: Path,
    table: pd.DataFrame,
    details: Mapping[str, Any],
    labels: Mapping[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Put a finished array file and its index in place; returns the manifest.

    The old manifest goes first and the new one comes last, so a crash between them leaves no store, never a wrong one.
    """
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "text_labels.json").unlink(missing_ok=True)
    table = table[list(COLUMNS)].astype({name: np.int8 for name in ATTRIBUTES})
    write_text(folder / "index.csv", table.to_csv(index=False, lineterminator="\n"))
    if labels is not None:
        own = {image_id: labels[image_id] for image_id in table["image_id"]}
        write_text(folder / "text_labels.json", json.dumps(own, ensure_ascii=False, indent=0))
    with open(pixels, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(pixels, folder / "images.npy")
    manifest = {
        "format": 1,
        "complete": True,
        "count": len(table),
        "image": {"size": SIZE, "window": list(WINDOW), "of": list(ALIGNED)},
        "splits": {split: int((table["split"] == split).sum()) for split in SPLITS},
        "px": {str(px): int(n) for px, n in table["px"].value_counts().sort_index().items()},
        "identities": int(table.loc[table["identity"] >= 0, "identity"].nunique()),
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **details,
    }
    write_text(folder / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=2) + "\n")
    return manifest


def is_intact(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Are the files that a manifest speaks of there, with the shape it says?"""
    try:
        shape = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False).shape
    except (OSError, ValueError):
        return False
    return shape == (manifest["count"], SIZE, SIZE, 3) and (folder / "index.csv").is_file()


# Decoding, in parallel


@dataclass(frozen=True)
class Task:
    """A worker's share: decode these entries and write them at these rows of the array file."""

    path: str
    offset: int  # bytes before row 0
    kind: str
    crop: str
    rows: list[tuple[int, Entry, int, Box | None]]  # row, entry, px that the labels promise, window of its landmarks


def decode_rows(task: Task) -> list[Result]:
    """Decode and write one share. Plain writes and no memory map: a full disk is an OSError then, and not a SIGBUS."""
    results: list[Result] = []
    with open(task.path, "r+b") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd EXIF or palettes; what Pillow cannot decode it raises
        for row, entry, px, window in task.rows:
            try:
                with Image.open(io.BytesIO(entry.read())) as image:
                    pixels, px = cut(to_rgb(image), task.kind, px, task.crop, window)
            except UNREADABLE as error:
                said = str(error)
                results.append((row, BROKEN, said if entry.path in said else f"{entry.name}: {said}"))
                continue
            file.seek(task.offset + row * ROW_BYTES)
            file.write(np.ascontiguousarray(pixels).data)
            results.append((row, px, ""))
    return results


def leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def start_worker() -> None:
    """Ctrl-C belongs to the parent; and a worker whose parent was killed leaves too, instead of waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def run_tasks(tasks: Sequence[Task], workers: int) -> Iterator[list[Result]]:
    """Run in this process or in several. Always "spawn": forking a process that has threads may deadlock."""
    if workers <= 1:
        yield from map(decode_rows, tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        for future in as_completed([pool.submit(decode_rows, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker died (out of memory?); run again with fewer --workers, it will continue") from error
    finally:
        pool.shutdown(cancel_futures=True)


# Progress


class Progress:
    """Which rows of the unfinished array are written: `px` is 0 before, the source's px after, BROKEN if it cannot."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Continue the unfinished work of the same plan in this folder, or begin it."""
        self.array, self.state = folder / "images.partial.npy", folder / "progress.npz"
        self.fingerprint = plan.fingerprint
        self.px = np.zeros(len(plan.entries), np.int16)
        self.broken: dict[str, str] = {}  # row -> why
        self.saved_at = -math.inf
        shape = (len(plan.entries), SIZE, SIZE, 3)
        try:
            with open(self.state, "rb") as file, np.load(file, allow_pickle=False) as state:
                if str(state["fingerprint"]) == self.fingerprint:
                    array = np.load(self.array, mmap_mode="r", allow_pickle=False)
                    if array.shape == shape:
                        self.offset = array.offset
                        self.px, self.broken = state["px"], json.loads(str(state["broken"]))
                        return
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            self.px[:] = 0  # absent or cut short: begin again
        self.state.unlink(missing_ok=True)
        self.array.unlink(missing_ok=True)
        need, free = len(self.px) * ROW_BYTES, shutil.disk_usage(folder).free
        if free < need * 1.02:
            sizes = f"needs {amount(need * 1.02)}, its disk has {amount(free)} free"
            raise DataError(f"{folder} {sizes}; choose another --out")
        self.offset = new_array(self.array, np.uint8, shape).offset

    @property
    def done(self) -> int:
        return int(np.count_nonzero(self.px))

    def note(self, results: list[Result]) -> None:
        for row, px, why in results:
            self.px[row] = px
            if px == BROKEN:
                self.broken[str(row)] = why
        if time.monotonic() - self.saved_at > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Pixels reach the disk before the note that says they did."""
        with open(self.array, "r+b") as file:
            os.fsync(file.fileno())
        aside = self.state.with_suffix(".tmp")
        with open(aside, "wb") as file:
            np.savez(file, fingerprint=self.fingerprint, px=self.px, broken=json.dumps(self.broken))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.state)
        self.saved_at = time.monotonic()


# The whole road


@dataclass(frozen=True)
class Report:
    """What preparation did and found; `manifest["problems"]` has a count and up to 100 examples of each problem."""

    folder: Path
    manifest: Mapping[str, Any]
    resumed: int  # images that an earlier run had decoded
    rebuilt: bool  # False: the store was complete already

    def text(self) -> str:
        """The report for people."""
        facts = self.manifest
        shares = [", ".join(f"{name} {n:,}" for name, n in facts[key].items()) for key in ("splits", "px")]
        places, *others = facts["sources"]["containers"]
        places += f" and {len(others)} more" if others else ""
        state = "complete" if self.rebuilt else "complete already, nothing to do"
        lines = [
            f"{self.folder}: {facts['count']:,} images, {state}",
            f"  source: {facts['sources']['kind']} in {places}" + (f" ({facts['form']})" if "form" in facts else ""),
            f"  splits: {shares[0]}; px: {shares[1]}; identities: {facts['identities']:,}",
        ]
        if self.rebuilt and self.resumed:
            lines.append(f"  continued an earlier run: {self.resumed:,} had been decoded before")
        lines += [f"  note: {note}" for note in facts["notes"]]
        for name, found in facts["problems"].items():
            more = "; ..." if found["count"] > 5 else ""
            lines.append(f"  {name}: {found['count']:,} ({'; '.join(found['examples'][:5])}{more})")
        return "\n".join(lines if facts["problems"] else [*lines, "  nothing missing, nothing broken"])


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    archive: str | Path = "archive",
    text_labels: str | Path | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    how: How | None = None,
) -> Report:
    """Build the store in `out` from `sources` (none: the first usable thing under `archive`).

    Progress is kept in `out`, so a killed run continues; a complete store of the same source is left as it is.
    `on_progress` gets (images done, images in all). Raises DataError where there is nothing usable, too little room
    on the disk, or every image is broken.
    """
    out, paths = Path(out), [Path(source) for source in sources]
    own = None if text_labels is None else Path(text_labels)
    how = How() if how is None else how
    plan = make_plan(paths, out, own, how) if paths else default_plan(Path(archive), out, own, how)
    if plan is None or not plan.entries:
        raise DataError(
            f"no images with labels in {', '.join(map(str, paths)) or archive}; --source needs a folder or zip with "
            "img_align_celeba/ and list_attr_celeba.csv or .txt, or tar shards with metadata.csv, or images with "
            f"captions (metadata.csv, .txt beside them, text_labels.json); {HOW_TO_GET_DATA}"
        )
    manifest = read_manifest(out)
    if manifest is not None and manifest.get("fingerprint") == plan.fingerprint and is_intact(out, manifest):
        return Report(out, manifest, manifest["count"], False)
    with FolderLock(out, "preparing pictures"):
        return decode_all(plan, out, workers, on_progress)


def decode_all(plan: Plan, out: Path, workers: int | None, on_progress: Callable[[int, int], None] | None) -> Report:
    """Decode what a plan names and earlier runs have not, and put the store in place."""
    progress = Progress(out, plan)
    resumed = progress.done
    todo = np.flatnonzero(progress.px == 0).tolist()
    if workers is None:  # to start a process costs about as much as to decode 500 images
        workers = min(os.cpu_count() or 1, 16, 1 + len(todo) // 500)
    promised = plan.table["px"].tolist()
    windows = [plan.windows.get(image_id) for image_id in plan.table["image_id"]]
    shares = [todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK)]
    tasks = [
        Task(str(progress.array), progress.offset, plan.kind, plan.crop,
             [(row, plan.entries[row], promised[row], windows[row]) for row in rows])
        for rows in shares
    ]
    try:
        for results in run_tasks(tasks, workers):
            progress.note(results)
            if on_progress is not None:
                on_progress(progress.done, len(progress.px))
    finally:
        progress.save()
        close_zips()
    return finish(out, plan, progress, resumed)


def finish(out: Path, plan: Plan, progress: Progress, resumed: int) -> Report:
    """Drop the rows that could not be decoded, check the counts and put the store in place."""
    good = np.flatnonzero(progress.px > 0)
    reasons = list(progress.broken.values())
    if len(good) + len(reasons) != len(plan.entries):
        counts = f"{len(plan.entries)} pictures, {len(good)} good, {len(reasons)} bad"
        raise DataError(f"{out}: the counts do not agree ({counts}); delete the folder and run again")
    if not len(good):
        raise DataError(f"none of the {len(plan.entries):,} images could be used; the first: {reasons[0]}")
    ids, notes = plan.table["image_id"].tolist(), list(plan.notes)
    array = np.load(progress.array, mmap_mode="r", allow_pickle=False)
    table = plan.table.iloc[good].assign(px=progress.px[good])
    if same := first_of_same(array, good):  # what is trained on must not be held out as well
        shown = "; ".join(f"{ids[row]} and {ids[first]}" for row, first in list(same.items())[:3])
        notes.append(f"{len(same):,} images show what an earlier one shows ({shown}{'; ...' * (len(same) > 3)})")
        if plan.labels is not None:  # elsewhere people stay together
            table.loc[list(same), "split"] = table.loc[list(same.values()), "split"].to_numpy()
            notes[-1] += "; they stay in the split of the first"
    pixels = progress.array
    if reasons:
        pixels = out / "images.compact.npy"
        compact = new_array(pixels, np.uint8, (len(good), SIZE, SIZE, 3))
        for start in range(0, len(good), CHUNK):
            compact[start : start + CHUNK] = array[good[start : start + CHUNK]]
        compact.flush()
        del compact
    del array
    problems = {
        **plan.problems,
        "undecodable": [why for why in reasons if "wrong size" not in why],
        "wrong size": [why for why in reasons if "wrong size" in why],
    }
    if plan.labels is not None and (small := int((table["px"] < SIZE).sum())) * 2 > len(table):
        notes.append(f"{small:,} of {len(table):,} images are smaller than {SIZE} px: they were enlarged and count as "
                     "sharp, and the model will generate images as soft as these")
        table["px"] = SIZE
    details = {
        "attributes": plan.labels is None,
        "sources": {"kind": plan.kind, "containers": sorted({entry.container for entry in plan.entries})},
        "fingerprint": plan.fingerprint,
        "problems": {name: {"count": len(all_), "examples": all_[:100]} for name, all_ in problems.items() if all_},
        "notes": notes,
    } | ({"form": plan.form, "crop": plan.crop} if plan.labels is not None else {})
    manifest = write_store(out, pixels, table, details, plan.labels)
    progress.array.unlink(missing_ok=True)
    progress.state.unlink(missing_ok=True)
    return Report(out, manifest, resumed, True)
