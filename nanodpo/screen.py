"""Prints to the terminal, with escapes in place of the characters that would act on it."""

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
    """Prints a line on stdout, or on `file`, above a progress bar where there is one."""
    file = file or sys.stdout
    tqdm.write(printable(" ".join(map(str, text))), file=file)
    file.flush()


def command_line(*words, cwd: Path | None = None) -> str:
    """A command that a user can copy: with this Python, paths relative to this folder, and quotes where a shell needs
    them. `cwd`: the folder in which it must run, where that is another one.
    """
    python, here = Path(sys.executable), cwd or Path.cwd()
    in_path = shutil.which(python.name)
    python = python.name if in_path and os.path.abspath(in_path) == str(python) else python
    line = shlex.join(_from(here, word) if isinstance(word, Path) else str(word) for word in (python, *words))
    return line if here == Path.cwd() else f"cd {shlex.quote(str(here))} && {line}"


def _from(here: Path, path: Path) -> str:
    path = Path(os.path.abspath(path))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def printable(text: str) -> str:
    r"""Text in which each character that acts on a terminal, as in an escape sequence, is replaced by its escape. Ends
    of lines, tabs, spaces of any width and joiners of letters stay.

    >>> printable("red \x1b[31m\u202e and \u3000wide\n")
    'red \\x1b[31m\\u202e and \u3000wide\n'
    """
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs"
                   else c.encode("unicode_escape").decode() for c in text)


def escape_all_output() -> None:
    """Passes what Python and its libraries print through `printable`: warnings, log records and tracebacks. A terminal
    that lacks a character gets its escape."""
    warnings.formatwarning = lambda *args, **options: printable(_format_warning(*args, **options))
    logging.setLogRecordFactory(_Record)
    sys.excepthook = lambda *error: put("".join(traceback.format_exception(*error)).rstrip(), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())
