"""Trains a causal language model on preference pairs (or on their chosen side): arguments in, checkpoints out.

    deepspeed train.py                                     the example run: DPO on a tiny model, under a minute on CPU
    python train.py --model_name M --train_file_path D     plain python and torchrun work too
    python train.py --help                                 every setting

A run that was stopped goes on with the same command and its --output_dir, which holds all that it needs. Told to stop
(SIGTERM, SIGINT, ...) it saves what is done and exits with 75; 0 is a finished run, 2 a mistake in the input, 1
anything else.

Step k is the k-th update, from 0: its line in metrics.jsonl holds the numbers under the weights of checkpoint-k.
"""

import math
import time
from pathlib import Path

import torch

from nanodpo import progress
from nanodpo.core.losses import loss_divisor, needs_reference, pair_losses
from nanodpo.core.packing import make_batch, pair_lengths, total_tokens
from nanodpo.data.schedule import learning_rate, micro_batches_of, pairs_of_step
from nanodpo.errors import Preempted, RunStopped, exit_process, run_script
from nanodpo.figures.after import draw_run_after, is_drawn
from nanodpo.folder import checkpoint, record, state
from nanodpo.model import loading
from nanodpo.model.quantised import bits_of
from nanodpo.model.ready import freeze
from nanodpo.ranks import distributed, gpu
from nanodpo.run import lifecycle, memory, monitors
from nanodpo.run.deepspeed_settings import check_with_deepspeed
from nanodpo.run.engine import make_engine
from nanodpo.run.guards import StepGuard, check_start, guarded
from nanodpo.run.metrics import Meter, TokenMetrics, pair_metrics, peak_gib
from nanodpo.run.models import load_models
from nanodpo.run.passes import add_references, dry_run, evaluate, measure_noise, row_weights, say_unvisited
from nanodpo.run.signals import Stop
from nanodpo.run.start import Run, Start, prepare
from nanodpo.screen import command_line

SCRIPT = Path(__file__).resolve()


def main(argv: list[str]) -> None:
    with (Stop() as stop, distributed.process_restored(), distributed.lost_peers_reported(),
          gpu.nondeterminism_reported()):
        distributed.meet()
        start = prepare(argv, SCRIPT)
        if start is None:
            return  # --inspect, --print_config
        if start.finished and not start.args.dry_run:
            return complete_finished_run(start)
        with build(start, stop) as run:
            if run.args.dry_run:
                return dry_run(run)
            train(run)
            lifecycle.finish(run)
        if run.rank == 0:
            if run.args.draw:
                distributed.say(draw_run_after(run.folder))
            distributed.say(f"done: {run.folder}\nlast: {run.folder / f'checkpoint-{run.steps}'}")
            distributed.say(f"next: {command_line(SCRIPT.with_name('score.py'), run.folder)}")


def build(start: Start, stop: Stop) -> Run:
    """Joins the ranks, loads the model and makes the engine around it."""
    args = start.args
    device = distributed.join_ranks(args.local_rank, args.deterministic)
    check_with_deepspeed(start.deepspeed | start.monitors, args.deepspeed)
    rank, world = distributed.rank_and_world()
    with memory.shortage_named(rank, "loading the model"):
        model, start_hash, reference_model, reference_hash = load_models(start)
        distributed.say(loading.describe(model) + checkpoint.say_ends(model, start.source.tokenizer))
        engine, layout, attention = make_engine(model, args, start.deepspeed, device, start.longest)
    with memory.shortage_named(rank, "loading the reference"):
        frozen = reference_model and freeze(reference_model, args.bf16, device, start.longest, engine.module.parallel,
                                      start.deepspeed)
    torch.manual_seed(args.seed + rank)  # dropout's, with --allow_dropout
    return Run(**vars(start), stop=stop, start_hash=start_hash, reference_hash=reference_hash,
               reference_model=frozen, engine=engine, layout=layout, attention=attention, device=device,
               world=world, rank=rank)


def train(run: Run) -> None:
    """The folder, the references, then the steps. What is saved between steps lets a killed run go on from there."""
    args = run.args
    if args.bf16 and not run.resumed:
        run.facts["noise"] = measure_noise(run)
    saved = lifecycle.open_folder(run)
    how = "the same command" + ("" if args.output_dir else f" with --output_dir {run.folder}")
    how += "" if args.resume == "auto" else " and without --resume"
    run.stop.advice = lambda: f" after {max(run.step, saved['step'])} of {run.steps} steps; to go on: {how}"
    run.stop.defer()
    with monitors.reporting(run):  # opened before the references, which take long: a login may fail
        if needs_reference(run.loss):
            add_references(run)
        say_unvisited(run)
        run.row_weights = row_weights(run.train_set.examples, run.without_rows)
        lifecycle.go_on(run, saved)
        take_steps(run)


def take_steps(run: Run) -> None:
    """The steps that are left. Told to stop, it saves the state as before the step that was begun."""
    with progress.Progress("training", run.steps, "step", run.step) as bar:
        try:
            between_steps(run)
            while run.step < run.steps:
                with guarded(run.train_set.examples, run.stop, run.rank, f"step {run.step}") as guard:
                    line = train_step(run, guard)
                if run.step == 0 and run.ref is not None and run.starts_as_reference and not run.args.allow_dropout:
                    check_start(line, guard.reference_gap(run.ref), run.args.bf16, run.args.cache_dir)
                log_step(run, bar, line)
                run.step += 1
                between_steps(run)
        except Preempted:
            lifecycle.save_state(run)  # random numbers too
            raise


def between_steps(run: Run) -> None:
    """Evaluates and saves what is due before step `run.step`. Skips what is there already, so a run that goes on from
    this step can call it again."""
    args, last = run.args, run.step == run.steps
    run.random_states = state.random_state(run.device)
    if run.step in (0, run.steps) or (args.eval_steps and run.step % args.eval_steps == 0):
        evaluate(run)
    save = args.save_steps and run.step % args.save_steps == 0
    if not last and (save or (args.resume_steps and run.step % args.resume_steps == 0)):
        lifecycle.save_state(run)  # before the checkpoint, which can be made again from it
    if run.step and (last or save):
        lifecycle.save_checkpoint(run)


def train_step(run: Run, guard: StepGuard) -> dict[str, float]:
    """One update; returns its line of metrics.jsonl.

    Every pair of a step counts by the weight of its row, however the step is cut into micro-batches and ranks.
    """
    args, engine, examples, began = run.args, run.engine, run.train_set.examples, time.perf_counter()
    pairs = pairs_of_step(len(examples), run.pairs_per_step, args.seed, run.step, run.row_starts)  # their indices
    sides = run.trained_sides  # chosen and rejected; for SFT chosen alone
    # The loss of a step is sum(row weight * loss of the pair) / divisor. The divisor is the sum of the row weights (1
    # without a column `weight`); for sft it is the sum of row weight * scored tokens of chosen. A row of --without_rows
    # has the loss 0, but counts in the divisor: leaving it out makes no other row count for more.
    divisor = loss_divisor(args.loss, [examples[k] for k in pairs])
    rate = learning_rate(run.step, run.steps, args.learning_rate, args.warmup_steps, args.lr_scheduler_type)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate

    engine.train()
    meter = Meter(run.device)
    token_metrics = TokenMetrics(engine.module)
    engine.module.head.on_chunk = token_metrics  # the kernel calls it with each chunk of tokens
    micro_batches = micro_batches_of(pairs, args.per_device_train_batch_size, run.data_rank, run.data_world)
    for i, (indices, factor) in enumerate(guard.each(micro_batches)):  # factor 0: a repeat, see micro_batches_of
        micro_batch = [examples[k] for k in indices]
        batch, index = make_batch(micro_batch, sides, run.layout, run.device)  # [prompt | chosen | rejected] ...
        lengths = pair_lengths(micro_batch, sides, run.device)  # (P, R), in tokens: R is 2, for sft 1
        # (P, 2), computed before the first step: add_references in run/passes.py, kept by folder/reference.py.
        ref = None if run.ref is None else run.ref[indices].to(run.device, non_blocking=True)
        # DeepSpeed's engine calls SequenceLogProbs of core/logprobs.py: log pi(y|x), summed over the tokens of y.
        logps = engine(batch)[index]  # (P, R): a response that pairs of one row share is computed once
        losses = pair_losses(run.loss, logps, ref, lengths, args.sft_weight)  # (P,)
        losses = losses * run.row_weights[indices].to(run.device, non_blocking=True)
        values = pair_metrics(run.loss, logps, ref, lengths, args.beta, args.sft_weight)
        scaled = losses.detach() * (len(pairs) / divisor)  # the mean of all of them is the step's loss
        meter.add({"loss": scaled} | values | token_metrics.take(batch, index, lengths), factor)
        engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)  # tells DeepSpeed which is the last
        losses = guard.nan_where_nonfinite(indices, logps, losses)
        # DeepSpeed adds up micro-batches (configured for one a step, it does not divide) and takes the mean over all
        # ranks, each of which has a part of the sum: hence times `world`.
        engine.backward(losses.sum() * factor * (run.world / divisor))
    norm, applied = update(engine)  # not applied where a number was not finite: the whole gradient is NaN then
    means = meter.means()
    if not applied:
        skip_or_stop(run, guard.why_left_out(means, norm, pairs))
    n_tokens = total_tokens([examples[k] for k in pairs], sides)
    seconds = time.perf_counter() - began
    run.tokens += n_tokens
    return {"step": run.step, "epoch": run.step / run.steps_per_epoch, **means, "grad_norm": norm,
            "learning_rate": rate, "num_tokens": run.tokens, "skipped_steps": run.skipped,
            "perf/tokens_per_second": n_tokens / seconds, "perf/step_seconds": seconds,
            "mem/peak_gib": peak_gib(run.device)}


def update(engine) -> tuple[float, bool]:
    """Clips the gradient to --max_grad_norm, takes AdamW's step and zeroes the gradient: DeepSpeed's `step`.

    Returns (the gradient's global norm before clipping, over all ranks; whether the update was made).
    """
    if engine.zero_optimization_stage():  # 2 in ds_config.json
        engine.step()  # with check_grad_overflow it makes no update where the norm is not finite
        return float(engine.get_global_grad_norm()), engine.was_step_applied()
    # Without ZeRO DeepSpeed returns no norm, and would take a step of NaN. After the last backward pass every rank has
    # the whole gradient, so its own norm is that of all.
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms)).item()
    applied = math.isfinite(norm)
    if applied:
        engine.step()
    else:
        engine.zero_grad()
    return norm, applied


def skip_or_stop(run: Run, why: str) -> None:
    """Counts an update that was not made. Raises RunStopped beyond --skip_nonfinite of them, on all ranks."""
    if run.skipped >= run.args.skip_nonfinite:
        raise RunStopped(f"step {run.step}: {why}; no update was made")
    run.skipped += 1
    distributed.say(f"step {run.step:>5}  left out, {run.skipped} of {run.args.skip_nonfinite} allowed: {why}")


def log_step(run: Run, bar, line: dict[str, float]) -> None:
    """A line in metrics.jsonl for each step, on the screen one every --logging_steps."""
    if run.rank == 0:
        # JSON has no NaN: the line of a step that was left out lacks those values.
        lifecycle.write_line(run, {k: v for k, v in line.items() if math.isfinite(v)})
        progress.show(bar, line, line["step"] % run.args.logging_steps == 0 or line["step"] == run.steps - 1)


def complete_finished_run(start: Start) -> None:
    """Does what is missing at the end of a finished run: the merged model, the figures."""
    args, folder, steps = start.args, start.folder, start.resumed["steps"]
    distributed.leave()
    distributed.say(f"{folder}: this run is finished, all {steps} steps")
    distributed.say(f"next: {command_line(SCRIPT.with_name('score.py'), folder)}")
    if args.merge_weights and distributed.is_main() and not (folder / "merged").is_dir():
        with record.lock(folder):
            lifecycle.merge(folder, steps, args.bf16, args.trust_remote_code, bits_of(args))
    if args.draw and distributed.is_main() and not is_drawn(folder):  # it was killed while it drew, or was not to
        distributed.say(draw_run_after(folder))


def command() -> None:
    exit_process(run_script(main))


if __name__ == "__main__":
    command()
