"""DeepSpeed's monitors receive the numbers of metrics.jsonl: each number once, by TRL's name, over the step."""

import csv
import importlib.util
import json
import re
import struct
from unittest import mock

import pytest
from conftest import ROOT, forked, launch

import train as trainer
from nanodpo.errors import Preempted, RankStopped, UserError
from nanodpo.flags.arguments import TrainArguments, parse
from nanodpo.run import monitors
from nanodpo.run.deepspeed_settings import engine_config

TRAIN, FAULTY = ROOT / "train.py", ROOT / "tests" / "faulty.py"
TIMES = ("perf/", "mem/")  # of a step that was computed again the first are there


def flags(tiny, run, *more):
    return ("--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir", run,
            "--cache_dir", run.parent / "cache", "--draw", "false", "--max_steps", "8", "--eval_size", "3",
            "--eval_steps", "3", "--resume_steps", "3", "--learning_rate", "1e-3", *more)


def expected(run) -> dict[tuple[str, int], float]:
    """(TRL's name of the chart, step) -> value, of all lines of metrics.jsonl."""
    points = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        held_out = "eval_loss" in line
        for name, value in line.items():
            if name != "step" and not (held_out and name == "epoch"):  # the step's own line has it
                name = f"eval/{name.removeprefix('eval_')}" if held_out else f"train/{name}"
                assert (name, line["step"]) not in points
                points[name, line["step"]] = value
    assert len(points) > 200
    return points


def same(found: list[tuple[str, int, float]], points: dict, again=(), rounded=lambda value: value) -> None:
    """All points were found, none twice, in the order of their steps."""
    assert len(found) == len({(name, step) for name, step, _ in found}) == len(points)
    assert {(name, step) for name, step, _ in found} == points.keys()
    for name in {name for name, _, _ in found}:
        steps = [step for chart, step, _ in found if chart == name]
        assert steps == sorted(steps)
    for name, step, value in found:
        if step not in again or not any(part in name for part in TIMES):
            assert value == rounded(points[name, step]), (name, step)


def read_csv(folder, names) -> list[tuple[str, int, float]]:
    """DeepSpeed writes a file for each name, with one heading."""
    found, files = [], {re.sub("[/ ]", "_", name): name for name in names}
    for file in folder.iterdir():
        (head, *rows), name = list(csv.reader(file.open())), files[file.stem]
        assert head == ["step", name.rpartition("/")[2]]
        found += [(name, int(step), float(value)) for step, value in rows]
    return found


def read_tensorboard(folder) -> list[tuple[str, int, float]]:
    """By TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]


def wandb_records(data: bytes):
    """W&B's file is a log of LevelDB: blocks of 32 KiB, in them checksum, length, kind and bytes of each part."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def single(value: float) -> float:
    """As TensorBoard keeps it, in 4 bytes."""
    return struct.unpack("f", struct.pack("f", value))[0]


def installed(*names) -> list[str]:
    return [name for name in names if not monitors.PACKAGES[name] or importlib.util.find_spec(monitors.PACKAGES[name])]


@pytest.fixture(scope="module")
def watched(tiny, tmp_path_factory):
    """A run with the monitors that are installed; one of two ranks; and one that was killed in step 5, in 4
    after it had gone back to 3, and told to stop in 6."""
    folder = tmp_path_factory.mktemp("watched")
    more = "--report_to", *installed("csv_monitor", "tensorboard")
    for name, ranks in (("plain", 1), ("ranks", 2)):
        assert forked(TRAIN, *flags(tiny, folder / name, *more), ranks=ranks)[0] == [0] * ranks
    run = flags(tiny, folder / "again", *more)
    assert [forked(FAULTY, fault, *run)[0] for fault in ("kill@5", "kill@4", "term@6")] == [[137], [137], [75]]
    sent = json.loads((folder / "again" / "monitors.json").read_text())
    assert sent["step"] in (5, 6) and sent["train"]
    assert forked(TRAIN, *run)[0] == [0]
    return folder


@pytest.mark.parametrize("name, again", [("plain", ()), ("ranks", ()), ("again", range(3, 7))])
def test_csv_files_have_every_number_once(name, again, watched):
    points = expected(watched / name)
    same(read_csv(watched / name / "csv_monitor", {chart for chart, _ in points}), points, again)
    assert not (watched / name / "monitors.json").exists()


@pytest.mark.skipif(not installed("tensorboard"), reason="TensorBoard is not installed")
@pytest.mark.parametrize("name, again", [("plain", ()), ("ranks", ()), ("again", range(3, 7))])
def test_tensorboard_reads_every_number_once(name, again, watched):
    same(read_tensorboard(watched / name / "tensorboard"), expected(watched / name), again, single)


@pytest.mark.skipif(not installed("wandb"), reason="W&B is not installed")
def test_an_offline_run_of_wandb_is_whole(tiny, tmp_path, monkeypatch):
    """A row a step, the last one too, and the end of the run."""
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    launch(TRAIN, *flags(tiny, tmp_path / "run", "--report_to", "wandb"), launcher="python")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    found, ended = [], False
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        ended = ended or record.WhichOneof("record_type") == "exit"
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found += [(name, row["_step"], value) for name, value in row.items() if not name.startswith("_")]
    same(found, expected(tmp_path / "run"))
    assert ended


NOTEBOOK = """
import sys

import deepspeed.comm
import wandb

from nanodpo.run import monitors

deepspeed.comm.get_rank = lambda: 0
wandb.setup()  # as wandb.login() does: from here on W&B reads no variable
for folder in map(monitors.Path, sys.argv[1:]):
    folder.mkdir()
    monitor = monitors.Monitors({"wandb": {"enabled": True}}, folder)
    monitor.write({"step": 0, "loss": 0.5})
    monitor.close(failed=False)
"""


@pytest.mark.skipif(not installed("wandb"), reason="W&B is not installed")
def test_each_run_of_a_process_is_a_run_of_its_own_to_wandb(tmp_path, monkeypatch):
    """In a notebook, after wandb.login(): by the name and in the folder of the run, under the id that it goes on with.
    A name of the user's stays."""
    from wandb.proto import wandb_internal_pb2

    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    for name, value in {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    for names, shown in ((("one", "two"), ("one", "two")), (("three",), ("mine",))):
        launch(tmp_path / "notebook.py", *(tmp_path / name for name in names), launcher="python")
        for name, called in zip(names, shown):
            (file,) = (tmp_path / name / "wandb").glob("offline-run-*/*.wandb")
            records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(file.read_bytes())]
            (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
            known = json.loads((tmp_path / name / "monitors.json").read_text())
            assert (run.run_id, run.display_name) == (known["id"], called)
        monkeypatch.setenv("WANDB_NAME", "mine")


COMET = """
import json

__version__ = "3.41.0"


class Experiment:
    def __init__(self, key):
        self.key = key

    def tell(self, *words):
        with open(__file__ + ".told", "a") as file:
            file.write(json.dumps(words) + "\\n")

    def set_name(self, name):
        self.tell("name", name, self.key)

    def __internal_api__log_metric__(self, name, value, step):
        self.tell(name, step, value)

    def end(self):
        self.tell("end")


def start(experiment_key, **how):
    return Experiment(experiment_key)
"""


def test_comet_is_told_every_number_once(tiny, tmp_path):
    """A stand-in for its package writes down what it is told: by a run that is killed, and goes on with the same
    experiment."""
    (tmp_path / "comet_ml.py").write_text(COMET)
    script = tmp_path / "with_comet.py"
    script.write_text(f"import runpy, sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    run = flags(tiny, tmp_path / "run", "--report_to", "comet")
    for words, expected_code in (((FAULTY, "kill@5"), 137), ((TRAIN,), 0)):
        codes, said = forked(script, *words, *run)
        assert codes == [expected_code], said
    told = [tuple(json.loads(line)) for line in (tmp_path / "comet_ml.py.told").read_text().splitlines()]
    names = [words for words in told if words[0] == "name"]
    assert len(names) == 2 and names[0] == names[1] and names[0][1] == "run" and told.count(("end",)) == 1
    same([words for words in told if "/" in words[0]], expected(tmp_path / "run"), range(3, 7))


# Stopped between the rows and the record of them


def opened(folder, **block):
    """Monitors of a run's folder that write CSV files."""
    folder.mkdir(exist_ok=True)
    return monitors.Monitors({"csv_monitor": {"enabled": True} | block}, folder)


def rows(file) -> list[str]:
    return file.read_text().splitlines()


@pytest.fixture
def alone(monkeypatch):
    """This process is the only rank."""
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)


LINES = [{"step": step, "loss": 0.5} if kind == "train" else {"step": step, "eval_loss": 0.25}
         for step in range(4) for kind in ("eval", "train")]


@pytest.mark.parametrize("at", range(len(LINES)))
def test_a_line_whose_record_is_missing_has_no_second_row(at, alone, tmp_path, monkeypatch):
    """The disk is full, or the run is killed, when the rows of a line are in the CSV files and monitors.json does not
    say so yet: the run that goes on sends that line again, and each row is there once."""
    first = opened(tmp_path / "run")
    for line in LINES[:at]:
        first.write(line)
    with monkeypatch.context() as full, pytest.raises(RankStopped, match="No space left"):
        full.setattr(monitors.os, "replace", mock.Mock(side_effect=OSError(28, "No space left on device")))
        first.write(LINES[at])
    again = opened(tmp_path / "run")
    for line in LINES:
        again.write(line)
    folder = tmp_path / "run" / "csv_monitor"
    assert rows(folder / "train_loss.csv") == ["step,loss", *(f"{step},0.5" for step in range(4))]
    assert rows(folder / "eval_loss.csv") == ["step,loss", *(f"{step},0.25" for step in range(4))]


@pytest.mark.parametrize("left", [b"ste", b"step,loss\r\n0,0.5\r\n1", b"step,loss\r\n0,0.5\r\n1,0."])
def test_half_a_row_is_cut_off(left, alone, tmp_path):
    """A full disk takes a part of a row, or of the heading; the next row begins on a line of its own."""
    first = opened(tmp_path / "run")
    if b"0,0.5" in left:
        first.write(LINES[1])
    file = tmp_path / "run" / "csv_monitor" / "train_loss.csv"
    file.write_bytes(left)
    again = opened(tmp_path / "run")
    for line in LINES:
        again.write(line)
    assert rows(file) == ["step,loss", *(f"{step},0.5" for step in range(4))]


def test_only_rows_of_a_run_that_goes_on_are_cut(alone, tmp_path):
    """Files of other names, in a folder that the user has named, are nobody's."""
    folder = tmp_path / "all" / "mine"
    folder.mkdir(parents=True)
    (folder / "notes.csv").write_text("step,loss\n7,0.5\n")
    block = {"output_path": str(tmp_path / "all"), "job_name": "mine"}
    opened(tmp_path / "run", **block)
    (folder / "train_loss.csv").write_text("step,loss\n7,0.5\n")
    opened(tmp_path / "run", **block)
    assert rows(folder / "notes.csv") == ["step,loss", "7,0.5"] and rows(folder / "train_loss.csv") == ["step,loss"]


def test_a_new_run_does_not_write_into_the_log_of_another(alone, tmp_path):
    """Two runs of one name under one output_path, or with one job_name, would be one curve with two values a step."""
    block = {"output_path": str(tmp_path / "all"), "job_name": "mine"}
    opened(tmp_path / "one", **block).write(LINES[1])
    with pytest.raises(UserError, match="all/mine has the log of another run .*train_loss.csv.*another job_name"):
        opened(tmp_path / "two", **block)
    assert rows(tmp_path / "all" / "mine" / "train_loss.csv") == ["step,loss", "0,0.5"]
    opened(tmp_path / "one", **block).write(LINES[3])
    assert rows(tmp_path / "all" / "mine" / "train_loss.csv") == ["step,loss", "0,0.5", "1,0.5"]


def test_a_run_that_goes_on_does_not_write_into_the_log_of_another_either(alone, tmp_path):
    """Its own log is in its own folder so far, which may be moved. Rows of the other, which this run knows nothing of,
    would be cut off as its own that it had not noted."""
    opened(tmp_path / "one", output_path=str(tmp_path / "all"), job_name="mine").write(LINES[3])
    opened(tmp_path / "two").write(LINES[1])
    (tmp_path / "two").rename(tmp_path / "moved")
    opened(tmp_path / "moved").write(LINES[3])
    assert rows(tmp_path / "moved" / "csv_monitor" / "train_loss.csv") == ["step,loss", "0,0.5", "1,0.5"]
    with pytest.raises(UserError, match="all/mine has the log of another run .*train_loss.csv.*another job_name"):
        opened(tmp_path / "moved", output_path=str(tmp_path / "all"), job_name="mine")
    assert rows(tmp_path / "all" / "mine" / "train_loss.csv") == ["step,loss", "1,0.5"]


def test_a_monitor_that_does_not_start_costs_no_reference(tiny, tmp_path):
    """References of long responses take hours: a login that fails is said before them."""
    (tmp_path / "all" / "mine").mkdir(parents=True)
    (tmp_path / "all" / "mine" / "train_loss.csv").write_text("step,loss\n0,0.5\n")
    block = {"enabled": True, "output_path": str(tmp_path / "all"), "job_name": "mine"}
    (tmp_path / "ds.json").write_text(json.dumps({"csv_monitor": block}))
    codes, said = forked(TRAIN, *flags(tiny, tmp_path / "run", "--deepspeed", tmp_path / "ds.json"))
    assert codes == [2] and "has the log of another run" in said and "reference:" not in said


@pytest.mark.skipif(not installed("tensorboard"), reason="TensorBoard is not installed")
def test_a_run_whose_second_monitor_did_not_start_is_no_other_run(alone, tmp_path, monkeypatch):
    """No login, say: TensorBoard's log was begun, and the same command must not take it for another run's."""
    from deepspeed.monitor import monitor

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(monitor, "CometMonitor", mock.Mock(side_effect=ValueError("no API key")))
    blocks = {"tensorboard": {"enabled": True}, "comet": {"enabled": True}}
    for _ in range(2):
        with pytest.raises(UserError, match="^--report_to tensorboard comet: no API key$"):
            monitors._open(blocks, tmp_path / "run")
    again = monitors._open({"tensorboard": {"enabled": True}}, tmp_path / "run")
    for line in LINES:
        again.write(line)
    again.close(failed=False)
    assert [found for found in read_tensorboard(tmp_path / "run" / "tensorboard") if found[0] == "train/loss"] == [
        ("train/loss", step, 0.5) for step in range(4)]


class Ended(Exception):
    """As W&B raises where its own process has ended."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Ended("closed")])
def test_a_monitor_that_can_not_be_closed_does_not_hide_why_a_run_ended(error, alone, tmp_path, monkeypatch, capsys):
    """It fails when it is closed, as it failed to write: the run ends by its own error, and with its exit code. The
    others are closed all the same. Where nothing else has failed, that is the error, in a line."""
    monkeypatch.setitem(monitors.sys.modules, "wandb", mock.Mock(Error=Ended, finish=mock.Mock(side_effect=error)))
    master = mock.Mock(tb_monitor=mock.Mock(), wandb_monitor=mock.Mock(), comet_monitor=mock.Mock())
    master.comet_monitor.experiment.end.side_effect = error
    reason, monitor = str(getattr(error, "strerror", error)), opened(tmp_path / "run")
    monitor.master = master
    for told in (Preempted("told to stop"), RankStopped("full"), None):
        run = mock.Mock(monitors={"wandb": {"enabled": True}}, folder=tmp_path / "run")
        monkeypatch.setattr(monitors, "_open", lambda blocks, folder: monitor)
        raised = pytest.raises(type(told) if told else RankStopped, match=str(told) if told else f"written .{reason}.;")
        with raised, monitors.reporting(run):
            if told:
                raise told
        assert capsys.readouterr().out.count(f"--report_to: can't be written ({reason})") == 2 * (told is not None)
        assert run.monitor is None
    assert master.tb_monitor.summary_writer.close.call_count == 3


# What is asked for, and what there is


def test_two_runs_with_one_output_path_have_files_of_their_own(alone, tmp_path):
    """Where a block names a path and no job_name, the name is that of the run's folder; a run that goes on has the same
    name, and a fork, whose folder is another, has another."""
    block = {"output_path": str(tmp_path / "all")}
    for name in ("one", "two"):
        opened(tmp_path / name, **block).write(LINES[1])
    opened(tmp_path / "one", **block).write(LINES[3])
    assert rows(tmp_path / "all" / "one" / "train_loss.csv") == ["step,loss", "0,0.5", "1,0.5"]
    assert rows(tmp_path / "all" / "two" / "train_loss.csv") == ["step,loss", "0,0.5"]
    opened(tmp_path / "three", **block, job_name="mine").write(LINES[1])
    assert sorted(place.name for place in (tmp_path / "all").iterdir()) == ["mine", "one", "two"]


def test_a_file_of_deepspeed_turns_monitors_on(tiny, tmp_path):
    """With a folder of its own; what is turned off there can be turned on by the flag, and all can be turned off."""
    settings = {"csv_monitor": {"enabled": True, "output_path": "elsewhere", "job_name": "mine"},
                "tensorboard": {"enabled": False}}
    assert monitors.take_blocks(dict(settings), None) == settings
    assert monitors.take_blocks(dict(settings), ["none"]) == {}
    (tmp_path / "ds.json").write_text(json.dumps(
        settings | {"csv_monitor": settings["csv_monitor"] | {"output_path": str(tmp_path / "elsewhere")}}))
    forked(TRAIN, *flags(tiny, tmp_path / "run", "--deepspeed", tmp_path / "ds.json", "--max_steps", "2"))
    rows = (tmp_path / "elsewhere" / "mine" / "train_loss.csv").read_text().splitlines()
    assert rows[0] == "step,loss" and [row.split(",")[0] for row in rows[1:]] == ["0", "1"]
    # Another monitor does not make it another run.
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert not {*monitors.PACKAGES} & record["deepspeed"].keys()


def test_the_engine_gets_no_monitor():
    """It would write the learning rate again, over the samples."""
    args = TrainArguments(model_name="M", train_file_path="D", report_to=["csv_monitor"])
    settings = engine_config({"csv_monitor": {"enabled": False}, "wandb": {"project": "p"}}, "ds.json", args)
    assert monitors.take_blocks(settings, args.report_to) == {"csv_monitor": {"enabled": True},
                                                              "wandb": {"project": "p"}}
    assert not {*monitors.PACKAGES} & settings.keys()


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_missing_package_is_named_before_a_model_is_opened(name, package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda wanted, *more: None if wanted == package else find(wanted, *more))
    with pytest.raises(UserError, match=f"^--report_to {name}: the package {package} is not installed"):
        trainer.main(["--model_name", "nowhere", "--train_file_path", "nothing", "--report_to", "csv_monitor", name])
    (tmp_path / "ds.json").write_text(json.dumps({name: {"enabled": True}}))
    with pytest.raises(UserError, match=f"^--report_to {name}: the package {package} is not installed"):
        trainer.main(["--model_name", "nowhere", "--train_file_path", "nothing", f"--deepspeed={tmp_path}/ds.json"])


@pytest.mark.parametrize("names, words", [
    (["mlflow"], "--report_to: invalid choice: 'mlflow' (choose from 'tensorboard', 'wandb', 'csv_monitor'"),
    (["none", "wandb"], "--report_to none wandb: none stands alone"), ([], "--report_to: expected at least one")])
def test_names_that_are_not_there(names, words, tmp_path):
    with pytest.raises(UserError, match="^" + re.escape(words).replace("'", "'?")):
        parse(["--model_name", "M", "--train_file_path", "D", "--report_to", *names], tmp_path / "none.yaml")


@pytest.mark.parametrize("text, found", [
    ("report_to: [wandb, tensorboard]", ["wandb", "tensorboard"]), ("report_to: comet", ["comet"]),
    ("report_to: []", None), ("report_to: null", None), ("report_to:\n- none", ["none"])])
def test_several_in_a_settings_file(text, found, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{text}\nseed: 3\n")
    args = parse([str(tmp_path / "run.yaml"), "--model_name", "M", "--train_file_path", "D"], tmp_path / "none.yaml")
    assert args.report_to == found and args.seed == 3


def test_a_dry_run_reports_nothing(tiny, tmp_path):
    forked(TRAIN, *flags(tiny, tmp_path / "run", "--dry_run", "--report_to", "csv_monitor"))
    assert not (tmp_path / "run").exists()


def test_a_monitor_that_can_not_write_ends_the_run_in_a_line(tiny, tmp_path):
    """Its folder is a file."""
    (tmp_path / "file").write_text("")
    (tmp_path / "ds.json").write_text(json.dumps({"csv_monitor": {"enabled": True,
                                                                  "output_path": str(tmp_path / "file")}}))
    codes, said = forked(TRAIN, *flags(tiny, tmp_path / "run", "--deepspeed", tmp_path / "ds.json"), ranks=2)
    assert codes == [2, 2] and "error: --deepspeed: csv_monitor: output_path" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()  # said before a model is opened


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": "a", "step": "x", "train": true}', '{"id": "a"}'])
def test_a_record_of_what_was_sent_that_is_none_is_written_anew(text, tmp_path):
    """An earlier version could be killed while it wrote the file."""
    (tmp_path / "monitors.json").write_text(text)
    sent = monitors.read_sent(tmp_path / "monitors.json")
    assert (len(sent["id"]), sent["step"], sent["train"]) == (32, -1, False)
