"""examples/commands.py: what becomes of the commands of an experiment when it is told to stop."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# train.py's stand-in: it says that it runs, and after a signal takes half a second to save.
COMMAND = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
def stop(*_):
    time.sleep(0.5)
    place.with_suffix(".saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
place.touch()
time.sleep(60)
"""
EXPERIMENT = """
import functools, pathlib, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would have ignored
sys.path.insert(0, {examples!r})
import commands
from nanodpo.errors import run_script
from nanodpo.progress import Progress
commands.ROOT = pathlib.Path({folder!r})
args = types.SimpleNamespace(ranks=1, parallel=2)
def main(argv):
    jobs = [functools.partial(commands.run, args, commands.ROOT / k, "train.py", commands.ROOT / k) for k in "abcd"]
    if argv:
        jobs[0]()
    else:
        with Progress("x", 4, "command") as bar:
            commands.run_all(jobs, 2, bar)
with commands.stops_handed_on():
    sys.exit(run_script(main))
"""


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("sent, to_all, code, words", [
    (signal.SIGTERM, False, 75, "stopped by SIGTERM; the same command goes on"),
    (signal.SIGINT, True, 130, "stopped by Ctrl-C")])
def test_commands_save_before_the_experiment_ends(sent, to_all, code, words, alone, tmp_path):
    """Of four commands two run at a time, or one alone. SIGTERM to the script, Ctrl-C to the terminal's group: those
    that run save and end, the others are not begun, and then the script ends."""
    (tmp_path / "train.py").write_text(COMMAND)
    script = tmp_path / "experiment.py"
    script.write_text(EXPERIMENT.format(examples=str(ROOT / "examples"), folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, script, *["alone"] * alone], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    names = "a" if alone else "ab"
    until = time.monotonic() + 60
    while not all((tmp_path / name).exists() for name in names) and time.monotonic() < until:
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(process.pid, sent)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == code and said.splitlines()[-1] == words
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == [f"{name}.saved" for name in names]
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


def test_after_a_failure_no_command_is_begun(tmp_path):
    """One that runs beside it ends by itself."""
    (tmp_path / "train.py").write_text(
        "import pathlib, sys, time\nplace = pathlib.Path(sys.argv[1])\nplace.touch()\n"
        "if place.name == 'a':\n    print('no such thing')\n    sys.exit(2)\n"
        "time.sleep(1.5)\nplace.with_suffix('.saved').touch()\n")
    script = tmp_path / "experiment.py"
    script.write_text(EXPERIMENT.format(examples=str(ROOT / "examples"), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "train.py ended with 2" in done.stderr and "no such thing" in done.stderr
    assert (tmp_path / "b.saved").exists() and not (tmp_path / "c").exists() and not (tmp_path / "d").exists()
