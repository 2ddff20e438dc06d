"""Log-probabilities of any responses under any checkpoints, through the kernel that training uses.

    python score.py                                         the newest run under runs/, on its own held-out data
    python score.py RUN [RUN ...] --dataset_path forward=f.parquet reverse=r.parquet --output_dir O
    python score.py --model_path M --dataset_path D         any model or adapter
    torchrun --nproc_per_node=2 score.py RUN                the same work, shared by the ranks

Leaves scores.parquet, a line for each checkpoint, data set, row and response, summary.csv, their means, verdict.json,
what became of each run, and the other tables that nanodpo/scoring/scores.py describes. A scoring that was stopped goes
on where it was: what is done is kept in <output_dir>/parts, a folder a checkpoint and data set.
"""

import argparse
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import sys
from pathlib import Path

import torch

from nanodpo import agreement, distributed, space
from nanodpo.errors import UserError, leave, run_script
from nanodpo.figures.after import draw_after
from nanodpo.logprobs import sum_by_sequence
from nanodpo.packing import LAYOUTS
from nanodpo.progress import Progress
from nanodpo.reference import data_hash
from nanodpo.rows import SUFFIXES
from nanodpo.scoring import answers, plausible, responses, scores, side_by_side, verdict
from nanodpo.scoring.describe import describe
from nanodpo.scoring.means import show
from nanodpo.scoring.measures import token_measures
from nanodpo.scoring.opened import Opened, Opener
from nanodpo.scoring.pairs import gradient_products
from nanodpo.scoring.runs import Checkpoint, newest_run, open_targets, recipe, settings_of
from nanodpo.settings import local_rank
from nanodpo.signals import Stop
from nanodpo.source import base_of, check_ids, open_source
from nanodpo.template import Template, prompt_leads, read_template
from nanodpo.tokens import load_dataset
from nanodpo.unknown import parse_known

# How data is read: as the run did, unless these flags of train.py say otherwise.
READING = {"prompt_field": None, "chosen_field": None, "rejected_field": None, "assistant_header": None,
           "boundary": ["error", "concat"], "max_length": None, "max_prompt_length": None,
           "overlong": ["error", "drop", "truncate"], "on_bad_row": ["error", "drop"]}
OF_TRAIN = {"model_name": "name models as they are", "train_file_path": "--dataset_path names data",
            "eval_file_path": "--dataset_path names data", "per_device_eval_batch_size": "--max_tokens bounds a batch"}
LESS = ("what is done is kept, and the same command goes on from there. It needs a smaller --max_tokens, or --bf16, or "
        "to be without --gradients")


@dataclasses.dataclass
class Probe:
    """A data set with its responses: groups[i] belongs to examples[i]."""

    name: str
    examples: list
    kinds: list[str]
    groups: list[responses.Group]
    template: Template
    limit: int  # tokens of prompt and response
    expected: dict[int, tuple[str, bool]]  # which examples are answered and checked: the answer, does chosen think

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Scored tokens of each group."""
        return [sum(map(len, said.values())) for _, said in self.groups]

    def key_of(self, i: int) -> dict:
        """What tells a row from others in the tables."""
        return {"row": self.examples[i].row, "problem": self.examples[i].problem}

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        tokenizer = self.template.tokenizer
        return sorted({*tokenizer(self.template.end, add_special_tokens=False).input_ids[-1:], tokenizer.eos_token_id}
                      - {None})

    @property
    def key(self) -> str:
        """A hash of everything that is scored."""
        digest = hashlib.sha256(data_hash(self.examples).encode())
        rows = [(example.row, example.problem) for example in self.examples]
        digest.update(json.dumps([self.limit, self.kinds, self.groups, rows]).encode())
        return digest.hexdigest()


def main(argv: list[str]) -> None:
    with Stop() as stop, distributed.lost_peers_named():
        stop.outlook = lambda: "; what is done is kept, and the same command goes on from there"
        distributed.meet()
        score(argv)


def score(argv: list[str]) -> None:
    with agreement.together() as same:
        args = parse(argv)
        free = ("local_rank", "output_dir")  # the tables are rank 0's alone, and the parts are compared
        same |= agreement.flags({name: value for name, value in vars(args).items() if name not in free})
        same |= agreement.program(Path(__file__), args.local_rank)
    with agreement.together() as same:
        checkpoints = open_targets(args.targets, {name: getattr(args, name) for name in (*READING, "trust_remote_code")
                                                   if getattr(args, name)})
        probes = open_probes(checkpoints, args)
        folder = Path(args.output_dir or (args.targets[0] if (Path(args.targets[0]) / "run.json").is_file() else
                                          "scores"))
        scores.check_folder(folder / "parts")
        same |= what_is_scored(checkpoints, probes, args)
    device = open_device(args)
    longest = max(example.length for probe in probes for example in probe.examples)
    opener = Opener(device, args.bf16, args.gradients, longest)
    with shortage_named("scoring"):
        for probe in probes:
            if responses.GREEDY in probe.kinds:
                add_greedy(opener, checkpoints[0], probe, folder / "parts", args)
        parts = score_all(opener, checkpoints, probes, folder / "parts", args)
    distributed.leave()
    if distributed.is_main():
        before = scores.contents(folder)
        tables = scores.join_parts(folder, parts, {c.run: c.settings for c in checkpoints if c.phase})
        recipes = {c.run: recipe(c.settings.record) for c in checkpoints if c.phase}
        report(folder, tables, recipes, [item for item in before if item not in scores.contents(folder)])


def what_is_scored(checkpoints: list[Checkpoint], probes: list[Probe], args) -> dict:
    """What the ranks must have alike: the files of each checkpoint, the responses of each data set."""
    found = {f"files of {c.path} that hash to": part_key(c, args) for c in checkpoints}
    found |= {f"responses of data set {p.name} that hash to": f"{p.key} {p.expected}" for p in probes}
    return {name: hashlib.sha256(key.encode()).hexdigest()[:8] for name, key in found.items()}


def report(folder: Path, tables: dict, recipes: dict, gone: list[str]) -> None:
    """The verdict, and what is on the screen at the end; `gone` is what an earlier scoring had in this folder."""
    found = verdict.judge(tables["scores"], tables["pairs"], tables["answers"], tables["tenths"], recipes)
    scores.write_json(folder / "verdict.json", found)
    scores.write_text(folder / "answers.txt", side_by_side.to_file(tables["answers"]))
    distributed.say(show(tables["summary"]))
    if failed := len(tables["failed"]):
        distributed.say(f"{failed} log-probs are not finite and in no mean; they are listed in "
                        f"{folder / 'failed.jsonl'}")
    for text in [*side_by_side.to_screen(tables["answers"]), *(verdict.show(line) for line in found)]:
        distributed.say(text)
    if gone:
        names = ", ".join(gone[:6]) + " ..." * (len(gone) > 6)
        distributed.say(f"no longer in {folder}: {names}; the command that scored it brings it back from parts/, and "
                        "another --output_dir keeps both")
    distributed.say(draw_after(folder))
    distributed.say(f"done: {folder / 'scores.parquet'}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("targets", nargs="*", help="run folders, checkpoints, adapters or models")
    parser.add_argument("--model_path", help="one more of these")
    parser.add_argument("--dataset_path", nargs="+", default=[], help="files, with a name: NAME=FILE")
    parser.add_argument("--responses", nargs="+", metavar="KIND", help=f"of {', '.join(responses.KINDS)}, "
                        f"{responses.GREEDY} (the first checkpoint's own answer) and further columns of the data, by "
                        "name; default: the first four, as far as the data has them")
    parser.add_argument("--output_dir", help="default: the first run's folder, or scores/")
    parser.add_argument("--tokens", action="store_true", help="also keep every token's numbers: tokens.parquet")
    parser.add_argument("--gradients", action="store_true",
                        help="also the inner product and cosine of a pair's gradients by the LoRA weights")
    parser.add_argument("--answers", type=int, default=0, metavar="ROWS",
                        help="also let each checkpoint answer the first so many rows of each data set whose chosen "
                        r"response ends in a \boxed{...} or a number, greedily, and check that")
    parser.add_argument("--max_new_tokens", type=int, help="of a greedy answer; default: as the data's longest chosen")
    parser.add_argument("--other_prompts", action="store_true",
                        help="score prompts that open (system prompt) as none did in training")
    parser.add_argument("--max_tokens", type=int, default=16384 if torch.cuda.is_available() else 2048,
                        help="in a micro-batch")
    parser.add_argument("--seed", type=int, default=42, help="of drawn and shuffled responses")
    parser.add_argument("--bf16", action="store_true", help="also for models that no run says it of")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the weights")
    for name, choices in READING.items():
        parser.add_argument(f"--{name}", choices=choices, type=int if name.startswith("max_") else str,
                            help="as in train.py; default: as the run read its data")
    parser.add_argument("--gpu_id", type=int, help="the CUDA device to use")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line -> settings; fills in the newest run and its own data set. Raises UserError."""
    args = parse_known(make_parser(), argv, "score.py", OF_TRAIN)
    args.local_rank = local_rank(args.local_rank)
    for name, least in (("max_tokens", 1), ("max_new_tokens", 1), ("answers", 0), ("max_length", 1),
                        ("max_prompt_length", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if args.gpu_id is not None and "RANK" in os.environ:
        raise UserError(f"--gpu_id {args.gpu_id}: under a launcher each rank has its own device; leave it out")
    if args.gpu_id is not None and not torch.cuda.is_available():
        raise UserError(f"--gpu_id {args.gpu_id}: this machine has no CUDA device that torch finds; leave it out to "
                        "score on the CPU")
    if args.gpu_id is not None and not 0 <= args.gpu_id < torch.cuda.device_count():
        raise UserError(f"--gpu_id {args.gpu_id}: this machine has {torch.cuda.device_count()} CUDA devices, from 0")
    if twice := [kind for kind in args.responses or [] if args.responses.count(kind) > 1]:
        raise UserError(f"--responses: {twice[0]} is named twice")
    args.targets += [args.model_path] if args.model_path else []
    args.targets = args.targets or [newest_run(Path("runs"))]
    named = [item.partition("=") if "=" in item else (Path(item).stem, "", item) for item in args.dataset_path]
    args.own = not named
    args.dataset_path = [(name, path) for name, _, path in named] or [own_data(args.targets[0])]
    if nameless := [f"{name}={path}" for name, path in args.dataset_path if not (name and path)]:
        raise UserError(f"--dataset_path {nameless[0]}: expected FILE or NAME=FILE")
    names = [name for name, _ in args.dataset_path]
    if len(set(names)) < len(names):
        raise UserError(f"--dataset_path: two data sets are called {max(names, key=names.count)}; name them, NAME=FILE")
    return args


def own_data(target: str) -> tuple[str, str]:
    """(name, file) of a run's held-out data, else of what it trained on. Raises UserError for a bare model."""
    name, file, _ = own_rows(settings_of(target))
    if not file:
        what = "is no run, so --dataset_path is needed" if os.path.exists(target) else "no such run or folder"
        raise UserError(f"{target}: {what}")
    if file.endswith(SUFFIXES) and not os.path.isabs(file) and not glob.glob(file, recursive=True):
        raise UserError(f"{file}: no such file; {target} names its data as seen from the folder where it was started: "
                        "call score.py there")
    return name, file


def own_rows(settings) -> tuple[str, str | None, tuple[int, ...]]:
    """(name, file, rows) of a run's own data; no rows are all rows. The file is None for a bare model."""
    if settings.eval_file_path:
        return "test", settings.eval_file_path, ()
    return "test" if settings.held_out_rows else "train", settings.train_file_path, tuple(settings.held_out_rows or ())


def check_own(checkpoints: list[Checkpoint]) -> None:
    """Raises UserError for runs with other data of their own: what one held out, another may have trained on.

    Of bare models nothing is known; they are scored on the data of the run beside them.
    """
    found = {}
    for checkpoint in checkpoints:
        name, file, rows = own_rows(checkpoint.settings)
        if file:
            words = f"run {checkpoint.run}", f"{name}: {f'{len(rows)} held-out rows of ' if rows else ''}{file}"
            found.setdefault((name, os.path.abspath(file), rows), words)
    if len(found) > 1:
        (first, its), (second, others) = list(found.values())[:2]
        raise UserError(f"{first}'s own data ({its}) are not those of {second} ({others}): name data with "
                        "--dataset_path, or score the runs in two calls")


def open_probes(checkpoints: list[Checkpoint], args) -> list[Probe]:
    """Reads the data sets as the first checkpoint's run did, and says so where another run had other settings.

    Tokenizers may lie in many folders, but they must say the same: log-probs of other tokens don't compare. Raises
    UserError where they don't.
    """
    if args.own:
        check_own(checkpoints)
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
    if other := [f"--{name}" for name in READING
                 if len({getattr(known.settings, name) for known in checkpoints if known.phase}) > 1]:
        distributed.say(f"data are read as {checkpoint.run} read them; other runs had their own {', '.join(other)}")
    readers = [(name, reader(path, source, args)) for name, path in args.dataset_path]
    if args.own:
        check_data(checkpoints, readers[0][1])
    probes = [open_probe(name, read, checkpoint.settings, source, args) for name, read in readers]
    for checkpoint, probe in itertools.product(checkpoints, probes):
        check_leads(checkpoint, probe, args)
    return probes


def check_data(checkpoints: list[Checkpoint], read) -> None:
    """Raises UserError where the data that runs call their own are no longer what they read: rows that a run held out
    may be rows now that it was trained on. `read` gives a data set as the settings of a run say."""
    for run, settings in {c.run: c.recorded for c in checkpoints if c.phase}.items():
        name, path, _ = own_rows(settings)
        if not (known := settings.record.get("data")):
            distributed.say(f"{run}: run.json has no hash of its data; {path} is taken as it is")
        elif data_hash(read(settings).examples) != known[-1]:
            raise UserError(f"{path}: has changed since run {run} read it, so the rows called {name} are others now; "
                            "put the file back, or name data with --dataset_path")


def reader(path: str, source, args):
    """A function of a run's settings and of further columns: (name, file) -> the data set, read once for each way of
    reading. Of a run's own data it has the run's own rows."""
    known = {}

    def read(settings, more: tuple[str, ...] = ()):
        how = repr([getattr(settings, name) for name in ("loss", "date", *READING)] + [more])
        if how not in known:
            template = read_template(source.tokenizer, settings.assistant_header, settings.date)
            known[how] = load_dataset(path, template, settings, limit_of(settings, source), pairs=False, more=more)
            check_ids(source, path, known[how].examples)
            if args.own and (held := set(own_rows(settings)[2])):
                known[how].examples = [example for example in known[how].examples if example.row in held]
        return known[how]

    return read


def limit_of(settings, source) -> int:
    """Tokens of prompt and response."""
    return min(settings.max_length or sys.maxsize, source.context or sys.maxsize)


def open_probe(name: str, read, settings, source, args) -> Probe:
    """A data set as the settings of a run read it, with its responses."""
    limit = limit_of(settings, source)
    template = read_template(source.tokenizer, settings.assistant_header, settings.date)
    kinds = args.responses or list(responses.KINDS)
    columns = tuple(kind for kind in kinds if kind not in responses.KINDS and kind != responses.GREEDY)
    data = read(settings, columns)
    if not args.responses:
        rows = range(len(data.examples))
        kinds = [kind for kind in kinds if any(responses.KINDS[kind](data.examples, i, args.seed) for i in rows)]
    distributed.say(data.report())
    groups = responses.make_groups(data.examples, kinds, args.seed, limit)
    expected = known_answers(data.examples, source.tokenizer, args.answers)
    if len(expected) < min(args.answers, len(data.examples)):
        distributed.say(f"{name}: {len(expected)} of {len(data.examples)} chosen responses are whole and end in an "
                        "answer that can be checked")
    return Probe(name, data.examples, kinds, groups, template, limit, expected)


def known_answers(examples, tokenizer, most: int) -> dict[int, tuple[str, bool]]:
    """Of the first examples whose chosen response is whole and answers something: {which: (answer, does it think)}."""
    found = {}
    for i, example in enumerate(examples if most else []):
        chosen = tokenizer.decode(example.chosen)
        if not example.cut[0] and (answer := answers.final_answer(chosen)) is not None:
            found[i] = answer, answers.thinks(chosen)
        if len(found) == most:
            break
    return found


def check_leads(checkpoint: Checkpoint, probe: Probe, args) -> None:
    """Raises UserError for prompts that open otherwise than those of the checkpoint's run, unless asked for."""
    known = checkpoint.settings.prompt_leads
    found = prompt_leads(probe.template, [example.prompt for example in probe.examples])
    if known and not args.other_prompts and (new := [lead for lead in found if lead not in known]):
        here, there = (repr(lead) if lead is not None else "no user's turn" for lead in (new[0], known[0]))
        raise UserError(f"data set {probe.name}: a prompt opens with {here}, and run {checkpoint.run} was trained "
                        f"on {there}; --other_prompts scores it all the same")


def open_device(args) -> torch.device:
    """This rank's device; ranks only meet where a launcher started them."""
    if "RANK" in os.environ:
        return distributed.start(args.local_rank)
    distributed.spare_memory()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(args.gpu_id or 0)  # what libraries put on "cuda" goes there too
    return torch.device("cuda", args.gpu_id or 0)


def shortage_named(where: str, examples=()):
    rows = (lambda: space.describe(examples)) if examples else None
    return space.shortage_named(distributed.place()[0], where, rows, LESS)


def add_greedy(opener: Opener, first: Checkpoint, probe: Probe, folder: Path, args) -> None:
    """Puts the first checkpoint's own answers among a data set's responses; they are kept, like the parts."""
    key = f"{part_key(first, args)}/{probe.key}/{args.max_new_tokens}"
    file = folder / f"greedy-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    said = distributed.from_main(scores.read_json(file) if distributed.is_main() and file.is_file() else None)
    if said is None:
        distributed.say(f"{probe.name}: greedy answers of {first.path}")
        said = answer_greedily(opener.open(first), probe, range(len(probe.groups)), args)
        if distributed.is_main():
            scores.write_json(file, said)
    probe.groups = responses.add_greedy(probe.groups, probe.kinds, said)


def answer_greedily(opened: Opened, probe: Probe, rows, args) -> list[list[int]]:
    """Greedy answers to the prompts of these rows, shared by the ranks."""
    rank, world = distributed.place()
    most = args.max_new_tokens or max(len(example.chosen) for example in probe.examples)
    prompts = [probe.examples[i].prompt for i in rows]
    opened.model.set_attn_implementation(opened.own)  # the layout's has no notion of a cache
    # Of tokens that were generated a model keeps keys and values, and nothing else of what a scored one takes.
    with (shortage_named(f"the greedy answers of {opened.checkpoint.path}"),
          Progress("greedy answers", len(prompts), "answer") as bar):
        mine = answers.greedy(opened.model, prompts[rank::world], most, probe.limit, probe.ends, 4 * args.max_tokens,
                              lambda count: bar.update(count * world))
    opened.model.set_attn_implementation(opened.attention)
    parts = distributed.agree(None, dict(zip(range(len(prompts))[rank::world], mine)))
    return [said for _, said in sorted(item for part in parts for item in part.items())]


def part_key(checkpoint: Checkpoint, args) -> str:
    """All of a checkpoint that could change a number; weights by their files' names, sizes and times."""
    base, _ = base_of(checkpoint.path)
    folders = [Path(checkpoint.path), Path(base)]
    kinds = ("*.safetensors", "*.bin", "*.json")
    found = sorted(file for folder in folders for kind in kinds for file in folder.glob(kind))
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    return repr((checkpoint.run, checkpoint.path, base, files, checkpoint.settings.bf16 or args.bf16))


def plan(checkpoints, probes, folder: Path, args) -> list[tuple[Checkpoint, Probe, Path, Path | None]]:
    """(checkpoint, data set, folder of the part, that of the same at the run's step 0 or None), in order of work."""
    work, starts = [], {}
    asked = args.tokens, args.gradients, args.answers, args.max_new_tokens, scores.COLUMNS
    for checkpoint in checkpoints:
        own = part_key(checkpoint, args)
        for probe in probes:
            start = starts.get((checkpoint.run, probe.name))
            key = repr((own, probe.name, probe.key, probe.expected, asked, start and start.name))
            part = folder / hashlib.sha256(key.encode()).hexdigest()[:24]
            if checkpoint.step == 0:
                start = starts[checkpoint.run, probe.name] = part
            work.append((checkpoint, probe, part, start))
    return work


def score_all(opener: Opener, checkpoints, probes, folder: Path, args) -> list[Path]:
    """Scores what is not there yet. Returns the folders of all parts, in order."""
    work = plan(checkpoints, probes, folder, args)
    done = distributed.from_main([part.is_dir() for _, _, part, _ in work])
    distributed.say(f"{len(work)} parts, {sum(done)} of them done before")
    missing = [item for item, there in zip(work, done) if not there]
    rows = sum(len(probe.groups) for _, probe, _, _ in missing)
    with Progress("scoring", rows, "row") as bar:
        for checkpoint, probe, part, start in missing:
            bar.update(0, f"{checkpoint.run} step {checkpoint.step} {probe.name}")
            score_part(opener, checkpoint, probe, part, start, args, bar)
    return [part for _, _, part, _ in work]


def score_part(opener: Opener, checkpoint: Checkpoint, probe: Probe, part: Path, start: Path | None, args, bar) -> None:
    """One checkpoint's scores of one data set, into the folder `part`; `start` is that of its run's step 0."""
    opened, is_start = opener.open(checkpoint), start == part
    known = plausible.read(start, probe.lengths) if start and not is_start else None
    found, sets = score_probe(opened, probe, known, bool(start), args, bar)
    if probe.expected:
        found["answers"] = check_answers(opened, probe, args)
    with distributed.main_first():  # the others read what it wrote
        if distributed.is_main():
            keep = functools.partial(plausible.write, parts=sets) if is_start else lambda folder: None
            scores.write_part(part, checkpoint, probe.name, found, keep)


@torch.no_grad()
def score_probe(opened: Opened, probe: Probe, known, compared: bool, args, bar) -> tuple[dict[str, list], list]:
    """({table: lines}, plausible tokens of each group) of a data set, in its order, on all ranks.

    `known` are the plausible tokens of the start, None where this is it; `compared`: is there a start at all.
    """
    (rank, world), device = distributed.place(), next(opened.module.parameters()).device
    pieces, mine = functools.lru_cache(None)(lambda i: probe.template.tokenizer.decode([i])), {}
    for indices in responses.batches(probe.groups, args.max_tokens)[rank::world]:
        groups = [probe.groups[i] for i in indices]
        row = LAYOUTS[opened.layout]([(prompt, [*said.values()]) for prompt, said in groups]).to(device)
        with shortage_named(f"scoring under {opened.checkpoint.path}", [probe.examples[i] for i in indices]):
            values, sets, states = token_measures(opened.module, row, known and plausible.join(
                [known[i] for i in indices], device))
        if not compared:
            for name in ("implausible_mass", "implausible_mass_start"):
                values[name].fill_(torch.nan)
        results = by_response(row, values, states)
        for i, (prompt, said), own in zip(indices, groups, plausible.split(sets, [probe.lengths[i] for i in indices])):
            found = {kind: next(results) for kind in said}
            lines = describe(probe.key_of(i), said, found, lambda ids: [*map(pieces, ids)], args.tokens)
            if args.gradients and lines["pairs"]:
                with shortage_named(f"the gradients under {opened.checkpoint.path}", [probe.examples[i]]):
                    lines["pairs"][0] |= pair_gradients(opened, prompt, said, device)
            mine[i] = lines, own
            bar.update(world)
    parts = distributed.agree(None, mine)
    every = sorted((item for part in parts for item in part.items()), key=lambda item: item[0])
    tables = {name: [line for _, (lines, _) in every for line in lines[name]] for name in every[0][1][0]}
    if all(math.isnan(line["logps"]) for line in tables["scores"]):
        raise UserError(f"{opened.checkpoint.path}: no log-prob of {probe.name} is finite: the weights are broken")
    return tables, [own for _, (_, own) in every]


def by_response(row, values: dict[str, torch.Tensor], states: torch.Tensor):
    """Cuts what was found along a row into its responses, in order: what `describe` takes of each."""
    lengths = row.seq.bincount(minlength=row.n_sequences).tolist()
    sums = sum_by_sequence(values["logps"], row.seq, row.n_sequences).tolist()
    columns = {name: value.cpu().split(lengths) for name, value in values.items()}
    for s, (logps, state) in enumerate(zip(sums, states.cpu())):
        yield {"logps": logps, "states": state, "tokens": {name: parts[s].numpy() for name, parts in columns.items()}}


@torch.enable_grad()
def pair_gradients(opened: Opened, prompt: list[int], said: dict, device) -> dict[str, float]:
    row = LAYOUTS[opened.layout]([(prompt, [said["chosen"], said["rejected"]])])
    return gradient_products(opened.module(row.to(device)), opened.trained)


def check_answers(opened: Opened, probe: Probe, args) -> list[dict]:
    """A line for each row whose answer is known: what this checkpoint says, and whether it is right."""
    lines, said = [], answer_greedily(opened, probe, list(probe.expected), args)
    for (i, (expected, thinks)), ids in zip(probe.expected.items(), said):
        text = probe.template.tokenizer.decode(ids)
        found = answers.final_answer(text, marked=thinks)
        lines.append(probe.key_of(i) | {
            "found": found, "expected": expected, "correct": found == expected,
            "ended": not {*probe.ends}.isdisjoint(ids[-1:]), "tokens": len(ids),
            "repetition": answers.repetition(ids), "text": text,
            "prompt_end": probe.template.tokenizer.decode(probe.examples[i].prompt)[-300:]})
    return lines


if __name__ == "__main__":
    leave(run_script(main))
