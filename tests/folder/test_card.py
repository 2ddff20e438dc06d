"""The model card and the log beside a checkpoint's weights, as the hub's own library and a reader of JSON find them."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT, launch, train
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import TrainerState

from nanodpo.data.tokens import DataSet
from nanodpo.folder import log as run_log
from nanodpo.folder.atomic import check_whole
from nanodpo.folder.card import MOST, History, license_of, model_card, texts
from nanodpo.scoring.contents import Contents

FACTS = {"arguments": {"loss": "dpo", "beta": 0.1, "learning_rate": 1e-5, "train_file_path": "org/pairs:main",
                       "eval_file_path": "/home/me/secret/held.jsonl", "logging_steps": 2,
                       "eval_steps": 4, "save_steps": 0},
         "data_report": ["data org/pairs:main: 8 rows, 0 dropped\n  columns: prompt = p",
                         "data /home/me/secret/held.jsonl: 4 rows, 1 dropped"],
         "steps": 6, "world_size": 2, "device": "cpu", "versions": {"torch": "2"}}


def test_a_hub_reads_the_head_and_no_folder_of_this_machine_is_in_it():
    text = model_card(FACTS, 4, [], "org/base-1B", SimpleNamespace(use_rslora=True))
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.datasets) == ("org/base-1B", "peft", ["org/pairs"])
    assert data.tags == ["nanodpo", "dpo", "lora"] and data.pipeline_tag == "text-generation" and data.license is None
    assert "/home" not in text and "\n- org/pairs:main: 8 rows" in text
    assert "\n- held out: held.jsonl: 4 rows, 1 dropped\n" in text
    assert "arXiv 2305.18290" in text and "lora_alpha / sqrt(r)" in text
    assert "sqrt" not in model_card(FACTS, 4, [], "org/base-1B", SimpleNamespace(use_rslora=False))


def test_all_data_sets_are_named_and_files_of_this_machine_by_their_last_part():
    """Several with commas between, with revision, config and split."""
    names = "org/pairs@v2:cfg:train[:10%],/home/me/a.jsonl,other/more"
    facts = FACTS | {"arguments": FACTS["arguments"] | {"train_file_path": names, "eval_file_path": None},
                     "data_report": [f"data {names}: 9 rows, 0 dropped"]}
    text = model_card(facts, 4, [], "org/base-1B")
    assert ModelCard(text).data.datasets == ["org/pairs", "other/more"]
    assert "- org/pairs@v2:cfg:train[:10%],a.jsonl,other/more: 9 rows, 0 dropped" in text and "/home" not in text


def test_a_file_may_have_an_end_of_line_in_its_name():
    data = DataSet("/home/me/a\nb: c.jsonl", [], [], Counter(), columns="columns: prompt")
    facts = FACTS | {"data_report": [data.report()]}
    assert "\n- a b: c.jsonl: 0 rows, 0 dropped; columns: prompt\n" in model_card(facts, 4, [], "org/base-1B")


def test_a_base_may_have_an_end_of_line_in_its_name():
    """Markdown would make a heading of what stands above ---, and a paragraph of the rest."""
    body = model_card(FACTS, 4, [], "/home/me/a\n---\nlicense: mit").split("\n---\n", 1)[1].split("\n")
    assert "# a --- license: mit, dpo, step 4 of 6" in body and "---" not in body


def test_a_setting_with_bars_is_one_cell():
    """A bar ends a cell: of .*(q|v)_proj a reader of Markdown would show .*(q."""
    facts = FACTS | {"arguments": FACTS["arguments"] | {"lora_target_modules": ".*(q|v)_proj"}}
    assert r"| lora_target_modules | .*(q\|v)_proj |" in model_card(facts, 4, [], "org/base-1B").splitlines()


def test_a_local_base_is_named_by_its_folder_and_its_license_is_handed_on(tmp_path):
    """A hub takes no path for a base model; a license holds for what is made from the model."""
    base = tmp_path / "my-base"
    base.mkdir()
    assert license_of(str(base)) is None
    (base / "README.md").write_text("---\nlicense: 'mit'\n---\n")
    assert license_of(str(base)) == "mit"
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\nlicense: none\n")
    text = model_card(FACTS | {"license": license_of(str(base))}, 4, [], str(base))
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == (None, "apache-2.0", "transformers")
    assert "my-base, dpo, step 4 of 6" in text and str(tmp_path) not in text


@pytest.mark.parametrize("step, kept", [(0, ""), (1, "e0 t1=8"), (4, "e0 t2=7 t4=3 e4"),
                                        (5, "e0 t2=7 t4=3 e4 t5=0")])
def test_the_log_of_a_checkpoint_is_what_led_to_it(step, kept, tmp_path):
    """As Trainer writes it: of two steps each the means, under the number of updates that are done, and what is left
    at the end; evaluations up to it; nothing that depends on the machine's speed. Four steps are an epoch."""
    last = ("learning_rate", "grad_norm", "num_tokens", "skipped_steps")  # those of the step before the checkpoint
    lines = [{"step": k, "epoch": k / 4, "loss": 8.0 - 2 * k, "perf/step_seconds": 1.0, "mem/peak_gib": 2.0}
             | dict.fromkeys(last, float(k)) for k in range(6)]
    lines[0:0] = [{"step": 0, "epoch": 0.0, "eval_loss": 0.7}]
    lines[5:5] = [{"step": 4, "epoch": 1.0, "eval_loss": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = History(tmp_path, FACTS).until(step)
    assert " ".join(f"e{line['step']}" if "eval_loss" in line else f"t{line['step']}={line['loss']:g}"
                    for line in log) == kept
    assert all(line.keys() <= {"step", "epoch", "loss", "eval_loss", *last} for line in log)
    assert all(line[name] == line["step"] - 1 for line in log if "loss" in line for name in last)
    assert step == 1 or all(line["epoch"] == line["step"] / 4 for line in log)  # one step does not tell an epoch


@pytest.mark.parametrize("norm, rate, updates", [(1.0, 0.0, False), (0.0, 1e-3, False), (1.0, 1e-3, True)])
def test_a_step_without_gradient_or_learning_rate_updates_nothing(norm, rate, updates, tmp_path):
    """As the first of a warm-up: the checkpoint behind it may have the weights that the run began with."""
    line = {"step": 0, "loss": 1.0, "grad_norm": norm, "learning_rate": rate}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
    history = History(tmp_path, FACTS)
    history.until(1)
    assert history.has_updates is updates


def log_of(file, steps: range, every: int = 10) -> None:
    """Appends lines of training, each after its evaluation where there is one."""
    with file.open("a") as out:
        for k in steps:
            lines = [{"step": k, "epoch": k / 500, "eval_loss": float(k)}] * (k % every == 0)
            for line in [*lines, {"step": k, "epoch": k / 500, "loss": float(k), "num_tokens": k}]:
                out.write(json.dumps(line) + "\n")


def test_a_long_log_is_read_once_however_often_it_is_saved(tmp_path, monkeypatch):
    """40 checkpoints and states of 2,000 steps; each is what somebody writes who reads the log anew, and the hash is
    that of earlier versions."""
    read, loads = [], json.loads
    monkeypatch.setattr(run_log.json, "loads", lambda text: read.append(text) or loads(text))
    facts = FACTS | {"steps": 2000, "arguments": FACTS["arguments"] | {"eval_steps": 10, "logging_steps": 3}}
    history, log = History(tmp_path, facts), run_log.LogHash(run_log.Log(tmp_path).new_lines)
    file, found = tmp_path / "metrics.jsonl", {}
    assert history.until(0) == []
    for step in range(50, 2001, 50):
        log_of(file, range(step - 50, step), 10**9)
        with file.open("a") as out:  # as before a checkpoint: its own evaluation, and half a line
            out.write(json.dumps({"step": step, "epoch": step / 500, "eval_loss": 1.0}) + '\n{"step": ')
        found[step] = texts(facts, step, history, "org/base"), log.before(step)
        os.truncate(file, file.stat().st_size - len('{"step": '))
    lines = run_log.read_lines(tmp_path)
    assert len(read) == 3 * len(lines)  # by each of three readers once
    before = json.dumps([run_log.timeless(line) for _, line in lines if line["step"] < 850], sort_keys=True)
    assert found[850][1] == hashlib.sha256(before.encode()).hexdigest()
    assert all(found[step] == (texts(facts, step, History(tmp_path, facts), "org/base"), run_log.LogHash(
        lambda: lines).before(step)) for step in (50, 850, 2000))


@pytest.mark.parametrize("every, shown", [(1, 3), (2, 4), (50, 50)])
def test_the_log_of_a_long_run_has_a_thousand_entries_at_most(every, shown, tmp_path):
    """Means over more steps than --logging_steps, which the file says: 2,500 steps are 834 windows of 3."""
    log_of(tmp_path / "metrics.jsonl", range(2500), 10**9)
    facts = FACTS | {"steps": 2500, "arguments": FACTS["arguments"] | {"eval_steps": 0, "logging_steps": every}}
    state = json.loads(texts(facts, 2500, History(tmp_path, facts), "base")["trainer_state.json"])
    means = [line for line in state["log_history"] if "loss" in line]
    assert state["logging_steps"] == shown and len(means) == -(-2500 // shown) <= 1000
    assert [line["loss"] for line in means[:2]] == [(shown - 1) / 2, (shown - 1) / 2 + shown]
    assert [line["step"] for line in means[:2]] == [shown, 2 * shown]


def test_evaluations_of_a_long_run_are_thinned_alike(tmp_path):
    """As the file says, which transformers opens; the last one stays."""
    facts = FACTS | {"steps": 5200, "arguments": FACTS["arguments"] | {"eval_steps": 2, "logging_steps": 1}}
    log_of(tmp_path / "metrics.jsonl", range(5201), 2)
    for name, text in texts(facts, 5200, History(tmp_path, facts), "base").items():
        (tmp_path / name).write_text(text)
    state = TrainerState.load_from_json(tmp_path / "trainer_state.json")
    assert (state.logging_steps, state.eval_steps, state.global_step, state.epoch) == (6, 6, 5200, 10.4)
    means = [line for line in state.log_history if "loss" in line]
    assert [line["step"] for line in means] == [*range(6, 5200, 6), 5200] and len(means) <= MOST
    assert [line["loss"] for line in means[:2]] == [2.5, 8.5] and means[-1]["loss"] == 5197.5
    evals = [line["step"] for line in state.log_history if "eval_loss" in line]
    assert evals == [*range(0, 5200, 6), 5200] and state.log_history[-1]["step"] == 5200


def test_every_checkpoint_and_the_merged_model_have_both(tiny, tmp_path):
    """Their numbers are those of metrics.jsonl; transformers and PEFT open the folders as before."""
    lines = train(tiny, tmp_path / "run", "--max_steps", "2", "--save_steps", "1", "--eval_size", "3",
                  "--merge_weights", "true", "--logging_steps", "1")
    for name in ("checkpoint-0", "checkpoint-1", "checkpoint-2", "merged"):
        folder = tmp_path / "run" / name
        assert ModelCard((folder / "README.md").read_text()).data.library_name == (
            "transformers" if name == "merged" else "peft")
        with safe_open(next(folder.glob("*.safetensors")), "pt") as weights:
            assert len(weights.keys()) > 5
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 2
    assert [line.get("loss", line.get("eval_loss")) for line in state["log_history"]] == [
        line.get("loss", line.get("eval_loss")) for line in lines]
    opened = TrainerState.load_from_json(folder / "trainer_state.json")
    assert (opened.epoch, opened.logging_steps, opened.global_step) == (2 / 8, 1, 2)
    evals = [line for line in lines if "eval_loss" in line]
    text = (folder / "README.md").read_text()
    assert f"| loss | {evals[0]['eval_loss']:.4f} | {evals[-1]['eval_loss']:.4f} |" in text
    launch(ROOT / "score.py", tmp_path / "run" / "merged", "--dataset_path", tiny / "train.jsonl", "--output_dir",
           tmp_path / "scores", launcher="fork")


def test_a_card_shows_the_figure_of_its_run(tiny, tmp_path):
    """It lies beside the card, and is the run's own, also in a merged model that is made later. Without a figure there
    is no link, and what the user has written since stays."""
    flags, run = ("--max_steps", "2", "--save_steps", "1"), tmp_path / "run"
    train(tiny, run, *flags)
    assert "training.png" not in (run / "checkpoint-2" / "README.md").read_text()
    again = (ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
             "--output_dir", run, *flags)
    again = (*again, "--draw", "true")
    launch(*again, launcher="fork")
    (run / "checkpoint-1" / "README.md").write_text("my own words")
    launch(*again, "--merge_weights", launcher="fork")
    for name in ("checkpoint-0", "checkpoint-2", "merged"):
        text = (run / name / "README.md").read_text()
        assert text.count("](training.png)") == 1 and ModelCard(text).data.tags[:2] == ["nanodpo", "dpo"]
        assert "https://arxiv.org/abs/2305.18290" in text
        assert (run / name / "training.png").samefile(run / "training.png"), "on the disk it is there once"
        assert check_whole(run / name)
    assert (run / "checkpoint-1" / "README.md").read_text() == "my own words"


def test_a_run_learns_the_license_of_its_base_once(tiny, tmp_path):
    """All its cards say the same, also that of a model which is merged later."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny / "model", base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    train(tmp_path, run, "--train_file_path", tiny / "train.jsonl", "--max_steps", "1", model="base")
    (base / "README.md").write_text("---\nlicense: other\n---\n")
    train(tmp_path, run, "--train_file_path", tiny / "train.jsonl", "--max_steps", "1", "--merge_weights",
          model="base")
    for name in ("checkpoint-0", "checkpoint-1", "merged"):
        assert ModelCard((run / name / "README.md").read_text()).data.license == "mit"


def test_a_card_may_be_edited_and_its_numbers_are_those_of_the_weights(tiny, tmp_path):
    """A text written beside the weights is no part of a checkpoint's manifest, nor of the key of its scores."""
    train(tiny, tmp_path / "run", "--max_steps", "2", "--save_steps", "1")
    folder = tmp_path / "run" / "checkpoint-1"
    before = Contents(str(folder)).key
    (folder / "README.md").write_text("my own words")
    (folder / "trainer_state.json").unlink()
    assert check_whole(folder) and Contents(str(folder)).key == before


def test_a_line_is_whole_json(tmp_path):
    for step in range(2):
        run_log.append_line(tmp_path / "metrics.jsonl", {"step": step, "loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.5}]
    with pytest.raises(ValueError):  # NaN is no JSON, and other programs refuse a file that holds it
        run_log.append_line(tmp_path / "metrics.jsonl", {"step": 2, "loss": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines
