"""Is the loss of a denoiser what its formula says, and does its mean count every image once?"""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from core.diffusion.conditioning import Condition
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.training_loss import denoising_loss, loss_by_level, mean_loss
from core.training.latent_cache import Batch
from tests.diffusion.test_sampling import condition

PLAIN = SimpleNamespace(autocast=nullcontext)


def batch(z: float, noise: float, timesteps: list[float]) -> Batch:
    shape = (len(timesteps), 4, 2, 2)
    return Batch(torch.full(shape, z), torch.full(shape, noise), torch.tensor(timesteps), condition(len(timesteps)),
                 torch.ones(len(timesteps)))


def silent(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    return torch.zeros_like(x)


def test_the_loss_of_v_has_its_known_values() -> None:
    """A network that says nothing errs by v itself: (alpha eps - sigma z)^2, weighted by min(SNR, 5) / (SNR + 1)."""
    schedule, levels = NoiseSchedule(), [0.0, 400.0, 999.0]
    alpha, sigma = schedule.coefficients(torch.tensor(levels))
    error, weight = denoising_loss(silent, schedule)(batch(2.0, -1.0, levels))
    for i in range(3):
        a, s = float(alpha[i]), float(sigma[i])
        assert a * a + s * s == pytest.approx(1, abs=1e-6)
        snr = a * a / (s * s)
        assert float(error[i]) == pytest.approx((-a - 2 * s) ** 2, rel=1e-5)
        assert float(weight[i]) == pytest.approx(min(snr, 5.0) / (snr + 1), rel=1e-4)


def test_the_loss_of_a_flow_is_the_distance_from_data_to_noise() -> None:
    error, weight = denoising_loss(silent, NoiseSchedule("flow"))(batch(2.0, -1.0, [10.0, 700.0]))
    assert error.tolist() == [9.0, 9.0] and weight.tolist() == [1.0, 1.0]


def test_a_network_that_knows_the_data_has_no_loss() -> None:
    """For data that are always z = 2 the noise can be told from x: v = (alpha x - z) / sigma."""
    schedule = NoiseSchedule()

    def exact(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (one.view(-1, 1, 1, 1) for one in schedule.coefficients(timestep))
        return (alpha * x - 2.0) / sigma

    error, _ = denoising_loss(exact, schedule)(batch(2.0, 0.7, [300.0, 900.0]))
    assert float(error.max()) < 1e-8


def test_the_mean_counts_pictures_and_not_batches() -> None:
    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.timestep, torch.full_like(batch.timestep, 2.0)

    assert mean_loss(loss, [batch(0, 0, [1.0, 2.0, 3.0]), batch(0, 0, [10.0])], PLAIN) == pytest.approx(2 * 16 / 4)
    assert math.isfinite(mean_loss(loss, [batch(0, 0, [1.0])], PLAIN))


def test_the_loss_by_level_is_the_plain_mean_of_each_slice() -> None:
    """Levels without images are left out, and the mean over all is that of `mean_loss`."""
    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.timestep, torch.full_like(batch.timestep, 2.0)

    batches = [batch(0, 0, [10.0, 190.0, 999.0]), batch(0, 0, [100.0, 400.0])]
    total, levels = loss_by_level(loss, batches, PLAIN, levels=5)
    assert levels == {0: 100.0, 2: 400.0, 4: 999.0} and total == pytest.approx(mean_loss(loss, batches, PLAIN))
