"""Runs with settings drawn at random, in combinations that no other test has. Each is killed and goes on, is cut into
other micro-batches, and is computed again from its checkpoints by plain transformers.

    COMBINATIONS=100 pytest tests/run/test_combinations.py      as many of them
"""

import json
import os
import random
from pathlib import Path

import oracle
import pytest
import torch
from conftest import ROOT, forked, launch, lines_of, make_tokenizer, zero
from tiny_models import tiny

from nanodpo.core.losses import LOSSES, inputs_of
from nanodpo.data.schedule import pairs_of_step

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "gpt2",
            "cohere", "granite", "phi", "qwen3_moe", "gpt_oss", "bloom")
SOMETIMES = [{"--gradient_checkpointing": None}, {"--use_lora": "false"}, {"--lora_r": 2}, {"--sft_weight": 0.3},
             {"--warmup_steps": 2}, {"--lr_scheduler_type": "linear"}, {"--weight_decay": 0.1}, {"--max_grad_norm": 0},
             {"--max_grad_norm": 0.1}, {"--eval_size": 2}, {"--keep_states": None}, {"--merge_weights": None},
             {"--resume_steps": 1, "--save_steps": 4}]
STEPS = 4


def settings(draw: random.Random) -> tuple[str, int, int, dict]:
    """(family, ranks, ZeRO's stage, flags)"""
    loss = draw.choice(sorted(LOSSES))
    flags = {"--loss": loss, "--learning_rate": draw.choice([1e-3, 1e-2]), "--max_steps": STEPS, "--save_steps": 1,
             "--per_device_train_batch_size": draw.randint(1, 3), "--gradient_accumulation_steps": draw.randint(1, 3)}
    for more in SOMETIMES:
        flags |= more if draw.random() < 0.25 else {}
    if loss != "sft":
        flags["--beta"] = draw.choice([0.1, 0.5, 2.0])
    flags.pop("--sft_weight" if loss == "sft" else None, None)
    flags.pop("--merge_weights" if "--use_lora" in flags else None, None)
    family, ranks, stage = draw.choice(FAMILIES), draw.choice([1, 1, 2]), draw.randint(0, 3)
    return family, ranks, 2 if family == "qwen3_moe" and stage == 3 else stage, flags  # which its LoRA refuses


def write_rows(file: Path, draw: random.Random) -> list[float]:
    """Pairs of ragged lengths; returns the weights of the rows, which the data may have."""
    def text():
        return "".join(draw.choices("abcdefgü€1  ", k=draw.randint(1, 30))).strip() or "x"

    rows = [{"prompt": text(), "chosen": f"{text()}c", "rejected": f"{text()}r"} for _ in range(draw.randint(6, 14))]
    if draw.random() < 0.5:
        for i, row in enumerate(rows):  # of three rows at least, where two are held out, it is not 0
            row["weight"] = draw.choice([0.0] * 3 * (i > 2) + [0.5, 1.0, 2.0])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row.get("weight", 1.0) for row in rows]


def bytes_of(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for folder in ("checkpoint-*", "merged")
            for file in run.glob(f"{folder}/*")}


def computed_again(run: Path, base: str, flags: dict, pairs: list, weights: list[float], indices: list[int],
                   step: int) -> tuple[torch.Tensor, float]:
    """((P, R) log-probs of these pairs under checkpoint-<step>, their weighted mean loss)."""
    sides, logps = 1 if flags["--loss"] == "sft" else 2, {}
    for k in (0, step):
        folder = run / f"checkpoint-{k}"
        model = oracle.load(folder, base if (folder / "adapter_config.json").exists() else None).eval()
        with torch.no_grad():
            logps[k] = torch.tensor([[oracle.sequence_logp(model, pairs[i][0], y).item()
                                      for y in pairs[i][1 : 1 + sides]] for i in indices])
    lengths = torch.tensor([[float(len(y)) for y in pairs[i][1:]] for i in indices])
    loss, counts = LOSSES[flags["--loss"]], torch.tensor([weights[i] for i in indices])
    given = dict(zip(("chosen", "rejected"), logps[step].unbind(1))) | {"lengths": lengths}
    given |= dict(zip(("ref_chosen", "ref_rejected"), logps[0].unbind(1)))
    beta = {"beta": flags["--beta"]} if sides == 2 else {}
    losses = loss(**{name: given[name] for name in inputs_of(loss)}, **beta)
    losses = losses - flags.get("--sft_weight", 0.0) * logps[step][:, 0] / lengths[:, 0]
    over = counts * lengths[:, 0] if sides == 1 else counts
    return logps[step], ((counts * losses).sum() / (over.sum() if over.sum() else 1.0)).item()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("COMBINATIONS", "3"))))
def test_a_run_goes_on_is_cut_otherwise_and_is_computed_again(seed, tmp_path):
    draw = random.Random(seed)
    family, ranks, stage, flags = settings(draw)
    base, data = str(tmp_path / "base"), tmp_path / "rows.jsonl"
    tiny(family, torch.float32, 0.1, vocab_size=264, pad_token_id=256, eos_token_id=258).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    weights, batch, times = write_rows(data, draw), "--per_device_train_batch_size", "--gradient_accumulation_steps"

    def command(name, **changed):
        given = [part for pair in (flags | changed).items() for part in pair if part is not None]
        return ["--model_name", base, "--train_file_path", data, "--output_dir", tmp_path / name, "--cache_dir",
                tmp_path / f"cache-{name}", "--draw", "false", "--deepspeed", zero(tmp_path, stage), *given]

    launch(ROOT / "train.py", *command("whole"), ranks=ranks, launcher="fork")
    codes, _ = forked(ROOT / "tests" / "faulty.py", f"kill@{draw.randrange(STEPS)}:{draw.randrange(ranks)}",
                      *command("killed"), ranks=ranks)
    assert max(codes) == 137
    launch(ROOT / "train.py", *command("killed"), ranks=ranks, launcher="fork")
    whole = tmp_path / "whole"
    assert lines_of(tmp_path / "killed") == lines_of(whole) and bytes_of(tmp_path / "killed") == bytes_of(whole)

    otherwise = command("cut", **{batch: flags[times], times: flags[batch]})
    launch(ROOT / "train.py", *otherwise, ranks=ranks, launcher="fork")
    for line, same in zip(lines_of(whole), lines_of(tmp_path / "cut"), strict=True):
        assert line == pytest.approx(same, rel=1e-3, abs=1e-4)

    pairs, trained = oracle.read_pairs(data), [line for line in lines_of(whole) if "loss" in line]
    if "--eval_size" not in flags:  # which rows that holds out is another test's
        for step in range(0, STEPS, flags["--save_steps"]):
            indices = pairs_of_step(len(pairs), flags[batch] * flags[times] * ranks, 42, step)
            logps, loss = computed_again(whole, base, flags, pairs, weights, indices, step)
            found = [trained[step][f"logps/{side}"] for side in ("chosen", "rejected")[: logps.shape[1]]]
            assert found == pytest.approx(logps.mean(0).tolist(), rel=1e-4)
            assert trained[step]["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-4)
