"""Starts ranks by fork for the tests: a line of JSON in, [arguments, ranks, log, folder]; a line of exit codes out."""

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))


def run(arguments: list[str], ranks: int, log: str, folder: str) -> list[int]:
    from faults import EXITS, ended, fork, wait_until

    from nanodpo.figures import after

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    EXITS.clear()
    with contextlib.chdir(folder), contextlib.ExitStack() as stack:
        # No test cuts the power: what a process has written is there, whether it has flushed it to the disk or not.
        stack.enter_context(mock.patch.object(os, "fsync", lambda file: None))
        if "--draw" not in arguments:  # figures, which nobody asked for and would look at, take longer than all else
            stack.enter_context(mock.patch.object(after, "_made", lambda what, *_: f"no {what}: not in this test"))
        pids = [fork(arguments, Path(log), rank, ranks, port) for rank in range(ranks)]
    wait_until(pids, lambda: any(ended(pids)), 300, 0.01)
    wait_until(pids, lambda: None not in ended(pids), 20)
    for pid in (pid for pid, code in zip(pids, ended(pids)) if code is None):  # as a launcher would
        os.killpg(pid, signal.SIGKILL)
    wait_until(pids, lambda: None not in ended(pids))
    return ended(pids)


if __name__ == "__main__":
    from faults import warm_up

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    warm_up()
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
