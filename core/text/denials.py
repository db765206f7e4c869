"""What does a denial ("no", "without", "isn't", "-free") cover?

The scope of a denial follows NegEx: it ends at a clause boundary or with the thing denied.
Chapman et al., 2001, https://doi.org/10.1006/jbin.2001.1029

It does not know what the denied words claim: `core/text/prompt_parser.py` does.
"""

from __future__ import annotations

from core.text.phrase_matcher import Unit, index

# Denied together in "without glasses and a hat", where "no beard and blond hair" denies only the beard.
_REMOVABLE = frozenset(
    "Eyeglasses Goatee Mustache No_Beard Sideburns Heavy_Makeup Wearing_Earrings Wearing_Hat Wearing_Lipstick "
    "Wearing_Necklace Wearing_Necktie".split()
)
_LISTING = ("comma", "and", "or")


def denied_units(units: list[Unit]) -> list[bool]:
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


def denied_items(units: list[Unit], denied: list[bool], first: int) -> list[list[int]]:
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


def _describes(units: list[Unit], at: int, part: str) -> bool:
    while at < len(units) and units[at].sense.kind == "adverb":
        at += 1
    return at < len(units) and (part, units[at].sense.text) in index().parts
