"""The figure of a ledger: its bars and curves are the table's sums; what it refuses."""

import json

import numpy as np
import pandas
import pytest

import plot
from nanodpo.errors import UserError
from nanodpo.figures.ledger import NAMED, ledger_figure

PAIRS, STEPS = 14, 7


@pytest.fixture
def folder(tmp_path):
    """Two pairs a step; pair k has the share +-(k + 1) / 1000 for each side, and weight decay a tenth of it."""
    lines = []
    for k in range(PAIRS):
        share = (k + 1) / 1000 * (-1) ** k
        lines += [(k // 2, k, "chosen", share), (k // 2, k, "rejected", share / 2)]
    lines += [(step, None, "weight_decay", 1e-3) for step in range(STEPS)]
    table = pandas.DataFrame(lines, columns=["step", "pair", "side", "share"])
    table = table.assign(run="r", dataset="test", response="chosen", row=pandas.NA, effect=0.0)
    table[["row", "pair"]] = table[["row", "pair"]].astype("Int64")
    single = table.assign(row=pandas.array([3] * len(table), dtype="Int64"), share=99.0)  # not in the figure
    pandas.concat([table, single]).to_parquet(tmp_path / "ledger.parquet")
    change = table["share"].sum() + 0.002
    record = {"dataset": "test", "row": None, "response": "chosen", "rows": 5, "run": "r", "steps": STEPS,
              "change": change, "residual": 0.002 / change, "doubts": ["unreliable: so it is", "ill-conditioned: too"],
              "levels": [-1 + change * k / STEPS for k in range(STEPS + 1)]}
    (tmp_path / "ledger.json").write_text(json.dumps([record, record | {"row": 3}]))
    return tmp_path


def test_rows_without_a_share_are_not_counted(folder):
    """Those of --without_rows, and of weight 0, raised nothing."""
    def names():
        return [label.get_text() for label in ledger_figure(folder, 2)[0].axes[1].get_yticklabels()]

    before, file = names(), folder / "ledger.parquet"
    table = pandas.read_parquet(file)
    light = table[table["pair"] == 0]
    pandas.concat([table, *(light.assign(pair=100 + k, share=0.0).astype({"pair": "Int64"}) for k in range(9))]
                  ).to_parquet(file)
    assert names() == before


def test_the_bars_follow_one_another_to_the_change(folder):
    figure, caption = ledger_figure(folder, 2)
    left, right = figure.axes
    table = pandas.read_parquet(folder / "ledger.parquet")
    table = table[table["row"].isna()]
    bars = right.patches
    names = [label.get_text() for label in right.get_yticklabels()]
    ends = np.cumsum([bar.get_width() for bar in bars[:-1]])
    assert names[0] == "row 13" and bars[0].get_width() == pytest.approx(-0.014 * 1.5)  # lowered it most
    assert names[NAMED] == "others that lowered it: 2" and names[-3:] == ["weight decay", "left over", "change"]
    assert [bar.get_x() for bar in bars[1:-1]] == pytest.approx(ends[:-1])
    assert ends[-1] == pytest.approx(bars[-1].get_width()) == pytest.approx(table["share"].sum() + 0.002)
    assert bars[-2].get_width() == pytest.approx(0.002)
    chosen = next(line for line in left.lines if line.get_label() == "from chosen halves")
    assert chosen.get_ydata()[-1] == pytest.approx(table[table["side"] == "chosen"]["share"].sum())
    assert chosen.get_ydata()[1] == pytest.approx((1 - 2) / 1000)  # pairs 0 and 1 of step 0
    assert "5 rows of test" in caption and "unreliable" in left.get_ylabel() and "conditioned" in left.get_ylabel()
    assert "Of chosen on test the shares are unreliable: so it is." in caption  # as score.py says of them


def test_the_caption_counts_the_rows_of_each_data_set(folder):
    """The panels of a second data set are means over rows of its own."""
    table = pandas.read_parquet(folder / "ledger.parquet")
    pandas.concat([table, table.assign(dataset="hard")]).to_parquet(folder / "ledger.parquet")
    record = json.loads((folder / "ledger.json").read_text())[0]
    (folder / "ledger.json").write_text(json.dumps([record, record | {"dataset": "hard", "rows": 1}]))
    assert "over 5 rows of test and 1 row of hard in r, 7 steps." in ledger_figure(folder, 2)[1]


def test_plot_writes_it(folder):
    plot.main([str(folder), "--ledger"])
    assert {"ledger.png", "ledger.pdf", "ledger.svg", "ledger.tex"} <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "ledger.parquet").unlink(), "is not there; score.py makes it where it is told --ledger ROWS"),
    (lambda f: (f / "ledger.parquet").write_text("x"), "ledger.parquet: can't be read"),
    (lambda f: (f / "ledger.json").unlink(), r"ledger.json: can't be read \(No such file"),
    (lambda f: (f / "ledger.json").write_text("[{"), "ledger.json: can't be read as JSON"),
    (lambda f: (f / "ledger.json").write_text("3"), "ledger.json: is not what score.py writes"),
    (lambda f: (f / "ledger.json").write_text('[{"row": null, "dataset": "test"}]'), "is not what score.py writes"),
    (lambda f: (f / "ledger.json").write_text("[]"), "has single rows alone"),
    (lambda f: pandas.read_parquet(f / "ledger.parquet").drop(columns="share").to_parquet(f / "ledger.parquet"),
     "no column share"),
])
def test_wrong_files_are_one_line(folder, change, words):
    change(folder)
    with pytest.raises(UserError, match=words):
        plot.main([str(folder), "--ledger"])


def test_two_runs_are_refused(folder):
    with pytest.raises(UserError, match="--ledger: is of one run, and 2 are named"):
        plot.main([str(folder), str(folder / ".." / folder.name / "x"), "--ledger"])
