"""What do the words of a description claim of a face?

Adjectives find the part of the face that they describe ("big, pointy nose", "her hair is black and wavy"); what is left
claims something about the person. It does not know where a denial ends (`core/text/denials.py`), nor whether the model
ever read a word (`core/text/word_status.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from core.text.phrase_matcher import Fact, Unit, flipped, index

# "beautiful hair", "an old photo", "a happy smile": directly before a thing these describe the thing, not the person.
_THING_QUALITIES = frozenset(
    (
        "old older aged young youthful beautiful pretty lovely gorgeous cute attractive handsome plain thin slim "
        "slender lean pale fat cheerful happy"
    ).split()
)


class UnitClaim(NamedTuple):
    """A fact that a unit claims: in which words, and where they stand (in code points)."""

    fact: Fact
    quote: str
    unit: int
    start: int
    end: int


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


def claims_of(
    units: list[Unit], denied: list[bool], quotes: list[str], places: list[tuple[int, int]]
) -> tuple[list[UnitClaim], dict[int, str], bool]:
    """All claims, the units that mean something with the part they describe, and whether hair is spoken of."""
    claims: list[UnitClaim] = []
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
            claims += [UnitClaim(fact, denial + quotes[at], at, *places[at]) for fact in facts]
    return claims, useful, hair
