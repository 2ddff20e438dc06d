"""The ends of a run that are not bugs, and how a script shows them: one line, an exit code, no traceback."""

import contextlib
import errno
import os
import sys

from .screen import guard, printable, put


class UserError(ValueError):
    """A mistake in the input. The message names the file, row or flag, what was found and what to do. Exit code 2."""


class RunStopped(RuntimeError):
    """A run that must not go on: its numbers went wrong. Exit code 1."""


class RankStopped(RunStopped):
    """What only one rank knows of, and so has to print itself."""


class Preempted(BaseException):
    """A run that was told to stop and can go on. Exit code 75, EX_TEMPFAIL: a job script may start it again.

    Not an Exception, as KeyboardInterrupt is none: libraries swallow those.
    """


TEMPFAIL = 75


def first_line(error: Exception) -> str:
    """What a library's exception says, in one line: its first, and what follows a colon at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = lines.pop(0)
    while said.endswith(":") and lines:
        said += f" {lines.pop(0)}"
    return f"{type(error).__name__} {said}" if isinstance(error, LookupError) else said


def one_line(text: str, most: int = 1000) -> str:
    """Text as a terminal can show it: its two ends where it is long, and no character that acts on the screen."""
    text = " ".join(text.split())
    return printable(text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}")


@contextlib.contextmanager
def long_names_refused():
    """A path with a name that no file system takes is a mistake in the input, whichever flag or file it came from."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error


def run_script(main) -> int:
    """Calls main(argv) and turns its end into an exit code. Anything unforeseen keeps its traceback."""
    guard()
    try:
        with long_names_refused():
            main(sys.argv[1:])
        sys.stdout.flush()
        return 0
    except (UserError, RunStopped) as error:
        # Once a machine: files may be missing on one only.
        if isinstance(error, RankStopped) or os.environ.get("LOCAL_RANK", "0") == "0":
            put(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Preempted as told:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            put(told, file=sys.stderr)
        return TEMPFAIL
    except BrokenPipeError:  # `train.py --inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 1
    except KeyboardInterrupt:
        put("stopped by Ctrl-C", file=sys.stderr)
        return 130


def leave(code: int) -> None:
    """Exits, and where ranks were started without the interpreter's own end: there a thread that a library has left
    running now and then aborts a process whose work is done, and the launcher calls the whole run failed."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
