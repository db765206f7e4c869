"""How is a description rewritten before it is encoded, so that the model follows it?

A model obeys some facts less than others: it overlooks glasses, and because "no bangs" contains "bangs", it may
generate them. What it follows better is measured on people it never saw (`python evaluate.py fit-prompt-rewriting`) and
kept as a table: negations that are best dropped, and phrases that are best appended. It costs nothing
where an image is drawn, and the network stays as it is. A text encoder reads only so much of a text: words are
appended where there is room, and `unread_from` says which words are not read. It knows neither networks nor which facts
those are.

Negation is what contrastive text encoders are known to miss: https://arxiv.org/abs/2501.09425.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from core.text.denial_removal import without_denials
from core.text.prompt_parser import read


@dataclass(frozen=True)
class PromptRewriting:
    """What to do with a description before it is encoded.

    ``dropped_negations`` are attributes whose denials are not said; ``appended_phrases`` has, for attributes, words
    that are added where the description says that they are there. ``encoded_length`` tells how many characters of a
    text the text encoder reads; it belongs to a tokenizer and not to the table.
    """

    dropped_negations: tuple[str, ...] = ()
    appended_phrases: Mapping[str, str] = field(default_factory=dict)
    encoded_length: Callable[[str], int] = field(default=len, compare=False, repr=False)

    def within(self, encoded_length: Callable[[str], int]) -> PromptRewriting:
        """The same table for a text encoder that reads no further than this."""
        return replace(self, encoded_length=encoded_length)

    def __call__(self, prompt: str) -> str:
        """The text to encode. A description with nothing of the kind stays as it is, to the letter."""
        stated = read(prompt, {}).attributes
        unsaid = [name for name in self.dropped_negations if stated.get(name) is False]
        # "no glasses" is a description, too
        encoded_prompt = (without_denials(prompt, unsaid) if unsaid else prompt) or prompt
        again = [words for name, words in self.appended_phrases.items() if stated.get(name)]
        longer = encoded_prompt
        while again:
            longer = ", ".join([encoded_prompt.rstrip(" .,;"), *again])
            if self.encoded_length(longer) >= len(longer):
                break
            again.pop()  # the encoder would not read it, or half of it
        if not again:
            return encoded_prompt
        understood, wanted = read(longer, {}).attributes, read(encoded_prompt, {}).attributes
        return longer if all(understood.get(name) == value for name, value in wanted.items()) else encoded_prompt

    def to_json(self) -> str:
        """The same for equal tables, for hashes."""
        return json.dumps({"left_out": list(self.dropped_negations), "said_again": dict(self.appended_phrases)},
                          sort_keys=True)


WORD = re.compile(r"[\w'’-]+")
SHOWN = 80  # characters of a description that a message repeats


def unread_from(prompt: str, encoded: str, encoded_length: Callable[[str], int]) -> int:
    """The character of a description from which on nothing is read; its length where all of it is.

    ``encoded`` are the words in which it is encoded (see `PromptRewriting`), and of those the encoder reads
    ``encoded_length`` characters. A word that is read in part counts as unread.
    """
    cut = encoded_length(encoded)
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
    def prompt_rewriting(self) -> Callable[[str], str]: ...
    @property
    def encoded_length(self) -> Callable[[str], int]: ...


def unread_in(prompt: str, reader: Reader) -> int:
    """The character of a description from which on this model does not read it."""
    return unread_from(prompt, reader.prompt_rewriting(prompt), reader.encoded_length)


def unread_warning(what: str, text: str, cut: int) -> list[str]:
    """What to tell about a text that is read up to character ``cut``: nothing, or one sentence."""
    lost = text[cut:].strip(" \t\r\n.,;")
    if not lost:
        return []
    lost = lost if len(lost) <= SHOWN else f"{lost[: SHOWN - 1].rstrip()}…"
    return [f'{what} is longer than the text encoder reads: "{lost}" is not read. Shorten it, or say this earlier.']
