"""The tables of a scoring: what score.py keeps of a checkpoint and data set, and how the parts become its output.

All begin with run, phase (the run's loss), checkpoint (path), step and dataset. Log-probs are in nats. What has a row
has a problem beside it: a short hash that rows with one prompt, or of one question and its reverse, share. Standard
errors are over the problems of one run (stats.py).

    scores.parquet    row, response, tokens, logps (the sum, float64), mean_logps (logps / tokens), and means over the
                      response's tokens: argmax_logps, entropy, argmax_mass, implausible_mass and
                      implausible_mass_start (measures.py), accuracy (rank 1)
    pairs.parquet     row, rewards of chosen and rejected = beta (logps - those at the run's step 0), margin, weight =
                      -d loss / d margin, shared (tokens before the responses part), ches, ches_normalised; the
                      products of gradients where they were asked for. Without the run's step 0, rewards are missing.
                      The weight under the run's label smoothing e: of dpo, sigma(-margin) - e, which is 0.5 - e at
                      step 0; of robust, sigma(-margin) + e / (1 - 2e); of hinge, 1 below a margin of 1, else 0; of
                      ipo, whose loss is not of this margin, and of sft it is missing
    sections.csv      by response and part of it (tenths, prefix and suffix of a pair, think and answer): n, problems,
                      mean and standard error of mean_logps, and the means of the measures, over rows of one run
    tokens.parquet    row, response, position, token (text), logp, entropy, argmax_logp, rank, implausible_mass,
                      implausible_mass_start
    answers.parquet   row, found, expected, correct, ended, tokens, repetition, prompt_end, text: greedy answers of each
                      checkpoint; answers.txt has the first and the last one's side by side
    failed.jsonl      rows whose log-prob is not finite; they have no number above, and are in no mean
    summary.csv       n, problems, mean, median, standard error of mean_logps, and the means of the other measures, by
                      response, over rows of one run; likewise of "gap", chosen - rejected of a row; and
                      right_answers of so many answers
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet

from ..errors import RunStopped, first_line
from ..folder.atomic import new_file
from .means import KEYS, MEASURES, add_rewards, means, summary
from .needs import PAIR

COLUMNS = [*KEYS, "row", "problem", "response", "tokens", "logps", "mean_logps", *MEASURES]
TABLES = ("scores", "pairs", "sections", "tokens", "answers", "failed")


@dataclasses.dataclass
class Found:
    """What is there of a checkpoint and a data set. `check` turns greedy answers by row into lines."""

    checkpoint: object
    probe: object
    needs: list
    parts: object
    check: Callable[[dict[int, list[int]]], list[dict]]

    def table(self, name: str) -> pandas.DataFrame:
        """The lines of a table, in the order of rows and responses, with what they are of."""
        if name == "answers":
            said = pandas.concat([pandas.DataFrame(), *self._read("answers", "answers")])
            table = pandas.DataFrame(self.check({row: ids.tolist() for row, ids in said.to_numpy().tolist()}))
        else:
            table = pandas.concat([pandas.DataFrame(), *self._read("tokens" if name == "tokens" else "scores", name)])
        products = self._read("gradients", "gradients") if name == "pairs" else []
        if products and len(table):
            table = table.merge(pandas.concat(products), on="row", how="left")
        return self._labelled(table) if len(table) else table

    def _read(self, what: str, name: str) -> list[pandas.DataFrame]:
        wanted = [need for need in self.needs if need.what == what and (name != "pairs" or need.responses == PAIR)]
        found = [self.parts.read(need.key, name) for need in wanted]
        return [table for table in found if len(table)]

    def _labelled(self, table: pandas.DataFrame) -> pandas.DataFrame:
        keys = {key: getattr(self.checkpoint, key) for key in ("run", "phase", "step")}
        table = table.assign(**keys, checkpoint=self.checkpoint.path, dataset=self.probe.name)
        rows = {example.row: i for i, example in enumerate(self.probe.examples)}
        order = [table["row"].map(rows)]
        if "response" in table:
            order.insert(0, table["response"].map(self.probe.kinds.index))
        table = table.iloc[np.lexsort(order)]  # keeps the order of tokens, sections
        return table[[*KEYS, *(column for column in table if column not in KEYS)]]


def join(folder: Path, found: list[Found], runs: dict) -> dict[str, pandas.DataFrame]:
    """Writes the output files. Returns the tables, less tokens, which may be larger than memory, and as "tenths" the
    sections' lines of chosen's tenths, row by row."""
    tables = {name: _concat([item.table(name) for item in found]) for name in TABLES if name != "tokens"}
    tables["scores"] = tables["scores"][COLUMNS]
    tables["pairs"] = add_rewards(tables["pairs"], tables["scores"], runs)
    tables["summary"] = summary(tables["scores"], tables["answers"])
    tables["tenths"] = pandas.DataFrame()
    if len(tables["sections"]):
        tables["tenths"] = tables["sections"][(tables["sections"]["response"] == "chosen")
                                              & tables["sections"]["section"].str.startswith("tenth")]
        tables["sections"] = means(tables["sections"], [*KEYS, "response", "section"]).drop(columns="median")
    for name in ("scores", "pairs", "answers"):
        _write(folder / f"{name}.parquet", tables[name], lambda file, table: table.to_parquet(file, index=False))
    for name in ("summary", "sections"):
        _write(folder / f"{name}.csv", tables[name], lambda file, table: table.to_csv(file, index=False))
    _write(folder / "failed.jsonl", tables["failed"],
           lambda file, table: table.to_json(file, orient="records", lines=True))
    _stream((item.table("tokens") for item in found), folder / "tokens.parquet")
    return tables


def contents(folder: Path) -> list[str]:
    """What the tables of a folder hold, in words; nothing where there are none that can be read."""
    found = [f"{name}.parquet" for name in ("tokens", "answers") if (folder / f"{name}.parquet").exists()]
    try:
        table = pandas.read_parquet(folder / "scores.parquet", columns=["run", "step", "dataset", "response"])
    except (OSError, ValueError, pyarrow.ArrowException):
        return found
    runs = [f"{run} step {step}" for run, step in table[["run", "step"]].drop_duplicates().itertuples(index=False)]
    return [*runs, *(f"data set {name}" for name in table["dataset"].unique()),
            *(f"response {name}" for name in table["response"].unique()), *found]


def write_json(file: Path, value) -> None:
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Puts a text in place of the file; where it is empty no file, and none that an earlier call left."""
    if not text:
        return file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _new_file(file) as place:
        place.write_text(text)


def _concat(tables: list[pandas.DataFrame]) -> pandas.DataFrame:
    found = [table for table in tables if len(table)]
    return pandas.concat(found, ignore_index=True) if found else pandas.DataFrame()


def _write(file: Path, table: pandas.DataFrame, write) -> None:
    """A table in place of the file; without rows no file, and none that an earlier call left."""
    if table.empty:
        return file.unlink(missing_ok=True)
    with _new_file(file) as place:
        write(place, table)


def _stream(tables, target: Path) -> None:
    """All of these tables as one file, one in memory at a time."""
    tables = (table for table in tables if len(table))
    if (first := next(tables, None)) is None:
        target.unlink(missing_ok=True)
        return
    schema = pyarrow.Schema.from_pandas(first, preserve_index=False)
    with _new_file(target) as place, pyarrow.parquet.ParquetWriter(place, schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(pyarrow.Table.from_pandas(table, schema, preserve_index=False))


@contextlib.contextmanager
def _new_file(file: Path):
    try:
        with new_file(file) as place:
            yield place
    except OSError as error:
        raise unwritten(file, error) from error


def unwritten(place: Path, error: Exception) -> RunStopped:
    """A full disk, mostly."""
    return RunStopped(f"{place}: can't be written ({first_line(error)}); the parts that are done are whole, the same "
                      "command goes on from them")
