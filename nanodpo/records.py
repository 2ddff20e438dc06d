"""What runs and scorings left, read back to be drawn, and refused where a number in it can't be trusted."""

import json
import math
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet

from .errors import UserError, first_line
from .figures import PANELS

DRAWN = {prefix + name for names in PANELS.values() for name in names.values() for prefix in ("", "eval_")}
KEYS, NUMBERS = ["run", "phase", "dataset", "row", "response", "step"], ["step", "mean_logps"]


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; raises UserError, naming the line, where one can't be drawn."""
    file, lines = folder / "metrics.jsonl", []
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
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
            if type(line[name]) not in (int, float) or not math.isfinite(line[name]):
                raise UserError(f"{file}, line {number}: {name} is {json.dumps(line[name])}, not a finite number")
        lines.append(line)
    if not any(DRAWN & line.keys() for line in lines):
        raise UserError(f"{file}: has no step to draw yet")
    return lines


def read_scores(files: list[Path]) -> pandas.DataFrame:
    """What is drawn of these files of score.py; raises UserError, naming file and row, where it can't be drawn."""
    tables, names = [], [*KEYS, "mean_logps"]
    for file in files:
        try:
            have = pyarrow.parquet.read_schema(file).names
            if missing := [name for name in names if name not in have]:
                raise UserError(f"{file}: no column {', '.join(missing)}; it has {', '.join(have)}")
            table = pandas.read_parquet(file, columns=names)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: can't be read as Parquet ({first_line(error)})") from error
        if table.empty:
            raise UserError(f"{file}: has no rows")
        for name in NUMBERS:
            if not pandas.api.types.is_numeric_dtype(table[name]):
                raise UserError(f"{file}: column {name} must hold numbers, found {table[name].dtype}")
        finite = (table[NUMBERS].abs() < math.inf).all(axis=1)  # False for NaN too
        for bad, what in ((~finite | table.isna().any(axis=1), "has a value that is missing or not finite"),
                          (table.duplicated(KEYS), "is there twice")):
            if bad.any():
                raise UserError(f"{file}, row {bad.argmax()}: {what}: {table[bad].iloc[0].to_dict()}")
        tables.append(table)
    runs = [run for table in tables for run in table["run"].unique()]
    if shared := sorted({run for run in runs if runs.count(run) > 1}):
        raise UserError(f"{', '.join(map(str, files))}: more than one has a run called {', '.join(shared)}")
    return pandas.concat(tables, ignore_index=True)
