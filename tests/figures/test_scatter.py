"""The scatter figure: its points are the tables' numbers, and its correlation that of a loop over problems."""

import itertools
import math

import numpy as np
import pandas
import pytest
from matplotlib.colors import to_hex
from test_plot import draw, make_scores  # noqa: F401, a fixture

from nanodpo.errors import UserError
from nanodpo.figures.axes import COLOURS
from nanodpo.stats import rank_correlation, t_quantile

# CHES before, and how far chosen moved from step 0 to 40: (1, 2, 3, 4, 5) and (-2, -1, -4, -3, -5) halves.
VALUES = {("test", "chosen", 0): [-1.0] * 5, ("test", "chosen", 20): [0.0] * 5,
          ("test", "chosen", 40): [-2.0, -1.5, -3.0, -2.5, -3.5],
          ("test", "rejected", 0): [-1.0] * 5, ("test", "rejected", 40): [-2.0, -3.0, -4.0, -5.0, -6.0]}


def make_pairs(file, ches, run="dpo", **more):
    """pairs.parquet beside a file of scores: {step: ches of the rows of data set test}."""
    pandas.DataFrame([{"run": run, "phase": "dpo", "checkpoint": "c", "step": step, "dataset": "test", "row": row,
                       "problem": f"p{row}", "ches": value} | more for step, values in ches.items()
                      for row, value in enumerate(values)]).to_parquet(file.with_name("pairs.parquet"))


@pytest.fixture
def scores(tmp_path):
    file = make_scores(tmp_path / "scores.parquet", VALUES)
    table = pandas.read_parquet(file)
    table.assign(problem="p" + table["row"].astype(str)).to_parquet(file)
    make_pairs(file, {0: [1.0, 2, 3, 4, 5], 40: [9.0, 8, 7, 6, 6.5]})
    return file


def dots(ax) -> list[tuple]:
    """(x, y) of each row."""
    (line,) = [line for line in ax.get_lines() if line.get_marker() == "o"]
    return list(zip(line.get_xdata(), line.get_ydata()))


def words(ax) -> str:
    (text,) = ax.texts
    return text.get_text()


def test_points_are_the_tables_numbers(scores, draw):  # noqa: F811
    """By itself X is at the first step, and Y the change; ranks 1 to 5 against 4, 5, 2, 3, 1: rho = 1 - 6 (9 + 9 + 1 +
    1 + 16) / (5 * 24) = -0.8."""
    found = draw("--scores", scores, "--scatter", "ches", "chosen.mean_logps")
    (ax,) = found["scatter"].axes
    assert dots(ax) == [(1, -1), (2, -0.5), (3, -2), (4, -1.5), (5, -2.5)]
    assert words(ax).startswith("5 rows, rank correlation \N{MINUS SIGN}0.80 [\N{MINUS SIGN}0.98, ")
    assert ax.get_xlabel() == "ches,\nat step 0" and ax.get_ylabel() == "chosen.mean_logps,\nchange from step 0 to 40"
    assert "ches (at step 0) across, and chosen.mean_logps (change from step 0 to 40) upwards" in found["captions"][
        "scatter"]


def test_of_runs_that_end_at_other_steps_the_ends_have_no_number(scores, draw):  # noqa: F811
    table = pandas.read_parquet(scores)
    short = table[table["step"] < 40].assign(run="short")
    pandas.concat([table, short], ignore_index=True).to_parquet(scores)
    found = draw("--scores", scores, "--scatter", "chosen.mean_logps", "chosen.mean_logps")
    (ax,) = found["scatter"].axes
    assert ax.get_xlabel() == "chosen.mean_logps,\nat the first step"
    assert ax.get_ylabel() == "chosen.mean_logps,\nchange from the first to the last step"
    assert "(at the first step) across, and" in found["captions"]["scatter"]


@pytest.mark.parametrize("x, y, expected", [
    ("ches:change", "ches:last", [(8, 9), (6, 8), (4, 7), (2, 6), (1.5, 6.5)]),
    ("rejected.mean_logps:last", "chosen.mean_logps:first", [(-2, -1), (-3, -1), (-4, -1), (-5, -1), (-6, -1)])])
def test_when_is_said_behind_a_colon(x, y, expected, scores, draw):  # noqa: F811
    (ax,) = draw("--scores", scores, "--scatter", x, y)["scatter"].axes
    assert dots(ax) == expected
    if len({height for _, height in expected}) == 1:  # nothing to correlate with
        assert words(ax) == "5 rows, no rank correlation"


def test_one_row_has_no_correlation(scores, draw):  # noqa: F811
    make_pairs(scores, {0: [1.0]})
    (ax,) = draw("--scores", scores, "--scatter", "ches", "chosen.mean_logps")["scatter"].axes
    assert dots(ax) == [(1, -1)] and words(ax) == "1 row, no rank correlation"


def test_runs_have_colours_and_rows_without_both_are_left_out(scores, draw):  # noqa: F811
    """A second run without one row's CHES; a data set that is not asked for."""
    one, two = pandas.read_parquet(scores), pandas.read_parquet(scores.with_name("pairs.parquet"))
    other = one.assign(run="gentle", mean_logps=-one["mean_logps"])
    pandas.concat([one, other, one.assign(dataset="train")]).to_parquet(scores)
    pandas.concat([two, two.assign(run="gentle").query("row != 3"), two.assign(dataset="train")]).to_parquet(
        scores.with_name("pairs.parquet"))
    (ax,) = draw("--scores", scores, "--scatter", "ches", "chosen.mean_logps", "--test", "test")["scatter"].axes
    lines = [line for line in ax.get_lines() if line.get_marker() in "os"]
    assert [(to_hex(line.get_color()).upper(), len(line.get_xdata())) for line in lines] == [
        (COLOURS[0], 5), (COLOURS[1], 4)]
    assert [text.get_text().partition(",")[0] for text in ax.texts] == ["4 rows", "5 rows"]
    (ax,) = draw("gentle", "--scores", scores, "--scatter", "ches", "chosen.mean_logps", "--test", "test")[
        "scatter"].axes
    assert dots(ax) == [(1, 1), (2, 0.5), (3, 2), (5, 2.5)]
    assert len(draw("--scores", scores, "--scatter", "ches", "ches")["scatter"].axes) == 2


def test_both_measures_are_of_the_steps_that_were_scored(scores, draw):  # noqa: F811
    """A table of pairs that has more steps: its first and last are not the scores'."""
    make_pairs(scores, {step: [step + 1.0, 2, 3, 4, 5] for step in (-5, 0, 40, 50)})
    (ax,) = draw("--scores", scores, "--scatter", "ches:first", "ches:last")["scatter"].axes
    assert dots(ax)[0] == (1, 41) and ax.get_xlabel() == "ches,\nat step 0"


@pytest.mark.parametrize("flags, wrong", [
    (["nope", "ches"], r"pairs.parquet: no column nope; it has run, .*ches"),
    (["ches", "chosen.nope"], r"scores.parquet: no column nope"),
    (["ches", "winner.mean_logps"], r"scores.parquet: no response winner; it has chosen and rejected"),
    (["ches:late", "ches"], "--scatter ches:late: 'late' is none of first, last and change"),
    (["ches", "problem"], "--scatter: problem is no measure"),
    (["ches", "chosen.response"], "--scatter: response is no measure"),
    (["ches", "ches", "--floor", "1"], "are for the figures of curves"),
    (["ches", "ches", "--test", "train"], "no data set called train")])
def test_what_can_not_be_drawn_is_refused(flags, wrong, scores, draw):  # noqa: F811
    with pytest.raises(UserError, match=wrong):
        draw("--scores", scores, "--scatter", *flags)


def test_tables_that_can_not_be_drawn_are_refused(scores, draw):  # noqa: F811
    make_pairs(scores, {0: [1.0, 2], 40: [2.0, 3]}, dataset="elsewhere")
    with pytest.raises(UserError, match="--scatter: no row has both ches and chosen.mean_logps"):
        draw("--scores", scores, "--scatter", "ches", "chosen.mean_logps")
    make_pairs(scores, {0: [1.0, math.inf]})
    with pytest.raises(UserError, match="pairs.parquet, row 1: has a value that is missing or not finite"):
        draw("--scores", scores, "--scatter", "ches", "ches")
    scores.with_name("pairs.parquet").unlink()
    with pytest.raises(UserError, match="pairs.parquet: is not there; score.py makes it where it scores chosen and "
                                        "rejected$"):
        draw("--scores", scores, "--scatter", "ches", "ches")


def test_what_was_scored_at_one_step_has_no_change(tmp_path, scores, draw):  # noqa: F811
    """A model alone, or one checkpoint: all changes would be 0, on a line. Beside a run it is left out."""
    (folder := tmp_path / "base").mkdir()
    base = make_scores(folder / "scores.parquet", {("test", "chosen", 0): [-1.0] * 5}, run="base", phase="")
    table = pandas.read_parquet(base)
    table.assign(problem="p" + table["row"].astype(str)).to_parquet(base)
    make_pairs(base, {0: [1.0, 2, 3, 4, 5]}, run="base")
    with pytest.raises(UserError, match="--scatter chosen.mean_logps: its change is asked for, and no run here was "
                                        "scored at two steps; chosen.mean_logps:first takes one"):
        draw("--scores", base, "--scatter", "ches", "chosen.mean_logps")
    found = draw("--scores", scores, base, "--scatter", "ches", "chosen.mean_logps")
    assert dots(found["scatter"].axes[0]) == [(1, -1), (2, -0.5), (3, -2), (4, -1.5), (5, -2.5)]
    assert "(change from step 0 to 40) upwards, of each row of test under dpo." in found["captions"]["scatter"]
    (ax,) = draw("--scores", base, "--scatter", "ches", "chosen.mean_logps:first")["scatter"].axes
    assert dots(ax) == [(1, -1), (2, -1), (3, -1), (4, -1), (5, -1)]


def test_the_interval_is_a_loop_over_problems():
    """Spearman's rho by its ranks; Fisher's z without each problem in turn, of rows of unequal number, with ties."""
    draws = np.random.default_rng(0)
    x = draws.integers(0, 9, 40).astype(float)
    y = x + 4 * draws.standard_normal(40)
    problems = np.array([f"p{i}" for i in draws.integers(0, 11, 40)])
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(v) == one)) for one in v]) for v in (x, y)]
    rho, low, high = rank_correlation(x, y, problems)
    assert rho == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-10)
    z = np.array([np.arctanh(np.corrcoef(*(r[problems != name] for r in ranks))[0, 1]) for name in set(problems)])
    reach = t_quantile(len(z) - 1) * math.sqrt((len(z) - 1) / len(z) * ((z - z.mean()) ** 2).sum())
    assert (np.arctanh(low), np.arctanh(high)) == pytest.approx((np.arctanh(rho) - reach, np.arctanh(rho) + reach))


def test_the_interval_holds_the_truth():
    """Of normal numbers with correlation 0.5 Spearman's rho is 6 / pi asin(0.25) = 0.483; of 400 intervals over 20
    problems of two rows about 19 of 20 hold it."""
    draws, truth, held = np.random.default_rng(0), 6 / math.pi * math.asin(0.25), 0
    for _ in range(400):
        shared, own = draws.standard_normal((2, 20, 1, 2)), draws.standard_normal((2, 20, 2, 2))
        a, b = (math.sqrt(0.5) * (s + o) for s, o in zip(shared, own))
        x, y = a[..., 0], 0.5 * a[..., 0] + math.sqrt(0.75) * b[..., 1]
        _, low, high = rank_correlation(x.ravel(), y.ravel(), np.repeat(range(20), 2))
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize("rows", [3, 4, 5, 6])
def test_measures_that_have_nothing_in_common_seldom_have_an_interval_without_0(rows):
    """Of all orders of so many rows, each as likely as another, in 1 of 20 at most. Of four rows, 2 of 24 are in one
    order or the opposite one: a 95% interval without 0 can be right for none of the others."""
    x = np.arange(float(rows))
    ends = [rank_correlation(x, np.array(order), x)[1:] for order in itertools.permutations(x)]
    assert np.mean([low > 0 or high < 0 for low, high in ends]) <= 0.05


@pytest.mark.parametrize("x, y, rho", [([1, 2, 3, 4], [2, 4, 6, 9], 1), ([1, 2, 3, 4], [4, 3, 2, 1], -1),
                                       ([1, 2, 3], [2, 1, 3], 0.5), ([1, 2, 3, 4], [2, 1, 4, 3], 0.6),
                                       ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5], math.nan),
                                       (range(40000), [1, 0, *range(2, 40000)], 1)])
def test_no_interval_where_there_is_none(x, y, rho):
    """In one order; of three and four problems; where all are equal; and where rho is less than 1 by 12 / 40000^3
    alone."""
    found, *ends = rank_correlation(np.array(x, float), np.array(y, float), range(len(x)))
    assert found == pytest.approx(rho, nan_ok=True) and all(map(math.isnan, ends))
