"""From pairs of token ids to batches, and to log-probabilities without gradients. Torch only.

A group is a prompt with its responses, as packing.py takes it; all groups of a call have the same number of responses.

Shapes: P groups, R responses of each.
"""

import torch
from torch import Tensor

from .packing import LAYOUTS, Batch, Group, scored_places


def groups_of(examples: list, sides: list[str]) -> list[Group]:
    """The group of each example: its `prompt` ids, and the ids of these sides of it, e.g. its `chosen`."""
    return [(example.prompt, [getattr(example, side) for side in sides]) for example in examples]


def total_tokens(groups: list[Group]) -> int:
    """Prompts and responses, together; a prompt that responses share counts once."""
    return sum(len(prompt) + sum(map(len, responses)) for prompt, responses in groups)


def make_batch(groups: list[Group], layout: str, device: torch.device) -> Batch:
    """One forward pass for all groups, in a layout of packing.py, on `device`."""
    return LAYOUTS[layout](groups).to(device)


def response_lengths(groups: list[Group], device: torch.device) -> Tensor:
    """(P, R) float64: how many tokens of each response are scored."""
    counts = [[len(scored_places(response)) for response in responses] for _, responses in groups]
    return torch.tensor(counts, dtype=torch.float64).to(device, non_blocking=True)


@torch.no_grad()
def response_logps(model, groups: list[Group], layout: str, device: torch.device) -> Tensor:
    """(P, R) float64: log pi(y|x) of each response, summed over its tokens, nats; without gradients.

    `model` is a SequenceLogProbs or DeepSpeed's engine around one.
    """
    return model(make_batch(groups, layout, device)).view(len(groups), -1)
