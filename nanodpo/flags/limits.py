"""Checks the values of train.py's arguments, each by itself and together, before anything is loaded."""

import math

from ..errors import UserError

POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "beta",
            "num_train_epochs", "logging_steps", "lora_alpha", "adam_epsilon", "max_length", "max_prompt_length",
            "save_total_limit")
NOT_NEGATIVE = ("lora_r", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "save_steps",
                "eval_size", "seed", "resume_steps", "skip_nonfinite", "inspect_row")


def check(args) -> None:
    """Raises UserError for values that can't work, before anything is loaded."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number")
        if name in POSITIVE and value is not None and not value > 0:
            raise UserError(f"--{name} {value}: must be above 0")
        if name in NOT_NEGATIVE and value is not None and not value >= 0:
            raise UserError(f"--{name} {value}: must not be negative")
        if (isinstance(value, int) and name != "seed" or name == "num_train_epochs") and abs(value) >= 2**53:
            raise UserError(f"--{name} {value}: must be below 2^53")  # beyond it floats don't count in ones
    if args.seed >= 2**63:
        raise UserError(f"--seed {args.seed}: must be below 2^63")
    if args.max_steps == 0 or args.max_steps < -1:
        raise UserError(f"--max_steps {args.max_steps}: must be above 0, or -1 to let --num_train_epochs decide")
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing}: must be at least 0 and below 0.5")
    if args.label_smoothing and args.loss not in ("dpo", "robust"):
        raise UserError(f"--label_smoothing has no meaning for --loss {args.loss}; leave it out, or use dpo or robust")
    for name in ("lora_dropout", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 0 and below 1")
    if args.lora_dropout and args.use_lora and not args.allow_dropout:
        raise UserError(f"--lora_dropout {args.lora_dropout} makes policy and reference differ at step 0; "
                        "add --allow_dropout to train with it all the same, or leave it out")
    if args.activation_memory is not None and args.activation_memory != -1 and not args.activation_memory > 0:
        raise UserError(f"--activation_memory {args.activation_memory}: must be above 0 (GiB), or -1")
    _check_together(args)


def _check_together(args) -> None:
    """Of flags that have no meaning together, or only together."""
    for names in (("eval_file_path", "eval_size"), ("gradient_checkpointing", "activation_memory")):
        if len(given := [f"--{name}" for name in names if getattr(args, name)]) > 1:
            raise UserError(f"{' and '.join(given)}: give one of them")
    if args.eval_steps and not (args.eval_file_path or args.eval_size):
        raise UserError(f"--eval_steps {args.eval_steps}: nothing to evaluate; add --eval_file_path or --eval_size")
    if args.random_init and args.use_lora:
        raise UserError("--random_init with LoRA would freeze random weights; add --use_lora false")
    if args.merge_weights and not args.use_lora:
        raise UserError("--merge_weights: nothing to merge without LoRA; every checkpoint is a whole model")
