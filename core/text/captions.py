"""How do the 40 attributes of a face become English, and how does English become attributes again?

`draw_caption` writes one of very many sentences about a face from its attributes and a seeded generator. It also says
exactly which attributes the sentence claims (`Caption.facts`); a claim never contradicts the attributes.
`analyze` reads a prompt back by the same table of words (`core/text/lexicon.py`); for every drawn caption it finds
exactly `Caption.facts`. It does not know images, tokens or networks. The attributes: https://arxiv.org/abs/1411.7766
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from core.text.caption_grammar import GLUE, Parts, phrase, repeated_by_weight, sentences, tags
from core.text.lexicon import (
    ABSENCES,
    ATTRIBUTES,
    EXCLUSIVE,
    FRAME_MODIFIERS,
    FRAME_NOUNS,
    HAIR_ON_HEAD,
    PEOPLE,
    RATES,
    SALIENCE,
    SAYINGS,
    SHARE_OF_MEN,
    Saying,
    weighted,
)
from core.text.phrase_matcher import without_article, words_of
from core.text.prompt_parser import Analysis, Claim, read
from core.text.word_status import Word

__all__ = [
    "ATTRIBUTES", "Analysis", "Caption", "Claim", "Phrase", "Word", "analyze", "draw_caption", "likely_face", "phrases",
    "surprise", "vocabulary", "vocabulary_of",
]

Fact = tuple[str, bool]


@dataclass(frozen=True)
class Caption:
    """A sentence about a face, and exactly what it claims: some of the 40 attributes, True or False."""

    text: str
    facts: Mapping[str, bool]


@dataclass(frozen=True)
class Phrase:
    """One way to say in a prompt that `attribute` is `value`: "wavy hair", "a goatee", "not smiling"."""

    text: str
    attribute: str
    value: bool


def _options(sex: str) -> dict[Fact, tuple[Saying, ...]]:
    table: dict[Fact, list[Saying]] = {}
    for saying in SAYINGS:
        if saying.slot == "noun" and saying.attribute != "Male":
            continue
        if saying.sex in ("", sex):
            table.setdefault((saying.attribute, saying.value), []).extend([saying] * saying.weight)
    return {fact: tuple(sayings) for fact, sayings in table.items() if sayings}


def _conflicts() -> dict[Fact, tuple[Fact, ...]]:
    """What must not have been said yet for a fact to be sayable, so that odd labels never give an odd sentence."""
    table: dict[Fact, tuple[Fact, ...]] = {}
    for one, other in EXCLUSIVE:
        table[one] = (*table.get(one, ()), other)
        table[other] = (*table.get(other, ()), one)
    for name in HAIR_ON_HEAD:  # nor does a bald head have "hair that is not black"
        table[name, False] = (("Bald", True),)
        table["Bald", True] += ((name, False),)
    return table


_OPTIONS = {True: _options("m"), False: _options("f"), None: _options("")}
_NOUNS = {
    male: tuple(
        saying
        for saying in SAYINGS
        if saying.slot == "noun" and saying.attribute == "Male" and saying.value is male
        for _ in range(saying.weight)
    )
    for male in (True, False)
}
_CONFLICTS = _conflicts()
_ATTRIBUTE_SET = frozenset(ATTRIBUTES)
# (attribute, the value that a look at the image shows, how often its absence is said of a man, of a woman)
_LOOKS = tuple((name, name != "No_Beard", *ABSENCES[name]) for name in ATTRIBUTES if name not in ("Male", "Young"))
_SALIENCE = {name: SALIENCE.get(name, 1.0) for name in ATTRIBUTES}
_PEOPLE = repeated_by_weight(PEOPLE)
_SHORT_COUNTS = (0, 1, 1, 2, 2, 2, 3, 3, 4, 5)


def draw_caption(
    attributes: Mapping[str, bool] | Sequence[bool],
    rng: random.Random,
    *,
    empty_share: float = 0.0,
    length: Literal["long", "short"] | None = None,
) -> Caption:
    """Write a caption for a face.

    `attributes` is either 40 values in the order of `ATTRIBUTES` or a mapping; a mapping may leave attributes out,
    which are then never mentioned. Half of the captions are long (everything visible and some of what is not there),
    half short (each fact dropped with probability 0.3, and most of those cut to a handful of facts, as people type);
    `length` asks for one kind. A share of `empty_share` is "" without facts, for classifier-free guidance. The caption
    depends on nothing but the attributes and `rng`.

    Raises ValueError for unknown names, a wrong number of values, and values other than 0 and 1.
    """
    values = _values(attributes)
    if empty_share and rng.random() < empty_share:
        return Caption("", {})
    long = rng.random() < 0.5 if length is None else length == "long"
    male = values.get("Male")
    facts: dict[str, bool] = {}
    parts = Parts()
    wanted = _wanted(values, male, rng, long)
    noun = _noun(values, male, rng, facts, long or rng.random() < 0.92)
    if "Young" in facts and rng.random() < 0.6:  # "girl" has said it; "young girl" is what some people write
        wanted = [fact for fact in wanted if fact[0] != "Young"]
    possessive = "their" if "Male" not in facts else "his" if male else "her"
    options = _OPTIONS[male]
    for fact in wanted:
        if fact[0] not in facts or fact[0] == "Young":
            _place(options[fact], values, facts, parts, possessive, rng)
    style = rng.random()
    if style < (0.35 if long else 0.12):
        text = sentences(parts, noun, facts.get("Male"), rng)
    elif style < (0.50 if long else 0.30):
        text = tags(parts, noun, rng)
    else:
        text = phrase(parts, noun, rng)
    return Caption(text, facts)


def analyze(prompt: str) -> Analysis:
    """Read English back: attributes, words the captions know, contradictions, and what will be ignored."""
    return read(prompt, vocabulary())


def vocabulary() -> dict[str, str]:
    """Every word captions can use, "known" or "rare": in fewer than one caption in 400."""
    return dict(_vocabulary())


def vocabulary_of(texts: Iterable[str]) -> dict[str, str]:
    """Every word of these captions, "known" or "rare": in fewer than one caption in 400."""
    counts: dict[str, int] = {}
    number = 0
    for text in texts:
        number += 1
        for word in set(words_of(text)):
            counts[word] = counts.get(word, 0) + 1
    return {word: "known" if counts[word] * 400 >= number else "rare" for word in sorted(counts)}


def likely_face(rng: random.Random) -> dict[str, bool]:
    """All 40 attributes of a made-up person, each as frequent as among the training images of that sex."""
    male = rng.random() < SHARE_OF_MEN
    return {**{name: rng.random() < rates[not male] for name, rates in RATES.items()}, "Male": male}


def surprise(rng: random.Random) -> str:
    """A prompt as the model read them in training: a caption of a likely face."""
    return draw_caption(likely_face(rng), rng).text


@lru_cache(maxsize=1)
def phrases() -> tuple[Phrase, ...]:
    """What a prompt can say of each attribute, the commonest words first; every text is understood as it stands."""
    found: dict[Phrase, float] = {}
    for saying in SAYINGS:
        text = saying.text
        if not saying.weight or "{" in text or saying.slot in ("frame", "nothead"):
            continue
        if (saying.attribute, saying.value) not in saying.facts:  # "dark hair" is black or brown, but says neither
            continue
        if saying.slot == "head":
            part, _, adjective = text.partition(":")
            text = f"{adjective} {part}"
        elif saying.slot in ("lack", "bare"):
            text = "no " + " ".join(without_article(text.split()))
        elif saying.slot == "not":
            text = f"not {text}"
        phrase = Phrase(text, saying.attribute, saying.value)
        weight = saying.weight / 2 if saying.sex else saying.weight  # "attractive" before "handsome"
        found[phrase] = max(found.get(phrase, 0), weight)
    return tuple(sorted(found, key=lambda phrase: -found[phrase]))


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, str]:
    rng = random.Random(0)
    number = 6000
    counts: dict[str, int] = {}
    for _ in range(number):
        for word in set(words_of(draw_caption(likely_face(rng), rng).text)):
            counts[word] = counts.get(word, 0) + 1
    texts = [saying.text.replace("{poss}", "").replace(":", " ") for saying in SAYINGS if saying.weight]
    for items in (PEOPLE, FRAME_MODIFIERS, FRAME_NOUNS):
        texts += [text for text, _ in weighted(items)]
    for word in words_of(" ".join(texts)):
        counts.setdefault(word, 0)
    for word in GLUE.split():
        counts.setdefault(word, 0)
    return {word: "known" if counts[word] * 400 >= number else "rare" for word in sorted(counts)}


def _values(attributes: Mapping[str, bool] | Sequence[bool]) -> dict[str, bool]:
    if isinstance(attributes, Mapping):
        if not _ATTRIBUTE_SET.issuperset(attributes):
            unknown = sorted(set(attributes) - _ATTRIBUTE_SET)
            raise ValueError(f"attributes has unknown names {unknown}; the names are CelebA's, see captions.ATTRIBUTES")
        values = dict(attributes)
    else:
        if len(attributes) != len(ATTRIBUTES):
            raise ValueError(
                f"attributes must hold {len(ATTRIBUTES)} values in the order of captions.ATTRIBUTES, "
                f"got {len(attributes)}"
            )
        values = dict(zip(ATTRIBUTES, attributes, strict=True))
    for name, value in values.items():
        if value is not True and value is not False:
            if value not in (0, 1):  # CelebA's own files say -1 for absent, and bool(-1) is True
                raise ValueError(f"attributes: {name} is {value!r}; give True/False or 1/0 (CelebA's -1 is 0 here)")
            values[name] = bool(value)
    return values


def _wanted(values: Mapping[str, bool], male: bool | None, rng: random.Random, long: bool) -> list[Fact]:
    """Choose what to talk about, in random order. `Male` is the noun's business."""
    draw = rng.random
    scale = 1.0 if long else 0.5
    wanted: list[Fact] = []
    for name, visible, of_man, of_woman in _LOOKS:
        value = values.get(name)
        if value is visible:
            if long or draw() < 0.7:
                wanted.append((name, visible))
        elif value is not None and draw() < scale * (of_man if male else of_woman):
            wanted.append((name, value))
    if "Young" in values and (long or draw() < 0.7):
        wanted.append(("Young", values["Young"]))
    if not long and draw() < 0.65:
        salience = _SALIENCE
        wanted.sort(key=lambda fact: -draw() * salience[fact[0]])
        del wanted[_SHORT_COUNTS[int(draw() * len(_SHORT_COUNTS))] :]
    wanted.sort(key=lambda _: draw())
    return wanted


def _noun(
    values: Mapping[str, bool], male: bool | None, rng: random.Random, facts: dict[str, bool], say_sex: bool
) -> str:
    if male is None or not say_sex:
        return _PEOPLE[int(rng.random() * len(_PEOPLE))]
    options = _NOUNS[male]
    while True:
        saying = options[int(rng.random() * len(options))]
        if all(values.get(name) is value for name, value in saying.facts):
            facts.update(saying.facts)
            return saying.text


def _place(
    options: tuple[Saying, ...],
    values: Mapping[str, bool],
    facts: dict[str, bool],
    parts: Parts,
    possessive: str,
    rng: random.Random,
) -> None:
    """Choose words for one fact and put them where they belong; say nothing if every try would be false or odd."""
    for _ in range(4):
        saying = options[int(rng.random() * len(options))]
        claims = saying.facts
        if len(claims) > 1 and not all(values.get(name) is value for name, value in claims):
            continue
        if not any(facts.get(name) is value for claim in claims for name, value in _CONFLICTS.get(claim, ())):
            break
    else:
        return
    facts.update(claims)
    slot, text = saying.slot, saying.text
    if "{" in text:
        text = text.replace("{poss}", possessive)
    if slot == "adj":
        parts.adjectives.append(text)
    elif slot == "head":
        head, _, adjective = text.partition(":")
        parts.parts.setdefault(head, []).append(adjective)
    elif slot == "thing":
        parts.has.append(text)
    elif slot == "post":
        parts.posts.append(text)
    elif slot == "not":
        parts.posts.append("not " + text)
    elif slot == "lack":
        parts.lacks.append(text)
    elif slot == "bare":
        parts.lacks_worn.append(text)
    elif slot == "frame":
        parts.frame = text
    elif slot == "nothead":
        head, _, adjective = text.partition(":")
        parts.denied_parts.setdefault(head, []).append(adjective)
    else:
        parts.worn.append(text)
        parts.clothed = parts.clothed and slot == "clothes"
