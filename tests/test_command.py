"""Does a command line find its one command, and is everybody told which options belong to it?"""

from __future__ import annotations

import argparse

import pytest

from core.command import Command, run_one

RUN: list[tuple[str, argparse.Namespace]] = []


def teach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--run", "--run-folder", default="runs/x")
    parser.add_argument("--favour", nargs="*", default=[])


def look_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=9)


def positive(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.samples > 100:
        parser.error("that is too many")


COMMANDS = (
    Command("--train", "learn", teach_options, lambda args: RUN.append(("train", args))),
    Command("--distill guidance", "learn from another", teach_options, lambda args: RUN.append(("guidance", args))),
    Command("--eval", "measure", look_options, lambda args: RUN.append(("eval", args)), positive),
)


def asked(*words: str) -> tuple[str, dict[str, object]]:
    RUN.clear()
    assert run_one("Test.", COMMANDS, words) == 0
    ((name, args),) = RUN
    return name, vars(args)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    RUN.clear()
    with pytest.raises(SystemExit) as ended:
        run_one("Test.", COMMANDS, words)
    assert ended.value.code == 2 and not RUN
    return capsys.readouterr().err


def test_a_flag_anywhere_asks_for_its_command_and_gets_its_options_alone() -> None:
    assert asked("--train") == ("train", {"steps": 3, "run": "runs/x", "favour": []})
    assert asked("--steps", "5", "--train", "--run-folder", "r") == ("train", {"steps": 5, "run": "r", "favour": []})
    assert asked("--eval", "--samples=4") == ("eval", {"samples": 4})
    for words in (("--distill", "guidance"), ("--distill=guidance",)):
        assert asked(*words, "--favour", "a", "b")[1]["favour"] == ["a", "b"]


def test_options_of_another_command_are_named_as_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--samples belongs to --eval" in refused(capsys, "--train", "--samples", "4")
    assert "--run belongs to --train, --distill guidance" in refused(capsys, "--eval", "--run", "r")
    assert "unrecognized arguments: --sample" in refused(capsys, "--eval", "--sample", "4")


def test_one_command_is_asked_for_and_its_numbers_make_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one of --train, --distill guidance, --eval" in refused(capsys)
    assert "not several" in refused(capsys, "--train", "--eval")
    assert "give one of" in refused(capsys, "--distill", "speed")
    assert "--samples is 0; it must be at least 1" in refused(capsys, "--eval", "--samples", "0")
    assert "that is too many" in refused(capsys, "--eval", "--samples", "101")


def test_help_lists_the_commands_and_each_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_one("Test.", COMMANDS, ["--help"], elsewhere={"--fly": "plane"}) == 0
    said = capsys.readouterr().out
    assert all(command.purpose in said for command in COMMANDS) and "see plane.py --help" in said
    with pytest.raises(SystemExit) as ended:
        run_one("Test.", COMMANDS, ["--eval", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--samples" in said and "--steps" not in said


def test_another_script_answers_its_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import distill

    monkeypatch.setattr(distill, "COMMANDS", COMMANDS)
    RUN.clear()
    assert run_one("Test.", (COMMANDS[0],), ["--distill", "guidance", "--steps", "7"], {"--distill": "distill"}) == 0
    assert RUN[0][0] == "guidance" and RUN[0][1].steps == 7
    with pytest.raises(SystemExit):
        run_one("Test.", (COMMANDS[0],), ["--distill", "guidance", "--train"], {"--distill": "distill"})
    assert "not several" in capsys.readouterr().err
