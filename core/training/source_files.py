"""Which images and lists lie in a folder, zip or tar, and what bytes are in them?

Archives inside a folder count as part of it. Every file becomes an `Entry` that reads its own bytes, so nothing after
this file cares how a person stores the data. It does not know what the lists say.
"""

from __future__ import annotations

import functools
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from core.command import UserError

# what Pillow decodes, and after that what cameras write and it does not: those are told as images that cannot be read
IMAGE_SUFFIXES = frozenset((".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm "
                            ".heic .heif .dng .cr2 .nef").split())
LIST_SUFFIXES = (".csv", ".txt", ".json", ".jsonl", ".parquet")
LISTS = ("metadata", "list_attr_celeba", "list_eval_partition", "identity_celeba", "text_labels")


class DataError(UserError, RuntimeError):
    """Something is wrong with the data on disk; the message says what, and what to do about it."""


# What zipfile raises for a member or a directory of one: a password (RuntimeError), an unknown method or version
# (NotImplementedError, a RuntimeError), a wrong checksum or header, a name that is not there, and data cut short.
UNREADABLE_MEMBER = (OSError, RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error,
                     lzma.LZMAError, struct.error)  # fmt: skip


def why(error: Exception) -> str:
    """The reason that zipfile gives, with the remedy."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "password" in text or "encrypted" in text:
        return "it is encrypted; unpack the zip with its password and give the folder"
    if isinstance(error, NotImplementedError):
        return f"{text}; unpack the zip with the program that made it and give the folder"
    return f"{text}; download the zip again"


@dataclass(frozen=True)
class Entry:
    """One file of a source: plain (kind "file"), or a member of a zip, or of a tar, where it is read by its offset."""

    kind: str
    container: str  # the folder that was given, or the zip or tar file
    path: str  # inside the container, with forward slashes
    size: int
    offset: int = 0
    member: str = ""  # its name as the zip has it, where that is not `path`

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return os.path.splitext(self.name)[0]

    def read(self) -> bytes:
        """All of its bytes. Raises DataError for a member of a zip that cannot be read, OSError for any other file."""
        if self.kind == "zip":
            try:
                return open_zip(self.container).read(self.member or self.path)
            except UNREADABLE_MEMBER as error:
                raise DataError(f"{self.container}: the member {self.path} cannot be read: {why(error)}") from error
        with open(Path(self.container, self.path) if self.kind == "file" else self.container, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size if self.kind == "tar" else -1)


@functools.lru_cache(maxsize=4)
def open_zip(path: str) -> zipfile.ZipFile:
    """Kept open in each process: reading the directory of 200,000 members takes a second."""
    return zipfile.ZipFile(path)


def close_zips() -> None:
    open_zip.cache_clear()


def is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def is_wanted(path: str) -> bool:
    """Is this an image, or a list that may say something of images? macOS adds a `._name` twin of each file to zips."""
    stem, suffix = os.path.splitext(path.rpartition("/")[2].lower())
    return not stem.startswith(".") and (suffix in IMAGE_SUFFIXES or suffix in LIST_SUFFIXES)


def scan_archive(path: Path) -> Iterator[Entry]:
    """List a zip or tar; raises zipfile.BadZipFile or tarfile.TarError where it is cut short."""
    if path.suffix.lower() == ".zip":
        for info in open_zip(str(path)).infolist():
            inside = info.filename.replace("\\", "/")  # as some programs for Windows write paths
            if not info.is_dir() and is_wanted(inside):
                yield Entry("zip", str(path), inside, info.file_size, member=info.filename)
        return
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            inside = member.name.replace("\\", "/")
            if member.isfile() and is_wanted(inside):
                yield Entry("tar", str(path), inside, member.size, member.offset_data)


def scan(source: Path, skip: Path) -> tuple[list[Entry], list[str]]:
    """List every usable file of a folder, zip or tar, archives in a folder included, and name unreadable archives."""
    if not source.exists():
        raise DataError(f"--source {source} does not exist; give the folder or zip with the images and their lists")
    entries: list[Entry] = []
    unreadable: list[str] = []
    root = source if source.is_dir() else source.parent
    for folder, subfolders, names in os.walk(source) if source.is_dir() else [(str(root), [], [source.name])]:
        if Path(folder).resolve() == skip.resolve() or {"images.npy", "manifest.json"} <= set(names):
            subfolders.clear()  # a prepared store is no source
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in {".zip", ".tar"}:
                try:
                    entries.extend(scan_archive(path))
                except (*UNREADABLE_MEMBER, tarfile.TarError) as error:
                    unreadable.append(f"{path.name}: {error}")
            elif is_wanted(name):
                entries.append(Entry("file", str(root), path.relative_to(root).as_posix(), path.stat().st_size))
    return entries, unreadable


def told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """The same files under paths of which no two are equal: where two folders or archives have a file of the same path,
    theirs begin with the name of the folder or archive."""
    containers: dict[str, set[str]] = {}
    for entry in entries:
        containers.setdefault(entry.path, set()).add(entry.container)
    shared = {container for several in containers.values() if len(several) > 1 for container in several}
    found = []
    for entry in entries:
        if entry.container not in shared:
            found.append(entry)
            continue
        place = Path(entry.container).resolve()
        if entry.kind == "file":
            found.append(replace(entry, container=str(place.parent), path=f"{place.name}/{entry.path}"))
        else:
            found.append(replace(entry, path=f"{place.stem}/{entry.path}", member=entry.member or entry.path))
    return found


def find(entries: Sequence[Entry], stem: str) -> Entry | None:
    """The list of this name that lies nearest to the top, plain files before archived ones."""
    found = [entry for entry in entries if entry.stem.lower() == stem and not is_picture(entry.name)]
    return min(found, key=lambda entry: (entry.kind != "file", entry.path.count("/"), entry.path), default=None)
