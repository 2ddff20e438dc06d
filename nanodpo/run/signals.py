"""Requests to stop: a run that is told to stop ends where it can go on, with exit code 75.

Slurm sends SIGTERM before it kills (`--signal=TERM@120`; also USR1 and USR2, which many job scripts name), batch
systems send SIGXCPU when the time is used up, a terminal sends SIGINT, and SIGHUP when it closes. All of these are
requests to stop; SIGHUP is not where it was ignored at the start (nohup). SIGQUIT ends the process at once, as always.
The end of the launcher is a request as well, since nobody would end its ranks any more.

Launchers pass signals on, some of them twice, and not to all ranks at the same time. So the first signal is only noted,
and the ranks exchange their notes in every micro-batch. A signal that comes more than GRACE seconds later ends the
process at once. While C code waits for other ranks, Python's signal handlers do not run: so a thread reads the signals,
and ends the process where the main thread can't.
"""

import contextlib
import os
import select
import signal
import threading
import time

import psutil

from .. import errors
from ..errors import TEMPFAIL, Preempted, RankStopped
from ..ranks import distributed, waits

GRACE = 5.0  # seconds; Ctrl-C under the deepspeed launcher arrives as SIGINT and, 0.1 s later, as SIGTERM
REACT = 2.0  # seconds in which a process that has nothing to save must have ended
ALWAYS = (signal.SIGTERM, signal.SIGINT)
UNLESS_IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Stop:
    """Notes requests to stop, within a `with`. Until `defer` is called a signal ends the process at once, since nothing
    is to be saved yet.

    `name` is that of the signal, None before one has come; `advice` gives the words for the screen that follow it.
    """

    def __init__(self):
        self.name, self.since, self.waiting, self.before = None, 0.0, False, {}
        self.advice = lambda: "; the same command starts again"
        self._urgent, self._raised, self._over, self._handled = False, False, False, 0
        self._script = errors.as_script
        self._overdue, self._lock = 0.0, threading.RLock()

    def __enter__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._main = threading.current_thread() is threading.main_thread()  # others, of a program, hear no signals
        if self._main:
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            numbers = ALWAYS + tuple(n for n in UNLESS_IGNORED if signal.getsignal(n) == signal.SIG_DFL)
            self.before = {number: signal.signal(number, self._handle) for number in numbers}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind=None, error=None, trace=None) -> None:
        self._over = True
        if self._urgent and (peers := distributed.peers()):
            peers.tell(TEMPFAIL, self.reason)
        if self.name is None or not self._script:  # a script that is told twice still has one end
            if self._main:
                signal.set_wakeup_fd(self._wakeup)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            os.write(self._write, b"\0")  # wakes the thread
            self._thread.join()
            os.close(self._read)
            os.close(self._write)
        if self._urgent and isinstance(error, RankStopped):  # the rank that was told is gone already
            raise Preempted(self.farewell) from error

    def defer(self) -> None:
        """From now on a signal waits for the next `check`."""
        self.waiting = True

    def at_once(self) -> None:
        """From now on a signal ends the process at once."""
        self.waiting = False

    @property
    def reason(self) -> str:
        return f"stopped by {self.name or 'a signal to another rank'}"

    @property
    def farewell(self) -> str:
        return f"{self.reason}{self.advice()}"

    def check(self) -> None:
        """Raises Preempted on all ranks where one was told to stop. All ranks must call it."""
        if distributed.ask(self.name is not None)():
            raise Preempted(self.farewell)

    def _handle(self, number: int, frame) -> None:
        """Python's signal handler: runs in the main thread as soon as that runs Python code."""
        self._read_signals()
        if self.name is None:  # a library has read the signals
            self._note(signal.Signals(number).name, 0)
        self._handled += 1
        if self._handled > 1 and not self._script:
            raise KeyboardInterrupt
        if self._urgent and not self._raised:
            self._raised = True
            raise Preempted(self.farewell)

    def _read_signals(self) -> None:
        """Notes the signals that have come, in whichever thread is first."""
        with self._lock:
            try:
                numbers = os.read(self._read, 64)
            except BlockingIOError:
                return
            for number in filter(None, numbers):
                if number in self.before:
                    self._note(signal.Signals(number).name, 128 + number)

    def _note(self, name: str, code: int) -> None:
        if self.name is None:
            self.name, self.since, self._urgent = name, time.monotonic(), not self.waiting
            release_closed()
            if self.waiting:  # A print may be under way. In a run's last save nothing remains to be stopped.
                _write(f"{name}: ends as soon as what is done is saved")
        elif self._script and time.monotonic() - self.since > GRACE:
            os._exit(code)

    def _watch(self) -> None:
        """The thread: reads signals at once, and looks twice a second whether the launcher and the other ranks live."""
        wake, parents, then = select.poll(), launchers(), time.monotonic()
        wake.register(self._read, select.POLLIN)
        while not self._over:
            wake.poll(500)
            self._read_signals()
            if not self.name and gone(parents):
                self._tell_main("the launcher's end")
            now = time.monotonic()
            self._end_what_waits(now - then)
            then = now

    def _tell_main(self, name: str) -> None:
        with self._lock:
            if self.name is None:
                self._note(name, 0)
        os.kill(os.getpid(), signal.SIGTERM)  # within GRACE: not a second one

    def _end_what_waits(self, seconds: float) -> None:
        """Ends the process where it waits for what will not come; `seconds` since the last call."""
        peers = distributed.peers()
        silent = peers.listen(seconds) if peers else 0.0
        if self._urgent:
            self._overdue += seconds
            if self._overdue > REACT and not self._over:
                self._end(TEMPFAIL, self.farewell if os.environ.get("LOCAL_RANK", "0") == "0" else "")
        if not peers or distributed.works_alone():
            return
        code, why = peers.ended or (None, "")
        if code == TEMPFAIL:  # another rank was told to stop, and so is this one
            if not self.name:
                self._tell_main("a signal to another rank")
        elif peers.ended:
            self._give_up(peers, code, why)
        elif peers.closed and silent > waits.SOON:
            self._give_up(peers, 1, "rank 0 has ended; its output says why")
        elif silent > (waits.SOON if self.name else waits.SILENCE):
            self._give_up(peers, 1, f"rank {peers.asked} has not been heard of for {silent:.0f} s; it is stopped, or "
                          "its machine or network is gone")

    def _give_up(self, peers, told: int, why: str) -> None:
        """Ends the process, since other ranks do not come any more. They are told this exit code, and why."""
        text = f"{self.reason}; {why}" if self.name else f"error: rank {peers.rank} stops because {why}"
        if peers.closed and not self.name:  # a process that has ended would do so again
            self._end(1, text, told, why)
        else:
            self._end(TEMPFAIL, f"{text}; the same command goes on from what is saved", told, why)

    def _end(self, code: int, text: str, told: int = TEMPFAIL, why: str = "") -> None:
        if not self._script:
            return
        if peers := distributed.peers():
            peers.tell(told, why or self.reason)
        if text:
            _write(text)
        os._exit(code)


def _write(text: str) -> None:
    """A line on stderr, below a progress bar that may stand there. A full disk must not keep a run from its end."""
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) * os.isatty(2)}{text}\n".encode())


def release_closed() -> None:
    """Redirects output to /dev/null where the terminal or pipe has closed: a print that fails must not keep a run from
    being saved."""
    for number in (1, 2):
        poll = select.poll()
        poll.register(number, 0)
        if any(what & (select.POLLERR | select.POLLHUP) for _, what in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def launchers() -> list[tuple[int, int]]:
    """(process, its parent) for this process and those above it, up to the launcher; empty without a launcher.

    torchrun is the parent of its ranks. Under deepspeed the parent is launch.py, whose parent is the command deepspeed.
    Any other parent, such as the shell that started one process with nohup, may end before the run.
    """
    if not {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys():
        return []
    parent = os.getppid()
    above = _parent(parent) if "deepspeed.launcher.launch" in _command(parent) else None
    return [(os.getpid(), parent)] + ([(parent, above)] if above and "deepspeed" in _command(above) else [])


def gone(parents: list[tuple[int, int]]) -> bool:
    """Whether one of these processes has lost its parent."""
    return any(_parent(process) != parent for process, parent in parents)


def _command(process: int) -> str:
    try:
        return " ".join(psutil.Process(process).cmdline())
    except psutil.Error:  # it has ended
        return ""


def _parent(process: int) -> int | None:
    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return None
