"""Finds out whether the other ranks still live.

A rank that is stopped, or whose network is cut, looks to the others like one that has much to do: they would wait for
it in a collective for hours. So every rank counts up a number of its own once a second, in a store that rank 0 holds,
and listens to the next rank's. A rank that computes, loads or saves goes on counting, however long that takes.
"""

import json
import threading
import time

BEAT = 1.0  # seconds


class Peers:
    """A thread that counts for this rank and listens to the next one. `store` must be nobody else's: where rank 0 is
    stopped a call never returns."""

    def __init__(self, store, rank: int, world: int):
        self.store, self.rank, self.next = store, rank, (rank + 1) % world
        self.asked = 0  # the rank that owes an answer
        self.silent = 0.0  # seconds without a word from it
        self.ended = None  # [exit code, why] of a rank that could not go on
        self.left, self._heard, self._last_words, self._said = False, False, None, threading.Event()
        self._wake = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def listen(self, seconds: float) -> float:
        """Seconds that this process was awake and did not hear of a rank, `seconds` after the last call."""
        # Where this process was stopped itself, it is not the others who were silent.
        self.silent = 0.0 if self._heard else self.silent + min(seconds, 2 * BEAT)
        self._heard = False
        return self.silent

    def tell(self, code: int, why: str) -> None:
        """Lets the other ranks know that this one can't go on; returns when they had the time to hear it."""
        if self._last_words is None and not self.left:
            self._last_words = json.dumps([code, why])
            self._wake.set()
            if self._said.wait(2 * BEAT):
                time.sleep(2 * BEAT)  # the store ends with rank 0, and connections with any rank

    def leave(self) -> None:
        """From now on nobody waits for anybody."""
        self.left = True

    def _beat(self) -> None:
        known = 0
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
                self._heard, known = self._heard or number != known, number
                self._wake.wait(BEAT)
        except RuntimeError:  # rank 0 has ended: what waits for it in a collective hears that there
            return
