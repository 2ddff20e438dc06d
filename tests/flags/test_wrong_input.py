"""A mistake of a user ends in one line that says so, exit code 2, no traceback, and no folder made."""

import json
import os
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny
from conftest import ROOT

import train
from nanodpo.errors import RunStopped, UserError, run_script
from nanodpo.flags.arguments import TrainArguments
from nanodpo.run import deepspeed_settings

GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "5"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model folders without weights: wrong input is found before any would be read."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("models")
    for name, vocabulary, tokenizer in (("good", 300, tiny.chatml()), ("small", 200, tiny.chatml())):
        LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=8,
                    num_attention_heads=1, max_position_embeddings=100).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "no_tokenizer").mkdir()
    (folder / "no_tokenizer" / "config.json").write_text((folder / "good" / "config.json").read_text())
    (folder / "bad_tokenizer").mkdir()
    for file in (folder / "good").iterdir():
        text = "{" if file.name == "tokenizer.json" else file.read_text()
        (folder / "bad_tokenizer" / file.name).write_text(text)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def world(tmp_path, models, monkeypatch, capsys):
    """error(rows or bytes, *flags) runs train.py's main in this process and returns its one line."""
    from nanodpo.ranks import distributed

    def went_on(*_):
        raise AssertionError("the wrong input was not found")

    monkeypatch.setattr(distributed, "join_ranks", went_on)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def error(data, *flags, file="rows.jsonl", model="good"):
        path = tmp_path / file
        if isinstance(data, bytes):
            path.write_bytes(data)
        elif data is not None:
            path.write_text("".join(json.dumps(row) + "\n" for row in data))
        monkeypatch.setattr(sys, "argv", [
            "train.py", f"--model_name={models / model}", f"--train_file_path={path}",
            f"--output_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}", *flags])
        code = run_script(train.main)
        out, err = capsys.readouterr()
        assert code == 2 and out == "", (code, out, err)
        assert re.fullmatch(r"error: .+\n", err), err
        assert len(err) < 1500
        assert not (tmp_path / "out").exists() or "--output_dir" in err
        return err

    return error


# Rows


@pytest.mark.parametrize("rows, flags, words", [
    ([GOOD, GOOD | {"chosen": ""}], [], "1 of 2 rows can't be used; row 1: chosen is empty"),
    ([GOOD, GOOD | {"rejected": "2"}], [], "row 1: chosen and rejected are equal"),
    ([GOOD, GOOD | {"rejected": None}], [], "row 1: rejected is missing"),
    ([GOOD, GOOD | {"prompt": None}], [], "row 1: chosen has no prompt"),
    ([GOOD | {"chosen": "a"}, GOOD | {"chosen": 3}], [], "row 1: chosen is of type int"),
    ([GOOD | {"chosen": 3}], [], "row 0: chosen is of type int"),
    ([GOOD | {"chosen": {"a": 1}}], [], "row 0: chosen is of type dict"),
    ([{"prompt": "1+1=", "chosen": "2"}], [], "rejected or worse-text or response_k or rejected_messages or "
     "non_preferred_output; it has prompt, chosen"),
    ([GOOD], ["--prompt_field", "q"], "no column 'q' (--prompt_field); it has prompt, chosen, rejected"),
    ([GOOD, GOOD | {"prompt": "1+2", "chosen": "3"}], [], "row 1: chosen: prompt and response merge in tokens"),
    ([{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
       "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}], [],
     "row 0: prompts of chosen and rejected differ"),
    ([GOOD | {"chosen": "[INST] 1+1= [/INST] 2"}], [], "'<|im_start|>assistant\\n'"),
    ([GOOD | {"chosen": "2" * 101}], [], "1 of 1 row (100.0%) are too long; longest: row 0: 106 tokens"),
    ([GOOD], ["--max_length", "5"], "row 0: 6 tokens (prompt 4, chosen 2), over --max_length 5"),
    ([GOOD], ["--max_length", "4", "--overlong", "truncate"], "no usable row is left of 1"),
    ([GOOD], ["--max_length", "101"], "the model's context is 100 tokens"),
    ([GOOD], ["--max_prompt_length", "3"], "prompt of 4 tokens"),
    ([GOOD], ["--eval_size", "1"], "has 1 usable row"),
    ([GOOD], ["--eval_file_path", "none.parquet"], "none.parquet: no such file"),
])
def test_wrong_rows(world, rows, flags, words):
    """Empty, equal and overlong rows, and limits that leave none: one line that names the row and the limit."""
    assert words in world(rows, *flags)


# Files


def parquet_bytes():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([GOOD] * 50), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("file, data, words", [
    ("rows.jsonl", b"", "empty file"), ("rows.parquet", b"", "empty file"), ("rows.csv", b"", "empty file"),
    ("rows.jsonl", b"\n\n", "has no rows"), ("rows.csv", b"prompt,chosen,rejected\n", "has no rows"),
    ("rows.json", b"[]", ""), ("rows.jsonl", json.dumps(GOOD).encode() + b'\n{"prompt": "1', "can't be read"),
    ("rows.jsonl", b"\0" * 100, "can't be read"), ("rows.csv", b"\0" * 100, ""), ("rows.jsonl", b"\xff\xfe\x80", ""),
    ("rows.json", b"[1, 2, 3]", ""), ("rows.jsonl", b'"a"\n"b"\n', ""), ("rows.json", b"3", ""),
    ("rows.json", b"[" * 100000 + b"]" * 100000, "can't be read"),
    ("rows.jsonl", b'{"chosen": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", ""),
    ("rows.jsonl", b'{"chosen": ' + b'{"a": ' * 300 + b"1" + b"}" * 300 + b', "rejected": "b"}\n', ""),
    ("rows.json", b'{"pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}', "it has pairs"),
    ("rows.json", b'{"train": [{"prompt": "a"}], "test": [{"prompt": "a"}]}', "holds several splits (train, test)"),
    ("rows.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d,e\n", "can't be read"),
    ("rows.csv", b"prompt,chosen,rejected\na,b,c\na\n", "line 3: can't be read: 1 field, and the first line names 3"),
    ("rows.csv", b"prompt,chosen,rejected,weight\na,b,c,1_0\n", 'row 0: has the weight "1_0"'),
    ("rows.csv", b'prompt,chosen,rejected\n"a,b,c\n', "line 2: can't be read: unexpected end of data"),
    ("rows.csv", "prompt,chosen,rejected\né,b,c\n".encode("latin-1"), "line 2: is not UTF-8"),
    ("rows.parquet", b"PAR1", "can't be read"), ("rows.parquet", bytes(range(256)) * 20, "can't be read"),
    ("rows.parquet", parquet_bytes()[:-40], "can't be read"), ("rows.csv", parquet_bytes(), ""),
    ("rows.parquet", parquet_bytes()[:10] + b"x" * 40 + parquet_bytes()[50:], ""),
    ("rows.txt", b"x", "expected .parquet, .arrow, .jsonl, .ndjson, .json, .csv, .tsv"), ("rows", b"x", "no suffix"),
    ("rows.jsonl", b'{"prompt": NaN, "chosen": "a", "rejected": "b"}\n', "of type float"),
])
def test_wrong_files(world, file, data, words):
    message = world(data, file=file)
    assert words in message and file in message


def test_files_that_are_not_there(world, tmp_path):
    for file in ("none.parquet", "none/*.jsonl", "none"):
        assert "no such file" in world(None, file=file)
    (tmp_path / "folder").mkdir()
    assert "folder" in world(None, file="folder")


# Models


@pytest.mark.parametrize("model, words", [
    ("none", ""), ("empty", "neither config.json nor adapter_config.json"), ("broken", ""), ("no_tokenizer", ""),
    ("small", "its tokenizer gives '<|im_end|>' the id 260, and its embedding has 200 places, from 0 (first used in"),
])
def test_wrong_models(world, model, words):
    message = world([GOOD], model=model)
    assert message.startswith("error: model ") and f"/{model}: " in message and words in message


# DeepSpeed's file


@pytest.mark.parametrize("text, words", [
    ("{", "not JSON"), ("", "not JSON"), ("[1]", "expected an object, found list"), ("3", "found int"),
    ('{"optimizer": {"type": "Lion"}, "scheduler": {"type": "OneCycle"}}', "sets optimizer, scheduler, which train"),
    ('{"train_batch_size": 8, "gradient_accumulation_steps": 2}', "sets train_batch_size, gradient_accumulation_steps"),
    ('{"train_micro_batch_size_per_gpu": 8}', "sets train_micro_batch_size_per_gpu"),
    ('{"gradient_clipping": 0.5}', "sets gradient_clipping"), ('{"fp16": {"enabled": true}}', "sets fp16"),
    ('{"bf16": {"enabled": true}}', "sets bf16"),
])
def test_wrong_deepspeed_files(world, tmp_path, text, words):
    (tmp_path / "ds.json").write_text(text)
    message = world([GOOD], f"--deepspeed={tmp_path / 'ds.json'}")
    assert words in message and "ds.json" in message


@pytest.mark.parametrize("settings, bf16", [
    ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}}, True),
    ({"bf16": {"enabled": "auto"}}, False), ({"fp16": {"enabled": False, "loss_scale": 0}}, False),
    ({"bf16": {"enabled": True}, "train_batch_size": "auto", "zero_optimization": {"stage": "auto"}}, True)])
def test_a_precision_that_agrees_with_the_flag_is_no_mistake(settings, bf16):
    """As files of other trainers have it; what the engine gets is the flag's."""
    args = TrainArguments(model_name="m", train_file_path="d", bf16=bf16, per_device_train_batch_size=3)
    found = deepspeed_settings.engine_config(settings, "ds.json", args)
    assert not found["bf16"]["enabled"] and not found.get("fp16") and "train_batch_size" not in found
    assert found["train_micro_batch_size_per_gpu"] == 3
    with pytest.raises(UserError, match="sets bf16, which train.py owns"):
        deepspeed_settings.engine_config({"bf16": {"enabled": not bf16}}, "ds.json", args)


def test_deepspeed_reads_every_setting_that_it_may_be_given():
    """A name that it does not know would be handed on for nothing: the list is that of the release installed here."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = set()

    class Settings(dict):
        def get(self, name, *default):
            asked.add(name)
            return super().get(name, *default)

        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

    objects = {name: {} for name, limit in deepspeed_settings.SETTINGS.items() if limit.holds({}) and limit.words}
    DeepSpeedConfig(Settings(objects, train_micro_batch_size_per_gpu=1))
    refused = {"amp", "sparse_gradients"}
    assert deepspeed_settings.SETTINGS.keys() - refused <= asked, deepspeed_settings.SETTINGS.keys() - asked


def test_a_deepspeed_file_that_is_not_there_or_not_text(world, tmp_path):
    assert "No such file" in world([GOOD], f"--deepspeed={tmp_path / 'none.json'}")
    assert "directory" in world([GOOD], f"--deepspeed={tmp_path}")
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe")
    assert "not JSON" in world([GOOD], f"--deepspeed={tmp_path / 'ds.json'}")


# Output


def test_an_output_folder_in_use_is_left_alone(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "is in use" in world([GOOD])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_output_folder_that_is_a_file(world, tmp_path):
    (tmp_path / "out").write_text("x")
    assert "is a file" in world([GOOD])
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_made(world, tmp_path, place):
    (tmp_path / "file").write_text("x")
    assert "--output_dir" in world([GOOD], f"--output_dir={tmp_path / place}")


# The ends of a script


def test_how_a_script_ends(monkeypatch, capsys):
    def raising(error):
        def main(argv):
            raise error
        return main

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run_script(lambda argv: None) == 0
    assert run_script(raising(UserError("a\n  b"))) == 2 and capsys.readouterr().err == "error: a b\n"
    assert run_script(raising(RunStopped("c"))) == 1 and capsys.readouterr().err == "error: c\n"
    assert run_script(raising(KeyboardInterrupt())) == 130
    with pytest.raises(KeyError):  # a bug keeps its traceback
        run_script(raising(KeyError("d")))
    capsys.readouterr()
    for rank, said in (("1", ""), ("0", "error: a\n")):  # the first rank of each machine says it
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run_script(raising(UserError("a"))) == 2 and capsys.readouterr().err == said


# The real script, in processes of its own


def real(folder, *flags, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], cwd=folder, capture_output=True, text=True,
                          timeout=100, env=env | {"HF_HUB_OFFLINE": "1"} | environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_real_script_says_one_line(tmp_path, models):
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(GOOD) + "\n")
    model, data = f"--model_name={models / 'good'}", f"--train_file_path={good}"
    for flags, words in [
            ([model, data, "--bogus", "1"], "unknown argument --bogus"),
            ([model, "--train_file_path=someone/somedata:main:train"], "someone/somedata:main:train: can't be read"),
            (["--model_name=someone/somemodel", data], "model someone/somemodel: config.json can't be opened")]:
        code, out, err = real(tmp_path, *flags)
        assert (code, out) == (2, ""), (flags, out, err)
        assert re.fullmatch(r"error: .+\n", err) and words in err
    assert [file.name for file in tmp_path.iterdir()] == ["good.jsonl"]  # no runs/


@pytest.mark.slow
def test_inspect_prints_and_leaves_nothing(tmp_path, models):
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    code, out, err = real(tmp_path, f"--model_name={models / 'good'}", "--train_file_path=good.jsonl", "--inspect")
    assert (code, err) == (0, "")
    assert "1+1=[2][<|im_end|>]" in out and "1+1=[5][<|im_end|>]" in out
    assert [file.name for file in tmp_path.iterdir()] == ["good.jsonl"]


def test_inspect_shows_what_a_run_would_stop_at(tmp_path, models, world, monkeypatch, capsys):
    """One looks before one knows what to leave out."""
    rows = [GOOD, GOOD | {"chosen": "x" * 200}, GOOD | {"rejected": ""}]
    assert "1 of 3 rows can't be used; row 2: rejected is empty" in world(rows, "--max_length=50")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--inspect"])
    code = run_script(train.main)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "") and "1 row, 2 dropped" in out and "(50.0% over the limit of 50)" in out
    assert "dropped row 1: " in out and "dropped row 2: " in out and "1+1=[2]" in out
    assert "dropped rows stop a run, but for --on_bad_row drop, --overlong drop or truncate" in out


def test_there_are_hundreds_of_malformed_inputs():
    """Each has its own name; the tables of train.py, score.py, plot.py and the experiment together."""
    import test_wrong_input_plot
    import test_wrong_input_score
    import test_wrong_input_train

    tables = [test_wrong_input_train.CASES, test_wrong_input_score.CASES, test_wrong_input_plot.CASES,
              test_wrong_input_plot.DATA]
    for table in tables:
        names = [name for name, *_ in table]
        assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
        assert all(any(words) for *_, words in table)  # no case is content with the exit code
    assert sum(map(len, tables)) >= 1000
