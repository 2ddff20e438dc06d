"""Safety around a step: requests to stop, and numbers that are not finite."""

import itertools
import json
import math
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train
from nanodpo.core.losses import LOSSES, pair_losses
from nanodpo.errors import Preempted, RunStopped
from nanodpo.ranks import distributed
from nanodpo.run.guards import StepGuard, check_start, guarded, nonfinite
from nanodpo.run.memory import describe
from nanodpo.run.signals import Stop

EXAMPLES = [SimpleNamespace(row=10 + i, prompt=[0] * 3, chosen=[0] * 4, rejected=[0] * 5) for i in range(10)]


def test_ranks_are_asked_before_each_micro_batch_and_stop_after_the_one_before_which_one_was_told():
    done, stop = [], Stop()
    with pytest.raises(Preempted, match="stopped by SIGTERM"), guarded(EXAMPLES, stop, 0, "step 5") as guard:
        for indices, factor in guard.each([([1], 1.0), ([2], 1.0), ([3], 0.0)]):
            done.append((indices, factor))
            stop.name = "SIGTERM"
    assert done == [([1], 1.0), ([2], 1.0)]


def test_a_run_is_told_to_stop_also_where_its_log_is_on_a_full_disk():
    """The line that says so is lost; the run ends with what it has saved."""
    own, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
    try:
        with Stop() as stop:
            stop.defer()
            os.dup2(full, 2)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.name == "SIGTERM"
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(full)


def test_the_answer_of_the_ranks_is_awaited_after_the_micro_batch_not_before_it(monkeypatch):
    heard = []
    monkeypatch.setattr(distributed, "ask", lambda flag: heard.append("asked") or (lambda: heard.append("answered")))
    for indices, _ in StepGuard(EXAMPLES, Stop()).each([([1], 1.0), ([2], 1.0)]):
        heard.append(f"micro-batch {indices[0]}")
    assert heard == ["asked", "micro-batch 1", "answered", "asked", "micro-batch 2", "answered"]


def test_rows_that_do_not_fit_the_memory_are_named():
    words = r"rank 3 ran out of memory in step 5 on row 12 \(prompt 3, chosen 4, rejected 5 tokens\); no update"
    with pytest.raises(RunStopped, match=words):
        with guarded(EXAMPLES, Stop(), 3, "step 5") as guard:
            for _ in guard.each([([1], 1.0), ([2], 1.0)]):
                if guard.indices == [2]:
                    raise torch.OutOfMemoryError("CUDA out of memory")


def test_pairs_that_went_wrong_are_remembered_by_side():
    """Over all micro-batches of a step, not the last one alone."""
    guard = StepGuard(EXAMPLES, Stop())
    for indices, logps, losses in (([7, 3], [[-1.0, math.nan], [-1.0, -2.0]], [0.5, 0.5]),
                                   ([9], [[-math.inf, -2.0]], [math.inf]), ([4], [[-1.0, -2.0]], [0.5])):
        guard.nan_where_nonfinite(indices, torch.tensor(logps), torch.tensor(losses))
    assert guard.nonfinite_pairs() == {7: ["rejected"], 9: ["chosen", "loss"]}
    assert guard.nonfinite_rows() == ("row 17 (prompt 3, chosen 4, rejected 5 tokens), row 19 (prompt 3, chosen 4, "
                                      "rejected 5 tokens) in chosen, loss, rejected")
    assert nonfinite({"loss": math.inf, "x": 1.0, "y": math.nan}) == "loss, y" and nonfinite({"x": 1.0}) == ""
    assert guard.why_left_out({"loss": math.inf, "x": 1.0}, math.nan, [7]).startswith("loss not finite; row 17 (prompt")
    words = "the gradient is not finite (norm nan); row 12 (prompt 3, chosen 4, rejected 5 tokens)"
    assert guard.why_left_out({"loss": 0.5}, math.nan, [2]) == words
    assert guard.why_left_out({"loss": 0.5}, 1.0, [2]) == f"DeepSpeed skipped the update; {words.partition('; ')[2]}"
    fine = StepGuard(guard.examples, guard.stop)  # a metric that is not finite where log-probs and losses are
    assert fine.why_left_out({"weights/chosen": math.nan}, math.nan, [2]) == (
        f"weights/chosen not finite; {words.partition('; ')[2]}")


def test_the_loss_of_sft_data_is_not_called_rejected():
    guard = StepGuard(EXAMPLES, Stop())
    guard.nan_where_nonfinite([7, 8], torch.tensor([[-1.0], [-2.0]]), torch.tensor([0.5, math.inf]))
    assert guard.nonfinite_rows() == "row 18 (prompt 3, chosen 4, rejected 5 tokens) in loss"


def test_of_many_rows_the_first_16_are_named():
    rows = [SimpleNamespace(row=i, prompt=[0] * 3, chosen=[0] * 4, rejected=None) for i in range(19)]
    assert describe(rows[:2]) == "row 0 (prompt 3, chosen 4 tokens), row 1 (prompt 3, chosen 4 tokens)"
    assert describe(rows[:16]).endswith(", row 15 (prompt 3, chosen 4 tokens)")
    assert describe(rows) == f"{describe(rows[:16])} and 3 more"


def test_one_pair_that_is_not_finite_makes_the_whole_gradient_nan_and_finite_ones_change_no_bit():
    """A log-prob of -inf can have a loss of 0 with a gradient of 0: its step must not be taken all the same."""
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    guard = StepGuard(EXAMPLES, Stop())
    plain = -torch.nn.functional.logsigmoid(logps[:, 0] - logps[:, 1])
    assert plain[1] == 0.0 and guard.nan_where_nonfinite([1, 2], logps, plain)[0] == plain[0]
    (gradient,) = torch.autograd.grad(guard.nan_where_nonfinite([1, 2], logps, plain).sum(), logps)
    assert gradient[0].isfinite().all() and gradient[1].isnan().all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_so_flat_that_a_step_with_a_log_prob_that_is_not_finite_is_taken(name):
    """hinge has the value and the slope 0 where rejected has a log-prob of -inf: NaN times its value has no gradient.
    The gradient of the other pair is, bit by bit, what it is without the guard."""
    loss = partial(LOSSES[name], **({"beta": 0.1} if name != "sft" else {}))
    ref, lengths = torch.tensor([[-4.0, -3.0], [-5.0, -5.0]], dtype=torch.float64), torch.tensor([[3, 4], [5, 6]])
    for side, value in itertools.product((0, 1), (-math.inf, math.inf, math.nan)):
        logps = torch.tensor([[-3.0, -4.0], [-5.0, -5.0]], dtype=torch.float64)
        logps[1, side] = value
        found = []
        for guard in (StepGuard(EXAMPLES, Stop()).nan_where_nonfinite, lambda indices, logps, losses: losses):
            leaf = logps.clone().requires_grad_()
            of_batch = leaf[[0, 1]]  # no leaf, as the engine's
            guard([1, 2], of_batch, pair_losses(loss, of_batch, ref, lengths)).sum().backward()
            found.append(leaf.grad)
        assert found[0][1].isnan().all() and torch.equal(found[0][0], found[1][0]), (side, value)


@pytest.fixture
def breaking(tiny, tmp_path):
    """(rows.jsonl, a run that it may be given to): a loss of one's own that is infinite for a response of 3 tokens,
    which only row 1 has."""
    (tmp_path / "mine.py").write_text("import torch\n\n\ndef mine(chosen, rejected, lengths):\n"
                                      "    return torch.where(lengths[:, 0] == 3, torch.inf, rejected - chosen)\n")
    rows = [{"prompt": "2?", "chosen": text, "rejected": "none"} for text in ("four", "ab", "fourth")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*flags):
        train.main([*map(str, ("--model_name", tiny / "model", "--output_dir", tmp_path / "run", "--draw", "false",
                               "--loss", f"{tmp_path / 'mine.py'}:mine", "--trust_remote_code", "--max_steps", "1",
                               *flags))])

    return tmp_path / "rows.jsonl", run


def test_a_run_takes_no_step_on_a_loss_that_is_not_finite_and_flat(breaking):
    """torch.where gives what it leaves out no gradient, and NaN times nothing is nothing."""
    rows, run = breaking
    with pytest.raises(RunStopped, match=r"^step 0: loss not finite; row 1 \(prompt 2, chosen 3, rejected 5 tokens\) "
                                         r"in loss; no update was made$"):
        run("--train_file_path", rows, "--eval_size", "0", "--gradient_accumulation_steps", "3")


def test_the_gap_between_policy_and_reference_is_in_nats_a_token():
    """Responses of 4 and 5 tokens in two micro-batches: differences of 2 and 1 nats, of 0 and 4 and of 0 and 0; those
    of unlike signs do not cancel."""
    guard, ref = StepGuard(EXAMPLES, Stop()), torch.zeros(10, 2, dtype=torch.float64)
    ref[[7, 3, 9]] = torch.tensor([[-12.0, -19.0], [-8.0, -6.0], [-4.0, -6.0]], dtype=torch.float64)
    for indices, logps in (([7, 3], [[-10.0, -20.0], [-8.0, -2.0]]), ([9], [[-4.0, -6.0]])):
        guard.nan_where_nonfinite(indices, torch.tensor(logps, dtype=torch.float64), torch.ones(len(indices)))
    assert guard.reference_gap(ref) == pytest.approx((2 / 4 + 1 / 5 + 0 + 4 / 5 + 0 + 0) / 6)


def test_a_policy_that_is_not_its_reference_at_step_0_is_refused():
    """A small difference a token is a large one over 20,000 tokens, and shows in the margin."""
    for gap, margin, bf16 in ((9e-5, 0.0, False), (0.0, 0.0, True), (9e-4, 0.009, True)):
        check_start({"loss": math.log(2), "rewards/margins": margin}, gap, bf16, "cache")
    for gap, margin, bf16 in ((2e-4, 0.0, False), (0.0, 0.02, False), (0.0, -0.02, True), (2e-3, 0.0, True),
                              (9e-5, 0.38, False), (9e-4, -3.8, True)):
        with pytest.raises(RunStopped, match="policy and reference should be equal.*files in cache"):
            check_start({"loss": 0.7, "rewards/margins": margin}, gap, bf16, "cache")


def test_an_evaluation_names_the_row_that_is_not_finite(tiny, breaking):
    rows, run = breaking
    with pytest.raises(RunStopped, match=r"^evaluation under checkpoint-0: loss not finite; row 1 \(prompt 2, "
                                         r"chosen 3, rejected 5 tokens\) in loss$"):
        run("--train_file_path", tiny / "train.jsonl", "--eval_file_path", rows)


def test_an_evaluation_in_which_a_slope_alone_is_not_finite(tiny, tmp_path):
    """The square root of 0, in which all losses are finite: no row is named, and the sentence has an end."""
    (tmp_path / "mine.py").write_text("def mine(chosen, rejected):\n    m = chosen - rejected\n"
                                      "    return (m * (m.abs() > 9)).abs().sqrt()\n")
    with pytest.raises(RunStopped, match="^evaluation under checkpoint-0: weights/chosen, weights/rejected not finite$"
                       ):
        train.main(["--model_name", str(tiny / "model"), "--train_file_path", str(tiny / "train.jsonl"), "--output_dir",
                    str(tmp_path / "run"), "--draw", "false", "--eval_size", "3", "--loss",
                    f"{tmp_path / 'mine.py'}:mine", "--trust_remote_code", "--max_steps", "1"])
