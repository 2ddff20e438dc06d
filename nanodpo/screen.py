"""Prints to the terminal, with escapes in place of the characters that would act on it."""

import logging
import os
import shlex
import shutil
import sys
import textwrap
import traceback
import unicodedata
import warnings
from pathlib import Path

from tqdm import tqdm

_format_warning = warnings.formatwarning


class OutputLost(OSError):
    """The output goes to a disk that is full, or the like."""


def put(*text, file=None) -> None:
    """Prints a line on stdout, or on `file`, above a progress bar where there is one. Raises OutputLost, and
    BrokenPipeError where nobody reads it any more."""
    file = file or sys.stdout
    try:
        tqdm.write(printable(" ".join(map(str, text))), file=file)
        file.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(error.errno, error.strerror) from error


def command_line(*words, cwd: Path | None = None) -> str:
    """A command that a user can copy: with this Python, or the installed command beside the one that runs now; paths
    relative to this folder, and quotes where a shell needs them. `words` begin with the script. `cwd`: the folder in
    which it must run, where that is another one.
    """
    program, here = Path(sys.executable), cwd or Path.cwd()
    if Path(sys.argv[0]).name.startswith("nanodpo-"):
        program, words = Path(sys.argv[0]).absolute().with_name(f"nanodpo-{Path(words[0]).stem}"), words[1:]
    in_path = shutil.which(program.name)
    program = program.name if in_path and os.path.abspath(in_path) == str(program) else program
    line = shlex.join(_from(here, word) if isinstance(word, Path) else str(word) for word in (program, *words))
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


def folded(text: str, width: int = 80) -> str:
    r"""Text whose lines are broken at spaces where a terminal of `width` columns would break them within a word. What
    follows of a line is indented under it; a line with a long path stays whole.

    >>> folded("columns: a, b\n  not read: c, de", 14)
    'columns: a, b\n  not read: c,\n    de'
    """
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        path = any("/" in word and len(word) > width / 2 for word in line.split())
        lines += [line] if path or not line else textwrap.wrap(
            line, width, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def escape_all_output() -> None:
    """Passes what Python and its libraries print through `printable`: warnings, log records and tracebacks. A terminal
    that lacks a character gets its escape, and what was closed when the process began is nowhere: a file that is
    opened would get its number, and what a library prints."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    warnings.formatwarning = lambda *args, **options: printable(_format_warning(*args, **options))
    logging.setLogRecordFactory(_Record)
    sys.excepthook = lambda *error: put("".join(traceback.format_exception(*error)).rstrip(), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())
