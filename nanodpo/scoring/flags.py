"""score.py's command line."""

import argparse
import math
import os
from pathlib import Path

import torch

from ..errors import UserError
from ..flags.launchers import local_rank
from ..flags.settings import check_path, check_utf_8, open_home
from ..flags.unknown import parse_known
from ..ranks.distributed import check_sequence_parallel
from .recorded import FLAGS, PRECISION, READING
from .responses import GREEDY, KINDS
from .runs import newest_run, own_data

OF_TRAIN = {"model_name": "name models as they are", "train_file_path": "--dataset_path names data",
            "eval_file_path": "--dataset_path names data", "per_device_eval_batch_size": "--max_tokens bounds a batch"}
LEDGER_GIB = 4.0


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("targets", nargs="*", help="run folders, checkpoints, adapters or models")
    parser.add_argument("--model_path", help="one more target")
    parser.add_argument("--dataset_path", nargs="+", default=[], help="FILE or NAME=FILE; default: the "
                        "held-out data of the run, or without any its training data")
    parser.add_argument("--responses", nargs="+", metavar="KIND", help=f"of {', '.join(KINDS)}, {GREEDY} (the first "
                        "checkpoint's own answer) and further columns of the data, by name; default: the first four, "
                        "as far as the data has them")
    parser.add_argument("--output_dir", help="default: the first target, where it is a run's folder, else scores/")
    parser.add_argument("--tokens", action="store_true", help="also keep every token's numbers: tokens.parquet")
    parser.add_argument("--risers", type=int, metavar="K", help="also keep, at each position, the K tokens of the "
                        "vocabulary that gained and the K that lost most probability since the run's step 0: "
                        "risers.parquet, risers.csv; takes the memory of two models, but of a LoRA run's base once")
    parser.add_argument("--gradients", action="store_true",
                        help="also the inner product and cosine of a pair's gradients w.r.t. the LoRA weights")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="compute layers again in the backward "
                        "passes of --gradients and --ledger, as train.py does: less memory, more time, the same "
                        "numbers")
    parser.add_argument("--ledger", type=int, default=0, metavar="ROWS", help="instead of scores: split the change of "
                        "the mean log-prob of the first so many rows, from step 0 to the last, over the training pairs "
                        "and their two sides: ledger.parquet, ledger.json; needs a run with --save_steps 1")
    parser.add_argument("--ledger_rows", type=int, nargs="+", metavar="ROW", help="also of each of these rows alone")
    parser.add_argument("--ledger_memory", type=float, default=LEDGER_GIB, metavar="GIB", help="what the "
                        f"ledger may take beside the model, {LEDGER_GIB:g} by default; with less it goes through the "
                        "run more often")
    parser.add_argument("--answers", type=int, default=0, metavar="ROWS",
                        help="also let each checkpoint answer the first so many rows of each data set whose chosen "
                        r"response ends in a \boxed{...} or a number, greedily, and check these answers")
    parser.add_argument("--max_new_tokens", type=int, help="most tokens of an answer; default: as the longest chosen")
    parser.add_argument("--other_prompts", action="store_true",
                        help="also score prompts that open as none did in training (with another system prompt); "
                        "without it they are refused")
    parser.add_argument("--max_tokens", type=int, default=16384 if torch.cuda.is_available() else 2048,
                        help="the most tokens in a micro-batch; default: 2048, on a GPU 16384")
    parser.add_argument("--sequence_parallel_size", type=int, default=1, metavar="N", help="ranks that share a "
                        "micro-batch, for responses too long for one, as in train.py")
    parser.add_argument("--seed", type=int, default=42, help="of the drawn (other) and shuffled responses; default: 42")
    for name in PRECISION:
        parser.add_argument(f"--{name}", action="store_true", help=f"open all targets as train.py does with --{name}; "
                            "default: each run as it was trained, other models without")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the weights, "
                        "and a run's own loss (FILE.py:FUNCTION)")
    for name in READING:
        parser.add_argument(f"--{name}", choices=FLAGS[name].metadata.get("choices"), type=FLAGS[name].type,
                            help="as in train.py; default: as the run read its data")
    parser.add_argument("--gpu_id", type=int, help="the CUDA device to use")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser


def parse(argv: list[str], description: str) -> argparse.Namespace:
    """Command line -> settings; fills in the newest run and its own data set.

    `changes` are the settings that hold for every checkpoint instead of its run's, `own` says that no data were named.
    Raises UserError.
    """
    args = parse_known(make_parser(description), argv, "score.py", OF_TRAIN)
    args.local_rank = local_rank(args.local_rank)
    for name, least in (("max_tokens", 1), ("max_new_tokens", 1), ("answers", 0), ("risers", 1), ("ledger", 0),
                        ("max_length", 1), ("max_prompt_length", 1), ("sequence_parallel_size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if args.max_new_tokens and not args.answers and GREEDY not in (args.responses or []):
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: no answers are made; add --answers ROWS, or {GREEDY} "
                        "to --responses")
    check_path("--output_dir", args.output_dir or "")
    args.output_dir = args.output_dir and open_home("--output_dir", args.output_dir)
    check_gpu(args.gpu_id)
    check_sequence_parallel(args.sequence_parallel_size)
    args.ledger_rows = [*dict.fromkeys(args.ledger_rows or [])]
    check_ledger(args)
    if args.gradient_checkpointing and not (args.gradients or args.ledger or args.ledger_rows):
        raise UserError("--gradient_checkpointing: this call has no backward pass, and saves nothing; it goes with "
                        "--gradients or --ledger")
    if twice := [kind for kind in args.responses or [] if args.responses.count(kind) > 1]:
        raise UserError(f"--responses: {twice[0]} is named twice")
    if "gap" in (args.responses or []):
        raise UserError("--responses gap: summary.csv has the gap of chosen to rejected under this name; give the "
                        "column another name")
    args.targets = [open_home("target", path) for path in (*args.targets, *filter(None, [args.model_path]))]
    args.targets = args.targets or [newest_run(Path("runs"))]
    args.own = not args.dataset_path
    args.dataset_path = named_data(args.dataset_path) or [own_data(args.targets[0])]
    args.changes = {name: getattr(args, name) for name in (*READING, "trust_remote_code", *PRECISION)
                    if getattr(args, name)}
    return args


def check_ledger(args: argparse.Namespace) -> None:
    """Raises UserError for flags that go with no ledger, or values that it can't take."""
    if not 0 < args.ledger_memory < math.inf:
        raise UserError(f"--ledger_memory {args.ledger_memory:g}: must be above 0 GiB")
    if bad := [row for row in args.ledger_rows if row < 0]:
        raise UserError(f"--ledger_rows {bad[0]}: must be the number of a row, from 0")
    if not (args.ledger or args.ledger_rows):
        if args.ledger_memory != LEDGER_GIB:
            raise UserError(f"--ledger_memory {args.ledger_memory:g}: this call makes no ledger; it goes with --ledger")
        return
    for name in ("tokens", "risers", "gradients", "answers"):
        if getattr(args, name):
            raise UserError(f"--ledger: makes no scores; --{name} is for another call")
    if GREEDY in (args.responses or []):
        raise UserError(f"--ledger: makes no answers, so {GREEDY} is no response that it can split")


def check_gpu(gpu_id: int | None) -> None:
    """Raises UserError for a device that is not there, or that a launcher chooses."""
    if gpu_id is None:
        return
    if "RANK" in os.environ:
        raise UserError(f"--gpu_id {gpu_id}: under a launcher each rank has its own device; leave it out")
    if not torch.cuda.is_available():
        raise UserError(f"--gpu_id {gpu_id}: this machine has no CUDA device that torch finds; leave it out to score "
                        "on the CPU")
    if not 0 <= gpu_id < torch.cuda.device_count():
        raise UserError(f"--gpu_id {gpu_id}: this machine has {torch.cuda.device_count()} CUDA devices, from 0")


def named_data(given: list[str]) -> list[tuple[str, str]]:
    """FILE or NAME=FILE, each -> (name, file)."""
    found = []
    for item in given:
        name, _, file = item.partition("=") if "=" in item else (Path(item).stem, "", item)
        if not (name and file):
            raise UserError(f"--dataset_path {name}={file}: expected FILE or NAME=FILE")
        check_utf_8("--dataset_path", name)
        found.append((name, open_home("--dataset_path", file)))
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise UserError(f"--dataset_path: two data sets are called {max(names, key=names.count)}; name them, NAME=FILE")
    return found
