"""Does the decoder's last stage begin as nothing, learn alone, resume, and leave latents and filter as they were?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training import Workplace, checkpoint, differences, make_workplace

import evaluate
import vae
from conditional_ldm import load_unet
from core.checkpoint import load_component
from core.finishing import Finish
from discriminator import TEXTURE_CHANNELS, TextureCritic, gradient_penalty, relativistic_loss
from generator import FaceGenerator
from vae import encoder_hash, load_vae

LAST = ("decoder.finish.", "decoder.head.", "decoder.stages.4.", "decoder.stages.5.", "decoder.stages.6.")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def drawn(place: Workplace) -> Path:
    """Latents that the untrained UNet draws, by the command that a person would type."""
    path = place.root / "somewhere" / "drawn.npy"
    assert evaluate.main(["--draw-latents", str(path), "--data", str(place.store), "--model", str(place.model),
                          "--samples", "6", "--steps", "2", "--device", "cpu"]) == 0
    return path


def command(place: Workplace, run: str, *more: object, model: Path | None = None) -> list[str]:
    words = place.train("vae", run, "--finish-channels", 4, *more, model=model)
    return ["--finish", *words[1:]]


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_new_stage_changes_nothing_and_sees_full_resolution() -> None:
    stage = Finish(6, 4)
    features, images = torch.randn(2, 6, 8, 12), torch.randn(2, 3, 16, 24)
    assert torch.equal(stage(features, images), images)
    nn.init.normal_(stage.head.weight)
    moved = stage(features, images)
    assert moved.shape == images.shape and not torch.allclose(moved, images)
    other = images.clone()
    other[:, :, 5, 5] += 1  # a single pixel is noticed by its neighbours, and by no one further than three pixels
    change = (stage(features, other) - moved).abs().sum((0, 1)) > 0
    assert change[5, 5] and change[4:7, 4:7].all() and not change[9:].any() and not change[:, 9:].any()


def test_the_critic_sees_patches_of_forty_pixels() -> None:
    critic = TextureCritic(TEXTURE_CHANNELS["tiny"]).double()
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = critic(images)
    assert logits.shape == (1, 1, 16, 16)
    (seen,) = torch.autograd.grad(logits[0, 0, 8, 8], images)
    lines = seen.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(lines.max() - lines.min()) + 1 == 40


def test_the_losses_of_finishing_are_what_they_say() -> None:
    better, worse = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(relativistic_loss(better, worse)) == pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2)
    assert float(relativistic_loss(better + 5, worse + 5)) == pytest.approx(float(relativistic_loss(better, worse)))
    images = torch.randn(3, 3, 8, 8, requires_grad=True)
    slopes = torch.linspace(0, 1, 3).requires_grad_()
    logits = (images * slopes[:, None, None]).sum(1, keepdim=True)  # one logit a pixel
    penalty = gradient_penalty(logits, images)
    assert float(penalty.detach()) == pytest.approx(float(slopes.detach().square().sum()))
    penalty.backward()  # it teaches
    assert slopes.grad is not None and torch.allclose(slopes.grad, 2 * slopes.detach())


def test_finishing_teaches_the_end_alone_and_what_is_released_draws(place: Workplace, drawn: Path) -> None:
    """Encoder, whitening, first stages and filter stay bit for bit, so latents and the UNet still belong to it."""
    folder = place.copy_model("finished")
    before, (config, old) = load_vae(folder), load_component(folder, "vae")
    words = command(place, "run", "--drawn", drawn, "--steps", 6, "--picture-every", 6, model=folder)
    assert vae.main(words) == 0
    found, new = load_component(folder, "vae")
    assert found["network"] == config["network"] | {"finish_channels": 4}
    assert found["training"]["finish"]["steps"] == 6 and found["training"]["finish"]["drawn"] == 6
    changed = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    assert changed and all(name.startswith(LAST) for name in changed), changed
    assert any(name.startswith("decoder.finish.") for name in changed)
    after = load_vae(folder)
    assert encoder_hash(after) == encoder_hash(before)
    load_unet(folder, vae=after)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(after.decode(z), before.decode(z))
    faces = FaceGenerator.load(folder, device="cpu", engine="torch")
    assert faces.generate("a smiling woman", num_inference_steps=2)[0].pixels.shape == (128, 128, 3)
    found_rows = rows(place.root / "run")
    assert [row["step"] for row in found_rows] == [1, 2, 3, 4, 5, 6]
    assert {"fine", "coarse", "anchor", "adversarial", "critic", "psnr", "skipped"} <= set(found_rows[0])
    assert [row["step"] for row in found_rows if "penalty" in row] == [1, 5]
    assert (place.root / "run" / "pictures" / "step-0000006.png").exists()


def test_a_stopped_and_resumed_run_is_the_undisturbed_run(place: Workplace, drawn: Path) -> None:
    assert vae.main(command(place, "whole", "--drawn", drawn, "--steps", 6)) == 0
    parts = command(place, "parts", "--drawn", drawn, "--steps", 6)
    assert vae.main([*parts, "--stop-at", "3"]) == 0
    torch.randn(7)
    assert vae.main(parts) == 0
    assert differences(checkpoint(place.root / "whole", 6), checkpoint(place.root / "parts", 6)) == []
    released = [(place.root / f"{name}-model" / "vae" / "model.safetensors").read_bytes()
                for name in ("whole", "parts")]
    assert released[0] == released[1]


def test_without_drawn_latents_it_learns_from_copies(place: Workplace) -> None:
    assert vae.main(command(place, "copies", "--steps", 2)) == 0
    assert "anchor" not in rows(place.root / "copies")[0]


def test_what_cannot_be_finished_is_said(place: Workplace, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place.copy_model("twice")
    assert vae.main(command(place, "once", "--steps", 1, model=folder)) == 0
    with pytest.raises(SystemExit, match="finished already: --init a folder"):
        vae.main(command(place, "again", "--steps", 1, model=folder))
    assert vae.main(command(place, "anew", "--steps", 1, "--init", place.model, model=folder)) == 0
    wrong = place.root / "wrong.npy"
    np.save(wrong, np.zeros((3, 7, 16, 16), np.float16))
    with pytest.raises(SystemExit, match="7 channels, this VAE's have 4"):
        vae.main(command(place, "wrong", "--drawn", wrong, "--steps", 1))
    with pytest.raises(SystemExit):
        evaluate.main(["--fit-sharpness", "--replace", "--data", str(place.store), "--model", str(folder),
                       "--samples", "4",
                       "--steps", "2", "--device", "cpu"])
    assert "fit another before vae.py --finish" in capsys.readouterr().err
    assert vae.main(place.train("vae", "decoder", "--decoder-only", "--steps", 1, "--perceptual-weight", 0,
                                "--gan-start", 1, model=folder)) == 0  # the decoder anew: what finished it does not fit
    assert load_vae(folder).config.finish_channels == 0
