"""Opens data of any kind of file, folder or name on the hub -> a list of rows, dicts of a value a column."""

import bz2
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import sys
import zlib
from pathlib import Path

from ..errors import UserError

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}  # after one of the suffixes
SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")  # in a folder that datasets' save_to_disk wrote
# Names of lists of rows that a JSON file may hold in one object.
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval", "data", "rows")
# Bounds for files that are small on disk and are not in memory. The longest text that a model reads has a few MB.
MOST_ROWS, LONGEST = 5_000_000, 16 * 2**20  # rows of a data set; characters of a cell, those of nested ones together
LINE = 16 * LONGEST  # characters of a line of text


def read_rows(path: str) -> list[dict]:
    """The rows of what `path` names: file(s), a folder, a data set of the hub, or several of these with commas between.

    "NAME:CONFIG:SPLIT" names one split of a folder, or of a data set of the hub, which also has NAME@REVISION. Raises
    UserError for what is not there, can't be read or holds nothing.
    """
    if not path:
        raise UserError("the name of a data file is empty")
    try:
        places = places_of(path)
        found = [_read(place) for place in places]
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, EOFError, csv.Error, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: can't be read as a data set: {' '.join(str(error).split())[:300]}") from error
    for place, rows in zip(places, found):
        if not rows:
            raise UserError(f"{place}: has no rows")
        if [*rows[0]] != [*found[0][0]]:
            raise UserError(f"{place}: has the columns {', '.join(rows[0])}, and {places[0]} has "
                            f"{', '.join(found[0][0])}")
    return [row for rows in found for row in rows]


def places_of(path: str) -> list[str]:
    """The names in a list with commas; a file that has a comma in its own name is one."""
    if "," not in path or os.path.exists(path) or glob.glob(path, recursive=True):
        return [path]
    return [place for place in map(str.strip, path.split(",")) if place]


def hub_parts(place: str) -> tuple[str, str, str, str]:
    """(name, revision, config, split) of a data set of the hub; those that are not given are empty.

    >>> hub_parts("org/pairs@main:default:train[:10%]"), hub_parts("org/pairs")
    (('org/pairs', 'main', 'default', 'train[:10%]'), ('org/pairs', '', '', ''))
    """
    name, config, split = (place.split(":", 2) + ["", ""])[:3]
    name, _, revision = name.partition("@")
    return name, revision, config, split


def absolute(path: str) -> str:
    """The same names, those of files and folders that are there by their full path."""
    return ",".join(os.path.abspath(place) if _local(place)[0] else place for place in places_of(path))


def _read(place: str) -> list[dict]:
    name, split = _local(place)
    files = _files_of(name, split) if name else []
    kind = _kind(files) if files else None
    if kind in (None, ".parquet", ".arrow"):
        return _bounded(place, _table_rows(place, name, split, files, kind))
    rows = _bounded(place, itertools.chain.from_iterable(_text_rows(file, kind, split) for file in files))
    columns = dict.fromkeys(name for row in rows for name in row)
    return [dict.fromkeys(columns) | row for row in rows]  # what a row does not have is None in it


def _local(place: str) -> tuple[str | None, str | None]:
    """(name of a file, folder or glob that is there, split or None); (None, None) for what may be on the hub."""
    name, config, split = (place.split(":", 2) + ["", ""])[:3]
    for there, part in ((place, None), (os.path.join(name, config) if config else name, split or None)):
        if Path(there).exists() or glob.glob(there, recursive=True):
            return there, part
    return None, None


def _files_of(name: str, split: str | None) -> list[str]:
    """The data files behind a local name; none for a folder of save_to_disk, which datasets reads itself."""
    if not Path(name).is_dir():
        return [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
    if odd := next((file for file in Path(name).rglob("*") if not (file.is_file() or file.is_dir())), None):
        raise UserError(f"{name}: {odd.name} in it is not a file")
    if any((Path(name) / file).exists() for file in SAVED):
        return []
    from datasets.data_files import DataFilesDict, get_data_patterns  # slow to import

    try:  # as datasets tells by their names which files are of which split
        found = DataFilesDict.from_patterns(get_data_patterns(name), base_path=name)
    except FileNotFoundError:  # as it calls a folder without files
        found = {}
    found = {part: [file for file in files if _suffix(file) in SUFFIXES and not Path(file).match("dataset_infos.json")]
             for part, files in found.items()}
    if not (found := {part: files for part, files in found.items() if files}):
        raise UserError(f"{name}: is a folder without data files ({', '.join(SUFFIXES)})")
    return _one_split(name, found, split)


def _one_split(name: str, splits: dict, split: str | None):
    """The split that was asked for, or the only one. Raises UserError."""
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split in splits:
        return splits[split]
    asked = f"has no split {split!r}; it has {', '.join(splits)}" if split else (
        f"holds several splits ({', '.join(splits)}); name one")
    raise UserError(f"{name}: {asked}, like {name}::{next(iter(splits))}")


def _suffix(file: str) -> str:
    """.jsonl also of a file that is called .jsonl.gz."""
    path = Path(file)
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def _kind(files: list[str]) -> str:
    """The suffix that files share. Raises UserError for mixed, unknown and empty ones, and for what is no file."""
    if odd := [file for file in files if not Path(file).is_file()]:
        raise UserError(f"{odd[0]}: is not a file")
    suffixes = {_suffix(file) for file in files}
    if len(suffixes) != 1 or not suffixes <= {*SUFFIXES}:
        raise UserError(f"{files[0]}: expected {', '.join(SUFFIXES)} (the text ones also with "
                        f"{', '.join(PACKED)} behind), all files of one kind, found "
                        f"{', '.join(sorted(suffixes)) if any(suffixes) else 'no suffix'}")
    if empty := [file for file in files if not Path(file).stat().st_size]:
        raise UserError(f"{empty[0]}: is an empty file")
    kind = suffixes.pop()
    if kind in (".parquet", ".arrow") and (packed := [file for file in files if Path(file).suffix in PACKED]):
        raise UserError(f"{packed[0]}: unpack it first; {kind} files are packed inside")
    return kind


# Text


def _text_rows(file: str, kind: str, split: str | None):
    if kind in (".csv", ".tsv"):
        return _csv_rows(file, "\t" if kind == ".tsv" else ",")
    return _json_rows(file, kind, split)


def _open_text(file: str, newline: str | None = None):
    suffix = Path(file).suffix
    if suffix == ".zst":
        import pyarrow

        raw = pyarrow.input_stream(file, compression="zstd")
    else:
        raw = PACKED.get(suffix, open)(file, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)


def _lines(file: str, newline: str | None = None):
    """The lines of a text file. Raises UserError for one that is longer than any row: a few KB may unpack to it."""
    with _open_text(file, newline) as text:
        for i in itertools.count(1):
            line = text.readline(LINE)
            if not line:
                return
            if len(line) == LINE:
                raise UserError(f"{file}, line {i}: has more than {LINE:,} characters; no row is so long")
            yield line


def _json_rows(file: str, kind: str, split: str | None):
    """The objects of JSON lines, of one array, or of one object with lists of rows by split. Raises UserError naming
    the line or item that is none.

    Arrow's reader would take a text like 2020-01-01 for a date, and crash on a line that is null.
    """
    first = next((line for line in _lines(file) if line.strip()), "").lstrip()
    found = None
    if first.startswith("["):
        found = _parse_all(file)
    elif kind == ".json" and first.startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):  # else they are JSON lines under this name
            whole = _parse_all(file)
            splits = whole and {*whole} <= {*SPLITS} and all(isinstance(rows, list) for rows in whole.values())
            found = _one_split(file, whole, split) if splits else [whole]
    found = ([(f"item {i}", item) for i, item in enumerate(found)] if found is not None else
             ((f"line {i}", _parse(line, f"{file}, line {i}")) for i, line in enumerate(_lines(file), 1)
              if line.strip()))
    for place, row in found:
        if not isinstance(row, dict):
            raise UserError(f"{file}, {place}: expected an object with a prompt and responses, found "
                            f"{type(row).__name__}")
        yield row


def _parse_all(file: str):
    """One JSON value that takes many lines."""
    with _open_text(file) as text:
        said = text.read(_memory() // 16)  # characters of up to four bytes, and the values that are made of them
        if text.read(1):
            raise UserError(f"{file}: is one JSON value of more than {len(said):,} characters; write a row a line, and "
                            "call it .jsonl")
    return json.loads(said)


def _parse(line: str, where: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        said = str(error)[:300].replace(": line 1 column", ": column")  # it was given one line
        raise UserError(f"{where}: can't be read as JSON: {said}") from error


def _csv_rows(file: str, delimiter: str):
    """Every field is text: guessed, an answer "007" would be a number and "None" nothing."""
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(_lines(file, newline=""), strict=True, delimiter=delimiter)
    columns = next(lines, [])
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{file}: has two columns called {twice[0]!r}")
    for fields in filter(None, lines):
        if len(fields) > len(columns):
            raise UserError(f"{file}, line {lines.line_num}: can't be read: {len(fields)} fields, and the first "
                            f"line names {len(columns)} columns")
        yield dict.fromkeys(columns, "") | dict(zip(columns, fields))


# Bounds


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bounded(path: str, rows) -> list[dict]:
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
    return found


def _characters(value) -> int:
    """The text in a cell, nested ones included."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


# Tables


def _table_rows(place: str, name: str | None, split: str | None, files: list[str], kind: str | None):
    """The rows of Parquet or Arrow files, of a save_to_disk folder or from the hub, one by one."""
    import datasets  # slow to import
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they log comes as the one line of the error
    try:
        if files:
            yield from _rows_of_batches(place, files, _parquet_batches if kind == ".parquet" else _arrow_batches)
        else:
            yield from _saved(name, split) if name else _from_hub(place)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StopIteration,
            datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets wraps what the parser said
        what = ' '.join(str(cause).split())[:300] or type(cause).__name__
        kind = "a data set" if files or not name else "a folder of datasets' save_to_disk"
        raise UserError(f"{place}: can't be read as {kind}: {what}") from error


def _rows_of_batches(place: str, files: list[str], batches_of):
    """Rows as the files have them now. `datasets.load_dataset` would give those of a copy in its cache, which it knows
    by path and time alone."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    first = None
    for file in files:
        for batch in batches_of(place, file):
            if (columns := batch.schema.names) != (first := first or columns):
                raise UserError(f"{file}: has the columns {', '.join(columns)}, and {files[0]} has {', '.join(first)}")
            # Dataset reads what its own files say beyond Arrow's types (columns of JSON).
            yield from Dataset(InMemoryTable(pyarrow.Table.from_batches([batch])))


def _parquet_batches(place: str, file: str):
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(file)
    if (count := opened.metadata.num_rows) > MOST_ROWS:
        raise UserError(f"{place}: has {count:,} rows, more than {MOST_ROWS:,}; split the file")
    return opened.iter_batches(batch_size=64)  # few at a time: a bomb is seen before it is in memory


def _arrow_batches(place: str, file: str):
    """Of a stream, as datasets writes them, or of an Arrow file (Feather)."""
    import pyarrow

    with pyarrow.memory_map(file) as source:
        if source.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(source)
            yield from map(opened.get_batch, range(opened.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)


def _saved(name: str, split: str | None):
    """The data set of a save_to_disk folder."""
    import datasets

    table = datasets.load_from_disk(name)
    return _one_split(name, table, split) if isinstance(table, datasets.DatasetDict) else table


def _from_hub(place: str):
    """A data set of the hub: NAME[@REVISION][:CONFIG[:SPLIT]], with the splits that datasets knows, train[:10%] too."""
    import datasets

    name, revision, config, split = hub_parts(place)
    if _suffix(name) in SUFFIXES or name.count("/") > 1 or name[:1] in (".", "/", "~") or glob.has_magic(name):
        raise UserError(f"{place}: no such file")
    return datasets.load_dataset(name, config or None, split=split or "train", revision=revision or None)
