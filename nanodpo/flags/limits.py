"""Checks the values of train.py's arguments, each by itself and together, before anything is loaded."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from ..errors import UserError
from .loss import check_loss


class Limit(NamedTuple):
    """Which values a flag may have: in words, for the message, and as a test of a value."""

    words: str
    holds: Callable[[float], bool]


ABOVE_0 = Limit("must be above 0", lambda value: value > 0)
NOT_NEGATIVE = Limit("must not be negative", lambda value: value >= 0)
BELOW_1 = Limit("must be at least 0 and below 1", lambda value: 0 <= value < 1)
BELOW_HALF = Limit("must be at least 0 and below 0.5", lambda value: 0 <= value < 0.5)
SEED = Limit("must not be negative, and below 2^63", lambda value: 0 <= value < 2**63)
STEPS = Limit("must be above 0, or -1 to let --num_train_epochs decide", lambda value: value > 0 or value == -1)
GIB = Limit("must be above 0 and below 2^20 (GiB), or -1", lambda value: 0 < value < 2**20 or value == -1)


def check(args) -> None:
    """Raises UserError for values that can't work: beyond a flag's own limit, or beside another flag's value."""
    idle = "beta" if args.loss == "sft" else "train_on"
    for flag in dataclasses.fields(args):
        name, value, limit = flag.name, getattr(args, flag.name), flag.metadata["limit"]
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number")
        if limit and value is not None and not limit.holds(value):
            raise UserError(f"--{name} {value}: {limit.words}")
        if (isinstance(value, int) and name != "seed" or name == "num_train_epochs") and abs(value) >= 2**53:
            raise UserError(f"--{name} {value}: must be below 2^53")  # beyond it floats don't count in ones
        if name == idle and value != flag.default:
            raise UserError(f"--{name} {value} has no meaning for --loss {args.loss}; leave it out")
    check_loss(args)
    if args.peft_config and not args.use_lora:
        raise UserError(f"--peft_config {args.peft_config} has no meaning without LoRA; leave it out")
    if args.lora_dropout and args.use_lora and not args.allow_dropout:
        raise UserError(f"--lora_dropout {args.lora_dropout} makes policy and reference differ at step 0; "
                        "add --allow_dropout to train with it all the same, or leave it out")
    for names in (("eval_file_path", "eval_size"), ("gradient_checkpointing", "activation_memory")):
        if len(given := [f"--{name}" for name in names if getattr(args, name)]) > 1:
            raise UserError(f"{' and '.join(given)}: give one of them")
    if not args.cache_dir:
        raise UserError("--cache_dir: is empty; name a folder")
    if "none" in (args.report_to or ()) and len(args.report_to) > 1:
        raise UserError(f"--report_to {' '.join(args.report_to)}: none stands alone")
    if args.eval_steps and not (args.eval_file_path or args.eval_size):
        raise UserError(f"--eval_steps {args.eval_steps}: nothing to evaluate; add --eval_file_path or --eval_size")
    if args.random_init and args.use_lora:
        raise UserError("--random_init with LoRA would freeze random weights; add --use_lora false")
    if args.merge_weights and not args.use_lora:
        raise UserError("--merge_weights: nothing to merge without LoRA; every checkpoint is a whole model")


def row_numbers(text: str | None) -> str | None:
    """The rows of --without_rows, each once and in order, so that one choice has one name; None for no rows. Raises
    UserError for what is no list of numbers."""
    numbers = [number.strip() for number in text.split(",")] if text and text.strip() else []
    if wrong := [number for number in numbers if not (number.isascii() and number.isdecimal() and len(number) < 16)]:
        raise UserError(f"--without_rows {text}: must be numbers of rows with commas between, as in 17,56; found "
                        f"{wrong[0]!r}")
    return ",".join(map(str, sorted({int(number) for number in numbers}))) or None
