"""Text files, packed or not, whole or line by line."""

import contextlib
import io
import itertools
from pathlib import Path

from ..errors import UserError
from .places import PACKED

LINE = 256 * 2**20  # characters of a line, 16 times those of the longest cell (rows.py)


def _open(file: str):
    suffix = Path(file).suffix
    if suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(file, compression="zstd")
    return PACKED.get(suffix, open)(file, "rb")


@contextlib.contextmanager
def text_of(file: str, newline: str | None = None):
    """A text file, open. Raises UserError that names the first line which is not UTF-8."""
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline=newline) as text:
        try:
            yield text
        except UnicodeDecodeError as error:  # which knows the place in a block of bytes, not in the file
            with _open(file) as raw:
                line = next(i for i, line in enumerate(io.BufferedReader(raw), 1)
                            if line.decode(errors="ignore").encode() != line)
            raise UserError(f"{file}, line {line}: is not UTF-8, as text files must be ({error.reason}); "
                            f"`iconv -f ENCODING -t utf-8` converts it") from error


def lines_of(file: str, newline: str | None = None):
    """The lines of a text file. Raises UserError for one that is longer than any row: a few KB may unpack to it."""
    with text_of(file, newline) as text:
        for i in itertools.count(1):
            line = text.readline(LINE)
            if not line:
                return
            if len(line) == LINE:
                raise UserError(f"{file}, line {i}: has more than {LINE:,} characters; no row is so long")
            yield line
