"""The schedule of a run: the order of the data, the pairs of each step, the learning rate.

All are pure functions of the step and the settings, so a run can go on from the step number alone.
"""

import functools
import math
import random


def permutation(n: int, name: str) -> tuple[int, ...]:
    """The numbers 0 to n - 1 in an order that this name decides: the same wherever it is asked for."""
    order = list(range(n))
    random.Random(name).shuffle(order)
    return tuple(order)


def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order in which epoch `epoch` visits n examples."""
    return permutation(n, f"{seed}/{epoch}")


def steps_of(max_steps: int, epochs: float, steps_per_epoch: int) -> int:
    """Steps of a run, at least one: `max_steps` where it is above 0, else epochs * steps_per_epoch, rounded up."""
    # 1.1 * 50 is a little above 55 in floating point.
    return max_steps if max_steps > 0 else max(1, math.ceil(round(epochs * steps_per_epoch, 6)))


@functools.lru_cache(maxsize=2)  # each step asks for it again
def pair_order(n: int, seed: int, epoch: int, starts: tuple[int, ...] | None) -> tuple[int, ...]:
    """The order in which an epoch visits n pairs: that of its rows. Pairs of one row stay together; `starts` has the
    index of each row's first pair, None where every row is one pair.

    >>> epoch_order(3, 0, 0), pair_order(6, 0, 0, (0, 1, 4))
    ((0, 2, 1), (0, 4, 5, 1, 2, 3))
    """
    if starts is None:
        return epoch_order(n, seed, epoch)
    ends = (*starts[1:], n)
    return tuple(i for row in epoch_order(len(starts), seed, epoch) for i in range(starts[row], ends[row]))


def pairs_of_step(n: int, pairs_per_step: int, seed: int, step: int,
                  starts: tuple[int, ...] | None = None) -> list[int]:
    """Indices of the pairs of a step, which `pair_order` puts in order; steps count from 0. An epoch's last step takes
    what is left: no pair comes twice in an epoch."""
    epoch, step_of_epoch = divmod(step, math.ceil(n / pairs_per_step))
    start = step_of_epoch * pairs_per_step
    return list(pair_order(n, seed, epoch, starts)[start : start + pairs_per_step])


def micro_batches_of(pairs: list[int], batch_size: int, rank: int, world: int) -> list[tuple[list[int], float]]:
    """This rank's micro-batches of a step's pairs: (indices, factor) each. Every rank gets the same number.

    A rank that has fewer than others repeats the step's first micro-batch with factor 0, so that it does not count:
    under ZeRO-3 every forward pass is work of all ranks, and ranks with different numbers of them would wait for ever.

    >>> micro_batches_of([5, 6, 7], 2, rank=0, world=2), micro_batches_of([5, 6, 7], 2, rank=1, world=2)
    ([([5, 6], 1.0)], [([7], 1.0)])
    >>> micro_batches_of([5, 6, 7], 1, rank=1, world=2)
    [([6], 1.0), ([5], 0.0)]
    """
    cut = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    mine = [(indices, 1.0) for indices in cut[rank::world]]
    return mine + [(cut[0], 0.0)] * (math.ceil(len(cut) / world) - len(mine))


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, kind: str) -> float:
    """The learning rate of step `step` of 0 .. steps-1.

    In the warm-up it is peak (step + 1) / warmup_steps. Afterwards `kind`, the value of --lr_scheduler_type, decides:
    constant, or a decay that would reach 0 at step `steps`. (transformers starts its warm-up at a rate of 0, so its
    first step changes nothing.)
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / (steps - warmup_steps)
    return peak * {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[kind]
