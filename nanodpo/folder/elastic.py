"""How a step's pairs are shared by ranks and micro-batches, and a model by ranks, by a run's run.json. A run may go on
with another number of ranks, or another ZeRO stage; the pairs of a step stay."""

import dataclasses

from ..errors import UserError
from ..flags.arguments import TrainArguments
from ..ranks.distributed import world_size

# A record that an earlier version wrote lacks the flags that came later; what they do by default it did, but for one:
# see `arguments_of`.
DEFAULTS = {flag.name: flag.default for flag in dataclasses.fields(TrainArguments)}
# Entries of run.json that may differ as long as `pairs_per_step` is the same.
SHARING = {"gradient_accumulation_steps", "sequence_parallel_size", "world_size"}
# ZeRO's settings that may differ, or how their names begin.
PLACES = ("stage", "offload_", "overlap_comm", "contiguous_gradients", "round_robin_gradients", "sub_group_size",
          "reduce_bucket_size", "reduce_scatter", "allgather_")


def arguments_of(record: dict) -> dict:
    """All settings of a run, by its run.json. Before there was --train_on, SFT scored the last answer alone."""
    given = record["arguments"]
    return DEFAULTS | ({"train_on": "last"} if given.get("loss") == "sft" else {}) | given


def pairs_per_step(record: dict) -> int:
    """The number of pairs of a step, by a run's run.json."""
    return _micro_batches(record) * arguments_of(record)["per_device_train_batch_size"]


def _micro_batches(record: dict) -> int:
    """Those of a step, on all ranks; ranks that share a batch count as one."""
    given = arguments_of(record)
    return given["gradient_accumulation_steps"] * (record["world_size"] // given["sequence_parallel_size"])


def share_anew(args, old: dict, where, demanded: bool = True) -> None:
    """Sets args.gradient_accumulation_steps so that this number of ranks makes steps of as many pairs as the run whose
    run.json is `old`. Leaves it as it is where the user asks for another number than that run had. Raises UserError
    where no number does it, if it is `demanded`; `where` begins the message: the folder as the user named it, or a
    Fork."""
    size, total = args.sequence_parallel_size, _micro_batches(old)
    groups = world_size() // size
    if args.gradient_accumulation_steps != arguments_of(old)["gradient_accumulation_steps"]:
        return
    if total % groups == 0:
        args.gradient_accumulation_steps = total // groups
    elif demanded:
        *fit, most = (str(n * size) for n in range(1, total + 1) if total % n == 0)
        raise UserError(f"{where}: a step has {pairs_per_step(old)} pairs in {total} micro-batches, which "
                        f"{world_size()} ranks can't share evenly; go on with {', '.join(fit) + ' or ' * (total > 1)}"
                        f"{most} rank{'s' * (total * size > 1)}")


def zero_alone(was, now: dict) -> bool:
    """Whether DeepSpeed's settings differ in nothing but where ZeRO keeps weights, moments and gradients, and when it
    exchanges them: a state can be taken up by any stage. (Others, as zero_quantized_gradients, change the numbers.)"""
    if not (isinstance(was, dict) and isinstance(was.get("zero_optimization"), dict)):
        return False
    was, now = ({**one, "zero_optimization": {name: value for name, value in one["zero_optimization"].items() if not
                 name.startswith(PLACES)}} for one in (was, now))
    return was == now
