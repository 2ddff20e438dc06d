"""A fork is its source to the last bit, but for what it changes and what follows from that."""

import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import oracle
import pytest
import torch
from conftest import ROOT, forked, lines_of, make_model, zero
from test_resume import BREAKS, content
from test_resume import flags as resume_flags

from nanodpo.data.schedule import epoch_order, pairs_of_step
from nanodpo.errors import UserError
from nanodpo.flags.arguments import parse
from nanodpo.folder import card, fork, record, same_run
from nanodpo.folder.resume import folder_of
from nanodpo.run import passes

TRAIN, FAULTY = ROOT / "train.py", ROOT / "tests" / "faulty.py"
MORE = ("--max_steps", "4", "--save_steps", "1", "--eval_steps", "2", "--keep_states")  # after those of test_resume
FULL = ("--use_lora", "false", "--lora_dropout", "0")


def flags(tiny, run, *more):
    return resume_flags(tiny, run, *MORE, *more)


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A finished run of four steps that has kept its states: LoRA with dropout, so that random numbers count."""
    run = tmp_path_factory.mktemp("source") / "run"
    assert forked(TRAIN, *flags(tiny, run))[0] == [0]
    return run


def states(run, first: int = 0) -> dict[str, bytes]:
    """Every file of the states from step `first` on, byte for byte."""
    return {str(file.relative_to(run)): file.read_bytes() for file in run.glob("resume/step-*/*")
            if int(file.parent.name.removeprefix("step-")) >= first}


def assert_same(fork, source, step: int) -> None:
    """The metrics from the first step on, every checkpoint, and the states from the fork's step on."""
    assert lines_of(fork) == lines_of(source) and content(fork) == content(source)
    assert states(fork) == states(source, step) and len(states(fork)) == 2 * 3 - 2 * (step - 1) * bool(step)
    assert not list(fork.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1])
def test_nothing_changed_is_nothing_different(step, source, tmp_path):
    """From the folder of another, and then the fork's own settings are the source's."""
    codes, said = forked(TRAIN, "--fork", f"{source}@{step}", "--output_dir", tmp_path / "fork")
    assert codes == [0] and f"fork: {source} at step {step}, with nothing changed" in said
    assert_same(tmp_path / "fork", source, step)
    made = record.read(tmp_path / "fork")
    assert made["fork"] == {"run": str(source), "step": step, "changed": {}, "of": None,
                            "fingerprint": same_run.fingerprint(record.read(source))}
    # A run like any other: finished, and forked again, which needs its source no more than itself.
    codes, said = forked(TRAIN, "--fork", f"{source}@{step}", "--output_dir", tmp_path / "fork")
    assert codes == [0] and "this run is finished, all 4 steps" in said
    codes, said = forked(TRAIN, "--fork", f"{tmp_path / 'fork'}@3", "--output_dir", tmp_path / "again")
    assert codes == [0]
    assert_same(tmp_path / "again", source, 3)


@pytest.mark.slow
def test_a_fork_of_a_run_on_an_adapter_that_has_a_dropout(source, tiny, tmp_path):
    """Which is off in training, so that the run needed no --allow_dropout; a fork takes none from its run.json as a
    flag. On the base in place of the adapter, a fork has the flags' defaults, also when it is called again."""
    run, more = tmp_path / "run", ("--lora_dropout", "0", "--allow_dropout", "false")
    assert forked(TRAIN, *flags(tiny, run, "--model_name", source / "checkpoint-2", *more))[0] == [0]
    assert record.read(run)["arguments"]["lora_dropout"] > 0
    for step in (0, 1):
        codes, said = forked(TRAIN, "--fork", f"{run}@{step}", "--output_dir", tmp_path / f"at-{step}")
        assert codes == [0] and "with nothing changed" in said
        assert_same(tmp_path / f"at-{step}", run, step)
    for again in (False, True):
        codes, said = forked(TRAIN, "--fork", f"{run}@0", "--output_dir", tmp_path / "base", "--model_name",
                             tiny / "model")
        assert codes == [0] and ("this run is finished" in said) == again


@pytest.mark.slow
@pytest.mark.parametrize("stage, ranks, more", [(0, 1, FULL), (2, 2, ())], ids=["full", "zero2-2"])
def test_a_fork_that_was_killed_goes_on_without_its_source(stage, ranks, more, tiny, tmp_path):
    """Killed before it had its state, then in step 3, then the source is gone: the same command ends as the source."""
    run, place, whole = tmp_path / "run", tmp_path / "fork", tmp_path / "whole"
    assert forked(TRAIN, *flags(tiny, run, *more, "--deepspeed", zero(tiny, stage)), ranks=ranks)[0] == [0] * ranks
    shutil.copytree(run, whole)
    command = ("--fork", f"{run}@2", "--output_dir", place)
    codes, _ = forked(FAULTY, "link@1", *command, ranks=ranks)
    assert codes[0] == 137 and not (place / "metrics.jsonl").exists()
    codes, said = forked(FAULTY, f"kill@3:{ranks - 1}", *command, ranks=ranks)
    assert codes[-1] == 137 and "going on at step 2" in said
    shutil.rmtree(run)
    codes, said = forked(TRAIN, *command, ranks=ranks)
    assert codes == [0] * ranks and "going on at step 3" in said
    assert lines_of(place) == lines_of(whole) and content(place) == content(whole)


@pytest.mark.slow
def test_another_beta_from_step_2_on(source, tmp_path):
    """Until step 2 nothing differs. The line of step 2 is computed before its update: the log-probs are the source's,
    the rewards three times as large, and the loss is that of the new margin. Then the weights go another way."""
    place = tmp_path / "fork"
    command = ("--fork", f"{source}@2", "--output_dir", place, "--beta", "0.3", "--per_device_train_batch_size", "1")
    codes, said = forked(TRAIN, *command)
    assert codes == [0] and f"fork: {source} at step 2, --beta: 0.1 -> 0.3" in said
    old, new = ({(line["step"], "eval_loss" in line): line for line in lines_of(run)} for run in (source, place))
    assert old.keys() == new.keys()
    for key in old:
        assert (old[key] == new[key]) == (key[0] < 2), key
    for prefix, key in (("", (2, False)), ("eval_", (2, True))):
        for name, value in old[key].items():
            times = 3 if name.startswith((f"{prefix}rewards/chosen", f"{prefix}rewards/rejected", f"{prefix}rewards/m")
                                         ) else 1
            if "weights/" not in name and name not in ("loss", "eval_loss", "grad_norm"):
                assert new[key][name] == pytest.approx(times * value, rel=1e-12), name
    assert new[3, False]["logps/chosen"] != old[3, False]["logps/chosen"]
    before, after = content(source), content(place)
    same = {name.partition("/")[0] for name in before if before[name] == after[name] and "safetensors" in name}
    assert same == {"checkpoint-0", "checkpoint-1", "checkpoint-2"}
    assert record.read(place)["fork"]["changed"] == {"--beta": [0.1, 0.3]}
    # What goes on is this fork, as it was asked for; a fork of it can take beta back.
    for wrong in (("--beta", "0.2"), ()):
        codes, said = forked(TRAIN, "--fork", f"{source}@2", "--output_dir", place, *wrong)
        assert codes == [2] and "holds a run with other settings (--beta: 0.3 -> 0." in said
    codes, said = forked(TRAIN, "--fork", f"{place}@2", "--output_dir", tmp_path / "back", "--beta", "0.1")
    assert codes == [0] and lines_of(tmp_path / "back") == lines_of(source)
    # From step 0 its last settings would make another run, whose steps 0 and 1 are not the fork's.
    codes, said = forked(TRAIN, "--fork", f"{place}@0", "--output_dir", tmp_path / "start")
    assert codes == [2] and f"its steps before 2 are those of {source}, which had other settings" in said
    assert not (tmp_path / "start").exists()
    # The cards say it of the checkpoints that come after the change, and run.json of all before it.
    cards = [(place / f"checkpoint-{step}" / "README.md").read_text() for step in (2, 3)]
    assert "were changed" not in cards[0] and "changed on the way: at step 2 `beta` 0.1 -> 0.3. Those" in cards[1]
    card = (tmp_path / "back" / "checkpoint-4" / "README.md").read_text()
    assert "on the way: at step 2 `beta` 0.1 -> 0.3; at step 2 `beta` 0.3 -> 0.1. Those" in card


@pytest.mark.slow
def test_a_step_of_the_fork_is_the_update_of_the_new_loss(source, tmp_path):
    """A loss of its own, another rate and a longer run: the loss at step 2 by hand, from the source's log-probs of its
    single pairs, and the learning rate of a run of six steps."""
    place = tmp_path / "fork"
    codes, _ = forked(TRAIN, "--fork", f"{source}@2", "--output_dir", place, "--loss", "simpo", "--beta", "2",
                      "--learning_rate", "5e-4", "--max_steps", "6", "--max_grad_norm", "0.5", "--loss_kwargs",
                      '{"simpo_gamma": 1.0}', "--gradient_checkpointing")
    assert codes == [0]
    rates = [line["learning_rate"] for line in lines_of(place) if "learning_rate" in line]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (0, 1)]
                                  + [5e-4 * (1 + math.cos(math.pi * k / 6)) / 2 for k in (2, 3, 4, 5)], rel=1e-12)
    old, new = ({line["step"]: line for line in lines_of(run) if "eval_loss" not in line} for run in (source, place))
    assert new[2]["logps/chosen"] == old[2]["logps/chosen"] and "ref_logps/chosen" not in new[2]
    margin = 2 * (old[2]["logps_per_token/chosen"] - old[2]["logps_per_token/rejected"]) - 1
    assert new[2]["rewards/margins"] == pytest.approx(margin + 1)  # without gamma
    # -log sigmoid is convex: its mean over the step's two pairs is no less than that of the mean margin, and near it.
    assert 0 <= new[2]["loss"] - math.log1p(math.exp(-margin)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_without_a_row(loss, tiny, tmp_path):
    """Of a row that comes first in step 3, and of another that comes nowhere, a fork at 2 lacks the term, and nothing
    else: plain transformers and AdamW, one sequence at a time, whose losses leave that term out and divide by the whole
    step. A run that has been without these rows from the start is the same to the last bit; so is the fork when it is
    stopped. Log-probs are means over all pairs."""
    more = ("--use_lora", "false", "--lora_dropout", "0", "--eval_size", "0", "--eval_steps", "0", "--loss", loss)
    windows = [pairs_of_step(11, 2, 42, step) for step in range(4)]
    row, never = windows[3][0], (set(range(11)) - set(sum(windows, []))).pop()
    assert forked(TRAIN, *flags(tiny, tmp_path / "run", *more))[0] == [0]
    command = ("--fork", f"{tmp_path / 'run'}@2", "--output_dir", tmp_path / "fork", "--without_rows",
               f"{never}, {row}")
    assert forked(FAULTY, "kill@3", *command)[0] == [137]
    codes, said = forked(TRAIN, *command)
    assert codes == [0] and "going on at step 3" in said
    names = ",".join(map(str, sorted([row, never])))
    assert record.read(tmp_path / "fork")["fork"]["changed"] == {"--without_rows": [None, names]}
    assert forked(TRAIN, *flags(tiny, tmp_path / "plain", *more, "--without_rows", names))[0] == [0]
    assert lines_of(tmp_path / "fork") == lines_of(tmp_path / "plain")
    weights = [(tmp_path / name / "checkpoint-4" / "model.safetensors").read_bytes()
               for name in ("fork", "plain", "run")]
    assert weights[0] == weights[1] != weights[2]
    early = windows[1][0]  # which this fork comes too late for
    codes, said = forked(TRAIN, "--fork", f"{tmp_path / 'run'}@2", "--output_dir", tmp_path / "late", "--without_rows",
                         str(early))
    assert codes == [0] and f"row {early}: not among those that steps 2 to 3 of this run visit" in said
    assert lines_of(tmp_path / "late") == lines_of(tmp_path / "run")
    model = make_model()
    expected = oracle.train(model, oracle.read_pairs(tiny / "train.jsonl"), windows, loss, without=(row,))
    for line, known in zip(lines_of(tmp_path / "fork"), expected, strict=True):
        for name, value in known.items():
            assert line[name] == pytest.approx(value, rel=2e-5), (line["step"], name)
    after = oracle.load(tmp_path / "fork" / "checkpoint-4")
    for (name, p), q in zip(model.named_parameters(), after.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-6), name


@pytest.mark.slow
def test_rows_that_can_not_be_left_out(tiny, tmp_path):
    """Each wrong list is one line, with --inspect, too; a row of the held-out set is none that is trained on."""
    file, held = tiny / "train.jsonl", epoch_order(11, 42, -1)[0]
    for rows, words, more in (
            ("17", f"row 17: {file} has rows 0 to 10", ()), ("3,17", f"row 17: {file} has rows 0 to 10", ["--inspect"]),
            ("3;4", "must be numbers of rows with commas between, as in 17,56; found '3;4'", ()),
            ("-1", "found '-1'", ()), ("3,,4", "found ''", ()), ("1.5", "found '1.5'", ()),
            (str(held), f"row {held}: {file}: this row is held out, and is not trained on", ()),
            (",".join(str(row) for row in range(11) if row != held), "no row is left that counts in the loss", ())):
        codes, said = forked(TRAIN, *flags(tiny, tmp_path / "run", "--eval_size", "1", "--without_rows", rows, *more))
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert codes == [2] and error.startswith("error: --without_rows ") and words in error
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_at_the_start_everything_can_be_changed(source, tiny, tmp_path):
    """A fork at 0 is the run that these settings give without a fork."""
    more = ("--lora_r", "2", "--seed", "7", "--max_steps", "2", "--loss", "ipo")
    assert forked(TRAIN, *flags(tiny, tmp_path / "plain", *more))[0] == [0]
    codes, said = forked(TRAIN, "--fork", f"{source}@0", "--output_dir", tmp_path / "fork", *more)
    assert codes == [0] and "--lora_r: 4 -> 2, " in said
    assert lines_of(tmp_path / "fork") == lines_of(tmp_path / "plain")
    weights = [run / "checkpoint-2" / "adapter_model.safetensors" for run in (tmp_path / "fork", tmp_path / "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_the_size_of_evaluation_batches_changes_no_step(source, tmp_path):
    """So a fork may have another: its steps are the source's to the last bit, its evaluations from there on up to
    rounding."""
    place = tmp_path / "fork"
    codes, said = forked(TRAIN, "--fork", f"{source}@2", "--output_dir", place, "--per_device_eval_batch_size", "50")
    assert codes == [0], said
    assert record.read(place)["fork"]["changed"] == {"--per_device_eval_batch_size": [1, 50]}
    for old, new in zip(lines_of(source), lines_of(place), strict=True):
        if "eval_loss" in old and old["step"] >= 2:
            assert new == pytest.approx(old, rel=1e-4, abs=1e-6)
        else:
            assert new == old


@pytest.mark.slow
def test_a_fork_is_scored_and_drawn_by_itself(source, tmp_path):
    """It has its source's first checkpoints: step 0, which all others are compared with, and those between."""
    shutil.copytree(source, tmp_path / "gone")
    place = tmp_path / "fork"
    assert forked(TRAIN, "--fork", f"{tmp_path / 'gone'}@2", "--output_dir", place, "--beta", "1")[0] == [0]
    shutil.rmtree(tmp_path / "gone")
    codes, said = forked(ROOT / "score.py", place)
    assert codes == [0] and "step 0 to 4" in said
    codes, said = forked(ROOT / "plot.py", place)
    assert codes == [0] and (place / "training.png").is_file() and (place / "dynamics.png").is_file()


@pytest.mark.slow
def test_what_can_not_be_forked_is_one_line(source, tiny, tmp_path):
    """Nothing is written, and the source stays as it was."""
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    (tmp_path / "other.jsonl").write_text((tiny / "train.jsonl").read_text().replace("What is 3", "What was 3"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run.json").write_text((source / "run.json").read_text())
    for ranks, of, more, words in (
            (1, f"{source}", (), "must be RUN@STEP; .* can be forked at step 0, 1, 2, 3$"),
            (1, f"{source}@4", (), "no state of step 4; .* can be forked at step 0, 1, 2, 3$"),
            (1, f"{source}@02", (), "no state of step 02; "), (1, f"{source}@-1", (), "no state of step -1; "),
            (1, f"{tmp_path}/none@2", (), "none is no run"),
            (1, f"{source}@2", ("--lora_r", "8", "--beta", "0.3"), r"others with --lora_r: 4 -> 8; .* fork at 0"),
            (1, f"{source}@2", ("--seed", "7"), "others with --seed: 42 -> 7"),
            (1, f"{source}@2", ("--bf16",), "others with --bf16: false -> true"),
            (1, f"{source}@2", ("--train_file_path", tmp_path / "other.jsonl"), "others with data: .*other.jsonl"),
            (1, f"{source}@2", ("--model_name", tiny / "untied"), "others with weights: .*untied"),
            (3, f"{source}@2", (), "run@2: a step has 2 pairs in 2 micro-batches, which 3 ranks can't share evenly"),
            (2, f"{source}@2", ("--per_device_train_batch_size", "2"), "others with --per_device_train_batch_size: 1"),
            (1, f"{source}@2", ("--max_steps", "2"), "would end at step 2; give it more --max_steps"),
            (1, f"{source}@2", ("--output_dir", source), "holds the run that is to be forked"),
            (1, f"{source}@2", ("--output_dir", tmp_path / "taken"), "taken: holds another run"),
            (1, f"{source}@2", ("--resume", source / "resume" / "step-2"), "the run is finished; --fork .*run@2"),
            (1, f"{source}@2", ("--loss", "sft", "--sft_weight", "0.5"), "--sft_weight 0.5 has no meaning")):
        codes, said = forked(TRAIN, "--output_dir", tmp_path / "fork", "--fork", of, *more, ranks=ranks)
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert codes == [2] * ranks and "Traceback" not in said, said
        assert re.search(words, error), error
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "fork").exists() and [file.name for file in (tmp_path / "taken").iterdir()] == ["run.json"]


# In one process


@pytest.fixture
def copied(source, tmp_path):
    shutil.copytree(source, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name, how", [*(("rank0.safetensors", how) for how in BREAKS), ("manifest.json", "cut")])
def test_a_damaged_state_is_refused(name, how, copied):
    """So are lines that metrics.jsonl lacks."""
    BREAKS[how](folder_of(copied, 2) / name)
    with pytest.raises(UserError, match=rf"^--fork .*run@2: the run can't go on from this state: .*{name}"):
        fork.entry(fork.find(f"{copied}@2", None), None)
    (copied / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="state: metrics.jsonl lacks step 0"):
        fork.entry(fork.find(f"{copied}@3", None), None)


def test_a_fork_at_0_has_nothing_of_the_forks_before_it():
    """a was changed at 2, b is a fork of it at 0, which has its settings from the first step on, and c of b at 3. By
    b's card and --without_rows nothing was changed on the way."""
    a = {"run": "o", "step": 2, "changed": {"--beta": [0.3, 0.1], "--without_rows": ["", "7"]}, "of": None}
    b = {"run": "a", "step": 0, "changed": {}, "of": a}
    c = {"run": "b", "step": 3, "changed": {"--learning_rate": [1e-3, 1e-4]}, "of": b}
    for entry, step, said in ((a, 2, "at step 2 `beta` 0.3 -> 0.1"), (b, 0, ""), (c, 0, "at step 3 `learning_rate`")):
        assert fork.first_step_with("--without_rows", {"fork": entry}) == step
        words = "".join(card._forked({"fork": entry}, 9))
        assert said in words and ("beta" in words) == (entry is a) and bool(words) == bool(said)


@pytest.mark.parametrize("steps, changed, there", [
    ([2], [{"--beta": [0.1, 0.5]}], "2, 3"), ([3, 2], [{}, {"--beta": [0.1, 0.5]}], "2, 3"), ([2], [{}], "0, 2, 3"),
    ([2], [{"--save_steps": [1, 2]}], "0, 2, 3"), ([0], [{"--beta": [0.1, 0.5]}], "0, 2, 3"),
    ([0, 2], [{}, {"--beta": [0.1, 0.5]}], "0, 2, 3")])
def test_a_run_whose_steps_are_not_alike_has_no_step_0(steps, changed, there, copied):
    """It has the settings of its last steps, with which its first ones would be others. The states are those that the
    fork has, of its own step on; a fork at 0 is alike from there on."""
    facts, entry = json.loads((copied / "run.json").read_text()), None
    for step, values in zip(reversed(steps), reversed(changed)):
        entry = {"run": "/old", "step": step, "fingerprint": "0" * 16, "changed": values, "of": entry}
    (copied / "run.json").write_text(json.dumps(facts | {"fork": entry}))
    shutil.rmtree(folder_of(copied, 1))
    said = "" if there[0] == "0" else r" \(its steps before 2 are those of /old, which had other settings\)"
    with pytest.raises(UserError, match=rf"no state of step 1{said}; .*run can be forked at step {there}$"):
        fork.find(f"{copied}@1", None)
    if there[0] == "0":
        assert fork.find(f"{copied}@0", None).step == 0
        return
    with pytest.raises(UserError, match=rf"run@0: there is no state of step 0{said}; "):
        fork.find(f"{copied}@0", None)
    shutil.rmtree(copied / "resume")
    with pytest.raises(UserError, match=rf"{said}; .*run can't be forked; a run with --keep_states and"):
        fork.find(f"{copied}@2", None)


def test_what_is_evaluated_is_refused_for_its_own_reason(copied):
    """Other held-out rows change no step. But the fork takes over the evaluations before its step, and they are of the
    old rows. Where the rows that are trained on differ, too, the steps are named."""
    found = fork.find(f"{copied}@2", None)
    facts = json.loads((copied / "run.json").read_text())
    trained, held_out = facts["data"]
    for data, what in (([trained, "1" * 64], "evaluations before 2, which the fork takes over,"),
                       ([trained], "evaluations before 2, which the fork takes over,"),
                       (["1" * 64, held_out], "steps before 2")):
        with pytest.raises(UserError, match=f"the {what} could have been others with data: .*; leave it as it was"):
            fork.check(found, facts | {"data": data})
    settings = facts["arguments"] | {"use_flash_attention": True}  # that the kernel must be there
    assert fork.check(found, facts | {"arguments": settings}) == {"--use_flash_attention": [False, True]}
    with pytest.raises(UserError, match="the steps before 2 could have been others with attention: "):
        fork.check(found, facts | {"arguments": settings, "attention": "another"})


def test_a_run_of_another_version(copied):
    """Settings that this version lacks are refused, those that it has besides are at their defaults."""
    made = json.loads((copied / "run.json").read_text())
    del made["arguments"]["keep_states"], made["fork"]
    (copied / "run.json").write_text(json.dumps(made))
    settings, file = fork.settings_of(f"{copied}@2", None)
    assert settings["lora_r"] == 4 and not settings["keep_states"] and file == str(copied / "run.json")
    made["arguments"]["new_setting"] = 1
    (copied / "run.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="of another version of nanodpo, which has the settings new_setting; fork it"):
        fork.settings_of(f"{copied}@2", None)
    (copied / "run.json").write_text(json.dumps(made | {"fork": {"run": 3}}))
    with pytest.raises(UserError, match="is not what train.py writes"):
        fork.settings_of(f"{copied}@2", None)


def test_a_run_from_before_train_on_scored_the_last_answer(copied):
    """So does its fork. Where it is the same run tells the data's hash: of rows of one answer both are the same."""
    made = json.loads((copied / "run.json").read_text())
    del made["arguments"]["train_on"]
    for loss, train_on in (("sft", "last"), ("dpo", "all")):
        made["arguments"]["loss"] = loss
        (copied / "run.json").write_text(json.dumps(made))
        assert fork.settings_of(f"{copied}@0", None)[0]["train_on"] == train_on
        now = made | {"arguments": made["arguments"] | {"train_on": "all"}}
        assert same_run.differences(made, now) == []
        assert same_run.differences(now, now | {"arguments": now["arguments"] | {"train_on": "last"}})


@pytest.mark.parametrize("step", [0, 3])
def test_a_fork_of_another_versions_run_says_so(step, copied, tmp_path):
    """At step 0, too: what it shows beside its source is then not of its changes alone."""
    made = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(made | {"git_commit": "abc"}))
    codes, said = forked(TRAIN, "--fork", f"{copied}@{step}", "--beta", "0.3", "--output_dir", tmp_path / "fork")
    assert codes == [0], said
    assert "fork: numbers may differ, since this is another version of nanodpo: git_commit: abc -> " in said


def test_a_run_that_keeps_no_states_names_the_flag(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {}, "steps": 4, "world_size": 1}))
    with pytest.raises(UserError, match="can be forked at step 0; a run with --keep_states and --resume_steps or"):
        fork.find(f"{tmp_path}@2", None)
    for step in range(1, 24):  # of many states some are named
        folder_of(tmp_path, step).mkdir(parents=True)
    with pytest.raises(UserError, match=r"step 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 \.\.\. 19, 20, 21, 22, 23$"):
        fork.find(f"{tmp_path}@24", None)


def test_a_fork_knows_its_source_by_another_name(tmp_path):
    """On another machine, or where it is gone; another run is not taken for it, nor another step."""
    made = {"arguments": {}, "steps": 4, "world_size": 1}
    entry = {"run": "/old/run", "step": 2, "fingerprint": same_run.fingerprint(made), "changed": {}, "of": None}
    for name, facts in (("run", made), ("other", made | {"steps": 5}), ("fork", made | {"fork": entry})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
    for source in ("/old/run", tmp_path / "run"):
        found = fork.find(f"{source}@2", tmp_path / "fork")
        assert (str(found.run), found.step, found.source) == (str(source), 2, None)
    for source in ("/old/run@3", tmp_path / "run@3", tmp_path / "other@2", tmp_path / "gone@2"):
        with pytest.raises(UserError, match="fork: holds another run; name a new folder"):
            fork.find(str(source), tmp_path / "fork")


def test_a_fork_visits_every_row_in_its_first_whole_epoch(capsys):
    """It begins with the last of the six steps of an epoch of 11 rows: the next epoch has all of them, in its last step
    the one that these two leave."""
    def run(row, steps):
        return SimpleNamespace(without_rows=frozenset([row]), steps=steps, steps_per_epoch=6, pairs_per_step=2,
                               facts={"fork": {"step": 5, "changed": {"--without_rows": [None, str(row)]}}},
                               train_set=SimpleNamespace(examples=[SimpleNamespace(row=i) for i in range(11)]),
                               args=SimpleNamespace(seed=42), row_starts=None)

    seen = [row for step in range(5, 12) for row in pairs_of_step(11, 2, 42, step)]
    for row in range(11):
        passes.say_unvisited(run(row, 100))
    assert capsys.readouterr().out == "" and {*seen} == {*range(11)} != {*seen[:-1]}
    passes.say_unvisited(run(seen[-1], 11))
    assert f"row {seen[-1]}: not among those that steps 5 to 10 of this run visit" in capsys.readouterr().out


def test_links_where_there_are_links_and_copies_of_what_people_edit(copied, tmp_path, monkeypatch):
    """A large state takes no room; a card that somebody edits stays the source's own. Elsewhere all are copies."""
    def numbers(folder):
        return {str(file.relative_to(folder)): file.stat().st_ino for file in folder.rglob("*") if file.is_file()}

    for name, links in (("linked", True), ("copies", False)):
        if not links:
            monkeypatch.setattr(fork.os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
        (tmp_path / name).mkdir()
        fork.fill(fork.find(f"{copied}@1", None), tmp_path / name)
        own, others = numbers(tmp_path / name), numbers(copied)
        shared = {file.rpartition("/")[2] for file in own if own[file] == others[file]}
        assert {"adapter_model.safetensors", "rank0.safetensors"} <= shared if links else not shared
        assert not shared & {"README.md", "trainer_state.json", "metrics.jsonl"}
        assert [line["step"] for line in lines_of(tmp_path / name)] == [0, 0]
        assert sorted(file.name for file in tmp_path.glob(f"{name}/*")) == ["checkpoint-1", "metrics.jsonl", "resume"]


def test_a_fork_that_has_lost_its_states_does_not_begin_again(copied):
    """At step 0 it would train with the new settings from the start, and pass for the fork."""
    from nanodpo.folder import resume

    shutil.rmtree(copied / "resume")
    for place in copied.glob("checkpoint-*"):
        shutil.rmtree(place)
    with pytest.raises(UserError, match="no state to go on from .there is none, but it is a fork at step 2"):
        resume.begin(copied, 8, None, ["x"], 2)


def test_a_flag_that_the_new_loss_does_not_take_can_be_given_up():
    """The source has another model as its reference, which simpo takes none of. There is no flag to leave out."""
    asked = ["--fork", "run@2", "--loss", "simpo"]

    def parsed(*more):
        return parse([*asked, *more], ROOT / "none.yaml", lambda of, folder: (
            {"model_name": "m", "train_file_path": "d", "reference": "x"}, "run/run.json"))

    with pytest.raises(UserError, match="^run/run.json: --reference x has no meaning for --loss simpo; leave it out .a "
                                        "fork takes over its run's flags: give this one another value, or '' for none"):
        parsed()
    assert not parsed("--reference", "").reference
    with pytest.raises(UserError, match="^--reference y has no meaning for --loss simpo; leave it out$"):
        parsed("--reference", "y")


def test_an_empty_name_and_none_are_no_difference():
    """A run without evaluations was given --eval_file_path ''; its fork takes over the setting as none. A fork that
    keeps every step has the weights of its source all the same, so the source's page takes its ledger."""
    def recorded(*flags):
        flags = ["--model_name", "M", "--train_file_path", "D", "--eval_file_path", *flags]
        return {"arguments": dataclasses.asdict(parse(flags, None)), "world_size": 1}

    source, its_fork = recorded(""), recorded("", "--save_steps", "1")
    its_fork["arguments"]["eval_file_path"] = None
    assert same_run.differences(source, its_fork) == [("--save_steps", 0, 1)]
    assert same_run.differences(its_fork, source) == [("--save_steps", 1, 0)]
    assert ("--eval_file_path", "", "E") in same_run.differences(source, recorded("E", "--save_steps", "1"))
