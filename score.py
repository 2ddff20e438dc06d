"""Log-probabilities of any responses under any checkpoints, through the kernel that training uses.

    python score.py                                         the newest run under runs/, on its own held-out data
    python score.py RUN [RUN ...] --dataset_path forward=f.parquet reverse=r.parquet --output_dir O
    python score.py --model_path M --dataset_path D         any model or adapter
    torchrun --nproc_per_node=2 score.py RUN                the same work, shared by the ranks
    python score.py RUN --ledger 16                         which training pairs moved 16 rows of the data

Leaves scores.parquet (a line for each checkpoint, data set, row and response), summary.csv (their means), verdict.json
(what became of each run) and the other tables that nanodpo/scoring/tables.py describes. A scoring that was stopped goes
on where it was. Another one in the same folder adds its responses and measures; the tables then hold the checkpoints
and data sets that it names. All that was ever scored is kept in <output_dir>/parts, under a hash of what the checkpoint
and the data contain (nanodpo/scoring/parts.py), and is not scored again.
"""

import json
from collections.abc import Container
from pathlib import Path

import pandas
import torch

from nanodpo.core.logprobs import sum_by_sequence
from nanodpo.core.packing import LAYOUTS
from nanodpo.data.example import SIDES
from nanodpo.errors import UserError, exit_process, run_script
from nanodpo.figures.after import draw_after, page_after
from nanodpo.folder.atomic import check_writable
from nanodpo.folder.same_run import recipe
from nanodpo.ledger.making import make_ledger
from nanodpo.progress import Progress
from nanodpo.ranks import distributed
from nanodpo.run import agreement, memory, noise
from nanodpo.run.signals import Stop
from nanodpo.scoring import answers, plausible, risers, side_by_side, tables, verdict
from nanodpo.scoring.contents import hash_of
from nanodpo.scoring.datasets import ResponseSet, Wanted, open_datasets
from nanodpo.scoring.describe import describe
from nanodpo.scoring.flags import parse
from nanodpo.scoring.means import band_to_screen, show
from nanodpo.scoring.measures import token_measures
from nanodpo.scoring.opened import Opened, Opener, check_references, open_device
from nanodpo.scoring.pairs import gradient_products
from nanodpo.scoring.parts import Alone, Parts
from nanodpo.scoring.plan import FORWARD, Result, Work, greedy_result, plan
from nanodpo.scoring.responses import Group, batches
from nanodpo.scoring.runs import Checkpoint, check_starts, find_bases, open_own_losses, open_targets

AT_ONCE = 32  # micro-batches on each rank, or greedy answers at most, after which what is done is kept
GOES_ON = "what is done is kept, and the same command goes on from there"
ADVICE = (f"{GOES_ON}. It needs a smaller --max_tokens, or --bf16, or --gradients with --gradient_checkpointing, or to "
          "be without --gradients or --risers")
LEDGER_ADVICE = f"{GOES_ON}. It needs a smaller --ledger_memory, or --gradient_checkpointing"


def main(argv: list[str]) -> None:
    with Stop() as stop, distributed.process_restored(), distributed.lost_peers_reported():
        stop.advice = lambda: f"; {GOES_ON}"
        distributed.meet()
        score(argv)


def score(argv: list[str]) -> None:
    """Arguments -> checkpoints and data sets -> what is missing of their results -> these, part by part -> tables."""
    with agreement.same_on_all_ranks() as compared:
        args = parse(argv, __doc__)
        free = ("local_rank", "output_dir", "own", "changes")  # the tables are rank 0's alone, and parts are compared
        compared |= agreement.flags({name: value for name, value in vars(args).items() if name not in free})
        compared |= agreement.program(Path(__file__), args.local_rank)
    with agreement.same_on_all_ranks() as compared:
        checkpoints = open_targets(args.targets, args.changes)
        check_starts(checkpoints, args.risers)
        without_weights = open_own_losses(checkpoints) if not (args.ledger or args.ledger_rows) else []
        wanted = Wanted(args.responses, args.seed, args.answers, args.max_new_tokens)
        datasets = open_datasets(checkpoints, args.dataset_path, args.own, wanted, args.other_prompts,
                                 args.sequence_parallel_size)
        if (args.risers or 0) > (most := datasets[0].vocabulary):
            raise UserError(f"--risers {args.risers}: the vocabulary has {most} tokens; give fewer")
        is_run = (Path(args.targets[0]) / "run.json").is_file()
        folder = Path(args.output_dir or (args.targets[0] if is_run else "scores"))
        check_writable(folder / "parts", f"--output_dir {folder}")
        find_bases(checkpoints)
        compared |= {f"files of {c.path} that hash to": hash_of(c.key)[:8] for c in checkpoints}
        compared |= {f"responses of data set {data.name} that hash to": data.hash[:8] for data in datasets}
    for line in without_weights:
        distributed.say(line)
    device = open_device(args.local_rank, args.gpu_id)
    with distributed.main_first():
        if distributed.is_main():
            check_references(checkpoints)
    if args.ledger or args.ledger_rows:
        with Alone(folder / "parts"), shortage_named("the ledger", advice=LEDGER_ADVICE):
            lines = make_ledger(checkpoints, datasets, args, device, folder)
            lines += filter(None, [draw_after(folder, ledger=True), page_after(folder)])
        return distributed.say("\n".join(lines))
    from nanodpo.model.ulysses import ranks_of_a_batch  # slow to import, with transformers' models

    longest = max(example.length for data in datasets for example in data.examples)
    opener = Opener(device, args.gradients, longest, ranks_of_a_batch(args.sequence_parallel_size),
                    args.gradient_checkpointing)
    with Parts(folder / "parts") as parts:
        with shortage_named("scoring"):
            for data in datasets:
                add_greedy(opener, checkpoints[0], data, parts, args.max_tokens)
            work = plan(checkpoints, datasets, parts, args.tokens, args.gradients, args.risers or 0)
            if args.gradients:
                check_pairs(work)
            score_all(opener, work, parts, args.max_tokens)
        distributed.leave()
        if distributed.is_main():
            report(folder, checkpoints, work, parts)


def add_greedy(opener: Opener, first: Checkpoint, data: ResponseSet, parts: Parts, max_tokens: int) -> None:
    """Puts the first checkpoint's own answers among a data set's responses, where they are asked for or there."""
    result = greedy_result(first, data, parts)
    if result is None:
        return
    if result.missing:
        distributed.say(f"{data.name}: greedy answers of {first.path}")
        answer(opener.open(first), data, result, parts, max_tokens)
    said = distributed.from_main(parts.answers(result.key, result.kind) if distributed.is_main() else None)
    data.add_greedy([said[row] for row in result.rows])


def check_pairs(work: list[Work]) -> None:
    """Names the data sets that have no gradients. Raises UserError where these are all."""
    without = {item.data.name for item in work if not item.of_kind("gradients")}
    if without == {item.data.name for item in work}:
        raise UserError("--gradients: needs both responses of a pair, and of no data set chosen and rejected are "
                        "scored; name both in --responses, or leave it out")
    for name in sorted(without):
        distributed.say(f"{name}: has no gradients, which need both chosen and rejected")


def score_all(opener: Opener, work: list[Work], parts: Parts, max_tokens: int) -> None:
    """Scores what is not there yet, one checkpoint and data set after the other."""
    left = [item for item in work if any(result.missing for result in item.results)]
    results = [result for item in left for result in item.results]
    rows, missing = sum(len(result.rows) for result in results), sum(len(result.missing) for result in results)
    some = f", and {1 - missing / rows:.0%} of the rest" if missing < rows else ""
    distributed.say(f"{len(work)} part{'s' * (len(work) > 1)}, {len(work) - len(left)} of them done before{some} "
                    "(a part: one data set under one checkpoint)")
    with Progress("scoring", sum(len(item.missing(*FORWARD, "gradients")) for item in left), "row") as bar:
        for item in left:
            bar.update(0, f"{item.checkpoint.run} step {item.checkpoint.step} {item.data.name}")
            # Nobody else holds what is opened: the next one may need its memory.
            score_part(*open_for(item, opener), item, parts, max_tokens, bar)
            for result in item.of_kind("answers"):
                if result.missing:
                    answer(opener.open(item.checkpoint), item.data, result, parts, max_tokens)


def open_for(work: Work, opener: Opener) -> tuple[Opened, Opened | None]:
    """The checkpoint of this work and, where risers are missing, step 0 of its run."""
    if work.missing("risers"):
        return opener.open_with_start(work.checkpoint, work.start)
    return opener.open(work.checkpoint), None


def score_part(opened: Opened, start: Opened | None, work: Work, parts: Parts, max_tokens: int, bar: Progress) -> None:
    """Scores what is missing of a data set under a checkpoint, and keeps it after every so many micro-batches.
    `start`: step 0 of its run, where risers are missing."""
    bar.begin()
    parallel = opened.module.parallel
    rank, world = (number // parallel.size for number in distributed.rank_and_world())  # of micro-batches
    missing = {"scores": work.missing(*FORWARD), "gradients": work.missing("gradients")}  # {index: results}
    groups, with_tokens = work.missing_groups(), work.missing("tokens")
    tasks = [("scores", indices) for indices in batches(groups, max_tokens)]
    own = {work.data.examples[i].row for _, indices in tasks[rank::world] for i in indices}
    start_sets = work.start_sets(parts, own) if tasks else None
    tasks += [("gradients", [i]) for i in missing["gradients"]]  # a backward pass for each response, so one row at once
    for first in range(0, len(tasks), AT_ONCE * world):
        mine = {}
        for kind, indices in tasks[first : first + AT_ONCE * world][rank::world]:
            if kind == "scores":
                mine |= score_groups(opened, start, work, {i: groups[i] for i in indices}, with_tokens, start_sets)
            else:
                mine |= score_gradients(opened, work, *indices)
            bar.update(world * sum(kind == "scores" or i not in missing["scores"] for i in indices))
        everyone = distributed.gather_or_raise(None, mine if parallel.rank == 0 else {})  # of those with the same, one
        done = dict(item for lines in everyone for item in lines.items())
        tables.keep(parts, work, [(missing[kind][i], i, done[kind, i]) for kind, i in sorted(done)])


@torch.no_grad()
def score_groups(opened: Opened, start: Opened | None, work: Work, groups: dict[int, Group],
                 with_tokens: Container[int], start_sets: dict | None) -> dict:
    """{("scores", index): {table: lines}} of the responses in these groups, {index: group}: one forward pass.

    `start` is step 0 of the run, where risers are missing. `with_tokens`: indices for which every token's numbers are
    kept. `start_sets` has the plausible tokens of the run's start; None where this is the start, or where there is
    none.
    """
    data, sequences = work.data, [(i, kind) for i, (_, responses) in groups.items() for kind in responses]  # S of them
    lengths = [len(groups[i][1][kind]) for i, kind in sequences]  # N tokens in all
    rows = [(data.examples[i].row, kind) for i, kind in sequences]
    known = None if start_sets is None else plausible.join(start_sets, rows, opened.device)
    with shortage_named(f"scoring under {opened.checkpoint.path}", [data.examples[i] for i in groups]):
        plain = [(prompt, [*responses.values()]) for prompt, responses in groups.values()]
        batch, parallel = LAYOUTS[opened.layout](plain).to(opened.device), opened.module.parallel
        beside = start and risers.Risers(start.module, parallel.shard(LAYOUTS[start.layout](plain).to(start.device)),
                                         work.k)
        # Each of the ranks that share a batch measures its part: (N,) each; the sets; (S, D).
        here = parallel.shard(batch)
        measures, sets, states = token_measures(opened.module, here, plausible.part_of(known, parallel),
                                                beside and beside.add)
        measures = {name: parallel.gather(values) for name, values in measures.items()}
        sets, states = plausible.gathered(sets, parallel), parallel.sum(states).cpu()
    if work.start is None:  # nobody knows which tokens the start found implausible
        for name in ("implausible_mass", "implausible_mass_start"):
            measures[name].fill_(torch.nan)
    sums = sum_by_sequence(measures["logps"], batch.sequence_ids, batch.n_sequences).tolist()  # (S,): log pi(y|x)
    columns = {name: values.cpu().split(lengths) for name, values in measures.items()}
    measured = {key: {"logps": sums[s], "states": states[s],
                      "tokens": {name: values[s].numpy() for name, values in columns.items()}}
                for s, key in enumerate(sequences)}
    if beside:
        for key, part in zip(sequences, beside.split(lengths, parallel.gather)):
            measured[key]["risers"] = part
    own = dict(zip(sequences, plausible.split(sets, lengths))) if work.is_start else {}
    found = {}
    for i, (_, responses) in groups.items():
        lines = describe(data.key_of(i), responses, {kind: measured[i, kind] for kind in responses}, data.token_texts,
                         i in with_tokens)
        found["scores", i] = lines | {"plausible": [own[i, kind] for kind in responses if own]}
    return found


@torch.enable_grad()
def score_gradients(opened: Opened, work: Work, i: int) -> dict:
    """{("gradients", i): {table: lines}} of a pair: products of its two sides' gradients w.r.t. the LoRA weights."""
    example, (prompt, responses) = work.data.examples[i], work.data.groups[i]
    with shortage_named(f"the gradients under {opened.checkpoint.path}", [example]):
        batch = LAYOUTS[opened.layout]([(prompt, [responses[side] for side in SIDES])]).to(opened.device)
        # Of (2,): log pi(y|x) of both sides.
        products = gradient_products(opened.logps(batch), opened.trained, opened.module.parallel.sum)
    return {("gradients", i): {"gradients": [{"row": example.row} | products]}}


def answer(opened: Opened, data: ResponseSet, result: Result, parts: Parts, max_tokens: int) -> None:
    """Makes the greedy answers that are missing, and keeps them, some at a time."""
    left = sorted(result.missing, key=lambda row: (-len(data.examples[result.rows[row]].prompt), row))
    # Of tokens that were generated a model keeps keys and values, and nothing else of what a scored one takes.
    longest, budget = len(data.examples[result.rows[left[0]]].prompt), 4 * max_tokens
    of_rank = min(AT_ONCE, answers.batch_size(longest, data.answer_limit, budget))
    size = of_rank * distributed.rank_and_world()[1]
    with Progress("greedy answers", len(left), "answer") as bar:
        for rows in (left[i : i + size] for i in range(0, len(left), size)):
            prompts = [data.examples[result.rows[row]].prompt for row in rows]
            ids = answer_greedily(opened, data, prompts, budget, bar)
            parts.add({result.key: result.held(rows)}, {result.kind: pandas.DataFrame({"row": rows, "ids": ids})})


def answer_greedily(opened: Opened, data: ResponseSet, prompts: list[list[int]], budget: int,
                    bar: Progress) -> list[list[int]]:
    """Token ids of a greedy answer to each prompt; the ranks share the prompts. `budget`: tokens of a batch."""
    rank, world = distributed.rank_and_world()
    of_layout = opened.model.config._attn_implementation  # has no notion of a cache
    opened.model.set_attn_implementation(opened.own)
    with shortage_named(f"the greedy answers of {opened.checkpoint.path}"):
        mine = answers.greedy(opened.model, prompts[rank::world], data.answer_limit, data.limit, data.ends,
                              budget, lambda count: bar.update(count * world), opened.layout == "packed")
    opened.model.set_attn_implementation(of_layout)
    found = distributed.gather_or_raise(None, mine)
    return [found[i % world][i // world] for i in range(len(prompts))]


def shortage_named(where: str, examples=(), advice: str = ADVICE):
    """Names the rank and the rows for which memory was short, and what to change."""
    rows = (lambda: memory.describe(examples)) if examples else None
    return memory.shortage_named(distributed.rank_and_world()[0], where, rows, advice)


def report(folder: Path, checkpoints: list[Checkpoint], work: list[Work], parts: Parts) -> None:
    """Writes the tables, the verdict and the figures, and shows them."""
    runs = {c.run: c for c in checkpoints if c.phase}
    before = tables.contents(folder)
    found = tables.join(folder, work, parts, {run: c.settings for run, c in runs.items()})
    lines = verdict.judge(found["scores"], found["pairs"], found["answers"], found["tenths"],
                          {run: recipe(c.settings.record) for run, c in runs.items()},
                          {run: noise.of_record(c.settings.record, Path(c.path).parent / "run.json")
                           for run, c in runs.items()}, found["risers"])
    tables.write_text(folder / "verdict.json", json.dumps(lines, indent=1) + "\n")
    tables.write_text(folder / "answers.txt", side_by_side.to_file(found["answers"]))
    distributed.say(show(found["summary"]))
    for run, c in runs.items():
        pairs = found["pairs"]
        if c.settings.reference and len(pairs) and pairs[pairs["run"] == run]["margin"].isna().all():
            distributed.say(f"{run}: has no rewards, since its reference, {c.settings.reference}, was not scored; "
                            "name it beside the run")
    if failed := len(found["failed"]):
        distributed.say(f"{failed} log-probs are not finite and in no mean; they are listed in "
                        f"{folder / 'failed.jsonl'}")
    for text in [*band_to_screen(found["pairs"]), *risers.to_screen(found["risers"]),
                 *side_by_side.to_screen(found["answers"]), *(verdict.show(line) for line in lines)]:
        distributed.say(text)
    now = tables.contents(folder)
    if gone := [item for item in before if item not in now]:
        names = ", ".join(gone[:6]) + " ..." * (len(gone) > 6)
        back = "" if parts.unknown else " from parts/"
        distributed.say(f"no longer in {folder}: {names}; the command that scored it brings it back{back}, and another "
                        "--output_dir keeps both")
    distributed.say(draw_after(folder))
    if page := page_after(folder):
        distributed.say(page)
    distributed.say(f"done: {folder / 'scores.parquet'}")


def command() -> None:
    exit_process(run_script(main))


if __name__ == "__main__":
    command()
