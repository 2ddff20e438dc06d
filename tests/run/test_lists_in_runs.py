"""Whole runs on rows with lists of answers, against plain transformers that pass every pair alone."""

import itertools
import json
import math

import oracle
import pandas
import pytest
import torch
from conftest import ROOT, launch, make_model, make_tokenizer, train, zero

from nanodpo.data.schedule import pairs_of_step

pytestmark = pytest.mark.slow
ROWS = [{"prompt": f"What is {i}+{i}? ", "chosen": [f"It is {2 * i}", f"{2 * i}, sure"][: 1 + i % 2],
         "rejected": ["No idea" + "!" * i, "Who knows?", "?" * (i + 2)][: 1 + i % 3]} for i in range(6)]
# Pairs of each row 1, 4, 3, 2, 2, 6: in all 18, and 9 chosen answers.
STARTS, CHOSEN_STARTS = (0, 1, 5, 8, 10, 12), (0, 1, 3, 4, 6, 7)
FLAGS = ("--use_lora", "false", "--learning_rate", "1e-3", "--max_steps", "3")


def encode(text: str, end=()) -> list[int]:
    return make_tokenizer()(text).input_ids + [*end]


def entropies(prompt, response) -> torch.Tensor:
    """Of the next token, at each of the response's, before any training."""
    with torch.no_grad():
        logps = make_model().double()(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return -(logps.exp() * logps).sum(1)


def pairs_by_hand(rows=ROWS, chosen_alone: bool = False):
    """Prompt, chosen and rejected ids of every combination, in the order of the file; or of each chosen answer."""
    end = [oracle.EOS]
    return [(encode(row["prompt"]), encode(c, end), encode(r, end)) for row in rows
            for k, c in enumerate(row["chosen"]) for j, r in enumerate(row["rejected"])
            if not chosen_alone or j == k % len(row["rejected"])]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("ranks, stage, flags", [
    (1, 0, ("--per_device_train_batch_size", "6")),
    (2, 3, ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"))])
def test_dpo_equals_an_independent_trainer(ranks, stage, flags, file, tiny, tmp_path):
    """Whose pairs share nothing: losses, norms and log-probs, whether all pairs of a row meet in a micro-batch or not.
    A shared prompt and a shared response count once in num_tokens; an evaluation is the mean over all pairs."""
    lines = train(tiny, tmp_path / "run", *FLAGS, *flags, "--deepspeed", zero(tmp_path, stage), "--train_file_path",
                  file, "--eval_file_path", file, "--per_device_eval_batch_size", "4", ranks=ranks)
    size, pairs = (6 if ranks == 1 else 8), pairs_by_hand()
    windows = [pairs_of_step(18, size, 42, step, STARTS) for step in range(3)]
    expected = oracle.train(model := make_model(), pairs, windows)
    steps, tokens = [line for line in lines if "loss" in line], 0
    for line, truth, window in zip(steps, expected, windows, strict=True):
        for key, value in truth.items():
            assert line[key] == pytest.approx(value, rel=1e-5), (line["step"], key)
        once = {(k, tuple(ids)) for i in window for k, ids in [("prompt", pairs[i][0]),
                                                              *((str(pairs[i][0]), ids) for ids in pairs[i][1:])]}
        tokens += sum(len(ids) for _, ids in once)
        assert line["num_tokens"] == tokens
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-12) and steps[0]["rewards/ties"] == 1
    (last,) = [line for line in lines if line.get("step") == 3]
    with torch.no_grad():
        sums = [oracle.sequence_logp(model, p, c).item() for p, c, _ in pairs]
    assert last["eval_logps/chosen"] == pytest.approx(sum(sums) / 18, rel=1e-5)


def test_sft_trains_on_each_chosen_answer_once(file, tiny, tmp_path):
    """Whatever its rejected ones; an evaluation follows as many of these."""
    lines = train(tiny, tmp_path / "run", *FLAGS, "--loss", "sft", "--per_device_train_batch_size", "3",
                  "--train_file_path", file, "--eval_file_path", file)
    pairs = pairs_by_hand(chosen_alone=True)
    assert len(pairs) == 9
    windows = [pairs_of_step(9, 3, 42, step, CHOSEN_STARTS) for step in range(3)]
    expected = oracle.train(model := make_model(), pairs, windows, loss="sft")
    for line, truth in zip([line for line in lines if "loss" in line], expected, strict=True):
        assert all(line[key] == pytest.approx(value, rel=1e-5) for key, value in truth.items())
    (last,) = [line for line in lines if line["step"] == 3]
    with torch.no_grad():
        rejected = [oracle.sequence_logp(model, p, r).item() for p, _, r in pairs]
    assert last["eval_logps/rejected"] == pytest.approx(sum(rejected) / 9, rel=1e-5)


def test_lists_are_scored_and_a_run_on_them_goes_on(file, tiny, tmp_path):
    """A LoRA run with rows held out as a whole. score.py scores each answer of a held-out row once: the first ones as
    chosen and rejected, the others under their numbers; their means over all pairs are those of the evaluation, and the
    entropy of a step is that of a step without anything shared."""
    more = ("--lora_r", "4", "--learning_rate", "1e-2", "--max_steps", "2", "--per_device_train_batch_size", "4",
            "--eval_size", "3", "--sft_weight", "0.5", "--train_file_path", file)
    lines = train(tiny, tmp_path / "run", *more)
    held = json.loads((tmp_path / "run" / "run.json").read_text())["held_out_rows"]
    kept = [row for i, row in enumerate(ROWS) if i not in held]
    sizes = [len(row["chosen"]) * len(row["rejected"]) for row in kept]
    pairs = [pairs_by_hand([row])[k] for row, size in zip(kept, sizes) for k in range(size)]
    first = pairs_of_step(len(pairs), 4, 42, 0, (0, *itertools.accumulate(sizes[:-1])))
    (line,) = [line for line in lines if line["step"] == 0 and "loss" in line]
    found = torch.cat([entropies(prompt, ids) for i in first for prompt, *sides in [pairs[i]] for ids in sides])
    with torch.no_grad():
        likely = [oracle.sequence_logp(make_model(), *pairs[i][:2]).item() / len(pairs[i][1]) for i in first]
    assert line["loss"] == pytest.approx(math.log(2) - 0.5 * sum(likely) / 4, rel=1e-6)  # --sft_weight: of each pair
    assert len(held) == 3 and line["entropy"] == pytest.approx(found.mean().item(), rel=1e-5)
    again = [ROOT / "train.py", "--model_name", tiny / "model", "--output_dir", tmp_path / "run", "--cache_dir",
             tmp_path / "cache", "--draw", "false", *more]
    assert "this run is finished" in launch(*again, launcher="fork").stdout
    done = launch(ROOT / "score.py", tmp_path / "run", "--responses", "chosen", "rejected", launcher="fork")
    assert "further ones are scored as chosen[1], rejected[1], rejected[2]" in done.stdout
    table = pandas.read_parquet(tmp_path / "run" / "scores.parquet").query("step == 2").set_index(["row", "response"])
    model = oracle.load(tmp_path / "run" / "checkpoint-2", tiny / "model").eval()
    sums, count = [], 0
    for row in held:
        for side in ("chosen", "rejected"):
            for k, answer in enumerate(ROWS[row][side]):
                with torch.no_grad():
                    ids = encode(ROWS[row]["prompt"]), encode(answer, [oracle.EOS])
                    truth = oracle.sequence_logp(model, *ids).item()
                assert table.loc[row, f"{side}[{k}]" if k else side].logps == pytest.approx(truth, rel=1e-5)
                count += 1
                if side == "chosen":
                    sums += [truth] * len(ROWS[row]["rejected"])
    assert len(table) == count
    (last,) = [line for line in lines if line.get("step") == 2]
    assert last["eval_logps/chosen"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)
