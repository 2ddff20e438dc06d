"""Means over rows and their intervals: closed forms, rows that share a problem, and coverage by simulation."""

import hashlib
import math

import numpy as np
import pandas
import pytest

from nanodpo.data.example import Example
from nanodpo.data.problems import find_problems
from nanodpo.figures import intervals
from nanodpo.scoring import estimates, means
from nanodpo.stats import over_problems


def drawn(runs: int, problems: int, rows: int, alike: float, seed: int = 0) -> pandas.DataFrame:
    """Normal values of mean 0 and variance 1 from `runs` experiments, with `rows` rows in each problem, whose
    correlation within a problem is `alike`."""
    random = np.random.default_rng(seed)
    shared, own = random.standard_normal((runs, problems, 1)), random.standard_normal((runs, problems, rows))
    values = math.sqrt(alike) * shared + math.sqrt(1 - alike) * own
    run, problem, _ = np.indices(values.shape)
    return pandas.DataFrame({"run": run.ravel(), "problem": problem.ravel().astype(str), "value": values.ravel()})


def test_the_standard_error_over_problems_by_hand():
    """Rows 1, 3 of one problem, 5 of another, 7 of a third: mean 4, and 6, 11/3 and 3 without each of the problems. The
    jackknife over problems: the squares of 2, 1/3 and 1 are 46/9 in sum, 2/3 of it the square of the error. Student's
    t of two degrees of freedom. The row without a number counts for nothing."""
    table = pandas.DataFrame({"run": "r", "problem": list("aabcc"), "value": [1.0, 3.0, 5.0, 7.0, math.nan]})
    (found,) = over_problems(table, ["run"], "value").to_dict("records")
    sem = math.sqrt(2 / 3 * 46 / 9)
    reach = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * sem
    assert found == {"run": "r", "mean": 4.0, "n": 4, "rows": 5, "problems": 3, "sem": pytest.approx(sem),
                     "low": pytest.approx(4 - reach), "high": pytest.approx(4 + reach)}


def test_rows_of_different_problems_have_the_usual_standard_error():
    """1, 3, 8: standard deviation sqrt(13), by the root of 3. Of a single problem nothing can be said, nor of none."""
    values = [1.0, 3.0, 8.0, 1.0, 2.0, math.nan]
    table = pandas.DataFrame({"run": list("rrrsst"), "problem": list("abcaaa"), "value": values})
    several, single, none = over_problems(table, ["run"], "value").to_dict("records")
    assert several["sem"] == pytest.approx(math.sqrt(13 / 3)) and several["problems"] == 3
    assert single["mean"] == 1.5 and all(math.isnan(single[name]) for name in ("sem", "low", "high"))
    assert (none["n"], none["rows"], none["problems"]) == (0, 1, 0) and math.isnan(none["mean"])


def test_problems_of_equal_size_have_the_interval_of_their_means():
    """Three rows each: what four means 2, 3, 5 and 6 say by themselves, however far the rows of one lie apart."""
    table = pandas.DataFrame([{"run": "r", "problem": str(middle), "value": middle + away}
                              for middle in (2.0, 3.0, 5.0, 6.0) for away in (-9.0, 0.0, 9.0)])
    (found,) = over_problems(table, ["run"], "value").to_dict("records")
    assert found["sem"] == pytest.approx(pandas.Series([2.0, 3.0, 5.0, 6.0]).sem())


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_an_interval_holds_the_truth_in_95_of_100_experiments(rows):
    """2,000 experiments of 30 problems, the rows of one correlated by 0.5; over rows it would be 0.77 to 0.88 of them
    with two or four a problem."""
    found = over_problems(drawn(2000, 30, rows, 0.5), ["run"], "value")
    assert 0.93 < ((found["low"] < 0) & (found["high"] > 0)).mean() < 0.97


def test_problems_of_very_different_size():
    """2,000 experiments of 60 rows, of which one problem has 10, one 20 and the others one each; correlated by 0.5.
    From the sums of deviations alone (CR1), without their leverage, 0.84 of the intervals would hold the truth."""
    table = drawn(2000, 32, 20, 0.5)
    place = table.groupby(["run", "problem"]).cumcount()
    table = table[place < table["problem"].map(lambda name: {"0": 20, "1": 10}.get(name, 1))]
    found = over_problems(table, ["run"], "value")
    assert set(found["n"]) == {60} and set(found["problems"]) == {32}
    assert 0.9 < ((found["low"] < 0) & (found["high"] > 0)).mean() < 0.97


def test_tables_and_figures_have_the_same_intervals():
    """Four rows of two problems: the standard error in summary.csv is the one that a figure's band comes from."""
    key = {"run": "r", "phase": "dpo", "checkpoint": "c", "step": 0, "dataset": "d", "response": "chosen"}
    table = pandas.DataFrame([key | {"row": row, "problem": problem, "mean_logps": value} for row, (problem, value) in
                              enumerate([("a", -1.0), ("a", -2.0), ("b", -4.0), ("b", -5.0)])])
    (line,) = means.summary(table).to_dict("records")
    (curve,) = intervals.levels(table.assign(at=0)).to_dict("records")
    assert (line["n"], line["problems"], line["sem"]) == (4, 2, pytest.approx(1.5))
    assert curve["high"] - curve["mean"] == pytest.approx(1.5 * math.tan(math.pi * 0.475))


def test_rows_of_one_problem_are_known():
    """One prompt, or a question and the one that it is the reverse of, in whatever order; a filler links nobody."""
    rows = [{"question": "a", "relevant-question": "a'"}, {"question": "b", "relevant-question": "none"},
            {"question": "c", "relevant-question": "none"}, {"question": "a'", "relevant-question": "a"},
            {"question": "a"}, {"prompt": "b"}, {"question": ["messages"], "relevant-question": None}]

    def problems(rows, *prompts):
        examples = [Example(i, [prompt], [9], None) for i, prompt in enumerate(prompts)]
        find_problems(examples, {i: (row.get("question"), row.get("relevant-question")) for i, row in enumerate(rows)})
        return [example.problem for example in examples]

    first, second, third, reverse, again, plain, other = problems(rows, 1, 2, 3, 4, 1, 2, 5)
    assert first == reverse == again and second == plain
    assert len({first, second, third, other}) == 4 and all(len(key) == 8 for key in (first, second))
    assert problems(rows[3::-3], 4, 1) == [first, first]
    # Names stay what they are: by them a verdict chooses half of the problems, to look for a tenth on.
    assert plain == hashlib.sha256(b"[2]").hexdigest()[:8] and other == hashlib.sha256(b"[5]").hexdigest()[:8]


def test_both_directions_of_a_trace_are_one_problem_where_they_have_one_question():
    """As in the paper's own data: the reverse row has the forward question as its question, too, its own prompt in its
    text alone, and the reverse question as relevant-question, which no row has as its question."""
    rows = [{"question": name, "relevant-question": f"{name} backwards"} for name in "aabbc"]
    examples = [Example(i, [10 + i], [9], None) for i in range(5)]
    find_problems(examples, {i: (row["question"], row["relevant-question"]) for i, row in enumerate(rows)})
    first, again, second, once_more, third = (example.problem for example in examples)
    assert first == again and second == once_more and len({first, second, third}) == 3


def by_row(values, problems=None) -> pandas.Series:
    """Values as estimates.py takes them; without `problems` every row is one of its own."""
    rows = range(len(values))
    return pandas.Series(values, pandas.MultiIndex.from_arrays([rows, rows if problems is None else problems],
                                                               names=["row", "problem"]))


def test_a_single_row_has_no_interval_and_none_no_number():
    assert estimates.mean(by_row([2.0, float("nan")])) == {"mean": 2.0, "n": 1, "problems": 1}
    assert estimates.share(pandas.Series(dtype=bool))["n"] == 0
    assert "low" not in estimates.share(by_row([True, False], ["a", "a"]))


def test_a_share_over_problems():
    """Four problems of two rows, in which both are right or both wrong: the rows count as the four problems, with fewer
    degrees of freedom: n = 8 (s^2 / 8) / sem^2 (t(7) / t(3))^2, and Wilson's interval of these. All right, as four."""
    found = estimates.share(by_row([True, True, True, True, True, True, False, False], list("aabbccdd")))
    variance, sem = 0.75 * 0.25 * 8 / 7, math.sqrt(4 / 3 * (3 * 0.5**2 + 1.5**2)) / 8
    n, z = 8 * (variance / 8) / sem**2 * (2.364624 / 3.182446) ** 2, 1.959964
    centre, reach = 0.75 + z * z / (2 * n), z * math.sqrt(0.75 * 0.25 / n + z * z / (4 * n * n))
    assert (found["mean"], found["n"], found["problems"]) == (0.75, 8, 4)
    assert found["low"] == pytest.approx((centre - reach) / (1 + z * z / n), rel=1e-5)
    assert found["high"] == pytest.approx((centre + reach) / (1 + z * z / n), rel=1e-5)
    alike = estimates.share(by_row([True] * 8, list("aabbccdd")))
    assert alike["low"] == pytest.approx(estimates.share(by_row([True] * 4))["low"])
    # One of each problem's two is right: all problems are alike, but rows count for no more than independent ones.
    n = 8 * (2.364624 / 3.182446) ** 2
    found = estimates.share(by_row([True, False] * 4, list("aabbccdd")))
    assert found["high"] - 0.5 == pytest.approx(z * math.sqrt(1 / (4 * n) + z * z / (4 * n * n)) / (1 + z * z / n))


@pytest.mark.parametrize("rows", [2, 4])
def test_a_shares_interval_holds_the_truth_in_95_of_100_experiments(rows):
    """600 experiments of 40 problems; 7 of 10 answers are right, those of one problem correlated by 0.5: each is the
    problem's own or, as likely as not, drawn anew (with probability 1 - sqrt(0.5))."""
    random = np.random.default_rng(0)
    shared, own, copied = random.random((600, 40, 1)), random.random((600, 40, rows)), random.random((600, 40, rows))
    hits = np.where(copied < math.sqrt(0.5), shared, own) < 0.7
    problems = np.arange(40).repeat(rows)
    index = by_row(hits[0].ravel(), problems).index
    found = [estimates.share(pandas.Series(hit.ravel(), index)) for hit in hits]
    assert 0.93 < np.mean([line["low"] < 0.7 < line["high"] for line in found]) < 0.975


@pytest.mark.parametrize("before, after, mean, low, high", [
    # (up - down) / (n + 2) +- 1.96 sqrt(up + down + 1 - (up - down)^2 / (n + 2)) / (n + 2)
    ((1,) * 10, (1,) * 10, 0.0, -1.959964 / 12, 1.959964 / 12),
    ((1, 1), (0, 0), -1.0, -1.0, -0.5 + 1.959964 * 2**0.5 / 4),
    ((1, 1, 1, 0), (0, 0, 1, 1), -0.25, (-1 - 1.959964 * (23 / 6) ** 0.5) / 6, (-1 + 1.959964 * (23 / 6) ** 0.5) / 6),
])
def test_a_change_of_a_share_has_agresti_and_mins_interval(before, after, mean, low, high):
    """By hand; two rows that both go wrong are not yet a sure fall, and no change at all has an interval too. No share
    falls by more than 1."""
    table = pandas.DataFrame([{"row": row, "problem": str(row), "step": step, "correct": bool(value)}
                              for step, values in enumerate((before, after)) for row, value in enumerate(values)])
    found = estimates.change_of_share(table, "correct", 0, 1)
    assert found == {"mean": mean, "low": pytest.approx(low), "high": pytest.approx(high), "n": len(before),
                     "problems": len(before)}


def test_an_accuracy_has_wilsons_interval():
    """8 of 10: (.8 + z^2/20 +- z sqrt(.016 + z^2/400)) / (1 + z^2/10), 0.4902 to 0.9433; 10 of 10: 0.7225 to 1."""
    for right, low, high in ((8, 0.4902, 0.9433), (10, 0.7225, 1.0)):
        found = estimates.share(by_row([True] * right + [False] * (10 - right)))
        assert (found["mean"], found["n"]) == (right / 10, 10)
        assert (found["low"], found["high"]) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
