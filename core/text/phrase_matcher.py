"""Which words and phrases of a description does the table of sayings know?

The table of `core/text/lexicon.py` turned round: a phrase -> what it claims, a part of the face and an adjective ->
what they claim together. `find_units` cuts a text into the longest phrases known. What they mean side by side, and
under a "no", is the business of `core/text/denials.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from core.text.lexicon import DENIED, FRAME_MODIFIERS, HEADS, PEOPLE, SAYINGS, Saying, weighted

Fact = tuple[str, bool]

# Grammar words by what they do to the reading. A hyphen joins the words of a phrase.
_DETERMINERS = "a an the his her their my your some any its one this these those both"
GRAMMAR: dict[str, str] = {
    "determiner": _DETERMINERS,
    "adverb": (
        "very slightly really quite so too rather heavily fully wide widely partly lightly extremely somewhat "
        "naturally completely totally looking bit still also always just more most kind-of deeply highly all "
        "colored coloured"
    ),
    "copula": "is are was were be being been looks look appears seems that which",
    "verb": "has have having had wears wear wearing shows showing do does did sporting sports displaying",
    "and": "and & + plus",
    "or": "or nor",
    "stop": (
        "but who whose whom while though although yet however because where when as with in on at from by for of to he "
        "she they it there here we i you"
    ),
    "quality": (  # adjectives that say nothing, but stand between others and their noun: "black silky hair"
        "long short medium thick dense shoulder-length silky shiny soft messy neat red ginger auburn pink blue green "
        "purple strawberry dirty platinum light hazel bright strong"
    ),
}
PLAIN_DENIALS = (
    "no without w/o lacks lack lacking minus none absent neither zero instead-of rather-than free-of free-from"
)
VERBAL_DENIALS = (
    "not never non isn't aren't wasn't weren't doesn't don't didn't hasn't haven't hadn't can't cannot won't ain't "
    "isnt arent doesnt dont hasnt no-longer hardly"
)
_AGE = re.compile(r"(?:age|aged) (\d+)|(\d+) (?:years?|yrs?|yo)\b(?: old\b)?")
_TOKEN = re.compile(r"w/o\b|[^\W_]+(?:'[^\W_]+)*|[^\s\w]|_")


class Sense(NamedTuple):
    """What a word or phrase does in a sentence, and what it claims about a face."""

    kind: str  # noun, adj, thing, head, or a kind of grammar word
    text: str
    facts: tuple[Fact, ...] = ()
    denied: tuple[Fact, ...] = ()  # what it claims after "no" or "not"


class Token(NamedTuple):
    """A word or a punctuation mark, and where it stands in the prompt."""

    text: str  # as looked up: lower case, without 's
    start: int
    end: int
    word: bool


class Unit(NamedTuple):
    """Tokens that are understood together."""

    sense: Sense
    first: int  # token numbers, last excluded
    last: int


def tokenize(prompt: str) -> list[Token]:
    """Words (hyphens separate them) and punctuation; a hyphen inside a word is dropped."""
    folded = "".join(low if len(low := char.lower()) == 1 else char for char in prompt)  # keeps every position
    folded = folded.replace("\u2019", "'").replace("\u2018", "'")
    tokens = []
    for match in _TOKEN.finditer(folded):
        text, (start, end) = match.group(), match.span()
        word = text[0].isalnum()
        if text == "-" and 0 < start and end < len(folded) and folded[start - 1].isalnum() and folded[end].isalnum():
            continue
        if text.endswith("'s") and len(text) > 2:
            text = text[:-2]
        tokens.append(Token(text, start, end, word))
    return tokens


def words_of(text: str) -> list[str]:
    """The words of a text as they are looked up."""
    return [token.text for token in tokenize(text) if token.word]


def flipped(facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    """Denying a phrase denies its chief claim; the rest is left open."""
    return ((facts[0][0], not facts[0][1]),)


class Index(NamedTuple):
    """The table of sayings by their words."""

    phrases: dict[tuple[str, ...], Sense]
    parts: dict[tuple[str, str], tuple[Fact, ...]]  # (part, adjective) -> claims
    compounds: dict[str, str]  # "haired" -> "hair"
    longest: int


def without_article(tokens: list[str]) -> list[str]:
    """Drop a leading "a" or "an"."""
    return tokens[1:] if len(tokens) > 1 and tokens[0] in ("a", "an") else tokens


@lru_cache(maxsize=1)
def index() -> Index:
    """Turn the table of sayings round: phrase -> what it claims."""
    phrases: dict[tuple[str, ...], Sense] = {}
    parts: dict[tuple[str, str], tuple[Fact, ...]] = {}

    def add(kind: str, tokens: Iterable[str], facts: tuple[Fact, ...] = ()) -> None:
        key = tuple(tokens)
        text = " ".join(key)
        phrases.setdefault(key, Sense(kind, text, facts, DENIED.get(text, flipped(facts) if facts else ())))

    for name, head in HEADS.items():
        for alias, _ in weighted(head.names):
            phrases[tuple(words_of(alias))] = Sense("head", name)
    for name in ("hair", "eye", "skin"):
        for suffix in ("color", "colour", "style"):
            phrases[name, suffix] = Sense("head", "eyes" if name == "eye" else name)
    phrases["eyebrow",] = phrases["brow",] = Sense("head", "eyebrows")
    phrases["lip",], phrases["cheek",], phrases["eye",] = (Sense("head", part) for part in ("lips", "cheeks", "eyes"))
    phrases["photos",] = phrases["selfie",] = phrases["mugshot",] = phrases["photography",] = Sense("head", "photo")
    compounds = {head.compound: name for name, head in HEADS.items()}
    for saying in SAYINGS:  # parts first: they decide which phrases need no entry of their own
        if saying.slot in ("head", "nothead"):
            name, _, adjective = saying.text.partition(":")
            facts = saying.facts if saying.slot == "head" else flipped(saying.facts)
            parts.setdefault((name, " ".join(words_of(adjective))), facts)
        elif saying.slot == "frame":
            parts.setdefault(("photo", " ".join(words_of(saying.text))), saying.facts)
    for saying in SAYINGS:
        _add_saying(saying, add, phrases, parts)
    for _, adjective in parts:
        add("adj", adjective.split())
    for kind, words in GRAMMAR.items():
        for word in words.split():
            add("adj" if kind == "quality" else kind, word.split("-"))
    for word, _ in weighted(FRAME_MODIFIERS):
        add("adj", words_of(word))
    for word in words_of(PEOPLE):
        if word.isalpha():
            add("noun", [word])
    for word in PLAIN_DENIALS.split():
        add("without", word.split("-"))
    for word in VERBAL_DENIALS.split():
        add("not", word.split("-"))
    add("adverb", ("not", "only"))
    return Index(phrases, parts, compounds, max(map(len, phrases)))


def _add_saying(
    saying: Saying,
    add: Callable[[str, list[str], tuple[Fact, ...]], None],
    phrases: Mapping[tuple[str, ...], Sense],
    parts: Mapping[tuple[str, str], tuple[Fact, ...]],
) -> None:
    if saying.slot in ("head", "nothead", "frame") or (saying.slot in ("lack", "bare") and saying.text == "hair"):
        return
    facts = saying.facts if saying.slot not in ("lack", "bare", "not") else flipped(saying.facts)
    kind = {"noun": "noun", "adj": "adj", "post": "adj", "not": "adj"}.get(saying.slot, "thing")
    if kind == "adj" and len(words_of(saying.text)) > 1 and "{" in saying.text:
        return  # "in her twenties" is understood by "twenties"
    for possessive in ("her", "his", "their", "the", "") if "{" in saying.text else ("",):
        tokens = without_article(words_of(saying.text.replace("{poss}", possessive)))
        if kind == "thing" and _is_part_phrase(
            [token for token in tokens if token not in _DETERMINERS.split()], phrases, parts
        ):
            return  # "slightly open mouth" is understood by its words
        add(kind, tokens, facts)


def _is_part_phrase(
    tokens: list[str], phrases: Mapping[tuple[str, ...], Sense], parts: Mapping[tuple[str, str], tuple[Fact, ...]]
) -> bool:
    adverbs = GRAMMAR["adverb"].split()
    heads = [phrases[token,].text for token in tokens if (token,) in phrases and phrases[token,].kind == "head"]
    return len(heads) == 1 and all(
        (heads[0], token) in parts or token in adverbs or phrases.get((token,)) == Sense("head", heads[0])
        for token in tokens
    )


def find_units(tokens: list[Token]) -> list[Unit]:
    """Cut a text into the longest phrases known; what is not known becomes a unit of its own."""
    known = index()
    units: list[Unit] = []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        may_be_age = token.text in ("age", "aged") or token.text.isdigit()
        age = _AGE.match(" ".join(part.text for part in tokens[at : at + 4])) if may_be_age else None
        if age:
            length = len(age.group().split())
            units.append(Unit(_age(int((age.group(1) or age.group(2))[:4]), age.group()), at, at + length))
            at += length
            continue
        for length in range(min(known.longest, len(tokens) - at), 0, -1):
            sense = known.phrases.get(tuple(part.text for part in tokens[at : at + length]))
            if sense is not None:
                break
        else:
            length = 1
            sense = Sense(
                "comma"
                if token.text == ","
                else "head-of"
                if token.text == ":"
                else "unknown"
                if token.word
                else "end",
                token.text,
            )
            name = known.compounds.get(token.text)
            if name is not None:
                sense = Sense("compound", name)
        units.append(Unit(sense, at, at + length))
        at += length
    return units


def _age(years: int, text: str) -> Sense:
    """CelebA's Young has no number; nobody under 40 is read as old, nobody over 45 as young."""
    facts: tuple[Fact, ...] = (("Young", True),) if years < 40 else (("Young", False),) if years > 45 else ()
    return Sense("adj", text, facts, flipped(facts) if facts else ())
