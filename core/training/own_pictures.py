"""What does a person's own folder say about its pictures: which captions, and which split?

Five forms are read: the imagefolder form of the `datasets` library (`metadata.csv` or `metadata.jsonl` with
`file_name` and `text`, in one folder or in one for each split), any other table with a column of files and a column of
captions, a `.txt` or `.json` beside each picture (also in tar shards, as the webdataset library writes them), pictures
sorted into folders, whose names are their captions, and pictures alone. It does not know how files are found
(`core/training/source_files.py`), nor how pictures are cut.

Forms: https://huggingface.co/docs/datasets/image_dataset#imagefolder, https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from core.training.source_files import LISTS, DataError, Entry

FILE_COLUMNS = ("file_name", "image_file", "filename", "file", "image_path", "path", "image", "image_id", "img")
CAPTION_COLUMNS = ("text", "texts", "caption", "captions", "description", "prompt")  # also with a number at the end
FOLDER_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
                 "test": "test", "testing": "test"}
PICTURES_ALONE = "pictures alone"  # the form of a source in which nothing is said
ALONE = "a picture"  # the caption of pictures of which nothing is said
Captions = dict[str, list[str]]


@dataclass(frozen=True)
class OwnPictures:
    """Which form was found, the captions and, where the person gave them, the split of each picture by its path."""

    form: str
    captions: Captions
    split: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def decode_text(entry: Entry) -> str:
    """A list as text. Raises DataError naming the list that cannot be read."""
    try:
        return entry.read().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{entry.container}/{entry.path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{entry.path} is not UTF-8 text: {error}") from error


def read_own(pictures: Sequence[Entry], lists: Sequence[Entry], columns: Sequence[str] = ()) -> OwnPictures:
    """What the lists beside these pictures say, by the first form that fits.

    ``columns`` names the columns of captions in tables (none: those with a usual name). Raises DataError for a list
    that cannot be read, for parquet, and where ``columns`` are in no table.
    """
    if parquet := [entry.path for entry in lists if entry.name.lower().endswith(".parquet")]:
        raise DataError(
            f"{parquet[0]} is parquet, which nothing here reads; with the packages `datasets` and `pyarrow` write its "
            "rows as an imagefolder (pictures and a metadata.jsonl with file_name and text) and give that folder")
    tables = [entry for entry in lists if entry.name.lower().endswith((".csv", ".jsonl")) and not is_celeba(entry)]
    read = [(entry, read_rows(entry)) for entry in tables]
    found = [own for entry, table in read if (own := from_table(entry, table, columns)) is not None]
    if found:
        captions: Captions = {}
        split: dict[str, str] = {}
        for one in found:
            for path, texts in one.captions.items():
                captions[path] = list(dict.fromkeys([*captions.get(path, ()), *texts]))
            split |= one.split
        notes = [note for one in found for note in one.notes]
        return OwnPictures(found[0].form, captions, folder_splits(captions) | split, notes)
    if columns:
        said = "; ".join(f"{entry.path} has {', '.join(map(str, table))}" for entry, table in read) or "there is none"
        raise DataError(f"--caption-columns {' '.join(columns)}: no table has a column of files and these; {said}")
    return from_sidecars(pictures, lists) or from_folders(pictures)


def is_celeba(entry: Entry) -> bool:
    """Whether this is one of CelebA's own lists, or `text_labels.json`, which others read."""
    return entry.stem.lower() in LISTS and entry.stem.lower() != "metadata"


# Tables


def read_rows(entry: Entry) -> pd.DataFrame:
    """A table of strings, comma- or tab-separated, or a JSON object a line. Raises DataError naming the bad line."""
    text = decode_text(entry)
    try:
        if entry.name.lower().endswith(".csv"):
            first = text.split("\n", 1)[0]
            separator = max(",;\t|", key=first.count)
            return pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, sep=separator)
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{entry.path} line {number} is {line[:60]!r}; expected a JSON object")
                rows.append(row)
        return pd.DataFrame(rows, dtype=object).fillna("")
    except json.JSONDecodeError as error:
        raise DataError(f"{entry.path} line {number} is {line[:60]!r}, which is not JSON: {error}") from error
    except (ValueError, IndexError) as error:
        raise DataError(f"{entry.path} cannot be read as a table: {error}") from error


def caption_columns(names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Those of a table that hold captions: those asked for, or all with a usual name, such as `caption_2`."""
    if asked:
        return [name for name in names if name in asked]
    return [name for name in names if re.sub(r"[ _\d]+$", "", str(name).strip().lower()) in CAPTION_COLUMNS]


def from_table(entry: Entry, table: pd.DataFrame, asked: Sequence[str]) -> OwnPictures | None:
    """What one table says; None where it has no column of files or none of captions: then it is about other things."""
    lower = {str(name).strip().lower(): name for name in table}
    files = next((lower[name] for name in FILE_COLUMNS if name in lower), None)
    texts = caption_columns([*map(str, table)], asked)
    if files is None or not texts or (asked and set(asked) - set(texts)):
        return None
    base = entry.path.rpartition("/")[0]
    captions: Captions = {}
    split: dict[str, str] = {}
    empty = 0
    for row in table.to_dict("records"):
        path = joined(base, str(row[files]))
        said = [text for name in texts for text in texts_of(row[name])]
        empty += not said
        if said:
            captions[path] = list(dict.fromkeys([*captions.get(path, ()), *said]))
            if "split" in lower and (name := FOLDER_SPLITS.get(str(row[lower["split"]]).lower())):
                split[path] = name
    notes = [f"{empty} rows of {entry.path} have no caption and were left out"] if empty else []
    form = "imagefolder" if entry.stem.lower() == "metadata" and files == "file_name" else "table"
    return OwnPictures(form, captions, split, [*notes, f"captions: {', '.join(texts)} of {entry.path}"])


def joined(folder: str, path: str) -> str:
    """A path inside a source, from one that is given relative to a folder of it."""
    return os.path.normpath(f"{folder}/{path}" if folder else path).replace("\\", "/")


def texts_of(value: Any) -> list[str]:
    """The captions in a cell: text, or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return [clean for one in values if isinstance(one, str) and (clean := " ".join(one.split()))]


# Files beside pictures


def key_of(entry: Entry) -> tuple[str, str]:
    """What a picture and the text beside it share: where they lie, and their path up to the first dot of the name."""
    folder, _, name = entry.path.rpartition("/")
    return entry.container, f"{folder}/{name.partition('.')[0]}"


def from_sidecars(pictures: Sequence[Entry], lists: Sequence[Entry]) -> OwnPictures | None:
    """Captions in a `.txt` (one a line) or `.json` of the same name beside each picture; None where there is none."""
    beside = {key_of(entry): entry for suffix in (".json", ".txt") for entry in lists
              if entry.name.lower().endswith(suffix)}
    captions = {picture.path: texts for picture in pictures
                if (entry := beside.get(key_of(picture))) and (texts := sidecar(entry))}
    if not captions:
        return None
    tars = any(picture.kind == "tar" for picture in pictures)
    split = {picture.path: name for picture in pictures if tars
             and (name := FOLDER_SPLITS.get(re.split(r"[-_.\d]", os.path.basename(picture.container).lower())[0]))}
    return OwnPictures("webdataset" if tars else "sidecars", captions, folder_splits(captions) | split)


def sidecar(entry: Entry) -> list[str]:
    """The captions of one file beside a picture. Raises DataError where a `.json` is none."""
    text = decode_text(entry)
    if entry.name.lower().endswith(".txt"):
        return list(dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip()))
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{entry.path} is not JSON: {error}") from error
    names = caption_columns(list(found), ()) if isinstance(found, Mapping) else []
    return list(dict.fromkeys(text for name in names for text in texts_of(found[name])))


# Folders


def from_folders(pictures: Sequence[Entry]) -> OwnPictures:
    """The names of the folders that pictures are sorted into, where there are two or more, or one caption for all."""
    named = {picture.path: label for picture in pictures if (label := folder_label(picture.path))}
    paths = [picture.path for picture in pictures]
    if len(set(named.values())) > 1 and len(named) == len(pictures):
        return OwnPictures("folders", {path: [named[path]] for path in paths}, folder_splits(paths),
                           ["captions are the names of the folders"])
    note = (f'nothing is said of these pictures: each has the caption "{ALONE}", and the model will generate pictures '
            "like them whatever the prompt says")
    return OwnPictures(PICTURES_ALONE, {path: [ALONE] for path in paths}, folder_splits(paths), [note])


def folder_label(path: str) -> str:
    """The name of the folder that a picture lies in, as words; "" where that is the top or one of a split."""
    folder = path.rpartition("/")[0].rpartition("/")[2]
    return "" if folder.lower() in FOLDER_SPLITS else " ".join(re.split(r"[\s_\-]+", folder)).strip().lower()


def folder_splits(paths: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """The split of each path that lies in a folder such as `train` or `validation`, at any depth."""
    found = {}
    for path in paths:
        names = [FOLDER_SPLITS[part] for part in path.lower().split("/")[:-1] if part in FOLDER_SPLITS]
        if names:
            found[path] = names[0]
    return found
