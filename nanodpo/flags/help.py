"""The text of `train.py --help`: every flag once, the ones that most runs set first, the others in groups."""

import dataclasses
import textwrap

FIRST = ("model_name train_file_path output_dir loss beta learning_rate num_train_epochs per_device_train_batch_size "
         "gradient_accumulation_steps bf16").split()
# The other flags, in the order of the arguments: each group begins at the flag named here.
GROUPS = {"trust_remote_code": "model", "eval_file_path": "data", "label_smoothing": "training", "use_lora": "LoRA",
          "load_in_4bit": "precision and memory", "resume": "output and resuming",
          "inspect": "looking without training", "local_rank": "launcher"}
VALUES = {bool: "", str: " TEXT", int: " N", float: " X"}
USAGE = """usage: train.py [settings.yaml] [--flag value ...]

SFT and DPO training. Without --model_name and --train_file_path it runs the
example. Flags shown without a value, like --bf16, are off unless given."""
INDENT = " " * 6


def help_text(settings: type) -> str:
    """The help for a dataclass of settings, 80 columns wide."""
    flags = {flag.name: flag for flag in dataclasses.fields(settings)}
    parts = [USAGE, "\nmost used:", *(_describe(flags[name]) for name in FIRST)]
    for name, flag in flags.items():
        if name in GROUPS:
            parts.append(f"\n{GROUPS[name]}:")
        if name not in FIRST:
            parts.append(_describe(flag))
    return "\n".join(parts) + "\n"


def _describe(flag: dataclasses.Field) -> str:
    """The flag with its kind of value, and below it its meaning and its default."""
    default, text = flag.default, flag.metadata["help"]
    choices = ["true", "false"] if default is True else flag.metadata.get("choices")
    value = f" {{{','.join(choices)}}}" if choices else VALUES[flag.type]
    value += " ..." * (flag.type == list[str] or "nargs" in flag.metadata)
    if default is True:
        text += " Default: true."
    elif default is not None and flag.type is not bool:
        text += f" Default: {default}."
    return f"  --{flag.name}{value}\n" + textwrap.fill(text, 80, initial_indent=INDENT, subsequent_indent=INDENT)
