"""Work shared by forks of this process, which have all that it has in memory without a copy."""

import contextlib
import gc
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection, wait
from unittest import mock

from ..errors import RunStopped

MOST = 16  # forks: a container may see far more cores than it may use
ON_THIS_MACHINE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")  # torchrun's and deepspeed's names of a number


def cores(alone: bool) -> int:
    """How many forks may work at once: one a core. The ranks of a machine share its cores, unless this one works while
    the others wait (`alone`)."""
    ranks = 1 if alone else next((int(os.environ[name]) for name in ON_THIS_MACHINE if name in os.environ), 1)
    return max(1, min(MOST, len(os.sched_getaffinity(0)) // ranks))


def in_forks(work, items: list, count: int):
    """Starts `count` forks, and returns an iterator of work(item) of each item, in their order. Where that is one, or
    none can be made, this process does the work itself. To be closed: then nothing goes on.

    `work` must raise nothing, and its values are pickled; forks alone keep it, with all that it holds. The iterator
    raises RunStopped where a fork has ended before its work is done: the system may have killed it, since memory was
    short.
    """
    if count < 2 or multiprocessing.current_process().daemon:  # which may have no children
        return (work(item) for item in items)
    forks, count = {}, min(count, len(items))
    # tokenizers would work in one thread in each fork anyway, but warn where it has worked in several before.
    with mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"):
        for k in range(count):
            _start(forks, work, [*enumerate(items)][k::count])
    return _values(forks, len(items))


def _values(forks: dict, total: int):
    """Yields what the forks send, in the order of the items, of which fork k has every n-th from number k on."""
    found, count = {}, len(forks)
    try:
        for i in range(total):
            while i not in found:
                for end in wait([*forks]):
                    number, value = end.recv()
                    found[number] = value
                    if number + count >= total:
                        _end(forks, end)
            yield found.pop(i)
    except EOFError as error:
        raise RunStopped("a process that prepared rows has ended before it was done; memory may be short") from error
    finally:
        for end in [*forks]:
            _end(forks, end)


def _start(forks: dict, work, items: list) -> None:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_work, args=(work, items, there, [*forks, here]), daemon=True)
    process.start()
    there.close()
    forks[here] = process


def _end(forks: dict, end: Connection) -> None:
    process = forks.pop(end)
    end.close()
    process.kill()
    process.join()


def _work(work, items: list, end: Connection, others: list[Connection]) -> None:
    """A fork: sends what it has done, item by item, until nobody reads it."""
    signal.set_wakeup_fd(-1)  # that of the process that it was forked from
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process ends the others
    gc.freeze()  # else it would write to, and so copy, everything that is shared
    for other in others:
        other.close()
    with contextlib.suppress(BrokenPipeError):
        for number, item in items:
            end.send((number, work(item)))
