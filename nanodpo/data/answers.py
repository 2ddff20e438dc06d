"""The parts of a row beside one pair: lists of answers, which make several pairs, and its weight in the loss."""

import itertools
import json

from ..errors import UserError

WEIGHT = "weight"  # a column: how much a row counts in the loss
LIMITS = 1e-9, 1e9  # of a weight that is not 0: sums and ratios of any of them are ordinary numbers


def answers_of(value) -> list:
    """The answers in a cell: several, where it is a list of texts or of lists of messages, or else its value.

    >>> answers_of(["4", "four"]), answers_of("4"), answers_of([{"role": "assistant", "content": "4"}])
    (['4', 'four'], ['4'], [[{'role': 'assistant', 'content': '4'}]])
    """
    several = isinstance(value, list) and value and all(isinstance(item, (str, list, type(None))) for item in value)
    return value if several else [value]


def pairs_of(row: dict, chosen: str, rejected: str | None, alone: bool) -> list[tuple[tuple[int, int], dict]]:
    """The pairs of a row: each of its chosen with each of its rejected answers, as rows of one answer a side, with the
    numbers of these answers. `chosen` and `rejected` are columns. `alone`: chosen is trained on alone, so that each of
    its answers comes once, the first one with the first rejected answer and so on, again from the first where there are
    no more."""
    ours, theirs = (answers_of(row[name]) if name else [None] for name in (chosen, rejected))
    numbers = ([(i, i % len(theirs)) for i in range(len(ours))] if alone else
               itertools.product(range(len(ours)), range(len(theirs))))
    return [((i, j), row | {chosen: ours[i]} | ({rejected: theirs[j]} if rejected else {})) for i, j in numbers]


def count_pairs(row: dict, chosen: str, rejected: str | None, alone: bool) -> int:
    """How many pairs `pairs_of` makes of a row."""
    return len(answers_of(row[chosen])) * (1 if alone or not rejected else len(answers_of(row[rejected])))


def weight_of(row: dict, there: bool) -> float:
    """The weight of a row: 1 without the column. Raises UserError where its value is neither 0 nor within LIMITS."""
    value = row[WEIGHT] if there else 1
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (value == 0 or LIMITS[0] <= value <= LIMITS[1]):  # NaN is not
        return float(value)
    raise UserError(f"has the weight {str(value)[:40] if number else json.dumps(value, default=str)[:40]}, and the "
                    "weight of a row in the loss is 0 or a number from 1e-9 to 1e9; give one in every row, or rename "
                    "the column where it means something else")
