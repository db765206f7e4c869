"""Does the code keep the house's laws: who may import whom, what an import may do, what is never done at all?

The direction: base <- nn <- diffusion <- pretrained <- training <- evaluation, and base <- jobs <- workers <- web; the
two branches never meet. The base is what several branches need: `engine`, `text`, `imaging`, and five modules of the
standard library alone: `addresses` (where a server listens), `command` (how a command ends), `disk` (why it refuses),
`process` (a program of another Python, and the sentence when it fails) and `quiet` (which packages may not speak).
`launcher` stands on those too, and only `start.py` on it: so core/ imports neither the root nor the launcher, and what
`api.py`, the benchmark and the attribute classifier from outside share with the launcher is in the base. The launcher
and what it stands on keep Python 3.7's syntax, because `start.py` has to tell an old Python that it is too old;
`command` is for commands of a whole environment and need not.

Each law is a function from source text to complaints. It is run over every file of the project, and over a few lines
that break it, because a law that cannot complain proves nothing. New files are found by themselves.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {"vae", "discriminator", "train_clip", "conditional_ldm", "distill", "dcgan", "stylegan"}
PIXELS = "core.training.augmentation"  # the one module of training that needs nothing that serving has not loaded
MINIMUM = NETWORKS | {"start", "api", "worker", "generator", "evaluate", "dataset"}

# ---- the one law of direction: a module imports its own package, the base, or an earlier package of its own branch
BASE = {"core.engine", "core.addresses", "core.command", "core.disk", "core.process", "core.quiet", "core.text",
        "core.imaging"}
BRANCHES = (("core.nn", "core.diffusion", "core.pretrained", "core.training", "core.evaluation"),
            ("core.jobs", "core.workers", "core.web"))
LAUNCHER = {"launcher", "core.addresses", "core.disk", "core.process", "core.quiet"}  # before anything is installed
# what a package may build on beside the standard library
MEANS: dict[str, set[str]] = {
    "core": set(),
    "core.engine": {"numpy"},
    "core.addresses": set(),
    "core.command": set(),
    "core.disk": set(),
    "core.process": set(),
    "core.quiet": set(),
    "core.text": set(),
    "core.imaging": {"numpy", "PIL"},
    "core.nn": {"numpy", "openvino", "safetensors", "tokenizers", "torch"},
    "core.diffusion": {"diffusers", "numpy", "scipy", "torch"},
    "core.pretrained": {"diffusers", "numpy", "safetensors", "torch", "transformers"},
    "core.training": {"accelerate", "matplotlib", "numpy", "pandas", "PIL", "safetensors", "scipy", "torch", "tqdm"},
    "core.evaluation": {"diffusers", "matplotlib", "numpy", "PIL", "scipy", "torch", "torchmetrics", "torchvision",
                        "tqdm", "ai_edge_litert", "dlib", "onnx", "onnxruntime"},  # these in their own environment
    "core.jobs": {"numpy"},
    "core.workers": {"celery", "kombu", "numpy", "redis"},
    "core.web": {"flask", "numpy", "prometheus_client", "pydantic", "pydantic_core", "typing_extensions", "waitress",
                 "werkzeug"},
    "launcher": set(),
}
# modules, or packages of them
WITHOUT_TORCH = {"start", "api", "model_loading", "worker", "core", *BASE, *BRANCHES[1], "launcher"}
BRINGS_TORCH = {"torch", "torchvision", "torchmetrics", "accelerate", "diffusers", "transformers"}
BROKER = {"celery", "kombu", "redis"}  # of workers on other machines alone
SERVER = {"flask", "flask_cors", "waitress", "werkzeug", "pydantic", "prometheus_client"}
READS_PICKLES = "core.pretrained.recognition"  # with torch's restricted unpickler: other people's .ckpt files
LONGEST, LONGEST_IN_CORE = 600, 400  # lines of a file that needs no defence
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
            module = "." * child.level + (child.module or "")
            yield from (Import(child.lineno, module, alias.name, at_import_time) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (found for other in child.orelse for found in find_imports(other, at_import_time=at_import_time))
        else:
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from find_imports(child, at_import_time=at_import_time and not later)


def project() -> dict[str, Source]:
    """Every module of the project by its dotted name."""
    found = {}
    for path in sorted((*ROOT.glob("*.py"), *ROOT.glob("core/**/*.py"), *ROOT.glob("launcher/*.py"))):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[dotted] = Source(dotted, path.read_text(encoding="utf-8"))
    return found


PROJECT = project()
IS_ROOT = {name for name in PROJECT if name.split(".")[0] not in ("core", "launcher")} | MINIMUM


def targets(found: Import, among: Mapping[str, Source] = PROJECT) -> set[str]:
    """The project's modules that an import runs: `from core.jobs import queue` runs core, core.jobs and its queue."""
    whole = f"{found.module}.{found.name}" if found.name else found.module
    parts = whole.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & set(among)


def third_party(found: Import) -> str | None:
    """The package outside the project and the standard library that an import needs, if any."""
    top = found.module.split(".")[0]
    return None if top in sys.stdlib_module_names or top in IS_ROOT | {"core", "launcher"} else top


def package_of(module: str) -> str:
    """The package of a module, or the base module itself: core.web.routes.images is of core.web."""
    return "launcher" if module.split(".")[0] == "launcher" else ".".join(module.split(".")[:2])


def within(module: str, packages: set[str]) -> bool:
    return module in packages or package_of(module) in packages


# ---- the laws --------------------------------------------------------------------------------------------------------


def arrows_point_one_way(source: Source) -> list[str]:
    """core/ and launcher/ never import the root, and within them the branches run from the base outwards."""
    mine = package_of(source.module)
    if source.module in IS_ROOT:
        complaints = source.module != "start" and source.imports or ()
        return [f"{source.at(i.line)} imports {i.module}: only start.py does" for i in complaints
                if i.module.split(".")[0] == "launcher"]
    may = LAUNCHER if mine == "launcher" else {mine, *BASE}
    for branch in BRANCHES:
        if mine in branch:
            may |= set(branch[: branch.index(mine)])
    complaints = []
    for found in source.imports:
        top = found.module.split(".")[0]
        other = f"core.{found.name}" if found.module == "core" else package_of(found.module)
        if top in IS_ROOT or found.module.startswith(".") or top in ("core", "launcher") and other not in may:
            complaints.append(f"{source.at(found.line)} imports {found.module}; {mine} may import {sorted(may)}")
    return complaints


def packages_stay_in_their_means(source: Source) -> list[str]:
    if source.module in IS_ROOT:
        return []
    package = package_of(source.module)
    if package not in MEANS:
        return [f"{package} is a new package: say in MEANS what it may build on, and its place in BASE or BRANCHES"]
    needs = {name: i.line for i in source.imports if (name := third_party(i))}
    return [f"{source.at(line)} needs {name}" for name, line in needs.items() if name not in MEANS[package]]


def packages_only_say_what_they_answer(source: Source) -> list[str]:
    """The __init__.py of a package is a question; importing one module never runs another."""
    if source.module not in {name.rpartition(".")[0] for name in PROJECT} - {""}:
        return []
    question = ast.get_docstring(source.tree) or ""
    is_question = len(source.tree.body) == 1 and "?" in question
    return [] if is_question else [f"{source.module} is more than a question in a docstring"]


def cycles(sources: Mapping[str, Source]) -> list[str]:
    """Every circle of imports, lazy ones included, as "a -> b -> a"; a package that runs before its module is none."""
    arrows = {
        name: {t for i in source.imports for t in targets(i, sources) if t != name and not name.startswith(t + ".")
               and not any(other.startswith(t + ".") for other in sources)}
        for name, source in sources.items()
    }
    found, done = [], set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for other in sorted(arrows[name]):
                walk(other, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        walk(name, ())
    return found


def networks_load_without_training(source: Source) -> list[str]:
    """At import time a network takes classes and loaders from another, never its training, never the data."""
    complaints = []
    for found in source.imports if source.module in NETWORKS else ():
        other = found.module.split(".")[0]
        if not found.at_import_time:
            continue
        above = found.module.startswith(("core.training", "core.evaluation")) and found.module != PIXELS
        if other in IS_ROOT - NETWORKS or above:
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
                waiting += targets(found, sources)
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
    lines, most = source.text.count("\n"), LONGEST if source.module in IS_ROOT else LONGEST_IN_CORE
    if lines <= most or "Long because" in (ast.get_docstring(source.tree) or ""):
        return []
    return [f"{source.at(lines)}: more than {most} lines need a 'Long because ...' in the docstring at the top"]


def nothing_is_unpickled_or_evaluated(source: Source) -> list[str]:
    """Weights are safetensors, arrays are .npy, settings are JSON: reading a file never runs code from it. Weights of
    others may be pickles: one module has torch read them with `weights_only=True`, which knows tensors alone."""
    loaders = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    forbidden = {"torch.load", "torch.save", "torch.hub.load", "eval", "exec", "pd.read_pickle", "pandas.read_pickle"}
    complaints = [
        f"{source.at(i.line)} imports {i.module}" for i in source.imports if i.module.split(".")[0] in loaders
    ]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            allows = any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)
            tensors_alone = source.module == READS_PICKLES and name == "torch.load" and any(
                word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
            if name in forbidden and not tensors_alone or allows:
                complaints.append(f"{source.at(node.lineno)} calls {name}")
    return complaints


def randomness_is_passed_in(source: Source) -> list[str]:
    """The libraries' hidden generators are seeded by a command only, or put back afterwards: (seed, step) says all."""
    seeders = {"random.seed", "np.random.seed", "numpy.random.seed", "torch.manual_seed", "torch.seed", "set_seed"}
    seeders |= {"torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "accelerate.utils.set_seed"}
    commands = {"main", "train", "fit"} if source.module in MINIMUM else set()
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
    arrows_point_one_way: (
        ("core.training.run_folder", "import vae"),
        ("core.jobs.queue", "def f():\n    from generator import FaceGenerator"),
        ("core.text.captions", "from core.nn import checkpoint"),
        ("core.nn.layers", "from core.diffusion.sampling import sample"),
        ("core.diffusion.guidance", "def f():\n    import core.training.ema"),
        ("core.jobs.queue", "from core import web"),
        ("core.web.sse", "from core.diffusion.schedulers import SAMPLERS"),
        ("core.evaluation.report", "from core.jobs.job import Job"),
        ("core.engine", "from core.jobs.job import Job"),
        ("core.jobs.store", "from . import job"),
        ("launcher.host", "import core.text.lexicon"),
        ("core.text.captions", "import launcher.host"),
        ("api", "from launcher.host import free_port"),
    ),
    packages_stay_in_their_means: (
        ("core.jobs.queue", "import torch"),
        ("core.text.captions", "def f():\n    import numpy as np"),
        ("core.attic.things", "import json"),
    ),
    packages_only_say_what_they_answer: (
        ("core.jobs", "'''Who waits?'''\nfrom core.jobs import queue"),
        ("core.jobs", "'''Jobs.'''"),
        ("core.jobs", ""),
    ),
    networks_load_without_training: (
        ("vae", "import dataset"),
        ("vae", "from core.training import ema"),
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
    long_files_defend_themselves: (
        ("api", "'''File.'''\n" + "x = 1\n" * LONGEST),
        ("core.jobs.queue", "\'\'\'File.\'\'\'\n" + "x = 1\n" * LONGEST_IN_CORE),
    ),
    nothing_is_unpickled_or_evaluated: (
        ("api", "def f():\n    import pickle"),
        ("api", "torch.load(path, weights_only=True)"),
        ("core.pretrained.recognition", "torch.load(path, weights_only=False)"),
        ("core.pretrained.recognition", "torch.load(path)"),
        ("api", "np.load(path, allow_pickle=True)"),
        ("api", "eval('1')"),
    ),
    randomness_is_passed_in: (
        ("vae", "def build() -> None:\n    torch.manual_seed(0)"),
        ("core.training.run_folder", "def train() -> None:\n    torch.manual_seed(0)"),
        ("vae", "random.seed(1)"),
    ),
}
ALLOWED_BY: dict[Law, tuple[tuple[str, str], ...]] = {
    arrows_point_one_way: (
        ("core.training.run_folder", "from core.nn import checkpoint\nimport core.diffusion.schedule, core.engine"),
        ("core.web.routes.images", "from core.jobs import queue\nimport core.web.errors, core.disk"),
        ("core.jobs.queue", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import core.web.sse"),
        ("launcher.host", "from core import addresses"),
        ("vae", "import discriminator\nfrom core.nn import layers"),
        ("start", "from launcher import host"),
    ),
    packages_stay_in_their_means: (("core.diffusion.sampling", "import torch, math"), ("vae", "import anything")),
    packages_only_say_what_they_answer: (("core.jobs", "'''Who waits?'''"), ("core.jobs.queue", "import json")),
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
        ("core.evaluation.attribute_classifier", "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)"),
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


def test_torch_stays_out_of_http_and_the_queue() -> None:
    complaints = []
    for module in sorted(name for name in PROJECT if within(name, WITHOUT_TORCH)):
        brought = import_time_closure(module, PROJECT)
        complaints += [f"{module} brings {p} by way of {brought[p]}" for p in sorted(BRINGS_TORCH & set(brought))]
    assert not complaints, "\n".join(complaints)


def test_nothing_of_a_broker_is_imported_without_one() -> None:
    """The server that generates by itself needs neither Celery nor Redis, nor has them installed."""
    for module in sorted(PROJECT):
        if package_of(module) != "core.workers":
            assert not BROKER & set(import_time_closure(module, PROJECT)), module
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert not [name for name in BROKER if f"{name}==" in pinned]


def test_no_imports_run_in_circles() -> None:
    assert not cycles(PROJECT), "\n".join(cycles(PROJECT))


def test_circles_are_found() -> None:
    texts = {
        "core": "", "core.jobs": "",
        "core.jobs.queue": "from core.jobs import job",
        "core.jobs.job": "def f():\n    import core.jobs.store",
        "core.jobs.store": "from core.jobs.queue import JobQueue",
        "core.jobs.other": "from core.jobs.queue import JobQueue",
    }
    found = cycles({n: Source(n, t) for n, t in texts.items()})
    assert found == ["core.jobs.job -> core.jobs.store -> core.jobs.queue -> core.jobs.job"]
    assert cycles({n: Source(n, t) for n, t in texts.items() if n != "core.jobs.store"}) == []


def test_the_closure_follows_imports_and_stops_at_functions() -> None:
    texts = {
        "api": "from core.jobs import queue\ndef f():\n    import diffusers",
        "core": "", "core.jobs": "",
        "core.jobs.queue": "import core.nn.checkpoint",
        "core.nn": "", "core.nn.checkpoint": "if True:\n    import torch.nn",
    }
    sources = {n: Source(n, t) for n, t in texts.items()}
    assert import_time_closure("api", sources) == {"torch": "core.nn.checkpoint"}


def test_start_and_what_it_imports_use_the_standard_library_and_old_syntax() -> None:
    assert import_time_closure("start", PROJECT) == {}
    for module in sorted(name for name in PROJECT if name == "start" or within(name, {"core", *LAUNCHER})):
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
    modules = sorted(name for name in PROJECT if within(name, WITHOUT_TORCH))
    report = watch_imports(modules, BRINGS_TORCH, ROOT, tmp_path)
    assert set(report) == set(modules)
    assert complaints_of(report) == []


def test_importing_everything_else_has_no_side_effects_and_needs_no_server(tmp_path: Path) -> None:
    served = {name for name in PROJECT if set(import_time_closure(name, PROJECT)) & SERVER}
    modules = sorted(set(PROJECT) - served - {"export_diffusers"})  # which is classes of diffusers
    report = watch_imports(modules, SERVER | {"diffusers"}, ROOT, tmp_path)
    assert set(report) == set(modules)
    assert complaints_of(report) == []
    others = [name for name in served if name != "api" and package_of(name) != "core.web"]
    assert not others, "training must not need the server's packages"


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
    missing = sorted((MINIMUM | set(MEANS)) - set(PROJECT))
    assert not missing, f"not there: {', '.join(missing)}"


def test_no_file_grows_beyond_what_one_reads() -> None:
    """Files at the root are a command or a part each; whatever is second moves into a package."""
    most = {"api.py": 310, "evaluate.py": 250, "generator.py": 450}
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
             for path in (*ROOT.glob("*.py"), *ROOT.glob("core/**/*.py"))}
    too_long = {name: lines for name, lines in sizes.items()
                if lines > (400 if name.startswith("core/") else most.get(name, 450))}
    assert not too_long and len(sizes) > 100
