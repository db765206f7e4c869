"""What do all tests of other people's models share? One tiny model, and engines of it, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from core.pretrained.engine import PretrainedEngine
    from tests.support.tiny_stable_diffusion import TinyStableDiffusion


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyStableDiffusion:
    from tests.support.tiny_stable_diffusion import build

    return build(tmp_path_factory.mktemp("stable-diffusion"))


@pytest.fixture(scope="session")
def drawer(tiny: TinyStableDiffusion) -> PretrainedEngine:
    """The engine of the diffusers folder."""
    from core.pretrained.engine import PretrainedEngine

    return PretrainedEngine.load(tiny.folder, "cpu")
