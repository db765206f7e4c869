"""How does a slider push a face while it is drawn?

For the same noise, towards what one caption says and away from what another says: the prompt with the fact in it, and
the prompt with its absence. The difference of the network's two answers is added to the guided prediction, `STRENGTH`
times the slider. The first steps, which decide who is seen, are left alone. Other ways were measured and are worse: see
docs/training/LOG.md.

Semantic guidance: https://arxiv.org/abs/2301.12247. Directions from pairs of texts: https://arxiv.org/abs/2311.12092.
It knows neither the network nor the text encoder; `core/sliders.py` has the words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from core.diffusion import Condition
from core.sliders import moved, sliders

STRENGTH = 3.0  # of a push at slider 1, as guidance scales count
START = 0.2  # share of the steps before the first push


def captions_of(prompt: str, attribute: str, read_to: Callable[[str], int] = len) -> tuple[str, str]:
    """What to push away from and what to push towards, when the slider is moved to the right.

    Words at the end of a long prompt go where the text encoder, which reads ``read_to`` characters of a text, would not
    read the slider's: both captions would be the same, and the slider would do nothing.
    """
    slider = sliders()[attribute]
    while True:
        start = f"{prompt.rstrip(' .,;')}, " if prompt.strip() else ""
        found = start + slider.less, start + slider.more
        if not start or all(read_to(text) >= len(text) for text in found):
            return found
        prompt = prompt.rstrip()
        prompt = prompt[: max(prompt.rfind(" "), 0)]


def pushes(
    prompts: Sequence[str], attributes: Mapping[str, float], encode: Callable[[Sequence[str]], Condition],
    read_to: Callable[[str], int] = len,
) -> tuple[tuple[float, Condition], ...]:
    """The pushes of `core.diffusion.Guidance` for pictures of these prompts; none for sliders at 0.

    `encode` turns one text a picture into conditions. Raises ValueError for unknown attributes and values out of range.
    """
    found: list[tuple[float, Condition]] = []
    for name, value in moved(attributes).items():
        less, more = zip(*(captions_of(prompt, name, read_to) for prompt in prompts), strict=True)
        found += [(STRENGTH * value, encode(more)), (-STRENGTH * value, encode(less))]
    return tuple(found)
