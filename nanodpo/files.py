"""Small files of text that a user names or another program wrote: read so that none of them can hang or fill a run."""

import collections
import errno
import json
import os
import stat
from pathlib import Path

from .errors import first_line

MOST = 2**26  # bytes; a settings file has a few hundred, run.json of a large data set a few MB


def check_regular(path) -> None:
    """Raises OSError for a FIFO, device, socket or folder: opening one may wait for ever. And for what is not there."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(errno.EINVAL, f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file", str(path))


def read_text(path, most: int = MOST, errors: str = "strict") -> str:
    """A file's text, UTF-8. Raises OSError for what is no regular file or longer than `most` bytes."""
    check_regular(path)
    if (size := os.stat(path).st_size) > most:
        raise OSError(errno.EFBIG, f"has {size:,} bytes, more than the {most:,} that such a file can have", str(path))
    return Path(path).read_text(encoding="utf-8", errors=errors)


def why(error: Exception) -> str:
    """What kept a file from being read: the system's words without number and path, or an exception's first line."""
    return getattr(error, "strerror", None) or first_line(error)


def parse_json(text: str, **how):
    """json.loads, but a key that an object has twice is a ValueError: JSON's readers take the last in silence."""
    return json.loads(text, object_pairs_hook=_once, **how)


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"has {repeated(name for name, _ in pairs)!r} twice")
    return found


def repeated(names):
    """The name that is there most often."""
    return collections.Counter(names).most_common(1)[0][0]
