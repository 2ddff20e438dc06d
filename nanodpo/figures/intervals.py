"""Scores of rows -> curves: means and 95% intervals, over rows or over seeds.

A table of curves has a line per run, phase, dataset, response and step: at (the place on the x axis), mean, low, high
(NaN where there is no interval), n (rows), left_out (rows whose score is missing), all in nats per token.
"""

import math

import pandas

from ..stats import over_problems, t_quantile, wilson

KEYS = ["dataset", "run", "phase", "response"]
OVER_PROBLEMS = "over problems; n counts rows"  # of an interval, in captions


def levels(scores: pandas.DataFrame) -> pandas.DataFrame:
    """Curves of mean_logps; of the gap, chosen - rejected of a row, too. The interval is mean +- t sem over rows,
    those of one problem taken together (stats.py); none for a single problem. Scores that are missing (NaN) are left
    out."""
    rows = ["dataset", "run", "phase", "step", "at", "row", "problem"]
    sides = [scores[scores["response"] == side].set_index(rows)["mean_logps"] for side in ("chosen", "rejected")]
    gap = (sides[0] - sides[1]).dropna().reset_index().assign(response="gap")  # of rows that have both
    return _over_rows(pandas.concat([scores, gap], ignore_index=True) if len(gap) else scores)


def changes(scores: pandas.DataFrame, since: list[str]) -> pandas.DataFrame:
    """Curves of how far mean_logps moved, row by row, since the first place of the rows that agree in `since`.

    The interval is that of the rows' own changes: narrower than a level's, since what tells rows apart is gone.
    """
    since = [*since, "row"]
    first = scores["at"] == scores.groupby(since)["at"].transform("min")
    start = scores[first].set_index(since)["mean_logps"].rename("start")
    moved = scores.join(start, on=since)
    return _over_rows(moved.assign(mean_logps=moved["mean_logps"] - moved["start"]))


def shares(answers: pandas.DataFrame) -> pandas.DataFrame:
    """Curves of the share of rows whose answer is `correct`, with Wilson's interval over problems; none for a single
    problem."""
    keys, lines = ["dataset", "run", "phase", "step", "at"], []
    for key, group in answers.groupby(keys, sort=False):
        hits = group["correct"].to_numpy(dtype=float)
        centre, reach = wilson(hits, group["problem"]) if group["problem"].nunique() > 1 else (math.nan, math.nan)
        lines.append(dict(zip(keys, key)) | {"mean": hits.mean(), "n": len(hits), "low": centre - reach,
                                             "high": centre + reach, "response": "right answers", "left_out": 0})
    return pandas.DataFrame(lines)


def over_seeds(curves: pandas.DataFrame) -> pandas.DataFrame:
    """Curves of one role's runs -> their mean, its 95% t-interval over runs; one run keeps its interval over rows."""
    runs = curves["run"].nunique()
    if runs == 1:
        return curves
    groups = curves.groupby("at")
    table = groups.agg(mean=("mean", "mean"), sem=("mean", "sem"), left_out=("left_out", "sum")).reset_index()
    reach = t_quantile(runs - 1) * table["sem"]
    return table.assign(low=table["mean"] - reach, high=table["mean"] + reach)


def _over_rows(scores: pandas.DataFrame) -> pandas.DataFrame:
    table = over_problems(scores, [*KEYS, "step", "at"], "mean_logps")
    return table.assign(left_out=table["rows"] - table["n"]).drop(columns=["sem", "rows", "problems"])


def said_missing(curves: pandas.DataFrame) -> str:
    """The words for the rows whose score is missing, behind others; none where none is."""
    count = int(curves["left_out"].sum())
    return f", {count:,} score{'s' * (count > 1)} missing" * (count > 0)


def moved(curves: pandas.DataFrame) -> pandas.DataFrame:
    """Curves of means alone -> their change since their first place; no interval, for that needs the rows."""
    first = curves.sort_values("at", kind="stable").groupby(KEYS)["mean"].transform("first")
    return curves.assign(mean=curves["mean"] - first, low=math.nan, high=math.nan)


def with_gaps(curves: pandas.DataFrame) -> pandas.DataFrame:
    """Curves of means alone, with the gap, chosen - rejected, of each run and data set that does not have it; no
    interval."""
    curve = ["dataset", "run", "phase"]
    given = curves[curves["response"] == "gap"].set_index(curve).index
    keys = [name for name in curves if name not in ("response", "mean", "low", "high")]
    sides = curves[~curves.set_index(curve).index.isin(given)].pivot(index=keys, columns="response", values="mean")
    if not {"chosen", "rejected"} <= set(sides):
        return curves
    gap = (sides["chosen"] - sides["rejected"]).dropna().reset_index(name="mean").assign(response="gap")
    return pandas.concat([curves, gap], ignore_index=True)
