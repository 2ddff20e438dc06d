"""A run's log, metrics.jsonl: a line for each step, and one for each evaluation. run/metrics.py says what they hold."""

import hashlib
import json
from pathlib import Path

from ..files import read_text

MAX_BYTES = 2**32  # a run of millions of steps


def read_lines(run: Path) -> list[tuple[str, dict]]:
    """(text, values) of each whole line: a killed process may leave half of the last one."""
    lines, metrics = [], run / "metrics.jsonl"
    for text in read_text(metrics, MAX_BYTES, "replace").splitlines(keepends=True) if metrics.exists() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if text.endswith("\n") and isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append((text, line))
    return lines


def is_evaluation(line: dict) -> bool:
    return any(name.startswith("eval_") for name in line)


def trained_steps(lines: list[tuple[str, dict]]) -> set[int]:
    """The steps that have their line of training."""
    return {line["step"] for _, line in lines if not is_evaluation(line)}


def timeless(line: dict) -> dict:
    """The values of a line less times and memory: those that a run has again, on whatever machine."""
    return {name: value for name, value in line.items() if not name.startswith(("perf/", "mem/"))}


def hash_before(lines: list[tuple[str, dict]], step: int) -> str:
    """A hash of the numbers before a step, which a state of this step keeps."""
    before = [timeless(line) for _, line in lines if line["step"] < step]
    return hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
