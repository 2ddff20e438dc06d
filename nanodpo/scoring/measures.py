"""Measures a model's distribution along a response, in the kernel's own chunks.

Shapes: N scored tokens, S sequences, C tokens in a chunk, V vocabulary, D hidden size; the largest
tensor is (C, V).

    logps             log p(token), nats: the numbers of the kernel, bit for bit
    argmax_logps      log of the largest probability, nats
    entropy           -sum p log p, nats
    rank              1 for the likeliest token: one more than the number of tokens above this one
    implausible_mass        probability of all tokens that the starting checkpoint, or this one, gives less than
                            IMPLAUSIBLE at this place
    implausible_mass_start  what the starting checkpoint gave these same tokens

Why both checkpoints choose the tokens: those that the start alone calls implausible were picked for being small there,
and rise on average whatever happens, as the lowest marks of one exam do in the next. Here start and end have the same
part in the choice, and one set of tokens is weighed under both. If the two were exchanged, the change would be the same
with the other sign: a model that only jitters changes nothing on average, one that exchanges a likely token for another
changes nothing, and one that spreads its probability over what was and is unlikely shows a rise.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from ..core.logprobs import chunk_logps, sum_by_sequence
from ..core.packing import Batch
from ..run.metrics import LOWEST

# Of each token: the columns of tokens.parquet, where one token's log-prob is called logp, not logps.
TOKEN_MEASURES = ["logps", "entropy", "argmax_logps", "rank", "implausible_mass", "implausible_mass_start"]
# Means over a response's tokens, in scores.parquet, summary.csv and sections.csv.
MEASURES = ["argmax_logps", "entropy", "argmax_mass", "implausible_mass", "implausible_mass_start", "accuracy"]
# Of each token, from (n,) measures of it: those of MEASURES that are no column of tokens.parquet.
DERIVED = {"argmax_mass": lambda measures: np.exp(measures["argmax_logps"]),
           "accuracy": lambda measures: measures["rank"] == 1}
IMPLAUSIBLE = 1e-3
# Of the start: (N,) how many plausible tokens a place has, (N,) the probability of all others; (K,) the ids and (K,)
# the probabilities of the plausible ones, one place after the other.
Sets = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def token_measures(module, batch: Batch, plausible: Sets | None, on_chunk=None
                   ) -> tuple[dict[str, Tensor], Sets, Tensor]:
    """A batch -> (measures by name, (N,) each), the plausible tokens of each place, (S, D) float64 sums of states.

    Without `plausible` this model is the starting checkpoint: the sets are its own. `module` is a SequenceLogProbs.
    `on_chunk` is called with each chunk: which of the N places, and their (C, V) probabilities.
    """
    states, parts, sets, z, p = module.states(batch), [], [], None, None
    if plausible is not None:
        counts, rest, ids, before = plausible
        borders = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # of the places in the last two
    size = module.head.chunk_size
    for i in range(0, len(states) or 1, size):  # once at least: a rank's part may have no scored token
        here = slice(i, i + size)
        known = None
        if plausible is not None:
            entries = slice(borders[i], borders[i + len(counts[here])])
            known = counts[here], rest[here], ids[entries], before[entries]
        z = module.head.logits(states[here], z)  # every chunk in the memory of the first, which no other is larger than
        p = torch.empty_like(z) if p is None else p[: len(z)]
        found, own = _measure(z, p, batch.targets[here], known, on_chunk and functools.partial(on_chunk, here))
        parts.append(found)
        sets.append(own)
    measures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    lengths = batch.sequence_ids.bincount(minlength=batch.n_sequences).tolist()
    sums = torch.stack([part.double().sum(0) for part in states.split(lengths)])
    return measures, tuple(map(torch.cat, zip(*sets))), sums


def _measure(z: Tensor, p: Tensor, targets: Tensor, plausible: Sets | None, on_chunk) -> tuple[dict[str, Tensor], Sets]:
    """(C, V) logits, as much memory for their probabilities, both of which it overwrites, and (C,) targets ->
    measures, and the plausible tokens. Hands `on_chunk` the probabilities."""
    # Counted in p's memory: a CPU sums truth values thirty times slower, and float32 holds all integers up to 2^24.
    rank = 1 + torch.gt(z, z.gather(1, targets[:, None]), out=p).sum(1).int()
    chunk = chunk_logps(z, targets, p)  # from here on z is logit minus largest logit
    p.div_(chunk.total[:, None])
    log_total = chunk.total.log()
    found = {"logps": chunk.logps, "argmax_logps": 0 - log_total, "rank": rank}  # not -log_total, which may be -0
    if on_chunk:
        on_chunk(p)
    found["entropy"] = -z.sub_(log_total[:, None]).clamp_(min=LOWEST).mul_(p).sum(1)
    if plausible is None:
        place, ids = (p >= IMPLAUSIBLE).nonzero(as_tuple=True)
        plausible = place.bincount(minlength=len(p)), None, ids, p[place, ids]
    counts, rest, ids, before = plausible
    place = torch.arange(len(p), device=p.device).repeat_interleave(counts)
    here = p[place, ids]
    faded = here < IMPLAUSIBLE  # plausible at the start alone
    # Summed over what is left, not 1 - the plausible ones': it is small, and would drown in the rounding.
    p[place, ids] = here * faded
    found["implausible_mass"] = p.sum(1)
    rest = found["implausible_mass"] if rest is None else rest
    # In one order, which CUDA's index_add has not.
    found["implausible_mass_start"] = (rest + sum_by_sequence(before * faded, place, len(p))).to(rest.dtype)
    return found, (counts, rest, ids, before)
