"""main() as a function: one run after the other in a process that lives on, as in a notebook."""

import importlib.util
import json
import os
import signal
import time

import pytest
from conftest import ROOT, forked, lines_of, zero

from nanodpo.errors import Preempted, RunStopped, UserError
from nanodpo.folder.atomic import file_facts
from nanodpo.run import signals


def flags(tiny, run, *more) -> list[str]:
    return [str(word) for word in (
        "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir", run, "--cache_dir",
        f"{run}-cache", "--draw", "false", "--max_steps", "4", "--eval_size", "3", "--learning_rate", "1e-3", *more)]


def result(run) -> tuple[list[dict], dict]:
    """The lines of metrics.jsonl without times, and a hash of every file of a checkpoint."""
    return lines_of(run), {f"{file.parent.name}/{file.name}": file_facts(file) for file in run.glob("checkpoint-*/*")
                   if file.name != "manifest.json"}


def test_runs_in_one_process_are_those_of_processes_of_their_own(tiny, tmp_path):
    """To the last bit: DPO with ZeRO-3, whose matrix product DeepSpeed puts into torch for good; SFT of all weights; a
    wrong flag; a run that is stopped by hand and goes on; and a scoring, which must not take itself for a rank."""
    kinds = {"first": ["--deepspeed", zero(tmp_path, 3)],
             "second": ["--loss", "sft", "--use_lora", "false", "--seed", "7", "--deepspeed", zero(tmp_path, 0)],
             "third": ["--beta", "0.3", "--gradient_accumulation_steps", "2", "--lora_dropout", "0.1",
                       "--allow_dropout"]}
    for name, more in kinds.items():
        assert forked(ROOT / "train.py", *flags(tiny, tmp_path / "alone" / name, *more))[0] == [0]
    again = {name: flags(tiny, tmp_path / "notebook" / name, *more) for name, more in kinds.items()}
    cells = [["train", again["first"], False], ["train", [*again["second"], "--lerning_rate", "1"], False],
             ["train", again["second"], False], ["train", again["third"], True], ["train", again["third"], False],
             ["train", again["third"], False], ["score", [str(tmp_path / "notebook" / "third")], False]]
    codes, said = forked(ROOT / "tests" / "notebook.py", json.dumps(cells))
    ends = [line for line in said.splitlines() if line.startswith("cell: ")]
    assert codes == [0] and "the kernel lives" in said, said[-3000:]
    assert ends[0] == "cell: done" and ends[2] == "cell: done" and ends[4:] == ["cell: done"] * 3
    assert ends[1].startswith("cell: UserError: unknown argument --lerning_rate: did you mean --learning_rate?")
    assert ends[3].startswith("cell: Preempted: stopped by SIGINT after 2 of 4 steps; to go on: the same command")
    for name in kinds:
        assert result(tmp_path / "notebook" / name) == result(tmp_path / "alone" / name), name
    command = json.loads((tmp_path / "notebook" / "second" / "run.json").read_text())["command"]
    assert command.startswith(f"{ROOT / 'train.py'} --model_name ") and "--seed 7" in command


def test_the_stop_button_never_ends_the_kernel(monkeypatch):
    """Pressed once, a run saves and stops; again, however late, it stops where it is. Not even what hangs is ended."""
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals.Stop() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        stop.since -= 2 * signals.GRACE
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    monkeypatch.setattr(signals, "REACT", 0.1)
    with pytest.raises(Preempted), signals.Stop():  # before there is anything to save
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            time.sleep(1.5)
    assert ends == [] and signal.getsignal(signal.SIGINT) == before


def test_a_notebook_shows_a_mistake_in_a_line():
    """IPython asks an exception for its own words."""
    for kind in (UserError, RunStopped, Preempted):
        assert kind("--beta 0: must\nbe above 0")._render_traceback_() == [
            f"{kind.__name__}: --beta 0: must be above 0"]


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))),
                    reason="no kernel of notebooks here: pip install nbclient ipykernel")
def test_a_notebook_in_a_kernel_of_its_own(tiny, tmp_path, monkeypatch):
    """Cells executed by nbclient: a run; the same with a wrong flag, of which the notebook keeps one line; and a
    scoring. The run's files are those of a process of its own."""
    import nbformat
    from nbclient import NotebookClient

    given, again = (flags(tiny, tmp_path / name / "run") for name in ("alone", "notebook"))
    assert forked(ROOT / "train.py", *given)[0] == [0]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [nbformat.v4.new_code_cell(text) for text in (
        f"import score, train\ntrain.main({again})", f"train.main({[*again, '--lerning_rate', '1']})",
        f"score.main({[str(tmp_path / 'notebook' / 'run')]})")]
    cells[1].metadata["tags"] = ["raises-exception"]  # nbclient then goes on, as a reader does
    NotebookClient(book := nbformat.v4.new_notebook(cells=cells), timeout=300).execute()
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert f"done: {tmp_path / 'notebook' / 'run'}" in said[0] and "scores.parquet" in said[2]
    (error,) = [output for output in cells[1].outputs if output.output_type == "error"]
    assert error.traceback == ["UserError: unknown argument --lerning_rate: did you mean --learning_rate?"], book
    assert result(tmp_path / "notebook" / "run") == result(tmp_path / "alone" / "run")
