"""Output to a terminal: nothing that acts on it, whoever wrote it."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, environment, forked, launch, train

import plot
import score
import train as trainer
from nanodpo import progress
from nanodpo.data import encoding
from nanodpo.errors import run_script
from nanodpo.scoring import answers
from nanodpo.screen import command_line, escape_all_output, folded, printable, put

EVIL = "\x1b]0;OWNED\x07\x1b[2J\r\x9b31m\u202e"
SHOWN = r"\x1b]0;OWNED\x07\x1b[2J\r\x9b31m\u202e"


@pytest.fixture(autouse=True)
def own_hooks(monkeypatch):
    """The hooks that `escape_all_output` sets are gone after each test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


@pytest.mark.parametrize("flags, where, code, said", [
    ("--print_config", ">/dev/full", 1, "error: the output can't be written (No space left on device); "),
    ("--print_config", ">/dev/full 2>/dev/full", 1, ""), ("--beta -1", "2>/dev/full", 2, ""),
    ("--inspect", ">&-", 0, ""), ("--inspect", "<&- >&- 2>&-", 0, "")])
def test_an_output_that_is_full_or_closed(flags, where, code, said):
    """One line, where it can be written, and the exit code; where nobody wants the output there is no error."""
    command = f"exec {sys.executable} {ROOT / 'train.py'} {flags} {where}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def acts(text: str) -> bool:
    """Is there a character that a terminal would obey, but for the end of a line and a tab?"""
    return re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text) is not None


def said(main, capfd, *flags) -> str:
    """All that a script prints, with its exit code in the last line."""
    sys.argv[1:] = map(str, flags)
    code = run_script(main)
    out, err = capfd.readouterr()
    assert not acts(out) and not acts(err), (out, err)
    return f"{out}{err}{code}"


def test_what_acts_is_shown(capsys):
    assert acts(EVIL) and printable(EVIL) == SHOWN
    put("name", EVIL, 3)
    put(EVIL, file=sys.stderr)
    out, err = capsys.readouterr()
    assert out == f"name {SHOWN} 3\n" and err == f"{SHOWN}\n"


def test_what_libraries_say_is_shown(capsys, monkeypatch):
    """Warnings, log records and tracebacks may quote names from files."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    escape_all_output()
    text = warnings.formatwarning(EVIL, UserWarning, f"{EVIL}.py", 3, EVIL)
    assert SHOWN in text and f"{SHOWN}.py" in text and not acts(text)
    handler = logging.StreamHandler(sys.stderr)
    handler.handle(logging.getLogger("library").makeRecord("library", 30, "f", 1, "model %s", (EVIL,), None))
    assert capsys.readouterr().err == f"model {SHOWN}\n"
    try:
        raise KeyError(EVIL) from OSError(EVIL)
    except KeyError as error:
        sys.excepthook(KeyError, error, error.__traceback__)
    found = capsys.readouterr().err
    assert "Traceback" in found and SHOWN in found and not acts(found)


def test_a_terminal_that_lacks_a_character_gets_its_escape():
    """In place of a traceback about the terminal's encoding."""
    code = "from nanodpo.errors import run_script; from nanodpo.screen import put; run_script(lambda _: put('\\u4f60'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment() | {"PYTHONIOENCODING": "ascii"})
    assert done.stdout == "\\u4f60\n" and not done.stderr


# Every place where a script shows what somebody else wrote


@pytest.fixture
def finished(tiny, tmp_path):
    train(tiny, tmp_path / "run", "--max_steps", "1", "--eval_size", "2")
    return tmp_path / "run"


def again(tiny, run):
    return ("--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir", run,
            "--cache_dir", run.parent / "cache", "--draw", "false", "--max_steps", 1, "--eval_size", 2)


def test_run_json_and_manifests(tiny, finished, capfd):
    file = finished / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"steps": EVIL}))
    assert "run.json" in said(trainer.main, capfd, *again(tiny, finished))
    file.write_text(json.dumps(record | {"finished": False, "git_commit": EVIL}))
    shown = launch(ROOT / "train.py", *again(tiny, finished), launcher="fork").stdout
    assert f"git_commit: {SHOWN} -> " in shown and not acts(shown)
    file.write_text(json.dumps(record | {"world_size": 1, "data": [EVIL]}))
    assert "holds a run with other settings" in said(trainer.main, capfd, *again(tiny, finished))
    manifest = finished / "checkpoint-1" / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"files": {EVIL: {"bytes": 1, "sha256": ""}}}))
    file.write_text(json.dumps(record))
    assert "OWNED" in said(score.main, capfd, finished)


def test_data_rows_and_why_they_are_dropped(tiny, tmp_path, capfd):
    rows = [{"prompt": f"hi{EVIL}", "chosen": f"a{EVIL}", "rejected": "b"},
            {"prompt": "x", "chosen": [{"role": f"a\n{EVIL}", "content": "c"}], "rejected": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--model_name", tiny / "model", "--train_file_path", tmp_path / "rows.jsonl"
    found = said(trainer.main, capfd, *flags, "--inspect")
    assert r"hi\x1b]0;OWNED" in found and "dropped row 1: " in found and found.endswith("0")
    assert said(trainer.main, capfd, *flags).endswith("2")


def test_names_of_files_runs_and_columns(tiny, finished, tmp_path, capfd):
    for name in (EVIL, f"x{EVIL}.yaml"):
        assert said(trainer.main, capfd, name, "--model_name", "M", "--train_file_path", "D").endswith("2")
    assert said(trainer.main, capfd, "--print_config", "--model_name", EVIL, "--train_file_path", "D").endswith("0")
    (tmp_path / "rows.jsonl").write_text(json.dumps({EVIL: 1}) + "\n")
    assert "OWNED" in said(trainer.main, capfd, "--model_name", tiny / "model", "--train_file_path",
                           tmp_path / "rows.jsonl")
    assert SHOWN in said(score.main, capfd, finished, "--dataset_path", f"{EVIL}={tiny / 'train.jsonl'}",
                         "--output_dir", tmp_path / "scores")
    assert "OWNED" in said(plot.main, capfd, "--scores", tmp_path / "scores" / "scores.parquet")
    assert "OWNED" in said(plot.main, capfd, f"no{EVIL}")


# A bar on a terminal of 80 columns, lines without one


class Terminal:
    """The text on a screen after these bytes: rows of text, as a terminal of so many columns shows them."""

    def __init__(self, stream: str, columns: int):
        self.rows, row, column = {}, 0, 0
        for piece in re.findall(r"\x1b\[\d*[A-Za-z]|.", stream, re.DOTALL):
            if piece == "\x1b[A":
                row -= 1
            elif piece in "\r\n":
                row, column = row + (piece == "\n"), column if piece == "\n" else 0
            else:
                assert len(piece) == 1 and column < columns, (piece, column, self.rows.get(row))
                line = self.rows.get(row, "").ljust(column)
                self.rows[row], column = line[:column] + piece + line[column + 1 :], column + 1

    @property
    def text(self) -> list[str]:
        return [line for _, line in sorted((row, line.rstrip()) for row, line in self.rows.items()) if line]


WORK = """
import time
from nanodpo.progress import Progress, show, track
from nanodpo.screen import put

means = {"loss": 0.69314, "rewards/margins": 12.3456, "rewards/accuracies": 1.0, "perf/tokens_per_second": 1234567.8}
with Progress("training", 12_000, "step", 11_980) as bar:
    for step in range(11_980, 12_000):
        time.sleep(0.06)
        show(bar, {"step": step, **means}, step % 5 == 0)
        if step % 10 == 0:
            for batch in track(range(3), "evaluation", "batch"):
                time.sleep(0.4)
            put(f"step {step}  held out: after a bar of its own")
"""


def test_what_a_start_says_fits_80_columns(tiny, tmp_path):
    """Many columns that nobody reads, a mixture, and all layers that have LoRA; only names of files may be longer."""
    names = [f"a-column-with-a-long-name-{i}" for i in range(12)]
    rows = [{"question": f"{i}?", "text": "4", "worse-text": "no"} | dict.fromkeys(names, "x") for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model_name", tiny / "model", "--train_file_path", f"{data},{data}", "--mix_weights", "1,0.5",
             "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--draw", "false", "--max_steps", "1")
    start = launch(ROOT / "train.py", *flags, launcher="fork").stdout.partition("\nstep ")[0]
    assert all(len(line) <= 80 or "/" in line for line in start.splitlines()), start
    for name in (*names, "gate_proj", "batches: ", "reference: ", "attention: "):
        assert name in start
    report = json.loads((tmp_path / "run" / "run.json").read_text())["data_report"][0]
    assert f"not read: {', '.join(names)}" in report  # on the card it is one line


def test_long_lines_are_broken_between_words():
    line = "data /a/path with/spaces: " + "word " * 20
    first, *rest = folded(line).splitlines()
    assert rest and all(len(part) <= 80 for part in (first, *rest)) and all(part.startswith("  ") for part in rest)
    assert " ".join(part.strip() for part in (first, *rest)) == line.strip()
    path = f"  10 rows: 8 of /tmp/{'x' * 50}/a.jsonl, 2 of b.jsonl and so on and so on"
    assert folded(path) == path and folded("x" * 100) == "x" * 100 and folded("a\n\n  b") == "a\n\n  b"


def test_bars_fit_80_columns_and_no_line_is_glued_to_one():
    """The stream is played back: wherever a bar was, each line stands alone, and nothing is left of the bars."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", WORK], stdout=theirs, stderr=theirs, env=environment(), cwd=ROOT)
    os.close(theirs)
    stream = b""
    try:
        while part := os.read(ours, 65536):
            stream += part
    except OSError:  # how a terminal without a process ends
        pass
    os.close(ours)
    assert process.wait(60) == 0
    stream = stream.decode()
    assert re.search(r"training: .*%.*/12000 \[.*loss 0.6931\]", stream) and "evaluation: " in stream
    shown = "  loss 0.6931  margin 12.3456  accuracy 1.0000  1,234,568 tokens/s"
    assert Terminal(stream, 80).text == [
        line for step in range(11_980, 12_000, 5) for line in [
            f"step {step:>5}{shown}", f"step {step}  held out: after a bar of its own"][: 2 - step % 10 // 5]]


def test_without_a_terminal_there_is_a_line_every_half_minute(monkeypatch, capsys):
    """10 of 70 pairs that took 2 minutes leave 60, which take 12."""
    now = iter(range(0, 10_000, 12))
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    next(now)
    with progress.Progress("reference", 80, "pair", 10) as bar:
        for _ in range(10):
            clock[0] = float(next(now))
            bar.update()
    assert capsys.readouterr().out == "".join(
        f"reference: {done} of 80 pairs, 12.0 s a pair, 0:{spent // 60:02}:{spent % 60:02} so far, about 0:{left:02}:"
        f"{rest:02} to go\n" for done, spent, left, rest in ((13, 36, 13, 24), (16, 72, 12, 48), (19, 108, 12, 12)))


def test_loading_a_model_is_no_row_s_time(monkeypatch, capsys):
    """40 s until the first model is there, then 5 s a row: 14 rows take 70 s more. Loading the next one counts."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress("scoring", 20, "row") as bar:
        clock[0] += 40.0
        bar.begin()
        for row in range(10):
            clock[0] += 5.0 + (row == 6) * 13.0
            if row == 6:
                bar.begin()
            bar.update()
    assert capsys.readouterr().out.splitlines() == [
        "scoring: 1 of 20 rows, 5.0 s a row, 0:00:05 so far, about 0:01:35 to go",
        "scoring: 7 of 20 rows, 6.9 s a row, 0:00:48 so far, about 0:01:29 to go"]


def test_a_work_of_unknown_size_says_how_much_is_done(monkeypatch, capsys):
    """Lines of a packed file: nobody knows how many follow. A short reading says nothing."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress("reading", None, "row") as bar:
        for _ in range(7):
            clock[0] += 10.0
            bar.update(500)
    assert capsys.readouterr().out.splitlines() == ["reading: 1,500 rows, 0.02 s a row, 0:00:30 so far",
                                                    "reading: 3,000 rows, 0.02 s a row, 0:01:00 so far"]


def test_without_a_terminal_a_step_says_how_far_the_run_is(monkeypatch, capsys):
    """Steps that are not printed are counted every half minute all the same; a printed one counts as such a line."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    line = {"loss": 0.5, "rewards/margins": 1.0, "rewards/accuracies": 1.0, "perf/tokens_per_second": 99.0}
    with progress.Progress("training", 100, "step", 20) as bar:
        for step in range(20, 26):
            clock[0] += 20.0
            progress.show(bar, {"step": step, **line}, step == 23)
    assert capsys.readouterr().out.splitlines() == [
        "training: 22 of 100 steps, 20.0 s a step, 0:00:40 so far, about 0:26:00 to go",
        "step    23  loss 0.5000  margin 1.0000  accuracy 1.0000  99 tokens/s, 20.0 s a step, 0:01:20 so far, about "
        "0:25:20 to go",
        "training: 26 of 100 steps, 20.0 s a step, 0:02:00 so far, about 0:24:40 to go"]


@pytest.mark.parametrize("elsewhere", ["stdout", "stderr"])
def test_no_bar_where_lines_and_bar_go_to_two_places(elsewhere, monkeypatch, capsys):
    """As with `| tee log`: a line would be glued to the end of the bar."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda name=name: name != elsewhere, raising=False)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.Progress("work", 3, "item") as bar:
        bar.update()
    out, err = capsys.readouterr()
    assert bar.bar.disable and out.startswith("work: 1 of 3 items, ") and err == ""


def test_a_notebook_has_a_bar_and_no_lines(monkeypatch, capsys):
    """Though its output is no terminal."""
    monkeypatch.setattr(progress, "NOTEBOOK", True)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.Progress("work", 3, "item") as bar:
        bar.update()
        assert not bar.bar.disable and bar.bar.n == 1
    assert capsys.readouterr().out == ""


def test_only_rank_0_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(progress.track(range(5), "work", "item")) == [*range(5)] and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert list(progress.track(range(5), "work", "item")) == [*range(5)]
    assert capsys.readouterr().out.startswith("work: 1 of 5 items, ")


def test_every_work_that_may_be_long_says_how_far_it_is(tiny, tmp_path):
    """Of train.py and of score.py: reading, the reference pass, steps, evaluation; scoring and answering."""
    plan = json.dumps({"0": {"set": {"progress.EVERY": 0.0, "data.rows.AT_ONCE": 4, "data.prepared.AT_ONCE": 4}}})
    given = [word for word in again(tiny, tmp_path / "run") if word not in ("--max_steps", 1)]
    scoring = [tmp_path / "run" / "checkpoint-0", "--dataset_path", tiny / "train.jsonl", "--answers", "9",
               "--max_tokens", "5", "--max_new_tokens", "4", "--output_dir", tmp_path / "scores"]
    for script, flags, works in (
            ("train", [*given, "--max_steps", "3"], ["preparing", "reference", "training", "evaluation"]),
            ("score", scoring, ["preparing", "scoring", "greedy answers"])):
        codes, shown = forked(ROOT / "tests" / "apart.py", script, plan, *flags)
        assert codes == [0], shown
        assert {*re.findall(r"^([a-z ]+): \d+ of \d+ [a-z]+, ", shown, re.MULTILINE)} == {*works}, shown
        assert ("evaluation: 1 of 2 batches, " in shown) == (script == "train")
        assert re.search(r"^reading: 8 rows, \S+ s a row, 0:00:0\d so far$", shown, re.MULTILINE), shown


def test_a_bar_never_passes_its_end(monkeypatch, capsys):
    """Rank 0 counts for the others too, and the last ones may have nothing left."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.Progress("greedy answers", 3, "answer") as bar:
        bar.update(2)
        bar.update(2)
        bar.update(2)
    assert bar.done == 3 and len(capsys.readouterr().out.splitlines()) == 1


# Commands that are printed to be run


def test_a_printed_command_runs_as_it_stands(monkeypatch, tmp_path):
    """Whatever `python` means there, whatever the folders are called, and wherever one is."""
    place = tmp_path / "a b's"
    (place / "env").mkdir(parents=True)
    (place / "env" / "python3").symlink_to(sys.executable)
    (place / "show.py").write_text("import sys; print(sys.executable, sys.argv[1:])")
    monkeypatch.setattr(sys, "executable", str(place / "env" / "python3"))
    words = place / "show.py", place / "run $1", "--flag", "x y"
    for cwd, known in ((place, False), (tmp_path, False), (place / "env", True)):
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("PATH", f"{place / 'env'}:{os.environ['PATH']}" if known else "/usr/bin:/bin")
        line = command_line(*words)
        shown = subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout.strip()
        run = os.path.relpath(place / "run $1", cwd) if place.is_relative_to(cwd) or cwd == place else place / "run $1"
        executable = "python3" if known else line.split("show.py")[0]
        assert shown == f"{place / 'env' / 'python3'} {[str(run), '--flag', 'x y']}" and executable in line
        assert line.startswith("python3 ") == known
    monkeypatch.chdir(tmp_path)
    line = command_line("show.py", place / "run", cwd=place)
    assert subprocess.run(line, shell=True, capture_output=True, text=True).stdout.strip().endswith("['run']")


def test_the_last_line_of_a_run_is_a_command(tiny, finished, capfd):
    """Printed again where the run is finished, since one may have come back for it."""
    found = said(trainer.main, capfd, *again(tiny, finished))
    (line,) = re.findall(r"^next: (.*)$", found, re.MULTILINE)
    assert line.endswith(f"score.py {finished}") and line == command_line(ROOT / "score.py", finished)


def test_a_finished_run_says_how_to_train_further(tiny, finished, capfd):
    """And its words are a command that works: from its end, in a new folder."""
    flags = list(again(tiny, finished))
    flags[flags.index("--max_steps") + 1] = 2
    found = said(trainer.main, capfd, *flags)
    assert "--max_steps: 1 -> 2" in found and found.endswith("2")
    (last,) = re.findall(r"--model_name (\S+) \(for DPO", found)
    assert last == str(finished / "checkpoint-1")
    train(tiny, finished.parent / "further", "--max_steps", "1", "--eval_size", "2", "--model_name", last)


def test_greedy_answers_are_counted_as_they_come():
    """Every prompt once, those without room for a token included."""
    class Parrot:
        device = "cpu"

        def generate(self, input_ids, attention_mask, max_new_tokens):
            return torch.cat([input_ids, torch.full((len(input_ids), 1), 7)], 1)

    told = []
    said = answers.greedy(Parrot(), [[1] * n for n in (1, 2, 3, 9, 9)], 4, 9, [7], 12, told.append)
    assert said == [[7], [7], [7], [], []] and sum(told) == 5 and len(told) > 2


def test_an_answer_does_not_depend_on_its_neighbours():
    """Of a model whose positions count the padding, as bart's do: each answer is the one that it gives alone."""
    from transformers import BartConfig, BartForCausalLM

    torch.manual_seed(0)
    config = BartConfig(vocab_size=50, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32,
                        max_position_embeddings=64, init_std=0.5, dropout=0.0)
    model = BartForCausalLM(config).eval()
    prompts = [torch.randint(3, 50, (n,)).tolist() for n in (3, 9, 5, 9, 14, 1)]
    alone = [answers.greedy(model, [prompt], 6, 60, [2], 10_000)[0] for prompt in prompts]
    together = answers.greedy(model, prompts, 6, 60, [2], 10_000, padded=False)
    assert together == alone and answers.greedy(model, prompts, 6, 60, [2], 10_000) != alone


def test_texts_get_the_ids_that_the_tokenizer_gives_them(tiny):
    """Without special tokens of its own; no text is no call."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    texts = [f"{i} is the number" for i in range(2001)]
    assert encoding._ids(tokenizer, texts) == tokenizer(texts, add_special_tokens=False).input_ids
    assert encoding._ids(tokenizer, []) == []
