"""Ranks that can't meet say why in one line, in a limited time, and PyTorch's stacks of frames stay off the screen."""

import socket
import subprocess
import sys
import threading

import pytest
from conftest import environment

from nanodpo.errors import RankStopped
from nanodpo.ranks import meeting, waits


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(waits, "JOIN", 1.0)
    monkeypatch.setattr(waits, "SILENCE", 0.5)


@pytest.fixture
def taken(capfd):
    """A port at which another program listens, and never answers. A thread that waits for it ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPool"):
            thread.join(20)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_nobody_knows(rank, capfd):
    with pytest.raises(RankStopped, match=f"^rank {rank} can't join the others at no-such-host.invalid:9 within 1 s "):
        meeting.meet_at("no-such-host.invalid", 9, rank, 2, rank == 0, "test")
    assert capfd.readouterr().err == ""


def test_a_place_where_nobody_listens(capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(RankStopped, match=r"Connection refused\); MASTER_ADDR must be the machine of rank 0"):
            meeting.meet_at("127.0.0.1", free.getsockname()[1], 1, 2, False, "test")
    assert capfd.readouterr().err == ""


def test_a_port_that_another_program_holds(taken, capfd):
    """The first rank can't open it; the others get no answer there, and do not wait for one without end."""
    with pytest.raises(RankStopped, match="can't join the others at 127.0.0.1:.* address already in use"):
        meeting.meet_at("127.0.0.1", taken, 0, 2, True, "test")
    with pytest.raises(RankStopped, match="gets no answer from the others at 127.0.0.1:.* another program's"):
        meeting.meet_at("127.0.0.1", taken, 1, 2, False, "test")
    assert "frame #" not in capfd.readouterr().err


def test_gloo_takes_the_network_on_which_ranks_meet(monkeypatch):
    """The device of the first address that is this machine's and no loopback; what the user has named stays."""
    found = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.9.0.1", "eth1": "fe80::1"}
    addresses = {name: [type("Address", (), {"address": address})] for name, address in found.items()}
    monkeypatch.setattr(meeting.psutil, "net_if_addrs", lambda: addresses)
    assert meeting._device(["", "10.9.0.1", "10.0.0.1"]) == "ib0"
    assert meeting._device(["127.0.0.1", "10.0.0.2", "10.0.0.1"]) == "eth0", "its own name means the loopback here"
    assert meeting._device(["127.0.0.1", "", "10.0.0.2"]) is None and meeting._device(["fe80::1"]) == "eth1"


def test_the_port_of_a_process_without_a_launcher_is_its_own():
    """Another program that looks for a free one, at the moment when the process is about to use it, can't get it."""
    program = """
import os, socket, torch, deepspeed
from nanodpo.ranks import distributed
whole = deepspeed.init_distributed
def init_distributed(*args, **kwargs):
    try:
        other = socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    except OSError:
        print("held")
    whole(*args, **kwargs)
deepspeed.init_distributed = init_distributed
distributed.join_ranks(0)
print(distributed.rank_and_world(), distributed.sum_over_ranks(torch.ones(2)).tolist())
distributed.leave()
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True,
                          timeout=60)
    assert done.stdout.endswith("held\n(0, 1) [1.0, 1.0]\n"), done.stderr
