"""Trains a causal language model on preference pairs (or on their chosen side): arguments in, checkpoints out.

    deepspeed train.py                                     the example run: DPO on a tiny model, under a minute on CPU
    python train.py --model_name M --train_file_path D     plain python and torchrun work too
    python train.py --help                                 every setting

A run that was stopped goes on with the same command: --output_dir holds all that it needs. Told to stop (SIGTERM,
SIGINT, ...) it saves what is done and exits with 75; 0 is a finished run, 2 a mistake in the input, 1 anything else.

Step k is the k-th update, from 0: its line in metrics.jsonl holds the numbers under the weights of checkpoint-k.
"""

import dataclasses
import datetime
import functools
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nanodpo import progress
from nanodpo.core.packing import LAYOUTS
from nanodpo.data import inspection
from nanodpo.data.schedule import deal, epoch_order, learning_rate, pairs_of_step
from nanodpo.data.template import prompt_leads, read_template
from nanodpo.data.tokens import DataSet, load_dataset
from nanodpo.errors import Preempted, RunStopped, UserError, leave, run_script
from nanodpo.figures.after import draw_after, is_drawn
from nanodpo.flags.arguments import TrainArguments, parse
from nanodpo.folder import checkpoint, reference, resume
from nanodpo.folder import record as identity
from nanodpo.folder import state as states
from nanodpo.folder.atomic import check_whole, flush, read_manifest, remove, writing
from nanodpo.model import loading as models
from nanodpo.model.source import Source, base_of, check_ids, open_source
from nanodpo.ranks import distributed
from nanodpo.run import agreement, metrics
from nanodpo.run import engine as engines
from nanodpo.run import memory as space
from nanodpo.run import noise as noises
from nanodpo.run.signals import Stop
from nanodpo.screen import command_line

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class Start:
    """What is known of a run before its model is loaded."""

    args: TrainArguments
    settings: dict  # DeepSpeed's
    source: Source
    train_set: DataSet
    held_out: DataSet | None
    folder: Path
    facts: dict
    old: dict | None  # the run.json of the run to go on with
    wanted: int | None  # the step to go on from, where one was asked for


@dataclasses.dataclass
class Run:
    """What the parts of a run share. `ref` and `held_ref` are (n, 2) reference log-probs, None for SFT."""

    args: TrainArguments
    stop: Stop
    folder: Path
    facts: dict  # what makes it this very run; run.json
    source: Source
    engine: object  # DeepSpeed's
    device: torch.device
    world: int
    rank: int
    layout: str  # "packed" or "plain"
    attention: str
    by_need: object  # recompute.ByNeed, or None
    train_set: DataSet
    held_out: DataSet | None
    ref: torch.Tensor | None = None
    held_ref: torch.Tensor | None = None
    step: int = 0  # updates made, skipped ones included
    tokens: int = 0  # trained on so far
    skipped: int = 0
    evaluated: set[int] = dataclasses.field(default_factory=set)  # steps whose evaluation is in metrics.jsonl
    random: dict | None = None  # random numbers as they were before this step
    lock: object = None  # an open file

    @property
    def pairs_per_step(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.world

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_set.examples) / self.pairs_per_step)

    @property
    def steps(self) -> int:
        epochs = self.args.num_train_epochs
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(round(epochs * self.steps_per_epoch, 6))  # 1.1 * 50 is a little more than 55


def main(argv: list[str]) -> None:
    with Stop() as stop:
        run_training(argv, stop)


def run_training(argv: list[str], stop: Stop) -> None:
    with distributed.lost_peers_named():
        distributed.meet()
        if start := prepare(argv):
            train_from(start, stop)


def prepare(argv: list[str]) -> Start | None:
    """What is wrong with the input is found here, before a weight is loaded or a folder made, as is what ranks were
    given that is not the same. None where nothing is to be trained."""
    with agreement.together() as same:
        args = parse(argv, HERE / "examples" / "dpo.yaml")
        same |= agreement.flags(dataclasses.asdict(args)) | agreement.program(Path(__file__), args.local_rank)
    if args.print_config:
        # A settings file, from which a run can start: what only this process was told is not part of it.
        kept = {name: value for name, value in vars(args).items() if name not in ("print_config", "local_rank")}
        distributed.say(json.dumps(kept, indent=2))
        return None
    today, old = distributed.from_main(str(datetime.date.today())), None  # one day for all ranks
    with agreement.together() as same:
        settings = engines.read_settings(args, HERE / "ds_config.json")
        distributed.check_device(args)
        source = open_start(args)
        if not args.inspect:
            folder, old, wanted = identity.find(args, f"runs/{args.loss}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
        date = (old or {}).get("date") or today  # some chat templates write it
        train, held_out, limit = load_data(inspection.lenient(args) if args.inspect else args, source, date)
        sets = [data for data in (train, held_out) if data]
        if not args.inspect:
            facts = identity.facts(args, settings, limit, sets, HERE) | {"date": date}
            if old:
                identity.check_same(folder, old, facts, early=bool(source.adapter))
            if args.loss != "sft" and not (old or {}).get("finished"):
                reference.check_writable(args.cache_dir)
            same |= agreement.inputs(args, facts, old, wanted)
    if args.inspect:
        distributed.say(inspection.inspect(train, source.tokenizer, limit, args.inspect_row, held_out))
        return None
    if old and old.get("finished"):
        return end_again(args, folder, old["steps"])
    distributed.say("\n".join(data.report() for data in sets))
    return Start(args, settings, source, train, held_out, folder, facts, old, wanted)


def train_from(start: Start, stop: Stop) -> None:
    args, source = start.args, start.source
    device = engines.start(args, start.settings)
    with agreement.together() as same, space.shortage_named(distributed.place()[0], "loading the model"):
        model = models.load_model(source, args)
        weights = models.fingerprint(model, fresh_lora=args.use_lora and not source.adapter)
        same |= {"weights that hash to": (weights, f"{weights[:8]} ({args.model_name})")}
    distributed.say(models.describe(model) + checkpoint.say_ends(model, source.tokenizer))
    with space.shortage_named(dist.get_rank(), "loading the model"):
        engine, *how = engines.build(model, args, start.settings, device, longest(start.train_set, start.held_out))
    torch.manual_seed(args.seed + dist.get_rank())  # of dropout, where it is allowed
    run = Run(args, stop, start.folder, start.facts, source, engine, device, dist.get_world_size(), dist.get_rank(),
              *how, start.train_set, start.held_out)
    if args.dry_run:
        dry_run(run)
        return
    if args.bf16 and not start.old:
        run.facts["noise"] = measure_noise(run)
    found = open_folder(run, weights, start.old, start.wanted)
    again = "the same command" + ("" if args.output_dir else f" with --output_dir {run.folder}")
    again += "" if args.resume == "auto" else " and without --resume"
    stop.outlook = lambda: f" after {run.step} of {run.steps} steps; to go on: {again}"
    stop.wait()
    add_references(run, weights)
    go_on(run, found)
    train_model(run)
    finish(run)


def open_start(args) -> Source:
    """The model or adapter to start from; a checkpoint of another run must be what that run wrote."""
    for place in filter(None, base_of(args.model_name)):
        check_whole(Path(place))
    return open_source(args.model_name, args.trust_remote_code)


def load_data(args, source, date: str | None = None):
    """(training set, held-out set or None, the longest sequence allowed in tokens). `date`: of the run, ISO."""
    template = read_template(source.tokenizer, args.assistant_header, date)
    context = source.context or sys.maxsize
    limit = args.max_length or context
    if limit > context:
        raise UserError(f"--max_length {limit}: the model's context is {context} tokens (max_position_embeddings)")
    pairs = args.loss != "sft"
    train = load_dataset(args.train_file_path, template, args, limit, pairs)
    check_ids(source, train.path, train.examples)
    if args.eval_file_path:
        held_out = load_dataset(args.eval_file_path, template, args, limit, pairs)
        check_ids(source, held_out.path, held_out.examples)
        return train, held_out, limit
    if not args.eval_size:
        return train, None, limit
    n = len(train.examples)
    if args.eval_size >= n:
        raise UserError(f"--eval_size {args.eval_size}: {args.train_file_path} has {n} usable row{'s' * (n > 1)}")
    held = set(epoch_order(n, args.seed, -1)[: args.eval_size])
    held_out = DataSet(f"{args.eval_size} rows of {train.path}", [train.examples[i] for i in sorted(held)], [], {}, [])
    train.examples, train.held_out = [e for i, e in enumerate(train.examples) if i not in held], args.eval_size
    return train, held_out, limit


def longest(*sets: DataSet | None) -> int:
    """Tokens of the longest [prompt | response]."""
    return max(example.length for data in sets if data for example in data.examples)


def open_folder(run: Run, weights: str, old: dict | None, wanted: int | None) -> dict:
    """Makes the run's folder, or goes back in it to where the run can go on; returns the facts of that state.

    A new folder has run.json, dropped_rows.jsonl and checkpoint-0, the starting point.
    """
    # An adapter that is trained on has written its settings into the arguments.
    run.facts |= {"arguments": identity.arguments(run.args), "steps": run.steps, "layout": run.layout,
                  "attention": run.attention, "weights": weights, "device": distributed.device_name(run.device),
                  "held_out_rows": [e.row for e in run.held_out.examples] if run.args.eval_size else None,
                  "prompt_leads": prompt_leads(read_template(run.source.tokenizer, run.args.assistant_header),
                                               [example.prompt for example in run.train_set.examples])}
    with agreement.together() as same:
        same |= {name: run.facts[name] for name in ("layout", "attention")}
        same |= agreement.flags(run.facts["arguments"])
    found = {"step": 0}
    dropped = [row for data in (run.train_set, run.held_out) if data for row in data.dropped]
    with distributed.main_first():
        if distributed.is_main():
            if old:
                identity.check_same(run.folder, old, run.facts)
            else:
                space.check_disk(run.folder, disk_needed(run))
                run.folder = run.folder if run.args.output_dir else identity.take(run.folder)
                identity.create(run.folder, run.facts)
            run.lock = identity.lock(run.folder)
            identity.list_dropped(run.folder, dropped)
            if old:
                space.check_disk(run.folder, disk_needed(run))  # now that nobody else writes, and no partials are left
                if changed := identity.changed_machine(old, run.facts):
                    distributed.say(f"resume: the last bits may differ, since another machine goes on ({changed})")
                found, run.evaluated = resume.begin(run.folder, run.steps, run.world, wanted)
                checkpoint.rotate(run.folder, run.args.save_total_limit)  # where a kill came between
    if not run.args.output_dir and not old:
        run.folder = Path(distributed.from_main(str(run.folder)))  # ranks may have read the clock in different seconds
    check_shared(run)
    found = distributed.from_main(found)
    run.evaluated = distributed.from_main(run.evaluated)
    going = f", going on at step {found['step']}" if old else ""
    epochs = f"{run.steps / run.steps_per_epoch:.3g} epochs"
    distributed.say(f"run: {run.folder}, {run.steps} steps of {run.pairs_per_step} pairs, {epochs}{going}")
    if (warmup := run.args.warmup_steps) > run.steps:
        distributed.say(f"--warmup_steps {warmup}: more than the run has; it ends at {run.steps / warmup:.0%} of "
                        "--learning_rate")
    save_checkpoint(run)  # the engine holds the starting point until it goes on: a damaged one is made again
    return found


def check_shared(run: Run) -> None:
    """Raises UserError where a rank does not find in its folder, whatever the name, what rank 0 wrote into it."""
    record = run.folder / "run.json"
    seen = record.read_bytes() if record.is_file() else None
    error = UserError(f"--output_dir {run.folder}: rank {run.rank} does not see what rank 0 wrote there; it must be a "
                      "folder that all machines share")
    distributed.agree(None if seen == distributed.from_main(seen) else error)


def go_on(run: Run, found: dict) -> None:
    """Puts the state into the engine, which until now held the starting point, the reference of some runs."""
    run.step, run.tokens, run.skipped = found["step"], found.get("tokens", 0), found.get("skipped", 0)
    if run.step == 0 or found.get("complete"):
        return
    replicated = run.engine.zero_optimization_stage() == 0
    tensors, random = resume.load(run.folder, run.step, run.rank, replicated)
    states.restore(run.engine, tensors)
    states.restore_random(random, run.device)
    for name in states.COUNTERS:
        setattr(run.engine, name, found[name])


def disk_needed(run: Run) -> dict[str, int]:
    return space.disk_needed(run.engine.module.model, run.args, run.source.tokenizer, run.steps)


def dry_run(run: Run) -> None:
    """The longest micro-batch forward, backward and an update, with nothing written; says what the run will take."""
    examples = run.train_set.examples
    order = sorted(range(len(examples)), key=lambda i: -count_tokens(run, examples[i]))
    rows = order[: run.args.per_device_train_batch_size]
    distributed.say(f"dry run on {space.describe([examples[i] for i in rows])}")
    began = time.perf_counter()
    ref = None if run.args.loss == "sft" else torch.zeros(len(examples), 2, dtype=torch.float64)
    run.engine.train()
    with shortage_named(run, run.train_set, rows, "the dry run"):
        losses = losses_of(run, run.train_set, ref, rows, 1.0, metrics.Meter(run.device), gradient=True)
        run.engine.set_gradient_accumulation_boundary(True)
        run.engine.backward(losses.mean(), scale_wrt_gas=False)
        run.engine.step()
    peaks = distributed.agree(None, metrics.peak_gib(run.device))
    distributed.say(space.estimate(run.engine, run.device, states.shards(run.engine), peaks,
                                   time.perf_counter() - began, disk_needed(run)))


def measure_noise(run: Run) -> dict[str, float]:
    """What rounding does to a pair's numbers, by metric; see nanodpo/run/noise.py."""
    examples, args = run.train_set.examples, run.args
    sides = ["chosen"] if examples[0].rejected is None else ["chosen", "rejected"]
    pairs = pairs_of_step(len(examples), noises.count(run.steps * run.pairs_per_step), args.seed, 0)
    batches = deal(pairs, args.per_device_train_batch_size, run.rank, run.world)
    with shortage_named(run, run.train_set, pairs, "measuring what rounding does"):
        found = noises.measure(
            run.engine, run.engine.module.model, lambda indices: score(run, run.train_set, indices, sides), batches,
            lambda indices: torch.tensor([[len(getattr(examples[i], side)) for side in sides] for i in indices]),
            None if args.loss == "sft" else args.beta)
    distributed.say(noises.describe(found, run.pairs_per_step))
    return found


def add_references(run: Run, weights: str) -> None:
    """Fills run.ref and run.held_ref: log-probs under the policy as it is now, before the first step."""
    if run.args.loss == "sft":
        return
    n, batch = len(run.train_set.examples), run.args.per_device_train_batch_size
    # The micro-batches are those of training's first epoch: at step 0 policy and reference agree to the last bit.
    steps = [pairs_of_step(n, run.pairs_per_step, run.args.seed, step)
             for step in range(min(run.steps, run.steps_per_epoch))]
    run.ref = references_of(run, run.train_set, steps, batch, weights)
    if run.held_out:
        batch = run.args.per_device_eval_batch_size
        run.held_ref = references_of(run, run.held_out, eval_steps(run), batch, weights)


def references_of(run: Run, data: DataSet, steps: list[list[int]], batch: int, weights: str) -> torch.Tensor:
    """(n, 2): from the cache, where everything that could change a number is as it was; else computed."""
    args = run.args
    fingerprint = {"model_name": args.model_name, "data_path": data.path, "weights": weights, "bf16": args.bf16,
                   "data": reference.data_hash(data.examples), "layout": run.layout, "attention": run.attention,
                   # Stage 3 multiplies matrices by code of its own, which rounds otherwise.
                   "zero": run.engine.zero_optimization_stage(), "device": distributed.device_name(run.device),
                   "versions": identity.versions()}
    if args.bf16:  # its rounding depends on what else is in the micro-batch
        fingerprint |= {"batches": [args.seed, batch, len(steps[0])]}
    with models.reference_policy(run.engine.module.model, fresh_lora=args.use_lora and not run.source.adapter):
        return reference.reference_logps(
            data.examples, steps, lambda pairs: deal(pairs, batch, run.rank, run.world),
            functools.partial(score_reference, run, data), fingerprint, args.cache_dir, run.device, run.stop.check)


def score_reference(run: Run, data: DataSet, indices: list[int]) -> torch.Tensor:
    with shortage_named(run, data, indices, "the reference pass"):
        return score(run, data, indices, ["chosen", "rejected"])


def eval_steps(run: Run) -> list[list[int]]:
    """The held-out pairs in order, as many at a time as all ranks take in one micro-batch."""
    n, size = len(run.held_out.examples), run.args.per_device_eval_batch_size * run.world
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


def score(run: Run, data: DataSet, indices: list[int], sides: list[str], gradient: bool = False) -> torch.Tensor:
    """(P, R) summed log-probs of these sides of these examples, nats: the only forward pass there is."""
    examples = [data.examples[i] for i in indices]
    row = LAYOUTS[run.layout]([(e.prompt, [getattr(e, side) for side in sides]) for e in examples])
    row = (row.pin() if run.device.type == "cuda" else row).to(run.device)
    if gradient and run.by_need:
        run.by_need(row.input_ids.numel())
    with torch.set_grad_enabled(gradient):
        return run.engine(row).view(len(indices), len(sides))


def train_model(run: Run) -> None:
    """The loop. Every step begins where the one before it could have been killed."""
    with progress.Progress("training", run.steps, "step", run.step) as bar:
        try:
            while True:
                between_steps(run)
                if run.step == run.steps:
                    break
                train_step(run, bar)
                run.step += 1
        except Preempted:
            save_state(run)  # the gradients of the step that was begun go; what was drawn for it comes again
            raise


def between_steps(run: Run) -> None:
    """Evaluates and saves what is due before step `run.step`. What is there already stays, so a run that goes on from
    this step calls it again."""
    args, last = run.args, run.step == run.steps
    run.random = states.random_state(run.device)
    if run.step in (0, run.steps) or (args.eval_steps and run.step % args.eval_steps == 0):
        evaluate(run)
    save = args.save_steps and run.step % args.save_steps == 0
    if not last and (save or (args.resume_steps and run.step % args.resume_steps == 0)):
        save_state(run)  # first: a checkpoint can be made again from it, but not the other way round
    if run.step and (last or save):
        save_checkpoint(run)


def train_step(run: Run, bar) -> None:
    """One update. Every pair of a step weighs the same, however the step is cut into micro-batches and ranks."""
    args, engine, step, began = run.args, run.engine, run.step, time.perf_counter()
    pairs = pairs_of_step(len(run.train_set.examples), run.pairs_per_step, args.seed, step)
    rate = learning_rate(step, run.steps, args.learning_rate, args.warmup_steps, args.lr_scheduler_type)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate

    engine.train()
    meter = metrics.Meter(run.device)
    batches = deal(pairs, args.per_device_train_batch_size, run.rank, run.world)
    # The step's loss is the sum over all its pairs / divisor. DeepSpeed averages over ranks, hence world.
    share = run.world / divisor(run, run.train_set, pairs)
    for i, (indices, weight) in enumerate(batches):
        run.stop.ask()
        last = i == len(batches) - 1
        with shortage_named(run, run.train_set, indices):
            losses = losses_of(run, run.train_set, run.ref, indices, weight, meter, gradient=True)
            run.stop.hear()  # the answer came in the meantime
            if last:
                means = step_means(run, run.train_set, pairs, meter)
                if wrong := check_numbers(run, pairs, means, meter):
                    share = math.nan  # makes this gradient one that DeepSpeed discards as a whole
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(losses.sum() * weight * share, scale_wrt_gas=False)

    with shortage_named(run):
        norm, applied = engines.take_step(engine)
    if not applied:
        why = f"the gradient is not finite (norm {norm})" if not math.isfinite(norm) else "DeepSpeed skipped the update"
        skip_or_stop(run, wrong or f"{why}; {space.describe([run.train_set.examples[k] for k in pairs])}")
    new = sum(count_tokens(run, run.train_set.examples[k]) for k in pairs)
    run.tokens += new
    line = {"step": step, "epoch": step / run.steps_per_epoch, **means, "grad_norm": norm, "learning_rate": rate,
            "num_tokens": run.tokens, "skipped_steps": run.skipped}
    log_step(run, bar, line, new, time.perf_counter() - began)


def shortage_named(run: Run, data: DataSet | None = None, indices=(), where: str | None = None):
    rows = (lambda: space.describe([data.examples[i] for i in indices])) if data else None
    return space.shortage_named(run.rank, where or f"step {run.step}", rows)


def losses_of(run: Run, data, ref, indices: list[int], weight: float, meter, gradient: bool):
    """(P,) losses of one micro-batch; its values go into the meter."""
    # SFT trains on chosen alone, but evaluation follows both where the data has both.
    one_side = data.examples[0].rejected is None or (gradient and run.args.loss == "sft")
    sides = ["chosen"] if one_side else ["chosen", "rejected"]
    counts = [[len(getattr(data.examples[i], side)) for side in sides] for i in indices]
    tokens = torch.tensor(counts, dtype=torch.float64).to(run.device, non_blocking=True)
    ref = None if ref is None else ref[indices].to(run.device, non_blocking=True)
    # An evaluation at step 0 asks for what the references are.
    known = run.step == 0 and ref is not None and not gradient
    logps = ref if known else score(run, data, indices, sides, gradient)
    losses, values = metrics.pair_values(logps, tokens, ref, run.args)
    meter.add({"loss": losses.detach(), **values}, weight)
    meter.watch(indices, torch.cat([logps.detach(), losses.detach()[:, None]], 1))
    return losses


def divisor(run: Run, data, pairs: list[int]) -> int:
    """What a step's summed loss is divided by: its pairs, or for SFT its scored tokens. Over all ranks."""
    return sum(len(data.examples[i].chosen) for i in pairs) if run.args.loss == "sft" else len(pairs)


def step_means(run: Run, data, pairs: list[int], meter) -> dict[str, float]:
    means = meter.means()
    means["loss"] *= len(pairs) / divisor(run, data, pairs)  # Meter divided by the pairs
    return means


def count_tokens(run: Run, example) -> int:
    sides = [example.chosen] if run.args.loss == "sft" else [example.chosen, example.rejected]
    return len(example.prompt) + sum(map(len, sides))


def check_numbers(run: Run, pairs: list[int], means: dict, meter) -> str | None:
    """What is not finite in this step, in words, on all ranks and before the update; None where all is well.

    Raises RunStopped where that can't be passed over, and at step 0 where the policy isn't its reference.
    """
    gap = means.pop("ref_gap", 0.0)
    if bad := [name for name, value in means.items() if not math.isfinite(value)]:
        wrong = f"{', '.join(bad)} not finite; {name_rows(run, meter)}"
        if run.skipped >= run.args.skip_nonfinite:
            raise RunStopped(f"step {run.step}: {wrong}; no update was made")
        return wrong
    # Policy and reference are one model now, and their micro-batches are the same.
    unequal = gap > (1e-3 if run.args.bf16 else 1e-4) or abs(means.get("rewards/margins", 0.0)) > 0.01
    if run.step == 0 and unequal and not run.args.allow_dropout:
        raise RunStopped(
            f"step 0: policy and reference should be equal, but their log-probs differ by {gap:.2g} nats a token (loss "
            f"{means['loss']:.4f}, rewards/margins {means['rewards/margins']:.4f}). Likely causes: dropout, a cache of "
            f"other weights' references (empty {run.args.cache_dir}), an adapter that was already trained, another "
            "attention")
    return None


def name_rows(run: Run, meter) -> str:
    """The rows of all ranks that went wrong, with their lengths and the side."""
    wrong = {i: side for found in distributed.agree(None, meter.wrong()) for i, side in found.items()}
    sides = {("chosen", "rejected", "loss")[k] for row in wrong.values() for k in row}
    return f"{space.describe([run.train_set.examples[i] for i in sorted(wrong)])} in {', '.join(sorted(sides))}"


def skip_or_stop(run: Run, why: str) -> None:
    """Counts an update that was not made. Raises RunStopped beyond --skip_nonfinite of them, on all ranks."""
    if run.skipped >= run.args.skip_nonfinite:
        raise RunStopped(f"step {run.step}: {why}; no update was made")
    run.skipped += 1
    distributed.say(f"step {run.step:>5}  left out, {run.skipped} of {run.args.skip_nonfinite} allowed: {why}")


def evaluate(run: Run) -> None:
    """Means over the held-out set under the weights of checkpoint-`run.step`, into metrics.jsonl as eval_*.

    At step 0 the references are the policy's log-probs: no pass is made for what one has just found.
    """
    step = run.step
    if run.held_out is None or step in run.evaluated:
        return
    run.engine.eval()
    meter = metrics.Meter(run.device)
    for pairs in progress.track(eval_steps(run), "evaluation", "batch"):
        run.stop.check()
        for indices, weight in deal(pairs, run.args.per_device_eval_batch_size, run.rank, run.world):
            with shortage_named(run, run.held_out, indices):
                losses_of(run, run.held_out, run.held_ref, indices, weight, meter, gradient=False)
    means = step_means(run, run.held_out, list(range(len(run.held_out.examples))), meter)
    means.pop("ref_gap", None)
    if bad := [name for name, value in means.items() if not math.isfinite(value)]:
        raise RunStopped(f"evaluation under checkpoint-{step}: {', '.join(bad)} not finite")
    if distributed.is_main():
        line = {"step": step, "epoch": step / run.steps_per_epoch} | {f"eval_{name}": v for name, v in means.items()}
        write_line(run, line)
    distributed.say(f"step {step:>5}  held out: {progress.summary(means)}")


def log_step(run: Run, bar, line: dict, tokens: int, seconds: float) -> None:
    """One line in metrics.jsonl a step; on the screen one every logging_steps."""
    line |= {"perf/tokens_per_second": tokens / seconds, "perf/step_seconds": seconds,
             "mem/peak_gib": metrics.peak_gib(run.device)}
    if run.rank == 0:
        # JSON has no word for what is not finite: a step that was left out lacks those values.
        write_line(run, {k: v for k, v in line.items() if math.isfinite(v)})
        progress.show(bar, line, line["step"] % run.args.logging_steps == 0 or line["step"] == run.steps - 1)


def write_line(run: Run, line: dict) -> None:
    identity.check_held(run.folder, run.lock)
    metrics.write_line(run.folder / "metrics.jsonl", line)


def save_checkpoint(run: Run) -> None:
    """checkpoint-<step>: adapter or model, and tokenizer. All ranks gather, the first writes."""
    folder, model = run.folder / f"checkpoint-{run.step}", run.engine.module.model
    if distributed.from_main(distributed.is_main() and isinstance(read_manifest(folder), dict)):
        return
    engines.settle(run.engine)
    tensors = checkpoint.gather(model, only_trained=run.args.use_lora)
    with distributed.main_first():
        if distributed.is_main():
            identity.check_held(run.folder, run.lock)
            if run.step > run.skipped and run.args.learning_rate > 0:
                checkpoint.check_trained(tensors)
            if run.step:  # a last checkpoint says that all steps are there
                with writing(run.folder / "metrics.jsonl"):
                    flush(run.folder / "metrics.jsonl")
            checkpoint.save(model, run.source.tokenizer, tensors, folder, {"step": run.step, **mark(run)})
            checkpoint.rotate(run.folder, run.args.save_total_limit)


def save_state(run: Run) -> None:
    """What it takes to go on from `run.step`, on every rank; nothing before the first step."""
    if run.step == 0 or distributed.from_main(resume.folder_of(run.folder, run.step).is_dir()):
        return
    tensors = run.random
    if run.rank == 0 or run.engine.zero_optimization_stage():  # else rank 0 has the same
        tensors = tensors | states.weights_and_moments(run.engine)
    facts = {"tokens": run.tokens, "skipped": run.skipped} | {n: getattr(run.engine, n) for n in states.COUNTERS}
    resume.save(run.folder, run.step, tensors, facts | mark(run), run.rank)


def mark(run: Run) -> dict:
    """Tells whose a checkpoint is."""
    return {"world_size": run.world, "run": identity.fingerprint(run.facts)}


def finish(run: Run) -> None:
    """Leaves the other ranks, merges where asked, and says where everything is."""
    if run.args.merge_weights:
        run.stop.check()  # takes long, and can be done later; all else is as quickly done as stopped
    run.stop.wait(False)
    distributed.leave()  # merging a large model outlasts a collective's patience
    if run.rank != 0:
        return
    identity.check_held(run.folder, run.lock)
    if run.args.merge_weights:
        merge(run.args, run.folder, run.steps)
    remove(run.folder / "resume")  # large, and a finished run has nowhere to go on to
    identity.finish(run.folder)
    if run.args.draw:
        distributed.say(draw_after(run.folder))
    distributed.say(f"done: {run.folder}\nlast: {run.folder / f'checkpoint-{run.steps}'}")
    distributed.say(f"next: {command_line(HERE / 'score.py', run.folder)}")


def end_again(args: TrainArguments, folder: Path, steps: int) -> None:
    """What is left to do for a run that is finished."""
    distributed.leave()
    distributed.say(f"{folder}: this run is finished, all {steps} steps")
    distributed.say(f"next: {command_line(HERE / 'score.py', folder)}")
    if args.merge_weights and distributed.is_main() and not (folder / "merged").is_dir():
        merge(args, folder, steps)
    if args.draw and distributed.is_main() and not is_drawn(folder):  # it was killed while it drew, or was not to
        distributed.say(draw_after(folder))


def merge(args: TrainArguments, folder: Path, steps: int) -> None:
    """Leaves the last checkpoint's adapter merged into its base, a model like any other, in merged/."""
    def check(model, base):
        models.check_base(models.base_hashes(model), base, identity.read(folder), folder)

    dtype, last = torch.bfloat16 if args.bf16 else torch.float32, folder / f"checkpoint-{steps}"
    check_whole(last)
    checkpoint.merge(last, folder / "merged", dtype, args.trust_remote_code, check)
    distributed.say(f"merged: {folder / 'merged'}")


if __name__ == "__main__":
    leave(run_script(main))
