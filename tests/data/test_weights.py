"""The column `weight`: what it may be, what is refused, and that it is part of what makes data the same data."""

import json

import pytest
import tiny_tokenizers
from conftest import train
from safetensors.torch import load_file

from nanodpo.data.inspection import inspect
from nanodpo.data.schedule import pairs_of_step
from nanodpo.data.template import read_template
from nanodpo.data.tokens import check_weights, load_dataset
from nanodpo.errors import UserError
from nanodpo.folder.data_cache import keep
from nanodpo.folder.reference import data_hash, token_hash


def pair(i: int, **more) -> dict:
    return {"prompt": f"{i}?", "chosen": "yes", "rejected": "no", **more}


def load(folder, rows, name="rows.jsonl", text=None, keep=None, **arguments):
    file = folder / name
    file.write_text(text or "".join(json.dumps(row) + "\n" for row in rows))
    how = tiny_tokenizers.DataArguments(**arguments)
    return load_dataset(str(file), read_template(tiny_tokenizers.chatml()), how, 1000, how.loss != "sft", keep=keep)


def weights(data) -> list[float]:
    return [example.weight for example in data.examples]


def test_a_weight_is_read_and_said(tmp_path):
    """Of pairs, of conversations and of texts alike; the report counts what is not 1, and --inspect shows it."""
    data = load(tmp_path, [pair(i, weight=w) for i, w in enumerate((1, 0.5, 0, 3, 0))])
    assert weights(data) == [1.0, 0.5, 0.0, 3.0, 0.0]
    assert data.columns == "columns: prompt, chosen, rejected; with weight"
    assert {"2 rows: weight 0, which counts nothing in the loss", "2 rows: a weight other than 0 and 1"} <= {
        line.strip() for line in data.report().splitlines()}
    assert "\nrow 1, weight 0.5; [scored" in inspect(data, tiny_tokenizers.chatml(), 1000, 1)
    assert "\nrow 0; [scored" in inspect(data, tiny_tokenizers.chatml(), 1000, 0)
    talk = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]
    for row in ({"messages": talk}, {"text": "a text"}, {"prompt": "2?", "completion": "4"}):
        assert weights(load(tmp_path, [row | {"weight": 2.5}], loss="sft")) == [2.5]


def test_without_the_column_or_with_nothing_in_it_every_weight_is_1(tmp_path):
    assert weights(load(tmp_path, [pair(0), pair(1)])) == [1.0, 1.0]
    data = load(tmp_path, [pair(0, weight=None), pair(1, weight=None)])
    assert weights(data) == [1.0, 1.0] and data.columns.endswith("; not read: weight")


@pytest.mark.slow
def test_a_run_begins_with_steps_in_which_nothing_counts(tiny, tmp_path):
    """The weights are 0 in all rows of its first step, which makes no update: not as if none had reached the adapter.
    """
    (first,) = pairs_of_step(6, 1, 42, 0)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(pair(i, weight=float(i != first))) + "\n" for i in range(6)))
    train(tiny, tmp_path / "run", "--train_file_path", file, "--max_steps", "2", "--save_steps", "1")
    before, same, after = (load_file(tmp_path / "run" / f"checkpoint-{k}" / "adapter_model.safetensors")
                           for k in range(3))
    assert all(same[name].equal(tensor) for name, tensor in before.items())
    assert not all(after[name].equal(tensor) for name, tensor in before.items())


def test_csv_has_numbers_as_text(tmp_path):
    """There alone: in JSON a text is no number."""
    text = "prompt,chosen,rejected,weight\n2?,4,5,0.5\n3?,6,7,2\n"
    data = load(tmp_path, [], "rows.csv", text)
    assert weights(data) == [0.5, 2.0] and data.examples[0].chosen == [*b"4", 260]
    for value in ("", "heavy", "nan", "-1", "1e300", "1e-300"):
        with pytest.raises(UserError, match="row 1: has the weight"):
            load(tmp_path, [], "rows.csv", text.replace(",2\n", f",{value}\n"))


@pytest.mark.parametrize("value, shown", [
    ("true", "true"), ('"2"', '"2"'), ('"heavy"', '"heavy"'), ("NaN", "nan"), ("-0.5", "-0.5"), ("Infinity", "inf"),
    ("1e999", "inf"), ("1" + "0" * 400, "1" + "0" * 39), ("null", "null"), ("[1]", "[1]"), ('{"a": 1}', '{"a": 1}')])
def test_what_is_no_number_of_0_or_more_is_one_line(value, shown, tmp_path):
    """It names the file, the row, what was found and what to do; with --on_bad_row drop the row is left out."""
    text = json.dumps(pair(0, weight=1)) + "\n" + json.dumps(pair(1))[:-1] + f', "weight": {value}}}\n'
    with pytest.raises(UserError) as caught:
        load(tmp_path, [], text=text)
    assert str(caught.value).startswith(
        f"{tmp_path}/rows.jsonl: 1 of 2 rows can't be used; row 1: has the weight {shown}, and the weight of a row in "
        "the loss is 0 or a number from 1e-9 to 1e9; give one in every row, or rename the column where it means "
        "something else. ") and "\n" not in str(caught.value)
    data = load(tmp_path, [], text=text, on_bad_row="drop")
    assert weights(data) == [1.0] and data.dropped[0]["row"] == 1


def test_all_weights_0_are_refused(tmp_path):
    data = load(tmp_path, [pair(0, weight=0), pair(1, weight=0.0)])
    with pytest.raises(UserError, match="rows.jsonl: every row that is left has the weight 0, .*remove the column"):
        check_weights(data)
    check_weights(load(tmp_path, [pair(0, weight=0), pair(1, weight=1e-9)]))


def test_weights_are_part_of_what_makes_data_the_same(tmp_path):
    """Weights of 1 are those of data without the column. Log-probs of the reference do not depend on them."""
    def loaded(*values):
        return load(tmp_path, [pair(i, **({} if w is None else {"weight": w})) for i, w in enumerate(values)]).examples

    sets = [loaded(*values) for values in ((None, None), (1, 0.5), (0.5, 1), (1, 0), (2, 2))]
    assert len({*map(data_hash, sets)}) == len(sets) and len({*map(token_hash, sets)}) == 1
    assert data_hash(loaded(1, 1.0)) == data_hash(sets[0]) == token_hash(sets[0])


def test_prepared_data_have_their_weights(tmp_path, monkeypatch):
    """Kept and read again, they are those of the file; another weight is another entry."""
    monkeypatch.setattr("nanodpo.folder.data_cache.SMALL", 1)

    def kept(path, template, how):
        return keep(str(tmp_path / "cache"), path, template, how)

    rows = [pair(i, weight=w) for i, w in enumerate((0.1, 2, 1))]
    first, again = load(tmp_path, rows, keep=kept), load(tmp_path, rows, keep=kept)
    assert weights(first) == weights(again) == [0.1, 2.0, 1.0] and first.examples == again.examples
    rows[2]["weight"] = 7
    assert weights(load(tmp_path, rows, keep=kept)) == [0.1, 2.0, 7.0]
    assert len([*(tmp_path / "cache").glob("data-*")]) == 2
