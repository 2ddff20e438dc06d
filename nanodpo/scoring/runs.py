"""Finds the checkpoints to score: those of runs, or any model or adapter, the settings they were made with, and a
run's own data.

A run's folder may come from somebody else. It decides how data are read and which base and data files are opened; it
never decides that code is run: only the command line says trust_remote_code.
"""

import collections
import dataclasses
import functools
import glob
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from ..data.places import SUFFIXES
from ..errors import UserError
from ..flags.loss import loss_name, own_function, read_loss
from ..flags.settings import check_utf_8
from ..folder.atomic import MANIFEST, read_facts, saved_steps, step_of
from ..folder.elastic import arguments_of
from ..folder.fork import owners
from ..folder.record import is_record, versions
from ..folder.resume import stranger
from ..model.source import base_of
from ..ranks.distributed import device_name, say
from .contents import Contents
from .recorded import BARE_MODEL, NOT_A_RUN, PRECISION, recorded_settings


@dataclasses.dataclass
class Checkpoint:
    """One set of weights: `run` names the line in a figure, `step` is the number of updates it has seen."""

    run: str
    phase: str  # the run's loss; empty for a bare model
    step: int
    path: str
    settings: SimpleNamespace  # those of the run, and what the command line says instead
    recorded: SimpleNamespace | None = None  # those of the run alone
    frozen: bool = False  # whether all its weights are frozen where it is used, as a reference's beside LoRA
    contents: Contents | None = None  # its files as they were when it was named
    base: Contents | None = None  # the same of the model that it is an adapter on, or itself

    @property
    def key(self) -> str:
        """All of a checkpoint that could change a number, wherever it lies: weights, precision, device, libraries."""
        quantised = [name for name in PRECISION[1:] if getattr(self.settings, name)]
        precision = ("bf16 weights" if self.frozen else "bf16") if self.settings.bf16 else ""
        return " ".join([self.contents.key, self.base.key, precision, *quantised, machine()])


def loss_of_run(settings, record: dict, folder: Path) -> Callable:
    """The loss that a run was trained with, its settings filled in: runs its file where it is the user's own. Raises
    UserError where that file is another by now."""
    loss, written = read_loss(settings)
    if written != record.get("loss_function"):
        raise UserError(f"{settings.loss}: is not what {folder} was trained with: the file has changed")
    return loss


def open_own_losses(checkpoints: list[Checkpoint]) -> list[str]:
    """Reads losses that are functions of the user's own into their runs' settings, where --trust_remote_code allows it.
    Returns a line for each run of which it does not, and whose pairs so have no weights. Raises UserError."""
    runs = {}
    for c in (c for c in checkpoints if own_function(c.settings.loss)):
        runs.setdefault(c.run, []).append(c)
    lines = []
    for run, its in runs.items():
        settings, folder = its[0].settings, Path(its[0].path).parent
        if settings.trust_remote_code:
            function = loss_of_run(settings, settings.record, folder)
            for c in its:
                c.settings.function = function
        else:
            lines.append(f"{run}: its pairs get no weights, since its loss is a file of code, {settings.loss}; "
                         "--trust_remote_code runs it")
    return lines


@functools.cache
def machine() -> str:
    """The device and the libraries: another device or library rounds differently, as earlier versions did on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = "positions and the sum with LoRA rounded once " * (device.type == "cuda")
    return f"{device_name(device)} {how}{json.dumps(versions())}"


def open_targets(targets: list[str], changes: dict | None = None) -> list[Checkpoint]:
    """Run folders, checkpoints, adapters and models -> checkpoints in order, their settings with these changes.

    Raises UserError, also for a checkpoint that is not what was written.
    """
    found = [checkpoint for target in targets for checkpoint in _open(target)]
    for model in (c for c in found if not c.phase):
        as_reference(model, runs_against(model, found))
    for checkpoint in found:
        checkpoint.recorded = checkpoint.settings
        checkpoint.settings = SimpleNamespace(**vars(checkpoint.settings) | (changes or {}))
    _tell_apart(found)
    for checkpoint in found:
        check_utf_8("run", checkpoint.run)
        check_utf_8("model", checkpoint.path)
    runs = list(dict.fromkeys(c.run for c in found))
    found.sort(key=lambda c: (runs.index(c.run), c.step))  # a run's start comes first: the rest is compared with it
    seen = collections.Counter((c.run, c.step) for c in found)
    if twice := [key for key, count in seen.items() if count > 1]:
        run, step = min(twice)
        first, second = [c.path for c in found if (c.run, c.step) == (run, step)][:2]
        if os.path.realpath(first) == os.path.realpath(second):
            raise UserError(f"{second}: is named twice, by itself or with its run; name it once")
        raise UserError(f"two checkpoints are both called {run}, step {step}; score them in two calls")
    for checkpoint in found:
        checkpoint.contents = Contents(checkpoint.path)
        check_place(checkpoint)
    return found


def check_place(checkpoint: Checkpoint) -> None:
    """Raises UserError for a copy of another step's checkpoint; names one that another run than run.json's wrote."""
    if not checkpoint.phase:
        return
    place, record, step = Path(checkpoint.path), checkpoint.settings.record, checkpoint.step
    facts = read_facts(place)
    if words := stranger(facts, step):
        raise UserError(f"{place}: {words}; move it elsewhere, or remove its {MANIFEST} if that is meant")
    if is_record(record) and (words := stranger(facts, step, owners(record))):
        say(f"{place}: {words} than {place.parent / 'run.json'} is of, by its {MANIFEST}")


def as_reference(model: Checkpoint, runs: list[Checkpoint]) -> None:
    """Has a model opened as the reference of these runs is in training: in their precision. Its weights are frozen
    there, and with LoRA and --bf16 stored in bfloat16, as the policy's base is."""
    for name in PRECISION:
        setattr(model.settings, name, any(getattr(c.settings, name) for c in runs))
    model.frozen = any(arguments_of(c.settings.record)["use_lora"] for c in runs)


def runs_against(model: Checkpoint, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints of runs whose --reference is this model."""
    place = os.path.realpath(model.path)
    return [c for c in checkpoints if c.settings.reference and os.path.realpath(c.settings.reference) == place]


def without_references(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints less those that are here as the reference of one before them, whatever they were trained on."""
    found, references = [], set()
    for c in checkpoints:
        if os.path.realpath(c.path) not in references:
            found.append(c)
        if c.settings.reference:
            references.add(os.path.realpath(c.settings.reference))
    return found


def find_bases(checkpoints: list[Checkpoint]) -> None:
    """Hashes the base of each checkpoint. Raises UserError for one that is not what was written."""
    bases = {}
    for checkpoint in checkpoints:
        base, adapter = base_of(checkpoint.path)
        if adapter and base not in bases:
            bases[base] = Contents(base)
        checkpoint.base = bases[base] if adapter else checkpoint.contents


def check_starts(checkpoints: list[Checkpoint], k: int | None) -> None:
    """Raises UserError where `k` risers are asked for, and a checkpoint has no step 0 of its run to be compared with.
    The model of a run's --reference needs none."""
    if not k:
        return
    starts = {c.run for c in checkpoints if c.phase and c.step == 0}
    for c in without_references(checkpoints):
        if not c.phase:
            raise UserError(f"--risers {k}: {c.path} is no checkpoint of a run, so there is no step 0 to compare it "
                            "with; leave it out, or --risers")
        if c.run not in starts:
            first = Path(c.path).parent / "checkpoint-0"
            mend = f"name {first}, too" if first.is_dir() else "it is gone, so leave --risers out"
            raise UserError(f"--risers {k}: {c.path} is compared with its run's checkpoint-0; {mend}")


def _tell_apart(found: list[Checkpoint]) -> None:
    """Runs of one name in two folders, seed-1/dpo and seed-2/dpo, take the folder's name into theirs."""
    places = [Path(c.path).resolve().parent if c.phase else Path(c.path).resolve() for c in found]
    homes = collections.defaultdict(set)
    for checkpoint, place in zip(found, places):
        homes[checkpoint.run].add(place)
    for checkpoint, place in zip(found, places):
        if len(homes[checkpoint.run]) > 1:
            checkpoint.run = f"{place.parent.name}/{place.name}"


def newest_run(folder: Path) -> str:
    """The run that was started last. Raises UserError where there is none."""
    runs = [file.parent for file in folder.glob("*/run.json")]
    if not runs:
        raise UserError(f"{folder}/ holds no run; name one, or make one with train.py")

    def started(run: Path) -> float:
        file = run / "checkpoint-0" / MANIFEST  # written once, while a run that ends writes its run.json again
        return (file if file.exists() else run / "run.json").stat().st_mtime

    return str(max(runs, key=lambda run: (started(run), run.name)))


def _open(target: str) -> list[Checkpoint]:
    path = Path(target)
    try:
        is_run = (path / "run.json").is_file()
    except OSError as error:
        raise UserError(f"{target}: can't be opened: {error.strerror}") from error
    if not is_run:
        step = step_of(path.name)
        if step is not None and (path.parent / "run.json").is_file():
            settings = recorded_settings(path.parent)
            return [Checkpoint(path.parent.resolve().name, loss_name(settings.loss), step, target, settings)]
        return [Checkpoint(path.name or target, "", 0, target, SimpleNamespace(**BARE_MODEL | NOT_A_RUN))]
    settings = recorded_settings(path)
    if not (steps := saved_steps(path)):
        raise UserError(f"{target}: the run has no checkpoint")
    name = path.resolve().name
    return [Checkpoint(name, loss_name(settings.loss), step, str(path / f"checkpoint-{step}"), settings)
            for step in reversed(steps)]


def own_rows(settings: SimpleNamespace) -> tuple[str, str | None, tuple[int, ...]]:
    """(name, file, rows) of a run's own data; no rows are all rows. The file is None for a bare model."""
    if settings.eval_file_path:
        return "test", settings.eval_file_path, ()
    return "test" if settings.held_out_rows else "train", settings.train_file_path, tuple(settings.held_out_rows or ())


def own_data(target: str) -> tuple[str, str]:
    """(name, file) of a run's held-out data, else of what it trained on. Raises UserError for a bare model."""
    name, file, _ = own_rows(_open(target)[0].settings)
    if not file:
        why = ("is no run (run.json is missing); to score a model, name data with --dataset_path"
               if os.path.exists(target) else "no such run or folder")
        raise UserError(f"{target}: {why}")
    if file.endswith(SUFFIXES) and not os.path.isabs(file) and not glob.glob(file, recursive=True):
        raise UserError(f"{file}: no such file; {target} names its data as seen from the folder where it was started: "
                        "call score.py there")
    return name, file


def check_own(checkpoints: list[Checkpoint]) -> None:
    """Raises UserError for runs with other data of their own: what one held out, another may have trained on.

    Of bare models nothing is known; they are scored on the data of the run beside them.
    """
    found = {}
    for checkpoint in checkpoints:
        name, file, rows = own_rows(checkpoint.settings)
        if file:
            words = f"run {checkpoint.run}", f"{name}: {f'{len(rows)} held-out rows of ' if rows else ''}{file}"
            found.setdefault((name, os.path.abspath(file), rows), words)
    if len(found) > 1:
        (first, its), (second, others) = list(found.values())[:2]
        raise UserError(f"{first}'s own data ({its}) are not those of {second} ({others}): name data with "
                        "--dataset_path, or score the runs in two calls")
