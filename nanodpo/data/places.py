"""Names of data -> files: of this machine, one, a folder of them or several; or a data set of the hub."""

import bz2
import glob
import gzip
import hashlib
import lzma
import os
from pathlib import Path

from ..errors import UserError
from ..files import check_regular

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}  # after one of the suffixes
SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")  # in a folder that datasets' save_to_disk wrote
# Names of lists of rows that a JSON file may hold in one object.
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval", "data", "rows")


def places_of(path: str) -> list[str]:
    """The names in a list with commas; a file that has a comma in its own name is one."""
    if "," not in path or os.path.exists(path) or glob.glob(path, recursive=True):
        return [path]
    return [place for place in map(str.strip, path.split(",")) if place]


def hub_parts(place: str) -> tuple[str, str, str, str]:
    """(name, revision, config, split) of a data set of the hub; those that are not given are empty.

    >>> hub_parts("org/pairs@main:default:train[:10%]"), hub_parts("org/pairs")
    (('org/pairs', 'main', 'default', 'train[:10%]'), ('org/pairs', '', '', ''))
    """
    name, config, split = (place.split(":", 2) + ["", ""])[:3]
    name, _, revision = name.partition("@")
    return name, revision, config, split


def name_splits(args) -> None:
    """Writes --split and --eval_split into the names of the data, as which they are recorded. Raises UserError."""
    if args.eval_split and not args.eval_file_path:
        raise UserError(f"--eval_split {args.eval_split}: has no meaning without --eval_file_path; leave it out")
    args.train_file_path = with_split(args.train_file_path, args.split, "--split")
    args.eval_file_path = args.eval_file_path and with_split(args.eval_file_path, args.eval_split, "--eval_split")
    args.split = args.eval_split = None


def with_split(path: str, split: str | None, flag: str) -> str:
    """The same names, each with this split behind it; `flag` is where it comes from. Raises UserError for a name that
    has one."""
    if split is None:
        return path
    if "," in split or not split:
        raise UserError(f"{flag} {split}: must be one split; several are FOLDER::A,FOLDER::B in the name of the data")
    found = []
    for place in places_of(path):
        there, own = local(place)
        if own or there is None and hub_parts(place)[3]:
            raise UserError(f"{flag} {split}: {place} names a split already; leave one of them out")
        found.append(place + ("::" if there or "://" in place or ":" not in place else ":") + split)
    return ",".join(found)


def absolute(path: str) -> str:
    """The same names, those of files and folders that are there by their full path."""
    return ",".join(os.path.abspath(place) if local(place)[0] else place for place in places_of(path))


def local(place: str) -> tuple[str | None, str | None]:
    """(name of a file, folder or glob that is there, split or None); (None, None) for a URL, and what may be on the
    hub."""
    if "://" in place:
        return None, None
    name, config, split = (place.split(":", 2) + ["", ""])[:3]
    for there, part in ((place, None), (os.path.join(name, config) if config else name, split or None)):
        if Path(there).exists() or glob.glob(there, recursive=True):
            return there, part
    return None, None


def files_of(name: str, split: str | None) -> list[str]:
    """The data files behind a local name; none for a folder of save_to_disk, which datasets reads itself."""
    if not Path(name).is_dir():
        return [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
    if odd := next((file for file in Path(name).rglob("*") if not (file.is_file() or file.is_dir())), None):
        raise UserError(f"{name}: {odd.name} in it is not a file")
    if any((Path(name) / file).exists() for file in SAVED):
        return []
    from datasets.data_files import DataFilesDict, get_data_patterns  # slow to import

    try:  # as datasets tells by their names which files are of which split
        place = glob.escape(name)
        found = DataFilesDict.from_patterns(get_data_patterns(place), base_path=place)
    except FileNotFoundError:  # as it calls a folder without files
        found = {}
    found = {str(part): [file for file in files
                         if suffix_of(file) in SUFFIXES and not Path(file).match("dataset_infos.json")]
             for part, files in found.items()}
    if not (found := {part: files for part, files in found.items() if files}):
        raise UserError(f"{name}: is a folder without data files ({', '.join(SUFFIXES)})")
    chosen = one_split(name, found, split)
    if split is None:
        _check_all_are_read(Path(name), str(*found), chosen)
    return chosen


def _check_all_are_read(folder: Path, split: str, chosen: list[str]) -> None:
    """Raises UserError where datasets takes some files alone, since a word in their names, as in pairs_test.jsonl, is a
    split's, and leaves out others of the same kind."""
    read, kinds = {Path(file).resolve() for file in chosen}, {suffix_of(file) for file in chosen}
    names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*"))
             if file.is_file() and suffix_of(str(file)) in kinds and file.resolve() not in read]
    if names := [name for name in names if not any(part.startswith((".", "__")) for part in Path(name).parts)]:
        taken = ", ".join(Path(file).name for file in chosen[:3])
        raise UserError(f"{folder}: by their names, as datasets reads them, {taken} would be the split {split}, and "
                        f"{', '.join(names[:3])} of none; name the files")


def one_split(name: str, splits: dict, split: str | None):
    """The split that was asked for, or the only one. Raises UserError."""
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split in splits:
        return splits[split]
    asked = f"has no split {split!r}; it has {', '.join(splits)}" if split else (
        f"holds several splits ({', '.join(splits)}); name one")
    raise UserError(f"{name}: {asked}, like {name}::{next(iter(splits))}")


def suffix_of(file: str) -> str:
    """.jsonl also of a file that is called .jsonl.gz."""
    path = Path(file)
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def kind_of(files: list[str]) -> str:
    """The suffix that files share. Raises UserError for mixed, unknown and empty ones, and for what is no file."""
    if odd := [file for file in files if not Path(file).is_file()]:
        raise UserError(f"{odd[0]}: is not a file")
    suffixes = {suffix_of(file) for file in files}
    if len(suffixes) != 1 or not suffixes <= {*SUFFIXES}:
        raise UserError(f"{files[0]}: expected {', '.join(SUFFIXES)} (the text ones also with "
                        f"{', '.join(PACKED)} behind), all files of one kind, found "
                        f"{', '.join(sorted(suffixes)) if any(suffixes) else 'no suffix'}")
    if empty := [file for file in files if not Path(file).stat().st_size]:
        raise UserError(f"{empty[0]}: is an empty file")
    kind = suffixes.pop()
    if kind in (".parquet", ".arrow") and (packed := [file for file in files if Path(file).suffix in PACKED]):
        raise UserError(f"{packed[0]}: unpack it first; {kind} files are packed inside")
    return kind


def contents(path: str) -> list[tuple] | None:
    """All that the rows of `path` follow from: split, name, hash and size in bytes of each file, in order; None for a
    data set of the hub, and for what can't be read, of which reading it says why."""
    found = []
    try:
        for place in places_of(path):
            name, split = local(place)
            if name is None:
                return None
            for file in files_of(name, split) or sorted(file for file in Path(name).rglob("*") if file.is_file()):
                check_regular(file)
                own = os.path.relpath(file, name) if Path(name).is_dir() else Path(file).name
                with open(file, "rb") as opened:
                    found.append((split, own, hashlib.file_digest(opened, "sha256").hexdigest(), os.path.getsize(file)))
    except (OSError, UserError):
        return None
    return found
