"""Whole runs of train.py against an independent trainer: what a run computes, and what it leaves."""

import hashlib
import json
import math
import re
import shutil
import subprocess

import oracle
import pandas
import pytest
import torch
from conftest import ROOT, launch, make_model, make_tokenizer, train, zero
from safetensors.torch import load_file, save_file
from tiny_models import tiny as make_family

from nanodpo.data.schedule import pairs_of_step

pytestmark = pytest.mark.slow
LORA = ("--learning_rate", "1e-3", "--lora_r", "4", "--num_train_epochs", "1")
FULL = ("--learning_rate", "1e-3", "--use_lora", "false", "--num_train_epochs", "1")
MICRO4, ACCUMULATE4, RANKS2 = (
    ("--per_device_train_batch_size", "4"),
    ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"),
    ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"))
WINDOWS = [pairs_of_step(11, 4, 42, step) for step in range(3)]  # 4 + 4 + 3 of the 11 pairs
# name: flags, ZeRO stage, ranks
RUNS = {
    "micro": ((*LORA, *MICRO4), 0, 1),
    "accumulate": ((*LORA, *ACCUMULATE4), 2, 1),
    "ranks": ((*LORA, *RANKS2), 0, 2),
    "ranks-zero1": ((*LORA, *RANKS2), 1, 2),
    "ranks-zero2": ((*LORA, *RANKS2), 2, 2),
    "ranks-zero3": ((*LORA, *RANKS2, "--gradient_checkpointing"), 3, 2),
    "by-need": ((*LORA, *ACCUMULATE4, "--activation_memory", "0.0002"), 2, 1),  # rows of all kinds
    "full-tied": ((*FULL, *MICRO4), 2, 1),
    "full-tied-checkpointing": ((*FULL, *MICRO4, "--gradient_checkpointing"), 0, 1),
    "full-tied-zero3": ((*FULL, *RANKS2, "--gradient_checkpointing"), 3, 2),
    "full-untied-zero3": ((*FULL, *RANKS2), 3, 2),
}


def test_a_checkpoint_after_an_evaluation_under_zero3(tmp_path):
    """An evaluation has no backward pass, whose weights ZeRO-3 fetched ahead where the model is larger than what it
    fetches at a time: they must be put away before a checkpoint is gathered."""
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 5000,
                "stage3_max_reuse_distance": 1, "stage3_max_live_parameters": 10**8}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": settings}))
    pandas.read_parquet(ROOT / "examples" / "piles" / "train.parquet")[:20].to_parquet(tmp_path / "few.parquet")
    launch(ROOT / "train.py", ROOT / "examples" / "dpo.yaml", "--deepspeed", tmp_path / "zero3.json", "--max_steps",
           "2", "--gradient_checkpointing", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1",
           "--draw", "false", "--eval_steps", "0", "--save_steps", "0", "--resume_steps", "1", "--eval_size", "2",
           "--eval_file_path", "", "--train_file_path", tmp_path / "few.parquet", "--cache_dir", tmp_path / "cache",
           "--output_dir", tmp_path / "run", ranks=2, launcher="fork")
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Each run of RUNS, made when first asked for: (folder, lines of metrics.jsonl)."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(name):
        if name not in made:
            flags, stage, ranks = RUNS[name]
            model = "untied" if "untied" in name else "model"
            # References of each run are its own: a cache would hide a wrong one.
            lines = train(tiny, folder / name / "run", *flags, "--deepspeed", zero(tiny, stage), ranks=ranks,
                          model=model)
            made[name] = folder / name / "run", lines
        return made[name]

    return get


def weights(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", RUNS)
def test_equals_an_independent_trainer(name, runs, tiny):
    """Losses, norms, log-probs and weights of plain full-logits DPO, however the
    step is cut, sharded and checkpointed; the last window is uneven."""
    folder, lines = runs(name)
    base = tiny / ("untied" if "untied" in name else "model")
    model = oracle.load(base) if "full" in name else oracle.load(folder / "checkpoint-0", base)
    expected = oracle.train(model, oracle.read_pairs(tiny / "train.jsonl"), WINDOWS)
    assert len(lines) == 3
    for line, truth in zip(lines, expected):
        for key, value in truth.items():
            assert line[key] == pytest.approx(value, rel=1e-5), (line["step"], key)
    saved, start = weights(folder / "checkpoint-3"), weights(folder / "checkpoint-0")
    trained = {key.replace(".default.", "."): p for key, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys()
    for key, value in trained.items():
        # Adam divides by the gradient's size, so weights with almost none are the loosest.
        moved = (value - start[key]).norm()
        assert (saved[key] - value).norm() <= 1e-4 * moved + 1e-7, key


@pytest.mark.parametrize("name", ["accumulate", "ranks", "ranks-zero1", "ranks-zero2", "ranks-zero3"])
def test_the_cut_of_a_step_changes_nothing(name, runs):
    """Micro 4 x 1 x 1 rank = 1 x 4 x 1 = 1 x 2 x 2 in loss, grad norm and weights to 1e-6."""
    (one, first), (other, second) = runs("micro"), runs(name)
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "rewards/accuracies"):
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=1e-6), (a["step"], key)
    after, same = weights(one / "checkpoint-3"), weights(other / "checkpoint-3")
    for key in after:
        assert (after[key] - same[key]).abs().max() <= 2e-6, key


def test_step_0_is_ln_2(runs):
    """A fresh LoRA is its reference, bit for bit."""
    for name in ("micro", "ranks-zero3", "full-tied"):
        line = runs(name)[1][0]
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-12)
        assert line["rewards/chosen"] == line["rewards/rejected"] == line["rewards/margins"] == 0.0
        assert line["rewards/ties"] == 1.0 and line["rewards/accuracies"] == 0.0


def test_an_adapter_of_zero3_opens_in_plain_peft(tiny, tmp_path):
    """Saved by two ranks under ZeRO-3, opened by PEFT on CPU, it gives the live model's log-probs, and so
    does merged/, which generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = train(tiny, tmp_path / "run", *LORA, *RANKS2, "--deepspeed", zero(tiny, 3), "--merge_weights",
                  "--eval_file_path", tiny / "train.jsonl", ranks=2)
    live = [line for line in lines if "eval_loss" in line][-1]
    assert live["step"] == 3
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    adapter = oracle.load(tmp_path / "run" / "checkpoint-3", tiny / "model").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    for model in (adapter, merged):
        with torch.no_grad():
            mean = sum(oracle.sequence_logp(model, p, chosen).item() for p, chosen, _ in pairs) / len(pairs)
        assert live["eval_logps/chosen"] == pytest.approx(mean, rel=1e-6)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight  # still tied
    prompt = AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")("What is 1+1? ", return_tensors="pt")
    assert merged.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt.input_ids.shape[1] + 3


def test_sft_is_the_mean_over_all_tokens(tiny, tmp_path):
    """SFT weighs every token of a step the same, over uneven micro-batches and ranks, and evaluates both sides."""
    lines = train(tiny, tmp_path / "run", *FULL, *RANKS2, "--loss", "sft", "--eval_file_path", tiny / "train.jsonl",
                  ranks=2)
    model = oracle.load(tiny / "model")
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    expected = oracle.train(model, pairs, WINDOWS, loss="sft")
    steps = [line for line in lines if "loss" in line]
    for line, truth in zip(steps, expected, strict=True):
        for key, value in truth.items():
            assert line[key] == pytest.approx(value, rel=1e-5), (line["step"], key)
    with torch.no_grad():
        rejected = [oracle.sequence_logp(model, p, r).item() / len(r) for p, _, r in pairs]
    last = [line for line in lines if "eval_loss" in line][-1]
    assert last["eval_logps_per_token/rejected"] == pytest.approx(sum(rejected) / len(pairs), rel=1e-4)


TALK = [("What is 2+2? ", "It is 4."), ("Sure?", "Yes, I am."), ("Why?", "I counted.")]  # questions and answers


@pytest.mark.parametrize("which", ["all", "last"])
def test_the_answers_of_a_conversation_are_scored_and_what_is_said_between_them_is_not(which, tiny, tmp_path):
    """The first step's loss is the mean over the tokens of all answers (or the last) of all rows, each with its end of
    turn, by a loop over the logits in float64; two of one micro-batch and one alone. What score.py scores of it is the
    last answer."""
    rows = [[{"role": role, "content": text} for pair in TALK[:n] for role, text in zip(("user", "assistant"), pair)]
            for n in (3, 1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    line, *_ = train(tiny, tmp_path / "run", "--loss", "sft", "--use_lora", "false", "--train_on", which, "--max_steps",
                     "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
                     "--train_file_path", tmp_path / "rows.jsonl")
    tokenizer, model = make_tokenizer(), make_model().double()
    lost, last = [], []
    for row in rows:
        ids = tokenizer.apply_chat_template(row, return_dict=False)
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        starts = [i + 11 for i in range(len(ids)) if tokenizer.decode(ids[i : i + 11]) == "<|im_start|>assistant\n"]
        turns = [[-logps[i - 1, ids[i]].item() for i in range(start, ids.index(258, start) + 1)] for start in starts]
        lost += [value for turn in (turns if which == "all" else turns[-1:]) for value in turn]
        last.append(-sum(turns[-1]))
    assert line["loss"] == pytest.approx(sum(lost) / len(lost), abs=2e-6)
    assert len(lost) == {"all": 3 * 9 + 2 * 11 + 11, "last": 11 + 9 + 11}[which]
    launch(ROOT / "score.py", tmp_path / "run", "--responses", "chosen", launcher="fork")
    scored = pandas.read_parquet(tmp_path / "run" / "scores.parquet").query("step == 0").sort_values("row")
    assert scored.logps.tolist() == pytest.approx(last, abs=1e-4)


def test_a_base_model_takes_a_template_from_a_file_and_what_it_is_given_besides(tiny, tmp_path):
    """examples/plain.jinja, and one that is told how to open; score.py reads alike, without being told."""
    rows = [{"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny / "model", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    plain = (ROOT / "examples" / "plain.jinja").read_text()
    (tmp_path / "own.jinja").write_text("{{ how }}: " + plain)
    flags = ["--loss", "sft", "--train_file_path", tmp_path / "rows.jsonl", "--model_name", tmp_path / "base"]
    done = launch(ROOT / "train.py", *flags, "--inspect", launcher="fork", check=False)
    assert done.returncode == 2 and "give one with --chat_template, such as examples/plain.jinja" in done.stdout
    done = launch(ROOT / "train.py", *flags, "--inspect", "--chat_template", ROOT / "examples/plain.jinja",
                  launcher="fork")
    assert "User: 2?\n\nAssistant:[ ][4][<|im_end|>]\n" in done.stdout
    own = ["--chat_template", tmp_path / "own.jinja", "--chat_template_kwargs", '{"how": "Aloud"}']
    train(tiny, tmp_path / "run", *flags, *own, "--max_steps", "1")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["prompt_leads"] == ["Aloud:"]
    done = launch(ROOT / "train.py", *flags, *own, "--max_steps", "1", "--output_dir", tmp_path / "run",
                  "--cache_dir", tmp_path / "cache", "--draw", "false", launcher="fork")
    assert "this run is finished" in done.stdout
    launch(ROOT / "score.py", tmp_path / "run", "--responses", "chosen", launcher="fork")
    other = launch(ROOT / "score.py", tmp_path / "run", "--responses", "chosen", "--chat_template_kwargs",
                   '{"how": "Low"}', launcher="fork", check=False)
    assert other.returncode == 2 and "a prompt opens with 'Low:'" in other.stdout


def test_dpo_on_an_sft_adapter_keeps_it_as_reference(tiny, tmp_path):
    """The reference of a run that starts from an adapter is that adapter, not the bare model."""
    train(tiny, tmp_path / "sft", *LORA, *MICRO4, "--loss", "sft")
    start = tmp_path / "sft" / "checkpoint-3"
    done = launch(ROOT / "train.py", "--model_name", start, "--train_file_path", tiny / "train.jsonl", "--output_dir",
                  tmp_path / "dpo", "--cache_dir", tmp_path / "cache", *MICRO4, "--max_steps", "2", launcher="fork")
    said = " ".join(done.stdout.split())
    assert "LoRA on" in said and f"reference: {start}, as the run begins with it reference: 8 pairs computed" in said
    first, second = map(json.loads, (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-12)
    pairs, model = oracle.read_pairs(tiny / "train.jsonl"), oracle.load(start, tiny / "model").eval()
    with torch.no_grad():
        truth = sum(oracle.sequence_logp(model, *pairs[i][:2]).item() for i in WINDOWS[0]) / 4
    assert first["ref_logps/chosen"] == pytest.approx(truth, rel=1e-6)
    assert second["rewards/margins"] != 0


def test_reference_is_cached_and_a_stale_one_is_not_used(tiny, tmp_path):
    """The same run reads the cache, a longer one computes what is new; other weights do not, and it says why."""
    again = [ROOT / "train.py", "--train_file_path", tiny / "train.jsonl", "--cache_dir", tmp_path / "cache", *MICRO4]
    from conftest import make_model, make_tokenizer

    start = tmp_path / "start"
    make_model().save_pretrained(start)
    make_tokenizer().save_pretrained(start)
    outputs = []
    for i, (seed, steps) in enumerate(((0, 1), (0, 3), (1, 1))):
        make_model(seed).save_pretrained(start)
        outputs.append(launch(*again, "--max_steps", steps, "--model_name", start, "--output_dir",
                              tmp_path / str(i), launcher="fork").stdout)
    assert f"reference: {start}, without the new adapter\nreference: 4 pairs computed, 0 from the cache" in outputs[0]
    assert "reference: 7 pairs computed, 4 from the cache" in outputs[1]
    assert "the cached one is of other weights, " in outputs[2] and "4 pairs computed, 0 from" in outputs[2]


def test_a_run_that_does_not_start_at_its_reference_stops(tiny, tmp_path):
    """References of the wrong pairs, right in their mean, end the run before the first update, with likely
    causes."""
    run = [ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--cache_dir",
           tmp_path / "cache", "--max_steps", "1", *MICRO4]
    launch(*run, "--output_dir", tmp_path / "good", launcher="fork")
    (cache,) = (tmp_path / "cache").glob("reference-*.safetensors")
    from safetensors import safe_open

    with safe_open(cache, "pt") as file:
        metadata = file.metadata()
    logps = load_file(cache)["logps"]
    logps[WINDOWS[0]] = logps[WINDOWS[0]].roll(1, 0)
    save_file({"logps": logps}, cache, metadata | {"sha256": hashlib.sha256(logps.numpy().tobytes()).hexdigest()})
    done = launch(*run, "--output_dir", tmp_path / "bad", check=False, launcher="fork")
    assert done.returncode == 1
    assert "error: step 0: policy and reference should be equal" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()


def test_reference_after_training_equals_the_cache(tiny, tmp_path):
    """After five steps under ZeRO-3 on two ranks the adapter-free model still gives the cached numbers."""
    launch(ROOT / "tests" / "reference_again.py", "--model_name", tiny / "model", "--train_file_path",
           tiny / "train.jsonl", "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", *LORA, *RANKS2,
           "--max_steps", "5", "--deepspeed", zero(tiny, 3), ranks=2, launcher="fork")
    assert json.loads((tmp_path / "run" / "again.json").read_text()) == {"largest_difference": 0.0, "moved": True}


def test_what_a_run_leaves(tiny, tmp_path):
    """run.json with commit, device and data, metrics with TRL's names, checkpoint-0 and the rotation, dropped rows with
    their reason, cut ones."""
    more = [{"prompt": "Empty? ", "chosen": " ", "rejected": "x"},
            {"prompt": "Long? ", "chosen": "a" * 90, "rejected": "b"}]
    rows = (tiny / "train.jsonl").read_text() + "".join(json.dumps(row) + "\n" for row in more)
    (tmp_path / "data.jsonl").write_text(rows)
    done = launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tmp_path / "data.jsonl",
                  "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", *LORA, "--max_steps", "5",
                  "--save_steps", "1", "--save_total_limit", "2", "--eval_size", "3", "--eval_steps", "2",
                  "--on_bad_row", "drop", "--bf16", "--max_length", "80", "--overlong", "truncate", launcher="fork")
    run = tmp_path / "run"
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-4", "checkpoint-5"]
    assert json.loads((run / "dropped_rows.jsonl").read_text()) == {
        "file": str(tmp_path / "data.jsonl"), "row": 11, "reason": "chosen is empty"}
    assert json.loads((run / "cut_rows.jsonl").read_text()) == {
        "file": str(tmp_path / "data.jsonl"), "row": 12, "answer_numbers": [0, 0], "cut": ["chosen"]}
    record = json.loads((run / "run.json").read_text())
    assert record["arguments"]["lora_r"] == 4 and record["versions"]["torch"] == torch.__version__
    assert record["steps"] == 5 and record["layout"] == "packed" and "train.py" in record["command"]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert record["git_commit"] == (commit or None) and record["device"] == "cpu"
    assert [len(data) for data in record["data"]] == [64, 64]  # sha256 of what is trained on, and of what is held out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, evals = ([x for x in lines if key in x] for key in ("loss", "eval_loss"))
    assert [x["step"] for x in steps] == [0, 1, 2, 3, 4] and [x["step"] for x in evals] == [0, 2, 4, 5]
    assert {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "rewards/chosen", "rewards/rejected",
            "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "logps_per_token/chosen",
            "logps_per_token/rejected", "perf/tokens_per_second", "mem/peak_gib"} <= steps[0].keys()
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)  # in bfloat16 too
    assert evals[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert not list(run.glob(".*")), "nothing half-written"
    assert "Warning" not in done.stderr and "WARNING" not in done.stdout, "noise"


def test_numbers_that_are_not_finite_stop_the_run(tiny, tmp_path):
    """Weights beyond float32 after step 0 end step 1 before its update, on all ranks, with the rows named."""
    done = launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                  "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", *MICRO4, "--max_steps", "3",
                  "--learning_rate", "1e38", ranks=2, check=False, launcher="fork")
    assert done.returncode != 0 and "Traceback (most recent call last):\n  File \"" + str(ROOT) not in done.stderr
    assert "error: step 1: " in done.stderr and "not finite" in done.stderr and "no update was made" in done.stderr
    assert "row " in done.stderr and " tokens)" in done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0]


def test_bfloat16_is_close_to_float32_under_every_stage(tiny, tmp_path):
    """Trained weights are float32, and a CPU multiplies in it: 3 steps of 11 accumulated micro-batches are
    those in float32 of a base that bfloat16 holds exactly, under the stage that was asked for."""
    make_model(dtype=torch.bfloat16).save_pretrained(tiny / "rounded")
    make_tokenizer().save_pretrained(tiny / "rounded")
    flags = (*LORA[:4], "--gradient_accumulation_steps", "11", "--max_steps", "3")
    truth = train(tiny, tmp_path / "float32", *flags, model="rounded")
    assert "noise" not in json.loads((tmp_path / "float32" / "run.json").read_text())
    for stage in (0, 1, 2, 3):
        lines = train(tiny, tmp_path / str(stage), *flags, "--bf16", "--deepspeed", zero(tiny, stage), model="rounded")
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)
        settings = json.loads((tmp_path / str(stage) / "run.json").read_text())["deepspeed"]
        assert settings["zero_optimization"]["stage"] == stage
        for name in ("loss", "rewards/margins", "grad_norm", "logps/chosen"):
            found, exact = ([line[name] for line in run] for run in (lines, truth))
            assert found == pytest.approx(exact, rel=2e-5, abs=1e-6), (stage, name)


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_are_summed_in_float32(stage, tiny, tmp_path):
    """In bfloat16 too, two ranks are two micro-batches of one rank: halving is exact there, so all numbers are
    the same but for the order of the norm's terms. Summed in bfloat16 the first norm would be off by 2e-4."""
    flags = (*LORA[:4], "--max_steps", "3", "--bf16", "--deepspeed", zero(tiny, stage))
    one = train(tiny, tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")
    two = train(tiny, tmp_path / "two", *flags, ranks=2)
    for name in ("loss", "grad_norm", "logps/chosen"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-6), name


def test_an_adapter_keeps_its_own_settings(tiny, tmp_path):
    """Flags that contradict the adapter trained on are refused, and run.json has the adapter's."""
    train(tiny, tmp_path / "sft", *LORA, "--loss", "sft", "--max_steps", "1")
    run = [ROOT / "train.py", "--model_name", tmp_path / "sft" / "checkpoint-1", "--train_file_path",
           tiny / "train.jsonl", "--cache_dir", tmp_path / "cache", "--max_steps", "1"]
    done = launch(*run, "--output_dir", tmp_path / "no", "--lora_r", "8", check=False, launcher="fork")
    assert done.returncode == 2 and "--lora_r 8: the adapter" in done.stderr and "has 4" in done.stderr
    assert not (tmp_path / "no").exists()
    launch(*run, "--output_dir", tmp_path / "yes", launcher="fork")
    assert json.loads((tmp_path / "yes" / "run.json").read_text())["arguments"]["lora_r"] == 4


def test_offloaded_optimizer_gives_the_same_run(tiny, tmp_path):
    """DeepSpeed's CPU offload works with the same AdamW, without compiling an optimizer of its own."""
    file = tmp_path / "offload.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    lines = [train(tiny, tmp_path / name, *LORA, *MICRO4, "--deepspeed", settings)
             for name, settings in (("on", file), ("off", zero(tiny, 2)))]
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"])


def test_settings_that_deepspeed_knows_are_taken(tiny, tmp_path):
    """All names of the blocks that it does not check itself, as its documentation has them. Blocks that it reads for
    what train.py never asks it to do are named."""
    (tmp_path / "ds.json").write_text(json.dumps({
        "activation_checkpointing": {
            "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
            "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False},
        "aio": {"block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False,
                "overlap_events": True, "use_gds": False},
        "checkpoint": {"tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False,
                       "parallel_write": {"pipeline_stage": False}},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32", "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "timers": {"throughput": {"enabled": False, "synchronized": True}},
        "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True,
                           "output_file": None, "recompute_fwd_factor": 0.0}}))
    said = launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                  "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--draw", "false",
                  "--deepspeed", tmp_path / "ds.json", "--max_steps", "1", launcher="fork").stdout
    assert (f"{tmp_path / 'ds.json'}: no effect here: activation_checkpointing, aio, checkpoint; use "
            "--gradient_checkpointing\n") in said
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


WATCHED = """import sys, weakref
import train
from nanodpo.run import lifecycle

make, merge, seen = train.make_engine, lifecycle.merge, []

def made(*given):
    found = make(*given)
    seen.extend([weakref.ref(found[0]), *map(weakref.ref, found[0].module.parameters())])
    return found

def merged(*given):
    print("alive:", sum(one() is not None for one in seen), "of", len(seen))
    merge(*given)

train.make_engine, lifecycle.merge = made, merged
train.exit_process(train.run_script(train.main))
"""


@pytest.mark.parametrize("stage", [0, 2])
def test_the_engine_is_gone_when_the_adapter_is_merged(stage, tiny, tmp_path):
    """A quantised base is opened on the GPU again, where both may not fit."""
    (tmp_path / "watched.py").write_text(WATCHED)
    said = launch(tmp_path / "watched.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                  "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--draw", "false", "--max_steps",
                  "1", "--learning_rate", "1e-2", "--merge_weights", "--deepspeed", zero(tmp_path, stage),
                  launcher="fork").stdout
    alive, of = re.search(r"alive: (\d+) of (\d+)", said).groups()
    assert int(alive) == 0 and int(of) > 20 and (tmp_path / "run" / "merged").is_dir()


def test_flags_without_effect_are_named(tiny, tmp_path):
    """Those of LoRA without LoRA, epochs where the number of steps is given, what keeps states where none is saved, and
    more steps than there are: after one of four steps of warm-up the rate is a quarter."""
    said = launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                  "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--draw", "false", "--max_steps",
                  "1", "--use_lora", "false", "--lora_alpha", "99", "--num_train_epochs", "3", "--keep_states",
                  "--warmup_steps", "4", "--eval_size", "1", "--eval_steps", "2", launcher="fork").stdout
    assert "--warmup_steps 4: more than the run has; it ends at 25% of --learning_rate\n" in said
    assert "--eval_steps 2: more than the run has, so it has no effect\n" in said
    assert "no effect without LoRA: --lora_alpha 99\n" in said
    assert "--keep_states: no effect without --save_steps or --resume_steps, which save states\n" in said
    assert "--num_train_epochs 3: no effect beside --max_steps 1\n" in said


def test_rows_left_out_that_a_run_does_not_visit_are_named(tiny, tmp_path):
    """Two steps of one pair visit two rows: to leave out others changes nothing, and may look like an answer."""
    seen = pairs_of_step(11, 1, 42, 0) + pairs_of_step(11, 1, 42, 1)
    others = sorted({*range(11)} - {*seen})[:2]
    for rows, named in (([seen[0], *others], ", ".join(map(str, others))), (seen[:1], None)):
        said = launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                      "--output_dir", tmp_path / str(len(rows)), "--cache_dir", tmp_path / "cache", "--draw", "false",
                      "--max_steps", "2", "--without_rows", ",".join(map(str, rows)), launcher="fork").stdout
        line = f"--without_rows: row {named}: not among those that the 2 steps of this run"
        assert (line in said) == bool(named) and ("--without_rows: row" in said) == bool(named)


@pytest.mark.parametrize("family, settings, kept", [
    ("cohere", {"use_qk_norm": True}, {"q_norm.weight", "k_norm.weight"}),
    ("gpt_oss", {}, {"gate_up_proj_bias", "down_proj_bias"})])
@pytest.mark.parametrize("stage", [0, 3])
def test_weight_decay_shrinks_matrices_and_no_norms_or_biases(stage, family, settings, kept, tiny, tmp_path):
    """Also where these are stacked, and so are matrices by their shape. A step whose rows have the weight 0 has no
    gradient, and its update is the decay alone: 1 - learning rate times --weight_decay."""
    model = make_family(family, torch.float32, 0.1, vocab_size=264, pad_token_id=256, eos_token_id=258, **settings)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    last = pairs_of_step(11, 1, 42, 10)[0]
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps(row | {"weight": float(i == last)}) + "\n" for i, row in enumerate(rows)))
    train(tiny, tmp_path / "run", "--model_name", tmp_path / "base", "--train_file_path", tmp_path / "rows.jsonl",
          "--use_lora", "false", "--learning_rate", "0.01", "--weight_decay", "5", "--max_steps", "1", "--deepspeed",
          zero(tmp_path, stage))
    before, after = (weights(tmp_path / "run" / f"checkpoint-{k}") for k in (0, 1))
    for name, value in before.items():
        still = value.ndim < 2 or any(name.endswith(f".{end}") for end in kept)
        torch.testing.assert_close(after[name], value * (1.0 if still else 0.95), rtol=1e-6, atol=0, msg=name)
    assert {name.split("self_attn.")[-1].split("experts.")[-1] for name, p in before.items() if p.ndim > 1} > kept
