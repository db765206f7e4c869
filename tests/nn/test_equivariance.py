"""Do images and latents move together, is that measured rightly, and does a deterministic VAE train and resume?"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vae
from conditional_ldm import PRESETS as UNETS
from core.diffusion.conditioning import Condition
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.unet import ConditionalUNet
from core.nn import equivariance
from core.nn.checkpoint import load_component
from core.nn.latent_statistics import normalized
from core.nn.warm_start import fewer_blocks, from_components
from core.training.resolution import ResolutionFit, area_under_curve, first_alike, fit_threshold
from core.training.unet_data import lowest_timesteps
from dataset import FaceStore
from tests.support.training import Workplace, checkpoint, differences, make_workplace


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ramps(count: int, side: int = 128) -> Tensor:
    """Images whose grey rises linearly in a direction of their own: a mean over cells moves with them exactly."""
    angle = torch.arange(count) * 0.7
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    return (angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y)[:, None].repeat(1, 3, 1, 1)


def cell_means(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 8)


@pytest.mark.parametrize("seed", range(6))
def test_images_and_latents_make_the_same_move(seed: int) -> None:
    images = ramps(3)
    moved, z = equivariance.move_both(images, cell_means(images), torch.Generator().manual_seed(seed))
    assert moved.shape[2] == moved.shape[3] == 8 * z.shape[2] and 8 <= z.shape[2] == z.shape[3] <= 15
    inner = (cell_means(moved) - z)[..., 2:-2, 2:-2]  # at the border, scaling has fewer neighbours
    assert float(inner.abs().max()) < 0.008  # an eighth of what a ramp rises in a cell: filters of scaling differ
    again = equivariance.move_both(images, cell_means(images), torch.Generator().manual_seed(seed))
    assert torch.equal(moved, again[0]) and torch.equal(z, again[1])


def test_a_shift_of_nothing_and_one_of_half_a_cell() -> None:
    z = seeded(2, 4, 5, 5)
    zero, half = torch.zeros(2, dtype=torch.int64), torch.full((2,), 4)
    assert torch.equal(equivariance.shift_latents(z, zero, zero), z[:, :, :-1, :-1])
    assert torch.allclose(equivariance.shift_latents(z, half, zero), (z[:, :, :-1] + z[:, :, 1:])[..., :-1] / 2)
    images = seeded(2, 3, 40, 40)
    assert torch.equal(equivariance.shift_images(images, torch.tensor([0, 3]), torch.tensor([7, 0]))[1],
                       images[1, :, 3:35, 0:32])


def test_measures_tell_smooth_latents_from_rough_ones() -> None:
    images = F.interpolate(seeded(8, 3, 16, 16), size=(128, 128), mode="bicubic", align_corners=False)
    smooth = equivariance.measure_equivariance(cell_means, images)
    rough = equivariance.measure_equivariance(lambda x: F.pixel_unshuffle(x - F.avg_pool2d(x, 5, 1, 2), 8), images)
    assert smooth["shift_2px"] < 0.2 and smooth["half_scale"] < 0.5 * rough["half_scale"]
    assert rough["shift_2px"] > 2 * smooth["shift_2px"] and rough["above_half_nyquist"] > smooth["above_half_nyquist"]
    white = equivariance.measure_equivariance(lambda x: seeded(len(x), 4, x.shape[2] // 8, x.shape[3] // 8), images)
    assert white["above_half_nyquist"] == pytest.approx(0.75, abs=0.08)  # noise has its energy everywhere


def test_normalised_batches_drift_and_noise_have_their_known_values() -> None:
    z = 3 * seeded(6, 4, 8, 8) + 2
    whole = equivariance.normalize_batch(z)
    assert torch.allclose(whole.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(whole.std((0, 2, 3)), torch.ones(4), atol=1e-5)
    assert float(equivariance.drift_penalty(whole)) < 1e-8
    assert float(equivariance.drift_penalty(whole * np.e + 2)) == pytest.approx(4 + 1, rel=1e-4)
    noised = equivariance.add_noise(torch.zeros(4000, 1, 4, 4), 0.25, torch.Generator().manual_seed(0))
    deviation = noised.flatten(1).std(1)
    assert float(deviation.max()) < 0.5 and float(noised.std()) == pytest.approx(0.25 / 3**0.5, rel=0.03)
    assert torch.equal(equivariance.add_noise(z, 0.0, torch.Generator()), z)


def test_principal_components_are_normalised_and_lead_back() -> None:
    z = torch.einsum("kc,bchw->bkhw", seeded(6, 3, seed=1), seeded(20, 3, 8, 8)) + 5  # three of six dimensions
    projection, inverse, mean = equivariance.principal_components(z, 3)
    found = torch.einsum("ck,bkhw->bchw", projection, z - mean[:, None, None])
    covariance = torch.cov(found.permute(1, 0, 2, 3).flatten(1))
    assert torch.allclose(covariance, torch.eye(3), atol=1e-3)
    back = torch.einsum("kc,bchw->bkhw", inverse, found) + mean[:, None, None]
    assert torch.allclose(back, z, atol=1e-3)
    with pytest.raises(ValueError, match="1 to 6 components, got 7"):
        equivariance.principal_components(z, 7)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("work"))


def test_all_components_of_another_vae_give_its_pictures(place: Workplace) -> None:
    other = vae.load_vae(place.model)
    pixels = torch.from_numpy(FaceStore.open(place.store).images[:16].copy())
    images = vae.to_images(pixels)
    wanted = other.decoder.soft(other.encode(images).mean)
    made = from_components(vae.VAE(vae.PRESETS["tiny-smooth"]), vae.load_vae(place.model), pixels)
    z = made.encode(images).mean
    inner = (..., slice(48, -48), slice(48, -48))  # where the decoder does not see the border, which is padded with 0
    assert torch.allclose(made.decoder.soft(z)[inner], wanted[inner], atol=2e-3)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=0.02)


def test_statistics_by_place_normalise_each_place(place: Workplace) -> None:
    model = vae.VAE(vae.PRESETS["tiny-smooth"]).eval()
    pixels = torch.from_numpy(FaceStore.open(place.store).images[:24].copy())
    model = normalized(model, pixels)
    images = vae.to_images(pixels)
    raw = torch.cat([model.encode(view).mean for view in (images, images.flip(-1))])
    assert torch.allclose(raw.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(raw.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    x = model.normalize(raw)
    assert torch.allclose(x.mean(0), torch.zeros(4, 16, 16), atol=1e-2)
    assert torch.allclose(x.std(0, correction=0), torch.ones(4, 16, 16), atol=1e-2)
    assert torch.allclose(model.denormalize(x), raw, atol=1e-4)


def test_a_decoder_of_fewer_blocks_starts_from_the_first_ones() -> None:
    big = vae.VAEConfig(4, (16, 24), (1, 1), (24, 16, 12), (3, 2, 1), deterministic=True)
    small = vae.VAEConfig(4, (16, 24), (1, 1), (24, 16, 12), (2, 1, 1), deterministic=True)
    source = vae.VAE(big)  # new blocks are the identity, so leaving one out changes nothing
    target = vae.VAE(small)
    target.load_state_dict(fewer_blocks(source.state_dict(), big.decoder_blocks, small.decoder_blocks))
    z = seeded(2, 4, 8, 8)
    assert torch.allclose(source.decode(z), target.decode(z), atol=1e-5)


def test_a_deterministic_vae_trains_resumes_exactly_and_is_released_normalised(place: Workplace) -> None:
    folder = place.copy_model("smooth-model")
    command = [*place.train("vae", "smooth", "--steps", 4, "--gan-start", 0.5, "--image-every", 4, model=folder),
               "--preset", "tiny-smooth", "--init", str(place.model)]
    assert vae.main(command) == 0
    parts = [*command, "--run", str(place.root / "smooth-parts"), "--model", str(place.copy_model("smooth-2"))]
    assert vae.main([*parts, "--stop-at", "2"]) == 0 and vae.main(parts) == 0
    assert not differences(checkpoint(place.root / "smooth", 4), checkpoint(place.root / "smooth-parts", 4))
    rows = [json.loads(row) for row in (place.root / "smooth" / "metrics.jsonl").read_text().splitlines()]
    keys = {key for row in rows for key in row}
    assert {"drift", "equivariance", "val_shift_2px", "val_half_scale", "val_above_half_nyquist",
            "val_psnr_noise_uniform"} <= keys
    config, state = load_component(folder, "vae")
    assert config["network"]["deterministic"] and state["latent_mean"].shape == (4, 16, 16)
    model = vae.load_vae(folder)
    pixels = torch.from_numpy(FaceStore.open(place.store).images[:16].copy())
    posterior = model.encode(vae.to_images(pixels))
    assert float(posterior.std.max()) < 1e-4 and model.decode(posterior.mean).shape == (16, 3, 128, 128)
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    more = [*place.train("vae", "smooth-decoder", "--steps", 2, "--gan-start", 0, "--decoder-only", model=folder),
            "--preset", "tiny-smooth"]
    assert vae.main(more) == 0
    after = vae.load_vae(folder).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # cached latents stay valid


# ------------------------------------------------------------------------------------------------ the UNet that follows


def test_position_maps_change_nothing_until_they_have_learned() -> None:
    from dataclasses import replace

    torch.manual_seed(0)
    plain = ConditionalUNet(UNETS["tiny"])
    mapped = ConditionalUNet(replace(UNETS["tiny"], position_maps=True))
    missing, unexpected = mapped.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {"position_maps.0", "position_maps.1"} and not unexpected
    torch.nn.init.normal_(plain.conv_out.weight)
    mapped.conv_out.load_state_dict(plain.conv_out.state_dict())
    x, t = seeded(2, 4, 16, 16), torch.tensor([10.0, 900.0])
    condition = Condition(seeded(2, 3, 32), torch.ones(2, 3, dtype=torch.bool), seeded(2, 32), torch.full((2,), 128.0),
                          torch.zeros(2, dtype=torch.bool))
    assert torch.equal(plain(x, t, condition), mapped(x, t, condition))
    mapped(x, t, condition).square().mean().backward()
    assert all(bool(one.grad.any()) for one in mapped.position_maps)


def test_soft_pictures_begin_where_the_threshold_says() -> None:
    assert lowest_timesteps(np.array([58, 80, 128, 58]), (600.0, 400.0)).tolist() == [600, 400, 0, 600]


def test_the_threshold_is_where_a_classifier_fails() -> None:
    z = seeded(1600, 2, 16, 16)
    sharp = torch.arange(1600) % 2 == 0
    blurred = F.avg_pool2d(z, 3, 1, 1) * 2.0
    z = torch.where(sharp[:, None, None, None], z, blurred)
    how = ResolutionFit(steps=120, batch_size=64, width=16, bin_width=100, alike=0.6)
    threshold, areas = fit_threshold(z, sharp, NoiseSchedule(), how)
    assert areas[0] > 0.95 and areas[900] < 0.6 and 300 < threshold < 1000
    assert (threshold, areas) == fit_threshold(z, sharp, NoiseSchedule(), how)
    with pytest.raises(ValueError, match="all of one kind"):
        fit_threshold(z, torch.ones(1600, dtype=torch.bool), NoiseSchedule())


def test_area_and_first_bin_have_their_known_values() -> None:
    assert area_under_curve(np.array([3.0, 2.0]), np.array([1.0, 0.0])) == 1.0
    assert area_under_curve(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0.5
    assert first_alike({0: 0.9, 100: 0.52, 200: 0.6, 300: 0.54}, 0.55) == 300
    assert first_alike({0: 0.5, 100: 0.5}, 0.55) == 0 and first_alike({0: 0.5, 100: 0.9}, 0.55) == 1000


def test_the_command_prints_thresholds_that_training_takes(place: Workplace,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    from conditional_ldm import main

    store = FaceStore.open(place.store)
    if len(set(store.px.tolist())) < 3:
        pytest.fail("the drawn faces should have all three resolutions")
    common = ["--data", str(place.store), "--model", str(place.model), "--cache", str(place.root / "cache"),
              "--device", "cpu", "--run", str(place.root / "soft")]
    assert main(["--fit-soft-from", *common, "--steps", "3"]) == 0
    words = capsys.readouterr().out.split("--soft-from ")[1].split()[:2]
    assert all(0 <= int(word) <= 1000 for word in words)
    command = place.train("unet", "soft-unet", "--steps", 2, "--soft-from", *words)
    assert main(command) == 0
    assert json.loads((place.root / "soft-unet" / "config.json").read_text())["soft_from"] == [float(w) for w in words]
