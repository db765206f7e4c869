"""Is the project's own Python environment complete, and how is it made so?

`prepare` makes `.venv`, installs the pinned requirements with pip's own progress in sight, proves that they import, and
leaves a stamp, so that the next call takes milliseconds. Whatever fails is a `Problem`: one sentence with its remedy.
It does not know what the environment is for.

Runs before anything is installed: standard library only, and no syntax newer than Python 3.7, so that a Python which is
too old gets a sentence instead of a SyntaxError.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from core.process import TOGETHER, Problem, clean_env, venv_python

OLDEST, NEWEST = (3, 10), (3, 13)  # the pinned packages have wheels for these, and only these
RANGE = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
REQUIREMENTS, WORKER_REQUIREMENTS, TEST_REQUIREMENTS = (
    "requirements.txt", "requirements-workers.txt", "tests/requirements.txt")
STAMP = "start.json"  # inside .venv: hashes of the requirement files that were installed
TORCH_INDEX = "https://download.pytorch.org/whl/"  # + cpu, cu130, ...: other builds of the same versions
GIB = 1024**3
DISK_NEEDED = {True: 8 * GIB, False: 3 * GIB}  # with and without the CUDA libraries that torch brings on Linux
TORCH_PAIR = ("torch", "torchvision")  # one is compiled against the other
NEEDED_MODULES = ("_ssl", "_sqlite3")  # parts of Python that one built from source may lack
IMPORT_NAMES = {"pillow": "PIL"}  # where the module is not called like the package
NO_NETWORK = (
    "NewConnectionError|NameResolutionError|name resolution|getaddrinfo|Failed to resolve|Network is unreachable"
    "|ConnectTimeout|Read timed out|ReadTimeoutError|ProxyError|ConnectionResetError|Connection refused"
)


# ---- which Python ----------------------------------------------------------------------------------------------------


def python_problem(version: tuple[int, int]) -> str | None:
    """The sentence for a Python outside the supported range, None inside it."""
    if OLDEST <= version <= NEWEST:
        return None
    age = "too old" if version < OLDEST else "newer than the pinned packages support"
    return (
        f"Python {version[0]}.{version[1]} is {age}: install Python {RANGE} from https://www.python.org/downloads/ "
        "and start again with that one."
    )


def python_version(executable: str | Path) -> tuple[int, int] | None:
    """Version of an interpreter that really runs; None for a missing or broken one."""
    command = [str(executable), "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        major, minor = answer.stdout.split()
        return int(major), int(minor)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def other_python(root: Path) -> str | None:
    """A supported Python beside this one: the environment's own, else the newest of those on PATH."""
    on_path = [shutil.which(f"python3.{minor}") for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    for found in (str(venv_python(root)), *on_path):
        version = python_version(found) if found else None  # a version manager's shim may exist and not run
        if version and not python_problem(version):
            return found
    return None


def pins(file: Path) -> dict[str, str]:
    """Package -> version of every `name==version` line of a requirements file.

    A line with a condition (`; platform_machine == ...`) is for pip alone: this machine may not fulfil it.
    """
    text = file.read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)(?=[ \t]*(?:#|$))", text, flags=re.MULTILINE))


def torch_pins(root: Path) -> list[str]:
    """The two packages that must come from one index, as words for pip."""
    return [f"{name}=={version}" for name, version in pins(root / REQUIREMENTS).items() if name in TORCH_PAIR]


def canonical(name: str) -> str:
    """A package's name as indexes compare it.
    https://packaging.python.org/en/latest/specifications/name-normalization/"""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(root: Path) -> dict[str, str]:
    """Package -> version as found on disk in .venv (folder names only, so that it costs milliseconds)."""
    found = {}
    for pattern in ("lib/python*/site-packages/*.dist-info", "Lib/site-packages/*.dist-info"):
        for info in (root / ".venv").glob(pattern):
            name, _, version = info.name[: -len(".dist-info")].partition("-")
            if (info / "METADATA").is_file():  # an interrupted removal leaves the folder without it
                found[canonical(name)] = version
    return found


def hashes(root: Path, files: tuple[str, ...]) -> dict[str, str]:
    """What the stamp must say for these requirement files to count as installed."""
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in files}


def read_stamp(root: Path) -> dict[str, str]:
    """The stamp left by the last complete installation; {} when there is none or it cannot be read."""
    try:
        stamp = json.loads((root / ".venv" / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def incomplete(root: Path, files: tuple[str, ...] = (REQUIREMENTS,)) -> str | None:
    """Why the environment needs (another) installation; None when it is complete."""
    version = python_version(venv_python(root))
    if version is None:
        there = (root / ".venv").exists()
        return "the environment in .venv does not run" if there else "there is no environment in .venv yet"
    if python_problem(version):
        return f"the environment in .venv has Python {version[0]}.{version[1]}"
    have, stamp = installed(root), read_stamp(root)
    for name, digest in hashes(root, files).items():
        for package, pinned in pins(root / name).items():
            got = have.get(canonical(package))
            if got is None:
                return f"{package} {pinned} is missing"
            if got.split("+")[0] != pinned:  # 2.14.1+cpu is a build of 2.14.1
                return f"{package} {pinned} is wanted and {got} is there"
        if stamp.get(name) != digest:
            return f"{name} is new or has changed"
    return None


def nvidia_gpus() -> list[str]:
    """The names of the GPUs that an NVIDIA driver answers for."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "-L"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", answer.stdout, flags=re.MULTILINE)


def torch_cuda_build(root: Path) -> str | None:
    """The CUDA that the torch in .venv was built for, None for a CPU build; importing torch to ask takes seconds."""
    for pattern in ("lib/python*/site-packages/torch/version.py", "Lib/site-packages/torch/version.py"):
        for file in (root / ".venv").glob(pattern):
            cuda = re.search(r"^cuda\b.*=\s*'([\d.]+)'", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            return cuda.group(1) if cuda else None
    return None


# ---- make it ---------------------------------------------------------------------------------------------------------


def make_venv(root: Path) -> None:
    """Create .venv, or create it again where it no longer runs (the system's Python was upgraded, the folder moved).

    Raises: Problem when the folder belongs to something else, or this Python cannot make environments.
    """
    folder = root / ".venv"
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
        raise Problem(f"{folder} exists but is no virtual environment: move it away and start again.")
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        raise Problem(
            f"This Python cannot make virtual environments: on Debian or Ubuntu run 'sudo apt install {package}', "
            "elsewhere install Python from https://www.python.org/downloads/."
        )
    lacking = [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if lacking:
        words = " and ".join(name.lstrip("_") for name in lacking)
        raise Problem(
            f"This Python was built without {words}: install Python {RANGE} from https://www.python.org/downloads/ and "
            "start again with that one."
        )
    base = getattr(sys, "_base_executable", None) or sys.executable  # not the very .venv that is being replaced
    if subprocess.call([base, "-m", "venv", "--clear", str(folder)], stdin=subprocess.DEVNULL) != 0:
        raise Problem(f"{folder} could not be made (the reason is above): check that this folder may be written to.")


def run_showing(command: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run a command with its progress in plain sight; returns the exit status and the end of what it said on stderr."""
    last: collections.deque[str] = collections.deque(maxlen=400)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, env=env, text=True, errors="replace", **TOGETHER
    ) as process:
        for line in process.stderr or ():
            last.append(line)
            print(line, end="", file=sys.stderr, flush=True)
    return process.returncode, "".join(last)


def explain_install(said: str) -> str:
    """One sentence for what pip said before it failed."""
    if re.search("No space left on device|Errno 28|not enough space", said):
        return "The disk is full: free some gigabytes and start again (what was downloaded is kept)."
    if re.search("CERTIFICATE_VERIFY_FAILED|SSLError", said):
        return (
            "The package index could not be trusted (TLS certificate): set PIP_CERT to your organisation's certificate "
            "file and start again."
        )
    if re.search(NO_NETWORK, said):
        return (
            "The packages could not be downloaded, no network: connect to the internet (or set HTTPS_PROXY) and start "
            "again (what was downloaded is kept)."
        )
    if re.search("Permission denied|Errno 13|WinError 5", said):
        return (
            "The packages could not be written to .venv: end programs that use it, own the folder, and start again."
        )
    package = re.search("No matching distribution found for ([^ \n]+)", said)
    if package:
        machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
        return (
            f"There is no ready build of {package.group(1)} for this machine ({machine}): use a 64-bit Python {RANGE} "
            "on Linux, Windows, or a Mac with Apple silicon."
        )
    return "The packages could not be installed (pip's reason is above): delete the folder .venv and start again."


def prepare(
    root: Path, *, tests: bool = False, workers: bool = False, offline: bool = False, torch_index: str | None = None
) -> None:
    """Make the environment complete; instant when the stamp and the versions on disk agree with the requirements.

    `workers` adds what a broker needs, `tests` that and what the tests need.
    `torch_index` is a package index that holds another build of the pinned torch and torchvision.
    Raises: Problem with one sentence when it cannot.
    """
    files = (REQUIREMENTS, *((WORKER_REQUIREMENTS,) if workers or tests else ()),
             *((TEST_REQUIREMENTS,) if tests else ()))
    why = incomplete(root, files)
    if why is None:
        return
    if offline:
        raise Problem(f"The environment is not ready ({why}) and --offline forbids downloads: start once without it.")
    began = time.monotonic()
    print(f"Preparing the environment, once: {why}.", flush=True)
    if torch_pins(root) and "torch" not in installed(root):
        check_download(root, torch_index)
    version = python_version(venv_python(root))
    if version is None or python_problem(version):
        make_venv(root)
    with contextlib.suppress(FileNotFoundError):
        (root / ".venv" / STAMP).unlink()  # an interrupted installation must not look complete
    # only wheels: a compiler's error is no message for a person
    pip = [str(venv_python(root)), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["--only-binary", ":all:"]
    commands = [pip + [word for name in files for word in ("-r", str(root / name))]]
    if torch_index:
        commands.insert(0, [*pip, "--index-url", torch_index, *torch_pins(root)])
    for command in commands:
        status, said = run_showing(command, clean_env())
        if status != 0:
            raise Problem(explain_install(said))
    print("Installed. Importing everything once, to see that it works here ...", flush=True)
    problems = import_problems(root, probe(root))
    if problems:
        raise Problem(problems[0])
    (root / ".venv" / STAMP).write_text(json.dumps(hashes(root, files), indent=1), encoding="utf-8")
    print(f"The environment is ready, after {time.monotonic() - began:.0f} s.", flush=True)


def check_download(root: Path, torch_index: str | None) -> None:
    """Before gigabytes come over the line: is there room for them, and are they the right ones?"""
    cuda = sys.platform == "linux" and platform.machine() == "x86_64" and "/cpu" not in (torch_index or "")
    free = shutil.disk_usage(root).free
    if free < DISK_NEEDED[cuda]:
        raise Problem(
            f"Only {free / GIB:.1f} GiB are free on the disk of {root} and the packages need "
            f"{DISK_NEEDED[cuda] / GIB:.0f} GiB: free some space and start again."
        )
    if cuda and torch_index is None and not nvidia_gpus():
        print(
            "No NVIDIA GPU answers here. To download about 0.5 GB instead of 3 GB, stop (Ctrl+C) and run\n"
            f"    ./start.py --torch-index {TORCH_INDEX}cpu",
            flush=True,
        )


# ---- prove it --------------------------------------------------------------------------------------------------------


def print_probe(names: list[str]) -> None:
    """Runs inside .venv: import each package and print one JSON line for it, then one for torch's devices.

    A line a package, because an import that kills the process must not take the earlier answers with it.
    """
    import importlib.metadata

    from core.quiet import keep_quiet

    keep_quiet()
    for name in names:
        answer: dict[str, object] = {"package": name, "version": None, "error": None}
        try:
            answer["version"] = importlib.metadata.version(name)
            importlib.import_module(IMPORT_NAMES.get(name, name.replace("-", "_")))
        except Exception as error:  # whatever a broken package raises is the very thing to report
            text = str(error).strip().splitlines()
            answer["error"] = f"{type(error).__name__}: {text[0] if text else ''}"
        print(json.dumps(answer), flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "backends"):  # absent from a half-imported one
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts = {"cuda_build": torch.version.cuda, "cuda": gpus if torch.cuda.is_available() else []}
        facts |= {"mps": torch.backends.mps.is_available(), "threads": torch.get_num_threads()}
        try:
            facts["openvino"] = f"OpenVINO {importlib.import_module('openvino').__version__.split('-')[0]}"
        except Exception as error:  # not for this machine, or broken: both mean that torch draws
            facts["openvino_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps(facts))


def probe(root: Path) -> dict:
    """Ask .venv what it can import: {"packages": {name: {"version", "error"}}, "torch": {...} or None}."""
    names = list(pins(root / REQUIREMENTS))
    here = str(Path(__file__).resolve().parent.parent)
    code = (f"import sys; sys.path.insert(0, {here!r}); from launcher import environment; "
            f"environment.print_probe({names!r})")
    command = [str(venv_python(root)), "-c", code]
    env = clean_env(HF_HUB_OFFLINE="1")
    answer = subprocess.run(command, capture_output=True, text=True, cwd=str(root), env=env, stdin=subprocess.DEVNULL)
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    packages = {line.pop("package"): line for line in lines if "package" in line}
    unasked = [name for name in names if name not in packages]
    if unasked:  # the process died inside the first of them
        status = answer.returncode
        end = f"signal {-status}" if status < 0 else f"exit status {status}"
        packages[unasked[0]] = {"version": None, "error": f"the interpreter died while importing it, {end}"}
    return {"packages": packages, "torch": next((line for line in lines if "cuda_build" in line), None)}


def torch_remedy(root: Path, version: str | None) -> str:
    """The command that puts torch and torchvision back in step, from the index this build of torch came from."""
    build = (version or "").partition("+")[2]
    words = [str(venv_python(Path("."))), "-m pip install --force-reinstall --no-deps", *torch_pins(root)]
    return " ".join(words + ([f"--index-url {TORCH_INDEX}{build}"] if build else []))


def import_problems(root: Path, found: dict) -> list[str]:
    """One sentence with its remedy for each cause that keeps packages from being imported (`found`: from `probe`)."""
    packages = found["packages"]
    absent = [name for name, entry in packages.items() if (entry["error"] or "").startswith("PackageNotFoundError")]
    problems = [f"Not installed: {', '.join(absent)}. Run ./start.py, it installs what is missing."] if absent else []
    again = "delete the folder .venv and run ./start.py"
    for name, entry in packages.items():
        error = entry["error"]
        if not error or name in absent:
            continue
        mismatch = name == "torchvision" and re.search("undefined symbol|lib(cu|torch|nv)", error)
        if mismatch or "torchvision::" in error:
            torch, vision = (packages.get(half, {}).get("version") for half in TORCH_PAIR)
            problems.append(
                f"torchvision {vision} was built for another torch than the {torch} here, probably for CUDA beside a "
                f"CPU-only one ({error.split(': ', 1)[-1]}): mend both with '{torch_remedy(root, torch)}'."
            )
        elif re.search("DLL load failed|WinError 126|WinError 1114", error):
            runtime = "https://aka.ms/vs/17/release/vc_redist.x64.exe"
            problems.append(f"{name} finds no Microsoft Visual C++ runtime: install {runtime} and start again.")
        elif "the interpreter died" in error:
            problems.append(f"{name} is broken ({error}): {again}; if it stays, this processor is too old for it.")
        else:
            problems.append(f"{name} is broken ({error}): {again}.")
    return list(dict.fromkeys(problems))  # one cause often breaks several packages
