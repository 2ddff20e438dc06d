"""Reads small files of text that a user names or another program wrote: none can hang a run or fill its memory."""

import collections
import errno
import json
import os
import stat
from pathlib import Path

from .errors import UserError, first_line

MAX_BYTES = 2**26  # a settings file has a few hundred, run.json of a large data set a few million

# Errors of reading that say that there is no such file: none of that name, or what is no file of ours, or too long.
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.ENAMETOOLONG}


def check_regular(path) -> None:
    """Raises OSError for a FIFO, device, socket or folder, which may wait for ever when opened, for no file, and
    for one that this user may not read: safetensors would say that it is not there."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(errno.EINVAL, f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file", str(path))
    os.close(os.open(path, os.O_RDONLY))


def check_size(path, max_bytes: int) -> None:
    """Raises OSError for anything but a regular file, and for one longer than `max_bytes`."""
    check_regular(path)
    if (size := os.stat(path).st_size) > max_bytes:
        raise OSError(errno.EFBIG, f"has {size:,} bytes, more than the {max_bytes:,} that such a file can have",
                      str(path))


def read_text(path, max_bytes: int = MAX_BYTES, errors: str = "strict") -> str:
    """A file's text, UTF-8. Raises OSError as `check_size` does."""
    check_size(path, max_bytes)
    return Path(path).read_text(encoding="utf-8", errors=errors)


def why(error: Exception) -> str:
    """The reason in an error of reading: the system's words without number and path, or an exception's first line."""
    return getattr(error, "strerror", None) or first_line(error)


def check_absent(error: OSError, folder: Path) -> None:
    """Raises UserError for an error of reading that leaves open what is in the file, as of a network that is down: it
    may be whole, and must not be made again."""
    if error.errno not in ABSENT:
        raise UserError(f"{error.filename or folder}: can't be read ({why(error)}); mend that, or move {folder} "
                        "elsewhere") from error


def parse_json(text: str, **options):
    """json.loads that raises ValueError for a key that an object has twice, of which JSON's readers take the last."""
    return json.loads(text, object_pairs_hook=_without_repeats, **options)


def read_json(file, max_bytes: int = MAX_BYTES):
    """A JSON file of this project. Raises UserError for one that can't be read, or is no JSON: cut off, say."""
    try:
        return parse_json(read_text(file, max_bytes))
    except OSError as error:
        raise UserError(f"{file}: can't be read ({why(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: can't be read as JSON ({first_line(error)}); copy it anew") from error


def _without_repeats(pairs: list[tuple]) -> dict:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError(f"has {repeated(name for name, _ in pairs)!r} twice")
    return values


def repeated(names):
    """The most frequent of these names."""
    return collections.Counter(names).most_common(1)[0][0]
