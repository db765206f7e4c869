"""Which words of a description mean anything to the model, and which would mean more?

By the vocabulary of the captions that it was trained on: a word is known, rare or unknown, an unknown one may have a
near relation, and what will be ignored is said in a sentence. It does not know what the words claim: it is told which
of them were understood (`core/text/claims.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from core.text.lexicon import ATTRIBUTES, FRAME_MODIFIERS, SAYINGS, Saying
from core.text.phrase_matcher import (
    GRAMMAR,
    PLAIN_DENIALS,
    VERBAL_DENIALS,
    Sense,
    Token,
    Unit,
    index,
    without_article,
    words_of,
)

Status = Literal["known", "rare", "unknown", "unread"]  # the last one says the text encoder, not `read`

# Words that carry grammar rather than content: no suggestion and no warning when captions happen not to use them.
_SMALL_WORDS = frozenset(
    " ".join(
        [
            *(words for kind, words in GRAMMAR.items() if kind != "quality"),
            *(
                PLAIN_DENIALS,
                VERBAL_DENIALS,
                "him hers herself himself me can will would free less only even than then if",
            ),
            "into onto out up down off over under about near like",
        ]
    )
    .replace("-", " ")
    .split()
)
# Other things that people ask for, whose names are one letter away from a part of a face.
_NO_MISSPELLINGS = frozenset("bear bears beer goat goats bread cheese beads lion eagle moss heat mouse noise".split())
_NOT_LABELLED = {
    "hair length and hairstyles are not labelled": (
        "long short shoulder length ponytail bun braid braids pigtails dreadlocks afro bob mohawk updo"
    ),
    "of all colours only black, blond, brown and gray hair are labelled": (
        "red ginger auburn redhead pink purple orange strawberry"
    ),
    "the colour of the eyes is not labelled": "blue green hazel",
    "ethnicity is not labelled": (
        "asian african caucasian european indian latino latina hispanic chinese japanese korean arab american italian "
        "french russian german"
    ),
    "every picture shows a face close up; surroundings, clothes and poses are not labelled": (
        "background beach forest street office outdoors outdoor indoors city sky standing sitting walking running "
        "dancing shirt dress jacket coat uniform jeans body hands"
    ),
    "the model draws at one quality; style words do nothing": (
        "4k 8k hd realistic photorealistic detailed quality masterpiece cinematic painting drawing sketch anime "
        "cartoon resolution"
    ),
}
_REASONS = {word: reason for reason, words in _NOT_LABELLED.items() for word in words.split()}
_FRAME_WORDS = frozenset(words_of(FRAME_MODIFIERS))


@dataclass(frozen=True)
class Word:
    """A word of the prompt, where it stands, and whether captions use it; `suggestion` is the nearest word they use."""

    text: str
    start: int
    end: int
    status: Status
    suggestion: str | None = None


def spoken_attributes(vocabulary: Collection[str]) -> frozenset[str]:
    """The attributes about which something can be said in the words of this vocabulary; all where it is empty.

    A model that was trained on a person's own captions learned nothing of the others.
    """
    return _spoken(frozenset(vocabulary))


@lru_cache(maxsize=8)
def _spoken(vocabulary: frozenset[str]) -> frozenset[str]:
    if not vocabulary:
        return frozenset(ATTRIBUTES)
    return frozenset(
        name
        for saying in SAYINGS
        if saying.weight and _said(saying) and vocabulary.issuperset(_said(saying))
        for name, _ in saying.facts
    )


def can_say(text: str, vocabulary: Collection[str]) -> bool:
    """Whether a model that read captions of these words can read this text; yes where the vocabulary is empty."""
    return not vocabulary or all(word in vocabulary for word in words_of(text))


@cache
def _said(saying: Saying) -> tuple[str, ...]:
    return tuple(words_of(saying.text.replace("{poss}", "").replace(":", " ")))


def status_of_words(
    prompt: str, tokens: list[Token], units: list[Unit], useful: dict[int, str], vocabulary: Mapping[str, str]
) -> tuple[list[Word], list[str]]:
    """Each word with its status, and the sentences that say what will be ignored.

    `useful` are the units that were understood, with the part of the face that each describes.
    """
    words: list[Word] = []
    warnings: dict[str, None] = {}
    for at, unit in enumerate(units):
        for token in tokens[unit.first : unit.last]:
            if not token.word:
                continue
            text = prompt[token.start : token.end]
            found = vocabulary.get(token.text)
            status: Status = "known" if found == "known" else "rare" if found == "rare" else "unknown"
            suggestion = None
            small = token.text in _SMALL_WORDS
            if status == "unknown" and not small:
                suggestion = _nearest(unit.sense, useful.get(at, ""), token.text, tuple(vocabulary))
            words.append(Word(text, token.start, token.end, status, suggestion))
            hint = f'; the nearest word it knows is "{suggestion}"' if suggestion else ""
            if status == "unknown" and at in useful and not small:
                warnings[f'"{text}" is understood, but the model never read this word{hint}.'] = None
            elif at not in useful and token.text in _REASONS:
                warnings[f'"{text}" will be ignored: {_REASONS[token.text]}.'] = None
            elif status == "unknown" and not small and not text.isdigit():
                warnings[f'"{text}" will be ignored: the model never read this word{hint}.'] = None
            elif at not in useful and unit.sense.kind == "adj" and not small and token.text not in _FRAME_WORDS:
                warnings[
                    f'"{text}" will be ignored: it says nothing the model learned about what it describes here.'
                ] = None
    return words, list(warnings)


def unknown_word_warnings(words: list[Word]) -> list[str]:
    """The warnings where the model learned from a person's own captions: only of words that those do not have."""
    hints = {word.text: f'; the nearest word it knows is "{word.suggestion}"' if word.suggestion else ""
             for word in words if word.status == "unknown" and word.text.lower() not in _SMALL_WORDS}
    return [f'"{text}" will be ignored: the model never read this word{hint}.' for text, hint in hints.items()]


@lru_cache(maxsize=1024)
def _nearest(sense: Sense, part: str, text: str, vocabulary: tuple[str, ...]) -> str | None:
    """The commonest saying with the same claims if the word is understood, else the most similar word."""
    facts = index().parts.get((part, sense.text), sense.facts)
    if facts:
        slots = (
            ("head",)
            if part
            else {"noun": ("noun",), "adj": ("adj", "post")}.get(sense.kind, ("thing", "worn", "clothes"))
        )
        same = [
            saying
            for saying in SAYINGS
            if saying.weight
            and saying.facts == facts
            and "{" not in saying.text
            and (
                saying.text.startswith(f"{part}:")
                if part
                else saying.slot in ("noun", "adj", "post", "thing", "worn", "clothes")
            )
        ]
        same = [one for one in same if not vocabulary or set(vocabulary).issuperset(_said(one))]
        if same:
            best = min(same, key=lambda saying: (saying.slot not in slots, -saying.weight))
            return " ".join(without_article(best.text.rpartition(":")[2].split()))
    if not 2 < len(text) < 30 or text in _NO_MISSPELLINGS:
        return None
    # Who misspells a word gets its first letter right: "chair" does not mean hair, nor "dog" do.
    alike = [word for word in vocabulary if word[0] == text[0] and len(word) > 2 and word not in _SMALL_WORDS]
    return next(iter(difflib.get_close_matches(text, alike, 1, 0.78)), None)
