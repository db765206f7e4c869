"""Is everybody told which words the text encoder does not read, and are words appended only where it reads them?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from core.diffusion.guidance import edit_prompts
from core.nn.rewriting_rules import load_prompt_rewriting
from core.text.prompt_rewriting import PromptRewriting, unread_from, unread_warning
from tests.support.asking import make_app, post, service_of
from tests.support.drawing import DrawingEngine, DrawingInfo
from tests.web.test_wrapped import PHOTO
from train_clip import Tokenizer

MODEL = Path(__file__).resolve().parents[2] / "models" / "celeba128"
LONG = "a photo of a man, " * 20
READ = 60  # characters that the stand-in's text encoder reads
FIRST = "a smiling woman with black hair in front of a grey wall, "  # so many are nearly all of them


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL / "clip" / "tokenizer.json", 80)


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def test_a_short_text_is_read_to_its_end(tokenizer: Tokenizer) -> None:
    for text in ("", "a man", "日本語", "  [END] ", "\ud800 half a pair", "x" * 70):
        assert tokenizer.encoded_length(text) == len(text)


WORDS = "a man's ÉCLAIR 日本 -- éx no glasses, 1".split()


@settings(max_examples=150, deadline=None, derandomize=True)  # half of a word may be split in another way
@given(st.text(max_size=500) | st.lists(st.sampled_from(WORDS), max_size=120).map(" ".join))
def test_what_comes_after_the_end_changes_nothing_and_what_comes_before_does(text: str) -> None:
    tokenizer = Tokenizer.load(MODEL / "clip" / "tokenizer.json", 80)
    cut, (ids,) = tokenizer.encoded_length(text), tokenizer.ids([text])
    assert 0 <= cut <= len(text) and (cut == len(text) or len(ids) == 80)
    if cut < len(text):
        assert tokenizer.ids([text[:cut] + " " + "wearing a hat"])[0][:-4] == ids[:-4]


def test_the_bundled_model_does_not_read_the_end_of_a_long_prompt(tokenizer: Tokenizer) -> None:
    prompt_rewriting = load_prompt_rewriting(MODEL).within(tokenizer.encoded_length)
    assert prompt_rewriting != PromptRewriting()
    for end in ("wearing glasses", "with a beard"):
        prompt = LONG + end
        assert tokenizer.ids([prompt]) == tokenizer.ids([LONG])  # the same pixels
        cut = unread_from(prompt, prompt_rewriting(prompt), tokenizer.encoded_length)
        assert 200 < cut < len(LONG) and prompt[cut:].endswith(end)
        (warning,) = unread_warning("The prompt", prompt, cut)
        assert "is not read" in warning
    assert unread_from("a man wearing glasses", prompt_rewriting("a man wearing glasses"),
                       tokenizer.encoded_length) == 21


# ---- the words in which a prompt is encoded --------------------------------------------------------------------------


TABLE = PromptRewriting(("Bangs",), {"Eyeglasses": "glasses", "Wearing_Hat": "a hat"})
SAID = "a man in glasses and a hat"


@pytest.mark.parametrize(("room", "encoded"), [
    (len(SAID) - 9, SAID), (len(SAID), SAID), (len(SAID) + 8, SAID), (len(SAID) + 9, f"{SAID}, glasses"),
    (len(SAID) + 15, f"{SAID}, glasses"), (len(SAID) + 16, f"{SAID}, glasses, a hat"), (500, f"{SAID}, glasses, a hat"),
])
def test_words_are_appended_only_where_they_are_read_to_the_last_letter(room: int, encoded: str) -> None:
    assert TABLE.within(lambda text: min(len(text), room))(SAID) == encoded


def test_the_table_is_the_same_whatever_reads_it() -> None:
    within = TABLE.within(lambda text: 0)
    assert within == TABLE and within.to_json() == TABLE.to_json() and "read_to" not in repr(within)


@pytest.mark.parametrize(("prompt", "room", "lost"), [
    ("a man with a beard", 18, ""), ("a man with a beard", 17, "beard"), ("a man with a beard", 12, "beard"),
    ("a man with a beard", 11, "a beard"), ("a man, . ;", 6, ""), ("", 0, ""), ("a man", 0, "a man"),
    ("a woman with no bangs, in a red hat", 30, ""),  # "a woman, in a red hat" is shorter
    ("a woman with no bangs, in a red hat", 16, "red hat"), ("a woman with no bangs, in a red hat", 3, "woman with no "
                                                             "bangs, in a red hat"),
    ("a woman in a hat with no bangs", 10, "a hat with no bangs"),
])
def test_unread_words_are_found_in_the_prompt_as_it_was_written(prompt: str, room: int, lost: str) -> None:
    def encoded_length(text: str) -> int:
        return min(len(text), room)

    cut = unread_from(prompt, TABLE.within(encoded_length)(prompt), encoded_length)
    assert prompt[cut:].strip(" ,.;") == lost
    assert [bool(lost)] == [bool(found) for found in (unread_warning("It", prompt, cut),)]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=100), st.integers(0, 100))
def test_any_text_has_an_end_that_is_read(prompt: str, room: int) -> None:
    cut = unread_from(prompt, TABLE(prompt), lambda text: min(len(text), room))
    assert 0 <= cut <= len(prompt)


def test_a_long_end_is_not_repeated_in_full() -> None:
    (warning,) = unread_warning("The prompt", LONG, 10)
    assert len(warning) < 200 and "…" in warning


# ---- what clients are told -------------------------------------------------------------------------------------------


def encoded_length(text: str) -> int:
    return min(len(text), READ)


@pytest.fixture
def client() -> FlaskClient:
    """In front of a model that reads so many characters."""
    info = DrawingInfo()
    info = replace(info, encoded_length=encoded_length, prompt_rewriting=info.prompt_rewriting.within(encoded_length))
    return make_app(DrawingEngine(info)).test_client()


def lost(what: str, words: str) -> str:
    return f'{what} is longer than the text encoder reads: "{words}" is not read.'


@pytest.mark.parametrize(("body", "told"), [
    ({"prompt": FIRST}, None),
    ({"prompt": FIRST + "wearing glasses"}, lost("The prompt", "wearing glasses")),
    ({"prompt": FIRST + "wearing glasses", "candidates": 8}, lost("The prompt", "wearing glasses")),
    ({"prompt": "a man", "negative_prompt": FIRST + "a hat"}, lost("The negative prompt", "hat")),
    ({"prompt": "a man", "interpolate_to": {"prompt": FIRST + "with bangs"}},
     lost("The prompt of interpolate_to", "with bangs")),
    ({"prompt": "smiling, with bangs, in front of a green wall, a hat", "balance": True},
     'With the words that balance puts before it, the prompt is longer than the text encoder reads: "'),
    ({"prompt": "smiling, with a hat", "balance": True}, None),
])
def test_a_job_says_what_is_not_read(client: FlaskClient, body: dict[str, Any], told: str | None) -> None:
    for steps in (1, 2):
        answer = post(client, **body, n_inf_steps=steps)
        found = [text for text in answer["warnings"] if "is not read" in text]
        assert [text.startswith(told or "?") for text in found] == [True] * (told is not None), answer["warnings"]
        kept = client.get(f"/jobs/{answer['job_id']}/?include=none").get_json()
        assert kept["warnings"] == answer["warnings"]


def test_balance_says_what_its_words_push_out(client: FlaskClient) -> None:
    prompt = "smiling, with bangs, in front of a green wall, a hat"
    (told,) = [text for text in post(client, prompt=prompt, balance=True, n_images=4)["warnings"] if "not read" in text]
    assert 'a hat" is not read' in told or '"hat" is not read' in told


def test_the_analysis_ends_where_reading_does(client: FlaskClient) -> None:
    def analyze(prompt: str) -> dict[str, Any]:
        return client.post("/prompt/analyze", json={"prompt": prompt}).get_json()

    whole, longer = analyze(FIRST), analyze(FIRST + "wearing glasses, no smile, xyzzy")
    for name in ("attributes", "claims", "contradictions", "open"):
        assert longer[name] == whole[name], name
    assert "Eyeglasses" not in longer["attributes"] and longer["attributes"]["Smiling"] is True
    assert longer["words"][: len(whole["words"])] == whole["words"]
    rest = longer["words"][len(whole["words"]) :]
    assert [word["text"] for word in rest] == ["wearing", "glasses", "no", "smile", "xyzzy"]
    assert {word["status"] for word in rest} == {"unread"} and {word["suggestion"] for word in rest} == {None}
    text = FIRST + "wearing glasses, no smile, xyzzy"
    assert all(text[word["start"] : word["end"]] == word["text"] for word in longer["words"])
    told = lost("The prompt", "wearing glasses, no smile, xyzzy") + " Shorten it, or say this earlier."
    assert longer["warnings"] == [told, *whole["warnings"]]
    assert (whole["heard"], longer["heard"]) == (FIRST, FIRST)


def test_before_the_model_is_there_nothing_is_known_of_its_end() -> None:
    from api import create_app

    client = create_app(DrawingEngine, start=False).test_client()
    answer = client.post("/prompt/analyze", json={"prompt": LONG + "a hat"}).get_json()
    assert answer["attributes"]["Wearing_Hat"] is True and answer["warnings"] == []


def test_an_inversion_says_what_is_not_read() -> None:
    info = DrawingInfo()
    info = replace(info, encoded_length=encoded_length, prompt_rewriting=info.prompt_rewriting.within(encoded_length))
    app = make_app(DrawingEngine(info))
    client, service = app.test_client(), service_of(app)
    service.queue.start(lambda: service.batch)
    try:
        body = {"image": PHOTO, "invert": True}
        assert "warnings" not in client.post("/encode", json={**body, "prompt": "a man"}).get_json()
        told = client.post("/encode", json={**body, "prompt": FIRST + "a long beard"}).get_json()["warnings"]
        assert told == [lost("The prompt", "long beard") + " Shorten it, or say this earlier."]
    finally:
        service.queue.close()
        assert service.queue.join(10)


# ---- sliders ---------------------------------------------------------------------------------------------------------


def test_a_slider_of_a_long_prompt_is_read(tokenizer: Tokenizer) -> None:
    """Its words stand at the end: without room both captions would be the same, and it would push nowhere."""
    for prompt in (LONG, "x" * 400, "日" * 80, LONG + "smiling"):
        away, towards = edit_prompts(prompt, "Eyeglasses", tokenizer.encoded_length)
        assert tokenizer.ids([away]) != tokenizer.ids([towards])
        assert all(tokenizer.encoded_length(text) == len(text) for text in (away, towards))
    assert edit_prompts("a man", "Eyeglasses", tokenizer.encoded_length) == edit_prompts("a man", "Eyeglasses")


def test_the_command_says_what_is_not_read(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import conditional_ldm

    conditional_ldm.main(["--eval", "--prompt", LONG + "a hat", "--model", str(tiny_folder), "--n-images", "1",
                          "--n-inf-steps", "1", "--device", "cpu", "--out", str(tmp_path / "grid.png")])
    assert "--prompt is longer than the text encoder reads" in capsys.readouterr().err
