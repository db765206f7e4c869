"""What do the two networks of a style GAN learn in one step?

Both step from one forward pass of the discriminator: the gradient of the generator's loss by the generated pictures and
that of the discriminator's loss by its weights are taken of the same logits. Penalties are taken of a part of the batch
in every step, which costs as much as the whole batch in some steps and has no spikes. It does not know data or files.

Sources: relativistic loss with R1 and R2 https://arxiv.org/abs/2501.05441, path length and lazy regularisation
https://arxiv.org/abs/1912.04958 (section 3), style mixing https://arxiv.org/abs/1812.04948 (section 3.1), wrong
captions as fakes https://arxiv.org/abs/1605.05396 (section 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.nn.style_networks import StyleDiscriminator, StyleGenerator, mixed
from core.training.adversarial import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    path_length_penalty,
    path_lengths,
)


@dataclass(frozen=True)
class StyleLoss:
    """Which loss, and the weights and shares of the batch of what is added to it.

    gamma: of (R1 + R2) / 2; it grows with the squared distance between two pictures, which is large in latents of unit
    variance. path_weight: of the path length penalty (0: none). mismatch: of real pictures with the
    caption of another (0: none). mixing: share of pictures with two styles.
    """

    kind: str = "relativistic"
    gamma: float = 20.0
    penalty_share: float = 0.125
    path_weight: float = 2.0
    path_share: float = 0.0625
    mismatch: float = 0.5
    mixing: float = 0.5


@dataclass(frozen=True)
class StyleBatch:
    """What one step learns from. Shapes: real [B, C, S, S], condition [B, n], z, other_z [B, z_dim], crossover [B]
    (the first layer of the other style; the number of layers: none), noise of each convolution [B, 1, s, s], path_noise
    as real."""

    real: Tensor
    condition: Tensor
    z: Tensor
    other_z: Tensor
    crossover: Tensor
    noise: list[Tensor]
    path_noise: Tensor


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself: values to be logged [], the pictures it made, the new mean path length []."""

    terms: dict[str, Tensor]
    made: Tensor
    path_average: Tensor


def sample_batch(generator: StyleGenerator, real: Tensor, condition: Tensor, how: StyleLoss, source: torch.Generator
                 ) -> StyleBatch:
    """The random part of a step, all from ``source``, a generator on the CPU."""
    config, count, device = generator.config, len(real), real.device
    z, other_z = torch.randn(2, count, config.z_dim, generator=source).to(device)
    crossover = torch.randint(1, config.num_layers, (count,), generator=source)
    crossover[torch.rand(count, generator=source) >= how.mixing] = config.num_layers
    noise = [torch.randn(count, 1, size, size, generator=source).to(device) for size in config.noise_sizes()]
    path_noise = torch.randn(real.shape, generator=source).to(device)
    return StyleBatch(real, condition, z, other_z, crossover.to(device), noise, path_noise)


def take_gradients(generator: StyleGenerator, critic: StyleDiscriminator, batch: StyleBatch, how: StyleLoss,
                   path_average: Tensor) -> StepResult:
    """Add the gradients of one step to both networks. ``path_average`` []: the mean path length so far."""
    condition = batch.condition if generator.config.condition else None
    w = generator.mapping(batch.z, condition)
    generator.mapping.w_mean.lerp_(w.detach().mean(0), 1.0 - generator.config.w_decay)
    ws = mixed(generator.broadcast(w), generator.broadcast(generator.mapping(batch.other_z, condition)),
               batch.crossover)
    made = generator.synthesis(ws, batch.noise)

    fake = made.detach().requires_grad_(True)
    features_real, features_fake = critic.features(torch.cat([batch.real, fake])).chunk(2)
    real_logits, fake_logits = critic.logits(features_real, condition), critic.logits(features_fake, condition)
    terms = {"generator": generator_loss(real_logits.detach(), fake_logits, how.kind),
             "discriminator": discriminator_loss(real_logits, fake_logits, how.kind)}
    loss = terms["discriminator"]
    if condition is not None and how.mismatch:
        wrong = critic.logits(features_real, condition.roll(1, 0))
        terms["mismatch"] = discriminator_loss(real_logits, wrong, "relativistic")
        loss = loss + how.mismatch * terms["mismatch"]
    (slope,) = torch.autograd.grad(terms["generator"], fake, retain_graph=True)
    loss.backward(inputs=list(critic.parameters()))

    if how.gamma:
        some = slice(0, max(1, math.ceil(len(fake) * how.penalty_share)))
        fit = None if condition is None else condition[some]
        terms["r1"] = gradient_penalty(lambda x: critic(x, fit), batch.real[some])
        terms["r2"] = gradient_penalty(lambda x: critic(x, fit), fake[some])
        (how.gamma / 2 * (terms["r1"] + terms["r2"])).backward()

    made.backward(slope)
    if how.path_weight:
        part = slice(0, max(1, math.ceil(len(fake) * how.path_share)))
        styles = generator.broadcast(generator.mapping(batch.z[part], None if condition is None else condition[part]))
        picture = generator.synthesis(styles, [one[part] for one in batch.noise])
        lengths = path_lengths(picture, styles, batch.path_noise[part])
        terms["path"], path_average = path_length_penalty(lengths, path_average)
        (how.path_weight * terms["path"]).backward()
    paired = how.kind == "relativistic"
    right = real_logits > fake_logits if paired else torch.cat([real_logits > 0, fake_logits < 0])
    terms["accuracy"] = right.float().mean()
    return StepResult({name: value.detach() for name, value in terms.items()}, fake.detach(), path_average)
