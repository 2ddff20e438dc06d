"""Traces the second step of the example run: which files of this project it enters, and which functions.

    python bench/trace_step.py [flags of train.py]

Prints a line a file: the functions entered, in the order of their first call, and their lines. Functions of libraries
(transformers, PEFT, DeepSpeed, torch) are not shown; functions of this project that they call are. A reader of these
lines has read all of this project's code that computes a step.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from nanodpo.errors import run_script  # noqa: E402


def traced(function, found: dict):
    """The function, with {(file, name): number of lines} of each function of ours that one call of it enters."""
    def enter(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and "/.venv/" not in code.co_filename:
            lines = [line for _, _, line in code.co_lines() if line]
            key = Path(code.co_filename).relative_to(ROOT), code.co_qualname
            if not code.co_name.startswith("<"):  # generators and lambdas belong to the function that they stand in
                found.setdefault(key, max(lines) - min(lines) + 1)

    def call(run, *args):
        sys.setprofile(enter if run.step == 1 else None)
        try:
            return function(run, *args)
        finally:
            sys.setprofile(None)

    return call


def report(found: dict) -> str:
    files = list(dict.fromkeys(file for file, _ in found))
    lines = []
    for file in files:
        names = {name: count for (where, name), count in found.items() if where == file}
        lines.append(f"{str(file):<32} {sum(names.values()):>4} lines  {', '.join(names)}")
    return "\n".join([*lines, f"{len(files)} files, {len(found)} functions, {sum(found.values())} lines"])


def main(argv: list[str]) -> dict:
    found: dict = {}
    train.train_step = traced(train.train_step, found)
    with tempfile.TemporaryDirectory() as folder:
        train.main([*argv, "--max_steps", "2", "--eval_file_path", "", "--eval_steps", "0", "--draw", "false",
                    "--output_dir", f"{folder}/run", "--cache_dir", f"{folder}/cache"])
    print(report(found))
    return found


if __name__ == "__main__":
    sys.exit(run_script(main))
