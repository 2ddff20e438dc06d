"""Ranks: starting them under any launcher, and the few things they tell each other."""

import contextlib
import datetime
import json
import os
import socket
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from .errors import RankStopped, RunStopped, UserError, first_line

OWNED = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
         "gradient_clipping", "fp16", "bf16")  # settings of the DeepSpeed JSON that are flags of train.py
UNKNOWN = ("sequence_parallel_size", "tensor_parallel", "pipeline", "autotuning")  # ranks would not be data ranks
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
        "NCCL communicator was aborted", "Socket Timeout", "Connection was likely closed", "Connection refused")
PATIENCE = datetime.timedelta(hours=6)  # ranks with longer rows come later, and saving a large model takes its time

_host = {"group": None}  # ranks of the CPU, where they tell each other things; None: those of the device serve


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say(*text) -> None:
    """Prints on rank 0."""
    if is_main():
        print(*text, flush=True)


def check_device(args) -> None:
    """Raises UserError for settings that this machine can't honour."""
    if args.use_flash_attention and not (torch.cuda.is_available() and args.bf16):
        raise UserError("--use_flash_attention needs a CUDA device and --bf16; leave it out, rows are packed anyway")


def start(local_rank: int) -> torch.device:
    """Joins the ranks of whatever launched this process and returns its device."""
    if "RANK" not in os.environ:  # plain python: without these DeepSpeed goes looking for MPI
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said here, DeepSpeed need not guess and warn
    import deepspeed  # slow to import

    # DeepSpeed calls collectives by names that newer releases of PyTorch want changed: nothing a user can do.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # On CPU DeepSpeed would compile a shared-memory op, and die where there is no compiler; gloo serves as well here.
    if "deepspeed_shm_comm" in getattr(deepspeed.ops, "__compatible_ops__", {}):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if cuda:
        torch.cuda.set_device(local_rank)
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=PATIENCE)
    if cuda and dist.get_world_size() > 1:
        _host["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def read_settings(args, default: Path) -> dict:
    """The DeepSpeed JSON with train.py's own numbers in it. Raises UserError."""
    path = Path(args.deepspeed or default)
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--deepspeed {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--deepspeed {path}: expected an object, found {type(settings).__name__}")
    return engine_config(settings, str(path), args)


def engine_config(settings: dict, path: str, args) -> dict:
    """The DeepSpeed JSON with train.py's own settings written in. Raises UserError where the JSON sets one of those.

    "auto", as other trainers' files have it, means that train.py decides.
    """
    settings = _without_auto(settings)
    # A precision that is off, or says the same as the flag, contradicts nobody.
    agreed = {"fp16": [{"enabled": False}], "bf16": [{"enabled": args.bf16}]}
    if taken := [key for key in OWNED if key in settings and settings[key] not in agreed.get(key, [])]:
        raise UserError(f"{path}: sets {', '.join(taken)}, which train.py owns: remove it there and use the flags "
                            "(--learning_rate, --lr_scheduler_type, --per_device_train_batch_size, "
                            "--gradient_accumulation_steps, --max_grad_norm, --bf16)")
    settings["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    settings["gradient_accumulation_steps"] = 1  # accumulation is train.py's loop, with windows of any size
    settings["gradient_clipping"] = args.max_grad_norm
    settings["bf16"] = {"enabled": args.bf16, "check_grad_overflow": True}
    if args.bf16:  # micro-batches would be summed in bfloat16
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if taken := [key for key in UNKNOWN if key in settings]:
        raise UserError(f"{path}: sets {', '.join(taken)}, which train.py does not support; remove it")
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f'{path}: zero_optimization must be like {{"stage": 0}}, with a stage of 0 to 3')
    offload = zero.get("offload_optimizer") or {}
    if isinstance(offload, dict) and (offload.get("device") == "nvme" or offload.get("ratio", 1) != 1):
        raise UserError(f"{path}: offload_optimizer with device nvme, or a ratio, keeps AdamW's moments where a state "
                        "to resume from can't have them; use device cpu without a ratio")
    if args.bf16 and not zero.get("stage"):
        # DeepSpeed's stage 0 takes one empty Adam step before the first real one in bfloat16, which then is too short.
        say(f"{path}: ZeRO stage 2 instead of 0, which is not exact in bfloat16")
        zero["stage"] = 2
    settings.setdefault("steps_per_print", 10**9)
    # DeepSpeed calls an optimizer it did not make itself "untested"; AdamW of PyTorch is the plainest there is.
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # offloading works with it too, and compiles nothing
    return settings


def _without_auto(value):
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over all ranks, on all ranks; without ranks the values themselves."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def place() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) where no ranks were started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_main(value):
    """Rank 0's value on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether one rank at least says so, on all ranks. Never waits for a GPU."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    box = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(box, dist.ReduceOp.MAX, group=_host["group"])
    return bool(box.item())


def agree(error: Exception | None, fact=None) -> list:
    """Every rank's `fact`, on all ranks; where one of them has an error it is raised on all, and nobody waits."""
    everyone = [(error, fact)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (error, fact), group=_host["group"])
    if first := next((error for error, _ in everyone if error), None):
        raise first
    return [fact for _, fact in everyone]


@contextlib.contextmanager
def main_first():
    """Keeps the other ranks until rank 0 has done the block, and stops them with its error where it can't."""
    error = None
    try:
        yield
    except (UserError, RunStopped) as caught:
        error = caught
    agree(error)


@contextlib.contextmanager
def lost_peers_named():
    """One line instead of a traceback where another rank ended in the midst of a collective."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (UserError, RunStopped)) or not any(sign in str(error) for sign in LOST):
            raise
        raise RankStopped(f"rank {os.environ.get('RANK', 0)} stops because another rank did, see there "
                          f"({first_line(error)[-120:]})") from error
