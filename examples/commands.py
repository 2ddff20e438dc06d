"""Runs this project's commands for the experiments beside it: several at a time, and each with a log of its own."""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nanodpo.progress import Progress  # noqa: E402
from nanodpo.screen import command_line, put  # noqa: E402


class Failed(RuntimeError):
    """A command that ended with an error. The message says which, and where its output is."""


def run(args, log: Path, script: str, *flags) -> None:
    """One command, on --ranks processes and with its part of the cores; raises Failed with the last line it said."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
    start = several if args.ranks > 1 and script != "plot.py" else []
    command = [sys.executable, *start, str(ROOT / script), *map(str, flags)]
    put(command_line(*command[1:], cwd=ROOT))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (args.parallel * args.ranks)))}
    with open(f"{log}.log", "a") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | threads, cwd=ROOT)
    if done.returncode:
        said = [line for line in Path(f"{log}.log").read_text().splitlines() if line.strip()]
        raise Failed(f"{script} ended with {done.returncode}, {log}.log: {said[-1] if said else ''}")


def run_all(jobs: list, parallel: int, bar: Progress) -> None:
    """Calls these functions, `parallel` at a time. After one has raised Failed no other is begun, and it is raised."""
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        calls = [pool.submit(job) for job in jobs]
        try:
            for call in concurrent.futures.as_completed(calls):
                call.result()
                bar.update()
        except Failed:
            pool.shutdown(cancel_futures=True)
            raise


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
