"""Does a network of few steps learn where paths end, and does a folder that has one generate with it?

For data of standard deviation s the path through x at a level ends at s x / sqrt(alpha^2 s^2 + sigma^2).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import conditional_ldm
from core.command import SettingError
from core.diffusion.conditioning import Condition
from core.diffusion.distillation import consistency_error, consistency_goal, end_of_path, pseudo_huber, step_down
from core.diffusion.sampling import sample
from core.diffusion.schedule import NoiseSchedule, per_image
from core.diffusion.schedulers import TURBO, ConsistencySteps, make_scheduler, scheduler_config
from core.diffusion.unet import load_few_step_unet, load_unet
from core.engine import GenerationRequest
from core.nn.checkpoint import (
    ModelFolderError,
    component_hash,
    drop_component,
    load_component,
    load_delta,
    read_index,
    save_component,
    save_delta,
)
from generator import FaceGenerator
from tests.diffusion.test_sampling import condition, gaussian, seeded
from tests.support.tiny_model import build_tiny_model
from tests.support.training import Workplace, checkpoint, differences, make_workplace

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
COSINE, S = NoiseSchedule(), 0.6


def end(x: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = (per_image(c) for c in COSINE.coefficients(t))
    return S * x / (alpha.square() * S * S + sigma.square()).sqrt()


def exact(x: Tensor, t: Tensor, _: Condition) -> Tensor:
    """The consistency network of these data, as a prediction of v."""
    alpha, sigma = (per_image(c) for c in COSINE.coefficients(t))
    return (alpha * x - end(x, t)) / sigma


def teach(x: Tensor, t: Tensor) -> Tensor:
    return gaussian(COSINE, S)(x, t, condition(len(x)))


# ---- mathematics -----------------------------------------------------------------------------------------------------


def test_the_teachers_steps_follow_the_path() -> None:
    """At first order: twice the steps, half the error."""
    x, t = seeded(4, 1, 2, 2), torch.tensor([999.0, 800.0, 400.0, 90.0])
    errors = [float((end_of_path(teach, COSINE, x, t, steps) - end(x, t)).abs().max()) for steps in (16, 32, 64, 128)]
    assert errors[-1] < 0.015 and all(1.6 < a / b < 2.4 for a, b in zip(errors, errors[1:], strict=False)), errors
    down = step_down(COSINE, x, teach(x, t), t, torch.tensor([-1.0, 700.0, 399.0, -5.0]))
    z = COSINE.denoised(x, teach(x, t), t)
    assert torch.equal(down[[0, 3]], z[[0, 3]]) and not torch.equal(down[[1, 2]], z[[1, 2]])
    assert float((down[2] - x[2]).abs().max()) < 0.01


def test_the_goal_is_the_end_of_the_path() -> None:
    """With the exact network one step further down it is the end, up to one step's error; below a step, the data."""
    x, t = seeded(5, 1, 2, 2), torch.tensor([999.0, 700.0, 300.0, 26.0, 10.0])
    errors = []
    for gap in (25.0, 12.5):
        goal = consistency_goal(exact, teach, COSINE, x, t, condition(5), gap)
        errors.append(float((goal - end(x, t)).abs().max()))
    assert errors[0] < 0.03 and errors[1] < errors[0]
    near = consistency_error(exact, goal, COSINE, x, t, condition(5))
    far = consistency_error(gaussian(COSINE, S), goal, COSINE, x, t, condition(5))
    assert near.shape == (5,) and float(near.max()) < 0.02 and float(far[:3].min()) > 5 * float(near[:3].max())


def test_the_loss_is_a_distance_that_is_flat_at_zero() -> None:
    a, b = seeded(3, 4, 8, 8), seeded(3, 4, 8, 8, seed=1)
    far = pseudo_huber(a, b)
    assert torch.allclose(far, (a - b).square().mean((1, 2, 3)).sqrt(), rtol=1e-2)
    assert pseudo_huber(a, a).tolist() == [0, 0, 0]
    a.requires_grad_(True)
    pseudo_huber(a, a.detach()).sum().backward()
    assert a.grad is not None and float(a.grad.abs().max()) == 0


def test_a_network_that_learns_by_it_finds_the_ends() -> None:
    """One number a level, learned from neighbours alone: it ends where the teacher's steps end, one after the other."""
    gap, levels = 125.0, torch.arange(124.0, 1000.0, 125.0)

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.zeros(len(levels)))

        def forward(self, x: Tensor, t: Tensor, _: Condition) -> Tensor:
            return x * per_image(self.slope[((t - 124) / 125).round().long()])

    x, alike, student = seeded(8, 1, 4, 4), condition(8), Table()
    wanted, level = x, levels
    for _ in levels:  # rows that have arrived stay where they are
        down = step_down(COSINE, wanted, teach(wanted, level.clamp_min(0)), level.clamp_min(0), level - gap)
        wanted, level = torch.where(per_image(level < 0), wanted, down), level - gap
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)

    def error() -> Tensor:
        with torch.no_grad():
            return consistency_error(student, wanted, COSINE, x, levels, alike)

    before = error()
    for i in range(100):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 100)
        goal = consistency_goal(student, teach, COSINE, x, levels, alike, gap)
        consistency_error(student, goal, COSINE, x, levels, alike).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(before.max()) > 0.4 and float(error().max()) < 0.07, (before, error())


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_turbo_draws_numbers_of_the_right_spread(steps: int) -> None:
    noise = seeded(400, 1, 4, 4)
    config, calls = scheduler_config(COSINE), []

    def network(x: Tensor, t: Tensor, asked: Condition) -> Tensor:
        calls.append(float(t[0]))
        return exact(x, t, asked)

    def draw(rows: slice) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(400)[rows]]
        return sample(network, condition(len(generators)), make_scheduler(TURBO, config), noise[rows], steps,
                      schedule=COSINE, generators=generators)

    z = draw(slice(None))
    assert float(z.std()) == pytest.approx(S, rel=0.03)
    assert calls == [round(1000 * (steps - i) / steps) - 1 for i in range(steps)] and calls[0] == 999
    assert torch.equal(draw(slice(7, 9)), z[7:9])  # an image does not depend on its neighbours
    if steps == 1:
        assert torch.allclose(z, S * noise, atol=1e-3)


def test_turbo_starts_from_a_picture_too() -> None:
    z, noise = seeded(2, 1, 4, 4, seed=1), seeded(2, 1, 4, 4)
    steps = ConsistencySteps(COSINE)
    found = sample(exact, condition(2), steps, noise, 4, schedule=COSINE, start=0.75, z=S * z,
                   generators=[torch.Generator()] * 2)
    level = torch.tensor([249.0, 249.0])
    assert torch.allclose(found, end(COSINE.add_noise(S * z, noise, level), level), atol=1e-5)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_a_difference_takes_a_byte_a_weight_and_comes_back(tmp_path: Path) -> None:
    base = {"w": seeded(8, 3, 3), "b": seeded(8), "same": seeded(4, 4)}
    state = {"w": base["w"] + 0.01 * seeded(8, 3, 3, seed=1), "b": base["b"] * 1.1, "same": base["same"],
             "new": seeded(5, 2), "one": torch.tensor(0.25)}
    save_component(tmp_path, "base", base, {}, half=False)
    save_delta(tmp_path, "more", state, base, {"network": 1})
    config, added = load_component(tmp_path, "more")
    found = load_delta(added, base)
    assert config == {"network": 1} and found.keys() == state.keys()
    assert torch.equal(found["same"], state["same"])
    for name, value in state.items():
        moved = (value - base.get(name, torch.tensor(0.0))).abs().max()
        assert float((found[name] - value).abs().max()) <= float(moved) / 250 + 1e-7, name
        assert added[name].dtype == torch.int8
    drop_component(tmp_path, "more")
    drop_component(tmp_path, "more")
    assert set(read_index(tmp_path)["components"]) == {"base"} and not (tmp_path / "more").exists()


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("work"), count=12)


def distill(place: Workplace, run: str, *more: object) -> Callable[..., int]:
    words = [word for word in place.train("unet", run, *more) if word != "--train"]
    return lambda *last: conditional_ldm.main(["--distill", "consistency", *words, *last])


@pytest.fixture(scope="module")
def few_step(place: Workplace) -> Path:
    """A folder whose `turbo/` was trained for four steps, stopped and resumed."""
    again = distill(place, "turbo", "--steps", 4)
    assert again("--stop-at", "2") == 0
    folder = place.root / "turbo-model"
    assert load_few_step_unet(folder) is None
    assert again() == 0
    return folder


def test_a_stopped_and_resumed_run_is_the_undisturbed_run(place: Workplace, few_step: Path) -> None:
    assert distill(place, "whole", "--steps", 4)() == 0
    runs = [checkpoint(place.root / run, 4) for run in ("turbo", "whole")]
    assert differences(*runs) == []
    assert {"model", "optimizer", "ema_long", "ema_short", "target"} == {name.split("/")[0] for name in runs[0]}
    released = [load_component(folder, "turbo")[1] for folder in (few_step, place.root / "whole-model")]
    assert differences(*released) == []


def test_what_is_released_is_what_was_learned(place: Workplace, few_step: Path) -> None:
    config = json.loads((few_step / "turbo" / "config.json").read_text())
    facts = config["distilled"]
    assert facts["distill"] == "consistency" and facts["steps"] == 4 and facts["ema"] in facts["validation_loss"]
    assert config["parents"] == {"unet": component_hash(place.model, "unet")} == {"unet": facts["teacher"]}
    network, averaged = load_few_step_unet(few_step), checkpoint(place.root / "turbo", 4)
    assert network is not None
    start = load_unet(few_step).state_dict()
    for name, value in network.state_dict().items():
        wanted, base = averaged[f"{facts['ema']}/{name}"], start.get(name, torch.tensor(0.0))
        assert float((value - wanted).abs().max()) <= float((wanted - base).abs().max()) / 200 + 1e-7, name
    weights = load_component(few_step, "unet")[1]
    assert differences(weights, load_component(place.model, "unet")[1]) == []
    assert not any(value.dtype == torch.int8 for value in network.state_dict().values())


def test_turbo_beside_another_unet_is_refused_or_removed(few_step: Path, place: Workplace, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", seed=5)
    index = json.loads((other / "model_index.json").read_text())
    mixed = place.copy_model("mixed")
    config, added = load_component(few_step, "turbo")
    save_component(mixed, "turbo", added, config | {"parents": {"unet": index["components"]["unet"]["sha256"]}},
                   half=False)
    with pytest.raises(ModelFolderError, match="turbo/ .* another UNet; run .*--distill consistency"):
        FaceGenerator.load(mixed, "cpu", engine="torch")
    parents = json.loads((mixed / "unet" / "config.json").read_text())["parents"]
    conditional_ldm.release(load_unet(mixed), mixed, COSINE, parents, {}, 2.0)  # the UNet that it does not belong to
    assert load_few_step_unet(mixed) is None and not (mixed / "turbo").exists()
    again = Path(shutil.copytree(few_step, tmp_path / "again"))
    conditional_ldm.release(load_unet(again), again, COSINE, parents, {}, 3.0)  # the same UNet once more
    assert load_few_step_unet(again) is not None
    with pytest.raises(SettingError, match="--sampler 'Turbo' is not one of UniPC, .*which .*mixed has"):
        conditional_ldm.main(["--eval", "--prompt", "a man", "--model", str(mixed), "--sampler", TURBO, "--device",
                              "cpu"])


# ---- what generates
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(few_step: Path) -> FaceGenerator:
    return FaceGenerator.load(few_step, "cpu", engine="torch")


def latents(faces: FaceGenerator, run: object) -> Tensor:
    return torch.stack([torch.frombuffer(bytearray(one.latent), dtype=torch.float32) for one in faces.pictures(run)])


def finish(faces: FaceGenerator, *requests: GenerationRequest) -> list[Tensor]:
    runs = [faces.start(request) for request in requests]
    while any(not run.finished for run in runs):
        faces.step(runs)
    return [latents(faces, run) for run in runs]


def test_turbo_is_a_sampler_where_the_folder_has_it(place: Workplace, faces: FaceGenerator) -> None:
    plain = FaceGenerator.load(place.model, "cpu", engine="torch")
    assert faces.info.samplers == (*plain.info.samplers, TURBO) and TURBO not in plain.info.samplers
    assert faces.info.model_hash != plain.info.model_hash and faces.info.default_sampler == plain.info.default_sampler
    with pytest.raises(ValueError, match="the model has no turbo/"):
        plain.generate("a man", sampler=TURBO)
    (picture,) = faces.generate("a man", num_inference_steps=4, sampler=TURBO)
    assert picture.assessment["evaluations"] == 4  # it knows the model's own guidance scale
    (both,) = faces.generate("a man", num_inference_steps=4, sampler=TURBO, negative_prompt="a woman")
    assert both.assessment["evaluations"] == 8


def test_turbo_and_the_rest_share_a_step_and_stay_what_they_are_alone(faces: FaceGenerator) -> None:
    requests = [GenerationRequest("a man", 2, 3, 5, sampler=TURBO), GenerationRequest("a woman", 1, 5, 9),
                GenerationRequest("an old man", 1, 2, 7, sampler=TURBO, guidance_scale=1.0), GenerationRequest("a man",
                                                                                                               1, 3, 5)]
    together = finish(faces, *requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = finish(faces, request)
        assert torch.allclose(found, alone, atol=1e-4)
    assert not torch.allclose(together[0][:1], together[3], atol=1e-2)


def test_openvino_draws_turbo_too(few_step: Path, faces: FaceGenerator, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    fast = FaceGenerator.load(few_step, "cpu", engine="openvino", cache=tmp_path)
    request = GenerationRequest("a man", 2, 4, 5, sampler=TURBO)
    assert torch.allclose(finish(fast, request)[0], finish(faces, request)[0], atol=1e-3)
