"""What kind of source is it, and which image has which labels?

`make_plan` recognises the kind of source from the files in it (`core.training.source_files`) and gives each labelled
row its image. It does not know what the files beside a person's own pictures say (`core.training.own_pictures`), how
images are cut (`core.training.cropping`), the prepared store, nor who trains on it.

CelebA: https://arxiv.org/abs/1411.7766
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from core.text.lexicon import ATTRIBUTES
from core.training.cropping import CROPS, SIZE, WINDOW, Box, face_window
from core.training.own_pictures import PICTURES_ALONE, decode_text, read_own
from core.training.source_files import LISTS, DataError, Entry, find, is_picture, scan, told_apart

SPLITS = ("train", "val", "test")  # in the order of CelebA's partition numbers 0, 1, 2
COLUMNS = ("image_id", "split", "identity", "px", *ATTRIBUTES)  # of a prepared index
CELEBA_COUNT = 202_599  # images in the whole data set

HOW_TO_GET_DATA = (
    "get CelebA from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (or as a zip from Kaggle, "
    "jessicali9530/celeba-dataset) and run `python dataset.py --prepare --source FOLDER_OR_ZIP`, or try everything on "
    "drawn faces: `python dataset.py --synthetic 64 --out archive/tiny`, then --data archive/tiny"
)


# Reading labels


def read_pairs(entry: Entry | None) -> dict[str, int]:
    """`image number` lists (partition, identity), with commas or blanks, with or without a header; {} for no list."""
    pairs: dict[str, int] = {}
    for number, line in enumerate(decode_text(entry).splitlines() if entry else [], start=1):
        words = line.replace(",", " ").split()
        try:
            if words:
                pairs[words[0]] = int(words[1])
        except (IndexError, ValueError) as error:
            if number > 2:  # the first lines may be a count and a header
                where = f"{entry.path if entry else ''} line {number}"
                raise DataError(f"{where} is {line!r}; expected an image name and a number") from error
    return pairs


def read_columns(entry: Entry, columns: Sequence[str]) -> pd.DataFrame:
    """A table that has image_id and these columns: CelebA's csv, its txt (count line first), or metadata.csv."""
    text = decode_text(entry)
    try:
        if entry.name.lower().endswith(".csv"):
            table = pd.read_csv(io.StringIO(text), dtype={"image_id": str, "split": str, "shard": str})
        else:
            skip = 1 if text.split(None, 1)[0].isdigit() else 0
            table = pd.read_csv(io.StringIO(text), sep=r"\s+", skiprows=skip)
            if "image_id" not in table:  # the official header names the attributes only: pandas made the ids its index
                table = table.rename_axis("image_id").reset_index()
    except (ValueError, IndexError) as error:
        raise DataError(f"{entry.path} cannot be read as a table: {error}; download it again") from error
    if missing := [name for name in ("image_id", *columns) if name not in table]:
        expected = "CelebA's 40 attributes" if columns == ATTRIBUTES else ", ".join(("image_id", *columns))
        raise DataError(f"{entry.path} lacks the columns {', '.join(missing)}; expected {expected}")
    return table


def read_table(entry: Entry) -> pd.DataFrame:
    """A table whose 40 attributes are bool: CelebA's csv (-1/1), its txt (count line first), or metadata.csv (0/1)."""
    table = read_columns(entry, ATTRIBUTES)
    values = table[list(ATTRIBUTES)]
    if not values.isin((-1, 0, 1)).to_numpy().all():
        raise DataError(f"{entry.path} holds attribute values other than -1, 0 and 1; download it again")
    return pd.concat([table.drop(columns=list(ATTRIBUTES)).astype({"image_id": str}), values == 1], axis=1)


def parse_text_labels(text: str, where: str) -> dict[str, list[str]]:
    """Check `{"image id": "caption" | ["caption", ...]}`; raises DataError naming the entry that is wrong."""
    form = 'expected {"image id": "caption"} or {"image id": ["caption", ...]}'

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        labels: dict[str, Any] = {}
        for image_id, captions in pairs:
            if image_id in labels:
                raise DataError(f"{where}: {image_id!r} appears twice; give all captions of an image in one list")
            labels[image_id] = captions
        return labels

    try:
        labels = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}; {form}") from error
    if not isinstance(labels, dict) or not labels:
        raise DataError(f"{where} holds {'no entry' if labels == {} else type(labels).__name__}; {form}")
    checked: dict[str, list[str]] = {}
    for image_id, given in labels.items():
        captions = [given] if isinstance(given, str) else given
        if not isinstance(captions, list) or not captions:
            raise DataError(f"{where}: {image_id!r} has {given!r}; {form}")
        if bad := [one for one in captions if not isinstance(one, str) or not one.strip()]:
            raise DataError(f"{where}: {image_id!r} has the caption {bad[0]!r}; a caption is text and not empty")
        checked[image_id] = captions
    return checked


def load_text_labels(path: str | Path) -> dict[str, list[str]]:
    """Read a `text_labels.json`: image id -> captions. Raises DataError with what is wrong and the form expected."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"text labels {path} cannot be read as UTF-8 text: {error}") from error
    return parse_text_labels(text, str(path))


# Matching rows with images


def drawn_split(key: str) -> str:
    """Where no partition is given: 90 / 5 / 5 % by a stable hash of the person or image."""
    share = zlib.crc32(key.encode()) % 100
    return "train" if share < 90 else "val" if share < 95 else "test"


def with_every_split(split: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """The same splits, with at least one key in forty in each of `val` and `test`, and two: chance leaves a small
    set without any, and what was never held out cannot be measured. Fewer than ten keys stay as they are drawn.

    Shapes: str [N], and the person or image of each.
    """
    order = sorted(set(keys), key=lambda key: zlib.crc32(key.encode()[::-1]))
    if len(order) < 10:
        return split
    home = dict(zip(keys, split.tolist(), strict=True))
    for name in ("val", "test"):
        missing = max(2, len(order) // 40) - sum(one == name for one in home.values())
        for key in [key for key in order if home[key] == "train"][: max(0, missing)]:
            home[key] = name
    return np.array([home[key] for key in keys])


def keep_people_together(split: np.ndarray, identity: np.ndarray) -> tuple[np.ndarray, int]:
    """Send each person whole to the split that holds most of their images; count the people who were in several.

    Shapes: split str [N], identity int [N] with -1 for unknown (left alone) -> split [N].
    """
    together = split.copy()
    known = pd.DataFrame({"identity": identity, "split": split})[identity >= 0]
    counts = pd.crosstab(known["identity"], known["split"]).reindex(columns=list(SPLITS), fill_value=0)
    crossing = counts[(counts > 0).sum(axis=1) > 1]
    for person, home in crossing.idxmax(axis=1).items():
        together[identity == person] = home
    return together, len(crossing)


@dataclass(frozen=True)
class Plan:
    """What is to be decoded: one row of `table` for each of `entries`, and what was found wrong so far."""

    kind: str  # shards | kaggle | official | captions
    table: pd.DataFrame
    entries: list[Entry]
    labels: dict[str, list[str]] | None
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    form: str = ""  # of captions: text_labels.json, or one of `core.training.own_pictures`
    crop: str = "center"
    windows: dict[str, Box] = field(default_factory=dict)  # image id -> where its landmarks say that the face is

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of names, labels and file sizes: one source gives one store, wherever it lies on the disk."""
        digest = hashlib.sha256(f"1 {self.kind} {SIZE} {WINDOW} {json.dumps(self.labels)}".encode())
        digest.update(self.table.to_csv(index=False, lineterminator="\n").encode())
        digest.update(" ".join(f"{entry.name}:{entry.size}" for entry in self.entries).encode())
        if self.crop != "center" or self.windows:
            digest.update(f"{self.crop} {json.dumps(self.windows, sort_keys=True)}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class How:
    """How a person's own pictures are read: one of `CROPS`, the columns of captions in tables (none: those with a usual
    name), and whether pictures of which nothing is said are taken at all."""

    crop: str = "center"
    caption_columns: tuple[str, ...] = ()
    alone: bool = True


def make_plan(sources: Sequence[Path], out: Path, text_labels: Path | None = None, how: How = How()) -> Plan | None:
    """Recognise what the sources are and match rows with images; None if they hold no labels or no images.

    `text_labels` names a person's own captions, which then stand instead of any attributes. Raises DataError.
    """
    if how.crop not in CROPS:
        raise DataError(f"--crop is {how.crop!r}; it must be one of {', '.join(CROPS)}")
    entries: list[Entry] = []
    unreadable: list[str] = []
    for source in sources:
        more, broken = scan(source, out)
        entries += more
        unreadable += broken
    pictures = [entry for entry in entries if is_picture(entry.name)]
    lists = {stem: find(entries, stem) for stem in LISTS}
    attributes, own, form = lists["list_attr_celeba"], lists["text_labels"], "text_labels.json"
    given: dict[str, str] = {}  # image id -> split, where the person's own files say it
    labels: dict[str, list[str]] | None = None
    notes: list[str] = []
    problems: dict[str, list[str]] = {"unreadable archive": unreadable}
    if not pictures:
        if unreadable:
            raise DataError(f"cannot read {'; '.join(unreadable)}; it is probably cut short, download it again")
        return None
    if text_labels is None and is_shard_list(lists["metadata"]) and any(entry.kind == "tar" for entry in pictures):
        kind, table = "shards", read_table(cast(Entry, lists["metadata"]))
        if missing := [name for name in ("split", "identity", "px", "shard") if name not in table]:
            raise DataError(f"metadata.csv lacks the columns {', '.join(missing)}")
        shard_names = set(table["shard"])
        pictures = [entry for entry in pictures if Path(entry.container).name in shard_names]
        problems["missing shard"] = sorted(shard_names - {Path(entry.container).name for entry in pictures})
    elif text_labels is None and attributes:
        kind, table = "kaggle" if attributes.name.lower().endswith(".csv") else "official", read_table(attributes)
        if own:
            notes.append(f"{own.path} lies there too but the attributes are used; --text-labels makes it replace them")
        if len(table) != CELEBA_COUNT:
            notes.append(f"{attributes.path} lists {len(table):,} images; the whole of CelebA has {CELEBA_COUNT:,}")
    elif text_labels is not None:
        labels = load_text_labels(text_labels)
    elif own is not None:
        labels = parse_text_labels(decode_text(own), own.path)
    else:
        entries = told_apart(entries)
        pictures = [entry for entry in entries if is_picture(entry.name)]
        found = read_own(pictures, [entry for entry in entries if not is_picture(entry.name)], how.caption_columns)
        if not how.alone and found.form in ("folders", PICTURES_ALONE):
            return None
        labels, form, given = found.captions, found.form, found.split
        notes += found.notes
    if labels is not None:
        kind, table = "captions", pd.DataFrame({"image_id": list(labels), **dict.fromkeys(ATTRIBUTES, False)})
        notes.append("captions are the user's own; attributes are unknown and stored as all false")
    table = label_rows(table, kind, lists, problems, notes, given)
    windows = {} if how.crop != "face" else face_windows(entries, table["image_id"].tolist(), notes)
    return match(Plan(kind, table, pictures, labels, problems, notes, form if labels else "", how.crop, windows))


def is_shard_list(entry: Entry | None) -> bool:
    """Whether a `metadata.csv` is that of the shards of CelebA, and not one of a person's own pictures."""
    return entry is not None and entry.name.lower().endswith(".csv") and (
        "file_name" not in decode_text(entry).partition("\n")[0])


def face_windows(entries: Sequence[Entry], ids: Sequence[str], notes: list[str]) -> dict[str, Box]:
    """The window of each image whose eyes a `list_landmarks*` file names; raises DataError where there is none."""
    lists = [entry for entry in entries if entry.stem.lower().startswith("list_landmarks")]
    if not lists:
        raise DataError("--crop face needs the places of the eyes: a list_landmarks*.csv or .txt with the columns "
                        "image_id, lefteye_x, lefteye_y, righteye_x, righteye_y; give it, or another --crop")
    wanted, known = {os.path.splitext(one)[0] for one in ids} | set(ids), {}
    for entry in lists:
        table = read_columns(entry, ("lefteye_x", "lefteye_y", "righteye_x", "righteye_y"))
        for row in table.to_dict("records"):
            if (name := str(row["image_id"])) in wanted or os.path.splitext(name)[0] in wanted:
                eyes = (row["lefteye_x"], row["lefteye_y"]), (row["righteye_x"], row["righteye_y"])
                try:
                    known[name] = face_window(*eyes)
                except (TypeError, ValueError) as error:
                    raise DataError(f"{entry.path}: {name}: {error}") from error
    stems = {os.path.splitext(name)[0]: window for name, window in known.items()}
    found = {one: window for one in ids if (window := known.get(one) or stems.get(os.path.splitext(one)[0]))}
    notes.append(f"{len(found):,} of {len(ids):,} images are cut around the eyes; the others have no landmarks")
    return found


def label_rows(
    table: pd.DataFrame,
    kind: str,
    lists: Mapping[str, Entry | None],
    problems: dict[str, list[str]],
    notes: list[str],
    given: Mapping[str, str],
) -> pd.DataFrame:
    """Sort by image id and fill in split, identity and px (0: whatever the image turns out to have).

    ``given`` has the splits that a person's own files name; a list_eval_partition is asked before them.
    """
    twice = table["image_id"].duplicated()
    problems["row given twice"] = table.loc[twice, "image_id"].tolist()
    table = table[~twice].sort_values("image_id", ignore_index=True)
    ids = table["image_id"]
    if kind == "shards":
        if bad := sorted(set(map(str, table["split"])) - set(SPLITS)):
            raise DataError(f"metadata.csv has the split {bad[0]!r}; expected {', '.join(SPLITS)}")
        split: np.ndarray = table["split"].to_numpy(str)
        px: np.ndarray = table["px"].to_numpy(np.int64)
        identity: np.ndarray = table["identity"].fillna(-1).to_numpy(np.int64)
    else:
        px = np.full(len(table), 0 if kind == "captions" else SIZE)
        people, partition = read_pairs(lists["identity_celeba"]), read_pairs(lists["list_eval_partition"])
        identity = np.array([people.get(image_id, -1) for image_id in ids], np.int64)
        if not partition and given:
            split = np.array([given.get(image_id, "train") for image_id in ids])
            notes.append(f"splits are those of the folders or of the table; {sum(one not in given for one in ids)} "
                         "images without one are in train")
        elif not partition:
            notes.append("no list_eval_partition: splits drawn 90/5/5 % by " + ("person" if people else "image name"))
            keys = [name if person < 0 else str(person) for name, person in zip(ids, identity, strict=True)]
            split = np.array([drawn_split(key) for key in keys])
            split = with_every_split(split, keys) if kind == "captions" else split
        else:
            if odd := sorted(set(partition.values()) - {0, 1, 2}):
                raise DataError(f"list_eval_partition has the partition {odd[0]}; expected 0, 1 or 2")
            problems["no partition row, put in train"] = [image_id for image_id in ids if image_id not in partition]
            split = np.array(SPLITS)[[partition.get(image_id, 0) for image_id in ids]]
    split, crossing = keep_people_together(split, identity)
    if crossing:
        notes.append(f"{crossing} people were in several splits; each went whole to where most of their images were")
    if (identity < 0).all():
        notes.append("identities are unknown (no identity_CelebA.txt): the same person may be in two splits")
    return table.assign(split=split, identity=identity, px=px)[list(COLUMNS)]


def match(plan: Plan) -> Plan:
    """Give each row its image by path, by file name, or by the name without its ending; report what is left over.

    Takes a plan whose `entries` are all images there are, gives one with an entry for each remaining row.
    """
    # Aligned before in-the-wild images of the same name, plain before archived ones: the first wins.
    pictures = sorted(plan.entries, key=lambda one: ("align" not in one.path.lower(), one.kind != "file", one.path))
    lookup: dict[str, Entry] = {}
    for key in (lambda one: one.path, lambda one: one.name, lambda one: one.stem):
        for entry in pictures:
            lookup.setdefault(key(entry), entry)
    ids = plan.table["image_id"]
    paths = [image_id.replace("\\", "/") for image_id in ids]
    found = [lookup.get(path) or lookup.get(os.path.splitext(path)[0]) for path in paths]
    here = np.array([entry is not None for entry in found], bool)
    entries = [entry for entry in found if entry is not None]
    # In CelebA a second image of the same name is a copy; among a person's own images only the path tells.
    used = {one.path for one in entries} if plan.labels else {one.stem for one in entries}
    left = [one.path for one in pictures if (one.path if plan.labels else one.stem) not in used]
    problems = {**plan.problems, "row without image": ids[~here].tolist(), "image without row": left}
    return replace(plan, table=plan.table[here].reset_index(drop=True), entries=entries, problems=problems)


def default_plan(archive: Path, out: Path, text_labels: Path | None = None, how: How = How()) -> Plan | None:
    """The first folder or zip under archive/ that has both labels and images; else archive/ as a whole.

    Pictures of which nothing is said are taken only where a person names them.
    """
    how = replace(how, alone=False)
    children = sorted(archive.iterdir()) if archive.is_dir() else []
    for child in children:
        if child.is_dir() or child.suffix.lower() == ".zip":
            try:
                plan = make_plan([child], out, text_labels, how)
            except DataError:  # one bad download must not hide a good one; alone, it is told below
                continue
            if plan is not None:
                return plan
    return make_plan([archive], out, text_labels, how) if children else None
