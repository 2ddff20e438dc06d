"""The record of a run, run.json, and the folder that holds it: found, claimed, locked."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from ..data.places import absolute
from ..errors import RunStopped, UserError
from ..files import MAX_BYTES, read_json
from ..flags.arguments import BY_CONTENT
from ..ranks.distributed import world_size
from .atomic import aside, check_writable, clear_partials, flush, hold, new_file, new_owner, saved_steps, writing
from .elastic import pairs_per_step
from .reference import data_hash

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "tokenizers")


def facts(args, deepspeed: dict, limit: int, data_sets: list, program: Path, command: list[str]) -> dict:
    """The entries of run.json that are known before the model is loaded. `limit`: the longest sequence, tokens;
    `program`: the folder of train.py."""
    return {
        "command": shlex.join(command), "arguments": arguments(args), "max_length": limit,
        "world_size": world_size(), "deepspeed": json.loads(json.dumps(deepspeed)),
        "versions": versions(), "git_commit": git_commit(program), "threads": torch.get_num_threads(),
        "data": [data_hash(data.once) for data in data_sets],  # an epoch follows from them and mix_weights
        "data_report": [data.report() for data in data_sets],
    }


def arguments(args) -> dict:
    """The settings, files and folders in them by their full paths, so that they are found from any other folder. A name
    that is no path here is a hub id, and stays."""
    named = {name: value for name in BY_CONTENT if (value := getattr(args, name))}
    return dataclasses.asdict(args) | {name: absolute(value) for name, value in named.items()}


def find(resume: str, output_dir: str | None, name: str) -> tuple[Path, dict | None, int | None]:
    """(folder of the run, its run.json or None for a new run, the step to go on from where --resume names one).

    `name`: the folder of a new run without --output_dir, which `take` makes. --resume may name a run's folder or one of
    its states. Raises UserError for a folder that holds something else, or can't be written to.
    """
    if resume in ("auto", "never"):
        folder = Path(output_dir) if output_dir else _free(Path(name))
        if output_dir and resume == "auto" and (folder / "run.json").is_file():
            return folder, _read_own(folder), None
        claim(folder)
        return folder, None, None
    path, step = Path(resume), None
    place = Path(os.path.abspath(path))  # as it is named: states may be links
    if place.parent.name == "resume" and place.name.startswith("step-"):
        folder, step = place.parent.parent, place.name.removeprefix("step-")
        if not path.is_dir() or step not in map(str, saved_steps(place.parent, "step")):
            raise UserError(f"--resume {path}: no such state; the run's are in {path.parent}")
    else:
        folder = path
    if not (folder / "run.json").is_file():
        raise UserError(f"--resume {path}: is no run (run.json is missing)")
    record = _read_own(folder)
    if step and record.get("finished"):
        raise UserError(f"--resume {path}: the run is finished; --fork {folder}@{step} goes on from this state in a "
                        "new --output_dir")
    trained = record.get("finished") or (folder / f"checkpoint-{record.get('steps')}").is_dir()  # needs no state
    if not trained and not (folder / "resume").is_dir():
        raise UserError(f"--resume {path}: holds no state to go on from (the folder resume/ is missing)")
    if output_dir and Path(output_dir).resolve() != folder.resolve():
        raise UserError(f"--resume {path} and --output_dir {output_dir} are two runs; leave --output_dir out")
    return folder, record, step and int(step)


def claim(folder: Path) -> None:
    """Raises UserError unless `folder` can become a run's: new or empty, in a place that can be written."""
    try:
        # A process killed in its first moment leaves no more than a file that was not yet renamed.
        # NFS gives a file that another rank has just removed another name.
        others = (file.name for file in folder.iterdir()) if folder.is_dir() else ()
        if any(not (name.endswith(".partial") or name.startswith(".nfs")) for name in others):
            raise UserError(f"--output_dir {folder}: is in use; name a new folder")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: can't be read ({error.strerror})") from error
    check_writable(folder, f"--output_dir {folder}")


def _free(folder: Path) -> Path:
    """This folder, or where something is there <folder>-2, <folder>-3 ..."""
    more = (folder.with_name(f"{folder.name}-{k}") for k in itertools.count(2))
    return next(place for place in itertools.chain([folder], more) if not os.path.lexists(place))


def take(folder: Path) -> Path:
    """Makes a new folder under this name, or under the next that is free where another run of the same second has it.
    Raises RunStopped where no folder can be made."""
    while True:
        place = _free(folder)
        with writing(place), contextlib.suppress(FileExistsError):  # somebody was first
            place.mkdir(parents=True)
            return place


def read(folder: Path) -> dict:
    """A run's run.json. Raises UserError for a file that can't be read, or that train.py has not written."""
    if not is_record(record := read_json(folder / "run.json")):
        raise UserError(f"{folder / 'run.json'}: is not what train.py writes; put it back, or name another folder")
    return record


def is_record(record) -> bool:
    """Whether this is all that a run.json must say for a run to go on."""
    try:
        return (isinstance(record["arguments"], dict) and type(record["world_size"]) is type(record["steps"]) is int
                and record["steps"] > 0 and pairs_per_step(record) > 0 and type(record.get("finished", False)) is bool
                and _is_fork(record.get("fork")))
    except (KeyError, TypeError, ZeroDivisionError, RecursionError):
        return False


def _is_fork(entry) -> bool:
    """Whether run.json can have this as its `fork`: nothing, or what fork.py writes."""
    return entry is None or (
        isinstance(entry, dict) and isinstance(entry["run"], str) and type(entry["step"]) is int
        and isinstance(entry["fingerprint"], str) and isinstance(entry["changed"], dict)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in entry["changed"].values())
        and _is_fork(entry.get("of")))


def create(folder: Path, record: dict) -> None:
    """Makes the folder with its run.json. Raises UserError where another run was first, and for more than `read` takes;
    RunStopped for a full disk."""
    text, place = _text(record | {"output_dir": str(folder)}), aside(folder / "run.json", new_owner())
    if len(text) > MAX_BYTES - len('  "finished": true,\n'):
        name = max(record, key=lambda name: len(json.dumps(record[name])))
        raise UserError(f"{folder / 'run.json'}: would have {len(text):,} bytes, most of them in {name}; it can have "
                        f"{MAX_BYTES:,}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with writing(folder):
            place.write_text(text, encoding="utf-8")
            flush(place)
        os.link(place, folder / "run.json")  # all of it at once, and, unlike `new_file`, only if it is not there
    except (FileExistsError, FileNotFoundError) as error:  # not found: the other run has cleared our file away
        raise UserError(f"--output_dir {folder}: is in use by another run") from error
    except OSError:  # a file system without hard links
        os.replace(place, folder / "run.json")
    finally:
        place.unlink(missing_ok=True)
    flush(folder)


def list_rows(file: Path, rows: list[dict]) -> None:
    """Writes a line for each row, unless the file is there: a run that goes on may have been killed before it wrote
    it. Without rows there is no file."""
    if rows and not file.exists():
        with writing(file), new_file(file) as place:
            place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read_own(folder: Path) -> dict:
    """A run's run.json, as `read`. Raises UserError, too, where the run is not finished and can't be written to."""
    if not (record := read(folder)).get("finished"):
        check_writable(folder, f"--output_dir {folder}")
        _open(folder).close()
    return record


def _open(folder: Path):
    """run.json, opened so that it can be locked. Raises UserError where it can't be: another user's, say."""
    try:
        return (folder / "run.json").open("rb+")  # NFS locks no file that is open for reading alone
    except OSError as error:
        raise UserError(f"--output_dir {folder}: its run.json can't be written to ({error.strerror})") from error


def lock(folder: Path):
    """Locks a run against a second process for as long as this one lives. Returns the locked file, which must be kept
    open. Raises UserError where another process has the lock."""
    file = _open(folder)
    hold(file, f"--output_dir {folder}: is in use by another run")
    clear_partials(folder)
    clear_partials(folder / "resume")
    return file


def check_held(folder: Path, file) -> None:
    """Raises RunStopped where the folder is no longer the one whose run.json is `file`, from `lock`: the next line or
    checkpoint would go to another folder, or to none."""
    try:
        there = os.stat(folder / "run.json")
        # The same file, or, on a file system that numbers its files anew, one with the same content.
        same = os.path.samestat(there, os.fstat(file.fileno())) or (folder / "run.json").read_bytes() == _content(file)
    except OSError:
        same = False
    if not same:
        raise RunStopped(f"{folder}: was removed, renamed or replaced while this run wrote to it; put it back, and the "
                         "same command goes on")


def _content(file) -> bytes:
    file.seek(0)
    return file.read()


def finish(folder: Path) -> None:
    """Writes into run.json that the run is finished."""
    with writing(folder / "run.json"), new_file(folder / "run.json") as place:
        place.write_text(_text(read(folder) | {"finished": True}), encoding="utf-8")


def _text(record: dict) -> str:
    return json.dumps(record, indent=2) + "\n"


def versions() -> dict[str, str]:
    packages = {name: _version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0]} | packages | {"torch": str(torch.__version__)}  # with its CUDA version


_version = functools.cache(importlib.metadata.version)  # it reads a file


def git_commit(program: Path) -> str | None:
    """The commit of the program in this folder; None where it is no clone, or git is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(program), "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
