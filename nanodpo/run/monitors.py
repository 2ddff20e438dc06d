"""Sends each line of metrics.jsonl to DeepSpeed's monitors as well: TensorBoard, Weights & Biases, CSV files, Comet.

A block of that name in DeepSpeed's file turns one on, and so does --report_to. The names are those of TRL's charts,
train/<name> and eval/<name>, over the step. DeepSpeed's engine is given no monitor: it would write the learning rate a
second time, by another name and over the number of samples.
"""

import contextlib
import functools
import importlib.util
import json
import os
import sys
import uuid
from pathlib import Path
from unittest import mock

from ..errors import RankStopped, UserError, first_line
from ..folder.atomic import aside, check_writable
from ..folder.log import is_evaluation
from ..ranks import distributed

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "comet": "comet_ml"}


def take_blocks(settings: dict, report_to: list[str] | None) -> dict[str, dict]:
    """Takes the monitors' blocks out of DeepSpeed's settings, those of --report_to turned on. Raises UserError where
    one is on whose package is not installed, or whose folder can't be written to."""
    blocks = {name: settings.pop(name) for name in PACKAGES if name in settings}
    for name in report_to or ():
        blocks[name] = blocks.get(name, {}) | {"enabled": True}
    if report_to == ["none"]:
        return {}
    for name, block in blocks.items():
        if block.get("enabled") and PACKAGES[name] and importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"--report_to {name}: the package {PACKAGES[name]} is not installed; install it (pip "
                            f"install {PACKAGES[name]}), or take {name} out of --report_to and of DeepSpeed's file")
        if block.get("enabled") and isinstance(path := block.get("output_path"), str) and path:
            check_writable(Path(path), f"--deepspeed: {name}: output_path {path}")
    return blocks


def read_sent(file: Path) -> dict:
    """A name for W&B and Comet, the last line that was sent, and the folders with logs of this run (None: not noted by
    an earlier version); as of a new run where there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"id": str(found["id"]), "step": int(found["step"]), "train": bool(found["train"]),
                "logs": found.get("logs") and [*map(str, found["logs"])]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"id": uuid.uuid4().hex, "step": -1, "train": False, "logs": None if file.exists() else []}


def log_folders(blocks: dict[str, dict], run: Path) -> dict[str, str]:
    """{name of a monitor that is on: the folder of its files}, relative to the run's, which may be moved, if within."""
    folders = {monitor: Path(blocks[monitor].get("output_path", ""), blocks[monitor].get("job_name", "")).absolute()
               for monitor in ("tensorboard", "csv_monitor") if blocks.get(monitor, {}).get("enabled")}
    return {monitor: str(folder.relative_to(run) if folder.is_relative_to(run) else folder)
            for monitor, folder in folders.items()}


def check_unused(folders: dict[str, str], run: Path, own: list[str]) -> None:
    """Raises UserError where another run has its log in one of these folders that is not yet the run's `own`: both
    would be one curve. `folders` as from log_folders."""
    for monitor, name in folders.items():
        folder = run / name
        logs = [file for kind in ("train_*.csv", "eval_*.csv", "events.out.*") for file in folder.glob(kind)]
        if name not in own and logs:
            raise UserError(f"{monitor}: {folder} has the log of another run ({logs[0].name}); name another job_name "
                            "or --output_dir, or remove that folder")


def cut_unrecorded(file: Path, sent: dict) -> None:
    """Cuts off what a run that was stopped in the middle of a line left at the end of a CSV file of DeepSpeed's: half a
    row, and the row after the last line that was `sent`, which the run that goes on sends again."""
    kind, data = file.stem.partition("_")[0], file.read_bytes()
    if kind not in ("train", "eval"):
        return
    rows = data.splitlines(keepends=True)
    if rows and not rows[-1].endswith(b"\n"):
        rows.pop()
    step = rows[-1].partition(b",")[0] if rows else b""
    if step.isdigit() and (int(step), kind == "train") > (sent["step"], sent["train"]):  # the heading is no number
        rows.pop()
    if (size := sum(map(len, rows))) < len(data):
        os.truncate(file, size)


class Monitors:
    """DeepSpeed's monitors of a run, on its first rank. monitors.json in the run's folder has the last line that was
    sent, so that a run that goes on sends none twice, and a name by which W&B and Comet know the run again. It is
    written after the line was sent; of CSV files the row of a line that it lacks is cut off."""

    def __init__(self, blocks: dict[str, dict], folder: Path):
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        self.file = folder / "monitors.json"
        self.sent = read_sent(self.file)
        folder, name = folder.absolute(), folder.absolute().name
        own = {monitor: {"output_path": str(folder),  # a folder that the user names may be of several runs
                         "job_name": name if "output_path" in blocks.get(monitor, {}) else monitor}
               for monitor in ("tensorboard", "csv_monitor")}
        own["wandb"] = {"project": os.environ.get("WANDB_PROJECT", "nanodpo")}
        own["comet"] = {"experiment_key": self.sent["id"], "experiment_name": name, "samples_log_interval": 1}
        blocks = {monitor: own[monitor] | block for monitor, block in blocks.items()}
        folders, known = log_folders(blocks, folder), self.sent["logs"]
        if known is not None:
            check_unused(folders, folder, known)
            self.sent["logs"] = sorted({*known, *folders.values()})
        self._record()  # before a log is there: a monitor behind it may not start, and the next try is no other run
        config = get_monitor_config(blocks)
        with _told_to_wandb(config.wandb.enabled, dir=str(folder), name=name, id=self.sent["id"], resume="allow"):
            self.master = MonitorMaster(config)
        if csv := self.master.csv_monitor:
            for file in Path(csv.log_dir).glob("*.csv"):
                cut_unrecorded(file, self.sent)
                csv.filenames += [file.stem] * (file.stat().st_size > 0)  # it has its heading

    def write(self, line: dict) -> None:
        """Sends a line of metrics.jsonl. Raises RankStopped where it can't be written."""
        train = not is_evaluation(line)
        if (line["step"], train) <= (self.sent["step"], self.sent["train"]):
            return
        # The epoch of an evaluation is in the step's own line.
        events = [(f"train/{name}" if train else name.replace("eval_", "eval/", 1), value, line["step"])
                  for name, value in line.items() if name != "step" and (train or name != "epoch")]
        try:
            self.master.write_events(events)
            self.sent |= {"step": line["step"], "train": train}
            self._record()
        except _failures() as error:
            raise RankStopped(f"{_unwritten(error)}; the same command goes on from the last state") from error

    def _record(self) -> None:
        aside(self.file).write_text(json.dumps(self.sent), encoding="utf-8")
        os.replace(aside(self.file), self.file)  # whole, but not flushed: that would take longer than a small step

    def close(self, failed: bool) -> None:
        """Lets the monitors write what they still hold: each of them, also where another can't. Raises RankStopped
        where one can't; of a run that has failed already it says so, and the run ends for its own reason."""
        ends, errors, master = [], [], self.master
        if master.tb_monitor:
            ends.append(master.tb_monitor.summary_writer.close)
        if master.wandb_monitor:
            ends.append(functools.partial(sys.modules["wandb"].finish, exit_code=int(failed)))
        if master.comet_monitor:
            ends.append(master.comet_monitor.experiment.end)
        for end in ends:
            try:
                end()
            except _failures() as error:
                errors.append(error)
        if errors and not failed:
            raise RankStopped(f"{_unwritten(errors[0])}; the same command goes on from the last state") from errors[0]
        for error in errors:
            distributed.say(_unwritten(error))


@contextlib.contextmanager
def reporting(run):
    """Opens the monitors of a run, if it has any, and closes them at the end of the block, however it ends. All ranks
    must call it."""
    if not any(block.get("enabled") for block in run.monitors.values()):
        yield
        return
    with distributed.main_first():
        if distributed.is_main():
            run.monitor = _open(run.monitors, run.folder)
    failed = True
    try:
        yield
        failed = False
    finally:
        if run.monitor:
            monitor, run.monitor = run.monitor, None
            monitor.close(failed)


def _open(blocks: dict[str, dict], folder: Path) -> Monitors:
    """Raises UserError where a monitor does not start: no login, no network, a folder that can't be made."""
    try:
        return Monitors(blocks, folder)
    except (ValueError, RuntimeError, ImportError, *_failures()) as error:
        on = [name for name, block in blocks.items() if block.get("enabled")]
        offline = "; without a network set WANDB_MODE=offline" * ("wandb" in on)
        raise UserError(f"--report_to {' '.join(on)}: {first_line(error).rstrip('.')}{offline}") from error


def _failures() -> tuple[type[Exception], ...]:
    """The errors of a monitor that can't write: OSError and W&B's, also those where its own process has ended."""
    wandb, mailbox = (sys.modules.get(name) for name in ("wandb", "wandb.sdk.mailbox"))
    return OSError, *(getattr(module, name, OSError) for module, name in
                      ((wandb, "Error"), (mailbox, "MailboxClosedError"), (mailbox, "HandleAbandonedError")))


def _unwritten(error: Exception) -> str:
    what, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
    return f"{what or '--report_to'}: can't be written ({reason or first_line(error)})"


@contextlib.contextmanager
def _told_to_wandb(on: bool, **values):
    """Adds these to what DeepSpeed's monitor tells wandb.init, but for those that a variable of the user's has. W&B
    reads variables once a process: set here, they'd be those of a notebook's first run for all that follow, and of none
    after wandb.login()."""
    if not on:
        yield
        return
    import wandb  # slow

    variables = {"id": "WANDB_RUN_ID"}
    told = {name: value for name, value in values.items()
            if variables.get(name, f"WANDB_{name.upper()}") not in os.environ}
    with mock.patch.object(wandb, "init", functools.partial(wandb.init, **told)):
        yield
