"""Do the examples of docs/clients.md run, one after another, against one server?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.process import tied
from tests.support.drawing import DrawingEngine, DrawingInfo
from tests.support.loopback import PATIENCE_S, Live, serving

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
SAMPLERS = ("Pencil", "DPM++ 2M", "Euler a")


def run(live: Live, folder: Path, words: list[str]) -> str:
    """What a program prints that is started in `folder` and finds `client` beside the project's other files."""
    environment = tied({**os.environ, "PYTHONPATH": str(ROOT)})["env"]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("block", re.findall("^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL),
                         ids=["client", "webuiapi", "openai"])
def test_an_example_runs(block: str, tmp_path: Path) -> None:
    with serving(DrawingEngine(DrawingInfo(samplers=SAMPLERS))) as live:
        code = block.replace("127.0.0.1:5001", f"127.0.0.1:{live.port}").replace("port=5001", f"port={live.port}")
        assert run(live, tmp_path, [sys.executable, "-c", code])
        jobs = live.ask("GET", "/jobs/").json()["jobs"]
        assert len(jobs) >= 2 and {job["status"] for job in jobs} == {"succeeded"}
    assert list(tmp_path.glob("*.png"))
