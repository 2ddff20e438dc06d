"""Student's t: how far an interval of few numbers reaches. No libraries."""

import functools
import math


@functools.cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """Student's t that lies within +- this value with probability `level` (Abramowitz & Stegun 26.7.3 and 26.7.4).

    NaN for less than one degree of freedom: a single number has no interval.
    """
    if freedom < 1:
        return math.nan
    low, high = 0.0, math.pi / 2
    while (angle := (low + high) / 2) not in (low, high):  # until no float lies between
        low, high = (angle, high) if _within(angle, freedom) < level else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)): a finite sum of powers of the cosine."""
    odd, total = freedom % 2, 0.0
    term = math.cos(angle) if odd else 1.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
