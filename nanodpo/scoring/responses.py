"""Makes the responses that are scored beside a data set's own, and cuts them into micro-batches. No torch.

Every kind of response is a function of the data set and a seed alone: asking for one more changes no other's numbers.
"""

import dataclasses
import random

from ..data.example import Example
from ..errors import UserError

Group = tuple[list[int], dict[str, list[int]]]  # prompt ids, {kind: response ids}


def other(examples: list[Example], i: int, seed: int) -> list[int] | None:
    """The chosen answer to another question of another problem, drawn by seed; None where a hundred draws find none
    that is neither of the row's own answers."""
    own = examples[i]
    draw = random.Random(f"other/{seed}/{own.row}")
    for j in draw.choices(range(len(examples)), k=100):
        found = examples[j]
        another = found.prompt != own.prompt and not (own.problem and found.problem == own.problem)
        if another and found.chosen not in (own.chosen, own.rejected):
            return found.chosen
    return None


def shuffled(examples: list[Example], i: int, seed: int) -> list[int] | None:
    """The chosen answer's tokens in random order, its last token (the end of turn) in its place; None where no order is
    another one."""
    *body, end = chosen = examples[i].chosen
    if len(set(body)) < 2:
        return None
    draw = random.Random(f"shuffled/{seed}/{examples[i].row}")
    while [*body, end] == chosen:
        draw.shuffle(body)
    return [*body, end]


KINDS = {"chosen": lambda examples, i, seed: examples[i].chosen,
         "rejected": lambda examples, i, seed: examples[i].rejected, "other": other, "shuffled": shuffled}
GREEDY = "greedy"  # the starting model's own answer, which takes the model to know


def one_a_row(examples: list[Example]) -> tuple[list[Example], list[str]]:
    """(the first pair of each row, names): the further answers of a row's lists are among its `more`, under names like
    rejected[2]. An answer that follows another prompt (that of the last answer of a conversation of its own) is not."""
    found, names, before = [], {}, None
    for example in examples:
        if before is None or not example.follows(before):
            found.append(dataclasses.replace(example, more={**example.more}))
        for side, number, own in zip(("chosen", "rejected"), example.answer_numbers, found[-1].answer_numbers):
            ids = getattr(example, side)
            if number != own and ids is not None and example.prompt == found[-1].prompt:
                found[-1].more[f"{side}[{number}]"] = ids
                names[number, f"{side}[{number}]"] = None
        before = example
    return found, [name for _, name in sorted(names)]


def make_groups(examples: list[Example], kinds: list[str], seed: int, limit: int) -> list[Group]:
    """(prompt ids, {kind: response ids}) of each example, in the order of `kinds`; a name of no kind is a column's.

    An answer to another question is cut where prompt and response would pass `limit` tokens. Raises UserError for a
    kind that no row has.
    """
    groups = []
    for i, example in enumerate(examples):
        found = {kind: KINDS[kind](examples, i, seed) if kind in KINDS else example.more.get(kind) for kind in kinds}
        room = limit - len(example.prompt)
        groups.append((example.prompt, {kind: ids[:room] for kind, ids in found.items() if ids}))
    for kind in kinds:
        if kind != GREEDY and not any(kind in responses for _, responses in groups):
            raise UserError(f"--responses {kind}: no row of the data set has one")
    return groups


def batches(groups: list[Group], budget: int) -> list[list[int]]:
    """Indices of groups, longest first, cut into micro-batches of at most `budget` tokens and at least a group.

    A group without responses is in none."""
    sizes = [len(prompt) + sum(map(len, responses.values())) for prompt, responses in groups]
    cut, room = [], 0
    for i in sorted((i for i, group in enumerate(groups) if group[1]), key=lambda i: (-sizes[i], i)):
        if sizes[i] > room:
            cut.append([])
            room = budget
        cut[-1].append(i)
        room -= sizes[i]
    return cut
