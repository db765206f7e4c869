"""Does one command lead from captioned pictures to a model that generates what they show, and go on when stopped?"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from benchmarks.benchmark_shapes import count_right, draw_shapes, what_is_shown
from core.command import SettingError
from core.nn.checkpoint import read_index
from core.text.model_captions import vocabulary_of
from core.training.data_sources import DataError
from core.training.run_summary import StepCost, duration, measure_step
from core.training.timed_steps import TimedStep
from core.web.options import options
from generator import FaceGenerator

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("red", "blue")
LENGTH = "0.3"
pytestmark = pytest.mark.timeout(900)  # nine processes that import torch: minutes, where other work shares the cores


def words(root: Path, data: Path, *more: str) -> list[str]:
    return ["--preset", "tiny", "--data", str(data), "--name", "mine", "--device", "cpu", "--precision", "no",
            "--measure-seconds", "0.1", "--models", str(root / "models"), "--runs", str(root / "runs"), "--archive",
            str(root / "archive"), *more]


def say(command: list[str], stop_at: str = "") -> tuple[int, str]:
    """Run train.py: its exit status, and what it and its stages print. It gets SIGTERM once it prints ``stop_at``."""
    with subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        try:
            said = ""
            for line in process.stdout or ():
                said += line
                if stop_at and stop_at in line:
                    process.send_signal(signal.SIGTERM)
                    stop_at = ""
        except BaseException:
            process.terminate()  # its stage gets the signal too
            raise
    return process.returncode, said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, str]:
    """Where a model was trained, and what three calls of one command said: one stopped in the VAE, one that went on to
    the end, and one that found nothing left to do."""
    root = tmp_path_factory.mktemp("train")
    command = words(root, draw_shapes(root / "shapes", 64, COLOURS), "--length", LENGTH)
    status, stopped = say(command, stop_at="VAE:")
    assert status == 143, stopped
    status, continued = say(command)
    assert status == 0, continued
    with contextlib.redirect_stdout(io.StringIO()) as again:  # in this process: no stage is left to run in another
        assert train.main(command) == 0
    return root, stopped, continued, again.getvalue()


def test_the_same_command_goes_on(finished: tuple[Path, str, str, str]) -> None:
    root, stopped, continued, again = finished
    assert "stopped in vae; the same command continues" in stopped and "released to" in stopped
    assert "== clip: done already" in continued and "== report: python evaluate.py report" in continued
    for stage in ("clip", "vae", "unet", "guidance", "correction", "report"):
        assert f"== {stage}: done already" in again
    assert {"clip", "vae", "preview", "unet", "correction"} <= set(read_index(root / "models" / "mine")["components"])


def test_the_summary_says_what_it_costs(finished: tuple[Path, str, str, str]) -> None:
    root, stopped, *_ = finished
    found: dict[str, Any] = json.loads((root / "runs" / "mine" / "summary.json").read_text())
    assert found["data"]["count"] == 64 and found["data"]["form"] == "imagefolder"
    assert found["data"]["fingerprint"] in stopped and found["machine"]["precision"] == "fp32"
    assert list(found["parts"]) == ["clip", "vae", "unet", "guidance"] and found["command"]["length"] == float(LENGTH)
    for part in found["parts"].values():
        assert part["parameters"] > 10_000 and part["gflop_per_image"] > 0 and part["seconds"] > 0
        assert part["epochs"] == pytest.approx(part["steps"] * part["batch_size"] / found["data"]["train"], abs=0.1)
        assert part["hours"] == pytest.approx(part["steps"] * part["seconds"] / 3600, abs=1e-4)
    assert found["hours"] > 0 and found["memory_bytes"] > 1e8 and 1e6 < found["disk_bytes"] < found["disk_free_bytes"]


def test_what_is_asked_for_is_generated(finished: tuple[Path, str, str, str]) -> None:
    """After some thirty seconds of training the colour, of two; benchmarks/benchmark_shapes.py counts shapes too."""
    torch.manual_seed(0)
    faces = FaceGenerator.load(finished[0] / "models" / "mine", "cpu", engine="torch")
    found = count_right(faces, [("red", "circle"), ("blue", "square")], each=8, steps=10)
    assert min(colour for colour, _ in found.values()) >= 0.9, found


def test_server_and_page_know_its_words_and_no_sliders(finished: tuple[Path, str, str, str]) -> None:
    model = finished[0] / "models" / "mine"
    assert set(vocabulary_of(model)) == {"a", "circle", "square", *COLOURS}
    faces = FaceGenerator.load(model, "cpu", engine="torch")
    assert faces.info.lacks == {"attributes", "balance", "candidates"} and faces.classifier is None
    told = options(faces.info, vocabulary_of(model))
    assert told["attributes"] == [] and not {"attributes", "balance", "candidates"} & set(told["fields"])


def test_the_report_is_by_its_own_clip(finished: tuple[Path, str, str, str]) -> None:
    folder = finished[0] / "runs" / "mine" / "report"
    found = json.loads((folder / "report.json").read_text())
    assert found["captions"] == len(COLOURS) * 2 and found["chance"] == 0.25 and (folder / "samples.png").is_file()
    assert 0 <= found["alignment"]["generated"]["own_caption_first"] <= 1
    assert found["vae"]["psnr_db"] > 10 and found["frechet_in_own_features"]["generated"] > 0
    assert read_index(finished[0] / "models" / "mine")["metrics"]["alignment"] == found["alignment"]
    assert "| own caption first of 4 (chance 0.250) |" in (folder / "report.md").read_text()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = draw_shapes(tmp_path / "shapes", 24)
    assert train.main(words(tmp_path, source, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "24 images, 20 of them to learn from; imagefolder" in said and "guidance  tiny" in said
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_what_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(SettingError, match="mine is there and no run of train.py made it"):
        train.main(words(tmp_path, tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--data .*empty holds no prepared store and no images"):
        train.main(words(tmp_path, tmp_path / "empty", "--dry-run", "--replace"))
    for more, says in ((("--name", "a/b"), "--name is 'a/b'"), (("--length", "0"), "--length is 0.0")):
        with pytest.raises(SystemExit):
            train.main(words(tmp_path, tmp_path, *more))
        assert says in capsys.readouterr().err


def test_steps_are_timed_and_counted() -> None:
    """A matrix product of known size: 2 * 64 * 32 * 16 operations a step, 64 rows a batch."""
    a, b, taken = torch.ones(64, 32), torch.ones(32, 16), []
    cost = measure_step(TimedStep(lambda: taken.append(a @ b), 7), batch_size=64, budget_s=60)
    assert isinstance(cost, StepCost) and cost.parameters == 7 and len(taken) == 21 and cost.timed_steps == 20
    assert cost.gflop_per_image == pytest.approx(2 * 32 * 16 / 1e9, rel=1e-3)
    assert [duration(hours) for hours in (0.01, 0.5, 12, 100)] == ["36 s", "30 min", "12.0 h", "4.2 days"]


def test_shapes_are_read_from_pixels(tmp_path: Path) -> None:
    """The reader of colours and shapes, on drawings of which both are known."""
    from PIL import Image

    rows = [json.loads(line) for line in (draw_shapes(tmp_path / "s", 64) / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        seen = what_is_shown(np.asarray(Image.open(tmp_path / "s" / row["file_name"])))
        assert row["text"] == "a {} {}".format(*seen)
    assert what_is_shown(np.full((128, 128, 3), 255, np.uint8)) == ("nothing", "nothing")
