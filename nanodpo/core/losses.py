"""The losses: log-probabilities of whole responses in, one loss a pair out. Pure functions, torch only.

Shapes: P pairs. chosen, rejected, ref_chosen, ref_rejected are (P,), in nats: log pi(y|x) summed over the tokens of a
response, under the policy and under the frozen reference. `ipo` alone takes means over tokens (see MEAN_LOGPS).

    m = (chosen - ref_chosen) - (rejected - ref_rejected)

is the difference of the two log-ratios, nats; beta m is the margin of the two rewards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def logratio(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """How much more the policy prefers chosen over rejected than the reference does: (P,), nats."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta m): (P,). Eq. 7 of arXiv 2305.18290; ln 2 where the policy is the reference.

    label_smoothing e in [0, 0.5) is the chance that a label is flipped ("conservative DPO", Eq. 3 of Mitchell's note
    of 2023): -(1-e) log sigmoid(beta m) - e log sigmoid(-beta m), smallest at beta m = logit(1-e).
    """
    margin = beta * logratio(chosen, rejected, ref_chosen, ref_rejected)
    # logsigmoid stays finite where log(sigmoid(x)) is -inf: long responses reach margins of thousands of nats.
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust(chosen, rejected, ref_chosen, ref_rejected, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """((1-e) L(m) - e L(-m)) / (1-2e) with L = dpo: (P,). Eq. 13 of arXiv 2403.00409.

    Unbiased: where labels are flipped with chance e = label_smoothing, its expectation is the clean DPO loss.
    """
    kept = dpo(chosen, rejected, ref_chosen, ref_rejected, beta)  # the label as it is
    flipped = dpo(rejected, chosen, ref_rejected, ref_chosen, beta)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> Tensor:
    """(m - 1/(2 beta))^2: (P,). Eq. 17 of arXiv 2310.12036, beta being its tau; 0 at m = 1/(2 beta).

    m is of *mean* log-probs: with sums each token of a long response would have to move less than each of a short one.
    """
    return (logratio(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)) ** 2


def hinge(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> Tensor:
    """max(0, 1 - beta m): (P,). Sec. 3 of arXiv 2305.10425 (SLiC) on DPO's rewards; 0 from m = 1/beta on."""
    return torch.relu(1 - beta * logratio(chosen, rejected, ref_chosen, ref_rejected))


def sft(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> Tensor:
    """-chosen: (P,), the negative log-likelihood of the chosen response. Ignores everything else."""
    return -chosen


LOSSES = {"dpo": dpo, "ipo": ipo, "hinge": hinge, "robust": robust, "sft": sft}
MEAN_LOGPS = {"ipo"}  # fed with means over tokens instead of sums
SMOOTHED = {"dpo", "robust"}  # take label smoothing


def pair_losses(loss: str, logps: Tensor, ref: Tensor | None, lengths: Tensor, beta: float,
                label_smoothing: float = 0.0) -> Tensor:
    """(P, 2) summed log-probs of policy and reference, nats, and lengths in tokens -> (P,): the loss of each pair.

    Columns are chosen and rejected. Only `sft` does without the second column, and without a reference. Raises
    ValueError for label smoothing of a loss that has none.
    """
    if label_smoothing and loss not in SMOOTHED:
        raise ValueError(f"{loss} has no label smoothing, got {label_smoothing}; {' and '.join(sorted(SMOOTHED))} have")
    if loss in MEAN_LOGPS:
        logps, ref = logps / lengths, ref / lengths
    chosen = logps[:, 0]
    rejected = logps[:, 1] if logps.shape[1] > 1 else None
    ref_chosen, ref_rejected = (None, None) if ref is None else ref.unbind(1)
    smoothing = (label_smoothing,) if loss in SMOOTHED else ()
    return LOSSES[loss](chosen, rejected, ref_chosen, ref_rejected, beta, *smoothing)


def loss_divisor(loss: str, chosen_tokens: list[int]) -> int:
    """What the summed loss of these pairs is divided by: their number; for `sft` the number of their scored tokens."""
    return sum(chosen_tokens) if loss == "sft" else len(chosen_tokens)
