"""The measures along a response against float64 brute force and distributions that are known beforehand."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pack, pad
from nanodpo.errors import UserError
from nanodpo.scoring import plausible
from nanodpo.scoring.measures import IMPLAUSIBLE, token_measures
from nanodpo.scoring.pairs import ches, gradient_products
from nanodpo.scoring.sections import answer_start, sections, shared_prefix

GROUPS = [([7, 8, 9], [[1, 2, 3, 4], [5]]), ([11], [[6, 7], [8, 9, 10], [1]])]


class Distribution:
    """A "model" whose logits are given: (N, V), one place each."""

    def __init__(self, logits, chunk_size=100):
        self._logits = logits
        self.head = SimpleNamespace(chunk_size=chunk_size, logits=lambda states, memory: states.clone())

    def states(self, batch):
        return self._logits


def places(*targets):
    """Every place a sequence of its own."""
    n = len(targets)
    return SimpleNamespace(targets=torch.tensor(targets), sequence_ids=torch.arange(n), n_sequences=n)


def test_known_distributions():
    """The uniform distribution over 8, and a certain token: every measure is what it must be, and finite."""
    certain = torch.full((8,), -1e4, dtype=torch.float64)
    certain[3] = 1e4
    never = torch.zeros(8, dtype=torch.float64)
    never[5] = -math.inf
    found, _, _ = token_measures(Distribution(torch.stack([torch.zeros(8, dtype=torch.float64), certain, certain,
                                                           never])), places(2, 3, 0, 1), None)
    assert found["logps"].tolist() == pytest.approx([-math.log(8), 0, -2e4, -math.log(7)], abs=1e-12)
    assert found["argmax_logps"].tolist() == pytest.approx([-math.log(8), 0, 0, -math.log(7)], abs=1e-12)
    assert found["entropy"].tolist() == pytest.approx([math.log(8), 0, 0, math.log(7)], abs=1e-12)
    assert found["rank"].tolist() == [1, 1, 2, 1]
    assert found["implausible_mass"].tolist() == [0, 0, 0, 0]
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_implausible_mass_by_brute_force(chunk):
    """Mass on what the start or the later model gives less than 1e-3, under both, in float64, for any chunk."""
    torch.manual_seed(0)
    start, away = (torch.randn(7, 50, dtype=torch.float64) for _ in range(2))
    start, later = 6 * start, 6 * start + 4 * away
    batch = places(*range(7))
    own, sets, _ = token_measures(Distribution(start, chunk), batch, None)
    found, same, _ = token_measures(Distribution(later, chunk), batch, sets)
    p, q = start.softmax(1), later.softmax(1)
    odd = [[v for v in range(50) if min(p[i, v], q[i, v]) < IMPLAUSIBLE] for i in range(7)]
    for name, model in (("implausible_mass", q), ("implausible_mass_start", p)):
        truth = [model[i, odd[i]].sum().item() for i in range(7)]
        assert found[name].tolist() == pytest.approx(truth, rel=1e-12) and min(truth) < 0.1 < max(truth)
    truth = [sum(x for x in p[i].tolist() if x < IMPLAUSIBLE) for i in range(7)]
    assert own["implausible_mass"].tolist() == pytest.approx(truth, rel=1e-12)
    assert own["implausible_mass_start"].tolist() == pytest.approx(truth, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(sets, same))
    assert found["rank"].tolist() == [1 + sum(x > later[i, i] for x in later[i]).item() for i in range(7)]
    assert found["entropy"].tolist() == pytest.approx((-(q * q.log()).sum(1)).tolist(), rel=1e-12)


def test_all_chunks_share_the_memory_of_the_first():
    """Logits and probabilities of three chunks of real logits, the last one shorter: at two places of memory."""
    head = SequenceLogProbs(make_model()).head
    head.chunk_size, states = 3, torch.randn(8, head.weight.shape[1])
    places_of, given = set(), head.logits

    def logits(hidden, memory):
        z = given(hidden, memory)
        places_of.add(z.data_ptr())
        return z

    head.logits = logits
    module = SimpleNamespace(head=head, states=lambda batch: states)
    token_measures(module, places(*range(8)), None, lambda here, p: places_of.add(p.data_ptr()))
    assert len(places_of) == 2


def test_states_are_summed_in_float64():
    """2^24 + 1 + 1: float32 cannot count past 2^24 in ones. Two responses, of three states and of one."""
    states = torch.tensor([[2.0**24, 0.0], [1.0, 1.0], [1.0, 2.0], [5.0, 6.0]])
    batch = SimpleNamespace(targets=torch.tensor([0, 0, 0, 0]), sequence_ids=torch.tensor([0, 0, 0, 1]), n_sequences=2)
    _, _, sums = token_measures(Distribution(states), batch, None)
    assert sums.tolist() == [[2.0**24 + 2, 3.0], [5.0, 6.0]]


def test_a_small_mass_keeps_its_digits():
    """Float32, mass 1e-9 on the implausible here and 3e-9 at the start: 1 - the rest would be 0 or 6e-8."""
    logits = torch.tensor([[30.0, 29.0, 30 + math.log(1e-9)]])
    sets = torch.tensor([2]), torch.tensor([3e-9]), torch.tensor([0, 1]), torch.tensor([0.9, 0.1])
    found, _, _ = token_measures(Distribution(logits), places(0), sets)
    assert found["implausible_mass"].item() == pytest.approx(1e-9 / (1 + math.exp(-1)), rel=1e-4)
    assert found["implausible_mass_start"].item() == pytest.approx(3e-9, rel=1e-6)


def test_a_change_of_implausible_mass_changes_its_sign_where_start_and_end_are_exchanged():
    """To the last digit nearly; and a token that takes another's whole place spreads nothing."""
    torch.manual_seed(1)
    models = [Distribution(6 * torch.randn(9, 40, dtype=torch.float64)) for _ in range(2)]
    changes = []
    for start, end in (models, models[::-1]):
        found, _, _ = token_measures(end, places(*range(9)), token_measures(start, places(*range(9)), None)[1])
        changes.append(found["implausible_mass"] - found["implausible_mass_start"])
    assert changes[0].tolist() == pytest.approx((-changes[1]).tolist(), abs=1e-14) and changes[0].abs().max() > 0.1
    one, other = (torch.tensor([[0.5, *end]], dtype=torch.float64).log() for end in ((0.4999, 1e-4), (1e-4, 0.4999)))
    found, _, _ = token_measures(Distribution(other), places(0), token_measures(Distribution(one), places(0), None)[1])
    assert found["implausible_mass"].item() == pytest.approx(0.5)
    assert found["implausible_mass_start"].item() == pytest.approx(0.5)


def test_jitter_does_not_look_like_spreading():
    """A start and an end that are the same up to noise of one size: over 20,000 places the tokens that the start alone
    found implausible double their mass, as they always must, and those that either finds implausible keep theirs."""
    random = torch.Generator().manual_seed(0)
    middle = 3 * torch.randn(20000, 30, generator=random, dtype=torch.float64)
    start, end = (middle + 0.7 * torch.randn(middle.shape, generator=random, dtype=torch.float64) for _ in range(2))
    places_ = places(*[0] * len(middle))
    found, _, _ = token_measures(Distribution(end), places_, token_measures(Distribution(start), places_, None)[1])
    changes = found["implausible_mass"] - found["implausible_mass_start"]
    p, q = start.softmax(1), end.softmax(1)
    picked = p < IMPLAUSIBLE
    assert (q * picked).sum() > 1.5 * (p * picked).sum()
    assert changes.mean().abs() < 2.6 * changes.std() / len(changes) ** 0.5


@pytest.mark.parametrize("layout", [pack, pad])
def test_a_models_measures_whatever_the_layout(layout):
    """Logps are the kernel's bit for bit; the rest is that of plain float64 forward passes."""
    module = SequenceLogProbs(make_model(dtype=torch.float64).eval(), chunk_size=4)
    flat, truth, sums = [(p, r) for p, rs in GROUPS for r in rs], {"entropy": [], "rank": [], "argmax_logps": []}, []
    with torch.no_grad():
        for prompt, response in flat:
            out = module.model(torch.tensor([prompt + response]), output_hidden_states=True)
            places = slice(len(prompt) - 1, len(prompt) - 1 + len(response))
            logps = out.logits[0, places].log_softmax(1)
            mine = logps.gather(1, torch.tensor(response)[:, None])
            truth["entropy"] += (-(logps.exp() * logps).sum(1)).tolist()
            truth["rank"] += (1 + (logps > mine).sum(1)).tolist()
            truth["argmax_logps"] += logps.amax(1).tolist()
            sums.append(out.hidden_states[-1][0, places].sum(0))
        if layout is pack:
            module.model.set_attn_implementation(LOOP)
        batch = layout(GROUPS)
        found, _, states = token_measures(module, batch, None)
        assert torch.equal(found["logps"], module.token_logps(batch))
    for name, values in truth.items():
        assert found[name].tolist() == pytest.approx(values, rel=1e-9), name
    torch.testing.assert_close(states, torch.stack(sums), rtol=1e-9, atol=1e-9)


def test_plausible_sets_survive_the_disk(tmp_path):
    sets = (torch.tensor([2, 0, 1, 3]), torch.tensor([0.5, 1.0, 0.25, 0.0]), torch.tensor([5, 9, 7, 1, 2, 3]),
            torch.arange(6) / 8)
    parts = plausible.split(sets, [1, 3])
    assert [[side.tolist() for side in part] for part in parts] == [
        [[2], [0.5], [5, 9], [0, 0.125]], [[0, 1, 3], [1, 0.25, 0], [7, 1, 2, 3], [0.25, 0.375, 0.5, 0.625]]]
    plausible.write(tmp_path, parts)
    keys = [(7, "chosen"), (0, "greedy")]
    again = plausible.join(dict(zip(keys, plausible.read(tmp_path, [1, 3]))), keys[::-1], torch.device("cpu"))
    assert [side.tolist() for side in again] == [[0, 1, 3, 2], [1, 0.25, 0, 0.5], [7, 1, 2, 3, 5, 9],
                                                 [0.25, 0.375, 0.5, 0.625, 0, 0.125]]
    with pytest.raises(UserError, match="row 7, other: nothing is left .* score step 0 with --responses other first"):
        plausible.join({}, [(7, "other")], torch.device("cpu"))


def test_ches_by_hand():
    """arXiv 2410.08847: h+ = (1, 2), h- = (3, -1), lengths 2 and 4: 1 - 5 = -4, and 1/8 - 5/4."""
    found = ches(torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, -1.0]).double(), 2, 4)
    assert found == (-4.0, 0.125 - 1.25)


def test_gradient_products_by_hand():
    """Two linear log-probs a.w and b.w have the gradients a and b."""
    w = [torch.tensor([1.0, 1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)]
    logps = torch.stack([3 * w[0][0] + 4 * w[1][0], w[0][0] - 2 * w[0][1] + 2 * w[1][0]])
    found = gradient_products(logps, w)
    assert found == {"grad_dot": 11.0, "grad_norm_chosen": 5.0, "grad_norm_rejected": 3.0,
                     "grad_cosine": pytest.approx(11 / 15)}
    unused = torch.tensor([1.0], requires_grad=True)  # an expert that no token went to
    logps = torch.stack([w[1][0], w[0].sum()])
    assert gradient_products(logps, [unused, *w])["grad_norm_rejected"] == pytest.approx(2**0.5)
    still = gradient_products(torch.stack([0 * w[0].sum() + 0 * w[1].sum(), w[0].sum() + w[1].sum()]), w)
    assert still["grad_dot"] == 0 and math.isnan(still["grad_cosine"])


def test_gradient_products_are_summed_in_float64():
    """4096^2 + 1 is 2^24 + 1, which float32 does not have."""
    w = [torch.tensor([1.0, 1.0], requires_grad=True)]
    logp = 4096 * w[0][0] + w[0][1]
    found = gradient_products(torch.stack([logp, logp]), w)
    assert found["grad_dot"] == 2**24 + 1 and found["grad_norm_chosen"] ** 2 == pytest.approx(2**24 + 1, rel=1e-15)


@pytest.mark.parametrize("pieces, start", [
    (["<think>", "a", "</think>", "\n", "b"], 3), (["a", "</think>", "b", "</think>", "c"], 4),  # the last mark
    (["<|im_start|>", "answer", "a", "</think>", "b"], 4), (["</think>", "b", "<|im_start|>", "answer", "c"], 4),
    (["a", "</thi", "nk>b", "c"], 3),  # the token that holds the mark's end is still of the thinking
    (["a", "</think>"], None), (["a", "b"], None)])
def test_where_an_answer_begins(pieces, start):
    """After the last of all marks, at a token's border; nowhere, where no token follows."""
    assert answer_start(pieces) == start


def test_sections_of_a_response():
    """Twenty tokens: tenths of two each; five shared with the other side; the answer from the twelfth on."""
    parts = sections(20, 5, 12)
    assert [list(parts[f"tenth {i + 1}"]) for i in range(10)] == [[2 * i, 2 * i + 1] for i in range(10)]
    assert {name: (part.start, part.stop) for name, part in parts.items() if "tenth" not in name} == {
        "prefix": (0, 5), "suffix": (5, 20), "think": (0, 12), "answer": (12, 20)}
    assert not {"prefix", "suffix", "think", "answer"} & sections(20, None, None).keys()


@pytest.mark.parametrize("chosen, rejected, shared", [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2),
                                                      ([1, 2, 3], [1], 1), ([1], [2], 0), ([1, 2, 1], [3, 2, 1], 0)])
def test_what_a_pair_shares(chosen, rejected, shared):
    """From the start on; one side, cut by a limit, may be the beginning of the other."""
    assert shared_prefix(chosen, rejected) == shared
