"""The DeepSpeed engine around the log-prob module: its settings and its making."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from unittest import mock

import torch

from ..core.logprobs import SequenceLogProbs
from ..errors import UserError, first_line
from ..files import parse_json, read_text
from ..flags.limits import Limit
from ..flags.unknown import hint
from ..model.ready import prepare
from ..model.sharding import is_sharded, shape_of
from ..ranks import distributed
from . import memory
from .other_trainers import leave_out_same

OWNED = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
         "gradient_clipping", "fp16", "bf16", "torch_autocast", "sequence_parallel_size")  # flags of train.py


def _settings(words: str, holds, names: str) -> dict[str, Limit]:
    return dict.fromkeys(names.split(), Limit(words, holds))


# All others that the JSON may have. DeepSpeed checks what is within zero_optimization, the monitors and a few more. Of
# the rest it takes a value of any kind, and it passes over a name that it does not know: without this list a
# misspelt name would be ignored in silence.
SETTINGS = (
    _settings("must be an object", lambda value: isinstance(value, dict),
              "activation_checkpointing aio bf16 checkpoint comet comms_logger compile csv_monitor data_types "
              "flops_profiler fp16 tensorboard timers wandb")
    | _settings('must be an object, like {"stage": 0}, with a stage of 0 to 3', lambda value: isinstance(value, dict)
                and type(value.get("stage", 0)) is int and 0 <= value.get("stage", 0) <= 3, "zero_optimization")
    | _settings("must be true or false", lambda value: isinstance(value, bool),
                "disable_allgather dump_state memory_breakdown prescale_gradients wall_clock_breakdown "
                "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer")
    | _settings("must be a number above 0", lambda value: type(value) in (int, float) and value > 0,
                "steps_per_print gradient_predivide_factor")
    # Checked by DeepSpeed; the last two it refuses, and says why.
    | _settings("", lambda value: True, "communication_data_type amp sparse_gradients"))


def read_settings(args, default: Path) -> dict:
    """The settings in the file of --deepspeed, or in `default`, with train.py's own written in. Raises UserError where
    the file can't be read, or a setting is not one that train.py can hand on to DeepSpeed."""
    path = Path(args.deepspeed or default)
    try:
        settings = parse_json(read_text(path))
    except OSError as error:
        raise UserError(f"--deepspeed {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--deepspeed {path}: expected an object, found {type(settings).__name__}")
    return engine_config(settings, str(path), args)


def engine_config(settings: dict, path: str, args) -> dict:
    """The settings of `path` with train.py's own written in. Raises UserError, which names the setting, for one that is
    train.py's, or unknown, or has a value that it can't have.

    "auto", as other trainers' files have it, means that train.py decides.
    """
    settings = _without_auto(settings)
    for name, value in settings.items():
        if name in SETTINGS and not SETTINGS[name].holds(value):
            raise UserError(f"{path}: {name} is {json.dumps(value)[:100]}; it {SETTINGS[name].words}")
    for name, on in (("fp16", False), ("bf16", args.bf16)):  # the same as the flag is no contradiction
        if name in settings and settings[name].get("enabled", on) == on:
            del settings[name]
    leave_out_same(settings, path, args)
    if taken := [key for key in OWNED if key in settings]:
        raise UserError(f"{path}: sets {', '.join(taken)}, which train.py owns: remove it there and use the flags "
                            "(--learning_rate, --lr_scheduler_type, --per_device_train_batch_size, "
                            "--gradient_accumulation_steps, --max_grad_norm, --bf16, --sequence_parallel_size)")
    if unknown := [key for key in settings if key not in SETTINGS]:
        hints = "".join(f"; {words}" for key in unknown if (words := hint(key, SETTINGS, dashes="")))
        raise UserError(f"{path}: sets {', '.join(unknown)}, which train.py does not support{hints}; remove it")
    settings["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    settings["gradient_accumulation_steps"] = 1  # accumulation is train.py's loop, with windows of any size
    settings["gradient_clipping"] = args.max_grad_norm
    settings["bf16"] = {"enabled": False, "check_grad_overflow": True}  # what is trained is float32, see precision.py
    zero = settings.setdefault("zero_optimization", {})
    if args.activation_memory and zero.get("stage") == 3:
        raise UserError(f"{path}: stage 3 gathers weights within the layers, which --activation_memory would take for "
                        "a batch's own; use --gradient_checkpointing, or stage 2")
    offload = zero.get("offload_optimizer") or {}
    if isinstance(offload, dict) and (offload.get("device") == "nvme" or offload.get("ratio", 1) != 1):
        raise UserError(f"{path}: offload_optimizer with device nvme, or a ratio, keeps AdamW's moments where a state "
                        "to resume from can't have them; use device cpu without a ratio")
    # Its default, 5e8 numbers, is a buffer of 2 GB, however small the adapter.
    zero.setdefault("reduce_bucket_size", 2 * 10**7)
    settings.setdefault("timers", {}).setdefault("throughput", {"enabled": False})  # waits for the GPU in every forward
    settings.setdefault("steps_per_print", 10**9)
    # DeepSpeed calls an optimizer it did not make itself "untested"; AdamW of PyTorch is the plainest there is.
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # offloading works with it too, and compiles nothing
    return settings


def join_ranks(local_rank: int, settings: dict, file: str | None) -> torch.device:
    """Joins the ranks and returns this one's device. Raises UserError, which names the file and the setting, where
    DeepSpeed, which is imported here, refuses the settings. `file`: that of --deepspeed."""
    device = distributed.start(local_rank)
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, DtypeEnum

    asked = Asked(json.loads(json.dumps(settings)))
    try:
        DeepSpeedConfig(asked)
        for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
            if (dtype := settings.get("data_types", {}).get(name)) is not None:
                DtypeEnum(dtype)
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
        reason = first_line(error)
        if hasattr(error, "errors"):  # pydantic's
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{file or 'ds_config.json'}: DeepSpeed does not take it: {reason}") from error
    blocks = {name: block for name, block in asked.items() if isinstance(block, Asked) and name != "zero_optimization"}
    if unknown := [words for name, block in blocks.items() for words in block.unknown(name)]:
        raise UserError(f"{file or 'ds_config.json'}: sets {', '.join(unknown)}, which DeepSpeed does not know; "
                        "remove it")
    return device


class Asked(dict):
    """Settings that note which names they are asked for: of some blocks DeepSpeed asks for each name that it knows, and
    passes over the others. Other blocks, like zero_optimization, it checks itself, and asks for nothing, or for little.
    """

    def __init__(self, settings: dict):
        super().__init__({name: Asked(value) if isinstance(value, dict) else value for name, value in settings.items()})
        self.names = set()

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name) -> bool:
        self.names.add(name)
        return super().__contains__(name)

    def unknown(self, path: str) -> list[str]:
        """The names within that nobody asked for, with what may have been meant; none where nobody asked for any."""
        found = []
        for name, value in self.items() if self.names else ():
            if name not in self.names:
                words = hint(name, sorted(self.names), dashes=f"{path}.")
                found.append(f"{path}.{name}{f' ({words})' * bool(words)}")
            elif isinstance(value, Asked):
                found += value.unknown(f"{path}.{name}")
        return found


def _without_auto(value):
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value


@dataclasses.dataclass
class Built:
    """DeepSpeed's engine around a SequenceLogProbs, and how batches are made for it."""

    engine: object
    layout: str  # of core/packing.py
    attention: str  # its name, as transformers knows it


def make_engine(model, args, settings: dict, device, longest: int) -> Built:
    """The engine of a run, its model prepared: precision, LoRA in one product, MLPs that keep less, recomputation, and
    the layout that gives this model's own log-probs. `longest`: tokens of the longest sequence."""
    import deepspeed  # all slow to import, and --help and wrong input don't need them

    from ..model import selfcheck, ulysses
    from ..model.recompute import FitToMemory, Recompute, sample_batch

    stage = settings["zero_optimization"].get("stage", 0)
    product = prepare(model, args.bf16, device, in_place=stage < 3)
    if args.gradient_checkpointing or args.activation_memory:
        recompute = Recompute(model, stage)
        recompute.use("full")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if len(shape_of(p)) > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if len(shape_of(p)) <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=args.learning_rate,
                                  betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)
    module = SequenceLogProbs(model)
    module.parallel = ulysses.ranks_of_a_batch(args.sequence_parallel_size)
    import_muon()
    if is_sharded(model):
        model.to(device)  # what the ranks do not share: buffers, and LoRA, which DeepSpeed shards itself
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    layout, attention = selfcheck.choose_layout(module, device, product, args.use_flash_attention, longest)
    distributed.say(selfcheck.describe(layout, attention, module.parallel.size))
    if args.activation_memory:
        if not selfcheck.memory_is_linear(model.config.get_text_config(), attention, longest):
            raise UserError("--activation_memory: this model's attention takes memory by the square of a batch's "
                            "length, which is not foreseen; use --gradient_checkpointing")
        budget = memory.memory_budget(device, args.activation_memory, memory.bytes_to_come(module, stage))
        sample = functools.partial(sample_batch, layout, model.config, device)
        # Of a batch, by whose tokens it chooses, each of the ranks that share it has a part.
        fit = FitToMemory(recompute, module, lambda tokens: module.parallel.shard(sample(tokens)),
                          budget * module.parallel.size)
        module.register_forward_pre_hook(fit.before_forward)
        distributed.say(f"activations: {memory.gib(budget)}; {fit}")
    return Built(engine, layout, attention)


def import_muon() -> None:
    """Imports Muon as DeepSpeed does where torch has no compiler. Every ZeRO stage imports this optimizer, which no run
    uses, and compiling its functions would import torch's compiler: 3 seconds and 100 MiB on each rank."""
    with contextlib.suppress(ImportError, AttributeError):  # other versions have it elsewhere, or not at all
        from deepspeed.runtime import compiler

        with mock.patch.object(compiler, "compile", lambda: compiler.dummy_decorator):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


def end_prefetch(engine) -> None:
    """Puts away what ZeRO-3 fetched ahead for a backward pass: an evaluation has none, and a weight that is still on
    its way can't be gathered. All ranks must call it."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
        engine.optimizer.checkpoint_event_epilogue()
