"""Do command lines of evaluate.py mean what they meant, and has each command its own options alone?"""

from __future__ import annotations

import pytest

import evaluate
from core.evaluation.command_line import COMMAND_OF, COMMANDS, NEEDED, OPTIONS, parse, with_command


@pytest.mark.parametrize(("old", "new"), [
    ([], ["report"]),
    (["--model", "m", "--quick"], ["report", "--model", "m", "--quick"]),
    (["--help"], ["--help"]),
    (["outside", "--setup"], ["outside", "--setup"]),
    (["--bench"], ["benchmark"]),
    (["--bench", "--record"], ["benchmark", "--record"]),
    (["--model", "m", "--bench", "speed", "--bench-steps", "9"],
     ["benchmark", "speed", "--model", "m", "--bench-steps", "9"]),
    (["--sliders", "--record"], ["sliders", "--record"]),
    (["--sliders", "Smiling,Bald", "--samples", "6"], ["sliders", "Smiling,Bald", "--samples", "6"]),
    (["--sliders=Smiling"], ["sliders", "Smiling"]),
    (["--watermark", "--pool", "9"], ["watermark", "--pool", "9"]),
    (["--split", "val", "--fit-emphasis", "--model", "m"], ["fit-prompt-rewriting", "--split", "val", "--model", "m"]),
    (["--fit-sharpness", "--guidance", "2.5"], ["fit-sharpness", "--guidance", "2.5"]),
    (["--fit-correction", "--model", "m"], ["fit-correction", "--model", "m"]),
    (["--fit-correction", "3,2", "--model", "m"], ["fit-correction", "3,2", "--model", "m"]),
    (["--build-nearest"], ["index-training-images"]),
    (["--train-judge", "--epochs", "2"], ["train-classifier", "--epochs", "2"]),
    (["--sliders", "--watermark"], ["sliders", "--watermark"]),  # two commands: the second is no option of the first
])  # fmt: skip
def test_old_command_lines_name_their_command(old: list[str], new: list[str]) -> None:
    assert with_command(old) == new


def test_every_command_is_there_and_has_options_that_are_explained() -> None:
    assert set(COMMANDS) == set(evaluate.COMMANDS)
    assert {command for command, _ in COMMAND_OF.values()} <= set(COMMANDS)
    used = {name for _, options in COMMANDS.values() for name in options}
    assert used == set(OPTIONS) and all(how["help"] for how in OPTIONS.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(name in said for name in COMMANDS[command][1] if name.startswith("--"))


def test_options_have_the_defaults_of_their_command() -> None:
    def of(*words: str) -> dict[str, object]:
        return vars(parse("", words)[1])

    assert (of("sliders")["samples"], of("sliders")["out"], len(of("sliders")["names"])) == (12, "docs", 40)  # type: ignore[arg-type]
    assert of("fit-correction", "--model", "m")["counts"] == (2, 4, 8, 16, 50)
    assert of("fit-correction", "4,2", "--model", "m")["counts"] == (4, 2)
    assert of("--fit-emphasis", "--model", "m")["split"] == "val"
    assert (of("--bench", "speed", "--bench-steps", "9")["steps"], of("benchmark")["section"]) == (9, "all")
    assert of("outside", "--steps", "50", "4")["steps"] == [50, 4]
    assert of("--train-judge", "--run-folder", "runs/x")["run"] == "runs/x"
    assert "samples" not in of("report"), "those of --quick or of the whole report, unless they were given"
    assert of("--samples", "5", "--curve-steps", "2,4")["curve_steps"] == (2, 4)


@pytest.mark.parametrize("command", [name for name, (_, options) in COMMANDS.items() if NEEDED in options.values()])
def test_what_changes_something_must_be_told_what(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([command])
    said = capsys.readouterr().err
    assert "changes a trained model: say which, with --model FOLDER" in said


@pytest.mark.parametrize("words", [
    ["watermark", "--guidance", "2"], ["sliders", "--data", "x"], ["benchmark", "--samples", "4"], ["report", "speed"],
    ["--sliders", "--watermark"], ["nothing"], ["--quick", "--samp", "4"], ["outside", "--n", "1"],
])  # fmt: skip
def test_options_of_other_commands_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main(words)
    assert ended.value.code == 2
