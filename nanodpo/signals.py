"""Being told to stop: SIGTERM and SIGINT end a run where it can go on, with the exit code 75.

Slurm sends SIGTERM before it kills (`--signal=TERM@120`), a terminal SIGINT, and launchers hand on what they get, some
of them twice, and not to all ranks at once. So a first signal is only noted, ranks compare notes in every micro-batch,
and one that comes more than GRACE seconds later ends the process at once.
"""

import contextlib
import os
import signal
import time

from .distributed import ask
from .errors import Preempted

GRACE = 5.0  # seconds; Ctrl-C under the deepspeed launcher arrives as SIGINT and, 0.1 s later, as SIGTERM


class Stop:
    """What this process was told. Until `wait` is called, a signal ends it at once: there is nothing to save yet."""

    def __init__(self):
        self.name, self.since, self.waiting, self.before, self.answer = None, 0.0, False, {}, None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._told) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items() if self.name is None else ():  # told twice is still one end
            signal.signal(number, handler)

    def wait(self, waiting: bool = True) -> None:
        """From now on (or no longer) a signal waits for the next `check`."""
        self.waiting = waiting

    @contextlib.contextmanager
    def unheard(self):
        """Within this a signal ends the process as it ends any other: code that waits in C would never hear of it."""
        heard = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
        yield
        for number, handler in heard.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str:
        return f"stopped by {self.name or 'a signal to another rank'}"

    def check(self) -> None:
        """Raises Preempted on all ranks where one was told to stop. All ranks must call it."""
        self.ask()
        self.hear()

    def ask(self) -> None:
        """Begins a check that `hear` ends: ranks that are not at the same place need not wait for each other yet."""
        self.answer = ask(self.name is not None)

    def hear(self) -> None:
        """Raises Preempted where the answer is yes."""
        if self.answer():
            raise Preempted(self.reason)

    def _told(self, number: int, frame) -> None:
        if self.name is None:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
            if not self.waiting:
                raise Preempted(f"{self.reason}; the same command starts again")
            # A print may be under way. In the last save of a run nothing remains to be stopped.
            os.write(2, f"{self.name}: ends as soon as what is done is saved\n".encode())
        elif time.monotonic() - self.since > GRACE:
            os._exit(128 + number)
