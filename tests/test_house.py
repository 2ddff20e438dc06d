"""The rules of the house, held by machine: who may import whom, and how long a function may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "nanodpo"
MODULES = {".".join(file.relative_to(HOUSE).with_suffix("").parts): file for file in HOUSE.rglob("*.py")
           if file.stem != "__init__"}
SCRIPTS = [*(ROOT / f"{name}.py" for name in ("train", "score", "plot")),
           *sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "bench").glob("*.py"))]
CORE = ("losses", "packing", "logprobs", "attention")


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
    assert imports(MODULES[name]) <= {"torch"} | ({"transformers"} if name == "attention" else set())


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


def test_what_trains_knows_nothing_of_what_comes_after():
    """nanodpo/ itself needs neither scoring nor figures, and scoring no figures; figures read tables alone."""
    for name, file in MODULES.items():
        folder = name.rpartition(".")[0]
        strange = {"": ("scoring", "figures"), "scoring": ("figures",), "figures": ("scoring",)}[folder]
        assert not [i for i in imports(file) if i.startswith(tuple(f"nanodpo.{other}." for other in strange))], name


@pytest.mark.parametrize("file", [*MODULES.values(), *SCRIPTS], ids=lambda file: file.stem)
def test_functions_fit_a_screen(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{file.name}: {node.name}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type and getattr(node.type, "id", "") not in ("Exception", "BaseException"), file.name


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


@pytest.mark.parametrize("script", ["train", "score"])
def test_help_and_wrong_input_wait_for_no_model_code(script):
    """`--help` in two seconds: what takes longest to import is imported when a model is made."""
    slow = {"deepspeed", "transformers.modeling_utils", "matplotlib"}
    code = f"import sys, {script}; print({slow} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr
