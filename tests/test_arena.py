"""The arena's script: its commands, its table and its figure, and what happens when it is called again, or wrongly."""

import json
import math
import shutil
import sys

import pandas
import pytest
from conftest import ROOT, launch

sys.path.insert(0, str(ROOT / "examples"))
import arena


@pytest.fixture
def commands(monkeypatch):
    """The commands that run, by the scripts themselves, in forks."""
    made = []

    def run(args, log, script, *flags):
        made.append((script, [*map(str, flags)]))
        done = launch(ROOT / script, *flags, launcher="fork", check=False)
        if done.returncode:
            raise arena.Failed(f"{script} ended with {done.returncode}: {done.stdout.splitlines()[-1]}")

    monkeypatch.setattr(arena, "run", run)
    return made


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["arena.py", *map(str, flags)])
    return arena.run_script(arena.main)


@pytest.mark.slow
def test_two_losses(tiny, tmp_path, commands, monkeypatch, capsys):
    """Same data, seed and start for both, and each loss's own settings. The table has what the tables of score.py say
    of the first and last checkpoint. What is finished is not done again; a loss that fails leaves the other's line."""
    rows = [{"prompt": f"What is {i}+{i}? ", "chosen": f"It is {2 * i}", "rejected": f"No, {i}" + "!" * (i % 3)}
            for i in range(12)]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "run.yaml").write_text("lora_r: 2\nlearning_rate: 1e-2\nper_device_train_batch_size: 2\n")
    flags = ("--output_dir", tmp_path / "out", "--losses", "dpo", "simpo", "--seeds", 1, "--max_steps", 2, "--settings",
             tmp_path / "run.yaml", "--model_name", tiny / "model", "--train_file_path", tmp_path / "train.jsonl",
             "--eval_file_path", tmp_path / "test.jsonl", "--answers", 2, "--parallel", 1)
    assert call(monkeypatch, *flags) == 0
    (dpo, simpo), scored = ([flags for script, flags in commands if script == name]
                            for name in ("train.py", "score.py"))
    assert simpo == [flag.replace("dpo", "simpo") for flag in dpo] + ["--beta", "2.0"]
    assert len(scored) == 2 and scored[0][:2] == [str(tmp_path / "out" / "dpo-1" / f"checkpoint-{k}") for k in (0, 2)]
    table = pandas.read_csv(tmp_path / "out" / "arena.csv").set_index("loss")
    assert list(table.index) == ["dpo", "simpo"] and list(table["settings"]) == ["beta=0.1", "beta=2"]
    for loss, line in table.iterrows():
        scores = pandas.read_parquet(tmp_path / "out" / f"scores-{loss}" / "scores.parquet")
        wide = scores.pivot_table(index="response", columns="step", values=["mean_logps", "entropy"])
        moved = wide["mean_logps"][2] - wide["mean_logps"][0]
        for side in ("chosen", "rejected", "other"):
            assert line[side] == pytest.approx(moved[side], abs=1e-9) != 0 and line[f"{side} low"] < line[side]
        assert line["gap"] == pytest.approx(moved["chosen"] - moved["rejected"], abs=1e-9)
        assert line["entropy"] == pytest.approx((wide["entropy"][2] - wide["entropy"][0])["chosen"], abs=1e-9)
        assert 0 <= line["right answers first"] <= 1 and math.isfinite(line["answer length"]) and line["verdict"]
    assert table.loc["dpo", "chosen"] != table.loc["simpo", "chosen"]
    text = (tmp_path / "out" / "arena.md").read_text()
    assert text in capsys.readouterr().out and f"| `simpo` beta=2 | {table.loc['simpo', 'chosen']:+.4f} [" in text
    assert all((tmp_path / "out" / f"arena.{kind}").stat().st_size > 1000 for kind in ("png", "pdf", "svg"))

    done = len(commands)
    assert call(monkeypatch, *flags) == 0 and len(commands) == done
    shutil.rmtree(tmp_path / "out" / "dpo-1")
    (tmp_path / "out" / "dpo-1").write_text("in the way")
    capsys.readouterr()
    assert call(monkeypatch, *flags) == 1
    said = capsys.readouterr()
    assert "FAILED dpo: train.py ended with 2" in said.out and "failed, for the reasons above: dpo" in said.err
    assert list(pandas.read_csv(tmp_path / "out" / "arena.csv")["loss"]) == ["simpo"]


def test_every_loss_has_a_command(tmp_path):
    """With settings that it takes: train.py's own reader of flags refuses others."""
    from nanodpo.flags.arguments import parse

    args = arena.parse(["--output_dir", str(tmp_path), "--learning_rate", "1e-4"])
    assert args.losses == [*arena.LOSSES]
    for loss in args.losses:
        _, place, _, script, settings, *flags = arena.training(args, tmp_path, loss, 3)
        found = parse([settings, *map(str, flags)], ROOT / "examples" / "dpo.yaml")
        assert (script, place.name, found.loss, found.seed) == ("train.py", f"{loss}-3", loss, 3)
        assert found.learning_rate == 1e-4 and found.max_steps == 120 and not found.draw
    assert arena.SETTINGS.keys() <= arena.LOSSES.keys()


def test_entropy_over_two_seeds():
    """It rises by 0.1 and by 0.3: 0.2, and t(1) = 12.7062 times a standard error of 0.1."""
    table = pandas.DataFrame([{"run": run, "response": response, "step": step, "entropy": 1 + step * rise}
                              for run, rise in (("a-1", 0.1), ("a-2", 0.3)) for step in (0, 1)
                              for response in ("chosen", "other")])
    found = arena.entropy(table)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.2, 0.2 - 1.27062, 0.2 + 1.27062), abs=1e-5)
    assert arena.entropy(table[table["run"] == "a-1"]) == {"mean": pytest.approx(0.1)}


@pytest.mark.parametrize("flags, words", [
    (["--losses", "dpo", "ppo"], "--losses ppo: there is no such loss; there are dpo, "),
    (["--seeds", "0"], "--seeds 0: must be above 0"), (["--what"], "unknown argument --what")])
def test_wrong_calls_are_one_line(flags, words, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "--output_dir", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()
