"""Wrong input on purpose: ways to break a file, and how a script must end on what is broken.

A case is (name, change, flags, words): `change(folder)` breaks something in a folder of good input, `words` must all be
in the one line that the script then says.
"""

import contextlib
import json
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path

from nanodpo.errors import run_script
from nanodpo.folder.atomic import MANIFEST, file_facts

LIBRARIES = ("", "transformers", "datasets", "huggingface_hub")  # loggers that hand their records to nobody else
QUIET = (DeprecationWarning, PendingDeprecationWarning, ResourceWarning, ImportWarning)  # Python shows no user these
JUNK = bytes(range(256)) * 8


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def beheaded(content: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in content[:8]) + content[8:]


def nothing(content: bytes) -> bytes:
    return b""


def junk(content: bytes) -> bytes:
    return JUNK


def nuls(content: bytes) -> bytes:
    return bytes(len(content))


def flipped(content: bytes) -> bytes:
    """One bit, amid the rest."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


BYTES = {"cut short": cut, "first bytes flipped": beheaded, "emptied": nothing, "binary": junk, "NULs": nuls}
DEEP = "[" * 100_000 + "]" * 100_000


def broken(name: str, how):
    """A change: the file's bytes through `how`; "a folder" puts a folder in its place, "missing" nothing."""
    def change(folder: Path) -> None:
        file = folder / name
        content = file.read_bytes()
        file.unlink()
        if how == "a folder":
            file.mkdir()
        elif how != "missing":
            file.write_bytes(how(content))
    return change


def written(name: str, content: str | bytes):
    """A change: this file, and nothing else in it."""
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def listed(name: str, how):
    """A change: the file's folder has a manifest, as train.py writes it, and then the file goes through `how`."""
    def change(folder: Path) -> None:
        place = (folder / name).parent
        facts = {file.name: file_facts(file) for file in place.iterdir()}
        (place / MANIFEST).write_text(json.dumps({"step": 3, "files": facts}))
        broken(name, how)(folder)
    return change


def edited(name: str, **values):
    """A change: these entries of a JSON file; `...` takes one away. "a__b" is entry b of entry a."""
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            *path, last = key.split("__")
            place = content
            for part in path:
                place = place[part]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        (folder / name).write_text(json.dumps(content))
    return change


def nothing_changed(folder: Path) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes, None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


class Listener(logging.Handler):
    """Keeps what would be printed on a user's screen, whatever stream a library's handler once took for stderr."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.heard = []

    def emit(self, record) -> None:
        self.heard.append(record.getMessage())


@contextlib.contextmanager
def listening():
    """Collects the logs and warnings of libraries within the block."""
    listener = Listener()
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield listener.heard
        listener.heard += [str(w.message) for w in warned if not issubclass(w.category, QUIET)]
    finally:
        for name in LIBRARIES:
            logging.getLogger(name).removeHandler(listener)


def refused(main, flags, folder: Path, monkeypatch, capfd, chatter: str = "") -> str:
    """Runs a script's main(flags) and returns its one line on stderr.

    Asserts that it was one, of exit code 2; that nothing else was said but `chatter`, a pattern, on stdout; and that
    everything in `folder` is as it was.
    """
    before = contents(folder)
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
    capfd.readouterr()
    with listening() as heard:
        code = run_script(main)
    out, err = capfd.readouterr()
    assert code == 2, (code, out, err)
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert len(err) < 1500 and err[:-1].isprintable(), err
    assert re.fullmatch(chatter, out, re.DOTALL), out
    assert not heard, heard
    assert contents(folder) == before
    return err


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def changed_weights(name: str, how):
    """A change: `how(tensors by name)` on a file of weights."""
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / name)
        how(state)
        save_file(state, folder / name, {"format": "pt"})
    return change
