"""The pieces that a scoring asks for; each is kept and found again by itself.

A piece is one kind of result (scores, tokens, gradients, answers, greedy) of one checkpoint and of responses that are
scored for each other: chosen and rejected are one piece, every other response is its own. Asking for one more scores
that one alone.
"""

import dataclasses
import hashlib
import json

PAIR = ("chosen", "rejected")


@dataclasses.dataclass
class Need:
    """One piece: `rows` are {row of the file: index of its example}, `key` says everything that could change a number,
    `family` the same but for how long an answer may be."""

    what: str
    responses: tuple[str, ...] | None
    rows: dict[int, int]
    family: str
    key: str
    missing: set[int] = dataclasses.field(default_factory=set)  # rows that are not done

    def holds(self, rows) -> dict:
        return {"what": self.what, "responses": self.responses, "rows": set(rows), "family": self.family}


def hash_of(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def units(kinds: list[str]) -> list[tuple[str, ...]]:
    """Responses in the pieces that are scored together.

    >>> units(["other", "rejected", "chosen"]), units(["chosen", "greedy"])
    ([('chosen', 'rejected'), ('other',)], [('chosen',), ('greedy',)])
    """
    pair = [PAIR] if {*PAIR} <= {*kinds} else []
    return pair + [(kind,) for kind in kinds if not (pair and kind in PAIR)]


def of_responses(what: str, model: str, start: str | None, probe, unit: tuple[str, ...]) -> Need:
    """Scores, tokens or gradients of a unit. `model` and `start` are keys of checkpoints."""
    rows, data = probe.said(unit)
    key = hash_of([what, model, None if what == "gradients" else start, data])
    return Need(what, unit, rows, key, key)


def of_answers(what: str, model: str, probe, most: int, rows: dict[int, int]) -> Need:
    """Greedy answers, of at most so many tokens, to the prompts of these rows."""
    family = hash_of([what, model, probe.prompts, probe.limit, probe.ends])
    return Need(what, None, rows, family, hash_of([family, most]))
