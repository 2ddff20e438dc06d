"""Each loss at points where its value follows from its formula, and the optimum that DPO is named for."""

import inspect
import itertools
import math
from functools import partial

import pytest
import torch

from nanodpo.core.losses import (
    LOSSES,
    apo_zero,
    bounded,
    cpo,
    dpo,
    dpo_norm,
    dpop,
    gate,
    hinge,
    inputs_of,
    ipo,
    logratio_difference,
    loss_divisor,
    needs_reference,
    orpo,
    pair_losses,
    pair_weights,
    robust,
    sft,
    shift,
    simpo,
    squared,
)
from nanodpo.data.example import Example

BETAS = [0.05, 0.1, 0.5, 2.0]
MARGINS = [-7.0, -1.0, -0.1, 0.0, 0.3, 2.0, 11.0]


def at(m: float, dtype=torch.float64, requires_grad: bool = False):
    """Four log-probs, none of them zero, whose log-ratios differ by m; exact in float64."""
    chosen = torch.tensor([-12.0 + m], dtype=dtype, requires_grad=requires_grad)
    return chosen, *(torch.tensor([x], dtype=dtype) for x in (-20.0, -10.0, -18.0))


def value_and_slope(loss, m: float, beta: float, **kwargs) -> tuple[float, float]:
    logps = at(m, requires_grad=True)
    out = loss(*logps, beta=beta, **kwargs).sum()
    (slope,) = torch.autograd.grad(out, logps[0])
    return out.item(), slope.item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_margin_counts_each_of_its_four_parts_once():
    """(chosen - ref_chosen) - (rejected - ref_rejected), with four different numbers in each of two pairs."""
    parts = (torch.tensor(x) for x in ([-1.0, -30.0], [-8.0, -5.0], [-3.0, -10.0], [-16.0, -2.0]))
    assert logratio_difference(*parts).tolist() == [(-1 + 3) - (-8 + 16), (-30 + 10) - (-5 + 2)]


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_is_ln_2_where_the_policy_is_the_reference(beta):
    """Nothing learned yet means loss ln 2, whatever beta and the log-probs."""
    chosen, rejected = torch.tensor([-3.0, -8000.5]), torch.tensor([-700.25, -0.5])
    assert dpo(chosen, rejected, chosen, rejected, beta).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


@pytest.mark.parametrize("beta, m", [*itertools.product(BETAS, MARGINS)])
def test_dpo_is_log_1_plus_exp_minus_beta_m(beta, m):
    """Value log(1 + e^(-beta m)), slope -beta sigmoid(-beta m)."""
    value, slope = value_and_slope(dpo, m, beta)
    assert value == pytest.approx(math.log(1 + math.exp(-beta * m)), rel=1e-12)
    assert slope == pytest.approx(-beta * sigmoid(-beta * m), rel=1e-12)


def test_dpo_pulls_each_of_the_four_log_probs_its_own_way():
    """Gradient -w, +w, +w, -w with w = beta sigmoid(-beta m): up the chosen, down the rejected, reference opposed."""
    logps = [x.requires_grad_() for x in at(0.7)]
    grads = torch.autograd.grad(dpo(*logps, 0.5).sum(), logps)
    w = 0.5 * sigmoid(-0.35)
    assert [g.item() for g in grads] == pytest.approx([-w, w, w, -w], rel=1e-12)


@pytest.mark.parametrize("beta, m", [*itertools.product(BETAS, MARGINS)])
def test_swapping_chosen_and_rejected_turns_the_margin_around(beta, m):
    """dpo(rejected, chosen) at m is log(1 + e^(beta m))."""
    chosen, rejected, ref_chosen, ref_rejected = at(m)
    swapped = dpo(rejected, chosen, ref_rejected, ref_chosen, beta)
    assert swapped.item() == pytest.approx(math.log(1 + math.exp(beta * m)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m, slope", [(1e4, 0.0), (-1e4, -1.0)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
@pytest.mark.parametrize("loss", [dpo, robust])
def test_finite_where_long_responses_lead(loss, label_smoothing, m, slope, dtype):
    """Margins of +-1e4; there log(1 + e^(-m)) is max(0, -m) to the last digit, and so is each mixture of two."""
    e, chosen = label_smoothing, torch.tensor([m], dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, dtype=dtype)
    out = loss(chosen, zero, zero, zero, 1.0, e)
    (grad,) = torch.autograd.grad(out.sum(), chosen)
    mixed = {dpo: lambda a, b: (1 - e) * a + e * b, robust: lambda a, b: ((1 - e) * a - e * b) / (1 - 2 * e)}[loss]
    assert out.item() == pytest.approx(mixed(max(0.0, -m), max(0.0, m)), rel=1e-6)
    assert grad.item() == pytest.approx(mixed(slope, 1 + slope), rel=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("e", [0.01, 0.1, 0.3, 0.49])
def test_conservative_dpo_is_smallest_at_the_logit_of_its_trust(e, beta):
    """Slope 0 at beta m = logit(1-e), where the loss is the entropy of e; higher on both sides."""
    best = math.log((1 - e) / e) / beta
    value, slope = value_and_slope(dpo, best, beta, label_smoothing=e)
    assert slope == pytest.approx(0, abs=1e-12)
    assert value == pytest.approx(-e * math.log(e) - (1 - e) * math.log(1 - e), rel=1e-12)
    for aside in (best - 1, best + 1):
        assert value_and_slope(dpo, aside, beta, label_smoothing=e)[0] > value


@pytest.mark.parametrize("beta, m", [*itertools.product(BETAS, MARGINS)])
@pytest.mark.parametrize("e", [0.01, 0.1, 0.3, 0.49])
def test_robust_is_unbiased_under_flipped_labels(e, beta, m):
    """(1-e) L(c, r) + e L(r, c) is the clean dpo loss."""
    c, r, ref_c, ref_r = at(m)
    expected = (1 - e) * robust(c, r, ref_c, ref_r, beta, e) + e * robust(r, c, ref_r, ref_c, beta, e)
    assert expected.item() == pytest.approx(math.log(1 + math.exp(-beta * m)), rel=1e-9)


@pytest.mark.parametrize("m", MARGINS)
def test_robust_without_flips_is_dpo(m):
    """e = 0: log(1 + e^(-beta m))."""
    assert robust(*at(m), 0.5).item() == pytest.approx(math.log(1 + math.exp(-0.5 * m)), rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("off", [-3.0, -0.5, 0.0, 0.25, 4.0])
def test_ipo_is_a_parabola_around_its_target(beta, off):
    """Value off^2 and slope 2 off at m = 1/(2 beta) + off."""
    value, slope = value_and_slope(partial(ipo, lengths=torch.ones(1, 2)), 1 / (2 * beta) + off, beta=beta)
    assert value == pytest.approx(off**2, rel=1e-9, abs=1e-20)
    assert slope == pytest.approx(2 * off, rel=1e-9, abs=1e-12)


def test_ipo_is_of_means_over_tokens():
    """With sums a 1,000-token response would have to move a thousandth as much a token as a one-token response."""
    logps, ref = torch.tensor([[-1.0, -16.0]]), torch.tensor([[-3.0, -8.0]])
    (loss,) = pair_losses(partial(ipo, beta=0.5), logps, ref, torch.tensor([[4.0, 2.0]])).tolist()
    assert loss == ((-1 + 3) / 4 - (-16 + 8) / 2 - 1) ** 2


@pytest.mark.parametrize("beta", BETAS)
def test_hinge_ends_at_one_over_beta(beta):
    """1 - beta m and slope -beta before m = 1/beta; 0 and 0 after."""
    assert value_and_slope(hinge, -3.0, beta) == pytest.approx((1 + 3 * beta, -beta), rel=1e-12)
    assert value_and_slope(hinge, 1 / beta - 0.125, beta) == pytest.approx((0.125 * beta, -beta), rel=1e-9)
    assert value_and_slope(hinge, 1 / beta + 0.125, beta) == (0.0, 0.0)


def test_the_reference_is_a_constant():
    """Log-probs that carry a graph, as those of a policy that is its own reference, whose gradient would be 0."""
    beta, weight = 0.3, torch.tensor([2.0, -1.0], requires_grad=True)
    logps = weight * torch.tensor([[1.0, 2.0]])
    pair_losses(partial(dpo, beta=beta), logps, logps, torch.ones(1, 2)).sum().backward()
    assert weight.grad.tolist() == pytest.approx([-beta / 2, 2 * beta / 2])


def test_sft_is_the_chosen_likelihood_and_nothing_else():
    """-chosen, slope -1; rejected and reference may be missing."""
    chosen = torch.tensor([-3.5, -800.0], requires_grad=True)
    out = pair_losses(sft, chosen[:, None], None, torch.ones(2, 1))
    assert out.tolist() == [3.5, 800.0]
    assert torch.autograd.grad(out.sum(), chosen)[0].tolist() == [-1.0, -1.0]


# Losses of later papers, at one pair of 4 and 2 tokens: log-ratios 2 of chosen and -8 of rejected

PAIR = {"logps": torch.tensor([[-1.0, -16.0]], dtype=torch.float64),
        "ref": torch.tensor([[-3.0, -8.0]], dtype=torch.float64),
        "lengths": torch.tensor([[4.0, 2.0]], dtype=torch.float64)}


def loss_and_weights(loss, **settings) -> tuple[float, list[float]]:
    """Of PAIR, some of its tensors replaced: the loss, and -dL/dchosen and dL/drejected."""
    pair = PAIR | {name: settings.pop(name) for name in [*PAIR] if name in settings}
    bound = partial(loss, **settings)
    return pair_losses(bound, **pair).item(), pair_weights(bound, **pair)[0].tolist()


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_norm_is_dpo_of_means(beta):
    """Margin beta (2/4 + 8/2); a token's weight is its response's by the number of its tokens."""
    value, weights = loss_and_weights(dpo_norm, beta=beta)
    assert value == pytest.approx(softplus(-beta * 4.5), rel=1e-12)
    slope = beta * sigmoid(-beta * 4.5)
    assert weights == pytest.approx([slope / 4, slope / 2], rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_apo_zero_moves_each_side_for_itself(beta):
    """sigmoid(-2 beta) + sigmoid(-8 beta), slopes beta s(1-s) of each; 1 and beta/4 where the policy is the reference;
    0 in the limit."""
    value, weights = loss_and_weights(apo_zero, beta=beta)
    sides = [sigmoid(-2 * beta), sigmoid(-8 * beta)]
    assert value == pytest.approx(sum(sides), rel=1e-12)
    assert weights == pytest.approx([beta * s * (1 - s) for s in sides], rel=1e-12)
    assert loss_and_weights(apo_zero, beta=beta, logps=PAIR["ref"]) == (1.0, pytest.approx([beta / 4] * 2))
    assert loss_and_weights(apo_zero, beta=beta, logps=PAIR["ref"] + torch.tensor([[1e5, -1e5]]))[0] == 0


@pytest.mark.parametrize("lam", [0.0, 5.0, 50.0])
def test_dpop_holds_chosen_above_its_reference(lam):
    """dpo while chosen is above; 0.5 nats below, the margin loses 0.5 lambda and chosen weighs 1 + lambda times."""
    assert loss_and_weights(dpop, beta=0.1, dpop_lambda=lam) == loss_and_weights(dpo, beta=0.1)
    value, weights = loss_and_weights(dpop, beta=0.1, dpop_lambda=lam, logps=torch.tensor([[-3.5, -16.0]]))
    margin = 0.1 * (-0.5 + 8 - lam * 0.5)
    assert value == pytest.approx(softplus(-margin), rel=1e-6)
    assert weights == pytest.approx([0.1 * sigmoid(-margin) * (1 + lam), 0.1 * sigmoid(-margin)], rel=1e-5)


@pytest.mark.parametrize("lam", [0.5, 0.95, 1.0])
def test_shift_weighs_rejected_less(lam):
    """Margin beta (2 + 8 lambda); rejected's weight is lambda times chosen's; ln 2 at the reference, dpo at 1."""
    value, weights = loss_and_weights(shift, beta=0.1, shift_lambda=lam)
    slope = 0.1 * sigmoid(-0.1 * (2 + 8 * lam))
    assert value == pytest.approx(softplus(-0.1 * (2 + 8 * lam)), rel=1e-12)
    assert weights == pytest.approx([slope, lam * slope], rel=1e-12)
    assert loss_and_weights(shift, beta=0.1, logps=PAIR["ref"])[0] == pytest.approx(math.log(2), rel=1e-12)
    value, weights = loss_and_weights(shift, beta=0.1, shift_lambda=1.0)
    assert [value, *weights] == pytest.approx([softplus(-1.0), *[0.1 * sigmoid(-1.0)] * 2], rel=1e-12)


@pytest.mark.parametrize("lam", [0.3, 0.5, 0.9])
def test_bounded_mixes_rejected_with_its_reference(lam):
    """Margin 0.1 (2 - log(lambda e^-8 + 1 - lambda)); rejected's weight is chosen's times its part of the mixture. ln 2
    at the reference, where rejected's part is lambda; dpo at lambda = 1."""
    value, weights = loss_and_weights(bounded, beta=0.1, bounded_lambda=lam)
    mixture = lam * math.exp(-8) + 1 - lam
    margin = 0.1 * (2 - math.log(mixture))
    slope = 0.1 * sigmoid(-margin)
    assert value == pytest.approx(softplus(-margin), rel=1e-9)
    assert weights == pytest.approx([slope, slope * lam * math.exp(-8) / mixture], rel=1e-9)
    value, weights = loss_and_weights(bounded, beta=0.1, bounded_lambda=lam, logps=PAIR["ref"])
    assert [value, *weights] == pytest.approx([math.log(2), 0.05, 0.05 * lam], rel=1e-9)
    assert loss_and_weights(bounded, beta=0.1, bounded_lambda=1.0) == loss_and_weights(dpo, beta=0.1)


@pytest.mark.parametrize("lam", [0.3, 0.5, 0.9])
def test_bounded_keeps_chosen_above_a_part_of_its_reference(lam):
    """Theorem 2 of its paper: no loss of at most ln 2, that of the start, lets chosen fall below 1 - lambda times its
    probability under the reference, however far rejected falls. At that bound, with rejected gone, it is ln 2."""
    gone = PAIR["ref"] + torch.tensor([[math.log(1 - lam), -900.0]], dtype=torch.float64)
    value, weights = loss_and_weights(bounded, beta=0.1, bounded_lambda=lam, logps=gone)
    assert value == pytest.approx(math.log(2), rel=1e-12) and weights == pytest.approx([0.05, 0])
    for u, v in itertools.product((-3.0, -1.0, -0.2, 0.5), (-900.0, -5.0, 0.0, 4.0)):
        moved = PAIR["ref"] + torch.tensor([[u, v]], dtype=torch.float64)
        if loss_and_weights(bounded, beta=0.1, bounded_lambda=lam, logps=moved)[0] <= math.log(2):
            assert u >= math.log(1 - lam)


def test_gate_lets_go_of_what_is_hardly_possible_any_more():
    """dpo's value and chosen's weight; rejected's times sigmoid(20 (p - 0.1)), p = exp(-16/2) or, at the threshold,
    one half."""
    value, weights = loss_and_weights(gate, beta=0.1)
    slope = 0.1 * sigmoid(-1.0)
    assert value == loss_and_weights(dpo, beta=0.1)[0]
    assert weights == pytest.approx([slope, slope * sigmoid(20 * (math.exp(-8) - 0.1))], rel=1e-9)
    at_threshold = loss_and_weights(gate, beta=0.1, gate_threshold=math.exp(-8), gate_slope=3.0)[1]
    assert at_threshold == pytest.approx([slope, slope / 2], rel=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_squared_is_dpo_at_the_start_and_stops_at_e_times_the_reference(beta):
    """ln 2 and weights beta/2 at u = 0; r(2) = 2/e^2 and r(-8) = -8 e^8; chosen's weight is 0 at u = 1; below -30 r is
    a straight line, e^30 u."""
    value, weights = loss_and_weights(squared, beta=beta, logps=PAIR["ref"])
    assert (value, weights) == (pytest.approx(math.log(2)), pytest.approx([beta / 2] * 2))
    value, weights = loss_and_weights(squared, beta=beta, logps=PAIR["ref"] + torch.tensor([[2.0, -0.5]]))
    margin = beta * (2 * math.exp(-2) + 0.5 * math.exp(0.5))
    assert value == pytest.approx(softplus(-margin), rel=1e-9)
    by_hand = [(1 - 2) * math.exp(-2), (1 + 0.5) * math.exp(0.5)]  # r'(u) = (1 - u) exp(-u)
    assert weights == pytest.approx([beta * sigmoid(-margin) * slope for slope in by_hand], rel=1e-6)
    assert loss_and_weights(squared, beta=beta, logps=PAIR["ref"] + torch.tensor([[1.0, 0.0]]))[1][0] == 0
    value, weights = loss_and_weights(squared, beta=beta, logps=PAIR["ref"] + torch.tensor([[0.0, -8.0]]))
    assert value == pytest.approx(softplus(-beta * 8 * math.exp(8)), abs=1e-12)
    for u in (8, 29):  # far below its reference chosen is pushed up by r'(-u) = (1 + u) exp(u)
        value, weights = loss_and_weights(squared, beta=beta, logps=PAIR["ref"] - torch.tensor([[u, 0.0]]))
        assert value == pytest.approx(beta * u * math.exp(u))
        assert weights[0] == pytest.approx(beta * (1 + u) * math.exp(u))
    value, weights = loss_and_weights(squared, beta=beta, logps=PAIR["ref"] - torch.tensor([[40.0, 0.0]]))
    assert (value, weights[0]) == (pytest.approx(beta * 40 * math.exp(30)), pytest.approx(beta * math.exp(30)))


def test_squared_reward_is_the_slope_of_its_divergence():
    """r = f'(t) of f(t) = (log t)^2 / 2 at t = pi / pi_ref, by autograd; seen through the loss at beta 1."""
    for u in (-3.0, -0.2, 0.0, 0.7, 4.0):
        t = torch.tensor(math.exp(u), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(t.log() ** 2 / 2, t)
        moved = PAIR["ref"] + torch.tensor([[u, 0.0]], dtype=torch.float64)
        value, _ = loss_and_weights(squared, beta=1.0, logps=moved)
        assert value == pytest.approx(softplus(-slope.item()), rel=1e-9)


@pytest.mark.parametrize("beta, gamma", [(2.0, 0.5), (10.0, 1.6)])
def test_simpo_is_of_means_with_a_target_margin(beta, gamma):
    """Margin beta (-1/4 + 16/2) - gamma, without any reference."""
    value, weights = loss_and_weights(simpo, beta=beta, simpo_gamma=gamma, ref=None, logps=torch.tensor([[-1.0, -1.5]]))
    margin = beta * (-0.25 + 0.75) - gamma
    assert value == pytest.approx(softplus(-margin), rel=1e-6)
    assert weights == pytest.approx([beta * sigmoid(-margin) / 4, beta * sigmoid(-margin) / 2], rel=1e-6)


def test_cpo_is_a_margin_without_reference_and_the_chosen_likelihood():
    """softplus(-beta (-1 + 16)) + alpha/4; chosen's weight has the likelihood's alpha/4 besides."""
    value, weights = loss_and_weights(cpo, beta=0.1, cpo_alpha=0.5, ref=None)
    assert value == pytest.approx(softplus(-1.5) + 0.125, rel=1e-12)
    assert weights == pytest.approx([0.1 * sigmoid(-1.5) + 0.125, 0.1 * sigmoid(-1.5)], rel=1e-12)
    assert loss_and_weights(cpo, beta=0.1, ref=None)[0] == pytest.approx(softplus(-1.5) + 0.25, rel=1e-12)


@pytest.mark.parametrize("x", [25.0, 50.0, 300.0])
def test_apo_zero_keeps_its_slopes_where_both_sides_are_far_on_the_wrong_side(x):
    """chosen x nats below the reference and rejected x above it: both slopes are sigmoid(x) sigmoid(-x)."""
    start = torch.tensor([[-400.0, -400.0]], dtype=torch.float64)
    moved = start + torch.tensor([[-x, x]], dtype=torch.float64)
    _, weights = loss_and_weights(apo_zero, beta=1.0, ref=start, logps=moved)
    assert weights == pytest.approx([math.exp(-x) / (1 + math.exp(-x)) ** 2] * 2, rel=1e-9, abs=0)


def test_orpo_is_of_odds():
    """p = exp(-1/4) and exp(-16/2), odds p / (1 - p), from their definition; equal means: -mean + beta ln 2."""
    value, _ = loss_and_weights(orpo, beta=0.1, ref=None)
    p, q = math.exp(-0.25), math.exp(-8)
    odds_ratio = p / (1 - p) / (q / (1 - q))
    assert value == pytest.approx(0.25 - 0.1 * math.log(sigmoid(math.log(odds_ratio))), rel=1e-12)
    value, _ = loss_and_weights(orpo, beta=0.1, ref=None, logps=torch.tensor([[-4.0, -2.0]], dtype=torch.float64))
    assert value == pytest.approx(1 + 0.1 * math.log(2), rel=1e-12)


def test_orpo_of_a_response_that_float32_calls_certain_has_a_loss_and_a_slope():
    """A response of log-prob 0. With odds p / (1 - p) the slope by the mean log-prob of chosen nears -1 - beta
    odds(rejected) as p nears 1, and the loss 0; two responses that are certain alike: ratio 1, so beta ln 2."""
    value, weights = loss_and_weights(orpo, beta=0.1, ref=None, logps=torch.tensor([[0.0, -16.0]], dtype=torch.float64))
    odds = math.exp(-8) / (1 - math.exp(-8))
    assert value == pytest.approx(0, abs=1e-6)
    assert weights[0] == pytest.approx((1 + 0.1 * odds) / 4, rel=1e-6)
    value, weights = loss_and_weights(orpo, beta=0.1, ref=None, logps=torch.zeros(1, 2, dtype=torch.float64))
    assert value == pytest.approx(0.1 * math.log(2), abs=1e-6)
    assert all(map(math.isfinite, weights))


def smoothing(name: str) -> dict[str, float]:
    return {"label_smoothing": 0.2} if "label_smoothing" in inspect.signature(LOSSES[name]).parameters else {}


@pytest.mark.parametrize("name", LOSSES)
def test_sft_weight_adds_the_chosen_likelihood_a_token(name):
    """a times 1/4 for a response of log-prob -1 and 4 tokens, and a/4 on chosen's weight."""
    loss = partial(LOSSES[name], **({"beta": 0.1} if name != "sft" else {}))
    plain, more = pair_losses(loss, **PAIR), pair_losses(loss, **PAIR, sft_weight=0.2)
    assert (more - plain).item() == pytest.approx(0.2 / 4, rel=1e-9)
    weights = [pair_weights(loss, **PAIR, sft_weight=a)[0] for a in (0.0, 0.2)]
    assert (weights[1] - weights[0]).tolist() == pytest.approx([0.2 / 4, 0.0][: 1 if name == "sft" else 2], abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("gate", "sft")])
def test_weights_are_the_slopes_of_the_loss(name):
    """Central differences in float64, on pairs left and right of every kink. gate stops a part of its gradient."""
    loss = partial(LOSSES[name], beta=0.1, **smoothing(name))
    ref = torch.tensor([[-30.0, -28.0]] * 5, dtype=torch.float64)
    logps = ref + torch.tensor([[0.2, 0.1], [3.0, -9.0], [-3.0, -2.0], [0.5, 4.0], [-1.0, -20.0]], dtype=torch.float64)
    lengths = torch.tensor([[7.0, 3.0]] * 5, dtype=torch.float64)
    found = pair_weights(loss, logps, ref, lengths, 0.3)
    for side, sign in ((0, -1), (1, 1)):
        ends = []
        for nudge in (1e-5, -1e-5):
            moved = logps.clone()
            moved[:, side] += nudge
            ends.append(pair_losses(loss, moved, ref, lengths, 0.3))
        slope = (ends[0] - ends[1]) / 2e-5
        assert found[:, side].tolist() == pytest.approx((sign * slope).tolist(), rel=1e-6, abs=1e-9)


def test_weights_are_there_where_gradients_are_off():
    with torch.no_grad():
        inside = pair_weights(partial(dpo, beta=0.1), **PAIR)
    assert torch.equal(inside, pair_weights(partial(dpo, beta=0.1), **PAIR))


def step_of(name: str, rows: list[int], weights: list[float], sft_weight: float = 0.2):
    """(loss of a step of these of four pairs, its gradient by each of the four), as train.py puts them together."""
    logps = torch.tensor([[-30.0, -28], [-11, -40.5], [-3, -2], [-20, -20]], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[7.0, 3], [2, 9], [4, 4], [1, 5]], dtype=torch.float64)
    loss, ref = partial(LOSSES[name], beta=0.1, **smoothing(name)), logps.detach().roll(1, 0)
    if name == "sft":
        loss, sft_weight = sft, 0.0
    losses = pair_losses(loss, logps[rows], ref[rows], lengths[rows], sft_weight)
    losses = losses * torch.tensor(weights, dtype=torch.float64)
    examples = [Example(row, [1], [2] * int(lengths[row, 0]), [3], weight=w) for row, w in zip(rows, weights)]
    total = losses.sum() / loss_divisor(name, examples)
    total.backward()
    return total.item(), logps.grad.flatten().tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_is_how_often_a_pair_stands_in_the_step(name):
    """Weights 2, 1, 0 and 3 are the pairs given twice, once, never and three times; a common factor is nothing."""
    weighted, repeated = step_of(name, [0, 1, 2, 3], [2, 1, 0, 3]), step_of(name, [3, 0, 1, 3, 0, 3], [1.0] * 6)
    less = step_of(name, [0, 1, 2, 3], [0.02, 0.01, 0, 0.03])
    for loss, grads in (repeated, less):
        assert weighted[0] == pytest.approx(loss, rel=1e-12) and weighted[1] == pytest.approx(grads, rel=1e-12)
    assert weighted[0] != pytest.approx(step_of(name, [0, 1, 2, 3], [1.0] * 4)[0], rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_weight_above_0_loss_and_gradient_are_0(name):
    loss, grads = step_of(name, [0, 1], [0.0, 0.0])
    assert loss == 0 and grads == [0.0] * 8


@pytest.mark.parametrize("weights", [[1.0] * 4, [0.3, 2.0, 0.0, 1.7]])
def test_a_steps_loss_is_the_weighted_mean_by_hand(weights):
    """sft: sum of w (-log pi of chosen) by sum of w times its tokens; dpo: sum of w times the pair's loss by sum of w.
    Weights of 1 give, to the last bit, the sum divided by a number of tokens or pairs."""
    chosen, tokens = [-30.0, -11.0, -3.0, -20.0], [7, 2, 4, 1]
    nll = sum(-w * x for w, x in zip(weights, chosen)) / sum(w * n for w, n in zip(weights, tokens))
    assert step_of("sft", [0, 1, 2, 3], weights)[0] == pytest.approx(nll, rel=1e-14)
    margins = [(-30 + 20) - (-28 + 20), (-11 + 30) - (-40.5 + 28), (-3 + 11) - (-2 + 40.5), (-20 + 3) - (-20 + 2)]
    losses = [w * (0.8 * math.log1p(math.exp(-0.1 * m)) + 0.2 * math.log1p(math.exp(0.1 * m)))
              for w, m in zip(weights, margins)]  # with the label smoothing of `smoothing`
    assert step_of("dpo", [0, 1, 2, 3], weights, 0.0)[0] == pytest.approx(sum(losses) / sum(weights), rel=1e-14)
    examples = [Example(row, [1], [2] * n, None) for row, n in enumerate(tokens)]
    assert loss_divisor("sft", examples) == 14 and loss_divisor("dpo", examples) == 4


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_loss_is_finite_for_long_responses(name, dtype):
    """20,000 tokens whose log-prob moved by thousands of nats, either way, or is 0 to the last digit: no infinite and
    no undefined gradient."""
    ref = torch.full((4, 2), -2e4, dtype=dtype)
    logps = ref + torch.tensor([[-5e3, -6e3], [5e3, -6e3], [-5e3, 6e3], [1e4, 19999.9]], dtype=dtype)
    loss, lengths = partial(LOSSES[name], beta=0.1), torch.full((4, 2), 2e4, dtype=dtype)
    assert pair_losses(loss, logps, ref, lengths).isfinite().all()
    assert pair_weights(loss, logps, ref, lengths).isfinite().all()


def test_a_loss_says_by_its_parameters_what_it_needs():
    """The reference pass is left out, and with it a third of the time, where no parameter asks for it."""
    assert inputs_of(dpo) == {"chosen", "rejected", "ref_chosen", "ref_rejected"} == inputs_of(partial(dpo, beta=0.1))
    assert inputs_of(ipo) == {"chosen", "rejected", "ref_chosen", "ref_rejected", "lengths"}
    assert inputs_of(simpo) == inputs_of(cpo) == inputs_of(orpo) == {"chosen", "rejected", "lengths"}
    assert inputs_of(sft) == {"chosen"}
    assert needs_reference(dpo) and not any(map(needs_reference, (simpo, cpo, orpo, sft)))
    assert needs_reference(lambda chosen, rejected, ref_rejected: rejected - ref_rejected)  # of one side is one, too


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_training_reaches_the_policy_that_dpo_was_derived_from(beta):
    """Under Bradley-Terry preferences p(i > j) = sigmoid(r_i - r_j) the minimum is pi* ~ pi_ref exp(r / beta)."""
    reward = torch.tensor([1.2, -0.7, 0.0, 2.0, -1.5], dtype=torch.float64)
    ref = torch.tensor([0.3, -1.0, 0.8, -0.4, 0.0], dtype=torch.float64).log_softmax(0)
    optimum = (ref + reward / beta).softmax(0)

    i, j = torch.tensor(list(itertools.permutations(range(5), 2))).T
    prefer = torch.sigmoid(reward[i] - reward[j])
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        expected = (prefer * LOSSES["dpo"](policy[i], policy[j], ref[i], ref[j], beta)).sum()
        expected.backward()
        return expected

    optimizer.step(loss)
    assert (ref.exp() - optimum).abs().max() > 0.05  # the start is no answer
    assert logits.detach().softmax(0).tolist() == pytest.approx(optimum.tolist(), abs=1e-7)
