"""From pairs of token ids to batches, and to log-probabilities without gradients. Torch only.

Shapes: P pairs, R responses of each, S responses of all groups. A group is a prompt with its responses (packing.py).
"""

import torch
from torch import Tensor

from .packing import LAYOUTS, Batch, Group, scored_places


def groups_of(examples: list, sides: list[str]) -> tuple[list[Group], Tensor]:
    """(groups, index): prompts with the ids of these sides, e.g. `chosen`, and (P, R): the numbers of each pair's
    responses among the S of all groups. A pair has a group of its own; but where a row of the data has lists of
    answers, those of its pairs that follow each other are one group, with the prompt once and each answer once."""
    groups, index, known = [], [], {}  # known: (group, side, number of the answer) -> its place among the S
    for before, example in zip([None, *examples], examples):
        if before is None or not example.follows(before):
            groups.append((example.prompt, []))
        index.append([])
        for side in sides:
            if (key := (len(groups), side, example.number_of(side))) not in known:
                known[key] = len(known)
                groups[-1][1].append(getattr(example, side))
            index[-1].append(known[key])
    return groups, torch.tensor(index)


def total_tokens(groups: list[Group]) -> int:
    """Prompts and responses, together; a prompt that responses share counts once."""
    return sum(len(prompt) + sum(map(len, responses)) for prompt, responses in groups)


def make_batch(examples: list, sides: list[str], layout: str, device: torch.device) -> tuple[Batch, Tensor]:
    """(one forward pass for these sides of all pairs, in a layout of packing.py, on `device`; (P, R): the numbers of
    each pair's responses among the S of the batch)."""
    groups, index = groups_of(examples, sides)
    return LAYOUTS[layout](groups).to(device), index.to(device, non_blocking=True)


def pair_lengths(examples: list, sides: list[str], device: torch.device | None = None) -> Tensor:
    """(P, R) float64: how many tokens of each response are scored."""
    counts = [[len(scored_places(getattr(example, side))) for side in sides] for example in examples]
    return torch.tensor(counts, dtype=torch.float64).to(device, non_blocking=True)


@torch.no_grad()
def response_logps(model, examples: list, sides: list[str], layout: str, device: torch.device) -> Tensor:
    """(P, R) float64: log pi(y|x) of each response, summed over its tokens, nats; without gradients.
    `model` is a SequenceLogProbs or DeepSpeed's engine around one."""
    batch, index = make_batch(examples, sides, layout, device)
    return model(batch)[index]
