"""Opens preference data: files or hub ids -> a list of rows, and which of their columns mean what."""

import csv
import glob
import logging
from pathlib import Path

from .errors import UserError

PROMPT_FIELDS, CHOSEN_FIELDS, REJECTED_FIELDS = (
    ("prompt", "question"), ("chosen", "text", "completion", "messages"), ("rejected", "worse-text"))
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def read_rows(path: str) -> list[dict]:
    """.parquet, .jsonl, .json or .csv file(s), a save_to_disk folder, or a hub id "name[:config[:split]]" -> rows.

    Raises UserError for what is not there, can't be read or holds nothing.
    """
    import datasets  # slow to import
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they log comes as the one line of the error
    files = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
    try:
        if Path(path).is_dir():
            table = datasets.load_from_disk(path)
        elif files:
            # datasets takes names for patterns.
            table = datasets.load_dataset(data_files=[*map(glob.escape, files)], split="train", **_reader(files))
        elif Path(path).suffix in READERS or path.count("/") > 1 or path.startswith((".", "/")) or glob.has_magic(path):
            raise UserError(f"{path}: no such file")
        else:
            name, config, split = (path.split(":") + [None, None])[:3]
            table = datasets.load_dataset(name, config or None, split=split or "train")
        if not isinstance(table, datasets.Dataset):
            raise UserError(f"{path}: holds several splits ({', '.join(table)}); name the folder of one")
        rows = list(table)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, csv.Error,
            datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets wraps what the parser said
        if "corresponds to no data" in str(cause):
            raise UserError(f"{path}: has no rows") from error
        raise UserError(f"{path}: can't be read as a data set: {' '.join(str(cause).split())[:300]}") from error
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _reader(files: list[str]) -> dict:
    """What datasets needs to know about local files. Raises UserError for mixed, unknown and empty ones."""
    import datasets

    suffixes = {Path(file).suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= READERS.keys():
        raise UserError(f"{files[0]}: expected {', '.join(READERS)}, all files of one kind, found "
                        f"{', '.join(sorted(suffixes)) or 'no suffix'}")
    if empty := [file for file in files if Path(file).is_file() and not Path(file).stat().st_size]:
        raise UserError(f"{empty[0]}: is an empty file")
    kind = READERS[suffixes.pop()]
    if kind != "csv":
        return {"path": kind}
    with open(files[0], newline="", encoding="utf-8-sig") as file:
        columns = next(csv.reader(file), [])
    # Left to guess, the reader takes an answer "007" for a number and "None" for nothing.
    return {"path": kind, "features": datasets.Features({name: datasets.Value("string") for name in columns}),
            "keep_default_na": False}


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

    return (choose("prompt_field", prompt, PROMPT_FIELDS, False), choose("chosen_field", chosen, CHOSEN_FIELDS, True),
            choose("rejected_field", rejected, REJECTED_FIELDS, pairs))
