"""Do the curves of a run go where they were asked to go, and nowhere else?"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

from core.command import SettingError
from core.training.run_folder import RunFolder
from core.training.trackers import Trackers, add_report_to, tracker_names

HAS_WANDB = importlib.util.find_spec("wandb") is not None


def test_names_are_read_and_checked() -> None:
    parser = argparse.ArgumentParser()
    add_report_to(parser)
    assert parser.parse_args([]).report_to == ("tensorboard",)
    assert parser.parse_args(["--report-to", "none"]).report_to == ()
    assert tracker_names("tensorboard, tensorboard") == ("tensorboard",)
    for text in ("paper", "none,tensorboard"):
        with pytest.raises(argparse.ArgumentTypeError, match="give tensorboard, wandb"):
            tracker_names(text)


@pytest.mark.parametrize(("names", "there"), [((), False), (("tensorboard",), True)])
def test_a_run_writes_events_only_where_asked(tmp_path: Path, names: tuple[str, ...], there: bool) -> None:
    run = RunFolder(tmp_path, {}, {}, 2, 0.5, report_to=names)
    run.log(1, {"loss": 0.5})
    run.finish()
    run.log(2, {"loss": 0.25})  # opened again after it was closed
    run.finish()
    assert bool(list(tmp_path.glob("tensorboard/events.*"))) is there
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0.5, 0.25]


@pytest.mark.skipif(HAS_WANDB, reason="the package wandb is installed here")
def test_wandb_that_is_not_installed_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="pip install wandb"):
        tracker_names("tensorboard,wandb")
    with pytest.raises(SettingError, match="pip install wandb"):
        Trackers(tmp_path, ("wandb",), {}).log(1, {"loss": 0.5})


@pytest.mark.skipif(not HAS_WANDB, reason="the package wandb is not installed here")
def test_wandb_keeps_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import PartialState

    monkeypatch.delenv("WANDB_MODE", raising=False)
    PartialState()  # a training has one by then
    assert tracker_names("wandb") == ("wandb",)
    trackers = Trackers(tmp_path, ("wandb",), {"width": 2})
    trackers.log(1, {"loss": 0.5})
    trackers.log(2, {"loss": 0.25})
    trackers.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))[0].stat().st_size > 0
