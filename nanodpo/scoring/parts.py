"""Keeps the results of a scoring in <output_dir>/parts, so that the next one goes on from them.

A part is a folder with the tables of some rows under one checkpoint. Its manifest.json has the size and hash of every
file, and what it holds, {key: {rows, responses, family}}, where a key is a hash of everything that could change a
number (plan.py). It may have lines of more rows than that. A part that is no longer what was written counts as not
done.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
import pyarrow

from ..errors import RankStopped, RunStopped, UserError
from ..files import check_absent, read_text
from ..folder import atomic
from ..ranks import waits
from ..ranks.distributed import from_main, is_main, main_first, say
from . import plausible

FORMAT = 5  # of the tables and of what is in them, and of what a stopped ledger keeps; another one is not read
# Without a start; where a gradient is zero.
MAY_BE_MISSING = {"implausible_mass", "implausible_mass_start", "grad_cosine"}


class Alone:
    """Keeps other scorings out of <output_dir>, whose parts are in `folder`, within a `with`. All ranks make it."""

    def __init__(self, folder: Path):
        """Makes the folder. Raises UserError where another scoring is at work in it."""
        self.made = [place for place in (folder, *folder.parents) if not place.exists()] if is_main() else []
        self.folder, self.lock = folder, None
        with main_first():
            if is_main():
                self.lock = _lock(folder)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        """Lets others in. Where nothing was kept no folder stays that was made for it."""
        if self.lock and not list(self.folder.glob("[!.]*/")):
            (self.folder / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody has put something there
                for place in self.made:
                    place.rmdir()
        if self.lock:
            self.lock.close()


class Parts(Alone):
    """The parts in a folder, within a `with`. All ranks have the same list; rank 0 writes."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.index, self.families = {}, {}
        self.whole: set[str] = set()  # names of parts whose files were read and compared with their manifest
        self.unknown = 0  # parts that are not read, on rank 0
        found = []
        with main_first():
            if is_main():
                found = self._list()
        for name, holds in from_main(found):
            self._enter(name, holds)

    def _list(self) -> list[tuple[str, dict]]:
        """(name, what it holds) of each part, the oldest first."""
        found = []
        for place in sorted(self.folder.glob("[!.]*/"), key=lambda place: (place.stat().st_mtime_ns, place.name)):
            try:
                facts = json.loads(read_text(place / atomic.MANIFEST))
                holds = {key: held | {"rows": set(held["rows"]), "family": held["family"]}
                         for key, held in facts["holds"].items()}
                if facts["format"] != FORMAT or not all(isinstance(held["family"], str) for held in holds.values()):
                    raise ValueError
                found.append((place.name, holds))
            except OSError as error:
                check_absent(error, place)
                self.unknown += 1
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self.unknown += 1
        if self.unknown:
            say(f"{self.folder}: {self.unknown} parts are damaged, or of another version, and not used; they can be "
                "removed. The tables keep what is scored again now, and lose the rest")
        return found

    def _enter(self, name: str, holds: dict) -> None:
        for key, held in holds.items():
            self.index.setdefault(key, {})[name] = held
            self.families.setdefault(held["family"], []).append(key)

    def rows(self, key: str) -> set[int]:
        """Rows that are done. Parts that are damaged go, with a line that says so; all ranks must ask."""
        damaged = []
        with main_first():
            if is_main():
                for name in {*self.index.get(key, {})} - self.whole:
                    if isinstance(wrong := atomic.read_manifest(self.folder / name), str):
                        say(f"{self.folder / name}: {wrong}; its rows are scored again")
                        atomic.remove(self.folder / name)
                        damaged.append(name)
                    self.whole.add(name)
        for name in from_main(damaged):
            for parts in self.index.values():
                parts.pop(name, None)
        return set().union(*(held["rows"] for held in self.index.get(key, {}).values()))

    def newest(self, family: str) -> str | None:
        """The key of this family that was written last."""
        return next((key for key in reversed(self.families.get(family, [])) if self.index.get(key)), None)

    def add(self, holds: dict[str, dict], tables: dict[str, pandas.DataFrame], sets: Sequence = ()) -> None:
        """Keeps tables, whole or not at all, and the plausible tokens of each line of "scores" where these are of a
        run's start. All ranks call it, rank 0 has the tables.

        `holds` is {key: {"rows": set, "responses": names or None for tables without any, "family": key}}.
        """
        name = hashlib.sha256(repr(sorted((key, sorted(held["rows"])) for key, held in holds.items())).encode())
        place = self.folder / name.hexdigest()[:24]
        with main_first():
            if is_main():
                self._write(place, holds, tables, sets)
        self._enter(place.name, holds)

    def _write(self, place: Path, holds: dict, tables: dict[str, pandas.DataFrame], sets) -> None:
        written = {key: held | {"rows": sorted(held["rows"])} for key, held in holds.items()}
        with atomic.new_folder(place, {"format": FORMAT, "holds": written}) as new:
            for name, table in tables.items():
                check_finite(table, f"{place.parent}, {name}")
                table.to_parquet(new / f"{name}.parquet", index=False)
            if sets:
                plausible.write(new, sets)
        self.whole.add(place.name)

    def read(self, key: str, table: str) -> pandas.DataFrame:
        """The lines of this key in a table, each row from one part; an empty table where there are none."""
        found = []
        for place, held, rows in self._places(key):
            with contextlib.suppress(FileNotFoundError):  # a part without, say, a failed row
                lines = self._table(place / f"{table}.parquet")
                here = lines["row"].isin(rows)
                if held["responses"] is not None and "response" in lines:
                    here &= lines["response"].isin(held["responses"])
                found.append(lines[here])
        return pandas.concat(found, ignore_index=True) if found else pandas.DataFrame()

    def answers(self, key: str, table: str) -> dict[int, list[int]]:
        """{row: token ids of its greedy answer}."""
        lines = self.read(key, table)
        return {row: ids.tolist() for row, ids in zip(lines["row"], lines["ids"])} if len(lines) else {}

    def sets(self, key: str, of: set[int]) -> dict[tuple[int, str], plausible.Sets]:
        """{(row, response): tokens that were found plausible} `of` these rows, kept beside the scores of a run's
        start."""
        found = {}
        for place, held, rows in self._places(key):
            rows = rows & of
            if not rows:
                continue
            lines = self._table(place / "scores.parquet")
            sets = plausible.read(place, lines["tokens"].tolist())
            found |= {(row, kind): own for row, kind, own in zip(lines["row"], lines["response"], sets)
                      if row in rows and kind in held["responses"]}
        return found

    def _places(self, key: str):
        """(folder, what it holds of this key, rows to take from it)."""
        taken: set[int] = set()
        for name, held in self.index.get(key, {}).items():
            place = self.folder / name
            if not waits.seen((place / atomic.MANIFEST).exists):
                raise RankStopped(f"{place}: rank 0 wrote it, and this machine does not see it; --output_dir must be a "
                                  "folder that all machines share")
            yield place, held, held["rows"] - taken
            taken |= held["rows"]

    def _table(self, file: Path) -> pandas.DataFrame:
        try:
            table = pandas.read_parquet(file)
        except (ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: was damaged while it was read; give the same command again") from error
        check_finite(table, str(file))
        return table


def check_finite(table: pandas.DataFrame, where: str) -> None:
    """Raises RunStopped for a number that is infinite, or missing where there must be one."""
    for name in table.select_dtypes("number"):
        values = table[name].to_numpy(dtype=float, na_value=np.nan)
        # A response whose log-prob is not finite has a line in scores without numbers, and is in "failed".
        lost = np.isnan(values) & ~table["logps"].isna().to_numpy() if "logps" in table else np.isnan(values)
        if (bad := np.isinf(values) | (lost & (name not in MAY_BE_MISSING))).any():
            at = bad.argmax()
            raise RunStopped(f"{where}: {name} of row {table['row'].to_numpy()[at]} is {values[at]}")


def _lock(folder: Path):
    """Keeps a second scoring out for as long as this process lives; the file must be kept open."""
    with atomic.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = atomic.open_lock(folder / "lock")
        except PermissionError as error:  # another user's
            raise UserError(f"--output_dir {folder.parent}: parts/lock can't be written to ({error.strerror}); name "
                            "another folder") from error
    atomic.hold(file, taken := f"--output_dir {folder.parent}: another scoring is at work there; wait for its end, or "
                "name another folder")
    place = folder / "lock"
    if not place.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(place)):
        raise UserError(taken)  # the other has just ended, and taken its file away
    atomic.clear_partials(folder)
    return file
