"""Reads what runs and scorings left, and refuses numbers that can't be trusted."""

import json
import math
from pathlib import Path

import pandas
import pyarrow.parquet

from ..data.example import SIDES
from ..errors import UserError
from ..files import read_text
from ..folder.log import MAX_BYTES
from .axes import listed
from .tables import LARGEST, NAMES, odd, read_csv, read_parquet, refuse

# The metrics that are drawn or taken from one another, of training and under evaluation.
DRAWN = {prefix + name for prefix in ("", "eval_") for name in (
    "loss", "rewards/margins",
    *(f"{kind}/{side}" for kind in ("rewards", "logps_per_token", "ref_logps_per_token") for side in SIDES))}
KEYS = ["run", "phase", "dataset", "row", "response", "step"]
MASS = ("implausible_mass", "implausible_mass_start")  # the second: of step 0 on the same tokens
ROWS = ["run", "dataset", "row", "problem"]
TOKENS = ["run", "dataset", "response", "step", "position", "token", "logp"]
SERIES = {"series": str, "step": float, "mean": float, "low": float, "high": float, "dataset": str, "response": str,
          "phase": str}  # of a csv of series: its columns, the first three always


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; raises UserError, naming the line, where one can't be drawn."""
    file, lines, seen = folder / "metrics.jsonl", [], set()
    try:
        texts = read_text(file, MAX_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or 'not text'}; a run's folder has one") from error
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not JSON: {text[:60]!r}") from error
        if not isinstance(line, dict) or "step" not in line:
            raise UserError(f"{file}, line {number}: expected an object with a step, found {text[:60]!r}")
        for name in sorted(line.keys() & (DRAWN | {"step"})):
            if type(line[name]) not in (int, float) or not abs(line[name]) <= LARGEST:
                found = json.dumps(line[name])[:60]
                raise UserError(f"{file}, line {number}: {name} is {found}, not a finite number within {LARGEST:g}")
        if type(line["step"]) is not int or line["step"] < 0:
            raise UserError(f"{file}, line {number}: step is {line['step']}, not a whole number from 0")
        here = {(line["step"], name) for name in DRAWN & line.keys()}
        if seen & here:
            raise UserError(f"{file}, line {number}: step {line['step']} is there twice")
        seen |= here
        lines.append(line)
    if not any(DRAWN & line.keys() for line in lines):
        raise UserError(f"{file}: has no step to draw yet")
    return lines


def read_scores(files: list[Path]) -> pandas.DataFrame:
    """KEYS, tokens, mean_logps, problem and, where they are there, MASS of these files of score.py. A score that is
    missing (a failed row) stays, as NaN. In a table without problems every row is one of its own.

    Raises UserError, naming file and row, where a table can't be drawn.
    """
    tables = []
    for file in files:
        table = read_parquet(file, [*KEYS, "tokens", "mean_logps"], more=("problem", *MASS), gaps=("mean_logps", *MASS))
        tables.append(by_row(file, table, KEYS))
        if table["mean_logps"].isna().all():
            raise UserError(f"{file}: every score in it is missing; all its rows failed")
    runs = [run for table in tables for run in table["run"].unique()]
    if shared := sorted({run for run in runs if runs.count(run) > 1}):
        raise UserError(f"{', '.join(map(str, files))}: more than one has a run called {', '.join(shared)}")
    return pandas.concat(tables, ignore_index=True)


def by_row(file: Path, table: pandas.DataFrame, keys: list[str]) -> pandas.DataFrame:
    """The table; in one without problems every row is one of its own. Raises UserError for `keys` that two lines have.
    """
    table = table if "problem" in table else table.assign(problem=table["row"].astype(str))
    refuse(file, table, table.duplicated(keys), "is there twice")
    return table


def read_measure(files: list[Path], column: str, response: str) -> pandas.DataFrame:
    """ROWS, step and a column of numbers: of the lines of this response in these files of scores or, without a
    response, of pairs.parquet beside them. Raises UserError where no line is left, or no column; naming file and row,
    where a table can't be drawn."""
    if column in (*KEYS, "problem", "checkpoint"):
        raise UserError(f"--scatter: {column} is no measure")
    keys, tables = ["run", "dataset", "row", "step"], []
    for file in files:
        file = file if response else file.with_name("pairs.parquet")
        table = read_parquet(file, [*keys, *["response"] * bool(response), column], more=("problem",), gaps=(column,),
                             numbers=(column,))
        if response and response not in set(table["response"]):
            raise UserError(f"{file}: no response {response}; it has {listed(table['response'].unique())}")
        table = table[table["response"] == response].drop(columns="response") if response else table
        tables.append(by_row(file, table, keys))
    return pandas.concat(tables, ignore_index=True)


def read_answers(files: list[Path]) -> pandas.DataFrame | None:
    """run, phase, dataset, row, step, problem and correct of those of these files that are there, or None. Raises
    UserError, naming file and row, where a table can't be drawn."""
    names = ["run", "phase", "dataset", "row", "step"]
    tables = [by_row(file, read_parquet(file, [*names, "correct"], more=("problem",)), names)
              for file in files if file.exists()]
    return pandas.concat(tables, ignore_index=True) if tables else None


def read_tokens(files: list[Path], row: int, runs: list[str], sets: list[str] | None) -> pandas.DataFrame:
    """TOKENS and id of both sides of one row, in order of position; the ids of a table that has none are the tokens'
    texts. Raises UserError where a token is missing or there twice, and where these runs and data sets (all, where none
    is named) do not have the row, with some that they have."""
    if not 0 <= row < 2**63:
        raise UserError(f"--strip {row}: must be the number of a row, from 0")
    tables = []
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: is not there; score.py makes it where it is told --tokens")
        table = read_parquet(file, [*TOKENS, "row"], [("row", "==", row)], more=("id",), gaps=("response",))
        table = table[table["response"].isin(SIDES)]
        table = table if "id" in table else table.assign(id=table["token"])
        keys = ["run", "dataset", "response", "step"]
        table = table.sort_values([*keys, "position"], kind="stable")
        wrong = table["position"] != table.groupby(keys).cumcount()
        refuse(file, table, wrong, "is out of place: positions must be 0, 1, 2 ... once each")
        tables.append(table)
    tokens = pandas.concat(tables, ignore_index=True)
    if _of(tokens, runs, sets).empty and (found := rows_of(files, runs, sets)):
        raise UserError(f"{', '.join(map(str, files))}: no tokens of chosen or rejected in row {row}; there is {found}")
    return tokens


def _of(table: pandas.DataFrame, runs, sets) -> pandas.DataFrame:
    return table[(table["run"].isin(runs) | (not runs)) & (table["dataset"].isin(sets or ()) | (not sets))]


def rows_of(files: list[Path], runs, sets) -> str:
    """The rows of files of tokens by data set, in words: some of them, and how many there are."""
    found = {}
    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["run", "dataset", "row"]):
            for name, part in _of(batch.to_pandas(), runs, sets).groupby("dataset"):
                found.setdefault(name, set()).update(map(int, part["row"].dropna().unique()))
    said = []
    for name, rows in sorted(found.items()):
        some = sorted(rows)[:4]
        said.append(f"row {listed(sorted(rows))} of {name}" if len(rows) <= 5 else
                    f"row {', '.join(map(str, some))} ... {max(rows)} of {name}, {len(rows):,} rows")
    return "; ".join(said)


def read_series(file: Path) -> pandas.DataFrame:
    """A csv with columns series, step, mean[, low, high][, dataset][, response][, phase] as a table of curves
    (intervals.py), the series as run. Raises UserError, naming file and line."""
    table = read_csv(file)
    if missing := [name for name in ("series", "step", "mean") if name not in table]:
        raise UserError(f"{file}: no column {', '.join(missing)}; it has {', '.join(table)}")
    if unknown := [name for name in table if name not in SERIES]:
        raise UserError(f"{file}: unknown column {', '.join(unknown)}; it may have {', '.join(SERIES)}")
    if ("low" in table) != ("high" in table):
        raise UserError(f"{file}: an interval needs both columns, low and high")
    if table.empty:
        raise UserError(f"{file}: has no lines")
    for name in [name for name, kind in SERIES.items() if kind is float and name in table]:
        numbers = pandas.to_numeric(table[name], errors="coerce").where(table[name].str.strip() != "", math.nan)
        empty = (table[name].str.strip() == "") & (name in ("low", "high"))
        for bad in table.index[~(numbers.abs() <= LARGEST) & ~empty][:1]:
            found = table[name][bad]
            raise UserError(f"{file}, line {bad}: {name} is {found!r}, not a finite number within {LARGEST:g}")
        table[name] = numbers
    absent = {name: "" if kind is str else math.nan for name, kind in SERIES.items() if name not in table}
    table = table.assign(**absent)
    twice = table.duplicated(["series", "dataset", "response", "phase", "step"])
    outside = (table["low"] > table["mean"]) | (table["mean"] > table["high"])
    for bad, what in ((table["series"].str.strip() == "", "series has no name"), (twice, "is there twice"),
                      (outside, "mean is not within low and high"),
                      *((odd(table[name]), NAMES) for name, kind in SERIES.items() if kind is str)):
        if bad.any():
            raise UserError(f"{file}, line {bad.idxmax()}: {what}")
    table = table.rename(columns={"series": "run"}).assign(at=table["step"], n=0, left_out=0)
    return table.sort_values("step", kind="stable", ignore_index=True)
