"""The tables of a scoring: how much memory they take while they are made, and what they are made of."""

import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow
import pytest

from nanodpo.data.example import SIDES
from nanodpo.errors import UserError
from nanodpo.scoring import tables, verdict
from nanodpo.scoring.measures import MEASURES
from nanodpo.scoring.parts import Parts
from nanodpo.scoring.plan import Result, Work

KINDS, SETTINGS = [*SIDES, "other", "shuffled"], {"reference": None, "loss": "dpo", "beta": 0.1, "sft_weight": 0.0,
                                                  "label_smoothing": 0.0, "loss_kwargs": "", "record": {}}
BYTES = 3000  # of a row and checkpoint; these were 24,000 while all tenths of all rows were in memory
POOLS = []  # of Arrow; what they hold may be needed after a test


def kept(parts: Parts, rows: int, count: int) -> list[Work]:
    """Puts numbers by chance into parts, of so many rows and checkpoints, and returns their work."""
    rng, settings = np.random.default_rng(0), SimpleNamespace(**SETTINGS)
    names = [f"tenth {i + 1}" for i in range(10)] + ["think", "answer"]
    data = SimpleNamespace(name="test", kinds=KINDS, questions={},
                           examples=[SimpleNamespace(row=i, problem=f"{i // 2:012x}") for i in range(rows)])
    # Later rows are scored first, as where they are longer.
    key = pandas.DataFrame({"row": range(rows), "problem": [e.problem for e in data.examples]})[::-1]

    def with_means(table):
        means = pandas.DataFrame(rng.random((len(table), 1 + len(MEASURES))), columns=["mean_logps", *MEASURES])
        return pandas.concat([table.reset_index(drop=True), means], axis=1)

    scores = key.merge(pandas.DataFrame({"response": KINDS, "tokens": 20, "logps": -1.0}), how="cross")
    sections = scores.drop(columns=["tokens", "logps"]).merge(pandas.DataFrame({"section": names, "tokens": 2}),
                                                             how="cross")
    work = []
    for step in range(count):
        checkpoint = SimpleNamespace(run="run", phase="dpo", step=step, path=f"runs/run/checkpoint-{step}",
                                     key=str(step), settings=settings)
        results = [Result("scores", unit, {i: i for i in range(rows)}, f"{step} {unit}", f"{step} {unit}")
                   for unit in (SIDES, ("other",), ("shuffled",))]
        parts.add({result.key: result.held(range(rows)) for result in results}, {
            "scores": with_means(scores), "sections": with_means(sections), "pairs": key.assign(shared=1, ches=1.0)})
        work.append(Work(checkpoint, data, None, results))
    return work


def made(folder: Path, work: list[Work], parts: Parts) -> int:
    """Makes the tables and the verdict. Returns the most bytes that Python and Arrow held meanwhile."""
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    POOLS.append(pool)
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        found = tables.join(folder, work, parts, {"run": work[0].checkpoint.settings})
        assert verdict.judge(found["scores"], found["pairs"], found["answers"], found["tenths"])
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(before)


def test_further_checkpoints_take_little_memory(tmp_path):
    """Those of a long run: from 4 to 12 the most memory grows by less than BYTES a row and checkpoint."""
    rows, few, many = 300, 4, 12
    with Parts(tmp_path / "parts") as parts:
        work = kept(parts, rows, many)
        made(tmp_path, work[:few], parts)  # what is imported at first use
        less, more = (made(tmp_path, work[:count], parts) for count in (few, many))
    assert (more - less) / rows / (many - few) < BYTES


def test_what_a_folder_holds_is_named(tmp_path):
    """Each step of each run, data set and response once, and the other tables; so that what goes can be said."""
    assert tables.contents(tmp_path) == []
    (tmp_path / "risers.parquet").touch(), (tmp_path / "answers.parquet").touch()
    assert tables.contents(tmp_path) == ["risers.parquet", "answers.parquet"]
    pandas.DataFrame([{"run": run, "step": step, "dataset": "d", "response": side, "row": row}
                      for run, step in (("a", 0), ("a", 4), ("b", 0)) for side in SIDES for row in range(2)]
                     ).to_parquet(tmp_path / "scores.parquet")
    assert tables.contents(tmp_path) == ["a step 0", "a step 4", "b step 0", "data set d", "response chosen",
                                         "response rejected", "risers.parquet", "answers.parquet"]


def test_weights_of_which_no_log_prob_is_finite_are_refused(tmp_path):
    """Before anything of them is kept. One row that failed is no reason."""
    with Parts(tmp_path / "parts") as parts:
        (item,) = kept(parts, 2, 1)
        new, there = Result("scores", SIDES, {0: 0, 1: 1}, "new", "new"), {*parts.index}
        lines = [{"row": row, "response": side, "logps": math.nan} for row in range(2) for side in SIDES]
        with pytest.raises(UserError, match="runs/run/checkpoint-0: no log-prob of test is finite: the weights are"):
            tables.keep(parts, item, [([new], i, {"scores": lines}) for i in range(2)])
        assert {*parts.index} == there
        tables.keep(parts, item, [([new], 0, {"scores": [lines[0], lines[1] | {"logps": -1.0}]})])
        assert {*parts.index} == there | {"new"}


def test_sections_are_means_over_the_rows_of_each_checkpoint(tmp_path):
    """Of 20 rows under 3 checkpoints, against the sums of all lines; tenths are those of the first and the last."""
    with Parts(tmp_path / "parts") as parts:
        work = kept(parts, 20, 3)
        found = tables.join(tmp_path, work, parts, {})
    written = pandas.read_csv(tmp_path / "sections.csv")
    assert written[["step", "response", "section"]].drop_duplicates().shape[0] == len(written) == 3 * 4 * 12
    files = sorted((tmp_path / "parts").glob("*/sections.parquet"), key=lambda file: file.stat().st_mtime_ns)
    for step, file in enumerate(files):
        lines, here = pandas.read_parquet(file), written[written["step"] == step].set_index(["response", "section"])
        sums = lines.groupby(["response", "section"])[["mean_logps", *MEASURES]].sum() / 20
        truth = sums.rename(columns={"mean_logps": "mean"})
        pandas.testing.assert_frame_equal(here[truth.columns].sort_index(), truth.sort_index(), rtol=1e-12)
        assert set(here["n"]) == {20} and set(here["problems"]) == {10}
        tenths = found["tenths"][found["tenths"]["step"] == step]
        its = lines[(lines["response"] == "chosen") & lines["section"].str.startswith("tenth")]
        assert sorted(tenths["mean_logps"]) == (sorted(its["mean_logps"]) if step in (0, 2) else [])
