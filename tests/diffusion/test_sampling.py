"""Does noise become the right image? The equations of core/diffusion/sampling.py against known answers.

The data are Gaussian numbers of standard deviation s, so the best possible network is a formula (E[z|x] =
alpha s^2 x / (alpha^2 s^2 + sigma^2)) and so is what every sampler must reach: from pure noise, the probability flow
ends at s * noise, and a stochastic sampler at numbers of standard deviation s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.diffusion.conditioning import Condition, join_conditions
from core.diffusion.guidance import Guidance, GuidedBatch, guided
from core.diffusion.sampling import Denoising, NotFiniteError, sample
from core.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule, per_image, schedule_from_config
from core.diffusion.schedulers import SAMPLERS, make_scheduler, samplers_for, scheduler_config, set_timesteps

COSINE, FLOW = NoiseSchedule(), NoiseSchedule("flow")
EVERY = [(COSINE, name) for name in SAMPLERS] + [(FLOW, "Flow Euler")]
STOCHASTIC = ("DDPM", "Euler a", "DPM++ 2M SDE")
DETERMINISTIC = [(schedule, name) for schedule, name in EVERY if name not in STOCHASTIC]
IDS = {"ids": lambda value: value if isinstance(value, str) else value.kind}


def condition(batch: int, *, length: int = 3, fill: float = 0.0) -> Condition:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return Condition(torch.full((batch, length, 2), fill), mask, torch.full((batch, 2), fill),
                     torch.full((batch,), 128.0), torch.zeros(batch, dtype=torch.bool))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def posterior_mean(schedule: NoiseSchedule, s: float, x: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = (per_image(c) for c in schedule.coefficients(t))
    return alpha * s * s * x / (alpha.square() * s * s + sigma.square())


def gaussian(schedule: NoiseSchedule, s: float, calls: list[float] | None = None) -> Callable[..., Tensor]:
    """The exact network for data N(0, s^2): the target that the schedule asks for, of the best guess of z."""

    def model(x: Tensor, t: Tensor, _: Condition) -> Tensor:
        if calls is not None:
            calls.append(float(t[0]))
        alpha, sigma = (per_image(c) for c in schedule.coefficients(t))
        z = posterior_mean(schedule, s, x, t)
        return schedule.target(z, (x - alpha * z) / sigma, t)

    return model


def draw(schedule: NoiseSchedule, name: str, noise: Tensor, steps: int, s: float = 0.6, **more: object) -> Tensor:
    generators = [torch.Generator().manual_seed(100 + i) for i in range(len(noise))]
    return sample(gaussian(schedule, s), condition(len(noise)), make_scheduler(name, scheduler_config(schedule)), noise,
                  steps, schedule=schedule, **{"generators": generators, **more})  # type: ignore[arg-type]


def errors(schedule: NoiseSchedule, name: str, s: float, steps: list[int]) -> list[tuple[float, float]]:
    """For each number of steps, the relative errors of the final latent and of the clean estimate halfway."""
    noise, found = seeded(2, 1, 8, 8), []
    for n in steps:
        scheduler, seen = make_scheduler(name, scheduler_config(schedule)), []
        z = sample(gaussian(schedule, s), condition(2), scheduler, noise, n, schedule=schedule,
                   on_step=lambda done, total, denoised, seen=seen: seen.append(denoised))
        t = scheduler.timesteps[n // 2 : n // 2 + 1].float() - int(schedule.kind == "flow")
        alpha, sigma = schedule.coefficients(t)
        # on the exact path x_t = sqrt(alpha^2 s^2 + sigma^2) * noise
        exact = float(posterior_mean(schedule, s, per_image((alpha * s).square() + sigma.square()).sqrt(), t))
        found.append((float((z / noise).median()) / s - 1, float((seen[n // 2] / noise).median()) / exact - 1))
    return found


# --------------------------------------------------------------------------------------------------- order and accuracy


@pytest.mark.parametrize("s", [0.6, 1.0, 2.0])
@pytest.mark.parametrize(("schedule", "name"), [(COSINE, "DDIM"), (COSINE, "Euler"), (FLOW, "Flow Euler")], **IDS)
def test_first_order_samplers_halve_their_error(schedule: NoiseSchedule, name: str, s: float) -> None:
    found = errors(schedule, name, s, [8, 16, 32, 64, 128])
    for place in (0, 1):
        ratios = [a[place] / b[place] for a, b in zip(found, found[1:], strict=False)]
        assert all(1.8 < ratio < 2.1 for ratio in ratios), ratios
    assert abs(found[-1][0]) < 0.015


@pytest.mark.parametrize("s", [0.6, 1.0, 2.0])
def test_dpm_solver_2m_is_of_second_order(s: float) -> None:
    found = errors(COSINE, "DPM++ 2M", s, [8, 16, 32, 64, 128])
    order = math.log2(found[0][1] / found[-1][1]) / 4  # halfway: the last step down from t > 0 is first-order by design
    assert 1.6 < order < 2.1, found
    assert math.log2(abs(found[0][0] / found[-1][0])) / 4 > 1.6 and abs(found[-1][0]) < 1.5e-3, found


@pytest.mark.parametrize("s", [0.6, 1.0, 2.0])
def test_unipc_is_of_second_order_or_better(s: float) -> None:
    found = errors(COSINE, "UniPC", s, [4, 64])  # the corrector lifts it towards third order
    assert 2.0 < math.log2(abs(found[0][1] / found[1][1])) / 4 < 3.7, found
    assert math.log2(abs(found[0][0] / found[1][0])) / 4 > 2.0 and abs(found[-1][0]) < 1e-3, found


@pytest.mark.parametrize("s", [0.6, 2.0])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_reach_the_spread_of_the_data(name: str, s: float) -> None:
    noise = seeded(64, 1, 8, 8)
    z = draw(COSINE, name, noise, 100, s)
    assert abs(float(z.std()) / s - 1) < 0.09
    correlation = float((z * noise).mean() / (z.std() * noise.std()))
    assert abs(correlation) < 0.2  # new noise has replaced most of the first


@pytest.mark.parametrize(("schedule", "name"), EVERY, **IDS)
def test_every_number_of_steps_is_that_number_of_passes(schedule: NoiseSchedule, name: str) -> None:
    noise = seeded(4, 1, 8, 8)
    for steps in (1, 2, 3, 4, 5, 7, 64, 128, 999 if name == "DPM++ 2M" else 256):
        calls: list[float] = []
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        reports: list[tuple[int, int]] = []
        z = sample(gaussian(schedule, 0.6, calls), condition(4), make_scheduler(name, scheduler_config(schedule)),
                   noise, steps, schedule=schedule, generators=generators,
                   on_step=lambda done, total, _, reports=reports: reports.append((done, total)))
        assert len(calls) == steps and calls == sorted(set(calls), reverse=True), steps
        assert 0 <= calls[-1] and calls[0] < NUM_TRAIN_TIMESTEPS and calls[0] >= 995
        assert reports == [(i + 1, steps) for i in range(steps)]
        assert bool(torch.isfinite(z).all()), steps
        if steps >= 128 and name in STOCHASTIC:
            assert 0.5 < float(z.std()) < 0.75, steps
        elif steps >= 128:
            assert float((z - 0.6 * noise).abs().mean()) < 0.006, steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_are_distinct_and_even_for_all_thousand_counts(name: str) -> None:
    scheduler = make_scheduler(name, scheduler_config(COSINE))
    for steps in range(1, 1001, 9):
        t = set_timesteps(scheduler, steps)
        gaps = -t.diff()
        assert len(t) == steps == len(getattr(scheduler, "sigmas", torch.zeros(steps + 1))) - 1
        assert float(t[0]) >= 995 and float(t[-1]) >= 0
        if steps > 1:
            assert 1 <= float(gaps.min()) and float(gaps.max() - gaps.min()) <= 1
            assert abs(float(t[-1] + 1) - float(gaps.float().mean())) <= 1.5  # the last step down is like the others
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match=f"1 ... 1000, got {wrong}"):
            set_timesteps(scheduler, wrong)


@pytest.mark.parametrize("steps", [7, 64, 300])
def test_ddim_is_its_formula_where_the_steps_do_not_divide_the_schedule(steps: int) -> None:
    """DDIM, eq. 12 with eta = 0 (https://arxiv.org/abs/2010.02502), written down in float64 over the same levels."""
    noise, s = seeded(2, 1, 8, 8), 0.6
    scheduler = make_scheduler("DDIM", scheduler_config(COSINE))
    z = sample(gaussian(COSINE, s), condition(2), scheduler, noise, steps)
    bar = torch.cat([COSINE.alphas_cumprod()[scheduler.timesteps], torch.ones(1, dtype=torch.float64)])
    factor = torch.ones((), dtype=torch.float64)  # everything is linear in x for Gaussian data
    for now, after in zip(bar, bar[1:], strict=False):
        clean = now.sqrt() * s * s / (now * s * s + 1 - now)
        factor = factor * (after.sqrt() * clean + (1 - after).sqrt() * (1 - now.sqrt() * clean) / (1 - now).sqrt())
    assert torch.allclose(z, factor.float() * noise, rtol=2e-4, atol=1e-5)


def test_why_ddim_is_not_diffusers_ddim_scheduler() -> None:
    """DDIMScheduler steps to t - 1000 // n, which is not the next level where n does not divide 1000."""
    from diffusers import DDIMScheduler

    noise, s, steps = seeded(2, 1, 8, 8), 0.6, 300
    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
                           timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.set_timesteps(steps)
    x, model = noise, gaussian(COSINE, s)
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.expand(2).float(), condition(2)), int(t), x, return_dict=False)[0]
    ours = float((draw(COSINE, "DDIM", noise, steps) - s * noise).abs().mean())
    assert ours < 0.003 and float((x - s * noise).abs().mean()) > 10 * ours


# ------------------------------------------------------------------------------------------------------------- schedule


def test_schedule_ends() -> None:
    t = torch.tensor([0.0, 999.0])
    alpha, sigma = COSINE.coefficients(t)
    assert sigma[0] < 0.01 and alpha[0] > 0.9999 and alpha[1] < 1e-4 and sigma[1] == 1.0
    alpha, sigma = FLOW.coefficients(t)
    assert torch.allclose(alpha, torch.tensor([0.999, 0.0])) and torch.allclose(sigma, torch.tensor([0.001, 1.0]))


def test_the_cosine_schedule_is_diffusers_own_and_variance_preserving() -> None:
    theirs = make_scheduler("DDPM", scheduler_config(COSINE)).alphas_cumprod
    ours = COSINE.alphas_cumprod()
    assert ours.dtype == torch.float64 and ours.shape == (1000,) and bool((ours.diff() < 0).all())
    assert torch.allclose(ours.float(), theirs, rtol=2e-4, atol=1e-8)
    t = torch.linspace(0, 999, 777)
    alpha, sigma = COSINE.coefficients(t)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones(777))
    assert torch.allclose(COSINE.coefficients(torch.tensor([10.25]))[0].square(),
                          (0.75 * ours[10] + 0.25 * ours[11]).float())


@pytest.mark.parametrize("schedule", [COSINE, FLOW], **IDS)
def test_prediction_round_trips(schedule: NoiseSchedule) -> None:
    z, eps, t = seeded(6, 2, 4, 4), seeded(6, 2, 4, 4, seed=1), torch.tensor([0.0, 1.0, 250.5, 500.0, 998.0, 999.0])
    x, target = schedule.add_noise(z, eps, t), schedule.target(z, eps, t)
    assert torch.allclose(schedule.denoised(x, target, t), z, atol=1e-5)
    alpha, sigma = (per_image(c) for c in schedule.coefficients(t))
    back = sigma * x + alpha * target if schedule is COSINE else x + alpha * target
    assert torch.allclose(back, eps, atol=1e-5)  # the same numbers read as noise
    assert torch.allclose(x, alpha * z + sigma * eps)


def test_loss_weights() -> None:
    """min(SNR, 5) / (SNR + 1) of the v error equals the clamped weight of the x0 error (min-SNR, eq. 8)."""
    t = torch.arange(1000.0)
    weight = COSINE.loss_weight(t)
    alpha, sigma = COSINE.coefficients(t)
    snr = (alpha / sigma).square()
    low = snr <= 5
    assert torch.allclose(weight[low], alpha[low].square(), atol=1e-6)  # unclamped: snr / (snr + 1) = alpha^2
    assert torch.allclose(weight[~low], 5 * sigma[~low].square(), rtol=1e-4)
    assert 0.82 < float(weight.max()) <= 5 / 6 and abs(int(weight.argmax()) - int(low.int().argmax())) <= 1  # at SNR 5
    assert torch.equal(FLOW.loss_weight(t), torch.ones(1000))
    assert torch.allclose(NoiseSchedule(min_snr_gamma=1e9).loss_weight(t), alpha.square(), atol=1e-6)


def test_training_timesteps_are_stratified() -> None:
    t = COSINE.sample_timesteps(50, torch.Generator().manual_seed(0))
    assert sorted((t // 20).tolist()) == list(range(50))  # one in each fiftieth
    assert t.tolist() != sorted(t.tolist()) and bool((t == t.floor()).all())
    many = COSINE.sample_timesteps(100_000, torch.Generator().manual_seed(1))
    counts = many.long().bincount(minlength=1000)
    assert len(counts) == 1000 and int(counts.min()) >= 98 and int(counts.max()) <= 102
    again = COSINE.sample_timesteps(50, torch.Generator().manual_seed(0))
    assert torch.equal(t, again)


def test_flow_timesteps_are_logit_normal() -> None:
    t = FLOW.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    s = (t + 0.5) / 1000
    logit = torch.log(s / (1 - s))
    assert abs(float(logit.mean())) < 0.01 and abs(float(logit.std()) - 1) < 0.02
    assert float(t.min()) >= 0 and float(t.max()) <= 999


def test_scheduler_config_round_trip_and_refusals() -> None:
    for schedule in (COSINE, FLOW):
        config = scheduler_config(schedule)
        assert schedule_from_config(config) == schedule
        assert tuple(config["samplers"]) == samplers_for(schedule) and config["default_sampler"] in config["samplers"]
        assert config["long_sampler"] in config["samplers"]
    with pytest.raises(ValueError, match="'Flow Euler' is not one of UniPC"):
        make_scheduler("Flow Euler", scheduler_config(COSINE))
    with pytest.raises(ValueError, match="'DDIM' is not one of Flow Euler"):
        make_scheduler("DDIM", scheduler_config(FLOW))
    with pytest.raises(ValueError, match="unknown noise schedule.*linear"):
        schedule_from_config({"schedule": "linear", "num_train_timesteps": 1000})
    with pytest.raises(ValueError, match="unknown noise schedule.*500"):
        schedule_from_config({"schedule": "cosine", "num_train_timesteps": 500})
    later = replace(COSINE, initial_timestep=(990.0, 300.0))
    assert schedule_from_config(json.loads(json.dumps(scheduler_config(later)))) == later
    older = {key: value for key, value in scheduler_config(COSINE).items() if key != "begin"}
    assert schedule_from_config(older) == COSINE
    for wrong in ([1001, 0], [0, 0], [990, 990], [990, -1]):
        with pytest.raises(ValueError, match="initial_timestep must be a, b"):
            schedule_from_config({**scheduler_config(COSINE), "begin": wrong})


LATER = replace(COSINE, initial_timestep=(990.0, 300.0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_begin_where_the_model_says(name: str) -> None:
    for steps, first in ((1, 889), (2, 914), (4, 939), (8, 959), (50, 983), (500, 988), (1000, 999)):
        t = set_timesteps(make_scheduler(name, scheduler_config(LATER)), steps)
        assert len(t) == steps and int(t[0]) == first == max(LATER.first_timestep(steps), steps - 1)
        assert steps == 1 or float((-t.diff()).max() - (-t.diff()).min()) <= 1
    ends = [sample(gaussian(schedule, 0.6), condition(16), make_scheduler(name, scheduler_config(schedule)),
                   seeded(16, 4, 16, 16), 30, schedule=schedule,
                   generators=[torch.Generator().manual_seed(i) for i in range(16)]) for schedule in (COSINE, LATER)]
    assert abs(float(ends[0].std() - ends[1].std())) < 0.02, [float(z.std()) for z in ends]


def test_few_steps_of_the_default_sampler_end_nearer_when_they_begin_later() -> None:
    """On Gaussian data, where the end of every path is known: 0.6 of the noise."""
    noise, errors = seeded(8, 4, 16, 16), {}
    for schedule in (COSINE, LATER):
        for steps in (2, 4, 8):
            scheduler = make_scheduler("UniPC", scheduler_config(schedule))
            z = sample(gaussian(schedule, 0.6), condition(8), scheduler, noise, steps, schedule=schedule)
            errors[schedule.initial_timestep[0], steps] = float((z - 0.6 * noise).abs().mean())
    assert all(errors[990.0, steps] < errors[1000.0, steps] for steps in (2, 4, 8)), errors


# ------------------------------------------------------------------------------------------------------------- guidance


class Spy:
    """A network that is linear in what it is told, and remembers how many rows each pass had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, told: Condition) -> Tensor:
        self.rows.append(len(x))
        weights = told.mask.float()[..., None]
        text = (told.tokens * weights).sum((1, 2)) + told.pooled.sum(1)
        return x * per_image(t + 1) + per_image(torch.where(told.null, -7.0, text))


def test_guidance_identities() -> None:
    x, t = seeded(3, 1, 4, 4), torch.tensor([3.0, 50.0, 900.0])
    wanted, away = condition(3, fill=0.5), condition(3, length=5, fill=-0.25)
    spy = Spy()
    c, u, n = spy(x, t, wanted), spy(x, t, wanted.nulled()), spy(x, t, away)

    def run(w: float, negative: Condition | None = None) -> Tensor:
        spy.rows.clear()
        return guided(spy, x, t, wanted, w, negative)

    assert torch.equal(run(1.0), c) and spy.rows == [3]
    assert torch.equal(run(1.0, away), c) and spy.rows == [3]
    assert torch.equal(run(0.0), u) and spy.rows == [3]
    assert torch.equal(run(0.0, away), n) and spy.rows == [3]
    for w in (0.5, 2.0, 7.5, -1.0):
        assert torch.allclose(run(w), u + w * (c - u), atol=1e-3) and spy.rows == [6]  # both passes in one
        assert torch.allclose(run(w, away), n + w * (c - n), atol=1e-3) and spy.rows == [6]
    assert torch.allclose(run(3.0), 2 * run(2.0) - run(1.0), atol=1e-3)  # linear in w
    assert torch.allclose(run(2.0, wanted), c, atol=1e-4)  # away from itself is nowhere


def test_a_batch_guides_every_job_by_its_own_scale() -> None:
    """Whatever shares the call, each job gets what ``guided`` gives it alone, for as few rows."""
    away = condition(2, length=5, fill=-0.25)
    jobs = [Guidance(condition(2, fill=0.5), 3.0), Guidance(condition(1, fill=0.2), 1.0),
            Guidance(condition(2, length=7, fill=0.1), 7.5, away), Guidance(condition(1), 0.0),
            Guidance(condition(2, fill=0.3), 0.0, away)]
    x, t = seeded(8, 1, 4, 4), torch.linspace(1, 900, 8)
    for chosen, rows in ((jobs, 12), (jobs[1::2], 2), (jobs[::2], 10), (jobs[:1], 4)):
        spy, counts = Spy(), [len(job.condition) for job in chosen]
        batch = GuidedBatch(chosen)
        together = batch.combine(spy(*batch.inputs(x[: sum(counts)], t[: sum(counts)])))
        assert spy.rows == [rows] == [len(batch.pictures)] and len(together) == sum(counts)
        first = 0
        for job, count in zip(chosen, counts, strict=True):
            mine = slice(first, first + count)
            alone = guided(spy, x[mine], t[mine], job.condition, job.scale, job.negative)
            assert torch.allclose(together[mine], alone, rtol=1e-5, atol=1e-4)
            first += count


def test_conditions_join_repeat_and_null() -> None:
    short, long = condition(2, length=2, fill=1.0), condition(1, length=4, fill=2.0)
    both = join_conditions([short, long])
    assert both.tokens.shape == (3, 4, 2) and both.mask.sum(1).tolist() == [2, 2, 4] and len(both) == 3
    assert float(both.tokens[:2, 2:].abs().sum()) == 0
    assert both[torch.tensor([2, 0])].mask.sum(1).tolist() == [4, 2]
    repeated = both.repeat(2)
    assert repeated.mask.sum(1).tolist() == [2, 2, 2, 2, 4, 4]
    nulled = both.nulled()
    assert bool(nulled.null.all()) and not bool(both.null.any()) and torch.equal(nulled.px, both.px)
    assert both.to("cpu").tokens.device.type == "cpu"


# ------------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("name", ["DPM++ 2M SDE", "DDPM", "Euler a", "Euler"])
def test_the_same_seed_is_the_same_picture_alone_or_in_company(name: str) -> None:
    noise = seeded(3, 2, 4, 4)

    def run(rows: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(500 + i) for i in rows]
        return draw(COSINE, name, noise[rows], 12, generators=generators)

    together = run([0, 1, 2])
    assert torch.equal(run([1]), together[1:2]) and torch.equal(run([2, 0]), together[[2, 0]])
    other = draw(COSINE, name, noise[:1], 12, generators=[torch.Generator().manual_seed(9)])
    assert torch.equal(other, together[:1]) == (name == "Euler")


def test_jobs_of_every_kind_share_one_loop() -> None:
    """All samplers with different numbers of steps, images and starts, joining late and leaving early."""
    model, config = gaussian(COSINE, 0.6), scheduler_config(COSINE)

    def begin(i: int) -> Denoising:
        count = 1 + i % 3
        generators = [torch.Generator().manual_seed(10 * i + k) for k in range(count)]
        more = {"start": 0.4, "z": 0.6 * seeded(count, 1, 4, 4, seed=50 + i)} if i % 4 == 3 else {}
        return Denoising(make_scheduler(SAMPLERS[i % len(SAMPLERS)], config), seeded(count, 1, 4, 4, seed=i), 5 + 2 * i,
                         generators=generators, **more)  # type: ignore[arg-type]

    def advance(jobs: list[Denoising]) -> None:
        asked = [job.model_input() for job in jobs]
        levels = torch.tensor([level for x, level in asked for _ in range(len(x))])
        prediction = model(torch.cat([x for x, _ in asked]), levels, condition(len(levels)))
        for job, part in zip(jobs, prediction.split([len(x) for x, _ in asked]), strict=True):
            job.advance(part)

    count = 2 * len(SAMPLERS)
    waiting, running, finished = [begin(i) for i in range(count)], [], []
    abandoned = begin(3)
    while waiting or running:
        running += waiting[:1]  # one joins at every step
        del waiting[:1]
        advance([abandoned, *running] if abandoned.done < 4 else running)
        finished += [job for job in running if job.finished]
        running = [job for job in running if not job.finished]
    assert len(finished) == count and abandoned.done == 4
    together = {job.total: job.x for job in finished}
    for i in range(count):
        alone = begin(i)
        while not alone.finished:
            advance([alone])
        assert torch.equal(together[alone.total], alone.x), i


def test_a_job_knows_its_place_and_its_clean_estimate() -> None:
    noise = seeded(2, 1, 4, 4)
    job = Denoising(make_scheduler("Euler", scheduler_config(COSINE)), noise, 3)
    assert (job.done, job.total, job.finished) == (0, 3, False) and torch.equal(job.denoised(), job.x)
    x, level = job.model_input()
    assert float(x.std() / noise.std()) == pytest.approx(1.0, abs=1e-3) and level == 999.0  # scaled for the network
    job.advance(gaussian(COSINE, 0.6)(x, torch.full((2,), level), condition(2)))
    assert job.done == 1 and torch.allclose(job.denoised(), torch.zeros(()), atol=0.01)  # nothing but the mean is known
    skipped = Denoising(make_scheduler("Euler", scheduler_config(COSINE)), noise, 3, start=1.0, z=noise)
    assert skipped.finished and skipped.x is noise


def test_nan_and_infinity_are_errors() -> None:
    for bad in (math.nan, math.inf):
        def model(x: Tensor, t: Tensor, _: Condition, bad: float = bad) -> Tensor:
            return torch.where(t.view(-1, 1, 1, 1) < 500, bad, torch.zeros_like(x))

        with pytest.raises(NotFiniteError, match="step 6 of 10"):
            sample(model, condition(1), make_scheduler("DDIM", scheduler_config(COSINE)), seeded(1, 1, 4, 4), 10)


def test_on_step_sees_clean_estimates_and_can_stop() -> None:
    noise, seen = seeded(2, 1, 8, 8), []

    def on_step(done: int, total: int, denoised: Tensor) -> bool:
        seen.append((done, total, denoised))
        return done == 5

    draw(COSINE, "DPM++ 2M", noise, 20, on_step=on_step)
    assert [(done, total) for done, total, _ in seen] == [(i, 20) for i in range(1, 6)]
    full: list[Tensor] = []
    final = draw(COSINE, "DPM++ 2M", noise, 20, on_step=lambda done, total, denoised: full.append(denoised))
    assert torch.equal(full[4], seen[4][2])
    assert torch.allclose(full[-1], final, atol=1e-5)  # the last estimate is the image
    spreads = [float(denoised.std()) for denoised in full]
    assert spreads == sorted(spreads) and spreads[0] < 0.02  # from the mean of all images to one image


@pytest.mark.parametrize(("schedule", "name"), EVERY, **IDS)
def test_start_skips_steps_and_keeps_the_picture(schedule: NoiseSchedule, name: str) -> None:
    z, noise = 0.6 * seeded(8, 1, 8, 8, seed=3), seeded(8, 1, 8, 8)
    kept = []
    for start, expected in ((0.25, 15), (0.5, 10), (0.9, 2)):
        steps: list[int] = []
        result = draw(schedule, name, noise, 20, start=start, z=z,
                      on_step=lambda done, total, _, steps=steps: steps.append(done))
        assert steps == list(range(20 - expected + 1, 21))
        kept.append(float((result * z).mean() / (result.std() * z.std())))
        assert 0.4 < float(result.std()) < 0.75  # noise of the right level was added, or the spread would be off
    assert kept == sorted(kept) and kept[0] < 0.7 and kept[-1] > 0.9
    assert draw(schedule, name, noise, 20, start=1.0, z=z) is z
    assert torch.equal(draw(schedule, name, noise, 4, start=0.1, z=z), draw(schedule, name, noise, 4))  # rounds to none
    with pytest.raises(ValueError, match="start > 0 needs the latents z"):
        draw(schedule, name, noise, 20, start=0.5)


def test_clamped_v_weights_equal_min_snr_at_low_noise_and_one_at_high_noise() -> None:
    t = torch.tensor([10.0, 100.0, 950.0, 999.0])
    clamped = NoiseSchedule(weighting="clamped-v").loss_weight(t)
    assert torch.allclose(clamped[:2], NoiseSchedule().loss_weight(t)[:2], rtol=1e-5)
    assert torch.allclose(clamped[2:], torch.ones(2))
