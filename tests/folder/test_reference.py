"""The cache of reference log-probs: what is damaged is computed again, what can't be read or written is named."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch, lines_of, make_tokenizer
from safetensors.torch import load_file, save_file
from test_resume import BREAKS
from tiny_models import tiny as make_family

import train
from nanodpo.core.attention import LOOP
from nanodpo.data.example import Example
from nanodpo.errors import Preempted, RunStopped, UserError
from nanodpo.folder import atomic, data_cache, record, reference
from nanodpo.model import source
from nanodpo.ranks.distributed import device_name

STEPS = [[0, 1], [2, 3], [4, 5]]
TRUTH = torch.arange(12, dtype=torch.float64).view(6, 2) / -7


class Pass:
    """A reference pass over six pairs, two a step; `scored` is what it had to compute."""

    def __init__(self, folder: Path):
        self.folder, self.scored, self.truth = folder, [], TRUTH

    def __call__(self, told_after: int = 99, steps=STEPS, micro_batches_of=lambda pairs: [([i], 1.0) for i in pairs],
                 **fingerprint) -> torch.Tensor:
        self.scored = []

        def score(indices):
            self.scored += indices
            return self.truth[indices]

        def check():
            if len(self.scored) >= told_after:
                raise Preempted("stopped")

        known = {"model_name": "m", "data_path": "d", "weights": "w"} | fingerprint
        return reference.reference_logps(range(6), steps, micro_batches_of, score, known, str(self.folder),
                                         torch.device("cpu"), check)

    @property
    def file(self) -> Path:
        (file,) = self.folder.glob("*.safetensors")
        return file


@pytest.fixture
def run(tmp_path):
    return Pass(tmp_path)


def test_it_is_computed_once_and_goes_on(run, capsys):
    """Told to stop after a step, then left alone, then asked again: every pair is scored once."""
    with pytest.raises(Preempted):
        run(told_after=2)
    assert run.scored == [0, 1] and load_file(run.file)["logps"].isfinite().all(1).tolist() == [True] * 2 + [False] * 4
    assert torch.equal(run(), TRUTH) and run.scored == [2, 3, 4, 5]
    assert torch.equal(run(), TRUTH) and run.scored == []
    assert "0 pairs computed, 6 from the cache" in capsys.readouterr().out
    assert run.file.stat().st_mode & 0o777 == 0o666 & ~umask(), "others may read it, as any file made here"
    assert [file.name for file in run.folder.iterdir()] == [run.file.name]


@pytest.mark.parametrize("seconds, kept", [(0, 4), (2, 4), (3, 0)])
def test_a_pass_that_was_killed_goes_on(seconds, kept, run, monkeypatch):
    """In the third step of three, each of which takes a second: what was kept at the last full `seconds` is there."""
    def killed(pairs):
        clock[0] += 1
        return [([i], 1.0) for i in pairs] if 4 not in pairs else 1 / 0

    clock = [0.0]
    monkeypatch.setattr(reference, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(reference.time, "monotonic", lambda: clock[0])
    with pytest.raises(ZeroDivisionError):
        run(micro_batches_of=killed)
    assert torch.equal(run(), TRUTH) and run.scored == list(range(kept, 6))


def test_what_killed_processes_left_in_the_folder_goes_after_a_day(run):
    """By a process on another machine, perhaps: nobody can tell whether it lives. What is younger may be written to,
    and what has another kind of name is somebody else's."""
    left = [".reference-a.safetensors.17.partial", ".data-b.safetensors.18.partial", ".data-b.safetensors.lock.partial"]
    kept = [".reference-c.safetensors.19.partial", ".report.partial", "reference-d.safetensors"]
    for name in left + kept:
        (run.folder / name).touch()
        if name != kept[0]:
            os.utime(run.folder / name, (0, time.time() - 25 * 3600))
    assert torch.equal(run(), TRUTH)
    (own,) = {file.name for file in run.folder.iterdir()} - {*kept}
    assert own.startswith("reference-") and own.endswith(".safetensors")
    assert all((run.folder / name).exists() for name in kept)


def test_a_fast_pass_is_saved_by_the_minute_and_not_by_the_step(run, monkeypatch):
    """500 steps of a second each: nine files, the last at the end; each exchange between ranks
    is of its own steps' pairs alone."""
    saved, summed, clock = [], [], [0.0]

    def micro_batches_of(pairs):
        clock[0] += 1
        return [(pairs, 1.0)]

    save, add = reference._save, reference.sum_over_ranks
    monkeypatch.setattr(reference.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(reference, "_save", lambda *given: saved.append(clock[0]) or save(*given))
    monkeypatch.setattr(reference, "sum_over_ranks", lambda values: summed.append(len(values)) or add(values))
    steps = [[k % 6] for k in range(500)]
    torch.testing.assert_close(run(10**6, steps, micro_batches_of), TRUTH)
    assert saved == [60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 420.0, 480.0, 500.0]
    saved.clear(), summed.clear()
    run(steps=[[0, 1], [4]], micro_batches_of=micro_batches_of, weights="v")
    assert len(saved) == 1 and summed == [3, 3]


def test_two_runs_whose_processes_have_one_number_may_fill_one_cache(run, monkeypatch):
    """As in two containers, or on two machines: the second writes and names the file while the first writes it."""
    write, others = reference.save_file, [1]

    def meanwhile(tensors, place, about):
        write(tensors, place, about)
        if others and others.pop():
            assert torch.equal(Pass(run.folder)(), TRUTH)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(reference, "save_file", meanwhile)
    assert torch.equal(run(), TRUTH) and list(run.folder.iterdir()) == [run.file]


def test_a_micro_batch_that_only_keeps_ranks_in_step_counts_for_nothing(run):
    """The step's first once more, with weight 0."""
    assert torch.equal(run(micro_batches_of=lambda pairs: [(pairs, 1.0), (pairs[:1], 0.0)]), TRUTH)


def test_a_step_that_is_known_in_part_is_computed(run):
    """Another seed cuts the same data into other steps."""
    run(steps=[[0, 1]])
    known = run(steps=[[1, 2]])
    assert torch.equal(known[:3], TRUTH[:3]) and known[3:].isnan().all()


def test_numbers_that_are_not_finite_are_not_kept(run):
    run.truth = TRUTH.clone()
    run.truth[3, 1] = -torch.inf
    with pytest.raises(RunStopped, match="1 pair has a reference log-prob that is not finite"):
        run()
    assert not list(run.folder.iterdir())


def test_the_hash_of_the_data_sees_every_token_in_its_place():
    """The same tokens, parted otherwise into prompt, chosen and rejected, or into rows."""
    sets = [[([1, 2], [3], [4])], [([1], [2, 3], [4])], [([1, 2], [3, 4], None)], [([1, 2], [3], [5])],
            [([2, 1], [3], [4])], [([1, 2], [3], [4])] * 2, [([1, 2], [3], [4]), ([1, 2], [4], [3])],
            [([1, 2], [4], [3]), ([1, 2], [3], [4])]]
    hashes = [reference.data_hash([Example(i, *row) for i, row in enumerate(rows)]) for rows in sets]
    assert len({*hashes}) == len(sets)
    assert reference.data_hash([Example(5, [1, 2], [3], [4])]) == hashes[0]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("how", [how for how in BREAKS if how not in ("removed", "a folder")])
def test_a_damaged_cache_is_computed_again(how, run, capsys):
    """Every byte counts, those of the numbers too, in which a flipped bit would be another number."""
    run()
    BREAKS[how](run.file)
    assert torch.equal(run(), TRUTH) and run.scored == list(range(6))
    assert f"{run.file} is damaged (" in capsys.readouterr().out
    assert torch.equal(run(), TRUTH) and run.scored == []


def test_a_flipped_bit_anywhere_is_harmless(run):
    """The cache then says nothing, or the truth: where its header's text for people changed."""
    run()
    whole = run.file.read_bytes()
    for position in range(len(whole)):
        run.file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert torch.equal(run(), TRUTH), position


def test_another_data_set_in_its_place(run, capsys):
    run()
    save_file({"logps": torch.zeros(5, 2, dtype=torch.float64)}, run.file, {"fingerprint": json.dumps({})})
    assert torch.equal(run(), TRUTH) and "is damaged (not what was written)" in capsys.readouterr().out
    run(weights="v")
    assert "is of other weights, computing" in capsys.readouterr().out


def test_a_copy_of_another_runs_cache_is_not_taken_for_this_ones(run, capsys):
    """Whole, and of as many pairs: its numbers are those of another model."""
    run(weights="v")
    other = run.file
    run()
    (mine,) = {*run.folder.iterdir()} - {other}
    mine.write_bytes(other.read_bytes())
    assert torch.equal(run(), TRUTH) and run.scored == list(range(6))
    assert f"{mine} is damaged (not what was written)" in capsys.readouterr().out


def test_any_other_fingerprint_is_another_cache(run, capsys):
    """And it is said to be another only where something changed under the same names: a run of other settings has its
    own."""
    run(data="a", zero=0)
    os.utime(run.file, (1, 1))
    for changed, said in (({"data": "b", "zero": 0}, "is of other data, "), ({"data": "b", "zero": 3}, ""),
                          ({"data": "b", "zero": 0, "batches": [42, 4, 8]}, ""),
                          ({"data": "c", "zero": 3, "versions": 1}, "is of other data and versions, "),
                          ({"data": "c", "zero": 0, "bf16": True}, ""),
                          ({"data": "c", "zero": 3, "weights": "v"}, "is of other weights, ")):
        assert torch.equal(run(**changed), TRUTH) and run.scored == list(range(6))
        shown = capsys.readouterr().out
        assert said in shown and ("of other" in shown) == bool(said), (changed, shown)
    assert run(data="a", zero=0).equal(TRUTH) and run.scored == []


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_cache_that_cannot_be_read_is_named(error, run, monkeypatch):
    def refuse(*_):
        raise error

    run()
    file = run.file
    monkeypatch.setattr(reference, "safe_open", refuse)
    with pytest.raises(UserError) as said:
        run()
    assert str(file) in str(said.value) and error.strerror in str(said.value) and run.scored == []
    monkeypatch.undo()
    BREAKS["a folder"](file)
    with pytest.raises(UserError, match="can't be read"):
        run()
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(UserError, match="can't be read .*is a pipe"):
        run()


@pytest.mark.parametrize("read", [
    lambda file: reference._load(file, {}, 6), data_cache._load, lambda file: source._check_files(file.parent)],
    ids=["references", "prepared data", "weights"])
def test_a_file_that_may_not_be_read_is_there(read, another_user):
    """As that of another user with umask 077: for safetensors it is not there, so that a whole pass was made again,
    whose result could not take its place, and a model was to be copied anew."""
    file = Path("some.safetensors")
    save_file({"logps": TRUTH}, file)
    file.chmod(0o600)
    another_user()
    with pytest.raises(UserError, match="some.safetensors: can't be read.*Permission denied"):
        read(file)


def test_a_link_to_nowhere_is_no_cache(run):
    (run.folder / "reference-0.safetensors").symlink_to(run.folder / "gone")
    assert torch.equal(run(), TRUTH)


@pytest.mark.parametrize("name", ["save_file", "finish_file", "flush"])
def test_a_disk_that_fills_keeps_what_was_known(name, run, monkeypatch):
    """One line, the file of before, and nothing half-written beside it."""
    with pytest.raises(Preempted):
        run(told_after=2)
    before = run.file.read_bytes()

    def full(*args):
        if name == "save_file":
            args[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference if name == "save_file" else atomic, name, full)
    with pytest.raises(RunStopped, match="can't be written .*No space left on device"):
        run()
    assert [file.name for file in run.folder.iterdir()] == [run.file.name]
    assert name == "flush" or run.file.read_bytes() == before
    monkeypatch.undo()
    assert torch.equal(run(), TRUTH) and 0 not in run.scored


@pytest.mark.slow
def test_ranks_write_together_whenever_the_first_ones_clock_says_so(tiny, tmp_path):
    """After every step of the pass, in which a rank has one micro-batch of two: the file of one process."""
    found = []
    for name, fault, ranks in (("one", (), 1), ("two", ("often@0",), 2)):
        script = ROOT / ("tests/faulty.py" if fault else "train.py")
        launch(script, *fault, "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--draw",
               "false", "--gradient_accumulation_steps", 4 // ranks, "--output_dir", tmp_path / name, "--cache_dir",
               tmp_path / f"cache-{name}", ranks=ranks, launcher="fork")
        (file,) = (tmp_path / f"cache-{name}").glob("reference-*.safetensors")
        found.append(load_file(file)["logps"])
    assert found[0].isfinite().all() and len(found[0]) == 11 and found[0].equal(found[1])


def test_references_are_kept_under_all_that_rounds_them(tiny, tmp_path, monkeypatch):
    """A run's references are found again where nothing has changed that could change a digit."""
    seen, logps = [], reference.reference_logps
    monkeypatch.setattr(reference, "reference_logps", lambda *given: seen.append(given[4]) or logps(*given))
    train.main(["--model_name", str(tiny / "model"), "--train_file_path", str(tiny / "train.jsonl"), "--max_steps", "1",
                "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"), "--draw", "false"])
    (key,) = seen
    cpu = torch.device("cpu")
    assert {name: key[name] for name in ("layout", "attention", "bf16", "zero", "device", "versions")} == {
        "layout": "packed", "attention": LOOP, "bf16": False, "zero": 2, "device": device_name(cpu),
        "versions": record.versions()}
    assert key["weights"] and key["data"] and key["model_name"] == str(tiny / "model")


def test_the_references_of_an_evaluation_have_a_file_of_their_own_where_micro_batches_round(tiny, tmp_path):
    """It takes the same pairs in another order, two at a time as in training. A file of both would have the numbers of
    whichever pass came last, and a run that goes on would read others than it began with."""
    train.main(["--model_name", str(tiny / "model"), "--train_file_path", str(tiny / "train.jsonl"), "--eval_file_path",
                str(tiny / "train.jsonl"), "--max_steps", "2", "--per_device_train_batch_size", "2", "--bf16",
                "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"), "--draw", "false"])
    files = [*(tmp_path / "cache").glob("reference-*.safetensors")]
    known = [load_file(file)["logps"].isfinite().all(1).sum() for file in files]
    assert sorted(known) == [4, 11]  # two steps of two pairs; all


@pytest.mark.slow
@pytest.mark.parametrize("family, micro_batches", [("llama", False), ("gpt_oss", True), ("qwen3_moe", True)])
def test_a_cache_of_other_micro_batches_is_not_used_where_they_round(family, micro_batches, tiny, tmp_path):
    """A run whose micro-batches have one pair fills the cache, one with six follows. At its start policy and reference
    have the same bits, so all pairs are ties. Padded rows and experts round by what else is in a micro-batch, also on
    a CPU; packed rows of a dense model do not, and share what is there."""
    make_family(family, torch.float32, 0.1, vocab_size=264, pad_token_id=256, eos_token_id=258).save_pretrained(
        tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    for size in (1, 6):
        done = launch(ROOT / "train.py", "--model_name", tmp_path / "base", "--train_file_path", tiny / "train.jsonl",
                      "--per_device_train_batch_size", size, "--gradient_accumulation_steps", 6 // size, "--max_steps",
                      "2", "--output_dir", tmp_path / f"run{size}", "--cache_dir", tmp_path / "cache", "--draw",
                      "false", launcher="fork")
    line = json.loads((tmp_path / "run6" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["rewards/ties"] == 1.0 and line["rewards/margins"] == 0.0
    assert ("0 pairs computed" in done.stdout) != micro_batches


@pytest.mark.parametrize("threads, sizes", [((2, 2), (1, 6)), ((1, 2), (1, 1))], ids=["batches", "threads"])
def test_a_cache_of_other_threads_or_of_micro_batches_that_they_share_is_not_used(threads, sizes, tiny, tmp_path):
    """Threads share a matrix product by its size, and round it by that: two of them gave a pair alone other bits than
    beside five. At its start policy and reference have the same bits, so all pairs are ties."""
    rows = [{"prompt": "2?", "chosen": "four"[: 1 + i % 4], "rejected": "no" + "!" * i} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = torch.get_num_threads()
    try:
        for i, (count, size) in enumerate(zip(threads, sizes)):
            torch.set_num_threads(count)
            train.main(["--model_name", str(tiny / "model"), "--train_file_path", str(tmp_path / "rows.jsonl"),
                        "--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(12 // size),
                        "--eval_size", "0", "--max_steps", "1", "--output_dir", str(tmp_path / f"run{i}"),
                        "--cache_dir", str(tmp_path / "cache"), "--draw", "false"])
    finally:
        torch.set_num_threads(before)
    (line,) = lines_of(tmp_path / "run1")
    assert line["rewards/ties"] == 1.0 and line["rewards/margins"] == 0.0


@pytest.mark.slow
def test_a_run_that_evaluates_its_training_data_goes_on_with_the_references_it_began_with(tiny, tmp_path):
    """Of a model whose padded rows round by their micro-batch, which in an evaluation has five pairs, and two in
    training: a killed run that goes on, and reads them from the cache, has the lines of one that was not."""
    make_family("gpt_oss", torch.float32, 0.1, vocab_size=264, pad_token_id=256, eos_token_id=258).save_pretrained(
        tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    plain, killed = ["train.py"], ["tests/faulty.py", "kill@3:0"]
    for name, script in (("whole", plain), ("killed", killed), ("killed", plain)):
        launch(ROOT / script[0], *script[1:], "--model_name", tmp_path / "base", "--train_file_path",
               tiny / "train.jsonl", "--eval_file_path", tiny / "train.jsonl", "--per_device_eval_batch_size", "5",
               "--per_device_train_batch_size", "2", "--max_steps", "4", "--resume_steps", "1", "--output_dir",
               tmp_path / name, "--cache_dir", tmp_path / f"cache-{name}", "--draw", "false", launcher="fork",
               check=script is plain)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")
