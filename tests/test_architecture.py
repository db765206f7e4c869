"""Does the code keep the house's laws: who may import whom, what an import may do, what is never done at all?

Each law is a function from source text to complaints. It is run over every file of the project, and over a few lines
that break it, because a law that cannot complain proves nothing. New files are found by themselves; a new room of core/
must say in ROOMS what it builds on.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {"vae", "discriminator", "train_clip", "conditional_ldm"}
MINIMUM = NETWORKS | {"start", "api", "generator", "evaluate", "dataset"}
MINIMUM |= {f"core.{room}" for room in ("captions", "jobs", "diffusion", "checkpoint", "training")}

# what each room of core/ may build on, beside the standard library and the other rooms
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "core.captions": set(),
    "core.lexicon": set(),
    "core.phrases": set(),
    "core.prompts": set(),
    "core.sentences": set(),
    "core.population": set(),
    "core.sliders": set(),
    "core.jobs": set(),
    "core.store": set(),
    "core.ledger": set(),
    "core.engine": {"numpy"},
    "core.child": set(),
    "core.environment": set(),
    "core.machine": set(),
    "core.disk": set(),
    "core.clock": set(),
    "core.model_check": set(),
    "core.release": set(),
    "core.qr": {"segno"},
    "core.quiet": set(),
    "core.schemas": {"numpy", "pydantic"},
    "core.answers": {"pydantic", "typing_extensions"},
    "core.serializers": set(),
    "core.openapi": {"flask", "pydantic", "werkzeug"},
    "core.reference": {"flask"},
    "core.streams": {"flask"},
    "core.results": {"flask"},
    "core.exchange": {"flask", "numpy"},
    "core.telemetry": {"flask", "prometheus_client"},
    "core.serving": {"flask", "waitress"},
    "core.containers": set(),
    "core.metadata": {"numpy", "PIL"},
    "core.pictures": {"numpy", "PIL"},
    "core.watermark": {"numpy", "PIL"},
    "core.nearest": {"numpy", "torch"},
    "core.jury": {"numpy"},
    "core.submission": set(),
    "core.verification": {"flask", "numpy"},
    "core.endurance": {"numpy", "PIL"},
    "core.animation": {"numpy", "PIL"},
    "core.web": {"flask", "pydantic", "pydantic_core", "werkzeug"},
    "core.cartoons": {"numpy", "PIL"},
    "core.sources": {"numpy", "pandas", "PIL"},
    "core.preparation": {"numpy", "pandas", "PIL"},
    "core.checkpoint": {"numpy", "safetensors", "torch"},
    "core.diffusion": {"diffusers", "numpy", "torch"},
    "core.solvers": {"torch"},
    "core.muon": {"torch"},
    "core.distillation": {"torch"},
    "core.caption_bank": {"numpy", "torch"},
    "core.command": set(),
    "core.arrays": {"numpy"},
    "core.curves": {"matplotlib", "numpy", "PIL"},
    "core.snapshots": {"safetensors", "torch"},
    "core.latents": {"numpy", "torch", "tqdm"},
    "core.training": {"accelerate", "PIL", "torch", "tqdm"},
    "core.preview": {"torch"},
    "core.sharpness": {"numpy", "torch"},
    "core.finishing": {"torch"},
    "core.correction": {"torch"},
    "core.equivariance": {"torch"},
    "core.resolution": {"numpy", "scipy", "torch"},
    "core.emphasis": set(),
    "core.compiled": {"numpy", "openvino", "torch"},
    "core.devices": {"torch"},
    "core.figures": set(),
    "core.bench": {"diffusers", "numpy", "torch"},
    "core.editing": {"numpy", "scipy", "torch"},
    "core.steering": set(),
    "core.response": {"numpy"},
    "core.receipts": {"numpy"},
    "core.metrics": {"numpy", "PIL", "torch", "torchmetrics"},
    "core.judge": {"numpy", "torch"},
    "core.outside_setup": set(),
    "core.outside_weights": {"numpy", "onnx"},
    "core.outside_networks": {"ai_edge_litert", "dlib", "numpy", "onnxruntime", "PIL"},
    "core.outside_judge": {"numpy", "PIL", "scipy"},
    "core.report": {"matplotlib", "numpy", "PIL"},
}
SERVING = {  # what only the server imports, and training can do without
    "api", "core.animation", "core.answers", "core.exchange", "core.openapi", "core.reference", "core.results",
    "core.schemas", "core.serializers", "core.serving", "core.streams", "core.submission", "core.telemetry",
    "core.verification", "core.web",
}
TORCH_FREE = SERVING | {"start", "core", "core.captions", "core.containers", "core.clock", "core.disk", "core.emphasis",
                        "core.engine", "core.environment", "core.jobs", "core.ledger", "core.machine", "core.metadata",
                        "core.pictures", "core.population", "core.receipts", "core.sliders", "core.store",
                        "core.watermark"}
BRINGS_TORCH = {"torch", "torchvision", "torchmetrics", "accelerate", "diffusers", "transformers"}
SERVER = {"flask", "flask_cors", "waitress", "werkzeug", "pydantic", "prometheus_client"}
LONGEST = 600  # lines of a file that needs no defence
GLANCE = 6  # lines of a function that says by itself what it does


# ---- reading source --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported thing: `from a.b import c` is module a.b, name c; `import a.b` has no name."""

    line: int
    module: str
    name: str | None
    at_import_time: bool


@dataclass(frozen=True)
class Source:
    """A module of the project: its dotted name and its text."""

    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(find_imports(self.tree, at_import_time=True))

    def at(self, line: int) -> str:
        return f"{self.module.replace('.', '/')}.py:{line}"


def find_imports(node: ast.AST, *, at_import_time: bool) -> Iterator[Import]:
    """Every import below a node; those in functions happen later, those for type checkers never."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(child.lineno, alias.name, None, at_import_time) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = ("core." if child.level else "") + (child.module or "")  # only core/ is a package
            yield from (Import(child.lineno, module.rstrip("."), alias.name, at_import_time) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (found for other in child.orelse for found in find_imports(other, at_import_time=at_import_time))
        else:
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from find_imports(child, at_import_time=at_import_time and not later)


def project() -> dict[str, Source]:
    """Every module of the project by its dotted name."""
    found = {}
    for path in sorted((*ROOT.glob("*.py"), *ROOT.glob("core/**/*.py"))):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[dotted] = Source(dotted, path.read_text(encoding="utf-8"))
    return found


PROJECT = project()
IS_ROOT = {name for name in PROJECT if name.split(".")[0] != "core"} | MINIMUM - {n for n in MINIMUM if "." in n}


def targets(found: Import) -> set[str]:
    """The project's modules that an import runs: `from core import jobs` runs core and core.jobs."""
    names = {found.module, f"{found.module}.{found.name}"}
    names |= {found.module.rpartition(".")[0]}
    return names & (set(PROJECT) | set(ROOMS) | IS_ROOT)


def third_party(found: Import) -> str | None:
    """The package outside the project and the standard library that an import needs, if any."""
    top = found.module.split(".")[0]
    return None if top in sys.stdlib_module_names or top in IS_ROOT | {"core"} else top


# ---- the laws --------------------------------------------------------------------------------------------------------


def core_never_imports_root(source: Source) -> list[str]:
    if not source.module.startswith("core"):
        return []
    return [f"{source.at(i.line)} imports {i.module}" for i in source.imports if i.module.split(".")[0] in IS_ROOT]


def rooms_stay_in_their_means(source: Source) -> list[str]:
    if not source.module.startswith("core"):
        return []
    if source.module not in ROOMS:
        return [f"{source.module} is a new room: say in ROOMS what it may build on"]
    needs = {package: i.line for i in source.imports if (package := third_party(i))}
    return [f"{source.at(line)} needs {name}" for name, line in needs.items() if name not in ROOMS[source.module]]


def networks_load_without_training(source: Source) -> list[str]:
    """At import time a network takes classes and loaders from another, never its training, never the data."""
    complaints = []
    for found in source.imports if source.module in NETWORKS else ():
        other = found.module.split(".")[0]
        if not found.at_import_time:
            continue
        if other in IS_ROOT - NETWORKS or found.module == "core" and found.name == "training":
            complaints.append(f"{source.at(found.line)} imports {other} at import time")
        elif other in NETWORKS:
            harmless = found.name and (found.name[0].isupper() or found.name.startswith("load_"))
            if not harmless:
                complaints.append(f"{source.at(found.line)} imports {found.name or 'all'} of {other} at import time")
    return complaints


def import_time_closure(start: str, sources: dict[str, Source]) -> dict[str, str]:
    """Every package outside the project that importing `start` brings in, with the module that brings it."""
    seen, waiting, brought = set(), [start], {}
    while waiting:
        module = waiting.pop()
        if module in seen or module not in sources:
            continue
        seen.add(module)
        for found in sources[module].imports:
            if found.at_import_time:
                package = third_party(found)
                if package:
                    brought.setdefault(package, module)
                waiting += targets(found)
    return brought


def errors_are_not_hidden(source: Source) -> list[str]:
    complaints = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else None
            if caught is None:
                complaints.append(f"{source.at(node.lineno)} has a bare except")
            elif caught in ("Exception", "BaseException") and all(isinstance(line, ast.Pass) for line in node.body):
                complaints.append(f"{source.at(node.lineno)} swallows every {caught}")
    return complaints


def public_functions_are_typed_and_told(source: Source) -> list[str]:
    """Hints on every public signature; a docstring on every public class and longer function, and atop the file."""
    complaints = [] if ast.get_docstring(source.tree) else [f"{source.at(1)} has no docstring"]
    scopes = [(source.tree, "")]
    scopes += [(n, n.name + ".") for n in source.tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    for scope, prefix in scopes:
        for node in scope.body:
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if not (is_function or isinstance(node, ast.ClassDef)) or node.name.startswith("_"):
                continue
            name = f"{source.at(node.lineno)} {prefix}{node.name}"
            told = ast.get_docstring(node) or is_function and node.end_lineno - node.lineno < GLANCE
            if not prefix and not told:
                complaints.append(f"{name} has no docstring")
            if is_function:
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bound = bool(prefix) and not any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
                bare = [a.arg for a in arguments[1 if bound else 0 :] if a.annotation is None]
                if bare or node.returns is None:
                    complaints.append(f"{name} lacks hints: {', '.join(bare) or 'what it returns'}")
    return complaints


def long_files_defend_themselves(source: Source) -> list[str]:
    lines = source.text.count("\n")
    if lines <= LONGEST or "Long because" in (ast.get_docstring(source.tree) or ""):
        return []
    return [f"{source.at(lines)}: more than {LONGEST} lines need a 'Long because ...' in the docstring at the top"]


def nothing_is_unpickled_or_evaluated(source: Source) -> list[str]:
    """Weights are safetensors, arrays are .npy, settings are JSON: reading a file never runs code from it."""
    loaders = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    forbidden = {"torch.load", "torch.save", "torch.hub.load", "eval", "exec", "pd.read_pickle", "pandas.read_pickle"}
    complaints = [
        f"{source.at(i.line)} imports {i.module}" for i in source.imports if i.module.split(".")[0] in loaders
    ]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            allows = any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)
            if name in forbidden or allows:
                complaints.append(f"{source.at(node.lineno)} calls {name}")
    return complaints


def randomness_is_passed_in(source: Source) -> list[str]:
    """The libraries' hidden generators are seeded by a command only, or put back afterwards: (seed, step) says all."""
    seeders = {"random.seed", "np.random.seed", "numpy.random.seed", "torch.manual_seed", "torch.seed", "set_seed"}
    seeders |= {"torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "accelerate.utils.set_seed"}
    commands = {"main", "train", "finish"} if source.module in MINIMUM - set(ROOMS) else set()
    scopes = [n for n in source.tree.body if isinstance(n, ast.FunctionDef) and n.name in commands]
    scopes += [n for n in ast.walk(source.tree) if isinstance(n, ast.With) and "fork_rng" in ast.unparse(n.items[0])]
    allowed = {id(node) for scope in scopes for node in ast.walk(scope)}
    return [
        f"{source.at(node.lineno)} seeds with {ast.unparse(node.func)}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in seeders and id(node) not in allowed
    ]


Law = Callable[[Source], list[str]]
BROKEN_BY: dict[Law, tuple[tuple[str, str], ...]] = {
    core_never_imports_root: (
        ("core.training", "import vae"),
        ("core.jobs", "def f():\n    from generator import FaceGenerator"),
    ),
    rooms_stay_in_their_means: (
        ("core.jobs", "import torch"),
        ("core.captions", "def f():\n    import numpy as np"),
        ("core.attic", "import json"),
    ),
    networks_load_without_training: (
        ("vae", "import dataset"),
        ("vae", "from discriminator import train"),
        ("conditional_ldm", "import vae"),
        ("conditional_ldm", "if True:\n    from dataset import FaceStore"),
    ),
    errors_are_not_hidden: (
        ("api", "try:\n    f()\nexcept:\n    raise"),
        ("api", "try:\n    f()\nexcept Exception:\n    pass"),
    ),
    public_functions_are_typed_and_told: (
        ("api", "def f() -> None:\n    '''Told.'''"),  # the file itself is not
        ("api", "'''File.'''\ndef f() -> None:\n" + "    g()\n" * GLANCE),
        ("api", "'''File.'''\ndef f(x) -> None:\n    '''Told.'''"),
        ("api", "'''File.'''\ndef f(x: int):\n    '''Told.'''"),
        ("api", "'''File.'''\nclass A:\n    '''Told.'''\n    def f(self, x) -> None:\n        return"),
        ("api", "'''File.'''\nclass A:\n    pass"),
    ),
    long_files_defend_themselves: (("api", "'''File.'''\n" + "x = 1\n" * LONGEST),),
    nothing_is_unpickled_or_evaluated: (
        ("api", "def f():\n    import pickle"),
        ("api", "torch.load(path, weights_only=True)"),
        ("api", "np.load(path, allow_pickle=True)"),
        ("api", "eval('1')"),
    ),
    randomness_is_passed_in: (
        ("vae", "def build() -> None:\n    torch.manual_seed(0)"),
        ("core.training", "def train() -> None:\n    torch.manual_seed(0)"),
        ("vae", "random.seed(1)"),
    ),
}
ALLOWED_BY: dict[Law, tuple[tuple[str, str], ...]] = {
    core_never_imports_root: (("core.training", "from core import checkpoint"), ("vae", "import discriminator")),
    rooms_stay_in_their_means: (("core.diffusion", "import torch, math"), ("vae", "import anything")),
    networks_load_without_training: (
        ("vae", "def train() -> None:\n    import dataset"),
        ("vae", "from train_clip import CLIP, load_clip"),
        ("vae", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dataset"),
    ),
    errors_are_not_hidden: (("api", "try:\n    f()\nexcept OSError:\n    pass"),),
    public_functions_are_typed_and_told: (("api", "'''File.'''\ndef _f(x):\n    return x"),),
    long_files_defend_themselves: (("api", "'''Long because\nof its subject.'''\n" + "x = 1\n" * LONGEST),),
    nothing_is_unpickled_or_evaluated: (("api", "model.eval()\nnp.load(path, allow_pickle=False)"),),
    randomness_is_passed_in: (
        ("vae", "def main() -> None:\n    torch.manual_seed(0)"),
        ("core.judge", "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)"),
        ("vae", "generator.manual_seed(1)"),
    ),
}


@pytest.mark.parametrize("law", BROKEN_BY, ids=lambda law: law.__name__)
def test_every_file_keeps_the_law(law: Law) -> None:
    complaints = [complaint for source in PROJECT.values() for complaint in law(source)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("law", BROKEN_BY, ids=lambda law: law.__name__)
def test_the_law_can_tell(law: Law) -> None:
    for module, text in BROKEN_BY[law]:
        assert len(law(Source(module, text))) == 1, text
    for module, text in ALLOWED_BY[law]:
        assert law(Source(module, text)) == [], text


def test_torch_stays_out_of_the_door_and_the_queue() -> None:
    complaints = []
    for module in sorted(TORCH_FREE & set(PROJECT)):
        brought = import_time_closure(module, PROJECT)
        complaints += [f"{module} brings {p} by way of {brought[p]}" for p in sorted(BRINGS_TORCH & set(brought))]
    assert not complaints, "\n".join(complaints)


def test_the_closure_follows_imports_and_stops_at_functions() -> None:
    texts = {
        "api": "from core import jobs\ndef f():\n    import diffusers",
        "core": "",
        "core.jobs": "import core.checkpoint",
        "core.checkpoint": "if True:\n    import torch.nn",
    }
    assert import_time_closure("api", {n: Source(n, t) for n, t in texts.items()}) == {"torch": "core.checkpoint"}


def test_start_and_what_it_imports_use_the_standard_library_and_old_syntax() -> None:
    assert import_time_closure("start", PROJECT) == {}
    for module in ("start", "core", "core.child", "core.environment", "core.machine", "core.model_check"):
        ast.parse(PROJECT[module].text, feature_version=(3, 7))
    with pytest.raises(SyntaxError):
        ast.parse("if (x := 1):\n    pass", feature_version=(3, 7))


# ---- what an import does ---------------------------------------------------------------------------------------------

WATCH = '''
import importlib, io, json, logging, multiprocessing, os, random, signal, sys, threading
modules, absent = json.loads(sys.argv[1]), json.loads(sys.argv[2])
root, report = sys.argv[3], {}
sys.path.insert(0, root)
sys.argv = ["program", "--no-such-flag"]  # an import that parses arguments exits here
for name in absent:
    sys.modules[name] = None  # importing it raises ImportError, as where it is not installed
if "torch" not in absent and any(module not in ("api", "start") for module in modules):
    import torch  # its own habits at import are not ours

def state():
    seen = {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "processes": len(multiprocessing.active_children()),
        "arguments": list(sys.argv),
        "environment": dict(os.environ),
        "folder": sorted(os.listdir(".")),
        "logging": [len(logging.getLogger().handlers), logging.getLogger().level],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "random": hash(random.getstate()),
    }
    if "numpy" in sys.modules:
        seen["numpy"] = sys.modules["numpy"].random.get_state()[1].tobytes().hex()
    torch = sys.modules.get("torch")
    if torch:
        seen["torch"] = [torch.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled(),
                         str(torch.get_default_dtype()), torch.cuda.is_initialized()]
    return seen

for module in modules:
    before, said, out, err = state(), io.StringIO(), sys.stdout, sys.stderr
    sys.stdout = sys.stderr = said
    try:
        importlib.import_module(module)
        failed = None
    except BaseException as error:
        failed = f"{type(error).__name__}: {error}"
    finally:
        sys.stdout, sys.stderr = out, err
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    report[module] = {"failed": failed, "said": said.getvalue(), "changed": changed, "torch": "torch" in sys.modules}
print(json.dumps(report))
'''


def watch_imports(modules: list[str], absent: set[str], root: Path, folder: Path) -> dict[str, dict]:
    """Import the modules, one after another, in a fresh process in an empty folder; say what each did besides."""
    command = [sys.executable, "-c", WATCH, json.dumps(modules), json.dumps(sorted(absent)), str(root)]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    return json.loads(answer.stdout)


def complaints_of(report: dict[str, dict]) -> list[str]:
    """What the watched imports did that an import must not do."""
    told = [f"{module}: {entry['failed']}" for module, entry in report.items() if entry["failed"]]
    told += [f"{module} printed {entry['said']!r}" for module, entry in report.items() if entry["said"]]
    return told + [f"{module} changed {what}" for module, entry in report.items() for what in entry["changed"]]


def test_importing_the_server_has_no_side_effects_and_needs_no_torch(tmp_path: Path) -> None:
    modules = sorted(TORCH_FREE & set(PROJECT))
    report = watch_imports(modules, BRINGS_TORCH, ROOT, tmp_path)
    assert set(report) == set(modules)
    assert complaints_of(report) == []


def test_importing_everything_else_has_no_side_effects_and_needs_no_server(tmp_path: Path) -> None:
    served = {name for name in PROJECT if set(import_time_closure(name, PROJECT)) & SERVER}
    modules = sorted(set(PROJECT) - served)
    report = watch_imports(modules, SERVER | {"diffusers"}, ROOT, tmp_path)
    assert set(report) == set(modules)
    assert complaints_of(report) == []
    assert served <= SERVING, "training must not need the server's packages"


def test_the_watch_can_tell(tmp_path: Path) -> None:
    habits = {
        "quiet": "import json",
        "talks": "print('hello')",
        "parses": "import argparse\nargparse.ArgumentParser().parse_args()",
        "starts": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "writes": "open('left.txt', 'w').close()",
        "seeds": "import random\nrandom.seed(1)",
        "logs": "import logging\nlogging.basicConfig()",
        "needs": "import torch",
    }
    (tmp_path / "empty").mkdir()
    for name, text in habits.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    report = watch_imports(list(habits), {"torch"}, tmp_path, tmp_path / "empty")
    told = {name: [line for line in complaints_of({name: entry})] for name, entry in report.items()}
    assert told.pop("quiet") == []
    assert all(told.values()), told


def test_the_house_is_complete() -> None:
    missing = sorted(MINIMUM - set(PROJECT))
    assert not missing, f"not there: {', '.join(missing)}"
