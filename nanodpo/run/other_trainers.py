"""Settings that other trainers leave, beside train.py's own: DeepSpeed files of transformers, and the environment of
`accelerate launch`."""

import os

from ..ranks import distributed

SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}  # DeepSpeed's names


def leave_out_same(settings: dict, path: str, args) -> None:
    """Takes out of DeepSpeed's settings what says the same as the flags ("auto" is gone already): batch sizes,
    clipping, data types, an optimizer and a scheduler. Says so where the scheduler's name means another schedule than
    the flag."""
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    same = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": steps,
            "train_batch_size": size * steps * distributed.world_size() // args.sequence_parallel_size,
            "gradient_clipping": args.max_grad_norm, "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"}}
    for name in [name for name, value in same.items() if name in settings and settings[name] == value]:
        del settings[name]
    flags = {"optimizer": {"lr": args.learning_rate, "betas": [args.adam_beta1, args.adam_beta2],
                           "eps": args.adam_epsilon, "weight_decay": args.weight_decay, "torch_adam": True,
                           "adam_w_mode": True},
             "scheduler": {"warmup_min_lr": 0, "warmup_max_lr": args.learning_rate,
                           "warmup_num_steps": args.warmup_steps, "total_num_steps": args.max_steps}}
    kinds = {"optimizer": ("AdamW", "Adam"), "scheduler": SCHEDULES}
    for name, known in flags.items():
        block = settings.get(name)
        if not isinstance(block, dict) or not isinstance(block.get("params", {}), dict):
            continue
        kind, values = block.get("type", "AdamW" if name == "optimizer" else "WarmupLR"), block.get("params", {})
        if (not block.keys() <= {"type", "params"} or kind not in [*kinds[name]]
                or any(key not in known or known[key] != value for key, value in values.items())):
            continue
        del settings[name]
        if name == "scheduler" and "type" in block and SCHEDULES[kind] != args.lr_scheduler_type:
            distributed.say(f"{path}: scheduler {kind} is {SCHEDULES[kind]}; this run is "
                            f"{args.lr_scheduler_type}, which --lr_scheduler_type decides")


def accelerate_differs(args, settings: dict) -> str:
    """The settings of `accelerate launch` that this run does not follow, in words; empty where there are none. Its
    variables are read for nothing else."""
    zero = settings["zero_optimization"]
    precision = "bf16" if args.bf16 else "no"

    def device(name):  # DeepSpeed has not checked them yet
        return zero[name].get("device", "none") if isinstance(zero.get(name), dict) else "none"

    here = [("MIXED_PRECISION", precision, "--bf16", "no"),
            ("DEEPSPEED_ZERO_STAGE", str(zero.get("stage", 0)), "--deepspeed", ""),
            ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", device("offload_optimizer"), "--deepspeed", "none"),
            ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", device("offload_param"), "--deepspeed", "none"),
            ("DEEPSPEED_CONFIG_FILE", str(args.deepspeed), "--deepspeed", "none"),
            ("GRADIENT_ACCUMULATION_STEPS", str(args.gradient_accumulation_steps), "--gradient_accumulation_steps",
             "1"),
            ("GRADIENT_CLIPPING", str(args.max_grad_norm), "--max_grad_norm", "none"),
            ("USE_FSDP", "false", "--deepspeed", "")]
    told = {name: os.environ.get(f"ACCELERATE_{name}") for name, *_ in here}
    differs = [f"ACCELERATE_{name}={told[name]}, here {value} ({flag} decides)" for name, value, flag, unset in here
               if told[name] not in (None, unset, value)]
    return f"accelerate's settings are not read: {'; '.join(differs)}" if differs else ""
