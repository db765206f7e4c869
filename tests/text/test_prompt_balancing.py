"""Is what a prompt leaves open found, and gone round evenly, without touching what the prompt says? No torch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.text.captions import analyze, surprise
from core.text.prompt_balancing import MAX_PROMPT, balanced, open_facets


def open_names(prompt: str) -> dict[str, list[str]]:
    return {facet.name: [c.word for c in facet.choices] for facet in open_facets(analyze(prompt).attributes)}


@pytest.mark.parametrize(("prompt", "names"), [
    ("", "sex age hair_colour"),
    ("a smiling person with glasses", "sex age hair_colour"),
    ("a man", "age hair_colour"),
    ("a young woman", "hair_colour"),
    ("an old woman with blond hair", ""),
    ("a girl with brown hair", ""),
    ("a bald person", "age"),  # hardly any woman is, and there is no hair to colour
    ("a person with a beard", "age hair_colour"),
    ("a person with heavy makeup", "age hair_colour"),
    ("a person with gray hair", "sex"),
])
def test_what_is_open(prompt: str, names: str) -> None:
    assert " ".join(open_names(prompt)) == names


def test_what_is_denied_is_no_choice() -> None:
    assert open_names("a woman with dark hair") == {"age": ["young", "old"], "hair_colour": ["black", "brown"]}


def test_sixteen_numbers_go_round_everything() -> None:
    found = [analyze(balanced("a smiling person", number)).attributes for number in range(16)]
    assert all(one["Smiling"] for one in found)
    for first in range(13):
        four = found[first : first + 4]
        assert len({(one["Male"], one["Young"]) for one in four}) == 4, "each combination is in any four of a row"
    colours = Counter(name for one in found for name in one if name.endswith("_Hair"))
    assert set(colours) == {"Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"} and min(colours.values()) >= 2
    assert not any(one.get("Gray_Hair") and one["Young"] for one in found)
    assert len({balanced("", number) for number in range(16)}) >= 8


@given(st.integers(0, 2**32), st.integers(0, 2**53 - 1))
def test_the_prompt_keeps_its_word(seed: int, number: int) -> None:
    """For every caption of the training: all that it claims still stands, and nothing of it is open any more."""
    prompt = surprise(random.Random(seed))
    text = balanced(prompt, number)
    said = analyze(text).attributes
    assert analyze(prompt).attributes.items() <= said.items()
    assert open_facets(said) == () and text.endswith(prompt)
    assert (text == prompt) == (open_names(prompt) == {})


def test_a_full_prompt_is_left_alone() -> None:
    prompt = "smiling " * 62
    assert len(prompt) < MAX_PROMPT and balanced(prompt, 3) == prompt
    assert balanced("not blond, not a man, whoever", 0) == "young, black hair, not blond, not a man, whoever"
