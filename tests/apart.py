"""train.py or score.py on ranks that are not alike: apart.py SCRIPT JSON ARGUMENTS ...; launched by test_ranks.py.

JSON has a plan by rank ("all" is for those without one), each part of it optional:
more    arguments behind the others
env     of the environment
set     {"module.NAME": value}, of nanodpo's modules
host    its machine: a network namespace of tests/hosts.py
at      {"meet", "load", "join", "reference", "save", "step" or "part": [...]}: what it does before it tells the others
        that it is there, when it has read its data, before it joins the others, before the references, before it saves
        the first checkpoint, in its third step, or in its second part of a scoring: "stop" like Ctrl-Z, until it is
        killed 6 s later; sleep so many seconds; get a signal, [name, after so many seconds]; or run a shell's command
orphan  run as the child of a process that is killed when metrics.jsonl has three lines
"""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hosts

from nanodpo import errors
from nanodpo.data import tokens
from nanodpo.ranks import distributed, meeting
from nanodpo.run import datasets, lifecycle


def act(place: list) -> None:
    for what in place:
        if what == "stop":
            subprocess.Popen(["sh", "-c", f"sleep 6; kill -9 {os.getpid()}"], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        elif isinstance(what, str):
            subprocess.run(what, shell=True, check=True)
        elif isinstance(what, list):
            name, seconds = what
            threading.Timer(seconds, os.kill, [os.getpid(), signal.Signals[name]]).start()
        else:
            time.sleep(what)


def before(function, place: list):
    """The function, which acts before."""
    return lambda *args, **more: (act(place), function(*args, **more))[1]


def orphan(run: Path) -> None:
    """The process that goes on is a child; its parent ends by kill -9."""
    if os.fork() == 0:
        return
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    script, plans = sys.argv[1], json.loads(sys.argv[2])
    plan = plans.get(os.environ["RANK"], plans.get("all", {}))
    os.environ |= plan.get("env", {})
    time.tzset()
    if "host" in plan:
        hosts.enter(plan["host"])
    for name, value in plan.get("set", {}).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(f"nanodpo.{module}"), constant, value)
    sys.argv[:] = [script, *sys.argv[3:], *plan.get("more", [])]
    if "orphan" in plan:
        orphan(Path(plan["orphan"]))
    program = importlib.import_module(script)
    at = plan.get("at", {})
    load, step = tokens.load_dataset, getattr(program, "train_step", None)
    for place, module, name in (("meet", meeting, "_come_together"), ("join", distributed, "join_ranks"),
                                ("reference", program, "add_references"), ("save", lifecycle.checkpoint, "save")):
        if place in at:
            setattr(module, name, before(getattr(module, name), at[place]))
    reader = datasets if script == "train" else program
    reader.load_dataset = lambda *args, **more: (load(*args, **more), act(at.get("load", [])))[0]
    program.train_step = lambda run, guard: (act(at.get("step", []) if run.step == 2 else []), step(run, guard))[1]
    part, parts = getattr(program, "score_part", None), itertools.count()
    program.score_part = lambda *args: (act(at.get("part", []) if next(parts) == 1 else []), part(*args))
    errors.exit_process(errors.run_script(program.main))


if __name__ == "__main__":
    main()
