"""Runs that were stopped, however, go on to the bytes of a run that never was; what can't is refused in one line."""

import builtins
import concurrent.futures
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment, forked, launch, lines_of, zero
from safetensors.torch import load_file, save_file

import train
from nanodpo.errors import Preempted, RunStopped, UserError
from nanodpo.figures.runs import read_facts
from nanodpo.flags.arguments import TrainArguments
from nanodpo.folder import card, resume, same_run
from nanodpo.folder import fork as fork_of
from nanodpo.folder import log as run_log
from nanodpo.folder import record as run_record
from nanodpo.folder.atomic import (
    aside,
    check_whole,
    check_writable,
    clear_partials,
    new_file,
    new_folder,
    publish,
    read_manifest,
    remove,
)
from nanodpo.folder.log import read_lines
from nanodpo.folder.state import COUNTERS
from nanodpo.run import lifecycle, signals
from nanodpo.run.start import Run
from nanodpo.scoring.parts import Parts
from nanodpo.scoring.recorded import recorded_settings

TRAIN, FAULTY = ROOT / "train.py", ROOT / "tests" / "faulty.py"
# Saves every two steps, evaluates every three, and has dropout, so that random numbers count.
LONG = ("--learning_rate", "1e-3", "--lora_r", "4", "--max_steps", "6", "--save_steps", "2", "--eval_steps", "3",
        "--eval_size", "3", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2",
        "--lora_dropout", "0.1", "--allow_dropout", "--draw", "false")


def flags(tiny: Path, run: Path, *more):
    return ["--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir", run,
            "--cache_dir", run.parent / f"{run.name}-cache", *LONG, *more]


def content(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint, byte for byte."""
    return {str(f.relative_to(run)): f.read_bytes() for f in run.glob("checkpoint-*/**/*") if f.is_file()}


def assert_same(one: Path, other: Path):
    assert lines_of(one) == lines_of(other)
    a, b = content(one), content(other)
    assert a.keys() == b.keys() and len(a) > 10
    assert [name for name in a if a[name] != b[name]] == []
    assert not list(other.rglob("*.partial")) and not (other / "resume").exists()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """whole(ranks): a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def run(ranks: int = 1) -> Path:
        place = folder / f"ranks{ranks}"
        if not place.exists():
            assert forked(TRAIN, *flags(tiny, place), ranks=ranks)[0] == [0] * ranks
        return place

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage, ranks, more", [
    (0, 1, ()), (1, 2, ("--use_lora", "false", "--lora_dropout", "0")),
    (3, 2, ("--use_lora", "false", "--lora_dropout", "0", "--bf16", "--loss", "sft")), (1, 1, ("--bf16",))],
    ids=["zero0", "zero1-2-full", "zero3-2-full-bf16-sft", "zero1-bf16"])
def test_a_stopped_run_is_an_undisturbed_one(stage, ranks, more, tiny, tmp_path):
    """Killed with -9 in step 3, told to stop in step 4, then left alone; metrics and checkpoints to the
    last bit, no step missing or double. States of both kinds are used: one from a save, one from the signal."""
    more = (*more, "--deepspeed", zero(tiny, stage))
    whole, run = (flags(tiny, tmp_path / name, *more) for name in ("whole", "run"))
    assert forked(TRAIN, *whole, ranks=ranks)[0] == [0] * ranks
    codes, _ = forked(FAULTY, f"kill@3:{ranks - 1}", *run, ranks=ranks)
    assert codes == [1] * (ranks - 1) + [137]
    codes, said = forked(FAULTY, f"term@4:{ranks - 1}", *run, ranks=ranks)
    assert codes == [75] * ranks
    assert "going on at step 2" in said and "stopped by " in said and "after 4 of 6 steps; to go on: the same" in said
    codes, said = forked(TRAIN, *run, ranks=ranks)
    assert codes == [0] * ranks and "going on at step 4" in said
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("fault, step, ranks", [
    ("term-reference@4", 0, 1), ("term-evaluation@3", 3, 1), ("term-evaluation@6", 6, 1), ("term-checkpoint@4", 4, 1),
    ("term-state@4", 4, 1), ("term-state@4:1", 4, 2)])
def test_told_to_stop_whatever_it_is_doing(fault, step, ranks, whole, tiny, tmp_path):
    """SIGTERM in the reference pass, an evaluation, the last one, a checkpoint, a state, and above in a step:
    what is done is kept, exit code 75, and the run that goes on is the undisturbed one to the last bit."""
    run = tmp_path / "run"
    codes, said = forked(FAULTY, fault, *flags(tiny, run), ranks=ranks)
    assert codes == [75] * ranks and "Traceback" not in said
    name = "SIGTERM" if ranks == 1 else "a signal to another rank"
    assert f"stopped by {name} after {step} of 6 steps; to go on: the same command" in said
    if step == 0:
        (cache,) = (tmp_path / "run-cache").glob("*.safetensors")
        assert load_file(cache)["logps"].isfinite().all(1).sum() == 4, "pairs of the two steps that were begun"
    if step == 3:  # references that were removed are computed again, and the steps are still done
        shutil.rmtree(tmp_path / "run-cache")
        codes, said = forked(FAULTY, "term-reference@4", *flags(tiny, run))
        assert codes == [75] and "stopped by SIGTERM after 3 of 6 steps" in said
    # What is kept for backward and what is computed again changes no bit, so a run may go on with another choice.
    more = ["--activation_memory", "0.0002"] if step == 3 else ["--gradient_checkpointing"] if ranks == 2 else []
    codes, said = forked(TRAIN, *flags(tiny, run, *more), ranks=ranks)
    assert codes == [0] * ranks and f"going on at step {step}" in said
    assert_same(whole(ranks), run)


@pytest.mark.slow
def test_told_to_stop_when_every_step_is_done(whole, tiny, tmp_path):
    """In the last checkpoint nothing is left but to save it: the run finishes, and what it answers the signal promised
    no more. Merging is left, and may take long: told before it or in it, the run stops, and goes on with it."""
    run = tmp_path / "run"
    codes, said = forked(FAULTY, "term-checkpoint@6", *flags(tiny, run))
    assert codes == [0] and "SIGTERM: ends as soon as what is done is saved" in said and "done: " in said
    assert "stopped by" not in said
    assert_same(whole(), run)
    for fault in ("term-checkpoint@6", "term-merge@6"):
        codes, said = forked(FAULTY, fault, *flags(tiny, tmp_path / "other", "--merge_weights"))
        assert codes == [75] and "stopped by SIGTERM after 6 of 6 steps; to go on: the same command" in said
        assert "merged: " not in said and not (tmp_path / "other" / "merged").exists()
    codes, said = forked(TRAIN, *flags(tiny, tmp_path / "other", "--merge_weights"))
    assert codes == [0] and "merged: " in said
    merged = (tmp_path / "other" / "merged" / "model.safetensors").read_bytes()
    for _ in range(2):  # a finished run is merged when asked later, once
        codes, said = forked(TRAIN, *flags(tiny, run, "--merge_weights"))
        assert codes == [0] and "this run is finished" in said
        assert (run / "merged" / "model.safetensors").read_bytes() == merged


@pytest.mark.slow
def test_a_damaged_checkpoint_is_made_again_or_named(whole, tiny, tmp_path):
    """The starting point, and the checkpoint of the step that the run goes on from, are written again to the last
    bit; one in between can't be, and is named."""
    run = tmp_path / "run"
    assert forked(FAULTY, "term@4", *flags(tiny, run))[0] == [75]
    flip(run / "checkpoint-0" / "adapter_model.safetensors")
    flip(run / "checkpoint-2" / "adapter_model.safetensors")
    (run / "checkpoint-4" / "tokenizer.json").unlink()
    codes, said = forked(TRAIN, *flags(tiny, run))
    assert codes == [0] and "going on at step 4" in said
    (named,) = [line for line in said.splitlines() if line.startswith("resume: ")]
    assert f"{run / 'checkpoint-2'}: adapter_model.safetensors is not what was written" in named
    different = [name for name, data in content(whole()).items() if content(run)[name] != data]
    assert different == ["checkpoint-2/adapter_model.safetensors"] and lines_of(run) == lines_of(whole())


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["cut", "emptied", "flipped", "removed", "a folder"])
def test_a_checkpoint_is_what_its_manifest_says(name, how, tmp_path):
    """Every file in turn; a folder without a manifest, or with another program's, is taken as it is."""
    place = tmp_path / "checkpoint-2"
    aside(place).mkdir()
    for file, size in (("weights.safetensors", 100), ("tokenizer.json", 50)):
        (aside(place) / file).write_bytes(bytes(range(size)))
    publish(place, {"step": 2})
    check_whole(place)
    BREAKS[how](place / name)
    with pytest.raises(UserError, match=f"checkpoint-2: {name} .*; copy the folder anew, or remove its manifest.json"):
        check_whole(place)
    for text in ('{"files": ["a"]}', "[]", ""):
        (place / "manifest.json").write_text(text)
        check_whole(place)
    (place / "manifest.json").unlink()
    check_whole(place)


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    """Whatever ends the writing; with permissions like any file's, and without a name in the way of another process."""
    file = tmp_path / "a.txt"
    for error in (OSError, ValueError, KeyboardInterrupt):
        with pytest.raises(error), new_file(file) as place:
            place.write_text("half")
            raise error
    assert not list(tmp_path.iterdir())
    file.write_text("old")
    with new_file(file, shared=True) as one, new_file(file, shared=True) as other:
        other.write_text("by another")
        one.touch(0o600)
        one.write_text("new")
        assert file.read_text() == "old" and one.name.endswith(".partial")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
    (plain := tmp_path / "plain").touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_a_folder_is_new_or_not_there(tmp_path):
    """As files are; and one stays away from a folder that is gone."""
    with pytest.raises(ValueError), new_folder(tmp_path / "a", {}) as place:
        (place / "x").write_text("half")
        raise ValueError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "a", {"step": 3}) as place:
        (place / "x").write_text("whole")
    assert read_manifest(tmp_path / "a")["step"] == 3 and list(tmp_path.iterdir()) == [tmp_path / "a"]
    with pytest.raises(RunStopped, match="none/b: can't be written .*No such file"), new_folder(
            tmp_path / "none" / "b", {}):
        pass


def test_what_can_not_be_written_to_is_said_before_the_work(tmp_path):
    """For a cache, a run and a scoring alike: a file or a link to nowhere stands in the way, or there is no such place;
    nothing is made."""
    (tmp_path / "file").touch()
    (link := tmp_path / "link").symlink_to("gone")
    check_writable(tmp_path / "new" / "deep", "--cache_dir")
    there, long = tmp_path / "file", tmp_path / ("x" * 300)
    for place, words in ((there / "x", "file is a file"), (there, "file is a file"), (long, "File name too long"),
                         (link, "link is a link to nowhere"), (link / "x", "link is a link to nowhere"),
                         (Path("/proc/new"), "No such file or directory")):
        with pytest.raises(UserError, match=rf"^--cache_dir: can't be written to \(.*{words}\)$"):
            check_writable(place, "--cache_dir")
    assert {*tmp_path.iterdir()} == {there, link}


@pytest.mark.slow
@pytest.mark.parametrize("named", [0, 1])
def test_killed_in_its_first_moment(named, tiny, tmp_path):
    """Before run.json has its name, or right after: the same command starts, or goes on, and nothing is missing."""
    run, data = tmp_path / "run", tmp_path / "train.jsonl"
    data.write_text((tiny / "train.jsonl").read_text() + '{"prompt": "a", "chosen": "", "rejected": "b"}\n')
    more = ("--train_file_path", data, "--on_bad_row", "drop", "--max_steps", "1")
    assert forked(FAULTY, f"link@{named}", *flags(tiny, run, *more))[0] == [137]
    assert (run / "run.json").is_file() == bool(named) and list(run.glob(".run.json.*.partial"))
    codes, said = forked(TRAIN, *flags(tiny, run, *more))
    assert codes == [0] and ("going on at step 0" in said) == bool(named)
    assert json.loads((run / "dropped_rows.jsonl").read_text())["row"] == 11
    assert not list(run.glob(".*"))


@pytest.mark.slow
def test_a_launcher_changes_nothing(whole, tiny, tmp_path):
    """The same with torchrun: it reports a killed rank, and the same command goes on."""
    began = time.monotonic()
    killed = launch(FAULTY, "kill@3:1", *flags(tiny, tmp_path / "run"), ranks=2, check=False)
    assert killed.returncode == 1 and "rank 0 stops because another rank has ended" in killed.stderr
    assert time.monotonic() - began < 60
    launch(TRAIN, *flags(tiny, tmp_path / "run"), ranks=2)
    assert_same(whole(2), tmp_path / "run")


# In one process: which state counts


OWNERS = ["this run"]
OWN = {"run": OWNERS[0], "tokens": 0, "skipped": 0} | dict.fromkeys(COUNTERS, 0)


def state(place: Path, step: int, ranks: int = 2, value: float = 1.0, **facts):
    """A state of two ranks as resume.save leaves it."""
    folder = resume.folder_of(place, step)
    aside(folder).mkdir(parents=True)
    for rank in range(ranks):
        save_file({f"weight/a/{4 * rank}": torch.full((4,), value)}, aside(folder) / f"rank{rank}.safetensors")
    publish(folder, {"step": step, "tensors": resume.LAYOUT, "world_size": 2, **OWN, "tokens": 7} | facts)


@pytest.fixture
def stopped(tmp_path):
    """A run that was stopped after step 5, with states at 2 and 4."""
    text = "".join(json.dumps({"step": k, "loss": 0.5}) + "\n" for k in range(6))
    text += json.dumps({"step": 4, "eval_loss": 0.5}) + "\n" + json.dumps({"step": 5, "eval_loss": 0.5}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    for step in (0, 2, 4, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state(tmp_path, 2)
    state(tmp_path, 4)
    return tmp_path


def test_a_run_goes_back_to_its_newest_state(stopped):
    """Metrics lose what comes after it, a half-written line too, and so do the checkpoints."""
    facts, evaluated = resume.begin(stopped, 8, None, OWNERS)
    assert (facts["step"], facts["tokens"], evaluated) == (4, 7, {4})
    left = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in left] == [0, 1, 2, 3, 4] and "eval_loss" in left[-1]
    assert sorted(f.name for f in stopped.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-2", "checkpoint-4"]
    assert resume.begin(stopped, 8, 2, OWNERS)[0]["step"] == 2  # a state asked for by name
    assert resume.steps_in(stopped) == [2]


def test_going_back_takes_a_link_and_leaves_what_it_points_to(stopped, tmp_path_factory, capsys):
    """A later checkpoint and a damaged state that lie on another disk; folders with odd names are not the run's."""
    disk = tmp_path_factory.mktemp("disk")
    for name in ("checkpoint-5", "resume/step-4"):
        shutil.move(stopped / name, disk / Path(name).name)
        (stopped / name).symlink_to(disk / Path(name).name)
    (disk / "step-4" / "rank0.safetensors").write_bytes(b"")
    odd = ["checkpoint-007", "checkpoint-\u0669", "checkpoint-5 (copy)", "resume/step-09", "resume/step-\u0669"]
    for name in odd:
        (stopped / name).mkdir()
    assert resume.begin(stopped, 8, None, OWNERS)[0]["step"] == 2
    assert not any(os.path.lexists(stopped / name) for name in ("checkpoint-5", "resume/step-4"))
    assert (disk / "checkpoint-5").is_dir() and (disk / "step-4" / "rank1.safetensors").is_file()
    assert all((stopped / name).is_dir() for name in odd) and not list(stopped.rglob("*.partial"))
    said = capsys.readouterr().out
    assert "checkpoint-5: is a link; it is removed" in said and "step-4: is a link; it is removed" in said


def test_what_a_kill_leaves_of_a_removed_folder_is_nobodys(tmp_path, monkeypatch):
    """At whichever file it dies, no name is left that a run or a scoring would take for a checkpoint; the rest goes
    when the run goes on."""
    def dies(place, **how):
        (place / "a").unlink()
        raise KeyboardInterrupt

    (tmp_path / "checkpoint-2").mkdir()
    for name in "ab":
        (tmp_path / "checkpoint-2" / name).touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", dies)
        remove(tmp_path / "checkpoint-2")
    (left,) = tmp_path.iterdir()
    assert left.name == ".checkpoint-2.old.partial" and [file.name for file in left.iterdir()] == ["b"]
    remove(tmp_path / "checkpoint-2")  # nothing is there
    clear_partials(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint-2", "step-1", "resume"])
def test_killed_while_it_removes(name, whole, tiny, tmp_path):
    """In the midst of rotation, of an old state, and of the states at the end: the same command ends as if nothing had
    been, with the checkpoints that the limit allows, all whole."""
    run, more = tmp_path / "run", ("--save_total_limit", "1", "--resume_steps", "1")
    assert forked(FAULTY, f"removal@{name}", *flags(tiny, run, *more))[0] == [137]
    assert list(run.rglob(f".{name}.*partial")), "killed elsewhere"
    codes, said = forked(TRAIN, *flags(tiny, run, *more))
    assert codes == [0] and "only a run into a new" not in said
    kept = {name: data for name, data in content(whole()).items() if name.startswith(("checkpoint-0", "checkpoint-6"))}
    assert content(run) == kept and lines_of(run) == lines_of(whole()) and not list(run.rglob("*.partial"))


def flip(file: Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


BREAKS = {"cut": lambda f: f.write_bytes(f.read_bytes()[:-3]), "emptied": lambda f: f.write_bytes(b""), "flipped": flip,
          "removed": Path.unlink, "a folder": lambda f: (f.unlink(), f.mkdir())}


@pytest.mark.parametrize("name", ["rank0.safetensors", "rank1.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_state_is_passed_over(name, how, stopped, capsys):
    """Every file in turn; the run goes on from the state before and says so; with both broken it refuses."""
    BREAKS[how](resume.folder_of(stopped, 4) / name)
    assert resume.find(stopped, read_lines(stopped), OWNERS)["step"] == 2
    said = capsys.readouterr().out
    assert "passing over" in said and "step-4" in said
    with pytest.raises(UserError, match="no state to go on from"):
        resume.find(stopped, read_lines(stopped), OWNERS, 4)  # asked for by name, there is no other
    BREAKS[how](resume.folder_of(stopped, 2) / name)
    with pytest.raises(UserError, match="step-4.*step-2"):
        resume.begin(stopped, 8, None, OWNERS)
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 9, "nothing was touched"


def test_a_flipped_bit_anywhere_is_found(stopped):
    """Every byte of a state's files counts: sizes and hashes are of the whole file."""
    folder = resume.folder_of(stopped, 4)
    whole = (folder / "rank0.safetensors").read_bytes()
    for position in range(len(whole)):
        (folder / "rank0.safetensors").write_bytes(
            whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert read_manifest(folder) == "rank0.safetensors is not what was written"
    (folder / "rank0.safetensors").write_bytes(whole)
    assert isinstance(read_manifest(folder), dict)


def test_a_digit_that_changes_in_a_manifest_is_found(stopped, capsys):
    """With another number of steps without an update AdamW would go on as from another step. The entry of a file may go
    where the file was meant to change."""
    manifest = resume.folder_of(stopped, 4) / "manifest.json"
    whole = json.loads(manifest.read_text())
    for name, value in (("skipped", 1), ("tokens", 8), ("run", "that run"), ("more", 1), ("facts_sha256", "0" * 64)):
        manifest.write_text(json.dumps(whole | {name: value}))
        assert read_manifest(manifest.parent) == "manifest.json is damaged"
        assert resume.find(stopped, read_lines(stopped), OWNERS)["step"] == 2
    manifest.write_text(json.dumps(whole | {"files": {}}))
    assert isinstance(read_manifest(manifest.parent), dict)
    del whole["facts_sha256"]  # as an earlier version wrote it
    manifest.write_text(json.dumps(whole))
    assert resume.find(stopped, read_lines(stopped), OWNERS)["step"] == 4


def test_a_state_under_another_name_is_passed_over(stopped, capsys):
    """A folder that somebody renamed: its weights are those of another step."""
    resume.folder_of(stopped, 4).rename(resume.folder_of(stopped, 3))
    assert resume.find(stopped, read_lines(stopped), OWNERS)["step"] == 2
    assert "step-3: misnamed" in capsys.readouterr().out


@pytest.mark.parametrize("steps, wanted, step", [(6, None, 6), (7, None, 4), (6, 2, 2)])
def test_a_run_is_done_with_its_last_line_and_its_last_checkpoint(steps, wanted, step, stopped):
    """Its metrics have six lines. A state that is asked for by name is gone back to all the same."""
    place = stopped / f"checkpoint-{steps}"
    aside(place).mkdir()
    publish(place, {"step": steps})
    facts, _ = resume.begin(stopped, steps, wanted, OWNERS)
    assert (facts["step"], facts.get("complete", False), place.exists()) == (step, step == 6, step == 6)


def test_a_last_line_without_its_end_is_not_whole(tmp_path):
    """A line that is appended later would stand behind it in the same line."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 1.0}')
    resume.go_back(tmp_path, read_lines(tmp_path), 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'


def test_states_that_do_not_fit(stopped, capsys):
    """Fewer ranks' files than ranks have written it, another version's or run's, values that are none, or metrics that
    end before the state."""
    for ranks, facts, words in ((1, {}, "no rank1.safetensors"), (2, {"world_size": None}, "no rank2.safetensors"),
                                (2, {"tensors": None}, "was written by another version of nanodpo"),
                                (2, {"run": "that run"}, "was written by another run"),
                                (2, {"tokens": "7"}, "manifest.json is damaged"),
                                (2, {"global_steps": None}, "manifest.json is damaged")):
        shutil.rmtree(resume.folder_of(stopped, 4))
        state(stopped, 4, ranks=ranks, **facts)
        assert resume.find(stopped, read_lines(stopped), OWNERS)["step"] == 2 and words in capsys.readouterr().out
    for step in (2, 4):
        shutil.rmtree(resume.folder_of(stopped, step))
        state(stopped, step, tensors=None)
    with pytest.raises(UserError, match=r"no state to go on from .step-4, step-2: was written by another version of "
                                        r"nanodpo, .*can go on.; go on with that version, or train again into a new"):
        resume.find(stopped, read_lines(stopped), OWNERS)
    state(stopped, 4)
    text = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(text[:1] + text[2:]))
    with pytest.raises(UserError, match="metrics.jsonl lacks step 1"):
        resume.find(stopped, read_lines(stopped), OWNERS)


def test_lines_that_somebody_changed_stay_and_are_named(tmp_path, capsys):
    """The numbers before a state are part of the run that goes on from it. The evaluation at its step may be made
    again, so it may be another."""
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {k}, "loss": 0.5}}\n' for k in range(3)) + '{"step": 3, "eval_loss": 0.5}\n')
    resume.save(tmp_path, 3, {"weight/a/0": torch.ones(3)}, {"world_size": 1} | OWN, 0)
    whole, words = log.read_text(), f"resume: {log}: lines before step 3 are not as the run wrote them"
    for text, said in ((whole, False), (whole.replace('"eval_loss": 0.5', '"eval_loss": 0.7'), False),
                       (whole.replace('"step": 1, "loss": 0.5', '"step": 1, "loss": 0.4'), True)):
        log.write_text(text)
        assert resume.begin(tmp_path, 8, None, OWNERS)[0]["step"] == 3
        assert (words in capsys.readouterr().out) == said and log.read_text() == text
    log.unlink()
    with pytest.raises(UserError, match="lacks step 0.; put metrics.jsonl back as it was, or train again into a new"):
        resume.begin(tmp_path, 8, None, OWNERS)


@pytest.mark.parametrize("value", ["x", None, [1], {}, True, float("nan"), 10**400])
def test_a_line_that_train_py_can_not_have_written_is_none(value, tmp_path):
    """Its step is missing then, before any state is taken up: of such a value no mean can be taken later."""
    lines = [{"step": k, "loss": 0.5} for k in range(3)]
    for name in ("loss", "step"):
        broken = [*lines[:1], lines[1] | {name: value}, lines[2]]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken))
        assert [line["step"] for _, line in read_lines(tmp_path)] == [0, 2]


@pytest.mark.parametrize("text", ['{"step": 1, "lo', "", "[" * 100_000])
def test_a_line_that_is_no_json_is_none(text, tmp_path):
    """As one of which a machine that went down kept a half."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{text}\n{{"step": 2}}\n')
    assert [line["step"] for _, line in read_lines(tmp_path)] == [0, 2]


@pytest.mark.parametrize("make, words", [(Path.mkdir, "Is a directory"), (os.mkfifo, "is a pipe, not a file")])
def test_a_log_that_is_no_file_is_named(make, words, tmp_path):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=f"metrics.jsonl: can't be read .{words}.*; put the file back as it was"):
        resume.begin(tmp_path, 8, None, OWNERS)


def test_a_log_of_any_length_is_read(tmp_path, monkeypatch):
    """70 MB, as some 60,000 steps leave: at a smaller limit such a run could never end."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0{" " * 70_000_000}}}\n')
    assert [line["step"] for _, line in read_lines(tmp_path)] == [0]
    facts = {"arguments": {"logging_steps": 1, "eval_steps": 0}, "steps": 1}
    assert card.History(tmp_path, facts).until(1)[0]["step"] == 1
    monkeypatch.setattr(run_log, "MAX_BYTES", 60_000_000)  # but for one that no run could have written
    words = "has 70,000,012 bytes, more than the 60,000,000 that such a file can have"
    with pytest.raises(UserError, match=f"can't be read .{words}.; put the file back as it was"):
        read_lines(tmp_path)


def test_a_checkpoint_of_another_run_is_named(stopped, capsys):
    for step, run in ((1, OWNERS[0]), (3, "that run")):
        aside(stopped / f"checkpoint-{step}").mkdir()
        publish(stopped / f"checkpoint-{step}", {"step": step, "run": run})
    resume.begin(stopped, 8, None, OWNERS)
    said = capsys.readouterr().out
    assert f"{stopped}/checkpoint-3: was written by another run" in said and "checkpoint-1" not in said


@pytest.mark.parametrize("step, facts, words", [
    (8, {"step": 8, "run": "that run"}, "was written by another run"),  # it would pass for the end of the run
    (8, {"step": 2, "run": OWNERS[0]}, "is a copy of checkpoint-2, by its manifest.json"),
    (0, {"step": 0, "run": "that run"}, "was written by another run"),
    (5, {"step": 4, "run": OWNERS[0]}, "is a copy of checkpoint-4, by its manifest.json")])
def test_a_checkpoint_that_is_not_this_ones_is_neither_taken_nor_removed(step, facts, words, stopped):
    """Of a step that is made again, or of the last, after which nothing is left to do."""
    lines = "".join(json.dumps({"step": k, "loss": 0.5}) + "\n" for k in range(8 if step == 8 else 6))
    (stopped / "metrics.jsonl").write_text(lines)
    place = stopped / f"checkpoint-{step}"
    shutil.rmtree(place, ignore_errors=True)
    aside(place).mkdir()
    publish(place, facts)
    with pytest.raises(UserError, match=f"checkpoint-{step}: {words}; move it elsewhere, and the same command goes on"):
        resume.begin(stopped, 8, None, OWNERS)
    assert place.exists() and (stopped / "metrics.jsonl").read_text() == lines, "nothing was touched"
    place.rename(stopped / "elsewhere")
    assert resume.begin(stopped, 8, None, OWNERS)[0]["step"] == 4


def test_a_run_of_any_length_goes_on_at_once(tmp_path):
    """A limit that is never reached costs nothing: neither the steps of the run nor those of a state are listed."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 1.0}\n')
    state(tmp_path, 2)
    aside(resume.folder_of(tmp_path, 10**12)).mkdir()
    publish(resume.folder_of(tmp_path, 10**12), {"step": 10**12, "tensors": resume.LAYOUT, "world_size": 0, **OWN})
    tracemalloc.start()
    facts, _ = resume.begin(tmp_path, 10**15, None, OWNERS)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts["step"] == 2 and most < 2**20


def test_a_run_without_a_state_starts_again_only_if_nothing_is_lost(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 0, "eval_loss": 1.0}\n')
    (tmp_path / "checkpoint-0").mkdir()
    assert resume.begin(tmp_path, 8, None, OWNERS) == ({"step": 0}, {0})
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(UserError, match="checkpoint-4 is there"):
        resume.begin(tmp_path, 8, None, OWNERS)


def test_two_states_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        resume.save(tmp_path, step, {"weight.0": torch.ones(3)}, {}, 0)
    assert resume.steps_in(tmp_path) == [10, 3]
    assert torch.equal(load_file(resume.folder_of(tmp_path, 10) / "rank0.safetensors")["weight.0"], torch.ones(3))


def test_a_state_is_read_back_before_it_counts(tmp_path, monkeypatch):
    """Weights that are not finite, a disk that kept other numbers, a folder that rank 0 does not see."""
    with pytest.raises(RunStopped, match="weight.0 is not finite"):
        resume.save(tmp_path, 1, {"weight.0": torch.tensor([1.0, torch.inf])}, {}, 0)
    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="weight.0 .*not as it is in memory"):
        patch.setattr(resume, "save_file", lambda tensors, file: save_file({"weight.0": torch.ones(3)}, file))
        resume.save(tmp_path, 1, {"weight.0": torch.zeros(3)}, {}, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="rank1.safetensors was .* can't be seen"):
        patch.setattr(resume, "gather_or_raise", lambda error, known: [known, known])
        resume.save(tmp_path, 1, {"weight.0": torch.zeros(3)}, {}, 0)
    assert not list((tmp_path / "resume").iterdir())


def test_what_a_rank_takes_from_a_state(tmp_path):
    """The elements that it asks for, from whichever files have them, and random numbers that are its own. A part that
    two ranks have alike counts once; what is not there, whole, is an error that names it."""
    parts = {"a/b.weight": ((0, 3), (3, 10), (13, 2)), "a": ((0, 4), (5, 6)), "b": ((1, 2),)}
    folder = resume.folder_of(tmp_path, 3)
    folder.mkdir(parents=True)
    for rank in (0, 1, 2):
        own = {f"exp_avg/{name}/{its[rank][0]}": torch.arange(float(its[rank][0]), sum(its[rank]))
               for name, its in parts.items() if rank < len(its)}
        twice = {"exp_avg/a/0": torch.arange(4.0)} if rank == 2 else {}
        save_file(own | twice | {"random.cpu": torch.tensor([20.0 + rank])}, folder / f"rank{rank}.safetensors")
    facts = {"step": 3, "files": {f"rank{rank}.safetensors": {} for rank in range(3)}}
    for rank in range(4):  # one more than there were
        read, random = resume.load(tmp_path, facts, rank)
        assert random == ({"random.cpu": torch.tensor([20.0 + rank])} if rank < 3 else {})
    for start, size in ((0, 15), (0, 3), (2, 2), (4, 3), (12, 3), (14, 1)):
        assert read("exp_avg", "a/b.weight", start, size).tolist() == [*range(start, start + size)]
    assert read("exp_avg", "a", 0, 4).tolist() == [0, 1, 2, 3] and read("exp_avg", "a", 6, 2).tolist() == [6, 7]
    for kind, name, start, size in (("exp_avg", "a", 0, 5), ("exp_avg", "a", 4, 2), ("exp_avg", "a", 10, 2),
                                    ("exp_avg", "b", 0, 2), ("exp_avg", "c", 0, 1), ("weight", "a", 0, 1)):
        with pytest.raises(RunStopped, match=f"step-3: has no {kind} of {name}, or not all of it"):
            read(kind, name, start, size)


def test_what_resume_may_name(tmp_path):
    """A run that has states, or needs none; one that was stopped before its first state is no state."""
    def find():
        return run_record.find(str(tmp_path / "run"), None, "new")

    with pytest.raises(UserError, match="run: is no run .run.json is missing"):
        find()
    (tmp_path / "run").mkdir()
    record = {"arguments": {}, "world_size": 1, "steps": 6}
    for names, more in (([], {}), (["resume"], None), (["checkpoint-2"], {}), (["checkpoint-6"], None),
                        ([], {"finished": True})):
        for name in names:
            (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / "run.json").write_text(json.dumps(record | (more or {})))
        if more == {}:
            with pytest.raises(UserError, match="holds no state to go on from"):
                find()
        else:
            assert find() == (tmp_path / "run", record | (more or {}), None)
        for name in names:
            (tmp_path / "run" / name).rmdir()


@pytest.mark.parametrize("where", [{"resume": "auto", "output_dir": "run"}, {"resume": "run", "output_dir": None}])
def test_the_run_of_another_user_is_refused_at_once(where, another_user, tmp_path):
    """It came to a traceback, and only after the model was loaded. The folder may be closed, or run.json alone; a
    finished run may be both: nothing is written there."""
    run, record = tmp_path / "run", {"arguments": {}, "world_size": 1, "steps": 6}
    (run / "resume").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(record))
    another_user()
    with pytest.raises(UserError, match="^--output_dir run: can't be written to .Permission denied.$"):
        run_record.find(**where, name="new")
    os.seteuid(0)
    run.chmod(0o777)
    (run / "run.json").chmod(0o444)
    another_user()
    with pytest.raises(UserError, match="^--output_dir run: its run.json can't be written to .Permission denied.$"):
        run_record.find(**where, name="new")
    os.seteuid(0)
    (run / "run.json").chmod(0o644)
    (run / "run.json").write_text(json.dumps(record | {"finished": True}))
    run.chmod(0o755)
    another_user()
    assert run_record.find(**where, name="new") == (Path("run"), record | {"finished": True}, None)


@pytest.mark.parametrize("changes", [
    {"steps": None}, {"steps": "6"}, {"steps": 6.0}, {"steps": True}, {"steps": 0}, {"steps": [6]}, {"arguments": []},
    {"arguments": None}, {"world_size": "1"}, {"world_size": None}, {"finished": "no"}, {"finished": 1}, None, [], 3])
def test_a_damaged_record(changes, tmp_path):
    """Every entry of run.json that decides how to go on, taken away or of another kind, of a run that is finished."""
    record = {"arguments": {}, "world_size": 1, "steps": 6, "finished": True}
    if isinstance(changes, dict):
        record = {key: value for key, value in (record | changes).items() if value is not None}
    (tmp_path / "run.json").write_text(json.dumps(record if isinstance(changes, dict) else changes))
    for where in ({"resume": "auto", "output_dir": str(tmp_path)}, {"resume": str(tmp_path), "output_dir": None}):
        with pytest.raises(UserError, match="run.json: is not what train.py writes"):
            run_record.find(**where, name="new")


def test_a_record_that_can_not_be_read(another_user, tmp_path):
    """Of another user, or cut off: it is said so, and not that another program wrote it."""
    (tmp_path / "run.json").write_text('{"arguments": {"loss')
    for where in ({"resume": "auto", "output_dir": str(tmp_path)}, {"resume": str(tmp_path), "output_dir": None}):
        with pytest.raises(UserError, match=r"run.json: can't be read as JSON \(Unterminated string"):
            run_record.find(**where, name="new")
    (tmp_path / "run.json").chmod(0)
    another_user()
    for read in (run_record.read, recorded_settings, read_facts):
        with pytest.raises(UserError, match=r"run.json: can't be read \(Permission denied\)$"):
            read(Path())


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_can_not_be_read_is_not_damaged(name, number, tmp_path, monkeypatch):
    """It may be whole, behind a network that is down: a state that was passed over for that would be removed, and its
    part of a scoring made again."""
    place = tmp_path / "checkpoint-2"
    aside(place).mkdir()
    (aside(place) / "weights.safetensors").write_bytes(bytes(100))
    publish(place, {"step": 2})
    real = builtins.open

    def fails(file, *args, **kwargs):
        if str(file).endswith(name):
            raise OSError(number, os.strerror(number), str(file))
        return real(file, *args, **kwargs)

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", fails)
    for read in (read_manifest, check_whole):
        with pytest.raises(UserError, match=f"{name}: can't be read .{os.strerror(number)}.; mend that, or move"):
            read(place)
    if name == "manifest.json":
        with pytest.raises(UserError, match=f"manifest.json: can't be read .{os.strerror(number)}.; mend that"):
            Parts(tmp_path)
    monkeypatch.undo()
    assert read_manifest(place)["step"] == 2 and check_whole(place)


def test_runs_of_one_second_take_folders_of_their_own(tmp_path):
    """Eight at once without --output_dir, and a file that has the name already: nobody gets what another has."""
    name = tmp_path / "runs" / "dpo-2026-01-01-000000"
    assert run_record.find("auto", None, str(name)) == (name, None, None)
    name.parent.mkdir()
    name.write_text("")
    together = threading.Barrier(8)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: (together.wait(), run_record.take(name))[1], range(8)))
    assert sorted(taken) == [name.with_name(f"{name.name}-{k}") for k in range(2, 10)]
    # Whoever reads the clock in that second later finds no run to go on with, whatever its seed.
    (name.with_name(f"{name.name}-2") / "run.json").write_text("{}")
    assert run_record.find("auto", None, str(name)) == (name.with_name(f"{name.name}-10"), None, None)


def test_a_state_that_is_a_link_can_be_named(tmp_path):
    """States that were moved to another disk: the run is where the link is."""
    (tmp_path / "run" / "resume").mkdir(parents=True)
    record = {"arguments": {}, "world_size": 1, "steps": 6}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    (tmp_path / "disk").mkdir()
    for name in ("step-4", "step-04"):
        (tmp_path / "run" / "resume" / name).symlink_to(tmp_path / "disk")
    assert run_record.find(str(tmp_path / "run" / "resume" / "step-4"), None, "new") == (tmp_path / "run", record, 4)
    with pytest.raises(UserError, match="step-04: no such state"):
        run_record.find(str(tmp_path / "run/resume/step-04"), None, "new")


def test_a_run_json_that_nobody_could_read_is_not_written(tmp_path):
    """It would be refused when the run has ended: so it is before the run."""
    record = {"arguments": {}, "world_size": 1, "steps": 3}
    with pytest.raises(UserError, match="run.json: would have 7.,...,... bytes, most of them in data_report"):
        run_record.create(tmp_path / "other", record | {"data_report": ["x" * 70_000_000]})
    assert not (tmp_path / "other").exists()


def test_the_disk_of_a_held_folder_is_nobody_elses_matter(tmp_path, monkeypatch):
    """Whose folder it is comes before what fits in it: of two that go on at once only one looks at the disk."""
    def held(folder):
        raise UserError("is in use by another run")

    monkeypatch.setattr(run_record, "lock", held)
    monkeypatch.setattr(same_run, "check_same", lambda *_: None)
    monkeypatch.setattr(lifecycle.memory, "check_disk", lambda *_: pytest.fail("looked at the disk"))
    monkeypatch.setattr(lifecycle, "prompt_leads", lambda *_: [])
    monkeypatch.setattr(lifecycle, "template_for", lambda *_: None)
    data = SimpleNamespace(examples=[], dropped=[])
    args = TrainArguments("model", train_file_path="data", max_steps=1)
    source = SimpleNamespace(tokenizer=None, base="m")
    run = Run(args, None, {}, source, data, None, tmp_path, {"date": None}, {"arguments": {}}, None,
              device=torch.device("cpu"))
    with pytest.raises(UserError, match="is in use by another run"):
        lifecycle.open_folder(run)


# What is not this run


@pytest.mark.slow
def test_another_run_is_refused_and_a_finished_one_is_left_alone(tiny, tmp_path):
    """A list of what differs, exit code 2, not a byte changed; a path that isn't there is no fresh start."""
    run = tmp_path / "run"

    def files():
        return {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}

    forked(FAULTY, "kill@3", *flags(tiny, run))
    before = files()
    (tmp_path / "other.jsonl").write_text((tiny / "train.jsonl").read_text().replace("What is 3", "What was 3"))
    for ranks, more, words in (
            (1, ["--learning_rate", "2e-3", "--beta", "0.2"], ["rate: 0.001 -> 0.002", "--beta: 0.1 -> 0.2"]),
            (1, ["--resume", "never"], ["is in use; name a new folder"]),
            (1, ["--resume", tmp_path / "nothing"], ["is no run"]),
            (1, ["--resume", run / "resume" / "step-7"], ["no such state"]),
            (1, ["--train_file_path", tmp_path / "other.jsonl"], ["data: ", "other.jsonl"]),
            (3, [], ["2 pairs in 2 micro-batches, which 3 ranks can't share evenly; go on with 1 or 2 ranks"]),
            (2, ["--gradient_accumulation_steps", "4"], ["steps: 2 -> 4, world_size: 1 -> 2"]),
            (1, ["--model_name", tiny / "untied"], ["weights: ", "untied"])):
        codes, said = forked(TRAIN, *flags(tiny, run, *more), ranks=ranks)
        assert codes == [2] * ranks and all(word in said for word in words), (more, said)
        assert "Traceback" not in said
    assert files() == before
    # Where it is read from, and what is printed, changes nothing; nor does a record without flags that came later.
    record = json.loads((run / "run.json").read_text())
    del record["arguments"]["train_on"], record["arguments"]["load_in_4bit"], record["arguments"]["peft_config"]
    (run / "run.json").write_text(json.dumps(record))
    shutil.copytree(tiny / "model", tmp_path / "copy")
    moved = ["--model_name", tmp_path / "copy", "--logging_steps", "3", "--resume", run]
    codes, said = forked(TRAIN, *flags(tiny, run, *moved))
    assert codes == [0] and "going on at step 2" in said
    before = files()
    for more in ([], ["--resume", run]):  # named or not
        codes, said = forked(TRAIN, *flags(tiny, run, *more))
        assert codes == [0] and "this run is finished, all 6 steps" in said and files() == before
    codes, said = forked(TRAIN, *flags(tiny, run, "--resume", run / "resume" / "step-4"))
    assert codes == [2] and "no such state" in said  # what is named must be there


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_told_twice_ends_at_once(ranks, whole, tiny, tmp_path):
    """A second signal in the midst of the state that the first one asked for: the state before it is whole, what is
    half-written never counts, and the same command goes on from there."""
    run = tmp_path / "run"
    codes, said = forked(FAULTY, f"twice@3:{ranks - 1}", *flags(tiny, run), ranks=ranks)
    assert codes == [1] * (ranks - 1) + [128 + signal.SIGTERM] and "to go on" not in said
    assert resume.find(run, read_lines(run), fork_of.owners(run_record.read(run)))["step"] == 2
    assert resume.steps_in(run) == [2]
    codes, said = forked(TRAIN, *flags(tiny, run), ranks=ranks)
    assert codes == [0] * ranks and "going on at step 2" in said
    assert_same(whole(ranks), run)


@pytest.mark.slow
def test_a_folder_that_a_live_run_holds_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    live = subprocess.Popen([sys.executable, FAULTY, "slow@60", *map(str, flags(tiny, run))], text=True,
                            env=environment(), stdout=subprocess.PIPE)
    while "run: " not in (line := live.stdout.readline()):
        assert line
    codes, said = forked(TRAIN, *flags(tiny, run))
    assert codes == [2] and "is in use by another run" in said
    live.kill()
    live.wait()


def test_a_finished_run_is_merged_by_one_process(tmp_path, monkeypatch):
    """A second one would take the half-written model away, or write into it."""
    (tmp_path / "run.json").write_text("{}")
    merged: list = []
    monkeypatch.setattr(train.lifecycle, "merge", lambda *args: merged.append(args))
    args = SimpleNamespace(merge_weights=True, draw=False, bf16=False, trust_remote_code=False, load_in_4bit=False,
                           load_in_8bit=False)
    start = SimpleNamespace(args=args, folder=tmp_path, resumed={"steps": 5})
    with run_record.lock(tmp_path), pytest.raises(UserError, match="is in use by another run"):
        train.complete_finished_run(start)
    assert not merged
    train.complete_finished_run(start)
    assert len(merged) == 1


def test_a_signal_repeated_at_once_is_one(monkeypatch, capfd):
    """A launcher hands on what it got itself as well: SIGINT and SIGTERM within seconds are one. Later ones are not."""
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(signals.errors, "as_script", True)
    with signals.Stop() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "stopped by SIGINT" and ends == []
        stop.since -= signals.GRACE
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends == [128 + signal.SIGTERM]
        with pytest.raises(Preempted, match="stopped by SIGINT"):
            stop.check()
    stop.name = None  # so that the handlers of before come back
    stop.__exit__()
    assert capfd.readouterr().err == "SIGINT: ends as soon as what is done is saved\n"


@pytest.mark.slow
def test_random_kills(tmp_path):
    """A short run of the harness: some kills of two ranks, at random instants and files; no difference."""
    codes, said = forked(ROOT / "bench" / "faults.py", "--kills", "5", "--steps", "5", "--only", "dpo zero3 2",
                         "--kinds", "kill", "file", "--output", tmp_path / "faults.json")
    assert codes == [0], said[-5000:]
    assert len(json.loads((tmp_path / "faults.json").read_text())["kills"]) == 5


def test_ranks_that_look_whether_they_can_write_do_not_take_each_other_for_a_run(tmp_path, monkeypatch):
    """On a file system where every file has a name for a moment, as NFS: another rank may look at the folder just then,
    and still finds it empty."""
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    unlink, seen = os.unlink, []

    def between(path, *rest, **more):
        if not seen:
            seen.extend(os.listdir(tmp_path))
            run_record.claim(tmp_path)
        return unlink(path, *rest, **more)

    monkeypatch.setattr(os, "unlink", between)
    run_record.claim(tmp_path)
    assert len(seen) == 1 and not os.listdir(tmp_path)
    (tmp_path / ".nfs0000001").touch()  # how NFS calls a file that is removed while it is open
    run_record.claim(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is in use; name a new folder"):
        run_record.claim(tmp_path)
