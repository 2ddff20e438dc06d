"""The state of an engine, as tensors: float32 weights, AdamW's moments and this rank's random numbers.

DeepSpeed keeps the float32 weights in another place at each ZeRO stage, cut into the parts of ranks. Here each part is
named by its parameter and by where it begins in it, so that ranks of any number find theirs: see resume.py. Frozen
weights are not part of the state: the model has them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # DeepSpeed's own, for its reports
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names


class Part(NamedTuple):
    """`size` elements of a trained parameter from element `start` on, counted along its rows. This rank has them in
    `shard`, float32, from element `offset` on."""

    name: str
    start: int
    size: int
    shard: Tensor
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """These elements of the shard, or of a moment of it; a view. A shard that is a parameter has its shape."""
        return whole if whole.numel() == self.size else whole.narrow(0, self.offset, self.size)


def shards(engine) -> list[Tensor]:
    """This rank's part of the trained weights, float32, in the optimizer's order."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [p for group in optimizer.param_groups for p in group["params"]]
    return optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups


def parts(engine) -> Iterator[Part]:
    """Of which parameters this rank has which elements. What ZeRO pads its shards with is no part of any."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            yield Part(name, 0, parameter.numel(), parameter, 0)
        elif stage == 3:  # every parameter is cut into as many pieces of one size as there are ranks
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            if (left := min(size, parameter.ds_numel - start)) > 0:
                yield Part(name, start, left, optimizer.fp32_partitioned_groups_flat[group], offset)
    if stage in (1, 2):
        yield from _parts_of_groups(engine.module, optimizer)


def _parts_of_groups(module, optimizer) -> Iterator[Part]:
    """ZeRO 1 and 2 lay the parameters of a group one behind the other, and cut that into as many shards as there are
    ranks. (Not from `_hp_mapping` of the parameters: it does not know the order of round_robin_gradients.)"""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for group, shard in enumerate(optimizer.single_partition_of_fp32_groups):
        first = shard.numel() * distributed.get_rank(optimizer.real_dp_process_group[group])
        places = zip(optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group])
        for parameter, place in places:
            low, high = max(place, first), min(place + parameter.numel(), first + shard.numel())
            if low < high:
                yield Part(names[parameter], low - place, high - low, shard, low - first)


def weights_and_moments(engine) -> dict[str, Tensor]:
    """This rank's parts, flat and on CPU, by "weight/<name>/<start>", and so on with AdamW's moments. There are none
    before the first update."""
    tensors = {}
    for part in parts(engine):
        moments = engine.basic_optimizer.state.get(part.shard, {})
        for kind, whole in {"weight": part.shard.detach(), **moments}.items():
            if kind != "step":  # as many as updates were made
                tensors[f"{kind}/{part.name}/{part.start}"] = _on_cpu(part.of(whole).reshape(-1))
    return tensors


@torch.no_grad()
def restore(engine, read: Callable[[str, str, int, int], Tensor], updates: int) -> None:
    """Puts what `weights_and_moments` gave, on any number of ranks, into the engine. Under ZeRO all ranks must call it.

    `read` is from resume.load; `updates`: how many AdamW has made, with none of which it has moments.
    """
    stage, optimizer, adam = engine.zero_optimization_stage(), engine.optimizer, engine.basic_optimizer.state
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # takes gathered weights apart again
    moments = MOMENTS if updates else ()
    for shard in shards(engine):
        adam[shard] = {moment: torch.zeros_like(shard) for moment in moments}  # 0 where ZeRO pads a shard
        if updates:
            adam[shard]["step"] = torch.tensor(float(updates), device=shard.device)
    for part in parts(engine):
        for kind in ("weight", *moments):
            place = part.of(part.shard if kind == "weight" else adam[part.shard][kind])
            place.copy_(read(kind, part.name, part.start, part.size).view(place.shape))
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
    """Leaves the generators as they are where there is nothing: on a rank more than there were."""
    if "random.cpu" in tensors:
        torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:  # not where the run began on CPU
        torch.cuda.set_rng_state(tensors["random.cuda"], device)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A tensor on CPU with a storage of its own: parts are views of one buffer, which safetensors refuses."""
    tensor = tensor.cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
