"""Which rewriting of prompts makes the model follow them best?

Candidates are tried on held-out descriptions, the attribute classifier says how often the images agree, and the best
is chosen. It does not know how a prompt is rewritten (`core/text/prompt_rewriting.py`) nor where the choice is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import numpy as np

from core.evaluation.attribute_classifier import AttributeClassifier, extract_features
from core.evaluation.generation import Generator, Sampling, generate_images
from core.evaluation.prompts import NEGATIONS, NEGATIONS_AIM, Prompts, draw_prompts
from core.text.captions import phrases
from core.text.lexicon import ATTRIBUTES
from core.text.phrase_matcher import Fact
from core.text.prompt_rewriting import PromptRewriting

if TYPE_CHECKING:
    from dataset import FaceStore

FEWEST = 16  # descriptions that state a fact, to judge by
PHRASES = 2  # that are tried for saying it again, the commonest
RARE = 0.25  # of people; what more of them have is generated unless it is denied
DROPPED, APPENDED = (0.03, 1.0), (0.075, 2.0)  # what it has to gain: share of the images, standard errors of that
BEHIND = 0.8  # of what is wanted; only where less is generated does a caption repeat itself, as none in training did


@dataclass(frozen=True)
class Trial:
    """One change of the words, for descriptions (by number) that state one fact; `words` None: it is left out."""

    fact: Fact
    words: str | None
    places: tuple[int, ...]

    @property
    def prompt_rewriting(self) -> PromptRewriting:
        """The change alone."""
        name = self.fact[0]
        return PromptRewriting((name,)) if self.words is None else PromptRewriting(appended_phrases={name: self.words})


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
            prompt_rewriting = Trial(fact, words, ()).prompt_rewriting
            changed = [i for i in where if prompt_rewriting(prompts[i]) != prompts[i]][:most]
            if len(changed) >= FEWEST:
                found.append(Trial(fact, words, tuple(changed)))
    return found


@dataclass(frozen=True)
class Outcome:
    """How many of a trial's images show its fact: real images (or as many as are wanted), plain, and changed."""

    trial: Trial
    wanted: float
    plain: float
    changed: float
    error: float  # standard error of changed - plain, over the same descriptions and noise

    @property
    def worth(self) -> bool:
        """Does the model fall behind there, and does this gain enough to be told from chance?"""
        leaves = self.trial.words is None
        least, errors = DROPPED if leaves else APPENDED
        behind = self.plain < (1.0 if leaves else BEHIND) * self.wanted
        return behind and self.changed - self.plain >= max(least, errors * self.error)


def outcome(trial: Trial, wanted: float, plain: Sequence[bool], changed: Sequence[bool]) -> Outcome:
    """Of what was seen in the images of a trial, in the order of its places."""
    gains = [float(b) - float(a) for a, b in zip(plain, changed, strict=True)]
    error = pstdev(gains) / math.sqrt(len(gains))
    return Outcome(trial, wanted, fmean(map(float, plain)), fmean(map(float, changed)), error)


def chosen(outcomes: Sequence[Outcome]) -> PromptRewriting:
    """The changes that are worth making; of several ways to say one fact again the first, which is the commonest."""
    worth = [one for one in outcomes if one.worth]
    again = {one.trial.fact[0]: one.trial.words for one in reversed(worth) if one.trial.words is not None}
    left = {one.trial.fact[0] for one in worth if one.trial.words is None}
    return PromptRewriting(tuple(name for name in ATTRIBUTES if name in left),
                           {name: again[name] for name in ATTRIBUTES if name in again})


def search_on_people(
    store: FaceStore, faces: Generator, judge: AttributeClassifier, split: str, sampling: Sampling, most: int
) -> tuple[PromptRewriting, dict[str, Any]]:
    """`search` on people whom the model never saw (``split``), by what it generates for captions of their images.

    ``faces`` rewrites no prompts. Of 32 times ``most`` captions each change is tried on at most ``most``.
    """
    rows = np.random.default_rng(sampling.seed).permutation(store.sharp(split))
    prompts = draw_prompts(store.attributes[rows], 32 * most, sampling.seed)

    def generated(places: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        requests = sampling.requests(texts, [sampling.seed + place for place in places])
        return extract_features(judge, generate_images(faces, requests)).verdicts

    def real(places: Sequence[int]) -> np.ndarray:
        return extract_features(judge, store.images[rows[prompts.source[list(places)]]]).verdicts

    shares = store.attributes[store.select("train")].mean(axis=0).tolist()
    prompt_rewriting, figures = search(prompts, shares, real, generated, most)
    return prompt_rewriting, {"steps": sampling.num_inference_steps, **figures}


def search(
    prompts: Prompts,
    shares: Sequence[float],
    real: Callable[[Sequence[int]], np.ndarray],
    generated: Callable[[Sequence[int], Sequence[str]], np.ndarray],
    most: int,
) -> tuple[PromptRewriting, dict[str, Any]]:
    """Try every change of words on at most ``most`` descriptions each; returns the choice and what was tried.

    ``shares`` [40] is how many training people have each attribute. ``real(places)`` and ``generated(places, texts)``
    are the attribute classifier's verdicts, bool [N, 40], on the images that these prompts describe, and on faces
    that the model generates for texts in their place, each from the seed of its place and without any rewriting.
    """
    found = trials(prompts.stated(), prompts.texts, dict(zip(ATTRIBUTES, shares, strict=True)), most)
    everybody = sorted({place for trial in found for place in trial.places})
    if not everybody:
        return PromptRewriting(), {"tried": [], "left_out": [], "said_again": {}}
    plain = dict(zip(everybody, generated(everybody, [prompts.texts[place] for place in everybody]), strict=True))
    truth = dict(zip(everybody, real(everybody), strict=True))
    asked = {(name, value): NEGATIONS_AIM for _, name, value in NEGATIONS}

    def shows(seen: Mapping[int, np.ndarray], trial: Trial) -> list[bool]:
        name, value = trial.fact
        return [bool(seen[place][ATTRIBUTES.index(name)]) == value for place in trial.places]

    outcomes = []
    for trial in found:
        wanted = max(fmean(map(float, shows(truth, trial))), asked.get(trial.fact, 0.0))
        if fmean(map(float, shows(plain, trial))) < wanted:  # what is followed as it is needs no other words
            texts = [trial.prompt_rewriting(prompts.texts[place]) for place in trial.places]
            changed = dict(zip(trial.places, generated(trial.places, texts), strict=True))
            outcomes.append(outcome(trial, wanted, shows(plain, trial), shows(changed, trial)))
    prompt_rewriting = chosen(outcomes)
    return prompt_rewriting, {
        "tried": [
            {"fact": f"{'' if one.trial.fact[1] else 'not '}{one.trial.fact[0]}", "words": one.trial.words,
             "n": len(one.trial.places), "wanted": one.wanted, "plain": one.plain, "changed": one.changed,
             "error": one.error, "kept": one.worth}
            for one in outcomes
        ],
        "left_out": list(prompt_rewriting.dropped_negations), "said_again": dict(prompt_rewriting.appended_phrases),
    }  # fmt: skip
