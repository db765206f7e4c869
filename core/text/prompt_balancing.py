"""What does a prompt leave open, and how can many images of it show more than the commonest face?

The training images are skewed: "a person" is mostly a young woman with brown hair. `open_facets` says which of sex,
age and hair colour a prompt does not decide; `balanced` says them for it, another combination with every number, so
that consecutive images go round all of them. What the prompt says stays as it is: words are only put before it.

It does not know how anything is drawn. The bias of such data: https://arxiv.org/abs/2303.11408
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from core.text.lexicon import ATTRIBUTES, RATES
from core.text.prompt_parser import read

MAX_PROMPT = 500  # characters of a prompt, those put before it included
TELLING = 20  # times as often among one sex as among the other: such a fact speaks for it
Fact = tuple[str, bool]


@dataclass(frozen=True)
class Choice:
    """One way to decide: the word for it, and what it claims."""

    word: str
    fact: Fact


@dataclass(frozen=True)
class Facet:
    """Something about a face that a prompt may leave open, and what it can be."""

    name: str
    choices: tuple[Choice, ...]

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(choice.fact[0] for choice in self.choices))

    def to_dict(self) -> dict[str, Any]:
        """As `core.web.responses.OpenFacet`."""
        return {"name": self.name, "attributes": list(self.attributes), "choices": [one.word for one in self.choices]}


SEX = Facet("sex", (Choice("woman", ("Male", False)), Choice("man", ("Male", True))))
AGE = Facet("age", (Choice("young", ("Young", True)), Choice("old", ("Young", False))))
HAIR = Facet("hair_colour", (
    Choice("black", ("Black_Hair", True)), Choice("blond", ("Blond_Hair", True)),
    Choice("brown", ("Brown_Hair", True)), Choice("gray", ("Gray_Hair", True)),
))


def open_facets(claimed: Mapping[str, bool], spoken: Collection[str] = ATTRIBUTES) -> tuple[Facet, ...]:
    """What the claims (attribute -> value) do not decide: some of sex, age, hair colour.

    Only what the model has words for: `spoken`. A claim that hardly ever holds of one sex decides it: nobody who asks
    for a beard wants women among the images.
    """
    found = []
    if "Male" not in claimed and not any(_tells_sex(*fact) for fact in claimed.items()):
        found.append(SEX)
    if "Young" not in claimed and not claimed.get("Gray_Hair"):
        found.append(AGE)
    if not claimed.get("Bald") and not any(claimed.get(name) for name in HAIR.attributes):
        left = tuple(choice for choice in HAIR.choices if choice.fact[0] not in claimed)
        if len(left) > 1:
            found.append(Facet(HAIR.name, left))
    return tuple(facet for facet in found if set(facet.attributes) <= set(spoken))


def balanced(prompt: str, number: int) -> str:
    """The prompt with what it leaves open decided: combination `number`, counted round and round, put before it.

    Of four consecutive numbers, each combination of sex and age is in one. Gray hair is for the old alone. Where
    nothing is open, or no words fit without being understood otherwise, the prompt comes back as it is.
    """
    claimed = read(prompt, {}).attributes
    facets = {facet.name: facet.choices for facet in open_facets(claimed)}
    chosen: dict[str, Choice] = {}
    for name, turn in (("sex", number), ("age", number // 2)):
        if name in facets:
            chosen[name] = facets[name][turn % len(facets[name])]
    if "hair_colour" in facets:
        is_old = (chosen["age"].fact if "age" in chosen else ("Young", claimed.get("Young", True))) == ("Young", False)
        colours = [choice for choice in facets["hair_colour"] if is_old or choice.fact[0] != "Gray_Hair"]
        chosen["hair_colour"] = colours[(number + number // 4) % len(colours)]
    wanted = claimed | dict(choice.fact for choice in chosen.values())
    person = " ".join(chosen[name].word for name in ("age", "sex") if name in chosen)
    words = [person, f"{chosen['hair_colour'].word} hair" if "hair_colour" in chosen else ""]
    words = [part for part in words if part]
    for start in (f"{', '.join(words)}, ", f"{', '.join(words)}. "):
        text = start + prompt.lstrip() if prompt.strip() else ", ".join(words)
        if words and len(text) <= MAX_PROMPT and read(text, {}).attributes == wanted:
            return text
    return prompt


def _tells_sex(name: str, value: bool) -> bool:
    if name not in RATES:
        return False
    of_man, of_woman = (rate if value else 1 - rate for rate in RATES[name])
    return max(of_man, of_woman) >= TELLING * min(of_man, of_woman)
