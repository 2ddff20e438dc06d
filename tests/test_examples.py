"""The shipped example: what the README promises of it."""

import json
import math
import re

import pytest
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


def test_shipped_models_are_small_and_of_one_shape():
    base, sft = (load_file(ROOT / "examples" / "piles" / name / "model.safetensors") for name in ("base", "sft"))
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in sft.items()}
    assert sum(v.numel() for v in base.values()) < 600_000
    assert all(v.isfinite().all() for v in [*base.values(), *sft.values()])


def test_the_readme_names_every_module_and_no_other():
    tree = README[README.index("## The files"):]
    named = set(re.findall(r"\b(\w+\.py)\b", tree.partition("## Limits")[0]))
    there = {file.name for file in (ROOT / "nanodpo").rglob("*.py")} - {"__init__.py"}
    assert there <= named
    assert named - there <= {"train.py", "score.py", "plot.py", "piles.py", "check_logprobs.py",
                             "forward_reverse.py"}
