"""Two machines for the tests: network namespaces of this one, joined by a cable that can be cut."""

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path

CABLE, SUBNET = "eth0", "10.77.0"  # the same in every test: each has a network of its own


def address(host: int) -> str:
    return f"{SUBNET}.{host + 1}"


class Hosts:
    """Two hosts, within a `with`: 0 and 1, each with an address of its own. Files are shared, as on a network's disk.
    At the end their processes are killed."""

    def __init__(self, name: str):
        self.names = [f"{name}-{host}" for host in range(2)]

    def __enter__(self):
        """Raises CalledProcessError where this process may make no namespaces."""
        with contextlib.ExitStack() as undone:  # unless all of it works
            undone.callback(self.__exit__)
            for name in self.names:
                self.ip("netns", "add", name)
            one, other = self.names
            self.ip("link", "add", CABLE, "netns", one, "type", "veth", "peer", "name", CABLE, "netns", other)
            for host, name in enumerate(self.names):
                self.ip("-n", name, "addr", "add", f"{address(host)}/24", "dev", CABLE)
                for device in ("lo", CABLE):
                    self.ip("-n", name, "link", "set", device, "up")
            undone.pop_all()
        return self

    def __exit__(self, *error) -> None:
        for name in filter(lambda name: Path("/run/netns", name).exists(), self.names):
            self.signal(name, "KILL")
            subprocess.run(["ip", "netns", "del", name], check=False)

    @staticmethod
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def signal(self, name: str, signal: str) -> None:
        """Sends a signal to all processes of a host."""
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout.split()
        subprocess.run(["kill", f"-{signal}", *pids], check=False, stderr=subprocess.DEVNULL) if pids else None

    @property
    def cut(self) -> str:
        """The shell's command that cuts the cable: from now on packets vanish, and nobody is told."""
        return "; ".join(f"ip -n {name} neigh replace {address(1 - host)} lladdr 02:00:00:00:00:99 dev {CABLE} nud "
                         "permanent" for host, name in enumerate(self.names))

    @property
    def mend(self) -> str:
        return "; ".join(f"ip -n {name} neigh del {address(1 - host)} dev {CABLE}"
                         for host, name in enumerate(self.names))

    def start(self, host: int, command: list, **how) -> subprocess.Popen:
        """A process on a host, its output as text in one."""
        return subprocess.Popen(["ip", "netns", "exec", self.names[host], *map(str, command)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)


def enter(name: str) -> None:
    """Moves this thread, and those that it starts from now on, to a host."""
    host = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(host, 0):
        raise OSError(ctypes.get_errno(), f"can't enter {name}")
    os.close(host)
