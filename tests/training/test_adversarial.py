"""Do the losses and penalties of adversarial training give the answers that are known, and is collapse seen?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from core.training.adversarial import (
    CollapseBounds,
    collapse_sentence,
    discriminator_loss,
    diversity,
    generator_loss,
    gradient_penalty,
    path_length_penalty,
    path_lengths,
)


def test_losses_of_a_discriminator_that_knows_nothing_are_logarithms_of_two() -> None:
    zeros = torch.zeros(4)
    assert float(discriminator_loss(zeros, zeros)) == pytest.approx(2 * math.log(2))
    assert float(generator_loss(None, zeros)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(zeros, zeros, "relativistic")) == pytest.approx(math.log(2))


def test_softplus_is_the_cross_entropy_of_real_and_fake() -> None:
    real, fake = torch.tensor([0.3, -1.0]), torch.tensor([2.0, -0.5])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = entropy(real, torch.ones(2)) + entropy(fake, torch.zeros(2))
    torch.testing.assert_close(discriminator_loss(real, fake), expected)


def test_the_relativistic_loss_sees_differences_alone_and_the_generator_wants_the_opposite() -> None:
    real, fake = torch.tensor([0.3, -1.0]), torch.tensor([2.0, -0.5])
    loss = discriminator_loss(real, fake, "relativistic")
    torch.testing.assert_close(discriminator_loss(real + 5, fake + 5, "relativistic"), loss)
    torch.testing.assert_close(generator_loss(fake, real, "relativistic"), loss)
    with pytest.raises(ValueError, match="the loss is 'hinge'; it must be one of relativistic, softplus"):
        discriminator_loss(real, fake, "hinge")
    with pytest.raises(ValueError, match="logits of real images"):
        generator_loss(None, fake, "relativistic")


def test_the_gradient_penalty_of_a_quadratic_is_known() -> None:
    """D(x) = a |x|^2 / 2 has the gradient a x, and so the penalty a^2 |x|^2, whose derivative by a is 2 a |x|^2."""
    x, a = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(1.7, requires_grad=True)
    penalty = gradient_penalty(lambda one: a * one.square().flatten(1).sum(1) / 2, x)
    mean_square = x.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(penalty, 1.7**2 * mean_square)
    (slope,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(slope, 2 * 1.7 * mean_square)


def test_the_path_length_of_a_linear_map_is_the_length_of_its_transpose_times_the_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(2 * 4 * 4, 6, generator=generator)
    w = torch.randn(3, 6, generator=generator).requires_grad_(True)
    noise = torch.randn(3, 2, 4, 4, generator=generator)
    lengths = path_lengths((w @ matrix.T).view(3, 2, 4, 4), w, noise)
    torch.testing.assert_close(lengths, (noise.flatten(1) @ matrix).norm(dim=1) / 4)


def test_path_lengths_of_several_layers_are_the_root_of_their_mean_square() -> None:
    w = torch.randn(2, 3, 5, requires_grad=True)
    noise = torch.ones(2, 1, 1, 1)
    lengths = path_lengths((w * torch.tensor([1.0, 2.0, 3.0])[:, None]).sum((1, 2)).view(2, 1, 1, 1), w, noise)
    torch.testing.assert_close(lengths, torch.full((2,), (5 * (1 + 4 + 9) / 3) ** 0.5))


def test_the_path_length_penalty_is_of_distances_from_the_running_mean() -> None:
    penalty, average = path_length_penalty(torch.tensor([1.0, 3.0]), torch.tensor(2.0), decay=0.9)
    assert float(average) == pytest.approx(2.0) and float(penalty) == pytest.approx(1.0)
    assert float(path_length_penalty(torch.tensor([4.0]), torch.tensor(2.0), decay=0.5)[1]) == pytest.approx(3.0)
    penalty, average = path_length_penalty(torch.tensor([1.0, 3.0]), torch.zeros(()))  # the first: none is known yet
    assert float(average) == pytest.approx(2.0) and float(penalty) == pytest.approx(1.0)


def test_diversity_is_relative_to_real_images() -> None:
    real = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    assert diversity(real, real) == pytest.approx(1.0)
    assert diversity(0.25 * real + 3, real) == pytest.approx(0.25, abs=1e-5)
    assert diversity(torch.ones(8, 3, 4, 4), real) == 0.0


@pytest.mark.parametrize(("found", "accuracies", "said"), [
    (0.9, [1.0] * 3, ""),
    (0.9, [0.5] + [0.999] * 4, "the discriminator is right about 99.9 %"),
    (0.9, [0.999] * 3 + [0.9], ""),
    (0.2, [0.5], "the generator has collapsed: its faces differ 0.20 times as much as real ones"),
    (math.nan, [], "the generator has collapsed"),
])
def test_collapse_is_said(found: float, accuracies: list[float], said: str) -> None:
    sentence = collapse_sentence(found, accuracies, CollapseBounds(patience=4))
    assert sentence.startswith(said) if said else sentence == ""


def test_a_penalty_reaches_the_weights() -> None:
    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

    def logits(x: Tensor) -> Tensor:
        return critic(x).flatten()

    gradient_penalty(logits, torch.randn(2, 1, 2, 2)).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0
               for name, weight in critic.named_parameters() if name.endswith("weight"))
