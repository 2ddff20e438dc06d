"""Reads settings that are not flags: a YAML or JSON file, and the launcher's environment."""

import errno
import os
import re

from ..errors import UserError
from ..files import parse_json, read_text, repeated
from .unknown import OTHERWISE, hint


def read_settings(path: str, names: list[str]) -> list[str]:
    """A flat YAML or JSON file as flags, so that argparse converts and checks its values like those of other flags.

    Values stay as they are written (1e-5, 010): YAML would read the first as text and the second as 8. Raises UserError
    for an unreadable file, a key not in `names` and a nested value.
    """
    import yaml  # a dependency of transformers

    try:
        text = read_text(path)
        if path.endswith(".json"):
            settings = parse_json(text, parse_int=str, parse_float=str, parse_constant=str)
        else:
            settings = yaml.load(text, Loader=_loader())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML or JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected settings like `learning_rate: 1e-5`, found {type(settings).__name__}")
    if unknown := [str(key) for key in settings if key not in names]:
        hinted = [f"{key} ({words})" if (words := hint(key, names, OTHERWISE, "")) else key for key in unknown]
        raise UserError(f"{path}: unknown setting {', '.join(hinted)}; `train.py --help` lists them")
    for key, value in settings.items():
        if isinstance(value, (dict, list)):
            raise UserError(f"{path}: {key} must be a single value, found {type(value).__name__}")
    return [f"--{key}={value}" for key, value in settings.items() if value not in (None, "", "null", "~")]


def _loader():
    """YAML's plainest loader, which leaves every value text, and raises ValueError for a key that is there twice."""
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node, deep=False):
            values = super().construct_mapping(node, deep)
            if len(values) < len(node.value):
                raise ValueError(f"has {repeated(key.value for key, _ in node.value)!r} twice")
            return values

    return Loader


def check_path(flag: str, path: str) -> None:
    """Raises UserError for a path that no file can have: a settings file may hold characters that a shell would not
    pass on."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # half a character
        name = b"\0"
    if b"\0" in name:
        raise UserError(f"{flag} {path}: no such file can be, since the name holds NUL or half a character")
    if len(name) > 4095 or max(map(len, name.split(b"/"))) > 255:
        raise UserError(f"{flag} {path}: {os.strerror(errno.ENAMETOOLONG)}")


def local_rank(flag: int) -> int:
    """This process's number on its machine, from LOCAL_RANK or, where the launcher sets none, from --local_rank. Raises
    UserError where they differ, and for an environment in which several processes would not make one run."""
    for name in ("RANK", "WORLD_SIZE"):
        if not re.fullmatch("[0-9]{1,9}", os.environ.get(name, "0")):
            raise UserError(f"{name} is {os.environ[name]!r} in the environment, not a number; launchers set it")
    given = os.environ.get("LOCAL_RANK")
    alone = "RANK" not in os.environ
    if alone and any(os.environ.get(name, "1") != "1" for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        raise UserError("several processes were started by srun or mpirun without RANK, so each would be a run of its "
                        "own; let them start torchrun, one a machine: srun torchrun --nproc_per_node=... train.py")
    if not alone and os.environ.get("WORLD_SIZE", "1") != "1" and given is None and flag < 0:
        raise UserError("RANK and WORLD_SIZE are set, but not LOCAL_RANK, so all would share one GPU; set it too")
    if alone and int(os.environ.get("WORLD_SIZE", 1)) != 1:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but RANK is not set, so this "
                        "would be a run of one rank; start it with deepspeed or torchrun, or unset WORLD_SIZE")
    if given is not None and not re.fullmatch("[0-9]{1,9}", given):
        raise UserError(f"LOCAL_RANK is {given!r} in the environment, not a rank")
    rank = flag if flag >= 0 else int(given or 0)
    if given is not None and rank != int(given):
        raise UserError(f"--local_rank {flag}, but LOCAL_RANK is {given}")
    if not alone:
        check_meeting()
        os.environ.setdefault("LOCAL_RANK", str(rank))  # DeepSpeed reads it there
    elif flag > 0:
        raise UserError(f"--local_rank {flag} without RANK: start several processes with deepspeed or torchrun; to "
                        "choose a GPU set CUDA_VISIBLE_DEVICES")
    return rank


def check_meeting() -> None:
    """Raises UserError unless the environment says how many ranks there are, and where they meet."""
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(f"RANK is set in the environment, but not {', '.join(missing)}; deepspeed and torchrun set "
                        "them all, and a single process needs none: unset RANK")
    rank, world, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if int(rank) >= int(world):
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world} in the environment; ranks are numbered from 0, so it "
                        "must be below WORLD_SIZE")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT is {port!r} in the environment, not a port (1 to {2**16 - 1})")
