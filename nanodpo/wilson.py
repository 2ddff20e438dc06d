"""Wilson's interval of a share (JASA 22, 1927), over problems: rows of one problem count for less (stats.py)."""

import math

import numpy as np

from .stats import problem_error, t_quantile

Z = 1.959964  # of the normal distribution at 95%


def wilson(hits: np.ndarray, problems) -> tuple[float, float]:
    """(centre, reach) of the 95% interval of the share of hits, which are 0 or 1: centre -+ reach stays between 0 and 1
    and has a width at either end.

    >>> [round(float(value), 3) for value in wilson(np.array([0.0, 0.0, 1.0, 1.0]), ["a", "b", "c", "d"])]
    [0.5, 0.35]
    """
    p, n = hits.mean(), len(hits) * worth(hits, problems)
    centre, reach = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    return centre / (1 + Z * Z / n), reach / (1 + Z * Z / n)


def worth(values: np.ndarray, problems) -> float:
    """How much a row counts, at most 1, for a row of a problem of its own: of a share, the variance that independent
    rows would have by the one over problems, and fewer degrees of freedom (Korn & Graubard, Survey Methodology 24).
    Where all values are equal nothing is known, and a problem counts as one row."""
    n, (sem, count) = len(values), problem_error(values, problems)
    if count in (n, 1):
        return 1.0
    variance = values.var(ddof=1)
    if variance == 0:
        return count / n
    return (t_quantile(n - 1) / t_quantile(count - 1)) ** 2 / max(1.0, sem**2 * n / variance)
