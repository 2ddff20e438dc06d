"""Plans a scoring: which results are asked for, which of them are there, and what is missing.

A result is kept and found again by itself. It is of one kind (scores, tokens, risers, gradients, answers, greedy), of
one checkpoint, and of responses that are scored for each other: chosen and rejected together, every other response
alone. Asking for one more scores that one alone.
"""

import dataclasses

from ..data.example import SIDES
from .contents import hash_of
from .datasets import ResponseSet
from .measures import MEASURES, TOKEN_MEASURES
from .parts import Parts
from .plausible import Sets
from .responses import GREEDY, Group
from .runs import Checkpoint

FORWARD = ("scores", "tokens", "risers")  # kinds that one forward pass gives


@dataclasses.dataclass
class Result:
    """`rows` are {row of the file: index of its example}, `key` is a hash of everything that could change a number,
    `family` the same but for how long an answer may be, and how many risers are kept."""

    kind: str
    responses: tuple[str, ...] | None
    rows: dict[int, int]
    family: str
    key: str
    missing: set[int] = dataclasses.field(default_factory=set)  # rows that are not done

    def held(self, rows) -> dict:
        """The entry for these rows in a part's list of what it holds."""
        return {"responses": self.responses, "rows": set(rows), "family": self.family}


@dataclasses.dataclass
class Work:
    """A checkpoint and a data set, with the results that are asked for or there."""

    checkpoint: Checkpoint
    data: ResponseSet
    start: Checkpoint | None  # of its run's step 0
    results: list[Result]
    k: int = 0  # tokens that gained and that lost most, of each position, where these are asked for

    @property
    def is_start(self) -> bool:
        return self.start is not None and self.start.key == self.checkpoint.key

    def of_kind(self, *kinds: str) -> list[Result]:
        return [result for result in self.results if result.kind in kinds]

    def missing(self, *kinds: str) -> dict[int, list[Result]]:
        """{index of an example: the results of these kinds in which it is missing}."""
        found = {}
        for result in self.of_kind(*kinds):
            for row in result.missing:
                found.setdefault(result.rows[row], []).append(result)
        return dict(sorted(found.items()))

    def missing_groups(self) -> list[Group]:
        """The groups of the examples, with the responses alone of which a forward pass is missing."""
        missing = self.missing(*FORWARD)
        kinds = {i: {kind for result in results for kind in result.responses} for i, results in missing.items()}
        return [(prompt, {kind: ids for kind, ids in responses.items() if kind in kinds.get(i, ())})
                for i, (prompt, responses) in enumerate(self.data.groups)]

    def start_sets(self, parts: Parts, rows: set[int]) -> dict[tuple[int, str], Sets] | None:
        """{(row, response): tokens that the run's start found plausible} of these rows; None where this is the start,
        or there is none."""
        if self.start is None or self.is_start:
            return None
        found, asked = {}, [result.responses for result in self.of_kind("scores", "tokens")]
        # The start may have scored chosen with rejected, or alone, or both; what was scored likewise is taken then.
        for unit in dict.fromkeys(unit for own in asked for unit in (SIDES, own) if {*unit} & {*own}):
            key = response_result("scores", self.start.key, self.start.key, self.data, unit).key
            found |= parts.sets(key, rows)
        return found


def plan(checkpoints: list[Checkpoint], datasets: list[ResponseSet], parts: Parts, tokens: bool,
         gradients: bool, risers: int) -> list[Work]:
    """All checkpoints on all data sets, in order of work: a run's start comes first. `tokens`, `gradients`: these are
    asked for, too; `risers`: how many of these, if any."""
    work, starts = [], {c.run: c for c in checkpoints if c.step == 0}
    asked = {"scores": True, "tokens": tokens, "risers": risers, "gradients": gradients}
    for checkpoint in checkpoints:
        for data in datasets:
            start = starts.get(checkpoint.run)
            results = response_results(checkpoint, start and start.key, data, parts, asked)
            if answers := answer_result("answers", checkpoint, data, data.questions, parts, bool(data.questions)):
                results.append(answers)
            work.append(Work(checkpoint, data, start, results, risers))
    return work


def response_results(checkpoint: Checkpoint, start: str | None, data: ResponseSet, parts: Parts,
                     asked: dict[str, int]) -> list[Result]:
    """The results that are asked for, and those that earlier calls left of the same weights and responses."""
    def result_of(kind, unit):
        result = response_result(kind, checkpoint.key, start, data, unit)
        if kind == "risers":  # where they are not asked for, those that were made last
            result.key = hash_of([result.family, asked[kind]]) if asked[kind] else parts.newest(result.family) or ""
        result.missing = result.rows.keys() - parts.rows(result.key)
        return result

    found, scored = [], units(data.asked)
    for unit in units(data.kinds):
        if unit not in scored and not result_of("scores", unit).missing:
            scored = [other for other in scored if not {*other} & {*unit}] + [unit]
    for unit in scored:
        for kind in asked:
            if kind == "gradients" and unit != SIDES:  # they are of a pair
                continue
            if kind == "risers" and start in (None, checkpoint.key):  # nothing has moved since the start
                continue
            result = result_of(kind, unit)
            if not result.missing or asked[kind] and {*unit} & {*data.asked}:
                found.append(result)
    return found


def response_result(kind: str, model: str, start: str | None, data: ResponseSet, unit: tuple[str, ...]) -> Result:
    """Scores, tokens, risers or gradients of a unit. `model` and `start` are keys of checkpoints. The key holds the
    measures too, so that kept results which lack a new one are not taken for it."""
    rows, content = data.rows_with(unit)
    more = {"gradients": [], "risers": [start]}.get(kind, [start, MEASURES, TOKEN_MEASURES])
    key = hash_of([kind, model, *more, content])
    return Result(kind, unit, rows, key, key)


def units(kinds: list[str]) -> list[tuple[str, ...]]:
    """The responses that are scored for each other.

    >>> units(["other", "rejected", "chosen"]), units(["chosen", "greedy"])
    ([('chosen', 'rejected'), ('other',)], [('chosen',), ('greedy',)])
    """
    pair = [SIDES] if {*SIDES} <= {*kinds} else []
    return pair + [(kind,) for kind in kinds if not (pair and kind in SIDES)]


def greedy_result(first: Checkpoint, data: ResponseSet, parts: Parts) -> Result | None:
    """The first checkpoint's own answers to all prompts: where they are a response that is asked for, or there; else
    None."""
    asked, rows = GREEDY in data.asked, {example.row: i for i, example in enumerate(data.examples)}
    result = answer_result(GREEDY, first, data, rows, parts, asked)
    return None if result is None or result.missing and not asked else result


def answer_result(kind: str, checkpoint: Checkpoint, data: ResponseSet, rows: dict[int, int], parts: Parts,
                  asked: bool) -> Result | None:
    """Greedy answers to these rows; where they are not asked for, those that were made last, of whatever length."""
    family = hash_of([kind, checkpoint.key, data.prompts_hash, data.limit, data.ends])
    key = hash_of([family, data.answer_limit]) if asked else parts.newest(family)
    if key is None:
        return None
    return Result(kind, None, rows, family, key, rows.keys() - parts.rows(key))
