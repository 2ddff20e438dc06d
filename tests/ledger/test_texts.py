"""The texts of the pairs that a ledger names."""

import json
from types import SimpleNamespace

import pandas

from nanodpo.ledger.texts import LONGEST, add_texts, as_text, strongest


def test_lists_of_answers_and_conversations_one_after_the_other(tmp_path):
    answer = [{"role": "assistant", "content": "6"}]
    row = {"prompt": "2+3?", "chosen": ["5", "five"], "rejected": [answer, [{"role": "assistant", "content": "7"}]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    args = SimpleNamespace(prompt_field=None, chosen_field=None, rejected_field=None, loss="dpo",
                           train_file_path=str(tmp_path / "rows.jsonl"))
    table = pandas.DataFrame([{"dataset": "test", "response": "chosen", "row": None, "pair": 0, "side": "chosen",
                               "share": -1.0}])
    records = [{"row": None, "dataset": "test", "response": "chosen"}, {"row": 3, "dataset": "test",
                                                                        "response": "chosen"}]
    add_texts(records, table, args)
    assert records[0]["texts"] == {0: ["2+3?", "5\n\nfive", "assistant: 6\n\nassistant: 7"]}
    assert "texts" not in records[1]


def test_a_long_text_is_cut():
    assert as_text("a" * LONGEST) == "a" * LONGEST
    assert as_text("ab " * 2000) == ("ab " * 2000)[:4000] + " ... (2,000 characters more)"
    assert as_text(None) == "" and as_text({"é": 1}) == '{"é": 1}'


def test_the_strongest_pairs():
    """Of 14 pairs, 0 to 13, each moves by k - 6 with its chosen side and by a tenth of that with its rejected one, in
    two steps; weight decay is no pair's."""
    lines = [{"pair": k, "side": side, "share": (k - 6) * part / 2} for _ in range(2) for k in range(14)
             for side, part in (("chosen", 1.0), ("rejected", 0.1))]
    table = pandas.DataFrame([*lines, {"pair": None, "side": "weight_decay", "share": 99.0}]).astype({"pair": "Int64"})
    found = strongest(table)
    assert [row for row, *_ in found["lowered"]] == [0, 1, 2, 3, 4] and [row for row, *_ in found["raised"]] == [
        13, 12, 11, 10, 9]
    for row, *shares in (*found["lowered"], *found["raised"]):
        assert [round(share, 9) for share in shares] == [round((row - 6) * part, 9) for part in (1.1, 1.0, 0.1)]
