"""Opens preference data: files or hub ids -> a list of rows, and which of their columns mean what."""

import csv
import glob
import itertools
import json
import logging
import os
import sys
from pathlib import Path

from ..errors import UserError

PROMPT_FIELDS, CHOSEN_FIELDS, REJECTED_FIELDS = (
    ("prompt", "question"), ("chosen", "completion", "output", "text", "messages"), ("rejected", "worse-text"))
FOR_TEMPLATES = ("tools", "chat_template_kwargs", "documents")  # other trainers give them to the chat template
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # a language model of text can't be asked about these
OF_PROMPTS = ("system", "system_prompt", "input", "instruction", "history", "context")  # part of what is asked, by name
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
# Bounds for files that are small on disk and are not in memory. The longest text that a model reads has a few MB.
MOST_ROWS, LONGEST = 5_000_000, 16 * 2**20  # rows of a data set; characters of a cell, those of nested ones together


def read_rows(path: str) -> list[dict]:
    """.parquet, .jsonl, .json or .csv file(s), a save_to_disk folder, or a hub id "name[:config[:split]]" -> rows.

    Raises UserError for what is not there, can't be read or holds nothing.
    """
    if not path:
        raise UserError("the name of a data file is empty")
    try:
        files = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
        files = [] if Path(path).is_dir() else files
        kind = _kind(files) if files else None
        if kind in (".json", ".jsonl", ".csv"):
            read = _csv_rows if kind == ".csv" else _json_rows
            rows = _bounded(path, itertools.chain.from_iterable(map(read, files)))
            columns = dict.fromkeys(name for row in rows for name in row)
            rows = [dict.fromkeys(columns) | row for row in rows]  # what a row does not have is None in it
        else:
            rows = _bounded(path, _table_rows(path, files))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as a data set: {' '.join(str(error).split())[:300]}") from error
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _kind(files: list[str]) -> str:
    """The suffix that files share. Raises UserError for mixed, unknown and empty ones, and for what is no file."""
    if odd := [file for file in files if not Path(file).is_file()]:
        raise UserError(f"{odd[0]}: is not a file")
    suffixes = {Path(file).suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= {*SUFFIXES}:
        raise UserError(f"{files[0]}: expected {', '.join(SUFFIXES)}, all files of one kind, found "
                        f"{', '.join(sorted(suffixes)) if any(suffixes) else 'no suffix'}")
    if empty := [file for file in files if not Path(file).stat().st_size]:
        raise UserError(f"{empty[0]}: is an empty file")
    return suffixes.pop()


def _json_rows(file: str):
    """The objects of JSON lines, or of one array. Raises UserError naming the line or item that is none.

    Arrow's reader would take a text like 2020-01-01 for a date, and crash on a line that is null.
    """
    with open(file, encoding="utf-8-sig") as text:
        first = next((line for line in text if line.strip()), "")
        text.seek(0)
        if first.lstrip().startswith("["):
            found = [(f"item {i}", item) for i, item in enumerate(json.load(text))]
        else:
            found = ((f"line {i}", _parse(line, f"{file}, line {i}")) for i, line in enumerate(text, 1) if line.strip())
        for place, row in found:
            if not isinstance(row, dict):
                raise UserError(f"{file}, {place}: expected an object with a prompt and responses, found "
                                f"{type(row).__name__}")
            yield row


def _parse(line: str, where: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        said = str(error)[:300].replace(": line 1 column", ": column")  # it was given one line
        raise UserError(f"{where}: can't be read as JSON: {said}") from error


def _csv_rows(file: str):
    """Every field is text: guessed, an answer "007" would be a number and "None" nothing."""
    csv.field_size_limit(sys.maxsize)
    with open(file, newline="", encoding="utf-8-sig") as text:
        lines = csv.reader(text, strict=True)
        columns = next(lines, [])
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise UserError(f"{file}: has two columns called {twice[0]!r}")
        for fields in filter(None, lines):
            if len(fields) > len(columns):
                raise UserError(f"{file}, line {lines.line_num}: can't be read: {len(fields)} fields, and the first "
                                f"line names {len(columns)} columns")
            yield dict.fromkeys(columns, "") | dict(zip(columns, fields))


def _bounded(path: str, rows) -> list[dict]:
    """All rows of an iterator. Raises UserError before more of it is in memory than a data set can be: a few KB of
    Parquet may stand for any number of rows and for cells of any size."""
    found, total, memory = [], 0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
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
    return found


def _characters(value) -> int:
    """The text in a cell, nested ones included."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _table_rows(path: str, files: list[str]):
    """The rows of Parquet files, of a save_to_disk folder or from the hub, one by one."""
    import datasets  # slow to import
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they log comes as the one line of the error
    try:
        if files:
            yield from _parquet_rows(path, files)
        else:
            yield from _open_table(path, datasets)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StopIteration,
            datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets wraps what the parser said
        what = ' '.join(str(cause).split())[:300] or type(cause).__name__
        kind = "a data set" if files or not Path(path).is_dir() else "a folder of datasets' save_to_disk"
        raise UserError(f"{path}: can't be read as {kind}: {what}") from error


def _parquet_rows(path: str, files: list[str]):
    """Rows as the files have them now. `datasets.load_dataset` would give those of a copy in its cache, which it knows
    by path and time alone."""
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    opened = [pyarrow.parquet.ParquetFile(file) for file in files]
    if (count := sum(file.metadata.num_rows for file in opened)) > MOST_ROWS:
        raise UserError(f"{path}: has {count:,} rows, more than {MOST_ROWS:,}; split the file")
    for name, file in zip(files, opened):
        if (columns := file.schema_arrow.names) != (first := opened[0].schema_arrow.names):
            raise UserError(f"{name}: has the columns {', '.join(columns)}, and {files[0]} has {', '.join(first)}")
        for batch in file.iter_batches(batch_size=64):  # few at a time: a bomb is seen before it is in memory
            # Dataset reads what its own files say beyond Arrow's types (columns of JSON).
            yield from Dataset(InMemoryTable(pyarrow.Table.from_batches([batch])))


def _open_table(path: str, datasets):
    """The rows of a save_to_disk folder or of a data set of the hub."""
    if Path(path).is_dir():
        if odd := next((file for file in Path(path).rglob("*") if not (file.is_file() or file.is_dir())), None):
            raise UserError(f"{path}: {odd.name} in it is not a file")
        table = datasets.load_from_disk(path)
    elif Path(path).suffix in SUFFIXES or path.count("/") > 1 or path[:1] in (".", "/") or glob.has_magic(path):
        raise UserError(f"{path}: no such file")
    else:
        name, config, split = (path.split(":") + [None, None])[:3]
        table = datasets.load_dataset(name, config or None, split=split or "train")
    if not isinstance(table, datasets.Dataset):
        raise UserError(f"{path}: holds several splits ({', '.join(table)}); name the folder of one")
    return table


def choose_fields(path: str, rows: list[dict], prompt, chosen, rejected, pairs: bool) -> tuple:
    """The names of the three columns; prompt and, unless `pairs`, rejected may be None. Raises UserError."""
    columns = list(rows[0])

    def choose(flag, named, candidates, needed):
        if named and named not in columns:
            raise UserError(f"{path}: has no column {named!r} (--{flag}); it has {', '.join(columns)}")
        found = named or next((name for name in candidates if name in columns), None)
        if needed and not found:
            raise UserError(f"{path}: has no column {' or '.join(candidates)}; it has {', '.join(columns)}: "
                            f"name one with --{flag}")
        return found

    transcripts = not chosen and not rejected and {"text", "worse-text"} <= {*columns}  # of the paper's data
    fields = (choose("prompt_field", prompt, PROMPT_FIELDS, False),
              choose("chosen_field", chosen, ("text",) if transcripts else CHOSEN_FIELDS, True),
              choose("rejected_field", rejected, REJECTED_FIELDS, pairs))
    for i, row in enumerate(rows):
        _check_unread(f"{path}: row {i}", row, fields)
    return fields


def _check_unread(where: str, row: dict, fields: tuple) -> None:
    """Raises UserError for a row with columns without which its prompt would be another one."""
    if name := next((name for name in MEDIA if row.get(name)), None):
        raise UserError(f"{where}: has {name}, which a model of text can't see; remove that column if the text does "
                        "not need it")
    rendered = any(name and isinstance(row[name], list) for name in fields)  # plain text brings all that it says
    if rendered and (name := next((name for name in FOR_TEMPLATES if row.get(name)), None)):
        raise UserError(f"{where}: has {name} for the chat template, which is not supported; remove that column, or "
                        "give whole rendered transcripts")


def describe_columns(rows: list[dict], fields: tuple, more: tuple[str, ...] = ()) -> str:
    """One line on which columns are read, as what, and which are not."""
    parts = [name if name == part else f"{part} = {name}"
             for part, name in zip(("prompt", "chosen", "rejected"), fields) if name]
    unread = [name for name in rows[0] if name not in (*fields, *more)]
    return f"columns: {', '.join([*parts, *more])}" + (f"; not read: {', '.join(unread)}" if unread else "")


def unread_parts(rows: list[dict], fields: tuple) -> dict[str, int]:
    """{column: rows that have something in it} of columns that are not read, and whose name says that they are part of
    what is asked."""
    found = {name: sum(bool(row.get(name)) for row in rows) for name in OF_PROMPTS if name not in fields}
    return {name: count for name, count in found.items() if count}
