"""The experiment's script: the split, the commands, the statistics, and what happens when a model fails."""

import importlib.util
import json
import re
import sys

import pandas
import pytest
from conftest import ROOT

from nanodpo import progress

spec = importlib.util.spec_from_file_location("forward_reverse", ROOT / "examples" / "forward_reverse.py")
experiment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiment)


@pytest.fixture
def commands(monkeypatch):
    """Every command that would have run; each leaves what the next one asks for. A model called "broken" fails."""
    made = []

    def run(args, log, script, *flags):
        flags = list(map(str, flags))
        made.append((script, flags))
        if "models/broken" in flags:
            raise experiment.Failed(f"{script} ended with 2, x.log: error: can't be opened")
        folder = experiment.Path(flags[flags.index("--output_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if script == "train.py":
            for step in (0, 9, 120):
                (folder / f"checkpoint-{step}").mkdir()
        if script == "score.py":
            runs = [experiment.Path(flag) for flag in flags[: flags.index("--output_dir")]]
            runs = sorted({r if r.name.rpartition("-")[0] != "checkpoint" else r.parent for r in runs})
            scored(runs).to_parquet(folder / "scores.parquet")
            answered(runs).to_parquet(folder / "answers.parquet")
            numbers = {f"change of {what} there": {"mean": mean} for what, mean in (("chosen", -0.5), ("argmax", 0.1))}
            (folder / "verdict.json").write_text(json.dumps([
                {"run": run.name, "dataset": data, "there": "tenth 3", "numbers": numbers}
                for run in runs for data in experiment.SETS]))

    monkeypatch.setattr(experiment, "run", run)
    return made


def scored(runs):
    """Two rows a data set: from step 0 to 9, y+ +.1 and y- -.3 whatever the run."""
    return pandas.DataFrame([
        {"run": run.name, "dataset": data, "row": row, "response": response, "step": step,
         "mean_logps": (-1 if response == "chosen" else -2) + move * (step > 0) + row, "implausible_mass": 0.01 * step,
         "implausible_mass_start": 0.001 * step}
        for run in runs for data in experiment.SETS for row in (0, 1) for step in (0, 9)
        for response, move in (("chosen", 0.1), ("rejected", -0.3), ("other", 0.0), ("shuffled", 0.0))])


def answered(runs):
    """Of a forward and a reverse row DPO forgets the reverse one, and says no answer."""
    lines = [(run.name, step, row, bool(step and row and run.name.startswith("dpo")))
             for run in runs for step in (0, 9) for row in (0, 1)]
    return pandas.DataFrame([{"run": run, "step": step, "row": row, "correct": not bad, "found": None if bad else "7"}
                             for run, step, row, bad in lines])


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["forward_reverse.py", *map(str, flags)])
    return experiment.run_script(experiment.main)


def test_the_whole_of_it(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert call(monkeypatch, "--output_dir", tmp_path, "--seeds", "2", "--parallel", "1") == 0
    counted = re.findall(r"(\d+) of 14 commands", capsys.readouterr().out)
    assert list(map(int, counted)) == [*range(1, 14)], "how far it is, before the last of them"
    scripts = [script for script, _ in commands]
    assert scripts == ["train.py"] * 10 + ["score.py"] * 4 + ["plot.py"]
    (forward, dpo, gentle), plot = [commands[i][1] for i in (2, 6, 7)], commands[-1][1]
    assert forward[forward.index("--save_steps") + 1] == "63"  # 1,000 rows in steps of 16
    assert dpo[dpo.index("--model_name") + 1] == str(tmp_path / "mixed-1" / "checkpoint-120")
    assert gentle[gentle.index("--learning_rate") + 1] == "2.5e-05"
    scored, answered = (flags for script, flags in commands[10:12])
    assert "--answers" not in scored and [flag for flag in scored if flag.endswith("-1")][:4] == [
        str(tmp_path / f"{name}-1") for name in ("forward", "reverse", "mixed", "dpo")]
    assert answered[:4] == [str(tmp_path / f"{name}-1" / f"checkpoint-{step}")
                            for name in ("dpo", "gentle") for step in (0, 120)]
    assert plot[plot.index("--dpo") + 1 : plot.index("--scores")] == [str(tmp_path / f"dpo-{k}") for k in (1, 2)]
    found = {line["text"].partition(":")[0]: line for line in json.loads((tmp_path / "findings.json").read_text())}
    assert found["SFT on forward raises y+ on forward tests"]["holds"]
    assert found["SFT on forward raises y+ on forward tests"]["mean"] == pytest.approx(0.1)
    assert not found["SFT on forward lowers y+ on reverse tests"]["holds"]
    assert found["DPO widens the gap"]["seeds"] == pytest.approx([0.4, 0.4])
    assert found["DPO moves mass to tokens that its start or its end finds implausible (along y+)"]["mean"] == (
        pytest.approx(0.09 - 0.009))
    for name, changed in (("forward", 0), ("reverse", 1)):
        assert found[f"DPO lowers the share of right {name} answers"]["mean"] == -changed
        assert found[f"DPO raises the share of {name} answers that break off"]["mean"] == changed
        assert found[f"an eighth of the learning rate keeps more {name} answers right"]["mean"] == changed
        assert found[f"... {name} y+ in the tenth that loses most, tenth 3"]["mean"] == -0.5
        assert found[f"... where the argmax token rises ({name})"]["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize("every, tests", [(10, 3), (3, 10), (2, 15)])
def test_the_split_parts_no_problem(commands, tmp_path, every, tests):
    """Both directions of a problem lie on one side; forward and reverse are the mixed set's two kinds of rows; of 30
    problems each tenth, third or second is a test."""
    rows = [{"question": f"q{i}{side}", "relevant-question": f"q{i}{1 - side}", "text": "t", "worse-text": "w",
             "sample_type": ("original", "flipped")[side]} for side in (0, 1) for i in range(30)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    experiment.write_data(experiment.read_data(str(tmp_path / "data.parquet"), every), tmp_path / "out", every)
    parts = {file.stem: pandas.read_parquet(file) for file in (tmp_path / "out").glob("*.parquet")}
    problems = {name: {question[:-1] for question in part["question"]} for name, part in parts.items()}
    assert len(parts) == 6 and not problems["train-mixed"] & problems["test-mixed"]
    assert (len(parts["train-mixed"]), len(parts["test-mixed"])) == (60 - 2 * tests, 2 * tests)
    for part in ("train", "test"):
        assert problems[f"{part}-forward"] == problems[f"{part}-reverse"] == problems[f"{part}-mixed"]
        assert set(parts[f"{part}-forward"]["sample_type"]) == {"original"}


def test_a_model_that_fails_is_reported_and_the_next_one_runs(commands, tmp_path, monkeypatch, capsys):
    data = ROOT / "examples" / "piles" / "test.parquet"
    assert call(monkeypatch, "--output_dir", tmp_path, "models/broken", "models/fine", data) == 1
    said = capsys.readouterr()
    assert "error: models/broken failed: train.py ended with 2, x.log: error: can't be opened" in said.err
    assert (tmp_path / "fine" / "findings.json").is_file() and not (tmp_path / "broken" / "findings.json").exists()
    assert [flags[0] for script, flags in commands][:2] == [str(ROOT / "examples" / "real_sft.yaml")] * 2


def test_a_command_that_fails_says_why(tmp_path):
    args = experiment.argparse.Namespace(ranks=1, parallel=1)
    with pytest.raises(experiment.Failed, match=r"plot.py ended with 2, .*x.log: error: unknown argument --what"):
        experiment.run(args, tmp_path / "x", "plot.py", "--what")


def test_intervals_over_seeds():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), t = 4.302653 with two degrees of freedom: 2 +- 2.484."""
    found = experiment.judged("x", [1.0, 2.0, 3.0], 1)
    assert (found["low"], found["high"]) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))
    assert not found["holds"] and experiment.judged("x", [1.9, 2.0, 2.1], 1)["holds"]
    assert experiment.judged("x", [-1.0], -1)["holds"] and not experiment.judged("x", [-1.0], 1)["holds"]
    assert found["text"].endswith("] over 3 seeds")


def test_one_seed_has_no_interval_and_a_small_rise_is_none():
    """An interval of no width would look like certainty. 0.00002 is sure over these seeds, and below 0.001."""
    one = experiment.judged("x", [2.0], 1)
    assert (one["low"], one["high"], one["text"]) == (None, None, "x: +2.0000 in one seed")
    assert not experiment.judged("x", [2e-5, 2.1e-5, 2.2e-5], 1, 0.001)["holds"]
    assert experiment.judged("x", [2e-3, 2.1e-3, 2.2e-3], 1, 0.001)["holds"]


def test_one_test_problem_tells_nothing_of_a_place():
    """It chose the tenth, and nobody is left to say what happens there; a verdict of several seeds is none of a run."""
    line = {"run": "dpo-1", "dataset": "forward", "there": "tenth 3", "numbers": {}}
    there = {f"change of {what} there": {"mean": mean} for what, mean in (("chosen", -0.5), ("argmax", 0.1))}
    several = {"runs": ["dpo-1", "dpo-2"], "dataset": "mixed", "there": "tenth 3", "numbers": there}
    assert experiment.worst_places([line, several, line | {"dataset": "reverse", "numbers": there}]) == {
        "reverse": ("tenth 3", -0.5, 0.1)}


@pytest.mark.parametrize("flags, words", [
    (["model"], "MODEL [MODEL ...] DATA"), (["--seeds", "0"], "--seeds 0"), (["--what"], "unknown argument --what"),
    (["a", "gone.parquet"], "gone.parquet: can't be read"), (["a", "x/a", "gone.parquet"], "share their output"),
    (["a", str(ROOT / "README.md")], "can't be read as Parquet"), (["--test_every", "1"], "--test_every 1"),
    (["--test_every", "900", "a", str(ROOT / "examples" / "piles" / "test.parquet")], "expected 900 problems"),
    (["a", "other.parquet"], "has no column question, worse-text")])
def test_wrong_calls_are_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pandas.DataFrame({"text": ["a"]}).to_parquet("other.parquet")
    assert call(monkeypatch, "--output_dir", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()
