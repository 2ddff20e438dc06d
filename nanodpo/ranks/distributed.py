"""Ranks: joins them under any launcher, and exchanges values between them."""

import contextlib
import gc
import itertools
import os
import pickle
import sys
import warnings

import torch
import torch.distributed as dist

from .. import errors
from ..errors import RankStopped, RunStopped, Unreachable, UserError, first_line
from ..flags.launchers import check_meeting, take_over
from ..screen import put
from . import gpu
from .meeting import meet_at
from .peers import CUT, LOST, Peers
from .waits import PATIENCE

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_cpu = {"group": None}  # torch's group for objects on the CPU; None: the default one
_met = {"store": None, "peers": None, "calls": None, "alone": False}  # set where several ranks were started


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    """The number of ranks, also before they have joined."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*text) -> None:
    """Prints on rank 0, with no character that acts on the terminal."""
    if is_main():
        put(*text)


def check_device(args) -> None:
    """Raises UserError for settings that this machine can't honour."""
    if args.use_flash_attention and not (torch.cuda.is_available() and args.bf16):
        raise UserError("--use_flash_attention needs a CUDA device and --bf16; leave it out, batches are packed anyway")
    if args.activation_memory == -1 and not torch.cuda.is_available():
        raise UserError("--activation_memory -1: only a GPU says what it has left; give a number of GiB")


def meet() -> None:
    """The first thing a script does. Waits for the other ranks where a launcher started several, and from then on
    watches whether they live.

    Raises UserError for an environment that no launcher leaves, and RunStopped where a rank does not come.
    """
    gpu.use_expandable_segments()
    take_over()
    rank, world, host, port = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR",
                                                                     "MASTER_PORT"))
    if not (rank.isdecimal() and world.isdecimal()) or int(world) == 1:
        return  # one process, or one that reading the flags will refuse
    check_meeting()
    rank, world, port = int(rank), int(world), int(port)
    # torchrun has a store of its own at this port, and keeps it when it starts the ranks again.
    agent_store, restart = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("USE_AGENT_STORE", "RESTART_COUNT"))
    store, peers = meet_at(host, port, rank, world, rank == 0 and agent_store != "True", f"nanodpo {restart}")
    _met.update(store=store, calls=itertools.count(), peers=peers)


def peers() -> Peers | None:
    """The watch over the other ranks; None where there are none, or this one has left them."""
    return _met["peers"]


def works_alone() -> bool:
    """Whether this rank is in `main_first`, where the others wait for it, and it waits for none of them."""
    return _met["alone"]


def join_ranks(local_rank: int, deterministic: bool = False) -> torch.device:
    """Joins the ranks of the launcher that started this process, or makes a run of one rank. Returns its device.
    `deterministic`: whether a GPU must give the same bits each time."""
    gpu.round_alike()
    store = _met["store"]
    if "RANK" not in os.environ:  # plain python: without these DeepSpeed goes looking for MPI
        host = "127.0.0.1"
        store = dist.TCPStore(host, 0, 1, True)  # at a port that is free, and its own from then on
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR=host, MASTER_PORT=str(store.port))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said here, DeepSpeed need not guess and warn
    import deepspeed  # slow to import

    # DeepSpeed calls collectives by old names, of which PyTorch warns: a user can't change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if cuda:
        torch.cuda.set_device(local_rank)
        if deterministic:
            gpu.be_deterministic()
    else:
        # DeepSpeed would compile a shared-memory op, and die where there is no compiler; gloo serves as well here. That
        # it has no ops is said here: finding out which it could compile would start a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    backend, rank, world = "nccl" if cuda else "gloo", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if store:
        try:
            dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world)
        except RuntimeError as error:
            # lost_peers_reported says that a rank has ended. A firewall may refuse a connection, too.
            if any(sign in str(error) for sign in LOST if sign != "Connection refused"):
                raise
            raise RankStopped(f"rank {rank} can't connect to the others ({first_line(error)[-120:]}); where none of "
                              "them has ended, all ports must be open between the machines; GLOO_SOCKET_IFNAME and "
                              "NCCL_SOCKET_IFNAME name a network device where there are several") from error
    deepspeed.init_distributed(backend, verbose=False, timeout=PATIENCE)
    if cuda and dist.get_world_size() > 1:
        _cpu["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The GPU's product name, or "cpu": devices of one name round alike."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over all ranks, on all ranks; without ranks the values themselves."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def rank_and_world() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) where no ranks were started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def check_sequence_parallel(size: int) -> None:
    """Raises UserError where the ranks that were started can't be cut into groups of so many."""
    world = world_size()
    if world % size:
        fit = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise UserError(f"--sequence_parallel_size {size}: does not divide the number of ranks, {world}; start {size} "
                        f"ranks or a multiple of it (torchrun --nproc_per_node {size} ...), or give {fit}")


def neighbours(size: int):
    """torch's group of the `size` consecutive ranks that share a batch, this one among them. All ranks must call it."""
    rank, world = rank_and_world()
    groups = [dist.new_group(range(first, first + size), timeout=PATIENCE) for first in range(0, world, size)]
    return groups[rank // size]


def from_main(value):
    """Rank 0's value on all ranks."""
    if not dist.is_initialized():
        return gather_or_raise(None, value if is_main() else None)[0]
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_cpu["group"])  # waits for no GPU
    return box[0]


def leave() -> None:
    """Undoes `meet` and `join_ranks`: from now on no rank waits for another. Without it a rank that exits may be
    aborted by threads that still wait for the others."""
    if peers():
        peers().leave()
        _met["peers"] = None
    if dist.is_initialized():
        # DeepSpeed lets go of its own groups, too, if it has any: in the next run of this process they are others.
        comm = sys.modules["deepspeed"].comm if "deepspeed" in sys.modules else dist
        (comm if comm.is_initialized() else dist).destroy_process_group()


@contextlib.contextmanager
def process_restored():
    """Leaves a process that no launcher started as it was before, so that another run can be made in it."""
    if "deepspeed" in sys.modules and not errors.as_script:
        gc.collect()  # an earlier run's model and engine; a script's process has none
    before, linear = {name: os.environ[name] for name in NAMES if name in os.environ}, torch.nn.functional.linear
    try:
        with gpu.rounding_restored():
            yield
    finally:
        if "RANK" not in before and os.environ.get("WORLD_SIZE", "1") == "1":
            leave()
            for name in NAMES:
                os.environ.pop(name, None)
            os.environ.update(before)
            torch.nn.functional.linear = linear  # ZeRO-3 puts one of its own there for good


def ask(flag: bool):
    """Starts to find out whether `flag` is true on any rank, and returns at once: a function that waits for the answer,
    the same on all ranks. Never waits for a GPU."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: flag
    box = torch.tensor([flag], dtype=torch.int32)
    work = dist.all_reduce(box, dist.ReduceOp.MAX, group=_cpu["group"], async_op=True)

    def answer() -> bool:
        work.wait()
        return bool(box.item())

    return answer


def gather_or_raise(error: Exception | None, fact=None) -> list:
    """Every rank's `fact`, in the order of ranks, on all ranks. Where a rank has an error, raises the first on all."""
    everyone = [(error, fact)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (error, fact), group=_cpu["group"])
    elif store := _met["store"]:  # before `join_ranks`
        call, rank, world = next(_met["calls"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store.set(f"{call} {rank}", pickle.dumps((error, fact)))
        everyone = [pickle.loads(store.get(f"{call} {i}")) for i in range(world)]
        if store.add(f"{call} read", 1) == world:
            store.set(f"{call} done", "")
        if rank == 0:  # the store ends with it
            store.wait([f"{call} done"])
    if first := next((error for error, _ in everyone if error), None):
        raise first
    return [fact for _, fact in everyone]


@contextlib.contextmanager
def main_first():
    """Lets the other ranks wait until rank 0 has done the block, and raises its UserError or RunStopped on all."""
    error, _met["alone"] = None, is_main()
    try:
        yield
    except (UserError, RunStopped) as caught:
        error = caught
    finally:
        _met["alone"] = False
    gather_or_raise(error)


@contextlib.contextmanager
def lost_peers_reported():
    """Raises an error of one line instead of a traceback where a collective fails: RankStopped where another rank has
    ended, Unreachable where the network has failed."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (UserError, RunStopped)):
            raise
        rank = os.environ.get("RANK", 0)
        if lost := next((sign for sign in LOST if sign in str(error)), None):
            raise RankStopped(f"rank {rank} stops because another rank has ended; its output says why ({lost})"
                              ) from error
        cut = next((sign for sign in CUT if sign in str(error)), None)
        if cut or isinstance(error, dist.DistNetworkError):
            raise Unreachable(f"rank {rank} stops because it does not reach another rank; is the network between the "
                              f"machines there? ({cut or first_line(error)[-120:]}); the same command goes on from "
                              "what is saved") from error
        if isinstance(error, dist.DistError):  # of NCCL, and of causes that would come again
            raise RankStopped(f"rank {rank} stops because it can't exchange values with the others "
                              f"({first_line(error)[-200:]})") from error
        raise
