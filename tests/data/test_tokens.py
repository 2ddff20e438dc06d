"""Texts to token ids: ids known by hand (a byte's id is its value), boundaries, limits, and every row accounted for."""

import itertools
import json
import random
import sys
from types import SimpleNamespace

import pytest
import tiny_tokenizers as tiny
from conftest import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from nanodpo.data import encoding, prepared
from nanodpo.data.example import Example, PartlyScored
from nanodpo.data.inspection import histogram, inspect
from nanodpo.data.limits import truncate
from nanodpo.data.marks import shared_start, spaced_text, token_text
from nanodpo.data.template import read_template
from nanodpo.data.tokens import DataSet, load_dataset
from nanodpo.errors import UserError
from nanodpo.flags.arguments import TrainArguments
from nanodpo.run.datasets import load_data

CHAT_EOS, START, END = 260, 259, 260  # tiny.chatml's <|im_start|> and <|im_end|>
ASKED = "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
ASKED_IDS = [START, *b"user\n2?", END, *b"\n", START, *b"assistant\n"]


def load(folder, tokenizer, rows, limit=1000, pairs=True, **arguments):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(**arguments), limit, pairs)


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def error_of(*values, **arguments):
    with pytest.raises(UserError) as caught:
        load(*values, **arguments)
    return str(caught.value)


# Ids


def test_a_chat_row_by_hand(tmp_path):
    """Without a BOS there is no None among the ids; one end of turn; both sides have the same prompt."""
    transcripts = {"question": "2?", "text": ASKED + "4<|im_end|>\n", "worse-text": ASKED + "five<|im_end|>"}
    messages = {"prompt": [{"role": "user", "content": "2?"}], "chosen": [{"role": "assistant", "content": "4"}],
                "rejected": [{"role": "assistant", "content": "five"}]}
    for data in (transcripts, messages, row(ASKED, "4", "five<|im_end|>")):
        example, = load(tmp_path, tiny.chatml(), [data]).examples
        assert example == Example(0, ASKED_IDS, [*b"4", END], [*b"five", END])
        assert example.length == len(ASKED_IDS) + 5


def test_bos_is_there_once_at_the_front(tmp_path):
    """Added to plain text, not doubled where the template wrote it, never before a response."""
    tokenizer = tiny.llama()
    plain, written = load(tmp_path, tokenizer, [row("2?", "4", "five"), row("<s>2?", "4", "five")]).examples
    assert plain.prompt == written.prompt == [258, *b"2?"]
    assert plain.chosen == [*b"4", 259] and plain.rejected == [*b"five", 259]
    messages = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]
    chat, = load(tmp_path, tokenizer, [{"messages": messages}], pairs=False).examples
    assert chat == Example(0, [258, 260, *b"user", 261, *b"\n\n2?", 262, 260, *b"assistant", 261, *b"\n\n"],
                           [*b"4", 262], None)
    apart, = load(tmp_path, tokenizer, [row("2?", "4", "five")], boundary="concat").examples
    assert apart == plain


@pytest.mark.parametrize("tokenizer", [tiny.pad_is_eos(), tiny.base_chatml(), tiny.plain()])
def test_where_pad_is_eos_the_eos_is_still_scored(tmp_path, tokenizer):
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    example, = load(tmp_path, tokenizer, [row("2?", "4", "five")]).examples
    assert example.chosen == [*b"4", eos] and example.rejected == [*b"five", eos]


# The boundary


@pytest.mark.parametrize("prompt, response, alone, together", [
    ("1+2", "3", "['2'] alone", "['23', '<|endoftext|>'] together"),
    ("1+ ", "3", "['Ġ'] alone", "['Ġ3', '<|endoftext|>'] together")])
def test_a_boundary_inside_a_token_is_an_error_or_cut_apart(tmp_path, prompt, response, alone, together):
    rows = [row("1+1=", "2", "4"), row(prompt, response, "x"), row("1+1=", "5", "6")]
    message = error_of(tmp_path, tiny.plain(), rows)
    assert "1 of 3 rows" in message and "row 1: chosen: " in message and "--boundary concat" in message
    assert alone in message and together in message
    data = load(tmp_path, tiny.plain(), rows, boundary="concat")
    assert data.examples[1] == Example(1, [*prompt.encode()], [*response.encode(), 258], [*b"x", 258])
    data = load(tmp_path, tiny.plain(), rows, on_bad_row="drop")
    assert [e.row for e in data.examples] == [0, 2] and data.dropped[0]["row"] == 1


def test_the_boundary_of_rejected_is_checked_too(tmp_path):
    assert "row 0: rejected: " in error_of(tmp_path, tiny.plain(), [row("1+2", "x", "3")])


@pytest.mark.parametrize("way", ["prepend", "first", "always", "bytes"])
def test_apart_a_response_has_the_ids_that_it_has_within_a_text(way, tmp_path):
    """Tokenizers that put a space before every text put none before what goes on: by hand, and as without the flag. A
    space of the response's own stays."""
    tokenizer = tiny.spaced(way)
    space = "Ġ" if way == "bytes" else "▁"
    rows = [row("Q:", "Yes.", "No.") | {"third": "Yes"}, row("Q:", " Yes", "Yes"), row("Q?\n", "Yes\n", ".")]
    line = "Ċ" if way == "bytes" else "\n"
    said = [["Yes", "."], [space + "Yes"], ["Yes", line]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for boundary in ("concat", "error"):
        data = load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(boundary=boundary), 1000, True,
                            ("third",))
        assert [tokenizer.convert_ids_to_tokens(e.chosen) for e in data.examples] == [[*x, "</s>"] for x in said]
        assert tokenizer.convert_ids_to_tokens(data.examples[0].more["third"]) == ["Yes", "</s>"]


def test_apart_a_response_after_a_special_token_is_as_it_is_there(tmp_path):
    """There Llama 2's way puts a space, and Metaspace's first none: apart and together say the same."""
    for way, first in (("prepend", "▁Yes"), ("always", "▁Yes"), ("first", "Yes")):
        tokenizer = tiny.spaced(way)
        for boundary in ("concat", "error"):
            example, = load(tmp_path, tokenizer, [row("Q<a>", "Yes", "No")], boundary=boundary).examples
            assert tokenizer.convert_ids_to_tokens(example.chosen) == [first, "</s>"], (way, boundary)


# Lengths


def test_lengths_are_tokens_not_characters(tmp_path):
    """A response of 20,000 characters is cut nowhere where its tokens fit, and measured by them where not."""
    latex = "\\frac{1}{2}+" * 1666  # 19,992 characters, one token each
    rows = [row("2?", latex, "数" * 6665)]  # 19,995 tokens, three each
    data = load(tmp_path, tiny.plain(), rows, limit=20000)
    assert data.examples == [Example(0, [*b"2?"], [*latex.encode(), 258], [*("数" * 6665).encode(), 258])]
    assert data.examples[0].length == 2 + 19995 + 1 and data.dropped == []
    message = error_of(tmp_path, tiny.plain(), rows, limit=19997)
    assert "19998 tokens (prompt 2, rejected 19996), over --max_length 19997" in message
    merged, = load(tmp_path, tiny.plain(), [row("2?", "23" * 9, "x")], limit=12).examples  # 18 characters, 9 tokens
    assert merged.chosen == [256] * 9 + [258]


ROWS = [row("2?", "four", "x"), row("2?", "y", "fives"), row("2?", "threes", "threat"), row("2?", "a", "b")]


def test_overlong_rows_stop_the_run_and_are_listed(tmp_path):
    message = error_of(tmp_path, tiny.plain(), ROWS, limit=6)
    assert "3 of 4 rows (75.0%) are too long" in message
    assert "row 2: 9 tokens" in message and "row 1: 8 tokens" in message and "--overlong drop" in message
    message = error_of(tmp_path, tiny.plain(), [*ROWS, row("2?", "fours", "x")], limit=3)
    assert ("longest: row 2: 9 tokens (prompt 2, chosen 7), over --max_length 3; "
            "row 1: 8 tokens (prompt 2, rejected 6), over --max_length 3; row 4: 8 tokens (p") in message
    message = error_of(tmp_path, tiny.plain(), ROWS, limit=8, max_length=None)
    assert "row 2: 9 tokens (prompt 2, chosen 7), over the model's context of 8. Raise" in message


def test_overlong_rows_are_dropped_with_reasons(tmp_path):
    data = load(tmp_path, tiny.plain(), ROWS, limit=7, overlong="drop")
    assert [e.row for e in data.examples] == [0, 3]
    assert [(d["row"], d["reason"]) for d in data.dropped] == [
        (1, "8 tokens (prompt 2, rejected 6), over --max_length 7"),
        (2, "9 tokens (prompt 2, chosen 7), over --max_length 7")]
    assert data.lengths == [7, 8, 9, 4]


def test_truncation_cuts_each_side_by_its_own_length_and_closes_nothing(tmp_path):
    data = load(tmp_path, tiny.plain(), ROWS, limit=5, overlong="truncate")
    assert data.examples == [
        Example(0, [*b"2?"], [*b"fou"], [*b"x", 258], (True, False)),
        Example(1, [*b"2?"], [*b"y", 258], [*b"fiv"], (False, True)),
        Example(3, [*b"2?"], [*b"a", 258], [*b"b", 258], (False, False))]
    assert [(d["row"], d["reason"]) for d in data.dropped] == [
        (2, "9 tokens (prompt 2, chosen 7), over --max_length 5; cut, both responses would be equal")]
    assert data.notes == {
        "only chosen cut to fit 5 tokens": 1, "only rejected cut to fit 5 tokens": 1,
        "chosen: added the end of turn": 2, "rejected: added the end of turn": 2}  # of those that still have it
    assert [(line["row"], line["cut"]) for line in data.cut_rows()] == [(0, ["chosen"]), (1, ["rejected"])]
    assert load(tmp_path, tiny.plain(), ROWS).cut_rows() == []
    alone = [{"prompt": "2?", "completion": "four"}]
    data = load(tmp_path, tiny.plain(), alone, limit=5, pairs=False, overlong="truncate", loss="sft")
    assert data.notes == {"chosen cut to fit 5 tokens": 1}, "there is no other side"


def test_a_prompt_that_fills_the_limit_is_the_reason_why_its_row_is_dropped(tmp_path):
    """No cut of the responses could help."""
    rows = [row("1234567", "4", "five"), row("2?", "4", "five")]
    data = load(tmp_path, tiny.plain(), rows, limit=6, overlong="truncate")
    assert [e.row for e in data.examples] == [1]
    assert data.dropped[0]["reason"] == (
        "11 tokens (prompt 6, rejected 5), over --max_length 6; the prompt alone, 6 tokens, leaves no room for a "
        "response")  # 23 is one token


def test_a_prompt_is_never_cut(tmp_path):
    for overlong, more in (("drop", ""), ("truncate", "; prompts are not cut")):
        data = load(tmp_path, tiny.plain(), [row("long?", "a", "b"), row("2?", "a", "b")], overlong=overlong,
                    max_prompt_length=3)
        assert [e.row for e in data.examples] == [1]
        assert data.dropped[0]["reason"] == "prompt of 5 tokens, over --max_prompt_length 3" + more
    assert "prompt of 5 tokens" in error_of(tmp_path, tiny.plain(), [row("long?", "a", "b")], max_prompt_length=4)


def test_no_grid_point_gives_an_empty_side():
    for prompt, chosen, rejected, limit in itertools.product(range(1, 6), range(1, 6), range(1, 6), range(1, 12)):
        example = Example(0, [1] * prompt, [2] * chosen, [3] * rejected)
        cut = truncate(example, limit)
        assert isinstance(cut, Example) == (limit > prompt)
        if isinstance(cut, Example):
            assert cut.prompt == example.prompt and cut.length <= limit
            assert (len(cut.chosen), len(cut.rejected)) == (min(chosen, limit - prompt), min(rejected, limit - prompt))
            assert cut.cut == (prompt + chosen > limit, prompt + rejected > limit)
            assert len(cut.chosen) >= 1 and len(cut.rejected) >= 1
    assert "no room" in truncate(Example(0, [1], [2], None), 1)
    assert truncate(Example(0, [1], [2, 3, 4], None), 3) == Example(0, [1], [2, 3], None, (True, False))


# Bad rows, notes, reports


@pytest.mark.parametrize("rejected", ["4", "4<|im_end|>\n"])
def test_equal_sides_are_refused(rejected, tmp_path):
    """Also where one of them has its end of turn already."""
    assert "row 0: chosen and rejected are equal" in error_of(tmp_path, tiny.chatml(), [row("2?", "4", rejected)])


def test_bad_rows_are_all_counted_before_the_run_stops(tmp_path):
    rows = [row("2?", "4", "4"), row("2?", "4", "5"), row("", "4", "5"), row("2?", "5", "5"), row("2?", None, "5")]
    message = error_of(tmp_path, tiny.plain(), rows)
    assert "rows.jsonl: 4 of 5 rows can't be used; row 0: chosen and rejected are equal; row 2: chosen has an empty " \
        "prompt; row 4: chosen is missing" in message and "--on_bad_row drop" in message
    data = load(tmp_path, tiny.plain(), rows, on_bad_row="drop")
    assert [e.row for e in data.examples] == [1]
    assert [d["row"] for d in data.dropped] == [0, 2, 3, 4] and data.dropped[0]["file"].endswith("rows.jsonl")
    report = data.report()
    assert "1 row, 4 dropped" in report and "dropped row 0: chosen and rejected are equal" in report
    assert report.endswith("... and 1 more")


def test_no_usable_row_is_an_error(tmp_path):
    message = error_of(tmp_path, tiny.plain(), [row("2?", "4", "4")], on_bad_row="drop")
    assert "no usable row is left of 1; row 0: chosen and rejected are equal" in message


def test_what_a_tokenizer_makes_equal_or_empty_is_no_row(tmp_path):
    """Texts may differ where their tokens don't, and a text need have none."""
    tokenizer = tiny.plain()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    data = load(tmp_path, tokenizer, [row("2?", "4~", "4"), row("~", "4", "5"), row("2?", "4", "5")], on_bad_row="drop")
    assert [e.row for e in data.examples] == [2]
    assert [d["reason"] for d in data.dropped] == ["chosen and rejected are equal in tokens", "prompt has no tokens"]


def test_further_columns_are_cut_to_fit_and_never_lead_with_bos(tmp_path):
    """At most what is left of the limit after the prompt; apart from it where told so."""
    path = tmp_path / "rows.jsonl"
    rows = [row("2?", "4", "five") | {"third": third} for third in ("four", "a long answer", None)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for boundary in ("error", "concat"):
        data = load_dataset(str(path), read_template(tiny.llama()), tiny.DataArguments(boundary=boundary), 8, True,
                            ("third",))
        assert [example.more for example in data.examples] == [{"third": [*b"four", 259]}, {"third": [*b"a lon"]}, {}]
    rows = [row("1+2", "x", "y") | {"third": third} for third in ("4", "3")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"1 of 2 rows can't be used; row 1: column third: prompt and response merge"):
        load_dataset(str(path), read_template(tiny.plain()), tiny.DataArguments(), 8, True, ("third",))


def test_dropped_rows_come_in_the_order_of_the_file(tmp_path):
    rows = [row("2?", "a" * 9, "b"), row("2?", "a", "a"), row("2?", "a", "b"), row("1+2", "3", "4")]
    data = load(tmp_path, tiny.plain(), rows, limit=8, overlong="drop", on_bad_row="drop")
    assert [d["row"] for d in data.dropped] == [0, 1, 3]


def test_a_file_is_prepared_in_parts_as_it_is_at_once(tmp_path, monkeypatch):
    """Examples, reasons, notes and problems do not depend on how many rows are in memory at one time."""
    rows = [row(f"{i % 4}?", "4", f"five{i}" if i != 3 else "4") for i in range(9)]
    found = []
    for at_once in (1, 2, 100):
        monkeypatch.setattr(prepared, "AT_ONCE", at_once)
        data = load(tmp_path, tiny.chatml(), rows + [rows[0], row("2?", "", "x")], on_bad_row="drop")
        found.append((data.examples, [e.problem for e in data.examples], data.dropped, data.notes, data.lengths))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 9 and [entry["row"] for entry in found[0][2]] == [3, 10]
    assert found[0][3]["repeats an earlier row"] == 1


def test_token_ids_take_four_bytes_each():
    """A list of numbers takes 8 bytes for each place, and 28 for each number above 256."""
    example = Example(0, [7] * 1000, PartlyScored([300] * 2000, [5, 6]), None)
    assert sum(sys.getsizeof(kept.ids) for kept in example.compact()[:2]) < 4 * 3000 + 300
    assert example.prompt == [7] * 1000 and example.chosen == [300] * 2000 and example.chosen.scored == [5, 6]
    assert example.rejected is None and example.length == 3000


def test_notes_count_rows_once(tmp_path):
    differs = {"question": "9?", "text": ASKED + "4<|im_end|>\n", "worse-text": ASKED + "5<|im_end|>"}
    agrees = {"question": "2?", "text": ASKED + "4<|im_end|>\n", "worse-text": ASKED + "6<|im_end|>"}
    data = load(tmp_path, tiny.chatml(), [differs, agrees, agrees, agrees])
    assert data.notes == {"prompt column differs from the transcript's prompt (the transcript is used)": 1,
                          "repeats an earlier row": 2}
    assert "  1 row: prompt column differs" in data.report() and "  2 rows: repeats" in data.report()


def test_notes_are_of_the_rows_that_stay(tmp_path):
    """Of two equal rows that are too long none stays, so none was closed and none is a repetition."""
    rows = [row("2?", "a" * 9, "b"), row("2?", "a" * 9, "b"), row("2?", "a", "b")]
    data = load(tmp_path, tiny.plain(), rows, limit=8, overlong="drop")
    assert len(data.examples) == 1 and set(data.notes.values()) == {1}, data.notes


def test_plain_rows_of_a_chat_model_are_counted_once(tmp_path):
    """Both sides share the prompt; a rendered row is none of them."""
    report = load(tmp_path, tiny.chatml(), [row("2?", "4", "5"), row("3?", "4", "5"), row(ASKED, "4", "5")]).report()
    assert "  2 rows: plain text, without the chat template" in report.splitlines()


def test_the_report_counts_held_out_rows_where_its_notes_do(tmp_path):
    """The notes are about all rows of the file, so its line is too."""
    path = tmp_path / "rows.jsonl"
    rows = [row(f"{i}?", "4<|endoftext|><|endoftext|>\n", "5<|endoftext|>\n") for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = TrainArguments(train_file_path=str(path), eval_size=2)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))
    source = SimpleNamespace(tokenizer=tiny.plain(), context=100, config=config)
    data, held_out, _ = load_data(args, source)
    assert (len(data.examples), len(held_out.examples)) == (10, 2)
    assert data.report() == (f"data {path}: 12 rows, 0 dropped, 2 held out\n"
                             "  columns: prompt, chosen, rejected\n"
                             "  12 rows: chosen: a second end of the turn is left out")
    assert held_out.report() == f"data 2 rows of {path}: 2 rows, 0 dropped"


def test_sft_data_needs_no_rejected(tmp_path):
    example, = load(tmp_path, tiny.plain(), [{"prompt": "2?", "completion": "4"}], pairs=False).examples
    assert example == Example(0, [*b"2?"], [*b"4", 258], None)
    assert "no column rejected" in error_of(tmp_path, tiny.plain(), [{"prompt": "2?", "completion": "4"}])


def test_sft_takes_pairs_that_do_not_differ(tmp_path):
    """It trains on chosen alone. By hand: equal in the file, and equal once cut to three tokens."""
    rows = [row("2?", "4", "4"), row("2?", "threes", "threat")]
    sft = {"loss": "sft", "overlong": "truncate", "pairs": False}
    data = load(tmp_path, tiny.plain(), rows, limit=5, **sft)
    assert data.dropped == [] and data.examples == [
        Example(0, [*b"2?"], [*b"4", 258], [*b"4", 258]), Example(1, [*b"2?"], [*b"thr"], [*b"thr"], (True, True))]
    for loss in ("dpo", ""):  # a run to be scored has its loss in its settings, a bare model none
        assert "equal" in error_of(tmp_path, tiny.plain(), rows, limit=5, **sft | {"loss": loss})


REPEATING = {"prompt": "Question: 2+2?\nAnswer:", "chosen": "Question: 2+2?\nAnswer: 4", "rejected": "5"}


@pytest.mark.parametrize("changes, column", [
    ({}, "chosen"), ({"chosen": " Question:  2+2? Answer: 4"}, "chosen"),  # with other white space
    ({"chosen": "4", "rejected": REPEATING["chosen"]}, "rejected"), ({"chosen": REPEATING["prompt"] + "4"}, "chosen"),
    ({"chosen": "4", "third": REPEATING["chosen"]}, "column third")])
def test_a_column_that_repeats_the_prompt_is_refused(changes, column, tmp_path):
    """The prompt would stand twice, and once be scored."""
    path = tmp_path / "rows.jsonl"
    rows = [{"third": None} | REPEATING | changes | {"prompt": REPEATING["prompt"]}, row("1+1=", "2", "3")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"rows.jsonl: {column} begins with the prompt itself, .*.in 1 of 2 rows.; cut"):
        load_dataset(str(path), read_template(tiny.plain()), tiny.DataArguments(), 1000, True, ("third",))


def test_single_answers_may_begin_as_their_prompts_do(tmp_path):
    """It is counted. An answer of which the prompt is a part of a word repeats nothing."""
    rows = [row("Hello", "Hello! Who is there?", "x"), row("2?", "4", "5"), row("3?", "6", "7"), row("1", "12", "13"),
            row("A", "An answer", "1")]
    data = load(tmp_path, tiny.plain(), rows)
    assert len(data.examples) == 5
    assert data.notes["chosen begins with the prompt itself, which then stands twice"] == 1


# --inspect


def test_inspect_shows_what_is_scored_and_the_boundary(tmp_path):
    tokenizer = tiny.chatml()
    text = inspect(load(tmp_path, tokenizer, [row(ASKED, "4!", "23数")]), tokenizer, 26)
    lines = text.splitlines()
    assert "[4][!][<|im_end|>]" in lines and "[23][数][<|im_end|>]" in lines  # a character of three tokens is one piece
    assert "--- chosen: 21 prompt + 3 scored tokens" in lines and "--- rejected: 21 prompt + 5 scored tokens" in lines
    assert "boundary, scored ids starred: 116:'t'  97:'a'  110:'n'  116:'t'  10:'\\n'  *52:'4'  *33:'!'  " \
        "*260:'<|im_end|>'" in lines
    assert "(0.0% over the limit of 26)" in text
    cut = inspect(load(tmp_path, tokenizer, [row(ASKED, "4!", "56789")], limit=24, overlong="truncate"), tokenizer, 24)
    assert "--- rejected: 21 prompt + 3 scored tokens, cut" in cut and "(100.0% over the limit of 24)" in cut


def test_inspect_shows_any_row_that_is_used(tmp_path):
    tokenizer = tiny.plain()
    data = load(tmp_path, tokenizer, [row("2?", "4", "5"), row("3?", "4", "4"), row("4?", "8", "5")], on_bad_row="drop")
    assert "\nrow 2;" in inspect(data, tokenizer, 9, 2) and "[8]" in inspect(data, tokenizer, 9, 2)
    held_out, data.rows_held_out = DataSet("held out", [data.examples.pop()], [], {}, []), 1
    assert "\nrow 2;" in inspect(data, tokenizer, 9, 2, held_out)
    for number, words in ((1, "this row is left out: chosen and rejected are equal"), (3, "has rows 0 to 2")):
        with pytest.raises(UserError, match=f"--inspect_row {number}: .*{words}"):
            inspect(data, tokenizer, 9, number, held_out)


def test_inspect_elides_the_middle_of_a_long_response(tmp_path):
    tokenizer = tiny.plain()
    text = inspect(load(tmp_path, tokenizer, [row("2?", "ab" * 500, "b")], limit=2000), tokenizer, 2000)
    assert text.count("[a]") == 100 + 29 and "... 741 more tokens ..." in text and "[b][<|endoftext|>]\n" in text


def test_histogram_counts_every_length_once():
    lines = histogram([10, 10, 11, 20, 34], 19).splitlines()
    assert lines[0].endswith("before any cut (40.0% over the limit of 19)")
    assert [line.split()[-1] for line in lines[1:]][:1] == ["3"]
    assert sum(int(line.split()[-1]) for line in lines[1:]) == 5
    assert histogram([7], 10).splitlines()[1].split() == ["7-7", "#" * 50, "1"]


# What is before a chat's last header is tokenised once


CHARACTERS = ["2", "3", " ", "  3", "\n", "é", "e\u0301", "数", "<", "|", ">", "<|im_end|>", "<|im_start|>", "<s>",
              "im_", "assistant", "Yes", "<a>"]


@pytest.mark.parametrize("tokenizer", [tiny.chatml(), tiny.llama(), tiny.pad_is_eos(), tiny.plain(),
                                       *map(tiny.spaced, ("prepend", "first", "always", "bytes"))], ids=lambda t: "")
def test_a_text_cut_at_an_added_token_has_the_ids_of_the_whole(tokenizer):
    """Random texts of whatever characters, spaces and tokens, before and after the token: the tokenizer's own ids of
    all of it."""
    draw = random.Random(0)
    prompts = ["".join(draw.choices(CHARACTERS, k=draw.randrange(1, 12))) for _ in range(300)]
    lines = [prompt + "".join(draw.choices(CHARACTERS, k=4)) for prompt in prompts]
    for token in tokenizer.get_added_vocab():
        asked = [prompt + token + draw.choice(["", "assistant\n", " "]) for prompt in prompts]
        heads = encoding._heads(tokenizer, asked)
        assert all(head.length for head in heads) and encoding._after_heads(tokenizer, asked, heads) == encoding._ids(
            tokenizer, asked)
        whole = [a + b for a, b in zip(asked, lines)]
        assert encoding._after_heads(tokenizer, whole, heads) == encoding._ids(tokenizer, whole)


@pytest.mark.parametrize("how, content", [
    ({"normalized": True}, "<b>"), ({"lstrip": True}, "<b>"), ({"rstrip": True}, "<b>"), ({"single_word": True}, "<b>"),
    ({}, "<|im_start|>assistant"), ({}, "a<|im_start|>"), ({}, "><|im"), ({}, "|>x"), ({}, "t|")])
def test_no_text_is_cut_at_a_token_that_may_be_another_one(how, content):
    """One that is found in changed text, takes spaces with it, asks for what is beside it, or may overlap another."""
    tokenizer = tiny.chatml()
    tokenizer.add_tokens([AddedToken(content, **{"normalized": False} | how)])
    prompt = f"2?<|im_start|>{content if how else 'assistant'}"
    assert encoding._border(tokenizer, prompt) is None
    assert encoding._border(tiny.chatml(), prompt) == "<|im_start|>"


def test_a_token_keeps_its_first_space_in_the_tables():
    """As Llama 2's and Mistral's tokenizers decode: the first space of a text is dropped, so that of a token decoded
    alone. Byte-level ones drop none."""
    names = ["<unk>", "▁has", "has", "▁", "▁▁a", "<0xF0>"]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([1]) == tokenizer.decode([2]) == "has" and tokenizer.decode([2, 1]) == "has has"
    assert [spaced_text(tokenizer, i) for i in range(1, 6)] == [" has", "has", " ", "  a", r"\xf0"]
    tokenizer = make_tokenizer()
    ids = tokenizer(" a\N{GRINNING FACE}▁", add_special_tokens=False).input_ids
    assert [spaced_text(tokenizer, i) for i in ids] == [token_text(tokenizer, i) for i in ids]
    assert spaced_text(tokenizer, 10**6) == tokenizer.decode([10**6])


def test_a_token_that_is_part_of_a_character_is_written_in_bytes():
    """Each byte of UTF-8 by itself, as Python writes it; what is a character stays one."""
    tokenizer, text = make_tokenizer(), "é\N{GRINNING FACE}\ufffd"
    texts = [token_text(tokenizer, i) for i in tokenizer(f"a{text}", add_special_tokens=False).input_ids]
    assert texts == ["a", *(rf"\x{byte:02x}" for byte in text.encode())]
    tokenizer.add_tokens(["\ufffd", "é!"])
    assert [token_text(tokenizer, i) for i in tokenizer.convert_tokens_to_ids(["\ufffd", "é!"])] == ["\ufffd", "é!"]
    assert token_text(tokenizer, 10**6) == tokenizer.decode([10**6])  # no token of the tokenizer


def test_no_tag_is_cut_where_two_texts_part():
    """Nor a token; with either at the beginning and at the end."""
    tokenizer = make_tokenizer()
    for a, b, start, end in (("a</think>x", "a</thing>x", "a", "x"), ("a<think>x", "a<thing>x", "a", "x"),
                             ("a<|im_start|>x", "a<|im_end|>x", "a", "x"), ("<b>1</b>", "<b>2</b>", "<b>", "</b>")):
        assert (shared_start(tokenizer, a, b), shared_start(tokenizer, a, b, at_end=True)) == (start, end)
