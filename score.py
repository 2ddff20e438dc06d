"""Log-probabilities of any responses under any checkpoints, through the kernel that training uses.

    python score.py                                         the newest run under runs/, on its own held-out data
    python score.py RUN [RUN ...] --dataset_path forward=f.parquet reverse=r.parquet --output_dir O
    python score.py --model_path M --dataset_path D         any model or adapter
    torchrun --nproc_per_node=2 score.py RUN                the same work, shared by the ranks

Leaves scores.parquet, a line for each checkpoint, data set, row and response, and summary.csv, their means. A scoring
that was stopped goes on where it was: what is done is kept in <output_dir>/parts, a file a checkpoint and data set.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanodpo import distributed, scores
from nanodpo.errors import UserError, first_line, run_script
from nanodpo.logprobs import SequenceLogProbs
from nanodpo.packing import LAYOUTS
from nanodpo.reference import data_hash
from nanodpo.responses import KINDS, batches, make_groups
from nanodpo.runs import Checkpoint, newest_run, open_targets
from nanodpo.settings import local_rank
from nanodpo.source import open_source
from nanodpo.template import read_template
from nanodpo.tokens import load_dataset


@dataclasses.dataclass
class Probe:
    """A data set with its responses: groups[i] belongs to examples[i]."""

    name: str
    examples: list
    groups: list  # (prompt ids, {kind: response ids})
    key: str  # a hash of everything that is scored


@dataclasses.dataclass
class Opened:
    """A checkpoint in memory. An adapter of the same shape on the same base only exchanges weights."""

    checkpoint: Checkpoint
    base: str
    adapter: dict | None  # its adapter_config.json, less what says where it lies
    module: SequenceLogProbs
    layout: str


def main(argv: list[str]) -> None:
    args = parse(argv)
    checkpoints = open_targets(args.targets)
    probes = [open_probe(name, path, checkpoints, args) for name, path in args.dataset_path]
    folder = Path(args.output_dir or (args.targets[0] if (Path(args.targets[0]) / "run.json").is_file() else "scores"))
    scores.make_folder(folder / "parts")
    device = open_device(args)

    work = [(checkpoint, probe, folder / "parts" / part_name(checkpoint, probe, args))
            for checkpoint in checkpoints for probe in probes]
    missing = [item for item in work if not item[2].is_file()]
    distributed.say(f"{len(work)} parts, {len(work) - len(missing)} of them done before")
    opened = None
    with tqdm(total=len(missing), unit="part", disable=not (distributed.is_main() and sys.stderr.isatty())) as bar:
        for checkpoint, probe, file in missing:
            opened = open_checkpoint(checkpoint, opened, probes, args, device)
            bar.set_postfix_str(f"{checkpoint.run} step {checkpoint.step} {probe.name}")
            lines = score_probe(opened, probe, args.max_tokens, device)
            if distributed.is_main():
                scores.write_part(file, checkpoint, probe.name, lines)
            bar.update()
    if distributed.is_main():
        print(scores.join_parts(folder, [file for _, _, file in work]))


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line -> settings; fills in the newest run and its own data set. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("targets", nargs="*", help="run folders, checkpoints, adapters or models")
    parser.add_argument("--model_path", help="one more of these")
    parser.add_argument("--dataset_path", nargs="+", default=[], help="files, with a name: NAME=FILE")
    parser.add_argument("--responses", nargs="+", choices=KINDS, help="default: all that the data set has")
    parser.add_argument("--output_dir", help="default: the first run's folder, or scores/")
    parser.add_argument("--max_tokens", type=int, default=16384, help="in a micro-batch")
    parser.add_argument("--seed", type=int, default=42, help="of drawn and shuffled responses")
    parser.add_argument("--bf16", action="store_true", help="also for models that no run says it of")
    parser.add_argument("--gpu_id", type=int, help="the CUDA device to use")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    args = parser.parse_args(argv)
    args.local_rank = local_rank(args.local_rank)
    if args.max_tokens < 1:
        raise UserError(f"--max_tokens {args.max_tokens}: must be above 0")
    args.targets += [args.model_path] if args.model_path else []
    args.targets = args.targets or [newest_run(Path("runs"))]
    pairs = [item.partition("=") if "=" in item else (Path(item).stem, "", item) for item in args.dataset_path]
    args.dataset_path = [(name, path) for name, _, path in pairs] or [own_data(args.targets[0])]
    names = [name for name, _ in args.dataset_path]
    if len(set(names)) < len(names):
        raise UserError(f"--dataset_path: two data sets are called {max(names, key=names.count)}; name them, NAME=FILE")
    return args


def own_data(target: str) -> tuple[str, str]:
    """The held-out data of a run, else what it trained on. Raises UserError for a bare model."""
    settings = open_targets([target])[0].settings
    if settings.eval_file_path:
        return "test", settings.eval_file_path
    if settings.train_file_path:
        return "train", settings.train_file_path
    raise UserError(f"{target}: is no run, so --dataset_path is needed")


def open_probe(name: str, path: str, checkpoints: list[Checkpoint], args) -> Probe:
    """Reads a data set as the first checkpoint's run did. Raises UserError where another would read it otherwise.

    Tokenizers may lie in many folders, but they must say the same: log-probs of other tokens don't compare.
    """
    read = {}
    for checkpoint in checkpoints:
        source, settings = open_source(checkpoint.path, checkpoint.settings.trust_remote_code), checkpoint.settings
        tokenizer = source.tokenizer
        spoken = json.dumps([tokenizer.chat_template, settings.assistant_header, sorted(tokenizer.get_vocab().items())])
        read.setdefault(spoken, (checkpoint, source))
    if len(read) > 1:
        first, second = (checkpoint.path for checkpoint, _ in list(read.values())[:2])
        raise UserError(f"{first} and {second} have different tokenizers or chat templates; score them in two calls")
    ((checkpoint, source),) = read.values()
    settings = checkpoint.settings
    limit = settings.max_length or source.context or sys.maxsize
    data = load_dataset(path, read_template(source.tokenizer, settings.assistant_header), settings, limit, pairs=False)
    has = [kind for kind in KINDS if kind != "rejected" or data.examples[0].rejected is not None]
    groups = make_groups(data.examples, args.responses or has, args.seed)
    if distributed.is_main():
        print(data.report())
    digest = hashlib.sha256(data_hash(data.examples).encode())
    digest.update(json.dumps([[prompt, responses] for prompt, responses in groups]).encode())
    return Probe(name, data.examples, groups, digest.hexdigest())


def open_device(args) -> torch.device:
    """This rank's device; ranks only meet where a launcher started them."""
    if "RANK" in os.environ:
        return distributed.start(args.local_rank)
    return torch.device("cuda", args.gpu_id or 0) if torch.cuda.is_available() else torch.device("cpu")


def part_name(checkpoint: Checkpoint, probe: Probe, args) -> str:
    """A hash of all that could change a part's numbers; weights by their files' names, sizes and times."""
    found = sorted(Path(checkpoint.path).glob("*.safetensors"))
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    bf16 = checkpoint.settings.bf16 or args.bf16
    key = repr((checkpoint.run, checkpoint.path, files, probe.name, probe.key, bf16))
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.parquet"


def open_checkpoint(checkpoint: Checkpoint, opened: Opened | None, probes, args, device) -> Opened:
    """The checkpoint's weights in memory, from `opened` where the same base is there already."""
    from transformers import AutoModelForCausalLM

    from nanodpo import selfcheck

    if opened and opened.checkpoint is checkpoint:
        return opened
    settings, dtype = checkpoint.settings, torch.bfloat16 if checkpoint.settings.bf16 or args.bf16 else torch.float32
    source = open_source(checkpoint.path, settings.trust_remote_code)
    adapter = scores.adapter_shape(source.adapter)
    wanted = source.base, adapter, settings.bf16
    if opened and adapter and (opened.base, opened.adapter, opened.checkpoint.settings.bf16) == wanted:
        scores.exchange_adapter(opened.module.model, source.adapter)
        return dataclasses.replace(opened, checkpoint=checkpoint)
    try:
        remote = {"trust_remote_code": settings.trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(source.base, dtype=dtype, **remote)
        model = scores.add_adapter(model, source.adapter)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{checkpoint.path}: can't be opened: {first_line(error)}") from error
    module = SequenceLogProbs(model).to(device).eval()
    groups = [group for probe in probes for group in probe.groups]
    longest = max(len(prompt) + len(ids) for prompt, responses in groups for ids in responses.values())
    layout, attention = selfcheck.choose_layout(module, device, dtype, False, longest)
    distributed.say(f"{source.base}: rows {layout}, attention {attention}")
    return Opened(checkpoint, source.base, adapter, module, layout)


@torch.no_grad()
def score_probe(opened: Opened, probe: Probe, max_tokens: int, device) -> list[dict]:
    """A line for each row and response, in the data set's order, on rank 0. Raises UserError for what is not finite."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    lines = []
    for indices in batches(probe.groups, max_tokens)[rank::world]:
        groups = [probe.groups[i] for i in indices]
        row = LAYOUTS[opened.layout]([(prompt, [*responses.values()]) for prompt, responses in groups])
        logps = iter(opened.module(row.to(device)).tolist())
        for i, (_, responses) in zip(indices, groups):
            for kind, ids in responses.items():
                lines.append({"row": probe.examples[i].row, "response": kind, "tokens": len(ids), "logps": next(logps)})
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, lines)
        lines = [line for part in gathered for line in part]
    if bad := [line for line in lines if not math.isfinite(line["logps"])]:
        raise UserError(f"{opened.checkpoint.path}: row {bad[0]['row']} {bad[0]['response']} of {probe.name} has "
                        f"log-prob {bad[0]['logps']}: the weights are broken")
    return sorted(lines, key=lambda line: (line["row"], list(KINDS).index(line["response"])))


if __name__ == "__main__":
    sys.exit(run_script(main))
