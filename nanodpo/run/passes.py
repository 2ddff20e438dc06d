"""Passes over data without an update: the reference's, evaluations, one that measures rounding, a dry run."""

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Sequence

import torch

from .. import progress
from ..core.losses import loss_divisor, needs_reference, pair_losses
from ..core.packing import LAYOUTS, groups_of, make_batch, pair_lengths, total_tokens
from ..data.example import SIDES, Example
from ..data.schedule import micro_batches_of, pairs_of_step
from ..data.tokens import DataSet
from ..errors import RunStopped
from ..folder import fork, record, reference, state
from ..model.loading import reference_policy
from ..model.ready import response_logps
from ..model.sharding import is_sharded, let_go
from ..ranks import distributed
from ..screen import folded
from . import memory, metrics, noise
from .guards import StepGuard, nonfinite
from .lifecycle import disk_needed, write_line
from .start import Run


def logps_of(run: Run, examples: list[Example], sides: Sequence[str], where: str, model=None,
            layout: str = "") -> torch.Tensor:
    """(P, R) summed log-probs of these sides, nats, without gradients. Raises RankStopped, which names the rows, where
    the memory is too small; `where` names the pass. `model`: a SequenceLogProbs with its layout, in place of the
    policy."""
    with memory.shortage_named(run.rank, where, lambda: memory.describe(examples)):
        return response_logps(model or run.engine, examples, sides, layout or run.layout, run.device)


def row_weights(examples: list[Example], without: frozenset[int] = frozenset()) -> torch.Tensor:
    """(n,) float64: how much each pair counts in the loss, the weight of its row in the data.

    It is 0 for the rows `without`, those of --without_rows. What a step's loss is divided by still counts them, so that
    leaving them out changes no other pair's term (counterfactual SGD, arXiv 1906.08473).
    """
    weights = [0.0 if example.row in without else example.weight for example in examples]
    return torch.tensor(weights, dtype=torch.float64)


def say_unvisited(run: Run) -> None:
    """Names the rows of --without_rows that no step visits: of a fork, no step from its first one on. Leaving them out
    changes nothing."""
    if not run.without_rows:
        return
    first, examples = fork.first_step_with("--without_rows", run.facts), run.train_set.examples
    steps = range(first, min(run.steps, first + 2 * run.steps_per_epoch))  # the rest of an epoch, and a whole one
    visited = {examples[i].row for step in steps
               for i in pairs_of_step(len(examples), run.pairs_per_step, run.args.seed, step, run.row_starts)}
    if unvisited := sorted(run.without_rows - visited):
        rows = ", ".join(map(str, unvisited[:16])) + ", ..." * (len(unvisited) > 16)
        where = f"steps {first} to {run.steps - 1}" if first else f"the {run.steps} steps"
        distributed.say(folded(f"--without_rows: row {rows}: not among those that {where} of this run visit, so "
                               "leaving it out changes nothing"))


def add_references(run: Run) -> None:
    """Sets run.ref and run.held_ref, (n, 2) log-probs under the reference, nats. It is the policy before the first
    step, or the model of --reference, which is gone afterwards."""
    args = run.args
    own = f"{args.model_name}, {'without the new adapter' if run.adapter_off else 'as the run begins with it'}"
    distributed.say(folded(f"reference: {args.reference or own}"))
    _compute_references(run)
    _free_reference(run)


def _free_reference(run: Run) -> None:
    """Frees the memory of the model of --reference. Nobody may hold it but the run."""
    if run.reference_model is not None:
        let_go(run.reference_model[0])
        run.reference_model = None
        gc.collect()  # its parts refer to each other
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _open_reference(run: Run):
    """Yields the reference: (engine or SequenceLogProbs, layout, attention, ZeRO stage). Every rank has that of
    --reference whole, but under stage 3."""
    if run.reference_model is None:
        with reference_policy(run.engine.module.model, run.adapter_off):
            yield run.engine, run.layout, run.attention, run.engine.zero_optimization_stage()
        return
    yield *run.reference_model, 3 if is_sharded(run.reference_model[0]) else 0


def _compute_references(run: Run) -> None:
    """A separate function: when it returns, only the run still holds the model of --reference, which can then be freed.
    """
    n, batch = len(run.train_set.examples), run.args.per_device_train_batch_size
    # The micro-batches are those of training's first epoch: at step 0 policy and reference agree to the last bit.
    steps = [pairs_of_step(n, run.pairs_per_step, run.args.seed, step, run.row_starts)
             for step in range(min(run.steps, run.steps_per_epoch))]
    settings = run.facts["arguments"]  # with full paths, so that a run from another folder, or a fork, finds them
    with _open_reference(run) as opened:
        run.ref = _reference_logps(run, opened, run.train_set, settings["train_file_path"], steps, batch)
        if run.held_out:
            batch = run.args.per_device_eval_batch_size
            steps = eval_batches(len(run.held_out.examples), batch * run.data_world)
            name = settings["eval_file_path"] or [settings["train_file_path"], run.args.eval_size]
            run.held_ref = _reference_logps(run, opened, run.held_out, name, steps, batch)


def _reference_logps(run: Run, opened: tuple, data: DataSet, name, steps: list[list[int]], batch: int) -> torch.Tensor:
    """(n, 2) log-probs, nats: from the cache where nothing that could change a number has changed, else computed.
    `opened` is from `_open_reference`; `name` tells the data set from others."""
    args, settings, (model, layout, attention, stage) = run.args, run.facts["arguments"], opened
    fingerprint = {"model_name": settings["reference"] or settings["model_name"], "data_path": name,
                   "weights": run.reference_hash or run.start_hash, "bf16": args.bf16,
                   "data": reference.token_hash(data.examples), "layout": layout, "attention": attention,
                   "log-softmax": "of logits minus the largest",  # names a way to compute: an earlier one rounded more
                   # Stage 3 has matrix products of its own, which round differently.
                   "zero": stage, "device": distributed.device_name(run.device), "versions": record.versions()}
    if run.device.type == "cuda":
        # The text names a way to compute: earlier ones rounded differently.
        how = "norms in one pass, sums in float32, positions and the sum with LoRA rounded once"
        fingerprint |= {"on a GPU": [how, args.deterministic]}
    if args.sequence_parallel_size > 1:  # products of parts of a batch round differently, too
        fingerprint |= {"ranks that share a batch": args.sequence_parallel_size}
    if run.device.type == "cpu" and (threads := torch.get_num_threads()) > 1:  # as do parts of a product
        fingerprint |= {"threads": threads}
    if args.bf16 or run.device.type == "cuda" or not _rounds_row_by_row(model, layout):
        # Here a number depends on which pairs share its micro-batch. The number of ranks does not matter: a step is cut
        # into micro-batches before ranks share them. Training shuffles the pairs, an evaluation takes them in order.
        n = len(data.examples)
        order = [args.seed, batch, len(steps[0])] if data is run.train_set else ["in order", min(batch, n)]
        fingerprint |= {"batches": order}

    def score(indices):
        return logps_of(run, [data.examples[i] for i in indices], SIDES, "the reference pass", model, layout)

    def own_micro_batches(pairs):  # ranks that share a batch have the same log-probs: the first one's count
        is_first = run.engine.module.parallel.rank == 0
        return [(indices, factor * is_first) for indices, factor in
                micro_batches_of(pairs, batch, run.data_rank, run.data_world)]

    return reference.reference_logps(data.examples, steps, own_micro_batches, score, fingerprint, args.cache_dir,
                                     run.device, run.stop.check)


def _rounds_row_by_row(model, layout: str) -> bool:
    """Whether a CPU's float32 gives a pair the same bits whatever else is in its micro-batch: in the packed layout
    alone, since sums over a row of attention are split by its width, padding included; not with experts, whose
    products go by how many tokens came to them; and not with several threads, which share a product by its size."""
    one_by_one = layout == "packed" and torch.get_num_threads() == 1
    return one_by_one and not any("experts" in name.rpartition(".")[2] for name, _ in model.named_modules())


def eval_batches(n: int, size: int) -> list[list[int]]:
    """The indices of n held-out pairs in order, `size` at a time: a micro-batch of every rank."""
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


def evaluate(run: Run) -> None:
    """Means over the held-out set under the weights of checkpoint-`run.step`, into metrics.jsonl as eval_*.

    SFT follows both sides where the data has both. At step 0, where the policy is its reference, whose log-probs were
    just computed, no second pass is made.
    """
    args, step = run.args, run.step
    if run.held_out is None or step in run.evaluated:
        return
    run.engine.eval()
    examples, meter = run.held_out.examples, metrics.Meter(run.device)
    guard = StepGuard(examples, run.stop)
    token_metrics = metrics.TokenMetrics(run.engine.module, needs_logits=True)
    run.engine.module.head.on_chunk = token_metrics
    sides, trained = run.held_out.sides, len(run.trained_sides)
    divisor = loss_divisor(args.loss, examples)
    batches = eval_batches(len(examples), args.per_device_eval_batch_size * run.data_world)
    for pairs in progress.track(batches, "evaluation", "batch"):
        run.stop.check()
        for indices, factor in micro_batches_of(pairs, args.per_device_eval_batch_size, run.data_rank, run.data_world):
            micro_batch = [examples[k] for k in indices]
            lengths = pair_lengths(micro_batch, sides, run.device)
            ref = None if run.held_ref is None else run.held_ref[indices].to(run.device, non_blocking=True)
            if step == 0 and ref is not None and run.starts_as_reference:
                logps, of_tokens = ref, {}
            else:
                batch, index = make_batch(micro_batch, sides, run.layout, run.device)
                rows = functools.partial(memory.describe, micro_batch)
                with memory.shortage_named(run.rank, f"step {step}", rows), torch.no_grad():
                    logps = run.engine(batch)[index]
                of_tokens = token_metrics.take(batch, index[:, :trained], lengths[:, :trained])
            losses = pair_losses(run.loss, logps, ref, lengths, args.sft_weight)
            guard.nan_where_nonfinite(indices, logps, losses)  # remembers them
            losses = losses * row_weights(micro_batch).to(run.device, non_blocking=True)
            values = metrics.pair_metrics(run.loss, logps, ref, lengths, args.beta, args.sft_weight)
            parts = losses * (len(examples) / divisor)  # as in train_step
            meter.add({"loss": parts} | values | of_tokens, factor)
    means = meter.means()
    if bad := nonfinite(means):
        rows = guard.nonfinite_rows()  # none, where a loss of one's own has a slope alone that is not finite
        raise RunStopped(f"evaluation under checkpoint-{step}: {bad} not finite" + f"; {rows}" * bool(rows))
    if distributed.is_main():
        line = {"step": step, "epoch": step / run.steps_per_epoch} | {f"eval_{name}": v for name, v in means.items()}
        write_line(run, line)
    distributed.say(f"step {step:>5}  held out: {progress.summary(means)}")


def measure_noise(run: Run) -> dict[str, float]:
    """How much bfloat16's rounding changes one pair's numbers: a standard deviation, nats, by metric; see noise.py."""
    examples, args = run.train_set.examples, run.args
    sides = run.train_set.sides
    pairs = pairs_of_step(len(examples), noise.count(run.steps * run.pairs_per_step), args.seed, 0, run.row_starts)

    def score(indices):
        return logps_of(run, [examples[i] for i in indices], sides, "measuring rounding")

    def lengths(indices):
        return pair_lengths([examples[i] for i in indices], sides)

    batches = micro_batches_of(pairs, args.per_device_train_batch_size, run.data_rank, run.data_world)
    result = noise.measure(run.engine, score, batches, lengths, args.beta if needs_reference(run.loss) else None)
    distributed.say(noise.describe(result, run.pairs_per_step))
    return result


def dry_run(run: Run) -> None:
    """Runs the longest micro-batch forward and backward, with updates, and prints memory, time and disk. Writes
    nothing.
    """
    args, sides = run.args, run.trained_sides
    longest = sorted(run.train_set.examples, key=lambda example: -total_tokens([example], sides))
    examples = longest[: args.per_device_train_batch_size]
    groups = [groups_of([example], sides)[0][0] for example in examples]  # nothing shared: no micro-batch takes more
    shared = f", which {args.sequence_parallel_size} ranks share" if args.sequence_parallel_size > 1 else ""
    distributed.say(f"dry run on {memory.describe(examples)}{shared}")
    ref = _logps_of_reference(run, examples) if needs_reference(run.loss) else None
    size = memory.weight_bytes(run.reference_model[0]) if run.reference_model else 0
    _free_reference(run)
    run.engine.train()

    def mean_loss():
        logps = run.engine(LAYOUTS[run.layout](groups).to(run.device)).view(len(groups), -1)
        lengths = pair_lengths(examples, sides, run.device)
        return pair_losses(run.loss, logps, ref, lengths, args.sft_weight).mean()

    with memory.shortage_named(run.rank, "the dry run", lambda: memory.describe(examples)):
        seconds = two_steps(run.engine, mean_loss, args.gradient_accumulation_steps > 1, run.device)
    peaks = distributed.gather_or_raise(None, metrics.peak_gib(run.device))
    distributed.say(memory.estimate(run.engine, run.device, state.shards(run.engine), peaks, seconds,
                                    disk_needed(run), size))


def two_steps(engine, mean_loss: Callable[[], torch.Tensor], accumulates: bool, device: torch.device) -> float:
    """Two updates, the second of two micro-batches where a step accumulates some. Returns the seconds of the last one,
    of a GPU with all work that it was given.

    A run's first micro-batch has the GPU for itself: AdamW's moments are made by the first update, and before it
    there is no gradient of an earlier micro-batch.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    for last in (True, *[False] * accumulates, True):
        wait(device)
        began = time.perf_counter()
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(mean_loss())
        if last:
            engine.step()
    wait(device)
    return time.perf_counter() - began


def _logps_of_reference(run: Run, examples: list[Example]) -> torch.Tensor:
    """(P, 2) log-probs of these pairs under the reference, nats."""
    with _open_reference(run) as (model, layout, *_):
        return logps_of(run, examples, SIDES, "the reference's dry run", model, layout).to(run.device)
