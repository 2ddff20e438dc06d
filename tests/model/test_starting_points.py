"""Where a run starts: another reference than its own start, and adapters as PEFT's LoraConfig describes them."""

import json
import math
import shutil
import warnings

import oracle
import pandas
import pytest
import torch
from conftest import ROOT, forked, launch, make_model, make_tokenizer, train, without_times, zero
from safetensors.torch import load_file, save_file

from nanodpo.data.schedule import pairs_of_step
from nanodpo.scoring.runs import open_targets

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
        assert f"reference: {reference}\n" in done.stdout
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
    """Another vocabulary, a shorter context, weights of NaN, SFT, and nothing at all: a line each, and no folder."""
    swapped, short, broken = tmp_path / "swapped", tmp_path / "short", tmp_path / "broken"
    for folder in (swapped, short, broken):
        shutil.copytree(other, folder)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["x"] = vocabulary["x"], vocabulary["e"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    for flags, words in (
            (("--reference", swapped), f"--reference {swapped}: has another vocabulary than --model_name: token"),
            (("--reference", broken), f"{broken}: its log-probs are not finite"),
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
    # With --bf16 a reference is stored in bfloat16 beside LoRA, and it rounds here as it did there.
    lines = train(tiny, tmp_path / "rounded", *STEP, "--gradient_accumulation_steps", "2", "--reference", other,
                  "--bf16", "--eval_file_path", tiny / "train.jsonl")
    launch(ROOT / "score.py", tmp_path / "rounded", other, "--output_dir", out, launcher="fork")
    found = pandas.read_parquet(out / "pairs.parquet").query("run == 'rounded' and step == 0")
    assert found["margin"].mean() == pytest.approx(lines[0]["eval_rewards/margins"], abs=1e-6)
    # A checkpoint of a run with other data is a reference, too: what that run held out does not matter here.
    (tmp_path / "few.jsonl").write_text("".join((tiny / "train.jsonl").read_text().splitlines(keepends=True)[:4]))
    train(tiny, tmp_path / "sft", *STEP, "--loss", "sft", "--train_file_path", tmp_path / "few.jsonl")
    train(tiny, tmp_path / "dpo", *STEP, "--reference", tmp_path / "sft" / "checkpoint-2", "--eval_size", "3")
    launch(ROOT / "score.py", tmp_path / "dpo", tmp_path / "sft" / "checkpoint-2", "--output_dir", tmp_path / "two",
           launcher="fork")
    found = pandas.read_parquet(tmp_path / "two" / "pairs.parquet").query("run == 'dpo' and step == 0")
    first = json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert found["margin"].mean() == pytest.approx(first["eval_rewards/margins"], abs=1e-6) and len(found) == 3
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["arguments"]["bf16"] = True
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    asked = open_targets([str(tmp_path / "run"), str(other), str(tiny / "model")])
    assert [c.settings.bf16 for c in asked if not c.phase] == [True, False], "a reference, in its run's precision"


# Adapters by a file

def test_a_reference_that_has_changed_is_refused(tiny, other, tmp_path):
    """By score.py beside its run, and by the run's ledger, which finds it by its name."""
    place, run = tmp_path / "reference", tmp_path / "run"
    shutil.copytree(other, place)
    train(tiny, run, *STEP, "--save_steps", "1", "--reference", place)
    config = json.loads((place / "config.json").read_text())
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"][0] += 2**-20
    save_file(weights, tmp_path / "other.safetensors", {"format": "pt"})
    for changed, content, flags, words in (
            ("config.json", json.dumps(config | {"rms_norm_eps": 2e-6}).encode(), (place,), "another config"),
            ("model.safetensors", (tmp_path / "other.safetensors").read_bytes(), ("--ledger", "2"), "other weights")):
        kept = (place / changed).read_bytes()
        (place / changed).write_bytes(content)
        done = launch(ROOT / "score.py", run, *flags, "--output_dir", tmp_path / "s", check=False, launcher="fork")
        assert done.returncode == 2 and (f"error: {place}: has {words} than when it was the --reference of {run}; put "
                                         "back what was there\n") in done.stderr, done.stderr
        (place / changed).write_bytes(kept)


SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"lora_bias": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"v_proj": 20}},
    "regex": {"target_modules": r".*\.(self_attn\.[qk]_proj|1\.mlp\.up_proj)"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": ["layers"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "init_lora_weights": "gaussian"},
    "rslora-dora": {"use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 2}},
}


def described(folder, name: str):
    """A file with the settings of this name, as YAML or JSON."""
    file = folder / f"{name}.{'yaml' if name == 'dora' else 'json'}"
    file.write_text(json.dumps(SETTINGS | ADAPTERS[name]))  # JSON is YAML
    return file


def run_with(tiny, output, *more, check=True):
    return launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                  "--output_dir", output, "--cache_dir", output.parent / "cache", "--draw", "false", "--learning_rate",
                  "1e-2", "--per_device_train_batch_size", "4", "--max_steps", "3", *more, check=check, launcher="fork")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_as_peft_has_it(name, tiny, tmp_path):
    """Three steps from ln 2; the same losses and gradients as an independent trainer around plain PEFT; and the
    checkpoint, opened in plain PEFT, gives the log-probs that score.py says."""
    from peft import LoraConfig, get_peft_model

    file = described(tmp_path, name)
    run_with(tiny, tmp_path / "run", "--peft_config", file)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-12) and lines[2]["rewards/margins"] != 0
    start = oracle.load(tmp_path / "run" / "checkpoint-0", tiny / "model")
    written = start.peft_config["default"]
    wanted = get_peft_model(oracle.load(tiny / "model"), LoraConfig(task_type="CAUSAL_LM", **SETTINGS | ADAPTERS[name]))
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} for model in (start, wanted)]
    assert shapes[0] == shapes[1] and written.use_rslora == bool(ADAPTERS[name].get("use_rslora"))
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    truth = oracle.train(start, pairs, [pairs_of_step(11, 4, 42, step) for step in range(3)], peak=1e-2)
    for line, exact in zip(lines, truth):
        assert {key: line[key] for key in exact} == pytest.approx(exact, rel=2e-4), line["step"]
    launch(ROOT / "score.py", tmp_path / "run", "--output_dir", tmp_path / "scores", launcher="fork")
    table = pandas.read_parquet(tmp_path / "scores" / "scores.parquet").query("step == 3")
    found = table.pivot(index="row", columns="response", values="logps").sort_index()
    end = sums(oracle.load(tmp_path / "run" / "checkpoint-3", tiny / "model").eval(), pairs)
    assert torch.allclose(torch.tensor(found[["chosen", "rejected"]].to_numpy()), end.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name, stage, more", [
    ("rslora-dora", 2, ("--gradient_checkpointing",)), ("rslora-dora", 0, ("--activation_memory", "0.0002")),
    ("biases", 3, ()), ("patterns", 3, ("--gradient_checkpointing",))])
def test_ranks_and_memory_change_no_adapter(name, stage, more, tiny, tmp_path):
    """Two ranks, sharded weights and layers that are computed again give the numbers of one rank without these."""
    file = described(tmp_path, name)
    run_with(tiny, tmp_path / "one", "--peft_config", file)
    launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir",
           tmp_path / "two", "--cache_dir", tmp_path / "other", "--draw", "false", "--learning_rate", "1e-2",
           "--per_device_train_batch_size", "2", "--max_steps", "3", "--peft_config", file, "--deepspeed",
           zero(tmp_path, stage), *more, ranks=2, launcher="fork")
    one, two = ([json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
                for run in ("one", "two"))
    for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-5), name


def test_the_scale_of_rank_stabilised_lora(tiny, tmp_path):
    """By hand: the adapter adds lora_alpha / sqrt(r) B A, 6 / 2 of it; plain LoRA would add 6 / 4. So a merged matrix
    is W + 3 B A."""
    run_with(tiny, tmp_path / "run", "--peft_config", described(tmp_path, "rslora"), "--merge_weights", "true")
    adapter = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny / "model", tmp_path / "run" / "merged"))
    layer = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(merged[f"{layer}.weight"], base[f"{layer}.weight"] + 3 * b @ a, atol=1e-6)
    assert (b @ a).abs().max() > 1e-4


def test_a_killed_run_with_dora_goes_on_to_the_bit(tiny, other, tmp_path):
    """Also its magnitudes, their moments, and another model's references."""
    file, runs = described(tmp_path, "rslora-dora"), {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        runs[name] = ["--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir",
                      tmp_path / name / "run", "--cache_dir", tmp_path / name / "cache", "--draw", "false",
                      "--peft_config", file, "--learning_rate", "1e-2", "--max_steps", "4", "--save_steps", "2",
                      "--reference", other, "--eval_size", "3",
                      "--per_device_train_batch_size", "2"]
    assert forked(ROOT / "train.py", *runs["whole"])[0] == [0]
    assert forked(ROOT / "tests" / "faulty.py", "kill@3:0", *runs["killed"])[0] == [137]
    file.write_text(json.dumps(SETTINGS | {"use_dora": True}))
    codes, said = forked(ROOT / "train.py", *runs["killed"])
    assert codes == [2] and "holds a run with other settings (peft_config.use_rslora: true -> null, " in said
    described(tmp_path, "rslora-dora")
    codes, said = forked(ROOT / "train.py", *runs["killed"])
    assert codes == [0] and "going on at step 2" in said
    one, other = (tmp_path / name / "run" for name in runs)
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert without_times(logs[0]) == without_times(logs[1])
    for file in one.glob("checkpoint-*/adapter_*"):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes(), file


@pytest.mark.parametrize("settings, flags, words", [
    ({"peft_type": "LOHA"}, (), "peft_type is LOHA; only LORA can be trained"),
    ({"task_type": "SEQ_CLS"}, (), "task_type is SEQ_CLS"),
    ({"use_rslra": True}, (), "LoraConfig has no use_rslra; did you mean use_rslora?"),
    ({"bias": "all"}, (), "bias trains the base's own biases"),
    ({"modules_to_save": ["lm_head"]}, (), "modules_to_save trains whole layers beside LoRA"),
    ({"trainable_token_indices": [1]}, (), "trainable_token_indices trains tokens' embeddings"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, (), "LoRA on embeddings (target_modules)"),
    ({"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]}, ("--merge_weights",),
     "trains LoRA on model.embed_tokens, whose weight is the output layer's, too"),
    ({"target_modules": ["q_proj", "w_proj"]}, (), "the model has no module w_proj"),
    ({"target_modules": "(q_proj"}, (), "which is no regular expression"),
    ({"target_modules": "none_such"}, (), "not found in the base model"),
    ({"rank_pattern": {"w_proj": 2}}, (), "rank_pattern has 'w_proj', which fits no layer"),
    ({"layers_to_transform": [0, 9], "target_modules": ["q_proj"]}, (), "layers_to_transform has 9, which is no layer"),
    ({"rank_pattern": {"q_proj": 0}}, (), "rank_pattern is {'q_proj': 0}; it must be"),
    ({"init_lora_weights": "pissa"}, (), "init_lora_weights is pissa; it must be true or"),
    ({"init_lora_weights": False}, (), "init_lora_weights is False; it must be true or"),
    ({"use_qalora": True}, (), "use_qalora is not one that nanodpo can train exactly"),
    ({"r": 4}, ("--lora_r", "8"), "--lora_r 8: --peft_config"),
    ({"lora_dropout": 0.1}, (), "add --allow_dropout"),
    ({"r": 4}, ("--use_lora", "false"), "has no meaning without LoRA"),
    ({"use_dora": True}, ("--bf16",), "which --bf16 rounds"),
    ({"use_dora": True}, ("--deepspeed", "zero3"), "stage 3 of ZeRO has not gathered them"),
    ({"lora_bias": True}, ("--merge_weights",), "lora_bias has no place to be merged into"),
    ([1], (), "expected settings like")])
def test_what_can_not_be_trained_exactly(settings, flags, words, tiny, tmp_path):
    """One line before anything is written."""
    (tmp_path / "peft.json").write_text(json.dumps(settings))
    flags = [zero(tmp_path, 3) if flag == "zero3" else flag for flag in flags]
    done = run_with(tiny, tmp_path / "run", "--peft_config", tmp_path / "peft.json", *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_adapters_that_are_trained_on_and_what_they_lack(tiny, tmp_path):
    """DoRA goes on as it is. One with a head beside LoRA is refused by what it has, and so is a file of settings."""
    from peft import LoraConfig, get_peft_model

    run_with(tiny, tmp_path / "run", "--peft_config", described(tmp_path, "rslora-dora"))
    last = tmp_path / "run" / "checkpoint-3"
    run_with(tiny, tmp_path / "on", "--model_name", last)
    line = json.loads((tmp_path / "on" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert line["logps/chosen"] != json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])[
        "logps/chosen"]
    refused = run_with(tiny, tmp_path / "no", "--model_name", last, "--peft_config", tmp_path / "rslora-dora.json",
                       check=False)
    assert refused.returncode == 2 and "is an adapter, which has settings of its own" in refused.stderr
    head = get_peft_model(oracle.load(tiny / "untied"), LoraConfig(r=2, target_modules=["q_proj"],
                                                                   modules_to_save=["lm_head"]))
    head.save_pretrained(tmp_path / "head")
    refused = run_with(tiny, tmp_path / "no", "--model_name", tmp_path / "head", check=False)
    assert refused.returncode == 2 and "its modules_to_save trains whole layers beside LoRA" in refused.stderr


@pytest.mark.parametrize("settings, words", [
    ({"modules_to_save": ["lm_head"]}, "changes the output layer"),
    ({"target_modules": ["q_proj", "lm_head"]}, "it is no LoRA weight (target_modules or modules_to_save name")])
def test_an_adapter_that_changes_the_output_layer(settings, words, tiny, tmp_path):
    """It is no model to score, nor a reference, until it is merged: a line says so."""
    from peft import LoraConfig, get_peft_model

    adapter = tmp_path / "adapter"
    get_peft_model(oracle.load(tiny / "untied"), LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings)
                   ).save_pretrained(adapter)
    make_tokenizer().save_pretrained(adapter)
    data = f"t={tiny / 'train.jsonl'}"
    for done in (launch(ROOT / "score.py", adapter, "--dataset_path", data, "--output_dir", tmp_path / "scores",
                        check=False, launcher="fork"),
                 run_with(tiny, tmp_path / "run", "--reference", adapter, check=False)):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"{adapter}: " in done.stderr and words in done.stderr and "merge the adapter" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "IA3Config"])
def test_an_adapter_outside_the_layers_is_not_left_out_without_a_word(kind, tiny, tmp_path):
    """PEFT's own forward pass puts learned states before a prompt, which the base's layers by themselves know nothing
    of: they would give the base's log-probs. IA3 is within the layers, and scored as PEFT has it."""
    import peft

    import score
    from nanodpo.errors import UserError

    within = {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    settings = within if kind == "IA3Config" else {"num_virtual_tokens": 4}
    torch.manual_seed(0)
    base = oracle.load(tiny / "model")
    base.name_or_path = str(tiny / "model")
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    command = [str(tmp_path / "adapter"), "--dataset_path", str(tiny / "train.jsonl"), "--responses", "chosen",
               "rejected", "--output_dir", str(tmp_path / "out")]
    if kind != "IA3Config":
        with pytest.raises(UserError, match="adapter, which puts states of its own before a prompt; only adapters "):
            score.main(command)
        return
    score.main(command)
    found = pandas.read_parquet(tmp_path / "out" / "scores.parquet").set_index(["row", "response"])["logps"]
    truth = sums(model, oracle.read_pairs(tiny / "train.jsonl"))
    for row, values in enumerate(truth.tolist()):
        assert [found[row, side] for side in ("chosen", "rejected")] == pytest.approx(values, abs=1e-4)


def test_an_adapter_of_another_kind_than_lora_is_a_reference(tiny, tmp_path):
    """LoHa has no lora_alpha, which the hash of a reference asked for: a traceback. Two with the same weights and other
    settings are two references, each with its own log-probs, which are kept apart."""
    from peft import LoHaConfig, get_peft_model

    pairs, means = oracle.read_pairs(tiny / "train.jsonl"), {}
    for alpha in (4, 16):
        torch.manual_seed(0)
        base = oracle.load(tiny / "model")
        base.name_or_path = str(tiny / "model")
        model = get_peft_model(base, LoHaConfig(r=4, alpha=alpha, target_modules=["q_proj", "v_proj"])).eval()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / f"loha-{alpha}")
        run_with(tiny, tmp_path / f"run-{alpha}", "--reference", tmp_path / f"loha-{alpha}", "--max_steps", "1")
        line = json.loads((tmp_path / f"run-{alpha}" / "metrics.jsonl").read_text().splitlines()[0])
        means[alpha] = sums(model, [pairs[i] for i in pairs_of_step(11, 4, 42, 0)]).mean(0).tolist()
        assert [line["ref_logps/chosen"], line["ref_logps/rejected"]] == pytest.approx(means[alpha], abs=1e-4)
    assert abs(means[4][0] - means[16][0]) > 0.01


@pytest.mark.parametrize("settings, words", [
    ({"alora_invocation_tokens": "It"}, "is turned on by certain tokens of a text (alora_invocation_tokens)"),
    ({"init_lora_weights": "pissa_niter_4"}, "has other log-probs each time: its init_lora_weights is 'pissa_niter")])
def test_lora_that_is_not_the_layers_alone(settings, words, tiny, tmp_path):
    """Activated LoRA begins at tokens that PEFT's own forward pass looks for: without it the base's log-probs came out.
    A quick PiSSA takes another part out of the base whenever PEFT opens it. Neither is scored, nor a reference."""
    from peft import LoraConfig, PeftModel, get_peft_model

    adapter = tmp_path / "adapter"
    base = oracle.load(tiny / "model")
    base.name_or_path = str(tiny / "model")
    if text := settings.get("alora_invocation_tokens"):
        settings = {"alora_invocation_tokens": make_tokenizer().encode(text)}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
                                            **settings)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(adapter)
    make_tokenizer().save_pretrained(adapter)
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    again = [sums(PeftModel.from_pretrained(oracle.load(tiny / "model"), adapter).eval(), pairs) for _ in range(2)]
    assert torch.equal(*again) is bool(text)
    if text:  # "It" begins every chosen response, and no rejected one
        moved = (again[0] - sums(oracle.load(tiny / "model").eval(), pairs)).abs()
        assert moved[:, 0].min() > 0.01 and moved[:, 1].max() == 0
    for done in (launch(ROOT / "score.py", adapter, "--dataset_path", f"t={tiny / 'train.jsonl'}", "--output_dir",
                        tmp_path / "scores", check=False, launcher="fork"),
                 run_with(tiny, tmp_path / "run", "--reference", adapter, check=False)):
        assert done.returncode == 2 and "Traceback" not in done.stderr and f"{adapter}: {words}" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, words", [
    ({"init_lora_weights": "pissa"}, "its init_lora_weights is 'pissa', by which PEFT changes the base"),
    ({"init_lora_weights": "olora"}, "its init_lora_weights is 'olora', by which PEFT changes the base"),
    ({"init_lora_weights": "mica"}, "its init_lora_weights is 'mica', by which PEFT changes the base, or freezes"),
    ({"velora_config": {}}, "its velora_config is not one that nanodpo can train exactly"),
    ({"init_lora_weights": "orthogonal"}, "")])
def test_lora_that_is_trained_on_is_what_may_be_asked_for(settings, words, tiny, tmp_path):
    """PiSSA's base without its adapter is not its base, so the reference was another model; of MiCA and VeLoRA a part
    of the adapter was not in the checkpoints. Refused before a weight is read. A start that leaves the base as it is
    goes on from there."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import VeloraConfig

    if "velora_config" in settings:
        settings = {"velora_config": VeloraConfig()}
    base = oracle.load(tiny / "model")
    base.name_or_path = str(tiny / "model")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings))
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    done = run_with(tiny, tmp_path / "run", "--model_name", tmp_path / "adapter", "--reference", tiny / "model",
                    check=not words)
    if words:
        assert done.returncode == 2 and f"--model_name {tmp_path / 'adapter'}: {words}" in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
        return
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    moved = (sums(model.eval(), pairs) - sums(oracle.load(tiny / "model").eval(), pairs)).double()
    of_step = pairs_of_step(11, 4, 42, 0)
    assert first["rewards/chosen"] == pytest.approx(0.1 * moved[of_step, 0].mean().item(), abs=1e-5)


def test_an_adapter_that_looks_at_the_whole_batch_is_named(tiny, tmp_path):
    """Lily mixes its matrices by the mean over all tokens that it sees, so a text's log-probs depend on those beside
    it. The reason is not the base's output layer, of which the message spoke."""
    from peft import LilyConfig, get_peft_model

    torch.manual_seed(0)
    base = oracle.load(tiny / "model")
    base.name_or_path = str(tiny / "model")
    model = get_peft_model(base, LilyConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    done = launch(ROOT / "score.py", tmp_path / "adapter", "--dataset_path", f"t={tiny / 'train.jsonl'}",
                  "--output_dir", tmp_path / "scores", check=False, launcher="fork")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{tiny / 'model'} with its LILY adapter: can't be scored: batches of texts do not get" in done.stderr


def test_biases_without_a_place_are_not_merged_in_the_end_either(tiny, tmp_path):
    """The adapter of a run that has ended, and one that is trained on, were found out by PEFT alone, after training."""
    flags = "--peft_config", described(tmp_path, "biases")
    run_with(tiny, tmp_path / "run", *flags)
    last = tmp_path / "run" / "checkpoint-3"
    for whose, asked in ((str(last), (tmp_path / "run", *flags)),
                         (f"the adapter {last}", (tmp_path / "on", "--model_name", last))):
        done = run_with(tiny, *asked, "--merge_weights", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert f"{whose}: lora_bias has no place to be merged into, since model.layers.0.self_attn.q_proj has no" in (
            done.stderr)
    assert not (tmp_path / "on").exists() and not (tmp_path / "run" / "merged").exists()


def test_no_alarm_over_biases(tiny, tmp_path):
    """PEFT says of every bias of lora_B that its matrix was cut, whenever an adapter is opened or saved."""
    from peft import LoraConfig, get_peft_model

    from nanodpo.folder.checkpoint import gather, save
    from nanodpo.model.adapters import add_adapter, open_base

    with pytest.warns(UserWarning, match="Adapter 'default': 4 LoRA .*have invalid shape"):
        get_peft_model(oracle.load(tiny / "model"), LoraConfig(target_modules=["q_proj", "v_proj"], lora_bias=True)
                       ).save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Adapter 'default'")
        model = add_adapter(open_base(str(tiny / "model"), torch.float32, False), str(tmp_path / "adapter"), True)
        save(model, make_tokenizer(), gather(model, True), tmp_path / "again", {})
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
