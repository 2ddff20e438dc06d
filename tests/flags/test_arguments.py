"""Every setting exists once, can be set by flag and by file, is checked, and is read by somebody."""

import ast
import dataclasses
import functools
import json
import os
import pwd
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import plot
import score
import train as trainer
from nanodpo import files
from nanodpo.core.losses import LOSSES
from nanodpo.errors import UserError
from nanodpo.figures import records, tables
from nanodpo.flags import unknown
from nanodpo.flags.arguments import TrainArguments, parse
from nanodpo.flags.launchers import local_rank
from nanodpo.folder import atomic
from nanodpo.model import source
from nanodpo.run import deepspeed_settings
from nanodpo.scoring.flags import make_parser
from nanodpo.scoring.flags import parse as parse_scores

sys.path.insert(0, str(ROOT / "examples"))
import forward_reverse

NEEDED = ["--model_name", "M", "--train_file_path", "D"]
FIELDS = {f.name: f for f in dataclasses.fields(TrainArguments)}
PAPER = """model_name train_file_path output_dir max_steps num_train_epochs learning_rate lr_scheduler_type warmup_steps
weight_decay per_device_train_batch_size gradient_accumulation_steps max_length max_prompt_length beta loss seed
save_steps save_total_limit logging_steps eval_steps eval_file_path eval_size bf16 gradient_checkpointing use_lora
lora_r lora_alpha lora_dropout lora_target_modules use_flash_attention deepspeed local_rank merge_weights prompt_field
chosen_field rejected_field""".split()
# Values that mean something only beside another setting, and some that are not the first guess by type.
BESIDE = {"lora_dropout": ["--allow_dropout"], "eval_steps": ["--eval_size=5"], "random_init": ["--use_lora=false"],
          "loss_kwargs": ["--loss=simpo"], "train_on": ["--loss=sft"]}
VALUES = {"loss": "ipo", "loss_kwargs": '{"simpo_gamma": 1}', "label_smoothing": 0.2, "lora_dropout": 0.05,
          "max_steps": 7, "adam_beta1": 0.5, "adam_beta2": 0.5,
          "without_rows": "5,17"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def arguments(*flags, file="nothing.yaml"):
    return parse([*flags], Path(file))


def error_of(*flags, **options):
    with pytest.raises(UserError) as caught:
        arguments(*flags, **options)
    return str(caught.value)


def other_value(f):
    """A value of the field's type that is not its default."""
    if f.name in VALUES:
        return VALUES[f.name]
    if choices := f.metadata.get("choices"):
        return next(choice for choice in choices if choice != f.default)
    if f.type is bool:
        return not f.default
    return "other" if f.type is str else f.type((f.default or 0) + (3 if f.type is int else 0.25))


# The paper's command line


def test_the_papers_command_line_parses():
    args = arguments("--model_name", "M", "--train_file_path", "D", "--output_dir", "O", "--max_steps", "200",
                     "--learning_rate", "5e-7", "--bf16", "--use_flash_attention")
    assert (args.model_name, args.train_file_path, args.output_dir) == ("M", "D", "O")
    assert (args.max_steps, args.learning_rate, args.bf16, args.use_flash_attention) == (200, 5e-7, True, True)


def test_the_papers_lora_can_be_said():
    modules = "q_proj,k_proj,v_proj,o_proj,gate_proj,down_proj,up_proj"
    args = arguments(*NEEDED, "--use_lora", "--lora_r", "256", "--lora_alpha", "512", "--lora_dropout", ".05",
                     "--allow_dropout", "--lora_target_modules", modules)
    assert (args.use_lora, args.lora_r, args.lora_alpha, args.lora_dropout) == (True, 256, 512, 0.05)
    assert args.lora_target_modules == modules


@pytest.mark.parametrize("name", PAPER)
def test_every_flag_of_the_papers_script_exists(name):
    assert name in FIELDS


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_a_choice(name):
    """A new one needs no second list."""
    assert arguments(*NEEDED, "--loss", name).loss == name


# Every flag counts


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "local_rank"])  # that one has its own tests, at the end
def test_every_flag_changes_the_settings(name):
    beside = BESIDE.get(name, [])
    base = [f"--{n}=x" for n in ("model_name", "train_file_path")]
    value = other_value(FIELDS[name])
    before = dataclasses.asdict(arguments(*base, *beside))
    after = dataclasses.asdict(arguments(*base, *beside, f"--{name}={value}"))
    assert after[name] == ([value] if FIELDS[name].type == list[str] else value)
    allowed = {name, "per_device_eval_batch_size"} if name == "per_device_train_batch_size" else {name}
    allowed |= {"inspect"} if name == "inspect_row" else set()  # which row to look at says that one wants to look
    assert {key for key in after if after[key] != before[key]} == allowed


@functools.cache
def readers():
    """Names read as args.<name> or run.args.<name> in train.py and its modules, their own checks left out."""
    found = set()
    for file in [ROOT / "train.py", *(file for file in (ROOT / "nanodpo").rglob("*.py")
                                       if file.parent.name not in ("scoring", "ledger", "figures"))]:
        if file.name in ("arguments.py", "limits.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if getattr(owner, "id", getattr(owner, "attr", None)) == "args":
                    found.add(node.attr)
    return found


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_is_read_by_somebody(name):
    """The flag of the published code that nobody read cost it a result."""
    assert name in readers()


def test_no_flag_is_read_that_does_not_exist():
    assert readers() <= FIELDS.keys()


def test_every_flag_has_a_help_text():
    assert all(len(f.metadata["help"]) > 5 for f in FIELDS.values())


# Files


def settings(folder, text, name="run.yaml"):
    file = folder / name
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name, text", [
    ("run.yaml", "model_name: M\ntrain_file_path: D\nlearning_rate: 1e-5\nbf16: true\nuse_lora: false\nseed: 010\n"
                 "lora_r: 8\nmax_length: null\nloss: ipo\n"),
    ("run.yml", "{model_name: M, train_file_path: D, learning_rate: 0.00001, bf16: yes, use_lora: no, seed: 10, "
                "lora_r: 8, loss: ipo}"),
    ("run.json", json.dumps({"model_name": "M", "train_file_path": "D", "learning_rate": 1e-5, "bf16": True,
                             "use_lora": False, "seed": 10, "lora_r": 8, "max_length": None, "loss": "ipo"},
                            indent="\t")),
])
def test_settings_files(tmp_path, name, text):
    args = arguments(settings(tmp_path, text, name), "--lora_r", "4")
    assert args.model_name == "M" and args.learning_rate == 1e-5 and args.bf16 is True and args.use_lora is False
    assert args.seed == 10 and args.max_length is None and args.loss == "ipo"
    assert args.lora_r == 4  # a flag overrides the file


def test_a_bare_command_reads_the_default_file_also_under_the_launcher(tmp_path):
    file = settings(tmp_path, "model_name: M\ntrain_file_path: D\nbeta: 0.5")
    assert arguments(file=file).beta == 0.5
    assert arguments("--local_rank=0", file=file).beta == 0.5


def test_the_launcher_puts_its_flag_before_the_settings_file(tmp_path):
    file = settings(tmp_path, "model_name: M\ntrain_file_path: D\nbeta: 0.5")
    args = arguments("--local_rank=0", file, "--seed", "1")
    assert (args.beta, args.seed, args.local_rank) == (0.5, 1, 0)


@pytest.mark.parametrize("text, words", [
    ("model_nam: M", "unknown setting model_nam"), ("a: [1", "not YAML or JSON"), ("\tbeta: 1", "not YAML or JSON"),
    ("- beta", "found list"), ("", "found "), ("beta", "found str"), ("beta: {a: 1}", "beta must be a single value"),
    ("beta: [1, 2]", "beta must be a single value"), ("beta: big", "--beta: invalid float value: 'big'"),
    ("max_steps: 1.5", "--max_steps: invalid int value: '1.5'"), ("bf16: maybe", "--bf16"), ("loss: ppo", "--loss"),
    ("beta: .nan", "--beta"), ("beta: nan", "--beta nan: must be a finite number"),
    ("learning_rate: inf", "must be a finite number"), ("[" * 20000, "not YAML or JSON"), ("a: *b", "not YAML or JSON"),
    ("!!python/object/apply:os.system ['true']", "found list"),
])
def test_wrong_settings_files(tmp_path, text, words):
    assert words in error_of(settings(tmp_path, text), *NEEDED)


@pytest.mark.parametrize("text", ["{", "[" * 20000, '{"beta": 1} x', "\0", '{"beta": NaN}'])
def test_wrong_json_files(tmp_path, text):
    message = error_of(settings(tmp_path, text, "run.json"), *NEEDED)
    assert "not YAML or JSON" in message or "must be a finite number" in message


def test_unreadable_settings_files(tmp_path):
    assert "No such file" in error_of(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "directory" in error_of(str(tmp_path / "folder.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not YAML or JSON" in error_of(str(tmp_path / "bytes.yaml"))


# Wrong values


@pytest.mark.parametrize("flags, words", [
    (["--bogus", "1"], "unknown argument --bogus"), (["--learning_rat", "1"], "unknown argument --learning_rat"),
    (["x"], "unknown argument x"), (["run.yaml"], "a settings file comes first"),
    (["--beta"], "--beta: expected one argument"), (["--beta", "x"], "--beta: invalid float value: 'x'"),
    (["--max_steps", "1.5"], "--max_steps: invalid int"), (["--bf16", "perhaps"], "--bf16"),
    (["--loss", "ppo"], "--loss ppo: there is no such loss"), (["--overlong", "cut"], "--overlong: invalid choice"),
    (["--beta", "nan"], "--beta nan: must be a finite number"), (["--beta=-inf"], "must be a finite number"),
    (["--learning_rate", "inf"], "must be a finite number"), (["--num_train_epochs", "inf"], "must be a finite"),
    (["--max_grad_norm", "nan"], "must be a finite number"), (["--weight_decay", "nan"], "must be a finite number"),
    (["--beta", "0"], "must be above 0"), (["--learning_rate=-1"], "must not be negative"),
    (["--max_steps", "0"], "above 0, or -1"), (["--max_steps=-2"], "or -1"), (["--logging_steps=0"], "above 0"),
    (["--max_length", "0"], "must be above 0"), (["--per_device_eval_batch_size", "0"], "must be above 0"),
    (["--save_total_limit", "0"], "must be above 0"), (["--seed=-1"], "negative"), ([f"--seed={2**63}"], "below 2^63"),
    (["--max_steps", str(10**400)], "--max_steps 1000"), (["--warmup_steps", str(2**53)], "below 2^53"),
    (["--num_train_epochs", "1e308"], "--num_train_epochs 1e+308: must be below 2^53"),
    (["--label_smoothing", "0.5"], "below 0.5"), (["--label_smoothing", "0.1", "--loss", "ipo"], "no meaning"),
    (["--adam_beta1", "1"], "--adam_beta1 1.0: must be at least 0 and below 1"), (["--lora_alpha", "0"], "above 0"),
    (["--lora_dropout", "0.05"], "--allow_dropout"), (["--lora_dropout", "1", "--allow_dropout"], "below 1"),
    (["--eval_file_path", "E", "--eval_size", "3"], "one of them"), (["--eval_steps", "3"], "nothing to evaluate"),
    (["--gradient_checkpointing", "--activation_memory", "1"], "one of them"),
    (["--activation_memory", "0"], "--activation_memory 0.0: must be above 0 and below 2^20 (GiB), or -1"),
    (["--activation_memory", "-2"], "--activation_memory -2.0: must be above 0"),
    (["--random_init"], "--use_lora false"), (["--merge_weights", "--use_lora", "false"], "nothing to merge"),
    (["--merge_weights", "--lora_r", "0"], "nothing to merge"), (["--local_rank", "3"], "without RANK"),
])
def test_wrong_flags(flags, words):
    assert words in error_of(*NEEDED, *flags)


@pytest.mark.parametrize("missing", ["model_name", "train_file_path"])
def test_what_a_run_cannot_do_without(missing):
    flags = [flag for flag in ("--model_name=M", "--train_file_path=D") if missing not in flag]
    there = flags[0].partition("=")[0]
    assert error_of(*flags) == (f"--{missing} is missing; name it beside {there}, or leave out both to run the example")


# What is derived


def test_lora_r_0_is_full_fine_tuning():
    assert arguments(*NEEDED, "--lora_r", "0").use_lora is False


def test_a_header_can_be_given_as_error_messages_show_it():
    args = arguments(*NEEDED, r"--assistant_header=<|im_start|>assistant\n")
    assert args.assistant_header == "<|im_start|>assistant\n"


def test_home_is_found_where_no_shell_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    file = settings(tmp_path, "model_name: ~/m\ntrain_file_path: ~/d/*.parquet\noutput_dir: ~/o")
    args = arguments(file)
    assert (args.model_name, args.train_file_path, args.output_dir) == ("/home/x/m", "/home/x/d/*.parquet", "/home/x/o")
    assert args.cache_dir == "/home/x/.cache/nanodpo"


def nobody(user):
    raise KeyError(user)


def test_a_home_that_nobody_has_is_refused(monkeypatch):
    """A folder called ~ would be made, in the folder that the command is run in: of this user without HOME, whom the
    machine does not know, as in a container; and of a name mistyped."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert error_of(*NEEDED) == ("--cache_dir ~/.cache/nanodpo: there is no home folder ~ here (HOME is not set); give "
                                 "a full path, or ./~/.cache/nanodpo if that is its name")
    assert arguments(*NEEDED, "--cache_dir=/c", "--output_dir=./~o").output_dir == "./~o"
    for flag in ("output_dir", "model_name", "train_file_path", "fork"):
        given = ["--model_name=m", "--train_file_path=d", "--cache_dir=/c", f"--{flag}=~nobody-at-all/x"]
        assert error_of(*given).startswith(f"--{flag} ~nobody-at-all/x: there is no home folder ~nobody-at-all here; ")
    assert "NUL or half a character" in error_of(*NEEDED, "--output_dir=~\0/x")


@pytest.mark.parametrize("given", [["{}", "--dataset_path=d"], ["--model_path={}", "--dataset_path=d"],
                                   ["m", "--dataset_path", "a={}"], ["m", "--dataset_path=d", "--output_dir={}"]])
def test_home_is_found_or_refused_in_scoring_too(given, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    args = parse_scores([word.format("~/y") for word in given], "")
    assert "/home/x/y" in (*args.targets, args.output_dir, args.dataset_path[0][1])
    with pytest.raises(UserError, match="~nobody-at-all/y: there is no home folder ~nobody-at-all here"):
        parse_scores([word.format("~nobody-at-all/y") for word in given], "")


def launched(monkeypatch, **names):
    """The environment of a launcher of four ranks, changed; None takes a name away."""
    for name, value in ({"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | names).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("names, words", [
    ({"RANK": None, "LOCAL_RANK": None}, "WORLD_SIZE is 4 in the environment, but RANK is not set"),
    ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE 4 in the environment"),
    ({"WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE 0 in"),
    ({"WORLD_SIZE": None}, "RANK is set in the environment, but not WORLD_SIZE"),
    ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "but not MASTER_ADDR, MASTER_PORT"),
    *(({"MASTER_PORT": port}, f"MASTER_PORT is '{port}' in the environment, not a port")
      for port in ("x", "0", "65536", "-1", "29500.0", "9" * 5000)),
    ({"RANK": "9" * 5000}, "in the environment, not a number"), ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1' in the env"),
    ({"RANK": "\u0661"}, "not a number"), ({"LOCAL_RANK": "9" * 5000}, "not a rank")])
def test_an_environment_that_no_launcher_leaves(names, words, monkeypatch):
    """Each is one line before any work is done, in train.py and in score.py."""
    launched(monkeypatch, **{"RANK": "0", "LOCAL_RANK": "0"} | names)
    assert words in error_of(*NEEDED)
    with pytest.raises(UserError, match=re.escape(words)):
        local_rank(-1)


def test_a_world_of_one_needs_no_launcher(monkeypatch):
    launched(monkeypatch, RANK=None, LOCAL_RANK=None, WORLD_SIZE="1")
    assert arguments(*NEEDED).local_rank == 0


def test_local_rank_and_the_environment_agree(monkeypatch):
    launched(monkeypatch, RANK="3", LOCAL_RANK="3")
    assert arguments(*NEEDED).local_rank == arguments(*NEEDED, "--local_rank=3").local_rank == 3
    assert "--local_rank 1, but LOCAL_RANK is 3" in error_of(*NEEDED, "--local_rank=1")
    monkeypatch.setenv("LOCAL_RANK", "x")
    assert "not a rank" in error_of(*NEEDED)


def test_a_launcher_without_local_rank_gets_one(monkeypatch):
    launched(monkeypatch, RANK="3")
    monkeypatch.setenv("LOCAL_RANK", "placeholder")  # so that monkeypatch takes it away again at the end
    monkeypatch.delenv("LOCAL_RANK")
    assert arguments(*NEEDED, "--local_rank=3").local_rank == 3 and os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize("environment, words", [
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun torchrun"),
    ({"SLURM_STEP_NUM_TASKS": "2"}, "several processes were started by srun"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "several processes were started by mpirun"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "not LOCAL_RANK")])
def test_ranks_that_would_not_find_each_other(monkeypatch, environment, words):
    """Processes that a launcher started without telling them their ranks would each train alone, into one folder."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words in error_of("--model_name=M", "--train_file_path=D")


def test_the_example_is_found_from_any_folder_and_takes_flags(tmp_path):
    """Its paths are beside it, not in the caller's folder."""
    folder = tmp_path / "examples"
    folder.mkdir()
    file = settings(folder, "model_name: examples/m\ntrain_file_path: examples/d.parquet\nbeta: 0.5")
    args = arguments("--beta", "0.2", file=file)
    assert (args.model_name, args.train_file_path, args.beta) == (f"{folder}/m", f"{folder}/d.parquet", 0.2)
    assert error_of("--model_name=M", file=file) == (
        "--train_file_path is missing; name it beside --model_name, or leave out both to run the example")


# Files that could hang a run, or say two things at once


@pytest.mark.parametrize("name, text, key", [
    ("run.yaml", "beta: 0.1\nloss: ipo\nbeta: 0.5\n", "beta"), ("run.yaml", "{seed: 1, seed: 1}", "seed"),
    ("run.yml", "a: {b: 1, b: 2}", "b"), ("run.json", '{"beta": 0.1, "loss": "ipo", "beta": 0.5}', "beta"),
    ("run.json", '{"seed": 1, "x": {"y": 1, "y": 1}}', "y")])
def test_a_key_that_a_settings_file_has_twice(tmp_path, name, text, key):
    """One of the two would be passed over in silence."""
    assert f"has {key!r} twice" in error_of(settings(tmp_path, text, name), *NEEDED)


def test_a_key_that_the_deepspeed_file_has_twice(tmp_path):
    args = arguments(*NEEDED, "--deepspeed",
                     settings(tmp_path, '{"zero_optimization": {"stage": 2, "stage": 3}}', "ds.json"))
    with pytest.raises(UserError, match="ds.json: not JSON: has 'stage' twice"):
        deepspeed_settings.read_deepspeed(args, Path("none"))


def odd_file(place, kind):
    """A FIFO, a device or a folder at this place; opened in the usual way the first two would never end."""
    place.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(place)
    elif kind == "a device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    return "Is a directory" if kind == "a folder" else f"is {kind}, not a file"


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, kind):
    """In place of every small file that a user names, or that lies in a folder which one names."""
    said = odd_file(tmp_path / "run.yaml", kind)
    assert said in error_of(str(tmp_path / "run.yaml"))
    said = odd_file(tmp_path / "ds.json", kind)
    with pytest.raises(UserError, match=said):
        deepspeed_settings.read_deepspeed(arguments(*NEEDED, "--deepspeed", str(tmp_path / "ds.json")), Path("none"))
    for read, name in ((files.read_text, "run.json"), (records.read_metrics, "metrics.jsonl"),
                       (tables.read_csv, "series.csv"), (lambda file: tables.read_parquet(file, []), "s.parquet")):
        said = odd_file(tmp_path / name, kind)
        with pytest.raises((UserError, OSError), match=said):
            read(tmp_path if name == "metrics.jsonl" else tmp_path / name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    odd_file(tmp_path / "model" / "model.safetensors", kind)
    with pytest.raises(UserError, match=f"model.safetensors: can't be read: .*{said}"):
        source._check_files(tmp_path / "model")
    odd_file(tmp_path / "model" / "manifest.json", kind)
    assert atomic.read_manifest(tmp_path / "model") == f"manifest.json: {said}"
    atomic.check_whole(tmp_path / "model")  # a folder without a manifest of ours


def test_a_small_file_that_is_not_small(tmp_path):
    """A sparse file of 1 TiB is refused by its size, not read."""
    with (tmp_path / "run.yaml").open("w") as file:
        file.truncate(2**40)
    assert "has 1,099,511,627,776 bytes, more than the 67,108,864" in error_of(str(tmp_path / "run.yaml"))


# Flags that are not there, and where a wrong one stands


@pytest.mark.parametrize("typed, words", [
    ("--learning_rat", "--learning_rat: did you mean --learning_rate?"),
    ("--max-step=3", "--max-step: did you mean --max_steps?"), ("--eval_stpes", "did you mean --eval_steps?"),
    ("--model_name_or_path", "--model_name_or_path: it is --model_name here"),
    ("--dataset_name", "it is --train_file_path here"), ("--use_peft", "it is --use_lora here"),
    ("--loss_type", "it is --loss here, and TRL's sigmoid is dpo"), ("--max_seq_length", "it is --max_length here"),
    ("--warmup_ratio", "it is --warmup_steps here, a number of steps"),
    ("--use_wandb", "it is --report_to wandb here"), ("--logging_dir", "not needed: metrics.jsonl in"),
    ("--logging_dir", "not needed: metrics.jsonl"), ("--do_train", "not needed: train.py trains"),
    ("--resume_from_checkpoint", "the same command goes on"), ("--ref_model", "it is --reference here"),
    ("--fp16", "there is --bf16"), ("--optim", "AdamW is the only"), ("--eval_strategy", "--eval_steps evaluates"),
    ("--loss_typ", "--loss_typ: did you mean --loss_type? it is --loss here, and TRL's sigmoid is dpo"),
    ("--datset-name", "did you mean --dataset_name? it is --train_file_path here")])
def test_what_was_meant_by_an_unknown_flag(typed, words):
    """Slips of the finger, the names of TRL and transformers, and slips in these."""
    assert words in error_of(*NEEDED, typed, "x")


def test_all_unknown_flags_are_named_at_once():
    """A command line of another trainer takes one look, not ten."""
    message = error_of("--model_name_or_path", "M", "--dataset_name", "D", "--beta", "0.1", "--zzz", "--optim=adamw",
                       file=ROOT / "examples" / "dpo.yaml")
    assert message == ("unknown arguments --model_name_or_path: it is --model_name here; --dataset_name: it is "
                       "--train_file_path here; --zzz; --optim: AdamW is the only optimizer; leave it out; `train.py "
                       "--help` lists them all")


def test_every_hint_names_flags_that_are_there():
    for name, ours in unknown.RENAMED.items():
        assert ours in FIELDS and name not in FIELDS
    of_score = vars(make_parser("").parse_args([]))
    for name, words in unknown.OTHERWISE.items():
        assert name not in FIELDS and name not in unknown.RENAMED
        assert {*re.findall(r"score.py --(\w+)", words)} <= of_score.keys(), words
        assert {*re.findall(r"(?<!score.py )--(\w+)", words)} <= FIELDS.keys(), words


def test_a_setting_that_is_not_there(tmp_path):
    file = settings(tmp_path, "model_name_or_path: M\nlearning_rat: 1\nzzz: 2")
    assert error_of(file).endswith("unknown setting model_name_or_path (it is model_name here), learning_rat (did you "
                                   "mean learning_rate?), zzz; `train.py --help` lists them")


@pytest.mark.parametrize("main, flags, words", [
    (score.main, ["--dataset_pth", "D"], "unknown argument --dataset_pth: did you mean --dataset_path?"),
    (score.main, ["M", "--max-token=3"], "unknown argument --max-token: did you mean --max_tokens?"),
    (score.main, ["--train_file_path", "D"], "--train_file_path: --dataset_path names data"),
    (score.main, ["--zzz"], "unknown argument --zzz; `score.py --help` lists them all"),
    (plot.main, ["R", "--heat_map"], "unknown argument --heat_map: did you mean --heatmap?"),
    (plot.main, ["--seris=x"], "unknown argument --seris: did you mean --series?")])
def test_the_other_scripts_guess_as_well(main, flags, words):
    with pytest.raises(UserError) as caught:
        main(flags)
    assert str(caught.value).endswith(words)


def test_a_wrong_value_is_named_as_it_was_typed(tmp_path):
    """With the dashes that the user gave, or with the file in which it stands."""
    assert error_of(*NEEDED, "--learning-rate", "x").startswith("--learning-rate: invalid float value: 'x'")
    assert error_of(*NEEDED, "--save-steps", "-3").startswith("--save-steps -3: must not be negative")
    assert error_of(*NEEDED, "--learning_rate", "x").startswith("--learning_rate: invalid float value")
    file = settings(tmp_path, "beta: big")
    assert error_of(file, *NEEDED).startswith(f"{file}: --beta: invalid float value: 'big'")
    file = settings(tmp_path, "beta: -1")
    assert error_of(file, *NEEDED).startswith(f"{file}: --beta -1.0: must be above 0")
    assert error_of(file, *NEEDED, "--beta=0").startswith("--beta 0.0: must be above 0")


@pytest.mark.parametrize("main", [trainer.main, score.main, plot.main, forward_reverse.main])
def test_help_ends_with_0(main, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0 and "usage: " in capsys.readouterr().out


def test_help_shows_every_flag_once_and_the_ten_that_matter_first(capsys):
    """In groups, 80 columns wide, with the value that holds where the flag is not given."""
    with pytest.raises(SystemExit):
        trainer.main(["--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert sorted(flags) == sorted(FIELDS) and max(map(len, text.splitlines())) <= 80
    first, *groups = text.split("most used:\n")[1].split("\n\n")
    assert re.findall(r"^  --(\w+)", first, re.MULTILINE) == flags[:10]
    assert {"model_name", "train_file_path", "output_dir", "learning_rate"} < {*flags[:10]}
    assert [group.partition(":")[0] for group in groups] == [
        "model", "data", "training", "LoRA", "precision and memory", "output and resuming", "looking without training",
        "launcher"]
    found = dict(group.split(":\n", 1) for group in groups)
    assert {"lora_r", "lora_alpha"} < {*re.findall(r"--(\w+)", found["LoRA"])}
    assert {"deepspeed", "activation_memory"} < {*re.findall(r"--(\w+)", found["precision and memory"])}
    assert "--lora_r N\n      LoRA rank. Default: 16.\n" in text and "--warmup_steps N\n" in text
    assert re.search(r"--weight_decay X\n[^-]* decayed\.\s+Default:\s+0\.0\.\n", text)


def test_a_printed_config_is_a_settings_file(tmp_path, capsys, monkeypatch):
    """Given back, it prints itself; without the flag it would train, on any rank of a launcher."""
    trainer.main([*NEEDED, "--beta", "0.3", "--lora_r", "0", "--assistant_header", r"a\n", "--print_config"])
    first = capsys.readouterr().out
    file = settings(tmp_path, first, "again.json")
    trainer.main([file, "--print_config", "--print_config"])
    assert capsys.readouterr().out == first and json.loads(first)["beta"] == 0.3
    assert not {"print_config", "local_rank"} & json.loads(first).keys()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert arguments(file).local_rank == 1 and not arguments(file).print_config
