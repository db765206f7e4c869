"""In which words does the text encoder hear a description, so that the model follows it?

A model obeys some facts less than others: it overlooks glasses, and because it hears "bangs" in "no bangs", it may draw
them there. What it follows better is measured on people it never
saw (`python evaluate.py --fit-emphasis`) and kept as a table: denials that are best left out, and facts that are best
said again at the end. It costs nothing where a picture is drawn, and the network stays as it is. A text encoder reads
only so much of a text: words are appended where there is room, and `unread_from` says which words are not read. It
knows neither networks nor which facts those are.

Negation is what contrastive text encoders are known to miss: https://arxiv.org/abs/2501.09425.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Protocol

from core.captions import phrases
from core.lexicon import ATTRIBUTES
from core.phrases import Fact
from core.prompts import read, without_denials

FOLDER = "emphasis"
FEWEST = 16  # descriptions that state a fact, to judge by
PHRASES = 2  # that are tried for saying it again, the commonest
RARE = 0.25  # of people; what more of them have is drawn unless it is denied
LEFT_OUT, SAID_AGAIN = (0.03, 1.0), (0.075, 2.0)  # what it has to gain: share of the pictures, standard errors of that
BEHIND = 0.8  # of what is wanted; only where less is drawn does a caption repeat itself, as none in training did


@dataclass(frozen=True)
class Emphasis:
    """What to do with a description before it is encoded.

    ``left_out`` are attributes whose denials are not said; ``said_again`` has, for attributes, words that are added
    where the description says that they are there. ``read_to`` tells how many characters of a text the text encoder
    reads; it belongs to a tokenizer and not to the table.
    """

    left_out: tuple[str, ...] = ()
    said_again: Mapping[str, str] = field(default_factory=dict)
    read_to: Callable[[str], int] = field(default=len, compare=False, repr=False)

    def within(self, read_to: Callable[[str], int]) -> Emphasis:
        """The same table for a text encoder that reads no further than this."""
        return replace(self, read_to=read_to)

    def __call__(self, prompt: str) -> str:
        """The text to encode. A description with nothing of the kind stays as it is, to the letter."""
        stated = read(prompt, {}).attributes
        unsaid = [name for name in self.left_out if stated.get(name) is False]
        heard = (without_denials(prompt, unsaid) if unsaid else prompt) or prompt  # "no glasses" is a description, too
        again = [words for name, words in self.said_again.items() if stated.get(name)]
        longer = heard
        while again:
            longer = ", ".join([heard.rstrip(" .,;"), *again])
            if self.read_to(longer) >= len(longer):
                break
            again.pop()  # the encoder would not read it, or half of it
        if not again:
            return heard
        understood, wanted = read(longer, {}).attributes, read(heard, {}).attributes
        return longer if all(understood.get(name) == value for name, value in wanted.items()) else heard

    def to_json(self) -> str:
        """The same for equal tables, for hashes."""
        return json.dumps({"left_out": list(self.left_out), "said_again": dict(self.said_again)}, sort_keys=True)


# ---- what is not read

WORD = re.compile(r"[\w'’-]+")
SHOWN = 80  # characters of a description that a message repeats


def unread_from(prompt: str, encoded: str, read_to: Callable[[str], int]) -> int:
    """The character of a description from which on nothing is read; its length where all of it is.

    ``encoded`` are the words in which it is encoded (see `Emphasis`), and of those the encoder reads ``read_to``
    characters. A word that is read in part counts as unread.
    """
    cut = read_to(encoded)
    while 0 < cut < len(encoded) and WORD.fullmatch(encoded[cut - 1 : cut + 1]):
        cut -= 1
    lost = [word[0].lower() for word in WORD.finditer(encoded, cut)]
    if not lost:
        return len(prompt)
    if encoded == prompt:
        return cut
    places = [(word[0].lower(), word.start()) for word in WORD.finditer(prompt)]
    at = len(places)
    for word in reversed(lost):  # what was left out stands between the words that stayed
        at = next((i for i in range(at - 1, -1, -1) if places[i][0] == word), at)
    return places[at][1] if at < len(places) else cut


class Reader(Protocol):
    """What a loaded model says of how it reads."""

    @property
    def emphasis(self) -> Callable[[str], str]: ...
    @property
    def read_to(self) -> Callable[[str], int]: ...


def unread_in(prompt: str, reader: Reader) -> int:
    """The character of a description from which on this model does not read it."""
    return unread_from(prompt, reader.emphasis(prompt), reader.read_to)


def unread_warning(what: str, text: str, cut: int) -> list[str]:
    """What to tell about a text that is read up to character ``cut``: nothing, or one sentence."""
    lost = text[cut:].strip(" \t\r\n.,;")
    if not lost:
        return []
    lost = lost if len(lost) <= SHOWN else f"{lost[: SHOWN - 1].rstrip()}…"
    return [f'{what} is longer than the text encoder reads: "{lost}" is not read. Shorten it, or say this earlier.']


# ---- what the table is measured by


@dataclass(frozen=True)
class Trial:
    """One change of the words, for descriptions (by number) that state one fact; `words` None: it is left out."""

    fact: Fact
    words: str | None
    places: tuple[int, ...]

    @property
    def emphasis(self) -> Emphasis:
        """The change alone."""
        name = self.fact[0]
        return Emphasis((name,)) if self.words is None else Emphasis(said_again={name: self.words})


def trials(stated: Sequence[Mapping[str, bool]], prompts: Sequence[str], rates: Mapping[str, float], most: int
           ) -> list[Trial]:
    """What may be tried for descriptions that state these facts: at most so many of each, those that it changes.

    ``rates`` is how many people have each attribute: silence says only of the rare ones that they are not there.
    """
    known: dict[Fact, list[str | None]] = {}
    for name in ATTRIBUTES:
        texts = [phrase.text for phrase in phrases() if (phrase.attribute, phrase.value) == (name, True)]
        known |= {(name, False): [None] if rates[name] < RARE else [], (name, True): [*texts[:PHRASES]]}
    found = []
    for fact, changes in known.items():
        where = [i for i, facts in enumerate(stated) if facts.get(fact[0]) is fact[1]]
        for words in changes:
            emphasis = Trial(fact, words, ()).emphasis
            changed = [i for i in where if emphasis(prompts[i]) != prompts[i]][:most]
            if len(changed) >= FEWEST:
                found.append(Trial(fact, words, tuple(changed)))
    return found


@dataclass(frozen=True)
class Outcome:
    """How many of a trial's pictures show its fact: photographs (or as many as are wanted), plain, and changed."""

    trial: Trial
    wanted: float
    plain: float
    changed: float
    error: float  # standard error of changed - plain, over the same descriptions and noise

    @property
    def worth(self) -> bool:
        """Does the model fall behind there, and does this gain enough to be told from chance?"""
        leaves = self.trial.words is None
        least, errors = LEFT_OUT if leaves else SAID_AGAIN
        behind = self.plain < (1.0 if leaves else BEHIND) * self.wanted
        return behind and self.changed - self.plain >= max(least, errors * self.error)


def outcome(trial: Trial, wanted: float, plain: Sequence[bool], changed: Sequence[bool]) -> Outcome:
    """Of what was seen in the pictures of a trial, in the order of its places."""
    gains = [float(b) - float(a) for a, b in zip(plain, changed, strict=True)]
    error = pstdev(gains) / math.sqrt(len(gains))
    return Outcome(trial, wanted, fmean(map(float, plain)), fmean(map(float, changed)), error)


def chosen(outcomes: Sequence[Outcome]) -> Emphasis:
    """The changes that are worth making; of several ways to say one fact again the first, which is the commonest."""
    worth = [one for one in outcomes if one.worth]
    again = {one.trial.fact[0]: one.trial.words for one in reversed(worth) if one.trial.words is not None}
    left = {one.trial.fact[0] for one in worth if one.trial.words is None}
    return Emphasis(tuple(name for name in ATTRIBUTES if name in left),
                    {name: again[name] for name in ATTRIBUTES if name in again})


# ---- where it is kept


def save_emphasis(emphasis: Emphasis, folder: str | Path) -> None:
    """Write it into a model folder, as that of the UNet and the text encoder there."""
    from core.checkpoint import write_json

    table = {"left_out": list(emphasis.left_out), "said_again": dict(emphasis.said_again), **_parents(folder)}
    write_json(Path(folder) / FOLDER / "config.json", table)


def load_emphasis(folder: str | Path) -> Emphasis:
    """That of a model folder; one that changes nothing where there is none, or where other networks were measured."""
    path = Path(folder) / FOLDER / "config.json"
    if not path.is_file():
        return Emphasis()
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if any(table[name] != digest for name, digest in _parents(folder).items()):
        return Emphasis()
    return Emphasis(tuple(table["left_out"]), table["said_again"])


def _parents(folder: str | Path) -> dict[str, str]:
    from core.checkpoint import component_hash  # it brings torch, which a server that only speaks of a model lacks

    return {name: component_hash(folder, name) for name in ("clip", "unet")}
