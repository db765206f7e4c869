"""Does the filter at the decoder's end give images the sharpness of real images, and change nothing else?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import vae
from core.diffusion.unet import load_unet
from core.imaging import spectrum
from core.nn import layers
from core.nn.checkpoint import load_component
from core.nn.sharpening import SIZE, Sharpen, fit_kernel
from dataset import FaceStore
from tests.support.training import Workplace, make_workplace
from vae import encoder_hash, load_vae, with_kernel


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def photographs(place: Workplace) -> np.ndarray:
    return np.array(FaceStore.open(place.store).images[:48])


def blurred(pictures: np.ndarray, strength: float) -> np.ndarray:
    """A mild linear blur, the kind of thing that a filter of this size can undo."""
    row = torch.tensor([strength, 1.0 - 2.0 * strength, strength])
    blur = Sharpen(3)
    blur.kernel.copy_(torch.outer(row, row))
    return layers.to_pixels(blur(layers.to_images(pictures)))


def through(kernel: Tensor, pictures: np.ndarray) -> np.ndarray:
    filtered = Sharpen(len(kernel))
    filtered.kernel.copy_(kernel)
    return layers.to_pixels(filtered(layers.to_images(pictures)))


def test_a_new_filter_is_the_identity_and_a_fitted_one_is_the_convolution_it_says() -> None:
    images = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sharpen(SIZE)(images), images)
    sharpen = Sharpen(3)
    sharpen.kernel.copy_(torch.arange(9.0).view(3, 3))
    found = sharpen(images)
    assert found.shape == images.shape
    here = images[:, :, 9:12, 4:7]  # around row 10, column 5
    assert torch.allclose(found[:, :, 10, 5], (here * sharpen.kernel).sum((2, 3)), atol=1e-5)
    corner = F.pad(images, (1,) * 4, mode="reflect")[:, :, :3, :3]
    assert torch.allclose(found[:, :, 0, 0], (corner * sharpen.kernel).sum((2, 3)), atol=1e-5)
    with pytest.raises(ValueError, match="odd side, got 4"):
        Sharpen(4)


@pytest.mark.parametrize("strength", [0.1, 0.14])
def test_what_a_blur_took_comes_back(photographs: np.ndarray, strength: float) -> None:
    """Fitted to half of the images, measured on the others: the fine detail of real images, and nearer to them."""
    soft = blurred(photographs, strength)
    kernel = fit_kernel(soft[::2], photographs[::2])
    assert kernel.shape == (SIZE, SIZE) and float(kernel.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(kernel, kernel.T, atol=1e-6) and torch.allclose(kernel, kernel.flip(0), atol=1e-6)
    unseen, before, after = photographs[1::2], soft[1::2], through(kernel, soft[1::2])
    real, had, has = (spectrum.fine_detail_share(pictures) for pictures in (unseen, before, after))
    assert had < 0.75 * real and has == pytest.approx(real, rel=0.12)

    def error(pictures: np.ndarray) -> float:
        return float(np.square(pictures.astype(float) - unseen).mean())

    assert error(after) < 0.6 * error(before)
    assert abs(after.astype(float).mean() - before.mean()) < 0.5  # as light as it was


def test_pictures_that_are_sharp_enough_stay_as_they_are(photographs: np.ndarray) -> None:
    kernel = fit_kernel(photographs, photographs)
    assert torch.allclose(kernel, Sharpen(SIZE).kernel, atol=1e-6)


def test_noise_is_not_amplified_without_end_and_shapes_are_checked(photographs: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(0, 256, photographs.shape, np.uint8)
    flat = np.full_like(photographs, 100)
    for soft in (flat, blurred(photographs, 0.25)):
        response = torch.fft.rfft2(F.pad(fit_kernel(soft, noise), (0, 64, 0, 64))).abs()
        assert response.max() < 5 and response.isfinite().all()
    for soft, sharp in ((photographs, photographs[:, :64]), (photographs[0], photographs[0]),
                        (photographs[:0], photographs), (photographs[:, :8, :8], photographs[:, :8, :8])):
        with pytest.raises(ValueError, match="two sets of images of one size"):
            fit_kernel(soft, sharp)


def test_the_filter_belongs_to_the_decoder_alone(tiny_folder: Path) -> None:
    """Latents, the encoder's hash and the soft image do not notice; what is generated is the soft image, filtered."""
    filtered = load_vae(tiny_folder)
    plain = with_kernel(filtered, None)
    assert filtered.config.sharpen_size == 3 and plain.config.sharpen_size == 0
    assert encoder_hash(plain) == encoder_hash(filtered)
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    soft = plain.decode(z)
    assert torch.equal(soft, filtered.decoder.soft(z))
    assert torch.equal(filtered.decode(z), filtered.decoder.sharpen(soft))
    assert not torch.allclose(filtered.decode(z), soft)
    assert not [name for name, _ in filtered.named_parameters() if "sharpen" in name]  # nothing trains it


def test_training_releases_a_fitted_filter_and_does_not_learn_through_it(place: Workplace) -> None:
    """The decoder alone, trained on from a model with a filter and from the same one without: the same weights."""
    first = place.root / "first"
    assert vae.main(place.train("vae", "first", "--steps", 2, "--perceptual-weight", 0, "--gan-start", 1,
                                model=first)) == 0
    released = load_vae(first)
    assert released.config.sharpen_size == SIZE
    assert float(released.decoder.sharpen.kernel.sum()) == pytest.approx(1, abs=2e-3)  # type: ignore[union-attr]
    bare = shutil.copytree(first, place.root / "bare")
    vae.release(with_kernel(released, None), bare, {})
    for folder in (first, bare):
        command = place.train("vae", f"{folder.name}-on", "--decoder-only", "--steps", 2, "--perceptual-weight", 0,
                              "--gan-start", 0, model=folder)
        assert vae.main(command) == 0
    after = [load_component(folder, "vae") for folder in (first, bare)]
    assert after[0][0]["network"] == after[1][0]["network"] and after[0][0]["network"]["sharpen_size"] == SIZE
    for name, value in after[0][1].items():
        assert torch.equal(value, after[1][1][name]), name
    assert any(not torch.equal(value, released.state_dict()[name].half()) for name, value in after[0][1].items()
               if name.startswith("decoder.stages"))  # it did train


def test_the_command_fits_it_to_what_the_model_draws(
    tiny_folder: Path, place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    before = load_component(folder, "vae")
    assert evaluate.main(["--fit-sharpness", "--replace", "--data", str(place.store), "--model", str(folder),
                          "--samples", "6", "--steps", "2", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n"] == 6 and report["fine_detail_before"] != report["fine_detail_after"]
    config, state = load_component(folder, "vae")
    assert config["network"] == before[0]["network"] | {"sharpen_size": SIZE}
    fitted = state.pop("decoder.sharpen.kernel")
    assert fitted.shape == (SIZE, SIZE) and not torch.equal(fitted, Sharpen(SIZE).kernel.half())
    for name, value in state.items():
        assert torch.equal(value, before[1][name]), name  # nothing else moved, so the UNet still belongs to it
    load_unet(folder)
