"""Where does a finished run put its component, and may it stand there?

A run releases into `models/<name of the run>` unless it is told another folder, and replaces a component that is there
only when it is told so, or when it made that component itself. So a first try never changes a model that draws. It does
not know networks or data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.nn.checkpoint import INDEX, ModelFolderError, read_index, write_json

BUNDLED = "models/celeba128"  # what commands read that change nothing
RECORD = "released.json"  # in the folder of a run: what it has released
STAND_ON = {  # which components no longer fit when another takes the place of this one
    "clip": ("unet", "turbo", "emphasis", "correction", "stylegan"),
    "vae": ("unet", "turbo", "preview", "correction", "stylegan"),
    "unet": ("turbo", "emphasis", "correction"),
    "stylegan": ("style_directions",),
}


def add_release_options(parser: argparse.ArgumentParser, read_too: str = "") -> None:
    """`--model` and `--replace`, in the same words for every command."""
    parser.add_argument("--model", help=f"model folder to release to{read_too} (default: models/<name of the run>)")
    parser.add_argument("--replace", action="store_true", help="replace the component in the model folder")


def fill_model(args: argparse.Namespace) -> None:
    """The model folder of a run that names none: `models/<name of the run>`."""
    if args.model is None:
        args.model = str(Path("models") / Path(args.run).name)


def check_release(folder: str | Path, component: str, *, replace: bool, run: str | Path | None = None) -> None:
    """Raises ModelFolderError where ``folder`` holds this component already, unless the run itself released it there or
    ``replace`` was asked for."""
    folder = Path(folder)
    known = read_index(folder)["components"] if (folder / INDEX).exists() else {}
    kept = folder / component / "config.json"
    if replace or component not in known and not kept.exists():
        return
    mine = () if run is None else _released(Path(run)).get(component, ())
    if component in known and known[component]["sha256"] in mine:
        return
    others = [name for name in STAND_ON.get(component, ()) if name in known or (folder / name).is_dir()]
    fit = f", on which its {' and '.join(others)} depend{'s' * (len(others) == 1)}" if others else ""
    raise ModelFolderError(f"{folder} holds a trained {component}{fit}: name another folder with --model, or replace "
                           "it with --replace")


@contextmanager
def releasing(folder: str | Path, component: str, *, replace: bool, run: str | Path) -> Iterator[None]:
    """Around the writing of a component: checks once more, and notes in the run's folder what it released."""
    check_release(folder, component, replace=replace, run=run)
    yield
    released = _released(Path(run))
    digest = str(read_index(folder)["components"][component]["sha256"])
    mine = [*dict.fromkeys([*released.get(component, ()), digest])]
    write_json(Path(run) / RECORD, {**released, component: mine})


def _released(run: Path) -> dict[str, list[str]]:
    """What a run has released: component -> hashes. Nothing where the note is absent or damaged."""
    try:
        found = json.loads((run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
