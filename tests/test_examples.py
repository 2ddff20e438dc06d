"""The shipped example: what the README promises of it."""

import json
import math
import re

import pyarrow.parquet
import pytest
import yaml
from conftest import ROOT, launch
from safetensors.torch import load_file

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_default_run_starts_at_ln_2_and_tells_chosen_from_rejected(tmp_path):
    """`deepspeed train.py`, cut to 20 steps; the README's first two lines of output."""
    done = launch(ROOT / "train.py", "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--max_steps",
                  "20", "--eval_steps", "0", launcher="deepspeed")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[1], lines[-1]
    assert first["step"] == 0 and first["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert first["rewards/margins"] == 0.0
    assert last["eval_rewards/accuracies"] > 0.9
    # The table's row of step 0: the same model, whatever the steps.
    assert f"{lines[0]['eval_logps_per_token/chosen']:.3f}" in README
    assert f"{lines[0]['eval_logps_per_token/rejected']:.3f}" in README
    assert "loss 0.6931" in done.stdout
    start = done.stdout.partition("\nstep ")[0].partition("\ndata ")[2].splitlines()  # without the launcher's lines
    assert len(start) > 12 and all(len(line) <= 80 or "/" in line for line in start), start
    assert (tmp_path / "run" / "training.png").stat().st_size > 10_000  # nobody had to ask for it


def test_the_readme_counts_the_default_run():
    """The pairs that its steps visit, of those there are."""
    settings = yaml.safe_load((ROOT / "examples" / "dpo.yaml").read_text())
    pairs = settings["per_device_train_batch_size"]
    rows = pyarrow.parquet.read_metadata(ROOT / settings["train_file_path"]).num_rows
    steps = settings["max_steps"]
    assert f"in {steps} steps of {pairs} pairs, {pairs * steps} of {rows:,} shipped ones" in README


def test_shipped_models_are_small_and_of_one_shape():
    base, sft = (load_file(ROOT / "examples" / "piles" / name / "model.safetensors") for name in ("base", "sft"))
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in sft.items()}
    assert sum(v.numel() for v in base.values()) < 600_000
    assert all(v.isfinite().all() for v in [*base.values(), *sft.values()])


def test_the_readme_names_every_folder_and_page_and_is_short():
    """The modules of a folder are named where it says what it holds."""
    for folder in (ROOT / "nanodpo").glob("*/__init__.py"):
        assert f"{folder.parent.name}/" in README
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
                                  ROOT / "bench" / "README.md"], ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    """Links, and paths in code spans; a bare name is found somewhere below nanodpo/."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    known = {file.name for file in ROOT.rglob("*.py")}
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists() or ("/" not in name and name in known), name
