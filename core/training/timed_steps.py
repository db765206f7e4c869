"""What does one step of training do, so that it can be timed before there is any data?

Forward, backward and the optimiser of the very networks on random numbers; losses are simpler than the real ones where
that costs nothing. It does not know how long anything is trained (`core/training/recipes.py`), nor who counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.diffusion.conditioning import Condition
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.training_loss import denoising_loss
from core.diffusion.unet import ConditionalUNet, UNetConfig
from core.nn.autoencoder import VAE, VAEConfig
from core.nn.clip import CLIP, CLIPConfig

PIECES = 32  # of a caption
SIDE = 128


@dataclass(frozen=True)
class TimedStep:
    """A step that can be taken, and how many weights it changes."""

    take: Callable[[], None]
    parameters: int


def following(loss: Callable[[], Tensor], networks: Sequence[nn.Module], accelerator: Any) -> TimedStep:
    """A step that follows this loss."""
    weights = [weight for network in networks for weight in network.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-6)

    def step() -> None:
        with accelerator.autocast():
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return TimedStep(step, sum(weight.numel() for weight in weights))


def random_images(count: int, accelerator: Any) -> Tensor:
    """Images [B, 3, 128, 128] on the device of a run."""
    images = torch.rand(count, 3, SIDE, SIDE, device=accelerator.device) * 2 - 1
    return images.contiguous(memory_format=torch.channels_last)


def placed(network: nn.Module, accelerator: Any) -> Any:
    """A network where a run has it, in the layout that a run gives it."""
    return network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def clip_step(config: CLIPConfig, batch_size: int, accelerator: Any) -> TimedStep:
    """Both towers, on captions of 32 pieces."""
    model = placed(CLIP(config), accelerator)
    ids = torch.randint(config.pieces, (batch_size, min(PIECES, config.max_length)), device=accelerator.device)
    mask, images = torch.ones_like(ids, dtype=torch.bool), random_images(batch_size, accelerator)

    def loss() -> Tensor:
        logits = model.log_temperature.exp() * model.embed_text(ids, mask) @ model.encode_image(images).T
        return F.cross_entropy(logits, torch.arange(batch_size, device=logits.device))

    return following(loss, [model], accelerator)


def vae_step(config: VAEConfig, adversary: nn.Module | None, batch_size: int, accelerator: Any) -> TimedStep:
    """Encoder, decoder (once whole, once at half the side) and the adversary, which looks three times."""
    model, images = placed(VAE(config), accelerator), random_images(batch_size, accelerator)
    critic = None if adversary is None else placed(adversary, accelerator)

    def loss() -> Tensor:
        posterior = model.encode(images)
        copies = model.decode(posterior.mean + posterior.std)
        halves = model.decode(F.avg_pool2d(posterior.mean, 2))
        value = F.mse_loss(copies, images) + F.mse_loss(halves, F.avg_pool2d(images, 2))
        seen = [] if critic is None else [critic(one)[0].mean() for one in (copies, copies.detach(), images)]
        return value + sum(seen, torch.zeros((), device=value.device))

    return following(loss, [model] if critic is None else [model, critic], accelerator)


def unet_step(config: UNetConfig, batch_size: int, accelerator: Any) -> TimedStep:
    """The denoising loss, on latents and captions that are there already."""
    device, model = accelerator.device, placed(ConditionalUNet(config), accelerator)
    assert config.latent_channels is not None
    z, noise = torch.randn(2, batch_size, config.latent_channels, SIDE // 8, SIDE // 8, device=device)
    condition = Condition(
        torch.randn(batch_size, PIECES, config.text_width, device=device),
        torch.ones(batch_size, PIECES, dtype=torch.bool, device=device),
        torch.randn(batch_size, config.text_width, device=device),
        torch.full((batch_size,), float(SIDE), device=device),
        torch.zeros(batch_size, dtype=torch.bool, device=device))
    timestep = torch.full((batch_size,), 500, device=device)
    batch = SimpleNamespace(z=z, noise=noise, timestep=timestep, condition=condition, scale=torch.ones_like(timestep))
    loss = denoising_loss(model, NoiseSchedule())
    return following(lambda: loss(batch)[0].mean(), [model], accelerator)
