"""Reads a file of settings, YAML or JSON."""

import errno
import os

from ..errors import UserError
from ..files import parse_json, read_text, repeated
from .unknown import OTHERWISE, hint

LISTS = ("report_to", "lora_target_modules")  # settings that may be a list of values


def read_mapping(path: str, where: str, example: str, as_text: bool = False) -> dict:
    """The settings in a YAML or JSON file, no key of them twice. `as_text`: values stay as they are written. Raises
    UserError, which begins with `where`, for a file that can't be read, or holds something else."""
    import yaml  # a dependency of transformers

    numbers = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), str) if as_text else {}
    try:
        text = read_text(path)
        if path.endswith(".json"):
            found = parse_json(text, **numbers)
        else:
            found = yaml.load(text, Loader=_unique_keys(yaml.BaseLoader if as_text else yaml.SafeLoader))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not YAML or JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected settings like `{example}`, found {type(found).__name__}")
    return found


def read_settings(path: str, names: list[str]) -> list[str]:
    """A flat YAML or JSON file as flags, so that argparse converts and checks its values like those of other flags.

    Values stay as they are written (1e-5, 010): YAML would read the first as text and the second as 8. Raises UserError
    for an unreadable file, a key not in `names` and a nested value.
    """
    settings = read_mapping(path, path, "learning_rate: 1e-5", as_text=True)
    if unknown := [str(key) for key in settings if key not in names]:
        hinted = [f"{key} ({words})" if (words := hint(key, names, OTHERWISE, "")) else key for key in unknown]
        raise UserError(f"{path}: unknown setting {', '.join(hinted)}; `train.py --help` lists them")
    return as_flags(settings, path)


def as_flags(settings: dict, path: str) -> list[str]:
    """Settings as flags. Raises UserError, which names `path`, for a nested value."""
    flags = []
    for key, value in settings.items():
        several = isinstance(value, list) and key in LISTS and not any(isinstance(v, (dict, list)) for v in value)
        if isinstance(value, (dict, list)) and not several:
            raise UserError(f"{path}: {key} must be a single value, found {type(value).__name__}")
        if several:
            flags += [f"--{key}", *map(str, value)] if value else []
        elif value not in (None, "", "null", "~"):
            flags.append(f"--{key}={value}")
    return flags


def _unique_keys(base: type) -> type:
    """A loader of YAML that raises ValueError for a key that is there twice."""
    class Loader(base):
        def construct_mapping(self, node, deep=False):
            values = super().construct_mapping(node, deep)
            if len(values) < len(node.value):
                raise ValueError(f"has {repeated(key.value for key, _ in node.value)!r} twice")
            return values

    return Loader


def open_home(flag: str, path: str) -> str:
    """A path with its ~ opened: no shell does that in --name=~/x or in a settings file. Raises UserError for a ~ that
    is nobody's home here: a folder with that name would be made."""
    if (opened := os.path.expanduser(path)).startswith("~"):
        home = path.partition("/")[0]
        unset = " (HOME is not set)" * (home == "~")
        raise UserError(f"{flag} {path}: there is no home folder {home} here{unset}; give a full path, or "
                        f"./{path} if that is its name")
    return opened


def check_path(flag: str, path: str) -> None:
    """Raises UserError for a path that no file can have: a settings file may hold characters that a shell would not
    pass on."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # half a character
        name = b"\0"
    if b"\0" in name:
        raise UserError(f"{flag} {path}: no such file can be, since the name holds NUL or half a character")
    check_utf_8(flag, path)
    if len(name) > 4095 or max(map(len, name.split(b"/"))) > 255:
        raise UserError(f"{flag} {path}: {os.strerror(errno.ENAMETOOLONG)}")


def check_utf_8(what: str, name: str) -> None:
    """Raises UserError for a name that Linux may have and safetensors, tokenizers and Arrow can't: it is no UTF-8, or
    was read in a locale of ASCII. `what` stands before it in the message."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {name}: no such file or name can be used, since it is not UTF-8 here; rename it"
                        ) from error
