"""Every setting of a training run, once: its name, type, default and meaning.

    train.py                              the example run, examples/dpo.yaml; flags may change it
    train.py run.yaml --learning_rate 1e-5    a YAML or JSON file, then flags that override it
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..core.losses import LOSSES
from ..errors import UserError
from .help import help_text
from .launchers import local_rank
from .limits import ABOVE_0, BELOW_1, BELOW_HALF, GIB, NOT_NEGATIVE, SEED, STEPS, Limit, check, row_numbers
from .loss import SMOOTHED
from .settings import as_flags, check_path, open_home, read_settings
from .unknown import OTHERWISE, unknown_arguments


def _flag(default, help: str, limit: Limit | None = None, **options):
    """`options` are argparse's: choices, nargs."""
    return field(default=default, metadata={"help": help, "limit": limit} | options)


@dataclass
class TrainArguments:
    # Model
    model_name: str = _flag(None, "Folder or hub id[@revision] of a causal LM, or of a PEFT adapter to train on.")
    trust_remote_code: bool = _flag(False, "Run model code that comes with the weights.")
    reference: str = _flag(None, "Another model or adapter, as the reference. Default: model_name before training.")
    random_init: bool = _flag(False, "Start from model_name's config with random weights instead of its weights.")

    # Data
    train_file_path: str = _flag(None, "File (.parquet, .jsonl, .json, .csv ...), glob, folder, or hub "
                               "id[@revision][:config[:split]]; several with commas between.")
    eval_file_path: str = _flag(None, "Data to evaluate on, given as train_file_path is.")
    eval_size: int = _flag(0, "Without eval_file_path: hold out this many training rows, drawn by seed.", NOT_NEGATIVE)
    split: str = _flag(None, "Split of train_file_path. Default: the only one; of the hub, train.")
    eval_split: str = _flag(None, "Split of eval_file_path. Default: as for split.")
    mix_weights: str = _flag(None, "How often an epoch has each row of the data sets in train_file_path: 1,0.5. "
                             "Default: once.")
    without_rows: str = _flag(None, "Rows of train_file_path whose pairs stay where they are in the order of the data, "
                              "and take no part in the loss: 17,56.")
    prompt_field: str = _flag(None, "Column of prompts. Default: prompt, question ... (docs/data.md).")
    chosen_field: str = _flag(None, "Column of preferred responses. Default: chosen, completion ... (docs/data.md).")
    rejected_field: str = _flag(None, "Column of dispreferred responses. Default: rejected ... (docs/data.md).")
    assistant_header: str = _flag(None, "What opens an assistant turn. Default: read off the chat template.")
    chat_template: str = _flag(None, "File of a chat template, in place of the model's own.")
    chat_template_kwargs: str = _flag(None, "What the chat template is given besides, as JSON: "
                                      "'{\"enable_thinking\": false}'.")
    train_on: str = _flag("all", "Of a conversation without rejected, in SFT: all its answers, or the last.",
                          choices=["all", "last"])
    boundary: str = _flag("error", "Where prompt and response merge in one token: stop, or tokenise them apart.",
                          choices=["error", "concat"])
    max_length: int = _flag(None, "Longest prompt + response, in tokens. Default: the model's context.", ABOVE_0)
    max_prompt_length: int = _flag(None, "Longest prompt, in tokens. A prompt is never cut.", ABOVE_0)
    overlong: str = _flag("error", "Rows over a limit: stop, drop them, or cut the end of the response.",
                          choices=["error", "drop", "truncate"])
    on_bad_row: str = _flag("error", "Empty, mistyped or mismatched rows: stop, or drop them.",
                            choices=["error", "drop"])

    # Loss
    loss: str = _flag("dpo", f"What to minimise: {', '.join(LOSSES)}; or FILE.py:FUNCTION, your own.")
    beta: float = _flag(0.1, "How strongly the reference holds the policy.", ABOVE_0)
    label_smoothing: float = _flag(0.0, f"Probability that a label is flipped, for {' and '.join(SMOOTHED)}: 0 to "
                                   "below 0.5.", BELOW_HALF)
    loss_kwargs: str = _flag(None, "A loss's own settings, as JSON: '{\"simpo_gamma\": 1.0}'.")
    sft_weight: float = _flag(0.0, "Adds this number times -log pi of chosen, per token, to the loss of each pair.",
                              NOT_NEGATIVE)

    # Training
    max_steps: int = _flag(-1, "Optimizer steps; -1: num_train_epochs decides.", STEPS)
    num_train_epochs: float = _flag(1.0, "Passes over the data, where max_steps is -1.", ABOVE_0)
    per_device_train_batch_size: int = _flag(1, "Pairs in a micro-batch on each rank.", ABOVE_0)
    per_device_eval_batch_size: int = _flag(None, "Pairs in a micro-batch of evaluation. Default: as in training.",
                                            ABOVE_0)
    gradient_accumulation_steps: int = _flag(1, "Micro-batches a step on each rank.", ABOVE_0)
    learning_rate: float = _flag(1e-5, "Peak learning rate of AdamW.", NOT_NEGATIVE)
    lr_scheduler_type: str = _flag("cosine", "Shape of the decay after warm-up.",
                                   choices=["cosine", "linear", "constant"])
    warmup_steps: int = _flag(0, "Steps of linear warm-up; the first has learning_rate / warmup_steps.", NOT_NEGATIVE)
    weight_decay: float = _flag(0.0, "AdamW's, on matrices; norms, biases and other vectors are never decayed.",
                                NOT_NEGATIVE)
    adam_beta1: float = _flag(0.9, "Decay of AdamW's mean of gradients.", BELOW_1)
    adam_beta2: float = _flag(0.999, "Decay of AdamW's mean of squared gradients.", BELOW_1)
    adam_epsilon: float = _flag(1e-8, "Added to AdamW's denominator.", ABOVE_0)
    max_grad_norm: float = _flag(1.0, "Gradients of a larger global norm are scaled down to it; 0: never.",
                                 NOT_NEGATIVE)
    skip_nonfinite: int = _flag(0, "Leave out so many steps whose loss or gradient is not finite before stopping.",
                                NOT_NEGATIVE)
    seed: int = _flag(42, "Of the data order, the rows that eval_size and mix_weights draw, LoRA's weights, "
                      "random_init and dropout.", SEED)

    # LoRA
    use_lora: bool = _flag(True, "Train a LoRA adapter; false is full fine-tuning, as is --lora_r 0.")
    lora_r: int = _flag(16, "LoRA rank.", NOT_NEGATIVE)
    lora_alpha: int = _flag(32, "This number divided by lora_r is the factor of what LoRA adds.", ABOVE_0)
    lora_dropout: float = _flag(0.0, "Dropout before LoRA; needs --allow_dropout, since step 0 is then not ln 2.",
                                BELOW_1)
    lora_target_modules: str = _flag("all-linear", "Module names, with commas or spaces between, or all-linear.",
                                     nargs="+")
    peft_config: str = _flag(None, "JSON or YAML file with PEFT's settings of LoRA (adapter_config.json): use_rslora, "
                             "use_dora, rank_pattern ...")
    allow_dropout: bool = _flag(False, "Keep dropout (LoRA's and the model's own) on in training passes.")

    # Precision and memory
    bf16: bool = _flag(False, "Keep frozen matrices in bfloat16, and on a GPU multiply matrices in it. All else stays "
                        "in float32, as everything does without this flag.")
    load_in_4bit: bool = _flag(False, "QLoRA: hold the base's matrices in 4 bits (nf4, double quantisation); needs "
                               "bitsandbytes.")
    load_in_8bit: bool = _flag(False, "Hold the base's matrices in 8 bits, and train LoRA on them; needs bitsandbytes.")
    use_flash_attention: bool = _flag(False, "Demand the variable-length flash kernel (CUDA); stop where it fails.")
    deterministic: bool = _flag(True, "On a GPU: only operations that give the same bits each time; false for a model "
                                "that has others.")
    gradient_checkpointing: bool = _flag(False, "Recompute activations in backward instead of keeping them.")
    activation_memory: float = _flag(None, "GiB a rank has for activations: as many layers are recomputed as each "
                                     "batch needs. -1: what the GPU has left.", GIB)
    sequence_parallel_size: int = _flag(1, "Ranks that share each micro-batch, for pairs too long for one (Ulysses); "
                                        "they count as one rank in the number of pairs a step.", ABOVE_0)
    deepspeed: str = _flag(None, "JSON file for DeepSpeed: ZeRO and the like. Default: ds_config.json beside train.py.")

    # Output and resuming
    output_dir: str = _flag(None, "Folder of the run: new, empty or this very run's. Default: runs/<loss>-<date-time>.")
    resume: str = _flag("auto", "auto: go on if output_dir holds this very run; never; or the folder to go on from.")
    resume_steps: int = _flag(0, "Save a state to resume from every so many steps, besides those of save_steps; the "
                              "two newest stay.", NOT_NEGATIVE)
    keep_states: bool = _flag(False, "Keep all these states, also those of a finished run: --fork can go on from each.")
    fork: str = _flag(None, "RUN@STEP: a new run that goes on from this state of RUN, whose settings are then the "
                      "defaults of all flags; @0 is the start.")
    logging_steps: int = _flag(1, "Print the metrics of every so many steps; metrics.jsonl has every step.", ABOVE_0)
    report_to: list[str] = _flag(None, "Send the metrics there, too. Default: what the file of --deepspeed turns on.",
                                 choices=["tensorboard", "wandb", "csv_monitor", "comet", "none"])
    eval_steps: int = _flag(0, "Evaluate every N steps, besides step 0 and the end; 0: at those alone.", NOT_NEGATIVE)
    save_steps: int = _flag(0, "Save a checkpoint every so many steps; 0: only step 0 and the last.", NOT_NEGATIVE)
    save_total_limit: int = _flag(None, "Keep only the N newest checkpoints, and checkpoint-0. Default: all.", ABOVE_0)
    merge_weights: bool = _flag(False, "At the end also save the adapter merged into its base, in merged/.")
    draw: bool = _flag(True, "Draw the run's figures at its end.")
    cache_dir: str = _flag("~/.cache/nanodpo", "Folder for reference log-probs and prepared data.")

    # Looking without training
    inspect: bool = _flag(False, "Print one tokenised pair, the boundary and the lengths, and stop.")
    inspect_row: int = _flag(None, "The row of the file that --inspect prints. Default: the first that can be used.",
                             NOT_NEGATIVE)
    dry_run: bool = _flag(False, "Take the longest micro-batch through two updates, print memory, time and disk, and "
                          "stop.")
    print_config: bool = _flag(False, "Print the resolved settings as JSON and stop.")

    # Launcher
    local_rank: int = _flag(-1, "Place of this process on its machine; the deepspeed launcher sets it.")

    def __post_init__(self):
        self.use_lora = self.use_lora and self.lora_r > 0
        if isinstance(self.lora_target_modules, list):
            self.lora_target_modules = ",".join(self.lora_target_modules)
        for name in PATHS:
            check_path(f"--{name}", value := getattr(self, name) or "")
            if value.startswith("~"):
                setattr(self, name, open_home(f"--{name}", value))
        if self.assistant_header:  # a shell passes on what an error message shows: a backslash and an n
            self.assistant_header = self.assistant_header.replace("\\n", "\n")
        self.without_rows = row_numbers(self.without_rows)
        self.inspect = self.inspect or self.inspect_row is not None
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        check(self)


# Flags that name what is read. Its content tells one run from another, not its name.
BY_CONTENT = ("model_name", "reference", "peft_config", "train_file_path", "eval_file_path", "chat_template",
              "deepspeed")
PATHS = (*BY_CONTENT, "output_dir", "cache_dir", "resume", "fork")


def parse(argv: list[str], default_file: Path,
          settings_of: Callable = lambda fork, output_dir: ({}, "")) -> TrainArguments:
    """Command line -> arguments. Raises UserError for unknown flags or keys, wrong types and wrong values.

    `settings_of` maps --fork and --output_dir to (settings that the other flags override, the file they come from).
    """
    from transformers import HfArgumentParser  # slow to import

    class Parser(HfArgumentParser):
        def add_argument(self, *names, limit=None, **options):  # argparse has no limits; limits.check reads them
            return super().add_argument(*names, **options)

    parser = Parser(TrainArguments, allow_abbrev=False)
    parser.error = _raise  # argparse would print the whole usage before the one line that matters
    parser.format_help = lambda: help_text(TrainArguments)
    launcher = [flag for flag in argv if flag.startswith(("--local_rank=", "--local-rank="))]
    argv = [flag for flag in argv if flag not in launcher]  # the deepspeed launcher puts it before a settings file
    names, own = [f.name for f in fields(TrainArguments)], {flag.partition("=")[0] for flag in argv}
    file = None
    if argv and argv[0].endswith((".yaml", ".yml", ".json")) and not argv[0].startswith("-"):
        file = argv[0]
        argv = read_settings(file, names) + argv[1:]
    early = _before_all_others(argv)
    if early.fork:
        settings, recorded = settings_of(early.fork, early.output_dir)
        argv, file = as_flags(settings, recorded) + argv, file or recorded
    elif not file and not own & {"--model_name", "--model-name", "--train_file_path", "--train-file-path"}:
        # Neither a model nor data: the example, changed by these flags. Its paths are relative to the program.
        example = read_settings(str(default_file), names)
        argv = [flag.replace("=examples/", f"={default_file.parent}/") for flag in example] + argv
    try:
        args, unknown = parser.parse_args_into_dataclasses(argv + launcher, look_for_args_file=False,
                                                           return_remaining_strings=True)
    except UserError as error:
        message = _as_typed(str(error), own, file)
        if early.fork and message.startswith(f"{file}: "):
            texts = {f"--{flag.name}" for flag in fields(TrainArguments) if flag.default is None and flag.type is str}
            none = ", or '' for none" * (str(error).split()[0].rstrip(":") in texts)
            message += f" (a fork takes over its run's flags: give this one another value{none})"
        raise UserError(message) from error
    if unknown and unknown[0].endswith((".yaml", ".yml", ".json")) and not unknown[0].startswith("-"):
        raise UserError(f"unknown argument {unknown[0]}; a settings file comes first")
    if unknown:
        raise UserError(unknown_arguments(unknown, names, "train.py", OTHERWISE))
    args.local_rank = local_rank(args.local_rank)
    if missing := [name for name in ("model_name", "train_file_path") if not getattr(args, name)]:
        other = "train_file_path" if missing[0] == "model_name" else "model_name"
        raise UserError(f"--{missing[0]} is missing; name it beside --{other}, or leave out both to run the example")
    return args


def _before_all_others(argv: list[str]) -> argparse.Namespace:
    """--fork and --output_dir: they decide what the other flags are by default."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.error = _raise
    parser.add_argument("--fork")
    parser.add_argument("--output_dir", "--output-dir")
    return parser.parse_known_args(argv)[0]


def _as_typed(message: str, own: set[str], file: str | None) -> str:
    """A message that names its flag as the user wrote it: with dashes or underscores, or with the settings file."""
    name = message.partition(":")[0].partition(" ")[0]
    dashed = "--" + name.removeprefix("--").replace("_", "-")
    if name in own or not name.startswith("--"):
        return message
    if dashed in own:
        return message.replace(name, dashed, 1)
    return f"{file}: {message}" if file else message


# Values that other trainers take: the beginning of argparse's message, and what it leaves unsaid.
ADVICE = {
    r"--(eval|logging|max|resume|save|warmup)_steps: invalid int value: '\d*\.": "a number of steps, not a fraction",
    r"--lr_scheduler_type: invalid choice: 'constant_with_warmup'": "it is constant with --warmup_steps",
    r"--report_to: invalid choice:": "name those that you want, with spaces between: --report_to tensorboard wandb",
}


def _raise(message: str) -> None:
    message = re.sub(r"Truthy value expected: got (.*) but exp.*", r"must be true or false, found \1", message)
    message = re.sub(r"^argument (--\w+)(/\S+)?:", r"\1:", message)
    raise UserError("; ".join([message, *(words for start, words in ADVICE.items() if re.match(start, message))]))
