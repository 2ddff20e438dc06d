"""The rows of tables, read through `datasets`: Parquet and Arrow files, save_to_disk folders, data sets of the hub."""

import functools
import glob
import logging
from pathlib import Path

from ..errors import UserError
from .places import SUFFIXES, hub_parts, one_split, suffix_of
from .urls import look_for_hub, where_full


def table_rows(place: str, name: str | None, split: str | None, files: list[str], kind: str | None, most: int):
    """The rows of Parquet or Arrow files, of a save_to_disk folder or from the hub, one by one. Raises UserError for
    what can't be read, and for a Parquet file with more than `most` rows."""
    import datasets  # slow to import
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they log comes as the one line of the error
    try:
        if files:
            batches_of = functools.partial(_parquet_batches, most) if kind == ".parquet" else _arrow_batches
            yield from _rows_of_batches(place, files, batches_of)
        else:
            yield from _unopened(_saved(name, split) if name else _from_hub(place))
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StopIteration,
            datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets wraps what the parser said
        what = ' '.join(str(cause).split())[:300] or type(cause).__name__
        kind = "a data set" if files or not name else "a folder of datasets' save_to_disk"
        raise UserError(f"{place}: can't be read as {kind}: {what}{where_full(cause)}") from error


def _rows_of_batches(place: str, files: list[str], batches_of):
    """Rows as the files have them now. `datasets.load_dataset` would give those of a copy in its cache, which it knows
    by path and time alone."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    first = None
    for file in files:
        for batch in batches_of(place, file):
            if {*(columns := batch.schema.names)} != {*(first := first or columns)}:
                raise UserError(f"{file}: has the columns {', '.join(columns)}, and {files[0]} has {', '.join(first)}")
            # Dataset reads what its own files say beyond Arrow's types (columns of JSON). It would make a fingerprint
            # in more time than it takes to read the rows.
            yield from _unopened(Dataset(InMemoryTable(pyarrow.Table.from_batches([batch])), fingerprint="rows"))


def _unopened(table):
    """The data set, whose images, sounds and the like stay bytes and a name: `datasets` would open what a row names, a
    file of this machine or an address in the network."""
    kinds = [*table.info.features.values()]  # `table.features` is a copy
    for kind in kinds:  # grows by what is within
        kinds += kind.values() if isinstance(kind, dict) else [kind.feature] if hasattr(kind, "feature") else []
        if hasattr(kind, "decode") and type(kind).__name__ != "Json":
            kind.decode = False
    return table


def _parquet_batches(most: int, place: str, file: str):
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(file)
    if (count := opened.metadata.num_rows) > most:
        raise UserError(f"{place}: has {count:,} rows, more than {most:,}; split the file")
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
    return one_split(name, table, split) if isinstance(table, datasets.DatasetDict) else table


def _from_hub(place: str):
    """A data set of the hub: NAME[@REVISION][:CONFIG[:SPLIT]], with the splits that datasets knows, train[:10%] too."""
    import datasets

    name, revision, config, split = hub_parts(place)
    if suffix_of(name) in SUFFIXES or name.count("/") > 1 or name[:1] in (".", "/", "~") or glob.has_magic(name):
        raise UserError(f"{place}: no such file" + f", seen from {Path.cwd()}" * (not Path(place).is_absolute()))
    look_for_hub(f"datasets/{name}")
    return datasets.load_dataset(name, config or None, split=split or "train", revision=revision or None)
