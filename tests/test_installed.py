"""`pip install .`: three commands, with the settings and the example that they need."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_is_a_package():
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "nanodpo").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert {*PROJECT["tool"]["setuptools"]["packages"]} == names | {"nanodpo.scripts"}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="no setuptools here, which builds the package")
def test_installed_commands_run_the_example_from_any_folder(tmp_path):
    """Built without the network, into a folder of its own; from a copy, since building leaves files behind."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "bench/")):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, tmp_path / "source" / name)
    place, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "--target", place, tmp_path / "source"]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=120)

    def run(name, *flags):
        done = subprocess.run([sys.executable, place / "bin" / name, *flags], cwd=work, capture_output=True, text=True,
                              env=environment() | {"PYTHONPATH": str(place)}, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    said = run("nanodpo-train", "--max_steps", "1", "--eval_size", "0", "--output_dir", "run", "--cache_dir", "cache",
               "--draw", "false")
    assert f"next: {place / 'bin' / 'nanodpo-score'} run" in said
    assert len((work / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads((work / "run" / "run.json").read_text())["arguments"]["model_name"].startswith(str(place))
    assert "Log-probabilities" in run("nanodpo-score", "--help") and "training.png" in run("nanodpo-plot", "run")
    assert Path(work / "run" / "training.png").stat().st_size > 10_000
    assert (place / "nanodpo" / "figures" / "page.html").is_file()
