"""The ranks of a run meet when they start, in PyTorch's store at the place that the launcher names.

Where the network is cut, or another program holds that place, this store waits for an answer without end. So a thread
asks it, and no answer is waited for longer than SILENCE.
"""

import ipaddress
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import torch.distributed as dist

from ..errors import RankStopped, RunStopped, UserError, first_line
from . import waits
from .peers import Peers


def meet_at(host: str, port: int, rank: int, world: int, hosting: bool, start: str):
    """Waits for all ranks; returns (a store that all share, the watch over the others). Gloo then takes the network on
    which they met.

    `hosting`: whether this rank starts the store at host:port, where the others find it; `start` tells this start of
    the ranks from earlier ones in the same store. Raises RunStopped where a rank can't be reached or does not come, and
    UserError for two with the same number.
    """
    thread = ThreadPoolExecutor(1)

    def ask(call, *args):
        return thread.submit(call, *args).result(waits.SILENCE)

    def open_store(port, hosting, shared=False):
        return dist.TCPStore(host, port, None, hosting, timedelta(seconds=waits.JOIN), False, multi_tenant=shared)

    try:
        own, other = _reach(host, port, rank, hosting)
        store = dist.PrefixStore(start, ask(open_store, port, hosting, True))
        met = _come_together(ask, store, rank, world, other)
        beats = ask(open_store, 0 if rank == 0 else int(ask(store.get, "beats")), rank == 0)
        if rank == 0:
            ask(store.set, "beats", str(beats.port))
    except TimeoutError as error:
        raise RankStopped(f"rank {rank} gets no answer from the others at {host}:{port}, for {waits.SILENCE:.0f} s; "
                          "the network is cut, a firewall lets only this port through, or it is another program's"
                          ) from error
    except dist.DistError as error:
        raise RankStopped(f"rank {rank} can't join the others at {host}:{port} ({first_line(error)[:200]})") from error
    finally:
        thread.shutdown(wait=False)
    store.set_timeout(waits.PATIENCE)
    if device := _device([own, *met]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", device)
    return store, Peers(beats, rank, world)


def _reach(host: str, port: int, rank: int, hosting: bool) -> tuple[str, str]:
    """Waits until the name is known and somebody listens there; PyTorch's store would print a stack for every try.
    Returns the addresses of this machine and of that one, as they see each other; empty for the one that is hosting."""
    end = time.monotonic() + waits.JOIN
    for pause in _pauses(0.2):
        left = end - time.monotonic()
        try:
            if hosting:
                socket.getaddrinfo(host, port)
                return "", ""
            with socket.create_connection((host, port), max(left, 1.0)) as found:
                return found.getsockname()[0], found.getpeername()[0]
        except (OSError, UnicodeError) as error:
            if left <= 0:
                raise RankStopped(f"rank {rank} can't join the others at {host}:{port} within {waits.JOIN:.0f} s "
                                  f"({getattr(error, 'strerror', None) or error}); MASTER_ADDR must be the machine of "
                                  "rank 0, by a name that is known here, and no firewall may stand between them"
                                  ) from error
        time.sleep(pause)


def _come_together(ask, store, rank: int, world: int, other: str) -> list[str]:
    """Waits for all ranks. Returns the addresses, `other`, at which each of them has found the first one. Raises
    RunStopped where some have not come, and UserError for two with the same number."""
    if ask(store.add, f"came {rank}", 1) > 1:
        raise UserError(f"two processes were started with RANK {rank}, or MASTER_PORT is that of another run")
    ask(store.set, f"here {rank}", other)
    names, end, pauses = [f"here {i}" for i in range(world)], time.monotonic() + waits.JOIN, _pauses(0.1)
    while not ask(store.check, names):
        if time.monotonic() > end:
            missing = [str(i) for i, name in enumerate(names) if not ask(store.check, [name])]
            raise RunStopped(f"of {world} ranks {', '.join(missing[:8])} did not come within {waits.JOIN:.0f} s; their "
                             "output says why")
        time.sleep(next(pauses))
    return [ask(store.get, name).decode() for name in names]


def _pauses(most: float):
    """Seconds to wait after each try: mostly the others start within a moment, and may come much later."""
    pause = 0.01
    while True:
        yield pause
        pause = min(2 * pause, most)


def _device(addresses: list[str]) -> str | None:
    """The network device of this machine with the first of these addresses that it has, and that other machines can
    reach. Gloo by itself takes the device of the machine's own name, which on many is the loopback."""
    devices = {address.address: name for name, found in psutil.net_if_addrs().items() for address in found}
    return next((devices[address] for address in addresses
                 if address in devices and not ipaddress.ip_address(address).is_loopback), None)
