"""The metrics of a step, by hand."""

import ast
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from nanodpo.core.losses import dpo, hinge, ipo, pair_losses, pair_weights, sft
from nanodpo.run import metrics
from nanodpo.run.metrics import Meter, pair_metrics, write_line

LOGPS = torch.tensor([[-10.0, -20.0], [-8.0, -6.0], [-5.0, -5.0]], dtype=torch.float64, requires_grad=True)
REF = torch.tensor([[-12.0, -19.0], [-8.0, -6.0], [-4.0, -6.0]], dtype=torch.float64)
TOKENS = torch.tensor([[5.0, 10.0], [4.0, 2.0], [1.0, 5.0]], dtype=torch.float64)


def test_the_values_of_three_pairs():
    """Margins 3, 0 and -2 nats; a tie is no success; sums and means a token both."""
    loss = partial(dpo, beta=0.5)
    losses, weights = pair_losses(loss, LOGPS, REF, TOKENS), pair_weights(loss, LOGPS, REF, TOKENS)
    values = pair_metrics(LOGPS, REF, TOKENS, 0.5, weights)
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
    assert values["ref_gap"].tolist() == pytest.approx([(2 / 5 + 1 / 10) / 2, 0.0, (1 + 1 / 5) / 2])
    for side in ("chosen", "rejected"):
        by_hand = [0.5 / (1 + math.exp(0.5 * m)) for m in (3, 0, -2)]
        assert values[f"weights/{side}"].tolist() == pytest.approx(by_hand)
    assert losses.requires_grad and not any(value.requires_grad for value in values.values())


def test_ipo_takes_means_and_the_others_sums():
    """arXiv 2310.12036 on means over tokens: margins 2/5+1/10, 0, -1-1/5; its zero is at 1/(2 beta)."""
    losses = pair_losses(partial(ipo, beta=0.5), LOGPS, REF, TOKENS)
    assert losses.tolist() == pytest.approx([(m - 1.0) ** 2 for m in (0.5, 0.0, -1.2)])
    hinges = pair_losses(partial(hinge, beta=0.5), LOGPS, REF, TOKENS)
    assert hinges.tolist() == pytest.approx([0.0, 1.0, 2.0])


def test_sft_with_and_without_a_rejected_side():
    both, one = (pair_losses(sft, logps, None, TOKENS) for logps in (LOGPS, LOGPS[:, :1]))
    values, fewer = (pair_metrics(LOGPS[:, :r], None, TOKENS[:, :r], 0.5, pair_weights(
        sft, LOGPS[:, :r], None, TOKENS[:, :r])) for r in (2, 1))
    assert not any(name.startswith("weights/") for name in values)  # of chosen alone they would be 1
    assert both.tolist() == one.tolist() == [10.0, 8.0, 5.0]
    assert "logps/rejected" in values and "logps/rejected" not in fewer and "rewards/chosen" not in values


def test_means_weigh_every_pair_once():
    """Micro-batches of 3 and 1, and one of weight 0 that only keeps ranks in step."""
    meter = Meter(torch.device("cpu"))
    for values, weight in (([1.0, 2.0, 3.0], 1.0), ([6.0], 1.0), ([100.0, 100.0], 0.0)):
        meter.add({"x": torch.tensor(values)}, weight)
    assert meter.means() == {"x": 3.0}


def test_the_docstring_says_what_every_name_is():
    """The names that train.py writes, read off its code, and those of the pairs; README sends its readers there."""
    steps = [node for node in ast.parse((ROOT / "train.py").read_text()).body
             if isinstance(node, ast.FunctionDef) and node.name in ("train_step", "log_step", "evaluate")]
    written = {key.value for step in steps for node in ast.walk(step) if isinstance(node, ast.Dict)
               for key in node.keys if isinstance(key, ast.Constant)}
    assert {"grad_norm", "num_tokens", "perf/step_seconds", "mem/peak_gib"} <= written
    values = pair_metrics(LOGPS, REF, TOKENS, 0.5, TOKENS).keys() - {"ref_gap"}
    explained = {line.split()[0] for line in metrics.__doc__.splitlines() if line.startswith("    ")}
    chosen = {name.replace("rejected", "chosen") for name in values}
    assert written | chosen | {"loss"} == explained


def test_a_line_is_whole_json(tmp_path):
    for step in range(2):
        write_line(tmp_path / "metrics.jsonl", {"step": step, "loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.5}]
    with pytest.raises(ValueError):  # NaN is no JSON, and other programs refuse a file that holds it
        write_line(tmp_path / "metrics.jsonl", {"step": 2, "loss": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak there")
def test_the_peak_of_a_process_is_in_gib():
    """Linux counts the same peak in KiB, 2^20 to a GiB; a larger parent's may stand in its place."""
    (kib,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    assert 0.95 < metrics.peak_gib(torch.device("cpu")) / (int(kib) / 2**20) < 100
