"""What the tests of the store share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.jobs.store import Store
from tests.support.counting import quick_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    store = Store(folder / "data")
    yield store
    store.close()
