"""How does code travel with weights, to where this repository is not?

`bundle` writes one file of Python that holds some classes and functions with everything of this project that they use,
to the letter, and imports nothing else of it. It follows names from definition to definition, through imports, so a
definition may move to another file. It does not know what is bundled.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Name = tuple[str, str]  # a module and what it calls something at its top


class BundleError(ValueError):
    """Something of this project is used in a way that cannot be followed."""


@dataclass(frozen=True)
class Module:
    """A module of the project as it is loaded."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def tops(self) -> dict[str, ast.stmt]:
        """What each name at the top of the module comes from: a definition, an assignment or an import."""
        found: dict[str, ast.stmt] = {}
        for node in ast.parse(self.text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {alias.asname or alias.name.split(".")[0]: node for alias in node.names}
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {one.id: node for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
        return found


def bundle(roots: Sequence[Any], project: Path, why: str) -> str:
    """The text of a file with these classes and functions. `project` is the folder in which its own modules are, `why`
    the file's docstring. Raises BundleError."""
    found = _Bundle(project)
    for one in roots:
        found.need((one.__module__, one.__name__))
    return found.text(why)


class _Bundle:
    """The definitions that have been found, by where they stand and by what they are called."""

    def __init__(self, project: Path) -> None:
        self._project = project.resolve()
        self._modules: dict[str, Module | None] = {}
        self._uses: dict[Name, list[Name]] = {}  # of each definition, what it uses of the project
        self._imports: dict[str, None] = {}

    def _module(self, name: str) -> Module | None:
        """A module of the project; None for anybody else's."""
        if name not in self._modules:
            path = getattr(sys.modules.get(name), "__file__", None)
            ours = path is not None and Path(path).resolve().is_relative_to(self._project)
            ours = ours and "site-packages" not in str(path)
            self._modules[name] = Module(name, Path(str(path)).read_text(encoding="utf-8")) if ours else None
        return self._modules[name]

    def _home(self, name: Name) -> Name | None:
        """Where something of the project is defined, through all imports; None (and its import is noted) when it is
        anybody else's."""
        module = self._module(name[0])
        node = module.tops.get(name[1]) if module else None
        if node is None:
            return None
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            alias = next(one for one in node.names if (one.asname or one.name.split(".")[0]) == name[1])
            if isinstance(node, ast.ImportFrom) and self._module(f"{node.module}.{alias.name}") is not None:
                raise BundleError(f"{name[0]} imports the module {alias.name}: import what is used of it")
            if isinstance(node, ast.ImportFrom) and self._module(node.module or "") is not None:
                return self._home((node.module or "", alias.name))
            self._imports[ast.unparse(type(node)(**{**vars(node), "names": [alias]}))] = None
            return None
        return name

    def need(self, name: Name) -> None:
        """Take a definition and all that it uses."""
        home = self._home(name)
        if home is None or home in self._uses:
            return
        module = self._module(home[0])
        assert module is not None, "it has a home"
        node = module.tops[home[1]]
        self._uses[home] = []
        for used in dict.fromkeys(names_in(node)):
            other = self._home((home[0], used))
            if other is not None and other != home:
                self._uses[home].append(other)
                self.need(other)
        for part in ast.walk(node):  # types: those of others are imported, ours are not needed to run
            for hint in (getattr(part, "annotation", None), getattr(part, "returns", None)):
                for used in names_in(hint) if isinstance(hint, ast.AST) else ():
                    self._home((home[0], used))

    def text(self, why: str) -> str:
        """The file: imports, then every definition after those that have to be there before it."""
        by_name: dict[str, Name] = {}
        called: dict[Name, str] = {}
        for home in self._uses:
            name = home[1]
            if by_name.setdefault(name, home) != home:  # two modules use one name: the second is told apart
                name = f"{name}_of_{home[0].rpartition('.')[2]}"
            called[home] = name
        order: dict[tuple[str, int], str] = {}  # by module and line: one statement may define several names
        waiting: set[Name] = set()

        def emit(home: Name) -> None:
            module = self._module(home[0])
            assert module is not None
            node = module.tops[home[1]]
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
            if home in waiting or (home[0], first) in order:
                return
            waiting.add(home)
            at_once = set(names_in(node, at_once=True))
            for used in self._uses[home]:
                if used[1] in at_once:
                    for one in self._closure(used) if isinstance(node, (ast.Assign, ast.AnnAssign)) else [used]:
                        emit(one)
            order[home[0], first] = self._renamed(home, module, node, first, called)
            waiting.discard(home)

        for home in self._uses:
            emit(home)
        imports = sorted(self._imports, key=lambda line: (not line.startswith("import"), line))
        head = [f'"""{why}"""', "", "from __future__ import annotations", "", *imports]
        return "\n".join(head) + "\n\n\n" + "\n\n\n".join(order.values()) + "\n"

    def _renamed(self, home: Name, module: Module, node: ast.stmt, first: int, called: dict[Name, str]) -> str:
        """A statement's text with the names that its file has for things. Raises BundleError for one that hides such a
        thing behind a name of its own."""
        new = {name: called[other] for name in {home[1], *names_in(node)}
               if (other := self._home((home[0], name))) is not None and called.get(other, name) != name}
        lines = module.text.encode().splitlines()
        places: list[tuple[int, int, str]] = []
        for one in ast.walk(node) if new else ():
            if isinstance(one, ast.arg) and one.arg in new:
                raise BundleError(f"{home[0]}.{home[1]} has an argument {one.arg}, which is something else elsewhere")
            if isinstance(one, ast.Name) and one.id in new:
                places.append((one.lineno, one.col_offset, one.id))
            if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and one is node and one.name in new:
                places.append((one.lineno, lines[one.lineno - 1].index(one.name.encode()), one.name))
        for line, column, name in sorted(places, reverse=True):
            text = lines[line - 1]
            lines[line - 1] = text[:column] + new[name].encode() + text[column + len(name.encode()) :]
        return b"\n".join(lines[first - 1 : node.end_lineno]).decode()

    def _closure(self, home: Name) -> list[Name]:
        """All that must be there when a function is called while the file is read."""
        found, waiting = dict[Name, None](), [home]
        while waiting:
            one = waiting.pop()
            if one not in found:
                found[one] = None
                waiting += self._uses[one]
        return list(found)


def names_in(node: ast.AST, *, at_once: bool = False) -> Iterator[str]:
    """The names that a statement uses, but those in annotations; `at_once`: only while it is read, not when it is
    called."""
    if isinstance(node, ast.Name):
        yield node.id
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or at_once and name == "body" and isinstance(node, FUNCTIONS):
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, ast.AST):
                yield from names_in(one, at_once=at_once)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
