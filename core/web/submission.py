"""How does a checked request become a job?

What is kept of it, so that the job can be done again after any restart; what clients are shown of it; and what they are
told when the queue takes no more. It does not know what is done with the job.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from core.engine import EngineInfo, usual_sampler
from core.jobs.admission import QueueClosed, QueueFull
from core.jobs.job import Job
from core.jobs.queue import IdempotencyConflict
from core.jobs.service import EngineService
from core.text.prompt_balancing import balanced, open_facets
from core.text.prompt_parser import read as read_prompt
from core.text.prompt_rewriting import unread_from, unread_in, unread_warning
from core.text.word_status import spoken_attributes
from core.web.errors import Problem, stopping
from core.web.options import QUALITY, fewest_steps
from core.web.parameters import filled_in
from core.web.requests import TextToImage

log = logging.getLogger(__name__)


MANY_TIMES = 2  # from so many times the steps that would do, a request is told so


def steps_warning(wanted: TextToImage, info: EngineInfo) -> str | None:
    """That fewer steps would do, where that was measured: with the model's own sampler."""
    steps = filled_in(wanted, info)["n_inf_steps"]
    share = QUALITY[-1][1]
    enough = fewest_steps(info.step_curve, share)
    if enough is None or steps < MANY_TIMES * enough or wanted.sampler not in (None, usual_sampler(info, steps)):
        return None
    return (f"{enough} steps would do: their pictures were measured within {share:.0%} of the best, "
            f"and {steps} steps take about {steps / enough:.0f} times as long.")


def warnings_of(wanted: TextToImage, words: Mapping[str, str], info: EngineInfo, seed: int) -> list[str]:
    """What the model will not understand of a request's prompts, and which wishes will change nothing.

    Image i of a request that goes round what its prompt leaves open has the words of ``seed`` + i before it.
    """
    target = (wanted.interpolate_to and wanted.interpolate_to.prompt) or ""
    found: list[str] = []
    is_ours = "vocabulary" not in info.lacks  # which words another model learned is not known
    for what, text in (("The prompt", wanted.prompt), ("The prompt of interpolate_to", target)):
        cut = unread_in(text, info)
        found += [*unread_warning(what, text, cut), *(read_prompt(text[:cut], words).warnings if is_ours else ())]
    if wanted.balance and unread_in(wanted.prompt, info) == len(wanted.prompt):
        longer = {balanced(wanted.prompt, seed + i) for i in range(wanted.n_images)}
        lost = {text[unread_in(text, info):] for text in longer}
        found += unread_warning("With the words that balance puts before it, the prompt", max(lost, key=len), 0)
    negative = wanted.negative_prompt  # encoded as it is
    found += unread_warning("The negative prompt", negative, unread_from(negative, negative, info.encoded_length))
    stated = read_prompt(wanted.prompt[:unread_in(wanted.prompt, info)], words).attributes
    spoken = spoken_attributes(words)
    left_open = open_facets(stated, spoken)
    if (wanted.candidates or 0) > wanted.n_images and not (stated or wanted.balance and left_open):
        found.append("The prompt states nothing that can be judged: of the candidates the first are kept.")
    if wanted.balance and not left_open:
        found.append("The prompt leaves nothing open: balance changes nothing.")
    found += [f"The model has no words for the slider {name}: what it changes is left to chance."
              for name in wanted.attributes or () if name not in spoken]
    if (costly := steps_warning(wanted, info)) is not None:
        found.append(costly)
    return list(dict.fromkeys(found))


def submit(
    service: EngineService,
    info: EngineInfo,
    words: Mapping[str, str],
    wanted: TextToImage,
    pictures: Mapping[str, str],
    *,
    client: str,
    key: str | None,
    watermark: bool | None = None,
    shown: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> Job:
    """Make a job, or find the one that this client made with this idempotency `key`.

    `pictures` are those of the request as they are kept. `watermark` None is the server's usual. `shown` is added to
    what clients are told, `kept` to what only the server knows.

    Raises problems: 422 for a key of another request, 429 when the queue is full, 503 when the server stops.
    """
    parameters = {**filled_in(wanted, info), **(shown or {})}
    request = {**parameters, "latent": wanted.latent, "model_hash": info.model_hash,
               "watermark": service.watermark if watermark is None else watermark, **pictures, **(kept or {})}
    if wanted.interpolate_to is not None:
        request["interpolate_to"] = wanted.interpolate_to.model_dump()
    warnings = warnings_of(wanted, words, info, parameters["seed"])
    try:
        job = service.queue.submit(
            wanted.prompt, parameters, request, client=client, warnings=warnings, idempotency_key=key,
            fingerprint=wanted.model_dump_json(),  # as it was asked for: a seed drawn here differs every time
        )
    except IdempotencyConflict as error:
        detail = "was used before, for another request"
        errors = [{"pointer": "Idempotency-Key", "message": detail}]
        raise Problem(422, f"This Idempotency-Key {detail}.", errors=errors) from error
    except QueueClosed as error:
        raise stopping() from error
    except QueueFull as error:
        raise Problem(429, f"The queue is full: {error}.", {"Retry-After": str(error.retry_after_s)}) from error
    log.info("job %s accepted", job.id, extra={"job_id": job.id})
    return job
