"""Hashes what a number depends on: the files of a model, wherever they lie, and any values."""

import contextlib
import hashlib
import json
from pathlib import Path

from ..errors import UserError, first_line
from ..files import read_text
from ..folder.atomic import BESIDE, MANIFEST, check_whole, file_facts
from ..model.hub import TEXTS, commit_of, place_of

FILES = ["*.safetensors", "*.bin", *TEXTS]


def hash_of(value) -> str:
    """A hash of lists, texts and numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class Contents:
    """The files of a model or adapter as they are now. `key` is a hash of them all; of a hub id, it is its commit."""

    def __init__(self, name: str):
        """Raises UserError for a folder that is not what its manifest says, or that can't be read."""
        self.name, self.folder = name, Path(place_of(name))
        self.stamps = self._stamps()
        facts = check_whole(self.folder)
        try:
            self.hashes = {file: facts.get(file) or file_facts(self.folder / file) for file in self.stamps}
        except OSError as error:
            raise UserError(f"{name}: can't be read: {first_line(error)}") from error
        # Not of the manifest, which says whose checkpoint it is: one set of weights is scored once.
        whole = sorted((file, facts["sha256"]) for file, facts in self.hashes.items() if file != MANIFEST)
        self.key = hashlib.sha256(repr(whole or (name, commit_of(name))).encode()).hexdigest()
        small = [item for item in whole if not item[0].endswith((".safetensors", ".bin"))]
        self.settings_key = hash_of(small or name)  # of its tokenizer and config

    def check(self) -> None:
        """Raises UserError where the files are others by now. Only files that were written to are read again."""
        found = self._stamps()
        for file in sorted(file for file in found | self.stamps if found.get(file) != self.stamps.get(file)):
            if file not in found or file_facts(self.folder / file) != self.hashes.get(file):
                raise UserError(f"{self.folder / file}: has changed while it was scored; what was done before is kept. "
                                "Give the same command again")
        self.stamps = found

    def _stamps(self) -> dict[str, tuple]:
        """Each file's size, times and number, which change when somebody writes to it; empty for no model."""
        try:
            if not any((self.folder / name).is_file() for name in ("config.json", "adapter_config.json")):
                return {}
            files = {file.name: file for kind in FILES for file in self.folder.glob(kind)} | _listed(self.folder)
            files = {name: file.stat() for name, file in files.items() if file.is_file() and file.name not in BESIDE}
        except OSError:
            return {}
        return {name: (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino) for name, s in files.items()}


def _listed(folder: Path) -> dict[str, Path]:
    """The files of weights that an index in the folder names; they may lie in another folder, or be of another kind
    than FILES. Of an index that makes no sense none: whoever opens the model says so."""
    found = {}
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found |= {name: folder / name for name in json.loads(read_text(index))["weight_map"].values()}
    return found
