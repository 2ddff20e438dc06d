"""Forks that share a work: the same values in the same order as one process gives, and nothing is left of them."""

import multiprocessing
import os
import signal
import time
import weakref

import pytest

from nanodpo.data.forks import cores, in_forks
from nanodpo.errors import Preempted, RunStopped
from nanodpo.run.signals import Stop


def ended(pid: int, seconds: float = 20) -> bool:
    """Whether a process that is no child of this one is gone, or goes within this time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_values_come_in_order_whoever_is_first(count):
    """Also where some items take longer than all others, values are larger than a pipe, and there are more forks than
    items; none is left."""
    def work(item):
        time.sleep(0.05 * (item % 3 == 0))
        return [item] * 20_000

    assert [value[0] for value in in_forks(work, range(10), count)] == [*range(10)]
    assert [*in_forks(work, [], count)] == [] and not multiprocessing.active_children()


def test_the_work_is_done_elsewhere_and_tokenizers_keep_to_one_thread():
    def work(item):
        return os.getpid(), os.environ["TOKENIZERS_PARALLELISM"]

    before = os.environ.get("TOKENIZERS_PARALLELISM")
    found = [*in_forks(work, range(6), 2)]
    assert len({pid for pid, _ in found} - {os.getpid()}) == 2 and {said for _, said in found} == {"false"}
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_a_fork_that_is_killed_ends_the_work_with_its_reason():
    def work(item):
        return os.kill(os.getpid(), signal.SIGKILL) if item == 3 else item

    found = in_forks(work, range(8), 2)
    with pytest.raises(RunStopped, match="ended before it was done; memory may be short"):
        print([*found])
    assert not multiprocessing.active_children()


def test_forks_alone_keep_what_the_work_holds():
    """Rows of gigabytes are not in the memory of every process for as long as one of them works."""
    class Rows(list):
        pass

    def start(rows):
        return weakref.ref(rows), in_forks(lambda item: rows[item], range(4), 2)

    rows, found = start(Rows("abcd"))
    assert rows() is None and [*found] == [*"abcd"]


def test_who_stops_listening_leaves_no_process():
    found = in_forks(lambda item: os.getpid(), range(1000), 2)
    pids = {next(found), next(found)}
    found.close()
    assert len(pids) == 2 and all(ended(pid) for pid in pids)


def test_forks_end_with_a_process_that_is_killed():
    """Nobody could end them then."""
    here, there = multiprocessing.Pipe()

    def parent():
        for pid in in_forks(lambda item: time.sleep(0.1) or os.getpid(), range(1000), 2):
            there.send(pid)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    pids = {here.recv(), here.recv()}
    process.kill()
    process.join()
    assert len(pids) == 2 and all(ended(pid) for pid in pids)


def test_a_run_that_is_told_to_stop_takes_its_forks_along():
    """As long as there is nothing to save it ends at once."""
    here, there = multiprocessing.Pipe()

    def run():
        try:
            with Stop():
                for pid in in_forks(lambda item: time.sleep(0.1) or os.getpid(), range(1000), 2):
                    there.send(pid)
        except Preempted as told:
            there.send(str(told))
            os._exit(75)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    pids = {here.recv(), here.recv()}
    process.terminate()
    process.join(20)
    assert process.exitcode == 75 and len(pids) == 2 and all(ended(pid) for pid in pids)
    while isinstance(said := here.recv(), int):
        pass
    assert said.startswith("stopped by SIGTERM")


def test_a_signal_to_all_is_the_first_process_to_handle():
    """Ctrl-C reaches forks, too; a handler of the first process must not run in them, and SIGTERM ends them."""
    handled = []
    before = {number: signal.signal(number, lambda *_: handled.append(os.getpid()))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        def work(item):
            os.kill(os.getpid(), signal.SIGINT)
            return len(handled), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

        assert [*in_forks(work, range(4), 2)] == [(0, True)] * 4
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    """By the number that torchrun gives, else deepspeed's, else that of all ranks; all cores for one that works alone.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)})
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert cores(alone=False) == cores(alone=True) == 8
    for name, ranks, each in (("WORLD_SIZE", "16", 1), ("LOCAL_SIZE", "4", 2), ("LOCAL_WORLD_SIZE", "2", 4)):
        monkeypatch.setenv(name, ranks)
        assert (cores(alone=False), cores(alone=True)) == (each, 8)
