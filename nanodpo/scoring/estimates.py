"""Means, shares and their changes over rows, with 95% intervals: {"mean", "low", "high", "n", "problems"}.

Values are a Series by row and problem (index levels); n counts rows. Rows of one problem are alike, so that intervals
are over problems: of means by standard errors that are robust to it (stats.py), of shares by counting the rows as
fewer. A single problem has no interval. Over runs: {"mean", "low", "high", "n"}, and n counts runs.
"""

import math

import pandas

from ..stats import Z, effective_share, problem_error, t_quantile, wilson

ROW = ["row", "problem"]


def change(table: pandas.DataFrame, column: str, first, last) -> dict[str, float]:
    """The mean change of a column from step `first` to `last`, row by row, in the column's unit."""
    return mean(differences(table, column, first, last))


def change_of_share(table: pandas.DataFrame, column: str, first, last) -> dict[str, float]:
    """The change of the share of rows in which a column is True, from step `first` to `last`. With Agresti and Min's
    interval, which adds half a row to each of the four cells of the table before by after, and so has a width where no
    row changed (Statistics in Medicine 24, 729)."""
    values = differences(table.assign(**{column: table[column].astype(float)}), column, first, last)
    each = effective_share(values.to_numpy(), _problems(values)) if len(values) else 1.0
    n, up, down = (each * count for count in (len(values), (values > 0).sum(), (values < 0).sum()))
    centre = (up - down) / (n + 2)
    reach = Z * math.sqrt(up + down + 1 - (up - down) ** 2 / (n + 2)) / (n + 2)
    ends = _interval(centre, reach, values)
    return _count(values) | {name: min(1.0, max(-1.0, end)) for name, end in ends.items()}


def mean(values: pandas.Series) -> dict[str, float]:
    """Mean -+ Student's t standard errors."""
    values = values.dropna()
    if values.empty:
        return _count(values)
    sem, problems = problem_error(values.to_numpy(), _problems(values))
    return _count(values) | _interval(values.mean(), t_quantile(problems - 1) * sem, values)


def share(hits: pandas.Series) -> dict[str, float]:
    """The share of rows that are True. Wilson's interval (JASA 22, 1927) stays between 0 and 1 and has a width at
    either end."""
    if hits.empty:
        return _count(hits)
    return _count(hits) | _interval(*wilson(hits.to_numpy(dtype=float), _problems(hits)), hits)


def over_runs(numbers: list[dict[str, float]], ends: tuple[float, float] | None = None) -> dict[str, float]:
    """A number's mean over runs of several seeds -+ Student's t standard errors. `ends`: of a count divided by rows (a
    share, a mean length), or of its change, the smallest and the largest value. It is known to 1 / rows alone, so its
    standard deviation over runs is taken to be no less than that of a number that was rounded so: runs that agree by
    chance are no proof."""
    values = pandas.Series([stats["mean"] for stats in numbers])
    deviation, (lowest, highest) = values.std(), ends or (-math.inf, math.inf)
    if ends:
        deviation = max(deviation, 1 / (math.sqrt(12) * min(stats["n"] for stats in numbers)))
    reach = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return {"mean": values.mean(), "low": max(lowest, values.mean() - reach),
            "high": min(highest, values.mean() + reach), "n": len(values)}


def at_both(table: pandas.DataFrame, first, last) -> pandas.DataFrame:
    """The lines of these two steps, of the rows that have one at each."""
    ends = table[table["step"].isin((first, last))]
    return ends[ends.groupby("row")["step"].transform("size") == len({first, last})]


def differences(table: pandas.DataFrame, column: str, first, last) -> pandas.Series:
    """How far a column moved in each row that has it at both steps."""
    wide = table.pivot(index=ROW, columns="step", values=column)
    if not {first, last} <= set(wide):
        return pandas.Series(dtype=float)
    return (wide[last] - wide[first]).dropna()


def _count(values: pandas.Series) -> dict[str, float]:
    if values.empty:
        return {"mean": math.nan, "n": 0}
    return {"mean": values.mean(), "n": len(values), "problems": _problems(values).nunique()}


def _interval(centre: float, reach: float, values: pandas.Series) -> dict[str, float]:
    """Of a single problem, none."""
    return {"low": centre - reach, "high": centre + reach} if _problems(values).nunique() > 1 else {}


def _problems(values: pandas.Series) -> pandas.Index:
    return values.index.get_level_values("problem")
