"""One pair in tokens (of SFT data one response). A row of the data that lists several answers gives several pairs.

A first reading needs `Example` alone. Its prompt, chosen and rejected read as lists of token ids; the classes before it
keep these lists in a ninth of their memory.
"""

import array
import dataclasses
import functools
from typing import NamedTuple

SIDES = ("chosen", "rejected")  # of a pair, in the order of all its columns


class PartlyScored(list):
    """Token ids of a response in which not all is an answer: only the tokens at the places `scored` count."""

    def __init__(self, ids: list[int], scored: list[int]):
        super().__init__(ids)
        self.scored = scored


class CompactIds(NamedTuple):
    """Token ids in 4 bytes each, where a list of numbers takes 36: in an array, or in a file in memory."""

    ids: array.array | memoryview
    scored: array.array | memoryview | None = None  # the places of a PartlyScored

    @classmethod
    def of(cls, ids: list[int]) -> "CompactIds":
        scored = getattr(ids, "scored", None)
        return cls(array.array("i", ids), None if scored is None else array.array("i", scored))


class TokenIds:
    """A field of token ids: set to a list of them or as CompactIds, kept as CompactIds, and read as a new list."""

    def __set_name__(self, owner, name: str):
        self.name = f"_{name}"

    def __set__(self, example, ids: list[int] | CompactIds | None) -> None:
        setattr(example, self.name, ids if ids is None or isinstance(ids, CompactIds) else CompactIds.of(ids))

    def __get__(self, example, owner=None) -> list[int] | None:
        if example is None:
            raise AttributeError("no default")  # dataclasses asks the class for one
        if (kept := getattr(example, self.name)) is None:
            return None
        ids, scored = kept
        return ids.tolist() if scored is None else PartlyScored(ids.tolist(), scored.tolist())


@dataclasses.dataclass
class Example:
    """Prompt ids, and the ids of each response with its end of turn; rejected is None in SFT data."""

    row: int  # number of the row in the data set, counted through all files of it
    prompt: list[int] = TokenIds()
    chosen: list[int] = TokenIds()
    rejected: list[int] | None = TokenIds()
    cut: tuple[bool, bool] = (False, False)  # was chosen, rejected truncated
    more: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # responses of further columns
    weight: float = 1.0  # of the row in the loss
    answer_numbers: tuple[int, int] = (0, 0)  # the numbers of chosen and rejected in the row's lists of answers
    problem: str = dataclasses.field(default="", compare=False)  # the same in rows of one problem, a short hash

    @property
    def length(self) -> int:
        """The longest [prompt | response], in tokens."""
        return len(self._prompt.ids) + max(len(side.ids) for side in (self._chosen, self._rejected) if side)

    def compact(self) -> tuple[CompactIds, CompactIds, CompactIds | None]:
        """Prompt, chosen and rejected as they are kept."""
        return self._prompt, self._chosen, self._rejected

    def number_of(self, side: str) -> int:
        """The number of this side's response in the row's list of answers."""
        return self.answer_numbers[SIDES.index(side)]

    def follows(self, other: "Example") -> bool:
        """Whether both are pairs of one row, and this one comes later."""
        return self.row == other.row and self.answer_numbers > other.answer_numbers

    def last_answer(self) -> "Example":
        """The same row with the last of several scored answers as its response, and all before it as its prompt."""
        if not isinstance(self.chosen, PartlyScored):
            return self
        scored = self.chosen.scored
        # The last answer begins at the last scored place that does not follow another one.
        start = max(place for place, before in zip(scored, [-2, *scored]) if place - 1 != before)
        return dataclasses.replace(self, prompt=self.prompt + self.chosen[:start], chosen=self.chosen[start:])


def trained_sides(loss_name: str) -> tuple[str, ...]:
    """The sides of a pair on which a loss of this name trains: SFT on chosen alone."""
    return SIDES[:1] if loss_name == "sft" else SIDES


class RowStarts(tuple):
    """The indices of the first pair of each row. A tuple is hashed anew each time that a cache is asked with it, which
    takes milliseconds where there are a million rows; this one is hashed once."""

    @functools.cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


def row_starts(examples: list[Example]) -> RowStarts | None:
    """The indices of the first pair of each row; None where every row is one pair."""
    starts = [i for i, example in enumerate(examples) if not (i and example.follows(examples[i - 1]))]
    return None if len(starts) == len(examples) else RowStarts(starts)
