"""The settings of --deepspeed: read, checked, and train.py's own written in."""

import json
from pathlib import Path

from ..errors import UserError, first_line
from ..files import parse_json, read_text
from ..flags.limits import Limit
from ..flags.unknown import hint
from ..ranks import distributed
from .other_trainers import leave_out_same

OWNED = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
         "gradient_clipping", "fp16", "bf16", "torch_autocast", "data_types", "communication_data_type",
         "sequence_parallel_size")  # flags of train.py
# Taken, since files of other trainers have them. DeepSpeed uses them where a trainer asks it to recompute, to save or
# to compile, or for disks: train.py never does.
IDLE = ("activation_checkpointing", "aio", "checkpoint", "compile")
# Of zero_optimization: with these DeepSpeed computes other numbers, or fails.
REFUSED = ("legacy_stage1", "zenflow", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
           "zero_quantized_gradients")


def _settings(words: str, holds, names: str) -> dict[str, Limit]:
    return dict.fromkeys(names.split(), Limit(words, holds))


# All others that the JSON may have. DeepSpeed checks what is within zero_optimization, the monitors and a few more. Of
# the rest it takes a value of any kind, and it passes over a name that it does not know: without this list a
# misspelt name would be ignored in silence.
SETTINGS = (
    _settings("must be an object", lambda value: isinstance(value, dict),
              "activation_checkpointing aio bf16 checkpoint comet comms_logger compile csv_monitor flops_profiler "
              "fp16 tensorboard timers wandb")
    | _settings('must be an object, like {"stage": 0}, with a stage of 0 to 3', lambda value: isinstance(value, dict)
                and type(value.get("stage", 0)) is int and 0 <= value.get("stage", 0) <= 3, "zero_optimization")
    | _settings("must be true or false", lambda value: isinstance(value, bool),
                "disable_allgather dump_state memory_breakdown prescale_gradients wall_clock_breakdown "
                "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer")
    | _settings("must be a number above 0", lambda value: type(value) in (int, float) and value > 0,
                "steps_per_print")
    | _settings("", lambda value: True, "amp sparse_gradients"))  # DeepSpeed refuses them, and says why


def read_deepspeed(args, default: Path) -> dict:
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
    if odd := [name for name in REFUSED if zero.get(name)]:
        raise UserError(f"{path}: sets zero_optimization.{odd[0]}, which train.py does not support; remove it")
    if args.activation_memory and zero.get("stage") == 3:
        raise UserError(f"{path}: stage 3 gathers weights within the layers, which --activation_memory would take for "
                        "a batch's own; use --gradient_checkpointing, or stage 2")
    offload = zero.get("offload_optimizer") or {}
    if isinstance(offload, dict) and (offload.get("device") == "nvme" or offload.get("ratio", 1) != 1):
        raise UserError(f"{path}: offload_optimizer with device nvme, or a ratio, keeps AdamW's moments where a state "
                        "to resume from can't have them; use device cpu without a ratio")
    if isinstance(weights := zero.get("offload_param"), dict) and weights.get("device") == "nvme":
        raise UserError(f"{path}: offload_param with device nvme needs an op that DeepSpeed compiles, and is not "
                        "supported; use device cpu")
    # Its default, 5e8 numbers, is a buffer of 2 GB, however small the adapter.
    zero.setdefault("reduce_bucket_size", 2 * 10**7)
    settings.setdefault("timers", {}).setdefault("throughput", {"enabled": False})  # waits for the GPU in every forward
    settings.setdefault("steps_per_print", 10**9)
    # DeepSpeed calls an optimizer it did not make itself "untested"; AdamW of PyTorch is the plainest there is.
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # offloading works with it too, and compiles nothing
    return settings


def check_with_deepspeed(settings: dict, file: str | None) -> None:
    """Raises UserError, naming the file and the setting, where DeepSpeed refuses the settings or does not know one. To
    be called when the ranks have joined, since DeepSpeed is imported. Names blocks that have no effect. `file`: that of
    --deepspeed."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    path = file or "ds_config.json"
    asked = Asked(json.loads(json.dumps(settings)))
    try:
        DeepSpeedConfig(asked)
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
        reason = first_line(error)
        if hasattr(error, "errors"):  # pydantic's
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path}: DeepSpeed does not take it: {reason}") from error
    blocks = {name: block for name, block in asked.items() if isinstance(block, Asked) and name != "zero_optimization"}
    if unknown := [words for name, block in blocks.items() for words in block.unknown(name)]:
        raise UserError(f"{path}: sets {', '.join(unknown)}, which DeepSpeed does not know; remove it")
    if idle := [name for name in IDLE if settings.get(name)]:
        distributed.say(f"{path}: no effect here: {', '.join(idle)}"
                        + "; use --gradient_checkpointing" * ("activation_checkpointing" in idle))


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
        if not self.names:
            return []
        found = []
        for name, value in self.items():
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
