"""Prints to the terminal: one function does, and shows characters that would act on it instead of sending them."""

import logging
import os
import shlex
import shutil
import sys
import traceback
import unicodedata
import warnings
from pathlib import Path

from tqdm import tqdm

_format_warning = warnings.formatwarning


def put(*text, file=None) -> None:
    """Prints a line, on stdout unless `file` says otherwise; a bar on the screen makes room for it."""
    file = file or sys.stdout
    tqdm.write(printable(" ".join(map(str, text))), file=file)
    file.flush()


def command_line(*words, cwd: Path | None = None) -> str:
    """A command that runs as it is printed: this very Python, paths from here, and quotes where a shell needs them.

    `cwd`: the folder in which it must run, where that is another one than this.
    """
    python, here = Path(sys.executable), cwd or Path.cwd()
    found = shutil.which(python.name)
    python = python.name if found and os.path.abspath(found) == str(python) else python
    line = shlex.join(_from(here, word) if isinstance(word, Path) else str(word) for word in (python, *words))
    return line if here == Path.cwd() else f"cd {shlex.quote(str(here))} && {line}"


def _from(here: Path, path: Path) -> str:
    path = Path(os.path.abspath(path))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def printable(text: str) -> str:
    r"""Replaces each character that acts on a terminal (an escape sequence in somebody's data, say) by its escape, so
    that it is only shown. Lines, tabs, spaces of any width and what joins letters stay.

    >>> printable("red \x1b[31m\u202e and \u3000wide\n")
    'red \\x1b[31m\\u202e and \u3000wide\n'
    """
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs"
                   else c.encode("unicode_escape").decode() for c in text)


def guard() -> None:
    """Makes `printable` what Python and its libraries print by themselves: warnings, log records, and the traceback of
    an error that nobody foresaw. A terminal that lacks a character gets its escape."""
    warnings.formatwarning = lambda *said, **more: printable(_format_warning(*said, **more))
    logging.setLogRecordFactory(_Record)
    sys.excepthook = lambda *error: put("".join(traceback.format_exception(*error)).rstrip(), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())
