"""train.py on malformed input: rows, files, models, templates, weights, adapters, settings, flags. A case a line."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers
import torch
from malformed import (
    BYTES,
    DEEP,
    broken,
    changed_weights,
    copied,
    edited,
    flipped,
    listed,
    nothing_changed,
    refused,
    written,
)

import train
from nanodpo.flags.arguments import TrainArguments
from nanodpo.model.source import open_source
from nanodpo.run.datasets import load_data

GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "5"}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
JSONS = {"a list": "[]", "a number": "3", "null": "null", "too deep": DEEP}
ROWS, MODEL, ADAPTER = ["--train_file_path=@/rows.jsonl"], ["--model_name=@/model"], ["--model_name=@/adapter"]


def jsonl(*rows):
    return written("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# Values: every column x what it must not hold

RESPONSES = [
    ("null", None, "is missing, not text"), ("a number", 7, "is of type int"), ("true", True, "is of type bool"),
    ("a fraction", 0.5, "is of type float"), ("numbers", [1, 2], "is of type list"), ("[]", [], "is an empty list"),
    ("strings in a list", [["a"]], "is of type list"), ("an object", {"a": {"b": 1}}, "is of type dict"),
    ("empty", "", "is empty"),
    ("white space", " \n\t ", "is empty"), ("only an end", "<|im_end|>", "is empty"),
    ("messages without roles", [{"content": "a"}], "is of type list"),
    ("a role that is a number", [TALK[0], {"role": 3, "content": "b"}], "is of type list"),
    ("no reply", TALK[:1], "must end with an assistant message, ends with role 'user'"),
    ("a message beside a text", TALK[1:], "prompts of chosen and rejected differ: "),
    ("a null content", [TALK[0], {"role": "assistant", "content": None}],
     "has a message of role 'assistant' without content"),
    ("a content that is a number", [TALK[0], {"role": "assistant", "content": 3}], "a message whose content is of type "
     "int, not text"),
    ("a content that is a list", [TALK[0], {"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
     "prompts of chosen and rejected differ: "),
    ("a content that is an image", [TALK[0], {"role": "assistant", "content": [{"type": "image", "url": "b"}]}],
     "has a message with a part of type 'image', which a model of text can't read"),
    ("two turns", "a<|im_end|>\nb", "goes on after its end of turn"),
    ("a user's turn", "a <|im_start|>user\nb", "holds a turn that is not the assistant's"),
    ("a foreign transcript", "<s>[INST] a [/INST] b", "is a transcript (it opens with"),
    ("half a character", "a\ud800", "holds half a character, '\\ud800'"),
]
PROMPTS = [
    ("null", None, "chosen has no prompt: name its column"), ("a number", 7, "has a prompt that is of type int"),
    ("numbers", [1, 2], "has a prompt that is of type list"), ("[]", [], "has a prompt that is an empty list"),
    ("an object", {"a": 1}, "has a prompt that is of type dict"), ("empty", "", "chosen has an empty prompt"),
    ("white space", " \n ", "chosen has an empty prompt"), ("half a character", "\udc00", "holds half a character"),
    ("messages without roles", [{"content": "a"}], "has a prompt that is of type list"),
    ("a message without content", [{"role": "user", "content": None}], "a message of role 'user' without content"),
    ("a content that is a list", [{"role": "user", "content": ["a"]}], "a message whose content is of type list"),
    ("huge", "x" * 1_000_000, "too long; longest: row 0: 1000002 tokens (prompt 1000000, chosen 2), over the model's "
     "context of 100"),
]
VALUES = [(f"{side} is {what}", jsonl(GOOD | {side: value}), ROWS, ["@/rows.jsonl: 1 of 1 row", "row 0", side, words])
          for side in ("chosen", "rejected") for what, value, words in RESPONSES]
VALUES += [(f"prompt is {what}", jsonl(GOOD | {"prompt": value}), ROWS, ["@/rows.jsonl: 1 of 1 row", words])
           for what, value, words in PROMPTS]
VALUES += [("types change", jsonl(GOOD, GOOD | {"chosen": [1]}), ROWS,
            ["1 of 2 rows", "row 1: chosen is of type list"]),
           ("a weight is text", jsonl(GOOD | {"weight": "2"}), ROWS,
            ["@/rows.jsonl: 1 of 1 row", 'row 0: has the weight "2"']),
           ("a column is not in every row", jsonl(GOOD, {"prompt": "a"}), ROWS, ["row 1: chosen is missing"])]


# Files


def data(name: str, how):
    """A change: forty good rows in this file, then its bytes through `how`."""
    def change(folder):
        rows = [GOOD | {"prompt": f"{i}+{i}="} for i in range(40)]
        lines = [json.dumps(row) for row in rows]
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), folder / name)
        elif name.endswith(".csv"):
            (folder / name).write_text("prompt,chosen,rejected\n" + "".join(f'"{i}=","2","5"\n' for i in range(40)))
        else:
            (folder / name).write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]")
        broken(name, how)(folder)
    return change


HURT = {  # what is said of each file that was cut short, flipped, emptied, or filled with binary or NULs
    "r.parquet": ["can't be read", "can't be read", "is an empty file", "can't be read", "can't be read"],
    "r.json": ["can't be read", "is not UTF-8", "is an empty file", "is not UTF-8", "line 1: can't be read"],
    "r.jsonl": ["line 21: can't be read as JSON", "is not UTF-8", "is an empty file", "is not UTF-8",
                "line 1: can't be read as JSON"],
    "r.csv": ["unexpected end of data", "is not UTF-8", "is an empty file", "is not UTF-8", "has no rows"],
}
FILES = [(f"{name} {how}", data(name, change), [f"--train_file_path=@/{name}"], [f"@/{name}", words])
         for name, said in HURT.items() for (how, change), words in zip(BYTES.items(), said)]
HEAD = "prompt,chosen,rejected\n"
FILES += [(f"{what} in {name}", written(name, content), [f"--train_file_path=@/{name}"], [f"@/{name}", words])
          for name, what, content, words in [
    ("r.jsonl", "a scalar", "1\n2\n", "line 1: expected an object with a prompt and responses, found int"),
    ("r.jsonl", "null", '{"prompt": "a"}\nnull\n',
     "line 2: expected an object with a prompt and responses, found None"),
    ("r.jsonl", "nothing", "{}\n", "has no column chosen or completion or"),
    ("r.jsonl", "a comma too many", '{"prompt": "a",}\n', "line 1: can't be read as JSON"),
    ("r.jsonl", "Python", "{'prompt': 'a'}\n", "line 1: can't be read as JSON"),
    ("r.jsonl", "depth", '{"prompt": ' + DEEP + "}\n", "line 1: can't be read as JSON"),
    ("r.jsonl", "UTF-16", json.dumps(GOOD).encode("utf-16"), "line 1: is not UTF-8"),
    ("r.jsonl", "an infinite number", '{"prompt": 1e999, "chosen": "b", "rejected": "c"}\n',
     "prompt that is of type f"),
    ("r.jsonl", "a long number", '{"prompt": ' + "9" * 5000 + "}\n", "line 1: can't be read as JSON"),
    ("r.jsonl", "a huge name", json.dumps({"x" * 1_000_000: 1}), "has no column chosen"),
    ("r.jsonl", "a name that acts", json.dumps({"a\x1b[2J\0": 1}), "it has a\\x1b[2J\\x00"),
    ("r.jsonl", "thousands of columns", json.dumps({str(i): 1 for i in range(3000)}), "has no column chosen"),
    ("r.json", "columns", '{"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}',
     "r.json: has a list for each column; write an object for each row"),
    ("r.json", "nothing", "{}", "has no column chosen"), ("r.json", "null", "null", "line 1: expected an object"),
    ("r.json", "null in an array", "[null]", "item 0: expected an object"),
    ("r.json", "an array in an array", "[[]]", "item 0: expected an object"),
    ("r.json", "text", '"a"', "line 1: expected an object"), ("r.json", "depth", DEEP, "can't be read as a data set"),
    ("r.jsonl", "a key twice", '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}\n',
     "line 1: can't be read as JSON: has 'chosen' twice"),
    ("r.json", "a key twice", '[{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}]', "has 'chosen' twice"),
    ("r.csv", "a column twice", "prompt,chosen,chosen,rejected\na,b,c,d\n", "has two columns called 'chosen'"),
    ("r.csv", "semicolons", "prompt;chosen;rejected\na;b;c\n", "the first line has ';' between names, not ','"),
    ("r.csv", "a field too many", HEAD + "a,b,c\na,b,c,d\n",
     "line 3: can't be read: 4 fields, and the first line names 3"),
    ("r.csv", "no header", "1+1=,2,3\n2+2=,4,5\n",
     "or conversation or preferred_output; it has 1+1=, 2, 3: name one with --chosen_field"),
    ("r.csv", "a huge header", "x" * 1_000_000 + ",b\na,b\n", "has no column chosen"),
    ("r.csv", "an open quote", HEAD + 'a,b,"c\n', "unexpected end of data"),
    ("r.csv", "text after a quote", HEAD + 'a,b,"c"d\n', "expected after"),
    ("r.csv", "UTF-16", (HEAD + "a,b,c\n").encode("utf-16"), "line 1: is not UTF-8"),
    ("r.parquet", "a zip", b"PK\3\4" + bytes(100), "can't be read"),
]]


def table(schema_metadata=None, **columns):
    def change(folder):
        columns_ = {"prompt": pa.array(["a"]), "chosen": pa.array(["b"]), "rejected": pa.array(["c"])} | columns
        found = pa.table({name: values for name, values in columns_.items() if values is not None})
        pq.write_table(found.replace_schema_metadata(schema_metadata), folder / "r.parquet")
    return change


def features(found):
    return {"huggingface": found if isinstance(found, str) else json.dumps({"info": {"features": found}})}


NONE = pa.array([], pa.string())
FILES += [(f"{what} in r.parquet", change, ["--train_file_path=@/r.parquet"], ["@/r.parquet", words])
          for what, change, words in [
    ("bytes", table(chosen=pa.array([b"a"])), "row 0: chosen is of type bytes"),
    ("a date", table(rejected=pa.array([1], pa.timestamp("s"))), "row 0: rejected is of type datetime"),
    ("nulls", table(chosen=pa.nulls(1)), "row 0: chosen is missing"),
    ("a map", table(chosen=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))), "can't be read as a data set"),
    ("a missing column", table(chosen=None),
     "or conversation or preferred_output; it has prompt, rejected: name one with --chosen_field"),
    ("no rows", table(prompt=NONE, chosen=NONE, rejected=NONE), "has no rows"),
    ("no columns", lambda folder: pq.write_table(pa.table({}), folder / "r.parquet"), "has no rows"),
    ("broken features", table(features("{")), "can't be read as a data set"),
    ("features that are a number", table(features("3")), "can't be read as a data set"),
    ("features of no type", table(features({"prompt": {"_type": "Nope"}})), "Feature type 'Nope' not found"),
]]


def saved(how, name):
    def change(folder):
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list([GOOD]).save_to_disk(folder / "disk")
        (how(f"disk/{name}") if callable(how) else broken(f"disk/{name}", how))(folder)
    return change


DISK = "@/disk: can't be read as a folder of datasets' save_to_disk: "
FILES += [(f"disk/{name} {how}", saved(lambda file, change=change: broken(file, change), name),
           ["--train_file_path=@/disk"], [DISK])
          for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")
          for how, change in {**BYTES, "missing": "missing"}.items()]
FILES += [(f"disk/{name} is {what}", saved(lambda file, text=text: written(file, text), name),
           ["--train_file_path=@/disk"], [DISK])
          for name in ("state.json", "dataset_info.json") for what, text in JSONS.items()]


def pipe(folder):
    import os

    os.mkfifo(folder / "pipe.jsonl")  # who opens it waits for ever


FILES += [
    ("a pipe", pipe, ["--train_file_path=@/pipe.jsonl"], ["@/pipe.jsonl: is not a file"]),
    ("a dangling link", lambda folder: (folder / "l.jsonl").symlink_to("x"), ["--train_file_path=@/l.jsonl"],
     ["@/l.jsonl: is not a file"]),
    ("a folder among files", lambda folder: (folder / "d.jsonl").mkdir(), ["--train_file_path=@/d.j*"],
     ["@/d.jsonl: is not a file"]),
    ("a device", nothing_changed, ["--train_file_path=/dev/null"], ["/dev/null: is not a file"]),
    ("a name too long", nothing_changed, ["--train_file_path=@/" + "x" * 5000], ["File name too long"]),
    ("a name of two lines", nothing_changed, ["--train_file_path=@/a\nb.jsonl"], ["/a b.jsonl: no such file"]),
    ("a name that acts", nothing_changed, ["--train_file_path=@/a\x1b[2Jb.jsonl"], ["/a\\x1b[2Jb.jsonl: no such file"]),
    ("a name that is no text", nothing_changed, ["--train_file_path=@/a\udcff.jsonl"],
     ["a\\udcff.jsonl: no such file"]),
    ("the home of nobody", nothing_changed, ["--train_file_path=~nobody-at-all/r.jsonl"], ["~nobody-at-all/r.jsonl"]),
    ("NUL in a name, as a settings file can hold", nothing_changed, ["--train_file_path=@/a\0b.jsonl"],
     ["a\\x00b.jsonl: no such file"]),
]


# Models


def pickled(name, other):
    """A change: weights in the old format, and broken."""
    def change(folder):
        broken(name, "missing")(folder)
        written(other, b"junk")(folder)
    return change


def in_whole_numbers(state):
    state[min(state)] = state[min(state)].to(torch.int8)


class Code:
    """What a pickle can hold in place of a tensor: a call."""

    def __reduce__(self):
        return print, ("run",)


def with_code(name, other):
    """A change: weights in the old format, with code among them."""
    def change(folder):
        broken(name, "missing")(folder)
        torch.save({"weight": Code()}, folder / other)
    return change


CONFIG, TOKENIZER, WEIGHTS = ("model @/model: config.json can't be opened",
                              "model @/model: the tokenizer can't be opened",
                              "@/model/model.safetensors: can't be")
MODELS = [(f"{name} {how}", broken(f"model/{name}", change), MODEL, [words])
          for name, words in (("config.json", CONFIG), ("tokenizer.json", TOKENIZER),
                              ("tokenizer_config.json", TOKENIZER), ("model.safetensors", WEIGHTS))
          for how, change in BYTES.items()]
MODELS += [(f"{name} is {what}", written(f"model/{name}", text), MODEL, [words])
           for name, words in (("config.json", CONFIG), ("tokenizer.json", TOKENIZER),
                               ("tokenizer_config.json", TOKENIZER), ("generation_config.json", "can't be loaded"))
           for what, text in JSONS.items()]
MODELS += [
    ("config.json is a folder", broken("model/config.json", "a folder"), MODEL,
     ["has neither config.json nor adapter_con"]),
    ("no tokenizer.json", broken("model/tokenizer.json", "missing"), MODEL, [TOKENIZER]),
    ("no weights", broken("model/model.safetensors", "missing"), MODEL,
     ["@/model: the weights can't be loaded: Error no"]),
    ("weights that are a folder", broken("model/model.safetensors", "a folder"), MODEL, ["model.safetensors"]),
    ("a pickle of junk", pickled("model/model.safetensors", "model/pytorch_model.bin"), MODEL,
     ["@/model: the weights can't be loaded"]),
    ("a pickle with code", with_code("model/model.safetensors", "model/pytorch_model.bin"), MODEL,
     ["@/model: the weights can't be loaded: the pickle is broken, or holds more than tensors; save the"]),
    ("an adapter with code", with_code("adapter/adapter_model.safetensors", "adapter/adapter_model.bin"), ADAPTER,
     ["holds more than tensors; save the weights as safetensors\n"]),
    ("weights in whole numbers", changed_weights("model/model.safetensors", in_whole_numbers), MODEL,
     ["@/model/model.safetensors: lm_head.weight is of I8, and weights are floating-point numbers; name the model"]),
    ("a folder that is not there", nothing_changed, ["--model_name=@/none"], ["model @/none: no such folder"]),
    ("a run in place of a model", lambda folder: [(folder / "old").mkdir(), (folder / "old/run.json").write_text("{}")],
     ["--model_name=@/old"], ["model @/old: is a run; name one of its checkpoints, @/old/checkpoint-<step>"]),
    ("a name of no hub", nothing_changed, ["--model_name=a/b/c"], ["model a/b/c: config.json can't be opened"]),
    ("a model's name too long", nothing_changed, ["--model_name=" + "x" * 5000],
     ["--model_name x", "File name too long"]),
]
MODELS += [(f"config.json: {name} {str(value)[:30]}", edited("model/config.json", **{name: value}), MODEL, [words])
           for name, value, words in [
    ("vocab_size", "x", CONFIG + ": Validation error for field 'vocab_size'"), ("vocab_size", None, CONFIG),
    ("attn_implementation", "evil/kernel", "config.json asks for attention by code from the Hub (evil/kernel)"),
    ("_attn_implementation", "evil/kernel", "take attn_implementation out of it"),
    ("vocab_size", -1, "config.json says vocab_size -1; it must be above 0"), ("vocab_size", 3.5, CONFIG),
    ("vocab_size", ..., "lm_head.weight is [300, 8] in the weights, and [32000, 8] by the config"),
    ("vocab_size", 10**30, "the weights can't be loaded"),
    ("max_position_embeddings", "x", CONFIG), ("max_position_embeddings", None, CONFIG),
    ("max_position_embeddings", 0, "max_position_embeddings 0; it must be above 0"),
    ("max_position_embeddings", -5, "max_position_embeddings -5; it must be above 0"),
    ("model_type", "nope", CONFIG), ("model_type", 3, CONFIG), ("model_type", ..., CONFIG),
    ("model_type", "bert", "@/model: lacks 28 of the model's weights, such as bert.embeddings.LayerNorm.bias"),
    ("model_type", "gpt2", "@/model: lacks"),
    ("model_type", "vit", "@/model: the weights can't be loaded: Unrecognized"),
    ("hidden_size", "x", CONFIG), ("hidden_size", -8, "negative dimension"),
    ("hidden_size", 7, "lm_head.weight is [300, 8] in the weights, and [300, 7] by the config"),
    ("num_attention_heads", 0, CONFIG), ("num_attention_heads", 3, CONFIG), ("num_hidden_layers", "x", CONFIG),
    ("num_hidden_layers", 2, "lacks 9 of the model's weights, such as model.layers.1.input_layernorm.weight"),
    ("rope_parameters", 3, CONFIG), ("hidden_act", "nope", "@/model: the weights can't be loaded: KeyError 'nope'"),
    ("num_hidden_layers", 0,
     "has 9 weights that its config.json has no place for, such as model.layers.0.input_layernorm.weight; mend"),
    ("quantization_config", {"quant_method": "gptq"}, "model @/model: its weights are quantised"),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "its weights are quantised"),
    ("quantization_config", 3, CONFIG), ("dtype", "nope", CONFIG),
]]
MODELS += [(f"tokenizer_config.json: {name} {value}", edited("model/tokenizer_config.json", **{name: value}), MODEL,
            [TOKENIZER])
           for name, value in [("tokenizer_class", 3), ("eos_token", 3), ("eos_token", {}), ("added_tokens_decoder", 3),
                               ("added_tokens_decoder", {"x": {}}), ("model_max_length", "x")]]
EXCHANGE = "@/model: a question and its answer: "
MODELS += [(f"template {text[:40]!r}", written("model/chat_template.jinja", text), MODEL,
            [EXCHANGE + words, "mend chat_template.jinja"]) for text, words in [
    ("{% for", "cannot be rendered"), ("{{ f(1) }}", "cannot be rendered by the chat template: 'f' is undefined"),
    ("{{ raise_exception('no') }}", "cannot be rendered by the chat template: no"),
    ("{{ 1 / 0 }}", "cannot be rendered"),
    ("{{ messages[9].content }}", "cannot be rendered"), ("{% include 'x' %}", "cannot be rendered"),
    ("x", "loses what the assistant says"), ("{{ messages[0].content }}", "loses what the assistant says"),
    ("\0" * 50, "loses what the assistant says"), ("{{ messages[0].content + 1 }}", "cannot be rendered"),
]]
MODELS += [("template of bytes", written("model/chat_template.jinja", b"\xff\xfe"), MODEL, [TOKENIZER])]


def beyond(token, id):
    """A change: this token of the tokenizer has this id; the model's embedding has 300 places, the tokenizer 261."""
    def change(folder):
        file = folder / "model" / "tokenizer.json"
        content = json.loads(file.read_text())
        for entry in content["added_tokens"]:
            entry["id"] = id if entry["content"] == token else entry["id"]
        content["model"]["vocab"] = {k: id if k == token else v for k, v in content["model"]["vocab"].items()}
        file.write_text(json.dumps(content))
    return change


MODELS += [(f"{token} is {id}", beyond(token, id), MODEL, [
    f"model @/model: its tokenizer gives {token!r} the id {id}, and its embedding has 300 places, from 0 (first used "
    "in @/rows.jsonl, row 0)"]) for token, id in (("2", 300), ("=", 5622))]


def without(state):
    del state["model.norm.weight"]


def longer(state):
    state["model.norm.weight"] = torch.zeros(9)


def one_bias_more(state):
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(8)


def an_output_of_another_task(state):
    state["score.weight"] = torch.zeros(2, 8)


def all_others(state):
    state.clear()
    state["a"] = torch.zeros(1)


MODELS += [(f"weights {change.__name__}", changed_weights("model/model.safetensors", change), MODEL, [words])
           for change, words in [
    (without, "@/model: lacks 1 of the model's weights, such as model.norm.weight"),
    (longer, "@/model: does not fit its config.json: model.norm.weight is [9] in the weights, and [8] by the config"),
    (one_bias_more, "@/model: has 1 weights that its config.json has no place for, such as model.layers.0.self_attn."
     "q_proj.bias; mend config.json, or save the model without them"),
    (an_output_of_another_task, "has 1 weights that its config.json has no place for, such as score.weight"),
    (all_others, "@/model: lacks 12 of the model's weights, such as lm_head.weight"),
]]


def sharded(how):
    """A change: the weights in several files, then `how(folder of the model, its index)`."""
    def change(folder):
        whole = (folder / "model" / "model.safetensors").read_bytes()
        make_model(folder / "model").save_pretrained(folder / "model", max_shard_size="1KB")
        (folder / "model" / "model.safetensors").write_bytes(whole)  # which saving removes
        file = folder / "model" / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        how(folder / "model", index)
        file.write_text(json.dumps(index))
    return change


def forgotten(place, index):
    (place / "model.safetensors").unlink()
    del index["weight_map"]["model.embed_tokens.weight"]


def renamed(place, index):
    (place / "model.safetensors").unlink()
    index["weight_map"]["model.norm.weight"] = "model-of-none.safetensors"


MODELS += [(f"weights in several files, {what}", sharded(how), MODEL, [words]) for what, how, words in [
    ("one of them missing", renamed, "No such file or directory: @/model/model-of-none.safetensors"),
    ("one of them not in the index", forgotten,
     "@/model: lacks 1 of the model's weights, such as model.embed_tokens.weight"),
    ("and in one", lambda *_: None, "model @/model: has its weights twice, in model.safetensors and in the files that"),
]]


# Adapters

NO_BASE = "@/adapter/adapter_config.json: no base_model_name_or_path can be read from it"
ADAPTERS = [(f"adapter_config.json {how}", broken("adapter/adapter_config.json", change), ADAPTER, [NO_BASE])
            for how, change in BYTES.items()]
ADAPTERS += [(f"adapter_config.json is {what}", written("adapter/adapter_config.json", text), ADAPTER, [NO_BASE])
             for what, text in JSONS.items()]
ADAPTERS += [(f"adapter_model.safetensors {how}", broken("adapter/adapter_model.safetensors", change), ADAPTER,
              ["@/adapter/adapter_model.safetensors: can't be read", "copy it anew"]) for how, change in BYTES.items()]
ADAPTERS += [(f"a manifest, and {name} flipped", listed(name, flipped), ADAPTER,
              [f"@/{name.replace('/', ': ')} is not what was written; copy the folder anew"])
             for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model/config.json",
                          "model/model.safetensors", "model/tokenizer.json")]
UNFIT = "@/adapter: does not fit its base: "
ITS = "--model_name @/adapter: adapter_config.json: "
ADAPTERS += [(f"adapter_config.json: {name} {str(value)[:30]}", edited("adapter/adapter_config.json", **{name: value}),
              ADAPTER, [words]) for name, value, words in [
    ("base_model_name_or_path", None, "base_model_name_or_path is None, not a model's name"),
    ("base_model_name_or_path", 3, "is 3, not a model's name"),
    ("base_model_name_or_path", "", "is '', not a model's n"),
    ("base_model_name_or_path", "/nowhere", "model @/adapter: its base /nowhere: config.json can't be opened"),
    ("base_model_name_or_path", "nowhere/at-all", "its base nowhere/at-all: config.json can't be opened"),
    ("base_model_name_or_path", "a\0b", "its base a\\x00b: config.json can't be opened"),
    ("base_model_name_or_path", "x" * 5000, "model @/adapter: its base xxx"),
    ("peft_type", "NOPE", "is a NOPE adapter; only LoRA"),
    ("peft_type", 3, "is a 3 adapter; only LoRA can be trained on"),
    ("peft_type", ..., "is a None adapter"), ("peft_type", "IA3", "@/adapter: is a IA3 adapter; only LoRA can be tr"),
    ("r", 0, ITS + "r is 0; it must be a whole number above 0"), ("r", "x", ITS + "r is x; it "),
    ("r", None, ITS + "r is None"),
    ("r", 2.0, ITS + "r is 2.0; it must be"), ("r", True, ITS + "r is True; it must be"),
    ("r", 4, UNFIT + "Error(s) in loading state_dict for PeftModelForCausalLM: size mismatch for base_model"),
    ("target_modules", [], UNFIT), ("target_modules", 3, ITS + "target_modules is 3; it must be a list of names"),
    ("target_modules", "(", ITS + "target_modules has '(', which is no regular expression"),
    ("target_modules", ["nope"], UNFIT + "Target modules {'nope'} not found in the base model"),
    ("target_modules", ["q_proj"], "@/adapter: has weights that its base or its adapter_config.json has no place for"),
    ("lora_alpha", "x", ITS + "lora_alpha is x; it must be a number"), ("lora_alpha", None, ITS + "lora_alpha is None"),
    ("lora_alpha", math.nan, "@/adapter: its adapter_config.json gives model.layers.0.self_attn.q_proj a "
     "scale of nan, by lora_alpha or alpha_pattern; mend it there"), ("lora_alpha", 1e308, "a scale of 5e+307, by"),
    ("lora_alpha", 0, "self_attn.q_proj a scale of 0, by lora_alpha or alpha_pattern; mend it there"),
    ("alpha_pattern", {"k_proj": math.inf}, "gives model.layers.0.self_attn.k_proj a scale of inf"),
    ("lora_dropout", "x", ITS + "lora_dropout is x; it must be at least 0 and below 1"),
    *[("lora_dropout", rate, f"{ITS}lora_dropout is {rate}; it must be at least 0 and below 1")
      for rate in (2, 1, -1, math.nan, None)],
    ("use_rslora", "false", ITS + "use_rslora is false; it must be true or false"),
    ("modules_to_save", 3, "@/adapter: its modules_to_save "),
    ("use_dora", True, "lacks 7 of the weights that its adapter_config.json asks for, such as base_model"),
    ("modules_to_save", ["lm_head"], "@/adapter"), ("task_type", "NOPE", UNFIT),
    ("rank_pattern", 3, ITS + "rank_pattern is 3"),
    ("rank_pattern", {"(": 2}, ITS + "rank_pattern has '(', which is no regular expression"),
    ("alpha_pattern", {"q_proj": "6"}, ITS + "alpha_pattern is {'q_proj': '6'}; it must be an object of names"),
    ("rank_pattern", {"q_proj": 4}, UNFIT), ("bias", "nope", "@/adapter: its bias "),
    ("init_lora_weights", "nope", UNFIT),
]]


def one_less(state):
    del state[min(state)]


def one_more(state):
    state["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 8)


def wider(state):
    state[min(state)] = torch.zeros(9, 9)


ADAPTERS += [(f"adapter's weights {change.__name__}", changed_weights("adapter/adapter_model.safetensors", change),
              ADAPTER,
              [words]) for change, words in [
    (one_less,
     "@/adapter: lacks 1 of the weights that its adapter_config.json asks for, such as base_model.model.model"),
    (one_more,
     "has weights that its base or its adapter_config.json has no place for, such as base_model.model.model.la"),
    (in_whole_numbers, "down_proj.lora_A.weight is of int8, and weights are floating-point numbers; save the adapter"),
    (wider, UNFIT + "Error(s) in loading state_dict for PeftModelForCausalLM: size mismatch"),
    (all_others, "@/adapter: lacks 14 of the weights"),
]]
ADAPTERS += [
    ("no weights of an adapter", broken("adapter/adapter_model.safetensors", "missing"), ADAPTER,
     ["model @/adapter: has adapter_config.json, but no adapter_model.safetensors"]),
    ("an adapter's weights in several files", lambda folder: (folder / "adapter" / "adapter_model.safetensors").rename(
        folder / "adapter" / "adapter_model-00001-of-00001.safetensors") and written(
            "adapter/adapter_model.safetensors.index.json", "{}")(folder), ADAPTER,
     ["model @/adapter: has adapter_config.json, but no adapter_model.safetensors"]),
    ("an adapter's pickle of junk", pickled("adapter/adapter_model.safetensors", "adapter/adapter_model.bin"), ADAPTER,
     ["@/adapter: its weights can't be read: "]),
    ("an adapter on itself", lambda folder: edited("adapter/adapter_config.json", base_model_name_or_path=str(
        folder / "adapter"))(folder), ADAPTER, ["model @/adapter: config.json can't be opened"]),
    ("an adapter on another", lambda folder: (shutil.copytree(folder / "adapter", folder / "first"), edited(
        "adapter/adapter_config.json", base_model_name_or_path=str(folder / "first"))(folder)), ADAPTER,
     ["@/adapter/adapter_config.json: base_model_name_or_path is @/first, which is an adapter itself; merge that one"]),
    ("a base of another size", lambda folder: make_model(folder / "model", hidden_size=16), ADAPTER,
     [UNFIT + "Error(s) in loading state_dict for PeftModelForCausalLM: size mismatch"]),
    ("a base with fewer layers", lambda folder: make_model(folder / "model", num_hidden_layers=0), ADAPTER, [UNFIT]),
    ("a rank that the adapter has not", nothing_changed, [*ADAPTER, "--lora_r=5"],
     ["--lora_r 5: the adapter @/adapter has 2"]),
    ("an adapter in full", nothing_changed, [*ADAPTER, "--use_lora=false"], ["@/adapter is an adapter; merge it into"]),
]


# Settings and flags

INTS = ("lora_r", "lora_alpha", "eval_size", "max_length", "max_prompt_length", "max_steps",
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "warmup_steps",
        "seed", "local_rank", "logging_steps", "eval_steps", "save_steps", "save_total_limit")
FLOATS = ("lora_dropout", "beta", "label_smoothing", "num_train_epochs", "learning_rate", "weight_decay", "adam_beta1",
          "adam_beta2", "adam_epsilon", "max_grad_norm")
NO_INTS, NO_FLOATS = ("", "x", "1.5", "1e3", "nan", "0x10"), ("", "x", "1,5")
NOT_FINITE = ("nan", "inf", "-inf", "1e400")
FLAGS = [(f"--{name}={value!r}", nothing_changed, [f"--{name}={value}"],
          [f"error: --{name}: invalid int value: {value!r}"])
         for name in INTS for value in NO_INTS]
FLAGS += [(f"--{name}={value!r}", nothing_changed, [f"--{name}={value}"], [f"--{name}: invalid float value: {value!r}"])
          for name in FLOATS for value in NO_FLOATS]
FLAGS += [(f"--{name}={value}", nothing_changed, [f"--{name}={value}"],
           [f"--{name} {float(value)}: must be a finite number"])
          for name in FLOATS for value in NOT_FINITE]
FLAGS += [(f"{what} for {flag}", nothing_changed, [f"--{flag}={value}"], [f"--{flag}", words])
          for flag, what, value, words in [
    ("seed", "5000 digits", "9" * 5000, "invalid int value"),
    ("bf16", "a word", "perhaps", ": must be true or false, found perhaps"),
    ("output_dir", "a device", "/dev/null/x", "/dev/null is a file"),
    ("cache_dir", "a device", "/dev/null/x", "can't be wr"),
    ("cache_dir", "a name too long", "@/" + "x" * 300, "File name too long"),
    ("cache_dir", "a file", "@/rows.jsonl", "can't be written to"),
    *((name, what, folder + "x" * 300, "File name too long")
      for name in ("output_dir", "resume", "deepspeed", "model_name", "train_file_path", "eval_file_path")
      for what, folder in (("a name too long", "@/"), ("a bare name too long", ""))),
    *((name, "NUL", "@/a\0b", "a\\x00b: no such file can be, since the name holds NUL or half")
      for name in ("output_dir", "resume", "deepspeed", "model_name", "eval_file_path", "cache_dir")),
    *((name, "a name that is not UTF-8", "@/a\udcff", "a\\udcff: no such file or name can be used")
      for name in ("output_dir", "cache_dir")),
    ("deepspeed", "a long name", "x" * 5000, "too long"),
    ("chat_template", "no file", "@/none.jinja", "can't be read (No such file"),
    ("chat_template", "a folder", "@/model", "can't be read"), ("chat_template", "weights", "@/model/model.safetensors",
                                                                "can't be read"),
    ("chat_template", "a device", "/dev/zero", "can't be read (is a device, not a file"),
    ("chat_template_kwargs", "half an object", '{"a": ', "can't be read as JSON"),
    ("chat_template_kwargs", "a list", "[1]", "has options of type list; they must be an object"),
    ("chat_template_kwargs", "a word", "thinking", "can't be read as JSON"),
    ("chat_template_kwargs", "what is not the template's", '{"tokenize": true}', "not the template's to decide"),
    ("train_on", "a word", "first", "invalid choice: 'first' (choose from 'all', 'last')"),
    ("lora_target_modules", "no module", "nope", "the model has no module nope; its linear layers are"),
]]
FLAGS += [(f"settings: {text[:40]!r}", written(name, text), [f"@/{name}"], [f"@/{name}", words]) for name, text,
          words in [
    ("s.yaml", "seed: &a [*a]", "not YAML or JSON"),
    ("s.yaml", "a: &a [x, x]\nseed: [*a, *a]", "unknown setting a"),
    ("s.yaml", "a\0b: 1", "not YAML or JSON"), ("s.yaml", "{a: 1}: 2", "not YAML or JSON"),
    ("s.yaml", "seed: 1\n---\nseed: 2", "not YAML or JSON"), ("s.yaml", "? [1, 2]\n: 3", "not YAML or JSON"),
    ("s.yml", "seed: {a: {b: 1}}", "seed must be a single value, found dict"), ("s.json", "[]", "found list"),
    ("s.json", "null", "found NoneType"), ("s.json", '{"seed": [1]}', "seed must be a single value, found list"),
    ("s.json", '{"": 1}', "unknown setting"),
]]
FLAGS += [(f"settings of {name} with {what}", written("s.json", text), ["@/s.json"], [words])
          for name in ("resume", "eval_file_path") for what, text, words in [
    ("NUL", f'{{"{name}": "a\\u0000b"}}', f"--{name} a\\x00b: no such file can be"),
    ("half a character", f'{{"{name}": "a\\ud800"}}', f"--{name} a\\ud800: no such file can be"),
    ("300 letters", json.dumps({name: "x" * 300}), "File name too long")]]
FLAGS += [("memory by need with stage 3", written("ds.json", '{"zero_optimization": {"stage": 3}}'),
           ["--deepspeed=@/ds.json", "--activation_memory=1"],
           ["@/ds.json: stage 3 gathers weights within", "which --activation_memory would"])]
FLAGS += [("what a GPU has left", lambda place: None, ["--activation_memory=-1"], ["only a GPU says what it has left"])]
FLAGS += [(f"DeepSpeed: {text[:80]!r}", written("ds.json", text), ["--deepspeed=@/ds.json"], ["@/ds.json", words])
          for text, words in [
    (DEEP, "not JSON"), ("\0", "not JSON"), ("null", "expected an object, found NoneType"), ('"a"', "found str"),
    ('{"zero_optimization": []}', 'is []; it must be an object, like {"stage": 0}'),
    ('{"zero_optimization": 3}', 'is 3; it must be an object, like {"stage": 0}'),
    ('{"zero_optimization": {"stage": true}}', "a stage of 0 to 3"),
    ('{"zero_optimization": {"stage": 1.0}}', "a stage of 0 to 3"),
    ('{"zero_optimization": {"stage": 4}}', "a stage of 0 to 3"), ('{"zero_optimization": {"stage": "2"}}', "0 to 3"),
    ('{"zero_optimization": {"stage": null}}', "0 to 3"), ('{"zero_optimization": {"stage": [1]}}', "0 to 3"),
    *((json.dumps({"zero_optimization": {"stage": 1} | zero}), words) for zero, words in [
        ({"offload_optimizer": []}, "offload_optimizer: Input should be"),
        ({"offload_optimizer": "cpu"}, "offload_optimizer: Input should be"),
        ({"offload_optimizer": {"device": "moon"}}, "offload_optimizer.device: Input should be"),
        ({"offload_optimizer": {"device": "nvme"}}, "use device cpu without a ratio"),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/"}}, "offload_param with device nvme needs"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "use device cpu without a ratio"),
        ({"offload_param": True}, "offload_param: Input should be"),
        ({"reduce_bucket_size": "x"}, "reduce_bucket_size: Input should be a valid"),
        ({"reduce_bucket_size": -1}, "reduce_bucket_size: Input should be greater"),
        ({"reduce_bucket_size": None}, "reduce_bucket_size: Input should be"),
        ({"overlap_comm": "x"}, "overlap_comm: Input should be"), ({"nope": 1}, "nope: Extra inputs are not permitted"),
    ]),
    *((json.dumps({name: value}), f"{name} is {json.dumps(value)}; it must be {kind}") for names, kind, values in [
        (("activation_checkpointing", "checkpoint", "aio", "flops_profiler", "fp16", "bf16"), "an object",
         ([], "fp32", 3, None)),
        (("wall_clock_breakdown", "prescale_gradients"), "true or false", ("true", [], None)),
        (("steps_per_print",), "a number above 0", ("10", True, [], -1, 0)),
    ] for name in names for value in values),
    *((json.dumps({name: value}), f"sets {name}, which train.py owns") for name, value in [
        ("data_types", {"grad_accum_dtype": "bf16"}), ("communication_data_type", "bf16"), ("gradient_clipping", 0.5),
        ("train_micro_batch_size_per_gpu", 2), ("train_batch_size", 16), ("gradient_accumulation_steps", 4)]),
    ('{"gradient_predivide_factor": 4}', "sets gradient_predivide_factor, which train.py does not support"),
    *((json.dumps({"zero_optimization": {"stage": 2, name: value}}), f"sets zero_optimization.{name}, which train.py "
       "does not support; remove it") for name, value in [
        ("legacy_stage1", True), ("zenflow", {"topk_ratio": 0.1}), ("zero_quantized_weights", True),
        ("zero_quantized_nontrainable_weights", True), ("zero_quantized_gradients", True)]),
    ('{"checkpoint": {"tag_validation": "x"}}', "invalid tag_validation value of X"),
    ('{"amp": {}}', "AMP integration has been removed"),
    ('{"compile": {"a": []}}', "a: Extra inputs"), ('{"sparse_gradients": true}', "Sparse compression"),
    ('{"tensor_parallel": {}}', "sets tensor_parallel, which train.py does not support"),
    # DeepSpeed would pass over these in silence, and train without ZeRO, or print at another step.
    ('{"zero_optimisation": {"stage": 2}}', "sets zero_optimisation, which train.py does not support; did you mean "
     "zero_optimization?"),
    ('{"steps_per_prnt": 10}', "did you mean steps_per_print?"), ('{"_comment": "x"}', "sets _comment, which"),
    # So it would within blocks that it has no model of.
    *((json.dumps({block: {"nope": 1}}), f"sets {block}.nope, which DeepSpeed does not know; remove it") for block in (
        "activation_checkpointing", "aio", "checkpoint", "flops_profiler", "timers")),
    ('{"checkpoint": {"parallel_write": {"pipeline_stag": 1}, "writer": null, "tag_validaton": "Warn"}}',
     "sets checkpoint.parallel_write.pipeline_stag (did you mean checkpoint.parallel_write.pipeline_stage?), "
     "checkpoint.tag_validaton (did you mean checkpoint.tag_validation?), which DeepSpeed does not know"),
    ('{"timers": {"throughput": {"nope": 1}}}', "nope: Extra inputs"),
    ('{"csv_monitor": {"nope": 1}}', "csv_monitor.nope: Extra inputs"),
    ('{"comms_logger": {"nope": 1}}', "nope: Extra inputs"),
    ('{"timers": []}', "timers is []; it must be an object"), ('{"dump_state": "no"}', 'is "no"; it must be true or'),
]]

CASES = [*VALUES, *FILES, *MODELS, *ADAPTERS, *FLAGS]


def make_model(folder, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 1, "max_position_embeddings": 100}
    model = LlamaForCausalLM(LlamaConfig(**size | changes))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A folder with a model, an adapter on it, a cache and good rows."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("good")
    model = make_model(folder / "model")
    tiny_tokenizers.chatml().save_pretrained(folder / "model")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    (folder / "cache").mkdir()
    jsonl(GOOD)(folder)
    return folder


@pytest.mark.parametrize("token, id", [("2", 299), ("Q", 5622)])
def test_an_id_beyond_the_embedding_that_no_row_uses(token, id, good, tmp_path):
    """The embedding's last place, and an entry that only the tokenizer has: both are as good as any."""
    folder = copied(good, tmp_path / "folder")
    beyond(token, id)(folder)
    source = open_source(str(folder / "model"), False)
    args = TrainArguments(model_name="m", train_file_path=str(folder / "rows.jsonl"))
    data, _, _ = load_data(args, source)
    assert max(data.examples[0].chosen) < 300 and max(source.tokenizer.get_vocab().values()) == max(id, 260)


@pytest.mark.parametrize("change, flags, words", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_malformed_input(good, tmp_path, change, flags, words, monkeypatch, capfd):
    """Each is found before training begins, said in one line with its place, and leaves nothing behind."""
    def went_on(*_):
        raise AssertionError("the wrong input was not found")

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("nanodpo.ranks.distributed.join_ranks", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(train, "make_engine", went_on)
    folder = copied(good, tmp_path / "folder")
    edited("adapter/adapter_config.json", base_model_name_or_path=str(folder / "model"))(folder)
    change(folder)
    flags = [flag.replace("@", str(folder)) for flag in flags]
    settings = [flag for flag in flags if not flag.startswith("-")]
    default = [f"--{name}={folder / place}" for name, place in (
        ("model_name", "model"), ("train_file_path", "rows.jsonl"), ("output_dir", "out"), ("cache_dir", "cache"))]
    flags = [*settings, *default, *(flag for flag in flags if flag not in settings)]
    said = refused(train.main, flags, folder, monkeypatch, capfd, chatter=r"(data .*\n)?")
    for part in words:
        assert part.replace("@", str(folder)) in said
