"""The state of an engine, as tensors: float32 weights, AdamW's moments and this rank's random numbers.

DeepSpeed keeps the float32 weights in another place at each ZeRO stage. Frozen weights are not part of the state: the
model has them.
"""

import torch
from torch import Tensor

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # DeepSpeed's monitors write them


def shards(engine) -> list[Tensor]:
    """This rank's part of the trained weights, float32, in the optimizer's order."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [p for group in optimizer.param_groups for p in group["params"]]
    return optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups


def weights_and_moments(engine) -> dict[str, Tensor]:
    """weight.0, exp_avg.0, exp_avg_sq.0, step.0, weight.1 ... on CPU. There are no moments before the first update."""
    tensors = {}
    for i, shard in enumerate(shards(engine)):
        tensors[f"weight.{i}"] = _on_cpu(shard.detach())
        moments = engine.basic_optimizer.state.get(shard, {})
        tensors |= {f"{name}.{i}": _on_cpu(moment) for name, moment in moments.items()}
    return tensors


@torch.no_grad()
def restore(engine, tensors: dict[str, Tensor]) -> None:
    """Puts what `weights_and_moments` gave into the engine. Under ZeRO all ranks must call it."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # takes gathered weights apart again
    for i, shard in enumerate(shards(engine)):
        shard.data.copy_(tensors[f"weight.{i}"])
        moments = {name.rpartition(".")[0]: value for name, value in tensors.items() if name.endswith(f".{i}")}
        del moments["weight"]
        engine.basic_optimizer.state[shard] = {name: value.to(shard.device) for name, value in moments.items()}
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        for i in range(len(shards(engine))):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)  # float32 weights into those of the model
        optimizer.checkpoint_event_epilogue()  # gathers the small ones that stay whole


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators. Only dropout draws from them in training."""
    state = {"random.cpu": torch.get_rng_state()}
    return state | ({"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:  # not where the run began on CPU
        torch.cuda.set_rng_state(tensors["random.cuda"], device)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A tensor on CPU with a storage of its own: ZeRO-3's shards are views of one buffer, which safetensors refuses."""
    tensor = tensor.cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
