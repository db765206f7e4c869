"""Does the linear preview show what the latent shows?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.nn.layers import to_pixels
from core.nn.preview_decoder import PreviewDecoder, fit_preview, load_preview, save_preview


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher() -> PreviewDecoder:
    torch.manual_seed(3)
    return PreviewDecoder(4).eval().requires_grad_(False)


def test_a_linear_decoder_is_found_again_whatever_the_batches() -> None:
    truth, x = teacher(), seeded(48, 4, 6, 6)
    whole = fit_preview([(x, truth(x))], ridge=1e-9)
    pieces = fit_preview(((part, truth(part)) for part in x.split(5)), ridge=1e-9)
    unseen = seeded(2, 4, 3, 5, seed=9)  # any size, borders included
    assert whole(unseen).shape == (2, 3, 24, 40)
    for found in (whole, pieces):
        assert torch.allclose(found(unseen), truth(unseen), atol=1e-4)


def test_it_minimises_the_mean_square_error() -> None:
    """No nearby decoder does better on the images it was fitted to, which a linear decoder cannot generate exactly."""
    x = seeded(16, 4, 4, 4)
    images = torch.tanh(3 * teacher()(x)) + 0.1 * seeded(16, 3, 32, 32, seed=1)
    best = fit_preview([(x, images)], ridge=0.0)
    error = (best(x) - images).square().mean()
    for seed in range(4):
        other = PreviewDecoder(4)
        other.load_state_dict({name: value + 0.01 * seeded(*value.shape, seed=seed)
                               for name, value in best.state_dict().items()})
        assert (other(x) - images).square().mean() > error > 0.001


def test_its_bytes_are_those_of_its_picture() -> None:
    x = 3 * seeded(3, 4, 4, 6)
    shown = teacher()(x)
    pixels = teacher().levels(x).to(torch.uint8)
    assert pixels.shape == (3, 32, 48, 3) and shown.abs().max() > 1 > shown.abs().min()
    assert (pixels.numpy() == to_pixels(shown)).all()


def test_nothing_to_fit_to_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        fit_preview([])


def test_it_belongs_to_one_encoder(tmp_path: Path) -> None:
    save_preview(teacher(), tmp_path, encoder_sha256="a" * 64)
    kept = load_preview(tmp_path, "a" * 64)
    assert kept is not None and not kept.training
    x = seeded(1, 4, 2, 2)
    assert torch.allclose(kept(x), teacher()(x), atol=2e-3)  # stored as fp16
    assert load_preview(tmp_path, "b" * 64) is None  # the VAE was trained again since
