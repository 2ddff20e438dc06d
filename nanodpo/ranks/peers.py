"""Watches whether the other ranks still live.

A rank that is stopped, or whose network is cut, looks to the others like a busy one: they would wait for it in a
collective for hours. So every rank increases a number of its own once a second, in a store that rank 0 holds, and reads
the next rank's number. A rank that computes, loads or saves goes on counting, however long that takes.
"""

import json
import threading
import time

from .waits import BEAT

# Words of gloo's, NCCL's and PyTorch's store's errors where another rank has ended, and where the network has failed.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
        "NCCL communicator was aborted", "Connection was likely closed", "Connection refused")
CUT = ("No route to host", "Network is unreachable", "Host is unreachable", "Connection timed out", "Timed out waiting",
       "Socket Timeout")


class Peers:
    """A thread that counts for this rank and reads the number of the next one. Nobody else may use `store`: where rank
    0 is stopped, a call of it never returns."""

    def __init__(self, store, rank: int, world: int):
        self.store, self.rank, self.next = store, rank, (rank + 1) % world
        self.asked = 0  # the rank whose number, or store, this one waits for
        self.silent = 0.0  # seconds for which it has waited
        self.ended = None  # [exit code, reason] of a rank that could not go on
        self.closed = False  # whether rank 0 has ended, and the store with it
        self.left, self._heard, self._last_words, self._said = False, False, None, threading.Event()
        self._wake = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def listen(self, seconds: float) -> float:
        """The seconds since a rank was heard of for the last time; `seconds` have gone by since the last call."""
        # At most two beats a call: while this process is stopped itself, the others are not silent.
        self.silent = 0.0 if self._heard else self.silent + min(seconds, 2 * BEAT)
        self._heard = False
        return self.silent

    def tell(self, code: int, why: str) -> None:
        """Tells the other ranks that this one can't go on, with an exit code and a reason. Returns when they have had
        time to read it."""
        if self._last_words is None and not self.left:
            self._last_words = json.dumps([code, why])
            self._wake.set()
            if self._said.wait(2 * BEAT):
                time.sleep(2 * BEAT)  # the store ends with rank 0, and connections with any rank

    def leave(self) -> None:
        """Ends the watch: this rank neither counts nor reads any more."""
        self.left = True

    def _beat(self) -> None:
        last = 0
        try:
            while not self.left:
                self.asked = 0
                if self._last_words:
                    self.store.set("end", self._last_words)
                    self._said.set()
                    return
                self.store.add(f"beat {self.rank}", 1)
                number = self.store.add(f"beat {self.next}", 0)
                if self.store.check(["end"]):
                    self.ended = json.loads(self.store.get("end"))
                self.asked = self.next
                self._heard, last = self._heard or number != last, number
                self._wake.wait(BEAT)
        except RuntimeError as error:  # mostly a collective that waits for rank 0 raises an error, too, and at once
            self.closed = not any(sign in str(error) for sign in CUT)
