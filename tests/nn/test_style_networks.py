"""Do the networks of the style GAN compute what their equations say?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import stylegan
from core.nn.style_networks import (
    EqualConv,
    EqualLinear,
    ResidualDown,
    StyleDiscriminator,
    StyleGenerator,
    blur,
    demodulated,
    interpolated,
    mixed,
    modulated_conv,
    second_moment_normalized,
    truncated,
    upsampled,
)

TINY = replace(stylegan.PRESETS["tiny"], condition=6)
LATENT = replace(stylegan.PRESETS["latent"], condition=195)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def generator() -> StyleGenerator:
    """The tiny generator, untrained, with noise that is heard."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = StyleGenerator(TINY).requires_grad_(False)
    for conv in found.synthesis.convs:
        conv.noise_strength.fill_(0.3)
    return found


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_demodulation_gives_unit_variance() -> None:
    """For inputs of independent numbers with variance 1, whatever the style (https://arxiv.org/abs/1912.04958, eq. 3);
    edges aside, where zeros stand for what is outside."""
    weight, style = noise(6, 32, 3, 3), 5 * noise(4, 32, seed=1)
    x = noise(4, 32, 66, 66, seed=2)
    y = modulated_conv(x, weight, style)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(y.var((2, 3)), torch.ones(4, 6), rtol=0.15, atol=0)
    twice = modulated_conv(x, weight, 2 * style)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(twice, y, rtol=1e-3, atol=1e-4)  # the strength of a style has no effect, its shape has


@pytest.mark.parametrize("up", [False, True])
def test_a_batch_shares_one_convolution_and_gets_what_each_would_by_its_own_weights(up: bool) -> None:
    """Equations 1 to 3, written down for one picture after the other."""
    weight, style, x = noise(5, 4, 3, 3), noise(3, 4, seed=1), noise(3, 4, 6, 6, seed=2)
    found = modulated_conv(x, weight, style, up=up)
    for i in range(3):
        own = weight * style[i][None, :, None, None]
        own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:  # a transposed convolution is an ordinary one of the mirrored kernel over places with zeros between them
            spread = torch.zeros(1, 4, 15, 15)
            spread[:, :, 2:13:2, 2:13:2] = x[i]
            expected = blur(F.conv2d(spread, own.flip(2, 3)), (1, 1, 1, 1), gain=4.0)
        else:
            expected = F.conv2d(x[i : i + 1], own, padding=1)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(demodulated(weight, style)[0], (weight * style[0][None, :, None, None]).flatten(1).norm(
        dim=1).reciprocal(), rtol=1e-4, atol=1e-6)


def test_filters_keep_what_is_constant_and_are_symmetric() -> None:
    flat = torch.full((1, 2, 8, 8), 3.0)
    torch.testing.assert_close(upsampled(flat)[:, :, 2:-2, 2:-2], torch.full((1, 2, 12, 12), 3.0))
    torch.testing.assert_close(blur(flat, (0, 0, 0, 0)), torch.full((1, 2, 5, 5), 3.0))
    point = torch.zeros(1, 1, 7, 7)
    point[0, 0, 3, 3] = 64.0
    kernel = blur(point, (0, 0, 0, 0))[0, 0]
    assert kernel.tolist() == torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])).tolist()
    x = noise(2, 3, 6, 6)
    torch.testing.assert_close(upsampled(x.flip(2, 3)), upsampled(x).flip(2, 3))
    torch.testing.assert_close(EqualConv(3, 4, 3, down=True)(x).shape, torch.Size((2, 4, 3, 3)))
    torch.testing.assert_close(EqualConv(3, 4, 1, down=True)(x).shape, torch.Size((2, 4, 3, 3)))


def test_equalized_layers_keep_the_variance_whatever_their_width_and_rate() -> None:
    x = noise(2000, 300)
    for rate in (1.0, 0.01):
        layer = EqualLinear(300, 40, rate=rate).requires_grad_(False)
        assert float(layer(x).var()) == pytest.approx(1.0, rel=0.1)
        assert float(layer.weight.std()) == pytest.approx(1 / rate, rel=0.05)
    images, conv = noise(4, 64, 12, 12), EqualConv(64, 32, 3).requires_grad_(False)
    assert float(conv(images)[:, :, 1:-1, 1:-1].var()) == pytest.approx(1.0, rel=0.1)
    torch.testing.assert_close(second_moment_normalized(7 * x).square().mean(1), torch.ones(2000))
    assert ResidualDown(64, 32)(images).shape == (4, 32, 6, 6)


# ---- networks --------------------------------------------------------------------------------------------------------


def test_a_picture_of_latents_costs_at_most_a_third_of_a_gflop() -> None:
    generator, critic = StyleGenerator(LATENT).requires_grad_(False), StyleDiscriminator(LATENT).requires_grad_(False)
    for run in (lambda: generator(noise(1, 128), noise(1, 195)), lambda: critic(noise(1, 16, 16, 16), noise(1, 195))):
        with FlopCounterMode(display=False) as counter:
            run()
        assert 0.1e9 < counter.get_total_flops() < 0.3e9
    assert generator(noise(2, 128), noise(2, 195)).shape == (2, 16, 16, 16)
    assert critic(noise(2, 16, 16, 16), noise(2, 195)).shape == (2,)
    assert 2 * sum(weight.numel() for weight in generator.parameters()) < 8e6  # bytes in fp16


def test_the_preset_of_256_pixels_has_the_official_layers() -> None:
    config = stylegan.PRESETS["ffhq256"]
    assert (config.size, config.num_layers) == (256, 14)
    with torch.device("meta"):
        assert sum(weight.numel() for weight in StyleGenerator(config).parameters()) == 24_767_458


def test_equal_styles_give_equal_pictures_and_noise_only_details(generator: StyleGenerator) -> None:
    ws = generator.broadcast(noise(2, TINY.w_dim))
    first = generator.synthesis(ws)
    torch.testing.assert_close(generator.synthesis(ws), first)
    other = generator.synthesis(ws, generator.noise([1, 2]))
    assert not torch.allclose(other, first)
    torch.testing.assert_close(generator.synthesis(ws[1:], generator.noise([2])), other[1:], rtol=1e-4, atol=1e-5)
    assert [tuple(one.shape) for one in generator.noise([0])] == [(1, 1, size, size) for size in (4, 8, 8, 16, 16)]


def test_the_condition_reaches_both_networks(generator: StyleGenerator) -> None:
    z, told = noise(1, TINY.z_dim).repeat(2, 1), noise(2, 6, seed=3)
    w = generator.mapping(z, told)
    assert not torch.allclose(w[0], w[1])
    torch.testing.assert_close(generator.mapping(3 * z, told), w)  # only the direction of z counts
    critic = StyleDiscriminator(TINY)
    features = critic.features(noise(1, 4, 16, 16).repeat(2, 1, 1, 1))
    logits = critic.logits(features, told)
    assert not torch.isclose(logits[0], logits[1])
    torch.testing.assert_close(critic.logits(features)[0], critic.logits(features)[1])
    with pytest.raises(ValueError, match="this generator is conditional; pass a condition"):
        generator.mapping(z)


# ---- styles ----------------------------------------------------------------------------------------------------------


def test_truncation_goes_from_the_mean_of_the_condition_to_the_style(generator: StyleGenerator) -> None:
    told = noise(2, 6)
    centre = generator.centre(told, num=16)
    z = torch.randn(16, TINY.z_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(centre[1], generator.mapping(z, told[1:].expand(16, -1)).mean(0))
    w = generator.mapping(noise(2, TINY.z_dim, seed=9), told)
    torch.testing.assert_close(truncated(w, centre, 0.0), centre)
    torch.testing.assert_close(truncated(w, centre, 1.0), w)
    torch.testing.assert_close(truncated(w, centre, 0.5), (w + centre) / 2)
    assert torch.equal(generator.centre(None), generator.mapping.w_mean[None])


def test_mixing_takes_fine_layers_of_another_style(generator: StyleGenerator) -> None:
    a, b = (generator.broadcast(noise(2, TINY.w_dim, seed=seed)) for seed in (0, 1))
    ws = mixed(a, b, torch.tensor([2, 6]))
    assert torch.equal(ws[0, :2], a[0, :2]) and torch.equal(ws[0, 2:], b[0, 2:]) and torch.equal(ws[1], a[1])
    assert torch.equal(mixed(a, b, 0), b)


def test_interpolation_is_straight_and_has_its_ends() -> None:
    a, b = noise(5), noise(5, seed=1)
    points = interpolated(a, b, 5)
    assert torch.equal(points[0], a)
    torch.testing.assert_close(points[-1], b)
    torch.testing.assert_close(points.diff(dim=0), ((b - a) / 4).expand(4, 5), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="num is 1"):
        interpolated(a, b, 1)
