"""Runs that go on with another number of ranks: the same weights, moments and pairs, told in a line or refused in one.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import ROOT, forked, lines_of, zero
from safetensors.torch import load_file
from test_resume import flip

from nanodpo.errors import UserError
from nanodpo.folder import elastic, record, same_run
from nanodpo.folder.atomic import read_manifest
from nanodpo.folder.resume import folder_of

TRAIN, FAULTY = ROOT / "train.py", ROOT / "tests" / "faulty.py"


# The state, on small engines


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder with states of 1 and 2 ranks at each ZeRO stage, and what engines of 1, 2 and 4 made of them."""
    folder = tmp_path_factory.mktemp("sharded")
    for what, ranks in (("save", 1), ("save", 2), ("go-on", 1), ("go-on", 2), ("go-on", 4)):
        codes, said = forked(ROOT / "tests" / "sharded.py", what, folder, ranks=ranks)
        assert codes == [0] * ranks, said
    return folder


@pytest.fixture(scope="module")
def plain():
    """{number of steps: weights and moments by name} of PyTorch's AdamW alone, in one process, without DeepSpeed."""
    from sharded import SHAPES, Weights, optimizer_of

    module, found = Weights(1.0), {}
    optimizer = optimizer_of(module)
    for step in range(3):
        module(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        found[step + 1] = {f"weight {name}": p.detach().clone() for name, p in module.named_parameters()}
        for name in SHAPES:
            own = optimizer.state[module[name].weight]
            found[step + 1] |= {f"{kind} {name}.weight": own[kind].clone() for kind in ("exp_avg", "exp_avg_sq")}
    return found


ZERO = ("0", "1", "2", "robin", "3")  # of tests/sharded.py


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", ZERO)
def test_any_number_of_ranks_takes_up_a_state_to_the_last_bit(stage, ranks, sharded, plain):
    """Float32 weights and both moments, as DeepSpeed's own functions gather them, before a state was saved and after
    other ranks have read it; the model's weights with them. The next update is that of plain AdamW, which shows that it
    counts the updates right. Of the round robin DeepSpeed itself finds other places than it uses: there the model's
    weights are compared, and the update."""
    others = [f"2-{other}" for other in ZERO if other != "robin"] if ranks == 1 else []
    for saved in {f"1-{stage}", f"2-{stage}", *others}:
        before = load_file(sharded / f"{saved}.safetensors")
        after = load_file(sharded / f"{saved}-{ranks}-{stage}.safetensors")
        later = load_file(sharded / f"{saved}-{ranks}-{stage}.after.safetensors")
        assert before.keys() == after.keys() and len(before) == 5 * 3 + 6
        for key, value in before.items():
            kind, name = key.split()
            if kind == "model" or "robin" not in (stage, saved[2:]):
                assert torch.equal(after[key], value), (saved, key)
            if kind == "model" and name != "frozen.weight":
                assert torch.equal(value, before[f"weight {name}"]) or "robin" in saved
                known = plain[2][f"weight {name}"], plain[3][f"weight {name}"]
                assert torch.allclose(value, known[0], rtol=1e-6, atol=1e-7) and not torch.allclose(*known, atol=1e-3)
                assert torch.allclose(later[key], known[1], rtol=1e-6, atol=1e-7), (saved, key)
            elif kind != "model" and "robin" not in saved:
                assert torch.allclose(value, plain[2][key], rtol=1e-6, atol=1e-7), (saved, key)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ZERO)
def test_a_state_has_every_number_once(stage, sharded):
    """However many ranks have written it: 198 trained numbers, three times, none padded. Each rank's part is no more
    than its share, rounded up for each parameter."""
    for ranks in (1, 2):
        files = sorted((sharded / f"{ranks}-{stage}" / "resume" / "step-2").glob("rank*.safetensors"))
        sizes = [sum(t.numel() for name, t in load_file(file).items() if not name.startswith("random."))
                 for file in files]
        assert len(files) == ranks and sum(sizes) == 3 * (35 + 3 + 1 + 143 + 6)
        assert max(sizes) <= 3 * (35 + 3 + 1 + 143 + 6) / (ranks if stage != "0" else 1) + 3 * 5, sizes


# Whole runs


def flags(tiny, run, *more):
    """A run of six steps that saves every two; pairs come one at a time, of eleven rows or eight: an epoch ends with a
    smaller step. No update is clipped, and nothing is drawn. All runs of a test have one cache."""
    return ["--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir", run,
            "--cache_dir", run.parent / "cache", "--learning_rate", "1e-3", "--lora_r", "4", "--max_steps", "6",
            "--save_steps", "2", "--per_device_train_batch_size", "1", "--max_grad_norm", "1e6", "--draw", "false",
            "--keep_states", *more]


def weights(run, step: int) -> dict:
    (file,) = (run / f"checkpoint-{step}").glob("*model.safetensors")
    return load_file(file)


EXACT = {"step", "epoch", "learning_rate", "num_tokens", "skipped_steps"}
FULL, HELD = ("--use_lora", "false"), ("--eval_size", "3", "--eval_steps", "3")


@pytest.mark.slow
@pytest.mark.parametrize("stage, ranks, then, accumulation, then_accumulation, more", [
    (0, 2, 1, 1, 2, HELD), (2, 1, 2, 2, 1, ("--bf16", *HELD)), (3, 2, 4, 2, 1, FULL),
    (1, 2, 1, 1, 2, (*FULL, "--bf16", "--loss", "sft"))],
    ids=["zero0-2-1-lora", "zero2-1-2-lora-bf16", "zero3-2-4-full", "zero1-2-1-full-bf16-sft"])
def test_the_run_is_the_one_that_nobody_stopped(stage, ranks, then, accumulation, then_accumulation, more, tiny,
                                                tmp_path):
    """The same command with another number of ranks, after a kill in step 5: every step comes once, of the same pairs,
    with the same learning rates and counts, and all numbers are those of the undisturbed run to float32's rounding.
    Where a step has two micro-batches its weights are the same to the last bit: one rank adds the two gradients, or two
    do, and the factors are powers of two. Of four micro-batches the sums are made in another order. References come
    from the cache. Of the newest state a rank's file is damaged, so the one before is taken."""
    pairs = ranks * accumulation
    more = (*more, "--gradient_accumulation_steps", accumulation, "--deepspeed", zero(tiny, stage))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert forked(TRAIN, *flags(tiny, whole, *more), ranks=ranks)[0] == [0] * ranks
    codes, _ = forked(FAULTY, f"kill@5:{ranks - 1}", *flags(tiny, run, *more), ranks=ranks)
    assert codes[-1] == 137
    damaged = run / "resume" / "step-4" / f"rank{ranks - 1}.safetensors"
    flip(damaged)
    codes, said = forked(TRAIN, *flags(tiny, run, *more), ranks=then)
    assert codes == [0] * then, said
    assert f"passing over {damaged.parent}: {damaged.name} is not what was written" in said
    assert (f"resume: {then} rank{'s' * (then > 1)} in place of {ranks}; --gradient_accumulation_steps "
            f"{then_accumulation} keeps {pairs} pairs a step\n") in said and "going on at step 2" in said
    assert said.count("reference: 0 pairs computed") == (0 if "sft" in more else 1 + ("--eval_size" in more))
    for line, known in zip(lines_of(run), lines_of(whole), strict=True):
        assert line.keys() == known.keys()
        for name, value in known.items():
            exact = name in EXACT or line["step"] < 2
            assert line[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-6)), (line["step"], name)
    for step in (0, 2, 4, 6):
        a, b = weights(run, step), weights(whole, step)
        change = max((b[name] - value).abs().max() for name, value in weights(whole, 0).items())
        for name, value in b.items():
            if step <= 2 or pairs == 2:
                assert torch.equal(a[name], value), (step, name)
            else:
                assert (a[name] - value).abs().max() < 1e-3 * change
    states = [read_manifest(folder_of(place, 4)) for place in (run, whole)]
    assert [facts["world_size"] for facts in states] == [then, ranks] and len(states[0]["files"]) == then
    for name in ("step", "tokens", "skipped", "global_steps", "skipped_steps", "run"):
        assert states[0][name] == states[1][name], name


@pytest.mark.slow
def test_what_comes_after_such_a_run(tiny, tmp_path):
    """Two ranks, then one, then two again, each told in its line, with dropout, too; it is scored and drawn, and forked
    on one rank from a state of one, with nothing changed."""
    run = tmp_path / "run"
    more = (*HELD, "--lora_dropout", "0.1", "--allow_dropout", "--gradient_accumulation_steps", "2")
    assert forked(FAULTY, "kill@3:1", *flags(tiny, run, *more), ranks=2)[0][1] == 137
    # The accumulation may be given as it must be, too.
    codes, said = forked(FAULTY, "kill@5", *flags(tiny, run, *more[:-1], "4"), ranks=1)
    words = "--gradient_accumulation_steps {} keeps 4 pairs a step; its dropout draws other numbers\n"
    assert codes == [137] and f"resume: 1 rank in place of 2; {words.format(4)}" in said
    codes, said = forked(TRAIN, *flags(tiny, run, *more), ranks=2)
    assert codes == [0, 0] and f"resume: 2 ranks in place of 1; {words.format(2)}" in said and "at step 4" in said
    assert [line["step"] for line in lines_of(run) if "loss" in line] == [*range(6)]
    for script in ("score.py", "plot.py"):
        codes, said = forked(ROOT / script, run)
        assert codes == [0], said
    codes, said = forked(TRAIN, "--fork", f"{run}@4", "--output_dir", tmp_path / "fork")
    assert codes == [0] and f"fork: {run} at step 4, with nothing changed" in said
    assert f"resume: 1 rank in place of 2; {words.format(4)}" in said
    made = record.read(tmp_path / "fork")
    assert (made["world_size"], made["arguments"]["gradient_accumulation_steps"]) == (1, 4)


@pytest.mark.slow
def test_a_run_goes_on_with_another_zero_stage(tiny, tmp_path):
    """Stage 2, then 3 on two ranks, then none, each told in its line beside that of the state's writer: the steps of
    the run that stayed at 2, to float32's rounding. What else is in DeepSpeed's file stays as it is, and that is one
    run's, still."""
    more = ["--gradient_accumulation_steps", "2", "--max_grad_norm", "1.0"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert forked(TRAIN, *flags(tiny, whole, *more, "--deepspeed", zero(tiny, 2)))[0] == [0]
    assert forked(FAULTY, "kill@3", *flags(tiny, run, *more, "--deepspeed", zero(tiny, 2)))[0] == [137]
    codes, said = forked(FAULTY, "kill@5:1", *flags(tiny, run, *more, "--deepspeed", zero(tiny, 3)), ranks=2)
    assert codes[1] == 137 and "going on at step 2" in said, said
    stages = [f'{{"stage": {stage}, "reduce_bucket_size": 20000000}}' for stage in (
        2, '3, "stage3_param_persistence_threshold": 0', 0)]
    words = "since ZeRO is {} in place of {}\n"
    assert words.format(stages[1], stages[0]) in said
    codes, said = forked(TRAIN, *flags(tiny, run, *more, "--deepspeed", zero(tiny, 0)))
    assert codes == [0] and words.format(stages[2], stages[1]) in said and "going on at step 4" in said, said
    for line, known in zip(lines_of(run), lines_of(whole), strict=True):
        for name, value in known.items():
            exact = name in EXACT or line["step"] < 2
            assert line[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-6)), (line["step"], name)
    states = [read_manifest(folder_of(place, step))["run"] for place in (run, whole) for step in (2, 4)]
    assert len(set(states)) == 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}))
    codes, said = forked(TRAIN, *flags(tiny, run, *more, "--deepspeed", other))
    assert codes == [2], said
    assert "holds a run with other settings (deepspeed.wall_clock_breakdown: null -> true, " in said


@pytest.mark.slow
def test_its_ledger_is_that_of_the_undisturbed_run(tiny, tmp_path):
    """Killed on one rank, gone on with two: the same weights after each step, so the same shares. A fork from its
    start, on one rank, has them, too."""
    whole, run, fork = tmp_path / "whole", tmp_path / "run", tmp_path / "fork"
    more = ("--save_steps", "1", "--max_steps", "3", "--gradient_accumulation_steps", "2")
    assert forked(TRAIN, *flags(tiny, whole, *more))[0] == [0]
    assert forked(FAULTY, "kill@2", *flags(tiny, run, *more))[0] == [137]
    assert forked(TRAIN, *flags(tiny, run, *more), ranks=2)[0] == [0, 0]
    codes, said = forked(TRAIN, "--fork", f"{run}@0", "--output_dir", fork, ranks=2)
    assert codes == [0, 0] and "resume: 2 ranks in place of 1; --gradient_accumulation_steps 1 keeps 2 pairs" in said
    tables = []
    for place in (whole, run, fork):
        codes, said = forked(ROOT / "score.py", place, "--ledger", "3", "--output_dir", tmp_path / f"{place.name}-out")
        assert codes == [0], said
        tables.append(pandas.read_parquet(tmp_path / f"{place.name}-out" / "ledger.parquet").drop(columns="run"))
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2]) and len(tables[0]) > 20


# In one process


@pytest.mark.parametrize("had, now, given, expected", [
    ((2, 4), 1, 4, 8), ((1, 8), 2, 8, 4), ((2, 4), 8, 4, 1), ((2, 3), 3, 3, 2), ((2, 4), 2, 4, 4), ((2, 4), 2, 3, 3),
    ((2, 4), 1, 8, 8), ((2, 4), 1, 2, 2), ((2, 4), 3, 4, "with 1, 2, 4 or 8 ranks$"), ((1, 1), 2, 1, "with 1 rank$"),
    ((4, 1), 8, 1, "12 pairs in 4 micro-batches, which 8 ranks can't share evenly; go on with 1, 2 or 4 ranks$")])
def test_how_many_micro_batches_a_rank_gets(had, now, given, expected, monkeypatch):
    """`had`: ranks and accumulation of the run, three pairs a micro-batch. Only what is given as it was is adapted;
    where it can't be, a fork at step 0 has it as it is given."""
    monkeypatch.setenv("WORLD_SIZE", str(now))
    old = {"world_size": had[0], "arguments": {"gradient_accumulation_steps": had[1], "per_device_train_batch_size": 3}}
    args = SimpleNamespace(gradient_accumulation_steps=given, sequence_parallel_size=1)
    if isinstance(expected, int):
        elastic.share_anew(args, old, "run")
        assert args.gradient_accumulation_steps == expected
    else:
        with pytest.raises(UserError, match=f"^run: .*{expected}"):
            elastic.share_anew(args, old, "run")
        elastic.share_anew(args, old, "run", demanded=False)
        assert args.gradient_accumulation_steps == given


@pytest.mark.parametrize("was, now, alone", [
    ({"stage": 2}, {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1}, True),
    ({"stage": 2, "overlap_comm": False}, {"stage": 1, "contiguous_gradients": True,
                                             "allgather_partitions": True}, True),
    ({"stage": 2}, {"stage": 2, "zero_quantized_gradients": True}, False),
    ({"stage": 2, "zero_hpz_partition_size": 2}, {"stage": 2}, False)])
def test_where_zero_keeps_a_model_makes_no_other_run(was, now, alone):
    """What exchanges other numbers does, and so does all else in DeepSpeed's file."""
    was, now = ({"zero_optimization": one, "gradient_clipping": 1.0} for one in (was, now))
    assert elastic.zero_alone(was, now) is alone
    assert not elastic.zero_alone(was, now | {"gradient_clipping": 2.0})
    assert not elastic.zero_alone({"gradient_clipping": 1.0}, now) and not elastic.zero_alone(None, now)


def test_epochs_beside_a_number_of_steps_make_no_other_run():
    """--max_steps decides: what is given as --num_train_epochs besides has no effect."""
    def made(epochs, steps):
        return {"world_size": 1, "steps": 3, "arguments": elastic.DEFAULTS | {"num_train_epochs": epochs,
                                                                              "max_steps": steps}}

    assert same_run.differences(made(1.0, 3), made(2.0, 3)) == []
    assert same_run.differences(made(1.0, -1), made(2.0, -1)) == [("--num_train_epochs", 1.0, 2.0)]
    assert {"--max_steps", "--num_train_epochs"} == {name for name, *_ in same_run.differences(
        made(1.0, -1), made(2.0, 3))}


def test_a_run_of_another_version_is_said_to_be_one():
    """Where no flag differs, other settings of DeepSpeed come from another version, and only what differs is shown."""
    def made(commit, **more):
        return {"world_size": 1, "steps": 3, "arguments": elastic.DEFAULTS, "git_commit": commit,
                "deepspeed": {"zero_optimization": {"stage": 2}, "timers": more}}

    begun = "go on with the version of nanodpo that began it, commit abc, or name a new folder"
    same = "give it the same ones to go on with it, or name a new folder"
    for commit, finished, advice in (("def", {}, begun), ("abc", {}, same), (
            "def", {"finished": "2026-01-01"}, "it is finished; name a new folder")):
        with pytest.raises(UserError) as refused:
            same_run.check_same(Path("run"), made("abc") | finished, made(commit, enabled=False))
        assert str(refused.value) == ("--output_dir run: holds a run with other settings (deepspeed.timers.enabled: "
                                      f"null -> false); {advice}")


def test_a_model_that_has_moved_on_the_hub_is_named_by_its_commit():
    """Where its weights are others by now; not where the user's own folder has changed, nor where the commit is the
    same."""
    def made(weights, base, model="org/m"):
        return {"world_size": 1, "steps": 3, "arguments": elastic.DEFAULTS | {"model_name": model}, "weights": weights,
                "base": base}

    moved = "the hub has other weights by now: give it --model_name org/m@abc, or name a new folder"
    same = "give it the same ones to go on with it, or name a new folder"
    for old, new, advice in ((made("1", "org/m@abc"), made("2", "org/m@def"), moved),
                             (made("1", "org/m@abc"), made("2", "org/m@abc"), same),
                             (made("1", "/models/m", "m"), made("2", "/models/m", "m"), same)):
        with pytest.raises(UserError) as refused:
            same_run.check_same(Path("run"), old, new)
        assert str(refused.value).endswith(f"(weights: 1 -> 2); {advice}")


def test_a_finished_run_is_not_made_longer():
    """Each of its steps would have had another learning rate. How to train further is said, where nothing else differs.
    """
    def made(steps, **more):
        return {"world_size": 1, "steps": steps, "arguments": elastic.DEFAULTS | {"max_steps": steps} | more}

    old, longer = made(3) | {"finished": True}, "in a longer run each step has another learning rate"
    for was, now, said in ((old, made(5), True), (made(3), made(5), False), (old, made(5, beta=0.5), False)):
        with pytest.raises(UserError, match="steps: 3 -> 5") as refused:
            same_run.check_same(Path("a run"), was, now)
        assert (longer in str(refused.value)) == said
        assert ("in a new --output_dir: --model_name 'a run/checkpoint-3' (for DPO" in str(refused.value)) == said


def test_changed_files_are_to_be_put_back_whatever_the_version():
    """Where the data's hash is another one, the file may have changed, or another version reads it otherwise."""
    def made(commit, data):
        return {"world_size": 1, "steps": 3, "arguments": elastic.DEFAULTS, "git_commit": commit, "data": [data]}

    mend = "put back what has changed; if nothing has, go on with the version of nanodpo that began it, commit def, or "
    for old, advice in (("def", mend), ("abc", "give it the same ones to go on with it, or ")):
        with pytest.raises(UserError) as refused:
            same_run.check_same(Path("run"), made(old, "one"), made("abc", "two"))
        assert str(refused.value) == ('--output_dir run: holds a run with other settings (data: ["one"] -> ["two"]); '
                                      f"{advice}name a new folder")


def test_another_version_may_change_more_than_the_last_bits():
    """What a metric means, say: an evaluation's entropy in SFT was once that of both responses."""
    old = {"arguments": {}, "device": "cpu", "versions": {"torch": "1"}, "git_commit": "abc", "threads": 1}
    version = "numbers may differ, since this is another version of nanodpo"
    for changed, words in (({"versions": {"torch": "2"}}, "the last bits may differ: versions.torch: 1 -> 2"),
                           ({"git_commit": "def"}, f"{version}: git_commit: abc -> def"), ({}, "")):
        assert same_run.changed_machine(old, old | changed) == words
    for device, words in (("a GPU", "the last bits may differ: --deterministic: false -> true"), ("cpu", "")):
        new = old | {"device": device, "arguments": {"deterministic": True}}
        assert same_run.changed_machine(old | {"device": device}, new) == words


def test_the_same_steps_are_the_same_run():
    """However ranks share them: no difference, and one fingerprint. Other steps differ in all that makes them."""
    def made(world, accumulation, batch=2):
        return {"world_size": world, "steps": 3, "arguments": elastic.DEFAULTS | {
            "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}}

    assert elastic.pairs_per_step(made(2, 4)) == 16 and same_run.differences(made(2, 4), made(4, 2)) == []
    assert len({same_run.fingerprint(made(world, 8 // world)) for world in (1, 2, 4, 8)}) == 1
    others = made(2, 2), made(4, 4), made(2, 8, 1)
    assert len({same_run.fingerprint(other) for other in (made(2, 4), *others)}) == 4
    assert same_run.differences(made(2, 4), made(4, 4)) == [("world_size", 2, 4)]
    assert same_run.differences(made(2, 4), made(1, 4)) == [("world_size", 2, 1)]
    assert [name for name, *_ in same_run.differences(made(2, 4), made(2, 8, 1))] == ["--per_device_train_batch_size"]
    for name in ("deepspeed", "reference", "peft_config", "weights", "steps", "max_length", "data", "loss_function",
                 "layout", "attention"):  # some have the name of a flag that may differ
        was, now = (made(world, 8 // world) | {name: world} for world in (2, 4))
        assert (name, 2, 4) in same_run.differences(was, now) and same_run.fingerprint(was) != same_run.fingerprint(now)
