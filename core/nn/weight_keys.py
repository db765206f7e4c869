"""How are weights read that were stored before the parts of the networks had the names that they have now?

Layers were renamed, so that a reader of diffusers knows them: ``door`` is ``conv_in``, ``feed`` is ``ff``. Weight files
and checkpoints of runs keep the names that they were written with. They are translated where they are read, and a hash
over names is one over the first names, so that it stays the same for the same weights. Nothing is written here, and no
network is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

# Beginnings of the keys of a network, as they were and as they are; the longest that fits counts.
PREFIXES = {
    # the UNet, and the discriminators, which are only in checkpoints
    "door.": "conv_in.",
    "head.": "conv_out.",
    "down.": "down_blocks.",
    "shrink.": "downsample.",
    "middle.": "mid_block.",
    "up.": "up_blocks.",
    "grow.": "upsample.",
    # the VAE
    "encoder.door.": "encoder.conv_in.",
    "encoder.down.": "encoder.downsample.",
    "encoder.head.": "encoder.conv_out.",
    "decoder.head.": "decoder.conv_out.",
    "decoder.finish.": "decoder.refinement.",
    "decoder.finish.head.": "decoder.refinement.conv_out.",
    # CLIP
    "image.door.": "image.conv_in.",
    "image.downs.": "image.downsample.",
    "image.head.": "image.projection.",
    "text_head.": "text_projection.",
}
PARTS = {".feed.": ".ff."}  # anywhere in a key

Value = TypeVar("Value")


def current_key(key: str) -> str:
    """The name of a weight as the networks have it now; one that is current already stays."""
    return _translated(key, PREFIXES, PARTS)


def first_key(key: str) -> str:
    """The name that a weight had first: what hashes over names are made of."""
    return _translated(key, {new: old for old, new in PREFIXES.items()}, {new: old for old, new in PARTS.items()})


def upgrade_keys(state: Mapping[str, Value]) -> dict[str, Value]:
    """The same weights by their current names, in the same order. Raises ValueError when two would have one name."""
    upgraded = {current_key(key): value for key, value in state.items()}
    if len(upgraded) != len(state):
        raise ValueError("the weights have an old and a new name of the same layer")
    return upgraded


def _translated(key: str, prefixes: Mapping[str, str], parts: Mapping[str, str]) -> str:
    fitting = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default="")
    if fitting:
        key = prefixes[fitting] + key[len(fitting) :]
    for old, new in parts.items():
        key = key.replace(old, new)
    return key
