"""Data of any kind of file, folder or name on the hub -> a list of rows, dicts of a value a column."""

import contextlib
import csv
import itertools
import json
import lzma
import os
import sys
import zlib
from pathlib import Path

from ..errors import UserError
from ..files import parse_json
from ..progress import Progress
from .answers import WEIGHT
from .places import SPLITS, files_of, kind_of, local, one_split, places_of
from .tables import table_rows
from .text_files import lines_of, text_of
from .urls import copy_of

# Bounds for files that are small on disk and are not in memory. The longest text that a model reads has a few MB.
MOST_ROWS, LONGEST = 5_000_000, 16 * 2**20  # rows of a data set; characters of a cell, those of nested ones together
AT_ONCE = 500  # rows that are counted at one time


def read_rows(path: str) -> list[dict]:
    """The rows of all that `path` names, one after the other."""
    return [row for rows in read_places(path) for row in rows]


def read_places(path: str, here: bool | None = None) -> list[list[dict]]:
    """The rows of what `path` names: file(s), a folder, a data set of the hub, or each of several of these with commas
    between. `here`: whether this rank shows how far it is, where it is not rank 0 that does.

    "NAME:CONFIG:SPLIT" names one split of a folder, or of a data set of the hub, which also has NAME@REVISION. Raises
    UserError for what is not there, can't be read or holds nothing.
    """
    if not path:
        raise UserError("the name of a data file is empty")
    try:
        places = places_of(path)
        with Progress("reading", None, "row", here=here) as bar:
            found = [_read(place, bar) for place in places]
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: can't be read as a data set: {' '.join(str(error).split())[:300]}") from error
    for place, rows in zip(places, found):
        if not rows:
            raise UserError(f"{place}: has no rows")
        if rows[0].keys() != found[0][0].keys():
            raise UserError(f"{place}: has the columns {', '.join(rows[0])}, and {places[0]} has "
                            f"{', '.join(found[0][0])}")
    return found


def _read(place: str, bar: Progress) -> list[dict]:
    if "://" in place:
        with copy_of(place) as here:
            return _read(here, bar)
    name, split = local(place)
    files = files_of(name, split) if name else []
    kind = kind_of(files) if files else None
    whole = bool(name) and not Path(name).is_dir()  # a file, of which one kind alone holds splits
    if split and whole and kind != ".json":
        raise UserError(f"{place}: {kind} files hold no splits; leave out {split!r}")
    if kind in (None, ".parquet", ".arrow"):
        return _bounded(place, table_rows(place, name, split, files, kind, MOST_ROWS), bar)
    rows = itertools.chain.from_iterable(_text_rows(file, kind, split if whole else None) for file in files)
    rows = _bounded(place, rows, bar)
    columns = dict.fromkeys(name for row in rows for name in row)
    return [dict.fromkeys(columns) | row for row in rows]  # what a row does not have is None in it


# Text


def _text_rows(file: str, kind: str, split: str | None):
    if kind in (".csv", ".tsv"):
        return _csv_rows(file, "\t" if kind == ".tsv" else ",")
    return _json_rows(file, kind, split)


def _json_rows(file: str, kind: str, split: str | None):
    """The objects of JSON lines, of one array, or of one object with lists of rows by split. Raises UserError naming
    the line or item that is none.

    Arrow's reader would take a text like 2020-01-01 for a date, and crash on a line that is null.
    """
    first = next((line for line in lines_of(file) if line.strip()), "").lstrip()
    found = None
    if first.startswith("["):
        found = _parse_all(file)
    elif kind == ".json" and first.startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):  # else they are JSON lines under this name
            whole = _parse_all(file)
            splits = whole and {*whole} <= {*SPLITS} and all(isinstance(rows, list) for rows in whole.values())
            if not splits and _is_by_column(whole):
                raise UserError(f"{file}: has a list for each column; write an object for each row, with pandas as "
                                "to_json(file, orient='records', lines=True)")
            found = one_split(file, whole, split) if splits else [whole]
            split = None if splits else split
    if split:
        raise UserError(f"{file}: holds no splits; leave out {split!r}")
    found = ([(f"item {i}", item) for i, item in enumerate(found)] if found is not None else
             ((f"line {i}", _parse(line, f"{file}, line {i}")) for i, line in enumerate(lines_of(file), 1)
              if line.strip()))
    for place, row in found:
        if not isinstance(row, dict):
            raise UserError(f"{file}, {place}: expected an object with a prompt and responses, found "
                            f"{type(row).__name__}")
        yield row


def _is_by_column(table: dict) -> bool:
    """Is it a table of pandas' to_json, or of lists, and no row? A row's messages are lists of objects, too."""
    columns = [*table.values()]
    return bool(columns) and ({*table} in ({"columns", "index", "data"}, {"schema", "data"})
                              or all(isinstance(cells, dict) and all(map(str.isdigit, cells)) for cells in columns)
                              or all(isinstance(cells, list) and all(isinstance(cell, str) for cell in cells)
                                     for cells in columns))


def _parse_all(file: str):
    """One JSON value that takes many lines."""
    with text_of(file) as text:
        said = text.read(_memory() // 16)  # characters of up to four bytes, and the values that are made of them
        if text.read(1):
            raise UserError(f"{file}: is one JSON value of more than {len(said):,} characters; write a row a line, and "
                            "call it .jsonl")
    return parse_json(said)


def _parse(line: str, where: str):
    try:
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        said = str(error)[:300].replace(": line 1 column", ": column")  # it was given one line
        raise UserError(f"{where}: can't be read as JSON: {said}") from error


def _csv_rows(file: str, delimiter: str):
    """Every field is text, but for a weight: guessed, an answer "007" would be a number and "None" nothing."""
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(lines_of(file, newline=""), strict=True, delimiter=delimiter)
    rows = filter(None, _named_lines(file, lines))  # without empty lines
    columns = next(rows, [])
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{file}: has two columns called {twice[0]!r}")
    if len(columns) == 1 and (found := [mark for mark in ";\t," if mark != delimiter and mark in columns[0]]):
        raise UserError(f"{file}: the first line has {found[0]!r} between names, not {delimiter!r}: write the file "
                        f"again with {delimiter!r}")
    for fields in rows:
        if len(fields) != len(columns):
            found = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            raise UserError(f"{file}, line {lines.line_num}: can't be read: {found}, and the first line names "
                            f"{len(columns)} columns")
        row = dict(zip(columns, fields))
        with contextlib.suppress(KeyError, ValueError):  # what is no number stays as it is, and is refused as a weight
            row[WEIGHT] = float(row[WEIGHT].replace("_", "?"))  # Python's float takes 1_0
        yield row


def _named_lines(file: str, lines):
    """The lines of a csv.reader. Raises UserError, which names the line, for one that is no CSV."""
    try:
        yield from lines
    except csv.Error as error:
        raise UserError(f"{file}, line {lines.line_num}: can't be read: {error}") from error


# Bounds


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bounded(path: str, rows, bar: Progress) -> list[dict]:
    """All rows of an iterator. Raises UserError before more of it is in memory than a data set can be: a few KB of
    Parquet may stand for any number of rows and for cells of any size."""
    found, total, memory = [], 0, _memory()
    for i, row in enumerate(rows):
        if i == MOST_ROWS:
            raise UserError(f"{path}: has more than {MOST_ROWS:,} rows; split the file")
        sizes = {name: _characters(value) for name, value in row.items()}
        if large := next((name for name, size in sizes.items() if size > LONGEST), None):
            raise UserError(f"{path}: row {i}: {large} has {sizes[large]:,} characters, more than {LONGEST:,}; "
                            "no model reads so long a text")
        total += sum(sizes.values())
        if total > memory:
            raise UserError(f"{path}: holds more text than this machine has memory ({memory / 2**30:.0f} GiB); split "
                            "the file")
        found.append(row)
        if len(found) % AT_ONCE == 0:
            bar.update(AT_ONCE)
    return found


def _characters(value) -> int:
    """The text in a cell, nested ones included."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
