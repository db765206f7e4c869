"""Can room be made on a full disk, and is every disk that refuses told by its own name? Real small disks where the
system lets us mount them, and everywhere else the same errors from the same calls."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import start
from core import disk
from core.disk import FULL, OTHER, PERMISSION, READ_ONLY, RESERVE_BYTES, UNREACHABLE, Reserve, cause_of, probe, sentence
from core.jobs.database import Database
from core.jobs.queue import DeletedJob, JobQueue
from core.jobs.storage_errors import StoreError, store_error
from core.jobs.store import Store
from launcher import host
from tests.support.asking import make_app, post, problem, run, service_of, tick, work
from tests.support.counting import Counting, picture
from tests.support.drawing import DrawingEngine

ROOT = Path(__file__).resolve().parents[2]


def mount(*words: str) -> bool:
    """Whether `mount` did it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        done = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
        if done:
            subprocess.run(["umount", folder], check=True)
        return done


class Disk:
    """A disk of a few megabytes. Where none can be mounted, a folder, and `Store` sees a full disk in place of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, real: bool) -> None:
        self.folder, self._patch, self.real = folder, monkeypatch, real

    def fill(self, store: Store | None = None) -> None:
        """Leave no room at all."""
        if self.real:
            (self.folder / "film").unlink(missing_ok=True)
            file = os.open(self.folder / "film", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            with contextlib.suppress(OSError):
                while True:
                    os.write(file, bytes(4096))
            os.close(file)
            return
        assert store is not None
        transaction, held = Database.transaction, store._reserve.held

        @contextlib.contextmanager
        def refuse(database: Database, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
            store_or_files = store._reserve.held < held or held == 0 and not list((store.folder / "jobs").glob("*/*"))
            if not store_or_files:
                full = sqlite3.OperationalError("database or disk is full")
                raise store_error(f"The job database cannot be written: {full}.", full, store.folder)
            with transaction(database, durable=durable) as db:
                yield db

        self._patch.setattr(Database, "transaction", refuse)
        self._patch.setattr(Reserve, "refill", lambda reserve: None)

    def read_only(self) -> None:
        """As a system makes a disk that had an error."""
        if self.real:
            assert mount("-o", "remount,ro", str(self.folder))
            return

        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *words: Any) -> sqlite3.Cursor:
                if statement.startswith(("BEGIN", "PRAGMA journal_mode")):
                    raise sqlite3.OperationalError("attempt to write a readonly database")
                return super().execute(statement, *words)

        connect = sqlite3.connect
        self._patch.setattr(sqlite3, "connect", lambda *words, **more: connect(*words, **more, factory=Connection))
        self._patch.setattr(tempfile, "TemporaryFile", refuse)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_mount: bool) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    real = can_mount and mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    yield Disk(folder, monkeypatch, real)
    monkeypatch.undo()
    if real:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def submit(queue: JobQueue, name: str, steps: int = 3) -> Any:
    return queue.submit(name, {}, {"steps": steps, "seed": 7, "padding": "x" * 20_000})


# ---- a full disk -----------------------------------------------------------------------------------------------------


def test_on_a_full_disk_jobs_are_deleted_cancelled_and_ended(small: Disk) -> None:
    store = Store(small.folder / "data")
    queue, batch = JobQueue(store), Counting(room=2)
    done = [submit(queue, f"done {i}", 1) for i in range(3)]
    while queue.run_next(batch):
        pass
    running, other, waiting = (submit(queue, name, 9) for name in ("running", "other", "waiting"))
    queue.run_next(batch)
    assert store._reserve.held == RESERVE_BYTES
    small.fill(store)
    with pytest.raises(StoreError, match=r"disk is full.*: free some space on it, or choose a folder on another disk"):
        submit(queue, "one more")
    queue.cancel(waiting.id)
    queue.cancel(running.id)
    queue.run_next(batch)
    assert (waiting.state, running.state) == ("cancelled", "cancelled")
    queue.delete(done[0].id)
    queue.delete(waiting.id)
    small.fill(store)
    while queue.run_next(batch):
        pass
    found = store.find(other.id)  # whether its steps found room or not, its end is written down
    assert other.finished and found is not None and found.state == other.state
    assert other.error is None or other.error["code"] == "storage" and "is full" in other.error["message"]
    for gone in (done[0], waiting):
        with pytest.raises(DeletedJob):
            queue.get(gone.id)
    assert not (small.folder / "data" / "jobs" / done[0].id[-32:]).exists()
    assert queue.get(done[1].id).file("0.png") == picture(7, 1)
    store.close()
    store = Store(small.folder / "data")  # opening needs no room either
    assert store.was_deleted(done[0].id) and store.find(running.id).state == "cancelled"  # type: ignore[union-attr]
    store.close()


def test_a_server_starts_on_a_full_disk_with_what_was_unfinished(small: Disk) -> None:
    store = Store(small.folder / "data")
    queue, batch = JobQueue(store), Counting()
    job, done = submit(queue, "unfinished", 5), submit(queue, "done", 1)
    queue.run_next(batch)
    small.fill(store)
    store.close()
    store = Store(small.folder / "data")
    queue = JobQueue(store)
    assert queue.get(job.id).state == "queued" and queue.get(done.id).state == "succeeded"
    queue.delete(done.id)
    queue.delete(job.id)
    assert queue.counts()["finished"] == queue.counts()["waiting"] == 0
    store.close()


def test_limits_make_room_on_a_full_disk(small: Disk) -> None:
    store = Store(small.folder / "data")
    queue, batch = JobQueue(store), Counting()
    jobs = [submit(queue, str(i), 1) for i in range(4)]
    while queue.run_next(batch):
        pass
    small.fill(store)
    gone = store.prune(core_retention(2), 0.0)
    assert gone == [job.id for job in jobs[:2]]
    store.close()


def core_retention(jobs: int) -> Any:
    from core.jobs.retention import Retention

    return Retention(max_jobs=jobs)


def test_without_a_reserve_the_pictures_go_first(small: Disk) -> None:
    """On a disk that was full before the server knew of a reserve."""
    store = Store(small.folder / "data")
    queue, batch = JobQueue(store), Counting()
    job = submit(queue, "a", 60)
    while queue.run_next(batch):
        pass
    store._reserve.path.unlink()
    small.fill(store)
    queue.delete(job.id)
    with pytest.raises(DeletedJob):
        queue.get(job.id)
    store.close()


def test_a_full_disk_over_http(small: Disk) -> None:
    app = make_app(DrawingEngine(), data_dir=small.folder / "data")
    client = app.test_client()
    done, waiting = run(app, n_images=8), post(client)["job_id"]
    tick(app)
    small.fill(service_of(app)._store)
    body = {"prompt": "a man", "n_inf_steps": 2}
    detail = problem(client.post("/text_to_image", json=body), 503)["detail"]
    assert detail == "The server's disk is full: delete some jobs, or free space on it."
    assert client.post(f"/jobs/{waiting}/cancel").status_code == 200
    work(app)
    assert client.get(f"/jobs/{waiting}/?include=none").get_json()["status"] == "cancelled"
    assert client.delete(f"/jobs/{done}/").status_code == 204
    assert client.get(f"/jobs/{done}/").status_code == 410
    service_of(app)._store.close()


def test_the_reserve_comes_back_when_there_is_room_and_leaves_some(tmp_path: Path, monkeypatch: Any) -> None:
    reserve = Reserve(tmp_path / "reserve", 10 * disk.PIECE - 5)
    assert reserve.held == 10 * disk.PIECE - 5
    for _ in range(4):
        assert reserve.release()
    free = [5 * disk.PIECE]

    class Usage:
        @property
        def free(self) -> int:
            free[0] -= disk.PIECE
            return free[0]

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage())
    reserve.refill()  # while two pieces are free
    assert reserve.held == 9 * disk.PIECE - 5
    while reserve.release():
        pass
    assert reserve.held == 0
    (tmp_path / "file").write_bytes(b"")
    assert not Reserve(tmp_path / "file" / "reserve").release()  # it cannot be there, which is no reason to stop


# ---- told apart ------------------------------------------------------------------------------------------------------


def test_a_read_only_disk_is_called_that(small: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    data = small.folder / "data"
    store = Store(data)
    submit(JobQueue(store), "a", 1)
    store.close()
    small.read_only()
    with pytest.raises(StoreError, match=f"^The disk of {data} is read-only.*mount it.*--data-dir"):
        Store(data)
    assert (host.folder_problem(data, 1, "--data-dir") or "").startswith(f"The disk of {data} is read-only")
    assert (start.doctor_data(data) or "").startswith(f"The disk of {data} is read-only")
    capsys.readouterr()
    if small.real:
        command = [sys.executable, str(ROOT / "api.py"), "--port", "0", "--data-dir", str(data)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 1 and answer.stderr.strip().startswith(f"The disk of {data} is read-only")


@contextlib.contextmanager
def as_somebody_else() -> Iterator[None]:
    """Without the rights of root, for whom no permission counts."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize(("name", "mode"), [
    ("jobs.sqlite3", 0o000), ("jobs.sqlite3", 0o444), ("", 0o555), ("", 0o000), ("jobs", 0o555),
])
def test_a_folder_of_somebody_else_is_called_that(name: str, mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        data = Path(folder) / "data"
        store = Store(data)
        submit(JobQueue(store), "a")
        store.close()
        path = data / name
        path.chmod(mode)
        with as_somebody_else():
            problems = [] if name else [host.folder_problem(data, 1, "--data-dir")]
            try:
                store = Store(data)
                store.write_files("a" * 32, {"0.png": b""}, durable=False)
            except StoreError as error:
                problems.append(str(error))
                assert error.cause == PERMISSION
        path.chmod(0o755)
    assert problems and all(
        f"This user may not write to {data} (Permission denied): make the folder and what is in it yours" in str(told)
        for told in problems
    )
    assert not any("damaged" in str(told) or "Another server" in str(told) for told in problems)


def test_a_link_to_a_disk_that_is_not_there_is_called_that(tmp_path: Path) -> None:
    link = tmp_path / "data"
    link.symlink_to(tmp_path / "unplugged" / "data", target_is_directory=True)
    with pytest.raises(StoreError, match=r"does not answer \(it is a link to .*unplugged") as raised:
        Store(link)
    assert raised.value.cause == UNREACHABLE


@pytest.mark.parametrize(("name", "cause"), [
    ("ENOSPC", FULL), ("EDQUOT", FULL), ("EROFS", READ_ONLY), ("EACCES", PERMISSION), ("EPERM", PERMISSION),
    ("EIO", UNREACHABLE), ("ESTALE", UNREACHABLE), ("ENODEV", UNREACHABLE), ("ENOTCONN", UNREACHABLE),
    ("EHOSTDOWN", UNREACHABLE), ("EISDIR", OTHER),
])
def test_what_sqlite_calls_an_io_error_gets_the_systems_own_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cause: str
) -> None:
    if not hasattr(errno, name):
        name, cause = "EACCES", PERMISSION
    refused = OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    def refuse(*_: Any, **__: Any) -> Any:
        raise refused

    store = Store(tmp_path / "data")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert probe(tmp_path) == (cause, refused.strerror)
    error = store_error("It cannot be written.", sqlite3.OperationalError("disk I/O error"), store.folder)
    told = str(error)
    assert error.cause == cause and told.startswith("It cannot be written.")
    assert cause == OTHER or sentence(cause, str(refused.strerror), store.folder, "--data-dir") in told
    problem_ = host.folder_problem(tmp_path, 1, "--data-dir")
    assert problem_ and problem_ == sentence(cause, str(refused.strerror), tmp_path, "--data-dir")
    store.close()


def test_each_cause_has_a_sentence_of_its_own() -> None:
    causes = (FULL, READ_ONLY, PERMISSION, UNREACHABLE, OTHER)
    assert len({sentence(cause, "reason", Path("data"), "--data-dir") for cause in causes}) == len(causes)
    assert len(set(disk.ANSWERS.values())) == len(disk.ANSWERS) == 7
    assert all("data" not in told.replace("data folder", "").replace("database", "") for told in disk.ANSWERS.values())


@pytest.mark.parametrize(("number", "cause"), [(112, FULL), (19, READ_ONLY), (5, PERMISSION), (53, UNREACHABLE)])
def test_windows_has_numbers_of_its_own(number: int, cause: str) -> None:
    error = OSError(errno.EACCES, "refused")
    error.winerror = number  # type: ignore[attr-defined]
    assert cause_of(error) == cause


def test_a_folder_that_vanished_is_unreachable(tmp_path: Path) -> None:
    assert (probe(tmp_path / "gone") or ("",))[0] == UNREACHABLE


# ---- start.py --------------------------------------------------------------------------------------------------------


def test_start_goes_on_where_jobs_are_and_room_is_not(tmp_path: Path) -> None:
    """Else nobody could reach the gallery, which is where room is made."""
    options = start.command_line({}).parse_args(["--data-dir", str(tmp_path / "data")])
    assert not start.has_jobs(options)
    Store(tmp_path / "data").close()
    assert start.has_jobs(options)


def test_what_the_server_said_is_kept_elsewhere_when_its_own_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(start.environment, "probe", lambda root: {"packages": {}, "torch": None})
    options = start.command_line({}).parse_args(["--data-dir", str(tmp_path / "file" / "data")])

    class Server:
        said = "Traceback"

    told = start.diagnose(ROOT, options, Server(), "It ended.")  # type: ignore[arg-type]
    kept = tmp_path / "temporary" / "failure.log"
    assert told == f"It ended (all of it is in {kept}): see ./start.py doctor." and kept.read_text() == "Traceback"
