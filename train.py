"""Trains a causal language model on preference pairs (or on their chosen side): arguments in, checkpoints out.

    deepspeed train.py                                     the example run: DPO on a tiny model, under a minute on CPU
    python train.py --model_name M --train_file_path D     plain python and torchrun work too
    python train.py --help                                 every setting

Step k is the k-th update, from 0: its line in metrics.jsonl holds the numbers under the weights of checkpoint-k.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanodpo import checkpoint, distributed, inspection, metrics, models, reference
from nanodpo.arguments import TrainArguments, parse
from nanodpo.errors import RunStopped, UserError, run_script
from nanodpo.logprobs import SequenceLogProbs
from nanodpo.packing import LAYOUTS
from nanodpo.schedule import deal, epoch_order, learning_rate, pairs_of_step
from nanodpo.source import Source, open_source
from nanodpo.template import read_template
from nanodpo.tokens import DataSet, load_dataset

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "tokenizers")


@dataclasses.dataclass
class Run:
    """What the parts of a run share. `ref` and `held_ref` are (n, 2) reference log-probs, None for SFT."""

    args: TrainArguments
    folder: Path
    source: Source
    engine: object  # DeepSpeed's
    device: torch.device
    world: int
    rank: int
    layout: str  # "packed" or "plain"
    attention: str
    train_set: DataSet
    held_out: DataSet | None
    ref: torch.Tensor | None = None
    held_ref: torch.Tensor | None = None

    @property
    def pairs_per_step(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.world

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_set.examples) / self.pairs_per_step)

    @property
    def steps(self) -> int:
        epochs = self.args.num_train_epochs
        return self.args.max_steps if self.args.max_steps > 0 else math.ceil(epochs * self.steps_per_epoch)


def main(argv: list[str]) -> None:
    args = parse(argv, HERE / "examples" / "dpo.yaml")
    if args.print_config:
        print(json.dumps(dataclasses.asdict(args), indent=2))
        return
    settings = read_deepspeed(args)

    # What is wrong with the input is found here, before a weight is loaded or a folder made.
    distributed.check_device(args)
    source = open_source(args.model_name, args.trust_remote_code)
    train, held_out, limit = load_data(args, source)
    if args.inspect:
        distributed.say(inspection.inspect(train, source.tokenizer, limit))
        return
    folder = args.output_dir or f"runs/{args.loss}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    checkpoint.claim(Path(folder))
    if args.loss != "sft":
        reference.check_writable(args.cache_dir)
    distributed.say("\n".join(data.report() for data in (train, held_out) if data))

    device = distributed.start(args.local_rank)
    folder = Path(distributed.from_main(folder))  # ranks may have read the clock in different seconds
    model = models.load_model(source, args)
    weights = models.fingerprint(model, fresh_lora=args.use_lora and not source.adapter)
    distributed.say(models.describe(model))
    engine, layout, attention = build_engine(model, args, settings, device, longest(train, held_out))
    torch.manual_seed(args.seed + dist.get_rank())  # of dropout, where it is allowed
    run = Run(args, folder, source, engine, device, dist.get_world_size(), dist.get_rank(), layout, attention, train,
              held_out)
    open_folder(run, weights, limit)
    add_references(run, weights)
    train_model(run)
    finish(run)


def read_deepspeed(args) -> dict:
    """The DeepSpeed JSON with train.py's own numbers in it."""
    path = Path(args.deepspeed or HERE / "ds_config.json")
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--deepspeed {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--deepspeed {path}: expected an object, found {type(settings).__name__}")
    return distributed.engine_config(settings, str(path), args)


def load_data(args, source):
    """(training set, held-out set or None, the longest sequence allowed in tokens)."""
    template = read_template(source.tokenizer, args.assistant_header)
    context = source.context or sys.maxsize
    limit = args.max_length or context
    if limit > context:
        raise UserError(f"--max_length {limit}: the model's context is {context} tokens (max_position_embeddings)")
    pairs = args.loss != "sft"
    train = load_dataset(args.train_file_path, template, args, limit, pairs)
    if args.eval_file_path:
        return train, load_dataset(args.eval_file_path, template, args, limit, pairs), limit
    if not args.eval_size:
        return train, None, limit
    n = len(train.examples)
    if args.eval_size >= n:
        raise UserError(f"--eval_size {args.eval_size}: {args.train_file_path} has {n} usable row{'s' * (n > 1)}")
    held = set(epoch_order(n, args.seed, -1)[: args.eval_size])
    held_out = DataSet(f"{args.eval_size} rows of {train.path}", [train.examples[i] for i in sorted(held)], [], {}, [])
    train.examples = [e for i, e in enumerate(train.examples) if i not in held]
    return train, held_out, limit


def longest(*sets: DataSet | None) -> int:
    """Tokens of the longest [prompt | response]."""
    return max(example.length for data in sets if data for example in data.examples)


def build_engine(model, args, settings: dict, device, longest: int):
    """(DeepSpeed engine around the log-prob module, layout of rows, name of the attention)."""
    import deepspeed  # this and the next are slow to import, and --help and wrong input need neither

    from nanodpo import selfcheck

    if args.gradient_checkpointing:
        # ZeRO-3 frees weights between forward and backward, which the newer, hook-based checkpointing takes for an
        # error; the older one runs backward only where the inputs have a gradient.
        reentrant = settings.get("zero_optimization", {}).get("stage") == 3
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=args.learning_rate,
                                  betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)
    module = SequenceLogProbs(model)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    layout, attention = selfcheck.choose_layout(module, device, dtype, args.use_flash_attention, longest)
    distributed.say(f"rows: {layout}, attention {attention}")
    return engine, layout, attention


def open_folder(run: Run, weights: str, limit: int) -> None:
    """Makes the run's folder: run.json, dropped_rows.jsonl and checkpoint-0, the starting point."""
    if distributed.is_main():
        run.folder.mkdir(parents=True, exist_ok=True)
        data_sets = [data for data in (run.train_set, run.held_out) if data]
        record = {
            "command": " ".join(sys.argv), "arguments": dataclasses.asdict(run.args),
            "output_dir": str(run.folder), "world_size": run.world, "steps": run.steps, "layout": run.layout,
            "attention": run.attention, "max_length": limit, "weights": weights, "versions": versions(),
            "git_commit": git_commit(), "device": str(run.device),
            "data": [reference.data_hash(data.examples) for data in data_sets],
            "data_report": [data.report() for data in data_sets],
        }
        try:
            with (run.folder / "run.json").open("x") as file:  # of two runs that start at once, one finds it there
                file.write(json.dumps(record, indent=2) + "\n")
        except FileExistsError as error:
            raise UserError(f"--output_dir {run.folder}: is in use by another run") from error
        dropped = [row for data in data_sets for row in data.dropped]
        if dropped:
            (run.folder / "dropped_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dropped))
    distributed.say(f"run: {run.folder}, {run.steps} steps of {run.pairs_per_step} pairs")
    save_checkpoint(run, 0)


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """Of this program, where it is a clone and git is there."""
    try:
        done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


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
                   "zero": run.engine.zero_optimization_stage(), "device": run.device.type, "versions": versions()}
    if args.bf16:  # its rounding depends on what else is in the micro-batch
        fingerprint |= {"batches": [args.seed, batch, len(steps[0])]}
    with models.reference_policy(run.engine.module.model, fresh_lora=args.use_lora and not run.source.adapter):
        return reference.reference_logps(
            data.examples, steps, lambda pairs: deal(pairs, batch, run.rank, run.world),
            lambda indices: score(run, data, indices, ["chosen", "rejected"]), fingerprint, args.cache_dir, run.device)


def eval_steps(run: Run) -> list[list[int]]:
    """The held-out pairs in order, as many at a time as all ranks take in one micro-batch."""
    n, size = len(run.held_out.examples), run.args.per_device_eval_batch_size * run.world
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


def score(run: Run, data: DataSet, indices: list[int], sides: list[str], gradient: bool = False) -> torch.Tensor:
    """(P, R) summed log-probs of these sides of these examples, nats: the only forward pass there is."""
    examples = [data.examples[i] for i in indices]
    row = LAYOUTS[run.layout]([(e.prompt, [getattr(e, side) for side in sides]) for e in examples])
    row = (row.pin() if run.device.type == "cuda" else row).to(run.device)
    with torch.set_grad_enabled(gradient):
        return run.engine(row).view(len(indices), len(sides))


def train_model(run: Run) -> None:
    """The loop. Every pair of a step weighs the same, however the step is cut into micro-batches and ranks."""
    args, engine, tokens, bar = run.args, run.engine, 0, progress(run)
    evaluate(run, 0)
    for step in range(run.steps):
        began = time.perf_counter()
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
            engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            losses = losses_of(run, run.train_set, run.ref, indices, weight, meter, gradient=True)
            engine.backward(losses.sum() * weight * share, scale_wrt_gas=False)

        means = step_means(run, run.train_set, pairs, meter)
        check_numbers(run, step, pairs, means)
        norm = take_step(run, step)
        new = sum(count_tokens(run, run.train_set.examples[i]) for i in pairs)
        tokens += new
        line = {"step": step, "epoch": step / run.steps_per_epoch, **means, "grad_norm": norm, "learning_rate": rate,
                "num_tokens": tokens}
        log_step(run, bar, line, new, time.perf_counter() - began)

        done = step + 1
        if done == run.steps or (args.eval_steps and done % args.eval_steps == 0):
            evaluate(run, done)
        if done == run.steps or (args.save_steps and done % args.save_steps == 0):
            save_checkpoint(run, done)
    bar.close()


def losses_of(run: Run, data, ref, indices: list[int], weight: float, meter, gradient: bool):
    """(P,) losses of one micro-batch; its values go into the meter."""
    # SFT trains on chosen alone, but evaluation follows both where the data has both.
    one_side = data.examples[0].rejected is None or (gradient and run.args.loss == "sft")
    sides = ["chosen"] if one_side else ["chosen", "rejected"]
    logps = score(run, data, indices, sides, gradient)
    counts = [[len(getattr(data.examples[i], side)) for side in sides] for i in indices]
    tokens = torch.tensor(counts, dtype=torch.float64).to(run.device, non_blocking=True)
    ref = None if ref is None else ref[indices].to(run.device, non_blocking=True)
    losses, values = metrics.pair_values(logps, tokens, ref, run.args)
    meter.add({"loss": losses.detach(), **values}, weight)
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


def check_numbers(run: Run, step: int, pairs: list[int], means: dict) -> None:
    """Stops all ranks together, before the update, where the step's numbers can't be right."""
    gap = means.pop("ref_gap", 0.0)
    if bad := [name for name, value in means.items() if not math.isfinite(value)]:
        rows = ", ".join(f"{e.row} ({len(e.prompt)}+{len(e.chosen)}/{len(e.rejected or ())} tokens)"
                         for e in (run.train_set.examples[i] for i in pairs[:16]))
        raise RunStopped(f"step {step}: {', '.join(bad)} not finite; no update was made; rows {rows}")
    # Policy and reference are one model now, and their micro-batches are the same.
    if step == 0 and gap > (1e-3 if run.args.bf16 else 1e-4) and not run.args.allow_dropout:
        raise RunStopped(
            f"step 0: policy and reference should be equal, but their log-probs differ by {gap:.2g} nats a token (loss "
            f"{means['loss']:.4f}). Likely causes: dropout, a reference cache of other weights (empty "
            f"{run.args.cache_dir}), an adapter that was already trained, another attention")


def take_step(run: Run, step: int) -> float:
    """The update; returns the gradient's global norm before clipping, over all ranks."""
    norm = None
    if run.engine.zero_optimization_stage() == 0:  # here DeepSpeed keeps no norm, and steps whatever it is
        grads = [p.grad.double().square().sum() for p in run.engine.module.parameters() if p.grad is not None]
        norm = torch.stack(grads).sum().sqrt().item()
    if norm is None or math.isfinite(norm):
        run.engine.step()
    norm = float(run.engine.get_global_grad_norm() if norm is None else norm)
    if not math.isfinite(norm):
        raise RunStopped(f"step {step}: the gradient is not finite; no update was made")
    return norm


def evaluate(run: Run, step: int) -> None:
    """Means over the held-out set under the weights of checkpoint-`step`, into metrics.jsonl as eval_*."""
    if run.held_out is None:
        return
    run.engine.eval()
    meter = metrics.Meter(run.device)
    for pairs in eval_steps(run):
        for indices, weight in deal(pairs, run.args.per_device_eval_batch_size, run.rank, run.world):
            losses_of(run, run.held_out, run.held_ref, indices, weight, meter, gradient=False)
    means = step_means(run, run.held_out, list(range(len(run.held_out.examples))), meter)
    means.pop("ref_gap", None)
    if bad := [name for name, value in means.items() if not math.isfinite(value)]:
        raise RunStopped(f"evaluation under checkpoint-{step}: {', '.join(bad)} not finite")
    if distributed.is_main():
        line = {"step": step, "epoch": step / run.steps_per_epoch} | {f"eval_{name}": v for name, v in means.items()}
        metrics.write_line(run.folder / "metrics.jsonl", line)
    distributed.say(f"step {step:>5}  eval_loss {means['loss']:.4f}" + summary(means, "eval_"))


def progress(run: Run):
    return tqdm(total=run.steps, unit="step", disable=run.rank != 0 or not sys.stderr.isatty(), dynamic_ncols=True)


def log_step(run: Run, bar, line: dict, tokens: int, seconds: float) -> None:
    """One line in metrics.jsonl a step; on the screen the bar, and a line every logging_steps."""
    line |= {"perf/tokens_per_second": tokens / seconds, "perf/step_seconds": seconds,
             "mem/peak_gib": metrics.peak_gib(run.device)}
    if run.rank != 0:
        return
    metrics.write_line(run.folder / "metrics.jsonl", line)
    bar.update()
    speed = f"  {tokens / seconds:,.0f} tokens/s"
    bar.set_postfix_str(f"loss {line['loss']:.4f}{summary(line)}{speed}", refresh=False)
    if line["step"] % run.args.logging_steps == 0 or line["step"] == run.steps - 1:
        bar.write(f"step {line['step']:>5}  loss {line['loss']:.4f}{summary(line)}{speed}")


def summary(means: dict, prefix: str = "") -> str:
    names = ("rewards/margins", "rewards/accuracies") if "rewards/margins" in means else ("logps_per_token/chosen",)
    return "".join(f"  {prefix}{name} {means[name]:.4f}" for name in names)


def save_checkpoint(run: Run, step: int) -> None:
    """checkpoint-<step>: adapter or model, and tokenizer. All ranks gather, the first writes."""
    model = run.engine.module.model
    state = checkpoint.gather(model, only_trained=run.args.use_lora)
    with distributed.wait_for_main():
        if distributed.is_main():
            checkpoint.save(model, run.source.tokenizer, state, run.folder / f"checkpoint-{step}")
            checkpoint.rotate(run.folder, run.args.save_total_limit)


def finish(run: Run) -> None:
    """Leaves the other ranks, merges where asked, and says where everything is."""
    dist.destroy_process_group()  # merging a large model outlasts a collective's patience
    if run.rank != 0:
        return
    last = run.folder / f"checkpoint-{run.steps}"
    if run.args.merge_weights:
        dtype = torch.bfloat16 if run.args.bf16 else torch.float32
        checkpoint.merge(last, run.folder / "merged", dtype, run.args.trust_remote_code)
        print(f"merged: {run.folder / 'merged'}")
    print(f"done: {run.folder}\nlast: {last}\nnext: python score.py {run.folder}")


if __name__ == "__main__":
    sys.exit(run_script(main))
