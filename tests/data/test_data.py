"""Every format gives the same texts: prompt up to the assistant's header, responses with exactly one end of turn."""

import csv
import http.server
import itertools
import json
import os
import re
import tempfile
import threading

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny

from nanodpo.data import places, text_files
from nanodpo.data import rows as rows_module
from nanodpo.data.messages import as_messages
from nanodpo.data.places import hub_parts, with_split
from nanodpo.data.rows import read_rows
from nanodpo.data.shapes import Columns, choose_columns, describe_columns, unread_parts
from nanodpo.data.template import read_template
from nanodpo.data.texts import render_more, render_row
from nanodpo.data.transcripts import close_turn, leads_to_keep, prompt_leads
from nanodpo.errors import UserError

SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
ASKED = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
USER, YES, NO = ({"role": "user", "content": "How many?"}, {"role": "assistant", "content": "four"},
                 {"role": "assistant", "content": "five"})


@pytest.fixture(scope="module")
def chatml():
    return read_template(tiny.chatml())


def render(template, prompt, chosen, rejected=None):
    text = render_row(template, 0, prompt, chosen, rejected, has_rejected=rejected is not None)
    return text.prompt, text.chosen, text.rejected


def error_of(template, *values):
    with pytest.raises(UserError) as caught:
        render(template, *values)
    return str(caught.value)


# The template


def test_header_and_end_are_read_off_the_template(chatml):
    assert (chatml.header, chatml.end) == ("<|im_start|>assistant\n", "<|im_end|>")
    assert chatml.openings == ("<|im_start|>user", "<|im_start|>system")
    llama = read_template(tiny.llama())
    assert (llama.header, llama.end) == ("<|h|>assistant<|/h|>\n\n", "<|eot|>")
    assert llama.openings == ("<|h|>user<|/h|>", "<|h|>system<|/h|>")


def test_a_base_models_template_closes_turns_with_its_own_token_not_eos():
    template = read_template(tiny.base_chatml())
    assert template.end == "<|im_end|>" and template.tokenizer.eos_token == "<|endoftext|>"


def test_of_two_tokens_after_a_turn_the_first_ends_it():
    """A template that writes the eos behind the turn's own end."""
    tokenizer = tiny.base_chatml()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert tokenizer.all_special_tokens == ["<|endoftext|>", "<|im_end|>"]
    tokenizer.chat_template = tiny.CHATML.replace("<|im_end|>\n", "<|im_end|><|endoftext|>\n")
    assert read_template(tokenizer).end == "<|im_end|>"


def test_without_a_template_the_eos_ends_and_there_is_no_header():
    template = read_template(tiny.plain())
    assert (template.header, template.end, template.openings) == (None, "<|endoftext|>", ())


def test_no_template_and_no_eos_is_an_error():
    tokenizer = tiny.plain()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="set its eos_token"):
        read_template(tokenizer)


def test_a_template_that_refuses_system_turns_is_read_all_the_same():
    tokenizer = tiny.chatml()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusal + tiny.CHATML
    assert read_template(tokenizer).openings == ("<|im_start|>user",)


@pytest.mark.parametrize("text, closed", [
    ("four", "four<e>"), ("four<e>", "four<e>"), ("four<e>\n", "four<e>"), ("four<e><e>", "four<e>"),
    ("four<e>\n<e> \n", "four<e>"), ("four \n", "four \n<e>"), (" four<e>", " four<e>"),
])
def test_exactly_one_end_of_turn(text, closed):
    assert close_turn(text, "<e>")[0] == closed


def test_another_tokens_end_is_no_end_of_turn():
    """It goes, and the turn's own is added: both are said."""
    assert close_turn("four</s>", "<e>", "</s>") == ("four<e>", True, True)


# The paper's format: whole transcripts


def test_transcripts_split_at_the_last_assistant_header(chatml):
    """The sides' ends differ by a newline, which is no news: most templates write one."""
    text = render_row(chatml, 7, "How many?", SYSTEM + ASKED + "<|im_start|>think\nfour<|im_end|>\n",
                      SYSTEM + ASKED + "<|im_start|>think\nfive<|im_end|>", True)
    assert text.prompt == SYSTEM + ASKED
    assert (text.chosen, text.rejected) == ("<|im_start|>think\nfour<|im_end|>", "<|im_start|>think\nfive<|im_end|>")
    assert text.row == 7 and text.notes == ()


def test_a_question_that_is_not_the_transcripts_is_noted(chatml):
    """Half of the paper's rows."""
    text = render_row(chatml, 0, "Which number?", ASKED + "four<|im_end|>", ASKED + "five<|im_end|>", True)
    assert text.prompt == ASKED
    assert set(text.notes) == {"prompt column differs from the transcript's prompt (the transcript is used)"}


def test_of_several_assistant_turns_only_the_last_is_scored(chatml):
    first = ASKED + "four<|im_end|>\n" + ASKED
    assert render(chatml, None, first + "4<|im_end|>", first + "5<|im_end|>") == (first, "4<|im_end|>", "5<|im_end|>")


@pytest.mark.parametrize("tail", ["<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n",  # ends in a user turn
                                  "<|im_end|>\n<|im_start|>user\nSure?",
                                  "\n<|im_start|>user\nSure?<|im_end|>",  # the assistant's turn is not even closed
                                  "\n<|im_start|>system\nBe brief.<|im_end|>\n"])
def test_no_other_turn_is_ever_scored(chatml, tail):
    assert "chosen" in error_of(chatml, None, ASKED + "four" + tail, ASKED + "five<|im_end|>")
    assert "rejected" in error_of(chatml, None, ASKED + "four<|im_end|>", ASKED + "five" + tail)
    assert "chosen" in error_of(chatml, ASKED, "four" + tail, "five<|im_end|>")


def test_a_foreign_transcript_names_the_header_that_was_looked_for(chatml):
    message = error_of(chatml, None, "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>", "x")
    assert repr("<|im_start|>assistant\n") in message and "--assistant_header" in message
    message = error_of(read_template(tiny.llama()), "Q", ASKED + "four<|im_end|>", ASKED + "five<|im_end|>")
    assert "'<|im_start|>'" in message and repr("<|h|>assistant<|/h|>\n\n") in message


def test_assistant_header_splits_a_foreign_transcript():
    template = read_template(tiny.plain(), "\n\nAssistant:")
    human = "\n\nHuman: How many?\n\nAssistant:"
    assert render(template, None, human + " four", human + " five") == (
        human, " four<|endoftext|>", " five<|endoftext|>")


def test_a_transcript_must_ask_something(chatml):
    assert "no turn before" in error_of(chatml, "2+2?", "<|im_start|>assistant\nfour<|im_end|>")


def test_prompts_of_the_sides_must_be_equal(chatml):
    message = error_of(chatml, None, ASKED + "four<|im_end|>", SYSTEM + ASKED + "five<|im_end|>")
    assert "prompts of chosen and rejected differ: 'user" in message and "'system" in message


def test_prompts_that_differ_only_in_white_space_are_named_so(chatml):
    spaced = {"role": "user", "content": "How many? "}
    message = error_of(chatml, None, [USER, YES], [spaced, NO])
    assert "prompts of chosen and rejected differ only in white space; strip the prompts in the data" in message


# TRL's formats


@pytest.mark.parametrize("ending", ["", "<|im_end|>", "<|im_end|>\n"])
def test_strings_get_an_end_only_where_they_have_none(chatml, ending):
    assert render(chatml, "2+2=", "4" + ending, "5" + ending) == ("2+2=", "4<|im_end|>", "5<|im_end|>")


def test_a_base_models_plain_strings_end_with_eos_and_its_chats_with_the_templates_end():
    base = read_template(tiny.base_chatml())
    assert render(base, "2+2=", "4")[1] == "4<|endoftext|>"
    assert render(base, "2+2=", "4<|im_end|>\n")[1] == "4<|im_end|>"
    assert render(base, ASKED, "4")[1] == "4<|im_end|>"
    assert render(base, None, ASKED + "4<|im_end|>\n<|endoftext|>")[1] == "4<|im_end|>"
    assert render(base, None, [USER, YES])[1] == "four<|im_end|>"


@pytest.mark.parametrize("prompt, chosen, rejected", [
    ([USER], [YES], [NO]),  # explicit prompt
    (None, [USER, YES], [USER, NO]),  # implicit prompt
    ("How many?", [USER, YES], [USER, NO]),  # UltraFeedback
    ([USER], [USER, YES], [USER, NO]),  # the prompt twice
    ([USER], "four", "five"),
    (ASKED, "four", "five<|im_end|>\n"),  # rendered
    (ASKED, ASKED + "four<|im_end|>", ASKED + "five<|im_end|>"),  # rendered twice
    ("<|im_start|>user\nHow many?<|im_end|>\n", "<|im_start|>assistant\nfour<|im_end|>",
     "<|im_start|>assistant\nfive<|im_end|>"),
])
def test_every_format_gives_the_same_texts(chatml, prompt, chosen, rejected):
    text = render_row(chatml, 0, prompt, chosen, rejected, True)
    assert (text.prompt, text.chosen, text.rejected) == (ASKED, "four<|im_end|>", "five<|im_end|>")
    assert not any("differs" in note for note in text.notes)


@pytest.mark.parametrize("said, noted", [
    ("four", False), ("four \n", False),  # the newline after the turn is the template's, white space before it is kept
    ("four<|im_end|>", True), ("four<|im_end|>\n", True),  # the template closes it once more
])
def test_of_messages_only_what_the_user_wrote_is_noted(chatml, said, noted):
    """A note about every row of conversational data would say nothing about any."""
    talk = [USER, {"role": "assistant", "content": said}]
    for values in ((None, talk, [USER, NO]), ([USER], talk[1:], [NO])):
        text = render_row(chatml, 0, *values, True)
        assert text.chosen == said.replace("<|im_end|>\n", "").replace("<|im_end|>", "") + "<|im_end|>"
        ends = ("one side alone ends in white space",) * (said == "four \n")
        assert text.notes == ("chosen: a second end of the turn is left out",) * noted + ends


@pytest.mark.parametrize("prompt, chosen, plain", [
    ("How many?", "four", True), ("How many? <|im_end|>", "four", True), ("assistant", "four", True),
    ([USER], "four", False), ([USER], [YES], False), (None, [USER, YES], False), ("How many?", [USER, YES], False),
    (ASKED, "four", False), (ASKED + "<think>\n", "four", False), (ASKED.rstrip(), "four", False),
    ("How many?", ASKED + "four", False), ("<|im_start|>user\nHow many?<|im_end|>\n", "four", False),
    ("[INST] How many? [/INST]", "four", False),  # another model's template is no plain text
])
def test_plain_text_for_a_chat_model_is_noted(chatml, prompt, chosen, plain):
    text = render_row(chatml, 0, prompt, chosen, None, False)
    assert ("plain text, without the chat template" in text.notes) == plain
    if isinstance(prompt, str) and isinstance(chosen, str) and ASKED not in chosen:  # a model without a template
        assert not any("plain" in note for note in render_row(read_template(tiny.plain()), 0, prompt, chosen, None,
                                                              False).notes)


def test_sft_rows_have_no_rejected(chatml):
    for prompt, chosen in ((None, [USER, YES]), ([USER], [YES]), (None, ASKED + "four<|im_end|>\n"), (ASKED, "four")):
        assert render(chatml, prompt, chosen) == (ASKED, "four<|im_end|>", None)


def test_none_keys_of_arrow_are_dropped():
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% if m.tools is defined %}{{ m.tools }}{% endif %}")
    messages = [message | {"tools": None} for message in (USER, YES)]
    assert render(read_template(tokenizer), None, messages) == (ASKED, "four<|im_end|>", None)
    assert render(read_template(tokenizer), messages[:1], "four") == (ASKED, "four<|im_end|>", None)


def test_a_response_may_begin_with_the_templates_token(chatml):
    """As the paper's traces do: <|im_start|>think is no turn."""
    assert render(chatml, ASKED, "<|im_start|>think\nfour")[:2] == (ASKED, "<|im_start|>think\nfour<|im_end|>")


def test_nothing_may_follow_the_end_of_turn(chatml):
    assert "goes on after its end of turn '<|im_end|>'" in error_of(chatml, None, ASKED + "four<|im_end|>\nmore")


def test_a_rendered_prompt_stays_when_the_response_has_several_turns(chatml):
    """The reply's own first turn goes to the prompt, nothing of the prompt is lost."""
    more = "four<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert render(chatml, ASKED, more)[:2] == (ASKED + more[: -len("yes<|im_end|>")], "yes<|im_end|>")


@pytest.mark.parametrize("values, words", [
    ((None, [YES, USER]), "must end with an assistant message, ends with role 'user'"),
    ((None, [YES]), "no message before"),
    (([USER], [{"role": "assistant", "content": [{"type": "text"}]}]), "chosen"),
    (([{"role": "user"}], [YES]), "chosen"),
    ((None, "four"), "--prompt_field"), (("", "four"), "empty prompt"), ((3, "four"), "of type int"),
    (("Q", ""), "chosen is empty"), (("Q", " \n"), "chosen is empty"), (("Q", "<|im_end|>\n"), "chosen is empty"),
    (("Q", None), "chosen is missing"), (("Q", 4), "chosen is of type int"), (("Q", []), "an empty list"),
    (("Q", ["a"]), "of type list"), (("Q", "4", 5), "rejected is of type int"),
    ((None, ASKED), "chosen is empty"),
    (("Q", {"from": "gpt", "value": "4"}), "chosen is of type dict with from, value where messages have role and "
     "content (name them so; ShareGPT's human is user, and its gpt assistant), not text"),
    (([{"from": "human", "value": "Q"}], "4"), "chosen has a prompt that is of type list with from, value where"),
    (("Q", YES), "chosen is of type dict, one message: put it into a list"),
    (("Q", [YES, {"content": "4"}]), "chosen is of type list, some of it without a role"),
])
def test_bad_rows_say_which_side_and_why(values, words):
    """A template that joins contents as text shows what a content of another type does."""
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace("{{ m['content'] }}", "{{ m['content'] + '' }}")
    assert words in error_of(read_template(tokenizer), *values)


def test_a_template_that_opens_a_block_only_for_the_prompt_is_scored_as_it_writes_the_conversation():
    """As those that open a thinking block, and drop it from the conversation: cut where the two begin to differ."""
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    template = read_template(tokenizer)
    text = render_row(template, 0, None, [USER, YES], [USER, NO], True)
    assert (text.prompt, text.chosen, text.rejected) == (ASKED, "four<|im_end|>", "five<|im_end|>")
    assert text.notes == ("the chat template opens an answer with '<think>\\n', and not once it is in the "
                          "conversation; scored as in the conversation",) * 2
    assert (template.header, template.written) == (f"{template.written}<think>\n", "<|im_start|>assistant\n")
    for header in (template.header, template.written):  # transcripts of both forms
        prompt = ASKED.replace(template.written, header)
        assert render(template, None, prompt + "four<|im_end|>\n") == (prompt, "four<|im_end|>", None)


def test_a_template_that_rewrites_the_question_is_refused():
    tokenizer = tiny.chatml()
    tokenizer.chat_template = ("{% if messages[-1].role == 'assistant' %}Answered.{% endif %}" + tiny.CHATML)
    message = error_of(read_template(tokenizer), None, [USER, YES])
    assert "chosen the chat template writes what is before the reply differently once the reply is there" in message


def test_the_leads_of_prompts_end_at_their_first_user_turn(chatml):
    """Every form once, plain text last; later turns are no lead."""
    talk = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nWhich?<|im_end|>\n"
    texts = [SYSTEM + talk + ASKED, talk + ASKED, "How many?", SYSTEM + ASKED]
    assert prompt_leads(chatml, [chatml.tokenizer(text).input_ids for text in texts]) == ["", SYSTEM, None]


def test_leads_of_thousands_of_rows_are_not_kept():
    """A megabyte of them is, and more is not: each row has its own there."""
    few = [f"{i:03}" * 1000 for i in range(300)] + [None]
    assert leads_to_keep(few) == few and leads_to_keep([f"{i:03}" * 1000 for i in range(400)]) is None


def test_messages_without_a_chat_template_are_refused():
    assert "no chat template" in error_of(read_template(tiny.plain()), None, [USER, YES])
    assert "no chat template" in error_of(read_template(tiny.plain()), [USER], "four")


# Files

ROWS = [{"prompt": "1+1=", "chosen": "2", "rejected": "007"}, {"prompt": "Any?", "chosen": "None", "rejected": "NA"},
        {"prompt": "两个？", "chosen": "二\n", "rejected": "\\frac{1}{2}"}]


def fields(rows, pairs=True, **flags):
    """The columns of prompt, chosen and rejected."""
    return choose_columns("d", rows, tiny.DataArguments(**flags), pairs).fields


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.csv", "odd [name]*.jsonl"])
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    """A CSV's "007", "None" and "NA" are text like any other."""
    assert read_rows(write(tmp_path / name, ROWS)) == ROWS


def packed(file, suffix):
    """The same file under this ending, by the program of that name or its library."""
    import bz2
    import gzip
    import lzma

    content, other = file.read_bytes(), file.with_name(file.name + suffix)
    if suffix == ".zst":
        with pa.output_stream(other, compression="zstd") as out:
            out.write(content)
    else:
        other.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content))
    return other


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_packed_text_files_are_read_as_they_are(name, suffix, tmp_path):
    write(tmp_path / name, ROWS)
    file = packed(tmp_path / name, suffix)
    assert read_rows(str(file)) == ROWS
    file.write_bytes(file.read_bytes()[:-9])  # not all of it came
    with pytest.raises(UserError, match=f"{name}{suffix}"):
        read_rows(str(file))


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_that_is_not_utf8_names_the_line(name, suffix, tmp_path):
    """Latin-1 in line 2,001, far behind what is read and decoded at once."""
    head, row, last = {"a.jsonl": ("", '{"prompt": "ä"}\n', '{"prompt": "ä"}\n'), "a.csv": ("prompt\n", "ä\n", "ä\n"),
                       "a.json": ("[\n", '{"prompt": "ä"},\n', '{"prompt": "ä"}]\n')}[name]
    text = head + row * (2000 - bool(head))
    (tmp_path / name).write_bytes(text.encode() + last.encode("latin-1"))
    file = packed(tmp_path / name, suffix) if suffix else tmp_path / name
    with pytest.raises(UserError, match=f"{name}{suffix}, line 2001: is not UTF-8.*; `iconv -f"):
        read_rows(str(file))


def test_a_small_file_that_unpacks_to_a_long_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LINE", 50_000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x" * 100_000}))
    file = packed(tmp_path / "a.jsonl", ".gz")
    assert file.stat().st_size < 1000
    with pytest.raises(UserError, match="a.jsonl.gz, line 1: has more than 50,000 characters; no row is so long"):
        read_rows(str(file))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}.get)
    (tmp_path / "a.json").write_text("[\n" + "1,\n" * 50_000 + "1]")
    with pytest.raises(UserError, match="a.json.gz: is one JSON value of more than 25,600 characters; write a row"):
        read_rows(str(packed(tmp_path / "a.json", ".gz")))


def test_files_of_other_names(tmp_path):
    """.ndjson is JSON lines, .tsv has tabs between the fields; .arrow is a stream, as datasets keeps it, or Feather."""
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "a.ndjson", ROWS)
    (tmp_path / "a.tsv").write_text("prompt\tchosen\trejected\n1+1=\t2,\t007\n")
    assert read_rows(str(tmp_path / "a.ndjson")) == ROWS
    assert read_rows(str(tmp_path / "a.tsv")) == [ROWS[0] | {"chosen": "2,"}]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    stream, = (tmp_path / "saved").glob("*.arrow")
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as out:
        out.write_table(table, max_chunksize=2)
    assert read_rows(str(stream)) == read_rows(str(tmp_path / "file.arrow")) == ROWS
    (tmp_path / "file.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(UserError, match="file.arrow: can't be read as a data set"):
        read_rows(str(tmp_path / "file.arrow"))
    packed(tmp_path / "a.tsv", ".gz").rename(tmp_path / "a.parquet.gz")
    with pytest.raises(UserError, match="a.parquet.gz: unpack it first; .parquet files are packed inside"):
        read_rows(str(tmp_path / "a.parquet.gz"))


@pytest.mark.parametrize("how", ["columns", "split", "table", "list"])
def test_json_by_column_is_refused(how, tmp_path):
    """As pandas' to_json writes a table unless told to write records, and json.dumps a dict of lists. One row of
    messages, whose sides are lists too, is read."""
    table, file = pandas.DataFrame([row | {"chosen": str(i)} for i, row in enumerate(ROWS)]), tmp_path / "a.json"
    file.write_text(json.dumps(table.to_dict("list")) if how == "list" else table.to_json(orient=how))
    with pytest.raises(UserError, match="a.json: has a list for each column; .*orient='records'"):
        read_rows(str(file))
    table.to_json(file, orient="records")
    assert len(read_rows(str(file))) == len(ROWS)
    talk = [{"role": "user", "content": "Hi"}]
    row = {"prompt": talk, "chosen": [{"role": "assistant", "content": "Hello"}], "rejected": talk}
    file.write_text(json.dumps(row))
    assert read_rows(str(file)) == [row]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz"])
def test_a_folder_as_the_hub_has_it(suffix, tmp_path):
    """Its files by split, as their names say; what is not data lies beside them. One split may be named."""
    for name, rows in (("train-00000-of-00002", ROWS[:1]), ("train-00001-of-00002", ROWS[1:2]),
                       ("test-00000-of-00001", ROWS[2:])):
        file = tmp_path / "repo" / "data" / (name + suffix.removesuffix(".gz"))
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, rows)
        if suffix.endswith(".gz"):
            packed(file, ".gz")
            file.unlink()
    folder = tmp_path / "repo"
    (folder / "README.md").write_text("About.")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"repo: holds several splits \(train, test\); name one, like .*repo::train"):
        read_rows(str(folder))
    assert read_rows(f"{folder}::train") == ROWS[:2] and read_rows(f"{folder}::test") == ROWS[2:]
    assert read_rows(f"{tmp_path}:repo:test") == ROWS[2:]  # a folder of folders
    with pytest.raises(UserError, match="repo: has no split 'dev'; it has train, test"):
        read_rows(f"{folder}::dev")
    for file in (folder / "data").glob("test*"):
        file.unlink()
    assert read_rows(str(folder)) == ROWS[:2]
    with pytest.raises(UserError, match="huggingface: is a folder without data files"):
        (folder / ".cache" / "huggingface" / "x.json").unlink()
        read_rows(str(folder / ".cache" / "huggingface"))


def test_a_folder_is_the_one_that_was_named(tmp_path):
    """Not the one that its name would be as a pattern."""
    for name, rows in (("run[1]", ROWS[:1]), ("run1", ROWS[1:]), ("why?", ROWS[2:]), ("whys", ROWS[:2])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", rows)
    assert read_rows(str(tmp_path / "run[1]")) == ROWS[:1] and read_rows(str(tmp_path / "why?")) == ROWS[2:]
    assert len(places.contents(str(tmp_path / "run[1]"))) == 1


@pytest.mark.parametrize("taken, split, left", [
    ("pairs_test.jsonl", "test", "pairs.jsonl"), ("my-eval-set.jsonl", "test", "preferences.jsonl"),
    ("train.jsonl", "train", "more.jsonl")])
def test_a_file_of_a_folder_that_would_not_be_read_is_named(taken, split, left, tmp_path):
    """Of a folder datasets takes the files alone whose names have a split's word, where there are such. Files of
    another kind, and hidden ones, are something else."""
    write(tmp_path / taken, ROWS[:1])
    (tmp_path / "notes.csv").write_text("a\n1\n")
    write(tmp_path / ".hidden.jsonl", ROWS)
    assert read_rows(str(tmp_path)) == ROWS[:1]
    write(tmp_path / left, ROWS)
    with pytest.raises(UserError, match=f"{taken} would be the split {split}, and {left} of none; name the files"):
        read_rows(str(tmp_path))
    assert read_rows(f"{tmp_path / left},{tmp_path / taken}") == ROWS + ROWS[:1]
    assert read_rows(f"{tmp_path}::{split}") == ROWS[:1]  # asked for


def test_a_folder_of_files_that_are_called_as_their_splits(tmp_path):
    for name, rows in (("train", ROWS[:1]), ("test", ROWS[1:])):
        write(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(UserError, match=r"holds several splits \(train, test\); name one, like .*::train"):
        read_rows(str(tmp_path))
    assert read_rows(f"{tmp_path}::test") == ROWS[1:]


def test_urls_are_read_as_files_and_folders_are(tmp_path, monkeypatch):
    """By fsspec, here from its file system in memory: a file, a packed one, a glob, a folder of splits, several.
    Nothing of them stays, mistakes name the URL, and a run keeps the name as it is."""
    fsspec = pytest.importorskip("fsspec")
    place = fsspec.filesystem("memory")
    write(tmp_path / "a.jsonl", ROWS)
    for name, rows in (("a.jsonl", ROWS[:1]), ("b.jsonl", ROWS[1:]), ("data/train-0.jsonl", ROWS[:2]),
                       ("data/test-0.jsonl", ROWS[2:])):
        place.pipe(f"/urls/{name}", "".join(json.dumps(row) + "\n" for row in rows).encode())
    place.pipe("/urls/a.jsonl.gz", packed(tmp_path / "a.jsonl", ".gz").read_bytes())
    place.pipe("/urls/bad.jsonl", b'{"prompt": 1}\n[')
    fsspec.register_implementation("absent", "no_such_package.System", clobber=True, errtxt="Install it")
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    for name, found in (("urls/a.jsonl", ROWS[:1]), ("urls/a.jsonl.gz", ROWS), ("urls/?.jsonl", ROWS),
                        ("urls/data::test", ROWS[2:]), (f"urls/b.jsonl,{tmp_path / 'a.jsonl'}", ROWS[1:] + ROWS)):
        assert read_rows(f"memory://{name}") == found, name
    assert read_rows(with_split("memory://urls/data", "train", "--split")) == ROWS[:2]
    assert places.absolute("memory://urls/a.jsonl") == "memory://urls/a.jsonl"
    assert places.contents("memory://urls/a.jsonl") is None
    for name, words in (("memory://urls/none.jsonl", "^memory://urls/none.jsonl: no such file"),
                        ("memory://urls/none/*.jsonl", "none/.*: no such file"),
                        ("memory://urls/bad.jsonl", "^memory://urls/bad.jsonl, line 2: can't be read as JSON"),
                        ("memory://urls/data", "^memory://urls/data: holds several splits .* memory://urls/data::"),
                        ("nothing://urls/a.jsonl", "^nothing://urls/a.jsonl: can't be fetched .Protocol not known"),
                        ("absent://urls/a.jsonl", "^absent://urls/a.jsonl: can't be fetched .Install it")):
        with pytest.raises(UserError, match=words):
            read_rows(name)
    with pytest.raises(UserError, match="^--split b: memory://urls/data::test names a split already"):
        with_split("memory://urls/data::test", "b", "--split")
    assert not [*(tmp_path / "temp").iterdir()]


@pytest.mark.parametrize("library", ["httpx", "httpx2"])  # by one of which huggingface_hub reaches hf://
def test_a_url_that_can_not_be_reached_is_one_line(library):
    fsspec, client = pytest.importorskip("fsspec"), pytest.importorskip(library)

    class Away(fsspec.AbstractFileSystem):
        def get(self, *paths, **how):
            raise client.ConnectError("no such host")

    fsspec.register_implementation("away", Away, clobber=True)
    with pytest.raises(UserError, match="^away://urls/a.jsonl: can't be fetched .no such host"):
        read_rows("away://urls/a.jsonl")


def test_several_files_with_commas_between(tmp_path):
    """In the order in which they are named, of any kinds; a comma may also be a part of a file's name."""
    first, second = write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.parquet", ROWS[1:])
    assert read_rows(f"{second}, {first}") == ROWS[1:] + ROWS[:1]
    assert read_rows(write(tmp_path / "a,b.jsonl", ROWS)) == ROWS
    write(tmp_path / "c.jsonl", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(UserError, match="c.jsonl: has the columns prompt, chosen, and .*a.jsonl has prompt, chosen"):
        read_rows(f"{first},{tmp_path / 'c.jsonl'}")
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        read_rows(f"{first},{tmp_path / 'none.jsonl'}")


def test_files_may_have_their_columns_in_any_order(tmp_path):
    """Columns are found by name: files that programs of two kinds have written are one data set."""
    turned = [dict(reversed(row.items())) for row in ROWS]
    files = [write(tmp_path / f"{name}.parquet", rows) for name, rows in (("a", ROWS), ("b", turned))]
    assert read_rows(str(tmp_path / "*.parquet")) == ROWS + turned
    files.append(write(tmp_path / "c.jsonl", turned))
    assert read_rows(",".join(map(str, files))) == ROWS + turned + turned


def test_a_run_keeps_the_names_of_its_data_so_that_they_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "folder").mkdir()
    for name, kept in (("a.jsonl", "@/a.jsonl"), ("a.jsonl, a.jsonl", "@/a.jsonl,@/a.jsonl"), ("*.jsonl", "@/*.jsonl"),
                       ("folder::test", "@/folder::test"), ("org/pairs:a:b[:9]", "org/pairs:a:b[:9]"),
                       ("folder,org/pairs", "@/folder,org/pairs")):
        assert places.absolute(name) == kept.replace("@", str(tmp_path))


@pytest.mark.parametrize("name, given", [
    ("org/pairs", ("org/pairs", None, "train", None)),
    ("org/pairs::train_prefs", ("org/pairs", None, "train_prefs", None)),
    ("org/pairs:main", ("org/pairs", "main", "train", None)),
    ("org/pairs:main:train[:10%]", ("org/pairs", "main", "train[:10%]", None)),
    ("org/pairs:main:train[10:20]+test", ("org/pairs", "main", "train[10:20]+test", None)),
    ("org/pairs@v1.0:main:test", ("org/pairs", "main", "test", "v1.0")),
    ("org/pairs@refs/convert/parquet", ("org/pairs", None, "train", "refs/convert/parquet")),
    ("squad", ("squad", None, "train", None)),
])
def test_a_data_set_of_the_hub_is_asked_for_as_datasets_names_it(name, given, monkeypatch, tmp_path):
    datasets, asked = pytest.importorskip("datasets"), []

    def load_dataset(path, config=None, split=None, revision=None):
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows(name) == ROWS and asked == [given]
    for missing in ("./org/pairs", "a/b/c", "rows.jsonl", "rows*.parquet", "rows.jsonl.gz", "rows.json::train"):
        with pytest.raises(UserError, match="no such file"):
            read_rows(missing)
    assert len(asked) == 1


@pytest.mark.parametrize("name, mark, wanted", [("a.csv", ";", ","), ("a.csv", "\t", ","), ("a.tsv", ",", "\t")])
def test_a_csv_with_another_delimiter(tmp_path, name, mark, wanted):
    """As spreadsheets write them in many countries: its one column would be refused for its name."""
    (tmp_path / name).write_text(f"prompt{mark}chosen{mark}rejected\n1{mark}2{mark}3\n")
    with pytest.raises(UserError, match=re.escape(f"the first line has {mark!r} between names, not {wanted!r}")):
        read_rows(str(tmp_path / name))


def test_a_csv_of_numbers_is_text(tmp_path):
    assert read_rows(write(tmp_path / "a.csv", [{"prompt": "1", "chosen": "2", "rejected": "3"}])) == [
        {"prompt": "1", "chosen": "2", "rejected": "3"}]
    (tmp_path / "c.csv").write_text('"a, b"\n1\n')  # a comma within a name
    assert read_rows(str(tmp_path / "c.csv")) == [{"a, b": "1"}]
    (tmp_path / "b.csv").write_text("\n\nprompt,chosen,rejected\n\n1,2,3\n")  # empty lines are none
    assert read_rows(str(tmp_path / "b.csv")) == [{"prompt": "1", "chosen": "2", "rejected": "3"}]


def test_a_glob_reads_its_files_in_the_order_of_their_names(tmp_path):
    for name, row in zip(("b.jsonl", "a.jsonl", "c.jsonl"), ROWS):
        write(tmp_path / name, [row])
    assert read_rows(str(tmp_path / "*.jsonl")) == [ROWS[1], ROWS[0], ROWS[2]]


def test_messages_survive_parquet_and_json(tmp_path):
    rows = [{"chosen": [USER, YES], "rejected": [USER, NO]}, {"chosen": [USER, NO], "rejected": [USER, YES]}]
    for name in ("a.parquet", "a.jsonl"):
        assert read_rows(write(tmp_path / name, rows)) == rows


def test_a_folder_of_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert read_rows(str(tmp_path / "saved")) == read_rows(str(tmp_path / "splits")) == ROWS
    datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS[:1]), "b": datasets.Dataset.from_list(ROWS[1:])}
                         ).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"two: holds several splits \(a, b\); name one, like .*/two::a"):
        read_rows(str(tmp_path / "two"))
    assert read_rows(f"{tmp_path / 'two'}::b") == ROWS[1:]
    with pytest.raises(UserError, match="two: has no split 'c'; it has a, b, like"):
        read_rows(f"{tmp_path / 'two'}::c")


@pytest.mark.parametrize("name, split, whole", [
    ("org/pairs", "test", "org/pairs::test"), ("org/pairs:default", "test", "org/pairs:default:test"),
    ("org/pairs@main", "train[:10%]", "org/pairs@main::train[:10%]"), ("org/a,org/b:c", "x", "org/a::x,org/b:c:x"),
    ("org/pairs", None, "org/pairs"), ("a/b::train", None, "a/b::train")])
def test_a_split_by_its_flag_is_one_in_the_name(name, split, whole):
    assert with_split(name, split, "--split") == whole
    parts = [hub_parts(place) for place in whole.split(",")]
    assert split is None or {part[3] for part in parts} == {split}


def test_a_split_by_its_flag_is_that_of_a_folder_or_object(tmp_path):
    """Of each of several; one that names a split already, or holds none, is refused, and not read whole in silence."""
    datasets = pytest.importorskip("datasets")
    folder, file = tmp_path / "two", tmp_path / "rows.json"
    datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS[:1]), "b": datasets.Dataset.from_list(ROWS[1:])}
                         ).save_to_disk(folder)
    file.write_text(json.dumps({"train": ROWS[:1], "test": ROWS[1:]}))
    assert read_rows(with_split(str(folder), "b", "--split")) == ROWS[1:]
    assert read_rows(with_split(str(file), "test", "--split")) == ROWS[1:]
    assert read_rows(with_split(f"{folder},{folder}", "a", "--split")) == ROWS[:1] * 2
    for name in (f"{folder}::a", f"{folder}::b", "org/pairs:c:train", f"{file},{folder}::b"):
        with pytest.raises(UserError, match="^--split b: .* names a split already; leave one of them out"):
            with_split(name, "b", "--split")
    for split in ("a,b", ""):
        with pytest.raises(UserError, match=f"^--eval_split {split}: must be one split"):
            with_split(str(folder), split, "--eval_split")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    for name in ("rows.parquet", "rows.jsonl", "list.json", "rows.par*"):
        with pytest.raises(UserError, match=r"holds? no splits; leave out 'train'"):
            read_rows(f"{tmp_path / name}::train")


def test_files_of_two_types_are_refused(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        write(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=r"all files of one kind, found \.csv, \.jsonl"):
        read_rows(str(tmp_path / "a.*"))


@pytest.mark.parametrize("columns, pairs, names", [
    (("prompt", "chosen", "rejected"), True, ("prompt", "chosen", "rejected")),
    (("question", "text", "worse-text", "sample_type"), True, ("question", "text", "worse-text")),
    (("chosen", "rejected"), True, (None, "chosen", "rejected")),
    (("question", "response_j", "response_k"), True, ("question", "response_j", "response_k")),
    (("chosen_messages", "rejected_messages"), True, (None, "chosen_messages", "rejected_messages")),
    (("prompt", "completion"), False, ("prompt", "completion", None)),
    (("messages",), False, (None, "messages", None)), (("text",), False, (None, "text", None)),
])
def test_columns_are_found_by_name(columns, pairs, names):
    assert fields([dict.fromkeys(columns)], pairs) == names


def test_named_columns_win_and_missing_ones_are_errors():
    rows = [{"q": 1, "a": 1, "b": 1, "chosen": 1, "rejected": 1}]
    named = {"prompt_field": "q", "rejected_field": "b"}
    assert fields(rows, chosen_field="a", **named) == ("q", "a", "b")
    with pytest.raises(UserError, match=r"d: has no column 'x' \(--chosen_field\); it has q, a, b, chosen, rejected"):
        fields(rows, chosen_field="x", **named)
    with pytest.raises(UserError, match="it has chosen: name one with --rejected_field, or train on chosen alone with"):
        fields([{"chosen": 1}])
    for flag, other in (("prompt", "chosen"), ("prompt", "rejected"), ("chosen", "rejected")):
        name = other if flag == "prompt" else "rejected"
        with pytest.raises(UserError, match=f"d: column {name} would be both {flag} and {other}; name another with"):
            fields(rows, **{f"{flag}_field": name})


def test_documents_of_a_template_are_refused():
    """Left out of the prompt without a word, they would make another one. Beside plain text, they are not needed."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [{"chosen": turns, "rejected": turns, "documents": value} for value in (None, [], {"a": 1})]
    with pytest.raises(UserError, match="^d: row 2: has documents for the chat template, which is not supported; rem"):
        fields(rows)
    assert fields(rows[:2])[1] == "chosen"
    assert fields([{"chosen": "A", "rejected": "B", "documents": {"a": 1}}])[1] == "chosen"
    with pytest.raises(UserError, match="^d: row 0: has documents"):  # a prompt of messages, answers of text
        fields([{"prompt": turns[:1], "chosen": "A", "rejected": "B", "documents": "[1]"}])


@pytest.mark.parametrize("name", ["image", "images", "audio", "videos"])
def test_what_a_text_model_cannot_see_is_refused(name):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B", name: value} for value in (None, [], ["a.png"])]
    with pytest.raises(UserError, match=f"^d: row 2: has {name}, which a model of text can't see"):
        fields(rows)
    assert fields(rows[:2]) == ("prompt", "chosen", "rejected")


def test_the_answer_of_alpaca_is_its_output_and_the_papers_its_text():
    """`text` of alpaca is the whole of a row, prompt included."""
    rows = [dict.fromkeys(("instruction", "input", "output", "text"))]
    assert fields(rows, False) == fields(rows, False, prompt_field="instruction") == ("instruction", "output", None)
    assert fields([dict.fromkeys(("question", "text", "worse-text", "output"))]) == ("question", "text", "worse-text")


def test_the_report_says_which_columns_are_read_and_which_are_not():
    rows = [{"id": 1, "system": "Be brief.", "question": "Q", "text": "A", "worse-text": "B"},
            {"id": 2, "system": "", "question": "Q", "text": "A", "worse-text": "B"}]
    columns = choose_columns("d", rows, tiny.DataArguments(), True)
    assert describe_columns(rows, columns) == ("columns: prompt = question, chosen = text, rejected = worse-text; not "
                                              "read: id, system")
    assert describe_columns(rows, columns, ("id", "system")).endswith("rejected = worse-text, id, system")
    assert unread_parts(rows, columns) == {"system": 1}
    assert unread_parts(rows, Columns("system", "text", None)) == {}


# Files as they are now, and no larger than a data set can be


def test_another_parquet_file_of_the_same_name_and_time_is_another_data_set(tmp_path):
    """Nothing keeps rows by a file's name, time or size."""
    file = tmp_path / "a.parquet"
    for rows in (ROWS, ROWS[::-1], [row | {"chosen": row["chosen"] + "."} for row in ROWS]):
        write(file, rows)
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert read_rows(str(file)) == rows


def test_what_a_row_names_as_an_image_is_not_opened(tmp_path, monkeypatch):
    """Neither a file of this machine nor an address: a data set's own metadata may call any column an image."""
    datasets = pytest.importorskip("datasets")
    from datasets.table import InMemoryTable

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    asked = []

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        named = [f"http://127.0.0.1:{site.server_port}/a.png", "/etc/hostname"]
        for kind, image in itertools.product(("Image", "Audio", "Video"), named):
            place, kind = {"bytes": None, "path": image}, getattr(datasets, kind)()
            row = {"chosen": "A", "x": place, "n": {"y": [place]}, "z": [{"y": place}], "json": {"a": [1]}}
            schema = datasets.Features({"chosen": datasets.Value("string"), "x": kind, "n": {"y": datasets.List(kind)},
                                        "z": [{"y": kind}], "json": datasets.Json()}).arrow_schema
            table = pa.Table.from_pylist([row | {"json": '{"a":[1]}'}], schema)  # `datasets` would open it to write it
            pq.write_table(table, tmp_path / "a.parquet")
            saved = datasets.Dataset(InMemoryTable(table))
            monkeypatch.setattr(datasets, "load_from_disk", lambda name, saved=saved: saved)
            assert read_rows(str(tmp_path / "a.parquet")) == read_rows(str(tmp_path / "saved")) == [row]
        site.shutdown()
    assert not asked


def test_parquet_columns_of_datasets_own_kinds_are_read_as_datasets_reads_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": [USER], "chosen": [YES], "n": {"a": [1, 2]}}, {"prompt": [USER], "chosen": [NO], "n": {"a": []}}]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")) == list(table) == rows


def test_parquet_files_of_one_glob_have_the_same_columns(tmp_path):
    write(tmp_path / "a.parquet", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    write(tmp_path / "b.parquet", [{"prompt": "Q", "chosen": "A"}])
    with pytest.raises(UserError, match="b.parquet: has the columns prompt, chosen, and .*a.parquet has prompt, c"):
        read_rows(str(tmp_path / "*.parquet"))


def test_small_files_of_many_rows_or_large_cells_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    """A Parquet file of a few KB holds a cell again and again for nothing."""
    write(tmp_path / "rows.parquet", [{"prompt": "Q", "chosen": "A"}] * 1001)
    write(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": "A"}] * 1001)
    monkeypatch.setattr(rows_module, "MOST_ROWS", 1000)
    for name, found in (("rows.parquet", "1,001 rows, more than 1,000"), ("rows.jsonl", "more than 1,000 rows")):
        with pytest.raises(UserError, match=f"{name}: has {found}; split the file"):
            read_rows(str(tmp_path / name))
    write(tmp_path / "cells.parquet", [{"prompt": "Q", "chosen": "A" * 100_000}] * 900)
    assert (tmp_path / "cells.parquet").stat().st_size < 100_000
    longest = rows_module.LONGEST
    monkeypatch.setattr(rows_module, "LONGEST", 50_000)
    nested = {"chosen": [{"role": "assistant", "content": "A" * 30_000}] * 2}
    for name, rows in (("cells.parquet", None), ("nested.jsonl", [{"prompt": "Q"} | nested])):
        if rows:
            write(tmp_path / name, rows)
        with pytest.raises(UserError, match=rf"{name}: row 0: chosen has \d+,\d+ characters, more than 50,000"):
            read_rows(str(tmp_path / name))
    monkeypatch.setattr(rows_module, "LONGEST", longest)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 20_000}.get)  # 80 MB
    with pytest.raises(UserError, match="holds more text than this machine has memory"):
        read_rows(str(tmp_path / "cells.parquet"))


def test_what_is_no_file_does_not_hang(tmp_path):
    """A pipe would wait for somebody to write into it."""
    for place in (tmp_path / "a.jsonl", tmp_path / "folder" / "state.json"):
        place.parent.mkdir(exist_ok=True)
        os.mkfifo(place)
    for path, words in ((tmp_path / "a.jsonl", "is not a file"), ("/dev/zero", "is not a file"),
                        (tmp_path / "folder", "state.json in it is not a file")):
        with pytest.raises(UserError, match=words):
            read_rows(str(path))


@pytest.mark.parametrize("earlier, reason", [
    ("4<|im_end|>\n<|im_start|>user\nSure?", "goes on after its end of turn '<|im_end|>'"),
    ("4<|im_end|>", "goes on after its end of turn '<|im_end|>'"), ("", "is empty"), (" \n", "is empty")])
def test_an_earlier_answer_that_is_scored_is_checked_as_the_last_is(chatml, earlier, reason):
    """SFT on all answers of a conversation would train on a forged turn, on two ends of turn, or on a bare one."""
    talk = [USER, {"role": "assistant", "content": earlier}, {"role": "user", "content": "Sure?"}, YES]
    with pytest.raises(UserError, match=f"^chosen has an answer before its last one that {re.escape(reason)}"):
        render_row(chatml, 0, None, talk, None, False, every=True)
    assert render_row(chatml, 0, None, talk, None, False).chosen == "four<|im_end|>"  # there, it is part of the prompt
    assert len(render_row(chatml, 0, None, [USER, NO, *talk[2:]], None, False, every=True).places) == 2


def test_a_conversation_that_begins_with_an_answer(chatml):
    """A greeting, say. Nothing comes before it, so it can't be scored; the last answer can."""
    talk = [YES, USER, NO]
    with pytest.raises(UserError, match="^chosen begins with an answer, which nothing asks for; put a message before"):
        render_row(chatml, 0, None, talk, None, False, every=True)
    assert render_row(chatml, 0, None, talk, None, False).chosen == "five<|im_end|>"
    system = {"role": "system", "content": "Be brief."}
    assert len(render_row(chatml, 0, None, [system, *talk], None, False, every=True).places) == 2


def test_messages_in_text_are_read_as_messages():
    """A CSV file has no lists: pandas writes them as Python does, others as JSON."""
    talk = [USER, YES]
    for text in (json.dumps(talk), str(talk), f"  {json.dumps(talk, indent=1)}\n"):
        assert as_messages(text) == talk
    share = [{"from": "human", "value": USER["content"]}, {"value": YES["content"], "from": "gpt"}]  # ShareGPT
    assert as_messages(json.dumps(share)) == as_messages(str(share[::-1]))[::-1] == talk
    for text in ("[1, 2]", '[{"a": 1}]', "[{role}]", '[{"role": "user"}, 3]'):
        assert as_messages(text) == text
    with pytest.raises(UserError, match="looks like a list of messages, and can't be read as JSON; write it as JSON"):
        as_messages("[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]")  # numpy's arrays


def test_a_whole_conversation_beside_its_prompt_is_refused(chatml):
    """Its first turn, which is the person's, would be scored; without the column it is split."""
    sides = "\n\nHuman: q\n\nAssistant: yes", "\n\nHuman: q\n\nAssistant: no"
    assert error_of(chatml, "q", *sides).startswith("chosen is a whole conversation (it opens with 'Human:') beside a")
    text = render_row(chatml, 0, None, *sides, True, alike=True)
    assert (text.chosen, text.rejected) == (" yes<|im_end|>", " no<|im_end|>")
    with pytest.raises(UserError, match="^column other is a whole conversation"):  # as score.py reads further ones
        render_more(chatml, "q", "other", sides[0])


def test_a_further_answer_in_messages_is_asked_for_as_text(chatml):
    """The prompt is rendered by then, whatever the file has; a whole conversation brings its own."""
    with pytest.raises(UserError, match="^column other is an answer in messages; give it as text, or with the conver"):
        render_more(chatml, "q", "other", [NO])
    prompt = render_row(chatml, 0, None, [USER, YES], None, False).prompt
    assert render_more(chatml, prompt, "other", [USER, NO])[0] == "five<|im_end|>"


def test_a_token_that_begins_texts_is_no_part_of_an_answer():
    """The prompt has the one that there may be. A tokenizer may end texts with the same token, or open turns with it as
    SmolLM2's does: "<|im_start|>think" within an answer, as s1's data have it, is no mistake there."""
    llama = read_template(tiny.llama())
    bos = llama.tokenizer.bos_token
    assert error_of(llama, "q", f"{bos}yes", "no") == f"chosen holds the token that begins a text, {bos!r}; take it out"
    assert error_of(llama, "q", "yes", f"n{bos}o").startswith("rejected holds the token")
    same = read_template(tiny.plain())
    same.tokenizer.bos_token = same.tokenizer.eos_token
    assert render(same, "q", "yes" + same.tokenizer.eos_token, "no")[1] == "yes" + same.tokenizer.eos_token
    opens = read_template(tiny.chatml())
    opens.tokenizer.bos_token = "<|im_start|>"
    thought = "<|im_start|>think\nfour<|im_end|>"
    assert render(opens, None, ASKED + thought, ASKED + "five<|im_end|>")[1] == thought


def test_white_space_that_tells_a_pair_apart_is_noted(chatml):
    """Training learns it as it learns words."""
    def notes(chosen, rejected):
        return {note for note in render_row(chatml, 0, "q", chosen, rejected, True).notes if "white space" in note}

    assert notes("a\n", "b") == {"one side alone ends in white space"}
    assert notes("a ", "a") == {"one side alone ends in white space", "chosen and rejected differ in white space alone"}
    assert notes("a  b", "a b") == {"chosen and rejected differ in white space alone"}
    assert notes("a", "b\n") == {"one side alone ends in white space"}
    assert notes("a<|im_end|>\n", "b<|im_end|>") == notes("a", "b") == set()  # after the end of turn it is left out
    assert notes("a<|im_end|>\n", "b ") == {"one side alone ends in white space"}
    said = [[{"role": "assistant", "content": text}] for text in ("1.\n", "2.")]
    asked = [{"role": "user", "content": "q"}]
    found = render_row(chatml, 0, asked, *said, True).notes
    assert [note for note in found if "white space" in note] == ["one side alone ends in white space"]
    assert "the prompt ends with an assistant's turn, which is closed; the answer is a new one" in render_row(
        chatml, 0, [*asked, {"role": "assistant", "content": "It is"}], *said, True).notes
    assert notes("a\n", "b ") == notes("a", "b") == set()


def test_a_question_that_only_ends_like_the_transcripts_is_another_one(chatml):
    differs = "prompt column differs from the transcript's prompt (the transcript is used)"
    for whole, question, noted in (
            ("What is 2+2?", "2?", True), ("What is 2+2?", "2+2?", False), ("What is 2+2?", "What is 2+2?", False),
            ("What is 2+2?", "s 2+2?", True), ("What is 0.5?", "5?", True), ("Is it 1,500?", "500?", True),
            ("It's what?", "s what?", True), ('Who said "No?', "No?", True), ("Add: 2+2?", "2+2?", False)):
        asked = ASKED.replace("How many?", whole)
        notes = render_row(chatml, 0, question, asked + "4<|im_end|>", asked + "5<|im_end|>", True).notes
        assert (differs in notes) == noted, (whole, question)


def test_an_answer_that_is_its_prompt_repeats_it(chatml):
    """As one that begins with it does; a longer word does not."""
    for prompt, answer, noted in (("yes", "yes", True), ("yes.", "yes.", True), ("yes", "yes, I do", True),
                                  ("yes", "yesterday", False)):
        notes = render_row(chatml, 0, prompt, answer, "no", True).notes
        assert ("chosen begins with the prompt itself, which then stands twice" in notes) == noted, answer
