"""How does a face answer to its sliders, as the attribute classifier measures it?

For each attribute: how its own probability runs over the positions of the slider (the response), which other attributes
move with it (entanglement), and how far the person becomes another (identity). Distances are in the attribute
classifier's features, over the mean distance between different people generated for one prompt: 0 is the same image, 1
somebody else.

It does not know how faces are generated or where the figures are kept. Entanglement of directions:
https://arxiv.org/abs/1907.10786
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from core.engine import GenerationRequest
from core.evaluation.attribute_classifier import AttributeClassifier, Features, extract_features
from core.evaluation.generation import Generator, Sampling, generate_images
from core.evaluation.metrics import mean_pairwise_distance
from core.evaluation.report import plain
from core.evaluation.sample_grids import image_grid
from core.text.attribute_sliders import sliders
from core.text.lexicon import ATTRIBUTES

POSITIONS = (-2.0, -1.0, 0.0, 1.0, 2.0)
PROMPTS = ("a woman", "a man", "a person")  # as many people of each
STRIP = {"Smiling": "a woman", "Young": "a man", "Male": "a woman"}  # the sliders of the image, and who moves
NOTABLE = 0.1  # change of a probability from one end of a slider to the other that is worth a word
MOST_NOTABLE = 4


@dataclass(frozen=True)
class Response:
    """What one slider does, at each of POSITIONS, on the mean over the same people.

    `curve` is the probability of its attribute, `evidence` the log-odds above those of the training set (what is
    monotone is judged by this: it does not saturate), `identity` the distance from the person at 0, and `moved` the
    other attributes whose probability differs most between the ends.
    """

    curve: tuple[float, ...]
    evidence: tuple[float, ...]
    identity: tuple[float, ...]
    moved: dict[str, float]

    @property
    def is_monotone(self) -> bool:
        return all(a < b for a, b in zip(self.evidence, self.evidence[1:], strict=False))

    def to_dict(self) -> dict[str, Any]:
        """In three digits, as `core.web.responses.SliderResponse`."""
        rounded = {name: [round(x, 3) for x in value] for name, value in asdict(self).items() if name != "moved"}
        return {**rounded, "monotone": self.is_monotone, "moved": {n: round(x, 3) for n, x in self.moved.items()}}


def distance_between_people(features: np.ndarray, each: int) -> float:
    """The mean distance between different people of one prompt, `each` in a row. Shapes: features [N, D]."""
    if each < 2:
        raise ValueError(f"at least 2 people of each prompt are needed to compare with; got {each}")
    return float(np.mean([mean_pairwise_distance(people) for people in np.split(features, len(features) // each)]))


def measure_response(attribute: str, seen: Sequence[Features], log_odds: np.ndarray, far: float) -> Response:
    """What the slider of `attribute` does; `seen` at each of POSITIONS, of the same people in the same order."""
    column, middle = ATTRIBUTES.index(attribute), seen[POSITIONS.index(0.0)]
    probable = np.stack([(1 / (1 + np.exp(-one.logits.astype(float)))).mean(0) for one in seen])  # [5, 40]
    change = probable[-1] - probable[0]
    others = sorted((i for i in range(len(ATTRIBUTES)) if i != column), key=lambda i: -abs(change[i]))
    return Response(
        curve=tuple(probable[:, column].tolist()),
        evidence=tuple(float((one.logits[:, column] - log_odds[column]).mean()) for one in seen),
        identity=tuple(
            float(np.linalg.norm(one.features - middle.features, axis=1).mean() / far) for one in seen
        ),
        moved={ATTRIBUTES[i]: float(change[i]) for i in others[:MOST_NOTABLE] if abs(change[i]) >= NOTABLE},
    )


def measure(
    features_at: Callable[[Mapping[str, float]], Features], names: Sequence[str], each: int, log_odds: np.ndarray
) -> dict[str, Response]:
    """These sliders, one after the other. `features_at` generates `each` people of every prompt, and has them
    judged."""
    plain = features_at({})
    far = distance_between_people(plain.features, each)
    return {
        name: measure_response(name, [features_at({name: x}) if x else plain for x in POSITIONS], log_odds, far)
        for name in names
    }


def measure_generator(
    faces: Generator, judge: AttributeClassifier, names: Sequence[str], people: int, sampling: Sampling
) -> dict[str, Response]:
    """These sliders of a model, on about so many people: as many of each of PROMPTS, the same at every position."""
    from tqdm import tqdm

    each = -(-people // len(PROMPTS))
    bar = tqdm(total=1 + (len(POSITIONS) - 1) * len(names), desc="sliders", unit="position")

    def features_at(attributes: Mapping[str, float]) -> Features:
        requests = [
            GenerationRequest(prompt, each, sampling.num_inference_steps, sampling.seed, sampling.guidance_scale,
                              sampler=sampling.sampler, watermark=False, attributes=attributes)
            for prompt in PROMPTS
        ]  # fmt: skip
        seen = extract_features(judge, generate_images(faces, requests))
        bar.update()
        return seen

    with bar:
        return measure(features_at, names, each, judge.log_odds.cpu().numpy())


def figures(found: Mapping[str, Response], sampling: Sampling, *, model_hash: str, judge_hash: str, people: int,
            precision: str) -> dict[str, Any]:
    """What was measured, on whom, with what: as JSON can hold it."""
    return dict(plain({
        "model_hash": model_hash, "judge_hash": judge_hash, "people": -(-people // len(PROMPTS)) * len(PROMPTS),
        "steps": sampling.num_inference_steps, "precision": precision, "positions": POSITIONS,
        "summary": summary(found), "sliders": {name: one.to_dict() for name, one in found.items()},
    }))  # fmt: skip


def strip(faces: Generator, seed: int, steps: int = 25) -> Image.Image:
    """A person a row at every position of one slider: those of STRIP."""
    requests = [
        GenerationRequest(prompt, 1, steps, seed, watermark=False, attributes={name: x})
        for name, prompt in STRIP.items() for x in POSITIONS
    ]  # fmt: skip
    return image_grid(generate_images(faces, requests), len(POSITIONS))


def summary(found: Mapping[str, Response]) -> dict[str, Any]:
    """The few numbers that ways of semantic guidance are compared by."""
    return {
        "monotone": sum(one.is_monotone for one in found.values()),
        "range": float(np.mean([one.evidence[-1] - one.evidence[0] for one in found.values()])),
        "identity_at_1": float(np.mean([(one.identity[1] + one.identity[3]) / 2 for one in found.values()])),
        "identity_at_2": float(np.mean([(one.identity[0] + one.identity[4]) / 2 for one in found.values()])),
    }


def page(found: Mapping[str, Response], report: Mapping[str, Any]) -> str:
    """All of it in Markdown, with what was measured."""
    total = report["summary"]
    return "\n\n".join((
        "# What each slider does",
        f"Measured by `python evaluate.py sliders` on {report['people']} people ({', '.join(PROMPTS)}; "
        f"{report['steps']} steps, {report['precision']}), judge `{report['judge_hash'][:12]}`, model "
        f"`{report['model_hash'][:12]}`. Probabilities are the judge's. Identity is the distance from the person at 0 "
        "in its features, 1 being somebody else. Named are the attributes whose probability differs by "
        f"{NOTABLE:g} or more between the ends.",
        f"Monotone: {total['monotone']} of {len(found)}. Mean over all sliders: {total['range']:.2f} of log-odds from "
        f"end to end, identity {total['identity_at_1']:.2f} at 1 and {total['identity_at_2']:.2f} at 2.",
        table(found),
    )) + "\n"


def table(found: Mapping[str, Response]) -> str:
    """Markdown: one row a slider, in the order in which a person meets them."""
    lines = ["| slider | probability at " + ", ".join(f"{x:+g}" if x else "0" for x in POSITIONS)
             + " | monotone | identity at 1 and 2 | moves too |", "| --- | --- | --- | --- | --- |"]
    for name, one in found.items():
        curve = ", ".join(f"{x:.2f}" for x in one.curve)
        near, far = (one.identity[1] + one.identity[3]) / 2, (one.identity[0] + one.identity[4]) / 2
        moved = ", ".join(f"{sliders()[other].label} {x:+.2f}" for other, x in one.moved.items())
        lines.append(f"| {sliders()[name].label} | {curve} | {'yes' if one.is_monotone else 'no'} "
                     f"| {near:.2f}, {far:.2f} | {moved} |")
    return "\n".join(lines)
