"""Where a run starts: another reference than its own start, and adapters as PEFT's LoraConfig describes them."""

import json
import math
import shutil

import oracle
import pandas
import pytest
import torch
from conftest import ROOT, launch, make_model, make_tokenizer, train, zero

from nanodpo.data.schedule import pairs_of_step

pytestmark = pytest.mark.slow
STEP = ("--learning_rate", "1e-3", "--lora_r", "4", "--per_device_train_batch_size", "2", "--max_steps", "2")
PAIRS = pairs_of_step(11, 4, 42, 0)


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """A model of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    make_model(seed=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "mem/"))} for line in lines]


def sums(model, pairs) -> torch.Tensor:
    """(P, 2) log-probs of chosen and rejected, nats, by plain PyTorch."""
    with torch.no_grad():
        return torch.tensor([[oracle.sequence_logp(model, prompt, y).item() for y in responses]
                             for prompt, *responses in pairs])


@pytest.mark.parametrize("stage, ranks, more", [(0, 1, ("--gradient_accumulation_steps", "2")), (3, 2, ()),
                                                (0, 1, ("--gradient_accumulation_steps", "2", "--use_lora", "false"))])
def test_another_model_is_the_reference(stage, ranks, more, tiny, other, tmp_path):
    """The loss and rewards of step 0, and of the evaluation before it, from two models in plain PyTorch; and run.json
    tells the reference by its weights."""
    lines = train(tiny, tmp_path / "run", *STEP, *more, "--reference", other, "--eval_file_path", tiny / "train.jsonl",
                  "--deepspeed", zero(tmp_path, stage), ranks=ranks)
    policy, ref = (oracle.load(folder).eval() for folder in (tiny / "model", other))
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    for line, prefix, chosen in ((lines[1], "", PAIRS), (lines[0], "eval_", range(11))):
        here = [pairs[i] for i in chosen]
        ours, theirs = sums(policy, here), sums(ref, here)
        rewards = 0.1 * (ours - theirs)
        margins = rewards[:, 0] - rewards[:, 1]
        loss = torch.log1p(torch.exp(-margins)).mean().item()
        assert abs(loss - math.log(2)) > 1e-3 and line[f"{prefix}loss"] == pytest.approx(loss, abs=1e-5)
        for name, values in (("logps", ours), ("ref_logps", theirs), ("rewards", rewards)):
            for side, column in zip(("chosen", "rejected"), values.unbind(1)):
                assert line[f"{prefix}{name}/{side}"] == pytest.approx(column.mean().item(), abs=1e-4), name
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"]["reference"] == str(other) and len(record["reference"].split()) == 2


def test_the_same_model_by_another_name_changes_no_bit(tiny, tmp_path):
    """A copy of the model as its own reference."""
    shutil.copytree(tiny / "model", tmp_path / "copy")
    flags = (*STEP, "--gradient_accumulation_steps", "2", "--eval_size", "3")
    plain = train(tiny, tmp_path / "plain", *flags)
    named = train(tiny, tmp_path / "named", *flags, "--reference", tmp_path / "copy", "--cache_dir", tmp_path / "new")
    assert without_times(named) == without_times(plain)


def test_the_base_is_the_reference_of_an_adapter_that_is_trained_on(tiny, tmp_path):
    """The first run's references serve again, from the cache: with the adapter off the model is the same base. Another
    adapter is a reference, too."""
    flags = (*STEP[2:], "--gradient_accumulation_steps", "2")
    train(tiny, tmp_path / "first", "--learning_rate", "1e-2", *flags)
    fresh, start, runs = tmp_path / "first" / "checkpoint-0", tmp_path / "first" / "checkpoint-2", {}
    for name, reference in (("base", tiny / "model"), ("adapter", fresh), ("same", start)):
        done = launch(ROOT / "train.py", "--model_name", start, "--train_file_path", tiny / "train.jsonl",
                      "--reference", reference, "--output_dir", tmp_path / name, "--cache_dir", tmp_path / "cache",
                      "--draw", "false", *flags[2:], launcher="fork")
        assert ("reference: 0 pairs computed, 8 from the cache" in done.stdout) == (name == "base")
        runs[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
    pairs = [oracle.read_pairs(tiny / "train.jsonl")[i] for i in PAIRS]
    moved = sums(oracle.load(start, tiny / "model").eval(), pairs) - sums(oracle.load(tiny / "model").eval(), pairs)
    assert moved.abs().max() > 0.1
    for name in ("base", "adapter"):  # a fresh adapter adds nothing
        assert runs[name]["rewards/chosen"] == pytest.approx(0.1 * moved[:, 0].mean().item(), abs=1e-5)
        assert runs[name]["rewards/rejected"] == pytest.approx(0.1 * moved[:, 1].mean().item(), abs=1e-5)
    assert runs["same"]["loss"] == pytest.approx(math.log(2), abs=1e-12)


def test_a_run_goes_on_with_its_own_reference(tiny, other, tmp_path):
    """Other weights in its place make it another run; the same ones elsewhere do not."""
    place = tmp_path / "reference"
    shutil.copytree(other, place)
    flags = (*STEP, "--gradient_accumulation_steps", "2", "--reference")
    whole = train(tiny, tmp_path / "run", *flags, place)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "finished"}))
    make_model(seed=2).save_pretrained(place)
    again = [ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
             "--output_dir", tmp_path / "run", "--draw", "false", *flags]
    refused = launch(*again, place, check=False, launcher="fork")
    assert refused.returncode == 2 and "holds a run with other settings (reference: " in refused.stderr
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert without_times(train(tiny, tmp_path / "run", *flags, other)) == without_times(whole)


def test_what_can_not_be_a_reference(tiny, other, tmp_path):
    """Another vocabulary, a shorter context, SFT, and nothing at all: a line each, and no folder."""
    swapped, short = tmp_path / "swapped", tmp_path / "short"
    for folder in (swapped, short):
        shutil.copytree(other, folder)
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["x"] = vocabulary["x"], vocabulary["e"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    for flags, words in (
            (("--reference", swapped), f"--reference {swapped}: has another vocabulary than --model_name: token"),
            (("--reference", short), "its context is 20 tokens"), (("--reference", tmp_path / "no"), "no such folder"),
            (("--reference", other, "--loss", "sft"), "has no meaning for --loss sft"),
            (("--ref_model", other), "--ref_model: it is --reference here")):
        done = launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                      "--output_dir", tmp_path / "run", *flags, check=False, launcher="fork")
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "run").exists()


def test_scored_rewards_are_those_of_training(tiny, other, tmp_path):
    """Where the reference is scored beside the run; without it they are missing, and a line says so."""
    lines = train(tiny, tmp_path / "run", *STEP, "--gradient_accumulation_steps", "2", "--reference", other,
                  "--eval_file_path", tiny / "train.jsonl")
    out = tmp_path / "scores"
    done = launch(ROOT / "score.py", tmp_path / "run", "--output_dir", out, launcher="fork")
    assert f"has no rewards, since its reference, {other}, was not scored" in done.stdout
    assert pandas.read_parquet(out / "pairs.parquet")["margin"].isna().all()
    launch(ROOT / "score.py", tmp_path / "run", other, "--output_dir", out, launcher="fork")
    found = pandas.read_parquet(out / "pairs.parquet").query("run == 'run'").groupby("step").mean(numeric_only=True)
    for line in (line for line in lines if "eval_loss" in line):
        for name in ("rewards/chosen", "rewards/rejected"):
            assert found.loc[line["step"], name] == pytest.approx(line[f"eval_{name}"], abs=1e-6)
