"""Ranks: starting them under any launcher, and the few things they tell each other."""

import contextlib
import datetime
import os
import socket
import warnings

import torch
import torch.distributed as dist

from .errors import RankStopped, RunStopped, UserError, first_line
from .screen import put

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
        "NCCL communicator was aborted", "Socket Timeout", "Connection was likely closed", "Connection refused")
PATIENCE = datetime.timedelta(hours=6)  # ranks with longer rows come later, and saving a large model takes its time

_host = {"group": None}  # ranks of the CPU, where they tell each other things; None: those of the device serve


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say(*text) -> None:
    """Prints on rank 0, with no character that acts on the terminal."""
    if is_main():
        put(*text)


def check_device(args) -> None:
    """Raises UserError for settings that this machine can't honour."""
    if args.use_flash_attention and not (torch.cuda.is_available() and args.bf16):
        raise UserError("--use_flash_attention needs a CUDA device and --bf16; leave it out, rows are packed anyway")
    if args.activation_memory == -1 and not torch.cuda.is_available():
        raise UserError("--activation_memory -1: only a GPU says what it has left; give a number of GiB")


def spare_memory() -> None:
    """Lets CUDA's allocator map memory behind what it has. Rows come in all lengths: blocks of their own sizes would
    leave holes between them that fit no other row. Before the first tensor there; a user's own setting stays."""
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def start(local_rank: int) -> torch.device:
    """Joins the ranks of whatever launched this process and returns its device."""
    spare_memory()
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
    if not cuda and "deepspeed_shm_comm" in getattr(deepspeed.ops, "__compatible_ops__", {}):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if cuda:
        torch.cuda.set_device(local_rank)
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=PATIENCE)
    if cuda and dist.get_world_size() > 1:
        _host["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What rounds as this device does: the GPU by its product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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


def leave() -> None:
    """Ends what `start` began. A rank that just exits may be aborted by threads that still wait for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def ask(flag: bool):
    """Begins to ask whether one rank at least says so; the function returned waits for the answer, the same on all
    ranks. Never waits for a GPU."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: flag
    box = torch.tensor([flag], dtype=torch.int32)
    work = dist.all_reduce(box, dist.ReduceOp.MAX, group=_host["group"], async_op=True)

    def answer() -> bool:
        work.wait()
        return bool(box.item())

    return answer


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
