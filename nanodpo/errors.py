"""The errors that are no bugs, and the end of a script: one line on the screen, an exit code, no traceback."""

import contextlib
import errno
import os
import pickle
import sys

from .screen import OutputLost, escape_all_output, printable, put

as_script = False  # whether this process is a script's own, and may be ended; a notebook's may not


class _Short:
    """An exception that a notebook shows in one line, without the way to it."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {one_line(str(self))}"]


class UserError(_Short, ValueError):
    """A mistake in the input. The message names the file, row or flag, what was found and what to do. Exit code 2."""


class RunStopped(_Short, RuntimeError):
    """A run that must not go on, since its numbers are wrong or can't be written. Exit code 1."""


class RankStopped(RunStopped):
    """An error that only one rank knows, so that this rank has to print it."""


class Unreachable(RankStopped):
    """Another rank that is out of reach, since the network or its machine has failed. Exit code 75: the same command
    can go on."""


class Preempted(_Short, BaseException):
    """A run that was told to stop and can go on. Exit code 75, EX_TEMPFAIL: a job script may start it again.

    Like KeyboardInterrupt it is not an Exception, since libraries catch those.
    """


TEMPFAIL = 75


def first_line(error: Exception, most: int = 1) -> str:
    """The message of a library's exception in one line: its first `most` lines, and the next where they end in a colon.
    """
    if isinstance(error, pickle.UnpicklingError):  # torch advises to run the code in it
        return "the pickle is broken, or holds more than tensors; save the weights as safetensors"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    message = " ".join(lines[:most])
    del lines[:most]
    while message.endswith(":") and lines:
        message += f" {lines.pop(0)}"
    return f"{type(error).__name__} {message}" if isinstance(error, LookupError) else message


def one_line(text: str, most: int = 1000) -> str:
    """Text in one line for a terminal: of a long one the two ends; characters that act on the terminal are escaped."""
    text = " ".join(text.split())
    return printable(text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}")


@contextlib.contextmanager
def bad_paths_refused():
    """Raises UserError for a path that this user may not enter, read or write, or with a name too long for the file
    system, whichever flag or file it came from."""
    try:
        yield
    except OSError as error:
        if not error.filename or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error


def run_script(main) -> int:
    """Calls main(argv), prints its error in one line and returns the exit code. A bug keeps its traceback."""
    global as_script
    escape_all_output()
    as_script = True
    try:
        with bad_paths_refused():
            main(sys.argv[1:])
        sys.stdout.flush()
        return 0
    except (UserError, RunStopped) as error:
        # Once a machine: files may be missing on one only.
        if isinstance(error, RankStopped) or os.environ.get("LOCAL_RANK", "0") == "0":
            _say_last(f"error: {one_line(str(error))}")
        return 2 if isinstance(error, UserError) else TEMPFAIL if isinstance(error, Unreachable) else 1
    except Preempted as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _say_last(stop)
        return TEMPFAIL
    except OutputLost as error:
        _say_last(f"error: the output can't be written ({error.strerror}); make room there, or send it elsewhere")
        _discard(sys.stdout)
        return 1
    except BrokenPipeError:  # `train.py --inspect | head`
        _discard(sys.stdout)
        return 1
    except KeyboardInterrupt:
        _say_last("stopped by Ctrl-C")
        return 130
    finally:
        as_script = False


def _say_last(text) -> None:
    """A line on stderr, where that can be written: the exit code must come through."""
    try:
        put(text, file=sys.stderr)
    except OSError:
        _discard(sys.stderr)


def _discard(stream) -> None:
    """Writes what is left of an output to nowhere: the flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_process(code: int) -> None:
    """Exits with this code. A rank exits without the interpreter's own clean-up: there a thread of a library may abort
    a process whose work is done, and the launcher would call the whole run failed."""
    if "RANK" in os.environ or "deepspeed" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
