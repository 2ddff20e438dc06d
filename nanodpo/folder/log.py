"""A run's log, metrics.jsonl: a line for each step, and one for each evaluation. run/metrics.py says what they hold."""

import hashlib
import json
import sys
from pathlib import Path

from ..errors import RankStopped, UserError
from ..files import check_size, why

MAX_BYTES = 2**32  # a run of millions of steps


class Log:
    """Reads a run's log once, however often it is asked: what was appended since the last time."""

    def __init__(self, run: Path):
        self.file, self.place = run / "metrics.jsonl", 0

    def new_lines(self) -> list[tuple[str, dict]]:
        """(text, values) of each whole line that has come: a killed process may leave half of the last one. What can't
        be a line of train.py is none. Raises UserError for a file that can't be read."""
        if not self.file.exists():
            return []
        try:
            check_size(self.file, MAX_BYTES)
            with self.file.open("rb") as opened:
                opened.seek(self.place)
                whole = opened.read()
        except OSError as error:
            raise UserError(f"{self.file}: can't be read ({why(error)}); put the file back as it was") from error
        whole = whole[: whole.rfind(b"\n") + 1]
        self.place += len(whole)
        lines = []
        for text in whole.decode(errors="replace").splitlines(keepends=True):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if text.endswith("\n") and _is_line(line):
                lines.append((text, line))
        return lines


def _is_line(line) -> bool:
    """Whether train.py can have written this: a whole step, and finite numbers."""
    return (isinstance(line, dict) and type(step := line.get("step")) is int and step >= 0
            and all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in line.values()))


class LogHash:
    """A hash of the numbers of a log before a step, which a state of this step keeps. Each line is hashed once: that
    of their JSON, as one list. `new_lines` is `Log.new_lines`, or a function like it."""

    def __init__(self, new_lines):
        self.new_lines, self.digest, self.between = new_lines, hashlib.sha256(b"["), ""
        self.later: list[dict] = []  # lines that are read and not hashed yet

    def before(self, step: int) -> str:
        """Steps must be asked for in order."""
        lines = self.later + [line for _, line in self.new_lines()]
        self.later = [line for line in lines if line["step"] >= step]
        for line in (line for line in lines if line["step"] < step):
            self.digest.update((self.between + json.dumps(timeless(line), sort_keys=True)).encode())
            self.between = ", "
        whole = self.digest.copy()
        whole.update(b"]")
        return whole.hexdigest()


def read_lines(run: Path) -> list[tuple[str, dict]]:
    """All lines of `Log.new_lines`."""
    return Log(run).new_lines()


def is_evaluation(line: dict) -> bool:
    return any(name.startswith("eval_") for name in line)


def trained_steps(lines: list[tuple[str, dict]]) -> set[int]:
    """The steps that have their line of training."""
    return {line["step"] for _, line in lines if not is_evaluation(line)}


def timeless(line: dict) -> dict:
    """The values of a line less times and memory: those that a run has again, on whatever machine."""
    return {name: value for name, value in line.items() if not name.startswith(("perf/", "mem/"))}


def append_line(file: Path, line: dict) -> None:
    """Appends one JSON line and hands it to the operating system at once. Raises RankStopped where it can't."""
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise RankStopped(f"{file}: can't be written ({error.strerror}); what was written before is whole, and the "
                          "same command goes on from there") from error
