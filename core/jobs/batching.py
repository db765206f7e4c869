"""How do many jobs share one engine?

`EngineBatch` is what the queue drives (`core.jobs.worker.Batch`): it turns a job's stored request into a run of the
engine, steps all running jobs together and reports pictures, previews and errors of each as events. It does not know
threads, HTTP or what draws.
"""

from __future__ import annotations

import base64
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from core.engine import MAX_IMAGES, DrawRequest, Engine, EngineInfo, Interpolation, JobError, Picture, Run
from core.imaging.image_io import is_white, read_image
from core.jobs.job import Job, explained

log = logging.getLogger(__name__)


def image_url(job_id: str, index: int, suffix: str = "png") -> str:
    return f"/jobs/{job_id}/images/{index}.{suffix}"


def picture_name(index: int, step: int | None = None) -> str:
    """The file of one image's picture: the final one, or the preview of one step."""
    return f"{index}.png" if step is None else f"{index}-{step}.png"


def latent_name(index: int, step: int | None = None) -> str:
    """The file with the latent of that picture, little-endian float32 in C order."""
    return f"{index}.f32" if step is None else f"{index}-{step}.f32"


def draw_request(request: Mapping[str, Any], info: EngineInfo) -> DrawRequest:
    """A job's stored request as the engine wants it.

    Raises JobError (`model_changed`) when it was accepted for other weights: its pictures would not be the same.
    """
    if request["model_hash"] != info.model_hash:
        message = f"The job was accepted for another version of the model than {info.name} as it is loaded now."
        raise JobError("model_changed", message, "Send the request again.")
    latent, num_images = request["latent"], request["n_images"]
    texts = [latent] * num_drawn(request) if isinstance(latent, str) else latent
    picture, mask, target = (request.get(name) for name in ("init_image", "mask", "interpolate_to"))

    def array(text: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(text), "<f4").reshape(info.latent_shape)

    return DrawRequest(
        prompt=request["prompt"],
        num_images=num_images,
        num_inference_steps=request["n_inf_steps"],
        seed=request["seed"],
        guidance_scale=request["guidance_scale"],
        negative_prompt=request["negative_prompt"],
        sampler=request["sampler"],
        latents=texts and np.stack([array(text) for text in texts]),
        start=request["start_timestep"],
        init_image=picture and read_image(base64.b64decode(picture)),
        strength=request.get("strength", 1.0),
        mask=mask and is_white(read_image(base64.b64decode(mask))),
        variation_strength=request.get("variation_strength", 0.0),
        variation_seed=request.get("variation_seed", 0),
        interpolate_to=target and Interpolation(
            target["prompt"], target["seed"], target["latent"] and array(target["latent"]), target["weight"]
        ),
        watermark=request.get("watermark", False),  # jobs of older servers were accepted without
        attributes=request.get("attributes") or {},
        candidates=request.get("candidates"),
        balance=request.get("balance", False),
    )


def num_drawn(request: Mapping[str, Any]) -> int:
    """How many pictures are drawn for a request, kept or not."""
    return request.get("candidates") or request["n_images"]


def rows_of(request: Mapping[str, Any], info: EngineInfo) -> int:
    """Rows that the network computes a step for a request: of every image one or two, by its guidance, and two more a
    slider."""
    scale, (low, high) = request["guidance_scale"], (1.0, 1.0)
    if info.one_pass is not None and not request["negative_prompt"]:
        low, high = info.one_pass
    passes = 1 if scale == 0 or low <= scale <= high else 2
    return num_drawn(request) * (passes + 2 * len(request.get("attributes") or {}))


def steps_of(request: Mapping[str, Any]) -> int:
    """Steps that are done for a request: those that a picture or a latent to begin with makes needless are not."""
    share = request.get("strength", 1.0) if request.get("init_image") else 1 - request["start_timestep"]
    return round(request["n_inf_steps"] * share)


class Watcher(Protocol):
    """Who is told what the engine does."""

    def stepped(self, seconds: float) -> None: ...
    def drew(self, num_images: int) -> None: ...
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

    def drew(self, num_images: int, seconds: float) -> None:
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


class EngineBatch:
    """The running jobs of one engine (`core.jobs.worker.Batch`).

    At most `max_images` images run, of which at most `max_batch` take part in one step (a job is never divided). When
    not all can, those go whose last step is longest ago: every job steps equally often, so a short one never waits
    for a long one to end.
    """

    def __init__(self, engine: Engine, watcher: Watcher, *, max_batch: int, max_images: int = MAX_IMAGES) -> None:
        self._engine, self._watcher, self._max_batch, self._max_images = engine, watcher, max_batch, max_images
        self._running: deque[tuple[Job, Any]] = deque()  # those that are to step next come first
        self._speeds: deque[float] = deque(maxlen=32)  # seconds an image of the latest steps
        self.costs = StepCosts()
        self._previewed: WeakKeyDictionary[Job, float] = WeakKeyDictionary()  # when each had its last preview

    @property
    def num_images(self) -> int:
        """Images of all running jobs. May be read by any thread."""
        return sum(run.num_images for _, run in tuple(self._running))

    @property
    def seconds_per_image_step(self) -> float | None:
        """The median of the latest steps; None before the first. May be read by any thread."""
        speeds = tuple(self._speeds)
        return statistics.median(speeds) if speeds else None

    @property
    def ahead(self) -> list[tuple[int, int]]:
        """Rows a step and the steps that are left of each running job. May be read by any thread."""
        return [(rows_of(job.request, self._engine.info), run.total - run.done) for job, run in tuple(self._running)]

    def has_room(self, job: Job) -> bool:
        wanted = num_drawn(job.request)
        return not self._running or self.num_images + wanted <= self._max_images

    def admit(self, job: Job) -> None:
        """Begin to draw. The newcomer steps first: who watches sees at once that something happens.

        Raises JobError when it cannot be drawn.
        """
        try:
            run = self._engine.begin(draw_request(job.request, self._engine.info))
        except ValueError as error:
            raise JobError("invalid_request", f"The model refused the request: {error}.") from error
        self._running.appendleft((job, run))

    def drop(self, job: Job) -> None:
        """Forget a job that was cancelled."""
        self._running = deque(entry for entry in self._running if entry[0] is not job)

    def rest(self) -> bool:
        """Let the engine use that nobody waits; False: it has nothing left to do."""
        return self._engine.rest()

    def step(self) -> Iterator[tuple[Job, JobError | None]]:
        """Take as many jobs as fit one step further; yields those that ended, with what they failed of if they did."""
        chosen = self._choose()
        moving = [run for _, run in chosen if not run.finished]  # start_timestep = 1 leaves no step to do
        rows = sum(rows_of(job.request, self._engine.info) for job, run in chosen if not run.finished)
        broken: JobError | None = None
        try:
            if moving:
                began = time.perf_counter()
                self._engine.step(moving)
                seconds = time.perf_counter() - began
                self._speeds.append(seconds / sum(run.num_images for run in moving))
                self.costs.stepped(rows, seconds)
                self._watcher.stepped(seconds)
        except Exception as raised:  # a fault of the engine ends the jobs of this step, and no others
            broken = explained(raised, "the engine failed", chosen[0][0])
        for job, run in chosen:
            error = broken
            try:
                if error is None and not self._report(job, run):
                    continue
            except Exception as raised:
                error = explained(raised, "the engine failed", job)
            self.drop(job)
            self._watcher.ended(error is None)
            yield job, error

    def _choose(self) -> list[tuple[Job, Any]]:
        """The next jobs, in turn, until the batch is full; they go to the end of the line."""
        chosen: list[tuple[Job, Any]] = []
        room = self._max_batch
        while self._running and (not chosen or self._running[0][1].num_images <= room):
            chosen.append(self._running.popleft())
            room -= chosen[-1][1].num_images
        self._running.extend(chosen)
        return chosen

    def _is_time(self, job: Job) -> bool:
        """Whether somebody watches this job and has seen nothing (new) for as long as was asked."""
        every, last = job.request.get("preview_every_s"), self._previewed.get(job)
        return every is not None and (last is None or time.perf_counter() - last >= every)

    def _report(self, job: Job, run: Run) -> bool:
        """Tell the job how far it is; True when its pictures are there. Raises JobError."""
        if run.error is not None:
            raise run.error
        job.progress(run.done, run.total)
        if job.cancel_requested:  # the queue drops it before the next step; what nobody wants is not decoded
            return False
        if not run.finished:
            if run.done % job.request["stream_freq"] == 0 or self._is_time(job):
                self._previewed[job] = time.perf_counter()
                previews = self._engine.previews(run)
                files = {picture_name(picture.index, run.done): picture.png for picture in previews}
                files |= {latent_name(picture.index, run.done): picture.latent for picture in previews}
                job.keep(files, [("preview", update(run, picture)) for picture in previews])
            return False
        began = time.perf_counter()
        pictures = self._engine.pictures(run)
        files = {picture_name(picture.index): picture.png for picture in pictures}
        files |= {latent_name(picture.index): picture.latent for picture in pictures}
        for picture in pictures:
            about = {**update(run, picture), **picture.about, "url": image_url(job.id, picture.index)}
            job.emit("image", about, files)
            files = {}  # all were written with the first: one wait for the disk instead of eight
        self.costs.drew(run.num_images, time.perf_counter() - began)
        self._watcher.drew(len(pictures))
        log.info("job %s drawn", job.id, extra={"job_id": job.id})
        return True


def update(run: Run, picture: Picture) -> dict[str, int]:
    """What an event says of a picture."""
    return {"index": picture.index, "seed": picture.seed, "t": run.done, "total_t": run.total}
