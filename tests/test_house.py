"""The rules of the house, held by machine: who may import whom, and how long a function may be."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "nanodpo"
MODULES = {".".join(file.relative_to(HOUSE).with_suffix("").parts): file for file in HOUSE.rglob("*.py")
           if file.stem != "__init__"}
SCRIPTS = [*(ROOT / f"{name}.py" for name in ("train", "score", "plot")),
           *sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "bench").glob("*.py"))]
CORE = [name for name in MODULES if name.startswith("core.")]
# From the ground up: a folder, or a module that lies beside them, imports those before it alone.
ORDER = ("core", "screen", "errors", "files", "stats", "flags", "ranks", "progress", "data", "model",
         "folder", "run", "scoring", "ledger", "figures")
LENGTHS = {"train.py": 300, "score.py": 320, "plot.py": 200, "README.md": 150}


def imports(file: Path) -> set[str]:
    """Top-level names of what a file imports anywhere; ours as "nanodpo.<module>" or "nanodpo.<folder>.<module>"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.partition(".")[0] == "nanodpo"):
            above = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            path = ".".join([*above, *filter(None, [node.module])])
            whole = path.removeprefix("nanodpo.") in MODULES
            found |= {path} if whole else {f"{path}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_torch_alone(name):
    """attention.py also knows transformers, where it registers its names."""
    outside = {found for found in imports(MODULES[name]) if not found.startswith("nanodpo.core.")}
    assert outside <= {"torch"} | ({"transformers"} if name == "core.attention" else set())


def test_the_core_is_read_in_an_hour():
    """The losses apart: there may be as many as one likes, each to be read alone."""
    lines = sum(len(MODULES[name].read_text().splitlines()) for name in CORE if name != "core.losses")
    assert lines <= 548, f"nanodpo/core/ has {lines} lines without its losses: is what was added worth a reader's hour?"


@pytest.mark.parametrize("name", LENGTHS)
def test_the_scripts_and_the_readme_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= LENGTHS[name]


def test_folders_import_those_below_them_alone():
    assert {name.partition(".")[0] for name in MODULES} == {*ORDER}
    for name, file in MODULES.items():
        own = name.partition(".")[0]
        for found in (found.split(".")[1] for found in imports(file) if found.startswith("nanodpo.")):
            assert ORDER.index(found) <= ORDER.index(own), f"{name} imports {found}"


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in HOUSE.glob("*/__init__.py")))
def test_every_folder_says_what_it_holds(folder):
    """Each of its modules is named."""
    text = ast.get_docstring(ast.parse((HOUSE / folder / "__init__.py").read_text()))
    assert not [name for name in MODULES if name.startswith(f"{folder}.") and name.partition(".")[2] not in text]


def test_imports_go_in_no_circle():
    """Scripts import modules, no module a script, and no module itself by way of others."""
    ours = {name: {i.removeprefix("nanodpo.") for i in imports(file) if i.startswith("nanodpo.")}
            for name, file in MODULES.items()}

    def follow(name, above=()):
        assert name not in above, f"circle: {' -> '.join([*above, name])}"
        for other in ours[name]:
            follow(other, (*above, name))

    for name, file in MODULES.items():
        follow(name)
        assert not imports(file) & {"train", "score", "plot", "examples", "bench", "tests"}, name


@pytest.mark.parametrize("file", [*MODULES.values(), *SCRIPTS], ids=lambda file: file.stem)
def test_functions_fit_a_screen_and_docstrings_begin_with_a_plain_sentence(file):
    """No docstring is a clause like "What a row has", of which a reader must guess what is done with it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            assert not (ast.get_docstring(node) or "").startswith("What "), f"{file.name}: {ast.get_docstring(node)}"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{file.name}: {node.name}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type and getattr(node.type, "id", "") not in ("Exception", "BaseException"), file.name


@pytest.mark.parametrize("name", MODULES)
def test_files_that_a_comment_names_are_there(name):
    """A module that was renamed is named anew everywhere; launch.py is deepspeed's, FILE.py the user's."""
    known = {file.name for file in [*MODULES.values(), *SCRIPTS]} | {"launch.py", "FILE.py"}
    assert {*re.findall(r"(?<![\w/.{}])(\w+\.py)\b", MODULES[name].read_text())} <= known


PRINTED = [*MODULES.values(), *(file for file in SCRIPTS if file.parent.name != "bench")]


@pytest.mark.parametrize("file", PRINTED, ids=lambda file: file.stem)
def test_one_function_prints(file):
    """nanodpo.screen.put escapes what acts on a terminal; nobody prints past it, or makes a bar with texts of its own.
    A bench prints its own numbers."""
    if file == HOUSE / "screen.py":
        return
    assert "tqdm" not in imports(file) or file == HOUSE / "progress.py"
    for node in ast.walk(ast.parse(file.read_text())):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called not in ("print", "sys.stdout.write", "sys.stderr.write", "bar.write", "traceback.print_exc"), (
            f"{file.name}, line {node.lineno}: {called}")


@pytest.mark.parametrize("name", MODULES)
def test_text_is_utf_8_whatever_the_locale(name):
    """No file is read or written in the encoding of the user's locale, which on clusters may be ASCII or Latin-1."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            mode = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            text = node.func.attr in ("read_text", "write_text") or (
                node.func.attr == "open" and mode in ("r", "w", "a", "x", "r+", "w+", "a+"))
            assert not text or "encoding" in {option.arg for option in node.keywords}, f"{name}, line {node.lineno}"


@pytest.mark.parametrize("script", ["train", "score"])
def test_help_and_wrong_input_wait_for_no_model_code(script):
    """`--help` in two seconds: what takes longest to import is imported when a model is made. torch._inductor is its
    compiler, which nothing here uses."""
    slow = {"deepspeed", "transformers.modeling_utils", "matplotlib", "torch._inductor"}
    code = (f"import atexit, sys, {script}; atexit.register(lambda: print({slow} & {{*sys.modules}}));"
            f"{script}.main(['--no_such_flag', '1'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_tests_lie_in_folders_of_the_same_names():
    """Tests of a folder of nanodpo/ lie in the folder of tests/ with its name; tests of the whole lie beside them."""
    folders = {file.parent.name for file in (ROOT / "tests").glob("*/test_*.py")}
    assert folders == {file.parent.name for file in HOUSE.glob("*/__init__.py")}


def test_the_lowest_versions_are_those_of_the_ranges():
    """.ci/lowest.txt is what CI tries beside the newest known-good ones; it follows pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lowest = dict(re.match(r"([\w-]+)>=([\d.]+)", entry).groups() for entry in ranges)
    tried = dict(line.split("==") for line in (ROOT / ".ci" / "lowest.txt").read_text().splitlines() if "==" in line)
    assert tried.keys() == lowest.keys() - {"ruff", "setuptools", "selenium"}
    for name, version in tried.items():
        assert f"{version.removesuffix('.*')}.0.0".startswith(f"{lowest[name]}."), name
