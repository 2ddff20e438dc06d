"""What is scored beside a data set's own answers, and how it is laid into micro-batches. No torch.

Every kind of response is a function of the data set and a seed alone: asking for one more changes no other's numbers.
"""

import random

from .errors import UserError
from .example import Example


def chosen(examples: list[Example], i: int, seed: int) -> list[int] | None:
    return examples[i].chosen


def rejected(examples: list[Example], i: int, seed: int) -> list[int] | None:
    return examples[i].rejected


def other(examples: list[Example], i: int, seed: int) -> list[int] | None:
    """The chosen answer to another question of the set, drawn by seed; None where every row asks the same."""
    draw = random.Random(f"other/{seed}/{examples[i].row}")
    # A few draws find one wherever prompts differ at all; a set of one prompt has no other question.
    for j in draw.choices(range(len(examples)), k=100):
        if examples[j].prompt != examples[i].prompt:
            return examples[j].chosen
    return None


def shuffled(examples: list[Example], i: int, seed: int) -> list[int] | None:
    """The chosen answer's tokens in random order, its last token (the end of turn) in its place."""
    *body, end = examples[i].chosen
    random.Random(f"shuffled/{seed}/{examples[i].row}").shuffle(body)
    return [*body, end]


KINDS = {"chosen": chosen, "rejected": rejected, "other": other, "shuffled": shuffled}


def make_groups(examples: list[Example], kinds: list[str], seed: int) -> list[tuple[list[int], dict[str, list[int]]]]:
    """(prompt ids, {kind: response ids}) of each example. Raises UserError for a kind that no row has."""
    groups = []
    for i, example in enumerate(examples):
        found = {kind: KINDS[kind](examples, i, seed) for kind in kinds}
        groups.append((example.prompt, {kind: ids for kind, ids in found.items() if ids}))
    for kind in kinds:
        if not any(kind in responses for _, responses in groups):
            raise UserError(f"--responses {kind}: no row of the data set has one")
    return groups


def batches(groups, budget: int) -> list[list[int]]:
    """Indices of groups, longest first, cut into micro-batches of at most `budget` tokens and at least a group."""
    sizes = [len(prompt) + sum(map(len, responses.values())) for prompt, responses in groups]
    cut, room = [], 0
    for i in sorted(range(len(groups)), key=lambda i: (-sizes[i], i)):
        if sizes[i] > room:
            cut.append([])
            room = budget
        cut[-1].append(i)
        room -= sizes[i]
    return cut
