"""How long a rank waits for the others. On several machines a rank whose network is cut looks like a busy one, so every
wait needs a limit."""

import datetime
import time

BEAT = 1.0  # seconds from one sign of life to the next (peers.py)
# Seconds without a sign of life after which a rank, its machine or the network is taken to be gone. Less than a minute,
# and more than a busy machine keeps a thread from running.
SILENCE = 50.0
SOON = 20.0  # the same, once this rank was told to stop: launchers kill after 30
JOIN = 120.0  # seconds from the first rank's start to the last one's: machines load programs at different speeds
PATIENCE = datetime.timedelta(hours=6)  # for a rank that lives, and has longer rows, or saves
SEEN = 70.0  # seconds for which a machine may not see a new file of a folder that is shared: NFS remembers its absence


def seen(condition) -> bool:
    """Waits until condition() is true, which it is of a file in a shared folder once this machine sees it, for SEEN
    seconds at the most; returns whether it is."""
    end = time.monotonic() + SEEN
    while not (there := condition()) and time.monotonic() < end:
        time.sleep(0.5)
    return there
