"""The rules of the house, held by machine: who may import whom, and how long a function may be."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {file.stem: file for file in (ROOT / "nanodpo").glob("*.py") if file.stem != "__init__"}
SCRIPTS = [*(ROOT / f"{name}.py" for name in ("train", "score", "plot")),
           *sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "bench").glob("*.py"))]
CORE = ("losses", "packing", "logprobs", "attention")


def imports(file: Path) -> set[str]:
    """Top-level names of what a file imports anywhere; ours as "nanodpo.<module>"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.partition(".")[0] == "nanodpo"):
            path = (node.module or "").removeprefix("nanodpo").strip(".")
            found |= {f"nanodpo.{path}"} if path else {f"nanodpo.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_torch_alone(name):
    """attention.py also knows transformers, where it registers its names."""
    assert imports(MODULES[name]) <= {"torch"} | ({"transformers"} if name == "attention" else set())


def test_imports_are_shallow():
    """Scripts import modules, no module a script, and no chain of our own imports is longer than two, errors aside."""
    ours = {name: {i.removeprefix("nanodpo.") for i in imports(file) if i.startswith("nanodpo.")} - {"errors"}
            for name, file in MODULES.items()}

    def depth(name, above=()):
        assert name not in above, f"circle: {' -> '.join([*above, name])}"
        return max((1 + depth(other, (*above, name)) for other in ours[name]), default=0)

    for name, file in MODULES.items():
        assert depth(name) <= 2, name
        assert not imports(file) & {"train", "score", "plot", "examples", "bench", "tests"}, name


@pytest.mark.parametrize("file", [*MODULES.values(), *SCRIPTS], ids=lambda file: file.stem)
def test_functions_fit_a_screen(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{file.name}: {node.name}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type and getattr(node.type, "id", "") not in ("Exception", "BaseException"), file.name
    if file in MODULES.values():
        assert len(file.read_text().splitlines()) <= 180, file.name
