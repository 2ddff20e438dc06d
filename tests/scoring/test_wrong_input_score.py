"""score.py on malformed input: runs, checkpoints, data, flags. A case a line. (What an earlier call left:
tests/scoring/test_parts.py.)"""

import json
import shutil

import pytest
import torch
from malformed import (
    BYTES,
    broken,
    changed_weights,
    copied,
    cut,
    edited,
    flipped,
    listed,
    nothing,
    nothing_changed,
    refused,
    written,
)
from test_wrong_input_train import JSONS, good, jsonl  # noqa: F401 (a fixture)

import score
from nanodpo.scoring.recorded import BARE_MODEL

ROWS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "no"} for i in range(3)]
RUN, LAST, DATA = ["@/run"], ["@/run/checkpoint-3"], ["--dataset_path=@/rows.jsonl"]
WRITES, NO_JSON = "@/run/run.json: is not what train.py writes", "@/run/run.json: can't be read as JSON"


def setting(**values):
    return edited("run/run.json", **{f"arguments__{name}": value for name, value in values.items()})


RUNS = [(f"run.json {how}", broken("run/run.json", change), RUN, [NO_JSON]) for how, change in BYTES.items()]
RUNS += [(f"run.json is {what}", written("run/run.json", text), RUN, [NO_JSON if what == "too deep" else WRITES])
         for what, text in JSONS.items()]
RUNS += [(f"run.json: {name} is {value}", edited("run/run.json", **{name: value}), RUN, [WRITES, words])
         for name, value, words in [
    ("arguments", 3, ""), ("arguments", [], ""), ("arguments", None, ""), ("arguments", ..., "KeyError: 'arguments'"),
    ("max_length", ..., "KeyError: 'max_length'"), ("prompt_leads", 3, "prompt_leads is 3"),
    *(("max_length", value, f"max_length is {json.dumps(value)}") for value in ("x", -1, 0, None, [1], 1.5, True)),
    ("prompt_leads", "x", 'prompt_leads is "x"'), ("prompt_leads", [3], "prompt_leads is [3]"),
]]
RUNS += [(f"run.json: {name} was {value}", setting(**{name: value}), RUN, [WRITES, f"{name} is {json.dumps(value)}"])
         for name, value in [
    ("loss", 3), ("loss", None), ("loss", "x"), ("beta", 0), ("beta", -0.1),
    ("boundary", "x"), ("boundary", 3), ("overlong", "x"), ("on_bad_row", 3),
    ("beta", "x"),
    *(("label_smoothing", value) for value in ("x", None, True, -0.1, 0.5)),
    ("beta", None), ("beta", True), ("bf16", "yes"), ("bf16", 1), ("prompt_field", 3),
    ("chosen_field", ["a"]), ("train_file_path", 3), ("eval_file_path", {}), ("assistant_header", 3),
    ("max_prompt_length", "x"), ("max_prompt_length", 0), ("max_prompt_length", -1)]]
RUNS += [(f"run.json: chat_template_kwargs were {value}", setting(chat_template_kwargs=value), RUN,
          [WRITES, f"--chat_template_kwargs {value}: has {words}"]) for value, words in [
    ("x", "options that can't be read as JSON"), ("[1]", "options of type list"),
    ('{"tokenize": true}', "tokenize in options, which is not the template's to decide"),
    ('{"chat_template": "x"}', "chat_template in options, which is not")]]
RUNS += [
    ("run.json: beta is beyond all floats", setting(beta=10**400), RUN, [WRITES, f"beta is 1{99 * '0'}"]),
    ("run.json is a folder", broken("run/run.json", "a folder"), RUN,
     ["@/run: is no run (run.json is missing); to score a model, name data with --dataset_path"]),
    ("data that is gone", setting(train_file_path="gone.jsonl"), RUN, ["gone.jsonl: no such file"]),
    ("a column that is gone", setting(prompt_field="q"), RUN, ["@/rows.jsonl: has no column 'q' (--prompt_field)"]),
    ("other prompts", edited("run/run.json", prompt_leads=["x"]), RUN, ["run run was trained on 'x'; --other_prompts"]),
]
CHECKPOINTS = [(f"checkpoint-3's {name} {how}", broken(f"run/checkpoint-3/{name}", change), RUN, [words])
               for name, words in (
                   ("adapter_config.json", "@/run/checkpoint-3/adapter_config.json: no base_model_name_or_path can be"),
                   ("adapter_model.safetensors", "@/run/checkpoint-3/adapter_model.safetensors: can't be read"),
                   ("tokenizer.json",
                    "model @/run/checkpoint-3: its base @/model: the tokenizer can't be opened"))
               for how, change in BYTES.items()]


def nan(state):
    for tensor in state.values():
        tensor.fill_(torch.nan)


def one_less(state):
    del state[min(state)]


def wider(state):
    state[min(state)] = torch.zeros(9, 9)


def instead(what):
    """A change: checkpoint-3 is gone, and this done in its place."""
    def change(folder):
        shutil.rmtree(folder / "run" / "checkpoint-3")
        what(folder / "run" / "checkpoint-3")
    return change


CHECKPOINTS += [("a manifest, and the base's weights flipped", listed("model/model.safetensors", flipped), RUN,
                 ["@/model: model.safetensors is not what was written"]),
                ("a manifest cut short", lambda folder: [listed("run/checkpoint-3/tokenizer.json", lambda x: x)(folder),
                                                         broken("run/checkpoint-3/manifest.json", cut)(folder)], RUN,
                 ["@/run/checkpoint-3: manifest.json is damaged"]),
                ("a copy of another step", written("run/checkpoint-3/manifest.json", '{"step": 2, "files": {}}'), RUN,
                 ["@/run/checkpoint-3: is a copy of checkpoint-2, by its manifest.json; move it elsewhere"])]
CHECKPOINTS += [(f"checkpoint-3's weights {change.__name__}", changed_weights(
    "run/checkpoint-3/adapter_model.safetensors", change), LAST, [words]) for change, words in [
        (nan, "@/model: its log-probs are not finite: weights of it, or of its adapter, are broken"),
        (one_less, "@/run/checkpoint-3: lacks 1 of the weights"), (wider, "@/run/checkpoint-3: does not fit its base")]]
CHECKPOINTS += [
    ("a checkpoint without weights", broken("run/checkpoint-3/adapter_model.safetensors", "missing"), RUN,
     ["@/run/checkpoint-3: has adapter_config.json, but no adapter_model.safetensors"]),
    ("a checkpoint that is a file", instead(lambda place: place.write_text("x")), RUN,
     ["@/run/checkpoint-3: config.json"]),
    ("an empty checkpoint", instead(lambda place: place.mkdir()), RUN,
     ["@/run/checkpoint-3: has neither config.json nor"]),
    ("no checkpoint", lambda folder: [shutil.rmtree(place) for place in folder.glob("run/checkpoint-*")], RUN,
     ["@/run: the run has no checkpoint"]),
    ("no base", lambda folder: shutil.rmtree(folder / "model"), RUN,
     ["@/run/checkpoint-0: its base @/model: config.json"]),
    ("another rank", edited("run/checkpoint-3/adapter_config.json", r=4), LAST,
     ["does not fit its base", "size mismatch"]),
    ("a rate that is no number", edited("run/checkpoint-3/adapter_config.json", lora_dropout=float("nan")), LAST,
     ["@/run/checkpoint-3/adapter_config.json: lora_dropout is nan; it must be at least 0 and below 1"]),
    ("an adapter of a newer kind", edited("run/checkpoint-3/adapter_config.json", peft_type="NEWER"), LAST,
     ["@/run/checkpoint-3/adapter_config.json: peft_type is NEWER, which this release of PEFT does not know"]),
    ("broken weights of the base", broken("model/model.safetensors", BYTES["cut short"]), [*LAST, "--bf16"],
     ["@/model: the weights can't be loaded"]),
]
HURT = {"cut": cut, "emptied": nothing, "flipped": flipped, "gone": "missing"}
CHECKPOINTS += [(f"a manifest, and {name} {how}", listed(f"run/checkpoint-3/{name}", change), RUN,
                 [f"@/run/checkpoint-3: {name} ", "copy the folder anew"])
                for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                             "tokenizer_config.json", "chat_template.jinja") for how, change in HURT.items()]
FLAGS = [(" ".join(flags)[:60], nothing_changed, [*RUN, *flags], [words]) for flags, words in [
    *(([f"--{name}={value}"], f"argument --{name}: invalid int value: '{value}'")
      for name in ("max_tokens", "answers", "max_new_tokens", "risers", "seed", "gpu_id", "local_rank")
      for value in ("x", "1.5", "nan", "", "1e400")),
    (["--max_tokens=-1"], "--max_tokens -1: must be at least 1"),
    (["--max_new_tokens=0"], "--max_new_tokens 0: must be"),
    (["--max_new_tokens=9"], "--max_new_tokens 9: no answers are made; add --answers ROWS, or greedy to --responses"),
    (["--max_length=101"], "--max_length 101: the model's context is 100 tokens"),
    (["--gpu_id=99"], "--gpu_id 99: this machine has"), (["--gpu_id=-1"], "--gpu_id -1: this machine has"),
    (["--local_rank=2"], "--local_rank 2 without RANK"), (["--seed=" + "9" * 5000], "--seed: invalid int value"),
    (["--responses"], "--responses: expected at least one argument"), (["--responses", ""], "has no such column"),
    (["--responses", "chosen", "chosen"], "--responses: chosen is named twice"),
    (["--responses", "chosen", "gap"], "--responses gap: summary.csv has the gap of chosen to rejected under"),
    (["--bf16=yes"], "--bf16: ignored expl"),
    *(([f"--risers={k}"], f"--risers {k}: must be at least 1") for k in (0, -3)),
    (["--risers=999"], "--risers 999: the vocabulary has"),
    (["--risers=2", "--model_path=@/model"], "--risers 2: @/model is no checkpoint of a run"),
    (["--dataset_path"], "--dataset_path: expected at least one"),
    (["--dataset_path", ""], "expected FILE or NAME=FILE"),
    (["--dataset_path", "a="], "--dataset_path a=: expected FILE or NAME=FILE"),
    (["--dataset_path", "=x"], "--dataset_path =x: expected FILE or NAME=FILE"),
    (["--dataset_path", "a=@/rows.jsonl", "a=@/s.jsonl"], "two data sets are called a"),
    (["--dataset_path", "@/run"], "@/run: has no column chosen"),  # a folder's files are data
    (["--model_path=@/run"], "@/run/checkpoint-0: is named twice"),
    (["--model_path=@/run/checkpoint-3"], "@/run/checkpoint-3: is named twice"),
    (["--tokens=yes"], "--tokens: ignored expl"),
    (["--model_path=@/none"], "model @/none: no such folder"),
    (["--output_dir=@/rows.jsonl"], "--output_dir @/rows.jsonl: can't be written to"),
    (["--output_dir=/dev/null/x"], "--output_dir /dev/null/x: can't be written to"),
    *((flags, "File name too long") for flags in (
        ["--output_dir=@/" + "x" * 300], ["--output_dir=" + "x" * 300], ["--model_path=@/" + "x" * 300],
        ["--dataset_path", "@/" + "x" * 300], ["--dataset_path", "a=" + "x" * 300])),
]]
FLAGS += [(f"target {target[:20]!r}", nothing_changed, [target, *DATA], [words]) for target, words in [
    ("x" * 5000, "File name too long"), ("@", "model @: has neither config.json nor adapter_config.json"),
    ("", "has neither config.json nor adapter_config.json"),
    ("@/rows.jsonl", "model @/rows.jsonl: config.json ca"),
    ("@/run/checkpoint-9", "model @/run/checkpoint-9: no such folder"),
]]
FLAGS += [(f"not UTF-8: {what}", change, flags, ["\\udcff: no such file or name can be used", "not UTF-8 here"])
          for what, change, flags in [
    ("a run", lambda folder: shutil.copytree(folder / "run", folder / "r\udcff"), ["@/r\udcff"]),
    ("a data set", lambda folder: shutil.copy(folder / "rows.jsonl", folder / "d\udcff.jsonl"),
     [*RUN, "--dataset_path=@/d\udcff.jsonl"]),
    ("where to", nothing_changed, [*RUN, "--output_dir=@/o\udcff"]),
]]
FLAGS += [
    ("risers of a checkpoint alone", nothing_changed, [*LAST, "--risers=2"],
     ["--risers 2: @/run/checkpoint-3 is compared with its run's checkpoint-0; name @/run/checkpoint-0, too"]),
    ("risers without step 0", lambda folder: shutil.rmtree(folder / "run/checkpoint-0"), [*RUN, "--risers=2"],
     ["--risers 2: @/run/checkpoint-3 is compared with its run's checkpoint-0; it is gone, so leave --risers out"]),
    ("risers of a model", nothing_changed, ["@/model", *DATA, "--risers=2"],
     ["--risers 2: @/model is no checkpoint of a run, so there is no step 0"]),
]
PROBES = [(f"data: {what}", jsonl(*rows), [*RUN, *flags], [words]) for what, rows, flags, words in [
    ("one row", ROWS[:1], ["--responses", "other"], "--responses other: no row of the data set has one"),
    ("one prompt", [ROWS[0], ROWS[0] | {"chosen": "x"}], ["--responses", "other"], "--responses other: no row"),
    ("no rejected", [{"prompt": "a", "chosen": "b"}], ["--responses", "rejected"], "--responses rejected: no row"),
    ("a column of nulls", [ROWS[0] | {"x": None}], ["--responses", "x"],
     "--responses x: no row of the data set has one"),
    ("a column of numbers", [ROWS[0] | {"x": 3}], ["--responses", "x"], "row 0: column x is of type int"),
    ("a column to another prompt", [ROWS[0] | {"x": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nb"}],
     ["--responses", "x"], "row 0: column x answers another prompt"),
    ("a number", [ROWS[0] | {"chosen": 3}], [], "row 0: chosen is of type int"),
    ("no columns", [{"a": 1}], [], "no column"),
    ("too long", [ROWS[0] | {"chosen": "x" * 200}], [],
     "longest: row 0: 205 tokens (prompt 4, chosen 201), over --max_length 100"),
    ("nothing", [], [], "@/rows.jsonl: is an empty file"),
]]


CASES = [*RUNS, *CHECKPOINTS, *FLAGS, *PROBES]


@pytest.fixture(scope="session")
def scored(good, tmp_path_factory):  # noqa: F811
    """A run of two checkpoints, as train.py leaves it, and its scores."""
    folder = copied(good, tmp_path_factory.mktemp("scored") / "folder")
    jsonl(*ROWS)(folder)
    arguments = {name: value for name, value in BARE_MODEL.items() if name not in ("max_length", "prompt_leads")}
    record = {"arguments": arguments | {"loss": "dpo"}, "max_length": 100, "prompt_leads": [None]}
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(json.dumps(record))
    for step in (0, 3):
        place = copied(folder / "adapter", folder / "run" / f"checkpoint-{step}")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(folder / "model" / name, place)
    return folder


def settle(folder):
    """Paths in a copied folder's files are those of the copy."""
    setting(train_file_path=str(folder / "rows.jsonl"))(folder)
    for place in folder.glob("run/checkpoint-*"):
        edited("adapter_config.json", base_model_name_or_path=str(folder / "model"))(place)
    return folder


@pytest.mark.parametrize("change, flags, words", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_malformed_input(scored, tmp_path, change, flags, words, monkeypatch, capfd):
    """Each is said in one line; no folder is made, and one that is there stays as it was."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    folder = settle(copied(scored, tmp_path / "folder"))
    flags = [flag.replace("@", str(folder)) for flag in flags]
    output = [] if any(flag.startswith("--output_dir") for flag in flags) else [f"--output_dir={folder / 'out'}"]
    change(folder)
    said = refused(score.main, [*flags, *output], folder, monkeypatch, capfd, chatter=r".*")
    for words_ in words:
        assert words_.replace("@", str(folder)) in said
