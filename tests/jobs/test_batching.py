"""Do many jobs share one engine fairly, and does each get exactly what it asked for?

A real queue and a real store, the generated image stand-in as engine, no HTTP.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.engine import JobError
from core.jobs.batching import EngineBatch
from core.jobs.job import Job
from core.jobs.models import Models, ModelSource
from core.jobs.queue import JobQueue
from core.jobs.store import Store
from tests.support.drawing import LATENT_SHAPE, DrawingEngine

MODEL = "d" * 64  # the stand-in's hash
REQUEST = {
    "prompt": "a face", "n_images": 1, "n_inf_steps": 4, "stream_freq": 100, "start_timestep": 0.0, "seed": 1,
    "guidance_scale": 3.0, "negative_prompt": "", "sampler": "Pencil", "latent": None, "model_hash": MODEL,
}


class Notes:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps, self.images, self.ends = 0, 0, []

    def stepped(self, seconds: float) -> None:
        assert seconds >= 0
        self.steps += 1

    def generated(self, num_images: int) -> None:
        self.images += num_images

    def ended(self, succeeded: bool) -> None:
        self.ends.append(succeeded)


class Bench:
    """A queue, an engine, and the batch between them."""

    def __init__(self, folder: Path, max_batch: int = 16, max_images: int = 64) -> None:
        self.store, self.engine, self.notes = Store(folder), DrawingEngine(), Notes()
        self.queue = JobQueue(self.store)
        models = Models([ModelSource("drawing", lambda: self.engine)])
        models.engine("drawing")  # as a server does before its first job
        self.batch = EngineBatch(models, self.notes, max_batch=max_batch, max_images=max_images)

    def submit(self, prompt: str, **request: Any) -> Job:
        return self.queue.submit(prompt, {}, {**REQUEST, "prompt": prompt, **request})

    def tick(self) -> bool:
        return self.queue.run_next(self.batch)

    def work(self) -> None:
        while self.tick():
            pass


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


def kinds(job: Job) -> list[str]:
    return [event.kind for event in job.snapshot().events]


def test_all_jobs_step_together_and_leave_when_they_are_done(bench: Bench) -> None:
    for prompt, steps in (("a", 1), ("b", 3), ("c", 2)):
        bench.submit(prompt, n_inf_steps=steps)
    bench.work()
    assert [sorted(step) for step in bench.engine.steps] == [["a", "b", "c"], ["b", "c"], ["b"]]
    assert (bench.notes.steps, bench.notes.images, bench.notes.ends) == (3, 3, [True] * 3)


def test_the_speed_is_measured(tmp_path: Path) -> None:
    """Seconds of a step over its images, whatever they are: here a step sleeps."""
    bench = Bench(tmp_path)
    assert bench.batch.seconds_per_image_step is None
    bench.engine.before_step = lambda step: time.sleep(0.01)
    bench.submit("a", n_images=2, n_inf_steps=5)
    bench.work()
    assert bench.batch.seconds_per_image_step is not None
    assert 0.005 <= bench.batch.seconds_per_image_step < 0.1  # one sleep a run, two images
    bench.store.close()


def test_a_newcomer_joins_at_the_next_step(bench: Bench) -> None:
    long = bench.submit("long", n_inf_steps=100)
    for _ in range(5):
        bench.tick()
    short = bench.submit("short", n_inf_steps=2)
    bench.tick()
    bench.tick()
    assert (short.state, long.state, long.done) == ("succeeded", "running", 7)


def test_when_not_all_fit_into_a_step_they_take_turns(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_batch=8)
    jobs = [bench.submit(name, n_images=images, n_inf_steps=20) for name, images in (("a", 8), ("b", 4), ("c", 3))]
    for _ in range(12):
        bench.tick()
        assert max(job.done for job in jobs) - min(job.done for job in jobs) <= 1
        assert len(bench.engine.steps[-1]) in (1, 2)
    assert [job.done for job in jobs] == [6, 6, 6]
    assert [sorted(step) for step in bench.engine.steps[:4]] in (
        [["a"], ["b", "c"]] * 2, [["b", "c"], ["a"]] * 2)
    bench.store.close()


def test_a_job_larger_than_a_step_is_still_drawn(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_batch=2)
    job = bench.submit("crowd", n_images=8)
    bench.work()
    assert job.state == "succeeded" and len(job.snapshot().files) == 16
    bench.store.close()


def test_no_more_images_run_than_there_is_memory_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_images=10)
    jobs = [bench.submit(str(i), n_images=4, n_inf_steps=2) for i in range(3)]
    bench.tick()
    assert [job.state for job in jobs] == ["running", "running", "queued"] and bench.batch.num_images == 8
    bench.work()
    assert [job.state for job in jobs] == ["succeeded"] * 3 and bench.batch.num_images == 0
    bench.store.close()


def test_previews_are_made_when_they_are_due_and_only_then(bench: Bench) -> None:
    job = bench.submit("a", n_images=2, n_inf_steps=5, stream_freq=2)
    bench.work()
    assert bench.engine.num_previews == 4
    assert kinds(job) == [
        "status", "status", "progress", "progress", "preview", "preview", "progress", "progress", "preview", "preview",
        "progress", "image", "image", "status", "done"]
    assert set(job.file_names()) == {
        *(f"{i}-{t}.{kind}" for i in (0, 1) for t in (2, 4) for kind in ("png", "f32")),
        *(f"{i}.{kind}" for i in (0, 1) for kind in ("png", "f32"))}
    early = bench.submit("b", n_inf_steps=4, stream_freq=4)
    bench.work()
    assert "preview" not in kinds(early)  # the last step brings the image itself


def test_a_cancelled_job_stops_within_one_step_and_is_not_decoded(bench: Bench) -> None:
    gone = bench.submit("gone", n_inf_steps=5, stream_freq=1)
    stays = bench.submit("stays", n_inf_steps=5)
    bench.engine.before_step = lambda step: step == 3 and bench.queue.cancel(gone.id)
    bench.work()
    assert (gone.state, gone.done, stays.state) == ("cancelled", 3, "succeeded")
    assert kinds(gone).count("preview") == 2 and "image" not in kinds(gone)
    assert [step.count("gone") for step in bench.engine.steps] == [1, 1, 1, 0, 0]


def test_a_job_cancelled_at_its_last_step_is_not_decoded_either(bench: Bench) -> None:
    job = bench.submit("gone", n_inf_steps=2)
    bench.engine.before_step = lambda step: step == 2 and bench.queue.cancel(job.id)
    bench.work()
    assert job.state == "cancelled" and not job.file_names() and bench.notes.images == 0


@pytest.mark.parametrize("kind", [JobError, RuntimeError])
@pytest.mark.parametrize("where", ["start", "previews", "pictures"])
def test_what_fails_one_job_leaves_its_neighbours_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, kind: type[Exception]
) -> None:
    sound = getattr(bench.engine, where)
    # made here: one that outlives the test would keep its traceback, and with it the jobs, alive
    fault = JobError("not_finite", "No image came out.") if kind is JobError else RuntimeError("a bug")

    def act(subject: Any) -> Any:
        if getattr(subject, "asked", subject).prompt == "bad":
            raise fault
        return sound(subject)

    monkeypatch.setattr(bench.engine, where, act)
    bad, good = (bench.submit(prompt, stream_freq=2) for prompt in ("bad", "good"))
    bench.work()
    assert (bad.state, good.state) == ("failed", "succeeded")
    assert bad.error is not None
    assert bad.error["code"] == ("not_finite" if isinstance(fault, JobError) else "internal")
    assert ("a bug" in caplog.text) is isinstance(fault, RuntimeError)


def test_a_run_that_fails_in_a_step_leaves_its_neighbours_alone(bench: Bench) -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise JobError("out_of_memory", "Too little memory.")

    short, long = bench.submit("short", n_inf_steps=2), bench.submit("long", n_inf_steps=4)
    bench.engine.before_step = fail
    bench.work()
    assert (short.state, long.state, long.done) == ("succeeded", "failed", 2)
    assert long.error == {"code": "out_of_memory", "message": "Too little memory.", "hint": ""}
    assert sorted(bench.notes.ends) == [False, True]


def test_a_fault_of_the_engine_fails_the_jobs_of_that_step_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, max_batch=1)
    first, second = bench.submit("a"), bench.submit("b")

    def explode(step: int) -> None:
        bench.engine.before_step = None
        raise RuntimeError("a bug")

    bench.engine.before_step = explode
    bench.work()
    assert sorted((first.state, second.state)) == ["failed", "succeeded"] and "a bug" in caplog.text
    bench.store.close()


def test_the_request_reaches_the_engine_unchanged(bench: Bench) -> None:
    z = np.linspace(-1, 1, 32, dtype="<f4").reshape(2, *LATENT_SHAPE)
    texts = [base64.b64encode(one.tobytes()).decode() for one in z]
    bench.submit("two", n_images=2, latent=texts, start_timestep=0.5, seed=9, guidance_scale=0.0, sampler="DPM++ 2M",
                 negative_prompt="beard")
    bench.submit("one for all", n_images=2, latent=texts[1])
    bench.work()
    two, one = bench.engine.begun
    assert np.array_equal(two.latents, z) and np.array_equal(one.latents, z[[1, 1]])
    assert (two.prompt, two.num_images, two.num_inference_steps, two.seed, two.guidance_scale, two.negative_prompt,
            two.sampler, two.start) == ("two", 2, 4, 9, 0.0, "beard", "DPM++ 2M", 0.5)


def test_skipped_steps_are_not_made(bench: Bench) -> None:
    latent = base64.b64encode(bytes(64)).decode()
    half = bench.submit("half", latent=latent, start_timestep=0.5)
    none = bench.submit("none", latent=latent, start_timestep=1.0)
    bench.work()
    assert (half.state, none.state, half.done, none.done) == ("succeeded", "succeeded", 4, 4)
    assert bench.engine.steps == [["half"], ["half"]]


def test_after_a_restart_a_job_is_drawn_from_its_stored_request(tmp_path: Path) -> None:
    undisturbed = Bench(tmp_path / "a")
    wanted = undisturbed.submit("a face", seed=5, n_images=2)
    undisturbed.work()
    before = Bench(tmp_path / "b")
    job_id = before.submit("a face", seed=5, n_images=2).id
    before.tick()
    before.store.close()  # and no more: the process was killed
    after = Bench(tmp_path / "b")
    job = after.queue.get(job_id)
    assert job.state == "queued"
    after.work()
    assert job.state == "succeeded"
    for name in ("0.png", "1.png", "0.f32", "1.f32"):
        assert job.file(name) == wanted.file(name) is not None
    undisturbed.store.close()
    after.store.close()


def test_a_job_that_was_accepted_for_other_weights_says_so(bench: Bench) -> None:
    job = bench.submit("a face", model_hash="e" * 64)
    bench.work()
    assert job.state == "failed" and job.error is not None and job.error["code"] == "model_changed"
