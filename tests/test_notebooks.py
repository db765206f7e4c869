"""Do the notebooks run from the first cell to the last, and are they committed without what they would show?

Each runs in a real kernel of its own: the tour on the bundled model in very few steps, the other on drawn faces.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from dataset import synthetic_store

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("tour", "explore_celeba")
# the kernel's libraries look for a running event loop in a way that Python will drop; nothing of ours
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def read(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def execute(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, **env: str) -> list[Any]:
    """Run all cells in a fresh kernel that starts in `folder`; what they put out. Raises CellExecutionError."""
    for name in [name for name in os.environ if name.startswith(("TOUR_", "EXPLORE_"))]:
        monkeypatch.delenv(name)
    for name, value in {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "2", **env}.items():
        monkeypatch.setenv(name, value)
    client = NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def errors_and_warnings(outputs: list[Any]) -> list[str]:
    """All but tqdm's wish for ipywidgets, which nothing here needs."""
    told = [output["text"] for output in outputs if output.get("name") == "stderr"]
    return [text for text in told if "Warning" in text and "IProgress not found" not in text]


def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = execute(read("tour"), ROOT / "notebooks", monkeypatch, TOUR_STEPS="2")
    said = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert "largest difference in grey levels:" in said and "'n_inf_steps': 2" in said and "Finding(score=" in said
    assert errors_and_warnings(outputs) == []


def test_the_statistics_run_on_a_small_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = synthetic_store(tmp_path / "store", 48)
    outputs = execute(read("explore_celeba"), ROOT, monkeypatch, EXPLORE_STORE=str(store.folder))
    said = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert "48 pictures of 24 people" in said and "people in two splits: 0" in said and "young women:" in said
    assert errors_and_warnings(outputs) == []


def test_a_cell_that_fails_fails_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = read("explore_celeba")
    broken.cells = broken.cells[:3]
    with pytest.raises(CellExecutionError, match="not a prepared store|DataError|FileNotFound"):
        execute(broken, ROOT, monkeypatch, EXPLORE_STORE=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_they_are_committed_clean(name: str) -> None:
    """No outputs (they would be photographs, or change with every run), no counts, nobody's paths."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n") and text == json.dumps(json.loads(text), indent=1, ensure_ascii=False,
                                                       sort_keys=True) + "\n"
    assert "/home/" not in text and "/Users/" not in text and len(text) < 40_000


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)
