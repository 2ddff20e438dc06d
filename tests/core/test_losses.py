"""Each loss at points where its value follows from its formula, and the optimum that DPO is named for."""

import itertools
import math

import pytest
import torch

from nanodpo.core.losses import LOSSES, MEAN_LOGPS, SMOOTHED, dpo, hinge, ipo, logratio, pair_losses, robust, sft

BETAS = [0.05, 0.1, 0.5, 2.0]
MARGINS = [-7.0, -1.0, -0.1, 0.0, 0.3, 2.0, 11.0]


def at(m: float, dtype=torch.float64, requires_grad: bool = False):
    """Four log-probs, none of them zero, whose margin is m; exact in float64."""
    chosen = torch.tensor([-12.0 + m], dtype=dtype, requires_grad=requires_grad)
    return chosen, *(torch.tensor([x], dtype=dtype) for x in (-20.0, -10.0, -18.0))


def value_and_slope(loss, m: float, beta: float, **kwargs) -> tuple[float, float]:
    logps = at(m, requires_grad=True)
    out = loss(*logps, beta, **kwargs).sum()
    (slope,) = torch.autograd.grad(out, logps[0])
    return out.item(), slope.item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_margin_counts_each_of_its_four_parts_once():
    """(chosen - ref_chosen) - (rejected - ref_rejected), with four different numbers in each of two pairs."""
    parts = (torch.tensor(x) for x in ([-1.0, -30.0], [-8.0, -5.0], [-3.0, -10.0], [-16.0, -2.0]))
    assert logratio(*parts).tolist() == [(-1 + 3) - (-8 + 16), (-30 + 10) - (-5 + 2)]


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
    value, slope = value_and_slope(ipo, 1 / (2 * beta) + off, beta)
    assert value == pytest.approx(off**2, rel=1e-9, abs=1e-20)
    assert slope == pytest.approx(2 * off, rel=1e-9, abs=1e-12)


def test_ipo_alone_is_fed_means_over_tokens():
    """With sums a 1,000-token response would have to move a thousandth as much a token as a one-token response."""
    assert MEAN_LOGPS == {"ipo"}


@pytest.mark.parametrize("beta", BETAS)
def test_hinge_ends_at_one_over_beta(beta):
    """1 - beta m and slope -beta before m = 1/beta; 0 and 0 after."""
    assert value_and_slope(hinge, -3.0, beta) == pytest.approx((1 + 3 * beta, -beta), rel=1e-12)
    assert value_and_slope(hinge, 1 / beta - 0.125, beta) == pytest.approx((0.125 * beta, -beta), rel=1e-9)
    assert value_and_slope(hinge, 1 / beta + 0.125, beta) == (0.0, 0.0)


def test_sft_is_the_chosen_likelihood_and_nothing_else():
    """-chosen, slope -1; rejected and reference may be missing."""
    chosen = torch.tensor([-3.5, -800.0], requires_grad=True)
    out = sft(chosen, None, None, None, beta=0.1)
    assert out.tolist() == [3.5, 800.0]
    assert torch.autograd.grad(out.sum(), chosen)[0].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - SMOOTHED))
def test_label_smoothing_is_refused_where_it_means_nothing(name):
    """A setting that a loss would ignore is an error."""
    with pytest.raises(ValueError, match=f"{name} has no label smoothing, got 0.1"):
        pair_losses(name, torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 2), 0.1, label_smoothing=0.1)


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
