"""How do several requests share the calls of one network?

The rows of all of them are one batch (`core.diffusion.guidance.GuidedBatch`), which is made once for the same requests
under the same guidance. Each request then takes its own step, and fails alone. It does not know texts, VAEs or images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from core.diffusion.conditioning import Model
from core.diffusion.guidance import Guidance, GuidedBatch
from core.diffusion.run import Run, not_finite
from core.diffusion.sampling import NotFiniteError
from core.engine import JobError
from core.nn.memory import in_pieces, out_of_memory

log = logging.getLogger(__name__)


class RunBatch:
    """The guidances that share the network's calls, and what need not be made again while they are the same ones."""

    def __init__(self, guidances: Sequence[Guidance]) -> None:
        self._guidances, self._batch = list(guidances), GuidedBatch(guidances)
        self._rows_at_once = len(self._batch.pictures)  # fewer than all once they did not fit into memory

    def is_of(self, guidances: Sequence[Guidance]) -> bool:
        """Are these the same objects in the same order? A run's are its own, so that they are those of the same runs.
        """
        return len(self._guidances) == len(guidances) and all(
            mine is other for mine, other in zip(self._guidances, guidances, strict=True))

    def predict(self, denoise: Model, x: Tensor, timestep: Tensor) -> tuple[Tensor, set[int]]:
        """The guided prediction of each image, on the CPU, and the images that got none because memory was short (NaN).

        Shapes: x and the result [N, C, h, w], timestep [N], for the N images of all guidances.
        """
        rows_x, rows_timestep, condition = self._batch.inputs(x, timestep)

        def network(rows: slice) -> Tensor:
            return denoise(rows_x[rows], rows_timestep[rows], condition[rows])

        answers, lost = [], set()
        for rows, answer in in_pieces(network, len(rows_x), self._rows_at_once, x.device):
            if answer is None:
                lost.add(self._batch.pictures[rows.start])
                answer = torch.full_like(rows_x[rows], float("nan"))
            answers.append(answer)
        self._rows_at_once = max(map(len, answers))
        return self._batch.combine(answers[0] if len(answers) == 1 else torch.cat(answers)).cpu(), lost


def step_together(
    runs: Sequence[Run], denoise: Model, device: torch.device, before: RunBatch | None = None
) -> RunBatch | None:
    """Take unfinished runs of one network one step further, with one call of it for the images of all of them.

    A run that fails (`not_finite`, `out_of_memory`) gets its `error`; the others do not notice. Returns what to give as
    `before` to the next step; None once a run has finished, whose memory must not wait for that step.
    """
    guidances = [run.guidance for run in runs]
    batch = before if before is not None and before.is_of(guidances) else RunBatch(guidances)
    inputs = [run.denoising.model_input() for run in runs]
    timesteps = [timestep for run, (_, timestep) in zip(runs, inputs, strict=True) for _ in run.seeds]
    x = torch.cat([noisy for noisy, _ in inputs]).to(device)
    prediction, lost = batch.predict(denoise, x, torch.tensor(timesteps, device=device))
    first = 0
    for run, part in zip(runs, prediction.split([run.num_images for run in runs]), strict=True):
        if lost and not lost.isdisjoint(range(first, first + run.num_images)):
            run.error = out_of_memory()
        else:
            _advance(run, part)
        first += run.num_images
    return None if any(run.finished for run in runs) else batch


def _advance(run: Run, prediction: Tensor) -> None:
    try:
        run.advance(prediction)
    except NotFiniteError as error:
        run.error = not_finite(error)
    except Exception as error:  # whatever it was, it is this run's alone
        log.exception("a run failed at step %d of %d", run.done + 1, run.total)
        run.error = JobError.of(error)
