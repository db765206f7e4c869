"""What may every test count on? No plot opens a window, nothing is fetched from a model hub, and one thread computes.

The fixtures that several files share: the application around the drawing stand-in, the page in a browser, and models.
A file that needs another of the same name writes its own, which then holds there. What a fixture needs is imported when
it is asked for, so that the tests of HTTP never wait for torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from flask import Flask
    from flask.testing import FlaskClient
    from playwright.sync_api import Browser, Page

    from generator import FaceGenerator
    from tests.support.browsing import Gate, Site
    from tests.support.drawing import DrawingEngine

# before any test module imports torch, matplotlib or a hub client: they read these once
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Networks as small as those of the tests lose more time to threads than they gain, and sums keep one order."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


# ---- HTTP, in front of the drawing stand-in --------------------------------------------------------------------------


@pytest.fixture
def engine() -> DrawingEngine:
    from tests.support.drawing import DrawingEngine

    return DrawingEngine()


@pytest.fixture
def app(engine: DrawingEngine) -> Flask:
    from tests.support.asking import make_app

    return make_app(engine)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Closed with its file: while it is open, nothing else in the process can run an event loop."""
    from tests.support.browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_options() -> dict[str, Any]:
    """What the pages of a file are to have beside the usual, as `browsing.watched_page` takes it."""
    return {}


@pytest.fixture
def page(browser: Browser, page_options: dict[str, Any]) -> Iterator[Page]:
    from tests.support.browsing import watched_page

    with watched_page(browser, **page_options) as page:
        yield page


@pytest.fixture
def site_options() -> dict[str, Any]:
    """What the application of a file's pages is to be beside the usual, as `create_app` takes it."""
    return {}


@pytest.fixture
def site(engine: DrawingEngine, site_options: dict[str, Any]) -> Iterator[Site]:
    from tests.support.browsing import Site

    with Site(lambda: engine, **site_options) as site:
        site.wait_until_ready()
        yield site


@pytest.fixture
def gate(engine: DrawingEngine, site: Site) -> Iterator[Gate]:
    """Holds the site's engine at its first step until a test opens it, and lets go before the site ends."""
    from tests.support.browsing import Gate

    engine.before_step = gate = Gate()
    yield gate
    gate.open()


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model folder of untrained networks, the same for all: who wants to change it takes a copy."""
    from tests.support.tiny_model import build_tiny_model

    folder = build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


@pytest.fixture(scope="module")
def quick_grids() -> Iterator[None]:
    """The images of a training run take three steps: of a network that has learned nothing, twenty show no more."""
    from core.evaluation import prompt_sheets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_sheets, "OF_A_RUN", prompt_sheets.GridOptions(steps=3))
        yield


@pytest.fixture(scope="module")
def faces(tiny_folder: Path) -> FaceGenerator:
    """What draws with the tiny model, in torch."""
    from generator import FaceGenerator

    return FaceGenerator.load(tiny_folder, device="cpu", engine="torch")


@pytest.fixture(scope="session")
def bundled() -> FaceGenerator:
    """What draws with the model that users get, as theirs does on a CPU. Nobody may change it."""
    from generator import FaceGenerator
    from model_loading import DEFAULT_MODEL
    from tests.support.tiny_model import bundled_model

    assert bundled_model() == DEFAULT_MODEL, "models/celeba128 is part of the repository: restore it with git checkout"
    return FaceGenerator.load(DEFAULT_MODEL, device="cpu")
