"""How do many jobs share one engine, or a few of them?

`EngineBatch` is what the queue drives (`core.jobs.worker.Batch`): it turns a job's stored request into a run of the
engine of its model, steps all running jobs of a model together and reports images, previews and errors of each as
events. A job that is to be refined has a second run, of another model perhaps (`core/jobs/refinement.py`). It does not
know threads, HTTP or what generates.
"""

from __future__ import annotations

import base64
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from core.engine import (
    MAX_IMAGES,
    Engine,
    EngineInfo,
    GeneratedImage,
    GenerationRequest,
    Interpolation,
    JobError,
    body_name,
)
from core.imaging.image_io import is_white, read_image
from core.jobs.job import Job, explained
from core.jobs.models import Models
from core.jobs.refinement import begin_refinement, keep_unrefined
from core.jobs.result_files import image_name, image_url, latent_name

log = logging.getLogger(__name__)


def to_generation_request(request: Mapping[str, Any], info: EngineInfo) -> GenerationRequest:
    """A job's stored request as the engine wants it.

    Raises JobError (`model_changed`) when it was accepted for other weights: its images would not be the same.
    """
    if request["model_hash"] != info.model_hash:
        message = f"The job was accepted for another version of the model than {info.name} as it is loaded now."
        raise JobError("model_changed", message, "Send the request again.")
    latent = request["latent"]
    texts = [latent] * num_generated(request) if isinstance(latent, str) else latent
    picture, mask, target = (request.get(name) for name in ("init_image", "mask", "interpolate_to"))

    def array(text: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(text), "<f4").reshape(info.latent_shape)

    found: dict[str, Any] = {"watermark": False}  # jobs of older servers were accepted without
    found |= {field.name: request[body_name(field.name)] for field in fields(GenerationRequest)
              if body_name(field.name) in request}
    return GenerationRequest(**found | {
        "latents": texts and np.stack([array(text) for text in texts]),
        "init_image": picture and read_image(base64.b64decode(picture)),
        "mask": mask and is_white(read_image(base64.b64decode(mask))),
        "interpolate_to": target and Interpolation(**target | {"latent": target["latent"] and array(target["latent"])}),
    })


def num_generated(request: Mapping[str, Any]) -> int:
    """How many images are generated for a request, kept or not."""
    return request.get("candidates") or request["n_images"]


def rows_of(request: Mapping[str, Any], info: EngineInfo) -> int:
    """Rows that the network computes a step for a request: of every image one or two, by its guidance, and two more a
    slider."""
    scale, (low, high) = request["guidance_scale"], (1.0, 1.0)
    if info.guidance_range is not None and not request["negative_prompt"]:
        low, high = info.guidance_range
    passes = 1 if scale == 0 or low <= scale <= high else 2
    return num_generated(request) * (passes + 2 * len(request.get("attributes") or {}))


def steps_of(request: Mapping[str, Any]) -> int:
    """Steps that are done for a request: those that an image or a latent to begin with makes needless are not."""
    share = request.get("strength", 1.0) if request.get("init_image") else 1 - request["start_timestep"]
    share += (request.get("refine") or {}).get("strength", 0.0)
    return round(request["n_inf_steps"] * share)


class Watcher(Protocol):
    """Who is told what the engine does."""

    def stepped(self, seconds: float) -> None: ...
    def generated(self, num_images: int) -> None: ...
    def ended(self, succeeded: bool) -> None: ...


class StepCosts:
    """What a step of the network was measured to take here, by the rows that it computed for all jobs together.

    So a job beside others is no longer taken for a slow one. Any thread may read while the engine's thread adds.
    """

    KEPT = 32  # of the latest steps with the same number of rows

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[int, deque[float]] = {}
        self._pictures: deque[float] = deque(maxlen=self.KEPT)

    def stepped(self, rows: int, seconds: float) -> None:
        with self._lock:
            self._steps.setdefault(rows, deque(maxlen=self.KEPT)).append(seconds)

    def generated(self, num_images: int, seconds: float) -> None:
        """Finished images were decoded, assessed and written."""
        with self._lock:
            self._pictures.append(seconds / num_images)

    @property
    def steps(self) -> list[tuple[int, float]]:
        """Rows and the median of the seconds, fewest rows first. Of two the lower: a first one prepares."""
        with self._lock:
            return [(rows, statistics.median_low(found)) for rows, found in sorted(self._steps.items())]

    @property
    def seconds_per_picture(self) -> float:
        """What finishing takes, an image; 0 before the first."""
        with self._lock:
            return statistics.median_low(self._pictures) if self._pictures else 0.0


@dataclass(eq=False)
class Running:
    """A job with its run in the engine of its model.

    `before` steps are behind its run, those that generated what is refined, and `after` are to come when it is
    finished. A run that is finished while steps are to come waits for the model that refines.
    """

    job: Job
    model: str  # as `Models` knows it
    engine: Engine
    run: Any
    before: int = 0
    after: int = 0

    @property
    def done(self) -> int:
        return self.before + self.run.done

    @property
    def total(self) -> int:
        return self.before + self.run.total + self.after

    @property
    def waits(self) -> bool:
        return bool(self.after and self.run.finished and self.run.error is None)


class EngineBatch:
    """The running jobs of the models of a server (`core.jobs.worker.Batch`).

    At most `max_images` images run, of which at most `max_batch` take part in one step (a job is never divided). When
    not all can, those go whose last step is longest ago: every job steps equally often, so a short one never waits
    for a long one to end. Jobs of different models take turns.
    """

    def __init__(self, models: Models, watcher: Watcher, *, max_batch: int, max_images: int = MAX_IMAGES) -> None:
        self._models, self._watcher, self._max_batch, self._max_images = models, watcher, max_batch, max_images
        self._running: deque[Running] = deque()  # those that are to step next come first
        self._speeds: deque[float] = deque(maxlen=32)  # seconds an image of the latest steps of the first model
        self.costs = StepCosts()  # of the first model
        self._previewed: WeakKeyDictionary[Job, float] = WeakKeyDictionary()  # when each had its last preview

    @property
    def num_images(self) -> int:
        """Images of all running jobs. May be read by any thread."""
        return sum(one.run.num_images for one in tuple(self._running))

    @property
    def seconds_per_image_step(self) -> float | None:
        """The median of the latest steps; None before the first. May be read by any thread."""
        speeds = tuple(self._speeds)
        return statistics.median(speeds) if speeds else None

    @property
    def ahead(self) -> list[tuple[int, int]]:
        """Rows a step and the steps that are left of each running job. May be read by any thread."""
        return [(rows_of(one.job.request, one.engine.info), one.total - one.done) for one in tuple(self._running)]

    @property
    def models_in_use(self) -> frozenset[str]:
        """Those whose runs have steps to do."""
        return frozenset(one.model for one in tuple(self._running) if not one.waits)

    @property
    def is_away(self) -> bool:
        return False

    def has_room(self, job: Job) -> bool:
        wanted, name = num_generated(job.request), self._name_of(job)
        if not self._running:
            return True
        fits = self.num_images + wanted <= self._max_images and self._models.has_room_for(name, self.models_in_use)
        return fits and not any(one.waits for one in self._running)  # or those would never have their turn

    def admit(self, job: Job) -> None:
        """Begin to generate. The newcomer steps first: who watches sees at once that something happens.

        Raises JobError when it cannot be generated.
        """
        name = self._name_of(job)
        engine = self._engine_for(job, name)
        try:
            run = engine.start(to_generation_request(job.request, engine.info))
        except ValueError as error:
            raise JobError("invalid_request", f"The model refused the request: {error}.") from error
        after = job.request["n_inf_steps"] if job.request.get("refine") else 0
        self._running.appendleft(Running(job, name, engine, run, after=after))

    def _name_of(self, job: Job) -> str:
        """The model of a job; jobs of older servers name the only one there was, whatever it is called now."""
        return self._models.find(job.request.get("model")) or self._models.first

    def _engine_for(self, job: Job, name: str) -> Engine:
        """The engine of a model. That it has to be loaded first is told to the job. Raises JobError."""
        if not self._models.is_loaded(name):
            job.emit("status", {"status": "running", "error": None, "loading": self._models.shown(name)})
        return self._models.engine(name, self.models_in_use)

    def drop(self, job: Job) -> None:
        """Forget a job that was cancelled."""
        self._running = deque(one for one in self._running if one.job is not job)

    def on_idle(self) -> bool:
        """Let the loaded engines use that nobody waits; False: they have nothing left to do."""
        return self._models.on_idle()

    def step(self) -> Iterator[tuple[Job, JobError | None]]:
        """Take as many jobs as fit one step further; yields those that ended, with what they failed of if they did."""
        chosen = self._choose()
        moving = [one for one in chosen if not one.run.finished]  # start_timestep = 1 leaves no step to do
        broken: JobError | None = None
        try:
            if moving:
                began, engine = time.perf_counter(), moving[0].engine
                engine.step([one.run for one in moving])
                self._measured(moving, time.perf_counter() - began)
        except Exception as raised:  # a fault of the engine ends the jobs of this step, and no others
            broken = explained(raised, "the engine failed", chosen[0].job)
        for one in chosen:
            error = broken
            try:
                if error is None and not self._report(one):
                    continue
            except Exception as raised:
                error = explained(raised, "the engine failed", one.job)
            self.drop(one.job)
            self._watcher.ended(error is None)
            yield one.job, error
        yield from self._refine_those_that_wait()

    def _measured(self, moving: Sequence[Running], seconds: float) -> None:
        """Remember what a step took; what steps cost is told of the first model alone."""
        if moving[0].model == self._models.first:
            self._speeds.append(seconds / sum(one.run.num_images for one in moving))
            self.costs.stepped(sum(rows_of(one.job.request, one.engine.info) for one in moving), seconds)
        self._watcher.stepped(seconds)

    def _choose(self) -> list[Running]:
        """The next jobs of the model whose turn it is, until the batch is full; they go to the end of the line."""
        able = [one for one in self._running if not one.waits]
        chosen: list[Running] = []
        room = self._max_batch
        for one in [one for one in able if one.engine is able[0].engine]:
            if chosen and one.run.num_images > room:  # nobody is overtaken
                break
            chosen.append(one)
            room -= one.run.num_images
        self._running = deque([*(one for one in self._running if one not in chosen), *chosen])
        return chosen

    def _refine_those_that_wait(self) -> Iterator[tuple[Job, JobError | None]]:
        """Begin the second run of jobs whose first one is finished, as soon as the model for it can be loaded."""
        for one in [one for one in self._running if one.waits]:
            shown = one.job.request["refine"]["model"]
            found = self._models.find(shown)
            name = shown if found is None else found
            if one.job.cancel_requested or not self._models.has_room_for(name, self.models_in_use):
                continue
            try:
                pictures = one.engine.pictures(one.run)
                engine = self._engine_for(one.job, name)
                run = begin_refinement(engine, one.job.request, [read_image(picture.png) for picture in pictures])
            except Exception as raised:
                self.drop(one.job)
                self._watcher.ended(False)
                yield one.job, explained(raised, "the refinement could not begin", one.job)
                continue
            keep_unrefined(one.job, one.done, one.total, pictures)
            one.before, one.after = one.run.total, 0
            one.model, one.engine, one.run = name, engine, run

    def _is_time(self, job: Job) -> bool:
        """Whether somebody watches this job and has seen nothing (new) for as long as was asked."""
        every, last = job.request.get("preview_every_s"), self._previewed.get(job)
        return every is not None and (last is None or time.perf_counter() - last >= every)

    def _report(self, one: Running) -> bool:
        """Tell the job how far it is; True when its images are there. Raises JobError."""
        job, run, engine = one.job, one.run, one.engine
        if run.error is not None:
            raise run.error
        job.progress(one.done, one.total)
        if one.waits or job.cancel_requested:  # dropped before the next step: what nobody wants is not decoded
            return False
        if not run.finished:
            if one.done % job.request["stream_freq"] == 0 or self._is_time(job):
                self._previewed[job] = time.perf_counter()
                previews = engine.previews(run)
                files = {image_name(picture.index, one.done): picture.png for picture in previews}
                files |= {latent_name(picture.index, one.done): picture.latent for picture in previews}
                job.keep(files, [("preview", update(one, picture)) for picture in previews])
            return False
        began = time.perf_counter()
        pictures = engine.pictures(run)
        files = {image_name(picture.index): picture.png for picture in pictures}
        files |= {latent_name(picture.index): picture.latent for picture in pictures}
        for picture in pictures:
            about = {**update(one, picture), **picture.assessment, "url": image_url(job.id, picture.index)}
            if one.before:
                about["before"] = f"{about['url']}?t={one.before}"
            job.emit("image", about, files)
            files = {}  # all were written with the first: one wait for the disk instead of eight
        self.costs.generated(run.num_images, time.perf_counter() - began)
        self._watcher.generated(len(pictures))
        log.info("job %s generated", job.id, extra={"job_id": job.id})
        return True


def update(one: Running, picture: GeneratedImage) -> dict[str, int]:
    """What an event says of an image."""
    return {"index": picture.index, "seed": picture.seed, "t": one.done, "total_t": one.total}
