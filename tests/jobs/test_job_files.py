"""Are the files of jobs safe when they are said to be, and only where they belong?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.jobs.store import Store
from tests.support.storing import add


def test_final_files_are_synced_before_they_are_renamed_and_previews_are_not(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, did = add(store), []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (did.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda one, to: (did.append(f"{Path(one).name} -> {Path(to).name}"),
                                                       replace(one, to)))
    store.write_files(record.id, {"0-1.png": b"preview"}, durable=False)
    folders = ["sync"] if os.name == "posix" else []  # a new name is safe when its folder is
    assert did == [*folders, "0-1.png.tmp -> 0-1.png"]  # the job's folder is new
    did.clear()
    store.write_files(record.id, {"0.png": b"picture"}, durable=True)
    assert did == ["sync", "0.png.tmp -> 0.png", *folders]
    files = store.folder / "jobs" / record.id[-32:]
    assert sorted(path.name for path in files.iterdir()) == ["0-1.png", "0.png"]
    assert store.read_file(record.id, "0.png") == b"picture"
    assert store.read_file(record.id, "1.png") is None
    store.remove_files(record.id, ["0.png", "1.png"])
    assert store.read_file(record.id, "0.png") is None


@pytest.mark.parametrize("name", ["", ".", "..", "../0.png", "a/b", "a\\b", ".hidden", "0.png\n", "\x00", "x" * 101])
def test_a_file_stays_in_its_folder(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        store.write_files(add(store).id, {name: b""}, durable=False)
