"""Does the store keep what it was given: through closing, crashing, tearing and crowding? Real files, real SQLite."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import core.jobs.store
from core.jobs.records import Change, Event, Record, StoredFile
from core.jobs.retention import Retention
from core.jobs.storage_errors import DATABASE, StoreError
from core.jobs.store import Store
from tests.support.counting import quick_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    store = Store(folder / "data")
    yield store
    store.close()


def add(store: Store, name: str = "a face", request: dict[str, Any] | None = None, **facts: Any) -> Record:
    """A new job, with its first event."""
    number = store.next_number()
    record = Record(**{"number": number, "id": f"a-face-{number:032x}", "client": "me", "name": name, "parameters": {},
                       "warnings": (), "created_at": float(number), **facts})
    store.add(record, request or {}, [Change(number, {}, [Event(1, "status", 0.0, {})])])
    return record


def finish(store: Store, record: Record, at: float | None = None, content: bytes = b"") -> None:
    """End a job, with one picture."""
    store.write_files(record.id, {"0.png": content}, durable=True)
    columns = {"state": "succeeded", "finished_at": float(record.number) if at is None else at}
    store.save([Change(record.number, columns, files=[StoredFile("0.png", len(content))])], durable=True)


def crash(store: Store, to: Path) -> Path:
    """What a process that is killed now would leave behind, and the lock not."""
    shutil.copytree(store.folder, to)
    return to


def database(folder: Path) -> Path:
    return folder / DATABASE


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_job_comes_back_as_it_was(store: Store) -> None:
    request = {"prompt": "Köln \x00 \ud800 'x'; DROP TABLE jobs; --", "latents": "AAAA", "steps": 2**53 - 1, "g": None}
    record = add(store, "Köln 日本", request, client="10.0.0.1 \ud800", parameters={"n": 1.5, "s": "\ud800"},
                 warnings=("no such word",))
    error = {"code": "x", "message": "m", "hint": ""}
    store.save([Change(record.number, {"state": "failed", "started_at": 2.0, "finished_at": 3.5, "error": error,
                                       "done": 7, "total": 9, "cancel_requested": True})])
    store.close()
    store = Store(store.folder)
    found = store.find(record.id)
    assert found is not None
    assert vars(found) == vars(record) | {
        "client": "10.0.0.1 ?", "state": "failed", "started_at": 2.0, "finished_at": 3.5, "error": error, "done": 7,
        "total": 9, "cancel_requested": True,
    }
    assert store.request(record.number) == request
    assert (store.find("no-such-id"), store.find("\ud800"), store.request(99)) == (None, None, None)
    assert store.next_number() > record.number
    store.close()


def test_events_come_back_in_order_however_many(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.jobs.store, "EVENTS_AT_ONCE", 4)
    records = [add(store), add(store)]
    for count in (3, 4, 5, 8, 9):
        for record in records:
            last = store.events(record.number)[-1].id
            events = [Event(i, "progress", i / 2, {"t": i, "by": record.number}) for i in range(last + 1, count + 1)]
            store.save([Change(record.number, {}, events)])
            assert [event.id for event in store.events(record.number)] == list(range(1, count + 1))
            assert store.events(record.number)[1:] == [
                Event(i, "progress", i / 2, {"t": i, "by": record.number}) for i in range(2, count + 1)
            ]


def test_a_transaction_is_all_or_nothing(store: Store) -> None:
    one, two = add(store), add(store)
    good = Change(one.number, {"state": "running"}, [Event(2, "status", 1.0, {})], [StoredFile("0.png", 3)])
    with pytest.raises(StoreError, match="UNIQUE"):
        store.save([good, Change(two.number, {}, [Event(1, "status", 1.0, {})])])  # an id is never used twice
    with pytest.raises(ValueError, match="JSON"):
        store.save([good, Change(two.number, {}, [Event(2, "progress", 1.0, {"t": float("nan")})])])
    found = store.find(one.id)
    assert found is not None and found.state == "queued"
    assert len(store.events(one.number)) == 1 and store.files(one.number) == []
    store.save([good])
    assert len(store.events(one.number)) == 2


def test_unfinished_jobs_come_in_the_order_of_submission(store: Store) -> None:
    records = [add(store) for _ in range(4)]
    finish(store, records[1])
    store.save([Change(records[2].number, {"state": "running"})])
    assert [found.id for found in store.unfinished()] == [records[i].id for i in (0, 2, 3)]
    assert store.count() == {"queued": 2, "running": 1, "succeeded": 1}


def test_pages_are_newest_first_and_filtered(store: Store) -> None:
    records = [add(store, name) for name in ("A smiling WOMAN", "a man", "Ärger 100%", "woman_x", "man ' OR 1=1")]
    finish(store, records[0])
    finish(store, records[3])

    def found(**wanted: Any) -> list[int]:
        return [records.index(next(r for r in records if r.id == one.id)) for one in store.page(10, **wanted)]

    assert found() == [4, 3, 2, 1, 0]
    assert [one.number for one in store.page(2)] == [records[4].number, records[3].number]
    assert found(below=records[3].number) == [2, 1, 0]
    assert found(states=["succeeded"]) == [3, 0]
    assert found(states=["succeeded", "queued"], below=records[4].number) == [3, 2, 1, 0]
    assert found(states=[]) == []
    assert found(text="woman") == [3, 0]
    assert found(text="äRGER") == [2]
    records.append(add(store, "seeds", parameters={"seed": 40, "n_images": 3}))
    records.append(add(store, "the best", parameters={"seed": 43, "n_images": 1, "candidates": 8}))
    assert [found(text=text) for text in ("39", "40", "42", "50", "51", "9" * 30)] == [[], [5], [5], [6], [], []]
    assert [found(text=text) for text in ("%", "_", "' or 1", "\x00", "\ud800")] == [[2], [3], [4], [], []]
    assert store.lasting_names([records[0].number, records[1].number]) == {
        records[0].number: ("0.png",), records[1].number: ()}


# ---- files -----------------------------------------------------------------------------------------------------------


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


def test_accepting_and_ending_are_fsynced_and_progress_is_not(store: Store) -> None:
    said: list[str] = []
    store._database.connection.set_trace_callback(said.append)
    record = add(store)
    finish(store, record)
    store.delete(record)
    durable = [line for line in said if line.startswith(("PRAGMA", "BEGIN", "COMMIT"))]
    assert durable == ["PRAGMA synchronous = FULL", "BEGIN IMMEDIATE", "COMMIT", "PRAGMA synchronous = NORMAL"] * 3
    said.clear()
    store.save([Change(record.number, {}, [Event(2, "progress", 0.0, {})])])
    assert not [line for line in said if line.startswith("PRAGMA")]
    with pytest.raises(StoreError):  # a refused one leaves no trace for the next
        store.save([Change(record.number, {}, [Event(2, "progress", 0.0, {})])], durable=True)
    assert store._read("PRAGMA synchronous") == [(1,)] and not store._database.connection.in_transaction


def test_what_a_crash_left_behind_is_swept_at_the_next_start(store: Store, folder: Path) -> None:
    kept, gone = add(store), add(store)
    finish(store, kept, content=b"picture")
    store.save([Change(kept.number, {}, files=[StoredFile("0-1.png", 7, 1), StoredFile("0-2.png", 7, 2)])])
    jobs = crash(store, folder / "crashed") / "jobs"
    files = jobs / kept.id[-32:]
    (files / "0-1.png").write_bytes(b"preview")
    (files / "0-2.png").write_bytes(b"pre")  # shorter than was committed: not synced before a power cut
    (files / "1.png").write_bytes(b"no row names it")
    (files / "1.png.tmp").write_bytes(b"half")
    orphan = jobs / ("f" * 32)
    orphan.mkdir()
    (orphan / "0.png").write_bytes(b"the job was deleted")
    (jobs / "holiday photos").mkdir()
    (jobs / "holiday photos" / "0.png").write_bytes(b"not ours")
    swept = Store(folder / "crashed")
    assert sorted(path.relative_to(jobs).as_posix() for path in jobs.rglob("*.*")) == sorted(
        [f"{files.name}/0-1.png", f"{files.name}/0.png", "holiday photos/0.png"])
    assert not orphan.exists() and swept.find(gone.id) is not None
    assert swept.read_file(kept.id, "0.png") == b"picture"
    swept.close()


def test_pictures_beside_a_new_database_are_left_alone(folder: Path) -> None:
    picture = folder / "jobs" / ("a" * 32) / "0.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"its database was moved away")
    Store(folder).close()
    assert picture.exists()


# ---- removing --------------------------------------------------------------------------------------------------------


def test_a_deleted_job_leaves_its_number_alone(store: Store) -> None:
    record, other = add(store, "a secret name"), add(store)
    finish(store, record, content=b"picture")
    store.delete(record)
    store.delete(record)
    assert store.find(record.id) is None and store.events(record.number) == [] and store.files(record.number) == []
    assert store.was_deleted(record.id) and not store.was_deleted(other.id) and not store.was_deleted("never")
    assert not (store.folder / "jobs" / record.id[-32:]).exists()
    assert store._read("SELECT digits FROM deleted") == [(record.id[-32:],)]  # nothing of the prompt
    assert store.find(other.id) is not None


def test_the_memory_of_deleted_ids_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "MAX_REMEMBERED_IDS", 2)
    records = [add(store) for _ in range(4)]
    for record in records:
        store.delete(record)
    assert [store.was_deleted(record.id) for record in records] == [False, False, True, True]


KIB = bytes(1024)


@pytest.mark.parametrize(("keep", "left"), [
    (Retention(max_jobs=2), [3, 4, 5]),
    (Retention(max_jobs=1), [3, 5]),
    (Retention(max_bytes=3 * 1024), [3, 4, 5]),  # each is a kilobyte and a little
    (Retention(max_bytes=0), [3, 5]),  # the newest stays
    (Retention(max_age_s=6.0), [2, 3, 4, 5]),
    (Retention(max_age_s=0.5), [3]),  # too old is too old
    (Retention(max_age_s=6.0, max_jobs=1), [3, 5]),
    (Retention(), [0, 1, 2, 3, 4, 5]),
])
def test_the_oldest_finished_go_first_and_waiting_ones_never(store: Store, keep: Retention, left: list[int]) -> None:
    records = [add(store) for _ in range(6)]
    for number, at in ((1, 1.0), (0, 2.0), (2, 5.0), (4, 6.0), (5, 9.0)):  # not in their order; 3 waits
        finish(store, records[number], at, KIB)
    gone = store.prune(keep, now=10.0)
    assert gone == [records[i].id for i in (0, 1, 2, 4, 5) if i not in left]
    assert [store.find(record.id) is not None for record in records] == [i in left for i in range(6)]
    assert all(store.was_deleted(job_id) for job_id in gone)
    assert len(list((store.folder / "jobs").iterdir())) == len([i for i in left if i != 3])
    assert store.prune(keep, now=10.0) == []


DAY = 86400.0
AHEAD, UNSET = 2**32.0, 0.0  # a clock in 2106, and one of a machine without a battery


@pytest.mark.parametrize(("keep", "ends", "left"), [
    # the clock was ahead when 0 and 1 ended, and is right again: new pictures stay, old ones go
    (Retention(max_jobs=2), [AHEAD, AHEAD + 1, 100.0, 101.0, 102.0], [3, 4]),
    (Retention(max_bytes=2500), [AHEAD, AHEAD + 1, 100.0, 101.0, 102.0], [3, 4]),
    # it was unset when the newest ended
    (Retention(max_jobs=2), [100.0, 101.0, 102.0, UNSET, UNSET + 1], [3, 4]),
    (Retention(max_age_s=10.0), [100.0, 101.0, 102.0, UNSET, UNSET + 1], [0, 1, 2, 3, 4]),
    # what ended in the future is as old as what came after it
    (Retention(max_age_s=10.0), [AHEAD, 50.0, 60.0, 101.0, 102.0], [3, 4]),
    (Retention(max_age_s=10.0), [50.0, AHEAD, 100.0, 101.0, 102.0], [1, 2, 3, 4]),
])
def test_a_clock_that_was_wrong_removes_no_newer_job(store: Store, keep: Retention, ends: list[float], left: list[int]
                                                     ) -> None:
    records = [add(store) for _ in ends]
    for record, at in zip(records, ends, strict=True):
        finish(store, record, at, KIB)
    store.prune(keep, now=103.0)
    assert [i for i, record in enumerate(records) if store.find(record.id)] == left


def test_jobs_that_are_known_to_have_ended_last_are_the_newest_whatever_their_numbers(store: Store) -> None:
    records = [add(store) for _ in range(3)]
    for record in records:
        finish(store, record, content=KIB)
    assert store.prune(Retention(max_jobs=1), 9.0, order=[records[0].number]) == [record.id for record in records[1:]]
    assert store.find(records[0].id) is not None


def test_a_job_known_to_be_young_stays_whatever_the_clock_says(store: Store) -> None:
    records = [add(store) for _ in range(3)]
    for record in records:
        finish(store, record, UNSET)
    gone = store.prune(Retention(max_age_s=DAY), 400 * DAY, young={records[1].number})
    assert gone == [records[0].id]  # the last one ended after it, so it is no older


def test_the_size_of_a_job_counts_all_that_removing_it_frees(store: Store) -> None:
    record = add(store, request={"latents": "A" * 5000})
    event, file = Event(2, "preview", 0.0, {"x": "y" * 3000}), StoredFile("0-1.png", 700, 1)
    store.save([Change(record.number, {}, [event], [file])])
    finish(store, record, content=KIB)
    ((size,),) = store._read("SELECT size FROM jobs")
    assert 5000 + 3000 + 700 + 1024 < size < 10_200


@pytest.mark.parametrize("wrong", [{"max_jobs": 0}, {"max_bytes": -1}, {"max_age_s": 0.0}, {"max_age_s": float("nan")}])
def test_a_retention_that_cannot_be_kept_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Retention(**wrong)


# ---- crashes and damage ----------------------------------------------------------------------------------------------


def test_a_killed_process_loses_nothing_that_was_committed(store: Store, folder: Path) -> None:
    record = add(store)
    for i in range(2, 50):
        store.save([Change(record.number, {}, [Event(i, "progress", 0.0, {"t": i})])])
        if i % 12 == 0:
            copy = Store(crash(store, folder / f"at {i}"))
            assert [event.id for event in copy.events(record.number)] == list(range(1, i + 1))
            copy.close()


def test_a_torn_log_costs_the_newest_entries_and_nothing_else(store: Store, folder: Path) -> None:
    """A power cut may lose the end of the log: what is left is a prefix of what happened."""
    record = add(store)
    for i in range(2, 40):
        store.save([Change(record.number, {}, [Event(i, "progress", 0.0, {"t": i})])])
    size, counts = (store.folder / f"{DATABASE}-wal").stat().st_size, []
    for share in (0.999, 0.9, 0.66, 0.5, 0.33):
        crashed = crash(store, folder / f"torn at {share}")
        os.truncate(crashed / f"{DATABASE}-wal", int(size * share))
        torn = Store(crashed)
        ids = [event.id for event in torn.events(record.number)]
        assert ids == list(range(1, len(ids) + 1))
        counts.append(len(ids))
        torn.close()
    assert counts == sorted(counts, reverse=True) and 0 < counts[-1] < counts[0] < 39


def filled(folder: Path) -> Path:
    """A closed store of some hundred kilobytes; its database."""
    store = Store(folder)
    record = add(store, request={"latents": "A" * 100_000})
    store.save([Change(record.number, {}, [Event(i, "progress", 0.0, {"t": i}) for i in range(2, 3000)])])
    store.close()
    return database(folder)


def test_a_damaged_database_is_one_sentence(folder: Path) -> None:
    whole = filled(folder / "whole").read_bytes()
    torn = [whole[: len(whole) // 2], whole[:4096], whole[:1000], b"\x00" * 5000, b"not a database " * 500,
            whole[:8192] + bytes(range(256)) * 32 + whole[16384:], whole[:100] + b"\xff" * 400 + whole[500:]]
    for number, content in enumerate(torn):
        damaged = folder / f"damaged {number}"
        (damaged / "jobs" / ("a" * 32)).mkdir(parents=True)
        database(damaged).write_bytes(content)
        with pytest.raises(StoreError, match=r"^The job database .* is damaged \(.*\): move the folder away"):
            Store(damaged)
        assert database(damaged).read_bytes() == content, "whoever wants to rescue it finds it as it was"
        assert (damaged / "jobs" / ("a" * 32)).exists()


def test_a_newer_or_foreign_database_is_one_sentence_and_stays_as_it_is(folder: Path) -> None:
    for statement, sentence in (
        ("PRAGMA user_version = 99", r"newer version of this program \(schema 99, this one knows 2\): update"),
        ("PRAGMA application_id = 7", "another program: choose another folder with --data-dir"),
    ):
        path = filled(folder / statement)
        with sqlite3.connect(path) as other:
            other.execute(statement)
        other.close()
        content = path.read_bytes()
        with pytest.raises(StoreError, match=sentence):
            Store(path.parent)
        assert path.read_bytes() == content


def test_a_folder_that_cannot_be_one_is_one_sentence(folder: Path) -> None:
    (folder / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be used for jobs"):
        Store(folder / "file")
    database(folder).mkdir()
    with pytest.raises(StoreError, match="cannot be used for jobs"):
        Store(folder)


def test_a_full_disk_is_a_sentence_and_the_next_commit_works(store: Store) -> None:
    record = add(store)
    (pages,) = store._database.connection.execute("PRAGMA page_count").fetchone()
    store._database.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="cannot be written: database or disk is full"):
        store.save([Change(record.number, {}, [Event(2, "progress", 0.0, {"x": "y" * 10**6})])])
    store._database.connection.execute(f"PRAGMA max_page_count = {2**30}")
    store.save([Change(record.number, {}, [Event(2, "progress", 0.0, {})])])
    assert len(store.events(record.number)) == 2


SECOND = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from core.jobs.storage_errors import StoreError
from core.jobs.store import Store
try:
    Store(Path(sys.argv[2]), patience_s=0.1)
    print("opened")
except StoreError as error:
    print(error)
"""


def test_a_second_process_is_refused_with_a_sentence_until_the_first_is_done(store: Store) -> None:
    def ask() -> str:
        command = [sys.executable, "-c", SECOND, str(ROOT), str(store.folder)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    add(store)
    assert re.fullmatch(r"Another server is using .*data: stop it, or choose another folder with --data-dir\.", ask())
    with pytest.raises(StoreError, match="Another server"):
        Store(store.folder, patience_s=0.1)
    assert len(store.unfinished()) == 1
    store.close()
    assert ask() == "opened"


def test_a_closed_store_says_so(store: Store) -> None:
    record = add(store)
    store.close()
    store.close()
    for action in (lambda: store.find(record.id), lambda: add(store), lambda: store.delete(record)):
        with pytest.raises(StoreError, match=r"cannot be (read|written): Cannot operate on a closed database"):
            action()
