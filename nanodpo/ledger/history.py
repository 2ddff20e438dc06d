"""A run's steps once more: its checkpoints, the pairs of each step, and gradients of what it trained."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.losses import loss_divisor, needs_reference, pair_losses, pair_weights
from ..core.packing import LAYOUTS, make_batch, pair_lengths
from ..data.example import SIDES, Example, row_starts, trained_sides
from ..data.mixing import read_weights
from ..data.schedule import learning_rate, pairs_of_step
from ..errors import UserError
from ..files import read_text, why
from ..flags.arguments import TrainArguments
from ..flags.loss import own_function
from ..folder.elastic import arguments_of, pairs_per_step
from ..folder.fork import changed_on_the_way
from ..folder.log import MAX_BYTES
from ..folder.reference import data_hash
from ..folder.same_run import ADAPTER, changed_weights
from ..model.adapters import dora_norms
from ..model.decay import is_decayed
from ..model.ready import response_logps
from ..model.source import open_source
from ..progress import track
from ..run.datasets import read_data
from ..run.passes import row_weights
from ..scoring.opened import Opened, Opener, check_references
from ..scoring.runs import Checkpoint, as_reference, find_bases, loss_of_run, open_targets
from ..screen import command_line
from .adamw import AdamW
from .probes import Probes


@dataclasses.dataclass
class History:
    """A finished run, or the steps of one so far, each of which left a checkpoint."""

    checkpoints: list[Checkpoint]  # of step 0, 1, ... K
    args: TrainArguments
    loss: Callable  # of core/losses.py, its settings filled in
    examples: list[Example]
    pairs_per_step: int
    planned: int  # steps of the whole run, on which the learning rate depends
    skipped: set[int]  # steps that made no update
    norms: dict[int, float]  # of each step's gradient, as training logged them
    opener: Opener
    reference: Checkpoint | None  # where the loss takes one
    without: frozenset[int] = frozenset()  # rows whose pairs take no part in the loss
    ref: Tensor | None = None  # what reference_logps gives; set by sweeps.py
    opened: Opened | None = None
    trained: list[torch.nn.Parameter] = dataclasses.field(default_factory=list)  # of it: LoRA weights, or all
    shrinks: list[bool] = dataclasses.field(default_factory=list)  # of each of these: whether weight decay shrinks it

    @property
    def run(self) -> str:
        """The run's name in the tables. A fork that was made to keep more checkpoints, and nothing else, has that of
        its source: its weights are the same, and so are their scores."""
        first = self.checkpoints[0]
        fork = first.settings.record.get("fork") or {}
        again = fork and not fork["step"] and not changed_weights(fork)
        return Path(fork["run"]).name if again else first.run

    @functools.cached_property
    def row_starts(self) -> tuple[int, ...] | None:
        return row_starts(self.examples)

    @property
    def steps(self) -> int:
        return len(self.checkpoints) - 1

    @property
    def adam(self) -> AdamW:
        a = self.args
        return AdamW(a.adam_beta1, a.adam_beta2, a.adam_epsilon, a.max_grad_norm, a.weight_decay)

    @property
    def sides(self) -> tuple[str, ...]:
        return trained_sides(self.args.loss)

    def open(self, step: int) -> None:
        """Loads the weights that step `step` began with."""
        self.opened, self.trained, self.shrinks = None, [], []  # a whole model goes before the next comes
        self.opened = self.opener.open(self.checkpoints[step])
        named = [*self.opened.module.model.named_parameters()]
        named = [(name, p) for name, p in named if ".lora_" in name] or named
        self.trained, self.shrinks = [p for _, p in named], [is_decayed(name, p) for name, p in named]
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def weights(self) -> Tensor:
        """(D,): the trained weights, one after the other."""
        return torch.cat([p.detach().flatten() for p in self.trained])

    def decayed(self) -> Tensor:
        """(D,): those that weight decay shrinks, and 0 for those that it leaves alone."""
        return torch.cat([(p.detach() if shrinks else torch.zeros_like(p)).flatten()
                          for p, shrinks in zip(self.trained, self.shrinks)])

    def gradient(self, value: Tensor) -> Tensor:
        """(D,): of a number by the trained weights."""
        found = torch.autograd.grad(value, self.trained, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    def slope(self, value: Tensor) -> Tensor:
        """(D,): the derivative of a number by the trained weights. Of DoRA it is another than the gradient of training,
        which holds the norms constant by which DoRA divides (arXiv 2402.09353, section 4.3)."""
        norms = dora_norms(self.opened.module.model)
        if not norms:
            return self.gradient(value)
        parts = torch.autograd.grad(value, self.trained, materialize_grads=True)
        by = {id(p): part for p, part in zip(self.trained, parts)}
        # A layer's output depends on magnitude / norm alone, so d/d norm is -(magnitude / norm) d/d magnitude.
        more = sum(norm @ -(by[id(size)] * size / norm).detach() for size, norm in norms)
        return self.gradient(more) + torch.cat([part.flatten() for part in parts])

    def rate(self, step: int) -> float:
        a = self.args
        return learning_rate(step, self.planned, a.learning_rate, a.warmup_steps, a.lr_scheduler_type)

    def pairs(self, step: int) -> list[int]:
        """Indices of the examples of a step."""
        return pairs_of_step(len(self.examples), self.pairs_per_step, self.args.seed, step, self.row_starts)

    def divisor(self, step: int) -> float:
        return loss_divisor(self.args.loss, [self.examples[k] for k in self.pairs(step)])

    def micro_batches(self, step: int) -> list[list[int]]:
        """The pairs of a step as training cut them."""
        pairs, size = self.pairs(step), self.args.per_device_train_batch_size
        return [pairs[i : i + size] for i in range(0, len(pairs), size)]

    def reference_logps(self) -> Tensor:
        """(n, 2): the reference's log-probs of all pairs that the run visited, nats."""
        opened, ref = self.opener.open(self.reference), torch.full((len(self.examples), 2), torch.nan).double()
        epoch = math.ceil(len(self.examples) / self.pairs_per_step)  # training takes those of its first one
        for step in track(range(min(self.steps, epoch)), "reference", "step"):
            for indices in self.micro_batches(step):
                here = [self.examples[k] for k in indices]
                ref[indices] = response_logps(opened.module, here, SIDES, opened.layout, opened.device).cpu()
        return ref

    def _logps(self, indices: list[int], sides: Sequence[str]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probs (P, R) of these sides of examples with their graph, the reference's of both (P, 2), lengths (P, R).
        """
        opened = self.opened
        here = [self.examples[k] for k in indices]
        batch, index = make_batch(here, sides, opened.layout, opened.device)
        logps = opened.logps(batch)[index]
        ref = None if self.ref is None else self.ref[indices].to(opened.device)
        return logps, ref, pair_lengths(here, sides, opened.device)

    def step_gradient(self, step: int) -> Tensor:
        """(D,): of the loss of a step, before clipping, with respect to the weights that are open."""
        total, divisor = 0.0, self.divisor(step)
        for indices in self.micro_batches(step):
            logps, ref, lengths = self._logps(indices, self.sides)
            losses = pair_losses(self.loss, logps, ref, lengths, self.args.sft_weight)
            losses = losses * row_weights([self.examples[k] for k in indices], self.without).to(self.opened.device)
            total = total + self.gradient(losses.sum() / divisor)
        return total

    def pair_gradients(self, step: int) -> Iterator[tuple[int, int, Tensor]]:
        """(index of an example, 0 for chosen and 1 for rejected, (D,)): the parts of `step_gradient`."""
        divisor = self.divisor(step)
        for k in self.pairs(step):
            # Each response in a pass of its own: a backward pass goes through all that went through the forward one.
            found = [self._logps([k], [side]) for side in self.sides]
            logps, lengths = (torch.cat([one[i] for one in found], 1) for i in (0, 2))
            weights = pair_weights(self.loss, logps, found[0][1], lengths, self.args.sft_weight)[0]
            weights *= row_weights([self.examples[k]], self.without).to(weights.device) / divisor
            for side, weight in enumerate(weights.tolist()):
                part = self.gradient(found[side][0].sum())
                yield k, side, part * (weight if side else -weight)

    def probe_gradients(self, probes: Probes) -> tuple[Tensor, Tensor]:
        """((M,) values of the probes, nats a token, (M, D) their gradients) under the weights that are open."""
        values = torch.zeros(len(probes.names), dtype=torch.float64)
        grads = [0.0] * len(probes.names)
        for m, groups, weights in probes.batches:
            logps = self.opened.logps(LAYOUTS[self.opened.layout](groups).to(self.opened.device))
            value = logps @ weights.to(logps.device)
            values[m] += value.item()
            grads[m] = grads[m] + self.slope(value)
        return values, torch.stack(grads)


def open_history(checkpoints: list[Checkpoint], device: torch.device, longest: int, trust_remote_code: bool,
                 recompute: bool = False) -> History:
    """The history of the run whose checkpoints these are, to be opened on `device` for its own sequences, and others of
    `longest` tokens. `recompute`: backward computes the layers again.

    Raises UserError where they are not those of every step of one run, where its training data are others by now, and
    for what made gradients that can't be made again: dropout.
    """
    check_steps(checkpoints)
    first = checkpoints[0]
    folder, record = Path(first.path).parent, first.settings.record
    known = {field.name for field in dataclasses.fields(TrainArguments)} - ADAPTER
    args = TrainArguments(**{name: value for name, value in arguments_of(record).items() if name in known}
                          | {"trust_remote_code": trust_remote_code, "local_rank": -1})
    if args.allow_dropout:
        raise UserError(f"--ledger: {folder} was trained with dropout, whose gradients can't be made again")
    if own_function(args.loss) and not trust_remote_code:
        raise UserError(f"--ledger: the loss of {folder} is {args.loss}; --trust_remote_code runs that file")
    loss = loss_of_run(args, record, folder)
    weights = read_weights(args.mix_weights, args.train_file_path)
    train, _, _, without = read_data(args, open_source(first.path, trust_remote_code), weights, record.get("date"))
    if data_hash(train.once) != record["data"][0]:
        raise UserError(f"{args.train_file_path}: has changed since run {folder} was trained on it; put the file back")
    reference = first if needs_reference(loss) else None
    if args.reference:  # refused for a loss that takes none
        reference = open_targets([args.reference])[0]
        as_reference(reference, [first])
        find_bases([reference])
        check_references([reference, first])
    skipped, norms = read_steps(folder)
    if skipped >= {*range(len(checkpoints) - 1)}:
        raise UserError(f"--ledger: no step of {folder} made an update, so nothing has changed")
    longest = max(longest, *(example.length for example in train.examples))
    opener = Opener(device, False, longest, recompute=recompute)
    return History(checkpoints, args, loss, train.examples, pairs_per_step(record), record["steps"], skipped, norms,
                   opener, reference, without)


def check_steps(checkpoints: list[Checkpoint]) -> None:
    """Raises UserError where these are not the checkpoints of one run at step 0, 1, 2 and so on, with the same settings
    at each."""
    first = checkpoints[0]
    if len({c.run for c in checkpoints}) > 1 or not first.phase:
        raise UserError(f"--ledger: is of one run, and {first.path} is no run, or not the only one; name the folder of "
                        "a run")
    steps, folder = [c.step for c in checkpoints], Path(first.path).parent
    if fork := changed_on_the_way(first.settings.record.get("fork")):
        raise UserError(f"--ledger: {folder} is a fork, and its steps before {fork['step']} had other settings than "
                        f"those after; a fork of {fork['run']} at 0 with its settings has steps that are all alike")
    if lacking := sorted({*range(steps[-1] + 1)} - {*steps}):
        keep = ["--save_steps", 1]
        if first.settings.record["arguments"].get("save_total_limit"):
            keep += ["--save_total_limit", 10**6]
        again = command_line(Path(__file__).resolve().parents[2] / "train.py", "--fork", f"{folder}@0", *keep)
        raise UserError(f"--ledger: needs a checkpoint of every step, and {folder} has none of step {lacking[0]}; "
                        f"`{again}` trains it again, to the last bit, and keeps them")
    if len(steps) < 2:
        raise UserError(f"--ledger: {folder} has checkpoint-0 alone, so nothing has changed")


def read_steps(folder: Path) -> tuple[set[int], dict[int, float]]:
    """(steps that made no update, {step: norm of its gradient}) of a run's metrics.jsonl. Raises UserError."""
    file, skipped, norms, before = folder / "metrics.jsonl", set(), {}, 0
    try:
        text = read_text(file, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({why(error)})") from error
    try:
        for line in map(json.loads, text.splitlines()):
            if (count := line.get("skipped_steps", before)) > before:
                skipped.add(line["step"])
                before = count
            if "grad_norm" in line:
                norms[line["step"]] = line["grad_norm"]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"{file}: is not what train.py writes ({type(error).__name__}: {error})") from error
    return skipped, norms
