"""The losses: log-probabilities of whole responses in, one loss a pair out. Pure functions, torch only.

Shapes: P pairs. chosen, rejected, ref_chosen, ref_rejected are (P,), in nats: log pi(y|x) summed over the tokens of a
response, under the policy and under the frozen reference. lengths is (P, 2), tokens of chosen and of rejected.

A loss takes what it needs of these inputs, by their names; where it takes no ref_..., no reference is computed. Its
other parameters are settings: beta and label_smoothing are flags, all others come from --loss_kwargs. |chosen| is the
number of chosen's tokens. The first "arXiv NNNN.NNNNN" of a docstring is cited in model cards.

    m = (chosen - ref_chosen) - (rejected - ref_rejected)

is the difference of the two log-ratios, nats; beta m is the difference of the two rewards, the margin.

A first reading needs dpo, sft and the functions after them, and ends at the line that says so.
"""

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import scored_places

INPUTS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "lengths")


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta m): (P,). Eq. 7 of arXiv 2305.18290; ln 2 where the policy is the reference.

    Where it comes from: the policy in proportion to ref exp(r / beta) maximises E[r] - beta KL(policy || ref). So every
    policy is the best one for the reward r = beta (logps - ref_logps) + c, with a c that depends on the prompt alone.
    By Bradley and Terry, chosen wins with probability sigmoid(r(chosen) - r(rejected)), in which c cancels; the loss is
    -log of that probability.

    label_smoothing, e below, in [0, 0.5), is the probability that a label is flipped ("conservative DPO", Eq. 3 of
    Mitchell's note of 2023): -(1-e) log sigmoid(beta m) - e log sigmoid(-beta m), smallest at beta m = logit(1-e).
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    # logsigmoid stays finite where log(sigmoid(x)) is -inf: long responses reach margins of thousands of nats.
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def sft(chosen) -> Tensor:
    """-chosen: (P,), the negative log-likelihood of the chosen response."""
    return -chosen


def pair_losses(loss: Callable, logps: Tensor, ref: Tensor | None, lengths: Tensor,
                sft_weight: float = 0.0) -> Tensor:
    """The loss of each pair: (P,).

    `logps` has the policy's summed log-probs, `ref` the reference's, nats; `lengths` tokens. All are (P, 2), with the
    columns chosen and rejected; where the loss takes chosen alone, logps may be (P, 1). `loss` has its settings filled
    in, like functools.partial(dpo, beta=0.1). Adds sft_weight * (-chosen / |chosen|): RPO, arXiv 2404.19733. No
    gradient goes into `ref`, which is a constant.
    """
    # A loss names what it needs. Of dpo this is loss(chosen=..., rejected=..., ref_chosen=..., ref_rejected=...).
    given = dict(zip(("chosen", "rejected"), logps.unbind(1))) | {"lengths": lengths}
    if ref is not None:
        given |= {"ref_chosen": ref[:, 0].detach(), "ref_rejected": ref[:, 1].detach()}
    losses = loss(**{name: given[name] for name in inputs_of(loss)})
    return losses - sft_weight * logps[:, 0] / lengths[:, 0] if sft_weight else losses


def inputs_of(loss: Callable) -> set[str]:
    """The names in INPUTS that this loss takes."""
    return {*inspect.signature(loss).parameters} & {*INPUTS}


def needs_reference(loss: Callable) -> bool:
    """Whether this loss takes a log-prob of the reference."""
    return not inputs_of(loss).isdisjoint(("ref_chosen", "ref_rejected"))


def pair_weights(loss: Callable, logps: Tensor, ref: Tensor | None, lengths: Tensor,
                 sft_weight: float = 0.0) -> Tensor:
    """(P, 2) -> (P, 2): -dL/dchosen and dL/drejected of each pair, by autograd of the loss itself, per nat; (P, 1)
    where the loss takes chosen alone.

    They say how hard a pair pushes its chosen response up and its rejected one down. With w of this function the
    gradient of a pair's loss (with respect to the model's parameters) is -w_chosen grad(chosen) + w_rejected
    grad(rejected). For dpo both are beta (sigmoid(-beta m) - label_smoothing).

    The loss is computed again, on numbers without a graph: a metric can't touch the graph that training needs, and an
    evaluation or score.py, which have none, call this function as training does.
    """
    with torch.enable_grad():
        logps = logps.detach().requires_grad_()
        # A pair's loss depends on its own log-probs alone, so the gradient of the sum has each pair's own slopes.
        (grads,) = torch.autograd.grad(pair_losses(loss, logps, ref, lengths, sft_weight).sum(), logps)
    return torch.cat([-grads[:, :1], grads[:, 1:]], 1) if "rejected" in inputs_of(loss) else -grads[:, :1]


def loss_divisor(loss_name: str, examples: list) -> float:
    """A step's loss is the sum of its pairs' losses, each times the weight of its row in the data, divided by this
    number: the sum of these weights, or for `sft` the sum of weight times chosen's scored tokens. Without a column
    `weight` all row weights are 1. (They have nothing to do with `pair_weights`, the slopes of a loss.)

    Returns 1 where all row weights are 0: the loss and its gradient are 0 then.
    """
    counts = [len(scored_places(e.chosen)) if loss_name == "sft" else 1 for e in examples]
    return sum(e.weight * n for e, n in zip(examples, counts)) or 1.0


# A first reading ends here. The other losses follow, each to be read alone, then the table of their names.


def logratio_difference(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """m, how much more the policy prefers chosen over rejected than the reference does: (P,), nats."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def robust(chosen, rejected, ref_chosen, ref_rejected, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """((1-e) L(m) - e L(-m)) / (1-2e) with L = dpo and e = label_smoothing: (P,). Eq. 13 of arXiv 2403.00409.

    Unbiased: where labels are flipped with probability e, its expectation is the clean DPO loss. L(-m) is dpo with
    chosen and rejected exchanged.
    """
    kept = dpo(chosen, rejected, ref_chosen, ref_rejected, beta)  # the label as it is
    flipped = dpo(rejected, chosen, ref_rejected, ref_chosen, beta)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def dpo_norm(chosen, rejected, ref_chosen, ref_rejected, lengths, beta: float) -> Tensor:
    """dpo of mean instead of summed log-probs: (P,). arXiv 2411.15124 (Tulu 3, with beta 5)."""
    # Divided before the difference is taken, which no beta could do: each side has a length of its own.
    n_chosen, n_rejected = lengths.unbind(1)
    return dpo(chosen / n_chosen, rejected / n_rejected, ref_chosen / n_chosen, ref_rejected / n_rejected, beta)


def ipo(chosen, rejected, ref_chosen, ref_rejected, lengths, beta: float) -> Tensor:
    """(m - 1/(2 beta))^2: (P,). Eq. 17 of arXiv 2310.12036, beta being its tau; 0 at m = 1/(2 beta).

    Here m is of *mean* log-probs: with sums each token of a long response would have to move less than one of a short.
    """
    n_chosen, n_rejected = lengths.unbind(1)
    m = logratio_difference(chosen / n_chosen, rejected / n_rejected, ref_chosen / n_chosen, ref_rejected / n_rejected)
    return (m - 1 / (2 * beta)) ** 2


def hinge(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> Tensor:
    """max(0, 1 - beta m): (P,). Sec. 3 of arXiv 2305.10425 (SLiC) on DPO's rewards; 0 from m = 1/beta on."""
    return torch.relu(1 - beta * logratio_difference(chosen, rejected, ref_chosen, ref_rejected))


def apo_zero(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> Tensor:
    """1 - sigmoid(beta (chosen - ref_chosen)) + sigmoid(beta (rejected - ref_rejected)): (P,). Eq. 7 of arXiv
    2408.06266; 1 where the policy is the reference. Chosen is pushed up and rejected down, each for itself."""
    # 1 - sigmoid(x) is written as sigmoid(-x), which keeps its digits where sigmoid(x) rounds to 1. The exp of
    # logsigmoid keeps those of the slope: that of torch.sigmoid is y (1 - y), 0 where y rounds to 1.
    too_low, too_high = -beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return F.logsigmoid(too_low).exp() + F.logsigmoid(too_high).exp()


def dpop(chosen, rejected, ref_chosen, ref_rejected, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """-log sigmoid(beta (m - lambda max(0, ref_chosen - chosen))): (P,). arXiv 2402.13228, with its lambda.

    dpo as long as chosen is no less likely than under the reference; below, chosen weighs 1 + lambda times as much.
    """
    drop = torch.relu(ref_chosen - chosen)
    return -F.logsigmoid(beta * (logratio_difference(chosen, rejected, ref_chosen, ref_rejected) - dpop_lambda * drop))


def shift(chosen, rejected, ref_chosen, ref_rejected, beta: float, shift_lambda: float = 0.95) -> Tensor:
    """-log sigmoid(beta ((chosen - ref_chosen) - lambda (rejected - ref_rejected))): (P,). arXiv 2502.07599 with a
    constant f(lambda); dpo at lambda = 1. Below 1 rejected weighs less than chosen."""
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - shift_lambda * (rejected - ref_rejected)))


def bounded(chosen, rejected, ref_chosen, ref_rejected, beta: float, bounded_lambda: float = 0.5) -> Tensor:
    """dpo whose rejected response has the probability lambda pi + (1 - lambda) ref: (P,). BDPO of arXiv 2506.12725,
    with its lambda; dpo at lambda = 1.

    The less likely rejected is, the less it is pushed down. Where chosen is less likely than 1 - lambda times its
    probability under the reference, the loss is above ln 2, its value at the start, however unlikely rejected is
    (Theorem 2).
    """
    if not 0 < bounded_lambda <= 1:
        raise ValueError(f"bounded_lambda {bounded_lambda:g}: must be above 0, and at most 1")
    of_reference = math.log(1 - bounded_lambda) if bounded_lambda < 1 else -math.inf
    mixture = torch.logaddexp(math.log(bounded_lambda) + rejected, of_reference + ref_rejected)
    return dpo(chosen, mixture, ref_chosen, ref_rejected, beta)


def gate(chosen, rejected, ref_chosen, ref_rejected, lengths, beta: float, gate_slope: float = 20.0,
         gate_threshold: float = 0.1) -> Tensor:
    """dpo with its gradient with respect to rejected times g = sigmoid(slope (p - threshold)): (P,). The sequence form
    of arXiv 2605.02626.

    p is the geometric mean of the probabilities of rejected's tokens. A response that is hardly possible any more is
    not pushed down further. g is a constant for the gradient, and the loss has dpo's value.
    """
    value = rejected.detach()
    g = torch.sigmoid(gate_slope * ((value / lengths[:, 1]).exp() - gate_threshold))
    # value + g (rejected - value) has the value of rejected, and g times its gradient.
    return dpo(chosen, value + g * (rejected - value), ref_chosen, ref_rejected, beta)


def squared(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> Tensor:
    """-log sigmoid(beta (r(chosen) - r(rejected))) with r = u exp(-u) of u = logps - ref_logps: (P,).

    The divergence f(t) = (log t)^2 / 2 of arXiv 2602.06788 (SquaredPO): r is f' at t = pi / pi_ref, largest at u = 1.
    So chosen is not pushed beyond e times its probability under the reference. Below u = -30 nats r is
    e^30 u, a straight line through 0 whose slope is 31 times smaller: exp(-u) would soon be infinite.
    """
    def reward(u):  # only its factor is held, so that the gradient of the worst responses is not 0
        return u * torch.exp(-u.clamp(min=-30))

    return -F.logsigmoid(beta * (reward(chosen - ref_chosen) - reward(rejected - ref_rejected)))


def simpo(chosen, rejected, lengths, beta: float, simpo_gamma: float = 0.5) -> Tensor:
    """-log sigmoid(beta (chosen/|chosen| - rejected/|rejected|) - gamma): (P,). Eq. 6 of arXiv 2405.14734, whose beta
    is 2 to 10. Needs no reference."""
    means = chosen / lengths[:, 0] - rejected / lengths[:, 1]
    return -F.logsigmoid(beta * means - simpo_gamma)


def cpo(chosen, rejected, lengths, beta: float, cpo_alpha: float = 1.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) - alpha chosen/|chosen|: (P,). arXiv 2401.08417, its second term a mean
    over tokens, as in its authors' code. Needs no reference."""
    return -F.logsigmoid(beta * (chosen - rejected)) - cpo_alpha * chosen / lengths[:, 0]


def orpo(chosen, rejected, lengths, beta: float) -> Tensor:
    """-chosen/|chosen| - beta log sigmoid(log odds(chosen) - log odds(rejected)): (P,). Eq. 6 and 7 of arXiv
    2403.07691, beta being its lambda; odds = p / (1 - p) of p, the geometric mean of the tokens' probabilities.
    Needs no reference."""
    means = chosen / lengths[:, 0], rejected / lengths[:, 1]
    # Float32 rounds the log-prob of an all but certain token to 0, whose odds are infinite and whose slope is NaN:
    # -2^-25, half of float32's step below 1, stands for it.
    below_0 = [mean.where(mean < 0, mean - 2**-25) for mean in means]
    # expm1(x) is exp(x) - 1 with all digits near x = 0, where 1 - exp(x) rounds to 0 and its logarithm is -inf.
    log_odds = [mean - torch.log(-torch.expm1(mean)) for mean in below_0]
    return -means[0] - beta * F.logsigmoid(log_odds[0] - log_odds[1])


def rewards_without_reference(loss: Callable, logps: Tensor, lengths: Tensor, beta: float) -> Tensor | None:
    """(P, 2), (P, 2) -> (P, 2): the rewards of a loss that takes no reference, beta times the response's log-prob: its
    mean over tokens for simpo (Eq. 4 of arXiv 2405.14734) and orpo, its sum for cpo. None of any other loss."""
    function = getattr(loss, "func", loss)  # of functools.partial, which has its settings filled in
    if function in (simpo, orpo):
        return beta * logps / lengths
    return beta * logps if function is cpo else None


def settings_of(loss: Callable) -> list[str]:
    """The names of this loss's own settings: its parameters but INPUTS, beta and label_smoothing."""
    return [name for name in inspect.signature(loss).parameters if name not in (*INPUTS, "beta", "label_smoothing")]


LOSSES = {loss.__name__: loss for loss in (dpo, ipo, hinge, robust, dpo_norm, apo_zero, dpop, shift, bounded, gate,
                                           squared, simpo, cpo, orpo, sft)}
