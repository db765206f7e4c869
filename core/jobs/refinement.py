"""How does a finished image become the beginning of another?

A job that is to be refined is generated as any other. Then its images are enlarged to what the refining model generates
and changed a little by image to image (https://arxiv.org/abs/2108.01073), all of a job in one run. Both are kept: the
image before is that of the last step of the first run.

It does not know when that happens (`core/jobs/batching.py`), nor what generates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.engine import Engine, GeneratedImage, GenerationRequest, JobError, usual_sampler
from core.imaging.image_io import crop_square
from core.jobs.job import Job
from core.jobs.result_files import image_name, latent_name


def begin_refinement(engine: Engine, request: Mapping[str, Any], pictures: Sequence[np.ndarray]) -> Any:
    """The run that refines these images, uint8 [h, w, 3], each from its own latent; the i-th has the seed + i.

    Raises JobError: `model_changed` when the request was accepted for other weights, `invalid_request`.
    """
    wanted, size = request["refine"], engine.info.image_size
    if wanted["model_hash"] != engine.info.model_hash:
        raise JobError("model_changed", f"The job was accepted for another version of the model {engine.info.name}.",
                       "Send the request again.")
    prompt = request["prompt"] if wanted.get("prompt") is None else wanted["prompt"]
    try:
        return engine.start(GenerationRequest(
            prompt=prompt,
            num_images=len(pictures),
            num_inference_steps=request["n_inf_steps"],
            seed=request["seed"],
            guidance_scale=engine.info.default_guidance_scale,
            sampler=usual_sampler(engine.info, request["n_inf_steps"]),
            negative_prompt=request["negative_prompt"],
            latents=np.stack([engine.encode(crop_square(pixels, size)) for pixels in pictures]),
            start=1.0 - wanted["strength"],
            watermark=request.get("watermark", False),
        ))
    except ValueError as error:
        raise JobError("invalid_request", f"The refining model refused the request: {error}.") from error


def keep_unrefined(job: Job, done: int, total: int, pictures: Sequence[GeneratedImage]) -> None:
    """Keep the finished images of the first run for as long as the job, as those of its step `done`."""
    files = {image_name(picture.index, done): picture.png for picture in pictures}
    files |= {latent_name(picture.index, done): picture.latent for picture in pictures}
    for picture in pictures:
        event = {"index": picture.index, "seed": picture.seed, "t": done, "total_t": total}
        job.emit("preview", event, files)
        files = {}
