"""Do sliders edit direction the right way, at a known cost, without touching anybody else; is the best kept; is a crowd
varied?

On the tiny model with untrained weights the mechanism is exact. That faces really smile is asked of the bundled model.
"""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.diffusion.conditioning import Condition
from core.diffusion.guidance import EDIT_START, EDIT_STRENGTH, Guidance, GuidedBatch, edit_directions, edit_prompts
from core.engine import GenerationRequest
from core.evaluation.attribute_classifier import (
    AttributeClassifier,
    AttributeClassifierConfig,
    Features,
    Prediction,
    best,
    extract_features,
    find_attribute_classifier,
    load_attribute_classifier,
    predict,
)
from core.imaging.png_metadata import read_request
from core.text.attribute_sliders import GROUPS, moved, sliders
from core.text.captions import analyze
from core.text.lexicon import ATTRIBUTES
from generator import FaceGenerator, GeneratedImage
from tests.support.tiny_model import build_attribute_classifier

PROMPT = "a smiling woman with blond hair"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an attribute classifier beside it."""
    models = tmp_path_factory.mktemp("models")
    build_attribute_classifier(models / "judge")
    return Path(shutil.copytree(tiny_folder, models / "tiny"))


@pytest.fixture(scope="module")
def faces(folder: Path) -> FaceGenerator:
    return FaceGenerator.load(folder, "cpu", engine="torch")


def draw(faces: FaceGenerator, **options: Any) -> list[GeneratedImage]:
    return faces.generate(PROMPT, **{"num_inference_steps": 5, "seed": 3, **options})


def pngs(pictures: list[GeneratedImage]) -> list[bytes]:
    return [picture.png for picture in pictures]


def assert_same(pictures: list[GeneratedImage], others: list[GeneratedImage]) -> None:
    """The same seeds in the same order, and images within one grey level: calls of other sizes round otherwise."""
    assert [picture.seed for picture in pictures] == [other.seed for other in others]
    pairs = zip(pictures, others, strict=True)
    assert max(int(np.abs(a.pixels.astype(int) - b.pixels.astype(int)).max()) for a, b in pairs) <= 1


# ---- the table of sliders --------------------------------------------------------------------------------------------


def test_every_attribute_has_a_slider_in_one_group() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(sliders()) == sorted(ATTRIBUTES)
    assert len({slider.label for slider in sliders().values()}) == len(ATTRIBUTES)
    for name, slider in sliders().items():
        assert analyze(f"a person, {slider.more}").attributes[name] is True
        assert analyze(f"a person, {slider.less}").attributes[name] is False
        less, more = edit_prompts("a serious person in front of a wall.", name)
        assert analyze(more).attributes[name] and not analyze(less).attributes[name], "the later claim counts"


@pytest.mark.parametrize(("attributes", "message"), [
    ({"Grinning": 1}, "'Grinning' is none of CelebA's 40 names"),
    ({"smiling": 1}, "'smiling' is none"),
    ({"Smiling": 2.5}, "Smiling must be from -2 to 2; got 2.5"),
    ({"Smiling": float("nan")}, "Smiling must be from -2 to 2; got nan"),
    ({"Smiling": float("-inf")}, "Smiling must be from -2 to 2; got -inf"),
])
def test_wrong_sliders_are_refused(faces: FaceGenerator, attributes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(faces, attributes=attributes)


def test_sliders_have_one_order_and_zero_is_none() -> None:
    assert list(moved({"Young": -1, "Bald": 0.5, "Male": 0, "Smiling": -0.0}).items()) == [("Bald", 0.5), ("Young", -1)]
    assert moved(None) == moved({}) == {}


# ---- edit directions
# ----------------------------------------------------------------------------------------------------------


def some_condition(seed: int, rows: int = 1, length: int = 3) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows, length, 4, generator=generator)
    ones = torch.ones(rows, length, dtype=torch.bool)
    return Condition(tokens, ones, tokens[:, 0], torch.full((rows,), 128.0), torch.zeros(rows, dtype=torch.bool))


def network(x: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Depends on everything, row by row."""
    text = (condition.tokens * condition.mask[..., None]).sum((1, 2)) * (~condition.null).float()
    return x * timestep.view(-1, 1, 1, 1) + torch.sin(text).view(-1, 1, 1, 1)


def test_a_push_adds_the_weighed_answers() -> None:
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([3.0, 3.0])
    wanted, more, less = (some_condition(seed, 2) for seed in range(3))
    for scale in (0.0, 1.0, 3.0):
        plain = GuidedBatch([Guidance(wanted, scale)])
        pushed = GuidedBatch([Guidance(wanted, scale, edit_directions=((1.5, more), (-1.5, less)))])
        before, after = (batch.combine(network(*batch.inputs(x, t))) for batch in (plain, pushed))
        difference = 1.5 * (network(x, t, more) - network(x, t, less))
        assert torch.allclose(after, before + difference, atol=1e-6)
        assert len(pushed.pictures) == len(plain.pictures) + 4


def test_jobs_with_and_without_pushes_share_a_call_and_stay_what_they_are_alone() -> None:
    jobs = [
        Guidance(some_condition(1, 2), 3.0),
        Guidance(some_condition(2, 1, 5), 1.0, edit_directions=((2.0, some_condition(3)), (-2.0, some_condition(4)))),
        Guidance(some_condition(5), 0.0),
        Guidance(some_condition(6, 2), 4.0, some_condition(7, 2),
                 edit_directions=tuple((w, some_condition(8 + i, 2, 1 + i)) for i,
                                       w in enumerate((1.0, -1.0, 0.5, -0.5)))),
    ]
    x, t = torch.randn(6, 1, 2, 2), torch.arange(1.0, 7.0)
    together = GuidedBatch(jobs)
    found = together.combine(network(*together.inputs(x, t)))
    assert len(together.pictures) == 6 + 2 + 2 + 1 * 2 + 2 * 4
    assert [job.num_passes for job in jobs] == [[2, 2], [3], [1], [6, 6]]
    first = 0
    for job in jobs:
        rows = slice(first, first + len(job.condition))
        alone = GuidedBatch([job])
        assert torch.allclose(alone.combine(network(*alone.inputs(x[rows], t[rows]))), found[rows], atol=1e-5)
        first = rows.stop


def test_the_weights_of_all_pushes_cancel() -> None:
    def encode(texts: Any) -> Condition:
        assert len(texts) == 2
        return some_condition(len(texts[0]), 2)

    found = edit_directions(["", "a man."], {"Smiling": -0.5, "Bald": 2}, encode)
    assert [weight for weight, _ in found] == [2 * EDIT_STRENGTH, -2 * EDIT_STRENGTH, -EDIT_STRENGTH / 2,
                                               EDIT_STRENGTH / 2]
    assert edit_prompts("", "Bald") == ("not bald", "bald")
    assert edit_prompts("a man. ", "Bald") == ("a man, not bald", "a man, bald")


# ---- sliders in the generator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [{}, {"Smiling": 0}, {"Smiling": 0.0, "Male": -0.0}])
def test_zero_is_bit_for_bit_no_slider(faces: FaceGenerator, attributes: dict[str, float]) -> None:
    assert pngs(draw(faces, attributes=attributes, num_images=2)) == pngs(draw(faces, num_images=2))


def test_a_slider_changes_the_picture_and_says_so(faces: FaceGenerator) -> None:
    plain, left, right, more = (
        draw(faces, attributes={"Smiling": value})[0] for value in (0, -1, 1, 2))
    assert len({picture.latent for picture in (plain, left, right, more)}) == 4
    change = [np.abs(np.frombuffer(one.latent, "<f4") - np.frombuffer(plain.latent, "<f4")).mean()
              for one in (right, more)]
    assert 0 < change[0] < change[1]
    assert "attributes" not in read_request(plain.png)["request"]
    assert read_request(left.png)["request"]["attributes"] == {"Smiling": -1.0}


def test_the_extra_passes_are_counted(faces: FaceGenerator) -> None:
    rows: list[int] = []

    class Counting(torch.nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
            rows.append(len(x))
            answer: torch.Tensor = faces.unet(x, timestep, condition)
            return answer

    counting = FaceGenerator(faces.clip, faces.tokenizer, faces.vae, Counting(), faces.scheduler_config, faces.info)
    options = {"num_inference_steps": 10, "num_images": 2}
    first = int(EDIT_START * 10)
    for attributes, guidance, passes in (({}, 2.0, 2), ({"Bald": 1}, 2.0, 4), ({"Bald": 1, "Young": -2}, 1.0, 5)):
        rows.clear()
        pictures = draw(counting, attributes=attributes, guidance_scale=guidance, **options)
        plain = 1 if guidance == 1.0 else 2
        assert rows == [2 * plain] * first + [2 * passes] * (10 - first)
        assert [picture.assessment["evaluations"] for picture in pictures] == [sum(rows) // 2] * 2


def test_a_steered_job_and_its_neighbours_are_what_they_are_alone(faces: FaceGenerator) -> None:
    requests = [
        GenerationRequest(PROMPT, 2, 6, 3, attributes={"Smiling": 1.5, "Male": -1}),
        GenerationRequest("a man", 1, 9, 8),
        GenerationRequest("", 1, 4, 9, guidance_scale=1.0, attributes={"Eyeglasses": 2}),
        GenerationRequest("a person", 2, 5, 0, balance=True, candidates=4),
    ]
    alone = []
    for request in requests:
        run = faces.start(request)
        while not run.finished:
            faces.step([run])
        alone.append(faces.pictures(run))
    runs = [faces.start(request) for request in requests]
    while any(not run.finished for run in runs):
        faces.step(runs)
    for run, pictures in zip(runs, alone, strict=True):
        assert_same(faces.pictures(run), pictures)


def test_a_receipt_draws_the_same_again(faces: FaceGenerator) -> None:
    options = {"attributes": {"Young": -1.25}, "balance": True, "candidates": 6, "num_images": 3}
    for picture in faces.generate("a smiling person", num_inference_steps=4, seed=11, **options):
        asked = read_request(picture.png)["request"]
        assert asked["n_images"] == 1 and not {"balance", "candidates"} & set(asked)
        again = faces.generate(asked["prompt"], num_inference_steps=4, seed=asked["seed"],
                               attributes=asked["attributes"])
        assert_same(again, [picture])
        assert read_request(again[0].png) == read_request(picture.png)


# ---- the attribute classifier, and the best of many
# ---------------------------------------------------------------------------------


def test_the_judge_beside_the_model_says_what_it_sees(faces: FaceGenerator, folder: Path) -> None:
    (picture,) = draw(faces, watermark=False)
    assert draw(faces)[0].assessment == picture.assessment, "it looks before the mark is put in"
    classifier, _ = load_attribute_classifier(folder.parent / "judge")
    logits = extract_features(classifier, picture.pixels[None]).logits[0]
    shares = 1 / (1 + np.exp(-logits.astype(float)))
    assert list(picture.assessment["attributes"]) == list(ATTRIBUTES)
    assert np.allclose(list(picture.assessment["attributes"].values()), shares, atol=1e-4)
    assert set(picture.assessment["agreement"]) == {"Smiling", "Male", "Blond_Hair"} == set(analyze(PROMPT).attributes)
    assert picture.assessment["adherence"] == pytest.approx(np.mean(list(picture.assessment["agreement"].values())),
                                                            abs=1e-4)
    assert faces.generate("", num_inference_steps=2)[0].assessment["adherence"] is None


def test_agreement_weighs_rare_attributes_fairly() -> None:
    classifier = AttributeClassifier(AttributeClassifierConfig())
    classifier.log_odds.fill_(-3.0)  # everything is rare
    logits = np.full((2, 40), -3.0, np.float32)
    logits[1] = 3.0
    nothing = np.zeros((2, 0), np.float32)
    one, two = predict(classifier, Features(nothing, logits, logits > -3, logits), [{"Bald": True, "Male": False}, {}])
    assert one.agreement == {"Bald": 0.5, "Male": 0.5} and one.prompt_alignment == 0.5 and one.attributes["Bald"] < 0.05
    assert two.prompt_alignment is None and two.attributes["Bald"] > 0.95
    with pytest.raises(ValueError, match="knows 3 attributes; 40 are needed"):
        predict(classifier, Features(nothing, logits[:, :3], logits, logits), [{}, {}])


def test_of_candidates_the_best_are_kept_best_first(faces: FaceGenerator) -> None:
    everybody = [draw(faces, seed=3 + i)[0] for i in range(7)]
    kept = draw(faces, num_images=3, candidates=7)
    ranked = sorted(everybody, key=lambda picture: -picture.assessment["adherence"])[:3]
    assert_same(kept, ranked)
    assert [picture.index for picture in kept] == [0, 1, 2]
    scores = [[picture.assessment["adherence"] for picture in pictures] for pictures in (kept, ranked)]
    assert scores[0] == sorted(scores[0], reverse=True) and np.allclose(*scores, atol=1e-3)


def test_previews_show_the_first_candidates(faces: FaceGenerator) -> None:
    run = faces.start(GenerationRequest(PROMPT, 2, 3, seed=5, candidates=6))
    faces.step([run])
    assert run.num_images == 6 and [preview.seed for preview in faces.previews(run)] == [5, 6]


def test_candidates_must_be_as_many_as_images(faces: FaceGenerator) -> None:
    with pytest.raises(ValueError, match="candidates must be at least num_images = 2, got 1"):
        draw(faces, num_images=2, candidates=1)
    assert pngs(draw(faces, num_images=2, candidates=2)) == pngs(draw(faces, num_images=2))


def test_the_ranking() -> None:
    def scored(*scores: float | None) -> list[Prediction | None]:
        return [None if score is None else Prediction({}, {"Smiling": score}) for score in scores]

    assert best(scored(0.1, 0.9, 0.5, 0.9), 2) == [1, 3]
    assert best(scored(0.1, 0.9, 0.5), 3) == [0, 1, 2], "all are kept: in the order of their seeds"
    assert best(scored(None, None, None), 2) == best([Prediction({}, {})] * 3, 2) == [0, 1]
    assert best(scored(None, 0.0, None), 1) == [1]
    assert best(scored(0.9, 0.1, 0.8, 0.3), 2, places=2) == [0, 3], "one of each place"


def test_no_judge_and_a_failing_judge_stop_no_picture(
    faces: FaceGenerator, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_attribute_classifier(tmp_path) is None and caplog.text == ""
    damaged = tmp_path / "judge"
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    (damaged / "model.safetensors").write_bytes(b"junk")
    with caplog.at_level(logging.WARNING):
        assert find_attribute_classifier(tmp_path) is None
    assert "no image is classified" in caplog.text
    wanted = draw(faces, num_images=2)
    for broken in (None, torch.nn.Linear(1, 1)):
        monkeypatch.setattr(faces, "classifier", broken)
        found = draw(faces, num_images=2, candidates=4)
        assert_same(found, wanted)  # the first ones: nobody knows which are better
        assert [picture.assessment[name] for picture in found for name in ("attributes", "agreement", "adherence")] == [
            None] * 6


# ---- a balanced crowd ------------------------------------------------------------------------------------------------


def test_a_balanced_crowd_is_told_apart_by_its_prompts(faces: FaceGenerator) -> None:
    found = faces.generate("a smiling person", num_images=4, num_inference_steps=2, seed=8, balance=True)
    stated = [analyze(picture.assessment["prompt"]).attributes for picture in found]
    assert len({(one["Male"], one["Young"]) for one in stated}) == 4
    assert [read_request(picture.png)["request"]["prompt"] for picture in found] == [
        picture.assessment["prompt"] for picture in found]
    assert set(found[0].assessment["agreement"]) == set(stated[0])
    same = faces.generate("a smiling person", num_inference_steps=2, seed=10, balance=True)
    assert same[0].assessment["prompt"] == found[2].assessment["prompt"], (
        "the combination depends on the image's own seed"
    )
    assert_same(same, [found[2]])
    assert "prompt" not in draw(faces)[0].assessment


def test_the_best_of_each_combination_is_kept(faces: FaceGenerator) -> None:
    found = faces.generate("a smiling person", num_images=4, candidates=8, num_inference_steps=2, balance=True)
    stated = [analyze(picture.assessment["prompt"]).attributes for picture in found]
    assert len({(one["Male"], one["Young"]) for one in stated}) == 4
    scores = [picture.assessment["adherence"] for picture in found]
    assert scores == sorted(scores, reverse=True)


# ---- on the model that users get -------------------------------------------------------------------------------------


def test_the_bundled_faces_follow_the_sliders(bundled: FaceGenerator) -> None:
    """In the eyes of the attribute classifier, on the mean of a few seeds; a robust fact of weak and strong weights
    alike."""
    classifier = bundled.classifier
    assert classifier is not None, "models/judge is part of the repository: restore it with git checkout"
    cut = classifier.log_odds.numpy()
    for name in ("Smiling", "Male", "Blond_Hair"):
        column, curve = ATTRIBUTES.index(name), []
        for value in (-2, 0, 2):
            found = bundled.generate("a person", num_images=6, num_inference_steps=10, seed=1, attributes={name: value})
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(picture.png))) for picture in found])
            curve.append(float((extract_features(classifier, pixels).logits[:, column] - cut[column]).mean()))
        assert curve[0] < curve[1] < curve[2] and curve[2] - curve[0] > 0.3, (name, curve)
