"""train.py with a fault in it: faulty.py FAULT ARGUMENTS ...; launched by test_resume.py and test_faults.py.

FAULT is what@step[:rank], and what is kill, term, raise, memory, loss, gradient, weight, moved or
replaced (the run's folder); disk, metrics or checkpoint,
where the disk fills in a state, a line or a checkpoint's file; term-reference, term-evaluation, term-checkpoint,
term-state or term-merge, SIGTERM in the midst of these, and likewise memory-engine and memory-reference; twice, in a
step and again in the state that it asks for;
removal@NAME, killed when one file of the folder NAME is removed;
often@0, where the cache of references is written after every step of its pass;
link@0 and link@1, killed before and after run.json gets its name; slow@0.5 makes every forward pass take half a second.
"""

import contextlib
import errno
import itertools
import os
import resource
import signal
import sys
import time

import torch

import train
from nanodpo.core import packing
from nanodpo.folder import checkpoint, reference, resume
from nanodpo.model import ready
from nanodpo.run import lifecycle, passes, signals


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def small_files(size: int):
    """No file can grow beyond so many bytes: writing fails in its midst, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def hit(what: str, run, losses):
    if what in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
    elif what == "raise":
        raise LookupError("a fault for the test")
    elif what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    elif what in ("moved", "replaced") and (run.folder / "run.json").exists():
        run.folder.rename(f"{run.folder}-moved")
        run.folder.mkdir() if what == "replaced" else None
    elif what == "gradient":
        losses.register_hook(lambda gradient: gradient * torch.nan)
    elif what == "weight":
        for p in run.engine.module.parameters():
            if p.requires_grad:
                p.data.fill_(torch.inf)
                getattr(p, "ds_tensor", p).data.fill_(torch.inf)
    return losses


def plant_in(what: str, kind: str, step: int, mine: bool) -> None:
    """A fault after so many micro-batches of the reference pass, in the evaluation before step `step`, when its
    checkpoint or state is half made, when it is merged, or when the engine is made."""
    place, name, here = {
        "engine": (train, "make_engine", lambda *_: True),
        "reference": (passes, "response_logps", lambda calls, *_: calls == step),
        "evaluation": (passes, "pair_losses", lambda calls, *_: inside("evaluate", step)),
        "checkpoint": (checkpoint, "verify", lambda calls, folder, _: f"checkpoint-{step}." in str(folder)),
        "merge": (checkpoint, "save", lambda calls, *args: args[3].name == "merged"),
        "state": (resume, "save_file", lambda calls, _, file: f"step-{step}." in str(file))}[what]
    whole, calls = getattr(place, name), itertools.count(1)

    def act(*args, **kwargs):
        if here(next(calls), *args) and mine:
            hit(kind, None, None)
        return whole(*args, **kwargs)

    setattr(place, name, act)


NOW: dict = {}  # the function of train.py that runs, and its run


def inside(name: str, step: int) -> bool:
    return NOW.get("name") == name and NOW["run"].step == step


def remember(name: str, before=lambda run: None) -> None:
    """Lets `inside` know when train.py's function `name` runs; `before` is called first."""
    whole = getattr(train, name)

    def call(run, *args):
        NOW.update(name=name, run=run)
        before(run)
        found = whole(run, *args)
        NOW.clear()
        return found

    setattr(train, name, call)


def kill_in_removal(name: str) -> None:
    """Kills the process at the second file that goes of the folder `name`, under whatever name it goes."""
    now = {"inside": False, "files": 0}

    def hear(event: str, what: tuple) -> None:
        if event == "shutil.rmtree":
            now["inside"] = os.path.basename(what[0]) in (name, f".{name}.old.partial")
        elif event == "os.remove" and now["inside"]:
            now["files"] += 1
            if now["files"] == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def half_a_line(step: int):
    """lifecycle.append_line with a disk that fills in the line of this step."""
    write = lifecycle.append_line

    def append_line(file, line):
        if line["step"] >= step:
            with file.open("a") as out:
                out.write('{"step": ')  # half of it still fitted
            file = type("Full", (), {"open": full, "__str__": lambda self: "metrics.jsonl"})()
        write(file, line)

    return append_line


def plant(fault: str) -> None:
    """Puts the fault into its place."""
    what, _, place = fault.partition("@")
    if what == "removal":
        return kill_in_removal(place)
    step, _, rank = place.partition(":")
    mine = os.environ.get("RANK", "0") == (rank or os.environ.get("RANK", "0"))
    pairs, save, write_files = train.pair_losses, resume.save_file, checkpoint._write

    def pair_losses(*args):
        losses = pairs(*args)
        if not (mine and inside("train_step", int(step))) or what == "weight":
            return losses
        return losses * torch.inf if what == "loss" else hit(what, NOW["run"], losses)

    def save_file(tensors, file, *rest):
        if mine and f"step-{step}." in str(file):
            save({"part": torch.zeros(9)}, file)
            full() if what == "disk" else hit("term", None, None)
        save(tensors, file, *rest)

    def write_checkpoint(*args):
        with small_files(3000 if f"checkpoint-{step}." in str(args[-1]) else resource.RLIM_INFINITY):
            write_files(*args)

    remember("evaluate")
    remember("train_step", lambda run: hit("weight", run, None)
             if what == "weight" and mine and run.step == int(step) else None)
    if "-" in what:
        plant_in(*reversed(what.split("-")), int(step), mine)
    elif what == "slow":
        batch = packing.make_batch
        for place in (ready, passes, train):
            place.make_batch = lambda *args: (time.sleep(float(step)), batch(*args))[1]
    elif what == "often":
        reference.SAVE_SECONDS = float(step)
    elif what == "metrics":
        lifecycle.append_line = half_a_line(int(step))
    elif what == "link":
        link, os.link = os.link, lambda *names: (int(step) and link(*names), hit("kill", None, None))
    elif what == "checkpoint":
        checkpoint._write = write_checkpoint
    elif what == "disk":
        resume.save_file = save_file
    elif what == "twice":
        signals.GRACE = 0  # what comes later than the first was meant
        what, train.pair_losses, resume.save_file = "term", pair_losses, save_file
    else:
        train.pair_losses = pair_losses
        passes.pair_losses = lambda *args: pairs(*args) if NOW else hit(what, None, pairs(*args))  # of a dry run


if __name__ == "__main__":
    plant(sys.argv.pop(1 + sys.argv[1].startswith("--local_rank")))  # the deepspeed launcher's comes first
    train.exit_process(train.run_script(train.main))
