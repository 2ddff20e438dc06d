"""score.py against plain transformers and against what training logged."""

import gc
import json
import math
import os
import random
import shutil
import sys
import threading
import time
import weakref
from types import SimpleNamespace
from unittest import mock

import numpy as np
import oracle
import pandas
import pytest
import torch
from conftest import ROOT, forked, launch, make_model, make_tokenizer, train

import score
from nanodpo.data.example import Example
from nanodpo.data.schedule import pairs_of_step
from nanodpo.errors import RankStopped, RunStopped, UserError, run_script
from nanodpo.figures import after
from nanodpo.scoring import means, responses, tables
from nanodpo.scoring import opened as models_of
from nanodpo.scoring.flags import check_gpu
from nanodpo.scoring.measures import DERIVED, MEASURES, TOKEN_MEASURES
from nanodpo.scoring.parts import Parts
from nanodpo.scoring.runs import open_targets

MADE = after._made
KEYS = ["run", "step", "dataset", "row", "response"]


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Most of a scoring's time would be theirs; `full` has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after, "_made", lambda what, *_: f"no {what}")
        yield


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A LoRA run of three steps with every checkpoint, each evaluated on the training file."""
    folder = tmp_path_factory.mktemp("scored") / "dpo"
    train(tiny, folder, "--learning_rate", "1e-2", "--lora_r", "4", "--per_device_train_batch_size", "4",
          "--save_steps", "1", "--eval_steps", "1", "--eval_file_path", tiny / "train.jsonl")
    return folder


def scored(output, *flags) -> pandas.DataFrame:
    score.main([*map(str, flags), "--output_dir", str(output)])
    return pandas.read_parquet(output / "scores.parquet")


@pytest.fixture(scope="module")
def table(run, tmp_path_factory):
    return scored(tmp_path_factory.mktemp("out"), run)


@pytest.mark.parametrize("asked", [["rejected"], ["other", "shuffled"]])
def test_responses_without_chosen(run, table, tmp_path, asked):
    """They have the numbers that they have beside it, and a verdict."""
    found = scored(tmp_path, run, "--responses", *asked).set_index(KEYS)
    assert {*found.index.get_level_values("response")} == {*asked}
    assert found["logps"].to_dict() == table[table.response.isin(asked)].set_index(KEYS)["logps"].to_dict()
    (verdict,) = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["last"] == 3 and "change of chosen" not in verdict["numbers"]


def test_scores_are_those_of_plain_transformers(run, table, tiny):
    """Each response under each checkpoint, opened by plain PEFT, one sequence at a time, to 1e-6."""
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    assert len(table) == 4 * 11 * 4 and list(table.columns) == tables.COLUMNS
    for step in (0, 3):
        model = oracle.load(run / f"checkpoint-{step}", tiny / "model").eval()
        here = table[table.step == step].set_index(["row", "response"])
        for row, (prompt, chosen, rejected) in enumerate(pairs):
            for response, ids in (("chosen", chosen), ("rejected", rejected)):
                with torch.no_grad():
                    truth = oracle.sequence_logp(model, prompt, ids).item()
                line = here.loc[(row, response)]
                assert line.logps == pytest.approx(truth, rel=1e-6) and line.tokens == len(ids)
                assert line.mean_logps == pytest.approx(truth / len(ids), rel=1e-6)


def test_scores_reproduce_what_training_logged(run, table):
    """The pairs of step k under checkpoint-k have the logps and rewards of line k, and so has each evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    start = table[table.step == 0].set_index(["row", "response"]).logps
    for line in lines:
        here = table[table.step == line["step"]].set_index(["row", "response"]).logps
        rows = list(range(11)) if "eval_loss" in line else pairs_of_step(11, 4, 42, line["step"])
        prefix = "eval_" if "eval_loss" in line else ""
        for side in ("chosen", "rejected"):
            logps = [here[(row, side)] for row in rows]
            rewards = [0.1 * (here[(row, side)] - start[(row, side)]) for row in rows]
            assert line[f"{prefix}logps/{side}"] == pytest.approx(sum(logps) / len(rows), rel=1e-6)
            assert line[f"{prefix}rewards/{side}"] == pytest.approx(sum(rewards) / len(rows), abs=1e-5)
    assert len(lines) == 3 + 4


def test_packing_order_and_ranks_change_nothing(run, table, tmp_path):
    """One group a micro-batch, and two ranks for 11 rows, give the same table."""
    one = scored(tmp_path / "one", run, "--max_tokens", "1")
    launch(ROOT / "score.py", run, "--output_dir", tmp_path / "two", ranks=2, launcher="fork")
    two = pandas.read_parquet(tmp_path / "two" / "scores.parquet")
    for other in (one, two):
        assert other[KEYS].equals(table[KEYS])
        assert (other.logps / table.logps - 1).abs().max() < 1e-6


def test_one_response_more_changes_no_other(run, table, tmp_path):
    few = scored(tmp_path, run, "--responses", "shuffled", "chosen")
    both = few.merge(table, on=KEYS, suffixes=("", "_all"))
    assert len(both) == len(few) == 4 * 11 * 2
    assert (both.tokens == both.tokens_all).all() and (both.logps / both.logps_all - 1).abs().max() < 1e-6


def test_a_killed_scoring_goes_on(run, table, tmp_path):
    """Killed -9 after its first part, it keeps what was done and ends with the table of an undisturbed run."""
    plan = {"0": {"at": {"part": ["kill -9 $PPID"]}}}
    codes, said = forked(ROOT / "tests" / "apart.py", "score", json.dumps(plan), run, "--output_dir", tmp_path,
                         "--max_tokens", "1")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").glob("[!.]*/scores.parquet")}
    assert codes == [137] and len(before) == 1, said
    again = scored(tmp_path, run)
    assert again[KEYS].equals(table[KEYS]) and (again.logps / table.logps - 1).abs().max() < 1e-6
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path):
    """Opened, it would wait for ever for somebody at its other end."""
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(RunStopped, match="is a pipe, not a file"):
        Parts(tmp_path)


@pytest.mark.slow
def test_parts_that_another_machine_sees_late(run, table, tmp_path):
    """NFS remembers for a minute that a name was not there. Here the second rank's name of the folder is there two
    seconds after rank 0 has written the first part, which has the plausible tokens of the run's start; or never."""
    out, mount = tmp_path / "out", tmp_path / "mount"

    def show():
        while not list(out.glob("parts/[!.]*/manifest.json")):
            time.sleep(0.02)
        time.sleep(2)
        mount.symlink_to(out)

    threading.Thread(target=show, daemon=True).start()
    apart = ROOT / "tests" / "apart.py"
    plan = {"1": {"more": ["--output_dir", str(mount)]}}
    codes, said = forked(apart, "score", json.dumps(plan), run, "--output_dir", out, ranks=2)
    assert codes == [0, 0], said
    again = pandas.read_parquet(out / "scores.parquet")
    assert again[KEYS].equals(table[KEYS]) and (again.logps / table.logps - 1).abs().max() < 1e-6
    plan = {"1": {"more": ["--output_dir", str(tmp_path / "never")], "set": {"ranks.waits.SEEN": 1}}}
    codes, said = forked(apart, "score", json.dumps(plan), run, "--output_dir", tmp_path / "two", ranks=2)
    assert codes == [1, 1] and "--output_dir must be a folder that all machines share" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("free", [4, 600, 900, 1100])
def test_a_disk_that_fills(free, run, table, small_disk, monkeypatch, capsys):
    """One line and exit code 1, parts whole, nothing else left; with room again the same command ends it."""
    filler = small_disk / "filler"
    filler.write_bytes(bytes((4096 - free) * 1024))
    monkeypatch.setattr(sys, "argv", ["score.py", str(run), "--output_dir", str(small_disk / "out")])
    capsys.readouterr()
    assert run_script(score.main) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error and "the same command goes on" in error
    left = {file.name for file in small_disk.rglob("*") if file.is_file()} - {"filler"}
    assert not [name for name in left if name.startswith(".") or "partial" in name], left
    kept = {file: file.read_bytes() for file in (small_disk / "out" / "parts").rglob("*") if file.is_file()}
    filler.unlink()
    assert run_script(score.main) == 0
    assert pandas.read_parquet(small_disk / "out" / "scores.parquet").equals(table)
    assert all(file.read_bytes() == then for file, then in kept.items())


@pytest.fixture(scope="module")
def full(run, tiny, tmp_path_factory):
    """Everything that can be asked for, of the data with one column more: `third` is chosen, in every other row."""
    folder = tmp_path_factory.mktemp("full")
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    rows = [row | {"third": row["chosen"] if i % 2 else None} for i, row in enumerate(rows)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_path", f"d={folder / 'data.jsonl'}", "--tokens", "--gradients", "--answers", "5",
             "--max_new_tokens", "7", "--responses", "chosen", "rejected", "greedy", "third"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after, "_made", MADE)
        scored(folder / "one", run, *flags)
    launch(ROOT / "score.py", run, *flags, "--output_dir", folder / "two", ranks=2, launcher="fork")
    return folder


def test_two_ranks_write_the_same_tables(full):
    """11 rows on two ranks, every table of every measure."""
    for name in ("scores", "pairs", "tokens", "prompts", "answers"):
        one, two = (pandas.read_parquet(full / side / f"{name}.parquet") for side in ("one", "two"))
        # A sum of gradients that nearly cancel keeps fewer digits.
        pandas.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-6)
    for name in ("summary", "sections"):
        one, two = (pandas.read_csv(full / side / f"{name}.csv") for side in ("one", "two"))
        pandas.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-6)
    assert not (full / "one" / "failed.jsonl").exists()
    assert (full / "one" / "verdict.json").read_text().count('"names"') == 1
    assert (full / "one" / "dynamics.png").stat().st_size > 10_000  # nobody had to ask for it


def test_tokens_add_up(full, tiny):
    """The tokens of a response add up to its log-prob; means of the measures are those of its tokens. Each measure is a
    column of tokens, or follows from them."""
    scores_, tokens = (pandas.read_parquet(full / "one" / f"{name}.parquet") for name in ("scores", "tokens"))
    groups = tokens.groupby(["step", "row", "response"])
    line = scores_.set_index(["step", "row", "response"]).loc[groups.size().index]
    assert (groups.size() == line.tokens).all() and len(line) == 4 * (3 * 11 + 5)
    assert groups.logp.sum().values == pytest.approx(line.logps.values, rel=1e-6)
    assert {*tokens.columns} >= {name.replace("logps", "logp") for name in TOKEN_MEASURES}
    tokens["argmax_mass"], tokens["accuracy"] = np.exp(tokens.argmax_logp), tokens["rank"] == 1
    assert {*MEASURES} <= {*TOKEN_MEASURES, *DERIVED} and DERIVED.keys() == {*MEASURES} - {*TOKEN_MEASURES}
    for name in MEASURES:
        means = tokens.groupby(["step", "row", "response"])[name.replace("logps", "logp")].mean()
        assert means.values == pytest.approx(line[name].values, rel=1e-5), name
    assert (tokens[tokens["rank"] == 1].logp == tokens[tokens["rank"] == 1].argmax_logp).all()
    assert ((tokens.logp < tokens.argmax_logp) == (tokens["rank"] > 1)).all()
    first = tokens[(tokens.step == 0) & (tokens.row == 0) & (tokens.response == "chosen")]
    assert "".join(first.token) == "It is 0, <|im_end|>" and first.position.tolist() == list(range(10))
    _, ids, _ = next(iter(oracle.read_pairs(tiny / "train.jsonl")))
    assert first.id.tolist() == ids


def test_prompts_are_kept_once_a_row_beside_the_tokens(full, tiny):
    """Whatever the checkpoints and responses; as the text that the model reads."""
    prompts, decode = pandas.read_parquet(full / "one" / "prompts.parquet"), make_tokenizer().decode
    assert prompts["row"].tolist() == [*range(11)] and {*prompts["dataset"]} == {"d"}
    assert prompts["prompt"].tolist() == [decode(prompt) for prompt, *_ in oracle.read_pairs(tiny / "train.jsonl")]
    assert prompts["prompt"][4] == "What is 4+4? "


def test_columns_and_greedy_answers(run, full, tiny):
    """A column is a response like any other; greedy is what plain transformers says at step 0."""
    table = pandas.read_parquet(full / "one" / "scores.parquet").set_index(["step", "response", "row"]).logps
    third = table.xs("third", level="response")
    assert third.index.get_level_values("row").unique().tolist() == [1, 3, 5, 7, 9]
    assert third.values == pytest.approx(table.xs("chosen", level="response").loc[third.index].values, rel=1e-6)
    model = oracle.load(run / "checkpoint-0", tiny / "model").eval()
    tokens = pandas.read_parquet(full / "one" / "tokens.parquet")
    tokens = tokens[(tokens.step == 0) & (tokens.response == "greedy")]
    for row, (prompt, _, _) in enumerate(oracle.read_pairs(tiny / "train.jsonl")):
        said = []
        while len(said) < 7 and oracle.EOS not in said:
            with torch.no_grad():
                said.append(model(input_ids=torch.tensor([prompt + said])).logits[0, -1].argmax().item())
        mine = tokens[tokens.row == row]
        assert len(mine) == len(said) and (mine["rank"] == 1).all()
        with torch.no_grad():
            assert mine.logp.sum() == pytest.approx(oracle.sequence_logp(model, prompt, said).item(), rel=1e-5)


def test_pairs_by_an_independent_computation(run, full, tiny):
    """CHES from plain hidden states and gradient products from plain backward passes; rewards by their definition."""
    pairs = pandas.read_parquet(full / "one" / "pairs.parquet").set_index(["step", "row"])
    logps = pandas.read_parquet(full / "one" / "scores.parquet").set_index(["step", "row", "response"]).logps
    model = oracle.load(run / "checkpoint-3", tiny / "model").eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    for row, (prompt, *sides) in enumerate(oracle.read_pairs(tiny / "train.jsonl")):
        sums, grads, rewards = [], [], []
        for side, ids in zip(("chosen", "rejected"), sides):
            out = model(input_ids=torch.tensor([prompt + ids]), output_hidden_states=True)
            sums.append(out.hidden_states[-1][0, len(prompt) - 1 : -1].double().sum(0))
            logp = oracle.sequence_logp(model, prompt, ids)
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, trained)]).double())
            rewards.append(0.1 * (logps[3, row, side] - logps[0, row, side]))
        (n, m), line = map(len, sides), pairs.loc[3, row]
        inner, own = (sums[0] @ sums[1]).item(), (sums[0] @ sums[0]).item()
        assert line.ches == pytest.approx(inner - own, rel=1e-5)
        assert line.ches_normalised == pytest.approx(inner / (n * m) - own / n**2, rel=1e-5)
        assert line.grad_dot == pytest.approx((grads[0] @ grads[1]).item(), rel=1e-3, abs=1e-3)
        cosine = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
        assert line.grad_cosine == pytest.approx(cosine, abs=1e-4)
        assert [line["rewards/chosen"], line["rewards/rejected"]] == pytest.approx(rewards, abs=1e-9)
        assert [line["weights/chosen"], line["weights/rejected"]] == pytest.approx(
            [0.1 / (1 + 2.718281828459045 ** (rewards[0] - rewards[1]))] * 2, rel=1e-9)
        assert line.shared == next(i for i, (a, b) in enumerate(zip(*sides)) if a != b)


def test_rows_that_fail_are_listed_and_in_no_mean(run, tiny, tmp_path, monkeypatch):
    """One log-prob is made infinite on its way out of the kernel; all others keep theirs."""
    def broken(*args):
        values, *rest = score_measures(*args)
        values["logps"][-1] = -float("inf")
        return values, *rest

    score_measures = score.token_measures
    monkeypatch.setattr(score, "token_measures", broken)
    table = scored(tmp_path, run / "checkpoint-0", "--dataset_path", tiny / "train.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert [(line["response"], line["logps"]) for line in listed] == [("shuffled", "-inf")]
    assert table.logps.isna().sum() == 1
    means = pandas.read_csv(tmp_path / "summary.csv").set_index("response")
    assert not [*tmp_path.glob("tokens.*"), *tmp_path.glob("prompts.*")]  # nobody asked for them
    assert means.loc["shuffled", "n"] == 10 and means.loc["chosen", "n"] == 11 and means["mean"].notna().all()


@pytest.mark.parametrize("place, flags, words", [
    ("token_measures", (), "scoring under .*checkpoint-0 on row 7 .prompt 13, chosen 26, rejected 30 tokens., row .*"),
    ("gradient_products", ("--gradients",), "the gradients under .*checkpoint-0 on row .*tokens"),
    ("answer_greedily", ("--answers", "2"), "scoring; "),
    ("answers.greedy", ("--answers", "2"), "the greedy answers of .*checkpoint-0; ")])
def test_memory_that_is_short(place, flags, words, run, tiny, tmp_path, monkeypatch):
    """One line that names the rows and what would help; what is done stays."""
    def short(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(f"score.{place}", short)
    with pytest.raises(RankStopped, match=f"^rank 0 ran out of memory in {words}.*smaller --max_tokens"):
        scored(tmp_path, run / "checkpoint-0", "--dataset_path", tiny / "train.jsonl", *flags)


def test_one_model_in_memory_at_a_time(tiny, tmp_path, monkeypatch, request):
    """Three whole models: all parts of each are gone before the next is loaded, or two of 14 GB would have to fit. MLPs
    refer to themselves, and Python by itself looks for such objects now and then, however large they are."""
    from nanodpo.model import layers  # noqa: F401 (else a library's warning at this import, which pytest keeps, holds one)

    opened, load = [], models_of.open_base

    def watched(*args):
        assert not [part for parts in opened for part in parts if part() is not None]
        model = load(*args)
        opened.append([weakref.ref(part) for part in model.modules()])
        return model

    monkeypatch.setattr(models_of, "open_base", watched)
    gc.disable()
    request.addfinalizer(gc.enable)
    places = [tiny / "model", tiny / "untied", shutil.copytree(tiny / "model", tmp_path / "again")]
    scored(tmp_path / "out", *places, "--dataset_path", tiny / "train.jsonl", "--responses", "chosen", "greedy")
    assert len(opened) == 3


def test_a_gpu_that_is_not_there(monkeypatch):
    """A machine without any says what to do instead; one with two says which there are."""
    monkeypatch.delenv("RANK", raising=False)
    for gpus, named, words in ((0, 0, "no CUDA device that torch finds; leave it out to score on the CPU"),
                               (2, 2, "this machine has 2 CUDA devices, from 0")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(UserError, match=f"--gpu_id {named}: .*{words}"):
            check_gpu(named)


def test_libraries_use_the_gpu_that_was_named(monkeypatch):
    """--gpu_id 1: what PEFT and transformers put on "cuda" is there too."""
    named = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", named.append)
    assert models_of.open_device(-1, gpu_id=1) == torch.device("cuda", 1) and named == [1]


def test_a_bare_model_reads_data_as_told(tiny, tmp_path):
    """--chosen_field and --max_length, as in training: the first tokens of a response have the same log-probs."""
    flags = [tiny / "model", "--dataset_path", tiny / "train.jsonl", "--tokens", "--responses", "chosen",
             "--chosen_field", "rejected", "--rejected_field", "chosen"]
    scored(tmp_path / "all", *flags)
    cut = scored(tmp_path / "cut", *flags, "--max_length", "20", "--overlong", "truncate")
    full, part = (pandas.read_parquet(tmp_path / name / "tokens.parquet") for name in ("all", "cut"))
    both = part.merge(full, on=["row", "position"])
    assert len(both) == len(part) < len(full) and (both.token_x == both.token_y).all()
    assert both.logp_x.values == pytest.approx(both.logp_y.values, abs=1e-6)
    assert cut.tokens.max() < 20 and "".join(full[full.row == 0].token) == "No idea!<|im_end|>"
    with pytest.raises(UserError, match="too long; longest: .* --overlong truncate"):
        scored(tmp_path / "no", *flags, "--max_length", "20")


def test_by_default_what_the_data_has_and_starts_first(run, tiny, tmp_path):
    """One row has no other question, and nobody asked for one; a run's step 0 comes first, in whatever order named."""
    (tmp_path / "one.jsonl").write_text((tiny / "train.jsonl").read_text().splitlines()[0])
    ends = run / "checkpoint-3", run / "checkpoint-0"
    table = scored(tmp_path / "out", *ends, "--dataset_path", tmp_path / "one.jsonl")
    assert table.response.tolist() == ["chosen", "rejected", "shuffled"] * 2
    assert table.step.tolist() == [0] * 3 + [3] * 3
    assert table.implausible_mass.notna().all()
    bare = tmp_path / "bare"
    scored(bare, tiny / "model", "--dataset_path", tiny / "train.jsonl", "--responses", "chosen", "rejected")
    assert pandas.read_parquet(bare / "pairs.parquet").margin.isna().all()  # no run, so no start to compare with


def test_rows_that_a_run_held_out_are_its_test_set(tiny, tmp_path, capsys):
    """--eval_size 3: by default these three rows alone, with the numbers that the run's own evaluation logged. The
    report is of the file, since its notes count all of its rows."""
    train(tiny, tmp_path / "run", "--eval_size", "3", "--max_steps", "1", "--eval_steps", "1")
    held = json.loads((tmp_path / "run" / "run.json").read_text())["held_out_rows"]
    capsys.readouterr()
    table = scored(tmp_path / "out", tmp_path / "run")
    assert f"data {tiny / 'train.jsonl'}: 11 rows, 0 dropped, 3 held out\n" in capsys.readouterr().out
    assert len(held) == 3 and set(table["row"]) == set(held) and set(table["dataset"]) == {"test"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["eval_logps/chosen"] for line in lines if "eval_logps/chosen" in line]
    found = table[table["response"] == "chosen"].groupby("step")["logps"].mean()
    assert logged == pytest.approx(found.tolist(), rel=1e-6) and len(logged) == 2


def test_runs_with_other_data_of_their_own_are_not_scored_on_the_firsts(run, tiny, tmp_path):
    """Rows that one run held out are rows that another was trained on: the data must be named, or be the same."""
    def copy(name, **arguments):
        shutil.copytree(run, tmp_path / name)
        record = json.loads((run / "run.json").read_text())
        rows = arguments.pop("held_out_rows", None)
        del record["data"]  # hashes of what the run itself read
        record |= {"arguments": record["arguments"] | {"eval_file_path": None} | arguments, "held_out_rows": rows}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        return tmp_path / name / "checkpoint-3"

    file = str(tiny / "train.jsonl")
    first = copy("first", held_out_rows=[0, 1])
    for name, words, arguments in [
            ("rows", f"test: 2 held-out rows of {file}", {"held_out_rows": [0, 2]}), ("all", f"train: {file}", {}),
            ("file", f"test: {tmp_path}/f.jsonl", {"eval_file_path": f"{tmp_path}/f.jsonl"}),
            ("train", "test: 2 held-out rows of t.jsonl", {"held_out_rows": [0, 1], "train_file_path": "t.jsonl"})]:
        other = copy(name, **arguments)
        with pytest.raises(UserError) as refused:
            scored(tmp_path / "no", first, other)
        assert str(refused.value) == (
            f"run first's own data (test: 2 held-out rows of {file}) are not those of run {name} ({words}): name data "
            "with --dataset_path, or score the runs in two calls")
    evaluated = copy("evaluated", eval_file_path=file)  # the file that another run was trained on
    with pytest.raises(UserError, match=r"evaluated's own data \(test: .* not those of run all \(train: "):
        scored(tmp_path / "no", evaluated, tmp_path / "all" / "checkpoint-3")
    assert not (tmp_path / "no").exists()
    flags = ["--responses", "chosen"]
    same = copy("same", held_out_rows=[0, 1], train_file_path=f"{tiny}/./train.jsonl")
    table = scored(tmp_path / "same_rows", first, same, tiny / "model", *flags)  # of a bare model nothing is known
    assert table[["run", "row"]].values.tolist() == [[r, i] for r in ("first", "same", "model") for i in (0, 1)]
    table = scored(tmp_path / "named", first, tmp_path / "rows" / "checkpoint-3", "--dataset_path", file, *flags)
    assert table["row"].tolist() == [*range(11)] * 2


CODE = """import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class C(LlamaConfig): pass
class M(LlamaForCausalLM): config_class = C
"""


def test_code_in_a_run_runs_only_where_the_command_line_says_so(tiny, tmp_path):
    """A checkpoint with model code of its own, and a run.json that says trust_remote_code: neither is enough."""
    train(tiny, tmp_path / "run", "--use_lora", "false", "--max_steps", "1", "--eval_size", "3")
    for place in (tmp_path / "run" / "checkpoint-0", tmp_path / "run" / "checkpoint-1"):
        config = json.loads((place / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
        (place / "config.json").write_text(json.dumps(config))
        (place / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
        (place / "manifest.json").unlink()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["arguments"]["trust_remote_code"] = True
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    table = scored(tmp_path / "out", tmp_path / "run", "--responses", "chosen")  # transformers has a Llama of its own
    assert len(table) == 2 * 3 and not (tmp_path / "ran").exists()
    scored(tmp_path / "told", tmp_path / "run", "--responses", "chosen", "--trust_remote_code")
    assert (tmp_path / "ran").exists()


@pytest.fixture
def own(tiny, tmp_path):
    """A run with three held-out rows in run/, on a model m/ and data d.jsonl of its own, started in their folder."""
    shutil.copytree(tiny / "model", tmp_path / "m")
    shutil.copy(tiny / "train.jsonl", tmp_path / "d.jsonl")
    launch(ROOT / "train.py", "--model_name", tmp_path / "m", "--train_file_path", tmp_path / "d.jsonl", "--eval_size",
           "3", "--max_steps", "1", "--cache_dir", tmp_path / "cache", "--draw", "false", "--output_dir",
           tmp_path / "run", launcher="fork")
    return tmp_path


@pytest.mark.parametrize("file, key, value", [("model.safetensors", None, None), ("config.json", "rope_theta", 5.0),
                                              ("config.json", "rms_norm_eps", 0.1)])
def test_a_base_that_has_changed_is_refused(own, file, key, value):
    """Other weights, or the same ones used otherwise; in the precision of the run and in another one."""
    place = own / "m" / file
    if key is None:
        make_model(seed=1).save_pretrained(own / "m")
        words = "holds other weights than those that .*run was trained on"
    else:
        config = json.loads(place.read_text())
        (config["rope_parameters"] if key == "rope_theta" else config)[key] = value
        place.write_text(json.dumps(config))
        words = "its config.json is not the one that .*run was trained with"
    for flags in ([], ["--bf16"]):
        with pytest.raises(UserError, match=words):
            scored(own / "out", own / "run", "--responses", "chosen", *flags)
    assert not (own / "out" / "scores.parquet").exists()


def test_a_base_that_was_only_moved_is_the_same(own):
    """Elsewhere, and in files cut otherwise: the weights are what counts."""
    from transformers import AutoModelForCausalLM

    before = scored(own / "out", own / "run", "--responses", "chosen", "--bf16")
    AutoModelForCausalLM.from_pretrained(own / "m").save_pretrained(own / "n", max_shard_size="40KB")
    assert len(list((own / "n").glob("*.safetensors"))) > 1
    shutil.rmtree(own / "m")
    for step in (0, 1):
        place = own / "run" / f"checkpoint-{step}"
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(own / "n")}))
        (place / "manifest.json").unlink()
    after = scored(own / "out2", own / "run", "--responses", "chosen", "--bf16")
    assert (before.logps == after.logps).all()


def test_data_that_have_changed_are_refused(own):
    """Rows in another order: those called held out would be rows that were trained on. Data that are named are free."""
    lines = (own / "d.jsonl").read_text().splitlines(keepends=True)
    (own / "d.jsonl").write_text("".join([*lines[1:], lines[0]]))
    for flags in ([], ["--max_length", "50"]):
        with pytest.raises(UserError, match="d.jsonl: has changed since run run read it, so the rows called test are"):
            scored(own / "out", own / "run", *flags)
    assert len(scored(own / "out", own / "run", "--dataset_path", own / "d.jsonl", "--responses", "chosen")) == 2 * 11
    (own / "d.jsonl").write_text("".join(lines))
    held = set(json.loads((own / "run" / "run.json").read_text())["held_out_rows"])
    (own / "d.jsonl").write_text("".join(line if i in held else line.replace("sure", "well")
                                         for i, line in enumerate(lines)))
    assert len(scored(own / "out2", own / "run", "--responses", "chosen")) == 2 * 3  # the held-out rows are the same


def test_a_run_is_scored_from_any_folder(tiny, tmp_path, monkeypatch):
    """Its model and data were named as seen from the folder where it was started."""
    for name in ("model", "train.jsonl"):
        (shutil.copy if "." in name else shutil.copytree)(tiny / name, tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    launch(ROOT / "train.py", "--model_name", "model", "--train_file_path", "train*.jsonl", "--eval_size", "3",
           "--max_steps", "1", "--cache_dir", "cache", "--draw", "false", "--output_dir", "run", launcher="fork",
           cwd=tmp_path)
    named = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert (named["model_name"], named["train_file_path"]) == (f"{tmp_path}/model", f"{tmp_path}/train*.jsonl")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(scored(tmp_path / "out", tmp_path / "run", "--responses", "chosen")) == 2 * 3


def test_runs_of_two_seeds_get_a_verdict_together(run, tmp_path, capsys):
    """A copy that says that its seed was another: one more verdict, whose numbers are the runs' own, over two runs."""
    shutil.copytree(run, tmp_path / "again")
    record = json.loads((run / "run.json").read_text())
    record["arguments"]["seed"] = 7
    (tmp_path / "again" / "run.json").write_text(json.dumps(record))
    ends = [folder / f"checkpoint-{step}" for folder in (run, tmp_path / "again") for step in (0, 3)]
    scored(tmp_path / "out", *ends, "--responses", "chosen", "rejected", "--answers", "3", "--max_new_tokens", "5")
    one, other, both = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert both["runs"] == [one["run"], other["run"]] and both["over"] == "2 runs of one recipe"
    assert one["over"] == "11 rows of one run"
    reach = math.tan(math.pi * 0.475) / math.sqrt(2) / math.sqrt(12)  # by the rows: what a count is at least unsure of
    for name, number in both["numbers"].items():
        mean, n = one["numbers"][name]["mean"], one["numbers"][name]["n"]
        share = any(word in name for word in ("right", "accuracy", "without one"))
        count = share or "length" in name
        ends = [mean - count * reach / n, mean + count * reach / n]
        if share:
            ends = [max(ends[0], -1.0 if "change" in name else 0.0), min(ends[1], 1.0)]
        assert [number[what] for what in ("mean", "low", "high")] == pytest.approx([mean, *ends]), name
    shown = capsys.readouterr().out
    assert "over 2 runs of one recipe:" in shown and "of 3 right at step 3" in shown
    assert "right at step 0" in (tmp_path / "out" / "answers.txt").read_text()


def test_what_was_there_is_read_once_however_much_it_was(run, tmp_path, monkeypatch):
    """The names of what a folder's tables hold, a run's 4 steps, a data set and a response: before the tables are
    written and afterwards, not once more for each name."""
    read = mock.Mock(side_effect=tables.contents)
    monkeypatch.setattr(tables, "contents", read)
    for calls in (2, 4):
        scored(tmp_path, run, "--responses", "chosen")
        assert read.call_count <= calls
    assert len(read(tmp_path)) == 6


def test_what_a_scoring_takes_the_place_of_is_said(run, tiny, tmp_path, capsys):
    (tmp_path / "b.jsonl").write_text("".join((tiny / "train.jsonl").read_text().splitlines(keepends=True)[:4]))
    scored(tmp_path, run / "checkpoint-0", "--tokens", "--responses", "chosen")
    scored(tmp_path, run / "checkpoint-0", "--dataset_path", tmp_path / "b.jsonl", "--responses", "chosen")
    assert (f"no longer in {tmp_path}: data set test, tokens.parquet; the command that scored it brings it back"
            in capsys.readouterr().out)
    assert not (tmp_path / "tokens.parquet").exists() and not (tmp_path / "page.html").exists()



def test_other_ways_of_reading_are_said(run, tiny, tmp_path, capsys):
    """Of two runs with different settings of the data the first one's hold, and that is on the screen."""
    shutil.copytree(run, tmp_path / "other")
    record = json.loads((run / "run.json").read_text())
    record |= {"max_length": 77, "arguments": record["arguments"] | {"overlong": "drop"}}
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    ends = [folder / "checkpoint-3" for folder in (run, tmp_path / "other")]
    for targets, said in ((ends, True), (ends[:1], False)):
        scored(tmp_path / f"scores-{said}", *targets, "--dataset_path", tiny / "train.jsonl")
        shown = capsys.readouterr().out
        line = f"data are read as {run.name} read them; other runs had their own --max_length, --overlong"
        assert (line in shown) == said, shown


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    """One folder a seed, the same name of the run in each."""
    for seed in ("seed-1", "seed-2"):
        shutil.copytree(run, tmp_path / seed / "dpo")
    found = open_targets([str(tmp_path / seed / "dpo") for seed in ("seed-1", "seed-2")])
    assert [(c.run, c.step) for c in found] == [(f"{seed}/dpo", k) for seed in ("seed-1", "seed-2") for k in range(4)]


def test_prompts_that_open_otherwise_are_refused(run, tmp_path):
    """Data with a system prompt that training did not have; asked for, it is scored."""
    other = tmp_path / "dpo"
    shutil.copytree(run, other)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"prompt_leads": [""]}))
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": talk, "chosen": "Hello", "rejected": "No"}) + "\n")
    flags = [other / "checkpoint-3", "--dataset_path", tmp_path / "data.jsonl", "--responses", "chosen"]
    with pytest.raises(UserError, match="prompt opens with .*Be kind.* dpo was trained on ''; --other_prompts"):
        scored(tmp_path / "out", *flags)
    assert len(scored(tmp_path / "out", *flags, "--other_prompts")) == 1


def test_other_and_shuffled():
    """Shuffled keeps the tokens and the last one's place; other is the answer to another question."""
    examples = [Example(i, [i % 3], [10 * i, 10 * i + 1, 10 * i + 2, 99], None) for i in range(9)]
    groups = responses.make_groups(examples, ["other", "shuffled"], 0, 99)
    for example, (prompt, found) in zip(examples, groups):
        assert prompt == example.prompt and sorted(found["shuffled"]) == sorted(example.chosen)
        assert found["shuffled"][-1] == 99
        (source,) = [e for e in examples if e.chosen == found["other"]]
        assert source.prompt != example.prompt
    assert any(found["shuffled"] != e.chosen for e, (_, found) in zip(examples, groups))
    assert responses.make_groups(examples, ["shuffled"], 1, 99) != responses.make_groups(examples, ["shuffled"], 0, 99)
    alike = [Example(i, [i], [5, 5, 9] if i else [5, 6, 9], None) for i in range(4)]
    for seed in range(9):  # rows 1 to 3 have one answer, which is no other one, and has one order
        first, *rest = [found for _, found in responses.make_groups(alike, ["other", "shuffled"], seed, 99)]
        assert first == {"other": [5, 5, 9], "shuffled": [6, 5, 9]} and rest == [{"other": [5, 6, 9]}] * 3
    # Rows 0 and 1 are one problem's two directions: what one chooses the other rejects. Row 2 has row 0's answer, too.
    pair = [Example(0, [1], [5, 9], [6, 9], problem="a"), Example(1, [2], [6, 9], [5, 9], problem="a"),
            Example(2, [3], [5, 9], [7, 9], problem="b"), Example(3, [4], [8, 9], [7, 9], problem="b")]
    for seed in range(9):
        found = [group["other"] for _, group in responses.make_groups(pair, ["other"], seed, 99)]
        assert found[:2] == [[8, 9]] * 2 and found[2] == [6, 9] and found[3] in ([5, 9], [6, 9])
    alone = [Example(0, [1], [2], None), Example(1, [1], [3], None)]
    with pytest.raises(UserError, match="--responses other: no row"):
        responses.make_groups(alone, ["other"], 0, 99)


def test_batches_hold_every_group_once_within_the_budget():
    draw = random.Random(0)
    groups = [([0] * draw.randint(1, 9), {"chosen": [0] * draw.randint(1, 30)}) for _ in range(50)]
    cut = responses.batches(groups, 40)
    assert sorted(i for batch in cut for i in batch) == list(range(50))
    size = [len(p) + len(r["chosen"]) for p, r in groups]
    assert all(sum(size[i] for i in batch) <= 40 or len(batch) == 1 for batch in cut)


def test_summary_by_hand():
    """Means 1, 3 and 8 -> mean 4, median 3, sem sqrt(13) / sqrt(3); the gap is taken row by row, and a row that
    failed is in neither."""
    line = {"run": "r", "phase": "dpo", "checkpoint": "c", "step": 0, "dataset": "d"}
    table = pandas.DataFrame([line | {"row": row, "problem": str(row), "response": response, "mean_logps": value}
                              for row, response, value in [
                                  (0, "chosen", 1.0), (1, "chosen", 3.0), (2, "chosen", 8.0), (3, "chosen", math.nan),
                                  *((row, "rejected", 0.5) for row in range(4))]])
    found = means.summary(table).set_index("response")
    assert found.loc["chosen", ["n", "mean", "median", "sem"]].tolist() == [3, 4.0, 3.0, pytest.approx((13 / 3) ** 0.5)]
    assert found.loc["gap", ["n", "mean", "median", "sem"]].tolist() == [3, 3.5, 2.5, pytest.approx((13 / 3) ** 0.5)]
    assert found.loc["rejected", ["n", "sem"]].tolist() == [4, 0.0]


def settings_of(loss: str, beta: float = 0.1, smoothing: float = 0.0, **more) -> SimpleNamespace:
    """The part of a run's settings that add_rewards reads."""
    return SimpleNamespace(**{"loss": loss, "beta": beta, "label_smoothing": smoothing, "reference": None,
                              "loss_kwargs": None, "sft_weight": 0.0, "function": None} | more)


def test_rewards_and_weights_are_those_of_each_run():
    """beta, loss and its settings by run, chosen of 4 tokens 4 nats above the start, rejected of 2 tokens 6 below it.
    No weight for sft, for a function of somebody's own that may not be run, and without a start."""
    key, nan = {"checkpoint": "c", "dataset": "d", "row": 0}, math.nan
    sigma = [1 / (1 + math.e**m) for m in (0, 1, 2)]  # sigmoid(-m)
    expected = {  # rewards/chosen, margin, -dL/dchosen and dL/drejected by hand
        "a": (settings_of("dpo", 0.1, 0.2), [0.4, 1, *[0.1 * (sigma[1] - 0.2)] * 2]),
        "b": (settings_of("robust", 0.2, 0.2), [0.8, 2, *[0.2 * (sigma[2] + 0.2 / 0.6)] * 2]),
        "c": (settings_of("hinge", 0.2), [0.8, 2, 0, 0]),
        "d": (settings_of("ipo", 0.1), [0.4, 1, -2 * (4 / 4 + 6 / 2 - 5) / 4, -2 * (4 / 4 + 6 / 2 - 5) / 2]),
        "e": (settings_of("sft"), [0.4, 1, nan, nan]),
        "f": (settings_of("dpo"), [nan] * 4),
        "g": (settings_of("dpop", loss_kwargs='{"dpop_lambda": 3}', sft_weight=0.5),
              [0.4, 1, 0.1 * sigma[1] + 0.5 / 4, 0.1 * sigma[1]]),
        "h": (settings_of("/somewhere/mine.py:mine"), [0.4, 1, nan, nan]),
        "t": (settings_of("/somewhere/mine.py:mine", function=lambda chosen, rejected: chosen**2 - 3 * rejected),
              [0.4, 1, -2 * 4, -3]),
        # Without a reference a reward is of the log-prob itself: of 4 and -6 nats, over 4 and 2 tokens.
        "i": (settings_of("simpo", 2.0), [2, 8, *[2 / (1 + math.exp(8 - 0.5)) / n for n in (4, 2)]]),
        "j": (settings_of("cpo", 0.1), [0.4, 1, 0.1 * sigma[1] + 1 / 4, 0.1 * sigma[1]])}
    table = pandas.DataFrame([
        key | {"run": run, "step": step, "response": side, "logps": logps * (step > 0), "tokens": tokens}
        for run in [*expected, "bare"] for step in {"f": [9], "bare": [0]}.get(run, [0, 9])
        for side, logps, tokens in (("chosen", 4.0, 4), ("rejected", -6.0, 2))])
    pairs = table[table["response"] == "chosen"][["run", "dataset", "row", "step"]].reset_index(drop=True)
    found = means.add_rewards(pairs, table, {run: settings for run, (settings, _) in expected.items()})
    assert [*found] == ["run", "dataset", "row", "step", "rewards/chosen", "rewards/rejected", "margin",
                        "weights/chosen", "weights/rejected"]
    found = found.set_index(["run", "step"])
    for run, (_, numbers) in expected.items():
        line = found.loc[(run, 9), ["rewards/chosen", "margin", "weights/chosen", "weights/rejected"]].tolist()
        assert line == pytest.approx(numbers, abs=1e-12, nan_ok=True), run
    assert found.loc[("a", 0), "weights/chosen"] == pytest.approx(0.1 * (0.5 - 0.2))
    assert found.loc[("bare", 0), ["margin", "weights/chosen"]].isna().all()


@pytest.mark.parametrize("cosine, beta_ratio, inside", [
    (0.5, 1.0, True), (0.5, 0.9, False), (0.5, 4.1, False), (0.5, 3.9, True), (-0.2, 100.0, True)])
def test_the_band_is_where_a_small_step_lowers_rejected_alone(cosine, beta_ratio, inside):
    """Two gradients of lengths 1 and 2 in a plane: the step w g+ - v g- lowers <g-, .> and not <g+, .>, by hand, in the
    band and nowhere else. shift with lambda v/w gives these weights."""
    chosen, rejected = np.array([1.0, 0.0]), 2 * np.array([cosine, (1 - cosine**2) ** 0.5])
    step = beta_ratio * chosen - rejected
    assert (step @ chosen >= -1e-12 and step @ rejected <= 1e-12) == inside
    settings = settings_of("shift", loss_kwargs=json.dumps({"shift_lambda": 1 / beta_ratio}))
    key = {"run": "r", "dataset": "d", "row": 0, "step": 0}
    table = pandas.DataFrame([key | {"checkpoint": "c", "response": side, "logps": -1.0, "tokens": 2}
                              for side in ("chosen", "rejected")])
    products = {"grad_dot": chosen @ rejected, "grad_cosine": cosine, "grad_norm_chosen": 1.0,
                "grad_norm_rejected": 2.0}
    (line,) = means.add_rewards(pandas.DataFrame([key | products]), table, {"r": settings}).to_dict("records")
    assert line["weight_ratio"] == pytest.approx(beta_ratio) and line["in_band"] is inside
    assert line["band_low"] == pytest.approx(max(0, 2 * cosine))
    assert line["band_high"] == pytest.approx(2 / cosine if cosine > 0 else math.inf)


@pytest.mark.parametrize("cosine", [0.5, -0.5])
@pytest.mark.parametrize("up, down", [(1, 1), (-1, -1), (1, -0.1), (-0.1, 1), (1, -5), (-5, 1), (1, 0), (0, 1)])
def test_the_band_knows_the_signs_of_the_weights(cosine, up, down):
    """A pair past the margin that label smoothing or ipo wants is pushed back: both weights are negative, their ratio
    is 1, and the step raises rejected. By hand, as above."""
    chosen, rejected = np.array([1.0, 0.0]), 2 * np.array([cosine, (1 - cosine**2) ** 0.5])
    step = up * chosen - down * rejected
    line = {"weights/chosen": up, "weights/rejected": down, "grad_dot": chosen @ rejected, "grad_cosine": cosine,
            "grad_norm_chosen": 1.0, "grad_norm_rejected": 2.0}
    (found,) = means._band(pandas.DataFrame([line]).astype(float)).to_dict("records")
    assert found["in_band"] is bool(step @ chosen >= 0 and step @ rejected < 0)


@pytest.mark.parametrize("up, down, cosine", [(math.nan, math.nan, 0.5), (0, 0, 0.5), (1, 1, math.nan)])
def test_a_pair_without_weights_or_without_a_gradient_is_neither_in_the_band_nor_outside(up, down, cosine):
    """That of sft, say, or of a hinge that is satisfied: no step on it is made."""
    line = {"weights/chosen": up, "weights/rejected": down, "grad_dot": 2 * cosine, "grad_cosine": cosine,
            "grad_norm_chosen": 1.0, "grad_norm_rejected": 2.0}
    assert means._band(pandas.DataFrame([line]).astype(float))["in_band"].tolist() == [None]


def test_the_screen_says_how_many_pairs_are_in_the_band():
    """Of three pairs two at step 0 and none at step 9; a pair whose weights are not known does not count."""
    pairs = pandas.DataFrame([{"run": "r", "dataset": "d", "step": step, "row": row, "in_band": inside}
                              for step, found in ((0, (True, True, False, None)), (9, (False, False, False, None)))
                              for row, inside in enumerate(found)])
    assert means.band_to_screen(pairs) == ["pairs of r on d in the disentanglement band: 2 of 3 at step 0, 0 of 3 at "
                                           "step 9"]
    assert means.band_to_screen(pairs.drop(columns="in_band")) == means.band_to_screen(pandas.DataFrame()) == []


def test_rewards_are_of_the_rows_own_data_set():
    """Row 0 of one set moves by 4 and -6 nats, row 0 of the other by 2 and 0, from another start; beta is 0.1."""
    key = {"run": "r", "checkpoint": "c", "row": 0}
    table = pandas.DataFrame([key | {"dataset": name, "step": step, "response": side, "logps": logps, "tokens": 5}
                              for name, side, ends in [("d", "chosen", (0, 4)), ("d", "rejected", (0, -6)),
                                                       ("e", "chosen", (-100, -98)), ("e", "rejected", (-50, -50))]
                              for step, logps in zip((0, 9), ends)])
    pairs = table[table["response"] == "chosen"][["run", "dataset", "row", "step"]].reset_index(drop=True)
    settings = {"r": settings_of("dpo")}
    found = means.add_rewards(pairs, table, settings).set_index(["dataset", "step"])
    assert len(found) == 4 and found.loc[("d", 9), ["rewards/chosen", "margin"]].tolist() == pytest.approx([0.4, 1.0])
    assert found.loc[("e", 9), ["rewards/chosen", "margin"]].tolist() == pytest.approx([0.2, 0.2])


def test_rewards_are_against_the_model_that_reference_names():
    """It is scored under another name, and its path may be written otherwise; beta is 0.1. Run s has its own start, and
    u, whose reference was not scored, has no rewards, though its start was."""
    chosen = {("r", "r/checkpoint-0", 0): -5.0, ("r", "r/checkpoint-9", 9): -1.0, ("m", "models/m", 7): -2.0,
              ("s", "s/checkpoint-0", 0): -8.0, ("s", "s/checkpoint-9", 9): -7.0, ("u", "u/checkpoint-0", 0): -4.0}
    table = pandas.DataFrame([{"run": run, "checkpoint": path, "step": step, "dataset": "d", "row": 0, "tokens": 5,
                               "response": side, "logps": logps * times}
                              for (run, path, step), logps in chosen.items()
                              for side, times in (("chosen", 1), ("rejected", 3))])
    pairs = table[table["response"] == "chosen"][["run", "dataset", "row", "step"]].reset_index(drop=True)
    settings = {"r": settings_of("dpo", reference="models/../models/m"), "s": settings_of("dpo"),
                "u": settings_of("dpo", reference="models/other"), "m": settings_of("dpo")}
    found = means.add_rewards(pairs, table, settings).set_index(["run", "step"])
    wanted = {("r", 0): [-0.3, -0.9], ("r", 9): [0.1, 0.3], ("s", 0): [0, 0], ("s", 9): [0.1, 0.3],
              ("u", 0): [math.nan] * 2, ("m", 7): [math.nan] * 2}
    assert len(found) == len(wanted)
    for at, numbers in wanted.items():
        assert found.loc[at, ["rewards/chosen", "rewards/rejected"]].tolist() == pytest.approx(numbers, nan_ok=True), at


def test_label_smoothing_is_read_from_the_run(run, tmp_path):
    """All the way: run.json says 0.1, so that step 0 begins with beta (0.5 - 0.1)."""
    shutil.copytree(run, tmp_path / "dpo")
    record = json.loads((run / "run.json").read_text())
    record["arguments"]["label_smoothing"] = 0.1
    (tmp_path / "dpo" / "run.json").write_text(json.dumps(record))
    scored(tmp_path / "out", tmp_path / "dpo" / "checkpoint-0", "--responses", "chosen", "rejected")
    pairs = pandas.read_parquet(tmp_path / "out" / "pairs.parquet")
    assert pairs["weights/chosen"].tolist() == pytest.approx([0.04] * 11)


def test_wrong_input_is_one_line(run, tiny, tmp_path, capsys, monkeypatch):
    """A clear line, exit code 2, no output."""
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "run.json").write_text("{")
    foreign = tmp_path / "foreign"
    make_model().save_pretrained(foreign)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(foreign)
    monkeypatch.chdir(tmp_path)
    run, model, file = str(run), str(tiny / "model"), str(tiny / "train.jsonl")
    data = ["--dataset_path", file]
    capsys.readouterr()
    for flags, words in [
            ([], "runs/ holds no run"), (["nowhere", *data], "nowhere"), ([model], "name data with --dataset_path"),
            ([run, "--responses", "best"], "no such column; it has prompt, chosen"),
            ([run, "--what"], "unknown argument --what"),
            ([str(broken), *data], "run.json: can't be read as JSON"),
            ([run, run], "dpo/checkpoint-0: is named twice"),
            ([model, str(foreign), *data], "different tokenizers or chat templates"),
            ([run, "--dataset_path", "gone.parquet"], "gone.parquet: no such file"),
            ([run, *data, file], "two data sets are called train"), ([run, "--max_tokens", "0"], "--max_tokens 0"),
            ([run, "--answers", "-1"], "--answers -1"), ([model, *data, "--gradients"], "has none"),
            ([run, "--gradient_checkpointing"], "no backward pass, and saves nothing"),
            ([run, "--ledger_memory", "1"], "--ledger_memory 1: this call makes no ledger"),
            ([run, "--gradients", "--responses", "chosen"], "--gradients: needs both responses of a pair"),
            ([run, "--gradients", "--responses", "rejected", "other"], "name both in --responses"),
            ([run, "--output_dir", file], "can't be written to")]:
        output = [] if "--output_dir" in flags else ["--output_dir", "out"]
        monkeypatch.setattr(sys, "argv", ["score.py", *flags, *output])
        assert run_script(score.main) == 2, flags
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, (flags, error)
    assert not (tmp_path / "out" / "scores.parquet").exists()


def test_only_answers_that_are_there_are_checked(tiny, tmp_path, capsys):
    """Cut after a number, a response would seem to answer with it; and not every text ends in something to compare."""
    chosen = ["so 4 and \\boxed{5}", "it has 7 letters: GOAT", "5", "9 " * 40, "first 8, then the answer is 6 apples"]
    rows = [{"prompt": f"What is {i}?", "chosen": text, "rejected": "no"} for i, text in enumerate(chosen)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored(tmp_path / "out", tiny / "model", "--dataset_path", f"d={tmp_path / 'data.jsonl'}", "--answers", "5",
           "--max_length", "60", "--overlong", "truncate", "--max_new_tokens", "3")
    table = pandas.read_parquet(tmp_path / "out" / "answers.parquet")
    assert list(zip(table.row, table.expected)) == [(0, "5"), (2, "5"), (4, "6")]
    assert "d: 3 of 5 chosen responses are whole and end in an answer that can be checked" in capsys.readouterr().out
    scored(tmp_path / "two", tiny / "model", "--dataset_path", f"d={tmp_path / 'data.jsonl'}", "--answers", "2",
           "--max_length", "60", "--overlong", "truncate", "--max_new_tokens", "3")
    assert pandas.read_parquet(tmp_path / "two" / "answers.parquet").row.tolist() == [0, 2]
