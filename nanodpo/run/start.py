"""A run before its first step: what was asked for, checked and read, and what the parts of a run then share."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ..core.losses import needs_reference
from ..data import inspection
from ..data.example import row_starts, trained_sides
from ..data.mixing import read_weights
from ..data.places import name_splits
from ..data.schedule import steps_of
from ..data.tokens import DataSet
from ..flags.arguments import TrainArguments, parse
from ..flags.loss import loss_name, read_loss
from ..folder import elastic, fork, record, same_run
from ..folder.atomic import check_writable
from ..folder.card import History
from ..folder.fork import Fork
from ..folder.log import LogHash
from ..model.source import Source, absolute
from ..ranks import distributed
from ..screen import folded
from . import agreement
from .datasets import read_data
from .deepspeed_settings import read_deepspeed
from .models import open_checked, open_reference, read_lora, say_other_bits
from .monitors import take_blocks
from .other_trainers import accelerate_differs
from .signals import Stop


@dataclasses.dataclass
class Start:
    """A run before its model is loaded."""

    args: TrainArguments
    loss: Callable  # of core/losses.py, its settings filled in
    deepspeed: dict  # DeepSpeed's settings
    source: Source
    train_set: DataSet
    held_out: DataSet | None
    folder: Path
    facts: dict  # what makes it this very run; run.json
    resumed: dict | None  # the run.json of the run to go on with
    wanted_step: int | None  # the step to go on from, where one was asked for
    fork: Fork | None = None  # what --fork names
    without_rows: frozenset[int] = frozenset()  # rows whose pairs take no part in the loss
    monitors: dict[str, dict] = dataclasses.field(default_factory=dict)  # DeepSpeed's settings of each
    lora: dict = dataclasses.field(default_factory=dict)  # the settings of --peft_config
    reference: Source | None = None  # of --reference

    @property
    def finished(self) -> bool:
        return bool(self.resumed and self.resumed.get("finished"))

    @property
    def adapter_off(self) -> bool:
        """Whether the reference is the model without its adapter."""
        if self.reference is None:
            return self.args.use_lora and not self.source.adapter
        base = absolute(self.reference.base) == absolute(self.source.base)
        return self.args.use_lora and base and not self.reference.adapter

    @property
    def longest(self) -> int:
        """Tokens of the longest [prompt | response]."""
        return max(example.length for data in (self.train_set, self.held_out) if data for example in data.examples)


@dataclasses.dataclass
class Run(Start):
    """A run with its engine. `ref` and `held_ref` are (n, 2) reference log-probs, None for a loss that takes none;
    `row_weights` is (n,): how much each training pair counts in the loss."""

    stop: Stop = None
    start_hash: str = ""  # of the weights that it starts from, which are the reference without --reference
    reference_hash: str | None = None  # of --reference
    reference_model: tuple | None = None  # of --reference: (SequenceLogProbs, layout, attention), until it was used
    engine: object = None  # DeepSpeed's
    device: torch.device = None
    world: int = 1
    rank: int = 0
    layout: str = ""  # of packing.py
    attention: str = ""
    ref: torch.Tensor | None = None
    held_ref: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None
    step: int = 0  # steps done, those without an update (--skip_nonfinite) included
    tokens: int = 0  # trained on so far
    skipped: int = 0
    evaluated: set[int] = dataclasses.field(default_factory=set)  # steps whose evaluation is in metrics.jsonl
    random_states: dict | None = None  # of the random generators, as they were before this step
    lock: object = None  # an open file
    log_hash: LogHash | None = None  # the hash of metrics.jsonl that states keep; rank 0 alone
    history: History | None = None  # metrics.jsonl as cards of checkpoints show it; rank 0 alone
    monitor: object = None  # of monitors.py; rank 0 alone

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.lock:  # a notebook's process goes on, and may go on with this run
            self.lock.close()

    @functools.cached_property
    def trained_sides(self) -> tuple[str, ...]:
        return trained_sides(self.args.loss)

    @functools.cached_property
    def data_rank(self) -> int:
        """The number of this rank's batches among the `data_world` that are made at one time: with
        --sequence_parallel_size several ranks share one."""
        return self.rank // self.args.sequence_parallel_size

    @functools.cached_property
    def data_world(self) -> int:
        return self.world // self.args.sequence_parallel_size

    @functools.cached_property
    def pairs_per_step(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.data_world

    @functools.cached_property
    def row_starts(self) -> tuple[int, ...] | None:
        """Where the rows of the training set begin among its pairs; None where every row is one pair."""
        return row_starts(self.train_set.examples)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_set.examples) / self.pairs_per_step)

    @functools.cached_property
    def steps(self) -> int:
        return steps_of(self.args.max_steps, self.args.num_train_epochs, self.steps_per_epoch)

    @property
    def starts_as_reference(self) -> bool:
        """Whether the policy of step 0 is its reference."""
        return self.reference_hash in (None, self.start_hash)


def prepare(argv: list[str], script: Path) -> Start | None:
    """Reads the flags and the data, and finds what is wrong with them, or not the same on all ranks, before a weight is
    loaded or a folder made. None where nothing is to be trained."""
    with agreement.same_on_all_ranks() as compared:
        args = parse(argv, script.parent / "examples" / "dpo.yaml", fork.settings_of)
        name_splits(args)
        weights = read_weights(args.mix_weights, args.train_file_path)
        lora = read_lora(args)
        loss, loss_hash = read_loss(args, args.beta != TrainArguments.beta)
        compared |= {"--peft_config with": json.dumps(lora), "a loss function's file that hashes to": loss_hash}
        compared |= agreement.flags(dataclasses.asdict(args)) | agreement.program(script, args.local_rank)
    if args.print_config:
        return say_config(args)
    if args.inspect:
        return say_inspection(args, lora, weights, script.parent / "ds_config.json")
    today = distributed.from_main(str(datetime.date.today()))  # one day for all ranks
    with agreement.same_on_all_ranks() as compared:
        deepspeed = read_deepspeed(args, script.parent / "ds_config.json")
        if differs := accelerate_differs(args, deepspeed):
            distributed.say(differs)
        monitors = take_blocks(deepspeed, args.report_to)
        check_launch(args)
        source, how = open_checked(args, lora, deepspeed)
        say_other_bits(args, source.adapter)
        new = f"runs/{loss_name(args.loss)}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
        folder, old, wanted = record.find(args.resume, args.output_dir, new)
        forked = fork.find(args.fork, folder) if args.fork else None
        if before := old or (forked and forked.source):
            elastic.share_anew(args, before, forked or f"--output_dir {folder}", demanded=bool(old or forked.step))
        date = (before or {}).get("date") or today  # some chat templates write it
        train, held_out, limit, without = read_data(args, source, weights, date)
        sets = [data for data in (train, held_out) if data]
        facts = record.facts(args, deepspeed, limit, sets, script.parent, [str(script), *argv])
        facts |= {"date": date, "peft_config": lora or None, "quantisation": how, "loss_function": loss_hash,
                  "fork": fork.entry(forked, old)}
        facts["versions"] |= {"bitsandbytes": importlib.metadata.version("bitsandbytes")} if how else {}
        if old:
            same_run.check_same(folder, old, facts, before_loading=bool(source.adapter))
        elif forked:
            fork.check(forked, facts, before_loading=bool(source.adapter))
        start = Start(args, loss, deepspeed, source, train, held_out, folder, facts, old, wanted, forked, without,
                      monitors, lora)
        if args.reference and not start.finished:
            start.reference = open_reference(args, source, sets)
        if needs_reference(loss) and not start.finished:
            check_writable(Path(args.cache_dir), f"--cache_dir {args.cache_dir}")
        compared |= agreement.inputs((args.train_file_path, args.eval_file_path), facts, old, wanted)
    if not start.finished:
        distributed.say(folded("\n".join(which + data.report() for which, data in zip(("", "held-out "), sets))))
    return start


def check_launch(args) -> None:
    """Raises UserError for settings that this machine, or the number of ranks that were started, can't honour."""
    distributed.check_device(args)
    distributed.check_sequence_parallel(args.sequence_parallel_size)


def say_config(args) -> None:
    """--print_config: a settings file from which a run can start. What only this process was told is no part of it."""
    kept = {name: value for name, value in vars(args).items() if name not in ("print_config", "local_rank")}
    distributed.say(json.dumps(kept, indent=2))


def say_inspection(args, lora: dict, weights: list[float], ds_config: Path) -> None:
    """--inspect. Rows that a run would refuse are left out and named; what it would refuse of settings, model and
    DeepSpeed's file is refused here, too."""
    with agreement.same_on_all_ranks():
        deepspeed = read_deepspeed(args, ds_config)
        distributed.check_device(args)
        source, _ = open_checked(args, lora, deepspeed)
        train, held_out, limit, _ = read_data(inspection.lenient(args), source, weights)
        if args.reference:
            open_reference(args, source, [data for data in (train, held_out) if data])
    distributed.say(inspection.inspect(train, source.tokenizer, limit, args.inspect_row, held_out))
