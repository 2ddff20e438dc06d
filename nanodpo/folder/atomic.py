"""Files and folders that are whole or not there: written under another name, flushed, then renamed.

A folder has a manifest of its files, too, which tells whether it is still what was written. A disk that won't take them
ends the run in one line.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import RunStopped, UserError, first_line
from ..files import check_absent, check_regular, read_text
from ..ranks.distributed import say

MANIFEST, FACTS_HASH = "manifest.json", "facts_sha256"
ABANDONED = 24 * 3600  # seconds since a file was written to after which nobody will finish it: that takes seconds
# Of a checkpoint, see card.py: no number depends on them, and people edit them.
BESIDE = ("README.md", "trainer_state.json")


class writing:
    """Raises RunStopped, which names `place`, for an error of the disk within the block."""

    def __init__(self, place: Path):
        self.place = place

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is Exception or isinstance(error, (OSError, SafetensorError)):  # tokenizers raises nothing better
            raise RunStopped(f"{self.place}: can't be written ({first_line(error)}); what was written before is whole, "
                             "and the same command goes on from there") from error


def aside(place: Path, owner: str | None = None) -> Path:
    """The name under which a file or folder is written until it is whole. An `owner` has one of its own."""
    return place.with_name(f".{place.name}{f'.{owner}' if owner else ''}.partial")


def new_owner() -> str:
    """For `aside`, one that nobody has: in containers, and on other machines, processes have the same numbers."""
    return secrets.token_hex(8)


@contextlib.contextmanager
def new_file(file: Path, shared: bool = False):
    """Yields a path to write to, which takes the file's place after the block: a reader, or a run after a crash, finds
    the old file or the new one. After an error the old one stays, and nothing else. `shared`: another process may write
    the same file at the same time; what such ones left when they were killed goes after a day.
    """
    place = aside(file, new_owner() if shared else None)
    if shared:
        clear_abandoned(file)
    try:
        yield place
        finish_file(place)
        os.replace(place, file)
    finally:
        place.unlink(missing_ok=True)
    flush(file.parent)


@contextlib.contextmanager
def new_folder(folder: Path, facts: dict):
    """Yields a new folder to write into, which takes the place of `folder` after the block, with a manifest that holds
    `facts`. The folder above must be there. Raises RunStopped where the disk won't take it; then nothing stays of it.
    """
    place = aside(folder)
    clear(place)
    try:
        with writing(folder):
            place.mkdir()
            yield place
            publish(folder, facts)
    finally:
        clear(place)


def nearest(folder: Path) -> Path:
    """The folder, or the first of those above it that is there, or would be if a link there did not lead nowhere."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())


def check_writable(folder: Path, flag: str) -> None:
    """Raises UserError where no file can be made in `folder`, or in the nearest folder above it that is there; `flag`
    is the flag and its value, for the message. Makes nothing that stays."""
    try:
        if not (place := nearest(folder)).is_dir():
            kind = "a file" if place.exists() else "a link to nowhere"
            raise UserError(f"{flag}: can't be written to ({place} is {kind})")
        # Permission bits don't tell of read-only and odd file systems. Where a file can't be without a name, as on NFS,
        # another rank sees it for a moment: record.claim passes over this ending.
        tempfile.TemporaryFile(dir=place, suffix=".partial").close()
    except OSError as error:
        raise UserError(f"{flag}: can't be written to ({error.strerror})") from error


def saved_steps(folder: Path, prefix: str = "checkpoint") -> list[int]:
    """Steps k of the <prefix>-<k> in a folder, the newest first."""
    steps = (step_of(place.name, prefix) for place in folder.glob(f"{prefix}-*"))
    return sorted((step for step in steps if step is not None), reverse=True)


def step_of(name: str, prefix: str = "checkpoint") -> int | None:
    """The k of <prefix>-<k>; None for a name that nanodpo does not write, as checkpoint-007, or digits of another
    script."""
    found = re.fullmatch(rf"{prefix}-(0|[1-9][0-9]{{0,17}})", name)
    return found and int(found[1])


def remove(folder: Path) -> None:
    """Removes a folder. It is renamed first, so that no half of it is ever taken for a whole one; what a killed process
    leaves of it is removed when the run goes on. Of a link only the link is removed, not what it points to.

    Raises RunStopped where the folder can't be renamed.
    """
    place = folder.with_name(f".{folder.name}.old.partial")
    try:
        if folder.is_symlink():
            say(f"{folder}: is a link; it is removed, and {folder.readlink()} stays")
            folder.unlink()
        elif folder.exists():
            clear(place)
            os.rename(folder, place)
    except OSError as error:
        raise RunStopped(f"{folder}: can't be removed ({first_line(error)}); remove it, and the same command goes on"
                         ) from error
    clear(place)


def file_facts(file: Path) -> dict:
    """Size in bytes and sha256 of a file."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def tensors_hash(of: str, tensors: dict[str, Tensor]) -> str:
    """The sha256 of tensors on CPU, their names, types, shapes and every bit, and of what they are of: a file's name,
    so that a copy of another file in its place is not taken for it."""
    digest = hashlib.sha256(of.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def publish(folder: Path, facts: dict, hashed: dict[str, dict] | None = None) -> None:
    """Gives aside(folder) its manifest and its name. `facts` go into the manifest; `hashed` has `file_facts` by name of
    the files that need not be read again."""
    place, hashed = aside(folder), hashed or {}
    files = sorted(file for file in place.rglob("*") if file.is_file())
    for file in files:
        finish_file(file)
    names = [str(file.relative_to(place)) for file in files if file.name not in BESIDE]
    facts = facts | {"files": {name: hashed.get(name) or file_facts(place / name) for name in names},
                     FACTS_HASH: _facts_hash(facts)}
    with new_file(place / MANIFEST) as manifest:
        manifest.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    remove(folder)  # a damaged one of the same name
    os.rename(place, folder)
    flush(folder.parent)


def _facts_hash(manifest: dict) -> str:
    """The sha256 of a manifest's facts. Its list of files needs none: of each there is one, and somebody may have taken
    out the entry of a file that was meant to change."""
    manifest = json.loads(json.dumps(manifest))  # as it is read again
    facts = {name: value for name, value in manifest.items() if name not in ("files", FACTS_HASH)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _facts(folder: Path) -> dict:
    """Those in a folder's manifest. Raises ValueError where they are not as they were written, and OSError."""
    facts = json.loads(read_text(folder / MANIFEST))
    if facts.get(FACTS_HASH, known := _facts_hash(facts)) != known:  # an earlier version's has no hash
        raise ValueError(f"{MANIFEST} is damaged")
    return facts


def read_manifest(folder: Path) -> dict | str:
    """The facts in a folder's manifest; where it or a file is not as it was written, words that say so. Reads every
    file. Raises UserError for one that can't be read."""
    try:
        facts = _facts(folder)
        for name, expected in facts["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes of {expected['bytes']}"
            if file_facts(file) != expected:
                return f"{name} is not what was written"
    except OSError as error:
        check_absent(error, folder)
        return f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return facts


def read_facts(folder: Path) -> dict:
    """The facts in a folder's manifest, whether or not the files are as it says; empty where there are none that can be
    read."""
    try:
        return _facts(folder)
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def check_whole(folder: Path) -> dict[str, dict]:
    """Returns size and hash of the files in a folder's manifest, by name; nothing for a folder that nanodpo has not
    written. Raises UserError where a file is not as the manifest says, or can't be read."""
    try:
        if '"sha256"' not in read_text(folder / MANIFEST, errors="replace"):  # somebody else's
            return {}
    except OSError as error:  # none, or a hub id
        check_absent(error, folder)
        return {}
    except ValueError:  # no path at all
        return {}
    if isinstance(facts := read_manifest(folder), str):
        raise UserError(f"{folder}: {facts}; copy the folder anew, or remove its {MANIFEST} if the change is meant")
    return facts["files"]


def open_lock(place: Path):
    """Opens a lock file, and makes it where it is not there. Raises OSError for a pipe, which would be waited for."""
    with contextlib.suppress(FileNotFoundError):
        check_regular(place)
    return place.open("ab")


def hold(file, taken: str) -> None:
    """Locks an open file for as long as it stays open. Raises UserError, `taken`, where another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(taken) from error
    except OSError:  # a file system without locks
        pass


def finish_file(file: Path) -> None:
    """Gives a new file the usual permissions, and flushes it to the disk."""
    file.chmod(0o666 & ~_umask())  # safetensors lets the owner alone read its files
    flush(file)


def flush(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_partials(folder: Path) -> None:
    """Removes the files and folders that an ended process left half-written."""
    for place in folder.glob(".*.partial"):
        clear(place)


def clear_abandoned(file: Path) -> None:
    """Removes what killed processes left half-written of a shared file, whose name may be a pattern, and leaves what
    others, on other machines, too, may write to just now."""
    for place in file.parent.glob(aside(file, "*").name):
        with contextlib.suppress(OSError):  # another process was first
            if time.time() - place.lstat().st_mtime > ABANDONED:
                clear(place)


def clear(place: Path) -> None:
    """Removes a half-written file or folder, if it is there. What can't be removed is tried again at the next start."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
