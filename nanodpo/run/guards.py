"""Safety checks around a step: requests to stop, rows that are too large for the memory, numbers that are not finite, a
start that is not the reference's.

A pair whose numbers are not finite makes the gradient NaN (`nan_where_nonfinite`), and with such a gradient `update` in
train.py makes no update. Only then `why_left_out` looks for the pair.
"""

import contextlib
import itertools
import math
import statistics

import torch
from torch import Tensor

from ..core.packing import pair_lengths
from ..data.example import SIDES
from ..errors import Preempted, RunStopped
from ..ranks import distributed
from .memory import describe, shortage_named


@contextlib.contextmanager
def guarded(examples: list, stop, rank: int, where: str):
    """Yields the StepGuard of a step that `where` names. Where the memory is too small within the block, raises
    RankStopped, which names the rows of the micro-batch."""
    guard = StepGuard(examples, stop)
    with shortage_named(rank, where, lambda: describe([examples[i] for i in guard.indices])):
        yield guard


class StepGuard:
    """Sees every micro-batch of a step. `examples` are those of the data set, `stop` is a Stop of signals.py."""

    def __init__(self, examples: list, stop):
        self.examples, self.stop = examples, stop
        self.indices = []  # the pairs of the present micro-batch
        self.seen = []  # of each micro-batch: its pairs, their log-probs, and whether these and the losses are finite

    def each(self, micro_batches):
        """The micro-batches, one by one. If any rank was told to stop, raises Preempted on all: an all-reduce that asks
        for it starts before a micro-batch, and is waited for after it. The step's gradients are dropped then, and
        the run goes on later from before this step."""
        for indices, factor in micro_batches:
            self.indices = indices
            answer = distributed.ask(self.stop.name is not None)
            yield indices, factor
            if answer():
                raise Preempted(self.stop.farewell)

    def nan_where_nonfinite(self, indices: list[int], logps: Tensor, losses: Tensor) -> Tensor:
        """(P,) losses of (P, R) log-probs -> the same, but NaN for a pair whose log-probs or loss are not finite: the
        whole step's gradient is NaN then, and no update is made. Remembers what it was given. Does not wait for the
        GPU."""
        fine = torch.cat([logps.detach(), losses.detach()[:, None]], 1).isfinite()
        self.seen.append((indices, logps.detach(), fine))
        if logps.requires_grad:  # the gradient of a NaN is 0 where a loss is flat, as hinge at a rejected of -inf
            logps.register_hook(lambda grad: torch.where(fine.all(1, keepdim=True), grad, torch.nan))
        return losses * torch.where(fine.all(1), 1.0, torch.nan)

    def nonfinite_pairs(self) -> dict[int, list[str]]:
        """The pairs of this rank with numbers that are not finite: index -> of chosen, rejected and loss those that are
        not."""
        return {i: [name for name, fine in zip([*SIDES[: len(row) - 1], "loss"], row) if not fine]
                for indices, _, finite in self.seen for i, row in zip(indices, finite.tolist()) if not all(row)}

    def nonfinite_rows(self) -> str:
        """The rows of all ranks that went wrong, with their lengths and the side; empty where none did. All ranks must
        call it."""
        everyone = distributed.gather_or_raise(None, self.nonfinite_pairs())
        wrong = {i: names for found in everyone for i, names in found.items()}
        if not wrong:
            return ""
        names = sorted({*itertools.chain(*wrong.values())})
        return f"{describe([self.examples[i] for i in sorted(wrong)])} in {', '.join(names)}"

    def why_left_out(self, means: dict[str, float], norm: float, pairs: list[int]) -> str:
        """Says why no update was made: which means of the step are not finite, and in which rows; or else the norm of
        its gradient. All its pairs, where none is wrong by itself. The same on all ranks, which must call it together.
        """
        rows = describe([self.examples[i] for i in pairs])
        if bad := nonfinite(means):
            return f"{bad} not finite; {self.nonfinite_rows() or rows}"
        why = "DeepSpeed skipped the update" if math.isfinite(norm) else f"the gradient is not finite (norm {norm})"
        return f"{why}; {rows}"

    def reference_gap(self, ref: Tensor) -> float:
        """By how much the step's log-probs differ from those of the reference, (n, 2) of all pairs: the mean over the
        responses of all ranks, nats a token. All ranks must call it."""
        gaps = []
        for indices, logps, _ in self.seen:
            lengths = pair_lengths([self.examples[i] for i in indices], SIDES)
            gaps += ((logps.cpu() - ref[indices]).abs() / lengths).flatten().tolist()
        return statistics.fmean(gap for found in distributed.gather_or_raise(None, gaps) for gap in found)


def nonfinite(means: dict[str, float]) -> str:
    """The names of the means that are not finite, in a line; empty where all are."""
    return ", ".join(name for name, value in means.items() if not math.isfinite(value))


def check_start(means: dict[str, float], gap: float, bf16: bool, cache_dir: str) -> None:
    """Raises RunStopped where the policy of step 0 isn't its reference: they are one model then, and their
    micro-batches are the same. `gap`: by how much their log-probs differ, nats a token."""
    # Far above what rounding does to a token's mean, and to a step's mean margin; far below what dropout does.
    if gap > (1e-3 if bf16 else 1e-4) or abs(means["rewards/margins"]) > 0.01:
        raise RunStopped(
            f"step 0: policy and reference should be equal, but their log-probs differ by {gap:.2g} nats a token (loss "
            f"{means['loss']:.4f}, rewards/margins {means['rewards/margins']:.4f}). Likely causes: dropout, cached "
            f"references of other weights (delete the files in {cache_dir}), an adapter that was already "
            "trained, references of another attention implementation")
