"""Runs this project's commands for the experiments beside it: several at a time, and each with a log of its own."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nanodpo.errors import Preempted  # noqa: E402
from nanodpo.progress import Progress  # noqa: E402
from nanodpo.screen import command_line, put  # noqa: E402

_running: set[subprocess.Popen] = set()
_lock = threading.RLock()  # a signal may come while it is held
_stopped = threading.Event()


class Failed(RuntimeError):
    """A command that ended with an error. The message says which, and where its output is."""


@contextlib.contextmanager
def stops_handed_on():
    """Within this SIGTERM reaches the commands that run, too, which then save what is done; no other is begun, and once
    they have ended Preempted is raised, for exit code 75. Ctrl-C reaches them without help: a terminal sends it to all.
    """
    def stop(number, frame):
        _stopped.set()
        with _lock:
            for process in _running:
                process.terminate()
        raise Preempted("stopped by SIGTERM; the same command goes on")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _stopped.clear()


def run(args, log: Path, script: str, *flags) -> None:
    """One command, on --ranks processes and with its part of the cores; raises Failed with the last line it said."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
    start = several if args.ranks > 1 and script != "plot.py" else []
    command = [sys.executable, *start, str(ROOT / script), *map(str, flags)]
    put(command_line(*command[1:], cwd=ROOT))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (args.parallel * args.ranks)))}
    with open(f"{log}.log", "a") as out:
        code = _ended(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | threads, cwd=ROOT)
    if code:
        said = [line for line in Path(f"{log}.log").read_text().splitlines() if line.strip()]
        raise Failed(f"{script} ended with {code}, {log}.log: {said[-1] if said else ''}")


def _ended(command: list[str], **settings) -> int:
    """Runs a command; returns its exit code. It ends by itself, also where this process is told to stop."""
    with _lock:
        if _stopped.is_set():
            raise Failed(f"{command[-1]} was not begun")
        process = subprocess.Popen(command, **settings)
        _running.add(process)
    try:
        return process.wait()
    finally:
        process.wait()  # as it saves, after an exception that a signal has raised
        _running.discard(process)


def run_all(jobs: list, parallel: int, bar: Progress) -> None:
    """Calls these functions, `parallel` at a time. After one has raised Failed, or a stop, no other is begun, and it is
    raised."""
    over = threading.Event()

    def call(job):
        try:
            return None if over.is_set() else job()
        except Failed:
            over.set()  # before this thread takes another one
            raise

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        calls = [pool.submit(call, job) for job in jobs]
        try:
            for done in concurrent.futures.as_completed(calls):
                done.result()
                bar.update()
        finally:
            over.set()


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
