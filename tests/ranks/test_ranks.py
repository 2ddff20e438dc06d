"""Ranks of one run: what they were given must be the same, and one that is gone or told to stop ends all of them."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, environment, forked, make_model, make_tokenizer, zero
from test_resume import flags

from nanodpo import errors
from nanodpo.errors import Preempted, RankStopped, RunStopped, Unreachable, UserError
from nanodpo.folder import record, resume
from nanodpo.folder.fork import owners
from nanodpo.folder.log import read_lines
from nanodpo.ranks import distributed, gpu
from nanodpo.run import agreement, signals

APART = ROOT / "tests" / "apart.py"
SMALL = ("--max_steps", "4", "--eval_size", "0", "--save_steps", "0", "--eval_steps", "0")


@pytest.fixture
def apart(tiny, tmp_path):
    """apart({rank: plan}, flags): exit codes and output of a run on two ranks, see apart.py."""

    def run(plans: dict, *more, ranks: int = 2, script: str = "train"):
        given = flags(tiny, tmp_path / "run", *SMALL) if script == "train" else []
        return forked(APART, script, json.dumps(plans), *given, *more, ranks=ranks)

    return run


def test_differences_are_named():
    """By value and rank, ranks that differ alike together; what one rank lacks is nothing."""
    assert agreement.differences([{"--beta": 0.1, "torch": "2"}] * 3) == []
    found = agreement.differences([{"--beta": 0.1, "torch": "2"}, {"--beta": 0.2, "torch": "2"}, {"--beta": 0.2}])
    assert found == ["ranks 1, 2 have --beta 0.2, rank 0 0.1", "rank 2 has torch nothing, rank 0 2"]
    assert agreement.differences([{"rows": ("ab", "ab (x.csv)")}, {"rows": ("ab", "ab (y.csv)")}]) == [], "by content"


def test_every_kind_of_thing_is_compared(tmp_path):
    """Flags but for those of place; token ids with the file they came from; DeepSpeed's settings one by one; the
    program's own files; the state of the run's folder."""
    names = {"learning_rate": 1, "local_rank": 0, "output_dir": "o", "train_file_path": "f", "save_steps": 3}
    assert agreement.flags(names) == {"--learning_rate": 1, "--save_steps": 3}
    facts = {"data": ["1" * 64], "max_length": 5, "deepspeed": {"zero_optimization": {"stage": 2}}}
    one = agreement.inputs(("a.csv", None), facts, None, None)
    other = {"data": ["2" * 64], "max_length": 5, "deepspeed": {"zero_optimization": {"stage": 3}}}
    assert agreement.differences([one, agreement.inputs(("b.csv", None), other, {"finished": True}, None)]) == [
        "rank 1 has token ids of --train_file_path 22222222 (b.csv), rank 0 11111111 (a.csv)",
        "rank 1 has DeepSpeed's zero_optimization.stage 3, rank 0 2",
        "rank 1 has in --output_dir a finished run, rank 0 new run"]
    (tmp_path / "nanodpo").mkdir()
    (tmp_path / "train.py").write_text("1")
    before = agreement.program(tmp_path / "train.py", 0)
    assert agreement.program(tmp_path / "train.py", 0) == before and before["torch"] == str(torch.__version__)
    (tmp_path / "nanodpo" / "losses.py").write_text("2")
    (found,) = agreement.differences([before, agreement.program(tmp_path / "train.py", 0)])
    assert found.startswith("rank 1 has files of this program that hash to ")


@pytest.mark.parametrize("shown, words", [
    (None, "has 1 CUDA device, from 0$"),
    ("3", r"has 1 CUDA device, from 0 \(CUDA_VISIBLE_DEVICES=3\); let each process see all GPUs of its machine$")])
def test_a_launcher_that_shows_each_process_one_gpu(shown, words, tmp_path, monkeypatch):
    """As srun --gpus-per-task=1 does: the second rank of a machine asks for its second GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown) if shown else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    (tmp_path / "train.py").write_text("1")
    with pytest.raises(UserError, match=f"^LOCAL_RANK is 1, and this process {words}"):
        agreement.program(tmp_path / "train.py", 1)


@pytest.mark.slow
@pytest.mark.parametrize("plan, words", [
    ({"more": ["--learning_rate", "0.1"]}, "rank 1 has --learning_rate 0.1, rank 0 0.001"),
    ({"more": ["--max_steps", "5", "--beta", "0.2"]},
     "rank 1 has --beta 0.2, rank 0 0.1; rank 1 has --max_steps 5, rank 0 4"),
    ({"more": ["--dry_run"]}, "rank 1 has --dry_run True, rank 0 False"),
    ({"more": ["--inspect"]}, "rank 1 has --inspect True, rank 0 False"),
    ({"more": ["--no_such_flag"]}, "rank 1: unknown argument --no_such_flag"),
    ({"more": ["--train_file_path", "no.jsonl"]}, "rank 1: no.jsonl: "),
    ({"more": ["--train_file_path", "{other}"]}, "rank 1 has token ids of --train_file_path "),
    ({"more": ["--deepspeed", "{zero}"]}, "rank 1 has DeepSpeed's zero_optimization.stage 1, rank 0 2"),
    ({"more": ["--model_name", "{model}"]}, "error: rank 1 has weights that hash to "),
    ({"more": ["--model_name", "{config}"]}, "error: rank 1 has a config that hashes to "),
    ({"env": {"NVIDIA_TF32_OVERRIDE": "0"}}, "rank 1 has NVIDIA_TF32_OVERRIDE 0, rank 0 nothing")],
    ids=lambda x: x.get("more", ["env"])[0] + x.get("more", [""])[-1][:2] if isinstance(x, dict) else "")
def test_ranks_that_were_given_other_things_end(plan, words, apart, tiny, tmp_path):
    """All of them, with exit code 2, one line that names the difference, and nothing written."""
    lines = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[1:]))
    make_model(seed=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    shutil.copytree(tiny / "model", tmp_path / "config")  # the same weights
    config = json.loads((tmp_path / "config" / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    places = {"{other}": str(tmp_path / "other.jsonl"), "{zero}": str(zero(tmp_path, 1)),
              "{model}": str(tmp_path / "model"), "{config}": str(tmp_path / "config")}
    plan = plan | {"more": [places.get(x, x) for x in plan.get("more", [])]}
    codes, said = apart({"1": plan})
    assert codes == [2, 2], said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert words in error and "Traceback" not in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "run-cache").exists()


@pytest.mark.slow
def test_a_rank_with_other_weights_ends_the_run_under_zero3(apart, tmp_path):
    """No model of the parts of two is trained."""
    make_model(seed=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    codes, said = apart({"1": {"more": ["--model_name", str(tmp_path / "model")]}}, "--deepspeed", zero(tmp_path, 3))
    assert codes == [2, 2] and "error: rank 1 has weights that hash to " in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_names_may_differ_where_the_content_is_the_same(apart, tiny, tmp_path):
    """Machines may see the data, the cache and the run's folder under other names."""
    (tmp_path / "copy.jsonl").write_bytes((tiny / "train.jsonl").read_bytes())
    (tmp_path / "run").mkdir()
    (tmp_path / "mount").symlink_to(tmp_path / "run")
    more = ["--train_file_path", str(tmp_path / "copy.jsonl"), "--output_dir", str(tmp_path / "mount"),
            "--cache_dir", str(tmp_path / "elsewhere")]
    codes, said = apart({"1": {"more": more}}, "--save_steps", "2")
    assert codes == [0, 0], said
    more[3] = str(tmp_path / "not-the-same")
    codes, said = apart({"1": {"more": more, "set": {"ranks.waits.SEEN": 1}}}, "--output_dir", tmp_path / "again")
    assert codes == [2, 2] and "rank 1 does not see what rank 0 wrote there" in said


@pytest.mark.slow
def test_a_folder_that_another_machine_sees_late_is_shared(apart, tiny, tmp_path):
    """NFS remembers for a minute that a name was not there. Here the second rank's name of the folder is there two
    seconds after rank 0 has written into it."""
    def show():
        while not (tmp_path / "run" / "run.json").exists():
            time.sleep(0.05)
        time.sleep(2)
        (tmp_path / "mount").symlink_to(tmp_path / "run")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    codes, said = apart({"1": {"more": ["--output_dir", str(tmp_path / "mount")]}})
    assert codes == [0, 0], said


@pytest.mark.slow
def test_all_ranks_have_the_day_of_the_first(apart, tiny, tmp_path):
    """A chat template writes it. Between these two time zones it is never the same day."""
    template = make_tokenizer().chat_template.replace("{{ m.content }}", "{{ strftime_now('%d') }} {{ m.content }}")
    (tmp_path / "template").write_text(template)
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "chosen": [{"role": "assistant", "content": "yes"}],
             "rejected": [{"role": "assistant", "content": "no"}]} for i in range(8)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes, said = apart({"0": {"env": {"TZ": "Etc/GMT-14"}}, "1": {"env": {"TZ": "Etc/GMT+12"}}}, "--chat_template",
                        tmp_path / "template", "--train_file_path", tmp_path / "chats.jsonl")
    assert codes == [0, 0], said


@pytest.mark.slow
def test_a_fork_may_have_other_names_on_other_ranks(apart, tmp_path):
    """The run that is forked is known by what it is, in a new fork and in one that goes on; another step of it, or
    another run, is none of the same."""
    keep = "--save_steps", "2", "--keep_states"
    assert apart({}, *keep)[0] == [0, 0]
    (tmp_path / "mount").symlink_to(tmp_path / "run")
    more = (*keep, "--beta", "0.2", "--fork", f"{tmp_path / 'run'}@2", "--output_dir", tmp_path / "fork")
    codes, said = apart({"1": {"more": ["--fork", f"{tmp_path / 'mount'}@0"]}}, *more)
    assert codes == [2, 2] and "rank 1 has in --fork the step 0, rank 0 2" in said, said
    plan = {"1": {"more": ["--fork", f"{tmp_path / 'mount'}@2"]}}
    for words in ("fork: ", "this run is finished"):
        codes, said = apart(plan, *more)
        assert codes == [0, 0] and words in said, said
    codes, said = apart({"1": {"more": ["--fork", f"{tmp_path / 'fork'}@2"]}}, *more)
    assert codes == [2, 2] and "rank 1: --output_dir " in said, said


@pytest.mark.slow
def test_an_own_loss_may_have_another_path_on_another_rank(apart, tmp_path):
    """The file's content and the function's name are compared, in a new run and in one that goes on."""
    text = "def own(chosen, rejected, beta):\n    return -beta * (chosen - rejected)\n"
    for name, more in (("a", ""), ("b", ""), ("c", "\nother = own\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "loss.py").write_text(text + more)
    loss = "--loss", f"{tmp_path}/a/loss.py:own"
    codes, said = apart({"1": {"more": ["--loss", f"{tmp_path}/c/loss.py:other"]}}, *loss)
    assert codes == [2, 2] and f"--loss {tmp_path}/c/loss.py:other, rank 0 {tmp_path}/a/loss.py:own" in said, said
    for words in ("done: ", "this run is finished"):
        codes, said = apart({"1": {"more": ["--loss", f"{tmp_path}/b/loss.py:own"]}}, *loss)
        assert codes == [0, 0] and words in said, said


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(apart):
    codes, said = apart({"0": {"env": {"WORLD_SIZE": "2"}, "set": {"ranks.waits.JOIN": 2}}}, ranks=1)
    assert codes == [1] and "error: of 2 ranks 1 did not come within 2 s" in said and "Traceback" not in said
    codes, said = apart({"0": {"env": {"WORLD_SIZE": "2", "RANK": "1"}, "set": {"ranks.waits.JOIN": 2}}}, ranks=1)
    assert codes == [1] and "rank 1 can't join the others at 127.0.0.1:" in said and "Traceback" not in said


@pytest.mark.slow
def test_waiting_for_ranks_can_be_stopped(apart):
    """In the midst of PyTorch's code, where no handler of Python runs."""
    began = time.monotonic()
    codes, said = apart({"0": {"env": {"WORLD_SIZE": "2"}, "at": {"meet": [["SIGTERM", 1]]}}}, ranks=1)
    assert codes == [75] and "stopped by SIGTERM; the same command starts again" in said
    assert time.monotonic() - began < 30


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_rank_before_the_first_step_ends_all(told, apart):
    """The other one reads its data for a minute, and does not wait for anybody."""
    codes, said = apart({str(told): {"at": {"load": [["SIGTERM", 0]]}}, str(1 - told): {"at": {"load": [60]}}})
    assert codes == [75, 75], said


@pytest.mark.slow
@pytest.mark.parametrize("where, told, words", [
    ("load", [], "error: rank 0 stops because rank 1 has not been heard of for "),
    ("step", [], "error: rank 0 stops because rank 1 has not been heard of for "),
    ("step", [["SIGTERM", 1]], "stopped by SIGTERM; rank 1 has not been heard of for ")])
def test_a_stopped_rank_is_not_waited_for(where, told, words, apart, tmp_path):
    """A process that is stopped keeps its connections: the silence of SILENCE seconds tells, of SOON seconds where this
    rank was told to stop. The same command goes on, so the exit code is 75."""
    beat = {"ranks.peers.BEAT": 0.5}
    limits = beat | ({"ranks.waits.SOON": 2.0} if told else {"ranks.waits.SILENCE": 2.5})
    plans = {"0": {"set": limits, "at": {"step": told}}, "1": {"set": beat, "at": {where: ["stop"]}}}
    codes, said = apart(plans, "--save_steps", "1")
    assert codes == [75, 137] and words in said and "Traceback" not in said
    if where == "step":
        run = tmp_path / "run"
        assert resume.find(run, read_lines(run), owners(record.read(run)))["step"] == 2


@pytest.mark.slow
def test_the_end_of_the_first_rank_ends_one_that_waits_for_nobody(apart):
    """The store ends with the first rank. That is no silence, after which a job would be started again."""
    plan = {"set": {"ranks.waits.SOON": 2.0}, "at": {"load": [60]}}
    codes, said = apart({"0": {"at": {"load": ["exit 1"]}}, "1": plan})
    assert codes == [1, 1] and "error: rank 1 stops because rank 0 has ended; its output says why" in said


@pytest.mark.slow
def test_a_rank_that_takes_long_is_waited_for(apart):
    """It lives, however long it computes: no silence."""
    limits = {"ranks.waits.SILENCE": 2.5, "ranks.waits.SOON": 2.5}
    codes, said = apart({"0": {"set": limits}, "1": {"at": {"step": [4.5]}}})
    assert codes == [0, 0], said


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_within_a_collective(apart):
    told = {"set": {"run.signals.GRACE": 1.0}, "at": {"step": [["SIGTERM", 0.5], ["SIGTERM", 2]]}}
    codes, said = apart({"0": told, "1": {"at": {"step": [4]}}})
    assert codes[0] == 128 + signal.SIGTERM and "SIGTERM: ends as soon as what is done is saved" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_other_signals_that_mean_stop_save_too(name, apart, tmp_path):
    """A closed terminal, and what Slurm's users send."""
    codes, said = apart({"0": {"at": {"step": [[name, 0.1]]}}}, "--max_steps", "2000", ranks=1)
    assert codes == [75] and f"stopped by {name} after " in said and resume.steps_in(tmp_path / "run") != []


def test_signals_that_are_heard():
    """SIGHUP that was ignored at the start (nohup) stays so; SIGQUIT keeps its meaning; all comes back at the end."""
    numbers = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGQUIT, signal.SIGTERM]
    before = [signal.getsignal(n) for n in numbers]
    with signals.Stop() as stop:
        stop.defer()
        assert [signal.getsignal(n) == stop._handle for n in numbers] == [True, True, True, True, False, True]
    assert [signal.getsignal(n) for n in numbers] == before
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals.Stop():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[0])


def test_a_signal_before_the_first_step_raises_at_once():
    """In a process that is no script's own, signals mean afterwards what they meant before."""
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(Preempted, match="stopped by SIGUSR2; the same command starts again"), signals.Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(5)
    assert stop.name == "SIGUSR2" and signal.getsignal(signal.SIGUSR2) == before


def test_a_thread_that_hears_no_signals_can_run_too():
    """Programs run a notebook's cells, or main(), in a thread of their own; Python gives signals to the main one."""
    ends = []

    def run():
        with signals.Stop() as stop:
            ends.append(stop.name)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert ends == [None] and not thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "CROSS_RANK", "RANK"])
def test_ranks_end_with_their_launcher(name, apart, tmp_path):
    """A launcher that is killed with -9 tells its ranks nothing; they save and end. A process that no launcher started
    goes on without its parent."""
    steps = "2000" if name != "RANK" else "40"
    plan = {"env": {name: "0"}, "orphan": str(tmp_path / "run")}
    codes, _ = apart({"0": plan}, "--max_steps", steps, ranks=1)
    assert codes == [137], "the parent"
    record, end = tmp_path / "run" / "run.json", time.monotonic() + 60
    done = (lambda: json.loads(record.read_text()).get("finished")) if name == "RANK" else (lambda: free(record))
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert resume.steps_in(tmp_path / "run") != [] or name == "RANK"


def free(record) -> bool:
    """Whether no process holds this run.json any more."""
    with record.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.slow
def test_scoring_ranks_must_be_given_the_same(apart, tiny, tmp_path):
    given = ["--model_path", tiny / "model", "--dataset_path", tiny / "train.jsonl", "--output_dir", tmp_path / "out"]
    for more, words in ((["--seed", "7"], "rank 1 has --seed 7, rank 0 42"),
                        (["--dataset_path", "no.jsonl"], "rank 1 has --dataset_path ")):
        codes, said = apart({"1": {"more": more}}, *given, script="score")
        assert codes == [2, 2] and f"error: {words}" in said and not (tmp_path / "out").exists(), said


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks", [("SIGINT", 1), ("SIGTERM", 2)])
def test_a_scoring_that_is_told_to_stop(name, ranks, apart, tiny, tmp_path):
    """All ranks end, whichever was told, and the same command goes on from the parts that are done."""
    given = [tiny / "model", tiny / "untied", "--dataset_path", tiny / "train.jsonl", "--output_dir", tmp_path / "out"]
    plan = {str(ranks - 1): {"at": {"part": [[name, 0], 0.2]}}}
    codes, said = apart(plan, *given, script="score", ranks=ranks)
    assert codes == [75] * ranks and "what is done is kept, and the same command goes on from there" in said, said
    codes, said = apart({}, *given, script="score", ranks=ranks)
    assert codes == [0] * ranks and "2 parts, 1 of them done before" in said, said


def test_deepspeed_has_two_processes_above_a_rank(monkeypatch):
    """The command, and launch.py, which goes on without it."""
    chain, names = {os.getpid(): 20, 20: 10, 10: 1}, {20: "python\0-m\0deepspeed.launcher.launch", 10: "bin/deepspeed"}
    monkeypatch.setattr(signals, "_parent", chain.get)
    monkeypatch.setattr(signals, "_command", lambda process: names.get(process, "bash"))
    monkeypatch.setattr(os, "getppid", lambda: chain[os.getpid()])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("CROSS_RANK", raising=False)
    assert signals.launchers() == [], "a shell may go away"
    monkeypatch.setenv("CROSS_RANK", "0")
    above = signals.launchers()
    assert above == [(os.getpid(), 20), (20, 10)] and not signals.gone(above)
    chain[20] = 1
    assert signals.gone(above), "the command was killed"
    names[10] = "bash"
    assert signals.launchers() == [(os.getpid(), 20)], "launch.py was started by hand"


@pytest.mark.parametrize("error", [
    RuntimeError("connect [10.0.0.2]:1: No route to host"), RuntimeError("read [10.0.0.2]:1: Connection timed out"),
    RuntimeError("Network is unreachable"),
    RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"),
    dist.DistNetworkError("failed to recv, got 0 bytes")])
def test_a_cut_network_is_one_line(error, monkeypatch, capsys):
    """And the exit code is 75, since the same command goes on when the network is there again."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(errors, "escape_all_output", lambda: None)

    def main(argv):
        with distributed.lost_peers_reported():
            raise error

    assert errors.run_script(main) == 75
    assert "does not reach another rank" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("error, words", [
    (RuntimeError("[pair.cc:547] Connection closed by peer [10.0.0.2]:1. This is typically caused by ..."),
     "another rank has ended; its output says why .Connection closed by peer.$"),
    (dist.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error"),
     "it can't exchange values with the others")])
def test_what_may_come_again_is_one_line_too(error, words, monkeypatch):
    """A rank that has ended may do so again, for a reason that it has told, and NCCL may fail again: no exit code that
    starts the run again."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RankStopped, match=f"rank 0 stops because {words}") as caught, distributed.lost_peers_reported():
        raise error
    assert not isinstance(caught.value, Unreachable)


@pytest.mark.parametrize("error, words", [
    ("[pair.cc:547] Connection closed by peer [10.0.0.2]:1.", "stops because another rank has ended; its output says"),
    ("recv failed: Connection reset by peer", "stops because another rank has ended; its output says why"),
    ("[tcp.cc:1] no device for 10.0.0.2", "can't connect to the others .* all ports must be open"),
    ("connect [10.0.0.2]:1: Connection refused", "can't connect .* where none of them has ended, all ports must be")])
def test_a_rank_that_ends_while_ranks_join_is_no_fault_of_the_network(error, words, monkeypatch):
    """The other ranks say that it has ended, and that its own output says why. Advice on ports and network devices is
    for ranks that can't connect; where a connection is refused, either may be the cause, and both are named."""
    monkeypatch.setitem(distributed._met, "store", object())
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", mock.Mock(side_effect=RuntimeError(error)))
    with pytest.raises(RankStopped, match=f"^rank 1 {words}"), distributed.lost_peers_reported():
        distributed.join_ranks(0)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_ranks_join(apart):
    """The first one, which holds the place where they meet: the other says that it has ended, not that a port is
    closed."""
    codes, said = apart({"0": {"at": {"join": [2, "kill -9 $PPID"]}}})
    assert codes == [137, 1] and "ports must be open" not in said and "Traceback" not in said, said
    assert "rank 1 stops because another rank has ended" in said or "because rank 0 has ended" in said, said


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), UserError("timed out"),
                                   RunStopped("Connection timed out")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, distributed.lost_peers_reported():
        raise error
    assert caught.value is error


def test_a_terminal_that_is_gone_keeps_nothing_from_being_saved(tmp_path):
    """A write to a terminal that has closed would end a process; after SIGHUP there is none to write to."""
    code = ("import os, signal, sys, time; sys.path.insert(0, sys.argv[1]); from nanodpo.run import signals\n"
            "with signals.Stop() as stop:\n"
            "    stop.defer(); os.write(1, b'ready'); before = time.monotonic()\n"
            "    while stop.name is None and time.monotonic() < before + 20: time.sleep(0.01)\n"
            "    print('x' * 100000, flush=True); open(sys.argv[2], 'w').write(stop.name)")
    main, other = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path / "name"], stdin=other, stdout=other,
                               stderr=other, start_new_session=True, env=environment())
    os.close(other)
    assert os.read(main, 5) == b"ready"
    os.close(main)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0 and (tmp_path / "name").read_text() == "SIGHUP"


def test_an_operation_that_changes_its_bits_is_named(monkeypatch):
    """On a GPU torch raises an error of its own: in a line it says what to do. Another error stays, also of a folder
    that is called deterministic, and so does the process: after a run the next one in it may do as it likes."""
    torch.backends.cuda.enable_cudnn_sdp(True)  # as a new process has it, whatever other tests left
    torch.set_float32_matmul_precision("high")  # as where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is 1
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(False)
    torch_says = "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms'"
    with distributed.process_restored():
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
        gpu.round_alike()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":0:0"  # a user's own
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        with pytest.raises(UserError, match="^CUBLAS_WORKSPACE_CONFIG=:0:0: .* must be :4096:8 or :16:8 before"):
            with gpu.nondeterminism_reported():
                raise RuntimeError("Deterministic behavior was enabled ... set CUBLAS_WORKSPACE_CONFIG=:4096:8 ...")
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        monkeypatch.setenv("NCCL_NVLS_ENABLE", "")  # so that monkeypatch takes away what is set
        monkeypatch.delenv("NCCL_NVLS_ENABLE")
        gpu.round_alike()
        gpu.be_deterministic()
        assert os.environ["NCCL_NVLS_ENABLE"] == "0"  # sums in the switches of NVLink have no fixed order
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RunStopped, match="^deterministic-a: "), gpu.nondeterminism_reported():
            raise RunStopped("deterministic-a: the disk is full")
        with pytest.raises(UserError, match=r"\(put_ does not have .*\); give --deterministic false"):
            with gpu.nondeterminism_reported():
                raise RuntimeError(torch_says)
        with pytest.raises(RuntimeError, match="^shapes differ$"), gpu.nondeterminism_reported():
            raise RuntimeError("shapes differ")
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
