"""What does an English description say about the 40 attributes, and which of its words mean anything to the model?

A reader in four small steps: words and phrases become units (`core/phrases.py`); denials ("no", "without", "isn't",
"-free") get their scope; adjectives find the part of the face they describe ("big, pointy nose", "her hair is black and
wavy"); what is left claims something about the person. It does not know how captions are drawn: `core/captions.py`
calls `read` with the words that captions use.

The scope of a denial follows NegEx: it ends at a clause boundary or with the thing denied.
Chapman et al., 2001, https://doi.org/10.1006/jbin.2001.1029
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple

from core.lexicon import ATTRIBUTES, EXCLUSIVE, FRAME_MODIFIERS, SAYINGS, Saying
from core.phrases import (
    GRAMMAR,
    PLAIN_DENIALS,
    VERBAL_DENIALS,
    Fact,
    Sense,
    Token,
    Unit,
    find_units,
    flipped,
    index,
    tokenize,
    without_article,
    words_of,
)

Status = Literal["known", "rare", "unknown", "unread"]  # the last one says the text encoder, not `read`


@dataclass(frozen=True)
class Word:
    """A word of the prompt, where it stands, and whether captions use it; `suggestion` is the nearest word they use."""

    text: str
    start: int
    end: int
    status: Status
    suggestion: str | None = None


@dataclass(frozen=True)
class Claim:
    """Which letters of the prompt say that `attribute` is `value`; a "no" or "without" before them is not included."""

    attribute: str
    value: bool
    start: int
    end: int


@dataclass(frozen=True)
class Analysis:
    """What was understood. Of two claims about one attribute the later counts, and `contradictions` says so."""

    attributes: dict[str, bool]
    words: tuple[Word, ...]
    contradictions: tuple[str, ...]
    warnings: tuple[str, ...]
    claims: tuple[Claim, ...]


class _Claim(NamedTuple):
    fact: Fact
    quote: str
    unit: int
    start: int
    end: int


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
_HE, _SHE = frozenset("he him his himself".split()), frozenset("she her hers herself".split())
# "beautiful hair", "an old photo", "a happy smile": directly before a thing these describe the thing, not the person.
_THING_QUALITIES = frozenset(
    (
        "old older aged young youthful beautiful pretty lovely gorgeous cute attractive handsome plain thin slim "
        "slender lean pale fat cheerful happy"
    ).split()
)
# Denied together in "without glasses and a hat", where "no beard and blond hair" denies only the beard.
_REMOVABLE = frozenset(
    "Eyeglasses Goatee Mustache No_Beard Sideburns Heavy_Makeup Wearing_Earrings Wearing_Hat Wearing_Lipstick "
    "Wearing_Necklace Wearing_Necktie".split()
)
# A suit is taken to bring a tie unless the prompt says otherwise.
_PRESUMED = frozenset("suit suits tuxedo tux".split())
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


# -- denial ----------------------------------------------------------------------------------------------------------


def _removable(unit: Unit) -> bool:
    return unit.sense.kind == "thing" and bool(unit.sense.facts) and unit.sense.facts[0][0] in _REMOVABLE


def _list_ends_in_or(units: list[Unit], comma: int) -> bool:
    """Does "no hat, glasses or beard" go on after this comma?"""
    for unit in units[comma + 1 :]:
        if unit.sense.kind == "or":
            return True
        if unit.sense.kind not in ("determiner", "adverb", "adj", "thing", "head", "compound", "comma"):
            return False
    return False


def _denied(units: list[Unit]) -> list[bool]:
    """Say for each unit whether a denial covers it."""
    denied = [False] * len(units)
    active = plain_no = seen = False  # seen: the denial has met something to deny
    for at, unit in enumerate(units):
        kind = unit.sense.kind
        before = units[at - 1].sense.kind if at else "end"
        after = next((other for other in units[at + 1 :] if other.sense.kind != "determiner"), None)
        if kind in ("not", "without"):
            # "not without a beard" has one; "doesn't have no beard" has none, as people say it.
            active = not (
                active and not seen and kind == "without" and unit.sense.text in ("without", "lacking", "w/o")
            )
            plain_no, seen = unit.sense.text == "no", False
        elif not active:
            continue
        elif kind == "comma":
            active = _list_ends_in_or(units, at)
            seen = False
        elif kind == "and":
            active = not plain_no and at > 0 and _removable(units[at - 1]) and after is not None and _removable(after)
            seen = False
        elif kind == "or":
            seen = False
        elif kind in ("end", "head-of") or (
            kind in ("stop", "verb", "copula")
            and (seen or (kind == "stop" and before not in ("not", "without", "verb")))
        ):
            active = False
        else:
            denied[at] = True
            if kind in ("noun", "thing", "head"):
                # "without a hat smiling": the denial ends with the thing, unless "or" or the like goes on.
                next_kind = units[at + 1].sense.kind if at + 1 < len(units) else "end"
                active = next_kind in ("or", "and", "comma") or (
                    kind == "head" and _describes(units, at + 1, unit.sense.text)
                )
                seen = True
            elif kind in ("adj", "compound"):
                seen = True
    return denied


def _describes(units: list[Unit], at: int, part: str) -> bool:
    while at < len(units) and units[at].sense.kind == "adverb":
        at += 1
    return at < len(units) and (part, units[at].sense.text) in index().parts


# -- adjectives and their parts --------------------------------------------------------------------------------------


def _part_after(units: list[Unit], denied: list[bool], at: int) -> tuple[int | None, bool]:
    """Find the part that an adjective stands before: (its unit, whether the adjective is spent without a claim)."""
    adjective = units[at].sense.text
    crossed, strange = False, 0
    after_part = at > 0 and units[at - 1].sense.kind == "head"  # "eyes closed, mouth open"
    for other in range(at + 1, len(units)):
        sense = units[other].sense
        if sense.kind == "compound":
            if other == at + 1:  # "blue-eyed": the adjective belongs to the eyes even where that says nothing
                return (other, False) if (sense.text, adjective) in index().parts else (None, True)
        elif sense.kind in ("comma", "and", "or"):
            if strange or after_part:
                break
            crossed = True
        elif sense.kind == "unknown":
            strange += 1
            if strange > 2:
                break
        elif sense.kind == "head":
            if crossed and denied[at] != denied[other]:
                break
            if (sense.text, adjective) in index().parts:
                return other, False
            of_thing = (
                adjective in _THING_QUALITIES
                and sense.text != "face"
                and (
                    other == at + 1
                    or (sense.text == "photo" and not any(unit.sense.kind == "comma" for unit in units[at:other]))
                )
            )
            return None, of_thing
        elif sense.kind == "thing":
            return None, other == at + 1 and adjective in _THING_QUALITIES
        elif sense.kind not in ("adj", "adverb", "not"):
            break
    return None, False


def _part_before(units: list[Unit], at: int) -> int | None:
    """Find the part in "hair is long and black" or "mouth slightly open"."""
    linked = listed = False
    # "rosy cheeks pale woman": an adjective that can describe the person does not belong to the cheeks
    of_person = bool(units[at].sense.facts) and at + 1 < len(units) and units[at + 1].sense.kind == "noun"
    for other in range(at - 1, -1, -1):
        sense = units[other].sense
        if sense.kind == "head":
            fits = (sense.text, units[at].sense.text) in index().parts
            return other if fits and (linked or not (listed or of_person)) else None
        if sense.kind in ("copula", "head-of"):
            linked = True
        elif linked and sense.kind not in ("not", "copula"):
            return None
        elif sense.kind in ("and", "or", "comma"):
            listed = True
        elif sense.kind not in ("adj", "adverb", "not"):
            return None
    return None


def _claims(
    units: list[Unit], denied: list[bool], quotes: list[str], places: list[tuple[int, int]]
) -> tuple[list[_Claim], dict[int, str], bool]:
    """All claims, the units that mean something with the part they describe, and whether hair is spoken of."""
    claims: list[_Claim] = []
    useful: dict[int, str] = {}
    hair = False
    for at, unit in enumerate(units):
        sense, no = unit.sense, denied[at]
        facts: tuple[Fact, ...] = ()
        if sense.kind == "adj":
            part, of_thing = _part_after(units, denied, at)
            if part is None and not of_thing:
                part = _part_before(units, at)
            if part is not None:
                facts = index().parts[units[part].sense.text, sense.text]
                facts = flipped(facts) if no and len(facts) == 1 else () if no else facts
                useful[part] = ""
                useful[at] = units[part].sense.text
            elif not of_thing:
                facts = sense.denied if no else sense.facts
        elif sense.kind == "noun":
            # "not a young woman" denies young, not woman.
            first = next(
                (other for other in range(at - 1, -1, -1) if units[other].sense.kind in ("not", "without")), at
            )
            no = no and not any(units[other].sense.kind == "adj" and denied[other] for other in range(first, at))
            facts = sense.denied if no else sense.facts
        elif sense.kind == "thing":
            no = no or (at + 1 < len(units) and units[at + 1].sense.text == "free")
            facts = sense.denied if no else sense.facts
        elif sense.kind == "head" and sense.text == "hair":
            if (
                no
                and at
                and units[at - 1].sense.kind in ("without", "or", "comma", "determiner", "verb", "not")
                and at not in useful
            ):
                facts = (("Bald", True),)
            elif not no:
                hair = True
        if facts:
            useful.setdefault(at, "")
            denial = "" if not no else "not " if sense.kind == "adj" else "no "
            claims += [_Claim(fact, denial + quotes[at], at, *places[at]) for fact in facts]
    return claims, useful, hair


# -- leaving denials out -----------------------------------------------------------------------------------------------

_LISTING = ("comma", "and", "or")
_LOOSE = re.compile(
    r"\s*\b(?:(?:(?:that|who|which)\s+)?(?:is|are|has|have|does|do|did)|with|wearing)\s*$", re.IGNORECASE
)
_LOOSE_END = re.compile(r"(?:\s|,|\b(?:and|but|with|wearing)\b)+$", re.IGNORECASE)
_GOES_ON = re.compile(r"\s*(?:$|[,.;]|(?:and|but)\b)", re.IGNORECASE)
_LINK = re.compile(r"\s*,?\s*\b(?:and|but|or)\s+", re.IGNORECASE)
_LEADS = re.compile(r"\b(?:with|wearing|has|have|wears)\s*$", re.IGNORECASE)
_LEADS_ON = re.compile(r"(?:with|who|that|wearing)\b", re.IGNORECASE)
_NOBODY = re.compile(r"(?:^|(?<=[.!?;]))\s*(?:(?:he|she|they|it|this person)\s*)?[.!?;]", re.IGNORECASE)


def without_denials(prompt: str, attributes: Collection[str]) -> str:
    """The description without what it denies of these attributes: "no hat or tie" without hats is "no tie".

    Only denials go ("no bangs", not "clean-shaven"), and nothing goes where the rest would say anything else.
    """
    tokens = tokenize(prompt)
    units = find_units(tokens)
    denied = _denied(units)
    places = [(tokens[unit.first].start, tokens[unit.last - 1].end) for unit in units]
    claims = _claims(units, denied, [prompt[start:end] for start, end in places], places)[0]
    gone = {claim.unit for claim in claims if denied[claim.unit] and claim.fact[0] in attributes and not claim.fact[1]}
    text = prompt
    for first in reversed([at for at, unit in enumerate(units) if unit.sense.kind in ("not", "without")]):
        items = _denied_items(units, denied, first)
        kept = [item for item in items if not gone.intersection(item)]
        if len(kept) == len(items):
            continue
        start, end = places[items[0][0]][0], places[items[-1][-1]][1]
        if kept:
            rest = " or ".join(prompt[places[item[0]][0]:places[item[-1]][1]] for item in kept)
            text = text[:start] + rest + text[end:]
        else:
            text = _joined(text[:places[first][0]], text[end:])
    said = dict(read(prompt, {}).attributes)
    wanted = {name: value for name, value in said.items() if value or name not in attributes}
    tidy = " ".join(_NOBODY.sub(" ", text).split())
    texts = (re.sub(r"\s([.!?;])", r"\1", tidy).strip(" ,;"), text.strip(" ,;"))
    return next((one for one in texts if dict(read(one, {}).attributes) == wanted), prompt)


def _joined(left: str, right: str) -> str:
    """What stood before a denial and what stands after it, without the words that only led to it.

    A list that it began goes on without it: "with [no hat] and a tie" is "with a tie", "with [no hat] and smiling" is
    "smiling", "[without a hat] and with a tie" is "with a tie".
    """
    listed, leads = _LINK.match(right), _LEADS.search(left)
    if listed is not None and leads is None and _LEADS_ON.match(right, listed.end()):
        return f"{left.rstrip(' ,')} {right[listed.end():]}"
    if listed is None or leads is None:
        left = _LOOSE.sub("", left)
        return (_LOOSE_END.sub("", left) if _GOES_ON.match(right) else left) + right
    rest = right[listed.end():]
    kinds = [unit.sense.kind for unit in find_units(tokenize(rest)) if unit.sense.kind != "adverb"]
    thing = kinds[:1] and kinds[0] in ("determiner", "thing", "head", "compound") or kinds[:2] == ["adj", "head"]
    return left + rest if thing else left[:leads.start()] + rest


def _denied_items(units: list[Unit], denied: list[bool], first: int) -> list[list[int]]:
    """The units that the denial at `first` covers, by the items of its list: "no hat, red tie or beard" has three."""
    items: list[list[int]] = [[]]
    for at in range(first + 1, len(units)):
        if denied[at]:
            if items[-1] or units[at].sense.kind not in ("verb", "copula"):  # of "not wearing a hat", the hat
                items[-1].append(at)
        elif units[at].sense.kind in _LISTING:
            items.append([])
        else:
            break
    return [item for item in items if item]


# -- the answer ------------------------------------------------------------------------------------------------------


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


def read(prompt: str, vocabulary: Mapping[str, str]) -> Analysis:
    """Understand a description; `vocabulary` maps the words that captions use to "known" or "rare".

    Where the captions were a person's own, nothing is claimed of attributes for which they have no words.
    """
    spoken = spoken_attributes(vocabulary)
    labelled = len(spoken) == len(ATTRIBUTES)
    tokens = tokenize(prompt)
    units = find_units(tokens)
    denied = _denied(units)
    places = [(tokens[unit.first].start, tokens[unit.last - 1].end) for unit in units]
    quotes = [prompt[start:end] for start, end in places]
    claims, useful, hair = _claims(units, denied, quotes, places)
    for at, unit in enumerate(units):  # pronouns claim a sex even inside other phrases
        for token in tokens[unit.first : unit.last]:
            if token.text in _HE or token.text in _SHE:
                quote = prompt[token.start : token.end]
                claims.append(_Claim(("Male", token.text in _HE), quote, at, token.start, token.end))
                useful.setdefault(at, "")
    claims = [claim for claim in claims if claim.fact[0] in spoken]
    if not labelled:
        useful = {at: part for at, part in useful.items() if at in {claim.unit for claim in claims}}
    claims.sort(key=lambda claim: claim.unit)
    attributes = {claim.fact[0]: claim.fact[1] for claim in claims}
    words, warnings = _judge_words(prompt, tokens, units, useful, vocabulary)
    if not labelled:
        warnings = _without_labels(words)
        if words and all(word.status == "unknown" for word in words):
            warnings.append("The model read none of these words in training; the picture will be left to chance.")
    elif tokens and not attributes:
        warnings.append("Nothing here describes an attribute that the model learned; the face will be left to chance.")
    said = tuple(Claim(*claim.fact, claim.start, claim.end) for claim in claims)
    return Analysis(attributes, tuple(words), tuple(_contradictions(claims, hair)), tuple(warnings), said)


def _contradictions(claims: list[_Claim], hair: bool) -> list[str]:
    first: dict[Fact, _Claim] = {}
    for claim in claims:
        first.setdefault(claim.fact, claim)
    pairs: list[tuple[Fact, Fact]] = [
        ((name, value), (name, not value)) for name, value in first if value and (name, False) in first
    ]
    pairs += [pair for pair in EXCLUSIVE if pair[0] in first and pair[1] in first]
    found = []
    for one, other in pairs:
        a, b = sorted((first[one], first[other]), key=lambda claim: claim.unit)
        if one[0] == other[0] and not _PRESUMED.isdisjoint((a.quote.lower(), b.quote.lower())):
            continue
        found.append(f'"{a.quote}" contradicts "{b.quote}"')
    bald = first.get(("Bald", True))
    if bald and hair and not any(("Bald", True) in pair for pair in pairs):
        found.append(f'"{bald.quote}" contradicts the hair described')
    return list(dict.fromkeys(found))


def _judge_words(
    prompt: str, tokens: list[Token], units: list[Unit], useful: dict[int, str], vocabulary: Mapping[str, str]
) -> tuple[list[Word], list[str]]:
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


def _without_labels(words: list[Word]) -> list[str]:
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
