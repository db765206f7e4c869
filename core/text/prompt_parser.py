"""What does an English description say about the 40 attributes?

A reader in four small steps: words and phrases become units (`core/text/phrase_matcher.py`); denials get their scope
(`core/text/denials.py`); adjectives find the part of the face they describe, and what is left claims something about
the person (`core/text/claims.py`); each word is looked up in the vocabulary of the model (`core/text/word_status.py`).
It does not know how captions are drawn: `core/text/captions.py` calls `read` with the words that captions use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.text.claims import UnitClaim, claims_of
from core.text.denials import denied_units
from core.text.lexicon import ATTRIBUTES, EXCLUSIVE
from core.text.phrase_matcher import Fact, find_units, tokenize
from core.text.word_status import Word, spoken_attributes, status_of_words, unknown_word_warnings

_HE, _SHE = frozenset("he him his himself".split()), frozenset("she her hers herself".split())
# A suit is taken to bring a tie unless the prompt says otherwise.
_PRESUMED = frozenset("suit suits tuxedo tux".split())


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


def read(prompt: str, vocabulary: Mapping[str, str]) -> Analysis:
    """Understand a description; `vocabulary` maps the words that captions use to "known" or "rare".

    Where the captions were a person's own, nothing is claimed of attributes for which they have no words.
    """
    spoken = spoken_attributes(vocabulary)
    labelled = len(spoken) == len(ATTRIBUTES)
    tokens = tokenize(prompt)
    units = find_units(tokens)
    denied = denied_units(units)
    places = [(tokens[unit.first].start, tokens[unit.last - 1].end) for unit in units]
    quotes = [prompt[start:end] for start, end in places]
    claims, useful, hair = claims_of(units, denied, quotes, places)
    for at, unit in enumerate(units):  # pronouns claim a sex even inside other phrases
        for token in tokens[unit.first : unit.last]:
            if token.text in _HE or token.text in _SHE:
                quote = prompt[token.start : token.end]
                claims.append(UnitClaim(("Male", token.text in _HE), quote, at, token.start, token.end))
                useful.setdefault(at, "")
    claims = [claim for claim in claims if claim.fact[0] in spoken]
    if not labelled:
        useful = {at: part for at, part in useful.items() if at in {claim.unit for claim in claims}}
    claims.sort(key=lambda claim: claim.unit)
    attributes = {claim.fact[0]: claim.fact[1] for claim in claims}
    words, warnings = status_of_words(prompt, tokens, units, useful, vocabulary)
    if not labelled:
        warnings = unknown_word_warnings(words)
        if words and all(word.status == "unknown" for word in words):
            warnings.append("The model read none of these words in training; the image will be left to chance.")
    elif tokens and not attributes:
        warnings.append("Nothing here describes an attribute that the model learned; the face will be left to chance.")
    said = tuple(Claim(*claim.fact, claim.start, claim.end) for claim in claims)
    return Analysis(attributes, tuple(words), tuple(_contradictions(claims, hair)), tuple(warnings), said)


def _contradictions(claims: list[UnitClaim], hair: bool) -> list[str]:
    first: dict[Fact, UnitClaim] = {}
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
