"""Which sliders does a face have, and in which words does each of them push?

One for each of CelebA's 40 attributes: what a person reads beside it, which of its neighbours it belongs to, and the
two phrases between whose answers the network is pushed (`core/diffusion/guidance.py`), the commonest that captions use
for the attribute and for its absence. It knows neither networks nor HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from core.text.captions import phrases
from core.text.lexicon import ATTRIBUTES

FURTHEST = 2.0  # a slider goes from -2 to 2; 0 changes nothing
MOST = 8  # sliders in one request: each asks the network two more questions a step
GROUPS: dict[str, tuple[str, ...]] = {
    "Person": ("Male", "Young", "Attractive", "Chubby"),
    "Expression": ("Smiling", "Mouth_Slightly_Open", "High_Cheekbones", "Narrow_Eyes"),
    "Hair": ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "Bald", "Receding_Hairline", "Bangs",
             "Wavy_Hair", "Straight_Hair"),
    "Beard": ("No_Beard", "Goatee", "Mustache", "5_o_Clock_Shadow", "Sideburns"),
    "Face": ("Oval_Face", "Double_Chin", "Big_Nose", "Pointy_Nose", "Big_Lips", "Arched_Eyebrows", "Bushy_Eyebrows",
             "Bags_Under_Eyes", "Pale_Skin"),
    "Make-up": ("Heavy_Makeup", "Wearing_Lipstick", "Rosy_Cheeks"),
    "Worn": ("Eyeglasses", "Wearing_Hat", "Wearing_Earrings", "Wearing_Necklace", "Wearing_Necktie"),
    "Picture": ("Blurry",),
}
LABELS = {  # where the attribute's own name is not what a person would say
    "5_o_Clock_Shadow": "Stubble", "Bags_Under_Eyes": "Bags under the eyes", "Eyeglasses": "Glasses",
    "Mouth_Slightly_Open": "Open mouth", "Mustache": "Moustache", "Wearing_Earrings": "Earrings",
    "Wearing_Hat": "Hat", "Wearing_Lipstick": "Lipstick", "Wearing_Necklace": "Necklace", "Wearing_Necktie": "Necktie",
    "Heavy_Makeup": "Make-up", "Male": "Masculine",
}
BY_ANY_CASE = {name.lower(): name for name in ATTRIBUTES}


@dataclass(frozen=True)
class Slider:
    """`more` is said on the right of it, `less` on the left."""

    name: str
    label: str
    group: str
    less: str
    more: str


@lru_cache(maxsize=1)
def sliders() -> Mapping[str, Slider]:
    """All 40 by name, in the order in which a person meets them."""
    words: dict[tuple[str, bool], str] = {}
    for phrase in phrases():
        words.setdefault((phrase.attribute, phrase.value), phrase.text)
    return {
        name: Slider(name, LABELS.get(name, name.replace("_", " ").capitalize()), group, words[name, False],
                     words[name, True])
        for group, names in GROUPS.items()
        for name in names
    }


def moved(attributes: Mapping[str, float] | None) -> dict[str, float]:
    """The sliders that are not at 0, in CelebA's order whatever order they came in.

    Raises ValueError for an unknown name and for a number that is not from -2 to 2.
    """
    found = dict(attributes or {})
    for name, value in found.items():
        if name not in ATTRIBUTES:
            raise ValueError(f"attributes: {name!r} is none of CelebA's 40 names, see captions.ATTRIBUTES")
        if not -FURTHEST <= value <= FURTHEST:
            raise ValueError(f"attributes: {name} must be from -{FURTHEST:g} to {FURTHEST:g}; got {value}")
    return {name: float(found[name]) for name in ATTRIBUTES if found.get(name)}
