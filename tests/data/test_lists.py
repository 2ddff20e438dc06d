"""Rows with lists of answers: which pairs they make, in which order they are trained on, and what is refused."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny_tokenizers as tiny

from nanodpo.data import prepared
from nanodpo.data.example import Example, row_starts
from nanodpo.data.inspection import inspect
from nanodpo.data.mixing import mix
from nanodpo.data.prepared import Reading, prepare
from nanodpo.data.schedule import epoch_order, pair_order, pairs_of_step
from nanodpo.data.template import read_template
from nanodpo.data.tokens import DataSet, load_dataset
from nanodpo.errors import UserError
from nanodpo.flags.arguments import TrainArguments
from nanodpo.folder.data_cache import keep
from nanodpo.folder.reference import data_hash
from nanodpo.run.datasets import load_data

END = 260
Q = {"role": "user", "content": "2?"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def load(folder, *rows, limit=1000, keep=None, **arguments):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = tiny.DataArguments(**arguments)
    return load_dataset(str(folder / "rows.jsonl"), read_template(tiny.chatml()), how, limit, how.loss != "sft",
                        keep=keep)


def error_of(*values, **how) -> str:
    with pytest.raises(UserError) as caught:
        load(*values, **how)
    return str(caught.value)


def texts(data) -> list[tuple]:
    """(row, chosen, rejected) as text, without the end of turn."""
    def text(ids):
        return None if ids is None else bytes(ids[:-1]).decode()

    return [(e.row, text(e.chosen), text(e.rejected)) for e in data.examples]


ROW = {"prompt": "2?", "chosen": ["4", "four"], "rejected": ["5", "six", "7!"]}
PAIRS = [(0, chosen, rejected) for chosen in ROW["chosen"] for rejected in ROW["rejected"]]


def test_many_pairs_of_few_rows_are_told_before_they_are_made(tmp_path, monkeypatch, capsys):
    """The bar counts rows, and a row may be a million pairs. SFT has an answer of chosen each time."""
    monkeypatch.setattr(prepared, "MANY_PAIRS", 7)
    load(tmp_path, ROW, {"prompt": "3?", "chosen": "6", "rejected": "7"})
    told = f"data {tmp_path / 'rows.jsonl'}: its lists of answers make 7 pairs, to be prepared one by one\n"
    assert capsys.readouterr().out == told
    load(tmp_path, ROW, {"prompt": "3?", "chosen": "6", "rejected": "7"}, loss="sft")
    load(tmp_path, ROW)
    load(tmp_path, *({"prompt": f"{i}?", "chosen": "6", "rejected": "7"} for i in range(7)))
    assert capsys.readouterr().out == ""


def test_every_chosen_with_every_rejected_answer(tmp_path):
    """In the order of the file, each with its numbers; each has the ids that a row of its own would have."""
    data = load(tmp_path, ROW, {"prompt": "3?", "chosen": "6", "rejected": ["7", "8"]})
    assert texts(data) == [*PAIRS, (1, "6", "7"), (1, "6", "8")]
    assert [e.answer_numbers for e in data.examples] == [*itertools.product(range(2), range(3)), (0, 0), (0, 1)]
    apart = load(tmp_path, *({"prompt": "2?", "chosen": c, "rejected": r} for _, c, r in PAIRS))
    assert [e.compact() for e in data.examples[:6]] == [e.compact() for e in apart.examples]
    assert data.report().splitlines()[:2] == [f"data {tmp_path}/rows.jsonl: 2 rows, 0 dropped",
                                              "  lists of answers: 2 rows make 8 pairs"]
    assert "  2 rows: plain text, without the chat template" in data.report()
    assert len({e.problem for e in data.examples[:6]}) == 1


FORMS = {
    "messages": {"prompt": [Q], "chosen": [[said("4")], [said("four")]], "rejected": [[said("5")]]},
    "messages with the prompt inside": {"chosen": [[Q, said("4")], [Q, said("four")]], "rejected": [Q, said("5")]},
    "text after messages": {"prompt": [Q], "chosen": [[said("4")], [said("four")]], "rejected": [[said("5")]]},
    "one conversation": {"prompt": "2?", "chosen": [[said("4")], [said("four")]], "rejected": [said("5")]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2?"}], "chosen": ["4", "four"],
                 "rejected": [[{"from": "gpt", "value": "5"}]]},
    "Alpaca": {"instruction": "2?", "input": "", "chosen": ["4", "four"], "rejected": "5"},
    "OpenAI": {"input": {"messages": [Q]}, "preferred_output": [[said("4")], [said("four")]],
               "non_preferred_output": [said("5")]},
    "transcripts": {"question": "2?", "text": [f"<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n{x}<|im_end|>"
                                               for x in ("4", "four")],
                    "worse-text": "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"}}


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_in_a_list_may_be_whatever_one_answer_may_be(form, tmp_path):
    data = load(tmp_path, FORMS[form])
    assert texts(data) == [(0, "4", "5"), (0, "four", "5")]
    start, end, other = 259, 260, [*b"\n"]
    assert data.examples[1].prompt == [start, *b"user\n2?", end, *other, start, *b"assistant\n"]


def test_texts_with_their_prompt_inside(tmp_path):
    """Of Human and Assistant the prompt is the same for all answers. Where it is how two texts begin, it may not be."""
    human = "\n\nHuman: 2?\n\nAssistant:"
    row = {"chosen": [f"{human} 4", f"{human} four"], "rejected": [f"{human} 5"]}
    assert texts(load(tmp_path, row)) == [(0, " 4", " 5"), (0, " four", " 5")]
    message = error_of(tmp_path, {"chosen": "The sky is blue", "rejected": ["The sky is red", "The sea"]})
    assert "row 0: has lists of answers to different prompts, 'The sky is' and 'The'; give their prompt in a" in message


def test_a_list_of_one_answer_is_that_answer(tmp_path):
    """To the byte, for the hash of the data and its order, too; and a list of messages is one conversation."""
    rows = [{"prompt": [Q], "chosen": [said("4")], "rejected": [said("5")], "system": "s"},
            {"prompt": [Q], "chosen": [said("6"), Q, said("7")], "rejected": [said("6"), Q, said("5")],
             "system": ""}]
    lists = [row | {"chosen": [row["chosen"]], "rejected": [row["rejected"]]} for row in rows]
    one, other = load(tmp_path, *rows), load(tmp_path, *lists)
    assert one.examples == other.examples and one.report() == other.report() and len(one.examples) == 2
    assert data_hash(one.examples) == data_hash(other.examples) and row_starts(other.examples) is None
    plain = {"prompt": "2?", "chosen": "4", "rejected": "5", "system": "not read beside plain text"}
    one, other = load(tmp_path, plain), load(tmp_path, plain | {"chosen": ["4"], "rejected": ["5"]})
    assert one.examples == other.examples and one.report() == other.report()


def test_an_answer_that_a_list_has_twice_is_taken_once(tmp_path):
    """Also where only its end of turn tells them apart; the report says so."""
    data = load(tmp_path, {"prompt": "2?", "chosen": ["4", "four", "4"], "rejected": ["5", "5<|im_end|>", "6"]})
    assert texts(data) == [(0, c, r) for c in ("4", "four") for r in "56"]
    assert "  1 row: an answer that a list has twice is taken once" in data.report()
    sft = load(tmp_path, {"prompt": "2?", "chosen": ["4", "4"], "rejected": ["5", "6"]}, loss="sft")
    assert texts(sft) == [(0, "4", "5")]


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_answers_that_a_cut_makes_the_same_are_taken_once(loss, tmp_path):
    """Else their row would count twice. Another row with the same texts is another row."""
    row = {"prompt": "2?", "chosen": ["abcdX", "abcdY", "ab"], "rejected": ["zz"]}
    data = load(tmp_path, row, row, limit=6, overlong="truncate", loss=loss)
    assert [(e.row, bytes(e.chosen[:2]).decode(), len(e.chosen)) for e in data.examples] == [
        (n, "ab", size) for n in (0, 1) for size in (4, 3)]
    assert data.notes["answers that are the same once they are cut are taken once"] == 2


def test_pairs_that_are_dropped_of_a_row_that_stays_are_no_dropped_rows(tmp_path):
    rows = [{"prompt": "q", "chosen": ["ab", "abcdefgh"], "rejected": ["zz"]},
            {"prompt": "qqqq", "chosen": ["ab", "ac"], "rejected": ["zz", "z"]}]
    first, second, *_ = load(tmp_path, *rows, limit=6, overlong="drop").report().splitlines()
    assert first.endswith("rows.jsonl: 1 row, 1 dropped")
    assert second == "  a pair dropped of 1 row with lists of answers"


@pytest.mark.parametrize("changes, words", [
    ({"rejected": ["5", "4"]}, "row 1: chosen[0] and rejected[1]: chosen and rejected are equal"),
    ({"rejected": ["5", " "]}, "chosen[0] and rejected[1]: rejected is empty"),
    ({"chosen": ["4", None]}, "chosen[1] and rejected[0]: chosen is missing"),
    ({"chosen": ["4", ["four", "five"]]}, "chosen[1] and rejected[0]: chosen is of type list"),
    ({"chosen": [], "rejected": "5"}, "row 1: chosen is an empty list"),
    ({"chosen": ["4", {"role": "assistant"}]}, "row 1: rejected[0]: chosen is of type list"),
    ({"chosen": ["4", 3], "rejected": ["5"]}, "row 1: chosen is of type list"),
    ({"prompt": [Q], "chosen": [said("4"), said("four")], "rejected": [said("5")]},
     "row 1: chosen is a list of 2 assistant messages, which is one conversation; give several answers as a list of"),
    ({"rejected": [["5"], [said("6")]]}, "chosen[0] and rejected[0]: rejected is of type list")])
def test_a_bad_answer_makes_a_bad_row(changes, words, tmp_path):
    """It is named, and all pairs of the row are left out with --on_bad_row drop."""
    good, bad = ROW | {"prompt": "1?"}, {"prompt": "2?", "chosen": ["4", "four"], "rejected": ["5", "6"]} | changes
    message = error_of(tmp_path, good, bad)
    assert "1 of 2 rows can't be used; row 1: " in message and words in message
    data = load(tmp_path, good, bad, on_bad_row="drop")
    assert {e.row for e in data.examples} == {0} and [line["row"] for line in data.dropped] == [1]


def test_what_a_tokenizer_makes_bad_is_a_bad_row(tmp_path, monkeypatch):
    from nanodpo.data import encoding

    monkeypatch.setattr(encoding, "_after", lambda prompt, whole, tokenizer: "merges" if 33 in whole else
                        whole[len(prompt):])
    message = error_of(tmp_path, ROW, {"prompt": "1?", "chosen": "a", "rejected": "b"})
    assert "1 of 2 rows can't be used; row 0: chosen[0] and rejected[2]: rejected: merges" in message


def test_limits_are_those_of_a_pair(tmp_path):
    """Pairs of an answer that is too long are left out, and the row's others stay; or the answer is cut, once."""
    row = {"prompt": "2?", "chosen": ["4", "four" * 9], "rejected": ["5", "six", "7" * 9]}
    message = error_of(tmp_path, row, row, limit=12)
    assert "2 of 2 rows (100.0%) are too long; longest: row 0: chosen[1] and rejected[0]: 39 tokens (prompt " in message
    data = load(tmp_path, row, limit=12, overlong="drop")
    assert texts(data) == [(0, "4", "5"), (0, "4", "six"), (0, "4", "7" * 9)]
    assert data.dropped[2]["reason"] == ("chosen[1] and rejected[2]: 39 tokens (prompt 2, chosen 37), "
                                         "over --max_length 12")
    data = load(tmp_path, row, limit=12, overlong="truncate")
    assert [(e.answer_numbers, e.cut) for e in data.examples] == [
        ((i, j), (i == 1, False)) for i in range(2) for j in range(3)]
    assert data.notes["only chosen cut to fit 12 tokens"] == 1


def test_sft_has_each_chosen_answer_once(tmp_path):
    """Not once for each rejected one; those that evaluation follows come one by one, and again from the first."""
    assert texts(load(tmp_path, ROW, loss="sft")) == [(0, "4", "5"), (0, "four", "six")]
    row = {"prompt": "2?", "chosen": ["4", "four", "IV"], "rejected": ["5", "6"]}
    assert texts(load(tmp_path, row, loss="sft")) == [(0, "4", "5"), (0, "four", "6"), (0, "IV", "5")]
    assert texts(load(tmp_path, {"prompt": "2?", "completion": ["4", "four"]}, loss="sft")) == [
        (0, "4", None), (0, "four", None)]
    talks = [[Q, said("4"), Q, said("IV")], [Q, said("four")]]
    data = load(tmp_path, {"messages": talks}, loss="sft")
    assert [e.chosen.scored if hasattr(e.chosen, "scored") else None for e in data.examples][1] is None
    assert len(data.examples) == 2 and len(data.examples[0].chosen.scored) == 2 + 3
    assert "row 0: chosen is of type list" in error_of(tmp_path, {"text": ["one", "two"]}, loss="sft")  # no answers


def test_each_pair_has_the_weight_of_its_row(tmp_path):
    data = load(tmp_path, ROW | {"weight": 0.5}, ROW | {"weight": 0})
    assert [e.weight for e in data.examples] == [0.5] * 6 + [0.0] * 6
    assert data.notes["weight 0, which counts nothing in the loss"] == data.notes["a weight other than 0 and 1"] == 1


def test_data_with_lists_are_not_those_with_rows_for_them(tmp_path):
    """They are trained on in another order, so that a run of the one does not go on with the other. Prepared data that
    were kept are those of the file."""
    apart = [{"prompt": "2?", "chosen": c, "rejected": r} for _, c, r in PAIRS]
    hashes = [data_hash(load(tmp_path, *rows).examples) for rows in ([ROW], apart, [ROW, ROW], [*apart, *apart])]
    assert len({*hashes}) == 4
    rows = [ROW, {"prompt": "1?", "chosen": "a", "rejected": "b"}, ROW]
    plain = load(tmp_path, *rows)
    assert plain.notes["repeats an earlier row"] == 1

    def kept(path, template, how):
        return keep(str(tmp_path / "cache"), path, template, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanodpo.folder.data_cache.SMALL", 1)
        for _ in range(2):
            data = load(tmp_path, *rows, keep=kept)
            assert data.examples == plain.examples and row_starts(data.examples) == (0, 6, 7)


def test_what_pairs_share_is_kept_once(tmp_path):
    """Of 2 and 3 answers one prompt and five answers, in 4 bytes a token; conversations with their scored places."""
    def ids(loss, *rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        how = Reading.of(tiny.DataArguments(loss=loss), loss != "sft")
        found = prepare(str(tmp_path / "rows.jsonl"), read_template(tiny.chatml()), how)
        return found.ids, found.examples()

    kept, examples = ids("dpo", ROW, ROW)
    assert len(kept) == 2 * (len(b"2?") + len(b"4four5six7!") + 5) and len(examples) == 12
    talks = [[Q, said("4"), Q, said("IV")], [Q, said("four"), Q, said("iv")], [Q, said("4"), Q, said("IV")]]
    _, examples = ids("sft", {"messages": talks}, {"messages": talks[1]})
    four = [*range(5), 27, 28, 29]  # between two answers lie 22 tokens
    assert [e.chosen.scored for e in examples] == [[0, 1, 24, 25, 26], four, four]


def test_inspect_shows_every_answer_of_a_row_once(tmp_path):
    data = load(tmp_path, *({"weight": w} | row for w, row in (
        (2, ROW), (1, {"prompt": "3?", "chosen": "6", "rejected": ["7", "8"]}))))
    text = inspect(data, tiny.chatml(), 1000)
    assert "\nrow 0, 6 pairs, weight 2; [scored tokens] in brackets" in text
    shown = [line for line in text.splitlines() if line.startswith("---")]
    assert [line.split(":")[0] for line in shown] == [f"--- {name}" for name in (
        "chosen[0]", "chosen[1]", "rejected[0]", "rejected[1]", "rejected[2]")]
    assert "2?[s][i][x][<|im_end|>]" in text
    shown = [line for line in inspect(data, tiny.chatml(), 1000, 1).splitlines() if line.startswith("---")]
    assert [line.split(":")[0] for line in shown] == ["--- chosen", "--- rejected[0]", "--- rejected[1]"]


# Order


def test_pairs_of_a_row_stay_together_in_an_order_of_rows():
    """Every epoch visits every pair once; rows come in the order of as many rows of one pair; without lists the order
    is, to the last place, what it was."""
    sizes = [1, 6, 2, 1, 3]
    starts = tuple(itertools.accumulate(sizes[:-1], initial=0))
    for epoch in range(3):
        order = pair_order(13, 42, epoch, starts)
        rows = [[*range(start, start + size)] for start, size in zip(starts, sizes)]
        assert [*order] == [i for row in epoch_order(5, 42, epoch) for i in rows[row]]
        windows = [pairs_of_step(13, 4, 42, 4 * epoch + step, starts) for step in range(4)]
        assert [i for window in windows for i in window] == [*order] and [*map(len, windows)] == [4, 4, 4, 1]
        assert pairs_of_step(13, 4, 42, 4 * epoch, None) == list(epoch_order(13, 42, epoch)[:4])
        assert pair_order(5, 42, epoch, tuple(range(5))) == epoch_order(5, 42, epoch)


def test_where_rows_start_is_hashed_once():
    """Each step asks for the order of its epoch, which is kept under where rows start: of a million rows a hash takes
    milliseconds."""
    class Counted(int):
        hashes = 0

        def __hash__(self):
            Counted.hashes += 1
            return super().__hash__()

    found = row_starts([Example(i // 2, [1], [2], [3], answer_numbers=(0, i % 2)) for i in range(40)])
    starts = type(found)(map(Counted, found))
    assert found == tuple(range(0, 40, 2)) == starts
    windows = [pairs_of_step(40, 4, 42, step, starts) for step in range(10)]
    assert windows == [pairs_of_step(40, 4, 42, step, found) for step in range(10)] and Counted.hashes == len(starts)


def test_where_rows_start():
    """Also where the first pairs of one were left out, and where one comes twice."""
    def starts(*pairs):
        return row_starts([Example(row, [1], [2], [3], answer_numbers=which) for row, which in pairs])

    assert starts((0, (0, 0)), (1, (0, 0)), (1, (0, 0)), (2, (0, 0))) is None
    assert starts((0, (0, 1)), (0, (1, 0)), (1, (0, 0)), (2, (0, 0)), (2, (0, 1))) == (0, 2, 3)
    assert starts((0, (0, 0)), (0, (0, 1)), (0, (0, 0)), (0, (0, 1))) == (0, 2)


def test_rows_are_held_out_and_mixed_as_a_whole(tmp_path):
    """No pair of a row is trained on where another one is held out; weights of data sets count rows."""
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": ["no"] + ["never"] * (i % 2)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = TrainArguments(train_file_path=str(tmp_path / "rows.jsonl"), eval_size=3, seed=1)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))
    train, held_out, _ = load_data(args, SimpleNamespace(tokenizer=tiny.chatml(), context=100, config=config))
    kept, held = ({e.row for e in data.examples} for data in (train, held_out))
    assert len(held) == 3 and not kept & held and kept | held == {*range(8)}
    assert held == {epoch_order(8, 1, -1)[i] for i in range(3)}
    assert len(train.examples) + len(held_out.examples) == 12 and train.report().startswith(
        f"data {tmp_path}/rows.jsonl: 8 rows, 0 dropped, 3 held out\n  lists of answers: 5 rows make ")
    examples = [Example(row, [row], [1], [2], answer_numbers=(0, j)) for row in range(10) for j in range(1 + row % 2)]
    data = DataSet("a.jsonl,b.jsonl", examples, [], Counter(), sizes=[4, 6])
    mix(data, [2, 0.5], 0)
    assert Counter(e.row for e in data.examples if e.row < 4) == {0: 2, 1: 4, 2: 2, 3: 4}
    drawn = Counter(e.row for e in data.examples if e.row > 3)
    assert len(drawn) == 3 and all(count == 1 + row % 2 for row, count in drawn.items())
    assert data.mixture.startswith("an epoch has 11 rows: 8 of a.jsonl (2 times 4), 3 of b.jsonl (0.5 times 6)")

