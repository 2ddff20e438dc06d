"""Opens preference data: files or hub ids -> a list of rows, and which of their columns mean what."""

import csv
import glob
import json
import logging
import sys
from pathlib import Path

from .errors import UserError

PROMPT_FIELDS, CHOSEN_FIELDS, REJECTED_FIELDS = (
    ("prompt", "question"), ("chosen", "text", "completion", "messages"), ("rejected", "worse-text"))
FOR_TEMPLATES = ("tools", "chat_template_kwargs")  # columns of other trainers that change how messages are rendered
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


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
            rows = [row for file in files for row in (_csv_rows if kind == ".csv" else _json_rows)(file)]
            columns = dict.fromkeys(name for row in rows for name in row)
            rows = [dict.fromkeys(columns) | row for row in rows]  # what a row does not have is None in it
        else:
            rows = _table_rows(path, files)
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


def _table_rows(path: str, files: list[str]) -> list[dict]:
    """Rows of Parquet files, of a save_to_disk folder or from the hub."""
    import datasets  # slow to import
    import huggingface_hub
    import pyarrow.parquet

    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they log comes as the one line of the error
    try:
        if files:
            if not any(pyarrow.parquet.read_metadata(file).num_rows for file in files):
                return []
            # datasets takes names for patterns.
            table = datasets.load_dataset("parquet", data_files=[*map(glob.escape, files)], split="train")
        elif Path(path).is_dir():
            table = datasets.load_from_disk(path)
        elif Path(path).suffix in SUFFIXES or path.count("/") > 1 or path[:1] in (".", "/") or glob.has_magic(path):
            raise UserError(f"{path}: no such file")
        else:
            name, config, split = (path.split(":") + [None, None])[:3]
            table = datasets.load_dataset(name, config or None, split=split or "train")
        if not isinstance(table, datasets.Dataset):
            raise UserError(f"{path}: holds several splits ({', '.join(table)}); name the folder of one")
        return list(table)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StopIteration,
            datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets wraps what the parser said
        what = ' '.join(str(cause).split())[:300] or type(cause).__name__
        kind = "a data set" if files or not Path(path).is_dir() else "a folder of datasets' save_to_disk"
        raise UserError(f"{path}: can't be read as {kind}: {what}") from error


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

    fields = (choose("prompt_field", prompt, PROMPT_FIELDS, False), choose("chosen_field", chosen, CHOSEN_FIELDS, True),
              choose("rejected_field", rejected, REJECTED_FIELDS, pairs))
    for name in FOR_TEMPLATES:
        if (i := next((i for i, row in enumerate(rows) if row.get(name) and isinstance(row[fields[1]], list)), None)
                ) is not None:
            raise UserError(f"{path}: row {i}: has {name} for the chat template, which is not supported; remove that "
                            "column, or give whole rendered transcripts")
    return fields
