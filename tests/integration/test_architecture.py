"""Imports point downwards: the folders of the library stand above one another, and no module imports itself back."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_dualspeed

PACKAGE = Path(hf_dualspeed.__file__).parent
# Lowest first; a module may import from its own folder and from those before it. CONTRIBUTING.md shows the same line.
LAYERS = [
    "utils",
    "hub",
    "metrics",
    "publishing",
    "pruners",
    "models",
    "pruning",
    "feature_cache",
    "data",
    "trainer",
    "conformance",
    "evaluation",
    "bench",
    "recipes",
    "commands",
    "cli",
]


def name_of(path: Path) -> tuple[str, ...]:
    """ "pruners/base.py" as ("pruners", "base"), a package's `__init__.py` as ("pruners",)."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of the library that one imports, in functions too, but for types alone."""
    path = MODULES[module]
    package = path.parent.relative_to(PACKAGE).parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    conditional = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    for_types = {id(n) for node in conditional if "TYPE_CHECKING" in ast.unparse(node.test) for n in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
            continue
        words = tuple((node.module or "").split(".")) if node.module else ()
        if node.level:
            base = (*package[: len(package) - node.level + 1], *words)
        elif words[:1] == ("hf_dualspeed",):
            base = words[1:]
        else:
            assert words[:1] not in [("benchmarks",), ("tests",)], f"{path} imports {node.module}"
            continue
        # `from .folder import module` names a module, `from .module import name` stands in one.
        found |= {(*base, alias.name) if (*base, alias.name) in MODULES else base for alias in node.names}
    return found - {module, ()}


@pytest.mark.parametrize("module", [m for m in MODULES if m], ids=".".join)
def test_imports_point_downwards(module):
    upwards = [".".join(other) for other in imported(module) if LAYERS.index(other[0]) > LAYERS.index(module[0])]
    assert not upwards


def test_no_module_imports_itself_back():
    try:
        TopologicalSorter({module: imported(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(".".join(module) for module in error.args[1]))


def test_folders_can_be_surveyed():
    """One pruner per file aside, a folder holds at most twenty modules, and the root a handful."""
    for folder in {path.parent for path in MODULES.values()} - {PACKAGE / "pruners"}:
        assert len(list(folder.glob("*.py"))) <= (5 if folder == PACKAGE else 20), folder
