"""Do several models share one server: which is loaded, which makes room, and what is told of it?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.engine import JobError
from core.imaging.image_io import read_image
from core.jobs.batching import EngineBatch
from core.jobs.job import Job
from core.jobs.models import Models, ModelSource
from core.jobs.queue import JobQueue
from core.jobs.store import Store
from tests.jobs.test_batching import REQUEST, Notes
from tests.support.drawing import DrawingEngine, DrawingInfo

GIB = 2**30


def info_of(name: str) -> DrawingInfo:
    return DrawingInfo(name=name, model_hash=name[0] * 64)


class Machine:
    """Memory of `room` bytes, in which each model takes as much as `sizes` says; `history` has what was loaded."""

    def __init__(self, room: int, **sizes: int) -> None:
        self.room, self.sizes, self.engines = room, sizes, dict[str, DrawingEngine]()
        self.history: list[str] = []
        self.models = Models([ModelSource(name, self.loader(name), lambda n=name: info_of(n), lambda n=name: sizes[n])
                              for name in sizes], self.free, self.released)

    def free(self) -> int:
        return self.room - sum(self.sizes[name] for name in self.sizes if self.models.is_loaded(name))

    def released(self) -> None:
        self.history.append("released")

    def loader(self, name: str) -> Callable[[], DrawingEngine]:
        def load() -> DrawingEngine:
            self.history.append(name)
            if name == "broken":
                raise ValueError("the file is cut off")
            return self.engines.setdefault(name, DrawingEngine(info_of(name)))

        return load


def test_both_stay_where_memory_allows_both() -> None:
    machine = Machine(16 * GIB, a=GIB, b=GIB)
    for name in "abab":
        machine.models.engine(name)
    assert machine.history == ["a", "b"]


def test_one_makes_room_for_the_other_where_not() -> None:
    machine = Machine(4 * GIB, a=2 * GIB, b=2 * GIB)
    for name in "abba":
        assert machine.models.engine(name).info.name == name
    assert machine.history == ["a", "released", "b", "released", "a"]


def test_what_a_model_takes_is_measured_when_it_is_loaded() -> None:
    machine = Machine(9 * GIB, a=GIB, b=GIB, c=3 * GIB)
    for name in "aba":
        machine.models.engine(name)
    machine.models.engine("c")  # taken to need 12 until it is measured
    assert not machine.models.is_loaded("b") and not machine.models.is_loaded("a")
    machine.models.engine("a")  # needs 2 of the 6 that are free
    machine.models.engine("b")  # needs 2 of the 5
    assert machine.history == ["a", "b", "released", "released", "c", "a", "b"]


def test_one_in_use_is_never_unloaded() -> None:
    machine = Machine(3 * GIB, a=2 * GIB, b=2 * GIB)
    machine.models.engine("a")
    assert not machine.models.has_room_for("b", {"a"}) and machine.models.has_room_for("b", ())
    with pytest.raises(JobError, match="b does not fit into memory beside a") as caught:
        machine.models.engine("b", {"a"})
    assert caught.value.code == "model_busy" and machine.models.is_loaded("a")


def test_a_broken_model_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(16 * GIB, a=GIB, broken=GIB)
    machine.models.engine("a")
    with pytest.raises(JobError, match="The model broken could not be loaded: the file is cut off") as caught:
        machine.models.engine("broken")
    assert caught.value.code == "model_failed" and "broken could not be loaded" in caplog.text
    assert machine.models.is_loaded("a") and machine.models.loading is None
    assert machine.models.failure("broken") == "the file is cut off"
    assert machine.models.failed == {"broken": "the file is cut off"}
    machine.models.describe()  # what it would be is known now, but not how to load it
    assert machine.models.failed == {} and machine.models.names == ("a", "broken")


def test_names_are_found_in_any_case() -> None:
    models = Machine(GIB, Alpha=1, beta=1).models
    models.describe()
    assert (models.find("ALPHA"), models.find(None), models.find("gamma")) == ("Alpha", "Alpha", None)
    assert [info.name for info in models.infos] == ["Alpha", "beta"]
    with pytest.raises(JobError, match="no model 'gamma'"):
        models.engine("gamma")


class Bench:
    """A queue before the models of a machine."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.machine, self.queue = machine, JobQueue(Store(folder))
        machine.models.engine(machine.models.first)
        machine.models.describe()
        self.batch = EngineBatch(machine.models, Notes(), max_batch=16)

    def submit(self, model: str, **request: Any) -> Job:
        request = {"model": model, "model_hash": model[0] * 64, **request}
        return self.queue.submit("a face", {}, {**REQUEST, "prompt": "a face", "n_inf_steps": 4, **request})

    def tick(self) -> bool:
        return self.queue.run_next(self.batch)


def test_jobs_of_two_models_take_turns_where_both_fit(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Machine(16 * GIB, a=GIB, b=GIB))
    one, two, three = bench.submit("a"), bench.submit("b"), bench.submit("a", n_inf_steps=2)
    while bench.tick():
        pass
    assert [job.state for job in (one, two, three)] == ["succeeded"] * 3
    assert bench.machine.history == ["a", "b"]
    steps = [len(step) for step in bench.machine.engines["a"].steps]
    assert steps.count(2) == 2 and sum(steps) == 6  # both jobs of a stepped together while they could
    assert len(bench.machine.engines["b"].steps) == 4


def test_a_job_waits_until_the_model_before_is_free(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Machine(4 * GIB, a=2 * GIB, b=2 * GIB))
    one, two = bench.submit("a"), bench.submit("b")
    bench.tick()
    assert (one.state, two.state) == ("running", "queued")
    while bench.tick():
        pass
    assert (one.state, two.state) == ("succeeded", "succeeded")
    told = [event.data for event in two.events if event.data.get("loading")]
    assert told == [{"status": "running", "error": None, "loading": "b"}]
    assert not any(event.data.get("loading") for event in one.events)


def test_a_job_of_a_broken_model_fails_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Machine(16 * GIB, a=GIB, b=GIB, broken=GIB))
    doomed, fine = bench.submit("broken"), bench.submit("b")
    while bench.tick():
        pass
    assert doomed.state == "failed" and fine.state == "succeeded"
    assert doomed.error is not None and doomed.error["message"].endswith("could not be loaded: the file is cut off")


REFINE = {"model": "b", "model_hash": "b" * 64, "strength": 0.5, "prompt": None}


@pytest.mark.parametrize("room", [4 * GIB, 16 * GIB])
def test_a_picture_is_refined_by_another_model(tmp_path: Path, room: int) -> None:
    machine = Machine(room, a=2 * GIB, b=2 * GIB)
    bench = Bench(tmp_path, machine)
    job, other = bench.submit("a", n_images=2, refine=REFINE), bench.submit("a", n_inf_steps=6)
    while bench.tick():
        pass
    assert job.state == other.state == "succeeded"
    images = [event.data for event in job.events if event.kind == "image"]
    assert [one["before"] for one in images] == [f"/jobs/{job.id}/images/{i}.png?t=4" for i in range(2)]
    assert [(one["t"], one["total_t"]) for one in images] == [(8, 8)] * 2
    progress = [event.data["t"] for event in job.events if event.kind == "progress"]
    assert progress == sorted(progress) and progress[-1] == 8
    (refined,) = machine.engines["b"].begun
    assert (refined.num_images, refined.start, refined.seed, refined.prompt) == (2, 0.5, 1, "a face")
    before = read_image(job.file("0-4.png") or b"")
    assert np.allclose(refined.latents[0], machine.engines["b"].encode(before))
    assert job.file("0.png") != job.file("0-4.png") and job.file("1-4.png") is not None


def test_the_same_model_refines_its_own_pictures(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Machine(GIB, a=GIB))
    own = {**REFINE, "model": "a", "model_hash": "a" * 64, "prompt": "a sharp face"}
    job = bench.submit("a", refine=own)
    while bench.tick():
        pass
    assert job.state == "succeeded"
    assert [request.prompt for request in bench.machine.engines["a"].begun] == ["a face", "a sharp face"]


def test_a_refinement_that_cannot_begin_fails_its_job(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Machine(16 * GIB, a=GIB, broken=GIB, b=GIB))
    changed = bench.submit("a", refine={**REFINE, "model_hash": "other"})
    doomed = bench.submit("a", refine={**REFINE, "model": "broken"})
    gone = bench.submit("a", refine={**REFINE, "model": "gone"})
    while bench.tick():
        pass
    assert [job.state for job in (changed, doomed, gone)] == ["failed"] * 3
    codes = [(job.error or {})["code"] for job in (changed, doomed, gone)]
    assert codes == ["model_changed", "model_failed", "unknown_model"]


def test_a_job_that_waits_for_its_refiner_can_be_cancelled(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Machine(4 * GIB, a=2 * GIB, b=2 * GIB))
    job, other = bench.submit("a", refine=REFINE), bench.submit("a", n_inf_steps=12)
    for _ in range(6):
        bench.tick()
    assert job.state == "running" and len(bench.machine.engines) == 1  # other still generates with a
    bench.queue.cancel(job.id)
    while bench.tick():
        pass
    assert job.state == "cancelled" and other.state == "succeeded"
