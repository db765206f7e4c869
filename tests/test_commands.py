"""Do the commands that a person types work, from drawn faces to drawn images, one after the other, and again?"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import conditional_ldm
import train_clip
import vae
from core.diffusion.schedulers import SAMPLERS
from core.diffusion.unet import load_unet
from core.evaluation import prompt_sheets
from core.evaluation.prompts import VISIBLE
from core.nn.checkpoint import ModelFolderError, component_hash, read_index
from core.text.captions import analyze
from core.text.lexicon import ATTRIBUTES
from core.training.data_sources import DataError
from generator import FaceGenerator
from tests.support.training import Workplace, checkpoint, make_workplace
from vae import encoder_hash, load_vae, with_kernel

pytestmark = pytest.mark.usefixtures("quick_grids")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def trained(place: Workplace) -> Path:
    """CLIP, then the VAE with its adversary and CLIP's features, then the UNet; each stopped once and run again.

    In bf16, as on most training machines; what follows in the same process measures and draws in fp32.
    """
    model = place.root / "made"
    for component, main, more in (
        ("clip", train_clip.main, ["--steps", 4]),
        ("vae", vae.main, ["--steps", 4, "--gan-start", 0.5, "--image-every", 2]),
        ("unet", conditional_ldm.main, ["--steps", 4]),
    ):
        command = place.train(component, component, *more, "--precision", "bf16", model=model)
        assert main([*command, "--stop-at", "2"]) == 0
        assert not (model / component).exists()  # an unfinished run releases nothing
        assert main(command) == 0
        weights = (model / component / "model.safetensors").read_bytes()
        assert main(command) == 0  # finished: nothing is left to do, and nothing changes
        assert (model / component / "model.safetensors").read_bytes() == weights
    return model


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def test_the_model_folder_is_whole(trained: Path, place: Workplace) -> None:
    index = read_index(trained)
    assert set(index["components"]) == {"clip", "vae", "preview", "unet"} and index["name"] == "made"
    assert index["image_size"] == 128 and index["latent_shape"] == [4, 16, 16]
    assert index["defaults"]["sampler"] in SAMPLERS and index["defaults"]["guidance_scale"] > 1
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert names == {"model_index.json", "vocabulary.json", "clip/tokenizer.json", "scheduler/config.json",
                     *(f"{part}/config.json" for part in index["components"]),
                     *(f"{part}/model.safetensors" for part in index["components"])}
    assert set(json.loads((trained / "vocabulary.json").read_text()).values()) <= {"known", "rare"}
    for part in ("clip", "vae", "unet"):
        assert all(value.dtype == torch.float16 for value in load_file(trained / part / "model.safetensors").values())
        training = json.loads((trained / part / "config.json").read_text())["training"]
        assert training["steps"] == 4 and training["preset"] == "tiny" and training["batch_size"] == 4
    unet = json.loads((trained / "unet" / "config.json").read_text())
    assert unet["parents"] == {"vae": encoder_hash(load_vae(trained)), "clip": component_hash(trained, "clip")}
    assert unet["training"]["images_seen"] == 16 and unet["training"]["ema"] in ("ema_long", "ema_short")
    losses = unet["training"]["validation_loss"]
    assert losses[unet["training"]["ema"]] == min(losses.values()) and 0 < min(losses.values()) < 10
    vae_config = json.loads((trained / "vae" / "config.json").read_text())
    network = load_vae(trained)
    assert np.allclose(vae_config["latent_std"], network.latent_std, rtol=1e-3) and min(vae_config["latent_std"]) > 0
    assert not np.allclose(vae_config["latent_std"], 1.0)  # measured, not assumed


def test_every_run_ends_with_curves_and_numbers(trained: Path, place: Workplace) -> None:
    for component, keys in (
        ("clip", {"loss", "excess", "scale", "grad_norm", "lr", "skipped"}),
        ("vae", {"loss", "charbonnier", "gradient", "kl", "downscale", "perceptual", "adversarial", "matching",
                 "adaptive_weight", "critic", "val_psnr_16", "grad_norm", "lr", "skipped"}),
        ("unet", {"loss", "images_seen", "grad_norm", "lr", "skipped"}),
    ):
        run = place.root / component
        found = lines(run)
        assert keys <= {key for line in found for key in line}, component
        assert [line["step"] for line in found if "loss" in line] == [1, 2, 3, 4]
        assert all(np.isfinite(list(line.values())).all() and line.get("skipped", 0) == 0 for line in found)
        assert size(run / "curves.png")[0] > 1000 and list((run / "tensorboard").glob("events.*"))
    assert [line["step"] for line in lines(place.root / "vae") if "critic" in line] == [3, 4]  # from half way on
    buckets = {key: line[key] for line in lines(place.root / "unet") for key in line if key.startswith("mse_noise_")}
    assert len(buckets) >= 4 and max(buckets) <= "mse_noise_4"  # the loss by level of noise
    held_out = lines(place.root / "unet")[-1]
    assert held_out["val_loss"] > 0 and any(key.startswith("val_mse_noise_") for key in held_out)
    assert size(place.root / "vae" / "pictures" / "step-0000004.png") == (8 * 128, 128)
    assert size(place.root / "unet" / "pictures" / "step-0000004.png") == (8 * 128, 4 * 128)


def test_measuring_clip(trained: Path, place: Workplace) -> None:
    assert train_clip.main(["--eval", "--data", str(place.store), "--model", str(trained), "--run",
                            str(place.root / "clip-eval"), "--device", "cpu"]) == 0
    found = json.loads((place.root / "clip-eval" / "metrics.json").read_text())
    assert found["n"] == 2 and found["chance_at_1"] == found["chance_at_10"] and found["zero_shot_auc_chance"] == 0.5
    refused = {name for name, value in found.items() if value is None}  # of two images the first ten are both
    assert "text_to_image_precision_at_10" in refused and refused == set(found["not_measurable"])
    assert all(0 <= value <= 1 for name, value in found.items() if "precision" in name and name not in refused)
    assert set(found["zero_shot_auc"]) <= set(ATTRIBUTES) and 0 <= found["zero_shot_auc_mean"] <= 1


def test_measuring_the_vae(trained: Path, place: Workplace) -> None:
    run = place.root / "vae-eval"
    assert vae.main(["--eval", "--data", str(place.store), "--model", str(trained), "--run", str(run),
                     "--device", "cpu"]) == 0
    found = json.loads((run / "metrics.json").read_text())
    assert found["n"] == 2 and 3 < found["psnr_db"] < 60 and -1 < found["ssim"] < 1 and 0 <= found["ms_ssim"] <= 1
    assert size(run / "reconstructions.png") == (8 * 128, 128)


def test_drawing_a_grid(trained: Path, place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(name: str, *more: str) -> np.ndarray:
        out = place.root / f"{name}.png"
        assert conditional_ldm.main(["--eval", "--prompt", "a smiling woman", "--model", str(trained), "--n-images",
                                     "3", "--n-inf-steps", "4", "--device", "cpu", "--out", str(out), *more]) == 0
        assert f"wrote {out}" in capsys.readouterr().out
        with Image.open(out) as image:
            return np.asarray(image.convert("RGB"))

    two = draw("two", "--prompt", "", "--precision", "no")
    assert two.shape == (2 * 128, 3 * 128, 3) and two.std() > 1
    again, other = draw("again", "--precision", "no"), draw("other", "--precision", "no", "--seed", "5")
    assert np.abs(again.astype(int) - two[:128].astype(int)).max() <= 1 and (other != again).any()  # a row a prompt
    for sampler in ("DDPM", "UniPC"):
        assert draw(sampler, "--sampler", sampler).shape == (128, 3 * 128, 3)
    with pytest.raises(ValueError, match="'Brush' is not one of"):
        draw("none", "--sampler", "Brush")
    with pytest.raises(SystemExit):
        conditional_ldm.main(["--eval", "--model", str(trained)])
    assert "--eval needs at least one --prompt" in capsys.readouterr().err


def test_a_gallery_shows_every_prompt_and_picks_nothing_out(
    trained: Path, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sheet a prompt, two columns of four seeds or fewer; the whole sheet holds the first five of each."""
    prompts = prompt_sheets.GALLERY_PROMPTS
    assert len(set(prompts)) == 20
    analyses = [analyze(prompt) for prompt in prompts]
    for one in analyses:  # only what the model knows, and nothing that contradicts itself
        assert {word.status for word in one.words} == {"known"} and not one.contradictions
    assert set(VISIBLE) <= {name for one in analyses for name in one.attributes}
    monkeypatch.setattr("core.evaluation.prompt_sheets.GALLERY_PROMPTS", prompts[:2])
    out = place.root / "gallery"
    command = ["--eval", "--gallery", str(out), "--model", str(trained), "--n-images", "6", "--n-inf-steps", "1",
               "--device", "cpu", "--precision", "no"]  # fmt: skip
    assert conditional_ldm.main(command) == 0
    sheets = {path.name: np.asarray(Image.open(path).convert("RGB")).astype(int) for path in out.glob("*.webp")}
    first, second, whole = (sheets.pop(name) for name in sorted(sheets))
    assert not sheets and first.shape == second.shape == (2 * 128, 4 * 128, 3) and whole.shape == (128, 10 * 128, 3)
    assert (out / "01-a-smiling-young-woman-with-wavy-blond-hair.webp").is_file()

    def pictures(sheet: np.ndarray) -> np.ndarray:
        return sheet.reshape(len(sheet) // 128, 128, -1, 128, 3).swapaxes(1, 2).reshape(-1, 128, 128, 3)

    shown = [*pictures(first)[:5], *pictures(second)[:5]]
    gaps = [[np.abs(one - other).mean() for other in shown] for one in pictures(whole)]
    assert np.diag(gaps).max() < 8  # WebP loses a little
    # a network this small hardly reads, so that one seed looks alike for both prompts
    assert [int(np.argmin(row)) % 5 for row in gaps] == [0, 1, 2, 3, 4] * 2
    assert first[128:, 2 * 128 :].mean() > 253  # six images: two places stay white


def test_the_flow_schedule_trains_and_draws(trained: Path, place: Workplace) -> None:
    command = place.train("unet", "flow", "--schedule", "flow", "--steps", 2, "--captions-per-image", 1)
    assert conditional_ldm.main(command) == 0
    model = place.root / "flow-model"
    config = json.loads((model / "scheduler" / "config.json").read_text())
    assert config["schedule"] == "flow" and config["samplers"] == ["Flow Euler"]
    out = place.root / "flow.png"
    conditional_ldm.main(["--eval", "--prompt", "a man", "--model", str(model), "--n-images", "1", "--n-inf-steps", "3",
                          "--device", "cpu", "--out", str(out)])
    assert size(out) == (128, 128)


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_training_needs_no_diffusers(trained: Path, place: Workplace, monkeypatch: pytest.MonkeyPatch, schedule: str,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Its images are drawn by our own solver; a flow, whose sampler is of diffusers, is trained without images."""
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises, as where it is not installed
    run = f"bare-{schedule}"
    assert conditional_ldm.main(place.train("unet", run, "--schedule", schedule, "--steps", 1)) == 0
    found = list((place.root / run / "pictures").glob("*.png"))
    assert len(found) == (schedule == "cosine")
    assert ("step-0000001 has no image: diffusers is not installed" in capsys.readouterr().out) == (not found)


def test_pictures_of_a_run_are_what_the_released_folder_draws(trained: Path, place: Workplace) -> None:
    """One way to generate: with the same seeds, steps and guidance a user gets the last image of the run."""
    run = place.root / "same"
    assert conditional_ldm.main(place.train("unet", "same", "--steps", 1, model=place.copy_model("same-model"))) == 0
    with Image.open(run / "pictures" / "step-0000001.png") as image:
        shown = np.asarray(image).astype(int)
    faces = FaceGenerator.load(place.root / "same-model", "cpu", engine="torch")
    drawn = faces.generate(prompt_sheets.GRID_PROMPTS[1], num_images=4, num_inference_steps=3, guidance_scale=2.0,
                           watermark=False)
    tiles = [shown[:128, 128 * i : 128 * (i + 1)] for i in range(4, 8)]  # the second prompt: eight images a row
    assert max(int(np.abs(tile - one.pixels).max()) for tile, one in zip(tiles, drawn, strict=True)) <= 3


# ------------------------------------------------------------------------------------------------------ decoder alone


def test_a_decoder_trained_alone_keeps_even_the_sign_of_zero(trained: Path, place: Workplace) -> None:
    """Averaging turns -0 into 0, which is equal but has another hash: the UNet would refuse its own encoder."""
    model = Path(shutil.copytree(trained, place.root / "signed-model"))
    signed = load_vae(model)
    signed.encoder.conv_in.weight[0, 0, 0, 0] = -0.0
    vae.release(signed, model, training={})
    assert vae.main(place.train("vae", "signed", "--decoder-only", "--steps", 2, "--gan-start", 1,
                                "--perceptual-weight", 0, model=model)) == 0
    assert encoder_hash(load_vae(model)) == encoder_hash(signed)


def test_a_decoder_trained_alone_keeps_the_encoder_and_the_unet(trained: Path, place: Workplace) -> None:
    """Without --init it goes on from the model's own VAE, and the UNet and the cached latents stay valid."""
    model = Path(shutil.copytree(trained, place.root / "decoder-model"))
    before = load_vae(model)
    command = place.train("vae", "decoder", "--decoder-only", "--steps", 3, "--gan-start", 1, "--perceptual-weight", 0,
                          model=model)
    assert vae.main([*command, "--stop-at", "1"]) == 0
    assert vae.main(command) == 0
    after = load_vae(model)
    assert encoder_hash(after) == encoder_hash(before)
    for name, value in after.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]) == (not name.startswith("decoder.")), name
    assert component_hash(model, "vae") != component_hash(trained, "vae")
    load_unet(model)
    run = checkpoint(place.root / "decoder", 3)
    first = before.state_dict()["encoder.conv_in.weight"]
    assert torch.equal(run["model/encoder.conv_in.weight"], first) and torch.equal(run["ema/encoder.conv_in.weight"],
                                                                                   first)
    with pytest.raises(ModelFolderError, match="not a model folder"):  # an encoder that never learned is no start
        vae.main(place.train("vae", "orphan", "--decoder-only", "--steps", 2, model=place.root / "nowhere"))


def test_a_vae_can_start_from_another(trained: Path, place: Workplace) -> None:
    command = place.train("vae", "warm", "--steps", 2, "--stop-at", 1, "--gan-start", 1, "--perceptual-weight", 0,
                          "--init", trained, "--learning-rate", 1e-9)
    assert vae.main(command) == 0
    start, weights = with_kernel(load_vae(trained), None).state_dict(), checkpoint(place.root / "warm", 1)
    assert all(torch.allclose(weights[f"model/{name}"], value, atol=1e-6) for name, value in start.items())


def test_latents_are_cached_once_for_each_encoder(trained: Path, place: Workplace, tmp_path: Path) -> None:
    """The second run reads the files; another encoder's are made anew; both views of every image are there."""
    command = place.train("unet", "cached", "--steps", 9, "--stop-at", 1, model=trained)
    command[command.index("--cache") + 1] = str(tmp_path / "cache")
    conditional_ldm.main(command)
    key, stamp = (tmp_path / "cache" / "cache.json").read_text(), (tmp_path / "cache" / "mean.npy").stat().st_mtime_ns
    mean, std = (np.load(tmp_path / "cache" / f"{name}.npy") for name in ("mean", "std"))
    assert mean.shape == std.shape == (2, 20, 4, 16, 16) and mean.dtype == np.float16 and (std > 0).all()
    network = load_vae(trained)
    image = np.load(place.store / "images.npy", mmap_mode="r")[3:4]
    for view, pixels in enumerate((image, image[:, :, ::-1])):
        posterior = network.encode(vae.to_images(torch.from_numpy(pixels.copy())))
        assert np.allclose(network.normalize(posterior.mean), mean[view, 3], atol=5e-3)
        assert np.allclose(posterior.std / network.latent_std[:, None, None], std[view, 3], atol=5e-3)
    conditional_ldm.main(command)
    assert (tmp_path / "cache" / "mean.npy").stat().st_mtime_ns == stamp
    other = place.train("unet", "other", "--steps", 9, "--stop-at", 1)
    other[other.index("--cache") + 1] = str(tmp_path / "cache")
    conditional_ldm.main(other)
    assert (tmp_path / "cache" / "cache.json").read_text() != key
    assert (tmp_path / "cache" / "mean.npy").stat().st_mtime_ns != stamp


def test_missing_parts_are_named(place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="python dataset.py --prepare"):
        train_clip.main(["--train", "--preset", "tiny", "--data", str(tmp_path / "none"), "--device", "cpu"])
    with pytest.raises(ModelFolderError, match="not a model folder"):  # the perceptual loss needs CLIP
        vae.main(place.train("vae", "alone", "--steps", 1, model=tmp_path / "empty"))
    for command in ([], ["--train", "--eval"], ["--train", "--preset", "huge"]):
        for main in (train_clip.main, vae.main, conditional_ldm.main):
            with pytest.raises(SystemExit):
                main(command)
    assert "invalid choice: 'huge'" in capsys.readouterr().err
