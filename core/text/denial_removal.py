"""How is a description said without what it denies?

"A man, no hat" is "A man" where the model does not follow that denial (`core/text/prompt_rewriting.py` knows which).
Nothing goes where the rest would say anything else: every result is read again. It does not know which denials a model
follows.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from core.text.claims import claims_of
from core.text.denials import denied_items, denied_units
from core.text.phrase_matcher import find_units, tokenize
from core.text.prompt_parser import read

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
    denied = denied_units(units)
    places = [(tokens[unit.first].start, tokens[unit.last - 1].end) for unit in units]
    claims = claims_of(units, denied, [prompt[start:end] for start, end in places], places)[0]
    gone = {claim.unit for claim in claims if denied[claim.unit] and claim.fact[0] in attributes and not claim.fact[1]}
    text = prompt
    for first in reversed([at for at, unit in enumerate(units) if unit.sense.kind in ("not", "without")]):
        items = denied_items(units, denied, first)
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
