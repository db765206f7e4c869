"""How does noise become a latent? Noise schedules, prediction targets, loss weights, guidance, sampling.

Everything between a trained network and a clean latent is here, once. The network is a pure function
``model(x, timestep, condition) -> prediction``; it does not know the architecture, the text encoder or the VAE.
The samplers are diffusers' schedulers, but for DPM-Solver++, the default (`core/solvers.py`): importing diffusers takes
seconds, so that happens when one of its samplers is first asked for.

Notation: z clean latent, eps noise, x = alpha z + sigma eps noisy latent, t timestep in [0, 1000).
Sources: DDPM https://arxiv.org/abs/2006.11239, cosine schedule https://arxiv.org/abs/2102.09672, v-prediction
https://arxiv.org/abs/2202.00512 (appendix D), min-SNR weights https://arxiv.org/abs/2303.09556 (eq. 8), classifier-free
guidance https://arxiv.org/abs/2207.12598, rectified flow https://arxiv.org/abs/2209.03003 with logit-normal times
https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from core.solvers import DPMSolver

NUM_TRAIN_TIMESTEPS = 1000
Model = Callable[[Tensor, Tensor, "Condition"], Tensor]


class NotFiniteError(FloatingPointError):
    """The network produced NaN or infinity; an error, never a black picture."""


# ----------------------------------------------------------------------------------------------------------- condition


@dataclass(frozen=True)
class Condition:
    """What a batch of pictures is asked to be. ``null`` marks rows that use the learned null instead of their text.

    ``guidance`` is a scale that a distilled network answers at, in one pass; 1, as when it is not said, is none, which
    is all that other networks know.

    Shapes: tokens [B, L, E], mask [B, L] bool (True = a real token), pooled [B, E], px [B] source resolution in pixels,
    null [B] bool, guidance [B].
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    px: Tensor
    null: Tensor
    guidance: Tensor = None  # type: ignore[assignment]  # never None once made

    def __post_init__(self) -> None:
        if self.guidance is None:
            object.__setattr__(self, "guidance", torch.ones_like(self.px))

    def __len__(self) -> int:
        return len(self.px)

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return Condition(*(getattr(self, f.name)[rows] for f in fields(self)))

    def nulled(self) -> Condition:
        """The same batch without its text and guidance (unconditional; px stays)."""
        return Condition(self.tokens, self.mask, self.pooled, self.px, torch.ones_like(self.null))

    def at_scale(self, scale: float | Tensor) -> Condition:
        """The same batch, to be answered in one pass at these guidance scales; without text there is none (1)."""
        return replace(self, guidance=torch.where(self.null, 1.0, torch.ones_like(self.px) * scale))

    def to(self, device: torch.device | str) -> Condition:
        """Every tensor on ``device``."""
        return Condition(*(getattr(self, f.name).to(device) for f in fields(self)))

    def repeat(self, count: int) -> Condition:
        """Every row ``count`` times, in order: a, a, b, b, ..."""
        return Condition(*(getattr(self, f.name).repeat_interleave(count, dim=0) for f in fields(self)))


def join_conditions(parts: Sequence[Condition]) -> Condition:
    """Concatenate batches; token axes are padded to the longest (padding is masked, so it changes nothing)."""
    longest = max(part.tokens.shape[1] for part in parts)

    def padded(part: Condition) -> Condition:
        missing = longest - part.tokens.shape[1]
        tokens = torch.nn.functional.pad(part.tokens, (0, 0, 0, missing))
        return replace(part, tokens=tokens, mask=torch.nn.functional.pad(part.mask, (0, missing)))

    whole = [padded(part) for part in parts]
    return Condition(*(torch.cat([getattr(part, f.name) for part in whole]) for f in fields(Condition)))


# ------------------------------------------------------------------------------------------------------------ schedule


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha and sigma at each timestep, and the prediction target that belongs to them.

    ``cosine``: variance preserving, v-prediction, min-SNR weights. ``flow``: straight lines alpha = 1 - s, sigma = s
    with s = (t + 1) / 1000, velocity target, logit-normal times. In both, target = d x / d(angle or s), so the
    network's task and the sampler's use of it have one form.
    """

    kind: Literal["cosine", "flow"] = "cosine"
    min_snr_gamma: float = 5.0
    weighting: Literal["min-snr", "clamped-v"] = "min-snr"
    begin: tuple[float, float] = (float(NUM_TRAIN_TIMESTEPS), 0.0)  # of drawing; ``flow`` begins at noise

    def __post_init__(self) -> None:
        most, less = self.begin
        if not (1 <= most <= NUM_TRAIN_TIMESTEPS and 0 <= less < most):
            raise ValueError(f"begin must be a, b with 1 <= a <= 1000 and 0 <= b < a, got {most}, {less}")

    def first_timestep(self, num_inference_steps: int) -> int:
        """Where n steps from noise begin: with ``begin`` (a, b) at a - b / (n + 2), held within the timesteps.

        Above it is next to no picture (alpha < 0.02 at 990), the first guess there is the mean of all faces, and a step
        across it costs as much as any other: with few steps much is won by beginning where there is something to say.
        """
        most, less = self.begin
        return int(min(max(round(most - less / (num_inference_steps + 2)), 1), NUM_TRAIN_TIMESTEPS)) - 1

    def alphas_cumprod(self, device: torch.device | str = "cpu") -> Tensor:
        """alpha^2 at every timestep [1000] (float64); for ``cosine`` exactly diffusers' "squaredcos_cap_v2"."""
        steps = torch.arange(NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64, device=device) / NUM_TRAIN_TIMESTEPS
        if self.kind == "flow":
            return (1.0 - steps[1:]).square()
        bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2).square()
        return torch.cumprod(1.0 - (1.0 - bar[1:] / bar[:-1]).clamp(max=0.999), dim=0)

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B] float32, at integer or fractional timesteps [B] (linear in between)."""
        exact = torch.float32 if timestep.device.type == "mps" else torch.float64  # MPS has no float64
        t = timestep.to(exact).clamp(0, NUM_TRAIN_TIMESTEPS - 1)
        if self.kind == "flow":
            sigma = (t + 1) / NUM_TRAIN_TIMESTEPS
            return (1.0 - sigma).float(), sigma.float()
        table = self.alphas_cumprod("cpu" if exact == torch.float32 else timestep.device).to(t)
        low = t.floor().long()
        high = (low + 1).clamp(max=NUM_TRAIN_TIMESTEPS - 1)
        bar = torch.lerp(table[low], table[high], t - low)
        return bar.sqrt().float(), (1.0 - bar).sqrt().float()

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Training timesteps [count]: one from each equal slice of the distribution, shuffled (less noise)."""
        u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        if self.kind == "flow":  # logit-normal(0, 1): most weight in the middle of the line
            u = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        return (u * NUM_TRAIN_TIMESTEPS).floor().clamp(max=NUM_TRAIN_TIMESTEPS - 1)

    def add_noise(self, z: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        """x = alpha z + sigma eps, shapes [B, C, h, w]."""
        alpha, sigma = (_spread(c, z) for c in self.coefficients(timestep))
        return alpha * z + sigma * eps

    def target(self, z: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        """v = alpha eps - sigma z (cosine) or eps - z (flow)."""
        if self.kind == "flow":
            return eps - z
        alpha, sigma = (_spread(c, z) for c in self.coefficients(timestep))
        return alpha * eps - sigma * z

    def denoised(self, x: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The clean latent that a prediction stands for: alpha x - sigma v (cosine) or x - s v (flow)."""
        alpha, sigma = (_spread(c, x) for c in self.coefficients(timestep))
        return x - sigma * prediction if self.kind == "flow" else alpha * x - sigma * prediction

    def loss_weight(self, timestep: Tensor) -> Tensor:
        """Weight [B] of the squared error of the prediction; 1 for flow.

        For v: ``min-snr`` is min(SNR, gamma) / (SNR + 1), which all but ignores the noisiest levels, where the text
        decides sex, hair and pose; ``clamped-v`` is min(SNR + 1, gamma) / (SNR + 1), the same at low noise and 1 there.
        """
        if self.kind == "flow":
            return torch.ones_like(timestep, dtype=torch.float32)
        alpha, sigma = self.coefficients(timestep)
        snr = alpha.square() / sigma.square().clamp_min(1e-12)
        known = snr + 1.0 if self.weighting == "clamped-v" else snr
        return known.clamp(max=self.min_snr_gamma) / (snr + 1.0)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] in the dtype of ``like``."""
    return values.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


# ------------------------------------------------------------------------------------------------------------ sampling

TURBO, TURBO_STEPS = "Turbo", 4  # needs the consistency network of a model folder (`turbo/`), which the others do not
SAMPLERS: tuple[str, ...] = ("UniPC", "DPM++ 2M", "DPM++ 2M SDE", "DDIM", "DDPM", "Euler", "Euler a")


def scheduler_config(schedule: NoiseSchedule) -> dict[str, Any]:
    """What a model folder stores about its noise schedule."""
    return {"schedule": schedule.kind, "num_train_timesteps": NUM_TRAIN_TIMESTEPS, "begin": list(schedule.begin),
            "prediction_type": "flow" if schedule.kind == "flow" else "v_prediction",
            "samplers": list(samplers_for(schedule)), "default_sampler": samplers_for(schedule)[0],
            "long_sampler": samplers_for(schedule)[0]}


def samplers_for(schedule: NoiseSchedule) -> tuple[str, ...]:
    """Names of the samplers that can follow this schedule, the default first."""
    return ("Flow Euler",) if schedule.kind == "flow" else SAMPLERS


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a model folder's ``scheduler/config.json``."""
    if config.get("schedule") not in ("cosine", "flow") or config.get("num_train_timesteps") != NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"unknown noise schedule {dict(config)!r}")
    begin = config.get("begin", NoiseSchedule.begin)  # older folders do not say it
    return NoiseSchedule(config["schedule"], begin=tuple(float(one) for one in begin))  # type: ignore[arg-type]


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh scheduler for one job; schedulers keep state, so they are never shared.

    ``begin`` of it is where this model begins (`NoiseSchedule`), for ``set_timesteps``, ``usual`` whether it is the
    schedule's default. Raises ValueError for a name that does not fit the schedule in ``config``.
    """
    schedule = schedule_from_config(config)
    scheduler = _bare_scheduler(name, schedule)
    scheduler.begin, scheduler.usual = schedule.first_timestep, name == samplers_for(schedule)[0]
    return scheduler


def _bare_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    if name == TURBO:
        from core.distillation import ConsistencySteps

        return ConsistencySteps(schedule)
    if name not in samplers_for(schedule):
        raise ValueError(f"sampler {name!r} is not one of {', '.join(samplers_for(schedule))}")
    if name in ("DPM++ 2M", "DPM++ 2M SDE"):
        return DPMSolver(schedule.alphas_cumprod(), stochastic=name.endswith("SDE"))
    if name == "UniPC":
        return DPMSolver(schedule.alphas_cumprod(), corrected=True)
    if name == "DDIM":  # first-order DPM-Solver++ is DDIM; DDIMScheduler steps wrongly where n does not divide 1000
        return DPMSolver(schedule.alphas_cumprod(), order=1)
    import diffusers

    if schedule.kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
    common: dict[str, Any] = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS, "beta_schedule": "squaredcos_cap_v2",
                              "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    if name == "DDPM":
        return diffusers.DDPMScheduler(**common, clip_sample=False)
    if name == "Euler":
        return diffusers.EulerDiscreteScheduler(**common)
    return diffusers.EulerAncestralDiscreteScheduler(**common)


def set_timesteps(scheduler: Any, num_inference_steps: int) -> Tensor:
    """Give ``scheduler`` exactly ``num_inference_steps`` distinct levels, evenly spaced from where this model begins
    (``NoiseSchedule.begin``) down to the data.

    diffusers' own "trailing" spacing gives one level too many or too few for most numbers (with a clipped far end) and
    for some of them visits t = -1; on straight lines its last step goes nowhere. Returns the timesteps [n], on the CPU:
    reading one from an accelerator would make every step wait for it. Raises ValueError outside 1 ... 1000.
    """
    count = num_inference_steps
    if not 1 <= count <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"num_inference_steps must be 1 ... {NUM_TRAIN_TIMESTEPS}, got {count}")
    if not hasattr(scheduler, "alphas_cumprod"):  # flow: s = 1, ..., 1/n, then 0
        scheduler.set_timesteps(sigmas=[1.0 - i / count for i in range(count)])
        return scheduler.timesteps
    scheduler.set_timesteps(count)
    end = int(scheduler.timesteps[0])  # the far end, clipped where the solver needs it
    if hasattr(scheduler, "begin"):
        end = min(end, scheduler.begin(count))
    end = max(end + 1, count)  # unless all levels are needed
    levels = [round(end - i * end / count) - 1 for i in range(count)]
    scheduler.timesteps = torch.tensor(levels, dtype=scheduler.timesteps.dtype)
    if hasattr(scheduler, "sigmas"):
        bar = scheduler.alphas_cumprod[levels].double()
        # float64: in float32 the ancestral step takes the root of a small negative number after two huge levels
        scheduler.sigmas = torch.cat([((1.0 - bar) / bar).sqrt(), bar.new_zeros(1)])
    return scheduler.timesteps


@dataclass(frozen=True)
class Guidance:
    """What one job's pictures should be, how strongly (w = ``scale``) and away from what.

    ``negative`` None is the learned null. ``target`` is a condition to lead to: picture i stands at the share
    ``weights[i]`` of the way, and is predicted by so much of both. Mixing what the network says, not what it is told,
    is smooth and exact at both ends, whatever the lengths of the texts (the score of a product of experts,
    https://arxiv.org/abs/2206.01714, eq. 11).

    A push is a weight and a condition whose answer, so weighed, is added to the guided prediction. The weights of all
    pushes sum to 0, or the level of noise would drift; pairs of +s and -s push from one text towards another (semantic
    guidance, https://arxiv.org/abs/2301.12247). All conditions have one row a picture.

    ``known`` are the scales that the network answers in one pass, from the first to the last, where it was distilled
    (core/distillation.py): nothing but a negative needs a second one then.
    """

    condition: Condition
    scale: float = 1.0
    negative: Condition | None = None
    target: Condition | None = None
    weights: Sequence[float] = ()
    pushes: tuple[tuple[float, Condition], ...] = ()
    known: tuple[float, float] | None = None

    @property
    def at_once(self) -> bool:
        """Does one pass of the network give the guided prediction?"""
        inside = self.known is not None and self.known[0] <= self.scale <= self.known[1]
        return inside and self.scale != 1.0 and self.negative is None

    @property
    def scales(self) -> list[float]:
        """How strongly each picture is guided: away from a negative always, else where there is text, on a way from one
        text to another in proportion."""
        if self.negative is not None:
            return [self.scale] * len(self.condition)
        found = self.condition.at_scale(self.scale).guidance
        if self.target is not None:
            found = found.lerp(self.target.at_scale(self.scale).guidance, torch.tensor(list(self.weights)).to(found))
        return found.tolist()

    def passes(self) -> list[Condition]:
        """The conditions to run: the wanted alone (w = 1: off, or w known), the unwanted alone (w = 0), else both."""
        wanted = self.condition
        if self.target is not None:
            ends = [(wanted, self.target)[weight == 1.0][i : i + 1] for i, weight in enumerate(self.weights)]
            wanted = join_conditions(ends)
        if self.at_once:
            return [wanted.at_scale(self.scale)]
        if self.scale == 1.0:
            return [wanted]
        unwanted = self.condition.nulled() if self.negative is None else self.negative
        return [unwanted] if self.scale == 0.0 else [wanted, unwanted]

    def between(self) -> list[int]:
        """The pictures that need the target's prediction beside that of the condition."""
        leads = self.target is not None and self.scale != 0.0
        return [i for i, weight in enumerate(self.weights) if leads and 0.0 < weight < 1.0]

    @cached_property
    def num_passes(self) -> list[int]:
        """How often the network is asked about each picture, at each step."""
        passes, between = len(self.passes()) + len(self.pushes), self.between()
        return [passes + (i in between) for i in range(len(self.condition))]


class GuidedBatch:
    """Classifier-free guidance and pushes, u + w (c - u) + sum s_k p_k, for several jobs in one call of the network.

    Its rows are one for every picture, in the order of the jobs, after them a second one for each picture whose job
    compares (two passes), one for each picture between two conditions, and then, push by push, one for each
    picture whose job has so many. A job without pushes gets exactly what it gets without its neighbours'. It holds
    while the jobs stay the same: build it once, not once a step.
    """

    def __init__(self, jobs: Sequence[Guidance]) -> None:
        passes = [job.passes() for job in jobs]
        ends = [(job, job.target[torch.tensor(rows, device=job.target.px.device)])
                for job in jobs if (rows := job.between()) and job.target is not None]
        targets = [end.at_scale(job.scale) if job.at_once else end for job, end in ends]
        layers = [[job for job in jobs if len(job.pushes) > k] for k in range(max(len(job.pushes) for job in jobs))]
        self.condition = join_conditions(
            [one[0] for one in passes] + [one[1] for one in passes if len(one) == 2] + targets
            + [job.pushes[k][1] for k, layer in enumerate(layers) for job in layer]
        )
        compares: list[int] = []
        scales: list[float] = []
        between: list[int] = []
        weights: list[float] = []
        pushed: list[list[int]] = [[] for _ in layers]
        strengths: list[list[float]] = [[] for _ in layers]
        self.num_pictures = 0
        for job, own in zip(jobs, passes, strict=True):
            last = self.num_pictures + len(own[0])
            between += [self.num_pictures + i for i in job.between()]
            weights += [job.weights[i] for i in job.between()]
            for k, (strength, _) in enumerate(job.pushes):
                pushed[k] += range(self.num_pictures, last)
                strengths[k] += [strength] * len(own[0])
            if len(own) == 2:
                compares += range(self.num_pictures, last)
                scales += [job.scale] * len(own[0])
            self.num_pictures = last
        again = chain(compares, between, *pushed)
        self.pictures = [*range(self.num_pictures), *again]  # which picture each row belongs to
        device = self.condition.px.device
        self._again = torch.tensor(self.pictures[self.num_pictures :], device=device, dtype=torch.int64)
        self._scales = torch.tensor(scales, device=device).view(-1, 1, 1, 1)
        self._compares = torch.tensor(compares, device=device, dtype=torch.int64)
        self._weights = torch.tensor(weights, device=device).view(-1, 1, 1, 1)
        self._between = torch.tensor(between, device=device, dtype=torch.int64)
        self._pushed = [torch.tensor(rows, device=device) for rows in pushed]
        self._strengths = [torch.tensor(layer, device=device).view(-1, 1, 1, 1) for layer in strengths]
        self._all = len(compares) == self.num_pictures

    def inputs(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """What to ask the network: x [N, C, h, w] and timestep [N] of N pictures, spread over the rows."""
        if not len(self._again):
            return x, timestep, self.condition
        return torch.cat([x, x[self._again]]), torch.cat([timestep, timestep[self._again]]), self.condition

    def combine(self, prediction: Tensor) -> Tensor:
        """The network's answer, one row a row of ``inputs``, as one guided prediction a picture [N, C, h, w]."""
        sizes = [self.num_pictures, len(self._compares), len(self._between), *map(len, self._pushed)]
        result, unwanted, target, *answers = prediction.split(sizes)
        if len(target):
            start = result[self._between]
            result = result.index_copy(0, self._between, start + self._weights * (target - start))
        if len(unwanted):
            wanted = result if self._all else result[self._compares]
            compared = unwanted + self._scales * (wanted - unwanted)
            result = compared if self._all else result.index_copy(0, self._compares, compared)
        for rows, strengths, answer in zip(self._pushed, self._strengths, answers, strict=True):
            result = result.index_add(0, rows, strengths * answer)  # no row twice: the sum has one order on any device
        return result


def guided(
    model: Model,
    x: Tensor,
    timestep: Tensor,
    condition: Condition,
    guidance_scale: float,
    negative: Condition | None = None,
    known: tuple[float, float] | None = None,
) -> Tensor:
    """The guided prediction of one job at one noise level: ``GuidedBatch`` of this job alone.

    Shapes: x [B, C, h, w], timestep [B], result [B, C, h, w].
    """
    batch = GuidedBatch([Guidance(condition, guidance_scale, negative, known=known)])
    return batch.combine(model(*batch.inputs(x, timestep)))


class Denoising:
    """One job's way from noise to clean latents: its scheduler, latents, random numbers and place on the way.

    The loop turned inside out, so that jobs of any sampler and length can share one call of the network:

        while not job.finished:
            x, level = job.model_input()
            job.advance(prediction of the network for x at level)

    ``noise`` [B, C, h, w] is the starting noise and ``generators`` (one a picture, on the CPU) feed stochastic
    samplers, so a picture does not depend on its neighbours. ``start`` in [0, 1] skips that share of the steps and
    begins from ``z`` with noise added to the level of the first remaining step. ``correction`` takes the clean latents
    and the number of steps at the end of a whole way by the schedule's default sampler, whose errors it knows
    (`core.correction`). ``x`` is the noisy latent as the scheduler keeps it; ``done`` of ``total`` steps are behind it.
    Raises ValueError for a number of steps outside 1 ... 1000 and for a start without latents.
    """

    def __init__(
        self,
        scheduler: Any,
        noise: Tensor,
        num_inference_steps: int,
        *,
        schedule: NoiseSchedule | None = None,
        generators: Sequence[torch.Generator] | None = None,
        start: float = 0.0,
        z: Tensor | None = None,
        correction: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        self.schedule = schedule or NoiseSchedule()
        timesteps, flow = set_timesteps(scheduler, num_inference_steps), self.schedule.kind == "flow"
        self._timesteps, self._levels = list(timesteps), (timesteps - int(flow)).float().tolist()
        self.total, self.done = len(timesteps), int(start * len(timesteps) + 1e-6)  # 1 - 0.9 is less than a tenth
        if hasattr(scheduler, "set_begin_index"):  # told once, so that no step searches for its own place
            scheduler.set_begin_index(self.done)
        if self.done == 0:
            self.x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
        elif z is None:
            raise ValueError("start > 0 needs the latents z to start from")
        elif self.finished:
            self.x = z
        else:
            t = timesteps[self.done].expand(len(z)).to(z.device)
            self.x = self.schedule.add_noise(z, noise, t - 1) if flow else scheduler.add_noise(z, noise, t)
        self._correction = correction if self.done == 0 and getattr(scheduler, "usual", False) else None
        takes_noise = generators is not None and "generator" in inspect.signature(scheduler.step).parameters
        self._extra = {"generator": list(generators or ())} if takes_noise else {}
        self._scheduler, self._seen = scheduler, (self.x, 0.0)
        self._prediction: Tensor | None = None

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def model_input(self) -> tuple[Tensor, float]:
        """What the network is to look at next: latents [B, C, h, w] and their timestep in [0, 1000)."""
        t = self._timesteps[self.done]
        scaled = hasattr(self._scheduler, "scale_model_input")
        self._seen = self._scheduler.scale_model_input(self.x, t) if scaled else self.x, self._levels[self.done]
        return self._seen

    @property
    def seen(self) -> tuple[Tensor, float]:
        """The last ``model_input``."""
        return self._seen

    def advance(self, prediction: Tensor) -> None:
        """One step down by the network's (guided) answer to ``model_input``. Raises NotFiniteError on NaN/inf."""
        if not bool(torch.isfinite(prediction).all()):
            raise NotFiniteError(f"the network gave NaN or infinity at step {self.done + 1} of {self.total}")
        t, self._prediction = self._timesteps[self.done], prediction
        self.x = self._scheduler.step(prediction, t, self.x, **self._extra, return_dict=False)[0]
        self.done += 1
        if self.finished and self._correction is not None:
            self.x = self._correction(self.x, self.total)

    def denoised(self) -> Tensor:
        """The clean latents [B, C, h, w] as the last prediction has them; the starting point before the first."""
        if self._prediction is None or (self.finished and self._correction is not None):
            return self.x
        x, level = self._seen
        return self.schedule.denoised(x, self._prediction, torch.full((len(x),), level, device=x.device))


def sample(
    model: Model,
    condition: Condition,
    scheduler: Any,
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    *,
    schedule: NoiseSchedule | None = None,
    negative: Condition | None = None,
    known: tuple[float, float] | None = None,
    generators: Sequence[torch.Generator] | None = None,
    start: float = 0.0,
    z: Tensor | None = None,
    correction: Callable[..., Tensor] | None = None,
    on_step: Callable[[int, int, Tensor], bool | None] | None = None,
) -> Tensor:
    """Run the whole of one job; returns whitened clean latents [B, C, h, w]. The arguments are those of ``Denoising``
    and of ``Guidance``, but that ``correction`` is told the guidance scale of each picture, too.

    ``on_step(done, total, denoised)`` sees the predicted clean latent after every step and stops the loop by returning
    True. Raises NotFiniteError on NaN/inf.
    """
    guidance = Guidance(condition, guidance_scale, negative, known=known)
    job = Denoising(scheduler, noise, num_inference_steps, schedule=schedule, generators=generators, start=start, z=z,
                    correction=correction and partial(correction, scales=guidance.scales))
    batch = GuidedBatch([guidance])
    while not job.finished:
        x, level = job.model_input()
        job.advance(batch.combine(model(*batch.inputs(x, torch.full((len(x),), level, device=x.device)))))
        if on_step is not None and on_step(job.done, job.total, job.denoised()):
            break
    return job.x
