"""Pairs of one row of the data share a pass: what is in it, and that its numbers are those of pairs passed alone."""

import itertools
from functools import partial

import pytest
import torch
from tiny_models import KeepDouble, tiny

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.losses import dpo, pair_losses
from nanodpo.core.packing import LAYOUTS, groups_of, make_batch, pair_lengths, total_tokens
from nanodpo.data.example import Example, PartlyScored
from nanodpo.model.ready import response_logps

CPU, SIDES = torch.device("cpu"), ["chosen", "rejected"]
CHOSEN, REJECTED = [[11, 12, 13], [14]], [[21, 22], [23, 24, 25, 26], [27]]


def row(number: int, prompt: list[int], chosen: list, rejected: list) -> list[Example]:
    """All pairs of a row with these answers."""
    return [Example(number, prompt, chosen[i], rejected[j], answer_numbers=(i, j))
            for i, j in itertools.product(range(len(chosen)), range(len(rejected)))]


def test_two_by_three_answers_are_one_prompt_and_five_responses():
    """Six pairs in one micro-batch, and how many tokens that is."""
    groups, index = groups_of(row(0, [1, 2, 3, 4], CHOSEN, REJECTED), SIDES)
    ((prompt, responses),) = groups
    assert prompt == [1, 2, 3, 4] and sorted(responses) == sorted(CHOSEN + REJECTED)
    assert [[responses[k] for k in pair] for pair in index.tolist()] == [[c, r] for c in CHOSEN for r in REJECTED]
    assert total_tokens(row(0, [1, 2, 3, 4], CHOSEN, REJECTED), SIDES) == 4 + (3 + 1) + (2 + 4 + 1)
    batch, same = make_batch(row(0, [1, 2, 3, 4], CHOSEN, REJECTED), SIDES, "packed", CPU)
    assert batch.input_ids.numel() == 15 and batch.n_sequences == 5 and len(batch.targets) == 11
    assert torch.equal(same, index)
    lengths = pair_lengths(row(0, [1, 2, 3, 4], CHOSEN, REJECTED), SIDES)
    assert lengths.tolist() == [[n, m] for n in (3, 1) for m in (2, 4, 1)]
    assert total_tokens(row(0, [1, 2, 3, 4], CHOSEN, REJECTED)[::3], ["chosen"]) == 4 + 3 + 1
    groups, index = groups_of(row(0, [1, 2, 3, 4], CHOSEN, REJECTED), ["rejected"])
    assert groups == [([1, 2, 3, 4], REJECTED)] and index.tolist() == [[0], [1], [2]] * 2


def test_pairs_of_different_rows_share_nothing_however_alike():
    """Rows with equal prompts and answers, a row that comes again, and two equal sides are passed as they always were;
    so is a pair of several scored stretches."""
    same = [Example(i, [1, 2], [3], [4]) for i in (0, 1, 1)]
    groups, index = groups_of(same, SIDES)
    assert groups == [([1, 2], [[3], [4]])] * 3 and index.tolist() == [[0, 1], [2, 3], [4, 5]]
    groups, index = groups_of([Example(0, [1, 2], [3], [3])], SIDES)
    assert groups == [([1, 2], [[3], [3]])] and index.tolist() == [[0, 1]]
    again = row(5, [1], CHOSEN, REJECTED[:1]) * 2
    groups, index = groups_of(again, SIDES)
    assert [len(responses) for _, responses in groups] == [3, 3] and index.tolist() == [[0, 1], [2, 1], [3, 4], [5, 4]]
    ((_, (answer,)),), _ = groups_of([Example(0, [1], PartlyScored([5, 6, 7], [0, 2]), None)], ["chosen"])
    assert answer.scored == [0, 2]


def some_rows() -> list[Example]:
    """Six pairs of one row, a pair of another with the same prompt, and what is left of a third: pairs that were left
    out, or are in another micro-batch, are missed by nobody."""
    return [*row(0, [1, 2, 3, 4], CHOSEN, REJECTED), Example(1, [1, 2, 3, 4], [11, 12, 13], [31]),
            *row(2, [5, 6], CHOSEN, REJECTED)[1:5:2]]


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_loss_and_gradient_are_those_of_the_pairs_passed_one_by_one(layout, family):
    """Weighted DPO in float64, to 1e-12 of the gradient; a response that several pairs share gets all their pushes."""
    with KeepDouble():
        compare(tiny(family), layout)


def compare(model, layout):
    examples = some_rows()
    model.set_attn_implementation(LOOP if layout == "packed" else "eager")
    policy, parameters = SequenceLogProbs(model, chunk_size=4), list(model.parameters())
    loss, weights = partial(dpo, beta=0.3), torch.linspace(0.5, 2, len(examples), dtype=torch.float64)
    ref = torch.linspace(-30, -3, 2 * len(examples), dtype=torch.float64).view(-1, 2)
    batch, index = make_batch(examples, SIDES, layout, CPU)
    logps = policy(batch)[index]
    merged = (weights * pair_losses(loss, logps, ref, pair_lengths(examples, SIDES))).sum()
    found = torch.autograd.grad(merged, parameters, allow_unused=True)
    sums, truth = [], [0.0] * len(parameters)
    for k, example in enumerate(examples):
        alone = [(example.prompt, [example.chosen, example.rejected])]
        own = policy(LAYOUTS[layout](alone)).view(1, 2)
        sums.append(own.detach())
        lost = (weights[k] * pair_losses(loss, own, ref[k : k + 1], torch.ones(1, 2))).sum()
        grads = torch.autograd.grad(lost, parameters, allow_unused=True)
        truth = [total if grad is None else total + grad for total, grad in zip(truth, grads)]
    assert (logps - torch.cat(sums)).abs().max() < 1e-12 * logps.abs().max()
    assert (response_logps(policy, examples, SIDES, layout, CPU) - logps).abs().max() == 0
    size = torch.sqrt(sum(g.square().sum() for g in truth if torch.is_tensor(g)))
    assert size > 1
    for grad, true in zip(found, truth):
        assert grad is None and not torch.is_tensor(true) or (grad - true).norm() <= 1e-12 * size
