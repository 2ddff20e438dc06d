"""Tables from outside, read with nothing guessed: Parquet and csv, refused where a column can't be what it must be."""

import csv
import math
import sys
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet

from ..errors import UserError
from ..files import check_regular, why

NUMBERS = ("step", "row", "position", "tokens", "mean_logps", "logp", "entropy", "rank", "implausible_mass",
           "implausible_mass_start", "place", "id", "before", "after", "pair", "share")
TRUTHS = ("correct",)  # the other columns hold text
LARGEST = 1e12  # of a step or a log-prob: beyond it, sums and axes overflow
LONGEST = 200  # characters of a name: a longer one fits no figure, and takes minutes to set
NAMES = f"has a name of more than {LONGEST} characters, or with characters that can't be printed"
NUMERIC = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_null)
TEXTUAL = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_null)
TRUE = (pyarrow.types.is_boolean,)


def read_csv(file: Path) -> pandas.DataFrame:
    """The fields of a csv as text, by the number of their line."""
    try:
        csv.field_size_limit(sys.maxsize)
        check_regular(file)
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text, strict=True)
            columns = next(reader, [])
            lines = dict((reader.line_num, fields) for fields in reader if fields)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: can't be read as csv ({why(error)})") from error
    if not columns:
        raise UserError(f"{file}: can't be read as csv (it is empty)")
    if uneven := next((number for number, fields in lines.items() if len(fields) != len(columns)), None):
        raise UserError(f"{file}, line {uneven}: has {len(lines[uneven])} fields, the first line {len(columns)}")
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{file}: has two columns called {twice[0]}")
    return pandas.DataFrame.from_dict(lines, orient="index", columns=columns)


def read_parquet(file: Path, names: list[str], filters=None, more: tuple[str, ...] = (),
                 gaps: tuple[str, ...] = (), numbers: tuple[str, ...] = ()) -> pandas.DataFrame:
    """These columns and, where the file has them, `more`, of the kind that each must have, also those of `numbers`; an
    empty table only where `filters` leave none. No value is infinite, and none is missing but in the columns `gaps`."""
    numbers = {*NUMBERS, *numbers}
    try:
        check_regular(file)
        schema = pyarrow.parquet.read_schema(file)
        kinds = dict(zip(schema.names, schema.types))
        if missing := [name for name in names if name not in kinds]:
            raise UserError(f"{file}: no column {', '.join(missing)}; it has {', '.join(kinds)}")
        names = [*names, *(name for name in more if name in kinds)]
        for name in names:
            what, right = (("numbers", NUMERIC) if name in numbers else ("true or false", TRUE) if name in TRUTHS
                           else ("text", TEXTUAL))
            kind = getattr(kinds[name], "value_type", kinds[name])  # of a dictionary, as pandas writes categories
            if pyarrow.types.is_nested(kinds[name]) or not any(test(kind) for test in right):
                raise UserError(f"{file}: column {name} must hold {what}, found {kinds[name]}")
        table = pyarrow.parquet.read_table(file, columns=names, filters=filters).to_pandas(ignore_metadata=True)
    except FileNotFoundError as error:
        where = " where it scores chosen and rejected" * (file.name == "pairs.parquet")
        raise UserError(f"{file}: is not there; score.py makes it{where}") from error
    except (OSError, UnicodeError, pyarrow.ArrowException) as error:  # a path may be no text, too
        raise UserError(f"{file}: can't be read as Parquet ({why(error)})") from error
    if table.empty and filters is None:
        raise UserError(f"{file}: has no rows")
    for name in names:
        if name in numbers:
            table[name] = pandas.to_numeric(table[name])  # a column of nothing but nulls has no numbers' type
            refuse(file, table, (table[name].abs() > LARGEST) & (table[name].abs() < math.inf),
                   f"has a value beyond {LARGEST:g}")
        elif name not in ("token", "prompt", *TRUTHS):
            refuse(file, table, odd(table[name]), NAMES)
    infinite = (table[[name for name in names if name in numbers]].abs() == math.inf).any(axis=1)
    refuse(file, table, table.drop(columns=[*gaps], errors="ignore").isna().any(axis=1) | infinite,
           "has a value that is missing or not finite")
    return table


def odd(names: pandas.Series) -> pandas.Series:
    """Tells which names no figure could show."""
    return names.isin([name for name in names.dropna().unique() if len(name) > LONGEST or not name.isprintable()])


def refuse(file: Path, table: pandas.DataFrame, bad: pandas.Series, what: str) -> None:
    if bad.any():
        raise UserError(f"{file}, row {bad.idxmax()}: {what}: {table.loc[bad.idxmax()].to_dict()}")
