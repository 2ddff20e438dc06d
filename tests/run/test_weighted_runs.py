"""Whole runs whose rows have weights, against plain transformers one sequence at a time, and against repeated rows."""

import json
import math

import oracle
import pytest
import torch
from conftest import ROOT, launch, make_model, train, without_times, zero

from nanodpo.data.schedule import pairs_of_step

pytestmark = pytest.mark.slow
WEIGHTS = [1, 0.5, 2, 0, 3, 1, 0.25, 1, 4, 1, 0.1]
FULL = ("--learning_rate", "1e-3", "--use_lora", "false")


def weighted(folder, tiny, weights, name="weighted.jsonl"):
    """The pairs of the tiny data with these weights, in a new file."""
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(row | {"weight": w}) + "\n" for row, w in zip(rows, weights)))
    return folder / name


def mean_by_hand(model, pairs, ref, loss, beta=0.1):
    """The weighted mean of a step's losses: sum w l / sum w, of sft per token, one sequence at a time."""
    total, divisor = 0.0, 0.0
    for i, (prompt, *sides) in pairs:
        chosen, rejected = (oracle.sequence_logp(model, prompt, side) for side in sides)
        margin = (chosen - ref[i][0]) - (rejected - ref[i][1])
        total += WEIGHTS[i] * (-chosen if loss == "sft" else torch.log1p(torch.exp(-beta * margin)))
        divisor += WEIGHTS[i] * (len(sides[0]) if loss == "sft" else 1)
    return total / divisor


@pytest.mark.parametrize("loss, ranks, stage, flags", [
    ("dpo", 2, 2, ("--gradient_accumulation_steps", "2")),
    ("dpo", 2, 3, ("--per_device_train_batch_size", "2")),
    ("sft", 1, 0, ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"))])
def test_a_step_is_the_weighted_mean_of_its_pairs(loss, ranks, stage, flags, tiny, tmp_path):
    """Loss and gradient's norm of the first step, however it is cut and shared, and the loss of an evaluation before
    and after it; margins and log-probs stay means over pairs, each counted once."""
    file = weighted(tmp_path, tiny, WEIGHTS)
    lines = train(tiny, tmp_path / "run", *FULL, *flags, "--loss", loss, "--deepspeed", zero(tmp_path, stage),
                  "--train_file_path", file, "--eval_file_path", file, "--max_steps", "1", ranks=ranks)
    model, pairs = make_model(), oracle.read_pairs(file)
    with torch.no_grad():
        ref = [[oracle.sequence_logp(model, p, y).item() for y in sides] for p, *sides in pairs]
    here = pairs_of_step(11, 4, 42, 0)
    found = mean_by_hand(model, [(i, pairs[i]) for i in here], ref, loss)
    found.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    (step,) = [line for line in lines if "loss" in line]
    assert step["loss"] == pytest.approx(found.item(), rel=1e-5) and step["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert step["logps/chosen"] == pytest.approx(sum(ref[i][0] for i in here) / 4, rel=1e-5)
    first, last = [line for line in lines if "eval_loss" in line]
    with torch.no_grad():
        assert first["eval_loss"] == pytest.approx(
            mean_by_hand(model, [*enumerate(pairs)], ref, loss).item(), rel=1e-5)
        after = oracle.load(tmp_path / "run" / "checkpoint-1")
        assert last["eval_loss"] == pytest.approx(
            mean_by_hand(after, [*enumerate(pairs)], ref, loss).item(), rel=1e-5)


@pytest.mark.parametrize("flags", [("--sft_weight", "0.5"), ("--loss", "sft")])
def test_weights_of_1_change_no_byte(flags, tiny, tmp_path):
    """Of the metrics and the weights. The same command with or without the column goes on with the run."""
    file = weighted(tmp_path, tiny, [1, 1.0] * 5 + [1])
    more = ("--max_steps", "3", "--per_device_train_batch_size", "2", "--eval_file_path", tiny / "train.jsonl", *flags)
    plain = train(tiny, tmp_path / "plain", *more)
    ones = train(tiny, tmp_path / "ones", *more, "--train_file_path", file)
    assert without_times(plain) == without_times(ones)
    saved = [file.read_bytes() for file in tmp_path.glob("*/checkpoint-3/adapter_model.safetensors")]
    assert len(saved) == 2 and saved[0] == saved[1]
    again = [ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", file, "--output_dir",
             tmp_path / "plain", "--cache_dir", tmp_path / "cache", "--draw", "false", *more]
    assert "this run is finished" in launch(*again, launcher="fork").stdout


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_weight_2_is_the_row_given_twice(loss, tiny, tmp_path):
    """Each step has all rows: weights 2, 0 and 1, and rows that stand there twice, not and once, train alike."""
    weights = [2, 0, 1, 1, 2, 1, 1, 0, 1, 1, 2]
    lines = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join(line * w for line, w in zip(lines, weights)))
    more = (*FULL, "--max_steps", "3", "--loss", loss)
    one = train(tiny, tmp_path / "weights", *more, "--gradient_accumulation_steps", "11", "--train_file_path",
                weighted(tmp_path, tiny, weights))
    other = train(tiny, tmp_path / "twice", *more, "--gradient_accumulation_steps", "12", "--train_file_path",
                  tmp_path / "twice.jsonl")
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-5)


def test_a_step_whose_weights_are_all_0_has_a_gradient_of_0(tiny, tmp_path):
    """And a loss of 0; nothing is divided by 0, and AdamW, which has no momentum yet, leaves the weights as they are.
    Means over pairs are there as ever."""
    heavy = pairs_of_step(11, 1, 42, 2)[0]
    file = weighted(tmp_path, tiny, [float(i == heavy) for i in range(11)])
    lines = train(tiny, tmp_path / "run", *FULL, "--max_steps", "4", "--train_file_path", file, "--save_steps", "1")
    assert [line["loss"] > 0 for line in lines] == [line["grad_norm"] > 0 for line in lines] == [
        False, False, True, False]
    assert all(line["logps/chosen"] < 0 and line["weights/chosen"] > 0 for line in lines)
    saved = [(tmp_path / "run" / f"checkpoint-{k}" / "model.safetensors").read_bytes() for k in range(4)]
    assert saved[0] == saved[1] == saved[2] != saved[3]


def test_a_run_whose_weights_were_changed_does_not_go_on(tiny, tmp_path):
    """It is refused as with other data; its reference is taken from the cache, since weights do not change it. Of data
    whose weights are all 0 nothing is begun, for training as for evaluation, nor with --inspect."""
    def start(file, *more, check=False):
        return launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", file, "--cache_dir",
                      tmp_path / "cache", "--draw", "false", "--max_steps", "2", *more, launcher="fork", check=check)

    one = weighted(tmp_path, tiny, WEIGHTS)
    start(one, "--output_dir", tmp_path / "run", check=True)
    weighted(tmp_path, tiny, WEIGHTS[::-1])
    done = start(one, "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and "holds a run with other settings (data: " in done.stderr
    assert "0 pairs computed, 2 from the cache" in start(one, "--output_dir", tmp_path / "new", check=True).stdout
    none = weighted(tmp_path, tiny, [0] * 11, "none.jsonl")
    for more in ((none,), (none, "--inspect"), (one, "--eval_file_path", none), (one, "--loss", "sft",
                                                                                "--eval_file_path", none)):
        done = start(*more, "--output_dir", tmp_path / "no")
        assert done.returncode == 2 and f"{none}: every row that is left has the weight 0" in done.stderr
        assert not (tmp_path / "no").exists()
