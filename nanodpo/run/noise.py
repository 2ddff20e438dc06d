"""Measures, before the first step of a --bf16 run, by how much rounding alone changes its numbers.

The embeddings are changed by a part in a million, eight units in float32's last place. That is no change of the model
that matters, but every later rounding to bfloat16 falls out differently. The difference of the log-probs is noise, and
a change of that size in training may be noise as well.
"""

import json
import math

import torch

from ..errors import UserError
from ..ranks.distributed import sum_over_ranks

PART, PAIRS = 2.0**-20, 8
LONG = 10  # steps, below which a run is too short to say that it learns nothing
MARGIN, LOGPS = "rewards/margins", ("logps_per_token/chosen", "logps_per_token/rejected")


def count(pairs: int) -> int:
    """The number of pairs to measure with, for a run that trains on `pairs` in all. Each takes two forward passes:
    where the run has 50 pairs or more, no more than two for 25 of its pairs."""
    return max(2, min(PAIRS, pairs // 25))


@torch.no_grad()
def measure(engine, score, batches, lengths, beta: float | None) -> dict[str, float]:
    """The standard deviation, for one pair, of the difference between two passes that should not differ: nats, by
    metric. That of a mean over n pairs is sqrt(n) times smaller. All ranks must call it, with as many batches.

    `score` maps indices to (P, R) log-probs, `lengths` to (P, R) token counts; `batches` are (indices, factor) of this
    rank. `beta`: None without a reference.
    """
    names = LOGPS if beta is None else (MARGIN, *LOGPS)
    embeddings = engine.module.model.get_input_embeddings()
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)
    was_training = engine.training
    engine.eval()
    for indices, factor in batches:
        first = score(indices).double().cpu()
        # Within this the embeddings are larger by PART.
        with embeddings.register_forward_hook(lambda module, args, states: states * (1 + PART)):
            change = score(indices).double().cpu() - first
        values = [] if beta is None else [beta * (change[:, 0] - change[:, 1])]
        values += [*(change / lengths(indices)).unbind(1)]  # chosen alone, where there is no rejected
        for i, value in enumerate(values):
            sums[i] += factor * value.square().sum()
        sums[-1] += factor * len(change)
    engine.train(was_training)
    *squares, pairs = sum_over_ranks(sums.to(embeddings.weight.device)).tolist()
    return {name: math.sqrt(square / pairs) for name, square in zip(names, squares[: len(values)])}


def of_record(record: dict, file) -> dict[str, float]:
    """The result of `measure` in a run's run.json; empty for a run in float32. Raises UserError, which names the file,
    where it is not what train.py writes."""
    noise = record.get("noise")
    if noise is None:
        return {}
    if not isinstance(noise, dict) or not all(type(x) in (int, float) and 0 <= x <= 1e12 for x in noise.values()):
        raise UserError(f"{file}: is not what train.py writes: noise is {json.dumps(noise)[:100]}")
    return noise


def of_seeds(deviations: list[float]) -> float:
    """The standard deviation that rounding gives the mean over runs of several seeds, from that of each run's change.
    Half of a change's variance is the start's rounding: seeds begin with one model, and no number of them averages it
    out."""
    count = len(deviations)
    return math.sqrt(sum(x * x for x in deviations) / count * (1 + 1 / count) / 2)


def nothing_learned(lines: list[dict], noise: dict[str, float], pairs_per_step: int, rate: float) -> str | None:
    """A line for the end of a run of 10 steps or more whose margins, over its last half, are no larger than twice the
    noise of a step's mean (root mean square); else None. `lines`: those of metrics.jsonl, `rate`: its learning rate."""
    margins = [line[MARGIN] for line in lines if MARGIN in line] if MARGIN in noise else []
    last, here = margins[len(margins) // 2:], noise.get(MARGIN, 0.0) / math.sqrt(pairs_per_step)
    if len(margins) < LONG or (size := math.sqrt(sum(x * x for x in last) / len(last))) > 2 * here:
        return None
    return (f"nothing is learned: {MARGIN} of the last {len(last)} steps are {size:.1g} (root mean square), within "
            f"bfloat16's noise of {here:.1g} for a step's mean. --learning_rate {rate:g} may be too small, the run too "
            "short or most of it warm-up, or the two sides of a pair too much alike")


def describe(noise: dict[str, float], pairs_per_step: int) -> str:
    """A line for the screen: the noise of a run's main metric, for one pair and for a step's mean."""
    name = MARGIN if MARGIN in noise else LOGPS[0]
    step = f", +-{noise[name] / math.sqrt(pairs_per_step):.1g} in a step's mean of {pairs_per_step}"
    return (f"bfloat16 noise: {name} +-{noise[name]:.1g} for one pair{step if pairs_per_step > 1 else ''}; a change "
            "below that means nothing")
