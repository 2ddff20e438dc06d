"""The script that leaves out what the ledger blames: whom it chooses, the runs it compares, its statistics."""

import importlib.util
import json
import sys

import pandas
import pytest
from conftest import ROOT, launch

sys.path.append(str(ROOT / "examples"))
spec = importlib.util.spec_from_file_location("leave_out", ROOT / "examples" / "leave_out.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_each_way_leaves_out_its_own_tenth():
    """Of 20 rows that the run visited two; shares and effects of a row are summed over sides and steps; rows that the
    run never visited, and weight decay, are nobody's."""
    lines = [(pair, side, share, effect) for pair in range(20) for side, share, effect in (
        ("chosen", 1.0, 0.0), ("rejected", -1.0 - (pair in (3, 5)), -float(pair in (7, 8))))]
    lines.append((None, "weight_decay", -99.0, None))
    ledger = pandas.DataFrame(lines, columns=["pair", "side", "share", "effect"]).astype({"pair": "Int64"})
    pairs = pandas.DataFrame({"row": range(40), "ches_normalised": [float(i) for i in range(40)]})
    found = script.left_out(ledger, pairs, seed=1)
    assert found["shares"] == {3, 5} and found["effects"] == {7, 8} and found["ches"] == {18, 19}
    assert len(found["random"]) == 2 and found["random"] <= {*range(20)}
    assert found["random"] == script.left_out(ledger, pairs, seed=1)["random"]


def test_what_is_given_back_is_compared_seed_by_seed():
    """Chosen falls by 0.1 k in seed k, and without a tenth by 0.02 less in seed 1, 0.04 less in seed 2."""
    lines = [(dataset, way, "chosen", seed, -0.1 * seed + (0.02 * seed if way == "shares" else 0))
             for dataset in script.SETS for way in ("all", *script.WAYS) for seed in (1, 2)]
    lines += [(*line[:2], response, line[3], -0.5) for line in lines for response in ("rejected", "gap", "other")]
    table = pandas.DataFrame(lines, columns=["dataset", "way", "response", "seed", "change"])
    line = next(line for line in script.summary(table) if line["way"] == "shares")
    assert line["given back"] == pytest.approx(0.03) and line["of the fall"] == pytest.approx(0.03 / 0.15)
    # Two values, 0.02 apart: sem 0.01; t of one degree of freedom at 95% is 12.706.
    assert line["reach"] == pytest.approx(0.12706, rel=1e-3)
    said = script.to_markdown(script.summary(table))
    assert "| +0.0300 ± 0.1271 | 20% |" in said and "| given back to chosen, ± 95% over seeds |" in said


def test_it_runs_and_refuses(tiny, tmp_path, monkeypatch):
    """Real commands on a tiny model: four ways, each without two of the twenty rows that the run visits."""
    rows = pandas.read_json(tiny / "train.jsonl", lines=True)
    twice = pandas.concat([rows.assign(prompt=rows["prompt"] + f"{k}") for k in range(2)])
    twice.to_parquet(tmp_path / "train.parquet")
    rows.to_parquet(tmp_path / "test.parquet")
    (tmp_path / "own.yaml").write_text(
        f"model_name: {tiny / 'model'}\ntrain_file_path: {tmp_path / 'train.parquet'}\n"
        f"eval_file_path: {tmp_path / 'test.parquet'}\nper_device_train_batch_size: 4\nlearning_rate: 1e-3\n"
        f"cache_dir: {tmp_path / 'cache'}\n")
    made = []

    def run(args, log, name, *flags):
        made.append(name)
        launch(ROOT / name, *flags, launcher="fork")

    monkeypatch.setattr(script, "run", run)
    flags = ["--output_dir", str(tmp_path / "out"), "--settings", str(tmp_path / "own.yaml"), "--seeds", "1",
             "--probes", "3", "--max_steps", "5", "--parallel", "1"]
    script.main(flags)
    lines = json.loads((tmp_path / "out" / "leave_out.json").read_text())
    assert [(line["dataset"], line["way"]) for line in lines] == [
        (name, way) for name in script.SETS for way in ("all", *script.WAYS)]
    for way in script.WAYS:
        record = json.loads((tmp_path / "out" / f"{way}-1" / "run.json").read_text())
        assert len(record["arguments"]["without_rows"].split(",")) == 2
    assert made.count("train.py") == 5
    with pytest.raises(script.UserError, match="--probes 10: the held-out file has 11 rows"):
        script.main([*flags, "--probes", "10", "--output_dir", str(tmp_path / "more")])
    with pytest.raises(script.UserError, match="--seeds 0: must be above 0"):
        script.main([*flags, "--seeds", "0"])
