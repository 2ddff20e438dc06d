"""Whole runs with losses beside dpo: the user's own, those without a reference, and all of them one after another."""

import json
import math

import pandas
import pytest
from conftest import ROOT, launch, train, without_times

from nanodpo.core.losses import LOSSES

pytestmark = pytest.mark.slow
SHORT = ("--learning_rate", "1e-2", "--lora_r", "4", "--max_steps", "3")
OWN = """from torch.nn.functional import logsigmoid

def mine(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
"""


def test_dpo_as_a_function_of_the_users_own(tiny, tmp_path):
    """To the last bit the run of --loss dpo. A run goes on with the same file alone; score.py runs no part of it, and
    says what is missing, or, where it is told to run it, gives pairs the weights of dpo."""
    (tmp_path / "my.py").write_text(OWN)
    flags = ("--loss", f"{tmp_path}/my.py:mine", *SHORT)
    own, house = train(tiny, tmp_path / "own", *flags), train(tiny, tmp_path / "house", "--loss", "dpo", *SHORT)
    assert without_times(own) == without_times(house)
    again = [ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
             "--output_dir", tmp_path / "own", "--cache_dir", tmp_path / "cache", *flags]
    assert "this run is finished" in launch(*again, launcher="fork").stdout
    for name, more in (("own", ["--trust_remote_code"]), ("house", [])):
        launch(ROOT / "score.py", tmp_path / name, "--output_dir", tmp_path / f"of-{name}", *more, launcher="fork")
    weights = [pandas.read_parquet(tmp_path / f"of-{name}" / "pairs.parquet")[["weights/chosen", "weights/rejected"]]
               for name in ("own", "house")]
    assert weights[0].equals(weights[1]) and weights[0].notna().all(axis=None)
    (tmp_path / "my.py").write_text(OWN.replace("-logsigmoid", "-2 * logsigmoid"))
    done = launch(ROOT / "score.py", tmp_path / "own", "--trust_remote_code", launcher="fork", check=False)
    assert done.returncode == 2 and "the file has changed" in done.stderr
    done = launch(*again, launcher="fork", check=False)
    assert done.returncode == 2 and "loss_function" in done.stderr
    (tmp_path / "my.py").write_text("raise SystemError('score.py has run this')")
    done = launch(ROOT / "score.py", tmp_path / "own", "--output_dir", tmp_path / "scores", launcher="fork")
    assert f"own: its pairs get no weights, since its loss is a file of code, {tmp_path}/my.py:mine" in done.stdout


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_without_a_reference(name, tiny, tmp_path):
    """No reference is computed or kept, no number of one is logged, and loss and rewards are those of the log-probs in
    the same line: a step of one pair."""
    lines = train(tiny, tmp_path / "run", "--loss", name, "--beta", "2", *SHORT)
    assert not [*(tmp_path / "cache").glob("*")] and not any("ref" in key for key in lines[0])
    for line in lines:
        sums = [line[f"logps/{side}"] for side in ("chosen", "rejected")]
        means = [line[f"logps_per_token/{side}"] for side in ("chosen", "rejected")]
        odds = [mean - math.log(1 - math.exp(mean)) for mean in means]
        by_hand = {"simpo": math.log1p(math.exp(0.5 - 2 * (means[0] - means[1]))),
                   "cpo": math.log1p(math.exp(-2 * (sums[0] - sums[1]))) - means[0],
                   "orpo": 2 * math.log1p(math.exp(-(odds[0] - odds[1]))) - means[0]}[name]
        assert line["loss"] == pytest.approx(by_hand, rel=1e-6)
        counted = sums if name == "cpo" else means
        assert [line["rewards/chosen"], line["rewards/rejected"]] == pytest.approx([2 * x for x in counted])
        assert line["rewards/accuracies"] == (counted[0] > counted[1])


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft"])
def test_a_run_of_each_loss(name, tiny, tmp_path):
    """All 11 rows in each step, three times: the loss falls, and at the start both sides are pushed."""
    lines = train(tiny, tmp_path / "run", "--loss", name, *SHORT, "--gradient_accumulation_steps", "11")
    assert lines[2]["loss"] < lines[0]["loss"]
    assert lines[0]["weights/chosen"] > 0 and lines[0]["weights/rejected"] > 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"]["loss"] == name and record["loss_function"] is None
