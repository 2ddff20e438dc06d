"""Means, shares and their changes with 95% intervals: {"mean", "low", "high", "n"}. A single row has no interval."""

import math

import pandas

from ..student import t_quantile

Z = 1.959964


def change(table: pandas.DataFrame, column: str, first, last) -> dict[str, float]:
    """Of a column from step to step, row by row."""
    return mean(_differences(table, column, first, last))


def change_of_share(table: pandas.DataFrame, column: str, first, last) -> dict[str, float]:
    """Of a column of True and False, row by row: Agresti and Min's interval, which adds half a row to each of the four
    cells of the table before by after, and so has a width where no row changed (Statistics in Medicine 24, 729)."""
    values = _differences(table.assign(**{column: table[column].astype(float)}), column, first, last)
    n, up, down = len(values), (values > 0).sum(), (values < 0).sum()
    centre = (up - down) / (n + 2)
    reach = Z * math.sqrt(up + down + 1 - (up - down) ** 2 / (n + 2)) / (n + 2)
    return {"mean": values.mean(), "n": n} | _interval(centre, reach, n)


def mean(values: pandas.Series) -> dict[str, float]:
    """Mean +- Student's t standard errors."""
    values = values.dropna()
    reach = t_quantile(len(values) - 1) * values.sem()
    return {"mean": values.mean(), "n": len(values)} | _interval(values.mean(), reach, len(values))


def share(hits: pandas.Series) -> dict[str, float]:
    """A share of rows; Wilson's interval (JASA 22, 1927) stays between 0 and 1 and has a width at either end."""
    n = len(hits)
    if not n:
        return {"mean": math.nan, "n": 0}
    p = hits.mean()
    centre, reach = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    low, high = ((centre + side * reach) / (1 + Z * Z / n) for side in (-1, 1))
    return {"mean": p, "low": low, "high": high, "n": n}


def _differences(table, column: str, first, last) -> pandas.Series:
    wide = table.pivot(index="row", columns="step", values=column)
    if not {first, last} <= set(wide):
        return pandas.Series(dtype=float)
    return (wide[last] - wide[first]).dropna()


def _interval(centre: float, reach: float, n: int) -> dict[str, float]:
    return {"low": centre - reach, "high": centre + reach} if n > 1 else {}
