"""Log-probabilities of any responses under any checkpoints, through the kernel that training uses.

    python score.py                                         the newest run under runs/, on its own held-out data
    python score.py RUN [RUN ...] --dataset_path forward=f.parquet reverse=r.parquet --output_dir O
    python score.py --model_path M --dataset_path D         any model or adapter
    torchrun --nproc_per_node=2 score.py RUN                the same work, shared by the ranks

Leaves scores.parquet, a line for each checkpoint, data set, row and response, summary.csv, their means, verdict.json,
what became of each run, and the other tables that nanodpo/scoring/scores.py describes. A scoring that was stopped goes
on where it was, and another one in the same folder adds to what is there: all that is done is kept in
<output_dir>/parts, under the contents of checkpoint and data (nanodpo/scoring/parts.py).
"""

import argparse
import collections
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import sys
from pathlib import Path

import pandas
import torch

from nanodpo.core.logprobs import sum_by_sequence
from nanodpo.core.packing import LAYOUTS
from nanodpo.data.rows import SUFFIXES
from nanodpo.data.template import Template, prompt_leads, read_template
from nanodpo.data.tokens import load_dataset
from nanodpo.errors import UserError, leave, run_script
from nanodpo.figures.after import draw_after
from nanodpo.flags.settings import local_rank
from nanodpo.flags.unknown import parse_known
from nanodpo.folder.atomic import check_writable
from nanodpo.folder.reference import data_hash
from nanodpo.model.source import check_ids, open_source
from nanodpo.progress import Progress
from nanodpo.ranks import distributed
from nanodpo.run import agreement, memory
from nanodpo.run.signals import Stop
from nanodpo.scoring import answers, needs, plausible, responses, scores, side_by_side, verdict
from nanodpo.scoring.describe import describe
from nanodpo.scoring.means import show
from nanodpo.scoring.measures import token_measures
from nanodpo.scoring.opened import Opened, Opener
from nanodpo.scoring.pairs import gradient_products
from nanodpo.scoring.parts import Parts
from nanodpo.scoring.runs import Checkpoint, find_bases, newest_run, noise_of, open_targets, recipe, settings_of

# How data is read: as the run did, unless these flags of train.py say otherwise.
READING = {"prompt_field": None, "chosen_field": None, "rejected_field": None, "assistant_header": None,
           "boundary": ["error", "concat"], "max_length": None, "max_prompt_length": None,
           "overlong": ["error", "drop", "truncate"], "on_bad_row": ["error", "drop"]}
OF_TRAIN = {"model_name": "name models as they are", "train_file_path": "--dataset_path names data",
            "eval_file_path": "--dataset_path names data", "per_device_eval_batch_size": "--max_tokens bounds a batch"}
AT_ONCE = 32  # micro-batches on each rank, or greedy answers, after which what is done is kept
LESS = ("what is done is kept, and the same command goes on from there. It needs a smaller --max_tokens, or --bf16, or "
        "to be without --gradients")


@dataclasses.dataclass
class Probe:
    """A data set with its responses: groups[i] belongs to examples[i]."""

    name: str
    examples: list
    asked: list[str]  # kinds of responses
    kinds: list[str]  # these, and those that an earlier scoring may have left
    groups: list[responses.Group]
    template: Template
    limit: int  # tokens of prompt and response
    known: dict = dataclasses.field(default_factory=dict)  # what `said` found

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
    def everything(self) -> str:
        """A hash of all that is scored, and of how it is read."""
        keys = [self.key_of(i) for i in range(len(self.examples))]
        return needs.hash_of([self.limit, self.asked, self.kinds, self.groups, keys])

    @functools.cached_property
    def pieces(self):
        """Token ids -> their texts."""
        piece = functools.lru_cache(None)(lambda i: self.template.tokenizer.decode([i]))
        return lambda ids: [*map(piece, ids)]

    @functools.cached_property
    def prompts(self) -> str:
        """A hash of all prompts and of the numbers of their rows."""
        return needs.hash_of([[example.row, example.prompt] for example in self.examples])

    def said(self, unit: tuple[str, ...]) -> tuple[dict[int, int], str]:
        """({row: index} of the examples that have one of these responses, a hash of their prompts and token ids)."""
        if unit not in self.known:
            self.known[unit] = self._said(unit)
        return self.known[unit]

    def _said(self, unit: tuple[str, ...]) -> tuple[dict[int, int], str]:
        here = {i: {kind: said[kind] for kind in unit if kind in said} for i, (_, said) in enumerate(self.groups)}
        rows = {self.examples[i].row: i for i, said in here.items() if said}
        return rows, needs.hash_of([[row, self.examples[i].problem, self.groups[i][0], here[i]]
                                    for row, i in rows.items()])


@dataclasses.dataclass
class Work:
    """A checkpoint and a data set: what is asked for, and what is there of it."""

    checkpoint: Checkpoint
    probe: Probe
    key: str  # of the checkpoint
    start: str | None  # that of its run's step 0
    needs: list[needs.Need]

    def missing(self, *kinds: str) -> dict[int, list[needs.Need]]:
        """Index of an example -> what is missing of it, of these kinds of results."""
        found = {}
        for need in self.needs:
            for row in need.missing if need.what in kinds else ():
                found.setdefault(need.rows[row], []).append(need)
        return dict(sorted(found.items()))


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
        check_writable(folder / "parts", f"--output_dir {folder}")
        find_bases(checkpoints)
        same |= what_is_scored(checkpoints, probes, args)
    device = open_device(args)
    longest = max(example.length for probe in probes for example in probe.examples)
    opener = Opener(device, args.bf16, args.gradients, longest)
    with Parts(folder / "parts") as parts:
        with shortage_named("scoring"):
            for probe in probes:
                add_greedy(opener, checkpoints[0], probe, parts, args)
            work = plan(checkpoints, probes, parts, args)
            score_all(opener, work, parts, args)
        distributed.leave()
        if distributed.is_main():
            before = scores.contents(folder)
            tables = scores.join(folder, [found_of(item, parts) for item in work],
                                 {c.run: c.settings for c in checkpoints if c.phase})
            recipes = {c.run: recipe(c.settings.record) for c in checkpoints if c.phase}
            noises = {c.run: noise_of(c) for c in checkpoints if c.phase}
            report(folder, tables, recipes, noises, [item for item in before if item not in scores.contents(folder)])


def what_is_scored(checkpoints: list[Checkpoint], probes: list[Probe], args) -> dict:
    """What the ranks must have alike: the files of each checkpoint, the responses of each data set."""
    found = {f"files of {c.path} that hash to": c.key(args.bf16) for c in checkpoints}
    found |= {f"responses of data set {p.name} that hash to": p.everything for p in probes}
    return {name: needs.hash_of(key)[:8] for name, key in found.items()}


def report(folder: Path, tables: dict, recipes: dict, noises: dict, gone: list[str]) -> None:
    """The verdict, and what is on the screen at the end; `gone` is what an earlier scoring had in this folder."""
    found = verdict.judge(tables["scores"], tables["pairs"], tables["answers"], tables["tenths"], recipes, noises)
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
    asked = args.responses or list(responses.KINDS)
    columns = tuple(kind for kind in asked if kind not in responses.KINDS and kind != responses.GREEDY)
    data = read(settings, columns)
    there = [kind for kind, make in responses.KINDS.items()
             if any(make(data.examples, i, args.seed) for i in range(len(data.examples)))]
    asked = args.responses or there
    distributed.say(data.report())
    kinds = [*asked, *(kind for kind in there if kind not in asked)]
    groups = responses.make_groups(data.examples, kinds, args.seed, limit)
    probe = Probe(name, data.examples, asked, kinds, groups, template, limit)
    known = len(first_known(probe, args.answers))
    if known < min(args.answers, len(data.examples)):
        distributed.say(f"{name}: {known} of {len(data.examples)} chosen responses are whole and end in an answer that "
                        "can be checked")
    return probe


def known_answer(probe: Probe, i: int) -> tuple[str, bool] | None:
    """What the chosen response of an example answers, where it is whole, and whether it thinks."""
    chosen = probe.template.tokenizer.decode(probe.examples[i].chosen)
    if not probe.examples[i].cut[0] and (answer := answers.final_answer(chosen)) is not None:
        return answer, answers.thinks(chosen)
    return None


def first_known(probe: Probe, most: int) -> dict[int, int]:
    """{row: index} of the first examples whose answer is known, at most so many."""
    known = (i for i in range(len(probe.examples)) if known_answer(probe, i))
    return {probe.examples[i].row: i for i in itertools.islice(known, most)}


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
    rows = (lambda: memory.describe(examples)) if examples else None
    return memory.shortage_named(distributed.rank_and_world()[0], where, rows, LESS)


def add_greedy(opener: Opener, first: Checkpoint, probe: Probe, parts: Parts, args) -> None:
    """Puts the first checkpoint's own answers among a data set's responses, where they are asked for or there."""
    rows = {example.row: i for i, example in enumerate(probe.examples)}
    need = answers_needed(responses.GREEDY, first, probe, rows, parts, args, responses.GREEDY in probe.asked)
    if responses.GREEDY not in probe.asked:
        if need is None or need.missing:
            return
        probe.kinds.append(responses.GREEDY)
    if need.missing:
        distributed.say(f"{probe.name}: greedy answers of {first.path}")
        answer(opener.open(first), probe, need, parts, args)
    said = distributed.from_main(said_in(parts, need) if distributed.is_main() else None)
    probe.groups = responses.add_greedy(probe.groups, probe.kinds, [said[row] for row in rows])


def longest_answer(probe: Probe, args) -> int:
    return args.max_new_tokens or max(len(example.chosen) for example in probe.examples)


def answers_needed(what: str, checkpoint: Checkpoint, probe: Probe, rows: dict[int, int], parts: Parts, args,
                   asked: bool) -> needs.Need | None:
    """Greedy answers to these rows; where they are not asked for, those that were made last, of whatever length."""
    need = needs.of_answers(what, checkpoint.key(args.bf16), probe, longest_answer(probe, args), rows)
    if not asked:
        if (key := parts.newest(need.family)) is None:
            return None
        need.key = key
    need.missing = need.rows.keys() - parts.rows(need.key)
    return need


def answer(opened: Opened, probe: Probe, need: needs.Need, parts: Parts, args) -> None:
    """Makes the greedy answers that are missing, and keeps them, some at a time."""
    left = sorted(need.missing, key=lambda row: (-len(probe.examples[need.rows[row]].prompt), row))
    size = AT_ONCE * distributed.rank_and_world()[1]
    with Progress("greedy answers", len(left), "answer") as bar:
        for rows in (left[i : i + size] for i in range(0, len(left), size)):
            said = answer_greedily(opened, probe, [need.rows[row] for row in rows], args, bar)
            parts.add({need.key: need.holds(rows)}, {need.what: pandas.DataFrame({"row": rows, "ids": said})})


def said_in(parts: Parts, need: needs.Need) -> dict[int, list[int]]:
    """Row -> the greedy answer that was made for it."""
    table = parts.read(need.key, need.what)
    return {row: ids.tolist() for row, ids in zip(table["row"], table["ids"])} if len(table) else {}


def answer_greedily(opened: Opened, probe: Probe, indices: list[int], args, bar) -> list[list[int]]:
    """Greedy answers to the prompts of these examples, shared by the ranks."""
    rank, world = distributed.rank_and_world()
    prompts = [probe.examples[i].prompt for i in indices]
    opened.model.set_attn_implementation(opened.own)  # the layout's has no notion of a cache
    # Of tokens that were generated a model keeps keys and values, and nothing else of what a scored one takes.
    with shortage_named(f"the greedy answers of {opened.checkpoint.path}"):
        mine = answers.greedy(opened.model, prompts[rank::world], longest_answer(probe, args), probe.limit, probe.ends,
                              4 * args.max_tokens, lambda count: bar.update(count * world))
    opened.model.set_attn_implementation(opened.attention)
    parts = distributed.gather_or_raise(None, dict(zip(range(len(prompts))[rank::world], mine)))
    return [said for _, said in sorted(item for part in parts for item in part.items())]


def plan(checkpoints: list[Checkpoint], probes: list[Probe], parts: Parts, args) -> list[Work]:
    """All checkpoints on all data sets, in order of work: a run's start comes first."""
    work, starts = [], {}
    for checkpoint in checkpoints:
        if checkpoint.step == 0:
            starts[checkpoint.run] = checkpoint.key(args.bf16)
        for probe in probes:
            start = starts.get(checkpoint.run)
            found = needs_of(checkpoint, start, probe, parts, args)
            asked = first_known(probe, args.answers)
            if need := answers_needed("answers", checkpoint, probe, asked, parts, args, bool(asked)):
                found.append(need)
            work.append(Work(checkpoint, probe, checkpoint.key(args.bf16), start, found))
    return work


def needs_of(checkpoint: Checkpoint, start: str | None, probe: Probe, parts: Parts, args) -> list[needs.Need]:
    """What is asked for of the responses, and what earlier calls have found of the same weights and data."""
    model, found = checkpoint.key(args.bf16), []

    def need_of(what, unit):
        need = needs.of_responses(what, model, start, probe, unit)
        need.missing = need.rows.keys() - parts.rows(need.key)
        return need

    units = needs.units(probe.asked)
    for unit in needs.units(probe.kinds):
        if unit not in units and not need_of("scores", unit).missing:
            units = [other for other in units if not {*other} & {*unit}] + [unit]
    for unit in units:
        asked = {"scores": True, "tokens": args.tokens, "gradients": args.gradients}
        for what in [*asked][: 2 + (unit == needs.PAIR)]:
            need = need_of(what, unit)
            if not need.missing or asked[what] and {*unit} & {*probe.asked}:
                found.append(need)
    return found


def score_all(opener: Opener, work: list[Work], parts: Parts, args) -> None:
    """Scores what is not there yet."""
    left = [item for item in work if any(need.missing for need in item.needs)]
    distributed.say(f"{len(work)} parts, {len(work) - len(left)} of them done before")
    rows = sum(len(item.missing("scores", "tokens", "gradients")) for item in left)
    with Progress("scoring", rows, "row") as bar:
        for item in left:
            bar.update(0, f"{item.checkpoint.run} step {item.checkpoint.step} {item.probe.name}")
            # Nobody else holds what is opened: the next one may need its memory.
            score_part(opener.open(item.checkpoint), item, parts, args, bar)
            for need in item.needs:
                if need.what == "answers" and need.missing:
                    answer(opener.open(item.checkpoint), item.probe, need, parts, args)


def score_part(opened: Opened, item: Work, parts: Parts, args, bar) -> None:
    """Scores what is missing of the responses, and keeps it after every so many micro-batches."""
    by_row, gradients = item.missing("scores", "tokens"), item.missing("gradients")
    groups = [(prompt, {kind: ids for kind, ids in said.items()
                        if any(kind in need.responses for need in by_row.get(i, ()))})
              for i, (prompt, said) in enumerate(item.probe.groups)]
    tasks = [(True, indices) for indices in responses.batches(groups, args.max_tokens)]
    tasks += [(False, [i]) for i in gradients]
    known = known_sets(item, parts) if tasks else None
    rank, world = distributed.rank_and_world()
    for first in range(0, len(tasks), AT_ONCE * world):
        mine, chunk = {}, tasks[first : first + AT_ONCE * world]
        for forward, indices in chunk[rank::world]:
            if forward:
                mine |= score_groups(opened, item, groups, indices, known, args)
            else:
                rows = [item.probe.examples[i] for i in indices]
                with shortage_named(f"the gradients under {opened.checkpoint.path}", rows):
                    mine[~indices[0]] = pair_gradients(opened, *item.probe.groups[indices[0]])
            bar.update(world * sum(forward or i not in by_row for i in indices))
        found = dict(sorted(one for part in distributed.gather_or_raise(None, mine) for one in part.items()))
        keep(parts, item, {i: (by_row[i], *found[i]) for i in found if i >= 0},
             {~i: (gradients[~i], found[i]) for i in found if i < 0})


def known_sets(item: Work, parts: Parts) -> dict | None:
    """{(row, response): tokens that the run's start found plausible}; None where this is it, or there is none."""
    if item.start is None or item.start == item.key:
        return None
    known = {}
    for need in item.needs:
        if need.what in ("scores", "tokens"):
            for unit in {need.responses, needs.PAIR} if {*need.responses} & {*needs.PAIR} else {need.responses}:
                start = needs.of_responses("scores", item.start, item.start, item.probe, unit)
                known |= parts.sets(start.key)
    return known


@torch.no_grad()
def score_groups(opened: Opened, item: Work, groups: list, indices: list[int], known, args) -> dict[int, tuple]:
    """{index: ({table: lines}, {response: tokens that were found plausible})} of the responses in these groups.

    `known` are the plausible tokens of the start, None where this is it, or where there is no start.
    """
    probe, device = item.probe, next(opened.module.parameters()).device
    groups = {i: groups[i] for i in indices}
    row = LAYOUTS[opened.layout]([(prompt, [*said.values()]) for prompt, said in groups.values()]).to(device)
    names = [(probe.examples[i].row, kind) for i, (_, said) in groups.items() for kind in said]
    if known is not None and (lost := [name for name in names if name not in known]):
        raise UserError(f"row {lost[0][0]}, {lost[0][1]}: nothing is left of what step 0 found plausible there; score "
                        f"step 0 with --responses {lost[0][1]} first")
    with shortage_named(f"scoring under {opened.checkpoint.path}", [probe.examples[i] for i in indices]):
        values, sets, states = token_measures(opened.module, row, known and plausible.join(
            [known[name] for name in names], device))
    if item.start is None:
        for name in ("implausible_mass", "implausible_mass_start"):
            values[name].fill_(torch.nan)
    results, found = by_response(row, values, states), {}
    own = iter(plausible.split(sets, [len(ids) for _, said in groups.values() for ids in said.values()]))
    for i, (_, said) in groups.items():
        measured = {kind: next(results) for kind in said}
        lines = describe(probe.key_of(i), said, measured, probe.pieces, args.tokens)
        found[i] = lines, {kind: next(own) for kind in said}
    return found


@torch.enable_grad()
def pair_gradients(opened: Opened, prompt: list[int], said: dict) -> dict[str, float]:
    row = LAYOUTS[opened.layout]([(prompt, [said["chosen"], said["rejected"]])])
    return gradient_products(opened.module(row.to(opened.trained[0].device)), opened.trained)


def keep(parts: Parts, item: Work, scored: dict[int, tuple], gradients: dict[int, tuple]) -> None:
    """Keeps what was found of these examples: {index: (what was missing, lines, plausible tokens)}, and of gradients
    {index: (what was missing, products)}."""
    tables, sets, holds = collections.defaultdict(list), [], {}
    for i, (missing, lines, own) in scored.items():
        row, here = item.probe.examples[i].row, {need.what: set() for need in missing}
        for need in missing:
            holds.setdefault(need.key, need.holds([]))["rows"].add(row)
            here[need.what] |= {*need.responses}
        wanted = here.get("scores", set())
        for name in ("scores", "sections", "failed"):
            tables[name] += [line for line in lines[name] if line["response"] in wanted]
        tables["pairs"] += lines["pairs"] if {*needs.PAIR} <= wanted else []
        tables["tokens"] += [part for part in lines["tokens"] if part["response"][0] in here.get("tokens", ())]
        sets += [own[line["response"]] for line in lines["scores"] if line["response"] in wanted]
    for i, ((need,), products) in gradients.items():
        row = item.probe.examples[i].row
        holds.setdefault(need.key, need.holds([]))["rows"].add(row)
        tables["gradients"].append({"row": row} | products)
    first = not any(parts.index.get(key) for key in holds)
    if first and tables["scores"] and all(math.isnan(line["logps"]) for line in tables["scores"]):
        raise UserError(f"{item.checkpoint.path}: no log-prob of {item.probe.name} is finite: the weights are broken")
    tables = {name: pandas.concat(lines) if name == "tokens" else pandas.DataFrame(lines)
              for name, lines in tables.items() if lines}
    is_start = item.start == item.key and sets
    parts.add(holds, tables, functools.partial(plausible.write, parts=sets) if is_start else lambda folder: None)


def found_of(item: Work, parts: Parts) -> scores.Found:
    """All that is there of a checkpoint and data set, for the tables."""
    return scores.Found(item.checkpoint, item.probe, item.needs, parts, functools.partial(check_answers, item.probe))


def by_response(row, values: dict[str, torch.Tensor], states: torch.Tensor):
    """Cuts what was found along a row into its responses, in order: what `describe` takes of each."""
    lengths = row.sequence.bincount(minlength=row.n_sequences).tolist()
    sums = sum_by_sequence(values["logps"], row.sequence, row.n_sequences).tolist()
    columns = {name: value.cpu().split(lengths) for name, value in values.items()}
    for s, (logps, state) in enumerate(zip(sums, states.cpu())):
        yield {"logps": logps, "states": state, "tokens": {name: parts[s].numpy() for name, parts in columns.items()}}


def check_answers(probe: Probe, said: dict[int, list[int]]) -> list[dict]:
    """A line for each row whose answer is known: what a checkpoint says, and whether it is right."""
    lines = []
    for i, example in enumerate(probe.examples):
        if example.row in said and (known := known_answer(probe, i)):
            ids, (expected, thinks) = said[example.row], known
            text = probe.template.tokenizer.decode(ids)
            found = answers.final_answer(text, marked=thinks)
            lines.append(probe.key_of(i) | {
                "found": found, "expected": expected, "correct": found == expected,
                "ended": not {*probe.ends}.isdisjoint(ids[-1:]), "tokens": len(ids),
                "repetition": answers.repetition(ids), "text": text,
                "prompt_end": probe.template.tokenizer.decode(example.prompt)[-300:]})
    return lines


if __name__ == "__main__":
    leave(run_script(main))
