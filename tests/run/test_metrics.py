"""The metrics of a step, by hand."""

import ast
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
from conftest import ROOT, train

from nanodpo.core.logprobs import LogProbHead, OneRank
from nanodpo.core.losses import cpo, dpo, orpo, pair_losses, sft, simpo
from nanodpo.data.schedule import pairs_of_step
from nanodpo.run import metrics
from nanodpo.run.metrics import Meter, TokenMetrics, pair_metrics

LOGPS = torch.tensor([[-10.0, -20.0], [-8.0, -6.0], [-5.0, -5.0]], dtype=torch.float64, requires_grad=True)
REF = torch.tensor([[-12.0, -19.0], [-8.0, -6.0], [-4.0, -6.0]], dtype=torch.float64)
TOKENS = torch.tensor([[5.0, 10.0], [4.0, 2.0], [1.0, 5.0]], dtype=torch.float64)


def test_the_values_of_three_pairs():
    """m of 3, 0 and -2 nats; a tie is no success; sums and means a token both."""
    loss = partial(dpo, beta=0.5)
    losses, values = pair_losses(loss, LOGPS, REF, TOKENS), pair_metrics(loss, LOGPS, REF, TOKENS, 0.5)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.5 * m)) for m in (3, 0, -2)])
    assert values["rewards/chosen"].tolist() == [1.0, 0.0, -0.5]
    assert values["rewards/rejected"].tolist() == [-0.5, 0.0, 0.5]
    assert values["rewards/margins"].tolist() == [1.5, 0.0, -1.0]
    assert values["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0]
    assert values["rewards/ties"].tolist() == [0.0, 1.0, 0.0]
    assert values["logps/chosen"].tolist() == [-10.0, -8.0, -5.0]
    assert values["logps_per_token/rejected"].tolist() == [-2.0, -3.0, -1.0]
    assert values["ref_logps/chosen"].tolist() == [-12.0, -8.0, -4.0]
    assert values["ref_logps/rejected"].tolist() == [-19.0, -6.0, -6.0]
    for i, side in enumerate(("chosen", "rejected")):
        by_hand = [logp / tokens for logp, tokens in zip(REF[:, i].tolist(), TOKENS[:, i].tolist())]
        assert values[f"ref_logps_per_token/{side}"].tolist() == pytest.approx(by_hand)
    for side in ("chosen", "rejected"):
        by_hand = [0.5 / (1 + math.exp(0.5 * m)) for m in (3, 0, -2)]
        assert values[f"weights/{side}"].tolist() == pytest.approx(by_hand)
    assert losses.requires_grad and not any(value.requires_grad for value in values.values())


@pytest.mark.parametrize("loss, chosen, rejected", [
    (partial(simpo, beta=2.0), [-4, -4, -10], [-4, -6, -2]), (partial(orpo, beta=2.0), [-4, -4, -10], [-4, -6, -2]),
    (partial(cpo, beta=2.0), [-20, -16, -10], [-40, -12, -10])])
def test_rewards_without_a_reference(loss, chosen, rejected):
    """beta 2 times the log-prob of a response: of simpo and orpo its mean over tokens, of cpo its sum. The three pairs
    are a tie, a success and a failure in the first case, and a success, a failure and a tie in the second."""
    values = pair_metrics(loss, LOGPS, None, TOKENS, 2.0)
    assert values["rewards/chosen"].tolist() == chosen and values["rewards/rejected"].tolist() == rejected
    margins = [a - b for a, b in zip(chosen, rejected)]
    assert values["rewards/margins"].tolist() == margins
    assert values["rewards/accuracies"].tolist() == [float(m > 0) for m in margins]
    assert values["rewards/ties"].tolist() == [float(m == 0) for m in margins]
    assert not any(name.startswith("ref_") for name in values)


def test_a_loss_of_the_users_own_without_a_reference_has_no_rewards():
    values = pair_metrics(lambda chosen, rejected: rejected - chosen, LOGPS, None, TOKENS, 2.0)
    assert not any(name.startswith("rewards/") for name in values) and values["weights/chosen"].tolist() == [1.0] * 3


def test_sft_with_and_without_a_rejected_side():
    both, one = (pair_losses(sft, logps, None, TOKENS) for logps in (LOGPS, LOGPS[:, :1]))
    values, fewer = (pair_metrics(sft, LOGPS[:, :r], None, TOKENS[:, :r], 0.5) for r in (2, 1))
    assert not any(name.startswith("weights/") for name in values)  # of chosen alone they would be 1
    assert both.tolist() == one.tolist() == [10.0, 8.0, 5.0]
    assert "logps/rejected" in values and "logps/rejected" not in fewer and "rewards/chosen" not in values


def test_means_weigh_every_pair_once():
    """Micro-batches of 3 and 1, and one with factor 0 that only keeps ranks in step."""
    meter = Meter(torch.device("cpu"))
    for values, factor in (([1.0, 2.0, 3.0], 1.0), ([6.0], 1.0), ([100.0, 100.0], 0.0)):
        meter.add({"x": torch.tensor(values)}, factor)
    assert meter.means() == {"x": 3.0}


def test_a_mean_over_tokens_weighs_every_token_once():
    """Sums of 6 over 3 tokens and of 2 over 1, then of 4 over 4; a repeat, of 9 over 9, does not count. Other values
    are means over the three pairs beside it."""
    meter = Meter(torch.device("cpu"))
    for sums, tokens, factor in (([6.0, 2.0], [3.0, 1.0], 1.0), ([4.0], [4.0], 1.0), ([9.0], [9.0], 0.0)):
        meter.add({"x": (torch.tensor(sums), torch.tensor(tokens)), "y": torch.tensor(sums)}, factor)
    assert meter.means() == {"x": 12 / 8, "y": 12 / 3}


def test_the_docstring_says_what_every_name_is():
    """The names that train.py writes, read off its code, and those of the pairs; README sends its readers there."""
    files = [ROOT / "train.py", ROOT / "nanodpo" / "run" / "passes.py"]
    code = [node for file in files for node in ast.parse(file.read_text()).body]
    steps = [node for node in code if getattr(node, "name", "") in ("train_step", "log_step", "evaluate")]
    written = {key.value for step in steps for node in ast.walk(step) if isinstance(node, ast.Dict)
               for key in node.keys if isinstance(key, ast.Constant)}
    assert {"grad_norm", "num_tokens", "perf/step_seconds", "mem/peak_gib"} <= written
    values = pair_metrics(partial(dpo, beta=0.5), LOGPS, REF, TOKENS, 0.5).keys()
    explained = {line.split()[0] for line in metrics.__doc__.splitlines() if line.startswith("    ")}
    chosen = {name.replace("rejected", "chosen") for name in values}
    assert written | chosen | {"loss", "entropy", "mean_token_accuracy"} == explained


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak there")
def test_the_peak_of_a_process_is_in_gib():
    """Linux counts the same peak in KiB, 2^20 to a GiB; a larger parent's may stand in its place."""
    (kib,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    assert 0.95 < metrics.peak_gib(torch.device("cpu")) / (int(kib) / 2**20) < 100


LENGTHS = torch.tensor([[3.0, 2.0], [1.0, 4.0]], dtype=torch.float64)  # tokens of two pairs, ten in all
INDEX = torch.arange(4).view(2, 2)  # each has its own responses
BATCH = SimpleNamespace(sequence_ids=torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3]), n_sequences=4)


def scored_tokens(dtype, trainable, bias, scale, cap, whole, watched=True):
    """(head, log-probs and gradient by the hidden states, TokenMetrics, hidden states, targets)."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 31, bias=bias).to(dtype).requires_grad_(trainable)
    hidden, targets = (2 * torch.randn(10, 12)).to(dtype).requires_grad_(not whole), torch.randint(31, (10,))
    head = LogProbHead(layer, scale, cap, chunk_size=4)
    with torch.no_grad():
        targets[::2] = head.logits(hidden[::2]).argmax(1)  # every other token is the likeliest
    tokens = TokenMetrics(SimpleNamespace(head=head, parallel=OneRank()), needs_logits=whole)
    head.on_chunk = tokens if watched else None
    logps = head(hidden, targets)
    if not whole:
        logps.square().sum().backward()
    return head, [logps.detach(), hidden.grad], tokens, hidden, targets


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("trainable, bias, scale, cap, whole", [
    (False, False, 1.0, None, False), (False, False, 0.25, None, False), (True, False, 1.0, None, True),
    (False, True, 1.0, None, True), (False, True, 2.0, 3.0, True), (False, False, 1.0, None, True)])
def test_entropy_and_accuracy_are_those_of_all_logits(dtype, tolerance, trainable, bias, scale, cap, whole):
    """Of training with a frozen head, and of evaluations with any: means over all tokens, and over chosen's; pairs of
    a factor of 0 count for nothing; and log-probs and gradients are, to the last bit, those of a head that nobody
    watches."""
    settings = dtype, trainable, bias, scale, cap, whole
    head, numbers, tokens, hidden, targets = scored_tokens(*settings)
    for mine, other in zip(numbers, scored_tokens(*settings, watched=False)[1]):
        assert mine is other is None or torch.equal(mine, other)
    with torch.no_grad():
        logits = head.logits(hidden).double()
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1)
    hits = (logits.argmax(1) == targets)[[0, 1, 2, 5]].double()  # chosen's three of the first pair, one of the second
    meter = Meter(torch.device("cpu"))
    meter.add(tokens.take(BATCH, INDEX, LENGTHS), 1.0)
    head(hidden, targets)
    meter.add(tokens.take(BATCH, INDEX, LENGTHS), 0.0)
    means = meter.means()
    assert means.keys() == {"entropy", "mean_token_accuracy"} and not tokens.parts
    assert means["entropy"] == pytest.approx(entropy.mean().item(), rel=tolerance) and 0.5 < means["entropy"] < 3.4
    assert means["mean_token_accuracy"] == hits.mean().item() and 0.4 < hits.mean() < 1


@pytest.mark.parametrize("trainable, bias, cap", [(True, False, None), (False, True, None), (False, False, 3.0)])
def test_entropy_that_the_gradient_does_not_tell_is_not_there(trainable, bias, cap):
    tokens = scored_tokens(torch.float64, trainable, bias, 1.0, cap, False)[2]
    assert tokens.take(BATCH, INDEX, LENGTHS).keys() == {"mean_token_accuracy"}


@pytest.mark.parametrize("loss, steps", [("dpo", 2), ("sft", 1)])
def test_a_runs_entropy_and_accuracy_are_those_of_plain_transformers(loss, steps, tiny, tmp_path):
    """Of each step's pairs under its checkpoint, and of all held-out pairs, for DPO after step 0, one sequence at a
    time. SFT's entropy is of chosen alone, in evaluations as in training."""
    lines = train(tiny, tmp_path / "run", "--loss", loss, "--max_steps", str(steps), "--save_steps", "1",
                  "--eval_steps", "1",
                  "--eval_file_path", tiny / "train.jsonl", "--per_device_train_batch_size", "2",
                  "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2")
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    assert len(lines) == 2 * steps + 1
    assert all("eval_entropy" in line for line in lines if "eval_loss" in line) == (loss == "sft")
    for line in (line for line in lines if {"entropy", "eval_entropy"} & {*line}):
        model = oracle.load(tmp_path / "run" / f"checkpoint-{line['step']}", tiny / "model").eval()
        entropy, hits, prefix = [], [], "" if "loss" in line else "eval_"
        for prompt, *sides in ([pairs[i] for i in pairs_of_step(11, 4, 42, line["step"])] if not prefix else pairs):
            for i, ids in enumerate(sides[:1] if loss == "sft" else sides):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].double()
                entropy += (-(logits.softmax(1) * logits.log_softmax(1)).sum(1)).tolist()
                hits += (logits.argmax(1) == torch.tensor(ids)).tolist() if i == 0 else []
        assert line[f"{prefix}entropy"] == pytest.approx(sum(entropy) / len(entropy), rel=1e-5)
        assert line[f"{prefix}mean_token_accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_a_token_that_can_never_come_adds_nothing_to_the_entropy():
    """A logit of -inf, so p = 0, for which 0 log 0 is 0. The seven others are equal: ln 7."""
    layer = torch.nn.Linear(4, 8).requires_grad_(False)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    layer.bias[5] = -math.inf
    head = LogProbHead(layer, chunk_size=2)
    head.on_chunk = tokens = TokenMetrics(SimpleNamespace(head=head, parallel=OneRank()), needs_logits=True)
    head(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    assert torch.cat([part["entropy"] for part in tokens.parts]).tolist() == pytest.approx([math.log(7)] * 3)


def test_measures_from_logits_need_a_pass_without_gradients():
    """The gradient is made in the memory of the exponentials, so what was measured from these would be wrong."""
    head = LogProbHead(torch.nn.Linear(4, 8).requires_grad_(False))
    head.on_chunk = TokenMetrics(SimpleNamespace(head=head, parallel=OneRank()), needs_logits=True)
    with pytest.raises(AssertionError, match="overwrites the exponentials"):
        head(torch.zeros(3, 4, requires_grad=True), torch.tensor([0, 1, 2]))
