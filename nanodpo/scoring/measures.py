"""What a model's distribution looks like along a response, taken in the kernel's own chunks. Torch only.

Shapes: N scored tokens, S sequences, C tokens in a chunk, V vocabulary, D hidden size; the largest
tensor is (C, V).

    logps             log p(token), nats: the numbers of the kernel, bit for bit
    argmax_logps      log of the largest probability, nats
    entropy           -sum p log p, nats
    rank              1 for the likeliest token: one more than the number of tokens above this one
    implausible_mass  probability of all tokens that the starting checkpoint gave less than IMPLAUSIBLE at this place
"""

import torch
from torch import Tensor

IMPLAUSIBLE = 1e-3
FLOOR = -1e4  # below it exp is 0 in any precision, and 0 times it is 0, where 0 times -inf would be NaN
Sets = tuple[Tensor, Tensor]  # (N,) how many plausible tokens a place has, and their ids, one place after the other


@torch.no_grad()
def token_measures(module, row, plausible: Sets | None) -> tuple[dict[str, Tensor], Sets, Tensor]:
    """A row -> (measures by name, (N,) each), the plausible tokens of each place, (S, D) float64 sums of states.

    Without `plausible` this model is the starting checkpoint: the sets are its own. `module` is a SequenceLogProbs.
    """
    states, parts, sets = module.states(row), [], []
    borders = None if plausible is None else torch.cat([plausible[0].new_zeros(1), plausible[0].cumsum(0)])
    for i in range(0, len(states), module.head.chunk):
        here = slice(i, i + module.head.chunk)
        known = None
        if plausible is not None:
            counts = plausible[0][here]
            known = counts, plausible[1][borders[i] : borders[i + len(counts)]]
        found, own = _measure(module.head.logits(states[here]), row.targets[here], known)
        parts.append(found)
        sets.append(own)
    measures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    lengths = row.seq.bincount(minlength=row.n_sequences).tolist()
    sums = torch.stack([part.double().sum(0) for part in states.split(lengths)])
    return measures, (torch.cat([c for c, _ in sets]), torch.cat([ids for _, ids in sets])), sums


def _measure(z: Tensor, targets: Tensor, plausible: Sets | None) -> tuple[dict[str, Tensor], Sets]:
    """(C, V) logits, which it overwrites, and (C,) targets -> measures, and the plausible tokens."""
    at, top = z.gather(1, targets[:, None]), z.amax(1, keepdim=True)
    rank = 1 + (z > at).sum(1, keepdim=True, dtype=torch.int32)
    p = z.sub_(top).exp()
    total = p.sum(1, keepdim=True)
    lse = top + total.log()  # in the kernel's own steps, for its own bits
    found = {"logps": at - lse, "argmax_logps": top - lse, "rank": rank}
    p.div_(total)
    found["entropy"] = -z.sub_(total.log()).clamp_(min=FLOOR).mul_(p).sum(1, keepdim=True)
    if plausible is None:
        kept = p >= IMPLAUSIBLE
        plausible = kept.sum(1), kept.nonzero()[:, 1]
    counts, ids = plausible
    # Summed over the rest, not 1 - the plausible ones': what is left is small, and would drown in the rounding.
    p[torch.arange(len(p), device=p.device).repeat_interleave(counts), ids] = 0
    found["implausible_mass"] = p.sum(1, keepdim=True)
    return {name: value.squeeze(1) for name, value in found.items()}, plausible
