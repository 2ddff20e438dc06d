"""Means and shares over rows, their standard errors, and how far a 95% interval reaches.

Rows of one problem are alike, and count for less than as many rows of different problems: what varies by chance is the
problem. Standard errors are therefore taken over problems, not over rows.
"""

import functools
import math

import numpy as np
import pandas

Z = 1.959964  # of the normal distribution at 95%


@functools.cache
def t_quantile(freedom: int) -> float:
    """Student's t that lies within +- this value with probability 0.95 (Abramowitz & Stegun 26.7.3 and 26.7.4).

    NaN for less than one degree of freedom: a single number has no interval.
    """
    if freedom < 1:
        return math.nan
    low, high = 0.0, math.pi / 2
    while (angle := (low + high) / 2) not in (low, high):  # until no float lies between
        low, high = (angle, high) if _within(angle, freedom) < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)): a finite sum of powers of the cosine."""
    odd, total = freedom % 2, 0.0
    term = math.cos(angle) if odd else 1.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def problem_error(values: np.ndarray, problems) -> tuple[float, int]:
    """(standard error of the values' mean, number of problems); `problems` names each value's.

    The jackknife over problems (CV3 of MacKinnon, Nielsen and Webb, Journal of Applied Econometrics 38, 671), robust to
    rows that share a problem, and to problems of different sizes: how far the mean moves as each of G problems is left
    out, sqrt((G - 1) / G sum of squares). From the sum s of the deviations in a problem of n_g rows out of n that is
    s / (1 - n_g / n) / n. Where every row is a problem of its own it is standard deviation / sqrt(n).
    """
    names, codes = np.unique(problems, return_inverse=True)
    if (n := len(names)) < 2:
        return math.nan, n
    moves = np.bincount(codes, values - values.mean()) / (1 - np.bincount(codes) / len(values)) / len(values)
    return math.sqrt((n - 1) / n * (moves**2).sum()), n


def over_problems(table: pandas.DataFrame, keys: list[str], column: str) -> pandas.DataFrame:
    """The mean of `column` in each group of rows that agree in `keys`: mean, sem, low, high (the 95% interval, missing
    for a single problem), n (rows that have a number), rows (all of them), problems.

    sem is that of `problem_error`, by the rows' column `problem`, for all groups at once; low and high are mean -+
    t(problems - 1) sem.
    """
    groups = table.groupby(keys, sort=False)[column]
    found = groups.agg(mean="mean", n="count", rows="size")
    away = (table[column] - groups.transform("mean")).rename("away")
    each = table[[*keys, "problem"]].join(away)[away.notna()].groupby([*keys, "problem"], sort=False)["away"].agg(
        ["sum", "size"])
    part = each["size"] / each["size"].groupby(level=keys, sort=False).transform("sum")
    squares = (each["sum"] / (1 - part)).pow(2).groupby(level=keys, sort=False).agg(problems="size", total="sum")
    squares = squares.reindex(found.index)
    problems = squares["problems"].fillna(0).astype(int)
    found["sem"] = (squares["total"] * (problems - 1) / problems.where(problems > 1)) ** 0.5 / found["n"]
    reach = (problems - 1).map(t_quantile) * found["sem"]
    return found.assign(problems=problems, low=found["mean"] - reach, high=found["mean"] + reach).reset_index()


def rank_correlation(x: np.ndarray, y: np.ndarray, problems) -> tuple[float, float, float]:
    """(Spearman's rank correlation, low, high), the ends of a 95% interval: NaN for less than five problems, and where
    all x or all y are equal or lie in one order, of which there is no interval.

    The interval is the jackknife's: Fisher's z = atanh(rho) as each of G problems is left out, -+ t(G - 1) standard
    errors. Ranks are those of all rows: leaving a problem out shifts the others' by next to nothing. Four problems are
    in one order or the opposite one in 2 of 24 cases by chance alone, too often for 95%.

    >>> rank_correlation(np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5]), list("abcde"))[0]
    0.8
    """
    ranks = np.array([pandas.Series(values).rank().to_numpy() for values in (x, y)])
    ranks -= (len(x) + 1) / 2
    names, codes = np.unique(problems, return_inverse=True)
    # Of each problem: rows, sums of ranks, of their squares and of their products.
    parts = np.array([np.bincount(codes, part, len(names)) for part in (
        np.ones(len(x)), *ranks, *ranks**2, ranks[0] * ranks[1])])
    whole = parts.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho, *without = np.concatenate([_correlation(*whole), _correlation(*(whole - parts))]).tolist()
        z, count = np.arctanh(without), len(names)
    rho = round(rho, 12)
    if count < 5 or not np.isfinite(z).all() or not abs(rho) < 1:
        return rho, math.nan, math.nan
    reach = t_quantile(count - 1) * math.sqrt((count - 1) / count * ((z - z.mean()) ** 2).sum())
    return rho, math.tanh(math.atanh(rho) - reach), math.tanh(math.atanh(rho) + reach)


def _correlation(n, x, y, xx, yy, xy):
    """Pearson's, from sums."""
    return (xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))


def wilson(hits: np.ndarray, problems) -> tuple[float, float]:
    """(centre, reach) of Wilson's 95% interval (JASA 22, 1927) of the share of hits, which are 0 or 1: centre -+ reach
    stays between 0 and 1 and has a width at either end.

    >>> [round(float(value), 3) for value in wilson(np.array([0.0, 0.0, 1.0, 1.0]), ["a", "b", "c", "d"])]
    [0.5, 0.35]
    """
    p, n = hits.mean(), len(hits) * effective_share(hits, problems)
    centre, reach = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    return centre / (1 + Z * Z / n), reach / (1 + Z * Z / n)


def effective_share(values: np.ndarray, problems) -> float:
    """The effective number of rows divided by their number, at most 1: for a share of rows, of which several may be of
    one problem. The inverse of the design effect, the variance over problems divided by that of independent rows,
    corrected for fewer degrees of freedom (Korn & Graubard, Survey Methodology 24). Where all values are equal nothing
    is known of it, and a problem counts as one row."""
    n, (sem, count) = len(values), problem_error(values, problems)
    if count in (n, 1):
        return 1.0
    variance = values.var(ddof=1)
    if variance == 0:
        return count / n
    return (t_quantile(n - 1) / t_quantile(count - 1)) ** 2 / max(1.0, sem**2 * n / variance)
