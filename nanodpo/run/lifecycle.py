"""A run's folder: made or opened again, saved into, finished. All ranks call these functions together."""

import gc
import json
from dataclasses import fields
from pathlib import Path

import torch

from ..data.template import template_for
from ..data.transcripts import leads_to_keep, prompt_leads
from ..errors import UserError
from ..folder import card, checkpoint, elastic, fork, record, resume, same_run, state
from ..folder.atomic import check_whole, flush, read_manifest, remove, writing
from ..folder.log import Log, LogHash, append_line, read_lines
from ..model import loading
from ..model.quantised import bits_of
from ..model.source import absolute, base_of
from ..ranks import distributed, waits
from . import agreement, engine, memory, noise
from .start import Run


def open_folder(run: Run) -> dict:
    """Makes the run's folder with run.json, the lists of dropped and cut rows and checkpoint-0, the starting point; or
    opens the folder of a run to go on with. Returns the facts of the state to go on from, for `go_on`. Raises UserError
    where the folder is another run's, or is not shared by all ranks.
    """
    # Loading an adapter has written its settings into run.args.
    run.facts |= {"arguments": record.arguments(run.args), "steps": run.steps, "layout": run.layout,
                  "attention": run.attention, "base": absolute(run.source.base), "weights": run.start_hash,
                  "reference": run.reference_hash,
                  "device": distributed.device_name(run.device),
                  "held_out_rows": sorted({e.row for e in run.held_out.examples}) if run.args.eval_size else None}
    with agreement.same_on_all_ranks() as compared:
        compared |= {name: run.facts[name] for name in ("layout", "attention")}
        compared |= agreement.flags(run.facts["arguments"])
    facts = {"step": 0}
    with distributed.main_first():
        if distributed.is_main():
            facts = _open_as_main(run)
    if not run.args.output_dir and not run.resumed:
        run.folder = Path(distributed.from_main(str(run.folder)))  # ranks may have read the clock in different seconds
    _check_shared(run.folder, run.rank)
    facts, run.evaluated = distributed.from_main((facts, run.evaluated))
    if words := shared_anew(run, facts):
        distributed.say(words)
    going = f", going on at step {facts['step']}" if run.resumed or run.fork else ""
    epochs = f"{run.steps / run.steps_per_epoch:.3g}"
    steps, pairs, epochs = (f"{n} {unit}{'s' * (str(n) != '1')}" for n, unit in (
        (run.steps, "step"), (run.pairs_per_step, "pair"), (epochs, "epoch")))
    distributed.say(f"run: {run.folder}, {steps} of {pairs}, {epochs}{going}")
    _say_idle_flags(run.args, run.steps)
    save_checkpoint(run)  # the engine has the weights of step 0 until `go_on`: a damaged checkpoint-0 is made again
    return facts


def _say_idle_flags(args, steps: int) -> None:
    """Names flags that have no effect in a run of so many steps, or less than they say."""
    if args.warmup_steps > steps:
        distributed.say(f"--warmup_steps {args.warmup_steps}: more than the run has; it ends at "
                        f"{steps / args.warmup_steps:.0%} of --learning_rate")
    for name in ("eval_steps", "save_steps", "resume_steps"):
        if (every := getattr(args, name)) > steps:
            distributed.say(f"--{name} {every}: more than the run has, so it has no effect")
    if args.max_steps > 0 and args.num_train_epochs != elastic.DEFAULTS["num_train_epochs"]:
        distributed.say(f"--num_train_epochs {args.num_train_epochs:g}: no effect beside --max_steps {args.max_steps}")
    if args.keep_states and not (args.save_steps or args.resume_steps):
        distributed.say("--keep_states: no effect without --save_steps or --resume_steps, which save states")
    lora = [f"--{flag.name} {getattr(args, flag.name)}" for flag in fields(args)
            if flag.name.startswith("lora_") and getattr(args, flag.name) not in (flag.default, 0)]
    if lora and not args.use_lora:
        distributed.say(f"no effect without LoRA: {', '.join(lora)}")


def _open_as_main(run: Run) -> dict:
    """Rank 0's part of `open_folder`: claims a new folder, or looks whether the run in it is this one; locks it, fills
    that of a fork, and cuts it back to the state to go on from, whose facts it returns."""
    if run.resumed:
        same_run.check_same(run.folder, run.resumed, run.facts)
        run.facts["license"] = run.resumed.get("license")
    else:
        if run.fork:
            run.facts["fork"]["changed"] = changed = fork.check(run.fork, run.facts)
            words = same_run.in_words([(name, *values) for name, values in changed.items()])
            distributed.say(f"fork: {run.fork.run} at step {run.fork.step}, {words or 'with nothing changed'}")
        memory.check_disk(run.folder, disk_needed(run))
        run.facts["license"] = card.license_of(run.source.base)
        leads = prompt_leads(template_for(run.source.tokenizer, run.args, run.facts["date"]),
                             (example.prompt for example in run.train_set.examples))
        run.facts["prompt_leads"] = leads_to_keep(leads)
        run.folder = run.folder if run.args.output_dir else record.take(run.folder)
        record.create(run.folder, run.facts)
    run.lock = record.lock(run.folder)
    data = [data for data in (run.train_set, run.held_out) if data]
    record.list_rows(run.folder / "dropped_rows.jsonl", [row for one in data for row in one.dropped])
    record.list_rows(run.folder / "cut_rows.jsonl", [row for one in data for row in one.cut_rows()])
    first, before = run.fork.step if run.fork else 0, run.resumed or (run.fork and run.fork.source)
    if before and (changed := same_run.changed_machine(before, run.facts)):
        distributed.say(f"{'resume' if run.resumed else 'fork'}: {changed}")
    if not (run.resumed or first):
        return {"step": 0}
    memory.check_disk(run.folder, disk_needed(run))  # now, when half-written files of an ended process are removed
    if run.fork:
        fork.fill(run.fork, run.folder)
    owners = fork.owners(run.resumed or run.facts)
    facts, run.evaluated = resume.begin(run.folder, run.steps, run.wanted_step, owners, first)
    zero = ((run.resumed or run.fork.source)["deepspeed"], run.facts["deepspeed"])
    was, now = (json.dumps(one["zero_optimization"]) for one in zero)
    if (was := facts.get("zero", was)) != now:  # of what wrote the state, which may have been another continuation
        distributed.say(f"resume: the last bits may differ, since ZeRO is {now} in place of {was}")
    checkpoint.rotate(run.folder, run.args.save_total_limit)  # the run may have been killed before it did
    return facts


def shared_anew(run: Run, facts: dict) -> str:
    """A line for the screen where the run goes on with another number of ranks than have written the state whose facts
    these are, or than it began with, or with another --sequence_parallel_size; else an empty text."""
    before = run.resumed or (run.fork and run.fork.source)
    if not before or facts.get("complete") or elastic.pairs_per_step(before) != run.pairs_per_step:
        return ""
    others = [n for n in (facts.get("world_size"), before["world_size"]) if n not in (None, run.world)]
    size = run.args.sequence_parallel_size
    if not others and size == elastic.arguments_of(before)["sequence_parallel_size"]:
        return ""
    share = f", of which {size} share each batch," if size > 1 else ""
    dropout = "; its dropout draws other numbers" if run.args.allow_dropout else ""
    now = f"{run.world} rank{'s' * (run.world > 1)}{share}"
    return (f"resume: {now} in place of {others[0] if others else run.world}; --gradient_accumulation_steps "
            f"{run.args.gradient_accumulation_steps} keeps {run.pairs_per_step} pairs a step{dropout}")


def _check_shared(folder: Path, rank: int) -> None:
    """Raises UserError where a rank does not read in its folder the run.json that rank 0 wrote."""
    file = folder / "run.json"
    written = distributed.from_main(file.read_bytes() if distributed.is_main() else None)
    error = UserError(f"--output_dir {folder}: rank {rank} does not see what rank 0 wrote there; it must be a "
                      "folder that all machines share")
    distributed.gather_or_raise(None if waits.seen(lambda: file.is_file() and file.read_bytes() == written) else error)


def go_on(run: Run, facts: dict) -> None:
    """Loads a saved state into the engine; `facts` are those that `open_folder` returned. Until now the engine has the
    weights of step 0, from which the references are computed."""
    run.step, run.tokens, run.skipped = facts["step"], facts.get("tokens", 0), facts.get("skipped", 0)
    if run.step == 0 or facts.get("complete"):
        return
    read, random = resume.load(run.folder, facts, run.rank)
    state.restore(run.engine, read, run.step - run.skipped)
    state.restore_random(random, run.device)
    for name in state.COUNTERS:
        setattr(run.engine, name, facts[name])


def disk_needed(run: Run) -> dict[str, int]:
    return memory.disk_needed(run.engine.module.model, run.args, run.source.tokenizer, run.steps)


def write_line(run: Run, line: dict) -> None:
    """Appends a line to metrics.jsonl and sends it to the monitors, on rank 0."""
    record.check_held(run.folder, run.lock)
    append_line(run.folder / "metrics.jsonl", line)
    if run.monitor:
        run.monitor.write(line)


def save_checkpoint(run: Run) -> None:
    """Writes checkpoint-<step>, with adapter or model, and tokenizer, unless it is there and whole. All ranks gather
    the weights, rank 0 writes."""
    folder, model = run.folder / f"checkpoint-{run.step}", run.engine.module.model
    if distributed.from_main(distributed.is_main() and isinstance(read_manifest(folder), dict)):
        return
    engine.end_prefetch(run.engine)
    tensors = checkpoint.gather(model, only_trained=run.args.use_lora)
    with distributed.main_first():
        if distributed.is_main():
            record.check_held(run.folder, run.lock)
            if run.step:  # whoever finds the last checkpoint takes all steps to be in metrics.jsonl
                with writing(run.folder / "metrics.jsonl"):
                    flush(run.folder / "metrics.jsonl")
            run.history = run.history or card.History(run.folder, run.facts)
            texts = card.texts(run.facts, run.step, run.history, run.source.base,
                               model.peft_config["default"] if run.args.use_lora else None)
            if run.history.has_updates:
                checkpoint.check_trained(tensors)
            checkpoint.save(model, run.source.tokenizer, tensors, folder, {"step": run.step, **_owner(run)}, texts)
            checkpoint.rotate(run.folder, run.args.save_total_limit)


def save_state(run: Run) -> None:
    """Writes the state from which the run can go on at `run.step`, every rank its part; none before the first step."""
    if run.step == 0:
        return
    # Rank 0 alone looks: another machine's NFS would remember that the folder was not there.
    if distributed.from_main(distributed.is_main() and resume.folder_of(run.folder, run.step).is_dir()):
        return
    tensors = run.random_states
    if run.rank == 0 or run.engine.zero_optimization_stage():  # without ZeRO all ranks have the same
        tensors = tensors | state.weights_and_moments(run.engine)
    run.log_hash = run.log_hash or LogHash(Log(run.folder).new_lines)
    zero = json.dumps(run.facts["deepspeed"]["zero_optimization"])
    facts = {"tokens": run.tokens, "skipped": run.skipped, "zero": zero}
    facts |= {name: getattr(run.engine, name) for name in state.COUNTERS}
    resume.save(run.folder, run.step, tensors, facts | _owner(run), run.rank, run.args.keep_states,
                run.log_hash)


def _owner(run: Run) -> dict:
    """The entries of a manifest that tell which run has written it."""
    return {"world_size": run.world, "run": same_run.fingerprint(run.resumed or run.facts)}


def finish(run: Run) -> None:
    """Leaves the other ranks. Rank 0 merges the adapter where --merge_weights asks for it, marks the run finished, and
    says so where nothing was learned.
    """
    if run.args.merge_weights:
        run.stop.check()  # merging takes long, and can be done by the next call; the rest takes no time
        run.engine.destroy()
        run.engine = None  # a quantised base is merged on the GPU, where the engine may leave no room for it
        gc.collect()
        torch.cuda.empty_cache()
    run.stop.at_once()
    distributed.leave()  # merging a large model may take longer than a collective waits
    if run.rank == 0:
        record.check_held(run.folder, run.lock)
        if run.args.merge_weights:
            merge(run.folder, run.steps, run.args.bf16, run.args.trust_remote_code, bits_of(run.args))
        if not run.args.keep_states:
            remove(run.folder / "resume")  # large, and of no use to a finished run
        record.finish(run.folder)
        (run.folder / "monitors.json").unlink(missing_ok=True)
        found = noise.of_record(record.read(run.folder), run.folder / "run.json")
        if line := noise.nothing_learned([values for _, values in read_lines(run.folder)], found, run.pairs_per_step,
                                         run.args.learning_rate):
            distributed.say(line)


def merge(folder: Path, steps: int, bf16: bool, trust_remote_code: bool, bits: int | None = None) -> None:
    """Writes the last checkpoint's adapter, merged into its base, to merged/: a model like any other. Raises UserError
    where the base is no longer the one that was trained on."""
    def check(model, base):
        loading.check_base(loading.base_hashes(model), base, facts, folder)

    dtype, last = torch.bfloat16 if bf16 else torch.float32, folder / f"checkpoint-{steps}"
    check_whole(last)
    facts = record.read(folder)
    texts = card.texts(facts, steps, card.History(folder, facts), base_of(str(last))[0])
    checkpoint.merge(last, folder / "merged", dtype, trust_remote_code, check, texts, bits)
    with writing(folder / "merged"):
        card.add_figure(folder)  # where an earlier call has drawn it
    distributed.say(f"merged: {folder / 'merged'}")
