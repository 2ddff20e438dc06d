"""Numbers, ranks, memory and disks that go wrong: all ranks end soon, one line says why, nothing written is lost."""

import io
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import forked, launch, lines_of, make_model, make_tokenizer, zero
from faulty import small_files
from test_resume import FAULTY, TRAIN, assert_same, flags, whole  # noqa: F401 (a fixture)
from transformers.utils.logging import disable_progress_bar

from nanodpo.data.schedule import epoch_order
from nanodpo.errors import RunStopped, UserError, run_script
from nanodpo.folder import checkpoint, record, resume, state
from nanodpo.folder.atomic import read_manifest
from nanodpo.folder.fork import owners
from nanodpo.folder.log import read_lines
from nanodpo.run import memory, passes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault, stage, ranks, words", [
    ("loss", 0, 1, ["loss not finite", "in loss"]), ("loss", 2, 2, ["loss not finite", "in loss"]),
    ("gradient", 0, 2, ["gradient is not finite"]), ("gradient", 2, 2, ["gradient is not finite"]),
    ("gradient", 3, 2, ["gradient is not finite"]), ("weight", 3, 2, ["logps/chosen", "in chosen, loss, rejected"])])
def test_what_is_not_finite_stops_all_ranks_before_the_update(fault, stage, ranks, words, tiny, tmp_path):
    """Wrong on one rank only; step, rows, lengths and side are named in one line; no line of metrics."""
    more = ("--deepspeed", zero(tiny, stage), "--resume_steps", "1")
    codes, said = forked(FAULTY, f"{fault}@3:{ranks - 1}", *flags(tiny, tmp_path / "run", *more), ranks=ranks)
    assert codes == [1] * ranks and "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: step 3: ") and "no update was made" in error and all(w in error for w in words)
    assert "row " in error and " tokens)" in error
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line] == [0, 1, 2]


@pytest.mark.parametrize("stage, fault", [(0, "loss"), (2, "loss"), (3, "gradient")])
def test_a_step_that_is_not_finite_can_be_left_out(stage, fault, tiny, tmp_path):
    """Counted in the metrics, which stay JSON; weights and moments do not move in it, so the next step's loss is
    the one of a run whose learning rate was 0 there: a fresh LoRA that skipped step 0 is still its reference."""
    run = tmp_path / "run"
    more = ("--deepspeed", zero(tiny, stage), "--skip_nonfinite", "1", "--lora_dropout", "0", "--max_steps", "3")
    codes, said = forked(FAULTY, f"{fault}@0", *flags(tiny, run, *more))
    assert codes == [0], said
    assert "step     0  left out, 1 of 1 allowed" in said
    steps = [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "learning_rate" in line]
    assert [line["skipped_steps"] for line in steps] == [1, 1, 1]
    assert steps[1]["loss"] == pytest.approx(0.6931471805599453, abs=1e-12), "no update was made"
    assert "grad_norm" not in steps[0] and steps[2]["loss"] < steps[1]["loss"]


@pytest.mark.parametrize("fault, code, words", [
    ("raise", 1, "LookupError: a fault for the test"),
    ("memory", 1, "rank 1 ran out of memory in step 2 on row "), ("kill", 137, "")])
def test_a_rank_that_fails_ends_the_others(fault, code, words, tiny, tmp_path):
    """With its own error first; the other one says in a line that it lost it."""
    began = time.monotonic()
    codes, said = forked(FAULTY, f"{fault}@2:1", *flags(tiny, tmp_path / "run"), ranks=2)
    assert codes == [1, code] and time.monotonic() - began < 60
    last = said.splitlines()[-1]
    assert "error: rank 0 stops because another rank has ended" in last
    assert said.find(words) < said.find(last) and words in said
    if fault == "memory":
        assert "--gradient_checkpointing" in said and "tokens)" in said and "Traceback" not in said


@pytest.mark.parametrize("fault, words", [
    ("memory-engine@0", "rank 0 ran out of memory in loading the model; "),
    ("memory-reference@2", "rank 0 ran out of memory in the reference pass on row ")])
def test_memory_that_is_short_before_the_first_step(fault, words, tiny, tmp_path):
    """One line there too, with what would help."""
    codes, said = forked(FAULTY, fault, *flags(tiny, tmp_path / "run"))
    assert codes == [1] and f"error: {words}" in said and "a higher ZeRO stage" in said and "Traceback" not in said


@pytest.mark.parametrize("error, short", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True), (MemoryError(), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("ncclUnhandledCudaError: Call to CUDA function failed. Cuda failure 2 'out of memory'"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False)])
def test_words_for_memory_that_is_short(error, short):
    assert memory.out_of_memory(error) == short


def test_a_launcher_ends_soon_and_shows_why(tiny, tmp_path):
    """Under the deepspeed launcher, from the fault to the end in less than 30 s, with the cause at the end."""
    run = tmp_path / "run"
    process = launch(FAULTY, "memory@2:1", *flags(tiny, run), ranks=2, launcher="deepspeed", check=False)
    seconds = time.time() - (run / "metrics.jsonl").stat().st_mtime
    assert process.returncode == 1 and seconds < 30
    assert "rank 1 ran out of memory" in "".join(process.stderr.splitlines(keepends=True)[-12:])


@pytest.mark.parametrize("fault, error, step", [
    ("disk@4", "No space left on device", 2), ("metrics@3", "No space left on device", 2),
    ("checkpoint@4", "File too large", 4)])
def test_a_disk_that_fills_loses_nothing(fault, error, step, whole, tiny, tmp_path):  # noqa: F811
    """In the midst of a state, a line or a checkpoint; one line, exit code 1, and the same command goes on to the
    bytes of an undisturbed run."""
    codes, said = forked(FAULTY, fault, *flags(tiny, tmp_path / "run"))
    assert codes == [1] and "Traceback" not in said
    assert error in said.splitlines()[-1] and "the same command goes on" in said
    run = tmp_path / "run"
    assert resume.find(run, read_lines(run), owners(record.read(run)))["step"] == step
    assert not list(run.rglob("*.partial"))
    assert isinstance(read_manifest(tmp_path / "run" / "checkpoint-2"), dict)
    assert forked(TRAIN, *flags(tiny, tmp_path / "run"))[0] == [0]
    assert_same(whole(), tmp_path / "run")


@pytest.mark.parametrize("weights", [True, False], ids=["weights first", "tokenizer alone"])
def test_wherever_a_file_is_cut_the_disk_is_named(weights, tmp_path, monkeypatch):
    """Every file of a checkpoint and of a state, at its start, in its midst and one byte before its end: one
    line, what was there before is whole, and nothing half-written is left."""
    model, tokenizer = make_model(), make_tokenizer()
    disable_progress_bar()
    tensors = checkpoint.gather(model, only_trained=False)
    if not weights:  # they are larger, and would be what fails
        tensors = {}
        monkeypatch.setattr(checkpoint, "_write", lambda *args: None)

    def save(step):
        checkpoint.save(model, tokenizer, tensors, tmp_path / f"checkpoint-{step}", {"step": step})
        resume.save(tmp_path, step, {"weight.0": torch.ones(60000)}, {}, 0)

    save(1)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    sizes = sorted({len(data) for data in before.values()})
    for size in sorted({0, *(size // 2 for size in sizes), *(size - 1 for size in sizes)}):
        with pytest.raises(RunStopped, match="-2: can't be written .*File too large"), small_files(size):
            save(2)
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)  # where only the state was too large
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before, size
    save(2)
    assert resume.steps_in(tmp_path) == [2, 1]


def test_a_full_disk_at_the_start_and_at_the_end(tmp_path):
    """run.json is whole or not there, and metrics.jsonl is cut back as a whole or not at all."""
    run = tmp_path / "run"
    with pytest.raises(RunStopped, match="run: can't be written"), small_files(100):
        record.create(run, {"arguments": {}, "world_size": 1, "steps": 20, "long": "x" * 200})
    assert list(run.iterdir()) == []
    record.create(run, {"arguments": {}, "world_size": 1, "steps": 20})
    metrics = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(20))
    (run / "metrics.jsonl").write_text(metrics)
    before = (run / "run.json").read_bytes()
    with small_files(10):
        with pytest.raises(RunStopped, match="metrics.jsonl: can't be written"):
            resume.go_back(run, read_lines(run), 19)
        with pytest.raises(RunStopped, match="run.json: can't be written"):
            record.finish(run)
    assert (run / "metrics.jsonl").read_text() == metrics and (run / "run.json").read_bytes() == before
    assert sorted(file.name for file in run.iterdir()) == ["metrics.jsonl", "run.json"]


def test_a_small_file_system(small_disk):
    """A checkpoint and a state that do not fit leave the ones before whole, and nothing of themselves."""
    (small_disk / "filler").write_bytes(bytes((4096 - 256) * 1024))
    model, tokenizer = make_model(), make_tokenizer()  # 31,000 weights, 125 KB
    tensors = checkpoint.gather(model, only_trained=False)
    checkpoint.save(model, tokenizer, tensors, small_disk / "checkpoint-1", {"step": 1})
    before = {f: f.read_bytes() for f in small_disk.rglob("*") if f.is_file()}
    with pytest.raises(RunStopped, match="checkpoint-2: can't be written.*No space left on device"):
        checkpoint.save(model, tokenizer, tensors, small_disk / "checkpoint-2", {"step": 2})
    with pytest.raises(RunStopped, match="step-2: can't be written.*No space left"):
        resume.save(small_disk, 2, {"weight.0": torch.ones(60000)}, {}, 0)
    assert {f: f.read_bytes() for f in small_disk.rglob("*") if f.is_file()} == before
    with pytest.raises(UserError, match="the run needs 1.0 GiB .checkpoints 1.0 GiB.*are free there"):
        memory.check_disk(small_disk / "run", {"checkpoints": 2**30})


def test_the_disk_a_run_needs():
    """Checkpoints of the adapter, each with the log so far, about a KB a line and 1,000 lines at most, the log itself,
    and the two states that stay and the one being written, or all, counted by hand."""
    model = torch.nn.Linear(10, 10, bias=False)  # 100 weights, 400 bytes
    args = SimpleNamespace(use_lora=True, save_steps=3, save_total_limit=None, resume_steps=0, merge_weights=False,
                           keep_states=False, logging_steps=5)
    for every in range(12):  # counted one by one
        for steps in range(1, 25):
            for other in range(7):
                there = {k for k in range(1, steps) if any(n and k % n == 0 for n in (every, other))}
                assert memory.kept_states(every, other, steps) == len(there)
            assert memory.saves(every, steps) == len({k for k in range(1, steps) if every and k % every == 0} | {steps})
    assert memory.disk_needed(model, args, None, 10) == {
        "checkpoints": 5 * 400 + 4 * 2000, "the log": 10_000, "states to resume from": 3 * 1200}
    assert memory.disk_needed(model, args, None, 30_000)["checkpoints"] == 10_001 * 400 + 10_000 * 1_000_000
    args.save_total_limit, args.merge_weights = 1, True
    assert memory.disk_needed(model, args, None, 10) == {
        "checkpoints": 3 * 400 + 2 * 2000, "the log": 10_000, "states to resume from": 3 * 1200,
        "the merged model": 400}
    args.keep_states, args.resume_steps = True, 2  # before the steps 2, 3, 4, 6, 8 and 9 of 10
    assert memory.disk_needed(model, args, None, 10)["states to resume from"] == 6 * 1200


def test_what_a_run_has_written_it_does_not_need_again(tmp_path, monkeypatch):
    """600 bytes are there, of it and of its checkpoint, and 1,000 are free: 1,600 fit, and one more does not."""
    (tmp_path / "checkpoint-1").mkdir()
    for file, size in ((tmp_path / "run.json", 200), (tmp_path / "checkpoint-1" / "model.safetensors", 400)):
        file.write_bytes(bytes(size))
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    memory.check_disk(tmp_path, {"checkpoints": 1500, "the log": 100})
    with pytest.raises(UserError, match="the run needs"):
        memory.check_disk(tmp_path, {"checkpoints": 1501, "the log": 100})


def test_what_waits_beside_the_activations():
    """By hand: 4 bytes of gradient and 8 of moments for each of 100 trained weights, and a trained head's 30 twice.
    Where a GPU multiplies in bfloat16, 2 for a copy of each weight, but under ZeRO-3."""
    module = torch.nn.Module()
    module.model = torch.nn.Linear(10, 10, bias=False)
    module.head = torch.nn.Linear(3, 10, bias=False).requires_grad_(False)
    module.head.product_dtype = None
    assert memory.bytes_to_come(module, 0) == memory.bytes_to_come(module, 2) == 1200
    module.head.requires_grad_(True)
    assert memory.bytes_to_come(module, 2) == 1200 + 30 * 8
    module.head.product_dtype = torch.bfloat16
    assert memory.bytes_to_come(module, 2) == 1400 + 30 * 8 and memory.bytes_to_come(module, 3) == 1200 + 30 * 8
    assert memory.memory_budget(torch.device("cpu"), 0.5, 1e9) == 2**29  # what was asked for


@pytest.mark.parametrize("others, left", [(0.5, 0.92 * 24 - 8), (10, 24 - 10 - 0.96 - 8)])
def test_memory_that_others_hold_is_not_there_for_activations(others, left, monkeypatch):
    """A GPU of 24 GiB, of which this process has 9 and uses 8, and `others` hold 0.5 or 10."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((24 - 9 - others) * gib, 24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8 * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * gib)
    found = memory.memory_budget(torch.device("cuda"), -1, 2 * gib)
    assert found == pytest.approx((left - 2) * gib - 3 * memory.CHUNK_BYTES)


@pytest.mark.parametrize("stage, per_weight", [(0, 16), (1, 20), (2, 20), (3, 20)])
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_a_dry_run_counts_each_weight_once(stage, per_weight, frozen):
    """By hand: a trained float32 weight takes 4 bytes, its gradient 4 and AdamW's moments 8, 16 in all. ZeRO keeps a
    float32 weight of its own besides, 4 more; without ZeRO AdamW's weights are the model's. A frozen one takes what its
    dtype does, 2 with --bf16."""
    trained = torch.nn.Linear(2**14, 2**14, bias=False, device="meta")
    base = torch.nn.Linear(2**14, 2**14, bias=False, device="meta", dtype=frozen).requires_grad_(False)
    module = torch.nn.Sequential(trained, base)
    shards = [trained.weight] if stage == 0 else [torch.empty(2**28, device="meta")]
    engine = SimpleNamespace(module=module, zero_optimization_stage=lambda: stage)
    line, *_ = memory.estimate(engine, torch.device("cpu"), shards, [0.0], 0.0, {}).splitlines()
    counted = [float(number) for number in re.findall(r"([\d.]+) GiB", line)[1:]]  # the first is the peak
    assert sum(counted) * 2**30 == 2**28 * (per_weight + frozen.itemsize)
    assert ("float32 weights and AdamW's moments" in line) == (stage > 0)
    # A CPU's peak is that of the process: Python with torch loaded takes hundreds of MiB before there is a model.
    assert line.endswith("; the rest are Python with its libraries, and activations")


@pytest.mark.parametrize("accumulates, batches", [(False, 2), (True, 3)])
def test_a_dry_run_has_all_that_a_later_step_has(accumulates, batches):
    """When the last micro-batch goes forward AdamW has its moments, and, where a step has several, the weights have the
    gradient of an earlier one: 12 bytes for each trained number that the first micro-batch of a run does without."""
    weight, there = torch.nn.Parameter(torch.ones(3)), []
    optimizer, boundary = torch.optim.AdamW([weight], lr=0.1), []

    def mean_loss():
        there.append((len(optimizer.state), weight.grad is not None))
        return weight.sum()

    def step():
        assert boundary[-1]
        optimizer.step()
        optimizer.zero_grad()

    engine = SimpleNamespace(set_gradient_accumulation_boundary=boundary.append, step=step,
                             backward=torch.Tensor.backward)
    assert passes.two_steps(engine, mean_loss, accumulates, torch.device("cpu")) > 0
    assert len(there) == batches and there[0] == (0, False) and there[-1] == (1, accumulates)


def test_a_dry_run_writes_nothing(tiny, tmp_path):
    """The longest pair first; memory, time and disk. Nor where the run is finished."""
    codes, said = forked(TRAIN, *flags(tiny, tmp_path / "run", "--dry_run"), ranks=2)
    assert codes == [0, 0], said
    rows = [sum(map(len, row.values())) for row in map(json.loads, (tiny / "train.jsonl").read_text().splitlines())]
    longest = max({*range(11)} - {*epoch_order(11, 42, -1)[:3]}, key=rows.__getitem__)  # a token a letter
    assert f"dry run on row {longest} (" in said and "peak memory by rank: " in said and "disk: checkpoints " in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "run-cache").exists()
    assert forked(TRAIN, *flags(tiny, tmp_path / "done", "--max_steps", "1"))[0] == [0]
    there = sorted((tmp_path / "done").rglob("*"))
    codes, said = forked(TRAIN, *flags(tiny, tmp_path / "done", "--max_steps", "1", "--dry_run", "--draw", "true"))
    assert codes == [0] and "peak memory by rank: " in said and sorted((tmp_path / "done").rglob("*")) == there
    codes, said = forked(FAULTY, "memory@0", *flags(tiny, tmp_path / "run", "--dry_run"))
    assert codes == [1] and "ran out of memory in the dry run on row" in said and "--max_length" in said


def test_a_dry_run_counts_the_reference(tiny, tmp_path):
    """Another model's weights, to the byte, which ranks of stage 3 share, and its pass over the longest pairs, which
    may be short of memory itself; nothing is written. The policy with its adapter off takes no more, and SFT has no
    reference."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=264, hidden_size=1024, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=258))
    size = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "large")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / "model" / name, tmp_path / "large")
    dry = [*flags(tiny, tmp_path / "run", "--dry_run"), "--reference"]
    codes, said = forked(TRAIN, *dry, tmp_path / "large", "--deepspeed", zero(tmp_path, 3), ranks=2)
    assert codes == [0, 0] and f"weights are there as well, {size / 2**20:.1f} MiB shared by all" in said, said
    for more in ([tiny / "model"], [tiny / "model", "--use_lora", "false"]):
        codes, said = forked(TRAIN, *dry, *more)
        assert codes == [0] and ("weights are there as well, 0.1 MiB" in said) == ("false" in more), said
    codes, said = forked(FAULTY, "memory-reference@1", *dry, tmp_path / "large")
    assert codes == [1] and "ran out of memory in the reference's dry run on row" in said, said
    assert not (tmp_path / "run").exists()


def test_state_is_what_the_optimizer_has():
    """The weights of plain AdamW, through a file's tensors and back, bit for bit; random numbers too."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(12)]  # there is a weight.1 and a weight.11
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)

    def step():
        sum((w * torch.randn(w.shape)).sum() for w in weights).backward()
        optimizer.step()
        optimizer.zero_grad()

    engine = SimpleNamespace(optimizer=optimizer, basic_optimizer=optimizer, zero_optimization_stage=lambda: 0,
                             module=torch.nn.ParameterList(weights))
    step()
    kept = state.weights_and_moments(engine) | state.random_state(torch.device("cpu"))
    kept = {name: tensor.clone() for name, tensor in kept.items()}
    assert {"weight/0/0", "exp_avg/1/0", "exp_avg_sq/0/0", "exp_avg/11/0", "random.cpu"} <= kept.keys()
    step()
    after = [w.detach().clone() for w in weights]
    state.restore_random(kept, torch.device("cpu"))
    state.restore(engine, lambda kind, name, start, size: kept[f"{kind}/{name}/{start}"][:size], 1)
    assert torch.equal(weights[0].flatten(), kept["weight/0/0"])
    step()
    assert all(torch.equal(a, b) for a, b in zip(after, weights))


@pytest.mark.parametrize("fault, ranks", [("moved", 1), ("replaced", 2)])
def test_a_folder_that_goes_in_the_midst_of_a_run(fault, ranks, whole, tiny, tmp_path):  # noqa: F811
    """Renamed, and with an empty one in its place: one line, and not a file where it was. Put back, the run goes on to
    the bytes of an undisturbed one."""
    run, moved = tmp_path / "run", tmp_path / "run-moved"
    codes, said = forked(FAULTY, f"{fault}@3:0", *flags(tiny, run), ranks=ranks)
    assert codes == [1] * ranks and "Traceback" not in said
    assert f"error: {run}: was removed, renamed or replaced while this run wrote to it" in said
    assert not run.exists() if fault == "moved" else list(run.iterdir()) == []
    assert not run.exists() or run.rmdir() is None
    moved.rename(run)
    assert forked(TRAIN, *flags(tiny, run), ranks=ranks)[0] == [0] * ranks
    assert_same(whole(ranks), run)


def test_a_folder_is_held_by_what_it_says(tmp_path):
    """One of another run, or of none, is not the one that was locked; a copy on the way to another disk is."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, steps in ((run, 20), (other, 30)):
        record.create(folder, {"arguments": {}, "world_size": 1, "steps": steps})
    held = record.lock(run)
    record.check_held(run, held)
    run.rename(tmp_path / "away")
    for fill in (lambda: None, run.mkdir, lambda: shutil.copy(other / "run.json", run)):
        fill()
        with pytest.raises(RunStopped, match="run: was removed, renamed or replaced"):
            record.check_held(run, held)
    shutil.copy(tmp_path / "away" / "run.json", run)
    record.check_held(run, held)
    held.close()


def test_nothing_is_made_where_the_run_is_gone(tmp_path):
    """A checkpoint and a state are made in the run's folder, and do not make it."""
    model, gone = make_model(), tmp_path / "gone"
    tensors = checkpoint.gather(model, False)
    with pytest.raises(RunStopped, match="checkpoint-1: can't be written .*No such file"):
        checkpoint.save(model, make_tokenizer(), tensors, gone / "checkpoint-1", {"step": 1})
    with pytest.raises(RunStopped, match="step-1: can't be written .*No such file"):
        resume.save(gone, 1, {"weight.0": torch.ones(3)}, {}, 0)
    assert not gone.exists()


def test_a_terminal_that_lacks_letters(monkeypatch):
    """An ASCII terminal, as LANG=C has it: letters come as their numbers, on both streams, and nothing fails."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)

    def main(argv):
        print("S\xe4tze \u2192 \U0001f600")
        raise UserError("row 3: \xe9\ud800")

    assert run_script(main) == 2
    out.flush()
    assert out.buffer.getvalue() == b"S\\xe4tze \\u2192 \\U0001f600\n"
    assert err.buffer.getvalue() == b"error: row 3: \\xe9\\ud800\n"


def test_exit_codes(capsys):
    """0, 1, 2, and 75 for a run that can go on."""
    from nanodpo.errors import TEMPFAIL, Preempted

    def ends(error):
        def main(argv):
            raise error
        return run_script(main)

    assert [ends(RunStopped("a")), ends(UserError("b")), ends(Preempted("c"))] == [1, 2, 75]
    assert TEMPFAIL == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "error: a\nerror: b\nc\n"


def test_a_folder_that_this_user_may_not_enter_is_one_line(another_user, tmp_path, capsys):
    """Wherever a script looks into it, as into the run of a colleague with umask 077, into which is_file() may not
    look. What the system refuses without naming a file stays a bug."""
    (tmp_path / "closed").mkdir(0o700)
    another_user()
    assert run_script(lambda argv: Path("closed/run.json").is_file()) == 2
    assert capsys.readouterr().err == "error: closed/run.json: Permission denied\n"
    with pytest.raises(PermissionError):
        run_script(lambda argv: os.setgroups([0]))
