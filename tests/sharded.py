"""Small engines on several ranks for test_elastic.py: sharded.py save|go-on FOLDER.

`save` trains two steps at each ZeRO stage and saves the state; `go-on` makes engines with other weights, loads states
into them, of other numbers of ranks and of other stages, too, and trains one more step. Each leaves what the weights
and moments then are, whole and by name, as DeepSpeed's own functions give them. The module's gradients are known, and
the same on all ranks.
"""

import math
import os
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file

from nanodpo.folder import resume, state
from nanodpo.folder.atomic import read_manifest
from nanodpo.ranks import distributed

# Odd sizes, so that shards end within parameters, and some have fewer elements than there are ranks.
SHAPES = {"matrix": (7, 5), "vector": (3,), "one": (1,), "large": (11, 13), "last": (2, 3)}
ZERO = {"0": {"stage": 0}, "1": {"stage": 1}, "2": {"stage": 2}, "robin": {"stage": 2, "round_robin_gradients": True},
        "3": {"stage": 3, "stage3_param_persistence_threshold": 4}}


def gradient(name: str, step: int) -> torch.Tensor:
    shape = SHAPES[name]
    return torch.sin(torch.arange(math.prod(shape)) * (step + 1.0) + len(name)).view(shape)


class Weight(torch.nn.Module):
    def __init__(self, name: str, value: float):
        super().__init__()
        self.name, self.weight = name, torch.nn.Parameter(gradient(name, 9) * value)

    def forward(self, step: int) -> torch.Tensor:
        return (self.weight * gradient(self.name, step)).sum()


class Weights(torch.nn.ModuleDict):
    def __init__(self, value: float):
        super().__init__({name: Weight(name, value) for name in SHAPES})
        self["frozen"] = Weight("vector", 1.0).requires_grad_(False)

    def forward(self, step: int) -> torch.Tensor:
        return sum(part(step) for part in self.values())


def optimizer_of(module: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.1, fused=True)


def engine_of(zero: dict, value: float):
    import deepspeed

    module = Weights(value)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": zero,
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    return deepspeed.initialize(model=module, optimizer=optimizer_of(module), config=config)[0]


def take_step(engine, step: int) -> None:
    engine.backward(engine(step))
    engine.step()


def whole(engine) -> dict[str, torch.Tensor]:
    """Weights and moments by "<kind> <name>", on all ranks."""
    found = {}
    if engine.zero_optimization_stage() in (1, 2):  # which finds moments after the first group's first update alone
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() == 0:
            own = engine.basic_optimizer.state[parameter]
            values = {"weight": parameter, **{moment: own[moment] for moment in state.MOMENTS}}
        else:
            values = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in state.MOMENTS}
            values["weight"] = safe_get_full_fp32_param(parameter)
        found |= {f"{kind} {name}": value.detach().clone() for kind, value in values.items()}
    return found


def model_weights(engine) -> dict[str, torch.Tensor]:
    """The weights that the next forward pass takes."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def main(what: str, folder: Path) -> None:
    distributed.join_ranks(int(os.environ["LOCAL_RANK"]))
    rank, world = distributed.rank_and_world()
    for name, zero in ZERO.items():
        engine = engine_of(zero, 1.0 if what == "save" else -2.0)
        if what == "save":
            run = folder / f"{world}-{name}"
            run.mkdir(exist_ok=True)
            for step in range(2):
                take_step(engine, step)
            tensors = state.weights_and_moments(engine) if rank == 0 or zero["stage"] else {}
            resume.save(run, 2, {"random.cpu": torch.tensor([rank])} | tensors, {"world_size": world}, rank)
            leave(engine, folder / f"{run.name}.safetensors", rank)
            continue
        of_others = folder.glob("2-?" if world == 1 else "none")  # of two ranks one takes up all stages
        for run in sorted({*folder.glob(f"?-{name}"), *of_others}):
            read, _ = resume.load(run, read_manifest(resume.folder_of(run, 2)), rank)
            state.restore(engine, read, 2)
            place = folder / f"{run.name}-{world}-{name}"
            leave(engine, place.with_suffix(".safetensors"), rank)
            take_step(engine, 2)
            leave(engine, place.with_suffix(".after.safetensors"), rank)


def leave(engine, file: Path, rank: int) -> None:
    there = whole(engine) | {f"model {name}": value for name, value in model_weights(engine).items()}
    if rank == 0:
        save_file({key: value.contiguous() for key, value in there.items()}, file)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.exit()
