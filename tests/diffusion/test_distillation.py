"""Does one pass come to say what two say, and is nothing else changed by it?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import conditional_ldm
from conditional_ldm import PRESETS
from core.diffusion.conditioning import Condition
from core.diffusion.distillation import (
    GUIDANCE_RANGE,
    WeakModelGuidance,
    cfg_prediction,
    guidance_error,
    relative_errors,
    sample_guidance_scales,
)
from core.diffusion.guidance import Guidance, GuidedBatch, guided
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.unet import Attention, ConditionalUNet, UNetConfig, load_unet, perturbed
from core.engine import GenerationRequest
from core.nn.checkpoint import ModelFolderError, component_hash, read_index
from core.training.latent_cache import Batch
from core.training.run_folder import CheckpointMismatch
from generator import FaceGenerator
from tests.support.tiny_model import bundled_model
from tests.support.training import Workplace, checkpoint, differences, make_workplace

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
LEARNED = ("--steps", 80, "--learning-rate", 5e-3, "--batch-size", 8)
PROMPT = "a smiling woman with blond hair"


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told(rows: int, seed: int = 0, width: int = 32) -> Condition:
    null = torch.zeros(rows, dtype=torch.bool)
    return Condition(seeded(rows, 5, width, seed=seed), torch.ones(rows, 5, dtype=torch.bool),
                     seeded(rows, width, seed=seed + 1), torch.full((rows,), 128.0), null)


def network(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """A network that knows scales: its guided answer is exactly what two passes would be combined to."""
    text = (condition.tokens * condition.mask[..., None]).sum((1, 2)) * (~condition.null).float() * condition.guidance
    return x * timestep.view(-1, 1, 1, 1) + text.view(-1, 1, 1, 1)


def speaking(config: UNetConfig, seed: int = 0) -> ConditionalUNet:
    """A network whose zero-initialised branches say something, but for the guidance."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = ConditionalUNet(config).eval().requires_grad_(False)
        for name, weight in unet.named_parameters():
            if not bool(weight.any()) and name.endswith("weight") and "guidance" not in name:
                weight.normal_(std=0.05)
    return unet


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_a_condition_knows_no_guidance_until_it_is_told() -> None:
    condition = told(3)
    condition.null[1] = True
    assert condition.guidance.tolist() == [1, 1, 1] and condition.nulled().guidance.tolist() == [1, 1, 1]
    asked = condition.at_scale(2.5)
    assert asked.guidance.tolist() == [2.5, 1, 2.5]  # guidance towards nothing is none
    assert asked.nulled().guidance.tolist() == [1, 1, 1] and asked[slice(1, 3)].guidance.tolist() == [1, 2.5]
    assert condition.at_scale(torch.tensor([2.0, 3.0, 4.0])).guidance.tolist() == [2, 1, 4]
    assert asked.repeat(2).guidance.tolist() == [2.5, 2.5, 1, 1, 2.5, 2.5]


@pytest.mark.parametrize(("scale", "guidance_range", "negative", "passes"), [
    (2.5, GUIDANCE_RANGE, False, 1), (6.0, GUIDANCE_RANGE, False, 1), (1.0, GUIDANCE_RANGE, False, 1),
    (0.0, GUIDANCE_RANGE, False, 1), (6.1, GUIDANCE_RANGE, False, 2), (0.5, GUIDANCE_RANGE, False, 2),
    (2.5, GUIDANCE_RANGE, True, 2), (2.5, None, False, 2),
])
def test_one_pass_is_enough_where_the_network_knows_the_scale(
    scale: float, guidance_range: tuple[float, float] | None, negative: bool, passes: int
) -> None:
    """And it gives what two give, if the network learned that; everything else is asked as before."""
    x, t, condition = seeded(2, 1, 2, 2), torch.tensor([3.0, 5.0]), told(2)
    unwanted = told(2, seed=5) if negative else None
    job = Guidance(condition, scale, unwanted, guidance_range=guidance_range)
    assert job.num_passes == [passes] * 2
    batch = GuidedBatch([job])
    rows, _, asked = batch.inputs(x, t)
    assert len(rows) == 2 * passes == len(asked)
    assert asked.guidance.tolist() == [scale if job.is_guidance_distilled else 1.0] * len(rows)
    found = batch.combine(network(*batch.inputs(x, t)))
    assert torch.allclose(found, guided(network, x, t, condition, scale, unwanted), atol=1e-4)


def test_pushes_and_ways_between_two_texts_need_no_second_pass_either() -> None:
    """They are added to the guided prediction, however it came about; neighbours do not notice."""
    x, t = seeded(7, 1, 2, 2), torch.arange(1.0, 8.0)
    jobs = [Guidance(told(2), 3.0, edit_directions=((1.5, told(2, seed=8)), (-1.5, told(2, seed=9)))),
            Guidance(told(3, seed=2), 4.0, None, told(3, seed=3), (0.0, 0.5, 1.0)),
            Guidance(told(2, seed=4), 9.0)]
    knowing = [dataclasses.replace(job, guidance_range=GUIDANCE_RANGE) for job in jobs]
    before, after = GuidedBatch(jobs), GuidedBatch(knowing)
    assert [job.num_passes for job in jobs] == [[4, 4], [2, 3, 2], [2, 2]]
    assert [job.num_passes for job in knowing] == [[3, 3], [1, 2, 1], [2, 2]]
    answers = [batch.combine(network(*batch.inputs(x, t))) for batch in (before, after)]
    assert torch.allclose(*answers, atol=1e-4)
    assert len(after.pictures) == len(before.pictures) - 5 == sum(map(sum, [job.num_passes for job in knowing]))


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [None, True])
def test_scale_1_adds_exactly_nothing_and_a_new_embedding_nothing_at_all(attention: bool | None) -> None:
    old = speaking(PRESETS["tiny"])
    config = dataclasses.replace(PRESETS["tiny"], guidance_range=GUIDANCE_RANGE, guided_attention=attention)
    new = ConditionalUNet(config).eval()
    missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
    assert missing and all("guidance" in name for name in missing) and not unexpected
    assert any("self_guidance" in name for name in missing) == bool(attention)
    x, t, condition = seeded(3, 4, 16, 16), torch.tensor([10.0, 500.0, 990.0]), told(3)
    with torch.inference_mode():
        before = old(x, t, condition)
        assert torch.equal(new(x, t, condition.at_scale(4.0)), before)  # it has not learned
        for name in missing:
            new.get_parameter(name).normal_()
        assert torch.equal(new(x, t, condition), before)  # whatever it learned
        assert torch.equal(new(x, t, condition.at_scale(1.0)), before)
        apart = [float((new(x, t, condition.at_scale(w)) - before).abs().max()) for w in (1.01, 1.5, 6.0)]
        assert 0 < apart[0] < apart[1] and apart[2] > 1e-3
        assert torch.equal(old(x, t, condition.at_scale(4.0)), before)  # a network that was not distilled does not hear


def test_perturbed_attention_hears_no_other_position_and_the_text_as_before() -> None:
    attention, x = Attention(16, 16, 8).eval(), seeded(2, 6, 16)
    attention.out.weight.data.normal_()
    moved = x.clone()
    moved[:, 3] = 5.0
    elsewhere = [0, 1, 2, 4, 5]
    assert not torch.allclose(attention(moved)[:, elsewhere], attention(x)[:, elsewhere])
    attention.perturbed = True
    assert torch.equal(attention(moved)[:, elsewhere], attention(x)[:, elsewhere])
    assert not torch.allclose(attention(moved)[:, 3] - moved[:, 3], attention(x)[:, 3] - x[:, 3])
    network = speaking(PRESETS["tiny"])
    worse, told_of = perturbed(network), (seeded(2, 4, 16, 16), torch.tensor([500.0, 900.0]), told(2))
    assert all(torch.equal(a, b) for a, b in zip(worse.parameters(), network.parameters(), strict=True))
    before = network(*told_of)
    assert not torch.allclose(worse(*told_of), before) and torch.equal(network(*told_of), before)  # a copy
    changed = dataclasses.replace(told_of[2], tokens=seeded(2, 5, 32, seed=7))
    assert not torch.allclose(worse(*told_of[:2], changed), worse(*told_of))  # the text is heard


def test_a_worse_network_is_led_away_from_where_a_face_is_composed() -> None:
    """And nowhere else, nor without guidance."""

    def worse(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return 0.5 * network(x, timestep, condition)

    weak_model = WeakModelGuidance(worse, 0.6)
    t, scale = torch.tensor([300.0, 500.0, 700.0, 900.0, 900.0, 900.0]), torch.tensor([2.5, 2.5, 2.5, 1.75, 6.0, 1.0])
    shares = weak_model.shares(t, scale)
    assert torch.allclose(shares, torch.tensor([0.0, 0.3, 0.6, 0.3, 0.6, 0.0]))
    x, condition = seeded(6, 1, 2, 2), told(6)
    found = cfg_prediction(network, x, t, condition, scale, weak_model)
    plain, wanted = cfg_prediction(network, x, t, condition, scale), network(x, t, condition)
    assert torch.allclose(found, plain + shares.view(-1, 1, 1, 1) * 0.5 * wanted, atol=1e-4)
    assert torch.equal(found[[0, 5]], plain[[0, 5]])


def test_scales_cover_the_range_and_some_are_off() -> None:
    scales = sample_guidance_scales(1000, torch.Generator().manual_seed(0), 0.1)
    off = scales == 1.0
    assert abs(float(off.float().mean()) - 0.1) < 0.002 and scales.max() <= 6
    counts = torch.histc(scales[~off], 5, 1.0, 6.0) / 1000
    assert float((counts - 0.9 / 5).abs().max()) < 0.003
    assert torch.equal(scales, sample_guidance_scales(1000, torch.Generator().manual_seed(0), 0.1))
    assert not bool((sample_guidance_scales(1000, torch.Generator().manual_seed(0), 0.0) == 1.0).any())


def test_the_error_is_measured_against_two_passes() -> None:
    x, t, condition, scale = seeded(4, 1, 2, 2), torch.full((4,), 2.0), told(4), torch.tensor([1.0, 2.0, 3.5, 6.0])
    two = cfg_prediction(network, x, t, condition, scale)
    for i in range(4):
        one = slice(i, i + 1)
        assert torch.allclose(two[one], guided(network, x[one], t[one], condition[one], float(scale[i])), atol=1e-4)
    assert float(guidance_error(network, network, x, t, condition, scale).max()) < 1e-8

    def deaf(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return network(x, timestep, dataclasses.replace(condition, guidance=torch.ones_like(condition.px)))

    assert torch.allclose(guidance_error(deaf, network, x, t, condition, scale),
                          (two - network(x, t, condition)).square().mean((1, 2, 3)))

    class Plain:
        device = torch.device("cpu")
        autocast = staticmethod(torch.no_grad)

    batches = [Batch(x, x.flip(0), t, condition, scale)]
    found = relative_errors(deaf, network, NoiseSchedule(), batches, Plain)
    assert found["1.0"] == (0, 0) and found["4.5"][0] == pytest.approx(found["4.5"][1]) and found["4.5"][0] > 0.1
    assert relative_errors(network, network, NoiseSchedule(), batches, Plain)["4.5"][0] < 1e-5


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("work"))


def distill(place: Workplace, run: str, *more: object, model: Path | None = None) -> list[str]:
    command = [word for word in place.train("unet", run, *more, model=model) if word != "--train"]
    return ["--distill", "guidance", *command]


@pytest.fixture(scope="module")
def distilled(place: Workplace) -> Path:
    """A model folder whose UNet learned its own guidance: a few images, a few steps."""
    model = place.copy_model("distilled-model")
    assert conditional_ldm.main(distill(place, "distilled", *LEARNED, model=model)) == 0
    return model


def test_one_pass_comes_near_two(place: Workplace, distilled: Path) -> None:
    """On images and captions that were not learned from; without guidance it says bit for bit what it said."""
    config = json.loads((distilled / "unet" / "config.json").read_text())
    assert config["network"]["guidance_range"] == list(GUIDANCE_RANGE) and config["training"] == {}
    facts, before = config["distilled"], component_hash(place.model, "unet")
    assert facts["teacher"] == before != component_hash(distilled, "unet")
    assert facts["distill"] == "guidance" and facts["steps"] == 80 and facts["images_seen"] == 640
    for scale in ("1.5", "2.5", "4.5"):
        one, plain = facts["errors"][scale]
        assert 0 < one < 0.75 * plain, facts["errors"]
    assert facts["errors"]["1.0"][0] < 1e-5  # two passes at scale 1 round where one does not
    assert read_index(distilled)["defaults"] == read_index(place.model)["defaults"]
    lines = (place.root / "distilled" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]  # others are of validation
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    student, teacher = load_unet(distilled), load_unet(place.model)
    x, t, condition = seeded(3, 4, 16, 16), torch.tensor([10.0, 500.0, 990.0]), told(3)
    for asked in (condition, condition.nulled()):
        assert torch.equal(student(x, t, asked), teacher(x, t, asked))
    assert not torch.equal(student(x, t, condition.at_scale(1.5)), teacher(x, t, condition))


def test_a_finished_run_is_repeated_without_a_change(place: Workplace, distilled: Path) -> None:
    """Although its own student stands where its teacher was."""
    weights = (distilled / "unet" / "model.safetensors").read_bytes()
    command = distill(place, "distilled", *LEARNED, model=distilled)
    assert conditional_ldm.main(command) == 0
    assert (distilled / "unet" / "model.safetensors").read_bytes() == weights
    with pytest.raises(CheckpointMismatch, match="teacher: "):  # another UNet has come there
        other = place.copy_model("other-model")
        conditional_ldm.release(speaking(PRESETS["tiny"], seed=3), other, NoiseSchedule(),
                                json.loads((other / "unet" / "config.json").read_text())["parents"], {}, 2.0)
        conditional_ldm.main([str(other) if word == str(distilled) else word for word in command])


def test_a_stopped_and_resumed_run_is_the_undisturbed_run(place: Workplace) -> None:
    assert conditional_ldm.main(distill(place, "whole", "--steps", 4)) == 0
    torch.randn(100)
    parts = distill(place, "parts", "--steps", 4)
    assert conditional_ldm.main([*parts, "--stop-at", "2"]) == 0
    assert component_hash(place.root / "parts-model", "unet") == component_hash(place.model, "unet")
    torch.randn(7)
    assert conditional_ldm.main(parts) == 0
    assert differences(checkpoint(place.root / "whole", 4), checkpoint(place.root / "parts", 4)) == []
    released = [load_file(place.root / f"{name}-model" / "unet" / "model.safetensors") for name in ("whole", "parts")]
    assert differences(*released) == []


def test_training_goes_on_from_a_distilled_network_too(place: Workplace, distilled: Path) -> None:
    """From its own weights; what was distilled does not fit the network that comes out."""
    command = place.train("unet", "further", "--steps", 2, "--init", distilled, "--learning-rate", 1e-9)
    assert conditional_ldm.main(command) == 0
    found = load_unet(place.root / "further-model")
    assert found.guidance_range is None
    start = load_unet(place.model).state_dict()
    assert all(torch.allclose(value, start[name], atol=1e-4) for name, value in found.state_dict().items())


def test_guidance_goes_on_from_what_another_learned(place: Workplace, distilled: Path) -> None:
    """A UNet that was trained further takes over the guidance of what it was; its own weights stay."""
    command = distill(place, "again", "--steps", 1, "--init", distilled, "--learning-rate", 1e-9)
    assert conditional_ldm.main(command) == 0
    found, learned = (load_unet(folder).state_dict() for folder in (place.root / "again-model", distilled))
    assert all(torch.allclose(value, learned[name], atol=1e-6) for name, value in found.items())
    assert any(value.any() for name, value in found.items() if "guidance" in name)
    with pytest.raises(ModelFolderError, match="knows no guidance to start from; leave --init out"):
        conditional_ldm.main(distill(place, "none", "--steps", 1, "--init", place.model))


def test_one_pass_learns_to_lead_away_from_its_own_perturbed_attention(place: Workplace, distilled: Path) -> None:
    """By layers of its own for what self-attention adds; what is said without guidance stays to the bit."""
    teacher = place.copy_model("speaking-model")
    parents = json.loads((teacher / "unet" / "config.json").read_text())["parents"]
    conditional_ldm.release(speaking(PRESETS["tiny"], seed=1), teacher, NoiseSchedule(), parents, {}, 2.0)
    x, t, condition = seeded(3, 4, 16, 16), torch.tensor([500.0, 800.0, 990.0]), told(3)
    command = distill(place, "selfish", *LEARNED, "--self-guidance", 2, "--init", distilled, model=teacher)
    before = load_unet(teacher)(x, t, condition)
    assert conditional_ldm.main(command) == 0
    config = json.loads((teacher / "unet" / "config.json").read_text())
    assert config["network"]["guided_attention"] is True and config["distilled"]["self_guidance"] == 2
    found = load_unet(teacher)
    assert torch.equal(found(x, t, condition), before)
    assert any(bool(w.any()) for name, w in found.named_parameters() if "self_guidance" in name)
    one, plain = config["distilled"]["errors"]["2.5"]
    assert 0 < one < 0.85 * plain, config["distilled"]["errors"]


def test_the_command_refuses_what_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--distill", "consistency", "--init", "somewhere"], ["--distill", "speed"],
                  ["--distill", "guidance", "--train"], ["--distill", "consistency", "--self-guidance", "0.5"]):
        with pytest.raises(SystemExit):
            conditional_ldm.main(words)
    said = capsys.readouterr().err
    assert "--init belongs to --distill guidance" in said and "--self-guidance belongs to --distill guidance" in said
    assert "give one of --distill guidance, --distill consistency" in said


# ---- what generates
# ------------------------------------------------------------------------------------------------------


def draw(faces: FaceGenerator, **options: object) -> tuple[Tensor, int]:
    (picture,) = faces.generate(PROMPT, num_inference_steps=8, seed=3, **options)  # type: ignore[arg-type]
    return torch.frombuffer(bytearray(picture.latent), dtype=torch.float32), picture.assessment["evaluations"]


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_distilled_folder_draws_in_half_the_evaluations(
    place: Workplace, distilled: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    faces, plain = (FaceGenerator.load(folder, "cpu", engine=engine, cache=tmp_path)
                    for folder in (distilled, place.model))
    assert faces.guidance_range() == GUIDANCE_RANGE and plain.guidance_range() is None
    (one, asked), (two, asked_before) = draw(faces, guidance_scale=2.5), draw(plain, guidance_scale=2.5)
    assert (asked, asked_before) == (8, 16)
    unguided, _ = draw(plain, guidance_scale=1.0)
    assert float((one - two).norm()) < 0.8 * float((unguided - two).norm())
    assert [draw(faces, **options)[1] for options in (
        {"guidance_scale": 2.5, "negative_prompt": "a man"}, {"guidance_scale": 8.0}, {"guidance_scale": 1.0},
        {"guidance_scale": 0.0}, {"guidance_scale": 2.5, "attributes": {"Smiling": 1}},
    )] == [16, 16, 8, 8, 8 + 2 * 7]
    runs = [faces.start(GenerationRequest(PROMPT, 1, 8, 3, guidance_scale=2.5)),
            faces.start(GenerationRequest("a man", 2, 5, 9))]
    while any(not run.finished for run in runs):
        faces.step(runs)
    assert torch.allclose(torch.frombuffer(bytearray(faces.pictures(runs[0])[0].latent), dtype=torch.float32), one,
                          atol=1e-4)


def test_without_a_scale_the_new_layers_say_nothing() -> None:
    """The bundled weights, bit for bit: without the layers, which hears no scale, and with them at scale 1."""
    folder = bundled_model()
    if folder is None:
        pytest.skip("no bundled model")
    unet = load_unet(folder)
    before = ConditionalUNet(dataclasses.replace(unet.config, guidance_range=None)).eval()
    before.load_state_dict({name: unet.state_dict()[name] for name in before.state_dict()})
    assert "guidance_embed.weight" not in before.state_dict()
    x, t, condition = seeded(2, 16, 16, 16), torch.tensor([300.0, 900.0]), told(2, width=unet.config.text_width)
    with torch.inference_mode():
        plain, loud = before(x, t, condition), condition.at_scale(5.0)
        assert torch.equal(unet(x, t, condition), plain) and torch.equal(before(x, t, loud), plain)
        heard = not torch.equal(unet(x, t, loud), plain)
    assert heard == (unet.guidance_range is not None)
