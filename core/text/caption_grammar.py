"""How do words chosen for a face become a sentence?

`Parts` holds the words, sorted by the place in a sentence they can take; `phrase`, `sentences` and `tags` are three
ways to put them together, each in many orders. It does not know attributes or what words mean.
The one duty to meaning: what is written must read back as it was meant, so a denial never runs on into the next words.
"""

from __future__ import annotations

import random

from core.text.lexicon import FRAME_MODIFIERS, FRAME_NOUNS, HEADS, SAYINGS, weighted

# The words that this file adds to those chosen for it.
GLUE = (
    "a an and are aren't do does doesn't don't face has have he her his in is isn't no not of or she that the their "
    "they this wear wearing wears who with without"
)


def repeated_by_weight(items: str) -> tuple[str, ...]:
    """Repeat each text by its weight: one index into the result is one weighted draw, which is what makes this fast."""
    return tuple(text for text, weight in weighted(items) for _ in range(weight))


_HEAD_NAMES = {name: repeated_by_weight(head.names) for name, head in HEADS.items()}
_FRAME_NOUNS, _FRAME_MODIFIERS = repeated_by_weight(FRAME_NOUNS), repeated_by_weight(FRAME_MODIFIERS)
# Adjectives that also describe a part: "pale, rosy cheeks" would give the cheeks what was said of the person.
_PART_ADJECTIVES = frozenset(saying.text.partition(":")[2] for saying in SAYINGS if saying.slot in ("head", "nothead"))


class Parts:
    """The words chosen for one caption, sorted by the place in a sentence they can take."""

    __slots__ = (
        "adjectives",
        "clothed",
        "denied_parts",
        "frame",
        "has",
        "lacks",
        "lacks_worn",
        "parts",
        "posts",
        "worn",
    )

    def __init__(self) -> None:
        self.adjectives: list[str] = []
        self.has: list[str] = []
        self.worn: list[str] = []
        self.clothed = True  # everything worn also goes after "in"
        self.posts: list[str] = []
        self.lacks: list[str] = []
        self.lacks_worn: list[str] = []
        self.frame = ""
        self.parts: dict[str, list[str]] = {}
        self.denied_parts: dict[str, list[str]] = {}


def _article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def _bare(text: str) -> str:
    """Drop the article: "a beard" -> "beard"."""
    return text[2:] if text.startswith("a ") else text[3:] if text.startswith("an ") else text


def _join(items: list[str], rng: random.Random, word: str = "and") -> str:
    if len(items) == 1:
        return items[0]
    comma = "," if len(items) > 2 and rng.random() < 0.3 else ""
    return f"{', '.join(items[:-1])}{comma} {word} {items[-1]}"


def _shuffled(items: list[str], rng: random.Random) -> list[str]:
    return sorted(items, key=lambda _: rng.random()) if len(items) > 1 else items


def _stack(adjectives: list[str], rng: random.Random) -> str:
    """Adjectives before a noun: "big pointy", "big, pointy" or "big and pointy"."""
    if len(adjectives) == 1:
        return adjectives[0]
    form = rng.random()
    if form < 0.45:
        return " ".join(adjectives)
    return ", ".join(adjectives) if form < 0.8 else _join(adjectives, rng)


def _part_phrases(parts: Parts, rng: random.Random) -> list[str]:
    """Each part of the face with its adjectives as one noun phrase, and "hair that is not black"."""
    phrases = []
    for name in [*parts.parts, *(name for name in parts.denied_parts if name not in parts.parts)]:
        head = HEADS[name]
        names = _HEAD_NAMES[name]
        phrase = names[int(rng.random() * len(names))]
        adjectives = parts.parts.get(name)
        if adjectives:
            phrase = f"{_stack(adjectives, rng)} {phrase}"
        if head.article:
            phrase = _article(phrase)
        denied = parts.denied_parts.get(name)
        if denied:
            verb = "are" if phrase.endswith("s") and name != "face" else "is"
            phrase = f"{phrase} that {verb} not {_join(denied, rng, 'or')}"
        phrases.append(phrase)
    return phrases


def _part_clauses(parts: Parts, owner: str, rng: random.Random) -> list[str]:
    """The same as clauses: "her hair is black and wavy"."""
    clauses = []
    for name in [*parts.parts, *(name for name in parts.denied_parts if name not in parts.parts)]:
        said = _join(parts.parts[name], rng) if name in parts.parts else ""
        denied = parts.denied_parts.get(name)
        if denied:
            said = f"{said} and not " if said else "not "
            said += _join(denied, rng, "or")
        clauses.append(f"{owner} {name} {'are' if HEADS[name].plural else 'is'} {said}")
    return clauses


def _subject(parts: Parts, adjectives: list[str], noun: str, rng: random.Random) -> str:
    """The image and the person: "a blurry photo of a young woman"."""
    draw = rng.random
    person = f"{_stack(adjectives, rng)} {noun}" if adjectives else noun
    if draw() < 0.85:
        person = _article(person)
    form = draw()
    if not parts.frame and form > 0.4:
        return f"the face of {person}" if form > 0.97 else f"this is {person}" if form > 0.94 else person
    frame = _FRAME_NOUNS[int(draw() * len(_FRAME_NOUNS))]
    if draw() < 0.12:
        modifier = _FRAME_MODIFIERS[int(draw() * len(_FRAME_MODIFIERS))]
        frame = frame if modifier == frame else f"{modifier} {frame}"
    if parts.frame:
        frame = f"{parts.frame} {frame}"
    return f"{_article(frame) if draw() < 0.85 else frame} of {person}"


def _worn_lead(parts: Parts, rng: random.Random) -> str:
    return "in " if parts.clothed and rng.random() < 0.2 else "wearing "


def _finish(text: str, rng: random.Random, plain: float) -> str:
    """A share of `plain` is left in lower case without a full stop, as people type."""
    form = rng.random()
    if form < plain:
        return text
    text = text[0].upper() + text[1:]
    return text + "." if form > plain + (1 - plain) / 2 else text


def _split(items: list[str], rng: random.Random, share: float) -> tuple[list[str], list[str]]:
    """Deal items into (first sentence, later ones)."""
    first: list[str] = []
    later: list[str] = []
    for item in items:
        (first if rng.random() < share else later).append(item)
    return first, later


def _segments(
    has: list[str],
    worn: list[str],
    lacks: list[str],
    lacks_worn: list[str],
    posts: list[str],
    adjectives: list[str],
    parts: Parts,
    rng: random.Random,
) -> list[str]:
    """What follows the person in one phrase, in random order."""
    draw = rng.random
    segments = list(posts)
    has = list(has)
    if worn and draw() < 0.35:
        has += worn
    elif worn:
        segments.append(_worn_lead(parts, rng) + _join(worn, rng))
    if lacks_worn and draw() < 0.3:
        segments.append("not wearing " + _join(lacks_worn, rng, "or"))
    else:
        lacks = lacks + lacks_worn
    if lacks:
        if draw() < 0.5:
            segments.append("without " + _join(lacks if draw() < 0.7 else [_bare(lack) for lack in lacks], rng, "or"))
        else:
            has.append("no " + _join([_bare(lack) for lack in lacks], rng, "or"))
    if adjectives:
        segments.append("who is " + _join(adjectives, rng))
    if has:
        has = _shuffled(has, rng)
        segments.append(("who has " if draw() < 0.1 else "with ") + _join(has, rng))
    return _shuffled(segments, rng)


def _linked(subject: str, segments: list[str], rng: random.Random) -> str:
    text = subject
    denied = bare = False
    for index, segment in enumerate(segments):
        # After a denial or a participle the next one needs a comma: "without a hat smiling" would deny the smile.
        form = rng.random()
        if index and index == len(segments) - 1 and form < 0.35:
            link = " and "
        else:
            link = ", " if denied or bare or form > 0.75 or segment.startswith("not ") else " "
        text += link + segment
        denied = segment.startswith(("not ", "without ")) or " no " in segment or " not " in segment
        bare = not segment.startswith(("with ", "wearing ", "who "))
    return text


def phrase(parts: Parts, noun: str, rng: random.Random) -> str:
    """One noun phrase: "a photo of a young woman with black hair, smiling"."""
    limit = 1 + int(rng.random() * 4)
    adjectives, rest = parts.adjectives[:limit], parts.adjectives[limit:]
    has = parts.has + _part_phrases(parts, rng)
    segments = _segments(has, parts.worn, parts.lacks, parts.lacks_worn, parts.posts, rest, parts, rng)
    return _finish(_linked(_subject(parts, adjectives, noun, rng), segments, rng), rng, 0.6)


def sentences(parts: Parts, noun: str, male: bool | None, rng: random.Random) -> str:
    """A short description in several sentences."""
    draw = rng.random
    adjectives, is_list = _split(parts.adjectives, rng, 0.6)
    posts, later_posts = _split(parts.posts, rng, 0.3)
    worn, later_worn = _split(parts.worn, rng, 0.3)
    lacks, later_lacks = _split(parts.lacks, rng, 0.2)
    if draw() < 0.4:
        owner = {True: "his", False: "her", None: "their"}[male]
        clauses, has_now = _part_clauses(parts, owner, rng), parts.has
    else:
        clauses, has_now = [], parts.has + _part_phrases(parts, rng)
    has, later_has = _split(has_now, rng, 0.3)
    segments = _segments(has, worn, lacks, [], posts, [], parts, rng)
    sentences = [_linked(_subject(parts, adjectives, noun, rng), segments, rng)]
    pronoun = {True: "he", False: "she", None: "they"}[male]
    named = f"the {noun}" if male is not None or noun != "face" else "the person"
    later: list[tuple[str, str]] = []  # (verb phrase after he/she/the man, after they)
    if later_has:
        said = _join(_shuffled(later_has, rng), rng)
        later.append((f"has {said}", f"have {said}"))
    if later_worn:
        said = _join(later_worn, rng)
        later.append(
            (f"wears {said}", f"wear {said}") if draw() < 0.3 else (f"is wearing {said}", f"are wearing {said}")
        )
    if is_list:
        said = _join(is_list, rng)
        later.append((f"is {said}", f"are {said}"))
    for post in later_posts:
        short = post.startswith("not ") and draw() < 0.3
        later.append((f"isn't {post[4:]}", f"aren't {post[4:]}") if short else (f"is {post}", f"are {post}"))
    if later_lacks or parts.lacks_worn:
        later += _absences(later_lacks, parts.lacks_worn, rng)
    later.sort(key=lambda _: draw())
    while later:
        subject = pronoun if draw() < 0.8 else named
        plural = subject == "they"
        verb = later.pop()[plural]
        if later and draw() < 0.3:
            verb += f" and {later.pop()[plural]}"
        sentences.append(f"{subject} {verb}")
    sentences[1:] = _shuffled(sentences[1:] + clauses, rng)
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _absences(lacks: list[str], lacks_worn: list[str], rng: random.Random) -> list[tuple[str, str]]:
    draw = rng.random
    verbs: list[tuple[str, str]] = []
    if lacks_worn and draw() < 0.5:
        said = _join(lacks_worn, rng, "or")
        form = draw()
        verbs.append(
            (f"is not wearing {said}", f"are not wearing {said}")
            if form < 0.5
            else (f"isn't wearing {said}", f"aren't wearing {said}")
            if form < 0.75
            else (f"does not wear {said}", f"do not wear {said}")
        )
        lacks_worn = []
    if lacks or lacks_worn:
        said = _join(lacks + lacks_worn, rng, "or")
        bare = _join([_bare(lack) for lack in lacks + lacks_worn], rng, "or")
        form = draw()
        verbs.append(
            (f"has no {bare}", f"have no {bare}")
            if form < 0.6
            else (f"does not have {said}", f"do not have {said}")
            if form < 0.8
            else (f"doesn't have {said}", f"don't have {said}")
        )
    return verbs


def tags(parts: Parts, noun: str, rng: random.Random) -> str:
    """A list of keywords: "woman, blond hair, smiling, no glasses"."""
    draw = rng.random
    before: list[str] = []
    tags: list[str] = []
    for adjective in parts.adjectives:
        (before if adjective in _PART_ADJECTIVES or draw() < 0.6 else tags).append(adjective)
    short = draw() < 0.7
    for item in parts.has + _part_phrases(parts, rng):
        tags.append(_bare(item) if short else item)
    if parts.worn:
        tags += [_worn_lead(parts, rng) + _join(parts.worn, rng)] if draw() < 0.4 else parts.worn
    tags += parts.posts
    tags += ["no " + _bare(lack) for lack in parts.lacks + parts.lacks_worn]
    if parts.frame:
        nouns = _FRAME_NOUNS
        tags.append(f"{parts.frame} {nouns[int(draw() * len(nouns))]}")
    tags = _shuffled(tags, rng)
    person = f"{_stack(before, rng)} {noun}" if before else noun
    person = person if draw() < 0.7 else _article(person)
    tags.insert(0 if draw() < 0.8 else int(draw() * (len(tags) + 1)), person)
    return _finish(", ".join(tags), rng, 0.8)
