"""Is a description heard in the words that the model follows, and only where those were measured?"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import conditional_ldm
import evaluate
from core.evaluation.generation import Sampling, generate_latents
from core.evaluation.prompt_rewrite_search import Outcome, Trial, chosen, outcome, trials
from core.nn.checkpoint import load_component, save_component
from core.nn.rewriting_rules import load_prompt_rewriting, save_prompt_rewriting
from core.text.captions import surprise
from core.text.denial_removal import without_denials
from core.text.lexicon import ATTRIBUTES
from core.text.prompt_parser import read
from core.text.prompt_rewriting import PromptRewriting
from generator import FaceGenerator
from tests.support.training import Workplace, make_workplace

TABLE = PromptRewriting(("Bangs", "Eyeglasses"), {"Eyeglasses": "glasses", "Bangs": "bangs"})


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a table."""
    copy = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("emphasis") / "tiny"))
    save_prompt_rewriting(TABLE, copy)
    return copy


@pytest.fixture(scope="module")
def hearing(folder: Path) -> FaceGenerator:
    return FaceGenerator.load(folder, device="cpu", engine="torch")


def facts(prompt: str) -> dict[str, bool]:
    return dict(read(prompt, {}).attributes)


# ---- leaving denials out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "names", "left"), [
    ("a woman without glasses", ["Eyeglasses"], "a woman"),
    ("a man, no hat or tie", ["Wearing_Hat"], "a man, no tie"),
    ("a man with no hat smiling", ["Wearing_Hat"], "a man smiling"),
    ("no beard, hat or glasses", ["Eyeglasses"], "no beard or hat"),
    ("no beard, hat or glasses", ["Eyeglasses", "Wearing_Hat"], "no beard"),
    ("a man, not wearing a hat, a tie or glasses", ["Wearing_Hat"], "a man, not wearing a tie or glasses"),
    ("a woman, not wearing glasses, smiling", ["Eyeglasses"], "a woman, smiling"),
    ("straight hair that is not brown, a woman", ["Brown_Hair"], "straight hair, a woman"),
    ("She isn't wearing a hat. She has no bangs. She smiles.", ["Bangs"], "She isn't wearing a hat. She smiles."),
    ("She has no bangs. A hat.", ["Bangs"], "She. A hat."),  # no other word says that it is a woman
    ("A woman. No glasses.", ["Eyeglasses"], "A woman."),
    ("No hat. No glasses. A man", ["Eyeglasses", "Wearing_Hat"], "A man"),
    ("a woman with no glasses and blond hair", ["Eyeglasses"], "a woman with blond hair"),
    ("a man with no hat, no tie and a beard", ["Wearing_Hat", "Wearing_Necktie"], "a man with a beard"),
    ("a man without a hat and with brown hair", ["Wearing_Hat"], "a man with brown hair"),
    ("a man with no glasses and smiling", ["Eyeglasses"], "a man smiling"),
    ("a woman who has no bangs and wears lipstick", ["Bangs"], "a woman who wears lipstick"),
    ("She is wearing makeup and does not wear glasses. A smile.", ["Eyeglasses"], "She is wearing makeup. A smile."),
    ("no glasses", ["Eyeglasses"], ""),
    ("a bareheaded, clean-shaven man", ["Wearing_Hat", "Goatee"], "a bareheaded, clean-shaven man"),  # no denials
    ("a woman with glasses and bangs", ["Eyeglasses", "Bangs"], "a woman with glasses and bangs"),  # nor these
    ("no black hair, just bangs", ["Wearing_Hat"], "no black hair, just bangs"),
    ("", ["Eyeglasses"], ""),
])  # fmt: skip
def test_denials_are_left_out(prompt: str, names: list[str], left: str) -> None:
    assert without_denials(prompt, names) == left


def test_what_a_caption_says_besides_stays() -> None:
    """Of captions as they were trained on nearly all denials can go, and never anything else."""
    rng, tried, gone = random.Random(3), 0, 0
    for _ in range(400):
        caption = surprise(rng)
        stated = facts(caption)
        for name in (name for name, value in stated.items() if not value):
            shorter = without_denials(caption, [name])
            now = facts(shorter)
            tried, gone = tried + 1, gone + (shorter != caption)
            assert now == stated if shorter == caption else now == {k: v for k, v in stated.items() if k != name}
            assert shorter == without_denials(shorter, [name])
    assert tried > 500 and gone > tried / 3  # the others say it in words of their own: "clean-shaven", "dark hair"


WORDS = "no not without hat or , and glasses bangs a woman is wearing black hair beard . isn't smiling doesn't have she"
SENTENCES = st.lists(st.sampled_from(WORDS.split()), max_size=14).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | SENTENCES, st.sets(st.sampled_from(ATTRIBUTES), max_size=6))
def test_any_text_can_be_heard(prompt: str, names: set[str]) -> None:
    encoded_prompt = PromptRewriting(tuple(names), {name: "a hat" for name in names if name == "Wearing_Hat"})(prompt)
    stated, now = facts(prompt), facts(encoded_prompt)
    assert bool(encoded_prompt.strip()) == bool(prompt.strip())  # never the empty prompt, which generates anybody
    assert all(now[name] == value for name, value in stated.items() if name in now)
    assert all(name in now for name, value in stated.items() if value or name not in names)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_description_is_heard_in_other_words() -> None:
    assert TABLE("a woman with glasses, no bangs.") == "a woman with glasses, glasses"
    assert TABLE("A man with a fringe") == "A man with a fringe, bangs"
    for same in ("", "a man", "  two  spaces, no beard ", "no bangs", "gafas, por favor"):
        assert TABLE(same) == same and PromptRewriting()(same) == same
    # never against what was said
    assert PromptRewriting(appended_phrases={"Smiling": "not smiling"})("smiling") == "smiling"


def test_it_survives_being_written(folder: Path, tiny_folder: Path) -> None:
    assert load_prompt_rewriting(folder) == TABLE and load_prompt_rewriting(tiny_folder) == PromptRewriting()
    assert TABLE.to_json() == PromptRewriting(TABLE.dropped_negations,
                                              dict(reversed(TABLE.appended_phrases.items()))).to_json()


@pytest.mark.parametrize("component", ["unet", "clip"])
def test_it_belongs_to_one_model(folder: Path, tmp_path: Path, component: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "other"))
    config, state = load_component(copy, component)
    name = next(name for name, value in state.items() if value.is_floating_point())
    save_component(copy, component, state | {name: state[name] * 1.5}, config)
    assert load_prompt_rewriting(copy) == PromptRewriting()


# ---- where images are generated
# ----------------------------------------------------------------------------------------


def test_the_heard_words_are_drawn(hearing: FaceGenerator, faces: FaceGenerator) -> None:
    assert hearing.info.model_hash != faces.info.model_hash

    def pixels(drawer: FaceGenerator, prompt: str, **request: object) -> np.ndarray:
        return drawer.generate(prompt, num_inference_steps=3, seed=4, **request)[0].pixels  # type: ignore[arg-type]

    said, encoded_prompt = "a woman with glasses and without bangs", "a woman with glasses, glasses"
    assert hearing.info.prompt_rewriting(said) == encoded_prompt
    assert np.array_equal(pixels(hearing, said), pixels(faces, encoded_prompt))
    assert not np.array_equal(pixels(hearing, said), pixels(faces, said))
    assert np.array_equal(pixels(hearing, "a man"), pixels(faces, "a man"))
    away = {"negative_prompt": "glasses", "guidance_scale": 2.0}  # a negative prompt is encoded as it is
    assert np.array_equal(pixels(hearing, "a man", **away), pixels(faces, "a man", **away))
    photograph = pixels(faces, "a man")
    ways = [drawer.inversion(photograph, prompt, steps=2) for drawer, prompt in ((hearing, said),
                                                                                 (faces, encoded_prompt))]
    for way in ways:
        while not way.finished:
            way.advance()
    assert np.array_equal(ways[0].latent, ways[1].latent)


def test_a_grid_and_the_report_hear_the_same(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    said, encoded_prompt = "a woman with glasses and without bangs", "a woman with glasses, glasses"

    def grid(model: Path, prompt: str) -> bytes:
        out = tmp_path / "grid.png"
        assert conditional_ldm.main(["--eval", "--prompt", prompt, "--model", str(model), "--n-images", "1",
                                     "--n-inf-steps", "2", "--device", "cpu", "--out", str(out)]) == 0
        return out.read_bytes()

    assert grid(folder, said) == grid(tiny_folder, encoded_prompt) != grid(tiny_folder, said)
    sampling = Sampling(2, 2.0, seed=1)
    drawn = [generate_latents(FaceGenerator.load(model, "cpu"), sampling.requests([prompt]))
             for model, prompt in ((folder, said), (tiny_folder, encoded_prompt), (tiny_folder, said))]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


# ---- how the table is measured ---------------------------------------------------------------------------------------


def test_what_may_be_tried() -> None:
    prompts = ["a woman with a hat", "a man without a hat", "a hatless man"] * 20
    stated, rates = [facts(p) for p in prompts], dict.fromkeys(ATTRIBUTES, 0.1)
    found = {(trial.fact, trial.words): trial.places for trial in trials(stated, prompts, rates, 17)}
    assert found[("Wearing_Hat", False), None] == tuple(range(1, 50, 3))  # "hatless" cannot be left out
    assert found[("Wearing_Hat", True), "a hat"] == tuple(range(0, 50, 3))
    assert (("Smiling", True), "smiling") not in found
    assert trials(stated[:20], prompts[:20], rates, 17) == []  # too few to judge by
    common = {trial.fact for trial in trials(stated, prompts, rates | {"Wearing_Hat": 0.4}, 17)}
    assert ("Wearing_Hat", True) in common and ("Wearing_Hat", False) not in common  # silence would not deny it


def test_what_is_worth_it() -> None:
    def of(words: str | None, wanted: float, plain: int, changed: int, name: str = "Bangs") -> Outcome:
        """Of 100 images."""
        trial = Trial((name, words is not None), words, tuple(range(100)))
        return outcome(trial, wanted, [i < plain for i in range(100)], [i < changed for i in range(100)])

    assert of("bangs", 0.9, 50, 70).error == pytest.approx(0.04)
    assert of(None, 0.9, 50, 60).worth and not of(None, 0.9, 50, 52).worth  # too little
    assert not of(None, 0.4, 50, 60).worth  # as good as it gets already
    assert of("bangs", 0.9, 50, 70).worth and not of("bangs", 0.9, 50, 57).worth
    assert not of("bangs", 0.9, 75, 90).worth and of(None, 0.9, 75, 90).worth  # near enough to make no caption longer
    table = chosen([of("a little", 0.9, 50, 52), of("bangs", 0.9, 50, 70), of("a fringe", 0.9, 50, 80),
                    of(None, 0.9, 50, 70), of("smiling", 0.9, 60, 50, "Smiling"), of(None, 0.9, 20, 50, "Bald")])
    assert table == PromptRewriting(("Bald", "Bangs"), {"Bangs": "bangs"})


def test_the_command_measures_and_releases_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.evaluation.prompt_rewrite_search.FEWEST", 4)
    place: Workplace = make_workplace(tmp_path / "work", count=40)
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    words = ["fit-prompt-rewriting", "--data", str(place.store), "--model", str(folder), "--samples", "4",
             "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert evaluate.main(words) == 0
    report = json.loads((tmp_path / "out" / "emphasis.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["steps"] == 1 and len(report["tried"]) > 3
    assert all(one["n"] == 4 and 0 <= one["plain"] < one["wanted"] for one in report["tried"])
    kept = [one for one in report["tried"] if one["kept"]]
    assert load_prompt_rewriting(folder) == PromptRewriting(tuple(report["left_out"]), report["said_again"])
    assert {one["fact"] for one in kept} == {*(f"not {name}" for name in report["left_out"]), *report["said_again"]}
