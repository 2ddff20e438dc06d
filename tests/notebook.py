"""Runs in one process, as cells of a notebook would: notebook.py JSON, a list of [script, arguments, whether the stop
button is pressed in the third step]; prints how each ended. Launched by test_notebook.py."""

import json
import os
import signal
import sys

import torch

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in NAMES:
    os.environ.pop(name, None)  # this process is nobody's rank

import score  # noqa: E402
import train  # noqa: E402
from nanodpo.errors import Preempted, UserError  # noqa: E402


def state() -> list:
    """The parts of the process that a run must leave as they were."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return [handlers, wakeup, {name: os.environ.get(name) for name in NAMES}, torch.nn.functional.linear,
            torch.distributed.is_initialized()]


def stopped_by_hand(step):
    def train_step(run, guard):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, guard)

    return train_step


if __name__ == "__main__":
    before, plain = state(), train.train_step
    for script, argv, stopped in json.loads(sys.argv[1]):
        train.train_step = stopped_by_hand(plain) if stopped else plain
        try:
            {"train": train, "score": score}[script].main(argv)
            print("cell: done", flush=True)
        except (UserError, Preempted) as error:
            print(f"cell: {error._render_traceback_()[0]}", flush=True)
        assert state() == before, (state(), before)
    print("the kernel lives", flush=True)
    sys.exit()
