"""AdamW's updates rebuilt, shares that add up, and effects against runs with a heavier gradient; float64."""

import pytest
import torch

from nanodpo.ledger.adamw import AdamW, Adjoint, Moments, lacking

D, K, PARTS = 6, 9, 3
RATES = [1e-2 * (K - k) / K for k in range(K)]
ADAM = AdamW(0.9, 0.99, 1e-8, 1.5, 0.1)


def parts_of(k: int) -> torch.Tensor:
    """(PARTS, D): the parts of step k's gradient; some steps are clipped, and the last weight has none at first."""
    torch.manual_seed(k)
    parts = torch.randn(PARTS, D, dtype=torch.float64) * (2.0 if k % 3 == 0 else 0.3)
    parts[:, -1] *= k > 2
    return parts


def probe(w):
    """Two smooth functions of the weights: (2,)."""
    return torch.stack([(w * w).sum() / 2 + w[0] * w[1], torch.sin(3 * w).sum()])


def train(weights=None, adam=ADAM):
    """torch's own AdamW and clipping. `weights`: {(k, i): factor of part i at step k}. Returns all weights, (K + 1, D).
    """
    w = torch.nn.Parameter(torch.linspace(-1, 1, D, dtype=torch.float64))
    optimizer = torch.optim.AdamW([w], betas=adam[:2], eps=adam.epsilon, weight_decay=adam.decay)
    path = [w.detach().clone()]
    for k in range(K):
        factors = torch.tensor([(weights or {}).get((k, i), 1.0) for i in range(PARTS)], dtype=torch.float64)
        w.grad = (factors[:, None] * parts_of(k)).sum(0)
        if adam.max_norm:
            torch.nn.utils.clip_grad_norm_([w], adam.max_norm)
        optimizer.param_groups[0]["lr"] = RATES[k]
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def forward(path, adam=ADAM):
    """The moments after each update, its clip factor, and its clipped gradient."""
    moments, found = Moments(*torch.zeros(2, D, dtype=torch.float64)), []
    for k in range(K):
        grad = parts_of(k).sum(0)
        clip = adam.clip_factor(grad.norm().item())
        moments = moments.after(clip * grad, adam)
        found.append((moments, clip, clip * grad))
    return found


def ledger(path, adam=ADAM):
    """Shares and effects, (K, PARTS, 2) each, and the weight decay's shares, (K, 2)."""
    slopes = [torch.autograd.functional.jacobian(probe, w) for w in path]
    adjoint, steps = Adjoint(adam, slopes[-1]), forward(path, adam)
    shares, effects, decay = (torch.zeros(K, *size, 2, dtype=torch.float64) for size in ((PARTS,), (PARTS,), ()))
    for k in reversed(range(K)):
        now, clip, grad = steps[k]
        adjoint.back((slopes[k] + slopes[k + 1]) / 2, RATES[k], now)
        heavier = adjoint.heavier(grad, clip)
        for i, part in enumerate(clip * parts_of(k)):
            shares[k, i], effects[k, i] = adjoint.share(part), heavier @ part
        decay[k] = (slopes[k] + slopes[k + 1]) / 2 @ (-RATES[k] * adam.decay * path[k])
    return shares, effects, decay


@pytest.mark.parametrize("adam", [ADAM, ADAM._replace(max_norm=0.0, decay=0.0)], ids=["clipped-decayed", "plain"])
def test_updates_are_torchs_own(adam):
    path = train(adam=adam)
    for k, (moments, _, _) in enumerate(forward(path, adam)):
        torch.testing.assert_close(moments.update(RATES[k], adam, path[k]), path[k + 1] - path[k], rtol=1e-10,
                                   atol=1e-14)


def test_a_small_gradient_is_clipped_as_by_torch():
    """Where the 1e-6 beside the norm counts: half of a norm of 1e-6 is left."""
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    w.grad = torch.full_like(w, 1e-6)
    torch.nn.utils.clip_grad_norm_([w], 1e-6)
    assert ADAM._replace(max_norm=1e-6).clip_factor(1e-6) == pytest.approx(w.grad.item() / 1e-6, rel=1e-12)


def test_what_rounding_the_weights_makes_is_no_error_of_an_update():
    """By hand: around 1 float32 numbers lie 2^-23 apart, so an update of 1.4 of these ends at 1, and one of 1.75 at 2;
    if it ended at 1, a quarter of what was made can't be rounding. With two roundings it can."""
    ulp = 2.0**-23
    before, after = torch.tensor([1.0, 1.0]), torch.tensor([1.0 + ulp, 1.0])
    for size, roundings, wrong in ((1.4, 1, 0.0), (1.75, 1, 0.25), (1.75, 2, 0.0)):
        update = torch.tensor([size * ulp, 0.0], dtype=torch.float64)
        assert lacking(before, after, update, roundings).item() == pytest.approx(wrong, abs=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_in_float32_are_rebuilt_to_their_last_digits(decay):
    """torch's AdamW in float32, with a small rate as at a run's end, against the same moments in float64: the weights'
    rounding alone is a thousandth of an update, and what goes beyond it is less than a millionth."""
    torch.manual_seed(0)
    w, rate = torch.nn.Parameter(torch.randn(5000)), 1e-5
    adam = AdamW(0.9, 0.999, 1e-8, 0.0, decay)
    optimizer = torch.optim.AdamW([w], lr=rate, betas=adam[:2], weight_decay=decay)
    moments = Moments(*torch.zeros(2, 5000, dtype=torch.float64))
    for _ in range(5):
        w.grad, before = torch.randn(5000), w.detach().clone()
        optimizer.step()
        moments = moments.after(w.grad.double(), adam)
        update = moments.update(rate, adam, before.double())
        assert (w.detach() - before - update).norm() > 1e-3 * update.norm()
        assert lacking(before, w.detach(), update, 3 if decay else 1) < 1e-6


def test_shares_and_weight_decay_add_up_to_the_change():
    """The rest is the trapezoid rule's error alone: nothing for a quadratic probe."""
    path = train()
    shares, _, decay = ledger(path)
    total, change = shares.sum((0, 1)) + decay.sum(0), probe(path[-1]) - probe(path[0])
    assert total[0] == pytest.approx(change[0].item(), rel=1e-10)
    assert total[1] == pytest.approx(change[1].item(), rel=1e-3)


def test_the_share_of_a_single_gradient_is_its_part_of_all_updates():
    """By the definition, in a loop: part i of step j is (1 - b1) b1^(k-j) c_j g_ij of m_k."""
    path = train()
    shares, _, _ = ledger(path)
    steps = forward(path)
    j, i = 3, 1
    expected = torch.zeros(2, dtype=torch.float64)
    for k in range(j, K):
        slope = sum(torch.autograd.functional.jacobian(probe, path[x]) for x in (k, k + 1)) / 2
        part = (1 - ADAM.beta1) * ADAM.beta1 ** (k - j) * steps[j][1] * parts_of(j)[i]
        d = (steps[k][0].v / (1 - ADAM.beta2 ** (k + 1))).sqrt() + ADAM.epsilon
        expected += slope @ (-RATES[k] * part / ((1 - ADAM.beta1 ** (k + 1)) * d))
    torch.testing.assert_close(shares[j, i], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("k, i", [(0, 0), (1, 2), (3, 1), (6, 0), (8, 2)])
def test_effects_are_those_of_a_run_with_a_heavier_part(k, i):
    """Without weight decay: it would pass a change of the weights on, which counts as a later gradient's change."""
    adam = ADAM._replace(decay=0.0)
    _, effects, _ = ledger(train(adam=adam), adam)
    e = 1e-6
    ends = [probe(train({(k, i): 1 + sign * e}, adam)[-1]) for sign in (1, -1)]
    torch.testing.assert_close(effects[k, i], (ends[0] - ends[1]) / (2 * e), rtol=1e-5, atol=1e-9)


def test_effects_add_up_to_nothing():
    """All gradients twice as large make the same updates, but for epsilon and what was clipped."""
    adam = ADAM._replace(decay=0.0, max_norm=0.0)
    _, effects, _ = ledger(train(adam=adam), adam)
    assert effects.abs().max() > 1e-3
    assert effects.sum((0, 1)).abs().max() < 1e-8
