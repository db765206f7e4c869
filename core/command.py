"""How does a command of this project begin and end: by which flag, and done, stopped by a signal, or with one sentence?

A script of several commands has a table of them (`Command`): the flag that asks for each, its own options, what runs
it.
Every script ends with ``sys.exit(run_command(main))``. Ctrl-C and SIGTERM end a command at once, except where a
training loop asks for `defer_signals`: then the signal is a wish, which the loop sees in `stop_signal`, saves and ends.
Errors that a person can mend are `UserError`s; they and a full disk are one sentence, everything else keeps its
traceback, because it is a fault of ours. It knows neither training nor data.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

MINIMA: Mapping[str, float] = {  # of numbers that training commands take
    "accumulate": 1, "batch_size": 1, "captions_per_image": 1, "decay_share": 0, "epochs": 0, "favour_times": 1,
    "gan_start": 0, "learning_rate": 0, "log_every": 1, "measure": 1, "n_images": 1, "n_inf_steps": 1,
    "picture_every": 1, "samples": 1, "save_every": 1, "seed": 0, "sharp_times": 1, "steps": 0, "stop_after": 0,
    "stop_at": 1, "validate_every": 1, "warmup_steps": 0,
}
PATIENCE_S = 1.0  # a launcher passes Ctrl-C on to processes that have heard it: the same wish, not a second one


class UserError(Exception):
    """Something that whoever typed the command can mend; the message says what is wrong and what to do."""


class SettingError(UserError, ValueError):
    """The settings of a command do not fit each other, the data or the machine."""


class FolderInUse(UserError, RuntimeError):
    """Another process works in the same folder."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the message says what is kept and how to go on."""

    def __init__(self, signum: int, message: str = "stopped; nothing is lost, the same command begins again") -> None:
        super().__init__(message)
        self.signum = signum


# ------------------------------------------------------------------------------------------------------------- signals


class _Signals:
    """What has been asked of this process, and whether it may wait."""

    def __init__(self) -> None:
        self.requested, self.asked_at, self.patient = 0, 0.0, 0

    def on_signal(self, signum: int, _frame: Any) -> None:
        again = self.requested and time.monotonic() - self.asked_at > PATIENCE_S
        if not self.requested:
            self.requested, self.asked_at = signum, time.monotonic()
            if self.patient:
                # not by print: the loop's progress bar may be in the middle of writing to the same stream
                os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
        if not self.patient or (again and signum == signal.SIGINT):
            raise Interrupted(signum)


_signals = _Signals()


def stop_signal() -> int:
    """The number of the signal that asked a patient command to stop; 0 where none did."""
    return _signals.requested


@contextmanager
def defer_signals(*, then_stop: bool = False) -> Iterator[None]:
    """A signal waits inside. ``then_stop``: it takes effect at the end; otherwise whoever is patient looks for it."""
    signals = _signals  # of this command: another may have begun before a forgotten generator is closed
    signals.patient += 1
    try:
        yield
    finally:
        signals.patient -= 1
    if then_stop and signals.requested and not signals.patient:
        raise Interrupted(signals.requested)


def run_command(main: Callable[[], int]) -> int:
    """Run a script's ``main``; returns the exit status: its own, 1 after an error that can be mended (one sentence goes
    to stderr), 130 after Ctrl-C, 143 after SIGTERM."""
    global _signals
    _signals = _Signals()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, lambda *heard: _signals.on_signal(*heard))
                  for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main()
    except KeyboardInterrupt as error:
        number = error.signum if isinstance(error, Interrupted) else int(signal.SIGINT)
        text = str(error) if isinstance(error, Interrupted) else str(Interrupted(number))
        if text:
            print(f"\n{text}", file=sys.stderr, flush=True)
        return 128 + number
    except BrokenPipeError:  # whoever read what is printed has gone: nothing is wrong, and nobody listens
        sys.stdout = open(os.devnull, "w")
        return 1
    except (UserError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; this module stays free of torch
            raise
        print(f"error: {' '.join(str(error).split())[:300]}; lower --batch-size, or raise --accumulate where there is "
              "one", file=sys.stderr, flush=True)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals = _Signals()


# ----------------------------------------------------------------------------------------------------------- arguments


def check_numbers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage message where a number of the command line is too small to mean anything."""
    for name, least in MINIMA.items():
        value = getattr(options, name, None)
        if isinstance(value, (int, float)) and not value >= least:  # NaN is not
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least {least:g}")
    for name in ("decay_share", "gan_start", "caption_dropout"):
        value = getattr(options, name, None)
        if value is not None and not 0 <= value <= 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it is a share, from 0 to 1")


@dataclass(frozen=True)
class Command:
    """One thing that a script does.

    flag: what is typed to ask for it, "--train" or "--distill guidance". purpose: for --help. add_options: adds to a
    parser the options that this command takes, and no others. run: does it. check: ends with a usage message where
    options do not fit each other, and fills in what they leave open.
    """

    flag: str
    purpose: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], object]
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] = lambda parser, args: None

    def parser(self) -> argparse.ArgumentParser:
        """What reads the words after the flag."""
        name = f"{Path(sys.argv[0]).name} {self.flag}"
        parser = argparse.ArgumentParser(prog=name, description=self.purpose, allow_abbrev=False)
        self.add_options(parser)
        return parser

    def place(self, words: Sequence[str]) -> slice | None:
        """Where a command line asks for it."""
        own = self.flag.split()
        starts = range(len(words) - len(own) + 1)
        return next((slice(i, i + len(own)) for i in starts if list(words[i : i + len(own)]) == own), None)


def run_one(purpose: str, commands: Sequence[Command], argv: Sequence[str] | None,
            elsewhere: Mapping[str, str] | None = None) -> int:
    """Run the one command of a script that its command line asks for; returns the exit code.

    ``elsewhere`` names other scripts that answer a flag: "--distill" -> "distill" gives the whole command line to the
    ``main`` of distill.py. Ends as argparse does where no command is asked for, or two, or where an option is another
    command's.
    """
    words = [part for word in (sys.argv[1:] if argv is None else argv)
             for part in (word.split("=", 1) if any(word.startswith(f"{c.flag.split()[0]}=") for c in commands)
                          else [word])]
    found = [(command, place) for command in commands if (place := command.place(words)) is not None]
    others = [flag for flag in elsewhere or {} if flag in [word.split("=")[0] for word in words]]
    flags = [*(command.flag for command in commands), *(elsewhere or {})]
    if len(found) == 0 and len(others) == 1 and elsewhere is not None:
        return int(importlib.import_module(elsewhere[others[0]]).main(words))
    if len(found) != 1 or others:
        table = "".join(f"  {command.flag:24} {command.purpose}\n" for command in commands)
        table += "".join(f"  {flag:24} see {script}.py --help\n" for flag, script in (elsewhere or {}).items())
        parser = argparse.ArgumentParser(description=purpose, usage="%(prog)s COMMAND [OPTION ...]", allow_abbrev=False,
                                         formatter_class=argparse.RawDescriptionHelpFormatter,
                                         epilog=f"commands (COMMAND --help lists the options of one):\n{table}")
        if not found and not others and {"-h", "--help"} & set(words):
            parser.print_help()
            return 0
        parser.error(f"give one of {', '.join(flags)}" + (", not several" if found else ""))
    command, place = found[0]
    parser = command.parser()
    words = [*words[: place.start], *words[place.stop :]]
    for word in parser.parse_known_args(words)[1]:
        name = word.split("=")[0]
        takers = [one.flag for one in commands if name.startswith("-") and name in one.parser().format_help().split()]
        if takers:
            parser.error(f"{name} belongs to {', '.join(takers)}")
    args = parser.parse_args(words)
    check_numbers(parser, args)
    command.check(parser, args)
    command.run(args)
    return 0


# --------------------------------------------------------------------------------------------------------------- locks


class FolderLock:
    """Holds a folder for one process at a time. The system lets go of it when the process ends, however it ends.

    A process that has a folder may take it again. The file stays: to remove it would let a third process lock another
    file of the same name.
    """

    _held: ClassVar[dict[Path, tuple[Any, int]]] = {}  # what this process has: the open file, and how many times

    def __init__(self, folder: str | Path, doing: str, *, wait: bool = False) -> None:
        self.folder, self.doing, self.wait = Path(folder), doing, wait

    def __enter__(self) -> FolderLock:
        """Raises FolderInUse where another process has it, or, with ``wait``, waits until it lets go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder.resolve()
        file, times = self._held.get(place) or (open(place / ".lock", "a+b"), 0)
        try:
            while not times and not _lock(file):
                if not self.wait:
                    raise FolderInUse(f"another process is {self.doing} in {self.folder}; wait until it ends, or name "
                                      "another folder")
                time.sleep(0.2)
        except BaseException:
            file.close()
            raise
        self._held[place] = file, times + 1
        self._place = place
        return self

    def __exit__(self, *_: object) -> None:
        file, times = self._held.pop(self._place)
        if times > 1:
            self._held[self._place] = file, times - 1
        else:
            file.close()  # which unlocks


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Keep a run's folder for this run; of several processes of one run, the first keeps it for all."""
    ranks = [os.environ[name] for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
             if name in os.environ]
    with FolderLock(folder, "training") if ranks[:1] in ([], ["0"]) else nullcontext():
        yield


def alone(train: Callable[[argparse.Namespace], Any]) -> Callable[[argparse.Namespace], None]:
    """``train``, in a run's folder (``args.run``) in which no other process trains."""

    def run(args: argparse.Namespace) -> None:
        with run_lock(args.run):
            train(args)

    return run


def _lock(file: Any) -> bool:
    """Whether this process now holds the file; systems without file locks say yes."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a network disk without locks: better unguarded than unusable
        return True
    return True
