"""The parts that score.py keeps: nothing is scored twice, nothing damaged is taken for done, and asking for more
adds."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import ROOT, launch
from malformed import cut, flipped
from safetensors.torch import load_file, save_file

import score
from nanodpo.data.example import SIDES
from nanodpo.errors import RunStopped, UserError
from nanodpo.folder.atomic import MANIFEST, file_facts
from nanodpo.scoring import parts as kept
from nanodpo.scoring import plan, runs

TABLES = ("scores.parquet", "pairs.parquet", "tokens.parquet", "answers.parquet")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Two checkpoints, and four rows of its own with a further column."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [{"prompt": f"What is {i}+{i}? ", "chosen": f"It is {2 * i}", "rejected": "No idea" + "!" * i,
             "third": "Well" * (i + 1)} for i in range(4)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", folder / "d.jsonl", "--max_steps",
           "1", "--learning_rate", "1e-2", "--cache_dir", folder / "cache", "--draw", "false", "--output_dir",
           folder / "run", launcher="fork")
    return folder / "run"


def scored(*flags):
    """Calls score.py; the last flag is the output folder. Returns its tables by name, and the verdict."""
    score.main([*map(str, flags[:-1]), "--output_dir", str(flags[-1])])
    frames = {name: pandas.read_parquet(flags[-1] / name) for name in TABLES if (flags[-1] / name).exists()}
    return frames, json.loads((flags[-1] / "verdict.json").read_text())


def assert_same(one, two):
    assert one[0].keys() == two[0].keys()
    for name, table in one[0].items():
        found = two[0][name].assign(checkpoint=table["checkpoint"])  # a path, which may be another
        pandas.testing.assert_frame_equal(table, found, rtol=1e-5, atol=1e-6, check_like=True)
    assert [line["names"] for line in one[1]] == [line["names"] for line in two[1]]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("score.draw_after", lambda folder: "")
    monkeypatch.setattr("score.page_after", lambda folder: "")


@pytest.fixture
def work(monkeypatch):
    """Counts what is computed: tokens that are scored, pairs whose gradients are taken, answers."""
    done = {"tokens": 0, "pairs": 0, "answers": 0}
    measures, gradients, greedy = score.token_measures, score.gradient_products, score.answers.greedy

    def count(name, function, how_many):
        def counted(*args):
            done[name] += how_many(args)
            return function(*args)
        return counted

    monkeypatch.setattr(score, "token_measures", count("tokens", measures, lambda args: len(args[1].targets)))
    monkeypatch.setattr(score, "gradient_products", count("pairs", gradients, lambda args: 1))
    monkeypatch.setattr(score.answers, "greedy", count("answers", greedy, lambda args: len(args[1])))
    return done


def test_asking_for_more_adds_and_asking_for_less_takes_nothing(run, tmp_path, work):
    """Each kind of result is computed once, stays in the tables, and is what one call that asks for all gives."""
    every = ["--tokens", "--gradients", "--answers", "3", "--responses", "chosen", "rejected", "other", "greedy"]
    once = scored(run, *every, tmp_path / "once")
    sides, others, said = (once[0]["scores.parquet"].query(f"response in {names}")["tokens"].sum()
                           for names in (["chosen", "rejected"], ["other"], ["greedy"]))
    assert work == {"tokens": sides + others + said, "pairs": 2 * 4, "answers": 4 + 2 * 3}
    one = ["--responses", "chosen"]
    steps = [([*one, "rejected"], {"tokens": sides}), ([*one, "rejected", "--gradients"], {"pairs": 8}),
             ([*one, "--answers", "2"], {"answers": 4}), ([*one, "--answers", "3"], {"answers": 2}),
             (["--responses", "other"], {"tokens": others}),
             (["--responses", "greedy"], {"answers": 4, "tokens": said}),
             (one, {}), (every, {"tokens": sides + others + said}), (every, {}), (one, {})]
    for flags, new in steps:
        work.update(tokens=0, pairs=0, answers=0)
        found = scored(run, *flags, tmp_path / "more")
        assert work == {"tokens": 0, "pairs": 0, "answers": 0} | new, flags
        assert_same((found[0], []), ({name: once[0][name] for name in found[0]}, [])) if flags == every else None
    assert_same(found, once)


def test_one_response_more_scores_that_one_alone(run, tmp_path, work):
    before = scored(run, tmp_path)
    work["tokens"] = 0
    after = scored(run, "--responses", "third", "chosen", tmp_path)
    lines = after[0]["scores.parquet"]
    assert work["tokens"] == lines[lines.response == "third"].tokens.sum() > 0
    assert set(lines.response) == {"chosen", "rejected", "other", "shuffled", "third"}
    assert lines[lines.response != "third"].logps.tolist() == pytest.approx(before[0]["scores.parquet"].logps.tolist())


def test_tokens_that_come_later_are_kept_alone(run, tmp_path, capsys):
    """Their scores, and the start's plausible tokens, are there already, which is half of what is asked for."""
    scored(run, "--responses", "chosen", tmp_path)
    before = {*(tmp_path / "parts").glob("*/*")}
    assert "2 parts, 0 of them done before (a part: " in capsys.readouterr().out
    scored(run, "--responses", "chosen", "--tokens", tmp_path)
    assert "2 parts, 0 of them done before, and 50% of the rest (a part: " in capsys.readouterr().out
    scored(run, "--responses", "chosen", "--tokens", tmp_path)
    assert "2 parts, 2 of them done before (a part: " in capsys.readouterr().out
    assert sorted(file.name for file in {*(tmp_path / "parts").glob("*/*")} - before) == [
        MANIFEST, MANIFEST, "tokens.parquet", "tokens.parquet"]


@pytest.mark.parametrize("flags, place", [((), "token_measures"), (("--gradients",), "gradient_products")])
def test_a_stop_within_a_checkpoint_loses_one_micro_batch(run, tmp_path, work, monkeypatch, flags, place):
    """Stopped before each row of each checkpoint: as many are scored in all as if nobody had stopped it."""
    flags = [run, "--responses", "chosen", "rejected", "--max_tokens", "1", *flags]
    whole = scored(*flags, tmp_path / "whole")
    needed = dict(work)
    work.update(tokens=0, pairs=0)
    monkeypatch.setattr(score, "AT_ONCE", 1)
    inner, calls = getattr(score, place), []

    def stopping(*args):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(score, place, stopping)
    for _ in range(20):
        try:
            again = scored(*flags, tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            pass
    assert len(calls) == 2 * 4 + 7 and work == needed
    assert_same(again, whole)


@pytest.mark.parametrize("name, how", [
    *((name, "missing") for name in ("scores", "sections", "pairs", "plausible", "gradients", "answers")),
    ("scores", "cut"), ("pairs", "flipped"), ("scores", "no manifest"), ("answers", "an empty manifest")])
def test_damaged_parts_are_scored_again(scored_all, tmp_path, capsys, name, how):
    """A file that is lost, cut or changed, or the list of what there is: the same numbers, and a line that says so."""
    run, folder, before = scored_all
    shutil.copytree(folder, tmp_path / "out")
    for file in list((tmp_path / "out" / "parts").glob(f"*/{name}.*")):
        if "manifest" in how:
            file = file.with_name(MANIFEST)
            file.unlink() if how == "no manifest" else file.write_text("{}")
        elif how == "missing":
            file.unlink()
        else:
            file.write_bytes({"cut": cut, "flipped": flipped}[how](file.read_bytes()))
    capsys.readouterr()
    assert_same(scored(run, "--answers", "2", "--gradients", tmp_path / "out"), before)
    said = capsys.readouterr().out
    assert ("its rows are scored again" if "manifest" not in how else "damaged, or of another version") in said


@pytest.mark.parametrize("how, words", [
    (lambda held: held | {"rows": [0, 1, 2, 7]}, "manifest.json is damaged; its rows are scored again"),
    (lambda held: held | {"responses": ["other"]}, "manifest.json is damaged; its rows are scored again"),
    (lambda held: held | {"responses": 3}, "manifest.json is damaged; its rows are scored again"),
    (lambda held: held | {"family": []}, "parts are damaged, or of another version"),
    (lambda held: [], "parts are damaged, or of another version")])
def test_a_list_of_rows_that_changed_is_not_believed(scored_all, tmp_path, capsys, how, words):
    """A row that is in the list and not in the tables would be in no table, without a word."""
    run, folder, before = scored_all
    shutil.copytree(folder, tmp_path / "out")
    for file in (tmp_path / "out" / "parts").glob(f"*/{MANIFEST}"):
        facts = json.loads(file.read_text())
        file.write_text(json.dumps(facts | {"holds": {key: how(held) for key, held in facts["holds"].items()}}))
    capsys.readouterr()
    assert_same(scored(run, "--answers", "2", "--gradients", tmp_path / "out"), before)
    assert words in capsys.readouterr().out


@pytest.fixture(scope="module")
def scored_all(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("score.draw_after", lambda folder: "")
        patch.setattr("score.page_after", lambda folder: "")
        return run, folder, scored(run, "--answers", "2", "--gradients", folder)


def test_numbers_that_can_not_be_are_neither_kept_nor_read(run, scored_all, tmp_path, monkeypatch):
    """An entropy that is infinite while the log-prob is not; a part with an infinite log-prob and a right manifest."""
    shutil.copytree(scored_all[1], tmp_path / "out")
    (file, *_) = (tmp_path / "out" / "parts").glob("*/scores.parquet")
    table = pandas.read_parquet(file)
    table.loc[0, "logps"] = float("inf")
    table.to_parquet(file)
    facts = json.loads((file.parent / MANIFEST).read_text())
    facts["files"]["scores.parquet"] = file_facts(file)
    (file.parent / MANIFEST).write_text(json.dumps(facts))
    with pytest.raises(RunStopped, match="scores.parquet: logps of row 0 is inf"):
        scored(run, tmp_path / "out")

    def broken(*args):
        values, *rest = measures(*args)
        values["entropy"][0] = torch.inf
        return values, *rest

    measures = score.token_measures
    monkeypatch.setattr(score, "token_measures", broken)
    with pytest.raises(RunStopped, match="entropy of row . is inf"):
        scored(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_response_is_compared_with_the_start_that_was_scored_likewise():
    """The start has each side alone and both together, from other micro-batches, so with other last digits: chance does
    not choose."""
    data, units = SimpleNamespace(rows_with=lambda unit: ({}, unit)), [("chosen",), ("rejected",), SIDES]
    keys = {plan.response_result("scores", "start", "start", data, unit).key: unit for unit in units}
    parts = SimpleNamespace(sets=lambda key, rows: {(0, side): keys[key] for side in keys[key]})
    for unit in units:
        results = [plan.Result(kind, unit, {}, "", "") for kind in ("scores", "tokens")]
        work = plan.Work(SimpleNamespace(key="later"), data, SimpleNamespace(key="start"), results)
        found = work.start_sets(parts, {0})
        assert [found[0, side] for side in unit] == [unit] * len(unit)


def test_a_result_is_kept_under_all_that_could_change_it():
    """Of scores, tokens and risers two models, two starts and two contents are eight results, and of gradients, which
    have no start, four. An answer is another one where its kind, model, prompt, end or one of its limits is."""
    data = SimpleNamespace(rows_with=lambda unit: ({}, unit))
    kinds, units = ("scores", "tokens", "risers", "gradients"), (SIDES, ("other",))
    keys = [plan.response_result(kind, model, start, data, unit).key for kind in kinds for model in "mn"
            for start in "st" for unit in units]
    assert len({*keys}) == 3 * 8 + 4

    def answer(kind="answers", model="m", **other):
        data = SimpleNamespace(**{"prompts_hash": "p", "limit": 9, "ends": [1], "answer_limit": 5} | other)
        parts = SimpleNamespace(rows=lambda key: set())
        return plan.answer_result(kind, SimpleNamespace(key=model), data, {}, parts, True).key

    others = {"prompts_hash": "q", "limit": 8, "ends": [2], "answer_limit": 6, "kind": "greedy", "model": "n"}
    assert len({answer(), *(answer(**{name: value}) for name, value in others.items())}) == 7


@pytest.mark.parametrize("asked, done, missing", [([], {0, 1}, set()), ([], {0}, None), (["greedy"], {0}, {1})])
def test_greedy_answers_that_nobody_asks_for_are_taken_where_all_are_there(asked, done, missing):
    """Those that a stopped call left in part are not finished for a call that is about others."""
    examples = [SimpleNamespace(row=row) for row in (0, 1)]
    data = SimpleNamespace(asked=asked, examples=examples, prompts_hash="p", limit=9, ends=[1], answer_limit=5)
    parts = SimpleNamespace(rows=lambda key: done, newest=lambda family: "key")
    found = plan.greedy_result(SimpleNamespace(key="m"), data, parts)
    assert (found and found.missing) == missing and (found is None) == (missing is None)


def test_a_rank_reads_the_plausible_tokens_of_its_own_rows(run, tmp_path, monkeypatch):
    """Those of others it would hold for nothing. A part that has none of its rows is not even opened."""
    monkeypatch.setattr(score, "AT_ONCE", 1)
    scored(run, "--responses", "chosen", "--max_tokens", "30", tmp_path)
    opened, read = [], kept.plausible.read
    monkeypatch.setattr(kept.plausible, "read", lambda *args: opened.append(args[0]) or read(*args))
    with kept.Parts(tmp_path / "parts") as parts:
        (key,) = {key for key, its in parts.index.items() for name in its if
                  (tmp_path / "parts" / name / kept.plausible.NAME).exists()}
        every = parts.sets(key, {0, 1, 2, 3})
        count, _ = len(opened), opened.clear()
        assert {*every} == {(row, "chosen") for row in range(4)} and count > 1
        found = parts.sets(key, {1})
    assert {*found} == {(1, "chosen")} and len(opened) == 1
    assert all(torch.equal(a, b) for a, b in zip(found[1, "chosen"], every[1, "chosen"]))


def test_a_lock_of_another_user(tmp_path, monkeypatch):
    """In a folder in which everybody may write: this one can't go on there."""
    denied = PermissionError(errno.EACCES, "Permission denied", "lock")
    monkeypatch.setattr(kept.atomic, "open_lock", lambda place: (_ for _ in ()).throw(denied))
    with pytest.raises(UserError, match=f"^--output_dir {tmp_path}/out: parts/lock can't be written to .Permission "
                                        "denied.; name another folder$"):
        kept.Parts(tmp_path / "out" / "parts")


def test_two_scorings_of_one_folder(run, tmp_path):
    """The second is told so, before it does anything; when the first is gone, it works."""
    with kept.Parts(tmp_path / "out" / "parts"):
        with pytest.raises(UserError, match=f"^--output_dir {tmp_path}/out: another scoring is at work there"):
            scored(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    scored(run, tmp_path / "out")


def test_a_checkpoint_that_is_exchanged_meanwhile(run, tmp_path, monkeypatch):
    """Its numbers are kept under no name: not under what it was, nor what it is. What was done before stays."""
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors"
    first = tmp_path / "run" / "checkpoint-0" / "adapter_model.safetensors"
    work, before = score.score_part, weights.read_bytes()

    def exchanging(*args):
        work(*args)
        shutil.copy(first, weights)

    monkeypatch.setattr(score, "score_part", exchanging)
    with pytest.raises(UserError, match=f"{weights}: has changed while it was scored; .* the same command again"):
        scored(tmp_path / "run", tmp_path / "out")
    assert len(list((tmp_path / "out" / "parts").glob("*/scores.parquet"))) == 1
    with pytest.raises(UserError, match="checkpoint-1: adapter_model.safetensors is not what was written"):
        scored(tmp_path / "run", tmp_path / "out")
    weights.write_bytes(before)
    monkeypatch.setattr(score, "score_part", work)
    assert_same(scored(tmp_path / "run", tmp_path / "out"), scored(run, tmp_path / "undisturbed"))


def test_parts_belong_to_contents_and_not_to_names(run, tmp_path, work, monkeypatch):
    """A run that was moved, by another path, with files of another time: done before. Other weights or rows: not."""
    scored(run, tmp_path / "out")
    shutil.copytree(run, tmp_path / "moved")
    work["tokens"] = 0
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "moved").rglob("*.safetensors"):
        os.utime(file)
    table = scored("./moved", tmp_path / "out")[0]["scores.parquet"]
    assert work["tokens"] == 0 and set(table.run) == {"moved"} and set(table.checkpoint) == {
        "moved/checkpoint-0", "moved/checkpoint-1"}
    shutil.copy(run / "checkpoint-0" / "adapter_model.safetensors", tmp_path / "moved" / "checkpoint-1")
    (tmp_path / "moved" / "checkpoint-1" / MANIFEST).unlink()  # which says that they are another step's
    again = scored("moved", tmp_path / "out")[0]["scores.parquet"]  # these weights are done, under another number
    assert work["tokens"] == 0 and again[again.step == 1].logps.tolist() == again[again.step == 0].logps.tolist()
    rows = (run.parent / "d.jsonl").read_text().replace("It is 6", "It is 7")
    (tmp_path / "e.jsonl").write_text(rows)
    changed = scored("moved", "--dataset_path", "e.jsonl", tmp_path / "out")[0]["scores.parquet"]
    assert work["tokens"] > 0 and set(changed.dataset) == {"e"}


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "within/it.safetensors", "beside.weights"])
def test_weights_that_an_index_names_elsewhere_are_a_models_contents(tiny, run, tmp_path, place):
    """Transformers reads them there; so where they change, the model is scored again."""
    plain, model, data = tmp_path / "plain", tmp_path / "model", f"d={run.parent / 'd.jsonl'}"
    for folder in (plain, model):
        shutil.copytree(tiny / "model", folder)
    weights = load_file(plain / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, place)}))
    (model / place).parent.mkdir(exist_ok=True)
    save = save_file if place.endswith("safetensors") else lambda state, file, _: torch.save(state, file)
    for factor in (1, 1.5):
        changed = {name: tensor * factor for name, tensor in weights.items()}
        save(changed, model / place, {"format": "pt"})
        save_file(changed, plain / "model.safetensors", {"format": "pt"})
        found, right = (scored(folder, "--dataset_path", data, tmp_path / f"of {folder.name}")[0]["scores.parquet"]
                        for folder in (model, plain))
        assert found["logps"].tolist() == pytest.approx(right["logps"].tolist(), rel=1e-6)


def test_a_checkpoint_of_another_step_or_run_is_not_scored_without_a_word(run, tmp_path, capsys):
    """A copy of another step's would be a line of the wrong step in every table; of a run whose run.json is another
    run's, what was scored can be what was meant."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "checkpoint-1", tmp_path / "run" / "checkpoint-2")
    with pytest.raises(UserError, match="run/checkpoint-2: is a copy of checkpoint-1, by its manifest.json; move it"):
        scored(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "run" / "checkpoint-2" / MANIFEST).unlink()
    assert {*scored(tmp_path / "run", tmp_path / "out")[0]["scores.parquet"]["step"]} == {0, 1, 2}
    assert "another run" not in capsys.readouterr().out
    record = json.loads((run / "run.json").read_text())
    record["arguments"]["learning_rate"] = 0.5
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    scored(tmp_path / "run", tmp_path / "out")
    said = capsys.readouterr().out
    for step in (0, 1):
        assert f"run/checkpoint-{step}: was written by another run than {tmp_path}/run/run.json is of, by its" in said


def test_parts_of_another_version_are_not_read(run, tmp_path, work, capsys, monkeypatch):
    scored(run, tmp_path)
    needed, _ = work["tokens"], work.update(tokens=0)
    monkeypatch.setattr(kept, "FORMAT", kept.FORMAT + 1)
    capsys.readouterr()
    scored(run, tmp_path)
    assert "2 parts are damaged, or of another version, and not used" in capsys.readouterr().out
    assert work["tokens"] == needed


def test_what_is_lost_with_parts_of_another_version_is_not_said_to_come_from_them(run, tmp_path, capsys, monkeypatch):
    scored(run, "--tokens", tmp_path)
    monkeypatch.setattr(kept, "FORMAT", kept.FORMAT + 1)
    capsys.readouterr()
    scored(run, tmp_path)
    said = capsys.readouterr().out
    assert said.index("keep what is scored again now, and lose the rest") < said.index("parts, 0 of them done")
    assert "no longer in" in said and "tokens.parquet" in said.split("no longer in")[1] and "from parts/" not in said
    assert len(scored(run, "--tokens", tmp_path)[0]["tokens.parquet"])
    assert "no longer in" not in capsys.readouterr().out


def test_tables_are_written_anew_from_the_parts(run, tmp_path, work):
    """A change of scores.parquet by somebody is gone after the next call, and counts for nothing."""
    before = scored(run, tmp_path)
    table = before[0]["scores.parquet"]
    table.assign(logps=0.0).to_parquet(tmp_path / "scores.parquet")
    work["tokens"] = 0
    assert_same(scored(run, tmp_path), before)
    assert work["tokens"] == 0


def test_tables_are_of_one_scoring_whatever_ends_the_next(run, tmp_path, monkeypatch):
    """A disk that fills in the tokens of other data: scores of these beside tokens of the first would be drawn as one.
    """
    scored(run, "--tokens", tmp_path)
    files = [file for file in tmp_path.iterdir() if file.suffix in (".parquet", ".csv", ".json")]
    before = {file: file.read_bytes() for file in files}
    rows = [json.loads(line) | {"prompt": "Why? "} for line in (run.parent / "d.jsonl").read_text().splitlines()]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.ParquetWriter", full)  # pandas has its own name for it
        with pytest.raises(RunStopped, match="tokens.parquet: can't be written"):
            scored(run, "--dataset_path", f"train={tmp_path / 'other.jsonl'}", "--tokens", tmp_path)
    assert {file: file.read_bytes() for file in files} == before and not list(tmp_path.glob(".*"))
    scored(run, "--dataset_path", f"train={tmp_path / 'other.jsonl'}", "--tokens", tmp_path)
    assert all(file.read_bytes() != before[file] for file in files if file.stem in ("scores", "tokens", "pairs"))


def test_what_another_device_or_library_computed_is_not_taken(monkeypatch):
    """It rounds otherwise: tables of both would be a mix."""
    settings = SimpleNamespace(bf16=False, load_in_4bit=False, load_in_8bit=False)
    files = SimpleNamespace(key="weights")
    keys = []
    for device, version in (("cpu", "1"), ("cpu", "2"), ("cuda", "2")):
        monkeypatch.setattr(runs, "device_name", lambda _, name=device: name)
        monkeypatch.setattr(runs, "versions", lambda number=version: {"torch": number})
        runs.machine.cache_clear()
        keys.append(runs.Checkpoint("r", "dpo", 0, "r/checkpoint-0", settings, contents=files, base=files).key)
    runs.machine.cache_clear()
    assert len({*keys}) == 3
