"""Compares what the ranks of a run were given, and stops them all where it is not the same.

Each rank reads its own command line, files and libraries. Where these differ, gradients of different runs would be
averaged, references of other weights would be kept for later runs, and ranks that count other steps would wait for each
other. So the ranks compare them before anything is written.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import torch

from ..errors import RankStopped, RunStopped, UserError
from ..flags.arguments import PATHS
from ..flags.loss import loss_name
from ..folder.record import versions
from ..ranks import distributed

# Flags that may differ: a rank's number on its machine, and paths, which may have other names on another machine. What
# is read from these is compared by content; only rank 0 uses the cache.
FREE = {"local_rank", *PATHS}
# Settings that change how numbers are rounded.
ROUNDING = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ATEN_CPU_CAPABILITY",
            "CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE", "NCCL_ALGO", "NCCL_PROTO")


@contextlib.contextmanager
def same_on_all_ranks():
    """Yields a dict to fill with what must be the same on all ranks, {name: value or (value, text to show for it)}.

    At the end of the block all ranks wait for each other. Raises UserError on all of them where their dicts differ;
    where one has raised UserError or RunStopped in the block, raises that on all.
    """
    facts, error = {}, None
    try:
        yield facts
    except (UserError, RunStopped) as caught:
        error = caught
    everyone = distributed.gather_or_raise(None, (error, facts))
    errors = [error for error, _ in everyone]
    for rank, first in enumerate(errors):
        if first and len({str(error) for error in errors}) == 1:
            raise first
        if first:  # the others may have no such file
            who = "" if isinstance(first, RankStopped) else f"rank {rank}: "
            raise (UserError if isinstance(first, UserError) else RunStopped)(f"{who}{first}")
    if different := differences([facts for _, facts in everyone]):
        raise UserError(f"{'; '.join(different)}. All ranks of a run must be given the same")


def differences(everyone: list[dict]) -> list[str]:
    """The differences between the ranks' facts, in words; `everyone` has the facts of each rank.

    >>> differences([{"--beta": 0.1}, {"--beta": 0.2}, {"--beta": 0.2}])
    ['ranks 1, 2 have --beta 0.2, rank 0 0.1']
    """
    lines = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        values = [facts.get(name) for facts in everyone]
        shown = {}
        for rank, value in enumerate(values):
            if _compared(value) != _compared(values[0]):
                shown.setdefault(_shown(value), []).append(rank)
        for value, ranks in shown.items():
            who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} ha{'ve' if len(ranks) > 1 else 's'}"
            lines.append(f"{who} {name} {value}, rank 0 {_shown(values[0])}")
    return lines


def _compared(value):
    return value[0] if isinstance(value, tuple) else value


def _shown(value) -> str:
    return value[1] if isinstance(value, tuple) else "nothing" if value is None else str(value)


def flags(arguments: dict) -> dict:
    """The settings by the names of their flags, without FREE. Of a loss of the user's own its function's name counts;
    the hash of its file is compared, too."""
    found = {f"--{name}": value for name, value in arguments.items() if name not in FREE}
    return found | ({"--loss": (loss_name(arguments["loss"]), arguments["loss"])} if "loss" in arguments else {})


def program(script: Path, local_rank: int) -> dict:
    """The program of a rank: a hash of its files, versions of libraries, the device, and settings that round numbers.
    Raises UserError where there is no such CUDA device."""
    files = sorted([script, *(script.parent / "nanodpo").rglob("*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(script.parent)} {file.stat().st_size} ".encode() + file.read_bytes())
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local_rank >= (count := torch.cuda.device_count()):
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = f" (CUDA_VISIBLE_DEVICES={shown}); let each process see all GPUs of its machine" if shown else ""
        raise UserError(f"LOCAL_RANK is {local_rank}, and this process has {count} CUDA device{'s' * (count != 1)}, "
                        f"from 0{hidden}")
    return {"files of this program that hash to": (digest.hexdigest(), digest.hexdigest()[:8]), **versions(),
            "the device": distributed.device_name(device), "threads (OMP_NUM_THREADS):": torch.get_num_threads(),
            **{name: os.environ.get(name) for name in ROUNDING}}


def inputs(paths: tuple, facts: dict, old: dict | None, step: int | None) -> dict:
    """The input of a run, by content. `paths`: --train_file_path and --eval_file_path. `facts` are the entries of its
    run.json, `old` those of the run.json in its folder where there is one, and `step` is the step to go on from where
    --resume names one."""
    flags = ("train_file_path", "eval_file_path")
    read = {f"token ids of --{name}": (ids, f"{ids[:8]}{f' ({path})' * bool(path)}") for name, path, ids in
            zip(flags, paths, [*facts["data"], None]) if ids}
    read |= {f"DeepSpeed's {name}": value for name, value in _leaves(facts["deepspeed"])}
    state = "finished run" if old and old.get("finished") else "run to go on with" if old else "new run"
    if forked := facts.get("fork"):
        read |= {"in --fork the step": forked["step"], "in --fork a run that hashes to": forked["fingerprint"]}
    return read | {"max_length": facts["max_length"], "in --output_dir a": state, "a state of step": step}


def _leaves(value, name: str = ""):
    """(path.of.keys, value) of everything in nested dicts."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _leaves(value[key], f"{name}.{key}" if name else key)
    else:
        yield name, value
