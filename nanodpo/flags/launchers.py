"""Reads from the environment which of several processes this is, whatever started them."""

import os
import re

from ..errors import UserError

# Launchers with names of their own for what torchrun and deepspeed call RANK, WORLD_SIZE and LOCAL_RANK; of several
# names the first that is set. Whoever was started last stands first: mpirun in a job of Slurm counts, not Slurm.
LAUNCHERS = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),  # MVAPICH
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    ("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    # MPICH, Intel MPI, PALS; the last tells no size of its own.
    ("mpiexec", "PMI_RANK PALS_RANKID", "PMI_SIZE", "MPI_LOCALRANKID PALS_LOCAL_RANKID PMI_LOCAL_RANK"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS SLURM_NTASKS", "SLURM_LOCALID"),
    ("prun", "PMIX_RANK", "", ""),
)


def take_over() -> None:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK as the launcher says that started this process, where it has other names for
    them. Raises UserError for processes that it started and that can't meet: each would be a run of its own."""
    if "RANK" in os.environ:
        return
    for launcher in LAUNCHERS:
        command, *names = launcher
        rank, size, local = (next(filter(os.environ.get, several.split()), None) for several in names)
        if rank or size and size != "SLURM_NTASKS":  # a whole job's, which a shell within it has as well
            break
    else:
        return
    values = {name: os.environ[name] for name in (rank, size, local) if name}
    world = values.get(size) or os.environ.get("WORLD_SIZE")
    if world == "1":
        return
    if wrong := [name for name, value in values.items() if not re.fullmatch("[0-9]{1,9}", value)]:
        raise UserError(f"{wrong[0]} is {values[wrong[0]]!r} in the environment, not a number; {command} sets it")
    here, place = ", ".join(f"{name}={value}" for name, value in values.items()), os.environ.get("LOCAL_RANK")
    if missing := [name for name, there in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", local or place))
                   if not there]:
        raise UserError(f"several processes were started by {command} ({here}), which does not tell each its "
                        f"{' and '.join(missing)}; export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT")
    if os.environ.get("WORLD_SIZE", world) != world:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but {command} says {here}; "
                        "unset WORLD_SIZE")
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(f"one of {world} processes of {command} ({here}) that have no place to meet: export "
                        f"{' and '.join(missing)}, the host of the first and a port, the same for all; or start one "
                        f"torchrun a machine: {command} torchrun --nproc_per_node=... train.py. To be a run of its "
                        f"own: unset {rank} {size}")
    os.environ.update(RANK=values[rank], WORLD_SIZE=world, LOCAL_RANK=place or values[local])


def local_rank(flag: int) -> int:
    """This process's number on its machine, from LOCAL_RANK or, where the launcher sets none, from --local_rank. Raises
    UserError where they differ, and for an environment in which several processes would not make one run."""
    take_over()
    for name in ("RANK", "WORLD_SIZE"):
        if not re.fullmatch("[0-9]{1,9}", os.environ.get(name, "0")):
            raise UserError(f"{name} is {os.environ[name]!r} in the environment, not a number; launchers set it")
    given = os.environ.get("LOCAL_RANK")
    alone = "RANK" not in os.environ
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
