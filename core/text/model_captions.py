"""Which words and example prompts did a model learn from?

Read from its folder, without a network. This file does not know where models are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.text import captions


def vocabulary_of(model: Path) -> Mapping[str, str]:
    """The words of the captions that this model was trained on; today's captions where it does not say."""
    try:
        words = json.loads((model / "vocabulary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return captions.vocabulary()
    sound = isinstance(words, dict) and set(words.values()) <= {"known", "rare"}
    return words if sound else captions.vocabulary()


def examples_of(model: Path) -> Sequence[str]:
    """Some captions that a person wrote and this model was trained on; none where captions were generated."""
    try:
        texts = json.loads((model / "examples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return [text for text in texts if isinstance(text, str)] if isinstance(texts, list) else ()
