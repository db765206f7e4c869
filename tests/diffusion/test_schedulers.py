"""Is core/diffusion/schedulers.py what it says: diffusers' DPM-Solver++ and UniPC, number for number, without
diffusers?

Its order and its limits on exact networks are in test_diffusion.py, beside those of all samplers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.diffusion.sampling import Denoising
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.schedulers import DPMSolver, make_scheduler, scheduler_config, set_timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
CONFIG = scheduler_config(NoiseSchedule())
THEIRS = {  # how diffusers is asked for the same
    "DPM++ 2M": {"solver_order": 2, "algorithm_type": "dpmsolver++"},
    "DPM++ 2M SDE": {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    "DDIM": {"solver_order": 1, "algorithm_type": "dpmsolver++"},
}


def reference(name: str) -> Any:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    if name == "UniPC":
        return UniPCMultistepScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", solver_order=2,
                                       prediction_type="v_prediction", timestep_spacing="trailing")
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        timestep_spacing="trailing", lambda_min_clipped=-5.1, **THEIRS[name],
    )


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, level: float) -> Tensor:
    """Nothing that a solver could find easy: it bends, and depends on the level and on its neighbours."""
    return torch.sin(3.0 * x + level / 100.0) - 0.5 * x.roll(1, -1)


def way(scheduler: Any, steps: int, start: float = 0.0) -> tuple[list[Tensor], Denoising]:
    """The latents after every step."""
    generators = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    z = None if start == 0.0 else 0.7 * seeded(2, 4, 8, 8, seed=2)
    job = Denoising(scheduler, seeded(2, 4, 8, 8, seed=1), steps, generators=generators, start=start, z=z)
    seen = [job.x]
    while not job.finished:
        job.advance(network(*job.model_input()))
        seen.append(job.x)
    return seen, job


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 500])
@pytest.mark.parametrize("name", [*THEIRS, "UniPC"])
def test_every_step_is_diffusers_own(name: str, steps: int) -> None:
    ours, theirs = make_scheduler(name, CONFIG), reference(name)
    assert isinstance(ours, DPMSolver)
    found, expected = way(ours, steps)[0], way(theirs, steps)[0]
    assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)
    assert len(found) == len(expected) == steps + 1
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype == torch.float32
        # in fact all but UniPC are equal; there diffusers solves two equations a step in float32
        assert float((a - b).abs().max()) <= (1e-5 if name == "UniPC" else 2e-6) * float(b.abs().max()), step


@pytest.mark.parametrize("name", [*THEIRS, "UniPC"])
def test_a_start_on_the_way_is_diffusers_own(name: str) -> None:
    """Edits begin in the middle: noise is added to an image's latent, and no step before it is remembered."""
    for steps, start in ((7, 0.5), (50, 0.4), (50, 0.98), (12, 0.0)):
        found, expected = (way(one, steps, start)[0] for one in (make_scheduler(name, CONFIG), reference(name)))
        assert len(found) == len(expected) == steps - int(start * steps + 1e-6) + 1
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).abs().max()) <= 2e-6 * float(b.abs().max()), (steps, start)


def test_its_own_levels_are_diffusers_own_too() -> None:
    for steps in (1, 2, 3, 10, 50, 333, 1000):
        ours, theirs = make_scheduler("DPM++ 2M", CONFIG), reference("DPM++ 2M")
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert int(ours.timesteps[0]) == int(theirs.timesteps[0])
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_a_way_can_be_begun_again_and_not_overrun() -> None:
    scheduler = make_scheduler("DPM++ 2M", CONFIG)
    first, _ = way(scheduler, 5)
    with pytest.raises(ValueError, match="all 5 steps are taken"):
        scheduler.step(first[0], 0, first[0])
    again, _ = way(scheduler, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "nothing of the first way is left"


def test_fresh_noise_needs_generators_and_is_each_pictures_own() -> None:
    scheduler = make_scheduler("DPM++ 2M SDE", CONFIG)
    set_timesteps(scheduler, 4)
    x = seeded(2, 4, 8, 8, seed=1)
    with pytest.raises(ValueError, match="needs generators"):
        scheduler.step(x, 0, x)
    both = way(make_scheduler("DPM++ 2M SDE", CONFIG), 4)[0][1]
    alone = make_scheduler("DPM++ 2M SDE", CONFIG)
    job = Denoising(alone, x[1:], 4, generators=[torch.Generator().manual_seed(8)])
    job.advance(network(*job.model_input()))
    assert torch.equal(job.x, both[1:])


def test_the_promised_solvers_do_not_import_diffusers() -> None:
    program = f"""
import sys
sys.modules["diffusers"] = None  # importing it fails, as where it is not installed
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.schedulers import make_scheduler, scheduler_config
for name in {[*THEIRS, "UniPC"]}:
    make_scheduler(name, scheduler_config(NoiseSchedule()))
try:
    make_scheduler("Euler", scheduler_config(NoiseSchedule()))
except ImportError:
    print("the others do")
"""
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=300)
    assert answer.stdout.strip() == "the others do", answer.stderr
