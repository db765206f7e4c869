"""Can a newcomer find their way in the page's code? Its map, the size of its modules, where imports lead."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "static").glob("*.js"))}
COLUMNS, LINES = 120, 300


def test_lines_and_modules_are_short_enough_to_read() -> None:
    wide = [f"{name}:{number}" for name, text in MODULES.items()
            for number, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]
    long = {name: count for name, text in MODULES.items() if (count := text.count("\n")) > LINES}
    assert (wide, long) == ([], {})


def test_every_module_begins_with_its_question() -> None:
    assert [name for name, text in MODULES.items() if not text.startswith("// ")] == []


def test_the_map_names_every_module_once_and_where_it_belongs() -> None:
    text = (ROOT / "docs/page.md").read_text(encoding="utf-8")
    rows = {part: re.findall(r"^\| `(\w+\.js)` \|", body, re.M)
            for part, body in re.findall(r"^## (Modules [^\n]+)\n(.*?)(?=^## |\Z)", text, re.M | re.S)}
    visit, later = rows["Modules of every visit"], rows["Modules on demand"]
    assert sorted(visit + later) == sorted(MODULES.keys() - {"sw.js"})
    first, waiting = {"theme.js", "app.js"}, ["app.js"]
    while waiting:
        found = set(re.findall(r'^import [^;]*? from "\./(\w+\.js)"', MODULES[waiting.pop()], re.M)) - first
        first |= found
        waiting += found
    assert set(visit) == first


def test_what_is_imported_is_exported_and_used() -> None:
    exported = {name: set(re.findall(r"^export (?:async )?(?:function|const|let|class) (\$|\w+)", text, re.M))
                for name, text in MODULES.items()}
    faults = []
    for name, text in MODULES.items():
        body = re.sub(r"^import [^;]*;$", "", text, flags=re.M)
        for names, source in re.findall(r'^import \{([^}]*)\} from "\./(\w+\.js)"', text, re.M):
            for word in re.findall(r"\$|\w+", names):
                if word not in exported[source]:
                    faults.append(f"{name}: {source} has no {word}")
                if not re.search(rf"(?<![\w$]){re.escape(word)}(?![\w$])", body):
                    faults.append(f"{name}: {word} is not used")
    assert faults == []
