"""Prepared data on disk: made once, by one rank of a machine, and mapped into the memory of all ranks and later runs.

An entry is named by a fingerprint of everything that its token ids follow from. Limits are applied to it anew in every
run, so what is refused or said of a row does not depend on whether there was an entry.
"""

import contextlib
import dataclasses
import datetime
import decimal
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.places import contents
from ..data.prepared import Line, Prepared, Reading, prepare
from ..data.rows import read_places
from ..data.template import Template
from ..errors import UserError, first_line
from ..files import check_regular
from ..ranks.distributed import say
from .atomic import aside, clear, clear_abandoned, file_facts, new_file, open_lock, tensors_hash, writing

SMALL = 2**20  # bytes of files that are prepared in less time than it takes to look after a cache
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")


def keep(cache_dir: str, path: str, template: Template, how: Reading) -> Prepared:
    """The prepared rows of a data set, from its entry in `cache_dir`. Where there is none, or a damaged one, the first
    process that comes makes it, and others that want the same wait. Small data sets are prepared without an entry.

    Raises UserError as `prepare` does, and for an entry that can't be read.
    """
    files, places = contents(path), None
    if files is None:  # of the hub, or a URL: known when it is read, and read in every run
        places = read_places(path)
        files = _contents_of_rows(places)
    if not files or sum(size for *_, size in files) < SMALL:
        return prepare(path, template, how, False, places)
    file = Path(cache_dir) / f"data-{fingerprint(files, template, how)[:24]}.safetensors"
    found = _load(file)
    with contextlib.nullcontext() if found else _alone(file) as alone:
        if found := found or _load(file):  # made while this process waited
            say(f"data: {found.count:,} rows prepared before, from the cache\n  {file}")
            return found
        found = prepare(path, template, how, bool(alone), places)
        # If the files have changed meanwhile, nobody knows which content was read.
        if not (found.ids and (places or contents(path) == files) and _save(file, found)):
            return found
        found.ids = found.ids[:0]  # not in memory twice
        return _load(file) or prepare(path, template, how, bool(alone), places)


def _contents_of_rows(places: list[list[dict]]) -> list[tuple] | None:
    """As `contents`, of rows that were read: number, hash and size in characters of those of each place; None where
    they hold what no hash can be made of, like pictures."""
    found = []
    try:
        for rows in places:
            digest, size = hashlib.sha256(), 0
            for row in rows:
                text = json.dumps(row, default=_by_value)
                digest.update(f"{text}\n".encode())
                size += len(text)
            found.append(("rows", len(rows), digest.hexdigest(), size))
    except (TypeError, ValueError):
        return None
    return found


def _by_value(value) -> str:
    """A value of a type that JSON lacks. Raises TypeError for one whose repr may not tell all of it."""
    if isinstance(value, (bytes, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return repr(value)
    raise TypeError


def fingerprint(files: list[tuple], template: Template, how: Reading) -> str:
    """A hash of the data, the tokenizer and its chat template, the settings, the libraries, and this program's way to
    read data."""
    own = [*sorted((Path(__file__).parent.parent / "data").glob("*.py")), Path(__file__)]
    facts = [files, how._asdict(), template.header, template.end, str(template.date), template.options,
             str(template.tokenizer.chat_template), _tokenizer_files(template.tokenizer),
             [(file.name, file_facts(file)["sha256"]) for file in own], platform.python_version(),
             [importlib.metadata.version(name) for name in LIBRARIES]]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _tokenizer_files(tokenizer) -> list[tuple[str, str]]:
    """The files that a tokenizer would be saved as, which have all of it, and that of its class."""
    with tempfile.TemporaryDirectory() as folder, writing(Path(folder)):
        tokenizer.save_pretrained(folder)
        files = [*sorted(Path(folder).rglob("*")), Path(inspect.getfile(type(tokenizer)))]
        return [(file.name, file_facts(file)["sha256"]) for file in files if file.is_file()]


@contextlib.contextmanager
def _alone(file: Path):
    """Waits until no other process makes this entry. Yields whether others now wait for this one: not where the folder
    can't be written to, or has no locks."""
    place = aside(file, "lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(place)
    except OSError:
        lock = None
    if lock:
        for left in {*file.parent.glob(aside(file, "*").name)} - {place}:
            clear(left)  # of a process that was killed while it wrote
        clear_abandoned(file.with_name("*.safetensors"))
    try:
        yield lock is not None
    finally:
        if lock:
            clear(place)
            lock.close()


def _lock(place: Path):
    """Opens and locks a file that whoever had it locked before has removed, so that nothing stays of it."""
    while True:
        lock = open_lock(place)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), place.stat()):
                return lock
        lock.close()


def _load(file: Path) -> Prepared | None:
    """An entry, its token ids in the file's own memory; None where there is none, or a damaged one, which is said.
    Raises UserError where the file can't be read."""
    try:
        check_regular(file)  # a pipe would be waited for
        with safe_open(file, "pt") as entry:
            tensors = {name: entry.get_tensor(name) for name in ("ids", "rows")}
            digest = (entry.metadata() or {}).get("sha256")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except SafetensorError as error:
        say(f"data: {file} is damaged ({first_line(error)}), preparing the rows again")
        return None
    except OSError as error:
        raise UserError(f"--cache_dir: {file}: can't be read ({first_line(error)}); remove it, or name another folder"
                        ) from error
    if digest != tensors_hash(file.name, tensors):
        say(f"data: {file} is damaged (not what was written), preparing the rows again")
        return None
    said = json.loads(tensors["rows"].numpy().tobytes())
    lines, dropped = [Line(*line) for line in said["lines"]], [(row, reason) for row, reason in said["dropped"]]
    questions = {int(row): tuple(pair) for row, pair in said["questions"].items()}
    return Prepared(**said | {"more": tuple(said["more"]), "lines": lines, "dropped": dropped, "questions": questions,
                              "ids": memoryview(tensors["ids"].numpy())})


def _save(file: Path, found: Prepared) -> bool:
    """Writes an entry. Returns whether it could be written; where not, that is said, and the rows are as good."""
    rows = {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "ids"}
    tensors = {"ids": torch.frombuffer(found.ids, dtype=torch.int32),
               "rows": torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)}
    try:
        with new_file(file, shared=True) as place:
            save_file(tensors, place, {"sha256": tensors_hash(file.name, tensors)})
    except (OSError, SafetensorError) as error:
        say(f"data: {file} can't be written ({first_line(error)}); the next start prepares the rows again")
        return False
    say(f"data: {found.count:,} rows prepared, kept in\n  {file}")
    return True
