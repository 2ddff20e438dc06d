"""Weights of several data sets: which rows an epoch has, counted by hand."""

import json
from collections import Counter

import pytest
from conftest import ROOT, forked, train

from nanodpo.data.example import Example
from nanodpo.data.mixing import mix, read_weights
from nanodpo.data.tokens import DataSet
from nanodpo.errors import UserError
from nanodpo.run.start import prepare


def two(rows=range(10)) -> DataSet:
    """Files of four and of six rows, of which these are used."""
    return DataSet("a.jsonl,b.jsonl", [Example(row, [row], [1], [2]) for row in rows], [], Counter(), sizes=[4, 6])


def mixed(weights, seed=0, rows=range(10)) -> list[int]:
    data = two(rows)
    mix(data, weights, seed)
    return [example.row for example in data.examples]


def test_an_epoch_has_each_row_as_often_as_its_weight_says():
    """2: each twice. 0.5: three of six, none twice. 1.5: each once and half of them again."""
    assert mixed([1, 1]) == [*range(10)] and Counter(mixed([2, 1])) == Counter([0, 1, 2, 3] * 2 + [*range(4, 10)])
    found = Counter(mixed([1.5, 0.5]))
    assert sorted(found[row] for row in range(4)) == [1, 1, 2, 2]
    assert sorted(found[row] for row in range(4, 10)) == [0, 0, 0, 1, 1, 1]


def test_the_rows_that_are_drawn_follow_from_the_seed():
    """Every seed has its own, drawn apart for each data set; over many seeds each row comes equally often."""
    assert mixed([0.5, 0.5], 3) == mixed([0.5, 0.5], 3) and mixed([0.5, 0.5], 3) != mixed([0.5, 0.5], 4)
    assert [row for row in mixed([0.5, 0.5], 3) if row > 3] == [row for row in mixed([1, 0.5], 3) if row > 3]
    found = Counter(row for seed in range(600) for row in mixed([0.25, 0.5], seed))
    assert all(110 < found[row] < 190 for row in range(4)) and all(250 < found[row] < 350 for row in range(4, 10))


def test_rows_that_are_not_used_count_for_nothing():
    """A weight is of the rows that are left: of two rows of the second file half is one."""
    rows = [0, 1, 2, 3, 5, 9]
    assert Counter(row > 3 for row in mixed([1, 0.5], rows=rows)) == {False: 4, True: 1}
    data = two(rows)
    data.dropped = [{"file": "", "row": row, "reason": "r"} for row in (4, 6, 7, 8)]
    mix(data, [1, 0.5], 0)
    assert data.report().splitlines()[:2] == [
        "data a.jsonl,b.jsonl: 6 rows, 4 dropped",
        "  an epoch has 5 rows: 4 of a.jsonl (1 times 4), 1 of b.jsonl (0.5 times 2)"]
    for weights, what in (([0.1, 1], "0.1: leaves none of 4 usable rows of a.jsonl"), ([1, 0.2], "none of 2 usable")):
        with pytest.raises(UserError, match=what):
            mix(two(rows), weights, 0)


@pytest.mark.parametrize("text, path, what", [
    ("1,x", "a,b", "must be numbers with commas between"), ("", "a", "must be numbers"), ("1,,2", "a,b", "must be"),
    ("1,0", "a,b", "0 must be above 0"), ("-1,1", "a,b", "-1 must be"), ("nan,1", "a,b", "nan must be above 0"),
    ("inf,1", "a,b", "inf must be"), ("1,1001", "a,b", "1001 must be above 0 and at most 1000"),
    ("1", "a,b", "is 1 number, and --train_file_path a,b names 2 data sets"),
    ("1,2,3", "a,b", "is 3 numbers"), ("1,2", "a", "names 1 data set$")])
def test_weights_that_mean_nothing_are_refused(text, path, what):
    with pytest.raises(UserError, match=f"^--mix_weights {text}: .*{what}"):
        read_weights(text, path)


def run_of(tiny, tmp_path):
    lines = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    for name, rows in (("a", lines[:4]), ("b", lines[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    names = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    return lambda *more: ["--model_name", str(tiny / "model"), "--train_file_path", names, "--cache_dir",
                          str(tmp_path / "cache"), *more]


def test_no_row_that_is_held_out_is_trained_on(tiny, tmp_path, capsys):
    """They are drawn before, the same for all weights; what is recorded of the data is the same, too. The screen says
    which of the two sets is which."""
    flags = run_of(tiny, tmp_path)
    starts = [prepare(flags("--output_dir", str(tmp_path / name), "--eval_size", "3", *more), ROOT / "train.py")
              for name, more in (("x", ()), ("y", ("--mix_weights", "3,0.5")))]
    said = capsys.readouterr().out.splitlines()
    assert [sum(line.startswith(start) for line in said) for start in ("data ", "held-out data 3 rows of ")] == [2, 2]
    held = [[example.row for example in start.held_out.examples] for start in starts]
    trained = [Counter(example.row for example in start.train_set.examples) for start in starts]
    assert held[0] == held[1] and not {*held[1]} & {*trained[1]}
    assert starts[0].facts["data"] == starts[1].facts["data"]
    assert all(": 11 rows, " in start.facts["data_report"][0] for start in starts)  # the held-out ones included
    assert {*trained[1]} <= {*trained[0]} and all(trained[1][row] == 3 for row in range(4) if row not in held[1])


def test_a_run_with_weights_is_recorded_and_scored(tiny, tmp_path):
    """2 * 4 + round(7 / 2) rows are 12 steps; other weights are another run; score.py finds the data unchanged."""
    flags = ("--mix_weights", "2,0.5", "--train_file_path", run_of(tiny, tmp_path)()[3])
    lines = train(tiny, tmp_path / "run", *flags)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sum("loss" in line for line in lines) == record["steps"] == 12
    assert record["arguments"]["mix_weights"] == "2,0.5" and "an epoch has 12 rows: 8 of " in record["data_report"][0]
    codes, said = forked(ROOT / "train.py", *run_of(tiny, tmp_path)("--output_dir", tmp_path / "run", "--draw", "false",
                                                                  "--mix_weights", "2,1"))
    assert codes == [2] and "--mix_weights: 2,0.5 -> 2,1" in said
    codes, said = forked(ROOT / "score.py", tmp_path / "run", "--output_dir", tmp_path / "scores")
    assert codes == [0], said


def test_inspect_shows_the_epoch_that_a_run_would_have(tiny, tmp_path, capsys):
    """Four rows twice, of seven none but round(7 / 4) = 2; each row can be looked at, and says how often it comes."""
    flags = run_of(tiny, tmp_path)("--mix_weights", "2,0.25", "--inspect")
    train_set = prepare([flag for flag in flags if flag != "--inspect"] + ["--output_dir", str(tmp_path / "run")],
                        ROOT / "train.py").train_set
    drawn = Counter(example.row for example in train_set.examples)
    left_out = next(row for row in range(4, 11) if row not in drawn)
    for row, times in ((0, "2 times"), (max(drawn), "1 time"), (left_out, "0 times")):
        capsys.readouterr()
        assert prepare([*flags, "--inspect_row", str(row)], ROOT / "train.py") is None
        said = capsys.readouterr().out
        assert "an epoch has 10 rows: 8 of " in said and f"\nrow {row}, {times} in an epoch; [scored" in said
        assert said.count("--- chosen: ") == 1
    with pytest.raises(UserError, match="^--without_rows .*: this row is not drawn by --mix_weights, and is"):
        prepare([*flags, "--without_rows", str(left_out)], ROOT / "train.py")
    with pytest.raises(UserError, match="^--mix_weights 0.01: leaves none of 4 usable rows"):
        prepare(run_of(tiny, tmp_path)("--mix_weights", "0.01,1", "--inspect"), ROOT / "train.py")


@pytest.mark.parametrize("more, what", [
    (("--mix_weights", "1"), "^--mix_weights 1: is 1 number"),
    (("--split", "train"), "a.jsonl::train: .jsonl files hold no splits; leave out 'train'"),
    (("--split", "a,b"), "^--split a,b: must be one split"),
    (("--eval_split", "test"), "^--eval_split test: has no meaning without --eval_file_path"),
    (("--train_file_path", "org/name:c:train", "--split", "test"), "^--split test: org/name:c:train names a split al")])
def test_flags_that_fit_no_data_are_refused_before_a_model_is_read(tiny, tmp_path, more, what):
    with pytest.raises(UserError, match=what):
        prepare(run_of(tiny, tmp_path)("--output_dir", str(tmp_path / "run"), *more), ROOT / "train.py")
    assert not (tmp_path / "run").exists()
