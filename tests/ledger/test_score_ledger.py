"""score.py --ledger on real runs of train.py: what it writes is true by the scores of the same checkpoints."""

import json
import re
import shutil

import pandas
import pytest
import torch
from conftest import ROOT, launch, make_tokenizer
from tiny_models import tiny as make_family
from transformers import AutoModelForCausalLM

import score
from nanodpo.errors import UserError
from nanodpo.ledger import history, making
from nanodpo.ledger.report import decimals, doubts, worst_pairs
from nanodpo.scoring.parts import Parts

STEPS = ["--max_steps", "5", "--save_steps", "1", "--per_device_train_batch_size", "2", "--draw", "false"]


def train(tiny, folder, *flags):
    launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--cache_dir",
           folder.parent / "cache", "--output_dir", folder, *STEPS, *flags, launcher="fork")
    return folder


def ledger(run, output, *flags):
    score.main([*map(str, [run, "--output_dir", output, *flags])])
    return pandas.read_parquet(output / "ledger.parquet"), json.loads((output / "ledger.json").read_text())


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return train(tiny, tmp_path_factory.mktemp("ledger") / "dpo", "--learning_rate", "5e-4", "--weight_decay", "0.01",
                 "--gradient_accumulation_steps", "2", "--warmup_steps", "2", "--max_grad_norm", "0.5")


def test_shares_add_up_to_what_the_scores_say(run, tiny, tmp_path, capsys):
    """The mean of four rows and one row alone, from scores.parquet of step 0 and the last."""
    table, records = ledger(run, tmp_path, "--ledger", "4", "--ledger_rows", "6")
    said = capsys.readouterr().out
    score.main([str(run), "--output_dir", str(tmp_path / "scores")])
    scores = pandas.read_parquet(tmp_path / "scores" / "scores.parquet").set_index(["step", "row", "response"])
    assert len(records) == 6  # chosen, rejected, other; of the mean and of row 6
    for record in records:
        rows = [record["row"]] if record["row"] is not None else range(4)
        start, end = (scores.loc[[(step, row, record["response"]) for row in rows], "mean_logps"].mean()
                      for step in (0, 5))
        assert record["start"] == pytest.approx(start, abs=1e-6) and record["end"] == pytest.approx(end, abs=1e-6)
        here = table[(table["response"] == record["response"])
                     & (table["row"].isna() if record["row"] is None else table["row"] == record["row"])]
        assert here["share"].sum() == pytest.approx(end - start, rel=0.01, abs=1e-5)
        assert f"{record['change']:+.{decimals(record['change'])}f} nats a token" in said
        assert abs(record["residual"]) < 0.01 and record["updates_rebuilt"]["largest"] < 1e-4
    assert float(re.search(r"gradient norms within (\S+) of those in metrics.jsonl", said)[1]) < 2e-6
    assert {*table["side"]} == {"chosen", "rejected", "weight_decay"}
    assert {*table["step"]} == {0, 1, 2, 3, 4}
    assert len(table[(table["step"] == 0) & (table["response"] == "chosen") & table["row"].isna()]) == 2 * 4 + 1
    # The texts of the strongest pairs of each mean, as they are in the data file.
    data = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    for record in records:
        assert ("texts" in record) == (record["row"] is None)
        if record["row"] is None:
            net = table[table["row"].isna() & (table["response"] == record["response"])].groupby("pair")["share"].sum()
            ends = {*net[net < 0].nsmallest(5).index, *net[net > 0].nlargest(5).index}
            assert record["texts"] == {str(k): [data[k][s] for s in ("prompt", "chosen", "rejected")] for k in ends}
    assert not [place for place in tmp_path.iterdir() if "partial" in place.name]  # nothing stays of the work
    assert (tmp_path / "ledger.png").stat().st_size > 10_000  # nobody had to ask for it


def test_a_ledger_and_another_scoring_of_one_folder(run, tmp_path):
    """Two ledgers would take each other's gradients away, and mix their files. The second is told so."""
    for flags in (["--ledger", "2"], ["--ledger_rows", "3"], []):
        with Parts(tmp_path / "out" / "parts"), pytest.raises(UserError, match="another scoring is at work there"):
            score.main([str(run), "--output_dir", str(tmp_path / "out"), *flags])
        assert not (tmp_path / "out").exists()
    ledger(run, tmp_path / "out", "--ledger", "2")
    assert not (tmp_path / "out" / "parts").exists()


def test_what_another_version_kept_of_a_stopped_ledger_is_not_used(run, tmp_path, capsys, monkeypatch):
    """Its gradients are rounded otherwise, or are other ones: the ledger is that of a folder without any."""
    def stop(*_):
        raise KeyboardInterrupt

    flags, (whole, _) = ["--ledger", "2"], ledger(run, tmp_path / "new", "--ledger", "2")
    with monkeypatch.context() as patch:
        patch.setattr(making, "FORMAT", 0, raising=False)
        patch.setattr(making, "backward", stop)
        patch.setattr(history.History, "step_gradient", lambda self, step: torch.full_like(self.weights(), 1e-3))
        with pytest.raises(KeyboardInterrupt):
            ledger(run, tmp_path / "old", *flags)
    (kept,) = (tmp_path / "old").glob("ledger-*.partial")
    capsys.readouterr()
    assert ledger(run, tmp_path / "old", *flags)[0].equals(whole)
    assert f"{kept}: is of another run or another version, and not used" in capsys.readouterr().out


def test_layers_computed_again_change_no_bit(run, tmp_path):
    kept, again = (ledger(run, tmp_path / name, "--ledger", "2", *flags)
                   for name, flags in (("kept", []), ("again", ["--gradient_checkpointing"])))
    pandas.testing.assert_frame_equal(kept[0], again[0], check_exact=True)
    assert kept[1] == again[1]


@pytest.mark.parametrize("rate", ["1e-5", "1e-3"])
def test_shares_of_a_dora_run_add_up(tiny, tmp_path, rate):
    """PEFT's gradient holds DoRA's norms constant, and so is no derivative of a log-prob. With small steps the shares
    leave nothing over."""
    (tmp_path / "peft.json").write_text('{"use_dora": true}')
    run = train(tiny, tmp_path / "run", "--learning_rate", rate, "--warmup_steps", "3", "--peft_config",
                tmp_path / "peft.json")
    _, (record,) = ledger(run, tmp_path / "out", "--ledger", "4", "--responses", "chosen")
    assert abs(record["residual"]) < (0.001 if rate == "1e-5" else 0.02)
    assert record["updates_rebuilt"]["median"] < 1e-3


def test_an_adapter_that_has_a_dropout_is_no_reason_against_a_ledger(tiny, tmp_path):
    """It is off in training, but its run.json was read as flags, and such a dropout needs --allow_dropout there."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    base.name_or_path = str(tiny / "model")
    get_peft_model(base, LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
                   ).save_pretrained(tmp_path / "adapter")
    run = train(tiny, tmp_path / "run", "--model_name", tmp_path / "adapter", "--learning_rate", "1e-3",
                "--warmup_steps", "3")
    _, (record,) = ledger(run, tmp_path / "out", "--ledger", "2", "--responses", "chosen")
    assert abs(record["residual"]) < 0.01 and record["updates_rebuilt"]["median"] < 1e-3


def test_a_mean_of_one_row_is_no_row_by_itself(run, tmp_path):
    """Also where that row is asked for, too: each has its own lines."""
    table, records = ledger(run, tmp_path, "--ledger", "1", "--ledger_rows", "0", "--responses", "chosen")
    mean, row = records
    assert (mean["row"], row["row"], mean["change"]) == (None, 0, row["change"])
    for lines in (table[table["row"].isna()], table[table["row"] == 0]):
        assert lines["share"].sum() == pytest.approx(row["change"], rel=0.01)


@pytest.mark.parametrize("flags", [
    ["--loss", "simpo", "--beta", "2", "--sft_weight", "0.3"], ["--loss", "sft"], ["--use_lora", "false"],
    ["--loss", "ipo", "--bf16", "--reference", "untied"]], ids=["no reference", "sft", "full", "bf16, a reference"])
def test_every_kind_of_run_has_a_ledger(tiny, tmp_path, flags, capsys):
    run = train(tiny, tmp_path / "run", "--learning_rate", "1e-3", *(tiny / f if f == "untied" else f for f in flags))
    table, records = ledger(run, tmp_path / "out", "--ledger", "3", "--responses", "chosen")
    (record,) = records
    # A reference that is stored in another precision than the run's would be further away.
    assert float(re.search(r"gradient norms within (\S+) of those", capsys.readouterr().out)[1]) < 2e-6
    assert abs(record["residual"]) < 0.01 and abs(record["change"]) > 1e-4
    assert record["updates_rebuilt"]["median"] < 1e-3
    assert {*table["side"]} == {"chosen", "rejected"} - ({"rejected"} if "sft" in flags else set())


def test_weight_decay_is_of_what_training_decays(tiny, tmp_path):
    """Cohere's norms of heads are matrices by shape alone: no decay in training, and none in its updates as they are
    rebuilt."""
    base = tmp_path / "base"
    make_family("cohere", torch.float32, 0.1, vocab_size=264, pad_token_id=256, eos_token_id=258,
                use_qk_norm=True).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    run = train(tiny, tmp_path / "run", "--model_name", base, "--use_lora", "false", "--learning_rate", "1e-4",
                "--weight_decay", "2")
    _, (record,) = ledger(run, tmp_path / "out", "--ledger", "3", "--responses", "chosen")
    assert max(record["updates_rebuilt"].values()) < 1e-3


def test_a_fork_that_only_keeps_more_has_the_ledger_of_its_source(tiny, tmp_path):
    """A run with its last checkpoint alone names the command; what that trains has the same weights, and the ledger
    goes by the name of the run that was scored."""
    first = train(tiny, tmp_path / "first", "--learning_rate", "1e-3", "--save_steps", "0")
    done = launch(ROOT / "score.py", first, "--ledger", "3", launcher="fork", check=False)
    assert done.returncode == 2 and f"--fork {first}@0 --save_steps 1` trains it again" in done.stdout
    launch(ROOT / "train.py", "--fork", f"{first}@0", "--save_steps", "1", "--output_dir", tmp_path / "again",
           launcher="fork")
    table, records = ledger(tmp_path / "again", first, "--ledger", "3")
    assert {*table["run"]} == {"first"} == {record["run"] for record in records}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / "checkpoint-5" / name).read_bytes() == (tmp_path / "again" / "checkpoint-5" / name).read_bytes()
    launch(ROOT / "train.py", "--fork", f"{first}@0", "--save_steps", "1", "--beta", "0.5", "--output_dir",
           tmp_path / "other", launcher="fork")
    assert {*ledger(tmp_path / "other", tmp_path / "out", "--ledger", "3")[0]["run"]} == {"other"}


def test_a_weight_of_a_row_is_in_its_shares(tiny, tmp_path):
    """A pair of weight 0 makes nothing; with weights the shares add up as without."""
    rows = [json.loads(line) | {"weight": float(i % 3)} for i, line in
            enumerate((tiny / "train.jsonl").read_text().splitlines())]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(tiny, tmp_path / "run", "--train_file_path", tmp_path / "data.jsonl", "--learning_rate", "1e-3")
    table, (record, *_) = ledger(run, tmp_path / "out", "--ledger", "3")
    assert abs(record["residual"]) < 0.01 and record["updates_rebuilt"]["median"] < 1e-3
    light = table["pair"] % 3 == 0
    assert light.any() and (table[light]["share"] == 0).all() and (table[~light]["share"] != 0).all()


def test_a_row_that_a_run_is_without_made_nothing(tiny, tmp_path):
    """The others have shares, which add up; a fork with such a change at a later step is refused, for its steps were
    not alike."""
    run = train(tiny, tmp_path / "run", "--learning_rate", "1e-3", "--without_rows", "0,3,6,9", "--keep_states")
    table, (record, *_) = ledger(run, tmp_path / "out", "--ledger", "3")
    assert abs(record["residual"]) < 0.01 and record["updates_rebuilt"]["median"] < 1e-3
    gone = table["pair"] % 3 == 0
    assert gone.any() and (table[gone]["share"] == 0).all() and (table[~gone]["share"] != 0).all()
    launch(ROOT / "train.py", "--fork", f"{run}@2", "--output_dir", tmp_path / "fork", "--without_rows", "0",
           launcher="fork")
    with pytest.raises(UserError, match="fork is a fork, and its steps before 2 had other settings"):
        score.main([str(tmp_path / "fork"), "--ledger", "3", "--output_dir", str(tmp_path / "no")])


def test_a_fork_of_a_fork_that_changed_a_setting_is_refused_like_it(tiny, tmp_path):
    """It has the same steps, though it changed nothing itself. A fork that changes no weight has a ledger."""
    a, b, c, d = (tmp_path / name for name in "abcd")
    train(tiny, a, "--learning_rate", "1e-3", "--keep_states")
    for source, step, place, flags in ((a, 2, b, ["--learning_rate", "1e-4", "--keep_states"]), (b, 4, c, []),
                                       (a, 3, d, ["--save_steps", "2"])):
        launch(ROOT / "train.py", "--fork", f"{source}@{step}", "--output_dir", place, *flags, launcher="fork")
    with pytest.raises(UserError, match="c is a fork, and its steps before 2 had other settings than those after"):
        score.main([str(c), "--ledger", "3", "--output_dir", str(tmp_path / "no")])
    # Also where it lacks checkpoints: no fork of it at 0 would train it again.
    with pytest.raises(UserError, match=f"b is a fork, .*; a fork of {a} at 0 with its settings has steps that are"):
        score.main([str(b / "checkpoint-0"), str(b / "checkpoint-5"), "--ledger", "3", "--output_dir",
                    str(tmp_path / "no")])
    places = [d / f"checkpoint-{step}" for step in range(5)]
    score.main([*map(str, places), "--ledger", "3", "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("flags, words", [
    (["@", "--ledger", "-1"], "--ledger -1: must be at least 0"),
    (["@", "--ledger", "2", "--tokens"], "--ledger: makes no scores; --tokens is for another call"),
    (["@", "--ledger", "2", "--responses", "greedy"], "--ledger: makes no answers"),
    (["@", "--ledger", "2", "--ledger_memory", "0"], "--ledger_memory 0: must be above 0 GiB"),
    (["@", "--ledger", "2", "--ledger_memory", "1e-9"], "--ledger_memory 1e-09: a probe takes 0.00 GiB"),
    (["@", "--ledger_rows", "99"], "--ledger_rows 99: no data set has such a row"),
    (["@", "--ledger_rows", "-3"], "--ledger_rows -3: must be the number of a row"),
    (["@/checkpoint-2", "@/checkpoint-3", "--ledger", "2"], "@0 --save_steps 1` trains it again"),
    (["@/checkpoint-0", "@/checkpoint-3", "--ledger", "2"], "has none of step 1; `"),
    (["@/checkpoint-0", "--ledger", "2"], "has checkpoint-0 alone, so nothing has changed"),
    (["MODEL", "--dataset_path", "DATA", "--ledger", "2"], "is no run, or not the only one"),
])
def test_wrong_input_is_one_line(run, tiny, tmp_path, flags, words):
    places = {"MODEL": str(tiny / "model"), "DATA": str(tiny / "train.jsonl")}
    flags = [places.get(flag, flag.replace("@", str(run))) for flag in flags]
    done = launch(ROOT / "score.py", *flags, "--output_dir", tmp_path / "out", launcher="fork", check=False)
    assert done.returncode == 2 and words in done.stdout and "Traceback" not in done.stdout
    assert not [*tmp_path.rglob("*.parquet")]


@pytest.mark.parametrize("shares, raised", [([-0.3, -0.1, 0.2, 0.0], "row 2 (+0.2000)"), ([-0.3, -0.1], "no pair")])
def test_a_pair_that_lowered_is_not_among_those_that_raised(shares, raised):
    """Where fewer than three did."""
    lines = [{"dataset": "d", "response": "chosen", "row": None, "pair": k, "chosen_answer": 0, "rejected_answer": 0,
              "share": share} for k, share in enumerate(shares)]
    (said,) = worst_pairs(pandas.DataFrame(lines))
    assert f"lowered most by row 0 (-0.3000), row 1 (-0.1000); raised most by {raised}; the 1 of " in said
    assert said.endswith(" made 75% of all that lowered it")  # 0.3 of 0.4, whatever raised it


def test_pairs_are_named_where_none_lowered_the_mean():
    lines = [{"dataset": "d", "response": "chosen", "row": None, "pair": k, "chosen_answer": 0, "rejected_answer": 0,
              "share": share} for k, share in enumerate([0.0, 0.1, 0.2])]
    assert worst_pairs(pandas.DataFrame(lines)) == [
        "d, chosen: lowered most by no pair; raised most by row 2 (+0.2000), row 1 (+0.1000)"]
    assert worst_pairs(pandas.DataFrame(lines).assign(share=0.0)) == []


@pytest.mark.parametrize("changed, words", [
    ({}, []), ({"missed": 0.049, "residual": -0.049}, []),
    ({"missed": 0.06}, ["the steps are too large.* come to 6% of all that the steps moved"]),
    ({"missed": 0.06, "residual": 0.3}, ["the steps are too large"]),  # the residual follows from it
    ({"moved": 0.0, "missed": 1e-9}, ["the log-prob did not move"]), ({"moved": 0.0, "sizes": 0.0}, []),
    ({"residual": -0.06}, ["more than 5% of the change, which is close to 0"]),
    ({"sizes": 31.0}, ["all shares together are 31 times what the steps moved"]),
    ({"sizes_of_the_first_update": 2.6}, ["52% of all shares, by size, are of the first update"]),
    ({"sizes": 44.0, "sizes_of_the_first_update": 40.0, "missed": 1.0}, ["too large", "together are 44 times"])])
def test_what_speaks_against_shares_is_said(changed, words):
    """Errors of steps that cancel; a change close to 0; weights in which the parts of a gradient cancel."""
    record = {"moved": 1.0, "missed": 0.0, "sizes": 5.0, "sizes_of_the_first_update": 2.4, "residual": 0.0}
    found = doubts(record | changed)
    assert len(found) == len(words) and all(re.search(one, line) for one, line in zip(words, found))


@pytest.mark.parametrize("flags, words", [
    (["--learning_rate", "0"], "no update changed a weight"),
    (["--learning_rate", "1e-12", "--use_lora", "false"], "unreliable: the steps are too small")])
def test_a_run_in_which_nothing_moved_has_a_ledger(tiny, tmp_path, capsys, flags, words):
    run = train(tiny, tmp_path / "run", *flags)
    _, (record,) = ledger(run, tmp_path / "out", "--ledger", "2", "--responses", "chosen")
    assert record["change"] == 0 and words in capsys.readouterr().out


def test_a_run_whose_steps_were_all_left_out_has_none(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line | {"skipped_steps": line["step"] + 1}) + "\n" for line in lines))
    with pytest.raises(UserError, match="--ledger: no step of .* made an update, so nothing has changed"):
        score.main([str(tmp_path / "run"), "--ledger", "2", "--output_dir", str(tmp_path / "out")])


def test_the_steps_without_an_update_are_those_where_their_number_grows(tmp_path):
    """Two of five; an evaluation is no step, and has no such number."""
    lines = [{"step": 0, "grad_norm": 0.5}, {"step": 1, "skipped_steps": 1}, {"step": 2, "eval_loss": 0.7},
             {"step": 2, "grad_norm": 2.5, "skipped_steps": 1}, {"step": 3, "skipped_steps": 2},
             {"step": 4, "grad_norm": 4.5, "skipped_steps": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert history.read_steps(tmp_path) == ({1, 3}, {0: 0.5, 2: 2.5, 4: 4.5})


def test_gradients_of_dropout_can_not_be_made_again(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["arguments"] |= {"lora_dropout": 0.1, "allow_dropout": True}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="run was trained with dropout, whose gradients can't be made again"):
        score.main([str(tmp_path / "run"), "--ledger", "2", "--output_dir", str(tmp_path / "out")])


def test_parts_that_cancel_are_named(tiny, tmp_path, capsys):
    """Chosen and rejected that differ in their last letter: their gradients cancel in most weights."""
    rows = [{"prompt": f"What is {i}+{i}? ", "chosen": f"It is {i}, I think; x", "rejected": f"It is {i}, I think; y"}
            for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny / "model", tmp_path / "model")
    run = train(tmp_path, tmp_path / "run", "--use_lora", "false", "--learning_rate", "2e-4")
    ledger(run, tmp_path / "out", "--ledger", "4", "--responses", "chosen")
    assert "\n  ill-conditioned: " in capsys.readouterr().out


def test_several_ranks_are_told_to_be_one(run, tmp_path):
    done = launch(ROOT / "score.py", run, "--ledger", "2", "--output_dir", tmp_path, ranks=2, launcher="fork",
                  check=False)
    assert done.returncode == 2 and done.stdout.count("error: --ledger: works on one rank; start it with plain") == 1
    assert "Traceback" not in done.stdout and not [*tmp_path.iterdir()]


def test_a_run_of_its_own_loss_is_asked_about(tiny, tmp_path):
    """run.json may come from somebody else, and never has code run."""
    (tmp_path / "own.py").write_text("def own(chosen, rejected):\n    return rejected - chosen\n")
    run = train(tiny, tmp_path / "run", "--loss", f"{tmp_path / 'own.py'}:own", "--learning_rate", "1e-3")
    done = launch(ROOT / "score.py", run, "--ledger", "2", "--output_dir", tmp_path / "out", launcher="fork",
                  check=False)
    assert done.returncode == 2 and "--trust_remote_code runs that file" in done.stdout
    _, (record, *_) = ledger(run, tmp_path / "out", "--ledger", "2", "--trust_remote_code")
    assert abs(record["residual"]) < 0.01
    (tmp_path / "own.py").write_text("def own(chosen, rejected):\n    return 2 * (rejected - chosen)\n")
    done = launch(ROOT / "score.py", run, "--ledger", "2", "--trust_remote_code", "--output_dir", tmp_path / "out",
                  launcher="fork", check=False)
    assert done.returncode == 2 and "the file has changed" in done.stdout


def test_changed_training_data_are_refused(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes((tiny / "train.jsonl").read_bytes())
    run = train(tiny, tmp_path / "run", "--train_file_path", data, "--eval_file_path", tiny / "train.jsonl")
    data.write_text(data.read_text().replace("It is", "It was"))
    done = launch(ROOT / "score.py", run, "--ledger", "2", "--output_dir", tmp_path / "out", launcher="fork",
                  check=False)
    assert done.returncode == 2 and "has changed since run" in done.stdout
