"""Several machines make one run: the numbers of one machine, and an end within a minute where the network is cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, forked, zero
from hosts import Hosts, address
from test_resume import TRAIN, assert_same, flags

from nanodpo.folder.atomic import read_manifest

APART = ROOT / "tests" / "apart.py"
FULL = ("--use_lora", "false", "--lora_dropout", "0")


@pytest.fixture
def hosts():
    """Two machines, see hosts.py."""
    try:
        made = Hosts(f"nanodpo-{os.getpid()}").__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', None) or error}")
    yield made
    made.__exit__()


@pytest.fixture
def on_hosts(hosts):
    """on_hosts(script, flags, at by rank, ranks): exit codes and output of ranks, half of them on each host."""

    def run(script: str, given, at: dict | None = None, ranks: int = 2):
        limits = {"ranks.waits.SILENCE": 2.5, "ranks.waits.JOIN": 3, "ranks.peers.BEAT": 0.5}
        plans = {str(rank): {"host": hosts.names[2 * rank // ranks], "env": {"MASTER_ADDR": address(0)},
                             "at": (at or {}).get(rank, {}), "set": limits if at else {}} for rank in range(ranks)}
        return forked(APART, script, json.dumps(plans), *given, ranks=ranks)

    return run


@pytest.fixture(scope="module")
def one_host(tiny, tmp_path_factory) -> Path:
    """A run of two ranks on one host."""
    place = tmp_path_factory.mktemp("one") / "run"
    assert forked(TRAIN, *flags(tiny, place), ranks=2)[0] == [0, 0]
    return place


@pytest.mark.slow
def test_two_hosts_compute_what_one_does(on_hosts, one_host, tiny, tmp_path):
    """All metrics and weights, to the last bit."""
    codes, said = on_hosts("train", flags(tiny, tmp_path / "two"))
    assert codes == [0, 0], said
    assert_same(one_host, tmp_path / "two")


@pytest.mark.slow
def test_torchrun_on_two_hosts(hosts, tiny, tmp_path):
    """examples/launch/torchrun.sh, started on each, with ZeRO-3: the numbers of one host."""
    given = [*FULL, "--deepspeed", zero(tiny, 3)]
    assert forked(TRAIN, *flags(tiny, tmp_path / "one", *given), ranks=2)[0] == [0, 0]
    told = environment() | {"TORCHRUN": Path(sys.executable).with_name("torchrun"), "PYTHON": sys.executable,
                            "NODES": "2", "PROCESSES": "1", "HEAD": address(0)}
    started = [hosts.start(host, ["bash", "examples/launch/torchrun.sh", *flags(tiny, tmp_path / "two", *given)],
                           cwd=ROOT, env=told | {"NODE": str(host), "ADDRESS": address(host)}) for host in range(2)]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_deepspeed_on_two_hosts(hosts, tiny, tmp_path, stand_in):
    """`deepspeed --hostfile`, with examples/launch/hostfile and ZeRO-2: the numbers of one host. ssh and pdsh, by which
    DeepSpeed reaches the hosts, are stand-ins that enter a network namespace."""
    given = [*FULL, "--deepspeed", zero(tiny, 2)]
    assert forked(TRAIN, *flags(tiny, tmp_path / "one", *given), ranks=2)[0] == [0, 0]
    stand_in("ssh", f'[ "${{@: -1}}" = -I ] && echo {address(0)}; true')
    stand_in("pdsh", f"""[ "$1 $5" = "-S worker-0,worker-1" ] || exit 99
names=({" ".join(hosts.names)}); shift 5; worst=0
for n in 0 1; do command="$*"; ip netns exec ${{names[$n]}} bash -c "${{command//%n/$n}}" & pids[$n]=$!; done
for pid in ${{pids[*]}}; do wait $pid; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst""")
    slots = (ROOT / "examples" / "launch" / "hostfile").read_text().replace("slots=8", "slots=1")
    (tmp_path / "hostfile").write_text(slots)
    done = subprocess.run([Path(sys.executable).with_name("deepspeed"), "--hostfile", tmp_path / "hostfile", TRAIN,
                           *flags(tiny, tmp_path / "two", *given)], capture_output=True, text=True, timeout=300,
                          env=environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_scoring_on_two_hosts(hosts, on_hosts, tiny, tmp_path):
    """Every table, byte for byte, is that of one process, though the network was cut in the second part."""
    given = [tiny / "model", tiny / "untied", "--dataset_path", tiny / "train.jsonl", "--max_tokens", "200"]
    assert forked(ROOT / "score.py", *given, "--output_dir", tmp_path / "one")[0] == [0]
    again = [*given, "--output_dir", tmp_path / "two"]
    codes, said = on_hosts("score", again, {1: {"part": [hosts.cut]}})
    assert codes == [75, 75] and "Traceback" not in said, said
    subprocess.run(hosts.mend, shell=True, check=True)
    codes, said = on_hosts("score", again)
    assert codes == [0, 0] and "2 parts, 1 of them done before" in said, said
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.[pcj]*")}
                for name in ("one", "two"))
    assert one == two and {"scores.parquet", "summary.csv", "verdict.json"} <= one.keys()


@pytest.mark.slow
@pytest.mark.parametrize("rank, place, ranks", [(1, "join", 2), (0, "reference", 4), (0, "save", 2)])
def test_a_cut_network_ends_the_run_on_both_hosts(rank, place, ranks, hosts, on_hosts, tiny, tmp_path):
    """Packets vanish, and nobody is told: while ranks meet in gloo, compute references, or wait for rank 0, which saves
    the first checkpoint. Both say in a line that the other is silent, and exit with 75, so that a job script starts
    them again. What is there is whole."""
    codes, said = on_hosts("train", flags(tiny, tmp_path / "run"), {rank: {place: [hosts.cut]}}, ranks)
    assert codes == [75] * ranks and "Traceback" not in said, said
    first = [0, ranks // 2]  # of each host's ranks; the second host's hear of the others by the first one alone
    for own in range(ranks):
        assert f"error: rank {own} stops because rank {first[own < first[1]]} has not been heard of for " in said
    assert not list(tmp_path.rglob("*.partial"))
    assert isinstance(read_manifest(tmp_path / "run" / "checkpoint-0"), str if place == "join" else dict)


@pytest.mark.slow
def test_a_run_goes_on_when_the_network_is_there_again(hosts, on_hosts, one_host, tiny, tmp_path):
    """It was cut in the third step. The same command goes on from the state of the second, to the same bits."""
    codes, said = on_hosts("train", flags(tiny, tmp_path / "run"), {1: {"step": [hosts.cut]}})
    assert codes == [75, 75] and "the same command goes on from what is saved" in said, said
    subprocess.run(hosts.mend, shell=True, check=True)
    codes, said = on_hosts("train", flags(tiny, tmp_path / "run"))
    assert codes == [0, 0] and "going on at step 2" in said, said
    assert_same(one_host, tmp_path / "run")


@pytest.mark.slow
def test_a_network_that_is_cut_while_ranks_meet(hosts, on_hosts, tiny, tmp_path):
    """The first rank says who has not come; the other one gets no answer, and does not wait for it without end."""
    codes, said = on_hosts("train", flags(tiny, tmp_path / "run"), {1: {"meet": [hosts.cut]}})
    assert codes == [1, 1] and "Traceback" not in said and not (tmp_path / "run").exists(), said
    assert "error: of 2 ranks 1 did not come within 3 s; their output says why" in said
    assert f"error: rank 1 gets no answer from the others at {address(0)}:" in said
